"""One state behind both doors: what begins on the broker goes on at the web server and back, with the same words."""

import asyncio
import contextlib

import aiohttp
import aiomqtt
import pytest
from plug import PORT, SREF, Plug, eventually

from agent.core import token as rules
from agent.core.messages import decode, encode
from agent.core.units import hex0x
from agent.door import HELLO_ROTATE_S
from agent.runners.http import HttpRunner
from agent.runners.mqtt import BrokerAddress, MqttRunner
from bench._broker import Broker

HELLO_TOPIC = f"hello/{hex0x(rules.charger_id(PORT))}"


class Consumer:
    """One phone with both ways: `by_mqtt` and `by_http` return the raw bytes of the answer."""

    def __init__(self, plug, client, http, url):
        self.root = f"v2v/1/{hex0x(plug.provider.address)}"
        self.client, self.http, self.url = client, http, url
        self.heard = []

    async def listen(self):
        """What comes to our topic; until cancelled."""
        async for message in self.client.messages:
            self.heard.append(message.payload)

    async def by_mqtt(self, data, kind):
        """Ask over the broker; the next answer of this kind."""
        self.heard.clear()
        await self.client.publish(f"{self.root}/in/{SREF}", data, qos=1)
        await eventually(lambda: any(kind == decode(one).TYPE for one in self.heard))
        return next(one for one in self.heard if kind == decode(one).TYPE)

    async def by_http(self, data):
        """Ask at the web server."""
        path = decode(data).TYPE
        async with self.http.post(
            f"{self.url}/v1/{path}", data=data, headers={"X-V2V-Sref": SREF}
        ) as response:
            return await response.read()

    async def hello_by_http(self):
        """The Hello as a phone fetches it."""
        async with self.http.get(f"{self.url}/v1/hello") as response:
            return (await response.read())[1:-1]


@pytest.fixture
async def place(tmp_path):
    """(plug, broker, consumer): both runners above one door, and a phone that knows both ways."""
    plug = Plug(tmp_path)
    async with contextlib.AsyncExitStack() as stack:
        stack.callback(plug.close)
        broker = await stack.enter_async_context(Broker())
        mqtt = MqttRunner(
            plug.engine, plug.door, plug.provider.address, BrokerAddress("127.0.0.1", broker.port)
        )
        http = HttpRunner(plug.engine, plug.door, "127.0.0.1", 0)
        tasks = [asyncio.create_task(work) for work in (mqtt.run(), http.run(), plug.beat())]
        stack.push_async_callback(ended, tasks)
        await http.listening.wait()
        client = await stack.enter_async_context(aiomqtt.Client("127.0.0.1", broker.port))
        session = await stack.enter_async_context(aiohttp.ClientSession())
        consumer = Consumer(plug, client, session, http.url)
        await client.subscribe(f"{consumer.root}/out/{SREF}", qos=1)
        listening = asyncio.create_task(consumer.listen())
        stack.push_async_callback(ended, [listening])
        await eventually(lambda: mqtt.connected)
        yield plug, broker, consumer


async def ended(tasks):
    """Cancel and wait."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_session_goes_from_door_to_door_and_back(place):
    """Would catch two doors with two memories: sessions, repeats, receipts and stops are known at both, byte for byte."""
    plug, _, consumer = place
    terms = plug.plugged_in()
    presentation = plug.present(terms)
    accept = await consumer.by_mqtt(presentation, "accept")
    rows = plug.journal.row_count
    # The nonce is used up; a byte-identical repeat is answered before that is looked at, on either door.
    assert await consumer.by_http(presentation) == accept
    assert await consumer.by_mqtt(presentation, "accept") == accept
    assert plug.journal.row_count == rows
    plug.read()
    plug.read(5_012_345, power_w=11_000, pilot_state="C")
    assert decode(await consumer.by_http(plug.receipt(terms, 8))).delivered_wh == 8
    await eventually(
        lambda: any(decode(one).TYPE == "ack" for one in consumer.heard)
    )  # the broker's side hears of it, too
    assert decode(await consumer.by_mqtt(plug.receipt(terms, 12), "ack")).delivered_wh == 12
    assert decode(await consumer.by_http(plug.receipt(terms, 8))).delivered_wh == 12, (
        "the highest, wherever it came"
    )
    stopped = decode(await consumer.by_http(plug.stop(terms)))
    assert stopped.stage == "STOPPING"
    await eventually(lambda: encode(stopped) in consumer.heard)  # and of this


@pytest.mark.parametrize("first", ["mqtt", "http"])
async def test_a_nonce_is_used_once_across_both_doors(place, first):
    """Would catch a presentation that is taken once at each door."""
    plug, _, consumer = place
    terms = plug.plugged_in()
    hello = plug.door.hello(PORT)
    used = plug.present(terms, hello)
    assert decode(await (consumer.by_mqtt(used, "accept") if first == "mqtt" else consumer.by_http(used)))
    other = used.replace(b'"maxEnergyWh":0', b'"maxEnergyWh":1')
    answers = [decode(await consumer.by_http(other)), decode(await consumer.by_mqtt(other, "refusal"))]
    assert [answer.reason for answer in answers] == ["replayed", "replayed"]


async def test_a_hello_rotates_at_both_doors_at_once(place):
    """Would catch a phone and a broker that show different Hellos, or one that goes on showing a used one."""
    plug, broker, consumer = place
    terms = plug.plugged_in()

    def shown():
        message = broker.retained.get(f"{consumer.root}/{HELLO_TOPIC}")
        return None if message is None else message.payload

    await eventually(lambda: shown() == encode(plug.door.hello(PORT)))
    first = await consumer.hello_by_http()
    assert first == shown()
    plug.door._hellos[PORT][-1].at_s -= HELLO_ROTATE_S  # half a minute passes
    rotated = await consumer.hello_by_http()
    assert rotated != first
    await eventually(lambda: shown() == rotated)
    await consumer.by_http(plug.present(terms, decode(rotated)))
    fresh = await consumer.hello_by_http()
    assert fresh != rotated
    await eventually(lambda: shown() == fresh)
