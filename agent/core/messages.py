"""What consumer and provider say to each other, byte for byte: strict JSON <-> frozen dataclasses (PROTOCOL sections 4-6).

Rules
* At most 4 KiB of UTF-8 without a byte order mark. Exactly the keys of the message; no floats, no duplicate keys, no
  nesting; integers fit 53 bits (JavaScript).
* Bytes are `0x` + hex of their exact length (any case in, lowercase out); money is a decimal string; text is bounded.
* `encode` gives canonical JSON (sorted keys, no spaces); `decode` accepts any spelling of the same object.
* `decode` raises only Refused("malformed", ...), in microseconds, before anything expensive is looked at.

May not know: sessions, transports, who may say what. Signatures are carried here, as they came; whoever checks one
normalises it first (`token.normalised`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_args

from agent.core.events import Scheme
from agent.core.token import ProviderHello
from agent.core.units import Address, SessionId, Token, TxHash, hex0x
from agent.errors import Refused

MESSAGE_BYTES_MAX = 4096  # bounds what a stranger can make us parse; the broker's packet limit says the same
INTEGER_MAX = 2**53 - 1  # what a JavaScript consumer can hold exactly
TEXT_LENGTH_MAX = 128  # reasons, stages, details
RECORD_LENGTH_MAX = 1800  # one OCMF record; two and the rest fit 4 KiB
SREF_LENGTH_MAX = 64
BRACKETS_MAX = 512  # bounds the parser's stack; web3's companions lift Python's own limit, and 4 KiB of "[" can kill a thread


class Malformed(Refused):
    """Not a message of this protocol."""

    def __init__(self, message: str) -> None:
        super().__init__("malformed", message)


# ---- the kinds of values a field may hold: (decode, encode)

_Codec = tuple[Callable[[Any], Any], Callable[[Any], Any]]


def _fixed(length: int) -> _Codec:
    def decode(value: Any) -> bytes:
        if not isinstance(value, str) or len(value) != 2 + 2 * length or not value.startswith("0x"):
            raise Malformed(f"expected 0x and {2 * length} hex digits")
        return _unhex(value)

    return decode, hex0x


def _unhex(value: str) -> bytes:
    try:
        data = bytes.fromhex(value[2:])
    except ValueError as error:
        raise Malformed("not hexadecimal") from error
    if 2 * len(data) != len(value) - 2:
        raise Malformed("white space inside hexadecimal")
    return data


def _decode_signature(value: Any) -> bytes:
    if not isinstance(value, str) or not value.startswith("0x") or len(value) not in (130, 132):
        raise Malformed("expected a signature of 64 or 65 bytes")
    return _unhex(value)


def _decode_public_key(value: Any) -> bytes:
    if not isinstance(value, str) or not value.startswith("0x") or len(value) not in (68, 130, 132):
        raise Malformed("expected a public key of 33, 64 or 65 bytes")
    return _unhex(value)


def _decode_integer(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= INTEGER_MAX:
        raise Malformed("expected an integer from 0 to 2^53-1")
    return value


def _decode_money(value: Any) -> int:
    if not isinstance(value, str) or not value.isascii() or not value.isdecimal() or len(value) > 78:
        raise Malformed("expected a decimal string")
    return int(value)


def _text(length_max: int) -> _Codec:
    def decode(value: Any) -> str:
        if not isinstance(value, str) or len(value) > length_max or not value.isprintable():
            raise Malformed(f"expected at most {length_max} printable characters")
        return value

    return decode, str


def _decode_scheme(value: Any) -> str:
    if value not in get_args(Scheme):
        raise Malformed(f"scheme must be one of {', '.join(get_args(Scheme))}")
    return str(value)


ADDRESS, HASH = _fixed(20), _fixed(32)
SIGNATURE: _Codec = (_decode_signature, hex0x)
PUBLIC_KEY: _Codec = (_decode_public_key, hex0x)
INTEGER: _Codec = (_decode_integer, int)
MONEY: _Codec = (_decode_money, str)
TEXT, RECORD = _text(TEXT_LENGTH_MAX), _text(RECORD_LENGTH_MAX)
SCHEME: _Codec = (_decode_scheme, str)


@dataclass(frozen=True, slots=True)
class Message:
    """One message. `TYPE` is its `"type"`, `KEYS` its JSON keys and their kinds, in the order of the fields."""

    TYPE: ClassVar[str] = ""
    KEYS: ClassVar[dict[str, _Codec]] = {}


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """M0 provider -> anyone: this charging port, now; signed by the operator (ProviderHello)."""

    TYPE: ClassVar[str] = "hello"
    KEYS: ClassVar[dict[str, _Codec]] = {
        "provider": ADDRESS,
        "chargerId": HASH,
        "nonce": HASH,
        "expiresAt": INTEGER,
        "signature": SIGNATURE,
    }
    provider: Address
    charger_id: bytes
    nonce: bytes
    expires_at_s: int
    signature: bytes

    @property
    def typed(self) -> ProviderHello:
        """What is signed."""
        return ProviderHello(self.provider, self.charger_id, self.nonce, self.expires_at_s)


@dataclass(frozen=True, slots=True)
class Present(Message):
    """M1 consumer -> provider: the paper's signed token, bound to this port's Hello, maybe granting a session key."""

    TYPE: ClassVar[str] = "present"
    KEYS: ClassVar[dict[str, _Codec]] = {
        "scheme": SCHEME,
        "sessionId": HASH,
        "token": HASH,
        "chargerId": HASH,
        "helloNonce": HASH,
        "nonceC": HASH,
        "sessionKey": ADDRESS,
        "maxEnergyWh": INTEGER,
        "validUntil": INTEGER,
        "publicKey": PUBLIC_KEY,
        "signature": SIGNATURE,
    }
    scheme: Scheme
    session_id: SessionId
    token: Token
    charger_id: bytes
    hello_nonce: bytes
    consumer_nonce: bytes
    session_key: Address
    max_energy_wh: int
    valid_until_s: int
    public_key: bytes
    signature: bytes


@dataclass(frozen=True, slots=True)
class Accept(Message):
    """M2 provider -> consumer: SessionAccept, signed by the operator; the begin register is already on disk."""

    TYPE: ClassVar[str] = "accept"
    KEYS: ClassVar[dict[str, _Codec]] = {
        "sessionId": HASH,
        "challenge": HASH,
        "registerMwhBegin": INTEGER,
        "maxUnackedWh": INTEGER,
        "acceptedAt": INTEGER,
        "signature": SIGNATURE,
    }
    session_id: SessionId
    challenge: bytes
    register_mwh_begin: int
    max_unacked_wh: int
    accepted_at_s: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Refusal(Message):
    """Provider -> consumer: no, because `reason` (docs/refusals.md); `detail` is for humans."""

    TYPE: ClassVar[str] = "refusal"
    KEYS: ClassVar[dict[str, _Codec]] = {"reason": TEXT, "detail": TEXT}
    reason: str
    detail: str


@dataclass(frozen=True, slots=True)
class ReceiptMessage(Message):
    """Consumer -> provider: Receipt, signed by the consumer or the session key it granted."""

    TYPE: ClassVar[str] = "receipt"
    KEYS: ClassVar[dict[str, _Codec]] = {"sessionId": HASH, "deliveredWh": INTEGER, "signature": SIGNATURE}
    session_id: SessionId
    delivered_wh: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class Stop(Message):
    """Consumer -> provider: StopRequest."""

    TYPE: ClassVar[str] = "stop"
    KEYS: ClassVar[dict[str, _Codec]] = {"sessionId": HASH, "at": INTEGER, "signature": SIGNATURE}
    session_id: SessionId
    at_s: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class ReadingMessage(Message):
    """Provider -> consumer: MeterReading, signed by the operator."""

    TYPE: ClassVar[str] = "reading"
    KEYS: ClassVar[dict[str, _Codec]] = {
        "sessionId": HASH,
        "seq": INTEGER,
        "deliveredWh": INTEGER,
        "powerW": INTEGER,
        "at": INTEGER,
        "signature": SIGNATURE,
    }
    session_id: SessionId
    seq: int
    delivered_wh: int
    power_w: int
    at_s: int
    signature: bytes


@dataclass(frozen=True, slots=True)
class AckMessage(Message):
    """Provider -> consumer: the highest receipt that is on disk. Until this comes, the consumer sends again."""

    TYPE: ClassVar[str] = "ack"
    KEYS: ClassVar[dict[str, _Codec]] = {"sessionId": HASH, "deliveredWh": INTEGER}
    session_id: SessionId
    delivered_wh: int


@dataclass(frozen=True, slots=True)
class Status(Message):
    """Provider -> consumer: where the session stands. `stage` is `waiting` for a kept early token, else a Stage."""

    TYPE: ClassVar[str] = "status"
    KEYS: ClassVar[dict[str, _Codec]] = {
        "sessionId": HASH,
        "stage": TEXT,
        "deliveredWh": INTEGER,
        "ackedWh": INTEGER,
        "reason": TEXT,
    }
    session_id: SessionId
    stage: str
    delivered_wh: int
    acked_wh: int
    reason: str


@dataclass(frozen=True, slots=True)
class Final(Message):
    """Provider -> consumer: the end. OCMF records as signed, the settlement transaction, what was settled."""

    TYPE: ClassVar[str] = "final"
    KEYS: ClassVar[dict[str, _Codec]] = {
        "sessionId": HASH,
        "stage": TEXT,
        "stopReason": TEXT,
        "deliveredWh": INTEGER,
        "settledWh": INTEGER,
        "costWei": MONEY,
        "settlementTx": HASH,
        "ocmfBegin": RECORD,
        "ocmfEnd": RECORD,
    }
    session_id: SessionId
    stage: str
    stop_reason: str
    delivered_wh: int
    settled_wh: int
    cost_wei: int
    settlement_tx: TxHash
    ocmf_begin: str
    ocmf_end: str


KINDS: dict[str, type[Message]] = {
    kind.TYPE: kind
    for kind in (
        Hello,
        Present,
        Accept,
        Refusal,
        ReceiptMessage,
        Stop,
        ReadingMessage,
        AckMessage,
        Status,
        Final,
    )
}


def encode(message: Message) -> bytes:
    """Canonical JSON of `message`. Asserts that it fits the protocol's limit: an over-size publish vanishes silently."""
    body: dict[str, Any] = {"type": message.TYPE}
    for (key, (_, to_json)), item in zip(message.KEYS.items(), fields(message), strict=True):
        body[key] = to_json(getattr(message, item.name))
    data = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert len(data) <= MESSAGE_BYTES_MAX, (message.TYPE, len(data))
    return data


