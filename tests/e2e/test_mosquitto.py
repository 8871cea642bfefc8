"""A short evening through a real mosquitto, with the access list and the limits that we ship in `config/mosquitto`.

Only who proves who they are is different here: passwords in place of certificates.
"""

import asyncio
import os
import re
import shutil
import subprocess

import aiomqtt
import pytest
from stage import ROOT, Program, Stage, eventually, free_port, surroundings

from agent.core.units import hex0x
from agent.demo.market import written

SHIPPED = ROOT / "config/mosquitto"
PASSWORD = "toy password"
OF_CERTIFICATES = (
    "listener",
    "cafile",
    "certfile",
    "keyfile",
    "require_certificate",
    "use_identity",
    "acl_file",
)
CAROL, MALLORY = "carol-" + "c" * 20, "mallory-" + "e" * 20

pytestmark = pytest.mark.timeout(120)


def tool(name):
    """Where a program of mosquitto's is; Debian keeps one where a user's PATH may not look."""
    found = shutil.which(name, path=surroundings()["PATH"])
    if found is None:
        pytest.skip(f"{name} is not installed: apt-get install mosquitto")
    return found


def mosquitto(folder, port, users):
    """The broker as its own process, for these users."""
    folder.mkdir()
    passwords = written(folder / "passwords", "")
    for user in users:
        subprocess.run([tool("mosquitto_passwd"), "-b", passwords, user, PASSWORD], check=True, timeout=10)
    lines = (SHIPPED / "v2v.conf").read_text().splitlines()
    kept = [line for line in lines if not line.startswith(OF_CERTIFICATES)]
    assert len(lines) - len(kept) == len(OF_CERTIFICATES)  # nothing was dropped that has another name now
    ours = [f"listener {port} 127.0.0.1", f"password_file {passwords}", f"acl_file {SHIPPED / 'v2v.acl'}"]
    if os.getuid() == 0:
        ours.append("user root")  # else it becomes a user who may not read this folder
    config = written(folder / "mosquitto.conf", "\n".join([*kept, *ours]) + "\n")
    return Program([tool("mosquitto"), "-c", config, "-v"], folder, "mosquitto")


class Eavesdropper:
    """Somebody with a valid login who asks for everything, and says things in other people's names."""

    def __init__(self, port, lies):
        self.heard, self._port, self._lies = set(), port, lies

    async def go(self):
        """Stop listening, and leave politely."""
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)

    async def listen(self):
        """Until `go`."""
        self._listening = asyncio.current_task()
        login = {"username": MALLORY, "password": PASSWORD}
        async with aiomqtt.Client("127.0.0.1", self._port, **login) as client:
            for everything in ("#", "v2v/#", "v2v/1/+/in/+", "v2v/1/+/out/+", "v2v/1/+/hello/+"):
                await client.subscribe(everything, qos=1)
            for topic in self._lies:
                await client.publish(topic, b"a lie", qos=1, retain=True)
            async for message in client.messages:
                self.heard.add(str(message.topic))


def test_an_evening_that_strangers_can_neither_hear_nor_disturb(tmp_path):
    """Would catch an access list that keeps the two sides apart, or that lets a third one listen or lie."""
    port = free_port()
    with Stage(tmp_path, broker_port=port) as stage:
        alice = hex0x(stage.provider.owner.address)
        stage.broker_login = {"username": CAROL, "password": PASSWORD}
        with mosquitto(tmp_path / "broker", port, (alice, CAROL, MALLORY)) as broker:
            broker.heard("mosquitto version .* running")
            lies = (f"v2v/1/{alice}/hello/forged", f"v2v/1/{alice}/out/{CAROL}", f"v2v/1/{alice}/in/{CAROL}")
            stranger = Eavesdropper(port, lies)
            stage.begin(stranger.listen())
            password = written(tmp_path / "broker.password", PASSWORD)
            charger = stage.charger()
            login = {"MQTT__USERNAME": alice, "MQTT__PASSWORD_CREDENTIAL": password, "HTTP__ENABLED": "false"}
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
