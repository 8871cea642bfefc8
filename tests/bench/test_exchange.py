"""The bench of the fair exchange: its thieves must really steal, and a rule that is broken must show."""

import re
from pathlib import Path
from random import Random

import pytest

from agent.consumer.policy import Sign
from bench import exchange
from bench.exchange import GUESTS, HOSTS, PLACES, Prepaid, Trade, worst

PAGE = Path(__file__).parents[2] / "docs/fair-exchange.md"
ELEVEN = next(site for site in PLACES if site.name == "11 kW")


def test_no_thief_takes_more_than_the_formula_and_the_best_one_nearly_that_much():
    """Would catch a limit that is not kept; and a bench whose thieves are harmless, so that it proves nothing."""
    as_guest, as_host = (worst(Trade, ELEVEN, 2, guest=guest) for guest in (True, False))
    assert as_guest.over_wh <= 0
    assert as_host.over_wh <= 0
    assert as_guest.loss_wh > exchange.credit_wh(ELEVEN)
    assert as_host.loss_wh >= exchange.LIMITS.pre_sign_wh


def test_a_provider_that_gives_double_credit_is_seen(monkeypatch):
    """Would catch a provider's figure that does not come from the core."""
    honest_policy = exchange.Policy

    def generous(*, max_unacked_wh, **limits):
        return honest_policy(max_unacked_wh={port: 2 * wh for port, wh in max_unacked_wh.items()}, **limits)

    monkeypatch.setattr(exchange, "Policy", generous)
    monkeypatch.setattr(exchange, "GUESTS", GUESTS[:1])
    assert worst(Trade, ELEVEN, 1, guest=True).over_wh > 0


def test_a_consumer_that_signs_what_it_is_told_is_seen(monkeypatch):
    """Would catch a consumer's figure that does not come from its policy."""

    def gullible(limits, now):
        return Sign(max(now.energy_wh_signed, min(now.reading_wh, now.energy_wh_ordered)))

    monkeypatch.setattr(exchange, "decide", gullible)
    monkeypatch.setattr(exchange, "HOSTS", ("relays",))
    assert worst(Trade, ELEVEN, 1, guest=False).over_wh > 100


def test_the_peer_risks_less_and_stops_for_every_slice():
    """Would catch a peer that is made to look bad: at 11 kW its provider loses less than ours, and its box stops twelve times."""
    ours, peer = (exchange.honest_stops(kind, ELEVEN, 1) for kind in (Trade, Prepaid))
    assert ours == 1
    assert peer == pytest.approx(306 / 25, abs=1)
    assert Prepaid(Random(1), ELEVEN, GUESTS[0], guest=True).played().provider_wh < 30
    assert Prepaid(Random(1), ELEVEN, HOSTS[3], guest=False).played().consumer_wh <= 25


def test_the_same_evening_is_the_same_figure_again():
    """Would catch a bench whose figures nobody can repeat."""
    one, again = (Trade(Random("same"), ELEVEN, "signs less", guest=True).played() for _ in range(2))
    assert one == again


def test_every_site_has_both_sides_in_energy_and_in_money(monkeypatch):
    """Would catch a row that is left out, and a goal that is met by anything."""
    found = exchange.Worst(60.0, -1.0, 71.0, "vanishes")
    rows = [
        *exchange._loss_rows(ELEVEN, 8, found, found, guest=True),
        *exchange._loss_rows(ELEVEN, 8, found, found, guest=False),
        exchange._stops_row(ELEVEN, 8, 1.0, 12.0),
    ]
    assert [row.unit for row in rows] == ["Wh", "wei", "Wh", "wei", "stops"]
    assert rows[1].ours == 60 * exchange.RATE_WEI_PER_KWH // 1000
    assert all(row.met for row in rows)
    above = exchange.Worst(60.0, 0.1, 71.0, "vanishes")
    assert not any(row.met for row in exchange._loss_rows(ELEVEN, 8, above, found, guest=True))
    assert not exchange._stops_row(ELEVEN, 8, 2.0, 12.0).met


def test_the_page_states_the_largest_losses_of_the_formula():
    """Would catch a page that promises less than the software risks."""
    stated = {
        name: (int(credit), float(loss), float(coins))
        for name, credit, loss, coins in re.findall(
            r"^\| ([0-9.]+ kW(?: DC)?) \| (\d+) \| ([0-9.]+) \| ([0-9.]+) \|", PAGE.read_text(), re.MULTILINE
        )
    }
    coin = 10**18
    assert stated == {
        site.name: (
            exchange.credit_wh(site),
            round(exchange.provider_loss_wh(site), 1),
            round(exchange.provider_loss_wh(site) * exchange.RATE_WEI_PER_KWH / 1000 / coin, 4),
        )
        for site in PLACES
    }
    assert f"{exchange.LIMITS.pre_sign_wh} Wh" in PAGE.read_text()
    assert f"{exchange.LIMITS.tolerance_permille // 10} %" in PAGE.read_text()
