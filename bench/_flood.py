"""The outside world of `bench floods`: a broker that pushes garbage at a rate, and visitors that keep a web server busy.

Each runs in a process of its own and is told through a pipe: ("flood", [(terms, port)], ever_new) begins, ("stop",) ends and is
answered with what was sent, per second.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection

from agent.core import token as rules
from agent.core.events import Terms
from agent.core.messages import Hello, Present, ReceiptMessage, decode, encode
from agent.core.token import Domain
from agent.core.units import SessionId
from agent.keys import ephemeral_signer
from bench._broker import Broker, Message, Visitor, publish_packet

RATE = 20_000  # messages a second
NAMES = 64  # of vandals that the broker knows
TICK_S = 0.005
WAITING_BYTES, TOGETHER = 100_000, 50
SOURCES, CONNECTIONS = 6, 16  # loopback addresses that visitors come from, and connections of each
CONSUMER, STRANGER = ephemeral_signer(b"consumer"), ephemeral_signer(b"stranger")


def garbage(terms: Terms, hello: Hello) -> dict[str, bytes]:
    """Every kind of bad message that is aimed at this session and this Hello, by name."""
    typed = rules.PresentToken(
        terms.token,
        terms.session_id,
        terms.provider,
        rules.ZERO_ADDRESS,
        0,
        terms.valid_until_s,
        b"\x01" * 32,
    )
    forged = Present(
        "eip712", terms.session_id, terms.token, hello.charger_id, hello.nonce, os.urandom(32), rules.ZERO_ADDRESS, 0,
        terms.valid_until_s, CONSUMER.public_key, STRANGER.sign_digest(rules.digest(Domain(1, terms.provider), typed)),
    )  # fmt: skip
    high_s = forged.signature[:32] + b"\xff" * 32 + b"\x1b"
    return {
        "oversize": b"x" * 5_000,
        "malformed": b'{"type":"present","sessionId":"0x00"}',
        "not JSON": os.urandom(200),
        "unknown session": encode(replace(forged, session_id=SessionId(os.urandom(32)))),
        "receipt of an unknown session": encode(ReceiptMessage(SessionId(bytes(32)), 1, bytes(65))),
        "stale Hello": encode(replace(forged, hello_nonce=os.urandom(32))),
        "high s under a live nonce": encode(replace(forged, signature=high_s)),
        "forged under a live nonce": encode(forged),
    }


# ---- the broker


class FloodingBroker(Broker):
    """An honest broker but for the garbage that its vandals push to the car."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = self.lost = 0
        self._number = 0

    def hellos(self) -> dict[bytes, Hello]:
        """What the car shows, by charging port."""
        found = [decode(message.payload) for topic, message in self.retained.items() if "/hello/" in topic]
        return {hello.charger_id: hello for hello in found if isinstance(hello, Hello)}

    async def flood(self, targets: list[tuple[Terms, str]], *, ever_new: bool) -> None:
        """20 000 a second until cancelled; what the car does not take is lost, as with any broker."""
        loop = asyncio.get_running_loop()
        began_s, frames, made_s = loop.time(), [b""], 0.0
        pushed = 0
        while True:
            if loop.time() - made_s > 1.0:  # Hellos rotate
                frames, made_s = self._frames(targets, ever_new), loop.time()
            due = int((loop.time() - began_s) * RATE) - pushed
            batch = [frames[(pushed + number) % len(frames)] for number in range(min(due, 1_000))]
            pushed += due
            for car in [
                visitor for visitor in self.visitors if any(one.endswith("/in/+") for one in visitor.patterns)
            ]:
                taken = self._push(car, batch)
                self.sent += taken
                self.lost += due - taken
            await asyncio.sleep(TICK_S)

    @staticmethod
    def _push(car: Visitor, batch: list[bytes]) -> int:
        """How many it takes: a broker keeps about a hundred messages for a client that is slow."""
        for first in range(0, len(batch), TOGETHER):
            if car.writer.transport.get_write_buffer_size() >= WAITING_BYTES:
                return first
            car.send(b"".join(batch[first : first + TOGETHER]))
        return len(batch)

    def _frames(self, targets: list[tuple[Terms, str]], ever_new: bool) -> list[bytes]:
        hellos, frames = self.hellos(), []
        root = next(topic for topic in self.retained if "/hello/" in topic).partition("/hello/")[0]
        for terms, port in targets:
            hello = hellos.get(rules.charger_id(port))
            for data in garbage(terms, hello).values() if hello is not None else ():
                for _ in range(NAMES * (8 if ever_new else 1)):
                    self._number += 1
                    name = f"vandal-{self._number if ever_new else self._number % NAMES}"
                    frames.append(publish_packet(Message(f"{root}/in/{name}", data, qos=self._number % 2)))
        return frames


