"""REMEMBERS: the append-only journal of events. The file itself, its lock and its rows are `agent.rows`.

Rules
* `append` returns only when the row is on the disk; what cannot be written is `rows.Unwritable`, and then the agent must end.
* A journal belongs to one chain, contract and provider (`identity`).

May not know: what events mean.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from agent.core import events as ev
from agent.core.book import Book, step
from agent.core.events import Event
from agent.core.token import Domain
from agent.core.units import Address, hex0x
from agent.rows import Rows, Sort

SCHEMA_VERSION: Final = 1
SORT: Final = Sort(
    table="events",
    name="the journal",
    settings="the configuration says",
    folder_remedy="create it for the agent's user, or point [journal] path elsewhere",
    in_use="another agent already uses the journal",
    in_use_remedy="stop it first (systemctl stop v2v-agent): two daemons on one journal would sell the same energy twice",
    open_remedy="check the disk and the file's permissions; keep the file, it holds signed receipts",
    row_remedy="start the version that wrote it, or restore the newest backup; do not delete the journal",
)


class Journal:
    """The open journal of one vehicle. `read_only=True` takes no lock and cannot append."""

    def __init__(self, path: Path, domain: Domain, provider: Address, *, read_only: bool = False) -> None:
        self.path = path
        self._domain, self._provider = domain, provider
        identity = {
            "schema": str(SCHEMA_VERSION),
            "chain_id": str(domain.chain_id),
            "contract": hex0x(domain.contract),
            "provider": hex0x(provider),
        }
        self._rows = Rows(path, SORT, identity, read_only=read_only)

    def append(self, event: Event) -> None:
        """Write one event; on return it survives power loss. Raises Unwritable: the caller must end, not go on."""
        self._rows.append(event.at_s, event)

    def __len__(self) -> int:
        """The newest sequence number: grows with every row, so it names a life of the agent."""
        return len(self._rows)

    def events(self) -> Iterator[Event]:
        """Every event, oldest first. Raises Misconfigured for a row this version cannot read."""
        return self._rows.facts(ev.KINDS)

    def replay(self) -> Book:
        """The book that these events make: a restart is nothing else."""
        book = Book(self._domain, self._provider)
        for event in self.events():
            book = step(book, event)
        return book

    def close(self) -> None:
        """Give file and lock back."""
        self._rows.close()
