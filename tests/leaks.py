"""Looks for secrets where they must not be, in every shape in which programs write bytes down.

    found = sightings({"operator key": key32}, {"agent.log": text, "journal.sqlite": content})
    assert not found, found

A secret is looked for whole and by its halves (of what is cut at a page's end, or shortened badly, a half is left), raw and
reversed, in hex of both cases, in both base64 alphabets at every alignment, in decimal, as lists of numbers, and as Python
shows bytes. What a machine counts in hex is 16 digits long at least, so chance does not cry wolf.
"""

import base64
from collections.abc import Iterator, Mapping

HALF_MIN = 8  # a shorter half would be found by chance, or be the head of a shortened address


def sightings(secrets: Mapping[str, bytes], places: Mapping[str, bytes]) -> list[str]:
    """Every secret that stands somewhere: "operator key, as hex, in agent.log"; once for each shape."""
    folded = {place: content.lower() for place, content in places.items()}
    return [
        f"{name}, as {shape}, in {place}"
        for name, value in secrets.items()
        for shape, needle, any_case in shapes(value)
        for place, content in places.items()
        if needle in (folded[place] if any_case else content)
    ]


def shapes(value: bytes) -> Iterator[tuple[str, bytes, bool]]:
    """(what it is called, the bytes to look for, whether in any case) for each way to write `value` down."""
    assert len(value) >= HALF_MIN, "too short to be told from chance"
    middle = len(value) // 2
    parts = {"": value}
    if middle >= HALF_MIN:
        parts |= {" of the first half": value[:middle], " of the second half": value[middle:]}
    for which, part in parts.items():
        yield f"raw bytes{which}", part, False
        yield f"reversed bytes{which}", part[::-1], False
        yield f"hex{which}", part.hex().encode(), True
        yield f"hex of reversed bytes{which}", part[::-1].hex().encode(), True
        yield f"reversed hex{which}", part.hex()[::-1].encode(), True
    for number in (int.from_bytes(value, "big"), int.from_bytes(value, "little")):
        yield "decimal", str(number).encode(), False
    for comma in (", ", ","):
        yield "a list of numbers", comma.join(str(byte) for byte in value).encode(), False
    yield "Python's bytes", repr(value)[2:-1].encode(), False
    for shift in range(3):
        yield "base64", _inside(base64.b64encode(bytes(shift) + value), shift), False
        yield "base64 for addresses", _inside(base64.urlsafe_b64encode(bytes(shift) + value), shift), False


def _inside(encoded: bytes, shift: int) -> bytes:
    """What stands there whatever comes before and after: without the digits that neighbours share."""
    return encoded.rstrip(b"=")[-(-shift * 8 // 6) : -1]
