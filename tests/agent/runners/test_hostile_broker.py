"""Nothing worse than a pause: the daemon's runners and the honest consumer, unmodified, at a broker that means harm.

Real engine, journal, door and MQTT runner on one side; real meeting, charging, journal and MQTT carrier on the other; between
them `hostile_broker`, a seed each. Charger and chain are played: power flows when the core owes it, one tick after the other.
Several worlds run at once, because they mostly wait.
"""

import asyncio
import contextlib
import functools
import time
from dataclasses import replace

import pytest
from hostile_broker import HostileBroker
from plug import DOMAIN, PORT, RATE_WEI_PER_KWH, SREF, Key, Plug, eventually
from scripted_provider import FAST, OPENED, PlayedChain, Told

from agent.consumer import carrier_mqtt
from agent.consumer.carrier import INBOX_MAX, Backoff
from agent.consumer.carrier_http import HttpCarrier
from agent.consumer.carrier_mqtt import Broker as BrokerPlace
from agent.consumer.carrier_mqtt import MqttCarrier
from agent.consumer.charging import Charging
from agent.consumer.journal import ConsumerJournal, Matched, OrderPlaced
from agent.consumer.meeting import Meeting
from agent.consumer.plug import Plug as ConsumersPlug
from agent.consumer.plug import TokenChanged
from agent.consumer.policy import SigningLimits
from agent.core import events as ev
from agent.core import token as rules
from agent.core.effects import Deliver, SignMeterRecord, SignSettlement
from agent.core.messages import Accept, AckMessage, Final, Hello, ReadingMessage, Refusal, Status, encode
from agent.core.session import CLOSED, Stage
from agent.core.units import BlockHash, TxHash, hex0x
from agent.errors import Refused
from agent.keys import ephemeral_signer
from agent.runners import mqtt
from agent.runners.http import HttpRunner
from agent.runners.mqtt import BrokerAddress, MqttRunner

