"""Stories of the broker's carrier, on a real broker: the demo's. A consumer is another client of it."""

import asyncio
import contextlib
import json
import os
import shutil
import struct
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import aiomqtt
import pytest
import structlog
import vandals
from plug import DOMAIN, NOW_S, PORT, SREF, Plug, eventually
from tcp_proxy import TcpProxy

from agent.core import token as rules
from agent.core.messages import MESSAGE_BYTES_MAX, Status, decode
from agent.core.units import hex0x
from agent.runners import mqtt
from agent.runners.mqtt import BrokerAddress, MqttRunner
from bench._broker import SUBACK, SUBSCRIBE, Broker, packet


@pytest.fixture
def plug(tmp_path):
    """A provider at a port."""
    plug = Plug(tmp_path)
    yield plug
    plug.close()


class BrokerProcess:
    """A real broker that can be killed: the demo's (amqtt) or the field's (mosquitto)."""

    def __init__(self, kind, port, folder):
        self.kind, self.port, self._folder, self._process = kind, port, folder, None

    async def start(self):
        """Start it, and wait until it lets clients in."""
        configuration = self._folder / "mosquitto.conf"
        configuration.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\nmax_packet_size 6144\n"
        )
        mosquitto = (MOSQUITTO or "", "-c", str(configuration))
        command = (sys.executable, "-c", AMQTT, str(self.port)) if self.kind == "amqtt" else mosquitto
        quiet = asyncio.subprocess.DEVNULL
        self._process = await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)
        async with asyncio.timeout(20):
            while True:
                try:
                    async with aiomqtt.Client("127.0.0.1", self.port):
                        return
                except aiomqtt.MqttError:
                    await asyncio.sleep(0.05)

    async def kill(self):
        """No goodbye."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            await self._process.wait()


AMQTT = """
import asyncio, sys
from agent.demo.broker import Broker

async def serve():
    async with Broker(port=int(sys.argv[1])):
        await asyncio.Event().wait()

asyncio.run(serve())
"""
ROOT = Path(__file__).parents[3]
MOSQUITTO = shutil.which("mosquitto", path=os.environ["PATH"] + ":/usr/sbin")


@pytest.fixture(params=["amqtt", "mosquitto"])
async def broker(request, tmp_path, unused_tcp_port):
    """A broker for one story; once the demo's, once the field's where it is installed."""
    if request.param == "mosquitto" and MOSQUITTO is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    broker = BrokerProcess(request.param, unused_tcp_port, tmp_path)
    await broker.start()
    yield broker
    await broker.kill()


@contextlib.asynccontextmanager
async def carried(plug, port, **more):
    """A runner at this broker, for the time of the story."""
    runner = MqttRunner(
        plug.engine, plug.door, plug.provider.address, BrokerAddress("127.0.0.1", port, **more)
    )
    tasks = [asyncio.create_task(runner.run()), asyncio.create_task(plug.beat())]
    try:
        yield runner
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[0]


class Listener:
    """Another client of the broker: keeps everything it hears about this provider, in order."""

    def __init__(self, client, root):
        self.client, self.root = client, root
        self.heard = defaultdict(list)
        self._news = asyncio.Event()

    async def listen(self):
        """Until cancelled."""
        async for message in self.client.messages:
            self.heard[message.topic.value.removeprefix(f"{self.root}/")].append(message)
            self._news.set()

    async def until(self, holds, seconds=30.0):
        """Wait for a condition on what was heard; False in time is a failure of the story."""
        async with asyncio.timeout(seconds):
            while not holds():
                self._news.clear()
                await self._news.wait()

    def messages(self, sref=SREF, kind=None):
        """What the door said to this consumer."""
        said = [decode(message.payload) for message in self.heard[f"out/{sref}"]]
        return [message for message in said if kind in (None, message.TYPE)]

    def payloads(self, topic):
        """What was heard on one topic, in order."""
        return [message.payload for message in self.heard[topic]]

    async def ask(self, data, sref=SREF, **more):
        """Send a message to the door."""
        await self.client.publish(f"{self.root}/in/{sref}", data, qos=1, **more)


@contextlib.asynccontextmanager
async def listening(plug, port):
    """A client that hears everything of this provider."""
    root = f"v2v/1/{hex0x(plug.provider.address)}"
    async with aiomqtt.Client("127.0.0.1", port) as client:
        await client.subscribe(f"{root}/#", qos=1)
        listener = Listener(client, root)
        task = asyncio.create_task(listener.listen())
        try:
            yield listener
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task


def hello_topic():
    """Where the port's Hello stands."""
    return f"hello/{hex0x(rules.charger_id(PORT))}"


