"""`v2v provider` on the real contract: what there is to bid on, what a bid locks, every refusal by its name, and the exits."""

import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proof import session_id_of, settled
from story import CONSUMER, DOMAIN, PROVIDER, TERMS, at, receipt, reverts, settles
from town import Town, v2v

from agent.cli.provider import _block_at, _status_text
from agent.core.book import FOLD_AFTER_S, folded, step
from agent.core.live import Purse, PurseSeen, TransactionTried, Tried
from agent.core.session import Stage
from agent.core.units import hex0x
from agent.journal import Journal
from agent.keys import new_key
from agent.views import status, status_line

RATE = 1_000_000  # wei per kWh that auctions below start at; 200 Wh cost 200_000 wei
BIDDING_S = 600


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """A chain with people, for all stories of this file."""
    with Town(tmp_path_factory.mktemp("town")) as town:
        yield town


@pytest.fixture
def market(town):
    """A market of the story's own: alice and bob sell, carol buys, dave is no EV."""
    town.open_market("--short")
    return town


def bid(town, who, rate, *more, consumer="carol"):
    """Somebody's bid, as typed."""
    consumer = town.address(consumer)
    return town.v2v("provider", "bid", "--consumer", consumer, "--rate", str(rate), *more, as_=who)


# ---- auctions and bids


def test_two_owners_bid_against_each_other(market):
    """Would catch a bond that is not the contract's, one sent twice, and an outbid owner who is not paid back."""
    market.start_auction("carol", rate=RATE)
    (auction,) = market.v2v("provider", "auctions", "--json").json["auctions"]
    assert auction["consumer"] == market.address("carol")
    assert (auction["rate_wei_per_kwh_max"], auction["leader"]) == (str(RATE), None)

    alice = bid(market, "alice", RATE, "--json").json
    assert (alice["bond_wei"], alice["sent_wei"], alice["ledger_wei"]) == ("200000", "200000", "0")

    bob = bid(market, "bob", 900_000, "--auction-nonce", "1", "--json").json
    assert bob["bond_wei"] == "180000"
    assert market.v2v("provider", "balance", market.address("alice"), "--json").json["ledger_wei"] == "200000"
    (auction,) = market.v2v("provider", "auctions", "--json").json["auctions"]
    assert (auction["leader"], auction["rate_wei_per_kwh_max"]) == (market.address("bob"), "891000")

    again = bid(market, "alice", 800_000, "--json").json
    assert (again["sent_wei"], again["ledger_wei"]) == ("0", "40000"), "the freed bond pays for the next bid"
    lower = bid(market, "alice", 700_000, "--json").json
    assert (lower["sent_wei"], lower["ledger_wei"]) == ("0", "60000"), "a leader's own bond comes back first"


def test_a_person_sees_what_is_locked_and_until_when(market):
    """Would catch an owner who binds money without being told how much."""
    market.start_auction("carol", rate=RATE)
    said = bid(market, "alice", RATE)
    assert said.exit_code == 0
    assert "0.0000000000002 ETH, of which 0.0000000000002 ETH were sent along" in said.out
    assert "bidding closes" in said.out
    assert "of gas" in said.out
    assert "will not settle at a loss" in said.err, "the order brings 0.0000000000002 ETH"
    listed = market.v2v("provider", "auctions").out
    assert market.address("alice") in listed
    assert "left" in listed


@pytest.mark.parametrize(
    ("who", "rate", "more", "name", "remedy"),
    [
        ("alice", RATE + 1, (), "BidTooHigh(rateMax=1000000)", "Bid at most"),
        ("dave", RATE, (), "NotEV(", "add-ev"),
        ("carol", RATE, (), "SelfDeal", "another account"),
        ("alice", 0, (), "RateOutOfRange(", "at least 1"),
        ("alice", RATE, ("--auction-nonce", "7"), "StaleAuction(auctionNonce=1)", "v2v provider auctions"),
    ],
    ids=lambda value: value.partition("(")[0] if isinstance(value, str) else None,
)
def test_a_refused_bid_is_named_with_its_remedy(market, who, rate, more, name, remedy):
    """Would catch "execution reverted": the owner must know which rule said no, and what to do."""
    market.start_auction("carol", rate=RATE)
    said = bid(market, who, rate, *more)
    assert said.exit_code == 3
    assert name in said.err
    assert remedy in said.err
    assert said.out == ""


def test_there_must_be_an_auction(market):
    """Would catch a bid that is sent, and paid for, where nothing can be won."""
    assert market.v2v("provider", "auctions").out == "There is no live auction.\n"
    said = bid(market, "alice", RATE)
    assert said.exit_code == 3
    assert "NoAuction" in said.err


