"""The table of facts under both journals: what a disk can do to it, and what it then says."""

import os
import shutil
import sqlite3
import subprocess
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Literal, NewType

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import rows as room
from agent.errors import EXIT_MISCONFIGURED, EXIT_UNREACHABLE, Misconfigured, Transient
from agent.rows import Rows, Sort, Unwritable, decoded, encoded, owner_pid

SORT = Sort("facts", "the notebook", "we say", "mkdir", "somebody else has", "wait", "look", "keep")
Id = NewType("Id", bytes)


class Colour(Enum):
    """A closed choice."""

    RED = "red"
    BLUE = "blue"


@dataclass(frozen=True)
class Inner:
    """Something inside something."""

    identity: Id
    colour: Colour


@dataclass(frozen=True)
class Note:
    """One of everything that a fact may hold."""

    at_s: int
    text: str
    sure: bool
    inner: Inner
    maybe: bytes | None
    moment: Literal["begin", "end"]


KINDS = {"Note": Note}
NOTES = st.builds(
    Note,
    st.integers(0, 2**256),
    st.text(max_size=30),
    st.booleans(),
    st.builds(Inner, st.binary(max_size=40).map(Id), st.sampled_from(Colour)),
    st.none() | st.binary(max_size=40),
    st.sampled_from(["begin", "end"]),
)


def note(number=1, text="x"):
    """A small fact."""
    return Note(number, text, sure=True, inner=Inner(Id(b"\x01"), Colour.RED), maybe=None, moment="begin")


def opened(path, **more):
    """The notebook."""
    return Rows(path, SORT, {"schema": "1"}, **more)


def written(path, count, *, text="x" * 200):
    """A notebook with this many facts, closed."""
    table = opened(path)
    for number in range(1, count + 1):
        table.append(number, note(number, text))
    table.close()


def numbers(path):
    """Which facts a reader finds."""
    table = opened(path, read_only=True)
    found = [fact.at_s for fact in table.facts(KINDS)]
    table.close()
    return found


@given(NOTES)
def test_what_is_written_comes_back(fact):
    """Would catch a kind of value that JSON changes: big integers, bytes, text, choices, nothing."""
    assert decoded(Note, encoded(fact)) == fact


@pytest.mark.parametrize(
    "change",
    [
        {"sure": 1},
        {"at_s": "1"},
        {"at_s": True},
        {"maybe": "zz"},
        {"moment": "noon"},
        {"inner": None},
        {"more": 1},
    ],
    ids=str,
)
def test_what_is_not_exactly_that_kind_is_refused(change):
    """Would catch a guess: 1 for true, text for a number."""
    with pytest.raises((TypeError, ValueError, KeyError, AttributeError)):
        decoded(Note, encoded(note()) | change)


def test_a_float_is_never_written():
    """Would catch money or energy that is almost right."""
    with pytest.raises(AssertionError):
        encoded({"a": 0.5})


def test_the_lock_says_who_has_it_and_a_dead_owner_has_nothing(tmp_path):
    """`v2v provider stop` asks whom to tell; a stale number must never get a signal."""
    path = tmp_path / "rows.sqlite"
    assert owner_pid(path) is None
    table = opened(path)
    assert owner_pid(path) == os.getpid()
    with pytest.raises(Misconfigured, match="somebody else"):
        opened(path)
    assert owner_pid(path) == os.getpid(), "a refused second opening must not wipe the first one's name"
    table.close()
    assert owner_pid(path) is None
    assert (tmp_path / "rows.sqlite.lock").read_text() == str(os.getpid())


# ---- what disks do


@contextmanager
def mounted(folder, *options):
    """A real, small filesystem of its own; skips where we may not mount."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting needs root")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def filled(table):
    """Append until the disk refuses; how many were acknowledged."""
    count = 0
    with pytest.raises(Unwritable) as caught:  # noqa: PT012 - which one of them is what we ask
        while count < 100_000:
            table.append(count + 1, note(count + 1, "x" * 500))
            count += 1
    assert caught.value.exit_code == EXIT_UNREACHABLE, "systemd tries again: room may come back by itself"
    assert "safe" in caught.value.remedy
    return count


def test_a_disk_that_is_really_full_keeps_what_was_acknowledged(tmp_path):
    """ENOSPC on a real filesystem: the last row is refused, all before are there, and room lets it go on."""
    with mounted(tmp_path / "disk", "size=512k") as disk:
        path = disk / "rows.sqlite"
        table = opened(path)
        ballast = disk / "somebody-elses.log"
        ballast.write_bytes(b"x" * 200_000)
        count = filled(table)
        assert count > 10
        with pytest.raises(Unwritable, match="failed before"):
            table.append(1, note())
        table.close()
        ballast.unlink()
        assert numbers(path) == list(range(1, count + 1))
        again = opened(path)
        again.append(count + 1, note(count + 1))
        again.close()
        assert numbers(path) == list(range(1, count + 2))


def test_a_full_disk_at_the_start_is_waited_for_and_not_a_mistake(tmp_path):
    """Exit 78 would leave a sold kWh unsettled until a human comes; the log that filled the disk may rotate before."""
    with mounted(tmp_path / "disk", "size=256k") as disk:
        ballast = disk / "ballast"
        with ballast.open("wb", buffering=0) as file, suppress(OSError):
            while file.write(b"x" * 4096):
                pass
        with pytest.raises((Unwritable, Misconfigured)) as caught:
            opened(disk / "rows.sqlite")
        assert caught.value.exit_code == EXIT_UNREACHABLE
        ballast.unlink()
        opened(disk / "rows.sqlite").close()


def test_a_file_that_may_not_grow_behaves_like_a_full_disk(tmp_path):
    """The same without root: SQLite's own limit on pages."""
    path = tmp_path / "rows.sqlite"
    table = opened(path)
    table.db.execute("PRAGMA max_page_count = 20")
    count = filled(table)
    table.close()
    assert numbers(path) == list(range(1, count + 1))


