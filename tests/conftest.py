"""What every test run shares: `--long`, and how hard Hypothesis looks.

By default the examples are the same on every machine and in every run, so that a red line can be seen again;
`--long` looks further with fresh examples. Helpers that tell stories live beside this file (`story.py`), not
in it.
"""

import asyncio
import logging
import sys
from collections.abc import Iterator

import pytest
import structlog
from hypothesis import HealthCheck, settings

from agent.log import QUIET

# A busy two-core machine stops for longer than any deadline; pytest-timeout catches what really hangs.
settings.register_profile("quick", deadline=None, derandomize=True, print_blob=True)
settings.register_profile(
    "long", deadline=None, max_examples=2000, print_blob=True, suppress_health_check=[HealthCheck.too_slow]
)


LONG_TIMEOUT_S = 1_800  # two thousand examples instead of a handful


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """Logging is the process's: a test that runs a daemon or its command must not give the next one a full standard output."""
    root = logging.getLogger()
    handlers, level, hook = root.handlers, root.level, sys.excepthook
    yield
    sys.excepthook = hook
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.handlers = handlers
    root.setLevel(level)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.NOTSET)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add `--long`, which `./run test --long` passes on."""
    parser.addoption(
        "--long", action="store_true", help="look longer: more examples, more seeds, slower stories"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Choose the Hypothesis profile, and name the mark that keeps slow stories for `--long`."""
    # looptime asks for the current loop in every test; without this one is made that nobody closes.
    asyncio.set_event_loop(None)
    settings.load_profile("long" if config.getoption("--long") else "quick")
    config.addinivalue_line("markers", "long: runs only with --long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what is marked `long`, saying how to run it."""
    if config.getoption("--long"):
        for item in items:
            of_its_own = item.get_closest_marker("timeout")
            if of_its_own is None or of_its_own.args[0] < LONG_TIMEOUT_S:
                item.add_marker(pytest.mark.timeout(LONG_TIMEOUT_S), append=False)
        return
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.skip(reason="takes long: ./run test --long"))
