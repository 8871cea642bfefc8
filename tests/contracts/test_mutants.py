"""A suite that lets a named bug live proves nothing: each broken market must part from the model."""

import shutil
from pathlib import Path

import pytest
from market_mutants import MUTANTS, killed_by

import contracts

# Each takes four to nine seconds, most of them the compiler's: these eight fit CI's half hour, all 31 are for --long.
IN_EVERY_RUN = {
    "wrong winner", "receipt can go down", "pause blocks an exit", "double settle", "grant cap ignored",
    "bond paid twice", "closeAt moves", "operator withdraws",
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "mutant",
    [
        pytest.param(mutant, id=mutant.name, marks=() if mutant.name in IN_EVERY_RUN else pytest.mark.long)
        for mutant in MUTANTS
    ],
)
def test_it_is_killed(mutant):
    """Would catch a walk that has become blind to one of the market's rules."""
    if (
        shutil.which("node") is None
        or not (Path(contracts.__file__).parent / "node_modules" / "solc").exists()
    ):
        pytest.skip("node or contracts/node_modules is missing: mutants cannot be built")
    assert killed_by(mutant), f"{mutant.name}: nothing noticed"


def test_the_named_ones_exist():
    """Would catch a mutant that was renamed and silently left the every-run set."""
    assert {mutant.name for mutant in MUTANTS} > IN_EVERY_RUN
