"""The book across sessions: believing, ports, bounds, routing, and exactly one thing owed per port."""

from dataclasses import replace

import pytest
from story import (
    OTHER_CONSUMER,
    PORT,
    PROVIDER,
    REGISTER,
    STRANGER,
    T0,
    TERMS,
    Story,
    at,
    believed,
    connect,
    delivering,
    hash32,
    head,
    matched,
    orphaned,
    passes,
    presentation,
    presents,
    receipt,
    records,
    seen,
    stops,
)

from agent.core import events as ev
from agent.core.book import PENDING_MAX, due, owed, step
from agent.core.effects import Deliver, Firmness, Hold, SignSettlement
from agent.core.live import Policy
from agent.core.session import Stage
from agent.core.units import BlockHash

OTHER = connect(2, consumer=OTHER_CONSUMER, number=101)
OTHERS = presentation(OTHER, consumer=OTHER_CONSUMER)
TWO_PORTS = Policy(max_unacked_wh={PORT: 50, "right": 50})


# ---- rule 2: only what the chain really says about us


FORGED_TERMS = {
    "another provider": {"provider": STRANGER.address},
    "ourselves as the consumer": {"consumer": PROVIDER.address},
    "a token that is not the hash": {"token": hash32("free energy")},
    "another time": {"issued_at_s": T0 + 1},
    "another validity": {"valid_until_s": TERMS.valid_until_s + 1},
    "another consumer": {"consumer": STRANGER.address},
    "another auction": {"auction_nonce": 2},
    "another session id": {"session_id": hash32("mine")},
}


@pytest.mark.parametrize("what", FORGED_TERMS)
def test_rule_2_what_does_not_recompute_is_not_ours(what):
    """A node that lies in one field lies in the token or the session id: both are computed here, not believed."""
    story = Story() >> head() >> seen(replace(TERMS, **FORGED_TERMS[what]))
    assert story.kinds == []


def test_seen_owes_nothing_and_believed_needs_the_same_block():
    """Belief in another block is belief in another token."""
    story = Story() >> head() >> seen()
    assert not story.book.sessions
    story = story >> ev.ConnectedBelieved(T0, TERMS.session_id, BlockHash(hash32("another")))
    assert not story.book.sessions
    assert (story >> believed()).stage is Stage.MATCHED
    assert not story.book.pending


def test_belief_in_what_nobody_saw_changes_nothing():
    """Facts of unknown sessions are no facts of ours."""
    story = Story() >> head() >> believed() >> orphaned()
    assert story.kinds == []


def test_pending_sessions_are_bounded_and_expired_ones_give_way():
    """A consumer who connects and closes at once leaves a pending one behind; 64 of them must not stop our business."""
    story = Story() >> head()
    for nonce in range(1, PENDING_MAX + 10):
        story = story >> seen(connect(nonce))
    assert len(story.book.pending) == PENDING_MAX
    late = connect(500, issued_at_s=T0 + 5 * 3600)
    story = story.leaps(5 * 3600) >> seen(late)
    assert list(story.book.pending) == [late.session_id]


def test_an_orphaned_pending_one_is_forgotten_with_its_token():
    """Nothing was owed, nothing remains."""
    story = Story() >> head() >> seen() >> presents() >> orphaned()
    assert not story.book.pending
    assert not story.book.early
    assert not story.book.sessions


def test_an_orphan_notice_for_another_block_is_not_for_us():
    """Late news about a block that was already replaced."""
    again = connect(fork=1)
    story = Story() >> head() >> seen() >> seen(again) >> orphaned(TERMS)
    assert story.book.pending == {again.session_id: again}


def test_a_block_back_and_forth_is_followed_every_time():
    """A reorganisation of a reorganisation: A, B, A, B; each time the newest is believed and the receipts stay."""
    again = connect(fork=1)
    story = (delivering().passes(5) >> receipt(10)).passes(1)
    for gone, here in ((TERMS, again), (again, TERMS), (TERMS, again)):
        story = (story >> orphaned(gone)).passes(3)
        assert story.stage is Stage.ORPHANED
        story = (story >> seen(here) >> believed(here) >> presents(here)).passes(3)
        assert story.delivering, here.issued_at_s
        assert story.session.energy_wh_acked == 10


# ---- ports


def two_on_one_port():
    """One session delivers; the next one's consumer already stands at the same plug."""
    story = Story() >> head() >> seen() >> believed() >> passes(2) >> presents() >> records()
    return story >> seen(OTHER) >> believed(OTHER) >> presents(OTHER, OTHERS)


