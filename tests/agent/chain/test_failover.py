"""Several nodes as one: an owner's second node must take over without a missed event, and a wrong one must never be believed."""

from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from bazaar import Bazaar
from tcp_proxy import TcpProxy

from agent.chain.failover import OLD_HEAD_BLOCKS, STANDSTILL_S, Endpoint, FailoverNode
from agent.chain.node import Header, LogPage, RawLog, Web3Node
from agent.chain.rpc import Limits
from agent.core import events as ev
from agent.core.units import Address, BlockHash, TxHash
from agent.errors import Misconfigured, Refused, Transient
from agent.runners.chain_watch import ChainWatch, WatchSettings

CHAIN_ID = 7
GENESIS = BlockHash(b"g" * 32)
MARKET = b"m" * 20
QUICK = Limits(connect_timeout_s=1, request_timeout_s=1, ping_interval_s=0.2, ping_timeout_s=0.2, silence_s=1)


def header_at(number):
    """The same chain for everybody: a block is its number."""
    return Header(number, BlockHash(number.to_bytes(32, "big")), BlockHash(bytes(32)), 1_000 + number)


def log_at(number):
    """One log in every block."""
    block = header_at(number)
    return RawLog(Address(MARKET), (), b"", number, block.block_hash, TxHash(block.block_hash), 0)


class FakeNode:
    """A node as the story wants it: away, behind, on another chain, tired after a few pages."""

    def __init__(self, height=100, chain_id=CHAIN_ID, genesis=GENESIS):
        self.height, self.its_chain_id, self.its_genesis = height, chain_id, genesis
        self.is_away, self.pages_left, self.refuses = False, 10**6, ""
        self.asked, self.closed, self.watches_broken = [], False, False

    def _here(self, what):
        self.asked.append(what)
        if self.is_away:
            raise Transient("away")

    async def chain_id(self):
        """As the node says."""
        self._here("chain_id")
        return self.its_chain_id

    async def genesis_hash(self):
        """As the node says."""
        self._here("genesis_hash")
        return self.its_genesis

    async def head(self):
        """Its newest."""
        self._here("head")
        return header_at(self.height)

    async def log_pages(self, address, topics, from_block, to_block):
        """Pages of ten; a node that is behind says nothing of what it does not know, as real ones do."""
        self._here("log_pages")
        for first in range(from_block, to_block + 1, 10):
            if self.pages_left == 0:
                raise Transient("tired")
            self.pages_left -= 1
            last = min(first + 9, to_block)
            yield LogPage(first, last, tuple(log_at(n) for n in range(first, min(last, self.height) + 1)))

    async def send_raw(self, raw_tx):
        """Taken, or refused by name."""
        self._here("send_raw")
        if self.refuses:
            raise Refused(self.refuses, "no")
        return TxHash(raw_tx)

    @asynccontextmanager
    async def watch(self, address, topics):
        """Hints that end at once."""
        self._here("watch")

        async def hints():
            raise Transient("the watch ended")
            yield

        yield hints()

    async def close(self):
        """Remember it."""
        self.closed = True


class Scene:
    """Two nodes, one of them perhaps for requests only, and a clock."""

    def __init__(self, first=None, second=None, *, second_can_watch=True):
        self.first, self.second = first or FakeNode(), second or FakeNode()
        self.now_s, self.told = 0.0, []
        self.node = FailoverNode(
            [Endpoint("first", self.first), Endpoint("second", self.second, can_watch=second_can_watch)],
            CHAIN_ID,
            lambda: self.now_s,
            lambda event, **facts: self.told.append((event, facts)),
        )

    async def logged(self, from_block, to_block):
        """The numbers of the blocks whose logs came, in order."""
        pages = self.node.log_pages(MARKET, [], from_block, to_block)
        return [log.block_number async for page in pages for log in page.logs]


