"""The owner's local socket: who may ask what, what a bid goes through, and that nothing makes it two. Real contract."""

import asyncio
import json
import os
import socket
import stat
from pathlib import Path

import pytest
from bazaar import BIDDING_S, RATE, Bazaar

from agent.chain import contract
from agent.core import events as ev
from agent.core.live import Beat, HeaderSeen, Policy
from agent.core.units import hex0x
from agent.engine import Engine
from agent.journal import Journal
from agent.runners import local
from agent.runners.chain_send import ChainSend
from agent.runners.local import LocalRunner

ENERGY_WH = 200


class Bench:
    """An agent whose owner types: engine, sender and socket of a provider at an auction."""

    def __init__(self, bazaar: Bazaar):
        self.bazaar = bazaar
        self.path = bazaar.folder / "agent.sock"
        self.restart()

    def restart(self):
        """A new life: the book from the file only."""
        self.engine = self.bazaar.engine()
        sender = self.bazaar.sender(self.bazaar.provider.operator.signer)
        self.sends = ChainSend(self.engine, self.bazaar.node, sender, self.bazaar.address)

    async def auction(self):
        """Carol asks for energy, and the provider has put a bond into its ledger; its nonce."""
        lock_wei = RATE * ENERGY_WH
        start = contract.encode_start_auction(ENERGY_WH, 600 * BIDDING_S, RATE, 3600, bytes(32))
        await self.bazaar.send(self.bazaar.consumer.signer, start, lock_wei)
        await self.bazaar.send(self.bazaar.provider.owner.signer, contract.encode_deposit(), lock_wei)
        await self.look()
        return (await self.state()).auction_nonce

    async def state(self):
        """The auction, as the contract has it."""
        data = contract.encode_auctions(self.bazaar.consumer.address)
        return contract.decode_auctions(await self.bazaar.node.call(self.bazaar.address, data))

    async def look(self):
        """A new head."""
        head = await self.bazaar.node.head()
        self.engine.observe(HeaderSeen(head.number, head.block_hash, head.timestamp_s))

    def question(self, nonce, rate=RATE, **changes):
        """A bid, as the command line words it."""
        return {
            "ask": "bid",
            "provider": hex0x(self.bazaar.evp),
            "consumer": hex0x(self.bazaar.consumer.address),
            "auction_nonce": nonce,
            "rate_wei_per_kwh": str(rate),
        } | changes

    async def asks(self, question):
        """One line out, one in; beside the sender, who does what is owed."""
        line = question if isinstance(question, bytes) else json.dumps(question).encode() + b"\n"
        asking = asyncio.create_task(said(self.path, line))
        while not asking.done():
            await self.sends.do_owed()
            await asyncio.wait({asking}, timeout=0.02)
        return asking.result()

    def serving(self):
        """The socket, as long as the story lasts."""
        return Serving(LocalRunner(self.engine, self.path))


class Serving:
    """A runner that runs."""

    def __init__(self, runner):
        self.runner = runner

    async def __aenter__(self):
        self.task = asyncio.create_task(self.runner.run())
        async with asyncio.timeout(30):
            await self.runner.listening.wait()
        return self.runner

    async def __aexit__(self, *_):
        self.task.cancel()
        await asyncio.wait({self.task})


async def said(path, line):
    """The answer to these bytes."""
    reader, writer = await asyncio.open_unix_connection(str(path))
    try:
        writer.write(line)
        async with asyncio.timeout(30):
            answer = await reader.readline()
    finally:
        writer.close()
    return json.loads(answer)


def rows(bazaar, kind):
    """Events of this kind in the journal."""
    return [event for event in bazaar.rows() if isinstance(event, kind)]


async def test_a_bid_is_journaled_signed_sent_and_answered_with_its_hash(tmp_path: Path) -> None:
    """Would catch a bid sent before it is on disk, or an answer that is not the transaction on the chain."""
    async with Bazaar(tmp_path) as bazaar:
        bench = Bench(bazaar)
        nonce = await bench.auction()
        async with bench.serving():
            answer = await bench.asks(bench.question(nonce))
            assert [type(event).__name__ for event in bazaar.rows()][-2:] == ["BidDecided", "BidSigned"]
            receipt = await bazaar.node.receipt(bytes.fromhex(answer["bid"]["tx"][2:]))
            assert receipt is not None
            assert (await bench.state()).provider == bazaar.evp
            await bench.look()
            await bench.sends.do_owed()
            assert rows(bazaar, ev.BidEnded)[0].error == ""
            again = await bench.asks(bench.question(nonce))
        assert (again["bid"]["tx"], again["bid"]["state"]) == (answer["bid"]["tx"], "placed")
        assert len(rows(bazaar, ev.BidSigned)) == 1


