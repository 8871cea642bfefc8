"""Energy against receipts: what is signed, sent, repeated, refused, and how the end is believed."""

import asyncio
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from scripted_provider import (
    FAST,
    NOW_S,
    OWNER,
    STRANGER,
    MemoryCarrier,
    PlayedChain,
    ScriptedProvider,
    eventually,
    opened_journal,
    plugged,
    terms_of,
)

from agent.consumer.charging import Charging
from agent.consumer.meeting import Meeting
from agent.consumer.plug import TokenChanged
from agent.consumer.policy import Patience, SigningLimits
from agent.core import token as rules
from agent.core.messages import AckMessage, Refusal, decode
from agent.errors import Transient

QUICK = SigningLimits(
    step_wh=1_000, pre_sign_wh=1_000
)  # a test's energy flows in no time, and its driver trusts

STRICT = SigningLimits(step_wh=1_000)  # nobody has confirmed anything


class Story:
    """One session after its acceptance, with everything a test may do to it."""

    def __init__(self, folder, *, limits=QUICK, waits=FAST, own_wh=lambda: None):
        self.provider = ScriptedProvider(terms_of())
        self.carrier = MemoryCarrier(self.provider)
        self.chain = PlayedChain()
        self.plug = plugged(folder, self.carrier, self.chain, limits=limits, waits=waits)
        self.stop = asyncio.Event()
        self.charging = Charging(self.plug, self.stop, own_wh)
        self.task = None

    @property
    def signed_wh(self):
        """The highest receipt."""
        return self.plug.errand.energy_wh_signed

    def read(self, wh, **how):
        """The provider's meter says this."""
        self.carrier.say(self.provider.reading(wh, **how))

    async def heard(self, message):
        """Say it and wait until the consumer has taken it."""
        self.carrier.say(message)
        await eventually(lambda: not self.carrier.inbox._messages)
        await asyncio.sleep(0)

    async def ended(self, wh, final=True):
        """The chain settles; the provider may say so too."""
        self.chain.settle(wh)
        if final:
            self.carrier.say(self.provider.final(wh))
        return await self.task


@asynccontextmanager
async def charging(folder, **how):
    """A story with the consumer at work; it must not have failed behind the test's back."""
    story = Story(folder, **how)
    await Meeting(story.plug).meet()
    story.task = asyncio.create_task(story.charging.charge())
    try:
        yield story
    finally:
        story.task.cancel()
        await asyncio.wait({story.task})


async def test_energy_is_signed_as_it_flows_and_the_chain_says_when_it_is_over(tmp_path):
    """Would catch a consumer that does not pay, pays early, or believes the provider about the end."""
    async with charging(tmp_path) as story:
        for wh in (10, 60, 200):
            story.read(wh)
            await eventually(lambda wh=wh: story.provider.acked_wh == wh)
        story.carrier.say(story.provider.final(200))
        await asyncio.sleep(0.1)
        assert not story.task.done(), "a Final is a hint; the session is still open on chain"
        charged = await story.ended(200)
    assert charged.settlement.energy_wh_settled == 200
    assert charged.energy_wh_acked == 200
    assert charged.stop_reason == "EnergyLimitReached"
    assert charged.final.ocmf_end == "OCMF|{end}"


async def test_every_receipt_is_on_disk_before_it_is_sent(tmp_path):
    """Would catch a receipt that the provider has and we do not remember: after a crash we would sign less than that."""
    async with charging(tmp_path) as story:
        on_disk = []
        story.carrier.losing = lambda _kind: on_disk.append(story.signed_wh)
        story.read(33)
        await eventually(lambda: on_disk)
        assert on_disk[0] == 33


async def test_a_lost_receipt_is_sent_again_until_it_is_acknowledged(tmp_path):
    """Would catch a session that pauses for ever because one message got lost; and a chatter that never stops."""
    async with charging(tmp_path) as story:
        lost = iter([True, True, False])
        story.carrier.losing = lambda _kind: next(lost, False)
        story.read(10)
        await eventually(lambda: story.provider.acked_wh == 10)
        assert len(set(story.provider.receipts)) == 1
        count = len(story.provider.receipts)
        await asyncio.sleep(4 * FAST.resend_s)
        assert len(story.provider.receipts) == count


async def test_a_forged_ack_cannot_make_us_silent_about_later_energy(tmp_path):
    """Would catch a stranger's "I have 200 Wh" that stops the repeating of the receipts after the next one."""
    async with charging(tmp_path) as story:
        story.provider.acking = False
        await story.heard(AckMessage(story.plug.terms.session_id, 200))
        story.read(10)
        await eventually(lambda: len(story.provider.receipts) >= 3)


@pytest.mark.parametrize("how", [{"key": STRANGER}, {"seq": 1}, {"seq": 0}])
async def test_forged_and_replayed_readings_buy_nothing(tmp_path, how):
    """Would catch a receipt for a reading that our provider did not make, or made long ago."""
    async with charging(tmp_path) as story:
        story.read(10)  # seq 1
        await eventually(lambda: story.provider.acked_wh == 10)
        await story.heard(story.provider.reading(150, **how))
        assert story.plug.odd.reason == ("wrong_signer" if "key" in how else "replayed")
        story.read(20)
        await eventually(lambda: story.provider.acked_wh == 20)
        assert story.signed_wh == 20


