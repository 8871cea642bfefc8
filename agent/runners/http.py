"""One local web server: the door's messages for phones at the plug, and the owner's status (PROTOCOL section 6).

    GET  /                             the page for the screen at the plug: every port's current Hello as a QR code
    GET  /v1/hello                     every port's current Hello, a JSON array (empty until we know the time)
    POST /v1/present|receipt|stop      one message in (at most 4 KiB), one message out; header X-V2V-Sref
    GET  /v1/session/{sref}            server-sent events: everything current, then what changes; `event:` is the type
    GET  /status.json                  `views.status`, for the owner

An `sref` here is 22 to 64 of A-Z a-z 0-9 - _: 16 random bytes the consumer chose, in hex or base64url. Names as short as
a broker's user names are not taken, so that nobody can listen to a broker user's session here.
The answer is always a protocol message. 200: accept, ack, status, final. A refusal has the status of STATUS_BY_REASON.

Rules
* Loopback unless the owner says otherwise. A foreign name as Host (DNS rebinding), or an Origin that is not us, is refused.
* Everything a visitor can use up has a limit: connections, streams, time to speak, sizes. Money and safety never depend on this.
* Requests are served one in a turn of the event loop, because the charger's beat runs in the same loop; and no source faster
  than its pace, however many connections it has. Who is too fast waits; TCP slows him down for us. Together they leave the
  processor time to rest (`agent.load`); who comes meanwhile waits in the kernel.
* A bug in a handler is a bug: it ends `run`, it does not become a quiet 500.

May not know: what messages mean (the door), MQTT, the charger, the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import re
import socket
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from html import escape
from typing import NoReturn
from urllib.parse import urlsplit

import structlog
from aiohttp import web

from agent import views
from agent.core.messages import MESSAGE_BYTES_MAX, Message, Refusal, encode
from agent.door import Door
from agent.engine import Engine
from agent.errors import Misconfigured
from agent.load import Load

CONNECTIONS_MAX = 64  # each costs memory and a file handle; a plug has one or two phones at it
CONNECTIONS_MAX_PER_SOURCE = 16  # one visitor cannot take them all; a browser opens six
ACCEPTED_AT_ONCE_MAX = 8  # in a turn of the event loop; asyncio would take a hundred before it looks up again
LISTEN_BACKLOG = 512  # the others wait in the kernel; whom it turns away knocks again only a second later
NO_HANDLES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
NOT_HERE = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)
NO_HANDLES_WAIT_S = 1.0  # until the system may have a place for one more
PACE = (
    50.0,
    50.0,
)  # requests and connections of one source: per second, and at once; a page and its pictures pass
AHEAD_S_MAX = 1.0  # a second of requests may wait for their turn; then who hammers at the door is not let in, nor counted
PACES_MAX = 1024  # sources remembered; one that has been quiet for a second needs no remembering
LINGER_S = 1.0  # for what is still coming of a body that was refused
FIRST_REQUEST_S = 10.0  # who connects and does not finish a request by then only wants to hold the place
BODY_WAIT_S = 5.0  # 4 KiB take longer only from somebody who trickles
STREAMS_MAX = 32  # each is looked at with every change
STREAMS_MAX_PER_SOURCE = 8
HEARTBEAT_S = 15.0  # keeps a quiet stream open, and finds readers that vanished without a word
WRITE_WAIT_S = 10.0  # a reader that takes nothing for so long is gone
NEWS_INTERVAL_S = 0.1  # all streams share one look at the door's news, which signs readings
KEEPALIVE_S = 15.0
HEADER_BYTES_MAX = 2048  # of a line or a field
HEADERS_MAX = 48  # browsers send about twenty
SHUTDOWN_S = 1.0  # streams end by being cut; their readers reconnect

STATUS_BY_REASON = {
    "malformed": 400,
    "bad_signature": 403,
    "wrong_signer": 403,
    "wrong_provider": 403,
    "wrong_token": 403,
    "unknown_session": 404,
    "unknown_charger": 404,
    "not_yet_seen": 404,
    "not_yet_confirmed": 404,
    "expired": 410,
    "too_late": 410,
    "rate_limited": 429,
    "out_of_order": 503,
}
STATUS_OF_OTHER_REASONS = (
    409  # stale_hello, replayed, busy, over_order, ahead_of_meter, ...: try again, but otherwise
)

PAGE = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="10">'
    "<title>Scan to charge</title><h1>Scan to charge</h1>{body}</html>"
)
SREF = re.compile(r"[A-Za-z0-9_-]{22,64}")
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

log = structlog.get_logger(__name__)


class HttpRunner:
    """Serves one address. `url` is known once `listening` is set (port 0 lets the system choose)."""

    def __init__(self, engine: Engine, door: Door, host: str, port: int) -> None:
        self._engine, self._door, self._host, self._port = engine, door, host, port
        self._strangers: dict[web.RequestHandler, float] = {}  # connected, no request yet; since when
        self._streams: Counter[str] = Counter()
        self._turnstile = _Turnstile()
        self._codes: dict[str, tuple[bytes, str]] = {}  # of each port: the Hello and its code
        self._drawing = asyncio.Lock()
        self._news: tuple[float, tuple[tuple[str, Message], ...]] = (float("-inf"), ())
        self._bug: asyncio.Future[NoReturn] | None = None
        self.listening = asyncio.Event()
        self.url = ""

    async def run(self) -> NoReturn:
        """For ever: serve. Raises Misconfigured when the address cannot be had."""
        self._bug = asyncio.get_running_loop().create_future()
        silent = logging.getLogger("agent.runners.http.library")
        silent.setLevel(logging.CRITICAL + 1)
        runner = web.AppRunner(
            self._application(),
            access_log=None,  # who stood at the plug is nobody's business
            logger=silent,  # it would log a traceback for everybody who does not speak HTTP; our own bugs end `run`
            keepalive_timeout=KEEPALIVE_S,
            max_line_size=HEADER_BYTES_MAX,
            max_field_size=HEADER_BYTES_MAX,
            max_headers=HEADERS_MAX,
            lingering_time=LINGER_S,
            auto_decompress=False,  # nothing of ours is compressed, so nothing can unfold
            shutdown_timeout=SHUTDOWN_S,
            handler_cancellation=True,  # a stream whose reader left gives its place back; our own calls are synchronous
        )
        await runner.setup()
        assert runner.server is not None
        try:
            async with self._doors_open(runner.server) as doors:
                log.info("http.up", url=self.url)
                while True:
                    self._show_out_strangers()
                    done, _ = await asyncio.wait(
                        [self._bug, *doors], timeout=1.0, return_when=asyncio.FIRST_COMPLETED
                    )
                    for ended in done:
                        ended.result()
        finally:
            await runner.cleanup()

    @contextlib.asynccontextmanager
    async def _doors_open(self, server: web.Server) -> AsyncIterator[list[asyncio.Task[NoReturn]]]:
        """Listens, and lets visitors in; the tasks that do."""
        doorman = _Doorman(server, self._strangers, self._turnstile)
        with contextlib.ExitStack() as stack:
            listening = [stack.enter_context(one) for one in await self._listen()]
            tasks = [asyncio.create_task(doorman.let_in(one)) for one in listening]
            self.listening.set()
            try:
                yield tasks
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self) -> list[socket.socket]:
        """A socket for each address that the host name has. Raises Misconfigured when one cannot be had."""
        loop, found = asyncio.get_running_loop(), []
        try:
            known = await loop.getaddrinfo(
                self._host, self._port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            addresses = sorted({(family, address) for family, _, _, _, address in known})
            for family, address in addresses:
                try:
                    found.append(socket.create_server(address, family=family, backlog=LISTEN_BACKLOG))
                except OSError as error:
                    if error.errno in NOT_HERE and (found or (family, address) != addresses[-1]):
                        continue  # `localhost` has an IPv6 address on paper where the system has none
                    raise
                found[-1].settimeout(0)
        except OSError as error:
            for one in found:
                one.close()
            raise Misconfigured(
                f"cannot listen on {self._host}:{self._port}: {error.strerror or error}",
                remedy="stop the program that uses it, or choose another [http] listen",
            ) from error
        host, port = found[0].getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
        return found

    def _application(self) -> web.Application:
        app = web.Application(middlewares=[self._guard], client_max_size=MESSAGE_BYTES_MAX)
        app.on_response_prepare.append(_with_headers)
        app.add_routes(
            [
                web.get("/", self._page),
                web.get("/v1/hello", self._hello),
                web.post("/v1/{kind:present|receipt|stop}", self._ask),
                web.get("/v1/session/{sref}", self._stream),
                web.get("/status.json", self._status),
            ]
        )
        return app

    # ---- requests

    @web.middleware
    async def _guard(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Before anything else: is it its turn, is this request meant for us, and by a page of ours?"""
        self._strangers.pop(request.protocol, None)
        await self._turnstile.turn(_source(request.transport))
        if not _is_our_name(request.host, self._host):
            raise web.HTTPMisdirectedRequest(text="Use this machine's IP address, or localhost.\n")
        origin = request.headers.get("Origin")
        if origin is not None and urlsplit(origin).netloc != request.host:
            raise web.HTTPForbidden(text="This door does not answer to pages of another site.\n")
        return await handler(request)

    async def _hello(self, request: web.Request) -> web.StreamResponse:
        with self._no_bugs():
            known = self._engine.live.header is not None  # else we do not know until when a Hello is good
            hellos = [encode(self._door.hello(port)) for port in self._door.ports] if known else []
        return web.Response(body=b"[" + b",".join(hellos) + b"]", content_type="application/json")

    async def _page(self, request: web.Request) -> web.StreamResponse:
        known = self._engine.live.header is not None
        parts = [f"<h2>{escape(port)}</h2>{await self._code(port)}" for port in self._door.ports if known]
        body = "".join(parts) or "<p>One moment: this car does not know the time yet.</p>"
        return web.Response(text=PAGE.replace("{body}", body), content_type="text/html", charset="utf-8")

    async def _code(self, port: str) -> str:
        """The current Hello as a picture. Drawn once, beside the loop: it takes as long as thirty requests."""
        async with self._drawing:
            with self._no_bugs():
                data = encode(self._door.hello(port))
            drawn = self._codes.get(port)
            if drawn is None or drawn[0] != data:
                drawn = self._codes[port] = data, await asyncio.to_thread(_qr_code, data)
            return drawn[1]

    async def _ask(self, request: web.Request) -> web.StreamResponse:
        sref = request.headers.get("X-V2V-Sref", "")
        if not SREF.fullmatch(sref):
            return _answer(Refusal("malformed", "the header X-V2V-Sref is not 22 to 64 of A-Z a-z 0-9 - _"))
        try:
            async with asyncio.timeout(BODY_WAIT_S):
                data = await request.read()
        except TimeoutError:
            raise web.HTTPRequestTimeout from None
        except web.HTTPRequestEntityTooLarge:
            return _answer(Refusal("malformed", f"longer than {MESSAGE_BYTES_MAX} bytes"), 413)
        with self._no_bugs():
            return _answer(self._door.answer(sref, f"http:{_source(request.transport)}", data))

    async def _status(self, request: web.Request) -> web.StreamResponse:
        with self._no_bugs():
            return web.json_response(views.status(self._engine.book, self._engine.live))

    # ---- streams

    async def _stream(self, request: web.Request) -> web.StreamResponse:
        sref, source = request.match_info["sref"], _source(request.transport)
        if not SREF.fullmatch(sref):
            return _answer(Refusal("malformed", "a session's address is 22 to 64 of A-Z a-z 0-9 - _"))
        if self._streams.total() >= STREAMS_MAX or self._streams[source] >= STREAMS_MAX_PER_SOURCE:
            return _answer(Refusal("rate_limited", "too many open streams; close one, or poll"))
        self._streams[source] += 1
        try:
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            with contextlib.suppress(ConnectionError, TimeoutError):  # the reader is gone, or takes nothing
                await self._follow(sref, response)
            return response
        finally:
            self._streams[source] -= 1
            self._streams += Counter()  # forgets sources without a stream

    async def _follow(self, sref: str, response: web.StreamResponse) -> NoReturn:
        told: dict[tuple[type[Message], bytes], Message] = {}
        while True:
            changed = self._engine.changed
            news = {
                (type(message), getattr(message, "session_id", b"")): message
                for to, message in self._newest()
                if to == sref
            }
            fresh = [_sse(message) for key, message in news.items() if told.get(key) != message]
            told = news
            if fresh:
                await _write(response, b"".join(fresh))
            await asyncio.sleep(NEWS_INTERVAL_S)
            try:
                async with asyncio.timeout(HEARTBEAT_S):
                    await changed.wait()
            except TimeoutError:
                await _write(response, b":\n\n")

    def _newest(self) -> tuple[tuple[str, Message], ...]:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._news[0] >= NEWS_INTERVAL_S:
            with self._no_bugs():
                self._news = (now_s, self._door.news())
        return self._news[1]

    # ---- limits and bugs

    def _show_out_strangers(self) -> None:
        """Close connections that never finished a first request: aiohttp itself waits for ever."""
        now_s = asyncio.get_running_loop().time()
        for handler, since_s in list(self._strangers.items()):
            if handler.transport is None or now_s - since_s > FIRST_REQUEST_S:
                del self._strangers[handler]
                handler.force_close()

    @contextlib.contextmanager
    def _no_bugs(self) -> Iterator[None]:
        """Around our own code only: aiohttp would turn a failed journal into a 500 and go on; we must not go on."""
        try:
            yield
        except Exception as bug:
            if self._bug is not None and not self._bug.done():
                self._bug.set_exception(bug)
            raise


