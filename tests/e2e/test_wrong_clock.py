"""A wall clock that is wrong changes the stamps in the log, and nothing else (DESIGN rule 10).

The same session on four computers, whose clocks say: the truth; 1970; tomorrow; something else at every look. Each has a chain,
a charger and the real daemon of its own; they play at the same time, because they mostly wait for blocks.
"""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime

import pytest
from stage import RATE_WEI_PER_KWH, ROOT, Agent, Program, Stage, eventually, surroundings

from agent.chain import contract
from agent.core import events as ev
from agent.core.units import cost_wei_floor
from agent.errors import EXIT_DONE

CLOCKS = ("right", "1970", "ahead", "jumping")
ORDER_WH = 15
DAY_S = 86_400
QUICK = {"CHAIN__CONFIRMATIONS": 2, "CHAIN__FINALITY": 2, "PORTS__0__FAILSAFE_TIMEOUT_S": 2}
# What was decided, in order; receipts and scanned blocks come as often as they come.
DECISIONS = (
    ev.ConnectedSeen,
    ev.ConnectedBelieved,
    ev.ConnectedFinal,
    ev.TokenPresented,
    ev.SessionAccepted,
    ev.DeliveryBegan,
    ev.DeliveryPaused,
    ev.StopDecided,
    ev.DeliveryEnded,
    ev.SettlementSigned,
    ev.SettlementReverted,
    ev.ConnectionEndedSeen,
    ev.ConnectionEndedBelieved,
    ev.SessionLapsed,
    ev.PortLocked,
)

pytestmark = pytest.mark.timeout(300)


class AgentByClock(Agent):
    """The daemon on a computer with that clock."""

    def __init__(self, stage, config, clock):
        words = (sys.executable, ROOT / "tests/wrong_clock.py", clock, "provider", "run", "--config", config)
        Program.__init__(self, words, config.parent, "agent", surroundings(**QUICK))
        self._stage = stage
        self.journal_path = config.parent / "journal.sqlite"

    def stamps_s(self):
        """When its log lines say that they were written, as unix seconds."""
        lines = (json.loads(line) for line in self.said.splitlines() if line.startswith("{"))
        return [datetime.fromisoformat(line["timestamp"]).timestamp() for line in lines]


@dataclass(frozen=True)
class Played:
    """What one computer did: `decisions` and the settlement; whether its times are the chain's; what its log says."""

    decisions: tuple
    stop_reason: str
    settled: tuple
    chain_s: tuple
    journaled_s: tuple
    stamps_s: tuple
    exit_code: int


def played(folder, clock):
    """One session from auction to settlement, with the daemon started on the wrong side of midnight."""
    folder.mkdir()
    with Stage(folder, broker=False) as stage:
        charger = stage.charger("--power-w-max", "11000")
        agent = stage.played(AgentByClock(stage, stage.config(charger.wire), clock)).started()
        began_s = stage.do(stage.node.head()).timestamp_s
        journey = stage.journey()
        stage.matched(journey, ORDER_WH)
        summary = stage.at_the_plug(journey, http=True).result(120)
        eventually(lambda: agent.has_row(ev.ConnectionEndedBelieved), 60, "the settlement is believed")
        ((log, _),) = stage.logs(contract.ConnectionEnded)
        assert summary.energy_wh_settled == log.delivered_wh
        ended_s = stage.do(stage.node.head()).timestamp_s
        exit_code = agent.stop()
        rows = agent.rows()
        (stop_reason,) = [row.stop_reason for row in rows if isinstance(row, ev.StopDecided)]
        return Played(
            tuple(type(row).__name__ for row in rows if isinstance(row, DECISIONS)),
            stop_reason,
            (log.delivered_wh, log.fee_wei),
            (began_s, ended_s),
            tuple(row.at_s for row in rows),
            tuple(agent.stamps_s()),
            exit_code,
        )


@pytest.fixture(scope="module")
def evenings(tmp_path_factory):
    """One session for each clock."""
    folder = tmp_path_factory.mktemp("clocks")
    with ThreadPoolExecutor(len(CLOCKS)) as pool:
        playing = {clock: pool.submit(played, folder / clock, clock) for clock in CLOCKS}
        return {clock: one.result() for clock, one in playing.items()}


@pytest.mark.parametrize("clock", CLOCKS)
def test_the_session_is_the_same_by_any_clock(evenings, clock):
    """Would catch a validity, deadline, age or time-out that is counted by the wall clock."""
    one = evenings[clock]
    rate = RATE_WEI_PER_KWH * 8 // 10
    assert one.settled == (ORDER_WH, cost_wei_floor(rate, ORDER_WH))
    assert one.stop_reason == "EnergyLimitReached"
    assert one.exit_code == EXIT_DONE
    assert without_pauses(one.decisions) == without_pauses(evenings["right"].decisions)


def without_pauses(decisions):
    """A busy machine may be late with a receipt, which pauses; and which of two blocks is news first may differ."""
    kept = [one for one in decisions if one not in ("DeliveryPaused", "ConnectedFinal")]
    return [
        one for place, one in enumerate(kept) if one != "DeliveryBegan" or "DeliveryBegan" not in kept[:place]
    ]


@pytest.mark.parametrize("clock", CLOCKS)
def test_every_time_in_the_journal_is_the_chains(evenings, clock):
    """Would catch a wall clock that reaches the journal, and by it a decision after the next start."""
    one = evenings[clock]
    began_s, ended_s = one.chain_s
    known = [at_s for at_s in one.journaled_s if at_s]  # 0: before the first header nobody knows the time
    assert len(known) > len(one.decisions) / 2
    assert began_s - 60 <= min(known)
    assert max(known) <= ended_s + 60
    assert sorted(known) == known


def test_the_clocks_were_truly_wrong(evenings):
    """Would catch a story in which every clock was right."""
    true_s = evenings["right"].stamps_s[0]
    assert max(evenings["1970"].stamps_s) < DAY_S
    assert min(evenings["ahead"].stamps_s) > true_s + DAY_S / 2
    jumps = evenings["jumping"].stamps_s
    assert min(jumps) < DAY_S
    assert max(jumps) > true_s + DAY_S / 2
    assert sorted(jumps) != jumps
