"""Everything that happened to us and matters, in the past tense. These, in order, are the journal; replaying them is the book.

Rules
* Frozen, without logic. Only what must survive a crash is an event: polls, headers and connections are not (`book.Live`).
* Every event carries `at_s`, chain time as we knew it when it happened. Nothing reads it as a clock across machines.
* A field's name is its unit. Renaming a field or an event breaks old journals: add, never rename.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Literal

from agent.core.token import Ack
from agent.core.units import Address, BidId, BlockHash, SessionId, Token, TxHash

Scheme = Literal["eip712", "eip191"]


class StopReason(StrEnum):
    """Why energy stopped for good, in OCPP 2.1's words (ReasonEnumType)."""

    ENERGY_LIMIT_REACHED = "EnergyLimitReached"  # the order is delivered
    TIME_LIMIT_REACHED = "TimeLimitReached"  # the token's validity ends
    EV_DISCONNECTED = "EVDisconnected"
    REMOTE = "Remote"  # the consumer asked, or ended the connection on chain
    LOCAL = "Local"  # the owner pressed stop
    TIMEOUT = "Timeout"  # no-show, or no receipt for too long
    POWER_LOSS = "PowerLoss"  # the charger stayed unreachable
    GROUND_FAULT = "GroundFault"
    SOC_LIMIT_REACHED = "SOCLimitReached"  # the provider's battery is at its reserve
    DE_AUTHORIZED = "DeAuthorized"  # the entitlement vanished from the chain
    OTHER = "Other"


@dataclass(frozen=True, slots=True)
class Terms:
    """One `connect`, as the contract's logs and its block tell it. Everything a session is about, fixed for its life."""

    session_id: SessionId
    token: Token
    consumer: Address
    provider: Address
    auction_nonce: int
    energy_wh_ordered: int
    rate_wei_per_kwh: int
    deposit_wei: int
    bond_wei: int
    issued_at_s: int  # timestamp of the block, the paper's BTS
    valid_until_s: int  # absolute expiry
    block_number: int
    block_hash: BlockHash
    log_index: int
    tx_hash: TxHash


@dataclass(frozen=True, slots=True)
class Presentation:
    """A consumer's verified PresentToken, as the door took it."""

    sref: str  # where this consumer is reached (PROTOCOL section 6); never the token
    port: str
    scheme: Scheme
    token: Token
    session_key: Address  # zero: the consumer's own key signs receipts
    max_energy_wh: int
    valid_until_s: int
    challenge: bytes
    signature: bytes
    digest: bytes  # keccak of the presented bytes: a byte-identical repeat gets the same answer


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened. Subclasses are the vocabulary."""

    at_s: int


# ---- the chain said


@dataclass(frozen=True, slots=True)
class ConnectedSeen(Event):
    """A `Connected` for us appeared, not yet believed. Nothing is owed; early tokens may now be kept."""

    terms: Terms


@dataclass(frozen=True, slots=True)
class ConnectedBelieved(Event):
    """It is `confirmations` deep and the contract's state agrees."""

    session_id: SessionId
    block_hash: BlockHash


@dataclass(frozen=True, slots=True)
class ConnectedFinal(Event):
    """It cannot be undone any more: the cap on unfinal energy is lifted."""

    session_id: SessionId
    block_hash: BlockHash


@dataclass(frozen=True, slots=True)
class ConnectedOrphaned(Event):
    """Its block fell out of the chain."""

    session_id: SessionId
    block_hash: BlockHash


@dataclass(frozen=True, slots=True)
class ConnectionClosingSeen(Event):
    """The consumer opened a close on chain, conceding `energy_wh_conceded`; it becomes final at `close_at_s`."""

    session_id: SessionId
    energy_wh_conceded: int
    close_at_s: int


@dataclass(frozen=True, slots=True)
class ConnectionEndedSeen(Event):
    """`ConnectionEnded` appeared, at any depth: energy must stop now."""

    session_id: SessionId
    energy_wh_settled: int
    fee_wei: int
    tx_hash: TxHash
    block_hash: BlockHash


@dataclass(frozen=True, slots=True)
class ConnectionEndedOrphaned(Event):
    """The block of that `ConnectionEnded` fell out of the chain: the settlement is owed again."""

    session_id: SessionId
    block_hash: BlockHash


@dataclass(frozen=True, slots=True)
class ConnectionEndedBelieved(Event):
    """That `ConnectionEnded` is final: no reorganisation can take the payment back any more."""

    session_id: SessionId
    block_hash: BlockHash


