"""An embedded Ethereum node for the demo and the tests: a py-evm chain behind JSON-RPC over HTTP and
WebSocket.

Rules
* One port, loopback: POST is JSON-RPC, GET upgrades to WebSocket, where `eth_subscribe` knows `newHeads` and
  `logs`.
* It answers as a real node does, so that the agent runs the same code here and in the field: error codes and
  words of geth, blocks stamped with the wall clock, a pool that waits for the next block.
* Its accounts are throw-away: keys follow from a seed that everybody can read. Never send them real money.
* Every size is limited; what exceeds a limit gets a JSON-RPC error, never a hang.

May not know: the V2V contract, the agent.
"""

from __future__ import annotations

import asyncio
import json
import time
from asyncio import Transport
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from types import TracebackType
from typing import Self

from aiohttp import WSCloseCode, WSMsgType, web
from coincurve import PrivateKey
from eth_hash.auto import keccak

from agent.chain.rpc import parse
from agent.core.token import address_of
from agent.core.units import hex0x
from agent.demo.eth_methods import (
    EthMethods,
    Json,
    LogFilter,
    ProviderLimits,
    block_json,
    log_filter,
    log_json,
)
from agent.demo.evm import CODE_INVALID_PARAMS, CODE_LIMIT, Evm, Mined, Refusal, matches

DEFAULT_CHAIN_ID = 1337
DEFAULT_SEED = "v2v"
DEFAULT_LABELS = ("organisation", "alice", "bob", "carol", "dave")
FUNDED_WEI = 1_000 * 10**18

MAX_BODY_BYTES = 1 << 20  # a deployment is about 20 kB; anything near this is a mistake or an attack
MAX_BATCH = 100
MAX_SUBSCRIPTIONS = 32  # of one connection
MAX_UNSENT_MESSAGES = 10_000  # of one connection that reads too slowly; then it is cut off

CODE_PARSE_ERROR = -32700
CODE_INVALID_REQUEST = -32600
CODE_NO_METHOD = -32601


def derive_key(seed: str, label: str) -> bytes:
    """The private key of a throw-away account: keccak(seed, 0, label). Anybody can compute it."""
    return keccak(seed.encode() + b"\0" + label.encode())


def address_from_key(private_key: bytes) -> bytes:
    """The 20-byte address of a private key."""
    return address_of(PrivateKey(private_key).public_key.format(compressed=False))


@dataclass(slots=True, eq=False)
class _Client:
    """One WebSocket connection: its subscriptions, and what still has to be sent to it."""

    socket: web.WebSocketResponse
    transport: Transport | None
    unsent: asyncio.Queue[str] = field(default_factory=lambda: asyncio.Queue(MAX_UNSENT_MESSAGES))
    subscriptions: dict[str, LogFilter | None] = field(default_factory=dict)  # None: newHeads

    def push(self, message: Json) -> None:
        """Queue a message. A client that does not read is cut off rather than remembered without end."""
        try:
            self.unsent.put_nowait(json.dumps(message))
        except asyncio.QueueFull:
            self.cut()

    def cut(self) -> None:
        """End the connection without a word, as a crash does."""
        if self.transport:
            self.transport.abort()

    async def send_for_ever(self) -> None:
        """Send what is queued until the connection ends."""
        with suppress(ConnectionError):
            while True:
                await self.socket.send_str(await self.unsent.get())


