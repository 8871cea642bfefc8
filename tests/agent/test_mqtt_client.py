"""The limits of the MQTT client: who floods crowds out himself, packets have an end, and a refused subscription is said."""

import asyncio
import contextlib
import gc
import socket
import ssl

import aiomqtt
import pytest
from authority import Authority
from paho.mqtt.enums import MQTTErrorCode

from agent import mqtt_client
from agent.mqtt_client import (
    HEARD_MAX,
    HEARD_MAX_OF_TOPIC,
    BrokerAddress,
    Heard,
    ReadInTurns,
    new_client,
    subscribe,
)


def message(topic, payload=b"x"):
    """A message as the library hands it over."""
    return aiomqtt.Message(topic=topic, payload=payload, qos=1, retain=False, mid=1, properties=None)


def taken(heard):
    """Everything that waits, in the order in which it would be looked at."""
    return [heard.get_nowait() for _ in range(heard.qsize())]


def topics(messages):
    """Where they came from."""
    return [one.topic.value for one in messages]


# ---- what waits


def test_topics_take_turns_and_each_keeps_its_order() -> None:
    """Would catch a flood that everybody else stands behind."""
    heard = Heard()
    for number in range(3):
        heard.put_nowait(message("loud", b"%d" % number))
    heard.put_nowait(message("quiet"))
    waiting = taken(heard)
    assert topics(waiting) == ["loud", "quiet", "loud", "loud"]
    assert [one.payload for one in waiting if one.topic.value == "loud"] == [b"0", b"1", b"2"]
    assert heard.empty()


def test_one_topic_keeps_no_more_than_its_share() -> None:
    """Would catch one address that fills the memory of a car."""
    heard = Heard()
    for _ in range(10_000):
        heard.put_nowait(message("loud"))
    assert heard.qsize() == HEARD_MAX_OF_TOPIC


def test_a_hundred_floods_leave_room_for_a_newcomer() -> None:
    """Would catch a share that is only fair among few: in the second half of the room everybody has one place."""
    heard = Heard()
    for number in range(10_000):
        heard.put_nowait(message(f"loud {number % 100}"))
    heard.put_nowait(message("newcomer"))
    assert heard.qsize() < HEARD_MAX
    assert "newcomer" in topics(taken(heard))


def test_however_many_shout_the_room_has_its_size() -> None:
    """Would catch memory that grows with the number of addresses that anybody can make up."""
    heard = Heard()
    for number in range(10_000):
        heard.put_nowait(message(f"new {number}"))
    assert heard.qsize() == HEARD_MAX


async def test_whoever_waits_is_woken_by_a_message_and_not_by_a_dropped_one() -> None:
    """Would catch a queue that hands out what it does not have."""
    heard = Heard()
    getting = asyncio.create_task(heard.get())
    await asyncio.sleep(0)
    heard.put_nowait(message("a"))
    assert (await getting).topic.value == "a"


# ---- the wire


@contextlib.asynccontextmanager
async def broker(after_subscribe, *, tls=None, trusted=None):
    """A broker that lets one client in and, when it subscribes, says these bytes; {mid} is the client's message id."""

    async def serve(reader, writer):
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                kind, length = await reader.readexactly(2)
                body = await reader.readexactly(length)
                if kind >> 4 == 1:
                    writer.write(b"\x20\x02\x00\x00")
                elif kind >> 4 == 8:
                    writer.write(after_subscribe(body[:2]))
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    async with server:
        yield BrokerAddress("127.0.0.1", server.sockets[0].getsockname()[1], trusted)


async def test_a_refused_subscription_is_an_error() -> None:
    """Would catch a client that looks connected and never hears a word."""
    async with (
        broker(lambda mid: b"\x90\x04" + mid + b"\x01\x80") as place,
        new_client(place, Heard(), timeout_s=10) as client,
    ):
        with pytest.raises(aiomqtt.MqttError, match="subscribe to second"):
            await subscribe(client, "first", "second")


@pytest.mark.parametrize(("announced", "ends"), [(mqtt_client.PACKET_BYTES_MAX + 1, True), (4096, False)])
async def test_an_over_size_packet_ends_the_connection_when_its_length_is_known(announced, ends) -> None:
    """Would catch a broker that makes us collect 256 MiB. tests what we believe of paho's own names, too."""
    length = bytes([announced & 127 | 128, announced >> 7 & 127 | 128, announced >> 14])
    packet = b"\x30" + length + b"\x00\x01t" + b"x" * (announced - 3 if not ends else 100)
    async with broker(lambda mid: b"\x90\x03" + mid + b"\x01" + packet) as place:
        with contextlib.suppress(aiomqtt.MqttError):
            async with new_client(place, Heard(), timeout_s=10) as client, asyncio.timeout(30):
                await subscribe(client, "t")
                if ends:
                    with pytest.raises(aiomqtt.MqttError):
                        await anext(client.messages)
                else:
                    assert len((await anext(client.messages)).payload) == announced - 3


def test_a_password_is_never_shown() -> None:
    """Would catch a secret in a log line or a traceback."""
    assert "hunter2" not in repr(BrokerAddress("host", 1883, password="hunter2"))


