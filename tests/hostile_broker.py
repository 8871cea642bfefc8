"""A broker that means harm: everything of the threat table that whoever carries our messages can do to them.

It drops, delays (and so reorders), doubles, replays, invents, misdirects, oversizes and retains messages; it refuses or
forgets to acknowledge, answers with wrong ids, ends connections in the middle of a packet or as soon as they stand, and goes
deaf without a word. What it does is drawn from a seed; `hostile = False` and it is an honest broker again.
"""

import asyncio
from collections import Counter, deque
from dataclasses import replace
from random import Random

from bench._broker import (
    CONNACK,
    CONNECT,
    PUBACK,
    PUBLISH,
    SUBACK,
    SUBSCRIBE,
    Broker,
    Message,
    packet,
    publish_packet,
)

KEPT = 64  # messages it remembers, to say them again
LATE_S = 0.5
DEAF_S = 0.6


class HostileBroker(Broker):
    """`inventions` are messages that it makes up: (topic, payload). What it did is counted in `did`."""

    def __init__(self, seed, inventions=()):
        super().__init__()
        self.chance = Random(seed)
        self.hostile = False
        self.inventions = list(inventions)
        self.did = Counter()
        self._heard = deque(maxlen=KEPT)
        self._deaf = set()

    def does(self, what, permille):
        """True, and counted, as often as that while it is hostile."""
        if not self.hostile or self.chance.randrange(1000) >= permille:
            return False
        self.did[what] += 1
        return True

    # ---- messages on their way

    def publish(self, sender, message):
        """A message arrives; who knows what becomes of it."""
        self._heard.append(message)
        if self.does("drop", 150):
            return
        if self.does("delay", 150):
            later_s = self.chance.random() * LATE_S
            asyncio.get_running_loop().call_later(later_s, super().publish, sender, message)
            return
        super().publish(sender, message)
        if self.does("duplicate", 100):
            super().publish(sender, message)
        if self.does("replay", 100):
            super().publish(sender, self.chance.choice(self._heard))
        if self.inventions and self.does("invent", 150):
            topic, payload = self.chance.choice(self.inventions)
            super().publish(None, Message(topic, payload))
        if self.does("over-size", 40):
            super().publish(
                None, replace(message, payload=b"x" * self.chance.choice((4_097, 60_000, 70_000)))
            )
        if self.does("misdirect", 60):
            for visitor in list(self.visitors):
                self.deliver(visitor, self.chance.choice((message, *self._heard)))

    def deliver(self, visitor, message):
        """One client gets one message, or something else."""
        if visitor in self._deaf:
            return
        visitor.mid = visitor.mid % 65_535 + 1
        if self.does("call it retained", 40):
            message = replace(message, retain=True)
        if self.does("exactly once", 10):
            message = replace(message, qos=2)  # nobody asked for it
        data = publish_packet(message, visitor.mid)
        if self.does("stop in the middle", 15):
            visitor.send(data[: len(data) // 2])
            asyncio.get_running_loop().call_later(0.05, visitor.cut)
        elif self.does("noise", 10):
            visitor.send(self.chance.randbytes(200))
        elif self.does("announce 256 MiB", 10):
            visitor.send(b"\x32\xff\xff\xff\x7f" + data)
        else:
            visitor.send(data)

    # ---- packets

    async def answer(self, visitor, kind, flags, body):
        """One packet of a client."""
        if visitor in self._deaf:
            return
        if self.does("go deaf", 15):
            self._deaf.add(visitor)
            asyncio.get_running_loop().call_later(DEAF_S, self._deaf.discard, visitor)
            return
        if self.does("cut", 15):
            visitor.cut()
            return
        if kind == CONNECT and self.does("refuse to connect", 200):
            visitor.send(packet(CONNACK, bytes([0, self.chance.randint(1, 5)])))
            return
        if kind == CONNECT and self.does("throw out again", 100):
            await super().answer(visitor, kind, flags, body)
            asyncio.get_running_loop().call_later(0.02, visitor.cut)
            return
        if kind == SUBSCRIBE and self.does("refuse to subscribe", 200):
            visitor.send(packet(SUBACK, body[:2] + b"\x80"))
            return
        if kind == SUBSCRIBE and self.does("subscribe somebody else", 100):
            visitor.send(packet(SUBACK, b"\x7f\x7f\x01"))
            return
        if kind == PUBLISH and flags & 2 and self.does("not acknowledge", 30):
            return
        if kind == PUBLISH and flags & 2 and self.does("acknowledge something else", 30):
            visitor.send(packet(PUBACK, b"\x7f\x7f"))
            return
        await super().answer(visitor, kind, flags, body)
