"""The book as others see it: status for the owner, telemetry for a broker, one line, one dict for a log.

Rules
* Pure: (book, live) in; text, integers and dicts out. Nothing here decides anything.
* Privacy (PROTOCOL section 8): addresses are shortened; signatures, nonces, tokens, return addresses and raw
  transactions never appear. Session ids and transaction hashes are public on the chain: they stand in full.
* What is shown of an event is a list of what may be shown. A field that nobody thought about is not shown.
* Money is a decimal string, as in PROTOCOL's messages (it outgrows JavaScript); the rest are integers.

May not know: transports, who is asking.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any, Final

from agent.core.bidding import Bid
from agent.core.book import Book
from agent.core.events import Event
from agent.core.live import Live
from agent.core.session import CLOSED, Session, Stage, hindrance
from agent.core.settling import deadline_s, settlements_left, settlements_owed
from agent.core.units import cost_wei_floor, hex0x, short

CLOSED_SHOWN_MAX = 32  # newest finished sessions in a status; the journal has the rest
MWH_PER_KWH: Final = 1_000_000
CHARGING_LETTERS: Final = {
    "D": "C"
}  # evcc reads A, B, C; D is charging with ventilation; E and F stay what they are: faults
RUNNING = frozenset(
    {Stage.AUTHORISED, Stage.DELIVERING, Stage.PAUSED}
)  # stages in which a hindrance means something


# ---- status: one dict for the page and for `v2v provider sessions`


def status(book: Book, live: Live) -> dict[str, Any]:
    """Everything an owner may see, ready for JSON. `sessions` begins with the open ones; newest first."""
    return {
        "provider": short(book.provider),
        "chain_id": book.domain.chain_id,
        "contract": short(book.domain.contract),
        "at_s": live.at_s,
        "chain": chain(book, live),
        "ports": {name: port(book, live, name) for name in _ports(live)},
        "sessions": [session(one, live) for one in _shown(book)],
        "pending": len(book.pending),
        "gas": gas(book, live),
        "bids": [bid(one, live) for one in book.bids.values()],
    }


def gas(book: Book, live: Live) -> dict[str, Any]:
    """For how many settlements the operator's coins last, at prudent fees; None until they were looked at."""
    purse = live.purse
    return {
        "balance_wei": None if purse is None else str(purse.balance_wei),
        "settlement_wei": None if purse is None else str(purse.settlement_wei),
        "settlements_left": None
        if purse is None
        else settlements_left(purse.balance_wei, purse.settlement_wei),
        "settlements_owed": settlements_owed(book),
    }


def bid(one: Bid, live: Live) -> dict[str, Any]:
    """One bid of ours. `state`: decided, signed, sent, refused (it is tried again), placed, or the name of its end."""
    tried = live.tried.get(one.bid_id)
    state = "decided" if one.signed is None else "signed" if tried is None else tried.state
    return {
        "bid_id": hex0x(one.bid_id),
        "consumer": short(one.consumer),
        "auction_nonce": one.auction_nonce,
        "rate_wei_per_kwh": str(one.rate_wei_per_kwh),
        "state": (one.error or "placed") if one.ended else state,
        "tx": None if one.signed is None else hex0x(one.signed.tx_hash),
    }


def chain(book: Book, live: Live) -> dict[str, Any]:
    """How well we see the chain: newest header, its age, whether it is fresh enough to deliver by."""
    return {
        "block": None if live.header is None else live.header.number,
        "scanned_block": book.scanned_number if book.scanned_number >= 0 else None,
        "view_age_s": live.view_age_s,
        "is_fresh": live.view_age_s is not None and live.view_age_s <= live.policy.max_view_age_s,
    }


