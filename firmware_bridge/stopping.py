"""When to taper and when to stop, so that the lifetime counter lands on the order. Pure; time is an argument.

The counter shows steps, late; a car follows the pilot late. Three ideas make the stop exact (BRIDGE 12 and 13):

1. *Bounds, not guesses.* True energy is kept as an interval of integers. Power widens it between readings; every
   step of the counter cuts it: "it just turned to N" means the truth is N plus what flowed since the last look.
2. *Taper.* Before the end the current goes to the minimum, early enough for the slowest car the model allows. The
   car's answer to the taper is watched, and its lag is then known instead of feared.
3. *An instant, not a poll.* The stop is scheduled for the moment from which even the lower bound is the target.

So the counter ends at the target or a little above. What is above is the provider's loss, never billed. Should a car
stop sooner than it ever showed, the delivery resumes at the minimum and ends by the counter alone: it never ends
short for good.

May not know: the wire, sessions, who pays.
"""

from __future__ import annotations

from dataclasses import dataclass

from firmware_bridge.charger import Limits, Reading

_MJ_PER_MWH = 3600  # W x ms = mJ, so energy between readings is exact in integers
_METER_PERMILLE = (
    20  # how far measured power may be off: class B is 1 %, and as much again for what happens in between
)
_BLIND_MS = (
    2_000  # no reading for longer: power in between is unknown, anything up to the offer may have flowed
)
_REACTED_PERMILLE = 50  # the car has reacted once power fell by this much of the way to the taper
_STEP_RESERVE_MWH_MAX = (
    10_000  # a coarse counter (100 Wh) is not waited for at the minimum: that would take minutes
)
_JITTER_MS = 100  # no box and no car answers twice after the very same time; counting on it would end short
_SETTLED_READINGS = 2  # equal readings, seen open, before a short end counts as short


@dataclass(frozen=True, slots=True)
class StopModel:
    """How slow the slowest car and box may be. The defaults suit an unknown car; a known quick one may be told.

    `ev_lag_ms`: from the pilot's change until the car begins to follow, at most (IEC 61851-1 allows 5 s).
    `ramp_ma_per_s`: how fast it then changes, at least. `command_latency_ms`: from our write to the pilot, at most.
    `meter_refresh_ms`: how old the counter's value may be when it is read.
    """

    ev_lag_ms: int = 4_000
    ramp_ma_per_s: int = 8_000
    command_latency_ms: int = 200
    meter_refresh_ms: int = 0

    @property
    def reaction_ms(self) -> int:
        """From our command to the first change of the current, at most."""
        return self.ev_lag_ms + self.command_latency_ms


@dataclass(frozen=True, slots=True)
class Plan:
    """What to do now. `current_ma` 0: hold. `stop_at_ms`: hold at that instant, even between two beats."""

    current_ma: int
    stop_at_ms: int | None
    reached: bool


