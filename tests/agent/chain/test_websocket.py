"""web3's WebSocket without its habits: answers find their questions, and every end is an end."""

from __future__ import annotations

import asyncio
import time

import pytest
from rpc_servers import HASTY, babbler
from tcp_proxy import TcpProxy
from toy_contract import REVERTING, deploy

from agent.chain.node import Web3Node
from agent.chain.rpc import Limits, RpcError
from agent.chain.websocket import WebSocketWire
from agent.core.units import hex0x
from agent.demo.devnet import Devnet
from agent.errors import Transient


async def test_many_questions_at_once_get_their_own_answers() -> None:
    """Would catch answers that are handed to whoever waits first."""
    async with Devnet() as net:
        net.mine(20)
        wire = WebSocketWire(net.url_ws, Limits())
        asked = [wire.request("eth_getBlockByNumber", [hex(number), False]) for number in range(20)]
        answers = await asyncio.gather(*asked)
        await wire.close()
    assert [answer["number"] for answer in answers] == [hex(number) for number in range(20)]


async def test_an_error_costs_one_answer_not_the_connection() -> None:
    """Would catch web3's habit of ending the connection over the first revert."""
    async with Devnet() as net, Web3Node(net.url_ws) as node:
        contract = await deploy(net, node)
        wire = WebSocketWire(net.url_ws, Limits())
        ended = await wire.open()
        for _ in range(3):
            with pytest.raises(RpcError, match="reverted"):
                await wire.request("eth_call", [{"to": hex0x(contract), "data": hex0x(REVERTING)}, "latest"])
        assert not ended.done()
        assert await wire.request("eth_chainId", []) == "0x539"
        await wire.close()


async def test_waiting_leaves_the_loop_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch the busy loop: a whole core for every second that an answer is late."""
    async with babbler('{"method": "eth_other"}') as url:
        wire = WebSocketWire(url, HASTY)
        await wire.open()
        turns = 0
        sleep = asyncio.sleep

        async def counted(delay: float, value: object = None) -> object:
            nonlocal turns
            turns += 1
            return await sleep(delay, value)

        monkeypatch.setattr(asyncio, "sleep", counted)
        with pytest.raises(Transient, match="did not answer"):
            await wire.request("eth_chainId", [])
        monkeypatch.undo()
        await wire.close()
    assert turns < 20


async def test_whoever_waits_learns_of_the_end_at_once() -> None:
    """Would catch a request that waits out its time-out on a connection that is long gone."""
    async with Devnet() as net, TcpProxy(net.port) as proxy:
        wire = WebSocketWire(f"ws://127.0.0.1:{proxy.port}", Limits())
        await wire.open()
        proxy.freeze()  # the question never arrives
        waiting = asyncio.create_task(wire.request("eth_chainId", []))
        await asyncio.sleep(0)
        began = time.monotonic()
        await proxy.cut()
        with pytest.raises(Transient, match="cannot be reached"):
            await waiting
        assert time.monotonic() - began < 3
        await wire.close()


async def test_a_connection_that_ended_is_opened_again() -> None:
    """Would catch a wire that stays dead after the first restart of the node."""
    async with Devnet() as net:
        wire = WebSocketWire(net.url_ws, Limits())
        first = await wire.open()
        assert await wire.open() is first
        await net.hang_up()
        async with asyncio.timeout(5):
            await first
        assert await wire.request("eth_chainId", []) == "0x539"
        assert await wire.open() is not first
        await wire.close()


async def test_a_half_open_link_ends_by_itself() -> None:
    """Would catch a keep-alive that is not there: nobody asks anything, and still the end is noticed."""
    async with Devnet() as net, TcpProxy(net.port) as proxy:
        wire = WebSocketWire(f"ws://127.0.0.1:{proxy.port}", HASTY)
        ended = await wire.open()
        proxy.freeze()
        async with asyncio.timeout(5):
            assert isinstance(await ended, Transient)
        await wire.close()


async def test_a_server_that_accepts_and_says_nothing_is_left_in_time() -> None:
    """Would catch a handshake without a time-out."""
    async with Devnet() as net, TcpProxy(net.port) as proxy:
        proxy.freeze()
        began = time.monotonic()
        with pytest.raises(Transient, match="cannot be reached"):
            await WebSocketWire(f"ws://127.0.0.1:{proxy.port}", HASTY).open()
        assert time.monotonic() - began < 5


async def test_an_unreachable_node_is_named_soon_and_without_its_secrets(unused_tcp_port: int) -> None:
    """Would catch web3's five tries over 20 seconds, and an API key in a log."""
    began = time.monotonic()
    with pytest.raises(
        Transient, match=f"node at ws://127.0.0.1:{unused_tcp_port} cannot be reached"
    ) as problem:
        await WebSocketWire(f"ws://user:pass@127.0.0.1:{unused_tcp_port}/v3/apikey", Limits()).open()
    assert time.monotonic() - began < 5
    assert not any(secret in str(problem.value) for secret in ("user", "pass", "apikey"))


@pytest.mark.parametrize(
    "said", ["<html>", "[" * 300_000, "7", "[]", '{"id": 99, "result": 1}', '{"id": [], "a": 1}']
)
async def test_nonsense_ends_the_connection_or_the_patience(said: str) -> None:
    """Would catch a node that kills the process with brackets (py_ecc lifts the recursion limit), or hangs it."""
    async with babbler(said) as url:
        wire = WebSocketWire(url, HASTY)
        for _ in range(2):
            with pytest.raises(Transient):
                await wire.request("eth_chainId", [])
        await wire.close()


async def test_an_endless_message_is_not_read() -> None:
    """Would catch memory that a hostile node can fill."""
    async with babbler('"' + "x" * 100_000 + '"') as url:
        wire = WebSocketWire(url, Limits(answer_bytes=50_000))
        with pytest.raises(Transient, match="too much at once"):
            await wire.request("eth_chainId", [])
        await wire.close()
