"""Does the counter land on the order? Simulated cars and boxes, many of them, in virtual time."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.stop import Box, Landing, MeteredPlant, Site, driven
from firmware_bridge.charger import Limits, Reading
from firmware_bridge.simulator.plant import PlantConfig
from firmware_bridge.stopping import Plan, StopModel, StopPlanner

QUICK = StopModel(ev_lag_ms=1000, ramp_ma_per_s=30_000, command_latency_ms=100)
QUICK_SITE = Site("quick", 6_000, 32_000, 3, 230_000, (500, 850), (30_000, 60_000), QUICK)
UNKNOWN_SITE = Site("unknown", 6_000, 32_000, 3, 230_000)


SLUGGISH = replace(QUICK_SITE, ev_lag_ms=(850, 850))


class SuddenBox(Box):
    """A box whose car follows late and lets go at once."""

    def tell(self, at_ms: int, current_ma: int) -> None:
        """As the box does, but a stop is heard without any lag."""
        lag_ms, self.ev_lag_ms = self.ev_lag_ms, 0 if current_ma == 0 else self.ev_lag_ms
        super().tell(at_ms, current_ma)
        self.ev_lag_ms = lag_ms


def deliver(
    chance: Random,
    site: Site = QUICK_SITE,
    *,
    step_mwh: int = 1000,
    poll_ms: int = 200,
    order_mwh: int = 200_000,
    box: type[Box] = Box,
    told=lambda _now_ms, _plan: None,
) -> Landing:
    """Run one delivery of this order to its end, with a car drawn from the site's."""
    begin_mwh = chance.randrange(10**9, 2 * 10**9)
    config = PlantConfig(
        ev_lag_ms=chance.randint(*site.ev_lag_ms),
        ev_ramp_ma_per_s=chance.randint(*site.ev_ramp_ma_per_s),
        register_mwh_begin=begin_mwh,
        phase_count=site.phase_count,
    )
    target_mwh = begin_mwh // step_mwh * step_mwh + order_mwh
    return driven(box(MeteredPlant(config), chance), site, target_mwh, step_mwh, poll_ms, told)


@pytest.mark.parametrize("step_mwh", [100, 1000])
@pytest.mark.parametrize("poll_ms", [100, 200])
def test_a_quick_car_lands_within_one_wh_above_the_order(step_mwh, poll_ms):
    """Would catch a stop that is short (the consumer is cheated) or late (the provider is), in 100 random evenings."""
    chance = Random(step_mwh + poll_ms)
    landings = [deliver(chance, step_mwh=step_mwh, poll_ms=poll_ms) for _ in range(100)]
    once = [landing for landing in landings if landing.stops == 1]
    assert len(once) >= 98, "one stop, no relay clicking; a car seldom answers much sooner than it ever did"
    assert all(0 <= landing.over_mwh <= 1000 for landing in once)
    assert all(0 <= landing.counter_over_mwh <= 1000 for landing in once)
    assert all(0 <= landing.over_mwh <= 1500 for landing in landings)


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
        landing = deliver(chance, replace(UNKNOWN_SITE, phase_count=phases), poll_ms=250)
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
    landings = [deliver(chance, SLUGGISH, box=SuddenBox, step_mwh=100) for _ in range(30)]
    assert all(landing.counter_over_mwh >= 0 for landing in landings)
    assert all(landing.over_mwh <= 1500 for landing in landings)
    assert any(landing.stops > 1 for landing in landings), "the story must happen, or this test shows nothing"


def test_a_coarse_counter_ends_within_its_own_step():
    """Would catch an endless delivery, or a whole extra step, with a 10 Wh counter."""
    chance = Random(10)
    for _ in range(30):
        landing = deliver(chance, step_mwh=10_000)
        assert -10_000 < landing.counter_over_mwh <= 10_000
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


CARS = st.builds(
    lambda lag_ms, ramp: replace(UNKNOWN_SITE, ev_lag_ms=(lag_ms, lag_ms), ev_ramp_ma_per_s=(ramp, ramp)),
    st.integers(0, 8_000),  # twice what the model allows
    st.integers(2_000, 100_000),  # and four times as slow
)


@settings(max_examples=60, deadline=None)
@given(
    site=CARS,
    seed=st.integers(0, 2**32),
    step_mwh=st.sampled_from([100, 1000, 10_000, 100_000]),
    poll_ms=st.integers(50, 2_000),
    order_wh=st.integers(1, 300),
    box=st.sampled_from([Box, SuddenBox]),
)
def test_whatever_the_car_the_delivery_ends_the_bill_is_the_order_and_the_taper_only_falls(
    site, seed, step_mwh, poll_ms, order_wh, box
):
    """Would catch a delivery that never ends, ends short by a step, bills above the order, or raises the current
    once it has begun to lower it (a relay that clicks, a car that is asked up and down).
    """
    offers: list[int] = []
    landing = deliver(
        Random(seed),
        site,
        step_mwh=step_mwh,
        poll_ms=poll_ms,
        order_mwh=order_wh * 1000,
        box=box,
        told=lambda _now_ms, plan: offers.append(plan.current_ma),
    )
    assert landing.billed_over_mwh <= 0
    assert landing.counter_over_mwh > -step_mwh
    flowing = [current_ma for current_ma in offers if current_ma]
    assert flowing == sorted(flowing, reverse=True)
    assert set(flowing) <= {32_000, 6_000}
    assert offers[-1] == 0


@given(
    looks=st.lists(
        st.tuples(st.integers(0, 3_000), st.integers(-50_000, 50_000), st.none() | st.integers(0, 5_000)),
        max_size=60,
    ),
    step_mwh=st.sampled_from([100, 1000, 10_000]),
)
def test_no_reading_however_wrong_makes_it_offer_at_the_order(looks, step_mwh):
    """Would catch a lying power, a silent counter or a jump that keeps power on once the counter shows the order."""
    planner = StopPlanner(Limits(6000, 32_000, 3, 230_000, step_mwh, 200), StopModel())
    now_ms, register_mwh, target_mwh = 0, 1_000_000, 1_050_000
    for elapsed_ms, power_w, grown_mwh in looks:
        now_ms += elapsed_ms
        if grown_mwh is not None:
            register_mwh += grown_mwh
        shown = None if grown_mwh is None else register_mwh // step_mwh * step_mwh
        planner.observe(Reading(now_ms, shown, power_w, 0, 230_000, "C", contactor_closed=True))
        plan: Plan = planner.plan(now_ms, target_mwh, 32_000)
        assert 0 <= plan.current_ma <= 32_000
        if shown is not None and shown + step_mwh > target_mwh and elapsed_ms:
            assert plan == Plan(0, None, reached=True)
        if plan.stop_at_ms is not None:
            assert plan.stop_at_ms > now_ms
