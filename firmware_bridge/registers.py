"""Words to values and back: what sixteen-bit registers mean. Pure.

Rules
* A float never leaves this file: f32 and f64 become exact fractions at once, and whole numbers of a unit
  right after.
* Rounding is named by the caller: `floor` for energy (what is not fully counted is not there yet), `nearest`
  for the rest.
* What a device says instead of a value (NaN, infinity, a sentinel) is `None`, never a number.

May not know: addresses, devices, wires.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

# t5 and t6 are Iskra's: a signed byte of decimal exponent, then 24 bits of value (t5 unsigned, t6 signed).
WordType = Literal["u16", "i16", "u32", "i32", "u64", "i64", "f32", "f64", "t5", "t6", "ascii"]
WordOrder = Literal[
    "big", "little"
]  # big = most significant word first; bytes inside a word are always big-endian
Rounding = Literal["floor", "nearest"]

# Words per value; an ascii value is as long as its map says.
WORD_COUNT: dict[str, int] = {
    "u16": 1,
    "i16": 1,
    "u32": 2,
    "i32": 2,
    "u64": 4,
    "i64": 4,
    "f32": 2,
    "f64": 4,
    "t5": 2,
    "t6": 2,
    "ascii": 0,
}
_FLOAT_FORMAT = {"f32": ">f", "f64": ">d"}
_FLOAT_BITS = {"f32": 24, "f64": 53}  # of the significand
_DECIMAL = ("t5", "t6")
_DECIMAL_FINEST = -6  # the finest exponent worth showing: a millionth of the unit


class EncodeError(ValueError):
    """The value does not fit the register; nothing was written."""


def _to_bytes(words: Sequence[int], order: WordOrder) -> bytes:
    ordered = words if order == "big" else tuple(reversed(words))
    return b"".join(word.to_bytes(2, "big") for word in ordered)


def _to_words(data: bytes, order: WordOrder) -> tuple[int, ...]:
    words = tuple(int.from_bytes(data[i : i + 2], "big") for i in range(0, len(data), 2))
    return words if order == "big" else tuple(reversed(words))


def decode(words: Sequence[int], kind: WordType, order: WordOrder = "big") -> int | Fraction | str | None:
    """The raw value of `words`: an int, an exact fraction (floats), text, or None where a float is NaN or
    infinite.

    `words` are 16-bit unsigned, in the order they came; their number must be `WORD_COUNT[kind]` (any for
    ascii).
    """
    if kind == "ascii":
        text = _to_bytes(words, "big").decode("ascii", errors="replace")
        return text.replace("\0", " ").strip()
    if len(words) != WORD_COUNT[kind]:
        raise ValueError(f"{kind} is {WORD_COUNT[kind]} words long, got {len(words)}")
    data = _to_bytes(words, order)
    if kind in _FLOAT_FORMAT:
        number: float = struct.unpack(_FLOAT_FORMAT[kind], data)[0]
        return Fraction(number) if math.isfinite(number) else None
    if kind in _DECIMAL:
        exponent = int.from_bytes(data[:1], "big", signed=True)
        return int.from_bytes(data[1:], "big", signed=kind == "t6") * Fraction(10) ** exponent
    return int.from_bytes(data, "big", signed=kind.startswith("i"))


def encode(
    value: int | Fraction | str, kind: WordType, order: WordOrder = "big", word_count: int = 0
) -> tuple[int, ...]:
    """The words a device would show for `value`; the inverse of `decode`. Raises EncodeError when it does not
    fit.

    `word_count` is needed for ascii only: the text is padded with NUL to that length.
    """
    if isinstance(value, str) or kind == "ascii":
        data = str(value).encode("ascii", errors="replace")
        if len(data) > 2 * word_count:
            raise EncodeError(f"{value!r} is longer than {word_count} words")
        return _to_words(data.ljust(2 * word_count, b"\0"), "big")
    if kind in _FLOAT_FORMAT:
        try:
            return _to_words(struct.pack(_FLOAT_FORMAT[kind], float(value)), order)
        except OverflowError as exc:
            raise EncodeError(f"{value} does not fit {kind}") from exc
    if kind in _DECIMAL:
        return _to_words(_encode_decimal(Fraction(value), signed=kind == "t6"), order)
    whole = math.floor(value)
    try:
        data = whole.to_bytes(2 * WORD_COUNT[kind], "big", signed=kind.startswith("i"))
    except OverflowError as exc:
        raise EncodeError(f"{whole} does not fit {kind}") from exc
    return _to_words(data, order)


def _encode_decimal(value: Fraction, *, signed: bool) -> bytes:
    """Exponent byte and 24 bits, as fine as they can hold it."""
    for exponent in range(_DECIMAL_FINEST, 128):
        whole = math.trunc(value / Fraction(10) ** exponent)
        try:
            return exponent.to_bytes(1, "big", signed=True) + whole.to_bytes(3, "big", signed=signed)
        except OverflowError:
            if whole < 0 and not signed:
                break
    raise EncodeError(f"{value} does not fit {'t6' if signed else 't5'}")


def float_grain(raw: Fraction, kind: WordType) -> Fraction:
    """The distance to the next value that a float of this size can hold; 0 for every other type."""
    if kind not in _FLOAT_BITS or raw == 0:
        return Fraction(0)
    return Fraction(2) ** (math.frexp(float(raw))[1] - _FLOAT_BITS[kind])


def to_unit(raw: int | Fraction, step: Fraction, rounding: Rounding) -> int:
    """`raw` register steps as a whole number of the target unit; `step` is the unit's worth of one raw step
    (exact).
    """
    exact = raw * step
    return math.floor(exact) if rounding == "floor" else math.floor(exact + Fraction(1, 2))


def from_unit(value: int, step: Fraction, kind: WordType) -> int | Fraction:
    """The raw value to write for `value`: towards zero for integer registers, so that no command asks for
    more than told.
    """
    exact = Fraction(value) / step
    return exact if kind in _FLOAT_FORMAT or kind in _DECIMAL else math.trunc(exact)


def pattern(number: int, word_count: int, order: WordOrder = "big") -> tuple[int, ...]:
    """The words that, read as one unsigned number, are `number`; the inverse of `is_sentinel`."""
    return _to_words(number.to_bytes(2 * word_count, "big"), order)


def is_sentinel(words: Sequence[int], sentinels: Sequence[int], order: WordOrder = "big") -> bool:
    """True when the words, read as one unsigned number, are one of the device's "no value" patterns."""
    return int.from_bytes(_to_bytes(words, order), "big") in sentinels
