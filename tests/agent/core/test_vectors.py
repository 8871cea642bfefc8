"""A second implementation's vectors (`tests/vectors`), judged by ours: the same tokens, digests, signers, and the same refusals.

tests/contracts/test_vectors.py asks the contract about the same receipts.
"""

import json

import coincurve
import pytest
from vectors import (
    CONSUMER,
    DOMAIN,
    ENERGY_WH,
    FILES,
    FOLDER,
    METER_KEY,
    PROVIDER,
    SESSION_ID,
    ack_of,
    each,
    generated,
    grant_of,
    unhex,
    vectors,
)

from agent.core import messages
from agent.core import token as rules
from agent.core.token import Domain
from agent.errors import Refused

VECTORS_MIN = 60


def verdict(judge):
    """What a predicate says: the reason of its refusal, or None."""
    try:
        judge()
    except Refused as refused:
        return refused.reason
    return None


def test_the_vectors_are_what_their_script_makes(tmp_path):
    """Would catch a vector that was edited by hand, and a script that has drifted away from its files."""
    made = generated(tmp_path)
    assert made == {name: (FOLDER / f"{name}.json").read_text() for name in FILES}


def test_there_are_good_and_refused_ones_of_everything_that_can_be_refused():
    """Would catch a set that only shows what works: most of a predicate's work is refusing."""
    every = {name: vectors(name) for name in FILES}
    assert sum(map(len, every.values())) >= VECTORS_MIN
    for name in ("signatures", "public-keys", "presentations", "receipts", "messages"):
        refused = [one for one in every[name] if "refused" in one]
        assert 3 <= len(refused) <= len(every[name]) - 3, name


# ---- names and digests

IDENTITIES = {
    "token": lambda v: rules.access_token(
        unhex(v["consumer"]), unhex(v["provider"]), int(v["issuedAt"]), int(v["validity"])
    ),
    "sessionId": lambda v: rules.session_id(
        v["chainId"],
        unhex(v["contract"]),
        unhex(v["consumer"]),
        unhex(v["provider"]),
        int(v["auctionNonce"]),
    ),
    "domainSeparator": lambda v: Domain(v["chainId"], unhex(v["contract"])).separator,
    "chargerId": lambda v: rules.charger_id(v["port"]),
    "challenge": lambda v: rules.challenge(typed("ProviderHello", v["hello"]), unhex(v["nonceC"])),
    "personalSign": lambda v: rules.token_digest_eip191(unhex(v["token"])),
}


def typed(name, message):
    """A typed message from its JSON: the keys stand in the order of our fields."""
    return getattr(rules, name)(
        *(
            unhex(value) if isinstance(value, str) and value.startswith("0x") else int(value)
            for value in message.values()
        )
    )


@each("identities")
def test_every_name_is_the_same(vector):
    """Would catch another packing of token, session id, domain, charger id or challenge."""
    assert IDENTITIES[vector["name"]](vector) == unhex(vector["expected"])


@each("typed")
def test_every_typed_message_has_the_same_digest_and_signer(vector):
    """Would catch a struct that we hash otherwise than a wallet, so that no wallet could sign it."""
    message = typed(vector["primaryType"], vector["message"])
    domain = Domain(vector["chainId"], unhex(vector["contract"]))
    assert message.struct_hash() == unhex(vector["structHash"])
    assert rules.digest(domain, message) == unhex(vector["digest"])
    assert rules.recover(unhex(vector["digest"]), unhex(vector["signature"])) == unhex(vector["signer"])


def test_every_typed_message_is_among_them():
    """Would catch a message that is added and never shown to another implementation."""
    ours = {kind.__name__ for kind in rules.TypedMessage.__subclasses__() if kind.TYPE}
    assert {one["primaryType"] for one in vectors("typed")} == ours


# ---- forms


