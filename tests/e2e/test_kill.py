"""What a dying daemon leaves behind: a charger at zero, a journal that goes on, and money that is right to the Wh.

The daemon is the real one, in a process of its own; it is killed as the kernel kills (`kill -9`) or stopped as systemd
stops (SIGTERM), and started again on the same journal. The charger is another process and tells the truth by a file.
"""

import functools
from itertools import pairwise

import pytest
from stage import RATE_WEI_PER_KWH, TRUTH_EVERY_S, Stage, eventually, free_port, note

from agent.chain import contract
from agent.core import events as ev
from agent.core.session import Stage as Life
from agent.core.units import cost_wei_floor
from agent.errors import EXIT_UNREACHABLE

FAILSAFE_S = 2  # as the stage sets it
FAILSAFE_MS_MAX = int(1000 * (FAILSAFE_S + TRUTH_EVERY_S)) + 250  # a quarter second for a busy machine
COUNTER_STEP_MWH = 100  # the simulated meter counts tenths of a Wh
OF_POWER = ("DeliveryBegan", "DeliveryPaused", "StopDecided", "DeliveryEnded")

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def stage(tmp_path):
    """A market on anvil where it is installed, and an MQTT broker."""
    with Stage(tmp_path) as stage:
        yield stage


def rests_between_segments(rows):
    """The events between each two offers of power, as names."""
    names = [type(row).__name__ for row in rows]
    began = [place for place, name in enumerate(names) if name == "DeliveryBegan"]
    return [names[one:other] for one, other in pairwise(began)]


def assert_settled_exactly(stage, agent, charger, summary, energy_wh):
    """One settlement on the chain, and the same Wh in every book; the truth within one step of the counter."""
    eventually(lambda: agent.session().get("stage") == "SETTLED", 30, "the agent believes the settlement")
    ended = stage.logs(contract.ConnectionEnded)
    assert len(ended) == 1
    log, tx_hash = ended[0]
    rate = RATE_WEI_PER_KWH * 8 // 10
    assert (log.delivered_wh, log.fee_wei) == (energy_wh, cost_wei_floor(rate, energy_wh))
    assert (summary.energy_wh_ordered, summary.energy_wh_settled) == (energy_wh, energy_wh)
    assert summary.settlement_tx == tx_hash
    (session,) = agent.book().sessions.values()  # replayed from the disk, not what the agent says
    assert session.stage is Life.SETTLED
    assert session.energy_wh_delivered == session.energy_wh_acked == energy_wh
    assert session.ended.tx_hash == tx_hash
    moved_mwh = session.register_mwh_end - session.register_mwh_begin
    truth = charger.truth
    note(
        f"{stage.folder.name}: ordered {energy_wh * 1000} mWh, counter {moved_mwh}, truth {truth['delivered_mwh']}"
    )
    assert abs(truth["delivered_mwh"] - moved_mwh) < COUNTER_STEP_MWH
    assert energy_wh * 1000 <= moved_mwh < (energy_wh + 1) * 1000
    assert charger.is_at_zero()


def buys(stage, agent, energy_wh, until_wh):
    """A session of `energy_wh` with power flowing and `until_wh` of it delivered; the purchase, still under way."""
    journey = stage.journey()
    stage.matched(journey, energy_wh)
    buying = stage.at_the_plug(journey)
    eventually(lambda: agent.delivered_wh() >= until_wh, 60, f"{until_wh} Wh flow")
    return buying


def test_killed_while_power_flows(stage):
    """Would catch power without a master, a resume straight into delivery, and energy lost or paid twice."""
    charger = stage.charger()
    agent = stage.agent(charger).started()
    buying = buys(stage, agent, 40, 8)

    killed_at_ms = agent.kill()
    zero_at_ms = charger.zero_at_ms(FAILSAFE_S + 5)
    assert zero_at_ms - killed_at_ms <= FAILSAFE_MS_MAX
    assert charger.truth["failsafe_tripped"]
    rows_before = agent.rows()

    agent = stage.agent(charger).started()
    summary = buying.result(60)
    assert_settled_exactly(stage, agent, charger, summary, 40)
    rows = agent.rows()
    assert rows[: len(rows_before)] == rows_before
    of_power = [row for row in rows[len(rows_before) :] if type(row).__name__ in OF_POWER]
    assert isinstance(of_power[0], ev.DeliveryPaused)
    assert of_power[0].reason == "restarted"
    rests = rests_between_segments(rows)
    assert rests
    assert all("DeliveryPaused" in rest for rest in rests)


