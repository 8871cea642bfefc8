"""The strict wire, as a table: every fault on TCP, RTU over TCP and RTU, on a poll and on a STOP.

Each row says how long the bus needed until all was well again (`-s` prints them; docs/wire.md keeps them). Whatever is
believed must be true, and a STOP counts only once it was read back.
"""

from __future__ import annotations

import asyncio
import gc
import random
import resource
from dataclasses import dataclass
from pathlib import Path

import pytest
from faulty_slave import FAULTS, FaultySlave

from firmware_bridge.charger import BridgeError
from firmware_bridge.modbus import Bus, Priority, Timing, parse_wire

KINDS = ("tcp", "rtu+tcp", "rtu")
SERIAL = ("rtu+tcp", "rtu")  # no transaction ids
TIMING = Timing(request_timeout_ms=250, turnaround_ms=0)
LIMIT, STOPPED = 200, 0
PATIENCE_S = 50  # no row needs 5 s on a quiet machine


@dataclass(frozen=True)
class Scenario:
    """What goes wrong. `faults` hit one request each, first of a poll, then of a STOP."""

    what: str
    faults: tuple[str, ...]
    kinds: tuple[str, ...] = KINDS
    same_shape: bool = False  # two polls that only their address tells apart
    spare: int = 0
    poll_before_stop: bool = (
        False  # the first fault hits a poll, and the STOP comes while that is on the wire
    )
    echoes: bool = False


ONLY_TCP, ONLY_SERIAL = ("wrong_tid", "zero_tid", "wrong_protocol"), ("bad_crc",)
# Without transaction ids nothing but its length tells such a reply from the right one: BRIDGE rule 2, `spare`.
BY_LENGTH = ("very_late", "twice")
# Until a read has shown that the adapter echoes, the echo of function 6 passes for its acknowledgement; not for a STOP, which
# is read back.
ECHOING = ("own words, no reply", "... and a silent device", "... and half a frame")


def scenarios() -> list[Scenario]:
    """The whole table."""
    rows = []
    for fault, what in FAULTS.items():
        kinds = ("tcp",) if fault in ONLY_TCP else SERIAL if fault in ONLY_SERIAL else KINDS
        kinds = tuple(kind for kind in kinds if (fault, kind) != ("half_open", "rtu"))
        rows.append(Scenario(what, (fault,), kinds, spare=3 if fault in BY_LENGTH else 0))
    rows += [Scenario(f"exception {code}", (f"exception_{code}",)) for code in (1, 2, 3, 4, 5, 6, 8, 10, 11)]
    rows += [
        Scenario("late reply of the same shape", ("late",), same_shape=True),
        Scenario("... after the quarantine", ("very_late",), same_shape=True, spare=3),
        Scenario("... repeated 20 ms later", ("twice",), same_shape=True, spare=3),
        Scenario("... in one frame with the true reply", ("merged_stale",), same_shape=True),
        Scenario("late read taken as ack of a STOP", ("late", "silence"), poll_before_stop=True),
        Scenario("... after the quarantine", ("very_late", "silence"), poll_before_stop=True),
        Scenario("three silences in a row", ("silence",) * 3),
        Scenario("two cables pulled in a row", ("unplug", "unplug")),
        Scenario("adapter with local echo", (), SERIAL, echoes=True),
        Scenario("... and a silent device", ("silence", "silence"), SERIAL, echoes=True),
        Scenario("... and half a frame", ("half",), SERIAL, echoes=True),
    ]
    return rows


@dataclass
class Row:
    """What came of one scenario on one kind of wire."""

    scenario: Scenario
    kind: str
    recovered_s: float = 0.0
    stopped_s: float = 0.0
    believed: int = 0
    wrong: int = 0
    false_acks: int = 0


