"""docs/chain.md: its names exist, its numbers are the code's, its costs are computed, its commands run.

python tests/test_chain_page.py     writes the table of costs anew
"""

import importlib
import os
import re
import shlex
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
from click.testing import CliRunner
from town import Town, v2v

from agent.chain import contract
from agent.cli import cli
from agent.core.token import Ack
from agent.core.units import hex0x
from agent.keys import ephemeral_signer

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/chain.md"
BEGIN, END = "<!-- costs: begin -->\n", "<!-- costs: end -->\n"

# ---- names


@cache
def existing_tests():
    """Every test of ours, in Python and in Solidity, by its name."""
    found = set()
    for file in (*ROOT.glob("tests/**/test_*.py"), *ROOT.glob("contracts/test/*.sol")):
        found |= set(re.findall(r"(?:def|function) (test\w+)\(", file.read_text()))
    return found


def parts(title):
    """The paragraphs, list items and table rows below a heading."""
    _, _, rest = PAGE.read_text().partition(f"\n## {title}\n")
    section = rest.partition("\n## ")[0]
    return [part.strip() for part in re.split(r"\n\n|\n(?=\| |\* )", section) if part.strip()]


def test_every_name_on_the_page_exists():
    """Would catch a sentence whose test was renamed or deleted, and with it perhaps the truth of the sentence."""
    page = PAGE.read_text()
    named = set(re.findall(r"`(test\w+)`", page))
    assert len(named) > 50
    assert not named - existing_tests()
    files = re.findall(r"`((?:agent|tests|docs|contracts)/[\w/.]+\.\w+)`", page)
    assert files
    assert not [file for file in files if not (ROOT / file).is_file()]


def test_every_race_names_the_test_that_runs_it():
    """Would catch a race that somebody added and nobody ran."""
    races = [part for part in parts("Races, and who wins") if part.startswith("**")]
    assert len(races) >= 16
    assert not [race for race in races if not re.search(r"`test\w+`", race)]
    lies = [part for part in parts("What a node can lie about") if part.startswith("| ")][1:]
    untested = [lie for lie in lies if not re.search(r"`test\w+`", lie)]
    assert len(untested) <= 3, (
        untested
    )  # what is only a consequence of the others, and what nobody can prevent


def test_the_names_of_code_beside_a_file_stand_in_it():
    """Would catch a class or function that has moved: "`ChainWatch` in `agent/runners/chain_watch.py`"."""
    pairs = re.findall(r"`(\w+)`\s+in\s+`(agent/[\w/]+\.py)`", PAGE.read_text())
    assert len(pairs) >= 3
    for name, file in pairs:
        assert re.search(rf"^(?:class|def|async def) {name}\b", (ROOT / file).read_text(), re.MULTILINE), name


def test_every_lie_is_called_as_the_log_calls_it():
    """Would catch a search in the log for a word that is never said, and a lie that the page does not know."""
    named = set(re.findall(r"`(chain\.[a-z_]+)`", PAGE.read_text()))
    code = "".join(file.read_text() for file in ROOT.glob("agent/**/*.py"))
    assert named <= set(re.findall(r'"(chain\.[a-z_]+)"', code))
    said = set(re.findall(r"`(chain\.[a-z_]+)`", (ROOT / "agent/chain/failover.py").read_text()))
    assert said - {"chain.failover"} <= named


NUMBERS = dict(re.findall(r"^\| `(agent\.[\w.]+)` \| (\d+) \|", PAGE.read_text(), re.MULTILINE))


@pytest.mark.parametrize("name", NUMBERS)
def test_the_numbers_are_the_codes(name):
    """Would catch a default or a limit that was changed, and a reader who tunes by the old one."""
    words = name.split(".")
    split = next(place for place, word in enumerate(words) if word[0].isupper())
    found = importlib.import_module(".".join(words[:split]))
    for word in words[split:]:
        fields = getattr(found, "model_fields", None) or getattr(found, "__dataclass_fields__", {})
        found = fields[word].default if word in fields else getattr(found, word)
    assert found == int(NUMBERS[name])


