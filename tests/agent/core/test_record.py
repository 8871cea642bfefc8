"""Meter records as an independent OCMF implementation (pyocmf) reads them."""

import datetime as dt
import hashlib
import json
from dataclasses import replace
from decimal import Decimal

import coincurve
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyocmf import OCMF
from pyocmf.compliance import check_eichrecht_transaction
from story import METER, PORT, REGISTER, STRANGER, TERMS, Story, at, delivering, presentation, receipt, stops

from agent.core import record
from agent.core.events import Presentation, StopReason
from agent.core.messages import MESSAGE_BYTES_MAX, RECORD_LENGTH_MAX, Final, decode, encode
from agent.core.record import MeterIdentity
from agent.core.session import Stage
from agent.core.token import Ack
from agent.core.units import TxHash

SPKI_HEAD = bytes.fromhex("3056301006072a8648ce3d020106052b8104000a034200")
EASTRON = MeterIdentity("Eastron", "SDM630-Modbus V2", "19450012", "1.37")


def public_key(wallet=METER):
    """The meter's public key as OCMF's tools take it."""
    return (SPKI_HEAD + wallet.public_key).hex()


def signed(payload, wallet=METER):
    """A record signed as keys.MeterSigner does: ECDSA over SHA-256, DER."""
    return record.record(payload, wallet.private.sign(payload.encode()))


def finished(**more):
    """A session that delivered 22 Wh, of which 20 are acknowledged."""
    story = delivering(**more).passes(10) >> receipt(20) >> stops()
    return story.passes(25)


def both(story: Story):
    """Its begin and end as strings."""
    return tuple(
        signed(record.payload(story.session, moment, number, EASTRON))
        for number, moment in enumerate(("begin", "end"), start=41)
    )


def test_an_independent_tool_verifies_both_records_and_finds_them_fit_for_billing():
    """Our own reader could share our own mistakes; pyocmf is somebody else's."""
    begin, end = (OCMF.from_string(text, strict=False) for text in both(finished()))
    assert begin.verify_signature(public_key())
    assert end.verify_signature(public_key())
    issues = check_eichrecht_transaction(begin.payload, end.payload)
    # The chain's time is no legal time: OCMF calls it informative, the checker warns, and that is all it may say.
    assert {(issue.code.value, issue.severity.value) for issue in issues} <= {("TIME_SYNC", "warning")}


@pytest.mark.filterwarnings("error")
def test_the_tool_has_nothing_to_complain_about_the_format():
    """Deviations that today's tools tolerate are tomorrow's rejected bills; strict mode raises on each."""
    for text in both(finished()):
        OCMF.from_string(text, strict=True)


FORGERIES = {
    "the register": ('"RV":5000.020000', '"RV":5000.020001'),
    "the page": ("T42", "T43"),
    "the consumer's word": ('"ackedWh":20', '"ackedWh":21'),
    "the time": ("+0000 I", "+0000 S"),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_a_changed_record_is_invalid(what):
    """The value, the page, the time and the consumer's word are all under the signature."""
    _, end = both(finished())
    ours, forged = FORGERIES[what]
    changed = end.replace(ours, forged, 1)
    assert changed != end
    assert not OCMF.from_string(changed).verify_signature(public_key())


def test_another_key_does_not_verify():
    """A verifier that says yes to every key would make the two tests above worthless."""
    begin, _ = both(finished())
    assert not OCMF.from_string(begin).verify_signature(public_key(STRANGER))


def test_begin_and_end_say_what_was_journaled():
    """The record is the meter's testimony: registers, order of events, page numbers, who, where."""
    story = finished()
    begin, end = (OCMF.from_string(text) for text in both(story))
    first, last = begin.payload.RD[0], end.payload.RD[0]
    assert [str(reading.RV) for reading in (first, last)] == ["5000.000000", "5000.020000"]
    assert (first.TX, last.TX) == ("B", "R")
    assert (begin.payload.PG, end.payload.PG) == ("T41", "T42")
    assert str(first.RI) == "01-00:C0.08.00*FF"
    who_and_where = (end.payload.ID, end.payload.CI)
    assert who_and_where == ("0x" + TERMS.consumer.hex(), PORT)
    assert last.TM.timestamp - first.TM.timestamp == dt.timedelta(
        seconds=story.session.end_at_s - story.session.begin_at_s
    )


def test_the_consumers_own_word_is_inside_the_signature():
    """One string proves what the meter said and what the consumer signed: enough for a court, or for the contract."""
    story = finished()
    payload = json.loads(record.payload(story.session, "end", 1, EASTRON))
    session, evidence = story.session, payload["U"]
    assert evidence["sessionId"] == "0x" + session.session_id.hex()
    assert evidence["token"] == "0x" + session.terms.token.hex()
    assert (evidence["deliveredWh"], evidence["ackedWh"]) == (20, 20)
    assert evidence["ack"]["receiptSignature"] == "0x" + session.ack.receipt_signature.hex()
    assert evidence["ack"]["grantSignature"] == "0x" + session.ack.grant_signature.hex()


def test_without_a_receipt_there_is_no_ack():
    """A row of zeros would look like a signature."""
    story = (delivering().passes(10) >> stops()).passes(25)
    evidence = json.loads(record.payload(story.session, "end", 2, EASTRON))["U"]
    assert evidence["ackedWh"] == 0
    assert "ack" not in evidence


def test_a_register_not_seen_at_rest_is_marked_as_a_substitute():
    """Rule 8: the end register of a welded contactor must not pass for a clean one."""
    story = delivering().passes(10) >> receipt(20)
    story.outlet.welded = True
    story = (story >> stops()).passes(40)
    begin, end = (OCMF.from_string(text) for text in both(story))
    assert end.payload.RD[0].ST == "S"
    codes = {issue.code.value for issue in check_eichrecht_transaction(begin.payload, end.payload)}
    assert "METER_STATUS" in codes


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        (StopReason.ENERGY_LIMIT_REACHED, "E"),
        (StopReason.LOCAL, "L"),
        (StopReason.REMOTE, "R"),
        (StopReason.POWER_LOSS, "P"),
        (StopReason.OTHER, "A"),
    ],
)
def test_why_it_ended_is_ocmfs_own_code(reason, code):
    """Other software sorts records by these letters."""
    story = (delivering().passes(5) >> stops(reason)).passes(25)
    assert json.loads(record.payload(story.session, "end", 2, EASTRON))["RD"][0]["TX"] == code


