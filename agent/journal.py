"""REMEMBERS: the append-only journal of events, in SQLite.

Schema (version 1)
    identity(key TEXT PRIMARY KEY, value TEXT)             schema, chain_id, contract, provider: whose journal this is
    events(seq INTEGER PRIMARY KEY, at_s INTEGER, kind TEXT, body TEXT)   body: the event's fields as JSON, bytes as 0x-hex

Rules
* `append` returns only when the row is on the disk (WAL, synchronous FULL); rows are never changed or deleted.
* One writer: a lock file beside the journal stops a second daemon. Readers (command lines) need no lock.
* A journal belongs to one chain, contract and provider; opening it for another is Misconfigured, not a fresh start.

May not know: what events mean. Raises `agent.errors.Misconfigured` for every state of the file a human must look at.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import types
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

from agent.core import events as ev
from agent.core.book import Book, step
from agent.core.events import Event
from agent.core.token import Domain
from agent.core.units import Address, hex0x
from agent.errors import Misconfigured

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 5.0  # a reader that holds the file longer than this is a fault worth a crash
BODY_LENGTH_MAX = 16_384  # our longest event is a signed transaction of under 2 kB; anything longer is a bug

_TABLES = """
CREATE TABLE IF NOT EXISTS identity(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS events(seq INTEGER PRIMARY KEY, at_s INTEGER NOT NULL, kind TEXT NOT NULL, body TEXT NOT NULL) STRICT;
"""


class Journal:
    """The open journal of one vehicle. `read_only=True` takes no lock and cannot append."""

    def __init__(self, path: Path, domain: Domain, provider: Address, *, read_only: bool = False) -> None:
        self.path = path
        self._identity = {
            "schema": str(SCHEMA_VERSION),
            "chain_id": str(domain.chain_id),
            "contract": hex0x(domain.contract),
            "provider": hex0x(provider),
        }
        self._domain, self._provider = domain, provider
        with ExitStack() as held:  # gives lock and file back when opening fails half-way
            if not read_only:
                held.enter_context(_locked(path))
            try:
                self._db = held.enter_context(closing(_connected(path, read_only=read_only)))
                if not read_only:
                    _prepare(self._db)
                self._check_identity(read_only=read_only)
            except sqlite3.Error as error:
                raise Misconfigured(
                    f"the journal {path} cannot be opened: {error}",
                    remedy="check the disk and the file's permissions; keep the file, it holds signed receipts",
                ) from error
            self._held = held.pop_all()

    def append(self, event: Event) -> None:
        """Write one event; on return it survives power loss. Raises sqlite3.Error: the caller must crash, not go on."""
        body = json.dumps(_encoded(event), separators=(",", ":"))
        assert len(body) <= BODY_LENGTH_MAX, (type(event).__name__, len(body))
        self._db.execute(
            "INSERT INTO events(at_s, kind, body) VALUES (?, ?, ?)", (event.at_s, type(event).__name__, body)
        )

    def __len__(self) -> int:
        """The newest sequence number: grows with every row, so it names a life of the agent."""
        row = self._db.execute("SELECT COALESCE(MAX(seq), 0) FROM events").fetchone()
        return int(row[0])

    def events(self) -> Iterator[Event]:
        """Every event, oldest first. Raises Misconfigured for a row this version cannot read."""
        for seq, kind, body in self._db.execute("SELECT seq, kind, body FROM events ORDER BY seq"):
            yield _decoded_event(self.path, seq, kind, body)

    def replay(self) -> Book:
        """The book that these events make: a restart is nothing else."""
        book = Book(self._domain, self._provider)
        for event in self.events():
            book = step(book, event)
        return book

    def close(self) -> None:
        """Give file and lock back."""
        self._held.close()

    def _check_identity(self, *, read_only: bool) -> None:
        found = dict(self._db.execute("SELECT key, value FROM identity"))
        if not found and not read_only:
            self._db.executemany("INSERT INTO identity VALUES (?, ?)", list(self._identity.items()))
            return
        for key, value in self._identity.items():
            if found.get(key) != value:
                raise Misconfigured(
                    f"the journal {self.path} belongs to {key} {found.get(key)}, the configuration says {value}",
                    remedy="point [journal] path at another file, or correct the configuration; keep the old journal",
                )


def _locked(path: Path) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = path.with_name(path.name + ".lock").open("a", encoding="ascii")
    except OSError as error:
        raise Misconfigured(
            f"the journal's directory {path.parent} cannot be written: {error.strerror}",
            remedy="create it for the agent's user, or point [journal] path elsewhere",
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise Misconfigured(
            f"another agent already uses the journal {path}",
            remedy="stop it first (systemctl stop v2v-agent): two daemons on one journal would sell the same energy twice",
        ) from error
    return lock


def _connected(path: Path, *, read_only: bool) -> sqlite3.Connection:
    if read_only:
        return sqlite3.connect(
            f"{path.resolve().as_uri()}?mode=ro", uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None
        )
    if not path.exists():
        path.touch(mode=0o600)  # before SQLite: its -wal and -shm files take over this mode
        _sync_directory(path.parent)
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)


def _prepare(db: sqlite3.Connection) -> None:
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.executescript(_TABLES)


def _sync_directory(directory: Path) -> None:
    """A new file's name is durable only when its directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ---- events as JSON


def _encoded(value: object) -> Any:
    if isinstance(value, bytes):
        return hex0x(value)
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {f.name: _encoded(getattr(value, f.name)) for f in fields(value)}
    assert value is None or isinstance(value, bool | int | str), value
    return value


def _decoded_event(path: Path, seq: int, kind: str, body: str) -> Event:
    try:
        event = _decoded(ev.KINDS[kind], json.loads(body))
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise Misconfigured(
            f"row {seq} of the journal {path} ({kind}) cannot be read by this version: {error!r}",
            remedy="start the version that wrote it, or restore the newest backup; do not delete the journal",
        ) from error
    assert isinstance(event, Event)
    return event


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _decoded(kind: Any, value: Any) -> Any:
    if isinstance(kind, NewType):
        kind = kind.__supertype__
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
        return _decoded(kind, value)
    if kind is bytes:
        if not value.startswith("0x"):
            raise ValueError(value)
        return bytes.fromhex(value[2:])
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: _decoded(hints[name], item) for name, item in value.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ValueError(value)
    if kind in (int, str, bool) and type(value) is not kind:
        raise TypeError(value)
    return value
