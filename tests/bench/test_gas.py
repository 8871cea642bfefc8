"""The gas page is what the bytecode costs today: the contract's gas snapshot."""

import pytest

from bench import gas


@pytest.fixture(scope="module")
def page():
    """Measured now."""
    return gas.page()


@pytest.mark.timeout(240)
def test_the_page_is_current(page):
    """Would catch one gas more (or less) in any call, cold or warm, under either rule set, that nobody wrote down."""
    assert gas.PAGE.read_text() == page, "gas changed: look at the difference, then run `python -m bench.gas`"


@pytest.mark.timeout(240)
def test_goals():
    """Would catch a change that costs a goal: only endConnection under the paper's own rules may miss its row."""
    rows = gas.rows(1)
    assert [row.metric for row in rows if not row.met] == ["endConnection (Istanbul)"]
    assert all(row.floor < row.ours for row in rows if row.floor is not None), "nobody is below the floor"
    trade = next(row for row in rows if row.metric == "one trade, receipt (today)")
    assert trade.ours <= gas.TRADE_GOAL


def test_floor_arithmetic():
    """Would catch a floor that forgets the transaction, a log or the refund: EIP-2028, EIP-2929 and EIP-3529 by hand."""
    facts = gas.Facts(reads=1, clears=1, logs=((1, 1),))
    gross = 21_000 + 4 + 16 + 2_100 + 2_900 + 375 + 375 + 256
    assert facts.floor(gas.TODAY, b"\0\x01") == gross - 4_800
    assert (
        facts.floor(gas.ISTANBUL, b"") == (21_000 + 800 + 5_000 + 1_006) - (21_000 + 800 + 5_000 + 1_006) // 2
    )
