"""`v2v provider make-safe`: every charger of the file is stopped and seen open, in time, whatever else is broken."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
from plug import eventually

from agent.cli import make_safe
from agent.errors import EXIT_DONE, EXIT_UNREACHABLE, Misconfigured, Refused, Transient
from firmware_bridge.charger import BridgeError
from firmware_bridge.mapped_charger import ChargerConfig, open_charger
from firmware_bridge.simulator import PlantConfig, Simulator, SimulatorConfig
from firmware_bridge.simulator.rapi import RapiSimulator, RapiSimulatorConfig, single_phase

NOWHERE = "tcp://127.0.0.1:1"
QUICK = PlantConfig(ev_lag_ms=200)
# [chain], [keys] and [journal] are not there, and [mqtt] is wrong: none of them may matter.
BROKEN_ELSEWHERE = '[mqtt]\nurll = "typo"\n'
PORT = '[[ports]]\nname = "{}"\nmap = "{}"\nwire = "{}"\ncurrent_ma_max = 32000\nphase_count = 3\n'


@pytest.fixture
def impatient(monkeypatch):
    """The same steps in less time, for stories that use it up."""
    monkeypatch.setattr(make_safe, "SECONDS_MAX", 2.5)
    monkeypatch.setattr(make_safe, "LOCK_AFTER_S", 1.0)


def settings(folder, *wires, device_map="simulated"):
    """A settings file with a port for each wire, and with mistakes everywhere else."""
    file = folder / "agent.toml"
    ports = (PORT.format(f"p{number}", device_map, wire) for number, wire in enumerate(wires))
    file.write_text(BROKEN_ELSEWHERE + "".join(ports))
    return file


def typed(file):
    """The command in a process of its own, as systemd runs it."""
    words = [sys.executable, "-m", "agent", "provider", "make-safe", "--config", file]
    return subprocess.run(words, capture_output=True, text=True, timeout=40, check=False)


def left_on(simulator):
    """What a dead agent leaves behind: power is offered, and no failsafe is armed, so only we can stop it."""
    plant = simulator.now()
    plant.set_limit(32_000, plant.now_ms)
    plant.enable(True, plant.now_ms)  # noqa: FBT003


@contextlib.asynccontextmanager
async def delivering(plant=QUICK, **where):
    """A charger that delivers, and whose master is dead."""
    async with Simulator(SimulatorConfig(plant=plant, **(where or {"tcp": "127.0.0.1:0"}))) as simulator:
        left_on(simulator)
        await eventually(lambda: simulator.truth().power_w > 10_000)
        yield simulator


async def test_chargers_that_were_left_delivering_are_seen_open(tmp_path):
    """Would catch a port that is forgotten, and a command that needs journal, chain, keys or a file without mistakes."""
    async with delivering() as left, delivering(pty=str(tmp_path / "tty")) as right:
        done = await asyncio.to_thread(typed, settings(tmp_path, left.wire, right.wire))
        assert (done.returncode, done.stderr) == (EXIT_DONE, "")
        assert done.stdout == "p0: open\np1: open\n"
        for simulator in (left, right):
            truth = simulator.truth()
            assert (truth.power_w, truth.energised, truth.enabled, truth.offered_ma) == (0, False, False, 0)
            assert not truth.locked  # it obeyed


async def test_what_is_not_seen_open_is_cut_off_once(tmp_path, impatient):
    """Would catch a welded contactor whose named cut-off is never tried, or tried again and again."""
    async with delivering(replace(QUICK, contactor_stuck=True)) as simulator:
        cut = tmp_path / "cut"
        opened = [sys.executable, "-c", f"open({str(cut)!r}, 'a').write('x')"]
        file = settings(tmp_path, simulator.wire)
        file.write_text(file.read_text() + f'external_cut_off = "K1"\ncut_off_command = {opened}\n')
        with pytest.raises(Refused, match="not seen open"):
            await make_safe.make_all_safe(file, {})
        assert cut.read_text() == "x"


async def test_an_openevse_that_began_by_itself_is_stopped_too(tmp_path):
    """Would catch a serial charger that only the Modbus driver is asked to stop; this one charges by itself after a power cut."""
    async with RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"), plant=single_phase(QUICK))) as box:
        await eventually(lambda: box.truth().power_w > 1_000)
        done = await asyncio.to_thread(typed, settings(tmp_path, box.wire, device_map="openevse_rapi"))
        assert (done.returncode, done.stdout) == (EXIT_DONE, "p0: open\n")
        assert (box.truth().energised, box.truth().enabled) == (False, False)


async def test_one_that_is_away_keeps_nobody_else_waiting_or_unsafe(tmp_path, impatient, capsys):
    """Would catch ports that are stopped one after the other, an absent one that is called safe, and waiting for ever."""
    async with delivering() as there:
        file = settings(tmp_path, NOWHERE, there.wire, NOWHERE.replace(":1", ":2"))
        asked = asyncio.create_task(make_safe.make_all_safe(file, {}))
        await eventually(lambda: not there.truth().energised)
        assert not asked.done()  # the others are still being tried
        with pytest.raises(Transient, match=r"p0: .*p2: .*\n.*failsafe") as told:
            async with asyncio.timeout(make_safe.SECONDS_MAX + 1):
                await asked
    assert told.value.exit_code == EXIT_UNREACHABLE
    assert capsys.readouterr().out == "p0: NOT seen open\np1: open\np2: NOT seen open\n"


async def test_a_library_that_swallows_the_time_out_does_not_make_it_endless(
    tmp_path, impatient, monkeypatch
):
    """Would catch a stop that systemd must kill: on Python 3.11 asyncio.wait_for can turn a cancellation into a failure."""

    async def deaf(*_):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            raise BridgeError("unreachable", "swallowed") from None

    monkeypatch.setattr(make_safe, "open_to_stop", deaf)
    asked = asyncio.create_task(make_safe.make_all_safe(settings(tmp_path, NOWHERE), {}))
    await asyncio.wait({asked}, timeout=make_safe.SECONDS_MAX + 2)
    assert asked.done()
    assert isinstance(asked.exception(), Transient)


def test_it_ends_within_ten_seconds():
    """Would catch a patience that keeps systemd from starting the agent again."""
    assert make_safe.LOCK_AFTER_S + 3 < make_safe.SECONDS_MAX  # a lock still has time to be seen
    assert make_safe.SECONDS_MAX + 1 <= 10


async def test_a_car_that_goes_on_drawing_is_locked_out(tmp_path, impatient):
    """Would catch a stop that is only asked for: a car that ignores the pilot is cut off by the box, firmly."""
    async with delivering() as simulator:
        simulator.plant.config = replace(QUICK, ev_lag_ms=30_000, force_open_ms=60_000)
        await make_safe.make_all_safe(settings(tmp_path, simulator.wire), {})
        assert simulator.truth().locked
        assert simulator.truth().power_w == 0


async def test_a_contactor_that_sticks_is_said_loudly(tmp_path, impatient, capsys):
    """Would catch a welded contactor called open because the commands were acknowledged, or hidden behind an absent port."""
    async with delivering(replace(QUICK, contactor_stuck=True)) as simulator:
        with pytest.raises(Refused, match="breaker") as told:
            await make_safe.make_all_safe(settings(tmp_path, NOWHERE, simulator.wire), {})
        assert told.value.reason == "not_seen_open"
        assert simulator.truth().locked
    assert capsys.readouterr().out == "p0: NOT seen open\np1: NOT seen open\n"


async def test_a_meter_that_is_away_does_not_keep_it_from_stopping(tmp_path):
    """Would catch a stop that first wants to read: the wire of the meter may be why the agent died."""
    meter = f'[ports.meter]\nmap = "eastron_sdm630_sdm72v2"\nwire = "{NOWHERE}"\n'
    async with delivering() as simulator:
        file = settings(tmp_path, simulator.wire)
        file.write_text(file.read_text() + meter)
        await make_safe.make_all_safe(file, {})
        assert not simulator.truth().energised


async def test_a_wire_that_is_still_held_is_waited_for(tmp_path):
    """Would catch a single try: the killed agent's process may hold the serial port for a moment longer."""
    async with delivering(pty=str(tmp_path / "tty")) as simulator:
        holder = await open_charger(ChargerConfig(map="simulated", wire=simulator.wire))
        asked = asyncio.create_task(make_safe.make_all_safe(settings(tmp_path, simulator.wire), {}))
        await asyncio.wait({asked}, timeout=1)
        assert not asked.done()
        assert simulator.truth().energised
        await holder.close()
        await asked
        assert not simulator.truth().energised


