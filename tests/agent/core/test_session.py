"""One session's life: every row of the table, every rule of DESIGN section 5, every reason that hinders power."""

import itertools
from dataclasses import replace

import pytest
from story import (
    CONSUMER,
    DOMAIN,
    PORT,
    POWER_W,
    PROVIDER,
    REGISTER,
    SESSION_KEY,
    T0,
    TERMS,
    Story,
    ack_of,
    at,
    authorised,
    believed,
    closing,
    connect,
    delivering,
    ended,
    ended_believed,
    ended_orphaned,
    final,
    hash32,
    head,
    matched,
    orphaned,
    passes,
    presentation,
    presents,
    receipt,
    records,
    reverts,
    seen,
    settles,
    stops,
)

from agent.core import events as ev
from agent.core import token as rules
from agent.core.effects import (
    BroadcastSettlement,
    Deliver,
    Firmness,
    Hold,
    SignMeterRecord,
    SignSettlement,
)
from agent.core.events import StopReason
from agent.core.live import Beat, Live, Policy, PortLost
from agent.core.session import (
    CLOSED,
    CREDIT_REST_S,
    CREDIT_REST_S_MAX,
    HOLDS_PORT,
    REVERTS_MAX,
    TABLE,
    Hindrance,
    Stage,
    apply,
    hindrance,
    rematched,
)
from agent.core.token import NO_ACK
from agent.core.units import BlockHash, TxHash

S = Stage
SID = TERMS.session_id


def sample(kind, story):
    """An event of this kind that says something new to this session, with everything it must agree with."""
    session, at_s = story.session, story.at_s
    signed = session.settlement
    register = session.register_mwh_last or REGISTER
    samples = {
        ev.TokenPresented: lambda: ev.TokenPresented(at_s, SID, presentation(salt="again")),
        ev.SessionAccepted: lambda: ev.SessionAccepted(at_s, SID, register),
        ev.DeliveryBegan: lambda: ev.DeliveryBegan(at_s, SID, register, story.live.life),
        ev.DeliveryPaused: lambda: ev.DeliveryPaused(at_s, SID, register + 5_000, "chain_view_stale"),
        ev.StopDecided: lambda: ev.StopDecided(at_s, SID, StopReason.LOCAL, "the owner"),
        ev.DeliveryEnded: lambda: ev.DeliveryEnded(at_s, SID, register + 9_000, seen_open=True),
        ev.ReceiptCredited: lambda: ev.ReceiptCredited(
            at_s, SID, session.energy_wh_acked + 1, ack_of(session, session.energy_wh_acked + 1)
        ),
        ev.ConnectedBelieved: lambda: ev.ConnectedBelieved(at_s, SID, TERMS.block_hash),
        ev.ConnectedFinal: lambda: ev.ConnectedFinal(at_s, SID, TERMS.block_hash),
        ev.ConnectedOrphaned: lambda: ev.ConnectedOrphaned(at_s, SID, TERMS.block_hash),
        ev.ConnectionClosingSeen: lambda: ev.ConnectionClosingSeen(at_s, SID, 0, at_s + 43_200),
        ev.ConnectionEndedSeen: lambda: ev.ConnectionEndedSeen(
            at_s, SID, 8, 1, TxHash(bytes(32)), BlockHash(hash32("block", 200))
        ),
        ev.ConnectionEndedBelieved: lambda: ev.ConnectionEndedBelieved(
            at_s, SID, BlockHash(hash32("block", 200))
        ),
        ev.ConnectionEndedOrphaned: lambda: ev.ConnectionEndedOrphaned(
            at_s, SID, BlockHash(hash32("block", 200))
        ),
        ev.SettlementSigned: lambda: ev.SettlementSigned(
            at_s, SID, 4, 7, TxHash(hash32("tx")), b"raw", 10**9, 10**8
        ),
        ev.SettlementReverted: lambda: ev.SettlementReverted(
            at_s, SID, signed.tx_hash if signed else TxHash(bytes(32)), "NotActive"
        ),
        ev.MeterRecordSigned: lambda: ev.MeterRecordSigned(at_s, SID, "end", "OCMF|2|"),
        ev.SessionLapsed: lambda: ev.SessionLapsed(at_s, SID),
    }
    return samples[kind]()


SESSION_EVENTS = [kind for kind in ev.KINDS.values() if "session_id" in kind.__dataclass_fields__]


def at_for(stage, kind):
    """A story at `stage` in which an event of this kind says something new. Built without the engine's own hurry."""
    if (stage, kind) == (S.SETTLING, ev.ReceiptCredited):
        return (delivering().passes(5) >> receipt(4) >> stops()).passes(25)
    if stage is S.ORPHANED and kind in (ev.DeliveryPaused, ev.DeliveryEnded):
        return delivering().passes(5) >> orphaned()
    if stage is S.MATCHED and kind is ev.ReceiptCredited:
        again = connect(fork=1)
        return at(S.ORPHANED) >> seen(again) >> believed(again)
    return at(stage)


def look_of(story, stage, kind):
    """The session as `apply` gets it. Facts that the engine would answer at once are put in without it."""
    session = story.session
    if kind in (ev.ConnectionEndedBelieved, ev.ConnectionEndedOrphaned):
        session = apply(session, sample(ev.ConnectionEndedSeen, story))
    if kind is ev.SettlementReverted:
        session = apply(session, sample(ev.SettlementSigned, story))
    if kind is ev.MeterRecordSigned:
        session = replace(session, record_end="")
    assert session.stage is stage
    return session


ROWS = [
    pytest.param(stage, kind, id=f"{stage}-{kind.__name__}")
    for stage, row in TABLE.items()
    for kind in row
    if kind is not ev.ConnectedBelieved  # the book's business: it brings new terms along
]


@pytest.mark.parametrize(("stage", "kind"), ROWS)
def test_every_row_of_the_table_leads_where_it_says(stage, kind):
    """A row that changes nothing is dead, one that leads elsewhere is a lie: both would be caught here."""
    story = at_for(stage, kind)
    session = look_of(story, stage, kind)
    event = sample(kind, story)
    if stage is S.MATCHED and kind is ev.ReceiptCredited:
        event = ev.ReceiptCredited(story.at_s, SID, 6, ack_of(session, 6))
    if kind is ev.SettlementReverted:
        event = replace(event, tx_hash=session.settlement.tx_hash)
    after = apply(session, event)
    assert after is not session, "the row says nothing"
    assert after.stage in TABLE[stage][kind]


