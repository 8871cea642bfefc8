"""Every session and bid of this vehicle: what is journaled (Book), and what follows from it and what is true now (Live).

* `step(book, event)`  routes one event; the very same book comes back when it changes nothing (then it is not worth a row)
* `due(book, live)`    the next event that time or readings have made due; the engine accepts it and asks again
* `owed(book, live)`   everything we owe the world right now; runners do it, again and again, until it is no longer owed

Rules: a restart is replay; effects are derived, never remembered; one session per port; what strangers can grow is bounded.
Pure: no clock, no I/O. Raises only assertions, and an assertion here means the event never reaches the disk.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TypeVar

from agent.core import bidding
from agent.core import events as ev
from agent.core import session as life
from agent.core.bidding import Bid
from agent.core.effects import (
    BroadcastBid,
    BroadcastSettlement,
    Deliver,
    Effect,
    Firmness,
    Hold,
    SignBid,
    SignMeterRecord,
    SignSettlement,
)
from agent.core.events import Event, Presentation, Terms
from agent.core.live import Live
from agent.core.session import Session, Stage
from agent.core.token import Domain, access_token, session_id
from agent.core.units import Address, BidId, BlockHash, SessionId

V = TypeVar("V")

NO_BLOCK = BlockHash(b"")
PENDING_MAX = (
    64  # only auctions we won can name us, so this bounds a lying node, not consumers; expired ones give way
)

FOLD_AFTER_S = (
    86_400  # a session closed for a day is history: no reorg is that deep, and its consumer has its `final`
)


@dataclass(frozen=True, slots=True)
class Book:
    """Journaled facts only."""

    domain: Domain
    provider: Address
    at_s: int = 0  # newest time in the journal
    scanned_number: int = -1  # every log up to this block is accepted
    scanned_hash: BlockHash = NO_BLOCK
    pending: Mapping[SessionId, Terms] = field(default_factory=dict)  # seen, not yet believed
    early: Mapping[SessionId, Presentation] = field(default_factory=dict)  # tokens for pending ones, one each
    sessions: Mapping[SessionId, Session] = field(default_factory=dict)
    locked_ports: Mapping[str, str] = field(default_factory=dict)  # port -> why; only a human unlocks
    records_signed: int = 0
    bids: Mapping[BidId, Bid] = field(default_factory=dict)  # oldest first

    def is_genuine(self, terms: Terms) -> bool:
        """Rule 2: it is ours, and token and session id are what we compute ourselves from the chain's facts."""
        return (
            terms.provider == self.provider
            and terms.consumer != self.provider
            and terms.token
            == access_token(terms.consumer, terms.provider, terms.issued_at_s, terms.valid_until_s)
            and terms.session_id
            == session_id(
                self.domain.chain_id,
                self.domain.contract,
                terms.consumer,
                terms.provider,
                terms.auction_nonce,
            )
        )

    def awaits_belief(self, sid: SessionId) -> bool:
        """A `Connected` of this session is seen and not yet believed: its token is kept as an early one (rule 4)."""
        known = self.sessions.get(sid)
        return sid in self.pending and (known is None or known.stage is Stage.ORPHANED)

    def on_port(self, port: str) -> Session | None:
        """The session that holds this port, if any."""
        holders = [s for s in self.sessions.values() if s.port == port and s.holds_port]
        active = [
            s for s in holders if s.stage is not Stage.ORPHANED
        ]  # an orphan must not stop its successor
        return next(iter(active + holders), None)

    def is_port_free(self, port: str | None, session: Session) -> bool:
        """May `session` take this port: not locked out, and held by no other session."""
        if port is None or port in self.locked_ports:
            return False
        holder = self.on_port(port)
        return holder is None or holder.session_id == session.session_id

    def open_sessions(self) -> tuple[Session, ...]:
        """Sessions that still have something to happen."""
        return tuple(s for s in self.sessions.values() if s.stage not in life.CLOSED)

    def open_bids(self) -> tuple[Bid, ...]:
        """Bids that may still be mined."""
        return bidding.open_bids(self.bids)


def step(book: Book, event: Event) -> Book:
    """The book after `event`; the same object if it changed nothing."""
    after = _routed(book, event)
    if after is book:
        return book
    return replace(after, at_s=max(book.at_s, event.at_s))


