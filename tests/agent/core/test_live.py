"""What is only true now: freshness, rest, and chain time."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from story import POLICY, PORT, REGISTER, T0, Outlet, hash32

from agent.core.live import (
    LOOK_GAP_MS_MAX,
    Beat,
    HeaderSeen,
    Live,
    PortLost,
    PortRead,
    moved,
    observe,
    offered,
)
from agent.core.units import BlockHash, SessionId

EMPTY = Live(policy=POLICY, life=3, started_at_s=T0, started_at_ms=50_000, now_ms=50_000)


def read(at_ms, *, register_mwh=REGISTER, closed=False, is_offered=False, held_ms=0):
    """One good poll of the port."""
    outlet = Outlet(register_mwh=register_mwh, closed=closed)
    return PortRead(PORT, outlet.reading(at_ms), armed=True, held_ms=held_ms, offered=is_offered)


def told(*updates):
    """A Live that has seen these updates, one a second."""
    live = EMPTY
    for update in updates:
        live = observe(live, update, live.now_ms + 1_000)
    return live


def header(number, timestamp_s):
    """A believed head."""
    return HeaderSeen(number, BlockHash(hash32(number)), timestamp_s)


def test_chain_time_is_the_newest_header_plus_what_has_passed_since():
    """The wall clock of a car can be anything; a header alone stands still for twelve seconds."""
    live = told(header(7, T0 + 100), Beat(), Beat())
    assert live.at_s == T0 + 102
    assert live.view_age_s == 2


def test_without_a_header_time_goes_on_from_the_journals_newest():
    """Events need a stamp even before the node answers, and it must not run backwards."""
    live = told(Beat(), Beat(), Beat())
    assert live.at_s == T0 + 3
    assert live.view_age_s is None


@pytest.mark.parametrize("number", [6, 7])
def test_an_old_or_equal_head_is_not_news(number):
    """A node that repeats itself must not keep our view young."""
    live = told(header(7, T0 + 100), Beat(), header(number, T0 + 500))
    assert live.header.timestamp_s == T0 + 100
    assert live.view_age_s == 2


def test_monotonic_time_never_goes_back():
    """A clock that jumps back would make stale readings fresh."""
    with pytest.raises(AssertionError):
        observe(EMPTY, Beat(), EMPTY.now_ms - 1)


def test_a_reading_is_fresh_for_two_seconds():
    """At 2.001 s it is no reading any more."""
    live = told(read(51_000))
    assert observe(live, Beat(), 53_000).reading(PORT) is not None
    assert observe(live, Beat(), 53_001).reading(PORT) is None
    assert live.reading("nowhere") is None


def test_rest_is_two_readings_open_at_the_same_register():
    """One reading may be from before the last tick."""
    assert told(read(51_000)).rest_register_mwh(PORT) is None
    assert told(read(51_000), read(52_000)).rest_register_mwh(PORT) == REGISTER
    assert told(read(51_000), read(52_000, register_mwh=REGISTER + 1)).rest_register_mwh(PORT) is None
    assert told(read(51_000, closed=True), read(52_000)).rest_register_mwh(PORT) is None
    assert told(read(51_000, closed=True), read(52_000, closed=True)).rest_register_mwh(PORT) is None, (
        "0 W, but closed"
    )
    assert told(read(51_000), read(52_000, register_mwh=None)).rest_register_mwh(PORT) is None


def test_a_lost_port_must_show_rest_twice_again_and_is_disarmed():
    """Between the two readings anything can have happened."""
    live = told(read(51_000), read(52_000), PortLost(PORT))
    assert live.rest_register_mwh(PORT) is None
    assert live.ports[PORT].armed is False
    live = observe(live, read(54_000), 54_000)
    assert live.rest_register_mwh(PORT) == REGISTER, "the reading before the loss was at rest too"


def test_nothing_read_while_power_is_offered_proves_rest():
    """Open for a moment with power offered is not open: the car may close its switch before we look again."""
    live = told(read(51_000), read(52_000, is_offered=True))
    assert live.rest_register_mwh(PORT) is None
    live = observe(live, read(53_000), 53_000)
    assert live.rest_register_mwh(PORT) is None, "the first one may have been read just before the stop"
    live = observe(live, read(54_000), 54_000)
    assert live.rest_register_mwh(PORT) == REGISTER


def test_offering_power_forgets_the_rest_that_was_seen_before():
    """Rule 1 for the moment between the decision and the next poll."""
    live = offered(told(read(51_000), read(52_000)), PORT)
    assert live.rest_register_mwh(PORT) is None
    assert live.reading(PORT) is not None
    assert offered(EMPTY, "nowhere") is EMPTY


def test_silence_counts_from_the_last_reading_or_from_our_start():
    """A charger that never answered is as silent as one that stopped."""
    assert told(Beat(), Beat(), Beat()).silent_ms(PORT) == 3_000
    live = told(read(51_000))
    assert observe(live, Beat(), 53_000).silent_ms(PORT) == 0
    assert observe(live, Beat(), 60_000).silent_ms(PORT) == 9_000


def test_how_long_a_stop_was_disobeyed_is_the_runners_word():
    """Only the runner knows when it first commanded the stop."""
    assert told(read(51_000, closed=True, held_ms=4_000)).held_ms(PORT) == 4_000
    assert EMPTY.held_ms(PORT) == 0


@given(
    st.integers(-(10**6), 10**6),
    st.lists(st.integers(0, LOOK_GAP_MS_MAX), max_size=20),
    st.integers(0, 10**6),
)
def test_a_wait_is_what_this_life_watched(jump_s, gaps_ms, stood_still_ms):
    """Whatever a header says, however long we were away or stood still: waiting is what this process has watched."""
    sid = SessionId(b"s" * 32)
    live = observe(EMPTY, header(7, T0 + jump_s), EMPTY.now_ms)
    for gap_ms in gaps_ms:
        live = observe(live, Beat(), live.now_ms + gap_ms)
    assert live.waited_s(sid) == sum(gaps_ms) // 1000
    live = moved(live, sid, is_open=True)
    assert live.waited_s(sid) == 0
    live = observe(live, Beat(), live.now_ms + stood_still_ms)
    assert live.waited_s(sid) == min(stood_still_ms, LOOK_GAP_MS_MAX) // 1000
    assert not moved(live, sid, is_open=False).stage_at_ms, "closed sessions do not gather here"


def soc(*samples, every_ms=2_000):
    """What is believed after these samples of the battery's charge."""
    live = EMPTY
    for sample in samples:
        at_ms = live.now_ms + every_ms
        reading = replace(Outlet(soc_permille=sample).reading(at_ms))
        live = observe(live, PortRead(PORT, reading, armed=True), at_ms)
    return live


