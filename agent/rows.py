"""What both journals are made of: an append-only, locked table of facts in SQLite, and frozen dataclasses as JSON.

Schema
    identity(key TEXT PRIMARY KEY, value TEXT)      schema and owner: whose journal this is
    <table>(seq INTEGER PRIMARY KEY, at_s INTEGER, kind TEXT, body TEXT, crc INTEGER)
        body: the fact's fields as JSON, bytes as 0x-hex; crc: CRC-32 over the rest of the row

Rules
* `append` returns only when the row is on the disk (WAL, synchronous FULL). What cannot be written is `Unwritable`: nothing
  may go on after it, because whoever goes on acts on what a restart will not know.
* One writer: a lock file beside the journal stops a second one, and names its process. Readers need no lock.
* A journal belongs to one owner on one market; opening it for another is Misconfigured, not a fresh start.
* A row that cannot be read, or whose checksum differs, stops us and is named. Nothing is skipped, nothing is guessed.

May not know: what the facts mean.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import types
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal, NewType, Union, get_args, get_origin, get_type_hints

from agent.errors import EXIT_UNREACHABLE, AgentError, Misconfigured

BUSY_TIMEOUT_S = 5.0  # a reader that holds the file longer than this is a fault worth a crash
NO_ROOM = frozenset(  # what SQLite says of a full disk while it opens a file: not a human's mistake, and it may pass
    {
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_FSYNC,
        sqlite3.SQLITE_IOERR_SHMSIZE,
        sqlite3.SQLITE_IOERR_SHMOPEN,
    }
)
BODY_LENGTH_MAX = 16_384  # our longest fact is a signed transaction of under 2 kB; anything longer is a bug


class Unwritable(AgentError):
    """The disk took nothing: full, read-only or broken. Not Transient: no runner may wait it out in this life, because the
    row may or may not be there; the next life reads what is.
    """

    exit_code = EXIT_UNREACHABLE


@dataclass(frozen=True, slots=True)
class Sort:
    """One sort of journal: its table, and what a human is told about it."""

    table: str
    name: str  # "the journal"
    settings: str  # "the configuration"
    folder_remedy: str
    in_use: str
    in_use_remedy: str
    open_remedy: str
    row_remedy: str


class Rows:
    """The open table of one journal. `read_only=True` takes no lock and cannot append.

    Raises Misconfigured for every state of the file that a human must look at.
    """

    def __init__(
        self,
        path: Path,
        sort: Sort,
        identity: Mapping[str, str],
        *,
        more_tables: str = "",
        read_only: bool = False,
    ) -> None:
        self.path, self._sort = path, sort
        self._broken = False
        self._insert = f"INSERT INTO {sort.table}(seq, at_s, kind, body, crc) VALUES (?, ?, ?, ?, ?)"  # noqa: S608 - ours
        with ExitStack() as held:  # gives lock and file back when opening fails half-way
            if not read_only:
                held.enter_context(_locked(path, sort))
            with _reading(path, sort):
                self.db = held.enter_context(closing(_connected(path, read_only=read_only)))
                if not read_only:
                    _prepare(self.db, _table(sort.table) + more_tables)
                self._check_identity(identity, read_only=read_only)
                self._newest = int(
                    self.db.execute(f"SELECT COALESCE(MAX(seq), 0) FROM {sort.table}").fetchone()[0]  # noqa: S608
                )
            self._held = held.pop_all()

    def append(self, at_s: int, fact: object) -> None:
        """Write one fact; on return it survives power loss. Raises Unwritable, and then for ever."""
        with self.writing():
            self.insert(at_s, fact)

    def insert(self, at_s: int, fact: object) -> None:
        """The row itself; several of them become one transaction inside `writing`."""
        body = json.dumps(encoded(fact), separators=(",", ":"))
        assert len(body) <= BODY_LENGTH_MAX, (type(fact).__name__, len(body))
        row = (self._newest + 1, at_s, type(fact).__name__, body)
        self.db.execute(self._insert, (*row, checksum(*row)))
        self._newest += 1

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Around whatever writes: a fault of the disk becomes Unwritable, and nothing is written after it."""
        if self._broken:
            raise _unwritable(self.path, self._sort, "it failed before")
        try:
            yield
        except sqlite3.Error as error:
            self._broken = True
            raise _unwritable(self.path, self._sort, str(error)) from error

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Several changes that are all on the disk afterwards, or none of them. Raises Unwritable."""
        newest = self._newest
        with self.writing():
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield self.db
                self.db.execute("COMMIT")
            except BaseException:
                self._newest = newest
                if self.db.in_transaction:  # a full disk has ended it already
                    self.db.execute("ROLLBACK")
                raise

    def __len__(self) -> int:
        """The newest sequence number: grows with every row, also over a restart."""
        return self._newest

    def facts(self, kinds: Mapping[str, Any]) -> Iterator[Any]:
        """Every fact, oldest first. Raises Misconfigured for a row that is damaged or not ours to understand."""
        with self.reading():
            columns = "seq, at_s, kind, body, crc"
            for row in self.db.execute(f"SELECT {columns} FROM {self._sort.table} ORDER BY seq"):  # noqa: S608
                yield self.fact(kinds, row)

    def fact(self, kinds: Mapping[str, Any], row: tuple[int, int, str, str, int]) -> Any:
        """One row as its fact."""
        seq, at_s, kind, body, crc = row
        try:
            if checksum(seq, at_s, kind, body) != crc:
                raise ValueError("its checksum differs: the disk has changed it")
            return decoded(kinds[kind], json.loads(body))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise Misconfigured(
                f"row {seq} of {self._sort.name} {self.path} ({kind}) cannot be read by this version: {error!r}",
                remedy=self._sort.row_remedy,
            ) from error

    def close(self) -> None:
        """Give file and lock back."""
        self._held.close()

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Around whatever reads: a file that SQLite cannot read becomes Misconfigured."""
        with _reading(self.path, self._sort):
            yield self.db

    def _check_identity(self, identity: Mapping[str, str], *, read_only: bool) -> None:
        found = dict(self.db.execute("SELECT key, value FROM identity"))
        if not found and not read_only:
            self.db.execute("BEGIN IMMEDIATE")
            self.db.executemany("INSERT INTO identity VALUES (?, ?)", list(identity.items()))
            self.db.execute("COMMIT")
            return
        for key, value in identity.items():
            if found.get(key) != value:
                raise Misconfigured(
                    f"{self._sort.name} {self.path} belongs to {key} {found.get(key)}, {self._sort.settings} {value}",
                    remedy="point [journal] path at another file, or correct the settings; keep the old journal",
                )


