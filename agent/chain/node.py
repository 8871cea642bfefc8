"""The Node port: what the rest of the world may ask of an Ethereum node; and `Web3Node`, which asks a real
one.

Rules
* Bytes and integers inside; JSON and hex stay in here. Every answer is checked for form, never for truth:
  whoever needs truth compares hashes, depth and state (PROTOCOL section 7). Events are hints.
* Every call ends: with an answer, or with `Transient` (network, node), `Refused` (the node's named no),
  `Reverted` (the contract's no) or `Misconfigured`, within the time-outs of `Limits`.
* A watch is a stream of hints on a connection of its own. It never ends quietly: any end raises `Transient`,
  and the caller opens another one and then catches up with `log_pages`. Slow callers lose hints, never the
  connection.
* The port is small on purpose, so that a quorum of nodes, a failover list or a verifying light client can
  stand in its place without its users noticing.

May not know: the V2V contract, sessions, keys, how deep is deep enough.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar
from urllib.parse import urlsplit

from agent.chain.rpc import (
    AnswerTooLarge,
    HttpWire,
    Json,
    Limits,
    Malformed,
    RpcError,
    SlowAnswer,
    Wire,
    nonsense,
    rationed,
    read_data,
    read_quantity,
    shown,
)
from agent.core.units import Address, BlockHash, TxHash, hex0x
from agent.errors import Misconfigured, Refused, Transient

Topics = Sequence[bytes | Sequence[bytes] | None]  # by place: exactly this, one of these, anything
Answer = TypeVar("Answer")
BlockTag = str  # "latest", "safe", "finalized", "earliest"

METHOD_NOT_FOUND = -32601
RATIONED = 429  # some hosted nodes give HTTP's number as a JSON-RPC code
MAX_SLOW_ANSWERS = 3  # in a row, each with a smaller range; then it is the link, not the range
CALM_PAGES_BEFORE_GROWTH = 16  # after so many pages at the provider's limit we try a larger one
TIP_FALLBACK_WEI = 10**9  # for nodes without eth_maxPriorityFeePerGas


@dataclass(frozen=True, slots=True)
class Header:
    """A block's place in the chain."""

    number: int
    block_hash: BlockHash
    parent_hash: BlockHash
    timestamp_s: int


@dataclass(frozen=True, slots=True)
class RawLog:
    """An event log as the chain holds it; `contract.py` makes a named event of it."""

    address: Address
    topics: tuple[bytes, ...]
    data: bytes
    block_number: int
    block_hash: BlockHash
    tx_hash: TxHash
    log_index: int


@dataclass(frozen=True, slots=True)
class Receipt:
    """What a mined transaction did."""

    tx_hash: TxHash
    succeeded: bool
    block_number: int
    block_hash: BlockHash
    gas_used: int
    effective_gas_price_wei: int
    contract: Address | None  # where it created one
    logs: tuple[RawLog, ...]

    @property
    def fee_wei(self) -> int:
        """What the sender paid for gas."""
        return self.gas_used * self.effective_gas_price_wei


@dataclass(frozen=True, slots=True)
class FeeSuggestion:
    """EIP-1559: base fee of the newest block, and the tip the node suggests."""

    base_fee_wei: int
    priority_fee_wei: int


@dataclass(frozen=True, slots=True)
class LogPage:
    """All matching logs of a range of blocks, both ends included, in order."""

    from_block: int
    to_block: int
    logs: tuple[RawLog, ...]


@dataclass(frozen=True, slots=True)
class CatchUp:
    """Hints were lost (a burst, or the node took logs back): ask for the logs since the cursor."""


Hint = Header | RawLog | CatchUp


class Reverted(Refused):
    """The contract said no. `data` is its revert data: `contract.revert_name(data)` names it."""

    def __init__(self, data: bytes) -> None:
        super().__init__("reverted", f"the contract refused (0x{data[:4].hex()})")
        self.data = data


