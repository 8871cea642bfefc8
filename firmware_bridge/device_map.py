"""The map language: one TOML file says where a device keeps each quantity, in which raw unit, and how it
fails safe.

Rules
* A raw unit is written as a person reads it in the maker's table ("0.1 kWh"), never as a multiplier; it
  becomes an exact fraction of our unit (mWh, W, mA, mV, permille, ms), so no float is ever involved.
* Quantities use the house's words (DESIGN section 7); a device's own words appear in comments only.
* A wrong file is refused as a whole, with *all* its problems: file, line, key, value, and the nearest valid
  key.
* Quirks are named options of this language, not Python. `maps/_blueprint.toml` shows them all and is the one
  to copy.

May not know: the wire, pymodbus, charging, the agent.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from firmware_bridge import registers
from firmware_bridge.charger import MapError
from firmware_bridge.registers import Rounding, WordOrder, WordType

MAPS = Path(__file__).with_name("maps")
_MAP_BYTES_MAX = 65_536  # a map is a page or two; refuse to parse somebody's log file

Confidence = Literal["both", "code", "doc", "conflict", "recall", "simulated"]
FailsafeKind = Literal[
    "register_watchdog",
    "life_bit",
    "reversion_timer",
    "setpoint_validity",
    "heartbeat_token",
    "device_setting",
    "none",
]
FedBy = Literal["any_request", "keep_alive", "set_point"]
Value = int | str | bool

# What one of each written unit is worth in the house's unit for that dimension.
_UNITS: dict[str, dict[str, Fraction]] = {
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
_FAILSAFE: dict[str, str] = {"timeout_ms": "time", "current_ma": "current", "power_w": "power"}
_DEVICE_CODE = "device_code_"  # how a fault is called that the map does not list
_PILOT_STATES = frozenset("ABCDEF")


# ------------------------------------------------------------------ what a file may say (shape only)
class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Address = Annotated[int, Field(ge=0, le=65535)]
_Raw = Annotated[int, Field(ge=0, lt=2**64)]


class _ReadTable(_Strict):
    address: _Address | None = None
    addresses: list[_Address] | None = Field(default=None, min_length=1, max_length=3)  # one per mains phase
    combine: Literal["max", "sum", "first"] = "max"
    type: WordType | Literal["bit"]
    words: int = Field(default=0, ge=0, le=64)  # length of an ascii value
    fc: Literal[1, 2, 3, 4] | None = None
    word_order: WordOrder | None = None
    raw_unit: str | None = None
    sentinels: list[_Raw] = Field(default_factory=list, max_length=16)
    values: dict[str, bool | str] | None = None
    bits: dict[str, str] | None = None


class _WriteTable(_Strict):
    address: _Address
    type: WordType | Literal["bit"]
    fc: Literal[5, 6, 16] | None = None
    read_fc: Literal[1, 3, 4] | None = None
    word_order: WordOrder | None = None
    raw_unit: str | None = None
    range: list[str] | None = Field(default=None, min_length=2, max_length=2)
    zero: Literal["stops", "forbidden"] = "stops"  # what writing 0 does; some DC devices abort the session
    access: Literal["RW", "W"] = "RW"
    on: int | None = None
    off: int | None = None
    value: int | None = None


class _ConstantTable(_Strict):
    address: _Address
    type: WordType = "u16"
    value: int
    fc: Literal[6, 16] | None = None
    access: Literal["RW", "W"] = "RW"


class _WireTable(_Strict):
    kinds: list[Literal["tcp", "rtu", "rtu+tcp"]] = Field(min_length=1)
    device_id: int = Field(ge=0, le=255)
    word_order: WordOrder = "big"
    read_fc: Literal[3, 4] = 3
    write_fc: Literal[6, 16] = 16
    tcp_port: int = Field(default=502, ge=1, le=65535)
    baud: int = Field(default=19200, ge=1200, le=1_000_000)
    parity: Literal["N", "E", "O"] = "N"
    stop_bits: Literal[1, 2] = 1
    gap_ms: int = Field(default=0, ge=0, le=2000)
    request_timeout_ms: int = Field(default=400, ge=50, le=2000)
    turnaround_ms: int = Field(default=500, ge=0, le=5000)
    blocks: Literal["gapless", "across_gaps", "single_value"] = "gapless"
    block_words_max: int = Field(default=64, ge=1, le=125)
    spare_words: int = Field(default=0, ge=0, le=8)
    poll_interval_ms: int = Field(default=200, ge=50, le=5000)


class _FailsafeTable(_Strict):
    kind: FailsafeKind
    zero_fallback: bool = False
    fed_by: FedBy = "any_request"
    confidence: Confidence
    note: str = ""
    timeout_ms: _WriteTable | None = None
    current_ma: _WriteTable | None = None
    power_w: _WriteTable | None = None


class _EnergyTable(_Strict):
    counter: Literal["lifetime", "session", "none"]
    step: str | None = None
    forward: Literal["import", "export"] = "import"
    meter: Literal["built_in", "required"]
    confidence: Confidence
    note: str = ""


class _MapTable(_Strict):
    map_version: Literal[1]
    id: str = Field(pattern=r"^[a-z0-9_]{1,64}$")
    maker: str
    model: str
    kind: Literal["charger", "meter"]
    confidence: Confidence
    sources: list[str] = Field(min_length=1)
    notes: list[str] = Field(default_factory=list)
    wire: _WireTable
    read: dict[str, _ReadTable]
    command: dict[str, _WriteTable] = Field(default_factory=dict)
    prepare: list[_ConstantTable] = Field(default_factory=list, max_length=8)
    failsafe: _FailsafeTable | None = None
    energy: _EnergyTable


# ------------------------------------------------------------------ what the rest of the room works with
@dataclass(frozen=True, slots=True)
class Point:
    """One named place in a device: read, written, or both. `step` is the worth of one raw step in the
    quantity's unit.
    """

    name: str
    addresses: tuple[int, ...]
    type: str
    word_count: int
    word_order: WordOrder
    read_fc: int | None  # None: write only
    write_fc: int | None  # None: read only
    step: Fraction | None = None
    rounding: Rounding = "nearest"
    snap: int = 1  # counters kept as floats: the nearest multiple of this is meant
    combine: str = "max"
    sentinels: tuple[int, ...] = ()
    values: Mapping[int | str, Value] = field(default_factory=lambda: MappingProxyType({}))
    bits: Mapping[int, str] = field(default_factory=lambda: MappingProxyType({}))
    low: int | None = None
    high: int | None = None
    zero_stops: bool = True
    on: int = 1
    off: int = 0
    text: bool = False

    def value(self, words_by_address: Sequence[Sequence[int]]) -> Value | None:
        """What the words say, in the quantity's unit; None for a sentinel, a NaN, or a value the map does not
        list.
        """
        found = [self._one(words) for words in words_by_address]
        if len(found) == 1:
            return found[0]
        numbers = [number for number in found if isinstance(number, int)]
        if not numbers:
            return None
        if self.combine == "first":
            return found[0]
        return sum(numbers) if self.combine == "sum" else max(numbers, key=abs)

    def _one(self, words: Sequence[int]) -> Value | None:
        if self.type == "bit":
            return self.values.get(words[0], bool(words[0]))
        kind: WordType = self.type  # type: ignore[assignment] # checked by _MapTable
        if registers.is_sentinel(words, self.sentinels, self.word_order):
            return None
        raw = registers.decode(words, kind, self.word_order)
        if raw is None or isinstance(raw, str):
            return raw if self.text or raw is None else self.values.get(raw)
        if self.bits:
            whole = int(raw)
            return next((name for bit, name in self.bits.items() if whole >> bit & 1), "")
        if self.values:
            otherwise = f"{_DEVICE_CODE}{int(raw)}" if self.name == "fault" else None
            return self.values.get(int(raw), otherwise)
        if self.text:
            return str(raw)
        whole = registers.to_unit(raw, self.step or Fraction(1), self.rounding)
        # A float only comes near the device's own step; its digits beyond that are noise that would cost a Wh.
        return (whole + self.snap // 2) // self.snap * self.snap if self.snap > 1 else whole

    def words(self, value: Value) -> tuple[int, ...]:
        """The words to write (or, in the simulator, to show) for `value`. Raises EncodeError when it does not
        fit.
        """
        if self.type == "bit":
            return (int(bool(self._raw_of(value))),)
        kind: WordType = self.type  # type: ignore[assignment] # checked by _MapTable
        return registers.encode(self._raw_of(value), kind, self.word_order, self.word_count)

    def _raw_of(self, value: Value) -> int | Fraction | str:
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
        if self.step is None:
            return int(value)
        kind: WordType = self.type  # type: ignore[assignment] # checked by _MapTable
        return registers.from_unit(value, self.step, kind)


@dataclass(frozen=True, slots=True)
class Constant:
    """A fixed value written (and read back, where the device shows it) while arming."""

    point: Point
    value: int


@dataclass(frozen=True, slots=True)
class Failsafe:
    """What the device does by itself when nobody speaks to it any more (BRIDGE rule 7)."""

    kind: FailsafeKind
    zero_fallback: bool
    fed_by: FedBy
    confidence: Confidence
    timeout_ms: Point | None
    fallback: tuple[Point, ...]  # registers that must hold 0 once armed


@dataclass(frozen=True, slots=True)
class Energy:
    """Which counter bills, how fine it is, and whether it needs somebody else's (BRIDGE rules 10 and 11)."""

    counter: Literal["lifetime", "session", "none"]
    step_mwh: int
    forward: Literal["import", "export"]
    meter_required: bool
    confidence: Confidence


