"""A session's begin and end as OCMF 1.4 records: what the meter showed, tied to the consumer's receipt and the chain's session.

Rules
* Built from journaled facts only; the same session gives the same bytes. Times are chain time, marked informative ("I").
* Numbers are written from integers, never through a binary float: mWh is kWh with six decimals.
* The signature covers the payload's bytes, so `record` is kept as the original string and never serialised again.
* What a charger says about itself is a stranger's text: cut short, without the `|` that separates OCMF's parts.

May not know: keys (`keys.MeterSigner` signs SHA-256 of the payload), the journal, the charger's wire.
This is OCMF's format, not a certificate: legal metrology is the meter's. Source: SAFE-eV/OCMF 1.4, tables 1-10 and 20-25.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from agent.core.events import StopReason
from agent.core.session import Session
from agent.core.token import ZERO_ADDRESS
from agent.core.units import hex0x

Moment = Literal["begin", "end"]

FORMAT_VERSION = "1.4"
SIGNATURE_ALGORITHM = "ECDSA-secp256k1-SHA256"
REGISTER = (
    "01-00:C0.08.00*FF"  # total export at the meter: the code OCMF reserves for billing (plain 2.8.0 is not)
)
TEXT_LENGTH_MAX = (
    25  # a device's words; bounds the record (`messages.RECORD_LENGTH_MAX`) whatever a device says
)
MWH_PER_KWH = 1_000_000

# How the transaction ended (OCMF table 7, TX). Everything else is a plain end.
_END_CODES = {
    StopReason.LOCAL: "L",
    StopReason.REMOTE: "R",
    StopReason.POWER_LOSS: "P",
    StopReason.GROUND_FAULT: "A",
    StopReason.OTHER: "A",
}


@dataclass(frozen=True, slots=True)
class MeterIdentity:
    """Which meter spoke. Empty strings where the device is silent."""

    maker: str = ""
    model: str = ""
    serial: str = ""
    firmware: str = ""
    current_type: Literal["AC", "DC"] = "AC"


def payload(session: Session, moment: Moment, pagination: int, meter: MeterIdentity) -> str:
    """The OCMF payload of this session's begin or end, as the string to be signed. `pagination` counts this agent's records."""
    assert session.presentation is not None
    assert pagination > 0
    terms = session.terms
    body: dict[str, Any] = {
        "FV": FORMAT_VERSION,
        "GI": "v2v-agent",
        "GS": hex0x(terms.provider),
        "PG": f"T{pagination}",
        "MV": _plain(meter.maker),
        "MM": _plain(meter.model),
        "MS": _plain(meter.serial),
        "MF": _plain(meter.firmware),
        "IS": True,
        "IL": "CERTIFIED",  # the assignment is proven by the consumer's signature
        "IF": [],
        "IT": "UNDEFINED",
        "ID": hex0x(terms.consumer),
        "CT": "CBIDC",  # charge box and connector
        "CI": _plain(session.presentation.port),
        "RD": [_reading(session, moment, meter)],
        "U": _evidence(session, moment),
    }
    return _json(body)


def record(payload: str, signature_der: bytes) -> str:
    """The whole OCMF record. `signature_der` is ECDSA over SHA-256 of the payload's UTF-8 bytes, secp256k1."""
    signature = {"SA": SIGNATURE_ALGORITHM, "SD": signature_der.hex()}
    return f"OCMF|{payload}|{_json(signature)}"


def _reading(session: Session, moment: Moment, meter: MeterIdentity) -> dict[str, Any]:
    if moment == "begin":
        register_mwh, at_s, code, good = session.register_mwh_begin, session.begin_at_s, "B", True
    else:
        register_mwh, at_s = session.register_mwh_end, session.end_at_s
        code = "E" if session.stop_reason is None else _END_CODES.get(session.stop_reason, "E")
        good = bool(session.end_seen_open)
    assert register_mwh is not None
    return {
        "TM": f"{timestamp(at_s)} I",
        "TX": code,
        "RV": _Number(kwh(register_mwh)),
        "RI": REGISTER,
        "RU": "kWh",
        "RT": meter.current_type,
        "EF": "",
        "ST": "G" if good else "S",  # S: a substitute, because the contactor was not seen open (rule 8)
    }


def _evidence(session: Session, moment: Moment) -> dict[str, Any]:
    """OCMF leaves U-Z to vendors and signs them: here the chain's session, and the consumer's own word for the energy."""
    evidence: dict[str, Any] = {"sessionId": hex0x(session.session_id), "token": hex0x(session.terms.token)}
    if moment == "begin":
        return evidence
    evidence["deliveredWh"] = session.energy_wh_delivered
    evidence["ackedWh"] = session.energy_wh_acked
    if session.energy_wh_acked == 0:
        return evidence
    ack = session.ack
    proof: dict[str, Any] = {"receiptSignature": hex0x(ack.receipt_signature)}
    if ack.session_key != ZERO_ADDRESS:
        proof |= {
            "token": hex0x(ack.token),
            "sessionKey": hex0x(ack.session_key),
            "maxEnergyWh": ack.max_energy_wh,
            "validUntil": ack.valid_until_s,
            "challenge": hex0x(ack.challenge),
            "grantSignature": hex0x(ack.grant_signature),
        }
    return evidence | {"ack": proof}


def kwh(energy_mwh: int) -> str:
    """A register in mWh as kWh with six decimals, exactly."""
    assert energy_mwh >= 0, energy_mwh
    return f"{energy_mwh // MWH_PER_KWH}.{energy_mwh % MWH_PER_KWH:06d}"


def timestamp(at_s: int) -> str:
    """Unix seconds as OCMF writes time, in UTC: `2026-11-22T15:00:00,000+0000` (the core knows no calendar library)."""
    days, second = divmod(at_s, 86_400)
    year = 1970 + days // 366  # never too late, and a few steps early at most
    while _days_before(year + 1) <= days:
        year += 1
    day = days - _days_before(year)
    month = 1
    while day >= _month_days(year, month):
        day -= _month_days(year, month)
        month += 1
    clock = f"{second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}"
    return f"{year:04d}-{month:02d}-{day + 1:02d}T{clock},000+0000"


def _days_before(year: int) -> int:
    """Days from 1970 to the first of January of `year`."""
    leaps = (year - 1) // 4 - (year - 1) // 100 + (year - 1) // 400
    return 365 * (year - 1970) + leaps - 477  # 477 leap days before 1970


def _month_days(year: int, month: int) -> int:
    if month == 2:
        return 29 if year % 4 == 0 and (year % 100 != 0 or year % 400 == 0) else 28
    return 30 if month in (4, 6, 9, 11) else 31


def _plain(text: str) -> str:
    """A device's words as printable ASCII without OCMF's separator and JSON's escapes."""
    kept = (c if c.isascii() and c.isprintable() and c not in '|"\\' else "?" for c in text[:TEXT_LENGTH_MAX])
    return "".join(kept)


class _Number(str):
    """A number that is already written out, exactly."""

    __slots__ = ()


def _json(value: object) -> str:
    """JSON without spaces, in the order given, with `_Number` as it stands: the standard encoder would need a float."""
    if isinstance(value, _Number):
        return str(value)
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(key)}:{_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(_json(item) for item in value) + "]"
    return json.dumps(value)
