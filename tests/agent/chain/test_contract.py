"""The typed view against the checked-in ABI: nothing is forgotten, nothing hostile gets through."""

import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import eth_abi
import pytest
from eth_utils.crypto import keccak
from hypothesis import given
from hypothesis import strategies as st

from agent.chain import contract as c
from agent.core.token import NO_ACK, Ack
from agent.core.units import Address
from agent.errors import Transient
from contracts import load_artefact

ADDRESS = Address(b"\x11" * 20)
MARKET = Address(b"\x22" * 20)
WORD = b"\x33" * 32
NOT_OURS_TO_CALL = {
    "renounceOwnership",
    "pendingOwner",
}  # OpenZeppelin's; a market without an owner helps nobody

CALLS = {
    "addEV": lambda: c.encode_add_ev(ADDRESS, WORD),
    "removeEV": lambda: c.encode_remove_ev(ADDRESS),
    "changeStatus": lambda: c.encode_change_status(active=True),
    "transferOwnership": lambda: c.encode_transfer_ownership(ADDRESS),
    "acceptOwnership": c.encode_accept_ownership,
    "deposit": c.encode_deposit,
    "withdraw": lambda: c.encode_withdraw(5, ADDRESS),
    "setOperator": lambda: c.encode_set_operator(ADDRESS, 5),
    "startAuction": lambda: c.encode_start_auction(1, 2, 3, 4, WORD),
    "placeBid": lambda: c.encode_place_bid(ADDRESS, 1, 2),
    "placeBidFor": lambda: c.encode_place_bid_for(ADDRESS, MARKET, 1, 2),
    "endAuction": lambda: c.encode_end_auction(ADDRESS),
    "cancelAuction": lambda: c.encode_cancel_auction(ADDRESS),
    "connect": lambda: c.encode_connect(ADDRESS, 1),
    "endConnection": lambda: c.encode_end_connection(WORD, 1, NO_ACK),
    "submitReceipt": lambda: c.encode_submit_receipt(WORD, 1, NO_ACK),
    "settle": lambda: c.encode_settle(WORD),
    "sessionIdOf": lambda: c.encode_session_id_of(ADDRESS, MARKET, 1),
    "isReceiptValid": lambda: c.encode_is_receipt_valid(WORD, 1, NO_ACK),
    "sessions": lambda: c.encode_sessions(WORD),
    "auctions": lambda: c.encode_auctions(ADDRESS),
    "auctionNonce": lambda: c.encode_auction_nonce(ADDRESS),
    "balances": lambda: c.encode_balances(ADDRESS),
    "isEV": lambda: c.encode_is_ev(ADDRESS),
    "evInfo": lambda: c.encode_ev_info(ADDRESS),
    "operatorOf": lambda: c.encode_operator_of(ADDRESS),
    "status": c.encode_status,
    "owner": c.encode_owner,
    "parameters": c.encode_parameters,
    "domainSeparator": c.encode_domain_separator,
}


def of_kind(kind):
    """The ABI's entries of one kind, by name."""
    return {entry["name"]: entry for entry in load_artefact().abi if entry["type"] == kind}


def signature(entry):
    """Name and types as the ABI writes them."""
    return f"{entry['name']}({','.join(c._types(entry['inputs']))})"


def test_every_function_has_its_encoder():
    """Would catch a function of the contract that nobody can call, or an encoder of one that is gone."""
    assert set(CALLS) | NOT_OURS_TO_CALL == set(of_kind("function"))
    assert not set(CALLS) & NOT_OURS_TO_CALL


@pytest.mark.parametrize("name", CALLS)
def test_calldata_begins_with_the_selector(name):
    """Would catch an encoder that calls another function, or too few arguments."""
    data = CALLS[name]()
    entry = of_kind("function")[name]
    assert data[:4] == keccak(text=signature(entry))[:4]
    eth_abi.decode(c._types(entry["inputs"]), data[4:])


def test_ack_travels_field_by_field():
    """Would catch two swapped fields of the receipt's proof: nothing would be paid."""
    ack = Ack(WORD, ADDRESS, 7, 8, b"\x44" * 32, b"grant", b"receipt")
    data = c.encode_end_connection(b"\x55" * 32, 6, ack)
    struct = "(bytes32,address,uint64,uint64,bytes32,bytes,bytes)"
    assert eth_abi.decode(["bytes32", "uint64", struct], data[4:]) == (
        b"\x55" * 32,
        6,
        (WORD, "0x" + "11" * 20, 7, 8, b"\x44" * 32, b"grant", b"receipt"),
    )


