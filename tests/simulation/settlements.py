"""Settlements alone, on a chain in memory: every fault of pool, node, miner, fees and power at once, ten thousand times.

    ended = settled(seed)          Run(seed, broken="", ...)

What runs is the agent: engine, real journal on disk, watcher and sender; sessions begin where energy has ended. Each seed makes
its own mixture, most kinds of fault are off in most seeds. The storm lasts some blocks; then everything must come to its end.
A power cut is a BaseException out of a question to the node or an append; the next life starts from the file only.
"""

import asyncio
import logging
import random
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import structlog
from fake_pool import GWEI, FakeNet, FakeNode
from story import sold

from agent.chain import contract
from agent.chain.sender import Sender, SignedTx
from agent.core import events as ev
from agent.core import settling
from agent.core.live import Beat, Policy
from agent.core.session import Stage
from agent.core.settling import Haste
from agent.engine import Engine
from agent.errors import Transient
from agent.journal import Journal
from agent.runners.chain_send import ChainSend
from agent.runners.chain_watch import ChainWatch, WatchSettings

SHARED_MEMORY = Path("/dev/shm")
STORM_TURNS, CALM_TURNS_MAX = (12, 30), 120
FINALITY = 6  # blocks; deeper than any reorg below
ORDERED_WH = 200


class PowerCut(BaseException):
    """The agent's computer has no power from here on."""


class Broken(AssertionError):
    """A promise was broken."""


@dataclass(frozen=True)
class Run:
    """How one seed ended. `broken` is the first broken promise, "" for none."""

    seed: int
    broken: str
    sessions: int
    lives: int
    signatures: int
    mined: int  # transactions of ours, of which
    failed: int  # reverted, for a reason the storm gave
    by_consumer: int  # sessions that the consumer ended itself


@dataclass
class Storm:
    """How bad it is, in percent of calls or blocks; 0 is off."""

    node_fails: float
    node_lags: float
    forgets: float
    full: float
    miner_waits: float
    cuts: float
    reorgs: float
    strangers: float
    closes: float
    fees: float

    @classmethod
    def of(cls, rng):
        """Each kind is off in most seeds."""

        def some(chance_percent, low, high):
            return rng.uniform(low, high) if rng.randrange(100) < chance_percent else 0.0

        return cls(
            node_fails=some(50, 1, 25), node_lags=some(40, 5, 50), forgets=some(40, 10, 70), full=some(25, 5, 40),
            miner_waits=some(40, 10, 80), cuts=some(85, 3, 15), reorgs=some(35, 2, 15), strangers=some(20, 2, 10),
            closes=some(20, 1, 6), fees=some(50, 10, 60),
        )  # fmt: skip