class _Turnstile:
    """Who may go on, and when: one in a turn of the event loop, each source at its own pace."""

    def __init__(self) -> None:
        self.load = Load()
        self._one = asyncio.Lock()
        self._paid_until_s: dict[str, float] = {}  # of each source: when all its requests so far are paid for

    async def turn(self, source: str) -> None:
        """Wait until it is this source's turn, and nobody else's in this turn of the loop."""
        wait_s = self.delay_s(source)
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        async with self._one:
            await asyncio.sleep(self.load.rest_s())

    def delay_s(self, source: str) -> float:
        """Count one more of this source: the seconds it is ahead of its pace. Beyond AHEAD_S_MAX nothing more is counted."""
        per_s, at_once = PACE
        now_s = asyncio.get_running_loop().time()
        if len(self._paid_until_s) >= PACES_MAX:
            self._paid_until_s = {
                one: until_s for one, until_s in self._paid_until_s.items() if until_s > now_s
            }
        paid_until_s = max(now_s, self._paid_until_s.get(source, now_s)) + 1 / per_s
        ahead_s = paid_until_s - now_s - at_once / per_s
        if ahead_s <= AHEAD_S_MAX:
            self._paid_until_s[source] = paid_until_s
        return ahead_s


class _Doorman:
    """Lets connections in to aiohttp, or not at all, before any of their bytes are read."""

    def __init__(
        self, server: web.Server, strangers: dict[web.RequestHandler, float], turnstile: _Turnstile
    ) -> None:
        self._server, self._strangers, self._turnstile = server, strangers, turnstile

    async def let_in(self, listening: socket.socket) -> NoReturn:
        """For ever: whoever comes to this address."""
        loop = asyncio.get_running_loop()
        while True:
            for _ in range(ACCEPTED_AT_ONCE_MAX):
                try:
                    visitor, address = await loop.sock_accept(listening)
                except ConnectionError:
                    continue  # it left while it waited
                except OSError as error:
                    if error.errno not in NO_HANDLES:
                        raise
                    await asyncio.sleep(NO_HANDLES_WAIT_S)
                    continue
                await self._meet(visitor, _counted(address[0]))
            await asyncio.sleep(self._turnstile.load.rest_s())

    async def _meet(self, visitor: socket.socket, source: str) -> None:
        if self._has_place_for(source):
            with contextlib.suppress(OSError):  # it has left again
                await asyncio.get_running_loop().connect_accepted_socket(self._handler, visitor)
            return
        visitor.close()

    def _handler(self) -> web.RequestHandler:
        handler = self._server()
        self._strangers[handler] = asyncio.get_running_loop().time()
        return handler

    def _has_place_for(self, source: str) -> bool:
        """True if one more of this source may come in. A source without a connection gets the place of one that has most."""
        if self._turnstile.delay_s(source) > AHEAD_S_MAX:
            return False  # who is shown out and comes back at once, a thousand times a second
        inside = list(self._server.connections)
        held = Counter(_source(handler.transport) for handler in inside)
        if held[source] >= CONNECTIONS_MAX_PER_SOURCE:
            return False
        if len(inside) < CONNECTIONS_MAX:
            return True
        greedy, count = held.most_common(1)[0]
        if count == 1 or held[source] > 0:
            return False
        next(handler for handler in inside if _source(handler.transport) == greedy).force_close()
        return True


