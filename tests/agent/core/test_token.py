"""Token, digests, signatures: our arithmetic against published vectors and an independent implementation (eth_account)."""

import re
from dataclasses import fields
from pathlib import Path

import pytest
from eth_account import Account
from eth_account.messages import encode_defunct, encode_typed_data
from eth_utils import keccak
from hypothesis import given
from hypothesis import strategies as st
from story import CONSUMER, DOMAIN, OPERATOR, PROVIDER, SESSION_KEY, STRANGER, TERMS, Wallet, hash32

from agent.core import token as rules
from agent.core.token import CURVE_ORDER, NO_ACK, ZERO_ADDRESS, Ack, Domain
from agent.core.units import UINT64_MAX, Address
from agent.errors import Refused

EVC = Wallet(int("11" * 32, 16)).address  # the published vector's addresses: of these two private keys
EVP = Wallet(int("22" * 32, 16)).address
HASHES = st.binary(min_size=32, max_size=32)
ADDRESSES = st.binary(min_size=20, max_size=20)
UINT64 = st.integers(0, UINT64_MAX)
UINT256 = st.integers(0, 2**256 - 1)
SECRETS = st.integers(1, CURVE_ORDER - 1)


def refusal(call, *args, **more):
    """The reason with which a call is refused."""
    with pytest.raises(Refused) as caught:
        call(*args, **more)
    return caught.value.reason


def outcome(digest, noise):
    """The length of what is recovered, or the reason why nothing is."""
    try:
        return len(rules.recover(digest, rules.normalised(noise)))
    except Refused as refused:
        return refused.reason


# ---- the paper's token


def test_the_token_is_the_papers_hash_tightly_packed():
    """Published vector; `abi.encode` would give 9a61daf2 and no contract would know it."""
    token = rules.access_token(EVC, EVP, 1_790_000_000, 1_790_014_400)
    assert token.hex() == "57f1ecb236d9ae2373d52df0006bb955a2f53eb9dda7e3dfa4371d06bff0b295"
    by_hand = EVC + EVP + (1_790_000_000).to_bytes(32, "big") + (1_790_014_400).to_bytes(32, "big")
    assert len(by_hand) == 104
    assert token == keccak(by_hand)


@given(ADDRESSES, ADDRESSES, UINT256, UINT256)
def test_the_token_is_packed_for_every_input(evc, evp, issued_at_s, valid_until_s):
    """Times are uint256 even where they would fit fewer bytes."""
    packed = evc + evp + issued_at_s.to_bytes(32, "big") + valid_until_s.to_bytes(32, "big")
    assert rules.access_token(evc, evp, issued_at_s, valid_until_s) == keccak(packed)


@given(UINT64, ADDRESSES, ADDRESSES, ADDRESSES, UINT64)
def test_the_session_id_is_abi_encoded(chain_id, contract, consumer, provider, nonce):
    """Receipts bind to it: a byte off and the contract pays nothing."""
    from eth_abi import encode

    types = ["uint256", "address", "address", "address", "uint256"]
    encoded = encode(types, [chain_id, contract, consumer, provider, nonce])
    assert rules.session_id(chain_id, contract, consumer, provider, nonce) == keccak(encoded)


def test_the_session_id_survives_a_reorg_and_nothing_else():
    """Same auction in another block: same id. Another auction, chain or contract: another id."""
    base = (1, EVP, EVC, EVP, 1)
    ids = {
        rules.session_id(*base),
        rules.session_id(2, *base[1:]),
        rules.session_id(1, EVC, EVC, EVP, 1),
        rules.session_id(1, EVP, EVP, EVC, 1),
        rules.session_id(1, EVP, EVC, EVP, 2),
    }
    assert len(ids) == 5


# ---- EIP-712


def typed_data(domain, message):
    """The same message as eth_account wants it, read off our `TYPE` string as a wallet would be told."""
    name, _, inside = message.TYPE.rstrip(")").partition("(")
    members = [dict(zip(("type", "name"), part.split(" "), strict=True)) for part in inside.split(",")]
    values = [getattr(message, field.name) for field in fields(message)]
    return {
        "types": {
            "EIP712Domain": [
                {"name": "name", "type": "string"},
                {"name": "version", "type": "string"},
                {"name": "chainId", "type": "uint256"},
                {"name": "verifyingContract", "type": "address"},
            ],
            name: members,
        },
        "primaryType": name,
        "domain": {
            "name": "V2VCharging",
            "version": "1",
            "chainId": domain.chain_id,
            "verifyingContract": "0x" + domain.contract.hex(),
        },
        "message": {member["name"]: value for member, value in zip(members, values, strict=True)},
    }


