"""The simulated device as a stranger sees it: raw pymodbus against documented addresses, no map and no driver in between."""

import asyncio
import contextlib
import shutil
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pymodbus import FramerType
from pymodbus.client import AsyncModbusTcpClient

from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.device_map import MAPS
from firmware_bridge.mapped_charger import read_device
from firmware_bridge.simulator import AlsoDevice, PlantConfig, Simulator, SimulatorConfig
from firmware_bridge.simulator.scenario import Fault

ILLEGAL_FUNCTION, ILLEGAL_ADDRESS, ILLEGAL_VALUE, NOBODY = 1, 2, 3, 11


@asynccontextmanager
async def stranger(config: SimulatorConfig) -> AsyncIterator[tuple[Simulator, AsyncModbusTcpClient]]:
    """A device and somebody else's master."""
    async with Simulator(config) as simulator:
        host, port = simulator.wire.removeprefix("tcp://").split(":")
        client = AsyncModbusTcpClient(host, port=int(port), timeout=2, retries=0)
        assert await client.connect()
        try:
            yield simulator, client
        finally:
            client.close()


async def becomes(holds) -> None:
    """Wait until it does."""
    async with asyncio.timeout(10):
        while True:
            if holds():
                return
            await asyncio.sleep(0.005)


def as_float(words: list[int]) -> float:
    """IEEE 754, most significant word first: what the SDM630's manual says."""
    (value,) = struct.unpack(">f", struct.pack(">HH", *words))
    assert isinstance(value, float)
    return value


async def test_a_meter_answers_at_its_makers_addresses() -> None:
    """Would catch a simulator that agrees only with our own driver: 0x34 is total power, 0x4A exported energy in kWh."""
    plant = PlantConfig(register_mwh_begin=1_234_500_000)
    config = SimulatorConfig(
        map="eastron_sdm630_sdm72v2", tcp="127.0.0.1:0", plant=plant, pinned={"power_w": 1234}
    )
    async with stranger(config) as (_, client):
        power = await client.read_input_registers(0x34, count=2, device_id=1)
        assert as_float(power.registers) == 1234.0
        imported = await client.read_input_registers(0x48, count=2, device_id=1)
        exported = await client.read_input_registers(0x4A, count=2, device_id=1)
        shown = max(as_float(imported.registers), as_float(exported.registers))
        assert shown == pytest.approx(1234.5, abs=0.01)


async def test_an_address_that_does_not_exist_is_refused_as_the_device_does() -> None:
    """Would catch a simulator that answers anything, so that a wrong address in a map is never found."""
    async with stranger(SimulatorConfig(map="eastron_sdm630_sdm72v2", tcp="127.0.0.1:0")) as (_, client):
        answer = await client.read_input_registers(0x9000, count=2, device_id=1)
        assert answer.isError()
        assert answer.exception_code == ILLEGAL_ADDRESS


async def test_the_chargers_set_point_moves_the_plant() -> None:
    """Would catch registers that are only memory: a current written at the documented address must reach the car."""
    async with stranger(SimulatorConfig(map="webasto_next", tcp="127.0.0.1:0")) as (simulator, client):
        before = simulator.truth().offered_ma
        answer = await client.write_registers(5004, [16], device_id=255)
        assert not answer.isError()
        assert (before, simulator.truth().offered_ma) == (0, 16_000)


async def test_two_simulators_do_not_share_a_world() -> None:
    """Would catch physics kept in a module instead of a device."""
    config = SimulatorConfig(map="webasto_next", tcp="127.0.0.1:0")
    async with stranger(config) as (one, client), Simulator(config) as other:
        await client.write_registers(5004, [16], device_id=255)
        assert one.truth().offered_ma == 16_000
        assert other.truth().offered_ma == 0


async def test_a_block_longer_than_the_device_takes_is_refused() -> None:
    """Would catch a simulator that answers a read of 125 registers where the device refuses 65."""
    async with stranger(SimulatorConfig(map="simulated", tcp="127.0.0.1:0")) as (simulator, client):
        longest = simulator.map.wire.block_words_max + simulator.map.wire.spare_words
        answers = [
            await client.read_holding_registers(100, count=count, device_id=1) for count in (8, longest + 1)
        ]
        assert [answer.isError() and answer.exception_code for answer in answers] == [False, ILLEGAL_VALUE]
        over_the_end = await client.read_holding_registers(206, count=4, device_id=1)
        assert over_the_end.exception_code == ILLEGAL_ADDRESS
        unknown = await client.read_exception_status(device_id=1)
        assert unknown.exception_code == ILLEGAL_FUNCTION


