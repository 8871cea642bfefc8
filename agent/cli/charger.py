"""`v2v charger`: what an installer and a tester type. Talks to a device, or is one; needs no chain, no broker, no key.

May not import web3 or anything that does: these commands must start quickly on a Raspberry Pi.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click

from agent.cli.charger_errors import said_by_charger
from agent.cli.commission import commission
from agent.cli.installer import ports, probe, watch
from firmware_bridge.charger import BridgeError, MapError


@click.group()
def charger() -> None:
    """Find a charger, look at it, try it, or simulate one."""


@charger.command()
@click.option("--map", "device_map", required=True, help="Name of a device map, or the path of a .toml file.")
@click.option(
    "--wire",
    required=True,
    help="tcp://HOST:PORT, rtu+tcp://HOST:PORT, rtu:///dev/serial/by-id/... or rapi:///dev/...",
)
@click.option("--device-id", type=click.IntRange(0, 255), help="Modbus device id; default: the map's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def read(device_map: str, wire: str, device_id: int | None, as_json: bool) -> None:
    """Read everything a device shows, once. Writes nothing."""
    from firmware_bridge.opening import read_device

    try:
        values = asyncio.run(read_device(device_map, wire, device_id))
    except (BridgeError, MapError) as exc:
        raise said_by_charger(exc) from exc
    if as_json:
        click.echo(json.dumps({"map": device_map, "wire": wire, **values}))
        return
    width = max(len(name) for name in values)
    for name, value in values.items():
        click.echo(f"{name:<{width}}  {'-' if value is None or value == '' else value}")


_FILE = click.Path(path_type=Path, dir_okay=False)


@charger.command()
@click.option("--map", "device_map", default="simulated", show_default=True, help="Which device to be.")
@click.option("--tcp", metavar="HOST:PORT", help="Listen for Modbus TCP; port 0 takes any free one.")
@click.option("--pty", metavar="LINK", help="Be a serial device: make this link to a pty (parity N).")
@click.option(
    "--rapi",
    metavar="LINK",
    help="Be an OpenEVSE instead (RAPI, not Modbus): make this link to a pty. "
    "--meter-map with --tcp or --pty puts a meter beside it.",
)
@click.option("--rtu", is_flag=True, help="Speak RTU frames over --tcp, as a simple gateway does.")
@click.option("--device-id", type=click.IntRange(0, 255), help="Default: the map's.")
@click.option("--meter-map", help="Put a separate meter on the same bus.")
@click.option("--meter-device-id", type=click.IntRange(0, 255), help="Default: the meter map's.")
@click.option(
    "--also", multiple=True, metavar="MAP[@ID]", help="One more device on this bus; may be repeated."
)
@click.option("--seed", type=int, help="Draw the car's lag and ramp from this number.")
@click.option("--ev-lag-ms", type=click.IntRange(0, 60_000), help="How late the car follows.")
@click.option("--power-w-max", type=click.IntRange(1), help="The most the car draws.")
@click.option("--register-wh-begin", type=click.IntRange(0), help="What the counter shows at first.")
@click.option("--set", "pins", multiple=True, metavar="NAME=VALUE", help="Pin a quantity; may be repeated.")
@click.option("--scenario", type=_FILE, help="What goes wrong when: a scenario file.")
@click.option("--record", type=_FILE, help="Write what crosses the bus into this trace.")
@click.option("--replay", type=_FILE, help="Answer as this trace says, instead of being a device.")
@click.option("--truth", type=_FILE, help="Keep this JSON file true, twice a second.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object when ready, one at the end.")
def simulate(**given: Any) -> None:
    """Be a charger: any device map, with physics, until SIGTERM. Prints `listening on ...` when ready."""
    from firmware_bridge.simulator import command

    wires = [given["tcp"], given["pty"]]
    if wires.count(None) != (2 if given["rapi"] and not given["meter_map"] else 1):
        raise click.UsageError(
            "give exactly one of --tcp HOST:PORT, --pty LINK and --rapi LINK; "
            "--rapi with --meter-map takes one more, for the meter"
        )
    say = command.say_as(given.pop("as_json"))
    truth, record, replay, rapi = (given.pop(name) for name in ("truth", "record", "replay", "rapi"))
    try:
        if rapi is not None:
            asyncio.run(_rapi(rapi, given, truth, say))
        elif replay is not None:
            asyncio.run(command.run_replay(replay, tcp=given["tcp"], pty=given["pty"], say=say))
        else:
            config = command.simulator_config(**given)
            asyncio.run(command.run_simulator(config, truth_file=truth, record=record, say=say))
    except MapError as exc:
        raise said_by_charger(exc) from exc


async def _rapi(
    link: str, given: Mapping[str, Any], truth: Path | None, say: Callable[[Mapping[str, object]], None]
) -> None:
    """Be an OpenEVSE; of the options above, those about the car, its counter and a meter count."""
    from dataclasses import replace

    from firmware_bridge.counting import check_meter
    from firmware_bridge.device_map import load_map
    from firmware_bridge.simulator.command import simulator_config
    from firmware_bridge.simulator.rapi import RapiSimulatorConfig, run_rapi_simulator, single_phase

    about_the_car = ("seed", "ev_lag_ms", "register_wh_begin")
    plant = simulator_config(
        device_map="simulated", tcp="", pty=None, **{name: given[name] for name in about_the_car}
    ).plant
    meter = None
    if given["meter_map"] is not None:
        check_meter(load_map(given["meter_map"]))
        names = ("tcp", "pty", "rtu", "pins")
        meter = simulator_config(device_map=given["meter_map"], **{name: given[name] for name in names})
        meter = replace(meter, device_id=given["meter_device_id"])
    box = RapiSimulatorConfig(link, plant=single_phase(plant))
    await run_rapi_simulator(box, meter=meter, truth_file=truth, say=say)


for each in (ports, probe, watch, commission):
    charger.add_command(each)
