"""A Modbus slave made of bytes: TCP, RTU over TCP, and RTU on a pty. It frames, answers in order, and lies when told to.

Rules
* It shares no code with pymodbus, so that a driver made of pymodbus is never tested against itself.
* A request that a real slave would not understand (wrong checksum, wrong length, somebody else's device id on a serial line) gets
  silence; on TCP an unknown device id gets a gateway's "no response" and bytes that are no Modbus end the connection.
* On a serial line a reply takes the time that its bytes and the request's would take at the line's speed, and a request
  that comes sooner than the device's own gap is not heard.
* What is wrong with a reply is decided by `Faults`, one answer per request; this file only does it.

May not know: maps, the plant, the driver.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from firmware_bridge.charger import MapError
from firmware_bridge.simulator.serial_line import SerialLine

Framing = Literal["tcp", "rtu"]
# What a request to this device is answered with, function code first; None: nobody of that id is here.
Answer = Callable[[int, bytes], Awaitable[bytes | None]]
# Sees every frame as it is on the wire: who said it, and the bytes.
Speaker = Literal["master", "device"]
Tap = Callable[[Speaker, bytes], None]

_FRAME_BYTES_MAX = (
    256  # the longest RTU frame; more in one breath is noise, and noise must not fill the memory
)
_ADU_BYTES_MAX = 254  # the longest MBAP length field
_WAITING_MAX = 16  # requests not yet answered on a serial line; a real slave keeps one
_CONNECTIONS_MAX = 32  # more is a flood
_FLUSH_S = 0.05  # a frame of unknown length is over after this much silence
_LATE_MS = 900  # later than anybody should wait
_SPLIT_S = 0.05  # between the two halves of a split frame
_GATEWAY_NO_RESPONSE = 0x0B
_SERVER_FAILURE = 4
_GAP_GRACE = 0.9  # a master that keeps the gap by its own clock may be this much early by ours

WIRE_FAULTS: dict[str, str] = {
    "silence": "not heard, not done, not answered (on TCP: a half-open connection)",
    "lost_reply": "heard and done, but the reply is lost",
    "late": "done, and answered delay_ms later (default 900)",
    "exception": "refused with exception code (default 4), not done",
    "wrong_crc": "the reply's checksum is wrong (on TCP: the reply is one byte short)",
    "wrong_unit": "the reply carries another device id",
    "wrong_tid": "the reply carries another transaction id (TCP only)",
    "short": "one register fewer than asked for, in a sound frame",
    "cut": "the reply ends in the middle of the frame",
    "split": "the reply comes in two parts, 50 ms apart",
    "garbage": "three bytes of noise before the reply",
    "echo": "the request comes back before the reply, as from an adapter with local echo",
    "twice": "the reply comes twice",
    "hang_up": "the connection is closed instead of a reply (on a serial line: silence)",
}
_NOT_DONE = {"silence", "exception", "hang_up"}


@dataclass(frozen=True, slots=True)
class WireFault:
    """One way to answer wrongly; `name` is one of WIRE_FAULTS."""

    name: str
    delay_ms: int = _LATE_MS
    code: int = _SERVER_FAILURE


class Faults(Protocol):
    """Says what goes wrong with the request that has just come."""

    def of(self, device_id: int) -> WireFault | None:
        """The fault for this one request; None: answer honestly."""


class Replies(Protocol):
    """Who knows what to say to a request: an `Exchange`, or a `Replay` of an old one."""

    tap: Tap

    async def reply(self, framing: Framing, request: bytes) -> list[tuple[float, bytes]] | None:
        """What to send: (seconds to wait before, bytes); nothing for silence. None: hang up."""


@dataclass(frozen=True, slots=True)
class LineTiming:
    """How fast a serial line is, and how long its device wants to be left alone after a reply."""

    baud: int
    gap_ms: int = 0

    def taken_s(self, byte_count: int) -> float:
        """What so many bytes and the two silences around a reply take, at 11 bits a character (BRIDGE rule 3)."""
        character_s = 11 / self.baud
        silence_s = 3.5 * character_s if self.baud <= 19_200 else 0.00175
        return byte_count * character_s + 2 * silence_s


def crc(data: bytes) -> bytes:
    """CRC-16/Modbus, low byte first."""
    value = 0xFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = value >> 1 ^ 0xA001 if value & 1 else value >> 1
    return value.to_bytes(2, "little")


def request_length(frame: bytes) -> int | None:
    """How long the RTU request that begins so will be; 0 while that cannot be said, None when it never can."""
    if len(frame) < 2:
        return 0
    if frame[1] in (1, 2, 3, 4, 5, 6):
        return 8
    if frame[1] in (15, 16):
        return 9 + frame[6] if len(frame) > 6 else 0
    return None


class Exchange:
    """From a request's parts to the bytes of its reply, honest or not."""

    def __init__(self, answer: Answer, faults: Faults | None, tap: Tap | None) -> None:
        self._answer, self._faults = answer, faults
        self.tap: Tap = tap or (lambda _speaker, _data: None)

    async def reply(self, framing: Framing, request: bytes) -> list[tuple[float, bytes]] | None:
        """See `Replies`."""
        self.tap("master", request)
        tid, device_id, pdu = taken_apart(framing, request)
        fault = self._faults.of(device_id) if self._faults is not None else None
        name = fault.name if fault is not None else ""
        if fault is not None and name in _NOT_DONE:
            if name == "exception":
                said = bytes([pdu[0] | 0x80, fault.code])
                return [(0.0, framed(framing, tid, device_id, said))]
            return None if name == "hang_up" else []
        found = await self._answer(device_id, pdu)
        if found is None:
            if framing == "rtu":
                return []
            found = bytes([pdu[0] | 0x80, _GATEWAY_NO_RESPONSE])
        if name == "lost_reply" or (
            framing == "rtu" and device_id == 0
        ):  # a broadcast is done and not answered
            return []
        if fault is None:
            return [(0.0, framed(framing, tid, device_id, found))]
        return _bent(fault, framing, request, tid, device_id, found)