def wallet_digest(domain, message):
    """The digest that eth_account would sign."""
    signable = encode_typed_data(full_message=typed_data(domain, message))
    return keccak(b"\x19" + signable.version + signable.header + signable.body)


h, a, n = HASHES, ADDRESSES, UINT64
TYPED = st.one_of(
    st.builds(rules.PresentToken, h, h, a, a, n, n, h),
    st.builds(rules.Receipt, h, n),
    st.builds(rules.ProviderHello, a, h, h, n),
    st.builds(rules.SessionAccept, h, h, n, n, n),
    st.builds(rules.MeterReading, h, n, n, n, n),
    st.builds(rules.StopRequest, h, n),
)


@given(TYPED, st.integers(1, 2**63), ADDRESSES)
def test_a_wallet_agrees_on_every_typed_digest(message, chain_id, contract):
    """We hash structs by hand; a wallet that hashes otherwise could never sign for us."""
    domain = Domain(chain_id, contract)
    assert rules.digest(domain, message) == wallet_digest(domain, message)


def test_the_type_strings_are_the_protocols():
    """They are part of the contract; a space or a rename would change every digest."""
    assert {kind.TYPE for kind in rules.TypedMessage.__subclasses__() if kind.TYPE} == {
        (
            "PresentToken(bytes32 token,bytes32 sessionId,address provider,address sessionKey,"
            "uint64 maxEnergyWh,uint64 validUntil,bytes32 challenge)"
        ),
        "Receipt(bytes32 sessionId,uint64 deliveredWh)",
        "ProviderHello(address provider,bytes32 chargerId,bytes32 nonce,uint64 expiresAt)",
        (
            "SessionAccept(bytes32 sessionId,bytes32 challenge,uint64 registerMwhBegin,"
            "uint64 maxUnackedWh,uint64 acceptedAt)"
        ),
        "MeterReading(bytes32 sessionId,uint64 seq,uint64 deliveredWh,uint64 powerW,uint64 at)",
        "StopRequest(bytes32 sessionId,uint64 at)",
    }


@pytest.mark.parametrize("value", [-1, UINT64_MAX + 1])
def test_a_number_that_is_no_uint64_is_our_own_mistake(value):
    """Wrapping it would sign for another amount."""
    with pytest.raises(AssertionError):
        rules.digest(DOMAIN, rules.Receipt(TERMS.session_id, value))


@given(HASHES, st.binary(min_size=32, max_size=32))
def test_the_challenge_holds_both_nonces(nonce, consumer_nonce):
    """keccak256(abi.encode(structHash(hello), nonceC)): the provider's freshness and the consumer's."""
    hello = rules.ProviderHello(EVP, rules.charger_id("left"), nonce, 5)
    assert rules.challenge(hello, consumer_nonce) == keccak(hello.struct_hash() + consumer_nonce)


# ---- signatures


@given(SECRETS, HASHES)
def test_an_independent_wallets_signatures_recover_to_its_address(secret, token):
    """EIP-191 over the 32 raw bytes, signed by eth_account, recovered by us."""
    account = Account.from_key(secret.to_bytes(32, "big"))
    signed = account.sign_message(encode_defunct(primitive=token))
    digest = rules.token_digest_eip191(token)
    assert (
        "0x" + rules.recover(digest, rules.normalised(bytes(signed.signature))).hex()
        == account.address.lower()
    )


def test_hex_text_of_the_token_is_not_the_token():
    """Some wallets sign the 66 characters instead of the 32 bytes; accepting both would accept two messages for one."""
    account = Account.from_key(CONSUMER.private.secret)
    text = account.sign_message(encode_defunct(text="0x" + TERMS.token.hex()))
    assert rules.recover(rules.token_digest_eip191(TERMS.token), bytes(text.signature)) != CONSUMER.address


def high_s_twin(signature):
    """The other signature of the same message, which everybody but the contract accepts."""
    s = CURVE_ORDER - int.from_bytes(signature[32:64], "big")
    return signature[:32] + s.to_bytes(32, "big") + bytes([55 - signature[64]])


def compact(signature):
    """EIP-2098: the parity in the top bit of s."""
    s = int.from_bytes(signature[32:64], "big") | ((signature[64] - 27) << 255)
    return signature[:32] + s.to_bytes(32, "big")


