"""The table of devices in docs/devices.md, made from the maps: what each can do, and what must be proven first.

`python -m firmware_bridge.device_table > docs/devices.md` writes it; a test compares the file with the maps.

May not know: the wire, the simulator, the agent.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

from firmware_bridge.device_map import DeviceMap, load_map, map_names

_HEAD = """# Devices

Made from `firmware_bridge/maps/*.toml` by `python -m firmware_bridge.device_table`; do not edit it by hand.
No device was at hand: everything here was read in makers' documents and in other people's drivers, and each
map names them. How to add one: [adding-a-charger.md](adding-a-charger.md). OpenEVSE speaks RAPI instead of
Modbus and has no map; it, too, is commissioned before it sells.

How well a map is founded: **both** a document and a working driver agree · **code** a driver's source · **doc**
the document only · **conflict** sources disagree · **recall** somebody's memory. A charger sells at once only when
its failsafe and the counter that bills are both **both** (or *simulated*); otherwise `v2v charger commission`
has to prove what is missing on the very installation first.
"""
_CHARGER_TITLES = (
    "map",
    "device",
    "wire",
    "takes",
    "stops by",
    "at 0 A when nobody speaks",
    "bills by",
    "step",
    "battery",
    "founded",
    "sells",
)
_METER_TITLES = ("map", "device", "wire", "counts", "step", "volts, amperes", "founded", "sells")
_FED_BY = {
    "any_request": "any request",
    "keep_alive": "the keep-alive",
    "set_point": "the set point",
    "timeout": "its own timeout",
}


def table() -> str:
    """The whole page."""
    maps = [load_map(name) for name in map_names()]
    chargers = [_charger(one) for one in maps if one.kind == "charger"]
    meters = [_meter(one) for one in maps if one.kind == "meter"]
    return "\n".join(
        [
            _HEAD,
            f"## {len(chargers)} chargers\n",
            *_rows(_CHARGER_TITLES, chargers),
            f"\n## {len(meters)} meters\n",
            *_rows(_METER_TITLES, meters),
            "",
        ]
    )


def _rows(titles: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    titles = list(titles)
    lines = [titles, ["---"] * len(titles), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _charger(one: DeviceMap) -> list[str]:
    return [
        f"`{one.id}`" + (f" (#1 to #{one.connector_count})" if one.connector_count > 1 else ""),
        f"{one.maker} {one.model}",
        ", ".join(one.wire.kinds),
        _control(one),
        _stop(one),
        _failsafe(one),
        "a separate meter" if one.energy.meter_required else "its own counter",
        "" if one.energy.meter_required else _step(one),
        "shown" if "soc_permille" in one.reads else "",
        one.confidence,
        _sells(one),
    ]


def _meter(one: DeviceMap) -> list[str]:
    counts = [name for name in ("import", "export") if f"register_{name}_mwh" in one.reads]
    checks = {"voltage_mv", "current_ma"} <= set(one.reads)
    return [
        f"`{one.id}`",
        f"{one.maker} {one.model}",
        ", ".join(one.wire.kinds),
        " and ".join(counts),
        _step(one),
        "yes" if checks else "no",
        one.confidence,
        _sells(one),
    ]


def _control(one: DeviceMap) -> str:
    point = one.commands.get("set_current_ma") or one.commands["set_power_w"]
    divisor, unit = (1000, "A") if point.name == "set_current_ma" else (1, "W")
    most = f" to {point.high // divisor}" if point.high is not None else ""
    least = f"{(point.low or 0) // divisor}" if most else f"from {(point.low or 0) // divisor}"
    return f"{least}{most} {unit}" + ("" if point.readable else ", unseen")


def _stop(one: DeviceMap) -> str:
    ways = ["switch"] if "enable" in one.commands else []
    limits = [one.commands[name] for name in ("set_current_ma", "set_power_w") if name in one.commands]
    ways += ["0"] if any(point.zero_stops for point in limits) else []
    return ", ".join([*ways, *(["lock"] if "lock" in one.commands else [])])


def _failsafe(one: DeviceMap) -> str:
    failsafe = one.failsafe
    if failsafe is None or failsafe.kind == "none":
        return "no: external cut-off"
    if not failsafe.zero_fallback:
        return "not to 0 A: external cut-off"
    timer = "time of its own" if failsafe.own_timer else "time can be set"
    certain = "unproven" if failsafe.zero_unproven else "yes"
    return f"{certain} ({failsafe.confidence}): {timer}, fed by {_FED_BY[failsafe.fed_by]}"


def _step(one: DeviceMap) -> str:
    step_mwh = one.energy.step_mwh
    whole, tenths = divmod(step_mwh, 1000)
    shown = f"{whole} Wh" if not tenths else f"{step_mwh / 1000:g} Wh"
    counters = [point for name, point in one.reads.items() if name.startswith("register_")]
    if any(point.exponent for point in counters):
        return f"{shown}, or as the device says"
    return f"{shown}, coarser with age" if any(point.type == "f32" for point in counters) else shown


def _sells(one: DeviceMap) -> str:
    return f"after commissioning ({', '.join(one.unproven)})" if one.unproven else "at once"


if __name__ == "__main__":
    sys.stdout.write(table())
