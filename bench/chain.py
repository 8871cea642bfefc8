"""From a log on the chain to power at the plug, and what it costs to come back after weeks.

* From log to verdict: the time from when a node sends a `connect` to its subscribers until we believe it, fsync included: look at
  the head, read the logs, compare header and contract state, journal. Confirmations are 1, or one would measure the chain.
  Beside it, on the same logs in the same run: the bare WebSocket message (floor), and agents that poll `eth_getLogs` every
  100 ms and every second and believe whatever they read.
* From verdict to read back: the token is there at once, as when the consumer waits at the plug; then accept and begin
  are journaled, failsafe armed and read back, the set point written and read back over Modbus TCP from a simulated charger.
* Catch-up: a process that starts on an empty journal and reads a million blocks with 10,000 sessions of other providers and
  20 of ours; twice, as the watcher does. Its peak memory beside that of a hundred thousand blocks.
* Requests: what one session costs on a provider's plan, from `connect` to its believed end, and what a block costs without any.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import structlog
from websockets.asyncio.client import connect

from agent.chain.failover import Endpoint, FailoverNode
from agent.chain.node import Web3Node
from agent.chain.rpc import HttpWire, Limits
from agent.core import events as ev
from agent.core.book import Book
from agent.core.live import Policy
from agent.core.record import MeterIdentity
from agent.core.session import Stage
from agent.core.token import ZERO_ADDRESS
from agent.core.units import Address, hex0x
from agent.engine import Engine
from agent.journal import Journal
from agent.keys import ephemeral_meter_signer
from agent.runners.chain_watch import ChainWatch, WatchSettings
from agent.runners.charger import ChargerRunner
from bench import Row
from bench._fake_node import CHAIN_ID, DOMAIN, FakeNode, Opened
from firmware_bridge.charger import Charger
from firmware_bridge.mapped_charger import ChargerConfig
from firmware_bridge.modbus import Buses
from firmware_bridge.opening import open_charger
from firmware_bridge.simulator import Simulator, SimulatorConfig
from firmware_bridge.stopping import StopModel

RUNS_MIN = 20  # fewer say nothing about a p99
PORT = "left"
EVP, STRANGER = Address(b"\xa1" * 20), Address(b"\xb1" * 20)
GOAL_OVER_FLOOR_MS, GOAL_READ_BACK_MS = 30.0, 100.0
GOAL_CATCH_UP_S, GOAL_MEMORY_RATIO = 10.0, 1.1
GOAL_CALLS_PER_SESSION, GOAL_CALLS_PER_BLOCK = 40, 4
POLLS_S = (0.1, 1.0)
PAST_BLOCKS, FOREIGN, OURS = 1_000_000, 10_000, 20
ROOM_S = 60.0  # for one session on a busy machine; more means that it hangs


def rows(runs: int) -> list[Row]:
    """Latencies, then catching up, then requests."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with tempfile.TemporaryDirectory() as folder:
        seen = asyncio.run(_latencies(Path(folder), max(runs, RUNS_MIN)))
    return [*_latency_rows(seen), *_catch_up_rows(), *_request_rows(seen)]


# ---- from log to power


@dataclass(slots=True)
class Seen:
    """Milliseconds, one of each for every session; `calls` are our requests."""

    floor: list[float] = field(default_factory=list)
    verdict: list[float] = field(default_factory=list)
    commanded: list[float] = field(default_factory=list)  # since the verdict
    read_back: list[float] = field(default_factory=list)  # since the verdict
    polled: dict[float, list[float]] = field(default_factory=lambda: {poll_s: [] for poll_s in POLLS_S})
    calls_sessions: int = 0
    calls_idle: float = 0


class TimedCharger:
    """The charger, with the times of the newest command that offers power."""

    def __init__(self, charger: Any) -> None:
        self._charger = charger  # everything else is its own
        self.commanded_ns = self.read_back_ns = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._charger, name)

    async def set_limit(self, *, current_ma: int | None = None, power_w: int | None = None) -> None:
        """The charger's; the first one of a delivery is timed."""
        began_ns = time.monotonic_ns()
        await self._charger.set_limit(current_ma=current_ma, power_w=power_w)
        if not self.read_back_ns:
            self.commanded_ns, self.read_back_ns = began_ns, time.monotonic_ns()