def test_one_session_holds_a_port_and_the_next_waits():
    """Two sessions on one meter: one of them would pay for the other."""
    story = two_on_one_port().passes(5)
    assert story.book.sessions[OTHER.session_id].stage is Stage.MATCHED
    assert story.on_port().session_id == TERMS.session_id
    story = story >> ev.StopDecided(story.at_s, TERMS.session_id, ev.StopReason.LOCAL, "enough")
    story.passes(25)
    assert story.on_port().session_id == OTHER.session_id
    assert (
        story.book.sessions[OTHER.session_id].register_mwh_begin
        == story.book.sessions[TERMS.session_id].register_mwh_end
    )


def test_an_orphan_keeps_its_port_from_others():
    """It may come back in twelve seconds, with its cable still in."""
    story = two_on_one_port().passes(2) >> orphaned()
    story.passes(5)
    assert story.book.sessions[OTHER.session_id].stage is Stage.MATCHED
    assert isinstance(story.on_port(), Hold)


def test_an_orphan_that_never_held_the_port_does_not_take_it_away():
    """Its token was shown at this plug while another session charges there; a reorg must not stop that one."""
    story = Story() >> head() >> seen(OTHER) >> believed(OTHER) >> seen() >> believed() >> passes(2)
    story = story >> presents() >> presents(OTHER, OTHERS)
    story.passes(2)
    assert story.on_port().session_id == TERMS.session_id
    story = (story >> orphaned(OTHER)).passes(2)
    assert story.book.sessions[OTHER.session_id].stage is Stage.ORPHANED
    assert story.on_port() == Deliver(PORT, TERMS.session_id, REGISTER + 1_000_000)


def test_an_orphan_with_an_end_intent_frees_its_port():
    """It will never be energised again; days of reservation would be for nothing."""
    story = at(Stage.SETTLING) >> orphaned() >> seen(OTHER) >> believed(OTHER) >> presents(OTHER, OTHERS)
    story.passes(3)
    assert story.on_port().session_id == OTHER.session_id


def test_an_orphan_whose_port_was_given_away_never_beats_the_new_holder():
    """Orphaned, matched, overtaken at the plug, orphaned again: the delivering one keeps its power."""
    again = connect(fork=1)
    story = (delivering().passes(4) >> orphaned()).passes(3) >> seen(again) >> believed(again)
    story = story >> seen(OTHER) >> believed(OTHER) >> presents(OTHER, OTHERS)
    story.passes(3)
    assert story.on_port().session_id == OTHER.session_id
    story = (story >> orphaned(again)).passes(2)
    assert story.on_port().session_id == OTHER.session_id


def test_ports_are_independent():
    """A pause on the left is nobody's business on the right."""
    story = Story(policy=TWO_PORTS) >> head() >> seen() >> believed() >> seen(OTHER) >> believed(OTHER)
    right = presentation(OTHER, consumer=OTHER_CONSUMER, port="right")
    story = story >> passes(2) >> presents() >> presents(OTHER, right)
    assert [type(effect) for effect in story.owed[:2]] == [Deliver, Deliver]
    story.outlets["left"].fault = "over_temperature"
    story.passes(3)
    assert isinstance(story.on_port("left"), Hold)
    assert isinstance(story.on_port("right"), Deliver)


def test_two_cars_charge_at_once_and_both_are_settled():
    """One session per port, two ports per vehicle: would catch energy, receipts or records of one that land in the other's."""
    story = (
        Story(policy=TWO_PORTS, signing=True)
        >> head()
        >> seen()
        >> believed()
        >> seen(OTHER)
        >> believed(OTHER)
    )
    story.outlets["right"].power_w = 3_600
    story = story >> passes(2) >> presents()
    story = (
        story.passes(20)
        >> records()
        >> presents(OTHER, presentation(OTHER, consumer=OTHER_CONSUMER, port="right"))
    )
    story = story.passes(30) >> records()
    left, right = (story.book.sessions[terms.session_id] for terms in (TERMS, OTHER))
    assert (left.stage, right.stage) == (Stage.DELIVERING, Stage.DELIVERING)
    assert left.energy_wh_acked > 90
    assert 25 <= right.energy_wh_acked <= 32
    assert len({one.record_begin for one in (left, right)}) == 2, "one running number for both ports"
    for terms in (TERMS, OTHER):
        story = story >> ev.StopDecided(story.at_s, terms.session_id, ev.StopReason.REMOTE, "asked")
    story.passes(25)
    _ = story >> records() >> records()
    left, right = (story.book.sessions[terms.session_id] for terms in (TERMS, OTHER))
    assert {left.stage, right.stage} == {Stage.SETTLING}
    for one in (left, right):
        assert (
            one.energy_wh_delivered
            == one.energy_wh_acked
            == (one.register_mwh_end - one.register_mwh_begin) // 1000
        )
    signs = story.owed_of(SignSettlement)
    assert {sign.token: sign.energy_wh for sign in signs} == {
        TERMS.token: left.energy_wh_acked,
        OTHER.token: right.energy_wh_acked,
    }
    assert story.journal.replay() == story.book


