"""Builds the checked-in artefacts from the sources: `python -m contracts.build [--check]`.

Needs node and `npm ci` in this folder; nothing else in the house does. An artefact is byte for byte reproducible: the
compiler is pinned by `package-lock.json`, the settings come from `foundry.toml`, and no metadata is appended.
`--check` rebuilds, compares and writes nothing; it exits 1 when a checked-in file is stale.
`V2VCharging.json` is the market; `test/Reference.json` is what tests hold the Python arithmetic against.
"""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ARTEFACTS = {"src/V2VCharging.sol": "V2VCharging.json", "test/Reference.sol": "test/Reference.json"}
COMPILER = HERE / "tools" / "solc"
COMPILE_SECONDS_MAX = 180  # the WebAssembly compiler takes about 5 s; this stops a hung node


class BuildError(Exception):
    """The artefact cannot be built here; the message says what to do."""


def compiler_settings() -> dict[str, Any]:
    """The compiler settings of `foundry.toml`, in the compiler's own words (Solidity "standard JSON")."""
    profile = tomllib.loads((HERE / "foundry.toml").read_text())["profile"]["default"]
    return {
        "remappings": profile["remappings"],
        "optimizer": {"enabled": profile["optimizer"], "runs": profile["optimizer_runs"]},
        "viaIR": profile["via_ir"],
        "evmVersion": profile["evm_version"],
        "metadata": {"bytecodeHash": profile["bytecode_hash"], "appendCBOR": profile["cbor_metadata"]},
    }


def compiled(
    sources: dict[str, str], settings: dict[str, Any], outputs: list[str], *, warnings_too: bool = True
) -> dict[str, Any]:
    """Compile `{path: text}`; imports are read from this folder and its node_modules. Returns the compiler's output.

    Raises BuildError with the compiler's own words (warnings too, unless told otherwise), or with the remedy when node
    or the packages are missing.
    """
    harmless = {"info"} if warnings_too else {"info", "warning"}
    request = {
        "language": "Solidity",
        "sources": {path: {"content": text} for path, text in sources.items()},
        "settings": settings | {"outputSelection": {"*": {"*": outputs}}},
    }
    try:
        run = subprocess.run(  # noqa: S603 - our own tool, no shell
            [str(COMPILER), "--standard-json"],
            input=json.dumps(request),
            capture_output=True,
            text=True,
            timeout=COMPILE_SECONDS_MAX,
            check=False,
        )
    except OSError as error:
        raise BuildError(f"cannot start {COMPILER}: {error}; install node 20 or newer") from error
    if run.returncode != 0:
        raise BuildError(f"the compiler did not run; try `npm ci` in {HERE.name}/\n{run.stderr.strip()}")
    output: dict[str, Any] = json.loads(run.stdout)
    faults = [
        fault["formattedMessage"] for fault in output.get("errors", []) if fault["severity"] not in harmless
    ]
    if faults:
        raise BuildError("\n".join(faults))
    return output


def source_texts(main_source: str) -> dict[str, str]:
    """Our own sources beside `main_source`, by their path in this folder; libraries are pinned by the lock file instead."""
    folder = (HERE / main_source).parent
    ours = sorted(folder.glob("*.sol")) if folder.name == "src" else [HERE / main_source]
    return {f"{folder.name}/{path.name}": path.read_text() for path in ours}


def build(main_source: str) -> str:
    """The text of the artefact of the contract in `main_source`, named as its file. Raises BuildError."""
    sources = source_texts(main_source)
    settings = compiler_settings()
    name = Path(main_source).stem
    outputs = ["abi", "evm.bytecode.object", "evm.deployedBytecode", "storageLayout", "metadata"]
    contract = compiled(sources, settings, outputs)["contracts"][main_source][name]
    deployed = contract["evm"]["deployedBytecode"]
    artefact = {
        "contract": name,
        "compiler": json.loads(contract["metadata"])["compiler"]["version"],
        "settings": settings,
        "sources_sha256": {path: hashlib.sha256(text.encode()).hexdigest() for path, text in sources.items()},
        "abi": contract["abi"],
        "bytecode": "0x" + contract["evm"]["bytecode"]["object"],
        "deployedBytecode": "0x" + deployed["object"],
        "immutableReferences": sorted(
            (place for places in deployed["immutableReferences"].values() for place in places),
            key=lambda place: place["start"],
        ),
        "storageLayout": [
            {
                "slot": int(item["slot"]),
                "offset": item["offset"],
                "label": item["label"],
                "type": re.sub(r"\)\d+(_storage)?", ")", item["type"]),  # without the compiler's own numbers
            }
            for item in contract["storageLayout"]["storage"]
        ],
    }
    return json.dumps(artefact, indent=1) + "\n"


def main(arguments: list[str]) -> int:
    """0: written, or equal with `--check`. 1: stale, or it could not be built. 2: usage."""
    if arguments not in ([], ["--check"]):
        sys.stderr.write("usage: python -m contracts.build [--check]\n")
        return 2
    try:
        texts = {HERE / target: build(source) for source, target in ARTEFACTS.items()}
    except BuildError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text() != text]
    if not arguments:
        for path in stale:
            path.write_text(texts[path])
    elif stale:
        names = ", ".join(path.name for path in stale)
        sys.stderr.write(f"stale: {names}; run `python -m contracts.build`\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
