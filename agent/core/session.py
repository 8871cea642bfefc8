"""One session's life: the table of stages first, then what time and readings make due, then one small function per event.

Rules (DESIGN section 5; each has its test)
 1. Begin register on disk before the contactor may close; end register after it is *seen* open (or at the deadline, marked so).
    Energy is the sum of segments between journaled registers; never an integral of power, never above the order.
 2. Deliver only if nothing hinders: `hindrance` lists every reason, one line each.
 3. Un-acknowledged energy stays below the port's `max_unacked_wh`.
 4.-5. Tokens and receipts reach here verified; one that does not fit the stage changes nothing.
 6. Sign -> journal -> broadcast. Found settled on chain is SETTLED only if it paid what was acknowledged; else STRANDED.
 7. A close on chain may come in any stage: power off first, then answer.
 8. Not seen open in time: firmer, then lock the port out, and still settle.
 9. After a restart power is never offered again before the contactor was seen open and the segment closed (`life`).
10. Time is chain time: `live.at_s`. A wait is what this life has truly watched: `live.waited_s`.

Pure: events and Live come in, a new Session or the next due event goes out. An event without a row in TABLE changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from agent.core import events as ev
from agent.core.events import Event, Presentation, StopReason, Terms
from agent.core.live import Live, PortReading
from agent.core.token import NO_ACK, ZERO_ADDRESS, Ack
from agent.core.units import BlockHash, SessionId, TxHash, energy_mwh, energy_wh_floor


class Stage(StrEnum):
    """Where a session stands. (A `phase` is a mains phase in this field, so never call it that.)"""

    MATCHED = "MATCHED"  # believed on chain, waiting for the consumer's token at the plug
    AUTHORISED = "AUTHORISED"  # token verified, begin register journaled
    DELIVERING = "DELIVERING"  # power offered
    PAUSED = "PAUSED"  # contactor seen open, register journaled, may resume
    STOPPING = "STOPPING"  # stop decided, waiting to see it open and for the last receipt
    SETTLING = "SETTLING"  # end intent journaled: never energise this session again
    ORPHANED = "ORPHANED"  # its `connect` fell out of the chain
    SETTLED = "SETTLED"  # paid and believed
    LAPSED = "LAPSED"  # orphaned for good, nothing owed
    STRANDED = "STRANDED"  # paid less than acknowledged, or needs a human


S = Stage
CLOSED = frozenset({S.SETTLED, S.LAPSED, S.STRANDED})
# Pauses for credit: a consumer that signs one Wh at a time would open and close the contactor for each of them.
CREDIT_REST_S, CREDIT_REST_S_MAX = 2, 60
HOLDS_PORT = frozenset({S.AUTHORISED, S.DELIVERING, S.PAUSED, S.STOPPING})
STOPPABLE = frozenset({S.MATCHED, S.AUTHORISED, S.DELIVERING, S.PAUSED})  # a stop is news to them

# stage -> event -> stages it may lead to. What is not listed changes nothing.
TABLE: dict[Stage, dict[type[Event], frozenset[Stage]]] = {
    S.MATCHED: {
        ev.TokenPresented: frozenset({S.MATCHED}),
        ev.SessionAccepted: frozenset({S.AUTHORISED}),
        ev.StopDecided: frozenset({S.SETTLING}),  # no-show, or ended before it began: 0 Wh
        ev.ReceiptCredited: frozenset({S.MATCHED}),  # re-matched after an orphan: its receipts still count
        ev.ConnectedFinal: frozenset({S.MATCHED}),
        ev.ConnectedOrphaned: frozenset({S.ORPHANED}),
        ev.ConnectionClosingSeen: frozenset({S.MATCHED}),
        ev.ConnectionEndedSeen: frozenset({S.MATCHED}),
        ev.ConnectionEndedOrphaned: frozenset({S.MATCHED}),
        ev.ConnectionEndedBelieved: frozenset({S.SETTLED, S.STRANDED}),
        ev.MeterRecordSigned: frozenset({S.MATCHED}),
    },
    S.AUTHORISED: {
        ev.TokenPresented: frozenset({S.AUTHORISED}),
        ev.DeliveryBegan: frozenset({S.DELIVERING}),
        ev.StopDecided: frozenset({S.SETTLING}),
        ev.ReceiptCredited: frozenset({S.AUTHORISED}),
        ev.ConnectedFinal: frozenset({S.AUTHORISED}),
        ev.ConnectedOrphaned: frozenset({S.ORPHANED}),
        ev.ConnectionClosingSeen: frozenset({S.AUTHORISED}),
        ev.ConnectionEndedSeen: frozenset({S.AUTHORISED}),
        ev.ConnectionEndedOrphaned: frozenset({S.AUTHORISED}),
        ev.ConnectionEndedBelieved: frozenset({S.SETTLED, S.STRANDED}),
        ev.MeterRecordSigned: frozenset({S.AUTHORISED}),
    },
    S.DELIVERING: {
        ev.TokenPresented: frozenset({S.DELIVERING}),
        ev.DeliveryPaused: frozenset({S.PAUSED}),
        ev.StopDecided: frozenset({S.STOPPING}),
        ev.ReceiptCredited: frozenset({S.DELIVERING}),
        ev.ConnectedFinal: frozenset({S.DELIVERING}),
        ev.ConnectedOrphaned: frozenset({S.ORPHANED}),
        ev.ConnectionClosingSeen: frozenset({S.DELIVERING}),
        ev.ConnectionEndedSeen: frozenset({S.DELIVERING}),
        ev.ConnectionEndedOrphaned: frozenset({S.DELIVERING}),
        ev.MeterRecordSigned: frozenset({S.DELIVERING}),
    },
    S.PAUSED: {
        ev.TokenPresented: frozenset({S.PAUSED}),
        ev.DeliveryBegan: frozenset({S.DELIVERING}),
        ev.StopDecided: frozenset({S.STOPPING}),
        ev.ReceiptCredited: frozenset({S.PAUSED}),
        ev.ConnectedFinal: frozenset({S.PAUSED}),
        ev.ConnectedOrphaned: frozenset({S.ORPHANED}),
        ev.ConnectionClosingSeen: frozenset({S.PAUSED}),
        ev.ConnectionEndedSeen: frozenset({S.PAUSED}),
        ev.ConnectionEndedOrphaned: frozenset({S.PAUSED}),
        ev.MeterRecordSigned: frozenset({S.PAUSED}),
    },
    S.STOPPING: {
        ev.DeliveryEnded: frozenset({S.SETTLING}),
        ev.ReceiptCredited: frozenset({S.STOPPING}),
        ev.ConnectedFinal: frozenset({S.STOPPING}),
        ev.ConnectionClosingSeen: frozenset({S.STOPPING}),
        ev.ConnectionEndedSeen: frozenset({S.STOPPING}),
        ev.ConnectionEndedOrphaned: frozenset({S.STOPPING}),
        ev.MeterRecordSigned: frozenset({S.STOPPING}),
    },
    S.SETTLING: {
        ev.SettlementSigned: frozenset({S.SETTLING}),
        ev.SettlementReverted: frozenset({S.SETTLING, S.STRANDED}),
        ev.ReceiptCredited: frozenset({S.SETTLING}),
        ev.ConnectedFinal: frozenset({S.SETTLING}),
        ev.ConnectedOrphaned: frozenset({S.ORPHANED}),
        ev.ConnectionClosingSeen: frozenset({S.SETTLING}),
        ev.ConnectionEndedSeen: frozenset({S.SETTLING}),
        ev.ConnectionEndedOrphaned: frozenset({S.SETTLING}),
        ev.ConnectionEndedBelieved: frozenset({S.SETTLED, S.STRANDED}),
        ev.MeterRecordSigned: frozenset({S.SETTLING}),
    },
    S.ORPHANED: {
        ev.ConnectedBelieved: frozenset({S.MATCHED, S.SETTLING}),
        ev.DeliveryPaused: frozenset({S.ORPHANED}),  # closes the segment the orphan interrupted
        ev.DeliveryEnded: frozenset({S.ORPHANED}),  # the same, when it was not seen open in time (rule 8)
        ev.ReceiptCredited: frozenset({S.ORPHANED}),
        ev.SessionLapsed: frozenset({S.LAPSED}),
        ev.MeterRecordSigned: frozenset({S.ORPHANED}),
    },
    S.SETTLED: {ev.MeterRecordSigned: frozenset({S.SETTLED})},
    S.LAPSED: {ev.MeterRecordSigned: frozenset({S.LAPSED})},
    S.STRANDED: {ev.MeterRecordSigned: frozenset({S.STRANDED})},
}


class Hindrance(StrEnum):
    """Why power may not be offered right now (rule 2). The owner, the page and the consumer see these names."""

    END_INTENT = "end_intent"
    OTHER_LIFE = "restarted"
    NO_READING = "charger_silent"
    NOT_ARMED = "failsafe_not_armed"
    FAULT = "charger_fault"
    NO_PLUG = "not_plugged_in"
    RESERVE = "reserve_reached"
    VIEW_STALE = "chain_view_stale"
    TOO_LATE = "too_late"
    CLOSING = "closing_on_chain"
    CREDIT = "waiting_for_receipt"
    UNFINAL_CAP = "waiting_for_finality"
    RESTING = "resting"


@dataclass(frozen=True, slots=True)
class Ended:
    """A `ConnectionEnded` seen on chain."""

    energy_wh_settled: int
    fee_wei: int
    tx_hash: TxHash
    block_hash: BlockHash


@dataclass(frozen=True, slots=True)
class Settlement:
    """The newest signed settlement transaction."""

    energy_wh_settled: int
    nonce: int
    tx_hash: TxHash
    raw_tx: bytes
    max_fee_per_gas_wei: int
    max_priority_fee_per_gas_wei: int
    earlier: tuple[
        TxHash, ...
    ] = ()  # what these bytes replaced, same nonce: any of them may be the one that is mined


@dataclass(frozen=True, slots=True)
class Session:
    """Everything journaled about one `connect`. Registers are the meter's, in mWh."""

    terms: Terms
    stage: Stage
    stage_at_s: int
    final: bool = False
    presentation: Presentation | None = None
    accepted_at_s: int = 0
    register_mwh_begin: int | None = None
    begin_at_s: int = 0
    register_mwh_last: int | None = None  # where the register stood when the contactor was last seen open
    segment_mwh_begin: int | None = None  # where the open segment began; None while no power is offered
    energy_mwh_metered: int = 0  # closed segments
    life: int | None = None  # which life of the agent offered power last
    pause_reason: str = ""
    credit_pauses: int = 0
    energy_wh_acked: int = 0
    ack: Ack = NO_ACK
    acked_at_s: int = 0
    stop_reason: StopReason | None = None
    stop_detail: str = ""
    register_mwh_end: int | None = None
    end_at_s: int = 0
    energy_wh_delivered: int | None = None
    end_seen_open: bool | None = None
    closing_at_s: int | None = None
    ended: Ended | None = None
    settlement: Settlement | None = None
    settlement_error: str = ""
    settlement_reverts: int = 0
    record_begin: str = ""
    record_end: str = ""

    @property
    def session_id(self) -> SessionId:
        """The reorg-stable identity."""
        return self.terms.session_id

    @property
    def port(self) -> str | None:
        """The charging port this session was presented at."""
        return None if self.presentation is None else self.presentation.port

    @property
    def holds_port(self) -> bool:
        """True while nobody else may use its port. An orphan keeps it only if it may still go on there."""
        if self.stage is Stage.ORPHANED:
            return self.segment_mwh_begin is not None or (
                self.register_mwh_begin is not None and not self.end_intent
            )
        return self.stage in HOLDS_PORT

    @property
    def end_intent(self) -> bool:
        """The one-way door: once true, this session is never energised again."""
        return self.energy_wh_delivered is not None

    @property
    def replacements(self) -> int:
        """How often the settlement under way was signed again with higher fees."""
        return 0 if self.settlement is None else len(self.settlement.earlier)

    @property
    def order_wh(self) -> int:
        """What may be delivered: the order, or less if the consumer's session key may sign for less."""
        grant = self.presentation
        if grant is None or grant.session_key == ZERO_ADDRESS:
            return self.terms.energy_wh_ordered
        return min(self.terms.energy_wh_ordered, grant.max_energy_wh)

    def energy_mwh(self, reading: PortReading | None) -> int:
        """Energy so far by the meter: closed segments plus the open one as `reading` shows it."""
        if self.segment_mwh_begin is None or reading is None or reading.register_mwh is None:
            return self.energy_mwh_metered
        return self.energy_mwh_metered + max(0, reading.register_mwh - self.segment_mwh_begin)

    def energy_wh(self, reading: PortReading | None) -> int:
        """Whole Wh so far, never above the order."""
        if self.energy_wh_delivered is not None:
            return self.energy_wh_delivered
        return min(self.order_wh, energy_wh_floor(self.energy_mwh(reading)))

    def register_mwh_stop(self) -> int:
        """The register at which the order is complete. Only while a segment is open."""
        assert self.segment_mwh_begin is not None
        return self.segment_mwh_begin + energy_mwh(self.order_wh) - self.energy_mwh_metered


