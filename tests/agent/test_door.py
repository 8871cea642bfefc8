"""The door: every refusal by its name, in the order that costs least, and nothing that a stranger sends hurts a session."""

from dataclasses import replace

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data
from story import (
    CONSUMER,
    DOMAIN,
    OPERATOR,
    OTHER_CONSUMER,
    PORT,
    PROVIDER,
    SESSION_KEY,
    STRANGER,
    TERMS,
    Story,
    believed,
    connect,
    hash32,
    head,
    matched,
    orphaned,
    passes,
    seen,
    settles,
    stops,
)
from visit import PHONE, TWO_PORTS, Visit, at_the_plug, charging, closed

from agent import door as doors
from agent.core import events as ev
from agent.core import token as rules
from agent.core.events import StopReason
from agent.core.messages import (
    Accept,
    AckMessage,
    Final,
    ReadingMessage,
    Status,
    Stop,
    encode,
)
from agent.core.session import Stage
from agent.core.token import CURVE_ORDER
from agent.door import (
    CROWDS_MAX,
    GLOBAL_RATE,
    HELLO_LIFETIME_S,
    HELLO_ROTATE_S,
    HELLOS_MAX,
    SOURCE_RATE,
    SOURCES_MAX,
)

# ---- M0, M1, M2


def test_a_good_presentation_is_accepted_with_the_begin_register_already_on_disk():
    """M2 is the provider's promise: signed by the operator, over a challenge that holds the consumer's own nonce."""
    visit = at_the_plug()
    message = visit.present()
    hello = visit.door._hellos[PORT][-1].hello
    accept = visit.says(message)
    assert isinstance(accept, Accept)
    assert "SessionAccepted" in visit.story.kinds
    assert accept.challenge == rules.challenge(hello.typed, message.consumer_nonce)
    typed = rules.SessionAccept(
        accept.session_id,
        accept.challenge,
        accept.register_mwh_begin,
        accept.max_unacked_wh,
        accept.accepted_at_s,
    )
    assert rules.recover(rules.digest(DOMAIN, typed), accept.signature) == OPERATOR.address


def test_a_wallet_of_somebody_elses_making_presents_by_typed_data():
    """The digest is eth_account's, not ours: if they differed, no wallet could ever open the door."""
    visit = at_the_plug()
    draft = visit.present()
    hello = visit.door.hello(PORT)
    fields = {
        "token": draft.token,
        "sessionId": draft.session_id,
        "provider": PROVIDER.address,
        "sessionKey": draft.session_key,
        "maxEnergyWh": draft.max_energy_wh,
        "validUntil": draft.valid_until_s,
        "challenge": rules.challenge(hello.typed, draft.consumer_nonce),
    }
    kinds = [
        ("bytes32", "token"),
        ("bytes32", "sessionId"),
        ("address", "provider"),
        ("address", "sessionKey"),
    ]
    kinds += [("uint64", "maxEnergyWh"), ("uint64", "validUntil"), ("bytes32", "challenge")]
    signable = encode_typed_data(
        domain_data={
            "name": "V2VCharging",
            "version": "1",
            "chainId": DOMAIN.chain_id,
            "verifyingContract": "0x" + DOMAIN.contract.hex(),
        },
        message_types={"PresentToken": [{"type": kind, "name": name} for kind, name in kinds]},
        message_data=fields,
    )
    signature = bytes(Account.from_key(CONSUMER.private.secret).sign_message(signable).signature)
    assert isinstance(visit.says(replace(draft, signature=signature)), Accept)


def test_a_wallet_of_somebody_elses_making_presents_by_personal_sign():
    """The paper's signed token, as every wallet can do it: over the 32 raw bytes."""
    visit = at_the_plug()
    signed = Account.from_key(CONSUMER.private.secret).sign_message(encode_defunct(primitive=TERMS.token))
    message = visit.present(scheme="eip191", signature=bytes(signed.signature))
    assert isinstance(visit.says(message), Accept)
    visit.story.passes(10)
    own = visit.receipt(16, signer=CONSUMER)
    assert visit.says(own) == AckMessage(TERMS.session_id, 16)
    assert visit.refused(visit.receipt(18)) == "wrong_signer"