@pytest.mark.parametrize("kept", ["halves of QoS 2 messages", "acknowledgements that nobody reads"])
async def test_a_broker_that_makes_us_keep_things_is_left(kept) -> None:
    """Would catch memory that grows with what a broker makes us owe it: 65 535 messages, or every acknowledgement."""
    library = new_client(BrokerAddress("127.0.0.1"), Heard(), timeout_s=1)._client
    assert library._packet_read() != MQTTErrorCode.MQTT_ERR_PROTOCOL  # only: not connected
    if kept.startswith("halves"):
        library._in_messages[1] = object()
    else:
        library._out_packet.extend([{}] * (mqtt_client.UNREAD_MAX + 1))
    assert library._packet_read() == MQTTErrorCode.MQTT_ERR_PROTOCOL


# ---- reading in turns


FEW = 200  # messages, each on a topic of its own, in fewer bytes than one record of TLS holds
MANY = b"".join(b"\x30\x08\x00\x05t/%03d" % number + b"x" for number in range(FEW))


def said(mid):
    """SUBACK, and then all of it at once."""
    return b"\x90\x03" + mid + b"\x01" + MANY


async def until(holds):
    """Wait for it in turns of the loop, not in seconds."""
    async with asyncio.timeout(30):
        while not holds():  # noqa: ASYNC110 - nobody says when
            await asyncio.sleep(0)


@pytest.mark.parametrize("turn_s", [0.0, 10.0])
async def test_everything_is_read_however_short_the_turns_are(monkeypatch, turn_s) -> None:
    """Would catch a turn that ends and is not followed by another, or a rest that loses what came meanwhile."""
    monkeypatch.setattr(mqtt_client, "READ_TURN_S", turn_s)
    rests, heard = iter([0.0, 0.001] * 10_000), Heard()
    async with broker(said) as place, new_client(place, heard, timeout_s=10) as client:
        ReadInTurns(client, lambda: next(rests))
        await subscribe(client, "t/+")
        await until(lambda: heard.qsize() == FEW)
    assert [int(topic[2:]) for topic in topics(taken(heard))] == list(range(FEW))


async def test_a_message_leaves_no_garbage_that_only_a_full_collection_finds() -> None:
    """Would catch pauses of 20 ms in the charger's beat under a flood; tests what we believe of paho's own names, too."""
    heard = Heard()
    async with broker(said) as place, new_client(place, heard, timeout_s=10) as client:
        gc.collect()
        gc.disable()
        try:
            ReadInTurns(client, lambda: 0.0)
            await subscribe(client, "t/+")
            await until(lambda: heard.qsize() == FEW)
            assert gc.collect() < FEW
        finally:
            gc.enable()


async def test_what_one_record_of_tls_holds_is_read_although_no_more_bytes_come(
    monkeypatch, tmp_path
) -> None:
    """Would catch messages that wait in the TLS library, where no select sees them, until somebody speaks again."""
    authority = Authority(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(*authority.issue("broker", host="127.0.0.1"))
    monkeypatch.setattr(mqtt_client, "READ_TURN_S", 0.0)
    heard, trusted = Heard(), ssl.create_default_context(cafile=str(authority.file))
    async with (
        broker(said, tls=tls, trusted=trusted) as place,
        new_client(place, heard, timeout_s=10) as client,
    ):
        ReadInTurns(client, lambda: 0.0)
        await subscribe(client, "t/+")
        await until(lambda: heard.qsize() == FEW)


async def test_whoever_rests_reads_nothing_and_the_rest_waits_outside(monkeypatch) -> None:
    """Would catch a flood that is read as fast as it comes, whatever it costs the charger's beat."""
    monkeypatch.setattr(mqtt_client, "READ_TURN_S", 0.0)
    heard, rest_s = Heard(), 0.0
    async with broker(said) as place, new_client(place, heard, timeout_s=10) as client:
        ReadInTurns(client, lambda: rest_s)
        await subscribe(client, "t/+")
        await until(lambda: heard.qsize() >= 3)
        rest_s = 3_600.0
        await asyncio.sleep(0)
        resting = heard.qsize()
        for _ in range(1_000):
            await asyncio.sleep(0)
        assert 3 <= heard.qsize() <= resting + 1 < FEW


async def test_a_connection_that_ends_in_a_rest_is_left_alone(monkeypatch) -> None:
    """Would catch a rest that ends on a socket which is somebody else's by now."""
    heard, rests = Heard(), []
    loop = asyncio.get_running_loop()
    real = loop.call_later
    monkeypatch.setattr(
        loop,
        "call_later",
        lambda delay_s, call, *rest, **more: (
            rests.append(call) if delay_s == 1_234.0 else real(delay_s, call, *rest, **more)
        ),
    )
    async with broker(said) as place:
        async with new_client(place, heard, timeout_s=10) as client:
            turns = ReadInTurns(client, lambda: 1_234.0 if heard.qsize() else 0.0)
            await subscribe(client, "t/+")
            await until(lambda: rests)
            number = turns._socket.fileno()
        with socket.socket() as next_one:
            assert number >= 0
            assert next_one.fileno() >= 0
            rests[0]()
            assert not loop.remove_reader(number)