async def test_late_comer_finds_the_hello_and_that_the_provider_is_online(plug, broker):
    """Would catch a Hello that is not retained, not signed by the provider, or published before the time is known."""
    async with carried(plug, broker.port):
        async with listening(plug, broker.port) as early:
            await early.until(lambda: early.payloads("online") == [b"online"])
            await early.until(lambda: "car/state" in early.heard)
            plug.header()
            await early.until(lambda: early.heard[hello_topic()])
            assert decode(early.payloads(hello_topic())[0]).expires_at_s > NOW_S
        async with listening(plug, broker.port) as late:
            await late.until(lambda: late.heard[hello_topic()] and late.heard["online"])
            assert late.heard[hello_topic()][0].retain
            assert late.heard["online"][0].retain
            hello = decode(late.heard[hello_topic()][0].payload)
    assert rules.recover(rules.digest(DOMAIN, hello.typed), hello.signature) == plug.provider.address
    assert hello == plug.door.hello(PORT)


async def test_consumer_presents_signs_and_hears_each_news_once(plug, broker):
    """Would catch a lost answer, news without end, an ack that never comes, and an accept said twice (answer and news)."""
    terms = plug.plugged_in()
    async with listening(plug, broker.port) as consumer, carried(plug, broker.port):
        await consumer.until(lambda: consumer.heard[hello_topic()])
        hello = decode(consumer.heard[hello_topic()][0].payload)
        await consumer.ask(plug.present(terms, hello))
        await consumer.until(lambda: consumer.messages(kind="accept"))
        plug.read()
        plug.read(5_012_345, power_w=11_000, pilot_state="C")
        await consumer.until(
            lambda: any(reading.delivered_wh == 12 for reading in consumer.messages(kind="reading"))
        )
        await consumer.ask(plug.receipt(terms, 12))
        await consumer.until(lambda: consumer.messages(kind="ack"))
        for _ in range(3):
            plug.header()
        await consumer.ask(plug.stop(terms))
        await consumer.until(lambda: any(s.stage == "STOPPING" for s in consumer.messages(kind="status")))
        assert len(consumer.messages(kind="accept")) == 1
        assert [ack.delivered_wh for ack in consumer.messages(kind="ack")] == [12]
        statuses = consumer.messages(kind="status")
        assert len(statuses) == len(set(statuses))
        # The old nonce is used up, so the next consumer finds another Hello.
        await consumer.until(lambda: len(consumer.heard[hello_topic()]) == 2)
    assert consumer.messages(kind="refusal") == []


async def test_a_consumer_that_repeats_itself_is_told_everything_again(plug, broker):
    """Would catch a phone that slept through the one reading it must sign for: we pause, have nothing new to say, and after two
    minutes the session ends.
    """
    terms = plug.plugged_in()
    async with listening(plug, broker.port) as consumer, carried(plug, broker.port):
        await consumer.until(lambda: consumer.heard[hello_topic()])
        presentation = plug.present(terms, decode(consumer.heard[hello_topic()][0].payload))
        await consumer.ask(presentation)
        await consumer.until(lambda: consumer.messages(kind="accept"))
        plug.read()
        plug.read(5_012_345, power_w=11_000, pilot_state="C")
        await consumer.until(
            lambda: any(reading.delivered_wh == 12 for reading in consumer.messages(kind="reading"))
        )
        heard = consumer.messages(kind="reading")
        await consumer.ask(presentation)
        await consumer.until(lambda: len(consumer.messages(kind="accept")) == 2)
        await consumer.until(lambda: len(consumer.messages(kind="reading")) > len(heard))
        assert consumer.messages(kind="reading")[-1].delivered_wh == 12


async def test_owner_telemetry_is_retained_and_small(plug, broker):
    """Would catch telemetry outside the owner's topics, unretained, or beyond what a broker lets through."""
    plug.delivering()
    async with listening(plug, broker.port) as owner, carried(plug, broker.port):
        await owner.until(lambda: "car/port/left/power" in owner.heard and "car/state" in owner.heard)
        assert owner.payloads("car/port/left/power") == [b"11000"]
        assert json.loads(owner.payloads("car/state")[0])["ports"] == [PORT]
        assert all(len(m.payload) <= MESSAGE_BYTES_MAX for topic in owner.heard for m in owner.heard[topic])
    async with listening(plug, broker.port) as later:
        await later.until(lambda: later.heard["car/port/left/power"])
        assert later.heard["car/port/left/power"][0].retain


