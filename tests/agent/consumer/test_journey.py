"""From auction to receipt on a real chain: the money, every crash, every way it can fail to happen."""

import asyncio
import json
from typing import ClassVar

import aiomqtt
import pytest
from fair import BID, ORDER, Fair

from agent.chain import contract
from agent.consumer.carrier_mqtt import Broker, MqttCarrier
from agent.consumer.journal import ConsumerJournal
from agent.consumer.journey import Order
from agent.consumer.plug import Step
from agent.core.messages import encode
from agent.core.units import cost_wei_ceil, cost_wei_floor, hex0x
from agent.demo.broker import Broker as EmbeddedBroker
from agent.errors import Misconfigured, Refused

DEPOSIT = cost_wei_ceil(ORDER.rate_wei_per_kwh_start, ORDER.energy_wh)


@pytest.fixture
async def fair(tmp_path):
    """A market with one provider and one consumer."""
    async with Fair(tmp_path) as fair:
        yield fair


async def test_a_whole_purchase_adds_up_to_the_wei(fair):
    """Would catch a step left out, a Wh not paid or paid twice, and money that does not come back."""
    buying = fair.buys()
    await fair.offers()
    for wh in (40, 120, 200):
        await fair.delivers(wh)
    receipt = await fair.settles()
    summary = await buying

    cost_wei = cost_wei_floor(BID, 200)
    assert (summary.energy_wh_ordered, summary.energy_wh_signed) == (200, 200)
    assert (summary.energy_wh_acked, summary.energy_wh_settled) == (200, 200)
    assert (summary.deposit_wei, summary.cost_wei) == (DEPOSIT, cost_wei)
    assert summary.refund_wei == await fair.ledger_wei(fair.consumer.address)
    assert await fair.ledger_wei(fair.evp) == cost_wei + cost_wei_ceil(BID, 200)
    assert summary.provider == fair.evp
    assert summary.settlement_tx == receipt.tx_hash
    assert [mined.step for mined in summary.transactions] == ["start_auction", "connect"]
    assert summary.gas_wei == sum(mined.fee_wei for mined in summary.transactions) > 0
    assert summary.stop_reason == "EnergyLimitReached"
    steps = list(dict.fromkeys(progress.step for progress in fair.told))
    assert steps == [step for step in Step if step is not Step.BIDDING or step in steps]
    assert json.loads(json.dumps(summary.as_json()))["cost_wei"] == str(cost_wei)
    assert fair.consumer_journal.open_errand is None
    assert not list((fair.folder / "carol").glob("*.key")), "the session key has nothing left to sign"


async def test_a_partial_delivery_pays_for_what_was_signed(fair):
    """Would catch a consumer that pays for the order instead of the energy."""
    buying = fair.buys()
    await fair.offers()
    await fair.delivers(70)
    await fair.settles()
    summary = await buying
    assert summary.cost_wei == cost_wei_floor(BID, 70)
    assert summary.refund_wei == DEPOSIT - cost_wei_floor(BID, 70)


class Crash(BaseException):
    """The power goes."""


class CrashingJournal(ConsumerJournal):
    """Loses power once just before, and once just after, each kind of fact is written."""

    seen: ClassVar[set] = set()

    def write(self, fact):
        """Write, with the power going on either side of it."""
        self._lose_power(("before", type(fact).__name__, getattr(fact, "step", "")))
        super().write(fact)
        if type(fact).__name__ != "Closed":  # after that nothing is left to continue
            self._lose_power(("after", type(fact).__name__, getattr(fact, "step", "")))

    def _lose_power(self, point):
        if point not in self.seen:
            self.seen.add(point)
            raise Crash(point)


async def test_a_crash_at_every_fact_buys_once_and_pays_once(fair):
    """Would catch a second auction, a second connect, another session key, a presentation or receipt that changed: the
    power goes before and after every single fact of one purchase.
    """
    fair.journal_kind = CrashingJournal
    CrashingJournal.seen = set()
    crashes = 0

    async def buy_until_done():
        nonlocal crashes
        while True:
            try:
                return await fair.buys()
            except Crash:
                crashes += 1
                fair.consumer_journal.close()
                fair.consumer_journal = None

    story = asyncio.create_task(buy_until_done())
    fair.until = _patient(story)
    await fair.offers()
    await fair.until(lambda: fair.script is not None and fair.script.grant is not None)

    async def deliver(wh):
        while fair.script.acked_wh != wh:
            fair.carrier.say(fair.script.reading(wh))
            await asyncio.sleep(0.05)

    async with asyncio.timeout(20):
        await deliver(90)
        await deliver(200)
    await fair.settles()
    summary = await story
    assert crashes >= 17
    assert summary.energy_wh_settled == 200
    assert (await fair.auction()).auction_nonce == 1
    assert len(set(fair.script.presented)) == 1
    assert [mined.step for mined in summary.transactions if mined.succeeded] == ["start_auction", "connect"]
    assert summary.refund_wei == await fair.ledger_wei(fair.consumer.address)


