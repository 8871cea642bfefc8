"""Servers that are no honest node, for tests of the chain adapter; and limits for tests that cannot wait."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web
from websockets.asyncio.server import ServerConnection, serve

from agent.chain.rpc import Limits

HASTY = Limits(
    connect_timeout_s=1,
    request_timeout_s=0.5,
    ping_interval_s=0.1,
    ping_timeout_s=0.1,
    close_timeout_s=0.1,
    silence_s=0.2,
    hints=4,
)


@asynccontextmanager
async def liar(answer: object, *, status: int = 200) -> AsyncIterator[str]:
    """A server that gives every POST the same answer."""

    async def respond(request: web.Request) -> web.Response:
        asked = json.loads(await request.read())
        text = (
            answer if isinstance(answer, str) else json.dumps({"jsonrpc": "2.0", "id": asked["id"], **answer})
        )
        return web.Response(text=text, status=status)

    app = web.Application()
    app.router.add_post("/", respond)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@asynccontextmanager
async def babbler(said: str) -> AsyncIterator[str]:
    """A WebSocket server that says the same to everything."""

    async def talk(socket: ServerConnection) -> None:
        async for _ in socket:
            await socket.send(said)

    async with serve(talk, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}"
