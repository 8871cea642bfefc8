"""The typed view of the V2V contract: calldata out, results and logs in, revert data to names. No network here.

Rules
* Bytes inside: addresses are 20 bytes, tokens, ids and hashes 32. Units are in the names; the contract's `rate` is
  `rate_wei_per_kwh`, its `validity` is `valid_until_s` (absolute).
* Everything is looked up in the checked-in ABI, so a contract that changed its shape fails here, loudly, in a test.
* What a node sends is not trusted: a log that is not exactly one of ours is None; a result that does not decode raises
  Transient, as any other wrong answer of a node.
* eth_abi is slow to import (0.1 s and more), so it is imported by the first call that needs it.

May not know: nodes, transactions, keys, sessions of the agent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from enum import IntEnum
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

from agent.core.token import Ack
from agent.core.units import Address, SessionId, Token
from agent.errors import Transient
from contracts import load_artefact

if TYPE_CHECKING:  # the import itself is what `_codec` puts off
    from eth_abi.codec import ABICodec

ZERO_ADDRESS = Address(bytes(20))
SELECTOR_LENGTH = 4
REVERT_TEXT_LENGTH_MAX = 200  # a hostile contract's Error(string) ends in logs and on terminals

# ---------------------------------------------------------------------------------------- what views tell


@dataclass(frozen=True, slots=True)
class MarketParameters:
    """The rules of one market, fixed at deployment (PROTOCOL section 2, defaults). In the order of the Solidity struct.

    Bounds: bidding and validity at least 1 s, validity below 2**18 s, at most 7 soft closes, bond at most 10000 bps.
    """

    bidding_s_min: int = 60
    bidding_s_max: int = 86_400
    soft_close_s: int = 30
    soft_close_count_max: int = 5
    connect_window_s: int = 900
    token_validity_s_min: int = 300
    token_validity_s_max: int = 172_800
    challenge_s: int = 43_200
    grace_s: int = 259_200
    bond_bps: int = 10_000


SETTLEMENT_GAS = (
    60_000  # `endConnection` with a session key's receipt at its dearest, and a little more: docs/gas.md
)


class SessionStatus(IntEnum):
    """NONE: never opened, or settled (the contract clears the word; `ConnectionEnded` tells how it ended)."""

    NONE = 0
    ACTIVE = 1
    CLOSING = 2


@dataclass(frozen=True, slots=True)
class SessionState:
    """`sessions(token)`: a session between `connect` and its settlement. All zero when there is none."""

    status: SessionStatus
    consumer: Address
    provider: Address
    auction_nonce: int
    energy_wh: int
    claimed_wh: int  # the highest amount conceded or submitted
    rate_wei_per_kwh: int
    deposit_wei: int
    bond_wei: int
    settle_at_s: int  # from then on anyone may settle: validity + grace, or earlier the end of a challenge
    operator_bond: bool

    @property
    def is_open(self) -> bool:
        """Connected and not settled."""
        return self.status is not SessionStatus.NONE


@dataclass(frozen=True, slots=True)
class AuctionState:
    """`auctions(consumer)`: the consumer's live auction. All zero but the nonce when there is none."""

    is_live: bool
    auction_nonce: int
    energy_wh: int
    start_rate_wei_per_kwh: int
    rate_wei_per_kwh: int  # lowest bid, 0 without bids
    provider: Address  # lowest bidder, zero without bids
    closing_time_s: int
    connect_by_s: int
    token_validity_s: int
    deposit_wei: int
    bond_wei: int
    operator_bond: bool

    @property
    def has_bid(self) -> bool:
        """Somebody leads (or, after closing, has won)."""
        return self.rate_wei_per_kwh > 0

    @property
    def rate_wei_per_kwh_max(self) -> int:
        """The highest rate the next bid may name; 0 when no lower bid is possible."""
        rate = self.rate_wei_per_kwh
        return rate - max(1, rate // 100) if rate else self.start_rate_wei_per_kwh


@dataclass(frozen=True, slots=True)
class OperatorState:
    """`operatorOf(account)`: the hot key, and how much of its limit is locked in bonds now."""

    operator: Address
    bond_wei_limit: int
    bond_wei_locked: int


@dataclass(frozen=True, slots=True)
class EvInfo:
    """`evInfo(ev)`: the salted commitment given to `addEV`, and when. Zero for an account that is no EV."""

    info: bytes
    added_at_s: int


# --------------------------------------------------------------------------------------------------- logs


@dataclass(frozen=True, slots=True)
class Log:
    """One decoded event. `contract` is who emitted it; compare it. Subclasses are named as the contract's events,
    their fields stand in the event's order.
    """

    contract: Address


@dataclass(frozen=True, slots=True)
class EVAdded(Log):
    """The organisation registered an EV."""

    ev: Address
    info: bytes


@dataclass(frozen=True, slots=True)
class EVRemoved(Log):
    """The organisation took an EV out; its exits stay open."""

    ev: Address


@dataclass(frozen=True, slots=True)
class StatusChanged(Log):
    """The market was opened or paused."""

    active: bool


@dataclass(frozen=True, slots=True)
class Deposited(Log):
    """Value that came with a call was credited to the ledger."""

    account: Address
    amount_wei: int


@dataclass(frozen=True, slots=True)
class Withdrawn(Log):
    """Ledger money left the contract."""

    account: Address
    to: Address
    amount_wei: int


@dataclass(frozen=True, slots=True)
class OperatorSet(Log):
    """An account named (or, with zero, revoked) its hot key."""

    account: Address
    operator: Address
    bond_wei_limit: int


@dataclass(frozen=True, slots=True)
class AuctionStarted(Log):
    """A consumer asks for energy."""

    consumer: Address
    auction_nonce: int
    energy_wh: int
    start_rate_wei_per_kwh: int
    closing_time_s: int
    token_validity_s: int
    terms: bytes


@dataclass(frozen=True, slots=True)
class BidPlaced(Log):
    """A provider leads now; the closing time may have moved."""

    consumer: Address
    auction_nonce: int
    provider: Address
    rate_wei_per_kwh: int
    closing_time_s: int


@dataclass(frozen=True, slots=True)
class AuctionEnded(Log):
    """The bidding is over; the zero provider: nobody bid. Can be announced again: read it idempotently."""

    consumer: Address
    auction_nonce: int
    provider: Address
    rate_wei_per_kwh: int


@dataclass(frozen=True, slots=True)
class AuctionCancelled(Log):
    """Both sides were refunded."""

    consumer: Address
    auction_nonce: int


@dataclass(frozen=True, slots=True)
class Connected(Log):
    """The paper's event (Algorithm 2)."""

    provider: Address
    consumer: Address
    token: Token
    valid_until_s: int


@dataclass(frozen=True, slots=True)
class SessionOpened(Log):
    """Comes with every `Connected`: everything a session is about."""

    session_id: SessionId
    token: Token
    consumer: Address
    provider: Address
    auction_nonce: int
    energy_wh: int
    rate_wei_per_kwh: int
    deposit_wei: int
    bond_wei: int
    issued_at_s: int
    valid_until_s: int


@dataclass(frozen=True, slots=True)
class ReceiptAccepted(Log):
    """A submitted receipt raised the claim."""

    token: Token
    consumer: Address
    provider: Address
    claimed_wh: int


@dataclass(frozen=True, slots=True)
class ConnectionClosing(Log):
    """The consumer conceded an amount; from `close_at_s` on anyone may settle."""

    token: Token
    consumer: Address
    provider: Address
    claimed_wh: int
    close_at_s: int


@dataclass(frozen=True, slots=True)
class ConnectionEnded(Log):
    """Paid, final."""

    token: Token
    consumer: Address
    provider: Address
    delivered_wh: int
    fee_wei: int


@dataclass(frozen=True, slots=True)
class OwnershipTransferStarted(Log):
    """A new organisation address was proposed."""

    previous_owner: Address
    new_owner: Address


@dataclass(frozen=True, slots=True)
class OwnershipTransferred(Log):
    """The organisation's address changed."""

    previous_owner: Address
    new_owner: Address


LOG_TYPES: dict[str, type[Log]] = {kind.__name__: kind for kind in Log.__subclasses__()}


def topic_of(kind: type[Log]) -> bytes:
    """The first topic of this event."""
    return _event_topics()[kind.__name__]


def provider_topics(provider: Address) -> list[bytes | list[bytes] | None]:
    """One log filter (by place) for everything that happens to a provider's sessions, from opening to settlement.

    `Connected` has its provider elsewhere (the paper's order), but never comes without `SessionOpened`.
    """
    kinds = [topic_of(kind) for kind in (SessionOpened, ReceiptAccepted, ConnectionClosing, ConnectionEnded)]
    return [kinds, None, None, provider.rjust(32, b"\0")]


def auction_topics() -> list[bytes | list[bytes] | None]:
    """One log filter for everything a bidder watches."""
    return [[topic_of(kind) for kind in (AuctionStarted, BidPlaced, AuctionEnded, AuctionCancelled)]]


def decode_log(address: bytes, topics: Sequence[bytes], data: bytes) -> Log | None:
    """The event of a log, or None if it is not exactly one of ours. The caller compares `contract` with its own."""
    entry = _events_by_topic().get(bytes(topics[0])) if topics else None
    if entry is None or len(topics) != 1 + sum(part["indexed"] for part in entry["inputs"]):
        return None
    types = [
        [part["type"] for part in entry["inputs"] if part["indexed"] is indexed] for indexed in (True, False)
    ]
    try:
        indexed_values = iter(_decoded(types[0], b"".join(topics[1:])))
        data_values = iter(_decoded(types[1], data))
    except Transient:
        return None
    values = [next(indexed_values if part["indexed"] else data_values) for part in entry["inputs"]]
    return LOG_TYPES[entry["name"]](Address(bytes(address)), *values)


# -------------------------------------------------------------------------------- calldata: organisation


def encode_deploy(market: MarketParameters) -> bytes:
    """The data of the transaction that creates a market; its sender becomes the organisation (owner)."""
    constructor = next(entry for entry in load_artefact().abi if entry["type"] == "constructor")
    return load_artefact().bytecode + _codec().encode(_types(constructor["inputs"]), [astuple(market)])


def encode_add_ev(ev: Address, info: bytes) -> bytes:
    """`addEV`; `info` is 32 bytes, a salted commitment."""
    return _call("addEV", ev, info)


def encode_remove_ev(ev: Address) -> bytes:
    """`removeEV`."""
    return _call("removeEV", ev)


def encode_change_status(active: bool) -> bytes:
    """`changeStatus`."""
    return _call("changeStatus", active)


def encode_transfer_ownership(new_owner: Address) -> bytes:
    """`transferOwnership`: the new owner must accept."""
    return _call("transferOwnership", new_owner)


def encode_accept_ownership() -> bytes:
    """`acceptOwnership`."""
    return _call("acceptOwnership")


# -------------------------------------------------------------------------------------- calldata: ledger


def encode_deposit() -> bytes:
    """`deposit`, payable."""
    return _call("deposit")


def encode_withdraw(amount_wei: int, to: Address) -> bytes:
    """`withdraw` from the sender's own ledger."""
    return _call("withdraw", amount_wei, to)


def encode_set_operator(operator: Address, bond_wei_limit: int) -> bytes:
    """`setOperator`; the zero operator revokes."""
    return _call("setOperator", operator, bond_wei_limit)


# ------------------------------------------------------------------------------------- calldata: auction


def encode_start_auction(
    energy_wh: int, bidding_s: int, start_rate_wei_per_kwh: int, token_validity_s: int, terms: bytes
) -> bytes:
    """`startAuction`, payable; `terms` is 32 bytes."""
    return _call("startAuction", energy_wh, bidding_s, start_rate_wei_per_kwh, token_validity_s, terms)


def encode_place_bid(consumer: Address, auction_nonce: int, rate_wei_per_kwh: int) -> bytes:
    """`placeBid`, payable."""
    return _call("placeBid", consumer, auction_nonce, rate_wei_per_kwh)


def encode_place_bid_for(
    provider: Address, consumer: Address, auction_nonce: int, rate_wei_per_kwh: int
) -> bytes:
    """`placeBidFor`, by the provider's operator; not payable."""
    return _call("placeBidFor", provider, consumer, auction_nonce, rate_wei_per_kwh)


def encode_end_auction(consumer: Address) -> bytes:
    """`endAuction`."""
    return _call("endAuction", consumer)


def encode_cancel_auction(consumer: Address) -> bytes:
    """`cancelAuction`."""
    return _call("cancelAuction", consumer)


# ------------------------------------------------------------------------------------- calldata: session


def encode_connect(provider: Address, energy_wh: int) -> bytes:
    """`connect` with the winner, for the auctioned amount."""
    return _call("connect", provider, energy_wh)


def encode_end_connection(token: Token, delivered_wh: int, ack: Ack) -> bytes:
    """`endConnection`; `token.NO_ACK` where no receipt is needed."""
    return _call("endConnection", token, delivered_wh, _ack_struct(ack))


def encode_submit_receipt(token: Token, delivered_wh: int, ack: Ack) -> bytes:
    """`submitReceipt`."""
    return _call("submitReceipt", token, delivered_wh, _ack_struct(ack))


def encode_settle(token: Token) -> bytes:
    """`settle`."""
    return _call("settle", token)


# ------------------------------------------------------------- views: each `encode_x` with its `decode_x`


def encode_session_id_of(consumer: Address, provider: Address, auction_nonce: int) -> bytes:
    """`sessionIdOf`."""
    return _call("sessionIdOf", consumer, provider, auction_nonce)


def decode_session_id_of(data: bytes) -> SessionId:
    """32 bytes, equal to `token.session_id` on this chain."""
    return SessionId(_result("sessionIdOf", data)[0])


def encode_is_receipt_valid(token: Token, delivered_wh: int, ack: Ack) -> bytes:
    """`isReceiptValid`."""
    return _call("isReceiptValid", token, delivered_wh, _ack_struct(ack))


def decode_is_receipt_valid(data: bytes) -> bool:
    """Would the contract pay this amount now?"""
    return bool(_result("isReceiptValid", data)[0])


def encode_sessions(token: Token) -> bytes:
    """`sessions`."""
    return _call("sessions", token)


def decode_sessions(data: bytes) -> SessionState:
    """The session of a token."""
    status, *rest = _result("sessions", data)[0]
    try:
        return SessionState(SessionStatus(status), *rest)
    except ValueError as error:
        _wrong_answer("sessions", error)


def encode_auctions(consumer: Address) -> bytes:
    """`auctions`."""
    return _call("auctions", consumer)


def decode_auctions(data: bytes) -> AuctionState:
    """The consumer's auction."""
    return AuctionState(*_result("auctions", data)[0])


def encode_auction_nonce(consumer: Address) -> bytes:
    """`auctionNonce`."""
    return _call("auctionNonce", consumer)


def decode_auction_nonce(data: bytes) -> int:
    """How many auctions the consumer has started."""
    return int(_result("auctionNonce", data)[0])


def encode_balances(account: Address) -> bytes:
    """`balances`."""
    return _call("balances", account)


def decode_balances(data: bytes) -> int:
    """The account's ledger, wei."""
    return int(_result("balances", data)[0])


def encode_is_ev(account: Address) -> bytes:
    """`isEV`."""
    return _call("isEV", account)


def decode_is_ev(data: bytes) -> bool:
    """Registered now?"""
    return bool(_result("isEV", data)[0])


def encode_ev_info(ev: Address) -> bytes:
    """`evInfo`."""
    return _call("evInfo", ev)


def decode_ev_info(data: bytes) -> EvInfo:
    """Commitment and time of registration."""
    return EvInfo(*_result("evInfo", data))


def encode_operator_of(account: Address) -> bytes:
    """`operatorOf`."""
    return _call("operatorOf", account)


def decode_operator_of(data: bytes) -> OperatorState:
    """The account's operator and its limit."""
    return OperatorState(*_result("operatorOf", data))


def encode_status() -> bytes:
    """`status`."""
    return _call("status")


def decode_status(data: bytes) -> bool:
    """Is the market open?"""
    return bool(_result("status", data)[0])


def encode_owner() -> bytes:
    """`owner`."""
    return _call("owner")


def decode_owner(data: bytes) -> Address:
    """The organisation."""
    return Address(_result("owner", data)[0])


def encode_parameters() -> bytes:
    """`parameters`."""
    return _call("parameters")


def decode_parameters(data: bytes) -> MarketParameters:
    """The market's rules."""
    return MarketParameters(*_result("parameters", data)[0])


def encode_domain_separator() -> bytes:
    """`domainSeparator`."""
    return _call("domainSeparator")


def decode_domain_separator(data: bytes) -> bytes:
    """32 bytes, equal to `token.Domain(...).separator`."""
    return bytes(_result("domainSeparator", data)[0])


# ----------------------------------------------------------------------------------------- reverts


def revert_name(data: bytes) -> str:
    """Revert data as words: `InvalidReceipt`, `BidTooHigh(rateMax=297)`, `Error(text)`, `Panic(0x11)`, `no reason given`.

    Never raises: what it cannot name it shows as its selector.
    """
    if not data:
        return "no reason given"
    selector, arguments = bytes(data[:SELECTOR_LENGTH]), bytes(data[SELECTOR_LENGTH:])
    entry = _errors_by_selector().get(selector)
    try:
        if entry is not None:
            values = _decoded(_types(entry["inputs"]), arguments)
            return _error_text(entry, values)
    except Transient:
        pass  # our selector with somebody else's arguments: shown raw below
    return f"unknown error 0x{selector.hex()}"


def _error_text(entry: dict[str, Any], values: Sequence[Any]) -> str:
    name = str(entry["name"])
    if name == "Error":
        return f"Error({values[0][:REVERT_TEXT_LENGTH_MAX]!r})"
    if name == "Panic":
        return f"Panic(0x{values[0]:02x})"
    shown = [
        f"{part['name']}={'0x' + value.hex() if isinstance(value, bytes) else value}"
        for part, value in zip(entry["inputs"], values, strict=True)
    ]
    return f"{name}({', '.join(shown)})" if shown else name


# ------------------------------------------------------------------------------------- inside: the ABI

_SOLIDITY_ERRORS: list[dict[str, Any]] = [
    {"type": "error", "name": "Error", "inputs": [{"name": "message", "type": "string"}]},
    {"type": "error", "name": "Panic", "inputs": [{"name": "code", "type": "uint256"}]},
]


def _types(parts: Sequence[dict[str, Any]]) -> list[str]:
    """ABI types as eth_abi writes them; structs as (a,b,c)."""
    return [
        f"({','.join(_types(part['components']))})" if part["type"] == "tuple" else part["type"]
        for part in parts
    ]


def _hash_of(entry: dict[str, Any]) -> bytes:
    from eth_utils.crypto import keccak

    return keccak(text=f"{entry['name']}({','.join(_types(entry['inputs']))})")


@cache
def _codec() -> ABICodec:
    """eth_abi, but addresses come out as 20 bytes instead of 0x-hex text."""
    from eth_abi.codec import ABICodec
    from eth_abi.decoding import AddressDecoder
    from eth_abi.registry import BaseEquals, registry

    class RawAddressDecoder(AddressDecoder):
        decoder_fn = staticmethod(bytes)  # type: ignore[assignment] # typed for its default, 0x-hex text

    own = registry.copy()  # type: ignore[no-untyped-call]
    own.unregister_decoder("address")
    is_address = BaseEquals("address")  # type: ignore[no-untyped-call]
    own.register_decoder(is_address, RawAddressDecoder, label="address")
    return ABICodec(own)


@cache
def _functions() -> dict[str, tuple[bytes, list[str], list[str]]]:
    """Selector, argument types and result types by name (our contract overloads nothing)."""
    return {
        entry["name"]: (_hash_of(entry)[:SELECTOR_LENGTH], _types(entry["inputs"]), _types(entry["outputs"]))
        for entry in load_artefact().abi
        if entry["type"] == "function"
    }


@cache
def _events_by_topic() -> dict[bytes, dict[str, Any]]:
    return {_hash_of(entry): entry for entry in load_artefact().abi if entry["type"] == "event"}


@cache
def _event_topics() -> dict[str, bytes]:
    return {entry["name"]: topic for topic, entry in _events_by_topic().items()}


@cache
def _errors_by_selector() -> dict[bytes, dict[str, Any]]:
    errors = [entry for entry in load_artefact().abi if entry["type"] == "error"]
    return {_hash_of(entry)[:SELECTOR_LENGTH]: entry for entry in errors + _SOLIDITY_ERRORS}


def _call(name: str, *arguments: Any) -> bytes:
    """Selector and encoded arguments. A value that does not fit its type is our own mistake: an assertion, or eth_abi's
    EncodingError.
    """
    selector, types, _ = _functions()[name]
    for kind, value in zip(types, arguments, strict=True):
        assert kind != "bytes32" or len(value) == 32, (
            f"{name}: {kind} of {len(value)} bytes"
        )  # eth_abi would pad it
    return selector + _codec().encode(types, arguments)


def _ack_struct(ack: Ack) -> tuple[Any, ...]:
    assert len(ack.token) == len(ack.challenge) == 32, "token and challenge are 32 bytes"
    return astuple(ack)


def _result(name: str, data: bytes) -> tuple[Any, ...]:
    return _decoded(_functions()[name][2], data)


def _decoded(types: Sequence[str], data: bytes) -> tuple[Any, ...]:
    """Decoded values, addresses as 20 bytes. Raises Transient for what is not the encoding of these types."""
    from eth_abi.exceptions import DecodingError

    try:
        return _codec().decode(types, data)
    except (DecodingError, UnicodeDecodeError, OverflowError) as error:
        _wrong_answer(",".join(types), error)


def _wrong_answer(what: str, error: Exception) -> NoReturn:
    raise Transient(
        f"the node's answer is not a valid ({what}) of the contract",
        remedy="another node may answer; if not, this address is not a V2VCharging contract",
    ) from error
