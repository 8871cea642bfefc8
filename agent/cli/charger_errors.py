"""What a charger's errors mean for whoever typed the command: which family, and so which exit code."""

from __future__ import annotations

from agent.errors import AgentError, Misconfigured, Refused, Transient
from firmware_bridge.charger import BridgeError, MapError

# What a person at the terminal can only wait for, or must plug in, switch on or free first.
_AWAY = {
    "unreachable",
    "port_missing",
    "port_locked",
    "unplugged",
    "timeout",
    "bus_busy",
    "bus_noisy",
    "closed",
}


def said_by_charger(error: BridgeError | MapError) -> AgentError:
    """The family of a bridge error: who must act, and so which exit code. The message already says what to do."""
    if isinstance(error, MapError) or error.name in ("port_denied", "port_refused"):
        return Misconfigured(str(error))
    if error.name in _AWAY:
        return Transient(str(error))
    return Refused(error.name, str(error).removeprefix(f"{error.name}: "))
