"""docs/devices.md says what the maps say."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from firmware_bridge.device_map import load_map, map_names
from firmware_bridge.device_table import table

PAGE = Path(__file__).parents[2] / "docs" / "devices.md"


made = cache(table)


def row(name: str) -> list[str]:
    """The cells of this device's line."""
    (line,) = [line for line in made().splitlines() if line.startswith(f"| `{name}`")]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_page_is_the_maps():
    """Would catch a map that was changed or added without its page: python -m firmware_bridge.device_table."""
    assert PAGE.read_text(encoding="utf-8") == made()


def test_every_map_has_one_line():
    """Would catch a device that nobody finds, and the count that issue and page speak of."""
    for name in map_names():
        assert row(name)
    assert len(map_names()) > 30


def test_nothing_sells_at_once_that_is_not_confirmed_twice():
    """Would catch a page (or a map) that promises more than BRIDGE rule 9 allows."""
    for name in map_names():
        said_at_once = row(name)[-1] == "at once"
        assert said_at_once == load_map(name).trusted
    at_once = {name for name in map_names() if load_map(name).trusted}
    assert at_once == {
        "simulated",
        "webasto_next",
        "obo_ion_epc2plus",
        "heidelberg_energy_control",
        "eastron_sdm630_sdm72v2",
        "eastron_sdm72_v1",
    }


def test_the_page_tells_the_differences_that_matter():
    """Would catch a column that says the same of everybody."""
    assert row("evse_din_simpleevse")[5] == "no: external cut-off"
    assert row("heidelberg_energy_control")[5].startswith("yes (both)")
    assert row("keba_p30")[5].startswith("unproven (recall)")
    assert row("vestel_evc04_webasto_unite")[7] == "100 Wh"
    assert row("iskra_wm3m4")[4] == "1 Wh, or as the device says"
    assert row("phoenix_charx_sec")[0] == "`phoenix_charx_sec` (#1 to #12)"
    assert row("sunspec_der_7xx")[8] == "shown"
