"""Does the counter land on the order? Simulated cars and boxes, many of them, in virtual time."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import pytest

from firmware_bridge.charger import Limits, Reading
from firmware_bridge.simulator.plant import Plant, PlantConfig
from firmware_bridge.stopping import StopModel, StopPlanner

QUICK = StopModel(ev_lag_ms=1000, ramp_ma_per_s=30_000, command_latency_ms=100)


@dataclass(frozen=True)
class Landing:
    """How a delivery ended. Energies in mWh; `true_mwh` counts from the register's begin step."""

    over_mwh: int
    register_over_mwh: int
    end_ms: int
    stops: int


def deliver(
    chance: Random,
    *,
    step_mwh: int = 1000,
    poll_ms: int = 200,
    order_mwh: int = 200_000,
    model: StopModel = QUICK,
    lag_ms: tuple[int, int] = (500, 1000),
    ramp: tuple[int, int] = (30_000, 60_000),
    stop_lag_ms: int | None = None,
    phases: int = 3,
    deadline_ms: int = 400_000,
) -> Landing:
    """Run one delivery to its end: planner, command latency, poll jitter, 1 % power error, counter steps."""
    begin_mwh = chance.randrange(10**9, 2 * 10**9)
    config = PlantConfig(
        ev_lag_ms=chance.randint(*lag_ms),
        ev_ramp_ma_per_s=chance.randint(*ramp),
        register_mwh_begin=begin_mwh,
        phase_count=phases,
    )
    plant, planner = (
        Plant(config),
        StopPlanner(Limits(6000, 32_000, phases, 230_000, step_mwh, poll_ms), model),
    )
    shown_begin = begin_mwh // step_mwh * step_mwh
    target = shown_begin + order_mwh
    error_permille = chance.randint(990, 1010)
    now_ms = told_ma = stops = 0
    while now_ms < deadline_ms:
        now_ms = max(now_ms, plant.now_ms)
        plant.advance(now_ms)
        reading = look(plant, now_ms, step_mwh, error_permille)
        planner.observe(reading)
        plan = planner.plan(now_ms, target, 32_000)
        if plan.reached and reading.seen_open:
            break
        next_ms = now_ms + poll_ms + chance.randint(0, poll_ms // 5)
        orders = [(now_ms, plan.current_ma)]
        if plan.stop_at_ms is not None and plan.stop_at_ms < next_ms:
            orders.append((plan.stop_at_ms, 0))
        for at_ms, current_ma in orders:
            if current_ma == told_ma:
                continue
            stops += current_ma == 0
            told_ma = current_ma
            arrives_ms = max(at_ms, plant.now_ms) + chance.randint(10, 80)
            if current_ma == 0 and stop_lag_ms is not None:
                plant.config = PlantConfig(**{**vars_of(config), "ev_lag_ms": stop_lag_ms})
            plant.enable(current_ma > 0, arrives_ms)
            plant.set_limit(current_ma, arrives_ms)
        now_ms = next_ms
    else:
        pytest.fail(f"never ended: {plant.delivered_mwh} of {order_mwh} mWh")
    true_over = plant.register_mwh - target
    return Landing(true_over, plant.register_mwh // step_mwh * step_mwh - target, now_ms, stops)


def vars_of(config: PlantConfig) -> dict:
    """The fields of a configuration, to change one of them."""
    return {name: getattr(config, name) for name in config.__slots__}


def look(plant: Plant, now_ms: int, step_mwh: int, error_permille: int) -> Reading:
    """What the wire would show of the plant: a stepped counter and a power that is a little off."""
    return Reading(
        at_ms=now_ms,
        register_mwh=plant.register_mwh // step_mwh * step_mwh,
        power_w=plant.power_w * error_permille // 1000,
        current_ma=plant.current_ma,
        voltage_mv=230_000,
        pilot_state=plant.pilot_state,
        contactor_closed=plant.contactor_closed,
    )


@pytest.mark.parametrize("step_mwh", [100, 1000])
@pytest.mark.parametrize("poll_ms", [100, 200])
def test_a_quick_car_lands_within_one_wh_above_the_order(step_mwh, poll_ms):
    """Would catch a stop that is short (the consumer is cheated) or late (the provider is), in 100 random evenings."""
    chance = Random(step_mwh + poll_ms)
    landings = [deliver(chance, step_mwh=step_mwh, poll_ms=poll_ms) for _ in range(100)]
    assert all(0 <= landing.over_mwh <= 1000 for landing in landings)
    assert all(0 <= landing.register_over_mwh <= 1000 for landing in landings)
    assert all(landing.stops == 1 for landing in landings), "one stop, no relay clicking"


def test_the_evening_of_200_wh_is_over_in_42_seconds():
    """Would catch a taper so long that the demo's 200 Wh at 22 kW crawl to their end."""
    chance = Random(42)
    landings = [deliver(chance, step_mwh=100, poll_ms=100) for _ in range(100)]
    assert max(landing.end_ms for landing in landings) <= 42_000


@pytest.mark.parametrize("phases", [1, 3])
def test_an_unknown_car_is_not_feared_in_vain(phases):
    """Would catch defaults that a slow car (4 s lag, 8 A/s) overruns: still within a step, for one phase and three."""
    chance = Random(phases)
    for _ in range(30):
        landing = deliver(
            chance, model=StopModel(), lag_ms=(500, 4000), ramp=(8_000, 30_000), phases=phases, poll_ms=250
        )
        assert 0 <= landing.over_mwh <= 1200


@pytest.mark.parametrize("order_mwh", [1000, 2000, 5000, 12_000])
def test_small_orders_begin_at_the_minimum(order_mwh):
    """Would catch full power offered for an order that is over before the car has followed."""
    chance = Random(order_mwh)
    for _ in range(30):
        landing = deliver(chance, order_mwh=order_mwh, poll_ms=100)
        assert 0 <= landing.over_mwh <= 1500


def test_a_car_that_stops_sooner_than_it_showed_is_started_again():
    """Would catch a delivery that ends a Wh short for ever, because the car lets go faster than it follows."""
    chance = Random(7)
    landings = [deliver(chance, lag_ms=(1000, 1000), stop_lag_ms=0, step_mwh=100) for _ in range(30)]
    assert all(landing.register_over_mwh >= 0 for landing in landings)
    assert all(landing.over_mwh <= 1500 for landing in landings)
    assert any(landing.stops > 1 for landing in landings), "the story must happen, or this test shows nothing"


def test_a_coarse_counter_ends_within_its_own_step():
    """Would catch an endless delivery, or a whole extra step, with a 10 Wh counter."""
    chance = Random(10)
    for _ in range(30):
        landing = deliver(chance, step_mwh=10_000)
        assert -10_000 < landing.register_over_mwh <= 10_000
        assert landing.over_mwh <= 10_000


def test_nothing_flows_before_the_counter_was_seen():
    """Would catch an offer without a begin register."""
    planner = StopPlanner(Limits(6000, 32_000, 3, 230_000, 1000, 200), QUICK)
    assert planner.plan(0, 1_000_000, 32_000).current_ma == 0


def test_a_reached_target_is_said_and_held():
    """Would catch a plan that goes on offering above the order."""
    planner = StopPlanner(Limits(6000, 32_000, 3, 230_000, 1000, 200), QUICK)
    planner.observe(Reading(10, 1_000_000, 0, 0, 230_000, "B", contactor_closed=False))
    plan = planner.plan(10, 1_000_000, 32_000)
    assert plan.reached
    assert plan.current_ma == 0
