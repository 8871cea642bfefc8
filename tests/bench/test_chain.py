"""The bench itself: a catch-up that missed a session is no figure."""

import asyncio
from pathlib import Path

import pytest

from bench import chain

pytestmark = pytest.mark.timeout(180)


def test_a_small_catch_up_finds_every_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a catch-up that is quick because it leaves something out."""
    monkeypatch.setattr(chain, "FOREIGN", 200)
    found = chain._caught_up(5_000, 500)
    assert found["seconds"] > 0
    assert 20 <= found["calls"] < 400


def test_one_session_is_timed_from_its_log_to_its_set_point(tmp_path: Path) -> None:
    """Would catch times taken in the wrong order, or of another session, and requests counted that somebody else asked."""
    seen = asyncio.run(chain._latencies(tmp_path, 1))
    assert seen.floor[0] > 0
    assert seen.verdict[0] > 0
    assert 0 < seen.commanded[0] <= seen.read_back[0]
    assert all(len(polled) == 1 for polled in seen.polled.values())
    assert seen.calls_sessions >= 6
    assert seen.calls_idle >= 2  # more on a machine so slow that it looks without a hint