class Story:
    """One bus against one slave; everything believed is held against the truth."""

    def __init__(self, slave: FaultySlave, bus: Bus, row: Row) -> None:
        self.slave, self.bus, self.row = slave, bus, row
        self.polls = [(3, 10, 2), (3, 50, 2)] if row.scenario.same_shape else [(3, 10, 2), (4, 50, 4)]

    async def read(self, fc: int, address: int, count: int, spare: int) -> bool:
        """True when a value was believed. A wrong one is counted."""
        try:
            seen = await self.bus.read(1, fc, address, count, spare=spare)
        except BridgeError:
            await asyncio.sleep(0.02)  # a port that is missing says so at once
            return False
        self.row.believed += 1
        self.row.wrong += seen != self.slave.holds(address, count)
        return True

    async def poll(self) -> bool:
        """Both polls at once, as two callers do."""
        return all(await asyncio.gather(*(self.read(*poll, self.row.scenario.spare) for poll in self.polls)))

    async def stop(self, fc: int) -> bool:
        """True when a STOP was written and then seen. The answer to the write alone is worth nothing."""
        try:
            await self.bus.write(1, fc, LIMIT, [STOPPED], priority=Priority.STOP)
        except BridgeError:
            return False
        self.row.false_acks += self.slave.holds(LIMIT) != (STOPPED,)
        try:
            seen = await self.bus.read(1, 3, LIMIT, 1, priority=Priority.STOP)
        except BridgeError:
            return False
        self.row.believed += 1
        self.row.wrong += seen != self.slave.holds(LIMIT)
        return seen == (STOPPED,)


async def until(done, what: object) -> float:
    """Seconds until `done()` says so; what goes on for longer than `PATIENCE_S` is a bus that does not come back."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while not await done():
        assert loop.time() - began_s < PATIENCE_S, f"the bus did not come back: {what}"
    return loop.time() - began_s


async def opens(bus: Bus) -> bool:
    """A hundred buses open at once, and on a slow machine the first one's time-out may be over before its turn comes."""
    try:
        await bus.open()
    except BridgeError:
        return False
    return True


async def live_through(scenario: Scenario, kind: str) -> Row:
    """The faults on a poll, then on a STOP by function 6, then on one by function 16."""
    row = Row(scenario, kind)
    async with FaultySlave(kind, echoes=scenario.echoes) as slave:
        bus = Bus(parse_wire(slave.wire), TIMING)
        await until(lambda: opens(bus), row)
        story = Story(slave, bus, row)
        try:
            if not scenario.echoes:
                await until(story.poll, row)
            slave.faults.extend(scenario.faults)
            row.recovered_s = await until(lambda: recovered(story), row)
            for fc in (6, 16):
                slave.written[LIMIT] = 16
                slave.faults.extend(scenario.faults)
                poll = asyncio.create_task(story.poll()) if scenario.poll_before_stop else None
                await asyncio.sleep(0)  # the poll is on the wire, or at least before the STOP
                row.stopped_s = max(row.stopped_s, await until(lambda fc=fc: story.stop(fc), row))
                assert slave.holds(LIMIT) == (STOPPED,), (
                    f"{kind}, {scenario.what}: a STOP was verified and is not true"
                )
                if poll is not None:
                    await poll
                slave.faults.clear()
                await until(story.poll, row)
        finally:
            await bus.close()
    return row


async def recovered(story: Story) -> bool:
    """True when all faults are used up and everything is read again."""
    return await story.poll() and not story.slave.faults


def table(rows: list[Row]) -> str:
    """As docs/wire.md shows it: seconds to recover, seconds to a verified STOP."""
    lines = [f"| {'what goes wrong':<42} | {' | '.join(f'{kind:<13}' for kind in KINDS)} |"]
    lines.append(f"|{'-' * 44}|{'|'.join('-' * 15 for _ in KINDS)}|")
    for scenario in {id(row.scenario): row.scenario for row in rows}.values():
        by_kind = {row.kind: row for row in rows if row.scenario is scenario}
        cells = [
            f"{by_kind[k].recovered_s:.2f} / {by_kind[k].stopped_s:.2f}" if k in by_kind else ""
            for k in KINDS
        ]
        lines.append(f"| {scenario.what:<42} | {' | '.join(f'{cell:<13}' for cell in cells)} |")
    return "\n".join(lines)


@pytest.mark.timeout(200)
async def test_every_fault_on_every_wire():
    """Would catch any lie of the wire that is believed, a STOP taken for done, and a bus that does not come back."""
    jobs = [live_through(scenario, kind) for scenario in scenarios() for kind in scenario.kinds]
    rows = await asyncio.gather(*jobs)
    believed = sum(row.believed for row in rows)
    print(f"\n{table(rows)}\n{len(rows)} rows, {believed} values believed")  # noqa: T201
    assert believed > 8 * len(rows)
    assert [(row.kind, row.scenario.what, row.wrong) for row in rows if row.wrong] == []
    assert {row.scenario.what for row in rows if row.false_acks} <= set(ECHOING)


