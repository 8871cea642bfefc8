"""The paper's access token, the typed messages of PROTOCOL section 3, and who signed them.

Rules
* Exactly the contract's predicate: 65 bytes, v 27 or 28, low s, plain ECDSA. eth-account, eth-keys and coincurve all
  accept high-s signatures that the contract rejects: energy nobody pays for. So the check is written out here.
* `normalised` is the one place where other encodings (EIP-2098, v 0/1) are turned into that form; nothing else guesses.
* A bare signature over the 32 token bytes is never accepted: a "token" equal to a transaction hash would be a
  signed transaction. Accepted are EIP-712 `PresentToken` and EIP-191 `personal_sign` over the raw bytes.

May not know: messages' JSON, sessions, clocks, private keys. The only room that imports coincurve and keccak.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import ClassVar

import coincurve
from eth_hash.auto import keccak

from agent.core.units import UINT64_MAX, Address, BidId, SessionId, Token
from agent.errors import Refused

SIGNATURE_LENGTH = 65
CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
PUBLIC_KEY_FORMS = {(33, b"\x02"), (33, b"\x03"), (65, b"\x04")}  # SEC 1, section 2.3.3
ZERO_ADDRESS = Address(bytes(20))
DOMAIN_NAME = "V2VCharging"
DOMAIN_VERSION = "1"
EIP191_PREFIX = b"\x19Ethereum Signed Message:\n32"


def word(value: int) -> bytes:
    """One ABI word. Raises OverflowError for what a uint256 cannot hold."""
    return value.to_bytes(32, "big")


def address_word(address: bytes) -> bytes:
    """An address as one ABI word."""
    return address.rjust(32, b"\0")


def access_token(consumer: Address, provider: Address, issued_at_s: int, valid_until_s: int) -> Token:
    """The paper's token: keccak256(abi.encodePacked(EVC, EVP, BTS, TV)); 104 bytes in, uint256 times (paper, Algorithm 2)."""
    return Token(keccak(consumer + provider + word(issued_at_s) + word(valid_until_s)))


def session_id(
    chain_id: int, contract: Address, consumer: Address, provider: Address, auction_nonce: int
) -> SessionId:
    """What receipts bind to: a reorg re-mines `connect` with another timestamp, so another token, but the same session id."""
    head = word(chain_id) + address_word(contract)
    return SessionId(keccak(head + address_word(consumer) + address_word(provider) + word(auction_nonce)))


def bid_id(consumer: Address, auction_nonce: int, rate_wei_per_kwh: int) -> BidId:
    """Of a bid of ours: who bids the same twice has bid once. Known to nobody else."""
    return BidId(keccak(address_word(consumer) + word(auction_nonce) + word(rate_wei_per_kwh)))


def charger_id(port_name: str) -> bytes:
    """The public name of a charging port in a Hello: keccak256(utf8 port name)."""
    return keccak(port_name.encode())


@dataclass(frozen=True)
class Domain:
    """The EIP-712 domain of one deployment: a signature is good on one chain, for one contract."""

    chain_id: int
    contract: Address

    @cached_property
    def separator(self) -> bytes:
        """hashStruct(EIP712Domain), EIP-712."""
        kind = keccak(b"EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)")
        names = keccak(DOMAIN_NAME.encode()) + keccak(DOMAIN_VERSION.encode())
        return keccak(kind + names + word(self.chain_id) + address_word(self.contract))


@dataclass(frozen=True, slots=True)
class TypedMessage:
    """An EIP-712 struct. `TYPE` is its encodeType; the dataclass fields stand in the same order."""

    TYPE: ClassVar[str] = ""

    def struct_hash(self) -> bytes:
        """hashStruct(message): keccak256(typeHash, fields); every field is one word (no dynamic types here)."""
        words = (_field_word(getattr(self, field.name)) for field in fields(self))
        return keccak(keccak(self.TYPE.encode()) + b"".join(words))


@dataclass(frozen=True, slots=True)
class PresentToken(TypedMessage):
    """Consumer -> provider, one wallet prompt: "I am at your plug with this token, and this key may sign receipts"."""

    TYPE: ClassVar[str] = (
        "PresentToken(bytes32 token,bytes32 sessionId,address provider,address sessionKey,"
        "uint64 maxEnergyWh,uint64 validUntil,bytes32 challenge)"
    )
    token: Token
    session_id: SessionId
    provider: Address
    session_key: Address
    max_energy_wh: int
    valid_until_s: int
    challenge: bytes


@dataclass(frozen=True, slots=True)
class Receipt(TypedMessage):
    """Consumer's device -> provider: "I have received this much in total". Cumulative; the contract pays the highest."""

    TYPE: ClassVar[str] = "Receipt(bytes32 sessionId,uint64 deliveredWh)"
    session_id: SessionId
    delivered_wh: int


