"""What it costs to remember a fact, and to start with a past.

* accept: one credited receipt through `engine.accept` (decide, write, swap, wake), with the journal's fsync and without. The
  floor of the first is a bare SQLite commit of a row as long, on the same disk, in the same run; of the second the same without
  fsync.
* start: open the journal and replay, with no past and with 100 000 old sessions in the history (about 1 GB, written first). The
  floor is opening the same file and reading its live rows with bare sqlite3.
* simulate: whole sessions of the whole agent, in storms, on every core. No floor: nobody else simulates this.

Events per second are 1e6 divided by the figure. The disk under the temporary directory is the one that is measured.
"""

from __future__ import annotations

import os
import re
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from agent.core import events as ev
from agent.core import token as rules
from agent.core.book import step
from agent.core.events import Event, Presentation, Terms
from agent.core.live import Policy
from agent.core.token import Ack, Domain
from agent.core.units import Address, BlockHash, Token, TxHash
from agent.engine import Engine
from agent.journal import Journal
from bench import Row, interleaved_us

DOMAIN = Domain(1337, Address(b"\x11" * 20))
PROVIDER, CONSUMER = Address(b"\x22" * 20), Address(b"\x33" * 20)
POLICY = Policy(max_unacked_wh={"left": 50})
T0 = 1_790_000_000
ORDER_WH = 10**9  # more receipts than any run asks for
OLD_SESSIONS = 100_000
GOAL_DURABLE, GOAL_QUICK, GOAL_START_MS = 3.0, 30.0, 250.0
GOAL_SIMULATED = 2_000 / 300  # sessions a second: what CI asks of two cores
STORMS_A_RUN = 2
SIMULATION_TIMEOUT_S = 1_800
DAY_S = 86_400


def rows(runs: int) -> list[Row]:
    """A receipt with and without fsync, a start with and without a past, sessions of the simulated world."""
    with tempfile.TemporaryDirectory(prefix="v2v-bench-") as folder:
        here = Path(folder)
        return [
            _accept(here / "durable.sqlite", runs * 10, durable=True),
            _accept(here / "quick.sqlite", runs * 10, durable=False),
            *_starts(here, runs),
            _simulated(runs * STORMS_A_RUN),
        ]


# ---- one fact


def _accept(path: Path, runs: int, *, durable: bool) -> Row:
    journal = _matched(Journal(path, DOMAIN, PROVIDER), nonce=1)
    engine = Engine(journal, POLICY, lambda: 0)
    session_id = next(iter(engine.book.sessions))
    receipts = (ev.ReceiptCredited(T0, session_id, wh, _ack(wh)) for wh in range(1, ORDER_WH))
    if not durable:
        _database(journal).execute("PRAGMA synchronous = OFF")

    def ours() -> None:
        assert engine.accept(next(receipts))

    with _bare(path.with_name(f"bare-{path.name}"), _longest(journal), durable=durable) as floor:
        ours_us, floor_us = interleaved_us([ours, floor], runs)
    journal.close()
    goal = GOAL_DURABLE if durable else GOAL_QUICK
    return Row(
        bench="core",
        metric=f"accept a receipt, {'on the disk' if durable else 'without fsync'} ({1e6 / ours_us:,.0f}/s)",
        unit="us",
        ours=ours_us,
        goal=f"<= {goal:g} x floor",
        met=ours_us <= goal * floor_us,
        runs=runs,
        floor=floor_us,
        floor_name=f"bare SQLite commit{'' if durable else ' without fsync'}",
    )


@contextmanager
def _bare(path: Path, body: str, *, durable: bool) -> Iterator[Callable[[], object]]:
    """A commit of one row as long as ours, in a file set up as ours."""
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode = WAL")
    db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'OFF'}")
    db.execute("CREATE TABLE rows(seq INTEGER PRIMARY KEY, at_s INTEGER, kind TEXT, body TEXT, crc INTEGER)")
    try:
        yield lambda: db.execute(
            "INSERT INTO rows(at_s, kind, body, crc) VALUES (?, ?, ?, ?)", (T0, "ReceiptCredited", body, 7)
        )
    finally:
        db.close()


def _longest(journal: Journal) -> str:
    """A receipt's row body: what the floor must write too."""
    session_id = next(iter(journal.replay().sessions))
    journal.append(ev.ReceiptCredited(T0, session_id, 0, _ack(0)))
    (body,) = _database(journal).execute("SELECT body FROM events ORDER BY seq DESC LIMIT 1").fetchone()
    return str(body)


def _database(journal: Journal) -> sqlite3.Connection:
    return journal._rows.db  # noqa: SLF001 - the bench looks under the floor


# ---- a start


def _starts(folder: Path, runs: int) -> list[Row]:
    young, old = folder / "young.sqlite", folder / "old.sqlite"
    _aged(young, 1).close()
    _multiplied(_aged(old, 1), OLD_SESSIONS).close()
    calls = [_start(young), _start(old), _bare_start(young), _bare_start(old)]
    young_us, old_us, young_floor_us, old_floor_us = interleaved_us(calls, runs)
    size_mb = old.stat().st_size / 1e6
    return [
        _start_row("no past", young_us, young_floor_us, runs),
        _start_row(f"{OLD_SESSIONS:,} old sessions, {size_mb:.0f} MB", old_us, old_floor_us, runs),
    ]


