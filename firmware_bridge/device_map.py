"""One device, loaded and checked: where it keeps each quantity, what it takes, and how it fails safe.

Rules
* A raw unit is written as a person reads it in the maker's table ("0.1 kWh"), never as a multiplier; it
  becomes an exact fraction of our unit (mWh, W, mA, mV, permille, ms), so no float is ever involved.
* Quantities use the house's words (DESIGN section 7); a device's own words appear in comments only.
* A wrong file is refused as a whole, with *all* its problems: file, line, key, value, and the nearest valid
  key.
* Quirks are named options of the map language (`map_file.py`), not Python. `maps/_blueprint.toml` shows them
  all and is the one to copy.
* A map says how well it is founded, and so what must be proven before anything is sold by it (BRIDGE rule 9).

May not know: the wire, pymodbus, charging, the agent.
"""

from __future__ import annotations

import difflib
import hashlib
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from firmware_bridge import registers
from firmware_bridge.charger import MapError
from firmware_bridge.map_file import (
    Confidence,
    ConstantTable,
    ExpectTable,
    FailsafeKind,
    FedBy,
    MapTable,
    Problems,
    ReadTable,
    ShownTable,
    WriteTable,
)
from firmware_bridge.point import (
    COMMANDS,
    PILOT_STATES,
    READS,
    UNITS,
    Constant,
    Expectation,
    Exponent,
    NoValue,
    Point,
    Value,
    amount,
)

__all__ = [
    "COMMANDS",
    "MAPS",
    "PROOFS",
    "READS",
    "Constant",
    "DeviceMap",
    "Energy",
    "Expectation",
    "Failsafe",
    "NoValue",
    "Point",
    "Proof",
    "Sunspec",
    "Value",
    "WireDefaults",
    "load_map",
    "map_names",
    "parse_map",
]

MAPS = Path(__file__).with_name("maps")
_MAP_BYTES_MAX = 65_536  # a map is a page or two; refuse to parse somebody's log file

Proof = Literal["failsafe", "energy"]
PROOFS: tuple[Proof, ...] = ("failsafe", "energy")
_CONFIRMED = ("both", "simulated")

_FAILSAFE: dict[str, str] = {
    "timeout_ms": "time",
    "current_ma": "current",
    "current_ma_single_phase": "current",
    "power_w": "power",
}


@dataclass(frozen=True, slots=True)
class Failsafe:
    """What the device does by itself when nobody speaks to it any more (BRIDGE rule 7)."""

    kind: FailsafeKind
    zero_fallback: (
        bool  # it is set to 0 A and relied on: it can fall back to that, or shall prove that it can
    )
    zero_unproven: bool  # the sources leave open whether it can: only a commissioning test can tell
    own_timer: bool  # the time is the device's own; it cannot be set from here
    fed_by: FedBy
    confidence: Confidence
    timeout_ms: Point | None
    fallback: tuple[Point, ...]  # registers that must hold 0 once armed
    note: str = ""

    @property
    def confirmed(self) -> bool:
        """True when document and driver agree that it stops; else commissioning must show it by silence."""
        return self.zero_fallback and not self.zero_unproven and self.confidence in _CONFIRMED

    @property
    def points(self) -> tuple[Point, ...]:
        """Every register of it."""
        return self.fallback if self.timeout_ms is None else (self.timeout_ms, *self.fallback)


@dataclass(frozen=True, slots=True)
class Energy:
    """Which counter bills, how fine it is, and whether it needs somebody else's (BRIDGE rules 10 and 11)."""

    counter: Literal["lifetime", "session", "none"]
    step_mwh: int
    forward: Literal["import", "export"]
    meter_required: bool
    confidence: Confidence
    note: str = ""


