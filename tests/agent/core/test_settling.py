"""What being paid may cost and how long it may wait: every bound, over every session and moment."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from story import DOMAIN, PROVIDER, T0, TERMS

from agent.core import settling
from agent.core.bidding import Bid
from agent.core.book import Book
from agent.core.live import Live, Policy
from agent.core.session import Session, Settlement, Stage
from agent.core.settling import REPLACEMENTS_MAX, STAKE_PERMILLE, Haste
from agent.core.units import BidId, TxHash, cost_wei_floor

GRACE_S = 72 * 3_600


def session(acked_wh=100, replacements=0, closing_at_s=None, stage_at_s=T0):
    """One that owes its settlement."""
    earlier = tuple(TxHash(bytes([number]) * 32) for number in range(replacements))
    settlement = Settlement(acked_wh, 7, TxHash(b"\xff" * 32), b"raw", 1, 1, earlier)
    return Session(
        TERMS,
        Stage.SETTLING,
        stage_at_s,
        energy_wh_acked=acked_wh,
        settlement=settlement,
        closing_at_s=closing_at_s,
    )


def live(after_s, grace_s=GRACE_S):
    """So long after T0."""
    policy = Policy(max_unacked_wh={}, grace_s=grace_s)
    return Live(policy, life=0, started_at_s=T0, started_at_ms=0, now_ms=after_s * 1000)


def test_the_stake_is_the_fee_and_the_bond():
    """Would catch a settlement that gives up its bond because the fee alone is not worth the gas."""
    fee_wei = cost_wei_floor(TERMS.rate_wei_per_kwh, 100)
    assert settling.stake_wei(session(100)) == fee_wei + TERMS.bond_wei
    assert settling.stake_wei(session(0)) == TERMS.bond_wei


def test_the_deadline_is_the_first_moment_a_stranger_may_settle():
    """Would catch patience until the grace is over, while the consumer's own close ends in an hour."""
    late_s = TERMS.valid_until_s + GRACE_S
    assert settling.deadline_s(session(), GRACE_S) == late_s
    assert settling.deadline_s(session(closing_at_s=T0 + 3_600), GRACE_S) == T0 + 3_600
    assert settling.deadline_s(session(closing_at_s=late_s + 9), GRACE_S) == late_s


@pytest.mark.parametrize(
    ("left_s", "expected"),
    [
        (GRACE_S, Haste.CALM),
        (20 * 3_600, Haste.CALM),
        (17 * 3_600, Haste.BRISK),
        (5 * 3_600, Haste.BRISK),
        (4 * 3_600, Haste.URGENT),
        (0, Haste.URGENT),
        (-100_000, Haste.URGENT),
    ],
)
def test_haste_grows_as_the_deadline_nears(left_s, expected):
    """Would catch an agent that is calm on the last evening, or in a hurry on the first."""
    until_s = TERMS.valid_until_s + GRACE_S
    assert settling.haste(session(), live(until_s - left_s - T0)) is expected


def test_a_short_close_leaves_half_an_hour_of_briskness_and_ten_minutes_of_urgency():
    """Would catch parts of a short window that are shorter than a few blocks."""
    one = session(closing_at_s=T0 + 3_600)
    assert settling.haste(one, live(0)) is Haste.CALM
    assert settling.haste(one, live(1_800)) is Haste.BRISK
    assert settling.haste(one, live(3_000)) is Haste.URGENT


moments = st.integers(0, 2 * GRACE_S)


@given(first_s=moments, later_s=moments, acked_wh=st.integers(0, 200), replacements=st.integers(0, 40))
def test_more_time_never_costs_more(first_s, later_s, acked_wh, replacements):
    """Would catch a bound that falls when it should rise, one above the stake, and replacements without end."""
    one, (early, late) = session(acked_wh, replacements), sorted((first_s, later_s))
    assert (
        settling.gas_wei_max(one, live(early))
        <= settling.gas_wei_max(one, live(late))
        <= settling.stake_wei(one)
    )
    soon, sooner = settling.replace_after_s(one, live(early)), settling.replace_after_s(one, live(late))
    assert soon is None or (sooner is not None and sooner <= soon)
    if replacements >= max(REPLACEMENTS_MAX.values()):
        assert sooner is None
    else:
        assert settling.replace_after_s(one, live(10 * GRACE_S)) == 45


def test_the_tables_know_every_haste():
    """Would catch a KeyError in the hour that matters."""
    tables = (STAKE_PERMILLE, REPLACEMENTS_MAX, settling.REPLACE_AFTER_S)
    assert all(set(table) == set(Haste) for table in tables)
    assert STAKE_PERMILLE[Haste.URGENT] == 1_000


def test_every_open_promise_counts_once():
    """Would catch a purse that forgets a sale it has won, or counts one twice."""
    book, one = Book(DOMAIN, PROVIDER.address), session()
    assert settling.settlements_owed(book) == 0
    book = replace(book, sessions={TERMS.session_id: one}, pending={TERMS.session_id: TERMS})
    assert settling.settlements_owed(book) == 1
    bid = Bid(BidId(bytes(32)), TERMS.consumer, 1, 5, T0)
    done = replace(bid, bid_id=BidId(b"\1" * 32), ended=True)
    book = replace(book, bids={bid.bid_id: bid, done.bid_id: done})
    assert settling.settlements_owed(book) == 2
    assert settling.settlements_owed(replace(book, sessions={}, pending={})) == 1


@given(gas=st.integers(1, 10**6), base=st.integers(0, 10**13), tip=st.integers(0, 10**12))
def test_the_reserve_covers_what_a_settlement_offers(gas, base, tip):
    """Would catch a reserve for which the sender would say "unfunded" at the very same fees."""
    prudent_wei = settling.settlement_wei_prudent(gas, base, tip)
    assert prudent_wei >= gas * (2 * base + tip)
    assert settling.settlements_left(3 * prudent_wei, prudent_wei) >= 3 or prudent_wei == 0
