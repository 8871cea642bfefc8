"""Every no of the door, by its name: what the code can say, what `docs/refusals.md` explains, and what can really be heard.

The three sets are one set. How each refusal comes about in detail, and that it changes nothing, is test_door.py's story.
"""

import ast
import re
from dataclasses import replace
from pathlib import Path

import pytest
from story import (
    CONSUMER,
    OTHER_CONSUMER,
    PORT,
    PROVIDER,
    STRANGER,
    TERMS,
    Story,
    believed,
    connect,
    hash32,
    head,
    passes,
    seen,
    settles,
    stops,
)
from visit import Visit, at_the_plug, charging

from agent.consumer.policy import Reason
from agent.core import token as rules
from agent.core.messages import Accept
from agent.core.session import Hindrance
from agent.door import HELLO_LIFETIME_S, SOURCE_RATE
from agent.runners.http import STATUS_BY_REASON, STATUS_OF_OTHER_REASONS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "refusals.md"
NAMED_BY_PROTOCOL = {  # PROTOCOL section 4's own list, as far as it goes
    "malformed",
    "rate_limited",
    "unknown_session",
    "not_yet_seen",
    "not_yet_confirmed",
    "expired",
    "too_late",
    "bad_signature",
    "wrong_signer",
    "wrong_provider",
    "stale_hello",
    "replayed",
    "busy",
    "reserve_reached",
}

# ---- how to hear each one


def rate_limited(visit):
    """Somebody in a hurry."""
    for _ in range(int(SOURCE_RATE[0])):
        assert visit.refused(visit.receipt(1), source="hurry") == "unknown_session"
    return visit.refused(visit.receipt(1), source="hurry")


def too_late():
    """A minute before the token ends."""
    visit = Visit(Story() >> seen() >> head(at_s=TERMS.valid_until_s - 60))
    return visit.refused(visit.present())


def stale_hello(visit):
    """A Hello that was photographed and signed much later."""
    old = visit.present()
    visit.story.passes(HELLO_LIFETIME_S)
    return visit.refused(old)


def replayed(visit):
    """The Hello that opened the session, once more."""
    hello = visit.door._hellos[PORT][0].hello
    return visit.refused(visit.present(hello=hello))


def second_customer(visit):
    """Another car wants the same port."""
    other = connect(2, consumer=OTHER_CONSUMER)
    _ = visit.story >> seen(other) >> believed(other)
    return visit.refused(visit.present(other, wallet=OTHER_CONSUMER), sref="other")


def out_of_order(visit):
    """The contactor stuck the last time."""
    visit.story.passes(5)
    visit.story.outlet.welded = True
    (visit.story >> stops()).passes(40)
    return second_customer(visit)


def over_grant(visit):
    """A key that was allowed 30 Wh signs for 31."""
    draft, hello = visit.present(), visit.door.hello(PORT)
    bound = rules.challenge(hello.typed, draft.consumer_nonce)
    typed = rules.PresentToken(
        draft.token, draft.session_id, PROVIDER.address, draft.session_key, 30, draft.valid_until_s, bound
    )
    granted = replace(draft, max_energy_wh=30, signature=CONSUMER.sign(typed))
    assert isinstance(visit.says(granted), Accept)
    visit.story.passes(20)
    return visit.refused(visit.receipt(31))


WAYS = {
    "malformed": lambda: at_the_plug().refused(b"{}"),
    "rate_limited": lambda: rate_limited(at_the_plug()),
    "not_yet_seen": lambda: (visit := Visit(Story() >> head() >> passes(2))).refused(visit.present()),
    "unknown_session": lambda: (visit := at_the_plug()).refused(visit.receipt(1)),
    "wrong_token": lambda: (visit := at_the_plug()).refused(visit.present(token=hash32("another"))),
    "expired": lambda: (visit := at_the_plug()).refused(visit.present(valid_until_s=visit.story.at_s)),
    "too_late": too_late,
    "unknown_charger": lambda: (visit := at_the_plug()).refused(visit.present(charger_id=hash32("roof"))),
    "stale_hello": lambda: stale_hello(at_the_plug()),
    "replayed": lambda: replayed(charging()),
    "busy": lambda: second_customer(charging()),
    "out_of_order": lambda: out_of_order(charging()),
    "bad_signature": lambda: (visit := at_the_plug()).refused(visit.present(signature=bytes(65))),
    "wrong_signer": lambda: (visit := at_the_plug()).refused(visit.present(sign=STRANGER)),
    "over_order": lambda: (visit := charging()).refused(visit.receipt(1_001)),
    "over_grant": lambda: over_grant(at_the_plug()),
    "ahead_of_meter": lambda: (visit := charging()).refused(visit.receipt(500)),
}