# ---- what hinders, and what is due


def hindrance(session: Session, live: Live) -> Hindrance | None:
    """Why this session may not have power now; None if it may. Ownership of the port is the book's business."""
    port, policy = session.port, live.policy
    reading = None if port is None else live.reading(port)
    if session.end_intent:
        return Hindrance.END_INTENT
    if port is None or reading is None or reading.register_mwh is None:
        return Hindrance.NO_READING
    if session.segment_mwh_begin is not None and session.life != live.life:
        return Hindrance.OTHER_LIFE
    if not live.ports[port].armed:
        return Hindrance.NOT_ARMED
    if reading.fault is not None or reading.pilot_state in ("E", "F"):
        return Hindrance.FAULT
    if reading.pilot_state not in ("B", "C", "D"):
        return Hindrance.NO_PLUG
    if _reserve(session, live, port, reading) is not False:
        return Hindrance.RESERVE
    if live.view_age_s is None or live.view_age_s > policy.max_view_age_s:
        return Hindrance.VIEW_STALE
    if live.at_s < session.terms.issued_at_s:
        return Hindrance.VIEW_STALE  # a node still catching up serves old heads as fresh ones
    if live.at_s >= session.terms.valid_until_s - policy.validity_margin_s:
        return Hindrance.TOO_LATE
    if session.closing_at_s is not None or session.ended is not None:
        return Hindrance.CLOSING
    delivered_wh = session.energy_wh(reading)
    if delivered_wh - session.energy_wh_acked >= policy.max_unacked_wh[port]:
        return Hindrance.CREDIT
    if not session.final and delivered_wh >= policy.max_unfinal_wh:
        return Hindrance.UNFINAL_CAP
    if session.stage is S.PAUSED and live.waited_s(session.session_id) < _rest_s(session):
        return Hindrance.RESTING
    return None


