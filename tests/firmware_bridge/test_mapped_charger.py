"""Real devices by their maps, on a real wire, against the simulator laid out by the same maps."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace

import pytest

from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.device_map import MAPS, NoValue, load_map
from firmware_bridge.mapped_charger import (
    ChargerConfig,
    MeterConfig,
    open_charger,
    read_device,
    unproven,
)
from firmware_bridge.simulator import PlantConfig, Simulator, SimulatorConfig
from firmware_bridge.stopping import StopModel, StopPlanner

QUICK = PlantConfig(ev_lag_ms=300, ev_ramp_ma_per_s=60_000)
METER = "eastron_sdm630_sdm72v2"


def simulated(name: str, tmp_path=None, **changes) -> SimulatorConfig:
    """A simulator of this map, with its meter where it needs one; on a pty when it is a serial device."""
    where = {"pty": str(tmp_path / "ttySIM")} if tmp_path else {"tcp": "127.0.0.1:0"}
    config = SimulatorConfig(map=name, plant=QUICK, **where)
    if load_map(name).energy.meter_required:
        config = replace(config, meter_map=METER)
    return replace(config, **changes)


def connected(simulator: Simulator, **changes) -> ChargerConfig:
    """The configuration that reaches this simulator."""
    meter = MeterConfig(map=METER) if simulator.meter_map else None
    # One bus, one baud rate: the meter of these tests is set to the charger's.
    return ChargerConfig(map=simulator.map.id, wire=simulator.wire, meter=meter, **changes)


async def read_until(charger, wanted, *, beat=None, limit_s: float = 10):
    """Read (and beat) until a reading is as wanted."""
    async with asyncio.timeout(limit_s):
        while True:
            if beat is not None:
                await beat()
            reading = await charger.read()
            if wanted(reading):
                return reading
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(
    ("name", "serial"),
    [("simulated", False), ("simulated", True), ("webasto_next", False), ("obo_ion_epc2plus", True)],
)
async def test_every_device_arms_delivers_and_stops(name, serial, tmp_path):
    """Would catch a map whose registers do not do what they say: the plant's truth is compared, not the wire's word."""
    async with Simulator(simulated(name, tmp_path if serial else None)) as simulator:
        charger = await open_charger(connected(simulator))
        try:
            identity = await charger.identify()
            assert identity.device_map == name
            begin = await charger.read()
            assert begin.seen_open
            assert begin.register_mwh is not None
            await charger.arm(3)
            assert simulator.truth().failsafe_armed
            assert simulator.plant.failsafe_current_ma == 0
            assert simulator.plant.failsafe_timeout_ms == 3000

            async def beat():
                await charger.set_limit(current_ma=16_000)

            flowing = await read_until(charger, lambda seen: seen.power_w > 10_900, beat=beat)
            assert flowing.pilot_state == "C"
            assert flowing.fault is None
            assert simulator.truth().offered_ma == 16_000
            counted = await read_until(
                charger, lambda seen: seen.register_mwh >= begin.register_mwh + 2000, beat=beat
            )
            assert counted.register_mwh <= simulator.truth().register_mwh
            await charger.hold()
            assert simulator.truth().offered_ma == 0
            ended = await read_until(charger, lambda seen: seen.seen_open)
            truth = simulator.truth()
            assert not truth.energised
            assert 0 <= truth.register_mwh - ended.register_mwh <= charger.limits.counter_step_mwh
        finally:
            await charger.close()


async def test_an_order_of_30_wh_lands_on_the_order():
    """Would catch a stop that is exact in the model only: the whole path, wire included, in real time."""
    async with Simulator(simulated("simulated")) as simulator:
        charger = await open_charger(connected(simulator))
        planner = StopPlanner(
            charger.limits, StopModel(ev_lag_ms=1000, ramp_ma_per_s=30_000, command_latency_ms=100)
        )
        try:
            loop = asyncio.get_running_loop()
            target = (await charger.read()).register_mwh + 30_000
            await charger.arm(5)
            async with asyncio.timeout(45):
                while True:
                    reading = await charger.read()
                    planner.observe(reading)
                    now_ms = int(loop.time() * 1000)
                    plan = planner.plan(now_ms, target, charger.limits.current_ma_max)
                    if plan.reached and reading.seen_open:
                        break
                    await charger.set_limit(current_ma=plan.current_ma)
                    wait_ms = charger.limits.poll_interval_ms
                    if plan.stop_at_ms is not None and plan.stop_at_ms - now_ms < wait_ms:
                        await asyncio.sleep(max(0, plan.stop_at_ms / 1000 - loop.time()))
                        await charger.hold()
                    await asyncio.sleep(wait_ms / 1000)
            assert 30_000 <= simulator.truth().delivered_mwh <= 31_000
        finally:
            await charger.close()


async def test_power_is_refused_before_the_failsafe_is_armed():
    """Would catch the contactor closing on a box that would not let go by itself."""
    async with Simulator(simulated("simulated")) as simulator:
        charger = await open_charger(connected(simulator))
        try:
            with pytest.raises(BridgeError, match="not_armed"):
                await charger.set_limit(current_ma=16_000)
            await charger.arm(2)
            await charger.lock()
            with pytest.raises(BridgeError, match="not_armed"):
                await charger.set_limit(current_ma=16_000)
            assert not simulator.truth().enabled
            assert simulator.truth().locked
        finally:
            await charger.close()


async def test_a_failsafe_time_the_device_cannot_keep_is_refused():
    """Would catch a driver that arms something else than it was told."""
    async with Simulator(simulated("simulated")) as simulator:
        charger = await open_charger(connected(simulator))
        try:
            with pytest.raises(BridgeError, match=r"failsafe_not_armed.*1000 to 60000"):
                await charger.arm(61)
        finally:
            await charger.close()


@pytest.mark.parametrize("name", ["simulated", "webasto_next"])
async def test_silence_cuts_the_power_within_the_armed_time(name):
    """Would catch a keep-alive sent by anything but the control beat: reading on must not keep the power on."""
    async with Simulator(simulated(name)) as simulator:
        charger = await open_charger(connected(simulator))
        try:
            await charger.arm(1)

            async def beat():
                await charger.set_limit(current_ma=32_000)

            await read_until(charger, lambda seen: seen.power_w > 20_000, beat=beat)
            loop = asyncio.get_running_loop()
            silent_since = loop.time()
            await read_until(charger, lambda seen: seen.power_w == 0)
            assert loop.time() - silent_since <= 1.3
            assert simulator.truth().failsafe_tripped
            await read_until(charger, lambda seen: seen.power_w > 20_000, beat=beat)
        finally:
            await charger.close()


async def test_set_points_are_written_on_change_only():
    """Would catch flash wear: a hundred beats are one set point, one switch, and some keep-alives."""
    async with Simulator(simulated("simulated")) as simulator:
        charger = await open_charger(connected(simulator))
        try:
            await charger.arm(2)
            simulator.writes.clear()
            for _ in range(100):
                await charger.set_limit(current_ma=20_000)
                await charger.read()
            addresses = [address for _, address, _ in simulator.writes]
            assert addresses.count(200) == 1
            assert addresses.count(201) == 1
            for _ in range(20):
                await charger.hold()
            addresses = [address for _, address, _ in simulator.writes]
            assert addresses.count(200) == 2
            assert addresses.count(201) == 2
        finally:
            await charger.close()


async def test_a_set_point_changed_behind_our_back_is_written_again():
    """Would catch a driver that believes its memory instead of the device."""
    async with Simulator(simulated("simulated")) as simulator:
        charger = await open_charger(connected(simulator))
        try:
            await charger.arm(5)

            async def beat():
                await charger.set_limit(current_ma=32_000)

            await read_until(charger, lambda seen: seen.power_w > 20_000, beat=beat)
            simulator.plant.set_limit(6000, simulator._now_ms())
            await read_until(charger, lambda _: simulator.truth().offered_ma == 32_000, beat=beat, limit_s=3)
        finally:
            await charger.close()


async def test_limits_are_the_installations():
    """Would catch 32 A on a 16 A cable, and 3 A on a pilot that knows none."""
    async with Simulator(simulated("simulated")) as simulator:
        charger = await open_charger(connected(simulator, current_ma_max=16_000, phase_count=1))
        try:
            assert charger.limits.current_ma_max == 16_000
            await charger.arm(2)
            await charger.set_limit(current_ma=32_000)
            assert simulator.truth().offered_ma == 16_000
            await charger.set_limit(power_w=2300)
            assert simulator.truth().offered_ma == 10_000
            with pytest.raises(BridgeError, match="limit_out_of_range"):
                await charger.set_limit(current_ma=3000)
            await charger.set_limit(current_ma=0)
            assert not simulator.truth().enabled
        finally:
            await charger.close()


async def test_a_device_without_zero_fallback_needs_a_named_cut_off(tmp_path):
    """Would catch unattended sale on a box that goes on delivering when its driver is dead (BRIDGE rule 7)."""
    text = (
        (MAPS / "simulated.toml")
        .read_text(encoding="utf-8")
        .replace("zero_fallback = true", "zero_fallback = false")
    )
    path = tmp_path / "simulated.toml"
    path.write_text(text, encoding="utf-8")
    async with Simulator(simulated("simulated")) as simulator:
        config = ChargerConfig(map=str(path), wire=simulator.wire)
        with pytest.raises(MapError, match="external_cut_off"):
            await open_charger(config)
        charger = await open_charger(config.model_copy(update={"external_cut_off": "contactor K1"}))
        await charger.arm(5)
        await charger.set_limit(current_ma=6000)
        await charger.close()


async def test_the_cut_off_runs_its_program_and_says_when_it_failed(tmp_path):
    """Would catch a last resort that does nothing, or fails without anybody hearing of it."""
    opened = tmp_path / "opened"
    touch = (sys.executable, "-c", f"open({str(opened)!r}, 'w').close()")
    async with Simulator(simulated("simulated")) as simulator:
        charger = await open_charger(connected(simulator, external_cut_off="K1", cut_off_command=touch))
        await charger.cut_off()
        assert opened.exists()
        await charger.close()
        failing = connected(
            simulator, external_cut_off="K1", cut_off_command=(sys.executable, "-c", "raise SystemExit(1)")
        )
        charger = await open_charger(failing)
        with pytest.raises(BridgeError, match=r"cut_off_failed: K1 ended with 1"):
            await charger.cut_off()
        await charger.close()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"map": "obo_ion_epc2plus"}, "add a meter"),
        ({"map": METER}, "is a meter"),
        ({"meter": MeterConfig(map="webasto_next")}, "is no meter"),
        (
            {"map": "obo_ion_epc2plus", "meter": MeterConfig(map=METER, device_id=101)},
            "both have device id 101",
        ),
    ],
)
async def test_what_does_not_fit_together_is_refused_before_anything_is_driven(changes, told):
    """Would catch a provider who sells on a device that cannot count, or two devices that answer as one."""
    async with Simulator(simulated("simulated")) as simulator:
        config = ChargerConfig(
            **{"map": "simulated", "wire": simulator.wire.replace("tcp:", "rtu+tcp:"), **changes}
        )
        with pytest.raises(MapError, match=told):
            await open_charger(config)


async def test_a_meter_on_the_chargers_bus_speaks_as_the_charger_does(tmp_path):
    """Would catch a pair that is refused because their makers deliver them with different baud rates."""
    async with Simulator(simulated("obo_ion_epc2plus", tmp_path)) as simulator:
        wire = (
            simulator.wire.partition("?")[0] + "?parity=N&stop_bits=1"
        )  # the baud rate is the charger's, 19200
        config = ChargerConfig(map="obo_ion_epc2plus", wire=wire, meter=MeterConfig(map=METER))
        charger = await open_charger(config)
        assert (await charger.read()).register_mwh is not None
        await charger.close()


async def test_a_meter_may_be_turned_round():
    """Would catch an export wiring that is billed from the import counter."""
    pins = {"register_export_mwh": 7_000_000, "power_w": -4000}
    async with Simulator(replace(simulated("obo_ion_epc2plus"), pinned=pins)) as simulator:
        meter = MeterConfig(map=METER, direction="export")
        charger = await open_charger(ChargerConfig(map="obo_ion_epc2plus", wire=simulator.wire, meter=meter))
        reading = await charger.read()
        await charger.close()
        assert reading.register_mwh == 7_000_000
        assert reading.power_w == 4000


@pytest.mark.parametrize("name", ["simulated", "webasto_next", METER])
async def test_every_quantity_that_is_pinned_is_read_back(name):
    """Would catch a quantity that the simulator lays out in one way and the driver decodes in another."""
    pins = {
        "power_w": 4321,
        "current_ma": 6260,
        "voltage_mv": 231_000,
        "register_mwh": 5_000_000,
        "pilot_state": "C",
    }
    pins |= {"register_import_mwh": 6_000_000, "register_export_mwh": 7_000_000, "frequency_mhz": 50_000}
    async with Simulator(SimulatorConfig(map=name, tcp="127.0.0.1:0", pinned=pins)) as simulator:
        seen = await read_device(name, simulator.wire)
    compared = {key: value for key, value in seen.items() if key in pins}
    assert compared == {key: pins[key] for key in compared}
    assert len(compared) >= 4


def variant(name: str, folder, *changes: tuple[str, str]) -> str:
    """The map of this name with these pieces replaced, as a file."""
    text = (MAPS / f"{name}.toml").read_text(encoding="utf-8")
    for before, after in changes:
        assert before in text
        text = text.replace(before, after, 1)
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("charger", "meter", "proofs"),
    [
        ("simulated", None, ()),
        ("webasto_next", None, ()),
        ("obo_ion_epc2plus", METER, ()),
        ("heidelberg_energy_control", METER, ()),
        ("heidelberg_energy_control", "abb_b23_b24", ("energy",)),
        ("keba_p30", None, ("failsafe", "energy")),
        ("keba_p30", METER, ("failsafe",)),
        ("abb_terra_ac", METER, ("failsafe",)),
        ("evse_din_simpleevse", "iskra_wm3m4", ("failsafe", "energy")),
    ],
)
def test_what_must_be_proven_is_said_of_the_pair(charger, meter, proofs):
    """Would catch a sale by a map that nobody confirmed (BRIDGE rule 9), and a good meter that helps nobody."""
    config = ChargerConfig(
        map=charger, wire="tcp://127.0.0.1:502", meter=MeterConfig(map=meter) if meter else None
    )
    assert unproven(config) == proofs


async def test_a_car_that_is_not_plugged_is_state_a():
    """Would catch KEBA's "not ready", which does not tell a missing car from a waiting one, sold to as B."""
    pins = {"pilot_state": "B", "plugged": True}
    async with Simulator(SimulatorConfig(map="keba_p30", tcp="127.0.0.1:0", pinned=pins)) as simulator:
        charger = await open_charger(connected(simulator))
        assert (await charger.read()).pilot_state == "B"
        pins["plugged"] = False
        assert (await charger.read()).pilot_state == "A"
        await charger.close()


