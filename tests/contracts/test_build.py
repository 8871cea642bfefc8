"""The builder of the artefacts: says what is stale, and what to do when it cannot build."""

import shutil
import subprocess
from pathlib import Path

import pytest

import contracts
from contracts import build, load_artefact

FOLDER = Path(contracts.__file__).parent


def test_a_stale_artefact_is_noticed(monkeypatch, capsys):
    """Would catch a check that always says yes."""
    monkeypatch.setattr(build, "build", lambda _source: "something else")
    assert build.main(["--check"]) == 1
    assert "python -m contracts.build" in capsys.readouterr().err


def test_a_missing_compiler_is_named_with_its_remedy(monkeypatch):
    """Would catch a traceback where `npm ci` is all that is needed."""
    monkeypatch.setattr(build, "COMPILER", FOLDER / "tools" / "no-such-solc")
    with pytest.raises(build.BuildError, match="install node"):
        build.compiled({}, {}, [])


def test_the_solc_door_answers_as_forge_asks():
    """Would catch a wrapper that forge would not accept as a compiler."""
    if shutil.which("node") is None or not (FOLDER / "node_modules" / "solc").exists():
        pytest.skip("node or contracts/node_modules is missing: the compiler cannot be asked")
    answer = subprocess.run(
        [build.COMPILER, "--version"], capture_output=True, text=True, check=True, timeout=60
    )
    assert answer.stdout.strip().endswith(load_artefact().compiler + ".Linux.g++")


def test_warnings_are_faults():
    """Would catch a compiler warning that scrolls by: the contract holds everyone's money."""
    if shutil.which("node") is None or not (FOLDER / "node_modules" / "solc").exists():
        pytest.skip("node or contracts/node_modules is missing: the compiler cannot be asked")
    careless = "pragma solidity ^0.8.20; contract Careless { function f(uint256 unused) external {} }"
    with pytest.raises(build.BuildError, match="Warning"):
        build.compiled({"Careless.sol": careless}, build.compiler_settings(), ["abi"])


def test_usage(capsys):
    """Would catch a typing error that rebuilds the artefact instead of checking it."""
    assert build.main(["--chekc"]) == 2
    assert "usage" in capsys.readouterr().err


@pytest.mark.timeout(240)
def test_the_market_also_compiles_without_via_ir():
    """Would catch code that only one of the compiler's two pipelines can build (PROTOCOL section 2)."""
    if shutil.which("node") is None or not (FOLDER / "node_modules" / "solc").exists():
        pytest.skip("node or contracts/node_modules is missing: the compiler cannot be asked")
    settings = build.compiler_settings() | {"viaIR": False}
    output = build.compiled(build.source_texts("src/V2VCharging.sol"), settings, ["evm.bytecode.object"])
    code = output["contracts"]["src/V2VCharging.sol"]["V2VCharging"]["evm"]["bytecode"]["object"]
    assert 0 < len(code) // 2 < 24_576
