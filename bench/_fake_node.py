"""A node that only knows how to be fast: blocks are numbers, logs come from an index, and nothing is ever verified.

    with FakeNode(blocks=1_000_000) as node:
        node.opens(session, at=500_000)
        node.url

It runs in a thread with an event loop of its own, so that what is measured does not share a loop with what it asks. Any
number of blocks costs nothing: a header is computed from its height. `calls` counts requests.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from aiohttp import WSMsgType, web

from agent.chain import contract
from agent.core import token as rules
from agent.core.token import Domain
from agent.core.units import Address, hex0x

Json = Any
CHAIN_ID = 31_337
DOMAIN = Domain(CHAIN_ID, Address(b"\xc0" * 20))
BLOCK_S, GENESIS_S = 12, 1_700_000_000
START_S = 10.0


def _word(value: int | bytes) -> bytes:
    return value.to_bytes(32, "big") if isinstance(value, int) else value.rjust(32, b"\0")


@dataclass(frozen=True, slots=True)
class Opened:
    """A session as `connect` opens it, and its log."""

    consumer: Address
    provider: Address
    issued_at_s: int
    energy_wh: int = 1_000
    rate: int = 10**15
    valid_for_s: int = 36_000

    @property
    def valid_until_s(self) -> int:
        """When its token expires."""
        return self.issued_at_s + self.valid_for_s

    @property
    def token(self) -> bytes:
        """The paper's access token."""
        return rules.access_token(self.consumer, self.provider, self.issued_at_s, self.valid_until_s)

    @property
    def session_id(self) -> bytes:
        """It is the consumer's first."""
        return rules.session_id(CHAIN_ID, DOMAIN.contract, self.consumer, self.provider, 1)

    @property
    def deposit_wei(self) -> int:
        """Cost of the whole order."""
        return self.energy_wh * self.rate // 1_000

    def opened_log(self) -> tuple[list[bytes], bytes]:
        """`SessionOpened`: topics and data."""
        topics = [
            contract.topic_of(contract.SessionOpened),
            self.session_id,
            self.token,
            _word(self.provider),
        ]
        values: tuple[int | bytes, ...] = (
            self.consumer, 1, self.energy_wh, self.rate, self.deposit_wei, self.deposit_wei, self.issued_at_s,
            self.valid_until_s,
        )  # fmt: skip
        return topics, b"".join(_word(value) for value in values)

    def ended_log(self) -> tuple[list[bytes], bytes]:
        """`ConnectionEnded` for nothing delivered."""
        topics = [
            contract.topic_of(contract.ConnectionEnded),
            self.token,
            _word(self.consumer),
            _word(self.provider),
        ]
        return topics, _word(0) + _word(0)

    def state(self) -> bytes:
        """What `sessions(token)` returns while it is open."""
        values: tuple[int | bytes, ...] = (
            1, self.consumer, self.provider, 1, self.energy_wh, 0, self.rate, self.deposit_wei, self.deposit_wei,
            self.valid_until_s + 259_200, 0,
        )  # fmt: skip
        return b"".join(_word(value) for value in values)


def _hash(*parts: object) -> str:
    return "0x" + hashlib.sha256(repr(parts).encode()).hexdigest()