def taken_apart(framing: Framing, frame: bytes) -> tuple[int, int, bytes]:
    """(transaction id, device id, function code and what follows) of a sound frame; RTU has no transaction id: 0."""
    if framing == "rtu":
        return 0, frame[0], frame[1:-2]
    return int.from_bytes(frame[:2], "big"), frame[6], frame[7:]


def framed(framing: Framing, tid: int, device_id: int, pdu: bytes) -> bytes:
    """A sound frame."""
    body = bytes([device_id]) + pdu
    if framing == "rtu":
        return body + crc(body)
    return tid.to_bytes(2, "big") + b"\0\0" + len(body).to_bytes(2, "big") + body


def _bent(
    fault: WireFault, framing: Framing, request: bytes, tid: int, device_id: int, pdu: bytes
) -> list[tuple[float, bytes]]:
    good = framed(framing, tid, device_id, pdu)
    match fault.name:
        case "late":
            return [(fault.delay_ms / 1000, good)]
        case "wrong_crc":
            return [(0.0, good[:-1] + bytes([good[-1] ^ 0x55]) if framing == "rtu" else good[:-1])]
        case "wrong_unit":
            return [(0.0, framed(framing, tid, device_id % 247 + 1, pdu))]
        case "wrong_tid":
            return [(0.0, framed(framing, (tid + 7) % 65536, device_id, pdu))]
        case "short" if pdu[0] in (3, 4) and len(pdu) >= 4:
            return [(0.0, framed(framing, tid, device_id, bytes([pdu[0], pdu[1] - 2]) + pdu[2:-2]))]
        case "cut":
            return [(0.0, good[: len(good) // 2])]
        case "split":
            return [(0.0, good[: len(good) // 2]), (_SPLIT_S, good[len(good) // 2 :])]
        case "garbage":
            return [(0.0, b"\x00\xff\x13" + good)]
        case "echo":
            return [(0.0, request), (0.0, good)]
        case "twice":
            return [(0.0, good), (0.02, good)]
    return [(0.0, good)]


class TcpSlave:
    """Listens at "HOST:PORT" (port 0: any free one) until closed. `framing` "rtu" is RTU over TCP."""

    def __init__(self, exchange: Replies, framing: Framing) -> None:
        self._exchange, self._framing = exchange, framing
        self._server: asyncio.Server | None = None
        self._at: tuple[str, int] = ("", 0)
        self._serving: set[asyncio.Task[None]] = set()

    async def listen(self, address: str) -> str:
        """Begin; the wire's name. Raises MapError when the address is none, or is taken."""
        host, _, port = address.rpartition(":")
        if not host or not port.isdigit() or int(port) > 65535:
            raise MapError(f"tcp = {address!r} is not HOST:PORT")
        try:
            self._server = await asyncio.start_server(self._connected, host.strip("[]"), int(port))
        except OSError as exc:
            raise MapError(
                f"cannot listen on {address}; is the port taken? choose another, or 0 for any"
            ) from exc
        self._at = (host, self._server.sockets[0].getsockname()[1])
        return f"{'rtu+tcp' if self._framing == 'rtu' else 'tcp'}://{host}:{self._at[1]}"

    async def unplug(self) -> None:
        """The network cable is pulled: nobody listens, and whoever was connected is not any more."""
        await self.close()

    async def plug(self) -> None:
        """It is back, at the same address."""
        if self._server is None:
            with contextlib.suppress(MapError):  # somebody took the port meanwhile: it stays away
                await self.listen(f"{self._at[0]}:{self._at[1]}")

    async def close(self) -> None:
        """Stop listening and hang up on everybody."""
        if self._server is None:
            return
        self._server.close()
        self._server = None
        serving = list(self._serving)
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._serving) >= _CONNECTIONS_MAX or self._server is None:
            writer.close()
            return
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        read = self._read_rtu if self._framing == "rtu" else self._read_tcp
        try:
            while (request := await read(reader)) is not None:
                said = await self._exchange.reply(self._framing, request)
                if said is None:
                    return
                for wait_s, data in said:
                    await asyncio.sleep(wait_s)
                    self._exchange.tap("device", data)
                    writer.write(data)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            return  # the master left: nobody to tell
        finally:
            writer.close()

    @staticmethod
    async def _read_tcp(reader: asyncio.StreamReader) -> bytes | None:
        head = await reader.readexactly(6)
        length = int.from_bytes(head[4:], "big")
        if head[2:4] != b"\0\0" or not 2 <= length <= _ADU_BYTES_MAX:
            return None
        return head + await reader.readexactly(length)

    @staticmethod
    async def _read_rtu(reader: asyncio.StreamReader) -> bytes | None:
        frame = b""
        while (length := request_length(frame)) == 0:
            frame += await reader.readexactly(1)
        if length is None:
            return None
        frame += await reader.readexactly(length - len(frame))
        return frame if crc(frame[:-2]) == frame[-2:] else None


class SerialSlave:
    """Answers on a pty whose name is `link`, until closed."""

    def __init__(self, exchange: Replies, timing: LineTiming) -> None:
        self._exchange, self._timing = exchange, timing
        self._link = self._name = ""
        self._line: SerialLine | None = None
        self._fd = -1
        self._heard = b""
        self._flush: asyncio.TimerHandle | None = None
        self._requests: asyncio.Queue[bytes] = asyncio.Queue(_WAITING_MAX)
        self._worker: asyncio.Task[None] | None = None
        self._said_at_s = float("-inf")

    async def listen(self, link: str) -> str:
        """Begin; the wire's name. Raises MapError when the link's name is taken by something else."""
        self._link = link
        self._open()
        self._worker = asyncio.get_running_loop().create_task(self._work())
        return f"rtu://{self._name}?baud={self._timing.baud}&parity=N"

    def _open(self) -> None:
        self._name = str(Path(self._link).absolute())
        self._line = SerialLine(self._link)
        self._fd = os.open(self._line.device_end, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        asyncio.get_running_loop().add_reader(self._fd, self._readable)

    async def unplug(self) -> None:
        """The adapter is pulled: its name is gone, and whoever had it open reads an error."""
        if self._line is not None:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._line.close()
            self._line = None

    async def plug(self) -> None:
        """It is back, under the same name."""
        if self._line is None:
            with contextlib.suppress(MapError):
                self._open()

    async def close(self) -> None:
        """Pull the cable for good."""
        await self.unplug()
        if self._flush is not None:
            self._flush.cancel()
        if self._worker is not None:
            self._worker.cancel()
            await asyncio.gather(self._worker, return_exceptions=True)

    def _readable(self) -> None:
        if self._flush is not None:
            self._flush.cancel()
        with contextlib.suppress(BlockingIOError):  # woken for nothing
            self._heard = (self._heard + os.read(self._fd, _FRAME_BYTES_MAX))[-2 * _FRAME_BYTES_MAX :]
        while (length := request_length(self._heard)) and len(self._heard) >= length:
            frame, self._heard = self._heard[:length], self._heard[length:]
            if not self._take(frame):
                self._heard = b""  # out of step: wait for the next silence, as a slave does
        if self._heard:
            self._flush = asyncio.get_running_loop().call_later(_FLUSH_S, self._silence)

    def _silence(self) -> None:
        frame, self._heard = self._heard, b""
        self._take(frame)

    def _take(self, frame: bytes) -> bool:
        sound = 4 <= len(frame) <= _FRAME_BYTES_MAX and crc(frame[:-2]) == frame[-2:]
        if sound and not self._requests.full():
            self._requests.put_nowait(frame)
        return sound

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            request = await self._requests.get()
            if loop.time() - self._said_at_s < self._timing.gap_ms / 1000 * _GAP_GRACE:
                self._exchange.tap("master", request)
                continue  # the device was still busy with itself
            said = await self._exchange.reply("rtu", request) or []
            on_the_wire = len(request)
            for wait_s, data in said:
                await asyncio.sleep(wait_s + self._timing.taken_s(on_the_wire + len(data)))
                on_the_wire = 0
                self._exchange.tap("device", data)
                if self._line is not None:
                    with contextlib.suppress(BlockingIOError):  # nobody reads: a full line loses bytes
                        os.write(self._fd, data)
                self._said_at_s = loop.time()