def _patient(story):
    """`fair.until` for a purchase that crashes on purpose: only the whole story's failure counts."""

    async def until(holds, seconds=20.0):
        async with asyncio.timeout(seconds):
            while not (await holds() if asyncio.iscoroutinefunction(holds) else holds()):
                if story.done():
                    story.result()
                await asyncio.sleep(0.01)

    return until


async def test_nobody_bids_and_the_deposit_comes_back(fair):
    """Would catch money that stays in an auction nobody wanted."""
    buying = fair.buys()
    await fair.until(fair._is_live)
    fair.pass_time(30)
    with pytest.raises(Refused) as refused:
        await buying
    assert refused.value.reason == "no_bids"
    assert refused.value.remedy
    assert await fair.ledger_wei(fair.consumer.address) == DEPOSIT
    assert fair.consumer_journal.open_errand is None


async def test_too_late_to_connect_frees_both_sides(fair):
    """Would catch a consumer that was away too long and then hangs in an auction it cannot finish."""
    fair.buys()
    await fair.offers()
    await fair.crash()
    fair.pass_time(3600)
    fair.told.clear()
    session = await fair.auction()
    if session.is_live:  # the crash came before `connect`
        with pytest.raises(Refused) as refused:
            await fair.buys()
        assert refused.value.reason == "connect_window_missed"
        assert await fair.ledger_wei(fair.consumer.address) == DEPOSIT


async def test_somebody_else_ended_the_empty_auction(fair):
    """Would catch a consumer that waits for an auction a stranger has ended (which anybody may)."""
    buying = fair.buys()
    await fair.until(fair._is_live)
    await fair.crash()
    fair.pass_time(30)
    await fair.send(fair.provider.owner.signer, contract.encode_end_auction(fair.consumer.address))
    assert buying.cancelled()
    with pytest.raises(Refused) as refused:
        await fair.buys()
    assert refused.value.reason == "auction_gone"
    assert fair.consumer_journal.open_errand is None


async def test_the_money_in_the_ledger_is_used_first(fair):
    """Would catch a second deposit while the first one lies in the ledger."""
    buying = fair.buys()
    await fair.until(fair._is_live)
    fair.pass_time(30)
    with pytest.raises(Refused):
        await buying
    before_wei = await fair.node.balance(fair.consumer.address)
    placed = await fair.prepared().start_auction(ORDER)
    assert placed.auction_nonce == 2
    spent_wei = before_wei - await fair.node.balance(fair.consumer.address)
    assert spent_wei == fair.consumer_journal.open_errand.mined[-1].fee_wei, "only gas"
    mined = await fair.journey.cancel()
    assert mined.succeeded
    assert fair.consumer_journal.open_errand is None


async def test_an_order_the_contract_refuses_leaves_nothing_open(fair):
    """Would catch a refused order that blocks every later one."""
    journey = fair.prepared()
    with pytest.raises(Refused, match="ValidityOutOfRange"):
        await journey.start_auction(Order(200, 10**15, 5, 1))
    assert fair.consumer_journal.open_errand is None


async def test_steps_out_of_order_say_what_comes_first(fair):
    """Would catch a traceback for a driver who types the second command first."""
    journey = fair.prepared()
    with pytest.raises(Refused, match="no_errand"):
        await journey.connect()
    await journey.start_auction(ORDER)
    with pytest.raises(Refused, match="errand_open"):
        await journey.start_auction(ORDER)
    with pytest.raises(Refused, match="not_connected"):
        await journey.end()


async def test_an_auction_of_another_journal_is_left_alone(fair):
    """Would catch a second journal that takes over, or doubles, the first one's auction."""
    await fair.prepared().start_auction(ORDER)
    await fair.crash()
    (fair.folder / "carol" / "consumer.sqlite").rename(fair.folder / "elsewhere.sqlite")
    with pytest.raises(Refused) as refused:
        await fair.prepared().start_auction(ORDER)
    assert refused.value.reason == "auction_live"


