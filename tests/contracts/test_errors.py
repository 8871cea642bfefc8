"""Nothing that the contract can refuse goes untested: one Foundry test for each error of its ABI, by its name."""

import re
from pathlib import Path

import contracts
from contracts import load_artefact


def test_every_error_has_its_test():
    """Would catch an error that was added (OpenZeppelin's included) and never provoked."""
    source = (Path(contracts.__file__).parent / "test" / "V2VCharging.t.sol").read_text()
    tested = set(re.findall(r"function test_RevertWhen_(\w+)\(", source))
    errors = {entry["name"] for entry in load_artefact().abi if entry["type"] == "error"}
    assert errors <= tested, f"no test_RevertWhen_ for {sorted(errors - tested)}"
    assert tested <= errors, f"named after no error: {sorted(tested - errors)}"


def test_everything_outside_is_described():
    """Would catch a function, error or event of the interface without NatSpec."""
    source = (Path(contracts.__file__).parent / "src" / "IV2VCharging.sol").read_text()
    lines = source.splitlines()
    bare = []
    for number, line in enumerate(lines):
        if re.match(r"    (function|event|error|struct|enum) ", line) and not lines[
            number - 1
        ].strip().startswith("///"):
            bare.append(line.strip())
    assert bare == []
