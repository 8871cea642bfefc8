"""Where a delivery ends: how far the truth runs past the order, in Wh, over thousands of simulated evenings.

One evening: a car drawn at random (lag, ramp, and how late it is this time), a box that passes a command on 10-80 ms late, a
power reading up to 1 % off, a counter that shows whole steps only, and a poll that jitters. Ours is `StopPlanner` with the
default `StopModel`, which knows nothing of that car. The peer stops when the counter shows the order, and looks every second,
or every 30 s as home automation does. Same plant, same cars, same run, virtual time.

* `overshoot`: true register at rest - (counter at begin + order). What is above is the provider's loss; it is never billed.
* A meter brings its counter and its power up to date by its own clock, and shows the old ones meanwhile: 0.25 to 5 s, and nobody
  is told which. Polling faster than that sees nothing new. The cells above have a meter that is always up to date.
* `counter`: the same as the counter shows it. The worst of it, in either direction, is what the buyer could ever dispute.

A goal is asked only where physics allow it, and each row says which: see `_goal`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import product
from multiprocessing import get_context
from random import Random

from bench import Row
from firmware_bridge.charger import Limits, Reading
from firmware_bridge.simulator.plant import Plant, PlantConfig
from firmware_bridge.stopping import Plan, StopModel, StopPlanner

RUNS_MIN = 400  # fewer say nothing about a p99
STEPS_MWH = (100, 1_000, 10_000, 100_000)
POLLS_MS = (100, 250, 500, 1_000)
COUNTER_POLLS_MS = (1_000, 30_000)
REFRESHES_MS = (250, 1_000, 2_000, 5_000)  # of the meter, read at 4 Hz, in steps of 1 Wh
REFRESHED_STEP_MWH = 1_000
LATENCY_MS = (10, 80)  # from our write to the pilot
EV_JITTER_MS = 150  # no car answers twice after the very same time
POWER_ERROR_PERMILLE = (990, 1_010)  # class B
QUICK_POLL_MS = 250  # the 4 Hz of BRIDGE rule 13
DEADLINE_MS = 3_600_000  # virtual; a delivery that takes longer never ends, and that is a bug


@dataclass(frozen=True, slots=True)
class Site:
    """A charging point and the cars that come to it. Ranges are (least, most)."""

    name: str
    current_ma_min: int
    current_ma: int
    phase_count: int
    voltage_mv: int
    ev_lag_ms: tuple[int, int] = (300, 3_850)
    ev_ramp_ma_per_s: tuple[int, int] = (8_000, 30_000)
    model: StopModel = field(default_factory=StopModel)

    @property
    def power_w(self) -> int:
        """What it delivers at most."""
        return self.current_ma * self.voltage_mv * self.phase_count // 1_000_000


SITES = (
    Site("3.7 kW", 6_000, 16_000, 1, 230_000),
    Site("7.4 kW", 6_000, 32_000, 1, 230_000),
    Site("11 kW", 6_000, 16_000, 3, 230_000),
    Site("22 kW", 6_000, 32_000, 3, 230_000),
    # Over ISO 15118 a car is asked ten times a second and follows faster; DC has no 6 A.
    Site(
        "50 kW DC",
        1_000,
        125_000,
        1,
        400_000,
        (100, 850),
        (20_000, 100_000),
        StopModel(ev_lag_ms=1_000, ramp_ma_per_s=20_000),
    ),
)


@dataclass(frozen=True, slots=True)
class Landing:
    """How one delivery ended, mWh. `over_mwh` is the truth's, `counter_over_mwh` the counter's, `billed_mwh` whole Wh."""

    over_mwh: int
    counter_over_mwh: int
    billed_over_mwh: int
    end_ms: int
    stops: int


Deliver = Callable[[Random, Site, int, int, int], Landing]


class MeteredPlant(Plant):
    """A plant behind a meter that is brought up to date every `refresh_ms`, first at `first_ms`; 0: always."""

    def __init__(self, config: PlantConfig, refresh_ms: int = 0, first_ms: int = 0) -> None:
        super().__init__(config)
        self._refresh_ms, self._next_ms = refresh_ms, first_ms
        self._kept = (self.register_mwh, self.power_w)

    def advance(self, now_ms: int) -> None:
        """Let time pass; the meter looks when it is due, not when somebody asks it."""
        while self._refresh_ms and self._next_ms <= now_ms:
            super().advance(max(self._next_ms, self.now_ms))
            self._kept = (self.register_mwh, self.power_w)
            self._next_ms += self._refresh_ms
        super().advance(now_ms)

    @property
    def metered(self) -> tuple[int, int]:
        """(register_mwh, power_w) as the meter shows them now."""
        return self._kept if self._refresh_ms else (self.register_mwh, self.power_w)


# ---- one evening


def evening(chance: Random, site: Site, step_mwh: int, refresh_ms: int = 0) -> tuple[MeteredPlant, int]:
    """A plant with a car that nobody knows, and the target its counter should show."""
    begin_mwh = chance.randrange(10**9, 2 * 10**9)
    config = PlantConfig(
        voltage_mv=site.voltage_mv,
        phase_count=site.phase_count,
        current_ma_max=site.current_ma,
        current_ma_min=site.current_ma_min,
        ev_current_ma_max=site.current_ma,
        ev_lag_ms=chance.randint(*site.ev_lag_ms),
        ev_ramp_ma_per_s=chance.randint(*site.ev_ramp_ma_per_s),
        register_mwh_begin=begin_mwh,
    )
    order_wh = max(site.power_w * chance.randint(25, 40) // 3_600, 2 * step_mwh // 1_000)
    first_ms = chance.randint(0, refresh_ms) if refresh_ms else 0
    return MeteredPlant(config, refresh_ms, first_ms), begin_mwh // step_mwh * step_mwh + order_wh * 1_000


def look(plant: MeteredPlant, now_ms: int, step_mwh: int, error_permille: int) -> Reading:
    """What the wire shows of the plant: a stepped counter, and a power that is a little off."""
    plant.advance(now_ms)
    register_mwh, power_w = plant.metered
    return Reading(
        at_ms=now_ms,
        register_mwh=register_mwh // step_mwh * step_mwh,
        power_w=power_w * error_permille // 1_000,
        current_ma=plant.current_ma,
        voltage_mv=plant.config.voltage_mv,
        pilot_state="C" if plant.contactor_closed else "B",
        contactor_closed=plant.contactor_closed,
    )


class Box:
    """Passes commands to the plant, each a little late."""

    def __init__(self, plant: MeteredPlant, chance: Random) -> None:
        self.plant, self.chance = plant, chance
        self.ev_lag_ms = plant.config.ev_lag_ms
        self.told_ma = self.stops = 0

    def tell(self, at_ms: int, current_ma: int) -> None:
        """Offer so much from about `at_ms` on; written on change only."""
        if current_ma == self.told_ma:
            return
        self.stops += current_ma == 0
        self.told_ma = current_ma
        arrives_ms = max(at_ms, self.plant.now_ms) + self.chance.randint(*LATENCY_MS)
        self.plant.advance(arrives_ms)
        ev_lag_ms = self.ev_lag_ms + self.chance.randint(0, EV_JITTER_MS)
        self.plant.config = replace(self.plant.config, ev_lag_ms=ev_lag_ms)
        self.plant.enable(current_ma > 0, arrives_ms)
        self.plant.set_limit(current_ma, arrives_ms)

    def landed(self, target_mwh: int, step_mwh: int, begin_mwh: int, now_ms: int) -> Landing:
        """How it ended."""
        truth_mwh = self.plant.register_mwh
        shown_mwh = truth_mwh // step_mwh * step_mwh
        order_mwh = target_mwh - begin_mwh
        billed_mwh = min(order_mwh, (shown_mwh - begin_mwh) // 1_000 * 1_000)
        return Landing(
            truth_mwh - target_mwh, shown_mwh - target_mwh, billed_mwh - order_mwh, now_ms, self.stops
        )


def planned(chance: Random, site: Site, step_mwh: int, poll_ms: int, refresh_ms: int = 0) -> Landing:
    """One delivery of an unknown car, ended by our planner."""
    plant, target_mwh = evening(chance, site, step_mwh, refresh_ms)
    return driven(Box(plant, chance), site, target_mwh, step_mwh, poll_ms)


def driven(
    box: Box,
    site: Site,
    target_mwh: int,
    step_mwh: int,
    poll_ms: int,
    told: Callable[[int, Plan], None] = lambda _now_ms, _plan: None,
) -> Landing:
    """Drive the box as the charger's runner does, until the planner says reached; `told` sees each beat's plan."""
    plant, chance = box.plant, box.chance
    begin_mwh = plant.register_mwh // step_mwh * step_mwh
    limits = Limits(
        site.current_ma_min, site.current_ma, site.phase_count, site.voltage_mv, step_mwh, poll_ms
    )
    planner = StopPlanner(limits, site.model)
    error_permille = chance.randint(*POWER_ERROR_PERMILLE)
    now_ms = 0
    while now_ms < DEADLINE_MS:
        now_ms = max(now_ms, plant.now_ms)
        reading = look(plant, now_ms, step_mwh, error_permille)
        planner.observe(reading)
        plan = planner.plan(now_ms, target_mwh, site.current_ma)
        told(now_ms, plan)
        if plan.reached and reading.seen_open:
            return box.landed(target_mwh, step_mwh, begin_mwh, now_ms)
        next_ms = now_ms + poll_ms + chance.randint(0, poll_ms // 5)
        box.tell(now_ms, plan.current_ma)
        if plan.stop_at_ms is not None and plan.stop_at_ms < next_ms:
            box.tell(plan.stop_at_ms, 0)
        now_ms = next_ms
    raise AssertionError(f"never ended: {plant.register_mwh} of {target_mwh} mWh")


def stopped_at_counter(
    chance: Random, site: Site, step_mwh: int, poll_ms: int, refresh_ms: int = 0
) -> Landing:
    """The same delivery at full power until somebody looks and the counter shows the order."""
    plant, target_mwh = evening(chance, site, step_mwh, refresh_ms)
    box, begin_mwh = Box(plant, chance), plant.register_mwh // step_mwh * step_mwh
    box.tell(0, site.current_ma)
    now_ms = chance.randint(0, poll_ms)
    plant.advance(now_ms)
    while plant.metered[0] // step_mwh * step_mwh < target_mwh:
        now_ms += poll_ms
        plant.advance(now_ms)
    box.tell(now_ms, 0)
    while plant.contactor_closed:
        now_ms = plant.now_ms + 100
        plant.advance(now_ms)
    return box.landed(target_mwh, step_mwh, begin_mwh, now_ms)


# ---- many of them


@dataclass(frozen=True, slots=True)
class Spread:
    """Four figures of many deliveries, Wh, and the worst of what the counter shows, in either direction."""

    p50: float
    p95: float
    p99: float
    most: float
    counter_least: float
    counter_most: float
    billed_most: float
    stops_twice: int

    def __str__(self) -> str:
        return f"p50 {self.p50:.2f}, p95 {self.p95:.2f}, max {self.most:.2f}"


def spread(landings: Sequence[Landing]) -> Spread:
    """The distribution of these landings."""
    over = sorted(landing.over_mwh / 1_000 for landing in landings)
    counter = [landing.counter_over_mwh / 1_000 for landing in landings]
    p50, p95, p99 = (over[len(over) * percent // 100] for percent in (50, 95, 99))
    return Spread(
        p50,
        p95,
        p99,
        over[-1],
        min(counter),
        max(counter),
        max(landing.billed_over_mwh for landing in landings) / 1_000,
        sum(landing.stops > 1 for landing in landings),
    )


def _cell(asked: tuple[Site, int, Sequence[int], int, int]) -> tuple[list[Spread], list[Spread]]:
    """Our spread at each poll, and the peer's at each of its polls, for (site, step, polls, refresh, runs). Same cars for all."""
    site, step_mwh, polls_ms, refresh_ms, runs = asked

    def spread_of(deliver: Deliver, poll_ms: int) -> Spread:
        chance = Random(f"{site.name} {step_mwh} {poll_ms}")
        return spread([deliver(chance, site, step_mwh, poll_ms, refresh_ms) for _ in range(runs)])

    ours = [spread_of(planned, poll_ms) for poll_ms in polls_ms]
    return ours, [spread_of(stopped_at_counter, poll_ms) for poll_ms in COUNTER_POLLS_MS]


