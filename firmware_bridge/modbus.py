"""One bus, one owner: pymodbus (TCP, RTU, RTU over TCP) behind a class that checks before it believes.

Rules (BRIDGE, the wire)
* pymodbus takes a late reply as the answer to any next request, even a late *read* as the acknowledgement of
  a STOP. So its client only connects and carries bytes; `frames.py` judges every answer before it is believed.
* An answer is one frame and nothing else: on a serial line it is believed only after a silence that no frame contains
  (1.5 characters), and the next question leaves only after the one that separates frames (3.5 characters).
* After any time-out or rejected reply the bus stays silent until nothing came for max(turnaround, 0.5 s).
* One owner task per bus takes requests by priority, STOP first, and chooses only when the bus may speak again.
* Nothing is repeated but reads, once; whoever writes decides for himself, after a read-back.
* An adapter that repeats our own words (local echo) is found out by the first read and its echo taken off from then
  on. Until then a write may be "acknowledged" by its own echo: another reason to read back.
* A connection is made here and nowhere else; a client object that failed is thrown away.

May not know: device maps, quantities, charging, the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import heapq
import itertools
import logging
import os
import termios
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pymodbus.client import AsyncModbusSerialClient, AsyncModbusTcpClient
from pymodbus.transport.serialtransport import SerialTransport

from firmware_bridge import frames
from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.frames import Asked

# pymodbus reports every faulty frame at ERROR; here faulty frames are daily business and become named errors.
logging.getLogger("pymodbus").setLevel(logging.CRITICAL)

QUARANTINE_S = 0.5  # BRIDGE rule 2
_HEARD_BYTES_MAX = (
    1024  # an echo and an answer are 520 bytes at most; a babbling line does not fill the memory
)
_CHUNK_BYTES = 1024  # of a serial port at once; the rest comes in the next turn
_CHUNK_BYTES_MAX = 1 << 20  # what one read of the system may bring; the library would drop longer ones unseen
_TURN_S = 0.0002  # an answer is handed over this much before its silence ends: the next question is as long on its way
_PAUSE_S_MAX = 0.01  # a gap between frames is slept exactly, a quarantine is not
_QUEUE_MAX = 64  # requests waiting: a caller gone wild is told so instead of filling the memory
_BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0)  # between attempts to connect (BRIDGE rule 4: at most 2 s)
_SILENT_MAX = 2  # unanswered requests before the connection is thrown away (half-open TCP, hung adapter)
_READ_ATTEMPTS = 2
_CANCEL_EVERY_S = 0.25
_QUARANTINES_MAX = 8  # a bus that never falls silent (another master, noise) ends in an error, not in waiting


class Priority(IntEnum):
    """Who goes first on the bus."""

    STOP = 0
    CONTROL = 1
    POLL = 2


@dataclass(frozen=True, slots=True)
class Wire:
    """Where a device is reached. Build it with `parse_wire`."""

    kind: Literal["tcp", "rtu", "rtu+tcp"]
    host: str = ""
    port: int = 0
    path: str = ""
    baud: int = 19200
    parity: str = "N"
    stop_bits: int = 1

    @property
    def bus_key(self) -> str:
        """Equal for two wires that are one bus, whatever name the port was given."""
        return (
            f"serial:{os.path.realpath(self.path)}"
            if self.kind == "rtu"
            else f"{self.kind}:{self.host}:{self.port}"
        )

    def __str__(self) -> str:
        if self.kind == "rtu":
            return f"rtu://{self.path}?baud={self.baud}&parity={self.parity}&stop_bits={self.stop_bits}"
        return f"{self.kind}://{self.host}:{self.port}"

    @property
    def character_gap_s(self) -> float:
        """The 3.5 characters of silence RTU wants between frames; fixed at 1.75 ms above 19200 baud."""
        if self.kind != "rtu":
            return 0.0
        return max(0.00175, 3.5 * 11 / self.baud)


def parse_wire(
    text: str, *, tcp_port: int = 502, baud: int = 19200, parity: str = "N", stop_bits: int = 1
) -> Wire:
    """`tcp://host[:port]`, `rtu+tcp://host[:port]` or `rtu:///dev/...?baud=&parity=&stop_bits=`; MapError
    otherwise.

    The keyword arguments are the device map's own defaults for what the text leaves out.
    """
    parts = urlsplit(text)
    options = dict(parse_qsl(parts.query))
    try:
        if parts.scheme in ("tcp", "rtu+tcp") and parts.hostname and not options and parts.path in ("", "/"):
            kind: Literal["tcp", "rtu+tcp"] = "tcp" if parts.scheme == "tcp" else "rtu+tcp"
            return Wire(kind, host=parts.hostname, port=parts.port or tcp_port)
        if parts.scheme == "rtu" and parts.path.startswith("/") and not parts.netloc:
            wire = Wire(
                "rtu",
                path=parts.path,
                baud=int(options.pop("baud", baud)),
                parity=options.pop("parity", parity).upper(),
                stop_bits=int(options.pop("stop_bits", stop_bits)),
            )
            if not options and wire.parity in ("N", "E", "O") and wire.stop_bits in (1, 2) and wire.baud > 0:
                return wire
    except ValueError:
        pass  # a port or a rate that is no number: same answer as below
    raise MapError(
        f"wire = {text!r} is not understood; write tcp://host:port, rtu+tcp://host:port "
        "or rtu:///dev/serial/by-id/NAME?baud=19200&parity=E&stop_bits=1"
    )


@dataclass(frozen=True, slots=True)
class Timing:
    """What the slowest device on the bus needs. Milliseconds."""

    request_timeout_ms: int = 400
    turnaround_ms: int = 500
    gap_ms: int = 0


@dataclass(order=True, slots=True)
class _Request:
    priority: int
    number: int
    asked: Asked = field(compare=False)
    spare: int = field(compare=False)
    deadline_s: float = field(compare=False)
    answer: asyncio.Future[tuple[int, ...]] = field(compare=False)
    listening: _Listening | None = field(compare=False, default=None)  # once it is on the wire


class _Listening:
    """Everything heard since one question was put. `ended` is done when that is a whole frame, or no answer any more."""

    def __init__(
        self,
        asked: Asked,
        transaction_id: int | None,
        *,
        echoes: bool,
        at_once: asyncio.Future[tuple[int, ...]] | None,
    ) -> None:
        """`at_once`: told a good answer when it is heard, where no silence must follow it."""
        self.asked = asked
        self.question = (
            frames.rtu_frame(asked) if transaction_id is None else frames.tcp_frame(asked, transaction_id)
        )
        self.heard = b""
        self.heard_at_s = 0.0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.surplus = 0  # bytes behind the answer
        self._transaction_id = transaction_id
        self._echoes = echoes
        self._at_once = at_once
        self._bytes_wanted = self._bytes_judged = 0
        self._words: tuple[int, ...] | None = None

    def hear(self, data: bytes) -> None:
        """Bytes came. They may come after `ended` too: then they are seen by `verdict`."""
        self.heard = (self.heard + data)[:_HEARD_BYTES_MAX]
        self.heard_at_s = asyncio.get_running_loop().time()
        if self.ended.done() or len(self.heard) < self._bytes_wanted:
            return
        try:
            answer = self._answer()
            size = self._size(answer)
        except BridgeError:
            self.ended.set_result(None)  # `verdict` will say why
        else:
            self._bytes_wanted = size  # a slow line brings byte by byte: not each is worth a look
            if size and len(answer) >= size:
                self.ended.set_result(None)  # the owner wakes first, and then the caller
                self._tell()

    def _tell(self) -> None:
        """Spare a good answer the way through the owner."""
        if self._at_once is not None and not self._at_once.done():
            with contextlib.suppress(BridgeError):  # the owner will say why
                self._at_once.set_result(self.verdict())

    def expire_in(self, seconds: float) -> None:
        """End with a TimeoutError then."""
        self._expiry = asyncio.get_running_loop().call_later(seconds, self.end, TimeoutError())

    def end(self, error: Exception) -> None:
        """There will be no answer."""
        if not self.ended.done():
            self.ended.set_exception(error)

    def close(self) -> None:
        """Nobody waits any more."""
        self._expiry.cancel()
        self.ended.cancel()

    def verdict(self) -> tuple[int, ...]:
        """The words that were asked for; BridgeError `wrong_reply` or `exception_N` if that is not what came."""
        if self._words is not None and len(self.heard) == self._bytes_judged:
            return self._words
        self._bytes_judged = len(self.heard)
        answer = self._answer()
        size = self._size(answer)
        if not size or len(answer) < size:
            raise BridgeError(
                "wrong_reply", f"{len(answer)} bytes came, and then nothing: {answer[:16].hex(' ')}"
            )
        self.surplus = len(answer) - size
        if self._transaction_id is not None:
            self._words = frames.open_tcp(answer[:size], self.asked, self._transaction_id)
            return self._words
        if self.surplus and not self._is_acknowledged_and_echoed:
            raise BridgeError("wrong_reply", f"{self.surplus} bytes too many came; is there a second master?")
        self._words = frames.open_rtu(answer[:size], self.asked)
        return self._words

    @property
    def _is_acknowledged_and_echoed(self) -> bool:
        """Our own words twice: one may be an echo, the other is the device's acknowledgement."""
        return self.asked.echo_is_answer and self.heard == 2 * self.question

    @property
    def is_echoed(self) -> bool:
        """True when our own words came back, which no device can say in answer to this question."""
        echo_tells = self._transaction_id is None and not self.asked.echo_is_answer
        return echo_tells and self.heard.startswith(self.question)

    @property
    def is_answered(self) -> bool:
        """True when anything came that was not our own echo."""
        return bool(self.heard) and not (self._echoes and self.question.startswith(self.heard))

    def _answer(self) -> bytes:
        if not self._echoes or not self.heard:
            return self.heard
        if self.heard.startswith(self.question):
            return self.heard[len(self.question) :]
        if self.question.startswith(self.heard):
            return b""
        raise BridgeError(
            "wrong_reply", "the adapter's echo of our own words is missing or was bent on the line"
        )

    def _size(self, answer: bytes) -> int:
        if self._transaction_id is None:
            return frames.rtu_size(answer, self.asked)
        return frames.tcp_size(answer)


