"""A contract of 27 bytes for tests of the chain adapter: an empty call emits one log, any data makes it revert."""

from __future__ import annotations

import coincurve

from agent.chain.node import Web3Node
from agent.chain.sender import Sender
from agent.demo.devnet import Devnet
from agent.keys import Signer

# CALLDATASIZE ISZERO -> 12; PUSH4 deadbeef, MSTORE, REVERT(28, 4); 12: LOG1(0, 0, topic 1); STOP
RUNTIME = bytes.fromhex("361560125763deadbeef6000526004601cfd5b600160006000a100")
INIT = bytes.fromhex(f"60{len(RUNTIME):02x}600c60003960{len(RUNTIME):02x}6000f3") + RUNTIME
TOPIC = (1).to_bytes(32, "big")
REVERTING = b"\x01"


def signer_of(net: Devnet, label: str = "alice") -> Signer:
    """A funded account of the devnet as the daemon would hold it."""
    return Signer(coincurve.PrivateKey(net.key(label)))


def sender_for(net: Devnet, node: Web3Node, label: str = "alice", **settings: object) -> Sender:
    """A sender for that account."""
    return Sender(node, signer_of(net, label), net.chain_id, **settings)


async def deploy(net: Devnet, node: Web3Node) -> bytes:
    """Put the toy on the chain; its address."""
    receipt = await sender_for(net, node).send_and_wait(None, INIT)
    assert receipt.contract is not None
    return receipt.contract