class StopPlanner:
    """One delivery's estimate of the truth and the plan to end it. Feed every reading to `observe`, then ask `plan`.

    Times are the readings' `at_ms`. The planner remembers what it last told to do, and assumes it was done at once.
    """

    def __init__(self, limits: Limits, model: StopModel) -> None:
        self.limits = limits
        self.model = model
        self._at_ms: int | None = None
        self._power_w = 0
        self._low_mj = 0
        self._high_mj = 0
        self._register_mwh: int | None = None
        self._target_mwh: int | None = None
        self._offer_ma = 0
        self._offer_since_ms = 0
        self._tapered = False
        self._taper_from_w = 0
        self._reaction_low_ms = 0  # how soon the car follows at the earliest; learned from the taper
        self._reacted = False
        self._stop_at_ms: int | None = None
        self._stopped = False
        self._settled = 0

    # -------------------------------------------------------------- what is true
    def observe(self, reading: Reading) -> None:
        """Take in one reading; older ones than the last are ignored."""
        if self._at_ms is not None and reading.at_ms <= self._at_ms:
            return
        self._watch_reaction(reading)
        self._count_settled(reading)
        self._narrow(reading)
        self._at_ms, self._power_w = reading.at_ms, max(0, reading.power_w)
        if reading.register_mwh is not None:
            self._register_mwh = reading.register_mwh

    def _narrow(self, reading: Reading) -> None:
        """Widen the interval by what may have flowed, then cut it by what the counter shows."""
        if self._at_ms is not None:
            elapsed_ms = reading.at_ms - self._at_ms
            power_w = max(0, reading.power_w)
            least_w, most_w = sorted((power_w, self._power_w))
            if elapsed_ms > _BLIND_MS:
                least_w, most_w = 0, max(most_w, self._nominal_w(self.limits.current_ma_max))
            self._low_mj += least_w * elapsed_ms * (1000 - _METER_PERMILLE) // 1000
            self._high_mj += most_w * elapsed_ms * (1000 + _METER_PERMILLE) // 1000
        if reading.register_mwh is None:
            return
        shown_mj = reading.register_mwh * _MJ_PER_MWH
        stale_mj = max(reading.power_w, self._power_w, 0) * self.model.meter_refresh_ms
        above_mj = shown_mj + self.limits.counter_step_mwh * _MJ_PER_MWH + stale_mj
        if self._register_mwh is None:
            self._low_mj, self._high_mj = shown_mj, above_mj
            return
        self._low_mj = max(self._low_mj, shown_mj)
        self._high_mj = min(self._high_mj, above_mj)
        if self._low_mj > self._high_mj:  # power and counter contradict each other: the counter is what bills
            self._low_mj, self._high_mj = shown_mj, above_mj

    def _watch_reaction(self, reading: Reading) -> None:
        """Learn the lag: the taper was told at `_offer_since_ms`; power left its level between the last look and this."""
        if not self._tapered or self._reacted or self._at_ms is None:
            return
        goal_w = self._nominal_w(self._offer_ma)
        way_w = self._taper_from_w - goal_w
        if way_w <= 0 or self._taper_from_w - reading.power_w < way_w * _REACTED_PERMILLE // 1000:
            return
        self._reacted = True
        seen_ms = min(self._at_ms - self._offer_since_ms, self.model.reaction_ms)
        self._reaction_low_ms = max(0, seen_ms - _JITTER_MS)

    def _count_settled(self, reading: Reading) -> None:
        same = (
            reading.seen_open
            and reading.register_mwh is not None
            and reading.register_mwh == self._register_mwh
        )
        self._settled = self._settled + 1 if self._stopped and same else 0

    # -------------------------------------------------------------- what to do
    def plan(self, now_ms: int, target_register_mwh: int, offer_ma: int) -> Plan:
        """What to do at `now_ms` to land on `target_register_mwh`, offering at most `offer_ma` per phase."""
        if target_register_mwh != self._target_mwh:
            self._target_mwh = target_register_mwh
            self._tapered = self._stopped = False
            self._stop_at_ms = None
        if self._register_mwh is None or self._at_ms is None:
            return self._told(0, now_ms)  # nothing is known yet: nothing flows
        if self._register_mwh + self.limits.counter_step_mwh > target_register_mwh:
            self._stopped = True
            return Plan(0, None, reached=True)
        if self._stopped or (self._stop_at_ms is not None and now_ms >= self._stop_at_ms):
            self._stopped = True
            if self._settled < _SETTLED_READINGS:
                return self._told(0, now_ms)
            self._resume()
        return self._deliver(now_ms, target_register_mwh * _MJ_PER_MWH, offer_ma)

    def _resume(self) -> None:
        """It ended short: the car stopped sooner than it had shown. Go on at the minimum, and trust no lag any more."""
        self._stopped = False
        self._stop_at_ms = None
        self._settled = 0
        self._tapered = self._reacted = True
        self._reaction_low_ms = 0

    def _deliver(self, now_ms: int, target_mj: int, offer_ma: int) -> Plan:
        taper_ma = min(offer_ma, max(self.limits.current_ma_min, offer_ma // 20))
        if not self._tapered and target_mj - self._high_at(now_ms) <= self._taper_mj(
            now_ms, offer_ma, taper_ma
        ):
            self._tapered, self._reacted = True, False
            self._taper_from_w = self._power_w
        if not self._tapered:
            return self._told(offer_ma, now_ms)
        plan = self._told(taper_ma, now_ms)
        self._stop_at_ms = self._stop_instant(target_mj, taper_ma)
        if self._stop_at_ms is not None and self._stop_at_ms <= now_ms:
            self._stopped = True
            return self._told(0, now_ms)
        return Plan(plan.current_ma, self._stop_at_ms, reached=False)

    def _told(self, current_ma: int, now_ms: int) -> Plan:
        if current_ma != self._offer_ma:
            self._offer_ma, self._offer_since_ms = current_ma, now_ms
        return Plan(current_ma, None, reached=False)

    # -------------------------------------------------------------- arithmetic
    def _nominal_w(self, current_ma: int) -> int:
        return current_ma * self.limits.voltage_mv * self.limits.phase_count // 1_000_000

    def _high_at(self, now_ms: int) -> int:
        """Upper bound of the truth now, a little after the last reading."""
        since_ms = max(0, now_ms - (self._at_ms or now_ms))
        return self._high_mj + self._power_w * since_ms * (1000 + _METER_PERMILLE) // 1000

    def _ramp_ms(self, current_ma: int) -> int:
        return current_ma * 1000 // max(1, self.model.ramp_ma_per_s)

    def _taper_mj(self, now_ms: int, offer_ma: int, taper_ma: int) -> int:
        """Energy that must still be owed when the taper begins: the slowest car, its ramp, and room to land at the minimum."""
        steady_after_ms = self.model.reaction_ms + self._ramp_ms(offer_ma)
        steady = self._offer_ma == offer_ma and now_ms - self._offer_since_ms > steady_after_ms
        power_w = self._nominal_w(offer_ma)
        if steady:  # the car takes what it takes, often less than it is offered
            power_w = self._power_w * (1000 + 2 * _METER_PERMILLE) // 1000
        least_w = min(power_w, self._nominal_w(taper_ma))
        following_mj = power_w * (self.model.reaction_ms + self.limits.poll_interval_ms)
        ramp_mj = (power_w + least_w) * self._ramp_ms(offer_ma - taper_ma) // 2
        step_mwh = min(self.limits.counter_step_mwh, _STEP_RESERVE_MWH_MAX)
        return following_mj + ramp_mj + least_w * self.model.reaction_ms + step_mwh * _MJ_PER_MWH

    def _stop_instant(self, target_mj: int, taper_ma: int) -> int | None:
        """When to hold so that even the lower bound, and the earliest reaction of the car, reach the target."""
        assert self._at_ms is not None
        # While the current is still on its way down, count on no more than the taper's own power.
        power_w = min(self._power_w, max(1, self._nominal_w(taper_ma)) * 11 // 10)
        power_w = power_w * (1000 - _METER_PERMILLE) // 1000
        if power_w <= 0:
            return None
        missing_mj = target_mj - self._low_mj - power_w * self._reaction_low_ms
        return self._at_ms + max(0, -(-missing_mj // power_w))
