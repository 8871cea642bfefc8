"""Every map through the simulator and the driver: each quantity, each command, each sentinel, both word orders.

The wire is real (loopback TCP); what is compared is the plant's truth or the pinned value with what the driver says.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from firmware_bridge import registers
from firmware_bridge.charger import BridgeError
from firmware_bridge.device_map import MAPS, NoValue, Point, Value, load_map, map_names
from firmware_bridge.mapped_charger import ChargerConfig, MeterConfig, device_reader, open_charger
from firmware_bridge.simulator import PlantConfig, Simulator, SimulatorConfig, server

NAMES = map_names()
CHARGERS = [name for name in NAMES if load_map(name).kind == "charger"]
METER = "eastron_sdm630_sdm72v2"
OFFER_MA = 8_000
QUICK = PlantConfig(ev_lag_ms=20, ev_ramp_ma_per_s=1_000_000, register_mwh_begin=1_234_500_000)


def copied(name: str, folder: Path, *, flip: bool = False) -> str:
    """The same map as a file of its own, without its pauses and patient with a slow machine; `flip` turns the words of
    every number round.
    """
    text = (MAPS / f"{name}.toml").read_text(encoding="utf-8")
    text = re.sub(r"gap_ms = \d+", "gap_ms = 0", text)
    text = re.sub(r"request_timeout_ms = \d+\n", "", text)
    text = text.replace("[wire]\n", "[wire]\nrequest_timeout_ms = 2000\n")
    if flip and 'word_order = "little"' in text:
        text = text.replace('word_order = "little"', 'word_order = "big"')
    elif flip:
        text = text.replace("[wire]\n", '[wire]\nword_order = "little"\n')
    path = folder / f"{name}.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def raw_bounds(point: Point) -> tuple[int, int]:
    """The least and the most raw value that this type holds exactly."""
    bits = 16 * point.word_count
    if point.type in ("f32", "t6"):
        return -(2**22), 2**22
    if point.type == "f64":
        return -(2**50), 2**50
    if point.type == "t5":
        return 0, 2**22
    return (-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 2) if point.type.startswith("i") else (0, 2**bits - 2)


def numbers(point: Point) -> list[int]:
    """What this number may be: nothing, the usual, both ends of its register, both signs."""
    if len(point.steps) > 1:
        return [0, 999_000, 1_000_000, 1_234_567_000]
    least, most = raw_bounds(point)
    step = point.steps[0] * Fraction(10) ** (point.exponent.usual if point.exponent else 0)
    raws = {0, 1, 230, 7_000, 65_534, most, least, -1, -4_000}
    if point.combine == "difference":
        least = -most
    patterns = 2 ** (16 * point.word_count)
    fit = [raw for raw in raws if least <= raw <= most and raw % patterns not in point.sentinels]
    # A counter counts upwards, in whole steps of its own; and a reading is a whole number of our unit.
    grain = max(point.snap, 1)
    values = {int(raw * step) // grain * grain for raw in fit}
    counter = point.name.startswith("register_")
    return sorted(value for value in values if value % abs(step) == 0 and (value >= 0 or not counter))


def representative(point: Point) -> list[Value | NoValue]:
    """Values to try: every listed state, numbers from end to end, and everything that means "no value"."""
    if point.bits:
        return ["", *point.bits.values()]
    if point.values:
        listed: list[Value | NoValue] = list(dict.fromkeys(point.values.values()))
        return [*listed, "device_code_199"] if point.name == "fault" else listed
    if point.text:
        return ["AB-1" if point.type == "ascii" else "12"]
    missing = [NoValue(index) for index in range(len(point.sentinels))]
    return [*numbers(point), *(missing or ([NoValue()] if point.type in ("f32", "f64") else []))]


@pytest.mark.parametrize("flip", [False, True], ids=["as_mapped", "words_turned"])
@pytest.mark.parametrize("name", NAMES)
async def test_every_value_of_every_map_survives_the_wire(name, flip, tmp_path):
    """Would catch a quantity laid out by the simulator in one way and read by the driver in another, a unit or a
    sign that is lost, a sentinel that becomes a number, and a word order that only works by luck.
    """
    path = copied(name, tmp_path, flip=flip)
    reads = load_map(path).reads
    todo = {quantity: representative(point) for quantity, point in reads.items()}
    pins: dict[str, Value | NoValue] = {}
    config = SimulatorConfig(map=path, tcp="127.0.0.1:0", pinned=pins)
    async with Simulator(config) as simulator, device_reader(path, simulator.wire) as read:
        for turn in range(max(map(len, todo.values()))):
            # All together, as they stand in the device: a neighbour that is overwritten shows at once.
            pins.update({quantity: values[turn % len(values)] for quantity, values in todo.items()})
            wanted = {at: None if isinstance(value, NoValue) else value for at, value in pins.items()}
            assert await read() == wanted


@pytest.mark.parametrize("name", NAMES)
def test_every_listed_state_means_one_thing(name):
    """Would catch a raw state that reads as another one, several raw values of one meaning included."""
    for point in load_map(name).reads.values():
        for raw, meaning in point.values.items():
            if isinstance(raw, str):
                words = registers.encode(raw, "ascii", word_count=point.word_count)
            else:
                shift = (point.mask & -point.mask).bit_length() - 1 if point.mask else 0
                words = registers.pattern(raw << shift, point.word_count, point.word_order)
            assert point.value([words]) == meaning


def connected(simulator: Simulator, name: str) -> ChargerConfig:
    """The configuration that reaches this simulator, with everything that the map asks for."""
    needs_meter = load_map(name).energy.meter_required
    return ChargerConfig(
        map=name,
        wire=simulator.wire,
        device_id=simulator.device_id,
        failsafe_timeout_s=1,
        external_cut_off=None if can_stop_itself(name) else "contactor K1",
        meter=MeterConfig(map=METER, device_id=99) if needs_meter else None,
    )


def can_stop_itself(name: str) -> bool:
    """True for a map with a fallback to 0 A, proven or not."""
    failsafe = load_map(name).failsafe
    assert failsafe is not None
    return failsafe.zero_fallback


def simulated(name: str) -> SimulatorConfig:
    """A device of this map, with a meter on its bus where it cannot bill."""
    config = SimulatorConfig(map=name, tcp="127.0.0.1:0", plant=QUICK)
    if load_map(name).energy.meter_required:
        config = replace(config, meter_map=METER, meter_device_id=99)
    return config


async def until(look, wanted, beat=None):
    """Look (and beat) until what is seen is as wanted; the test's own time-out ends what never comes."""
    while True:
        if beat is not None:
            await beat()
        seen = await look()
        if wanted(seen):
            return seen
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("name", CHARGERS)
async def test_every_charger_arms_offers_counts_and_stops(name, tmp_path):
    """Would catch a map whose registers do not do what they say: the plant's truth is compared, not the wire's word."""
    name = copied(name, tmp_path)
    async with Simulator(simulated(name)) as simulator:
        charger = await open_charger(connected(simulator, name))
        try:
            assert (await charger.read()).seen_open
            await charger.arm(5)
            assert simulator.truth().failsafe_armed == can_stop_itself(name)
            flowing = await until(
                charger.read,
                lambda seen: seen.power_w > 5_000 and seen.pilot_state == "C",
                beat=lambda: charger.set_limit(current_ma=OFFER_MA),
            )
            assert flowing.fault is None
            before_mwh = simulator.truth().register_mwh
            counted_mwh = (await charger.read()).register_mwh
            step_mwh = charger.limits.counter_step_mwh
            assert before_mwh - step_mwh < counted_mwh <= simulator.truth().register_mwh
            assert simulator.truth().offered_ma == OFFER_MA
            await charger.hold()
            assert simulator.truth().offered_ma == 0 or not simulator.truth().enabled
            await until(charger.read, lambda seen: seen.seen_open)
            assert not simulator.truth().energised
        finally:
            await charger.close()


