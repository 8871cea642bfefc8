"""The small broker under the floods: a real client finds it a broker, or nothing measured through it means anything."""

import asyncio
import contextlib

import aiomqtt
import pytest

from bench._broker import Broker, Message, fits, packet, publish_packet


async def test_a_real_client_subscribes_publishes_and_finds_what_is_retained() -> None:
    """Would catch a packet that only our own code can read."""
    async with Broker() as broker, aiomqtt.Client("127.0.0.1", broker.port) as client, asyncio.timeout(30):
        await client.publish("a/b", b"kept", qos=1, retain=True)
        await client.subscribe("a/+", qos=1)
        found = await anext(client.messages)
        await client.publish("a/c", b"x" * 5_000, qos=0)
        large = await anext(client.messages)
    assert (found.topic.value, found.payload) == ("a/b", b"kept")
    assert (large.topic.value, len(large.payload)) == ("a/c", 5_000)


async def test_what_a_client_does_not_want_any_more_it_does_not_get() -> None:
    """Would catch an UNSUBSCRIBE that is read as something else."""
    async with Broker() as broker, aiomqtt.Client("127.0.0.1", broker.port) as client, asyncio.timeout(30):
        await client.subscribe([("a", 1), ("b", 1)])
        await client.unsubscribe(["a"])
        await client.publish("a", b"1", qos=1)
        await client.publish("b", b"2", qos=1)
        assert (await anext(client.messages)).topic.value == "b"


async def test_the_will_of_a_client_that_dies_is_published_and_of_one_that_leaves_is_not() -> None:
    """Would catch a car that looks online for ever, or offline after each polite goodbye."""
    will = aiomqtt.Will("gone", b"offline", qos=1, retain=True)
    async with Broker() as broker, asyncio.timeout(30):
        async with aiomqtt.Client("127.0.0.1", broker.port, will=will):
            pass
        while broker.visitors:  # noqa: ASYNC110 - nobody announces it
            await asyncio.sleep(0.01)
        assert broker.retained == {}
        with contextlib.suppress(aiomqtt.MqttError):  # it notices
            async with aiomqtt.Client("127.0.0.1", broker.port, will=will):
                broker.visitors[0].cut()
        while not broker.retained:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert broker.retained["gone"].payload == b"offline"


@pytest.mark.parametrize(
    ("pattern", "topic", "heard"),
    [
        ("a/+", "a/b", True),
        ("a/+", "a/b/c", False),
        ("a/b", "a/c", False),
        ("a/#", "a/b/c", True),
        ("#", "a", True),
    ],
)
def test_patterns(pattern, topic, heard) -> None:
    """Would catch a subscription that hears its neighbour's messages."""
    assert fits(pattern, topic) is heard


def test_long_packets_have_long_lengths() -> None:
    """Would catch a length that is only right below 128."""
    assert packet(3, b"x" * 321)[:3] == b"\x30\xc1\x02"
    assert publish_packet(Message("t", b"xy", qos=1), 258) == b"\x32\x07\x00\x01t\x01\x02xy"
