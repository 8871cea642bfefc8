"""A Modbus slave of our own that misbehaves on command: TCP, RTU over TCP, and RTU on a pty. Shares no code with pymodbus.

Register N holds N + 1000 until somebody writes it, so a value read from the wrong place is always seen to be wrong.
`faults` is consumed one per request; when it is empty the slave behaves.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import tty
from collections import deque
from typing import Self

LATE_S = 0.22  # later than the time-out of the tests, and just when the next request would listen

FAULTS = (
    "late",
    "very_late",
    "silence",
    "wrong_unit",
    "wrong_tid",
    "zero_tid",
    "short",
    "one_too_many",
    "exception",
    "wrong_function",
    "ack_instead",
    "read_instead",
    "wrong_address",
    "wrong_value",
    "bad_crc",
    "garbage_first",
    "split",
    "twice",
    "hang_up",
)


def crc(data: bytes) -> bytes:
    """CRC-16/Modbus, low byte first, bit by bit."""
    value = 0xFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ 0xA001 if value & 1 else value >> 1
    return value.to_bytes(2, "little")


class FaultySlave:
    """`async with FaultySlave("tcp" | "rtu+tcp" | "rtu") as slave:` and connect to `slave.wire`."""

    def __init__(self, kind: str, device_id: int = 1) -> None:
        self.kind = kind
        self.device_id = device_id
        self.faults: deque[str] = deque()
        self.written: dict[int, int] = {}
        self.requests: list[tuple[float, int, int, int]] = []  # (at_s, function, address, count or value)
        self.wire = ""
        self._server: asyncio.Server | None = None
        self._ends: tuple[int, ...] = ()
        self._buffer = b""
        self._writers: set[asyncio.StreamWriter] = set()
        self._busy_until_s = 0.0

    async def __aenter__(self) -> Self:
        if self.kind == "rtu":
            master, slave = pty.openpty()
            tty.setraw(master)
            tty.setraw(slave)
            self._ends = (master, slave)
            self.wire = f"rtu://{os.ttyname(slave)}?baud=115200&parity=N"
            asyncio.get_running_loop().add_reader(master, self._from_pty)
        else:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            self.wire = f"{self.kind}://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._server is not None:
            self._server.close()
            for writer in self._writers:
                writer.close()
            await self._server.wait_closed()
        else:
            asyncio.get_running_loop().remove_reader(self._ends[0])
            for end in self._ends:
                os.close(end)
            self._ends = ()

    # -------------------------------------------------------------- bytes in
    def _from_pty(self) -> None:
        self._buffer += os.read(self._ends[0], 4096)
        while (length := self._rtu_length(self._buffer)) and len(self._buffer) >= length:
            frame, self._buffer = self._buffer[:length], self._buffer[length:]
            self._answer(0, frame[0], frame[1:-2], self._to_pty)

    def _to_pty(self, data: bytes) -> None:
        with contextlib.suppress(OSError, IndexError):  # the cable is gone
            os.write(self._ends[0], data)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)

        def send(data: bytes) -> None:
            if not writer.is_closing():
                writer.write(data) if data else writer.close()

        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                if self.kind == "tcp":
                    head = await reader.readexactly(7)
                    pdu = await reader.readexactly(int.from_bytes(head[4:6], "big") - 1)
                    self._answer(int.from_bytes(head[:2], "big"), head[6], pdu, send)
                else:
                    frame = await reader.readexactly(7)
                    frame += await reader.readexactly(self._rtu_length(frame) - 7)
                    self._answer(0, frame[0], frame[1:-2], send)
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

    def _obeys(self, fault: str) -> bool:
        """With these faults a write is not done either, so that believing its reply is seen to be wrong."""
        deaf = {
            "silence",
            "hang_up",
            "exception",
            "wrong_unit",
            "bad_crc",
            "read_instead",
            "wrong_address",
            "wrong_value",
        }
        return fault not in deaf and not (fault == "wrong_tid" and self.kind == "tcp")

    def _honest(self, pdu: bytes, *, obey: bool) -> bytes:
        function, address, number = pdu[0], int.from_bytes(pdu[1:3], "big"), int.from_bytes(pdu[3:5], "big")
        self.requests.append((asyncio.get_running_loop().time(), function, address, number))
        if function in (3, 4):
            return bytes([function, 2 * number]) + b"".join(
                v.to_bytes(2, "big") for v in self.holds(address, number)
            )
        if not obey:
            return pdu if function == 6 else pdu[:5]
        if function == 6:
            self.written[address] = number
            return pdu
        words = [int.from_bytes(pdu[6 + 2 * n : 8 + 2 * n], "big") for n in range(number)]
        self.written |= {address + at: word for at, word in enumerate(words)}
        return pdu[:5]

    # -------------------------------------------------------------- what is said
    def _answer(self, tid: int, unit: int, pdu: bytes, send) -> None:
        fault = self.faults.popleft() if self.faults else "none"
        reply = self._honest(pdu, obey=self._obeys(fault))
        frame = self._frame(tid, unit, self._bent(fault, pdu, reply))
        if fault == "wrong_unit":
            frame = self._frame(tid, unit + 1, reply)
        elif fault in ("wrong_tid", "zero_tid") and self.kind == "tcp":
            frame = self._frame(0 if fault == "zero_tid" else (tid + 7) % 65536, unit, reply)
        elif fault == "bad_crc":
            frame = frame[:-1] + bytes([frame[-1] ^ 0x55]) if self.kind != "tcp" else frame[:-1]
        elif fault == "garbage_first":
            frame = b"\x00\xff\x13" + frame
        if fault == "silence":
            return
        if fault == "hang_up":
            send(b"")
        elif fault in ("late", "very_late"):
            self._say(LATE_S if fault == "late" else 0.9, send, frame)
        elif fault == "split":
            self._say(0, send, frame[:3])
            self._say(0.05, send, frame[3:])
        else:
            self._say(0, send, frame)
            if fault == "twice":
                self._say(0.02, send, frame)

    def _say(self, delay_s: float, send, data: bytes) -> None:
        """Replies leave in order, as from a real device: one that is late delays those behind it."""
        loop = asyncio.get_running_loop()
        at_s = max(loop.time() + delay_s, self._busy_until_s)
        if at_s <= loop.time():
            send(data)
            return
        self._busy_until_s = at_s + 0.001
        loop.call_at(at_s, send, data)

    def _bent(self, fault: str, pdu: bytes, reply: bytes) -> bytes:
        function = pdu[0]
        reading = function in (3, 4)
        match fault:
            case "short" if reading:
                return bytes([function, reply[1] - 2]) + reply[2:-2]
            case "one_too_many" if reading:
                return bytes([function, reply[1] + 2]) + reply[2:] + b"\x00\x07"
            case "exception":
                return bytes([function | 0x80, 4])
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

    def _frame(self, tid: int, unit: int, pdu: bytes) -> bytes:
        if self.kind == "tcp":
            return tid.to_bytes(2, "big") + b"\0\0" + (len(pdu) + 1).to_bytes(2, "big") + bytes([unit]) + pdu
        return bytes([unit]) + pdu + crc(bytes([unit]) + pdu)