def test_stopped_while_power_flows(stage):
    """Would catch a `systemctl restart` that leaves power to the failsafe, or a session that does not go on after it."""
    charger = stage.charger()
    agent = stage.agent(charger, PORTS__0__FAILSAFE_TIMEOUT_S=15).started()
    buying = buys(stage, agent, 30, 8)

    assert agent.stop() == 0
    assert charger.zero_at_ms(3)
    assert not charger.truth["failsafe_tripped"]  # the daemon did it, on its way out
    assert not charger.truth["enabled"]
    assert agent.events()[-1] == "agent.stopping"

    agent = stage.agent(charger).started()
    summary = buying.result(60)
    assert_settled_exactly(stage, agent, charger, summary, 30)
    assert rests_between_segments(agent.rows())


def test_the_charger_is_safe_before_anybody_is_asked(stage):
    """Would catch a restart that first waits for its node, while power flows that nobody masters."""
    charger = stage.charger("--power-w-max", "4400")
    agent = stage.agent(charger, PORTS__0__FAILSAFE_TIMEOUT_S=15).started()
    buying = buys(stage, agent, 60, 2)

    agent.kill()
    blind = stage.agent(charger, CHAIN__URLS=f"ws://127.0.0.1:{free_port()}", PORTS__0__FAILSAFE_TIMEOUT_S=15)
    assert blind.ended() == EXIT_UNREACHABLE
    assert charger.zero_at_ms(3)
    assert not charger.truth["failsafe_tripped"]  # its 15 s are not over: it was the blind daemon
    buying.cancel()


def test_killed_after_the_settlement_is_signed(stage):
    """Would catch a settlement that is signed anew after a crash: two transactions, one of them reverting, for one session."""
    charger = stage.charger()
    agent = stage.agent(charger).started()
    nonce = stage.nonce(stage.provider.operator)
    buying = buys(stage, agent, 10, 1)

    eventually(lambda: agent.has_row(ev.SettlementSigned), 60, "the settlement is signed")
    agent.kill()
    (signed,) = [row for row in agent.rows() if isinstance(row, ev.SettlementSigned)]

    agent = stage.agent(charger).started()
    summary = buying.result(60)
    assert_settled_exactly(stage, agent, charger, summary, 10)
    assert summary.settlement_tx == signed.tx_hash
    assert stage.nonce(stage.provider.operator) == nonce + 1


def test_killed_at_every_step_of_one_session(stage):
    """Would catch a step whose crash loses the token, the accept, the segment, the end register or the settlement."""
    charger = stage.charger()
    agent = stage.agent(charger).started()
    nonce = stage.nonce(stage.provider.operator)
    journey = stage.journey()
    stage.matched(journey, 30)
    buying = None
    steps = (
        ev.ConnectedSeen,
        ev.ConnectedBelieved,  # MATCHED, nobody at the plug yet
        ev.SessionAccepted,
        ev.DeliveryBegan,
        ev.StopDecided,
        ev.DeliveryEnded,
        ev.SettlementSigned,
        ev.ConnectionEndedSeen,
    )
    for step in steps:
        if step is ev.SessionAccepted:
            buying = stage.at_the_plug(journey)
        eventually(functools.partial(agent.has_row, step), 60, step.__name__)
        agent.kill()
        agent = stage.agent(charger).started()

    summary = buying.result(60)
    assert_settled_exactly(stage, agent, charger, summary, 30)
    assert stage.nonce(stage.provider.operator) == nonce + 1
    assert all("DeliveryPaused" in rest for rest in rests_between_segments(agent.rows()))