@dataclass(frozen=True, slots=True)
class Sunspec:
    """Where the list of models may begin, and how long each model is usually (the device tells its own)."""

    base_addresses: tuple[int, ...]
    model_words: Mapping[int, int]


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
    """One device, loaded and checked. `digest` (SHA-256) names this very text: a proof is worth nothing for
    another.
    """

    id: str
    maker: str
    model: str
    kind: Literal["charger", "meter"]
    confidence: Confidence
    sources: tuple[str, ...]
    notes: tuple[str, ...]
    wire: WireDefaults
    reads: Mapping[str, Point]
    commands: Mapping[str, Point]
    expected: tuple[Expectation, ...]
    prepare: tuple[Constant, ...]
    failsafe: Failsafe | None
    energy: Energy
    connector_count: int = 1
    connector: int = 1
    connector_strides: tuple[int, int] = (0, 0)  # of input registers and bits, and of holding registers
    sunspec: Sunspec | None = None
    digest: str = ""

    @property
    def unproven(self) -> tuple[Proof, ...]:
        """What a recorded commissioning test must show before this device may sell (BRIDGE rule 9)."""
        found: list[Proof] = []
        failsafe = self.failsafe
        if failsafe is not None and not failsafe.confirmed:
            found.append("failsafe")
        if not self.energy.meter_required and self.energy.confidence not in _CONFIRMED:
            found.append("energy")
        return tuple(found)

    @property
    def trusted(self) -> bool:
        """True when the map may sell at once: failsafe and energy both confirmed twice (BRIDGE rule 9)."""
        return not self.unproven

    def counter(self, direction: str) -> Point | None:
        """The register that grows while energy flows from provider to consumer; `direction` matters for
        meters only.
        """
        return self.reads.get("register_mwh") or self.reads.get(f"register_{direction}_mwh")

    def at_connector(self, number: int) -> DeviceMap:
        """The map of the first charging point, for another one of the same station."""
        assert self.connector == 1 <= number <= self.connector_count
        shift, holding = ((number - 1) * stride for stride in self.connector_strides)
        moved = self.with_points(lambda point: point.moved({1: shift, 2: shift, 3: holding, 4: shift}))
        return replace(moved, connector=number)

    def placed(self, starts: Mapping[int, int]) -> DeviceMap:
        """The same map with real addresses, once it is known where each SunSpec model begins."""
        return self.with_points(lambda point: point.placed(starts))

    def with_points(self, change: Callable[[Point], Point]) -> DeviceMap:
        """The same map with every point changed."""
        failsafe = self.failsafe
        if failsafe is not None:
            timeout = failsafe.timeout_ms
            failsafe = replace(
                failsafe,
                timeout_ms=None if timeout is None else change(timeout),
                fallback=tuple(change(point) for point in failsafe.fallback),
            )
        return replace(
            self,
            reads=MappingProxyType({name: change(point) for name, point in self.reads.items()}),
            commands=MappingProxyType({name: change(point) for name, point in self.commands.items()}),
            expected=tuple(replace(item, point=change(item.point)) for item in self.expected),
            prepare=tuple(replace(item, point=change(item.point)) for item in self.prepare),
            failsafe=failsafe,
        )


# ------------------------------------------------------------------ loading
def map_names() -> list[str]:
    """Names of the maps that come with the bridge."""
    return sorted(path.stem for path in MAPS.glob("*.toml") if not path.stem.startswith("_"))


def load_map(name_or_path: str | Path) -> DeviceMap:
    """The map of this name, or in this file; `NAME#2` is the second charging point of a station.

    Raises MapError naming every problem in it.
    """
    name, _, connector = str(name_or_path).partition("#")
    if connector and not connector.isdigit():
        raise MapError(f"{name_or_path}: after # comes the number of a connector, such as {name}#2")
    path = Path(name)
    if path.suffix != ".toml":
        path = MAPS / f"{name}.toml"
        if not path.is_file():
            raise MapError(_no_such_map(name))
    try:
        if path.stat().st_size > _MAP_BYTES_MAX:
            raise MapError(f"{path.name}: larger than {_MAP_BYTES_MAX} bytes; this is not a device map")
        text = path.read_text(encoding="utf-8")
    except OSError as exc:
        raise MapError(f"{path}: cannot read the device map: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise MapError(
            f"{path.name}: not text in UTF-8 (byte {exc.start}); this is not a device map"
        ) from exc
    return parse_map(text, path.name, int(connector or 1))