def _rest_s(session: Session) -> int:
    """How long a pause for credit lasts at least, receipt or not: twice as long at each."""
    if session.pause_reason != Hindrance.CREDIT:
        return 0
    return min(CREDIT_REST_S_MAX, CREDIT_REST_S << min(session.credit_pauses - 1, 16))


def _reserve(session: Session, live: Live, port: str, reading: PortReading) -> bool | None:
    """Is the owner's reserve reached? None: the battery's charge is shown, but no two samples agree on it yet."""
    soc_permille, policy = live.soc_permille(port), live.policy
    if soc_permille is not None:
        return soc_permille <= policy.soc_permille_reserve
    if reading.soc_permille is not None:
        return None
    return policy.battery_budget_wh is not None and session.energy_wh(reading) >= policy.battery_budget_wh


def due(session: Session, live: Live, *, port_free: bool) -> Event | None:
    """The next event that time or readings have made due for this session. `port_free`: no other session holds its port."""
    rule = _DUE.get(session.stage)
    return None if rule is None else rule(session, live, port_free)


def _due_matched(session: Session, live: Live, port_free: bool) -> Event | None:
    stop = _stop_by_chain_or_time(session, live, StopReason.TIMEOUT)
    if stop is not None:
        return stop
    grant = session.presentation
    if grant is None or grant.token != session.terms.token or not port_free:
        return None
    register_mwh, reading = live.rest_register_mwh(grant.port), live.reading(grant.port)
    if register_mwh is None or reading is None or reading.pilot_state not in ("B", "C", "D"):
        return None
    return ev.SessionAccepted(live.at_s, session.session_id, register_mwh)


