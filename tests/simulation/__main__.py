"""`./run simulate [--seed A..B] [--hours N]`: storms without end, until one breaks a promise; then its story, and exit 1.

Without --seed it begins where nobody has looked: above the seeds of CI. Without --hours it ends with the last seed.
"""

# ruff: noqa: T201 - a command line prints

import argparse
import itertools
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait

from simulation.storms import carried_out, plan_of, storm

FIRST_SEED = 1_000_000
SHOWN_EVERY_S = 30
STORY_LINES = 400


def seeds_of(text):
    """A..B, A.. or A."""
    first, dots, last = text.partition("..")
    if not dots:
        return range(int(first), int(first) + 1)
    return range(int(first), int(last) + 1) if last else itertools.count(int(first))


def storms_until(seeds, until_s):
    """One finished storm after the other, on every core; never more under way than cores."""
    cores = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(cores) as pool:
        under_way = {pool.submit(storm, seed) for seed in itertools.islice(seeds, cores)}
        while under_way:
            done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
                following = next(seeds, None) if time.monotonic() < until_s else None
                if following is not None:
                    under_way.add(pool.submit(storm, following))


def main():
    """The command."""
    parser = argparse.ArgumentParser(prog="./run simulate", description=__doc__)
    parser.add_argument("--seed", default=f"{FIRST_SEED}..", help="A, A..B or A..", metavar="A..B")
    parser.add_argument("--hours", type=float, help="stop after so long")
    wanted = parser.parse_args()
    until_s = time.monotonic() + wanted.hours * 3600 if wanted.hours is not None else float("inf")
    began_s = shown_s = time.monotonic()
    seeds = sessions = lives = stranded = 0
    for seeds, ended in enumerate(storms_until(iter(seeds_of(wanted.seed)), until_s), 1):
        if ended.broken:
            seed = int(ended.name.split()[1])
            print(plan_of(seed))
            print(carried_out(ended.name, plan_of(seed), lines=STORY_LINES).story)
            print(f"\n{ended.name} breaks a promise; again: ./run simulate --seed {seed}")
            return 1
        sessions, lives, stranded = (
            sessions + ended.sessions, lives + ended.lives, stranded + ended.stranded,
        )  # fmt: skip
        if time.monotonic() - shown_s > SHOWN_EVERY_S:
            shown_s = time.monotonic()
            print(
                f"{seeds} storms, {sessions} sessions, {lives} lives, newest: {ended.name}",
                file=sys.stderr,
            )
    used_s = time.monotonic() - began_s
    print(
        f"{seeds} storms, {sessions} sessions, {lives} lives of the agent, {stranded} stranded, {used_s:.0f} s: all promises kept"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