def rows(runs: int) -> list[Row]:
    """One row a cell of site x step x poll, and of site x refresh; each of at least 400 deliveries."""
    runs = max(runs, RUNS_MIN)
    asked: list[tuple[Site, int, Sequence[int], int, int]]
    asked = [(site, step_mwh, POLLS_MS, 0, runs) for site, step_mwh in product(SITES, STEPS_MWH)]
    asked += [
        (site, REFRESHED_STEP_MWH, (QUICK_POLL_MS,), refresh_ms, runs)
        for site, refresh_ms in product(SITES, REFRESHES_MS)
    ]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as processes:
        return [
            _row(site, step_mwh, poll_ms, refresh_ms, runs, ours, peers)
            for (site, step_mwh, polls_ms, refresh_ms, _), (all_ours, peers) in zip(
                asked, processes.map(_cell, asked), strict=True
            )
            for poll_ms, ours in zip(polls_ms, all_ours, strict=True)
        ]


def _row(
    site: Site, step_mwh: int, poll_ms: int, refresh_ms: int, runs: int, ours: Spread, peers: Sequence[Spread]
) -> Row:
    often, seldom = peers
    goal, met = _goal(site, step_mwh, poll_ms, ours) if refresh_ms <= poll_ms else _goal_refreshed(ours)
    refreshed = f", meter refreshed every {refresh_ms / 1000:g} s" if refresh_ms else ""
    return Row(
        bench="stop",
        metric=f"{site.name}, {step_mwh / 1000:g} Wh steps, poll {poll_ms / 1000:g} s{refreshed}: p99 ({ours};"
        f" counter {ours.counter_least:+.1f}..{ours.counter_most:+.1f}, stopped twice {ours.stops_twice})",
        unit="Wh",
        ours=ours.p99,
        goal=goal,
        met=met and ours.billed_most <= 0,
        runs=runs,
        peer=often.p99,
        peer_name=f"stop at the counter, 1 s: {often}; every 30 s: {seldom}, p99 {seldom.p99:.2f}",
        floor=_unseen_wh(site, max(poll_ms, refresh_ms)),
        floor_name="one poll (or refresh) at the taper's power",
    )


