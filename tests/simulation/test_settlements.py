"""Exactly one settlement is mined per session: hundreds of storms over pool, node, fees and power; ten thousand with --long."""

import sys

import pytest
from simulation.mutants import SEND, Slip, slipped
from simulation.settlements import settled
from simulation.storms import on_all_cores

RUNS_IN_CI, RUNS_LONG = 200, 10_000


@pytest.mark.timeout(1_800)
def test_exactly_one_settlement_a_session(request, capsys):
    """Would catch a payment made twice, lost, or above its stake, by any mixture of faults and crashes."""
    runs = RUNS_LONG if request.config.getoption("--long") else RUNS_IN_CI
    sessions = lives = signatures = failed = by_consumer = 0
    for run in on_all_cores(settled, range(runs)):
        assert not run.broken, f"seed {run.seed}: {run.broken}"
        sessions, lives, signatures = sessions + run.sessions, lives + run.lives, signatures + run.signatures
        failed, by_consumer = failed + run.failed, by_consumer + run.by_consumer
    with capsys.disabled():
        sys.stdout.write(
            f"\n{runs} runs (seeds 0 to {runs - 1}): {sessions} sessions, {lives} lives, {signatures} signatures, "
            f"{failed} failed in vain, {by_consumer} ended by their consumer\n"
        )
    assert lives > 1.5 * runs, "the power must fail"
    assert signatures > sessions, "something must be replaced"


# Each must be noticed within some seeds, or the promises above prove nothing.
SLIPS = {
    "broadcast before journaling": Slip(
        SEND + "ChainSend._sign",
        "    if self._is_owed(effect):",
        "    await self._sender.broadcast(signed.raw_tx)\n    if self._is_owed(effect):",
    ),
    "a replacement takes a new nonce": Slip(
        SEND + "ChainSend._is_replaced",
        "    if self._is_owed(effect):",
        "    replaced = await self._prepared(_settlement_of(session), session.settlement.nonce + 1)\n"
        "    if self._is_owed(effect):",
    ),
    "said once is enough": Slip(SEND + "ChainSend._turn", "sent.head_number = header.number", "return None"),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_slip_is_noticed(name):
    """Would catch promises that nothing can break."""
    with slipped([SLIPS[name]]):
        assert any(settled(seed).broken for seed in range(20))