async def _pause_until(then_s: float) -> None:
    """A short sleep that ends in time. The event loop counts whole milliseconds, up to one too many, which at 115200 baud
    is a fifth of an exchange; the rest is spent going round the loop, where everybody else still gets his turn.
    """
    loop = asyncio.get_running_loop()
    if (whole_ms := int((then_s - loop.time()) * 1000)) > 0:
        await asyncio.sleep(whole_ms / 1000)
    while loop.time() < then_s:  # noqa: ASYNC110 - nothing happens that could be waited for; it is the time
        await asyncio.sleep(0)


class _SerialTransport(SerialTransport):
    """The library's, in three things better: it gives a port back that it could open and not set up (and else keeps locked
    until somebody collects it), writes now and not a turn of the loop later, and reads without asking again whether it may.
    """

    def __init__(self, *given: Any) -> None:
        try:
            super().__init__(*given)
        except Exception:
            if (port := getattr(self, "sync_serial", None)) is not None:
                port.close()
            raise

    def write(self, data: Any) -> None:
        """Send; what the port does not take at once is sent when it does."""
        taken = 0
        if not self.intern_write_buffer:
            try:
                taken = os.write(self.sync_serial.fileno(), data)
            except BlockingIOError:
                pass
            except OSError as exc:
                self.close(exc=exc)
                return
        if taken < len(data):
            super().write(data[taken:])

    def intern_read_ready(self) -> None:
        """Bytes came, or the port went away."""
        try:
            data = os.read(self.sync_serial.fileno(), _CHUNK_BYTES)
        except BlockingIOError:
            return
        except OSError as exc:
            self.close(exc=exc)
            return
        if data:
            self.intern_protocol.data_received(data)  # type: ignore[attr-defined]
        else:
            self.close(exc=ConnectionError("the port is ready to read and has nothing: unplugged"))


