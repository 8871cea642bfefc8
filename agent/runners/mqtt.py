"""The broker: carries the door's messages and the owner's telemetry (PROTOCOL section 6). One task, one connection at a time.

Rules
* The broker can deny service, never steal: nothing here decides, and money and safety never depend on it. It being
  down never ends `run`; the runner comes back with growing, jittered waits.
* Level-triggered: what should be on the broker is computed anew at every look, and what this connection has not
  carried yet is published. A new connection has carried nothing, so a lost message heals at the next one.
* A publish without its acknowledgement, or a silent connection, is a broken connection (half-open links exist).
* What strangers send is bounded before it is looked at: size, queue, messages per turn of the event loop.

May not know: what messages mean (the door), HTTP, the charger, the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import aiomqtt
import structlog

from agent import views
from agent.core.messages import MESSAGE_BYTES_MAX, Hello, Message, ReadingMessage, encode
from agent.core.units import Address, hex0x
from agent.door import Door
from agent.engine import Engine

PUBACK_WAIT_S = 5.0  # a broker that takes longer than this is down, whatever TCP says
OFFLINE_WAIT_S = 1.0  # a polite goodbye may not delay a stop of the daemon
BACKOFF_S = (0.2, 10.0)  # first and longest wait: soon back after a restart, no storm on a broker that is ill
STEADY_S = (
    10.0  # only a connection that lived this long resets the wait: a broker may accept and then throw us out
)
BEAT_S = 1.0  # a look at least this often: Hello rotates with time, not with events
LOOK_INTERVAL_S = (
    0.1  # a look at most this often: it signs readings, and the engine may change with every poll
)
TELEMETRY_INTERVAL_S = 1.0  # owners plot, they do not control
HEARD_QUEUE_MAX = (
    256  # a flood fills this, then the rest is dropped; the consumer repeats what was not answered
)
HEARD_AT_ONCE_MAX = 8  # a few milliseconds of signature checks, then the event loop turns
PUBLISHED_AT_ONCE_MAX = 16  # below the client's own window of 20 unacknowledged messages

ONLINE, OFFLINE = b"online", b"offline"
_TOPIC_LEVEL = re.compile(r"[^/+#\x00-\x20\x7f-\U0010ffff]{1,64}")  # else it would not stay below `out/`

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where the broker is and who we are there. `keepalive_s` <= 20: dead links are found after 1.5 times this."""

    host: str
    port: int = 1883
    username: str | None = None
    password: str | None = None
    keepalive_s: int = 15
    tls: ssl.SSLContext | None = None

    def __post_init__(self) -> None:
        assert 1 <= self.keepalive_s <= 20, self.keepalive_s

    def __repr__(self) -> str:
        """Without the password."""
        return f"BrokerAddress({self.host}:{self.port})"


@dataclass(frozen=True, slots=True)
class _Post:
    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