async def test_a_box_that_comes_back_within_the_time_is_stopped(tmp_path):
    """Would catch giving up at the first refused connection: a charger that restarts may keep its set points."""
    async with delivering() as simulator:
        where = simulator.wire.removeprefix("tcp://")
    asked = asyncio.create_task(make_safe.make_all_safe(settings(tmp_path, f"tcp://{where}"), {}))
    await asyncio.wait({asked}, timeout=1)
    assert not asked.done()
    async with Simulator(SimulatorConfig(plant=QUICK, tcp=where)) as simulator:
        left_on(simulator)
        await asked
        assert not simulator.truth().enabled


async def test_a_wire_on_which_nobody_answers_is_away(tmp_path, impatient):
    """Would catch a box that accepts the connection and then says nothing, taken for open or for a bug."""
    with socket.create_server(("127.0.0.1", 0)) as mute:  # the kernel accepts; nobody ever reads
        wire = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(Transient, match="did not answer"):
            await make_safe.make_all_safe(settings(tmp_path, wire), {})


@pytest.mark.parametrize(
    ("device_map", "wire", "told"),
    [
        ("simulatd", NOWHERE, "did you mean 'simulated'"),
        ("eastron_sdm630_sdm72v2", NOWHERE, "is a meter"),
        ("simulated", "modbus://x", "wire"),
    ],
)
async def test_a_port_that_names_no_charger_is_for_a_human(tmp_path, device_map, wire, told):
    """Would catch ten seconds of trying what can never work, or a success that stopped nothing."""
    async with asyncio.timeout(make_safe.SECONDS_MAX / 2):
        with pytest.raises(Misconfigured, match=told):
            await make_safe.make_all_safe(settings(tmp_path, wire, device_map=device_map), {})


def test_it_does_not_wait_for_libraries_that_it_does_not_need():
    """Would catch seconds of import on a small computer, while power flows that nobody masters."""
    probe = (
        "import sys, agent.cli.provider, agent.cli.make_safe\n"
        "slow = {'web3', 'eth_account', 'eth_abi', 'websockets', 'aiohttp', 'agent.journal', 'agent.keys'}\n"
        "print(slow & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
