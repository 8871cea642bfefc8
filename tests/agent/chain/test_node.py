"""The node adapter against a real (embedded) node, over real sockets, with every way a connection can end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from rpc_servers import HASTY, liar
from tcp_proxy import TcpProxy
from toy_contract import REVERTING, RUNTIME, TOPIC, deploy, sender_for

from agent.chain.node import CatchUp, Header, RawLog, Reverted, Web3Node, check_deployment, tx_hash_of
from agent.chain.rpc import Limits, Rationed
from agent.demo.devnet import Devnet
from agent.demo.eth_methods import ProviderLimits
from agent.errors import Misconfigured, Refused, Transient


@pytest.fixture
async def net() -> AsyncIterator[Devnet]:
    """A chain that makes a block for every transaction."""
    async with Devnet() as net:
        yield net


@pytest.fixture(params=["ws only", "ws and http"])
async def node(net: Devnet, request: pytest.FixtureRequest) -> AsyncIterator[Web3Node]:
    """The adapter, with both ways of asking."""
    async with Web3Node(net.url_ws, net.url_http if "http" in request.param else "") as node:
        yield node


async def emit(net: Devnet, node: Web3Node, contract: bytes, count: int = 1) -> None:
    """Make the toy contract log."""
    sender = sender_for(net, node)
    for _ in range(count):
        await sender.send_and_wait(contract, b"", gas_limit=50_000)


async def within(seconds: float, waiting: object) -> object:
    """Wait, but not for ever."""
    async with asyncio.timeout(seconds):
        return await waiting


# ---- asking


async def test_answers_are_what_the_chain_says(net: Devnet, node: Web3Node) -> None:
    """Would catch a field read from the wrong place: every answer is compared with the chain's own objects."""
    net.mine(3)
    head = net.evm.head
    assert await node.chain_id() == 1337
    assert await node.genesis_hash() == net.evm.blocks[0].block_hash
    expected = Header(3, head.block_hash, net.evm.blocks[2].block_hash, head.header.timestamp)
    assert await node.head() == await node.header(3) == await node.header(head.block_hash) == expected
    assert await node.header("finalized") == expected
    assert await node.balance(net.address("alice")) == 1_000 * 10**18
    assert await node.nonce(net.address("alice")) == 0
    assert (await node.fees()).base_fee_wei == head.header.base_fee_per_gas


async def test_what_is_not_there_is_none(node: Web3Node) -> None:
    """Would catch a missing block or receipt that raises or is taken for a real one."""
    assert await node.header(1_000) is None
    assert await node.header(b"\x07" * 32) is None
    assert await node.receipt(b"\x07" * 32) is None
    assert await node.code(b"\x07" * 20) == b""


async def test_a_contracts_no_carries_its_data(net: Devnet, node: Web3Node) -> None:
    """Would catch a revert that is taken for a network problem and tried again for ever."""
    contract = await deploy(net, node)
    assert await node.code(contract) == RUNTIME
    assert await node.call(contract, b"") == b""
    with pytest.raises(Reverted) as by_call:
        await node.call(contract, REVERTING)
    with pytest.raises(Reverted) as by_estimate:
        await node.estimate_gas(net.address("alice"), contract, REVERTING)
    assert by_call.value.data == by_estimate.value.data == bytes.fromhex("deadbeef")


async def test_a_call_on_a_block_that_was_dropped_is_not_answered(net: Devnet, node: Web3Node) -> None:
    """Would catch a read of state that belongs to no chain any more (EIP-1898)."""
    contract = await deploy(net, node)
    dropped = net.mine()
    assert await node.call(contract, b"", dropped.block_hash) == b""
    net.reorg(1)
    with pytest.raises(Transient, match="header not found"):
        await node.call(contract, b"", dropped.block_hash)


