"""What carries messages between a consumer and a provider: the port, its inbox, and how long to wait before trying again.

Rules
* A carrier can lose, delay, repeat, reorder and forge; it can never steal. So `post` promises nothing: only the other
  side's answer proves that something arrived, and whoever needs one posts again.
* A carrier that is away comes back by itself, at a capped, jittered pace; what is wrong meanwhile stands in `trouble`.
* Nothing here grows without end: the inbox keeps the newest messages, and all of the protocol is cumulative.

May not know: what messages mean, signatures, sessions, the chain.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import deque
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from agent.core.units import Address

INBOX_MAX = (
    256  # messages kept for us: a flood costs 1 MiB at most, and readings are only as good as the newest
)
CONNECT_TIMEOUT_S = 10.0
BACKOFF_S = (0.5, 20.0)  # first and longest pause between two attempts to connect
Kind = Literal["present", "receipt", "stop"]


class Carrier(Protocol):
    """A way to one provider. Entered before use: entering proves that the way exists, or raises `Transient`."""

    @property
    def trouble(self) -> str:
        """Why nothing moves just now; empty while all is well."""

    async def __aenter__(self) -> Self:
        """Connect."""

    async def __aexit__(self, *_: object) -> None:
        """Leave. Never raises."""

    async def meet(self, provider: Address) -> None:
        """From now on listen to this provider, and no other."""

    async def ask_hello(self) -> None:
        """Make the provider's current Hellos arrive in the inbox, if they have not yet."""

    async def post(self, kind: Kind, data: bytes) -> None:
        """Send one message, as well as is possible now. Never raises: only an answer proves anything."""

    async def next(self, timeout_s: float) -> bytes | None:
        """The next message from the provider (or whoever pretends to be), oldest first; None after `timeout_s`."""


class Inbox:
    """What has arrived. When it is full, the oldest goes."""

    def __init__(self) -> None:
        self._messages: deque[bytes] = deque(maxlen=INBOX_MAX)
        self._arrived = asyncio.Event()

    def put(self, data: bytes) -> None:
        """Keep one message."""
        self._messages.append(data)
        self._arrived.set()

    async def next(self, timeout_s: float) -> bytes | None:
        """The oldest message; None when none arrives in `timeout_s`."""
        if not self._messages:
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return None
        return self._messages.popleft()


@dataclass(slots=True)
class Backoff:
    """How long to wait before the next attempt: doubling up to a cap, each time somewhere in its upper half, so that a
    thousand cars do not come back in the same second.
    """

    first_s: float = BACKOFF_S[0]
    longest_s: float = BACKOFF_S[1]
    tries: int = 0

    def next_s(self) -> float:
        """Seconds to wait now."""
        ceiling_s = min(self.longest_s, self.first_s * float(1 << min(self.tries, 16)))
        self.tries += 1
        return ceiling_s * (0.5 + secrets.randbelow(1_000) / 2_000)

    def reset(self) -> None:
        """It went well: start from the beginning next time."""
        self.tries = 0


def new_sref() -> str:
    """A return address where the broker does not authenticate: 16 random bytes, so nobody can guess our topic."""
    return secrets.token_hex(16)
