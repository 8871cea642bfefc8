"""Never misses, never repeats: whatever chain, node and network do, each event is believed once, and none once orphaned."""

import asyncio
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lying_node import ONCE
from watched import CONFIRMATIONS, EVP, FINAL_DEPTH, STRANGER, Watched, until

from agent.chain import contract
from agent.chain.rpc import Rationed
from agent.core import events as ev
from agent.core.session import Stage
from agent.runners import chain_watch

REORG_DEPTH_MAX = 10
CALLS_PER_LOOK_MAX = 400  # of a look over some hundred blocks, seven at a time, with all its sessions

LASTING = (
    "range_blocks",
    "results",
    "behind",
    "logs_behind",
    "shuffles",
    "repeats",
    "chain_id",
    "genesis",
    "half_open",
)
VALUES = {
    "range_blocks": 7,
    "results": 3,
    "behind": 5,
    "logs_behind": 4,
    "chain_id": 5,
    "genesis": "0x" + "77" * 32,
}
REORGS = ("reorg", "reorg for good")  # what was in the blocks comes again, or never
DEEDS = ("nothing", "connects", "connects", "ends", "closes", "offline", "restarts", "kill", "heal", *REORGS)
STEPS = st.tuples(  # something happens, then so many blocks come, then perhaps a look
    st.sampled_from((*DEEDS, *DEEDS, *ONCE, *LASTING)),
    st.integers(1, REORG_DEPTH_MAX),
    st.integers(0, 3),
    st.booleans(),
)


async def does(story, deed, number):
    """One line of a schedule."""
    consumers = [block_mined.tx.sender for _, block_mined in story.chain.mined()]
    node = story.nodes[number % len(story.nodes)]
    match deed:
        case "connects":
            story.connects(STRANGER if number == 1 else EVP)
        case "ends" | "closes" if consumers:
            story.concedes(consumers[number % len(consumers)], 1_000 if deed == "ends" else 10)
        case "reorg" | "reorg for good":
            story.chain.reorg(number, keeps=lambda _tx: deed == "reorg")
        case "offline":
            story.mines(12 * number)
        case "restarts":
            await story.starts()
        case "kill":
            await node.kill()
        case "heal":
            await node.restart()
            node.heal()
        case _ if deed in ONCE:
            node.once[deed] += 1
        case "genesis" if story.watch._looked is None:
            pass  # who is asked first names the beginning
        case _ if deed in LASTING:
            setattr(node.faults, deed, VALUES.get(deed, True))


async def told(schedule, names, ask_by, seed):
    """The whole story, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        async with Watched(Path(folder), names, seed=seed, ask_by=ask_by) as story:
            story.connects()
            for deed, number, blocks, looks in schedule:
                await does(story, deed, number)
                story.mines(blocks)
                await story.looks(int(looks))
            await story.comes_to_rest()
            story.expect_exactly_once()
            asked = sum(sum(node.calls.values()) for node in story.nodes)
            assert asked <= CALLS_PER_LOOK_MAX * story.look_count


@pytest.mark.timeout(900)
def test_every_event_once_whatever_happens(request):
    """Would catch an event missed, repeated, or believed after it was orphaned, under any schedule of faults."""

    @settings(
        max_examples=600 if request.config.getoption("--long") else 25,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(
        st.lists(STEPS, min_size=6, max_size=30),
        st.sampled_from([("only",), ("first", "second")]),
        st.sampled_from(["http", "ws"]),
        st.integers(0, 99),
    )
    def once(schedule, names, ask_by, seed):
        asyncio.run(told(schedule, names, ask_by, seed))

    once()


# ---- one fault each, so that its name is known when it comes back


async def test_logs_that_were_left_out_once_are_found_by_the_second_reading(tmp_path):
    """Would catch a cursor that passes a range after one reading: a lagging backend's silence would be the last word."""
    async with Watched(tmp_path) as story:
        consumer = story.connects()
        story.mines(150)
        story.nodes[0].once["omit"] = 2
        assert await story.looks()
        assert story.session_of(consumer) is None
        story.mines(1)
        assert await story.looks()
        assert story.session_of(consumer).stage is Stage.MATCHED


async def test_a_backend_that_is_behind_orphans_nobody(tmp_path):
    """Would catch power that is cut because a hosted node's other backend has not seen the session's block yet."""
    async with Watched(tmp_path) as story:
        consumer = story.connects()
        story.mines(CONFIRMATIONS)
        await story.looks()
        story.nodes[0].faults.behind = CONFIRMATIONS + 2
        story.mines(1)
        assert await story.looks()
        assert story.session_of(consumer).stage is Stage.MATCHED
        assert not [row for row in story.rows() if isinstance(row, ev.ConnectedOrphaned)]


