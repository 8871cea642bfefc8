"""The one place that knows which driver a wire needs."""

from __future__ import annotations

import re

import pytest

from firmware_bridge.charger import MapError
from firmware_bridge.device_map import MAPS, load_map, map_names
from firmware_bridge.mapped_charger import ChargerConfig, MappedCharger, MeterConfig
from firmware_bridge.modbus import Buses
from firmware_bridge.opening import (
    editions,
    falls_to_zero,
    is_trusted,
    open_charger,
    open_to_stop,
    read_device,
)
from firmware_bridge.rapi import RapiCharger
from firmware_bridge.simulator import Simulator, SimulatorConfig
from firmware_bridge.simulator.rapi import RapiSimulator, RapiSimulatorConfig


async def test_each_wire_gets_its_driver(tmp_path):
    """Would catch a serial charger that is spoken to in Modbus."""
    async with (
        Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as modbus,
        RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"))) as box,
    ):
        buses = Buses()
        for config, driver in (
            (ChargerConfig(map="simulated", wire=modbus.wire), MappedCharger),
            (ChargerConfig(map="openevse_rapi", wire=box.wire, external_cut_off="K1"), RapiCharger),
        ):
            for opening in (open_charger, open_to_stop):
                charger = await opening(config, buses)
                assert type(charger) is driver
                await charger.hold()
                await charger.close()
        assert (await read_device("simulated", modbus.wire))["pilot_state"] == "B"
        assert (await read_device("openevse_rapi", box.wire))["firmware"] == "8.2.3 RAPI 5.2.1"


def test_trust_is_the_maps_own_word(tmp_path):
    """Would catch a map sold from at once although nobody confirmed its failsafe or its counter (BRIDGE rule 9)."""
    for name in map_names():
        device_map = load_map(name)
        config = ChargerConfig(map=name, wire="tcp://127.0.0.1")
        assert is_trusted(config) is device_map.trusted
        assert editions(config) == {device_map.id: device_map.digest}
    assert not is_trusted(ChargerConfig(map="openevse_rapi", wire="rapi:///dev/ttyUSB0"))
    assert is_trusted(ChargerConfig(map="simulated", wire="tcp://127.0.0.1"))
    assert falls_to_zero(ChargerConfig(map="simulated", wire="tcp://127.0.0.1"))
    assert not falls_to_zero(ChargerConfig(map="openevse_rapi", wire="rapi:///dev/ttyUSB0"))
    doubtful = tmp_path / "webasto_next.toml"
    text = (MAPS / doubtful.name).read_text()
    doubtful.write_text(re.sub(r'^confidence = ".*"', 'confidence = "code"', text, flags=re.MULTILINE))
    beside = ChargerConfig(map="simulated", wire="tcp://127.0.0.1", meter=MeterConfig(map=str(doubtful)))
    assert not is_trusted(beside)
    assert set(editions(beside)) == {"simulated", "webasto_next"}


def test_an_edited_map_is_another_edition(tmp_path):
    """Would catch a report that still counts after the register or scale in the map was changed."""
    copy = tmp_path / "simulated.toml"
    text = (MAPS / "simulated.toml").read_text()
    copy.write_text(text)
    config = ChargerConfig(map=str(copy), wire="tcp://127.0.0.1")
    shipped = editions(ChargerConfig(map="simulated", wire="tcp://127.0.0.1"))
    assert editions(config) == shipped
    copy.write_text(text.replace("0.1 Wh", "1 Wh"))
    assert editions(config) != shipped
    assert len(editions(ChargerConfig(map="openevse_rapi", wire="rapi:///dev/x"))["openevse_rapi"]) == 64


async def test_an_unknown_map_is_named():
    """Would catch a typo that ends in a traceback."""
    with pytest.raises(MapError, match="did you mean 'simulated'"):
        is_trusted(ChargerConfig(map="simulatd", wire="tcp://127.0.0.1"))
