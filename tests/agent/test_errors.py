"""The three families, by who must act; and that every refusal is documented."""

import ast
import re
from pathlib import Path

import pytest

from agent import errors
from agent.core.session import Hindrance

ROOT = Path(__file__).parents[2]
DOCUMENT = ROOT / "docs" / "refusals.md"


def test_exit_codes_are_sysexits_and_the_units():
    """The unit does not restart on 78; scripts tell 'no' (3) from 'away' (69)."""
    assert errors.Misconfigured("x").exit_code == 78
    assert errors.Transient("x").exit_code == 69
    assert errors.Refused("busy").exit_code == 3
    assert (errors.EXIT_DONE, errors.EXIT_USAGE) == (0, 2)


@pytest.mark.parametrize("family", [errors.Transient, errors.Misconfigured])
def test_an_error_says_what_happened_and_what_to_do(family):
    """A message without a remedy leaves the reader alone at the roadside."""
    error = family("the node is away", remedy="check [chain] urls")
    assert (error.message, error.remedy) == ("the node is away", "check [chain] urls")
    assert str(error) == "the node is away\n  check [chain] urls"
    assert str(family("short")) == "short"


def test_a_refusal_has_a_stable_reason_and_words_for_humans():
    """Clients decide by the reason; humans read the rest."""
    refused = errors.Refused("busy", "another session holds it", remedy="wait")
    assert (refused.reason, refused.detail) == ("busy", "another session holds it")
    assert str(refused) == "busy: another session holds it\n  wait"
    assert str(errors.Refused("busy")) == "busy"


def raised_reasons():
    """Every literal reason of a `Refused(...)` in the door and the core, read from the source."""
    reasons = set()
    for file in (ROOT / "agent" / "door.py", *sorted((ROOT / "agent" / "core").glob("*.py"))):
        for node in ast.walk(ast.parse(file.read_text())):
            is_refusal = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refused"
            is_super = (
                isinstance(node, ast.Call)
                and getattr(node.func, "attr", "") == "__init__"
                and len(node.args) == 2
                and isinstance(node.args[0], ast.Constant)
            )
            if is_refusal or is_super:
                assert isinstance(node.args[0], ast.Constant), (
                    f"{file.name}:{node.lineno}: a reason is a literal"
                )
                reasons.add(node.args[0].value)
    return reasons


def documented(section):
    """The first column of the table under this heading."""
    text = DOCUMENT.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `([a-z_]+)` \|", text, flags=re.MULTILINE)


def test_every_refusal_that_is_raised_is_documented_and_no_other():
    """A reason without a line leaves a client guessing; a line without a reason is a promise nobody keeps."""
    listed = documented("Refusals")
    assert sorted(listed) == sorted(raised_reasons())
    assert len(listed) == len(set(listed))


def test_every_hindrance_is_documented_and_no_other():
    """`status` names them: the consumer must know what to wait for."""
    assert sorted(documented("Why power waits")) == sorted(why.value for why in Hindrance)