class Artefact(Protocol):
    """What `check_deployment` needs of `contracts.load_artefact()`."""

    def matches_deployed(self, code: bytes) -> bool:
        """True when this is our contract's runtime code, immutables masked."""


class Node(Protocol):
    """An Ethereum node, or something that stands for one. All methods raise `Transient`.

    Where a quorum would go: a `QuorumNode` over 2 of 3 endpoints of different operators stands beside `FailoverNode`, and
    its users do not notice. `head` and `header` then answer what k endpoints agree on (keccak(rlp(header)) computed here);
    `call(..., block_hash)` reads storage with `eth_getProof` against that header's state root, and only slots it knows
    (our contract's session words); `logs` and `log_pages` stay hints of any one endpoint, as no proof shows that a log was
    *not* left out: that is why `chain_watch` holds the contract's state against the logs at every look. What one endpoint
    says against the others becomes `distrust`. Shape only; today one endpoint is asked at a time (docs/decisions.md).
    """

    async def chain_id(self) -> int:
        """EIP-155 chain id."""

    async def genesis_hash(self) -> BlockHash:
        """Hash of block 0: another one means another chain behind the same address."""

    async def head(self) -> Header:
        """The newest block the node has."""

    async def header(self, block: int | bytes | BlockTag) -> Header | None:
        """By height, hash or tag; None when the node has no such block (any more)."""

    async def logs(
        self, address: bytes, topics: Topics, from_block: int, to_block: int
    ) -> tuple[RawLog, ...]:
        """Matching logs of a short range, both ends included. For long ranges: `log_pages`."""

    def log_pages(
        self, address: bytes, topics: Topics, from_block: int, to_block: int
    ) -> AsyncIterator[LogPage]:
        """The same in pages as large as the node allows, so that the caller can keep its place and flat
        memory.
        """

    async def logs_at(self, block_hash: bytes, address: bytes, topics: Topics) -> tuple[RawLog, ...]:
        """Matching logs of exactly this block."""

    async def call(
        self,
        to: bytes,
        data: bytes,
        block_hash: bytes | None = None,
        from_: bytes | None = None,
        *,
        value_wei: int = 0,
    ) -> bytes:
        """Return data of a call on the state after that block (None: the newest). Raises `Reverted`."""

    async def code(self, address: bytes) -> bytes:
        """Runtime code at the newest block; empty where there is no contract."""

    async def balance(self, address: bytes) -> int:
        """Wei at the newest block."""

    async def nonce(self, address: bytes, *, pending: bool = False) -> int:
        """Next nonce after the newest block; with `pending` after what waits in the node's pool too."""

    async def fees(self) -> FeeSuggestion:
        """What a transaction costs just now."""

    async def estimate_gas(self, from_: bytes, to: bytes | None, data: bytes, value_wei: int = 0) -> int:
        """Gas that such a transaction needs. Raises `Reverted`, Refused("unfunded")."""

    async def send_raw(self, raw_tx: bytes) -> TxHash:
        """Broadcast; safe to repeat with the same bytes. Raises `Refused` with one of `SEND_REFUSALS`."""

    async def receipt(self, tx_hash: bytes) -> Receipt | None:
        """None while it is not in a block."""

    def watch(self, address: bytes, topics: Topics) -> AbstractAsyncContextManager[AsyncIterator[Hint]]:
        """Hints about new heads and matching logs, from the moment the context is entered."""

    def distrust(self, lie: str, **facts: str | int) -> None:
        """What was answered contradicts itself, the contract or the chain: name who said it, and ask somebody else from now
        on. `lie` is the stable name for the log, `facts` go with it.
        """

    async def close(self) -> None:
        """Give the connections back. Never raises."""


