"""Several ways to one provider at once: what one of them cannot carry, another does (PROTOCOL section 6: both doors, one state).

Rules
* Every message goes out on every way and whatever comes back from any of them is heard. The protocol allows it: repeats are
  answered again, receipts are cumulative, and everything that matters is signed.
* One way that stands is enough, to begin with and at any time later. A way that is away is tried again by itself, and never
  makes another one wait: each has its own task, and only the newest message of each kind waits for it.

May not know: what messages mean, which transports there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import NoReturn, Self

from agent.consumer.carrier import Backoff, Carrier, Inbox, Kind
from agent.core.units import Address
from agent.errors import AgentError, Misconfigured, Transient

LISTEN_S = 60.0  # only how often a quiet way is asked again


class BothCarrier:
    """A carrier made of others. `ways` make them: one that failed to open is not opened again, a new one is."""

    def __init__(self, ways: Sequence[Callable[[], Carrier]]) -> None:
        self._inbox = Inbox()
        self._ways = [_Way(make, self._inbox) for make in ways]
        self._tasks: list[asyncio.Task[NoReturn]] = []

    @property
    def trouble(self) -> str:
        """Empty while one way is well; else what is wrong with each."""
        troubles = [way.trouble for way in self._ways]
        return "" if "" in troubles else "; ".join(troubles)

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(way.run(), name="consumer-way") for way in self._ways]
        tried = [asyncio.create_task(way.tried.wait()) for way in self._ways]
        waiting = set(tried)
        while waiting and not any(way.is_open for way in self._ways):
            _, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for one in tried:
            one.cancel()
        if not any(way.is_open for way in self._ways):
            await self.__aexit__()
            problems = [way.problem for way in self._ways if way.problem is not None]
            raise next((one for one in problems if isinstance(one, Misconfigured)), problems[0])
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def meet(self, provider: Address) -> None:
        """Listen to this provider on every way, now and when a way comes back."""
        for way in self._ways:
            way.meet(provider)

    async def ask_hello(self) -> None:
        """Ask on every way."""
        for way in self._ways:
            way.ask_hello()

    async def post(self, kind: Kind, data: bytes) -> None:
        """Send on every way, as soon as each is free."""
        for way in self._ways:
            way.post(kind, data)

    async def next(self, timeout_s: float) -> bytes | None:
        """The next message from any way."""
        return await self._inbox.next(timeout_s)


class _Way:
    """One carrier, kept open, and what waits to go out on it."""

    def __init__(self, make: Callable[[], Carrier], inbox: Inbox) -> None:
        self._make, self._inbox = make, inbox
        self._provider: Address | None = None
        self._wants_meeting = self._wants_hello = False
        self._posts: dict[Kind, bytes] = {}
        self._work = asyncio.Event()
        self._carrier: Carrier | None = None
        self.tried = asyncio.Event()
        self.problem: AgentError | None = None

    @property
    def is_open(self) -> bool:
        """True while its carrier is entered."""
        return self._carrier is not None

    @property
    def trouble(self) -> str:
        """What is wrong with it just now; empty while all is well."""
        if self._carrier is not None:
            return self._carrier.trouble
        return "not tried yet" if self.problem is None else self.problem.message

    def meet(self, provider: Address) -> None:
        """To be done when it is free."""
        self._provider, self._wants_meeting = provider, True
        self._work.set()

    def ask_hello(self) -> None:
        """To be done when it is free."""
        self._wants_hello = True
        self._work.set()

    def post(self, kind: Kind, data: bytes) -> None:
        """To be sent when it is free, unless a newer one of its kind comes before."""
        self._posts[kind] = data
        self._work.set()

    async def run(self) -> NoReturn:
        """For ever: open it, use it, and when it breaks open it again."""
        backoff = Backoff()
        while True:
            try:
                async with self._make() as carrier:
                    self._carrier, self.problem = carrier, None
                    self._wants_meeting = self._provider is not None
                    backoff.reset()
                    self.tried.set()
                    await self._use(carrier)
            except (Transient, Misconfigured) as problem:  # of one way; the others go on
                self.problem = problem
            finally:
                self._carrier = None
                self.tried.set()
            await asyncio.sleep(backoff.next_s())

    async def _use(self, carrier: Carrier) -> None:
        both = [asyncio.create_task(self._hear(carrier)), asyncio.create_task(self._say(carrier))]
        try:
            done, _ = await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in both:
                task.cancel()
            await asyncio.gather(*both, return_exceptions=True)

    async def _hear(self, carrier: Carrier) -> NoReturn:
        while True:
            data = await carrier.next(LISTEN_S)
            if data is not None:
                self._inbox.put(data)

    async def _say(self, carrier: Carrier) -> NoReturn:
        self._work.set()
        while True:
            await self._work.wait()
            self._work.clear()
            if self._wants_meeting and self._provider is not None:
                self._wants_meeting = False
                await carrier.meet(self._provider)
            if self._wants_hello:
                self._wants_hello = False
                await carrier.ask_hello()
            posts, self._posts = self._posts, {}
            for kind, data in posts.items():
                await carrier.post(kind, data)
