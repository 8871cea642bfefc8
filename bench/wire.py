"""The strict wire beside raw pymodbus and libmodbus, against one libmodbus slave, in one run.

* reads: four holding registers, again and again; rate, p50 and p99. The peer is pymodbus as it comes, which checks less;
  on RTU it keeps the same silence between frames, as anybody must. The floor is libmodbus, C that blocks.
* processor: what a hundred reads a second take of one core.
* paced line: the same on a line that carries bytes at 9600, 19200 and 115200 baud (8N2), as a part of what the line
  itself allows: characters, and 3.5 characters of silence before and after the answer. The floor is libmodbus spinning
  through the silences: what is missing there is the line's own doing, which is a process as well, and hears of a byte only
  after two others have run. At 115200 also a short read and the longest; judged is the hot block, which is what a charger
  is asked for in every beat (energy and power: BRIDGE rule 13; 1 to 9 registers in the maps of serial devices).
* control beat: keep-alive written and four registers read, 10 times a second on TCP, 4 times on RTU at 19200, for some
  ports at once. Lateness: when the beat was done, less when it was due and what the line itself needs. The floor is a
  process beside it: on TCP it only sleeps until the same instants, on RTU it does the same as one port, with libmodbus on a
  line of its own. What it is late, the machine is. For the greatest and the smallest of them once more where nobody can push
  us aside (SCHED_FIFO), if we may.

Needs libmodbus5; says so and gives no rows without it.
"""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from pymodbus.client import AsyncModbusSerialClient, AsyncModbusTcpClient

from bench import Row, _libmodbus, _line, _sleeper
from firmware_bridge.modbus import Bus, Timing, parse_wire

WORDS = 4  # the hot block
WORDS_SHORT, WORDS_LONGEST = 2, 125
QUESTION_CHARACTERS, ACK_CHARACTERS = 8, 8
TIMING = Timing(request_timeout_ms=2_000, turnaround_ms=0)
GOAL_OF_PEER, GOAL_OF_LINE, GOAL_LATENESS_MS = 0.8, 0.95, 5.0
PORTS_TCP, PORTS_RTU = (1, 8, 32), (1, 4)
BAUDS = (9_600, 19_200, 115_200)
FIFO_PRIORITY = 5


class Contestant(Protocol):
    """Somebody who can read registers."""

    async def open(self) -> None:
        """Take the wire."""

    async def read(self, words: int = WORDS) -> None:
        """Read so many registers; an assertion fails if they are wrong."""

    async def close(self) -> None:
        """Give the wire back."""


def _is_right(found: Sequence[int], words: int) -> bool:
    return list(found) == list(range(_libmodbus.OFFSET, _libmodbus.OFFSET + words))


def answer_characters(words: int) -> int:
    """Characters of an answer with so many registers."""
    return 5 + 2 * words


class Ours:
    """The strict class."""

    def __init__(self, wire: str) -> None:
        self.bus = Bus(parse_wire(wire), TIMING)

    async def open(self) -> None:
        """Take the wire."""
        await self.bus.open()

    async def read(self, words: int = WORDS) -> None:
        """One strict read."""
        assert _is_right(await self.bus.read(1, 3, 0, words), words)

    async def close(self) -> None:
        """Give the wire back."""
        await self.bus.close()


class Pymodbus:
    """The library as it comes; on RTU with the silence between frames that it leaves to its user."""

    def __init__(self, wire: str) -> None:
        self._wire = parse_wire(wire)

    async def open(self) -> None:
        """Take the wire."""
        wire = self._wire
        self._client: AsyncModbusTcpClient | AsyncModbusSerialClient
        if wire.kind == "tcp":
            self._client = AsyncModbusTcpClient(wire.host, port=wire.port, timeout=2, retries=0)
        else:
            self._client = AsyncModbusSerialClient(
                wire.path, baudrate=wire.baud, stopbits=wire.stop_bits, timeout=2, retries=0
            )
        assert await self._client.connect()

    async def read(self, words: int = WORDS) -> None:
        """One read, and the silence after it."""
        answer = await self._client.read_holding_registers(0, count=words, device_id=1)
        assert _is_right(answer.registers, words)
        if gap_s := self._wire.character_gap_s:
            await asyncio.sleep(gap_s)

    async def close(self) -> None:
        """Give the wire back."""
        self._client.close()
        await asyncio.sleep(0)