async def falls_silent(name: str) -> None:
    """One charger offers power, and then nobody speaks to it any more."""
    async with Simulator(simulated(name)) as simulator:
        charger = await open_charger(connected(simulator, name))
        try:
            await charger.arm(2)

            async def truth():
                return simulator.truth()

            await until(
                truth, lambda seen: seen.power_w > 5_000, beat=lambda: charger.set_limit(current_ma=OFFER_MA)
            )
            quiet_since_ms = simulator.truth().at_ms
            stopped = await until(truth, lambda seen: not seen.energised)
            assert stopped.failsafe_tripped, name
            assert stopped.at_ms - quiet_since_ms >= 0
            assert simulator.plant.failsafe_timeout_ms == 2_000, name
        finally:
            await charger.close()


async def test_every_failsafe_cuts_the_power_when_nobody_speaks(tmp_path, monkeypatch):
    """Would catch a timer that was never started, a fallback left at 6 A, and a map that names the wrong register."""
    monkeypatch.setattr(server, "_DEVICE_TIMER_MS", 2_000)
    names = [copied(name, tmp_path) for name in CHARGERS if can_stop_itself(name)]
    assert len(names) > 12
    await asyncio.gather(*map(falls_silent, names))


async def test_a_station_has_several_connectors():
    """Would catch the wrong car being stopped: connector 2 lies a thousand addresses after connector 1."""
    async with Simulator(simulated("phoenix_charx_sec#2")) as simulator:
        charger = await open_charger(connected(simulator, "phoenix_charx_sec#2"))
        await charger.arm(5)
        await charger.set_limit(current_ma=16_000)
        assert (1, 2301, (16,)) in simulator.writes
        with pytest.raises(BridgeError, match=r"exception_2"):
            async with device_reader("phoenix_charx_sec", simulator.wire) as read:
                await read()
        await charger.close()


