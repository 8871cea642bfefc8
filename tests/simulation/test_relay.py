"""Somebody else's car at our plug: what a relay, or a code stuck over another, costs with agent and consumer as shipped."""

import pytest
from simulation import checkers
from simulation.relay import ORDER_WH, Trick, relayed
from simulation.weather import Storm
from simulation.world import UNACKED_WH

ALLOWANCE_WH = 25


def test_at_the_honest_plug_the_shipped_consumer_gets_and_pays_its_order(folder):
    """Would catch a consumer that is so careful that it cannot charge: then the bounds below would be worth nothing."""
    evening = relayed(Trick(relays=False), folder)
    assert not evening.outcome.broken, evening.outcome.story()
    assert evening.settled_wh == ORDER_WH
    assert evening.guest.asked == 0, "a car that measures for itself asks nobody"


def test_a_driver_who_sees_the_car_charge_says_so_once(folder):
    """Would catch a car without a meter that cannot be charged at all."""
    evening = relayed(Trick(relays=False, car_measures=False, driver="yes"), folder)
    assert not evening.outcome.broken, evening.outcome.story()
    assert evening.settled_wh == ORDER_WH
    assert evening.guest.asked >= 1


@pytest.mark.parametrize(
    "trick",
    [
        Trick(),
        Trick(car_measures=False),
        Trick(car_measures=False, driver="no"),
        Trick(trickles=True),
    ],
    ids=["the car's counter stands still", "nobody confirms", "the driver says no", "the box trickles"],
)
def test_a_relay_costs_the_consumer_its_allowance_and_the_provider_its_credit(trick, folder):
    """Would catch a relay that charges Mallory's car at our expense. The provider's bound is one of the world's own promises."""
    evening = relayed(trick, folder)
    assert not evening.outcome.broken, evening.outcome.story()
    assert checkers.provider_loses_little in checkers.AT_THE_END
    assert evening.settled_wh <= ALLOWANCE_WH + 1.05 * evening.received_wh + 1
    if not trick.trickles:
        assert evening.received_wh == 0
        assert evening.settled_wh > 0
        assert evening.settled_wh < evening.given_wh < ORDER_WH, (
            "Mallory has got something, and not the order"
        )
    assert evening.guest.presented_tokens, "every signature was genuine: the token was accepted"


@pytest.mark.parametrize(
    ("overlay", "reason"), [("stranger", "wrong_provider"), ("relabelled", "wrong_signer")]
)
def test_a_code_stuck_over_another_is_refused_by_name_and_nothing_is_said(overlay, reason, folder):
    """Would catch a token that is shown to whoever puts a sticker on a plug."""
    evening = relayed(Trick(overlay=overlay), folder)
    assert not evening.outcome.broken, evening.outcome.story()
    assert evening.guest.refused == reason
    assert not evening.guest.presented_tokens
    assert evening.settled_wh == 0


def test_a_consumer_that_trusts_the_provider_alone_pays_for_mallory(folder):
    """Would catch a relay that is none: without its rule, the guest pays for the other car, and the checker says so."""
    evening = relayed(Trick(car_measures=False, pre_sign_wh=10_000), folder)
    assert "the guest pays for another car" in evening.outcome.broken
    assert evening.settled_wh == ORDER_WH


@pytest.mark.parametrize("seed", range(4))
def test_a_broker_that_loses_doubles_delays_and_breaks_costs_nothing_but_pauses(seed, folder):
    """Would catch a consumer that one lost message stops, or that signs less after a repeat: the energy is delivered whole."""
    bad = Storm(broker_drops=30, broker_doubles=30, broker_delays=50, broker_breaks=5, calm_from_ms=240_000)
    evening = relayed(Trick(relays=False), folder, bad, seed)
    assert not evening.outcome.broken, evening.outcome.story()
    assert evening.guest.refused == ""
    assert ORDER_WH <= evening.given_wh < ORDER_WH + 3
    assert evening.settled_wh > ORDER_WH - UNACKED_WH - 15  # only the very last signature may come too late


@pytest.mark.parametrize("killed", [False, True], ids=["asleep", "started anew"])
def test_a_phone_that_was_away_while_the_provider_paused_goes_on(killed, folder):
    """Would catch a session that ends for want of a receipt although the phone is back in time: it missed the one reading that
    the provider, paused, has said already.
    """
    evening = relayed(Trick(relays=False, out_of_reach=(40, 60), killed=killed), folder)
    assert not evening.outcome.broken, evening.outcome.story()
    assert any("row DeliveryPaused" in line for line in evening.outcome.trace), "it was away long enough"
    assert evening.settled_wh == ORDER_WH


def test_a_phone_that_stays_away_is_settled_on_its_last_receipt(folder):
    """Would catch energy that flows on without receipts, and a session that waits for ever for somebody who drove off."""
    evening = relayed(Trick(relays=False, out_of_reach=(40, 600)), folder)
    assert not evening.outcome.broken, evening.outcome.story()
    assert 30 <= evening.settled_wh <= 40
    assert evening.settled_wh == evening.guest.signed_wh
    assert evening.given_wh < 40 + UNACKED_WH + 15
