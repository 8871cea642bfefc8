"""The verifier: an honest file is proven, and whoever changes anything meets a check that says so."""

import json
from dataclasses import fields, is_dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from proof import OPERATOR, SPKI, pay, session_id_of, settled, settling, sign_settlement
from story import DOMAIN, PROVIDER, STRANGER, at, believed, closing, connect, head, orphaned, seen

from agent.core import events as ev
from agent.core.session import Stage
from agent.errors import Refused
from agent.evidence import canonical, digest, evidence
from agent.verify import parsed_meter_key, verify

NAMES = [
    "form", "digest", "sections", "token", "presentation", "receipts", "records", "registers", "settlements", "payment",
]  # fmt: skip


def file_of(events):
    """The file of these events, as a forger with our own program would write it."""
    return canonical(evidence(DOMAIN, PROVIDER.address, session_id_of(events), events))


def failed(data, **known):
    """Names of the checks that do not hold."""
    return [check.name for check in verify(data, **known) if not check.ok]


HONEST = settled()
FILE = file_of(HONEST)
OTHER = settled(2)


def test_an_honest_file_is_proven():
    """Would catch a verifier that nobody can satisfy, and one that asks nothing."""
    checks = verify(FILE, signer=OPERATOR.address, meter_key=SPKI)
    assert [check.name for check in checks] == NAMES
    assert all(check.ok for check in checks), checks
    details = {check.name: check.detail for check in checks}
    assert "rising to 20 Wh" in details["receipts"]
    assert "the operator" in details["settlements"]


def replaced_settlement():
    """Too little gas at first: signed again with the same nonce."""
    story = settling()
    sign_settlement(story)
    sign_settlement(story, fee_wei=2 * 10**9)
    pay(story)
    return story.journal.events


def closed_by_the_consumer():
    """The consumer concedes more than it signed for, and its own transaction ends it."""
    story = settling() >> closing(20)
    pay(story, settled_wh=20, tx_hash=b"\x07" * 32)
    return story.journal.events


def re_mined():
    """A reorganisation gave it another token in the middle."""
    story = settling(order_wh=40)
    session = story.session
    again = connect(1, order_wh=40, issued_at_s=session.terms.issued_at_s, fork=12, number=103)
    story = story >> orphaned(session.terms) >> head() >> seen(again) >> believed(again)
    sign_settlement(story)
    pay(story)
    return story.journal.events


HONEST_STORIES = {
    "signed by the wallet": lambda: settled(session_key=None),
    "settled by the owner's key": lambda: tuple(paid_by_owner()),
    "a no-show": lambda: tuple(no_show()),
    "a replacement": replaced_settlement,
    "closed by the consumer": closed_by_the_consumer,
    "another token after a reorganisation": re_mined,
    "not over yet": lambda: [*settling().journal.events],
}


def paid_by_owner():
    """The provider's own key settles: no operator was named."""
    from agent.keys import Signer

    story = settling()
    sign_settlement(story, signer=Signer(PROVIDER.private))
    pay(story)
    return story.journal.events


def no_show():
    """Nobody came: 0 Wh."""
    story = at(Stage.MATCHED)
    story.leaps(4 * 3600)
    story = story >> head()
    sign_settlement(story)
    pay(story)
    return story.journal.events


@pytest.mark.parametrize("what", HONEST_STORIES)
def test_every_honest_way_through_a_session_is_proven(what):
    """Would catch a verifier that cries forgery at a reorganisation or at a wallet without a session key."""
    data = file_of(HONEST_STORIES[what]())
    assert failed(data) == [], verify(data)


# ---- any change of the file


@given(st.integers(0, len(FILE) - 1), st.integers(1, 255))
def test_one_flipped_byte_anywhere_is_found(place, flip):
    """Would catch a value that no check looks at: what a copying error or a hex editor leaves."""
    data = bytearray(FILE)
    data[place] ^= flip
    assert failed(bytes(data))


@given(st.data())
def test_removed_added_repeated_and_reordered_events_are_found(data):
    """Would catch a receipt left out, a pause put in, a stop moved before its cause; the forger writes a whole new file."""
    events, number = list(HONEST), data.draw(st.integers(0, len(HONEST) - 1))
    match data.draw(st.sampled_from(["remove", "repeat", "swap", "insert"])):
        case "remove":
            del events[number]
        case "repeat":
            events.insert(data.draw(st.integers(0, len(events))), events[number])
        case "swap":
            other = data.draw(st.integers(0, len(HONEST) - 1).filter(lambda other: other != number))
            events[number], events[other] = events[other], events[number]
        case "insert":
            stranger = data.draw(st.sampled_from(OTHER))
            events.insert(data.draw(st.integers(0, len(events))), stranger)
    content = json.loads(FILE)
    content["events"] = [json.loads(canonical(row)) for row in rows_of(events)]
    assert failed(canonical(content)), "with the old sections around it"