@pytest.mark.parametrize("stage", list(Stage))
def test_exactly_one_deliver_or_hold_per_configured_port(stage):
    """None would leave the runner with its last order; two would be an argument about high voltage."""
    story = at(stage)
    ports = [effect.port for effect in story.owed if isinstance(effect, Deliver | Hold)]
    assert ports == [PORT]
    for _ in range(5):
        story.passes(7)
        assert len([e for e in story.owed if isinstance(e, Deliver | Hold)]) == 1


def test_a_lock_out_survives_a_restart():
    """Only a human unlocks: a reboot is no technician."""
    story = delivering().passes(5)
    story.outlet.welded = True
    story = (story >> stops()).passes(40).restarts() >> head()
    assert story.on_port() == Hold(PORT, Firmness.LOCK)
    story = story >> ev.PortUnlocked(story.at_s, PORT)
    assert story.on_port() == Hold(PORT)
    rows = len(story.journal)
    _ = story >> ev.PortUnlocked(story.at_s, PORT)
    assert len(story.journal) == rows


# ---- routing, time, purity


def test_facts_of_one_session_do_not_touch_the_other():
    """A stop meant for one consumer must not stop the next."""
    story = two_on_one_port()
    other = story.book.sessions[OTHER.session_id]
    story = (
        story
        >> receipt(0, TERMS.session_id)
        >> ev.StopDecided(story.at_s, TERMS.session_id, ev.StopReason.LOCAL, "")
    )
    assert story.book.sessions[OTHER.session_id] is other


def test_events_of_unknown_sessions_change_nothing():
    """The watcher may know more than we do."""
    book = matched().book
    strange = hash32("strange")
    for event in (
        ev.StopDecided(T0, strange, ev.StopReason.LOCAL, ""),
        ev.ConnectionEndedSeen(T0, strange, 1, 1, hash32(1), hash32(2)),
        ev.TokenPresented(T0, strange, presentation()),
        ev.SessionLapsed(T0, strange),
    ):
        assert step(book, event) is book


def test_the_scan_cursor_moves_only_with_a_new_block():
    """Catch-up starts there; the same block again is no news."""
    block = ev.BlocksScanned(T0, 120, BlockHash(hash32("block", 120)))
    book = step(matched().book, block)
    assert (book.scanned_number, book.scanned_hash) == (120, hash32("block", 120))
    assert step(book, block) is book


def test_the_books_time_never_runs_backwards():
    """A restart takes its time from here; a stale stamp must not turn the clock back."""
    story = matched()
    before = story.book.at_s
    book = step(story.book, ev.BlocksScanned(before - 500, 7, BlockHash(hash32(7))))
    assert book.at_s == before


def test_step_due_and_owed_change_nothing_they_are_given():
    """The engine keeps the old book until the new one is on disk."""
    story = delivering().passes(5)
    book, live = story.book, story.live
    before = (repr(book), repr(live))
    step(book, ev.StopDecided(story.at_s, TERMS.session_id, ev.StopReason.LOCAL, ""))
    due(book, live)
    owed(book, live)
    assert (repr(book), repr(live)) == before


def test_two_settlements_are_owed_at_once_when_two_sessions_end():
    """One stuck transaction must not hide the other session's money."""
    story = (two_on_one_port().passes(5) >> receipt(8, TERMS.session_id)).passes(1)
    for terms in (TERMS, OTHER):
        story = story >> ev.StopDecided(story.at_s, terms.session_id, ev.StopReason.LOCAL, "night")
    story.passes(25)
    owed_ids = {effect.session_id for effect in story.owed_of(SignSettlement)}
    assert owed_ids == {TERMS.session_id, OTHER.session_id}


def test_open_sessions_are_those_with_something_to_happen():
    """The engine looks at each of them four times a second; the closed ones of a year must not be among them."""
    story = at(Stage.SETTLING)
    assert len(story.book.open_sessions()) == 1
    assert at(Stage.SETTLED).book.open_sessions() == ()
