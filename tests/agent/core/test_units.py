"""Conversions: exact integers, and the contract's rounding."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from agent.core import units

RATES = st.integers(min_value=1, max_value=units.UINT128_MAX)
WATT_HOURS = st.integers(min_value=0, max_value=units.UINT64_MAX)


@given(RATES, WATT_HOURS)
def test_paying_rounds_down_and_locking_rounds_up(rate, energy_wh):
    """One wei the wrong way round and the contract's books do not close."""
    exact = Fraction(rate * energy_wh, 1000)
    paid, locked = units.cost_wei_floor(rate, energy_wh), units.cost_wei_ceil(rate, energy_wh)
    assert paid <= exact <= locked
    assert locked - paid in (0, 1)
    assert (locked == paid) == (exact.denominator == 1)


@given(st.integers(min_value=0, max_value=2**63))
def test_an_unfinished_wh_is_never_billed(energy_mwh):
    """The rest of a Wh stays the provider's risk."""
    whole = units.energy_wh_floor(energy_mwh)
    assert 0 <= energy_mwh - units.energy_mwh(whole) < 1000


@given(st.integers(min_value=0, max_value=10**6), st.integers(min_value=0, max_value=10**8))
def test_energy_after_is_an_upper_bound(power_w, duration_ms):
    """It bounds what may have flowed: rounding down would call true energy implausible."""
    exact = Fraction(power_w * duration_ms, 3600)
    assert exact <= units.energy_mwh_after(power_w, duration_ms) < exact + 1


def test_an_identity_in_a_log_is_shortened_and_a_short_one_is_whole():
    """Addresses in full do not belong into logs."""
    assert units.short(bytes(range(20))) == "0x0001..1213"
    assert units.short(b"\x01\x02") == "0x0102"
    assert units.hex0x(b"\xab") == "0xab"
