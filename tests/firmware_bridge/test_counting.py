"""The device that bills: its counter, its sign, and what it does not show. With a charger around it: test_mapped_charger."""

import pytest

from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.counting import Counting, check_direction, check_meter
from firmware_bridge.device_map import load_map
from firmware_bridge.mapped_device import MappedDevice

METER = load_map("janitza_b2x")


def counted(direction):
    """A meter that nobody reads: what was seen is handed in."""
    return Counting(MappedDevice(METER, None, 1), direction)


def test_a_meter_turned_round_counts_its_other_register_and_the_other_sign():
    """Would catch a sale billed from the register that stands still, and power that flows the wrong way."""
    other = "export" if METER.energy.forward == "import" else "import"
    seen = {"power_w": 7_000, METER.counter("import").name: 11, METER.counter("export").name: 22}
    for direction, sign in ((None, 1), (METER.energy.forward, 1), (other, -1)):
        counting = counted(direction)
        assert counting.register_mwh(seen) == seen[METER.counter(direction or METER.energy.forward).name]
        assert counting.power_w_shown(seen) == counting.power_w == sign * 7_000


def test_power_that_is_not_shown_is_the_last_that_was():
    """Would catch a stop seen in a sentinel: no power shown is not no power."""
    counting = counted(None)
    with pytest.raises(BridgeError, match="shows no power"):
        _ = counting.power_w
    counting.power_w_shown({"power_w": 3_000})
    assert counting.power_w_shown({"power_w": None}) is None
    assert counting.power_w == 3_000


def test_a_register_that_shows_a_sentinel_is_none():
    """Would catch a sentinel billed as energy."""
    assert counted(None).register_mwh({METER.counter(METER.energy.forward).name: None}) is None
    assert counted(None).register_mwh({}) is None


def test_what_cannot_bill_is_refused_before_it_is_opened():
    """Would catch a charger configured as its own meter, and a direction in which the device does not count."""
    check_meter(METER)
    with pytest.raises(MapError, match="is no meter"):
        check_meter(load_map("simulated"))
    one_way = next(
        device for device in (load_map("heidelberg_energy_control"),) if device.counter("export") is None
    )
    with pytest.raises(MapError, match="has no export counter"):
        check_direction(one_way, "export")