def test_a_bid_is_refused_when_its_settlement_could_not_be_paid(market, tmp_path):
    """Would catch a sale won by a car whose hot key has no coins: its bond and its pay would wait for strangers."""
    operator = hex0x(new_key(tmp_path / "operator.key").address)
    assert market.v2v("provider", "set-operator", operator, as_="alice").exit_code == 0
    market.start_auction("carol", rate=RATE)
    said = bid(market, "alice", RATE)
    assert said.exit_code == 3
    assert "gas_reserve" in said.err
    assert f"{operator}, which settles, has gas for about 0 settlements" in said.err
    missing_wei = int(said.err.split("Send it at least ")[1].split()[0])
    market.send("bob", b"", missing_wei, to=bytes.fromhex(operator[2:]))
    told = bid(market, "alice", RATE, "--json").json
    assert (told["settlements_left"], told["settlements_owed"]) == (1, 1)


def test_without_a_key_and_without_an_agent_nobody_signs(market, tmp_path):
    """Would catch a bid without a key that hangs, or asks an agent that nobody named."""
    said = market.v2v("provider", "bid", "--consumer", market.address("carol"), "--rate", "5")
    assert said.exit_code == 2
    assert "--key" in said.err
    assert "start the agent" in said.err


def test_the_status_says_how_the_way_to_the_money_goes():
    """Would catch a settlement that waits for lower fees without anybody being told why, and until when."""
    story = at(Stage.SETTLING)
    sid = story.session.session_id
    story.engine.observe(TransactionTried(sid, Tried("waiting", "fee_cap")))
    story.engine.observe(PurseSeen(Purse(10**15, 4 * 10**14)))
    found = json.loads(json.dumps(status(story.engine.book, story.engine.live)))
    said = _status_text(found)
    assert "waits for lower fees (fee_cap); anybody may settle from" in said
    assert "for about 2 settlements, 1 owed" in said
    assert "waits for lower fees" in status_line(story.engine.book, story.engine.live)
    story.engine.observe(PurseSeen(Purse(10**14, 4 * 10**14)))
    assert "gas for only 0 settlements" in status_line(story.engine.book, story.engine.live)


def test_an_empty_wallet_learns_how_much_is_missing(market, tmp_path):
    """Would catch "insufficient funds for gas * price + value" left to the owner to work out."""
    market.start_auction("carol", rate=RATE)
    poor = new_key(tmp_path / "poor.key")
    said = market.v2v(
        "provider",
        "bid",
        "--consumer",
        market.address("carol"),
        "--rate",
        "5",
        "--key",
        str(tmp_path / "poor.key"),
    )
    assert said.exit_code == 3
    assert "unfunded" in said.err
    assert f"to {hex0x(poor.address)}" in said.err
    assert "Send at least" in said.err


def test_after_closing_it_is_over(market):
    """Would catch a list that invites to a bid the contract refuses."""
    market.start_auction("carol", rate=RATE, bidding_s=BIDDING_S)
    market.pass_time(BIDDING_S)
    (auction,) = market.v2v("provider", "auctions", "--json").json["auctions"]
    assert auction["biddable"] is False
    assert "over" in market.v2v("provider", "auctions").out
    said = bid(market, "alice", RATE)
    assert said.exit_code == 3
    assert "AuctionClosed" in said.err


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 40), st.data())
def test_the_first_block_of_a_time_is_found_by_halving(gaps, start_block, data):
    """Would catch an off-by-one that hides the oldest live auction, or reads a whole chain's logs for nothing."""
    times = [sum(gaps[: n + 1]) for n in range(len(gaps))]
    start_block = min(start_block, len(times) - 1)
    at_s = data.draw(st.integers(0, times[-1]))
    asked = []

    async def header(number):
        asked.append(number)
        return SimpleNamespace(timestamp_s=times[number])

    market = SimpleNamespace(node=SimpleNamespace(header=header), start_block=start_block)
    searching = _block_at(market, at_s, len(times) - 1)
    with pytest.raises(StopIteration) as found:
        searching.send(None)
    expected = next(n for n, time_s in enumerate(times) if time_s >= at_s)
    assert found.value.value == max(expected, start_block)
    assert len(asked) <= 6


# ---- the operator


