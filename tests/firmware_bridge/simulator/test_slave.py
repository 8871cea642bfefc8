"""The bytes of our own slave: honest frames, each lie as told, and silence where a real slave is silent."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from firmware_bridge.charger import MapError
from firmware_bridge.simulator.slave import (
    WIRE_FAULTS,
    Exchange,
    LineTiming,
    SerialSlave,
    TcpSlave,
    WireFault,
    crc,
    framed,
)

READ = bytes([3, 0, 100, 0, 2])  # two holding registers from 100
SAID = bytes([3, 4, 0x12, 0x34, 0x56, 0x78])
TIMEOUT_S = 10


class Told:
    """Faults from a list, one for each request; then none."""

    def __init__(self, *names: str, **options: int) -> None:
        self.names, self.options = list(names), options

    def of(self, device_id: int) -> WireFault | None:
        """The next one."""
        return WireFault(self.names.pop(0), **self.options) if self.names else None


class Device:
    """Device id 1 answers READ with SAID; what it was asked is kept."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []

    async def answer(self, device_id: int, pdu: bytes) -> bytes | None:
        """The reply of device 1; nobody else is here."""
        if device_id not in (0, 1):
            return None
        self.asked.append(pdu)
        return SAID if pdu == READ else bytes([pdu[0] | 0x80, 1])


@asynccontextmanager
async def tcp(device: Device, faults: Told | None = None, framing="tcp") -> AsyncIterator:
    """(reader, writer) of a connection to it."""
    slave = TcpSlave(Exchange(device.answer, faults, None), framing)
    wire = await slave.listen("127.0.0.1:0")
    reader, writer = await asyncio.open_connection("127.0.0.1", int(wire.rpartition(":")[2]))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            yield reader, writer
    finally:
        writer.close()
        await slave.close()


