"""JSON-RPC to an Ethereum node: one question, one answer, bounded in time and size; and reading answers
strictly.

Rules
* Whatever is wrong with the network or the node raises `Transient` within the time-out, with the node's name.
* The node's own "no" raises `RpcError`; `node.py` knows what each one means.
* An address of a node may hold a password or an API key, so messages show only `scheme://host:port`.
* An answer is a stranger's: every field is checked for form before anybody counts with it.

May not know: methods, blocks, contracts; web3 (its WebSocket is in `websocket.py`, loaded when first needed).
"""

from __future__ import annotations

import asyncio
import json
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from agent.errors import Misconfigured, Transient

if TYPE_CHECKING:
    from aiohttp import ClientSession

Json = Any  # what json.loads makes; checked where it is used

_QUANTITY = re.compile(r"0x[0-9a-fA-F]{1,64}")
_DATA = re.compile(r"0x(?:[0-9a-fA-F]{2})*")
_SECONDS = re.compile(r"[0-9]{1,6}")

RECURSION_LIMIT = 1_000  # Python's own default

# What hosted nodes say with HTTP instead of JSON-RPC.
_HTTP_RATIONED = (429, 503)
_HTTP_TOO_SLOW = (408, 504, 524)  # a gateway lost its patience with the node behind it
_HTTP_TOO_LARGE = 413
_HTTP_UNAUTHORISED = (401, 403)


@dataclass(frozen=True, slots=True)
class Limits:
    """How long we wait and how much we take. Each one names the fault or the attacker it stops."""

    connect_timeout_s: float = 10  # a firewall that drops packets
    request_timeout_s: float = 10  # a node that accepts and never answers
    ping_interval_s: float = 5  # a tunnel: the link is gone and nobody says so
    ping_timeout_s: float = 5  # (interval + timeout + close: noticed after 12 s at most)
    close_timeout_s: float = 2  # a peer that does not finish the closing handshake
    silence_s: float = 15  # a subscription the node has forgotten while the link lives
    answer_bytes: int = 16 << 20  # a node that answers without end
    requests_at_once: int = 16  # our own bursts: a node rations whoever floods it
    hints: int = 256  # a burst of logs; beyond it only "catch up" is kept
    range_blocks_start: int = 2_000
    range_blocks_max: int = 500_000
    logs_per_page: int = 100_000  # a node that floods us with logs


