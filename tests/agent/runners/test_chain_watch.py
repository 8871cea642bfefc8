"""The chain's facts become events: seen, believed, final, orphaned; on a real contract with real reorganisations."""

import asyncio
from pathlib import Path

import pytest
from bazaar import Bazaar

from agent.chain import contract
from agent.core import events as ev
from agent.core.session import Stage
from agent.core.token import NO_ACK
from agent.core.units import BlockHash, Token
from agent.engine import Engine
from agent.runners.chain_watch import ChainWatch, WatchSettings

CONFIRMATIONS = 3
FINAL_DEPTH = 6


def watch(bazaar: Bazaar, engine: Engine) -> ChainWatch:
    """The runner as the daemon builds it."""
    settings = WatchSettings(bazaar.start_block, CONFIRMATIONS, FINAL_DEPTH)
    loop = asyncio.get_running_loop()
    return ChainWatch(engine, bazaar.node, bazaar.domain, bazaar.evp, settings, loop.time)


async def test_a_connection_is_first_seen_then_believed_then_final(tmp_path: Path) -> None:
    """Would catch delivering on a log that is not deep enough, and a cap that is never lifted."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await bazaar.connects()
        await runner.look()
        assert list(engine.book.pending) == [opened.session_id]
        assert not engine.book.sessions
        bazaar.net.mine(CONFIRMATIONS - 1)
        await runner.look()
        session = engine.book.sessions[opened.session_id]
        assert (session.stage, session.final) == (Stage.MATCHED, False)
        assert session.terms.token == opened.token
        bazaar.net.mine(FINAL_DEPTH - CONFIRMATIONS)
        await runner.look()
        assert engine.book.sessions[opened.session_id].final


async def test_a_second_look_at_the_same_blocks_writes_nothing(tmp_path: Path) -> None:
    """Would catch an event handled twice because ranges overlap."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        await bazaar.connects()
        bazaar.net.mine(10)
        await watch(bazaar, engine).look()
        rows = bazaar.rows()
        for _ in range(3):
            bazaar.net.mine()
            await watch(bazaar, engine).look()
        assert bazaar.rows() == rows


async def test_a_reorganisation_orphans_and_the_remined_connect_is_matched_again(tmp_path: Path) -> None:
    """Would catch energising on a token that no longer exists: a re-mined `connect` has another token, the same session."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await bazaar.connects()
        bazaar.net.mine(CONFIRMATIONS)
        await runner.look()
        assert engine.book.sessions[opened.session_id].stage is Stage.MATCHED
        bazaar.net.reorg(CONFIRMATIONS + 1)
        await runner.look()
        stages = [engine.book.sessions[opened.session_id].stage]
        bazaar.net.mine(CONFIRMATIONS)
        await runner.look()
        session = engine.book.sessions[opened.session_id]
        stages.append(session.stage)
        assert stages[-1] is Stage.MATCHED
        assert session.terms.token != opened.token
        kinds = [type(event) for event in bazaar.rows()]
        assert ev.ConnectedOrphaned in kinds


async def test_an_unbelieved_connection_that_vanishes_is_forgotten(tmp_path: Path) -> None:
    """Would catch a pending entry that outlives its block, and keeps a token warm for nothing."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await bazaar.connects()
        await runner.look()
        seen = engine.book.pending[opened.session_id]
        bazaar.net.reorg(1)
        await runner.look()
        remined = engine.book.pending.get(opened.session_id)
        assert remined is not None
        assert remined.block_hash != seen.block_hash