async def test_conceding_pays_what_was_signed_and_the_rest_comes_back(fair):
    """Would catch a driver whose provider vanished and whose money stays locked."""
    fair.buys()
    await fair.offers()
    await fair.delivers(50)
    await fair.crash()
    journey = fair.prepared()
    mined = await journey.end()
    token = fair.consumer_journal.open_errand.terms.token
    state = await fair.session(token)
    assert (mined.step, state.claimed_wh) == ("end", 50)
    fair.pass_time(max(0, state.settle_at_s - fair.now_s) + 1)
    await fair.send(fair.provider.owner.signer, contract.encode_settle(token))  # anyone may
    summary = await fair.buys()
    assert summary.energy_wh_settled == 50
    assert summary.cost_wei == cost_wei_floor(BID, 50)
    assert [one.step for one in summary.transactions] == ["start_auction", "connect", "end"]


async def test_a_settlement_above_our_receipts_is_shouted_about(fair):
    """Would catch a stolen session key, or a lying node, passing as a normal end."""
    fair.buys()
    await fair.offers()
    await fair.delivers(50)
    await fair.crash()
    journey = fair.prepared()
    errand = fair.consumer_journal.open_errand
    await journey.market.concede(errand.terms.token, 200)  # the account's key, used behind the journal's back
    with pytest.raises(Refused) as refused:
        await fair.buys()
    assert refused.value.reason == "wrong_settlement"
    assert fair.consumer_journal.open_errand is not None, "nothing is forgotten about it"


async def test_a_reorg_of_connect_is_followed_to_its_new_token(fair):
    """Would catch a session lost to a reorg: the token changes, the session and its receipts stay."""
    buying = fair.buys()
    await fair.offers()
    await fair.delivers(40)
    old = fair.consumer_journal.open_errand.terms
    fair.net.methods.increase_time(7)
    fair.net.reorg(1)
    await fair.until(lambda: fair.consumer_journal.open_errand.terms.token != old.token)
    assert fair.consumer_journal.open_errand.terms.session_id == old.session_id
    await fair.until(lambda: fair.script.terms.token != old.token and fair.script.grant is not None)
    await fair.delivers(200)
    await fair.settles()
    summary = await buying
    assert summary.energy_wh_settled == 200
    assert summary.token != old.token


async def test_the_key_of_the_session_is_private_and_survives(fair):
    """Would catch a session key that others on the machine can read, or that a crash loses (the grant would be void)."""
    fair.buys()
    await fair.offers()
    await fair.delivers(10)
    (path,) = (fair.folder / "carol").glob("*.key")
    assert path.stat().st_mode & 0o077 == 0
    granted = fair.script.grant.session_key
    await fair.crash()
    journey = fair.prepared()
    assert journey._session_key(fair.consumer_journal.open_errand.terms.session_id).address == granted
    path.chmod(0o644)
    with pytest.raises(Misconfigured, match="can be read by others"):
        journey._session_key(fair.consumer_journal.open_errand.terms.session_id)


async def test_a_whole_purchase_over_a_real_broker(fair):
    """Would catch a journey that works only when every message is a function call."""
    sref, root = "aa" * 16, f"v2v/1/{hex0x(fair.evp)}"
    async with EmbeddedBroker() as broker, aiomqtt.Client(broker.host, broker.port) as client:
        await client.subscribe(f"{root}/in/+", qos=1)

        class Out:
            """Where the script speaks: the broker's topics."""

            def say(self, message):
                task = asyncio.ensure_future(client.publish(f"{root}/out/{sref}", encode(message), qos=1))
                said.add(task)

        async def play():
            await fair.until(lambda: getattr(fair.consumer_journal.open_errand, "terms", None) is not None)
            script = fair.scripted()
            await client.publish(f"{root}/hello/0x01", encode(script.hello()), qos=1, retain=True)
            async for message in client.messages:
                assert message.topic.value == f"{root}/in/{sref}"
                answer = script.answer(message.payload)
                if answer is not None:
                    fair.carrier.say(answer)

        said: set = set()
        fair.carrier = Out()
        async with MqttCarrier(Broker(broker.host, broker.port), sref) as carrier:
            buying = fair.buying = asyncio.create_task(fair.prepared().charge(ORDER, carrier))
            playing = asyncio.create_task(play())
            await fair.offers()
            for wh in (60, 200):
                await fair.delivers(wh)
            await fair.settles()
            summary = await buying
            playing.cancel()
            await asyncio.wait({playing, *said})
    assert (summary.energy_wh_settled, summary.energy_wh_acked) == (200, 200)
    assert summary.ocmf_begin
