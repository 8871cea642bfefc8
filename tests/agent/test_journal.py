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
from story import (
    DOMAIN,
    PORT,
    PROVIDER,
    T0,
    TERMS,
    ListJournal,
    Story,
    believed,
    connect,
    delivering,
    ended,
    ended_believed,
    final,
    head,
    matched,
    passes,
    presentation,
    presents,
    records,
    seen,
    settles,
    stops,
)

from agent.core import events as ev
from agent.core.book import FOLD_AFTER_S, folded, step
from agent.core.session import Stage
from agent.core.token import Domain
from agent.errors import Misconfigured
from agent.journal import Journal
from agent.rows import BODY_LENGTH_MAX, Unwritable, checksum

LENGTHS = {"Address": 20, "Token": 32, "SessionId": 32, "TxHash": 32, "BlockHash": 32, "BidId": 32}


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


# ---- one evening after the other


def evening(nonce, *, settled_wh=20, seen_open=True):
    """One whole session of 20 Wh, `nonce` days after the first: its events, ended SETTLED (or STRANDED when underpaid)."""
    day_s = nonce * 86_400
    terms = connect(nonce, order_wh=20, issued_at_s=T0 + day_s)
    story = Story(chain_ahead_s=T0 + day_s - 5_000, signing=True) >> head() >> seen(terms) >> believed(terms)
    story = story >> passes(2) >> presents(terms) >> records() >> final(terms)
    story.outlet.welded = not seen_open
    story.passes(60)
    story = story >> records() >> settles() >> ended(settled_wh) >> ended_believed()
    assert story.stage is (Stage.SETTLED if settled_wh == 20 else Stage.STRANDED)
    return [ev.BlocksScanned(T0 + day_s, nonce, nonce.to_bytes(32, "big")), *story.journal.events]


def lived(path, *evenings):
    """A journal with these evenings, open."""
    journal = opened(path)
    for events in evenings:
        for event in events:
            journal.append(event)
    return journal


def compacted(journal, days):
    """Fold, `days` after the first evening. What was live before: (book, rows)."""
    before, rows = journal.replay(), journal.row_count
    fold = folded(before, T0 + days * 86_400)
    journal.compact(fold, step(before, fold))
    return before, rows


def test_an_ordinary_session_takes_twenty_rows_and_one_for_each_receipt(path):
    """Every row is an fsync while somebody waits, and is read again at every start."""
    events = evening(1)
    receipts = [event for event in events if isinstance(event, ev.ReceiptCredited)]
    assert len(receipts) >= 10
    assert len(events) - len(receipts) <= 20
    journal = lived(path, events)
    assert len(journal) == len(events)
    journal.close()


def test_old_sessions_leave_the_book_and_stay_in_the_history_to_the_letter(path):
    """After ten years a start must be quick, and every receipt that ever paid must still be there."""
    evenings = [evening(nonce) for nonce in range(1, 8)]
    journal = lived(path, *evenings)
    newest = len(journal)
    before, rows = compacted(journal, days=9)
    book = journal.replay()
    ids = list(before.sessions)
    assert list(book.sessions) == [], "all seven are closed for more than a day"
    assert journal.row_count == 1 < rows
    assert len(journal) == newest + 1, "sequence numbers, and so lives, go on"
    assert (book.records_signed, book.scanned_number, book.at_s >= before.at_s) == (14, 7, True)
    assert journal.sessions_folded(3) == ids[:-4:-1]
    assert journal.sessions_all() == ids
    for session_id, events in zip(ids, evenings, strict=True):
        assert journal.events_of(session_id) == events[1:], "all but the scan cursor"
        assert journal.session(session_id) == before.sessions[session_id]
    journal.close()
    again = opened(path)
    assert again.replay() == book
    again.close()


def test_young_sessions_stay_and_the_next_evening_goes_on(path):
    """A consumer who comes back an hour later still gets his `final` from the book."""
    journal = lived(path, *(evening(nonce) for nonce in (1, 2, 3)))
    before, _ = compacted(journal, days=4)
    (young,) = journal.replay().sessions.values()
    assert young == before.sessions[young.session_id]
    for event in evening(9):
        journal.append(event)
    book = journal.replay()
    assert [one.terms.auction_nonce for one in book.sessions.values()] == [3, 9]
    compacted(journal, days=11)
    assert journal.replay().sessions == {}
    assert len(journal.sessions_all()) == 4
    journal.close()


def test_what_is_stranded_stays_until_a_human_has_seen_it(path):
    """It is money that somebody owes us; folding it away would make the page quiet."""
    journal = lived(path, evening(1, settled_wh=3), evening(2))
    compacted(journal, days=9)
    assert [one.stage for one in journal.replay().sessions.values()] == [Stage.STRANDED]
    journal.close()


def test_a_locked_port_stays_locked_and_an_unlocked_one_unlocked(path):
    """The lock-out is a fact of a session's rows: moving them must neither open the port nor lock it again."""
    events = evening(1, seen_open=False)
    journal = lived(path, events)
    assert journal.replay().locked_ports.keys() == {PORT}
    compacted(journal, days=9)
    assert journal.replay().locked_ports.keys() == {PORT}
    journal.append(ev.PortUnlocked(T0 + 9 * 86_400, PORT))
    for event in evening(10):
        journal.append(event)
    compacted(journal, days=12)
    book = journal.replay()
    assert (book.locked_ports, book.sessions) == ({}, {})
    journal.close()