def test_the_times_are_those_of_the_events_not_of_the_signing():
    """A record signed after a restart, or after the settlement, still tells when the meter was read."""
    story = finished()
    before = record.payload(story.session, "end", 2, EASTRON)
    story.passes(100)
    assert record.payload(story.session, "end", 2, EASTRON) == before


def test_both_records_of_the_longest_session_fit_one_final_message():
    """An over-size publish vanishes with success at the client: the longest must fit, with a device that talks too much."""
    story = finished()
    big = 2**53 - 1
    long = presentation(port='left|"\\' + "x" * 90)
    assert isinstance(long, Presentation)
    ack = Ack(b"\xff" * 32, b"\xff" * 20, big, big, b"\xff" * 32, b"\xff" * 65, b"\xff" * 65)
    session = replace(
        story.session,
        presentation=long,
        ack=ack,
        energy_wh_acked=big,
        energy_wh_delivered=big,
        register_mwh_begin=big,
        register_mwh_end=big,
    )
    wordy = MeterIdentity("|" * 99, '"' * 99, "\\" * 99, "é\n" * 99)
    texts = [
        record.record(record.payload(session, moment, 10**9, wordy), b"\xff" * 72)
        for moment in ("begin", "end")
    ]
    assert all(len(text) <= RECORD_LENGTH_MAX for text in texts)
    data = encode(
        Final(session.session_id, Stage.SETTLED, "x" * 40, big, big, 2**256 - 1, TxHash(b"\xff" * 32), *texts)
    )
    assert len(data) <= MESSAGE_BYTES_MAX
    assert decode(data).ocmf_end == texts[1]
    assert all(OCMF.from_string(text).payload.MV for text in texts), "a device's | must not split the record"


@given(st.integers(min_value=0, max_value=2**60))
def test_kwh_is_exact(energy_mwh):
    """A binary float would lose Wh of a meter with many digits."""
    assert Decimal(record.kwh(energy_mwh)) == Decimal(energy_mwh) / 1_000_000


@given(st.integers(min_value=0, max_value=253_402_300_799))
def test_the_calendar_is_right_until_the_year_9999(at_s):
    """The core knows no calendar library, so its own must agree with one."""
    moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(seconds=at_s)
    assert record.timestamp(at_s) == moment.strftime("%Y-%m-%dT%H:%M:%S,000+0000").zfill(28)


def test_the_signature_covers_sha256_of_exactly_these_bytes():
    """Whoever re-serialises the payload breaks it; whoever hashes with keccak never verifies."""
    payload = record.payload(at(Stage.DELIVERING).session, "begin", 1, EASTRON)
    text = signed(payload)
    head, middle, tail = text.split("|")
    assert (head, middle) == ("OCMF", payload)
    signature = bytes.fromhex(json.loads(tail)["SD"])
    key = coincurve.PublicKey(METER.public_key)
    assert key.verify(signature, hashlib.sha256(payload.encode()).digest(), hasher=None)
    assert str(REGISTER // 1_000_000) in payload
