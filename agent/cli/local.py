"""The other end of the agent's local socket (agent/runners/local.py): one JSON line out, one in.

Rules: every wait ends; what the agent refuses is `Refused` by its name; a socket nobody answers at is `Transient`.
May not know: what is asked.
"""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from agent.errors import Refused, Transient

ANSWER_WAIT_S = 90.0  # the agent itself answers within 75
ANSWER_BYTES_MAX = 4_000_000  # a status with every session shown is some tens of kilobytes


def ask_agent(path: Path, question: dict[str, Any]) -> dict[str, Any]:
    """What the agent at `path` answers. Raises Refused by the agent's names, Transient when nobody answers."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(ANSWER_WAIT_S)
            sock.connect(str(path))
            sock.sendall(json.dumps(question).encode() + b"\n")
            with sock.makefile("rb") as lines:
                line = lines.readline(ANSWER_BYTES_MAX)
    except PermissionError as error:
        raise Refused("not_yours", f"{path} is another user's", remedy="sudo.") from error
    except OSError as error:
        raise Transient(
            f"no agent answers at {path} ({error})", remedy="Is it running? systemctl status v2v-agent"
        ) from error
    try:
        answer = json.loads(line)
    except ValueError as error:
        raise Transient(f"the agent at {path} hung up", remedy="Ask again; see its log.") from error
    if "refused" in answer:
        no = answer["refused"]
        raise Refused(no["reason"], no["detail"], remedy=no["remedy"])
    assert isinstance(answer, dict)
    return answer