def _no_such_map(name: str) -> str:
    near = difflib.get_close_matches(name, map_names(), n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"no device map {name!r}; {hint}known: {', '.join(map_names())}; or give the path of a .toml file"


def parse_map(text: str, file_name: str, connector: int = 1) -> DeviceMap:
    """Check and compile a map's text; `file_name` is for the messages, and its stem must be the map's id."""
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise MapError(f"{file_name}: not valid TOML: {exc}") from exc
    problems = Problems(file_name, text, data)
    table = problems.shape()
    _check_words(problems)
    if table is None:
        raise MapError(problems.message())
    compiler = _Compiler(table, problems)
    stem = Path(file_name).stem
    if table.id != stem and not stem.startswith("_"):
        problems.add(("id",), f"the file must be called {table.id}.toml")
    compiled = compiler.compile(connector)
    if problems.found:
        raise MapError(problems.message())
    return replace(compiled, digest=hashlib.sha256(text.encode()).hexdigest())


def _check_words(problems: Problems) -> None:
    """Names of quantities and units, also of entries that have no shape: nobody should have to mend a file twice."""
    for section, known in (("read", READS), ("command", COMMANDS)):
        entries = problems.data.get(section)
        for name, entry in entries.items() if isinstance(entries, dict) else ():
            if name not in known:
                near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.4)
                problems.add(
                    (section, name), f"unknown quantity; nearest: {near[0] if near else ', '.join(known)}"
                )
            elif isinstance(entry, dict) and known[name] in UNITS and isinstance(entry.get("raw_unit"), str):
                worth = amount(entry["raw_unit"], known[name])
                if isinstance(worth, str):
                    problems.add((section, name, "raw_unit"), worth)


