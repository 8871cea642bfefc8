"""REMEMBERS: the append-only journal of events. The file itself, its lock and its rows are `agent.rows`.

Beside the live table `events`, from which every start replays, there is `history` (the same rows, and whose session they tell
of): `compact` moves sessions there that are long closed, so that a start takes as long after ten years as on the first day.

Rules
* `append` returns only when the row is on the disk; what cannot be written is `rows.Unwritable`, and then the agent must end.
* Rows are never changed. Moving them keeps every byte, sequence numbers and checksums too; only scan cursors, which prove
  nothing, are dropped. It happens in one transaction, and only if what remains replays to the very same book.
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
from agent.core.session import Session
from agent.core.token import Domain
from agent.core.units import Address, SessionId, hex0x
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

_HISTORY: Final = """
CREATE TABLE IF NOT EXISTS history(seq INTEGER PRIMARY KEY, session TEXT NOT NULL, at_s INTEGER NOT NULL, kind TEXT NOT NULL,
    body TEXT NOT NULL, crc INTEGER NOT NULL) STRICT;
CREATE INDEX IF NOT EXISTS history_of_session ON history(session, seq);
"""
_ROW: Final = "seq, at_s, kind, body, crc"


class Journal:
    """The open journal of one vehicle. `read_only=True` takes no lock and cannot append."""

    def __init__(self, path: Path, domain: Domain, provider: Address, *, read_only: bool = False) -> None:
        self.path = path
        self.domain, self.provider = domain, provider
        identity = {
            "schema": str(SCHEMA_VERSION),
            "chain_id": str(domain.chain_id),
            "contract": hex0x(domain.contract),
            "provider": hex0x(provider),
        }
        self._rows = Rows(path, SORT, identity, more_tables=_HISTORY, read_only=read_only)
        (self.row_count,) = self._rows.db.execute("SELECT COUNT(*) FROM events").fetchone()

    def append(self, event: Event) -> None:
        """Write one event; on return it survives power loss. Raises Unwritable: the caller must end, not go on."""
        self._rows.append(event.at_s, event)
        self.row_count += 1

    def __len__(self) -> int:
        """The newest sequence number: grows with every row, so it names a life of the agent."""
        return len(self._rows)

    def events(self) -> Iterator[Event]:
        """Every event, oldest first. Raises Misconfigured for a row this version cannot read."""
        return self._rows.facts(ev.KINDS)

    def replay(self) -> Book:
        """The book that these events make: a restart is nothing else."""
        book = Book(self.domain, self.provider)
        for event in self.events():
            book = step(book, event)
        return book

    # ---- history

    def compact(self, fold: ev.HistoryFolded, after: Book) -> None:
        """Move everything that `after` (the book after `fold`) no longer needs into the history. Raises Unwritable."""
        kept = after.sessions.keys() | after.pending.keys()
        with self._rows.transaction() as db:
            for row in db.execute(f"SELECT {_ROW} FROM events ORDER BY seq").fetchall():  # noqa: S608 - ours
                event = self._rows.fact(ev.KINDS, row)
                session_id = session_of(event)
                if session_id in kept or isinstance(event, ev.PortLocked | ev.PortUnlocked):
                    continue
                if session_id is not None:
                    moved = (row[0], hex0x(session_id), *row[1:])
                    db.execute("INSERT INTO history VALUES (?, ?, ?, ?, ?, ?)", moved)
                db.execute("DELETE FROM events WHERE seq = ?", (row[0],))
            self._rows.insert(fold.at_s, fold)
            assert self.replay() == after, "what remains must make the same book"
        (self.row_count,) = self._rows.db.execute("SELECT COUNT(*) FROM events").fetchone()

    def sessions_folded(self, limit: int) -> list[SessionId]:
        """The newest sessions of the history, newest first."""
        found: dict[str, None] = {}
        for (session,) in self._rows.db.execute("SELECT session FROM history ORDER BY seq DESC"):
            found[session] = None
            if len(found) >= limit:
                break
        return [SessionId(bytes.fromhex(session[2:])) for session in found]

    def sessions_all(self) -> list[SessionId]:
        """Every session that was ever believed or closed here, oldest first."""
        old = self._rows.db.execute("SELECT session FROM history GROUP BY session ORDER BY MIN(seq)")
        ids = [SessionId(bytes.fromhex(session[2:])) for (session,) in old]
        return list(dict.fromkeys([*ids, *self.replay().sessions]))

    def events_of(self, session_id: SessionId) -> list[Event]:
        """Everything that happened to one session, live or folded, oldest first."""
        with self._rows.reading() as db:
            old = db.execute(
                f"SELECT {_ROW} FROM history WHERE session = ? ORDER BY seq",  # noqa: S608 - ours
                (hex0x(session_id),),
            ).fetchall()
        folded = [self._rows.fact(ev.KINDS, row) for row in old]
        return folded + [event for event in self.events() if session_of(event) == session_id]

    def session(self, session_id: SessionId) -> Session | None:
        """One session as its events tell it, live or folded; None for one that was never believed."""
        book = Book(self.domain, self.provider)
        for event in self.events_of(session_id):
            book = step(book, event)
        return book.sessions.get(session_id)

    def close(self) -> None:
        """Give file and lock back."""
        self._rows.close()


def session_of(event: Event) -> SessionId | None:
    """Whose event it is; None for facts about the chain or a port."""
    if isinstance(event, ev.ConnectedSeen):
        return event.terms.session_id
    session_id: SessionId | None = getattr(event, "session_id", None)
    return session_id
