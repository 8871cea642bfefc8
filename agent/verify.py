"""Judges a session's file (evidence.py) without network, journal or keys: every check has a name, and all of them are told.

What each signature proves, and to whom
* the consumer: token, session, provider and the granted key (`presentation`); every receipt, by it or by that key (`receipts`)
* the meter: both registers, their times, port, consumer, delivered and acknowledged Wh (`records`)
* the settling account: token, Wh and receipt that were claimed on chain (`settlements`)
The rest (other events, rate, deposit) is held together by replaying the core's own rules, by arithmetic and by the digest.
A forger who writes a whole new file can make up what nobody signed: compare with the chain and with the digest that `export`
printed, and name the meter's key and the operator yourself (`meter_key`, `signer`).

May not know: the journal, the node. Raises nothing for a bad file: a check fails and says why.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

import coincurve
from eth_hash.auto import keccak

from agent.chain import contract
from agent.core import events as ev
from agent.core import record
from agent.core import token as rules
from agent.core.book import Book, step
from agent.core.events import Event
from agent.core.session import Session, Stage
from agent.core.token import Domain
from agent.core.units import MWH_PER_WH, Address, cost_wei_floor, hex0x
from agent.errors import Refused
from agent.evidence import canonical, digest, evidence
from agent.rows import decoded

FILE_BYTES_MAX: Final = (
    64 * 2**20
)  # some 80 000 receipts; more is no session of ours, and would fill the memory
DEPTH_MAX: Final = (
    16  # ours have six; a million brackets would overflow the parser's stack and end the process
)
SPKI_HEAD_LENGTH: Final = 23  # DER of an uncompressed secp256k1 key begins with this many fixed bytes
TX_FIELDS: Final = 12  # EIP-1559: nine that are signed, then the signature's three
DYNAMIC_FEE_TX: Final = 2


@dataclass(frozen=True, slots=True)
class Check:
    """One question and its answer. `detail` says what was found, or why not."""

    name: str
    ok: bool
    detail: str


class Unproven(Exception):
    """A check fails, for this reason."""


@dataclass(frozen=True, slots=True)
class _Told:
    """A file that can be read: its content, and the session as its events make it, before and after each of them."""

    content: dict[str, Any]
    domain: Domain
    provider: Address
    events: tuple[Event, ...]
    before: tuple[Session | None, ...]
    session: Session


def verify(data: bytes, *, signer: Address | None = None, meter_key: bytes | None = None) -> list[Check]:
    """Every check of this file. `signer`: who must have signed the settlement; `meter_key`: DER of the meter's public key."""
    try:
        told = _told(data)
    except Exception as why:  # noqa: BLE001 - a hostile file may provoke anything, and gets an answer, not a traceback
        return [Check("form", ok=False, detail=_why(why))]
    checks: list[tuple[str, Callable[[], str]]] = [
        ("form", lambda: _form(told, data)),
        ("digest", lambda: _digest(told)),
        ("sections", lambda: _sections(told)),
        ("token", lambda: _token(told)),
        ("presentation", lambda: _presentation(told)),
        ("receipts", lambda: _receipts(told)),
        ("records", lambda: _records(told, meter_key)),
        ("registers", lambda: _registers(told.session)),
        ("settlements", lambda: _settlements(told, signer)),
        ("payment", lambda: _payment(told)),
    ]
    return [_answered(name, ask) for name, ask in checks]


def _answered(name: str, ask: Callable[[], str]) -> Check:
    try:
        return Check(name, ok=True, detail=ask())
    except Exception as why:  # noqa: BLE001 - as above
        return Check(name, ok=False, detail=_why(why))


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, (Unproven, Refused)) else f"not to be read: {error!r}"


def _demand(holds: bool, why: str) -> None:
    if not holds:
        raise Unproven(why)


# ---- the file


def _told(data: bytes) -> _Told:
    _demand(len(data) <= FILE_BYTES_MAX, f"longer than {FILE_BYTES_MAX} bytes")
    _demand(_depth(data) <= DEPTH_MAX, "nested too deep")
    content = json.loads(data.decode())
    domain = Domain(content["market"]["chain_id"], Address(_bytes(content["market"]["contract"])))
    provider, session_id = Address(_bytes(content["provider"])), _bytes(content["session_id"])
    events = tuple(decoded(ev.KINDS[row["kind"]], row["body"]) for row in content["events"])
    book, before = Book(domain, provider), []
    for number, event in enumerate(events):
        before.append(book.sessions.get(session_id))  # type: ignore[call-overload]
        after = step(book, event)
        _demand(
            after is not book, f"event {number} ({type(event).__name__}) does not follow from those before it"
        )
        book = after
    _demand(set(book.sessions) == {session_id}, "the events are not those of this session")
    _demand(not book.pending, "the events are not those of this session")
    return _Told(content, domain, provider, events, tuple(before), book.sessions[session_id])  # type: ignore[index]


