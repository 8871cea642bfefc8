"""The only writer. `accept(event)`: step, journal, swap, wake. `observe(update)`: set Live, then accept whatever is due.

Rules
* Both are synchronous: no await between decision, disk and memory. An assertion in `step` means the event never reaches the disk.
* Durable first, then visible, then wake the runners. Runners ask `owed()` at their own beat, so a missed wake-up heals itself.

May not know: runners, the charger, Ethereum, how events look on disk.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from agent.core import book as rules
from agent.core.book import Book
from agent.core.effects import Deliver, Effect
from agent.core.events import BidEnded, DeliveryBegan, Event, StopDecided, StopReason
from agent.core.live import Beat, Live, Policy, PortRead, TransactionTried, Update, moved, observe, offered
from agent.core.session import CLOSED, STOPPABLE
from agent.core.units import SessionId
from agent.journal import Journal

DUE_MAX = 256  # one update makes at most a few events due per session; more means two rules disagree for ever

COMPACT_ROWS_MIN = 512  # a day or so of rows: replayed in a tenth of a second, so not worth moving before


class Engine:
    """The book, in memory and on disk, and what is true now."""

    def __init__(
        self,
        journal: Journal,
        policy: Policy,
        monotonic_ms: Callable[[], int],
        told: Callable[[Event, Book, Book], None] = lambda event, before, after: None,  # noqa: ARG005 - for logs
    ) -> None:
        self._journal = journal
        self._monotonic_ms = monotonic_ms
        self._told = told
        self.book: Book = journal.replay()
        now_ms = monotonic_ms()
        self.live = Live(
            policy=policy,
            life=len(journal),
            started_at_s=self.book.at_s,
            started_at_ms=now_ms,
            now_ms=now_ms,
        )
        # Replaced at every change: take it, look at the book, then wait for it.
        self.changed = asyncio.Event()
        self._compact_rows_min = COMPACT_ROWS_MIN
        self.beat_at_ms = now_ms  # when `observe` last ran to its end: the watchdog looks at this

    def accept(self, event: Event) -> bool:
        """One fact. Returns whether it changed anything (then it is on disk)."""
        after = rules.step(self.book, event)
        if after is self.book:
            return False
        self._journal.append(event)
        before, self.book = self.book, after
        self._follow(event, before)
        self._wake()
        self._told(event, before, after)
        return True

    def _follow(self, event: Event, before: Book) -> None:
        """What an event means for Live: where a wait begins, and that power is offered from here on."""
        if isinstance(event, BidEnded):
            self.live = observe(self.live, TransactionTried(event.bid_id, None), self.live.now_ms)
        sid: SessionId | None = getattr(event, "session_id", None)
        session = None if sid is None else self.book.sessions.get(sid)
        if sid is None or session is None:
            return
        known = before.sessions.get(sid)
        if known is None or known.stage is not session.stage:
            self.live = moved(self.live, sid, is_open=session.stage not in CLOSED)
        if isinstance(event, DeliveryBegan):
            self.live = offered(self.live, session.port or "")

    def observe(self, update: Update) -> None:
        """One look at the world; then everything that time or readings have made due is accepted."""
        before = self.live
        if isinstance(update, PortRead):
            update = replace(update, offered=self._is_offered(update.port))
        self.live = observe(self.live, update, self._monotonic_ms())
        for _ in range(DUE_MAX):
            event = rules.due(self.book, self.live)
            if event is None:
                break
            self.accept(event)
        else:
            raise AssertionError(f"events stay due: {event}")
        self.beat_at_ms = self.live.now_ms
        if _news(before) != _news(self.live):
            self._wake()

    def stop_by_owner(self) -> int:
        """The owner wants to sell no more now: every session that is not ending yet ends, in every port. How many did."""
        running = [one for one in self.book.open_sessions() if one.stage in STOPPABLE]
        for one in running:
            self.accept(StopDecided(self.at_s, one.session_id, StopReason.LOCAL, "the owner said stop"))
        self.observe(Beat())
        return len(running)

    def compact_when_idle(self) -> bool:
        """Fold long closed sessions out of book and live journal, if nothing is open and there is enough to fold. Whether it did.

        Rows that must stay (young sessions, stranded ones) are not looked at again before there are twice as many.
        """
        if self._journal.row_count < self._compact_rows_min or self.live.header is None:
            return False
        fold = rules.folded(self.book, self.live.at_s)
        if fold is None:
            return False
        after = rules.step(self.book, fold)
        self._journal.compact(fold, after)
        before, self.book = self.book, after
        self._compact_rows_min = max(COMPACT_ROWS_MIN, 2 * self._journal.row_count)
        self._told(fold, before, after)
        return True

    def owed(self) -> tuple[Effect, ...]:
        """Everything owed now."""
        return rules.owed(self.book, self.live)

    def _is_offered(self, port: str) -> bool:
        return any(isinstance(effect, Deliver) and effect.port == port for effect in self.owed())

    @property
    def at_s(self) -> int:
        """Chain time now, for stamping events."""
        return self.live.at_s

    def _wake(self) -> None:
        changed, self.changed = self.changed, asyncio.Event()
        changed.set()


def _news(live: Live) -> tuple[object, ...]:
    """What runners want to hear of; time alone is none."""
    return live.ports, live.header, live.tried, live.purse
