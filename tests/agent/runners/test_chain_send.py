"""Sign, journal, broadcast: exactly one settlement per session is mined, whatever dies in between. Real contract, real pool."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import AsyncMock

import pytest
from bazaar import Bazaar
from structlog.testing import capture_logs

from agent.chain import contract
from agent.chain.node import Receipt
from agent.core import events as ev
from agent.core.effects import BroadcastSettlement, SignSettlement
from agent.core.events import Presentation, StopReason
from agent.core.live import Beat, HeaderSeen
from agent.core.session import Session, Stage
from agent.core.settling import REPLACE_AFTER_S as REPLACE_AFTER
from agent.core.settling import Haste
from agent.core.token import NO_ACK, ZERO_ADDRESS
from agent.engine import Engine
from agent.runners.chain_send import NONCE_LOW_HEADS, ChainSend
from agent.runners.chain_watch import ChainWatch, WatchSettings

DELIVERED_WH = 120
REPLACE_AFTER_S = REPLACE_AFTER[Haste.CALM][0]


@dataclass
class Desk:
    """An agent with one session that owes its settlement."""

    bazaar: Bazaar
    engine: Engine
    opened: contract.SessionOpened

    @property
    def session(self) -> Session:
        """As the book has it."""
        return self.engine.book.sessions[self.opened.session_id]

    def sends(self) -> ChainSend:
        """The runner as the daemon builds it; a new one is a new life."""
        sender = self.bazaar.sender(self.bazaar.provider.operator.signer)
        return ChainSend(self.engine, self.bazaar.node, sender, self.bazaar.address)

    async def look(self) -> None:
        """What the watcher does with every head."""
        settings = WatchSettings(self.bazaar.start_block, 1, 1)
        loop = asyncio.get_running_loop()
        watch = ChainWatch(
            self.engine, self.bazaar.node, self.bazaar.domain, self.bazaar.evp, settings, loop.time
        )
        await watch.look()

    async def look_at_head(self) -> None:
        """A new head, without what the logs say."""
        head = await self.bazaar.node.head()
        self.engine.observe(HeaderSeen(head.number, head.block_hash, head.timestamp_s))

    async def settlements(self) -> list[Receipt]:
        """Every mined settlement of this session."""
        logs = await self.bazaar.node.logs(
            self.bazaar.address,
            contract.provider_topics(self.bazaar.evp),
            0,
            (await self.bazaar.node.head()).number,
        )
        ended = [
            raw
            for raw in logs
            if isinstance(contract.decode_log(raw.address, raw.topics, raw.data), contract.ConnectionEnded)
        ]
        receipts = [await self.bazaar.node.receipt(raw.tx_hash) for raw in ended]
        return [receipt for receipt in receipts if receipt is not None]


async def desk(bazaar: Bazaar) -> Desk:
    """A session delivered and stopped: 120 of 200 Wh, co-signed by the consumer's own key."""
    opened = await bazaar.connects(energy_wh=200)
    one = Desk(bazaar, bazaar.engine(), opened)
    await one.look()
    delivers(one)
    return one


def delivers(one: Desk) -> None:
    """The story of a delivery, from the token to the end intent."""
    bazaar, engine, opened = one.bazaar, one.engine, one.opened
    at_s, sid = engine.at_s, opened.session_id
    given = Presentation(
        "s" * 32, "left", "eip191", opened.token, ZERO_ADDRESS, 0, opened.valid_until_s, bytes(32), b"", b""
    )
    story: list[ev.Event] = [
        ev.TokenPresented(at_s, sid, given),
        ev.SessionAccepted(at_s, sid, 5_000),
        ev.DeliveryBegan(at_s, sid, 5_000, engine.live.life),
        ev.ReceiptCredited(at_s, sid, DELIVERED_WH, bazaar.ack(sid, DELIVERED_WH)),
        ev.StopDecided(at_s, sid, StopReason.REMOTE, "enough"),
        ev.DeliveryEnded(at_s, sid, 5_000 + DELIVERED_WH * 1000, seen_open=True),
    ]
    for event in story:
        engine.accept(event)
    assert one.session.stage is Stage.SETTLING


