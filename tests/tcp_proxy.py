"""A TCP proxy that can lose the network: `freeze()` keeps every connection open and passes nothing on, as a tunnel does."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Self


class TcpProxy:
    """`async with TcpProxy(port) as proxy:` listens on `proxy.port` and forwards to the port behind. Entered again, it listens
    where it did before; in between, nobody does.
    """

    def __init__(self, port_behind: int, port: int = 0) -> None:
        self.port = port
        self._port_behind = port_behind
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._pumps: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        await self.cut()

    def freeze(self) -> None:
        """From now on nothing passes, and nobody is told."""
        self._flowing.clear()

    async def cut(self) -> None:
        """End every connection."""
        for pump in tuple(self._pumps):
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            reader_behind, writer_behind = await asyncio.open_connection("127.0.0.1", self._port_behind)
        except OSError:  # nobody there
            writer.close()
            return
        for source, sink in ((reader, writer_behind), (reader_behind, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        try:
            with suppress(ConnectionError):
                while part := await source.read(65_536):
                    await self._flowing.wait()
                    sink.write(part)
                    await sink.drain()
        finally:
            sink.close()
