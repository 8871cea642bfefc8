"""Does this reading make sense after the ones before it? The named faults of BRIDGE rule 8. Pure; integers.

| name | means |
|---|---|
| `counter_backwards` | the lifetime counter is lower than it was: reset, exchanged, or misread |
| `counter_too_fast` | it grew by more than the greatest power could have delivered |
| `counter_disagrees` | counted energy and measured power differ by more than 3 % and two steps |
| `counter_unreadable` | a sentinel, or nothing, for longer than a transient may last |
| `power_unreadable` | no power is shown for that long, so no stop can be seen |
| `power_out_of_range` | more power (either way) than the installation can carry |
| `flow_while_held` | power flows although the charger was told to stop long enough ago |

A fault stays visible for `FAULT_SHOWN_MS` after its last cause, so that whoever looks rarely sees it too.
"""

from __future__ import annotations

from dataclasses import dataclass

FAULT_SHOWN_MS = 5_000
HELD_GRACE_MS = 8_000  # a car may take 5 s to follow, and a box opens under load after 6 s (IEC 61851-1)
_UNREADABLE_MS = 3_000
_REFRESH_MS = (
    2_000  # the slowest meter refresh allowed for: between two reads a counter may catch up on that much
)
_BLIND_MS = 2_000  # after a gap this long the integral of power says nothing; start comparing afresh
_WINDOW_UWH = 500_000_000  # compare counter and power over windows of 500 Wh
_JUDGE_UWH = 50_000_000  # ... and not before a tenth of it: steps and meter lag weigh too much in less
_MARGIN_PERCENT = 20  # a car may draw somewhat more than it was offered before anything is wrong


@dataclass(frozen=True, slots=True)
class Bounds:
    """What the installation can do at most."""

    power_w_max: int
    counter_step_mwh: int
    idle_w: int = 50


class Plausibility:
    """Remembers just enough of the past to judge the next reading. Time is an argument."""

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds
        self._at_ms: int | None = None
        self._register_mwh: int | None = None
        self._register_at_ms = 0
        self._high_water_mwh = 0
        self._power_w = 0
        self._power_at_ms: int | None = None
        self._window_begin_mwh: int | None = None
        self._window_uwh = 0
        self._shown: tuple[str, int] | None = None

    def judge(
        self, at_ms: int, register_mwh: int | None, power_w: int | None, held_since_ms: int | None
    ) -> str | None:
        """The named fault of this reading, or None. `held_since_ms`: when a stop was commanded, None while
        power is offered. `register_mwh` and `power_w` are None where the device showed no value just now.
        """
        found = (
            self._judge_counter(at_ms, register_mwh)
            or self._judge_power(at_ms, power_w, held_since_ms)
            or self._judge_agreement(at_ms, register_mwh, power_w)
        )
        if register_mwh is not None:
            self._register_mwh, self._register_at_ms = register_mwh, at_ms
            self._high_water_mwh = max(self._high_water_mwh, register_mwh)
        elif self._at_ms is None:
            self._register_at_ms = at_ms
        if power_w is not None or self._power_at_ms is None:
            self._power_w, self._power_at_ms = power_w or 0, at_ms
        self._at_ms = at_ms
        if found is not None:
            self._shown = (found, at_ms)
        elif self._shown is not None and at_ms - self._shown[1] > FAULT_SHOWN_MS:
            self._shown = None
        return self._shown[0] if self._shown is not None else None

    def _judge_counter(self, at_ms: int, register_mwh: int | None) -> str | None:
        if register_mwh is None:
            blind_ms = 0 if self._at_ms is None else at_ms - self._register_at_ms
            return "counter_unreadable" if blind_ms > _UNREADABLE_MS else None
        if self._register_mwh is None:
            return None
        if register_mwh < self._high_water_mwh:
            return "counter_backwards"
        elapsed_ms = at_ms - self._register_at_ms + _REFRESH_MS
        most_mwh = self._power_w_most * elapsed_ms // 3600 + 2 * self.bounds.counter_step_mwh
        return "counter_too_fast" if register_mwh - self._register_mwh > most_mwh else None

    @property
    def _power_w_most(self) -> int:
        return self.bounds.power_w_max * (100 + _MARGIN_PERCENT) // 100

    def _judge_power(self, at_ms: int, power_w: int | None, held_since_ms: int | None) -> str | None:
        if power_w is None:
            blind_ms = 0 if self._power_at_ms is None else at_ms - self._power_at_ms
            return "power_unreadable" if blind_ms > _UNREADABLE_MS else None
        if abs(power_w) > self._power_w_most + self.bounds.idle_w:
            return "power_out_of_range"
        held = held_since_ms is not None and at_ms - held_since_ms > HELD_GRACE_MS
        return "flow_while_held" if held and abs(power_w) > self.bounds.idle_w else None

    def _judge_agreement(self, at_ms: int, register_mwh: int | None, power_w: int | None) -> str | None:
        if power_w is None:
            self._window_begin_mwh = None  # what flowed meanwhile is not known
            return None
        if register_mwh is None:
            return None
        if self._window_begin_mwh is None or self._at_ms is None or at_ms - self._at_ms > _BLIND_MS:
            self._window_begin_mwh, self._window_uwh = register_mwh, 0
            return None
        self._window_uwh += (
            (power_w + self._power_w) * (at_ms - self._at_ms) * 1000 // 7200
        )  # trapezoid, W x ms -> uWh
        counted_uwh = (register_mwh - self._window_begin_mwh) * 1000
        most_uwh = max(abs(self._window_uwh), abs(counted_uwh))
        if most_uwh < _JUDGE_UWH:
            return None
        # Besides 3 % and two steps: a meter may show what flowed one refresh ago.
        allowed_uwh = (
            most_uwh * 3 // 100
            + 2000 * self.bounds.counter_step_mwh
            + abs(power_w) * _REFRESH_MS * 1000 // 3600
        )
        wrong = abs(counted_uwh - self._window_uwh) > allowed_uwh
        if wrong or most_uwh > _WINDOW_UWH:
            self._window_begin_mwh, self._window_uwh = register_mwh, 0
        return "counter_disagrees" if wrong else None
