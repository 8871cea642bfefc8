"""Who answers on this wire, at which rate and parity, under which device id, and which device map fits what it says.

Rules
* Reads only. An exception is an answer too: somebody lives there.
* A map's score is evidence, not the number of registers that could be read: volts that are volts, a name that is text, a state
  that exists. A register full of zeros proves nothing.
* Every wait is short and counted; who probes is told beforehand how long it takes at most.

May not know: charging, the agent.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace

from firmware_bridge import rapi
from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.commissioning import FREQUENCY_MHZ, VOLTAGE_MV
from firmware_bridge.device_map import DeviceMap, Value
from firmware_bridge.modbus import QUARANTINE_S, Bus, Timing, Wire, parse_wire

BAUDS = (19_200, 9_600, 38_400, 57_600, 115_200)
FORMATS = (("N", 1), ("E", 1), ("N", 2), ("O", 1))
ASK_MS = 250  # a device that is slower than this while nobody asks it anything is rare
_REFUSALS_MAX = 1  # of one map's registers, before another map is tried: on a serial line each costs a pause
_PLACES_MAX = 3  # where a device id is knocked at; each costs a time-out and a pause when nobody is there
_ATTEMPTS = 2  # modbus.py asks twice
FIT_PERCENT = 50
POWER_W_MAX, CURRENT_MA_MAX = 400_000, 600_000
# What a believable value of each kind proves. Anything else proves 1, and zero proves nothing.
_WEIGHT = {
    "voltage_mv": 4,
    "frequency_mhz": 4,
    "maker": 3,
    "model": 3,
    "serial": 2,
    "firmware": 2,
    "pilot_state": 2,
}


@dataclass(frozen=True, slots=True)
class Fit:
    """How well a map explains a device. `connectors`: its charging points that are there, where the map knows of several."""

    map: str
    title: str
    percent: int
    connectors: tuple[int, ...] = (1,)

    def __str__(self) -> str:
        more = ", ".join(f"{self.map}#{number}" for number in self.connectors if number > 1)
        return f"{self.map} ({self.title}), {self.percent} %" + (f", and {more}" if more else "")


@dataclass(frozen=True, slots=True)
class Found:
    """Somebody who answers. `at`: "19200 8E1" on a serial line, else the address. `fits`: best first; none: an unknown device."""

    wire: str
    at: str
    device_id: int | None
    fits: tuple[Fit, ...]

    def __str__(self) -> str:
        who = "an OpenEVSE" if self.device_id is None else f"unit {self.device_id}"
        best = self.fits[0] if self.fits else None
        name = f"as {best}" if best else "and fits no map we have"
        return f"{who} answers at {self.at} {name}"


@dataclass(frozen=True, slots=True)
class Search:
    """Where to look; each narrowed by an option."""

    bauds: Sequence[int] = BAUDS
    formats: Sequence[tuple[str, int]] = FORMATS
    device_ids: Sequence[int] = (1, 2, 3)


def lines(wire_text: str, search: Search) -> list[Wire]:
    """Every setting to try on this wire: one for TCP, rates x formats on a serial port. Raises MapError."""
    wire = parse_wire(wire_text)
    if wire.kind != "rtu":
        return [wire]
    return [
        replace(wire, baud=baud, parity=parity, stop_bits=stop)
        for baud in search.bauds
        for parity, stop in search.formats
    ]


def longest_s(wire_text: str, search: Search) -> int:
    """How long it takes when nobody answers, seconds, rounded up."""
    each_s = _PLACES_MAX * _ATTEMPTS * (ASK_MS / 1000 + QUARANTINE_S)
    return int(len(lines(wire_text, search)) * len(search.device_ids) * each_s) + 1


def line_format(wire: Wire) -> str:
    """`19200 8E1`, or `host:port`."""
    if wire.kind == "rtu":
        return f"{wire.baud} 8{wire.parity}{wire.stop_bits}"
    return f"{wire.host}:{wire.port}"


async def probe(
    wire_text: str, search: Search, maps: Sequence[DeviceMap], tell: Callable[[str], None]
) -> AsyncIterator[Found]:
    """Everybody who answers, as they are found. A serial line is done with once one setting was right.

    Raises BridgeError when the wire itself cannot be had (`unreachable`, `port_missing`, ...), and MapError for a wrong address.
    """
    if wire_text.startswith("rapi:"):
        found = await probe_rapi(wire_text)
        if found is not None:
            yield found
        return
    refusal: BridgeError | None = None
    opened = False
    for wire in lines(wire_text, search):
        suited = [one for one in maps if wire.kind in one.wire.kinds]
        tell(f"trying {line_format(wire)} ...")
        bus = Bus(wire, Timing(request_timeout_ms=ASK_MS, turnaround_ms=0))
        try:
            await bus.open()
        except BridgeError as error:
            refusal = error
            if error.name != "port_refused":  # a port that cannot do this parity may do the next
                raise
            continue
        opened, somebody = True, False
        try:
            for device_id in search.device_ids:
                if await _lives(bus, device_id, suited):
                    somebody = True
                    tell(f"unit {device_id} answers at {line_format(wire)}; comparing {len(suited)} maps ...")
                    yield Found(str(wire), line_format(wire), device_id, await _fits(bus, device_id, suited))
        finally:
            await bus.close()
        if somebody:
            return
    if not opened and refusal is not None:
        raise refusal


async def probe_rapi(wire_text: str) -> Found | None:
    """The OpenEVSE at this port, None when nobody speaks RAPI there. Raises BridgeError when the port cannot be had."""
    path = rapi.parse_wire(wire_text)
    line = rapi.RapiLine(path)
    try:
        line.open()
        reply = await line.ask("GV")
    except BridgeError as error:
        if error.name == "timeout":
            return None
        raise
    finally:
        line.close()
    fit = Fit(rapi.MAP, f"OpenEVSE, firmware {' RAPI '.join(reply.words[:2])}", 100)
    return Found(wire_text, f"{rapi.BAUD} 8N1, RAPI", None, (fit,))


async def _lives(bus: Bus, device_id: int, maps: Sequence[DeviceMap]) -> bool:
    """Does anybody answer under this id? Some devices are deaf to registers they do not have, so their maps are asked too."""
    places = {(3, 0, 1): None}
    for device_map in maps:
        if device_map.wire.device_id == device_id and device_map.reads:
            point = next(iter(device_map.reads.values()))
            places[point.read_fc or 3, point.addresses[0], point.word_count] = None
    for fc, address, count in list(places)[:_PLACES_MAX]:
        try:
            await bus.read(device_id, fc, address, count)
            return True
        except BridgeError as error:
            if error.name in ("exception_10", "exception_11", "timeout", "wrong_reply"):
                continue  # 10 and 11 come from a gateway: nobody is behind it
            if not error.name.startswith("exception_"):
                raise
            return True
    return False


async def _fits(bus: Bus, device_id: int, maps: Sequence[DeviceMap]) -> tuple[Fit, ...]:
    found = []
    for device_map in maps:
        if device_map.sunspec is not None:
            percent = 100 if await _is_sunspec(bus, device_id, device_map.sunspec.base_addresses) else 0
        else:
            percent = await _fit_percent(bus, device_id, device_map)
        if percent >= FIT_PERCENT:
            connectors = await _connectors(bus, device_id, device_map)
            found.append(Fit(device_map.id, f"{device_map.maker} {device_map.model}", percent, connectors))
    return tuple(sorted(found, key=lambda fit: -fit.percent))


async def _connectors(bus: Bus, device_id: int, device_map: DeviceMap) -> tuple[int, ...]:
    """Which of the station's charging points are there; one that is not ends the counting. All zeros is none."""
    there = [1]
    for number in range(2, device_map.connector_count + 1):
        points = device_map.at_connector(number).reads.values()
        try:
            told = [
                await bus.read(device_id, point.read_fc or 3, at, point.word_count)
                for point in points
                for at in point.addresses
            ]
        except BridgeError as error:
            if not error.name.startswith("exception_") and error.name not in ("timeout", "wrong_reply"):
                raise
            break
        if not any(map(any, told)):
            break
        there.append(number)
    return tuple(there)


