"""Stories of the views: an owner sees what happens, and nobody sees what is private."""

import json
from dataclasses import fields, is_dataclass
from enum import StrEnum
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plug import PORT, RATE_WEI_PER_KWH, SREF, Plug

from agent import views
from agent.core import events as ev
from agent.core.units import cost_wei_floor, hex0x


@pytest.fixture
def plug(tmp_path):
    """A provider with time in our hands."""
    clock = {"ms": 1_000_000}
    plug = Plug(tmp_path, monotonic_ms=lambda: clock["ms"])
    plug.clock = clock
    yield plug
    plug.close()


def seen(plug):
    """The status as JSON text and as values."""
    status = views.status(plug.engine.book, plug.engine.live)
    return json.dumps(status), status


def test_owner_sees_energy_and_money_of_a_running_session(plug):
    """Would catch a status that shows other Wh or other wei than the meter and the contract's arithmetic."""
    terms = plug.delivering()
    plug.door.answer(SREF, "a test", plug.receipt(terms, 7))
    _, status = seen(plug)
    port = status["ports"][PORT]
    assert port["stage"] == "DELIVERING"
    assert port["power_w"] == 11_000
    assert port["register_mwh"] == 5_012_345
    assert port["pilot_state"] == "C"
    assert port["armed"]
    assert port["locked"] is None
    assert port["reason"] is None
    shown = port["session"]
    assert shown["session_id"] == hex0x(terms.session_id)
    assert (shown["energy_wh_ordered"], shown["energy_wh_delivered"], shown["energy_wh_acked"]) == (
        1000,
        12,
        7,
    )
    assert shown["cost_wei"] == str(cost_wei_floor(RATE_WEI_PER_KWH, 12))
    assert shown["secured_wei"] == str(cost_wei_floor(RATE_WEI_PER_KWH, 7))
    assert status["sessions"] == [shown]
    assert status["chain"]["is_fresh"]
    assert status["chain"]["block"] == 101


def test_status_and_telemetry_hold_nothing_private(plug):
    """Would catch a full address, signature, challenge, token, nonce or return address in what an owner's tools may store."""
    terms = plug.delivering()
    plug.door.answer(SREF, "a test", plug.receipt(terms, 7))
    session = plug.engine.book.sessions[terms.session_id]
    private = {
        "consumer": terms.consumer,
        "provider": terms.provider,
        "token": terms.token,
        "signature": session.presentation.signature,
        "receipt": session.ack.receipt_signature,
        "challenge": session.presentation.challenge,
        "hello": plug.door.hello(PORT).nonce,
    }
    text = seen(plug)[0] + json.dumps(views.telemetry(plug.engine.book, plug.engine.live))
    text += views.status_line(plug.engine.book, plug.engine.live)
    leaked = [name for name, value in private.items() if value.hex() in text.lower()]
    assert leaked == []
    assert SREF not in text


def test_reason_is_named_when_power_may_not_flow(plug):
    """Would catch an owner who sees PAUSED and not why, and a view of the chain that is old and looks fresh."""
    terms = plug.delivering()
    plug.read(5_060_000, power_w=11_000, pilot_state="C")
    assert seen(plug)[1]["ports"][PORT]["reason"] == "waiting_for_receipt"
    assert "left: DELIVERING (waiting_for_receipt) 60 of 1000 Wh" in views.status_line(
        plug.engine.book, plug.engine.live
    )
    plug.clock["ms"] += 61_000
    plug.read(5_060_000)
    assert seen(plug)[1]["ports"][PORT]["reason"] == "chain_view_stale"
    assert "chain view is 61 s old" in views.status_line(plug.engine.book, plug.engine.live)
    plug.door.answer(SREF, "a test", plug.stop(terms))
    assert seen(plug)[1]["ports"][PORT]["reason"] == "Remote"


def test_before_anything_is_known_nothing_is_claimed(plug):
    """Would catch a zero shown where we do not know: no header, no reading."""
    _, status = seen(plug)
    assert status["chain"] == {"block": None, "scanned_block": None, "view_age_s": None, "is_fresh": False}
    port = status["ports"][PORT]
    assert port["power_w"] is None
    assert port["register_mwh"] is None
    assert port["reason"] == "charger_silent"
    topics = views.telemetry(plug.engine.book, plug.engine.live)
    assert topics["port/left/power"] == ""
    assert topics["port/left/energy"] == ""
    assert topics["port/left/status"] == ""
    assert views.status_line(plug.engine.book, plug.engine.live) == (
        "left: idle (charger_silent); no view of the chain"
    )


def test_evcc_can_read_the_scalars(plug):
    """Would catch kW for W, Wh for kWh, a D where evcc knows only A, B, C, or a stale value that stays."""
    plug.delivering()
    topics = views.telemetry(plug.engine.book, plug.engine.live)
    assert topics["port/left/power"] == "11000"
    assert topics["port/left/energy"] == "5.012"
    assert topics["port/left/session_energy"] == "0.012"
    assert topics["port/left/status"] == "C"
    assert topics["port/left/charging"] == "true"
    assert topics["port/left/stage"] == "DELIVERING"
    assert topics["port/left/enabled"] == "true"
    assert max(len(payload) for payload in topics.values()) <= 2048
    plug.read(5_020_000, power_w=11_000, pilot_state="D")
    assert views.telemetry(plug.engine.book, plug.engine.live)["port/left/status"] == "C"
    plug.clock["ms"] += 10_000
    plug.header()
    assert views.telemetry(plug.engine.book, plug.engine.live)["port/left/power"] == ""