def _start(path: Path) -> Callable[[], None]:
    def start() -> None:
        journal = Journal(path, DOMAIN, PROVIDER)
        assert journal.replay().at_s > T0
        journal.close()

    return start


def _bare_start(path: Path) -> Callable[[], None]:
    def start() -> None:
        db = sqlite3.connect(path)
        assert db.execute("SELECT * FROM events").fetchall()
        db.close()

    return start


def _start_row(past: str, ours_us: float, floor_us: float, runs: int) -> Row:
    return Row(
        bench="core",
        metric=f"open and replay: {past}",
        unit="ms",
        ours=ours_us / 1000,
        goal=f"<= {GOAL_START_MS:g} ms",
        met=ours_us / 1000 <= GOAL_START_MS,
        runs=runs,
        floor=floor_us / 1000,
        floor_name="bare sqlite3 of the live rows",
    )


# ---- the simulated world


def _simulated(storms: int) -> Row:
    tests = Path(__file__).parents[1] / "tests"
    done = subprocess.run(
        [sys.executable, "-m", "simulation", "--seed", f"0..{storms - 1}"],
        env={**os.environ, "PYTHONPATH": str(tests)},
        capture_output=True,
        text=True,
        timeout=SIMULATION_TIMEOUT_S,
        check=True,
    )
    found = re.search(r"(\d+) sessions, (\d+) lives of the agent, .* (\d+) s: all promises kept", done.stdout)
    assert found is not None, done.stdout
    sessions, lives, seconds = (int(figure) for figure in found.groups())
    a_second = sessions / max(1, seconds)
    cores = len(os.sched_getaffinity(0))
    return Row(
        bench="core",
        metric=f"simulated sessions in storms ({sessions} with {lives} lives, {cores} cores)",
        unit="1/s",
        ours=a_second,
        goal=f">= {GOAL_SIMULATED:.1f}/s (2,000 in 5 minutes)",
        met=a_second >= GOAL_SIMULATED,
        runs=storms,
    )


# ---- a past


def _aged(path: Path, nonce: int) -> Journal:
    """A journal with one old session, folded."""
    journal = _matched(Journal(path, DOMAIN, PROVIDER), nonce)
    book = journal.replay()
    (session_id,) = book.sessions
    block = BlockHash(b"\x05" * 32)
    for event in (
        ev.StopDecided(T0, session_id, ev.StopReason.TIMEOUT, "the token's validity ends"),
        ev.SettlementSigned(T0, session_id, 0, 7, TxHash(b"\x07" * 32), b"\x02" * 600, 10**9, 10**8),
        ev.ConnectionEndedSeen(T0, session_id, 0, 0, TxHash(b"\x07" * 32), block),
        ev.ConnectionEndedBelieved(T0, session_id, block),
    ):
        journal.append(event)
    fold = ev.HistoryFolded(T0 + 9 * DAY_S, T0 + 8 * DAY_S, 0, 5, block)
    journal.compact(fold, step(journal.replay(), fold))
    assert journal.row_count == 1
    return journal


def _multiplied(journal: Journal, count: int) -> Journal:
    """The same history row by row under other names, until there are `count` sessions of it."""
    db = _database(journal)
    db.execute("BEGIN")
    per_session, first = db.execute("SELECT COUNT(*), MIN(seq) FROM history").fetchone()
    copies = f"-(i * {per_session} + seq - {first}), printf('0x%064x', i), at_s, kind, body, crc"
    db.execute(
        f"WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < {count - 1}) "  # noqa: S608 - our numbers
        f"INSERT INTO history SELECT {copies} FROM n, history WHERE seq > 0"
    )
    db.execute("COMMIT")
    return journal


def _matched(journal: Journal, nonce: int) -> Journal:
    """A journal in which one session is believed and its token presented."""
    valid_until_s = T0 + DAY_S
    token = rules.access_token(CONSUMER, PROVIDER, T0, valid_until_s)
    session_id = rules.session_id(DOMAIN.chain_id, DOMAIN.contract, CONSUMER, PROVIDER, nonce)
    block = BlockHash(b"\x04" * 32)
    terms = Terms(
        session_id, token, CONSUMER, PROVIDER, nonce, ORDER_WH, 10**15, 10**21, 10**21, T0, valid_until_s, 5, block, 1,
        TxHash(b"\x06" * 32),
    )  # fmt: skip
    given = Presentation(
        "phone", "left", "eip712", token, CONSUMER, ORDER_WH, valid_until_s, bytes(32), bytes(65), bytes(32)
    )
    story: tuple[Event, ...] = (
        ev.ConnectedSeen(T0, terms),
        ev.ConnectedBelieved(T0, session_id, block),
        ev.TokenPresented(T0, session_id, given),
    )
    for event in story:
        journal.append(event)
    return journal


def _ack(energy_wh: int) -> Ack:
    signature = energy_wh.to_bytes(65, "big")
    return Ack(Token(bytes(32)), CONSUMER, ORDER_WH, T0, bytes(32), bytes(65), signature)