@dataclass(frozen=True, slots=True)
class WireDefaults:
    """How one speaks to the device unless the configuration says otherwise. Times in ms."""

    kinds: tuple[str, ...]
    device_id: int
    tcp_port: int
    baud: int
    parity: str
    stop_bits: int
    gap_ms: int
    request_timeout_ms: int
    turnaround_ms: int
    blocks: str
    block_words_max: int
    spare_words: int
    poll_interval_ms: int


@dataclass(frozen=True, slots=True)
class DeviceMap:
    """One device, loaded and checked."""

    id: str
    maker: str
    model: str
    kind: Literal["charger", "meter"]
    confidence: Confidence
    sources: tuple[str, ...]
    wire: WireDefaults
    reads: Mapping[str, Point]
    commands: Mapping[str, Point]
    prepare: tuple[Constant, ...]
    failsafe: Failsafe | None
    energy: Energy

    @property
    def trusted(self) -> bool:
        """True when the map may sell at once: failsafe and energy both confirmed twice (BRIDGE rule 9)."""
        proven = ("both", "simulated")
        failsafe_proven = self.failsafe is None or self.failsafe.confidence in proven
        return failsafe_proven and self.energy.confidence in proven

    def counter(self, direction: str) -> Point | None:
        """The register that grows while energy flows from provider to consumer; `direction` matters for
        meters only.
        """
        return self.reads.get("register_mwh") or self.reads.get(f"register_{direction}_mwh")


