"""Which family, and so which exit code, an error of the bridge has for whoever typed the command."""

import pytest

from agent.cli.charger_errors import said_by_charger
from agent.errors import EXIT_MISCONFIGURED, EXIT_REFUSED, EXIT_UNREACHABLE
from firmware_bridge.charger import BridgeError, MapError


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (BridgeError("exception_2", "no such address"), EXIT_REFUSED),
        (BridgeError("hold_not_obeyed", "still on"), EXIT_REFUSED),
        (BridgeError("port_denied", "dialout"), EXIT_MISCONFIGURED),
        (BridgeError("port_refused", "parity"), EXIT_MISCONFIGURED),
        (MapError("line 3"), EXIT_MISCONFIGURED),
        (BridgeError("port_locked", "held by x"), EXIT_UNREACHABLE),
        (BridgeError("timeout", "no answer"), EXIT_UNREACHABLE),
    ],
)
def test_who_must_act_decides_the_code(error, code):
    """Would catch a wiring fault reported as a refusal of the device, or a missing permission that systemd retries for ever."""
    said = said_by_charger(error)
    assert said.exit_code == code
    assert str(error).removeprefix(f"{getattr(error, 'name', '')}: ") in str(said)
