"""Transactions against a real (embedded) pool: what is signed, what it may cost, how it is replaced and named."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from toy_contract import INIT, REVERTING, deploy, sender_for, signer_of

from agent.chain.node import FeeSuggestion, Web3Node
from agent.chain.sender import FeePolicy, Sender, SignedTx
from agent.core.units import hex0x
from agent.demo.devnet import Devnet, address_from_key
from agent.errors import Refused, Transient
from agent.keys import ephemeral_signer

GWEI = 10**9
TO = b"\x22" * 20


@pytest.fixture
async def net() -> AsyncIterator[Devnet]:
    """A chain that makes a block for every transaction."""
    async with Devnet() as net:
        yield net


@pytest.fixture
async def node(net: Devnet) -> AsyncIterator[Web3Node]:
    """Requests only: a sender needs no more."""
    async with Web3Node(net.url_http) as node:
        yield node


class FixedFees:
    """A node that knows only fees and a full purse: for arithmetic."""

    def __init__(self, base_fee_wei: int, priority_fee_wei: int) -> None:
        self._fees = FeeSuggestion(base_fee_wei, priority_fee_wei)

    async def fees(self) -> FeeSuggestion:
        """Always the same."""
        return self._fees

    async def balance(self, address: bytes) -> int:
        """More than anything costs."""
        return 10**40


def paper_sender(base_fee_wei: int, tip_wei: int, policy: FeePolicy | None = None) -> Sender:
    """A sender on that node."""
    return Sender(FixedFees(base_fee_wei, tip_wei), ephemeral_signer(b"paper"), 1, policy)


async def attempt(preparing: Awaitable[SignedTx]) -> SignedTx | Refused:
    """What came of it."""
    try:
        return await preparing
    except Refused as refused:
        return refused


async def test_preparing_sends_nothing(net: Devnet, node: Web3Node) -> None:
    """Would catch a broadcast before the journal had the bytes: the order sign, journal, send is the caller's."""
    signed = await sender_for(net, node).prepare(TO, b"", 5)
    assert net.evm.pool == ()
    assert net.evm.head.number == 0
    await sender_for(net, node).broadcast(signed.raw_tx)
    assert await node.balance(TO) == 5


async def test_the_journals_bytes_say_everything(net: Devnet, node: Web3Node) -> None:
    """Would catch a replacement that is impossible after a restart because only the bytes survived."""
    signed = await sender_for(net, node).prepare(TO, b"\x01\x02", 5, 50_000, 7)
    assert SignedTx.from_raw(signed.raw_tx) == signed
    assert (signed.nonce, signed.gas_limit) == (7, 50_000)


async def test_fees_leave_room_for_full_blocks(net: Devnet, node: Web3Node) -> None:
    """Would catch a transaction that a few full blocks push out: offered is twice the base fee and the tip."""
    fees = await node.fees()
    signed = await sender_for(net, node).prepare(TO, b"", 1)
    assert signed.max_fee_per_gas_wei == 2 * fees.base_fee_wei + fees.priority_fee_wei
    assert signed.max_priority_fee_per_gas_wei == fees.priority_fee_wei


@given(
    base=st.integers(0, 10**12),
    tip=st.integers(0, 10**12),
    gas=st.integers(21_000, 10**6),
    cap=st.integers(0, 10**18),
)
async def test_gas_never_costs_more_than_it_is_worth(base: int, tip: int, gas: int, cap: int) -> None:
    """Would catch a cap that rounding or a small ceiling lets through."""
    outcome = await attempt(paper_sender(base, tip).prepare(TO, b"", 0, gas, 0, cost_wei_max=cap))
    if isinstance(outcome, Refused):
        assert outcome.reason == "fee_cap"
        assert cap // gas < base + tip
    else:
        assert outcome.cost_wei_max <= cap
        assert base + tip <= outcome.max_fee_per_gas_wei
        assert outcome.max_priority_fee_per_gas_wei <= outcome.max_fee_per_gas_wei


