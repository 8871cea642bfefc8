"""What the evening shows: exact money, one line a stage, and nothing that only a terminal understands elsewhere."""

import io

from hypothesis import given
from hypothesis import strategies as st

from agent.demo.screen import WEI_PER_COIN, Glance, Moment, MoneyRow, Screen, coins


@given(st.integers(min_value=-(10**30), max_value=10**30))
def test_coins_are_exact_to_the_wei(wei: int) -> None:
    """Would catch money that goes through a float on its way to the screen."""
    whole, fraction = coins(wei).split(".")
    sign = -1 if whole.startswith("-") else 1
    assert len(fraction) == 18
    assert sign * (abs(int(whole)) * WEI_PER_COIN + int(fraction)) == wei


def test_without_a_terminal_every_stage_is_one_plain_line() -> None:
    """Would catch control codes in a log file, and a line for every quarter second."""
    out = io.StringIO()
    screen = Screen(out)
    for stage in ("MATCHED", "DELIVERING", "DELIVERING", "SETTLED"):
        screen.watch(Glance(stage, "", 22_080, 200, 60, 57, 3_200))
    screen.rest()
    assert "\x1b" not in out.getvalue()
    assert [line.split()[2] for line in out.getvalue().splitlines()] == ["MATCHED", "DELIVERING", "SETTLED"]
    assert "22.1 kW" in out.getvalue()
    assert "60 of 200 Wh, 57 acknowledged" in out.getvalue()


def test_the_money_table_adds_up() -> None:
    """Would catch a total that is not the sum of what stands above it."""
    out = io.StringIO()
    Screen(out).money([MoneyRow("carol", -5, -2, -9, 2), MoneyRow("bob", 5, -1, -6, 10)])
    total = out.getvalue().splitlines()[-1].split()
    assert total[:2] == ["all", "together"]
    assert total[2:] == [coins(0), coins(-3), coins(-15), coins(12)]


def test_the_timeline_is_in_order_and_keeps_whole_hashes() -> None:
    """Would catch a transaction hash that is cut, so that nobody can look it up."""
    out = io.StringIO()
    hashes = ["0x" + letter * 64 for letter in "ab"]
    moments = [
        Moment(9.0, "bob", "endConnection", hashes[1], 52_000),
        Moment(1.0, "carol", "connect", hashes[0]),
    ]
    Screen(out).timeline(moments)
    text = "".join(out.getvalue().split())
    assert text.index("connect") < text.index("endConnection")
    assert all(one in text for one in hashes)
