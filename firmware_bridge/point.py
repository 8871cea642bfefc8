"""One named place in a device: which words it is made of, and what they say in the house's unit. Pure.

Rules
* A raw step is an exact fraction of our unit (mWh, W, mA, mV, mHz, permille, ms); no float is ever involved.
* What is no value (a sentinel, NaN, a state the map does not list) is None, never a number.
* Energy is counted, never rounded up: what is not fully there is not there yet.
* `words` and `places` are the inverse of `value`: the driver writes with them, the simulator shows with them.

May not know: files, wires, charging.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from types import MappingProxyType

from firmware_bridge import registers
from firmware_bridge.registers import Rounding, WordOrder, WordType

Value = int | str | bool

# What one of each written unit is worth in the house's unit for that dimension.
UNITS: dict[str, dict[str, Fraction]] = {
    "energy": {
        "mWh": Fraction(1),
        "Wh": Fraction(1000),
        "kWh": Fraction(10**6),
        "MWh": Fraction(10**9),
        "Ws": Fraction(1000, 3600),
        "J": Fraction(1000, 3600),
    },
    "power": {"mW": Fraction(1, 1000), "W": Fraction(1), "kW": Fraction(1000)},
    "current": {"mA": Fraction(1), "A": Fraction(1000)},
    "voltage": {"mV": Fraction(1), "V": Fraction(1000)},
    "ratio": {"permille": Fraction(1), "%": Fraction(10)},
    "frequency": {"mHz": Fraction(1), "Hz": Fraction(1000)},
    "time": {"ms": Fraction(1), "s": Fraction(1000), "min": Fraction(60_000)},
}
# Every quantity a map may name, and what it is made of.
READS: dict[str, str] = {
    "register_mwh": "energy",  # the lifetime counter of a charger
    # The two counters of a meter; the configuration says which one is forward.
    "register_import_mwh": "energy",
    "register_export_mwh": "energy",
    "power_w": "power",
    "current_ma": "current",
    "voltage_mv": "voltage",
    "frequency_mhz": "frequency",
    "soc_permille": "ratio",
    "pilot_state": "pilot",
    "plugged": "flag",  # where the pilot state does not tell: false makes it A
    "contactor_closed": "flag",
    "fault": "fault",
    "maker": "text",
    "model": "text",
    "serial": "text",
    "firmware": "text",
}
COMMANDS: dict[str, str] = {
    "set_current_ma": "current",
    "set_power_w": "power",
    "enable": "switch",
    "lock": "switch",
    "keep_alive": "token",
}
PILOT_STATES = frozenset("ABCDEF")
_DEVICE_CODE = "device_code_"  # how a fault is called that the map does not list
_EXPONENT_MOST = (
    10  # SunSpec's own bounds; anything beyond is a sentinel or a misread, and no factor to bill by
)

_AMOUNT = re.compile(r"^\s*(-?)(\d+(?:\.\d+)?)\s*([A-Za-z%]+)\s*$")


def amount(text: str, dimension: str) -> Fraction | str:
    """`"0.1 kWh"` in the house's unit of `dimension`, or a sentence saying what is wrong with it.

    Power may be negative: `"-1 W"` says that the device counts the other way.
    """
    units = UNITS[dimension]
    found = _AMOUNT.match(text)
    if not found:
        return f'write a number and a unit, such as "1 {next(iter(units))}"'
    sign, number, unit = found.groups()
    if unit not in units:
        return f"{unit!r} is no unit of {dimension}; use one of: {', '.join(units)}"
    if sign and dimension != "power":
        return "only power has a sign"
    worth = Fraction(number) * units[unit]
    return -worth if sign else worth


@dataclass(frozen=True, slots=True)
class NoValue:
    """What a device shows when it has no value: its sentinel number `index`, or NaN."""

    index: int = 0


@dataclass(frozen=True, slots=True)
class Exponent:
    """The register beside a value that holds its decimal exponent (SunSpec's scale factors, Iskra)."""

    address: int
    usual: int  # what the simulator shows; a real device is asked every time


@dataclass(frozen=True, slots=True)
class Point:
    """One named place in a device: read, written, or both.

    `steps` are the worth of one raw step in the quantity's unit: one for all addresses, or one for each.
    """

    name: str
    addresses: tuple[int, ...]
    type: str
    word_count: int
    word_order: WordOrder
    read_fc: int | None  # None: write only
    write_fc: int | None  # None: read only
    steps: tuple[Fraction, ...] = ()
    rounding: Rounding = "nearest"
    snap: int = 1  # counters kept as floats: whole multiples of this are counted
    combine: str = "max"
    sentinels: tuple[int, ...] = ()
    values: Mapping[int | str, Value] = field(default_factory=lambda: MappingProxyType({}))
    bits: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    mask: int = 0  # only these bits of the raw value count; 0: all of them
    exponent: Exponent | None = None
    model: int | None = None  # the SunSpec model that the addresses are offsets into, until `placed`
    mirror: Point | None = None  # where the device shows what it holds, if not in the same place
    low: int | None = None
    high: int | None = None
    zero_stops: bool = True
    on: int = 1
    off: int = 0
    text: bool = False

    # -------------------------------------------------------------- where it is
    @property
    def step(self) -> Fraction | None:
        """The worth of one raw step at the first address; None for what is no quantity."""
        return self.steps[0] if self.steps else None

    @property
    def readable(self) -> bool:
        """True when the device shows what it holds, here or in its mirror."""
        return self.read_fc is not None or self.mirror is not None

    def moved(self, by: Mapping[int, int]) -> Point:
        """The same point `by[function code]` addresses further on."""
        exponent, mirror = self.exponent, self.mirror
        shift = by[self.read_fc or 3]
        return replace(
            self,
            addresses=tuple(at + shift for at in self.addresses),
            exponent=None if exponent is None else replace(exponent, address=exponent.address + shift),
            mirror=None if mirror is None else mirror.moved(by),
        )

    def placed(self, starts: Mapping[int, int]) -> Point:
        """The same point with real addresses, once it is known where each SunSpec model begins."""
        if self.model is None:
            return self
        shift = starts[self.model]
        moved = self.moved({1: 0, 2: 0, 3: shift, 4: shift})
        return replace(moved, model=None, mirror=moved.mirror and replace(moved.mirror, model=None))

    def spans(self) -> dict[int, int]:
        """Address to number of words, of everything that must be read to know the value."""
        found = dict.fromkeys(self.addresses, self.word_count)
        if self.exponent is not None:
            found[self.exponent.address] = 1
        return found

    # -------------------------------------------------------------- what it says
    def value(self, words_by_address: Sequence[Sequence[int]], exponent: int | None = None) -> Value | None:
        """What the words say, in the quantity's unit; None for a sentinel, a NaN, or a value the map does not
        list. `exponent` is the raw word of the exponent's register, if the point has one.
        """
        power = self._power(exponent)
        if power is None:
            return None
        found = [
            self._one(words, self._step_at(at) * power if self.steps else Fraction(1))
            for at, words in enumerate(words_by_address)
        ]
        if len(found) == 1 or self.combine == "first":
            return found[0]
        numbers = [number for number in found if isinstance(number, int)]
        whole = len(numbers) == len(found)
        if self.combine == "difference":
            return numbers[0] - sum(numbers[1:]) if whole else None
        if not numbers or (len(self.steps) > 1 and not whole):
            return None  # a part of a counter is no counter; a phase that is not there is nothing
        return sum(numbers) if self.combine == "sum" else max(numbers, key=abs)

    def resolution(self, words: Sequence[int], exponent: int | None = None) -> int:
        """How fine this very value is, in the quantity's unit, rounded up: a float is coarser the more it
        holds, and an exponent may say thousands.
        """
        power = self._power(exponent)
        kind: WordType = self.type  # type: ignore[assignment] # never asked of a bit
        raw = registers.decode(words, kind, self.word_order)
        if power is None or raw is None or isinstance(raw, str):
            return 0
        grain = registers.float_grain(Fraction(raw), kind) or (Fraction(1) if self._whole else Fraction(0))
        return -int(-abs(grain * self.steps[-1] * power) // 1) if self.steps else 0

    @property
    def _whole(self) -> bool:
        return self.type[0] in "ui"

    def _step_at(self, at: int) -> Fraction:
        return self.steps[at] if len(self.steps) > 1 else self.steps[0]

    def _power(self, word: int | None) -> Fraction | None:
        """Ten to the power that the exponent's register says; None when it says nothing."""
        if self.exponent is None:
            return Fraction(1)
        signed = self.exponent.usual if word is None else (word ^ 0x8000) - 0x8000
        return Fraction(10) ** signed if abs(signed) <= _EXPONENT_MOST else None

    def _one(self, words: Sequence[int], step: Fraction) -> Value | None:
        if self.type == "bit":
            return self.values.get(words[0], bool(words[0]))
        kind: WordType = self.type  # type: ignore[assignment] # checked when the map was read
        if registers.is_sentinel(words, self.sentinels, self.word_order):
            return None
        raw = registers.decode(words, kind, self.word_order)
        if raw is None or isinstance(raw, str):
            return raw if self.text or raw is None else self.values.get(raw)
        if self.mask:
            raw = (int(raw) & self.mask) >> self._mask_shift
        if self.bits:
            whole = int(raw)
            return next((name for bit, name in self.bits.items() if whole >> bit & 1), "")
        if self.values:
            otherwise = f"{_DEVICE_CODE}{int(raw)}" if self.name == "fault" else None
            return self.values.get(int(raw), otherwise)
        if self.text:
            return str(raw)
        if self.snap > 1:
            return self._counted(Fraction(raw), step)
        return registers.to_unit(raw, step, self.rounding)

    def _counted(self, raw: Fraction, step: Fraction) -> int:
        """Whole steps of a counter kept as a float: it only comes near its own steps, so half of the float's
        grain is granted, and no more: what is not fully counted is not there yet. A float coarser than the
        step says the nearest one.
        """
        kind: WordType = self.type  # type: ignore[assignment] # only f32 and f64 are snapped
        granted = min(registers.float_grain(raw, kind) * abs(step), Fraction(self.snap)) / 2
        return int((raw * step + granted) // self.snap) * self.snap

    @property
    def _mask_shift(self) -> int:
        return (self.mask & -self.mask).bit_length() - 1

    # -------------------------------------------------------------- and back
    def words(self, value: Value | NoValue, exponent: int | None = None) -> tuple[int, ...]:
        """The words to write, or to show at the first address, for `value`. Raises EncodeError when it does
        not fit.
        """
        return self._words_at(0, value, exponent)

    def places(self, value: Value | NoValue, phase_count: int = 3) -> list[tuple[int, tuple[int, ...]]]:
        """Everything a device would show for `value`: address and words, the exponent's among them."""
        if self.type != "bit" and self.exponent is not None:
            shown = [(self.exponent.address, (self.exponent.usual & 0xFFFF,))]
        else:
            shown = []
        parts = self._parts(value, phase_count)
        return shown + [
            (address, self._words_at(at, part, None))
            for at, (address, part) in enumerate(zip(self.addresses, parts, strict=True))
        ]

    def _parts(self, value: Value | NoValue, phase_count: int) -> list[Value | NoValue]:
        """What stands at each address: the phases, or the parts of a number kept in pieces."""
        count = len(self.addresses)
        if count == 1 or not isinstance(value, int):
            return [value] * count
        if len(self.steps) > 1:  # from the coarsest piece to the finest, as in a clock
            parts: list[Value | NoValue] = []
            for step in self.steps[:-1]:
                piece = int(value // step * step)
                parts.append(piece)
                value -= piece
            return [*parts, value]
        if self.combine == "difference":
            return [max(value, 0), max(-value, 0), *[0] * (count - 2)]
        if self.name != "current_ma":
            return [value // count] * count if self.combine == "sum" else [value] * count
        # Phases that are not there carry nothing.
        share = value // phase_count if self.combine == "sum" else value
        return [share if at < phase_count else 0 for at in range(count)]

    def _words_at(self, at: int, value: Value | NoValue, exponent: int | None) -> tuple[int, ...]:
        if isinstance(value, NoValue):
            return self._no_value(value)
        raw = self._raw_of(value, at, exponent)
        if self.type == "bit":
            return (int(bool(raw)),)
        if self.mask and not isinstance(raw, str):
            raw = int(raw) << self._mask_shift
        kind: WordType = self.type  # type: ignore[assignment] # checked when the map was read
        return registers.encode(raw, kind, self.word_order, self.word_count)

    def _no_value(self, which: NoValue) -> tuple[int, ...]:
        if which.index < len(self.sentinels):
            return registers.pattern(self.sentinels[which.index], self.word_count, self.word_order)
        if self.type in ("f32", "f64"):
            kind: WordType = "f32" if self.type == "f32" else "f64"
            nan = 0x7FC00000 if kind == "f32" else 0x7FF8 << 48
            return registers.pattern(nan, self.word_count, self.word_order)
        raise registers.EncodeError(f"{self.name}: the map lists no sentinel number {which.index}")

    def _raw_of(self, value: Value, at: int, exponent: int | None) -> int | Fraction | str:
        if self.values:
            for raw, meaning in self.values.items():
                if meaning == value and isinstance(meaning, bool) == isinstance(value, bool):
                    return raw
            if isinstance(value, str) and value.startswith(_DEVICE_CODE):
                return int(value.removeprefix(_DEVICE_CODE))
            raise registers.EncodeError(f"{self.name}: the map has no raw value for {value!r}")
        if self.bits:
            return sum(1 << bit for bit, name in self.bits.items() if name == value)
        if self.text or isinstance(value, str):
            return str(value) if self.type == "ascii" else int(value)
        if not self.steps:
            return int(value)
        power = self._power(exponent)
        if power is None:
            raise registers.EncodeError(f"{self.name}: the device does not say its exponent")
        kind: WordType = self.type  # type: ignore[assignment] # checked when the map was read
        return registers.from_unit(value, self._step_at(at) * power, kind)


@dataclass(frozen=True, slots=True)
class Constant:
    """A fixed value written (and read back, where the device shows it) while arming."""

    point: Point
    value: int


@dataclass(frozen=True, slots=True)
class Expectation:
    """A setting of the device that must be as the map supposes; only looked at, never written."""

    point: Point
    values: tuple[int, ...]  # one of these; empty: any between `least` and `most`
    least: int
    most: int
    remedy: str

    def met_by(self, raw: Value | None) -> bool:
        """True when what the device shows is as the map supposes."""
        if not isinstance(raw, int):
            return False
        return raw in self.values if self.values else self.least <= raw <= self.most

    @property
    def example(self) -> int:
        """A value that meets it, for the simulator."""
        return self.values[0] if self.values else self.least