def _source(transport: asyncio.BaseTransport | None) -> str:
    """Who is on the other end, as far as counting goes: an IPv4 address, or the /64 that one IPv6 visitor has to himself."""
    peer = None if transport is None else transport.get_extra_info("peername")
    return "" if peer is None else _counted(str(peer[0]))


def _counted(address: str) -> str:
    if ":" not in address:
        return address
    prefix = int(ipaddress.IPv6Address(address.partition("%")[0])) >> 64
    return f"{prefix:x}::/64"


def _is_our_name(host_header: str, listen_host: str) -> bool:
    """An IP address, localhost, or the name we were told to listen on: what a rebinding page cannot be called."""
    try:
        host = urlsplit(f"//{host_header}").hostname or ""
        if host in ("localhost", listen_host.lower()):
            return True
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _qr_code(data: bytes) -> str:
    """These bytes as an SVG that stands in a page."""
    import segno  # half of this module's memory, for a page that few look at

    return str(segno.make(data.decode(), error="l", micro=False, boost_error=False).svg_inline(scale=5))


def _answer(message: Message, status: int | None = None) -> web.Response:
    headers = {}
    if status is None:
        reason = message.reason if isinstance(message, Refusal) else None
        status = 200 if reason is None else STATUS_BY_REASON.get(reason, STATUS_OF_OTHER_REASONS)
        if status == 429:
            headers["Retry-After"] = "1"
    return web.Response(body=encode(message), status=status, content_type="application/json", headers=headers)


def _sse(message: Message) -> bytes:
    return b"event: " + message.TYPE.encode() + b"\ndata: " + encode(message) + b"\n\n"


async def _write(response: web.StreamResponse, data: bytes) -> None:
    async with asyncio.timeout(WRITE_WAIT_S):
        await response.write(data)


async def _with_headers(_: web.Request, response: web.StreamResponse) -> None:
    response.headers.update(HEADERS)
