"""Messages over a real broker: the topics of the protocol, retained Hellos, and a broker that goes and comes."""

import asyncio
import contextlib

import aiomqtt
import pytest
from scripted_provider import OWNER, eventually

from agent.consumer.carrier_mqtt import Broker, MqttCarrier
from agent.core.units import hex0x
from agent.demo.broker import Broker as EmbeddedBroker
from agent.errors import Transient

SREF = "ab" * 16
ROOT = f"v2v/1/{hex0x(OWNER.address)}"


@pytest.fixture
async def broker():
    """An empty broker."""
    async with EmbeddedBroker() as broker:
        yield broker


@contextlib.asynccontextmanager
async def provider(broker):
    """The other side, as a plain MQTT client: what it hears goes to a list."""
    async with aiomqtt.Client(broker.host, broker.port) as client:
        await client.subscribe(f"{ROOT}/in/+", qos=1)
        heard: list[tuple[str, bytes]] = []

        async def hear():
            while True:
                message = await anext(client.messages)
                heard.append((message.topic.value, message.payload))

        task = asyncio.create_task(hear())
        yield client, heard
        task.cancel()
        await asyncio.wait({task})


async def test_messages_go_both_ways_on_the_protocols_topics(broker):
    """Would catch a topic that nobody reads: names are half of this protocol."""
    async with (
        provider(broker) as (client, heard),
        MqttCarrier(Broker(broker.host, broker.port), SREF) as carrier,
    ):
        await carrier.meet(OWNER.address)
        await carrier.post("present", b'{"type":"present"}')
        await eventually(lambda: heard)
        assert heard == [(f"{ROOT}/in/{SREF}", b'{"type":"present"}')]
        await client.publish(f"{ROOT}/out/{SREF}", b"for us", qos=1)
        await client.publish(f"{ROOT}/out/somebody-else", b"not for us", qos=1)
        await client.publish(f"{ROOT}/out/{SREF}", b"for us too", qos=0)
        assert [await carrier.next(5), await carrier.next(5)] == [b"for us", b"for us too"]
        assert await carrier.next(0.1) is None


async def test_a_retained_hello_is_there_at_once_and_again_when_asked(broker):
    """Would catch a consumer that must wait for the next rotation, or can never get a Hello again."""
    async with aiomqtt.Client(broker.host, broker.port) as client:
        await client.publish(f"{ROOT}/hello/0xaa", b"hello", qos=1, retain=True)
    async with MqttCarrier(Broker(broker.host, broker.port), SREF) as carrier:
        await carrier.meet(OWNER.address)
        assert await carrier.next(5) == b"hello"
        await carrier.ask_hello()
        assert await carrier.next(5) == b"hello"


async def test_what_a_broker_brings_unasked_is_left_alone(broker):
    """Would catch a consumer that reads whatever arrives: amqtt brings everybody who connects what it retains for others."""
    async with aiomqtt.Client(broker.host, broker.port) as other:
        await other.publish("somebody/else", b"not for us", qos=1, retain=True)
        await other.publish(f"{ROOT}/hello/0xaa", b"hello", qos=1, retain=True)
        await other.subscribe("somebody/else", qos=1)
        async with MqttCarrier(Broker(broker.host, broker.port), SREF) as carrier:
            await carrier.meet(OWNER.address)
            assert await carrier.next(5) == b"hello"


async def test_what_is_too_long_is_dropped_unread(broker):
    """Would catch a stranger who makes us keep megabytes."""
    async with (
        provider(broker) as (client, _),
        MqttCarrier(Broker(broker.host, broker.port), SREF) as carrier,
    ):
        await carrier.meet(OWNER.address)
        await client.publish(f"{ROOT}/out/{SREF}", b"x" * 4097, qos=1)
        await client.publish(f"{ROOT}/out/{SREF}", b"", qos=1)
        await client.publish(f"{ROOT}/out/{SREF}", b"x" * 4096, qos=1)
        assert await carrier.next(5) == b"x" * 4096


async def test_no_broker_is_said_with_a_remedy():
    """Would catch a consumer that starts an auction it can never finish: the way is proven before money is spent."""
    async with EmbeddedBroker() as gone:
        place = Broker(gone.host, gone.port)
    with pytest.raises(Transient, match="cannot be reached") as refused:
        async with asyncio.timeout(20), MqttCarrier(place, SREF):
            pass
    assert "[mqtt] url" in refused.value.remedy


async def test_a_broker_that_restarts_is_found_again():
    """Would catch a session that a broker's update ends."""
    async with EmbeddedBroker() as first:
        carrier = await MqttCarrier(Broker(first.host, first.port), SREF).__aenter__()
        await carrier.meet(OWNER.address)
    try:
        await eventually(lambda: carrier.trouble)
        await carrier.post("receipt", b"lost")  # nobody is there, and nothing is raised
        async with EmbeddedBroker(port=first.port) as second:
            await eventually(lambda: not carrier.trouble, 20)
            async with provider(second) as (_, heard):
                await carrier.post("receipt", b"again")
                await eventually(lambda: heard)
                assert heard == [(f"{ROOT}/in/{SREF}", b"again")]
    finally:
        await carrier.__aexit__(None, None, None)


def test_a_password_is_never_shown():
    """Would catch a secret in a log line or a traceback."""
    assert "hunter2" not in repr(Broker("host", 1883, password="hunter2"))
