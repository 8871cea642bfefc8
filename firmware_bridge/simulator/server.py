"""The simulated device on a real wire: a plant, laid out by a device map, behind a slave of our own (`slave.py`).

Rules
* What a register shows and what a write does both come from the device map; nothing here knows a device by
  name.
* A request is answered from the plant as it is at that instant; between requests the plant still runs, by its
  own events.
* It refuses what the device refuses: unmapped addresses, reads across a border of the map, blocks longer than the map allows.
* Several devices may share the wire, and the charging points of one station a device id (MAP and MAP#2). A charger brings its
  own plant (box, car, cable); a meter measures the charger before it.
* The wire cannot see the truth; `Simulator.truth()` can, and tests and `--truth` use it.

May not know: the driver that talks to it (it shares the map with it, never code that encodes a frame).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Self

from firmware_bridge.charger import MapError
from firmware_bridge.device_map import DeviceMap, NoValue, Point, Sunspec, Value, load_map
from firmware_bridge.registers import EncodeError
from firmware_bridge.simulator.plant import Plant, PlantConfig
from firmware_bridge.simulator.scenario import Fault, Scenario
from firmware_bridge.simulator.slave import Exchange, LineTiming, SerialSlave, Tap, TcpSlave

_IDENTITY: dict[str, Value] = {
    "maker": "V2V",
    "model": "Simulated charger",
    "serial": "0000000001",
    "firmware": "1.0.0",
}
_EXCEPTION = 0x80  # in the function code of a refusal
_ILLEGAL_FUNCTION, _ILLEGAL_ADDRESS, _ILLEGAL_VALUE = 1, 2, 3
_READ_BITS, _READ_WORDS = (1, 2), (3, 4)
_BITS_MAX, _WORDS_MAX = 2000, 125  # the most that one reply can carry
_SCENARIO_TICK_S = 0.02  # how exactly a fault begins and ends by itself
_DEVICE_TIMER_MS = 10_000  # of a failsafe whose time only the device knows; nobody publishes it
_SUNS = (0x5375, 0x6E53)  # "SunS", and how a list of SunSpec models ends
_SUNSPEC_END = (0xFFFF, 0)
_DEVICES_MAX = 247  # as many ids as a bus has


@dataclass(frozen=True, slots=True)
class AlsoDevice:
    """One more device on the same wire. A meter measures the charger named before it."""

    map: str
    device_id: int | None = None
    pinned: Mapping[str, Value | NoValue] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SimulatorConfig:
    """What to simulate and where. Exactly one of `tcp` ("host:port", port 0 = any) and `pty` (a link to make).

    `rtu`: serial frames on the TCP connection, as behind a transparent gateway. `meter_map` puts a separate meter on the same
    wire under `meter_device_id`, and `also` any number of devices more. `pinned` fixes named quantities of every device, so that
    another client's decoding can be compared; `also` devices have pins of their own. `scenario` is what goes wrong and when,
    `tap` sees every frame.
    """

    map: str = "simulated"
    tcp: str | None = None
    pty: str | None = None
    device_id: int | None = None
    meter_map: str | None = None
    meter_device_id: int | None = None
    plant: PlantConfig = field(default_factory=PlantConfig)
    pinned: Mapping[str, Value | NoValue] = field(default_factory=dict)
    also: tuple[AlsoDevice, ...] = ()
    rtu: bool = False
    scenario: tuple[Fault, ...] = ()
    tap: Tap | None = None


@dataclass(frozen=True, slots=True)
class Truth:
    """What really happened, whatever the wire was told. `energised`: the relay is closed and supplied. `zero_at_ms`: when the
    current last ended, to the millisecond, however seldom somebody looks; None: it never flowed.
    """

    at_ms: int
    delivered_mwh: int
    register_mwh: int
    power_w: int
    current_ma: int
    offered_ma: int
    contactor_closed: bool
    energised: bool
    enabled: bool
    locked: bool
    failsafe_armed: bool
    failsafe_tripped: bool
    soc_permille: int
    zero_at_ms: int | None = None

    def as_dict(self) -> dict[str, int | bool | None]:
        """For JSON."""
        return asdict(self)


class Simulator:
    """`async with Simulator(config) as simulator:` listens at `simulator.wire` until the block ends."""

    def __init__(self, config: SimulatorConfig, measured: Plant | None = None) -> None:
        """`measured`: the plant of somebody else's charger, that these devices (meters) measure."""
        if (config.tcp is None) == (config.pty is None):
            raise MapError("simulate on exactly one of tcp (HOST:PORT) and pty (a link to make)")
        self.config = config
        self.map = load_map(config.map)
        self.meter_map = load_map(config.meter_map) if config.meter_map else None
        self.device_id = config.device_id if config.device_id is not None else self.map.wire.device_id
        self.wire = ""
        self.writes: list[
            tuple[int, int, tuple[int, ...]]
        ] = []  # (device id, address, words), newest last, bounded
        self._measured = measured
        self.plant = measured or Plant(config.plant)
        self.devices: dict[int, _Device] = {}
        self.scenario = Scenario(config.scenario)
        self._slave: TcpSlave | SerialSlave | None = None
        self._director: asyncio.Task[None] | None = None
        self._began_ms = 0

    async def __aenter__(self) -> Self:
        self._began_ms = self._now_ms()
        self.plant = self._measured or Plant(self.config.plant, self._began_ms)
        self.devices = self._laid_out()
        exchange = Exchange(self._answer, self.scenario, self.config.tap)
        wire = self.map.wire
        if self.config.tcp is not None:
            self._slave = TcpSlave(exchange, "rtu" if self.config.rtu else "tcp")
        else:
            self._slave = SerialSlave(exchange, LineTiming(wire.baud, wire.gap_ms))
        self.wire = await self._slave.listen(self.config.tcp or self.config.pty or "")
        if self.config.scenario:
            await self._act()
            self._director = asyncio.get_running_loop().create_task(self._direct(self._slave))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._director is not None:
            self._director.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._director
        if self._slave is not None:
            await self._slave.close()

    def _laid_out(self) -> dict[int, _Device]:
        """Every device of the configuration under its id. Raises MapError for two of one id."""
        found: dict[int, _Device] = {}
        plant = self.plant
        wanted = [(self.map, self.device_id, self.config.pinned)]
        if self.meter_map is not None:
            meter_id = self.config.meter_device_id
            wanted.append(
                (
                    self.meter_map,
                    self.meter_map.wire.device_id if meter_id is None else meter_id,
                    self.config.pinned,
                )
            )
        for one in self.config.also:
            its_map = load_map(one.map)
            its_id = its_map.wire.device_id if one.device_id is None else one.device_id
            wanted.append((its_map, its_id, one.pinned))
        if len(wanted) > _DEVICES_MAX:
            raise MapError(f"a bus has {_DEVICES_MAX} device ids at most")
        for its_map, its_id, pinned in wanted:
            station = found.get(its_id)
            if station is not None and not station.is_beside(its_map):
                raise MapError(
                    f"{station.map.id} and {its_map.id} both have device id {its_id}; give one another id"
                )
            if found and its_map.kind == "charger":
                plant = Plant(self.config.plant, self._began_ms)
            device = _Device(self, its_map, its_id, plant, pinned)
            if station is None:
                found[its_id] = device
            else:
                station.beside.append(device)
        return found

    # -------------------------------------------------------------- what goes wrong
    async def _direct(self, slave: TcpSlave | SerialSlave) -> None:
        pulled = False
        while True:
            await asyncio.sleep(_SCENARIO_TICK_S)
            await self._act()
            if self.scenario.unplugged != pulled:
                pulled = not pulled
                await (slave.unplug() if pulled else slave.plug())

    async def _act(self) -> None:
        now_ms = self._now_ms()
        self.now()
        self.scenario.at((now_ms - self._began_ms) / 1000, self.plant.delivered_mwh / 1000)
        for device in [one for first in self.devices.values() for one in (first, *first.beside)]:
            if device.map.kind == "charger":
                faults = self.scenario.plant_faults(device.device_id, first=device.plant is self.plant)
                device.plant.suffer(faults, now_ms)

    # -------------------------------------------------------------- what is asked
    async def _answer(self, device_id: int, pdu: bytes) -> bytes | None:
        device = self.devices.get(device_id)
        if device is not None:
            return device.answer(pdu)
        if self.config.tcp is not None and not self.config.rtu:
            # Over TCP the address is the host's; 0 and 255 mean whoever answers there (Modbus messaging on TCP/IP, 4.4.2.2).
            return self.devices[self.device_id].answer(pdu) if device_id in (0, 255) else None
        if device_id == 0:  # a broadcast: done by everybody, answered by nobody
            for one in self.devices.values():
                one.answer(pdu)
        return None

    @staticmethod
    def _now_ms() -> int:
        return int(asyncio.get_running_loop().time() * 1000)

    def now(self) -> Plant:
        """The first device's plant, brought up to this instant."""
        self.plant.advance(self._now_ms())
        return self.plant

    def cut_off(self) -> None:
        """The contactor in front of the first charger opens, as an external cut-off opens it."""
        self.plant.cut_off(self._now_ms())

    def truths(self) -> dict[str, Truth]:
        """The truth of every charger on the wire, by device id; "1#2" is the second charging point of a station."""
        return {
            f"{at}#{one.map.connector}" if one.map.connector > 1 else str(at): self.truth(one.plant)
            for at, device in self.devices.items()
            for one in (device, *device.beside)
            if one.map.kind == "charger"
        }

    def truth(self, plant: Plant | None = None) -> Truth:
        """The truth at this instant, of the first device's plant unless another is named."""
        plant = plant or self.plant
        plant.advance(self._now_ms())
        return Truth(
            at_ms=plant.now_ms,
            delivered_mwh=plant.delivered_mwh,
            register_mwh=plant.register_mwh,
            power_w=plant.power_w,
            current_ma=plant.current_ma,
            offered_ma=plant.offered_ma,
            contactor_closed=plant.contactor_closed,
            energised=plant.contactor_closed and plant.supplied,
            enabled=plant.enabled,
            locked=plant.locked,
            failsafe_armed=plant.failsafe_timeout_ms > 0,
            failsafe_tripped=plant.failsafe_tripped,
            soc_permille=plant.soc_permille,
            zero_at_ms=plant.zero_at_ms,
        )