GOOD_TCP = framed("tcp", 7, 1, SAID)
TOLD_TCP = {
    "late": GOOD_TCP,
    "exception": framed("tcp", 7, 1, b"\x83\x06"),
    "wrong_crc": GOOD_TCP[:-1],
    "wrong_unit": framed("tcp", 7, 2, SAID),
    "wrong_tid": framed("tcp", 14, 1, SAID),
    "short": framed("tcp", 7, 1, bytes([3, 2, 0x12, 0x34])),
    "cut": GOOD_TCP[: len(GOOD_TCP) // 2],
    "split": GOOD_TCP,
    "garbage": b"\x00\xff\x13" + GOOD_TCP,
    "echo": framed("tcp", 7, 1, READ) + GOOD_TCP,
    "twice": GOOD_TCP + GOOD_TCP,
    "silence": b"",
    "lost_reply": b"",
    "hang_up": b"",
}


@pytest.mark.parametrize("name", WIRE_FAULTS)
async def test_each_lie_is_told_once_as_documented_and_the_next_answer_is_honest(name):
    """Would catch a fault that is no fault (then nothing is tested with it), and one that never ends."""
    device = Device()
    async with tcp(device, Told(name, delay_ms=10, code=6)) as (reader, writer):
        writer.write(framed("tcp", 7, 1, READ))
        if name == "hang_up":
            assert await reader.read() == b""
        else:
            writer.write(framed("tcp", 9, 1, READ))
            expected = TOLD_TCP[name] + framed("tcp", 9, 1, SAID)
            assert await reader.readexactly(len(expected)) == expected
    done_once = {"silence", "exception"}
    assert len(device.asked) == (0 if name == "hang_up" else 1 if name in done_once else 2)


async def test_what_is_no_modbus_ends_the_connection_and_a_stranger_is_told_by_the_gateway():
    """Would catch a slave that waits for ever on a web browser, or answers for a device that is not there."""
    async with tcp(Device()) as (reader, writer):
        writer.write(framed("tcp", 3, 9, READ))
        assert await reader.readexactly(9) == framed("tcp", 3, 9, b"\x83\x0b")
        writer.write(b"GET / HTTP/1.1\r\n\r\n")
        assert await reader.read() == b""


async def test_rtu_over_tcp_needs_its_checksum():
    """Would catch a gateway mode that believes any bytes."""
    device = Device()
    async with tcp(device, framing="rtu") as (reader, writer):
        writer.write(framed("rtu", 0, 1, READ))
        assert await reader.readexactly(9) == framed("rtu", 0, 1, SAID)
        writer.write(b"\x01" + READ + b"\x00\x00")
        assert await reader.read() == b""
    assert len(device.asked) == 1


@asynccontextmanager
async def serial(tmp_path, device: Device, timing=None):
    """A function that writes bytes to the line and reads so many back."""
    slave = SerialSlave(Exchange(device.answer, None, None), timing or LineTiming(115_200))
    await slave.listen(str(tmp_path / "port"))
    fd = os.open(tmp_path / "port", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    loop = asyncio.get_running_loop()

    async def ask(data: bytes, count: int) -> bytes:
        os.write(fd, data)
        got, ready = b"", asyncio.Event()
        loop.add_reader(fd, ready.set)
        try:
            async with asyncio.timeout(TIMEOUT_S):
                while len(got) < count:
                    await ready.wait()
                    ready.clear()
                    with contextlib.suppress(BlockingIOError):
                        got += os.read(fd, 512)
        finally:
            loop.remove_reader(fd)
        return got

    try:
        yield ask
    finally:
        os.close(fd)
        await slave.close()


async def test_on_a_line_bad_frames_strangers_and_broadcasts_get_silence(tmp_path):
    """Would catch a slave that answers a frame with a wrong checksum, for another device, or for all of them: collisions."""
    device = Device()
    good = framed("rtu", 0, 1, READ)
    async with serial(tmp_path, device) as ask:
        for unheard in (
            good[:-1] + b"\x00",
            framed("rtu", 0, 9, READ),
            framed("rtu", 0, 0, READ),
            b"\xff" * 300,
        ):
            await ask(unheard, 0)
            await asyncio.sleep(0.12)  # the silence between two frames
        other = b"\x04\x00\x00\x00\x01"  # told from any answer to the others by its own
        assert await ask(framed("rtu", 0, 1, other), 5) == framed("rtu", 0, 1, b"\x84\x01")
    assert device.asked == [READ, other], "the broadcast was done, and not answered"


async def test_an_unknown_function_is_refused_by_name(tmp_path):
    """Would catch a slave that hangs on a function code whose length it does not know."""
    async with serial(tmp_path, Device()) as ask:
        assert await ask(framed("rtu", 0, 1, b"\x2b\x0e\x01\x00"), 5) == framed("rtu", 0, 1, b"\xab\x01")


async def test_a_reply_takes_the_time_of_its_bytes_and_a_hasty_master_is_not_heard(tmp_path):
    """Would catch a serial line without a speed, on which every poll rate works, and a gap that nobody must keep."""
    device, good = Device(), framed("rtu", 0, 1, READ)
    loop = asyncio.get_running_loop()
    async with serial(tmp_path, device, timing=LineTiming(1200, gap_ms=60_000)) as ask:
        began_s = loop.time()
        assert await ask(good, 9) == framed("rtu", 0, 1, SAID)
        assert loop.time() - began_s >= 17 * 11 / 1200
        assert await ask(good, 0) == b""
        assert await ask(framed("rtu", 0, 0, READ), 0) == b""
        await asyncio.sleep(0.1)
    assert len(device.asked) == 1


async def test_an_address_that_is_none_or_taken_is_said():
    """Would catch a traceback where a port was taken."""
    device = Device()
    slave, other = (TcpSlave(Exchange(device.answer, None, None), "tcp") for _ in range(2))
    with pytest.raises(MapError, match="not HOST:PORT"):
        await slave.listen("somewhere")
    wire = await slave.listen("127.0.0.1:0")
    with pytest.raises(MapError, match="is the port taken"):
        await other.listen(wire.removeprefix("tcp://"))
    await slave.close()


def test_the_checksum_is_modbus_own():
    """Would catch a checksum that only we agree with: the example of the Modbus specification."""
    assert crc(bytes.fromhex("0207")) == bytes.fromhex("4112")
