"""Reaching a market: the wrong node, chain, contract or key is named before anything is signed, with who must act."""

import pytest
from town import Town, v2v
from toy_contract import INIT

from agent.core.units import hex0x

AGENT = """
[chain]
urls = ["{url}"]
chain_id = {chain_id}
contract = "{contract}"
provider = "{provider}"
[[ports]]
name = "left"
map = "simulated"
wire = "tcp://127.0.0.1:1"
current_ma_max = 32_000
phase_count = 3
[journal]
path = "./journal.sqlite"
"""


@pytest.fixture(scope="module")
def town(tmp_path_factory):
    """A chain with people and one market."""
    with Town(tmp_path_factory.mktemp("town")) as town:
        town.open_market("--short")
        yield town


def settings(town, folder, **changes):
    """Alice's agent.toml."""
    told = {
        "url": town.net.url_ws,
        "chain_id": town.net.chain_id,
        "contract": hex0x(town.market),
        "provider": town.address("alice"),
    }
    path = folder / "agent.toml"
    path.write_text(AGENT.format(**(told | changes)))
    return str(path)


def test_a_settings_file_says_where_and_who(town, tmp_path):
    """Would catch an owner who has to repeat what the settings say."""
    file = settings(town, tmp_path)
    put = v2v("provider", "deposit", "7", "--config", file, "--key", town.key("alice"), "--json").json
    assert put["account"] == town.address("alice")
    shown = v2v("provider", "balance", "--config", file, "--json").json
    assert shown["account"] == town.address("alice")
    assert shown["ledger_wei"] == put["ledger_wei"]


def test_the_environment_speaks_as_it_does_for_the_settings(town, monkeypatch, tmp_path):
    """Would catch a variable that helps one command and makes the daemon refuse to start."""
    monkeypatch.setenv("V2V_CHAIN__URLS", town.net.url_ws)
    monkeypatch.setenv("V2V_CHAIN__CONTRACT", hex0x(town.market))
    assert v2v("provider", "auctions").exit_code == 0
    file = settings(town, tmp_path, url="ws://127.0.0.1:1", contract="0x" + "11" * 20)
    assert v2v("provider", "auctions", "--config", file).exit_code == 0


def test_another_accounts_key_is_refused_before_it_signs(town, tmp_path):
    """Would catch the operator's key used on a command line, or money locked on the wrong account."""
    file = settings(town, tmp_path)
    said = v2v("provider", "deposit", "7", "--config", file, "--key", town.key("bob"))
    assert said.exit_code == 78
    assert town.address("alice") in said.err
    assert "The operator's key signs inside the daemon only" in said.err


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (("--contract", "0x" + "11" * 20), "Which node?"),
        (("--rpc", "http://127.0.0.1:1"), "Which market?"),
        (("--rpc", "http://127.0.0.1:1", "--contract", "0x" + "11" * 20), "Who signs?"),
    ],
)
def test_what_nobody_said_is_asked_for(monkeypatch, typed, words):
    """Would catch a default node, market or key that nobody chose."""
    monkeypatch.delenv("V2V_CHAIN__URLS", raising=False)
    said = v2v("provider", "deposit", "7", *typed)
    assert said.exit_code == 2
    assert words in said.err


def test_an_unreachable_node_is_69(town):
    """Would catch a dead node taken for a wrong setting: a script may try again."""
    said = v2v("provider", "auctions", "--rpc", "http://127.0.0.1:1", "--contract", hex0x(town.market))
    assert said.exit_code == 69
    assert "cannot be reached" in said.err


def test_another_chain_is_78(town, tmp_path):
    """Would catch money sent on a chain that was not meant."""
    said = town.v2v("provider", "auctions", "--chain-id", "1")
    assert said.exit_code == 78
    assert f"chain {town.net.chain_id}" in said.err
    file = settings(town, tmp_path, chain_id=5)
    assert v2v("provider", "balance", "--config", file).exit_code == 78


def test_nothing_at_the_address_is_78(town):
    """Would catch a deposit into an address without code: it would be gone."""
    said = v2v(
        "provider",
        "deposit",
        "7",
        "--rpc",
        town.net.url_http,
        "--contract",
        "0x" + "11" * 20,
        "--key",
        town.key("bob"),
    )
    assert said.exit_code == 78
    assert "there is no contract" in said.err


def test_a_foreign_contract_is_78(town):
    """Would catch a look-alike that takes deposits."""
    toy = town.send("bob", INIT, to=b"").contract
    said = v2v(
        "provider",
        "deposit",
        "7",
        "--rpc",
        town.net.url_http,
        "--contract",
        hex0x(toy),
        "--key",
        town.key("bob"),
    )
    assert said.exit_code == 78
    assert "is not this version of V2VCharging" in said.err


@pytest.mark.parametrize("mode", ["none", "public"])
def test_a_key_file_that_is_missing_or_public_is_78(town, tmp_path, mode):
    """Would catch a key that others can read, and a traceback for a mistyped path."""
    path = tmp_path / "owner.key"
    if mode == "public":
        path.write_text("11" * 32)
        path.chmod(0o644)
    said = town.v2v("provider", "deposit", "7", "--key", str(path))
    assert said.exit_code == 78
    assert ("no such file" if mode == "none" else "chmod 600") in said.err
    assert "1111" not in said.err
