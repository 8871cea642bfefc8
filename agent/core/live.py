"""What is only true now: newest readings, newest header, time, limits. Never journaled; a restart begins with an empty one.

Rules
* With an empty Live nothing is owed but Hold: no reading, no header, no delivery.
* Time is chain time (rule 10): the newest header's timestamp plus monotonic time since it arrived. The wall clock is not here.
* `observe(live, update, now_ms)` is pure; `engine.observe` is its only caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from agent.core.units import BlockHash, SessionId

SOC_JITTER_PERMILLE = 30  # two samples this near are one truth; a glitch (0 %, 1 %, 100 %) stands alone
SOC_SAMPLE_GAP_MS = 1_500  # a device is asked for it once a second: nearer readings repeat the same sample
LOOK_GAP_MS_MAX = 1_000  # the engine beats four times a second: a longer gap is a process that stood still
SOC_AGE_MS_MAX = 60_000  # no two samples agreed for so long: then the charge is not known

# waiting: for lower fees. refused: by contract, node or purse, asked again. sent: said to the node. stuck: said so often, at
# such fees, that no more is offered now.
TriedState = Literal["waiting", "refused", "sent", "stuck"]


@dataclass(frozen=True, slots=True)
class Policy:
    """The owner's limits. Each says which fault or counterparty it bounds (PROTOCOL sections 5, 7; DESIGN section 5)."""

    max_unacked_wh: Mapping[str, int]  # per port: energy we may lose to a consumer who stops signing
    max_unfinal_wh: int = 2_000  # energy we may lose to a reorg that never re-includes `connect`
    max_view_age_s: int = 60  # how blind we may be to a close on chain while energy flows
    validity_margin_s: int = 60  # stop this long before the token expires
    final_receipt_wait_s: int = 20  # how long a stopped session waits for the consumer's last signature
    receipt_timeout_s: int = 120  # how long a pause for credit, or a dead bus, may last
    stop_deadline_s: int = 30  # a contactor not seen open by then locks the port out
    lock_after_s: int = 3  # a stop not obeyed by then is repeated more firmly,
    cut_off_after_s: int = 6  # and by then with the external cut-off
    reading_age_ms_max: int = 2_000  # older than this is no reading
    grace_s: int = 72 * 3600  # the contract's grace: when an orphan may be forgotten
    soc_permille_reserve: int = 0  # the provider's own way home
    battery_budget_wh: int | None = (
        None  # most that a session may take from a battery whose charge nobody shows
    )


@dataclass(frozen=True, slots=True)
class PortReading:
    """One reading of one port, in DESIGN's words; the charger runner makes it from the bridge's Reading."""

    at_ms: int
    register_mwh: int | None
    power_w: int
    pilot_state: str  # IEC 61851 A-F
    seen_open: bool  # contactor seen open and power about zero
    fault: str | None = None
    soc_permille: int | None = None
    current_ma: int = 0
    voltage_mv: int = 0


@dataclass(frozen=True, slots=True)
class PortLive:
    """A port now. `previous` makes "seen open at the same register twice" possible: meters tick late."""

    reading: PortReading | None = None
    previous: PortReading | None = None
    armed: bool = False  # the charger's own failsafe is armed and was read back
    at_target: bool = False  # the stop schedule landed on the order (within one counter step)
    held_ms: int = 0  # for how long a stop has been commanded without being seen open (rule 8)
    offered: bool = (
        False  # power was offered when this was read: seen open or not, it proves no rest (rule 1)
    )
    rested: bool = False  # seen open since power was last offered: what flows after that nobody asked for
    soc_sample: tuple[int, int] | None = None  # (at_ms, permille) of the newest sample that was looked at
    soc_agreed: tuple[int, int] | None = None  # the newest one that the sample before it agreed with


@dataclass(frozen=True, slots=True)
class Header:
    """The newest believed block header."""

    number: int
    block_hash: BlockHash
    timestamp_s: int
    seen_at_ms: int  # monotonic


