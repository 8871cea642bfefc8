"""What the end-to-end stories found out on the way, below the test run's summary."""

import pytest
from stage import NOTES


def pytest_sessionfinish(session):
    """One of several processes: hand the notes to the one that prints."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["notes"] = NOTES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node, error):
    """Such a process has ended; one that died has nothing to hand over."""
    NOTES.extend(getattr(node, "workeroutput", {}).get("notes", []))


def pytest_terminal_summary(terminalreporter):
    """One line a note: which chain, how long, how exact."""
    if NOTES:
        terminalreporter.section("notes")
    for note in NOTES:
        terminalreporter.line(note)
