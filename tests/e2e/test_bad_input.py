"""What is wrong outside is said once, by name and with a remedy, and nothing is energised meanwhile.

The agent is started as a user starts it, against a real chain and a charger that tells the truth by a file. Exit codes are
those of `agent/errors.py`.
"""

import re
import socket
import sys

import pytest
from stage import Charger, Program, Stage, eventually, free_port

from agent.chain import contract
from agent.core.units import hex0x
from agent.errors import EXIT_MISCONFIGURED, EXIT_UNREACHABLE
from agent.keys import new_key

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """A market without a broker: nobody buys anything in most of these stories."""
    with Stage(tmp_path_factory.mktemp("bad-input"), broker_port=free_port()) as stage:
        yield stage


@pytest.fixture(scope="module")
def charger(stage):
    """The one charger that all of them could energise, and none may."""
    return stage.charger()


@pytest.fixture
def agent(stage, charger, tmp_path):
    """Starts an agent with a new journal, and `settings` that differ."""

    def started(wire=None, **settings):
        ours = {"JOURNAL__PATH": tmp_path / "journal.sqlite", "HTTP__LISTEN": f"127.0.0.1:{free_port()}"}
        return stage.agent(wire or charger, **(ours | settings))

    return started


def assert_refused(agent, exit_code, *words):
    """It ended with this exit code and one message: `v2v: what happened`, what to do below it, no traceback."""
    assert agent.ended() == exit_code, agent.said
    assert "Traceback" not in agent.said
    assert "agent.started" not in agent.said
    message = re.search(r"^v2v: (.+)((?:\n  .+)+)", agent.said, re.MULTILINE)
    assert message, agent.said
    assert agent.said.count("v2v: ") == 1
    for word in words:
        assert word in message[0]


def test_a_node_that_is_away(agent, charger):
    """Would catch a start that waits for ever, or sells without a view of the chain."""
    url = f"ws://127.0.0.1:{free_port()}"
    assert_refused(agent(CHAIN__URLS=url), EXIT_UNREACHABLE, url.removeprefix("ws://"))
    assert charger.was_never_energised()


def test_another_chain(agent, charger, stage):
    """Would catch energy sold for another chain's money."""
    assert_refused(agent(CHAIN__CHAIN_ID=5), EXIT_MISCONFIGURED, str(stage.net.chain_id), "5")
    assert charger.was_never_energised()


def deployed(stage, code):
    """The address of a contract with exactly this code."""
    # PUSH2 length, DUP1, PUSH1 12 (where the code starts), PUSH1 0, CODECOPY, PUSH1 0, RETURN
    init = b"\x61" + len(code).to_bytes(2, "big") + bytes.fromhex("80600c6000396000f3") + code
    return hex0x(stage.send(stage.organisation, init, to=b"").contract)


def test_a_contract_with_one_byte_changed(agent, charger, stage):
    """Would catch a market that looks like ours and pays somebody else."""
    code = stage.do(stage.node.code(stage.market.address))
    place = len(code) // 2
    changed = code[:place] + bytes([code[place] ^ 1]) + code[place + 1 :]
    address = deployed(stage, changed)
    assert_refused(agent(CHAIN__CONTRACT=address), EXIT_MISCONFIGURED, address)
    assert charger.was_never_energised()


def test_an_address_without_code(agent, charger):
    """Would catch silence from an address where nothing answers."""
    address = "0x" + "de" * 20
    assert_refused(agent(CHAIN__CONTRACT=address), EXIT_MISCONFIGURED, address)
    assert charger.was_never_energised()


def test_a_charger_that_is_away(agent):
    """Would catch a start without the device that must be made safe first."""
    wire = f"tcp://127.0.0.1:{free_port()}"
    assert_refused(agent(wire), EXIT_UNREACHABLE, wire, "v2v charger read")


def test_a_second_daemon_on_one_journal(agent, charger, tmp_path):
    """Would catch the same energy sold twice: two daemons, one memory."""
    first = agent().started()
    assert_refused(agent(), EXIT_MISCONFIGURED, str(tmp_path / "journal.sqlite"))
    assert first.is_running
    assert first.stop() == 0
    assert charger.was_never_energised()


