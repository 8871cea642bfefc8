"""The command line as a whole: starts quickly, suggests, and ends with the exit code that says who must act."""

import subprocess
import sys

import click
import pytest
from town import v2v

import agent.cli as command_line
from agent.errors import Misconfigured, Refused, Transient

SLOW = ("web3", "eth_account", "eth_abi", "aiohttp", "pymodbus", "websockets", "rich")
PROBE = """
import sys
from agent.cli import main
try:
    main(sys.argv[1:])
except SystemExit as done:
    assert done.code == 0, done.code
print("LOADED", [name for name in {slow!r} if name in sys.modules])
"""


@pytest.mark.parametrize(
    "typed",
    [
        ("--help",),
        ("--version",),
        ("provider", "--help"),
        ("provider", "bid", "--help"),
        ("organisation", "--help"),
        ("organisation", "deploy", "--help"),
        ("config", "check", "config/agent.toml"),
    ],
    ids=" ".join,
)
def test_what_needs_no_chain_loads_none(typed):
    """Would catch an import at the top of a file that makes a Raspberry Pi wait seconds for a help text."""
    probe = [sys.executable, "-c", PROBE.format(slow=SLOW), *typed]
    done = subprocess.run(probe, capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"


@pytest.mark.parametrize("group", ["provider", "organisation", "config"])
def test_every_command_explains_itself_in_one_line(group):
    """Would catch a help list that ends its sentences in dots, where the important half is cut off."""
    commands = v2v(group, "--help").out.partition("Commands:")[2].strip().splitlines()
    assert len(commands) >= 2
    for line in commands:
        assert line.endswith("."), line
        assert not line.endswith("..."), line


def test_an_unknown_command_is_compared_with_what_there_is():
    """Would catch a typing mistake answered with nothing but no."""
    said = v2v("provder")
    assert said.exit_code == 2
    assert "Did you mean 'provider'?" in said.err
    nested = v2v("provider", "bidd")
    assert nested.exit_code == 2
    assert "bid" in nested.err


def test_an_unknown_option_is_a_usage_error():
    """Would catch an option that is swallowed: --bond-limt 0 must not lock everything."""
    said = v2v("provider", "set-operator", "--bond-limt", "0")
    assert said.exit_code == 2
    assert "--bond-limit" in said.err


@pytest.mark.parametrize(
    ("problem", "exit_code"),
    [
        (Refused("busy", "another car", remedy="Wait."), 3),
        (Transient("the node is away", remedy="Wait."), 69),
        (Misconfigured("a wrong key", remedy="Wait."), 78),
        (click.UsageError("no such thing"), 2),
        (click.Abort(), 130),
        (KeyboardInterrupt(), 130),
    ],
)
def test_each_family_has_its_exit_code(monkeypatch, problem, exit_code):
    """Would catch a traceback instead of a sentence, and a unit that restart-loops over a wrong file."""

    @click.command()
    def fails() -> None:
        raise problem

    monkeypatch.setitem(command_line.COMMANDS, "fails", ("agent.cli.fails:fails", "Fails."))
    monkeypatch.setattr(command_line, "import_module", lambda _name: type("Module", (), {"fails": fails}))
    said = v2v("fails")
    assert said.exit_code == exit_code
    assert said.out == ""
    if exit_code in (3, 69, 78):
        assert said.err.startswith("v2v: ")
        assert said.err.endswith("\n  Wait.\n")


def test_a_reader_that_has_seen_enough_is_no_error():
    """Would catch a traceback after `v2v config schema | head -1`."""
    script = f"{sys.executable} -m agent config schema | head -c 1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=50, check=False)
    assert done.stderr == ""
    assert done.returncode in (0, 141)