class Devnet:
    """The node. `async with Devnet() as net:` listens on `net.url_http` and `net.url_ws`.

    block_time_s 0 mines every transaction at once (and stamps blocks at least one second apart);
    otherwise a block comes every `block_time_s` seconds, stamped with the wall clock.
    `finality_depth`: how far `safe` and `finalized` are behind the head.
    """

    def __init__(
        self,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        block_time_s: float = 0,
        seed: str = DEFAULT_SEED,
        accounts: Sequence[str] = DEFAULT_LABELS,
        chain_id: int = DEFAULT_CHAIN_ID,
        limits: ProviderLimits | None = None,
        finality_depth: int = 0,
    ) -> None:
        self.host, self.port, self.chain_id, self.seed = host, port, chain_id, seed
        self.block_time_s = block_time_s
        self.accounts = {label: address_from_key(derive_key(seed, label)) for label in accounts}
        self.evm = Evm(chain_id, dict.fromkeys(self.accounts.values(), FUNDED_WEI), int(time.time()))
        self.methods = EthMethods(self.evm, self.mine, limits or ProviderLimits(), finality_depth)
        self.methods.automine = not block_time_s
        self._clients: set[_Client] = set()
        self._subscription_names = count(1)
        self._runner: web.AppRunner | None = None
        self._miner: asyncio.Task[None] | None = None

    # ---- life

    async def __aenter__(self) -> Self:
        await self.listen()
        if self.block_time_s:
            self._miner = asyncio.create_task(self._mine_for_ever())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._miner:
            self._miner.cancel()
            with suppress(asyncio.CancelledError):
                await self._miner
        await self.unplug()

    async def listen(self) -> None:
        """Open the port; after `unplug` the same one again, with the chain as it was. OSError when it is
        taken.
        """
        app = web.Application(client_max_size=MAX_BODY_BYTES)
        app.router.add_post("/", self._on_post)
        app.router.add_get("/", self._on_websocket)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await self._runner.setup()
        await web.TCPSite(self._runner, self.host, self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def unplug(self) -> None:
        """Close the port and cut every connection without a word, as a crash does."""
        for client in tuple(self._clients):
            client.cut()
        if self._runner:
            await self._runner.cleanup()
            self._runner = None

    async def hang_up(self, code: int = WSCloseCode.GOING_AWAY) -> None:
        """Close every WebSocket politely (1000, 1001, ...), as a node does that is being updated."""
        for client in tuple(self._clients):
            while not client.unsent.empty():  # what was announced is still said
                await client.socket.send_str(client.unsent.get_nowait())
            await client.socket.close(code=code)

    @property
    def url_http(self) -> str:
        """Address for requests."""
        return f"http://{self.host}:{self.port}"

    @property
    def url_ws(self) -> str:
        """Address for requests and subscriptions."""
        return f"ws://{self.host}:{self.port}"

    @property
    def subscription_count(self) -> int:
        """Live subscriptions of all connections."""
        return sum(len(client.subscriptions) for client in self._clients)

    def key(self, label: str) -> bytes:
        """The private key of a funded account."""
        if label not in self.accounts:
            raise KeyError(f"no account {label!r}; there are {', '.join(self.accounts)}")
        return derive_key(self.seed, label)

    def address(self, label: str) -> bytes:
        """The address of a funded account."""
        return self.accounts[label]

    # ---- blocks

    def mine(self, blocks: int = 1) -> Mined:
        """Make blocks now and tell every subscriber; returns the newest."""
        for _ in range(blocks):
            self._announce(self.evm.mine(self.methods.now_s))
        return self.evm.head

    def reorg(self, depth: int, blocks: int | None = None) -> Mined:
        """Replace the newest `depth` blocks by `blocks` others (default one more). Their transactions are
        mined again, at another time. As with anvil, subscribers see only new heads, no `removed` logs.
        """
        first_dropped = self.evm.drop(depth)[0]
        # A second later: an empty block at the same time would be the same block again.
        self._announce(self.evm.mine(max(self.methods.now_s, int(first_dropped.header.timestamp) + 1)))
        return self.mine((depth + 1 if blocks is None else blocks) - 1)

    async def _mine_for_ever(self) -> None:
        while True:
            await asyncio.sleep(self.block_time_s - time.time() % self.block_time_s)
            self.mine()

    def _announce(self, block: Mined) -> None:
        for client in tuple(self._clients):
            for name, wanted in client.subscriptions.items():
                if wanted is None:
                    results = [block_json(block, full=False)]
                else:
                    results = [
                        log_json(log) for log in block.logs if matches(log, wanted.addresses, wanted.topics)
                    ]
                for result in results:
                    params = {"subscription": name, "result": result}
                    client.push({"jsonrpc": "2.0", "method": "eth_subscription", "params": params})

    # ---- the two doors

    async def _on_post(self, request: web.Request) -> web.Response:
        try:
            body = await request.read()
        except web.HTTPRequestEntityTooLarge:
            answer = _error(None, CODE_INVALID_REQUEST, f"request body larger than {MAX_BODY_BYTES} bytes")
            return web.json_response(answer, status=413)
        return web.json_response(self._answer_text(body, None))

    async def _on_websocket(self, request: web.Request) -> web.StreamResponse:
        socket = web.WebSocketResponse(max_msg_size=MAX_BODY_BYTES, timeout=2)
        await socket.prepare(request)
        transport = request.transport
        client = _Client(socket, transport if isinstance(transport, Transport) else None)
        self._clients.add(client)
        writer = asyncio.create_task(client.send_for_ever())
        try:
            async for message in socket:
                if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):  # web3 sends binary frames
                    client.push(self._answer_text(message.data, client))
        finally:
            self._clients.discard(client)
            writer.cancel()
        return socket

    def _answer_text(self, text: str | bytes, client: _Client | None) -> Json:
        try:
            request = parse(text)
        except ValueError:
            return _error(None, CODE_PARSE_ERROR, "invalid JSON")
        if not isinstance(request, list):
            return self._answer(request, client)
        if not 0 < len(request) <= MAX_BATCH:
            return _error(None, CODE_INVALID_REQUEST, f"a batch holds 1 to {MAX_BATCH} requests")
        return [self._answer(single, client) for single in request]

    def _answer(self, request: Json, client: _Client | None) -> Json:
        if not isinstance(request, dict):
            return _error(None, CODE_INVALID_REQUEST, "a request is an object")
        request_id, method, params = request.get("id"), request.get("method"), request.get("params", [])
        if not isinstance(method, str):
            return _error(request_id, CODE_INVALID_REQUEST, "a request has a method")
        if not isinstance(params, list):
            return _error(request_id, CODE_INVALID_PARAMS, "params is a list")
        try:
            if method in ("eth_subscribe", "eth_unsubscribe"):
                result = self._subscription(method, params, client)
            elif method in self.methods.table:
                result = self.methods.table[method](*params)
            else:
                return _error(
                    request_id, CODE_NO_METHOD, f"the method {method} does not exist/is not available"
                )
        except Refusal as refusal:
            return _error(request_id, refusal.code, refusal.message, refusal.data)
        except (
            TypeError,
            ValueError,
            KeyError,
            AttributeError,
            IndexError,
        ) as problem:  # parameters of a wrong shape
            return _error(request_id, CODE_INVALID_PARAMS, f"invalid params for {method}: {problem}")
        return {"jsonrpc": "2.0", "id": request_id, "result": result}

    def _subscription(self, method: str, params: list[Json], client: _Client | None) -> Json:
        if client is None:
            raise Refusal(CODE_NO_METHOD, "notifications not supported over HTTP; connect by WebSocket")
        if method == "eth_unsubscribe":
            return client.subscriptions.pop(params[0], False) is not False
        if len(client.subscriptions) >= MAX_SUBSCRIPTIONS:
            raise Refusal(CODE_LIMIT, f"more than {MAX_SUBSCRIPTIONS} subscriptions")
        if params[0] not in ("newHeads", "logs"):
            raise Refusal(CODE_INVALID_PARAMS, f"no {params[0]!r} subscription")
        wanted = None if params[0] == "newHeads" else log_filter(params[1] if len(params) > 1 else {})
        name = hex(next(self._subscription_names))
        client.subscriptions[name] = wanted
        return name


def _error(request_id: Json, code: int, message: str, data: bytes | None = None) -> Json:
    error: dict[str, Json] = {"code": code, "message": message}
    if data is not None:
        error["data"] = hex0x(data)
    return {"jsonrpc": "2.0", "id": request_id, "error": error}
