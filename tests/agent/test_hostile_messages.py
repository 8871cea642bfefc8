"""Any number of bad messages through the door's whole way, from bytes to the answer: none crashes it, none is taken.

The messages are made from good ones, spoilt where it matters: that is what gets furthest in. Rates are opened wide, so
that every message meets its own check and not the limit before it. `--long`: a million, with figures.
"""

import json
import os
import random
import sys
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
from story import CONSUMER, PORT, SESSION_KEY, STRANGER, TERMS, hash32
from visit import charging

from agent import door
from agent.core import token as rules
from agent.core.messages import AckMessage, Refusal, encode

SEED = 20_260
RSS_GROWTH_MAX = 8 * 2**20  # bytes: a leak of ten bytes a message would pass it in the long mode
DEEP_SHARE_MIN = 0.2  # of the messages must come as far as a signature


class Hostile:
    """Makes bad messages for one running session. Each comes with the name of its kind."""

    def __init__(self, visit) -> None:
        self.random = random.Random(SEED)
        self.visit = visit
        self.hello = visit.door.hello(PORT)
        self.present = visit.present(hello=self.hello)
        self.strangers = visit.present(hello=self.hello, sign=STRANGER)
        self.delivered_wh = 10
        self.receipt = visit.receipt(self.delivered_wh)
        self.stop = visit.stop()
        self.bases = [
            encode(one) for one in (self.strangers, visit.receipt(10, STRANGER), visit.stop(STRANGER))
        ]
        self.kinds = (
            self.noise,
            self.torn,
            self.other_values,
            self.spoilt_presentation,
            self.spoilt_receipt,
            self.spoilt_stop,
            self.strangers_signature,
        )

    def __call__(self):
        """The next one: (kind, bytes)."""
        make = self.random.choice(self.kinds)
        made = make()
        return make.__name__, made if isinstance(made, bytes) else encode(made)

    def noise(self) -> bytes:
        """Bytes; sometimes brackets only, or too many of them."""
        length = self.random.choice((0, 1, 20, 300, 4096, 5000))
        return self.random.choice(
            (self.random.randbytes(length), b"[" * length, b'{"a":' * (length // 5), b"\xff" * length)
        )

    def torn(self) -> bytes:
        """A stranger's message with bytes changed, cut out, doubled or put in."""
        data = bytearray(self.random.choice(self.bases))
        for _ in range(self.random.randint(1, 4)):
            at, length = self.random.randrange(len(data)), self.random.randint(1, 12)
            match self.random.randrange(4):
                case 0:
                    data[at] ^= 1 << self.random.randrange(8)
                case 1:
                    del data[at : at + length]
                case 2:
                    data[at:at] = data[at : at + length]
                case 3:
                    data[at:at] = self.random.choice(
                        (b"null", b"1e9", b'"', b"\\u0000", b"[]", b"-1", b"9" * 30)
                    )
            data = data or bytearray(b"{")
        return bytes(data)

    def other_values(self) -> bytes:
        """A stranger's message, well formed, with other values under some of its keys."""
        body = json.loads(self.random.choice(self.bases))
        for key in self.random.sample(sorted(body), self.random.randint(1, 3)):
            value = body[key]
            if isinstance(value, int):
                body[key] = self.random.choice(
                    (1, 2**53 - 1, 2**53, -1, self.random.getrandbits(53) | 1, 1.5, None)
                )
            else:
                size = max(0, len(value) // 2 - 1)
                body[key] = self.random.choice(
                    (
                        "0x" + self.random.randbytes(size).hex(),
                        "0x" + "00" * size,
                        "eip191",
                        "",
                        None,
                        [value],
                    )
                )
        return json.dumps(body).encode()

    def spoilt(self, signature: bytes) -> bytes:
        """A good signature made bad: bits, twins, edges."""
        r, s, v = signature[:32], int.from_bytes(signature[32:64], "big"), signature[64:]
        match self.random.randrange(5):
            case 0:
                bits = int.from_bytes(signature[:64], "big") ^ 1 << self.random.randrange(512)
                return bits.to_bytes(64, "big") + v
            case 1:
                return r + (rules.CURVE_ORDER - s).to_bytes(32, "big") + bytes([55 - v[0]])
            case 2:
                return signature[:64] + bytes([55 - v[0]])
            case 3:
                return self.random.choice((bytes(32), b"\xff" * 32, rules.word(5))) + signature[32:]
            case _:
                return (
                    self.random.randbytes(32)
                    + bytes([self.random.randrange(128)])
                    + self.random.randbytes(31)
                    + v
                )

    def spoilt_presentation(self):
        """Garbage under a live nonce: all is right but the signature, or one thing that it signs."""
        if self.random.random() < 0.6:
            return replace(self.present, signature=self.spoilt(self.present.signature))
        field, value = self.random.choice(
            (
                ("session_key", STRANGER.address),
                ("max_energy_wh", self.random.randint(5_001, 2**50)),
                ("valid_until_s", TERMS.valid_until_s + self.random.randint(1, 2**30)),
                ("consumer_nonce", self.random.randbytes(32)),
                ("token", self.random.randbytes(32)),
                ("public_key", STRANGER.public_key),
                ("hello_nonce", self.random.randbytes(32)),
                ("scheme", "eip191"),
            )
        )
        return replace(self.present, **{field: value})

    def spoilt_receipt(self):
        """A receipt for what the meter shows, with a bad signature; or a good signature for another amount."""
        if self.random.random() < 0.6:
            return replace(self.receipt, signature=self.spoilt(self.receipt.signature))
        amount = self.random.choice((self.delivered_wh - 1, self.random.randint(11, 2_000), 2**53 - 1))
        return replace(self.receipt, delivered_wh=amount)

    def spoilt_stop(self):
        """A stop that nobody asked for."""
        if self.random.random() < 0.6:
            return replace(self.stop, signature=self.spoilt(self.stop.signature))
        return replace(self.stop, at_s=self.stop.at_s + self.random.randint(1, 10**6))

    def strangers_signature(self):
        """Good signatures by the wrong key, or for a session that nobody knows."""
        wh = self.random.randint(1, 10)
        return self.random.choice(
            (
                self.strangers,
                self.visit.receipt(wh, self.random.choice((STRANGER, CONSUMER))),
                self.visit.stop(STRANGER),
                replace(self.receipt, session_id=hash32(wh)),
            )
        )


@pytest.fixture
def visit(monkeypatch):
    """A running session at a door that has all the time in the world."""
    wide = (1e15, 1e15)
    monkeypatch.setattr(door, "SOURCE_RATE", wide)
    monkeypatch.setattr(door, "GLOBAL_RATE", wide)
    visit = charging()
    visit.story.passes(10)
    return visit


def taken(visit, data, number):
    """True for an answer that is not a refusal, and for anything that changes what we remember."""
    book, rows = visit.story.book, len(visit.story.journal)
    answer = visit.door.answer("phone", f"source {number % 3000}", data)
    harmless = isinstance(answer, Refusal) or answer == AckMessage(
        TERMS.session_id, 0
    )  # "nothing is acknowledged"
    return not harmless or visit.story.book is not book or len(visit.story.journal) != rows, answer


def percentile(counted, percent):
    """The smallest value that so many percent of the counted ones do not exceed."""
    left = counted.total() * percent / 100
    for value in sorted(counted):
        left -= counted[value]
        if left <= 0:
            return value
    raise AssertionError("nothing was counted")


def resident_bytes():
    """Memory of this process."""
    pages = Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.timeout(3_600)
def test_no_bad_message_is_taken_and_none_does_harm(visit, request, capsys):
    """Would catch a crash, an entry, a row on the disk, a leak, or a check that a stranger never reaches."""
    count = 1_000_000 if request.config.getoption("--long") else 4_000
    hostile, reasons, spent_us = Hostile(visit), Counter(), defaultdict(Counter)
    begin_bytes = 0
    for number in range(count):
        kind, data = hostile()
        before_ns = time.thread_time_ns()
        is_taken, answer = taken(visit, data, number)
        spent_us[kind][(time.thread_time_ns() - before_ns) // 1000] += 1
        assert not is_taken, (kind, data, answer)
        reasons[getattr(answer, "reason", "acknowledged 0 Wh")] += 1
        if number == count // 10:
            begin_bytes = resident_bytes()
    grown_bytes = resident_bytes() - begin_bytes
    with capsys.disabled():
        sys.stdout.write(f"\n  {count} bad messages, none taken; memory {grown_bytes / 2**20:+.1f} MiB\n")
        for kind, times in sorted(spent_us.items()):
            mean, p99 = sum(us * n for us, n in times.items()) / times.total(), percentile(times, 99)
            sys.stdout.write(
                f"  {kind:20} {times.total():8}  mean {mean:6.1f} us, p99 {p99:5} us of this core\n"
            )
        sys.stdout.write(f"  {dict(reasons.most_common())}\n")
    assert (reasons["bad_signature"] + reasons["wrong_signer"]) / count > DEEP_SHARE_MIN
    assert {
        "malformed",
        "stale_hello",
        "wrong_token",
        "unknown_session",
        "over_order",
        "ahead_of_meter",
    } <= set(reasons)
    assert grown_bytes < RSS_GROWTH_MAX
    assert len(visit.door._sources) <= door.SOURCES_MAX
    assert visit.says(visit.receipt(10)) == AckMessage(TERMS.session_id, 10), (
        "its own consumer is still welcome"
    )


@pytest.mark.parametrize("predicate", ["presentation_key", "receipt_signer"])
def test_the_flood_would_find_an_open_door(visit, monkeypatch, predicate):
    """Would catch a flood that breaks against nothing: a door that believes every signature lets it in."""
    believed = {
        "presentation_key": lambda *_: CONSUMER.public_key,
        "receipt_signer": lambda *_, **__: SESSION_KEY.address,
    }
    monkeypatch.setattr(rules, predicate, believed[predicate])
    hostile = Hostile(visit)
    assert any(taken(visit, hostile()[1], number)[0] for number in range(1_000))