def _depth(data: bytes) -> int:
    """How deep the brackets outside texts are nested."""
    depth = deepest = 0
    for bracket in re.sub(rb'"(?:[^"\\]|\\.)*"|[^"{}\[\]]+', b"", data):
        depth += 1 if bracket in b"[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _bytes(text: str) -> bytes:
    _demand(text.startswith("0x"), f"{text[:20]!r} is not 0x-hex")
    return bytes.fromhex(text[2:])


def _form(told: _Told, data: bytes) -> str:
    _demand(data == canonical(told.content), "the file is not written as `export` writes it")
    return f"{told.content['format']}, {len(told.events)} events"


def _digest(told: _Told) -> str:
    found = digest(told.content)
    _demand(
        found == told.content["digest"],
        f"the content's digest is {found}, the file says {told.content['digest']}",
    )
    return found


def _sections(told: _Told) -> str:
    """Everything beside the events follows from them."""
    wanted = evidence(told.domain, told.provider, told.session.session_id, told.events)
    odd = sorted(
        key
        for key in wanted.keys() | told.content.keys()
        if key != "digest" and wanted.get(key) != told.content.get(key)
    )
    _demand(not odd, f"{', '.join(odd)} differs from what the events tell")
    return f"{told.session.stage}, {told.session.energy_wh_delivered} Wh delivered, {told.session.energy_wh_acked} Wh signed for"


# ---- what the consumer signed


def _token(told: _Told) -> str:
    terms = told.session.terms
    token = rules.access_token(terms.consumer, terms.provider, terms.issued_at_s, terms.valid_until_s)
    _demand(token == terms.token, "the token is not keccak(consumer, provider, issued, validity)")
    session_id = rules.session_id(
        told.domain.chain_id, told.domain.contract, terms.consumer, terms.provider, terms.auction_nonce
    )
    _demand(session_id == terms.session_id, "the session id is not that of this auction")
    return f"recomputed: {hex0x(token)}"


def _presentation(told: _Told) -> str:
    given = [event for event in told.events if isinstance(event, ev.TokenPresented)]
    for event in given:
        _presented(told, event.presentation)
    if not given:
        _demand(told.session.register_mwh_begin is None, "power was offered, and no token is here")
        return "none was presented, and no power offered"
    return f"signed by the consumer {hex0x(told.session.terms.consumer)}"


def _presented(told: _Told, given: ev.Presentation) -> None:
    terms = told.session.terms
    grant = rules.PresentToken(
        given.token,
        terms.session_id,
        told.provider,
        given.session_key,
        given.max_energy_wh,
        given.valid_until_s,
        given.challenge,
    )
    signer = rules.address_of(rules.presentation_key(told.domain, given.scheme, grant, given.signature))
    _demand(signer == terms.consumer, "the token was not signed by the consumer")


def _receipts(told: _Told) -> str:
    terms, highest_wh, count = told.session.terms, 0, 0
    for event in told.events:
        if not isinstance(event, ev.ReceiptCredited):
            continue
        _demand(event.energy_wh_acked > highest_wh, f"{event.energy_wh_acked} Wh after {highest_wh} Wh")
        highest_wh, count = event.energy_wh_acked, count + 1
        _demand(highest_wh <= terms.energy_wh_ordered, f"{highest_wh} Wh is more than was ordered")
        rules.receipt_signer(
            told.domain,
            event.ack,
            session_id=terms.session_id,
            provider=terms.provider,
            consumer=terms.consumer,
            delivered_wh=highest_wh,
        )
    return f"{count} valid, rising to {highest_wh} Wh"


# ---- what the meter signed


def _records(told: _Told, meter_key: bytes | None) -> str:
    keys: set[bytes] = set()
    for event, session in zip(told.events, told.before, strict=True):
        if isinstance(event, ev.MeterRecordSigned):
            assert session is not None
            _record(event, session)
            keys.add(event.public_key)
    session = told.session
    _demand(not session.register_mwh_begin or bool(session.record_begin), "the begin record is missing")
    _demand(not session.register_mwh_end or bool(session.record_end), "the end record is missing")
    _demand(len(keys) <= 1, "two meters have signed")
    _demand(meter_key is None or keys <= {meter_key}, "signed by another meter than the one you named")
    return "none" if not keys else f"signed by the meter {hex0x(keys.pop()[-64:])[:18]}.."