class Bystanders:
    """A bare WebSocket and two polling agents, each noting when it saw the newest log of ours."""

    def __init__(self, node: FakeNode) -> None:
        self._node = node
        self.bare_ns = 0
        self.polled_ns: dict[float, int] = {}

    async def listen(self) -> None:
        """Every message's arrival."""
        query = {"address": hex0x(DOMAIN.contract), "topics": [None, None, None, hex0x(EVP.rjust(32, b"\0"))]}
        asked = {"jsonrpc": "2.0", "id": 1, "method": "eth_subscribe", "params": ["logs", query]}
        async with connect(self._node.url_ws) as socket:
            await socket.send(json.dumps(asked))
            async for _ in socket:
                self.bare_ns = self.bare_ns or time.monotonic_ns()

    async def poll(self, every_s: float) -> None:
        """Ask for new logs, and sleep."""
        wire, known = HttpWire(f"{self._node.url_http}/uncounted", Limits()), 0
        topics = [None, None, None, hex0x(EVP.rjust(32, b"\0"))]
        try:
            while True:
                head = int(await wire.request("eth_blockNumber", []), 16)
                query = {
                    "address": hex0x(DOMAIN.contract),
                    "topics": topics,
                    "fromBlock": hex(known),
                    "toBlock": hex(head),
                }
                if head >= known and await wire.request("eth_getLogs", [query]):
                    self.polled_ns.setdefault(every_s, time.monotonic_ns())
                known = head + 1
                await asyncio.sleep(every_s)
        finally:
            await wire.close()

    def forget(self) -> None:
        """The next log is the one."""
        self.bare_ns, self.polled_ns = 0, {}


class Agent:
    """The daemon's own path, without door and sender: engine, journal, watcher, charger."""

    def __init__(self, folder: Path, node: FakeNode, charger: TimedCharger) -> None:
        self.charger, self.verdict_ns = charger, 0
        self.journal = Journal(folder / "journal.sqlite", DOMAIN, EVP)
        policy = Policy(max_unacked_wh={PORT: 50}, final_receipt_wait_s=0)  # this consumer signs nothing
        self.engine = Engine(self.journal, policy, _monotonic_ms, self._told)
        self.node = FailoverNode([Endpoint("node", Web3Node(node.url_ws))], CHAIN_ID, time.monotonic)
        settings = WatchSettings(node.blocks - 1, 1, 1)
        self.watch = ChainWatch(self.engine, self.node, DOMAIN, EVP, settings, time.monotonic)
        self.runner = ChargerRunner(
            self.engine, PORT, cast("Charger", charger), failsafe_timeout_s=5, stop_model=StopModel(),
            meter=MeterIdentity("V2V", "bench", "1", "1"), meter_signer=ephemeral_meter_signer(b"bench"),
            monotonic_ms=_monotonic_ms,
        )  # fmt: skip

    def _told(self, event: ev.Event, _before: Book, after: Book) -> None:
        """A believed `connect` is on the disk; its consumer waits at the plug."""
        if isinstance(event, ev.ConnectedBelieved):
            self.verdict_ns = time.monotonic_ns()
            token = after.sessions[event.session_id].terms.token
            at_s = self.engine.at_s
            grant = ev.Presentation(
                "bench", PORT, "eip191", token, ZERO_ADDRESS, 0, at_s + 36_000, bytes(32), token, token
            )
            present = ev.TokenPresented(at_s, event.session_id, grant)
            asyncio.get_running_loop().call_soon(self.engine.accept, present)

    def stage(self, session: Opened) -> Stage | None:
        """Where it stands."""
        found = next((s for s in self.engine.book.sessions.values() if s.terms.token == session.token), None)
        return None if found is None else found.stage


def _monotonic_ms() -> int:
    return int(asyncio.get_running_loop().time() * 1000)


@asynccontextmanager
async def _running(*works: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(work) for work in works]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _until(holds: Any) -> None:
    async with asyncio.timeout(ROOM_S):
        while not holds():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.002)