def _due_authorised(session: Session, live: Live, port_free: bool) -> Event | None:  # noqa: ARG001
    stop = _stop_by_chain_or_time(session, live, StopReason.TIMEOUT)
    return stop if stop is not None else _begin(session, live)


def _due_delivering(session: Session, live: Live, port_free: bool) -> Event | None:  # noqa: ARG001
    assert session.port is not None
    reading = live.reading(session.port)
    if reading is not None and (
        session.energy_mwh(reading) >= energy_mwh(session.order_wh) or live.ports[session.port].at_target
    ):
        return _stop(session, live, StopReason.ENERGY_LIMIT_REACHED, "the order is delivered")
    stop = _stop_by_chain_or_time(session, live, StopReason.TIME_LIMIT_REACHED) or _stop_by_charger(
        session, live
    )
    if stop is not None:
        return stop
    why, register_mwh = hindrance(session, live), live.rest_register_mwh(session.port)
    if why is not None and register_mwh is not None:
        return ev.DeliveryPaused(live.at_s, session.session_id, register_mwh, why)
    if live.held_ms(session.port) >= live.policy.stop_deadline_s * 1000:
        return _stop(session, live, StopReason.OTHER, "the contactor did not open for a pause")
    return None


def _due_paused(session: Session, live: Live, port_free: bool) -> Event | None:  # noqa: ARG001
    stop = _stop_by_chain_or_time(session, live, StopReason.TIME_LIMIT_REACHED) or _stop_by_charger(
        session, live
    )
    if stop is not None:
        return stop
    why = hindrance(session, live)
    if why is Hindrance.CREDIT and live.waited_s(session.session_id) >= live.policy.receipt_timeout_s:
        return _stop(session, live, StopReason.TIMEOUT, "no receipt came")
    return _begin(session, live)


