"""The MQTT client of both sides of the plug: aiomqtt, with the limits that it does not have itself (PROTOCOL section 6).

Rules
* The broker is a stranger, and so is whoever speaks through it. A packet above PACKET_BYTES_MAX ends the connection as soon
  as its length is known; the library alone would collect 256 MiB of it.
* What has arrived waits in `Heard`: never more than a few hundred messages, shared out between topics, so that whoever
  floods crowds out himself first. Little waits in the kernel: what is old there only delays what is new.
* A refused subscription is a broken connection: a client that hears nothing must not look connected.
* The library logs nothing: its line for each dropped message would be a flood of its own.

May not know: what messages mean, which topics there are, who connects again and when.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import aiomqtt
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.reasoncodes import ReasonCode

PACKET_BYTES_MAX = (
    64 * 1024
)  # sixteen of our messages: through a broker without a limit strangers send megabytes
RECEIVE_BUFFER_BYTES = (
    64 * 1024
)  # left alone it grows to seconds of a flood, all before the next honest message
UNREAD_MAX = 1_024  # acknowledgements waiting for a broker that sends and does not read
HEARD_MAX = 256  # messages waiting to be looked at
HEARD_MAX_OF_TOPIC = 32  # of these from one topic; once half of the room is taken, one
READ_TURN_S = (
    0.0005  # of our own processor time; then the event loop turns: the charger's beat runs in it too
)
REFUSED = 0x80  # and above: the return codes of a SUBACK that say no


@dataclass(frozen=True, slots=True)
class BrokerAddress:
    """Where the broker is and who we are there. `keepalive_s` <= 20: dead links are found after 1.5 times this."""

    host: str
    port: int = 1883
    tls: ssl.SSLContext | None = None
    username: str | None = None
    password: str | None = None
    keepalive_s: int = 15

    def __post_init__(self) -> None:
        assert 1 <= self.keepalive_s <= 20, self.keepalive_s

    def __repr__(self) -> str:
        """Without the password: this is what logs and tracebacks show."""
        return f"BrokerAddress({self.host}:{self.port})"


class Heard(asyncio.Queue[aiomqtt.Message]):
    """What has arrived: topics take turns. Putting never fails and never waits; what finds no room is forgotten."""

    def _init(self, maxsize: int) -> None:
        self._waiting: OrderedDict[str, deque[aiomqtt.Message]] = OrderedDict()
        self._count = 0

    def qsize(self) -> int:
        """How many messages wait."""
        return self._count

    def empty(self) -> bool:
        """Nothing waits."""
        return self._count == 0

    def full(self) -> bool:
        """Never, for whoever puts: `_put` decides what is kept."""
        return False

    def _put(self, item: aiomqtt.Message) -> None:
        topic = item.topic.value
        share = HEARD_MAX_OF_TOPIC if self._count < HEARD_MAX // 2 else 1
        waiting = self._waiting.get(topic)
        if (waiting is not None and len(waiting) >= share) or self._count >= HEARD_MAX:
            return
        if waiting is None:
            waiting = self._waiting[topic] = deque()
        waiting.append(item)
        self._count += 1

    def _get(self) -> aiomqtt.Message:
        topic, waiting = next(iter(self._waiting.items()))
        self._waiting.move_to_end(topic)
        if len(waiting) == 1:
            del self._waiting[topic]
        self._count -= 1
        return waiting.popleft()


def new_client(
    broker: BrokerAddress,
    heard: Heard,
    *,
    timeout_s: float,
    identifier: str | None = None,
    will: aiomqtt.Will | None = None,
) -> aiomqtt.Client:
    """A client for one connection, not connected yet; what it hears goes to `heard`. MQTT 3.1.1, clean session."""
    silent = logging.getLogger("agent.mqtt_client.library")
    silent.setLevel(logging.CRITICAL + 1)
    client = aiomqtt.Client(
        broker.host,
        broker.port,
        username=broker.username,
        password=broker.password,
        identifier=identifier,
        queue_type=cast("type[asyncio.Queue[aiomqtt.Message]]", lambda maxsize: heard),  # noqa: ARG005 - our own room
        protocol=aiomqtt.ProtocolVersion.V311,
        clean_session=True,
        will=will,
        keepalive=broker.keepalive_s,
        timeout=timeout_s,
        tls_context=broker.tls,
        logger=silent,
        socket_options=[(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BUFFER_BYTES)],
    )
    # Who leaves does not ask how the connection ended; asyncio would print that nobody asked.
    client._disconnected.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # noqa: SLF001
    library: Any = client._client  # noqa: SLF001 - nothing public tells the length of what is still coming
    _limit_packets(library)
    library._on_message_filtered = _NoFilters()  # noqa: SLF001
    return client


class _NoFilters:
    """In place of paho's callbacks by topic, which nobody uses: looking for them leaves garbage behind each message that only a
    full collection finds, and that holds the charger's beat up for 20 ms in a flood.
    """

    def iter_match(self, _topic: str) -> tuple[()]:
        """None for any topic."""
        return ()


def _limit_packets(library: Any) -> None:
    """Make paho give a connection up that would fill our memory. test_mqtt_client pins the names of paho's that are used here."""
    read = library._packet_read  # noqa: SLF001

    def read_within_limits() -> MQTTErrorCode:
        result: MQTTErrorCode = read()
        is_too_large = library._in_packet["remaining_length"] > PACKET_BYTES_MAX  # noqa: SLF001
        holds_half = library._in_messages  # noqa: SLF001 - QoS 2, which nobody asked for, waits here for its second half
        is_not_read = len(library._out_packet) > UNREAD_MAX  # noqa: SLF001
        return MQTTErrorCode.MQTT_ERR_PROTOCOL if is_too_large or holds_half or is_not_read else result

    library._packet_read = read_within_limits  # noqa: SLF001


