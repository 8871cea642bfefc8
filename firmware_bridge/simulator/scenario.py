"""What goes wrong and when: a scenario file (TOML) as a list of faults, and which of them hold at an instant.

    [[fault]]
    at_s = 10            # seconds after the simulator began to listen; or after_wh = 8, once so much was delivered
    for_s = 3            # until then; or requests = 2 (wire faults only); without either: for ever
    wire = "silence"     # one of slave.WIRE_FAULTS, or "unplugged"
    device_id = 1        # whose replies; without it: everybody's

    [[fault]]
    after_wh = 8
    plant = "ignores_stop"

Rules: a wrong file is refused as a whole, with every mistake in it and the nearest valid word. Time is an argument.

May not know: frames, sockets, maps.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from firmware_bridge.charger import MapError
from firmware_bridge.simulator.plant import PLANT_FAULTS
from firmware_bridge.simulator.slave import WIRE_FAULTS, WireFault

UNPLUGGED = "unplugged"
_FILE_BYTES_MAX = 65_536  # a scenario is a page
_FAULTS_MAX = 1_000  # each is looked at for every request
WIRE_WORDS = {
    **WIRE_FAULTS,
    UNPLUGGED: "the cable is pulled: no port, no listener; plugged in again after for_s",
}

_Seconds = Annotated[float, Field(ge=0, le=10_000_000, allow_inf_nan=False)]


class Fault(BaseModel):
    """One entry of a scenario."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)
    at_s: _Seconds | None = None
    after_wh: _Seconds | None = None
    for_s: _Seconds | None = None
    requests: int | None = Field(default=None, ge=1, le=1_000_000)
    wire: str | None = None
    plant: str | None = None
    device_id: int | None = Field(default=None, ge=0, le=255)
    delay_ms: int = Field(default=900, ge=0, le=600_000)
    code: int = Field(default=4, ge=1, le=255)

    def mistakes(self) -> list[str]:
        """What makes no sense together."""
        found = []
        if (self.wire is None) == (self.plant is None):
            found.append("give exactly one of wire and plant")
        for key, word, words in (
            ("wire", self.wire, WIRE_WORDS),
            ("plant", self.plant, PLANT_FAULTS),
        ):
            if word is not None and word not in words:
                found.append(f"{key} = {word!r} is no fault; {nearest(word, words)}")
        if self.at_s is not None and self.after_wh is not None:
            found.append("give at_s or after_wh, not both")
        if self.requests is not None and (self.wire in (None, UNPLUGGED) or self.for_s is not None):
            found.append("requests counts answers: it goes with a wire fault, and without for_s")
        return found


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    fault: list[Fault] = Field(min_length=1, max_length=_FAULTS_MAX)


def nearest(word: str, words: Sequence[str] | dict[str, str]) -> str:
    """The nearest valid word, or all of them."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.4)
    return f"nearest: {near[0]}" if near else f"known: {', '.join(words)}"


def load_scenario(path: Path) -> tuple[Fault, ...]:
    """The faults in this file. Raises MapError with every mistake."""
    try:
        if path.stat().st_size > _FILE_BYTES_MAX:
            raise MapError(f"{path.name}: larger than {_FILE_BYTES_MAX} bytes; this is no scenario")
        return parse_scenario(path.read_text(encoding="utf-8"), path.name)
    except OSError as exc:
        raise MapError(f"{path}: cannot read the scenario: {exc.strerror}") from exc
    except UnicodeDecodeError as exc:
        raise MapError(f"{path.name}: not UTF-8 text; this is no scenario") from exc


def parse_scenario(text: str, file_name: str) -> tuple[Fault, ...]:
    """The same from text; `file_name` is for the messages."""
    data: dict[str, Any] = {}
    try:
        data = tomllib.loads(text)
        found = _File.model_validate(data)
    except tomllib.TOMLDecodeError as exc:
        raise MapError(f"{file_name}: not valid TOML: {exc}") from exc
    except ValidationError as exc:
        lines = [_said(error["loc"], error["type"], error["msg"]) for error in exc.errors()]
        lines += _words_mistaken(data)
        raise MapError("\n".join(f"{file_name}: {line}" for line in lines)) from exc
    mistakes = [
        f"{file_name}: fault {number}: {mistake}"
        for number, fault in enumerate(found.fault, start=1)
        for mistake in fault.mistakes()
    ]
    if mistakes:
        raise MapError("\n".join(mistakes))
    return tuple(found.fault)


def _words_mistaken(data: dict[str, Any]) -> list[str]:
    """What is wrong with the words of a file that has no shape: nobody should have to mend it twice."""
    entries = data.get("fault")
    found = []
    for number, entry in enumerate(entries if isinstance(entries, list) else (), start=1):
        if not isinstance(entry, dict):
            continue
        words = {key: entry[key] for key in ("wire", "plant") if isinstance(entry.get(key), str)}
        found += [f"fault {number}: {mistake}" for mistake in Fault.model_construct(**words).mistakes()]
    return found


def _said(loc: tuple[int | str, ...], kind: str, message: str) -> str:
    where = " ".join(str(part + 1) if isinstance(part, int) else part for part in loc)
    if kind == "extra_forbidden":
        keys = Fault.model_fields if len(loc) > 1 else _File.model_fields
        return f"{where}: no such key; {nearest(str(loc[-1]), list(keys))}"
    return f"{where}: {message}"


@dataclass(slots=True)
class _Part:
    """One fault and how far it has come."""

    fault: Fault
    begun_s: float | None = None
    answered: int = 0

    def holds(self, now_s: float, delivered_wh: float) -> bool:
        """True while it is on."""
        fault = self.fault
        if self.begun_s is None:
            if now_s < (fault.at_s or 0) or delivered_wh < (fault.after_wh or 0):
                return False
            self.begun_s = fault.at_s if fault.at_s is not None else now_s
        if fault.requests is not None:
            return self.answered < fault.requests
        return fault.for_s is None or now_s < self.begun_s + fault.for_s


class Scenario:
    """Which faults hold now. Feed it time and the Wh delivered; both only grow."""

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._parts = [_Part(fault) for fault in faults]
        self._now_s = 0.0
        self._delivered_wh = 0.0

    def at(self, now_s: float, delivered_wh: float) -> None:
        """It is now so late."""
        self._now_s, self._delivered_wh = now_s, delivered_wh

    def _holding(self) -> list[_Part]:
        return [part for part in self._parts if part.holds(self._now_s, self._delivered_wh)]

    def of(self, device_id: int) -> WireFault | None:
        """What goes wrong with this request: the first fault of the file that holds and is meant for this device."""
        for part in self._holding():
            fault = part.fault
            if fault.wire in (None, UNPLUGGED) or fault.device_id not in (None, device_id):
                continue
            part.answered += 1
            return WireFault(fault.wire or "", fault.delay_ms, fault.code)
        return None

    @property
    def unplugged(self) -> bool:
        """True while the cable is pulled."""
        return any(part.fault.wire == UNPLUGGED for part in self._holding())

    def plant_faults(self, device_id: int, *, first: bool) -> frozenset[str]:
        """What is wrong with the plant behind this device now; a fault that names no device is the first charger's."""
        return frozenset(
            part.fault.plant
            for part in self._holding()
            if part.fault.plant is not None
            and (part.fault.device_id == device_id or (first and part.fault.device_id is None))
        )