async def test_the_settlement_is_on_disk_before_it_is_sent_and_pays_what_was_acknowledged(
    tmp_path: Path,
) -> None:
    """Would catch broadcasting before journaling (two settlements after a crash), and a wrong amount."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        pool_before = await bazaar.node.nonce(bazaar.provider.operator.address, pending=True)
        await one.sends().do_owed()
        signed = [event for event in bazaar.rows() if isinstance(event, ev.SettlementSigned)]
        assert len(signed) == 1
        assert await bazaar.node.nonce(bazaar.provider.operator.address, pending=True) == pool_before
        await one.sends().do_owed()
        await one.look()
        (settled,) = await one.settlements()
        assert settled.tx_hash == signed[0].tx_hash
        assert one.session.stage is Stage.SETTLED
        assert one.session.ended is not None
        assert one.session.ended.energy_wh_settled == DELIVERED_WH


@pytest.mark.parametrize("sent_before_crash", [False, True])
async def test_a_crash_after_signing_sends_the_same_bytes(tmp_path: Path, sent_before_crash: bool) -> None:
    """Would catch a second signature after a restart: the journal's bytes are the settlement, known to the pool or not."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        bazaar.net.methods.set_automine(False)
        await one.sends().do_owed()
        if sent_before_crash:
            await one.sends().do_owed()
        one.engine = bazaar.engine()  # the restart: the book from the file only
        await one.look_at_head()
        await one.sends().do_owed()
        await one.sends().do_owed()
        bazaar.net.mine()
        assert len(await one.settlements()) == 1
        signed = [event for event in bazaar.rows() if isinstance(event, ev.SettlementSigned)]
        assert len(signed) == 1


async def test_without_a_view_of_the_chain_nothing_is_sent(tmp_path: Path) -> None:
    """Would catch a broadcast by an agent that cannot know whether the settlement is mined already."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        await one.sends().do_owed()
        one.engine = bazaar.engine()
        await one.sends().do_owed()
        assert not await one.settlements()


async def test_a_slow_settlement_is_replaced_with_the_same_nonce_and_higher_fees(tmp_path: Path) -> None:
    """Would catch a second nonce for the same settlement, which could be mined as well."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        bazaar.net.methods.set_automine(False)
        runner = one.sends()
        await runner.do_owed()
        await runner.do_owed()
        bazaar.now_ms += (REPLACE_AFTER_S + 1) * 1000
        head = await bazaar.node.head()
        one.engine.observe(
            HeaderSeen(head.number + 1, head.block_hash, head.timestamp_s + REPLACE_AFTER_S + 1)
        )
        await runner.do_owed()
        first, second = (event for event in bazaar.rows() if isinstance(event, ev.SettlementSigned))
        assert second.nonce == first.nonce
        assert second.max_fee_per_gas_wei * 8 >= first.max_fee_per_gas_wei * 9
        assert second.max_priority_fee_per_gas_wei * 8 >= first.max_priority_fee_per_gas_wei * 9
        one.engine.observe(HeaderSeen(head.number + 2, head.block_hash, head.timestamp_s + 60))
        await runner.do_owed()
        bazaar.net.mine()
        (settled,) = await one.settlements()
        assert settled.tx_hash == second.tx_hash


async def test_a_settlement_that_is_not_worth_a_higher_fee_is_said_again_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a payment lost for good: the pool forgot it, and what a replacement costs is above its worth."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        runner = one.sends()
        await runner.do_owed()  # signed and on disk, and in no pool
        monkeypatch.setattr("agent.core.settling.stake_wei", lambda _session: 1)
        monkeypatch.setattr(runner._sender, "broadcast", AsyncMock())
        await runner.do_owed()
        runner._sender.broadcast.assert_awaited_once()  # type: ignore[attr-defined]
        monkeypatch.undo()
        monkeypatch.setattr("agent.core.settling.stake_wei", lambda _session: 1)
        bazaar.net.mine()
        await one.look_at_head()
        bazaar.now_ms += REPLACE_AFTER_S * 1000
        one.engine.observe(Beat())
        await runner.do_owed()
        assert len(await one.settlements()) == 1