async def test_a_reading_of_another_session_is_not_ours(tmp_path):
    """Would catch the provider's other customer being charged to us."""
    async with charging(tmp_path) as story:
        other = ScriptedProvider(terms_of(nonce=2))
        await story.heard(other.reading(150))
        story.read(5)
        await eventually(lambda: story.provider.acked_wh == 5)
        assert story.signed_wh == 5


async def test_an_over_reporting_provider_gets_nothing_and_is_stopped_by_name(tmp_path):
    """Would catch a meter that runs faster than our car can take: signing stops at once, then the session is stopped."""
    async with charging(tmp_path, limits=SigningLimits(power_w_max=3_600)) as story:
        story.charging._patience = Patience(patience_ms=100)
        story.read(5)
        await eventually(lambda: story.provider.acked_wh == 5)
        for wh in range(100, 200, 5):
            story.read(wh)
            await asyncio.sleep(0.01)
        await eventually(lambda: story.provider.stops)
        assert story.plug.odd.reason == "faster_than_possible"
        assert story.signed_wh == 5
        story.read(6)
        await asyncio.sleep(0.05)
        assert story.signed_wh == 5, "a liar is not paid any more, even for what may be true"
        stop = decode(story.provider.stops[0])
        digest = rules.digest(story.plug.domain, rules.StopRequest(story.plug.terms.session_id, stop.at_s))
        assert rules.recover(digest, stop.signature) == story.plug.session_key.address
        charged = await story.ended(5, final=False)
        assert charged.stop_reason == "Remote"


async def test_our_own_meter_is_a_bound(tmp_path):
    """Would catch a relay: energy that another car received."""
    async with charging(tmp_path, limits=STRICT, own_wh=lambda: 0) as story:
        story.read(20)
        await eventually(lambda: story.provider.acked_wh == 20)
        story.read(60)
        await eventually(lambda: story.plug.odd is not None)
        assert story.plug.odd.reason == "above_own_meter"
        assert story.signed_wh == 20
        words = "not signed (above_own_meter): their meter says 60 Wh, our car says 0 Wh"
        await eventually(lambda: story.plug.tell[-1].words == words)


async def test_what_our_own_meter_shows_late_is_signed_without_another_reading(tmp_path):
    """Would catch a deadlock: the provider has paused and says nothing new, and our slow meter has caught up meanwhile."""
    own_wh = 0
    async with charging(tmp_path, limits=STRICT, own_wh=lambda: own_wh) as story:
        story.read(60)
        await eventually(lambda: story.plug.odd is not None)
        assert story.signed_wh == 0
        own_wh = 58
        await eventually(lambda: story.provider.acked_wh == 60)


async def test_a_car_without_a_meter_signs_no_more_than_the_allowance_until_its_driver_confirms(tmp_path):
    """Would catch a relay to a car without a meter; a driver who is not asked; and one whose word is asked for again."""
    async with charging(tmp_path, limits=STRICT) as story:
        story.read(25)
        await eventually(lambda: story.provider.acked_wh == 25)
        assert not any(told.asks_driver for told in story.plug.tell)
        story.read(26)
        await eventually(lambda: story.plug.tell[-1].asks_driver)
        assert story.signed_wh == 25
        assert story.plug.odd.reason == "unconfirmed"
        story.charging.confirmed.set()
        await eventually(lambda: story.provider.acked_wh == 26)
        story.read(90)
        await eventually(lambda: story.provider.acked_wh == 90)
        assert not story.plug.tell[-1].asks_driver
    story.plug.journal.close()

    journal = opened_journal(tmp_path, story.provider.terms, clock=lambda: NOW_S + 60.0)
    plug = plugged(tmp_path, story.carrier, story.chain, limits=STRICT, journal=journal)
    story.task = asyncio.create_task(Charging(plug, asyncio.Event()).charge())
    story.read(150)
    await eventually(lambda: story.provider.acked_wh == 150)
    await story.ended(150)


async def test_a_phone_that_slept_asks_for_what_it_missed(tmp_path):
    """Would catch a session that ends after two minutes although the driver's phone woke up in time: the provider has paused,
    and said its last reading into the void.
    """
    async with charging(tmp_path, waits=replace(FAST, quiet_s=0.1)) as story:
        await eventually(lambda: len(story.provider.presented) >= 2)
        assert len(set(story.provider.presented)) == 1, (
            "the very same presentation: a repeat is answered, not judged anew"
        )
        story.read(10)
        await eventually(lambda: story.provider.acked_wh == 10)
        known = len(story.provider.presented)
        await eventually(lambda: len(story.provider.presented) > known)
        assert len(story.provider.receipts) == 1


async def test_the_driver_may_stop_early_and_the_request_is_repeated(tmp_path):
    """Would catch a stop that one lost message swallows."""
    async with charging(tmp_path) as story:
        lost = iter([True, True])
        story.carrier.losing = lambda kind: kind == "stop" and next(lost, False)
        story.read(50)
        await eventually(lambda: story.provider.acked_wh == 50)
        story.stop.set()
        await eventually(lambda: story.provider.stops)
        charged = await story.ended(50)
        assert charged.settlement.energy_wh_settled == 50


