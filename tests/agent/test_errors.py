"""The three families, by who must act. That every refusal is documented is test_refusals.py's."""

import pytest

from agent import errors


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
