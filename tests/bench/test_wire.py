"""The bench of the wire: every contestant must really read (they assert inside), and a line must take the time it takes."""

import pytest

from bench import _libmodbus, wire

pytestmark = pytest.mark.timeout(120)


@pytest.mark.skipif(
    _libmodbus.library() is None, reason="libmodbus is not installed: apt-get install libmodbus5"
)
def test_the_rows_compare_like_with_like(monkeypatch) -> None:
    """Would catch a bench that reads nothing, beats nothing, or beats the line itself."""
    monkeypatch.setattr(wire, "PORTS_TCP", (2,))
    monkeypatch.setattr(wire, "PORTS_RTU", (1,))
    monkeypatch.setattr(wire, "BAUDS", (115_200,))
    rows = wire.rows(1)
    assert [row.unit for row in rows if "SCHED_FIFO" not in row.metric] == [
        *(["1/s", "us", "us", "% of a core"] * 2), *(["% of the line"] * 3), *(["ms", "1/s"] * 2),
    ]  # fmt: skip
    assert all(row.ours > 0 for row in rows)
    assert all(row.peer is not None and row.peer > 0 for row in rows[:11])
    assert all(row.floor is not None and row.floor > 0 for row in rows if row.unit == "ms")
    paced = [row for row in rows if row.unit == "% of the line"]
    assert all(row.ours <= 100 for row in paced), "faster than the line: a silence was not kept"
    assert ["hot block" in row.metric for row in paced] == [row.goal != "shown only" for row in paced]


def test_without_libmodbus_there_is_a_reason_and_no_row(monkeypatch, capsys) -> None:
    """Would catch a traceback, or a silent nothing, on a machine without libmodbus."""
    monkeypatch.setattr(_libmodbus, "library", lambda: None)
    assert wire.rows(1) == []
    assert "apt-get install" in capsys.readouterr().err


def test_what_a_line_needs() -> None:
    """Would catch a limit that is set too low, so that our part of it looks better: 9600 baud, 4 registers, 32 ms."""
    assert wire.line_s(9_600, 21) == pytest.approx(0.0321, abs=0.0001)
    assert wire.line_s(115_200, 21) == pytest.approx(0.0055, abs=0.0001)
