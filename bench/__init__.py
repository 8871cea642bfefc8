"""How we measure ourselves: beside a peer that does the same, and beside a floor that nobody can be faster than.

* A bench is a module here with `rows(runs) -> list[Row]`; its name is its file's name.
* `ours`, `peer` and `floor` are measured in the same run, on the same machine, interleaved: only ratios travel.
* `goal` is the worst `ours` we accept, as a multiple of the floor or the peer or as a figure, in words that say which;
  `met` is decided by the bench, so that a slower machine does not turn a good ratio red.

`./run bench [NAME] [--json]`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Row", "interleaved_us"]


@dataclass(frozen=True, slots=True)
class Row:
    """One figure. `peer` and `floor` are None where there is none to compare with; then their names are empty."""

    bench: str
    metric: str
    unit: str
    ours: float
    goal: str
    met: bool
    runs: int
    peer: float | None = None
    peer_name: str = ""
    floor: float | None = None
    floor_name: str = ""


def interleaved_us(calls: Sequence[Callable[[], object]], runs: int) -> list[float]:
    """Median microseconds of each call over `runs` rounds. One after the other in each round, so that whatever
    disturbs the machine disturbs all of them.
    """
    assert runs >= 1
    taken: list[list[float]] = [[] for _ in calls]
    for _ in range(runs):
        for call, times in zip(calls, taken, strict=True):
            began = time.perf_counter_ns()
            call()
            times.append((time.perf_counter_ns() - began) / 1000)
    return [statistics.median(times) for times in taken]
