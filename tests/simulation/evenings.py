"""Evenings in fair weather, one for each consumer and car: bounds are tight here, because nothing else is wrong."""

from simulation.consumers import CHARACTERS, Character, Order
from simulation.storms import carried_out
from simulation.world import Car, Plan

LARGE_WH = 150

EVENINGS = {
    **{who.name: Plan(orders=(Order(LARGE_WH, character=who),)) for who in CHARACTERS},
    "the other one's words": Plan(
        orders=(Order(60), Order(60, port="right", character=Character("forges", forges=True))),
        cars=(("left", Car()), ("right", Car())),
    ),
    "two at one port": Plan(orders=(Order(60), Order(60, start_s=10))),
    "beside one who pauses": Plan(
        orders=(Order(60), Order(60, start_s=10, character=Character("never signs", signs_wh_max=0)))
    ),
    "a short token": Plan(
        orders=(Order(600, validity_s=190),), cars=(("left", Car(ev_current_ma_max=8_000)),)
    ),
    "a provider whose meter runs fast": Plan(
        orders=(Order(LARGE_WH),), cars=(("left", Car(lies_permille=1_500)),)
    ),
    "a welded contactor": Plan(orders=(Order(60),), welds=((50, "left"),)),
    "a slow car": Plan(
        orders=(Order(60),), cars=(("left", Car(ev_lag_ms=4_000, ev_ramp_ma_per_s=8_000, step_mwh=10_000)),)
    ),
}


def evening(name):
    """One of them."""
    return carried_out(f"evening: {name}", EVENINGS[name])
