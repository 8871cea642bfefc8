"""Tells systemd the truth: READY when everything beats, STATUS in words, WATCHDOG only while engine and chargers are alive.

Rules
* The ping is earned, never free-running: it is sent only if the engine's beat and every charger's beat are recent. A loop
  that hangs stops the pings; systemd then ends us, and the charger's own failsafe has long opened the contactor.
* Without $NOTIFY_SOCKET (a terminal, a container) all of this is nothing.

May not know: why something does not beat. sd_notify is one datagram; a library for that would be longer than this file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Mapping

from agent import views
from agent.engine import Engine

BEAT_S = 1.0  # how often we look; systemd recommends pinging at half of WatchdogSec, and ours is 20 s
BEAT_AGE_MS_MAX = (
    5_000  # the engine beats at 4 Hz, a charger at 1 Hz or faster: this late is not busy but stuck
)
STATUS_LENGTH_MAX = 512  # a line for humans; a datagram has its limits


class SystemdRunner:
    """Speaks to the service manager that started us, if there is one.

    `charger_beats_at_ms` gives, for each port, when its control loop last completed a turn (monotonic ms, the engine's
    clock). A wire that is down but handled counts as a turn: restarting us would not plug the cable in again.
    """

    def __init__(
        self,
        engine: Engine,
        charger_beats_at_ms: Callable[[], Mapping[str, int]],
        monotonic_ms: Callable[[], int],
        environ: Mapping[str, str],
    ) -> None:
        self._engine, self._charger_beats_at_ms, self._monotonic_ms = (
            engine,
            charger_beats_at_ms,
            monotonic_ms,
        )
        self._path = environ.get("NOTIFY_SOCKET", "")
        # WATCHDOG_PID names the process that must ping; somebody else's watchdog is not ours to feed.
        ours = environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        watchdog_us = environ.get("WATCHDOG_USEC", "")
        self._watched = ours and watchdog_us.isdecimal() and int(watchdog_us) > 0
        self._beat_s = min(BEAT_S, int(watchdog_us) / 2_000_000) if self._watched else BEAT_S
        self._ready = False
        self._status = ""

    async def run(self) -> None:
        """Until cancelled; then says STOPPING. Returns at once where no service manager listens."""
        if not self._path:
            return
        try:
            while True:
                self._notify(self._news())
                await asyncio.sleep(self._beat_s)
        finally:
            self._notify(["STOPPING=1"])

    def is_alive(self) -> bool:
        """Whether engine and every charging port have beaten recently."""
        beats_at_ms = [self._engine.beat_at_ms, *self._charger_beats_at_ms().values()]
        return self._monotonic_ms() - min(beats_at_ms) <= BEAT_AGE_MS_MAX

    def _news(self) -> list[str]:
        news: list[str] = []
        alive = self.is_alive()
        if alive and not self._ready:
            self._ready = True
            news.append("READY=1")
        if alive and self._watched:
            news.append("WATCHDOG=1")
        status = views.status_line(self._engine.book, self._engine.live)[:STATUS_LENGTH_MAX].replace(
            "\n", " "
        )
        if status != self._status:
            self._status = status
            news.append(f"STATUS={status}")
        return news

    def _notify(self, news: list[str]) -> None:
        """sd_notify(3). A datagram that cannot be delivered is lost; if that lasts, the watchdog does what it is for."""
        if not news:
            return
        address = f"\0{self._path[1:]}" if self._path.startswith("@") else self._path  # abstract socket
        kind = socket.SOCK_DGRAM | socket.SOCK_NONBLOCK  # a full queue may not stop the event loop
        with socket.socket(socket.AF_UNIX, kind) as sock, contextlib.suppress(OSError):
            sock.sendto("\n".join(news).encode(), address)
