"""`v2v` on a computer whose wall clock is wrong, for stories about time.

    python tests/wrong_clock.py 1970 provider run --config agent.toml

1970: a board without a battery. ahead: a day in the future. jumping: each look at the clock may be a day before or after the
one before, 1970 in between. The monotonic clocks stay what they are, as on a real machine. What Python calls "now" goes
through here; nothing else in the process reads the wall clock by itself (TLS does, in OpenSSL: no story here uses it).
"""

import datetime as dt
import sys
import time
from collections.abc import Callable
from itertools import cycle
from typing import Any

DAY_S = 86_400
_true_time = time.time


def _jumping() -> Callable[[], float]:
    turns = cycle(("yesterday", "tomorrow", "1970"))

    def now_s() -> float:
        return {
            "yesterday": _true_time() - DAY_S,
            "tomorrow": _true_time() + DAY_S,
            "1970": _true_time() % DAY_S,
        }[next(turns)]

    return now_s


CLOCKS: dict[str, Callable[[], float]] = {
    "right": _true_time,
    "1970": lambda: _true_time() % DAY_S,
    "ahead": lambda: _true_time() + DAY_S,
    "jumping": _jumping(),
}


def set_wrong(now_s: Callable[[], float]) -> None:
    """From now on everybody in this process who asks for the time gets `now_s()`."""
    real_clock_gettime, real_datetime = time.clock_gettime, dt.datetime

    class WrongDatetime(real_datetime):  # type: ignore[valid-type, misc]
        """What `from datetime import datetime` finds."""

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls.fromtimestamp(now_s(), tz)

        @classmethod
        def utcnow(cls) -> Any:
            return cls.fromtimestamp(now_s(), dt.UTC).replace(tzinfo=None)

        @classmethod
        def today(cls) -> Any:
            return cls.fromtimestamp(now_s())

    def clock_gettime(which: int) -> float:
        return now_s() if which == time.CLOCK_REALTIME else real_clock_gettime(which)

    time.time = now_s
    time.time_ns = lambda: int(now_s() * 10**9)
    time.clock_gettime = clock_gettime
    for name in ("gmtime", "localtime"):
        real = getattr(time, name)
        setattr(time, name, lambda seconds=None, real=real: real(now_s() if seconds is None else seconds))
    dt.datetime = WrongDatetime  # type: ignore[misc]


if __name__ == "__main__":
    set_wrong(CLOCKS[sys.argv[1]])
    from agent.cli import main

    main(sys.argv[2:])
