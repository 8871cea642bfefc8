"""Words to quantities and back: steps, signs, pieces, masks, exponents, sentinels."""

from __future__ import annotations

import math
import struct
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firmware_bridge.point import UNITS, Exponent, NoValue, Point, amount
from firmware_bridge.registers import WORD_COUNT, EncodeError

INTEGERS = ["u16", "i16", "u32", "i32", "u64", "i64"]
ORDERS = st.sampled_from(["big", "little"])


def point(kind="u16", step="1", name="power_w", **changes) -> Point:
    """A point of one address, ten, whose raw step is worth `step`."""
    said = {
        "name": name,
        "addresses": (10,),
        "type": kind,
        "word_count": WORD_COUNT[kind],
        "word_order": "big",
        "read_fc": 3,
        "write_fc": None,
        "steps": (Fraction(step),),
    }
    return Point(**{**said, **changes})


@given(
    kind=st.sampled_from(INTEGERS),
    order=ORDERS,
    exponent=st.none() | st.integers(-10, 10),
    step=st.sampled_from(["1", "-1", "10", "0.1", "1000", "100000", "1/3"]),
    data=st.data(),
)
def test_what_the_simulator_shows_is_what_the_driver_reads(kind, order, exponent, step, data):
    """Would catch a sign, an order, a step or a power of ten that only one side knows, for every pattern of bits."""
    bits = 16 * WORD_COUNT[kind]
    signed = kind.startswith("i")
    raw = data.draw(st.integers(-(2 ** (bits - 1)) if signed else 0, 2 ** (bits - signed) - 1))
    worth = Fraction(10) ** (exponent or 0)
    one = point(kind, step, word_order=order, exponent=None if exponent is None else Exponent(9, exponent))
    wanted = math.trunc(raw * one.steps[0] * worth)
    places = dict(one.places(wanted))
    shown = one.value([places[10]], places[9][0] if exponent is not None else None)
    # A command goes towards zero, so it may lose less than one raw step; it never gains any.
    assert abs(wanted) - abs(one.steps[0] * worth) - 1 < abs(shown) <= abs(wanted) + Fraction(1, 2)
    if (one.steps[0] * worth).denominator == 1:
        assert shown == wanted


@given(value=st.integers(0, 2**50), order=ORDERS)
def test_a_number_kept_in_pieces_is_put_together_again(value, order):
    """Would catch the thousandths of an EM340 lost, or carried into the wrong piece."""
    value = value % (2**31 * 10**6) // 1000 * 1000
    clock = point(
        "i32",
        name="register_mwh",
        addresses=(10, 12),
        steps=(Fraction(10**6), Fraction(1000)),
        combine="sum",
        rounding="floor",
        word_order=order,
    )
    places = dict(clock.places(value))
    assert clock.value([places[10], places[12]]) == value
    assert clock.resolution(places[12]) == 1000


def test_half_a_counter_is_no_counter():
    """Would catch the kWh alone taken for the counter while the other register shows nothing; phases may be missing."""
    whole = {"addresses": (10, 12), "combine": "sum", "sentinels": (0x7FFFFFFF,)}
    pieces = point("i32", name="register_mwh", steps=(Fraction(10**6), Fraction(1000)), **whole)
    phases = point("i32", name="current_ma", **whole)
    lacking = [(0, 5), (0x7FFF, 0xFFFF)]
    assert pieces.value(lacking) is None
    assert phases.value(lacking) == 5


@given(value=st.integers(-(2**31), 2**31))
def test_two_directions_make_one_sign(value):
    """Would catch a meter with a register for each direction whose export counts as import."""
    both = point("u32", addresses=(10, 12), combine="difference")
    places = dict(both.places(value))
    assert both.value([places[10], places[12]]) == value


@given(raw=st.integers(0, 2**16 - 1))
def test_a_mask_hides_everything_else(raw):
    """Would catch a letter that is not found because its neighbour byte is not zero."""
    letter = point(
        mask=0x7F00, steps=(), values={value: str(value) for value in range(128)}, name="pilot_state"
    )
    assert letter.value([(raw,)]) == str(raw >> 8 & 0x7F)
    assert letter.words("65") == (0x4100,)


@pytest.mark.parametrize("word", [0x8000, 11, 0xFFF5, 300])
def test_an_exponent_that_cannot_be_is_no_value(word):
    """Would catch 230 V times ten to the eleventh, from a scale factor that is "not implemented"."""
    scaled = point("u32", name="register_mwh", exponent=Exponent(9, 0))
    assert scaled.value([(0, 5)], word) is None
    assert scaled.value([(0, 5)], 0xFFFF) == 1  # ten to minus one, to the nearest
    with pytest.raises(EncodeError, match="exponent"):
        scaled.words(5, word)


