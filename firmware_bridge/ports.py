"""Serial ports of this computer: what is plugged in, its driver, who holds it, and what to do when it cannot be opened.

Rules
* Asks the system (`/sys`, `/dev`, `/proc`) and never opens a port to find out, except to say why an opening failed.
* Standard library only: `v2v charger ports` must answer at once on a small computer.
* The folders are arguments, so that a test can build a computer.

May not know: Modbus, RAPI, device maps, the agent.
"""

from __future__ import annotations

import errno
import fcntl
import grp
import os
import pwd
import re
from dataclasses import dataclass, replace
from pathlib import Path

from firmware_bridge.charger import BridgeError

# Which ttys can have a charger at their end; the rest are consoles, ptys and this computer's unused UARTs.
_NAMES = re.compile(r"tty(USB|ACM|AMA|SC|AP|XRUSB|CH341USB|CH343USB)\d+")
_UART = re.compile(r"ttyS\d+")
LATENCY_MS_GOOD = 1  # FTDI's default is 16 ms of waiting for more bytes, on every reply
_PROCESSES_MAX = 10_000  # a computer with more is not a vehicle's; the list is for a person


@dataclass(frozen=True, slots=True)
class Machine:
    """Where the system says what there is."""

    sys_tty: Path = Path("/sys/class/tty")
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")


@dataclass(frozen=True, slots=True)
class Holder:
    """A process that has the port open. `name` is what `ps` shows."""

    pid: int
    name: str


@dataclass(frozen=True, slots=True)
class Port:
    """One serial port. `path` is the name that survives re-plugging, where there is one; `device` the one that may change."""

    path: str
    device: str
    chip: str  # maker and product of the USB adapter; "" for a UART of this computer
    usb_id: str  # "0403:6001"
    serial: str
    driver: str
    latency_ms: int | None  # FTDI's latency timer
    holders: tuple[Holder, ...]
    may_open: bool
    owner: str  # "root:dialout 0660"
    advice: tuple[str, ...]  # what a person should change, in sentences


def list_ports(machine: Machine | None = None) -> list[Port]:
    """Every serial port that could have a charger at its end, sorted by name."""
    machine = machine or Machine()
    if not machine.sys_tty.is_dir():
        return []
    names = sorted(entry.name for entry in machine.sys_tty.iterdir() if _is_wanted(entry))
    stable = _stable_names(machine.dev / "serial")
    holding = _holders(machine.proc, {str(machine.dev / name) for name in names})
    return [_port(machine, name, stable, holding) for name in names]


def _is_wanted(entry: Path) -> bool:
    if _NAMES.fullmatch(entry.name):
        return True
    # A UART that the kernel knows by name only has type 0: there is no hardware behind it.
    return bool(_UART.fullmatch(entry.name)) and _text(entry / "type") not in ("", "0")


def _stable_names(folder: Path) -> dict[str, str]:
    """Device name -> its /dev/serial/by-id name, else by-path (clones of CH340 all have the same id)."""
    names: dict[str, str] = {}
    for kind in ("by-id", "by-path"):
        links = sorted((folder / kind).iterdir()) if (folder / kind).is_dir() else []
        for link in links:
            names.setdefault(link.resolve().name, str(link))
    return names


def _port(
    machine: Machine, name: str, stable: dict[str, str], holding: dict[str, tuple[Holder, ...]]
) -> Port:
    node = machine.sys_tty / name
    device = machine.dev / name
    usb = _usb_folder(node)
    latency = _text(node / "device" / "latency_timer")
    made = (
        " ".join(word for word in (_text(usb / "manufacturer"), _text(usb / "product")) if word)
        if usb
        else ""
    )
    may_open = os.access(device, os.R_OK | os.W_OK)
    found = Port(
        path=stable.get(name, str(device)),
        device=str(device),
        chip=made,
        usb_id=f"{_text(usb / 'idVendor')}:{_text(usb / 'idProduct')}" if usb else "",
        serial=_text(usb / "serial") if usb else "",
        driver=_link_name(node / "device" / "driver"),
        latency_ms=int(latency) if latency.isdigit() else None,
        holders=holding.get(str(device), ()),
        may_open=may_open,
        owner=_owner(device),
        advice=(),
    )
    return _advised(found)