@each("signatures")
def test_every_form_of_a_signature_is_normalised_or_refused(vector):
    """Would catch a form that we take and the contract does not, or that a phone sends and we do not take."""
    digest, signature = unhex(vector["digest"]), unhex(vector["signature"])

    def judge():
        normal = rules.normalised(signature)
        assert rules.recover(digest, normal) == unhex(vector["signer"])
        assert normal == unhex(vector["normalised"])

    assert verdict(judge) == vector.get("refused")


@each("public-keys")
def test_every_form_of_a_public_key_is_taken_or_refused(vector):
    """Would catch 64 bytes that are no key and still make an address."""

    def judge():
        key = rules.parsed_public_key(unhex(vector["publicKey"]))
        assert rules.address_of(key) == unhex(vector["address"])

    assert verdict(judge) == vector.get("refused")


# ---- predicates


@each("presentations")
def test_the_same_presentations_are_taken(vector):
    """Would catch a token that somebody else signed, or that was signed for something else."""

    def judge():
        signature = rules.normalised(unhex(vector["signature"]))
        key = rules.parsed_public_key(unhex(vector["publicKey"]))
        signer = rules.presentation_key(DOMAIN, vector["scheme"], grant_of(vector), signature)
        if {key, signer} != {key} or rules.address_of(key) != CONSUMER:
            raise Refused("wrong_signer")

    assert verdict(judge) == vector.get("refused")


@each("receipts")
def test_the_same_receipts_are_taken(vector):
    """Would catch energy that nobody pays for: exactly what the second implementation calls good is good."""
    delivered_wh = int(vector["deliveredWh"])
    about = {"session_id": SESSION_ID, "provider": PROVIDER, "consumer": CONSUMER}
    is_valid = rules.is_receipt_valid(
        DOMAIN, ack_of(vector), energy_wh_ordered=ENERGY_WH, delivered_wh=delivered_wh, **about
    )
    assert is_valid is ("refused" not in vector)
    if vector.get("refused") == "over_order":
        return  # the signature is good; the order is the book's to know
    found = verdict(lambda: rules.receipt_signer(DOMAIN, ack_of(vector), delivered_wh=delivered_wh, **about))
    assert found == vector.get("refused")


@pytest.mark.parametrize("vector", [one for one in vectors("receipts") if one.get("normalised")])
def test_what_only_the_form_refuses_is_taken_once_it_is_normalised(vector):
    """Would catch a door that turns an honest phone away: it normalises first, the contract then sees the one form."""
    told = ack_of(vector)
    normal = ack_of(
        vector,
        receipt_signature=rules.normalised(told.receipt_signature),
        grant_signature=told.grant_signature and rules.normalised(told.grant_signature),
    )
    about = {"session_id": SESSION_ID, "provider": PROVIDER, "consumer": CONSUMER}
    assert rules.is_receipt_valid(
        DOMAIN, normal, energy_wh_ordered=ENERGY_WH, delivered_wh=vector["deliveredWh"], **about
    )


# ---- messages


@each("messages")
def test_the_same_messages_are_understood(vector):
    """Would catch a message of a JavaScript client that we misread, and one that two readers could read differently."""

    def judge():
        read = messages.decode(unhex(vector["bytes"]) if "bytes" in vector else vector["text"].encode())
        assert messages.encode(read) == vector["canonical"].encode()

    assert verdict(judge) == vector.get("refused")


def test_every_kind_of_message_is_among_them():
    """Would catch a message that is added and never shown to another implementation."""
    assert {one["name"] for one in vectors("messages")} >= messages.KINDS.keys()


def test_the_meter_records_are_signed_as_ours_are():
    """Would catch a record whose signature covers other bytes than the ones that are passed on."""
    final = messages.decode(
        next(one["text"] for one in vectors("messages") if one["name"] == "final").encode()
    )
    for record in (final.ocmf_begin, final.ocmf_end):
        head, payload, signature = record.split("|")
        assert head == "OCMF"
        assert coincurve.PublicKey(METER_KEY).verify(
            bytes.fromhex(json.loads(signature)["SD"]), payload.encode()
        )
        assert json.loads(payload)["U"]["sessionId"] == messages.hex0x(SESSION_ID)