async def test_a_device_set_up_in_another_way_is_not_armed(tmp_path):
    """Would catch a meter that counts what flows back as sold, and a box that counts in another unit than its map."""
    text = (MAPS / "phoenix_ev_eth_wallbe.toml").read_text(encoding="utf-8")
    extended = tmp_path / "extended"
    extended.mkdir()
    (extended / "phoenix_ev_eth_wallbe.toml").write_text(
        text.replace("most = 59", "least = 60\nmost = 999"), encoding="utf-8"
    )
    other = str(extended / "phoenix_ev_eth_wallbe.toml")
    async with Simulator(simulated("phoenix_ev_eth_wallbe")) as simulator:
        charger = await open_charger(connected(simulator, other))
        with pytest.raises(BridgeError, match=r"wrong_setting.*528.*0\.1 A"):
            await charger.arm(5)
        await charger.close()


async def test_the_devices_own_exponents_are_asked_and_not_supposed(tmp_path):
    """Would catch ten times the power, or a tenth of the energy, on an inverter that counts in tens."""
    text = (MAPS / "sunspec_der_7xx.toml").read_text(encoding="utf-8")
    for address in (55, 116, 120):
        text = text.replace(f"{{ address = {address} }}", f"{{ address = {address}, usual = 1 }}")
    tens = tmp_path / "sunspec_der_7xx.toml"
    tens.write_text(text, encoding="utf-8")
    async with Simulator(replace(simulated(str(tens)), plant=QUICK)) as simulator:
        charger = await open_charger(connected(simulator, "sunspec_der_7xx"))
        assert charger.limits.counter_step_mwh == 10_000
        assert (await charger.read()).register_mwh == QUICK.register_mwh_begin
        await charger.arm(5)
        await charger.set_limit(power_w=5_520)
        assert simulator.truth().offered_ma == OFFER_MA
        assert [words for _, _, words in simulator.writes][-1] == (0, 552)
        await charger.hold()
        assert simulator.truth().offered_ma == 0
        await charger.close()
