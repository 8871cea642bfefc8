"""`v2v demo` at its edges: what it says when something is missing or goes wrong. The evening itself is told in tests/e2e."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent.cli.demo import demo
from agent.demo import evening as the_evening
from agent.demo.evening import EveningSummary
from agent.errors import EXIT_REFUSED, Misconfigured, Refused, Transient

SUMMARY = EveningSummary(
    energy_wh_ordered=200,
    energy_wh_delivered=200,
    energy_wh_settled=200,
    cost_wei=3_200_000_000_000_000,
    provider_gain_wei=3_200_000_000_000_000,
    provider_gas_wei=1,
    consumer_cost_wei=3_200_000_000_000_000,
    consumer_gas_wei=2,
    stage="SETTLED",
    stop_reason="EnergyLimitReached",
    settlement_tx="0x" + "5e" * 32,
    session_id="0x" + "1d" * 32,
    true_mwh=200_050,
    seconds=55.5,
)


@pytest.fixture
def played(monkeypatch):
    """The evenings that were asked for; each ends with what `played.ends` says, at once."""

    class Played(list):
        ends = SUMMARY

    evenings = Played()

    async def evening(settings, screen):
        evenings.append(settings)
        screen.tell("a story")
        if isinstance(evenings.ends, Exception):
            raise evenings.ends
        return evenings.ends

    monkeypatch.setattr(the_evening, "evening", evening)
    return evenings


def typed(*words):
    """`v2v demo` and these words."""
    return CliRunner().invoke(demo, words)


def test_json_has_standard_output_for_itself(played):
    """Would catch a line of the story in what a program is going to parse."""
    said = typed("--json", "--seed", "7", "--energy-wh", "50")
    assert said.exit_code == 0
    assert json.loads(said.stdout) == SUMMARY.as_json()
    assert "a story" in said.stderr
    assert (played[0].seed, played[0].energy_wh) == (7, 50)


def test_the_first_line_comes_before_anything_is_loaded(played):
    """Would catch seconds of silence while web3 and an EVM are imported."""
    assert typed().stdout.startswith("v2v demo: loading")


def test_an_evening_without_a_settlement_is_no_success(played):
    """Would catch exit code 0 after money was left in the contract."""
    played.ends = type(SUMMARY)(**(SUMMARY.as_json() | {"stage": "STRANDED"}))
    problem = typed().exception
    assert isinstance(problem, Refused)
    assert (problem.reason, problem.exit_code) == ("not_settled", EXIT_REFUSED)


def test_what_went_wrong_reaches_the_command_line(played):
    """Would catch an evening whose failure is swallowed, or loses the agents' last words."""
    played.ends = Transient("the evening did not end within 300 s", remedy="the agents' last words: ...")
    assert typed().exception is played.ends


def test_missing_parts_are_named_with_the_command_that_brings_them(monkeypatch):
    """Would catch an ImportError's traceback at somebody who installed the agent without the demo."""
    monkeypatch.delitem(sys.modules, "agent.demo.evening")
    monkeypatch.setitem(sys.modules, "amqtt", None)
    monkeypatch.setitem(sys.modules, "agent.demo.evening", None)
    problem = typed().exception
    assert isinstance(problem, Misconfigured)
    assert "agent.demo.evening is missing" in problem.message
    assert "v2v-agent[demo]" in problem.remedy


def test_what_is_kept_is_kept_privately(played, tmp_path):
    """Would catch keys in a folder that others on this machine may read, or a folder that is forgotten."""
    folder = tmp_path / "kept"
    assert typed("--keep", str(folder)).exit_code == 0
    assert played[0].directory == folder
    assert folder.stat().st_mode & 0o077 == 0
    assert typed().exit_code == 0
    assert not played[1].directory.exists()  # a temporary one, gone again


@pytest.mark.parametrize(
    "words", [("--energy-wh", "0"), ("--energy-wh", "6000"), ("--seed", "-1")], ids=" ".join
)
def test_what_cannot_be_played_is_refused_by_name(played, words):
    """Would catch an evening that never ends, or ends before it begins."""
    said = typed(*words)
    assert said.exit_code == 2
    assert words[0] in said.stderr
    assert not played


def test_told_to_stop_it_takes_its_agents_along(tmp_path: Path) -> None:
    """Would catch two daemons that go on after the demo was ended by SIGTERM, holding ports and driving chargers."""
    command = [sys.executable, "-m", "agent", "demo", "--json", "--keep", str(tmp_path)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as play:
        assert play.stderr is not None
        for line in play.stderr:
            if "asking for" in line:
                break
        play.terminate()
        assert play.wait(30) == 128 + signal.SIGTERM
    commands = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()]
    assert not [one for one in commands if str(tmp_path).encode() in one]
