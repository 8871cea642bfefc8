"""Which driver speaks to a configured charger: Modbus by a device map, or RAPI. One place, so that nobody else asks.

May not know: how either driver works, sessions, the agent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from firmware_bridge import mapped_charger, metered_charger, rapi
from firmware_bridge.charger import Charger
from firmware_bridge.device_map import Value, load_map
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
        if config.meter is not None:
            metered_charger.check_beside(config.meter)
        box = await rapi.open_rapi(config)
        return box if config.meter is None else await metered_charger.beside(box, config, buses)
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
    """True when this installation may sell without a recorded commissioning (BRIDGE rule 9). Raises MapError."""
    return not is_rapi(config.wire) and not mapped_charger.unproven(config)


def falls_to_zero(config: ChargerConfig) -> bool:
    """True when the device's own failsafe has to stop it; otherwise the named external cut-off does. Raises MapError."""
    if is_rapi(config.wire):
        return False
    failsafe = load_map(config.map).failsafe
    if failsafe is None:
        return False
    return failsafe.zero_fallback or (failsafe.zero_unproven and not config.external_cut_off)


def editions(config: ChargerConfig) -> Mapping[str, str]:
    """SHA-256 of each device map in use: a report about another edition of a map proves nothing about this one."""
    names = [] if is_rapi(config.wire) else [config.map]
    maps = [load_map(name) for name in (*names, *([config.meter.map] if config.meter else []))]
    rapi_edition = {rapi.MAP: hashlib.sha256(_RAPI_EDITION).hexdigest()} if is_rapi(config.wire) else {}
    return rapi_edition | {one.id: one.digest for one in maps}
