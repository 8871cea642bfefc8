"""The bench command: what it prints, and what its exit code means. The benches' own figures are not judged here."""

import json
import sys
from types import ModuleType

import pytest

import bench.__main__ as command
from bench import Row, interleaved_us

GOOD = Row("toy", "cost", "us", 2.5, "at most 2x the floor", met=True, runs=3, floor=2.0, floor_name="bare")
BAD = Row("toy", "size", "MiB", 9.0, "at most the peer's", met=False, runs=3, peer=8.0, peer_name="other")


@pytest.fixture
def toy(monkeypatch):
    """A package with one bench, `toy`, whose rows a test chooses."""
    module = ModuleType("bench.toy")
    module.rows = lambda runs: [GOOD, BAD][: 1 if runs == 1 else 2]
    monkeypatch.setitem(sys.modules, "bench.toy", module)
    monkeypatch.setattr(command, "names", lambda: ["toy"])


def test_json_is_one_object_a_row_with_every_key(toy, capsys):
    """Would catch a key that a reader of the figures waits for, or a table among the objects."""
    assert command.main(["--json"]) == command.EXIT_NOT_MET
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["met"] for line in lines] == [True, False]
    keys = {
        "bench",
        "metric",
        "unit",
        "ours",
        "peer",
        "peer_name",
        "floor",
        "floor_name",
        "goal",
        "met",
        "runs",
    }
    assert all(set(line) == keys for line in lines)


def test_the_table_shows_ours_beside_what_it_is_compared_with(toy, capsys):
    """Would catch a figure without the thing that makes it mean something."""
    assert command.main(["toy"]) == command.EXIT_NOT_MET
    assert capsys.readouterr().out == (
        "bench  metric  unit  ours  peer       floor     goal                  met\n"
        "toy    cost    us    2.5              2 (bare)  at most 2x the floor  yes\n"
        "toy    size    MiB   9     8 (other)            at most the peer's    NO\n"
    )


def test_met_goals_are_success_and_unknown_names_are_not(toy, capsys):
    """Would catch a benchmark run that cannot fail, and a misspelt name that measures nothing."""
    assert command.main(["--runs", "1"]) == command.EXIT_MET
    assert command.main(["toi"]) == command.EXIT_UNKNOWN_NAME
    assert "no such bench: toi" in capsys.readouterr().err
    assert command.main(["--runs", "0"]) == command.EXIT_UNKNOWN_NAME


def test_calls_are_measured_in_turns():
    """Would catch one call measured while the machine was quiet and the other while it was not."""
    order = []
    times = interleaved_us([lambda: order.append("a"), lambda: order.append("b")], runs=3)
    assert order == ["a", "b"] * 3
    assert len(times) == 2
    assert all(time > 0 for time in times)


def test_the_benches_that_are_there_can_be_asked_for(monkeypatch, capsys):
    """Would catch a bench module without `rows`."""
    for name in command.names():
        assert callable(__import__(f"bench.{name}", fromlist=["rows"]).rows)
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
