"""The physics: energy that adds up, a car that lags, and a failsafe that cuts."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_bridge.simulator.plant import UJ_PER_MWH, Plant, PlantConfig

CONFIG = PlantConfig(ev_lag_ms=500, ev_ramp_ma_per_s=60_000)


def driving(config: PlantConfig = CONFIG) -> Plant:
    """A plant that was told to deliver 32 A at time 0."""
    plant = Plant(config)
    plant.enable(on=True, now_ms=0)
    plant.set_limit(32_000, 0)
    return plant


def test_a_steady_hour_delivers_what_its_power_says():
    """Would catch lost or doubled energy: after lag and ramp, an hour at 22.08 kW is 22 080 Wh to the mWh."""
    plant = driving()
    plant.advance(10_000)
    before_uj = plant.energy_uj
    plant.advance(3_610_000)
    assert plant.energy_uj - before_uj == 22_080_000 * UJ_PER_MWH


@given(cuts=st.lists(st.integers(1, 4000), min_size=1, max_size=20))
def test_looking_more_often_changes_next_to_nothing(cuts):
    """Would catch physics that depend on the poll rate: the same second half, whoever looks how often."""
    watched, alone = driving(), driving()
    now_ms = 0
    for cut in cuts:
        now_ms += cut
        watched.advance(now_ms)
    alone.advance(now_ms)
    assert abs(watched.delivered_mwh - alone.delivered_mwh) <= 1
    assert watched.contactor_closed == alone.contactor_closed


def test_the_car_follows_late_and_along_its_ramp():
    """Would catch a car that jumps: nothing before the lag, half way up half a ramp later."""
    plant = driving()
    plant.advance(490)
    assert plant.current_ma == 0
    plant.advance(500 + 267)
    assert 15_000 <= plant.current_ma <= 17_000
    plant.advance(2000)
    assert plant.current_ma == 32_000


def test_a_stop_opens_the_contactor_when_the_current_is_gone():
    """Would catch a relay that opens under load on a normal stop, or never."""
    plant = driving()
    plant.advance(5000)
    plant.enable(on=False, now_ms=5000)
    plant.advance(5400)
    assert plant.contactor_closed
    assert plant.current_ma == 32_000
    plant.advance(7000)
    assert not plant.contactor_closed
    assert plant.power_w == 0


def test_a_car_that_ignores_the_stop_is_cut_under_load():
    """Would catch a box that waits for ever for a deaf car (IEC 61851-1: 6 s)."""
    plant = driving(PlantConfig(ev_lag_ms=500))
    plant.advance(5000)
    plant.config = PlantConfig(ev_lag_ms=60_000)
    plant.enable(on=False, now_ms=5000)
    plant.advance(10_990)
    assert plant.power_w > 20_000
    plant.advance(11_010)
    assert plant.power_w == 0


@pytest.mark.parametrize("timeout_ms", [1000, 5000])
def test_the_failsafe_cuts_on_the_millisecond_however_seldom_anybody_looks(timeout_ms):
    """Would catch a timer that expires only when somebody asks: after an hour, only the armed time has flowed."""
    plant = Plant(CONFIG)
    plant.arm_failsafe(0, timeout_ms=timeout_ms, current_ma=0)
    plant.enable(on=True, now_ms=0)
    plant.set_limit(32_000, 0)
    plant.feed(0)
    plant.advance(3_600_000)
    assert not plant.contactor_closed
    assert plant.zero_at_ms == timeout_ms
    assert plant.fault == "failsafe_tripped"
    assert plant.delivered_mwh <= 22_080 * timeout_ms // 3600
    plant.feed(3_600_001)
    plant.advance(3_700_000)
    assert plant.power_w == 0, "coming back does not switch on by itself"


def test_a_failsafe_that_falls_back_to_six_amperes_goes_on_delivering():
    """Would catch a simulator kinder than reality: such a device must be seen to deliver on."""
    plant = driving()
    plant.arm_failsafe(0, timeout_ms=1000, current_ma=6000)
    plant.advance(60_000)
    assert plant.power_w == 4140


def test_a_timer_that_runs_out_on_an_idle_box_is_no_fault():
    """Would catch a fault shown after every session, which would keep the next one from starting."""
    plant = Plant(CONFIG)
    plant.arm_failsafe(0, timeout_ms=1000, current_ma=0)
    plant.advance(10_000)
    assert plant.failsafe_tripped
    assert plant.fault == ""


def test_a_welded_contactor_flows_on_and_is_shown():
    """Would catch an escalation that is tested against a relay that always obeys."""
    plant = driving(PlantConfig(contactor_stuck=True, force_open_ms=1000, ev_lag_ms=60_000))
    plant.config = PlantConfig(contactor_stuck=True, force_open_ms=1000, ev_lag_ms=0)
    plant.set_limit(31_000, 1000)
    plant.advance(5000)
    plant.lock(on=True, now_ms=5000)
    plant.advance(9000)
    assert plant.contactor_closed
    assert plant.fault == "contactor_stuck"


def test_the_battery_is_drained_by_what_is_sold():
    """Would catch a provider who sells without ever getting emptier."""
    plant = driving(PlantConfig(battery_mwh=10_000_000, soc_permille_begin=800))
    plant.advance(3600 * 250)
    assert (
        plant.soc_permille == 800 - plant.delivered_mwh // 10_000
        or plant.soc_permille == 799 - plant.delivered_mwh // 10_000
    )


def suffering(*faults: str, config: PlantConfig = CONFIG) -> Plant:
    """A plant at full power that has just been struck, at 10 s."""
    plant = driving(config)
    plant.suffer(frozenset(faults), 10_000)
    assert plant.power_w == 22_080
    return plant


def test_a_box_that_ignores_the_stop_obeys_lock_and_failsafe_only():
    """Would catch an ignored stop that nothing can end, or that ends by itself: the escalation would be tested on nothing."""
    for ending in ("lock", "failsafe", "over"):
        plant = suffering("ignores_stop")
        plant.arm_failsafe(10_000, timeout_ms=20_000 if ending == "failsafe" else 0, current_ma=0)
        plant.set_limit(0, 10_000)
        plant.enable(on=False, now_ms=10_000)
        plant.advance(29_990)
        assert plant.power_w == 22_080
        assert plant.offered_ma == 0, "it shows what was written"
        if ending == "lock":
            plant.lock(on=True, now_ms=30_000)
        elif ending == "over":
            plant.suffer(frozenset(), 30_000)
        plant.advance(35_000)
        assert plant.power_w == 0
        assert not plant.contactor_closed


def test_a_box_that_charges_while_disabled_was_never_asked_to():
    """Would catch a "disabled" box that waits for an order (evcc #33436 did not)."""
    plant = Plant(CONFIG)
    plant.suffer(frozenset({"charges_while_disabled"}), 1_000)
    plant.advance(10_000)
    assert (plant.power_w, plant.enabled, plant.offered_ma) == (22_080, False, 0)
    plant.lock(on=True, now_ms=10_000)
    assert plant.power_w == 0


def test_a_stuck_relay_with_a_deaf_car_flows_on_through_every_stop_but_the_cut_off():
    """Would catch a weld that a lock can open, and an external cut-off that cannot."""
    plant = suffering("contactor_stuck", "car_deaf")
    plant.enable(on=False, now_ms=10_000)
    plant.lock(on=True, now_ms=11_000)
    plant.advance(60_000)
    assert plant.power_w == 22_080
    assert plant.fault == "contactor_stuck"
    plant.cut_off(60_000)
    plant.advance(70_000)
    assert plant.power_w == 0
    assert plant.contactor_closed, "the weld is still there for everybody to see"


def test_the_other_faults_do_what_they_say():
    """Would catch a name in the table that does nothing."""
    frozen = suffering("counter_frozen")
    before_mwh = frozen.register_mwh_shown
    frozen.advance(20_000)
    assert frozen.register_mwh_shown == before_mwh < frozen.register_mwh
    tripped = suffering("failsafe_tripped")
    assert tripped.failsafe_cut
    stopped = suffering("car_stops")
    stopped.advance(20_000)
    assert (stopped.power_w, stopped.contactor_closed) == (0, True)
    pulled = driving()
    pulled.suffer(frozenset({"car_unplugged"}), 10_000)
    assert (pulled.pilot_state, pulled.power_w) == ("A", 0)
    pulled.suffer(frozenset(), 11_000)
    assert pulled.pilot_state in ("B", "C")
