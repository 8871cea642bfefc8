"""The vocabulary of what happened: frozen, dated, and readable by every later version."""

import dataclasses

import pytest
from story import T0, TERMS

from agent.core import effects, events

# Renaming an event or a field makes old journals unreadable: a settled session could be settled again. Add, never rename.
PINNED = {
    "ConnectedSeen": "at_s terms",
    "ConnectedBelieved": "at_s session_id block_hash",
    "ConnectedFinal": "at_s session_id block_hash",
    "ConnectedOrphaned": "at_s session_id block_hash",
    "ConnectionClosingSeen": "at_s session_id energy_wh_conceded close_at_s",
    "ConnectionEndedSeen": "at_s session_id energy_wh_settled fee_wei tx_hash block_hash",
    "ConnectionEndedOrphaned": "at_s session_id block_hash",
    "ConnectionEndedBelieved": "at_s session_id block_hash",
    "BlocksScanned": "at_s block_number block_hash",
    "TokenPresented": "at_s session_id presentation",
    "ReceiptCredited": "at_s session_id energy_wh_acked ack",
    "SessionAccepted": "at_s session_id register_mwh_begin",
    "DeliveryBegan": "at_s session_id register_mwh life",
    "DeliveryPaused": "at_s session_id register_mwh reason",
    "StopDecided": "at_s session_id stop_reason detail",
    "DeliveryEnded": "at_s session_id register_mwh_end seen_open",
    "MeterRecordSigned": "at_s session_id moment ocmf",
    "PortLocked": "at_s port",
    "PortUnlocked": "at_s port",
    "SettlementSigned": (
        "at_s session_id energy_wh_settled nonce tx_hash raw_tx max_fee_per_gas_wei max_priority_fee_per_gas_wei"
    ),
    "SettlementReverted": "at_s session_id tx_hash error",
    "SessionLapsed": "at_s session_id",
    "BidDecided": "at_s bid_id consumer auction_nonce rate_wei_per_kwh until_s",
    "BidSigned": "at_s bid_id nonce tx_hash raw_tx gas_wei_max",
    "BidEnded": "at_s bid_id error",
}
PINNED_PARTS = {
    events.Terms: (
        "session_id token consumer provider auction_nonce energy_wh_ordered rate_wei_per_kwh deposit_wei bond_wei"
        " issued_at_s valid_until_s block_number block_hash log_index tx_hash"
    ),
    events.Presentation: (
        "sref port scheme token session_key max_energy_wh valid_until_s challenge signature digest"
    ),
}


def names(kind):
    """A dataclass's fields, in order."""
    return " ".join(field.name for field in dataclasses.fields(kind))


@pytest.mark.parametrize("name", PINNED)
def test_no_event_of_the_journal_is_ever_renamed(name):
    """The pinned fields must stand first and unchanged; new ones may follow (with a default, for old rows)."""
    kind = events.KINDS[name]
    assert names(kind).startswith(PINNED[name])
    for field in dataclasses.fields(kind)[len(PINNED[name].split()) :]:
        assert field.default is not dataclasses.MISSING, f"{name}.{field.name} cannot be read from old rows"


@pytest.mark.parametrize("kind", PINNED_PARTS)
def test_no_part_of_an_event_is_ever_renamed(kind):
    """Terms and presentations are inside of events."""
    assert names(kind).startswith(PINNED_PARTS[kind])


def test_every_event_and_effect_is_frozen():
    """History that can be changed is not history."""
    event = events.ConnectedSeen(T0, TERMS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.at_s = 0
    owed = {
        kind.__name__: kind for kind in effects.Effect.__subclasses__()
    }  # the last of a name has the slots
    for kind in (*events.KINDS.values(), *owed.values()):
        assert kind.__dataclass_params__.frozen, kind
        assert "__dict__" not in kind.__dict__, f"{kind} has no slots"


def test_stop_reasons_are_ocpps_words():
    """Chargers' back ends understand these (OCPP 2.1, ReasonEnumType) and no others."""
    ocpp = {
        "DeAuthorized", "EmergencyStop", "EnergyLimitReached", "EVDisconnected", "GroundFault",
        "ImmediateReset", "MasterPass", "Local", "LocalOutOfCredit", "Other", "OvercurrentFault", "PowerLoss",
        "PowerQuality", "Reboot", "Remote", "SOCLimitReached", "StoppedByEV", "TimeLimitReached", "Timeout",
        "ReqEnergyTransferRejected",
    }  # fmt: skip
    assert {reason.value for reason in events.StopReason} <= ocpp


def test_firmness_only_grows():
    """Rule 8 climbs; a step that compares lower than the one before would never be taken."""
    assert effects.Firmness.HOLD < effects.Firmness.LOCK < effects.Firmness.CUT_OFF
