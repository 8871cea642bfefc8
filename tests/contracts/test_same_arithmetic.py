"""Python and Solidity agree: token, session id, both costs, every digest, and which receipts are paid.

Two witnesses: `Reference.sol` (PROTOCOL written down once more in Solidity) for any input, and the market itself, where
a whole trade is made with random amounts.
"""

from dataclasses import astuple, replace
from pathlib import Path

import eth_abi
import pytest
from eth_utils.crypto import keccak
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from market import Chain, Market

import contracts
from agent.chain import contract
from agent.core import token as tk
from agent.core.token import Domain
from agent.core.units import Address, cost_wei_ceil, cost_wei_floor
from contracts import Artefact

UINT64 = st.integers(0, 2**64 - 1)
UINT128 = st.integers(0, 2**128 - 1)
UINT256 = st.integers(0, 2**256 - 1)
ADDRESS = st.binary(min_size=20, max_size=20)
BYTES32 = st.binary(min_size=32, max_size=32)
MORE = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
REFERENCE = Path(contracts.__file__).parent / "test" / "Reference.json"


class Reference:
    """The deployed Reference contract, by function name."""

    def __init__(self) -> None:
        artefact = Artefact.from_json(REFERENCE.read_text())
        self.chain = Chain()
        self.address = self.chain.deploy(self.chain.actors[0], artefact.bytecode)
        self.types = {entry["name"]: contract._types(entry["inputs"]) for entry in artefact.abi}

    def __call__(self, name, *arguments):
        """Ask it; every function gives one word."""
        types = self.types[name]
        selector = keccak(text=f"{name}({','.join(types)})")[:4]
        return self.chain.ask(self.address, selector + eth_abi.encode(types, arguments))


@pytest.fixture(scope="module")
def solidity():
    """PROTOCOL in Solidity."""
    return Reference()


@pytest.fixture(scope="module")
def market():
    """A market for whole trades; each example puts it back."""
    return Market()


@pytest.fixture(scope="module")
def charging():
    """A market and the token of its open session; only asked, never changed."""
    market = Market()
    return market, market.open_session(energy_wh=200)


@MORE
@given(rate=UINT128, energy_wh=UINT64)
def test_costs(solidity, rate, energy_wh):
    """Would catch a wei created or lost by rounding the other way."""
    assert int.from_bytes(solidity("costFloor", rate, energy_wh)) == cost_wei_floor(rate, energy_wh)
    assert int.from_bytes(solidity("costCeil", rate, energy_wh)) == cost_wei_ceil(rate, energy_wh)


@MORE
@given(consumer=ADDRESS, provider=ADDRESS, issued_at_s=UINT256, valid_until_s=UINT256)
def test_token(solidity, consumer, provider, issued_at_s, valid_until_s):
    """Would catch another packing of the paper's token: no consumer would be believed."""
    expected = solidity("accessToken", consumer, provider, issued_at_s, valid_until_s)
    assert tk.access_token(consumer, provider, issued_at_s, valid_until_s) == expected


@MORE
@given(chain_id=UINT256, place=ADDRESS, consumer=ADDRESS, provider=ADDRESS, nonce=UINT64)
def test_session_id_and_domain(solidity, chain_id, place, consumer, provider, nonce):
    """Would catch receipts that bind to something the contract does not look for."""
    assert tk.session_id(chain_id, place, consumer, provider, nonce) == solidity(
        "sessionId", chain_id, place, consumer, provider, nonce
    )
    assert Domain(chain_id, place).separator == solidity("domainSeparator", chain_id, place)


@MORE
@given(
    domain=st.builds(Domain, UINT64, ADDRESS),
    message=st.one_of(
        st.builds(tk.PresentToken, BYTES32, BYTES32, ADDRESS, ADDRESS, UINT64, UINT64, BYTES32),
        st.builds(tk.Receipt, BYTES32, UINT64),
        st.builds(tk.ProviderHello, ADDRESS, BYTES32, BYTES32, UINT64),
        st.builds(tk.SessionAccept, BYTES32, BYTES32, UINT64, UINT64, UINT64),
        st.builds(tk.MeterReading, BYTES32, UINT64, UINT64, UINT64, UINT64),
        st.builds(tk.StopRequest, BYTES32, UINT64),
    ),
)
def test_typed_message_digests(solidity, domain, message):
    """Would catch a type string, field order or padding that another wallet or the contract reads differently."""
    name = type(message).__name__
    function = name[0].lower() + name[1:] + "Digest"
    assert tk.digest(domain, message) == solidity(function, domain.separator, astuple(message))