def test_a_bare_signature_over_the_token_opens_nothing():
    """A `token` equal to a transaction hash would otherwise be a signed transaction."""
    visit = at_the_plug()
    bare = CONSUMER.sign_digest(TERMS.token)
    for scheme in ("eip712", "eip191"):
        assert visit.refused(visit.present(scheme=scheme, signature=bare)) == "wrong_signer"


def compact(signature):
    """EIP-2098."""
    s = int.from_bytes(signature[32:64], "big") | ((signature[64] - 27) << 255)
    return signature[:32] + s.to_bytes(32, "big")


def twin(signature):
    """The high-s twin."""
    s = CURVE_ORDER - int.from_bytes(signature[32:64], "big")
    return signature[:32] + s.to_bytes(32, "big") + bytes([55 - signature[64]])


@pytest.mark.parametrize("spelled", [compact, lambda s: s[:64] + bytes([s[64] - 27])])
def test_the_normalised_spellings_of_a_signature_are_taken_and_kept_canonical(spelled):
    """What is journaled is what the contract accepts, whatever the phone sent."""
    visit = at_the_plug()
    message = visit.present()
    assert isinstance(visit.says(replace(message, signature=spelled(message.signature))), Accept)
    assert visit.story.session.presentation.signature == message.signature
    visit.story.passes(5)
    receipt = visit.receipt(6)
    assert isinstance(visit.says(replace(receipt, signature=spelled(receipt.signature))), AckMessage)
    assert visit.story.session.ack.receipt_signature == receipt.signature


@pytest.mark.parametrize("form", [33, 64, 65])
def test_the_public_key_is_taken_in_three_forms(form):
    """The paper sends it along; wallets spell it differently."""
    visit = at_the_plug()
    key = {33: CONSUMER.private.public_key.format(), 64: CONSUMER.public_key[1:], 65: CONSUMER.public_key}[
        form
    ]
    assert isinstance(visit.says(visit.present(public_key=key)), Accept)


# ---- every reason


def test_malformed():
    """Not our language, or not a consumer's sentence."""
    visit = at_the_plug()
    assert visit.refused(b"{}") == "malformed"
    assert visit.refused(encode(AckMessage(TERMS.session_id, 5))) == "malformed"
    assert visit.refused(visit.present(), sref="") == "malformed"
    assert visit.refused(visit.present(), sref="x" * 65, source="a") == "malformed"
    assert visit.refused(visit.present(), sref="a\nb", source="b") == "malformed"
    assert visit.refused(visit.present(public_key=b"\x04" + bytes(64))) == "malformed"
    assert visit.refused(visit.present(scheme="eip191", session_key=SESSION_KEY.address)) == "malformed"
    assert visit.refused(visit.present(max_energy_wh=0)) == "malformed"


def test_rate_limited_by_source():
    """A burst, then five a second; another source is not concerned."""
    visit = at_the_plug()
    stranger = encode(visit.receipt(1))
    for _ in range(int(SOURCE_RATE[0])):
        assert visit.refused(stranger, source="flood") == "unknown_session"
    assert visit.refused(stranger, source="flood") == "rate_limited"
    assert visit.refused(stranger, source="calm") == "unknown_session"
    visit.story.passes(1)
    assert visit.refused(stranger, source="flood") == "unknown_session"


def test_rate_limited_altogether_but_never_at_the_cost_of_a_running_session():
    """Rule 5: a flood from a thousand sources must not keep an honest consumer's receipts out."""
    visit = charging()
    visit.story.passes(10)
    stranger = encode(Stop(hash32("nobody"), 1, b"\x11" * 65))
    reasons = [visit.refused(stranger, "s", f"mqtt:flood {n}") for n in range(int(GLOBAL_RATE[0]) + 5)]
    assert reasons[-1] == "rate_limited"
    about_it = encode(visit.stop(STRANGER))
    reasons = [visit.refused(about_it, "s", f"mqtt:crowd {n}") for n in range(int(GLOBAL_RATE[0]) + 5)]
    assert reasons[-1] == "rate_limited"
    assert visit.says(visit.receipt(20), source=f"mqtt:{PHONE}") == AckMessage(TERMS.session_id, 20)


def test_noise_about_nothing_keeps_no_newcomer_out():
    """Session ids that do not exist cost nothing to invent: their flood must not use up what a real token needs."""
    visit = at_the_plug()
    stranger = encode(Stop(hash32("nobody"), 1, b"\x11" * 65))
    while visit.says(stranger, "s", f"mqtt:flood {visit.drawn}").reason != "rate_limited":
        visit.drawn += 1
    assert isinstance(visit.says(visit.present(), source=f"mqtt:{PHONE}"), Accept)


