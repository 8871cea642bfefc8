"""Words to values and back."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_bridge import registers
from firmware_bridge.registers import WORD_COUNT

INTEGERS = ["u16", "i16", "u32", "i32", "u64", "i64"]


@given(kind=st.sampled_from(INTEGERS), order=st.sampled_from(["big", "little"]), data=st.data())
def test_every_integer_pattern_survives_the_round_trip(kind, order, data):
    """Would catch a swapped word, a lost sign or a wrong length, for every pattern of bits."""
    word = st.integers(0, 0xFFFF)
    words = tuple(data.draw(st.lists(word, min_size=WORD_COUNT[kind], max_size=WORD_COUNT[kind])))
    value = registers.decode(words, kind, order)
    assert registers.encode(value, kind, order) == words


@given(
    value=st.floats(allow_nan=False, allow_infinity=False, width=32), order=st.sampled_from(["big", "little"])
)
def test_a_float_is_decoded_exactly(value, order):
    """Would catch any rounding between the wire and our integers: the fraction equals the float bit for bit."""
    words = registers.encode(Fraction(value), "f32", order)
    assert registers.decode(words, "f32", order) == Fraction(value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("kind", "form"), [("f32", ">f"), ("f64", ">d")])
def test_what_is_no_number_is_none(value, kind, form):
    """Would catch a NaN that becomes an energy."""
    data = struct.pack(form, value)
    words = [int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2)]
    assert registers.decode(words, kind) is None


def test_word_order_is_the_order_of_words_not_of_bytes():
    """Would catch the classic: 0x0001_0000 read as 1, or bytes swapped inside a word."""
    assert registers.decode([0x0001, 0x0002], "u32", "big") == 0x0001_0002
    assert registers.decode([0x0001, 0x0002], "u32", "little") == 0x0002_0001


@given(raw=st.integers(-(2**40), 2**40), numerator=st.integers(1, 10**6), denominator=st.integers(1, 1000))
def test_energy_is_never_rounded_up(raw, numerator, denominator):
    """Would catch a counter that shows a mWh before it was delivered."""
    step = Fraction(numerator, denominator)
    whole = registers.to_unit(raw, step, "floor")
    assert whole <= raw * step < whole + 1


@given(
    value=st.integers(0, 10**7),
    step=st.sampled_from([Fraction(1), Fraction(100), Fraction(1000), Fraction(1, 10)]),
)
def test_a_command_never_asks_for_more_than_it_was_told(value, step):
    """Would catch 15.96 A becoming 16 A on a device that takes whole amperes."""
    assert registers.from_unit(value, step, "u16") * step <= value


@pytest.mark.parametrize(("value", "kind"), [(65536, "u16"), (-1, "u16"), (2**31, "i32"), (10**40, "f32")])
def test_what_does_not_fit_is_refused(value, kind):
    """Would catch a set point that wraps around."""
    with pytest.raises(registers.EncodeError):
        registers.encode(value, kind)


def test_text_is_padded_stripped_and_bounded():
    """Would catch a serial number with NULs in it, and text that runs into the next register."""
    words = registers.encode("AB1", "ascii", word_count=4)
    assert len(words) == 4
    assert registers.decode(words, "ascii") == "AB1"
    with pytest.raises(registers.EncodeError):
        registers.encode("too long", "ascii", word_count=2)


@given(
    kind=st.sampled_from(["t5", "t6"]),
    order=st.sampled_from(["big", "little"]),
    exponent=st.integers(-6, 20),
    data=st.data(),
)
def test_a_number_with_its_own_exponent_survives_the_round_trip(kind, order, exponent, data):
    """Would catch 24 bits read as 23, a sign taken from the exponent, and an exponent of the wrong sign."""
    significand = data.draw(st.integers(0, 2**24 - 1) if kind == "t5" else st.integers(-(2**23), 2**23 - 1))
    value = significand * Fraction(10) ** exponent
    words = registers.encode(value, kind, order)
    shown = registers.decode(words, kind, order)
    assert abs(shown - value) * 10**6 <= max(abs(value), 1)
    if exponent == 0:
        assert shown == value


def test_t5_and_t6_are_as_their_maker_says():
    """Would catch a round trip that is wrong the same way twice: 230.5 V and -1234 W as a meter sends them."""
    assert registers.decode([0xFF00, 2305], "t5") == Fraction(2305, 10)
    assert registers.decode([0x00FF, 0x10000 - 1234], "t6") == -1234
    with pytest.raises(registers.EncodeError, match="t5"):
        registers.encode(-1, "t5")


@given(value=st.floats(min_value=2**-10, max_value=2**30, width=32))
def test_the_grain_of_a_float_is_the_distance_to_the_next(value):
    """Would catch a counter trusted to a Wh that its float no longer carries."""
    grain = registers.float_grain(Fraction(value), "f32")
    bits = struct.unpack(">I", struct.pack(">f", value))[0]
    following = struct.unpack(">f", struct.pack(">I", bits + 1))[0]
    assert grain == Fraction(following) - Fraction(value)
    assert registers.float_grain(Fraction(value), "f64") == Fraction(math.ulp(value))


@given(number=st.integers(0, 2**64 - 1), order=st.sampled_from(["big", "little"]))
def test_a_pattern_is_found_again_as_a_sentinel(number, order):
    """Would catch a sentinel that the simulator shows and the driver takes for a value."""
    words = registers.pattern(number, 4, order)
    assert registers.is_sentinel(words, (number,), order)
    assert not registers.is_sentinel(words, (number ^ 1,), order)
