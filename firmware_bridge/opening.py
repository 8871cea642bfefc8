"""Which driver speaks to a configured charger: Modbus by a device map, or RAPI. One place, so that nobody else asks.

May not know: how either driver works, sessions, the agent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from firmware_bridge import mapped_charger, rapi
from firmware_bridge.charger import Charger
from firmware_bridge.device_map import MAPS, Value, load_map
from firmware_bridge.mapped_charger import ChargerConfig
from firmware_bridge.modbus import Buses

# The facts behind rapi.py come from the box's own firmware and nobody has confirmed them twice (BRIDGE rule 9).
_RAPI_EDITION = b"openevse_rapi 1"


def is_rapi(wire: str) -> bool:
    """True for a wire that is no Modbus."""
    return wire.startswith("rapi:")


async def open_charger(config: ChargerConfig, buses: Buses) -> Charger:
    """Open the wires and look once; nothing is energised. Raises MapError and BridgeError, each saying what to do."""
    if is_rapi(config.wire):
        return await rapi.open_rapi(config)
    return await mapped_charger.open_charger(config, buses)


async def open_to_stop(config: ChargerConfig, buses: Buses) -> Charger:
    """The charger for whoever only stops it: asks for no failsafe, meter or reading first."""
    if is_rapi(config.wire):
        return await rapi.open_rapi(config, to_stop=True)
    return await mapped_charger.open_to_stop(config, buses)


async def read_device(map_name: str, wire: str, device_id: int | None = None) -> dict[str, Value | None]:
    """Every quantity one device shows, once, for a human to look at. Nothing is written."""
    if is_rapi(wire):
        return await rapi.read_box(wire)
    return await mapped_charger.read_device(map_name, wire, device_id)


def is_trusted(config: ChargerConfig) -> bool:
    """True when charger (and meter) may be sold from without a recorded commissioning (BRIDGE rule 9). Raises MapError."""
    if is_rapi(config.wire):
        return False
    names = [config.map] if config.meter is None else [config.map, config.meter.map]
    return all(load_map(name).trusted for name in names)


def falls_to_zero(config: ChargerConfig) -> bool:
    """True for a device whose own failsafe stops; others throttle at best, and need an external cut-off. Raises MapError."""
    if is_rapi(config.wire):
        return False
    failsafe = load_map(config.map).failsafe
    return failsafe is not None and failsafe.zero_fallback


def editions(config: ChargerConfig) -> Mapping[str, str]:
    """SHA-256 of each device map in use: a report about another edition of a map proves nothing about this one."""
    if is_rapi(config.wire):
        return {rapi.MAP: hashlib.sha256(_RAPI_EDITION).hexdigest()}
    names = [config.map] if config.meter is None else [config.map, config.meter.map]
    return {load_map(name).id: hashlib.sha256(_file(name).read_bytes()).hexdigest() for name in names}


def _file(name: str) -> Path:
    return Path(name) if name.endswith(".toml") else MAPS / f"{name}.toml"