def port(book: Book, live: Live, name: str) -> dict[str, Any]:
    """One charging port: what the charger shows now, and the session that holds it. None: not known now."""
    holder, reading = book.on_port(name), live.reading(name)
    port_live = live.ports.get(name)
    return {
        "stage": "IDLE" if holder is None else holder.stage,
        "session": None if holder is None else session(holder, live),
        "reason": _reason(book, live, name),
        "power_w": None if reading is None else reading.power_w,
        "current_ma": None if reading is None else reading.current_ma,
        "voltage_mv": None if reading is None else reading.voltage_mv,
        "register_mwh": None if reading is None else reading.register_mwh,
        "pilot_state": None if reading is None else reading.pilot_state,
        "seen_open": None if reading is None else reading.seen_open,
        "soc_permille": None if reading is None else reading.soc_permille,
        "fault": None if reading is None else reading.fault,
        "armed": port_live is not None and port_live.armed,
        "locked": book.locked_ports.get(name),
    }


def session(one: Session, live: Live) -> dict[str, Any]:
    """One session. `cost_wei`: what the energy so far costs; `secured_wei`: the part that is signed for."""
    terms = one.terms
    energy_wh = _energy_wh(one, live)
    settled_wh = None if one.ended is None else one.ended.energy_wh_settled
    return {
        "session_id": hex0x(one.session_id),
        "consumer": short(terms.consumer),
        "port": one.port,
        "stage": one.stage,
        "stage_at_s": one.stage_at_s,
        "is_final": one.final,
        "hindrance": _hindrance(one, live),
        "stop_reason": one.stop_reason,
        "stop_detail": one.stop_detail,
        "valid_until_s": terms.valid_until_s,
        "energy_wh_ordered": one.order_wh,
        "energy_wh_delivered": energy_wh,
        "energy_wh_acked": one.energy_wh_acked,
        "energy_wh_settled": settled_wh,
        "rate_wei_per_kwh": str(terms.rate_wei_per_kwh),
        "cost_wei": str(
            cost_wei_floor(terms.rate_wei_per_kwh, energy_wh) if one.ended is None else one.ended.fee_wei
        ),
        "secured_wei": str(cost_wei_floor(terms.rate_wei_per_kwh, one.energy_wh_acked)),
        "settlement_tx": _settlement_tx(one),
        "settlement_error": one.settlement_error,
        "settling": _settling(one, live),
    }


def _ports(live: Live) -> tuple[str, ...]:
    return tuple(sorted(live.policy.max_unacked_wh))


def _shown(book: Book) -> list[Session]:
    """Open sessions (bounded by the auctions we won), then the newest closed ones."""
    newest_first = sorted(book.sessions.values(), key=lambda one: one.stage_at_s, reverse=True)
    closed = [one for one in newest_first if one.stage in CLOSED]
    return [one for one in newest_first if one.stage not in CLOSED] + closed[:CLOSED_SHOWN_MAX]


def _energy_wh(one: Session, live: Live) -> int:
    """As the door tells the consumer: by the newest reading, even one too old to decide by."""
    port_live = None if one.port is None else live.ports.get(one.port)
    return one.energy_wh(None if port_live is None else port_live.reading)


def _hindrance(one: Session, live: Live) -> str | None:
    return hindrance(one, live) if one.stage in RUNNING else None


def _reason(book: Book, live: Live, name: str) -> str | None:
    """Why this port does not deliver, in one word or sentence; None when nothing is wrong."""
    if name in book.locked_ports:
        return f"locked: {book.locked_ports[name]}"
    holder, reading = book.on_port(name), live.reading(name)
    if holder is not None:
        return holder.stop_reason or _hindrance(holder, live)
    if reading is None:
        return "charger_silent"
    return None if reading.fault is None else f"charger_fault: {reading.fault}"


def _settlement_tx(one: Session) -> str | None:
    if one.ended is not None:
        return hex0x(one.ended.tx_hash)
    return None if one.settlement is None else hex0x(one.settlement.tx_hash)


