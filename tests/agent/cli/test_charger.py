"""`v2v charger`: exit codes and words for an installer."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import pytest

from agent.cli.charger_errors import said_by_charger
from agent.errors import EXIT_MISCONFIGURED, EXIT_REFUSED, EXIT_UNREACHABLE
from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.simulator import Simulator, SimulatorConfig

V2V = [sys.executable, "-c", "from agent.cli import main; main()", "charger"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`v2v charger ...` in a process of its own, as an installer types it."""
    return subprocess.run([*V2V, *arguments], capture_output=True, text=True, timeout=30, check=False)


async def test_read_shows_every_quantity_as_json():
    """Would catch a read that needs a configuration, or JSON mixed with prose."""
    async with Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator:
        done = await asyncio.to_thread(run, "read", "--map", "simulated", "--wire", simulator.wire, "--json")
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["pilot_state"] == "B"
    assert seen["contactor_closed"] is False
    assert seen["register_mwh"] == 1_234_567_000


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (("--map", "simulated", "--wire", "tcp://127.0.0.1:1"), EXIT_UNREACHABLE, "is the charger powered"),
        (("--map", "simulated", "--wire", "rtu:///dev/nobody"), EXIT_UNREACHABLE, "/dev/serial/by-id/"),
        (
            ("--map", "simulatd", "--wire", "tcp://127.0.0.1:1"),
            EXIT_MISCONFIGURED,
            "did you mean 'simulated'",
        ),
        (("--map", "simulated", "--wire", "modbus://x"), EXIT_MISCONFIGURED, "write tcp://"),
    ],
)
def test_every_failure_says_what_to_do_and_exits_by_who_must_act(arguments, code, told):
    """Would catch a traceback, or an exit code that makes systemd restart what only a human can mend."""
    done = run("read", *arguments)
    assert done.returncode == code
    assert told in done.stderr
    assert "Traceback" not in done.stderr


def test_a_refusal_of_the_device_keeps_its_name():
    """Would catch an exception 2 reported as an unreachable device."""
    assert said_by_charger(BridgeError("exception_2", "no such address")).exit_code == EXIT_REFUSED
    assert said_by_charger(BridgeError("port_denied", "dialout")).exit_code == EXIT_MISCONFIGURED
    assert said_by_charger(MapError("line 3")).exit_code == EXIT_MISCONFIGURED


def test_the_charger_commands_do_not_wait_for_web3():
    """Would catch an import that costs a Raspberry Pi seconds on every `v2v charger` command."""
    probe = "import sys, agent.cli.charger, firmware_bridge.mapped_charger; print('web3' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", probe], capture_output=True, text=True, timeout=30, check=True
    )
    assert done.stdout.strip() == "False"
