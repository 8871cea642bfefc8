"""Commissioning one charger: is it what the map says, does it measure right, does it stop by itself when nobody speaks to it?

Rules
* Every check has a name and a sentence about what was found. One that fails does not end the others, unless they need it: a
  device that is half broken still tells what works.
* Power flows twice, at the least current that shows what has to be seen, for seconds, and never before the failsafe is armed.
  Far more power than was asked for ends a check at once.
* It always ends safe: held, else locked, else cut off, and *seen* open, also on an error and when it is cancelled; a failure
  to end safe fails the whole, loudly.
* The failsafe is shown by silence: not one byte on the wire for the armed time and as long as a car may take to follow. So the
  proof is the same for every kind of failsafe.

May not know: Modbus, RAPI, keys, files, the agent.
Source: BRIDGE rules 7, 8, 9; thresholds of IEC 61851-1 as in research (a car may take 5 s to follow, a box opens after 6 s).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, TypeVar

from firmware_bridge.charger import BridgeError, Charger, Identity, MapError, Reading

Told = TypeVar("Told")
Result = Literal["passed", "failed", "skipped"]
VOLTAGE_MV = (100_000, 280_000)
FREQUENCY_MHZ = (45_000, 65_000)
EXCESS_PERCENT = (
    150  # more power than this share of what was asked ends the check: the set point's scale is wrong
)
AGREE_PERCENT = (
    10  # counter against power: a scale that is wrong is wrong by 1000 or 10, or by a factor of phases
)
PRODUCT_PERCENT = 30  # power against volts x amperes x phases: includes the power factor of a weak charger
LEAST_MA = 6_000  # IEC 61851-1
STEPS_MIN = 3  # of the counter, before it is compared with anything
THROTTLED_EXTRA_MA = 4_000  # what a failsafe that only throttles can be seen to take away
ZEROS_MIN = 3  # readings without power, before a cut-off is believed
DARK_SLACK_MS = 5_000  # between the newest reading and the cut, at most


@dataclass(frozen=True, slots=True)
class Patience:
    """How long things may take. Seconds."""

    begin_s: float = 60.0  # a car begins when it is offered power, also for the second time
    follow_s: float = 10.0  # it follows or ends, and a box opens under load
    silent_s: float = 10.0  # the same, when nobody looks meanwhile; on top of the failsafe's own time
    rest_s: float = 1.0  # between two looks at a counter that must stand still
    refresh_s: float = 2.0  # the slowest meter refresh allowed for; power must flow for four of them
    pulse_s_max: float = 120.0  # a counter of 10 Wh steps at 6 A on one phase needs 80 s for three
    coarse_s_max: float = 900.0  # one of 100 Wh steps needs 260 s for a single one
    cut_off_s: float = 180.0  # somebody walks to the cut-off and makes it open
    answer_s: float = 5.0  # a device that does not answer is asked again for this long
    lock_after_s: float = 5.0
    safe_s: float = 20.0  # the end: then somebody must open the breaker


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer."""

    name: str
    result: Result
    found: str


@dataclass(slots=True)
class Outcome:
    """Everything that was found. `measured` in the units of its names."""

    checks: list[Check] = field(default_factory=list)
    measured: dict[str, int] = field(default_factory=dict)
    identity: Identity | None = None

    @property
    def passed(self) -> bool:
        """True when nothing failed and nothing was left out."""
        return bool(self.checks) and all(check.result == "passed" for check in self.checks)

    def as_dict(self) -> dict[str, object]:
        """For the report."""
        return {
            "passed": self.passed,
            "identity": {} if self.identity is None else asdict(self.identity),
            "checks": [asdict(check) for check in self.checks],
            "measured": dict(sorted(self.measured.items())),
        }


class Failed(Exception):
    """A check's answer is no, for this reason."""


# ------------------------------------------------------------------ judging; pure
def judge_mains(values: Mapping[str, object]) -> str:
    """What voltage and frequency the device shows. Raises Failed for no mains: a wrong word order or scale shows here."""
    found = []
    for name, (low, high), unit in (("voltage_mv", VOLTAGE_MV, "V"), ("frequency_mhz", FREQUENCY_MHZ, "Hz")):
        value = values.get(name)
        if not isinstance(value, int):
            found.append(f"{unit} not measured")
        elif not low <= value <= high:
            raise Failed(
                f"{value / 1000:g} {unit} is no mains; is the scale, the word order or the wiring wrong?"
            )
        else:
            found.append(f"{value / 1000:g} {unit}")
    return ", ".join(found)