def _settling(one: Session, live: Live) -> dict[str, Any] | None:
    """How the way to the money goes, while it goes. `waiting`: fees are absurd, until they fall or `until_s` nears."""
    if one.stage is not Stage.SETTLING:
        return None
    tried = live.tried.get(one.session_id)
    return {
        "state": "signing" if tried is None else tried.state,
        "reason": "" if tried is None else tried.reason,
        "until_s": deadline_s(one, live.policy.grace_s),
        "replacements": one.replacements,
    }


# ---- telemetry: retained scalars under the owner's own topics


def telemetry(book: Book, live: Live) -> dict[str, str]:
    """Topic suffix -> payload, each one small. Empty payload: not known now (clears what a broker retained).

    `state` and `port/<name>/state` are JSON; beside them one scalar a topic, as evcc reads it: W, kWh that
    never go back, A/B/C, true/false.
    """
    topics = {
        "state": _compact(
            {
                "provider": short(book.provider),
                "block": chain(book, live)["block"],
                "chain_is_fresh": chain(book, live)["is_fresh"],
                "ports": list(_ports(live)),
                "sessions_open": len(book.open_sessions()),
            }
        )
    }
    for name in _ports(live):
        topics |= {f"port/{name}/{key}": value for key, value in _port_telemetry(book, live, name).items()}
    return topics


def _port_telemetry(book: Book, live: Live, name: str) -> dict[str, str]:
    reading, holder = live.reading(name), book.on_port(name)
    register_mwh = None if reading is None else reading.register_mwh
    letter = "" if reading is None else CHARGING_LETTERS.get(reading.pilot_state, reading.pilot_state)
    return {
        "state": _compact(port(book, live, name)),
        "stage": "IDLE" if holder is None else holder.stage,
        "power": "" if reading is None else str(reading.power_w),
        "energy": "" if register_mwh is None else _kwh(register_mwh),
        "session_energy": _kwh(0 if holder is None else 1000 * _energy_wh(holder, live)),
        "status": letter,
        "charging": _json_bool(holder is not None and holder.stage is Stage.DELIVERING and letter == "C"),
        "enabled": _json_bool(name not in book.locked_ports),
    }


def _kwh(energy_mwh: int) -> str:
    """Three decimals, rounded down, so that a total never goes back."""
    return f"{energy_mwh // MWH_PER_KWH}.{energy_mwh % MWH_PER_KWH // 1000:03d}"


def _json_bool(value: bool) -> str:
    return "true" if value else "false"


def _compact(value: dict[str, Any]) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


# ---- one line


def status_line(book: Book, live: Live) -> str:
    """What `systemctl status` shows: the most important thing on each port, and whether we see the chain."""
    parts = [_port_line(book, live, name) for name in _ports(live)]
    if not chain(book, live)["is_fresh"]:
        parts.append(
            "no view of the chain" if live.header is None else f"chain view is {live.view_age_s} s old"
        )
    settling = [one.session_id for one in book.sessions.values() if one.stage is Stage.SETTLING]
    stranded = sum(one.stage is Stage.STRANDED for one in book.sessions.values())
    if settling:
        troubles = {
            _SETTLING_TROUBLES.get(live.tried[sid].state, "") for sid in settling if sid in live.tried
        }
        parts.append(f"{len(settling)} settling" + "".join(f" ({why})" for why in sorted(troubles) if why))
    if stranded:
        parts.append(f"{stranded} STRANDED, see `v2v provider sessions`")
    left = gas(book, live)["settlements_left"]
    if left is not None and left <= settlements_owed(book):
        parts.append(f"gas for only {left} settlements: send the operator coins")
    return "; ".join(parts)


_SETTLING_TROUBLES = {"waiting": "waits for lower fees", "refused": "refused", "stuck": "in no block yet"}