class World:
    """One seed, carried out."""

    def __init__(self, seed, folder):
        self.rng, self.folder = random.Random(seed), folder
        self.storm, self.is_stormy = Storm.of(self.rng), True
        self.net = FakeNet(grace_s=self.rng.choice([7_200, 72 * 3_600]))
        self.block_s = self.rng.choice([12, 60, 300])
        self.now_ms, self.lives, self.journaled = 1_000_000, 0, set()
        self.excused = False  # a reorg, a stranger or a consumer may make one of ours fail
        self.journal = None
        self.net.miner_takes = lambda tx: not self._happens(self.storm.miner_waits)  # noqa: ARG005
        self._send, self.net.send = self.net.send, self._checked_send

    def _happens(self, percent):
        return percent > 0 and self.is_stormy and self.rng.random() * 100 < percent

    def _checked_send(self, raw_tx):
        if raw_tx not in self.journaled:
            raise Broken("a transaction was sent before it was on disk")
        self._send(raw_tx)

    def between(self, name, when):
        """Around every question: faults, and the end of power."""
        if self._happens(self.storm.cuts / 10):
            raise PowerCut
        if self._happens(self.storm.node_fails / 2):
            raise Transient(f"the node is away {when} {name}")

    def lag(self):
        """A backend that is a block or two behind."""
        return self.rng.choice([1, 2]) if self._happens(self.storm.node_lags) else 0

    # ---- the agent

    def boot(self):
        """A life: from the file only."""
        if self.journal is not None:
            self.journal.close()
        self.lives += 1
        world = self

        class CutJournal(Journal):
            def append(self, event):
                if world._happens(world.storm.cuts):
                    raise PowerCut
                super().append(event)
                if isinstance(event, ev.SettlementSigned):
                    world.journaled.add(event.raw_tx)
                if world._happens(world.storm.cuts):
                    raise PowerCut

        net = self.net
        self.journal = CutJournal(self.folder / "journal.sqlite", net.domain, net.provider.address)
        policy = Policy(max_unacked_wh={"left": 50}, grace_s=net.market.grace_s)
        self.engine = Engine(self.journal, policy, lambda: self.now_ms)
        node = FakeNode(net, self.between, self.lag)
        sender = Sender(node, net.operator, net.domain.chain_id, revert_name=contract.revert_name)
        self.sends = ChainSend(self.engine, node, sender, net.domain.contract)
        watched = WatchSettings(0, 1, FINALITY)
        self.watch = ChainWatch(
            self.engine, node, net.domain, net.provider.address, watched, lambda: self.now_ms / 1000
        )

    async def turn(self):
        """A block, and what the agent does about it."""
        self._weather()
        self.net.mine(after_s=self.block_s)
        self.now_ms += self.block_s * 1000
        try:
            self.engine.observe(Beat())
            await self._at_once(self.watch.look(), self.sends.do_owed())
            await self._at_once(self.sends.do_owed())
        except PowerCut:
            self.boot()

    async def _at_once(self, *works):
        """Runners of one life: each goes on wherever another waits for the node; a power cut ends them all."""
        tasks = [asyncio.ensure_future(work) for work in works]
        pending = set(tasks)
        while pending:
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            errors = [error for task in done if (error := task.exception()) is not None]
            broken = [error for error in errors if not isinstance(error, Transient)]
            if broken:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)
                raise broken[0]

    def _weather(self):
        storm, net = self.storm, self.net
        net.forgets, net.is_full = self._happens(storm.forgets), self._happens(storm.full)
        if self._happens(storm.fees):
            net.base_fee_wei = int(GWEI * 10 ** self.rng.uniform(0, 3.5))
        if self._happens(storm.reorgs):
            self.excused = True
            net.reorg(self.rng.randint(1, FINALITY - 2), keeps=self.rng.random() < 0.5)
        if self._happens(storm.strangers):
            self.excused = True
            nonce = net.state.nonces.get(net.operator.address, 0) + self.rng.choice([0, 0, 1])
            net.put(net.operator.address, b"", nonce=nonce, to=bytes(20))
        if self._happens(storm.closes) and net.state.sessions:
            self.excused = True
            token = self.rng.choice(sorted(net.state.sessions))
            wh = self.rng.choice([0, 1, ORDERED_WH])
            net.put(net.consumer.address, contract.encode_end_connection(token, wh, net.ack(bytes(32), 0)))

    async def story(self):
        """Sessions whose energy has ended, one after the other; the storm; the calm."""
        self.is_stormy = False
        self.boot()
        self.opened = {}
        for _ in range(self.rng.randint(1, 3)):
            await self._delivered()
        self.net.mine(
            FINALITY
        )  # what happens to a `connect` that falls out of the chain is told by the whole world's storms
        self.is_stormy = True
        for _ in range(self.rng.randint(*STORM_TURNS)):
            await self.turn()
        self._calm()
        for _ in range(CALM_TURNS_MAX):
            if not self.engine.book.open_sessions():
                return
            await self.turn()
        raise Broken(f"a session never ends: {[one.stage for one in self.engine.book.open_sessions()]}")

    def _calm(self):
        self.is_stormy = False
        self.net.forgets = self.net.is_full = False
        self.net.base_fee_wei = GWEI

    async def _delivered(self):
        net, engine = self.net, self.engine
        opened = net.connected(ORDERED_WH, rate=int(10 ** self.rng.uniform(15.5, 17)))
        await self.watch.look()
        acked_wh = self.rng.randint(0, ORDERED_WH)
        sid = opened.session_id
        for event in sold(opened, engine.at_s, engine.live.life, acked_wh, net.ack(sid, acked_wh)):
            engine.accept(event)
        self.opened[sid] = (opened, acked_wh)

    # ---- promises

    def check(self):
        """At the end: each session paid once, what was acknowledged, never above its stake."""
        by_consumer = mined = failed = 0
        for sid, (opened, acked_wh) in self.opened.items():
            session = self.engine.book.sessions[sid]
            ours = self.net.settlements(opened.token)
            succeeded = [tx for ok, tx in ours if ok]
            by_consumer += not succeeded
            mined, failed = mined + len(ours), failed + len(ours) - len(succeeded)
            _promise(len(succeeded) <= 1, "two settlements of one session were mined")
            _promise(
                len(succeeded) == len(ours) or self.excused, "a settlement was mined twice, once in vain"
            )
            _promise(bool(succeeded) or self.storm.closes > 0, "nobody settled it")
            paid_wh, _ = self.net.state.ended[opened.token]
            _promise(paid_wh >= acked_wh or not succeeded, f"paid {paid_wh} of {acked_wh} Wh")
            expected = Stage.SETTLED if paid_wh >= acked_wh else Stage.STRANDED
            _promise(session.stage is expected, f"{session.stage}, but {paid_wh} of {acked_wh} Wh are paid")
        return by_consumer, mined, failed

    def check_signatures(self):
        """Never more gas than the stake, one purpose a nonce, and a bounded number of replacements."""
        nonces, counts = {}, {}
        for event in self.journal.events():
            if not isinstance(event, ev.SettlementSigned):
                continue
            session = self.engine.book.sessions[event.session_id]
            cost_wei = SignedTx.from_raw(event.raw_tx).cost_wei_max
            _promise(cost_wei <= settling.stake_wei(session), "gas above the stake was offered")
            owner = nonces.setdefault(event.nonce, event.session_id)
            _promise(owner == event.session_id or self.excused, "two sessions share a nonce")
            key = (event.session_id, event.nonce)
            counts[key] = counts.get(key, 0) + 1
        most = 1 + settling.REPLACEMENTS_MAX[Haste.URGENT]
        _promise(max(counts.values(), default=0) <= most, "replaced without end")
        return sum(counts.values())


def _promise(holds, what):
    if not holds:
        raise Broken(what)


def settled(seed):
    """Carry out one seed in a folder of its own."""
    folder = Path(tempfile.mkdtemp(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None))
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL),
        cache_logger_on_first_use=False,
    )
    world = World(seed, folder)
    broken, found, signatures = "", (0, 0, 0), 0
    try:
        asyncio.run(world.story())
        found, signatures = world.check(), world.check_signatures()
    except Broken as error:
        broken = str(error)
    finally:
        structlog.configure(**before)
        if world.journal is not None:
            world.journal.close()
        shutil.rmtree(folder)
    by_consumer, mined, failed = found
    return Run(seed, broken, len(world.opened), world.lives, signatures, mined, failed, by_consumer)
