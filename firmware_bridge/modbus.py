"""One bus, one owner: pymodbus (TCP, RTU, RTU over TCP) behind a class that checks before it believes.

Rules (BRIDGE, the wire)
* pymodbus takes a late reply as the answer to any next request, even a late *read* as the acknowledgement of
  a STOP. So one function, `check_reply`, judges every reply: type, function code, device id, length, echoed
  address and value.
* After any time-out or rejected reply the bus stays silent until nothing came for max(turnaround, 0.5 s).
* One owner task per bus takes requests from a priority queue, STOP first. Each request has its own deadline.
* The library retries nothing. We retry reads only; whoever writes decides for himself, after a read-back.
* A connection is made here and nowhere else; a client object that failed is thrown away.

May not know: device maps, quantities, charging, the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import itertools
import logging
import os
import termios
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qsl, urlsplit

from pymodbus import FramerType, ModbusException
from pymodbus.client import AsyncModbusSerialClient, AsyncModbusTcpClient
from pymodbus.pdu import ExceptionResponse, ModbusPDU
from pymodbus.pdu import bit_message as bits
from pymodbus.pdu import register_message as words

from firmware_bridge.charger import BridgeError, MapError

# pymodbus reports every faulty frame at ERROR; here faulty frames are daily business and become named errors.
logging.getLogger("pymodbus").setLevel(logging.CRITICAL)

QUARANTINE_S = 0.5  # BRIDGE rule 2
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


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for: everything a reply is held against."""

    fc: int
    device_id: int
    address: int
    count: int
    words: tuple[int, ...] = ()  # what was written; empty for a read


_REPLY_TYPES: dict[int, type[ModbusPDU]] = {
    1: bits.ReadCoilsResponse,
    2: bits.ReadDiscreteInputsResponse,
    3: words.ReadHoldingRegistersResponse,
    4: words.ReadInputRegistersResponse,
    5: bits.WriteSingleCoilResponse,
    6: words.WriteSingleRegisterResponse,
    16: words.WriteMultipleRegistersResponse,
}


def check_reply(reply: ModbusPDU, asked: Asked, transaction_id: int | None) -> tuple[int, ...]:
    """The words of a read reply, `()` for a write, once every field agrees with the question.

    `transaction_id` is what the request carried, None where the wire has none (RTU). Raises BridgeError
    `exception_N` for the device's own refusal and `wrong_reply` for everything that is not the answer to this
    question.
    """
    if reply.dev_id != asked.device_id:
        raise BridgeError("wrong_reply", f"asked device {asked.device_id}, device {reply.dev_id} answered")
    if transaction_id is not None and reply.transaction_id != transaction_id:
        raise BridgeError("wrong_reply", f"transaction {reply.transaction_id} instead of {transaction_id}")
    if isinstance(reply, ExceptionResponse):
        if reply.function_code & 0x7F != asked.fc:
            raise BridgeError(
                "wrong_reply", f"an exception to function {reply.function_code & 0x7F}, asked {asked.fc}"
            )
        raise BridgeError(
            f"exception_{reply.exception_code}", _exception_meaning(reply.exception_code, asked)
        )
    if type(reply) is not _REPLY_TYPES[asked.fc] or reply.function_code != asked.fc:
        raise BridgeError("wrong_reply", f"function {reply.function_code} answered, asked {asked.fc}")
    if asked.fc in (1, 2):
        if len(reply.bits) != (asked.count + 7) // 8 * 8:
            raise BridgeError("wrong_reply", f"{len(reply.bits)} bits came, asked {asked.count}")
        return tuple(int(bit) for bit in reply.bits[: asked.count])
    if asked.fc in (3, 4):
        if len(reply.registers) != asked.count:
            raise BridgeError("wrong_reply", f"{len(reply.registers)} registers came, asked {asked.count}")
        return tuple(reply.registers)
    _check_echo(reply, asked)
    return ()


