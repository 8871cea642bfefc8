"""How the evening looks: a live view with a progress bar on a terminal, else plain lines; then a timeline and a money table.

Shows only what it is told; computes no money. All goes to one stream, so that `--json` can keep standard output for itself.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from agent.core.units import WH_PER_KWH
from agent.demo.thief import Attempt

WEI_PER_COIN = 10**18
LINE_EVERY_S = 5.0  # without a terminal: a line now and then instead of a bar
PLAIN_WIDTH = 140  # without a terminal: room for a whole transaction hash, which somebody may want to look up


@dataclass(frozen=True, slots=True)
class Glance:
    """One look at the session, from the winner's status page. Energies in Wh, money in wei."""

    stage: str
    reason: str
    power_w: int
    energy_wh_ordered: int
    energy_wh_delivered: int
    energy_wh_acked: int
    cost_wei: int


@dataclass(frozen=True, slots=True)
class Moment:
    """One row of the timeline; `tx_hash` and `gas` where it was a transaction."""

    at_s: float
    who: str
    what: str
    tx_hash: str = ""
    gas: int | None = None


@dataclass(frozen=True, slots=True)
class MoneyRow:
    """One party's evening in wei: what changed in its wallet and its ledger, what of that was energy and what was gas."""

    who: str
    energy_wei: int
    gas_wei: int
    wallet_change_wei: int
    ledger_change_wei: int


def coins(wei: int) -> str:
    """Exact decimal coins of an amount in wei."""
    sign, wei = ("-", -wei) if wei < 0 else ("", wei)
    return f"{sign}{wei // WEI_PER_COIN}.{wei % WEI_PER_COIN:018d}"


class Screen:
    """Tells the evening as it happens."""

    def __init__(self, stream: TextIO) -> None:
        self._console = Console(file=stream, highlight=False, width=None if stream.isatty() else PLAIN_WIDTH)
        self._began_s = time.monotonic()
        self._live: Live | None = None
        self._bar = Progress(
            TextColumn("{task.description}"), BarColumn(40), TextColumn("{task.percentage:>3.0f} %")
        )
        self._task = self._bar.add_task("delivered", total=1)
        self._shown_at_s = 0.0
        self._stage = ""

    @property
    def seconds(self) -> float:
        """Since the first line."""
        return time.monotonic() - self._began_s

    def tell(self, text: str) -> None:
        """One line, stamped with the seconds since the start."""
        self._console.print(f"[dim]{self.seconds:6.1f} s[/dim]  {text}")

    def watch(self, glance: Glance) -> None:
        """The session now."""
        if self._console.is_terminal:
            self._draw(glance)
        elif glance.stage != self._stage or self.seconds - self._shown_at_s >= LINE_EVERY_S:
            self._shown_at_s = self.seconds
            self.tell(_line(glance))
        self._stage = glance.stage

    def _draw(self, glance: Glance) -> None:
        if self._live is None:
            self._live = Live(console=self._console, refresh_per_second=8, transient=True)
            self._live.start()
        total = max(1, glance.energy_wh_ordered)
        self._bar.update(self._task, completed=glance.energy_wh_delivered, total=total)
        self._live.update(Group(_line(glance), self._bar))

    def rest(self) -> None:
        """End the live view, keeping what was said."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def timeline(self, moments: Sequence[Moment]) -> None:
        """Everything that happened, in order."""
        table = Table(title="The evening", title_justify="left", box=None, pad_edge=False)
        for name in ("s", "who", "what", "gas", "transaction"):
            table.add_column(name, justify="right" if name in ("s", "gas") else "left", overflow="fold")
        for moment in sorted(moments, key=lambda one: one.at_s):
            gas = "" if moment.gas is None else f"{moment.gas}"
            table.add_row(f"{moment.at_s:.1f}", moment.who, moment.what, gas, moment.tx_hash)
        self._console.print()
        self._console.print(table)

    def attempt(self, attempt: Attempt) -> None:
        """One theft, as it is answered."""
        answer = (
            f"[red]{attempt.reason}[/red]"
            if attempt.is_refused
            else f"[bold red]{attempt.reason}[/bold red] ?!"
        )
        detail = f" ({escape(attempt.detail)})" if attempt.detail else ""
        self.tell(f"[bold]the thief[/bold] at {attempt.at}: {attempt.what}: {answer}{detail}")

    def attempts(self, attempts: Sequence[Attempt]) -> None:
        """What the thief got for his evening."""
        table = Table(title="The thief", title_justify="left", box=None, pad_edge=False)
        for name in ("at", "what he tried", "the agent's answer", "he got"):
            table.add_column(name)
        for one in attempts:
            table.add_row(one.at, one.what, one.reason, "nothing" if one.is_refused else "SOMETHING")
        self._console.print()
        self._console.print(table)

    def money(self, rows: Sequence[MoneyRow]) -> None:
        """Who gained and paid what; the last row adds up to nothing but gas."""
        table = Table(title="The money, in coins", title_justify="left", box=None, pad_edge=False)
        for name in ("party", "energy", "gas", "wallet change", "ledger change"):
            table.add_column(name, justify="left" if name == "party" else "right", no_wrap=True)
        total = MoneyRow(
            "all together",
            sum(row.energy_wei for row in rows),
            sum(row.gas_wei for row in rows),
            sum(row.wallet_change_wei for row in rows),
            sum(row.ledger_change_wei for row in rows),
        )
        for row in (*rows, total):
            amounts = (row.energy_wei, row.gas_wei, row.wallet_change_wei, row.ledger_change_wei)
            table.add_row(row.who, *(coins(amount) for amount in amounts))
        self._console.print()
        self._console.print(table)


def _line(glance: Glance) -> str:
    reason = f" ({glance.reason})" if glance.reason else ""
    rate = f"{glance.power_w / WH_PER_KWH:.1f} kW"
    energy = f"{glance.energy_wh_delivered} of {glance.energy_wh_ordered} Wh, {glance.energy_wh_acked} acknowledged"
    return f"{glance.stage}{reason}  {rate}  {energy}  {coins(glance.cost_wei)} coins"