def _due_stopping(session: Session, live: Live, port_free: bool) -> Event | None:  # noqa: ARG001
    assert session.port is not None
    waited_s = live.waited_s(session.session_id)
    register_mwh = live.rest_register_mwh(session.port)
    if register_mwh is not None:
        delivered = session.energy_mwh_metered
        if session.segment_mwh_begin is not None:
            delivered += max(0, register_mwh - session.segment_mwh_begin)
        all_acked = session.energy_wh_acked >= min(session.order_wh, energy_wh_floor(delivered))
        if all_acked or waited_s >= live.policy.final_receipt_wait_s:
            return ev.DeliveryEnded(live.at_s, session.session_id, register_mwh, seen_open=True)
        return None
    return _ended_unseen(session, live) if waited_s >= live.policy.stop_deadline_s else None


def _ended_unseen(session: Session, live: Live) -> Event:
    """Rule 8's last step: the newest register we have, marked as not seen open."""
    assert session.port is not None and session.register_mwh_last is not None  # noqa: PT018
    reading = live.ports[session.port].reading if session.port in live.ports else None
    last = session.register_mwh_last if session.segment_mwh_begin is None else session.segment_mwh_begin
    verified = last if reading is None or reading.register_mwh is None else max(last, reading.register_mwh)
    return ev.DeliveryEnded(live.at_s, session.session_id, verified, seen_open=False)