@pytest.mark.parametrize("reason", WAYS)
def test_it_can_be_heard(reason):
    """Would catch a refusal that another check always hides: a promise in the page that nobody ever meets."""
    assert WAYS[reason]() == reason


def test_a_receipt_after_the_settlement_is_too_late_too():
    """Would catch a receipt that is taken although it can no longer be collected; the page names all three ways."""
    visit = charging()
    visit.story.passes(10)
    visit.says(visit.receipt(10))
    _ = (visit.story >> stops()).passes(25) >> settles()
    assert visit.refused(visit.receipt(20)) == "too_late"


# ---- page = code = heard


DOOR_AND_CORE = (ROOT / "agent" / "door.py", *sorted((ROOT / "agent" / "core").glob("*.py")))


def refusals_in(file):
    """Every `Refused(...)` of a file: the expression of its reason."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Refused":
            yield node.args[0]


def raised_reasons():
    """Every reason in the door and the core, read from the source; each must be a literal there."""
    reasons = {"malformed"}  # `messages.Malformed` names it for all of them
    for file in DOOR_AND_CORE:
        for reason in refusals_in(file):
            assert isinstance(reason, ast.Constant), f"{file.name}:{reason.lineno}: a reason is a literal"
            reasons.add(reason.value)
    return reasons


def rows(section):
    """The table under this heading: first column -> the other columns."""
    text = PAGE.read_text().split(f"## {section}\n")[1].split("\n## ")[0]
    found = re.findall(r"^\| `([a-z_]+)` \|(.*)\|$", text, flags=re.MULTILINE)
    assert len(found) == len(dict(found)), "a line stands twice"
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in found}


def test_page_code_and_door_name_the_same_refusals():
    """Would catch a reason without a line (a client guesses), a line without a reason, and one that cannot be reached."""
    assert set(rows("Refusals")) == raised_reasons() == set(WAYS)


def test_the_page_says_what_to_do():
    """Would catch a refusal that leaves a consumer standing at the plug."""
    for name, cells in rows("Refusals").items():
        assert len(cells) == 3, name
        assert all(cells), name


def test_the_page_names_the_http_status():
    """Would catch a phone that waits on a status which never comes."""
    told = {name: int(cells[0]) for name, cells in rows("Refusals").items()}
    assert told == {name: STATUS_BY_REASON.get(name, STATUS_OF_OTHER_REASONS) for name in told}


def test_every_hindrance_is_on_the_page_and_no_other():
    """Would catch a pause that nobody can explain: `status` names them, the consumer must know what to wait for."""
    assert set(rows("Why power waits")) == {why.value for why in Hindrance}


def test_every_name_of_the_protocol_is_on_the_page():
    """Would catch a name that PROTOCOL section 4 promises and that a reader finds nowhere."""
    words = set(re.findall(r"`([a-z_]+)`", PAGE.read_text()))
    assert words >= NAMED_BY_PROTOCOL


def test_what_the_consumer_refuses_is_on_the_page_too():
    """Would catch a purchase that ends with a word nobody can look up; what it passes on from the provider has its own line."""
    files = sorted((ROOT / "agent" / "consumer").glob("*.py"))
    literals = {one.value for file in files for one in refusals_in(file) if isinstance(one, ast.Constant)}
    said, told = literals | {why.value for why in Reason}, set(rows("What the consumer's own side refuses"))
    assert told <= said
    assert said <= told | set(rows("Refusals")), "some mean the same on both sides"
