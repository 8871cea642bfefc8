"""The bench of the core: it must measure what it says, beside a floor that is one."""

from bench import core


def test_the_rows_compare_like_with_like(monkeypatch) -> None:
    """Would catch a bench that accepts nothing (it asserts inside), starts without its past, or has no floor."""
    monkeypatch.setattr(core, "OLD_SESSIONS", 300)
    rows = core.rows(2)
    assert [row.unit for row in rows] == ["us", "us", "ms", "ms", "1/s"]
    assert "300 old sessions" in rows[3].metric
    assert all(row.floor is not None and row.floor > 0 for row in rows[:4])
    assert all(row.ours > 0 for row in rows)