ORDER_WH, UNACKED_WH, TICK_WH, TICK_S = 200, 50, 2, 0.03
HARM_S = 4.0  # for so long the broker harms; then it is honest, or the owner stops
SEEDS, SEEDS_LONG = 6, 60
PATIENT = replace(FAST, hello_s=300, meeting_s=300, silence_s=300, quiet_s=2, knock_s=0.1, resend_s=0.2)

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Time-outs of this machine, not of a mobile network."""
    monkeypatch.setattr(mqtt, "PUBACK_WAIT_S", 1.5)
    monkeypatch.setattr(mqtt, "BACKOFF_S", (0.02, 0.3))
    monkeypatch.setattr(carrier_mqtt, "CONNECT_TIMEOUT_S", 1.5)
    monkeypatch.setattr(carrier_mqtt, "PUBLISH_TIMEOUT_S", 1.5)
    monkeypatch.setattr(carrier_mqtt, "Backoff", functools.partial(Backoff, 0.02, 0.3))


class World:
    """One provider, one consumer, one order, and what must never happen."""

    def __init__(self, folder, seed=0):
        folder.mkdir()
        self.car = Plug(folder)
        # Short where we wait for nothing, long where a busy machine would end what the broker did not.
        policy = replace(
            self.car.engine.live.policy, final_receipt_wait_s=2 if seed % 2 else 60, receipt_timeout_s=600
        )
        self.car.engine.live = replace(self.car.engine.live, policy=policy)
        self.folder, self.terms = folder, self.car.plugged_in(order_wh=ORDER_WH)
        self.register_mwh = 5_000_000
        self.broker = HostileBroker(seed, self.inventions())
        self.paid_wh, self.told_no = None, 0
        self.chain = PlayedChain(
            signers_now=frozenset({self.car.provider.address}), at_s=self.car.engine.live.at_s
        )
        self.consumer = None

    @property
    def session(self):
        """The one session."""
        return self.car.engine.book.sessions[self.terms.session_id]

    @property
    def delivered_wh(self):
        """What truly flowed."""
        return (self.register_mwh - 5_000_000) // 1000

    def inventions(self):
        """What a liar says to both sides: nothing of it is signed by whom it should be."""
        liar, sid = Key("liar"), self.terms.session_id
        out, into = (f"v2v/1/{hex0x(self.terms.provider)}/{way}/{SREF}" for way in ("out", "in"))
        typed = rules.ProviderHello(self.terms.provider, rules.charger_id(PORT), b"\x07" * 32, 2**31)
        signature = liar.sign_digest(rules.digest(DOMAIN, typed))
        said = [
            *(
                Refusal(reason, "")
                for reason in ("wrong_signer", "expired", "unknown_session", "busy", "out_of_order")
            ),
            *(Status(sid, stage, 1, 1, "Local") for stage in ("SETTLED", "STOPPING", "waiting")),
            Final(sid, "SETTLED", "Local", 200, 0, 0, TxHash(bytes(32)), "", ""),
            AckMessage(sid, ORDER_WH),
            ReadingMessage(sid, 2**40, ORDER_WH, 11_000, 1, signature),
            Accept(sid, b"\x01" * 32, 0, 2**40, 1, signature),
            Hello(typed.provider, typed.charger_id, typed.nonce, typed.expires_at_s, signature),
        ]
        forged = Plug.present(self.car, self.terms, key=liar)
        receipt = self.car.receipt(self.terms, 1).replace(b'"deliveredWh":1', b'"deliveredWh":2')
        return [
            *((out, encode(one)) for one in said),
            *((into, one) for one in (forged, receipt, b"{}", b"\xff" * 99, b"[" * 4_000)),
            (f"v2v/1/{hex0x(self.terms.provider)}/in/somebody", self.car.receipt(self.terms, 1)),
            ("v2v/1/elsewhere/in/x", forged),
        ]

    # ---- what is played

    async def play(self):
        """Charger, chain and the rules that nobody may break, until cancelled."""
        ticks = 0
        while True:
            engine = self.car.engine
            owed = engine.owed()
            offered = any(isinstance(one, Deliver) for one in owed)
            if offered and self.delivered_wh < ORDER_WH:
                self.register_mwh += TICK_WH * 1000
                self.car.read(
                    self.register_mwh, power_w=11_000, pilot_state="C", current_ma=16_000, voltage_mv=230_000
                )
            else:
                self.car.read(self.register_mwh)
            if ticks % 30 == 0:
                self.car.header()
            for one in owed:
                self._act(one)
            self.check()
            ticks += 1
            await asyncio.sleep(TICK_S)

    def _act(self, effect):
        engine, sid = self.car.engine, self.terms.session_id
        if isinstance(effect, SignMeterRecord):
            engine.accept(ev.MeterRecordSigned(engine.at_s, sid, effect.moment, f"OCMF|{effect.pagination}|"))
        if isinstance(effect, SignSettlement):
            self.pay(effect)

    def pay(self, effect):
        """What the contract would do with this."""
        engine, terms = self.car.engine, self.terms
        if effect.energy_wh > 0:
            rules.receipt_signer(
                DOMAIN,
                effect.ack,
                session_id=terms.session_id,
                provider=terms.provider,
                consumer=terms.consumer,
                delivered_wh=effect.energy_wh,
            )
        self.paid_wh = effect.energy_wh
        tx_hash, block = TxHash(rules.keccak(b"tx")), BlockHash(rules.word(7))
        engine.accept(
            ev.SettlementSigned(engine.at_s, terms.session_id, effect.energy_wh, 1, tx_hash, b"raw", 2, 1)
        )
        cost_wei = RATE_WEI_PER_KWH * effect.energy_wh // 1000
        engine.accept(
            ev.ConnectionEndedSeen(engine.at_s, terms.session_id, effect.energy_wh, cost_wei, tx_hash, block)
        )
        engine.accept(ev.ConnectionEndedBelieved(engine.at_s, terms.session_id, block))
        self.chain.settle(effect.energy_wh)

    def check(self):
        """No energy beyond credit, nothing signed that did not flow, nothing credited unsigned, no queue without end."""
        acked_wh = self.session.energy_wh_acked
        signed_wh = 0
        if self.consumer is not None and self.consumer.journal.open_errand is not None:
            signed_wh = self.consumer.errand.energy_wh_signed
            assert signed_wh <= self.delivered_wh
            assert acked_wh <= signed_wh
            assert len(self.consumer.carrier._inbox._messages) <= INBOX_MAX
        assert self.delivered_wh - acked_wh <= UNACKED_WH + 2 * TICK_WH

    # ---- who acts

    def consumers_side(self, carrier):
        """The consumer with its journal, at this carrier."""
        journal = ConsumerJournal(
            self.folder / "consumer" / "c.sqlite", DOMAIN, self.car.consumer.address, time.time
        )
        OPENED.append(journal)
        terms = self.terms
        journal.write(OrderPlaced(1, 1, terms.energy_wh_ordered, RATE_WEI_PER_KWH, 60, 3600, 1, SREF))
        journal.write(Matched(1, terms))
        self.consumer = ConsumersPlug(
            domain=DOMAIN,
            terms=terms,
            account=self.car.consumer,
            session_key=ephemeral_signer(b"session key"),
            carrier=carrier,
            journal=journal,
            chain=self.chain,
            limits=SigningLimits(power_w_max=2_000_000),  # our ticks deliver faster than any car
            waits=PATIENT,
            tell=Told(),
            now_ms=lambda: time.monotonic_ns() // 1_000_000,
        )
        return self.consumer

    async def buy(self, carrier):
        """Meet and charge until the chain shows the end. Who is told no in a liar's words says the same command again."""
        side = self.consumers_side(carrier)
        while True:
            try:
                await Meeting(side).meet()
                break
            except (Refused, TokenChanged):
                self.told_no += 1
        return await Charging(side, asyncio.Event(), own_wh=lambda: self.delivered_wh).charge()

    @contextlib.asynccontextmanager
    async def opened(self):
        """The daemon's side, its charger and its chain, for the time of the story."""
        place = BrokerAddress("127.0.0.1", self.broker.port, keepalive_s=2)
        self.runner = MqttRunner(self.car.engine, self.car.door, self.car.provider.address, place)
        self.http = HttpRunner(self.car.engine, self.car.door, "127.0.0.1", 0)
        work = (self.runner.run(), self.http.run(), self.car.beat(), self.play())
        tasks = [asyncio.create_task(one) for one in work]
        try:
            yield tasks
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self.car.close()


