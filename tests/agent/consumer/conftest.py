"""Journals that a story leaves open, as a crash does, are closed when it is told."""

from collections.abc import Iterator

import pytest
from scripted_provider import OPENED


@pytest.fixture(autouse=True)
def _journals_are_closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()
