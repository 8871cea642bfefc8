"""Named bugs: the market with one rule broken, as text patches of its source. A suite that lets one live proves nothing.

Each patch must find its text exactly once, so a source that changed says so. `python tests/market_mutants.py [NAME ...]`
builds and walks them all and prints how far each one came.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass

from eth.vm.forks.prague import PragueVM
from market import Market
from market_walk import PARAMETERS, Divergence, Walk

from contracts import Artefact, build, load_artefact

MARKET, WORDS = "src/V2VCharging.sol", "src/Words.sol"
SEEDS, STEPS = 40, 100  # a bug that survives this many steps is not caught


@dataclass(frozen=True)
class Mutant:
    """One broken rule."""

    name: str
    old: str
    new: str
    path: str = MARKET


MUTANTS = [
    Mutant("wrong winner", "if (winner == 0 || winner != them.index())", "if (winner == 0)"),
    Mutant("receipt can go down", "        if (deliveredWh <= s.claimedWh()) return;\n", ""),
    Mutant("concession can go down", "        if (raised) s = s.withClaim(", "        s = s.withClaim("),
    Mutant(
        "provider can throw a claim away",
        "            if (deliveredWh > s.claimedWh()) s = _proven(s, consumer, provider, deliveredWh, ack);\n",
        "            if (deliveredWh > s.claimedWh()) _proven(s, consumer, provider, deliveredWh, ack);\n"
        "            s = s.withClaim(deliveredWh);\n",
    ),
    Mutant(
        "pause blocks an exit",
        "        if (block.timestamp < s.settleAt()) revert",
        "        _requireActive();\n        if (block.timestamp < s.settleAt()) revert",
    ),
    Mutant(
        "removal blocks an exit",
        "        if (block.timestamp < s.settleAt()) revert",
        "        _requireEV(provider, _accounts[provider].word);\n        if (block.timestamp < s.settleAt()) revert",
    ),
    Mutant("double settle", "        _sessions[token] = SessionWord.wrap(0);\n", ""),
    Mutant("grant cap ignored", "            if (deliveredWh > maxEnergyWh) return false;\n", ""),
    Mutant(
        "bond paid twice",
        "_credit(provider, fee + Words.released(",
        "_credit(provider, fee + bond + Words.released(",
    ),
    Mutant(
        "closeAt moves",
        "            s = s.withClosing(closeAt);\n        } else if (!raised) {\n            return;\n        }\n",
        "            s = s.withClosing(closeAt);\n        } else {\n"
        "            s = s.withClosing(block.timestamp + _rules.challengeSeconds());\n        }\n",
    ),
    Mutant(
        "operator withdraws",
        "Account storage account = _accounts[msg.sender];\n        account.word = _debited(",
        "Account storage account = _accounts[_operators[to].operator() == msg.sender ? to : msg.sender];\n"
        "        account.word = _debited(",
    ),
    Mutant(
        "high s accepted",
        "        (address recovered,,) = ECDSA.tryRecoverCalldata(digest, signature);",
        "        address recovered = signature.length != 65\n            ? address(0)\n"
        "            : ecrecover(digest, uint8(signature[64]), bytes32(signature[0:32]), bytes32(signature[32:64]));",
    ),
    Mutant(
        "receipt of another session",
        "        bytes32 sessionId = sessionIdOf(consumer, provider, uint64(s.auctionNonce()));",
        "        bytes32 sessionId = sessionIdOf(consumer, provider, uint64(s.auctionNonce() & 1));",
    ),
    Mutant(
        "receipt of nobody", "        return recovered == signer;", "        return recovered != address(0);"
    ),
    Mutant(
        "soft close unlimited",
        "softClosing > closing && softCloses < _rules.softCloseMax()",
        "softClosing > closing",
    ),
    Mutant("outbid bond lost", "        _releaseBond(a); // first,", "        // first,"),
    Mutant(
        "bid not pinned",
        "        if (a.auctionNonce() != auctionNonce_) revert StaleAuction(uint64(a.auctionNonce()));\n",
        "",
    ),
    Mutant(
        "bid in the closing second",
        "if (block.timestamp >= closing) revert",
        "if (block.timestamp > closing) revert",
    ),
    Mutant("bid need not fall", "return lowest - (step == 0 ? 1 : step);", "return lowest;", WORDS),
    Mutant("own bid", "        if (provider == consumer) revert SelfDeal();\n", ""),
    Mutant(
        "connect too late",
        "if (block.timestamp > connectBy) revert",
        "if (block.timestamp > connectBy + 1) revert",
    ),
    Mutant("connect with a removed winner", "        _requireEV(provider, them);\n", ""),
    Mutant(
        "surplus kept", "            _credit(msg.sender, startCost - cost);", "            startCost - cost;"
    ),
    Mutant(
        "settle too early",
        "if (block.timestamp < s.settleAt()) revert",
        "if (block.timestamp + 1 < s.settleAt()) revert",
    ),
    Mutant(
        "stranger cancels",
        "        if (bidless && msg.sender == consumer) return true;",
        "        if (bidless) return true;",
    ),
    Mutant("operator limit ignored", "if (w.operatorBonds() > limit) revert", "if (limit == 0) revert"),
    Mutant(
        "operator limit never comes back",
        "bond - ((bond * operatorBond_) << 96)",
        "bond - bond * operatorBond_ + bond * operatorBond_",
        WORDS,
    ),
    Mutant(
        "fee rounded up",
        "fee = (s.rate() * s.claimedWh()) / WH_PER_KWH;",
        "fee = (s.rate() * s.claimedWh() + 999) / WH_PER_KWH;",
    ),
    Mutant(
        "stranger ends",
        "msg.sender == provider || msg.sender == _operators[provider].operator()",
        "msg.sender != address(0)",
    ),
    Mutant(
        "stranger adds cars",
        "function addEV(address ev, bytes32 info) external onlyOwner",
        "function addEV(address ev, bytes32 info) external",
    ),
    Mutant(
        "exit through the registry",
        "    function cancelAuction(address consumer) external {\n",
        "    function cancelAuction(address consumer) external {\n        _requireEV(msg.sender, _accounts[msg.sender].word);\n",
    ),
]


def built(mutant: Mutant) -> Artefact:
    """The broken market. Without via-IR: the same behaviour, compiled in a third of the time."""
    sources = build.source_texts(MARKET)
    assert sources[mutant.path].count(mutant.old) == 1, (
        f"{mutant.name}: the source changed, write the patch again"
    )
    sources[mutant.path] = sources[mutant.path].replace(mutant.old, mutant.new)
    settings = build.compiler_settings() | {"viaIR": False}
    output = build.compiled(sources, settings, ["abi", "evm.bytecode.object"], warnings_too=False)
    code = output["contracts"][MARKET]["V2VCharging"]["evm"]["bytecode"]["object"]
    healthy = load_artefact()
    return Artefact(
        healthy.contract, healthy.compiler, settings, {}, healthy.abi, bytes.fromhex(code), b"", (), []
    )


def killed_by(mutant: Mutant) -> str:
    """What gave it away, or "" if it lives."""
    market = Market(PARAMETERS, PragueVM, built(mutant))
    place = market.snapshot()
    for seed in range(SEEDS):
        market.restore(place)
        try:
            walk = Walk(market, seed)
            walk.walk(STEPS)
            walk.everybody_leaves()
        except Divergence as found:
            return f"seed {seed}, {found}"
    return ""


def main(names: list[str]) -> int:
    """0: all of them were killed."""
    alive = []
    for mutant in MUTANTS:
        if names and mutant.name not in names:
            continue
        began = time.monotonic()
        found = killed_by(mutant)
        sys.stdout.write(f"{mutant.name}: {found[:160] or 'ALIVE'} ({time.monotonic() - began:.1f} s)\n")
        sys.stdout.flush()
        alive += [] if found else [mutant.name]
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
