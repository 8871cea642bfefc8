"""Every crash point once: the power fails before and after each port call and each append of one evening, one world each."""

import pytest
from simulation import checkers
from simulation.consumers import Order
from simulation.storms import carried_out, on_all_cores
from simulation.world import Plan, run

EVENING = Plan(orders=(Order(30),))
POINTS_MIN = 1_000
IN_THE_LAST_STOP_MAX = 10  # the port calls of the orderly stop that ends the world: nobody starts it again


def cut_at(point):
    """The evening with a power cut at this point. Power alone may not cost a Wh, nor the sale."""
    plan = Plan(orders=EVENING.orders, cuts=frozenset({point}))
    return carried_out(point, plan, also=(checkers.nothing_is_lost,))


@pytest.mark.timeout(600)
def test_no_single_crash_costs_a_wh(folder):
    """Would catch anything acknowledged before it is on disk, done twice, or forgotten: at 1 of 1000 moments is enough."""
    calm = run(EVENING, folder, also=(checkers.nothing_is_lost,))
    assert not calm.broken, calm.story()
    assert calm.points >= POINTS_MIN
    lives = power_cuts = 0
    for ended in on_all_cores(cut_at, range(1, calm.points + 1)):
        assert not ended.broken, f"point {ended.name} ({ended.label})\n{ended.story}"
        lives += ended.lives
        power_cuts += ended.power_cuts
    assert power_cuts == calm.points, "every point was reached, once"
    assert lives >= 2 * calm.points - IN_THE_LAST_STOP_MAX, (
        "the agent came back from every one but the last few"
    )