def _advised(port: Port) -> Port:
    advice: list[str] = []
    if not port.may_open:
        advice.append(_permission_remedy(port.owner))
    if port.holders:
        who = ", ".join(f"{holder.name} (pid {holder.pid})" for holder in port.holders)
        advice.append(f"held by {who}: one master per bus; stop it first")
    if port.latency_ms is not None and port.latency_ms > LATENCY_MS_GOOD:
        name = Path(port.device).name
        advice.append(
            f"its latency timer is {port.latency_ms} ms: echo 1 | sudo tee /sys/bus/usb-serial/devices/{name}/latency_timer "
            "(config/udev/60-v2v-agent.rules does it for good)"
        )
    if port.chip and "/by-id/" not in port.path:
        advice.append("it has no name of its own; never plug two of this kind into one computer")
    return replace(port, advice=tuple(advice))


def _permission_remedy(owner: str) -> str:
    group = owner.partition(":")[2].partition(" ")[0]
    if not group:
        return "the device is not there"
    if group == "root":
        return "only root may open it: install config/udev/60-v2v-agent.rules, then plug it in again"
    return f"no permission: sudo usermod -aG {group} $USER, then log in again"


def _usb_folder(node: Path) -> Path | None:
    """The USB device above this tty: the nearest folder that knows its vendor."""
    here = (node / "device").resolve()
    for folder in (here, *here.parents):
        if (folder / "idVendor").is_file():
            return folder
        if folder.name in ("devices", "sys"):
            break
    return None


def _holders(proc: Path, devices: set[str]) -> dict[str, tuple[Holder, ...]]:
    """Who has which device open, as far as this user may see it (root sees everybody)."""
    found: dict[str, list[Holder]] = {}
    try:
        processes = [entry for entry in proc.iterdir() if entry.name.isdigit()][:_PROCESSES_MAX]
    except OSError:
        return {}
    for process in processes:
        try:
            opened = {str(fd.readlink()) for fd in (process / "fd").iterdir()}
        except OSError:
            continue  # somebody else's, or gone meanwhile
        for device in opened & devices:
            found.setdefault(device, []).append(Holder(int(process.name), _text(process / "comm") or "?"))
    return {device: tuple(holders) for device, holders in found.items()}


def _owner(device: Path) -> str:
    try:
        status = device.stat()
    except OSError:
        return ""
    try:
        user = pwd.getpwuid(status.st_uid).pw_name
        group = grp.getgrgid(status.st_gid).gr_name
    except KeyError:
        user, group = str(status.st_uid), str(status.st_gid)
    return f"{user}:{group} {status.st_mode & 0o777:04o}"


def _text(path: Path) -> str:
    """The first line of a small file of the kernel's; "" when it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()[:200]
    except OSError:
        return ""


def _link_name(path: Path) -> str:
    try:
        return path.readlink().name
    except OSError:
        return ""


def why_closed(path: str, error: BaseException | None = None, *, proc: Path = Path("/proc")) -> BridgeError:
    """Ask the system why a port could not be opened, so that the message says what to do.

    `port_missing`, `port_denied`, `port_locked` (naming the holder), `port_refused` or `unreachable`.
    """
    real = Path(path).resolve()
    if not real.exists():
        return BridgeError(
            "port_missing", f"{path} does not exist; plug the adapter in, then see: v2v charger ports"
        )
    if not os.access(real, os.R_OK | os.W_OK):
        return BridgeError("port_denied", f"{path}: {_permission_remedy(_owner(real))}")
    try:
        port = os.open(real, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError as exc:
        return BridgeError("unreachable", f"{path} cannot be opened: {exc.strerror}")
    try:
        fcntl.flock(port, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as exc:
        if exc.errno in (errno.EWOULDBLOCK, errno.EACCES):
            holders = [h for h in _holders(proc, {str(real)}).get(str(real), ()) if h.pid != os.getpid()]
            who = ", ".join(f"{holder.name} (pid {holder.pid})" for holder in holders) or "another program"
            return BridgeError("port_locked", f"{who} holds {path}; stop it first: one master per bus")
        return BridgeError("unreachable", f"{path} cannot be locked: {exc.strerror}")
    finally:
        os.close(port)
    return BridgeError("port_refused", f"{path} is no serial port of the wanted kind: {error}")