def test_there_are_numbers():
    """Would catch a table that is no longer read."""
    assert len(NUMBERS) > 10


# ---- costs


@dataclass(frozen=True)
class Prices:
    """Of a day: Gwei a gas here; on an L2 the base fee of L1 (a blob's is taken as the same)."""

    title: str
    gas_milligwei: int
    l1_gwei: int = 0


DAYS = (
    Prices("mainnet, quiet: 1", 1_000),
    Prices("mainnet, busy: 20", 20_000),
    Prices("L2, quiet: 0.001 and 1", 1, 1),
    Prices("L2, busy: 0.05 and 50", 50, 50),
)
USD_PER_ETHER = 3_000
SESSION_USD_CENTS = 300  # 10 kWh at 0.30
# OP Stack since Fjord: the size of a transaction on L1, estimated from its compressed size, and what a byte costs.
FJORD_INTERCEPT, FJORD_COEFFICIENT, FJORD_SIZE_MIN = -42_585_600, 836_500, 100_000_000
BASE_FEE_SCALAR, BLOB_FEE_SCALAR = 5_227, 1_014_213
CONSUMER, PROVIDER = ("startAuction", "connect"), ("placeBid", "endConnection by the provider, session key")


def gas(name, *, first=False):
    """Gas of a call today, from docs/gas.md: of an account that has traded before, or of one's first time."""
    columns = []
    for line in (ROOT / "docs/gas.md").read_text().splitlines():
        cells = [cell.strip(" *") for cell in line.split("|")]
        if "cold, today" in cells:
            columns = cells
        if len(cells) > 1 and cells[1] == name:
            return int(cells[columns.index("cold, today" if first else "today")].replace(",", ""))
    raise AssertionError(f"docs/gas.md does not know {name}")


def calls():
    """The four transactions of a session with their calldata, as large as they get."""
    one = ephemeral_signer(b"consumer").address
    ack = Ack(b"\xaa" * 32, one, 10**6, 2**32, b"\xbb" * 32, b"\xcc" * 65, b"\xdd" * 65)
    return {
        CONSUMER[0]: contract.encode_start_auction(10_000, 600, 10**14, 7_200, b"\xee" * 32),
        CONSUMER[1]: contract.encode_connect(one, 10_000),
        PROVIDER[0]: contract.encode_place_bid(one, 1, 10**14),
        PROVIDER[1]: contract.encode_end_connection(b"\xaa" * 32, 10_000, ack),
    }


def l1_fee_wei(calldata, day):
    """What the OP Stack takes for the bytes of a signed transaction, if nothing in them can be compressed."""
    raw = ephemeral_signer(b"x").sign_transaction(
        {
            "chainId": 10, "nonce": 2**16, "to": "0x" + "11" * 20, "value": 0, "data": calldata, "gas": 10**6,
            "maxFeePerGas": 10**12, "maxPriorityFeePerGas": 10**9,
        }
    )  # fmt: skip
    compressed = len(raw) + len(raw) // 255 + 16
    size = max(FJORD_SIZE_MIN, FJORD_INTERCEPT + FJORD_COEFFICIENT * compressed)
    l1_wei = day.l1_gwei * 10**9
    return size * (16 * BASE_FEE_SCALAR * l1_wei + BLOB_FEE_SCALAR * l1_wei) // 10**12


def cost_wei(names, day, *, first=False):
    """Gas times price, and the data."""
    gas_wei = sum(gas(name, first=first) for name in names) * day.gas_milligwei * 10**6
    return gas_wei + sum(l1_fee_wei(calls()[name], day) for name in names)


