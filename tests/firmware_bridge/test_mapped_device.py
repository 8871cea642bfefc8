"""One device by its map: what is asked in one request, and where a SunSpec device keeps things."""

from __future__ import annotations

from dataclasses import replace

import pytest

from firmware_bridge.charger import BridgeError
from firmware_bridge.device_map import MAPS, load_map
from firmware_bridge.mapped_charger import device_reader
from firmware_bridge.mapped_device import plan_blocks
from firmware_bridge.simulator import Simulator, SimulatorConfig


def test_reads_are_grouped_as_the_device_allows():
    """Would catch a block read across a gap (KEBA breaks), or twenty requests where one does."""
    points = list(load_map("simulated").reads.values())
    alone = plan_blocks(points, "single_value", 64)
    together = plan_blocks(points, "gapless", 64)
    across = plan_blocks(points, "across_gaps", 125)
    assert len(alone) > len(together) > len(across) == 2
    assert (together[0].address, together[0].count) == (100, 9)


def test_a_value_is_never_asked_without_its_exponent():
    """Would catch an exponent that is read once and believed for ever, or forgotten."""
    (counter,) = [load_map("iskra_wm3m4").reads["register_import_mwh"]]
    blocks = plan_blocks([counter], "gapless", 64)
    assert [(block.fc, block.address, block.count) for block in blocks] == [(4, 414, 1), (4, 418, 2)]


async def test_a_sunspec_device_says_itself_where_its_models_are(tmp_path):
    """Would catch fixed addresses, a list read from the wrong base, and a model that is believed without being there."""
    text = (MAPS / "sunspec_der_7xx.toml").read_text(encoding="utf-8")
    there = tmp_path / "sunspec_der_7xx.toml"
    there.write_text(
        text.replace("[40000, 50000, 0]", "[50000]").replace("{ 701", "{ 1 = 66, 702 = 50, 701"),
        encoding="utf-8",
    )
    config = SimulatorConfig(map=str(there), tcp="127.0.0.1:0", pinned={"power_w": 4_321})
    async with Simulator(config) as simulator, device_reader("sunspec_der_7xx", simulator.wire) as read:
        assert (await read())["power_w"] == 4_321
    config = replace(config, map="sunspec_der_7xx")
    lacking = tmp_path / "lacking"
    lacking.mkdir()
    (lacking / "sunspec_der_7xx.toml").write_text(text.replace("713", "802"), encoding="utf-8")
    async with Simulator(config) as simulator:
        with pytest.raises(BridgeError, match=r"model_missing.*802.*soc_permille.*701, 703, 704, 713"):
            async with device_reader(str(lacking / "sunspec_der_7xx.toml"), simulator.wire) as read:
                await read()
    async with Simulator(config) as simulator, device_reader("sunspec_der_7xx", simulator.wire, 77) as read:
        with pytest.raises(BridgeError, match="exception_11"):
            await read()
    config = SimulatorConfig(map="webasto_next", tcp="127.0.0.1:0", device_id=1)
    async with Simulator(config) as simulator, device_reader("sunspec_der_7xx", simulator.wire) as read:
        with pytest.raises(BridgeError, match=r"model_missing.*no 'SunS'"):
            await read()