def test_a_flood_on_the_broker_leaves_the_web_server_open():
    """Forgeries of the very session, from ever new addresses of an open broker, must leave the phone another way."""
    visit = at_the_plug()
    forged = encode(replace(visit.present(), signature=b"\x11" * 65))
    reasons = [visit.refused(forged, "s", f"mqtt:flood {n}") for n in range(int(GLOBAL_RATE[0]) + 5)]
    assert (reasons[0], reasons[-1]) == ("bad_signature", "rate_limited")
    good = visit.present()
    assert visit.refused(good, source=f"mqtt:{PHONE}") == "rate_limited"
    assert isinstance(visit.says(good, source="http:192.0.2.7"), Accept)


def test_rate_buckets_do_not_grow_with_the_flood():
    """A thousand and one spoofed sources must not fill the memory of a car."""
    visit = at_the_plug()
    for n in range(SOURCES_MAX + 50):
        visit.says(Stop(hash32("nobody"), 1, b"\x11" * 65), "s", f"transport {n}:source {n}")
    assert len(visit.door._sources) == SOURCES_MAX
    assert len(visit.door._crowds) == CROWDS_MAX


def test_not_yet_seen():
    """Before the chain shows it there is nothing to keep; the client comes back."""
    visit = Visit(Story() >> head() >> passes(2))
    assert visit.refused(visit.present()) == "not_yet_seen"
    _ = visit.story >> seen()
    assert visit.says(visit.present()).stage == "waiting"


def test_not_yet_seen_while_a_reorg_has_taken_the_session_away():
    """`wrong_token` would send the consumer home; its new token is only seconds away."""
    visit = Visit(matched() >> orphaned())
    again = connect(fork=1)
    assert visit.refused(visit.present()) == "not_yet_seen"
    assert visit.refused(visit.present(again)) == "not_yet_seen"
    _ = visit.story >> seen(again)
    assert visit.refused(visit.present()) == "wrong_token"
    assert visit.says(visit.present(again)).stage == "waiting"
    visit.story = visit.story >> believed(again) >> passes(2)
    assert visit.story.delivering


def test_unknown_session():
    """Receipts and stops need a presented token."""
    visit = at_the_plug()
    assert visit.refused(visit.receipt(1)) == "unknown_session"
    assert visit.refused(visit.stop()) == "unknown_session"


def test_wrong_token():
    """The token of another block, or of nothing."""
    visit = at_the_plug()
    assert visit.refused(visit.present(token=hash32("another"))) == "wrong_token"


def test_too_late_and_expired():
    """First too little time is left, then none; and a grant may end before the token."""
    visit = at_the_plug()
    assert visit.refused(visit.present(valid_until_s=visit.story.at_s)) == "expired"
    late = Visit(Story() >> seen())
    for left_s, reason in ((60, "too_late"), (1, "too_late"), (0, "expired")):
        _ = late.story >> head(at_s=TERMS.valid_until_s - left_s)
        assert late.refused(late.present()) == reason


def test_unknown_charger():
    """A Hello of a port that is not here."""
    visit = at_the_plug()
    assert visit.refused(visit.present(charger_id=rules.charger_id("roof"))) == "unknown_charger"


def test_stale_hello():
    """A nonce we never gave, one of another port, or one that was photographed yesterday."""
    visit = at_the_plug(policy=TWO_PORTS)
    assert visit.refused(visit.present(hello_nonce=hash32("invented"))) == "stale_hello"
    other = visit.door.hello("right")
    assert visit.refused(visit.present(hello_nonce=other.nonce)) == "stale_hello"
    old = visit.present()
    visit.story.passes(HELLO_LIFETIME_S)
    assert visit.refused(old) == "stale_hello"


def test_a_restart_forgets_every_hello():
    """They are not journaled, so none of them may be good twice."""
    visit = at_the_plug()
    message = visit.present()
    again = Visit(visit.story.restarts() >> head() >> passes(2))
    assert again.refused(message) == "stale_hello"


def test_replayed():
    """A used nonce is used up, whoever sends it."""
    visit = charging()
    hello = visit.door._hellos[PORT][0].hello
    assert visit.refused(visit.present(hello=hello)) == "replayed"


