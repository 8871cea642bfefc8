"""Several nodes as one: asks the preferred one, and the next when it does not answer, stands still or lies.

Rules
* Sticky: whoever answers is asked again; nobody goes back to the preferred node before this one fails. Flapping between two
  views of the chain is worse than a slower one.
* A node is asked nothing before it has named our chain id and the genesis hash that the first one named: another chain behind
  one address is that node's fault, said loudly, and only when no node is left the owner's (`Misconfigured`).
* A node that is behind is never asked for logs it cannot have: their absence would look like silence.
* A head that stands still, or falls back, while another node's does not is left (PROTOCOL section 7: a node that lies by
  omission or delay).
* Every lie is told with the endpoint's name, which holds no secrets, and under one stable event name:
  `chain.other_chain` names another chain id or another beginning · `chain.standstill` · `chain.old_head` far below what was
  seen · `chain.slow_answer` beyond the time-out, byte by byte included · `chain.huge_answer` · `chain.nonsense` has not the
  form of an answer · and what only `chain_watch` can see, by `distrust`: `chain.hidden_close`, `chain.forged_log`,
  `chain.impossible_time`. Leaving a node for any reason is `chain.failover`.
* What the contract or the node refuses by name (`Refused`, `Reverted`) is an answer, not a failure.

May not know: the contract, sessions, how a node is asked (node.py), where it is logged that one was left.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from agent.chain.node import FeeSuggestion, Header, Hint, LogPage, Node, RawLog, Receipt, Topics
from agent.chain.rpc import Suspicious
from agent.core.units import BlockHash, TxHash, hex0x
from agent.errors import Misconfigured, Transient

Answer = TypeVar("Answer")


class Told(Protocol):
    """Who hears why a node was left."""

    def __call__(self, event: str, **facts: str | int) -> object:
        """`event` as the log names it."""


# Without a new head for so long the others are asked too: half of what a delivery may be blind (max_view_age_s), so that
# changing to a node that still sees the chain costs no pause.
STANDSTILL_S = 25.0
OLD_HEAD_BLOCKS = (
    8  # backends of one hosted node differ by a few blocks; a head this far below the newest is no such lag
)


@dataclass(slots=True)
class Endpoint:
    """One node and what we know of it. `name` is safe to show."""

    name: str
    node: Node
    can_watch: bool = True
    is_checked: bool = False  # it has named our chain since we last came to it
    head_number: int = -1  # the newest it has shown us
    other_chain: str = field(default="", repr=False)  # how it was refused, "" while it was not
    is_old: bool = False  # its head was far below the newest, and that was said


class FailoverNode:
    """The Node port over 1 to 4 endpoints: also a single one lies under its name."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        chain_id: int,
        monotonic_s: Callable[[], float],
        told: Told = lambda event, **facts: None,  # noqa: ARG005 - for logs
    ) -> None:
        assert any(endpoint.can_watch for endpoint in endpoints)
        names = [endpoint.name for endpoint in endpoints]
        for place, endpoint in enumerate(endpoints, 1):
            if (
                names.count(endpoint.name) > 1
            ):  # two keys at one provider: what tells them apart is not for a log
                endpoint.name += f" ({place})"
        self._endpoints, self._chain_id = list(endpoints), chain_id
        self._monotonic_s, self._told = monotonic_s, told
        self._watchable = [endpoint for endpoint in endpoints if endpoint.can_watch]
        self._asked, self._watched = 0, 0  # whose turn it is
        self._genesis: BlockHash | None = None
        self._best_number, self._best_at_s = -1, monotonic_s()

    async def close(self) -> None:
        """Give every connection back."""
        for endpoint in self._endpoints:
            await endpoint.node.close()

    # ---- which one

    async def _ask(self, question: Callable[[Node], Awaitable[Answer]]) -> Answer:
        """The first answer, beginning with the node whose turn it is. Raises the last node's Transient."""
        trouble: Transient | None = None
        for _ in self._endpoints:
            endpoint = self._endpoints[self._asked]
            try:
                await self._require_our_chain(endpoint)
                return await question(endpoint.node)
            except Transient as error:
                trouble = error
                self._leave(endpoint, error)
        self._raise_if_all_serve_another_chain()
        assert trouble is not None
        raise trouble

    def _leave(self, endpoint: Endpoint, why: Transient) -> None:
        """The next one's turn, unless somebody else has already moved on from this one."""
        if self._endpoints[self._asked] is not endpoint:
            return
        if isinstance(why, Suspicious):
            self._told(why.lie, node=endpoint.name, error=why.message)
        endpoint.is_checked = False
        if len(self._endpoints) > 1:
            self._asked = (self._asked + 1) % len(self._endpoints)
            self._told(
                "chain.failover", left=endpoint.name, to=self._endpoints[self._asked].name, error=why.message
            )

    def distrust(self, lie: str, **facts: str | int) -> None:
        """Say who said it, and leave it."""
        endpoint = self._endpoints[self._asked]
        self._told(lie, node=endpoint.name, **facts)
        self._leave(endpoint, Transient(f"it is not believed ({lie})"))

    async def _require_our_chain(self, endpoint: Endpoint) -> None:
        """Raises Transient when it serves another chain: the next node may serve ours."""
        if endpoint.is_checked:
            return
        chain_id, genesis = await endpoint.node.chain_id(), await endpoint.node.genesis_hash()
        wrong = ""
        if chain_id != self._chain_id:
            wrong = f"chain {chain_id}, not {self._chain_id}"
        elif self._genesis not in (None, genesis):
            wrong = f"a chain with another beginning ({hex0x(genesis)})"
        endpoint.other_chain = wrong
        if wrong:
            self._told("chain.other_chain", node=endpoint.name, serves=wrong)
            raise Transient(f"the node at {endpoint.name} serves {wrong}")
        self._genesis, endpoint.is_checked = genesis, True

    def _raise_if_all_serve_another_chain(self) -> None:
        if all(endpoint.other_chain for endpoint in self._endpoints):
            said = "; ".join(f"{endpoint.name} serves {endpoint.other_chain}" for endpoint in self._endpoints)
            raise Misconfigured(f"no node serves our chain: {said}", remedy="check [chain] urls and chain_id")

    # ---- which chain, which block

    async def chain_id(self) -> int:
        """Ours, asked anew: a node behind whose address another chain has appeared is left, not believed."""
        for endpoint in self._endpoints:
            endpoint.is_checked = False
        return await self._ask(lambda node: node.chain_id())

    async def genesis_hash(self) -> BlockHash:
        """Hash of block 0."""
        return await self._ask(lambda node: node.genesis_hash())

    async def head(self) -> Header:
        """The newest block of the node whose turn it is; of another one when this one's stands still or fell back."""
        head = await self._ask(lambda node: node.head())
        endpoint, now_s = self._endpoints[self._asked], self._monotonic_s()
        endpoint.head_number = head.number
        was_old, endpoint.is_old = endpoint.is_old, head.number < self._best_number - OLD_HEAD_BLOCKS
        if endpoint.is_old and not was_old:
            self._told("chain.old_head", node=endpoint.name, at=head.number, newest=self._best_number)
            head = await self._newest_of_all(head)
        elif head.number <= self._best_number and now_s - self._best_at_s > STANDSTILL_S:
            self._best_at_s = now_s  # ask the others again only after another standstill
            head = await self._newest_of_all(head)
        if head.number > self._best_number:
            self._best_number, self._best_at_s = head.number, now_s
        return head

    async def _newest_of_all(self, newest: Header) -> Header:
        """The newest head that anybody shows; whoever shows it has the turn."""
        for number, endpoint in enumerate(self._endpoints):
            if number == self._asked:
                continue
            try:
                await self._require_our_chain(endpoint)
                head = await endpoint.node.head()
            except Transient:
                continue  # it has no say now; its turn may come
            endpoint.head_number = head.number
            if head.number > newest.number:
                here = self._endpoints[self._asked]
                self._told(
                    "chain.standstill", left=here.name, to=endpoint.name, at=newest.number, newest=head.number
                )
                newest, self._asked = head, number
        return newest

    async def header(self, block: int | bytes | str) -> Header | None:
        """By height, hash or tag."""
        return await self._ask(lambda node: node.header(block))

    # ---- logs

    async def logs(
        self, address: bytes, topics: Topics, from_block: int, to_block: int
    ) -> tuple[RawLog, ...]:
        """Matching logs of a short range."""
        found: list[RawLog] = []
        async for page in self.log_pages(address, topics, from_block, to_block):
            found += page.logs
        return tuple(found)

    async def log_pages(
        self, address: bytes, topics: Topics, from_block: int, to_block: int
    ) -> AsyncIterator[LogPage]:
        """Pages; where one node breaks off, the next goes on."""
        first, tries = from_block, len(self._endpoints)
        while first <= to_block:
            endpoint = self._endpoints[self._asked]
            try:
                await self._require_our_chain(endpoint)
                await self._require_height(endpoint, to_block)
                async for page in endpoint.node.log_pages(address, topics, first, to_block):
                    yield page
                    first, tries = page.to_block + 1, len(self._endpoints)
            except Transient as error:
                self._leave(endpoint, error)
                tries -= 1
                if tries == 0:
                    raise

    async def _require_height(self, endpoint: Endpoint, block_number: int) -> None:
        if endpoint.head_number < block_number:
            endpoint.head_number = (await endpoint.node.head()).number
        if endpoint.head_number < block_number:
            raise Transient(
                f"the node at {endpoint.name} is at block {endpoint.head_number} and cannot know {block_number}"
            )

    async def logs_at(self, block_hash: bytes, address: bytes, topics: Topics) -> tuple[RawLog, ...]:
        """Matching logs of exactly this block."""
        return await self._ask(lambda node: node.logs_at(block_hash, address, topics))

    @asynccontextmanager
    async def watch(self, address: bytes, topics: Topics) -> AsyncIterator[AsyncIterator[Hint]]:
        """Hints from one node; when they end, the next watch is another node's."""
        endpoint = self._watchable[self._watched]
        try:
            await self._require_our_chain(endpoint)
            async with endpoint.node.watch(address, topics) as hints:
                yield hints
        except Transient:
            if self._watchable[self._watched] is endpoint:
                endpoint.is_checked = False
                self._watched = (self._watched + 1) % len(self._watchable)
            raise

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
        """Return data. A node that does not have this block is left for one that may."""
        return await self._ask(lambda node: node.call(to, data, block_hash, from_, value_wei=value_wei))

    async def code(self, address: bytes) -> bytes:
        """Runtime code."""
        return await self._ask(lambda node: node.code(address))

    async def balance(self, address: bytes) -> int:
        """Wei."""
        return await self._ask(lambda node: node.balance(address))

    async def nonce(self, address: bytes, *, pending: bool = False) -> int:
        """Next nonce."""
        return await self._ask(lambda node: node.nonce(address, pending=pending))

    # ---- transactions

    async def fees(self) -> FeeSuggestion:
        """What a transaction costs just now."""
        return await self._ask(lambda node: node.fees())

    async def estimate_gas(self, from_: bytes, to: bytes | None, data: bytes, value_wei: int = 0) -> int:
        """Gas that such a transaction needs."""
        return await self._ask(lambda node: node.estimate_gas(from_, to, data, value_wei))

    async def send_raw(self, raw_tx: bytes) -> TxHash:
        """Broadcast; the same bytes again through another node change nothing."""
        return await self._ask(lambda node: node.send_raw(raw_tx))

    async def receipt(self, tx_hash: bytes) -> Receipt | None:
        """None while it is not in a block."""
        return await self._ask(lambda node: node.receipt(tx_hash))
