"""`v2v demo --story thief`, as a newcomer types it: he is refused by name on the screen, and the evening is paid to the wei."""

import json
import re
import sys

import pytest
from stage import RATE_WEI_PER_KWH, Program, note

ORDER_WH = 60
SECONDS_MAX = 75  # as the demo's own

pytestmark = pytest.mark.timeout(180)

DESERVED = {
    "her token, signed with his own key": "wrong_signer",
    "her signature, but for his session key": "wrong_signer",
    "the high-s twin of her signature": "bad_signature",
    "her token, shown to another provider": "not_yet_seen",
    "the high-s twin of her receipt": "bad_signature",
    "her token again, after its time": "expired",
}


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One evening with a thief, told to a program; a person's words go to standard error."""
    demo = (sys.executable, "-m", "agent", "demo", "--story", "thief", "--energy-wh", ORDER_WH)
    with Program(
        [*demo, "--json", "--seed", 3], tmp_path_factory.mktemp("thief"), "thief", split=True
    ) as story:
        story.ended(150)
    assert story.process.returncode == 0, story.complained
    return story


def test_every_theft_is_refused_by_the_agents_by_its_name(story):
    """Would catch a theft that succeeds, one that was never tried, and one that is refused for a wrong reason."""
    summary = json.loads(story.said)
    note(f"the thief's evening: {summary['seconds']} s")
    assert all(one["refused"] for one in summary["thief"])
    answers = {one["what"]: one["reason"] for one in summary["thief"]}
    forged = [what for what in answers if what.startswith("a forged receipt for ")]
    assert len(forged) == 1
    assert answers.pop(forged[0]) == "wrong_signer"
    assert answers == DESERVED
    at = {one["what"]: one["at"] for one in summary["thief"]}
    assert at["her token, shown to another provider"] == "alice"  # bob won
    assert summary["seconds"] <= SECONDS_MAX


def test_each_refusal_is_on_the_screen(story):
    """Would catch a name that only a program sees."""
    for what, reason in DESERVED.items():
        assert re.search(rf"the thief at (alice|bob): {re.escape(what)}: {reason} \(", story.complained)
        assert re.search(
            rf"^(alice|bob) +{re.escape(what)} +{reason} +nothing$", story.complained, re.MULTILINE
        )
    assert "SOMETHING" not in story.complained


def test_the_honest_evening_is_paid_exactly(story):
    """Would catch a thief who cannot steal, but can keep others from being paid or make them pay more."""
    summary = json.loads(story.said)
    cost_wei = RATE_WEI_PER_KWH * 80 // 100 * ORDER_WH // 1000
    assert (summary["stage"], summary["stop_reason"]) == ("SETTLED", "EnergyLimitReached")
    assert summary["energy_wh_settled"] == ORDER_WH
    assert summary["consumer_cost_wei"] == summary["provider_gain_wei"] == cost_wei