# ------------------------------------------------------------------ loading
def map_names() -> list[str]:
    """Names of the maps that come with the bridge."""
    return sorted(path.stem for path in MAPS.glob("*.toml") if not path.stem.startswith("_"))


def load_map(name_or_path: str | Path) -> DeviceMap:
    """The map of this name, or in this file. Raises MapError naming every problem in it."""
    path = Path(name_or_path)
    if path.suffix != ".toml":
        path = MAPS / f"{name_or_path}.toml"
        if not path.is_file():
            raise MapError(_no_such_map(str(name_or_path)))
    try:
        if path.stat().st_size > _MAP_BYTES_MAX:
            raise MapError(f"{path.name}: larger than {_MAP_BYTES_MAX} bytes; this is not a device map")
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise MapError(f"{path}: cannot read the device map: {exc.strerror}") from exc
    return parse_map(text, path.name)


def _no_such_map(name: str) -> str:
    near = difflib.get_close_matches(name, map_names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no device map {name!r}; {hint}known: {', '.join(map_names())}; or give the path of a .toml file"


def parse_map(text: str, file_name: str) -> DeviceMap:
    """Check and compile a map's text; `file_name` is for the messages, and its stem must be the map's id."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise MapError(f"{file_name}: not valid TOML: {exc}") from exc
    problems = _Problems(file_name, text, data)
    try:
        table = _MapTable.model_validate(data)
    except ValidationError as exc:
        problems.add_schema(exc)
        raise MapError(problems.message()) from exc
    compiled = _Compiler(table, problems).compile()
    stem = Path(file_name).stem
    if table.id != stem and not stem.startswith("_"):
        problems.add(("id",), f"the file must be called {table.id}.toml")
    if problems.found:
        raise MapError(problems.message())
    return compiled


class _Problems:
    """Collects what is wrong, each with its line in the file."""

    def __init__(self, file_name: str, text: str, data: dict[str, Any]) -> None:
        self.file_name = file_name
        self.lines = _line_index(text)
        self.data = data
        self.found: list[str] = []

    def add(self, key: Iterable[str | int], what: str) -> None:
        path = tuple(str(part) for part in key)
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 1)
        value: Any = self.data
        for part in path:
            value = _descend(value, part)
        shown = f" = {value!r}" if isinstance(value, str | int | float | bool) else ""
        self.found.append(f"{self.file_name}:{line}: {'.'.join(path)}{shown}: {what}")

    def add_schema(self, error: ValidationError) -> None:
        for item in error.errors(include_url=False, include_context=False):
            # A union adds its members' names to the location; the file's own keys end where the data ends.
            path = _real_path(self.data, item["loc"], keep_last=item["type"] == "missing")
            if item["type"] == "extra_forbidden":
                self.add(path, f"unknown key{_nearest(path)}")
            elif item["type"] == "missing":
                self.add(path, "is missing")
            else:
                self.add(path, item["msg"][0].lower() + item["msg"][1:])

    def message(self) -> str:
        unique = list(dict.fromkeys(self.found))
        return "\n".join(unique)


def _descend(value: Any, part: str) -> Any:
    if isinstance(value, dict):
        return value.get(part)
    if isinstance(value, list) and part.isdigit() and int(part) < len(value):
        return value[int(part)]
    return None


def _real_path(data: Any, loc: tuple[int | str, ...], *, keep_last: bool) -> tuple[str, ...]:
    path: list[str] = []
    here = data
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        known = (isinstance(here, dict) and part in here) or (
            isinstance(here, list) and isinstance(part, int)
        )
        if not known and not (keep_last and last):
            break
        path.append(str(part))
        here = _descend(here, str(part))
    return tuple(path)


_TABLES: dict[str, type[BaseModel]] = {
    "wire": _WireTable,
    "failsafe": _FailsafeTable,
    "energy": _EnergyTable,
    "read": _ReadTable,
    "command": _WriteTable,
    "prepare": _ConstantTable,
}


def _nearest(path: tuple[str, ...]) -> str:
    model: type[BaseModel] = _MapTable
    if len(path) > 1:
        model = _TABLES.get(path[0], _MapTable)
        if path[0] == "failsafe" and len(path) > 2:
            model = _WriteTable
    near = difflib.get_close_matches(path[-1], list(model.model_fields), n=1, cutoff=0.4)
    return f"; nearest valid key: {near[0]}" if near else f"; valid keys: {', '.join(model.model_fields)}"


_TABLE_LINE = re.compile(r"^\s*(\[\[?)\s*([A-Za-z0-9_.\-]+)\s*\]\]?")
_KEY_LINE = re.compile(r"^\s*([A-Za-z0-9_\-]+)\s*=")


def _line_index(text: str) -> dict[tuple[str, ...], int]:
    """Line number of every table and key; TOML's own reader does not keep them."""
    lines: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    repeats: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if found := _TABLE_LINE.match(line):
            table = tuple(found.group(2).split("."))
            if found.group(1) == "[[":
                index = repeats.get(table, -1) + 1
                repeats[table] = index
                table = (*table, str(index))
            lines[table] = number
        elif found := _KEY_LINE.match(line):
            lines.setdefault((*table, found.group(1)), number)
    return lines


# ------------------------------------------------------------------ from shape to meaning
_AMOUNT = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z%]+)\s*$")