class MqttRunner:
    """Carries between one broker and the door of one provider."""

    def __init__(self, engine: Engine, door: Door, provider: Address, broker: BrokerAddress) -> None:
        self._engine, self._door, self._broker = engine, door, broker
        self._root = f"v2v/1/{hex0x(provider)}"
        # The same name again makes the broker drop our own half-open predecessor, and 3.1.1 promises only 23 characters.
        self._client_id = f"v2v-{provider.hex()[:16]}"
        self._told: dict[tuple[str, type[Message], bytes], Message] = {}  # what this connection has carried
        self._retained: dict[str, bytes] = {}
        self._telemetry_at_s = 0.0
        self._problem = ""  # the one already logged: an hour without a broker is one line, not a thousand
        self.connected = False

    async def run(self) -> NoReturn:
        """For ever: connect, carry, wait, again. Only cancellation ends it; then the owner sees `offline`."""
        loop = asyncio.get_running_loop()
        wait_s = BACKOFF_S[0]
        while True:
            began_s = loop.time()
            try:
                async with self._client() as client:
                    await self._carry(client)
            except aiomqtt.MqttError as error:
                _stop_if_cancelled()  # a goodbye that failed must not hide it
                self._log_problem(error)
            finally:
                self.connected = False
            if loop.time() - began_s > STEADY_S:
                wait_s = BACKOFF_S[0]
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads clients, hides nothing
            wait_s = min(BACKOFF_S[1], 2 * wait_s)

    def _client(self) -> aiomqtt.Client:
        silent = logging.getLogger("agent.runners.mqtt.client")
        silent.setLevel(logging.CRITICAL)  # it would log every message of a flood that it drops
        return aiomqtt.Client(
            self._broker.host,
            self._broker.port,
            username=self._broker.username,
            password=self._broker.password,
            identifier=self._client_id,
            protocol=aiomqtt.ProtocolVersion.V311,
            will=aiomqtt.Will(f"{self._root}/online", OFFLINE, qos=1, retain=True),
            keepalive=self._broker.keepalive_s,
            timeout=PUBACK_WAIT_S,
            max_queued_incoming_messages=HEARD_QUEUE_MAX,
            tls_context=self._broker.tls,
            logger=silent,
        )

    async def _carry(self, client: aiomqtt.Client) -> None:
        """One connection, from `online` to its end. Raises MqttError when it breaks."""
        self._told, self._retained, self._telemetry_at_s = {}, {}, 0.0
        await client.subscribe(f"{self._root}/in/+", qos=1)
        await client.publish(f"{self._root}/online", ONLINE, qos=1, retain=True)
        _stop_if_cancelled()
        self.connected, self._problem = True, ""
        log.info("mqtt.up", broker=f"{self._broker.host}:{self._broker.port}")
        both = [asyncio.create_task(self._hear(client)), asyncio.create_task(self._tell(client))]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except asyncio.CancelledError:
            with contextlib.suppress(aiomqtt.MqttError):
                await client.publish(
                    f"{self._root}/online", OFFLINE, qos=1, retain=True, timeout=OFFLINE_WAIT_S
                )
            raise
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    def _log_problem(self, error: aiomqtt.MqttError) -> None:
        if str(error) != self._problem:
            self._problem = str(error)
            log.warning("mqtt.down", broker=f"{self._broker.host}:{self._broker.port}", problem=self._problem)

    # ---- consumer -> door -> consumer

    async def _hear(self, client: aiomqtt.Client) -> NoReturn:
        """Answer what consumers send, a few messages per turn. Waiting for our own acknowledgements slows a flood, not us."""
        messages = client.messages
        while True:
            heard = [await anext(messages)]
            while len(messages) > 0 and len(heard) < HEARD_AT_ONCE_MAX:
                heard.append(await anext(messages))
            await self._publish(client, [post for message in heard for post in self._answers(message)])
            await asyncio.sleep(0)

    def _answers(self, heard: aiomqtt.Message) -> Iterator[_Post]:
        sref = heard.topic.value.rpartition("/")[2]
        if heard.retain or not _TOPIC_LEVEL.fullmatch(sref) or not isinstance(heard.payload, bytes):
            return  # retained: a leftover of another day, not a question
        if len(heard.payload) > MESSAGE_BYTES_MAX:
            return  # who sends this does not speak our protocol; an answer would be an amplifier
        answer = self._door.answer(sref, f"mqtt:{sref}", heard.payload)
        if hasattr(answer, "session_id"):
            self._told[_key(sref, answer)] = answer  # it is no news any more
        yield self._out(sref, answer)

    def _out(self, sref: str, message: Message) -> _Post:
        qos = 0 if isinstance(message, ReadingMessage) else 1
        return _Post(f"{self._root}/out/{sref}", encode(message), qos)

    # ---- door and views -> broker

    async def _tell(self, client: aiomqtt.Client) -> NoReturn:
        """Publish what this connection has not carried yet, whenever something changed, and at every beat."""
        while True:
            changed = self._engine.changed
            await self._publish(client, [*self._hellos(), *self._news(), *self._telemetry()])
            await asyncio.sleep(LOOK_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await changed.wait()

    def _hellos(self) -> Iterator[_Post]:
        if self._engine.live.header is None:
            return  # without a header we do not know the time, so we cannot say until when a Hello is good
        for port in self._door.ports:
            hello: Hello = self._door.hello(port)
            yield from self._if_new(f"{self._root}/hello/{hex0x(hello.charger_id)}", encode(hello))

    def _news(self) -> Iterator[_Post]:
        news = {_key(sref, message): message for sref, message in self._door.news()}
        for key, message in news.items():
            if self._told.get(key) != message and _TOPIC_LEVEL.fullmatch(key[0]):
                yield self._out(key[0], message)
        self._told = news  # forgets what is no longer current, so this does not grow

    def _telemetry(self) -> Iterator[_Post]:
        now_s = asyncio.get_running_loop().time()
        if now_s - self._telemetry_at_s < TELEMETRY_INTERVAL_S:
            return
        self._telemetry_at_s = now_s
        for suffix, payload in views.telemetry(self._engine.book, self._engine.live).items():
            yield from self._if_new(f"{self._root}/car/{suffix}", payload.encode())

    def _if_new(self, topic: str, payload: bytes) -> Iterator[_Post]:
        if self._retained.get(topic) != payload:
            self._retained[topic] = payload
            yield _Post(topic, payload, retain=True)

    async def _publish(self, client: aiomqtt.Client, posts: list[_Post]) -> None:
        """Publish in this order, a window at a time, and wait for the acknowledgements. Raises MqttError without them."""
        for first in range(0, len(posts), PUBLISHED_AT_ONCE_MAX):
            window = posts[first : first + PUBLISHED_AT_ONCE_MAX]
            await asyncio.gather(*(client.publish(p.topic, p.payload, p.qos, p.retain) for p in window))


def _stop_if_cancelled() -> None:
    """Our library waits with `asyncio.wait_for`, which swallows a cancellation that comes with the result (Python < 3.12)."""
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def _key(sref: str, message: Message) -> tuple[str, type[Message], bytes]:
    return sref, type(message), getattr(message, "session_id", b"")
