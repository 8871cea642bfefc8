"""The market's rules as stories on the real bytecode (PROTOCOL section 2), to the wei, with every refusal by its name."""

from dataclasses import replace

import pytest
from market import DEFAULTS, Actor, Market, Reverted

from agent.chain import contract as c
from agent.core import token as tk
from agent.core.token import NO_ACK
from agent.core.units import Address, cost_wei_ceil, cost_wei_floor

START_RATE = 3 * 10**14
RATE = 2 * 10**14
ENERGY_WH = 200
COST_WEI = cost_wei_ceil(RATE, ENERGY_WH)
ETHER = 10**18


@pytest.fixture(scope="module")
def shared_market():
    """One deployment for all stories of this file."""
    return Market()


@pytest.fixture
def market(shared_market):
    """The market as it was deployed: each story is forgotten again."""
    place = shared_market.snapshot()
    yield shared_market
    shared_market.restore(place)


@pytest.fixture
def token(market):
    """An open session: 200 Wh at 2e14 wei/kWh with `market.provider`."""
    return market.open_session(ENERGY_WH, RATE)


def refused(market: Market, sender: Actor, data: bytes, value_wei: int = 0) -> str:
    """The name of the error; fails if the call went through."""
    with pytest.raises(Reverted) as caught:
        market.send(sender, data, value_wei)
    return caught.value.words


def end(token: tk.Token, energy_wh: int, ack: tk.Ack = NO_ACK) -> bytes:
    """Calldata of endConnection."""
    return c.encode_end_connection(token, energy_wh, ack)


def bid(market: Market, rate: int, nonce: int = 1) -> bytes:
    """Calldata of a bid for the consumer's auction."""
    return c.encode_place_bid(market.consumer.address, nonce, rate)


# ------------------------------------------------------------------------------------------ whole trades


