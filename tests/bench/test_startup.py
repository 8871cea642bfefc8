"""The bench itself: a real daemon becomes READY, and its memory is read while it lives."""

from bench import startup


def test_one_start_is_measured() -> None:
    """Would catch a daemon that never says READY, and a figure read from a process that is gone."""
    seconds, memory = startup.rows(1)
    assert 0 < seconds.ours < startup.READY_TIMEOUT_S
    assert memory.unit == "MiB"
    assert memory.ours > 20