# How nodes word their refusal of a transaction (geth and reth, nethermind, erigon, besu, anvil), by our name for it. The order
# matters: "replacement transaction underpriced" is also "underpriced". tests/agent/chain/test_refusals.py has their sentences.
SEND_REFUSALS: dict[str, tuple[str, ...]] = {
    "already_known": (
        "already known",
        "already imported",
        "alreadyknown",
        "known transaction",
        "already exists",
        "with same hash",
    ),
    "nonce_too_low": ("nonce too low", "nonce is too low", "oldnonce", "nonce_too_low", "old nonce"),
    "nonce_too_high": (
        "nonce too high",
        "nonce gap",
        "too distant",
        "noncegap",
        "far in future",
        "farinfuture",
        "replace pending",
        "with a lower nonce",
    ),
    "replacement_underpriced": ("replacement", "could not replace", "to replace existing"),
    "underpriced": (
        "underpriced",
        "less than block base fee",
        "feetoolow",
        "fee too low",
        "gas price below",
        "fee below minimum",
    ),
    "unfunded": ("insufficient funds", "insufficient balance", "insufficientfunds", "upfront cost exceeds"),
    "gas_limit": (
        "intrinsic gas",
        "intrinsicgas",
        "block gas limit",
        "transaction gas limit",
        "gas limit too",
        "gas limit is too",
        "gas limit reached",
        "gaslimitexceeded",
        "out of gas",
        "floor data gas",
    ),
    "fee_cap_of_node": ("exceeds the configured cap", "fee cap exceeded"),
    "wrong_chain": ("invalid chain id", "invalid sender", "wrong chain", "chainid", "another chain"),
    "pool_full": (
        "pool is full",
        "pool limit",
        "account limit exceeded",
        "transaction limit reached",
        "spammer",
    ),
}


