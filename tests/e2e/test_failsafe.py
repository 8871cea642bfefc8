"""A hung daemon, and chargers that do not do as they are told: the power ends all the same, and the session is settled.

What `kill -9` leaves behind is test_kill's. Here the daemon stands still with everything open (SIGSTOP: a board that swaps, a
stuck disk), dies while its charger has stopped listening, or lives and has a charger that lies. The charger's evening is a
scenario file (docs/simulator.md); its truth comes from the simulator's own plant, whatever the wire was told.
"""

import json
import signal
import time

import pytest
from stage import Stage, eventually, note

from agent.chain import contract
from agent.core import events as ev
from agent.core.session import Stage as Life

FAILSAFE_S = 2  # as the stage sets it
FAILSAFE_MS_MAX = (
    1000 * FAILSAFE_S + 250
)  # armed to the millisecond; a last keep-alive may still be on the wire
SLOW_FAILSAFE = {"PORTS__0__FAILSAFE_TIMEOUT_S": 15}  # so that it is the daemon who ends the power

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def stage(tmp_path):
    """A market on anvil where it is installed, and an MQTT broker."""
    with Stage(tmp_path) as stage:
        yield stage


def scenario(stage, text):
    """The option that makes a charger's evening go so."""
    path = stage.folder / "scenario.toml"
    path.write_text(text)
    return ("--scenario", path, "--record", stage.folder / "trace.jsonl")


def buys(stage, agent, energy_wh, until_wh):
    """A session of `energy_wh` with `until_wh` of it delivered; the purchase, still under way."""
    journey = stage.journey()
    stage.matched(journey, energy_wh)
    buying = stage.at_the_plug(journey)
    eventually(lambda: agent.delivered_wh() >= until_wh, 60, f"{until_wh} Wh flow")
    return buying


def settled(stage, agent, buying):
    """The one session as the journal has it, settled once and for the same Wh in every book."""
    summary = buying.result(60)
    eventually(lambda: agent.session().get("stage") == "SETTLED", 30, "the agent believes the settlement")
    ((log, _),) = stage.logs(contract.ConnectionEnded)
    (session,) = agent.book().sessions.values()
    assert session.stage is Life.SETTLED
    assert log.delivered_wh == summary.energy_wh_settled == session.energy_wh_delivered
    assert session.energy_wh_delivered <= session.order_wh
    moved_wh = (session.register_mwh_end - session.register_mwh_begin) // 1000
    note(
        f"{stage.folder.name}: settled {log.delivered_wh} of {session.order_wh} Wh, counter moved {moved_wh}"
    )
    assert session.energy_wh_delivered <= moved_wh, "never more than the counter"
    return session


def was_locked(stage):
    """The recorded bus has a lock written: the word 1 to the simulated charger's address 202."""
    lock = bytes([16]) + (202).to_bytes(2, "big") + bytes([0, 1, 2, 0, 1])
    return any(
        row.get("by") == "master" and bytes.fromhex(row["hex"])[7:] == lock
        for row in map(json.loads, (stage.folder / "trace.jsonl").read_text().splitlines())
    )


def zero_after(charger, at_ms):
    """For how long power flowed on after `at_ms`, by the plant's own clock."""
    charger.zero_at_ms(FAILSAFE_S + 30)
    return charger.truth["zero_at_ms"] - at_ms


def test_a_daemon_that_stands_still_on_a_serial_line(stage):
    """Would catch a failsafe fed by an open port instead of a living control loop, and a session lost with the pause."""
    charger = stage.charger(where=("--pty", stage.folder / "ttyV2V"))
    agent = stage.agent(charger).started()
    buying = buys(stage, agent, 20, 3)

    agent.signal(signal.SIGSTOP)
    still_at_ms = time.monotonic_ns() // 1_000_000
    assert zero_after(charger, still_at_ms) <= FAILSAFE_MS_MAX
    assert charger.truth["failsafe_tripped"]
    agent.signal(signal.SIGCONT)

    session = settled(stage, agent, buying)
    assert session.energy_wh_delivered >= 3


