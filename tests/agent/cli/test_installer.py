"""`v2v charger ports`, `probe`, `watch`, as an installer types them."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys

import click
import pytest
from town import v2v

from agent.cli import installer
from agent.errors import EXIT_MISCONFIGURED, EXIT_UNREACHABLE, EXIT_USAGE
from firmware_bridge import ports as serial_ports
from firmware_bridge.ports import Holder, Port
from firmware_bridge.simulator import Simulator, SimulatorConfig

PORT = Port(
    path="/dev/serial/by-id/usb-FTDI",
    device="/dev/ttyUSB0",
    chip="FTDI FT232R",
    usb_id="0403:6001",
    serial="A1",
    driver="ftdi_sio",
    latency_ms=16,
    holders=(Holder(7, "modbusd"),),
    may_open=False,
    owner="root:dialout 0660",
    advice=("do this", "then that"),
)


def test_ports_tells_name_chip_holder_and_remedy(monkeypatch):
    """Would catch advice that is found and not shown."""
    monkeypatch.setattr(serial_ports, "list_ports", lambda: [PORT])
    said = v2v("charger", "ports")
    assert said.exit_code == 0
    for words in (
        "/dev/serial/by-id/usb-FTDI",
        "FTDI FT232R",
        "now /dev/ttyUSB0",
        "-> do this",
        "-> then that",
    ):
        assert words in said.out
    assert v2v("charger", "ports", "--json").json["ports"][0]["holders"] == [{"pid": 7, "name": "modbusd"}]
    monkeypatch.setattr(serial_ports, "list_ports", list)
    assert "Plug the adapter in" in v2v("charger", "ports").out


def test_ports_waits_for_no_library():
    """Would catch an import of web3, pymodbus or pyserial before an installer sees his ports."""
    code = (
        "import sys\nfrom agent.cli import main\nsys.argv[1:] = ['charger', 'ports']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "slow = {'web3', 'pymodbus', 'serial', 'eth_account'} & set(sys.modules)\nassert not slow, slow\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


async def test_probe_says_who_answers_and_nobody_is_exit_69():
    """Would catch a probe whose answer a script cannot read, or that succeeds with nothing found."""
    async with Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator:
        words = ("charger", "probe", simulator.wire, "--map", "simulated", "--device-id")
        said = await asyncio.to_thread(v2v, *words, "1")
        assert said.exit_code == 0
        assert said.out.startswith("unit 1 answers at 127.0.0.1:")
        assert "at most" in said.err
        found = (await asyncio.to_thread(v2v, *words, "1", "--json")).json
        assert (found["device_id"], found["fits"][0]["map"]) == (1, "simulated")
        nobody = await asyncio.to_thread(v2v, *words, "9")
        assert nobody.exit_code == EXIT_UNREACHABLE
        assert "swap them" in nobody.err


@pytest.mark.parametrize(
    ("text", "ids"), [("1,3,10-12", (1, 3, 10, 11, 12)), ("5", (5,)), ("2-2,2", (2,)), (None, None)]
)
def test_device_ids_are_numbers_and_ranges(text, ids):
    """Would catch a range that is off by one."""
    assert installer._device_ids(None, None, text) == ids


@pytest.mark.parametrize("text", ["x", "1-", "300", "-1", "", "0-255", "9-2"])
def test_device_ids_that_make_no_sense_are_refused(text):
    """Would catch a typo that searches nothing, or everything."""
    if text == "1-":
        assert installer._device_ids(None, None, text) == (1,)
        return
    with pytest.raises(click.BadParameter):
        installer._device_ids(None, None, text)


async def test_watch_goes_on_while_things_break():
    """Would catch a watch that ends at the first glitch, which is what one watches for."""
    async with Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator:
        wire = simulator.wire
        looked = (
            "charger",
            "watch",
            "--map",
            "simulated",
            "--wire",
            wire,
            "--every-s",
            "0.1",
            "--count",
            "2",
        )
        said = await asyncio.to_thread(v2v, *looked, "--json")
        looks = [json.loads(line) for line in said.out.splitlines()]
        assert [look["pilot_state"] for look in looks] == ["B", "B"]
        said = await asyncio.to_thread(v2v, *looked)
        assert said.out.count("register_mwh=1234567000") == 2
    away = await asyncio.to_thread(v2v, *looked, "--json")
    assert away.exit_code == 0
    assert all("unreachable" in json.loads(line)["error"] for line in away.out.splitlines())


def test_watch_refuses_what_can_never_work():
    """Would catch a typo that is retried for ever."""
    said = v2v("charger", "watch", "--map", "nonsense", "--wire", "tcp://127.0.0.1:1", "--count", "1")
    assert said.exit_code == EXIT_MISCONFIGURED


def test_a_wire_is_needed():
    """Would catch a probe of nothing."""
    assert v2v("charger", "probe").exit_code == EXIT_USAGE