async def _is_sunspec(bus: Bus, device_id: int, base_addresses: Sequence[int]) -> bool:
    """SunSpec says so itself: "SunS" where its list of models begins."""
    for base in base_addresses:
        try:
            if await bus.read(device_id, 3, base, 2) == (0x5375, 0x6E53):
                return True
        except BridgeError as error:
            if not error.name.startswith("exception_") and error.name not in ("timeout", "wrong_reply"):
                raise
    return False


async def _fit_percent(bus: Bus, device_id: int, device_map: DeviceMap) -> int:
    proven = possible = refused = 0
    for name, point in device_map.reads.items():
        weight = _WEIGHT.get(name, 1)
        possible += weight
        try:
            told = [
                await bus.read(device_id, point.read_fc or 3, at, point.word_count) for at in point.addresses
            ]
        except BridgeError as error:
            if not error.name.startswith("exception_") and error.name not in ("timeout", "wrong_reply"):
                raise
            refused += 1
            if refused >= _REFUSALS_MAX:
                return 0
            continue
        proven += weight * is_evidence(name, point.value(told))
    return proven * 100 // max(1, possible)


def is_evidence(name: str, value: Value | None) -> bool:
    """True when this value would be an odd accident in any other device. Pure."""
    if not value:
        return False  # zero, nothing, no fault, open: a device full of zeros says the same
    if isinstance(value, bool):
        return True
    if isinstance(value, str):
        known = not value.startswith("device_code_")
        return known and value.isprintable() and any(letter.isalnum() for letter in value)
    if name == "voltage_mv":
        return VOLTAGE_MV[0] <= value <= VOLTAGE_MV[1]
    if name == "frequency_mhz":
        return FREQUENCY_MHZ[0] <= value <= FREQUENCY_MHZ[1]
    if name == "soc_permille":
        return 0 < value <= 1000
    if name == "power_w":
        return abs(value) <= POWER_W_MAX
    if name == "current_ma":
        return 0 < value <= CURRENT_MA_MAX
    return 0 < value < 10**12  # a counter: more than nothing, less than a power station


def known_maps(names: Sequence[str], load: Callable[[str], DeviceMap]) -> list[DeviceMap]:
    """These maps; one that does not load is nobody's match, and no reason to stop looking."""
    found = []
    for name in names:
        try:
            found.append(load(name))
        except MapError:
            continue
    return found
