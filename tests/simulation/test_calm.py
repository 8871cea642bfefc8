"""A day without faults: the world itself must be right before a storm in it proves anything."""

import pytest
from simulation import checkers
from simulation.evenings import EVENINGS, evening
from simulation.world import Car, Order, Plan, run


def test_one_honest_session_is_delivered_and_paid_to_the_last_wh(folder):
    """Would catch a world, or an agent, in which not even one evening without faults comes out right."""
    outcome = run(Plan(), folder, also=(checkers.nothing_is_lost,))
    assert not outcome.broken, outcome.story()
    assert outcome.lives == 1
    assert 13 <= sum(" row " in line for line in outcome.trace if "Receipt" not in line) <= 20, (
        outcome.story()
    )


def test_three_consumers_at_two_ports(folder):
    """Would catch sessions that get in each other's way: one waits for the port, one is beside it."""
    orders = (Order(60), Order(40, start_s=20), Order(50, start_s=30, port="right"))
    cars = (("left", Car()), ("right", Car(step_mwh=100, ev_lag_ms=2_000)))
    outcome = run(Plan(orders=orders, cars=cars), folder, also=(checkers.nothing_is_lost,))
    assert not outcome.broken, outcome.story()


@pytest.mark.parametrize("name", EVENINGS)
def test_in_fair_weather_nobody_loses_more_than_the_formula(name):
    """Would catch a limit that is not kept where nothing but one dishonest consumer, or one odd car, is in the way."""
    ended = evening(name)
    assert not ended.broken, ended.story


def test_the_same_plan_makes_the_same_trace(folder):
    """Would catch chance that is not seeded: a red seed could not be looked at again."""
    plan = Plan(
        seed=5, orders=(Order(60), Order(30, start_s=40)), cuts=frozenset({300, 900}), reorgs=((70, 4, 0),)
    )
    assert run(plan, folder).trace == run(plan, folder).trace