def _routed(book: Book, event: Event) -> Book:
    match event:
        case ev.ConnectedSeen():
            return _connected_seen(book, event)
        case ev.ConnectedBelieved():
            return _connected_believed(book, event)
        case ev.ConnectedOrphaned() if event.session_id in book.pending:
            book = _pending_orphaned(book, event)
            return _to_session(book, event.session_id, event)
        case ev.BlocksScanned():
            if event.block_hash == book.scanned_hash:
                return book
            return replace(book, scanned_number=event.block_number, scanned_hash=event.block_hash)
        case ev.TokenPresented() if book.awaits_belief(event.session_id):
            return _presented_early(book, event)
        case ev.PortLocked():
            return _port_locked(book, event)
        case ev.PortUnlocked():
            return _port_unlocked(book, event)
        case ev.HistoryFolded():
            return _history_folded(book, event)
        case ev.BidDecided():
            return _with_bids(book, bidding.decided(book.bids, event))
        case ev.BidSigned():
            return _with_bids(book, bidding.signed(book.bids, event))
        case ev.BidEnded():
            return _with_bids(book, bidding.ended(book.bids, event))
        case _:
            sid: SessionId = event.session_id  # type: ignore[attr-defined]  # every other event names its session
            return _to_session(book, sid, event)


def _to_session(book: Book, sid: SessionId, event: Event) -> Book:
    before = book.sessions.get(sid)
    if before is None:
        return book
    after = life.apply(before, event)
    if after is before:
        return book
    book = replace(book, sessions={**book.sessions, sid: after})
    if isinstance(event, ev.MeterRecordSigned):
        book = replace(book, records_signed=book.records_signed + 1)
    if isinstance(event, ev.DeliveryEnded) and not event.seen_open and after.port is not None:
        why = "the contactor was not seen open when the session ended"
        book = replace(book, locked_ports={**book.locked_ports, after.port: why})
    _check(book)
    return book


def _connected_seen(book: Book, event: ev.ConnectedSeen) -> Book:
    terms, known = event.terms, book.sessions.get(event.terms.session_id)
    if known is not None and known.terms == terms and known.stage is not Stage.ORPHANED:
        return book
    if not book.is_genuine(terms) or book.pending.get(terms.session_id) == terms:
        return book
    pending = book.pending
    if len(pending) >= PENDING_MAX and terms.session_id not in pending:
        pending = {sid: old for sid, old in pending.items() if old.valid_until_s > event.at_s}
        if len(pending) >= PENDING_MAX:
            return book
    pending = {**pending, terms.session_id: terms}
    early = {sid: kept for sid, kept in book.early.items() if sid in pending and sid != terms.session_id}
    return replace(book, pending=pending, early=early)


def _connected_believed(book: Book, event: ev.ConnectedBelieved) -> Book:
    terms = book.pending.get(event.session_id)
    if terms is None or terms.block_hash != event.block_hash:
        return book
    known = book.sessions.get(event.session_id)
    if known is None:
        session = Session(terms, Stage.MATCHED, event.at_s, presentation=book.early.get(event.session_id))
    elif known.stage is Stage.ORPHANED:
        session = life.rematched(known, terms, event.at_s)
        if session is known:
            return book
        if session.stage is Stage.MATCHED and event.session_id in book.early:
            session = replace(session, presentation=book.early[event.session_id])
    else:
        return book  # the old block has not been found orphaned yet; the watcher will say both again
    return replace(
        book,
        pending=_without(book.pending, event.session_id),
        early=_without(book.early, event.session_id),
        sessions={**book.sessions, event.session_id: session},
    )


def _pending_orphaned(book: Book, event: ev.ConnectedOrphaned) -> Book:
    if book.pending[event.session_id].block_hash != event.block_hash:
        return book
    return replace(
        book, pending=_without(book.pending, event.session_id), early=_without(book.early, event.session_id)
    )


def _presented_early(book: Book, event: ev.TokenPresented) -> Book:
    terms = book.pending.get(event.session_id)
    if terms is None or terms.token != event.presentation.token:
        return book
    if book.early.get(event.session_id) == event.presentation:
        return book
    return replace(book, early={**book.early, event.session_id: event.presentation})


def _port_locked(book: Book, event: ev.PortLocked) -> Book:
    if event.port in book.locked_ports:
        return book
    why = "power flowed that no session had asked for"
    return replace(book, locked_ports={**book.locked_ports, event.port: why})


def _port_unlocked(book: Book, event: ev.PortUnlocked) -> Book:
    if event.port not in book.locked_ports:
        return book
    return replace(
        book, locked_ports={port: why for port, why in book.locked_ports.items() if port != event.port}
    )


def _with_bids(book: Book, bids: bidding.Bids) -> Book:
    return book if bids is book.bids else replace(book, bids=bids)


