"""An OpenEVSE (RAPI) with a Modbus meter beside it: whose number is whose, and that stopping needs no meter."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest

from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.device_map import load_map
from firmware_bridge.mapped_charger import ChargerConfig, MeterConfig
from firmware_bridge.metered_charger import MeteredCharger
from firmware_bridge.modbus import Buses
from firmware_bridge.opening import editions, is_trusted, open_charger, open_to_stop
from firmware_bridge.simulator import PlantConfig, Simulator, SimulatorConfig
from firmware_bridge.simulator.rapi import RapiSimulator, RapiSimulatorConfig, single_phase

METER = "janitza_b2x"
BEGIN_MWH = 500_000_000
QUICK = single_phase(PlantConfig(ev_lag_ms=100, ev_ramp_ma_per_s=200_000, register_mwh_begin=BEGIN_MWH))


@asynccontextmanager
async def stood(tmp_path, **pinned):
    """A box and a meter that measures it, simulated, and the configuration that reaches both."""
    async with RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"), asleep=True, plant=QUICK)) as box:
        meter = SimulatorConfig(map=METER, tcp="127.0.0.1:0", pinned=pinned)
        async with Simulator(meter, box.plant) as beside:
            yield box, beside, configured(box.wire, beside.wire)


def configured(wire, meter_wire, **meter):
    """An OpenEVSE with a meter."""
    return ChargerConfig(
        map="openevse_rapi",
        wire=wire,
        phase_count=1,
        external_cut_off="K1",
        meter=MeterConfig(map=METER, wire=meter_wire, **meter),
    )


async def read_until(charger, wanted, *, beat=None):
    """Read (and beat) until a reading is as wanted."""
    async with asyncio.timeout(30):
        while not wanted(reading := await charger.read()):
            if beat is not None:
                await beat()
            await asyncio.sleep(0.02)
        return reading


async def test_the_meter_bills_and_the_box_obeys(tmp_path):
    """Would catch a register or power of the box's own taken for the meter's: the box counts 7 kWh more here."""
    async with stood(tmp_path) as (box, _, config):
        box._past_wh += 7_000
        charger = await open_charger(config, Buses())
        try:
            assert isinstance(charger, MeteredCharger)
            assert (await charger.identify()).maker == "OpenEVSE"
            assert charger.limits.counter_step_mwh == load_map(METER).energy.step_mwh
            await charger.hold()
            await charger.arm(5)

            async def beat():
                await charger.set_limit(current_ma=32_000)

            reading = await read_until(
                charger, lambda seen: (seen.register_mwh or 0) > BEGIN_MWH and seen.power_w > 1_000, beat=beat
            )
            truth = box.truth()
            assert BEGIN_MWH < reading.register_mwh <= truth.register_mwh
            assert truth.register_mwh - reading.register_mwh < 1_000_000, "and not 7 kWh beside it"
            assert abs(reading.power_w - truth.power_w) <= 10
            assert (reading.pilot_state, reading.contactor_closed, reading.fault) == ("C", True, None)
            await charger.hold()
            assert not box.truth().enabled
            await read_until(charger, lambda seen: seen.seen_open)
        finally:
            await charger.close()


async def test_stopping_needs_no_meter(tmp_path):
    """Would catch a dead meter that keeps the box from being stopped, and its old numbers going on to be believed."""
    async with stood(tmp_path) as (box, beside, config):
        charger = await open_charger(config, Buses())
        try:
            await charger.arm(5)
            await charger.set_limit(current_ma=32_000)
            assert box.truth().enabled
            await beside._slave.close()
            with pytest.raises(BridgeError):
                await charger.read()
            await charger.hold()
            assert not box.truth().enabled
            await charger.lock()
            assert box.truth().locked
        finally:
            await charger.close()


async def test_power_while_held_is_seen_in_the_meter(tmp_path, monkeypatch):
    """Would catch a box that says "asleep" while its relay is welded: only the meter can know."""
    monkeypatch.setattr("firmware_bridge.plausibility.HELD_GRACE_MS", 0)
    async with stood(tmp_path, power_w=1_380) as (_box, _, config):
        charger = await open_charger(config, Buses())
        try:
            await charger.hold()
            reading = await read_until(charger, lambda seen: seen.fault is not None)
            assert reading.fault == "flow_while_held"
            assert not reading.seen_open
        finally:
            await charger.close()


async def test_a_meter_turned_round_counts_the_other_way(tmp_path):
    """Would catch a sign that the configuration turns for the register and not for the power."""
    async with stood(tmp_path, power_w=-2_000, register_export_mwh=9_000_000) as (box, beside, _):
        charger = await open_charger(configured(box.wire, beside.wire, direction="export"), Buses())
        try:
            reading = await charger.read()
            assert (reading.power_w, reading.register_mwh) == (2_000, 9_000_000)
        finally:
            await charger.close()


@pytest.mark.parametrize(
    ("meter", "told"),
    [
        (MeterConfig(map=METER), "carries no Modbus"),
        (MeterConfig(map="webasto_next", wire="tcp://127.0.0.1:9"), "is no meter"),
        (
            MeterConfig(map="carlo_gavazzi_em24", wire="tcp://127.0.0.1:9", direction="export"),
            "no export counter",
        ),
        (MeterConfig(map="carlo_gavazi", wire="tcp://127.0.0.1:9"), "did you mean"),
    ],
)
async def test_a_meter_that_cannot_bill_is_refused_before_the_port_is_opened(tmp_path, meter, told):
    """Would catch a sale that begins and cannot be billed."""
    async with RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"), plant=QUICK)) as box:
        config = configured(box.wire, "tcp://127.0.0.1:9").model_copy(update={"meter": meter})
        with pytest.raises(MapError, match=told):
            await open_charger(config, Buses())
        assert box.heard == []


async def test_a_meter_that_does_not_answer_leaves_the_box_to_others(tmp_path):
    """Would catch a serial port that stays locked after an opening that failed: whoever stops the box cannot have it."""
    async with RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"), plant=QUICK)) as box:
        config = configured(box.wire, "tcp://127.0.0.1:9")
        with pytest.raises(BridgeError, match="unreachable"):
            await open_charger(config, Buses())
        charger = await open_to_stop(config, Buses())
        await charger.hold()
        await charger.close()
        assert not box.truth().enabled


def test_a_report_is_about_box_and_meter():
    """Would catch a commissioning that still counts after the meter's map was changed."""
    config = configured("rapi:///dev/ttyUSB0", "tcp://127.0.0.1")
    assert set(editions(config)) == {"openevse_rapi", METER}
    assert not is_trusted(config)