def test_a_port_locked_without_a_session_stays_locked_through_the_folding(path):
    """Would catch a lock-out that housekeeping forgets: it belongs to no session that could be kept."""
    journal = lived(path, [*evening(1), ev.PortLocked(T0 + 5, PORT)])
    compacted(journal, days=9)
    assert journal.replay().locked_ports.keys() == {PORT}
    journal.close()


def test_nothing_is_folded_while_anything_is_open_or_awaited():
    """Compaction takes milliseconds that belong to somebody's kWh, and a pending session's rows are needed."""
    assert folded(delivering().book, T0 + 10 * FOLD_AFTER_S) is None
    assert folded((Story() >> head() >> seen()).book, T0 + 10 * FOLD_AFTER_S) is None


def test_a_session_is_not_folded_before_both_its_records_are_signed(path):
    """The end record is the evidence; it may be signed after the chain has paid."""
    events = [event for event in evening(1) if getattr(event, "moment", "") != "end"]
    journal = lived(path, events)
    compacted(journal, days=9)
    assert len(journal.replay().sessions) == 1
    journal.close()


def test_a_power_cut_in_the_middle_of_folding_leaves_everything_as_it_was(path):
    """The rows are moved in one transaction: a session is in one of the two tables, never in none."""
    journal = lived(path, evening(1), evening(2))
    before, rows = journal.replay(), list(journal.events())
    fold = folded(before, T0 + 9 * 86_400)
    wrong = step(step(before, fold), ev.PortUnlocked(T0, PORT))
    wrong = type(wrong)(wrong.domain, wrong.provider, at_s=1)
    with pytest.raises(AssertionError, match="same book"):
        journal.compact(fold, wrong)
    assert list(journal.events()) == rows
    assert journal.sessions_folded(9) == []
    journal.append(scanned(99))
    assert len(journal) == len(rows) + 1
    journal.close()
    script = (
        "import os, sys\nfrom pathlib import Path\n"
        "sys.path[:0] = sys.argv[2:]\n"
        "from test_journal_story import opened\n"
        "from agent.core.book import folded, step\n"
        "journal = opened(Path(sys.argv[1]))\nbook = journal.replay()\n"
        f"fold = folded(book, {T0 + 9 * 86_400})\n"
        "replay = journal.replay\n"
        "journal.replay = lambda: os.kill(os.getpid(), 9)\n"
        "journal.compact(fold, step(book, fold))\n"
    )
    helper = path.parent / "test_journal_story.py"
    helper.write_text(
        "from agent.core.token import Domain\nfrom agent.journal import Journal\n"
        f"def opened(path): return Journal(path, Domain({DOMAIN.chain_id}, {DOMAIN.contract!r}), {PROVIDER.address!r})\n"
    )
    command = [sys.executable, "-c", script, str(path), str(path.parent)]
    assert subprocess.run(command, check=False, timeout=30).returncode == -signal.SIGKILL
    again = opened(path)
    assert list(again.events()) == [*rows, scanned(99)]
    assert again.sessions_folded(9) == []
    again.close()


def test_a_full_disk_while_folding_loses_nothing(path):
    """History needs room before the live rows give theirs back."""
    journal = lived(path, *(evening(nonce) for nonce in range(1, 6)))
    rows = list(journal.events())
    (pages,) = journal._rows.db.execute("PRAGMA page_count").fetchone()
    journal._rows.db.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(Unwritable, match="full"):
        compacted(journal, days=9)
    journal.close()
    again = opened(path)
    assert list(again.events()) == rows
    again.close()


def test_a_connect_that_comes_back_after_its_session_was_folded_gets_no_power():
    """A node that serves the old block again: the book has forgotten the session, its token has expired long ago."""
    story = Story() >> head() >> seen() >> believed()
    story.leaps(3 * 86_400)
    story = story >> head() >> presents() >> passes(5)
    assert story.stage is Stage.SETTLING
    assert story.session.energy_wh_delivered == 0


def many_old(path, count):
    """A journal with this many old sessions in its history, all the same evening but for their names."""
    journal = lived(path, evening(1))
    compacted(journal, days=9)
    db = journal._rows.db
    db.execute("BEGIN")
    (rows, first) = db.execute("SELECT COUNT(*), MIN(seq) FROM history").fetchone()
    numbers = f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count - 1})"  # noqa: S608 - numbers of ours
    copies = f"-(i * {rows} + seq - {first}), printf('0x%064x', i), at_s, kind, body, crc"
    db.execute(f"{numbers} INSERT INTO history SELECT {copies} FROM n, history WHERE seq > 0")  # noqa: S608
    db.execute("COMMIT")
    return journal


@pytest.mark.parametrize(
    "count", [2_000, pytest.param(100_000, marks=[pytest.mark.long, pytest.mark.timeout(600)])]
)
def test_a_start_does_not_know_how_many_sessions_there_were(path, count):
    """A start that reads every session of ten years would keep the power off for minutes after each update."""
    many_old(path, count).close()
    journal = opened(path)
    assert journal.row_count == 1
    assert journal.replay().sessions == {}
    assert len(journal.sessions_folded(32)) == 32
    (total,) = journal._rows.db.execute("SELECT COUNT(DISTINCT session) FROM history").fetchone()
    assert total == count
    journal.close()
