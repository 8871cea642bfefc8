"""`v2v charger`: what an installer and a tester type. Talks to a device, or is one; needs no chain, no broker, no key.

May not import web3 or anything that does: these commands must start quickly on a Raspberry Pi.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import click

from agent.errors import AgentError, Misconfigured, Refused, Transient
from firmware_bridge.charger import BridgeError, MapError


@click.group()
def charger() -> None:
    """Look at a charger, or simulate one."""


@charger.command()
@click.option("--map", "device_map", required=True, help="Name of a device map, or the path of a .toml file.")
@click.option(
    "--wire", required=True, help="tcp://HOST:PORT, rtu+tcp://HOST:PORT or rtu:///dev/serial/by-id/..."
)
@click.option("--device-id", type=click.IntRange(0, 255), help="Modbus device id; default: the map's.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of a table.")
def read(device_map: str, wire: str, device_id: int | None, as_json: bool) -> None:
    """Read everything a device shows, once. Writes nothing."""
    from firmware_bridge.mapped_charger import read_device

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


@charger.command()
@click.option("--map", "device_map", default="simulated", show_default=True, help="Which device to be.")
@click.option("--tcp", metavar="HOST:PORT", help="Listen for Modbus TCP; port 0 takes any free one.")
@click.option("--pty", metavar="LINK", help="Be a serial device: make this link to a pty (parity N).")
@click.option("--device-id", type=click.IntRange(0, 255), help="Default: the map's.")
@click.option("--meter-map", help="Put a separate meter on the same bus.")
@click.option("--meter-device-id", type=click.IntRange(0, 255), help="Default: the meter map's.")
@click.option("--seed", type=int, help="Draw the car's lag and ramp from this number.")
@click.option("--ev-lag-ms", type=click.IntRange(0, 60_000), help="How late the car follows.")
@click.option("--power-w-max", type=click.IntRange(1), help="The most the car draws.")
@click.option("--register-wh-begin", type=click.IntRange(0), help="What the counter shows at first.")
@click.option(
    "--set", "pins", multiple=True, metavar="[ID:]NAME=VALUE", help="Pin a quantity; may be repeated."
)
@click.option(
    "--also", multiple=True, metavar="MAP[@ID]", help="One more device on the wire; may be repeated."
)
@click.option("--rtu", is_flag=True, help="Serial frames on the TCP connection (RTU over TCP).")
@click.option(
    "--scenario",
    type=click.Path(path_type=Path, dir_okay=False),
    help="What goes wrong and when: a TOML file.",
)
@click.option(
    "--record", type=click.Path(path_type=Path, dir_okay=False), help="Write every frame to this file."
)
@click.option(
    "--replay",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Answer as a recorded file says; no map.",
)
@click.option(
    "--truth",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Keep this JSON file true, twice a second.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object when ready, one at the end.")
def simulate(  # noqa: PLR0913, PLR0917 # one argument per option
    device_map: str,
    tcp: str | None,
    pty: str | None,
    device_id: int | None,
    meter_map: str | None,
    meter_device_id: int | None,
    seed: int | None,
    ev_lag_ms: int | None,
    power_w_max: int | None,
    register_wh_begin: int | None,
    pins: tuple[str, ...],
    also: tuple[str, ...],
    rtu: bool,
    scenario: Path | None,
    record: Path | None,
    replay: Path | None,
    truth: Path | None,
    as_json: bool,
) -> None:
    """Be a charger: any device map, with physics, until SIGTERM. Prints `listening on ...` when ready."""
    from firmware_bridge.simulator.command import run_replay, run_simulator, say_as, simulator_config

    if (tcp is None) == (pty is None):
        raise click.UsageError("give exactly one of --tcp HOST:PORT and --pty LINK")
    try:
        if replay is not None:
            asyncio.run(run_replay(replay, tcp=tcp, pty=pty, say=say_as(as_json)))
            return
        config = simulator_config(
            device_map=device_map,
            tcp=tcp,
            pty=pty,
            device_id=device_id,
            meter_map=meter_map,
            meter_device_id=meter_device_id,
            seed=seed,
            ev_lag_ms=ev_lag_ms,
            power_w_max=power_w_max,
            register_wh_begin=register_wh_begin,
            pins=pins,
            also=also,
            rtu=rtu,
            scenario=scenario,
        )
        asyncio.run(run_simulator(config, truth_file=truth, record=record, say=say_as(as_json)))
    except MapError as exc:
        raise said_by_charger(exc) from exc


# What a person at the terminal can only wait for, or must plug in, switch on or free first.
_AWAY = {
    "unreachable",
    "port_missing",
    "port_locked",
    "unplugged",
    "timeout",
    "bus_busy",
    "bus_noisy",
    "closed",
}


def said_by_charger(error: BridgeError | MapError) -> AgentError:
    """The family of a bridge error: who must act, and so which exit code. The message already says what to do."""
    if isinstance(error, MapError) or error.name in ("port_denied", "port_refused"):
        return Misconfigured(str(error))
    if error.name in _AWAY:
        return Transient(str(error))
    return Refused(error.name, str(error).removeprefix(f"{error.name}: "))