async def test_a_nonce_used_by_somebody_else_is_signed_anew(tmp_path: Path) -> None:
    """Would catch a settlement that waits for ever behind a nonce the owner's own transaction took."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        await one.sends().do_owed()
        await bazaar.send(bazaar.provider.operator.signer, contract.encode_deposit(), 1)
        runner = one.sends()
        for _ in range(NONCE_LOW_HEADS + 1):
            bazaar.net.mine()
            await one.look_at_head()
            await runner.do_owed()
        assert len(await one.settlements()) == 1


async def test_a_nonce_that_nobody_holds_any_more_does_not_block_the_payment(tmp_path: Path) -> None:
    """Storm 2002015: a reorganisation lost the transaction before ours; ours waited behind the gap until a stranger settled."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        runner = one.sends()
        nonce = await bazaar.node.nonce(bazaar.provider.operator.address)
        sender = bazaar.sender(bazaar.provider.operator.signer)
        data = contract.encode_end_connection(one.opened.token, DELIVERED_WH, one.session.ack)
        ahead = await sender.prepare(bazaar.address, data, nonce=nonce + 1)
        signed = ev.SettlementSigned(
            one.engine.at_s, one.opened.session_id, DELIVERED_WH, ahead.nonce, ahead.tx_hash, ahead.raw_tx,
            ahead.max_fee_per_gas_wei, ahead.max_priority_fee_per_gas_wei,
        )  # fmt: skip
        one.engine.accept(signed)
        await one.look_at_head()
        await runner.do_owed()
        assert not await one.settlements()
        bazaar.net.mine()
        await one.look_at_head()
        bazaar.now_ms += REPLACE_AFTER_S * 1000
        one.engine.observe(Beat())
        await runner.do_owed()
        assert one.session.settlement is not None
        assert one.session.settlement.nonce == nonce
        await one.look_at_head()
        await runner.do_owed()
        assert len(await one.settlements()) == 1


async def test_ended_by_the_consumer_meanwhile_costs_no_second_transaction(tmp_path: Path) -> None:
    """Would catch gas burnt on a session that is settled already."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        everything = contract.encode_end_connection(one.opened.token, one.opened.energy_wh, NO_ACK)
        await bazaar.send(bazaar.consumer.signer, everything)
        assert await one.sends().do_owed(), "refused, and asked again later"
        await one.look()
        assert one.session.stage is Stage.SETTLED
        await one.sends().do_owed()
        assert not [event for event in bazaar.rows() if isinstance(event, ev.SettlementSigned)]


async def test_a_settlement_that_costs_more_than_it_brings_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch an agent that pays a fee spike with more than the session is worth."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        monkeypatch.setattr("agent.core.settling.stake_wei", lambda _session: 1)
        with capture_logs() as lines:
            assert await one.sends().do_owed(), "refused, and asked again later"
        assert [line["reason"] for line in lines] == ["fee_cap"]
        assert one.engine.owed() == tuple(
            e for e in one.engine.owed() if not isinstance(e, BroadcastSettlement)
        )


async def test_a_sale_worth_less_than_its_gas_holds_up_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch one dust order, cheap for a spoiler to make, that keeps the provider from every later payment."""
    async with Bazaar(tmp_path) as bazaar:
        dust = await desk(bazaar)
        good = Desk(bazaar, dust.engine, await bazaar.connects(energy_wh=200))
        await good.look()
        delivers(good)
        worth = {dust.opened.session_id: 1, good.opened.session_id: 10**18}
        monkeypatch.setattr("agent.core.settling.stake_wei", lambda session: worth[session.terms.session_id])
        runner = dust.sends()
        for _ in range(2):
            await runner.do_owed()
            await good.look_at_head()
        assert len(await good.settlements()) == 1
        assert dust.session.settlement is None


async def test_a_reverted_settlement_is_named_and_signed_again(tmp_path: Path) -> None:
    """Would catch a mined failure that nobody notices, so that the money stays locked."""
    async with Bazaar(tmp_path) as bazaar:
        one = await desk(bazaar)
        sender = bazaar.sender(bazaar.provider.operator.signer)
        bad = await sender.prepare(
            bazaar.address,
            contract.encode_end_connection(one.opened.token, DELIVERED_WH, NO_ACK),
            gas_limit=200_000,
        )
        one.engine.accept(
            ev.SettlementSigned(
                one.engine.at_s, one.opened.session_id, DELIVERED_WH, bad.nonce, bad.tx_hash, bad.raw_tx, 1, 1
            )
        )
        runner = one.sends()
        await one.look_at_head()
        await runner.do_owed()
        await one.look_at_head()
        await runner.do_owed()
        assert "InvalidReceipt" in one.session.settlement_error
        assert any(isinstance(effect, SignSettlement) for effect in one.engine.owed())
        await runner.do_owed()
        await one.look_at_head()
        await runner.do_owed()
        assert len(await one.settlements()) == 1
