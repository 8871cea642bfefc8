"""Run one simulated device until told to stop: what `v2v charger simulate` and `python -m firmware_bridge.simulator` do.

Prints one line `listening on WIRE` when ready (with --json one object), keeps `--truth FILE` current twice a second,
and on SIGTERM or SIGINT prints what was truly delivered.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from firmware_bridge.charger import MapError
from firmware_bridge.device_map import COMMANDS, READS, Value
from firmware_bridge.simulator.plant import PlantConfig
from firmware_bridge.simulator.server import Simulator, SimulatorConfig, Truth

TRUTH_EVERY_S = 0.5


def parse_pins(pairs: Sequence[str]) -> dict[str, Value]:
    """`["power_w=1000", "pilot_state=B"]` as named values. Raises MapError for a name that no map can have."""
    pins: dict[str, Value] = {}
    for pair in pairs:
        name, equals, text = pair.partition("=")
        if not equals or name not in READS:
            raise MapError(
                f"--set {pair!r}: write NAME=VALUE; names: {', '.join(READS)} (not {', '.join(COMMANDS)})"
            )
        kind = READS[name]
        if kind == "flag":
            pins[name] = text.lower() in ("1", "true", "yes")
        elif kind in ("pilot", "fault", "text"):
            pins[name] = text
        else:
            try:
                pins[name] = int(text)
            except ValueError:
                raise MapError(f"--set {pair!r}: {name} is a whole number") from None
    return pins


def seeded_plant(seed: int | None, plant: PlantConfig, ev_lag_ms: int | None) -> PlantConfig:
    """The plant with a car drawn from `seed` (lag and ramp), unless the lag was given."""
    if seed is not None:
        chance = Random(seed)
        plant = replace(
            plant, ev_lag_ms=chance.randint(300, 1000), ev_ramp_ma_per_s=chance.randint(30_000, 60_000)
        )
    return plant if ev_lag_ms is None else replace(plant, ev_lag_ms=ev_lag_ms)


async def run_simulator(
    config: SimulatorConfig, *, truth_file: Path | None = None, say: Callable[[Mapping[str, object]], None]
) -> Truth:
    """Simulate until SIGTERM or SIGINT. `say` gets `{event: listening | ended, ...}`. Returns the truth at the end."""
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    async with Simulator(config) as simulator:
        write_truth(truth_file, simulator.truth())
        say(
            {
                "event": "listening",
                "wire": simulator.wire,
                "map": simulator.map.id,
                "device_id": simulator.device_id,
            }
        )
        while not told_to_stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(told_to_stop.wait(), TRUTH_EVERY_S)
            write_truth(truth_file, simulator.truth())
        truth = simulator.truth()
    say({"event": "ended", **truth.as_dict()})
    return truth


def write_truth(path: Path | None, truth: Truth) -> None:
    """Replace the file in one step, so that a reader never sees half of it."""
    if path is None:
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(json.dumps(truth.as_dict()) + "\n", encoding="utf-8")
    beside.replace(path)


def say_as(as_json: bool) -> Callable[[Mapping[str, object]], None]:
    """How `run_simulator` speaks on a terminal, or to a program."""

    def say(message: Mapping[str, object]) -> None:
        if as_json:
            _line(json.dumps(dict(message)))
        elif message["event"] == "listening":
            _line(f"listening on {message['wire']} as {message['map']}, device id {message['device_id']}")
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
    parser.add_argument("--truth", type=Path, metavar="FILE")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    try:
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
        )
        asyncio.run(run_simulator(config, truth_file=given.truth, say=say_as(given.json)))
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
) -> SimulatorConfig:
    """The command line's words as a configuration. `power_w_max` limits what the car draws. Raises MapError."""
    plant = seeded_plant(seed, PlantConfig(), ev_lag_ms)
    if power_w_max is not None:
        most_ma = power_w_max * 1_000_000 // (plant.voltage_mv * plant.phase_count)
        plant = replace(plant, ev_current_ma_max=most_ma, current_ma_max=max(most_ma, plant.current_ma_max))
    if register_wh_begin is not None:
        plant = replace(plant, register_mwh_begin=register_wh_begin * 1000)
    return SimulatorConfig(
        map=device_map,
        tcp=tcp,
        pty=pty,
        device_id=device_id,
        meter_map=meter_map,
        meter_device_id=meter_device_id,
        plant=plant,
        pinned=parse_pins(pins),
    )