def test_the_page_shows_every_row_of_the_table():
    """Would catch a fault that is told here and missing in docs/wire.md, or a row there that nobody tells any more."""
    page = Path(__file__).parents[2].joinpath("docs/wire.md").read_text()
    shown = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| ")]
    assert shown[1 : len(scenarios()) + 1] == [scenario.what for scenario in scenarios()]


# -------------------------------------------------------------- the soak
FREQUENT = (
    "split",
    "wrong_tid",
    "zero_tid",
    "bad_crc",
    "short",
    "one_too_many",
    "wrong_function",
    "exception_2",
)
RARE = (
    "late",
    "silence",
    "half",
    "merged",
    "merged_stale",
    "garbage_first",
    "twice",
    "cut",
    "hang_up",
    "unplug",
)
OBJECTS_MAX = 1_000  # that may be left over; one a request would be thousands
RSS_MB_MAX = 24  # what an allocator keeps; 100 bytes a request would be 100 MB in the long run


async def soak(kind: str, requests: int, faults_per_request: float, seed: int) -> tuple[int, int]:
    """(values believed, faults) of one bus under random faults; a wrong value or a false STOP fails."""
    luck = random.Random(seed)
    impossible = ONLY_SERIAL if kind == "tcp" else ONLY_TCP
    possible = [fault for fault in FREQUENT + RARE if fault not in impossible]
    faults = 0
    async with FaultySlave(kind) as slave:
        slave.keep_requests = False
        bus = Bus(parse_wire(slave.wire), TIMING)
        await bus.open()
        story = Story(slave, bus, Row(Scenario("soak", ()), kind))
        try:
            for number in range(requests):
                if luck.random() < faults_per_request:
                    slave.faults.append(luck.choice(possible))
                    faults += 1
                if number % 50 == 0:
                    slave.written[LIMIT] = 16
                    assert not await story.stop(6) or slave.holds(LIMIT) == (STOPPED,), (
                        f"a false STOP, seed {seed}"
                    )
                else:
                    count = luck.randint(1, 20)
                    await story.read(luck.choice((3, 4)), luck.randrange(1000, 60_000), count, spare=3)
        finally:
            await bus.close()
    wrong, false = story.row.wrong, story.row.false_acks
    assert wrong == false == 0, f"seed {seed}: {wrong} wrong values, {false} false acknowledgements"
    return story.row.believed, faults


async def soak_all(requests: int, faults_per_request: float, seed: int) -> tuple[int, int, int, int]:
    """Six buses at once: (values believed, faults, objects alive, resident MB) when all are closed."""
    kinds = KINDS * 2
    each = requests // len(kinds)
    jobs = [soak(kind, each, faults_per_request, seed + at) for at, kind in enumerate(kinds)]
    believed, faults = (sum(column) for column in zip(*await asyncio.gather(*jobs), strict=True))
    gc.collect()
    return believed, faults, len(gc.get_objects()), resident_mb()


def resident_mb() -> int:
    """What this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() // 2**20


async def soaked(requests: int, faults_per_request: float) -> str:
    """Soak, with a tenth first to warm up, and hold memory against what it was then."""
    *_, objects, mb = await soak_all(requests // 10, faults_per_request, seed=1)
    began_s = asyncio.get_running_loop().time()
    believed, faults, objects_after, mb_after = await soak_all(requests, faults_per_request, seed=100)
    took_s = asyncio.get_running_loop().time() - began_s
    grown, grown_mb = objects_after - objects, mb_after - mb
    said = (
        f"{requests} requests, {faults} faults, {believed} values believed, 0 wrong, {took_s:.0f} s; "
        f"objects {grown:+d}, resident {grown_mb:+d} MB to {mb_after} MB"
    )
    assert believed > 0.9 * requests, said
    assert grown < OBJECTS_MAX, said
    assert grown_mb < RSS_MB_MAX, said
    return said


@pytest.mark.timeout(200)
async def test_thousands_of_requests_under_random_faults():
    """Would catch a wrong value that only a rare order of faults brings, and whatever grows with each request."""
    print(f"\n{await soaked(3_000, 0.02)}")  # noqa: T201


@pytest.mark.long
@pytest.mark.timeout(7200)
async def test_a_million_requests_under_random_faults():
    """Would catch the same, seldom enough to escape the short one."""
    print(f"\n{await soaked(1_000_000, 0.002)}")  # noqa: T201