async def test_goodbye_is_said_when_the_daemon_stops(plug, broker):
    """Would catch a stopped provider that still looks online to consumers."""
    async with listening(plug, broker.port) as consumer:
        async with carried(plug, broker.port):
            await consumer.until(lambda: consumer.payloads("online") == [b"online"])
        await consumer.until(lambda: consumer.payloads("online") == [b"online", b"offline"])


async def test_broker_says_offline_for_a_provider_that_died(plug, broker):
    """Would catch a missing last will: a crashed car would look online for ever."""
    async with (
        TcpProxy(broker.port) as proxy,
        listening(plug, broker.port) as consumer,
        carried(plug, proxy.port),
    ):
        await consumer.until(lambda: consumer.payloads("online") == [b"online"])
        await proxy.cut()
        await consumer.until(lambda: b"offline" in consumer.payloads("online"))
        # It is only the connection that died: the runner comes back by itself.
        await consumer.until(lambda: consumer.payloads("online")[-1] == b"online")


async def test_runner_comes_back_after_the_broker_was_killed(plug, broker, unused_tcp_port_factory):
    """Would catch a runner that ends with its broker, or comes back without Hello, online, subscription and news."""
    terms = plug.delivering()
    way = TcpProxy(broker.port, unused_tcp_port_factory())
    async with carried(plug, way.port) as runner:
        async with way:
            await eventually(lambda: runner.connected and runner._told)
            await broker.kill()
            await eventually(lambda: not runner.connected)
        await broker.start()
        # News is said once a connection: the consumer has to be there before the runner finds its way back.
        async with listening(plug, broker.port) as consumer, way:
            await consumer.until(lambda: consumer.payloads("online")[-1:] == [b"online"])
            await consumer.until(lambda: consumer.heard[hello_topic()] and consumer.messages(kind="accept"))
            await consumer.ask(plug.receipt(terms, 12))
            await consumer.until(lambda: consumer.messages(kind="ack"))


async def test_runner_waits_for_a_broker_that_is_not_there_yet(plug, broker):
    """Would catch a daemon that does not start, or ends, because a broker is down: money never depends on one."""
    await broker.kill()
    async with carried(plug, broker.port) as runner:
        await eventually(lambda: runner._car.problem)
        await broker.start()
        async with listening(plug, broker.port) as consumer:
            await consumer.until(lambda: consumer.payloads("online")[-1:] == [b"online"])


async def test_silent_broker_is_a_broken_connection(plug, monkeypatch):
    """Would catch waiting for ever on a half-open link: connected, subscribed, and nothing is acknowledged any more."""
    monkeypatch.setattr(mqtt, "PUBACK_WAIT_S", 0.3)
    connected = asyncio.Semaphore(0)
    visits = []

    async def silent_broker(reader, writer):
        visits.append(asyncio.current_task())
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                kind, length = await reader.readexactly(2)
                shift, more = 7, length
                length &= 0x7F
                while more & 0x80:
                    (more,) = await reader.readexactly(1)
                    length |= (more & 0x7F) << shift
                    shift += 7
                body = await reader.readexactly(length)
                if kind >> 4 == 1:
                    writer.write(b"\x20\x02\x00\x00")  # CONNACK
                    connected.release()
                elif kind >> 4 == 8:
                    writer.write(b"\x90\x03" + body[:2] + b"\x01")  # SUBACK
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    server = await asyncio.start_server(silent_broker, "127.0.0.1", 0)
    async with server, carried(plug, server.sockets[0].getsockname()[1]):
        async with asyncio.timeout(15):
            await connected.acquire()
            await connected.acquire()  # it gave the first connection up and came again
    await asyncio.gather(*visits)


# ---- two connections

FLOOD_S = 9.0  # longer than an acknowledgement is waited for


