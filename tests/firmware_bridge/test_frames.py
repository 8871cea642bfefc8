"""Frames against bytes from the specification and against every bent bit."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pymodbus.framer import FramerRTU

from firmware_bridge import frames
from firmware_bridge.charger import BridgeError
from firmware_bridge.frames import Asked

READ = Asked(3, 1, 107, 3)
READ_REPLY = bytes.fromhex("010306022b00000064")  # the specification's own example, device 1


def with_crc(body: bytes) -> bytes:
    """As a device ends a frame."""
    return body + FramerRTU.compute_CRC(body).to_bytes(2, "big")


def outcome(frame: bytes, asked: Asked) -> tuple[int, ...] | str:
    """What is believed, or why not."""
    try:
        return frames.open_rtu(frame, asked)
    except BridgeError as exc:
        return exc.name


def test_the_examples_of_the_specification():
    """Would catch a question or an answer laid out otherwise than the protocol says."""
    assert frames.question(READ) == bytes.fromhex("0103006b0003")
    assert frames.check_reply(READ_REPLY, READ) == (0x022B, 0, 0x64)
    assert frames.question(Asked(16, 1, 1, 2, (10, 0x0102))) == bytes.fromhex("01100001000204000a0102")
    assert frames.question(Asked(5, 1, 172, 1, (1,))) == bytes.fromhex("010500acff00")
    assert frames.question(Asked(6, 1, 1, 1, (3,))) == bytes.fromhex("010600010003")
    coils = bytes.fromhex("010103cd6b05")
    assert frames.check_reply(coils, Asked(1, 1, 19, 19)) == tuple(int(bit) for bit in "1011001111010110101")


def test_the_checksum_is_the_known_one():
    """Would catch a library whose CRC has another polynomial, start or byte order: 01 03 00 00 00 0A ends in C5 CD everywhere."""
    assert frames.rtu_frame(Asked(3, 1, 0, 10)) == bytes.fromhex("01030000000ac5cd")


def test_the_library_is_believed_only_when_it_says_every_byte():
    """Would catch what pymodbus does by itself: hunting for a frame in garbage, rounding a coil, dropping an odd byte."""
    good = with_crc(READ_REPLY)
    assert outcome(good, READ) == (0x022B, 0, 0x64)
    assert outcome(b"\x00" + good, READ) == "wrong_reply"
    assert outcome(good + b"\x00", READ) == "wrong_reply"
    assert outcome(with_crc(bytes.fromhex("01050010ff01")), Asked(5, 1, 16, 1, (1,))) == "wrong_reply"
    assert outcome(with_crc(bytes.fromhex("010305022b000000")), Asked(3, 1, 107, 2)) == "wrong_reply"
    tcp = bytes.fromhex("000700000009") + READ_REPLY
    assert frames.open_tcp(tcp, READ, 7) == (0x022B, 0, 0x64)
    with pytest.raises(BridgeError, match="wrong_reply"):
        frames.open_tcp(tcp + b"\x00", READ, 7)


@pytest.mark.parametrize("asked", [READ, Asked(6, 1, 1, 1, (3,)), Asked(16, 1, 1, 2, (10, 20))])
def test_no_bent_bit_is_believed_on_a_line_with_checksums(asked):
    """Would catch a checksum that is not looked at, or not over all bytes: every single and double flip is refused."""
    body = READ_REPLY if asked is READ else frames.question(asked)[:6]
    good = with_crc(body)
    assert not isinstance(outcome(good, asked), str)
    for at in range(8 * len(good)):
        bent = bytearray(good)
        bent[at // 8] ^= 1 << at % 8
        assert outcome(bytes(bent), asked) == "wrong_reply", at
        bent[(at // 8 + 1) % len(good)] ^= 0x10
        assert outcome(bytes(bent), asked) == "wrong_reply", at


@pytest.mark.parametrize("fc", [1, 2, 3, 4, 5, 6, 16])
def test_an_exception_is_the_devices_own_word_only_if_it_fits_the_question(fc):
    """Would catch another function's or another device's refusal, or a longer frame, taken for this one's."""
    asked = Asked(fc, 7, 10, 1, (1,) if fc > 4 else ())
    for code in range(256):
        with pytest.raises(BridgeError) as caught:
            frames.check_reply(bytes((7, fc | 0x80, code)), asked)
        assert caught.value.name == f"exception_{code}"
    for foreign in (bytes((8, fc | 0x80, 2)), bytes((7, fc ^ 1 | 0x80, 2)), bytes((7, fc | 0x80, 2, 0))):
        with pytest.raises(BridgeError) as caught:
            frames.check_reply(foreign, asked)
        assert caught.value.name == "wrong_reply"


@pytest.mark.parametrize(
    "asked", [Asked(3, 1, 0, 126), Asked(16, 1, 0, 0), Asked(3, 1, 65536, 1), Asked(23, 1, 0, 1)]
)
def test_a_question_no_device_can_be_asked_is_our_mistake(asked):
    """Would catch a request that is cut to fit or sent as nonsense."""
    with pytest.raises(AssertionError):
        frames.question(asked)


@given(noise=st.binary(max_size=300), fc=st.sampled_from([1, 2, 3, 4, 5, 6, 16]))
def test_noise_never_raises_anything_but_a_named_error(noise, fc):
    """Would catch an IndexError from a short or senseless frame, which would end the bus's owner."""
    asked = Asked(fc, 1, 10, 2, (1, 2) if fc == 16 else (1,) if fc > 4 else ())
    with suppress(BridgeError):
        size = frames.tcp_size(noise)
        if size and len(noise) >= size:
            frames.open_tcp(noise[:size], asked, 7)
    with suppress(BridgeError):
        size = frames.rtu_size(noise, asked)
        if size and len(noise) >= size:
            frames.open_rtu(noise[:size], asked)