def _due_orphaned(session: Session, live: Live, port_free: bool) -> Event | None:  # noqa: ARG001
    if session.segment_mwh_begin is not None and session.port is not None:
        register_mwh = live.rest_register_mwh(session.port)
        if register_mwh is not None:
            return ev.DeliveryPaused(live.at_s, session.session_id, register_mwh, "orphaned")
        if live.waited_s(session.session_id) >= live.policy.stop_deadline_s:
            return _ended_unseen(session, live)
    if live.at_s >= session.terms.valid_until_s + live.policy.grace_s:
        return ev.SessionLapsed(live.at_s, session.session_id)
    return None


_DUE: dict[Stage, Callable[[Session, Live, bool], Event | None]] = {
    S.MATCHED: _due_matched,
    S.AUTHORISED: _due_authorised,
    S.DELIVERING: _due_delivering,
    S.PAUSED: _due_paused,
    S.STOPPING: _due_stopping,
    S.ORPHANED: _due_orphaned,
}


def _begin(session: Session, live: Live) -> Event | None:
    """Offer power, if nothing hinders and the register still reads as journaled; a register that moved alone is a fault."""
    if session.energy_mwh_metered >= energy_mwh(session.order_wh):
        return _stop(session, live, StopReason.ENERGY_LIMIT_REACHED, "the order is delivered")
    if hindrance(session, live) is not None:
        return None
    assert session.port is not None
    register_mwh = live.rest_register_mwh(session.port)
    if register_mwh is None:
        return None
    if register_mwh != session.register_mwh_last:
        return _stop(session, live, StopReason.OTHER, "the register moved while the contactor was open")
    return ev.DeliveryBegan(live.at_s, session.session_id, register_mwh, live.life)


def _stop(session: Session, live: Live, reason: StopReason, detail: str) -> Event:
    return ev.StopDecided(live.at_s, session.session_id, reason, detail)


def _stop_by_chain_or_time(session: Session, live: Live, when_late: StopReason) -> Event | None:
    if session.ended is not None or session.closing_at_s is not None:
        return _stop(session, live, StopReason.REMOTE, "the connection is being ended on chain")
    # Only a fresh view may declare a no-show or an expiry early; a stale one only pauses, until the clock has really passed.
    if live.header is not None and live.at_s >= session.terms.valid_until_s - live.policy.validity_margin_s:
        return _stop(session, live, when_late, "the token's validity ends")
    return None


def _stop_by_charger(session: Session, live: Live) -> Event | None:
    assert session.port is not None
    if live.silent_ms(session.port) >= live.policy.receipt_timeout_s * 1000:
        return _stop(session, live, StopReason.POWER_LOSS, "the charger stayed unreachable")
    reading = live.reading(session.port)
    if reading is None:
        return None
    if reading.fault is not None or reading.pilot_state in ("E", "F"):
        return _stop(session, live, StopReason.OTHER, reading.fault or f"pilot state {reading.pilot_state}")
    if reading.pilot_state == "A":
        return _stop(session, live, StopReason.EV_DISCONNECTED, "the cable was unplugged")
    if _reserve(session, live, session.port, reading):
        return _stop(session, live, StopReason.SOC_LIMIT_REACHED, "the provider's battery is at its reserve")
    return None


# ---- what events do


def apply(session: Session, event: Event) -> Session:
    """The session after `event`; the very same object if the event has no row in TABLE or says nothing new."""
    row = TABLE[session.stage].get(type(event))
    if row is None:
        return session
    after = _APPLY[type(event)](session, event)
    if after is session:
        return session
    assert after.stage in row, (session.stage, type(event).__name__, after.stage)
    if after.stage is not session.stage:
        after = replace(after, stage_at_s=event.at_s)
    _check(session, after)
    return after


def _check(before: Session, after: Session) -> None:
    """What no event may break, whatever it says."""
    assert after.energy_wh_acked >= before.energy_wh_acked
    assert after.energy_mwh_metered >= before.energy_mwh_metered
    assert after.energy_wh_acked <= after.terms.energy_wh_ordered
    if before.end_intent:
        assert after.energy_wh_delivered == before.energy_wh_delivered
        assert after.segment_mwh_begin is None
    if after.energy_wh_delivered is not None:
        assert 0 <= after.energy_wh_delivered <= after.terms.energy_wh_ordered
    if after.stage is S.DELIVERING:
        assert after.register_mwh_begin is not None
        assert after.segment_mwh_begin is not None


