"""The port's one piece of judgement: when a reading proves that nothing can flow."""

import pytest

from firmware_bridge.charger import PilotState, Reading


@pytest.mark.parametrize(
    ("closed", "pilot", "power_w", "open_"),
    [
        (False, "B", 0, True),
        (False, "C", 0, True),
        (False, "B", 51, False),  # an open contactor through which power flows is not open
        (False, "B", -51, False),
        (True, "B", 0, False),
        (None, "B", 0, True),
        (None, "A", 50, True),
        (None, "C", 0, False),  # no contactor signal: a car that draws may draw again at once
        (None, "D", 0, False),
        (None, "B", 60, False),
    ],
)
def test_open_is_seen_not_assumed(closed: bool | None, pilot: PilotState, power_w: int, open_: bool) -> None:
    """Would catch a stop believed while power flows, on devices with and without a contactor signal (BRIDGE, the port)."""
    reading = Reading(
        at_ms=0,
        register_mwh=0,
        power_w=power_w,
        current_ma=0,
        voltage_mv=230_000,
        pilot_state=pilot,
        contactor_closed=closed,
    )
    assert reading.seen_open is open_