async def test_logs_are_found_by_range_and_by_block(net: Devnet, node: Web3Node) -> None:
    """Would catch a filter that loses or invents logs, and topics in a wrong form."""
    contract = await deploy(net, node)
    await emit(net, node, contract, 3)
    found = await node.logs(contract, [TOPIC], 0, net.evm.head.number)
    assert [log.block_number for log in found] == [2, 3, 4]
    assert found[0].topics == (TOPIC,)
    assert found[0].block_hash == net.evm.blocks[2].block_hash
    assert await node.logs_at(found[1].block_hash, contract, [None]) == (found[1],)
    assert await node.logs(contract, [(TOPIC, b"\x09" * 32)], 3, 3) == (found[1],)
    assert await node.logs(contract, [b"\x09" * 32], 0, 4) == ()


@pytest.mark.parametrize(
    "limits", [ProviderLimits(range_blocks=7), ProviderLimits(results=2), ProviderLimits(range_blocks=1)]
)
async def test_ranges_shrink_to_what_the_provider_allows(limits: ProviderLimits) -> None:
    """Would catch a catch-up that gives up, loses logs or repeats some when a hosted node limits its answers."""
    async with Devnet(limits=limits) as net, Web3Node(net.url_ws) as node:
        contract = await deploy(net, node)
        for gap in (1, 20, 0, 5):
            await emit(net, node, contract)
            net.mine(gap)
        await emit(net, node, contract, 4)
        pages = [page async for page in node.log_pages(contract, [TOPIC], 0, net.evm.head.number)]
        assert [page.from_block for page in pages[1:]] == [page.to_block + 1 for page in pages[:-1]]
        assert (pages[0].from_block, pages[-1].to_block) == (0, net.evm.head.number)
        assert [log for page in pages for log in page.logs] == list(
            await node.logs(contract, [TOPIC], 0, net.evm.head.number)
        )
        assert sum(len(page.logs) for page in pages) == 8


async def test_a_range_that_no_size_makes_acceptable_ends(net: Devnet) -> None:
    """Would catch an endless loop against a node that refuses every range."""
    async with Devnet(limits=ProviderLimits(range_blocks=0)) as strict, Web3Node(strict.url_ws) as node:
        strict.mine(9)
        with pytest.raises(Transient, match="max block range"):
            await within(5, node.logs(b"\x01" * 20, [], 0, 9))


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (429, "slow down"),
        (-32005, "daily request count exceeded, request rate limited"),
        (-32000, "Too Many Requests"),
        (-32016, "over compute units per second capacity"),
    ],
)
async def test_rationing_is_no_reason_for_smaller_ranges(code: int, words: str) -> None:
    """Would catch a range halved down to single blocks because the provider counts requests: a thousand times as many of them."""
    async with (
        liar({"error": {"code": code, "message": words}}) as url,
        Web3Node(url) as node,
    ):
        with pytest.raises(Rationed):
            await within(5, node.logs(b"\x01" * 20, [], 0, 9_999))


# ---- hints


async def test_hints_tell_heads_and_logs(net: Devnet, node: Web3Node) -> None:
    """Would catch a subscription that is not there yet when the context is entered."""
    contract = await deploy(net, node)
    async with node.watch(contract, [TOPIC]) as hints:
        await emit(net, node, contract)
        heard = [await within(5, anext(hints)) for _ in range(2)]
    assert {type(hint) for hint in heard} == {Header, RawLog}
    assert all(hint.block_hash == net.evm.head.block_hash for hint in heard)
    for _ in range(100):
        if net.subscription_count == 0:
            return
        await asyncio.sleep(0.02)
    pytest.fail("the watch left its subscriptions behind")


@pytest.mark.parametrize("ending", ["crash", "going away", "normal close"])
async def test_no_ending_is_silent(net: Devnet, node: Web3Node, ending: str) -> None:
    """Would catch the graceful close that web3 swallows: a watch that has ended must raise, whatever the code."""
    end = {"crash": net.unplug, "going away": net.hang_up, "normal close": lambda: net.hang_up(1000)}[ending]
    async with node.watch(b"\x01" * 20, []) as hints:
        net.mine()
        assert isinstance(await within(5, anext(hints)), Header)
        await end()
        with pytest.raises(Transient, match="cannot be reached"):
            await within(5, anext(hints))