class Libmodbus:
    """C that blocks. It keeps no silence between frames, unless told to; then it spins."""

    def __init__(self, *words: str, gap_s: float = 0.0) -> None:
        self._words = words
        self._gap_s = gap_s

    async def open(self) -> None:
        """Take the wire."""
        self._master = _libmodbus.Master(*self._words)

    async def read(self, words: int = WORDS) -> None:
        """One read; nothing else runs meanwhile."""
        assert _is_right(self._master.read(0, words), words)
        until_s = time.monotonic() + self._gap_s
        while time.monotonic() < until_s:
            pass

    async def close(self) -> None:
        """Give the wire back."""
        self._master.close()


@dataclass(frozen=True, slots=True)
class Figures:
    """What one contestant did."""

    reads_per_s: float
    p50_us: float
    p99_us: float


async def contest(
    contestants: Sequence[Contestant], batches: int, reads: int, words: int = WORDS
) -> list[Figures]:
    """Each in turn takes the wire and reads `reads` times, `batches` times over: what disturbs one disturbs all."""
    taken_us: list[list[float]] = [[] for _ in contestants]
    rates: list[list[float]] = [[] for _ in contestants]
    for batch in range(batches + 1):
        for contestant, times, rate in zip(contestants, taken_us, rates, strict=True):
            await contestant.open()
            await contestant.read(words)
            one_by_one = []
            began_ns = last_ns = time.perf_counter_ns()
            for _ in range(reads):
                await contestant.read(words)
                one_by_one.append(((now_ns := time.perf_counter_ns()) - last_ns) / 1000)
                last_ns = now_ns
            await contestant.close()
            if batch:  # the first one warms up
                times.extend(one_by_one)
                rate.append(reads * 1e9 / (last_ns - began_ns))
    return [
        Figures(statistics.median(rate), _quantile(times, 0.5), _quantile(times, 0.99))
        for rate, times in zip(rates, taken_us, strict=True)
    ]


def _quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(part * len(values)))]


def rows(runs: int) -> list[Row]:
    """Rates and waits on TCP and RTU, processor time, three paced lines, and the control beat."""
    if _libmodbus.library() is None:
        sys.stderr.write("bench wire: libmodbus is not installed: apt-get install libmodbus5\n")
        return []
    gc.freeze()  # as the daemon does once it runs: what stays is not looked through again and again
    try:
        with tempfile.TemporaryDirectory(prefix="v2v-bench-") as folder:
            return asyncio.run(_all(runs, Path(folder)))
    finally:
        gc.unfreeze()