def test_one_trade_to_the_wei(market):
    """Would catch a wei created, lost or paid to the wrong side anywhere between auction and withdrawal."""
    market.start(ENERGY_WH, START_RATE)
    market.bid(RATE)
    market.close()
    token = market.connect()
    opened = market.session(token)
    assert (opened.status, opened.consumer, opened.provider) == (
        c.SessionStatus.ACTIVE,
        market.consumer.address,
        market.provider.address,
    )
    assert (opened.energy_wh, opened.rate_wei_per_kwh, opened.deposit_wei, opened.bond_wei) == (
        ENERGY_WH,
        RATE,
        COST_WEI,
        COST_WEI,
    )
    assert market.ledger_wei(market.consumer) == cost_wei_ceil(START_RATE, ENERGY_WH) - COST_WEI
    ended = market.send(market.provider, end(token, ENERGY_WH, market.receipt(token, ENERGY_WH)))
    assert ended.log(c.ConnectionEnded) == c.ConnectionEnded(
        market.address, token, market.consumer.address, market.provider.address, ENERGY_WH, COST_WEI
    )
    assert not market.session(token).is_open
    for actor, amount_wei in ((market.provider, 2 * COST_WEI), (market.consumer, COST_WEI // 2)):
        before_wei = market.balance_wei(market.stranger.address)
        market.send(actor, c.encode_withdraw(amount_wei, market.stranger.address))
        assert market.balance_wei(market.stranger.address) == before_wei + amount_wei
        assert market.ledger_wei(actor) == 0
    assert market.balance_wei(market.address) == 0


def test_connect_tells_the_papers_event_and_the_whole_session(market):
    """Would catch an event that the daemon cannot rebuild the token from."""
    market.start(ENERGY_WH, START_RATE, validity_s=600)
    market.bid(RATE)
    market.close()
    done = market.send(market.consumer, c.encode_connect(market.provider.address, ENERGY_WH))
    parties = (market.consumer.address, market.provider.address)
    token = tk.access_token(*parties, market.now_s, market.now_s + 600)
    assert done.log(c.Connected) == c.Connected(
        market.address, market.provider.address, market.consumer.address, token, market.now_s + 600
    )
    session_id = tk.session_id(market.chain_id, market.address, *parties, 1)
    assert done.log(c.SessionOpened) == c.SessionOpened(
        market.address, session_id, token, *parties, 1, ENERGY_WH, RATE, COST_WEI, COST_WEI, market.now_s, market.now_s + 600
    )  # fmt: skip
    assert done.output == token
    asked = c.encode_session_id_of(*parties, 1)
    assert c.decode_session_id_of(market.view(asked)) == session_id


def test_partial_delivery_pays_what_the_receipt_says(market, token):
    """Would catch paying the order instead of the delivery, or rounding in the wrong direction."""
    market.send(market.provider, end(token, 133, market.receipt(token, 133)))
    fee_wei = cost_wei_floor(RATE, 133)
    assert market.ledger_wei(market.provider) == fee_wei + COST_WEI
    assert market.ledger_wei(market.consumer) == COST_WEI // 2 + COST_WEI - fee_wei
    assert market.held_wei() == market.balance_wei(market.address)


def test_session_key_signs_receipts(market, token):
    """Would catch a grant that the contract does not honour: the phone sleeps, the key signs."""
    ack = market.granted_receipt(token, 150, market.hot_key, 180)
    market.send(market.provider, end(token, 150, ack))
    assert market.ledger_wei(market.provider) == cost_wei_floor(RATE, 150) + COST_WEI


# ------------------------------------------------------------------------------------------ no-shows


def test_consumer_does_not_show_up(market, token):
    """Would catch a bond that a consumer can lock by staying away: the provider leaves at once, without a signature."""
    market.send(market.provider, end(token, 0))
    assert market.ledger_wei(market.provider) == COST_WEI
    assert market.ledger_wei(market.consumer) == cost_wei_ceil(START_RATE, ENERGY_WH)


def test_provider_does_not_show_up(market, token):
    """Would catch a deposit that a provider can lock by staying away: concede 0, wait for the challenge, settle."""
    closing = market.send(market.consumer, end(token, 0)).log(c.ConnectionClosing)
    assert closing.close_at_s == market.now_s + DEFAULTS.challenge_s
    assert (
        refused(market, market.stranger, c.encode_settle(token)) == f"TooEarly(settleAt={closing.close_at_s})"
    )
    market.pass_time(DEFAULTS.challenge_s)
    market.send(market.stranger, c.encode_settle(token))
    assert market.ledger_wei(market.consumer) == cost_wei_ceil(START_RATE, ENERGY_WH)
    assert market.ledger_wei(market.provider) == COST_WEI


def test_both_vanish(market, token):
    """Would catch money locked for ever: after validity and grace any stranger settles at what was proven."""
    settle_at_s = market.session(token).settle_at_s
    assert settle_at_s == market.now_s + 3600 + DEFAULTS.grace_s
    market.pass_time(settle_at_s - market.now_s - 2)
    assert refused(market, market.stranger, c.encode_settle(token)).startswith("TooEarly")
    market.send(market.stranger, c.encode_settle(token))
    assert market.ledger_wei(market.provider) == COST_WEI
    assert refused(market, market.stranger, c.encode_settle(token)).startswith("NoSession")


# ------------------------------------------------------------------------------------------ fair endings


def test_consumer_concedes_less_and_provider_answers_with_a_receipt(market, token):
    """Would catch a consumer that pays less than it signed for: anyone can raise the claim inside the challenge."""
    market.send(market.consumer, end(token, 50))
    close_at_s = market.session(token).settle_at_s
    raised = market.send(market.stranger, c.encode_submit_receipt(token, 120, market.receipt(token, 120)))
    assert raised.log(c.ReceiptAccepted).claimed_wh == 120
    market.send(market.consumer, end(token, 60))  # lower: changes nothing
    state = market.session(token)
    assert (state.status, state.claimed_wh, state.settle_at_s) == (c.SessionStatus.CLOSING, 120, close_at_s)
    market.pass_time(DEFAULTS.challenge_s)
    market.send(market.consumer, c.encode_settle(token))
    assert market.ledger_wei(market.provider) == cost_wei_floor(RATE, 120) + COST_WEI


def test_close_at_never_moves(market, token):
    """Would catch a consumer that keeps its deposit's settlement away by conceding again and again."""
    market.send(market.consumer, end(token, 10))
    close_at_s = market.session(token).settle_at_s
    market.pass_time(1000)
    again = market.send(market.consumer, end(token, 20)).log(c.ConnectionClosing)
    assert (again.claimed_wh, again.close_at_s) == (20, close_at_s)
    assert market.send(market.consumer, end(token, 20)).logs == ()


def test_closing_never_ends_later_than_grace(market, token):
    """Would catch a late concession that buys the consumer more time than doing nothing."""
    settle_at_s = market.session(token).settle_at_s
    market.pass_time(settle_at_s - market.now_s - 10)
    market.send(market.consumer, end(token, 10))
    assert market.session(token).settle_at_s == settle_at_s


def test_consumer_ends_with_the_full_order_at_once(market, token):
    """Would catch the paper's own ending, the consumer's, being slower or dearer than needed."""
    ended = market.send(market.consumer, end(token, ENERGY_WH)).log(c.ConnectionEnded)
    assert (ended.delivered_wh, ended.fee_wei) == (ENERGY_WH, COST_WEI)


def test_consumer_concedes_after_a_full_receipt_was_submitted(market, token):
    """Would catch a needless challenge over nothing: when the full order is proven, the consumer's end is final."""
    market.send(market.provider, c.encode_submit_receipt(token, ENERGY_WH, market.receipt(token, ENERGY_WH)))
    assert market.send(market.consumer, end(token, 0)).log(c.ConnectionEnded).fee_wei == COST_WEI


def test_provider_never_gets_less_than_what_is_claimed(market, token):
    """Would catch a hot key or a hasty provider throwing away what the consumer already conceded."""
    market.send(market.consumer, end(token, 120))
    assert market.send(market.provider, end(token, 0)).log(c.ConnectionEnded).delivered_wh == 120


def test_submitted_receipts_only_raise(market, token):
    """Would catch an old receipt that lowers the claim, or an event for a call that changed nothing."""
    market.send(market.stranger, c.encode_submit_receipt(token, 100, market.receipt(token, 100)))
    assert (
        market.send(market.stranger, c.encode_submit_receipt(token, 40, market.receipt(token, 40))).logs == ()
    )
    assert market.session(token).claimed_wh == 100


# ------------------------------------------------------------------------------------------ refused receipts


@pytest.mark.parametrize(
    "forge",
    [
        pytest.param(lambda s: s[:64], id="64 bytes"),
        pytest.param(lambda s: s[:64] + bytes([s[64] - 27]), id="v 0/1"),
        pytest.param(
            lambda s: s[:32] + (tk.CURVE_ORDER - int.from_bytes(s[32:64])).to_bytes(32) + bytes([55 - s[64]]),
            id="high s",
        ),
        pytest.param(lambda s: s[:32] + bytes(33), id="zero s"),
        pytest.param(lambda _: b"", id="none"),
    ],
)
def test_signatures_not_in_canonical_form_are_refused(market, token, forge):
    """Would catch malleable signatures: one receipt, one form."""
    ack = market.receipt(token, 100)
    ack = replace(ack, receipt_signature=forge(ack.receipt_signature))
    assert refused(market, market.provider, end(token, 100, ack)) == "InvalidReceipt"
    assert refused(market, market.provider, c.encode_submit_receipt(token, 100, ack)) == "InvalidReceipt"


def test_receipts_of_others_are_refused(market, token):
    """Would catch a provider that signs its own receipts, claims more than signed, or stretches a grant."""
    own = market.receipt(token, 100, signer=market.provider)
    assert refused(market, market.provider, end(token, 100, own)) == "InvalidReceipt"
    less = market.receipt(token, 99)
    assert refused(market, market.provider, end(token, 100, less)) == "InvalidReceipt"
    for ack in (
        market.granted_receipt(token, 151, market.hot_key, 150),
        market.granted_receipt(token, 151, market.hot_key, 150, max_energy_wh=200),
        market.granted_receipt(token, 100, market.hot_key, 150, session_key=market.rival.address),
        market.granted_receipt(token, 100, market.hot_key, 150, grant_signature=b""),
    ):
        assert (
            refused(market, market.provider, end(token, 151 if ack.max_energy_wh == 200 else 100, ack))
            == "InvalidReceipt"
        )
    full = market.receipt(token, ENERGY_WH + 1)
    assert (
        refused(market, market.provider, end(token, ENERGY_WH + 1, full))
        == f"OverAmount(energyWh={ENERGY_WH})"
    )


def test_a_receipt_of_another_session_is_refused(market, token):
    """Would catch replay: the same two cars meet again, and yesterday's receipt must not pay today."""
    old = market.receipt(token, ENERGY_WH)
    market.send(market.provider, end(token, ENERGY_WH, old))
    again = market.open_session(ENERGY_WH, RATE)
    assert refused(market, market.provider, end(again, ENERGY_WH, old)) == "InvalidReceipt"


def test_strangers_cannot_end(market, token):
    """Would catch somebody else settling on an old receipt before the last one is in."""
    for sender in (market.stranger, market.rival, market.organisation):
        assert refused(market, sender, end(token, 10, market.receipt(token, 10))) == "NotParty"
    assert refused(market, market.provider, end(b"\x09" * 32, 0)).startswith("NoSession")


def test_a_remined_connect_keeps_the_session_and_its_receipts(market):
    """Would catch receipts bound to the token: a reorg re-mines `connect` at another time, and they must still pay."""
    market.start(ENERGY_WH, START_RATE)
    market.bid(RATE)
    market.close()
    fork = market.snapshot()
    token = market.connect()
    ack = market.granted_receipt(token, 180, market.hot_key, ENERGY_WH)
    session_id = tk.session_id(
        market.chain_id, market.address, market.consumer.address, market.provider.address, 1
    )
    market.restore(fork)
    market.pass_time(7)
    opened = market.send(market.consumer, c.encode_connect(market.provider.address, ENERGY_WH)).log(
        c.SessionOpened
    )
    assert opened.token != token
    assert opened.session_id == session_id
    market.send(market.provider, end(opened.token, 180, ack))
    assert market.ledger_wei(market.provider) == cost_wei_floor(RATE, 180) + COST_WEI


# ------------------------------------------------------------------------------------------ the auction


def test_bids_fall_and_outbid_bonds_return(market):
    """Would catch an outbid provider whose bond stays locked, or a lowest bid that can rise."""
    market.start(ENERGY_WH, START_RATE)
    nonce = market.auction().auction_nonce
    assert (
        refused(market, market.provider, bid(market, START_RATE + 1), ETHER)
        == f"BidTooHigh(rateMax={START_RATE})"
    )
    market.bid(START_RATE)
    limit = START_RATE - START_RATE // 100
    assert market.auction().rate_wei_per_kwh_max == limit
    assert (
        refused(market, market.rival, bid(market, limit + 1, nonce), ETHER) == f"BidTooHigh(rateMax={limit})"
    )
    market.bid(limit, market.rival)
    assert market.ledger_wei(market.provider) == cost_wei_ceil(START_RATE, ENERGY_WH)
    assert market.auction().provider == market.rival.address
    assert market.held_wei() == market.balance_wei(market.address)


def test_a_leading_provider_lowers_its_own_bid_with_its_own_bond(market):
    """Would catch a leader that must bring fresh money to underbid itself."""
    market.start(ENERGY_WH, START_RATE)
    market.bid(START_RATE)
    market.send(market.provider, bid(market, RATE))
    assert market.ledger_wei(market.provider) == cost_wei_ceil(START_RATE, ENERGY_WH) - COST_WEI


def test_bids_near_one_wei(market):
    """Would catch a step of 1 % that is rounded to nothing: below 100 wei a bid falls by one at least."""
    market.start(1_000_000, 3)
    market.bid(3)
    assert refused(market, market.rival, bid(market, 3), ETHER) == "BidTooHigh(rateMax=2)"
    market.bid(1, market.rival)
    assert refused(market, market.provider, bid(market, 1), ETHER) == "BidTooHigh(rateMax=0)"
    assert refused(market, market.provider, bid(market, 0), ETHER) == "RateOutOfRange(rateMax=0)"


def test_a_bid_is_pinned_to_the_auction_it_was_made_for(market):
    """Would catch a swapped auction: the consumer cancels and starts another while a bid is on its way."""
    market.start(ENERGY_WH, START_RATE)
    market.send(market.consumer, c.encode_cancel_auction(market.consumer.address))
    assert refused(market, market.provider, bid(market, RATE, 1), ETHER) == "NoAuction"
    market.start(ENERGY_WH * 1000, START_RATE)
    assert refused(market, market.provider, bid(market, RATE, 1), ETHER) == "StaleAuction(auctionNonce=2)"


def test_late_bids_extend_the_auction_a_few_times_only(market):
    """Would catch sniping in the last second, and an auction that never closes."""
    market.start(ENERGY_WH, START_RATE)
    rate, rivals = START_RATE, (market.provider, market.rival)
    first_closing_s = market.auction().closing_time_s
    market.bid(rate)
    assert market.auction().closing_time_s == first_closing_s, "early bids do not extend"
    for turn in range(DEFAULTS.soft_close_count_max):
        market.pass_time(market.auction().closing_time_s - market.now_s - 3)
        rate = market.auction().rate_wei_per_kwh_max
        market.bid(rate, rivals[turn % 2])
        assert market.auction().closing_time_s == market.now_s + DEFAULTS.soft_close_s
    last_closing_s = market.auction().closing_time_s
    market.pass_time(last_closing_s - market.now_s - 2)
    market.bid(market.auction().rate_wei_per_kwh_max)
    assert market.auction().closing_time_s == last_closing_s
    assert refused(market, market.rival, bid(market, 1), ETHER).startswith("AuctionClosed")


def test_before_and_after_closing_leave_no_second_between(market):
    """Would catch an instant in which both or neither of bid and endAuction is possible."""
    market.start(ENERGY_WH, START_RATE)
    closing_s = market.auction().closing_time_s
    market.pass_time(closing_s - market.now_s - 2)  # the next block is one second before closing
    place = market.snapshot()
    assert refused(market, market.stranger, c.encode_end_auction(market.consumer.address)).startswith(
        "AuctionOpen"
    )
    market.restore(place)
    market.pass_time(1)  # the next block is at closing
    assert refused(market, market.provider, bid(market, RATE), ETHER).startswith("AuctionClosed")
    market.restore((place[0], closing_s - 1))
    ended = market.send(market.stranger, c.encode_end_auction(market.consumer.address)).log(c.AuctionEnded)
    assert (ended.provider, ended.rate_wei_per_kwh) == (Address(bytes(20)), 0)
    assert market.ledger_wei(market.consumer) == cost_wei_ceil(START_RATE, ENERGY_WH)
    assert not market.auction().is_live


def test_connect_needs_the_winner_the_amount_and_the_window(market):
    """Would catch a consumer that connects to an accomplice, for another amount, too early or weeks later."""
    market.start(ENERGY_WH, START_RATE)
    market.bid(RATE)
    connect = c.encode_connect(market.provider.address, ENERGY_WH)
    assert refused(market, market.consumer, connect).startswith("AuctionOpen")
    market.close()
    winner = f"NotWinner(winner=0x{market.provider.address.hex()})"
    assert refused(market, market.consumer, c.encode_connect(market.rival.address, ENERGY_WH)) == winner
    assert (
        refused(market, market.consumer, c.encode_connect(market.provider.address, 1))
        == "WrongEnergy(energyWh=200)"
    )
    assert refused(market, market.rival, connect) == "NoAuction"
    connect_by_s = market.auction().connect_by_s
    market.pass_time(connect_by_s - market.now_s)
    assert refused(market, market.consumer, connect) == f"ConnectExpired(connectBy={connect_by_s})"


def test_connect_without_bids_is_refused(market):
    """Would catch a session with nobody: index zero must not match an account that has none."""
    market.start(ENERGY_WH, START_RATE)
    market.close()
    for nobody in (bytes(20), market.provider.address):
        data = c.encode_connect(Address(nobody), ENERGY_WH)
        assert refused(market, market.consumer, data) == f"NotWinner(winner=0x{bytes(20).hex()})"


def test_the_winner_is_announced_and_can_be_announced_again(market):
    """Would catch an announcement that changes anything."""
    market.start(ENERGY_WH, START_RATE)
    market.bid(RATE)
    market.close()
    before = market.auction()
    for _ in range(2):
        ended = market.send(market.stranger, c.encode_end_auction(market.consumer.address)).log(
            c.AuctionEnded
        )
        assert (ended.provider, ended.rate_wei_per_kwh) == (market.provider.address, RATE)
    assert market.auction() == before


# ------------------------------------------------------------------------------------------ cancelling


def test_a_consumer_cancels_only_while_nobody_bid(market):
    """Would catch a consumer that walks away from a bid it does not like."""
    cancel = c.encode_cancel_auction(market.consumer.address)
    assert refused(market, market.consumer, cancel) == "NoAuction"
    market.start(ENERGY_WH, START_RATE)
    assert refused(market, market.stranger, cancel) == "NotCancellable"
    market.bid(RATE)
    assert refused(market, market.consumer, cancel) == "NotCancellable"
    market.close()
    assert refused(market, market.consumer, cancel) == "NotCancellable"


def test_anyone_cancels_after_the_connect_window(market):
    """Would catch a winner's bond locked by a consumer that never connects."""
    market.start(ENERGY_WH, START_RATE)
    market.bid(RATE)
    connect_by_s = market.auction().connect_by_s
    market.pass_time(connect_by_s - market.now_s - 1)
    cancel = c.encode_cancel_auction(market.consumer.address)
    assert refused(market, market.stranger, cancel) == "NotCancellable", (
        "connect is still possible in this second"
    )
    cancelled = market.send(market.stranger, cancel).log(c.AuctionCancelled)
    assert cancelled.auction_nonce == 1
    assert market.ledger_wei(market.consumer) == cost_wei_ceil(START_RATE, ENERGY_WH)
    assert market.ledger_wei(market.provider) == COST_WEI


@pytest.mark.parametrize("why", ["consumer removed", "provider removed", "market paused"])
def test_anyone_cancels_what_can_no_longer_connect(market, why):
    """Would catch money that waits for a connect which the registry or the pause made impossible."""
    market.start(ENERGY_WH, START_RATE)
    market.bid(RATE)
    act = {
        "consumer removed": c.encode_remove_ev(market.consumer.address),
        "provider removed": c.encode_remove_ev(market.provider.address),
        "market paused": c.encode_change_status(active=False),
    }[why]
    market.send(market.organisation, act)
    cancel = c.encode_cancel_auction(market.consumer.address)
    assert refused(market, market.stranger, cancel) == "NotCancellable", "not before closing"
    market.close()
    connect = c.encode_connect(market.provider.address, ENERGY_WH)
    assert refused(market, market.consumer, connect).partition("(")[0] in ("NotEV", "MarketInactive")
    market.send(market.stranger, cancel)
    assert market.held_wei() == market.balance_wei(market.address)
    assert market.ledger_wei(market.provider) == COST_WEI


# ------------------------------------------------------------------------------------------ pause and removal


def test_a_pause_stops_beginnings_and_no_exit(market, token):
    """Would catch an organisation that can freeze money: every exit must work while paused."""
    market.start(ENERGY_WH, START_RATE)
    market.send(market.organisation, c.encode_change_status(active=False))
    start = c.encode_start_auction(1, 60, 1, 300, bytes(32))
    assert refused(market, market.rival, start, ETHER) == "MarketInactive"
    assert refused(market, market.provider, bid(market, RATE, 2), ETHER) == "MarketInactive"
    assert (
        refused(market, market.organisation, c.encode_add_ev(market.stranger.address, bytes(32)))
        == "MarketInactive"
    )
    market.send(market.stranger, c.encode_submit_receipt(token, 10, market.receipt(token, 10)))
    market.send(market.consumer, end(token, 20))
    market.send(market.provider, end(token, 0))
    market.send(market.consumer, c.encode_cancel_auction(market.consumer.address))
    market.send(market.organisation, c.encode_remove_ev(market.rival.address))
    for actor in (market.consumer, market.provider):
        market.send(actor, c.encode_withdraw(market.ledger_wei(actor), actor.address))
    assert market.balance_wei(market.address) == 0


def test_removed_evs_can_leave_with_their_money(market, token):
    """Would catch an organisation that can rob a car by removing it in the middle of a session."""
    market.send(market.provider, c.encode_set_operator(market.hot_key.address, ETHER))
    for ev in (market.consumer, market.provider):
        market.send(market.organisation, c.encode_remove_ev(ev.address))
        assert not c.decode_is_ev(market.view(c.encode_is_ev(ev.address)))
    market.send(market.provider, c.encode_set_operator(Address(bytes(20)), 0))
    assert refused(market, market.hot_key, end(token, 0)) == "NotParty", "a removed EV revoked its stolen key"
    market.send(market.provider, end(token, 150, market.receipt(token, 150)))
    assert market.ledger_wei(market.provider) == cost_wei_floor(RATE, 150) + COST_WEI
    start = c.encode_start_auction(1, 60, 1, 300, bytes(32))
    assert refused(market, market.consumer, start, ETHER).startswith("NotEV")


def test_registry(market):
    """Would catch Algorithm 1 going wrong: owner only, once, with its commitment and time; removal never refuses."""
    ev, info = market.stranger.address, b"\x42" * 32
    for data in (c.encode_add_ev(ev, info), c.encode_remove_ev(ev), c.encode_change_status(active=False)):
        assert refused(market, market.consumer, data).startswith("OwnableUnauthorizedAccount")
    added = market.send(market.organisation, c.encode_add_ev(ev, info))
    assert added.log(c.EVAdded) == c.EVAdded(market.address, ev, info)
    assert c.decode_ev_info(market.view(c.encode_ev_info(ev))) == c.EvInfo(info, market.now_s)
    assert refused(market, market.organisation, c.encode_add_ev(ev, info)) == f"AlreadyEV(ev=0x{ev.hex()})"
    assert market.send(market.organisation, c.encode_remove_ev(ev)).log(c.EVRemoved).ev == ev
    assert market.send(market.organisation, c.encode_remove_ev(ev)).logs == ()
    assert c.decode_ev_info(market.view(c.encode_ev_info(ev))) == c.EvInfo(bytes(32), 0)


def test_the_organisation_hands_over_in_two_steps(market):
    """Would catch a market lost to a mistyped address."""
    market.send(market.organisation, c.encode_transfer_ownership(market.stranger.address))
    assert c.decode_owner(market.view(c.encode_owner())) == market.organisation.address
    market.send(market.stranger, c.encode_accept_ownership())
    assert c.decode_owner(market.view(c.encode_owner())) == market.stranger.address
    assert c.decode_status(market.view(c.encode_status())), (
        "the handover must not touch the word's other fields"
    )


# ------------------------------------------------------------------------------------------ operators


def test_an_operator_bids_within_its_limit_and_settles(market):
    """Would catch a hot key that can lock more than it was trusted with, or a limit that is never released."""
    market.send(market.provider, c.encode_deposit(), ETHER)
    bid_for = c.encode_place_bid_for(market.provider.address, market.consumer.address, 1, RATE)
    market.start(ENERGY_WH, START_RATE)
    assert refused(market, market.hot_key, bid_for) == "NotOperator"
    market.send(market.provider, c.encode_set_operator(market.hot_key.address, COST_WEI - 1))
    limited = f"OperatorLimit(bondLimit={COST_WEI - 1}, needed={COST_WEI})"
    assert refused(market, market.hot_key, bid_for) == limited
    market.send(market.provider, c.encode_set_operator(market.hot_key.address, COST_WEI))
    market.send(market.hot_key, bid_for)
    asked = c.encode_operator_of(market.provider.address)
    assert c.decode_operator_of(market.view(asked)) == c.OperatorState(
        market.hot_key.address, COST_WEI, COST_WEI
    )
    market.close()
    token = market.connect()
    market.send(market.hot_key, end(token, 100, market.receipt(token, 100)))
    assert c.decode_operator_of(market.view(asked)).bond_wei_locked == 0
    assert market.ledger_wei(market.provider) == ETHER + cost_wei_floor(RATE, 100)
    assert refused(market, market.hot_key, c.encode_withdraw(1, market.hot_key.address)).startswith(
        "Insufficient"
    )


def test_a_stolen_hot_key_ends_at_what_was_shown_and_no_lower(market, token):
    """Would catch a thief of the car's key who takes more than unshown receipts: what lies on the chain is paid, the
    bond comes home, and the key itself gets nothing.
    """
    market.send(market.provider, c.encode_set_operator(market.hot_key.address, ETHER))
    market.send(market.stranger, c.encode_submit_receipt(token, 120, market.receipt(token, 120)))
    assert market.send(market.hot_key, end(token, 0)).log(c.ConnectionEnded).delivered_wh == 120
    assert market.ledger_wei(market.provider) == COST_WEI + cost_wei_floor(RATE, 120)
    assert market.ledger_wei(market.hot_key) == 0
    assert refused(market, market.provider, end(token, 130, market.receipt(token, 130))).startswith(
        "NoSession"
    ), "a receipt that comes after the end is void: show receipts that matter at once"


@pytest.mark.parametrize("release", ["outbid by a rival", "owner bids itself", "cancelled"])
def test_an_operators_limit_comes_back(market, release):
    """Would catch a limit that shrinks with every auction until the car can bid no more."""
    market.send(market.provider, c.encode_deposit(), ETHER)
    market.send(market.provider, c.encode_set_operator(market.hot_key.address, ETHER))
    market.start(ENERGY_WH, START_RATE)
    market.send(
        market.hot_key, c.encode_place_bid_for(market.provider.address, market.consumer.address, 1, RATE)
    )
    if release == "outbid by a rival":
        market.bid(RATE // 2, market.rival)
    elif release == "owner bids itself":
        market.bid(RATE // 2)
    else:
        market.pass_time(market.auction().connect_by_s - market.now_s)
        market.send(market.stranger, c.encode_cancel_auction(market.consumer.address))
    asked = c.encode_operator_of(market.provider.address)
    assert c.decode_operator_of(market.view(asked)).bond_wei_locked == 0
    assert market.held_wei() == market.balance_wei(market.address)


def test_nobody_deals_with_itself(market):
    """Would catch a consumer that wins its own auction, directly or through an operator."""
    market.start(ENERGY_WH, START_RATE)
    assert refused(market, market.consumer, bid(market, RATE), ETHER) == "SelfDeal"
    market.send(market.consumer, c.encode_set_operator(market.hot_key.address, ETHER))
    through = c.encode_place_bid_for(market.consumer.address, market.consumer.address, 1, RATE)
    assert refused(market, market.hot_key, through) == "SelfDeal"


# ------------------------------------------------------------------------------------------ ledger and bounds


def test_locks_come_from_the_ledger(market):
    """Would catch sent value that is not credited first, or a lock taken from thin air."""
    needed = cost_wei_ceil(START_RATE, ENERGY_WH)
    start = c.encode_start_auction(ENERGY_WH, 60, START_RATE, 3600, bytes(32))
    short = f"Insufficient(available={needed - 1}, needed={needed})"
    assert refused(market, market.consumer, start, needed - 1) == short
    market.send(market.consumer, c.encode_deposit(), 5)
    started = market.send(market.consumer, start, needed - 1)
    assert started.log(c.Deposited).amount_wei == needed - 1
    assert market.ledger_wei(market.consumer) == 4
    assert refused(market, market.consumer, start, needed) == "AuctionLive"


def test_withdraw_pays_only_what_is_there_and_only_its_owner(market):
    """Would catch the only door out of the contract being too wide."""
    market.send(market.stranger, c.encode_deposit(), 100)
    here = market.rival.address
    assert (
        refused(market, market.stranger, c.encode_withdraw(101, here))
        == "Insufficient(available=100, needed=101)"
    )
    assert refused(market, market.rival, c.encode_withdraw(1, here)) == "Insufficient(available=0, needed=1)"
    assert refused(market, market.stranger, c.encode_withdraw(1, Address(bytes(20)))) == "ZeroAddress"
    assert refused(market, market.stranger, c.encode_withdraw(1, market.address)) == "TransferFailed"
    withdrawn = market.send(market.stranger, c.encode_withdraw(100, here)).log(c.Withdrawn)
    assert withdrawn == c.Withdrawn(market.address, market.stranger.address, here, 100)


@pytest.mark.parametrize(
    ("energy_wh", "bidding_s", "rate", "validity_s", "name"),
    [
        (0, 60, 1, 300, "EnergyOutOfRange"),
        (2**24, 60, 1, 300, "EnergyOutOfRange"),
        (1, 59, 1, 300, "BiddingOutOfRange"),
        (1, 86_401, 1, 300, "BiddingOutOfRange"),
        (1, 2**64 - 1, 1, 300, "BiddingOutOfRange"),
        (1, 60, 0, 300, "RateOutOfRange"),
        (1, 60, 2**64, 300, "RateOutOfRange"),
        (1, 60, 1, 299, "ValidityOutOfRange"),
        (1, 60, 1, 172_801, "ValidityOutOfRange"),
    ],
)
def test_auctions_out_of_bounds_are_refused(market, energy_wh, bidding_s, rate, validity_s, name):
    """Would catch a number that does not fit its place in a storage word."""
    data = c.encode_start_auction(energy_wh, bidding_s, rate, validity_s, bytes(32))
    assert refused(market, market.consumer, data, ETHER).partition("(")[0] == name


@pytest.mark.parametrize(
    "bad",
    [
        {"bidding_s_min": 0},
        {"bidding_s_min": 100, "bidding_s_max": 99},
        {"token_validity_s_min": 0},
        {"token_validity_s_min": 172_801},
        {"token_validity_s_max": 2**18},
        {"soft_close_count_max": 8},
        {"bond_bps": 10_001},
    ],
)
def test_markets_out_of_bounds_are_not_deployed(market, bad):
    """Would catch parameters that break the packing or the uniqueness of tokens."""
    with pytest.raises(Reverted, match="BadParameters"):
        market.deploy(market.organisation, c.encode_deploy(replace(DEFAULTS, **bad)))


def test_parameters_can_be_read_back(market):
    """Would catch a daemon that plans with other windows than the contract's."""
    quick = c.MarketParameters(5, 600, 2, 3, 60, 30, 900, 40, 50, 5_000)
    address = market.deploy(market.organisation, c.encode_deploy(quick))
    assert c.decode_parameters(market.ask(address, c.encode_parameters())) == quick
    separator = c.decode_domain_separator(market.ask(address, c.encode_domain_separator()))
    assert separator == tk.Domain(market.chain_id, address).separator


def test_half_bonds(market):
    """Would catch a bond that is computed differently when it is locked, shown and returned."""
    other = Market(replace(DEFAULTS, bond_bps=3_333))
    token = other.open_session(energy_wh=7, rate=1_001)
    assert other.session(token).bond_wei == other.bond_wei(1_001, 7) == 3  # ceil(ceil(7.007) * 0.3333)
    other.send(other.provider, end(token, 7, other.receipt(token, 7)))
    assert other.ledger_wei(other.provider) == 7 + 3
    assert other.held_wei() == other.balance_wei(other.address)
