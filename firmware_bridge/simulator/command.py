"""Run simulated devices until told to stop: what `v2v charger simulate` and `python -m firmware_bridge.simulator` do.

Prints one line `listening on WIRE` when ready (with --json one object), keeps `--truth FILE` current twice a second,
and on SIGTERM or SIGINT prints what was truly delivered. SIGUSR1 opens the contactor in front of the (first) charger: the
external cut-off of an installation is `kill -USR1 PID`. docs/simulator.md is the manual.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from firmware_bridge.charger import MapError
from firmware_bridge.device_map import READS, DeviceMap, NoValue, Value, load_map
from firmware_bridge.registers import EncodeError
from firmware_bridge.simulator.plant import PlantConfig
from firmware_bridge.simulator.scenario import load_scenario, nearest
from firmware_bridge.simulator.server import AlsoDevice, Simulator, SimulatorConfig, Truth
from firmware_bridge.simulator.slave import Framing, LineTiming, SerialSlave, TcpSlave
from firmware_bridge.simulator.trace import Recorder, Replay

Pins = dict[str, Value | NoValue]
TRUTH_EVERY_S = 0.5
_OWN_PIN = re.compile(r"^\d+:")
_NO_TIME_BAUD = 10**9  # a trace has the line's own time in it already


def parse_pins(pairs: Sequence[str], known: Iterable[str] = READS) -> Pins:
    """`["power_w=1000", "pilot_state=B"]` as named values; `none` is the device's own "no value" (a sentinel, a NaN).

    Raises MapError for a name that is not `known`.
    """
    known = list(known)
    pins: Pins = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals:
            raise MapError(f"--set {pair!r}: write NAME=VALUE")
        if name not in known:
            raise MapError(f"--set {pair!r}: no quantity {name!r} here; {nearest(name, known)}")
        kind = READS[name]
        if text == "none":
            pins[name] = NoValue()
        elif kind == "flag":
            pins[name] = text.lower() in ("1", "true", "yes")
        elif kind in ("pilot", "fault", "text"):
            pins[name] = text
        else:
            try:
                pins[name] = int(text)
            except ValueError:
                raise MapError(f"--set {pair!r}: {name} is a whole number") from None
    return pins


def fitting(pins: Pins, device_map: DeviceMap) -> Pins:
    """The pins that this device shows. Raises MapError for a value that it has no word for: it would show something else."""
    found = {name: value for name, value in pins.items() if name in device_map.reads}
    for name, value in found.items():
        try:
            device_map.reads[name].places(value)
        except EncodeError as exc:
            said = "none" if isinstance(value, NoValue) else value
            raise MapError(f"--set {name}={said}: {device_map.id} cannot show that: {exc}") from None
    return found


def parse_also(text: str) -> tuple[str, int | None]:
    """`MAP` or `MAP@ID`."""
    name, at, number = text.rpartition("@")
    if at and number.isdigit():
        return name, int(number)
    return text, None


def seeded_plant(seed: int | None, plant: PlantConfig, ev_lag_ms: int | None) -> PlantConfig:
    """The plant with a car drawn from `seed` (lag and ramp), unless the lag was given."""
    if seed is not None:
        chance = Random(seed)
        plant = replace(
            plant, ev_lag_ms=chance.randint(300, 1000), ev_ramp_ma_per_s=chance.randint(30_000, 60_000)
        )
    return plant if ev_lag_ms is None else replace(plant, ev_lag_ms=ev_lag_ms)


async def run_simulator(
    config: SimulatorConfig,
    *,
    truth_file: Path | None = None,
    record: Path | None = None,
    say: Callable[[Mapping[str, object]], None],
) -> Truth:
    """Simulate until SIGTERM or SIGINT. `say` gets `{event: listening | ended, ...}`. Returns the truth at the end."""
    loop = asyncio.get_running_loop()
    told_to_stop = _told_to_stop(loop)
    with contextlib.ExitStack() as held:
        if record is not None:
            framing: Framing = "rtu" if config.pty is not None or config.rtu else "tcp"
            recorder = held.enter_context(Recorder(record, framing, lambda: int(loop.time() * 1000)))
            config = replace(config, tap=recorder.frame)
        async with Simulator(config) as simulator:
            loop.add_signal_handler(signal.SIGUSR1, simulator.cut_off)
            write_truth(truth_file, simulator)
            say({"event": "listening", "wire": simulator.wire, **_who(simulator)})
            while not told_to_stop.is_set():
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(told_to_stop.wait(), TRUTH_EVERY_S)
                write_truth(truth_file, simulator)
            truth = simulator.truth()
    say({"event": "ended", **truth.as_dict()})
    return truth


async def run_replay(
    path: Path, *, tcp: str | None, pty: str | None, say: Callable[[Mapping[str, object]], None]
) -> int:
    """Answer as this trace says until SIGTERM or SIGINT. Returns how many requests it did not know."""
    replay = Replay(path)
    if (pty is not None) and replay.framing == "tcp":
        raise MapError(f"{path.name} was recorded on TCP; replay it with --tcp HOST:PORT")
    slave = (
        SerialSlave(replay, LineTiming(_NO_TIME_BAUD)) if tcp is None else TcpSlave(replay, replay.framing)
    )
    told_to_stop = _told_to_stop(asyncio.get_running_loop())
    say({"event": "listening", "wire": await slave.listen(tcp or pty or ""), "trace": path.name})
    try:
        await told_to_stop.wait()
    finally:
        await slave.close()
    say({"event": "replayed", "unknown_requests": replay.unknown})
    return replay.unknown


def _told_to_stop(loop: asyncio.AbstractEventLoop) -> asyncio.Event:
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)
    return told


def _who(simulator: Simulator) -> dict[str, object]:
    """The first device, and all of them where there are several."""
    first: dict[str, object] = {"map": simulator.map.id, "device_id": simulator.device_id}
    names = {str(at): device.name for at, device in simulator.devices.items()}
    if len(names) > 1 or simulator.devices[simulator.device_id].beside:
        first["devices"] = names
    return first


def write_truth(path: Path | None, simulator: Simulator) -> None:
    """Replace the file in one step, so that a reader never sees half of it. Several chargers: `chargers` has them all."""
    if path is None:
        return
    truth: dict[str, object] = dict(simulator.truth().as_dict())
    several = simulator.truths()
    if len(several) > 1:
        truth["chargers"] = {at: one.as_dict() for at, one in several.items()}
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(truth) + "\n", encoding="utf-8")
    beside.replace(path)


def say_as(as_json: bool) -> Callable[[Mapping[str, object]], None]:
    """How `run_simulator` speaks on a terminal, or to a program."""

    def say(message: Mapping[str, object]) -> None:
        if as_json:
            _line(json.dumps(dict(message)))
        elif message["event"] == "listening" and "trace" in message:
            _line(f"listening on {message['wire']} with the answers of {message['trace']}")
        elif message["event"] == "listening":
            several = message.get("devices")
            who = (
                ", ".join(f"{name} (device id {at})" for at, name in several.items())
                if isinstance(several, dict)
                else f"{message['map']}, device id {message['device_id']}"
            )
            beside = (
                f"; {message['meter_map']} beside it on {message['meter_wire']}"
                if "meter_wire" in message
                else ""
            )
            _line(f"listening on {message['wire']} as {who}{beside}")
        elif message["event"] == "replayed":
            _line(f"{message['unknown_requests']} requests were not in the trace")
        else:
            _line(f"delivered {message['delivered_mwh']} mWh; register {message['register_mwh']} mWh")

    return say


def _line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()  # somebody waits for the line, often behind a pipe


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m firmware_bridge.simulator`; exit codes as in DESIGN section 6 (0 done, 78 configuration)."""
    parser = argparse.ArgumentParser(prog="python -m firmware_bridge.simulator", description=__doc__)
    parser.add_argument("--map", default="simulated")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--tcp", metavar="HOST:PORT")
    where.add_argument("--pty", metavar="LINK")
    parser.add_argument("--device-id", type=int)
    parser.add_argument("--meter-map")
    parser.add_argument("--meter-device-id", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--ev-lag-ms", type=int)
    parser.add_argument("--power-w-max", type=int)
    parser.add_argument("--register-wh-begin", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--also", action="append", default=[], metavar="MAP[@ID]")
    parser.add_argument("--rtu", action="store_true")
    parser.add_argument("--scenario", type=Path, metavar="FILE")
    parser.add_argument("--record", type=Path, metavar="FILE")
    parser.add_argument("--replay", type=Path, metavar="FILE")
    parser.add_argument("--truth", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
        if given.replay is not None:
            asyncio.run(run_replay(given.replay, tcp=given.tcp, pty=given.pty, say=say_as(given.json)))
            return 0
        config = simulator_config(
            device_map=given.map,
            tcp=given.tcp,
            pty=given.pty,
            device_id=given.device_id,
            meter_map=given.meter_map,
            meter_device_id=given.meter_device_id,
            seed=given.seed,
            ev_lag_ms=given.ev_lag_ms,
            power_w_max=given.power_w_max,
            register_wh_begin=given.register_wh_begin,
            pins=given.set,
            also=given.also,
            rtu=given.rtu,
            scenario=given.scenario,
        )
        running = run_simulator(config, truth_file=given.truth, record=given.record, say=say_as(given.json))
        asyncio.run(running)
    except MapError as exc:
        sys.stderr.write(f"{exc}\n")
        return 78
    return 0


def simulator_config(  # noqa: PLR0913 # one argument per option of the command line
    *,
    device_map: str,
    tcp: str | None,
    pty: str | None,
    device_id: int | None = None,
    meter_map: str | None = None,
    meter_device_id: int | None = None,
    seed: int | None = None,
    ev_lag_ms: int | None = None,
    power_w_max: int | None = None,
    register_wh_begin: int | None = None,
    pins: Sequence[str] = (),
    also: Sequence[str] = (),
    rtu: bool = False,
    scenario: Path | None = None,
) -> SimulatorConfig:
    """The command line's words as a configuration. `power_w_max` limits what the car draws. Raises MapError.

    A pin `NAME=VALUE` is for every device that shows the quantity, `ID:NAME=VALUE` for one of the `also` devices.
    """
    plant = seeded_plant(seed, PlantConfig(), ev_lag_ms)
    if power_w_max is not None:
        most_ma = power_w_max * 1_000_000 // (plant.voltage_mv * plant.phase_count)
        plant = replace(plant, ev_current_ma_max=most_ma, current_ma_max=max(most_ma, plant.current_ma_max))
    if register_wh_begin is not None:
        plant = replace(plant, register_mwh_begin=register_wh_begin * 1000)
    others = [parse_also(text) for text in also]
    maps = [load_map(name) for name in (device_map, meter_map, *(name for name, _ in others)) if name]
    shown = {name: None for one in maps for name in one.reads}
    general = parse_pins([pair for pair in pins if not _OWN_PIN.match(pair)], shown)
    for one in maps:
        fitting(general, one)
    own = [pair.partition(":")[::2] for pair in pins if _OWN_PIN.match(pair)]
    devices = []
    for name, at in others:
        its_map = load_map(name)
        its_id = its_map.wire.device_id if at is None else at
        its_pins = parse_pins([pair for who, pair in own if int(who) == its_id], its_map.reads)
        devices.append(AlsoDevice(name, its_id, fitting(general | its_pins, its_map)))
    strangers = [who for who, _ in own if int(who) not in {one.device_id for one in devices}]
    if strangers:
        raise MapError(f"--set {strangers[0]}:...: no --also device has this id")
    return SimulatorConfig(
        map=device_map,
        tcp=tcp,
        pty=pty,
        device_id=device_id,
        meter_map=meter_map,
        meter_device_id=meter_device_id,
        plant=plant,
        pinned=general,
        also=tuple(devices),
        rtu=rtu,
        scenario=load_scenario(scenario) if scenario is not None else (),
    )
