"""`v2v config`: is this settings file right, and what would be used? Before anything is started or energised.

Rules
* Every problem at once: the file's own, and device maps that it names and nobody has. Exit 78.
* What a start needs beside the file (key files, the journal's folder) is looked for, never opened, and named when it
  is not there. That is no mistake of the file: keys are often put in last, and credentials exist only inside the unit.
* Nothing outside is asked: no node, no charger, no broker.

May not know: web3, wires. A Raspberry Pi answers this at once.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from agent.chain.rpc import shown
from agent.cli.output import echo, facts, json_option
from agent.config import AgentConfig, ConsumerConfig, PortConfig, agent_schema, load_agent, load_consumer
from agent.core.units import hex0x
from agent.errors import Misconfigured

FILE = click.Path(dir_okay=False, path_type=Path)
RAPI_MAP = "openevse_rapi"  # firmware_bridge.rapi knows it too, and would load the wire's library to say so


@click.group()
def config() -> None:
    """Check a configuration file before it is used."""


@config.command()
@click.argument("file", type=FILE)
@click.option("--consumer", "is_consumer", is_flag=True, help="It is a consumer.toml, not an agent.toml.")
@json_option
def check(file: Path, *, is_consumer: bool, as_json: bool) -> None:
    """Find every problem in FILE at once; else print what it means."""
    settings = load_consumer(file, os.environ) if is_consumer else load_agent(file, os.environ)
    if isinstance(settings, AgentConfig):
        _check_maps(file, settings)
    missing = list(_missing(settings))
    uses = dict(_uses(settings))
    text = f"{file}: OK\n\n{facts(uses.items())}"
    if missing:
        text += "\n\nNeeded before it can start:\n" + "\n".join(f"  {line}" for line in missing)
    echo({"file": str(file), "ok": True, "uses": uses, "missing": missing}, text, as_json=as_json)


@config.command()
def schema() -> None:
    """Print the JSON Schema of agent.toml.

    Editors that know TOML complete and check settings with it.
    """
    click.echo(json.dumps(agent_schema(), indent=2))


# ---- problems


def _check_maps(file: Path, settings: AgentConfig) -> None:
    """Raises `Misconfigured` with every port whose device map is missing, wrong or of the other kind."""
    problems = [problem for port in settings.ports for problem in _map_problems(port)]
    if problems:
        count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
        raise Misconfigured(
            f"{file.name}: {count}, nothing was started\n\n" + "\n".join(f"  {line}" for line in problems),
            remedy="firmware_bridge/maps has one file for each device; copy _blueprint.toml for another one",
        )


def _map_problems(port: PortConfig) -> Iterator[str]:
    from firmware_bridge.charger import MapError
    from firmware_bridge.device_map import load_map

    named = [(port.map, "charger", f"[[ports]] {port.name}, map")]
    if port.wire.startswith("rapi:"):
        named = []  # an OpenEVSE has no map: the protocol is the driver's
        if port.map != RAPI_MAP:
            yield f'[[ports]] {port.name}, map: a rapi:// wire speaks to an OpenEVSE; write map = "{RAPI_MAP}"'
        if port.meter is not None and port.meter.wire is None:
            yield f"[[ports]] {port.name}, meter.wire: the charger's own wire carries no Modbus; give the meter's"
    if port.meter is not None:
        named.append((port.meter.map, "meter", f"[[ports]] {port.name}, meter.map"))
    for name, kind, where in named:
        try:
            found = load_map(name).kind
        except MapError as error:
            yield f"{where}: {error}"
        else:
            if found != kind:
                yield f'{where}: "{name}" is the map of a {found}; a {kind} belongs here'


def _missing(settings: AgentConfig | ConsumerConfig) -> Iterator[str]:
    """What is looked for beside the file and is not there."""
    for setting, source in _sources(settings):
        if "/" in source and not Path(source).is_file():
            yield f"{setting}: there is no file {source} yet"
    folder = settings.journal.path.parent
    if not folder.is_dir() and not os.access(_nearest_folder(folder), os.W_OK):
        yield f"[journal] path: the folder {folder} does not exist, and may not be made"
    elif folder.is_dir() and not os.access(folder, os.W_OK):
        yield f"[journal] path: the folder {folder} cannot be written by this user"


def _sources(settings: AgentConfig | ConsumerConfig) -> Iterator[tuple[str, str]]:
    """Every key and password that is named, by the setting that names it."""
    for name, source in settings.keys.model_dump().items():
        if source is not None:
            yield f"[keys] {name}", source
    if settings.mqtt is not None and settings.mqtt.password_credential is not None:
        yield "[mqtt] password_credential", settings.mqtt.password_credential


def _nearest_folder(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())


# ---- what it means


def _uses(settings: AgentConfig | ConsumerConfig) -> Iterator[tuple[str, Any]]:
    chain = settings.chain
    yield "nodes", ", ".join(shown(url) for url in chain.urls)
    yield "chain id", chain.chain_id
    yield "contract", hex0x(chain.contract)
    if isinstance(settings, AgentConfig):
        yield "provider", hex0x(settings.chain.provider)
    else:
        yield "consumer", hex0x(settings.chain.consumer)
    final = chain.finality if isinstance(chain.finality, str) else f"{chain.finality} blocks deep"
    yield "believes", f"an event {chain.confirmations} blocks deep; the whole order when {final}"
    for setting, source in _sources(settings):
        yield setting, source if "/" in source else f"{source} (systemd credential)"
    yield from _side_uses(settings)
    yield "broker", "none" if settings.mqtt is None else settings.mqtt.url
    yield "journal", str(settings.journal.path)


def _side_uses(settings: AgentConfig | ConsumerConfig) -> Iterator[tuple[str, Any]]:
    if isinstance(settings, AgentConfig):
        for port in settings.ports:
            yield f"port {port.name}", _port(port)
        yield "page and door", f"http://{settings.http.listen}" if settings.http.enabled else "off"
    else:
        order = settings.order
        yield "order", f"{order.energy_wh} Wh at {order.rate_wei_per_kwh_start} wei/kWh or less"
        yield "provider's door", "by broker" if settings.http is None else settings.http.url


def _port(port: PortConfig) -> str:
    phases = f"{port.phase_count} phase{'s' if port.phase_count > 1 else ''}"
    meter = "" if port.meter is None else f", meter {port.meter.map} on {port.meter.wire}"
    limits = f"{phases}, at most {port.current_ma_max} mA"
    return f"{port.map} on {port.wire}, {limits}, failsafe {port.failsafe_timeout_s} s{meter}"