@pytest.mark.parametrize("dies_after", [ev.BidDecided, ev.BidSigned])
async def test_a_crash_in_between_makes_no_second_bid(tmp_path: Path, dies_after: type) -> None:
    """Would catch a bid signed twice, or lost though it was decided: by a power cut before or after the signature."""
    async with Bazaar(tmp_path) as bazaar:
        bench = Bench(bazaar)
        nonce = await bench.auction()
        async with bench.serving():
            asking = asyncio.create_task(said(bench.path, json.dumps(bench.question(nonce)).encode() + b"\n"))
            async with asyncio.timeout(30):
                while not rows(bazaar, ev.BidDecided):
                    await asyncio.wait({asking}, timeout=0.02)
            if dies_after is ev.BidSigned:
                await bench.sends.do_owed()
                assert rows(bazaar, ev.BidSigned)
            asking.cancel()
        bench.restart()
        await bench.look()
        async with bench.serving():
            answer = await bench.asks(bench.question(nonce))
        assert (await bench.state()).provider == bazaar.evp
        (signed,) = rows(bazaar, ev.BidSigned)
        assert answer["bid"]["tx"] == hex0x(signed.tx_hash)
        assert len(rows(bazaar, ev.BidDecided)) == 1


REFUSED = {
    "no auction": (lambda question: question | {"consumer": "0x" + "11" * 20}, "NoAuction"),
    "another auction": (lambda question: question | {"auction_nonce": 7}, "StaleAuction(auctionNonce=1)"),
    "too high": (lambda question: question | {"rate_wei_per_kwh": str(RATE + 1)}, "BidTooHigh"),
    "another agent's": (lambda question: question | {"provider": "0x" + "22" * 20}, "other_agent"),
    "no number": (lambda question: question | {"auction_nonce": "1"}, "malformed"),
    "rate as a number": (lambda question: question | {"rate_wei_per_kwh": 5}, "malformed"),
    "rate zero": (lambda question: question | {"rate_wei_per_kwh": "0"}, "malformed"),
    "one field more": (lambda question: question | {"value_wei": 5}, "malformed"),
    "another question": (lambda question: question | {"ask": "withdraw"}, "malformed"),
    "no object": (lambda _question: b"[]\n", "malformed"),
    "no JSON": (lambda _question: b"hello\n", "malformed"),
    "a long line": (lambda _question: b"x" * 5_000 + b"\n", "malformed"),
}


async def test_every_refusal_has_its_name_and_binds_nothing(tmp_path: Path) -> None:
    """Would catch a refusal without a name, one that leaves a bid behind, and a line that ends the agent."""
    async with Bazaar(tmp_path) as bazaar:
        bench = Bench(bazaar)
        nonce = await bench.auction()
        async with bench.serving():
            for what, (change, name) in REFUSED.items():
                answer = await bench.asks(change(bench.question(nonce)))
                assert answer["refused"]["reason"].startswith(name), what
        assert not rows(bazaar, ev.BidSigned)
        assert not bench.engine.book.open_bids()


async def test_gas_for_every_settlement_is_kept_back_before_a_bid(tmp_path: Path) -> None:
    """Would catch a car that wins a sale it cannot settle: its bond and its pay would wait for a stranger."""
    async with Bazaar(tmp_path) as bazaar:
        bench = Bench(bazaar)
        nonce = await bench.auction()
        purse = await bench.sends._purse()
        rich = bazaar.sender(bazaar.provider.operator.signer)
        keep = purse.settlement_wei * 2 // 3
        gas_wei = 21_000 * 3 * 10**9
        await rich.send_and_wait(bytes(20), b"", purse.balance_wei - keep - gas_wei, 21_000)
        await bench.look()
        async with bench.serving():
            answer = await bench.asks(bench.question(nonce))
            assert answer["refused"]["reason"] == "gas_reserve"
            assert "about 0 settlements" in answer["refused"]["detail"] or rows(bazaar, ev.BidEnded)
            await bazaar.sender(bazaar.consumer.signer).send_and_wait(
                bazaar.provider.operator.address, b"", 10 * purse.settlement_wei
            )
            await bench.look()
            assert "bid" in await bench.asks(bench.question(nonce)), "the same bid may be decided anew"


