"""A cable made of two ptys: bytes go both ways, and nothing is left behind."""

import asyncio
import os
from pathlib import Path

import pytest

from firmware_bridge.charger import MapError
from firmware_bridge.simulator.serial_line import SerialLine


async def arrived(fd: int, count: int) -> bytes:
    """What comes out of this end, waiting at most two seconds."""
    got = bytearray()
    ready = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(fd, ready.set)
    try:
        async with asyncio.timeout(2):
            while len(got) < count:
                await ready.wait()
                ready.clear()
                got += os.read(fd, count)
    finally:
        loop.remove_reader(fd)
    return bytes(got)


async def test_bytes_go_both_ways_unchanged(tmp_path: Path) -> None:
    """Would catch a terminal that translates line ends or swallows control characters: Modbus is binary."""
    line = SerialLine(str(tmp_path / "port"))
    everything = bytes(range(256))
    ends = [os.open(path, os.O_RDWR | os.O_NOCTTY) for path in (line.device_end, str(line.link))]
    try:
        for here, there in (ends, reversed(ends)):
            os.write(here, everything)
            assert await arrived(there, len(everything)) == everything
    finally:
        for end in ends:
            os.close(end)
        line.close()
    assert not line.link.is_symlink()


async def test_a_link_left_behind_is_replaced_but_a_file_is_not(tmp_path: Path) -> None:
    """Would catch a killed simulator that blocks the next one, and one that deletes somebody's file."""
    link = tmp_path / "port"
    link.symlink_to(tmp_path / "gone")
    SerialLine(str(link)).close()
    link.write_text("precious")
    with pytest.raises(MapError, match="exists and is not a link"):
        SerialLine(str(link))
    assert link.read_text() == "precious"
