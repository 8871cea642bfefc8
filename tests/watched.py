"""One watcher with a real engine, real nodes of ours and a fail-over, before lying nodes and one simulated truth.

    async with Watched(tmp_path, ["first", "second"]) as story:
        connect = story.connects()
        story.mines(3)
        await story.looks()
        story.expect_exactly_once()

The truth may do what a chain does (blocks, reorganisations, sessions that begin, close and end), the nodes what nodes do
(lying_node.py). `judge` listens to every event as it becomes a row: belief in what the truth does not hold is an error then
and there, whatever comes later.
"""

import asyncio
from collections import Counter
from contextlib import AsyncExitStack

from lying_node import LyingNode, SimTruth
from simulation.chain import BLOCK_S, Chain, Market, Slot, Tx

import agent.chain.websocket  # noqa: F401 - py_ecc lifts the recursion limit when it is imported: before Hypothesis looks
from agent.chain import contract
from agent.chain.failover import Endpoint, FailoverNode
from agent.chain.node import Web3Node
from agent.chain.rpc import Limits
from agent.core import events as ev
from agent.core import token as rules
from agent.core.live import Policy
from agent.core.session import Stage
from agent.core.token import NO_ACK, Domain
from agent.core.units import Address, hex0x
from agent.engine import Engine
from agent.errors import Misconfigured, Transient
from agent.journal import Journal
from agent.runners.chain_watch import ChainWatch, WatchSettings

EVP, OPERATOR, STRANGER = (Address(bytes.fromhex(two * 20)) for two in ("a1", "a2", "b1"))
DOMAIN = Domain(31_337, Address(bytes.fromhex("c0" * 20)))
T0_S = 1_790_000_000
ORDER_WH, RATE, VALIDITY_S = 1_000, 10**15, 10**6
CONFIRMATIONS, FINAL_DEPTH = 3, 12  # deeper than any reorganisation of ours
QUIET_LOOKS_MAX = 60  # once everything works again, so many blocks are more than enough
QUICK = Limits(
    connect_timeout_s=2, request_timeout_s=0.4, ping_interval_s=0.2, ping_timeout_s=0.2, close_timeout_s=0.1,
    silence_s=0.5, answer_bytes=1 << 20, range_blocks_start=16, range_blocks_max=512,
)  # fmt: skip


