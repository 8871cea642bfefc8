"""One bid's life: decided once, signed under one nonce, ended once; few at a time and few remembered."""

import pytest
from story import CONSUMER, DOMAIN, PROVIDER, T0

from agent.core import bidding
from agent.core import events as ev
from agent.core.book import Book, due, folded, owed, step
from agent.core.effects import BroadcastBid, SignBid
from agent.core.live import Header, Live, Policy
from agent.core.token import bid_id
from agent.core.units import BlockHash, TxHash

WHO = CONSUMER.address


def decided(nonce=1, rate=5, until_s=T0 + 60):
    """The owner's word."""
    return ev.BidDecided(T0, bid_id(WHO, nonce, rate), WHO, nonce, rate, until_s)


def signed(of, nonce=7, raw=b"raw"):
    """The sender's."""
    return ev.BidSigned(T0, of.bid_id, nonce, TxHash(raw.rjust(32, b"\0")), raw, 10**15)


def ended(of, error=""):
    """The chain's."""
    return ev.BidEnded(T0, of.bid_id, error)


def book(*events):
    """After these."""
    found = Book(DOMAIN, PROVIDER.address)
    for event in events:
        found = step(found, event)
    return found


def live(at_s=T0, *, seen=True):
    """Chain time now; `seen`: a head was seen."""
    header = Header(1, BlockHash(bytes(32)), at_s, 0) if seen else None
    return Live(Policy(max_unacked_wh={}), 0, at_s, 0, 0, header)


def test_a_bid_is_signed_then_sent_then_over():
    """Would catch a bid that is sent before it is signed, or goes on being sent when it is over."""
    one = decided()
    assert owed(book(one), live()) == (SignBid(one.bid_id),)
    sent = signed(one)
    assert owed(book(one, sent), live()) == (BroadcastBid(one.bid_id, sent.tx_hash, sent.raw_tx),)
    assert owed(book(one, sent, ended(one)), live()) == ()


def test_the_same_bid_is_one_bid():
    """Would catch a second transaction because the owner asked twice, also after it was placed."""
    one = decided()
    for before in (book(one), book(one, signed(one)), book(one, signed(one), ended(one))):
        assert step(before, one) is before


def test_a_refused_bid_may_be_decided_anew():
    """Would catch an owner who mends what was refused (a bond limit) and may never bid that rate again."""
    one = decided()
    again = book(one, ended(one, "OperatorLimit"), one)
    assert owed(again, live()) == (SignBid(one.bid_id),)


def test_another_nonce_for_the_same_bid_is_a_bug():
    """Would catch a replacement that could be mined beside what it replaces."""
    one = decided()
    again = book(one, signed(one), signed(one, raw=b"dearer"))
    assert again.bids[one.bid_id].signed.earlier == (signed(one).tx_hash,)
    with pytest.raises(AssertionError, match="second nonce"):
        step(again, signed(one, nonce=8))


def test_few_at_a_time_and_few_remembered():
    """Would catch a script that locks every coin in bonds, and a book that grows with every bid."""
    many = [decided(number) for number in range(1, bidding.BIDS_OPEN_MAX + 2)]
    assert len(book(*many).open_bids()) == bidding.BIDS_OPEN_MAX
    old = [
        event for number in range(1, 100) for event in (decided(number), ended(decided(number), "BidTooHigh"))
    ]
    assert len(book(*old).bids) == bidding.BIDS_KEPT_MAX


def test_what_nobody_signs_in_time_is_given_up():
    """Would catch money bound an hour later; and a verdict by a clock that stands still for want of a head."""
    one = book(decided(until_s=T0 + 60))
    assert due(one, live(T0 + 60)) is None
    assert due(one, live(T0 + 61)).error == "expired"
    assert due(one, live(T0 + 61, seen=False)) is None
    assert due(step(one, signed(decided())), live(T0 + 999)) is None, (
        "signed bytes are said until their nonce is used"
    )


def test_history_folds_only_when_no_bid_is_under_way():
    """Would catch a signed bid forgotten with its nonce."""
    one = decided()
    assert folded(book(one), T0) is None
    over = book(one, ended(one, "expired"))
    fold = folded(over, T0)
    assert step(over, fold).bids == {}
