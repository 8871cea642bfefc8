"""One reorganisation at every second of an evening with two sessions, to three depths."""

import pytest
from simulation.reorgs import every, reorged_at
from simulation.storms import on_all_cores


@pytest.mark.timeout(600)
def test_no_single_reorganisation_costs_anything(request):
    """Would catch a stage in which a vanished `connect`, or a vanished payment, is not noticed."""
    moments = every(1 if request.config.getoption("--long") else 2)
    for ended in on_all_cores(reorged_at, moments):
        assert not ended.broken, f"{ended.name}\n{ended.story}"
    assert len(moments) > 100
