"""What an agent sells on a node's word: nothing, a little, or everything; and no node may talk it into more, unnamed.

PROTOCOL section 7 through the real watcher, core and fail-over; the node in front of the truth lies as it likes.
"""

import pytest
from plugged import PluggedCar
from simulation.chain import BLOCK_S
from watched import CONFIRMATIONS, EVP, FINAL_DEPTH, STRANGER, Watched

from agent.chain import contract
from agent.core.session import Hindrance, Stage
from agent.core.units import hex0x

CAP_WH, VIEW_S, WH_PER_S = 100, 60, 2
NAMES = ("ws://node", "ws://other")


async def charging(story, *, blocks=CONFIRMATIONS):
    """A car that has presented its token and is being charged."""
    consumer = story.connects()
    story.mines(blocks)
    await story.looks()
    car = PluggedCar(story, consumer)
    await car.charges(2)
    car.presents()
    await car.charges(4)
    assert car.is_powered
    return car


def stage(car):
    """Where its session stands."""
    return car.story.session_of(car.consumer).stage


# ---- tiers


async def test_seen_sells_nothing_confirmed_a_little_final_everything(tmp_path):
    """Would catch a cap that is never lifted, lifted too early, or not there."""
    async with Watched(tmp_path, max_unfinal_wh=CAP_WH) as story:
        consumer = story.connects()
        car = PluggedCar(story, consumer)
        story.mines(1)
        await story.looks()
        assert story.engine.book.pending
        assert await car.charges(BLOCK_S - 1) == 0
        story.mines(CONFIRMATIONS - 1)
        await story.looks()
        await car.charges(2)
        car.presents()
        await car.charges(FINAL_DEPTH * BLOCK_S // 2)
        assert CAP_WH <= car.delivered_wh <= CAP_WH + WH_PER_S
        assert story.session_of(consumer).pause_reason == Hindrance.UNFINAL_CAP
        await car.charges((FINAL_DEPTH + 2) * BLOCK_S)
        assert story.session_of(consumer).final
        assert car.delivered_wh > 2 * CAP_WH


async def test_a_stale_view_pauses_and_a_fresh_one_goes_on(tmp_path):
    """Would catch energy sold blindly while the link is down, and a session that does not survive a tunnel."""
    async with Watched(tmp_path) as story:
        car = await charging(story, blocks=FINAL_DEPTH)
        await story.nodes[0].kill()
        blind_wh = await car.charges(VIEW_S + 20)
        assert blind_wh <= (VIEW_S + 1) * WH_PER_S
        assert (stage(car), car.is_powered) == (Stage.PAUSED, False)
        await story.nodes[0].restart()
        await car.charges(BLOCK_S + 4)
        assert car.is_powered


async def test_an_orphan_opens_and_its_token_is_asked_for_again(tmp_path):
    """Would catch power on a `connect` that is no more, lost receipts, and a consumer who must plug in again."""
    async with Watched(tmp_path) as story:
        car = await charging(story)
        acked_wh, old_token = story.session_of(car.consumer).energy_wh_acked, story.token_of(car.consumer)
        story.chain.reorg(CONFIRMATIONS + 1)
        await story.looks()
        assert (stage(car), car.is_powered) == (Stage.ORPHANED, False)
        await car.charges(4 * BLOCK_S)
        session = story.session_of(car.consumer)
        assert session.stage is Stage.MATCHED
        assert session.energy_wh_acked >= acked_wh > 0
        assert session.terms.token == story.token_of(car.consumer) != old_token
        assert not car.is_powered
        car.presents()
        await car.charges(5)
        assert car.is_powered


# ---- lies: each bounded, and named with who told it


async def test_a_hidden_close_is_read_from_the_contract(tmp_path):
    """Would catch a node that leaves the close out of the logs: the consumer charges on, and its receipts are worth nothing."""
    async with Watched(tmp_path, NAMES) as story:
        car = await charging(story, blocks=FINAL_DEPTH)
        for node in story.nodes:
            node.faults.hides = hex0x(contract.topic_of(contract.ConnectionClosing))
        story.concedes(car.consumer, 1)
        after_wh = await car.charges(4 * BLOCK_S)
        assert after_wh <= (BLOCK_S + 2) * WH_PER_S
        assert story.session_of(car.consumer).closing_at_s is not None
        assert ("chain.hidden_close", NAMES[0]) in story.lies()


@pytest.mark.parametrize("names", [NAMES[:1], NAMES])
async def test_a_hidden_end_is_no_view(tmp_path, names):
    """Would catch energy for a session that is over: alone with the liar until the view is stale, else at the next look."""
    async with Watched(tmp_path, names) as story:
        car = await charging(story, blocks=FINAL_DEPTH)
        story.nodes[0].faults.hides = hex0x(contract.topic_of(contract.ConnectionEnded))
        story.concedes(car.consumer)
        after_wh = await car.charges(2 * VIEW_S)
        bound_s = 2 * BLOCK_S if len(names) > 1 else VIEW_S + BLOCK_S
        assert after_wh <= (bound_s + 2) * WH_PER_S
        assert not car.is_powered
        assert ("chain.hidden_close", NAMES[0]) in story.lies()
        assert (story.session_of(car.consumer).ended is not None) is (len(names) > 1)


async def test_an_old_head_is_no_new_one(tmp_path):
    """Would catch a view refreshed by a head that everybody knows: a close after it would stay unseen for hours."""
    async with Watched(tmp_path) as story:
        car = await charging(story, blocks=FINAL_DEPTH)
        assert await car.charges(BLOCK_S)
        story.nodes[0].faults.behind = 10
        old_wh = 0
        for _ in range(12):  # it never moves on: ten blocks behind the truth, then eleven, and so on
            story.nodes[0].faults.behind += 1
            old_wh += await car.charges(BLOCK_S)
        assert old_wh <= (VIEW_S + BLOCK_S) * WH_PER_S
        assert not car.is_powered
        assert ("chain.old_head", "first") in story.lies()


@pytest.mark.parametrize("wrong", [{"chain_id": 5}, {"genesis": "0x" + "77" * 32}])
async def test_another_chain_behind_the_same_address_is_named_and_left(tmp_path, wrong):
    """Would catch sessions of a test network sold for real, and a real one taken for orphaned because the address changed."""
    async with Watched(tmp_path, NAMES) as story:
        car = await charging(story, blocks=FINAL_DEPTH)
        for name, value in wrong.items():
            setattr(story.nodes[0].faults, name, value)
        await story.node.chain_id()  # as whenever the subscription is opened anew
        assert await car.charges(2 * BLOCK_S)
        assert ("chain.other_chain", NAMES[0]) in story.lies()
        assert stage(car) is Stage.DELIVERING


@pytest.mark.parametrize(
    ("fault", "lie"),
    [("huge", "chain.huge_answer"), ("loris", "chain.slow_answer"), ("garbage", "chain.nonsense")],
)
@pytest.mark.parametrize("ask_by", ["http", "ws"])
async def test_an_answer_that_is_none_is_named_and_asked_for_elsewhere(tmp_path, fault, lie, ask_by):
    """Would catch memory that a node fills, a look that it holds for ever, and a fail-over that says nothing of why."""
    async with Watched(tmp_path, NAMES, ask_by=ask_by) as story:
        car = await charging(story, blocks=FINAL_DEPTH)
        story.nodes[0].once[fault] = 10**6
        assert await car.charges(2 * BLOCK_S) == 2 * BLOCK_S * WH_PER_S
        assert (lie, NAMES[0]) in story.lies()
        assert ("chain.failover", NAMES[0]) in story.lies()


async def test_alone_with_such_a_node_power_ends_with_the_view(tmp_path):
    """Would catch blind selling where there is nobody else to ask."""
    async with Watched(tmp_path, NAMES[:1]) as story:
        car = await charging(story, blocks=FINAL_DEPTH)
        story.nodes[0].once["garbage"] = 10**6
        assert await car.charges(2 * VIEW_S) <= (VIEW_S + 1) * WH_PER_S
        assert ("chain.nonsense", NAMES[0]) in story.lies()


async def test_a_forged_session_is_never_sold_to(tmp_path):
    """Would catch a node that invents a consumer: its log stands in a real block, but chain and contract do not know it."""
    async with Watched(tmp_path, NAMES) as story:
        story.connects(STRANGER)
        story.mines(FINAL_DEPTH)
        (log,) = await story.nodes[0].truth.ask("eth_getLogs", [story.filter_of(contract.SessionOpened)])
        ours = [
            *log["topics"][:3],
            hex0x(EVP.rjust(32, b"\0")),
        ]  # somebody else's session, as if it were with us
        story.nodes[0].faults.forges = {**log, "topics": ours}
        await story.looks(2)
        assert ("chain.forged_log", NAMES[0]) in story.lies()
        assert (dict(story.engine.book.pending), dict(story.engine.book.sessions)) == ({}, {})


async def test_a_block_from_the_far_future_is_refused(tmp_path):
    """Would catch a timestamp that overflows the journal."""
    async with Watched(tmp_path, NAMES) as story:
        story.chain.mine(2**41)
        assert not await story.looks()
        assert ("chain.impossible_time", NAMES[0]) in story.lies()
        assert story.engine.live.header is None
