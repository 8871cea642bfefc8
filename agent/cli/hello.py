"""`v2v provider hello`: the Hello of the running agent as a QR code in this terminal, for a plug without a screen.

It is the one that the agent's page and the broker show (PROTOCOL section 4), fetched from its local web server, so a used or
rotated one is never shown longer than it takes to look.

May not know: how a Hello is made.
"""

from __future__ import annotations

import http.client
import json
import os
from pathlib import Path
from typing import Any, Final

import click

from agent.cli.output import at, echo, json_option
from agent.config import AgentConfig, load_agent
from agent.core.messages import Hello, decode, encode
from agent.core.token import charger_id
from agent.errors import Refused, Transient

WAIT_S: Final = 5.0
ANSWER_BYTES_MAX: Final = 32 * 1024  # what listens there might be something else
EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - where the agent listens is not where we ask


@click.command()
@click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Settings file (agent.toml).",
)
@click.option("--port", default="", help="Only this charging port.")
@json_option
def hello(config_file: Path, port: str, *, as_json: bool) -> None:
    """The code that a consumer scans at the plug, as it is now.

    It changes every half minute, and when it was used.
    """
    settings = load_agent(config_file, os.environ)
    names = {charger_id(one.name): one.name for one in settings.ports}
    shown = {names.get(one.charger_id, ""): one for one in current_hellos(settings)}
    wanted = {name: one for name, one in shown.items() if port in ("", name)}
    if not wanted:
        raise Refused(
            "no_hello",
            f"the agent shows no Hello for {port or 'any port'}",
            remedy=f"Ports: {', '.join(names.values())}. Just started, it first waits for a block to know the time.",
        )
    found = {name: json.loads(encode(one)) for name, one in wanted.items()}
    echo({"hellos": found}, "" if as_json else _codes(wanted), as_json=as_json)


def current_hellos(settings: AgentConfig) -> list[Hello]:
    """Every port's Hello from the running agent. Raises Refused when it serves none, Transient when it does not answer."""
    if not settings.http.enabled or settings.http.port == 0:
        raise Refused(
            "not_served",
            "the agent of these settings has no web server at a known port, so its Hello is only on the broker",
            remedy='Set [http] enabled = true and listen = "127.0.0.1:8465", and start it again.',
        )
    host = EVERYWHERE.get(settings.http.host, settings.http.host)
    asking = http.client.HTTPConnection(host, settings.http.port, timeout=WAIT_S)
    try:
        asking.request("GET", "/v1/hello")
        answer: Any = json.loads(asking.getresponse().read(ANSWER_BYTES_MAX))
        messages = [decode(json.dumps(one).encode()) for one in answer]
    except (OSError, http.client.HTTPException, ValueError, TypeError, Refused) as problem:
        raise Transient(
            f"no agent answers at {settings.http.listen} ({problem})",
            remedy="Is it running? v2v provider status",
        ) from problem
    finally:
        asking.close()
    return [one for one in messages if isinstance(one, Hello)]


def _codes(hellos: dict[str, Hello]) -> str:
    import io

    import segno

    text = io.StringIO()
    for name, one in hellos.items():
        text.write(f"{name}, until {at(one.expires_at_s)}\n")
        code = segno.make(encode(one).decode(), error="l", micro=False, boost_error=False)
        code.terminal(out=text, compact=True)
    return text.getvalue()


__all__ = ["current_hellos", "hello"]