async def test_a_device_that_takes_one_value_at_a_time_refuses_two(tmp_path) -> None:
    """Would catch a simulated KEBA that is kinder than the real one: block reads must be refused."""
    text = (MAPS / "simulated.toml").read_text().replace("[wire]", '[wire]\nblocks = "single_value"')
    (tmp_path / "simulated.toml").write_text(text)
    config = SimulatorConfig(map=str(tmp_path / "simulated.toml"), tcp="127.0.0.1:0")
    async with stranger(config) as (_, client):
        counter, with_power = [
            await client.read_holding_registers(100, count=count, device_id=1) for count in (4, 8)
        ]
        assert not counter.isError()
        assert with_power.exception_code == ILLEGAL_ADDRESS


async def test_several_devices_share_a_wire_and_only_a_meter_shares_a_plant() -> None:
    """Would catch a second charger that follows the first one's set point, or a meter that measures nobody."""
    others = (AlsoDevice("webasto_next", 7), AlsoDevice("eastron_sdm630_sdm72v2", 8, {"voltage_mv": 231_000}))
    config = SimulatorConfig(
        map="webasto_next", tcp="127.0.0.1:0", also=others, plant=PlantConfig(ev_lag_ms=0)
    )
    async with stranger(config) as (simulator, client):
        await client.write_registers(5004, [16], device_id=7)
        await becomes(lambda: simulator.truths()["7"].power_w >= 5_000)
        assert simulator.truths()["255"].power_w == 0
        volts = await client.read_input_registers(0x00, count=2, device_id=8)
        assert as_float(volts.registers) == 231.0
        power = await client.read_input_registers(0x34, count=2, device_id=8)
        assert as_float(power.registers) >= 5_000
        nobody = await client.read_holding_registers(100, count=1, device_id=9)
        assert nobody.exception_code == NOBODY
    with pytest.raises(MapError, match="both have device id 255"):
        await Simulator(replace(config, also=(AlsoDevice("webasto_next"),))).__aenter__()


async def test_a_station_answers_for_all_its_charging_points_under_one_id() -> None:
    """Would catch a second plug that is refused as another device, or one that obeys what the first was told."""
    also = (AlsoDevice("phoenix_charx_sec#2"),)
    config = SimulatorConfig(map="phoenix_charx_sec", tcp="127.0.0.1:0", also=also)
    async with stranger(config) as (simulator, client):
        assert not (await client.write_registers(2301, [16], device_id=1)).isError()
        offered = {name: truth.offered_ma for name, truth in simulator.truths().items()}
        assert offered["1#2"] == 16_000 != offered["1"]
        for address in (1250, 2250):
            assert not (await client.read_holding_registers(address, count=4, device_id=1)).isError()
        third = await client.read_holding_registers(3250, count=4, device_id=1)
        assert third.exception_code == ILLEGAL_ADDRESS
    with pytest.raises(MapError, match="both have device id 1"):
        await Simulator(replace(config, also=also * 2)).__aenter__()


async def test_over_tcp_0_and_255_mean_whoever_answers_and_on_a_gateway_0_means_everybody() -> None:
    """Would catch a client that addresses the host, as the standard advises, and is told that nobody is there."""
    async with stranger(SimulatorConfig(tcp="127.0.0.1:0")) as (simulator, client):
        for device_id, current_ma in ((0, 7_000), (255, 8_000)):
            assert not (await client.write_registers(200, [current_ma], device_id=device_id)).isError()
            assert simulator.truth().offered_ma == current_ma
    also = (AlsoDevice("simulated", 2),)
    async with Simulator(SimulatorConfig(tcp="127.0.0.1:0", rtu=True, also=also)) as simulator:
        host, port = simulator.wire.removeprefix("rtu+tcp://").split(":")
        client = AsyncModbusTcpClient(host, port=int(port), framer=FramerType.RTU, timeout=2, retries=0)
        assert await client.connect()
        try:
            await client.write_registers(200, [9_000], device_id=0, no_response_expected=True)
            await becomes(lambda: [one.offered_ma for one in simulator.truths().values()] == [9_000, 9_000])
            assert not (await client.read_holding_registers(100, count=4, device_id=2)).isError()
        finally:
            client.close()