def _history_folded(book: Book, event: ev.HistoryFolded) -> Book:
    kept = {
        sid: one
        for sid, one in book.sessions.items()
        if not _is_history(one, event.closed_before_s, book.locked_ports)
    }
    return replace(
        book,
        sessions=kept,
        records_signed=event.records_signed,
        scanned_number=event.scanned_number,
        scanned_hash=event.scanned_hash,
        bids={},  # the chain remembers them
    )


def _is_history(one: Session, before_s: int, locked_ports: Mapping[str, str]) -> bool:
    """Nothing can happen to it any more. Not so while it is stranded, keeps a port locked, or its token could still be honoured:
    a forgotten session whose `connect` came back would be a new one.
    """
    signed = one.register_mwh_end is None or bool(one.record_begin and one.record_end)
    locks = one.end_seen_open is False and one.port in locked_ports
    over = one.stage_at_s <= before_s and one.terms.valid_until_s <= before_s
    return one.stage in (Stage.SETTLED, Stage.LAPSED) and over and signed and not locks


def folded(book: Book, at_s: int) -> ev.HistoryFolded | None:
    """What the journal may fold away now; None while anything is open or awaited."""
    if book.open_sessions() or book.pending or book.open_bids():
        return None
    return ev.HistoryFolded(
        max(at_s, book.at_s),
        at_s - FOLD_AFTER_S,
        book.records_signed,
        book.scanned_number,
        book.scanned_hash,
    )


def _without(mapping: Mapping[SessionId, V], sid: SessionId) -> Mapping[SessionId, V]:
    return {key: value for key, value in mapping.items() if key != sid}


def _check(book: Book) -> None:
    """What no event may break across sessions."""
    holders = [s.port for s in book.sessions.values() if s.stage in life.HOLDS_PORT]
    assert len(holders) == len(set(holders)), "two sessions hold one port"


# ---- what follows


def due(book: Book, live: Live) -> Event | None:
    """The next event that time or readings have made due, for any session; None when there is none."""
    for session in book.open_sessions():
        event = life.due(session, live, port_free=book.is_port_free(session.port, session))
        if event is not None and step(book, event) is not book:
            return event
    for port in live.ports:
        # Rule 8 without a session: locked only until it is seen open, it would be armed, unlocked, and begin again.
        if port not in book.locked_ports and book.on_port(port) is None and live.charges_by_itself(port):
            return ev.PortLocked(live.at_s, port)
    return None if live.header is None else bidding.due(book.bids, live.at_s)


def owed(book: Book, live: Live) -> tuple[Effect, ...]:
    """Everything owed now: exactly one of Deliver/Hold per configured port, then signatures and broadcasts."""
    effects: list[Effect] = [_owed_on_port(book, live, port) for port in sorted(live.policy.max_unacked_wh)]
    effects.extend(_owed_record(book))
    for session in book.sessions.values():
        effects.extend(_owed_on_chain(session))
    effects.extend(_owed_bid(bid) for bid in book.open_bids())
    return tuple(effects)


def _owed_bid(bid: Bid) -> Effect:
    if bid.signed is None:
        return SignBid(bid.bid_id)
    return BroadcastBid(bid.bid_id, bid.signed.tx_hash, bid.signed.raw_tx)


def _owed_record(book: Book) -> tuple[Effect, ...]:
    """One at a time: the next record's number is known only when this one is on disk, so no number is used twice."""
    for session in book.sessions.values():
        if session.register_mwh_begin is not None and not session.record_begin:
            return (SignMeterRecord(session.session_id, "begin", book.records_signed + 1),)
        if session.register_mwh_end is not None and not session.record_end:
            return (SignMeterRecord(session.session_id, "end", book.records_signed + 1),)
    return ()


def _owed_on_port(book: Book, live: Live, port: str) -> Effect:
    session = book.on_port(port)
    if (
        session is not None
        and session.stage is Stage.DELIVERING
        and port not in book.locked_ports
        and life.hindrance(session, live) is None
    ):
        return Deliver(port, session.session_id, session.register_mwh_stop())
    held_ms, policy = live.held_ms(port), live.policy
    if held_ms >= policy.cut_off_after_s * 1000:
        return Hold(port, Firmness.CUT_OFF)
    if held_ms >= policy.lock_after_s * 1000 or port in book.locked_ports:
        return Hold(port, Firmness.LOCK)
    return Hold(port)


def _owed_on_chain(session: Session) -> tuple[Effect, ...]:
    if session.stage is not Stage.SETTLING or session.ended is not None:
        return ()
    if session.settlement is None:
        return (
            SignSettlement(session.session_id, session.terms.token, session.energy_wh_acked, session.ack),
        )
    return (BroadcastSettlement(session.session_id, session.settlement.tx_hash, session.settlement.raw_tx),)
