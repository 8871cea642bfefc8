"""Consumer and provider as they are: our side of the plug against the agent's real door, directly and over its web server."""

import asyncio
import contextlib
import time

import pytest
from plug import DOMAIN, PORT, RATE_WEI_PER_KWH, SREF, Plug
from scripted_provider import FAST, OPENED, PlayedChain, Told, eventually

from agent.consumer.carrier import Inbox
from agent.consumer.carrier_http import HttpCarrier
from agent.consumer.charging import Charging
from agent.consumer.journal import ConsumerJournal, Matched, OrderPlaced
from agent.consumer.meeting import Meeting
from agent.consumer.plug import Plug as ConsumersPlug
from agent.consumer.policy import SigningLimits
from agent.core.messages import encode
from agent.keys import ephemeral_signer
from agent.runners.http import HttpRunner


@pytest.fixture
def car(tmp_path):
    """A provider's engine, journal and door."""
    car = Plug(tmp_path)
    yield car
    car.close()


class DoorCarrier:
    """Straight through the door, without a network; `news` brings what the door says by itself."""

    def __init__(self, car):
        self.trouble, self.car, self.inbox = "", car, Inbox()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def meet(self, provider):
        """Nothing to do."""

    async def ask_hello(self):
        """The current Hello."""
        self.inbox.put(encode(self.car.door.hello(PORT)))

    async def post(self, kind, data):
        """In, and the answer back."""
        self.inbox.put(encode(self.car.door.answer(SREF, "a test", data)))

    async def next(self, timeout_s):
        """The next message."""
        return await self.inbox.next(timeout_s)

    def news(self):
        """What a transport would carry now."""
        for sref, message in self.car.door.news():
            assert sref == SREF
            self.inbox.put(encode(message))


def consumers(folder, car, carrier, terms):
    """The consumer's side, with the key of the car's consumer."""
    journal = ConsumerJournal(folder / "consumer" / "c.sqlite", DOMAIN, car.consumer.address, time.time)
    OPENED.append(journal)
    journal.write(OrderPlaced(1, 1, terms.energy_wh_ordered, RATE_WEI_PER_KWH, 60, 3600, 1, SREF))
    journal.write(Matched(1, terms))
    return ConsumersPlug(
        domain=DOMAIN,
        terms=terms,
        account=car.consumer,
        session_key=ephemeral_signer(b"session key"),
        carrier=carrier,
        journal=journal,
        chain=PlayedChain(signers_now=frozenset({car.provider.address}), at_s=car.engine.live.at_s),
        limits=SigningLimits(step_wh=1_000, pre_sign_wh=1_000),
        waits=FAST,
        tell=Told(),
        now_ms=lambda: time.monotonic_ns() // 1_000_000,
    )


@contextlib.asynccontextmanager
async def running(work):
    """Beside the story, ended with it."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        task.cancel()
        await asyncio.wait({task})


def flow(car, register_mwh):
    """Power flows and the meter stands here."""
    car.read(register_mwh, power_w=11_000, pilot_state="C", current_ma=16_000, voltage_mv=230_000)


async def test_the_real_door_takes_our_token_and_our_receipts(car, tmp_path):
    """Would catch consumer and door that agree with their own tests and not with each other."""
    terms = car.plugged_in(order_wh=100)
    carrier = DoorCarrier(car)
    side = consumers(tmp_path, car, carrier, terms)
    async with running(Meeting(side).meet()) as meeting:
        await eventually(lambda: side.errand.presented is not None)
        car.read()
        accept = await meeting
    assert accept.register_mwh_begin == 5_000_000
    async with running(Charging(side, asyncio.Event()).charge()) as charging:
        for wh in (12, 40):
            flow(car, 5_000_000 + wh * 1000)
            await asyncio.sleep(0.6)  # the door signs a reading at most every half second
            carrier.news()
            await eventually(lambda wh=wh: car.engine.book.sessions[terms.session_id].energy_wh_acked == wh)
        side.chain.settle(40)
        assert (await charging).settlement.energy_wh_settled == 40


async def test_a_token_before_the_chain_is_believed_waits_and_is_then_accepted(car, tmp_path):
    """Would catch the usual order of things on a fast phone: we present before the provider believes `Connected`."""
    car.header()
    carrier = DoorCarrier(car)
    terms = car.connect(believed=False)
    side = consumers(tmp_path, car, carrier, terms)
    async with running(Meeting(side).meet()) as meeting:
        await eventually(lambda: any("waiting" in told.words for told in side.tell))
        from agent.core import events as ev

        car.engine.accept(ev.ConnectedBelieved(car.engine.at_s, terms.session_id, terms.block_hash))
        car.read()
        car.read()
        await meeting
    assert side.errand.accepted is not None


async def test_over_the_real_web_server(car, tmp_path):
    """Would catch a page, header, path or stream that the two sides spell differently."""
    terms = car.plugged_in(order_wh=100)
    http = HttpRunner(car.engine, car.door, "127.0.0.1", 0)
    async with running(http.run()):
        await http.listening.wait()
        async with HttpCarrier(http.url, SREF) as carrier:
            side = consumers(tmp_path, car, carrier, terms)
            async with running(Meeting(side).meet()) as meeting:
                await eventually(lambda: side.errand.presented is not None)
                await eventually(lambda: car.engine.book.sessions[terms.session_id].presentation is not None)
                car.read()
                await meeting
            async with running(Charging(side, asyncio.Event()).charge()):
                flow(car, 5_012_000)
                await eventually(lambda: car.engine.book.sessions[terms.session_id].energy_wh_acked == 12)
