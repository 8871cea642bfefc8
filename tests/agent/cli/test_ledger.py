"""The ledger's commands, which both sides share: exact amounts in and out, and exits that need nobody's consent."""

import pytest
from town import Town

from agent.chain import contract
from agent.core.token import NO_ACK
from agent.core.units import hex0x

RATE = 1_000_000  # wei per kWh; 200 Wh cost 200_000 wei
BIDDING_S = 600


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """A chain with people, for all stories of this file."""
    with Town(tmp_path_factory.mktemp("town")) as town:
        yield town


@pytest.fixture
def market(town):
    """A market of the story's own: alice and bob sell, carol buys."""
    town.open_market("--short")
    return town


def test_money_goes_in_and_comes_out(market):
    """Would catch a deposit or withdrawal of another amount, or to somebody else."""
    put = market.v2v("provider", "deposit", "0.05 ETH", "--json", as_="alice").json
    assert put["ledger_wei"] == str(5 * 10**16)
    part = market.v2v(
        "provider", "withdraw", "0.02 ETH", "--to", market.address("dave"), "--json", as_="alice"
    ).json
    assert (part["to"], part["ledger_wei"]) == (market.address("dave"), str(3 * 10**16))
    rest = market.v2v("provider", "withdraw", "all", "--json", as_="alice").json
    assert (rest["to"], rest["withdrawn_wei"], rest["ledger_wei"]) == (
        market.address("alice"),
        str(3 * 10**16),
        "0",
    )
    told = market.v2v("provider", "balance", market.address("alice"), "--json").json
    assert told["settlements_left"] == int(told["wallet_wei"]) // int(told["settlement_wei"]) > 100
    shown = market.v2v("provider", "balance", market.address("alice"))
    assert "in the ledger  0 ETH" in shown.out


@pytest.mark.parametrize(
    ("typed", "exit_code", "words"),
    [
        (("withdraw", "all"), 3, "nothing_to_withdraw"),
        (("withdraw", "5 ETH"), 3, "Insufficient(available=0, needed=5000000000000000000)"),
        (("withdraw", "much"), 2, "no amount"),
        (("deposit", "0"), 2, "nothing"),
        (("deposit", "5000 ETH"), 3, "Send at least"),
    ],
)
def test_impossible_amounts_are_explained(market, typed, exit_code, words):
    """Would catch a transaction sent to be refused, and a sum read in another unit."""
    said = market.v2v("provider", *typed, as_="bob")
    assert said.exit_code == exit_code
    assert words in said.err


def test_anyone_settles_what_is_overdue(market):
    """Would catch a stranded session: the consumer conceded, the provider is silent, time is over."""
    market.start_auction("carol", rate=RATE, bidding_s=BIDDING_S)
    offered = ("--consumer", market.address("carol"), "--rate", str(RATE))
    assert market.v2v("provider", "bid", *offered, as_="alice").exit_code == 0
    market.pass_time(BIDDING_S)
    opened = market.send("carol", contract.encode_connect(market.net.address("alice"), 200))
    logs = [contract.decode_log(log.address, log.topics, log.data) for log in opened.logs]
    token = next(log.token for log in logs if isinstance(log, contract.SessionOpened))
    early = market.v2v("provider", "settle", hex0x(token), as_="dave")
    assert early.exit_code == 3
    assert "TooEarly(" in early.err
    assert "UTC" in early.err
    market.send("carol", contract.encode_end_connection(token, 50, NO_ACK))
    market.pass_time(60)
    paid = market.v2v("provider", "settle", hex0x(token), "--json", as_="dave").json
    assert (paid["energy_wh_settled"], paid["cost_wei"]) == (50, "50000")
    assert market.v2v("provider", "balance", market.address("alice"), "--json").json["ledger_wei"] == "250000"
    again = market.v2v("provider", "settle", hex0x(token), as_="dave")
    assert again.exit_code == 3
    assert "NoSession" in again.err


def test_a_removed_car_in_a_paused_market_still_gets_its_money(market):
    """Would catch an exit that depends on the organisation."""
    assert market.v2v("consumer", "deposit", "9", as_="carol").exit_code == 0
    removed = market.v2v("organisation", "remove-ev", market.address("carol"), as_="organisation")
    assert removed.exit_code == 0
    assert market.v2v("organisation", "set-status", "off", as_="organisation").exit_code == 0
    out = market.v2v("consumer", "withdraw", "all", "--json", as_="carol").json
    assert (out["withdrawn_wei"], out["ledger_wei"]) == ("9", "0")


def test_a_balance_belongs_to_somebody(market):
    """Would catch a balance of the zero address, shown as one's own."""
    said = market.v2v("provider", "balance")
    assert said.exit_code == 2
    assert "Whose balance?" in said.err
