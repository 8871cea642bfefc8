"""Is it our car that charges? What the car itself says, and what its driver answers.

Rules
* The car's own counter is a file that somebody else keeps current; whatever it says that is no number says nothing.
* A line typed is an answer only after the question stood there: Enter or y is yes, anything else is no.

May not know: what is signed for (agent/consumer/policy.py), how progress looks.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from agent.consumer.journey import Journey

OWN_METER_CHARS_MAX = 20  # a 64-bit number; a file that is something else must not be read as a larger one
QUESTION = "Their meter runs. Is it your car that charges? Enter: yes, sign on. n: no, stop. Until then nothing more is signed."
QUESTION_TO_NOBODY = (
    "Their meter runs. Is it your car that charges? Nothing more is signed until you say so: "
    "the same command again with --confirmed, or else `v2v consumer end`"
)


class Asking(Protocol):
    """Whoever shows the question."""

    asking: bool  # it stands there now


def question() -> str:
    """The question, as it can be answered here."""
    return QUESTION if sys.stdin.isatty() else QUESTION_TO_NOBODY


def own_meter(path: Path | None) -> Callable[[], int | None]:
    """Our car's own counter in Wh, from a file that whatever reads the car keeps current. None while it says nothing: then the
    driver is asked.
    """

    def read() -> int | None:
        if path is None:
            return None
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                word = file.read(OWN_METER_CHARS_MAX + 1).strip()
        except OSError:
            return None
        fits = len(word) <= OWN_METER_CHARS_MAX and word.isascii() and word.isdecimal()
        return int(word) if fits else None

    return read


@contextlib.contextmanager
def answered(journey: Journey, screen: Asking) -> Iterator[None]:
    """While the driver is asked whether the car charges, a line typed is the answer: Enter or y is yes, n stops."""
    if not sys.stdin.isatty():
        yield
        return
    loop = asyncio.get_running_loop()

    def typed() -> None:
        line = sys.stdin.readline()
        if not line:
            loop.remove_reader(sys.stdin)  # Ctrl-D, or the terminal is gone: it would say so for ever
        elif screen.asking:  # what is typed too early is no answer: the question must have been read
            yes = line.strip().lower() in ("", "y", "yes")
            (journey.confirmed if yes else journey.stop).set()

    loop.add_reader(sys.stdin, typed)
    try:
        yield
    finally:
        loop.remove_reader(sys.stdin)
