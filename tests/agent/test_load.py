"""How much of a processor strangers get: bursts are free, the long run is not, and nobody waits for ever."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.load import BURST_S, PART, REST_S_MAX, Load


class Machine:
    """A thread that works and rests; `load` watches it."""

    def __init__(self):
        self.worked_s = self.now_s = 0.0
        self.load = Load(lambda: self.worked_s, lambda: self.now_s)

    def work(self, seconds):
        """On an idle machine: what it works is what passes."""
        self.worked_s += seconds
        self.now_s += seconds

    def rest(self, seconds):
        """Nothing to do."""
        self.now_s += seconds


@given(pieces=st.lists(st.floats(1e-5, 0.02), min_size=1, max_size=200))
def test_whoever_rests_as_told_uses_his_part_and_no_more(pieces) -> None:
    """Would catch rests that are too short: then a flood has the processor to itself, and the charger's beat waits."""
    machine = Machine()
    for piece_s in pieces:
        machine.work(min(piece_s, REST_S_MAX * PART))
        machine.rest(machine.load.rest_s())
    assert machine.worked_s <= PART * machine.now_s + BURST_S + 1e-9


def test_a_visitor_now_and_then_does_not_wait() -> None:
    """Would catch a pace that punishes everybody for what nobody does."""
    machine = Machine()
    for _ in range(100):
        machine.work(BURST_S / 2)
        assert machine.load.rest_s() == 0
        machine.rest(0.1)


def test_a_quiet_hour_is_not_saved_up() -> None:
    """Would catch a flood that works off an hour's rest in one go."""
    machine = Machine()
    machine.rest(3_600)
    machine.load.rest_s()
    machine.work(0.1)
    assert machine.load.rest_s() > 0


def test_our_own_work_never_locks_the_strangers_out() -> None:
    """Would catch a debt that grows: a car with 32 ports on a small computer would never answer anybody again."""
    machine = Machine()
    for _ in range(1_000):
        machine.work(0.5)
        assert machine.load.rest_s() == pytest.approx(REST_S_MAX)


def test_it_looks_at_the_thread_that_asks() -> None:
    """The clocks it has by itself: work is work, and waiting is not."""
    load = Load()
    number = 0
    while load.rest_s() == 0:
        number += 1
        assert number < 10_000_000, "endless work, and no rest"
