"""From a seed to a plan: which faults, how many, when; and running many of them on every core.

Each seed makes its own mixture: most kinds of fault are off in most seeds, so that a red one has few suspects, and some are
much worse than any real day. Faults end; then everything must come to its end.
"""

import os
import random
import shutil
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from simulation.consumers import CHARACTERS, HONEST
from simulation.world import Car, Order, Plan, Storm, run

SHARED_MEMORY = Path("/dev/shm")
STORM_S = (120, 180, 240)  # faults end then
CUTS_MAX = 6
POINTS_A_SECOND = 10


def plan_of(seed):
    """The storm of one seed."""
    rng = random.Random(seed)
    storm_s = rng.choice(STORM_S)

    def some(chance_percent, low, high):
        """Off in most seeds; where it is on, between low and high."""
        return rng.uniform(low, high) if rng.randrange(100) < chance_percent else 0.0

    def times(chance_percent, count_max):
        if rng.randrange(100) >= chance_percent:
            return ()
        return tuple(sorted(rng.randrange(20, storm_s) for _ in range(rng.randint(1, count_max))))

    storm = Storm(
        node_fails=some(40, 1, 25),
        node_lags=some(30, 2, 40),
        node_silences=some(30, 5, 50),
        bus_fails=some(40, 1, 12),
        broker_drops=some(40, 2, 30),
        broker_doubles=some(30, 2, 30),
        broker_delays=some(30, 5, 50),
        broker_breaks=some(20, 1, 5),
        pool_loses=some(30, 5, 60),
        miner_waits=some(30, 10, 70),
        calm_from_ms=storm_s * 1000,
    )
    reorgs = tuple((at, rng.randint(1, 10), rng.choice([0, 0, 30, 100])) for at in times(45, 3))
    return Plan(
        seed=seed,
        orders=_orders(rng),
        cars=_cars(rng),
        storm=storm,
        cuts=_cuts(rng, storm_s),
        reorgs=reorgs,
        outages=tuple((at, rng.randint(20, 120)) for at in times(15, 1)),
        freezes=tuple((at, rng.choice([1, 3, 8, 20, 90])) for at in times(15, 2)),
        sleeps=tuple((at, rng.choice([2, 30, 200])) for at in times(10, 1)),
        restarts=times(15, 2),
        welds=tuple((at, "left") for at in times(4, 1)),
        finality=2 + max([2, *(depth + 1 for _, depth, _ in reorgs)]),
    )


def _orders(rng):
    difficult = rng.randrange(100) < 50
    orders = []
    for number in range(3):
        character = rng.choice(CHARACTERS) if difficult else HONEST
        port = "right" if number == 2 else "left"
        energy_wh = rng.randint(10, rng.choice([60, 60, 150]))
        validity_s = 190 if rng.randrange(100) < 10 else 900
        orders.append(Order(energy_wh, rng.randint(0, 60) + number * 30, port, character, validity_s))
    return tuple(orders)


def _cars(rng):
    return tuple(
        (
            port,
            Car(
                step_mwh=rng.choice([1, 100, 1_000, 1_000, 10_000]),
                lies_permille=1_300 if rng.randrange(100) < 8 else 1_000,
                shows_contactor=rng.randrange(100) < 85,
                ev_lag_ms=rng.choice([200, 500, 1_500, 4_000]),
                ev_ramp_ma_per_s=rng.choice([8_000, 20_000, 60_000]),
                ev_current_ma_max=rng.choice([8_000, 16_000, 32_000]),
            ),
        )
        for port in ("left", "right")
    )


def _cuts(rng, storm_s):
    if rng.randrange(100) < 40:
        return frozenset()
    return frozenset(rng.randrange(1, storm_s * POINTS_A_SECOND) for _ in range(rng.randint(1, CUTS_MAX)))


@dataclass(frozen=True)
class Run:
    """One world's end, small enough to travel between processes."""

    name: object
    broken: str
    story: str
    sessions: int
    lives: int
    power_cuts: int
    stranded: int
    label: str
    labels: tuple[str, ...]
    cpu_s: float


def carried_out(name, plan, also=(), lines=60):
    """Run one plan in a folder of its own. `lines`: how long a story may get."""
    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    began_s = time.process_time()
    try:
        outcome = run(plan, folder, also)
    finally:
        shutil.rmtree(folder)
    story = outcome.story(lines) if outcome.broken else ""
    label = outcome.labels[min(plan.cuts) - 1] if plan.cuts and min(plan.cuts) <= outcome.points else ""
    used_s = time.process_time() - began_s
    labels = () if plan.cuts or plan.storm.calm_from_ms else outcome.labels
    return Run(
        name, outcome.broken, story, outcome.sessions, outcome.lives, outcome.power_cuts, outcome.stranded,
        label, labels, used_s,
    )  # fmt: skip


def storm(seed):
    """One seed."""
    return carried_out(f"storm {seed}", plan_of(seed))


def on_all_cores(work, items, workers=None):
    """`work(item)` for every item, in order, on every core we may use."""
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        yield from pool.map(work, items, chunksize=4)
