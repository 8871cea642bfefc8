"""The node's methods: what they accept, and that their answers can be checked."""

from __future__ import annotations

import pytest
from eth_hash.auto import keccak

from agent.core.units import hex0x
from agent.demo.devnet import Devnet
from agent.demo.eth_methods import ProviderLimits, block_json, log_filter, quantity, raw
from agent.demo.evm import Refusal

ZERO = "0x" + "00" * 20


def ask(net: Devnet, method: str, *params: object) -> object:
    """Call a method as the server does."""
    return net.methods.table[method](*params)


def test_a_block_can_be_checked_by_its_hash() -> None:
    """Would catch a header field that is missing or wrong: whoever hashes what we say must get what we claim."""
    rlp = pytest.importorskip("rlp")
    net = Devnet()
    net.mine()
    shown = block_json(net.evm.head, full=False)
    parents = (
        "parentHash",
        "sha3Uncles",
        "miner",
        "stateRoot",
        "transactionsRoot",
        "receiptsRoot",
        "logsBloom",
    )
    gas = ("difficulty", "number", "gasLimit", "gasUsed", "timestamp")
    seal = (
        "extraData",
        "mixHash",
        "nonce",
        "baseFeePerGas",
        "withdrawalsRoot",
        "blobGasUsed",
        "excessBlobGas",
    )
    requests = ("parentBeaconBlockRoot", "requestsHash")
    numbers = {*gas, "baseFeePerGas", "blobGasUsed", "excessBlobGas"}
    values = [
        int(shown[name], 16) if name in numbers else bytes.fromhex(shown[name][2:])
        for name in (*parents, *gas, *seal, *requests)
    ]
    assert hex0x(keccak(rlp.encode(values))) == shown["hash"]


def test_tags_name_their_blocks() -> None:
    """Would catch `finalized` that is the head, when a test of tiers wants it behind."""
    net = Devnet(finality_depth=3)
    net.mine(5)
    heights = {
        tag: ask(net, "eth_getBlockByNumber", tag)["number"]
        for tag in ("earliest", "finalized", "safe", "latest")
    }
    assert heights == {"earliest": "0x0", "finalized": "0x2", "safe": "0x2", "latest": "0x5"}
    assert ask(net, "eth_getBlockByNumber", "0x6") is None
    assert ask(net, "eth_getBlockByHash", hex0x(net.evm.blocks[4].block_hash))["number"] == "0x4"


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ({"fromBlock": "0x0", "toBlock": "0x5"}, "max block range 3"),
        ({"blockHash": "0x" + "77" * 32}, "header not found"),
        ({"topics": [None] * 5}, "at most 4 topics"),
    ],
)
def test_logs_are_refused_in_the_words_of_hosted_nodes(query: dict[str, object], words: str) -> None:
    """Would catch a devnet that is too kind: the adapter's adapting would never be tried."""
    net = Devnet(limits=ProviderLimits(range_blocks=3))
    net.mine(5)
    with pytest.raises(Refusal, match=words):
        ask(net, "eth_getLogs", query)
    assert ask(net, "eth_getLogs", {"fromBlock": "0x3", "toBlock": "0xffff"}) == []


def test_state_is_that_of_the_block_asked_for() -> None:
    """Would catch a read of the newest state where an older one was asked for."""
    net = Devnet()
    before = ask(net, "eth_getBalance", hex0x(net.address("alice")), "earliest")
    net.mine(2)
    assert (
        ask(net, "eth_getBalance", hex0x(net.address("alice")), {"blockNumber": "0x1"})
        == before
        == hex(10**21)
    )
    assert ask(net, "eth_getTransactionCount", ZERO, "0x1") == "0x0"
    assert ask(net, "eth_getStorageAt", ZERO, "0x0") == "0x" + "00" * 32
    assert ask(net, "eth_getCode", ZERO) == "0x"


def test_fees_are_told_for_the_next_block_too() -> None:
    """Would catch a fee history without the base fee that a sender needs."""
    net = Devnet()
    net.mine(3)
    history = ask(net, "eth_feeHistory", "0x2", "latest", [])
    assert history["oldestBlock"] == "0x2"
    assert [int(fee, 16) for fee in history["baseFeePerGas"]] == [
        *(block.header.base_fee_per_gas for block in net.evm.blocks[2:]),
        net.evm.next_base_fee_wei,
    ]


@pytest.mark.parametrize("value", [None, True, 1.5, [], "", "x", "-0x1", hex(2**256)])
def test_what_is_no_quantity_is_refused(value: object) -> None:
    """Would catch a value of a wrong shape that gets into the EVM."""
    with pytest.raises((TypeError, ValueError)):
        quantity(value)


@pytest.mark.parametrize(
    ("value", "length"), [(None, None), ("00", None), ("0x0", None), ("0xzz", None), ("0x00", 20)]
)
def test_what_is_no_data_is_refused(value: object, length: int | None) -> None:
    """Would catch an address of a wrong length."""
    with pytest.raises(ValueError, match=r"hex|bytes"):
        raw(value, length)


def test_a_filter_takes_one_or_many() -> None:
    """Would catch one of the forms that clients use for the same thing."""
    topic = "0x" + "11" * 32
    assert log_filter({"address": ZERO, "topics": [topic, None, []]}) == log_filter(
        {"address": [ZERO], "topics": [[topic], None, None]}
    )
    assert log_filter({}) == log_filter({"address": None, "topics": []})
