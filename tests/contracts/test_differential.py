"""The contract beside an independent model, whole state compared after every step of random walks."""

import sys

import pytest
from market import Market
from market_walk import PARAMETERS, Walk, shares

SUCCESS_SHARE_MIN = 0.2  # an action that hardly ever succeeds tests nothing but its refusals


@pytest.mark.timeout(1800)
def test_walks_never_part(request, capsys):
    """Would catch any rule, amount, refusal or window in which contract and protocol differ, and money left behind."""
    seeds, steps = (60, 400) if request.config.getoption("--long") else (8, 120)
    market = Market(PARAMETERS)
    place = market.snapshot()
    walks = []
    for seed in range(seeds):
        market.restore(place)
        walk = Walk(market, 1000 + seed)
        walk.walk(steps)
        walk.everybody_leaves()
        walks.append(walk)
    found = shares(walks)
    with capsys.disabled():
        for name, (accepted, tried) in found.items():
            sys.stdout.write(f"\n  {name:26} {accepted:5} of {tried:5} = {accepted / tried:4.0%}")
    assert min(a / t for a, t in found.values()) >= SUCCESS_SHARE_MIN
    assert sum(len(walk.model.paid) for walk in walks) >= seeds, "walks must reach settlements"