def _record(event: ev.MeterRecordSigned, session: Session) -> None:
    """The signature is the meter's, and the payload is exactly what this session then was."""
    head, payload, tail = _parts(event.ocmf)
    signature = json.loads(tail)
    _demand(head == "OCMF" and signature["SA"] == record.SIGNATURE_ALGORITHM, "not one of our OCMF records")
    key = coincurve.PublicKey(event.public_key[SPKI_HEAD_LENGTH:])
    signed = key.verify(bytes.fromhex(signature["SD"]), payload.encode())
    _demand(signed, f"the {event.moment} record is not signed by the meter")
    body = json.loads(payload)
    meter = record.MeterIdentity(body["MV"], body["MM"], body["MS"], body["MF"], body["RD"][0]["RT"])
    wanted = record.payload(session, event.moment, int(body["PG"].removeprefix("T")), meter)
    _demand(payload == wanted, f"the {event.moment} record tells of another session, time or register")
    _demand(
        event.ocmf == record.record(payload, bytes.fromhex(signature["SD"])), "the record is not in our form"
    )


def _parts(ocmf: str) -> tuple[str, str, str]:
    parts = ocmf.split("|")
    _demand(len(parts) == 3, "an OCMF record has three parts")
    return parts[0], parts[1], parts[2]


def _registers(session: Session) -> str:
    begin, end, delivered_wh = (
        session.register_mwh_begin,
        session.register_mwh_end,
        session.energy_wh_delivered,
    )
    if begin is None or delivered_wh is None:
        _demand(not delivered_wh, "energy without a register")
        return "no energy" if begin is None else f"begins at {record.kwh(begin)} kWh, not ended"
    assert end is not None
    _demand(delivered_wh * MWH_PER_WH <= end - begin, "more was delivered than the registers moved")
    _demand(delivered_wh <= session.order_wh, "more was delivered than ordered")
    _demand(session.energy_wh_acked <= delivered_wh, "more was acknowledged than delivered")
    return f"{record.kwh(begin)} to {record.kwh(end)} kWh: {delivered_wh} Wh"


# ---- what was claimed on chain, and paid


@dataclass(frozen=True, slots=True)
class _Transaction:
    """A signed EIP-1559 transaction, taken apart."""

    chain_id: int
    nonce: int
    max_priority_fee_per_gas_wei: int
    max_fee_per_gas_wei: int
    to: bytes
    value_wei: int
    data: bytes
    signer: Address


def _settlements(told: _Told, signer: Address | None) -> str:
    signers: set[Address] = set()
    for event, session in zip(told.events, told.before, strict=True):
        if isinstance(event, ev.SettlementSigned):
            assert session is not None
            signers.add(_settlement(told, event, session).signer)
    _demand(len(signers) <= 1, "two accounts have signed settlements")
    _demand(signer is None or signers <= {signer}, f"signed by {', '.join(map(hex0x, signers))}")
    if not signers:
        return "none"
    who = signers.pop()
    return f"signed by {'the provider' if who == told.provider else 'the operator'} {hex0x(who)}"


def _settlement(told: _Told, event: ev.SettlementSigned, session: Session) -> _Transaction:
    _demand(keccak(event.raw_tx) == event.tx_hash, "the transaction's hash is not keccak of its bytes")
    tx = _transaction(event.raw_tx)
    _demand(tx.chain_id == told.domain.chain_id, f"the transaction is for chain {tx.chain_id}")
    _demand(tx.to == told.domain.contract and tx.value_wei == 0, "the transaction goes elsewhere")
    said = (event.nonce, event.max_priority_fee_per_gas_wei, event.max_fee_per_gas_wei)
    found = (tx.nonce, tx.max_priority_fee_per_gas_wei, tx.max_fee_per_gas_wei)
    _demand(said == found, "nonce or fees are not the transaction's")
    _demand(
        event.energy_wh_settled == session.energy_wh_acked, "it claims another amount than was acknowledged"
    )
    wanted = contract.encode_end_connection(session.terms.token, event.energy_wh_settled, session.ack)
    _demand(tx.data == wanted, "it claims another token, amount or receipt than this session's")
    return tx