def test_replayed_by_somebody_who_saw_a_personal_sign():
    """It binds only the token: from another address it must not redirect the session's answers."""
    visit = at_the_plug()
    message = visit.present(scheme="eip191")
    assert isinstance(visit.says(message), Accept)
    stolen = visit.present(scheme="eip191", signature=message.signature)
    assert visit.refused(stolen, sref="thief") == "replayed"
    visit.story.passes(10)
    assert isinstance(visit.says(stolen), Accept), "its own consumer may come again"


def test_a_presentation_is_not_a_way_to_fill_the_disk():
    """Every accepted presentation is a journal row: a paying consumer gets one in ten seconds, not five a second."""
    visit = charging()
    visit.story.passes(10)
    rows = len(visit.story.journal)
    answers = [visit.says(visit.present()) for _ in range(3)]
    assert [type(answer).__name__ for answer in answers] == ["Accept", "Refusal", "Refusal"]
    assert len(visit.story.journal) == rows + 1
    visit.story.passes(10)
    assert isinstance(visit.says(visit.present()), Accept)


def test_busy():
    """One session per port, and one port per session."""
    visit = charging(policy=TWO_PORTS)
    other = connect(2, consumer=OTHER_CONSUMER)
    _ = visit.story >> seen(other) >> believed(other)
    assert visit.refused(visit.present(other, wallet=OTHER_CONSUMER), sref="other") == "busy"
    assert visit.refused(visit.present(port="right")) == "busy"
    assert isinstance(visit.says(visit.present(other, wallet=OTHER_CONSUMER, port="right"), "other"), Accept)


def test_out_of_order():
    """A port whose contactor did not open waits for a technician."""
    visit = charging()
    visit.story.passes(5)
    visit.story.outlet.welded = True
    (visit.story >> stops()).passes(40)
    other = connect(2, consumer=OTHER_CONSUMER)
    _ = visit.story >> seen(other) >> believed(other)
    assert visit.refused(visit.present(other, wallet=OTHER_CONSUMER)) == "out_of_order"


@pytest.mark.parametrize("scheme", ["eip712", "eip191"])
def test_bad_signature(scheme):
    """High s, an impossible v, or no point: what the contract would refuse is refused here."""
    visit = at_the_plug()
    good = visit.present(scheme=scheme)
    for signature in (twin(good.signature), good.signature[:64] + b"\x25", bytes(65)):
        assert visit.refused(replace(good, signature=signature)) == "bad_signature"
    assert isinstance(visit.says(good), Accept), "the nonce was not used up by any of them"


def test_wrong_signer():
    """Somebody else's signature, or somebody else's public key."""
    visit = at_the_plug()
    assert visit.refused(visit.present(sign=STRANGER)) == "wrong_signer"
    assert visit.refused(visit.present(wallet=STRANGER)) == "wrong_signer"
    assert visit.refused(visit.present(public_key=STRANGER.public_key)) == "wrong_signer"


SIGNED_FIELDS = {
    "session_key": STRANGER.address,
    "max_energy_wh": 6_000,
    "valid_until_s": TERMS.valid_until_s + 1,
    "consumer_nonce": hash32("other"),
}


@pytest.mark.parametrize("field", SIGNED_FIELDS)
def test_every_field_of_a_presentation_is_under_the_signature(field):
    """A broker that exchanges the session key would sign the consumer's receipts."""
    visit = at_the_plug()
    assert visit.refused(visit.present(**{field: SIGNED_FIELDS[field]})) == "wrong_signer"


def test_over_order_and_ahead_of_meter():
    """Receipts above the order, or above what the meter shows."""
    visit = charging()
    visit.story.passes(10)
    assert visit.refused(visit.receipt(1_001)) == "over_order"
    assert visit.refused(visit.receipt(21)) == "ahead_of_meter"
    assert visit.says(visit.receipt(20)) == AckMessage(TERMS.session_id, 20)


def test_over_grant():
    """Said by its name and before the meter is asked: a receipt that the key may not sign does not get better by waiting."""
    visit = at_the_plug()
    small = visit.present()
    hello = visit.door.hello(PORT)
    typed = rules.PresentToken(
        small.token,
        small.session_id,
        PROVIDER.address,
        small.session_key,
        30,
        small.valid_until_s,
        rules.challenge(hello.typed, small.consumer_nonce),
    )
    assert isinstance(visit.says(replace(small, max_energy_wh=30, signature=CONSUMER.sign(typed))), Accept)
    visit.story.passes(20)
    assert visit.refused(visit.receipt(31)) == "over_grant"
    assert visit.says(visit.receipt(30)) == AckMessage(TERMS.session_id, 30)