@pytest.mark.parametrize("stage", list(Stage))
def test_an_event_without_a_row_changes_nothing(stage):
    """A late or doubled fact must be harmless in every stage: the very same session comes back."""
    story = at(stage)
    for kind in SESSION_EVENTS:
        if kind is ev.ConnectedSeen or kind in TABLE[stage]:
            continue
        session = story.session
        assert apply(session, sample(kind, story)) is session, (stage, kind)


@pytest.mark.parametrize(("stage", "kind"), ROWS)
def test_the_same_fact_twice_is_written_once(stage, kind):
    """Watchers repeat what they see; only what says something new may cost a row."""
    repeatable = {ev.SettlementSigned, ev.StopDecided, ev.DeliveryEnded, ev.SessionAccepted, ev.DeliveryBegan}
    if kind in repeatable:
        return
    story = at_for(stage, kind)
    session = look_of(story, stage, kind)
    event = sample(kind, story)
    if kind is ev.SettlementReverted:
        event = replace(event, tx_hash=session.settlement.tx_hash)
    once = apply(session, event)
    assert apply(once, event) is once


def test_every_stage_has_a_row_list_and_closed_stages_lead_nowhere_else():
    """A stage without rows would assert in the field; a closed one that opens again would pay twice."""
    assert set(TABLE) == set(Stage)
    for stage in CLOSED:
        assert all(targets == {stage} for targets in TABLE[stage].values())


# ---- rule 1: registers


def test_rule_1_the_begin_register_is_on_disk_before_power_is_owed():
    """Power first and the register later would make the first Wh nobody's."""
    story = matched()
    assert not story.delivering
    _ = story >> presents()
    accepted = story.kinds.index("SessionAccepted")
    assert accepted < story.kinds.index("DeliveryBegan")
    assert story.session.register_mwh_begin == REGISTER
    assert story.on_port() == Deliver(PORT, SID, REGISTER + 1_000_000)


def test_rule_1_the_end_register_is_taken_only_after_it_is_seen_open():
    """Energy that still flows while we 'end' would be given away."""
    story = delivering().passes(10)
    story.outlet.welded = True
    story = (story >> stops()).passes(3)
    assert story.stage is S.STOPPING
    story.outlet.welded = False
    story.passes(25)
    assert story.stage is S.SETTLING
    assert story.session.register_mwh_end == story.outlet.register_mwh
    assert story.session.end_seen_open is True


def test_rule_1_a_reading_from_before_power_was_offered_proves_no_rest():
    """Two readings at rest, then power on, then a stop before the next poll: the old readings must not end the session."""
    story = delivering()
    assert story.delivering
    story = story >> stops()
    assert story.stage is S.STOPPING, "ended by readings that were taken before power was offered"
    story.outlet.second(Deliver(PORT, SID, 0))  # the wire was a moment ahead of us
    story.passes(25)
    assert story.session.energy_mwh_metered == POWER_W * 1000 // 3600


def test_rule_1_one_reading_at_rest_is_not_enough():
    """Meters tick late: the last Wh shows up one poll after the contactor opened."""
    story = (delivering().passes(10) >> receipt(20) >> stops()).passes(1)
    assert story.stage is S.STOPPING
    story.outlet.register_mwh += 700  # the meter's late tick
    story.passes(1)
    assert story.stage is S.STOPPING
    story.passes(1)
    assert story.session.register_mwh_end == REGISTER + 20_700


def test_rule_1_energy_is_the_sum_of_segments_between_journaled_registers():
    """Whatever the register does between segments is not this session's."""
    story = delivering(signing=True).passes(10)
    story.outlet.armed = False
    story.passes(3)
    assert story.session.energy_mwh_metered == 22_000, "the second it takes to notice counts too"
    story.outlet.armed = True
    story.passes(12)
    story = (story >> stops()).passes(3)
    metered = sum(b - a for a, b in segments(story))
    assert story.session.energy_mwh_metered == metered == story.outlet.register_mwh - REGISTER
    assert story.session.energy_wh_delivered == metered // 1000


def segments(story):
    """(open, close) register pairs as the journal tells them, without the book's help."""
    pairs, opened = [], None
    for event in story.journal.events:
        match event:
            case ev.DeliveryBegan(register_mwh=register):
                opened = register
            case ev.DeliveryPaused(register_mwh=register) | ev.DeliveryEnded(register_mwh_end=register):
                if opened is not None:
                    pairs.append((opened, register))
                opened = None
    return pairs


def test_rule_1_a_register_that_moves_while_open_ends_the_session():
    """Energy leaks past the contactor, or the meter is not ours: offering power again would bill it to the consumer."""
    story = at(S.PAUSED)
    story.outlet.register_mwh += 1
    story.outlet.armed = True
    story.passes(3)
    assert story.session.stop_reason is StopReason.OTHER
    assert "moved" in story.session.stop_detail


def test_rule_1_a_register_that_runs_backwards_never_takes_energy_back():
    """A replaced or rolled-over meter must not make delivered energy negative."""
    story = delivering().passes(5)
    story.outlet.register_mwh = 1_000
    story.outlet.power_w = 0
    story = (story >> stops()).passes(25)
    assert story.session.energy_mwh_metered == 0
    assert story.session.energy_wh_delivered == 0


def test_rule_1_delivered_is_never_below_what_the_consumer_signed():
    """A grant made smaller, or a meter that ran backwards, after the receipt: the signature is the stronger word."""
    story = (
        delivering().passes(10) >> receipt(20) >> presents(TERMS, presentation(max_energy_wh=10, salt="less"))
    )
    story.passes(5)
    assert story.stage is S.SETTLING
    assert story.session.energy_wh_delivered == 20
    assert story.owed_of(SignSettlement)[0].energy_wh == 20


def test_rule_1_delivered_is_never_above_the_order():
    """What the counter shows beyond the order is the provider's loss, never the consumer's debt."""
    story = delivering(signing=True)
    story.outlet.power_w = 70_000  # overshoots by up to 19 Wh a second
    story.passes(120)
    assert story.session.energy_mwh_metered > 1_000_000
    assert story.session.energy_wh_delivered == 1_000
    assert story.session.stop_reason is StopReason.ENERGY_LIMIT_REACHED


# ---- rule 2: what hinders


