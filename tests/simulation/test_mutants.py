"""Every named slip is caught: by the calm evening, a reorganisation, a storm or a crash point; the table says by which.

mutant -> calm | reorg of DEPTH at S s | storm SEED | point N (LABEL)        pytest -s prints it
"""

import sys

import pytest
from simulation import checkers
from simulation.consumers import Order
from simulation.evenings import EVENINGS, evening
from simulation.mutants import MUTANTS, slipped
from simulation.reorgs import every, reorged_at
from simulation.storms import carried_out, on_all_cores, storm
from simulation.world import Car, Plan

CALM = Plan(orders=(Order(30),), cars=(("left", Car(step_mwh=100)),))
STORMS_MAX = 25
REORG_STEP_S = 12
AROUND = 18  # crash points before and after a row's: what is acknowledged wrongly is acknowledged there


def near_rows(labels):
    """The crash points around the first and the last row of each kind: a slip about a row shows there, if anywhere."""
    rows = {}
    for point, label in enumerate(labels, 1):
        if label.startswith("journal"):
            rows.setdefault(label, [point]).append(point)
    places = {place for points in rows.values() for place in (points[0], points[-1])}
    return sorted({point for place in places for point in range(place - AROUND, place + AROUND) if point > 0})


def hunted(labels):
    """Every place where a slip may show, the cheap ones first."""
    yield from map(evening, EVENINGS)
    yield from map(reorged_at, every(REORG_STEP_S))
    yield from map(storm, range(STORMS_MAX))
    for point in near_rows(labels):
        plan = Plan(orders=CALM.orders, cars=CALM.cars, cuts=frozenset({point}))
        yield carried_out(f"point {point}", plan, also=(checkers.nothing_is_lost,))


def caught(name):
    """Where this mutant is caught, and how; None when it survives."""
    with slipped(MUTANTS[name]):
        calm = carried_out("calm", CALM, also=(checkers.nothing_is_lost,))
        if calm.broken:
            return name, "calm", calm.broken
        for ended in hunted(calm.labels):
            if ended.broken:
                return name, f"{ended.name} {ended.label}", ended.broken
    return name, "", ""


@pytest.mark.timeout(900)
def test_every_named_slip_is_caught():
    """Would catch a world that forgives: a checker that sees nothing, a consumer too patient, a fault that never comes."""
    table = list(on_all_cores(caught, list(MUTANTS)))
    for name, where, how in table:
        sys.stdout.write(f"{name:60} {where:40} {how[:90]}\n")
    survivors = [name for name, where, _ in table if not where]
    assert not survivors, survivors
