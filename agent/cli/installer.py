"""`v2v charger ports`, `probe`, `watch`: what an installer looks at before anything is configured. They write to no device.

May not import pymodbus or anything else that is slow before a command needs it: `ports` must answer at once.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import TYPE_CHECKING, Any

import click

from agent.cli.charger_errors import said_by_charger
from agent.errors import Transient
from firmware_bridge.charger import BridgeError, MapError

if TYPE_CHECKING:
    from firmware_bridge.ports import Port
    from firmware_bridge.probing import Found, Search

DEVICE_IDS_MAX = 247


# ------------------------------------------------------------------ ports
@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object instead of text.")
def ports(*, as_json: bool) -> None:
    """List serial ports, and what to change.

    Each with its lasting name, chip, driver, permissions, and who holds it.
    """
    from dataclasses import asdict

    from firmware_bridge.ports import list_ports

    found = list_ports()
    if as_json:
        click.echo(json.dumps({"ports": [asdict(port) for port in found]}))
        return
    for port in found:
        click.echo(_port_text(port))
    if not found:
        click.echo(
            "No serial port is here. Plug the adapter in; `sudo dmesg | tail` says what the kernel thinks of it."
        )


def _port_text(port: Port) -> str:
    about = ", ".join(
        word for word in (port.chip, port.usb_id, port.driver, f"now {port.device}", port.owner) if word
    )
    advice = port.advice or ("ready",)
    return "\n".join([port.path, f"    {about}", *(f"    -> {line}" for line in advice)])


# ------------------------------------------------------------------ probe
def _device_ids(_ctx: click.Context, _param: click.Parameter, value: str | None) -> tuple[int, ...] | None:
    """`1,3,10-12` -> (1, 3, 10, 11, 12)."""
    if value is None:
        return None
    found: list[int] = []
    for part in value.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise click.BadParameter(f"{part!r}: write numbers and ranges, such as 1,3,10-12")
        found += range(int(first), int(last or first) + 1)
    if not found or min(found) < 0 or max(found) > 255 or len(found) > DEVICE_IDS_MAX:
        raise click.BadParameter("device ids are 0 to 255")
    return tuple(dict.fromkeys(found))


@click.command()
@click.argument("wire")
@click.option("--map", "names", multiple=True, help="Compare with this map only; may be repeated.")
@click.option("--baud", type=int, multiple=True, help="Try this rate only; may be repeated.")
@click.option("--parity", type=click.Choice(["N", "E", "O"]), help="Try this parity only.")
@click.option(
    "--device-id", "device_ids", callback=_device_ids, help="Such as 1,3,10-12; default: the maps' and 1-4."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each device that answers.")
def probe(
    wire: str,
    names: tuple[str, ...],
    baud: tuple[int, ...],
    parity: str | None,
    device_ids: tuple[int, ...] | None,
    *,
    as_json: bool,
) -> None:
    """Find out who answers on WIRE.

    At which rate and parity, under which device id, and which device map fits.

    WIRE is tcp://HOST[:PORT], rtu+tcp://HOST[:PORT], rtu:///dev/serial/by-id/..., rapi:///dev/..., or only a port's path.
    Stop the agent first: one master per bus.
    """
    from firmware_bridge.device_map import load_map, map_names
    from firmware_bridge.probing import BAUDS, FORMATS, Search, known_maps

    try:
        maps = [load_map(name) for name in names] or known_maps(map_names(), load_map)
        ids = device_ids or tuple(sorted({1, 2, 3, 4} | {one.wire.device_id for one in maps}))
        formats = tuple(one for one in FORMATS if parity in (None, one[0]))
        search = Search(baud or BAUDS, formats, ids)
        count = asyncio.run(_probed(wire, search, maps, as_json=as_json))
    except (BridgeError, MapError) as exc:
        raise said_by_charger(exc) from exc
    if not count:
        raise Transient(
            f"nobody answers on {wire}",
            remedy="check power, A and B (swap them), termination, and that nobody else is master; try --device-id 1-247",
        )


async def _probed(wire: str, search: Search, maps: list[Any], *, as_json: bool) -> int:
    from firmware_bridge.probing import longest_s
    from firmware_bridge.probing import probe as probed

    def tell(text: str) -> None:
        click.echo(text, err=True)

    def show(found: Found) -> None:
        from dataclasses import asdict

        click.echo(json.dumps(asdict(found)) if as_json else str(found))

    wires = [f"rapi://{wire}", f"rtu://{wire}"] if wire.startswith("/") else [wire]
    count = 0
    for one in wires:
        if not one.startswith("rapi:"):
            tell(f"{one}: at most {longest_s(one, search)} s")
        async for found in probed(one, search, maps, tell):
            show(found)
            count += 1
        if count:
            break
    return count


# ------------------------------------------------------------------ watch
@click.command()
@click.option("--map", "device_map", required=True, help="Name of a device map, or the path of a .toml file.")
@click.option("--wire", required=True, help="As for `v2v charger read`.")
@click.option("--device-id", type=click.IntRange(0, 255), help="Modbus device id; default: the map's.")
@click.option(
    "--every-s", type=click.FloatRange(0.1, 3600), default=1.0, show_default=True, help="Between looks."
)
@click.option("--count", type=click.IntRange(1), help="End after so many looks; default: never.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object for each look.")
def watch(
    device_map: str, wire: str, device_id: int | None, every_s: float, count: int | None, *, as_json: bool
) -> None:
    """Read a device again and again.

    Whatever breaks meanwhile. Writes nothing.
    """
    try:
        asyncio.run(_watch(device_map, wire, device_id, every_s, count, as_json=as_json))
    except MapError as exc:
        raise said_by_charger(exc) from exc


async def _watch(
    device_map: str, wire: str, device_id: int | None, every_s: float, count: int | None, *, as_json: bool
) -> None:
    from firmware_bridge.opening import read_device

    loop = asyncio.get_running_loop()
    looks = 0
    while count is None or looks < count:
        if looks:
            await asyncio.sleep(every_s)
        began_s = loop.time()
        try:
            seen: dict[str, Any] = dict(await read_device(device_map, wire, device_id))
        except BridgeError as error:
            seen = {"error": str(error)}
        looks += 1
        _show_look(seen, int((loop.time() - began_s) * 1000), looks, as_json=as_json)


def _show_look(seen: dict[str, Any], took_ms: int, looks: int, *, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps({"look": looks, "took_ms": took_ms, **seen}))
        return
    if sys.stdout.isatty():
        click.clear()
        width = max(map(len, seen))
        for name, value in seen.items():
            click.echo(f"{name:<{width}}  {'-' if value is None or value == '' else value}")
        click.echo(f"\nlook {looks}, took {took_ms} ms; Ctrl-C ends")
        return
    click.echo(
        " ".join(f"{name}={'-' if value is None or value == '' else value}" for name, value in seen.items())
    )