@dataclass(frozen=True, slots=True)
class Tried:
    """How the newest attempt to get a transaction mined went. For status pages: nothing is decided by it."""

    state: TriedState
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Purse:
    """What the operator's account holds, and what one more settlement should be able to cost."""

    balance_wei: int
    settlement_wei: int  # prudent: `settling.settlement_wei_prudent`


@dataclass(frozen=True, slots=True)
class Live:
    """Everything that is true only now."""

    policy: Policy
    life: int  # which life of the agent this is: the journal's length when it started
    started_at_s: int  # newest time in the journal when this life began
    started_at_ms: int
    now_ms: int
    header: Header | None = None
    ports: Mapping[str, PortLive] = field(default_factory=dict)
    watched_ms: int = 0  # for how long this life has looked: a process that stood still has not waited
    stage_at_ms: Mapping[SessionId, int] = field(default_factory=dict)  # of open sessions; on that clock
    tried: Mapping[bytes, Tried] = field(default_factory=dict)  # by session or bid, while it is open
    purse: Purse | None = None  # None: not asked yet in this life

    @property
    def at_s(self) -> int:
        """Chain time now; without any header, the journal's newest time plus what has passed since we started."""
        if self.header is None:
            return self.started_at_s + (self.now_ms - self.started_at_ms) // 1000
        return self.header.timestamp_s + (self.now_ms - self.header.seen_at_ms) // 1000

    def waited_s(self, sid: SessionId) -> int:
        """For how long this life has watched the session in its stage. Not by chain time: a head that comes after an outage
        jumps over minutes; nor by the monotonic clock: one that stood still has not seen what happened meanwhile.
        """
        return (self.watched_ms - self.stage_at_ms.get(sid, 0)) // 1000

    @property
    def view_age_s(self) -> int | None:
        """How long ago the newest header arrived; None before the first."""
        return None if self.header is None else (self.now_ms - self.header.seen_at_ms) // 1000

    def reading(self, port: str) -> PortReading | None:
        """The newest reading of this port, if it is fresh enough to decide by."""
        reading = self.ports[port].reading if port in self.ports else None
        if reading is None or self.now_ms - reading.at_ms > self.policy.reading_age_ms_max:
            return None
        return reading

    def rest_register_mwh(self, port: str) -> int | None:
        """The register, if two readings in a row, without power offered, saw the contactor open at the same value. Else None."""
        reading = self.reading(port)
        if reading is None:
            return None
        previous = self.ports[port].previous
        if previous is None or not (reading.seen_open and previous.seen_open):
            return None
        if reading.register_mwh is None or reading.register_mwh != previous.register_mwh:
            return None
        return reading.register_mwh

    def soc_permille(self, port: str) -> int | None:
        """The battery's charge as two samples agreed on it; None where nobody shows it, or they disagree for too long."""
        agreed = self.ports[port].soc_agreed if port in self.ports else None
        if agreed is None or self.now_ms - agreed[0] > SOC_AGE_MS_MAX:
            return None
        return agreed[1]

    def charges_by_itself(self, port: str) -> bool:
        """It was at rest, nobody offered power, and power flows against our stop for longer than a car takes to hear it."""
        live = self.ports.get(port)
        return live is not None and live.rested and live.held_ms >= self.policy.lock_after_s * 1000

    def held_ms(self, port: str) -> int:
        """For how long this port has been told to stop without being seen open."""
        return self.ports[port].held_ms if port in self.ports else 0

    def silent_ms(self, port: str) -> int:
        """For how long this port has not answered; 0 while it does."""
        live = self.ports.get(port)
        since = self.started_at_ms if live is None or live.reading is None else live.reading.at_ms
        silent = self.now_ms - since
        return silent if silent > self.policy.reading_age_ms_max else 0


@dataclass(frozen=True, slots=True)
class PortRead:
    """Update: a poll succeeded."""

    port: str
    reading: PortReading
    armed: bool
    at_target: bool = False
    held_ms: int = 0
    offered: bool = False  # the engine's word: it owed Deliver while this was read


