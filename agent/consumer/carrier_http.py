"""Messages straight to the provider's car over its local web server, where there is no broker (PROTOCOL section 6).

Rules
* `GET /v1/hello`, `POST /v1/present|receipt|stop` (the answer is the response's body), `GET /v1/session/{sref}` for what
  the provider says by itself: server-sent events, one message each. Our return address goes along as `X-V2V-Sref`.
* An answer is a stranger's: every size and wait is bounded. No redirects, no cookies, no proxy of the environment.

May not know: what messages mean (except where in a list of ports a Hello is).
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from typing import Any, Self

import aiohttp

from agent.consumer.carrier import CONNECT_TIMEOUT_S, Backoff, Inbox, Kind
from agent.core.messages import MESSAGE_BYTES_MAX
from agent.core.units import Address
from agent.errors import Transient

REQUEST_TIMEOUT_S = 10.0  # a server that accepts and never answers
SILENCE_S = 60.0  # an event stream without even a comment for this long is dead; we open another
EVENTS_BACKOFF_S_MAX = 2.0  # the server knows our address only after our first message, so ask again soon
HELLO_BYTES_MAX = 32 * 1024  # eight ports with a Hello of 400 bytes each, and room for what else a page says
HELLOS_MAX = 16
SREF_HEADER = "X-V2V-Sref"
SREF_FORM = re.compile(r"[A-Za-z0-9_-]{22,64}")  # what the other side takes as a return address


class HttpCarrier:
    """One consumer's way to one provider's web server."""

    def __init__(self, url: str, sref: str) -> None:
        self.trouble = ""
        self._url, self._sref = url.rstrip("/"), sref
        self._inbox = Inbox()
        self._session: aiohttp.ClientSession | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            timeout=aiohttp.ClientTimeout(total=REQUEST_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            headers={SREF_HEADER: self._sref, "Accept-Encoding": "identity"},
            auto_decompress=False,  # nothing of ours is compressed, so nothing can unfold
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        await self.ask_hello()
        if self.trouble:
            trouble = self.trouble
            await self.__aexit__()
            raise Transient(
                f"the provider's door at {self._url} cannot be reached ({trouble})",
                remedy="are we in its network, is [http] url right, is its [http] enabled?",
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._session is not None:
            await self._session.close()

    async def meet(self, provider: Address) -> None:
        """Listen to what this server says about our session. (Whether it is this provider's, signatures tell.)"""
        if self._task is None:
            self._task = asyncio.create_task(self._follow_events(), name="consumer-events")

    async def ask_hello(self) -> None:
        """Fetch the current Hellos."""
        body = await self._fetch("GET", "/v1/hello", None, HELLO_BYTES_MAX)
        for hello in _hellos(body):
            self._inbox.put(hello)

    async def post(self, kind: Kind, data: bytes) -> None:
        """Post; the answer, if there is one, goes to the inbox."""
        answer = await self._fetch("POST", f"/v1/{kind}", data, MESSAGE_BYTES_MAX)
        if answer:
            self._inbox.put(answer)

    async def next(self, timeout_s: float) -> bytes | None:
        """The next answer, Hello or event."""
        return await self._inbox.next(timeout_s)

    # ---- requests

    async def _fetch(self, method: str, path: str, data: bytes | None, bytes_max: int) -> bytes:
        """The body, whatever the status (a refusal may come with a 4xx); empty when there is none of a sane size."""
        assert self._session is not None
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            async with self._session.request(
                method, self._url + path, data=data, headers=headers, allow_redirects=False
            ) as response:
                body = await _read_at_most(response.content, bytes_max)
        except (aiohttp.ClientError, TimeoutError, OSError) as problem:
            self.trouble = str(problem) or type(problem).__name__
            return b""
        self.trouble = ""
        return body if len(body) <= bytes_max else b""

    # ---- events

    async def _follow_events(self) -> None:
        backoff = Backoff(longest_s=EVENTS_BACKOFF_S_MAX)
        while True:
            try:
                await self._read_events(backoff)
            except (
                aiohttp.ClientError,
                TimeoutError,
                OSError,
                ValueError,
            ) as problem:  # ValueError: an endless line
                self.trouble = str(problem) or type(problem).__name__
            await asyncio.sleep(backoff.next_s())

    async def _read_events(self, backoff: Backoff) -> None:
        assert self._session is not None
        waits = aiohttp.ClientTimeout(total=None, connect=CONNECT_TIMEOUT_S, sock_read=SILENCE_S)
        request = self._session.get(
            f"{self._url}/v1/session/{self._sref}",
            timeout=waits,
            headers={"Accept": "text/event-stream"},
            allow_redirects=False,
        )
        async with request as response:
            if response.status != 200 or response.content_type != "text/event-stream":
                return  # not yet
            backoff.reset()
            self.trouble = ""
            async for line in response.content:
                if line.startswith(b"data:") and len(line) <= MESSAGE_BYTES_MAX + 8:
                    self._inbox.put(line[5:].strip())


async def _read_at_most(stream: aiohttp.StreamReader, bytes_max: int) -> bytes:
    """Up to `bytes_max` + 1 bytes: one more than allowed shows that there were too many."""
    body = b""
    while len(body) <= bytes_max and (part := await stream.read(bytes_max + 1 - len(body))):
        body += part
    return body


def _hellos(body: bytes) -> Iterator[bytes]:
    """Every Hello in the answer, wherever it stands in it, as its own JSON; strict decoding comes later."""
    try:
        answer = json.loads(body)
    except (ValueError, RecursionError):
        return
    found = 0
    waiting: list[Any] = [answer]
    while waiting and found < HELLOS_MAX:
        item = waiting.pop(0)
        if isinstance(item, dict) and item.get("type") == "hello":
            found += 1
            yield json.dumps(item).encode()
        elif isinstance(item, dict):
            waiting.extend(item.values())
        elif isinstance(item, list):
            waiting.extend(item)