@given(st.integers(0, 10**13), st.integers(0, 10**6))
def test_kwh_total_never_goes_back(register_mwh, more_mwh):
    """Would catch rounding that lets a total shrink (evcc would count a reset), or shows too much."""
    before, after = views._kwh(register_mwh), views._kwh(register_mwh + more_mwh)
    assert float(before) <= float(after)
    whole, _, thousandths = before.partition(".")
    assert len(thousandths) == 3
    assert int(whole + thousandths) == register_mwh // 1000


def test_finished_sessions_do_not_fill_the_page(plug):
    """Would catch a status that grows for years; and an open session pushed out by old ones."""
    plug.header()
    for nonce in range(1, 41):
        terms = plug.connect(nonce=nonce)
        tx_hash, block_hash = ev.TxHash(b"\1" * 32), ev.BlockHash(b"\2" * 32)
        plug.engine.accept(
            ev.ConnectionEndedSeen(plug.engine.at_s, terms.session_id, 0, 0, tx_hash, block_hash)
        )
        plug.engine.accept(ev.ConnectionEndedBelieved(plug.engine.at_s, terms.session_id, block_hash))
    running = plug.connect(nonce=77)
    shown = seen(plug)[1]["sessions"]
    assert len(shown) == 1 + views.CLOSED_SHOWN_MAX
    assert shown[0]["session_id"] == hex0x(running.session_id)
    assert shown[0]["stage"] == "MATCHED"
    assert shown[1]["stage"] == "SETTLED"
    assert shown[1]["settlement_tx"] == "0x" + "01" * 32


# ---- events


def an_event(kind):
    """One event of this kind, its bytes distinctive, its text recognisable."""
    return kind(**{name: a_value(name, hint) for name, hint in get_type_hints(kind).items()})


def a_value(name, hint):
    """A value for one field: bytes of the right kind carry the field's name."""
    hint = getattr(hint, "__supertype__", hint)
    if is_dataclass(hint):
        return an_event(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return next(iter(hint))
    if get_args(hint):
        return get_args(hint)[0]
    if hint is bytes:
        length = 20 if name in ("consumer", "provider", "session_key") else 32
        return name.encode().ljust(length, b"!")[:length]
    return {str: f"the {name}", int: 7, bool: True}[hint]


def test_every_field_of_every_event_was_thought_about():
    """Would catch a new field that is silently kept out of the log, or one that slipped in without a decision."""
    known = views._SHOWN.keys() | views.HIDDEN
    named = {
        field.name
        for kind in (*ev.KINDS.values(), ev.Terms)
        for field in fields(kind)
        if field.name not in ("terms", "presentation")
    }
    assert named - known == set()
    assert views.HIDDEN.isdisjoint(views._SHOWN)


@pytest.mark.parametrize("kind", ev.KINDS.values(), ids=list(ev.KINDS))
def test_no_event_is_described_with_anything_private(kind):
    """Would catch a signature, token, full address, return address, record or raw transaction in a log line."""
    text = json.dumps(views.describe(an_event(kind)))
    for private in ("consumer", "provider", "session_key"):
        assert private.encode().ljust(20, b"!").hex() not in text
    for private in ("token", "signature", "challenge", "digest", "raw_tx"):
        assert private.encode().ljust(32, b"!").hex() not in text
    for private in ("the sref", "the ocmf"):
        assert private not in text


def test_event_ids_are_stable_and_different():
    """Would catch a renamed id: searches and alerts of an owner hang on them."""
    names = {views.event_name(kind) for kind in ev.KINDS.values()}
    assert len(names) == len(ev.KINDS)
    assert {"connected.seen", "token.presented", "delivery.began", "meter_record.signed"} <= names
    assert {"connection_ended.believed", "settlement.signed", "stop.decided", "port.unlocked"} <= names


def test_log_line_of_a_stop_says_which_session_and_why(plug):
    """Would catch a description without what a human looks for first."""
    terms = plug.delivering()
    event = ev.StopDecided(plug.engine.at_s, terms.session_id, ev.StopReason.REMOTE, "the consumer asked")
    assert views.describe(event) == {
        "event": "stop.decided",
        "at_s": plug.engine.at_s,
        "session": hex0x(terms.session_id),
        "stop_reason": "Remote",
        "detail": "the consumer asked",
    }


def test_stage_changes_are_told_once(plug):
    """Would catch "session.settled" missing from a log, or repeated with every event."""
    before = plug.engine.book
    terms = plug.plugged_in()
    told = list(views.stage_changes(before, plug.engine.book))
    assert [line["event"] for line in told] == ["session.matched"]
    before = plug.engine.book
    plug.door.answer(SREF, "a test", plug.present(terms))
    (told,) = views.stage_changes(before, plug.engine.book)
    assert told["stage_before"] == "MATCHED"
    assert told["port"] == PORT
    assert list(views.stage_changes(plug.engine.book, plug.engine.book)) == []
    before = plug.engine.book
    plug.door.answer(SREF, "a test", plug.receipt(terms, 0))
    assert list(views.stage_changes(before, plug.engine.book)) == []
