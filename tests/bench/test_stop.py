"""The bench of the stop: it must land what it says, beside a peer that looks at the same cars."""

from random import Random

from bench import stop


def test_every_cell_has_a_row_with_a_peer_and_a_floor(monkeypatch) -> None:
    """Would catch a cell that is left out, a peer that lands as well as we do (then it is not one), or a goal for nothing."""
    monkeypatch.setattr(stop, "SITES", stop.SITES[3:4])
    monkeypatch.setattr(stop, "STEPS_MWH", (1_000, 10_000))
    monkeypatch.setattr(stop, "POLLS_MS", (250, 1_000))
    monkeypatch.setattr(stop, "REFRESHES_MS", (5_000,))
    monkeypatch.setattr(stop, "RUNS_MIN", 8)
    rows = stop.rows(8)
    assert [row.metric.split(":")[0] for row in rows] == [
        "22 kW, 1 Wh steps, poll 0.25 s",
        "22 kW, 1 Wh steps, poll 1 s",
        "22 kW, 10 Wh steps, poll 0.25 s",
        "22 kW, 10 Wh steps, poll 1 s",
        "22 kW, 1 Wh steps, poll 0.25 s, meter refreshed every 5 s",
    ]
    assert all(row.met for row in rows), rows
    assert all(row.runs == 8 for row in rows)
    assert all(row.peer > 5 * row.ours for row in rows[:-1])
    assert rows[-1].ours > 2 * rows[0].ours, "a meter that is seldom refreshed costs something"
    assert rows[0].goal.startswith("p99 <= 1 Wh")
    assert 0.28 < rows[0].floor < 0.30


def test_a_goal_is_missed_by_a_spread_that_misses_it() -> None:
    """Would catch a bench whose goals are met by anything."""
    site = stop.SITES[3]
    good = stop.Spread(0.1, 0.2, 0.9, 1.0, 0.0, 1.0, 0.0, 0)
    late = stop.Spread(0.1, 0.2, 1.1, 3.0, 0.0, 2.0, 0.0, 0)
    short = stop.Spread(-1.0, 0.2, 0.9, 1.0, -1.0, 1.0, 0.0, 0)
    for step_mwh, poll_ms, spread, met in (
        (1_000, 250, good, True),
        (1_000, 250, late, False),
        (1_000, 250, short, False),
        (1_000, 1_000, late, True),
        (1_000, 1_000, short, False),
        (10_000, 250, short, True),
        (10_000, 250, stop.Spread(0, 0, 0, 11, 0, 11, 0, 0), False),
    ):
        assert stop._goal(site, step_mwh, poll_ms, spread)[1] is met


def test_a_meter_shows_the_old_values_until_it_is_due() -> None:
    """Would catch a slow meter that is refreshed by being read: then every poll would see the truth."""
    plant = stop.MeteredPlant(stop.PlantConfig(ev_lag_ms=0), refresh_ms=2_000, first_ms=500)
    plant.enable(on=True, now_ms=0)
    plant.set_limit(16_000, 0)
    plant.advance(2_499)
    assert plant.power_w > 0
    assert plant.metered[0] < plant.register_mwh
    kept = plant.metered
    plant.advance(2_400 + 99)
    assert plant.metered == kept
    plant.advance(2_500)
    assert plant.metered == (plant.register_mwh, plant.power_w) != kept


def test_the_same_cell_is_the_same_figure_again() -> None:
    """Would catch a bench whose figures nobody can repeat."""
    one, again = (stop.planned(Random("same"), stop.SITES[0], 1_000, 500) for _ in range(2))
    assert one == again