def _check_echo(reply: ModbusPDU, asked: Asked) -> None:
    if reply.address != asked.address:
        raise BridgeError("wrong_reply", f"address {reply.address} echoed, wrote {asked.address}")
    if asked.fc == 16:
        if reply.count != asked.count:
            raise BridgeError("wrong_reply", f"{reply.count} registers acknowledged, wrote {asked.count}")
        return
    echoed = int(reply.bits[0]) if asked.fc == 5 else reply.registers[0]
    if echoed != asked.words[0]:
        raise BridgeError("wrong_reply", f"value {echoed} echoed, wrote {asked.words[0]}")


def _exception_meaning(code: int, asked: Asked) -> str:
    meanings = {
        1: "the device does not know this function code",
        2: "the device has no such address",
        3: "the device refuses this value",
        4: "the device failed while answering",
        6: "the device is busy",
        10: "the gateway has no path to the device",
        11: "the gateway got no answer from the device; check the device id",
    }
    what = meanings.get(code, "the device refused")
    asked_for = f"function {asked.fc}, address {asked.address}, count {asked.count}, device {asked.device_id}"
    return f"{what} ({asked_for})"


@dataclass(order=True, slots=True)
class _Request:
    priority: int
    number: int
    asked: Asked = field(compare=False)
    deadline_s: float = field(compare=False)
    answer: asyncio.Future[tuple[int, ...]] = field(compare=False)


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
        self._queue: asyncio.PriorityQueue[_Request] = asyncio.PriorityQueue(_QUEUE_MAX)
        self._owner: asyncio.Task[None] | None = None
        self._numbers = itertools.count()
        self._varied = itertools.count()
        self._asking = False
        self._last_byte_s = 0.0
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

        `spare` more registers may be read and thrown away: the varying length tells a late reply from the
        right one.
        """
        last: BridgeError | None = None
        for _ in range(_READ_ATTEMPTS):
            longer = count + next(self._varied) % (spare + 1)
            try:
                return (await self._ask(Asked(fc, device_id, address, longer), priority))[:count]
            except BridgeError as exc:
                last = exc
                if exc.name not in ("timeout", "wrong_reply"):
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
        while not self._queue.empty():
            self._fail(self._queue.get_nowait(), BridgeError("closed", f"{self.wire} was closed"))
        self._drop()

    # -------------------------------------------------------------- the owner
    async def _ask(self, asked: Asked, priority: Priority) -> tuple[int, ...]:
        if self._owner is None or self._owner.done():
            raise BridgeError("closed", f"{self.wire} is not open")
        loop = asyncio.get_running_loop()
        # Long enough for a request ahead of us, its quarantine and a reconnect; older ones are dropped.
        patience_s = 2 * self._request_timeout_s + 2 * self._quarantine_s + 2.0
        request = _Request(
            priority, next(self._numbers), asked, loop.time() + patience_s, loop.create_future()
        )
        try:
            self._queue.put_nowait(request)
        except asyncio.QueueFull:
            raise BridgeError(
                "bus_busy", f"{_QUEUE_MAX} requests wait for {self.wire}; poll it less often"
            ) from None
        return await request.answer

    async def _own(self) -> None:
        while True:
            request = await self._queue.get()
            if request.answer.done():
                continue  # the caller gave up
            try:
                result = await self._serve(request)
            except BridgeError as exc:
                self._fail(request, exc)
            except asyncio.CancelledError:
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
        await self._be_silent()
        if asyncio.get_running_loop().time() > request.deadline_s:
            raise BridgeError("timeout", f"{self.wire} was busy with other requests for too long")
        await self._connect(urgent=request.priority == Priority.STOP)
        try:
            return await self._exchange(request.asked)
        except BridgeError as exc:
            # On RTU even an exception may be a late one, and then the true reply is still under way.
            if not exc.name.startswith("exception_") or self.wire.kind != "tcp":
                self._quarantine()
            raise

    async def _exchange(self, asked: Asked) -> tuple[int, ...]:
        client = self._client
        assert client is not None
        self._asking = True
        try:
            # The library's own deadline is the inner one; this one catches a library that forgot it.
            async with asyncio.timeout(self._request_timeout_s + 0.2):
                reply = await self._send(client, asked)
        except (TimeoutError, ModbusException) as exc:
            self._unanswered += 1
            if self._unanswered >= _SILENT_MAX:
                self._drop()
            raise BridgeError("timeout", self._timeout_meaning(asked)) from exc
        except (OSError, termios.error) as exc:  # SerialException is an OSError, termios.error is not
            self._drop()
            raise BridgeError("unplugged", f"{self.wire} went away: {exc}") from exc
        finally:
            self._asking = False
            self._silent_until_s = asyncio.get_running_loop().time() + self._gap_s
        transaction_id = client.ctx.request_transaction_id if self.wire.kind == "tcp" else None
        try:
            result = check_reply(reply, asked, transaction_id)
        except BridgeError as exc:
            if not exc.name.startswith("exception_"):
                self.rejected += 1
            raise
        finally:
            self._unanswered = 0
        return result

    async def _send(self, client: AsyncModbusTcpClient | AsyncModbusSerialClient, asked: Asked) -> ModbusPDU:
        a, d, n, w = asked.address, asked.device_id, asked.count, asked.words
        match asked.fc:
            case 1:
                return await client.read_coils(a, count=n, device_id=d)
            case 2:
                return await client.read_discrete_inputs(a, count=n, device_id=d)
            case 3:
                return await client.read_holding_registers(a, count=n, device_id=d)
            case 4:
                return await client.read_input_registers(a, count=n, device_id=d)
            case 5:
                return await client.write_coil(a, bool(w[0]), device_id=d)
            case 6:
                return await client.write_register(a, w[0], device_id=d)
            case 16:
                return await client.write_registers(a, list(w), device_id=d)
            case _:
                raise ValueError(f"function code {asked.fc} is none of ours")

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

    def _quarantine(self) -> None:
        self._silent_until_s = asyncio.get_running_loop().time() + self._quarantine_s

    async def _be_silent(self) -> None:
        """Wait until nothing was owed or heard for long enough; bytes nobody asked for restart the wait."""
        loop = asyncio.get_running_loop()
        for _ in range(_QUARANTINES_MAX):
            wait_s = self._silent_until_s - loop.time()
            if wait_s <= 0:
                return
            await asyncio.sleep(wait_s)
        self._drop()
        raise BridgeError(
            "bus_noisy", f"{self.wire} does not fall silent; is there a second master, or a wrong baud rate?"
        )

    def _heard(self, sending: bool, data: bytes) -> bytes:
        if not sending and not self._asking:
            self._quarantine()
        return data

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
        except (OSError, termios.error) as exc:
            self._connect_failed()
            raise BridgeError("port_refused", f"{self.wire}: {exc}; a pty takes parity=N only") from exc
        if not connected:
            self._connect_failed()
            raise _why_unreachable(self.wire)
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
            return AsyncModbusSerialClient(
                wire.path,
                baudrate=wire.baud,
                parity=wire.parity,
                stopbits=wire.stop_bits,
                timeout=self._request_timeout_s,
                retries=0,
                reconnect_delay=0,  # we reconnect ourselves, with a fresh object
                trace_packet=self._heard,
            )
        return AsyncModbusTcpClient(
            wire.host,
            port=wire.port,
            framer=FramerType.SOCKET if wire.kind == "tcp" else FramerType.RTU,
            timeout=self._request_timeout_s,
            retries=0,
            reconnect_delay=0,
            trace_packet=self._heard,
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
        self._open: dict[str, tuple[Bus, int]] = {}
        self._opening: dict[str, asyncio.Lock] = {}  # two who come at once must not each open one

    async def lease(self, wire: Wire, timing: Timing) -> Bus:
        """The bus of this wire, opened if it is not. A slower device makes the shared bus slower. Give it
        back by `release`.
        """
        async with self._opening.setdefault(wire.bus_key, asyncio.Lock()):
            return await self._lease(wire, timing)

    async def _lease(self, wire: Wire, timing: Timing) -> Bus:
        bus, users = self._open.get(wire.bus_key, (None, 0))
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
        self._open[wire.bus_key] = (bus, users + 1)
        return bus

    async def release(self, bus: Bus) -> None:
        """Give a leased bus back; the last one closes it."""
        key = bus.wire.bus_key
        held, users = self._open.get(key, (bus, 1))
        if users <= 1:
            self._open.pop(key, None)
            await held.close()
        else:
            self._open[key] = (held, users - 1)