async def test_power_that_is_not_shown_is_not_taken_for_none():
    """Would catch a stop that is believed because the device shows a sentinel instead of its 11 kW."""
    pins = {"power_w": 11_000, "pilot_state": "B"}
    config = SimulatorConfig(map="bender_cc61x", tcp="127.0.0.1:0", pinned=pins)
    async with Simulator(config) as simulator:
        charger = await open_charger(connected(simulator))
        pins["power_w"] = NoValue()
        reading = await charger.read()
        assert reading.power_w == 11_000
        assert not reading.seen_open
        await charger.close()
        with pytest.raises(BridgeError, match=r"power_unreadable.*is a meter fitted"):
            await open_charger(connected(simulator))


async def test_a_fallback_that_only_the_installer_can_set_must_be_right_already(tmp_path):
    """Would catch an Alfen armed with a safe current of 6 A: silence would go on charging for ever."""
    name = variant(
        "simulated",
        tmp_path,
        ('raw_unit = "1 mA"\n\n[energy]', 'raw_unit = "1 mA"\naccess = "R"\n\n[energy]'),
    )
    async with Simulator(simulated("simulated")) as simulator:
        charger = await open_charger(ChargerConfig(map=name, wire=simulator.wire))
        with pytest.raises(BridgeError, match=r"failsafe_not_armed.*holds 6000 at 205.*own menu"):
            await charger.arm(2)
        simulator.plant.arm_failsafe(simulator.plant.now_ms, current_ma=0)
        await charger.arm(2)
        assert all(address != 205 for _, address, _ in simulator.writes)
        await charger.close()


