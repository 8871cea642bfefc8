"""The driver's commands as they are typed: what they print, how they end, and what stays where it was."""

import asyncio
import signal
from types import SimpleNamespace

import pytest
from town import Town, v2v

from agent.chain import contract
from agent.cli.consumer import _carrier, _interruptible, _Screen, progress_line
from agent.consumer.plug import Progress, Step

SETTINGS = """\
[chain]
urls = ["{url}"]
chain_id = {chain_id}
contract = "{contract}"
consumer = "{consumer}"

[keys]
account = "./{key}.key"

[order]
energy_wh = 200
rate_wei_per_kwh_start = 1_000_000
bidding_s = 60
token_validity_s = 600

[mqtt]
url = "mqtt://127.0.0.1:1"

[journal]
path = "./consumer.sqlite"
"""


@pytest.fixture
def town(tmp_path):
    """A market with carol in it."""
    with Town(tmp_path) as town:
        town.open_market()
        settle(town)
        yield town


def settle(town, *, key="carol", **instead):
    """Write carol's settings file."""
    values = {
        "url": town.net.url_http,
        "chain_id": town.net.chain_id,
        "contract": "0x" + town.market.hex(),
        "consumer": town.address("carol"),
        "key": key,
    }
    (town.folder / "consumer.toml").write_text(SETTINGS.format(**values | instead))


def typed(town, *words):
    """A consumer command with carol's settings."""
    return v2v("consumer", *words, "--config", str(town.folder / "consumer.toml"))


def bid(town):
    """Alice offers."""
    carol = town.net.address("carol")
    town.send("alice", contract.encode_place_bid(carol, 1, 900_000), 1_000_000)


def test_step_by_step_to_a_session_and_out_of_it(town):
    """Would catch a driver without the whole-way command who cannot buy, look, or leave."""
    assert typed(town, "status", "--json").json == {"errand": None}
    started = typed(town, "start-auction", "--energy-wh", "150", "--json").json
    assert (started["auction_nonce"], started["energy_wh"], started["deposit_wei"]) == (1, 150, "150000")
    assert typed(town, "status", "--json").json["errand"]["state"] == "auction"
    bid(town)
    town.pass_time(120)
    session = typed(town, "connect", "--json").json
    assert session["provider"] == town.address("alice")
    known = typed(town, "status", "--json").json["errand"]
    assert (known["state"], known["token"]) == ("connected", session["token"])
    assert typed(town, "connect", "--json").json["token"] == session["token"], "again changes nothing"
    ended = typed(town, "end", "--json").json
    assert (ended["energy_wh_conceded"], ended["settled"]) == (0, False)
    assert ended["settle_at_s"] > 0
    shown = typed(town, "status")
    assert shown.exit_code == 0
    assert session["token"] in shown.out


def test_an_auction_without_bids_is_refused_with_its_money_back(town):
    """Would catch exit code 0 for an evening without energy, or a refusal that does not say where the money is."""
    assert typed(town, "start-auction").exit_code == 0
    town.pass_time(120)
    said = typed(town, "connect")
    assert said.exit_code == 3
    assert "no_bids" in said.err
    assert "consumer withdraw" in said.err
    assert typed(town, "balance", "--json").json["ledger_wei"] == "200000"


def test_an_auction_can_be_given_up(town):
    """Would catch a deposit that only time can free."""
    typed(town, "start-auction")
    assert typed(town, "cancel", "--json").json["ledger_wei"] == "200000"
    assert typed(town, "status", "--json").json["errand"]["state"] == "cancelled"
    again = typed(town, "cancel")
    assert again.exit_code == 3
    assert "NoAuction" in again.err


def test_without_a_broker_nothing_is_spent(town):
    """Would catch a deposit locked in an auction although there is no way to any provider."""
    said = typed(town, "charge")
    assert said.exit_code == 69
    assert "MQTT broker at 127.0.0.1:1 cannot be reached" in said.err
    assert typed(town, "status", "--json").json == {"errand": None}


def test_without_a_door_nothing_is_spent_either(town):
    """Would catch --provider-http that is only for show."""
    said = typed(town, "charge", "--provider-http", "http://127.0.0.1:1")
    assert said.exit_code == 69
    assert "door at http://127.0.0.1:1" in said.err


@pytest.mark.parametrize(
    ("instead", "words"),
    [
        ({"key": "bob"}, "correct [keys] account"),
        ({"chain_id": 5}, "chain 5"),
        ({"contract": "0x" + "11" * 20}, "there is no contract"),
        ({"key": "nobody"}, "no such file"),
    ],
)
def test_wrong_settings_are_a_humans_work(town, instead, words):
    """Would catch a wrong key, chain or contract that is found out after money moved; exit 78 before anything does."""
    settle(town, **instead)
    said = typed(town, "start-auction")
    assert said.exit_code == 78
    assert words in said.err
    assert "v2v:" in said.err