def test_a_serial_port_that_another_process_has(agent, tmp_path):
    """Would catch two masters on one bus, whose frames mix: each must be told who came second."""
    folder = tmp_path / "serial"
    folder.mkdir()
    with Charger(folder, where=("--pty", str(folder / "tty"))) as charger:
        first = agent(charger.wire).started()
        second = agent(charger.wire, JOURNAL__PATH=tmp_path / "second.sqlite")
        assert_refused(second, EXIT_UNREACHABLE, "port_locked")
        words = (
            sys.executable,
            "-m",
            "agent",
            "charger",
            "read",
            "--map",
            "simulated",
            "--wire",
            charger.wire,
        )
        with Program(words, folder, "read") as reading:
            assert reading.ended() == EXIT_UNREACHABLE
            assert "port_locked" in reading.said
        assert first.is_running
        assert first.stop() == 0
        assert charger.was_never_energised()


def test_an_operator_that_nobody_named(agent, charger, tmp_path):
    """Would catch a car that delivers and then finds out that its key may not settle."""
    key = new_key(tmp_path / "stranger.key")
    said = agent(KEYS__OPERATOR=tmp_path / "stranger.key")
    assert_refused(said, EXIT_MISCONFIGURED, f"v2v provider set-operator {hex0x(key.address)}")
    assert charger.was_never_energised()


def test_an_operator_without_coins(agent, charger, stage, tmp_path):
    """Would catch a car that delivers and then cannot pay the gas to be paid."""
    key = new_key(tmp_path / "poor.key")
    owner, operator = stage.provider.owner, stage.provider.operator.address
    stage.send(owner, contract.encode_set_operator(key.address, 0))
    try:
        said = agent(KEYS__OPERATOR=tmp_path / "poor.key")
        assert_refused(said, EXIT_MISCONFIGURED, hex0x(key.address), "no coins")
    finally:
        stage.send(owner, contract.encode_set_operator(operator, 0))
    assert charger.was_never_energised()


def test_a_page_whose_port_is_taken(agent, charger):
    """Would catch an agent that runs without the door its consumers knock at."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        refused = agent(HTTP__LISTEN=listen)
        assert refused.ended() == EXIT_MISCONFIGURED, refused.said
    assert "Traceback" not in refused.said
    assert re.search(rf"^v2v: .*{listen}.*\n  .*listen", refused.said, re.MULTILINE), refused.said
    assert charger.was_never_energised()


def test_misspelt_settings(stage, charger, tmp_path):
    """Would catch a limit that is silently not there because its name has a typo."""
    lines = stage.config(charger.wire).read_text().splitlines()
    place = lines.index("confirmations = 3")
    lines[place] = "confirmation = 3"
    other = lines.index("current_ma_max = 32000")
    lines[other] = 'current_ma_max = "32 A"'
    file = tmp_path / "agent.toml"
    file.write_text("\n".join(lines) + "\n")
    words = (sys.executable, "-m", "agent", "provider", "run", "--config", file)
    with Program(words, tmp_path, "agent") as refused:
        assert refused.ended() == EXIT_MISCONFIGURED, refused.said
    assert "Traceback" not in refused.said
    for wanted in (f"agent.toml:{place + 1}", "confirmations", f"agent.toml:{other + 1}", "current_ma_max"):
        assert wanted in refused.said
    assert not (tmp_path / "journal.sqlite").exists()
    assert charger.was_never_energised()


def test_a_broker_that_is_away_is_only_said(stage, agent, tmp_path):
    """Would catch a broker that can stop a sale: it is neither money nor safety, so the door over HTTP must do."""
    folder = tmp_path / "own"
    folder.mkdir()
    with Charger(folder, "--ev-lag-ms", "400") as charger:
        seller = agent(charger.wire, HTTP__LISTEN=f"127.0.0.1:{stage.http_port}").started()
        seller.heard(r'"mqtt\.down"')
        journey = stage.journey()
        stage.matched(journey, 20)
        summary = stage.at_the_plug(journey, http=True).result(60)
        assert summary.energy_wh_settled == 20
        eventually(
            lambda: seller.session().get("stage") == "SETTLED", 30, "the agent believes the settlement"
        )
        assert 20_000 <= charger.truth["delivered_mwh"] < 21_000
        assert seller.stop() == 0