@dataclass(frozen=True, slots=True)
class ProviderHello(TypedMessage):
    """Provider -> anyone at the plug: "this charging port, now". Rotates; its nonce is used once."""

    TYPE: ClassVar[str] = "ProviderHello(address provider,bytes32 chargerId,bytes32 nonce,uint64 expiresAt)"
    provider: Address
    charger_id: bytes
    nonce: bytes
    expires_at_s: int


@dataclass(frozen=True, slots=True)
class SessionAccept(TypedMessage):
    """Provider -> consumer: "I begin at this register"; signs a challenge that holds the consumer's own nonce."""

    TYPE: ClassVar[str] = (
        "SessionAccept(bytes32 sessionId,bytes32 challenge,uint64 registerMwhBegin,uint64 maxUnackedWh,uint64 acceptedAt)"
    )
    session_id: SessionId
    challenge: bytes
    register_mwh_begin: int
    max_unacked_wh: int
    accepted_at_s: int


@dataclass(frozen=True, slots=True)
class MeterReading(TypedMessage):
    """Provider -> consumer, several times a minute: what the meter says. Not money: only receipts are."""

    TYPE: ClassVar[str] = (
        "MeterReading(bytes32 sessionId,uint64 seq,uint64 deliveredWh,uint64 powerW,uint64 at)"
    )
    session_id: SessionId
    seq: int
    delivered_wh: int
    power_w: int
    at_s: int


@dataclass(frozen=True, slots=True)
class StopRequest(TypedMessage):
    """Consumer -> provider: "stop now"."""

    TYPE: ClassVar[str] = "StopRequest(bytes32 sessionId,uint64 at)"
    session_id: SessionId
    at_s: int


@dataclass(frozen=True, slots=True)
class Ack:
    """What the contract needs to believe a receipt: the grant (if a session key signed) and the receipt's signature.

    `session_key == ZERO_ADDRESS`: the consumer itself signed, `grant_signature` is empty. token, valid_until_s and
    challenge are only hashed: a reorg or a congested chain must not void an honest receipt.
    """

    token: Token
    session_key: Address
    max_energy_wh: int
    valid_until_s: int
    challenge: bytes
    grant_signature: bytes
    receipt_signature: bytes


NO_ACK = Ack(
    Token(bytes(32)), ZERO_ADDRESS, 0, 0, bytes(32), b"", b""
)  # for ending with 0 Wh, which needs no receipt


def _field_word(value: bytes | int) -> bytes:
    if isinstance(value, int):
        assert 0 <= value <= UINT64_MAX, value
        return word(value)
    assert len(value) in (20, 32), value
    return address_word(value)


def digest(domain: Domain, message: TypedMessage) -> bytes:
    """The 32 bytes a wallet signs for `message`: keccak256(0x1901, domain, hashStruct) (EIP-712)."""
    return keccak(b"\x19\x01" + domain.separator + message.struct_hash())


def presentation_digest(presented: bytes) -> bytes:
    """Names the exact bytes of a presentation, so that a repeat is known as one."""
    return keccak(presented)


def token_digest_eip191(token: Token) -> bytes:
    """The 32 bytes `personal_sign` signs over the *raw* token (EIP-191 version 0x45); never over its hex text."""
    return keccak(EIP191_PREFIX + token)


def challenge(hello: ProviderHello, consumer_nonce: bytes) -> bytes:
    """keccak256(abi.encode(structHash(ProviderHello), nonceC)): binds port, provider, freshness and the consumer's nonce."""
    assert len(consumer_nonce) == 32
    return keccak(hello.struct_hash() + consumer_nonce)


def normalised(signature: bytes) -> bytes:
    """Turn 64-byte EIP-2098 and v 0/1 signatures into the canonical 65 bytes. Raises Refused("bad_signature") for the rest."""
    if len(signature) == 64:
        parity_and_s = int.from_bytes(signature[32:], "big")
        s = parity_and_s & ((1 << 255) - 1)
        signature = signature[:32] + word(s) + bytes([27 + (parity_and_s >> 255)])
    elif len(signature) == SIGNATURE_LENGTH and signature[64] in (0, 1):
        signature = signature[:64] + bytes([signature[64] + 27])
    if not is_canonical(signature):
        raise Refused("bad_signature", "the signature is not 65 bytes with v 27/28 and low s")
    return signature


def is_canonical(signature: bytes) -> bool:
    """True for what the contract accepts as a form: 65 bytes, v 27/28, 0 < r < n, 0 < s <= n/2 (EIP-2)."""
    if len(signature) != SIGNATURE_LENGTH or signature[64] not in (27, 28):
        return False
    r = int.from_bytes(signature[:32], "big")
    s = int.from_bytes(signature[32:64], "big")
    return 0 < r < CURVE_ORDER and 0 < s <= CURVE_ORDER // 2


