"""`v2v organisation` on the real contract: deployed and proven, who may trade, and nothing personal on the chain."""

import pytest
from town import Town

from agent.cli.organisation import SHORT, commitment

SALT = "5a" * 32


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """A chain with people, for all stories of this file."""
    with Town(tmp_path_factory.mktemp("town")) as town:
        yield town


@pytest.fixture
def market(town):
    """A market of the story's own, with short times and nobody in it."""
    town.open_market("--short", evs=())
    return town


def test_a_market_is_deployed_with_the_protocols_rules_unless_told_otherwise(town):
    """Would catch a default that differs from PROTOCOL section 2, and an option that changes another rule."""
    deployed = town.v2v(
        "organisation", "deploy", "--bond-bps", "5000", "--json", as_="organisation", market=False
    )
    said = deployed.json
    assert said["parameters"]["challenge_s"] == 12 * 3600
    assert said["parameters"]["bond_bps"] == 5_000
    assert said["organisation"] == town.address("organisation")
    assert said["gas_used"] > 1_000_000
    assert int(said["fee_wei"]) > 0
    shown = town.v2v("organisation", "show", "--contract", said["contract"], "--json", market=False).json
    assert shown["parameters"] == said["parameters"]
    assert shown["organisation"] == town.address("organisation")
    assert shown["active"] is True


def test_the_printed_lines_belong_into_a_settings_file(market):
    """Would catch an address that has to be looked for: what deploy prints is what [chain] needs."""
    said = market.v2v("organisation", "deploy", "--short", as_="organisation", market=False)
    assert 'contract = "0x' in said.out
    assert f"chain_id = {market.net.chain_id}" in said.out
    assert "start_block = " in said.out
    assert SHORT.bidding_s_min == 1
    assert "bidding min           1 s" in market.v2v("organisation", "show").out


def test_rules_that_the_contract_refuses_are_named(town):
    """Would catch a deployment that burns gas and says nothing."""
    said = town.v2v("organisation", "deploy", "--bidding-s-min", "0", as_="organisation", market=False)
    assert said.exit_code == 3
    assert "BadParameters" in said.err
    assert "at least 1 s" in said.err


def test_only_the_organisation_registers(market):
    """Would catch a refusal without a name or a remedy for the most likely mistake: the wrong key."""
    said = market.v2v("organisation", "add-ev", market.address("alice"), "--info", SALT, as_="alice")
    assert said.exit_code == 3
    assert "OwnableUnauthorizedAccount" in said.err
    assert "Only the organisation" in said.err


def test_papers_are_committed_to_never_sent(market):
    """Would catch clear text on a chain that forgets nothing, and a salt the organisation never gets to know."""
    ev = market.address("alice")
    typed = ("organisation", "add-ev", ev, "--info-text", "KA-X 1234", "--json")
    added = market.v2v(*typed, as_="organisation").json
    assert bytes.fromhex(added["info"][2:]) == commitment(bytes.fromhex(added["salt"][2:]), "KA-X 1234")
    (sent,) = market.net.evm.head.transactions
    assert bytes.fromhex(added["info"][2:]) in bytes(sent.transaction.data)
    assert b"KA-X" not in bytes(sent.transaction.data)
    shown = market.v2v("organisation", "show", "--ev", ev, "--json").json
    assert shown["is_ev"] is True
    assert shown["info"] == added["info"]


def test_a_random_salt_is_another_one_each_time_and_a_given_one_is_used():
    """Would catch a constant salt: equal papers would then be seen to be equal."""
    assert commitment(bytes(32), "a") != commitment(bytes([1]) + bytes(31), "a")
    # sha256 of 32 zero bytes and "a", by sha256sum
    assert (
        commitment(bytes(32), "a").hex() == "41a0370c3d9f42773a59e8e01651911cf43b1e3f66944cbb690029debc4eb647"
    )


def test_info_comes_in_exactly_one_way(market):
    """Would catch an EV registered with a commitment to nothing."""
    ev = market.address("bob")
    assert market.v2v("organisation", "add-ev", ev, as_="organisation").exit_code == 2
    both = ("--info", SALT, "--info-text", "x")
    assert market.v2v("organisation", "add-ev", ev, *both, as_="organisation").exit_code == 2
    salted = ("--info", SALT, "--salt", SALT)
    assert market.v2v("organisation", "add-ev", ev, *salted, as_="organisation").exit_code == 2
    assert market.v2v("organisation", "show", "--ev", ev, "--json").json["is_ev"] is False


def test_registering_twice_is_named_and_removing_twice_is_harmless(market):
    """Would catch a second add-ev that overwrites papers, and a remove-ev that fails when somebody was faster."""
    ev = market.address("alice")
    add = ("organisation", "add-ev", ev, "--info", SALT)
    assert market.v2v(*add, as_="organisation").exit_code == 0
    again = market.v2v(*add, as_="organisation")
    assert again.exit_code == 3
    assert "AlreadyEV" in again.err
    remove = ("organisation", "remove-ev", ev, "--json")
    assert market.v2v(*remove, as_="organisation").json["removed"] is True
    assert market.v2v(*remove, as_="organisation").json["removed"] is False


def test_a_paused_market_says_so_until_it_is_opened(market):
    """Would catch on and off exchanged."""
    assert (
        market.v2v("organisation", "set-status", "off", "--json", as_="organisation").json["active"] is False
    )
    assert market.v2v("organisation", "show", "--json").json["active"] is False
    paused = market.v2v("organisation", "add-ev", market.address("bob"), "--info", SALT, as_="organisation")
    assert paused.exit_code == 3
    assert "MarketInactive" in paused.err
    assert market.v2v("organisation", "set-status", "on", as_="organisation").exit_code == 0
    assert market.v2v("organisation", "show", "--json").json["active"] is True
