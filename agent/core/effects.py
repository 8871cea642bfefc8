"""Everything we owe the world, in the imperative. Derived from (book, live) at every beat, never remembered beside it.

There is no outbox and no resume code: after a crash the same book owes the same things.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

from agent.core.token import Ack
from agent.core.units import BidId, SessionId, Token, TxHash


@dataclass(frozen=True, slots=True)
class Effect:
    """Something owed. Subclasses are the vocabulary."""


@dataclass(frozen=True, slots=True)
class Deliver(Effect):
    """Offer power on this port until its register shows `register_mwh_stop`. Exactly one of Deliver/Hold per port."""

    port: str
    session_id: SessionId
    register_mwh_stop: int


class Firmness(IntEnum):
    """How hard to stop: the steps of rule 8 when the contactor is not seen open in time."""

    HOLD = 0
    LOCK = 1
    CUT_OFF = 2


@dataclass(frozen=True, slots=True)
class Hold(Effect):
    """No power on this port."""

    port: str
    firmness: Firmness = Firmness.HOLD


@dataclass(frozen=True, slots=True)
class SignSettlement(Effect):
    """Sign `endConnection(token, energy_wh, ack)` and journal it; do not send yet."""

    session_id: SessionId
    token: Token
    energy_wh: int
    ack: Ack


@dataclass(frozen=True, slots=True)
class BroadcastSettlement(Effect):
    """Send these very bytes, again and again until the chain shows them (or their replacement)."""

    session_id: SessionId
    tx_hash: TxHash
    raw_tx: bytes


@dataclass(frozen=True, slots=True)
class SignBid(Effect):
    """Look at the auction and the purse; then sign `placeBidFor` and journal it, or journal why not."""

    bid_id: BidId


@dataclass(frozen=True, slots=True)
class BroadcastBid(Effect):
    """Send these very bytes, again and again until their nonce is used up."""

    bid_id: BidId
    tx_hash: TxHash
    raw_tx: bytes


@dataclass(frozen=True, slots=True)
class SignMeterRecord(Effect):
    """Build this session's OCMF record (`record.payload`), sign it with the meter key, journal it."""

    session_id: SessionId
    moment: Literal["begin", "end"]
    pagination: int  # OCMF's PG: a running number, so that a missing record shows
