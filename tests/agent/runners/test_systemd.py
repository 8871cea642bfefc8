"""Stories of the service manager: READY, STATUS, WATCHDOG and STOPPING are earned, and a terminal needs none of them."""

import asyncio
import contextlib
import os
import socket
from dataclasses import replace

import pytest
from plug import Plug, eventually

from agent.runners import systemd
from agent.runners.systemd import SystemdRunner

AWHILE_MS = systemd.BEAT_AGE_MS_MAX + 1


@pytest.fixture
def plug(tmp_path):
    """A provider with time in our hands."""
    clock = {"ms": 1_000_000}
    plug = Plug(tmp_path, monotonic_ms=lambda: clock["ms"])
    plug.clock = clock
    yield plug
    plug.close()


class Manager:
    """Plays systemd's side of the socket."""

    def __init__(self, address):
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(address)
        self._socket.settimeout(0)
        self.lines = []

    def hear(self):
        """Everything said so far."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.lines += self._socket.recv(4096).decode().split("\n")
        return self.lines

    def close(self):
        """Stop listening."""
        self._socket.close()


@pytest.fixture
def manager(tmp_path):
    """A service manager that listens on a path."""
    manager = Manager(str(tmp_path / "notify"))
    manager.path = str(tmp_path / "notify")
    yield manager
    manager.close()


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """A beat that a test need not wait a second for."""
    monkeypatch.setattr(systemd, "BEAT_S", 0.01)


@contextlib.asynccontextmanager
async def notifying(plug, beats, **environ):
    """The runner in this environment; `beats` are the chargers', in our hands."""
    runner = SystemdRunner(plug.engine, lambda: beats, plug.monotonic_ms, environ)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def watched(manager, **more):
    """What systemd puts into our environment."""
    return {
        "NOTIFY_SOCKET": manager.path,
        "WATCHDOG_USEC": "20000000",
        "WATCHDOG_PID": str(os.getpid()),
        **more,
    }


async def test_ready_status_and_watchdog_while_everything_beats(plug, manager):
    """Would catch a unit that never becomes active, is restarted while healthy, or shows an old status."""
    beats = {"left": plug.clock["ms"]}
    async with notifying(plug, beats, **watched(manager)):
        await eventually(lambda: manager.hear().count("WATCHDOG=1") >= 3)
        assert manager.lines[:2] == ["READY=1", "WATCHDOG=1"]
        assert manager.lines[2] == "STATUS=left: idle (charger_silent); no view of the chain"
        plug.delivering()
        await eventually(
            lambda: "STATUS=left: DELIVERING 12 of 1000 Wh, 0 Wh signed for, 11000 W" in manager.hear()
        )
        assert manager.lines.count("READY=1") == 1
    assert manager.hear()[-1] == "STOPPING=1"


@pytest.mark.parametrize("stuck", ["charger", "engine"])
async def test_watchdog_is_not_fed_while_something_hangs(plug, manager, stuck):
    """Would catch a watchdog fed by a task of its own while the loop that drives the charger is stuck."""
    beats = {"left": plug.clock["ms"], "right": plug.clock["ms"]}
    async with notifying(plug, beats, **watched(manager)) as runner:
        await eventually(lambda: "WATCHDOG=1" in manager.hear())
        plug.clock["ms"] += AWHILE_MS
        if stuck == "engine":
            beats["left"] = beats["right"] = plug.clock["ms"]
        else:
            plug.header()  # the engine beats, and one of the two chargers
            beats["left"] = plug.clock["ms"]
        assert not runner.is_alive()
        # The status changes with the next look, so this line proves that looks went on without a ping.
        manager.hear()
        manager.lines.clear()
        plug.engine.book = replace(plug.engine.book, locked_ports={"left": "a test"})
        await eventually(lambda: any(line.startswith("STATUS=left: idle (locked") for line in manager.hear()))
        assert "WATCHDOG=1" not in manager.lines
        plug.header()
        beats["left"] = beats["right"] = plug.clock["ms"]
        await eventually(lambda: "WATCHDOG=1" in manager.hear())


async def test_not_ready_before_the_charger_has_beaten(plug, manager):
    """Would catch READY before the charger was made safe: units that wait for us would believe it."""
    beats = {"left": plug.clock["ms"] - AWHILE_MS}
    async with notifying(plug, beats, **watched(manager)):
        await eventually(lambda: any(line.startswith("STATUS=") for line in manager.hear()))
        assert "READY=1" not in manager.lines
        beats["left"] = plug.clock["ms"]
        await eventually(lambda: "READY=1" in manager.hear())


async def test_somebody_elses_watchdog_is_not_fed(plug, manager):
    """Would catch a child process that keeps its hanging parent alive."""
    async with notifying(plug, {"left": plug.clock["ms"]}, **watched(manager, WATCHDOG_PID="1")):
        await eventually(lambda: "READY=1" in manager.hear())
        plug.header()
        plug.read()
        await eventually(lambda: "STATUS=left: idle" in manager.hear())
    assert "WATCHDOG=1" not in manager.hear()


async def test_abstract_socket_is_spoken_to(plug):
    """Would catch a container whose manager listens on @name, where a path would be created or missed."""
    manager = Manager(f"\0v2v-test-{os.getpid()}")
    try:
        async with notifying(plug, {}, NOTIFY_SOCKET=f"@v2v-test-{os.getpid()}"):
            await eventually(lambda: "READY=1" in manager.hear())
    finally:
        manager.close()


async def test_terminal_has_no_service_manager(plug):
    """Would catch a daemon that cannot be started by hand."""
    await asyncio.wait_for(SystemdRunner(plug.engine, dict, plug.monotonic_ms, {}).run(), 5)


async def test_manager_that_is_gone_or_full_does_not_stop_us(plug, tmp_path):
    """Would catch a session ended because a notification could not be delivered."""
    looks = 0

    def beats():
        nonlocal looks
        looks += 1
        return {}

    runner = SystemdRunner(plug.engine, beats, plug.monotonic_ms, {"NOTIFY_SOCKET": str(tmp_path / "nobody")})
    task = asyncio.create_task(runner.run())
    await eventually(lambda: looks >= 3)
    full = Manager(str(tmp_path / "nobody"))  # listens and never reads: its queue fills up
    await eventually(lambda: looks >= 50)
    assert not task.done()
    task.cancel()
    full.close()