def test_a_node_that_is_away_is_unreachable(town):
    """Would catch a traceback where a sentence belongs."""
    settle(town, url="http://127.0.0.1:1")
    said = typed(town, "start-auction")
    assert said.exit_code == 69
    assert "cannot be reached" in said.err


def test_the_contracts_refusals_come_with_a_remedy(town):
    """Would catch `ValidityOutOfRange` without a word on what to do."""
    said = typed(town, "start-auction", "--token-validity-s", "1")
    assert said.exit_code == 3
    assert "organisation show" in said.err


def test_no_settings_file_is_a_usage_error():
    """Would catch a traceback for the first thing a new driver types."""
    assert v2v("consumer", "charge").exit_code == 2


# ---- the live line, and Ctrl-C


def test_the_line_shows_what_a_driver_wants_to_know():
    """Would catch a bar that runs over, or a number of another name."""
    line = progress_line(
        Progress(
            Step.CHARGE,
            "DELIVERING",
            energy_wh_ordered=200,
            energy_wh_delivered=50,
            energy_wh_acked=48,
            power_w=11_000,
            cost_wei=10**16,
        )
    )
    assert (
        line
        == "charge   [######..................] 50 of 200 Wh, 11000 W, acknowledged 48 Wh, 0.01 ETH  DELIVERING"
    )
    over = progress_line(Progress(Step.SETTLE, "", energy_wh_ordered=200, energy_wh_delivered=250))
    assert "[########################]" in over
    assert progress_line(Progress(Step.BIDDING, "no bid yet")) == "bidding  no bid yet"


async def test_ctrl_c_asks_for_a_stop_first_and_leaves_the_second_time():
    """Would catch a Ctrl-C that leaves the energy flowing unpaid, or one that cannot be insisted on."""
    journey, screen = SimpleNamespace(stop=asyncio.Event()), SimpleNamespace(charging=True)
    buying = asyncio.ensure_future(asyncio.sleep(60))
    with _interruptible(journey, screen, buying):
        signal.raise_signal(signal.SIGINT)
        await asyncio.wait_for(journey.stop.wait(), 5)
        assert not buying.done()
        signal.raise_signal(signal.SIGINT)
        await asyncio.wait({buying}, timeout=5)
    assert buying.cancelled()


async def test_ctrl_c_before_any_energy_leaves_at_once():
    """Would catch a driver who cannot leave an auction that takes hours."""
    journey, screen = SimpleNamespace(stop=asyncio.Event()), SimpleNamespace(charging=False)
    buying = asyncio.ensure_future(asyncio.sleep(60))
    with _interruptible(journey, screen, buying):
        signal.raise_signal(signal.SIGINT)
        await asyncio.wait({buying}, timeout=5)
    assert buying.cancelled()


def test_the_driver_is_asked_once(capsys):
    """Would catch a question that is never put, or is put again with every reading."""
    screen = _Screen()
    for delivered_wh in (26, 27, 28):
        screen(Progress(Step.CHARGE, "DELIVERING", energy_wh_delivered=delivered_wh, asks_driver=True))
    assert screen.asking
    screen(Progress(Step.CHARGE, "DELIVERING"))
    assert not screen.asking
    assert capsys.readouterr().err.count("Is it your car that charges?") == 1


@pytest.mark.parametrize(
    ("ways", "sref", "kind"),
    [
        ("mqtt http", "ab" * 16, "BothCarrier"),
        ("mqtt http", "carol", "MqttCarrier"),  # too short a name for a web server
        ("mqtt", "ab" * 16, "MqttCarrier"),
        ("http", "ab" * 16, "HttpCarrier"),
        ("mqtt http typed", "ab" * 16, "HttpCarrier"),
    ],
)
def test_both_ways_are_used_where_both_are_known(ways, sref, kind):
    """Would catch a broker's death that ends an evening although the car's own web server is in the settings."""
    mqtt = SimpleNamespace(
        host="127.0.0.1", port=1883, tls=False, username=None, password_credential=None, keepalive_s=15
    )
    settings = SimpleNamespace(
        mqtt=mqtt if "mqtt" in ways else None,
        http=SimpleNamespace(url="http://127.0.0.1:1") if "http" in ways else None,
    )
    wishes = SimpleNamespace(provider_http="http://127.0.0.1:2" if "typed" in ways else "")
    assert type(_carrier(settings, wishes, sref)).__name__ == kind