class Watched:
    """The story. `told` is what the fail-over told, as (event, facts)."""

    def __init__(
        self, folder, names=("first",), *, seed=0, limits=QUICK, ask_by="http", max_unfinal_wh=2_000
    ):
        self.folder, self.told, self.now_ms = folder, [], 1_000_000
        self._policy = Policy(max_unacked_wh={"left": 50}, max_unfinal_wh=max_unfinal_wh)
        self.settings = WatchSettings(0, CONFIRMATIONS, FINAL_DEPTH)
        market = Market(DOMAIN, EVP, OPERATOR, challenge_s=43_200, grace_s=259_200)
        self.chain = Chain(market, lambda: T0_S, lambda _line: None)
        self.nodes = [LyingNode(SimTruth(self.chain, FINAL_DEPTH), seed + n) for n, _ in enumerate(names)]
        self._names, self._limits, self._ask_by = names, limits, ask_by
        self._held, self._consumers, self._journal = AsyncExitStack(), 0, None
        self.look_count, self.believed, self.ended_seen, self.ended_believed = (
            0,
            Counter(),
            Counter(),
            Counter(),
        )

    async def __aenter__(self):
        async with AsyncExitStack() as held:
            for node in self.nodes:
                await held.enter_async_context(node)
            held.push_async_callback(self.stops)
            await self.starts()
            self._held = held.pop_all()
        return self

    async def __aexit__(self, *_):
        await self._held.aclose()

    async def starts(self):
        """The agent starts, or starts again on the same journal."""
        await self.stops()
        ends = [
            Endpoint(
                name,
                Web3Node(one.url_ws, one.url_http if self._ask_by == "http" else "", limits=self._limits),
            )
            for name, one in zip(self._names, self.nodes, strict=True)
        ]
        told = lambda event, **facts: self.told.append((event, facts))  # noqa: E731
        self.node = FailoverNode(ends, DOMAIN.chain_id, lambda: self.now_ms / 1000, told)
        self._journal = Journal(self.folder / "journal.sqlite", DOMAIN, EVP)
        self.engine = Engine(self._journal, self._policy, lambda: self.now_ms, self.judge)
        self.watch = ChainWatch(
            self.engine, self.node, DOMAIN, EVP, self.settings, lambda: self.now_ms / 1000
        )

    async def stops(self):
        """The agent is gone."""
        if self._journal is not None:
            self._journal.close()
            await self.node.close()

    def rows(self):
        """The journal so far."""
        return list(self._journal.events())

    # ---- the truth

    def mines(self, blocks=1):
        """So many more blocks, twelve seconds apart."""
        for _ in range(blocks):
            self.chain.mine(self.chain.head.timestamp_s + BLOCK_S)

    def _sends(self, sender, nonce, data):
        tx = Tx(sender, nonce, data, rules.keccak(sender + bytes([nonce]) + data))
        self.chain.send(tx)

    def connects(self, provider=EVP):
        """A consumer of its own connects, in the next block; who."""
        self._consumers += 1
        consumer = Address(rules.keccak(self._consumers.to_bytes(8, "big"))[:20])
        self.chain.wins(consumer, Slot(1, provider, ORDER_WH, RATE, VALIDITY_S))
        self._sends(consumer, 0, contract.encode_connect(provider, ORDER_WH))
        return consumer

    def concedes(self, consumer, energy_wh=ORDER_WH):
        """It ends (the whole order) or closes (less); nothing when it is not connected just now."""
        token = self.chain.state.opened.get((consumer, 1))
        waits = (consumer, 1) in self.chain.pool
        if token is not None and not waits and self.chain.state.nonces.get(consumer) == 1:
            self._sends(consumer, 1, contract.encode_end_connection(token, energy_wh, NO_ACK))

    def token_of(self, consumer):
        """Its token now."""
        return self.chain.state.opened[consumer, 1]

    def session_of(self, consumer):
        """The agent's session with this consumer; None while there is none."""
        found = [s for s in self.engine.book.sessions.values() if s.terms.consumer == consumer]
        return found[0] if found else None

    def canonical(self, kind):
        """{token: (block hash, log index)} of every such event of ours that the truth holds."""
        found = {}
        for log in self.nodes[0].truth._typed._matching(self.chain.blocks, [[contract.topic_of(kind)]]):
            entry = contract.decode_log(log.address, log.topics, log.data)
            if entry.provider == EVP:
                found[entry.token] = (log.block_hash, log.log_index)
        return found

    def filter_of(self, kind):
        """A query for every such log."""
        return {
            "address": hex0x(DOMAIN.contract), "topics": [hex0x(contract.topic_of(kind))],
            "fromBlock": "0x0", "toBlock": "latest",
        }  # fmt: skip

    # ---- the agent

    async def looks(self, times=1):
        """Look, as often as hints might come. Returns whether the last one went through."""
        went_well = False
        for _ in range(times):
            self.look_count += 1
            self.now_ms += 100
            try:
                await self.watch.look()
                went_well = True
            except Transient:
                went_well = False
            except (
                Misconfigured
            ):  # nobody is left on our chain: the daemon ends, its owner mends that and starts it
                went_well = False
                for node in self.nodes:
                    node.faults.chain_id, node.faults.genesis = 0, ""
                await self.starts()
        return went_well

    async def comes_to_rest(self):
        """Every node is good again and blocks come: until the view is the truth's, and everything in it final."""
        for node in self.nodes:
            await node.restart()
            node.heal()
        quiet = 0
        for _ in range(QUIET_LOOKS_MAX):
            self.mines(1)
            quiet += await self.looks()
            if quiet > 2 * FINAL_DEPTH + CONFIRMATIONS + 2:
                return
        raise AssertionError(f"no rest: {self.told[-5:]}")

    def judge(self, event, before, after):
        """Every row, as it is written, against the truth of this moment."""
        at = {block.block_hash: block.number for block in self.chain.blocks}
        match event:
            case ev.ConnectedBelieved():
                terms = before.pending[event.session_id]
                self.believed[terms.block_hash, terms.log_index] += 1
                assert event.block_hash in at, "believed in a block that is not in the chain"
                assert self.chain.head.number - at[event.block_hash] + 1 >= CONFIRMATIONS
            case ev.ConnectedFinal():
                assert self.chain.head.number - at[event.block_hash] + 1 >= FINAL_DEPTH
            case ev.ConnectedOrphaned() if (
                event.session_id in before.sessions and event.session_id not in before.pending
            ):
                assert event.block_hash not in at, "orphaned, though it is in the chain"
            case ev.ConnectionEndedSeen():
                self.ended_seen[event.session_id, event.block_hash] += 1
            case ev.ConnectionEndedOrphaned():
                assert event.block_hash not in at
            case ev.ConnectionEndedBelieved():
                assert self.chain.head.number - at[event.block_hash] + 1 >= FINAL_DEPTH
                self.ended_believed[event.session_id] += 1

    def expect_exactly_once(self):
        """After all that: what the truth holds is believed, once; nothing else is."""
        assert set(self.believed.values()) <= {1}, "believed twice"
        assert set(self.ended_seen.values()) <= {1}, "an end taken twice"
        assert set(self.ended_believed.values()) <= {1}, "an end believed twice"
        opened, ended = self.canonical(contract.SessionOpened), self.canonical(contract.ConnectionEnded)
        sessions = {session.terms.token: session for session in self.engine.book.sessions.values()}
        for token, place in opened.items():
            session, state = sessions.get(token), self.chain.state.sessions.get(token)
            if state is not None:
                assert self.believed[place] == 1, "missed"
                assert session is not None and session.final  # noqa: PT018
                assert session.stage is not Stage.ORPHANED
                assert (session.closing_at_s == state.settle_at_s) is state.closing, (
                    "a close missed, or invented"
                )
            elif self.believed[place]:
                assert session.stage in (Stage.SETTLED, Stage.STRANDED)
                assert session.ended.block_hash == ended[token][0]
        for token, session in sessions.items():
            assert token in opened or session.stage is Stage.ORPHANED, "kept, though it is not in the chain"
        assert not self.engine.book.pending

    def lies(self):
        """The names of the lies that were told, with the endpoints they were told of."""
        return {(event, facts.get("node", facts.get("left"))) for event, facts in self.told}


async def until(holds, seconds=40):
    """Wait for something that nobody announces."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - nobody would set an event
            await asyncio.sleep(0.01)
