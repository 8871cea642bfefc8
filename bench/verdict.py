"""What it costs to believe a consumer: the whole verdict on one presentation and on one receipt.

Ours is everything between the bytes that arrive and a yes: strict JSON, token recomputed, EIP-712 digest, canonical form,
recovery, address and key compared. The floor is the bare coincurve recovery of a ready digest. The peer is eth-account's
typed-data recovery, which knows neither JSON nor canonical signatures.
"""

from __future__ import annotations

from collections.abc import Callable

import coincurve
from eth_account import Account
from eth_account.messages import encode_typed_data

from agent.core import messages
from agent.core import token as rules
from agent.core.messages import Present, ReceiptMessage
from agent.core.token import Ack, Domain
from agent.core.units import Address, hex0x
from agent.keys import ephemeral_signer
from bench import Row, interleaved_us

CONSUMER, SESSION_KEY = ephemeral_signer(b"consumer"), ephemeral_signer(b"session")
PROVIDER = Address(b"\x22" * 20)
DOMAIN = Domain(1337, Address(b"\x11" * 20))
ISSUED_AT_S, VALID_UNTIL_S, ORDER_WH = 1_790_000_000, 1_790_014_400, 200
TOKEN = rules.access_token(CONSUMER.address, PROVIDER, ISSUED_AT_S, VALID_UNTIL_S)
SESSION = rules.session_id(DOMAIN.chain_id, DOMAIN.contract, CONSUMER.address, PROVIDER, 1)
HELLO = rules.ProviderHello(PROVIDER, rules.charger_id("left"), bytes(32), VALID_UNTIL_S)
NONCE = b"\x07" * 32
Call = Callable[[], None]
GOAL_RATIO = 6.0  # JSON, digest and comparison may cost a few recoveries, not tens


def rows(runs: int) -> list[Row]:
    """One row for a presentation, one for a receipt."""
    return [_presentation(runs * 10), _receipt(runs * 10)]


def _presentation(runs: int) -> Row:
    typed = _grant()
    signed_digest = rules.digest(DOMAIN, typed)
    signature = CONSUMER.sign_digest(signed_digest)
    data = messages.encode(
        Present(
            "eip712", SESSION, TOKEN, HELLO.charger_id, HELLO.nonce, NONCE, SESSION_KEY.address, ORDER_WH,
            VALID_UNTIL_S, CONSUMER.public_key, signature,
        )
    )  # fmt: skip

    def ours() -> None:
        message = messages.decode(data)
        assert isinstance(message, Present)
        token = rules.access_token(CONSUMER.address, PROVIDER, ISSUED_AT_S, VALID_UNTIL_S)
        assert message.token == token
        bound = rules.challenge(HELLO, message.consumer_nonce)
        asked = rules.PresentToken(
            message.token, message.session_id, PROVIDER, message.session_key, message.max_energy_wh,
            message.valid_until_s, bound,
        )  # fmt: skip
        key = rules.parsed_public_key(message.public_key)
        found = rules.recover_public_key(rules.digest(DOMAIN, asked), rules.normalised(message.signature))
        assert found == key
        assert rules.address_of(key) == CONSUMER.address

    return _row("presentation", runs, ours, _eth_account(typed, signature), _bare(signed_digest, signature))


def _receipt(runs: int) -> Row:
    grant = _grant()
    typed = rules.Receipt(SESSION, 120)
    signature = SESSION_KEY.sign_digest(rules.digest(DOMAIN, typed))
    grant_signature = CONSUMER.sign_digest(rules.digest(DOMAIN, grant))
    data = messages.encode(ReceiptMessage(SESSION, 120, signature))

    def ours() -> None:
        message = messages.decode(data)
        assert isinstance(message, ReceiptMessage)
        ack = Ack(
            TOKEN, SESSION_KEY.address, ORDER_WH, VALID_UNTIL_S, grant.challenge, grant_signature,
            rules.normalised(message.signature),
        )  # fmt: skip
        assert rules.is_receipt_valid(
            DOMAIN,
            ack,
            session_id=SESSION,
            provider=PROVIDER,
            consumer=CONSUMER.address,
            energy_wh_ordered=ORDER_WH,
            delivered_wh=message.delivered_wh,
        )

    both = rules.digest(DOMAIN, grant), rules.digest(DOMAIN, typed)

    def bare_twice() -> None:
        _bare(both[0], grant_signature)()
        _bare(both[1], signature)()

    return _row("receipt with session key", runs, ours, None, bare_twice)


def _grant() -> rules.PresentToken:
    bound = rules.challenge(HELLO, NONCE)
    return rules.PresentToken(TOKEN, SESSION, PROVIDER, SESSION_KEY.address, ORDER_WH, VALID_UNTIL_S, bound)


def _bare(digest32: bytes, signature: bytes) -> Call:
    recoverable = signature[:64] + bytes([signature[64] - 27])

    def recover() -> None:
        coincurve.PublicKey.from_signature_and_message(recoverable, digest32, hasher=None)

    return recover


def _eth_account(typed: rules.PresentToken, signature: bytes) -> Call:
    domain = {
        "name": rules.DOMAIN_NAME,
        "version": rules.DOMAIN_VERSION,
        "chainId": DOMAIN.chain_id,
        "verifyingContract": hex0x(DOMAIN.contract),
    }
    parts = [part.split(" ") for part in typed.TYPE.partition("(")[2].rstrip(")").split(",")]
    types = {"PresentToken": [{"type": kind, "name": name} for kind, name in parts]}
    values = {
        "token": typed.token,
        "sessionId": typed.session_id,
        "provider": hex0x(typed.provider),
        "sessionKey": hex0x(typed.session_key),
        "maxEnergyWh": typed.max_energy_wh,
        "validUntil": typed.valid_until_s,
        "challenge": typed.challenge,
    }

    def recover() -> None:
        signable = encode_typed_data(domain, types, values)
        assert Account.recover_message(signable, signature=signature).lower() == hex0x(CONSUMER.address)

    return recover


def _row(metric: str, runs: int, ours: Call, peer: Call | None, floor: Call) -> Row:
    calls = [ours, floor] if peer is None else [ours, floor, peer]
    ours_us, floor_us, *peer_us = interleaved_us(calls, runs)
    return Row(
        bench="verdict",
        metric=metric,
        unit="us",
        ours=ours_us,
        goal=f"<= {GOAL_RATIO:g} x floor",
        met=ours_us <= GOAL_RATIO * floor_us,
        runs=runs,
        peer=peer_us[0] if peer_us else None,
        peer_name="eth-account typed data" if peer_us else "",
        floor=floor_us,
        floor_name="bare coincurve recover" if peer_us else "two bare coincurve recovers",
    )