async def test_a_scenario_reaches_wire_and_plant() -> None:
    """Would catch a scenario that is loaded and never played: a stop that is taken, shown, and not done."""
    scenario = (
        Fault(wire="exception", code=6, requests=1),
        Fault(plant="ignores_stop", after_wh=0.1),
        Fault(plant="counter_frozen", after_wh=0.1),
    )
    config = SimulatorConfig(tcp="127.0.0.1:0", scenario=scenario, plant=PlantConfig(ev_lag_ms=0))
    async with stranger(config) as (simulator, client):
        refused = await client.write_registers(200, [32_000, 1], device_id=1)
        assert refused.exception_code == 6
        await client.write_registers(200, [32_000, 1], device_id=1)
        await becomes(lambda: simulator.plant.faults)
        await client.write_registers(200, [0, 0], device_id=1)
        shown = await client.read_holding_registers(200, count=2, device_id=1)
        counter = await client.read_holding_registers(100, count=4, device_id=1)
        flowed_mwh = simulator.truth().delivered_mwh
        await becomes(lambda: simulator.truth().delivered_mwh > flowed_mwh + 1_000)
        again = await client.read_holding_registers(100, count=4, device_id=1)
        assert shown.registers == [0, 0]
        assert counter.registers == again.registers
        simulator.cut_off()
        assert simulator.truth().power_w == 0
        assert not simulator.truth().energised


@pytest.mark.parametrize("serial", [False, True])
async def test_a_pulled_cable_comes_back(tmp_path, serial) -> None:
    """Would catch an unplugged device that still answers, or never answers again."""
    where = {"pty": str(tmp_path / "port")} if serial else {"tcp": "127.0.0.1:0"}
    scenario = (Fault(wire="unplugged", after_wh=0.05, for_s=0.3),)
    async with Simulator(
        SimulatorConfig(scenario=scenario, plant=PlantConfig(ev_lag_ms=0), **where)
    ) as simulator:
        wire = simulator.wire
        assert (await read_device("simulated", wire))["pilot_state"] == "B"
        simulator.plant.enable(on=True, now_ms=simulator.now().now_ms)
        simulator.plant.set_limit(32_000, simulator.now().now_ms)
        await becomes(lambda: simulator.scenario.unplugged)
        await becomes(lambda: not simulator.scenario.unplugged)
        async with asyncio.timeout(10):
            while True:
                with contextlib.suppress(BridgeError):
                    assert (await read_device("simulated", wire))["pilot_state"] == "C"
                    break


@pytest.mark.skipif(shutil.which("mbpoll") is None, reason="mbpoll is not installed (apt-get install mbpoll)")
@pytest.mark.parametrize("serial", [False, True])
async def test_mbpoll_reads_and_writes_it_as_any_device(tmp_path, serial) -> None:
    """Would catch frames that only pymodbus takes: libmodbus is the independent master, over TCP and on a serial line."""
    where = {"pty": str(tmp_path / "port")} if serial else {"tcp": "127.0.0.1:0"}
    async with Simulator(SimulatorConfig(pinned={"power_w": -1234}, **where)) as simulator:
        if serial:
            place = ("-m", "rtu", "-b", str(simulator.map.wire.baud), "-P", "none", str(tmp_path / "port"))
        else:
            host, port = simulator.wire.removeprefix("tcp://").split(":")
            place = ("-m", "tcp", "-p", port, host)
        *options, last = place
        once = ("-0", "-1", "-a", "1", "-o", "5")
        read = await mbpoll(*options, *once, "-r", "104", "-c", "1", "-t", "4:int", "-B", last)
        assert "-1234" in read
        await mbpoll(*options, *once, "-r", "200", "-t", "4", last, "--", "16000")
        assert simulator.truth().offered_ma == 16_000


def as_request(fc: int, tail: bytes) -> bytes:
    """A request near the addresses that exist."""
    return bytes([fc, 0]) + bytes([200 - len(tail)]) + tail


async def mbpoll(*words: str) -> str:
    """What it says; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        "mbpoll", *words, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    out, _ = await process.communicate()
    assert process.returncode == 0, out.decode()
    return out.decode()


@settings(max_examples=100, deadline=None)
@given(
    pdu=st.binary(min_size=1, max_size=253) | st.builds(as_request, st.integers(1, 16), st.binary(max_size=8))
)
async def test_no_request_however_odd_breaks_the_device(pdu) -> None:
    """Would catch a request that ends the simulator, or an answer that no master could read."""
    simulator = Simulator(SimulatorConfig(tcp="127.0.0.1:0"))
    device = simulator._laid_out()[1]
    answer = device.answer(pdu)
    refused = answer[0] == pdu[0] | 0x80 and len(answer) == 2
    read = answer[0] == pdu[0] <= 4 and len(answer) == 2 + answer[1]
    written = answer == pdu[:5] and pdu[0] in (5, 6, 15, 16)
    assert refused or read or written
