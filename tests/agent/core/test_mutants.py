"""Every rule of DESIGN section 5 has tests, and they can fail: named slips in core, engine and door must each be caught."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from slips import ROOT, SLIPS

EXIT_PASSED, EXIT_FAILED = 0, 1  # pytest's own; 2 to 5 mean that it could not ask
RULES = range(1, 11)

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """Exit code of the chosen tests for each slip, all in one run."""
    folder = tmp_path_factory.mktemp("slips")
    script = Path(ROOT / "tests/slips.py")
    ran = subprocess.run(
        [sys.executable, str(script), str(folder)], capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines()]
    return {one["name"]: one["code"] for one in told}


def test_without_a_slip_the_chosen_tests_pass(verdicts):
    """Would catch a run that calls every slip caught because nothing works in the copy."""
    assert verdicts["nothing"] == EXIT_PASSED
    assert len(verdicts) == len(SLIPS) + 1


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.name)
def test_a_slip_is_caught(slip, verdicts):
    """Would catch a rule that only looks tested: its code says the opposite, and everything stays green."""
    assert verdicts[slip.name] == EXIT_FAILED, f"{slip.test} does not see it"


@pytest.mark.parametrize("number", RULES)
def test_every_rule_has_a_test_and_a_slip(number):
    """Would catch a rule that lost its test, or never had one that was seen to fail."""
    asked = [
        name
        for file in ("test_session.py", "test_book.py")
        for name in re.findall(r"def (test_rule_\d+_\w+)", (ROOT / "tests/agent/core" / file).read_text())
    ]
    assert [name for name in asked if name.startswith(f"test_rule_{number}_")]
    assert [slip for slip in SLIPS if slip.name.startswith(f"rule_{number}_")]


def test_no_two_slips_are_one():
    """Would catch a list that looks longer than it is."""
    assert (
        len({(slip.file, slip.old, slip.new) for slip in SLIPS})
        == len({slip.name for slip in SLIPS})
        == len(SLIPS)
        >= 12
    )