def broker(pipe: Connection) -> None:
    """The process: says its port, then floods when told."""
    os.nice(5)
    asyncio.run(_broke(pipe))


async def _broke(pipe: Connection) -> None:
    async with FloodingBroker() as place:
        pipe.send(place.port)
        flooding: asyncio.Task[None] | None = None
        began_s = 0.0
        with suppress(EOFError):
            while True:
                if not pipe.poll():
                    await asyncio.sleep(0.02)
                    continue
                word, *more = pipe.recv()
                if word == "flood":
                    place.sent = place.lost = 0
                    began_s = time.perf_counter()
                    flooding = asyncio.create_task(place.flood(more[0], ever_new=more[1]))
                elif flooding is not None:
                    took_s = time.perf_counter() - began_s
                    if flooding.done():
                        flooding.result()
                    flooding.cancel()
                    pipe.send({"mqtt": place.sent / took_s, "mqtt lost": place.lost / took_s})


# ---- visitors


def visitors(pipe: Connection, url: str) -> None:
    """The process: many connections from many addresses, each asking again as soon as it was answered, or shut out."""
    os.nice(5)
    port = int(url.rpartition(":")[2])
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            word, *more = pipe.recv()
            if word == "flood":
                pipe.send(_ask_until_told(pipe, port, more[0]))


def _ask_until_told(pipe: Connection, port: int, targets: list[tuple[Terms, str]]) -> dict[str, float]:
    requests, answers, shut_out, began_s, made_s = [b""], 0, 0, time.perf_counter(), 0.0
    waiting = selectors.DefaultSelector()
    while not pipe.poll():
        if time.perf_counter() - made_s > 5.0:
            requests, made_s = _requests(port, targets), time.perf_counter()
        missing = SOURCES * CONNECTIONS - len(waiting.get_map())
        for number in range(missing):
            shut_out += not _connect(
                waiting, port, f"127.0.1.{1 + number % SOURCES}", requests[number % len(requests)]
            )
        for key, _ in waiting.select(0.05):
            assert isinstance(key.fileobj, socket.socket)
            if not _heard(key.fileobj):
                waiting.unregister(key.fileobj)
                key.fileobj.close()
                shut_out += 1
                continue
            answers += 1
            with suppress(OSError):
                key.fileobj.send(requests[answers % len(requests)])
    pipe.recv()
    for key in list(waiting.get_map().values()):
        assert isinstance(key.fileobj, socket.socket)
        key.fileobj.close()
    took_s = time.perf_counter() - began_s
    return {"http answered": answers / took_s, "http shut out": shut_out / took_s}


def _connect(waiting: selectors.DefaultSelector, port: int, source: str, request: bytes) -> bool:
    try:
        visitor = socket.create_connection(("127.0.0.1", port), 1.0, source_address=(source, 0))
        visitor.send(request)
    except OSError:
        return False
    visitor.settimeout(0)
    waiting.register(visitor, selectors.EVENT_READ)
    return True


def _heard(visitor: socket.socket) -> bool:
    try:
        return bool(visitor.recv(65_536))
    except OSError:
        return False


def _hellos(port: int) -> dict[bytes, Hello]:
    """What the web server shows to somebody from an address of his own."""
    with suppress(OSError, http.client.HTTPException):
        asking = http.client.HTTPConnection("127.0.0.1", port, timeout=5.0, source_address=("127.0.2.1", 0))
        asking.request("GET", "/v1/hello")
        shown = json.loads(asking.getresponse().read())
        asking.close()
        hellos = [decode(json.dumps(one).encode()) for one in shown]
        return {hello.charger_id: hello for hello in hellos if isinstance(hello, Hello)}
    return {}


def _requests(port: int, targets: list[tuple[Terms, str]]) -> list[bytes]:
    """Each kind of garbage as a request, alone and three at once; bodies and heads that never end, and what is no HTTP."""
    hellos = _hellos(port)
    found = [
        b"GET / HTTP/1.1\r\nX: " + b"y" * 3_000,
        b"\x16\x03\x01" + os.urandom(200),
        b"GET /v1/hello HTTP/1.1\r\n",
    ]
    head = f"POST /v1/present HTTP/1.1\r\nHost: localhost\r\nX-V2V-Sref: {'f' * 32}\r\nContent-Length: "
    for terms, name in targets:
        hello = hellos.get(rules.charger_id(name))
        for data in garbage(terms, hello).values() if hello is not None else ():
            request = f"{head}{len(data)}\r\n\r\n".encode() + data
            found += [request, request * 3]
    return found