class _Device:
    """One device id on the wire: a map over a plant."""

    _WRITES_KEPT = 1000

    def __init__(
        self,
        simulator: Simulator,
        device_map: DeviceMap,
        device_id: int,
        plant: Plant,
        pinned: Mapping[str, Value | NoValue],
    ) -> None:
        self.simulator = simulator
        self.fixed: dict[int, int] = {}  # holding registers that always say the same
        if device_map.sunspec is not None:
            starts, self.fixed = _sunspec_list(device_map.sunspec)
            device_map = device_map.placed(starts)
        self.map = device_map
        self.device_id = device_id
        self.plant = plant
        self.pinned = pinned
        self.beside: list[_Device] = []  # the other charging points of the station, under the same device id
        failsafe = device_map.failsafe
        found = [
            *device_map.commands.values(),
            *(failsafe.points if failsafe is not None else ()),
            *(item.point for item in device_map.prepare),
        ]
        # One place, one meaning: a set point may be prepared, and expected to be somewhere, too.
        self.settable: list[Point] = list({point.addresses: point for point in reversed(found)}.values())
        taken = {point.addresses for point in self.settable}
        self.settings = [item for item in device_map.expected if item.point.addresses not in taken]
        self.writable = [point for point in self.settable if point.write_fc is not None]
        self.written: dict[int, Value] = {}  # what was written last, by address
        if failsafe is not None and failsafe.kind != "none":
            # What cannot be set was set up well: it stops, and after a time of its own.
            fallback_ma = None if any(point.write_fc for point in failsafe.fallback) else 0
            timeout_ms = _DEVICE_TIMER_MS if failsafe.own_timer else None
            plant.arm_failsafe(plant.now_ms, timeout_ms=timeout_ms, current_ma=fallback_ma)

        # By function code: what is held at every address that exists. What does not exist is refused.
        self.spans = {fc: self._spans(fc) for fc in (1, 2, 3, 4)}
        self.held: dict[int, dict[int, int]] = {fc: self._places(fc) for fc in (1, 2, 3, 4)}

    # -------------------------------------------------------------- layout
    def _places(self, fc: int) -> dict[int, int]:
        """Every address that answers to this function code, holding 0; with the gaps that the map promises to be there."""
        gap = self._gap() if fc in _READ_WORDS else 0
        return {
            at: 0
            for start, count in self.spans[fc].items()
            for at in range(start, min(start + count + gap, 65_536))
        }

    def _spans(self, fc: int) -> dict[int, int]:
        """Address to length of everything that this function code reaches, for reading or for writing."""
        mirrors = [point.mirror for point in self.settable if point.mirror is not None]
        settings = [item.point for item in self.map.expected]
        reached = [p for p in (*self.map.reads.values(), *mirrors, *settings) if p.read_fc == fc]
        if fc in (1, 3):
            reached += [point for point in self.settable if (point.type == "bit") == (fc == 1)]
        spans = dict.fromkeys(self.fixed, 1) if fc == 3 else {}
        for point in reached:
            for at, count in point.spans().items():
                spans[at] = max(count, spans.get(at, 0))
        return spans

    def _gap(self) -> int:
        """How many unmapped registers the device answers with 0 instead of refusing."""
        if self.map.wire.blocks == "across_gaps":
            return self.map.wire.block_words_max
        return self.map.wire.spare_words

    @property
    def name(self) -> str:
        """Its map, and those of the charging points beside it."""
        more = [one.map for one in (self, *self.beside)]
        return " and ".join(f"{one.id}#{one.connector}" if one.connector > 1 else one.id for one in more)

    def is_beside(self, device_map: DeviceMap) -> bool:
        """True for another charging point of this station."""
        here = {self.map.connector, *(one.map.connector for one in self.beside)}
        return device_map.id == self.map.id and device_map.connector not in here

    # -------------------------------------------------------------- every access
    def answer(self, pdu: bytes) -> bytes:
        """The reply to one request, function code first; an exception where the device would raise one."""
        reply = self._answer(pdu)
        for other in self.beside:
            if reply[0] < _EXCEPTION or reply[1] != _ILLEGAL_ADDRESS:
                break
            reply = other.answer(pdu)
        return reply

    def _answer(self, pdu: bytes) -> bytes:
        now_ms = self.simulator._now_ms()  # noqa: SLF001 # the device is a part of its simulator
        self.plant.advance(now_ms)
        failsafe = self.map.failsafe
        if failsafe is not None and failsafe.fed_by == "any_request":
            self.plant.feed(now_ms)
        fc = pdu[0]
        if fc in (*_READ_BITS, *_READ_WORDS) and len(pdu) == 5:
            found = self._read(fc, int.from_bytes(pdu[1:3], "big"), int.from_bytes(pdu[3:5], "big"))
            return (
                bytes([fc | _EXCEPTION, found]) if isinstance(found, int) else bytes([fc, len(found)]) + found
            )
        asked = _asked_to_write(pdu)
        if asked is None:
            known = fc in (*_READ_BITS, *_READ_WORDS, 5, 6, 15, 16)
            return bytes([fc | _EXCEPTION, _ILLEGAL_VALUE if known else _ILLEGAL_FUNCTION])
        refused = self._written(1 if fc in (5, 15) else 3, *asked, now_ms)
        return bytes([fc | _EXCEPTION, refused]) if refused else pdu[:5]

    def _read(self, fc: int, address: int, count: int) -> bytes | int:
        """The data of a reply, or the exception's code."""
        if not 1 <= count <= (_BITS_MAX if fc in _READ_BITS else _WORDS_MAX):
            return _ILLEGAL_VALUE
        wire = self.map.wire
        spans = self.spans[fc]
        if fc in _READ_WORDS:
            longest = max(wire.block_words_max, *spans.values(), 0) + wire.spare_words
            if count > longest:
                return _ILLEGAL_VALUE
            lone = spans.get(address, 0)
            if wire.blocks == "single_value" and not lone <= count <= lone + wire.spare_words:
                return _ILLEGAL_ADDRESS
        held = self.held[fc]
        if any(at not in held for at in range(address, address + count)):
            return _ILLEGAL_ADDRESS
        self._refresh(fc, held, range(address, address + count))
        found = [held[at] for at in range(address, address + count)]
        if fc in _READ_WORDS:
            return b"".join(word.to_bytes(2, "big") for word in found)
        packed = sum(bit << at for at, bit in enumerate(found))
        return packed.to_bytes(-(-count // 8), "little")

    def _refresh(self, fc: int, held: dict[int, int], asked: range) -> None:
        """Bring what this function code shows at the asked addresses up to the plant's state."""
        plant = self.plant
        for point in self.map.reads.values():
            if _shows(point, fc, asked):
                pinned = self.pinned.get(point.name)
                value = self._true_value(point.name, plant) if pinned is None else pinned
                self._show(point, value, plant.config.phase_count, held)
        for point in self.settable:
            for place in (point, point.mirror):
                if place is not None and _shows(place, fc, asked):
                    value_held = self._held_value(point, plant)
                    if value_held is not None:
                        self._show(place, value_held, 1, held)
        for item in self.settings:
            if _shows(item.point, fc, asked):
                self._show(item.point, item.example, 1, held)
        if fc == 3:
            held.update(self.fixed)

    def _written(self, fc: int, address: int, words: tuple[int, ...], now_ms: int) -> int:
        """Do what was written; the exception's code, or 0. `fc` is the one that reads the same place."""
        points = [
            p
            for p in self.writable
            if address <= p.addresses[0] < address + len(words) and (p.type == "bit") == (fc == 1)
        ]
        covered = sum(point.word_count for point in points)
        if covered != len(words):
            return _ILLEGAL_ADDRESS
        for point in points:
            at = point.addresses[0] - address
            if not self._command(point, words[at : at + point.word_count], now_ms):
                return _ILLEGAL_VALUE
        self.held[fc] |= {address + at: word for at, word in enumerate(words)}
        self.simulator.writes.append((self.device_id, address, words))
        del self.simulator.writes[: -self._WRITES_KEPT]
        return 0

    def _command(self, point: Point, words: tuple[int, ...], now_ms: int) -> bool:
        """Do what was written; False refuses the value as the device would."""
        plant, failsafe = self.plant, self.map.failsafe
        value = point.value([words])
        if value is not None:
            self.written[point.addresses[0]] = value
        number = value if isinstance(value, int) else 0
        in_range = (number == 0 and point.zero_stops) or (
            (point.low is None or number >= point.low) and (point.high is None or number <= point.high)
        )
        if point.step is not None and not in_range:
            return False
        if failsafe is not None and point is failsafe.timeout_ms:
            plant.arm_failsafe(now_ms, timeout_ms=number)
        elif failsafe is not None and point in failsafe.fallback:
            fallback_ma = number if point.name.startswith("current_ma") else self._as_current_ma(number)
            plant.arm_failsafe(now_ms, current_ma=fallback_ma)
        elif point.name == "set_current_ma":
            plant.set_limit(number, now_ms)
            if "enable" not in self.map.commands:
                plant.enable(number > 0, now_ms)
        elif point.name == "set_power_w":
            plant.set_limit(self._as_current_ma(number), now_ms)
            if "enable" not in self.map.commands:
                plant.enable(number != 0, now_ms)
        elif point.name in ("enable", "lock"):
            if number not in (point.on, point.off):
                return False
            (plant.enable if point.name == "enable" else plant.lock)(number == point.on, now_ms)
        elif point.name == "keep_alive" and number == point.on:
            plant.feed(now_ms)
        if failsafe is not None and failsafe.fed_by == "set_point" and point.name.startswith("set_"):
            plant.feed(now_ms)
        return True

    def _as_current_ma(self, power_w: int) -> int:
        config = self.plant.config
        return abs(power_w) * 1_000_000 // (config.voltage_mv * config.phase_count)

    def _as_power_w(self, current_ma: int) -> int:
        config = self.plant.config
        return current_ma * config.voltage_mv * config.phase_count // 1_000_000

    # -------------------------------------------------------------- what a register shows
    def _held_value(self, point: Point, plant: Plant) -> Value | None:
        """What the device really holds at a place that can be set; None: nothing that is known here."""
        failsafe = self.map.failsafe
        if failsafe is not None and point == failsafe.timeout_ms:
            return plant.failsafe_timeout_ms
        if failsafe is not None and point in failsafe.fallback:
            fallback_ma = plant.failsafe_current_ma
            return fallback_ma if point.name.startswith("current_ma") else self._as_power_w(fallback_ma)
        if point.name == "set_current_ma":
            return plant.offered_ma
        if point.name in ("enable", "lock"):
            on = plant.enabled if point.name == "enable" else plant.locked
            return point.on if on else point.off
        return self.written.get(point.addresses[0])

    @staticmethod
    def _show(point: Point, shown: Value | NoValue, phase_count: int, held: dict[int, int]) -> None:
        try:
            places = point.places(shown, phase_count)
        except EncodeError:
            # A fault or state this device has no word for stays unseen, as in reality.
            places = [(at, (0,) * point.word_count) for at in point.addresses]
        for address, words in places:
            held.update({address + at: word for at, word in enumerate(words)})

    def _true_value(self, name: str, plant: Plant) -> Value:
        step_mwh = max(1, self.map.energy.step_mwh)  # a counter shows what is fully counted
        forward = "register_import_mwh" if self.map.energy.forward == "import" else "register_export_mwh"
        values: dict[str, Value] = {
            "register_mwh": plant.register_mwh_shown // step_mwh * step_mwh,
            "power_w": plant.power_w,
            "current_ma": plant.current_ma,
            "voltage_mv": plant.config.voltage_mv,
            "frequency_mhz": 50_000,
            "soc_permille": plant.soc_permille,
            "pilot_state": plant.pilot_state,
            "plugged": plant.config.plugged,
            "contactor_closed": plant.contactor_closed,
            "fault": plant.fault,
        }
        if name in ("register_import_mwh", "register_export_mwh"):
            return values["register_mwh"] if name == forward else 0
        point = self.map.reads.get(name)
        if point is not None and point.text and point.type != "ascii":
            return "1"
        return values[name] if name in values else _IDENTITY[name]


def _sunspec_list(sunspec: Sunspec) -> tuple[dict[int, int], dict[int, int]]:
    """Where each model begins, and the words of the list that says so; all else in a model reads as 0."""
    at = sunspec.base_addresses[0]
    words = dict(enumerate(_SUNS, start=at))
    at += len(_SUNS)
    starts: dict[int, int] = {}
    for model, length in sunspec.model_words.items():
        starts[model] = at
        words |= dict(enumerate((model, length), start=at))
        at += 2 + length
    return starts, words | dict(enumerate(_SUNSPEC_END, start=at))


def _shows(point: Point, fc: int, asked: range) -> bool:
    """True when this function code shows a part of the point at the asked addresses."""
    if point.read_fc != fc:
        return False
    return any(at < asked.stop and asked.start < at + count for at, count in point.spans().items())


def _asked_to_write(pdu: bytes) -> tuple[int, tuple[int, ...]] | None:
    """(address, words or bits) of a sound request to write; None for anything else."""
    if len(pdu) < 5:
        return None
    fc, address, number = pdu[0], int.from_bytes(pdu[1:3], "big"), int.from_bytes(pdu[3:5], "big")
    if fc == 6 and len(pdu) == 5:
        return address, (number,)
    if fc == 5 and len(pdu) == 5 and number in (0, 0xFF00):
        return address, (int(number != 0),)
    data = pdu[6:]
    if fc == 16 and 1 <= number <= 123 and len(data) == pdu[5] == 2 * number:
        return address, tuple(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))
    if fc == 15 and 1 <= number <= 1968 and len(data) == pdu[5] == -(-number // 8):
        return address, tuple(data[at // 8] >> at % 8 & 1 for at in range(number))
    return None