async def test_what_is_shown_elsewhere_is_read_back_there(tmp_path):
    """Would catch KEBA's timeout read back from the register it is written to, which breaks its connection."""
    async with Simulator(simulated("keba_p30")) as simulator:
        charger = await open_charger(connected(simulator))
        await charger.arm(2)
        await charger.close()
        assert [(at, words) for _, at, words in simulator.writes][:2] == [(5016, (0,)), (5018, (2,))]
    lying = variant("keba_p30", tmp_path, ("address = 1602", "address = 1600"))
    async with Simulator(simulated("keba_p30")) as simulator:
        charger = await open_charger(ChargerConfig(map=lying, wire=simulator.wire))
        with pytest.raises(BridgeError, match=r"failsafe_not_armed.*1600 \(timeout_ms\) after 2000"):
            await charger.arm(2)
        await charger.close()


async def test_the_timeout_itself_is_what_feeds_some_timers():
    """Would catch a KEBA or a SunSpec device that stops in the middle of a sale, though everybody is well."""
    async with Simulator(simulated("sunspec_der_7xx")) as simulator:
        charger = await open_charger(connected(simulator))
        await charger.arm(5)
        simulator.writes.clear()
        await read_until(
            charger,
            lambda _: [words for _, _, words in simulator.writes].count((0, 5)) >= 2,
            beat=lambda: charger.set_limit(current_ma=16_000),
            limit_s=30,
        )
        assert not simulator.truth().failsafe_tripped
        assert simulator.truth().offered_ma == 16_000
        await charger.close()