def _payment(told: _Told) -> str:
    session, ended = told.session, told.session.ended
    if ended is None:
        _demand(
            session.stage not in (Stage.SETTLED, Stage.STRANDED) or session.settlement_reverts > 0,
            "no payment is here",
        )
        return "not settled"
    settled_wh, terms = ended.energy_wh_settled, session.terms
    _demand(settled_wh <= terms.energy_wh_ordered, "more was settled than ordered")
    _demand(
        ended.fee_wei == cost_wei_floor(terms.rate_wei_per_kwh, settled_wh),
        "the fee is not rate times energy",
    )
    _demand(ended.fee_wei <= terms.deposit_wei, "the fee is more than the deposit")
    ours = {e.tx_hash: e.energy_wh_settled for e in told.events if isinstance(e, ev.SettlementSigned)}
    closing_wh = [e.energy_wh_conceded for e in told.events if isinstance(e, ev.ConnectionClosingSeen)]
    if ended.tx_hash in ours:
        wanted_wh = max([ours[ended.tx_hash], *closing_wh])
        _demand(
            settled_wh == wanted_wh,
            f"{settled_wh} Wh were settled by a transaction that claims {wanted_wh} Wh",
        )
    if session.stage is Stage.SETTLED:
        _demand(settled_wh >= session.energy_wh_acked, "less was settled than acknowledged")
    return f"{settled_wh} Wh for {ended.fee_wei} wei in {hex0x(ended.tx_hash)}; whether it is on the chain, only the chain knows"


# ---- a raw transaction


def _transaction(raw: bytes) -> _Transaction:
    """Take a signed EIP-1559 transaction apart and recover who signed it. Raises Unproven, Refused."""
    _demand(raw[:1] == bytes([DYNAMIC_FEE_TX]), "not an EIP-1559 transaction")
    (content, end) = _item(raw, 1)
    _demand(end == len(raw) and raw[1] >= 0xC0, "not one list")
    spans = list(_spans(content))
    _demand(len(spans) == TX_FIELDS, "not the fields of an EIP-1559 transaction")
    fields = [_item(content, at)[0] for at, _ in spans]
    _demand(fields[8] == b"", "an access list")
    signed = content[: spans[8][1]]
    hashed = keccak(bytes([DYNAMIC_FEE_TX]) + _list_head(len(signed)) + signed)
    parity = _int(fields[9])
    _demand(parity in (0, 1), "a signature without parity")
    signature = rules.word(_int(fields[10])) + rules.word(_int(fields[11])) + bytes([27 + parity])
    return _Transaction(
        chain_id=_int(fields[0]),
        nonce=_int(fields[1]),
        max_priority_fee_per_gas_wei=_int(fields[2]),
        max_fee_per_gas_wei=_int(fields[3]),
        to=fields[5],
        value_wei=_int(fields[6]),
        data=fields[7],
        signer=rules.recover(hashed, signature),
    )


def _spans(content: bytes) -> Iterator[tuple[int, int]]:
    at = 0
    while at < len(content):
        _, end = _item(content, at)
        yield at, end
        at = end


def _item(data: bytes, at: int) -> tuple[bytes, int]:
    """The RLP item that begins at `at`, without its head, and where it ends (Ethereum yellow paper, appendix B)."""
    _demand(at < len(data), "cut short")
    head = data[at]
    if head < 0x80:
        return data[at : at + 1], at + 1
    short_max = 0xB7 if head < 0xC0 else 0xF7
    base = 0x80 if head < 0xC0 else 0xC0
    if head <= short_max:
        start, length = at + 1, head - base
    else:
        width = head - short_max
        start, length = at + 1 + width, _int(data[at + 1 : at + 1 + width])
        _demand(length > 55, "a long form for a short item")
    _demand(start + length <= len(data), "cut short")
    return data[start : start + length], start + length


def _list_head(length: int) -> bytes:
    if length <= 55:
        return bytes([0xC0 + length])
    width = (length.bit_length() + 7) // 8
    return bytes([0xF7 + width]) + length.to_bytes(width, "big")


def _int(data: bytes) -> int:
    _demand(data[:1] != b"\0", "a number with leading zeroes")
    return int.from_bytes(data, "big")


def parsed_meter_key(text: str) -> bytes:
    """A meter's public key as people have it: DER in hex (with or without 0x) or base64. Raises ValueError."""
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        return base64.b64decode(text, validate=True)