@given(
    base=st.integers(0, 10**12),
    tip=st.integers(0, 10**12),
    later_base=st.integers(0, 10**13),
    later_tip=st.integers(0, 10**13),
    ceiling=st.integers(1, 10**14),
)
async def test_a_replacement_is_one_for_every_pool(
    base: int, tip: int, later_base: int, later_tip: int, ceiling: int
) -> None:
    """Would catch a bump that rounds below 12.5 %, changes the purpose, or breaks the owner's ceiling."""
    first = await paper_sender(base, tip).prepare(TO, b"\x07", 3, 60_000, 9)
    second = await attempt(paper_sender(later_base, later_tip, FeePolicy(ceiling)).replacement(first))
    if isinstance(second, Refused):
        assert second.reason == "fee_cap"
        least_tip = max(-(-first.max_priority_fee_per_gas_wei * 9 // 8), 1, later_tip)
        assert ceiling < max(-(-first.max_fee_per_gas_wei * 9 // 8), 1, later_base + least_tip)
        return
    assert second.nonce == first.nonce
    assert second.gas_limit == first.gas_limit
    for old, new in (
        (first.max_fee_per_gas_wei, second.max_fee_per_gas_wei),
        (first.max_priority_fee_per_gas_wei, second.max_priority_fee_per_gas_wei),
    ):
        assert new * 8 >= old * 9
        assert new > old
    assert second.max_priority_fee_per_gas_wei <= second.max_fee_per_gas_wei <= ceiling
    assert second.max_fee_per_gas_wei >= later_base


async def test_a_replacement_takes_the_place_of_the_first(net: Devnet, node: Web3Node) -> None:
    """Would catch a second payment: the pool takes the replacement, one of the two is mined, the other never."""
    net.methods.automine = False
    sender = sender_for(net, node)
    first = await sender.prepare(TO, b"", 5)
    await sender.broadcast(first.raw_tx)
    second = await sender.replacement(first)
    await sender.broadcast(second.raw_tx)
    assert [bytes(tx.hash) for tx in net.evm.pool] == [second.tx_hash]
    net.mine()
    assert await node.receipt(first.tx_hash) is None
    assert (await node.receipt(second.tx_hash)).succeeded
    assert await node.balance(TO) == 5


async def test_the_owners_ceiling_is_kept(net: Devnet, node: Web3Node) -> None:
    """Would catch fees that follow a spike without asking, and a refusal without a remedy."""
    low = sender_for(net, node, policy=FeePolicy(max_fee_per_gas_wei=GWEI))
    with pytest.raises(Refused, match="fee_cap") as refused:
        await low.prepare(TO, b"", 1)
    assert refused.value.remedy
    tight = sender_for(net, node, policy=FeePolicy(max_fee_per_gas_wei=5 * GWEI // 2))
    assert (await tight.prepare(TO, b"", 1)).max_fee_per_gas_wei == 5 * GWEI // 2


@pytest.mark.parametrize("value_wei", [0, 10**18])
async def test_an_empty_purse_says_how_much_is_missing_and_where(
    net: Devnet, node: Web3Node, value_wei: int
) -> None:
    """Would catch the node's own words ("insufficient funds for gas * price + value"), which help nobody."""
    poor = Sender(node, ephemeral_signer(b"poor"), net.chain_id)
    with pytest.raises(Refused, match="unfunded") as refused:
        await poor.prepare(TO, b"", value_wei)
    assert hex0x(poor.address) in refused.value.remedy
    missing_wei = int(refused.value.remedy.split()[3])
    await sender_for(net, node).send_and_wait(poor.address, b"", missing_wei * 2)
    assert (await poor.prepare(TO, b"", value_wei)).nonce == 0


async def test_a_refusal_is_named_before_it_costs_anything(net: Devnet, node: Web3Node) -> None:
    """Would catch gas burnt on a transaction that the estimate already showed to fail."""
    contract = await deploy(net, node)
    named = sender_for(net, node, revert_name=lambda data: f"Custom{data.hex()}")
    with pytest.raises(Refused) as refused:
        await named.prepare(contract, REVERTING)
    assert refused.value.reason == "Customdeadbeef"


async def test_a_mined_failure_is_named_by_replay(net: Devnet, node: Web3Node) -> None:
    """Would catch a failed receipt that is taken for success, or reported without its reason."""
    contract = await deploy(net, node)
    sender = sender_for(net, node)
    with pytest.raises(Refused) as refused:
        await sender.send_and_wait(contract, REVERTING, gas_limit=60_000)
    assert refused.value.reason == "0xdeadbeef"
    with pytest.raises(Refused) as refused:
        await sender.send_and_wait(contract, b"", gas_limit=21_100)
    assert refused.value.reason == "out_of_gas"


async def test_waiting_has_an_end_and_survives_a_node_that_is_away(net: Devnet, node: Web3Node) -> None:
    """Would catch a command line that hangs on a transaction nobody mines, or gives up at the first lost answer."""
    net.methods.automine = False
    sender = sender_for(net, node)
    signed = await sender.prepare(TO, b"", 1)
    await sender.broadcast(signed.raw_tx)
    with pytest.raises(Transient, match="in no block") as problem:
        await sender.wait_mined(signed.tx_hash, 0.1)
    assert "before you send it again" in problem.value.remedy
    await net.unplug()
    with pytest.raises(Transient, match="in no block"):
        await sender.wait_mined(signed.tx_hash, 0.1)
    await net.listen()
    net.mine()
    assert (await sender.wait_mined(signed.tx_hash, 5)).succeeded


async def test_a_contract_is_created(net: Devnet, node: Web3Node) -> None:
    """Would catch a creation that is sent to an address, and a replacement of it that goes elsewhere."""
    net.methods.automine = False
    sender = sender_for(net, node)
    first = await sender.prepare(None, INIT)
    await sender.broadcast((await sender.replacement(first)).raw_tx)
    block = net.mine()
    assert block.transactions[0].contract_address is not None
    assert block.transactions[0].succeeded


async def test_several_in_flight_get_nonces_in_order(net: Devnet, node: Web3Node) -> None:
    """Would catch a second transaction that overwrites the first one waiting in the pool."""
    net.methods.automine = False
    sender = sender_for(net, node)
    for expected in range(3):
        signed = await sender.prepare(TO, b"", 1)
        assert signed.nonce == expected
        await sender.broadcast(signed.raw_tx)
    net.mine()
    assert await node.balance(TO) == 3


async def test_the_sender_is_who_signs(net: Devnet, node: Web3Node) -> None:
    """Would catch an address that is not the key's."""
    assert sender_for(net, node).address == signer_of(net).address == address_from_key(net.key("alice"))
