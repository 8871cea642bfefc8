"""Believed chain facts become events. Events are hints; state is truth (PROTOCOL section 7).

Rules
* Hints (heads, logs) only say "look"; every look reads the same range of logs and the same headers, so nothing is missed when a
  hint is, and nothing happens twice because events that change nothing are not written.
* Seen -> `ConnectedSeen`, nothing owed. `confirmations` deep, canonical and the contract's state agrees -> `ConnectedBelieved`.
  Final -> `ConnectedFinal`. Not canonical any more -> `ConnectedOrphaned`. `ConnectionEnded` is believed when it is final.
* The newest header goes to Live only after the logs up to it were accepted: a fresh view means nothing was overlooked.

May not know: the charger, the door, transactions.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal

import structlog

from agent.chain import contract
from agent.chain.node import Header, Hint, Node, RawLog
from agent.core import events as ev
from agent.core.events import Terms
from agent.core.live import HeaderSeen
from agent.core.session import CLOSED, Session, Stage
from agent.core.token import Domain
from agent.core.units import Address, BlockHash, short
from agent.engine import Engine
from agent.errors import Misconfigured, Transient

BACKOFF_S = (0.2, 10.0)  # first and longest wait for a lost node: a restart takes seconds, a tunnel minutes
LOOK_EVERY_S = 5.0  # without any hint: a subscription can be silently dead
OVERLAP_BLOCKS = 16  # read again with every look, so that a reorg this deep needs no special path
REWIND_BLOCKS = 1024  # when the scanned block is no longer canonical; deeper reorgs start at `start_block`
SCAN_ROW_EVERY_BLOCKS = 64  # when the cursor is worth a journal row; a restart reads a little twice
TIMESTAMP_S_MAX = 2**40  # year 36812: a node that says more would overflow the journal

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class WatchSettings:
    """How deep is deep enough (config: [chain])."""

    start_block: int
    confirmations: int
    finality: Literal["finalized"] | int


class ChainWatch:
    """Follows the contract's logs for one provider."""

    def __init__(
        self,
        engine: Engine,
        node: Node,
        domain: Domain,
        provider: Address,
        settings: WatchSettings,
        monotonic_s: Callable[[], float],
    ) -> None:
        self._engine, self._node, self._domain, self._provider = engine, node, domain, provider
        self._settings = settings
        self._monotonic_s = monotonic_s
        self._ended_unbelieved: set[BlockHash] = set()  # connects that were over before we believed them

    async def run(self) -> None:
        """For ever: subscribe, then look at every hint. Any end of the subscription is a reason to do it again."""
        wait_s = BACKOFF_S[0]
        while True:
            began_s = self._monotonic_s()
            try:
                await self._follow()
            except Transient as error:
                log.warning("chain.lost", error=error.message)
            if self._monotonic_s() - began_s > BACKOFF_S[1]:
                wait_s = BACKOFF_S[0]  # it had worked for a while: a new trouble, not the old one
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.5))  # noqa: S311 - jitter, so that a fleet does not return at once
            wait_s = min(wait_s * 2, BACKOFF_S[1])

    async def _follow(self) -> None:
        topics = contract.provider_topics(self._provider)
        async with self._node.watch(self._domain.contract, topics) as hints:
            await self._check_chain()
            await self.look()
            await self._look_at_hints(hints)

    async def _look_at_hints(self, hints: AsyncIterator[Hint]) -> None:
        """Look at every hint, and now and then without one. The waiting is a task of its own: a time-out that cancelled
        it would end the subscription.
        """
        hint: asyncio.Task[Hint] | None = None
        try:
            while True:
                hint = hint or asyncio.create_task(_next_of(hints))
                done, _ = await asyncio.wait({hint}, timeout=LOOK_EVERY_S)
                if done:
                    hint.result()
                    hint = None
                await self.look()
        finally:
            if hint is not None:
                hint.cancel()
                await asyncio.wait({hint})

    async def _check_chain(self) -> None:
        chain_id = await self._node.chain_id()
        if chain_id != self._domain.chain_id:
            raise Misconfigured(
                f"the node now serves chain {chain_id}, not {self._domain.chain_id}",
                remedy="check [chain] urls: another chain answers behind the same address",
            )

    async def look(self) -> None:
        """One look: logs up to the newest head, then what became believed, final or orphaned."""
        head = await self._node.head()
        newest = self._engine.live.header
        if newest is not None and head.block_hash == newest.block_hash:
            return
        if head.timestamp_s > TIMESTAMP_S_MAX:
            raise Transient(f"the node's newest block is dated {head.timestamp_s}", remedy="use another node")
        for raw in await self._logs_up_to(head):
            await self._take(raw)
        await self._believe(head)
        self._note_scanned(head)
        self._engine.observe(HeaderSeen(head.number, head.block_hash, head.timestamp_s))

    # ---- logs

    async def _logs_up_to(self, head: Header) -> list[RawLog]:
        first = await self._first_block(head)
        found: list[RawLog] = []
        pages = self._node.log_pages(
            self._domain.contract, contract.provider_topics(self._provider), first, head.number
        )
        async for page in pages:
            found += page.logs
        return found

    async def _first_block(self, head: Header) -> int:
        """Where to read from: a little before the cursor, or far before it when the cursor's block is no longer canonical."""
        book, start = self._engine.book, self._settings.start_block
        if book.scanned_number < 0:
            return start
        scanned = await self._node.header(book.scanned_number)
        canonical = scanned is not None and scanned.block_hash == book.scanned_hash
        back = OVERLAP_BLOCKS if canonical else REWIND_BLOCKS
        return max(start, min(book.scanned_number, head.number) - back)

    async def _take(self, raw: RawLog) -> None:
        entry = contract.decode_log(raw.address, raw.topics, raw.data)
        match entry:
            case contract.SessionOpened() if entry.provider == self._provider:
                await self._take_opened(raw, entry)
            case contract.ConnectionClosing() if entry.provider == self._provider:
                session = self._session_with(entry.token)
                if session is not None:
                    self._accept(
                        ev.ConnectionClosingSeen(
                            self._engine.at_s, session.session_id, entry.claimed_wh, entry.close_at_s
                        )
                    )
            case contract.ConnectionEnded() if entry.provider == self._provider:
                session = self._session_with(entry.token)
                if session is not None and session.stage not in CLOSED:
                    self._accept(
                        ev.ConnectionEndedSeen(
                            self._engine.at_s,
                            session.session_id,
                            entry.delivered_wh,
                            entry.fee_wei,
                            raw.tx_hash,
                            raw.block_hash,
                        )
                    )

    async def _take_opened(self, raw: RawLog, entry: contract.SessionOpened) -> None:
        known = self._engine.book.sessions.get(entry.session_id)
        pending = self._engine.book.pending.get(entry.session_id)
        if (known is not None and known.terms.block_hash == raw.block_hash) or (
            pending is not None and pending.block_hash == raw.block_hash
        ):
            return
        if raw.block_hash in self._ended_unbelieved:
            return
        block = await self._node.header(raw.block_hash)
        if block is None:
            return  # reorged away between two questions: the next look finds what replaced it
        terms = Terms(
            session_id=entry.session_id,
            token=entry.token,
            consumer=entry.consumer,
            provider=entry.provider,
            auction_nonce=entry.auction_nonce,
            energy_wh_ordered=entry.energy_wh,
            rate_wei_per_kwh=entry.rate_wei_per_kwh,
            deposit_wei=entry.deposit_wei,
            bond_wei=entry.bond_wei,
            issued_at_s=block.timestamp_s,
            valid_until_s=entry.valid_until_s,
            block_number=raw.block_number,
            block_hash=raw.block_hash,
            log_index=raw.log_index,
            tx_hash=raw.tx_hash,
        )
        if not self._engine.book.is_genuine(terms):
            log.error("chain.not_genuine", session=short(entry.session_id), block=raw.block_number)
            return
        self._accept(ev.ConnectedSeen(self._engine.at_s or block.timestamp_s, terms))

    def _session_with(self, token: bytes) -> Session | None:
        for session in self._engine.book.sessions.values():
            if session.terms.token == token:
                return session
        return None

    # ---- belief

    async def _believe(self, head: Header) -> None:
        final_number = await self._final_number(head)
        for terms in tuple(self._engine.book.pending.values()):
            await self._believe_pending(head, terms)
        for session in self._engine.book.open_sessions():
            await self._recheck(head, session, final_number)

    async def _final_number(self, head: Header) -> int:
        if self._settings.finality != "finalized":
            return head.number - self._settings.finality + 1
        final = await self._node.header("finalized")
        return -1 if final is None else final.number

    def _is_deep(self, head: Header, number: int) -> bool:
        """The including block is its own first confirmation."""
        return head.number - number + 1 >= self._settings.confirmations

    async def _is_canonical(self, number: int, block_hash: bytes) -> bool:
        header = await self._node.header(number)
        return header is not None and header.block_hash == block_hash

    async def _believe_pending(self, head: Header, terms: Terms) -> None:
        if not await self._is_canonical(terms.block_number, terms.block_hash):
            self._accept(ev.ConnectedOrphaned(self._engine.at_s, terms.session_id, terms.block_hash))
        elif self._is_deep(head, terms.block_number):
            await self._believe_state(head, terms)

    async def _believe_state(self, head: Header, terms: Terms) -> None:
        """The contract's own storage must say the same as its logs; a node that only fakes logs fails here."""
        data = await self._node.call(
            self._domain.contract, contract.encode_sessions(terms.token), block_hash=head.block_hash
        )
        state = contract.decode_sessions(data)
        if not state.is_open:  # ended before we believed it (or never there): nothing is owed, forget it
            log.info("chain.over_before_believed", session=short(terms.session_id))
            self._ended_unbelieved.add(terms.block_hash)
            self._accept(ev.ConnectedOrphaned(self._engine.at_s, terms.session_id, terms.block_hash))
        elif self._agrees(state, terms):
            self._accept(ev.ConnectedBelieved(self._engine.at_s, terms.session_id, terms.block_hash))
        else:
            log.warning("chain.state_disagrees", session=short(terms.session_id), status=str(state.status))

    @staticmethod
    def _agrees(state: contract.SessionState, terms: Terms) -> bool:
        return (
            state.provider == terms.provider
            and state.consumer == terms.consumer
            and state.auction_nonce == terms.auction_nonce
            and state.energy_wh == terms.energy_wh_ordered
            and state.rate_wei_per_kwh == terms.rate_wei_per_kwh
        )

    async def _recheck(self, head: Header, session: Session, final_number: int) -> None:
        terms = session.terms
        if not session.final and session.stage is not Stage.ORPHANED:
            if not await self._is_canonical(terms.block_number, terms.block_hash):
                self._accept(ev.ConnectedOrphaned(self._engine.at_s, terms.session_id, terms.block_hash))
                return
            if terms.block_number <= final_number:
                self._accept(ev.ConnectedFinal(self._engine.at_s, terms.session_id, terms.block_hash))
        await self._recheck_ended(session, final_number)

    async def _recheck_ended(self, session: Session, final_number: int) -> None:
        """Only a final end closes the session: a reorganisation could undo one that is merely deep, and nobody would look."""
        ended = session.ended
        if ended is None:
            return
        receipt = await self._node.receipt(ended.tx_hash)
        if receipt is None or receipt.block_hash != ended.block_hash:
            self._accept(ev.ConnectionEndedOrphaned(self._engine.at_s, session.session_id, ended.block_hash))
        elif receipt.block_number <= final_number:
            self._accept(ev.ConnectionEndedBelieved(self._engine.at_s, session.session_id, ended.block_hash))

    def _note_scanned(self, head: Header) -> None:
        """The cursor becomes a row only now and then; it may lag, because every look reads an overlap."""
        book = self._engine.book
        if book.scanned_number < 0 or abs(head.number - book.scanned_number) >= SCAN_ROW_EVERY_BLOCKS:
            self._accept(ev.BlocksScanned(self._engine.at_s, head.number, head.block_hash))

    def _accept(self, event: ev.Event) -> None:
        self._engine.accept(event)


async def _next_of(hints: AsyncIterator[Hint]) -> Hint:
    """The next hint. A watch never ends quietly: its end raises Transient."""
    try:
        return await anext(hints)
    except StopAsyncIteration as end:
        raise Transient("the subscription ended") from end