def test_a_fault_of_the_disk_is_nothing_that_a_runner_may_wait_out():
    """Would catch `except Transient` around a send going on with a book that the disk does not know."""
    assert not issubclass(Unwritable, Transient)


def test_a_read_only_disk_is_named_and_a_reader_still_reads(tmp_path):
    """A flash that gave up remounts itself read-only: the agent must not start, the owner must still see his sessions."""
    with mounted(tmp_path / "disk", "size=1m") as disk:
        path = disk / "rows.sqlite"
        written(path, 3)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(Misconfigured, match="cannot be written") as caught:
            opened(path)
        assert caught.value.exit_code == EXIT_MISCONFIGURED
        assert numbers(path) == [1, 2, 3]


def test_a_disk_that_turns_read_only_under_us_stops_us(tmp_path):
    """Would catch an acknowledgement after the filesystem has given up."""
    path = tmp_path / "rows.sqlite"
    table = opened(path)
    table.append(1, note())
    table.db.execute("PRAGMA query_only = 1")  # what SQLite then says is the same sentence
    with pytest.raises(Unwritable, match="readonly"):
        table.append(2, note(2))
    table.close()
    assert numbers(path) == [1]


def test_one_changed_letter_on_the_disk_is_found(tmp_path):
    """A flash cell that forgets changes a Wh into another without breaking SQLite's pages: the checksum tells."""
    path = tmp_path / "rows.sqlite"
    written(path, 5, text="delivered 1000")
    with sqlite3.connect(path) as db:
        db.execute("UPDATE facts SET body = replace(body, '1000', '9000') WHERE seq = 3")
    db.close()
    with pytest.raises(Misconfigured, match=r"row 3 .*checksum"):
        numbers(path)


def refusal(path):
    """What an opening that must fail says."""
    with pytest.raises(Misconfigured) as caught, closing(opened(path)) as table:
        list(table.facts(KINDS))
    return caught.value


def page_of(path, text):
    """Where on the disk this text stands: the number of its page."""
    return path.read_bytes().index(text) // 4096


@pytest.mark.parametrize("damage", ["zeroes", "noise", "half"])
def test_a_torn_page_is_found_and_never_read_as_something_else(tmp_path, damage):
    """A page half old, half new, of an elder part of the file: refused with the file kept, not skipped."""
    path = tmp_path / "rows.sqlite"
    written(path, 200, text="the-marker " * 20)
    page = page_of(path, b"the-marker")
    with path.open("r+b") as file:
        file.seek(page * 4096)
        old = file.read(4096)
        new = {"zeroes": bytes(4096), "noise": os.urandom(4096), "half": old[:2048] + bytes(2048)}[damage]
        file.seek(page * 4096)
        file.write(new)
    assert refusal(path).exit_code == EXIT_MISCONFIGURED


def test_a_page_that_was_torn_while_the_log_was_written_back_is_mended(tmp_path):
    """A power cut inside a checkpoint: the page is still in the log, so nothing is lost and nobody is asked."""
    path, copy = tmp_path / "rows.sqlite", tmp_path / "copy" / "rows.sqlite"
    table = opened(path)
    for number in range(1, 101):
        table.append(number, note(number, "the-marker " * 20))
    copy.parent.mkdir()
    shutil.copy(f"{path}-wal", f"{copy}-wal")
    table.db.execute("PRAGMA wal_checkpoint(PASSIVE)")
    shutil.copy(path, copy)
    table.close()
    with copy.open("r+b") as file:
        file.seek(page_of(copy, b"the-marker") * 4096)
        file.write(bytes(2048))
    assert numbers(copy) == list(range(1, 101))


@pytest.mark.parametrize("keep", [0.9, 0.5, 0.1])
def test_a_truncated_file_is_refused_and_kept(tmp_path, keep):
    """A copy that stopped half-way, or a filesystem check that cut: fewer sessions than there were is not a fresh start."""
    path = tmp_path / "rows.sqlite"
    written(path, 400)
    size = path.stat().st_size
    os.truncate(path, int(size * keep))
    refusal(path)
    assert path.stat().st_size == int(size * keep), "it is evidence: nobody may shorten or overwrite it"


def test_an_empty_file_where_a_journal_was_is_a_fresh_one(tmp_path):
    """`touch` before the first start is a habit; a journal with an owner inside is never taken for it."""
    path = tmp_path / "rows.sqlite"
    path.touch()
    opened(path).close()
    assert numbers(path) == []


def test_a_second_opening_half_way_through_gives_everything_back(tmp_path):
    """Would catch a ghost that keeps the lock after a refused start."""
    path = tmp_path / "rows.sqlite"
    opened(path).close()
    with pytest.raises(Misconfigured, match="schema 1, we say 2"):
        Rows(path, SORT, {"schema": "2"})
    opened(path).close()


def test_the_checksum_covers_the_whole_row():
    """Would catch two rows that change places, or a time that moves."""
    rows = {
        room.checksum(*row)
        for row in [(1, 2, "A", "b"), (2, 2, "A", "b"), (1, 3, "A", "b"), (1, 2, "B", "b")]
    }
    assert len(rows) == 4