def test_the_operator_is_named_limited_and_revoked(market):
    """Would catch a hot key that may do more than its owner typed, or that outlives its revocation."""
    ev = market.address("alice")
    named = market.v2v("provider", "set-operator", market.address("dave"), "--json", as_="alice").json
    assert named["bond_wei_limit"] == "0"
    limited = ("set-operator", market.address("dave"), "--bond-limit", "0.5 ETH")
    assert market.v2v("provider", *limited, as_="alice").exit_code == 0
    shown = market.v2v("organisation", "show", "--ev", ev, "--json").json
    assert (shown["operator"], shown["bond_wei_limit"]) == (market.address("dave"), str(5 * 10**17))
    revoked = market.v2v("provider", "set-operator", "0x" + "00" * 20, as_="alice")
    assert "none any more" in revoked.out
    shown = market.v2v("organisation", "show", "--ev", ev, "--json").json
    assert shown["operator"] == "0x" + "00" * 20


# ---- sessions, from the journal


def settings(folder):
    """agent.toml of the story's provider."""
    path = folder / "agent.toml"
    path.write_text(f"""
[chain]
urls = ["ws://127.0.0.1:1"]
chain_id = {DOMAIN.chain_id}
contract = "{hex0x(DOMAIN.contract)}"
provider = "{hex0x(PROVIDER.address)}"
[[ports]]
name = "left"
map = "simulated"
wire = "tcp://127.0.0.1:1"
current_ma_max = 32_000
phase_count = 3
[journal]
path = "./journal.sqlite"
""")
    return str(path)


def test_a_daemon_that_cannot_start_says_why(tmp_path):
    """Would catch a unit that dies with a traceback: here nothing answers on the charger's wire."""
    said = v2v("provider", "run", "--config", settings(tmp_path))
    assert said.exit_code == 69
    assert "the charger of port left" in said.err
    wrong = v2v("provider", "run", "--config", str(tmp_path / "none.toml"))
    assert wrong.exit_code == 78


def journal_of(story, folder):
    """The story's events as the daemon keeps them: an open journal with its lock."""
    journal = Journal(folder / "journal.sqlite", DOMAIN, PROVIDER.address)
    for event in story.journal.events:
        journal.append(event)
    return journal


@pytest.mark.parametrize(
    ("stage", "delivered_wh", "signed_wh", "settled_wh"),
    [
        (Stage.MATCHED, 0, 0, None),
        (Stage.DELIVERING, 6, 6, None),  # what flowed beyond the signature, only the running agent knows
        (Stage.SETTLED, 10, 8, 8),
        (Stage.STRANDED, 10, 8, 3),
    ],
)
def test_sessions_are_read_while_the_daemon_writes_them(tmp_path, stage, delivered_wh, signed_wh, settled_wh):
    """Would catch a list that takes the daemon's lock, misses its newest row, or shows other numbers than the book's."""
    story = at(stage)
    if stage is Stage.DELIVERING:
        story = story >> receipt(6)
    file = settings(tmp_path)
    journal = journal_of(story, tmp_path)
    (session,) = v2v("provider", "sessions", "--config", file, "--json").json["sessions"]
    journal.close()
    assert session["session_id"] == hex0x(TERMS.session_id)
    assert (session["stage"], session["energy_wh_ordered"]) == (stage, TERMS.energy_wh_ordered)
    assert (session["energy_wh_delivered"], session["energy_wh_acked"]) == (delivered_wh, signed_wh)
    assert session["energy_wh_settled"] == settled_wh
    paid_wh = delivered_wh if settled_wh is None else settled_wh
    assert session["cost_wei"] == str(3 * 10**14 * paid_wh)
    assert "hindrance" not in session
    text = v2v("provider", "sessions", "--config", file)
    assert text.exit_code == 0, "the daemon has ended"
    row = text.out.splitlines()[1].split()
    assert row[:3] == [session["session_id"][:10], stage, str(TERMS.energy_wh_ordered)]


def test_a_settlement_that_fails_is_explained_below_the_table(tmp_path):
    """Would catch an owner who sees STRANDED and nothing else."""
    story = at(Stage.SETTLING) >> settles() >> reverts("InvalidReceipt")
    journal_of(story, tmp_path).close()
    said = v2v("provider", "sessions", "--config", settings(tmp_path))
    assert "InvalidReceipt. The consumer's signature does not prove this amount" in said.out


def test_a_new_agent_has_no_sessions(tmp_path):
    """Would catch a table of nothing."""
    Journal(tmp_path / "journal.sqlite", DOMAIN, PROVIDER.address).close()
    file = settings(tmp_path)
    assert v2v("provider", "sessions", "--config", file).out == "There is no session yet.\n"
    assert v2v("provider", "sessions", "--config", file, "--json").json == {"sessions": []}