def _amount(text: str, dimension: str) -> Fraction | str:
    """`"0.1 kWh"` in the house's unit of `dimension`, or a sentence saying what is wrong with it."""
    units = _UNITS[dimension]
    found = _AMOUNT.match(text)
    if not found:
        return f'write a number and a unit, such as "1 {next(iter(units))}"'
    number, unit = found.groups()
    if unit not in units:
        return f"{unit!r} is no unit of {dimension}; use one of: {', '.join(units)}"
    worth = Fraction(number) * units[unit]
    return worth if worth > 0 or Fraction(number) == 0 else "must be more than nothing"


class _Compiler:
    """Turns a well-shaped table into a DeviceMap, collecting everything that makes no sense."""

    def __init__(self, table: _MapTable, problems: _Problems) -> None:
        self.table = table
        self.problems = problems

    def compile(self) -> DeviceMap:
        table = self.table
        reads = {
            name: self._read(name, entry) for name, entry in table.read.items() if self._known("read", name)
        }
        commands = {
            name: self._write(("command", name), COMMANDS[name], entry)
            for name, entry in table.command.items()
            if self._known("command", name)
        }
        self._check_kind(reads, commands)
        return DeviceMap(
            id=table.id,
            maker=table.maker,
            model=table.model,
            kind=table.kind,
            confidence=table.confidence,
            sources=tuple(table.sources),
            wire=self._wire(),
            reads=MappingProxyType(reads),
            commands=MappingProxyType(commands),
            prepare=tuple(self._constant(index, entry) for index, entry in enumerate(table.prepare)),
            failsafe=self._failsafe(),
            energy=self._energy(reads),
        )

    def _known(self, section: str, name: str) -> bool:
        known = READS if section == "read" else COMMANDS
        if name in known:
            return True
        near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
        self.problems.add(
            (section, name), f"unknown quantity; nearest: {near[0] if near else ', '.join(known)}"
        )
        return False

    def _wire(self) -> WireDefaults:
        wire = self.table.wire.model_dump(exclude={"kinds", "word_order", "read_fc", "write_fc"})
        return WireDefaults(kinds=tuple(self.table.wire.kinds), **wire)

    def _step(self, key: tuple[str, ...], dimension: str, raw_unit: str | None) -> Fraction | None:
        if dimension not in _UNITS:
            if raw_unit is not None:
                self.problems.add((*key, "raw_unit"), "this quantity has no unit; use values or bits")
            return None
        if raw_unit is None:
            self.problems.add(
                key,
                f'raw_unit is missing: what is one raw step worth, such as "1 {[*_UNITS[dimension]][-1]}"?',
            )
            return Fraction(1)
        step = _amount(raw_unit, dimension)
        if isinstance(step, str) or step == 0:
            self.problems.add(
                (*key, "raw_unit"), step if isinstance(step, str) else "must be more than nothing"
            )
            return Fraction(1)
        return step

    def _counter_step(self) -> int:
        step = _amount(self.table.energy.step or "1 mWh", "energy")
        return 1 if isinstance(step, str) else max(1, int(step))

    def _read(self, name: str, entry: _ReadTable) -> Point:
        key = ("read", name)
        dimension = READS[name]
        if (entry.address is None) == (entry.addresses is None):
            self.problems.add(key, "give address, or addresses (one per mains phase)")
        if entry.type == "ascii" and not entry.words:
            self.problems.add(key, "an ascii value needs its length: words = N")
        fc = entry.fc or (1 if entry.type == "bit" else self.table.wire.read_fc)
        if (entry.type == "bit") != (fc in (1, 2)):
            self.problems.add(key, f"function code {fc} does not carry {entry.type}")
        address = (entry.address,) if entry.address is not None else tuple(entry.addresses or (0,))
        return Point(
            name=name,
            addresses=address,
            type=entry.type,
            word_count=registers.WORD_COUNT.get(entry.type, 1) or entry.words,
            word_order=entry.word_order or self.table.wire.word_order,
            read_fc=fc,
            write_fc=None,
            step=self._step(key, dimension, entry.raw_unit),
            rounding="floor" if dimension == "energy" else "nearest",
            snap=self._counter_step() if dimension == "energy" and entry.type in ("f32", "f64") else 1,
            combine=entry.combine,
            sentinels=tuple(entry.sentinels),
            values=self._values(key, dimension, entry),
            bits=self._bits(key, dimension, entry),
            text=dimension == "text",
        )

    def _values(self, key: tuple[str, ...], dimension: str, entry: _ReadTable) -> Mapping[int | str, Value]:
        if dimension not in ("pilot", "flag", "fault"):
            if entry.values:
                self.problems.add((*key, "values"), "only states have values; a number has a raw_unit")
            return MappingProxyType({})
        listed = entry.values or ({"0": False, "1": True} if dimension == "flag" else {})
        if not listed and not entry.bits:
            self.problems.add(key, "values is missing: what does each raw value mean?")
        values: dict[int | str, Value] = {}
        for raw, meaning in listed.items():
            if dimension == "pilot" and meaning not in _PILOT_STATES:
                self.problems.add((*key, "values"), f"{meaning!r} is no pilot state; use A to F (IEC 61851)")
            if isinstance(meaning, bool) != (dimension == "flag"):
                self.problems.add(
                    (*key, "values"),
                    f"{meaning!r} should be {'true or false' if dimension == 'flag' else 'a word'}",
                )
            if entry.type == "ascii":
                values[raw] = meaning
                continue
            try:
                values[int(raw, 0)] = meaning
            except ValueError:
                self.problems.add((*key, "values"), f"raw value {raw!r} is no whole number")
        return MappingProxyType(values)

    def _bits(self, key: tuple[str, ...], dimension: str, entry: _ReadTable) -> Mapping[int, str]:
        if not entry.bits:
            return MappingProxyType({})
        if dimension != "fault":
            self.problems.add((*key, "bits"), "only fault is made of bits")
        if not all(bit.isdigit() and int(bit) < 64 for bit in entry.bits):
            self.problems.add((*key, "bits"), "bits are numbered 0 (lowest) to 63")
            return MappingProxyType({})
        return MappingProxyType(
            {int(bit): name for bit, name in sorted(entry.bits.items(), key=lambda item: int(item[0]))}
        )

    def _write(self, key: tuple[str, ...], dimension: str, entry: _WriteTable) -> Point:
        fc = entry.fc or (5 if entry.type == "bit" else self.table.wire.write_fc)
        word_count = registers.WORD_COUNT.get(entry.type, 1)
        if entry.type == "ascii" or (fc == 6 and word_count > 1) or (entry.type == "bit") != (fc == 5):
            self.problems.add(key, f"function code {fc} cannot write {entry.type}")
        low, high = self._range(key, dimension, entry)
        if dimension == "switch" and (entry.on is None or entry.off is None):
            self.problems.add(key, "a switch needs the raw values of on and off")
        if dimension == "token" and entry.value is None:
            self.problems.add(key, "a keep-alive needs the raw value to write")
        read_fc = entry.read_fc or (1 if entry.type == "bit" else self.table.wire.read_fc)
        return Point(
            name=key[-1],
            addresses=(entry.address,),
            type=entry.type,
            word_count=word_count,
            word_order=entry.word_order or self.table.wire.word_order,
            read_fc=read_fc if entry.access == "RW" else None,
            write_fc=fc,
            step=self._step(key, dimension, entry.raw_unit),
            low=low,
            high=high,
            zero_stops=entry.zero == "stops",
            on=entry.value if dimension == "token" and entry.value is not None else entry.on or 0,
            off=entry.off or 0,
        )

    def _range(
        self, key: tuple[str, ...], dimension: str, entry: _WriteTable
    ) -> tuple[int | None, int | None]:
        if entry.range is None:
            if dimension in _UNITS and key[0] == "command":
                self.problems.add(
                    key, 'range is missing: the least and most it takes besides 0, such as ["6 A", "32 A"]'
                )
            return None, None
        if dimension not in _UNITS:
            self.problems.add((*key, "range"), "only a quantity has a range")
            return None, None
        ends = [_amount(end, dimension) for end in entry.range]
        for end in ends:
            if isinstance(end, str):
                self.problems.add((*key, "range"), end)
        low, high = (int(end) if isinstance(end, Fraction) else 0 for end in ends)
        if low > high:
            self.problems.add((*key, "range"), "the least is more than the most")
        return low, high

    def _constant(self, index: int, entry: _ConstantTable) -> Constant:
        as_write = _WriteTable(
            address=entry.address, type=entry.type, fc=entry.fc, access=entry.access, value=entry.value
        )
        return Constant(self._write(("prepare", str(index)), "token", as_write), entry.value)

    def _failsafe(self) -> Failsafe | None:
        table = self.table.failsafe
        if table is None:
            return None
        points = {
            name: self._write(("failsafe", name), dimension, entry)
            for name, dimension in _FAILSAFE.items()
            if isinstance(entry := getattr(table, name), _WriteTable)
        }
        armed_by_us = table.kind in ("register_watchdog", "life_bit", "reversion_timer")
        if armed_by_us and "timeout_ms" not in points:
            self.problems.add(
                ("failsafe",), f"a {table.kind} needs the register of its timeout: [failsafe.timeout_ms]"
            )
        fallback = tuple(points[name] for name in ("current_ma", "power_w") if name in points)
        if table.fed_by == "keep_alive" and "keep_alive" not in self.table.command:
            self.problems.add(("failsafe", "fed_by"), "needs [command.keep_alive]")
        if table.kind == "none" and table.zero_fallback:
            self.problems.add(
                ("failsafe", "zero_fallback"), "a device without a failsafe cannot fall back to 0 A"
            )
        return Failsafe(
            table.kind,
            table.zero_fallback,
            table.fed_by,
            table.confidence,
            points.get("timeout_ms"),
            fallback,
        )

    def _energy(self, reads: Mapping[str, Point]) -> Energy:
        table = self.table.energy
        built_in = table.meter == "built_in"
        if built_in != (table.counter == "lifetime"):
            self.problems.add(
                ("energy", "meter"), "only a lifetime counter bills; without one, meter must be required"
            )
        counters = [name for name in reads if name.startswith("register_")]
        if built_in and not counters:
            self.problems.add(("energy", "counter"), "no register_mwh (or register_import_mwh) is mapped")
        step = _amount(table.step, "energy") if table.step is not None else Fraction(0)
        if isinstance(step, str) or (built_in and step < 1):
            self.problems.add(
                ("energy", "step"), step if isinstance(step, str) else "say how fine the counter is"
            )
            step = Fraction(1)
        return Energy(table.counter, int(step), table.forward, not built_in, table.confidence)

    def _check_kind(self, reads: Mapping[str, Point], commands: Mapping[str, Point]) -> None:
        if self.table.kind == "meter":
            if commands or self.table.failsafe or self.table.prepare:
                self.problems.add(("kind",), "a meter takes no commands and has no failsafe")
            return
        if "pilot_state" not in reads:
            self.problems.add(("read",), "a charger must show pilot_state")
        if not {"set_current_ma", "set_power_w"} & set(commands):
            self.problems.add(("command",), "a charger must take set_current_ma or set_power_w")
        if self.table.failsafe is None:
            self.problems.add(("kind",), 'a charger needs [failsafe]; write kind = "none" where it has none')
        limit = commands.get("set_current_ma") or commands.get("set_power_w")
        if limit and not limit.zero_stops and "enable" not in commands:
            self.problems.add(
                ("command",), "nothing here can stop the device: neither a limit of 0 nor enable"
            )
