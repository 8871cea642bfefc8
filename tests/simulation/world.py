"""The simulated world: the whole unmodified agent in virtual time, and everything around it simulated.

    outcome = run(Plan(orders=(Order(60),)), folder)

What runs is `agent.daemon` itself, from the opening of its journal to its orderly stop: engine, door, runners, real SQLite,
real keys and signatures. Nine names of that module stand for its adapters and are replaced while a world runs: journal
(the real one, with a crash point around each append), charger, node, broker client, keys, random bytes and clocks. Time is
looptime's; a session of minutes takes a fraction of a second.

A power cut is a BaseException out of a port call or an append. A dead agent's ports refuse everything, and three seconds
later the next life starts from the file only. Same plan, same trace: `Outcome.trace` is compared to prove it.
"""

import asyncio
import logging
import random
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from unittest.mock import patch

import looptime
import structlog
from simulation import checkers
from simulation.broker import Broker, runner_above
from simulation.chain import BLOCK_S, Chain, Market, SimNode
from simulation.checkers import Broken
from simulation.consumers import Character, Consumer, Order
from simulation.plant import Outlet, SimCharger
from simulation.weather import Life, PowerCut, Storm, Weather

from agent import daemon
from agent.config import load_agent
from agent.core import events as ev
from agent.core.token import Domain
from agent.door import Door
from agent.engine import Engine
from agent.errors import AgentError
from agent.journal import Journal
from agent.keys import ephemeral_meter_signer, ephemeral_signer
from firmware_bridge.simulator.plant import PlantConfig

T0 = 1_790_000_000
RESTART_S = 3  # systemd's RestartSec
FAILSAFE_S = 5
CHALLENGE_S, GRACE_S = 300, 600
UNACKED_WH = 20
LOOK_S = 0.5
DOMAIN = Domain(31_337, bytes.fromhex("c0" * 20))
PROVIDER, OPERATOR, METER = (
    ephemeral_signer(b"provider"),
    ephemeral_signer(b"operator"),
    ephemeral_meter_signer(b"m"),
)
POINTS_MAX = 200_000  # a world that makes more port calls than this is in a loop


@dataclass(frozen=True)
class Car:
    """What stands at a port."""

    step_mwh: int = 1_000
    lies_permille: int = 1_000
    shows_contactor: bool = True
    ev_lag_ms: int = 500
    ev_ramp_ma_per_s: int = 60_000
    ev_current_ma_max: int = 16_000


@dataclass(frozen=True)
class Plan:
    """Everything that will happen, but for what follows from it. Seconds are the world's, from its beginning."""

    seed: int = 0
    orders: tuple[Order, ...] = (Order(),)
    cars: tuple[tuple[str, Car], ...] = (("left", Car()),)
    storm: Storm = field(default_factory=Storm)
    cuts: frozenset[int] = frozenset()  # numbers of the crash points at which the power fails
    cut_after_label: str = ""  # or the first point of this label
    reorgs: tuple[tuple[int, int, int], ...] = ()  # at s, depth, percent of transactions that are lost
    outages: tuple[tuple[int, int], ...] = ()  # at s, for s: no blocks
    freezes: tuple[tuple[int, int], ...] = ()  # at s, for s: the process stands still, the world goes on
    sleeps: tuple[tuple[int, int], ...] = ()  # at s, for s: the computer sleeps, its clock too
    restarts: tuple[int, ...] = ()  # at s: an orderly stop and start
    welds: tuple[tuple[int, str], ...] = ()  # at s, port: the contactor sticks
    finality: int = 4  # blocks; deeper than any reorg of the plan
    horizon_s: int = 6_000


@dataclass(frozen=True)
class Row:
    """A journaled event, and when the world saw it."""

    ms: int
    life: int
    event: ev.Event


@dataclass
class Segment:
    """From the row that offers power to the row that has seen it off."""

    session_id: bytes
    began_mwh: int
    life: int
    forbidden_ms: int | None = None
    forbidden_by: str = ""


