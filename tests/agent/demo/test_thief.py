"""The thief's own parts: his twin is a real one, and his story fails when he gets something.

His whole evening, at real agents over a real broker, is told in tests/e2e/test_thief.py.
"""

import asyncio
import io

from hypothesis import given
from hypothesis import strategies as st
from scripted_provider import CONSUMER, DOMAIN, OWNER, MemoryCarrier, ScriptedProvider, terms_of

from agent.core import token as rules
from agent.core.messages import Present, ReceiptMessage, Refusal, encode
from agent.demo.screen import Screen
from agent.demo.thief import Attempt, Thief, high_s_twin


@given(st.binary(min_size=32, max_size=32))
def test_the_twin_recovers_to_the_same_key_for_everybody_but_us(digest32):
    """Would catch a "twin" that is only a broken signature: then refusing it would prove nothing."""
    import coincurve

    signature = CONSUMER.sign_digest(digest32)
    twin = high_s_twin(signature)
    recovered = coincurve.PublicKey.from_signature_and_message(
        twin[:64] + bytes([twin[64] - 27]), digest32, hasher=None
    )
    assert recovered.format(compressed=False) == CONSUMER.public_key
    assert rules.is_canonical(signature)
    assert not rules.is_canonical(twin)
    assert high_s_twin(twin) == signature


def thief_at(provider):
    """A thief whose every way leads to this provider; and what he was told."""
    told = []
    return Thief(
        DOMAIN, "seed", {OWNER.address: "alice"}, lambda _sref: MemoryCarrier(provider), told.append
    ), told


def hers():
    """What the consumer says."""
    terms = terms_of()
    present = Present(
        "eip712", terms.session_id, terms.token, rules.charger_id("left"), bytes(32), b"\x01" * 32, CONSUMER.address, 200,
        terms.valid_until_s, CONSUMER.public_key, CONSUMER.sign_digest(bytes(32)),
    )  # fmt: skip
    return encode(present), encode(ReceiptMessage(terms.session_id, 7, CONSUMER.sign_digest(b"\x07" * 32)))


def test_he_holds_back_only_until_he_has_tried():
    """Would catch a thief who keeps the consumer out for good: then her evening would never end."""
    thief, _ = thief_at(None)
    present, receipt = hers()
    assert thief.takes("present", present)
    assert thief.takes("present", present)
    assert not thief.takes("stop", present)
    assert thief.takes("receipt", receipt)
    thief._holds = frozenset()
    assert not thief.takes("present", present)
    assert not thief.takes("receipt", receipt)


async def test_a_door_that_takes_what_it_must_refuse_fails_the_story():
    """Would catch a story that calls every answer a refusal."""
    provider = ScriptedProvider(terms_of())
    answers = [Refusal("wrong_signer", ""), Refusal("busy", ""), provider.status("AUTHORISED")]
    answers += [Refusal("not_yet_seen", ""), Refusal("bad_signature", ""), provider.status("PAUSED")]
    provider.answer = lambda _data: answers.pop(0)
    thief, told = thief_at(provider)
    thief.winner = OWNER.address
    present, receipt = hers()
    thief.takes("present", present)
    thief.takes("receipt", receipt)
    async with asyncio.timeout(30):
        await thief.visit()
    assert thief.attempts == told
    assert [(one.reason, one.is_refused) for one in told] == [
        ("wrong_signer", True),
        ("busy", False),
        ("(not refused)", False),
        (
            "bad_signature",
            False,
        ),  # asked again after "not yet seen"; and a forged receipt deserves another name
        ("(not refused)", False),
    ]


def test_the_screen_says_which_theft_went_well():
    """Would catch a table in which a success looks like a failure."""
    out = io.StringIO()
    screen = Screen(out)
    attempts = [
        Attempt("a forged thing", "bob", "wrong_signer", "wrong_signer", "not [his]"),
        Attempt("b", "alice", "expired", "(not refused)", ""),
    ]
    screen.attempt(attempts[0])
    assert "the thief at bob: a forged thing: wrong_signer (not [his])" in out.getvalue()
    screen.attempts(attempts)
    *_, first, second = out.getvalue().splitlines()
    assert first.split()[-2:] == ["wrong_signer", "nothing"]
    assert second.split()[-1] == "SOMETHING"