class Picky(Broker):
    """A broker whose answer to a subscription depends on the topic, and that delivers what it likes."""

    def __init__(self, refuses=lambda _: False, withholds=lambda _: False):
        super().__init__()
        self._refuses, self._withholds = refuses, withholds

    async def answer(self, visitor, kind, flags, body):
        """As always, but for a subscription it does not like."""
        (length,) = struct.unpack_from(">H", body, 2) if kind == SUBSCRIBE else (0,)
        if kind == SUBSCRIBE and self._refuses(body[4 : 4 + length].decode()):
            visitor.send(packet(SUBACK, body[:2] + b"\x80"))
        else:
            await super().answer(visitor, kind, flags, body)

    def deliver(self, visitor, message):
        """As always, but for a client that gets nothing."""
        if not self._withholds(visitor):
            super().deliver(visitor, message)


def is_door(visitor):
    """The connection that hears strangers."""
    return any(pattern.endswith("/in/+") for pattern in visitor.patterns)


async def test_who_is_charging_is_heard_although_nothing_gets_through_to_the_door(plug):
    """Rule 5. Would catch receipts that wait behind a flood: mosquitto drops what finds no room on its way to us."""
    terms = plug.delivering()
    async with (
        Picky(withholds=is_door) as broker,
        listening(plug, broker.port) as consumer,
        carried(plug, broker.port) as runner,
    ):
        await consumer.until(lambda: consumer.messages(kind="accept"))
        await eventually(lambda: runner._own_topics)
        await consumer.ask(plug.receipt(terms, 12))
        await consumer.until(lambda: consumer.messages(kind="ack"))
        await consumer.ask(b"{}", sref="stranger")
        assert consumer.heard["out/stranger"] == []


async def test_a_broker_that_grants_only_the_door_serves_everybody_there(plug):
    """Would catch an access list written for one subscription that ends our connection over and over."""
    terms = plug.delivering()
    async with (
        Picky(refuses=lambda pattern: pattern.endswith(f"/in/{SREF}")) as broker,
        listening(plug, broker.port) as consumer,
        carried(plug, broker.port) as runner,
    ):
        await consumer.until(lambda: consumer.messages(kind="accept"))
        await consumer.until(lambda: consumer.payloads("online") == [b"online"])
        await consumer.ask(plug.receipt(terms, 12))
        await consumer.until(lambda: consumer.messages(kind="ack"))
        assert runner._own_topics == frozenset()
        assert runner.connected


async def test_who_hears_no_strangers_invites_none(plug, capfd):
    """Would catch an access list that lets us speak and not hear, and nobody notices; and a Hello before anybody listens: a
    consumer who answers it once, at once, is never heard.
    """
    plug.header()
    async with (
        Picky(refuses=lambda pattern: pattern.endswith("/in/+")) as broker,
        listening(plug, broker.port) as consumer,
        carried(plug, broker.port) as runner,
    ):
        await eventually(lambda: runner._door_line.problem)
        await consumer.until(lambda: "car/state" in consumer.heard)
        assert consumer.payloads("online") == []
        assert consumer.heard[hello_topic()] == []
        assert "does not let us subscribe" in runner._door_line.problem


async def test_a_session_that_ended_is_not_listened_to_any_more(plug):
    """Would catch subscriptions that pile up over the years."""
    plug.delivering()
    async with Picky() as broker, carried(plug, broker.port) as runner:
        await eventually(lambda: runner._own_topics)
        mine = next(one for one in broker.visitors if any(p.endswith(SREF) for p in one.patterns))
        plug.engine.book = replace(plug.engine.book, sessions={})
        plug.header()
        await eventually(lambda: mine.patterns == [])
        assert runner._own_topics == frozenset()


async def test_what_comes_over_both_connections_is_looked_at_once(plug, monkeypatch):
    """Would catch a consumer whose every message counts twice against his pace."""
    terms = plug.delivering()
    looked, answer = [], plug.door.answer

    def watched(sref, source, data):
        looked.append(sref)
        return answer(sref, source, data)

    monkeypatch.setattr(plug.door, "answer", watched)
    async with (
        Picky() as broker,
        listening(plug, broker.port) as consumer,
        carried(plug, broker.port) as runner,
    ):
        await consumer.until(lambda: consumer.payloads("online") == [b"online"])
        await eventually(lambda: runner._own_topics)
        await consumer.ask(plug.receipt(terms, 12))
        await consumer.until(lambda: consumer.messages(kind="ack"))
        await consumer.ask(b"{}", sref="stranger")
        await consumer.until(lambda: consumer.messages("stranger"))
        assert looked == [SREF, "stranger"]