async def test_only_root_and_the_agents_own_user_may_bind_money(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a group member, who may look, bidding with the owner's bond; and a mode that lets everybody look."""
    async with Bazaar(tmp_path) as bazaar:
        bench = Bench(bazaar)
        nonce = await bench.auction()
        async with bench.serving():
            assert stat.S_IMODE(bench.path.stat().st_mode) == 0o660
            monkeypatch.setattr(local, "_peer_uid", lambda _writer: os.geteuid() + 1)
            answer = await bench.asks(bench.question(nonce))
            assert answer["refused"]["reason"] == "not_yours"
            assert "sessions" in (await bench.asks({"ask": "status"}))["status"]
        assert not rows(bazaar, ev.BidDecided)


async def test_a_bid_that_nobody_could_sign_in_time_is_given_up(tmp_path: Path) -> None:
    """Would catch the owner's money bound an hour later, when the node is back."""
    async with Bazaar(tmp_path) as bazaar:
        bench = Bench(bazaar)
        nonce = await bench.auction()
        async with bench.serving():
            asking = asyncio.create_task(said(bench.path, json.dumps(bench.question(nonce)).encode() + b"\n"))
            async with asyncio.timeout(30):
                while not bench.engine.book.open_bids():
                    await asyncio.wait({asking}, timeout=0.02)
            bazaar.now_ms += (local.SIGN_WITHIN_S + 1) * 1000
            bench.engine.observe(Beat())
            assert (await asking)["refused"]["reason"] == "expired"
        await bench.sends.do_owed()
        assert not rows(bazaar, ev.BidSigned)


# ---- limits, without a chain


@pytest.fixture
async def quiet(tmp_path):
    """A socket of an agent that has nothing to do."""
    from story import DOMAIN, PROVIDER

    journal = Journal(tmp_path / "journal.sqlite", DOMAIN, PROVIDER.address)
    engine = Engine(journal, Policy(max_unacked_wh={"left": 50}), lambda: 1_000)
    runner = LocalRunner(engine, tmp_path / "agent.sock")
    async with Serving(runner):
        yield runner
    journal.close()


async def test_questions_have_a_rate(quiet, monkeypatch):
    """Would catch a script gone wild that keeps the agent from its work."""
    monkeypatch.setattr(local, "_peer_uid", lambda _writer: os.geteuid() + 1)
    answers = [await said(quiet._path, b'{"ask":"status"}\n') for _ in range(local.ASKS_A_MINUTE + 1)]
    assert all("status" in answer for answer in answers[:-1])
    assert answers[-1]["refused"]["reason"] == "rate_limited"
    monkeypatch.undo()
    assert "status" in await said(quiet._path, b'{"ask":"status"}\n'), "others cannot keep the owner out"


async def test_who_says_nothing_holds_no_place(quiet, monkeypatch):
    """Would catch silent connections that keep the owner out."""
    monkeypatch.setattr(local, "SPEAK_S", 0.3)
    answer = await said(quiet._path, b'{"ask":')
    assert answer["refused"]["reason"] == "malformed"


async def test_places_are_limited(quiet):
    """Would catch a file handle for every connection somebody cares to make."""
    writers = [(await asyncio.open_unix_connection(str(quiet._path)))[1] for _ in range(2 * local.PEERS_MAX)]
    answer = await said(quiet._path, b'{"ask":"status"}\n')
    assert answer["refused"]["reason"] == "busy"
    for writer in writers:
        writer.close()


async def test_without_a_view_of_the_chain_no_bid_is_decided(quiet):
    """Would catch a decision by a clock that stands: its expiry would never come."""
    question = {
        "ask": "bid", "provider": hex0x(quiet._engine.book.provider), "consumer": "0x" + "11" * 20,
        "auction_nonce": 1, "rate_wei_per_kwh": "5",
    }  # fmt: skip
    answer = await said(quiet._path, json.dumps(question).encode() + b"\n")
    assert answer["refused"]["reason"] == "chain_view_stale"


async def test_what_a_killed_agent_left_is_taken_over_and_a_file_is_not(tmp_path):
    """Would catch an agent that has no socket after `kill -9`, and one that deletes a file which is none."""
    from story import DOMAIN, PROVIDER

    journal = Journal(tmp_path / "journal.sqlite", DOMAIN, PROVIDER.address)
    engine = Engine(journal, Policy(max_unacked_wh={"left": 50}), lambda: 1_000)
    path = tmp_path / "agent.sock"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with Serving(LocalRunner(engine, path)):
        assert "status" in await said(path, b'{"ask":"status"}\n')
    assert not path.exists()
    path.write_text("mine")
    task = asyncio.create_task(LocalRunner(engine, path).run())
    await asyncio.wait({task}, timeout=0.2)
    task.cancel()
    await asyncio.wait({task})
    assert path.read_text() == "mine"
    journal.close()