def _unseen_wh(site: Site, poll_ms: int) -> float:
    """What flows between two looks at the lowest power the site can run: finer than that nobody sees the counter turn."""
    least_ma = max(site.current_ma_min, site.current_ma // 20)
    return least_ma * site.voltage_mv * site.phase_count / 1e6 * poll_ms / 3.6e6


def _goal(site: Site, step_mwh: int, poll_ms: int, ours: Spread) -> tuple[str, bool]:
    """What is asked of a cell. The bill is never above the order anywhere.

    * A counter of 1 Wh or finer, read at 4 Hz: p99 within 1 Wh. A finer counter cannot be hit finer: latency and the car's own
      jitter are 0.2 s, and 6 A on three phases is 1.15 Wh/s.
    * The same counter read more slowly: one more poll's worth, because the turn of the counter is seen that much later.
    * A coarse counter: within one of its own steps, as it shows itself. An order between two steps ends at the one below.
    """
    step_wh = step_mwh / 1_000
    if step_wh > 1:
        return "counter within one step", -step_wh < ours.counter_least and ours.counter_most <= step_wh
    within_step = ours.counter_least >= 0 and ours.counter_most <= max(step_wh, 1)
    if poll_ms <= QUICK_POLL_MS:
        return "p99 <= 1 Wh, counter within 1 Wh, never short", ours.p99 <= 1 and within_step
    most = 1 + _unseen_wh(site, poll_ms)
    return (
        f"p99 <= 1 Wh + one poll = {most:.2f} Wh, never short",
        ours.p99 <= most and ours.counter_least >= 0,
    )


def _goal_refreshed(ours: Spread) -> tuple[str, bool]:
    """A meter slower than the poll: what it does to the landing is shown, and paid by the provider. The bill stands."""
    return "shown: never short, never billed above", ours.counter_least >= 0