@pytest.mark.parametrize("broker", ["mosquitto"], indirect=True)
async def test_a_flood_through_mosquitto_costs_a_running_session_nothing(plug, broker):
    """Twenty thousand a second. Would catch acknowledgements and receipts that mosquitto drops, because the same connection of
    ours cannot read as fast as strangers shout: it then went down and up again every few seconds.
    """
    terms = plug.delivering()
    with structlog.testing.capture_logs() as lines:
        await flooded(plug, broker, terms)
    assert not [line for line in lines if line["event"] == "mqtt.down" and line["line"] == "car"]


async def flooded(plug, broker, terms):
    """A receipt now and then for as long as somebody shouts; every one is acknowledged in the end."""
    async with listening(plug, broker.port) as consumer, carried(plug, broker.port) as runner:
        await consumer.client.unsubscribe(f"{consumer.root}/#")  # not the flood
        await consumer.client.subscribe(f"{consumer.root}/out/{SREF}", qos=1)
        await eventually(lambda: runner.connected and runner._own_topics)
        words = (sys.executable, vandals.__file__, "mqtt", str(broker.port), consumer.root)
        vandal = await asyncio.create_subprocess_exec(*words, env=os.environ | {"PYTHONPATH": str(ROOT)})
        try:
            for wh in range(1, 13):
                await asyncio.sleep(FLOOD_S / 12)
                await consumer.ask(plug.receipt(terms, wh))
            await consumer.until(lambda: [m.delivered_wh for m in consumer.messages(kind="ack")][-1:] == [12])
            assert vandal.returncode is None, "it shouts to the end"
        finally:
            vandal.kill()
            await vandal.wait()


# ---- hostile visitors


async def test_what_is_not_our_protocol_is_dropped_and_the_next_message_answered(plug, broker):
    """Would catch a runner killed or silenced by over-size, retained, binary or misnamed messages (rule 5)."""
    terms = plug.plugged_in()
    async with listening(plug, broker.port) as consumer:
        await consumer.ask(b"{}", sref="leftover", retain=True)  # from before we came
        async with carried(plug, broker.port) as runner:
            await consumer.until(lambda: consumer.heard[hello_topic()])
            await consumer.ask(b"x" * (MESSAGE_BYTES_MAX + 1))
            await consumer.ask(b"\xff\xfe not JSON", sref="vandal")
            await consumer.ask(b"{}", sref="n" * 65)
            await consumer.until(lambda: consumer.messages("vandal"))
            assert [m.reason for m in consumer.messages("vandal")] == ["malformed"]
            hello = decode(consumer.heard[hello_topic()][-1].payload)
            await consumer.ask(plug.present(terms, hello))
            await consumer.until(lambda: consumer.messages(kind="accept"))
            assert runner.connected
        assert consumer.messages(kind="refusal") == []
        assert consumer.heard[f"out/{'n' * 65}"] == []
        assert consumer.heard["out/leftover"] == []


async def test_return_address_from_another_transport_cannot_leave_its_topic(plug, broker, monkeypatch):
    """Would catch a wildcard or slash in a return address that ends the runner, or writes into the owner's topics."""
    terms = plug.delivering()
    honest = plug.door.news()
    evil = [
        (sref, Status(terms.session_id, "PAUSED", 0, 0, "")) for sref in ("#", "a/b", "+", "", "x" * 65, "\0")
    ]
    monkeypatch.setattr(plug.door, "news", lambda: (*evil, *honest))
    async with listening(plug, broker.port) as consumer, carried(plug, broker.port) as runner:
        await consumer.until(lambda: consumer.messages(kind="accept"))
        assert runner._car.connected
        assert {topic for topic in consumer.heard if topic.startswith("out/")} == {f"out/{SREF}"}


async def test_a_flood_is_looked_at_for_a_moment_in_each_turn_and_answered_now_and_then(
    plug, broker, monkeypatch
):
    """Would catch a flood that holds the event loop (the charger's beat runs in the same one), keeps a consumer out who is
    charging or who comes now, or is answered message by message.
    """
    terms = plug.delivering()
    monkeypatch.setattr(mqtt, "HEARD_TURN_S", 0.0)  # then a turn looks at one message, on any machine
    monkeypatch.setattr(mqtt.Load, "rest_s", lambda _: 0.0)  # broker and flood work in the same thread here
    turns, looked = 0, defaultdict(int)
    answer = plug.door.answer

    def watched(*arguments):
        looked[turns] += 1
        return answer(*arguments)

    async def count_turns():
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def flood(consumer):
        for number in range(3_000):
            await consumer.client.publish(f"{consumer.root}/in/vandal{number % 300}", b"{}", qos=0)

    monkeypatch.setattr(plug.door, "answer", watched)
    async with listening(plug, broker.port) as consumer, carried(plug, broker.port) as runner:
        await consumer.until(lambda: runner.connected and consumer.messages(kind="accept"))
        counting = asyncio.create_task(count_turns())
        flooding = asyncio.create_task(flood(consumer))
        await consumer.until(lambda: sum(looked.values()) > 100)
        await consumer.ask(plug.receipt(terms, 12))
        await consumer.until(lambda: consumer.messages(kind="ack"))
        await flooding
        busiest = max(looked.values())
        counting.cancel()
        noise = [topic for topic in consumer.heard if topic.startswith("out/vandal")]
        assert runner.connected
    assert busiest <= 2, "one on each connection"
    assert len(noise) < sum(looked.values())