def recover_public_key(digest32: bytes, signature: bytes) -> bytes:
    """The signer's uncompressed public key (65 bytes). Raises Refused("bad_signature") if there is none."""
    if not is_canonical(signature):
        raise Refused("bad_signature", "the signature is not in canonical form")
    recoverable = signature[:64] + bytes([signature[64] - 27])
    try:
        key = coincurve.PublicKey.from_signature_and_message(recoverable, digest32, hasher=None)
    except Exception as error:  # coincurve raises a bare Exception when no point fits
        raise Refused("bad_signature", "no public key fits the signature") from error
    return key.format(compressed=False)


def recover(digest32: bytes, signature: bytes) -> Address:
    """The signer's address. Raises Refused("bad_signature")."""
    return address_of(recover_public_key(digest32, signature))


def address_of(public_key: bytes) -> Address:
    """keccak256(x || y)[12:] of an uncompressed public key."""
    return Address(keccak(public_key[1:])[12:])


def checksummed(address: Address) -> str:
    """The address with EIP-55's letter case, so that a typing mistake shows."""
    text = address.hex()
    nibbles = keccak(text.encode()).hex()
    return "0x" + "".join(a.upper() if int(n, 16) >= 8 else a for a, n in zip(text, nibbles, strict=False))


def parsed_public_key(encoded: bytes) -> bytes:
    """A public key as sent along (33, 65 or 64 bytes) as 65 uncompressed bytes, proven to be on the curve.

    Raises Refused("malformed"). coincurve validates the point (eth_keys would make an address of any 64 bytes), but it
    also takes OpenSSL's hybrid form, which wallets' libraries do not know.
    """
    sec1 = b"\x04" + encoded if len(encoded) == 64 else encoded
    if (len(sec1), sec1[:1]) not in PUBLIC_KEY_FORMS:
        raise Refused("malformed", "the public key is neither 33, 65 nor 64 bytes of secp256k1")
    try:
        return coincurve.PublicKey(sec1).format(compressed=False)
    except ValueError as error:
        raise Refused("malformed", "the public key is not a point of secp256k1") from error


def presentation_key(domain: Domain, scheme: str, grant: PresentToken, signature: bytes) -> bytes:
    """The public key (65 bytes) that signed a presented token, in either scheme of PROTOCOL section 3.

    Door, journal and verifier ask only this; whose key it must be is theirs to know. Raises Refused: `malformed` (a grant
    that this scheme cannot make, or one for nothing), `bad_signature`.
    """
    if scheme == "eip191":
        if grant.session_key != ZERO_ADDRESS:
            raise Refused("malformed", "personal_sign cannot grant a session key")
        return recover_public_key(token_digest_eip191(grant.token), signature)
    if grant.session_key != ZERO_ADDRESS and grant.max_energy_wh == 0:
        raise Refused("malformed", "a session key needs an energy limit above 0")
    return recover_public_key(digest(domain, grant), signature)


def receipt_signer(
    domain: Domain,
    ack: Ack,
    *,
    session_id: SessionId,
    provider: Address,
    consumer: Address,
    delivered_wh: int,
) -> Address:
    """Who vouches for `delivered_wh`, checked exactly as the contract does: the consumer, or the key it granted.

    Raises Refused: `bad_signature` (no canonical signature), `wrong_signer` (neither consumer nor granted key),
    `over_grant` (more than the grant allows).
    """
    signer = recover(digest(domain, Receipt(session_id, delivered_wh)), ack.receipt_signature)
    if ack.session_key == ZERO_ADDRESS:
        if signer != consumer:
            raise Refused("wrong_signer", "the receipt is not signed by the consumer")
        return signer
    if delivered_wh > ack.max_energy_wh:
        raise Refused(
            "over_grant",
            f"{delivered_wh} Wh is above the {ack.max_energy_wh} Wh the session key may sign for",
        )
    if signer != ack.session_key:
        raise Refused("wrong_signer", "the receipt is not signed by the granted session key")
    grant = PresentToken(
        ack.token, session_id, provider, ack.session_key, ack.max_energy_wh, ack.valid_until_s, ack.challenge
    )
    if recover(digest(domain, grant), ack.grant_signature) != consumer:
        raise Refused("wrong_signer", "the session key was not granted by the consumer")
    return signer


def is_receipt_valid(
    domain: Domain,
    ack: Ack,
    *,
    session_id: SessionId,
    provider: Address,
    consumer: Address,
    energy_wh_ordered: int,
    delivered_wh: int,
) -> bool:
    """The contract's `isReceiptValid`, in Python; a property test holds the two together."""
    if delivered_wh > energy_wh_ordered:
        return False
    try:
        receipt_signer(
            domain,
            ack,
            session_id=session_id,
            provider=provider,
            consumer=consumer,
            delivered_wh=delivered_wh,
        )
    except Refused:
        return False
    return True
