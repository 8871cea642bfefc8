"""What may go wrong, how often, and until when; and one life of the agent, which ends at a power cut.

Every port call of the agent goes through `Life.call`: a crash point before, a crash point after, and between them whatever
the weather has: a delay, a failure before anything happened, a failure after it had happened. Seeded: the same storm again.
"""

import asyncio
from collections import deque
from dataclasses import dataclass

from agent.errors import Transient
from firmware_bridge.charger import BridgeError


class PowerCut(BaseException):
    """The agent's computer has no power from here on."""


@dataclass
class Gust:
    """What happens to one call: it takes this long, and fails `before` or `after` it took effect."""

    latency_s: float
    when: str = ""
    error: Exception | None = None


@dataclass
class Storm:
    """How bad it is. Everything in percent of calls unless the name says otherwise; zero is a calm day."""

    node_fails: float = 0
    node_lags: float = 0
    node_silences: float = 0
    bus_fails: float = 0
    broker_drops: float = 0
    broker_doubles: float = 0
    broker_delays: float = 0
    broker_breaks: float = 0
    pool_loses: float = 0
    miner_waits: float = 0
    calm_from_ms: int = 0  # faults end here: then everything must come to its end


class Weather:
    """The storm, one draw at a time."""

    def __init__(self, storm, rng, now_ms):
        self.storm, self._rng, self._now_ms = storm, rng, now_ms

    @property
    def is_stormy(self):
        """Faults have not ended yet."""
        return self._now_ms() < self.storm.calm_from_ms

    def _happens(self, percent):
        return percent > 0 and self.is_stormy and self._rng.random() * 100 < percent

    def _gust(self, percent, latency_s, late_s, error):
        if not self._happens(percent):
            return Gust(latency_s)
        return Gust(self._rng.uniform(latency_s, late_s), self._rng.choice(["", "before", "after"]), error)

    def node(self):
        """A question to the node."""
        return self._gust(self.storm.node_fails, 0.05, 4.0, Transient("the simulated node is away"))

    def node_lag(self):
        """How many blocks the backend that answers is behind."""
        return self._rng.choice([1, 1, 2]) if self._happens(self.storm.node_lags) else 0

    def node_is_silent(self):
        """The subscription breaks with this block."""
        return self._happens(self.storm.node_silences)

    def bus(self):
        """A call to the charger."""
        return self._gust(self.storm.bus_fails, 0.03, 1.2, BridgeError("timeout", "simulated"))

    def broker(self):
        """A call to the broker."""
        return Gust(0.01)

    def copies(self):
        """How often, and when, a message arrives: lost, twice, late (and so in another order)."""
        if self._happens(self.storm.broker_drops):
            return []
        latency_s = 0.03
        if self._happens(self.storm.broker_delays):
            latency_s = self._rng.uniform(0.1, 8.0)
        if self._happens(self.storm.broker_doubles):
            return [latency_s, latency_s + self._rng.uniform(0.1, 30.0)]
        return [latency_s]

    def broker_breaks(self):
        """The agent's connection to the broker ends."""
        return self._happens(self.storm.broker_breaks)

    def pool_takes(self):
        """A transaction that was accepted by a node and then forgotten does not get into the pool."""
        return not self._happens(self.storm.pool_loses)

    def miner_takes(self):
        """True unless this block leaves the transaction out."""
        return not self._happens(self.storm.miner_waits)


class Mailbox:
    """Hints or messages on their way to the agent: an iterator that waits, and may fail."""

    def __init__(self):
        self._kept = deque()
        self._error = None
        self._wake = asyncio.Event()

    def put(self, item):
        """One more."""
        self._kept.append(item)
        self._wake.set()

    def fail(self, error):
        """Whoever waits gets this."""
        self._error = error
        self._wake.set()

    def __len__(self):
        return len(self._kept)

    def __aiter__(self):
        return self

    async def __anext__(self):
        while not self._kept:
            if self._error is not None:
                raise self._error
            self._wake.clear()
            await self._wake.wait()
        return self._kept.popleft()


class Life:
    """One incarnation of the agent. `counts(label)` says whether the power goes off at this point."""

    def __init__(self, number, weather, power_fails_at):
        self.number, self.weather = number, weather
        self._power_fails_at = power_fails_at
        self.is_over = False
        self.stop = asyncio.Event()  # an orderly stop, as systemd asks for it

    def point(self, label):
        """A crash point. A dead agent reaches no port: `finally` blocks cannot cheat."""
        if self.is_over:
            raise PowerCut
        if self._power_fails_at(label):
            self.is_over = True
            raise PowerCut

    async def call(self, name, effect, gusts):
        """One port call: `effect()` happens between its two crash points."""
        self.point(f"{name} before")
        gust = gusts()
        await asyncio.sleep(gust.latency_s)
        if self.is_over:
            raise PowerCut
        if gust.when == "before":
            raise gust.error
        result = effect()
        self.point(f"{name} after")
        if gust.when == "after":
            raise gust.error
        return result

    def monotonic_ms(self):
        """The agent's clock."""
        return int(asyncio.get_running_loop().time() * 1000)

    def mailbox(self):
        """Where hints and messages for this life arrive."""
        return Mailbox()