async def test_a_close_that_came_before_we_believed_the_session_is_known_with_it(tmp_path):
    """Would catch energy for a session that is closing: its log was read when there was no session to tell."""
    async with Watched(tmp_path) as story:
        consumer = story.connects()
        story.mines(1)
        story.concedes(consumer, 10)
        story.mines(100)
        await story.looks()
        assert (
            story.session_of(consumer).closing_at_s
            == story.chain.state.sessions[story.token_of(consumer)].settle_at_s
        )


async def test_a_log_of_a_block_that_is_no_more_leaves_no_trace(tmp_path):
    """Would catch a node that serves dropped blocks by hash: two rows on the disk with every look, for nothing."""
    async with Watched(tmp_path) as story:
        consumer = story.connects()
        story.mines(2)
        (log,) = await story.nodes[0].truth.ask(
            "eth_getLogs",
            [story.filter_of(contract.SessionOpened)],
        )
        story.chain.reorg(2, keeps=lambda _tx: False)
        story.nodes[0].faults.forges = log
        story.mines(CONFIRMATIONS)
        await story.looks(2)
        assert story.session_of(consumer) is None
        assert not [row for row in story.rows() if isinstance(row, ev.ConnectedSeen)]
        assert not story.lies(), "a reorganisation between two questions looks the same"


async def test_a_catch_up_that_breaks_off_goes_on_where_it_was(tmp_path):
    """Would catch a long catch-up over a bad link that begins anew with every tunnel, and never ends."""
    async with Watched(tmp_path) as story:
        consumers = [story.connects()]
        story.mines(400)
        consumers.append(story.connects())
        story.mines(CONFIRMATIONS)
        node = story.nodes[0]
        node.faults.range_blocks, node.faults.cuts_every = 8, 10
        while not await story.looks():
            assert story.look_count < 20, "it never gets there"
        assert all(story.session_of(one).stage is Stage.MATCHED for one in consumers)


async def test_more_sessions_at_once_than_the_book_holds_pending(tmp_path):
    """Would catch the sixty-fifth session of a catch-up dropped without a word."""
    async with Watched(tmp_path) as story:
        consumers = [story.connects() for _ in range(80)]
        story.mines(CONFIRMATIONS)
        assert await story.looks()
        assert all(story.session_of(one) is not None for one in consumers)


# ---- connections: the real loop, over WebSocket


@pytest.fixture
def hasty(monkeypatch):
    """A watcher that tries again soon."""
    monkeypatch.setattr(chain_watch, "BACKOFF_S", (0.02, 0.1))
    monkeypatch.setattr(chain_watch, "LOOK_EVERY_S", 0.3)


async def killed(story):
    """The process behind the port dies, and comes back."""
    await story.nodes[0].kill()
    story.mines(20)
    await story.nodes[0].restart()


async def closed(story):
    """A polite end, without any exception in web3."""
    await story.nodes[0].hang_up(1000)


async def half_open(story):
    """A tunnel."""
    node = story.nodes[0]
    node.faults.half_open = True
    asked = node.calls.total()
    story.mines(20)
    await until(lambda: node.calls.total() > asked or not node._sockets)
    node.faults.half_open = False


async def forgotten(story):
    """The link lives, the subscription does not."""
    story.nodes[0].forget_subscriptions()


async def for_hours(story):
    """Offline, with a chain that went on and turned out otherwise."""
    await story.nodes[0].kill()
    story.mines(600)
    story.chain.reorg(10)
    await story.nodes[0].restart()


@pytest.mark.parametrize("lost", [killed, closed, half_open, forgotten, for_hours])
@pytest.mark.usefixtures("hasty")
async def test_no_end_of_a_connection_costs_an_event(tmp_path, lost):
    """Would catch a loop that ends, hangs, or goes on without what happened meanwhile."""
    async with Watched(tmp_path, ask_by="ws") as story:
        running = asyncio.create_task(story.watch.run())
        try:
            first = story.connects()
            story.mines(CONFIRMATIONS)
            await until(lambda: story.session_of(first))
            second = story.connects()
            await lost(story)
            story.mines(CONFIRMATIONS)
            await until(lambda: story.session_of(second))
            story.concedes(first)
            story.mines(FINAL_DEPTH + 1)
            await until(lambda: story.session_of(first).stage is Stage.SETTLED)
        finally:
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)
        assert set(story.believed.values()) == {1}
        assert set(story.ended_believed.values()) == {1}


@pytest.mark.usefixtures("hasty")
async def test_a_node_that_asks_for_patience_gets_it(tmp_path, monkeypatch):
    """Would catch a fleet that hammers a rationing provider: `Retry-After` is waited for."""
    loop, asked_at = asyncio.get_running_loop(), []

    async def rationed():
        asked_at.append(loop.time())
        raise Rationed("slow down", 0.5)

    async with Watched(tmp_path) as story:
        monkeypatch.setattr(story.watch, "_follow", rationed)
        running = asyncio.create_task(story.watch.run())
        await until(lambda: len(asked_at) == 3)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert asked_at[2] - asked_at[1] >= 0.5 <= asked_at[1] - asked_at[0]
