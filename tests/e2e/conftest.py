"""What the end-to-end stories found out on the way, below the test run's summary."""

from stage import NOTES


def pytest_terminal_summary(terminalreporter):
    """One line a note: which chain, how long, how exact."""
    if NOTES:
        terminalreporter.section("notes")
    for note in NOTES:
        terminalreporter.line(note)
