"""The simulated device as a stranger sees it: raw pymodbus against documented addresses, no map and no driver in between."""

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from pymodbus.client import AsyncModbusTcpClient

from firmware_bridge.simulator import PlantConfig, Simulator, SimulatorConfig

ILLEGAL_ADDRESS = 2


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
