"""`v2v demo`, as a newcomer types it: one whole evening for a program, and a shorter one for a person.

The figures are counted again here, from what the two evenings printed.
"""

import json
import re
import sys
from decimal import Decimal
from itertools import pairwise

import pytest
from stage import RATE_WEI_PER_KWH, Program, note

ORDER_WH, SHORT_WH = 200, 30
SECONDS_MAX = 75  # on an idle machine it is under 60; a test machine has other things to do

pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def evenings(tmp_path_factory):
    """Two evenings with different seeds, one after the other: (with --json, without and smaller)."""
    folder = tmp_path_factory.mktemp("evenings")
    demo = (sys.executable, "-m", "agent", "demo")
    with Program([*demo, "--json", "--seed", 11], folder, "json", split=True) as for_a_program:
        for_a_program.ended(150)
    with Program([*demo, "--seed", 12, "--energy-wh", SHORT_WH], folder, "text", split=True) as for_a_person:
        for_a_person.ended(90)
    return for_a_program, for_a_person


def summary_of(evening):
    """The object on standard output, which holds nothing else."""
    (line,) = evening.said.splitlines()
    return json.loads(line)


def test_it_ends_well(evenings):
    """Would catch an evening that fails, and one that fails and says it did not."""
    for evening in evenings:
        assert evening.process.returncode == 0, evening.complained
        assert "Traceback" not in evening.said + evening.complained


def test_every_book_says_the_same_energy(evenings):
    """Would catch a Wh that is lost between order, meter, receipts, chain and the plant's own truth."""
    summary = summary_of(evenings[0])
    note(f"the evening: {summary['seconds']} s, {summary['true_mwh']} mWh in truth")
    assert summary["energy_wh_ordered"] == ORDER_WH
    assert summary["energy_wh_delivered"] == ORDER_WH
    assert summary["energy_wh_settled"] == ORDER_WH
    assert ORDER_WH * 1000 <= summary["true_mwh"] < (ORDER_WH + 1) * 1000
    assert (summary["stage"], summary["stop_reason"]) == ("SETTLED", "EnergyLimitReached")


def test_the_money_follows_the_rate(evenings):
    """Would catch a cost that is not rate x energy, and a wei that somebody else got."""
    summary = summary_of(evenings[0])
    rate_wei_per_kwh = RATE_WEI_PER_KWH * 80 // 100  # the second bid wins
    cost_wei = rate_wei_per_kwh * ORDER_WH // 1000
    assert summary["cost_wei"] == cost_wei
    assert summary["provider_gain_wei"] == cost_wei
    assert summary["consumer_cost_wei"] == cost_wei
    assert re.fullmatch("0x[0-9a-f]{64}", summary["settlement_tx"])


def test_it_does_not_take_the_whole_evening(evenings):
    """Would catch a wait that crept in: a person who tries this for the first time watches."""
    assert summary_of(evenings[0])["seconds"] <= SECONDS_MAX


def narrative(evening):
    """What a person sees: on standard output, or on standard error when --json keeps that for itself."""
    return evening.complained if evening.said.startswith("{") else evening.said


@pytest.mark.parametrize("which", [0, 1], ids=["json", "text"])
def test_the_story_names_every_transaction(evenings, which):
    """Would catch a timeline with a step missing, out of order, or with a hash that nobody can look up."""
    story = narrative(evenings[which])
    rows = re.findall(r"^ *([0-9.]+)  (\w+) +(\S.*?) +(\d+)  (0x[0-9a-f]{64})$", story, re.MULTILINE)
    steps = [what for _, _, what, _, _ in rows]
    assert steps[0] == "deploy"
    assert [step for step in steps if not step.startswith(("addEV", "setOperator", "placeBid"))] == [
        "deploy",
        "startAuction",
        "connect",
        "endConnection",
    ]
    assert sum(step.startswith("placeBid") for step in steps) == 2
    assert len({tx_hash for *_, tx_hash in rows}) == len(rows)
    assert all(float(one[0]) <= float(other[0]) for one, other in pairwise(rows))


@pytest.mark.parametrize("which", [0, 1], ids=["json", "text"])
def test_the_money_table_adds_up(evenings, which):
    """Would catch energy money that comes from nowhere, and a party whose purse does not match its row."""
    amount = r" +(-?\d+\.\d{18})"
    found = re.findall(
        rf"^(carol|alice|bob|all together){amount * 4}$", narrative(evenings[which]), re.MULTILINE
    )
    table = {name: [Decimal(number) for number in numbers] for name, *numbers in found}
    assert set(table) == {"carol", "alice", "bob", "all together"}
    for energy, gas, wallet, ledger in table.values():
        assert energy + gas == wallet + ledger
    *parties, everybody = (table[name] for name in ("carol", "alice", "bob", "all together"))
    assert [sum(column) for column in zip(*parties, strict=True)] == everybody
    assert everybody[0] == 0
    assert table["carol"][0] == -table["bob"][0] < 0
    assert table["alice"][0] == 0


def test_a_person_sees_it_happen(evenings):
    """Would catch an evening that is silent until its end."""
    story = narrative(evenings[1])
    for words in ("deploys the market", "asking for 30 Wh", "wins at", "DELIVERING", "acknowledged", "paid"):
        assert words in story