def test_too_late_for_a_receipt():
    """Once the settlement is signed, a higher receipt could not be collected any more."""
    visit = charging()
    visit.story.passes(10)
    visit.says(visit.receipt(10))
    story = (visit.story >> stops()).passes(25) >> settles()
    assert story.stage is Stage.SETTLING
    assert visit.refused(visit.receipt(20)) == "too_late"


# ---- order of the checks


def test_a_bad_signature_uses_up_no_nonce():
    """Otherwise a stranger at the gate burns every Hello before its owner can sign it."""
    visit = at_the_plug()
    good = visit.present()
    for _ in range(3):
        assert visit.refused(replace(good, signature=STRANGER.sign_digest(hash32("x")))) == "wrong_signer"
        visit.story.passes(1)
    assert isinstance(visit.says(good), Accept)


def test_cheap_checks_come_before_dear_ones(monkeypatch):
    """A recovery costs a hundred microseconds: nothing that can be refused without one may reach it."""
    visit = charging()
    visit.story.passes(3)

    def dear(*_):
        raise AssertionError("a public key was recovered for a message that a cheaper check refuses")

    good = visit.present()
    monkeypatch.setattr(rules, "recover_public_key", dear)
    cheap = {
        "malformed": b"[]",
        "not_yet_seen": replace(good, session_id=hash32("no")),
        "wrong_token": replace(good, token=hash32("no")),
        "unknown_charger": replace(good, charger_id=hash32("no")),
        "stale_hello": replace(good, hello_nonce=hash32("no")),
        "replayed": visit.present(hello=visit.door._hellos[PORT][0].hello),
        "bad_signature": replace(good, signature=bytes(65)),
        "over_order": visit.receipt(2_000),
        "ahead_of_meter": visit.receipt(900),
    }
    for number, (reason, message) in enumerate(cheap.items()):
        assert visit.refused(message, source=f"{number}") == reason


@pytest.fixture
def checks(monkeypatch):
    """The checks that ran since it was cleared, in their order."""
    ran = []

    def counted(room, name, check):
        real = getattr(room, name)

        def counting(*arguments, **more):
            ran.append(check)
            return real(*arguments, **more)

        monkeypatch.setattr(room, name, counting)

    counted(doors, "decode", "schema")
    counted(doors.Door, "_limit", "rate")
    counted(doors.Door, "_present", "session")
    counted(doors.Door, "_session_of", "session")
    counted(doors.Door, "_live_hello", "nonce")
    counted(rules, "normalised", "canonical")
    counted(rules, "recover_public_key", "recover")
    return ran


def test_every_kind_of_garbage_gets_as_far_as_protocol_section_4_lets_it(checks):
    """Size and schema, rate, session, nonce, canonical form, recovery: would catch two of them changing places."""
    visit = charging()
    visit.story.passes(10)
    good = visit.present()
    stale = replace(good, hello_nonce=hash32("no"))
    high_s = replace(good, signature=twin(good.signature))
    forged = replace(good, signature=STRANGER.sign_digest(hash32("x")))
    furthest = {
        "malformed": (b"x" * 5_000, ["schema"]),
        "not_yet_seen": (replace(good, session_id=hash32("no")), ["schema", "rate", "session"]),
        "unknown_session": (
            replace(visit.receipt(5), session_id=hash32("no")),
            ["schema", "rate", "session"],
        ),
        "ahead_of_meter": (visit.receipt(900), ["schema", "rate", "session"]),
        "stale_hello": (stale, ["schema", "rate", "session", "nonce"]),
        "bad_signature": (high_s, ["schema", "rate", "session", "nonce", "canonical"]),
        "wrong_signer": (forged, ["schema", "rate", "session", "nonce", "canonical", "recover"]),
    }
    for number, (reason, (message, expected)) in enumerate(furthest.items()):
        checks.clear()
        assert visit.refused(message, source=f"mqtt:{number}") == reason
        assert checks == expected, reason
    for _ in range(int(SOURCE_RATE[0])):
        visit.says(forged, source="mqtt:eager")
    checks.clear()
    assert visit.refused(forged, source="mqtt:eager") == "rate_limited"
    assert checks == ["schema", "rate"], "nothing dear for who is over his rate"


