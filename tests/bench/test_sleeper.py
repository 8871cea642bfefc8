"""The machine's own lateness, measured beside a bench."""

from bench import _sleeper


def test_every_turn_of_every_port_is_counted_and_none_is_early():
    """Would catch a floor measured on fewer beats than are judged beside it, or one that wakes before its time."""
    with _sleeper.beside(200, 5, 2) as said:
        late_ms = said()
    assert len(late_ms) == 5 * 2
    assert min(late_ms) > -1
