"""docs/contract.md: its examples happen, its figures are right, its diagrams are drawn from the tested rows."""

import pytest
from market_examples import EXAMPLES, PAGE, page


@pytest.mark.timeout(240)
def test_the_page_is_what_happens():
    """Would catch an example that no longer runs, a figure that changed, or a diagram that differs from the rows."""
    assert PAGE.read_text() == page(), "run `python tests/market_examples.py` and look at the difference"


def test_every_promised_example_is_there():
    """Would catch an example that was dropped: the page is the contract's user manual."""
    told = {example.__name__ for example in EXAMPLES}
    assert told >= {
        "one_trade", "the_consumer_does_not_come", "the_provider_does_not_come", "partial_delivery",
        "the_consumer_ends_early", "dispute_by_receipt", "a_paused_market",
    }  # fmt: skip
