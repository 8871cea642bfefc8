"""Short evenings through a real mosquitto with the settings that we ship in `config/mosquitto`: certificates say who is who,
what is too large or too nosy goes nowhere, and when it dies in the middle of a session nothing is lost.

Different here are only port, files, and on whose account mosquitto runs.
"""

import asyncio
import contextlib
import os
import re
import shutil

import aiomqtt
import pytest
from authority import Authority
from plug import Plug
from stage import ROOT, Program, Stage, eventually, free_port, surroundings
from tcp_proxy import TcpProxy

from agent.consumer.carrier_both import BothCarrier
from agent.consumer.carrier_http import HttpCarrier
from agent.consumer.carrier_mqtt import Broker as BrokerPlace
from agent.consumer.carrier_mqtt import MqttCarrier
from agent.core.units import hex0x
from agent.demo.market import written
from agent.keys import tls_context
from agent.runners.mqtt import BrokerAddress, MqttRunner

SHIPPED = ROOT / "config/mosquitto"
PLACES = {
    "listener 8883": "listener {port} 127.0.0.1",
    "cafile /etc/mosquitto/certs/market-ca.crt": "cafile {authority}",
    "certfile /etc/mosquitto/certs/broker.crt": "certfile {certificate}",
    "keyfile /etc/mosquitto/certs/broker.key": "keyfile {key}",
    "acl_file /etc/mosquitto/v2v.acl": "acl_file {acl}",
}
CAROL, MALLORY = "carol-" + "c" * 20, "mallory-" + "e" * 20

pytestmark = pytest.mark.timeout(120)


def mosquitto(folder, port, authority, name="mosquitto"):
    """The broker as its own process."""
    program = shutil.which(
        "mosquitto", path=surroundings()["PATH"]
    )  # Debian keeps it where a user may not look
    if program is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    certificate, key = authority.issue("broker", host="127.0.0.1")
    settings = (SHIPPED / "v2v.conf").read_text()
    for shipped, here in PLACES.items():
        assert f"\n{shipped}\n" in settings, shipped
        place = here.format(
            port=port, authority=authority.file, certificate=certificate, key=key, acl=SHIPPED / "v2v.acl"
        )
        settings = settings.replace(f"\n{shipped}\n", f"\n{place}\n")
    if os.getuid() == 0:
        settings += "user root\n"  # else it becomes a user who may not read this folder
    return Program([program, "-c", written(folder / "mosquitto.conf", settings), "-v"], folder, name)


def paths(issued):
    """Certificate and key as `tls_context` takes them."""
    certificate, key = issued
    return certificate, str(key)


class Eavesdropper:
    """Somebody with a valid certificate who asks for everything, and says things in other people's names."""

    def __init__(self, port, tls, lies):
        self.heard, self._port, self._tls, self._lies = set(), port, tls, lies

    async def go(self):
        """Stop listening, and leave politely."""
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def listen(self):
        """Until `go`."""
        self._listening = asyncio.current_task()
        async with aiomqtt.Client("127.0.0.1", self._port, tls_context=self._tls) as client:
            for everything in ("#", "v2v/#", "v2v/1/+/in/+", "v2v/1/+/out/+", "v2v/1/+/hello/+"):
                await client.subscribe(everything, qos=1)
            for topic in self._lies:
                await client.publish(topic, b"a lie", qos=1, retain=True)
            async for message in client.messages:
                self.heard.add(str(message.topic))


def test_an_evening_that_strangers_can_neither_hear_nor_disturb(tmp_path):
    """Would catch an access list that keeps the two sides apart, or that lets a third one listen or lie."""
    port, authority = free_port(), Authority(tmp_path / "certificates")
    with Stage(tmp_path, broker_port=port) as stage:
        alice = hex0x(stage.provider.owner.address)
        stage.broker_login = {"tls": tls_context(authority.file, *paths(authority.issue(CAROL)))}
        stage.consumer_sref = CAROL
        with mosquitto(tmp_path, port, authority) as broker:
            broker.heard("mosquitto version .* running")
            lies = (f"v2v/1/{alice}/hello/forged", f"v2v/1/{alice}/out/{CAROL}", f"v2v/1/{alice}/in/{CAROL}")
            stranger = Eavesdropper(port, tls_context(authority.file, *paths(authority.issue(MALLORY))), lies)
            stage.begin(stranger.listen())
            charger = stage.charger()
            agent = stage.agent(charger, **login(port, authority, alice), HTTP__ENABLED="false").started()
            agent.heard(r'"mqtt\.up"')
            journey = stage.journey()
            stage.matched(journey, 20)
            summary = stage.at_the_plug(journey).result(60)
            assert summary.energy_wh_settled == 20
            assert 20_000 <= charger.truth["delivered_mwh"] < 21_000
            eventually(lambda: stranger.heard, 5, "the stranger hears that there is a car")
            assert agent.stop() == 0
            stage.do(stranger.go())
            denied = set(re.findall(r"Denied PUBLISH from \S+ \(.*?'(\S+?)'", broker.said))
            assert denied == set(lies)  # and nothing that the two sides said
        assert {topic.split("/")[3] for topic in stranger.heard} == {"hello", "online"}
        assert not stranger.heard & set(lies)


def login(port, authority, name):
    """The daemon's settings for this broker, as this name."""
    certificate, key = authority.issue(name)
    return {
        "MQTT__URL": f"mqtts://127.0.0.1:{port}",
        "MQTT__AUTHORITY": authority.file,
        "MQTT__CERTIFICATE": certificate,
        "MQTT__CERTIFICATE_KEY": key,
    }


