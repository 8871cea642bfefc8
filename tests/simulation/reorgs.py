"""One evening with one reorganisation, at every second and to several depths: the systematic sister of the storms."""

from simulation.consumers import Character, Order
from simulation.storms import carried_out
from simulation.world import Plan

STOPS = Character("asks to stop", stops_wh=15)
LASTS_S = 130
DEPTHS = (2, 5, 9)


def reorged_at(when):
    """(second, depth) -> the evening in which the newest blocks then turn out not to have happened."""
    at_s, depth = when
    orders = (Order(30, start_s=1), Order(40, start_s=1, port="left", character=STOPS))
    plan = Plan(seed=at_s, orders=orders, reorgs=((at_s, depth, 0),), finality=depth + 2)
    return carried_out(f"reorg of {depth} at {at_s} s", plan)


def every(step_s=1):
    """All the moments."""
    return [(at_s, depth) for at_s in range(14, LASTS_S, step_s) for depth in DEPTHS]