async def _open_serial(
    wire: Wire, new_protocol: Callable[[], Any]
) -> tuple[asyncio.Transport, asyncio.BaseProtocol]:
    """What the library's `create_serial_connection` does, with our transport."""
    loop, protocol = asyncio.get_running_loop(), new_protocol()
    transport = _SerialTransport(loop, protocol, wire.path, wire.baud, 8, wire.parity, wire.stop_bits, 0)
    loop.call_soon(transport.setup)
    return transport, protocol


class Bus:
    """One serial port or one TCP connection, owned by one task. Several device ids may share it.

    Use `await bus.open()`, `read`, `write`, `await bus.close()`. All raise BridgeError: `unreachable`,
    `port_missing`, `port_denied`, `port_locked`, `timeout`, `wrong_reply`, `exception_N`, `bus_busy`,
    `bus_noisy`, `closed`.
    """

    def __init__(self, wire: Wire, timing: Timing | None = None) -> None:
        self.wire = wire
        self.timing = timing or Timing()
        self.rejected = 0  # replies that were not believed; for the commissioning report and tests
        self._client: AsyncModbusTcpClient | AsyncModbusSerialClient | None = None
        self._waiting: list[_Request] = []  # a heap
        self._wanted = asyncio.Event()  # set while somebody waits
        self._begun: _Request | None = None  # a question that left before the owner woke up
        self._is_resting = False  # the owner waits for somebody to want something
        self._owner: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._varied = itertools.count()
        self._last_count = 0
        self._transaction_ids = itertools.count(1)  # goes on through a reconnect: a gateway may remember
        self._listening: _Listening | None = None
        self._echoes = False
        self._silent_until_s = 0.0
        self._unanswered = 0
        self._failed_connects = 0
        self._next_connect_s = 0.0

    # -------------------------------------------------------------- what others call
    async def open(self) -> None:
        """Connect once, so that a wrong address or a locked port is known before anything depends on it."""
        if self._owner is not None:
            return
        await self._connect(urgent=True)
        self._owner = asyncio.create_task(self._own(), name=f"bus {self.wire}")

    async def read(
        self,
        device_id: int,
        fc: int,
        address: int,
        count: int,
        *,
        spare: int = 0,
        priority: Priority = Priority.POLL,
    ) -> tuple[int, ...]:
        """`count` words (or bits, as 0 and 1) from `address`; tried twice.

        `spare` more registers may be read and thrown away: no two requests in a row then have the same length, so
        that on a wire without transaction ids a reply to the one before is told from the right one.
        """
        last: BridgeError | None = None
        for _ in range(_READ_ATTEMPTS):
            try:
                return (await self._ask(Asked(fc, device_id, address, count), priority, spare))[:count]
            except BridgeError as exc:
                last = exc
                if exc.name not in ("timeout", "wrong_reply", "unplugged"):
                    break
        assert last is not None
        raise last

    async def write(
        self,
        device_id: int,
        fc: int,
        address: int,
        values: Sequence[int],
        *,
        priority: Priority = Priority.CONTROL,
    ) -> None:
        """Write once. After an error the caller does not know what the device holds and must read it back."""
        await self._ask(Asked(fc, device_id, address, len(values), tuple(values)), priority)

    async def close(self) -> None:
        """Give the wire back; requests still waiting fail with `closed`. Never raises."""
        if self._owner is not None:
            # More than once if needed: before Python 3.12, `asyncio.wait_for` in the library can swallow one.
            while not self._owner.done():
                self._owner.cancel()
                await asyncio.wait({self._owner}, timeout=_CANCEL_EVERY_S)
            self._owner = None
        self._drop()

    # -------------------------------------------------------------- the owner
    async def _ask(self, asked: Asked, priority: Priority, spare: int = 0) -> tuple[int, ...]:
        if self._owner is None or self._owner.done():
            raise BridgeError("closed", f"{self.wire} is not open")
        if len(self._waiting) >= _QUEUE_MAX:
            raise BridgeError("bus_busy", f"{_QUEUE_MAX} requests wait for {self.wire}; poll it less often")
        frames.question(asked)  # what cannot be asked is the caller's mistake, not the owner's end
        loop = asyncio.get_running_loop()
        # Long enough for a request ahead of us, its quarantine and a reconnect; older ones are dropped.
        patience_s = 2 * self._request_timeout_s + 2 * self._quarantine_s + 2.0
        request = _Request(
            priority, next(self._numbers), asked, spare, loop.time() + patience_s, loop.create_future()
        )
        if self._is_resting and self._may_speak:
            # Nobody is before us: the question leaves now, and the owner finds it on its way.
            self._is_resting = False
            self._begun, request.listening = request, self._begin(request)
        else:
            heapq.heappush(self._waiting, request)
        self._wanted.set()
        return await request.answer

    async def _own(self) -> None:
        try:
            while True:
                self._is_resting = not self._waiting
                await self._wanted.wait()
                self._is_resting = False
                if self._begun is not None:
                    await self._settle(self._begun, None)
                    self._begun = None
                else:
                    noise = await self._be_silent()  # first: a STOP that comes meanwhile is the one chosen
                    await self._settle(heapq.heappop(self._waiting), noise)
                if not self._waiting:
                    self._wanted.clear()
        finally:
            while self._waiting:
                self._fail(self._waiting.pop(), BridgeError("closed", f"{self.wire} was closed"))
            if self._begun is not None and self._begun.listening is not None:
                self._begun.listening.close()
                self._fail(self._begun, BridgeError("closed", f"{self.wire} was closed"))

    async def _settle(self, request: _Request, noise: BridgeError | None) -> None:
        """Give the request its answer or its error, whatever happens to the owner."""
        if request.answer.done() and request.listening is None:
            return  # the caller gave up before his question left
        try:
            if noise is not None:
                raise noise
            result = await self._serve(request)
        except BridgeError as exc:
            self._fail(request, exc)
        except BaseException:
            self._fail(request, BridgeError("closed", f"{self.wire} was closed"))
            raise
        else:
            if not request.answer.done():
                request.answer.set_result(result)

    @staticmethod
    def _fail(request: _Request, error: BridgeError) -> None:
        if not request.answer.done():
            request.answer.set_exception(error)

    async def _serve(self, request: _Request) -> tuple[int, ...]:
        if request.listening is None:
            if asyncio.get_running_loop().time() > request.deadline_s:
                raise BridgeError("timeout", f"{self.wire} was busy with other requests for too long")
            await self._connect(urgent=request.priority == Priority.STOP)
            request.listening = self._begin(request)
        try:
            return await self._exchange(request.listening)
        except BridgeError as exc:
            # On RTU even an exception may be a late one, and then the true reply is still under way.
            if not exc.name.startswith("exception_") or self.wire.kind != "tcp":
                self._quarantine()
            raise

    def _lengthened(self, request: _Request) -> Asked:
        """The question, with as many spare registers as make its length another than the last one's."""
        asked = request.asked
        if request.spare:
            counts = [asked.count + next(self._varied) % (request.spare + 1) for _ in range(2)]
            longer = counts[1] if counts[0] == self._last_count else counts[0]
            asked = Asked(asked.fc, asked.device_id, asked.address, min(longer, frames.WORDS_READ_MAX))
        self._last_count = asked.count
        return asked

    def _begin(self, request: _Request) -> _Listening:
        """Put the question on the wire; from now on whatever is heard belongs to it."""
        assert self._client is not None
        transaction_id = next(self._transaction_ids) & 0xFFFF if self.wire.kind == "tcp" else None
        at_once = None if self.wire.character_gap_s else request.answer
        listening = _Listening(
            self._lengthened(request), transaction_id, echoes=self._echoes, at_once=at_once
        )
        self._listening = listening
        try:
            self._client.ctx.send(listening.question)
        except (OSError, termios.error) as exc:
            listening.end(exc)
        listening.expire_in(self._request_timeout_s)
        return listening

    async def _exchange(self, listening: _Listening) -> tuple[int, ...]:
        """One question that is on its way, and its answer."""
        try:
            await listening.ended
            self._silent_until_s = listening.heard_at_s + self._gap_s
            result = listening.verdict()
            if gap_s := self.wire.character_gap_s:  # the next request must keep this silence anyway
                await _pause_until(listening.heard_at_s + gap_s - _TURN_S)
                result = listening.verdict()  # the same, unless more was heard
        except TimeoutError as exc:
            self._unanswered_by(listening)
            raise BridgeError("timeout", self._timeout_meaning(listening.asked)) from exc
        except (OSError, termios.error) as exc:  # SerialException is an OSError, termios.error is not
            self._drop()
            raise BridgeError("unplugged", f"{self.wire} went away: {exc}") from exc
        except BridgeError as exc:
            self._unanswered = 0
            if not exc.name.startswith("exception_"):
                self.rejected += 1
                self._learn_echo(listening)
            raise
        finally:
            listening.close()
            self._listening = None
        self._unanswered = 0
        if listening.surplus:
            self._quarantine()  # somebody talks unasked
        return result

    def _unanswered_by(self, listening: _Listening) -> None:
        """Nothing, or less than an answer, came in time."""
        self._learn_echo(listening)
        self._unanswered = 0 if listening.is_answered else self._unanswered + 1
        if listening.is_answered:
            self.rejected += 1
        if self._unanswered >= _SILENT_MAX:
            self._drop()

    def _learn_echo(self, listening: _Listening) -> None:
        if listening.is_echoed:
            self._echoes = True
        elif listening.heard and not listening.question.startswith(listening.heard):
            self._echoes = False  # another adapter, or the old one set right

    # -------------------------------------------------------------- silence
    @property
    def _request_timeout_s(self) -> float:
        return self.timing.request_timeout_ms / 1000

    @property
    def _quarantine_s(self) -> float:
        return max(QUARANTINE_S, self.timing.turnaround_ms / 1000)

    @property
    def _gap_s(self) -> float:
        return max(self.timing.gap_ms / 1000, self.wire.character_gap_s)

    @property
    def _may_speak(self) -> bool:
        connected = self._client is not None and self._client.connected
        return connected and asyncio.get_running_loop().time() >= self._silent_until_s

    def _quarantine(self) -> None:
        self._silent_until_s = asyncio.get_running_loop().time() + self._quarantine_s

    async def _be_silent(self) -> BridgeError | None:
        """Wait until nothing was owed or heard for long enough; bytes nobody asked for restart the wait.

        The error, if the line never falls silent.
        """
        loop = asyncio.get_running_loop()
        for _ in range(_QUARANTINES_MAX):
            wait_s = self._silent_until_s - loop.time()
            if wait_s <= 0:
                return None
            await (asyncio.sleep(wait_s) if wait_s > _PAUSE_S_MAX else _pause_until(self._silent_until_s))
        self._drop()
        return BridgeError(
            "bus_noisy", f"{self.wire} does not fall silent; is there a second master, or a wrong baud rate?"
        )

    def _heard(self, _sending: bool, data: bytes) -> bytes:
        """The library's ear, and ours: it keeps nothing of what came."""
        if self._client is not None:
            self._client.ctx.recv_buffer = b""
        if self._listening is None:
            self._quarantine()
        else:
            self._listening.hear(data)
        return b""

    def _lost(self, connected: bool) -> None:
        """The library lost the connection (or made one): whoever listens is told now, not after his time-out."""
        if not connected and self._listening is not None:
            self._listening.end(ConnectionError("the other side closed the connection"))

    # -------------------------------------------------------------- connecting
    async def _connect(self, *, urgent: bool) -> None:
        """Make a connection unless there is one. If not urgent, fail at once soon after a failed attempt."""
        if self._client is not None and self._client.connected:
            return
        self._drop()
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_connect_s and not urgent:
            raise BridgeError("unreachable", f"{self.wire} does not answer; trying again shortly")
        self._client = self._new_client()
        try:
            connected = await self._client.connect()
        except (
            OSError,
            termios.error,
            ValueError,
            OverflowError,
        ) as exc:  # a rate may be no rate of this system's
            self._connect_failed()
            raise BridgeError(
                "port_refused",
                f"{self.wire}: {exc}; the port does not take this rate or parity (a pty takes parity=N only)",
            ) from exc
        if not connected:
            self._connect_failed()
            raise _why_unreachable(self.wire)
        self._client.ctx.max_buffer_size = _CHUNK_BYTES_MAX
        self._failed_connects = 0
        self._unanswered = 0

    def _connect_failed(self) -> None:
        self._drop()
        delay_s = _BACKOFF_S[min(self._failed_connects, len(_BACKOFF_S) - 1)]
        self._failed_connects += 1
        self._next_connect_s = asyncio.get_running_loop().time() + delay_s

    def _new_client(self) -> AsyncModbusTcpClient | AsyncModbusSerialClient:
        wire = self.wire
        if wire.kind == "rtu":
            client = AsyncModbusSerialClient(
                wire.path,
                baudrate=wire.baud,
                parity=wire.parity,
                stopbits=wire.stop_bits,
                timeout=self._request_timeout_s,
                retries=0,
                reconnect_delay=0,  # we reconnect ourselves, with a fresh object
                trace_packet=self._heard,
                trace_connect=self._lost,
            )
            client.ctx.call_create = partial(_open_serial, wire, client.ctx.handle_new_connection)
            return client
        return AsyncModbusTcpClient(
            wire.host,
            port=wire.port,
            timeout=self._request_timeout_s,
            retries=0,
            reconnect_delay=0,
            trace_packet=self._heard,
            trace_connect=self._lost,
        )

    def _drop(self) -> None:
        if self._client is not None:
            with contextlib.suppress(OSError, termios.error):
                self._client.close()
            self._client = None

    def _timeout_meaning(self, asked: Asked) -> str:
        return (
            f"device {asked.device_id} on {self.wire} did not answer within {self.timing.request_timeout_ms} "
            f"ms (function {asked.fc}, address {asked.address}); check device id, power and wiring"
        )