def rows_of(events):
    """The events as a file holds them."""
    from agent.rows import encoded

    return [{"kind": type(event).__name__, "body": encoded(event)} for event in events]


def test_an_empty_or_foreign_file_is_no_traceback():
    """Would catch a verifier that can be crashed by what it is shown."""
    for data in (b"", b"{}", b"[]", b"\xff", b"null", b'{"market": 5}', FILE[:-100], b"[" * 200_000):
        assert failed(data) == ["form"]


JUNK = st.one_of(
    st.none(),
    st.integers(-(2**300), 2**300),
    st.text(max_size=5),
    st.binary(max_size=70).map(lambda data: "0x" + data.hex()),
    st.just([]),
    st.just({}),
    st.floats(allow_nan=False),
)


def places(value, path=()):
    """Every place in a JSON value where something else may stand."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*path, key)
        yield from places(inner, (*path, key))


PLACES = list(places(json.loads(FILE)))


@given(st.sampled_from(PLACES), JUNK)
def test_junk_anywhere_is_answered_and_never_a_traceback(path, junk):
    """Would catch a verifier that a stranger's file can crash: 2^300 Wh, null for a signature, a list for a name."""
    content = json.loads(FILE)
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    if holder[path[-1]] == junk:
        return
    holder[path[-1]] = junk
    assert failed(canonical(content))
    assert verify(canonical(content | {"digest": digest(content)})), (
        "answered, also where the digest fits again"
    )


# ---- a forger who has our program: everything derived fits again, and the digest too


def leaves(value, path=()):
    """Every single value inside an event: (path, value)."""
    if is_dataclass(value):
        for field in fields(value):
            yield from leaves(getattr(value, field.name), (*path, field.name))
    else:
        yield path, value


def changed(value):
    """Another value of the same kind."""
    match value:
        case bool():
            return not value
        case int():
            return value + 1
        case bytes():
            return value[:-1] + bytes([value[-1] ^ 1]) if value else b"\x01"
        case ev.StopReason():
            return ev.StopReason.OTHER
        case "begin" | "end":
            return "end" if value == "begin" else "begin"
        case "eip712":
            return "eip191"
        case str():
            return value + "x"


def with_change(item, path, value):
    """The same dataclass with one value inside replaced."""
    name, *rest = path
    inner = value if not rest else with_change(getattr(item, name), rest, value)
    return replace(item, **{name: inner})


# What nobody signs and nothing contradicts: only the chain (or the digest that `export` printed) can tell.
UNSIGNED = {
    "energy_wh_ordered",  # upwards; below what was delivered it contradicts
    "block_number", "block_hash", "log_index", "bond_wei", "deposit_wei", "rate_wei_per_kwh",  # the chain's own facts
    "sref", "digest", "detail", "reason", "life", "scheme",  # how it went, not what is owed
}  # fmt: skip
TIMES_IN_RECORDS = {"SessionAccepted", "DeliveryEnded"}  # other `at_s` are in nobody's signature


def is_bound(event, path):
    """Is this value held by a signature or by arithmetic?"""
    name = path[-1]
    if name == "at_s":
        return type(event).__name__ in TIMES_IN_RECORDS
    if path in (("terms", "tx_hash"), ("presentation", "digest")):
        return False
    if (type(event), name) == (ev.ConnectionEndedSeen, "tx_hash"):
        return False  # anybody may have settled
    return name not in UNSIGNED


BOUND = [
    (number, path)
    for number, event in enumerate(HONEST)
    for path, _ in leaves(event)
    if is_bound(event, path)
]


def forged(number, path):
    """The file with one value changed and all that follows from it made to fit; None when that cannot even be written."""
    events = list(HONEST)
    value = dict(leaves(events[number]))[path]
    events[number] = with_change(events[number], list(path), changed(value))
    try:
        return file_of(events)
    except (AssertionError, Refused, KeyError, OverflowError):
        return None


