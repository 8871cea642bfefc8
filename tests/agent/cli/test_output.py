"""Output: money is exact in both directions, tables line up, and what is typed wrong is refused with the right form."""

import json

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.cli.output import (
    ADDRESS,
    BYTES32,
    WEI,
    as_json_line,
    at,
    duration,
    ether,
    facts,
    parsed_wei,
    table,
)


@given(st.integers(0, 2**256 - 1))
def test_every_amount_reads_back_as_itself(amount_wei):
    """Would catch a float, a lost digit or a rounded one: what we print is what the same command takes."""
    assert parsed_wei(ether(amount_wei)) == amount_wei


@pytest.mark.parametrize(
    ("amount_wei", "text"),
    [
        (0, "0 ETH"),
        (1, "0.000000000000000001 ETH"),
        (5 * 10**16, "0.05 ETH"),
        (10**18, "1 ETH"),
        (100 * 10**18, "100 ETH"),
        (-15 * 10**17, "-1.5 ETH"),
    ],
)
def test_ether_is_written_without_needless_zeros(amount_wei, text):
    """Would catch "0.0500...", "100" losing its zeros, and a minus sign in the wrong half."""
    assert ether(amount_wei) == text


@pytest.mark.parametrize(
    ("text", "amount_wei"),
    [
        ("1500", 1500),
        ("1500 wei", 1500),
        ("3gwei", 3 * 10**9),
        ("0.05 eth", 5 * 10**16),
        (" 1 ETHER ", 10**18),
    ],
)
def test_amounts_may_name_their_unit(text, amount_wei):
    """Would catch a unit taken for another one: a factor of a billion in somebody's money."""
    assert parsed_wei(text) == amount_wei


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-1",
        "1e18",
        "0x10",
        "1.5",
        "0.0000000000000000001 ETH",
        "1 BTC",
        "1,5 ETH",
        "nan",
        "9" * 200,
        f"{2**256}",
    ],
)
def test_an_amount_that_is_not_exact_is_refused(text):
    """Would catch rounding, hex or scientific notation read by accident, and numbers no ledger can hold."""
    with pytest.raises(ValueError, match=r"amount|whole number|more than"):
        parsed_wei(text)


def test_a_table_lines_up_and_knows_what_it_does_not_know():
    """Would catch columns that do not meet, numbers to the left, and None printed as a word."""
    lines = table(("who", "Wh"), [("alice", 5), ("bo", 1200), ("carol", None)]).splitlines()
    assert lines == ["who      Wh", "alice     5", "bo     1200", "carol     -"]
    assert table(("who", "Wh"), []) == "who  Wh"


def test_facts_leave_out_what_is_unknown():
    """Would catch a label without a value, and raw bytes in front of a person."""
    assert facts([("a", b"\x01"), ("long", 2), ("gone", None)]) == "a     0x01\nlong  2"


def test_json_is_one_line_with_hex_for_bytes():
    """Would catch output that `jq` or a script reading lines cannot take."""
    line = as_json_line({"tx": b"\xab", "none": None, "text": "a\nb"})
    assert "\n" not in line
    assert json.loads(line) == {"tx": "0xab", "none": None, "text": "a\nb"}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-5, "0 s"), (0, "0 s"), (59, "59 s"), (60, "1 min"), (45_000, "12 h 30 min"), (90_061, "1 d 1 h")],
)
def test_durations_show_their_two_largest_parts(seconds, text):
    """Would catch a time-out shown a factor of sixty wrong."""
    assert duration(seconds) == text


def test_times_are_utc():
    """Would catch a local time zone in something two parties compare."""
    assert at(1_790_000_000) == "2026-09-21 14:13:20 UTC"


@pytest.mark.parametrize("text", ["", "0x12", "f39fd6e51aad88f6f4ce6ab8827279cfffb92266", "0x" + "g" * 40])
def test_what_is_no_address_is_refused(text):
    """Would catch a shortened or mistyped account that money then goes to."""
    with pytest.raises(click.BadParameter, match="40 hex digits"):
        ADDRESS.convert(text, None, None)


def test_a_private_key_given_as_an_address_is_not_repeated():
    """Would catch a key that a usage error prints into a terminal, a log or a bug report."""
    with pytest.raises(click.BadParameter) as refused:
        ADDRESS.convert("0x" + "ab" * 32, None, None)
    assert "abab" not in str(refused.value)


def test_types_take_their_right_forms():
    """Would catch a type that refuses what our own output prints."""
    assert ADDRESS.convert("0x" + "AB" * 20, None, None) == b"\xab" * 20
    assert BYTES32.convert("0x" + "ab" * 32, None, None) == b"\xab" * 32
    assert BYTES32.convert("ab" * 32, None, None) == b"\xab" * 32
    assert WEI.convert("0.05 ETH", None, None) == 5 * 10**16
    with pytest.raises(click.BadParameter, match="64 hex digits"):
        BYTES32.convert("0xab", None, None)


def test_a_mixed_case_address_must_spell_its_checksum():
    """Would catch money sent to a mistyped account; all-lower and all-upper case carry no checksum."""
    right = "0x5aAeb6053F3E94C9b9A09f33669435E7Ef1BeAed"
    assert ADDRESS.convert(right, None, None) == bytes.fromhex(right[2:])
    assert ADDRESS.convert(right.lower(), None, None) == bytes.fromhex(right[2:])
    with pytest.raises(click.BadParameter, match="EIP-55"):
        ADDRESS.convert(right.replace("aA", "Aa", 1), None, None)