@dataclass(frozen=True, slots=True)
class BlocksScanned(Event):
    """Every log up to and including this block has been accepted: where catch-up starts after a restart."""

    block_number: int
    block_hash: BlockHash


# ---- the consumer said (through the door, verified)


@dataclass(frozen=True, slots=True)
class TokenPresented(Event):
    """A verified presentation; early (before we believe the chain) or in time."""

    session_id: SessionId
    presentation: Presentation


@dataclass(frozen=True, slots=True)
class ReceiptCredited(Event):
    """A receipt that the contract would pay. Journaled first, then credited."""

    session_id: SessionId
    energy_wh_acked: int
    ack: Ack


# ---- the charger showed


@dataclass(frozen=True, slots=True)
class SessionAccepted(Event):
    """The begin register is on disk, contactor open: the session holds this port."""

    session_id: SessionId
    register_mwh_begin: int


@dataclass(frozen=True, slots=True)
class DeliveryBegan(Event):
    """Power is offered from this register on, by this life of the agent (`Live.life`)."""

    session_id: SessionId
    register_mwh: int
    life: int


@dataclass(frozen=True, slots=True)
class DeliveryPaused(Event):
    """The contactor is seen open at this register; may resume. `reason` is one of `session.Hindrance`."""

    session_id: SessionId
    register_mwh: int
    reason: str


@dataclass(frozen=True, slots=True)
class StopDecided(Event):
    """Energy ends for good. Before power was ever offered this is already the end, with 0 Wh."""

    session_id: SessionId
    stop_reason: StopReason
    detail: str


@dataclass(frozen=True, slots=True)
class DeliveryEnded(Event):
    """The end intent: never energise this session again. `seen_open` False locks the port out (rule 8)."""

    session_id: SessionId
    register_mwh_end: int
    seen_open: bool


@dataclass(frozen=True, slots=True)
class MeterRecordSigned(Event):
    """An OCMF record, kept as the original string (re-serialising would break its signature)."""

    session_id: SessionId
    moment: Literal["begin", "end"]
    ocmf: str
    public_key: bytes = (
        b""  # the meter's, as DER SubjectPublicKeyInfo: who keeps the record can then check it
    )


@dataclass(frozen=True, slots=True)
class PortLocked(Event):
    """Power flowed that no session had asked for: this port gives power to nobody until a human has looked at it."""

    port: str


@dataclass(frozen=True, slots=True)
class PortUnlocked(Event):
    """A human found the contactor in order again."""

    port: str


# ---- the sender did


@dataclass(frozen=True, slots=True)
class SettlementSigned(Event):
    """The settlement transaction, signed and on disk *before* it is broadcast. Same nonce again: a replacement."""

    session_id: SessionId
    energy_wh_settled: int
    nonce: int
    tx_hash: TxHash
    raw_tx: bytes
    max_fee_per_gas_wei: int
    max_priority_fee_per_gas_wei: int


@dataclass(frozen=True, slots=True)
class SettlementReverted(Event):
    """It was mined and failed, by this name."""

    session_id: SessionId
    tx_hash: TxHash
    error: str


# ---- the owner bids (through the local socket), and the sender does


@dataclass(frozen=True, slots=True)
class BidDecided(Event):
    """The owner offers to deliver at this rate in this very auction. Not signed by `until_s`, it is given up."""

    bid_id: BidId
    consumer: Address
    auction_nonce: int
    rate_wei_per_kwh: int
    until_s: int


@dataclass(frozen=True, slots=True)
class BidSigned(Event):
    """The bid's transaction, signed and on disk *before* it is broadcast. Same nonce again: a replacement."""

    bid_id: BidId
    nonce: int
    tx_hash: TxHash
    raw_tx: bytes
    gas_wei_max: int  # what the bid is worth in gas: no replacement costs more


@dataclass(frozen=True, slots=True)
class BidEnded(Event):
    """It was mined and taken (`error` empty), or it was not placed, by this name."""

    bid_id: BidId
    error: str


# ---- time did


@dataclass(frozen=True, slots=True)
class SessionLapsed(Event):
    """Orphaned for good: validity and grace are over, nothing is owed."""

    session_id: SessionId


@dataclass(frozen=True, slots=True)
class HistoryFolded(Event):
    """Long closed sessions left the live book for the history; what else their rows said to the book stands here."""

    closed_before_s: int
    records_signed: int
    scanned_number: int
    scanned_hash: BlockHash


KINDS: dict[str, type[Event]] = {kind.__name__: kind for kind in Event.__subclasses__()}