def at_rest(story):
    """Live and session of a story in PAUSED whose charger is well again: nothing hinders any more but what a test breaks."""
    story.outlet.armed = True
    return story


HINDRANCES = {
    Hindrance.NO_READING: lambda s: setattr(s.outlet, "stuck_at_none", True),
    Hindrance.NOT_ARMED: lambda s: setattr(s.outlet, "armed", False),
    Hindrance.FAULT: lambda s: setattr(s.outlet, "fault", "meter_jump"),
    Hindrance.NO_PLUG: lambda s: setattr(s.outlet, "pilot_state", "A"),
    Hindrance.RESERVE: lambda s: setattr(s.outlet, "soc_permille", 200),
}


@pytest.mark.parametrize("why", HINDRANCES)
def test_rule_2_each_fault_of_the_charger_hinders_alone(why):
    """A reason that is forgotten would energise a faulty port; one that is mixed up would mislead the installer."""
    story = authorised(policy=Policy(max_unacked_wh={PORT: 50}, soc_permille_reserve=200))
    story.outlet.armed = True
    HINDRANCES[why](story)
    story.passes(4)
    assert hindrance(story.session, story.live) is why
    assert not story.delivering


@pytest.mark.parametrize("pilot_state", ["E", "F"])
def test_rule_2_a_pilot_fault_hinders_like_any_fault(pilot_state):
    """IEC 61851 E and F are faults although no register says so."""
    story = authorised()
    story.outlet.armed, story.outlet.pilot_state = True, pilot_state
    story.passes(2)
    assert hindrance(story.session, story.live) is Hindrance.FAULT


def test_rule_2_a_stale_reading_is_no_reading():
    """A poll that stopped coming must not keep power on with yesterday's values."""
    story = delivering()
    story.leaps(3)
    _ = story >> Beat()
    assert hindrance(story.session, story.live) is Hindrance.NO_READING
    assert not story.delivering


