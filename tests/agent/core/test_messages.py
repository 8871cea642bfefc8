"""Every message, byte for byte: what goes in comes out, and what is not exactly ours is refused."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core import messages
from agent.core.messages import (
    INTEGER_MAX,
    KINDS,
    MESSAGE_BYTES_MAX,
    AckMessage,
    Final,
    Present,
    ReceiptMessage,
    Refusal,
    Status,
    decode,
    encode,
)
from agent.core.units import SessionId
from agent.errors import Refused

TEXTS = st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S", "Zs"]), max_size=128)
KINDS_OF_VALUES = {
    id(messages.ADDRESS): st.binary(min_size=20, max_size=20),
    id(messages.HASH): st.binary(min_size=32, max_size=32),
    id(messages.SIGNATURE): st.binary(min_size=64, max_size=65),
    id(messages.PUBLIC_KEY): st.one_of(
        *(st.binary(min_size=length, max_size=length) for length in (33, 64, 65))
    ),
    id(messages.INTEGER): st.integers(0, INTEGER_MAX),
    id(messages.MONEY): st.integers(0, 2**256 - 1),
    id(messages.TEXT): TEXTS,
    id(messages.RECORD): st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=1800),
    id(messages.SCHEME): st.sampled_from(["eip712", "eip191"]),
}


def message_of(kind):
    """A strategy for messages of this kind."""
    return st.builds(kind, *(KINDS_OF_VALUES[id(codec)] for codec in kind.KEYS.values()))


MESSAGES = st.one_of(*(message_of(kind) for kind in KINDS.values()))
RECEIPT = ReceiptMessage(SessionId(b"\x11" * 32), 40, b"\x22" * 65)


def refusal(data):
    """Why these bytes are refused, in words."""
    with pytest.raises(Refused) as caught:
        decode(data)
    assert caught.value.reason == "malformed"
    return caught.value.detail


def body_of(message=RECEIPT, **changes):
    """A message as a dict, changed; None removes a key."""
    body = json.loads(encode(message)) | changes
    return json.dumps({key: value for key, value in body.items() if value is not None}).encode()


@given(MESSAGES)
def test_every_message_survives_the_way_there_and_back(message):
    """A field that is dropped, swapped or rounded on the wire is money or a signature lost."""
    data = encode(message)
    assert decode(data) == message
    assert len(data) <= MESSAGE_BYTES_MAX


@given(MESSAGES)
def test_there_is_one_canonical_spelling(message):
    """The door answers a byte-identical repeat; two spellings of one message by one sender would defeat it."""
    data = encode(message)
    assert encode(decode(data)) == data
    assert (
        json.dumps(json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
        == data
    )


@given(MESSAGES)
def test_any_other_spelling_means_the_same(message):
    """A JavaScript client may order keys and write spaces as it likes."""
    body = json.loads(encode(message))
    loose = json.dumps(dict(reversed(body.items())), indent=1).encode()
    if len(loose) <= MESSAGE_BYTES_MAX:
        assert decode(loose) == message


@pytest.mark.parametrize("kind", KINDS.values())
def test_fields_and_keys_pair_up(kind):
    """`encode` pairs them by position: a field too many would shift every value after it."""
    assert len(fields(kind)) == len(kind.KEYS)


STRANGE = {
    "a float": body_of(deliveredWh=40.0),
    "an exponent": encode(RECEIPT).replace(b":40,", b":4e1,"),
    "NaN": encode(RECEIPT).replace(b":40,", b":NaN,"),
    "Infinity": encode(RECEIPT).replace(b":40,", b":-Infinity,"),
    "a boolean": body_of(deliveredWh=True),
    "a string for a number": body_of(deliveredWh="40"),
    "a negative number": body_of(deliveredWh=-1),
    "2^53": body_of(deliveredWh=INTEGER_MAX + 1),
    "a very long number": encode(RECEIPT).replace(b":40,", b":" + b"9" * 3000 + b","),
    "a key twice": encode(RECEIPT)[:-1] + b',"deliveredWh":40}',
    "a key that is not ours": body_of(extra=1),
    "a missing key": body_of(signature=None),
    "no type": body_of(type=None),
    "a type that is not ours": body_of(type="gift"),
    "a type that is a list": body_of(type=["receipt"]),
    "a nested value": body_of(deliveredWh={"a": 1}),
    "a list": b"[]",
    "a bare number": b"7",
    "null": b"null",
    "nothing": b"",
    "not UTF-8": b"\xff\xfe\xff",
    "half of it": encode(RECEIPT)[:-5],
    "something behind it": encode(RECEIPT) + b"x",
    "two of them": encode(RECEIPT) * 2,
    "one byte too long": encode(RECEIPT) + b" " * (MESSAGE_BYTES_MAX + 1 - len(encode(RECEIPT))),
    "hex without 0x": body_of(sessionId="11" * 32),
    "hex too short": body_of(sessionId="0x" + "11" * 31),
    "hex too long": body_of(sessionId="0x" + "11" * 33),
    "hex that is not hex": body_of(sessionId="0x" + "1g" * 32),
    "hex with spaces": body_of(sessionId="0x" + "11" * 31 + "  "),
    "hex with spaces inside": body_of(sessionId="0x" + "1 1 " * 16),
    "0X in capitals": body_of(sessionId="0X" + "11" * 32),
    "full-width digits": body_of(sessionId="0x" + "\uff11" * 64),
    "a signature of 63 bytes": body_of(signature="0x" + "22" * 63),
    "a signature of 66 bytes": body_of(signature="0x" + "22" * 66),
    "a control character": body_of(Refusal("busy", "x"), detail="a\u0000b"),
    "a line break": body_of(Refusal("busy", "x"), detail="a\nb"),
    "a direction mark": body_of(Refusal("busy", "x"), detail="a\u202eb"),
    "a lone surrogate": body_of(Refusal("busy", "x"), detail="\ud800"),
    "too much text": body_of(Refusal("busy", "x"), detail="x" * 129),
    "a scheme that is not ours": body_of(
        Present("eip712", *(b"\x11" * 32,) * 5, b"\x22" * 20, 1, 2, b"\x02" * 33, b"\x22" * 65), scheme="raw"
    ),
    "money as a number": body_of(
        Final(SessionId(bytes(32)), "SETTLED", "", 1, 1, 5, bytes(32), "", ""), costWei=5
    ),
    "money with a sign": body_of(
        Final(SessionId(bytes(32)), "SETTLED", "", 1, 1, 5, bytes(32), "", ""), costWei="+5"
    ),
    "money in Arabic digits": body_of(
        Final(SessionId(bytes(32)), "SETTLED", "", 1, 1, 5, bytes(32), "", ""), costWei="\u0665"
    ),
}


@pytest.mark.parametrize("what", STRANGE)
def test_whatever_is_not_exactly_ours_is_malformed(what):
    """Each of these was a bug in somebody's parser: a float that rounds, a key that wins twice, a digit that is none."""
    assert refusal(STRANGE[what])


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'{"type":['])
def test_deep_nesting_is_refused_and_does_not_end_the_process(opening):
    """4 KiB of brackets, with the recursion limit that web3's companions leave behind."""
    data = (opening * MESSAGE_BYTES_MAX)[:MESSAGE_BYTES_MAX]
    code = (
        "import sys, threading\n"
        "from agent.core.messages import decode\n"
        "from agent.errors import Refused\n"
        "sys.setrecursionlimit(100_000)\n"
        "threading.stack_size(512 * 1024)\n"
        "def run():\n"
        "    try:\n"
        f"        decode({data!r})\n"
        "    except Refused as refused:\n"
        "        print(refused.reason)\n"
        "thread = threading.Thread(target=run)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout) == (0, "malformed\n"), done.stderr[-500:]


@given(st.binary(max_size=200))
def test_noise_is_malformed_and_nothing_else(noise):
    """No other exception may come out: it would end the task that reads the wire."""
    assert refusal(noise)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_any_json_that_is_no_message_is_malformed(value):
    """Well-formed JSON of the wrong shape must not reach the rules."""
    assert refusal(json.dumps(value).encode()[:MESSAGE_BYTES_MAX])


@given(MESSAGES, st.data())
def test_a_wrong_value_under_any_key_is_malformed(message, data):
    """Each key is checked for its own kind; a check that is forgotten shows here."""
    key = data.draw(st.sampled_from(sorted(message.KEYS)))
    wrong = data.draw(st.sampled_from([None, [], {}, 1.5, True, -1, "0x", "\n"]))
    body = json.loads(encode(message)) | {key: wrong}
    if isinstance(wrong, str) and wrong == "0x" and message.KEYS[key] in (messages.TEXT, messages.RECORD):
        return
    assert refusal(json.dumps(body).encode())


def test_hex_is_taken_in_any_case_and_given_in_lower_case():
    """Checksummed addresses are spelled in mixed case; our own output has one spelling."""
    shouted = body_of(sessionId="0x" + "AB" * 32)
    assert decode(shouted).session_id == b"\xab" * 32
    assert b"0x" + b"ab" * 32 in encode(decode(shouted))


def test_numbers_at_the_edge_are_exact():
    """2^53-1 is what a browser can still hold; money has no such bound because it is text."""
    assert decode(encode(AckMessage(SessionId(bytes(32)), INTEGER_MAX))).delivered_wh == INTEGER_MAX
    rich = Final(SessionId(bytes(32)), "SETTLED", "", 1, 1, 2**256 - 1, bytes(32), "", "")
    assert decode(encode(rich)).cost_wei == 2**256 - 1


def test_our_own_over_long_message_is_our_own_mistake():
    """An over-size publish vanishes with success at the client, so it must never be made."""
    with pytest.raises(AssertionError):
        encode(Status(SessionId(bytes(32)), "x" * MESSAGE_BYTES_MAX, 0, 0, ""))
