"""Our wire between other people's Modbus: libmodbus (C) as the slave of our bus, mbpoll (C) as the master of our simulator."""

import re
import shutil
import subprocess

import pytest
from stage import Charger, free_port, surroundings

from bench import _libmodbus as libmodbus
from firmware_bridge.charger import BridgeError
from firmware_bridge.modbus import Bus, Priority, Timing, parse_wire
from firmware_bridge.simulator.serial_line import SerialLine

pytestmark = pytest.mark.timeout(120)
TIMING = Timing(request_timeout_ms=5_000, turnaround_ms=0)  # a busy machine is no fault of the wire
REGISTER_WH = 7_654_321


@pytest.fixture(params=["tcp", "rtu"])
async def libmodbus_slave(request, tmp_path):
    """The wire of a libmodbus slave in its own process."""
    if libmodbus.library() is None:
        pytest.skip("libmodbus is not installed: apt-get install libmodbus5")
    if request.param == "tcp":
        port = free_port()
        with libmodbus.slave("tcp", str(port)):
            yield f"tcp://127.0.0.1:{port}"
        return
    line = SerialLine(str(tmp_path / "usb-adapter"))
    try:
        with libmodbus.slave("rtu", line.device_end, "115200"):
            yield f"rtu://{line.link}?baud=115200&stop_bits=2"
    finally:
        line.close()


@pytest.fixture
async def bus(libmodbus_slave):
    """Our bus on that wire."""
    bus = Bus(parse_wire(libmodbus_slave), TIMING)
    await bus.open()
    yield bus
    await bus.close()


async def test_our_bus_reads_and_writes_a_libmodbus_slave(bus):
    """Would catch a question or an answer that only our own reading of the protocol understands."""
    for fc in (3, 4):
        assert await bus.read(1, fc, 10, 4) == (1010, 1011, 1012, 1013)
        assert await bus.read(1, fc, 500, 125) == tuple(range(1500, 1625))
    assert await bus.read(1, 1, 0, 10) == (1, 0, 0, 1, 0, 0, 1, 0, 0, 1)
    assert await bus.read(1, 2, 1, 3) == (0, 0, 1)
    await bus.write(1, 6, 10, [7])
    await bus.write(1, 16, 11, [8, 0xFFFF])
    await bus.write(1, 5, 1, [1])
    assert await bus.read(1, 3, 10, 4) == (7, 8, 0xFFFF, 1013)
    assert await bus.read(1, 1, 0, 3) == (1, 1, 0)
    await bus.write(1, 16, 10, list(range(123)), priority=Priority.STOP)
    assert await bus.read(1, 3, 10, 123) == tuple(range(123))
    assert bus.rejected == 0


async def test_a_refusal_of_a_libmodbus_slave_has_its_name(bus):
    """Would catch an exception that is taken for noise, or noise taken for it."""
    with pytest.raises(BridgeError, match="no such address") as caught:
        await bus.read(1, 3, libmodbus.REGISTERS - 1, 2)
    assert caught.value.name == "exception_2"
    assert await bus.read(1, 3, libmodbus.REGISTERS - 1, 1) == (libmodbus.REGISTERS - 1 + libmodbus.OFFSET,)


@pytest.fixture(params=["tcp", "rtu"])
def simulator(request, tmp_path):
    """A simulated charger as a process, and mbpoll's words for reaching it."""
    if shutil.which("mbpoll") is None:
        pytest.skip("mbpoll is not installed: apt-get install mbpoll")
    link = tmp_path / "usb-adapter"
    where = ("--pty", str(link)) if request.param == "rtu" else ("--tcp", "127.0.0.1:0")
    with Charger(tmp_path, "--register-wh-begin", str(REGISTER_WH), where=where) as charger:
        if request.param == "rtu":
            yield charger, ["-m", "rtu", "-b", "19200", "-P", "none", link]
        else:
            yield charger, ["-m", "tcp", "-p", charger.wire.rsplit(":", 1)[1], "127.0.0.1"]


def mbpoll(where, *words):
    """One call of mbpoll; what it says, by address."""
    *options, device = where
    begin = [word for word in words if not word.startswith("=")]
    written = [word[1:] for word in words if word.startswith("=")]
    done = subprocess.run(
        ["mbpoll", "-0", "-1", "-a", "1", "-o", "5", *options, *begin, device, *written],
        capture_output=True,
        text=True,
        timeout=30,
        env=surroundings(),
        check=False,
    )
    values = {
        int(at): int(value) for at, value in re.findall(r"^\[(\d+)\]:\s+(-?\d+)", done.stdout, re.MULTILINE)
    }
    return values, done.stdout + done.stderr


def test_mbpoll_reads_our_simulator_as_the_map_says(simulator):
    """Would catch a simulator that only our own driver understands: words, order, functions and illegal addresses."""
    charger, where = simulator
    words, said = mbpoll(where, "-t", "4", "-r", "100", "-c", "4")
    assert list(words) == [100, 101, 102, 103], said
    register = sum(word % 65536 << shift for word, shift in zip(words.values(), (48, 32, 16, 0), strict=True))
    assert register == 10 * REGISTER_WH == charger.truth["register_mwh"] // 100
    values, said = mbpoll(where, "-B", "-t", "4:int", "-r", "104", "-c", "1")
    assert values == {104: 0}, said
    refused, said = mbpoll(where, "-t", "4", "-r", "9000", "-c", "1")
    assert not refused
    assert "Illegal data address" in said


async def test_mbpoll_writes_what_our_bus_then_reads(simulator):
    """Would catch a write by another master that our own bus does not see, and the other way round."""
    charger, where = simulator
    mbpoll(where, "-t", "4", "-r", "200", "=16000")
    bus = Bus(parse_wire(charger.wire if "tcp" in where else f"rtu://{where[-1]}?baud=19200"), TIMING)
    await bus.open()
    try:
        assert await bus.read(1, 3, 200, 1) == (16_000,)
        await bus.write(1, 16, 200, [10_000])
    finally:
        await bus.close()
    values, said = mbpoll(where, "-t", "4", "-r", "200", "-c", "1")
    assert values == {200: 10_000}, said
