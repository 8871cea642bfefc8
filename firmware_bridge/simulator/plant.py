"""The physics behind the simulated charger: EV, relay, battery, energy and the failsafe timer. Pure: time is
an argument.

Rules
* Integers only. Energy is kept in microjoules (mW x ms), so that nothing is ever rounded: 1 mWh = 3 600 000
  uJ.
* Time moves by `advance(now_ms)` only, and every event (EV lag over, timer expired, relay moved) happens at
  its own instant, however seldom somebody looks.
* The failsafe timer really cuts: when it expires with 0 A the relay opens at once, under load.

May not know: Modbus, maps, wall clocks, the bridge that drives it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

UJ_PER_MWH = 3_600_000
_STEP_MS = (
    10  # the finest slice of a ramp; a trapezoid over 10 ms of the fastest ramp is off by less than 0.01 Wh
)
_RELAY_MS = 150  # a contactor's own travel

# What can be wrong with the world behind the wire, for `Plant.suffer`. Several at once are possible.
PLANT_FAULTS: dict[str, str] = {
    "contactor_stuck": "the relay does not open any more (with car_deaf, the current flows on as well)",
    "ignores_stop": "disable and a lower limit are taken and shown, and not done; lock and failsafe still work",
    "charges_while_disabled": "it charges at its most whatever was written; lock and failsafe still work",
    "counter_frozen": "the energy counter stands still while energy flows",
    "failsafe_tripped": "the box's failsafe falls at that instant, whoever speaks to it",
    "car_deaf": "the car goes on as it is, whatever the pilot says",
    "car_stops": "the car draws nothing",
    "car_unplugged": "the cable is pulled out of the car",
}


@dataclass(frozen=True, slots=True)
class PlantConfig:
    """One car, one box, one cable. `ev_*` describe how the car follows the pilot; `register_mwh_begin` is the
    meter's past.
    """

    voltage_mv: int = 230_000
    phase_count: int = 3
    current_ma_max: int = 32_000  # what the box can offer
    ev_current_ma_max: int = 32_000  # what the car can draw
    current_ma_min: int = 6_000
    ev_lag_ms: int = 500
    ev_ramp_ma_per_s: int = 60_000
    force_open_ms: int = (
        6_000  # the box opens under load when the car ignores the stop this long (IEC 61851-1)
    )
    register_mwh_begin: int = 1_234_567_000
    battery_mwh: int = 60_000_000
    soc_permille_begin: int = 800
    plugged: bool = True
    contactor_stuck: bool = False


class Plant:
    """The true state of the simulated world. Methods without `now_ms` show the state as of the last
    `advance`.
    """

    def __init__(self, config: PlantConfig, now_ms: int = 0) -> None:
        self.config = config
        self.now_ms = now_ms
        self.energy_uj = 0  # delivered since begin: the truth nobody on the wire can see
        self.offered_ma = 0  # the set point as written
        self.enabled = False
        self.locked = False
        self.contactor_closed = False
        self.current_ma = 0  # per phase, what really flows
        self.ev_goal_ma = 0  # what the car is heading for
        self.failsafe_timeout_ms = 0  # 0: not armed
        self.failsafe_current_ma = config.current_ma_min
        self.failsafe_tripped = False
        # It tripped while power was offered; a timer that runs out on an idle box is no fault.
        self.failsafe_cut = False
        self.faults: frozenset[str] = frozenset()  # of PLANT_FAULTS, that hold now
        self.zero_at_ms: int | None = None  # when the current was last seen to end
        self.supplied = True  # false once an external cut-off took the box's supply away
        self._frozen_register_mwh = 0
        self._fed_ms = now_ms
        self._pilot_ma = 0  # what the pilot tells the car
        self._ev_hears_at_ms: int | None = None
        self._relay_at_ms: int | None = None
        self._stop_since_ms: int | None = None

    # -------------------------------------------------------------- what the wire does to it
    def set_limit(self, current_ma: int, now_ms: int) -> None:
        """The set point, per phase. Below the minimum means stop."""
        self.advance(now_ms)
        self.offered_ma = min(current_ma, self.config.current_ma_max)
        self._pilot_changed()

    def enable(self, on: bool, now_ms: int) -> None:
        """Release or withdraw the charge."""
        self.advance(now_ms)
        self.enabled = on
        self._pilot_changed()

    def lock(self, on: bool, now_ms: int) -> None:
        """The firm stop: the relay opens at once."""
        self.advance(now_ms)
        self.locked = on
        if on:
            self._open_now()
        self._pilot_changed()

    def feed(self, now_ms: int) -> None:
        """Somebody is there: start the failsafe timer again. A tripped one is over, but the set point it cut
        stays 0.
        """
        self.advance(now_ms)
        self._fed_ms = now_ms
        self.failsafe_tripped = self.failsafe_cut = False

    def arm_failsafe(
        self, now_ms: int, *, timeout_ms: int | None = None, current_ma: int | None = None
    ) -> None:
        """Set the timer (0 turns it off) or the current it falls back to."""
        self.advance(now_ms)
        self._fed_ms = now_ms
        if timeout_ms is not None:
            self.failsafe_timeout_ms = timeout_ms
        if current_ma is not None:
            self.failsafe_current_ma = current_ma

    def plug(self, plugged: bool, now_ms: int) -> None:
        """Insert or pull the cable; pulling it opens the relay at once."""
        self.advance(now_ms)
        self.config = replace(self.config, plugged=plugged)
        if not plugged:
            self._open_now()
        self._pilot_changed()

    def suffer(self, faults: frozenset[str], now_ms: int) -> None:
        """From now on exactly these of PLANT_FAULTS are wrong."""
        self.advance(now_ms)
        new, gone, self.faults = faults - self.faults, self.faults - faults, faults
        if "counter_frozen" in new:
            self._frozen_register_mwh = self.register_mwh
        if "failsafe_tripped" in new:
            self._trip()
        if "car_unplugged" in new | gone:
            self.plug("car_unplugged" in gone, now_ms)
        self._pilot_changed()

    def cut_off(self, now_ms: int) -> None:
        """Somebody opens the contactor in front of the box: nothing flows, whatever the box and its relay do."""
        self.advance(now_ms)
        self.supplied = False
        self._end_current()

    # -------------------------------------------------------------- what can be seen
    @property
    def power_mw(self) -> int:
        """True power, mW, provider to consumer."""
        return self.config.phase_count * self.config.voltage_mv * self.current_ma // 1000

    @property
    def power_w(self) -> int:
        """True power, W."""
        return self.power_mw // 1000

    @property
    def delivered_mwh(self) -> int:
        """True energy since the simulation began, whole mWh."""
        return self.energy_uj // UJ_PER_MWH

    @property
    def register_mwh(self) -> int:
        """What an ideal meter with 1 mWh steps would show."""
        return self.config.register_mwh_begin + self.delivered_mwh

    @property
    def register_mwh_shown(self) -> int:
        """What the box's own meter believes."""
        return self._frozen_register_mwh if "counter_frozen" in self.faults else self.register_mwh

    @property
    def contactor_stuck(self) -> bool:
        """True while the relay would not open."""
        return self.config.contactor_stuck or "contactor_stuck" in self.faults

    @property
    def soc_permille(self) -> int:
        """The provider's battery, drained by what was delivered."""
        left = self.config.battery_mwh * self.config.soc_permille_begin // 1000 - self.delivered_mwh
        return max(0, left * 1000 // self.config.battery_mwh)

    @property
    def pilot_state(self) -> str:
        """IEC 61851: A no vehicle, B plugged, C drawing."""
        if not self.config.plugged:
            return "A"
        return "C" if self.contactor_closed or self._pilot_ma else "B"

    @property
    def fault(self) -> str:
        """The one fault to show, "" for none."""
        if self.failsafe_cut:
            return "failsafe_tripped"
        return (
            "contactor_stuck"
            if self.contactor_stuck and self._pilot_ma == 0 and self.contactor_closed
            else ""
        )

    # -------------------------------------------------------------- time
    def advance(self, now_ms: int) -> None:
        """Let the world run until `now_ms`."""
        while self.now_ms < now_ms:
            until_ms = min([now_ms, *[at for at in self._events() if at > self.now_ms]])
            ramping = self.current_ma != self._current_goal_ma()
            self._flow(min(until_ms, self.now_ms + _STEP_MS) if ramping else until_ms)
            self._happen()

    def _events(self) -> list[int]:
        found = [at for at in (self._ev_hears_at_ms, self._relay_at_ms) if at is not None]
        if self._stop_since_ms is not None:
            found.append(self._stop_since_ms + self.config.force_open_ms)
        if self.failsafe_timeout_ms and not self.failsafe_tripped:
            found.append(self._fed_ms + self.failsafe_timeout_ms)
        return found

    def _flow(self, until_ms: int) -> None:
        """Integrate to `until_ms` (a trapezoid), moving the current along its ramp."""
        elapsed_ms = until_ms - self.now_ms
        before_mw = self.power_mw
        goal_ma = self._current_goal_ma()
        most_ma = max(1, self.config.ev_ramp_ma_per_s * elapsed_ms // 1000)
        self.current_ma += max(-most_ma, min(most_ma, goal_ma - self.current_ma))
        self.energy_uj += (before_mw + self.power_mw) * elapsed_ms // 2
        self.now_ms = until_ms
        if before_mw and not self.current_ma:
            self.zero_at_ms = until_ms

    def _current_goal_ma(self) -> int:
        if not self.contactor_closed or not self.supplied or "car_stops" in self.faults:
            return 0
        return min(self.ev_goal_ma, self.config.ev_current_ma_max)

    def _happen(self) -> None:
        """Everything that is due now."""
        now_ms = self.now_ms
        due = self._fed_ms + self.failsafe_timeout_ms
        if self.failsafe_timeout_ms and not self.failsafe_tripped and now_ms >= due:
            self._trip()
        hears = self._ev_hears_at_ms is not None and now_ms >= self._ev_hears_at_ms
        if hears and "car_deaf" not in self.faults:
            self.ev_goal_ma = self._pilot_ma
            self._ev_hears_at_ms = None
        if self._relay_at_ms is not None and now_ms >= self._relay_at_ms:
            self.contactor_closed = True
            self._relay_at_ms = None
        if self._stop_since_ms is not None:
            forced = now_ms >= self._stop_since_ms + self.config.force_open_ms
            if (self.current_ma == 0 and self.ev_goal_ma == 0) or forced:
                self._open_now()

    def _trip(self) -> None:
        self.failsafe_tripped = True
        self.failsafe_cut = self._pilot_ma > 0
        self.offered_ma = min(self.offered_ma, self.failsafe_current_ma)
        if self.offered_ma < self.config.current_ma_min:
            self.offered_ma = 0
            self._open_now()
        self._pilot_changed()

    def _pilot_changed(self) -> None:
        """Tell the car what it may draw now; it hears after its lag."""
        may_draw = self.enabled and not self.locked and self.config.plugged
        wanted_ma = self.offered_ma if may_draw and self.offered_ma >= self.config.current_ma_min else 0
        if self.config.plugged and not self.locked and not self.failsafe_tripped:
            if "charges_while_disabled" in self.faults:
                wanted_ma = self.config.current_ma_max
            elif "ignores_stop" in self.faults and wanted_ma < self._pilot_ma:
                return
        if wanted_ma == self._pilot_ma:
            return
        self._pilot_ma = wanted_ma
        self._ev_hears_at_ms = self.now_ms + self.config.ev_lag_ms
        if wanted_ma:
            self._stop_since_ms = None
            if not self.contactor_closed and self._relay_at_ms is None:
                self._relay_at_ms = self.now_ms + _RELAY_MS
        else:
            self._relay_at_ms = None
            self._stop_since_ms = self.now_ms if self.contactor_closed else None

    def _open_now(self) -> None:
        self._stop_since_ms = None
        self._relay_at_ms = None
        if self.contactor_stuck and self.contactor_closed:
            return  # the welded relay: everything was commanded, and the current flows on
        self.contactor_closed = False
        self._end_current()

    def _end_current(self) -> None:
        if self.current_ma:
            self.current_ma, self.zero_at_ms = 0, self.now_ms