def _token_presented(session: Session, event: ev.TokenPresented) -> Session:
    if event.presentation == session.presentation or event.presentation.token != session.terms.token:
        return session
    if session.stage is not S.MATCHED and event.presentation.port != session.port:
        return session  # a session does not move between ports
    return replace(session, presentation=event.presentation)


def _session_accepted(session: Session, event: ev.SessionAccepted) -> Session:
    if session.register_mwh_begin is None:
        session = replace(session, register_mwh_begin=event.register_mwh_begin, begin_at_s=event.at_s)
    return replace(
        session, stage=S.AUTHORISED, accepted_at_s=event.at_s, register_mwh_last=event.register_mwh_begin
    )


def _delivery_began(session: Session, event: ev.DeliveryBegan) -> Session:
    assert event.register_mwh == session.register_mwh_last
    return replace(
        session, stage=S.DELIVERING, segment_mwh_begin=event.register_mwh, life=event.life, pause_reason=""
    )


def _closed_segment(session: Session, register_mwh: int) -> Session:
    if session.segment_mwh_begin is None:
        return session
    moved = max(0, register_mwh - session.segment_mwh_begin)
    return replace(
        session,
        energy_mwh_metered=session.energy_mwh_metered + moved,
        segment_mwh_begin=None,
        register_mwh_last=register_mwh,
    )


def _delivery_paused(session: Session, event: ev.DeliveryPaused) -> Session:
    stage = S.PAUSED if session.stage is S.DELIVERING else session.stage
    closed = _closed_segment(session, event.register_mwh)
    if closed is session:
        return session
    pauses = session.credit_pauses + (event.reason == Hindrance.CREDIT)
    return replace(closed, stage=stage, pause_reason=event.reason, credit_pauses=pauses)


def _stop_decided(session: Session, event: ev.StopDecided) -> Session:
    stopped = replace(session, stop_reason=event.stop_reason, stop_detail=event.detail)
    if session.stage in (S.MATCHED, S.AUTHORISED):
        if session.register_mwh_last is not None:  # a begin record was written: it gets its end
            stopped = replace(
                stopped, register_mwh_end=session.register_mwh_last, end_at_s=event.at_s, end_seen_open=True
            )
        return _with_end_intent(stopped)
    return replace(stopped, stage=S.STOPPING)


def _with_end_intent(session: Session) -> Session:
    assert session.segment_mwh_begin is None
    delivered_wh = min(session.order_wh, energy_wh_floor(session.energy_mwh_metered))
    stage = S.ORPHANED if session.stage is S.ORPHANED else S.SETTLING
    return replace(session, stage=stage, energy_wh_delivered=max(delivered_wh, session.energy_wh_acked))


def _delivery_ended(session: Session, event: ev.DeliveryEnded) -> Session:
    closed = _closed_segment(session, event.register_mwh_end)
    return _with_end_intent(
        replace(
            closed,
            register_mwh_end=event.register_mwh_end,
            end_at_s=event.at_s,
            end_seen_open=event.seen_open,
        )
    )


def _receipt_credited(session: Session, event: ev.ReceiptCredited) -> Session:
    if event.energy_wh_acked <= session.energy_wh_acked or session.settlement is not None:
        return session
    if session.energy_wh_delivered is not None and event.energy_wh_acked > session.energy_wh_delivered:
        return session
    return replace(session, energy_wh_acked=event.energy_wh_acked, ack=event.ack, acked_at_s=event.at_s)


def _connected_final(session: Session, event: ev.ConnectedFinal) -> Session:
    if session.final or event.block_hash != session.terms.block_hash:
        return session
    return replace(session, final=True)


def _connected_orphaned(session: Session, event: ev.ConnectedOrphaned) -> Session:
    if event.block_hash != session.terms.block_hash:
        return session
    return replace(session, stage=S.ORPHANED, final=False, ended=None, closing_at_s=None, settlement=None)