@contextmanager
def _reading(path: Path, sort: Sort) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        if error.sqlite_errorcode in NO_ROOM:
            raise _unwritable(path, sort, str(error)) from error
        raise Misconfigured(
            f"{sort.name} {path} cannot be opened: {error}", remedy=sort.open_remedy
        ) from error


def _unwritable(path: Path, sort: Sort, why: str) -> Unwritable:
    return Unwritable(
        f"{sort.name} {path} cannot be written: {why}",
        remedy="make room or mend the disk; what was acknowledged is safe, and nothing else has happened",
    )


# ---- the file


def lock_path(path: Path) -> Path:
    """The lock beside a journal; while it is held, it holds its owner's process id."""
    return path.with_name(path.name + ".lock")


def owner_pid(path: Path) -> int | None:
    """The process that has this journal open for writing; None when nobody has."""
    try:
        with lock_path(path).open("r", encoding="ascii") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return int(lock.read() or 0) or None
    except (FileNotFoundError, ValueError):
        return None
    return None


def _locked(path: Path, sort: Sort) -> IO[str]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = lock_path(path).open("a", encoding="ascii")
    except OSError as error:
        raise Misconfigured(
            f"{sort.name}'s directory {path.parent} cannot be written: {error.strerror}",
            remedy=sort.folder_remedy,
        ) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise Misconfigured(f"{sort.in_use} {path}", remedy=sort.in_use_remedy) from error
    try:
        os.ftruncate(lock.fileno(), 0)
        os.write(lock.fileno(), str(os.getpid()).encode())
    except OSError as error:
        lock.close()
        raise _unwritable(path, sort, str(error.strerror)) from error
    return lock


def _connected(path: Path, *, read_only: bool) -> sqlite3.Connection:
    if read_only:
        # A log needs its shared memory beside it, which a read-only disk cannot have; without a log nothing can change.
        still = not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()
        uri = f"{path.resolve().as_uri()}?{'immutable=1' if still else 'mode=ro'}"
        return sqlite3.connect(uri, uri=True, timeout=BUSY_TIMEOUT_S, isolation_level=None)
    if not path.exists():
        path.touch(mode=0o600)  # before SQLite: its -wal and -shm files take over this mode
        _sync_directory(path.parent)
    return sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None)


def _table(name: str) -> str:
    return (
        "CREATE TABLE IF NOT EXISTS identity(key TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;\n"
        f"CREATE TABLE IF NOT EXISTS {name}(seq INTEGER PRIMARY KEY, at_s INTEGER NOT NULL, kind TEXT NOT NULL, "
        "body TEXT NOT NULL, crc INTEGER NOT NULL) STRICT;\n"
    )


def _prepare(db: sqlite3.Connection, tables: str) -> None:
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.executescript(tables)


def _sync_directory(directory: Path) -> None:
    """A new file's name is durable only when its directory is."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def checksum(seq: int, at_s: int, kind: str, body: str) -> int:
    """CRC-32 of a row: shows what a disk changed, not what a forger did (signatures and the chain show that)."""
    return zlib.crc32(f"{seq}|{at_s}|{kind}|{body}".encode())


# ---- facts as JSON


def encoded(value: object) -> Any:
    """A fact as JSON knows it: dataclasses as objects, bytes as 0x-hex, enums by value. Never a float."""
    if isinstance(value, bytes):
        return "0x" + value.hex()
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value):
        return {field.name: encoded(getattr(value, field.name)) for field in fields(value)}
    assert value is None or isinstance(value, bool | int | str), value
    return value


def decoded(kind: Any, value: Any) -> Any:
    """The fact of type `kind` that `value` encodes. Raises KeyError, ValueError, TypeError or AttributeError."""
    if isinstance(kind, NewType):
        kind = kind.__supertype__
    if get_origin(kind) in (Union, types.UnionType):
        if value is None:
            return None
        kind = next(arg for arg in get_args(kind) if arg is not type(None))
        return decoded(kind, value)
    if kind is bytes:
        if not value.startswith("0x"):
            raise ValueError(value)
        return bytes.fromhex(value[2:])
    if isinstance(kind, type) and is_dataclass(kind):
        hints = _hints(kind)
        return kind(**{name: decoded(hints[name], item) for name, item in value.items()})
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    if get_origin(kind) is Literal and value not in get_args(kind):
        raise ValueError(value)
    if kind in (int, str, bool) and type(value) is not kind:
        raise TypeError(value)
    return value


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)
