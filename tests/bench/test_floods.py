"""The bench of the floods: a short one, with everything in it that a long one has."""

import asyncio
import math

import pytest

from bench import floods


async def _alone(*_):
    return [1.0] * 10


@pytest.mark.timeout(300)
def test_a_short_flood_is_measured_in_all_its_rows(monkeypatch) -> None:
    """Would catch a flood that does not reach the house, a consumer that is not asked, and a row without a figure."""
    monkeypatch.setattr(floods, "FLOODS", ("everything at once",))
    monkeypatch.setattr(floods, "VISITS", 1)
    monkeypatch.setattr(floods, "_floor_ms", _alone)
    floor, (idle, flood) = asyncio.run(floods.measured(3.0))
    assert len(floor) == 10
    assert idle.sent == {}
    assert flood.sent["mqtt"] > 0
    assert flood.sent["http answered"] + flood.sent["http shut out"] > 0
    assert len(flood.honest_s) == 1
    rows = [floods._beat_row(flood, idle, floor), floods._memory_row(flood, idle), floods._honest_row(flood)]
    assert [row.unit for row in rows] == ["ms", "MiB", "s"]
    assert not any(math.isnan(row.ours) for row in rows)


def test_every_kind_of_garbage_is_refused_and_costs_what_it_says() -> None:
    """Would catch a kind that is accepted, or one that is refused for another reason than its name says."""
    costs = floods.refused_us(20)
    assert len(costs) == 8
    assert all(ours > 0 and bare > 0 for ours, bare in costs.values())
    assert costs["oversize"][0] < costs["forged under a live nonce"][0]


def test_a_missed_goal_is_called_missed() -> None:
    """Would catch goals that anything meets."""
    good = floods.Phase("x", [1.0] * 100, (50.0, 51.0), 0.5, 0.0, [0.1, 0.2], {})
    bad = floods.Phase("x", [1.0] * 90 + [9.0] * 10, (50.0, 90.0), 0.5, 0.0, [0.1, None], {})
    for phase, met in ((good, True), (bad, False)):
        assert floods._beat_row(phase, good, [0.1]).met is met
        assert floods._memory_row(phase, good).met is met
        assert floods._honest_row(phase).met is met