def _why_unreachable(wire: Wire) -> BridgeError:
    """Ask the system why a connection failed, so that the message says what to do."""
    if wire.kind != "rtu":
        return BridgeError(
            "unreachable",
            f"nothing answers at {wire.host}:{wire.port}; is the charger powered and on this network, and is "
            "Modbus TCP enabled in it? Most chargers accept one connection: stop whatever else holds it",
        )
    if not Path(wire.path).exists():
        return BridgeError(
            "port_missing", f"{wire.path} does not exist; plug the adapter in, then see ls /dev/serial/by-id/"
        )
    try:
        port = os.open(wire.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except PermissionError:
        return BridgeError(
            "port_denied",
            f"no permission for {wire.path}; add this user to the group that owns it (dialout on Debian): "
            "usermod -aG dialout USER, then log in again",
        )
    except OSError as exc:
        return BridgeError("unreachable", f"{wire.path} cannot be opened: {exc.strerror}")
    try:
        fcntl.flock(port, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return BridgeError(
                "port_locked", f"another program holds {wire.path}; find it with: fuser -v {wire.path}"
            )
        return BridgeError("unreachable", f"{wire.path} cannot be locked: {exc.strerror}")
    finally:
        os.close(port)
    return BridgeError(
        "unreachable", f"{wire.path} opened only for the second attempt; check the adapter and its cable"
    )


class Buses:
    """The buses of one process: two devices on the same port or host share one owner task."""

    def __init__(self) -> None:
        self._users: dict[Bus, int] = {}
        self._opening: dict[str, asyncio.Lock] = {}  # two who come at once must not each open one

    async def lease(self, wire: Wire, timing: Timing) -> Bus:
        """The bus of this wire, opened if it is not. A slower device makes the shared bus slower. Give it
        back by `release`.
        """
        async with self._opening.setdefault(wire.bus_key, asyncio.Lock()):
            bus = await self._opened(wire, timing)
            self._users[bus] = self._users.get(bus, 0) + 1
            return bus

    async def _opened(self, wire: Wire, timing: Timing) -> Bus:
        # Keys are compared anew each time: an adapter that was plugged in again has another name behind its link.
        bus = next((bus for bus in self._users if bus.wire.bus_key == wire.bus_key), None)
        if bus is None:
            bus = Bus(wire, timing)
            await bus.open()
        elif (bus.wire.baud, bus.wire.parity, bus.wire.stop_bits) != (wire.baud, wire.parity, wire.stop_bits):
            raise MapError(
                f"{wire} is already open as {bus.wire}; devices on one bus share baud rate and parity"
            )
        else:
            bus.timing = Timing(
                max(bus.timing.request_timeout_ms, timing.request_timeout_ms),
                max(bus.timing.turnaround_ms, timing.turnaround_ms),
                max(bus.timing.gap_ms, timing.gap_ms),
            )
        return bus

    async def release(self, bus: Bus) -> None:
        """Give a leased bus back; the last one closes it."""
        users = self._users.pop(bus, 1)
        if users > 1:
            self._users[bus] = users - 1
        else:
            await bus.close()
