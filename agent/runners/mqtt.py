"""The broker: carries the door's messages and the owner's telemetry (PROTOCOL section 6).

Two connections, each with a task that brings it back:
  car   speaks: Hellos, answers, news, telemetry; and hears the consumers of running sessions, each on its own topic
  door  hears strangers: everything else that is said to us

A broker (mosquitto 2.0) drops whatever finds no room on its way to a client that is flooded, acknowledgements too. So what
strangers send has a connection of its own, and a flood there costs nobody who is charging a word (rule 5).

Rules
* The broker can deny service, never steal: nothing here decides, and money and safety never depend on it. It being
  down never ends `run`; the runner comes back with growing, jittered waits.
* Level-triggered: what should be on the broker is computed anew at every look, and what this connection has not
  carried yet is published. A new connection has carried nothing, so a lost message heals at the next one.
* A publish without its acknowledgement, or a silent connection, is a broken connection (half-open links exist).
* What strangers send is bounded before it is looked at: size, queue, time per turn of the event loop. Hearing never waits for
  our answers to be acknowledged, and of a flood only a sample is answered: a refusal for each would be a second flood.

May not know: what messages mean (the door), HTTP, the charger, the chain.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import NoReturn

import aiomqtt
import structlog

from agent import views
from agent.core.messages import MESSAGE_BYTES_MAX, Accept, Hello, Message, ReadingMessage, Refusal, encode
from agent.core.session import CLOSED
from agent.core.units import Address, hex0x
from agent.door import Door
from agent.engine import Engine
from agent.load import Load
from agent.mqtt_client import BrokerAddress, Heard, ReadInTurns, granted, new_client, subscribe

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
HEARD_TURN_S = (
    0.0005  # so long we look at messages, then the event loop turns: the charger's beat runs in it too
)
ANSWERS_MAX = (
    64  # waiting for a broker that acknowledges slowly; what finds no room is asked, or told as news, again
)
PUBLISHED_AT_ONCE_MAX = 16  # below the client's own window of 20 unacknowledged messages
# Of refusals only so many a second go out (and twice as many at once). Fewest of what anybody can send who knows nothing: they
# are for people who look for their mistake. The others tell a consumer what to do next: fetch a new Hello, wait, go home.
NOISE = frozenset({"malformed", "rate_limited", "unknown_session", "not_yet_seen", "unknown_charger"})
NOISE_PER_S, REFUSALS_PER_S = 10.0, 50.0

ONLINE, OFFLINE = b"online", b"offline"
_TOPIC_LEVEL = re.compile(r"[^/+#\x00-\x20\x7f-\U0010ffff]{1,64}")  # else it would not stay below `out/`

__all__ = ["BrokerAddress", "MqttRunner"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Post:
    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


@dataclass(slots=True)
class _Line:
    """One of the two connections, over all its lives."""

    name: str
    identifier: str
    connected: bool = False
    problem: str = ""  # the one already logged: an hour without a broker is one line, not a thousand


class MqttRunner:
    """Carries between one broker and the door of one provider."""

    def __init__(self, engine: Engine, door: Door, provider: Address, broker: BrokerAddress) -> None:
        self._engine, self._door, self._broker = engine, door, broker
        self._root = f"v2v/1/{hex0x(provider)}"
        self._told: dict[tuple[str, type[Message], bytes], Message] = {}  # what this connection has carried
        self._asked: frozenset[str] = (
            frozenset()
        )  # topics of running sessions that the car's connection asked for
        self._own_topics: frozenset[str] = frozenset()  # and those it got
        self._load = Load()
        self._answers: deque[_Post] = deque()
        self._has_answers = asyncio.Event()
        self._paid_until_s = {NOISE_PER_S: 0.0, REFUSALS_PER_S: 0.0}
        self._retained: dict[str, bytes] = {}
        self._telemetry_at_s = 0.0
        # The same names again make the broker drop our own half-open predecessors, and 3.1.1 promises only 23 characters.
        name = f"v2v-{provider.hex()[:16]}"
        self._car, self._door_line = _Line("car", name), _Line("door", f"{name}-in")

    @property
    def connected(self) -> bool:
        """Both connections stand."""
        return self._car.connected and self._door_line.connected

    async def run(self) -> NoReturn:
        """For ever: connect, carry, wait, again. Only cancellation ends it; then the owner sees `offline`."""
        tasks = [
            asyncio.create_task(self._keep(self._car, self._carry)),
            asyncio.create_task(self._keep(self._door_line, self._hear_strangers)),
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        raise AssertionError("a connection is kept for ever")

    async def _keep(
        self, line: _Line, carry: Callable[[aiomqtt.Client, Heard], Awaitable[NoReturn]]
    ) -> NoReturn:
        loop = asyncio.get_running_loop()
        wait_s = BACKOFF_S[0]
        while True:
            began_s = loop.time()
            try:
                heard = Heard()
                async with self._client(line, heard) as client:
                    await carry(client, heard)
            except aiomqtt.MqttError as error:
                _stop_if_cancelled()  # a goodbye that failed must not hide it
                self._say_down(line, str(error))
            finally:
                line.connected = False
            if loop.time() - began_s > STEADY_S:
                wait_s = BACKOFF_S[0]
            await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311 - spreads clients, hides nothing
            wait_s = min(BACKOFF_S[1], 2 * wait_s)

    @contextlib.asynccontextmanager
    async def _client(self, line: _Line, heard: Heard) -> AsyncIterator[aiomqtt.Client]:
        """A connection, read in turns. Raises MqttError when there is none to be had."""
        will = (
            aiomqtt.Will(f"{self._root}/online", OFFLINE, qos=1, retain=True) if line is self._car else None
        )
        async with new_client(
            self._broker, heard, timeout_s=PUBACK_WAIT_S, identifier=line.identifier, will=will
        ) as client:
            ReadInTurns(client, self._load.rest_s)
            yield client

    def _say_up(self, line: _Line) -> None:
        _stop_if_cancelled()
        line.connected, line.problem = True, ""
        log.info("mqtt.up", broker=f"{self._broker.host}:{self._broker.port}", line=line.name)

    def _say_down(self, line: _Line, problem: str) -> None:
        if problem != line.problem:
            line.problem = problem
            broker = f"{self._broker.host}:{self._broker.port}"
            log.warning("mqtt.down", broker=broker, line=line.name, problem=problem)

    async def _carry(self, client: aiomqtt.Client, heard: Heard) -> NoReturn:
        """The car's connection, from `online` to its end. Raises MqttError when it breaks."""
        self._told, self._retained, self._telemetry_at_s = {}, {}, 0.0
        self._answers.clear()
        self._say_up(self._car)
        work = (self._hear(client, heard), self._answer(client), self._tell(client))
        tasks = [asyncio.create_task(one) for one in work]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        except asyncio.CancelledError:
            with contextlib.suppress(aiomqtt.MqttError):
                await client.publish(
                    f"{self._root}/online", OFFLINE, qos=1, retain=True, timeout=OFFLINE_WAIT_S
                )
            raise
        finally:
            self._asked = self._own_topics = frozenset()  # until it hears them again, the door does
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()
        raise AssertionError("a connection is carried until it breaks")

    async def _hear_strangers(self, client: aiomqtt.Client, heard: Heard) -> NoReturn:
        """The door's connection, to its end. Raises MqttError when it breaks."""
        await subscribe(client, f"{self._root}/in/+")
        self._say_up(self._door_line)
        await self._hear(client, heard, is_door=True)

    # ---- consumer -> door -> consumer

    async def _hear(self, client: aiomqtt.Client, heard: Heard, *, is_door: bool = False) -> NoReturn:
        """Look at what consumers sent, for a moment in every turn of the loop; topics take turns."""
        messages = client.messages
        while True:
            message = await anext(messages)  # raises MqttError when the connection is gone
            until_s = (
                time.thread_time() + HEARD_TURN_S
            )  # our own work: a busy machine must not end the turn for us
            while True:
                if not (is_door and message.topic.value in self._own_topics):
                    self._look_at(message)
                if heard.empty() or time.thread_time() >= until_s:
                    break
                message = heard.get_nowait()
            await asyncio.sleep(self._load.rest_s())

    def _look_at(self, message: aiomqtt.Message) -> None:
        """Ask the door; its answer waits to be published."""
        place, _, sref = message.topic.value.rpartition("/")
        if message.retain or place != f"{self._root}/in" or not _TOPIC_LEVEL.fullmatch(sref):
            return  # retained: a leftover of another day, not a question
        if not isinstance(message.payload, bytes) or len(message.payload) > MESSAGE_BYTES_MAX:
            return  # who sends this does not speak our protocol; an answer would be an amplifier
        answer = self._door.answer(sref, f"mqtt:{sref}", message.payload)
        if len(self._answers) >= ANSWERS_MAX or (
            isinstance(answer, Refusal) and not self._may_refuse(answer)
        ):
            return
        if hasattr(answer, "session_id"):
            if isinstance(answer, Accept) and self._told.get(_key(sref, answer)) == answer:
                self._told = {
                    key: told for key, told in self._told.items() if key[0] != sref
                }  # it missed some
            self._told[_key(sref, answer)] = answer  # it is no news any more
        self._answers.append(self._out(sref, answer))
        self._has_answers.set()

    def _may_refuse(self, refusal: Refusal) -> bool:
        now_s = asyncio.get_running_loop().time()
        per_s = NOISE_PER_S if refusal.reason in NOISE else REFUSALS_PER_S
        paid_until_s = max(self._paid_until_s[per_s], now_s) + 1 / per_s
        if paid_until_s - now_s > 2.0:
            return False
        self._paid_until_s[per_s] = paid_until_s
        return True

    async def _answer(self, client: aiomqtt.Client) -> NoReturn:
        while True:
            await self._has_answers.wait()
            self._has_answers.clear()
            while self._answers:
                at_once = min(len(self._answers), PUBLISHED_AT_ONCE_MAX // 2)  # the other half is for `_tell`
                await self._publish(client, [self._answers.popleft() for _ in range(at_once)])

    def _out(self, sref: str, message: Message) -> _Post:
        qos = 0 if isinstance(message, ReadingMessage) else 1
        return _Post(f"{self._root}/out/{sref}", encode(message), qos)

    # ---- door and views -> broker

    async def _tell(self, client: aiomqtt.Client) -> NoReturn:
        """Publish what this connection has not carried yet, whenever something changed, and at every beat."""
        while True:
            changed = self._engine.changed
            await self._hear_sessions(client)
            await self._publish(client, [*self._online(), *self._hellos(), *self._news(), *self._telemetry()])
            await asyncio.sleep(LOOK_INTERVAL_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    await changed.wait()

    async def _hear_sessions(self, client: aiomqtt.Client) -> None:
        """Listen to where running sessions speak from, and to nothing else any more. What the broker refuses, the door hears."""
        wanted = frozenset(self._open_addresses())
        gone, new = self._asked - wanted, wanted - self._asked
        self._asked, self._own_topics = wanted, self._own_topics - gone
        if gone:
            await client.unsubscribe(sorted(gone))
        if new:
            self._own_topics |= await granted(client, *new)

    def _open_addresses(self) -> Iterator[str]:
        for session in self._engine.book.sessions.values():
            there = session.presentation
            if there is not None and session.stage not in CLOSED and _TOPIC_LEVEL.fullmatch(there.sref):
                yield f"{self._root}/in/{there.sref}"

    def _online(self) -> Iterator[_Post]:
        """Said once strangers are heard, and taken back when they are not."""
        topic = f"{self._root}/online"
        if self._door_line.connected or topic in self._retained:
            yield from self._if_new(topic, ONLINE if self._door_line.connected else OFFLINE)

    def _hellos(self) -> Iterator[_Post]:
        if not self._door_line.connected:
            return  # an invitation to speak where nobody listens yet
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