def test_our_own_mistakes_do_not_become_calldata():
    """Would catch a number that is cut to its type instead of being refused."""
    short_ack = replace(NO_ACK, token=b"short")
    for wrong in (
        lambda: c.encode_connect(ADDRESS, 2**64),
        lambda: c.encode_connect(b"short", 1),
        lambda: c.encode_settle(b"short"),
        lambda: c.encode_end_connection(WORD, 1, short_ack),
    ):
        with pytest.raises((AssertionError, eth_abi.exceptions.EncodingError)):
            wrong()


def test_deployment_carries_code_and_parameters():
    """Would catch a market that deploys with swapped windows."""
    market = c.MarketParameters(*range(1, 11))
    code = c.encode_deploy(market)
    assert code.startswith(load_artefact().bytecode)
    words = code[len(load_artefact().bytecode) :]
    assert [int.from_bytes(words[i : i + 32]) for i in range(0, 320, 32)] == list(range(1, 11))
    names = [part["name"] for part in load_artefact().abi[0]["inputs"][0]["components"]]
    assert names[:4] == ["minBiddingSeconds", "maxBiddingSeconds", "softCloseSeconds", "softCloseMax"]


# ---------------------------------------------------------------------------------------------- logs


def values_for(entry, seed):
    """Some value for each field of an event, as 20 or 32 bytes, bool or int."""
    made = []
    for place, part in enumerate(entry["inputs"]):
        number = seed + place
        match part["type"]:
            case "address":
                made.append(number.to_bytes(20))
            case "bytes32":
                made.append(number.to_bytes(32))
            case "bool":
                made.append(bool(number % 2))
            case _:
                made.append(number)
    return made


def raw_log(entry, values):
    """Topics and data as a chain holds them."""
    parts = list(zip(entry["inputs"], values, strict=True))
    topics = [keccak(text=signature(entry))]
    topics += [eth_abi.encode([part["type"]], [value]) for part, value in parts if part["indexed"]]
    plain = [(part["type"], value) for part, value in parts if not part["indexed"]]
    return topics, eth_abi.encode([kind for kind, _ in plain], [value for _, value in plain])


@pytest.mark.parametrize("name", sorted(c.LOG_TYPES))
def test_every_event_decodes_into_its_dataclass(name):
    """Would catch swapped fields, a wrong indexed flag or a forgotten event."""
    entry = of_kind("event")[name]
    kind = c.LOG_TYPES[name]
    assert len(fields(kind)) == 1 + len(entry["inputs"])
    values = values_for(entry, 1000)
    topics, data = raw_log(entry, values)
    assert c.decode_log(MARKET, topics, data) == kind(MARKET, *values)
    assert topics[0] == c.topic_of(kind)


def test_every_event_of_the_contract_is_known():
    """Would catch an event added to the contract and not to the vocabulary."""
    assert set(c.LOG_TYPES) == set(of_kind("event"))


def test_foreign_and_broken_logs_are_none():
    """Would catch a daemon that crashes on, or believes, what a hostile node or another contract logs."""
    entry = of_kind("event")["ConnectionEnded"]
    topics, data = raw_log(entry, values_for(entry, 1))
    assert c.decode_log(MARKET, topics, data) is not None
    for bad_topics, bad_data in (
        ([], data),
        ([WORD, *topics[1:]], data),
        (topics[:3], data),
        ([*topics, WORD], data),
        (topics, data[:-1]),
        (topics, b""),
        ([*topics[:2], b"\xff" * 32, topics[3]], data),  # an "address" with dirty upper bytes
        (topics, b"\xff" * 64),  # more than a uint64
    ):
        assert c.decode_log(MARKET, bad_topics, bad_data) is None


@given(topics=st.lists(st.binary(max_size=40), max_size=5), data=st.binary(max_size=400), known=st.booleans())
def test_no_log_makes_it_raise(topics, data, known):
    """Would catch any exception out of a log, whatever it holds."""
    if known and topics:
        topics[0] = c.topic_of(c.SessionOpened)
    c.decode_log(MARKET, topics, data)


def test_one_filter_follows_all_of_a_providers_sessions():
    """Would catch a lifecycle event whose provider stands elsewhere: the daemon would never see it."""
    kinds, *places = c.provider_topics(ADDRESS)
    for name in ("SessionOpened", "ReceiptAccepted", "ConnectionClosing", "ConnectionEnded"):
        entry = of_kind("event")[name]
        values = values_for(entry, 5)
        values[[part["name"] for part in entry["inputs"]].index("provider")] = ADDRESS
        topics, _ = raw_log(entry, values)
        assert topics[0] in kinds
        assert all(wanted in (None, topic) for wanted, topic in zip(places, topics[1:], strict=True))
    assert set(c.auction_topics()[0]) == {
        c.topic_of(kind) for kind in (c.AuctionStarted, c.BidPlaced, c.AuctionEnded, c.AuctionCancelled)
    }


