"""A JSON-RPC node that fails and lies on demand: HTTP and WebSocket on one loopback port, in front of a truth that does not.

    async with LyingNode(SimTruth(chain)) as node:            before the simulated chain: nothing but loopback and Python
        node.once["omit"] = 1                                 the next answer with logs leaves half of them out
        node.faults.range_blocks = 7                          from now on at most seven blocks at a time
        await node.kill(); await node.restart()
    async with LyingNode(UpstreamTruth(anvil_url)) as node:   the same before anvil

Requests are answered by the truth and then bent; subscriptions are the liar's own, so that it can forget them. `calls` counts
what was asked. Every fault is one that a real node or provider has been seen with; each comment says which.
"""

import asyncio
import json
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass

import aiohttp
from aiohttp import WSMsgType, web
from simulation.chain import CALLER, SimNode

from agent.core.units import hex0x
from agent.errors import Transient

LIMIT_WORDS = (  # how hosted nodes refuse a range; each was met in the field
    "eth_getLogs is limited to a {blocks} range",
    "exceed maximum block range: {blocks}",
    "requested too many blocks, maximum is set to {blocks}",
    "block range is too wide",
)
RATION_WORDS = ((-32005, "daily request count exceeded, request rate limited"), (429, "Too Many Requests"))
ANNOUNCE_EVERY_S = 0.05  # how often an upstream is asked for a new head


class SaysNo(Exception):
    """A JSON-RPC error."""

    def __init__(self, code, message):
        super().__init__(message)
        self.error = {"code": code, "message": message}


@dataclass
class Faults:
    """What is wrong with it until somebody mends it."""

    range_blocks: int = 0  # at most so many blocks in one eth_getLogs (0: any)
    results: int = 0  # at most so many logs in one answer
    behind: int = 0  # an old head served as the newest: a backend that stopped syncing
    logs_behind: int = 0  # only its log index is behind: the head is new, the newest logs are not there
    hides: str = ""  # topic (0x...) of logs it never shows
    half_open: bool = False  # accepts, and never says anything
    chain_id: int = 0  # another chain behind the same address
    genesis: str = ""  # or the same id, from another beginning
    shuffles: bool = False  # logs in any order
    repeats: bool = False  # every log twice
    cuts_every: int = 0  # a bad link: every so many questions for logs the connection ends
    forges: dict | None = None  # a log that never was


ONCE = (
    "429",  # HTTP, with Retry-After
    "-32005",  # the same in JSON-RPC
    "timeout",  # no answer to this one
    "internal",  # -32603
    "cut",  # the connection ends instead of an answer
    "omit",  # half of the logs are left out
    "huge",  # an answer without end
    "loris",  # an answer byte by byte
    "garbage",  # a login page
)


class SimTruth:
    """The simulated chain of tests/simulation, in JSON."""

    def __init__(self, chain, finality_depth=8):
        self.chain, self._finality_depth = chain, finality_depth
        self._typed = SimNode(chain, None)
        self._methods = {
            "eth_chainId": self._chain_id,
            "eth_blockNumber": self._block_number,
            "eth_getBlockByNumber": self._block_by_number,
            "eth_getLogs": self._logs,
            "eth_call": self._call,
            "eth_getTransactionReceipt": self._receipt,
        }

    async def ask(self, method, params):
        """The result. Raises SaysNo."""
        if method not in self._methods:
            raise SaysNo(-32601, f"the method {method} does not exist")
        return self._methods[method](*params)

    async def announce(self, heads):
        """Every new block goes into `heads`, for ever."""
        self.chain.listeners.append(lambda block: heads.put_nowait(_block_json(block)))
        await asyncio.Event().wait()

    def _chain_id(self):
        return hex(self.chain.market.domain.chain_id)

    def _block_number(self):
        return hex(self.chain.head.number)

    def _number(self, tag):
        if tag == "finalized":
            return max(0, self.chain.head.number - self._finality_depth + 1)
        return self.chain.head.number if tag == "latest" else int(tag, 16)

    def _block_by_number(self, tag, _full):
        number = self._number(tag)
        return _block_json(self.chain.blocks[number]) if number < len(self.chain.blocks) else None

    def _logs(self, query):
        address = hex0x(self.chain.market.domain.contract)
        if query["address"] != address:
            return []
        topics = [_bytes(topic) for topic in query["topics"]]
        blocks = self.chain.blocks[self._number(query["fromBlock"]) : self._number(query["toBlock"]) + 1]
        return [_log_json(log) for log in self._typed._matching(blocks, topics)]

    def _call(self, message, tag):
        wanted = tag["blockHash"] if isinstance(tag, dict) else hex0x(self.chain.head.block_hash)
        block = next((b for b in reversed(self.chain.blocks) if hex0x(b.block_hash) == wanted), None)
        if block is None:
            raise SaysNo(-32001, "header not found")
        return hex0x(self._typed._view(block, bytes.fromhex(message["data"][2:]), CALLER))

    def _receipt(self, tx_hash):
        for block, mined in self.chain.mined():
            if hex0x(mined.tx.tx_hash) == tx_hash:
                return {
                    "transactionHash": tx_hash, "status": hex(mined.succeeded), "gasUsed": "0x1", "logs": [],
                    "blockNumber": hex(block.number), "blockHash": hex0x(block.block_hash),
                }  # fmt: skip
        return None