class ReadInTurns:
    """Reads a connection as the library would, but only so long in a turn of the event loop, and rests between two turns.

    The library itself takes one packet in each turn of the loop, whenever there is one: under a flood it never rests. What is
    not read waits in the kernel, then at the broker.
    """

    def __init__(self, client: aiomqtt.Client, rest_s: Callable[[], float]) -> None:
        """From now on. `client` is connected; `rest_s` says after each turn for how many seconds nothing is read."""
        self._broken, self._library, self._rest_s = client._disconnected, cast("Any", client._client), rest_s  # noqa: SLF001
        self._loop, self._socket = asyncio.get_running_loop(), self._library.socket()
        self._read, self._last = self._library._packet_read, MQTTErrorCode.MQTT_ERR_SUCCESS  # noqa: SLF001
        self._library._packet_read = self._noted  # noqa: SLF001 - `loop_read` does not tell whether there was anything
        self._resume()

    def _noted(self) -> MQTTErrorCode:
        self._last = self._read()
        return self._last

    def _is_open(self) -> bool:
        """False once the library gave this connection up; its number may be somebody else's then."""
        return self._socket is not None and self._library.socket() is self._socket

    def _resume(self) -> None:
        if self._is_open():
            self._loop.add_reader(self._socket.fileno(), self._turn)
            self._turn()  # TLS may hold what no select sees

    def _turn(self) -> None:
        until_s = time.thread_time() + READ_TURN_S
        try:
            self._library.loop_read()
            while self._last == MQTTErrorCode.MQTT_ERR_SUCCESS and time.thread_time() < until_s:
                self._library.loop_read()
        except Exception as error:  # noqa: BLE001 - as the library's own reader: whatever it is, this connection is over
            if not self._broken.done():
                self._broken.set_exception(error)
        rest_s = self._rest_s()
        if self._is_open() and (rest_s > 0 or self._last == MQTTErrorCode.MQTT_ERR_SUCCESS):
            self._loop.remove_reader(self._socket.fileno())
            self._loop.call_later(rest_s, self._resume)


async def granted(client: aiomqtt.Client, *topics: str) -> frozenset[str]:
    """Subscribe with QoS 1: those of these topics that the broker grants. Raises MqttError when it does not answer."""
    codes = await client.subscribe([(topic, 1) for topic in topics])
    values = [code.value if isinstance(code, ReasonCode) else code for code in codes]
    return frozenset(topic for topic, value in zip(topics, values, strict=False) if value < REFUSED)


async def subscribe(client: aiomqtt.Client, *topics: str) -> None:
    """Subscribe with QoS 1. Raises MqttError when the broker refuses any of these topics."""
    got = await granted(client, *topics)
    refused = [topic for topic in topics if topic not in got]
    if refused:
        raise aiomqtt.MqttError(f"the broker does not let us subscribe to {refused[0]}")
