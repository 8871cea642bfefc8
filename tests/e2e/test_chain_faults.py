"""Every session once, on anvil: reorganisations, a chain set back, `kill -9`, hours away, and a provider that limits and lies.

The watcher is the real one with a real journal, over WebSocket, before a lying node (lying_node.py) with anvil behind it. The
systematic sister of these stories is tests/agent/runners/test_chain_watch_faults.py, on a simulated chain.
"""

import asyncio
import json
import time
from collections import Counter
from contextlib import ExitStack, suppress

import pytest
from bazaar import Bazaar
from lying_node import LyingNode, UpstreamTruth
from stage import ANVIL, Anvil, Program, Stage, eventually, free_port, note
from watched import QUICK, until

from agent.chain import contract
from agent.chain.failover import Endpoint, FailoverNode
from agent.chain.node import Web3Node
from agent.core import events as ev
from agent.core.session import Stage as Life
from agent.demo import market as setup
from agent.demo.devnet import address_from_key, derive_key
from agent.errors import Transient
from agent.runners import chain_watch
from agent.runners.chain_watch import ChainWatch, WatchSettings

CONFIRMATIONS, FINAL_DEPTH = 2, 12

pytestmark = [pytest.mark.timeout(240), pytest.mark.skipif(ANVIL is None, reason="anvil is not installed")]


class StatefulAnvil(Anvil):
    """It mines a block a transaction, and keeps its state in a file: killed and started again, it is the same chain."""

    def __init__(self, folder, labels, port):
        self.seed, self.port = "faults", port
        self.accounts = {label: address_from_key(derive_key(self.seed, label)) for label in labels}
        self.url_ws, self.url_http = f"ws://127.0.0.1:{port}", f"http://127.0.0.1:{port}"
        options = ("--port", port, "--chain-id", self.chain_id, "--accounts", 1, "--state-interval", 1)
        Program.__init__(self, [ANVIL, *options, "--state", folder / "state.json"], folder, "anvil")

    def ready(self):
        """Until it listens; coins only on the first day."""
        self.heard("Listening on")
        if int(self.ask("eth_blockNumber"), 16) == 0:
            super().ready()


class AnvilNet:
    """What a Bazaar needs of a Devnet, by JSON-RPC."""

    def __init__(self, folder, labels):
        self._folder, self._labels, self._port = folder, labels, free_port()
        self.methods = self

    async def __aenter__(self):
        self.anvil = StatefulAnvil(self._folder, self._labels, self._port).__enter__()
        self.accounts, self.chain_id = self.anvil.accounts, self.anvil.chain_id
        self.key, self.address, self.seed = self.anvil.key, self.anvil.address, self.anvil.seed
        self.url_ws, self.url_http = self.anvil.url_ws, self.anvil.url_http
        return self

    async def __aexit__(self, *_):
        self.anvil.__exit__()

    @property
    def now_s(self):
        """The newest block's time."""
        return int(self.anvil.ask("eth_getBlockByNumber", "latest", not "full")["timestamp"], 16)

    def increase_time(self, seconds):
        """The next block comes so much later."""
        self.anvil.ask("evm_increaseTime", seconds)

    def mine(self, blocks=1):
        """Empty blocks."""
        self.anvil.ask("anvil_mine", hex(blocks))

    async def killed_and_back(self):
        """`kill -9`, once its newest block is in its file; and the same chain again."""
        head, state = self.anvil.ask("eth_blockNumber"), self._folder / "state.json"
        written_at = time.time()
        await until(lambda: state.exists() and state.stat().st_mtime > written_at + 1)
        self.anvil.kill()
        self.anvil.__exit__()
        await self.__aenter__()
        assert self.anvil.ask("eth_blockNumber") == head