async def test_hints_heard_before_the_end_are_not_lost(net: Devnet, node: Web3Node) -> None:
    """Would catch an end that overtakes the hints which came before it."""
    async with node.watch(b"\x01" * 20, []) as hints:
        net.mine(3)
        await net.hang_up()
        assert [(await within(5, anext(hints))).number for _ in range(3)] == [1, 2, 3]
        with pytest.raises(Transient):
            await within(5, anext(hints))


async def test_after_a_restart_the_same_node_object_works_and_catches_up(net: Devnet, node: Web3Node) -> None:
    """Would catch a connection that is never opened again, and logs that are lost in the gap."""
    contract = await deploy(net, node)
    async with node.watch(contract, [TOPIC]) as hints:
        await net.unplug()
        with pytest.raises(Transient):
            await within(5, anext(hints))
    with pytest.raises(Transient, match="cannot be reached"):
        await node.head()
    missed = net.mine(2)
    await net.listen()
    async with node.watch(contract, [TOPIC]) as hints:
        assert (await node.head()).block_hash == missed.block_hash
        await emit(net, node, contract)
        log = (await node.logs(contract, [TOPIC], 0, net.evm.head.number))[-1]
        heard = [await within(5, anext(hints)), await within(5, anext(hints))]
    assert log in heard


async def test_a_half_open_link_is_noticed(net: Devnet) -> None:
    """Would catch a car that leaves the tunnel still believing in a connection that died in it."""
    async with (
        TcpProxy(net.port) as proxy,
        Web3Node(f"ws://127.0.0.1:{proxy.port}", limits=HASTY) as node,
        node.watch(b"\x01" * 20, []) as hints,
    ):
        proxy.freeze()
        with pytest.raises(Transient):
            await within(5, anext(hints))


async def test_a_forgotten_subscription_is_noticed(net: Devnet) -> None:
    """Would catch a link that answers pings while the node behind it forgot us: silence must be looked into."""
    async with Web3Node(net.url_ws, limits=HASTY) as node, node.watch(b"\x01" * 20, []) as hints:
        for client in net._clients:
            client.subscriptions.clear()
        net.mine(3)
        with pytest.raises(Transient, match="forgotten"):
            await within(5, anext(hints))


async def test_a_quiet_chain_is_no_reason_to_leave(net: Devnet) -> None:
    """Would catch a watch that takes silence for an end: several silent periods pass, then a head comes."""
    async with Web3Node(net.url_ws, limits=HASTY) as node, node.watch(b"\x01" * 20, []) as hints:
        waiting = asyncio.create_task(anext(hints))
        done, _ = await asyncio.wait([waiting], timeout=3 * HASTY.silence_s)
        assert not done
        net.mine()
        assert isinstance(await within(5, waiting), Header)


async def test_a_slow_reader_loses_hints_but_not_the_connection(net: Devnet) -> None:
    """Would catch the deadlock of 500 unread notifications, and a queue that grows without end."""
    async with Web3Node(net.url_ws, limits=Limits(hints=4)) as node, node.watch(b"\x01" * 20, []) as hints:
        for _ in range(70):
            net.mine(10)
            await asyncio.sleep(0)
        assert (await within(5, node.head())).number == 700
        net.mine()
        heard = [await within(5, anext(hints))]
        while heard[-1] == CatchUp() or heard[-1].number < 701:
            heard.append(await within(5, anext(hints)))
        assert CatchUp() in heard
        assert len(heard) < 700


async def test_watching_needs_a_websocket(net: Devnet) -> None:
    """Would catch an http address that fails late and namelessly."""
    async with Web3Node(net.url_http) as node:
        with pytest.raises(Misconfigured, match="cannot be watched"):
            await node.watch(b"\x01" * 20, []).__aenter__()


# ---- sending