async def _latencies(folder: Path, runs: int) -> Seen:
    seen, chance = Seen(), random.Random(1)
    async with AsyncExitStack() as held:
        node = held.enter_context(FakeNode(blocks=100))
        plug = await held.enter_async_context(Simulator(SimulatorConfig(tcp="127.0.0.1:0")))
        charger = TimedCharger(await open_charger(ChargerConfig(map="simulated", wire=plug.wire), Buses()))
        held.push_async_callback(charger.close)
        agent, others = Agent(folder, node, charger), Bystanders(node)
        held.callback(agent.journal.close)
        held.push_async_callback(agent.node.close)
        polls = (others.poll(poll_s) for poll_s in POLLS_S)
        await held.enter_async_context(
            _running(agent.watch.run(), agent.runner.run(), others.listen(), *polls)
        )
        await _until(lambda: agent.engine.live.header is not None and others.polled_ns == {})
        await asyncio.sleep(2 * max(POLLS_S))
        calls = node.calls.total()
        for number in range(runs):
            await asyncio.sleep(chance.random())  # anywhere between two polls
            await _one(node, agent, others, seen, number)
        seen.calls_sessions = node.calls.total() - calls
        calls, blocks = node.calls.total(), 10
        for number in range(blocks):
            await _quiet_block(node, agent, number)
        seen.calls_idle = (node.calls.total() - calls) / blocks
    return seen


async def _one(node: FakeNode, agent: Agent, others: Bystanders, seen: Seen, number: int) -> None:
    """One session: opened, believed, offered power, ended."""
    others.forget()
    agent.charger.read_back_ns = agent.verdict_ns = 0
    session = Opened(Address((number + 1).to_bytes(20, "big")), EVP, node.next_block_s)
    sent_ns = await asyncio.to_thread(node.opens, session)
    await _until(
        lambda: agent.charger.read_back_ns and others.bare_ns and len(others.polled_ns) == len(POLLS_S)
    )
    seen.floor.append((others.bare_ns - sent_ns) / 1e6)
    seen.verdict.append((agent.verdict_ns - sent_ns) / 1e6)
    seen.commanded.append((agent.charger.commanded_ns - agent.verdict_ns) / 1e6)
    seen.read_back.append((agent.charger.read_back_ns - agent.verdict_ns) / 1e6)
    for poll_s, at_ns in others.polled_ns.items():
        seen.polled[poll_s].append((at_ns - sent_ns) / 1e6)
    await asyncio.to_thread(node.ends, session)
    await _until(lambda: agent.stage(session) in (Stage.SETTLED, Stage.SETTLING))
    await asyncio.to_thread(node.opens, Opened(Address(bytes(20)), STRANGER, node.next_block_s))
    await _until(lambda: agent.stage(session) is Stage.SETTLED)


async def _quiet_block(node: FakeNode, agent: Agent, number: int) -> None:
    foreign = Opened(Address(number.to_bytes(20, "big")), STRANGER, node.next_block_s)
    await asyncio.to_thread(node.opens, foreign)
    await _until(
        lambda: agent.engine.live.header is not None and agent.engine.live.header.number == node.blocks - 1
    )


def _percentile(values: list[float], percent: int) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]


def _latency_rows(seen: Seen) -> list[Row]:
    found = []
    for percent, poll_s in ((50, 0.1), (99, 0.1), (50, 1.0), (99, 1.0)):
        ours, floor = _percentile(seen.verdict, percent), _percentile(seen.floor, percent)
        found.append(
            Row(
                "chain",
                f"log to verdict, p{percent}",
                "ms",
                ours,
                f"<= floor + {GOAL_OVER_FLOOR_MS:g} ms",
                ours <= floor + GOAL_OVER_FLOOR_MS,
                len(seen.verdict),
                _percentile(seen.polled[poll_s], percent),
                f"polling every {poll_s:g} s, believing at once",
                floor,
                "bare WebSocket message",
            )
        )
    for percent in (50, 99):
        ours = _percentile(seen.read_back, percent)
        found.append(
            Row(
                "chain",
                f"verdict to read back, p{percent}",
                "ms",
                ours,
                f"<= {GOAL_READ_BACK_MS:g} ms",
                ours <= GOAL_READ_BACK_MS,
                len(seen.read_back),
                floor=_percentile(
                    [b - c for b, c in zip(seen.read_back, seen.commanded, strict=True)], percent
                ),
                floor_name="command and read back alone",
            )
        )
    return found