async def test_the_preferred_node_is_asked_while_it_answers_and_left_when_it_does_not():
    """Would catch a second node that is never used, one that is asked all the time, and a return in mid-flight."""
    scene = Scene()
    await scene.node.head()
    assert not scene.second.asked
    scene.first.is_away = True
    assert (await scene.node.head()).number == 100
    assert [(facts["left"], facts["to"]) for _, facts in scene.told] == [("first", "second")]
    scene.first.is_away = False
    count = len(scene.first.asked)
    await scene.node.head()
    assert len(scene.first.asked) == count, "sticky"
    scene.second.is_away = True
    assert (await scene.node.head()).number == 100


async def test_with_nobody_left_it_says_so_and_tries_everybody_again():
    """Would catch an endless round, and a node that is given up for good."""
    scene = Scene()
    scene.first.is_away = scene.second.is_away = True
    with pytest.raises(Transient, match="away"):
        await scene.node.head()
    assert len(scene.first.asked) + len(scene.second.asked) == 2
    scene.second.is_away = False
    assert (await scene.node.head()).number == 100
    await scene.node.close()
    assert scene.first.closed
    assert scene.second.closed


@pytest.mark.parametrize("wrong", [{"chain_id": 8}, {"genesis": BlockHash(b"x" * 32)}])
async def test_a_node_of_another_chain_is_named_and_never_believed(wrong):
    """Would catch sessions of a test network sold for real, after a provider changed what is behind an address."""
    scene = Scene(second=FakeNode(height=999, **wrong))
    await scene.node.head()
    scene.first.is_away = True
    with pytest.raises(Transient):
        await scene.node.head()
    assert "chain.other_chain" in [event for event, _ in scene.told]
    assert "head" not in scene.second.asked
    scene.first.is_away = False
    assert (await scene.node.head()).number == 100


async def test_a_chain_that_changes_behind_an_address_is_left_for_the_other_node():
    """Would catch a daemon that ends as misconfigured because one of its two nodes was moved to another chain."""
    scene = Scene()
    await scene.node.head()
    scene.first.its_chain_id, scene.first.height = 8, 999
    assert await scene.node.chain_id() == CHAIN_ID
    assert (await scene.node.head()).number == 100


async def test_only_nodes_of_another_chain_are_the_owners_mistake():
    """Would catch a daemon that waits for ever on a wrong chain id."""
    with pytest.raises(Misconfigured, match="first serves chain 8"):
        await Scene(FakeNode(chain_id=8), FakeNode(chain_id=9)).node.head()


async def test_logs_go_on_at_the_next_node_where_one_broke_off():
    """Would catch an event lost or repeated at the seam."""
    scene = Scene()
    scene.first.pages_left = 3
    assert await scene.logged(1, 95) == list(range(1, 96))
    scene.second.pages_left = 2
    scene.first.pages_left = 1
    with pytest.raises(Transient):
        await scene.logged(1, 95)


async def test_a_node_that_is_behind_is_not_asked_for_what_it_cannot_have():
    """Would catch the silence of a node that has not seen a block yet, taken for a block without events."""
    scene = Scene(second=FakeNode(height=50))
    await scene.node.head()
    scene.first.is_away = True
    with pytest.raises(Transient):
        await scene.logged(1, 100)
    assert "log_pages" not in scene.second.asked
    scene.second.height = 100
    assert await scene.logged(1, 100) == list(range(1, 101))


async def test_a_node_that_stands_still_is_left_for_one_that_moves():
    """Would catch a view that grows old beside a node that knows better; and a swarm of questions while nobody moves."""
    scene = Scene(second=FakeNode(height=105))
    assert (await scene.node.head()).number == 100
    scene.now_s = STANDSTILL_S - 1
    assert (await scene.node.head()).number == 100
    scene.now_s = STANDSTILL_S + 1
    assert (await scene.node.head()).number == 105
    assert await scene.logged(101, 105) == [101, 102, 103, 104, 105]
    asked = len(scene.first.asked)
    scene.now_s += STANDSTILL_S + 1  # nobody moves: an outage of the chain
    for _ in range(5):
        assert (await scene.node.head()).number == 105
    assert len(scene.first.asked) <= asked + 3


