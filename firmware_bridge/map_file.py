"""What a map file may say, key by key, and how a mistake in it is told: file, line, key, value, nearest key.

Rules
* Shape only: which keys there are, of which type, within which bounds. What they mean together is
  `device_map.py`'s.
* Unknown keys are refused. A quirk of a device is an option here, never code elsewhere.
* All problems of a file are told at once.

May not know: points, wires, charging.
"""

from __future__ import annotations

import copy
import difflib
import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from firmware_bridge.registers import WordOrder, WordType

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
PlaceType = Literal[WordType, "bit"]
FedBy = Literal["any_request", "keep_alive", "set_point", "timeout"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


_Address = Annotated[int, Field(ge=0, le=65535)]
_Raw = Annotated[int, Field(ge=0, lt=2**64)]
_Mask = Annotated[int, Field(ge=0, lt=2**32)]
_ModelId = Annotated[int, Field(ge=1, le=65534)]


class ExponentTable(_Strict):
    """The register (i16) beside a value that holds its decimal exponent."""

    address: _Address
    usual: int = Field(default=0, ge=-10, le=10)


class ShownTable(_Strict):
    """Where a device shows what was written elsewhere."""

    address: _Address
    type: WordType | None = None
    fc: Literal[1, 2, 3, 4] | None = None
    word_order: WordOrder | None = None
    raw_unit: str | None = None


class ReadTable(_Strict):
    """One quantity that the device shows."""

    address: _Address | None = None
    addresses: list[_Address] | None = Field(default=None, min_length=1, max_length=3)  # one per mains phase
    combine: Literal["max", "sum", "first", "difference"] = "max"
    type: PlaceType
    words: int = Field(default=0, ge=0, le=64)  # length of an ascii value
    fc: Literal[1, 2, 3, 4] | None = None
    word_order: WordOrder | None = None
    raw_unit: str | list[str] | None = None
    sentinels: list[_Raw] = Field(default_factory=list, max_length=16)
    values: dict[str, bool | str] | None = None
    bits: dict[str, str] | None = None
    mask: _Mask = 0
    exponent: ExponentTable | None = None
    model: _ModelId | None = None


class WriteTable(_Strict):
    """One quantity, switch or token that the device takes."""

    address: _Address
    type: PlaceType
    fc: Literal[5, 6, 16] | None = None
    read_fc: Literal[1, 3, 4] | None = None
    word_order: WordOrder | None = None
    raw_unit: str | None = None
    range: list[str] | None = Field(default=None, min_length=1, max_length=2)
    zero: Literal["stops", "forbidden"] = "stops"  # what writing 0 does; some DC devices abort the session
    access: Literal["RW", "W", "R"] = "RW"
    shown_at: ShownTable | None = None
    on: int | None = None
    off: int | None = None
    value: int | None = None
    exponent: ExponentTable | None = None
    model: _ModelId | None = None


class ConstantTable(_Strict):
    """A fixed value that is written before arming."""

    address: _Address
    type: WordType = "u16"
    value: int
    fc: Literal[6, 16] | None = None
    access: Literal["RW", "W"] = "RW"
    model: _ModelId | None = None


class ExpectTable(_Strict):
    """A setting of the device that must be as the map supposes."""

    address: _Address
    type: WordType = "u16"
    fc: Literal[3, 4] | None = None
    mask: _Mask = 0
    values: list[int] = Field(default_factory=list, max_length=16)
    least: int = 0
    most: int | None = None
    remedy: str = Field(min_length=10)


class WireTable(_Strict):
    """How one speaks to the device."""

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


class ConnectorsTable(_Strict):
    """A station with several charging points: the map is written for the first one."""

    count: int = Field(ge=2, le=64)
    stride: int = Field(ge=1, le=10_000)
    holding_stride: int | None = Field(default=None, ge=1, le=10_000)  # where holding registers lie closer


class SunspecTable(_Strict):
    """A device that says itself where its models begin: addresses of points with `model` are offsets."""

    base_addresses: list[_Address] = Field(min_length=1, max_length=4)
    model_words: dict[str, Annotated[int, Field(ge=1, le=1000)]] = Field(min_length=1)


class FailsafeTable(_Strict):
    """What the device does when nobody speaks to it any more."""

    kind: FailsafeKind
    zero_fallback: bool | Literal["unproven"] = False
    timer: Literal["register", "device"] = "register"
    fed_by: FedBy = "any_request"
    confidence: Confidence
    note: str = ""
    timeout_ms: WriteTable | None = None
    current_ma: WriteTable | None = None
    current_ma_single_phase: WriteTable | None = None
    power_w: WriteTable | None = None


class EnergyTable(_Strict):
    """Which counter bills."""

    counter: Literal["lifetime", "session", "none"]
    step: str | None = None
    forward: Literal["import", "export"] = "import"
    meter: Literal["built_in", "required"]
    confidence: Confidence
    note: str = ""


class MapTable(_Strict):
    """A whole map file."""

    map_version: Literal[1]
    id: str = Field(pattern=r"^[a-z0-9_]{1,64}$")
    maker: str
    model: str
    kind: Literal["charger", "meter"]
    confidence: Confidence
    sources: list[str] = Field(min_length=1)
    notes: list[str] = Field(default_factory=list)
    wire: WireTable
    connectors: ConnectorsTable | None = None
    sunspec: SunspecTable | None = None
    read: dict[str, ReadTable]
    command: dict[str, WriteTable] = Field(default_factory=dict)
    expect: list[ExpectTable] = Field(default_factory=list, max_length=4)
    prepare: list[ConstantTable] = Field(default_factory=list, max_length=8)
    failsafe: FailsafeTable | None = None
    energy: EnergyTable


_TABLES: dict[str, type[BaseModel]] = {
    "wire": WireTable,
    "connectors": ConnectorsTable,
    "sunspec": SunspecTable,
    "failsafe": FailsafeTable,
    "energy": EnergyTable,
    "read": ReadTable,
    "command": WriteTable,
    "expect": ExpectTable,
    "prepare": ConstantTable,
}
_SHAPE_ATTEMPTS = 3  # taking an entry out may uncover one more; a file of nothing but faults ends here
_INLINE: dict[str, type[BaseModel]] = {"exponent": ExponentTable, "shown_at": ShownTable}


class Problems:
    """Collects what is wrong, each with its line in the file."""

    def __init__(self, file_name: str, text: str, data: dict[str, Any]) -> None:
        self.file_name = file_name
        self.lines = _line_index(text)
        self.data = data
        self.found: list[str] = []

    def add(self, key: Iterable[str | int], what: str) -> None:
        """Note what is wrong at `key`, with the line of its nearest table or key in the file."""
        path = tuple(str(part) for part in key)
        line = next((self.lines[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.lines), 1)
        value: Any = self.data
        for part in path:
            value = _descend(value, part)
        shown = f" = {value!r}" if isinstance(value, str | int | float | bool) else ""
        self.found.append(f"{self.file_name}:{line}: {'.'.join(path)}{shown}: {what}")

    def shape(self) -> MapTable | None:
        """The file as a table, as far as it has one: what has no shape is noted and left out, so that the
        rest can be judged too. None when too little is left for that.
        """
        data = copy.deepcopy(self.data)
        for _ in range(_SHAPE_ATTEMPTS):
            try:
                return MapTable.model_validate(data)
            except ValidationError as error:
                self.add_schema(error)
                if not all(self._left_out(data, item["loc"], item["type"]) for item in error.errors()):
                    return None
        return None

    def _left_out(self, data: dict[str, Any], loc: tuple[int | str, ...], what: str) -> bool:
        """True when what is wrong could be taken out of `data` without inventing what was meant."""
        path = _real_path(self.data, loc, keep_last=what == "missing")
        if what != "extra_forbidden":
            entry = len(path) > 1 and path[0] in ("read", "command", "expect", "prepare")
            path = path[:2] if entry else ()
        if not path:
            return False
        holder: Any = data
        for part in path[:-1]:
            holder = _descend(holder, part)
        if isinstance(holder, list):
            holder.clear()
        elif isinstance(holder, dict):
            holder.pop(path[-1], None)
        return True

    def add_schema(self, error: ValidationError) -> None:
        """Note everything that has not the shape of a map."""
        told: set[tuple[str, ...]] = set()
        for item in error.errors(include_url=False, include_context=False):
            # A union adds its members' names to the location; the file's own keys end where the data ends.
            path = _real_path(self.data, item["loc"], keep_last=item["type"] == "missing")
            if path in told:
                continue  # the other ways in which the same value could have been right
            told.add(path)
            if item["type"] == "extra_forbidden":
                self.add(path, f"unknown key{_nearest(path)}")
            elif item["type"] == "missing":
                self.add(path, "is missing")
            else:
                self.add(path, item["msg"][0].lower() + item["msg"][1:])

    def message(self) -> str:
        """One line for each problem, in the order they were found."""
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


def _nearest(path: tuple[str, ...]) -> str:
    """The valid keys of the table that `path` ends in, or the one that was probably meant."""
    model: type[BaseModel] = MapTable
    if len(path) > 1:
        model = _TABLES.get(path[0], MapTable)
        if path[0] == "failsafe" and len(path) > 2:
            model = WriteTable
        model = _INLINE.get(path[-2], model)
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