class Scene(Bazaar):
    """The market on anvil, and an agent that watches it through a lying node."""

    def __init__(self, folder):
        super().__init__(folder)
        self.net = AnvilNet(folder, setup.labels(("alice",), "carol"))

    async def __aenter__(self):
        await super().__aenter__()
        self.liar = await LyingNode(UpstreamTruth(self.net.url_http)).__aenter__()
        ends = [Endpoint("liar", Web3Node(self.liar.url_ws, limits=QUICK))]
        self.watched = FailoverNode(ends, self.net.chain_id, time.monotonic)
        self.agent = self.engine()
        settings = WatchSettings(self.start_block, CONFIRMATIONS, FINAL_DEPTH)
        self.watch = ChainWatch(self.agent, self.watched, self.domain, self.evp, settings, time.monotonic)
        self.running = asyncio.create_task(self.watch.run())
        return self

    async def __aexit__(self, *_):
        self.running.cancel()
        await asyncio.gather(self.running, return_exceptions=True)
        await self.watched.close()
        await self.liar.__aexit__()
        await super().__aexit__()

    def stage(self, opened):
        """Where a session stands."""
        session = self.agent.book.sessions.get(opened.session_id)
        return None if session is None else session.stage

    async def believes(self, opened):
        """Deep enough, and matched under the token that it has now."""
        self.net.mine(CONFIRMATIONS)
        await until(lambda: self.stage(opened) is Life.MATCHED)

    async def reconnects(self, opened):
        """The same auction's `connect` once more, after a reorganisation dropped it: the same session."""
        state = await self.node.call(self.address, contract.encode_auctions(self.consumer.address))
        late_s = contract.decode_auctions(state).closing_time_s - self.net.now_s
        self.net.increase_time(hex(max(0, late_s) + 1))  # the blocks that were replaced had waited for it
        self.net.mine()
        receipt = await self.send(self.consumer.signer, contract.encode_connect(self.evp, opened.energy_wh))
        logs = (contract.decode_log(log.address, log.topics, log.data) for log in receipt.logs)
        return next(log for log in logs if isinstance(log, contract.SessionOpened))

    async def expect_exactly_once(self):
        """What the chain holds, as anvil itself tells, is believed, each once; what it does not hold is orphaned."""
        self.net.mine(FINAL_DEPTH)
        topics = [contract.topic_of(contract.SessionOpened)]
        head = await self.node.head()
        raws = [
            raw
            async for page in self.node.log_pages(self.address, topics, 0, head.number)
            for raw in page.logs
        ]
        tokens = {contract.decode_log(raw.address, raw.topics, raw.data).token for raw in raws}
        await until(
            lambda: all(s.final for s in self.agent.book.sessions.values() if s.terms.token in tokens)
        )
        believed = Counter(row.block_hash for row in self.rows() if isinstance(row, ev.ConnectedBelieved))
        assert {raw.block_hash for raw in raws} <= set(believed), "missed"
        assert set(believed.values()) == {1}, "repeated"
        for session in self.agent.book.sessions.values():
            assert (session.terms.token in tokens) is (session.stage is not Life.ORPHANED)
        note(
            f"{self.folder.name}: {len(raws)} sessions, {len(believed)} times believed, {self.liar.calls.total()} requests"
        )


@pytest.fixture
async def scene(tmp_path, monkeypatch):
    """A watcher that tries again soon."""
    monkeypatch.setattr(chain_watch, "BACKOFF_S", (0.05, 0.2))
    monkeypatch.setattr(chain_watch, "LOOK_EVERY_S", 0.5)
    async with Scene(tmp_path) as scene:
        yield scene


async def test_reorganisations_one_to_ten_deep(scene):
    """Would catch a session believed on a block that anvil dropped without any `removed` log, or not believed again."""
    for depth in (1, 2, 5, 10):
        opened = await scene.connects()
        await scene.believes(opened)
        scene.net.mine(max(0, depth - CONFIRMATIONS - 1))
        scene.net.anvil.ask("anvil_reorg", depth, [])
        scene.net.mine(1)
        if depth <= CONFIRMATIONS:
            continue  # the block of `connect` was below it
        await until(lambda sid=opened: scene.stage(sid) is Life.ORPHANED)
        again = await scene.reconnects(opened)
        assert again.session_id == opened.session_id
        await scene.believes(again)
    await scene.expect_exactly_once()