@dataclass(frozen=True, slots=True)
class PortLost:
    """Update: the charger stopped answering; whatever was armed must be armed and read back again."""

    port: str
    held_ms: int = 0  # a stop that was never seen obeyed goes on counting (rule 8)


@dataclass(frozen=True, slots=True)
class HeaderSeen:
    """Update: a new believed head."""

    number: int
    block_hash: BlockHash
    timestamp_s: int


@dataclass(frozen=True, slots=True)
class Beat:
    """Update: nothing but time has passed."""


@dataclass(frozen=True, slots=True)
class TransactionTried:
    """Update: an attempt at the transaction of this session or bid. `tried` None: it is over."""

    key: bytes
    tried: Tried | None


@dataclass(frozen=True, slots=True)
class PurseSeen:
    """Update: the operator's account was looked at."""

    purse: Purse


Update = PortRead | PortLost | HeaderSeen | Beat | TransactionTried | PurseSeen


def observe(live: Live, update: Update, now_ms: int) -> Live:
    """Live after `update`. Monotonic time never goes back; a header replaces an older one only if it is higher."""
    assert now_ms >= live.now_ms, (now_ms, live.now_ms)
    watched_ms = live.watched_ms + min(now_ms - live.now_ms, LOOK_GAP_MS_MAX)
    live = replace(live, now_ms=now_ms, watched_ms=watched_ms)
    match update:
        case PortRead(port=port, reading=reading):
            before = live.ports.get(port, PortLive())
            previous = None if before.offered or update.offered else before.reading
            now = PortLive(
                reading,
                previous,
                update.armed,
                update.at_target,
                update.held_ms,
                update.offered,
                (before.rested or reading.seen_open) and not update.offered,
                *_soc(before, reading),
            )
            return replace(live, ports={**live.ports, port: now})
        case PortLost(port=port):
            before = live.ports.get(port, PortLive())
            lost = replace(before, previous=None, armed=False, at_target=False, held_ms=update.held_ms)
            return replace(live, ports={**live.ports, port: lost})
        case HeaderSeen():
            if live.header is not None and update.number <= live.header.number:
                return live  # an old head served as new must not refresh our view
            header = Header(update.number, update.block_hash, update.timestamp_s, now_ms)
            return replace(live, header=header)
        case TransactionTried(key=key, tried=tried):
            others = {other: kept for other, kept in live.tried.items() if other != key}
            return replace(live, tried=others if tried is None else {**others, key: tried})
        case PurseSeen(purse=purse):
            return replace(live, purse=purse)
        case Beat():
            return live


def _soc(before: PortLive, reading: PortReading) -> tuple[tuple[int, int] | None, tuple[int, int] | None]:
    """(newest sample, newest agreed one) after this reading."""
    last = before.soc_sample
    if reading.soc_permille is None or (last is not None and reading.at_ms - last[0] < SOC_SAMPLE_GAP_MS):
        return last, before.soc_agreed
    sample = (reading.at_ms, reading.soc_permille)
    agrees = last is not None and abs(sample[1] - last[1]) <= SOC_JITTER_PERMILLE
    return sample, sample if agrees else before.soc_agreed


def offered(live: Live, port: str) -> Live:
    """Live from the moment power is offered on `port`: what was read before proves no rest any more (rule 1)."""
    if port not in live.ports:
        return live
    return replace(
        live, ports={**live.ports, port: replace(live.ports[port], previous=None, offered=True, rested=False)}
    )


def moved(live: Live, sid: SessionId, *, is_open: bool) -> Live:
    """Live from the moment a session enters another stage: waits in it count from here. Closed sessions are forgotten."""
    kept = {other: at_ms for other, at_ms in live.stage_at_ms.items() if other != sid}
    if is_open:
        return replace(live, stage_at_ms={**kept, sid: live.watched_ms})
    return replace(live, stage_at_ms=kept, tried={key: one for key, one in live.tried.items() if key != sid})