async def no_crash(tasks, story):
    """The story's result; whatever ends one of our own tasks is raised."""
    telling = asyncio.create_task(story)
    try:
        await asyncio.wait({*tasks, telling}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            if task.done():
                task.result()
                pytest.fail("a runner ended")
        return telling.result()
    finally:
        telling.cancel()
        await asyncio.gather(telling, return_exceptions=True)


async def evening(folder, seed):
    """One world: harm for a while, and then calm (even seeds) or the owner's stop in the middle of the harm (odd seeds)."""
    world = World(folder, seed)
    async with world.broker, world.opened() as tasks:
        await eventually(lambda: world.runner.connected)
        place = BrokerPlace("127.0.0.1", world.broker.port, keepalive_s=2)
        async with MqttCarrier(place, SREF) as carrier:

            async def story():
                world.broker.hostile = True
                buying = asyncio.create_task(world.buy(carrier))
                await asyncio.wait({buying}, timeout=HARM_S)
                if seed % 2:
                    world.car.engine.stop_by_owner()
                else:
                    world.broker.hostile = False
                await eventually(lambda: world.session.stage in CLOSED or buying.done(), 300)
                if not buying.done() and world.consumer.errand.accepted is None:
                    buying.cancel()  # never met: the owner's stop came first, and nothing is owed
                    return await asyncio.gather(buying, return_exceptions=True)
                return await buying

            await no_crash(tasks, story())
    return world


async def test_nothing_worse_than_a_pause(tmp_path, request):
    """Would catch energy beyond credit, a wrong payment, a runner that dies, a consumer that gives up or pays too much, and a
    session that does not end at its last receipt, each with its seed.
    """
    seeds = range(SEEDS_LONG if request.config.getoption("--long") else SEEDS)
    did = None
    for first in range(0, len(seeds), 6):
        worlds = await asyncio.gather(
            *(evening(tmp_path / str(seed), seed) for seed in seeds[first : first + 6])
        )
        for world in worlds:
            session = world.session
            assert session.stage is Stage.SETTLED, (world.folder.name, session.stage)
            assert world.paid_wh == session.energy_wh_acked
            assert world.told_no < 10, "a liar's word is not believed at once"
            if int(world.folder.name) % 2 == 0:
                assert world.paid_wh == ORDER_WH, (
                    world.folder.name,
                    session.stop_reason,
                    session.stop_detail,
                )
            did = world.broker.did if did is None else did + world.broker.did
    assert len(did) >= 18, f"a broker that harms in {len(did)} ways only: {did}"


async def test_a_harmful_broker_costs_nothing_where_the_web_server_answers(tmp_path):
    """Would catch a session over HTTP that a broker can slow, stop or end."""
    world = World(tmp_path / "http", seed=2)
    async with world.broker, world.opened() as tasks:
        world.broker.hostile = True
        await world.http.listening.wait()
        async with HttpCarrier(world.http.url, SREF) as carrier:
            charged = await no_crash(tasks, world.buy(carrier))
    assert charged.settlement.energy_wh_settled == world.paid_wh == ORDER_WH
    assert sum(world.broker.did.values()) > 0
