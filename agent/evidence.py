"""One session as one self-contained file: everything that happened, and everything that proves what is owed for it.

    format, digest                what this is; SHA-256 of everything else, in canonical form
    market, provider, session_id  which contract on which chain, who sold, which session
    terms, presentation           what the chain said of the `connect`, and the consumer's signed token with its grant
    receipts                      every receipt that was credited; the last one is the highest
    records                       both OCMF records as signed, with the meter's public key
    settlements                   every settlement transaction that was signed, raw
    summary                       what came of it
    events                        all of the session's journal rows, oldest first; the sections above follow from them

Rules
* Canonical JSON (sorted keys, indented by one blank, 0x-hex, integers), so that the same session gives the same bytes.
* No private key, nothing of other sessions. It does hold signatures and nonces (PROTOCOL section 8 allows it): it is for the
  owner, and for whom the owner shows it to. Addresses and times are in it: treat it like a bill.

May not know: whether any of it is true (verify.py), where rows lie.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Final

from agent.core import events as ev
from agent.core.book import Book, step
from agent.core.events import Event
from agent.core.session import Session
from agent.core.token import Domain
from agent.core.units import Address, SessionId, hex0x
from agent.errors import Refused
from agent.rows import encoded

FORMAT: Final = "v2v-session/1"


def evidence(
    domain: Domain, provider: Address, session_id: SessionId, events: Sequence[Event]
) -> dict[str, Any]:
    """The file's content for one session's events. Raises Refused("unknown_session") for one that was never believed."""
    book = Book(domain, provider)
    for event in events:
        book = step(book, event)
    session = book.sessions.get(session_id)
    if session is None:
        raise Refused(
            "unknown_session", f"{hex0x(session_id)} was never believed here, so nothing came of it"
        )
    content = {
        "format": FORMAT,
        "market": {"chain_id": domain.chain_id, "contract": hex0x(domain.contract)},
        "provider": hex0x(provider),
        "session_id": hex0x(session_id),
        "terms": encoded(session.terms),
        "presentation": encoded(session.presentation),
        "receipts": [_body(event) for event in events if isinstance(event, ev.ReceiptCredited)],
        "records": [_body(event) for event in events if isinstance(event, ev.MeterRecordSigned)],
        "settlements": [_body(event) for event in events if isinstance(event, ev.SettlementSigned)],
        "summary": _summary(session),
        "events": [{"kind": type(event).__name__, "body": encoded(event)} for event in events],
    }
    return content | {"digest": digest(content)}


def _body(event: Event) -> Any:
    return encoded(event)


def _summary(session: Session) -> dict[str, Any]:
    ended = session.ended
    return {
        "stage": session.stage.value,
        "stop_reason": None if session.stop_reason is None else session.stop_reason.value,
        "energy_wh_ordered": session.order_wh,
        "energy_wh_delivered": session.energy_wh_delivered,
        "energy_wh_acked": session.energy_wh_acked,
        "energy_wh_settled": None if ended is None else ended.energy_wh_settled,
        "register_mwh_begin": session.register_mwh_begin,
        "register_mwh_end": session.register_mwh_end,
        "end_seen_open": session.end_seen_open,
        "fee_wei": None if ended is None else str(ended.fee_wei),
        "settlement_tx": None if ended is None else hex0x(ended.tx_hash),
    }


def digest(content: dict[str, Any]) -> str:
    """SHA-256 of everything but itself. It shows accidents; forgers meet the signatures, or a digest noted elsewhere."""
    return hex0x(hashlib.sha256(canonical({k: v for k, v in content.items() if k != "digest"})).digest())


def canonical(content: dict[str, Any]) -> bytes:
    """The file's bytes."""
    return json.dumps(content, sort_keys=True, indent=1, ensure_ascii=True).encode() + b"\n"