def test_the_schema_is_checked_before_the_rate_so_noise_spends_nobodys_budget():
    """Bytes that are no message are refused for microseconds and do not empty a source's bucket."""
    visit = at_the_plug()
    for _ in range(50):
        assert visit.refused(b"noise", source="one") == "malformed"
    assert isinstance(visit.says(visit.present(), source="one"), Accept)


# ---- repeats


def test_a_byte_identical_repeat_gets_the_same_answer_although_its_nonce_is_used():
    """The answer was lost on the way: the consumer asks again, and must not be told `replayed`."""
    visit = at_the_plug()
    message = encode(visit.present())
    first = visit.says(message)
    rows = len(visit.story.journal.events)
    assert visit.says(message) == first
    assert visit.says(message, source="elsewhere") == first
    assert len(visit.story.journal.events) == rows


def test_a_byte_identical_repeat_survives_a_restart():
    """Its digest is journaled; the door itself remembers nothing."""
    visit = at_the_plug()
    message = encode(visit.present())
    first = visit.says(message)
    again = Visit(visit.story.restarts() >> head() >> passes(3))
    assert again.says(message) == first


def test_a_repeated_receipt_is_acknowledged_again_and_written_once():
    """Transports deliver at least once."""
    visit = charging()
    visit.story.passes(10)
    assert visit.says(visit.receipt(20)) == AckMessage(TERMS.session_id, 20)
    rows = len(visit.story.journal.events)
    assert visit.says(visit.receipt(20)) == AckMessage(TERMS.session_id, 20)
    assert visit.says(visit.receipt(12)) == AckMessage(TERMS.session_id, 20)
    assert len(visit.story.journal.events) == rows


def test_a_receipt_is_on_disk_before_it_is_acknowledged():
    """The consumer's proof of payment must survive our power cut."""
    visit = charging()
    visit.story.passes(10)
    visit.story.journal.fail_next = True
    with pytest.raises(OSError, match="disk"):
        visit.says(visit.receipt(20))
    assert visit.story.session.energy_wh_acked == 0


# ---- stops


@pytest.mark.parametrize("signer", [CONSUMER, SESSION_KEY])
def test_the_consumer_stops_with_either_of_its_keys(signer):
    """From the wallet or from the phone's session key."""
    visit = charging()
    visit.story.passes(5)
    answer = visit.says(visit.stop(signer))
    assert isinstance(answer, Status)
    assert (answer.stage, answer.reason) == (Stage.STOPPING, StopReason.REMOTE)
    assert not visit.story.delivering


@pytest.mark.parametrize("signer", [STRANGER, PROVIDER, OPERATOR])
def test_nobody_else_stops_it(signer):
    """Rule 5: strangers cannot end a session."""
    visit = charging()
    assert visit.refused(visit.stop(signer)) == "wrong_signer"
    assert visit.story.delivering


def test_a_stop_said_twice_is_one_stop():
    """The first answer may get lost."""
    visit = charging()
    visit.story.passes(5)
    first = visit.says(visit.stop())
    rows = len(visit.story.journal.events)
    assert visit.says(visit.stop()) == first
    assert len(visit.story.journal.events) == rows


# ---- hellos


def test_a_hello_rotates_and_is_signed_by_the_operator():
    """A photographed code is stale soon, and only the operator can make one."""
    visit = at_the_plug()
    first = visit.door.hello(PORT)
    assert rules.recover(rules.digest(DOMAIN, first.typed), first.signature) == OPERATOR.address
    assert first.expires_at_s == visit.story.live.at_s + HELLO_LIFETIME_S
    visit.story.passes(HELLO_ROTATE_S - 1)
    assert visit.door.hello(PORT) is first
    visit.story.passes(1)
    second = visit.door.hello(PORT)
    assert second.nonce != first.nonce
    assert isinstance(visit.says(visit.present(hello=first)), Accept), "the one before is still good"


def test_a_used_hello_is_replaced_at_once():
    """The next customer must find a fresh one."""
    visit = charging()
    used = visit.door._hellos[PORT][-1].hello
    assert visit.door.hello(PORT).nonce != used.nonce


