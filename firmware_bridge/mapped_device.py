"""One device on a bus, asked by its map: named quantities in, named quantities out.

Rules
* Neighbours are read together where the map allows it; a value and its exponent always belong to one look.
* What was written is compared in the quantity's own unit, where the device shows it.
* A SunSpec device is asked where its models are, before the first look and again before arming.

May not know: what a charger or a meter is for, sessions, the agent, pymodbus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.device_map import DeviceMap, Point, Sunspec, Value
from firmware_bridge.modbus import Bus, Priority
from firmware_bridge.registers import EncodeError

_SUNS = (0x5375, 0x6E53)  # "SunS": here begins a list of SunSpec models
_SUNSPEC_END = 0xFFFF
_NOT_HERE = ("exception_2", "exception_3")  # how a device says that there is nothing at an address
_SUNSPEC_MODELS_MAX = 64  # a list that never ends is no list


@dataclass(frozen=True, slots=True)
class _Block:
    """Words that are read in one request."""

    fc: int
    address: int
    count: int


class MappedDevice:
    """One device id on one bus, by its map: named quantities in, named quantities out."""

    def __init__(self, device_map: DeviceMap, bus: Bus, device_id: int) -> None:
        self.map = device_map
        self.bus = bus
        self.device_id = device_id
        self.grain: dict[str, int] = {}  # how fine each counter was when it was last read
        self._starts: Mapping[int, int] | None = None  # where each SunSpec model begins

    async def read(self, names: Sequence[str], priority: Priority = Priority.POLL) -> dict[str, Value | None]:
        """The named quantities that this map has; None where the device shows a sentinel."""
        points = [self.map.reads[name] for name in names if name in self.map.reads]
        return await self.look(points, priority, spare_words=self.map.wire.spare_words)

    async def look(
        self, points: Sequence[Point], priority: Priority, *, spare_words: int = 0
    ) -> dict[str, Value | None]:
        """What these points say, by their names."""
        placed = [await self._placed(point, priority) for point in points]
        seen: dict[tuple[int, int], int] = {}
        for block in plan_blocks(placed, self.map.wire.blocks, self.map.wire.block_words_max):
            # Bits and lone values are read exactly: their neighbours may not exist.
            spare = spare_words if block.fc in (3, 4) else 0
            words = await self.bus.read(
                self.device_id, block.fc, block.address, block.count, spare=spare, priority=priority
            )
            seen |= {(block.fc, block.address + at): word for at, word in enumerate(words)}
        return {point.name: self._said(point, seen) for point in placed}

    def _said(self, point: Point, seen: Mapping[tuple[int, int], int]) -> Value | None:
        fc = point.read_fc or 0
        words = [[seen[fc, at + n] for n in range(point.word_count)] for at in point.addresses]
        exponent = None if point.exponent is None else seen[fc, point.exponent.address]
        if point.name.startswith("register_"):
            self.grain[point.name] = point.resolution(words[-1], exponent)
        return point.value(words, exponent)

    async def differs(self, point: Point, wanted: Value, priority: Priority = Priority.CONTROL) -> str | None:
        """None when the device holds what writing `wanted` leaves there; otherwise what it holds, and where."""
        exponent = await self._exponent(point, wanted, priority)
        meant = point.value([self._words(point, wanted, exponent)], exponent)
        shown_at = point.mirror or point
        shown = (await self.look([shown_at], priority))[point.name]
        return None if shown == meant else f"holds {shown} at {shown_at.addresses[0]} ({point.name})"

    async def write(self, point: Point, value: Value, priority: Priority = Priority.CONTROL) -> None:
        """Write a value; MapError when it does not fit the register."""
        assert point.write_fc is not None
        words = self._words(point, value, await self._exponent(point, value, priority))
        placed = await self._placed(point, priority)
        await self.bus.write(self.device_id, point.write_fc, placed.addresses[0], words, priority=priority)

    def _words(self, point: Point, value: Value, exponent: int | None) -> tuple[int, ...]:
        try:
            return point.words(value, exponent)
        except EncodeError as exc:
            raise MapError(f"{self.map.id}: {exc}") from exc

    async def _exponent(self, point: Point, value: Value, priority: Priority) -> int | None:
        """The device's own scale factor; not asked for 0, which is 0 in every scale and often a stop."""
        if point.exponent is None or value == 0:
            return None
        placed = await self._placed(point, priority)
        assert placed.exponent is not None
        fc = placed.read_fc or 3
        return (await self.bus.read(self.device_id, fc, placed.exponent.address, 1, priority=priority))[0]

    async def check_settings(self) -> None:
        """Raises BridgeError `wrong_setting` where the device is not set up as its map supposes."""
        for item in self.map.expected:
            found = (await self.look([item.point], Priority.CONTROL))[item.point.name]
            if not item.met_by(found):
                raise BridgeError(
                    "wrong_setting",
                    f"{self.map.id} holds {found} at {item.point.addresses[0]}: {item.remedy}",
                )

    # -------------------------------------------------------------- SunSpec: the device says where things are
    async def find_places(self) -> None:
        """Look anew where the models begin: the device may be another one by now."""
        if self.map.sunspec is not None:
            self._starts = await self._find_models(self.map.sunspec, Priority.CONTROL)

    async def _placed(self, point: Point, priority: Priority) -> Point:
        sunspec = self.map.sunspec
        if point.model is None or sunspec is None:
            return point
        if self._starts is None:
            self._starts = await self._find_models(sunspec, priority)
        if point.model not in self._starts:
            found = ", ".join(map(str, sorted(self._starts)))
            raise BridgeError(
                "model_missing",
                f"{self.map.id} needs SunSpec model {point.model} for {point.name}; the device has: {found}",
            )
        return point.placed(self._starts)

    async def _find_models(self, sunspec: Sunspec, priority: Priority) -> dict[int, int]:
        for base in sunspec.base_addresses:
            try:
                if await self._two_words(base, priority) == _SUNS:
                    break
            except BridgeError as exc:
                if exc.name not in _NOT_HERE:
                    raise  # nobody answers, or a gateway for nobody: that says nothing about this address
        else:
            where = ", ".join(map(str, sunspec.base_addresses))
            raise BridgeError("model_missing", f"no SunSpec device: no 'SunS' at any of {where}")
        starts: dict[int, int] = {}
        at = base + len(_SUNS)
        for _ in range(_SUNSPEC_MODELS_MAX):
            model, length = await self._two_words(at, priority)
            if model == _SUNSPEC_END:
                break
            starts.setdefault(model, at)
            at += 2 + length
        return starts

    async def _two_words(self, address: int, priority: Priority) -> tuple[int, ...]:
        return await self.bus.read(self.device_id, 3, address, 2, priority=priority)


def plan_blocks(points: Sequence[Point], blocks: str, words_max: int) -> list[_Block]:
    """Which requests fetch these points: neighbours together where the device allows it (map key
    `wire.blocks`).
    """
    places = sorted({(p.read_fc or 0, at, count) for p in points for at, count in p.spans().items()})
    found: list[_Block] = []
    for fc, address, count in places:
        last = found[-1] if found else None
        if last is not None and last.fc == fc and blocks != "single_value":
            end = max(last.address + last.count, address + count)
            together = address <= last.address + last.count or blocks == "across_gaps"
            if together and end - last.address <= words_max:
                found[-1] = _Block(fc, last.address, end - last.address)
                continue
        found.append(_Block(fc, address, count))
    return found