def rematched(session: Session, terms: Terms, at_s: int) -> Session:
    """An orphan whose `connect` came back, with a new token: never energised again if it had an end intent."""
    assert session.stage is S.ORPHANED
    if session.segment_mwh_begin is not None:
        return session  # not before the contactor was seen open
    stage = S.SETTLING if session.end_intent else S.MATCHED
    assert stage in TABLE[S.ORPHANED][ev.ConnectedBelieved]
    return replace(session, terms=terms, stage=stage, stage_at_s=at_s, accepted_at_s=0)


def _closing_seen(session: Session, event: ev.ConnectionClosingSeen) -> Session:
    if session.closing_at_s == event.close_at_s:
        return session
    return replace(session, closing_at_s=event.close_at_s)


def _ended_seen(session: Session, event: ev.ConnectionEndedSeen) -> Session:
    ended = Ended(event.energy_wh_settled, event.fee_wei, event.tx_hash, event.block_hash)
    return session if session.ended == ended else replace(session, ended=ended)


def _ended_orphaned(session: Session, event: ev.ConnectionEndedOrphaned) -> Session:
    if session.ended is None or session.ended.block_hash != event.block_hash:
        return session
    return replace(session, ended=None)


def _ended_believed(session: Session, event: ev.ConnectionEndedBelieved) -> Session:
    if session.ended is None or session.ended.block_hash != event.block_hash:
        return session
    paid = session.ended.energy_wh_settled >= session.energy_wh_acked
    ended = session if session.end_intent else _with_end_intent(session)
    return replace(ended, stage=S.SETTLED if paid else S.STRANDED)


def _settlement_signed(session: Session, event: ev.SettlementSigned) -> Session:
    before = session.settlement
    is_replacement = before is not None and before.nonce == event.nonce
    signed = Settlement(
        event.energy_wh_settled,
        event.nonce,
        event.tx_hash,
        event.raw_tx,
        event.max_fee_per_gas_wei,
        event.max_priority_fee_per_gas_wei,
        (*before.earlier, before.tx_hash) if before is not None and is_replacement else (),
    )
    return replace(session, settlement=signed)


def _settlement_reverted(session: Session, event: ev.SettlementReverted) -> Session:
    ours = session.settlement
    if ours is None or event.tx_hash not in (ours.tx_hash, *ours.earlier):
        return session
    reverts = session.settlement_reverts + 1
    stage = S.STRANDED if reverts >= REVERTS_MAX else S.SETTLING
    return replace(
        session, stage=stage, settlement=None, settlement_error=event.error, settlement_reverts=reverts
    )


REVERTS_MAX = 3  # a settlement that reverts this often needs a human, not more gas


def _meter_record_signed(session: Session, event: ev.MeterRecordSigned) -> Session:
    if event.moment == "begin":
        return session if session.record_begin else replace(session, record_begin=event.ocmf)
    return session if session.record_end else replace(session, record_end=event.ocmf)


_APPLY: dict[type[Event], Callable[[Session, Any], Session]] = {
    ev.TokenPresented: _token_presented,
    ev.SessionAccepted: _session_accepted,
    ev.DeliveryBegan: _delivery_began,
    ev.DeliveryPaused: _delivery_paused,
    ev.StopDecided: _stop_decided,
    ev.DeliveryEnded: _delivery_ended,
    ev.ReceiptCredited: _receipt_credited,
    ev.ConnectedFinal: _connected_final,
    ev.ConnectedOrphaned: _connected_orphaned,
    ev.ConnectionClosingSeen: _closing_seen,
    ev.ConnectionEndedSeen: _ended_seen,
    ev.ConnectionEndedOrphaned: _ended_orphaned,
    ev.ConnectionEndedBelieved: _ended_believed,
    ev.SettlementSigned: _settlement_signed,
    ev.SettlementReverted: _settlement_reverted,
    ev.MeterRecordSigned: _meter_record_signed,
    ev.SessionLapsed: lambda session, event: replace(session, stage=S.LAPSED),  # noqa: ARG005
}