@pytest.mark.parametrize(
    ("samples", "believed"),
    [
        ((800,), None),
        ((800, 810), 810),
        ((800, 810, 0), 810),
        ((800, 810, 0, 805), 810),
        ((800, 810, 0, 805, 800), 800),
        ((0, 800), None),
        ((800, 800, None, None), 800),
        ((800, 600, 400), None),
        ((800, 800, 0, 0), 0),
    ],
)
def test_a_charge_is_believed_when_two_samples_agree(samples, believed):
    """Would catch a glitch that is believed, and a battery that really is empty and is not."""
    assert soc(*samples).soc_permille(PORT) == believed


def test_one_sample_read_twice_is_one_sample():
    """Would catch a glitch that agrees with itself, because the device is asked less often than the port is polled."""
    assert soc(0, 0, every_ms=700).soc_permille(PORT) is None
    assert soc(0, 0, 0, 0, every_ms=700).soc_permille(PORT) == 0


def test_a_charge_that_nobody_confirms_for_a_minute_is_not_known_any_more():
    """Would catch an hour's delivery on one lucky look."""
    live = soc(800, 800)
    assert observe(live, Beat(), live.now_ms + 60_000).soc_permille(PORT) == 800
    assert observe(live, Beat(), live.now_ms + 60_001).soc_permille(PORT) is None
    assert observe(live, PortLost(PORT), live.now_ms + 10).soc_permille(PORT) == 800
    assert EMPTY.soc_permille(PORT) is None