async def both_ways(stage, journey):
    """The consumer at the plug, who knows the broker and the car's own web server."""
    place = BrokerPlace("127.0.0.1", stage.broker_port, **stage.broker_login)
    ways = (
        lambda: MqttCarrier(place, journey.sref),
        lambda: HttpCarrier(stage.door_url, journey.sref),
    )
    async with BothCarrier(ways) as carrier:
        return await journey.present(carrier)


def test_a_session_outlives_its_broker(tmp_path):
    """Would catch a broker whose death ends a session that the web server can serve, or a settlement; and a daemon that does
    not come back to a broker that does.
    """
    port, authority = free_port(), Authority(tmp_path / "certificates")
    with Stage(tmp_path, broker_port=port) as stage:
        stage.broker_login = {"tls": tls_context(authority.file, *paths(authority.issue(CAROL)))}
        stage.consumer_sref = CAROL
        charger = stage.charger()
        with mosquitto(tmp_path, port, authority) as broker:
            broker.heard("mosquitto version .* running")
            agent = stage.agent(
                charger, **login(port, authority, hex0x(stage.provider.owner.address))
            ).started()
            agent.heard(r'"mqtt\.up"')
            journey = stage.journey()
            stage.matched(journey, 40)
            buying = stage.begin(both_ways(stage, journey))
            eventually(
                lambda: agent.session().get("energy_wh_acked", 0) > 0, 60, "a receipt came by the broker"
            )
            broker.kill()
        agent.heard(r'"mqtt\.down"', 30)
        summary = buying.result(60)
        assert summary.energy_wh_settled == 40
        assert 40_000 <= charger.truth["delivered_mwh"] < 41_000
        with mosquitto(tmp_path, port, authority, "mosquitto-again") as broker:
            agent.heard(r'"mqtt\.up"[\s\S]*"mqtt\.up"', 30)
            assert agent.stop() == 0


@contextlib.asynccontextmanager
async def known(port, authority, name):
    """A client with a certificate of this name."""
    tls = tls_context(authority.file, *paths(authority.issue(name)))
    async with aiomqtt.Client("127.0.0.1", port, tls_context=tls) as client:
        yield client


async def refused(port, tls):
    """True if the broker does not let this one in."""
    with contextlib.suppress(aiomqtt.MqttError, OSError):
        async with aiomqtt.Client("127.0.0.1", port, tls_context=tls, timeout=2):
            return False
    return True


async def test_who_has_no_certificate_of_the_market_stays_outside(tmp_path):
    """Would catch an anonymous client, one of another market, and one that does not even speak TLS."""
    port, authority = free_port(), Authority(tmp_path / "certificates")
    other = Authority(tmp_path / "others", "another market")
    with mosquitto(tmp_path, port, authority) as broker:
        await asyncio.to_thread(broker.heard, "mosquitto version .* running")
        assert await refused(port, None)
        assert await refused(port, tls_context(authority.file, None, None))
        assert await refused(port, tls_context(authority.file, *paths(other.issue(CAROL))))
        async with known(port, authority, CAROL):
            pass


async def test_what_is_too_large_goes_nowhere_and_the_dead_are_announced(tmp_path):
    """Would catch a packet limit that is not set, or one that throws the car out instead of the vandal; and a last will that
    the access list does not let through.
    """
    port, authority = free_port(), Authority(tmp_path / "certificates")
    plug = Plug(tmp_path)
    account = hex0x(plug.provider.address)
    with mosquitto(tmp_path, port, authority) as broker:
        await asyncio.to_thread(broker.heard, "mosquitto version .* running")
        async with (
            TcpProxy(port) as proxy,
            known(port, authority, CAROL) as carol,
            car(plug, proxy.port, authority) as runner,
            known(port, authority, account) as beside_it,
            asyncio.timeout(60),
        ):
            await beside_it.subscribe(f"v2v/1/{account}/in/+", qos=1)
            await carol.subscribe(f"v2v/1/{account}/out/{CAROL}", qos=1)
            await carol.subscribe(f"v2v/1/{account}/online", qos=1)
            while not runner.connected:  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0.02)
            with contextlib.suppress(aiomqtt.MqttError):  # it is thrown out for it
                async with known(port, authority, MALLORY) as mallory:
                    await mallory.publish(f"v2v/1/{account}/in/{MALLORY}", b"x" * 9_000, qos=1, timeout=2)
            await carol.publish(f"v2v/1/{account}/in/{CAROL}", b"{}", qos=1)
            assert b"malformed" in await next_on(carol, "out")
            assert await next_on(beside_it, "in") == b"{}", "the first that came through the broker at all"
            assert runner.connected
            await proxy.cut()
            while await next_on(carol, "online") != b"offline":
                pass
    plug.close()


@contextlib.asynccontextmanager
async def car(plug, port, authority):
    """The daemon's own MQTT runner, at this port."""
    tls = tls_context(authority.file, *paths(authority.issue(hex0x(plug.provider.address))))
    runner = MqttRunner(
        plug.engine, plug.door, plug.provider.address, BrokerAddress("127.0.0.1", port, tls=tls)
    )
    tasks = [asyncio.create_task(runner.run()), asyncio.create_task(plug.beat())]
    try:
        yield runner
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def next_on(client, what):
    """The next message on a topic of this kind."""
    async for message in client.messages:
        if f"/{what}" in message.topic.value:
            return message.payload
    raise AssertionError("the messages end")