def decode(data: bytes) -> Message:
    """The message in `data`. Raises Refused("malformed") for everything that is not exactly one of ours."""
    if len(data) > MESSAGE_BYTES_MAX:
        raise Malformed(f"longer than {MESSAGE_BYTES_MAX} bytes")
    if data.count(b"[") + data.count(b"{") > BRACKETS_MAX:
        raise Malformed("nested too deep")
    try:
        # From text: of bytes Python would guess UTF-16 and UTF-32, too, which no other reader of ours does.
        body = _READER.decode(data.decode())
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise Malformed("not JSON") from error
    if not isinstance(body, dict):
        raise Malformed("not an object")
    kind = KINDS.get(body.pop("type", None)) if isinstance(body.get("type"), str) else None
    if kind is None:
        raise Malformed("unknown type")
    if body.keys() != kind.KEYS.keys():
        odd = min(body.keys() ^ kind.KEYS.keys())
        raise Malformed(f"{kind.TYPE}: key {odd[:32]!r} is missing or not ours")
    return kind(*(from_json(body[key]) for key, (from_json, _) in kind.KEYS.items()))


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    body = dict(pairs)
    if len(body) != len(pairs):
        raise Malformed("a key stands twice")
    return body


def _no_float(text: str) -> Any:
    raise Malformed(f"{text[:16]} is not an integer")


def _bounded_int(text: str) -> int:
    if len(text) > 17:  # int() of a long digit string is quadratic
        raise Malformed("an integer is too long")
    if text.startswith("-"):  # "-0" is two things to JavaScript and one to us
        raise Malformed("an integer is negative")
    return int(text)


_READER = json.JSONDecoder(
    object_pairs_hook=_object, parse_float=_no_float, parse_constant=_no_float, parse_int=_bounded_int
)
