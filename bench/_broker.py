"""A very small MQTT 3.1.1 broker in one loop: enough for our two clients, and made to be changed by whoever means harm.

It routes by exact topic and `+`, keeps what is retained, publishes wills, and acknowledges. A subclass overrides `publish`
(what happens to a message on its way) or `deliver` (what one client gets), or speaks bytes of its own through `Visitor.send`.
The floods of `bench floods` and the hostile broker of the tests stand on it.

Not here: QoS 2, persistent sessions, `#`, passwords. Not for any network.
"""

from __future__ import annotations

import asyncio
import contextlib
import struct
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK = 1, 2, 3, 4, 8, 9
UNSUBSCRIBE, UNSUBACK, PINGREQ, DISCONNECT = 10, 11, 12, 14
WAITING_BYTES_MAX = 1 << 20  # for a client that does not read; what comes then is lost, as in any broker


@dataclass(frozen=True, slots=True)
class Message:
    """One message on its way."""

    topic: str
    payload: bytes
    qos: int = 1
    retain: bool = False


def packet(kind: int, body: bytes, flags: int = 0) -> bytes:
    """A whole packet: fixed header, length, body."""
    length, left = bytearray(), len(body)
    while True:
        left, digit = left >> 7, left & 0x7F
        length.append(digit | (0x80 if left else 0))
        if not left:
            return bytes([kind << 4 | flags]) + bytes(length) + body


def publish_packet(message: Message, mid: int = 1) -> bytes:
    """A PUBLISH as a broker sends it."""
    topic = message.topic.encode()
    head = struct.pack(">H", len(topic)) + topic + (struct.pack(">H", mid) if message.qos else b"")
    return packet(PUBLISH, head + message.payload, message.qos << 1 | message.retain)


def fits(pattern: str, topic: str) -> bool:
    """True if a subscription to `pattern` hears this topic. `#` only stands at the end."""
    wanted, given = pattern.split("/"), topic.split("/")
    if wanted[-1] == "#":
        wanted, given = wanted[:-1], given[: len(wanted) - 1]
    return len(wanted) == len(given) and all(
        one in ("+", other) for one, other in zip(wanted, given, strict=True)
    )


@dataclass(eq=False)
class Visitor:
    """One connected client."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    name: str = ""
    patterns: list[str] = field(default_factory=list)
    will: Message | None = None
    mid: int = 0

    async def next(self) -> tuple[int, int, bytes]:
        """The next packet: kind, flags, body. IncompleteReadError at the end."""
        (first,) = await self.reader.readexactly(1)
        length, shift, more = 0, 0, True
        while more:
            (digit,) = await self.reader.readexactly(1)
            length, shift, more = length | (digit & 0x7F) << shift, shift + 7, bool(digit & 0x80)
        return first >> 4, first & 0xF, await self.reader.readexactly(length)

    def send(self, data: bytes) -> bool:
        """Queue bytes for it; False, and nothing is queued, when too much waits already."""
        if self.writer.is_closing() or self.writer.transport.get_write_buffer_size() > WAITING_BYTES_MAX:
            return False
        self.writer.write(data)
        return True

    def cut(self) -> None:
        """End the connection without a word."""
        self.writer.transport.abort()


class Broker:
    """`async with Broker() as broker:` listens on `broker.port` of loopback."""

    def __init__(self) -> None:
        self.port = 0
        self.visitors: list[Visitor] = []
        self.retained: dict[str, Message] = {}
        self._serving: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for visitor in tuple(self.visitors):
            visitor.cut()
        await asyncio.gather(*self._serving, return_exceptions=True)

    # ---- what a subclass may change

    def publish(self, sender: Visitor | None, message: Message) -> None:
        """A message arrives: keep it if it is retained, hand it to whoever subscribed."""
        if message.retain:
            self.retained[message.topic] = message
        for visitor in list(self.visitors):
            if any(fits(pattern, message.topic) for pattern in visitor.patterns):
                self.deliver(visitor, Message(message.topic, message.payload, message.qos))

    def deliver(self, visitor: Visitor, message: Message) -> None:
        """One client gets one message."""
        visitor.mid = visitor.mid % 65_535 + 1
        visitor.send(publish_packet(message, visitor.mid))

    async def answer(self, visitor: Visitor, kind: int, flags: int, body: bytes) -> None:
        """One packet of a client, answered as the protocol wants it."""
        if kind == CONNECT:
            visitor.name, visitor.will = _introduction(body)
            visitor.send(packet(CONNACK, b"\x00\x00"))
        elif kind == SUBSCRIBE:
            patterns = _patterns(body[2:])
            visitor.patterns += [pattern for pattern in patterns if pattern not in visitor.patterns]
            visitor.send(packet(SUBACK, body[:2] + b"\x01" * len(patterns)))
            for message in list(self.retained.values()):
                if message.payload and any(fits(pattern, message.topic) for pattern in patterns):
                    self.deliver(visitor, message)
        elif kind == UNSUBSCRIBE:
            gone = _patterns(body[2:], has_qos=False)
            visitor.patterns = [pattern for pattern in visitor.patterns if pattern not in gone]
            visitor.send(packet(UNSUBACK, body[:2]))
        elif kind == PUBLISH:
            message, mid = _published(flags, body)
            if message.qos:
                visitor.send(packet(PUBACK, mid))
            self.publish(visitor, message)
        elif kind == PINGREQ:
            visitor.send(packet(13, b""))
        elif kind == DISCONNECT:
            visitor.will = None
            visitor.writer.close()

    # ---- connections

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        visitor = Visitor(reader, writer)
        self.visitors.append(visitor)
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
                while True:
                    await self.answer(visitor, *await visitor.next())
        finally:
            self._serving.discard(task)
            self.visitors.remove(visitor)
            writer.close()
            if visitor.will is not None:
                self.publish(None, visitor.will)


def _text(body: bytes) -> tuple[bytes, bytes]:
    """A field with its length before it, and the rest."""
    (length,) = struct.unpack_from(">H", body)
    return body[2 : 2 + length], body[2 + length :]


def _introduction(body: bytes) -> tuple[str, Message | None]:
    """Client id and will of a CONNECT."""
    flags = body[7]
    name, rest = _text(body[10:])
    if not flags & 0x04:
        return name.decode(), None
    topic, rest = _text(rest)
    payload, _ = _text(rest)
    return name.decode(), Message(topic.decode(), payload, flags >> 3 & 3, bool(flags & 0x20))


def _patterns(body: bytes, *, has_qos: bool = True) -> list[str]:
    patterns = []
    while body:
        pattern, body = _text(body)
        patterns.append(pattern.decode())
        body = body[has_qos:]
    return patterns


def _published(flags: int, body: bytes) -> tuple[Message, bytes]:
    topic, rest = _text(body)
    qos = flags >> 1 & 3
    mid, payload = (rest[:2], rest[2:]) if qos else (b"", rest)
    return Message(topic.decode(), payload, qos, bool(flags & 1)), mid
