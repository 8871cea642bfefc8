"""The contract beside Python on signatures: the second implementation's vectors, and any number of spoilt receipts.

`isReceiptValid` is asked on eth-tester's chain, with the real bytecode; the market there is the vectors' own.
"""

import sys
from collections import Counter

import pytest
from hypothesis import HealthCheck, find, given, settings
from hypothesis import strategies as st
from market import Market
from vectors import AUCTION_NONCE, CONSUMER, DOMAIN, ENERGY_WH, PROVIDER, SESSION_ID, ack_of, unhex, vectors

from agent.chain import contract
from agent.core import token as tk
from agent.core.units import Address

SHARE_MIN = 0.2  # a property that hardly ever sees one of its two answers says nothing about it


@pytest.fixture(scope="module")
def charging():
    """A market and the token of its open session; only asked, never changed."""
    market = Market()
    return market, market.open_session(energy_wh=ENERGY_WH)


def paid(charging, acks):
    """What the contract says of many (delivered_wh, ack)."""
    market, name = charging
    questions = [contract.encode_is_receipt_valid(name, delivered_wh, ack) for delivered_wh, ack in acks]
    return [contract.decode_is_receipt_valid(answer) for answer in market.views(questions)]


def taken(delivered_wh, ack):
    """What Python says of one."""
    return tk.is_receipt_valid(
        DOMAIN,
        ack,
        session_id=SESSION_ID,
        provider=PROVIDER,
        consumer=CONSUMER,
        energy_wh_ordered=ENERGY_WH,
        delivered_wh=delivered_wh,
    )


def test_the_vectors_were_made_for_this_market(charging):
    """Would catch vectors of another place: every one of them would be refused, and nothing shown."""
    market, name = charging
    state = market.session(name)
    assert (market.domain, state.consumer, state.provider) == (DOMAIN, CONSUMER, PROVIDER)
    assert (state.auction_nonce, state.energy_wh) == (AUCTION_NONCE, ENERGY_WH)


def test_the_contract_gives_the_names_that_the_second_implementation_computes(charging):
    """Would catch a session id or a domain that only Python and the vectors agree on."""
    market, _ = charging
    here = (DOMAIN.chain_id, "0x" + DOMAIN.contract.hex())
    told = [one for one in vectors("identities") if (one.get("chainId"), one.get("contract")) == here]
    assert {one["name"] for one in told} == {"sessionId", "domainSeparator"}
    for one in told:
        if one["name"] == "sessionId":
            parties = (Address(unhex(one["consumer"])), Address(unhex(one["provider"])))
            asked = contract.encode_session_id_of(*parties, int(one["auctionNonce"]))
            assert contract.decode_session_id_of(market.view(asked)) == unhex(one["expected"])
        else:
            answer = market.view(contract.encode_domain_separator())
            assert contract.decode_domain_separator(answer) == unhex(one["expected"])


def test_the_contract_takes_the_receipts_that_the_second_implementation_calls_good(charging):
    """Would catch a contract, or a wallet's library, that signs or reads anything otherwise than PROTOCOL section 3."""
    receipts = vectors("receipts")
    told = paid(charging, [(int(one["deliveredWh"]), ack_of(one)) for one in receipts])
    wrong = [
        one["name"] for one, is_paid in zip(receipts, told, strict=True) if is_paid is ("refused" in one)
    ]
    assert not wrong
    assert {True, False} == set(told)


def test_the_contract_takes_a_granted_key_as_the_door_takes_a_presentation(charging):
    """Would catch a presentation that opens the door with a grant that the contract will not honour, or the other way round."""
    presentations = vectors("presentations")
    good = next(one for one in vectors("receipts") if one["name"] == "granted key, 100 Wh")
    public_key = presentations[0][
        "publicKey"
    ]  # the contract is never told one: leave out what only differs there
    granting = [
        one
        for one in presentations
        if one["scheme"] == "eip712" and int(one["sessionKey"], 16) and one["publicKey"] == public_key
    ]
    acks = []
    for one in granting:
        told = {name: one[name] for name in ("token", "sessionKey", "maxEnergyWh", "validUntil", "challenge")}
        acks.append((100, ack_of({"ack": good["ack"] | told | {"grantSignature": one["signature"]}})))
    for one, (_, ack), is_paid in zip(granting, acks, paid(charging, acks), strict=True):
        assert is_paid is ("refused" not in one and tk.is_canonical(ack.grant_signature)), one["name"]
    assert len(granting) > 20


# ---- any receipt

KEYS = {number: tk.coincurve.PrivateKey(number.to_bytes(32, "big")) for number in (2, 3, 5, 6)}
CONSUMER_KEY, SESSION_KEY = 2, 6
MOSTLY = 60  # of that many and one choices, so many are honest: ten of them must be for a receipt to be good


def address(number):
    """The account of this private key."""
    return tk.address_of(KEYS[number].public_key.format(compressed=False))


def signed(number, message, domain=DOMAIN):
    """Its signature, canonical."""
    made = KEYS[number].sign_recoverable(tk.digest(domain, message), hasher=None)
    return made[:64] + bytes([27 + made[64]])