def _request_rows(seen: Seen) -> list[Row]:
    per_session = seen.calls_sessions / len(seen.verdict)
    return [
        Row(
            "chain", "requests a session (3 blocks)", "calls", per_session, f"<= {GOAL_CALLS_PER_SESSION}",
            per_session <= GOAL_CALLS_PER_SESSION, len(seen.verdict),
        ),
        Row(
            "chain", "requests a block without a session", "calls", seen.calls_idle, f"<= {GOAL_CALLS_PER_BLOCK}",
            seen.calls_idle <= GOAL_CALLS_PER_BLOCK, 10,
        ),
    ]  # fmt: skip


# ---- coming back


def _catch_up_rows() -> list[Row]:
    small, large = (_caught_up(blocks, 0) for blocks in (PAST_BLOCKS // 10, PAST_BLOCKS))
    hosted = _caught_up(PAST_BLOCKS, 10_000)
    size = f"{PAST_BLOCKS:,} blocks, {FOREIGN:,} foreign sessions"
    return [
        Row(
            "chain", f"catch-up, {size}, {large['calls']:.0f} calls", "s", large["seconds"],
            f"<= {GOAL_CATCH_UP_S:g} s", large["seconds"] <= GOAL_CATCH_UP_S, 1,
        ),
        Row(
            "chain", f"the same at most 10,000 blocks at a time, {hosted['calls']:.0f} calls", "s", hosted["seconds"],
            f"<= {GOAL_CATCH_UP_S:g} s", hosted["seconds"] <= GOAL_CATCH_UP_S, 1,
        ),
        Row(
            "chain", "catch-up, peak memory", "MiB", large["peak_mib"], f"<= {GOAL_MEMORY_RATIO:g} x floor",
            large["peak_mib"] <= GOAL_MEMORY_RATIO * small["peak_mib"], 1,
            floor=small["peak_mib"], floor_name=f"{PAST_BLOCKS // 10:,} blocks",
        ),
    ]  # fmt: skip


def _caught_up(blocks: int, range_blocks: int) -> dict[str, float]:
    """A process of its own catches up: its memory is nobody else's."""
    with FakeNode(blocks=blocks, range_blocks=range_blocks) as node, tempfile.TemporaryDirectory() as folder:
        for number in range(FOREIGN + OURS):
            at = blocks * number // (FOREIGN + OURS)
            provider = EVP if number % ((FOREIGN + OURS) // OURS) == 7 else STRANGER
            issued_at_s = node.next_block_s - (blocks - at) * 12
            node.holds(Opened(Address(number.to_bytes(20, "big")), provider, issued_at_s), at)
        command = [sys.executable, "-m", "bench.chain", node.url_ws, folder]
        said = subprocess.run(command, check=True, capture_output=True, env=os.environ, text=True).stdout
        found: dict[str, float] = json.loads(said)
        assert found.pop("sessions") == OURS, "a session of ours was missed"
        return {**found, "calls": float(node.calls.total())}


def _peak_mib() -> float:
    """Of this process alone; getrusage would count who started it."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))) / 1024


async def _catch_up(url: str, folder: Path) -> None:
    """Look twice from nothing, and say what it took."""
    journal = Journal(folder / "journal.sqlite", DOMAIN, EVP)
    engine = Engine(journal, Policy(max_unacked_wh={PORT: 50}), _monotonic_ms)
    node = FailoverNode([Endpoint("node", Web3Node(url))], CHAIN_ID, time.monotonic)
    watch = ChainWatch(engine, node, DOMAIN, EVP, WatchSettings(0, 3, 64), time.monotonic)
    began = time.monotonic()
    await watch.look()
    head = engine.live.header
    assert head is not None
    await watch._read(await node.head())  # noqa: SLF001 - the second reading, as with the next head
    seconds = time.monotonic() - began
    sessions = len(engine.book.sessions)
    await node.close()
    journal.close()
    sys.stdout.write(json.dumps({"seconds": seconds, "peak_mib": _peak_mib(), "sessions": sessions}))


if __name__ == "__main__":
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(40))
    with suppress(KeyboardInterrupt):
        asyncio.run(_catch_up(sys.argv[1], Path(sys.argv[2])))
