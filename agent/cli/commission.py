"""`v2v charger commission`: try one configured port with a car plugged in, and write down, signed, what was found.

Rules
* The agent must be stopped: one master per bus, and nobody sells from a charger that is being tried.
* Nothing flows before somebody said yes. Ctrl-C, as often as it is pressed, ends as safe as everything else.
* The newest result counts: a commissioning that fails replaces an older report, and the agent then refuses to sell.

May not know: what the checks do (firmware_bridge/commissioning.py), how a report is believed (agent/commissioned.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.cli.charger_errors import said_by_charger
from agent.errors import Misconfigured, Refused
from firmware_bridge.charger import MapError

if TYPE_CHECKING:
    from agent.config import PortConfig
    from firmware_bridge.commissioning import Check, Outcome, Patience, Subject
    from firmware_bridge.mapped_charger import ChargerConfig

WARNING = """\
Power will flow twice from port {port} into the car that is plugged in, at the least current, for up to two minutes each time.
Stay with it, and know where its breaker is."""


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    help="The agent's settings.",
)
@click.option("--port", "port_name", help="Which of its [[ports]]; needed when there are several.")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="The report; default: as the settings name it.",
)
@click.option(
    "--meter-key", help="The meter key, when the settings name a credential: a file by a path with a slash."
)
@click.option("--yes", is_flag=True, help="Do not ask: somebody stands beside it.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as one JSON object.")
def commission(
    config_file: Path,
    port_name: str | None,
    out: Path | None,
    meter_key: str | None,
    *,
    yes: bool,
    as_json: bool,
) -> None:
    """Try a charger, and sign what was found.

    Identity, mains, counter, sign and scale, command latency, failsafe. Writes a report signed with the meter's key, which
    the agent asks for where a device map is not confirmed well enough. Plug a car in that wants to charge, and stop the
    agent first.
    """
    from agent.commissioned import signed
    from agent.config import load_installation
    from agent.keys import load_meter_signer
    from agent.rows import owner_pid

    settings = load_installation(config_file, os.environ)
    port = _port(settings.ports, port_name)
    signer = load_meter_signer(
        meter_key or settings.keys.meter, settings.keys.meter_password, environ=os.environ
    )
    if owner_pid(settings.journal.path) is not None:
        raise Refused("running", "the agent is running", remedy="stop it first: systemctl stop v2v-agent")
    target = out or port.commissioning or config_file.with_name(f"{port.name}.commissioning.json")
    _require_writable(target)
    if not yes:
        _ask(port.name)
    try:
        report = _commissioned(port, as_json=as_json)
    except MapError as exc:
        raise said_by_charger(exc) from exc
    whole = signed(report, signer)
    _write(target, whole)
    if as_json:
        click.echo(json.dumps(whole))
    if not report["passed"]:
        failed = [check["name"] for check in report["checks"] if check["result"] != "passed"]
        raise Refused(
            "not_commissioned", f"not passed: {', '.join(failed)}", remedy=f"the report is in {target}"
        )
    if not as_json:
        click.echo(
            f"Passed. The report is {target}; the settings name it: commissioning = {json.dumps(str(target))}"
        )


def _port(ports: tuple[PortConfig, ...], name: str | None) -> PortConfig:
    known = {port.name: port for port in ports}
    if name is None and len(ports) == 1:
        return ports[0]
    if name not in known:
        raise click.UsageError(f"--port: one of {', '.join(known)}")
    return known[name]


def _require_writable(target: Path) -> None:
    """Before power flows, not after."""
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise Misconfigured(f"{target.parent} cannot be written", remedy="choose another place: --out FILE")


def _ask(port: str) -> None:
    if not sys.stdin.isatty():
        raise click.UsageError("power will flow: say --yes when somebody stands beside the charger")
    click.echo(WARNING.format(port=port), err=True)
    click.confirm("Go on?", abort=True, err=True)


def _commissioned(port: PortConfig, *, as_json: bool) -> dict[str, Any]:
    """The report, unsigned. Raises MapError, and click.Abort after Ctrl-C (and a safe end)."""
    from firmware_bridge.mapped_charger import ChargerConfig
    from firmware_bridge.opening import editions

    config = ChargerConfig.model_validate(port.charger_settings())
    known = dict(editions(config))  # a map that is wrong is said before anything moves

    def tell(check: Check) -> None:
        click.echo(f"{check.result:<8} {check.name:<20} {check.found}", err=as_json)

    try:
        outcome = asyncio.run(_run(config, tell))
    except asyncio.CancelledError:
        raise click.Abort from None
    return {
        "port": port.name,
        "at": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "software": version("v2v-agent"),
        "installed": port.installed(),
        "editions": known,
        **outcome.as_dict(),
    }


async def _run(config: ChargerConfig, tell: Any, patience: Patience | None = None) -> Outcome:
    from firmware_bridge.commissioning import Commissioning

    task = asyncio.create_task(Commissioning(subject(config), tell, patience, _instruct).run())
    _hear_signals(task)
    return await task


def _instruct(text: str) -> None:
    click.echo(f">>> {text}", err=True)


def _hear_signals(task: asyncio.Task[Outcome]) -> None:
    """Ctrl-C cancels the task, which then ends safe; asyncio's own way would cut that short at the second one."""
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, _interrupt, task)


def _interrupt(task: asyncio.Task[Outcome]) -> None:
    click.echo("ending; the charger is being stopped first", err=True)
    task.cancel()


def subject(config: ChargerConfig) -> Subject:
    """A configured port as `Commissioning` sees it."""
    from firmware_bridge.commissioning import Subject
    from firmware_bridge.modbus import Buses
    from firmware_bridge.opening import falls_to_zero, open_charger, open_to_stop, read_device

    buses = Buses()

    async def look() -> Mapping[str, object]:
        seen: dict[str, object] = dict(await read_device(config.map, config.wire, config.device_id))
        meter = config.meter
        if meter is not None:  # what the meter measures counts
            shown = await read_device(meter.map, meter.wire or config.wire, meter.device_id)
            seen |= {name: value for name, value in shown.items() if value is not None}
        return seen

    return Subject(
        open=lambda: open_charger(config, buses),
        open_to_stop=lambda: open_to_stop(config, buses),
        look=look,
        failsafe_timeout_s=config.failsafe_timeout_s,
        cut_off=None if falls_to_zero(config) else config.external_cut_off or "the external cut-off",
    )


def _write(target: Path, report: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        draft.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        draft.replace(target)
    except OSError as error:
        raise Misconfigured(
            f"{target}: cannot be written ({error.strerror})", remedy="choose another: --out FILE"
        ) from error
