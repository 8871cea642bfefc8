"""docs/security.md names its evidence; a name without a test would be a promise nobody keeps."""

import re
from pathlib import Path

from market_mutants import MUTANTS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()


def test_every_test_it_names_exists():
    """Would catch a test that was renamed or deleted while the page still points at it."""
    sources = [*(ROOT / "contracts" / "test").glob("*.sol"), *(ROOT / "tests").rglob("test_*.py")]
    known = set(
        re.findall(
            r"(?:function|def) ((?:test|check_|invariant_)\w+)", "\n".join(p.read_text() for p in sources)
        )
    )
    named = set(re.findall(r"`((?:test|check_|invariant_)\w+)`", PAGE))
    assert len(named) > 40, "the page is read wrongly"
    assert named <= known, sorted(named - known)


def test_every_named_bug_exists():
    """Would catch a mutant that left the hunt."""
    named = set(
        re.findall(r'"([a-zA-Z ]+)"', PAGE.split("## What Oyente could not see")[1].split("## Proofs")[0])
    )
    assert len(named) > 12, "the page is read wrongly"
    assert named <= {mutant.name for mutant in MUTANTS}, sorted(named - {mutant.name for mutant in MUTANTS})


def test_every_proof_is_told():
    """Would catch a proof that the page forgot, and the paper's seven rows losing one."""
    proofs = set(
        re.findall(r"function (check_\w+)", (ROOT / "contracts" / "test" / "Proofs.t.sol").read_text())
    )
    assert proofs <= set(re.findall(r"`(check_\w+)`", PAGE))
    table = PAGE.split("## Table III, today")[1].split("##")[0]
    assert len(re.findall(r"^\| [A-Z]", table, re.MULTILINE)) == 7