def test_rule_2_a_stale_view_hinders():
    """While blind, a close on chain would go unseen and every Wh would be a gift."""
    story = delivering(signing=True)
    story.blind = True
    seen_at_ms = story.live.header.seen_at_ms
    story.passes((seen_at_ms + 60_000 - story.now_ms) // 1000)
    assert story.delivering
    story.passes(5)
    assert story.stage is S.PAUSED
    assert hindrance(story.session, story.live) is Hindrance.VIEW_STALE


def test_rule_2_an_old_head_served_again_does_not_refresh_the_view():
    """A frozen or lying node would otherwise look alive."""
    story = delivering(signing=True)
    story.blind = True
    for _ in range(7):
        _ = story.passes(10) >> head(story.head_number)
    assert hindrance(story.session, story.live) is Hindrance.VIEW_STALE


def test_rule_2_heads_from_before_the_connect_are_a_stale_view():
    """A node that still catches up serves old heads as fast as new ones; by them the token would be valid for ever."""
    story = authorised()
    story.outlet.armed, story.blind = True, True
    story = story >> head(at_s=T0 - 500) >> passes(2)
    assert hindrance(story.session, story.live) is Hindrance.VIEW_STALE
    assert not story.delivering


def test_rule_2_the_validity_less_its_margin_hinders():
    """Energy delivered in the last minute might not settle in time."""
    story = authorised()
    story.outlet.armed = True
    late = replace(story.live, now_ms=story.now_ms + (4 * 3600 - 61 - (story.at_s - T0)) * 1000)
    late = fresh(late, story)
    assert hindrance(story.session, late) is None
    too_late = fresh(replace(late, now_ms=late.now_ms + 1000), story)
    assert hindrance(story.session, too_late) is Hindrance.TOO_LATE


def fresh(live: Live, story) -> Live:
    """The same world with a reading and a header from this very moment."""
    reading = story.outlet.reading(live.now_ms)
    port = replace(live.ports[PORT], reading=reading, previous=reading, armed=True)
    assert live.header is not None
    header = replace(live.header, timestamp_s=live.at_s, seen_at_ms=live.now_ms)
    return replace(live, ports={PORT: port}, header=header)


@pytest.mark.parametrize("close", [closing(), ended(0)])
def test_rule_2_a_close_on_chain_hinders_at_once(close):
    """After the consumer closes, only receipts within the window still pay."""
    story = delivering() >> close
    assert not story.delivering
    assert story.session.stop_reason is StopReason.REMOTE


def test_rule_2_no_credit_hinders():
    """The meter runs ahead of the receipts by at most what the owner risks."""
    story = delivering().passes(40)
    assert hindrance(story.session, story.live) is Hindrance.CREDIT


def test_rule_2_the_cap_on_unfinal_energy_hinders_until_finality():
    """A reorg that never re-includes `connect` may cost 2 kWh, not the whole order."""
    big = connect(order_wh=5_000)
    story = Story(signing=True, policy=Policy(max_unacked_wh={PORT: 50}, max_unfinal_wh=300))
    story = story >> head() >> seen(big) >> believed(big) >> passes(2) >> presents(big)
    story.passes(170)
    assert hindrance(story.session, story.live) is Hindrance.UNFINAL_CAP
    assert story.stage is S.PAUSED
    story = (story >> final(big)).passes(3)
    assert story.delivering


def test_rule_2_finality_is_lost_with_the_block():
    """It was final, a finality bug or another node took it away: the new block starts with the small cap again."""
    again = connect(fork=1)
    story = (delivering() >> final()).passes(3)
    assert story.session.final
    story = (story >> orphaned()).passes(3) >> seen(again) >> believed(again)
    assert not story.session.final


def test_rule_2_the_one_way_door_hinders_before_everything():
    """A settled session must not be energised whatever else is fine."""
    story = at(S.SETTLING)
    assert hindrance(story.session, story.live) is Hindrance.END_INTENT


def test_rule_2_power_offered_by_an_earlier_life_hinders():
    """Rule 9's half: an open segment of a dead process is first closed at a register seen at rest."""
    story = delivering(signing=True).passes(5).restarts()
    story = story >> head() >> passes(1)
    assert hindrance(story.session, story.live) is Hindrance.OTHER_LIFE


def test_rule_2_a_token_for_the_old_block_is_not_enough_after_a_reorg():
    """The consumer's word for a token that no longer exists entitles to nothing."""
    again = connect(fork=1)
    story = at(S.ORPHANED) >> seen(again) >> believed(again)
    assert story.stage is S.MATCHED
    story.outlet.armed = True
    story.passes(5)
    assert story.stage is S.MATCHED
    assert (story >> presents(again)).passes(3).delivering


def test_an_empty_live_owes_nothing_but_hold():
    """A daemon that has just started, or lost everything, must not offer power from memory alone."""
    for stage in Stage:
        story = at(stage).restarts()
        assert isinstance(story.on_port(), Hold), stage


# ---- rule 3: credit


def test_rule_3_unacked_energy_stays_near_the_limit_and_pauses():
    """A consumer who stops signing gets at most the limit and the seconds it takes to see and stop."""
    story = delivering().passes(60)
    assert story.stage is S.PAUSED
    assert story.session.pause_reason == Hindrance.CREDIT
    seconds_to_stop = 2
    assert story.session.energy_mwh_metered <= 50_000 + seconds_to_stop * POWER_W * 1000 // 3600


def test_rule_3_a_receipt_resumes_and_the_meter_goes_on_where_it_stood():
    """Pausing must cost the honest consumer nothing but seconds."""
    story = delivering().passes(60)
    begin = story.session.register_mwh_begin
    story = (story >> receipt(50)).passes(3)
    assert story.stage is S.DELIVERING
    assert story.session.register_mwh_begin == begin
    assert story.on_port() == Deliver(PORT, SID, REGISTER + 1_000_000)


def test_who_signs_one_wh_at_a_time_wears_the_contactor_no_more_than_a_minute_allows():
    """Would catch a consumer that pays for every Wh and opens the contactor a hundred times in an hour: rests double."""
    story, pauses = delivering(), []
    for second in range(1_800):
        before = story.stage
        story.passes(1)
        if story.stage is S.PAUSED and before is S.DELIVERING:
            pauses.append(second)
        if story.stage is S.PAUSED and hindrance(story.session, story.live) is Hindrance.CREDIT:
            unacked_wh = story.session.energy_mwh_metered // 1000 - story.session.energy_wh_acked
            story = story >> receipt(story.session.energy_wh_acked + unacked_wh - 49)
    rests = [later - earlier for earlier, later in itertools.pairwise(pauses)]
    assert 10 < len(pauses) < 40
    assert min(rests[:1]) < 10, (
        "the first ones cost an honest consumer with a bad network nothing but seconds"
    )
    assert min(rests[6:]) >= CREDIT_REST_S_MAX


def test_a_rest_is_shown_by_name_and_ends():
    """Would catch a consumer who signed, sees nothing happen and is not told why; or a rest that never ends."""
    story = delivering()
    while story.stage is not S.PAUSED:
        story.passes(1)
    story = story >> receipt(story.session.energy_mwh_metered // 1000)
    assert hindrance(story.session, story.live) is Hindrance.RESTING
    assert story.passes(CREDIT_REST_S + 1).delivering


def test_only_pauses_for_credit_rest():
    """Would catch an honest consumer who waits for what he has no part in: a chain that was away for a moment."""
    story = delivering(signing=True)
    story = story >> ev.DeliveryPaused(story.live.at_s, SID, story.outlet.register_mwh, Hindrance.VIEW_STALE)
    assert story.session.credit_pauses == 0
    assert hindrance(story.session, story.live) is not Hindrance.RESTING


def test_rule_3_two_minutes_without_a_receipt_end_the_session_on_the_last_one():
    """A consumer who went away must not hold the port for ever."""
    story = (delivering().passes(20) >> receipt(40)).passes(40)
    assert story.stage is S.PAUSED
    paused_s = story.at_s - story.session.stage_at_s
    story.passes(119 - paused_s)
    assert story.stage is S.PAUSED
    story.passes(1 + 20)
    assert story.session.stop_reason is StopReason.TIMEOUT
    assert story.stage is S.SETTLING
    assert story.owed_of(SignSettlement)[0].energy_wh == 40


def test_rule_3_a_lower_receipt_takes_nothing_back():
    """Receipts are cumulative; an old one may arrive late."""
    story = delivering().passes(10) >> receipt(10)
    before = story.session
    assert (story >> receipt(9)).session == before


def test_rule_3_a_receipt_is_journaled_before_it_is_credit():
    """Credit that a crash forgets is a gift."""
    story = delivering().passes(10)
    story.journal.fail_next = True
    with pytest.raises(OSError, match="disk"):
        _ = story >> receipt(20)
    assert story.session.energy_wh_acked == 0


def test_rule_3_the_receipt_that_settles_is_the_one_that_the_contract_would_pay():
    """The predicate here and there is one: what is credited must be collectable."""
    story = (delivering().passes(10) >> receipt(20) >> stops()).passes(3)
    (owed,) = story.owed_of(SignSettlement)
    assert rules.is_receipt_valid(
        DOMAIN,
        owed.ack,
        session_id=SID,
        provider=PROVIDER.address,
        consumer=CONSUMER.address,
        energy_wh_ordered=1_000,
        delivered_wh=owed.energy_wh,
    )


# ---- rules 4 and 5


def test_rule_4_an_early_token_waits_for_the_chain():
    """Consumers are faster than confirmations: they must not have to come back."""
    story = Story() >> head() >> seen() >> presents() >> passes(2)
    assert not story.book.sessions
    assert not story.delivering
    story = story >> believed() >> passes(2)
    assert story.delivering


def test_rule_4_a_token_for_a_session_nobody_saw_is_not_kept():
    """Otherwise strangers fill the disk with sessions that never existed."""
    story = Story() >> head() >> presents()
    assert story.kinds == []


def test_rule_4_an_early_token_for_an_old_block_is_not_kept():
    """After a reorg only the new token counts."""
    again = connect(fork=1)
    story = Story() >> head() >> seen() >> presents() >> seen(again)
    assert not story.book.early
    story = story >> presents(TERMS) >> believed(again) >> passes(2)
    assert story.session.presentation is None


def test_rule_4_an_early_token_for_an_orphan_waits_too():
    """A reorg re-mines `connect` under a new token; the consumer presents it before we believe it, once."""
    again = connect(fork=1)
    story = at(S.ORPHANED)
    story.outlet.armed = True
    story = story >> seen(again) >> presents(again) >> believed(again) >> passes(3)
    assert story.delivering
    assert story.session.presentation is not None
    assert story.session.presentation.token == again.token


def test_rule_5_a_presentation_with_the_wrong_token_changes_nothing():
    """The door refuses it; if it ever came further, the session must not notice."""
    story = delivering()
    wrong = presentation(connect(fork=3))
    assert (story >> presents(TERMS, wrong)).session.presentation != wrong


def test_rule_5_a_session_does_not_move_between_ports():
    """Energy of two ports in one account would have no meter."""
    policy = Policy(max_unacked_wh={PORT: 50, "right": 50})
    story = delivering(policy=policy) >> presents(TERMS, presentation(port="right"))
    assert story.session.port == PORT


def test_rule_5_a_new_grant_may_lower_what_is_delivered_but_never_raise_it_above_the_order():
    """The session key's limit is the consumer's own seat belt."""
    story = delivering(signing=True) >> presents(TERMS, presentation(max_energy_wh=30, salt="small"))
    story.passes(60)
    assert story.session.energy_wh_delivered == 30
    assert delivering().session.order_wh == 1_000


# ---- rule 6: settlement


def test_rule_6_sign_journal_broadcast():
    """A transaction that is sent before it is on disk may be sent twice with two nonces."""
    story = at(S.SETTLING)
    assert story.owed_of(BroadcastSettlement) == []
    (owed,) = story.owed_of(SignSettlement)
    assert (owed.session_id, owed.token, owed.energy_wh) == (SID, TERMS.token, 8)
    story = story >> settles()
    assert story.owed_of(SignSettlement) == []
    (sent,) = story.owed_of(BroadcastSettlement)
    assert sent.raw_tx == story.session.settlement.raw_tx


def test_rule_6_exactly_one_settlement_is_owed_after_every_restart():
    """A crash between signing and sending must neither lose nor double it."""
    story = (at(S.SETTLING) >> settles()).restarts()
    assert [type(e) for e in story.owed] == [Hold, BroadcastSettlement]


def test_rule_6_a_replacement_takes_the_place_of_the_first():
    """Same nonce, new fees: what is broadcast from now on is the newest."""
    story = at(S.SETTLING) >> settles() >> settles(fee=2 * 10**9)
    (sent,) = story.owed_of(BroadcastSettlement)
    assert sent.raw_tx == story.session.settlement.raw_tx
    assert story.session.settlement.max_fee_per_gas_wei == 2 * 10**9


def test_rule_6_no_receipt_is_taken_once_the_settlement_is_signed():
    """It could no longer be collected; the consumer must not be told that it counts."""
    story = (delivering().passes(10) >> receipt(10) >> stops()).passes(25) >> settles()
    assert (story >> receipt(12)).session.energy_wh_acked == 10


def test_rule_6_paid_in_full_is_settled():
    """The happy end, and nothing is owed any more."""
    story = at(S.SETTLED)
    story.expect(S.SETTLED, Hold(PORT))


def test_rule_6_paid_less_than_acknowledged_is_stranded_and_says_so():
    """Somebody ended the connection under the receipts that we hold: a human must hear of it."""
    story = at(S.SETTLING) >> settles() >> ended(3) >> ended_believed()
    assert story.stage is S.STRANDED
    assert story.session.ended.energy_wh_settled == 3
    assert story.session.energy_wh_acked == 8


def test_rule_6_while_a_settlement_is_seen_nothing_is_sent_again():
    """Re-sending into a mined nonce only makes noise; an orphaned one is owed again."""
    story = at(S.SETTLING) >> settles() >> ended(8)
    story.expect(S.SETTLING, Hold(PORT))
    assert (story >> ended_orphaned()).owed_of(BroadcastSettlement)


def test_rule_6_belief_in_another_block_settles_nothing():
    """A `ConnectionEnded` that moved to another block is believed there or not at all."""
    story = at(S.SETTLING) >> ended(8, block=200) >> ended_believed(block=201)
    assert story.stage is S.SETTLING


def test_rule_6_three_reverts_need_a_human():
    """More gas does not make a wrong transaction right."""
    story = at(S.SETTLING)
    for turn in range(REVERTS_MAX):
        assert story.stage is S.SETTLING
        assert story.owed_of(SignSettlement), turn
        story = story >> settles(nonce=7 + turn) >> reverts("WrongToken")
    assert story.stage is S.STRANDED
    assert story.session.settlement_error == "WrongToken"


def test_rule_6_a_revert_under_a_nonce_we_left_does_not_count():
    """Only the bytes under the newest nonce speak for us."""
    story = at(S.SETTLING) >> settles()
    old = story.session.settlement.tx_hash
    story = story >> settles(nonce=8) >> ev.SettlementReverted(story.at_s, SID, old, "Replaced")
    assert story.session.settlement is not None
    assert story.session.settlement_reverts == 0


def test_rule_6_a_revert_of_what_was_replaced_uses_up_the_nonce_of_the_replacement():
    """Would catch a settlement that waits for ever for newer bytes which no block can take any more."""
    story = at(S.SETTLING) >> settles()
    old = story.session.settlement.tx_hash
    story = story >> settles(fee=2 * 10**9)
    assert story.session.replacements == 1
    story = story >> ev.SettlementReverted(story.at_s, SID, old, "out_of_gas")
    assert story.owed_of(SignSettlement)
    assert story.session.settlement_reverts == 1


def test_rule_6_ending_without_any_receipt_needs_none():
    """0 Wh: the bond comes home with an empty ack."""
    story = matched()
    story = story >> stops(StopReason.LOCAL)
    (owed,) = story.owed_of(SignSettlement)
    assert (owed.energy_wh, owed.ack) == (0, NO_ACK)


# ---- rule 7: a close in any stage


@pytest.mark.parametrize("stage", [S.MATCHED, S.AUTHORISED, S.DELIVERING, S.PAUSED, S.STOPPING, S.SETTLING])
@pytest.mark.parametrize("final_at_once", [False, True])
def test_rule_7_a_close_in_any_stage_first_opens_then_is_answered(stage, final_at_once):
    """The consumer may end at any moment: no power a beat later, and the highest receipt goes to the chain."""
    story = at(stage)
    acked = story.session.energy_wh_acked
    story = story >> (ended(max(acked, 4)) if final_at_once else closing(0))
    assert not story.delivering
    story.passes(60)
    assert story.stage is S.SETTLING
    owed = story.owed_of(SignSettlement)
    if final_at_once:
        assert owed == []
        assert (story >> ended_believed()).stage is S.SETTLED
    else:
        assert [effect.energy_wh for effect in owed] == [story.session.energy_wh_acked]


# ---- rule 8: not seen open


def test_rule_8_a_contactor_that_does_not_open_is_told_more_firmly_and_then_locked_out():
    """Welded contacts: 0 A, then lock, then the external cut-off, then the port is a technician's, and we still settle."""
    story = delivering().passes(10) >> receipt(20)
    story.outlet.welded = True
    story = story >> stops()
    assert story.on_port() == Hold(PORT, Firmness.HOLD)
    story.passes(3)
    assert story.on_port() == Hold(PORT, Firmness.LOCK)
    story.passes(3)
    assert story.on_port() == Hold(PORT, Firmness.CUT_OFF)
    story.passes(23)
    assert story.stage is S.STOPPING
    story.passes(3)
    assert story.stage is S.SETTLING
    assert story.session.end_seen_open is False
    assert PORT in story.book.locked_ports
    assert story.owed_of(SignSettlement)[0].energy_wh == 20


def test_rule_8_a_head_that_jumps_over_minutes_shortens_no_wait():
    """Storm 622: the first block after an outage moved chain time by 59 s; a car that was just ramping down was called stuck."""
    story = (matched().passes(60) >> presents() >> records()).passes(5)
    story.outlet.welded = True  # still ramping down
    story = (story >> stops()).passes(1) >> head(at_s=story.at_s + 59)
    assert story.stage is S.STOPPING
    story.outlet.welded = False
    story = (story.passes(3) >> receipt(12)).passes(3)
    assert story.stage is S.SETTLING
    assert story.session.end_seen_open


def test_rule_8_a_process_that_stood_still_has_not_waited():
    """Storm 2001296: stopped for 90 s in the middle of a stop, it ended the session by a register from before, and lost 3 Wh."""
    story = delivering().passes(5)
    story.outlet.welded = True  # still ramping down
    story = (story >> stops()).passes(2)
    story.outlet.welded = False
    story.leaps(90) >> Beat()
    assert story.stage is S.STOPPING
    story = (story.passes(3) >> receipt(14)).passes(3)
    assert story.stage is S.SETTLING
    assert story.session.end_seen_open


def test_rule_8_a_contactor_that_does_not_open_for_a_pause_stops_the_session():
    """A pause that cannot be had is a stop."""
    story = delivering()
    story.outlet.welded = True
    story.passes(25 + 31)
    assert story.session.stop_reason is StopReason.OTHER
    assert "pause" in story.session.stop_detail


def test_rule_8_a_locked_port_delivers_to_nobody_until_a_human_unlocks_it():
    """The next customer's session must not close a contactor that is known to be bad."""
    story = delivering().passes(10)
    story.outlet.welded = True
    story = (story >> stops()).passes(40)
    assert PORT in story.book.locked_ports
    story.outlet.welded = False
    other = connect(2)
    story.passes(2)
    story = story >> seen(other) >> believed(other) >> presents(other) >> passes(5)
    assert story.on_port() == Hold(PORT, Firmness.LOCK)
    assert story.book.sessions[other.session_id].stage is S.MATCHED
    story = (story >> ev.PortUnlocked(story.at_s, PORT)).passes(3)
    assert story.delivering


def test_rule_8_a_box_that_charges_by_itself_is_locked_out_until_a_human_unlocks_it():
    """Locked only until it was seen open, it was armed, and so unlocked, and charged again: 125 Wh in 25 s to nobody."""
    story = Story() >> head() >> passes(3)
    story.outlet.welded = story.outlet.closed = True  # nobody offered anything
    story.passes(3)
    assert PORT in story.book.locked_ports
    story.outlet.welded = False
    story.passes(60)
    assert story.on_port() == Hold(PORT, Firmness.LOCK), "also when it is open again: arming would unlock it"
    story.restarts().passes(5)
    assert story.on_port() == Hold(PORT, Firmness.LOCK)
    story = (story >> ev.PortUnlocked(story.at_s, PORT)).passes(3)
    assert story.on_port() == Hold(PORT)
    assert story.kinds == ["PortLocked", "PortUnlocked"]


def test_rule_8_a_car_that_ramps_down_is_not_called_a_box_that_charges_by_itself():
    """A new agent finds a charger at work (another one's, or its own before the journal was lost): it was not at rest yet."""
    story = Story()
    story.outlet.welded = story.outlet.closed = True
    story.passes(20)
    assert story.on_port() == Hold(PORT, Firmness.CUT_OFF)
    story.outlet.welded = False
    story.passes(5)
    assert not story.book.locked_ports
    assert story.on_port() == Hold(PORT)


def test_rule_8_a_silent_charger_ends_by_power_loss_and_still_settles():
    """The bus is cut while energy flows: its own failsafe opens it, we end with the last register we verified."""
    story = delivering(signing=True).passes(10)
    story.outlet.silent = True
    story.passes(5)
    assert not story.delivering
    story.passes(118)
    assert story.session.stop_reason is StopReason.POWER_LOSS
    story.passes(31)
    assert story.stage is S.SETTLING
    assert story.session.end_seen_open is False
    assert story.session.register_mwh_end == REGISTER + 20_000


def test_rule_8_a_bus_that_comes_back_in_time_resumes():
    """A glitch of the wire is not the consumer's fault."""
    story = delivering(signing=True).passes(10)
    story.outlet.silent = True
    story.passes(30)
    story.outlet.closed = False
    story.outlet.silent = False
    story.passes(4)
    assert story.delivering


def test_rule_8_a_restart_in_the_middle_of_a_stop_waits_for_the_charger_to_speak():
    """Ten minutes of downtime are not thirty seconds of disobedience: the port must not be locked out for them."""
    story = delivering().passes(10) >> receipt(20)
    story.outlet.welded = True
    story = (story >> stops()).passes(5)
    story.outlet.welded = False
    story = story.restarts(after_s=600) >> head()
    assert story.stage is S.STOPPING
    story.passes(3)
    assert story.stage is S.STOPPING, "no full register is acknowledged, so it waits for the last receipt"
    story.passes(30)
    assert story.stage is S.SETTLING
    assert story.session.end_seen_open is True
    assert not story.book.locked_ports


def test_rule_8_an_orphan_that_is_not_seen_open_is_ended_and_locked_out_too():
    """Without an end it could never be matched again, and its receipts would lapse."""
    story = delivering().passes(10) >> receipt(20)
    story.outlet.welded = True
    story = (story >> orphaned()).passes(40)
    assert story.stage is S.ORPHANED
    assert story.session.end_intent
    assert PORT in story.book.locked_ports
    again = connect(fork=1)
    story = story >> seen(again) >> believed(again)
    assert story.stage is S.SETTLING
    (owed,) = story.owed_of(SignSettlement)
    assert (owed.token, owed.energy_wh) == (again.token, 20)


# ---- rule 9: restarts


@pytest.mark.parametrize("stage", list(Stage))
def test_rule_9_a_restart_never_resumes_straight_into_delivering(stage):
    """After a crash the first thing that power needs is a contactor seen open, twice, and a closed segment."""
    story = at(stage).restarts()
    assert not story.delivering
    story = story >> head() >> passes(1)
    assert not story.delivering, "one reading is not enough"


def test_rule_9_a_crash_while_delivering_keeps_every_wh_and_goes_on():
    """Between crash and failsafe energy flowed: the register knows, so nobody loses it."""
    story = delivering(signing=True).passes(10)
    story.outlet.register_mwh += 5_000  # until the charger's own failsafe opened
    story = story.restarts(after_s=20) >> head() >> passes(2)
    assert story.session.energy_mwh_metered == 25_000
    paused, began = story.journal.events[-2:]
    assert isinstance(paused, ev.DeliveryPaused)
    assert paused.reason == Hindrance.OTHER_LIFE
    assert isinstance(began, ev.DeliveryBegan)
    assert paused.register_mwh == began.register_mwh
    assert story.delivering


def test_rule_9_the_same_life_number_is_never_used_twice():
    """Two lives with one name would make an old segment look like ours."""
    story = delivering()
    first = story.live.life
    assert story.restarts().live.life > first


def test_rule_9_a_restart_into_a_pause_gives_the_consumer_its_two_minutes():
    """Chain time jumps over the downtime; the consumer could not have signed while we were away."""
    story = delivering().passes(60)
    assert story.stage is S.PAUSED
    story = story.restarts(after_s=900) >> head() >> passes(10)
    assert story.stage is S.PAUSED
    assert (story >> receipt(50)).passes(3).delivering


# ---- rule 10 and time


def test_rule_10_a_no_show_ends_with_0_wh_a_minute_before_the_token_does():
    """The bond must come home without anybody's help."""
    story = matched()
    story.leaps(4 * 3600)
    story = story >> head()
    assert story.stage is S.SETTLING
    assert story.session.stop_reason is StopReason.TIMEOUT
    assert story.session.energy_wh_delivered == 0


def test_rule_10_without_a_header_nobody_is_declared_late():
    """Blind we know no time: ending a session for good on a guess would be a loss nobody can undo."""
    story = matched().restarts().leaps(8 * 3600)
    _ = story >> Beat()
    assert story.live.at_s > TERMS.valid_until_s
    assert story.stage is S.MATCHED
    assert (story >> head() >> Beat()).stage is S.SETTLING


def test_rule_10_the_end_of_validity_stops_a_delivery():
    """The token is the entitlement, and it ends."""
    story = delivering(signing=True, policy=Policy(max_unacked_wh={PORT: 50}))
    story.outlet.power_w = 0
    story.leaps(4 * 3600 - 70)
    story.passes(20)
    assert story.session.stop_reason is StopReason.TIME_LIMIT_REACHED


# ---- the charger's reasons to stop

CHARGER_STOPS = [
    ("pilot_state", "A", StopReason.EV_DISCONNECTED),
    ("pilot_state", "F", StopReason.OTHER),
    ("fault", "over_temperature", StopReason.OTHER),
    ("soc_permille", 0, StopReason.SOC_LIMIT_REACHED),
]


@pytest.mark.parametrize("stage", [S.DELIVERING, S.PAUSED])
@pytest.mark.parametrize(("what", "value", "reason"), CHARGER_STOPS)
def test_the_charger_stops_a_session_for_good_with_an_ocpp_reason(stage, what, value, reason):
    """Unplugged, faulty or empty: the session ends, and the reason is one that other software understands."""
    story = at(stage)
    setattr(story.outlet, what, value)
    story.passes(1)
    if what == "soc_permille":
        assert story.session.stop_reason is None, "one sample may be a glitch"
        story.passes(3)
    assert story.session.stop_reason is reason


RESERVED = Policy(max_unacked_wh={PORT: 50}, soc_permille_reserve=200)


@pytest.mark.parametrize("glitch", [0, 10, 1_000])
def test_rule_2_one_odd_sample_of_the_battery_neither_stops_nor_allows_anything(glitch):
    """Some inverters say 0 %, 1 % or 100 % for a moment: that must not end a paid session, nor sell the owner's way home."""
    story = matched(policy=RESERVED)
    story.outlet.soc_permille = 800
    story = story.passes(4) >> presents() >> records()
    assert story.delivering
    story.outlet.soc_permille = glitch
    story.passes(1)
    story.outlet.soc_permille = 800
    story.passes(5)
    assert story.delivering
    low = matched(policy=RESERVED)
    low.outlet.soc_permille = 150
    low = low.passes(4) >> presents()
    low.outlet.soc_permille = glitch
    low.passes(1)
    low.outlet.soc_permille = 150
    assert not low.passes(5).delivering
    assert hindrance(low.session, low.live) is Hindrance.RESERVE


def test_rule_2_a_battery_that_never_says_the_same_twice_gives_no_power():
    """A charge that nobody knows is no reason to believe the best."""
    story = matched(policy=RESERVED) >> presents()
    for soc_permille in (900, 300) * 5:
        story.outlet.soc_permille = soc_permille
        story.passes(2)
        assert not story.delivering
    assert hindrance(story.session, story.live) is Hindrance.RESERVE


def test_rule_2_without_a_battery_to_look_at_the_owners_budget_is_the_reserve():
    """A plain charger shows no charge: then a fixed amount is what the owner will part with."""
    story = delivering(policy=Policy(max_unacked_wh={PORT: 50}, battery_budget_wh=30), signing=True).passes(
        40
    )
    assert story.session.stop_reason is StopReason.SOC_LIMIT_REACHED
    assert story.stage is S.SETTLING
    assert 30 <= story.session.energy_wh_delivered <= 34


def test_the_last_receipt_is_waited_for_and_not_longer():
    """20 s for the consumer's last signature, then what was signed is what is settled."""
    story = (delivering().passes(10) >> receipt(10) >> stops()).passes(5)
    assert story.stage is S.STOPPING
    assert (story >> receipt(20)).passes(1).stage is S.SETTLING
    slow = (delivering().passes(10) >> receipt(10) >> stops()).passes(21)
    assert slow.stage is S.SETTLING
    assert (slow.session.energy_wh_delivered, slow.session.energy_wh_acked) == (20, 10)


# ---- orphans


@pytest.mark.parametrize("stage", [S.MATCHED, S.AUTHORISED, S.DELIVERING, S.PAUSED, S.SETTLING])
def test_an_orphan_gets_no_power_and_keeps_its_receipts(stage):
    """Its entitlement fell out of the chain, its history did not."""
    story = at(stage)
    acked, ack = story.session.energy_wh_acked, story.session.ack
    story = story >> orphaned()
    assert story.stage is S.ORPHANED
    assert not story.delivering
    story.passes(5)
    assert story.session.segment_mwh_begin is None
    assert (story.session.energy_wh_acked, story.session.ack) == (acked, ack)


def test_an_orphan_comes_back_under_a_new_token_and_goes_on_where_it_stood():
    """The session id survives the reorg, so do its receipts; begin register and metered energy are kept."""
    story = (delivering().passes(10) >> receipt(20) >> orphaned()).passes(3)
    again = connect(fork=1)
    story = (story >> seen(again) >> believed(again) >> presents(again)).passes(3)
    assert story.delivering
    session = story.session
    assert (session.energy_wh_acked, session.register_mwh_begin) == (20, REGISTER)
    assert story.on_port().register_mwh_stop == REGISTER + 1_000_000
    assert session.terms == again


def test_an_orphan_whose_old_block_comes_back_is_matched_again():
    """A node that flaps between two heads says orphaned and then the very same block again."""
    story = (at(S.PAUSED) >> orphaned()).passes(3) >> seen() >> believed()
    assert story.stage is S.AUTHORISED, "its token is good again"
    story.outlet.armed = True
    assert story.passes(3).delivering


def test_an_orphan_with_an_end_intent_is_only_settled():
    """The one-way door holds over a reorg: new token, same energy, never power."""
    story = at(S.SETTLING) >> settles() >> orphaned()
    assert story.owed_of(BroadcastSettlement) == []
    again = connect(fork=1)
    story = story >> seen(again) >> believed(again)
    (owed,) = story.owed_of(SignSettlement)
    assert (story.stage, owed.token, owed.energy_wh) == (S.SETTLING, again.token, 8)


def test_an_orphan_is_not_matched_before_its_segment_is_closed():
    """Otherwise the energy of the open segment would be forgotten."""
    story = delivering().passes(5)
    story.outlet.welded = True
    again = connect(fork=1)
    story = story.passes(2) >> orphaned() >> seen(again) >> believed(again)
    assert story.stage is S.ORPHANED
    assert rematched(story.session, again, story.at_s) is story.session
    story.outlet.welded = False
    story = story.passes(3) >> believed(again)
    assert story.stage is S.MATCHED


def test_an_orphan_still_takes_receipts():
    """The consumer signs what it received; the chain's mood does not change that."""
    story = (delivering().passes(5) >> orphaned()).passes(3) >> receipt(10)
    assert story.session.energy_wh_acked == 10


def test_an_orphan_lapses_after_validity_and_grace():
    """The watch-list must end some day."""
    story = at(S.ORPHANED)
    story.leaps(4 * 3600 + 72 * 3600 - 3600)
    assert (story >> head() >> Beat()).stage is S.ORPHANED
    story.leaps(3600)
    assert (story >> head() >> Beat()).stage is S.LAPSED


def test_an_old_orphan_notice_does_not_touch_the_new_block():
    """Notices may arrive twice and late."""
    again = connect(fork=1)
    story = at(S.ORPHANED) >> seen(again) >> believed(again) >> orphaned(TERMS)
    assert story.stage is S.MATCHED


# ---- records


def test_a_record_is_owed_at_begin_and_at_end_one_at_a_time():
    """A pagination number that is used twice makes a missing record invisible."""
    story = matched() >> presents()
    assert story.owed_of(SignMeterRecord) == [SignMeterRecord(SID, "begin", 1)]
    story = (story >> stops()).passes(25)
    assert story.owed_of(SignMeterRecord) == [SignMeterRecord(SID, "begin", 1)]
    story = story >> records()
    assert story.owed_of(SignMeterRecord) == [SignMeterRecord(SID, "end", 2)]
    story = story >> records()
    assert story.owed_of(SignMeterRecord) == []
    assert story.book.records_signed == 2


def test_a_session_that_ends_before_power_still_gets_both_records():
    """A begin without an end would look like a torn-out page."""
    story = authorised() >> stops()
    assert story.owed_of(SignMeterRecord) == [SignMeterRecord(SID, "end", 2)]
    assert story.session.register_mwh_end == REGISTER


def test_a_record_is_never_owed_for_ever():
    """An effect that no event can discharge is a busy loop: every stage must take the record it owes."""
    for stage in Stage:
        story = at(stage)
        for _ in range(3):
            story = story >> records()
        assert story.owed_of(SignMeterRecord) == [], stage


def test_the_silent_words_of_a_port_are_heard():
    """PortLost disarms: whatever was armed must be armed and read back again before power returns."""
    story = delivering() >> PortLost(PORT)
    assert not story.delivering
    assert hindrance(story.session, story.live) is Hindrance.NOT_ARMED


def test_stages_that_hold_a_port_all_have_one():
    """A holder without a port would hold every port, or none."""
    for stage in HOLDS_PORT:
        assert at(stage).session.port == PORT
        assert at(stage).session.holds_port


def test_a_session_signed_by_the_wallet_itself_settles_with_the_wallets_receipts():
    """`personal_sign` grants no session key; receipts are then the consumer's own."""
    story = matched() >> presents(TERMS, presentation(session_key=None)) >> passes(10) >> receipt(16)
    session = story.session
    assert (
        rules.receipt_signer(
            DOMAIN,
            session.ack,
            session_id=SID,
            provider=PROVIDER.address,
            consumer=CONSUMER.address,
            delivered_wh=16,
        )
        == CONSUMER.address
    )
    assert SESSION_KEY.address != CONSUMER.address