def _port_line(book: Book, live: Live, name: str) -> str:
    seen = port(book, live, name)
    why = f" ({seen['reason']})" if seen["reason"] else ""
    holder = seen["session"]
    if holder is None:
        return f"{name}: idle{why}"
    energy = f"{holder['energy_wh_delivered']} of {holder['energy_wh_ordered']} Wh"
    power = "" if not seen["power_w"] else f", {seen['power_w']} W"
    return f"{name}: {seen['stage']}{why} {energy}, {holder['energy_wh_acked']} Wh signed for{power}"


# ---- events, for a log


def event_name(kind: type[Event]) -> str:
    """A stable id: `DeliveryBegan` is "delivery.began", `MeterRecordSigned` "meter_record.signed"."""
    *noun, verb = re.findall(r"[A-Z][a-z]*", kind.__name__)
    return f"{'_'.join(noun)}.{verb}".lower()


def describe(event: Event) -> dict[str, Any]:
    """An event as a log may show it: `event` is its stable id, the rest what the lists below allow."""
    return {"event": event_name(type(event)), **dict(_described(event))}


def stage_changes(before: Book, after: Book) -> Iterator[dict[str, Any]]:
    """What to log beside an event: "session.settled" and the like, for each session in another stage now."""
    if before.sessions is after.sessions:
        return
    for session_id, one in after.sessions.items():
        was = before.sessions.get(session_id)
        if was is not one and (was is None or was.stage is not one.stage):
            yield {
                "event": f"session.{one.stage.lower()}",
                "session": hex0x(session_id),
                "port": one.port,
                "stage_before": None if was is None else was.stage,
                "stop_reason": one.stop_reason,
                "energy_wh_delivered": one.energy_wh_delivered,
                "energy_wh_acked": one.energy_wh_acked,
            }


def _plain(value: Any) -> Any:
    return value


def _described(item: object) -> Iterator[tuple[str, Any]]:
    for field in fields(item):  # type: ignore[arg-type]  # an event, or the terms inside one
        value = getattr(item, field.name)
        if field.name == "terms":
            yield from _described(value)
        elif field.name == "presentation":
            yield from ((name, getattr(value, name)) for name in _SHOWN_OF_PRESENTATION)
        elif field.name in _SHOWN:
            name, formatted = _SHOWN[field.name]
            yield name, formatted(value)


_SHOWN_OF_PRESENTATION = ("port", "scheme", "max_energy_wh")
_SHOWN: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "session_id": ("session", hex0x),
    "tx_hash": ("tx", hex0x),
    "block_hash": ("block_hash", hex0x),
    "scanned_hash": ("scanned_hash", hex0x),
    "consumer": ("consumer", short),
    "bid_id": ("bid", hex0x),
    "gas_wei_max": ("gas_wei_max", str),
    "rate_wei_per_kwh": ("rate_wei_per_kwh", str),
    "deposit_wei": ("deposit_wei", str),
    "bond_wei": ("bond_wei", str),
    "fee_wei": ("fee_wei", str),
    **{
        name: (name, _plain)
        for name in (
            "at_s",
            "port",
            "block_number",
            "auction_nonce",
            "energy_wh_ordered",
            "energy_wh_conceded",
            "energy_wh_acked",
            "energy_wh_settled",
            "valid_until_s",
            "until_s",
            "close_at_s",
            "register_mwh",
            "register_mwh_begin",
            "register_mwh_end",
            "seen_open",
            "life",
            "reason",
            "stop_reason",
            "detail",
            "moment",
            "error",
            "closed_before_s",
            "records_signed",
            "scanned_number",
            "nonce",  # the account's transaction count; the nonces of the plug are in no event
            "max_fee_per_gas_wei",
            "max_priority_fee_per_gas_wei",
        )
    },
}
HIDDEN: Final = (
    frozenset(  # looked at and kept back; a test holds that every field is in one of the two lists
        {
            "terms",
            "presentation",
            "ack",
            "raw_tx",
            "ocmf",
            "public_key",
            "token",
            "provider",
            "issued_at_s",
            "log_index",
        }
    )
)