def judge_counter(counted_mwh: int, flowed_uwh: int, power_w: int, step_mwh: int, refresh_ms: int) -> str:
    """The counter against the integral of power; a meter may lag by `refresh_ms`. Raises Failed saying how they differ."""
    if counted_mwh < 0:
        raise Failed(
            f"the counter went back by {-counted_mwh} mWh while power flowed: turn the meter's direction"
        )
    if counted_mwh == 0:
        raise Failed(
            "the counter stood still while power flowed: is it the right counter, and in this direction?"
        )
    expected_mwh = flowed_uwh // 1000
    allowed_mwh = expected_mwh * AGREE_PERCENT // 100 + 2 * step_mwh + power_w * refresh_ms // 3600
    if abs(counted_mwh - expected_mwh) > allowed_mwh:
        ratio = counted_mwh * 100 // max(1, expected_mwh)
        raise Failed(
            f"the counter grew by {counted_mwh} mWh, power says {expected_mwh} mWh ({ratio} %): one scale is wrong"
        )
    return f"counter +{counted_mwh} mWh, power says {expected_mwh} mWh"


def judge_power(power_w: int, current_ma: int, voltage_mv: int, phase_count: int, offered_ma: int) -> str:
    """Power against sign, set point and volts x amperes. `current_ma` 0: not measured. Raises Failed."""
    if power_w < 0:
        raise Failed(f"{power_w} W: energy to the consumer must be positive; turn the meter's direction")
    offered_w = offered_ma * voltage_mv * phase_count // 1_000_000
    if power_w * 100 > offered_w * EXCESS_PERCENT:
        raise Failed(
            f"{power_w} W flow, {offered_w} W were offered: the set point or the power has a wrong scale"
        )
    if current_ma:
        product_w = current_ma * voltage_mv * phase_count // 1_000_000
        if abs(power_w - product_w) * 100 > product_w * PRODUCT_PERCENT:
            # A car on fewer phases than are wired is no fault.
            phases = [n for n in (1, 2, 3) if _near(power_w, current_ma * voltage_mv * n // 1_000_000)]
            if not phases or phases[0] > phase_count:
                raise Failed(
                    f"{power_w} W, but volts x amperes x phases is {product_w} W: one scale is wrong"
                )
            return f"{power_w} W: a car on {phases[0]} of {phase_count} phases"
    return f"{power_w} W of {offered_w} W offered"


def _near(power_w: int, product_w: int) -> bool:
    return abs(power_w - product_w) * 100 <= product_w * PRODUCT_PERCENT


# ------------------------------------------------------------------ doing
@dataclass(frozen=True, slots=True)
class Subject:
    """What is commissioned. `look` reads every quantity once, before the charger is opened (many take one connection only).

    `cut_off`: the name of the external cut-off, where the device's own failsafe does not stop; None where it does.
    """

    open: Callable[[], Awaitable[Charger]]
    open_to_stop: Callable[[], Awaitable[Charger]]
    look: Callable[[], Awaitable[Mapping[str, object]]]
    failsafe_timeout_s: int
    cut_off: str | None


class Commissioning:
    """`outcome = await Commissioning(subject, tell).run()`; raises nothing for a device that is broken."""

    def __init__(
        self,
        subject: Subject,
        tell: Callable[[Check], None],
        patience: Patience | None = None,
        instruct: Callable[[str], None] = lambda _: None,
    ) -> None:
        """`tell` hears each answer, `instruct` what somebody has to do now."""
        self.subject, self.tell, self.instruct = subject, tell, instruct
        self.patience = patience or Patience()
        self.outcome = Outcome()
        self._charger: Charger | None = None
        self._newest: Reading | None = None

    async def run(self) -> Outcome:
        """Every check, and a safe end whatever happens; also when the task is cancelled (then CancelledError goes on)."""
        try:
            await self._run()
        finally:
            await _to_the_end(self._end())
        return self.outcome

    async def _run(self) -> None:
        checks: tuple[tuple[str, Callable[[], Awaitable[str]], tuple[str, ...]], ...] = (
            ("mains", self._mains, ()),
            ("answers", self._answers, ()),
            ("identity", self._identify, ("answers",)),
            ("off at first", self._off_at_first, ("answers",)),
            ("counter at rest", self._counter_at_rest, ("off at first",)),
            ("failsafe armed", self._arm, ("off at first",)),
            ("car", self._car, ("answers",)),
            ("pulse", self._pulse, ("counter at rest", "failsafe armed", "car")),
            ("stop", self._stop, ("pulse",)),
            ("failsafe by silence", self._silence, ("pulse", "stop")),
            ("external cut-off", self._cut_off, ("pulse", "stop")),
        )
        for name, ask, needs in checks:
            if name == "external cut-off" and self.subject.cut_off is None:
                continue
            missing = [need for need in needs if not self._has_passed(need)]
            if missing:
                self._note(name, "skipped", f"needs: {', '.join(missing)}")
                continue
            try:
                self._note(name, "passed", await ask())
            except Failed as why:
                self._note(name, "failed", str(why))
            except (BridgeError, MapError) as error:
                self._note(name, "failed", str(error))
            if name != "pulse" or not self._has_passed(name):
                await self._hold_quietly()

    def _has_passed(self, name: str) -> bool:
        return any(check.name == name and check.result == "passed" for check in self.outcome.checks)

    def _note(self, name: str, result: Result, found: str) -> None:
        check = Check(name, result, found)
        self.outcome.checks.append(check)
        self.tell(check)

    @property
    def _least_ma(self) -> int:
        """The least current that surely flows; a device that is told watts has no least current of its own."""
        limits = self.charger.limits
        return min(limits.current_ma_min or LEAST_MA, limits.current_ma_max)

    @property
    def charger(self) -> Charger:
        """The open charger."""
        if self._charger is None:
            raise Failed("it does not answer")
        return self._charger

    # -------------------------------------------------------------- looking
    async def _mains(self) -> str:
        values = await self._patiently(self.subject.look)
        return judge_mains(values)

    async def _answers(self) -> str:
        self._charger = await self._patiently(self.subject.open)
        await self._patiently(self._read)
        return f"every {self.charger.limits.poll_interval_ms} ms at most"

    async def _patiently(self, ask: Callable[[], Awaitable[Told]]) -> Told:
        """Ask again for a while: a cable that is being fastened, a device that is just starting."""
        until_s = _now_s() + self.patience.answer_s
        while True:
            try:
                return await ask()
            except BridgeError:
                if _now_s() > until_s:
                    raise
                await asyncio.sleep(0.2)

    async def _read(self) -> Reading:
        self._newest = await self.charger.read()
        return self._newest

    async def _identify(self) -> str:
        identity = self.outcome.identity = await self.charger.identify()
        told = [identity.maker, identity.model, identity.serial, identity.firmware]
        return ", ".join(word for word in told if word) or "it does not say who it is"

    async def _off_at_first(self) -> str:
        began_s = _now_s()
        await self.charger.hold()
        await self._until(lambda reading: reading.seen_open, "it was told to stop and is not seen open")
        return f"held, and seen open after {_now_s() - began_s:.1f} s"

    async def _counter_at_rest(self) -> str:
        first = await self._register()
        await asyncio.sleep(self.patience.rest_s)
        second = await self._register()
        if second < first:
            raise Failed(f"the counter went back from {first} to {second} mWh at rest")
        if second - first > 2 * self.charger.limits.counter_step_mwh:
            raise Failed(f"the counter grew by {second - first} mWh with the contactor open")
        return f"{second // 1000} Wh, in steps of {self.charger.limits.counter_step_mwh / 1000:g} Wh"

    async def _register(self) -> int:
        """The counter; a sentinel now and then is no news, a lasting one is."""
        reading = await self._until(lambda seen: seen.register_mwh is not None, "the counter cannot be read")
        assert reading.register_mwh is not None
        return reading.register_mwh

    async def _arm(self) -> str:
        await self.charger.arm(self.subject.failsafe_timeout_s)
        return f"{self.subject.failsafe_timeout_s} s, written and read back"

    async def _car(self) -> str:
        reading = await self._read()
        if reading.fault is not None:
            raise Failed(f"the device shows a fault: {reading.fault}")
        if reading.pilot_state not in ("B", "C", "D"):
            raise Failed(
                f"pilot state {reading.pilot_state}: plug a car in that wants to charge, and try again"
            )
        return f"plugged in (pilot state {reading.pilot_state})"

    # -------------------------------------------------------------- power
    async def _pulse(self) -> str:
        """A short flow at the least current: latency, sign, scale. Leaves it flowing, for the stop."""
        charger, offered_ma = self.charger, self._least_ma
        begin_mwh, began_ms = await self._register(), _now_ms()
        await charger.set_limit(current_ma=offered_ma)
        reading = await self._fed_until(
            offered_ma, lambda seen: abs(seen.power_w) > Reading.IDLE_W, "no power flows"
        )
        self.outcome.measured["start_latency_ms"] = reading.at_ms - began_ms
        flowed_uwh = 0
        least_s = _now_s() + 4 * self.patience.refresh_s
        steps, most_s = self._pulse_length(reading.power_w)
        most_s += _now_s()
        while True:
            before = reading
            reading = await self._fed_reading(offered_ma)
            flowed_uwh += (before.power_w + reading.power_w) * (reading.at_ms - before.at_ms) * 1000 // 7200
            counted_mwh = (reading.register_mwh or begin_mwh) - begin_mwh
            enough = abs(counted_mwh) >= steps * charger.limits.counter_step_mwh and _now_s() > least_s
            if enough or _now_s() > most_s:
                break
        self.outcome.measured |= {"pulse_power_w": reading.power_w, "pulse_counted_mwh": counted_mwh}
        power = judge_power(
            reading.power_w,
            reading.current_ma,
            reading.voltage_mv,
            charger.limits.phase_count,
            offered_ma,
        )
        counter = judge_counter(
            counted_mwh,
            flowed_uwh,
            reading.power_w,
            charger.limits.counter_step_mwh,
            int(self.patience.refresh_s * 1000),
        )
        return f"{power}; {counter}"

    def _pulse_length(self, power_w: int) -> tuple[int, float]:
        """How many steps of the counter to wait for, and how long at most: a coarse counter is seen to tick once."""
        step_s = self.charger.limits.counter_step_mwh * 3.6 / max(1, abs(power_w))
        if (STEPS_MIN + 1) * step_s <= self.patience.pulse_s_max:
            return STEPS_MIN, self.patience.pulse_s_max
        return 1, min(self.patience.coarse_s_max, max(self.patience.pulse_s_max, 2 * step_s))

    async def _stop(self) -> str:
        began_ms = _now_ms()
        await self.charger.hold()
        self.outcome.measured["hold_ms"] = _now_ms() - began_ms
        reading = await self._until(lambda seen: seen.seen_open, "it was told to stop and is not seen open")
        self.outcome.measured["stop_latency_ms"] = reading.at_ms - began_ms
        return f"seen open {(reading.at_ms - began_ms) / 1000:.1f} s after the command"

    async def _silence(self) -> str:
        """Let power flow, say nothing for the armed time, and look what is left of it."""
        offered_ma, floor_w = self._least_ma, Reading.IDLE_W
        if self.subject.cut_off is not None:  # more than the least, so that throttling can be seen
            limits = self.charger.limits
            offered_ma = min(offered_ma + THROTTLED_EXTRA_MA, limits.current_ma_max)
            floor_w = (self._least_ma + 1_000) * limits.voltage_mv // 1_000_000
        await self._flow_again(offered_ma, floor_w)
        silent_s = self.subject.failsafe_timeout_s + self.patience.silent_s
        await asyncio.sleep(silent_s)
        reading = await self._patiently(self._read)
        self.outcome.measured |= {"silence_ms": int(silent_s * 1000), "silence_power_w": reading.power_w}
        what = f"after {silent_s:g} s without a word: "
        if reading.seen_open:
            return f"{what}open, {reading.power_w} W"
        if self.subject.cut_off is not None:
            return f"{what}{reading.power_w} W go on; only {self.subject.cut_off} stops it"
        raise Failed(
            f"{what}{reading.power_w} W still flow: its failsafe does not work; is it set in the device?"
        )

    async def _flow_again(self, offered_ma: int, floor_w: int) -> Reading:
        await self.charger.arm(self.subject.failsafe_timeout_s)
        await self.charger.set_limit(current_ma=offered_ma)
        return await self._fed_until(offered_ma, lambda seen: seen.power_w > floor_w, "no power flows again")

    async def _cut_off(self) -> str:
        """Somebody makes the external cut-off open, while we go on offering power: it must take the power away.

        A box that loses its supply with it goes dark; then its counter, once it is back, must show that nothing flowed meanwhile.
        """
        await self._patiently(self.charger.hold)
        newest = await self._flow_again(self._least_ma, Reading.IDLE_W)
        self.instruct(f"make {self.subject.cut_off} open now, in the way it opens when this computer dies")
        began_s, dark_s, zeros = _now_s(), None, 0
        while zeros < ZEROS_MIN:
            if _now_s() - began_s > self.patience.cut_off_s:
                raise Failed(f"{newest.power_w} W still flow: {self.subject.cut_off} did not open")
            try:
                reading = await self._fed_reading(self._least_ma)
            except BridgeError:
                dark_s = dark_s or _now_s()
                await self._arm_quietly()
                continue
            if dark_s is not None and (reading.register_mwh or 0) - (
                newest.register_mwh or 0
            ) > self._slack_mwh(newest):
                raise Failed("energy flowed while it did not answer: only the wire was cut")
            newest = reading
            zeros = zeros + 1 if abs(reading.power_w) <= Reading.IDLE_W else 0
        return f"{self.subject.cut_off} took the power away" + (" and the box's supply" if dark_s else "")

    def _slack_mwh(self, newest: Reading) -> int:
        """What may have flowed between the newest reading and the cut: some seconds, and two steps."""
        return newest.power_w * DARK_SLACK_MS // 3600 + 2 * self.charger.limits.counter_step_mwh

    async def _arm_quietly(self) -> None:
        """A box that lost its supply forgot its failsafe. Bounded by the wire's own time-outs."""
        await asyncio.sleep(self.charger.limits.poll_interval_ms / 1000)
        with contextlib.suppress(BridgeError):
            await self.charger.arm(self.subject.failsafe_timeout_s)

    async def _fed_reading(self, offered_ma: int) -> Reading:
        """One beat: look, judge, offer again (which feeds the failsafe)."""
        await asyncio.sleep(self.charger.limits.poll_interval_ms / 1000)
        reading = await self._read()
        limits = self.charger.limits
        most_w = offered_ma * reading.voltage_mv * limits.phase_count // 1_000_000 * EXCESS_PERCENT // 100
        if abs(reading.power_w) > most_w + Reading.IDLE_W:
            raise Failed(
                f"{reading.power_w} W flow where {offered_ma} mA were offered: a scale is wrong; stopped at once"
            )
        if reading.fault is not None:
            raise Failed(f"the device shows a fault: {reading.fault}")
        await self.charger.set_limit(current_ma=offered_ma)
        return reading

    async def _fed_until(self, offered_ma: int, holds: Callable[[Reading], bool], otherwise: str) -> Reading:
        until_s = _now_s() + self.patience.begin_s
        while not holds(reading := await self._fed_reading(offered_ma)):
            if _now_s() > until_s:
                raise Failed(f"{otherwise}: {_shown(reading)}")
        return reading

    async def _until(self, holds: Callable[[Reading], bool], otherwise: str) -> Reading:
        until_s = _now_s() + self.patience.follow_s
        while not holds(reading := await self._read()):
            if _now_s() > until_s:
                raise Failed(f"{otherwise}: {_shown(reading)}")
            await asyncio.sleep(self.charger.limits.poll_interval_ms / 1000)
        return reading

    # -------------------------------------------------------------- the end
    async def _hold_quietly(self) -> None:
        with contextlib.suppress(BridgeError, Failed):  # `_end` goes on trying, more firmly
            await self.charger.hold()

    async def _end(self) -> None:
        """Hold, lock, cut off, until it is seen open; the last check says how it went. Then the wire is given back."""
        began_s, problem, reading = _now_s(), "it never answered", None
        try:
            while _now_s() < began_s + self.patience.safe_s:
                firmly = _now_s() > began_s + self.patience.lock_after_s
                try:
                    if self._charger is None:
                        self._charger = await self.subject.open_to_stop()
                    await (self._charger.lock() if firmly else self._charger.hold())
                    reading = await self._charger.read()
                    if reading.seen_open:
                        self._note(
                            "safe at the end", "passed", f"{'locked' if firmly else 'held'}, and seen open"
                        )
                        return
                    problem = f"it was told to stop and is not seen open ({_shown(reading)})"
                    if firmly:
                        await self._charger.cut_off()
                except (BridgeError, MapError) as error:
                    problem = str(error)
                    if isinstance(error, MapError):
                        break
                await asyncio.sleep(0.2)
            self._note("safe at the end", "failed", f"{problem}; OPEN THE BREAKER BY HAND")
        finally:
            if self._charger is not None:
                await self._charger.close()


def _shown(reading: Reading) -> str:
    contactor = {True: "closed", False: "open", None: "not shown"}[reading.contactor_closed]
    return f"pilot {reading.pilot_state}, {reading.power_w} W, contactor {contactor}"


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _now_ms() -> int:
    return int(_now_s() * 1000)


async def _to_the_end(work: Awaitable[None]) -> None:
    """Finish this even when we are cancelled meanwhile, as often as it happens; the cancellation goes on afterwards."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            cancelled = True
    task.result()
    if cancelled:
        raise asyncio.CancelledError
