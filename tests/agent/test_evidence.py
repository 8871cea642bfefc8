"""A session's file: all that proves it, the same bytes every time, and nothing that is nobody's business."""

import json

import pytest
from proof import OPERATOR, session_id_of, settled
from story import DOMAIN, METER, PROVIDER, Story, head, seen

from agent.errors import Refused
from agent.evidence import canonical, digest, evidence


def content_of(events):
    """The file of these events."""
    return evidence(DOMAIN, PROVIDER.address, session_id_of(events), events)


def test_it_holds_everything_that_proves_the_session():
    """Would catch a section that is empty on the day somebody disputes the bill."""
    events = settled()
    content = content_of(events)
    assert [row["kind"] for row in content["events"]] == [type(event).__name__ for event in events]
    assert content["summary"]["stage"] == "SETTLED"
    assert (content["summary"]["energy_wh_settled"], content["summary"]["energy_wh_ordered"]) == (20, 20)
    assert content["receipts"][-1]["energy_wh_acked"] == 20
    assert [one["moment"] for one in content["records"]] == ["begin", "end"]
    assert content["settlements"][0]["raw_tx"].startswith("0x02")
    assert content["presentation"]["token"] == content["terms"]["token"]
    assert content["market"] == {"chain_id": DOMAIN.chain_id, "contract": "0x" + DOMAIN.contract.hex()}


def test_the_same_session_gives_the_same_bytes_and_another_gives_others():
    """Would catch a file whose digest, noted today, does not fit tomorrow's export."""
    one, again, other = (
        canonical(content_of(settled())),
        canonical(content_of(settled())),
        content_of(settled(2)),
    )
    assert one == again
    assert json.loads(one)["digest"] == digest(json.loads(one)) != other["digest"]


def test_no_private_key_is_in_it():
    """Would catch an export that gives somebody the right to sign."""
    text = canonical(content_of(settled())).decode()
    for secret in (METER.private.secret, PROVIDER.private.secret, OPERATOR._private.secret):
        assert secret.hex() not in text


def test_a_session_that_was_never_believed_proves_nothing():
    """Would catch an empty file that looks like evidence."""
    events = (Story() >> head() >> seen()).journal.events
    with pytest.raises(Refused, match="unknown_session"):
        content_of(events)
