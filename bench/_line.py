"""Serial lines without hardware, as a process of their own: what goes in at one end comes out at the other, byte by byte in time.

`python -m bench._line BAUD MASTER_LINK SLAVE_LINK [MASTER_LINK SLAVE_LINK ...]` makes a pair of ptys for each pair of
links and says `ready`; it ends when its stdin does. A character has 11 bits. BAUD 0 is a line without speed. The slave's
first byte leaves no earlier than 3.5 characters after the master's last one, as RTU demands of a real slave.
"""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
import tty
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

_SPIN_S = 0.00015  # a sleep ends up to this much late; with one line the rest is spun, or the line would be too slow


def character_s(baud: int) -> float:
    """Seconds of one character of 11 bits; 0 for a line without speed."""
    return 11 / baud if baud else 0.0


def gap_s(baud: int) -> float:
    """Seconds of silence between frames: 3.5 characters, and 1.75 ms above 19200 baud."""
    return max(0.00175, 3.5 * character_s(baud)) if baud else 0.0


@dataclass
class _Way:
    """One direction of one line."""

    source: int
    sink: int
    busy_until_s: float = 0.0
    due: deque[tuple[float, int]] = field(default_factory=deque)

    def take(self, baud: int, not_before_s: float, woke_s: float) -> None:
        """Put what the source says on the line; it was said before `woke_s`."""
        data = os.read(self.source, 4096)
        if not baud:
            os.write(self.sink, data)
            return
        at_s = max(self.busy_until_s, not_before_s, woke_s)
        for byte in data:
            at_s += character_s(baud)
            self.due.append((at_s, byte))
        self.busy_until_s = at_s

    def give(self) -> None:
        """Hand over what has arrived by now."""
        arrived = bytearray()
        now_s = time.monotonic()
        while self.due and self.due[0][0] <= now_s:
            arrived.append(self.due.popleft()[1])
        if arrived:
            os.write(self.sink, arrived)


def _carry(baud: int, lines: Sequence[tuple[_Way, _Way]]) -> None:
    ways = {way.source: (way, other) for pair in lines for way, other in (pair, pair[::-1])}
    asked = {pair[0].source for pair in lines}
    spin_s = _SPIN_S if len(lines) == 1 else 0.0
    while True:
        due_s = min((way.due[0][0] for way, _ in ways.values() if way.due), default=None)
        wait_s = None if due_s is None else max(0.0, due_s - time.monotonic() - spin_s)
        heard = select.select(ways, [], [], wait_s)[0]
        woke_s = time.monotonic()
        for source in heard:
            way, other = ways[source]
            way.take(baud, 0.0 if source in asked else other.busy_until_s + gap_s(baud), woke_s)
        if due_s is not None and due_s - time.monotonic() > spin_s:
            continue
        for way, _ in ways.values():
            if way.due and way.due[0][0] - time.monotonic() <= spin_s:
                while time.monotonic() < way.due[0][0]:
                    pass
                way.give()


def _end(link: str) -> int:
    master, slave = (
        pty.openpty()
    )  # the slave stays open, or the master reports an error while nobody else has it
    tty.setraw(master)
    tty.setraw(slave)
    Path(link).unlink(missing_ok=True)
    Path(link).symlink_to(os.ttyname(slave))
    return master


@contextmanager
def lines(baud: int, *links: Path) -> Iterator[None]:
    """The lines as a process, while the block lasts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench._line", str(baud), *map(str, links)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n", "the line did not start"
        yield
    finally:
        process.stdin.close()
        process.terminate()
        process.wait(timeout=5)
        process.stdout.close()


def _main(baud: int, links: Sequence[str]) -> None:
    pairs = []
    for master_link, slave_link in zip(links[::2], links[1::2], strict=True):
        master, slave = _end(master_link), _end(slave_link)
        pairs.append((_Way(master, slave), _Way(slave, master)))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    _carry(baud, pairs)


if __name__ == "__main__":
    _main(int(sys.argv[1]), sys.argv[2:])