async def test_the_end_is_seen_at_once_and_believed_later(tmp_path: Path) -> None:
    """Would catch energy that flows on after somebody ended the connection, and a settlement believed too early."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await bazaar.connects()
        bazaar.net.mine(CONFIRMATIONS)
        await runner.look()
        ends = contract.encode_end_connection(opened.token, opened.energy_wh, NO_ACK)
        await bazaar.send(bazaar.consumer.signer, ends)
        await runner.look()
        ended = engine.book.sessions[opened.session_id].ended
        assert ended is not None
        assert ended.energy_wh_settled == opened.energy_wh
        assert engine.book.sessions[opened.session_id].stage is not Stage.SETTLED
        bazaar.net.mine(FINAL_DEPTH - 2)
        await runner.look()
        assert engine.book.sessions[opened.session_id].stage is not Stage.SETTLED
        bazaar.net.mine(1)
        await runner.look()
        assert engine.book.sessions[opened.session_id].stage is Stage.SETTLED


async def test_an_end_deeper_than_confirmations_is_still_owed_again_when_it_falls_out(tmp_path: Path) -> None:
    """Would catch a session closed at `confirmations`: a deeper reorganisation then loses the payment, and nobody looks."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await bazaar.connects()
        bazaar.net.mine(CONFIRMATIONS)
        await runner.look()
        data = contract.encode_end_connection(opened.token, 0, NO_ACK)
        await bazaar.send(bazaar.provider.operator.signer, data)
        bazaar.net.mine(CONFIRMATIONS)
        await runner.look()
        before = engine.book.sessions[opened.session_id].ended
        assert before is not None
        bazaar.net.reorg(CONFIRMATIONS + 1, CONFIRMATIONS + 2)
        await runner.look()
        session = engine.book.sessions[opened.session_id]
        assert session.stage is not Stage.SETTLED
        assert session.ended is None or session.ended.block_hash != before.block_hash


async def test_an_end_that_falls_out_of_the_chain_is_owed_again(tmp_path: Path) -> None:
    """Would catch a settlement counted as paid although its block was replaced."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await bazaar.connects()
        bazaar.net.mine(CONFIRMATIONS)
        await runner.look()
        data = contract.encode_end_connection(opened.token, 0, NO_ACK)
        await bazaar.send(bazaar.provider.operator.signer, data)
        await runner.look()
        before = engine.book.sessions[opened.session_id].ended
        assert before is not None
        bazaar.net.reorg(1, 2)
        await runner.look()
        after = engine.book.sessions[opened.session_id].ended
        assert after is None or after.block_hash != before.block_hash


async def test_a_close_by_the_consumer_is_noticed(tmp_path: Path) -> None:
    """Would catch a challenge window that passes unseen."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await bazaar.connects()
        bazaar.net.mine(CONFIRMATIONS)
        await runner.look()
        await bazaar.send(bazaar.consumer.signer, contract.encode_end_connection(opened.token, 10, NO_ACK))
        await runner.look()
        assert engine.book.sessions[opened.session_id].closing_at_s is not None


async def test_nothing_is_missed_while_the_agent_was_away(tmp_path: Path) -> None:
    """Would catch a cursor that moves past logs which were never accepted, over a restart and hundreds of blocks."""
    async with Bazaar(tmp_path) as bazaar:
        first = await bazaar.connects()
        engine = bazaar.engine()
        await watch(bazaar, engine).look()
        bazaar.close_journal()
        second = await bazaar.connects()
        bazaar.net.mine(150)
        third = await bazaar.connects()
        bazaar.net.mine(CONFIRMATIONS)
        again = bazaar.engine()
        await watch(bazaar, again).look()
        assert set(again.book.sessions) == {one.session_id for one in (first, second, third)}