class UpstreamTruth:
    """A real node."""

    def __init__(self, url):
        self._url = url

    async def ask(self, method, params):
        """The result. Raises SaysNo; Transient when the node is away."""
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": params}
        try:
            async with aiohttp.ClientSession() as session, session.post(self._url, json=body) as response:
                answer = await response.json()
        except aiohttp.ClientError as problem:
            raise Transient("the node behind is away") from problem
        if "error" in answer:
            raise SaysNo(answer["error"]["code"], answer["error"]["message"])
        return answer["result"]

    async def announce(self, heads):
        """Ask for the newest block, again and again: hints may be late."""
        known = None
        while True:
            with suppress(Transient):
                head = await self.ask("eth_getBlockByNumber", ["latest", False])
                if head["hash"] != known:
                    known = head["hash"]
                    heads.put_nowait(head)
            await asyncio.sleep(ANNOUNCE_EVERY_S)


class LyingNode:
    """`async with`: it listens on `url_ws` and `url_http`, always on the same port."""

    def __init__(self, truth, seed=0):
        self.truth, self.port = truth, 0
        self.faults, self.once, self.calls = Faults(), Counter(), Counter()
        self._rng = random.Random(seed)
        self._sockets, self._transports, self._subscriptions = {}, set(), {}
        self._runner, self._announcing, self._heads = None, None, asyncio.Queue()

    @property
    def url_http(self):
        """For requests."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def url_ws(self):
        """For everything."""
        return f"ws://127.0.0.1:{self.port}"

    # ---- life

    async def __aenter__(self):
        await self.restart()
        self._announcing = [
            asyncio.create_task(self.truth.announce(self._heads)),
            asyncio.create_task(self._tell()),
        ]
        return self

    async def __aexit__(self, *_):
        for task in self._announcing:
            task.cancel()
        await asyncio.gather(*self._announcing, return_exceptions=True)
        await self.kill()

    async def restart(self):
        """Listen (again)."""
        if self._runner is not None:
            return
        app = web.Application()
        app.router.add_post("/", self._on_post)
        app.router.add_get("/", self._on_websocket)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.05, handler_cancellation=True)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True).start()
        self.port = self._runner.addresses[0][1]

    async def kill(self):
        """Every connection ends without a word, and nobody listens."""
        for transport in tuple(self._transports):
            transport.abort()
        self._subscriptions.clear()
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def hang_up(self, code=1001):
        """A polite end of every WebSocket."""
        for socket in tuple(self._sockets):
            await socket.close(code=code)

    def forget_subscriptions(self):
        """The links live on; nobody is told anything any more."""
        self._subscriptions.clear()

    def heal(self):
        """From now on it is a good node."""
        self.faults, self.once = Faults(), Counter()

    # ---- hints

    async def _tell(self):
        while True:
            head = await self._heads.get()
            for name, (socket, kind) in tuple(self._subscriptions.items()):
                if kind == "newHeads" and not self.faults.half_open:
                    note = {"method": "eth_subscription", "params": {"subscription": name, "result": head}}
                    with suppress(ConnectionError, RuntimeError):
                        await socket.send_str(json.dumps({"jsonrpc": "2.0", **note}))

    # ---- two doors

    async def _on_post(self, request):
        self._transports.add(request.transport)
        asked = json.loads(await request.read())
        fault = self._drawn(asked["method"])
        if fault == "429":
            return web.Response(status=429, headers={"Retry-After": "1"}, text="slow down")
        if fault == "garbage":
            return web.Response(text="<html>please log in</html>")
        if fault in ("huge", "loris"):
            return await self._dripped(request, fault)
        text = await self._answered(asked, fault, None)
        if text is None:
            request.transport.abort()
        return web.Response(text=text or "", content_type="application/json")

    async def _dripped(self, request, fault):
        response = web.StreamResponse()
        await response.prepare(request)
        with suppress(ConnectionError):
            while True:
                await response.write(b" " * (1 << 20 if fault == "huge" else 1))
                await asyncio.sleep(0 if fault == "huge" else 0.02)
        return response

    async def _on_websocket(self, request):
        socket = web.WebSocketResponse(autoping=False, timeout=0.1, max_msg_size=1 << 20)
        await socket.prepare(request)
        self._sockets[socket] = True
        self._transports.add(request.transport)
        try:
            async for message in socket:
                if message.type == WSMsgType.PING and not self.faults.half_open:
                    await socket.pong(message.data)
                elif message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
                    await self._on_message(socket, request, json.loads(message.data))
        except ConnectionError:
            pass  # the other side left first
        finally:
            self._sockets.pop(socket, None)
        return socket

    async def _on_message(self, socket, request, asked):
        fault = self._drawn(asked["method"])
        if fault in ("timeout", "loris"):
            return
        if fault in ("garbage", "huge"):
            await socket.send_str("<html>" if fault == "garbage" else " " * (9 << 20))
            return
        text = await self._answered(asked, fault, socket)
        if text is None:
            request.transport.abort()
        else:
            await socket.send_str(text)

    # ---- answers

    def _drawn(self, method):
        """The next one-time fault, if there is one that fits."""
        self.calls[method] += 1
        every = self.faults.cuts_every
        if every and method == "eth_getLogs" and self.calls[method] % every == 0:
            return "cut"
        for fault in ONCE:
            if self.once[fault] and (fault != "omit" or method == "eth_getLogs"):
                self.once[fault] -= 1
                return fault
        return ""

    async def _answered(self, asked, fault, socket):
        """The whole answer as text; None: hang up. Waits for ever where there is none."""
        if self.faults.half_open or fault == "timeout":
            await asyncio.Event().wait()
        if fault == "cut":
            return None
        head = {"jsonrpc": "2.0", "id": asked["id"]}
        try:
            if fault in ("-32005", "429"):
                raise SaysNo(*self._rng.choice(RATION_WORDS))
            if fault == "internal":
                raise SaysNo(-32603, "internal error")
            return json.dumps(
                {**head, "result": await self._bent(asked["method"], asked["params"], fault, socket)}
            )
        except SaysNo as no:
            return json.dumps({**head, "error": no.error})
        except Transient:
            return None

    async def _bent(self, method, params, fault, socket):
        faults = self.faults
        if method == "eth_subscribe":
            name = hex(self._rng.getrandbits(64))
            self._subscriptions[name] = (socket, params[0])
            return name
        if method == "eth_chainId" and faults.chain_id:
            return hex(faults.chain_id)
        if method == "eth_getLogs":
            return await self._logs(dict(params[0]), fault)
        if method == "eth_getBlockByNumber":
            return await self._block(params)
        return await self.truth.ask(method, params)

    async def _newest(self):
        """The highest block it admits."""
        return int(await self.truth.ask("eth_blockNumber", []), 16) - self.faults.behind

    async def _block(self, params):
        newest = await self._newest()
        if params[0] == "latest":
            params = [hex(newest), params[1]]
        elif params[0].startswith("0x") and int(params[0], 16) > newest:
            return None
        block = await self.truth.ask("eth_getBlockByNumber", params)
        if self.faults.genesis and params[0] == "0x0":
            block = {**block, "hash": self.faults.genesis}
        return block

    async def _logs(self, query, fault):
        first, last, faults = int(query["fromBlock"], 16), int(query["toBlock"], 16), self.faults
        if faults.range_blocks and last - first >= faults.range_blocks:
            words = self._rng.choice(LIMIT_WORDS)
            raise SaysNo(-32602, words.format(blocks=faults.range_blocks))
        query["toBlock"] = hex(min(last, await self._newest() - faults.logs_behind))
        logs = [] if int(query["toBlock"], 16) < first else await self.truth.ask("eth_getLogs", [query])
        if faults.results and len(logs) > faults.results and last > first:
            raise SaysNo(-32005, f"query returned more than {faults.results} results")
        logs = [log for log in logs if log["topics"][0] != faults.hides]
        if faults.forges and first <= int(faults.forges["blockNumber"], 16) <= last:
            logs.append(faults.forges)
        if fault == "omit":
            logs = logs[: len(logs) // 2]
        if faults.repeats:
            logs = logs + logs
        if faults.shuffles:
            self._rng.shuffle(logs)
        return logs


# ---- JSON of the simulated chain


def _bytes(topic):
    if topic is None:
        return None
    return [bytes.fromhex(one[2:]) for one in topic] if isinstance(topic, list) else bytes.fromhex(topic[2:])


def _block_json(block):
    return {
        "number": hex(block.number),
        "hash": hex0x(block.block_hash),
        "parentHash": hex0x(block.parent_hash),
        "timestamp": hex(block.timestamp_s),
    }


def _log_json(log):
    return {
        "address": hex0x(log.address),
        "topics": [hex0x(topic) for topic in log.topics],
        "data": hex0x(log.data),
        "blockNumber": hex(log.block_number),
        "blockHash": hex0x(log.block_hash),
        "transactionHash": hex0x(log.tx_hash),
        "logIndex": hex(log.log_index),
        "removed": False,
    }
