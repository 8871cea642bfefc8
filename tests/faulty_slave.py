"""A Modbus slave of our own that misbehaves on command: TCP, RTU over TCP, and RTU on a pty. Shares no code with pymodbus.

Register N holds N + 1000 until somebody writes it, so a value read from the wrong place is always seen to be wrong.
`faults` is consumed one per request; when it is empty the slave behaves. `holds` is the truth.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import tempfile
import tty
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Self

LATE_S = (
    0.4  # later than the tests' time-out (0.25 s), and just when a bus without quarantine would listen again
)
VERY_LATE_S = 0.85  # later than time-out and quarantine together: just when the next request listens
UNPLUGGED_S = 0.4
TURNAROUND_S = 0.04  # between two things said later than asked; an honest reply comes at once

# fault -> what it is, in the words of the table in docs/wire.md
FAULTS = {
    "late": "reply after the time-out",
    "very_late": "reply after the quarantine",
    "silence": "silence",
    "wrong_unit": "wrong device id",
    "wrong_tid": "wrong transaction id",
    "zero_tid": "transaction id 0",
    "wrong_protocol": "wrong protocol id",
    "bad_crc": "wrong checksum",
    "short": "fewer registers than asked",
    "one_too_many": "more registers than asked",
    "wrong_function": "another read function",
    "ack_instead": "acknowledgement instead of a read",
    "read_instead": "read reply instead of an acknowledgement",
    "wrong_address": "acknowledged at another address",
    "wrong_value": "acknowledged with another value",
    "half": "half a frame, then silence",
    "split": "frame in three parts",
    "merged": "reply twice in one frame",
    "merged_stale": "old reply and true reply in one frame",
    "garbage_first": "garbage before the reply",
    "garbage_last": "garbage behind the reply",
    "noise": "noise for a second",
    "twice": "reply repeated 20 ms later",
    "echo": "own words, then the reply",
    "echo_only": "own words, no reply",
    "hang_up": "connection closed instead of a reply",
    "cut": "connection closed in mid-frame",
    "half_open": "connection open, nobody behind it",
    "unplug": "cable pulled for 0.4 s",
}
# With these the device does not do what it was told either, so that believing its reply is seen to be wrong.
DEAF = {
    "silence", "hang_up", "cut", "half_open", "unplug", "half", "echo_only", "wrong_unit", "wrong_tid", "bad_crc",
    "read_instead", "wrong_address", "wrong_value", "noise",
}  # fmt: skip

# With these a read shows something else than the truth, as the reply to another question or a bent one would.
FOREIGN = {"wrong_unit", "wrong_tid", "zero_tid", "wrong_protocol", "wrong_function", "bad_crc"}


def crc(data: bytes) -> bytes:
    """CRC-16/Modbus, low byte first, bit by bit."""
    value = 0xFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ 0xA001 if value & 1 else value >> 1
    return value.to_bytes(2, "little")


class _Line:
    """One connection to a master: where its bytes go, and whether anybody is still behind it."""

    def __init__(self, write: Callable[[bytes], object], close: Callable[[], object]) -> None:
        self.write, self.close = write, close
        self.deaf = False


class FaultySlave:
    """`async with FaultySlave("tcp" | "rtu+tcp" | "rtu") as slave:` and connect to `slave.wire`."""

    def __init__(self, kind: str, *, echoes: bool = False) -> None:
        self.kind = kind
        self.echoes = echoes  # the adapter repeats every byte to the master
        self.faults: deque[str] = deque()
        self.written: dict[int, int] = {}
        self.requests: list[tuple[float, int, int, int]] = []  # (at_s, function, address, count or value)
        self.keep_requests = True
        self.wire = ""
        self._server: asyncio.Server | None = None
        self._port = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends: tuple[int, ...] = ()
        self._buffer = b""
        self._last_reply = b""
        self._busy_until_s = 0.0
        self._later: set[asyncio.TimerHandle] = set()

    async def __aenter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory()
        self._link = Path(self._folder.name, "usb-Our_own_adapter-port0")
        if self.kind == "rtu":
            self.wire = f"rtu://{self._link}?baud=115200&parity=N"
        await self.plug()
        if self.kind != "rtu":
            self.wire = f"{self.kind}://127.0.0.1:{self._port}"
        return self

    async def __aexit__(self, *_: object) -> None:
        for handle in self._later:
            handle.cancel()
        self.unplug()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._folder.cleanup()

    # -------------------------------------------------------------- the cable
    async def plug(self) -> None:
        """Be there: a new pty behind the old name, or the old port listened to again."""
        if self.kind != "rtu":
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]
            return
        master, slave = pty.openpty()
        tty.setraw(master)
        tty.setraw(slave)
        self._ends, self._buffer = (master, slave), b""
        self._link.symlink_to(os.ttyname(slave))
        line = _Line(self._to_pty, self._pull)
        asyncio.get_running_loop().add_reader(master, self._from_pty, line)

    def unplug(self) -> None:
        """Be gone: the pty and its name, or the port and every connection to it."""
        if self._server is not None:
            self._server.close()
            self._server = None
            for task in self._tasks:
                task.cancel()
        if self._ends:
            asyncio.get_running_loop().remove_reader(self._ends[0])
            for end in self._ends:
                os.close(end)
            self._ends = ()
            self._link.unlink()

    def _pull(self) -> None:
        """Be gone, and there again a little later."""
        self.unplug()
        self._in(UNPLUGGED_S, lambda: self._task(self.plug()))

    def _task(self, work) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -------------------------------------------------------------- bytes in
    def _from_pty(self, line: _Line) -> None:
        self._buffer += os.read(self._ends[0], 4096)
        while (length := self._rtu_length(self._buffer)) and len(self._buffer) >= length:
            frame, self._buffer = self._buffer[:length], self._buffer[length:]
            self._answer(frame, line)

    def _to_pty(self, data: bytes) -> None:
        with contextlib.suppress(OSError, IndexError):  # the cable is gone
            os.write(self._ends[0], data)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._task(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        line = _Line(lambda data: None if writer.is_closing() else writer.write(data), writer.close)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    frame = await reader.readexactly(7)
                    rest = (
                        int.from_bytes(frame[4:6], "big") - 1
                        if self.kind == "tcp"
                        else self._rtu_length(frame) - 7
                    )
                    self._answer(frame + await reader.readexactly(rest), line)
        finally:
            writer.close()

    @staticmethod
    def _rtu_length(frame: bytes) -> int:
        if len(frame) < 7:
            return 0
        return 9 + frame[6] if frame[1] == 16 else 8

    # -------------------------------------------------------------- what is true
    def holds(self, address: int, count: int = 1) -> tuple[int, ...]:
        """What an honest reply shows."""
        return tuple(self.written.get(at, at + 1000) for at in range(address, address + count))

    def _honest(self, pdu: bytes, *, obey: bool) -> bytes:
        function, address, number = pdu[0], int.from_bytes(pdu[1:3], "big"), int.from_bytes(pdu[3:5], "big")
        if self.keep_requests:
            self.requests.append((asyncio.get_running_loop().time(), function, address, number))
        if function in (3, 4):
            return bytes([function, 2 * number]) + b"".join(
                v.to_bytes(2, "big") for v in self.holds(address, number)
            )
        if obey and function == 6:
            self.written[address] = number
        elif obey:
            words = [int.from_bytes(pdu[6 + 2 * n : 8 + 2 * n], "big") for n in range(number)]
            self.written |= {address + at: word for at, word in enumerate(words)}
        return pdu[:5]

    # -------------------------------------------------------------- what is said
    def _answer(self, asked: bytes, line: _Line) -> None:
        tid, unit, pdu = (
            (asked[:2], asked[6], asked[7:]) if self.kind == "tcp" else (b"", asked[0], asked[1:-2])
        )
        if line.deaf:
            return
        fault = self.faults.popleft() if self.faults else "none"
        obey = fault not in DEAF and not fault.startswith("exception")
        reply = self._frame(fault, tid, unit, self._bent(fault, pdu, self._honest(pdu, obey=obey)))
        if self.echoes:
            self._say(0, line, asked)
        self._utter(fault, line, asked, reply)
        self._last_reply = reply

    def _utter(self, fault: str, line: _Line, asked: bytes, reply: bytes) -> None:
        """How the reply comes out."""
        match fault:
            case "silence":
                return
            case "half_open":
                line.deaf = True
            case "late" | "very_late":
                self._say(LATE_S if fault == "late" else VERY_LATE_S, line, reply)
            case "half":
                self._say(0, line, reply[: len(reply) // 2])
            case "split":
                for at, part in enumerate((reply[:1], reply[1:4], reply[4:])):
                    self._say(0.03 * at, line, part)
            case "noise":
                for at in range(20):
                    self._say(0.05 * at, line, bytes((at * 37 % 256, 0xFF)))
            case "twice":
                self._say(0, line, reply)
                self._say(0.02, line, reply)
            case "tail":  # only test_modbus.py: what it is depends on the baud rate
                self._say(0, line, reply)
                self._say(0.01, line, b"\x00")
            case "echo_only":
                self._say(0, line, asked)
            case "hang_up":
                line.close()
            case "cut":
                self._say(0, line, reply[: len(reply) // 2])
                self._in(0.02, line.close)
            case "unplug":
                self._pull()
            case _:
                self._say(0, line, self._around(fault, asked, reply))

    def _around(self, fault: str, asked: bytes, reply: bytes) -> bytes:
        match fault:
            case "merged":
                return reply + reply
            case "merged_stale":
                return self._last_reply + reply
            case "garbage_first":
                return b"\x00\xff\x13" + reply
            case "garbage_last":
                return reply + b"\x00\xff\x13"
            case "echo":
                return asked + reply
        return reply

    def _say(self, delay_s: float, line: _Line, data: bytes) -> None:
        """Replies leave in order, as from a real device: one that is late delays those behind it."""
        now_s = asyncio.get_running_loop().time()
        at_s = max(now_s + delay_s, self._busy_until_s)
        if at_s <= now_s:
            line.write(data)
            return
        self._busy_until_s = at_s + TURNAROUND_S
        self._in(at_s - now_s, lambda: line.write(data))

    def _in(self, delay_s: float, act: Callable[[], object]) -> None:
        def due() -> None:
            self._later.discard(handle)
            act()

        handle = asyncio.get_running_loop().call_later(delay_s, due)
        self._later.add(handle)

    @staticmethod
    def _bent(fault: str, pdu: bytes, reply: bytes) -> bytes:
        """The reply's PDU with its fault. A fault that this kind of request cannot have leaves it honest."""
        function = pdu[0]
        reading = function in (3, 4)
        if reading and fault in FOREIGN:
            reply = reply[:-1] + bytes([reply[-1] ^ 0x55])
        if fault.startswith("exception"):
            return bytes([function | 0x80, int(fault.rsplit("_", maxsplit=1)[-1])])
        match fault:
            case "short" if reading:
                return bytes([function, reply[1] - 2]) + reply[2:-2]
            case "one_too_many" if reading:
                return bytes([function, reply[1] + 2]) + reply[2:] + b"\x00\x07"
            case "wrong_function" if reading:
                return bytes([7 - function]) + reply[1:]  # 4 for 3, 3 for 4
            case "ack_instead" if reading:
                return bytes([6, 0, 10, 0, 1])
            case "read_instead" if not reading:
                return bytes([3, 2, 0, 0])
            case "wrong_address" if not reading:
                return reply[:1] + b"\x03\xe7" + reply[3:]
            case "wrong_value" if not reading:
                return reply[:3] + b"\x00\x63"
        return reply

    def _frame(self, fault: str, tid: bytes, unit: int, pdu: bytes) -> bytes:
        body = bytes([unit + (fault == "wrong_unit")]) + pdu
        if self.kind != "tcp":
            return body + crc(body if fault != "bad_crc" else body[:-1] + bytes([body[-1] ^ 0x55]))
        if fault == "wrong_tid":
            tid = ((int.from_bytes(tid, "big") + 7) % 65536).to_bytes(2, "big")
        if fault == "zero_tid":
            tid = b"\0\0"
        protocol = b"\0\x01" if fault == "wrong_protocol" else b"\0\0"
        return tid + protocol + len(body).to_bytes(2, "big") + body
