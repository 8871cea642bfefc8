"""The named faults of BRIDGE rule 8."""

from __future__ import annotations

import pytest

from firmware_bridge.plausibility import FAULT_SHOWN_MS, HELD_GRACE_MS, Bounds, Plausibility

BEGIN_MWH = 1_000_000_000


def watch(looks, held_since_ms=None):
    """Judge `(at_ms, register_mwh, power_w)` in turn; the set of faults that were named."""
    judge = Plausibility(Bounds(power_w_max=22_080, counter_step_mwh=1000))
    found = [judge.judge(at, register, power, held_since_ms) for at, register, power in looks]
    return [fault for fault in found if fault]


def steady(power_w: int, seconds: int, factor_permille: int = 1000):
    """An honest (or not) evening at 5 Hz."""
    for tick in range(seconds * 5):
        delivered_mwh = power_w * tick * 200 // 3600 * factor_permille // 1000
        yield tick * 200, BEGIN_MWH + delivered_mwh // 1000 * 1000, power_w


def test_an_honest_hour_has_no_fault():
    """Would catch a check so sharp that it stops honest deliveries."""
    assert watch(steady(22_080, 3600)) == []


@pytest.mark.parametrize("factor_permille", [900, 1100, 100, 0])
def test_a_meter_that_counts_wrong_is_named(factor_permille):
    """Would catch a scale error of 10 % (or of ten, KEBA) between counter and power."""
    assert "counter_disagrees" in watch(steady(22_080, 120, factor_permille))


def test_a_counter_that_runs_backwards_is_named_until_it_has_caught_up():
    """Would catch a reset or exchanged meter, also after the first moment."""
    looks = [
        (0, BEGIN_MWH, 0),
        (200, BEGIN_MWH - 1000, 0),
        (20_000, BEGIN_MWH - 1000, 0),
        (40_000, BEGIN_MWH, 0),
    ]
    assert watch(looks) == ["counter_backwards", "counter_backwards"]


def test_a_jump_is_named():
    """Would catch 100 Wh that appear within a second."""
    assert "counter_too_fast" in watch([(0, BEGIN_MWH, 22_080), (1000, BEGIN_MWH + 100_000, 22_080)])


def test_what_flowed_while_nobody_looked_is_not_a_jump():
    """Would catch a fault after every reconnect: ten blind seconds may well hold 60 Wh."""
    assert watch([(0, BEGIN_MWH, 22_080), (10_000, BEGIN_MWH + 61_000, 22_080)]) == []


def test_one_sentinel_passes_and_silence_does_not():
    """Would catch a transient 0xFFFFFFFF (Bender) that ends a session, and a dead counter that does not."""
    assert watch([(0, BEGIN_MWH, 0), (200, None, 0), (400, BEGIN_MWH, 0)]) == []
    dead = [(0, BEGIN_MWH, 0)] + [(at, None, 0) for at in range(200, 5000, 200)]
    assert "counter_unreadable" in watch(dead)


@pytest.mark.parametrize("power_w", [65_500, -65_500])
def test_impossible_power_is_named(power_w):
    """Would catch 65 500 W from a swapped word, either sign."""
    assert watch([(0, BEGIN_MWH, power_w)]) == ["power_out_of_range"]


def test_a_box_that_delivers_while_held_is_named_after_its_grace():
    """Would catch the charger that charges while disabled; the car's own seconds are granted."""
    judge = Plausibility(Bounds(22_080, 1000))
    assert judge.judge(HELD_GRACE_MS - 1, BEGIN_MWH, 4000, 0) is None
    assert judge.judge(HELD_GRACE_MS + 1, BEGIN_MWH + 2000, 4000, 0) == "flow_while_held"


def test_a_fault_stays_visible_for_a_while():
    """Would catch a fault that only the fastest reader ever sees."""
    judge = Plausibility(Bounds(22_080, 1000))
    judge.judge(0, BEGIN_MWH, 65_500, None)
    assert judge.judge(FAULT_SHOWN_MS, BEGIN_MWH, 0, None) == "power_out_of_range"
    assert judge.judge(FAULT_SHOWN_MS + 1000, BEGIN_MWH, 0, None) is None


def test_power_that_is_not_shown_is_a_fault_when_it_lasts():
    """Would catch a stop believed because a dead meter shows no power; one sentinel (Bender) passes."""
    assert watch([(0, BEGIN_MWH, 0), (200, BEGIN_MWH, None), (400, BEGIN_MWH, 0)]) == []
    dark = [(0, BEGIN_MWH, 4000)] + [(at, BEGIN_MWH, None) for at in range(200, 5000, 200)]
    assert set(watch(dark)) == {"power_unreadable"}
    assert "power_unreadable" in watch([(at, BEGIN_MWH, None) for at in range(0, 5000, 200)])


def test_what_flowed_in_the_dark_is_not_held_against_the_counter():
    """Would catch a fault after some sentinels: 17 Wh were counted while no power was shown."""
    looks = [(at, BEGIN_MWH + at * 6, 22_000) for at in range(0, 2000, 200)]
    looks += [(at, BEGIN_MWH + at * 6, None) for at in range(2000, 4800, 200)]
    looks += [(at, BEGIN_MWH + at * 6, 22_000) for at in range(4800, 30_000, 200)]
    assert watch(looks) == []