def test_every_value_that_matters_is_held_by_more_than_the_digest():
    """Would catch a Wh, register, key, nonce or amount that a forger can change with our own program."""
    assert len(BOUND) > 120
    unseen = []
    for number, path in BOUND:
        data = forged(number, path)
        if data is not None and not failed(data):
            unseen.append(f"{number} {type(HONEST[number]).__name__}.{'.'.join(path)}")
    assert unseen == []


def test_the_list_of_what_nobody_signs_is_honest():
    """Would catch a value that is held after all, and is told to owners as if it were not (or the other way round)."""
    free = {
        path[-1]
        for number, event in enumerate(HONEST)
        for path, _ in leaves(event)
        if not is_bound(event, path) and (data := forged(number, path)) is not None and not failed(data)
    }
    assert free >= {"at_s", "log_index", "bond_wei", "sref", "detail"}


SWAPS = [
    ("a receipt", ev.ReceiptCredited, "receipts"),
    ("the records", ev.MeterRecordSigned, "records"),
    ("the settlement", ev.SettlementSigned, "settlements"),
    ("the presentation", ev.TokenPresented, "presentation"),
]


@pytest.mark.parametrize(("what", "kind", "check"), SWAPS, ids=[one[0] for one in SWAPS])
def test_what_belongs_to_another_session_is_found(what, kind, check):
    """Would catch a bill that shows a real signature, of another evening."""
    others = iter([event for event in OTHER if isinstance(event, kind)])
    own_id = session_id_of(HONEST)
    events = [replace(next(others), session_id=own_id) if isinstance(e, kind) else e for e in HONEST]
    try:
        data = file_of(events)
    except Refused:
        return
    assert check in failed(data) or "form" in failed(data)


# ---- liars with keys of their own


def test_a_settlement_signed_by_somebody_else_is_found_by_who_names_the_operator():
    """Would catch a transaction that a thief of the file signed."""
    assert failed(FILE, signer=STRANGER.address) == ["settlements"]
    assert failed(FILE, signer=OPERATOR.address) == []


def test_another_meter_is_found_by_who_knows_the_meter():
    """Would catch records that were signed again with a key made up at home."""
    assert failed(FILE, meter_key=SPKI[:23] + STRANGER.public_key) == ["records"]
    events = [
        replace(event, public_key=SPKI[:23] + STRANGER.public_key)
        if isinstance(event, ev.MeterRecordSigned) and event.moment == "end"
        else event
        for event in settling().journal.events
    ]
    assert failed(file_of(events)) == ["records"]


LIES = {
    "another chain": {"chainId": 1},
    "another contract": {"to": b"\x11" * 20},
    "money along": {"value": 1},
    "other calldata": {"data": b"\x00" * 68},
    "another nonce than journaled": {"nonce": 8},
    "other fees than journaled": {"maxFeePerGas": 5 * 10**9},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_transaction_that_does_something_else_is_found(lie):
    """Would catch raw bytes that are not what stands beside them."""
    story = settling()
    sign_settlement(story, **LIES[lie])
    pay(story)
    assert failed(file_of(story.journal.events)) == ["settlements"]


def test_a_fee_that_is_not_rate_times_energy_is_found():
    """Would catch a bill with a surcharge."""
    events = [
        replace(event, fee_wei=event.fee_wei + 1) if isinstance(event, ev.ConnectionEndedSeen) else event
        for event in HONEST
    ]
    assert failed(file_of(events)) == ["payment"]


def test_paid_with_more_than_was_claimed_is_found():
    """Would catch a settled amount that our own transaction never asked for."""
    story = settling(order_wh=20)
    sign_settlement(story)
    pay(story, settled_wh=19)
    assert "payment" in failed(file_of(story.journal.events))


@given(st.binary(max_size=300))
def test_no_bytes_crash_the_reader_of_transactions(raw):
    """Would catch a raw transaction that takes the verifier down instead of being refused."""
    events = [
        replace(event, raw_tx=b"\x02" + raw) if isinstance(event, ev.SettlementSigned) else event
        for event in HONEST
    ]
    assert "settlements" in failed(file_of(events))


def test_a_meter_key_is_read_as_people_have_it():
    """Would catch a key that only our own spelling of it fits."""
    import base64

    for text in (SPKI.hex(), "0x" + SPKI.hex(), base64.b64encode(SPKI).decode()):
        assert parsed_meter_key(text) == SPKI
    with pytest.raises(ValueError, match=r"."):
        parsed_meter_key("no key!")
