"""The journal survives: power cuts, second daemons, foreign files, torn tails, and versions that do not understand."""

import os
import select
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import typing
from dataclasses import fields, is_dataclass
from enum import Enum

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from story import DOMAIN, PROVIDER, T0, TERMS, ListJournal, delivering, matched, presentation, stops

from agent.core import events as ev
from agent.core.token import Domain
from agent.errors import Misconfigured
from agent.journal import Journal
from agent.rows import BODY_LENGTH_MAX, Unwritable, checksum

LENGTHS = {"Address": 20, "Token": 32, "SessionId": 32, "TxHash": 32, "BlockHash": 32}


def values_of(kind):
    """A strategy for any type that stands in an event."""
    if isinstance(kind, typing.NewType):
        length = LENGTHS[kind.__name__]
        return st.binary(min_size=length, max_size=length)
    if kind is bytes:
        return st.binary(max_size=130)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, 2**256 - 1)
    if kind is str:
        return st.text(max_size=60)
    if typing.get_origin(kind) is typing.Literal:
        return st.sampled_from(typing.get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return st.sampled_from(list(kind))
    assert is_dataclass(kind), kind
    hints = typing.get_type_hints(kind)
    return st.builds(kind, **{field.name: values_of(hints[field.name]) for field in fields(kind)})


def event_of(kind):
    """Any event of this kind; the row's own `at_s` is a 64-bit integer."""
    return values_of(kind).map(lambda event: kind(T0, *[getattr(event, f.name) for f in fields(kind)][1:]))


@pytest.fixture
def path(tmp_path):
    """Where the journal lies."""
    return tmp_path / "state" / "journal.sqlite"


def opened(path, **more):
    """Our own journal."""
    return Journal(path, DOMAIN, PROVIDER.address, **more)


def scanned(number):
    """A small event with a number in it."""
    return ev.BlocksScanned(T0 + number, number, number.to_bytes(32, "big"))


@pytest.mark.parametrize("kind", ev.KINDS.values(), ids=ev.KINDS)
def test_every_event_comes_back_as_it_was(kind, path):
    """A field that changes on the disk is money or a register that changes over a restart."""
    journal = opened(path)

    @settings(
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=15
    )
    @given(event_of(kind))
    def there_and_back(event):
        journal.append(event)
        seq = len(journal)
        row = journal._rows.db.execute(
            "SELECT seq, at_s, kind, body, crc FROM events WHERE seq = ?", (seq,)
        ).fetchone()
        assert journal._rows.fact(ev.KINDS, row) == event

    there_and_back()
    journal.close()


def test_replay_is_the_live_book(path):
    """A whole evening through the real file."""
    journal = opened(path)
    story = (delivering(signing=True).passes(60) >> stops()).passes(25)
    for event in story.journal.events:
        journal.append(event)
    journal.close()
    again = opened(path)
    assert again.replay() == story.book
    assert list(again.events()) == story.journal.events
    again.close()


def test_a_story_may_be_told_on_the_real_journal(path):
    """The list in story.py must not be kinder than the disk."""
    journal = opened(path)
    story = matched(journal=typing.cast("ListJournal", journal))
    _ = story >> ev.TokenPresented(story.at_s, TERMS.session_id, presentation())
    assert story.restarts().book == journal.replay()
    assert story.live.life == len(journal) > 0
    journal.close()


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_writer import opened, scanned
journal = opened(Path(sys.argv[1]))
for number in range(1, 1_000_000):
    journal.append(scanned(number))
    print(number, flush=True)
"""


def writer(path, tmp_path):
    """Another process that appends for ever and says each number once it is on disk."""
    helper = (
        "from agent.core import events as ev\n"
        "from agent.core.token import Domain\n"
        "from agent.journal import Journal\n"
        f"def opened(path): return Journal(path, Domain({DOMAIN.chain_id}, {DOMAIN.contract!r}), {PROVIDER.address!r})\n"
        f"def scanned(n): return ev.BlocksScanned({T0} + n, n, n.to_bytes(32, 'big'))\n"
    )
    (tmp_path / "test_writer.py").write_text(helper)
    command = [sys.executable, "-c", WRITER, str(path), str(tmp_path)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def read_number(process):
    """The next number it says, with a bounded wait."""
    ready, _, _ = select.select([process.stdout], [], [], 20)
    assert ready, "the writer is stuck"
    return int(process.stdout.readline())


@pytest.mark.parametrize("rows", [1, 40, 300])
def test_kill_9_loses_nothing_that_was_acknowledged(path, tmp_path, rows):
    """The consumer was told `ack`: whatever happens to us, the receipt is there."""
    process = writer(path, tmp_path)
    said = 0
    while said < rows:
        said = read_number(process)
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=20)
    said = max([said, *(int(line) for line in rest.split() if line.isdigit())])
    journal = opened(path)
    numbers = [event.block_number for event in journal.events()]
    journal.close()
    assert numbers == list(range(1, len(numbers) + 1)), "in order and without holes"
    assert len(numbers) >= said


def test_a_reader_needs_no_lock_and_sees_whole_rows_while_the_writer_runs(path, tmp_path):
    """`v2v status` must never stop the daemon, nor be stopped by it."""
    process = writer(path, tmp_path)
    try:
        first = read_number(process)
        reader = opened(path, read_only=True)
        counts = []
        for _ in range(5):
            read_number(process)
            counts.append(len(list(reader.events())))
        assert counts == sorted(counts)
        assert counts[0] >= first
        with pytest.raises(Unwritable, match="readonly"):
            reader.append(scanned(1))
        reader.close()
    finally:
        process.kill()
        process.communicate(timeout=20)


def test_a_second_daemon_is_locked_out_and_told_what_to_do(path):
    """Two daemons on one journal would sell the same energy twice."""
    first = opened(path)
    with pytest.raises(Misconfigured, match="another agent") as caught:
        opened(path)
    assert "systemctl stop" in caught.value.remedy
    first.close()
    opened(path).close()


def test_a_dead_daemons_lock_is_no_lock(path, tmp_path):
    """After a power cut nobody is there to remove a lock file."""
    process = writer(path, tmp_path)
    read_number(process)
    with pytest.raises(Misconfigured, match="another agent"):
        opened(path)
    process.kill()
    process.communicate(timeout=20)
    opened(path).close()


FOREIGN = {
    "chain_id": (Domain(1, DOMAIN.contract), PROVIDER.address),
    "contract": (Domain(DOMAIN.chain_id, b"\x01" * 20), PROVIDER.address),
    "provider": (DOMAIN, b"\x02" * 20),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_a_foreign_journal_is_refused_and_left_alone(path, what):
    """Another chain, contract or car: its sessions are not ours to settle."""
    opened(path).close()
    domain, provider = FOREIGN[what]
    for read_only in (False, True):
        with pytest.raises(Misconfigured, match=what):
            Journal(path, domain, provider, read_only=read_only)
    opened(path).close()


def test_a_newer_schema_is_refused(path):
    """A downgrade must not guess what its successor wrote."""
    opened(path).close()
    with sqlite3.connect(path) as db:
        db.execute("UPDATE identity SET value = '2' WHERE key = 'schema'")
    db.close()
    with pytest.raises(Misconfigured, match="schema 2"):
        opened(path)


UNREADABLE = {
    "an unknown kind": ("EnergyTeleported", "{}"),
    "no JSON": ("SessionLapsed", "{"),
    "no object": ("SessionLapsed", "[]"),
    "a missing field": ("SessionLapsed", '{"at_s":5}'),
    "a field too many": ("PortUnlocked", '{"at_s":5,"port":"a","by":"me"}'),
    "text for a number": ("PortUnlocked", '{"at_s":"5","port":"a"}'),
    "a number for text": ("PortUnlocked", '{"at_s":5,"port":7}'),
    "a number for bytes": ("SessionLapsed", '{"at_s":5,"session_id":7}'),
    "no hex": ("SessionLapsed", '{"at_s":5,"session_id":"0xzz"}'),
    "an unknown reason": (
        "StopDecided",
        '{"at_s":5,"session_id":"0x00","stop_reason":"Boredom","detail":""}',
    ),
    "an unknown moment": ("MeterRecordSigned", '{"at_s":5,"session_id":"0x00","moment":"noon","ocmf":""}'),
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_row_that_cannot_be_read_is_named_and_nothing_is_guessed(path, what):
    """Skipping it would forget a receipt; the human needs its number, and must not delete the file."""
    journal = opened(path)
    journal.append(scanned(1))
    kind, body = UNREADABLE[what]
    row = (2, 5, kind, body)
    journal._rows.db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", (*row, checksum(*row)))
    with pytest.raises(Misconfigured, match="row 2 ") as caught:
        journal.replay()
    assert "do not delete" in caught.value.remedy
    journal.close()


def test_a_torn_tail_of_the_log_costs_only_what_was_not_acknowledged(path, tmp_path):
    """A power cut in the middle of a write leaves half a frame: SQLite drops it and keeps all before."""
    journal = opened(path)
    for number in range(1, 21):
        journal.append(scanned(number))
    before_last = path.with_name(path.name + "-wal").stat().st_size
    journal.append(scanned(21))
    copy = tmp_path / "copy" / path.name
    copy.parent.mkdir()
    shutil.copy(path, copy)
    shutil.copy(f"{path}-wal", f"{copy}-wal")
    journal.close()
    with copy.with_name(f"{copy.name}-wal").open("r+b") as wal:
        wal.truncate(before_last + 100)
    torn = opened(copy)
    assert [event.block_number for event in torn.events()] == list(range(1, 21))
    torn.append(scanned(22))
    torn.close()


def test_a_file_that_is_no_database_is_named(path):
    """Somebody pointed [journal] path at a photo; it must survive that."""
    path.parent.mkdir()
    path.write_bytes(b"GIF89a" * 500)
    with pytest.raises(Misconfigured, match="cannot be opened"):
        opened(path)
    assert path.read_bytes().startswith(b"GIF89a")
    with pytest.raises(Misconfigured, match="cannot be opened"):
        opened(path.with_name("missing"), read_only=True)


def test_a_half_opened_journal_holds_no_lock(path):
    """Whoever corrects the configuration and starts again must not meet his own ghost."""
    opened(path).close()
    with pytest.raises(Misconfigured):
        Journal(path, Domain(1, DOMAIN.contract), PROVIDER.address)
    opened(path).close()


def test_nobody_else_may_read_the_journal_or_its_side_files(path):
    """It holds signatures and who charged when; SQLite's -wal takes over the file's mode at its birth."""
    before = os.umask(0o022)
    try:
        journal = opened(path)
        journal.append(scanned(1))
        modes = {
            p.name: stat.S_IMODE(p.stat().st_mode) for p in path.parent.iterdir() if "lock" not in p.name
        }
        assert set(modes) == {path.name, f"{path.name}-wal", f"{path.name}-shm"}
        assert set(modes.values()) == {0o600}
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        journal.close()
    finally:
        os.umask(before)


def test_every_row_is_written_through_to_the_disk(path):
    """WAL with synchronous FULL: NORMAL would acknowledge receipts that a power cut forgets."""
    journal = opened(path)
    assert journal._rows.db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert journal._rows.db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert not journal._rows.db.in_transaction
    journal.append(scanned(1))
    assert not journal._rows.db.in_transaction
    journal.close()


def test_an_event_that_is_far_too_long_is_our_own_mistake(path):
    """A stranger who could make rows as long as he likes could fill the disk."""
    journal = opened(path)
    with pytest.raises(AssertionError):
        journal.append(ev.MeterRecordSigned(T0, TERMS.session_id, "end", "x" * BODY_LENGTH_MAX))
    assert len(journal) == 0
    journal.close()