@st.composite
def signatures(draw, number, message):
    """Mostly an honest signature by this key; else one that is spoilt in one of the ways there are."""
    honest = signed(number, message)
    r, s, v = (int.from_bytes(part, "big") for part in (honest[:32], honest[32:64], honest[64:]))
    how = draw(
        st.sampled_from(
            ["honest"] * MOSTLY + ["v", "s", "r", "cut", "long", "bit", "twin", "compact", "noise"]
        )
    )
    match how:
        case "v":
            v = draw(st.integers(0, 255))
        case "s":
            s = draw(
                st.sampled_from(
                    [0, 1, tk.CURVE_ORDER // 2, tk.CURVE_ORDER // 2 + 1, tk.CURVE_ORDER, 2**256 - 1]
                )
            )
        case "r":
            r = draw(st.sampled_from([0, 1, 5, tk.CURVE_ORDER - 1, tk.CURVE_ORDER, 2**256 - 1]))
        case "twin":
            s, v = tk.CURVE_ORDER - s, 55 - v
        case "compact":
            return honest[:32] + (s | (v - 27) << 255).to_bytes(32, "big")
        case "cut":
            return honest[: draw(st.integers(0, 64))]
        case "long":
            return honest + draw(st.binary(min_size=1, max_size=40))
        case "noise":
            return draw(st.binary(min_size=65, max_size=65))
        case "bit":
            return (int.from_bytes(honest, "big") ^ 1 << draw(st.integers(0, 519))).to_bytes(65, "big")
    return r.to_bytes(32, "big") + s.to_bytes(32, "big") + bytes([v])


def or_else(honest, *others):
    """Mostly the honest value."""
    return st.sampled_from([honest] * MOSTLY + list(others))


@st.composite
def receipts(draw):
    """(delivered_wh, ack): own and granted keys, and everything about them honest or not."""
    delivered_wh = draw(st.sampled_from([0, 1, 99, 100, 150, 199, 200, 200, 201, 2**64 - 1]))
    signed_wh = draw(or_else(delivered_wh, 0, 100, 2**64 - 1))
    session_id = draw(or_else(SESSION_ID, bytes(32)))
    receipt = tk.Receipt(session_id, signed_wh)
    if draw(st.sampled_from([True, False])):
        signature = draw(signatures(draw(or_else(CONSUMER_KEY, 3, 5, 6)), receipt))
        stray = draw(st.binary(max_size=70))
        return delivered_wh, tk.Ack(bytes(32), tk.ZERO_ADDRESS, 0, 0, bytes(32), stray, signature)
    token, bound = draw(st.binary(min_size=32, max_size=32)), draw(st.binary(min_size=32, max_size=32))
    limit_wh, until_s = draw(or_else(200, 0, 99, 2**64 - 1)), draw(st.integers(0, 2**64 - 1))
    key = draw(or_else(SESSION_KEY, CONSUMER_KEY, 5))
    provider = draw(or_else(PROVIDER, address(5)))
    grant = tk.PresentToken(token, SESSION_ID, provider, address(key), limit_wh, until_s, bound)
    ack = tk.Ack(
        draw(or_else(token, bytes(32))),
        draw(or_else(address(key), address(3), tk.ZERO_ADDRESS)),
        draw(or_else(limit_wh, 200, 2**64 - 1)),
        draw(or_else(until_s, 0)),
        draw(or_else(bound, bytes(32))),
        draw(signatures(draw(or_else(CONSUMER_KEY, 3, 5, 6)), grant)),
        draw(signatures(draw(or_else(key, 3, 5)), receipt)),
    )
    return delivered_wh, ack


def test_python_takes_exactly_what_the_contract_takes(charging, request, capsys):
    """Would catch energy that nobody pays for (we take it, the contract does not), and an honest receipt turned away."""
    count = Counter()

    @settings(
        max_examples=20_000 if request.config.getoption("--long") else 600,
        suppress_health_check=list(HealthCheck),
        database=None,
    )
    @given(receipts())
    def the_same(case):
        (is_paid,) = paid(charging, [case])
        assert is_paid is taken(*case)
        count[is_paid] += 1

    the_same()
    share = count[True] / count.total()
    with capsys.disabled():
        sys.stdout.write(
            f"\n  receipts: {count[True]} accepted, {count[False]} refused = {share:.0%} accepted "
        )
    assert SHARE_MIN < share < 1 - SHARE_MIN


def test_the_property_can_fail(charging):
    """Would catch a property that compares nothing: a Python that takes high s disagrees with the contract within a few tries."""

    def disagree(case):
        delivered_wh, ack = case
        (is_paid,) = paid(charging, [case])
        twin = high_s_taken(ack)
        return is_paid is not taken(delivered_wh, twin)

    find(
        receipts(),
        disagree,
        settings=settings(max_examples=2_000, suppress_health_check=list(HealthCheck), database=None),
    )


def high_s_taken(ack):
    """The receipt as a careless reader sees it: a high s turned into the low one."""
    r, s, v = (
        ack.receipt_signature[:32],
        int.from_bytes(ack.receipt_signature[32:64], "big"),
        ack.receipt_signature[64:],
    )
    if (
        len(ack.receipt_signature) != 65
        or v not in (b"\x1b", b"\x1c")
        or not tk.CURVE_ORDER // 2 < s < tk.CURVE_ORDER
    ):
        return ack
    low = r + (tk.CURVE_ORDER - s).to_bytes(32, "big") + bytes([55 - v[0]])
    return tk.Ack(
        *(low if name == "receipt_signature" else getattr(ack, name) for name in ack.__dataclass_fields__)
    )