class _Compiler:
    """Turns a well-shaped table into a DeviceMap, collecting everything that makes no sense."""

    def __init__(self, table: MapTable, problems: Problems) -> None:
        self.table = table
        self.problems = problems

    def compile(self, connector: int) -> DeviceMap:
        """The device, at this connector; half of one where `problems` has found something."""
        table = self.table
        reads = {name: self._read(name, entry) for name, entry in table.read.items() if name in READS}
        commands = {
            name: self._write(("command", name), COMMANDS[name], entry)
            for name, entry in table.command.items()
            if name in COMMANDS
        }
        self._check_kind()
        found = DeviceMap(
            id=table.id,
            maker=table.maker,
            model=table.model,
            kind=table.kind,
            confidence=table.confidence,
            sources=tuple(table.sources),
            notes=tuple(table.notes),
            wire=self._wire(),
            reads=MappingProxyType(reads),
            commands=MappingProxyType(commands),
            expected=tuple(self._expectation(index, entry) for index, entry in enumerate(table.expect)),
            prepare=tuple(self._constant(index, entry) for index, entry in enumerate(table.prepare)),
            failsafe=self._failsafe(),
            energy=self._energy(),
            connector_count=table.connectors.count if table.connectors else 1,
            connector_strides=self._strides(),
            sunspec=self._sunspec(),
        )
        return self._at_connector(found, connector)

    def _at_connector(self, device_map: DeviceMap, number: int) -> DeviceMap:
        count = device_map.connector_count
        if not 1 <= number <= count:
            has = f"1 to {count}" if count > 1 else "only one, so leave the # away"
            self.problems.add(("connectors",), f"there is no connector {number}; this device has {has}")
            return device_map
        return device_map if number == 1 else device_map.at_connector(number)

    def _strides(self) -> tuple[int, int]:
        table = self.table.connectors
        return (0, 0) if table is None else (table.stride, table.holding_stride or table.stride)

    def _sunspec(self) -> Sunspec | None:
        table = self.table.sunspec
        if table is None:
            return None
        wrong = [name for name in table.model_words if not name.isdigit()]
        if wrong:
            self.problems.add(("sunspec", "model_words"), f"{wrong[0]!r} is no model number")
        words = {int(name): words for name, words in table.model_words.items() if name.isdigit()}
        return Sunspec(tuple(table.base_addresses), MappingProxyType(words))

    def _check_model(self, key: tuple[str, ...], model: int | None) -> None:
        known = self.table.sunspec.model_words if self.table.sunspec else {}
        if model is not None and str(model) not in known:
            self.problems.add((*key, "model"), "is not among sunspec.model_words")

    def _exponent(
        self, key: tuple[str, ...], dimension: str, entry: ReadTable | WriteTable
    ) -> Exponent | None:
        if entry.exponent is None:
            return None
        if dimension not in UNITS:
            self.problems.add((*key, "exponent"), "only a quantity has an exponent")
        return Exponent(entry.exponent.address, entry.exponent.usual)

    def _wire(self) -> WireDefaults:
        wire = self.table.wire.model_dump(exclude={"kinds", "word_order", "read_fc", "write_fc"})
        return WireDefaults(kinds=tuple(self.table.wire.kinds), **wire)

    def _steps(
        self, key: tuple[str, ...], dimension: str, entry: ReadTable | WriteTable | ShownTable
    ) -> tuple[Fraction, ...]:
        """The worth of one raw step: one for all addresses, or one for each."""
        raw_unit = entry.raw_unit
        if not isinstance(raw_unit, list):
            step = self._step(key, dimension, raw_unit)
            return () if step is None else (step,)
        places = len(entry.addresses or ()) if isinstance(entry, ReadTable) else 1
        steps = [self._step(key, dimension, unit) for unit in raw_unit]
        known = tuple(step for step in steps if step is not None)
        if len(raw_unit) != places or sorted(known, reverse=True) != list(known):
            self.problems.add((*key, "raw_unit"), "as a list: one for each of addresses, the coarsest first")
        elif entry.combine != "sum":  # type: ignore[union-attr] # a list is a ReadTable's only
            self.problems.add((*key, "combine"), 'pieces of one number are added: combine = "sum"')
        return known

    def _step(self, key: tuple[str, ...], dimension: str, raw_unit: str | None) -> Fraction | None:
        if dimension not in UNITS:
            if raw_unit is not None:
                self.problems.add((*key, "raw_unit"), "this quantity has no unit; use values or bits")
            return None
        if raw_unit is None:
            self.problems.add(
                key,
                f'raw_unit is missing: what is one raw step worth, such as "1 {[*UNITS[dimension]][-1]}"?',
            )
            return Fraction(1)
        step = amount(raw_unit, dimension)
        if isinstance(step, str) or step == 0:
            self.problems.add(
                (*key, "raw_unit"), step if isinstance(step, str) else "must be more than nothing"
            )
            return Fraction(1)
        return step

    def _counter_step(self) -> int:
        step = amount(self.table.energy.step or "1 mWh", "energy")
        return 1 if isinstance(step, str) else max(1, int(step))

    def _read(self, name: str, entry: ReadTable) -> Point:
        key = ("read", name)
        dimension = READS[name]
        if (entry.address is None) == (entry.addresses is None):
            self.problems.add(key, "give address, or addresses (one per mains phase)")
        if entry.type == "ascii" and not entry.words:
            self.problems.add(key, "an ascii value needs its length: words = N")
        fc = entry.fc or (1 if entry.type == "bit" else self.table.wire.read_fc)
        if (entry.type == "bit") != (fc in (1, 2)):
            self.problems.add(key, f"function code {fc} does not carry {entry.type}")
        if entry.mask and entry.type[0] != "u":
            self.problems.add((*key, "mask"), "only an unsigned number has bits to choose from")
        self._check_model(key, entry.model)
        address = (entry.address,) if entry.address is not None else tuple(entry.addresses or (0,))
        return Point(
            name=name,
            addresses=address,
            type=entry.type,
            word_count=registers.WORD_COUNT.get(entry.type, 1) or entry.words,
            word_order=entry.word_order or self.table.wire.word_order,
            read_fc=fc,
            write_fc=None,
            steps=self._steps(key, dimension, entry),
            rounding="floor" if dimension == "energy" else "nearest",
            snap=self._counter_step() if dimension == "energy" and entry.type in ("f32", "f64") else 1,
            combine=entry.combine,
            sentinels=tuple(entry.sentinels),
            values=self._values(key, dimension, entry),
            bits=self._bits(key, dimension, entry),
            mask=entry.mask,
            exponent=self._exponent(key, dimension, entry),
            model=entry.model,
            text=dimension == "text",
        )

    def _values(self, key: tuple[str, ...], dimension: str, entry: ReadTable) -> Mapping[int | str, Value]:
        if dimension not in ("pilot", "flag", "fault"):
            if entry.values:
                self.problems.add((*key, "values"), "only states have values; a number has a raw_unit")
            return MappingProxyType({})
        listed = entry.values or ({"0": False, "1": True} if dimension == "flag" else {})
        if not listed and not entry.bits:
            self.problems.add(key, "values is missing: what does each raw value mean?")
        values: dict[int | str, Value] = {}
        for raw, meaning in listed.items():
            if dimension == "pilot" and meaning not in PILOT_STATES:
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

    def _bits(self, key: tuple[str, ...], dimension: str, entry: ReadTable) -> Mapping[int, str]:
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

    def _write(self, key: tuple[str, ...], dimension: str, entry: WriteTable) -> Point:
        fc = entry.fc or (5 if entry.type == "bit" else self.table.wire.write_fc)
        word_count = registers.WORD_COUNT.get(entry.type, 1)
        if entry.type == "ascii" or (fc == 6 and word_count > 1) or (entry.type == "bit") != (fc == 5):
            self.problems.add(key, f"function code {fc} cannot write {entry.type}")
        low, high = self._range(key, dimension, entry)
        if dimension == "switch" and (entry.on is None or entry.off is None):
            self.problems.add(key, "a switch needs the raw values of on and off")
        if dimension == "token" and entry.value is None:
            self.problems.add(key, "a keep-alive needs the raw value to write")
        if entry.access == "R" and key[0] != "failsafe":
            self.problems.add((*key, "access"), "a command is written; only a failsafe may be looked at only")
        self._check_model(key, entry.model)
        # What can be written is a coil or a holding register, whatever most values are read with.
        read_fc = entry.read_fc or (1 if entry.type == "bit" else 3)
        return Point(
            name=key[-1],
            addresses=(entry.address,),
            type=entry.type,
            word_count=word_count,
            word_order=entry.word_order or self.table.wire.word_order,
            read_fc=read_fc if entry.access != "W" and entry.shown_at is None else None,
            write_fc=fc if entry.access != "R" else None,
            steps=self._steps(key, dimension, entry),
            exponent=self._exponent(key, dimension, entry),
            model=entry.model,
            mirror=self._mirror(key, dimension, entry),
            low=low,
            high=high,
            zero_stops=entry.zero == "stops",
            on=entry.value if dimension == "token" and entry.value is not None else entry.on or 0,
            off=entry.off or 0,
        )

    def _mirror(self, key: tuple[str, ...], dimension: str, entry: WriteTable) -> Point | None:
        """Where the device shows what it holds, when that is another place than where it is written."""
        shown = entry.shown_at
        if shown is None:
            return None
        if shown.raw_unit is None:
            shown = shown.model_copy(update={"raw_unit": entry.raw_unit})
        kind = shown.type or entry.type
        return Point(
            name=key[-1],
            addresses=(shown.address,),
            type=kind,
            word_count=registers.WORD_COUNT.get(kind, 1),
            word_order=shown.word_order or self.table.wire.word_order,
            read_fc=shown.fc or self.table.wire.read_fc,
            write_fc=None,
            steps=self._steps((*key, "shown_at"), dimension, shown),
            model=entry.model,
        )

    def _range(
        self, key: tuple[str, ...], dimension: str, entry: WriteTable
    ) -> tuple[int | None, int | None]:
        if entry.range is None:
            if dimension in UNITS and key[0] == "command":
                self.problems.add(
                    key, 'range is missing: the least and most it takes besides 0, such as ["6 A", "32 A"]'
                )
            return None, None
        if dimension not in UNITS:
            self.problems.add((*key, "range"), "only a quantity has a range")
            return None, None
        ends = [amount(end, dimension) for end in entry.range]
        for end in ends:
            if isinstance(end, str):
                self.problems.add((*key, "range"), end)
        whole = [int(end) if isinstance(end, Fraction) else 0 for end in ends]
        if whole[0] > whole[-1]:
            self.problems.add((*key, "range"), "the least is more than the most")
        return whole[0], whole[1] if len(whole) > 1 else None

    def _constant(self, index: int, entry: ConstantTable) -> Constant:
        as_write = WriteTable(
            address=entry.address,
            type=entry.type,
            fc=entry.fc,
            access=entry.access,
            value=entry.value,
            model=entry.model,
        )
        return Constant(self._write(("prepare", str(index)), "token", as_write), entry.value)

    def _expectation(self, index: int, entry: ExpectTable) -> Expectation:
        key = ("expect", str(index))
        if not entry.values and entry.most is None:
            self.problems.add(key, "say which values are right: values = [...], or least and most")
        point = Point(
            name=f"setting {entry.address}",
            addresses=(entry.address,),
            type=entry.type,
            word_count=registers.WORD_COUNT.get(entry.type, 1),
            word_order=self.table.wire.word_order,
            read_fc=entry.fc or 3,
            write_fc=None,
            mask=entry.mask,
        )
        most = 0 if entry.most is None else entry.most
        return Expectation(point, tuple(entry.values), entry.least, most, entry.remedy)

    def _failsafe(self) -> Failsafe | None:
        table = self.table.failsafe
        if table is None:
            return None
        points = {
            name: self._write(("failsafe", name), dimension, entry)
            for name, dimension in _FAILSAFE.items()
            if isinstance(entry := getattr(table, name), WriteTable)
        }
        armed_by_us = table.kind in ("register_watchdog", "life_bit", "reversion_timer")
        if armed_by_us and table.timer == "register" and "timeout_ms" not in points:
            self.problems.add(
                ("failsafe",),
                f"a {table.kind} needs the register of its timeout: [failsafe.timeout_ms]; "
                'or timer = "device" where only the device knows it',
            )
        if table.fed_by == "timeout" and "timeout_ms" not in points:
            self.problems.add(("failsafe", "fed_by"), "needs [failsafe.timeout_ms]")
        fallback = tuple(points[name] for name in _FAILSAFE if name in points and name != "timeout_ms")
        if table.fed_by == "keep_alive" and "keep_alive" not in self._named("command"):
            self.problems.add(("failsafe", "fed_by"), "needs [command.keep_alive]")
        if table.kind == "none" and table.zero_fallback:
            self.problems.add(
                ("failsafe", "zero_fallback"), "a device without a failsafe cannot fall back to 0 A"
            )
        return Failsafe(
            kind=table.kind,
            zero_fallback=table.zero_fallback is not False,
            zero_unproven=table.zero_fallback == "unproven",
            own_timer=table.timer == "device",
            fed_by=table.fed_by,
            confidence=table.confidence,
            timeout_ms=points.get("timeout_ms"),
            fallback=fallback,
            note=table.note,
        )

    def _energy(self) -> Energy:
        table = self.table.energy
        built_in = table.meter == "built_in"
        if built_in != (table.counter == "lifetime"):
            self.problems.add(
                ("energy", "meter"), "only a lifetime counter bills; without one, meter must be required"
            )
        named = self._named("read")
        if built_in and not any(name.startswith("register_") for name in named):
            self.problems.add(("energy", "counter"), "no register_mwh (or register_import_mwh) is mapped")
        if built_in and "power_w" not in named:
            self.problems.add(("energy", "meter"), "what bills must show power_w too: it proves a stop")
        step = amount(table.step, "energy") if table.step is not None else Fraction(0)
        if isinstance(step, str) or (built_in and step < 1):
            self.problems.add(
                ("energy", "step"), step if isinstance(step, str) else "say how fine the counter is"
            )
            step = Fraction(1)
        return Energy(table.counter, int(step), table.forward, not built_in, table.confidence, table.note)

    def _named(self, section: str) -> set[str]:
        """What the file names, even where that entry is wrong: one mistake is told once."""
        found = self.problems.data.get(section)
        return set(found) if isinstance(found, dict) else set()

    def _check_kind(self) -> None:
        reads, commands = self._named("read"), self._named("command")
        if self.table.kind == "meter":
            if commands or self.table.failsafe or self.table.prepare:
                self.problems.add(("kind",), "a meter takes no commands and has no failsafe")
            return
        if "pilot_state" not in reads:
            self.problems.add(("read",), "a charger must show pilot_state")
        if not {"set_current_ma", "set_power_w"} & commands:
            self.problems.add(("command",), "a charger must take set_current_ma or set_power_w")
        if self.table.failsafe is None:
            self.problems.add(("kind",), 'a charger needs [failsafe]; write kind = "none" where it has none')
        taken = self.table.command
        limit = taken.get("set_current_ma") or taken.get("set_power_w")
        if limit and limit.zero == "forbidden" and "enable" not in commands:
            self.problems.add(
                ("command",), "nothing here can stop the device: neither a limit of 0 nor enable"
            )
