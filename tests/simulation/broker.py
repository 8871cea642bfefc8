"""The simulated broker: loses, doubles, delays and reorders messages, and throws the agent out now and then.

`AgentClient` stands where `aiomqtt.Client` stands, so that the whole of `agent.runners.mqtt` runs unmodified above it.
Consumers are called back. Retained messages (the Hello) are there for whoever looks.
"""

import asyncio
from dataclasses import dataclass
from types import SimpleNamespace

import aiomqtt

from agent.load import Load
from agent.runners.mqtt import MqttRunner

REPLAYS_KEPT = 32  # what an eavesdropper remembers, to say it again


@dataclass(frozen=True)
class Incoming:
    """A message as aiomqtt shows it."""

    topic: object
    payload: bytes
    retain: bool = False


class Broker:
    """Between consumers and the agent."""

    def __init__(self, weather, root):
        self.weather, self.root = weather, root
        self.retained: dict[str, bytes] = {}
        self.consumers: dict[str, object] = {}  # sref -> callable
        self._lines: list[AgentClient] = []  # the agent's connections
        self.overheard: list[tuple[str, bytes]] = []

    def says(self, sref, payload):
        """A consumer publishes; the agent hears it, perhaps."""
        self.overheard = [*self.overheard[-REPLAYS_KEPT:], (sref, payload)]
        topic = SimpleNamespace(value=f"{self.root}/in/{sref}")
        for latency_s in self.weather.copies():
            asyncio.get_running_loop().call_later(latency_s, self._deliver, Incoming(topic, payload))

    def _deliver(self, incoming):
        for line in self._lines:
            if any(pattern in (incoming.topic.value, f"{self.root}/in/+") for pattern in line.patterns):
                line.messages.put(incoming)

    def carries(self, topic, payload, *, retain):
        """The agent publishes."""
        if retain:
            self.retained[topic] = payload
        if f"{self.root}/out/" in topic:
            hears = self.consumers.get(topic.rpartition("/")[2])
            for latency_s in self.weather.copies() if hears is not None else ():
                asyncio.get_running_loop().call_later(latency_s, hears, payload)

    def breaks(self):
        """The agent is thrown out, with all its connections."""
        lines, self._lines = self._lines, []
        for line in lines:
            line.messages.fail(aiomqtt.MqttError("the simulated broker threw us out"))


class AgentClient:
    """As much of `aiomqtt.Client` as the runner uses."""

    def __init__(self, broker, life):
        self._broker, self._life = broker, life
        self.messages = life.mailbox()
        self.patterns: set[str] = set()

    async def _ask(self, name, effect):
        def effect_of_a_standing_connection():
            if name != "connect" and self not in self._broker._lines:
                raise aiomqtt.MqttError("the simulated connection is gone")
            effect()

        return await self._life.call(
            f"broker.{name}", effect_of_a_standing_connection, self._life.weather.broker
        )

    async def __aenter__(self):
        await self._ask("connect", lambda: self._broker._lines.append(self))
        return self

    async def __aexit__(self, *_):
        self._broker._lines = [line for line in self._broker._lines if line is not self]

    async def subscribe(self, topics):
        """Granted with QoS 1."""
        await self._ask("subscribe", lambda: self.patterns.update(topic for topic, _ in topics))
        return tuple(qos for _, qos in topics)

    async def unsubscribe(self, topics):
        """Not heard any more."""
        await self._ask("unsubscribe", lambda: self.patterns.difference_update(topics))

    async def publish(self, topic, payload, qos=0, retain=False, timeout=None):
        """Acknowledged, or MqttError."""

        def effect():
            if self._broker.weather.broker_breaks():
                self._broker.breaks()
            self._broker.carries(topic, payload, retain=retain)

        await self._ask("publish", effect)


def runner_above(broker, life):
    """`MqttRunner`, whole, with its client replaced by ours."""

    class SimMqttRunner(MqttRunner):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self._load = Load(worked_s=lambda: 0.0)  # how fast this machine is may not change a story

        def _client(self, line, heard):
            return AgentClient(broker, life())

    return SimMqttRunner