@dataclass(frozen=True)
class Outcome:
    """How a world ended. `broken` is the first broken promise, "" for none."""

    broken: str
    trace: tuple[str, ...]
    points: int
    labels: tuple[str, ...]
    lives: int
    power_cuts: int
    sessions: int
    stranded: int
    lasted_s: int

    def story(self, lines=60):
        """What to show a human."""
        shown = (
            [*self.trace[: lines // 2], "...", *self.trace[-lines // 2 :]]
            if len(self.trace) > lines
            else self.trace
        )
        return "\n".join([*shown, self.broken])


class World:
    """One plan, carried out."""

    def __init__(self, plan, folder):
        self.plan, self.folder = plan, folder
        self.rng = random.Random(plan.seed)
        self.trace = []
        self.rows = []
        self.labels = []
        self.points = 0
        self.lives = 0
        self.power_cuts = 0
        self.slept_ms = 0
        self.stood_still_ms = 0
        self.stranded = 0
        self.was_reorged = False
        self.welded = False
        self.engine = None
        self.life = None
        self.broken = None
        self.ended = asyncio.Event()
        self.segments = {}
        self.segment_counts = {}
        self.intents = set()
        self.backed_ms = {}
        self.freed_by_strangers = set()
        self._stops_heard = set()
        self.presented, self.signed, self.acked_wh = set(), set(), {}  # what the rows say
        self._true_mwh = {}
        self._flow = {}
        self._build()

    def _build(self):
        plan = self.plan
        self.weather = Weather(plan.storm, self.rng, self.now_ms)
        market = Market(DOMAIN, PROVIDER.address, OPERATOR.address, CHALLENGE_S, GRACE_S)
        self.chain = Chain(market, self.chain_time_s, self.tell)
        self.chain.pool_takes = lambda tx: self.weather.pool_takes()  # noqa: ARG005
        self.chain.miner_takes = lambda tx: self.weather.miner_takes()  # noqa: ARG005
        self.chain.listeners.append(lambda block: self._guarded(checkers.money_is_conserved, self.chain))  # noqa: ARG005
        self.chain.sends = lambda raw_tx: self._guarded(checkers.sent_is_written, self, raw_tx)
        self.broker = Broker(self.weather, f"v2v/1/0x{PROVIDER.address.hex()}")
        self.outlets = {port: self._outlet(car) for port, car in plan.cars}
        self.consumers = {}
        for number, order in enumerate(plan.orders):
            consumer = Consumer(self, number, order)
            self.consumers[consumer.session_id] = consumer
        self.stop_ms_max = self._stop_ms()
        self.config = self._config()
        self.max_unacked_wh = UNACKED_WH
        self.max_unfinal_wh = self.config.policy.max_unfinal_wh

    def _stop_ms(self):
        """t_poll + t_stop of PROTOCOL section 5: a poll and the car's lag; with faults the failsafe and a forced opening."""
        plan = self.plan
        slowest_ms = max(car.ev_lag_ms for _, car in plan.cars) + 2_000
        if (
            plan.cuts
            or plan.cut_after_label
            or plan.storm.bus_fails
            or plan.freezes
            or plan.sleeps
            or plan.restarts
        ):
            return FAILSAFE_S * 1000 + slowest_ms + PlantConfig().force_open_ms
        return slowest_ms + 2_000

    def _outlet(self, car):
        config = PlantConfig(
            ev_lag_ms=car.ev_lag_ms,
            ev_ramp_ma_per_s=car.ev_ramp_ma_per_s,
            ev_current_ma_max=car.ev_current_ma_max,
        )
        return Outlet(
            self.now_ms,
            step_mwh=car.step_mwh,
            lies_permille=car.lies_permille,
            shows_contactor=car.shows_contactor,
            config=config,
        )

    def _config(self):
        path = self.folder / "agent.toml"
        ports = "".join(
            f'[[ports]]\nname = "{port}"\nmap = "simulated"\nwire = "tcp://127.0.0.1:1"\ncurrent_ma_max = 32000\n'
            f"phase_count = 3\nfailsafe_timeout_s = {FAILSAFE_S}\n"
            for port, _ in self.plan.cars
        )
        path.write_text(
            f'[chain]\nurls = ["ws://127.0.0.1:1"]\nchain_id = {DOMAIN.chain_id}\n'
            f'contract = "0x{DOMAIN.contract.hex()}"\nprovider = "0x{PROVIDER.address.hex()}"\n'
            f"finality = {self.plan.finality}\n{ports}[policy]\nmax_unacked_wh = {UNACKED_WH}\n"
            '[mqtt]\nurl = "mqtt://127.0.0.1:1"\n[http]\nenabled = false\n[journal]\npath = "./journal.sqlite"\n'
        )
        return load_agent(path, {})

    # ---- time

    def now_ms(self):
        """The world's milliseconds. The agent's clock stands still while its computer sleeps; the world's does not."""
        return int(asyncio.get_running_loop().time() * 1000) + self.slept_ms

    def chain_time_s(self, ms=None):
        """What an honest block says, now or at a moment of the world."""
        return T0 + (self.now_ms() if ms is None else ms) // 1000

    def random_bytes(self, count):
        """For nonces."""
        return self.rng.randbytes(count)

    def tell(self, line):
        """One line of the story."""
        self.trace.append(f"{self.now_ms() / 1000:8.2f} {line}")

    # ---- what the checkers ask

    def true_mwh(self, session_id):
        """What truly flowed for this session so far."""
        flowed = self._true_mwh.get(session_id, 0)
        for port, segment in self.segments.items():
            if segment.session_id == session_id:
                flowed += self.outlets[port].delivered_mwh - segment.began_mwh
        return flowed

    def stop_is_decided(self, session_id):
        """The journal has heard it."""
        return session_id in self._stops_heard

    def read_journal(self):
        """Every event on disk, by another connection."""
        journal = Journal(self.config.journal.path, DOMAIN, PROVIDER.address, read_only=True)
        try:
            return list(journal.events())
        finally:
            journal.close()

    def _guarded(self, check, *facts):
        """A broken promise ends the world, not the task that noticed."""
        if self.broken is not None:
            return
        try:
            check(*facts)
        except Broken as broken:
            self._break(str(broken))

    def _break(self, what):
        if self.broken is None:
            self.broken = what
            self.tell(f"BROKEN {what}")
            self.ended.set()

    # ---- what happens to the agent

    def power_fails_at(self, label):
        """Count a crash point; does the power fail here?"""
        self.points += 1
        assert self.points < POINTS_MAX, "the world does not end"
        self.labels.append(label)
        fails = self.points in self.plan.cuts or (label == self.plan.cut_after_label and not self.power_cuts)
        if fails:
            self.power_cuts += 1
            self.tell(f"POWER CUT at point {self.points}: {label}")
            for port, segment in self.segments.items():
                self._forbid(port, segment, "power cut")
        return fails

    def appended(self, event):
        """A row is on the disk."""
        row = Row(self.now_ms(), self.lives, event)
        self.rows.append(row)
        self.tell(f"row {type(event).__name__}")
        self._look_at_power()
        self._guarded(checkers.row_is_entitled, self, row)
        self._follow(row)

    def _follow(self, row):
        """Segments: opened and closed by rows, forbidden by rows."""
        event, sid = row.event, getattr(row.event, "session_id", None)
        port = self.consumers[sid].order.port if sid in self.consumers else None
        segment = self.segments.get(port)
        match event:
            case ev.DeliveryBegan():
                self.segments[port] = Segment(sid, self.outlets[port].delivered_mwh, row.life)
                self.segment_counts[sid] = self.segment_counts.get(sid, 0) + 1
                self.backed_ms[sid] = row.ms
            case ev.DeliveryPaused() | ev.DeliveryEnded() if (
                segment is not None and segment.session_id == sid
            ):
                self._true_mwh[sid] = self.true_mwh(sid)
                del self.segments[port]
            case (
                ev.StopDecided()
                | ev.ConnectedOrphaned()
                | ev.ConnectionClosingSeen()
                | ev.ConnectionEndedSeen()
            ):
                if segment is not None and segment.session_id == sid:
                    self._forbid(port, segment, type(event).__name__)
        self._remember(event)

    def _remember(self, event):
        match event:
            case ev.DeliveryEnded():
                self.intents.add(event.session_id)
            case ev.StopDecided():
                self._stops_heard.add(event.session_id)
            case ev.TokenPresented():
                self.presented.add(event.session_id)
            case ev.SettlementSigned():
                self.signed.add(event.raw_tx)
            case ev.ReceiptCredited():
                self.acked_wh[event.session_id] = event.energy_wh_acked

    def was_told(self, message):
        """A consumer hears the agent."""
        self._guarded(checkers.said_is_written, self, message)

    def _forbid(self, port, segment, why):
        if segment.forbidden_ms is None:
            segment.forbidden_ms, segment.forbidden_by = self.now_ms(), why

    def _look_at_power(self):
        now_ms = self.now_ms()
        for port, outlet in self.outlets.items():
            since_ms, before_uj = self._flow.get(port, (0, 0))
            energy_uj = outlet.look().energy_uj
            if energy_uj > before_uj:
                self._guarded(checkers.power_is_entitled, self, port, since_ms, now_ms)
            self._flow[port] = (now_ms, energy_uj)

    # ---- the agent's lives

    async def _agent(self):
        """Start it, and start it again, as systemd does."""
        while not self.ended.is_set():
            self.lives += 1
            self.life = life = Life(self.lives, self.weather, self.power_fails_at)
            self.tell(f"life {self.lives} begins")
            try:
                async with AsyncExitStack() as stack:
                    await daemon._start(self.config, {}, stack, life.stop)
            except BaseException as ending:
                leaves = _leaves(ending)
                bugs = [
                    leaf
                    for leaf in leaves
                    if not isinstance(leaf, PowerCut | AgentError | asyncio.CancelledError)
                ]
                if bugs:
                    self._break(f"the agent crashed: {bugs[0]!r}")
                    raise
                if not life.is_over and any(isinstance(leaf, asyncio.CancelledError) for leaf in leaves):
                    raise
                self.tell(f"life {self.lives} ends: {leaves[0]!r}"[:120])
            finally:
                life.is_over = True
            if self.ended.is_set():
                return
            for port, segment in self.segments.items():
                self._forbid(port, segment, "the agent ended")
            await asyncio.sleep(RESTART_S)

    @contextmanager
    def _adapters(self):
        """The names of `agent.daemon` that stand for the outside, replaced."""
        world = self

        class SimJournal(Journal):
            def append(self, event):
                kind = type(event).__name__
                world.life.point(f"journal {kind} before")
                super().append(event)
                world.appended(event)
                world.life.point(f"journal {kind} after")

        async def open_charger(config, buses):
            charger = SimCharger(world.outlets[world.opening.pop(0)], world.life)
            await charger.read()
            return charger

        def journal(path, domain, provider):
            world.opening = [port.name for port in world.config.ports]
            return SimJournal(path, domain, provider)

        def engine(*arguments):
            world.engine = Engine(*arguments)
            return world.engine

        def door(*arguments):
            return Door(*arguments[:-1], world.random_bytes)

        clocks = SimpleNamespace(
            CLOCK_BOOTTIME="boot",
            CLOCK_MONOTONIC="monotonic",
            clock_gettime=lambda clock: world.slept_ms / 1000 if clock == "boot" else 0.0,
            monotonic=lambda: asyncio.get_running_loop().time(),
        )
        with patch.multiple(
            daemon,
            Journal=journal,
            open_charger=open_charger,
            Web3Node=lambda *_: SimNode(world.chain, world.life),
            load_signer=lambda *_, **__: OPERATOR,
            load_meter_signer=lambda *_, **__: METER,
            MqttRunner=runner_above(world.broker, lambda: world.life),
            LocalRunner=lambda *_: _NoSocket(),
            Engine=engine,
            Door=door,
            time=clocks,
        ):
            yield

    # ---- everything else that moves

    async def _blocks(self):
        """A block every twelve seconds, at its own second even when the process stood still meanwhile."""
        next_ms = (self.now_ms() // 12_000 + 1) * 12_000
        while True:
            # In small steps, by the clock: the computer may sleep meanwhile, the chain does not.
            while self.now_ms() < next_ms:  # noqa: ASYNC110
                await asyncio.sleep(min(1.0, (next_ms - self.now_ms()) / 1000))
            at_s = next_ms // 1000
            if not any(since_s <= at_s < since_s + for_s for since_s, for_s in self.plan.outages):
                self.chain.mine(T0 + at_s)
            next_ms += BLOCK_S * 1000

    async def _looks(self):
        """Consumers once a second, power twice."""
        while True:
            for consumer in self.consumers.values():
                consumer.tick()
            self._look_at_power()
            await asyncio.sleep(LOOK_S)
            self._look_at_power()
            if self._is_done():
                self.ended.set()
            await asyncio.sleep(LOOK_S)

    def _is_done(self):
        """Faults are over, every order is paid or lost for good, and the book knows it."""
        if self.engine is None or self.life.is_over or self.weather.is_stormy:
            return False
        if self.now_ms() < 1000 * max([0, *(at for at, *_ in self._happenings())]):
            return False
        book = self.engine.book
        return (
            all(consumer.is_over() for consumer in self.consumers.values())
            and not book.open_sessions()
            and not book.pending
            and not self.segments
        )

    def _happenings(self):
        plan = self.plan
        return sorted(
            [(at, "reorg", depth, lost) for at, depth, lost in plan.reorgs]
            + [(at, "freeze", for_s) for at, for_s in plan.freezes]
            + [(at, "sleep", for_s) for at, for_s in plan.sleeps]
            + [(at, "restart") for at in plan.restarts]
            + [(at, "weld", port) for at, port in plan.welds]
        )

    async def _fate(self):
        """What the plan says will happen."""
        for at_s, what, *more in self._happenings():
            await asyncio.sleep(max(0.0, at_s - self.now_ms() / 1000))
            self.tell(f"{what.upper()} {more}")
            self._look_at_power()
            getattr(self, f"_{what}")(*more)

    def _reorg(self, depth, lost_percent):
        self.was_reorged = True
        vanishing = {c.address for c in self.consumers.values() if not c.character.reconnects}

        def keeps(tx):
            return tx.sender not in vanishing and self.rng.random() * 100 >= lost_percent

        self.chain.reorg(depth, keeps=keeps)

    def _freeze(self, for_s):
        """SIGSTOP, SIGCONT: every timer is late, the chain and the plant are not."""
        self.stood_still_ms = max(self.stood_still_ms, for_s * 1000)
        loop = asyncio.get_running_loop()
        loop.setup_looptime(start=loop.time() + for_s, noop_cycles=0)

    def _sleep(self, for_s):
        """Suspend and resume: the loop's clock stood still, the world's did not."""
        self.stood_still_ms = max(self.stood_still_ms, for_s * 1000)
        self.slept_ms += for_s * 1000

    def _restart(self):
        if self.life is not None:
            self.life.stop.set()

    def _weld(self, port):
        self.welded = True
        self.outlets[port].weld(welded=True)

    # ---- from beginning to end

    async def run(self):
        """Carry it out; the outcome."""
        with self._adapters():
            agent = asyncio.create_task(self._agent(), name="agent")
            others = [
                asyncio.create_task(task, name="world")
                for task in (self._blocks(), self._looks(), self._fate())
            ]
            try:
                async with asyncio.timeout(self.plan.horizon_s):
                    waiting = asyncio.create_task(self.ended.wait())
                    await asyncio.wait([waiting, agent, *others[:2]], return_when=asyncio.FIRST_COMPLETED)
            except TimeoutError:
                self.tell("the horizon is reached")
                self._guarded(checkers.sessions_and_escrows_end, self)
                self._break("it does not end")
            await self._close(agent, others)
            waiting.cancel()
        return self._outcome()

    async def _close(self, agent, others):
        self.ended.set()
        for task in others:
            if task.done():
                task.result()
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        if self.broken is None:
            self.life.stop.set()  # an orderly stop: the last crash point is the end of the file
            await agent
            for check in checkers.AT_THE_END:
                self._guarded(check, self)
        else:
            self.life.is_over = True
            agent.cancel()
            await asyncio.gather(agent, return_exceptions=True)

    def _outcome(self):
        return Outcome(
            self.broken or "",
            tuple(self.trace),
            self.points,
            tuple(self.labels),
            self.lives,
            self.power_cuts,
            len(self.consumers),
            self.stranded,
            self.now_ms() // 1000,
        )


class _NoSocket:
    """The owner's local socket belongs to a real file system and a real clock."""

    async def run(self):
        """For ever."""
        await asyncio.Event().wait()


def _leaves(error):
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]


def _new_loop():
    return looptime.patch_event_loop(asyncio.new_event_loop(), start=0, noop_cycles=0)


@contextmanager
def _quiet():
    """No log lines: a thousand crashes are a thousand tracebacks."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL), cache_logger_on_first_use=False
    )
    try:
        yield
    finally:
        structlog.configure(**before)


def run(plan, folder, also=()):
    """One world, from its beginning to its end. `also`: further promises to check at the end."""
    for leftover in folder.glob("journal.sqlite*"):
        leftover.unlink()
    chance = random.getstate()
    random.seed(plan.seed)  # the runners' jitter

    async def story():
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # noqa: ARG005 - dead tasks' last words
        world = World(plan, folder)
        outcome = await world.run()
        for check in also if not outcome.broken else ():
            world._guarded(check, world)
        return world._outcome()

    with _quiet(), asyncio.Runner(loop_factory=_new_loop) as runner:
        try:
            return runner.run(story())
        finally:
            random.setstate(chance)


__all__ = ["Car", "Character", "Order", "Outcome", "Plan", "Storm", "World", "replace", "run"]
