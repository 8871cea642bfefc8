"""What we believe of web3 8 and its companions. `agent/chain/websocket.py` and `rpc.py` exist because of these beliefs:
when one of these tests fails after an upgrade, the belief is gone and the code that answers it can be looked at again.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from web3 import AsyncWeb3, WebSocketProvider
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

from agent.demo.devnet import Devnet

Answer = Callable[[ServerConnection, dict[str, object]], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[str]:
    """A WebSocket server that does as told with every request."""

    async def talk(socket: ServerConnection) -> None:
        async for message in socket:
            await answer(socket, json.loads(message))

    async with serve(talk, "127.0.0.1", 0) as listening:
        yield f"ws://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


def result(request: dict[str, object], value: object) -> str:
    """A good answer."""
    return json.dumps({"jsonrpc": "2.0", "id": request["id"], "result": value})


async def test_a_polite_close_ends_the_stream_without_an_exception() -> None:
    """Belief: 1000 and 1001 are silent. So every end of a watch is turned into `Transient`."""
    async with Devnet() as net, AsyncWeb3(WebSocketProvider(net.url_ws)) as w3:
        await w3.eth.subscribe("newHeads")
        await net.hang_up()
        async with asyncio.timeout(5):
            assert [message async for message in w3.socket.process_subscriptions()] == []


async def test_a_crash_ends_the_stream_with_an_exception() -> None:
    """Belief: without a close frame the stream raises. Two kinds of end, so neither may be relied on."""
    async with Devnet() as net, AsyncWeb3(WebSocketProvider(net.url_ws)) as w3:
        await w3.eth.subscribe("newHeads")
        await net.unplug()
        async with asyncio.timeout(5):
            with pytest.raises(ConnectionClosed):
                await anext(aiter(w3.socket.process_subscriptions()))


async def test_reconnecting_does_not_subscribe_again() -> None:
    """Belief: web3 forgets nothing and renews nothing. So a watch is never repaired, always opened anew."""
    async with Devnet() as net, AsyncWeb3(WebSocketProvider(net.url_ws)) as w3:
        await w3.eth.subscribe("newHeads")
        assert net.subscription_count == 1
        await w3.provider.disconnect()
        await w3.provider.connect()
        assert await w3.eth.block_number == 0
        assert len(w3.subscription_manager.subscriptions) == 1
        assert net.subscription_count == 0


async def test_unread_notifications_block_every_answer_behind_them() -> None:
    """Belief: a full queue of notifications stops the reader, and with it all requests on that socket."""

    async def flood_then_answer(socket: ServerConnection, request: dict[str, object]) -> None:
        for _ in range(20):
            params = {"subscription": "0x1", "result": {}}
            await socket.send(json.dumps({"jsonrpc": "2.0", "method": "eth_subscription", "params": params}))
        await socket.send(result(request, "0x1"))

    async with server(flood_then_answer) as url:
        provider = WebSocketProvider(
            url,
            subscription_response_queue_size=10,
            request_timeout=0.3,
            websocket_kwargs={"close_timeout": 0.2},
        )
        async with AsyncWeb3(provider) as w3:
            with pytest.raises(Exception, match="Timed out waiting for response"):
                await w3.eth.chain_id


async def test_waiting_for_an_answer_spins_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Belief: a pending request is a busy loop, a whole core for as long as a tunnel is. So answers are futures here."""
    turns = 0
    sleep = asyncio.sleep

    async def counted(delay: float, value: object = None) -> object:
        nonlocal turns
        turns += delay == 0
        return await sleep(delay, value)

    async def late(socket: ServerConnection, request: dict[str, object]) -> None:
        await sleep(0.2)
        await socket.send(result(request, "0x1"))

    async with server(late) as url, AsyncWeb3(WebSocketProvider(url)) as w3:
        monkeypatch.setattr(asyncio, "sleep", counted)
        assert await w3.eth.chain_id == 1
    assert turns > 500


async def test_an_error_to_a_raw_request_kills_the_connection() -> None:
    """Belief: `make_request` and an error answer end the listener; a revert would cost the connection."""

    async def refuse(socket: ServerConnection, request: dict[str, object]) -> None:
        error = {"code": 3, "message": "execution reverted", "data": "0x"}
        await socket.send(json.dumps({"jsonrpc": "2.0", "id": request["id"], "error": error}))

    async with server(refuse) as url:
        provider = WebSocketProvider(url, request_timeout=1)
        await provider.connect()
        with pytest.raises(Exception, match="reverted"):
            await provider.make_request("eth_call", [])
        with pytest.raises(Exception, match="reverted"):
            await provider.disconnect()


async def test_the_hook_we_read_at_is_still_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Belief: the listener reads through `socket_recv`, and the connection is `_ws`. Our provider overrides the one and
    uses the other.
    """
    seen = []

    async def recv(self: WebSocketProvider) -> object:
        seen.append(self._ws)
        return json.loads(await self._ws.recv())

    monkeypatch.setattr(WebSocketProvider, "socket_recv", recv)
    async with Devnet() as net, AsyncWeb3(WebSocketProvider(net.url_ws)) as w3:
        assert await w3.eth.chain_id == net.chain_id
    assert seen


def test_importing_web3_lifts_the_recursion_limit() -> None:
    """Belief: py_ecc sets it to 100 000, with which nested JSON overflows the C stack of Python 3.11 and kills the process.
    So `rpc.parse` puts it back while it reads. Anybody who parses a stranger's JSON beside web3 must do the same.
    """
    program = "import sys, web3; print(sys.getrecursionlimit())"
    limit = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert int(limit.stdout) >= 100_000
