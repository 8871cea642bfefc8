"""The V2V contract as data: its compiled artefact, loaded from the package. Standard library only.

The artefact is built by `contracts.build` (needs node) and checked in, so that nobody who runs the agent needs a
compiler. May not know: web3, networks, the agent.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any


@dataclass(frozen=True, slots=True)
class Artefact:
    """One compiled contract. Bytes are raw; `immutable_references` are (start, length) in the deployed code."""

    contract: str
    compiler: str
    settings: dict[str, Any]
    sources_sha256: dict[str, str]
    abi: list[dict[str, Any]]
    bytecode: bytes
    deployed_bytecode: bytes
    immutable_references: tuple[tuple[int, int], ...]
    storage_layout: list[dict[str, Any]]

    @classmethod
    def from_json(cls, text: str) -> Artefact:
        """Read what `contracts.build` wrote."""
        data = json.loads(text)
        return cls(
            contract=data["contract"],
            compiler=data["compiler"],
            settings=data["settings"],
            sources_sha256=data["sources_sha256"],
            abi=data["abi"],
            bytecode=bytes.fromhex(data["bytecode"].removeprefix("0x")),
            deployed_bytecode=bytes.fromhex(data["deployedBytecode"].removeprefix("0x")),
            immutable_references=tuple(
                (place["start"], place["length"]) for place in data["immutableReferences"]
            ),
            storage_layout=data["storageLayout"],
        )

    def matches_deployed(self, code: bytes) -> bool:
        """True if `code` (eth_getCode) is this contract, whatever its immutables (the market's parameters) are."""
        return len(code) == len(self.deployed_bytecode) and self._masked(code) == self._masked(
            self.deployed_bytecode
        )

    def _masked(self, code: bytes) -> bytes:
        masked = bytearray(code)
        for start, length in self.immutable_references:
            masked[start : start + length] = bytes(length)
        return bytes(masked)


@cache
def load_artefact() -> Artefact:
    """The checked-in artefact of the market, `V2VCharging.json`."""
    return Artefact.from_json(files(__name__).joinpath("V2VCharging.json").read_text())