@dataclass(eq=False)
class FakeNode:
    """`with`: it listens. `range_blocks`: at most so many blocks in one question (0: any)."""

    blocks: int = 1
    range_blocks: int = 0
    calls: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._by_provider: dict[bytes, list[tuple[int, int, Json]]] = {}  # (block, index, log), in order
        self._open: dict[bytes, bytes] = {}
        self._mined: dict[str, Json] = {}
        self._listeners: dict[str, tuple[web.WebSocketResponse, Json]] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.port = 0

    def __enter__(self) -> Self:
        self._thread.start()
        self._do(self._listen())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_S)
        self._loop.close()

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(START_S)

    async def _listen(self) -> None:
        app = web.Application()
        app.router.add_get("/", self._on_websocket)
        app.router.add_post("/", self._on_post)
        app.router.add_post("/uncounted", self._on_post)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.port = self._runner.addresses[0][1]

    @property
    def url_ws(self) -> str:
        """For everything."""
        return f"ws://127.0.0.1:{self.port}"

    @property
    def url_http(self) -> str:
        """For requests."""
        return f"http://127.0.0.1:{self.port}"

    # ---- what happens

    @property
    def next_block_s(self) -> int:
        """When the next block is dated."""
        return GENESIS_S + self.blocks * BLOCK_S

    def holds(self, session: Opened, at: int) -> None:
        """It was opened in that block, long ago. In the order of blocks."""
        topics, data = session.opened_log()
        self._keep(session.provider, at, topics, data)
        self._open[session.token] = session.state()

    def opens(self, session: Opened) -> int:
        """A block with it, now; the monotonic ns at which its log was on its way to every subscriber."""
        self._open[session.token] = session.state()
        return int(self._do(self._mine(session.provider, *session.opened_log())))

    def ends(self, session: Opened) -> int:
        """A block with its end."""
        self._open.pop(session.token, None)
        return int(self._do(self._mine(session.provider, *session.ended_log())))

    def _keep(self, provider: bytes, at: int, topics: list[bytes], data: bytes) -> Json:
        logs = self._by_provider.setdefault(provider, [])
        log: dict[str, Json] = {
            "address": hex0x(DOMAIN.contract), "topics": [hex0x(topic) for topic in topics], "data": hex0x(data),
            "blockNumber": hex(at), "blockHash": _hash("block", at), "transactionHash": _hash("tx", at, len(logs)),
            "logIndex": hex(len(logs)), "removed": False,
        }  # fmt: skip
        logs.append((at, len(logs), log))
        self._mined[log["transactionHash"]] = log
        return log

    async def _mine(self, provider: bytes, topics: list[bytes], data: bytes) -> int:
        log = self._keep(provider, self.blocks, topics, data)
        self.blocks += 1
        began_ns = time.monotonic_ns()
        for name, (socket, wanted) in tuple(self._listeners.items()):
            if wanted[0] == "logs" and bytes.fromhex(wanted[1]["topics"][3][-40:]) != provider:
                continue
            result = log if wanted[0] == "logs" else self._header(self.blocks - 1)
            note = {"subscription": name, "result": result}
            await socket.send_str(
                json.dumps({"jsonrpc": "2.0", "method": "eth_subscription", "params": note})
            )
        return began_ns

    # ---- what is asked

    async def _on_post(self, request: web.Request) -> web.Response:
        asked = json.loads(await request.read())
        if request.path == "/uncounted":  # somebody who is there to be compared with
            self.calls[asked["method"]] -= 1
        return web.json_response(self._answer(asked, None))

    async def _on_websocket(self, request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        async for message in socket:
            if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                await socket.send_str(json.dumps(self._answer(json.loads(message.data), socket)))
        self._listeners = {name: one for name, one in self._listeners.items() if one[0] is not socket}
        return socket

    def _answer(self, asked: Json, socket: web.WebSocketResponse | None) -> Json:
        method, params = asked["method"], asked["params"]
        self.calls[method] += 1
        head = {"jsonrpc": "2.0", "id": asked["id"]}
        if method == "eth_subscribe" and socket is not None:
            name = hex(len(self._listeners) + self.calls.total())
            self._listeners[name] = (socket, params)
            return {**head, "result": name}
        if method == "eth_getLogs" and self._is_too_far(params[0]):
            return {**head, "error": {"code": -32005, "message": f"max block range {self.range_blocks}"}}
        return {**head, "result": self._result(method, params)}

    def _is_too_far(self, query: Json) -> bool:
        span = int(query["toBlock"], 16) - int(query["fromBlock"], 16)
        return 0 < self.range_blocks <= span

    def _result(self, method: str, params: Json) -> Json:
        match method:
            case "eth_chainId":
                return hex(CHAIN_ID)
            case "eth_blockNumber":
                return hex(self.blocks - 1)
            case "eth_getBlockByNumber":
                number = self.blocks - 1 if params[0] in ("latest", "finalized") else int(params[0], 16)
                return self._header(number) if number < self.blocks else None
            case "eth_getLogs":
                return self._logs(params[0])
            case "eth_call":
                token = bytes.fromhex(params[0]["data"][10:74])
                return hex0x(self._open.get(token, bytes(11 * 32)))
            case "eth_getTransactionReceipt":
                log = self._mined[params[0]]
                place = {name: log[name] for name in ("transactionHash", "blockNumber", "blockHash")}
                return {**place, "status": "0x1", "gasUsed": "0x1", "logs": [log]}
        raise AssertionError(method)

    def _logs(self, query: Json) -> list[Json]:
        wanted = query["topics"]
        provider = bytes.fromhex(wanted[3][-40:]) if len(wanted) > 3 else b""
        logs = self._by_provider.get(provider, [])
        first = bisect_left(logs, (int(query["fromBlock"], 16),))
        last = bisect_right(logs, (int(query["toBlock"], 16) + 1,))
        return [log for _, _, log in logs[first:last]]

    def _header(self, number: int) -> Json:
        return {
            "number": hex(number), "hash": _hash("block", number), "parentHash": _hash("block", number - 1),
            "timestamp": hex(GENESIS_S + number * BLOCK_S),
        }  # fmt: skip