# ---------------------------------------------------------------------------------------------- results


def test_session_state():
    """Would catch swapped fields of a view, or `is_open` for a session that is settled."""
    raw = (2, "0x" + "11" * 20, "0x" + "22" * 20, 3, 4, 5, 6, 7, 8, 9, True)
    struct = c._types(of_kind("function")["sessions"]["outputs"])
    state = c.decode_sessions(eth_abi.encode(struct, [raw]))
    assert state == c.SessionState(
        c.SessionStatus.CLOSING, ADDRESS, MARKET, 3, 4, 5, 6, 7, 8, 9, operator_bond=True
    )
    assert state.is_open
    assert not c.decode_sessions(bytes(32 * 11)).is_open


@pytest.mark.parametrize(
    "decode",
    [
        c.decode_sessions,
        c.decode_auctions,
        c.decode_operator_of,
        c.decode_parameters,
        c.decode_owner,
        c.decode_status,
    ],
)
def test_wrong_answers_of_a_node_are_transient(decode):
    """Would catch a daemon that dies of, or believes, a node's nonsense."""
    for nonsense in (b"", b"\x01", b"\xff" * 32 * 16):
        with pytest.raises(Transient, match="not a valid"):
            decode(nonsense)


def test_next_bid():
    """Would catch a bidder whose bids the contract refuses."""
    blank = c.decode_auctions(bytes(32 * 12))
    assert not blank.has_bid

    def limit(start, rate):
        words = [1, 1, 200, start, rate, 0, 0, 0, 0, 0, 0, 0]
        return c.decode_auctions(b"".join(word.to_bytes(32) for word in words)).rate_wei_per_kwh_max

    assert limit(500, 0) == 500
    assert [limit(500, rate) for rate in (1, 2, 99, 100, 101, 200, 250)] == [0, 1, 98, 99, 100, 198, 248]


# ---------------------------------------------------------------------------------------------- reverts


@pytest.mark.parametrize("name", sorted(of_kind("error")))
def test_every_error_has_its_name(name):
    """Would catch an owner who reads a selector instead of a reason."""
    entry = of_kind("error")[name]
    values = values_for(entry, 5)
    data = keccak(text=signature(entry))[:4] + eth_abi.encode(c._types(entry["inputs"]), values)
    words = c.revert_name(data)
    assert words.partition("(")[0] == name
    assert ("(" in words) is bool(values)


def test_reverts_that_are_not_ours():
    """Would catch a crash while explaining a crash."""
    error = keccak(text="Error(string)")[:4]
    assert c.revert_name(b"") == "no reason given"
    assert c.revert_name(error + eth_abi.encode(["string"], ["out of luck"])) == "Error('out of luck')"
    assert (
        c.revert_name(keccak(text="Panic(uint256)")[:4] + eth_abi.encode(["uint256"], [0x11]))
        == "Panic(0x11)"
    )
    assert c.revert_name(b"\xde\xad\xbe\xef123") == "unknown error 0xdeadbeef"
    assert c.revert_name(error + b"\xff" * 40) == "unknown error 0x08c379a0"
    looks_like_an_address = "0x" + "zz" * 20
    assert looks_like_an_address in c.revert_name(error + eth_abi.encode(["string"], [looks_like_an_address]))
    assert len(c.revert_name(error + eth_abi.encode(["string"], ["\x1b[2J" * 500]))) < 1000
    assert "\x1b" not in c.revert_name(error + eth_abi.encode(["string"], ["\x1b[2J"]))


@given(st.binary(max_size=300))
def test_naming_a_revert_never_raises(data):
    """Would catch revert data that brings the sender down."""
    assert c.revert_name(data)
    assert c.revert_name(keccak(text="Error(string)")[:4] + data)


def test_importing_the_view_loads_no_codec():
    """Would catch half a second added to every command line."""
    program = (
        "import sys, agent.chain.contract; sys.exit(bool({'eth_abi', 'web3', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=60).returncode == 0


def test_what_a_settlement_is_said_to_cost_is_what_it_costs():
    """Would catch a forecast that a new contract has made too small, or that frightens owners off."""
    gas_page = (Path(__file__).parents[3] / "docs/gas.md").read_text()
    dearest = max(
        int(figure.replace(",", ""))
        for row in re.findall(r"^\| endConnection by the provider.*$", gas_page, re.MULTILINE)
        for figure in re.findall(r"[\d,]{5,}", row)
    )
    assert dearest <= c.SETTLEMENT_GAS <= dearest * 13 // 10
