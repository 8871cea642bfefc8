"""`v2v demo`: one whole evening, shown as it happens. Exit code 0 only when it was settled and the money adds up,
and, in the thief's story, when every theft was refused by its right name.
"""

from __future__ import annotations

import asyncio
import json
import signal
import sys
import tempfile
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from agent.errors import Misconfigured, Refused

if TYPE_CHECKING:
    from agent.demo.evening import EveningSummary


@click.command()
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0, max=2**32), help="Another evening."
)
@click.option(
    "--energy-wh",
    default=200,
    show_default=True,
    type=click.IntRange(min=1, max=5_000),
    help="How much is ordered.",
)
@click.option(
    "--keep", type=click.Path(file_okay=False, path_type=Path), help="Keep settings, journals, logs here."
)
@click.option(
    "--story",
    type=click.Choice(["evening", "thief"]),
    default="evening",
    show_default=True,
    help="thief: somebody at the broker replays and forges meanwhile, and is refused by name.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object last, alone on standard output.")
def demo(seed: int, energy_wh: int, keep: Path | None, story: str, as_json: bool) -> None:
    """Play one whole evening: market, two providers, one consumer, 22 kW, about a minute."""
    click.echo("v2v demo: loading the chain, the broker and the charger ...", err=as_json)
    try:
        from agent.demo.evening import EveningSettings, evening
        from agent.demo.screen import Screen
    except ImportError as missing:
        raise Misconfigured(
            f"the demo's parts are not installed ({missing.name} is missing)",
            remedy="pip install 'v2v-agent[demo]', or ./run demo from a checkout",
        ) from missing
    screen = Screen(sys.stderr if as_json else sys.stdout)
    with tempfile.TemporaryDirectory(prefix="v2v-demo-") as temporary:
        directory = (keep or Path(temporary)).resolve()
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        try:
            settings = EveningSettings(directory, seed, energy_wh, thief=story == "thief")
            summary = asyncio.run(_until_told(evening(settings, screen)))
        except asyncio.CancelledError:
            sys.exit(128 + signal.SIGTERM)
    if as_json:
        click.echo(json.dumps(summary.as_json()))
    if summary.stage != "SETTLED":
        raise Refused("not_settled", f"the session ended {summary.stage}")
    if story == "thief" and not (summary.thief and all(attempt.is_refused for attempt in summary.thief)):
        raise Refused(
            "not_refused", "the thief was not refused as he should have been; the table above says where"
        )


async def _until_told(play: Coroutine[Any, Any, EveningSummary]) -> EveningSummary:
    """Run it; SIGTERM ends it in order, so that the two agents do not outlive it."""
    task = asyncio.create_task(play)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task