def float_words(value: float, kind: str) -> tuple[int, ...]:
    """As another library would put it."""
    data = struct.pack(">f" if kind == "f32" else ">d", value)
    return tuple(int.from_bytes(data[at : at + 2], "big") for at in range(0, len(data), 2))


@given(whole_wh=st.integers(0, 9_999_999))
def test_a_float_counter_says_the_wh_that_was_counted(whole_wh):
    """Would catch the Wh lost or given away because 1234.568 kWh is 1234567.993 Wh as a float, up to 10 MWh."""
    counter = point("f32", "1000000", "register_mwh", snap=1000)
    assert counter.value([float_words(whole_wh / 1000, "f32")]) in (whole_wh * 1000, (whole_wh + 1) * 1000)
    if whole_wh < 8_000_000:  # above, the float itself knows only every second half
        assert counter.value([float_words(whole_wh / 1000, "f32")]) == whole_wh * 1000


@given(milli_wh=st.integers(0, 10**9))
def test_what_is_not_fully_counted_is_not_there_yet(milli_wh):
    """Would catch half a Wh billed before it was delivered, on a float finer than the step."""
    counter = point("f64", "1000", "register_mwh", snap=1000)
    assert counter.value([float_words(milli_wh / 1000, "f64")]) == milli_wh // 1000 * 1000


def test_a_float_gets_coarser_as_it_counts():
    """Would catch a promise of 1 Wh from a meter that can only say every second one."""
    counter = point("f32", "1000000", "register_mwh", snap=1000)
    assert counter.resolution(float_words(1_000.0, "f32")) < 1000
    assert 1900 < counter.resolution(float_words(20_000.0, "f32")) < 2000
    assert point("u32", "10000", "register_mwh").resolution((0, 7)) == 10_000
    scaled = point("i32", "1000", "register_mwh", exponent=Exponent(9, 0))
    assert scaled.resolution((0, 7), 3) == 1_000_000


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("order", ["big", "little"])
def test_every_sentinel_is_no_value(kind, order):
    """Would catch 0xFFFFFFFF Wh billed as 4.3 GWh, in either order of words."""
    bits = 16 * WORD_COUNT[kind]
    one = point(kind, sentinels=(2**bits - 1, 2 ** (bits - 1), 1), word_order=order)
    for index in range(3):
        assert one.value([one.words(NoValue(index))]) is None
    with pytest.raises(EncodeError, match="sentinel number 3"):
        one.words(NoValue(3))
    assert point("f32").value([point("f32").words(NoValue())]) is None
    assert point("f64").value([point("f64").words(NoValue())]) is None


def test_places_move_with_their_connector_and_their_model():
    """Would catch an exponent or a mirror that stays behind when the value moves."""
    mirror = point(addresses=(30,), name="timeout_ms")
    one = point(exponent=Exponent(9, 0), mirror=mirror, model=704)
    moved = one.moved({3: 1000})
    assert (moved.addresses, moved.exponent, moved.mirror.addresses) == ((1010,), Exponent(1009, 0), (1030,))
    placed = one.placed({704: 40_002})
    assert (placed.addresses, placed.exponent.address, placed.mirror.addresses) == (
        (40_012,),
        40_011,
        (40_032,),
    )
    assert placed.placed({704: 40_002}) == placed
    assert one.spans() == {10: 1, 9: 1}


@pytest.mark.parametrize(
    ("text", "dimension", "worth"),
    [
        ("0.1 kWh", "energy", 100_000),
        ("1 Wh", "energy", 1000),
        ("-1 W", "power", -1),
        ("10 mA", "current", 10),
        ("0.01 %", "ratio", Fraction(1, 10)),
        ("1 Ws", "energy", Fraction(1000, 3600)),
    ],
)
def test_a_unit_is_exact(text, dimension, worth):
    """Would catch a multiplier applied in floating point."""
    assert amount(text, dimension) == worth


@pytest.mark.parametrize(
    ("text", "dimension", "told"),
    [
        ("0.1", "energy", "a number and a unit"),
        ("1 kW", "energy", "no unit of energy"),
        ("-1 Wh", "energy", "only power has a sign"),
        ("1e3 W", "power", "a number and a unit"),
    ],
)
def test_what_is_no_amount_is_explained(text, dimension, told):
    """Would catch a power written where an energy belongs, and a counter that runs backwards."""
    said = amount(text, dimension)
    assert isinstance(said, str)
    assert told in said
    assert set(UNITS) >= {dimension}
