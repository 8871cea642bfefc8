"""The only writer: durable before visible, synchronous, bounded, and awake."""

import asyncio

import pytest
from story import PORT, TERMS, ListJournal, Story, at, believed, delivering, head, matched, presentation, seen

from agent import engine as room
from agent.core import events as ev
from agent.core.effects import Deliver, Hold
from agent.core.live import Beat, PortLost
from agent.core.session import STOPPABLE, Stage


def test_what_cannot_be_written_did_not_happen():
    """A full disk: the book must not know what the journal does not, or a restart would forget it."""
    story = Story() >> head()
    before = story.book
    story.journal.fail_next = True
    with pytest.raises(OSError, match="disk"):
        _ = story >> seen()
    assert story.book is before
    assert len(story.journal) == 0


def test_it_is_on_disk_before_anybody_can_see_it():
    """A runner that acts on what a power cut then forgets has acted for nobody."""
    story = Story() >> head()
    seen_by_others = []

    class Watched(ListJournal):
        def append(self, event):
            seen_by_others.append(story.engine.book)
            super().append(event)

    story.engine._journal = Watched()
    before = story.book
    _ = story >> seen()
    assert seen_by_others == [before]
    assert story.book is not before


def test_what_changes_nothing_costs_no_row():
    """Watchers repeat themselves every few seconds for years."""
    story = matched()
    rows = len(story.journal)
    assert story.engine.accept(ev.ConnectedSeen(story.at_s, TERMS)) is False
    assert story.engine.accept(ev.ConnectedBelieved(story.at_s, TERMS.session_id, TERMS.block_hash)) is False
    assert len(story.journal) == rows


def test_a_restart_is_replay():
    """Whatever the book became, the journal makes the same again."""
    story = delivering(signing=True).passes(40)
    assert story.journal.replay() == story.book
    assert story.restarts().book == story.journal.replay()


def test_everything_that_is_due_is_accepted_in_one_look():
    """Accept, then begin: two events, one observation; waiting for the next beat would waste seconds."""
    story = matched()
    story.engine.accept(ev.TokenPresented(story.at_s, TERMS.session_id, presentation()))
    assert story.stage is Stage.MATCHED
    story.engine.observe(Beat())
    assert story.stage is Stage.DELIVERING
    assert story.kinds[-2:] == ["SessionAccepted", "DeliveryBegan"]


def test_rules_that_disagree_for_ever_crash_instead_of_filling_the_disk(monkeypatch):
    """Two rules that undo each other would write a row a microsecond; a crash holds the power off."""
    story = matched()
    numbers = iter(range(10**9))
    monkeypatch.setattr(
        room.rules, "due", lambda *_: ev.BlocksScanned(story.at_s, 1, str(next(numbers)).encode())
    )
    with pytest.raises(AssertionError, match="stay due"):
        story.engine.observe(Beat())
    assert len(story.journal) <= room.DUE_MAX + 10


def test_the_beat_is_only_marked_when_it_ran_to_its_end(monkeypatch):
    """The watchdog feeds systemd from it: a beat that crashed must not look alive."""
    story = matched()
    beat = story.engine.beat_at_ms
    story.leaps(5)
    monkeypatch.setattr(room.rules, "due", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        story.engine.observe(Beat())
    assert story.engine.beat_at_ms == beat


async def test_whoever_waits_for_a_change_is_woken_by_it():
    """A runner takes the event, looks at the book, then waits: a change in between must not be missed."""
    story = Story() >> head()
    changed = story.engine.changed
    assert not changed.is_set()
    _ = story >> seen() >> believed()
    async with asyncio.timeout(1):
        await changed.wait()
    assert not story.engine.changed.is_set(), "the next waiter waits for the next change"


def test_a_reading_wakes_and_a_bare_beat_does_not():
    """Four beats a second for years must not wake everybody for nothing."""
    story = matched()
    changed = story.engine.changed
    story.leaps(1)
    story.engine.observe(Beat())
    assert not changed.is_set()
    story.engine.observe(PortLost(PORT))
    assert changed.is_set()


def test_readings_taken_while_power_is_owed_are_marked():
    """Rule 1: the engine knows what it owed while the wire was read; the reading does not."""
    story = delivering()
    story.outlet.power_w = 0
    story.passes(3)
    assert isinstance(story.on_port(), Deliver)
    assert story.live.ports[PORT].offered
    story.outlet.armed = False
    story.passes(3)
    assert isinstance(story.on_port(), Hold)
    assert not story.live.ports[PORT].offered


def test_a_life_is_named_by_the_journals_length():
    """Each life that offered power left a row, so the next has another name."""
    story = delivering()
    assert story.restarts().live.life == len(story.journal)
    assert story.live.header is None
    assert story.live.started_at_s == story.book.at_s


class Folding(ListJournal):
    """A journal that counts how often it was asked to fold."""

    def __init__(self, rows=0):
        super().__init__()
        self.row_count, self.folds = rows, 0

    def compact(self, fold, after):
        """Asked."""
        self.folds += 1


def test_the_journal_is_folded_only_when_idle_and_only_when_it_is_worth_it():
    """Would catch folding between two beats of somebody's session, at every beat for nothing, and before we know the time."""
    journal = Folding()
    story = Story(journal=journal)
    journal.row_count = room.COMPACT_ROWS_MIN
    assert not story.engine.compact_when_idle(), "no header: it is not known what day it is"
    story = story >> head()
    assert story.engine.compact_when_idle()
    assert not (story >> seen()).engine.compact_when_idle(), "somebody is awaited"
    assert journal.folds == 1
    story = Story(journal=(journal := Folding(room.COMPACT_ROWS_MIN - 1))) >> head()
    assert not story.engine.compact_when_idle()
    journal.row_count = 10 * room.COMPACT_ROWS_MIN
    assert story.engine.compact_when_idle()
    journal.row_count = 20 * room.COMPACT_ROWS_MIN - 1
    assert not story.engine.compact_when_idle(), (
        "nearly all of them must stay: not again before there are twice as many"
    )
    journal.row_count += 1
    assert story.engine.compact_when_idle()
    assert journal.folds == 2


@pytest.mark.parametrize("stage", list(Stage))
def test_the_owners_stop_ends_whatever_runs_and_nothing_else(stage):
    """Would catch a stop button that leaves power on, that overwrites why a session ended, or that wakes a closed one."""
    story = at(stage)
    before = story.session
    stopped = story.engine.stop_by_owner()
    assert not story.passes(2).delivering
    if stage in STOPPABLE:
        assert stopped == 1
        assert story.session.stop_reason is ev.StopReason.LOCAL
        assert story.passes(30).stage is Stage.SETTLING
    else:
        assert stopped == 0
        assert story.session.stop_reason is before.stop_reason
