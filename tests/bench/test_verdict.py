"""The bench itself: it must measure a verdict that really says yes, beside a floor that is really lower."""

from bench import verdict


def test_the_rows_compare_like_with_like() -> None:
    """Would catch a bench whose verdict is broken (it asserts inside), or whose floor is not one."""
    rows = verdict.rows(3)
    assert [row.metric for row in rows] == ["presentation", "receipt with session key"]
    assert all(row.floor is not None and row.floor < row.ours for row in rows)
