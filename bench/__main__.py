"""`python -m bench [NAME ...] [--json] [--runs N]`: run the benches and show their rows.

With `--json` one object a line on stdout, `{bench, metric, unit, ours, peer, peer_name, floor, floor_name, goal, met,
runs}`; otherwise a table. Exit code 0 when every goal is met, 3 when one is not, 2 for an unknown name.
"""

from __future__ import annotations

import argparse
import json
import pkgutil
import sys
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module

import bench
from bench import Row

EXIT_MET = 0
EXIT_UNKNOWN_NAME = 2
EXIT_NOT_MET = 3
COLUMNS = ("bench", "metric", "unit", "ours", "peer", "floor", "goal", "met")


def names() -> list[str]:
    """Every bench there is: a module of this package whose name does not begin with an underscore."""
    return sorted(module.name for module in pkgutil.iter_modules(bench.__path__) if module.name[0] != "_")


def main(arguments: Sequence[str]) -> int:
    """Run what is asked for; rows appear bench by bench."""
    parser = argparse.ArgumentParser(
        prog="./run bench", description="Our figures beside a peer's and the floor's."
    )
    parser.add_argument(
        "name", nargs="*", help=f"which ones; all when none is named ({', '.join(names()) or 'none yet'})"
    )
    parser.add_argument("--json", action="store_true", help="one object a line")
    parser.add_argument("--runs", type=int, default=30, help="rounds of each measurement (default 30)")
    asked = parser.parse_args(arguments)
    unknown = sorted(set(asked.name) - set(names()))
    if unknown or asked.runs < 1:
        parser.print_usage(sys.stderr)
        print(
            f"no such bench: {', '.join(unknown)}" if unknown else "--runs must be at least 1",
            file=sys.stderr,
        )
        return EXIT_UNKNOWN_NAME
    rows: list[Row] = []
    for name in asked.name or names():
        for row in import_module(f"bench.{name}").rows(asked.runs):
            rows.append(row)
            if asked.json:
                print(json.dumps(asdict(row)), flush=True)
    if not asked.json:
        print(table(rows))
    return EXIT_MET if all(row.met for row in rows) else EXIT_NOT_MET


def table(rows: Sequence[Row]) -> str:
    """The rows as text, columns aligned."""
    lines = [COLUMNS, *(cells(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def cells(row: Row) -> tuple[str, ...]:
    """One row as the table shows it; a figure to compare with carries its name."""
    peer = "" if row.peer is None else f"{figure(row.peer)} ({row.peer_name})"
    floor = "" if row.floor is None else f"{figure(row.floor)} ({row.floor_name})"
    met = "yes" if row.met else "NO"
    return (row.bench, row.metric, row.unit, figure(row.ours), peer, floor, row.goal, met)


def figure(value: float) -> str:
    """Four digits, or all in front of the point: nobody reads gas as 2.559e+04."""
    return f"{value:,.0f}" if value >= 10_000 else f"{value:.4g}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