async def test_a_chain_that_is_set_back(scene):
    """Would catch a watcher that waits for ever above the new head, or keeps what is not there any more."""
    kept = await scene.connects()
    await scene.believes(kept)
    snapshot = scene.net.anvil.ask("evm_snapshot")
    lost = await scene.connects()
    await scene.believes(lost)
    scene.net.anvil.ask("evm_revert", snapshot)
    scene.net.mine(20)
    await until(lambda: scene.stage(lost) is Life.ORPHANED)
    other = await scene.connects(energy_wh=300)  # the same auction number, another session word
    await scene.believes(other)
    assert scene.stage(kept) is Life.MATCHED
    await scene.expect_exactly_once()


async def test_a_node_that_is_killed_and_comes_back(scene):
    """Would catch a subscription that is not opened anew after `kill -9`, and what happened around it lost or repeated."""
    before = await scene.connects()
    await scene.believes(before)
    unseen = await scene.connects()
    await scene.net.killed_and_back()
    with suppress(Transient):
        await scene.node.head()  # the test's own connection has to notice, too
    after = await scene.connects()
    await scene.believes(after)
    assert scene.stage(before) is scene.stage(unseen) is Life.MATCHED
    await scene.expect_exactly_once()


async def test_hours_away_from_a_provider_that_limits_and_lies(scene):
    """Would catch a catch-up that a hosted node's limits stop, or that believes its first answer."""
    opened = [await scene.connects()]
    await scene.believes(opened[0])
    await scene.liar.kill()
    for _ in range(3):
        opened.append(await scene.connects())
        scene.net.mine(300)
    scene.net.anvil.ask("anvil_reorg", 10, [])
    scene.net.mine(CONFIRMATIONS)
    faults, once = scene.liar.faults, scene.liar.once
    faults.range_blocks, faults.shuffles, faults.repeats = 100, True, True
    once.update({"omit": 2, "-32005": 1, "internal": 1, "cut": 1, "timeout": 1})
    await scene.liar.restart()
    blocks = asyncio.create_task(blocks_come(scene))
    await until(lambda: all(scene.stage(one) is Life.MATCHED for one in opened), 120)
    blocks.cancel()
    await scene.expect_exactly_once()


async def blocks_come(scene):
    """One every second: what was left out is found with the next."""
    while True:
        scene.net.mine(1)
        await asyncio.sleep(1)


def test_the_daemon_names_the_liar_and_goes_on_with_the_other(tmp_path):
    """Would catch a lie that is known inside and that no owner ever reads: the log of the real daemon says who and what."""
    with Stage(tmp_path, broker=False) as stage, ExitStack() as held:
        liar = stage.enter(held, LyingNode(UpstreamTruth(stage.net.url_http)))
        urls = json.dumps([liar.url_ws, stage.net.url_ws])
        agent = stage.agent(stage.charger(), CHAIN__URLS=urls).started()
        eventually(lambda: liar.calls["eth_getLogs"], 40, "the agent asks the preferred node")
        stage.do(told_to(liar, "garbage"))
        eventually(lambda: "chain.failover" in agent.events(), 40, "the agent leaves it")
        lines = [json.loads(line) for line in agent.said.splitlines() if line.startswith("{")]
        (lie, *_) = [line for line in lines if line["event"] == "chain.nonsense"]
        assert lie["node"] == liar.url_ws
        asked = liar.calls["eth_getLogs"]
        block = int(stage.net.ask("eth_blockNumber"), 16)
        eventually(lambda: int(stage.net.ask("eth_blockNumber"), 16) > block + 2, 40, "blocks come")
        assert agent.is_running
        assert liar.calls["eth_getLogs"] == asked


async def told_to(liar, fault):
    """From now on, always."""
    liar.once[fault] = 10**6


async def test_the_truth_is_away():
    """Would catch a liar of ours that answers though nobody is behind it: then these stories would prove nothing."""
    async with (
        LyingNode(UpstreamTruth(f"http://127.0.0.1:{free_port()}")) as liar,
        Web3Node(liar.url_ws) as node,
    ):
        with pytest.raises(Transient):
            await node.chain_id()
