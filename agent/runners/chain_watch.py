"""Believed chain facts become events. Events are hints; state is truth (PROTOCOL section 7).

Rules
* Hints (heads, logs) only say "look"; every look reads the same range of logs and the same headers, so nothing is missed when a
  hint is, and nothing happens twice because events that change nothing are not written.
* Every block's logs are read in two looks at least before the cursor passes it: one backend of a hosted node that lags behind
  the others leaves logs out without a word. A catch-up that breaks off goes on where it was, and holds one page at a time.
* Seen -> `ConnectedSeen`, nothing owed. `confirmations` deep, canonical and the contract's state agrees -> `ConnectedBelieved`.
  Final -> `ConnectedFinal`. Another block in its place -> `ConnectedOrphaned`; a node that does not have that height yet has
  no say. `ConnectionEnded` is believed when it is final.
* A close that the contract's state shows and the logs do not is a lie by omission: what the state says is done, whoever hid it
  is named and left, and what it served is no view.
* The newest header goes to Live only after the logs up to it were accepted: a fresh view means nothing was overlooked.

May not know: the charger, the door, transactions; how many nodes there are.
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
from agent.chain.rpc import Rationed
from agent.core import events as ev
from agent.core.events import Terms
from agent.core.live import HeaderSeen
from agent.core.session import CLOSED, STOPPABLE, Session, Stage
from agent.core.token import Domain
from agent.core.units import Address, BlockHash, short
from agent.engine import Engine
from agent.errors import Misconfigured, Transient

BACKOFF_S = (0.2, 10.0)  # first and longest wait for a lost node: a restart takes seconds, a tunnel minutes
LOOK_EVERY_S = 5.0  # without any hint: a subscription can be silently dead
OVERLAP_BLOCKS = 16  # read again with every look, so that a reorg this deep needs no special path
SCAN_ROW_EVERY_BLOCKS = 64  # when the cursor is worth a journal row; a restart reads a little twice
FORGOTTEN_MAX = (
    1024  # connects remembered as over before they were believed; a lying node may invent any number
)
PENDING_MANY = (
    48  # of the book's 64: then belief does not wait for the last page, or the book would drop some
)
TIMESTAMP_S_MAX = 2**40  # year 36812: a node that says more would overflow the journal
WAIT_S_MAX = 120.0  # a node that asks for more patience (`Retry-After`) is asked again all the same

Place = tuple[BlockHash, int]  # where a log stands: its block's hash and its index there

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
        self._over: dict[
            Place, Header
        ] = {}  # pending connects that are over already, and the head that showed it
        self._forgotten: dict[Place, None] = {}  # those that stayed so, oldest first
        self._looked: Header | None = None  # the newest head whose look went through
        self._cursor_held = False  # the cursor is on the chain that ends at `_looked`
        self._unread: int | None = None  # where a catch-up that broke off goes on

    async def run(self) -> None:
        """For ever: subscribe, then look at every hint. Any end of the subscription is a reason to do it again."""
        wait_s, asked_s = BACKOFF_S[0], 0.0
        while True:
            began_s = self._monotonic_s()
            try:
                await self._follow()
            except Transient as error:
                log.warning("chain.lost", error=error.message)
                asked_s = min(error.after_s, WAIT_S_MAX) if isinstance(error, Rationed) else 0.0
            if self._monotonic_s() - began_s > BACKOFF_S[1]:
                wait_s = BACKOFF_S[0]  # it had worked for a while: a new trouble, not the old one
            jitter = random.uniform(0.5, 1.5)  # noqa: S311 - so that a fleet does not return at once
            await asyncio.sleep(max(asked_s, wait_s * jitter))
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
            raise self._distrust("chain.impossible_time", block=head.number, dated=head.timestamp_s)
        on_chain = await self._read(head)
        await self._believe(head)
        self._note_scanned(head, on_chain)
        self._looked = head
        self._engine.observe(HeaderSeen(head.number, head.block_hash, head.timestamp_s))

    def _distrust(self, lie: str, **facts: str | int) -> Transient:
        """Whoever said this is named and left; the error that ends this look."""
        self._node.distrust(lie, **facts)
        return Transient(
            f"the node contradicts itself or the contract ({lie})",
            remedy="The log names it. If it happens again, use another node.",
        )

    # ---- logs

    async def _read(self, head: Header) -> bool:
        """Take every log up to the head, a page at a time. Returns whether the cursor is still (or may be) on the chain."""
        on_chain = await self._is_cursor_on_chain(head)
        pages = self._node.log_pages(
            self._domain.contract,
            contract.provider_topics(self._provider),
            self._first_block(head, on_chain),
            head.number,
        )
        async for page in pages:
            for raw in page.logs:
                await self._take(head, raw)
                if len(self._engine.book.pending) >= PENDING_MANY:
                    await self._believe_all_pending(head)
            self._unread = page.to_block + 1
        self._unread = None
        return on_chain

    async def _is_cursor_on_chain(self, head: Header) -> bool:
        """A head that follows the one of the last look is on the chain that the cursor was found on then."""
        book, looked = self._engine.book, self._looked
        follows = looked is not None and head.parent_hash == looked.block_hash
        if book.scanned_number < 0 or (follows and self._cursor_held):
            return True
        return await self._is_canonical(head, book.scanned_number, book.scanned_hash) is not False

    def _first_block(self, head: Header, on_chain: bool) -> int:
        """Where to read from: a little before the cursor, or everything when the cursor is on a chain that is no more."""
        book, start = self._engine.book, self._settings.start_block
        unread = book.scanned_number if self._unread is None else self._unread
        if unread < 0 or (not on_chain and self._unread is None):
            return start
        return max(start, min(unread, head.number) - OVERLAP_BLOCKS)

    async def _take(self, head: Header, raw: RawLog) -> None:
        entry = contract.decode_log(raw.address, raw.topics, raw.data)
        match entry:
            case contract.SessionOpened() if entry.provider == self._provider:
                await self._take_opened(head, raw, entry)
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

    async def _take_opened(self, head: Header, raw: RawLog, entry: contract.SessionOpened) -> None:
        known = self._engine.book.sessions.get(entry.session_id)
        pending = self._engine.book.pending.get(entry.session_id)
        if (known is not None and known.terms.block_hash == raw.block_hash) or (
            pending is not None and pending.block_hash == raw.block_hash
        ):
            return
        if (raw.block_hash, raw.log_index) in self._forgotten:
            return
        block = await self._header_at(head, raw.block_number)
        if block.block_hash != raw.block_hash:
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
            raise self._distrust("chain.forged_log", session=short(entry.session_id), block=raw.block_number)
        self._accept(ev.ConnectedSeen(self._engine.at_s or block.timestamp_s, terms))

    def _session_with(self, token: bytes) -> Session | None:
        for session in self._engine.book.sessions.values():
            if session.terms.token == token:
                return session
        return None

    # ---- belief

    async def _believe(self, head: Header) -> None:
        book = self._engine.book
        if not book.pending and not book.open_sessions():
            return
        final_number = await self._final_number(head)
        await self._believe_all_pending(head, final_number)
        for session in self._engine.book.open_sessions():
            await self._recheck(head, session, final_number)
        for session in self._engine.book.open_sessions():
            await self._require_no_hidden_close(head, session)

    async def _final_number(self, head: Header) -> int:
        if self._settings.finality != "finalized":
            return head.number - self._settings.finality + 1
        final = await self._node.header("finalized")
        return -1 if final is None else final.number

    def _is_deep(self, head: Header, number: int) -> bool:
        """The including block is its own first confirmation."""
        return head.number - number + 1 >= self._settings.confirmations

    async def _is_canonical(self, head: Header, number: int, block_hash: bytes) -> bool | None:
        """Is this block in the chain that ends at `head`? None: it is higher, so nobody can say."""
        if number > head.number:
            return None
        if (await self._header_at(head, number)).block_hash == block_hash:
            return True
        await self._check_chain()  # so much follows only from a block of our own chain
        return (await self._header_at(head, number)).block_hash == block_hash

    async def _header_at(self, head: Header, number: int) -> Header:
        """The block of this height in the chain that ends at `head`."""
        header = head if number == head.number else await self._node.header(number)
        if header is None:
            raise Transient(f"the node has no block {number}, below its own newest")
        return header

    async def _believe_all_pending(self, head: Header, final_number: int = -1) -> None:
        for terms in tuple(self._engine.book.pending.values()):
            canonical = await self._is_canonical(head, terms.block_number, terms.block_hash)
            if canonical is False:
                self._over.pop((terms.block_hash, terms.log_index), None)
                self._accept(ev.ConnectedOrphaned(self._engine.at_s, terms.session_id, terms.block_hash))
            elif canonical and self._is_deep(head, terms.block_number):
                await self._believe_state(head, terms, final_number)

    async def _state(self, head: Header, terms: Terms) -> contract.SessionState:
        data = await self._node.call(
            self._domain.contract, contract.encode_sessions(terms.token), block_hash=head.block_hash
        )
        return contract.decode_sessions(data)

    async def _believe_state(self, head: Header, terms: Terms, final_number: int) -> None:
        """The contract's own storage must say the same as its logs; a node that only fakes logs fails here."""
        place, state = (terms.block_hash, terms.log_index), await self._state(head, terms)
        if not state.is_open:  # ended before we believed it (or never there): nothing is owed
            if terms.valid_until_s <= head.timestamp_s or await self._is_over_for_good(
                head, place, final_number
            ):
                log.info("chain.over_before_believed", session=short(terms.session_id))
                self._forget(place, terms)
            return
        self._over.pop(place, None)
        if not self._agrees(state, terms):
            raise self._distrust(
                "chain.forged_log", session=short(terms.session_id), block=terms.block_number
            )
        self._accept(ev.ConnectedBelieved(self._engine.at_s, terms.session_id, terms.block_hash))
        self._take_closing(terms, state)  # its log came before there was a session to tell

    async def _is_over_for_good(self, head: Header, place: Place, final_number: int) -> bool:
        """A reorganisation could undo an end that is not final, and the session would be there again."""
        since = self._over.setdefault(place, head)
        if since.number > final_number:
            return False
        if await self._is_canonical(head, since.number, since.block_hash):
            return True
        self._over[place] = head  # what showed it is gone: count from here
        return False

    def _forget(self, place: Place, terms: Terms) -> None:
        if len(self._forgotten) >= FORGOTTEN_MAX:
            del self._forgotten[next(iter(self._forgotten))]
        self._forgotten[place] = None
        self._over.pop(place, None)
        self._accept(ev.ConnectedOrphaned(self._engine.at_s, terms.session_id, terms.block_hash))

    def _take_closing(self, terms: Terms, state: contract.SessionState) -> bool:
        if state.status is not contract.SessionStatus.CLOSING:
            return False
        return self._engine.accept(
            ev.ConnectionClosingSeen(self._engine.at_s, terms.session_id, state.claimed_wh, state.settle_at_s)
        )

    async def _require_no_hidden_close(self, head: Header, session: Session) -> None:
        """The logs are read; where the state shows a close that they do not, somebody left it out."""
        if session.stage not in STOPPABLE or session.closing_at_s is not None or session.ended is not None:
            return
        if session.terms.block_number > head.number:
            return  # seen from a backend that is behind, it has not begun
        state = await self._state(head, session.terms)
        if state.is_open and not self._take_closing(session.terms, state):
            return
        self._unread = session.terms.block_number  # read again, by whoever is asked next, from its beginning
        raise self._distrust("chain.hidden_close", session=short(session.session_id), block=head.number)

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
            canonical = await self._is_canonical(head, terms.block_number, terms.block_hash)
            if canonical is False:
                self._accept(ev.ConnectedOrphaned(self._engine.at_s, terms.session_id, terms.block_hash))
                return
            if canonical and terms.block_number <= final_number:
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

    def _note_scanned(self, head: Header, on_chain: bool) -> None:
        """The cursor goes to the head of the look before, so that whatever this look read for the first time is read again.
        It becomes a row only now and then; it may lag, because every look reads on from it.
        """
        scanned, book = self._looked, self._engine.book
        self._cursor_held = on_chain
        if scanned is None:
            return
        far = abs(scanned.number - book.scanned_number) >= SCAN_ROW_EVERY_BLOCKS
        if far or book.scanned_number < 0 or not on_chain:
            self._accept(ev.BlocksScanned(self._engine.at_s, scanned.number, scanned.block_hash))
            self._cursor_held = head.parent_hash == scanned.block_hash

    def _accept(self, event: ev.Event) -> None:
        self._engine.accept(event)


async def _next_of(hints: AsyncIterator[Hint]) -> Hint:
    """The next hint. A watch never ends quietly: its end raises Transient."""
    try:
        return await anext(hints)
    except StopAsyncIteration as end:
        raise Transient("the subscription ended") from end