async def test_somebody_elses_sessions_are_not_ours(tmp_path: Path) -> None:
    """Would catch an agent that acts on another provider's connections."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        await bazaar.connects()
        bazaar.net.mine(CONFIRMATIONS)
        settings = WatchSettings(bazaar.start_block, CONFIRMATIONS, FINAL_DEPTH)
        stranger = ChainWatch(
            engine,
            bazaar.node,
            bazaar.domain,
            bazaar.consumer.address,
            settings,
            asyncio.get_running_loop().time,
        )
        await stranger.look()
        assert not engine.book.sessions
        assert not engine.book.pending


async def test_a_log_without_the_contracts_state_is_not_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a node that fakes logs: the contract's storage must say the same."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        opened = await bazaar.connects()
        bazaar.net.mine(CONFIRMATIONS)
        elsewhere = contract.encode_sessions(Token(bytes(31) + b"\1"))
        monkeypatch.setattr(contract, "encode_sessions", lambda _token: elsewhere)
        await watch(bazaar, engine).look()
        assert opened.session_id not in engine.book.sessions
        assert ev.ConnectedBelieved not in [type(event) for event in bazaar.rows()]


async def test_it_follows_heads_by_itself(tmp_path: Path) -> None:
    """Would catch a subscription that is not followed, or not opened again after the node hung up."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        task = asyncio.create_task(watch(bazaar, engine).run())
        try:
            opened = await bazaar.connects()
            await becomes(engine, lambda: opened.session_id in engine.book.pending)
            await bazaar.net.hang_up()
            bazaar.net.mine(CONFIRMATIONS)
            await becomes(engine, lambda: opened.session_id in engine.book.sessions)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def becomes(engine: Engine, true: object, timeout_s: float = 40) -> None:
    """Wait until the book says so."""
    assert callable(true)
    async with asyncio.timeout(timeout_s):
        while not true():
            changed = engine.changed
            try:
                async with asyncio.timeout(0.2):
                    await changed.wait()
            except TimeoutError:
                continue


async def over_before_believed(bazaar: Bazaar, runner: ChainWatch) -> contract.SessionOpened:
    """A session that its consumer ends in the block after it began."""
    opened = await bazaar.connects()
    await runner.look()
    everything = contract.encode_end_connection(opened.token, opened.energy_wh, NO_ACK)
    await bazaar.send(bazaar.consumer.signer, everything)
    return opened


async def test_a_session_that_is_over_before_we_believe_it_is_forgotten_once(tmp_path: Path) -> None:
    """Would catch a `connect` that waits for belief for ever, or is seen and forgotten anew with every head."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await over_before_believed(bazaar, runner)
        bazaar.net.mine(CONFIRMATIONS)
        await runner.look()
        assert opened.session_id in engine.book.pending, "its end is not final yet"
        bazaar.net.mine(FINAL_DEPTH)
        await runner.look()
        assert opened.session_id not in engine.book.pending
        bazaar.net.mine(1)
        await runner.look()
        rows = len(bazaar.rows())
        bazaar.net.mine(2)
        await runner.look()
        assert (len(bazaar.rows()), dict(engine.book.sessions)) == (rows, {})


async def test_an_end_that_is_undone_before_we_believed_the_session_leaves_the_session(
    tmp_path: Path,
) -> None:
    """Would catch a session forgotten because of an end that a reorganisation took back: its energy would be refused."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await over_before_believed(bazaar, runner)
        bazaar.net.mine(CONFIRMATIONS - 1)
        await runner.look()
        assert not engine.book.sessions
        bazaar.net.evm.drop(CONFIRMATIONS)  # the end and what came after it
        bazaar.net.evm._pool.clear()
        bazaar.net.mine(CONFIRMATIONS + 1)
        await runner.look()
        assert engine.book.sessions[opened.session_id].terms.token == opened.token


async def test_two_sessions_of_one_block_are_two(tmp_path: Path) -> None:
    """Would catch events told apart by their block alone: one that is over would take its neighbour with it."""
    async with Bazaar(tmp_path) as bazaar:
        engine = bazaar.engine()
        runner = watch(bazaar, engine)
        opened = await bazaar.connects()
        block = bazaar.net.evm.head.block_hash
        bazaar.net.mine(CONFIRMATIONS)
        runner._forgotten[BlockHash(block), 10**6] = None
        await runner.look()
        assert list(engine.book.sessions) == [opened.session_id]
