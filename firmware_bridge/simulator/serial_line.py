"""A serial cable without hardware: two ptys, and whatever goes into one comes out of the other.

The simulator's server opens `device_end`; the driver opens the link. A pty knows no parity: use N on both
ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pty
import tty
from pathlib import Path

from firmware_bridge.charger import MapError

_CHUNK_BYTES = 4096


class SerialLine:
    """Make the cable and a symbolic link `link` to the driver's end. Needs a running loop; `close()` removes
    all of it.
    """

    def __init__(self, link: str) -> None:
        self.link = Path(link)
        if self.link.is_symlink():
            self.link.unlink()  # left behind by a simulator that was killed
        elif self.link.exists():
            raise MapError(f"{link} exists and is not a link; choose a name that is free")
        self._loop = asyncio.get_running_loop()
        device_master, device_slave = pty.openpty()
        driver_master, driver_slave = pty.openpty()
        # The slaves stay open here, or the masters would report an error while nobody has the other end open.
        self._ends = (device_master, device_slave, driver_master, driver_slave)
        for end in self._ends:
            tty.setraw(end)
        for master in (device_master, driver_master):
            os.set_blocking(master, False)
        self.device_end = os.ttyname(device_slave)
        self.link.symlink_to(os.ttyname(driver_slave))
        self._loop.add_reader(device_master, self._carry, device_master, driver_master)
        self._loop.add_reader(driver_master, self._carry, driver_master, device_master)

    @staticmethod
    def _carry(source: int, sink: int) -> None:
        # A full or vanished end loses bytes, as a real cable does; Modbus notices by checksum or silence.
        with contextlib.suppress(OSError):
            os.write(sink, os.read(source, _CHUNK_BYTES))

    def close(self) -> None:
        """Pull the cable."""
        for master in (self._ends[0], self._ends[2]):
            self._loop.remove_reader(master)
        for end in self._ends:
            with contextlib.suppress(OSError):
                os.close(end)
        with contextlib.suppress(OSError):
            self.link.unlink()