async def test_a_head_that_falls_far_back_is_named_once_and_left():
    """Would catch an old head served as new, believed or only wondered at; and a line in the log with every look at it."""
    scene = Scene(second=FakeNode(height=101))
    await scene.node.head()
    scene.first.height = 100 - OLD_HEAD_BLOCKS  # a backend that is a little behind is no liar
    await scene.node.head()
    assert not scene.told
    scene.first.height -= 1
    assert (await scene.node.head()).number == 101
    scene.second.height = 50
    for _ in range(3):
        await scene.node.head()
    named = [facts["node"] for event, facts in scene.told if event == "chain.old_head"]
    assert named == ["first", "second"]


async def test_whoever_is_distrusted_is_named_and_left():
    """Would catch a lie that only the watcher can see and that leads nowhere; alone, it is told all the same."""
    scene = Scene()
    scene.node.distrust("chain.hidden_close", block=7)
    assert scene.told[0] == ("chain.hidden_close", {"node": "first", "block": 7})
    await scene.node.head()
    assert "head" in scene.second.asked
    told = []
    alone = FailoverNode(
        [Endpoint("only", FakeNode())], CHAIN_ID, lambda: 0.0, lambda event, **_: told.append(event)
    )
    alone.distrust("chain.forged_log")
    assert told == ["chain.forged_log"]
    assert (await alone.head()).number == 100


async def test_two_endpoints_of_one_provider_have_two_names():
    """Would catch a log that names a liar, and leaves open which of two keys at the same host it is."""
    first, second, told = FakeNode(), FakeNode(), []
    ends = [
        Endpoint("wss://host", first),
        Endpoint("wss://host", second),
        Endpoint("wss://other", FakeNode()),
    ]
    node = FailoverNode(ends, CHAIN_ID, lambda: 0.0, lambda _event, **facts: told.append(facts))
    first.is_away = True
    await node.head()
    assert (told[0]["left"], told[0]["to"]) == ("wss://host (1)", "wss://host (2)")
    assert ends[2].name == "wss://other"


async def test_a_named_refusal_is_an_answer():
    """Would catch `nonce too low` shopped around until some node takes it."""
    scene = Scene()
    scene.first.refuses = "nonce_too_low"
    with pytest.raises(Refused, match="nonce_too_low"):
        await scene.node.send_raw(b"raw")
    assert "send_raw" not in scene.second.asked


async def test_a_watch_that_ends_is_opened_at_the_next_node_that_can():
    """Would catch hints sought for ever at a node that has none, or at one that serves requests only."""
    scene = Scene()
    for _ in range(3):
        with pytest.raises(Transient):
            async with scene.node.watch(MARKET, []) as hints:
                await anext(hints)
    assert (scene.first.asked.count("watch"), scene.second.asked.count("watch")) == (2, 1)
    scene = Scene(second_can_watch=False)
    for _ in range(2):
        with pytest.raises(Transient):
            async with scene.node.watch(MARKET, []) as hints:
                await anext(hints)
    assert (scene.first.asked.count("watch"), scene.second.asked.count("watch")) == (2, 0)


@pytest.mark.timeout(120)
async def test_a_watcher_loses_its_node_and_no_event(tmp_path):
    """Would catch a take-over that works for fakes only: real WebSockets, one of them dead in the middle."""
    async with Bazaar(tmp_path) as bazaar, AsyncExitStack() as held:
        first = await held.enter_async_context(TcpProxy(bazaar.net.port))
        nodes = [Web3Node(f"ws://127.0.0.1:{port}", limits=QUICK) for port in (first.port, bazaar.net.port)]
        ends = [Endpoint(name, node) for name, node in zip(("first", "second"), nodes, strict=True)]
        node = FailoverNode(ends, bazaar.net.chain_id, lambda: 0.0)
        held.push_async_callback(node.close)
        settings = WatchSettings(bazaar.start_block, 1, 1)
        engine = bazaar.engine()
        watch = ChainWatch(engine, node, bazaar.domain, bazaar.evp, settings, lambda: 0.0)
        opened = [await bazaar.connects(energy_wh=200)]
        await watch.look()
        first.freeze()
        opened.append(await bazaar.connects(energy_wh=300))
        await watch.look()
        seen = [row.terms.session_id for row in bazaar.rows() if isinstance(row, ev.ConnectedSeen)]
        assert seen == [one.session_id for one in opened]