async def test_sending_the_same_bytes_again_is_harmless(net: Devnet, node: Web3Node) -> None:
    """Would catch a repeat that is reported as a failure, while waiting in the pool or after it was mined."""
    net.methods.automine = False
    signed = await sender_for(net, node).prepare(net.address("bob"), b"", 1, 21_000)
    for _ in range(2):
        assert await node.send_raw(signed.raw_tx) == signed.tx_hash == tx_hash_of(signed.raw_tx)
    assert await node.receipt(signed.tx_hash) is None
    net.mine()
    assert await node.send_raw(signed.raw_tx) == signed.tx_hash
    receipt = await node.receipt(signed.tx_hash)
    assert receipt.succeeded
    assert receipt.fee_wei == 21_000 * receipt.effective_gas_price_wei


async def test_refused_transactions_are_told_apart(net: Devnet, node: Web3Node) -> None:
    """Would catch reasons that are mixed up: each asks for another reaction of the sender."""
    net.methods.automine = False
    sender = sender_for(net, node)
    first = await sender.prepare(net.address("bob"), b"", 1, 21_000, nonce=0)
    rival = await sender.prepare(net.address("bob"), b"", 2, 21_000, nonce=0)
    late = await sender.prepare(net.address("bob"), b"", 3, 21_000, nonce=0)
    far = await sender.prepare(net.address("bob"), b"", 4, 21_000, nonce=900)
    poor = await sender.prepare(net.address("bob"), b"", 5, 20_000, nonce=0)
    await node.send_raw(first.raw_tx)
    reasons = []
    for signed in (rival, far, poor):
        with pytest.raises(Refused) as refused:
            await node.send_raw(signed.raw_tx)
        reasons.append(refused.value.reason)
    net.mine()
    with pytest.raises(Refused) as refused:
        await node.send_raw(late.raw_tx)
    assert [*reasons, refused.value.reason] == [
        "replacement_underpriced",
        "nonce_too_high",
        "gas_limit",
        "nonce_too_low",
    ]


# ---- before anything is energised


class Ours:
    """An artefact of the toy."""

    def matches_deployed(self, code: bytes) -> bool:
        """The toy has no immutables to mask."""
        return code == RUNTIME


async def test_the_right_chain_and_contract_pass(net: Devnet, node: Web3Node) -> None:
    """Would catch a check that nobody can pass."""
    await check_deployment(node, 1337, await deploy(net, node), Ours())


async def test_wrong_chain_no_contract_and_foreign_code_stop_us(net: Devnet, node: Web3Node) -> None:
    """Would catch an agent that starts on the wrong network or trusts somebody else's contract."""
    contract = await deploy(net, node)
    foreign_init = bytes.fromhex("6001600c60003960016000f3") + b"\x00"
    foreign = (await sender_for(net, node).send_and_wait(None, foreign_init)).contract
    with pytest.raises(Misconfigured, match="chain 1337, but the configuration says chain 1"):
        await check_deployment(node, 1, contract, Ours())
    with pytest.raises(Misconfigured, match="no contract at"):
        await check_deployment(node, 1337, b"\x07" * 20, Ours())
    with pytest.raises(Misconfigured, match="not this version"):
        await check_deployment(node, 1337, foreign, Ours())


# ---- nodes that are not what they should be


@pytest.mark.parametrize(
    "answer",
    [
        "<html>login</html>",
        "[]",
        "[" * 300_000,
        {},
        {"result": None},
        {"result": {}},
        {"result": {"number": "1", "hash": "0x", "parentHash": "0x", "timestamp": "0x1"}},
        {
            "result": {
                "number": "0x-1",
                "hash": "0x" + "00" * 32,
                "parentHash": "0x" + "00" * 32,
                "timestamp": "0x1",
            }
        },
        {"error": "no"},
        {"error": {"code": -32603, "message": "internal"}},
    ],
)
async def test_nonsense_is_named_and_never_believed(answer: object) -> None:
    """Would catch a KeyError that crashes the daemon, or a value of the wrong form that gets in."""
    async with liar(answer) as url, Web3Node(url) as node:
        with pytest.raises(Transient):
            await node.head()
