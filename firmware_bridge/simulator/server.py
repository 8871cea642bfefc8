"""The simulated device on a real wire: a plant, laid out by a device map, behind pymodbus' own server (TCP or
pty RTU).

Rules
* What a register shows and what a write does both come from the device map; nothing here knows a device by
  name.
* A request is answered from the plant as it is at that instant; between requests the plant still runs, by its
  own events.
* The wire cannot see the truth; `Simulator.truth()` can, and tests and `--truth` use it.

May not know: the driver that talks to it (it shares the map with it, never code that encodes a frame).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from types import TracebackType
from typing import Any, Self

from pymodbus.constants import ExcCodes
from pymodbus.server import ModbusSerialServer, ModbusTcpServer
from pymodbus.simulator import DataType, SimData, SimDevice

from firmware_bridge.charger import MapError
from firmware_bridge.device_map import DeviceMap, Point, Value, load_map
from firmware_bridge.registers import EncodeError
from firmware_bridge.simulator.plant import Plant, PlantConfig
from firmware_bridge.simulator.serial_line import SerialLine

logging.getLogger("pymodbus").setLevel(logging.CRITICAL)

_IDENTITY: dict[str, Value] = {
    "maker": "V2V",
    "model": "Simulated charger",
    "serial": "0000000001",
    "firmware": "1.0.0",
}
_FILLER_ADDRESS = (
    65535  # pymodbus cannot hold an empty block; this one answers "illegal address" like everything unmapped
)


@dataclass(frozen=True, slots=True)
class SimulatorConfig:
    """What to simulate and where. Exactly one of `tcp` ("host:port", port 0 = any) and `pty` (a link to
    make).

    `meter_map` puts a separate meter on the same bus under `meter_device_id`. `pinned` fixes named
    quantities, so that another client's decoding can be compared.
    """

    map: str = "simulated"
    tcp: str | None = None
    pty: str | None = None
    device_id: int | None = None
    meter_map: str | None = None
    meter_device_id: int | None = None
    plant: PlantConfig = field(default_factory=PlantConfig)
    pinned: Mapping[str, Value] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Truth:
    """What really happened, whatever the wire was told. `energised`: the relay is closed."""

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

    def as_dict(self) -> dict[str, int | bool]:
        """For JSON."""
        return asdict(self)


class Simulator:
    """`async with Simulator(config) as simulator:` listens at `simulator.wire` until the block ends."""

    def __init__(self, config: SimulatorConfig) -> None:
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
        self._line: SerialLine | None = None
        self._server: ModbusTcpServer | ModbusSerialServer | None = None
        self.plant = Plant(config.plant)

    async def __aenter__(self) -> Self:
        self.plant = Plant(self.config.plant, self._now_ms())
        devices = [_Device(self, self.map, self.device_id).sim_device()]
        if self.meter_map is not None:
            meter_id = self.config.meter_device_id
            meter_id = self.meter_map.wire.device_id if meter_id is None else meter_id
            if meter_id == self.device_id:
                raise MapError(
                    f"charger and meter both have device id {meter_id}; give the meter another one"
                )
            devices.append(_Device(self, self.meter_map, meter_id).sim_device())
        if self.config.tcp is not None:
            await self._listen_tcp(devices, self.config.tcp)
        else:
            await self._listen_pty(devices, self.config.pty or "")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._server is not None:
            await self._server.shutdown()  # type: ignore[no-untyped-call] # pymodbus leaves it bare
        if self._line is not None:
            self._line.close()

    async def _listen_tcp(self, devices: list[SimDevice], address: str) -> None:
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit():
            raise MapError(f"tcp = {address!r} is not HOST:PORT")
        server = ModbusTcpServer(devices, address=(host, int(port)))
        try:
            await server.serve_forever(background=True)
        except RuntimeError as exc:  # pymodbus' word for every failure to listen
            raise MapError(
                f"cannot listen on {address}; is the port taken? choose another, or 0 for any"
            ) from exc
        self._server = server
        sockets: Any = getattr(server.transport, "sockets", None)
        self.wire = f"tcp://{host}:{sockets[0].getsockname()[1]}"

    async def _listen_pty(self, devices: list[SimDevice], link: str) -> None:
        self._line = SerialLine(link)
        server = ModbusSerialServer(
            devices, port=self._line.device_end, baudrate=self.map.wire.baud, parity="N"
        )
        await server.serve_forever(background=True)
        self._server = server
        self.wire = f"rtu://{link}?baud={self.map.wire.baud}&parity=N"

    @staticmethod
    def _now_ms() -> int:
        return int(asyncio.get_running_loop().time() * 1000)

    def now(self) -> Plant:
        """The plant, brought up to this instant."""
        self.plant.advance(self._now_ms())
        return self.plant

    def truth(self) -> Truth:
        """The truth at this instant."""
        plant = self.now()
        return Truth(
            at_ms=plant.now_ms,
            delivered_mwh=plant.delivered_mwh,
            register_mwh=plant.register_mwh,
            power_w=plant.power_w,
            current_ma=plant.current_ma,
            offered_ma=plant.offered_ma,
            contactor_closed=plant.contactor_closed,
            energised=plant.contactor_closed,
            enabled=plant.enabled,
            locked=plant.locked,
            failsafe_armed=plant.failsafe_timeout_ms > 0,
            failsafe_tripped=plant.failsafe_tripped,
            soc_permille=plant.soc_permille,
        )


class _Device:
    """One device id of the server: a map over the plant."""

    _WRITES_KEPT = 1000

    def __init__(self, simulator: Simulator, device_map: DeviceMap, device_id: int) -> None:
        self.simulator = simulator
        self.map = device_map
        self.device_id = device_id
        self.writable: list[Point] = [
            *device_map.commands.values(),
            *(item.point for item in device_map.prepare),
        ]
        if device_map.failsafe is not None:
            self.writable += [
                p for p in (device_map.failsafe.timeout_ms, *device_map.failsafe.fallback) if p is not None
            ]

    # -------------------------------------------------------------- layout
    def sim_device(self) -> SimDevice:
        blocks = tuple(_blocks(self._spans(fc), self._gap(), bit=fc < 3) for fc in (1, 2, 3, 4))
        coils, discrete, holding, inputs = blocks
        return SimDevice(id=self.device_id, simdata=(coils, discrete, holding, inputs), action=self._action)

    def _spans(self, fc: int) -> dict[int, int]:
        """Address to length of everything that this function code reaches, for reading or for writing."""
        reached = [
            (at, point) for point in self.map.reads.values() if point.read_fc == fc for at in point.addresses
        ]
        if fc in (1, 3):
            reached += [(p.addresses[0], p) for p in self.writable if (p.type == "bit") == (fc == 1)]
        spans: dict[int, int] = {}
        for at, point in reached:
            spans[at] = max(point.word_count, spans.get(at, 0))
        return spans

    def _gap(self) -> int:
        """How many unmapped registers the device answers with 0 instead of refusing."""
        if self.map.wire.blocks == "across_gaps":
            return self.map.wire.block_words_max
        return self.map.wire.spare_words

    # -------------------------------------------------------------- every access
    async def _action(
        self,
        fc: int,
        start: int,
        address: int,
        count: int,
        current: list[int],
        values: list[int] | list[bool] | None,
    ) -> ExcCodes | None:
        now_ms = self.simulator._now_ms()  # noqa: SLF001 # the device is a part of its simulator
        failsafe = self.map.failsafe
        if failsafe is not None and failsafe.fed_by == "any_request":
            self.simulator.plant.feed(now_ms)
        if values is not None:
            return self._written(address, tuple(int(value) for value in values), now_ms)
        plant = self.simulator.now()
        for point in self.map.reads.values():
            if point.read_fc == fc:
                pinned = self.simulator.config.pinned.get(point.name)
                value = self._true_value(point.name, plant) if pinned is None else pinned
                self._show(point, value, plant.config.phase_count, start, current)
        for point in self.writable:
            held = self._held_value(point, plant) if point.read_fc == fc else None
            if held is not None:
                self._show(point, held, 1, start, current)
        return None

    def _written(self, address: int, words: tuple[int, ...], now_ms: int) -> ExcCodes | None:
        points = [p for p in self.writable if address <= p.addresses[0] < address + len(words)]
        covered = sum(point.word_count for point in points)
        if covered != len(words):
            return ExcCodes.ILLEGAL_ADDRESS
        for point in points:
            at = point.addresses[0] - address
            if not self._command(point, words[at : at + point.word_count], now_ms):
                return ExcCodes.ILLEGAL_VALUE
        self.simulator.writes.append((self.device_id, address, words))
        del self.simulator.writes[: -self._WRITES_KEPT]
        return None

    def _command(self, point: Point, words: tuple[int, ...], now_ms: int) -> bool:
        """Do what was written; False refuses the value as the device would."""
        plant, failsafe = self.simulator.plant, self.map.failsafe
        value = point.value([words])
        number = value if isinstance(value, int) else 0
        in_range = number == 0 or (
            (point.low is None or number >= point.low) and (point.high is None or number <= point.high)
        )
        if point.step is not None and not in_range:
            return False
        if failsafe is not None and point is failsafe.timeout_ms:
            plant.arm_failsafe(now_ms, timeout_ms=number)
        elif failsafe is not None and point in failsafe.fallback:
            plant.arm_failsafe(now_ms, current_ma=number)
        elif point.name == "set_current_ma":
            plant.set_limit(number, now_ms)
            if "enable" not in self.map.commands:
                plant.enable(number > 0, now_ms)
        elif point.name == "set_power_w":
            volts_times_phases_mv = plant.config.voltage_mv * plant.config.phase_count
            plant.set_limit(abs(number) * 1_000_000 // volts_times_phases_mv, now_ms)
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

    # -------------------------------------------------------------- what a register shows
    def _held_value(self, point: Point, plant: Plant) -> int | None:
        """What the device really holds at a place that can be written; None: whatever was written last."""
        failsafe = self.map.failsafe
        if failsafe is not None and point == failsafe.timeout_ms:
            return plant.failsafe_timeout_ms
        if failsafe is not None and point in failsafe.fallback:
            return plant.failsafe_current_ma if point.name == "current_ma" else None
        if point.name == "set_current_ma":
            return plant.offered_ma
        if point.name in ("enable", "lock"):
            on = plant.enabled if point.name == "enable" else plant.locked
            return point.on if on else point.off
        return None

    @staticmethod
    def _show(point: Point, shown: Value, phase_count: int, start: int, current: list[int]) -> None:
        per_address: list[Value] = [shown] * len(point.addresses)
        if len(point.addresses) > 1 and point.name == "current_ma" and isinstance(shown, int):
            # Phases that are not there carry nothing.
            share = shown // phase_count if point.combine == "sum" else shown
            per_address = [share if at < phase_count else 0 for at in range(len(point.addresses))]
        for address, value in zip(point.addresses, per_address, strict=True):
            try:
                words = point.words(value)
            except EncodeError:
                # A fault or state this device has no word for stays unseen, as in reality.
                words = (0,) * point.word_count
            if point.type == "bit":
                _set_bit(current, start, address, bool(words[0]))
            else:
                current[address - start : address - start + point.word_count] = words

    def _true_value(self, name: str, plant: Plant) -> Value:
        step_mwh = max(1, self.map.energy.step_mwh)  # a counter shows what is fully counted
        forward = "register_import_mwh" if self.map.energy.forward == "import" else "register_export_mwh"
        values: dict[str, Value] = {
            "register_mwh": plant.register_mwh // step_mwh * step_mwh,
            "power_w": plant.power_w,
            "current_ma": plant.current_ma,
            "voltage_mv": plant.config.voltage_mv,
            "frequency_mhz": 50_000,
            "soc_permille": plant.soc_permille,
            "pilot_state": plant.pilot_state,
            "contactor_closed": plant.contactor_closed,
            "fault": plant.fault,
        }
        if name in ("register_import_mwh", "register_export_mwh"):
            return values["register_mwh"] if name == forward else 0
        point = self.map.reads.get(name)
        if point is not None and point.text and point.type != "ascii":
            return "1"
        return values[name] if name in values else _IDENTITY[name]


def _blocks(spans: Mapping[int, int], gap: int, *, bit: bool) -> list[SimData]:
    """One SimData per run of places that exist; `gap` more after each place answer with 0, as the map
    promises.
    """
    exist = {
        at for address, count in spans.items() for at in range(address, address + count + (0 if bit else gap))
    }
    exist = {at for at in exist if at < _FILLER_ADDRESS}
    starts = sorted(at for at in exist if at - 1 not in exist)
    found = [_sim_data(at, _run_length(at, exist), bit=bit) for at in starts]
    if bit:
        return found or [SimData(_FILLER_ADDRESS - 15, values=[False] * 16, datatype=DataType.BITS)]
    return [*found, SimData(_FILLER_ADDRESS, datatype=DataType.INVALID)]


def _run_length(start: int, exist: set[int]) -> int:
    return next(n for n in itertools.count(1) if start + n not in exist)


def _sim_data(address: int, count: int, *, bit: bool) -> SimData:
    if bit:
        return SimData(address, values=[False] * count, datatype=DataType.BITS)
    return SimData(address, values=[0] * count, datatype=DataType.REGISTERS)


def _set_bit(current: list[int], start: int, address: int, on: bool) -> None:
    word, bit = address // 16 - start, address % 16
    current[word] = current[word] | 1 << bit if on else current[word] & ~(1 << bit)
