"""Finding out who answers: rates, formats, device ids and maps, against simulated devices and nobody at all."""

from __future__ import annotations

import pytest

from firmware_bridge import probing
from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.device_map import load_map
from firmware_bridge.modbus import Bus
from firmware_bridge.probing import Search, is_evidence, known_maps, lines, longest_s, probe
from firmware_bridge.simulator import AlsoDevice, Simulator, SimulatorConfig
from firmware_bridge.simulator.rapi import RapiSimulator, RapiSimulatorConfig

MAPS = ("simulated", "webasto_next", "obo_ion_epc2plus")


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Loopback devices answer at once."""
    monkeypatch.setattr(probing, "ASK_MS", 150)


async def found_on(wire, *, ids=(1,), names=MAPS):
    """Everybody who answers, and what was said meanwhile."""
    said = []
    maps = known_maps(names, load_map)
    return [one async for one in probe(wire, Search(device_ids=ids), maps, said.append)], said


async def test_a_unit_is_named_with_its_line_and_its_map(tmp_path):
    """Would catch a probe that stops at the first silent id, or names a map that merely could be read."""
    async with Simulator(SimulatorConfig(pty=str(tmp_path / "tty"), device_id=3)):
        (found,), said = await found_on(f"rtu://{tmp_path}/tty", ids=(2, 3))
    assert str(found).startswith("unit 3 answers at 19200 8N1 as simulated (V2V Simulated charger)")
    assert [fit.map for fit in found.fits] == ["simulated"]
    assert "trying 19200 8N1 ..." in said


class Picky(Bus):
    """A port that knows no parity, as some drivers do."""

    async def open(self):
        """Refuse everything but N."""
        if self.wire.parity != "N":
            raise BridgeError("port_refused", "invalid argument")
        await super().open()


async def test_a_port_that_cannot_do_one_format_is_tried_with_the_next(tmp_path, monkeypatch):
    """Would catch a probe that ends at the first parity a driver refuses, or says "nobody" where all were refused."""
    monkeypatch.setattr(probing, "Bus", Picky)
    maps = known_maps(("simulated",), load_map)
    async with Simulator(SimulatorConfig(pty=str(tmp_path / "tty"))):
        for formats, at in (((("E", 1), ("N", 1)), ["19200 8N1"]), ((("E", 1), ("O", 1)), "port_refused")):
            search = Search(bauds=(19_200,), formats=formats, device_ids=(1,))
            try:
                found = [one.at async for one in probe(f"rtu://{tmp_path}/tty", search, maps, lambda _: None)]
            except BridgeError as error:
                found = error.name
            assert found == at


async def test_a_device_on_tcp_that_no_map_explains_is_still_told():
    """Would catch a device that is kept secret because we have no map for it, or called by a wrong name."""
    async with Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator:
        (known,), _ = await found_on(simulator.wire)
        (unknown,), _ = await found_on(simulator.wire, names=("webasto_next",))
    assert known.fits[0].map == "simulated"
    assert known.at == simulator.wire.removeprefix("tcp://")
    assert "fits no map we have" in str(unknown)


async def test_every_charging_point_of_a_station_is_told():
    """Would catch a station whose second plug nobody finds, and one that is said to have twelve because its map could."""
    name = "phoenix_charx_sec"
    also = (AlsoDevice(f"{name}#2"), AlsoDevice(f"{name}#3"))
    async with Simulator(SimulatorConfig(map=name, tcp="127.0.0.1:0", also=also)) as simulator:
        (station,), _ = await found_on(simulator.wire, names=(name,))
    async with Simulator(SimulatorConfig(map=name, tcp="127.0.0.1:0")) as simulator:
        (single,), _ = await found_on(simulator.wire, names=(name,))
    assert station.fits[0].connectors == (1, 2, 3)
    assert str(station).endswith(f"{station.fits[0].percent} %, and {name}#2, {name}#3")
    assert single.fits[0].connectors == (1,)
    assert "#" not in str(single)


async def test_an_openevse_is_told_and_silence_is_nobody(tmp_path, monkeypatch):
    """Would catch a serial line that is only searched for Modbus."""
    monkeypatch.setattr("firmware_bridge.rapi.REPLY_S", 0.2)
    async with RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"), asleep=True)) as box:
        (found,), _ = await found_on(box.wire)
        assert "an OpenEVSE answers at 115200 8N1, RAPI as openevse_rapi" in str(found)
        box.deaf = True
        assert (await found_on(box.wire))[0] == []


async def test_a_wire_that_is_not_there_is_an_error_not_silence(tmp_path):
    """Would catch "nobody answers" where the port does not exist or the address is wrong."""
    with pytest.raises(BridgeError, match="port_missing"):
        await found_on(f"rtu://{tmp_path}/gone")
    with pytest.raises(BridgeError, match="port_missing"):
        await found_on(f"rapi://{tmp_path}/gone")
    with pytest.raises(BridgeError, match="unreachable"):
        await found_on("tcp://127.0.0.1:1")
    with pytest.raises(MapError, match="write tcp://"):
        await found_on("modbus://x")


def test_how_long_it_takes_is_known_beforehand():
    """Would catch an installer who believes it hangs."""
    search = Search(bauds=(9600, 19_200), formats=(("N", 1), ("E", 1)), device_ids=(1, 2, 3))
    assert len(lines("rtu:///dev/x", search)) == 4
    assert len(lines("tcp://127.0.0.1", search)) == 1
    assert longest_s("rtu:///dev/x", search) > 3 * longest_s("tcp://127.0.0.1", search)


@pytest.mark.parametrize(
    ("name", "value", "proves"),
    [
        ("voltage_mv", 231_000, True),
        ("voltage_mv", 23_100, False),
        ("frequency_mhz", 50_000, True),
        ("frequency_mhz", 0, False),
        ("maker", "Eastron", True),
        ("maker", "\x00\x01", False),
        ("maker", "   ", False),
        ("fault", "", False),
        ("fault", "device_code_7", False),
        ("contactor_closed", False, False),
        ("soc_permille", 65_535, False),
        ("power_w", 2_000_000_000, False),
        ("current_ma", 16_000, True),
        ("register_mwh", 1_234_567_000, True),
        ("register_mwh", 2**60, False),
        ("pilot_state", "B", True),
        ("pilot_state", None, False),
    ],
)
def test_only_what_would_be_an_odd_accident_is_evidence(name, value, proves):
    """Would catch a map that "fits" a device full of zeros or of garbage."""
    assert is_evidence(name, value) is proves


def test_a_map_that_does_not_load_does_not_end_the_search():
    """Would catch one broken file that hides every device."""
    assert [one.id for one in known_maps(("nonsense", "simulated"), load_map)] == ["simulated"]
