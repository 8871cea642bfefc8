"""The serial line without hardware: what goes in comes out, in order and not before its time."""

import os
import time

import pytest

from bench import _line


def taken(end: int, count: int) -> bytes:
    """Exactly so many bytes; the test's time-out bounds the wait."""
    data = b""
    while len(data) < count:
        data += os.read(end, count - len(data))
    return data


@pytest.mark.parametrize("baud", [0, 9_600])
def test_bytes_travel_both_ways_at_the_speed_of_the_line(tmp_path, baud) -> None:
    """Would catch bytes lost or turned round, and a line faster than its baud rate, on which every figure would be a lie."""
    links = [tmp_path / name for name in ("master0", "slave0", "master1", "slave1")]
    said, answer = bytes(range(64)), bytes(range(200, 220))
    with _line.lines(baud, *links):
        master, slave = (os.open(link, os.O_RDWR | os.O_NOCTTY) for link in links[2:])
        began_s = time.monotonic()
        os.write(master, said)
        assert taken(slave, len(said)) == said
        os.write(slave, answer)
        assert taken(master, len(answer)) == answer
        took_s = time.monotonic() - began_s
        for end in (master, slave):
            os.close(end)
    characters_s = (len(said) + len(answer)) * _line.character_s(baud)
    assert took_s >= characters_s + _line.gap_s(baud), (
        "the slave answers after the silence that ends the question"
    )