class RpcError(Exception):
    """The node's own "no". `code` and `message` as it said them; `data` as it came."""

    def __init__(self, code: int, message: str, data: Json = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.data = data


class Suspicious(Transient):
    """What an honest and healthy node does not do. `lie` is the stable name under which the log says who did it."""

    lie: str


class SlowAnswer(Suspicious):
    """The link may live, but this answer did not come in time: a smaller question may help."""

    lie = "chain.slow_answer"


class AnswerTooLarge(Suspicious):
    """The answer is larger than we take: a smaller question may help."""

    lie = "chain.huge_answer"


class Nonsense(Suspicious):
    """The answer has not the form that it must have, or answers another question."""

    lie = "chain.nonsense"


class Rationed(Transient):
    """The node asks for patience: `after_s` seconds of it (HTTP `Retry-After`), 0 where it does not say how much."""

    def __init__(self, message: str, after_s: float = 0, *, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.after_s = after_s


class Wire(Protocol):
    """A way to ask a node."""

    async def request(self, method: str, params: list[Json]) -> Json:
        """The `result`. Raises RpcError, Transient."""

    async def close(self) -> None:
        """Give the connection back. Never raises."""


def shown(url: str) -> str:
    """A node's address as messages may show it: no user, no path, no query (that is where API keys are)."""
    parts = urlsplit(url)
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{parts.hostname or '?'}{port}"


def unreachable(url: str, problem: BaseException | str) -> Transient:
    """The one error for a node that is away, whatever the library called it."""
    words = problem if isinstance(problem, str) else f"{type(problem).__name__}: {problem}".rstrip(": ")
    return Transient(
        f"the Ethereum node at {shown(url)} cannot be reached ({words})",
        remedy="Is it running, is the address right, is there a network? `v2v devnet` starts a local one.",
    )


def result_of(answer: Json, url: str) -> Json:
    """The `result` of an answer, or its error."""
    if not isinstance(answer, dict):
        raise nonsense(url, "not an object")
    error = answer.get("error")
    if error is not None:
        if not isinstance(error, dict):
            raise RpcError(0, str(error)[:500])
        code = error.get("code")
        raise RpcError(
            code if isinstance(code, int) else 0, str(error.get("message"))[:500], error.get("data")
        )
    if "result" not in answer:
        raise nonsense(url, "neither result nor error")
    return answer["result"]


def rationed(url: str, why: str, after: str | None = None) -> Rationed:
    """`after` is a `Retry-After` header: seconds (a date would be the wall clock's, which we do not follow)."""
    return Rationed(
        f"the Ethereum node at {shown(url)} is busy or rations us ({why})",
        float(after) if after is not None and _SECONDS.fullmatch(after) else 0,
        remedy="Use a node of your own, or a larger plan.",
    )


def nonsense(url: str, what: str) -> Nonsense:
    """An answer that no honest node gives."""
    return Nonsense(
        f"the Ethereum node at {shown(url)} answered nonsense ({what})",
        remedy="Is this really an Ethereum JSON-RPC address? If it was, use another node.",
    )


class HttpWire:
    """Requests by HTTP POST over kept-alive connections."""

    def __init__(self, url: str, limits: Limits) -> None:
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise Misconfigured(
                f"{shown(url)} is no address for requests to a node",
                remedy="Write http://host:port or https://...",
            )
        self.url = url
        self._limits = limits
        self._session: ClientSession | None = None
        self._next_id = 0

    async def request(self, method: str, params: list[Json]) -> Json:
        """One POST, one answer."""
        import aiohttp

        self._next_id += 1
        body = {"jsonrpc": "2.0", "id": self._next_id, "method": method, "params": params}
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                async with self._open_session().post(self.url, json=body, allow_redirects=False) as response:
                    text = await _bounded(response.content, self._limits.answer_bytes, self.url)
        except TimeoutError as problem:
            raise SlowAnswer(
                f"the Ethereum node at {shown(self.url)} did not answer {method} in time"
            ) from problem
        except (aiohttp.ClientError, OSError) as problem:
            raise unreachable(self.url, problem) from problem
        answer = _parsed(text)
        if response.status in _HTTP_RATIONED:
            raise rationed(self.url, f"HTTP {response.status}", response.headers.get("Retry-After"))
        if response.status in _HTTP_UNAUTHORISED:
            raise Transient(
                f"the Ethereum node at {shown(self.url)} does not let us in (HTTP {response.status})",
                remedy="Check the user, password or API key in the address.",
            )
        if answer is None and response.status in _HTTP_TOO_SLOW:
            raise SlowAnswer(
                f"the Ethereum node at {shown(self.url)} did not answer {method} in time (HTTP {response.status})"
            )
        if answer is None and response.status == _HTTP_TOO_LARGE:
            raise AnswerTooLarge(f"the Ethereum node at {shown(self.url)} refuses so much at once (HTTP 413)")
        if answer is None:
            raise nonsense(self.url, f"HTTP {response.status}, no JSON")
        return result_of(answer, self.url)

    def _open_session(self) -> ClientSession:
        import aiohttp

        if self._session is None or self._session.closed:
            connector = aiohttp.TCPConnector(limit=self._limits.requests_at_once)
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_timeout_s)
            self._session = aiohttp.ClientSession(connector=connector, timeout=timeout)
        return self._session

    async def close(self) -> None:
        """Give the connections back."""
        if self._session is not None:
            await self._session.close()
            self._session = None


async def _bounded(stream: Any, limit: int, url: str) -> bytes:
    parts, size = [], 0
    async for part in stream.iter_any():
        size += len(part)
        if size > limit:
            raise AnswerTooLarge(f"the Ethereum node at {shown(url)} answered more than {limit} bytes")
        parts.append(part)
    return b"".join(parts)


# ---- reading answers strictly


def parse(text: bytes | str) -> Json:
    """JSON of a stranger; ValueError when it is none, or nested deeper than anything honest.

    py_ecc, which comes with web3 and eth_account, raises Python's recursion limit to 100 000; on Python 3.11
    some hundred kilobytes of "[" then overflow the C stack and kill the process. So the limit is put back
    while we read.
    """
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(RECURSION_LIMIT)
    try:
        return json.loads(text)
    except RecursionError as problem:
        raise ValueError("nested too deep") from problem
    finally:
        sys.setrecursionlimit(limit)


def _parsed(text: bytes) -> Json:
    try:
        return parse(text)
    except ValueError:
        return None


class Malformed(ValueError):
    """A field has not the form it must have."""


def read_quantity(value: Json) -> int:
    """A JSON-RPC quantity: 0x-hex, at most 256 bits."""
    if not isinstance(value, str) or not _QUANTITY.fullmatch(value):
        raise Malformed("not a quantity")
    return int(value, 16)


def read_data(value: Json, length: int | None = None) -> bytes:
    """JSON-RPC data: 0x-hex of whole bytes, of this length where one is given."""
    if not isinstance(value, str) or not _DATA.fullmatch(value):
        raise Malformed("not 0x-hex data")
    raw = bytes.fromhex(value[2:])
    if length is not None and len(raw) != length:
        raise Malformed(f"{len(raw)} bytes where {length} belong")
    return raw