async def test_a_device_that_refuses_to_fall_back_to_zero_says_so(tmp_path):
    """Would catch an installer left alone with "exception 3" by a CHARX whose fallback takes 6 to 80 A only."""
    name = variant(
        "phoenix_charx_sec",
        tmp_path,
        ('address = 1306\ntype = "u16"', 'address = 1306\ntype = "u16"\nzero = "forbidden"\nrange = ["6 A"]'),
    )
    async with Simulator(simulated(name)) as simulator:
        charger = await open_charger(ChargerConfig(map="phoenix_charx_sec", wire=simulator.wire))
        with pytest.raises(
            BridgeError, match=r"failsafe_not_armed.*refuses to fall back to 0.*external_cut_off"
        ):
            await charger.arm(5)
        with pytest.raises(BridgeError, match="not_armed"):
            await charger.set_limit(current_ma=6_000)
        await charger.close()


async def test_a_device_with_a_named_cut_off_is_not_asked_to_fall_back():
    """Would catch a box that refuses a fallback of 0 A and so could not be used even behind a watchdog contactor."""
    async with Simulator(simulated("phoenix_charx_sec")) as simulator:
        charger = await open_charger(connected(simulator, external_cut_off="contactor K1"))
        await charger.arm(2)
        assert all(address not in (1306, 1307) for _, address, _ in simulator.writes)
        assert not simulator.truth().failsafe_armed
        await charger.close()


async def test_a_counter_is_only_as_fine_as_what_it_holds():
    """Would catch a stop planned to the Wh on a float that has long been counting in twos (20 MWh, kWh as f32)."""
    old = replace(QUICK, register_mwh_begin=20_000_000_000)
    for plant, step_mwh in ((QUICK, 1000), (old, 1954)):
        async with Simulator(replace(simulated("obo_ion_epc2plus"), plant=plant)) as simulator:
            charger = await open_charger(connected(simulator))
            assert charger.limits.counter_step_mwh == step_mwh
            await charger.close()


async def test_a_set_point_that_expires_is_kept_at_zero_too():
    """Would catch a stop that runs out after a minute, and the box going back to its safe current."""
    async with Simulator(simulated("alfen_ng9xx")) as simulator:
        charger = await open_charger(connected(simulator))
        await charger.arm(2)
        simulator.writes.clear()
        holds = []
        while len(holds) < 3:
            await charger.hold()
            holds = [words for _, address, words in simulator.writes if address == 1210]
            await asyncio.sleep(0.05)
        assert set(holds) == {(0, 0)}
        await charger.close()
