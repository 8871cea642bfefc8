"""The machine's own lateness: a process that does nothing but sleep until it is due, as our beats do, and says how late it woke.

`python -m bench._sleeper PER_S BEATS PORTS` says the milliseconds, one JSON list, and ends.
"""

from __future__ import annotations

import asyncio
import gc
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


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


@contextmanager
def beside(per_s: int, beats: int, ports: int) -> Iterator[Callable[[], list[float]]]:
    """Run it beside what the block does; call what it gives for the milliseconds (it waits for them)."""
    words = map(str, (per_s, beats, ports))
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


if __name__ == "__main__":
    gc.freeze()
    sys.stdout.write(json.dumps(asyncio.run(slept(*map(int, sys.argv[1:4])))))