@given(SECRETS, HASHES)
def test_the_high_s_twin_is_refused_although_libraries_take_it(secret, digest):
    """It recovers to the same address everywhere except in the contract: energy that nobody pays for."""
    wallet = Wallet(secret)
    twin = high_s_twin(wallet.sign_digest(digest))
    assert Account._recover_hash(digest, signature=twin).lower() == "0x" + wallet.address.hex()
    assert not rules.is_canonical(twin)
    assert refusal(rules.normalised, twin) == "bad_signature"
    assert refusal(rules.recover, digest, twin) == "bad_signature"


@given(SECRETS, HASHES)
def test_the_one_normaliser_takes_eip_2098_and_v_0_or_1(secret, digest):
    """Phones send the compact form, Ledgers v 0/1; both mean the same 65 bytes."""
    wallet = Wallet(secret)
    signature = wallet.sign_digest(digest)
    assert rules.normalised(signature) == signature
    assert rules.normalised(compact(signature)) == signature
    assert rules.normalised(signature[:64] + bytes([signature[64] - 27])) == signature
    assert rules.recover(digest, rules.normalised(compact(signature))) == wallet.address


GOOD = CONSUMER.sign_digest(hash32("x"))
BAD_FORMS = {
    "empty": b"",
    "short": GOOD[:63],
    "long": GOOD + b"\0",
    "v of EIP-155": GOOD[:64] + bytes([37]),
    "v 29": GOOD[:64] + bytes([29]),
    "r 0": bytes(32) + GOOD[32:],
    "s 0": GOOD[:32] + bytes(32) + GOOD[64:],
    "r = n": CURVE_ORDER.to_bytes(32, "big") + GOOD[32:],
    "r above n": b"\xff" * 32 + GOOD[32:],
    "s just above n/2": GOOD[:32] + (CURVE_ORDER // 2 + 1).to_bytes(32, "big") + GOOD[64:],
}


@pytest.mark.parametrize("form", BAD_FORMS)
def test_every_other_form_is_refused(form):
    """OpenZeppelin's ECDSA refuses each of them; whatever we take and it does not is a loss."""
    assert refusal(rules.normalised, BAD_FORMS[form]) == "bad_signature"
    assert not rules.is_canonical(BAD_FORMS[form])


def test_half_the_curve_order_is_still_low():
    """The bound itself belongs to the good side (EIP-2)."""
    assert rules.is_canonical(GOOD[:32] + (CURVE_ORDER // 2).to_bytes(32, "big") + GOOD[64:])


@given(st.binary(max_size=70), HASHES)
def test_noise_is_refused_and_never_crashes(noise, digest):
    """Strangers send anything; the only answer is a named refusal or an address."""
    assert outcome(digest, noise) in (20, "bad_signature")


def test_an_r_that_is_no_point_is_refused_by_name():
    """The library raises a bare Exception here; it must not end the daemon."""
    no_point = 5  # x = 5 has no y on secp256k1
    signature = no_point.to_bytes(32, "big") + (1).to_bytes(32, "big") + b"\x1b"
    assert rules.is_canonical(signature)
    assert refusal(rules.recover, bytes(32), signature) == "bad_signature"


# ---- public keys sent along


def test_a_public_key_is_taken_in_all_three_spellings():
    """Compressed, uncompressed, and bare x and y mean one key."""
    compressed = CONSUMER.private.public_key.format(compressed=True)
    for encoded in (compressed, CONSUMER.public_key, CONSUMER.public_key[1:]):
        assert rules.parsed_public_key(encoded) == CONSUMER.public_key


@pytest.mark.parametrize(
    "encoded", [b"", b"\x05" + bytes(32), b"\x04" + bytes(64), bytes(64), b"\x02" + b"\xff" * 32]
)
def test_what_is_no_point_of_the_curve_is_malformed(encoded):
    """eth_keys would happily make an address of it."""
    assert refusal(rules.parsed_public_key, encoded) == "malformed"


# ---- receipts: the contract's predicate


def ack(
    delivered_wh=40, *, key=SESSION_KEY, grantor=CONSUMER, limit=100, session_id=TERMS.session_id, **more
):
    """A delegated receipt."""
    fields = {"provider": PROVIDER.address, "session_key": key.address, "domain": DOMAIN} | more
    grant = rules.PresentToken(
        TERMS.token, session_id, fields["provider"], fields["session_key"], limit, 9, hash32("c")
    )
    return Ack(
        TERMS.token,
        fields["session_key"],
        limit,
        9,
        hash32("c"),
        grantor.sign(grant, fields["domain"]),
        key.sign(rules.Receipt(session_id, delivered_wh), fields["domain"]),
    )


def judged(given_ack, delivered_wh=40):
    """(valid, reason) as our predicate sees it."""
    about = {"session_id": TERMS.session_id, "provider": PROVIDER.address, "consumer": CONSUMER.address}
    valid = rules.is_receipt_valid(
        DOMAIN, given_ack, energy_wh_ordered=1_000, delivered_wh=delivered_wh, **about
    )
    try:
        rules.receipt_signer(DOMAIN, given_ack, delivered_wh=delivered_wh, **about)
    except Refused as refused:
        assert not valid
        return refused.reason
    return "" if valid else "over_order"


def own_ack(wallet, delivered_wh=40):
    """A receipt without delegation."""
    return Ack(
        TERMS.token,
        ZERO_ADDRESS,
        0,
        0,
        bytes(32),
        b"",
        wallet.sign(rules.Receipt(TERMS.session_id, delivered_wh)),
    )


def test_a_granted_keys_receipt_is_good_up_to_its_limit():
    """At the limit yes, above it no."""
    assert judged(ack()) == ""
    assert judged(ack(100), 100) == ""
    assert judged(ack(101), 101) == "over_grant"


def test_the_consumers_own_receipt_is_good_without_any_grant():
    """Up to the order and not one Wh further."""
    assert judged(own_ack(CONSUMER)) == ""
    assert judged(own_ack(CONSUMER, 1_000), 1_000) == ""
    assert judged(own_ack(CONSUMER, 1_001), 1_001) == "over_order"


FORGED = {
    "a stranger's receipt": own_ack(STRANGER),
    "the provider's own": own_ack(PROVIDER),
    "a key nobody granted": ack(grantor=STRANGER),
    "a key that the provider granted": ack(grantor=OPERATOR),
    "another session's": ack(session_id=hash32("other session")),
    "another provider's grant": ack(provider=STRANGER.address),
    "another chain's": ack(domain=Domain(1, DOMAIN.contract)),
    "another contract's": ack(domain=Domain(DOMAIN.chain_id, EVP)),
    "another amount's": ack(39),
    "a grant for another key": ack(session_key=STRANGER.address),
}


@pytest.mark.parametrize("what", FORGED)
def test_every_forgery_is_refused_by_its_name(what):
    """Each of these is a way to charge a car that never charged, or to be paid with air."""
    assert judged(FORGED[what]) == "wrong_signer"


def test_a_high_s_receipt_or_grant_is_worth_nothing():
    """The contract would not pay it, so we do not credit it."""
    good = ack()
    fields = {name: getattr(good, name) for name in good.__dataclass_fields__}
    for name in ("receipt_signature", "grant_signature"):
        assert judged(Ack(**(fields | {name: high_s_twin(fields[name])}))) == "bad_signature"


def test_no_ack_vouches_for_nothing():
    """It ends a session with 0 Wh and must never pass for a receipt."""
    assert judged(NO_ACK, 1) == "bad_signature"


@given(st.integers(0, 2_000), st.integers(0, 2_000), st.integers(0, 2_000))
def test_a_receipt_is_good_for_its_own_amount_only(signed_wh, claimed_wh, limit):
    """Cumulative receipts: presenting one for another amount, or above grant or order, never pays."""
    reason = judged(ack(signed_wh, limit=limit), claimed_wh)
    assert (reason == "") == (signed_wh == claimed_wh <= min(limit, 1_000))


@pytest.mark.parametrize(
    "address",
    [
        "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed",
        "0xfB6916095ca1df60bB79Ce92cE3Ea74c37c5d359",
        "0xdbF03B407c01E7cD3CBea99509d93f8DDDC8C6FB",
        "0xD1220A0cf47c7B9Be7A2E6BA89F429762e7b9aDb",
    ],
)
def test_an_address_is_spelled_as_eip_55_says(address: str) -> None:
    """Would catch a typing mistake accepted as somebody else's account; the vectors are EIP-55's own."""
    assert rules.checksummed(Address(bytes.fromhex(address[2:]))) == address


def test_who_signed_is_decided_in_one_place():
    """Would catch a second reader of signatures, which would sooner or later take what the contract does not pay."""
    ours = Path(rules.__file__)
    word = re.compile(r"\b(from_signature_and_message|recover_public_key)\b|\bis_canonical\(")
    elsewhere = [
        file.name
        for room in ("agent", "firmware_bridge")
        for file in (ours.parents[2] / room).rglob("*.py")
        if file != ours and word.search(file.read_text())
    ]
    assert not elsewhere
    assert word.search(ours.read_text())
