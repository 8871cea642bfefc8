"""The machine's own lateness: a process that is due at the same instants as our beats, does the least, and says how late it was.

`python -m bench._sleeper PER_S BEATS PORTS` only sleeps. With `PATH BAUD LINE_S` behind it, it then writes and reads through
libmodbus on a serial line of its own, which needs LINE_S for that: a line without hardware is a few processes of this machine,
and what they are late is nobody's doing who asks. It says the milliseconds, one JSON list, and ends.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from bench import _libmodbus, _line


async def slept(per_s: int, beats: int, ports: int) -> list[float]:
    """Milliseconds each of `ports` tasks woke too late, `beats` times each; they take turns as the ports of a beat do."""
    loop = asyncio.get_running_loop()
    late_ms: list[float] = []
    began_s = loop.time() + 0.1

    async def port(first_s: float) -> None:
        for number in range(beats):
            due_s = first_s + number / per_s
            await asyncio.sleep(due_s - loop.time())
            late_ms.append(1000 * (loop.time() - due_s))

    await asyncio.gather(*(port(began_s + at / per_s / ports) for at in range(ports)))
    return late_ms


def asked(per_s: int, beats: int, path: str, baud: int, line_itself_s: float) -> list[float]:
    """Milliseconds each beat of one port was late: a write, the silence, a read, in C."""
    master = _libmodbus.Master("rtu", path, str(baud))
    late_ms = []
    began_s = time.monotonic() + 0.1
    for number in range(beats):
        due_s = began_s + number / per_s
        time.sleep(max(0.0, due_s - time.monotonic()))
        master.write(5_000, number & 1)
        time.sleep(_line.gap_s(baud))
        master.read(0, 4)
        # The silence after the read is nobody's to wait for.
        late_ms.append(1000 * (time.monotonic() - due_s - line_itself_s + _line.gap_s(baud)))
    master.close()
    return late_ms


@contextmanager
def beside(per_s: int, beats: int, ports: int, *line: object) -> Iterator[Callable[[], list[float]]]:
    """Run it beside what the block does; call what it gives for the milliseconds (it waits for them)."""
    words = map(str, (per_s, beats, ports, *line))
    process = subprocess.Popen(
        [sys.executable, "-m", "bench._sleeper", *words], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    out = process.stdout

    def said() -> list[float]:
        return [float(value) for value in json.loads(out.read())]

    try:
        yield said
    finally:
        process.kill()  # it has said everything, or nobody wants it any more
        process.wait()
        out.close()


def _main(words: Sequence[str]) -> list[float]:
    per_s, beats, ports = map(int, words[:3])
    if len(words) == 3:
        return asyncio.run(slept(per_s, beats, ports))
    path, baud, line_itself_s = words[3:]
    return asked(per_s, beats, path, int(baud), float(line_itself_s))


if __name__ == "__main__":
    gc.freeze()
    sys.stdout.write(json.dumps(_main(sys.argv[1:])))