async def _all(runs: int, folder: Path) -> list[Row]:
    found = []
    for kind in ("tcp", "rtu"):
        async with _wire(kind, 0, folder) as contestants:
            found += _read_rows(kind, await contest(contestants, runs, 100 if kind == "tcp" else 25), runs)
            found.append(await _processor_row(kind, contestants[:2], max(1, runs // 10)))
    for baud in BAUDS:
        async with _wire("rtu", baud, folder) as contestants:
            for words in (WORDS, WORDS_SHORT, WORDS_LONGEST) if baud == BAUDS[-1] else (WORDS,):
                reads = 5 if words == WORDS_LONGEST else 20
                figures = await contest(contestants, max(2, runs // 10), reads, words)
                found.append(_paced_row(baud, words, figures))
    for ports in PORTS_TCP:
        found += await _beat_rows("tcp", ports, folder, seconds=runs / 3)
    for ports in PORTS_RTU:
        found += await _beat_rows("rtu", ports, folder, seconds=runs)
    with _undisturbed() as possible:
        if possible:
            found += await _beat_rows("tcp", PORTS_TCP[-1], folder, seconds=runs / 3, judged=False)
            found += await _beat_rows("rtu", PORTS_RTU[0], folder, seconds=runs / 3, judged=False)
    return found


@asynccontextmanager
async def _wire(kind: str, baud: int, folder: Path) -> AsyncIterator[list[Contestant]]:
    """The contestants, and a slave for them while the block lasts."""
    with ExitStack() as stack:
        if kind == "tcp":
            port = str(_free_port())
            stack.enter_context(_libmodbus.slave("tcp", port))
            wire: str = f"tcp://127.0.0.1:{port}"
            words: tuple[str, ...] = ("tcp", port)
        else:
            wire, words = _serial(stack, baud, folder, 1)[0]
        yield [Ours(wire), Pymodbus(wire), Libmodbus(*words, gap_s=_line.gap_s(baud))]


def _serial(stack: ExitStack, baud: int, folder: Path, count: int) -> list[tuple[str, tuple[str, ...]]]:
    """So many serial lines with a slave each: our wire, and libmodbus' words for it."""
    links = [folder / f"{side}{at}" for at in range(count) for side in ("master", "slave")]
    stack.enter_context(_line.lines(baud, *links))
    named = str(baud or BAUDS[-1])
    for link in links[1::2]:
        stack.enter_context(_libmodbus.slave("rtu", str(link), named))
    return [(f"rtu://{link}?baud={named}&stop_bits=2", ("rtu", str(link), named)) for link in links[::2]]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


# ---- reads


def _read_rows(kind: str, figures: Sequence[Figures], runs: int) -> list[Row]:
    ours, peer, floor = figures
    where = "TCP" if kind == "tcp" else "RTU on a pty"
    peer_name = "raw pymodbus" if kind == "tcp" else "raw pymodbus, same gap"
    found = [
        Row(
            bench="wire",
            metric=f"{where}: reads a second",
            unit="1/s",
            ours=ours.reads_per_s,
            goal=f">= {GOAL_OF_PEER:g} x peer",
            met=ours.reads_per_s >= GOAL_OF_PEER * peer.reads_per_s,
            runs=runs,
            peer=peer.reads_per_s,
            peer_name=peer_name,
            floor=floor.reads_per_s,
            floor_name="libmodbus, C",
        )
    ]
    for name in ("p50_us", "p99_us"):
        found.append(  # noqa: PERF401 - a row is read line by line
            Row(
                bench="wire",
                metric=f"{where}: one read, {name[:3]}",
                unit="us",
                ours=getattr(ours, name),
                goal="shown only",
                met=True,
                runs=runs,
                peer=getattr(peer, name),
                peer_name=peer_name,
                floor=getattr(floor, name),
                floor_name="libmodbus, C",
            )
        )
    return found


async def _processor_row(kind: str, contestants: Sequence[Contestant], seconds: int) -> Row:
    """A hundred reads a second, for so many seconds each, one second at a time."""
    used_s: list[list[float]] = [[] for _ in contestants]
    for _ in range(seconds):
        for contestant, used in zip(contestants, used_s, strict=True):
            await contestant.open()
            loop = asyncio.get_running_loop()
            began_s, began_cpu_s = loop.time(), time.process_time()
            for number in range(100):
                await asyncio.sleep(began_s + number / 100 - loop.time())
                await contestant.read()
            used.append(time.process_time() - began_cpu_s)
            await contestant.close()
    ours, peer = (100 * statistics.median(used) for used in used_s)
    return Row(
        bench="wire",
        metric=f"{'TCP' if kind == 'tcp' else 'RTU on a pty'}: processor at 100 reads a second",
        unit="% of a core",
        ours=ours,
        goal="shown only",
        met=True,
        runs=seconds,
        peer=peer,
        peer_name="raw pymodbus",
    )


def line_s(baud: int, characters: int) -> float:
    """What the line itself needs for one exchange of so many characters, both silences included."""
    return characters * _line.character_s(baud) + 2 * _line.gap_s(baud)


def _paced_row(baud: int, words: int, figures: Sequence[Figures]) -> Row:
    """By the median exchange: a machine that stands still for a moment is no property of the wire."""
    needed_s = line_s(baud, QUESTION_CHARACTERS + answer_characters(words))
    ours, peer, floor = (100 * needed_s * 1e6 / figure.p50_us for figure in figures)
    what = f"{words} registers" + (", the hot block" if words == WORDS else "")
    judged = words == WORDS
    rate = f"{ours / needed_s / 100:.1f} of {1 / needed_s:.1f} reads a second"
    return Row(
        bench="wire",
        metric=f"paced line, {baud} baud, {what}: {rate}",
        unit="% of the line",
        ours=ours,
        goal=f">= {GOAL_OF_LINE:.0%}" if judged else "shown only",
        met=not judged or ours >= 100 * GOAL_OF_LINE,
        runs=1,
        peer=peer,
        peer_name="raw pymodbus, same gap",
        floor=floor,
        floor_name="libmodbus that spins",
    )


# ---- the control beat


@contextmanager
def _undisturbed() -> Iterator[bool]:
    """Nobody else runs while one of us wants to; False where we may not have that."""
    before, its_param = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(FIFO_PRIORITY))
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        os.sched_setscheduler(0, before, its_param)


async def _beat_rows(
    kind: str, ports: int, folder: Path, *, seconds: float, judged: bool = True
) -> list[Row]:
    beats_per_s, baud = (10, 0) if kind == "tcp" else (4, 19_200)
    beats = max(2, int(seconds * beats_per_s))
    line_itself_s = 0.0
    floor_line: tuple[object, ...] = ()
    with ExitStack() as stack:
        if kind == "tcp":
            port = str(_free_port())
            stack.enter_context(_libmodbus.slave("tcp", port))
            buses = [Ours(f"tcp://127.0.0.1:{port}").bus for _ in range(ports)]
        else:
            *ours, (_, (_, floor_path, _)) = _serial(stack, baud, folder, ports + 1)
            buses = [Ours(wire).bus for wire, _ in ours]
            both = ACK_CHARACTERS, answer_characters(WORDS)
            line_itself_s = sum(line_s(baud, QUESTION_CHARACTERS + answer) for answer in both)
            floor_line = (floor_path, baud, line_itself_s)
        async with AsyncExitStack() as opened:
            for bus in buses:
                await bus.open()
                opened.push_async_callback(bus.close)
            machine = stack.enter_context(_sleeper.beside(beats_per_s, beats, ports, *floor_line))
            began_s, began_cpu_s = time.monotonic(), time.process_time()
            late_ms, rate = await _beaten(buses, beats_per_s, beats, line_itself_s)
            processor = 100 * (time.process_time() - began_cpu_s) / (time.monotonic() - began_s)
        machine_ms = await asyncio.to_thread(machine)
    where = f"beat, {ports} port{'s' if ports > 1 else ''} on {'TCP' if kind == 'tcp' else 'RTU at 19200'}"
    if not judged:
        where += ", undisturbed (SCHED_FIFO)"
    p99_ms = _quantile(late_ms, 0.99)
    lateness = Row(
        bench="wire",
        metric=f"{where}: lateness p99 (p50 {_quantile(late_ms, 0.5):.2f} ms, {processor:.1f} % of a core)",
        unit="ms",
        ours=p99_ms,
        goal=f"<= {GOAL_LATENESS_MS:g} ms" if judged else "shown only",
        met=not judged or p99_ms <= GOAL_LATENESS_MS,
        runs=len(late_ms),
        floor=_quantile(machine_ms, 0.99),
        floor_name="libmodbus on a line beside it" if floor_line else "bare asyncio.sleep beside it",
    )
    if not judged:
        return [lateness]
    return [
        lateness,
        Row(
            bench="wire",
            metric=f"{where}: beats a second and port",
            unit="1/s",
            ours=rate,
            goal=f">= 0.98 x {beats_per_s}",
            met=rate >= 0.98 * beats_per_s,
            runs=len(late_ms),
        ),
    ]


async def _beaten(
    buses: Sequence[Bus], per_s: int, beats: int, line_itself_s: float
) -> tuple[list[float], float]:
    """Milliseconds each beat was late, and the slowest port's beats a second.

    The ports beat one after the other, as they do when they were started so.
    """
    loop = asyncio.get_running_loop()
    late_ms: list[float] = []
    rates: list[float] = []

    async def port(bus: Bus, first_s: float) -> None:
        for number in range(beats):
            due_s = first_s + number / per_s
            await asyncio.sleep(due_s - loop.time())
            await bus.write(1, 6, 5_000, [number & 1])
            assert _is_right(await bus.read(1, 3, 0, WORDS), WORDS)
            late_ms.append(1000 * (loop.time() - due_s - line_itself_s))
        rates.append(beats / (loop.time() - first_s + 1 / per_s - line_itself_s))

    began_s = loop.time() + 0.1
    await asyncio.gather(*(port(bus, began_s + at / per_s / len(buses)) for at, bus in enumerate(buses)))
    return late_ms, min(rates)