@pytest.mark.long  # test_kill has the same with a charger that listens
def test_killed_while_its_charger_has_stopped_listening(stage):
    """Would catch a failsafe that is only as good as the writes before it: nothing but the timer ends this power."""
    deaf = "[[fault]]\nafter_wh = 2\nplant = 'ignores_stop'\n"
    charger = stage.charger(*scenario(stage, deaf))
    agent = stage.agent(charger).started()
    buying = buys(stage, agent, 20, 3)

    assert zero_after(charger, agent.kill()) <= FAILSAFE_MS_MAX
    assert charger.truth["failsafe_tripped"]
    buying.cancel()  # how such a session goes on is test_kill's


def test_a_charger_that_ignores_the_stop_is_locked(stage):
    """Would catch a stop that is believed because it was acknowledged: the set point shows 0 and 22 kW flow on."""
    deaf = "[[fault]]\nafter_wh = 2\nplant = 'ignores_stop'\n"
    charger = stage.charger(*scenario(stage, deaf))
    agent = stage.agent(charger, **SLOW_FAILSAFE).started()
    buying = buys(stage, agent, 8, 1)

    session = settled(stage, agent, buying)
    assert session.energy_wh_delivered == 8
    assert was_locked(stage)
    eventually(charger.is_at_zero, 10, "locked, it is at zero")
    moved_mwh = session.register_mwh_end - session.register_mwh_begin
    assert moved_mwh > 8_500, "it must have ignored the stop, or this shows nothing"


def test_a_welded_contactor_is_cut_off_from_outside_and_its_port_locked_out(stage):
    """Would catch a cut-off that is named and never run, a welded contactor that is sold from again, and a consumer who is
    left without a settlement by it.
    """
    welded = "".join(
        f"[[fault]]\nafter_wh = 2\nplant = '{what}'\n" for what in ("contactor_stuck", "car_deaf")
    )
    charger = stage.charger(*scenario(stage, welded))
    breaker = f"['kill', '-USR1', '{charger.process.pid}']"
    settings = {"PORTS__0__EXTERNAL_CUT_OFF": "K1", "PORTS__0__CUT_OFF_COMMAND": breaker}
    agent = stage.agent(charger, POLICY__STOP_DEADLINE_S=9, **settings).started()
    buying = buys(stage, agent, 8, 1)

    session = settled(stage, agent, buying)
    assert session.energy_wh_delivered == 8
    assert session.end_seen_open is False
    assert was_locked(stage), "tried first, in vain"
    assert "charger.cut_off" in agent.events()
    assert charger.truth["contactor_closed"], "neither lock nor failsafe opens a weld"
    assert charger.truth["failsafe_tripped"]
    assert charger.truth["power_w"] == 0, "the breaker did"
    assert list(agent.book().locked_ports) == ["left"]


def test_a_box_that_charges_while_disabled_is_locked_without_any_session(stage):
    """Would catch a daemon that looks at its charger only while it sells (evcc #33436: 10.7 kW while disabled)."""
    charger = stage.charger(*scenario(stage, "[[fault]]\nplant = 'charges_while_disabled'\n"))
    agent = stage.agent(charger, **SLOW_FAILSAFE).started()

    eventually(lambda: was_locked(stage), 40, "the box is locked")
    assert charger.truth["delivered_mwh"] > 0, "it must have charged, or this shows nothing"
    eventually(lambda: agent.has_row(ev.PortLocked), 10, "the port is locked out")
    row_at_ms = charger.truth["at_ms"]
    eventually(lambda: charger.truth["at_ms"] > row_at_ms + 1_000, 10, "the lock is written, too")
    eventually(charger.is_at_zero, 10, "locked, it is at zero")
    locked = charger.truth
    eventually(lambda: charger.truth["at_ms"] > locked["at_ms"] + 5_000, 30, "five seconds pass")
    assert charger.truth["delivered_mwh"] == locked["delivered_mwh"], "it was unlocked, and began again"
    assert agent.is_running
