"""What other people's tools say of the contract: forge's coverage in every run, halmos and slither with `--long`.

halmos and slither need an older web3 than ours: `./run test contracts --long` gives them `contracts/.proofs`.
"""

import json
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

import contracts

FOLDER = Path(contracts.__file__).parent
TOOLS = FOLDER / ".proofs" / "bin"
SECURITY = FOLDER.parent / "docs" / "security.md"


def forge() -> Path:
    """The forge that npm put there for this machine."""
    found = sorted(FOLDER.glob("node_modules/@foundry-rs/forge-*/bin/forge"))
    if not found or platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("contracts/node_modules has no forge for this machine: run `npm ci` in contracts/")
    return found[0]


def tool(name: str) -> Path:
    """One of the provers."""
    if not (TOOLS / name).exists():
        pytest.skip(f"{name} is not installed: `./run test contracts --long` makes contracts/.proofs")
    return TOOLS / name


def ran(*command: object, seconds: int) -> subprocess.CompletedProcess[str]:
    """Run a tool in contracts/, with forge and the provers on its path; its faults are the caller's to judge."""
    path = os.pathsep.join([str(forge().parent), str(TOOLS), os.environ["PATH"]])
    return subprocess.run(
        [str(part) for part in command], cwd=FOLDER, env=os.environ | {"PATH": path, "NO_COLOR": "1"},
        capture_output=True, text=True, timeout=seconds, check=False,
    )  # fmt: skip


@pytest.mark.timeout(600)
def test_every_line_and_branch_is_reached(tmp_path):
    """Would catch code that no unit test runs: the paper's analyser reached 86 %, we want all of it."""
    report = tmp_path / "lcov.info"
    done = ran(
        forge(), "coverage", "--match-contract", "V2VChargingTest", "--report", "lcov", "--report-file", report,
        seconds=550,
    )  # fmt: skip
    assert report.exists(), done.stdout[-2000:] + done.stderr[-2000:]
    missed, seen = [], 0
    for part in report.read_text().split("end_of_record"):
        source = re.search(r"^SF:(src/.*)$", part, re.MULTILINE)
        if source:
            counts = re.findall(r"^(?:DA:\d+|BRDA:\d+,\d+,\d+),(\d+|-)$", part, re.MULTILINE)
            places = re.findall(r"^((?:DA|BRDA):\d+).*,(?:0|-)$", part, re.MULTILINE)
            missed += [f"{source[1]} {place}" for place in places]
            seen += len(counts)
    assert seen > 300, "the report must hold the contract's lines"
    assert not missed


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_halmos_proves_all_values():
    """Would catch a field that can overflow into its neighbour, an owner's call open to others, or money that a whole
    round creates or loses: for every value, not for some.
    """
    built = ran(forge(), "build", "--ast", seconds=600)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    done = ran(
        tool("halmos"), "--contract", "ProofsTest", "--function", "check_", "--solver", "yices",
        "--solver-timeout-assertion", 900_000, seconds=3000,
    )  # fmt: skip
    said = re.sub(r"\x1b\[\d+m", "", done.stdout)  # it colours its words, asked or not
    proofs = re.findall(r"function (check_\w+)", (FOLDER / "test" / "Proofs.t.sol").read_text())
    assert done.returncode == 0, said[-4000:]
    assert {name for name in proofs if f"[PASS] {name}(" in said} == set(proofs), said[-4000:]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_every_finding_of_slither_is_answered(tmp_path):
    """Would catch a new kind of finding, and a grave one of any kind: docs/security.md answers each kind and its number."""
    report = tmp_path / "slither.json"
    ran(
        tool("slither"), ".", "--filter-paths", "test|node_modules", "--exclude-informational", "--json", report,
        seconds=800,
    )  # fmt: skip
    findings = json.loads(report.read_text())["results"].get("detectors", [])
    assert not [finding for finding in findings if finding["impact"] == "High"]
    found: dict[str, int] = {}
    for finding in findings:
        found[finding["check"]] = found.get(finding["check"], 0) + 1
    answered = dict(re.findall(r"^\| `([a-z-]+)` \| (\d+) \|", SECURITY.read_text(), re.MULTILINE))
    assert {check: str(count) for check, count in found.items()} == answered
