"""The checked-in artefacts are what the sources compile to, and what a chain really holds."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from market import Market

import contracts
from agent.chain.contract import MarketParameters
from contracts import Artefact, build, load_artefact

FOLDER = Path(contracts.__file__).parent
REFERENCE = FOLDER / "test" / "Reference.json"


def artefacts() -> list[Artefact]:
    """Everything that `contracts.build` writes."""
    return [load_artefact(), Artefact.from_json(REFERENCE.read_text())]


@pytest.mark.parametrize("artefact", artefacts(), ids=lambda artefact: artefact.contract)
def test_sources_are_those_of_the_artefact(artefact):
    """Would catch an edited source with a forgotten rebuild, also on a machine without node."""
    for path, digest in artefact.sources_sha256.items():
        assert hashlib.sha256((FOLDER / path).read_bytes()).hexdigest() == digest, (
            f"{path} changed: run `python -m contracts.build`"
        )


def test_artefact_names_every_source_of_the_market():
    """Would catch a new source file that the artefact does not know, and so drift that nobody sees."""
    assert set(load_artefact().sources_sha256) == {
        f"src/{path.name}" for path in (FOLDER / "src").glob("*.sol")
    }


@pytest.mark.timeout(240)
def test_rebuilding_gives_the_same_bytes(capsys):
    """Would catch bytecode that does not come from the sources in this tree, or settings that drifted from foundry.toml."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed: the artefact is not rebuilt here")
    if not (FOLDER / "node_modules" / "solc").exists():
        pytest.skip("contracts/node_modules is missing: run `npm ci` in contracts/")
    assert build.main(["--check"]) == 0, capsys.readouterr().err


@pytest.mark.timeout(240)
def test_another_directory_gives_the_same_bytes(tmp_path):
    """Would catch a path, a time or a user's name in the artefact: whoever builds it, wherever, gets these bytes."""
    if shutil.which("node") is None or not (FOLDER / "node_modules" / "solc").exists():
        pytest.skip("node or contracts/node_modules is missing: the artefact is not rebuilt here")
    elsewhere = tmp_path / "some" / "where else"
    for part in ("src", "test", "tools"):
        shutil.copytree(FOLDER / part, elsewhere / part)
    for part in ("build.py", "foundry.toml"):
        shutil.copy(FOLDER / part, elsewhere / part)
    (elsewhere / "node_modules").symlink_to(FOLDER / "node_modules")
    done = subprocess.run(
        [sys.executable, elsewhere / "build.py"], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    for name in ("V2VCharging.json", "test/Reference.json"):
        assert (elsewhere / name).read_bytes() == (FOLDER / name).read_bytes()


def test_the_artefact_says_all_there_is_to_say():
    """Would catch an artefact from which somebody else could not rebuild, verify or decode the market."""
    artefact = load_artefact()
    assert artefact.compiler.startswith("0.8.37+commit.")
    assert (artefact.settings["evmVersion"], artefact.settings["viaIR"]) == ("paris", True)
    assert artefact.deployed_bytecode in artefact.bytecode, (
        "no metadata, no arguments: the code as it will lie there"
    )
    assert {entry["type"] for entry in artefact.abi} == {"constructor", "error", "event", "function"}
    assert {item["label"] for item in artefact.storage_layout} == {
        "_owner", "_pendingOwner", "status", "_nextIndex", "_accounts", "_operators", "_infos", "_evAt", "_auctions",
        "_sessions",
    }  # fmt: skip
    assert artefact.immutable_references, (
        "the market's rules are immutables: one word, masked when code is compared"
    )


def test_deployed_code_matches_whatever_the_market_parameters_are():
    """Would catch immutables that are not masked (every real market refused) or a mask that hides too much."""
    market = Market(MarketParameters(bidding_s_min=5, connect_window_s=60, challenge_s=30, grace_s=60))
    code = market.backend.get_code(market.address)
    assert load_artefact().matches_deployed(code)
    assert code != load_artefact().deployed_bytecode, "immutables differ, so the raw comparison must not pass"


def test_foreign_code_does_not_match():
    """Would catch a mask that lets a tampered contract pass: every byte outside the immutables must count."""
    market = Market()
    code = bytearray(market.backend.get_code(market.address))
    masked = {
        i for start, length in load_artefact().immutable_references for i in range(start, start + length)
    }
    for place in range(0, len(code), 97):
        tampered = bytes(code[:place]) + bytes([code[place] ^ 1]) + bytes(code[place + 1 :])
        assert load_artefact().matches_deployed(tampered) is (place in masked)
    assert not load_artefact().matches_deployed(b"")
    assert not load_artefact().matches_deployed(bytes(code) + b"\0")


def test_nothing_in_the_code_can_run_other_code_or_vanish():
    """Would catch a way to the Parity bug (a library that is killed or replaced under the market) and a second call out:
    the deployed code holds one CALL, `withdraw`'s, two STATICCALLs at most (the recover precompile), and none of the rest.
    """
    code, place, found = load_artefact().deployed_bytecode, 0, []
    while place < len(code):
        found.append(code[place])
        place += code[place] - 0x5F + 1 if 0x60 <= code[place] <= 0x7F else 1  # PUSH1..PUSH32 carry data
    call, static_call = 0xF1, 0xFA
    forbidden = {
        "CREATE": 0xF0,
        "CALLCODE": 0xF2,
        "DELEGATECALL": 0xF4,
        "CREATE2": 0xF5,
        "SELFDESTRUCT": 0xFF,
        "ORIGIN": 0x32,
    }
    assert [name for name, opcode in forbidden.items() if opcode in found] == []
    assert found.count(call) == 1
    assert found.count(static_call) <= 2
