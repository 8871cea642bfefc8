"""What can go wrong, sorted by who must act. A leaf: anybody may import this, it imports nothing of ours.

* `Transient`      the runner waits and tries again (bus glitch, node down, broker gone)
* `Refused`        the other side, or a rule, said no; always with a stable, documented `reason`
* `Misconfigured`  a human must fix something before we may start; exit 78, and systemd does not restart-loop

Anything else is a bug: let it crash. systemd restarts, the journal replays, and meanwhile the charger's own
failsafe holds the power off. Every message says what happened *and what to do*.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_USAGE = 2
EXIT_REFUSED = 3
EXIT_UNREACHABLE = 69  # EX_UNAVAILABLE of sysexits.h
EXIT_MISCONFIGURED = 78  # EX_CONFIG of sysexits.h; the unit says RestartPreventExitStatus=78


class AgentError(Exception):
    """One of the three families. `message` is one sentence; `remedy` is what the reader can do about it."""

    exit_code: int = 1

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message if not remedy else f"{message}\n  {remedy}")
        self.message = message
        self.remedy = remedy


class Transient(AgentError):
    """Something outside is away or slow. Raise it when waiting and trying again can help."""

    exit_code = EXIT_UNREACHABLE


class Refused(AgentError):
    """A rule or the other side said no. `reason` is one of the names documented for consumers and command lines."""

    exit_code = EXIT_REFUSED

    def __init__(self, reason: str, message: str = "", *, remedy: str = "") -> None:
        super().__init__(f"{reason}: {message}" if message else reason, remedy=remedy)
        self.reason = reason
        self.detail = message


class Misconfigured(AgentError):
    """A human must act before we can start: a wrong key, chain, contract, file or permission."""

    exit_code = EXIT_MISCONFIGURED