def two_digits(parts, per):
    """A quotient with two significant digits, rounded up: nobody is told less, and a gas more is no news here."""
    scale = 0
    while parts * 10**scale < 10 * per:
        scale += 1
    shown = -(-parts * 10**scale // per)
    shown = shown if scale else -(-shown // (unit := 10 ** (len(str(shown)) - 2))) * unit
    return f"{shown / 10**scale:.{scale}f}"


def usd(wei):
    """A cost."""
    return two_digits(wei * USD_PER_ETHER, 10**18)


def percent(wei):
    """Of a session's energy."""
    return two_digits(wei * USD_PER_ETHER * 100 * 100, 10**18 * SESSION_USD_CENTS) + " %"


def costs():
    """The table."""
    both = (*CONSUMER, *PROVIDER)
    whose = {"consumer": CONSUMER, "provider": PROVIDER, "both": both}
    titles = " | ".join(day.title for day in DAYS)
    lines = [f"| USD a session | gas | {titles} |", "|---|---:|" + "---:|" * len(DAYS)]
    for first in (False, True):
        for who, names in whose.items():
            thousands = -(-sum(gas(name, first=first) for name in names) // 1_000)
            cells = " | ".join(usd(cost_wei(names, day, first=first)) for day in DAYS)
            lines.append(f"| {who}{', first' if first else ''} | {thousands},000 | {cells} |")
    cells = " | ".join(percent(cost_wei(both, day)) for day in DAYS)
    lines.append(f"| both, of the energy | | {cells} |")
    worth = two_digits(
        5 * SESSION_USD_CENTS * 10**9, 100 * 100 * USD_PER_ETHER * sum(gas(name) for name in PROVIDER)
    )
    text = f"The provider's gas is 5 % of such a session at about {worth} Gwei on mainnet."
    return "\n".join([*lines, "", text, ""])


def test_the_costs_are_computed():
    """Would catch figures that are older than the contract, or than the formula."""
    _, _, rest = PAGE.read_text().partition(BEGIN)
    assert rest.partition(END)[0] == costs(), "python tests/test_chain_page.py"


def test_the_gas_is_that_of_the_other_page():
    """Would catch a column read for its neighbour: the sum of one trade stands on the other page too."""
    (total,) = re.findall(
        r"^\| session key \|.*?\|.*?\| ([\d,]+) \|", (ROOT / "docs/gas.md").read_text(), re.MULTILINE
    )
    assert sum(gas(name) for name in (*CONSUMER, *PROVIDER)) == int(total.replace(",", ""))
    assert gas("startAuction", first=True) > 2 * gas("startAuction")  # a word from zero


def test_figures_are_rounded_up_to_two_digits():
    """Would catch a cost that is shown lower than it is."""
    shown = [two_digits(parts, 10_000) for parts in (26, 2_619, 2_700, 115_401, 1_000_000, 1_234_567)]
    assert shown == ["0.0026", "0.27", "0.27", "12", "100", "130"]


# ---- commands


def test_the_commands_of_the_page_run(tmp_path, monkeypatch):
    """Would catch a command that was renamed, or that does something else than the page says."""
    (block,) = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    with Town(tmp_path) as town:
        town.open_market()
        monkeypatch.setenv("V2V_CHAIN__URLS", town.net.url_http)
        monkeypatch.setenv("V2V_CHAIN__CONTRACT", hex0x(town.market))
        monkeypatch.setenv("ALICE", town.address("alice"))
        monkeypatch.setenv("OPERATOR", town.address("bob"))
        monkeypatch.chdir(tmp_path)
        said = {}
        for line in block.splitlines():
            _v2v, *typed = shlex.split(os.path.expandvars(line))
            said[line] = v2v(*typed)
            assert said[line].exit_code == 0, (line, said[line].err)
        revoked, named = list(said.values())[-2:]
        assert "none any more" in revoked.out
        assert town.address("bob") in named.out.lower()


def test_the_commands_between_the_lines_exist():
    """Would catch `v2v provider watch` under another name."""
    page = PAGE.read_text()
    asked = set(re.findall(r"`v2v ((?:[a-z-]+ ?){1,2})", page)) | set(
        re.findall(r"^v2v (\S+ \S+)", page, re.MULTILINE)
    )
    assert len(asked) >= 5
    for words in asked:
        helped = CliRunner().invoke(cli, [*words.split(), "--help"])
        assert helped.exit_code == 0, words
    (option,) = re.findall(r"`(--challenge-s) \d+`", page)
    assert option in CliRunner().invoke(cli, ["organisation", "deploy", "--help"]).output


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + costs() + END + rest.partition(END)[2])
