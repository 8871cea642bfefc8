"""Serial ports, told from a computer that the test builds: folders as the kernel makes them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from firmware_bridge.ports import Machine, list_ports, why_closed


class Computer:
    """A folder that looks like /sys, /dev and /proc."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.machine = Machine(root / "sys/class/tty", root / "dev", root / "proc")
        for folder in (self.machine.sys_tty, self.machine.dev / "serial/by-id", self.machine.proc):
            folder.mkdir(parents=True)

    def adapter(self, name, *, driver="ftdi_sio", serial="A1B2", latency="16", by_id=True):
        """A USB adapter with one port."""
        usb = self.root / "sys/devices/pci0/usb1/1-1"
        facts = {"idVendor": "0403", "idProduct": "6001", "manufacturer": "FTDI", "product": "FT232R"}
        self.write(usb, **facts, **({"serial": serial} if serial else {}))
        port = usb / "1-1:1.0" / name
        self.write(port, **({"latency_timer": latency} if latency else {}))
        (self.root / "sys/bus/drivers" / driver).mkdir(parents=True, exist_ok=True)
        (port / "driver").symlink_to(self.root / "sys/bus/drivers" / driver)
        (self.machine.sys_tty / name).mkdir()
        (self.machine.sys_tty / name / "device").symlink_to(port)
        (self.machine.dev / name).touch()
        if by_id:
            link = self.machine.dev / "serial/by-id/usb-FTDI_FT232R_A1B2-if00-port0"
            link.symlink_to(f"../../{name}")

    @staticmethod
    def write(folder, **files):
        """Small files of the kernel's."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name).write_text(f"{text}\n")

    def uart(self, name, kind):
        """A UART the kernel has a name for; type 0: no hardware behind it."""
        self.write(self.machine.sys_tty / name, type=kind)
        (self.machine.dev / name).touch()

    def process(self, pid, name, *opened):
        """A running program and its open files."""
        self.write(self.machine.proc / str(pid), comm=name)
        fds = self.machine.proc / str(pid) / "fd"
        fds.mkdir()
        for number, path in enumerate(opened):
            (fds / str(number)).symlink_to(path)

    def ports(self):
        """What `list_ports` finds."""
        return list_ports(self.machine)


@pytest.fixture
def computer(tmp_path):
    """One of those."""
    return Computer(tmp_path)


def test_an_adapter_is_told_by_its_lasting_name_chip_and_driver(computer):
    """Would catch an installer who writes ttyUSB0 into the settings, and meets ttyUSB1 after a glitch."""
    computer.adapter("ttyUSB0")
    (port,) = computer.ports()
    assert port.path.endswith("/serial/by-id/usb-FTDI_FT232R_A1B2-if00-port0")
    assert (port.chip, port.usb_id, port.serial, port.driver) == (
        "FTDI FT232R",
        "0403:6001",
        "A1B2",
        "ftdi_sio",
    )
    assert port.latency_ms == 16
    assert any("latency timer is 16 ms" in line for line in port.advice)


def test_a_good_port_needs_no_advice(computer):
    """Would catch advice that is always there, which nobody reads."""
    computer.adapter("ttyUSB0", latency="1")
    (port,) = computer.ports()
    assert port.may_open
    assert port.advice == ()


def test_whoever_holds_it_is_named(computer):
    """Would catch two masters on one bus that nobody finds."""
    computer.adapter("ttyUSB0", latency="1")
    computer.process(4711, "modbusd", computer.machine.dev / "ttyUSB0", "/dev/null")
    computer.process(4712, "bash", "/dev/null")
    (port,) = computer.ports()
    assert [(holder.pid, holder.name) for holder in port.holders] == [(4711, "modbusd")]
    assert any("held by modbusd (pid 4711)" in line for line in port.advice)


def test_a_missing_permission_has_its_remedy(computer, monkeypatch):
    """Would catch "permission denied" without the group that owns the port."""
    computer.adapter("ttyUSB0", latency="1")
    monkeypatch.setattr(os, "access", lambda *_: False)
    (port,) = computer.ports()
    assert not port.may_open
    assert any("usermod -aG" in line or "udev" in line for line in port.advice)


def test_an_adapter_without_a_number_of_its_own_is_pointed_out(computer):
    """Would catch two equal adapters that change places at the next start."""
    computer.adapter("ttyUSB0", driver="ch341-uart", serial="", latency="", by_id=False)
    (port,) = computer.ports()
    assert port.path.endswith("/dev/ttyUSB0")
    assert any("never plug two" in line for line in port.advice)


def test_only_what_can_have_a_charger_is_listed(computer):
    """Would catch a list full of consoles and of UARTs that are not there."""
    computer.uart("ttyS0", "4")
    computer.uart("ttyS1", "0")
    computer.uart("tty1", "4")
    assert [Path(port.device).name for port in computer.ports()] == ["ttyS0"]
    assert list_ports(Machine(Path("/nowhere"), Path("/nowhere"), Path("/nowhere"))) == []


def test_this_computer_can_be_asked():
    """Would catch a listing that fails on a real /sys, whatever is plugged in here."""
    assert isinstance(list_ports(), list)


def test_why_a_port_does_not_open_is_said(tmp_path, monkeypatch):
    """Would catch an error number where a sentence belongs."""
    assert why_closed(str(tmp_path / "gone")).name == "port_missing"
    plain = tmp_path / "plain"
    plain.touch()
    refused = why_closed(str(plain), ValueError("parity"))
    assert refused.name == "port_refused"
    assert "parity" in str(refused)
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert why_closed(str(plain)).name == "port_denied"


def test_whoever_holds_a_real_port_is_named(tmp_path):
    """Would catch "another program holds it" when the system could say which."""
    port = tmp_path / "port"
    port.touch()
    code = f"import fcntl, time; f = open({str(port)!r}, 'r+'); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); time.sleep(60)"
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    try:
        holder.stdout.readline()
        locked = why_closed(str(port))
        assert locked.name == "port_locked"
        assert f"pid {holder.pid}" in str(locked)
    finally:
        holder.kill()
        holder.communicate()
