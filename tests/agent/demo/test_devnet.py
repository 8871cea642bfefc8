"""The embedded node's two doors: what strangers send, what is limited, and when blocks come."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest
from eth_hash.auto import keccak
from toy_contract import deploy, sender_for

from agent.chain.node import Web3Node
from agent.demo import devnet
from agent.demo.devnet import Devnet, address_from_key, derive_key


@pytest.fixture
async def net() -> AsyncIterator[Devnet]:
    """A chain that makes a block for every transaction."""
    async with Devnet() as net:
        yield net


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client that is not ours."""
    async with aiohttp.ClientSession() as session:
        yield session


async def post(http: aiohttp.ClientSession, net: Devnet, body: object) -> object:
    """Bytes as they are, anything else as JSON; the parsed answer."""
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    async with http.post(net.url_http, data=sent) as response:
        return await response.json()


async def until(true: Callable[[], bool]) -> None:
    """Wait for a condition, ten seconds at most."""
    async with asyncio.timeout(10):
        while not true():  # noqa: ASYNC110 - the devnet tells nobody
            await asyncio.sleep(0.02)


def ask(method: str, *params: object) -> dict[str, object]:
    """One request."""
    return {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(params)}


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", -32700),
        (b"\xff\xfe", -32700),
        (b"[" * 100_000, -32700),
        (b"7", -32600),
        ([], -32600),
        ([ask("eth_chainId")] * 101, -32600),
        ({"id": 1}, -32600),
        (ask("eth_mining"), -32601),
        (ask("eth_subscribe", "newHeads"), -32601),
        ({**ask("eth_chainId"), "params": {}}, -32602),
        (ask("eth_chainId", 1), -32602),
        (ask("eth_getBalance", "0x12"), -32602),
        (ask("eth_getBalance"), -32602),
        (ask("eth_getBlockByNumber", "newest"), -32602),
        (ask("eth_getBlockByNumber", "-0x1"), -32602),
        (ask("eth_getLogs", []), -32602),
        (ask("eth_getLogs", {"topics": [None] * 5}), -32602),
        (ask("eth_call", {"to": 7}), -32602),
        (ask("eth_getBalance", "0x" + "00" * 20, "0xffff"), -32001),
        (ask("evm_mine", 10**9), -32005),
    ],
)
async def test_whatever_is_wrong_gets_an_error_by_the_book(
    net: Devnet, http: aiohttp.ClientSession, body: object, code: int
) -> None:
    """Would catch a crash, a hang or an HTTP error page where JSON-RPC 2.0 wants a code; and the node lives
    on.
    """
    assert (await post(http, net, body))["error"]["code"] == code
    assert (await post(http, net, ask("eth_chainId")))["result"] == "0x539"


async def test_too_much_is_refused(net: Devnet, http: aiohttp.ClientSession) -> None:
    """Would catch a body that is read without end, over either door."""
    flood = b" " * (devnet.MAX_BODY_BYTES + 1)
    async with http.post(net.url_http, data=io.BytesIO(flood)) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == -32600
    async with http.ws_connect(net.url_ws) as socket:
        await socket.send_bytes(flood)
        assert (await socket.receive(timeout=5)).type in (aiohttp.WSMsgType.CLOSE, aiohttp.WSMsgType.CLOSED)


async def test_subscriptions_are_limited_and_can_be_ended(net: Devnet, http: aiohttp.ClientSession) -> None:
    """Would catch a client that makes every block dearer for ever."""
    async with http.ws_connect(net.url_ws) as socket:
        names = []
        for _ in range(devnet.MAX_SUBSCRIPTIONS):
            await socket.send_json(ask("eth_subscribe", "newHeads"))
            names.append((await socket.receive_json(timeout=5))["result"])
        await socket.send_json(ask("eth_subscribe", "newHeads"))
        assert (await socket.receive_json(timeout=5))["error"]["code"] == -32005
        await socket.send_json(ask("eth_unsubscribe", names[0]))
        assert (await socket.receive_json(timeout=5))["result"] is True
        await socket.send_json(ask("eth_unsubscribe", names[0]))
        assert (await socket.receive_json(timeout=5))["result"] is False
        assert net.subscription_count == devnet.MAX_SUBSCRIPTIONS - 1


async def test_a_batch_is_answered_in_order(net: Devnet, http: aiohttp.ClientSession) -> None:
    """Would catch answers that cannot be told apart."""
    answers = await post(http, net, [ask("eth_chainId"), {"id": 2}, {**ask("net_version"), "id": "x"}])
    assert [answer["id"] for answer in answers] == [1, 2, "x"]
    assert answers[2]["result"] == "1337"


async def test_blocks_come_with_the_wall_clock(http: aiohttp.ClientSession) -> None:
    """Would catch a demo whose chain time runs away from the agent's: three real seconds are three blocks."""
    async with Devnet(block_time_s=1) as net:
        await until(lambda: net.evm.head.number >= 3)
        stamps = [block.header.timestamp for block in net.evm.blocks[1:4]]
        assert stamps == list(range(stamps[0], stamps[0] + 3))
        assert abs(time.time() - stamps[-1]) < 2
        answer = await post(http, net, ask("eth_getBlockByNumber", "latest"))
        assert answer["result"]["number"] == hex(net.evm.head.number)


async def test_the_same_seed_funds_the_same_accounts(net: Devnet) -> None:
    """Would catch keys that change between runs, or labels that share one key."""
    assert net.key("alice") == derive_key("v2v", "alice") == keccak(b"v2v\0alice")
    assert net.address("alice") == address_from_key(net.key("alice"))
    assert len(set(net.accounts.values())) == len(net.accounts)
    with pytest.raises(KeyError, match="there are organisation, alice"):
        net.key("mallory")


async def test_time_can_be_moved_on(net: Devnet) -> None:
    """Would catch tests of validity and grace that would have to wait for days."""
    async with Web3Node(net.url_http) as node:
        before = await node.head()
        net.methods.increase_time(hex(86_400))
        net.mine()
        assert 86_399 <= (await node.head()).timestamp_s - before.timestamp_s <= 86_402


async def test_a_reorg_moves_a_transaction_to_another_block(net: Devnet) -> None:
    """Would catch a reorg that clients cannot see: the receipt is the same transaction at another place."""
    async with Web3Node(net.url_http) as node:
        contract = await deploy(net, node)
        receipt = await sender_for(net, node).send_and_wait(contract, b"", gas_limit=60_000)
        net.reorg(1)
        again = await node.receipt(receipt.tx_hash)
    assert again is not None
    assert (again.succeeded, again.block_number) == (True, receipt.block_number)
    assert again.block_hash != receipt.block_hash


async def test_a_reader_that_never_reads_is_cut_off(net: Devnet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch memory that a stopped client can fill while blocks go on."""
    monkeypatch.setattr(devnet, "MAX_UNSENT_MESSAGES", 5)
    async with Web3Node(net.url_ws) as node, node.watch(b"\x01" * 20, []):
        net.mine(20)  # without a pause in which anything could be sent
        await until(lambda: net.subscription_count == 0)
