"""`v2v provider watch`: what to do about a session, and which files it believes. tests/e2e/test_watch.py has the whole story."""

import pytest
from proof import session_id_of, settled, sign_records
from story import DOMAIN, PROVIDER, T0, Story, believed, connect, final, head, passes, presents, seen
from town import v2v

from agent.chain.contract import SessionState, SessionStatus
from agent.cli.watch import claim_of, next_step
from agent.core.units import Address
from agent.errors import Refused
from agent.evidence import canonical, evidence


def exported(events):
    """These events as a file."""
    return canonical(evidence(DOMAIN, PROVIDER.address, session_id_of(events), events))


def delivering(*, signing):
    """A session in the middle of its delivery, with its begin record: its events."""
    terms = connect(order_wh=40)
    story = Story(signing=signing) >> head() >> seen(terms) >> believed(terms) >> passes(2) >> presents(terms)
    sign_records(story)
    story = (story >> final(terms)).passes(6)
    return tuple(story.journal.events)


CLAIM = claim_of(exported(settled()))
VALID_UNTIL_S = CLAIM.valid_until_s


def state(status, claimed_wh, settle_at_s=VALID_UNTIL_S + 1_000):
    """A session as the contract shows it."""
    nobody = Address(bytes(20))
    return SessionState(status, nobody, nobody, 1, 20, claimed_wh, 1, 1, 1, settle_at_s, operator_bond=False)


@pytest.mark.parametrize(
    ("now", "step"),
    [
        ((state(SessionStatus.NONE, 0), T0), "over"),
        ((state(SessionStatus.ACTIVE, 0), T0), "wait"),  # the agent settles it, in one transaction
        ((state(SessionStatus.CLOSING, 19, T0 + 300), T0), "submit"),
        ((state(SessionStatus.CLOSING, 20, T0 + 300), T0), "wait"),
        ((state(SessionStatus.CLOSING, 20, T0 + 300), T0 + 300), "settle"),
        (
            (state(SessionStatus.CLOSING, 0, T0 + 300), T0 + 300),
            "submit",
        ),  # first what it is worth, while it is open
        ((state(SessionStatus.ACTIVE, 0), VALID_UNTIL_S), "submit"),  # the agent had its time
        ((state(SessionStatus.ACTIVE, 20), VALID_UNTIL_S), "wait"),
        ((state(SessionStatus.ACTIVE, 20), VALID_UNTIL_S + 1_000), "settle"),
    ],
)
def test_what_is_due(now, step):
    """Would catch gas burnt beside a living agent, a receipt handed in too late, and a settlement below it."""
    assert CLAIM.energy_wh_acked == 20
    assert next_step(CLAIM, *now) == step


def test_only_a_file_that_proves_itself_is_acted_on(tmp_path):
    """Would catch gas burnt on a forged receipt, and a traceback for a session nobody signed for."""
    honest = exported(settled())
    with pytest.raises(Refused, match="not_proven"):
        claim_of(honest.replace(b'"energy_wh_acked": 20', b'"energy_wh_acked": 21'))
    with pytest.raises(Refused, match="no_receipt"):
        claim_of(exported(delivering(signing=False)))
    assert claim_of(honest).energy_wh_acked == 20
    photo = tmp_path / "photo.json"
    photo.write_bytes(b"GIF89a")
    said = v2v("provider", "watch", str(photo), "--rpc", "http://127.0.0.1:9", "--key", "./nobody.key")
    assert said.exit_code == 3
    assert "not_proven" in said.err


def test_it_watches_while_the_last_words_come():
    """Would catch an export in the middle of a delivery that proves nothing yet."""
    assert claim_of(exported(delivering(signing=True))).energy_wh_acked == 12
