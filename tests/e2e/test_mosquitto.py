"""A short evening through a real mosquitto with the settings that we ship in `config/mosquitto`: certificates say who is who.

Different here are only port, files, and on whose account mosquitto runs.
"""

import asyncio
import os
import re
import shutil

import aiomqtt
import pytest
from authority import Authority
from stage import ROOT, Program, Stage, eventually, free_port, surroundings

from agent.core.units import hex0x
from agent.demo.market import written
from agent.keys import tls_context

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


def mosquitto(folder, port, authority):
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
    return Program([program, "-c", written(folder / "mosquitto.conf", settings), "-v"], folder, "mosquitto")


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
            certificate, key = authority.issue(alice)
            charger = stage.charger()
            login = {
                "MQTT__URL": f"mqtts://127.0.0.1:{port}",
                "MQTT__AUTHORITY": authority.file,
                "MQTT__CERTIFICATE": certificate,
                "MQTT__CERTIFICATE_KEY": key,
                "HTTP__ENABLED": "false",
            }
            agent = stage.agent(charger, **login).started()
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
