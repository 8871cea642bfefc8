"""A bus trace: every frame of an evening in a file, and a slave that answers as the file says.

A trace is JSON, one object a line. First `{"trace": 1, "framing": "tcp" | "rtu"}`, then one line for each frame as it was on
the wire, headers and checksums included: `{"at_ms": 1234, "by": "master" | "device", "hex": "010300640004..."}`. Anybody may
write one, also from a real bus: what a device said once can be asked again without it.

Rules
* Replayed is what was said to the very same request, in the recorded order and after the recorded time; the last answer is
  repeated for ever. A request that the trace does not have gets silence, and is counted.
* On TCP the transaction id of the recorded answer is moved along with the request's; nothing else is changed.

May not know: maps, the plant, what a frame means.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from firmware_bridge.charger import MapError
from firmware_bridge.simulator.slave import Framing, Speaker, Tap

_VERSION = 1
_FILE_BYTES_MAX = 256 << 20  # a month at 4 Hz is less; a full disk would end more than the recording
_FRAME_BYTES_MAX = 600  # an answer, an echo and some noise


class Recorder:
    """`with Recorder(path, framing, now_ms) as recorder:` and hand `recorder.frame` to the slave as its tap."""

    def __init__(self, path: Path, framing: Framing, now_ms: Callable[[], int]) -> None:
        try:
            self._file = path.open("w", encoding="ascii", buffering=1)
        except OSError as exc:
            raise MapError(f"{path}: cannot write the trace: {exc.strerror}") from exc
        self._now_ms, self._began_ms = now_ms, now_ms()
        self._left = _FILE_BYTES_MAX
        self._write({"trace": _VERSION, "framing": framing})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def frame(self, by: Speaker, data: bytes) -> None:
        """One frame, as it is on the wire."""
        self._write({"at_ms": self._now_ms() - self._began_ms, "by": by, "hex": data.hex()})

    def _write(self, row: dict[str, object]) -> None:
        line = json.dumps(row) + "\n"
        self._left -= len(line)
        if self._left > 0:
            self._file.write(line)


@dataclass(slots=True)
class _Told:
    """What was once said to a request: its transaction id, and each piece with the wait before it."""

    tid: int
    pieces: list[tuple[float, bytes]]


class Replay:
    """Answers as the trace says; stands where an `Exchange` does."""

    def __init__(self, path: Path) -> None:
        self.tap: Tap = lambda _speaker, _data: None
        self.unknown = 0  # requests that the trace does not have
        self.framing: Framing
        self._told: dict[bytes, deque[_Told]] = {}
        try:
            if path.stat().st_size > _FILE_BYTES_MAX:
                raise MapError(f"{path.name}: larger than {_FILE_BYTES_MAX} bytes; cut the trace")
            lines = path.read_text(encoding="ascii").splitlines()
        except (OSError, UnicodeDecodeError) as exc:
            raise MapError(f"{path}: cannot read the trace: {exc}") from exc
        head = _row(path, 1, lines[0] if lines else "")
        if head.get("trace") != _VERSION or head.get("framing") not in ("tcp", "rtu"):
            raise MapError(
                f'{path.name}, line 1: not a trace; it begins with {{"trace": 1, "framing": "tcp"}}'
            )
        self.framing = "tcp" if head["framing"] == "tcp" else "rtu"
        self._load(path, lines[1:])

    def _load(self, path: Path, lines: list[str]) -> None:
        told: _Told | None = None
        last_ms = 0
        for number, line in enumerate(lines, start=2):
            by, at_ms, data = _frame(path, number, line)
            if by == "master":
                told = _Told(self._tid(data), [])
                self._told.setdefault(self._key(data), deque()).append(told)
            elif told is not None:
                told.pieces.append((max(0, at_ms - last_ms) / 1000, data))
            last_ms = at_ms

    async def reply(self, framing: Framing, request: bytes) -> list[tuple[float, bytes]] | None:
        """As `Exchange.reply`: what to send, and the seconds to wait before each piece."""
        self.tap("master", request)
        known = self._told.get(self._key(request))
        if not known:
            self.unknown += 1
            return []
        told = known.popleft() if len(known) > 1 else known[0]
        return [(wait_s, self._moved(data, self._tid(request) - told.tid)) for wait_s, data in told.pieces]

    def _key(self, request: bytes) -> bytes:
        return request[2:] if self.framing == "tcp" else request

    def _tid(self, frame: bytes) -> int:
        return int.from_bytes(frame[:2], "big") if self.framing == "tcp" else 0

    def _moved(self, data: bytes, by: int) -> bytes:
        if self.framing == "rtu" or data[2:4] != b"\0\0":  # the second half of a split frame has no header
            return data
        return ((self._tid(data) + by) % 65_536).to_bytes(2, "big") + data[2:]


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as exc:
        raise MapError(f"{path.name}, line {number}: not JSON") from exc
    if not isinstance(row, dict):
        raise MapError(f"{path.name}, line {number}: not an object")
    return row


def _frame(path: Path, number: int, line: str) -> tuple[str, int, bytes]:
    row = _row(path, number, line)
    by, at_ms, text = row.get("by"), row.get("at_ms"), row.get("hex")
    if by not in ("master", "device") or type(at_ms) is not int or not isinstance(text, str):
        raise MapError(f"{path.name}, line {number}: needs by (master or device), at_ms and hex")
    try:
        data = bytes.fromhex(text)
    except ValueError as exc:
        raise MapError(f"{path.name}, line {number}: {text[:40]!r} is not hexadecimal") from exc
    if not 1 <= len(data) <= _FRAME_BYTES_MAX:
        raise MapError(f"{path.name}, line {number}: no frame is {len(data)} bytes long")
    return by, at_ms, data