def test_without_a_journal_there_is_a_next_step(tmp_path):
    """Would catch a traceback, or an empty list that looks like an agent which sold nothing."""
    said = v2v("provider", "sessions", "--config", settings(tmp_path))
    assert said.exit_code == 3
    assert "no_journal" in said.err
    assert "v2v provider run" in said.err


def test_a_journal_of_another_market_is_refused(tmp_path):
    """Would catch one market's sessions shown as another's."""
    file = settings(tmp_path)
    Journal(tmp_path / "journal.sqlite", DOMAIN, CONSUMER.address).close()
    said = v2v("provider", "sessions", "--config", file)
    assert said.exit_code == 78
    assert "belongs to provider" in said.err


# ---- the history, and what proves it


def aged(tmp_path):
    """A journal of three evenings, two of them folded into the history."""
    journal = Journal(tmp_path / "journal.sqlite", DOMAIN, PROVIDER.address)
    evenings = [settled(nonce) for nonce in (1, 2)]
    for event in [event for events in evenings for event in events]:
        journal.append(event)
    book = journal.replay()
    fold = folded(book, book.at_s + 10 * FOLD_AFTER_S)
    journal.compact(fold, step(book, fold))
    evenings.append(settled(3))
    for event in evenings[2]:
        journal.append(event)
    return journal, [session_id_of(events) for events in evenings]


def test_sessions_that_left_the_live_journal_are_still_listed(tmp_path):
    """Would catch an owner who sees last month's earnings vanish."""
    journal, ids = aged(tmp_path)
    assert list(journal.replay().sessions) == [ids[2]]
    rows = v2v("provider", "sessions", "--config", settings(tmp_path), "--json").json["sessions"]
    journal.close()
    assert [row["session_id"] for row in rows] == [hex0x(one) for one in (ids[2], ids[1], ids[0])]
    assert {row["energy_wh_settled"] for row in rows} == {20}


def test_every_session_is_exported_and_proven(tmp_path):
    """Would catch a folded session whose proof is gone, and a file that our own verifier does not accept."""
    journal, ids = aged(tmp_path)
    out = tmp_path / "out"
    said = v2v("provider", "export", "--config", settings(tmp_path), "--all", "--out", str(out), "--json")
    journal.close()
    assert {row["session_id"] for row in said.json["sessions"]} == {hex0x(one) for one in ids}
    files = sorted(out.iterdir())
    assert [file.stat().st_mode & 0o077 for file in files] == [0, 0, 0], "it holds signatures"
    told = v2v("verify", *map(str, files))
    assert (told.exit_code, told.out.count(": proven")) == (0, 3)


def test_one_session_is_exported_by_what_the_list_shows_of_it(tmp_path):
    """Would catch an owner who has to type 64 digits, and a short id that means two sessions."""
    journal, ids = aged(tmp_path)
    journal.close()
    words = ("provider", "export", "--config", settings(tmp_path), "--out", str(tmp_path / "out"))
    said = v2v(*words, "--session", hex0x(ids[0])[:10])
    assert said.exit_code == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == [f"{hex0x(ids[0])}.json"]
    for unknown in ("0x", "0x00000000"):
        said = v2v(*words, "--session", unknown)
        assert (said.exit_code, "unknown_session" in said.err) == (3, True)
    assert v2v(*words).exit_code == 2


# ---- stop and unlock


def test_a_locked_port_is_released_by_a_human_and_by_nobody_else(tmp_path):
    """Would catch a lock-out that a restart forgets, and one that can be lifted for a port that has none."""
    story = at(Stage.STOPPING)
    story.outlet.welded = story.outlet.closed = True
    journal_of(story.passes(60), tmp_path).close()
    words = ("provider", "unlock", "--config", settings(tmp_path))
    said = v2v(*words, "right")
    assert (said.exit_code, "not_locked" in said.err, "left" in said.err) == (3, True, True)
    said = v2v(*words, "left", "--json")
    assert "not seen open" in said.json["was"]
    journal = Journal(tmp_path / "journal.sqlite", DOMAIN, PROVIDER.address)
    assert journal.replay().locked_ports == {}
    said = v2v(*words, "left")
    assert (said.exit_code, "running" in said.err) == (3, True), "while an agent has the journal"
    journal.close()
    assert v2v(*words, "left").exit_code == 3


def test_a_stop_without_an_agent_says_what_to_do_instead(tmp_path):
    """Would catch a signal to whatever process has the number of a dead agent."""
    journal_of(at(Stage.DELIVERING), tmp_path).close()
    said = v2v("provider", "stop", "--config", settings(tmp_path))
    assert said.exit_code == 3
    assert "make-safe" in said.err