def test_hellos_do_not_pile_up():
    """Whoever asks all night gets the same few."""
    visit = at_the_plug()
    for _ in range(50):
        visit.story.passes(HELLO_ROTATE_S)
        visit.door.hello(PORT)
    assert len(visit.door._hellos[PORT]) <= HELLOS_MAX


# ---- strangers and the end


def test_its_consumer_hears_the_end_whatever_it_asks():
    """The final message is the receipt of the whole evening."""
    visit = closed()
    for message in (visit.present(), visit.receipt(30), visit.stop()):
        final = visit.says(message)
        assert isinstance(final, Final)
        assert (final.delivered_wh, final.settled_wh, final.stage) == (20, 20, Stage.SETTLED)
    assert (PHONE, final) in visit.door.news()


def test_a_stranger_hears_nothing_of_the_end():
    """Session ids are public; records carry signatures and the consumer's address."""
    visit = closed()
    for message in (visit.present(), visit.receipt(30), visit.stop(STRANGER)):
        assert visit.refused(message, sref="stranger") == "too_late"
    _ = visit.story >> head(at_s=TERMS.valid_until_s)
    assert visit.refused(visit.present(), sref="stranger") == "expired"


def test_the_news_ends_a_day_later():
    """Or every restart for ever would publish every session of the car's life."""
    visit = closed()
    visit.story.leaps(25 * 3600)
    _ = visit.story >> head()
    assert visit.door.news() == ()


# ---- news


def test_news_says_where_it_stands_until_it_ends():
    """Level-triggered: whoever missed a message reads the next one and knows everything."""
    visit = charging()
    visit.story.passes(10)
    visit.says(visit.receipt(20))
    kinds = [type(message) for sref, message in visit.door.news() if sref == PHONE]
    assert kinds == [Status, Accept, ReadingMessage, AckMessage]


def test_a_reading_is_signed_counted_and_not_renewed_without_reason():
    """Each signature costs; each sequence number is used once, over restarts too."""
    visit = charging()
    visit.story.passes(5)
    first = reading_of(visit)
    assert reading_of(visit) is first
    visit.story.passes(1)
    second = reading_of(visit)
    assert (second.seq, second.delivered_wh) == (first.seq + 1, first.delivered_wh + 2)
    typed = rules.MeterReading(
        second.session_id, second.seq, second.delivered_wh, second.power_w, second.at_s
    )
    assert rules.recover(rules.digest(DOMAIN, typed), second.signature) == OPERATOR.address
    again = Visit(visit.story.restarts() >> head() >> passes(3))
    assert reading_of(again).seq > second.seq


def reading_of(visit):
    """The newest reading in the news."""
    (reading,) = [message for _, message in visit.door.news() if isinstance(message, ReadingMessage)]
    return reading


def test_status_names_what_a_pause_waits_for():
    """The phone must be able to say: sign."""
    visit = charging()
    visit.story.passes(60)
    (status,) = [message for _, message in visit.door.news() if isinstance(message, Status)]
    assert (status.stage, status.reason) == (Stage.PAUSED, "waiting_for_receipt")


def test_after_a_reorg_the_old_accept_is_not_offered_as_the_new_one():
    """It signs the old challenge; the consumer would refuse the provider as an impostor."""
    visit = charging()
    visit.story.passes(3)
    again = connect(fork=1)
    visit.story.outlet.armed = False
    _ = visit.story >> orphaned() >> passes(3) >> seen(again) >> believed(again)
    assert visit.story.stage is Stage.MATCHED
    assert not [message for _, message in visit.door.news() if isinstance(message, Accept)]


def test_no_message_of_a_stranger_changes_a_running_session():
    """Rule 5 as a whole: everything above, sent at a session that charges, leaves it byte for byte as it was."""
    visit = charging()
    visit.story.passes(5)
    before = visit.story.session
    for number, message in enumerate(
        (
            b"noise",
            visit.present(sign=STRANGER),
            visit.present(wallet=STRANGER),
            visit.receipt(10, STRANGER),
            visit.stop(STRANGER),
            replace(visit.receipt(10), signature=twin(visit.receipt(10).signature)),
        )
    ):
        visit.refused(message, sref="stranger", source=f"{number}")
    assert visit.story.session is before
    assert visit.story.delivering
    assert "TokenPresented" not in visit.story.kinds[visit.story.kinds.index("DeliveryBegan") :]
    assert ev.StopDecided not in {type(event) for event in visit.story.journal.events}