async def test_after_a_crash_the_newest_receipt_goes_out_again(tmp_path):
    """Would catch energy that was signed, not acknowledged, and then forgotten; and a lower receipt than before."""
    async with charging(tmp_path) as story:
        story.provider.acking = False
        story.read(70)
        await eventually(lambda: story.signed_wh == 70)
    story.plug.journal.close()

    story.provider.acking, story.provider.receipts = True, []
    journal = opened_journal(tmp_path, story.provider.terms, clock=lambda: NOW_S + 60.0)
    again = Charging(plugged(tmp_path, story.carrier, story.chain, journal=journal), asyncio.Event())
    story.task = asyncio.create_task(again.charge())
    await eventually(lambda: story.provider.acked_wh == 70)
    story.read(40)
    charged = await story.ended(70)
    assert charged.energy_wh_acked == 70
    assert {decode(data).delivered_wh for data in story.provider.receipts} == {70}


async def test_time_that_a_phone_slept_counts_for_what_can_have_flowed(tmp_path):
    """Would catch a phone whose monotonic clock stood still while energy flowed: an honest provider would look impossibly fast,
    for the rest of the session, and be stopped as a liar.
    """
    async with charging(tmp_path, limits=SigningLimits(pre_sign_wh=1_000)) as story:
        story.read(180)  # 22 kW give that in half a minute
        await eventually(lambda: story.plug.odd is not None)
        assert story.plug.odd.reason == "faster_than_possible"
        story.plug.journal._clock = lambda: NOW_S + 60.0
        await eventually(lambda: story.provider.acked_wh == 180)


async def test_time_before_a_restart_counts_for_what_can_have_flowed(tmp_path):
    """Would catch a restart that makes an honest provider look impossibly fast: 200 Wh after one minute."""
    async with charging(tmp_path, limits=SigningLimits(pre_sign_wh=1_000)) as story:
        pass
    story.plug.journal.close()
    journal = opened_journal(tmp_path, story.provider.terms, clock=lambda: NOW_S + 60.0)
    limits = SigningLimits(pre_sign_wh=1_000)
    plug = plugged(tmp_path, story.carrier, story.chain, limits=limits, journal=journal)
    story.task = asyncio.create_task(Charging(plug, asyncio.Event()).charge())
    story.read(200)
    await eventually(lambda: story.provider.acked_wh == 200)
    await story.ended(200)


async def test_a_node_that_is_away_does_not_delay_a_receipt(tmp_path):
    """Would catch a provider that pauses because the *consumer's* node restarts."""
    async with charging(tmp_path) as story:
        story.read(10)
        await eventually(lambda: story.provider.acked_wh == 10)
        story.chain.away = Transient("node away")
        story.read(30)
        await eventually(lambda: story.provider.acked_wh == 30)
        story.chain.away = None
        await story.ended(30)


async def test_a_session_that_the_chain_tells_differently_is_looked_at_again(tmp_path):
    """Would catch a consumer that goes on signing for a `connect` that fell out of the chain, or gives it up."""
    async with charging(tmp_path) as story:
        story.chain.open = False
        with pytest.raises(TokenChanged):
            await story.task


async def test_silence_ends_with_what_to_do(tmp_path):
    """Would catch a consumer that waits for ever while its deposit is locked."""
    async with charging(tmp_path, waits=replace(FAST, silence_s=0.3)) as story:
        story.read(10)
        await eventually(lambda: story.provider.acked_wh == 10)
        with pytest.raises(Transient, match="no word from the provider") as silence:
            await story.task
    assert "consumer end" in silence.value.remedy
    assert "10 Wh" in silence.value.remedy


async def test_a_refused_receipt_is_not_the_end(tmp_path):
    """Would catch a session that dies of one `rate_limited`."""
    async with charging(tmp_path) as story:
        await story.heard(Refusal("rate_limited", ""))
        story.read(10)
        await eventually(lambda: story.provider.acked_wh == 10)
        await story.ended(10)


async def test_the_owners_own_key_may_sign_readings(tmp_path):
    """Would catch a provider without an operator being refused."""
    async with charging(tmp_path) as story:
        story.read(10, key=OWNER)
        await eventually(lambda: story.provider.acked_wh == 10)


async def test_nothing_is_charged_without_a_presentation(tmp_path):
    """Would catch our own mistake: a bound on time that has no beginning."""
    story = Story(tmp_path)
    with pytest.raises(AssertionError):
        await story.charging.charge()


async def test_a_settlement_without_a_final_is_still_the_end(tmp_path):
    """Would catch a provider that takes the money and keeps its records back: we must not wait for ever."""
    async with charging(tmp_path) as story:
        story.read(10)
        await eventually(lambda: story.provider.acked_wh == 10)
        charged = await story.ended(10, final=False)
    assert charged.final is None
    assert charged.settlement.cost_wei == 10 * 10**11