async def test_a_flood_leaves_the_thread_time_to_rest(plug, broker, monkeypatch):
    """Would catch messages that are looked at without a rest: the system then takes the thread off its processor."""
    plug.delivering()
    monkeypatch.setattr(mqtt, "HEARD_TURN_S", 0.0)
    looked = 0
    answer = plug.door.answer

    def watched(*arguments):
        nonlocal looked
        looked += 1
        return answer(*arguments)

    monkeypatch.setattr(plug.door, "answer", watched)
    monkeypatch.setattr(mqtt.Load, "rest_s", lambda _: 3_600.0 if looked >= 5 else 0.0)
    async with listening(plug, broker.port) as consumer, carried(plug, broker.port) as runner:
        await consumer.until(lambda: runner.connected)
        for number in range(100):
            await consumer.client.publish(f"{consumer.root}/in/vandal{number}", b"{}", qos=1)
        await consumer.until(lambda: looked >= 5)
        for _ in range(1_000):
            await asyncio.sleep(0)
        assert looked == 5


async def test_answers_are_not_waited_for_before_the_next_message_is_heard(plug):
    """Would catch one slow acknowledgement that makes every consumer wait."""
    terms = plug.delivering()
    runner = MqttRunner(plug.engine, plug.door, plug.provider.address, BrokerAddress("127.0.0.1"))
    root = f"v2v/1/{hex0x(plug.provider.address)}"
    for number in range(50):
        runner._look_at(message(f"{root}/in/vandal{number}", b"{}"))
    runner._look_at(message(f"{root}/in/{SREF}", plug.receipt(terms, 12)))
    topics = [post.topic.removeprefix(f"{root}/out/") for post in runner._answers]
    assert topics[-1] == SREF
    assert 15 <= len(topics) <= 25, "a sample of the noise, and what matters"
    assert plug.engine.book.sessions[terms.session_id].energy_wh_acked == 12


async def test_what_waits_to_be_published_is_bounded_and_nothing_is_lost_for_it(plug):
    """Would catch memory that grows behind a broker which never acknowledges, or news marked as told that was dropped."""
    terms = plug.delivering()
    runner = MqttRunner(plug.engine, plug.door, plug.provider.address, BrokerAddress("127.0.0.1"))
    root = f"v2v/1/{hex0x(plug.provider.address)}"
    runner._answers.extend(mqtt._Post(f"{root}/out/x", b"") for _ in range(mqtt.ANSWERS_MAX))
    runner._look_at(message(f"{root}/in/{SREF}", plug.receipt(terms, 12)))
    assert len(runner._answers) == mqtt.ANSWERS_MAX
    assert any(decode(post.payload).TYPE == "ack" for post in runner._news())


@pytest.mark.parametrize("topic", ["v2v/1/0xother/in/a", "a", "v2v/1/{evp}/out/a", "v2v/1/{evp}/in/b/a"])
async def test_what_stands_on_another_topic_is_not_for_us(plug, monkeypatch, topic):
    """Would catch a broker that feeds us what was said to somebody else."""
    runner = MqttRunner(plug.engine, plug.door, plug.provider.address, BrokerAddress("127.0.0.1"))
    asked = []
    monkeypatch.setattr(plug.door, "answer", lambda *arguments: asked.append(arguments))
    runner._look_at(message(topic.replace("{evp}", hex0x(plug.provider.address)), b"{}"))
    assert asked == []


def message(topic, payload):
    """A message as it arrives."""
    return aiomqtt.Message(topic=topic, payload=payload, qos=1, retain=False, mid=1, properties=None)
