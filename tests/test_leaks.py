"""The scanner of the privacy test finds what is planted, and nothing else."""

import base64
import os

import pytest
from leaks import sightings

KEY = bytes.fromhex("ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80")
NOISE = b"\x00\xffa line of a log 0x1234..abcd\n" + KEY[:4].hex().encode()
PLANTED = {
    "raw": KEY,
    "reversed": KEY[::-1],
    "hex": KEY.hex().encode(),
    "hex with 0x": b"0x" + KEY.hex().encode(),
    "capital hex": KEY.hex().upper().encode(),
    "mixed hex": KEY.hex().title().encode(),
    "hex of reversed bytes": KEY[::-1].hex().encode(),
    "reversed hex": KEY.hex()[::-1].encode(),
    "decimal": str(int.from_bytes(KEY, "big")).encode(),
    "little-endian decimal": str(int.from_bytes(KEY, "little")).encode(),
    "base64": base64.b64encode(KEY),
    "base64 inside more": base64.b64encode(b"k" + KEY + b"more"),
    "base64 inside more still": base64.b64encode(b"ke" + KEY + b"more"),
    "base64 for addresses": base64.urlsafe_b64encode(KEY),
    "a list": str(list(KEY)).encode(),
    "a list in JSON": str(list(KEY)).replace(" ", "").encode(),
    "repr": repr(KEY).encode(),
    "first half": KEY[:16].hex().encode(),
    "second half, raw": KEY[16:],
}


@pytest.mark.parametrize("shape", PLANTED)
def test_a_planted_secret_is_seen(shape):
    """Would catch a privacy test that is green because it cannot see."""
    found = sightings({"the key": KEY}, {"clean": NOISE, "dirty": NOISE + PLANTED[shape] + NOISE})
    assert found
    assert all(" in dirty" in line and line.startswith("the key, as ") for line in found)


def test_what_is_not_there_is_not_seen():
    """Would catch a scanner that cries wolf, which nobody would heed."""
    other = os.urandom(100_000)
    places = {"noise": NOISE, "random": other, "hex": other.hex().encode(), "base64": base64.b64encode(other)}
    assert sightings({"key": KEY, "password": b"correct horse", "address": KEY[:20]}, places) == []


def test_too_short_a_secret_is_not_looked_for():
    """Would catch a secret so short that chance finds it, or that a wrong fixture left empty."""
    with pytest.raises(AssertionError):
        sightings({"nothing": b""}, {"noise": NOISE})