class Web3Node:
    """A node behind `url`: ws:// or wss:// for everything, or with `url_requests` (http:// or https://) for
    all but the subscription. A plain http(s) `url` serves requests only: command lines need no more.

    Opens connections when they are first needed, again after they ended, and never by itself in the
    background.
    """

    def __init__(self, url: str, url_requests: str = "", *, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._url_watch = url if urlsplit(url).scheme in ("ws", "wss") else ""
        self._url = url_requests or url
        self._wire = _wire(self._url, self.limits)
        if self._url_watch:
            import agent.chain.websocket  # noqa: F401 - half a second of web3: now, not while a contactor waits
        self._places = asyncio.Semaphore(self.limits.requests_at_once)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Give the connections back."""
        await self._wire.close()

    def distrust(self, lie: str, **facts: str | int) -> None:
        """Nobody else is here to be asked; `FailoverNode` knows names, and has a log."""

    # ---- which chain, which block

    async def chain_id(self) -> int:
        """EIP-155 chain id."""
        return await self._ask("eth_chainId", [], read_quantity)

    async def genesis_hash(self) -> BlockHash:
        """Hash of block 0."""
        genesis = await self.header(0)
        if genesis is None:
            raise nonsense(self._url, "it has no block 0")
        return genesis.block_hash

    async def head(self) -> Header:
        """The newest block."""
        head = await self.header("latest")
        if head is None:
            raise nonsense(self._url, "it has no newest block")
        return head

    async def header(self, block: int | bytes | BlockTag) -> Header | None:
        """By height, hash or tag."""
        if isinstance(block, bytes):
            return await self._ask("eth_getBlockByHash", [hex0x(block), False], _optional(_header))
        tag = block if isinstance(block, str) else hex(block)
        return await self._ask("eth_getBlockByNumber", [tag, False], _optional(_header))

    # ---- logs

    async def logs(
        self, address: bytes, topics: Topics, from_block: int, to_block: int
    ) -> tuple[RawLog, ...]:
        """Matching logs of a short range."""
        found: list[RawLog] = []
        async for page in self.log_pages(address, topics, from_block, to_block):
            found.extend(page.logs)
            if len(found) > self.limits.logs_per_page:
                raise AnswerTooLarge(f"more than {self.limits.logs_per_page} logs; read them in pages")
        return tuple(found)

    async def log_pages(
        self, address: bytes, topics: Topics, from_block: int, to_block: int
    ) -> AsyncIterator[LogPage]:
        """Pages as large as the node allows: halved when it refuses or is slow, doubled while it does not."""
        pace = _Pace(self.limits.range_blocks_start, self.limits.range_blocks_max)
        first = from_block
        while first <= to_block:
            last = min(to_block, first + pace.blocks - 1)
            place = {"fromBlock": hex(first), "toBlock": hex(last)}
            try:
                logs = await self._logs(address, topics, place)
            except (SlowAnswer, AnswerTooLarge, _RangeRefused) as refusal:
                pace.refused(last - first + 1, refusal)
                continue
            if any(not first <= log.block_number <= last for log in logs):
                raise nonsense(self._url, "logs from outside the range")
            pace.went_well()
            yield LogPage(first, last, logs)
            first = last + 1

    async def logs_at(self, block_hash: bytes, address: bytes, topics: Topics) -> tuple[RawLog, ...]:
        """Matching logs of exactly this block."""
        return await self._logs(address, topics, {"blockHash": hex0x(block_hash)})

    async def _logs(self, address: bytes, topics: Topics, place: dict[str, str]) -> tuple[RawLog, ...]:
        query = {**_filter(address, topics), **place}
        try:
            found = await self._ask("eth_getLogs", [query], _list_of(_log))
        except _NodeSaysNo as no:
            if "blockHash" not in place and _is_range_refusal(no.error):
                raise _RangeRefused(no.message) from no
            raise
        if any(log.address != address for log in found):
            raise nonsense(self._url, "logs of another contract")
        return tuple(sorted(found, key=lambda log: (log.block_number, log.log_index)))

    # ---- state

    async def call(
        self,
        to: bytes,
        data: bytes,
        block_hash: bytes | None = None,
        from_: bytes | None = None,
        *,
        value_wei: int = 0,
    ) -> bytes:
        """A call on the state after that block (EIP-1898: refused unless it is canonical)."""
        message = {"to": hex0x(to), "data": hex0x(data)}
        if from_ is not None:
            message["from"] = hex0x(from_)
        if value_wei:
            message["value"] = hex(value_wei)
        block: Json = "latest"
        if block_hash is not None:
            block = {"blockHash": hex0x(block_hash), "requireCanonical": True}
        return await self._ask("eth_call", [message, block], read_data, reverts=True)

    async def code(self, address: bytes) -> bytes:
        """Runtime code."""
        return await self._ask("eth_getCode", [hex0x(address), "latest"], read_data)

    async def balance(self, address: bytes) -> int:
        """Wei."""
        return await self._ask("eth_getBalance", [hex0x(address), "latest"], read_quantity)

    async def nonce(self, address: bytes, *, pending: bool = False) -> int:
        """Next nonce."""
        return await self._ask(
            "eth_getTransactionCount", [hex0x(address), "pending" if pending else "latest"], read_quantity
        )

    # ---- transactions

    async def fees(self) -> FeeSuggestion:
        """Base fee of the newest block, and a tip."""
        base_fee_wei = await self._ask("eth_getBlockByNumber", ["latest", False], _base_fee)
        if base_fee_wei is None:
            raise Misconfigured(
                f"the chain behind {shown(self._url)} has no EIP-1559 fees",
                remedy="Use a chain with London rules.",
            )
        try:
            tip_wei = await self._ask("eth_maxPriorityFeePerGas", [], read_quantity)
        except _NodeSaysNo as no:
            if no.error.code != METHOD_NOT_FOUND:
                raise
            tip_wei = TIP_FALLBACK_WEI
        return FeeSuggestion(base_fee_wei, tip_wei)

    async def estimate_gas(self, from_: bytes, to: bytes | None, data: bytes, value_wei: int = 0) -> int:
        """Gas for such a transaction."""
        message = {"from": hex0x(from_), "data": hex0x(data), "value": hex(value_wei)}
        if to is not None:
            message["to"] = hex0x(to)
        try:
            return await self._ask("eth_estimateGas", [message], read_quantity, reverts=True)
        except _NodeSaysNo as no:
            if _send_refusal(no.error) == "unfunded":
                raise Refused("unfunded", no.error.message) from no
            raise

    async def send_raw(self, raw_tx: bytes) -> TxHash:
        """Broadcast. Bytes the node already has, waiting or mined, count as sent."""
        tx_hash = tx_hash_of(raw_tx)
        try:
            answered = await self._ask("eth_sendRawTransaction", [hex0x(raw_tx)], _hash)
        except _NodeSaysNo as no:
            reason = _send_refusal(no.error)
            if reason == "already_known":
                return tx_hash
            if reason == "nonce_too_low" and await self.receipt(tx_hash) is not None:
                return tx_hash  # it was mined before we asked again
            if reason == "pool_full":
                raise Transient(
                    f"the Ethereum node at {shown(self._url)} has no room for transactions"
                ) from no
            raise Refused(reason, no.error.message) from no
        if answered != tx_hash:
            raise nonsense(self._url, "it sent another transaction than ours")
        return tx_hash

    async def receipt(self, tx_hash: bytes) -> Receipt | None:
        """None while it is not in a block."""
        return await self._ask("eth_getTransactionReceipt", [hex0x(tx_hash)], _optional(_receipt))

    # ---- hints

    @asynccontextmanager
    async def watch(self, address: bytes, topics: Topics) -> AsyncIterator[AsyncIterator[Hint]]:
        """Subscribed when entered; so whoever asks for logs after that misses nothing."""
        if not self._url_watch:
            raise Misconfigured(
                f"{shown(self._url)} cannot be watched",
                remedy="Give the node's WebSocket address: ws://... or wss://...",
            )
        from agent.chain.websocket import WebSocketWire

        hints = _HintQueue(self.limits.hints)
        wire = WebSocketWire(self._url_watch, self.limits, hints.push)
        try:
            ended = await wire.open()
            for subscription in (["newHeads"], ["logs", _filter(address, topics)]):
                try:
                    await wire.request("eth_subscribe", subscription)
                except RpcError as error:
                    raise _NodeSaysNo("eth_subscribe", error, self._url_watch) from error
            ended.add_done_callback(lambda _ended: hints.wake())
            yield self._hints(hints, ended, await self.head())
        finally:
            await wire.close()

    async def _hints(
        self, hints: _HintQueue, ended: asyncio.Future[Transient], newest: Header
    ) -> AsyncIterator[Hint]:
        while True:
            hint = await hints.next(self.limits.silence_s)
            if hint is not None:
                newest = hint if isinstance(hint, Header) else newest
                yield hint
            elif ended.done():
                raise ended.result()
            elif (await self.head()).number > newest.number + 1:  # one block may be on its way to us just now
                raise Transient(
                    f"the Ethereum node at {shown(self._url_watch)} has forgotten our subscription"
                )

    # ---- asking

    async def _ask(
        self, method: str, params: list[Json], read: Callable[[Json], Answer], *, reverts: bool = False
    ) -> Answer:
        """One request, its answer in our types. `reverts`: an error may be the contract's own no."""
        async with self._places:
            try:
                return read(await self._wire.request(method, params))
            except (Malformed, KeyError, TypeError) as problem:
                raise nonsense(self._url, f"{method}: {problem}") from problem
            except RpcError as error:
                revert_data = _revert_data(error) if reverts else None
                if revert_data is not None:
                    raise Reverted(revert_data) from error
                if _is_rationing(error):
                    raise rationed(self._url, str(error)) from error
                raise _NodeSaysNo(method, error, self._url) from error


async def check_deployment(node: Node, chain_id: int, contract: bytes, artefact: Artefact) -> None:
    """Before anything is energised: right chain, and our code at the contract's address. Raises
    `Misconfigured`.
    """
    there = await node.chain_id()
    if there != chain_id:
        raise Misconfigured(
            f"the node is on chain {there}, but the configuration says chain {chain_id}",
            remedy="Correct the chain id, or give the address of a node of that chain.",
        )
    code = await node.code(contract)
    if not code:
        raise Misconfigured(
            f"there is no contract at 0x{contract.hex()} on chain {chain_id}",
            remedy="Correct the contract's address; `v2v organisation deploy` prints it.",
        )
    if not artefact.matches_deployed(code):
        raise Misconfigured(
            f"the contract at 0x{contract.hex()} is not this version of V2VCharging",
            remedy="Correct the address, or use the release of v2v-agent that the market was deployed with.",
        )


class _NodeSaysNo(Transient):
    """A JSON-RPC error that means nothing special to us: asking again, or another node, may help."""

    def __init__(self, method: str, error: RpcError, url: str) -> None:
        super().__init__(
            f"the Ethereum node at {shown(url)} refuses {method} ({error})",
            remedy="If it stays so, use another node.",
        )
        self.error = error


class _RangeRefused(Transient):
    """The node refuses this many blocks, or this many logs, at once."""


class _Pace:
    """How many blocks to ask for at a time: halved when refused, doubled when not, held at what was refused
    before.
    """

    def __init__(self, start: int, most: int) -> None:
        self.blocks = start
        self._most = most
        self._ceiling = most
        self._calm = 0
        self._slow = 0

    def refused(self, blocks: int, refusal: Transient) -> None:
        """Ask for less from now on. Raises the refusal when less is not possible or does not help."""
        self._slow = self._slow + 1 if isinstance(refusal, SlowAnswer) else 0
        if blocks == 1 or self._slow >= MAX_SLOW_ANSWERS:
            raise refusal
        self.blocks = self._ceiling = blocks // 2
        self._calm = 0

    def went_well(self) -> None:
        """Ask for more, up to what was refused; after a calm while try beyond."""
        self._slow = 0
        self._calm += 1
        if self._calm >= CALM_PAGES_BEFORE_GROWTH:
            self._calm, self._ceiling = 0, min(self._most, self._ceiling * 2)
        self.blocks = min(self._ceiling, self.blocks * 2)


class _HintQueue:
    """Between a socket that must never wait and a caller that may be slow: bounded; overflow becomes one
    `CatchUp`.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._notifications: deque[Json] = deque()
        self._overflowed = False
        self._wake = asyncio.Event()

    def push(self, notification: Json) -> None:
        """Take a notification; never blocks, never fails."""
        if len(self._notifications) >= self._size:
            self._notifications.clear()
            self._overflowed = True
        if not self._overflowed:
            self._notifications.append(notification)
        self._wake.set()

    def wake(self) -> None:
        """Let the waiting caller look around."""
        self._wake.set()

    async def next(self, timeout_s: float) -> Hint | None:
        """The next hint; None after `timeout_s`, or when woken without one."""
        if not self._notifications and not self._overflowed:
            self._wake.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._wake.wait()
            except TimeoutError:
                return None
        if self._overflowed:
            self._overflowed = False
            return CatchUp()
        return _hint(self._notifications.popleft()) if self._notifications else None


def _wire(url: str, limits: Limits) -> Wire:
    if urlsplit(url).scheme in ("ws", "wss"):
        from agent.chain.websocket import WebSocketWire

        return WebSocketWire(url, limits)
    return HttpWire(url, limits)


# ---- questions and answers


def _filter(address: bytes, topics: Topics) -> dict[str, Json]:
    def place(topic: bytes | Sequence[bytes] | None) -> Json:
        if topic is None:
            return None
        return hex0x(topic) if isinstance(topic, bytes) else [hex0x(one) for one in topic]

    return {"address": hex0x(address), "topics": [place(topic) for topic in topics]}


def _optional(read: Callable[[Json], Answer]) -> Callable[[Json], Answer | None]:
    return lambda value: None if value is None else read(value)


def _list_of(read: Callable[[Json], Answer]) -> Callable[[Json], list[Answer]]:
    def read_list(value: Json) -> list[Answer]:
        if not isinstance(value, list):
            raise Malformed("not a list")
        return [read(one) for one in value]

    return read_list


def _hash(value: Json) -> bytes:
    return read_data(value, 32)


def _header(value: Json) -> Header:
    return Header(
        number=read_quantity(value["number"]),
        block_hash=BlockHash(_hash(value["hash"])),
        parent_hash=BlockHash(_hash(value["parentHash"])),
        timestamp_s=read_quantity(value["timestamp"]),
    )


def _base_fee(value: Json) -> int | None:
    fee = value.get("baseFeePerGas") if isinstance(value, dict) else None
    return None if fee is None else read_quantity(fee)


def _log(value: Json) -> RawLog:
    return RawLog(
        address=Address(read_data(value["address"], 20)),
        topics=tuple(_list_of(_hash)(value["topics"])),
        data=read_data(value["data"]),
        block_number=read_quantity(value["blockNumber"]),
        block_hash=BlockHash(_hash(value["blockHash"])),
        tx_hash=TxHash(_hash(value["transactionHash"])),
        log_index=read_quantity(value["logIndex"]),
    )


def _receipt(value: Json) -> Receipt:
    created = value.get("contractAddress")
    return Receipt(
        tx_hash=TxHash(_hash(value["transactionHash"])),
        succeeded=read_quantity(value["status"]) == 1,
        block_number=read_quantity(value["blockNumber"]),
        block_hash=BlockHash(_hash(value["blockHash"])),
        gas_used=read_quantity(value["gasUsed"]),
        effective_gas_price_wei=read_quantity(value.get("effectiveGasPrice", "0x0")),
        contract=None if created is None else Address(read_data(created, 20)),
        logs=tuple(_list_of(_log)(value["logs"])),
    )


def _hint(notification: Json) -> Hint:
    """A notification carries a header or a log; whatever else it is, looking at the chain is the right
    answer to it.
    """
    try:
        result = notification["params"]["result"]
        if "topics" not in result:
            return _header(result)
        return CatchUp() if result.get("removed") else _log(result)
    except (Malformed, KeyError, TypeError, AttributeError):
        return CatchUp()


# ---- what a node's no means


def _is_range_refusal(error: RpcError) -> bool:
    """Nodes have no common code for it; these words are what they do have in common."""
    words = ("range", "too many", "more than", "limit", "exceed", "too large", "timeout", "timed out", "size")
    return any(word in error.message.lower() for word in words)


def _is_rationing(error: RpcError) -> bool:
    """It is how often we ask, not how much: fewer blocks at a time would only mean more requests."""
    words = (
        "rate limit",
        "request count",
        "per second",
        "rate exceeded",
        "too many requests",
        "capacity",
        "throttl",
    )
    return error.code == RATIONED or any(word in error.message.lower() for word in words)


def _revert_data(error: RpcError) -> bytes | None:
    """Revert data, wherever the node put it: geth and anvil say code 3, others only words. None: not a
    revert.
    """
    if error.code != 3 and "revert" not in error.message.lower():
        return None
    found = error.data.get("data") if isinstance(error.data, dict) else error.data
    text = found.rpartition(" ")[2] if isinstance(found, str) else "0x"  # some write "Reverted 0x..."
    try:
        return read_data(text)
    except Malformed:
        return b""


def _send_refusal(error: RpcError) -> str:
    message = error.message.lower()
    for reason, phrases in SEND_REFUSALS.items():
        if any(phrase in message for phrase in phrases):
            return reason
    return "send_rejected"


def tx_hash_of(raw_tx: bytes) -> TxHash:
    """The hash under which the chain will know a signed transaction."""
    from eth_utils.crypto import keccak

    return TxHash(keccak(raw_tx))
