"""How much of a processor this thread uses, and how long work that strangers cause rests for it.

One thread runs the charger's beat and both doors. A thread that always has work is taken off the processor by the system, for
tens of milliseconds, whenever other programs want it too; one that rests is let on again the moment its timer ends. So the
doors take their work in short pieces, and between two of them ask here how long to rest. What waits meanwhile waits outside: in
the kernel, then at the broker and the visitors, who slow down or lose what is too much.

Rules
* All work of the thread counts, the strangers' and our own. Our own never waits, and never locks the strangers out either.

May not know: who works, and at what.
"""

from __future__ import annotations

import time
from collections.abc import Callable

PART = 0.6  # of one processor
BURST_S = 0.005  # of work without a rest: what a message or two cost must not make anybody wait
REST_S_MAX = (
    0.02  # what we do ourselves (or a slow machine) may not starve the doors: a piece of work every so often
)


class Load:
    """Of the thread that asks."""

    def __init__(
        self,
        worked_s: Callable[[], float] = time.thread_time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._worked_s, self._monotonic_s = worked_s, monotonic_s
        self._seen = worked_s(), monotonic_s()
        self._ahead_s = -BURST_S  # seconds of work beyond PART

    def rest_s(self) -> float:
        """Seconds to rest before the next piece of strangers' work; 0: go on."""
        worked_s, now_s = self._worked_s(), self._monotonic_s()
        ahead_s = self._ahead_s + worked_s - self._seen[0] - PART * (now_s - self._seen[1])
        self._ahead_s = min(max(ahead_s, -BURST_S), REST_S_MAX * PART)
        self._seen = worked_s, now_s
        return max(0.0, self._ahead_s / PART)