@MORE
@given(hello=st.builds(tk.ProviderHello, ADDRESS, BYTES32, BYTES32, UINT64), nonce=BYTES32)
def test_challenge_and_personal_sign(solidity, hello, nonce):
    """Would catch a challenge that consumer and provider compute differently, or a wallet's other prefix."""
    assert tk.challenge(hello, nonce) == solidity("challenge", astuple(hello), nonce)
    assert tk.token_digest_eip191(nonce) == solidity("personalSignDigest", nonce)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    energy_wh=st.integers(1, 2**24 - 1),
    start_rate=st.integers(1, 10**17),
    share=st.fractions(0, 1),
    delivered=st.fractions(0, 1),
    validity_s=st.integers(300, 172_800),
    pause_s=st.integers(0, 800),
)
def test_a_whole_trade_of_any_size(market, energy_wh, start_rate, share, delivered, validity_s, pause_s):
    """Would catch any disagreement between the market's own arithmetic and ours, to the wei."""
    place = market.snapshot()
    rate = max(1, int(start_rate * share))
    delivered_wh = int(energy_wh * delivered)
    market.start(energy_wh, start_rate, validity_s=validity_s)
    market.bid(rate)
    market.close()
    market.pass_time(pause_s)
    opened = market.send(market.consumer, contract.encode_connect(market.provider.address, energy_wh)).log(
        contract.SessionOpened
    )
    parties = (market.consumer.address, market.provider.address)
    assert opened.issued_at_s == market.now_s
    assert opened.token == tk.access_token(*parties, market.now_s, market.now_s + validity_s)
    assert opened.session_id == tk.session_id(market.chain_id, market.address, *parties, opened.auction_nonce)
    assert opened.deposit_wei == opened.bond_wei == cost_wei_ceil(rate, energy_wh)

    ack = market.receipt(opened.token, delivered_wh)
    ended = market.send(market.provider, contract.encode_end_connection(opened.token, delivered_wh, ack)).log(
        contract.ConnectionEnded
    )
    fee_wei = cost_wei_floor(rate, delivered_wh)
    assert (ended.delivered_wh, ended.fee_wei) == (delivered_wh, fee_wei)
    assert market.ledger_wei(market.provider) == fee_wei + opened.bond_wei
    assert market.ledger_wei(market.consumer) == cost_wei_ceil(start_rate, energy_wh) - fee_wei
    assert market.held_wei() == market.balance_wei(market.address)
    market.restore(place)


SIGNATURE_FORGERIES = {
    "honest": lambda s: s,
    "v 0/1": lambda s: s[:64] + bytes([s[64] - 27]),
    "high s": lambda s: (
        s[:32] + (tk.CURVE_ORDER - int.from_bytes(s[32:64])).to_bytes(32) + bytes([55 - s[64]])
    ),
    "EIP-2098": lambda s: s[:32] + (int.from_bytes(s[32:64]) | (s[64] - 27) << 255).to_bytes(32),
    "too long": lambda s: s + b"\0",
    "empty": lambda _: b"",
    "zero r": lambda s: bytes(32) + s[32:],
    "zero s": lambda s: s[:32] + bytes(32) + s[64:],
    "r above the order": lambda s: b"\xff" * 32 + s[32:],
    "other v": lambda s: s[:64] + b"\x1d",
}
FIELD_FORGERIES = {
    "none": {},
    "another token": {"token": b"\x01" * 32},
    "another key": {"session_key": b"\x02" * 20},
    "a larger grant": {"max_energy_wh": 10_000},
    "a later validity": {"valid_until_s": 10},
    "another challenge": {"challenge": b"\x06" * 32},
    "no key": {"session_key": bytes(20)},
}


@pytest.mark.parametrize("signature_forgery", SIGNATURE_FORGERIES)
@pytest.mark.parametrize("field_forgery", FIELD_FORGERIES)
@pytest.mark.parametrize("by_key", [False, True])
def test_the_same_receipts_are_paid(charging, by_key, field_forgery, signature_forgery):
    """Would catch energy that nobody pays for: our check must accept exactly what the contract accepts."""
    market, name = charging
    state = market.session(name)
    session_id = tk.session_id(
        market.chain_id, market.address, state.consumer, state.provider, state.auction_nonce
    )
    forge = SIGNATURE_FORGERIES[signature_forgery]
    for delivered_wh, grant_wh in ((100, 150), (151, 150), (200, 200), (201, 300)):
        if by_key:
            honest = market.granted_receipt(name, delivered_wh, market.hot_key, grant_wh)
        else:
            honest = market.receipt(name, delivered_wh)
        for forged_field in ("receipt_signature", "grant_signature"):
            forged = replace(honest, **FIELD_FORGERIES[field_forgery])
            if getattr(forged, forged_field):
                forged = replace(forged, **{forged_field: forge(getattr(forged, forged_field))})
            asked = contract.encode_is_receipt_valid(name, delivered_wh, forged)
            paid = contract.decode_is_receipt_valid(market.view(asked))
            assert paid == tk.is_receipt_valid(
                market.domain,
                forged,
                session_id=session_id,
                provider=Address(state.provider),
                consumer=Address(state.consumer),
                energy_wh_ordered=state.energy_wh,
                delivered_wh=delivered_wh,
            )
            if signature_forgery == "honest" and field_forgery == "none":
                assert paid is (delivered_wh <= state.energy_wh and (not by_key or delivered_wh <= grant_wh))
