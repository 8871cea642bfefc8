"""The real daemon, killed at random instants of whole sessions, again and again on one journal: no Wh lost, none paid twice.

One chain, one charger (a process that outlives every daemon and tells the truth by a file) and one consumer over HTTP, who
buys one order after the other. The instants are drawn from a seed: a delay after the daemon's birth, so that its start is
hit too, or after it has begun to run. Twenty kills, or two hundred with `--long`.
"""

import contextlib
import random
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from itertools import pairwise

import pytest
from stage import BIDDING_S, RATE_WEI_PER_KWH, TRUTH_EVERY_S, Stage, eventually, note

from agent.chain import contract
from agent.consumer.journey import Order
from agent.core import events as ev
from agent.core.session import Stage as Life
from agent.core.units import cost_wei_floor
from agent.errors import Transient

SEED = 20261122
KILLS_OF_A_SESSION = 8  # then it may finish in peace, so that a run has an end
ORDER_WH = (8, 30)
BORN_S, RUNNING_S = 2.0, 4.0  # how long a killed daemon lives: since its birth, or since it runs
WHILE_BEING_BORN = 0.25  # of all kills
KNOCK_S = 0.06  # a consumer who knocks ever more seldom would mostly find the door of a dead daemon
POWER_W_MAX = 22_080  # 32 A on three phases
FAILSAFE_S = 2  # as the stage sets it
FAILSAFE_MS_MAX = int(1000 * (FAILSAFE_S + TRUTH_EVERY_S)) + 250  # a quarter second for a busy machine
COUNTER_STEP_MWH = 100  # the simulated meter counts tenths of a Wh
OVERRUN_MWH_MAX = POWER_W_MAX * FAILSAFE_MS_MAX // 3600  # a kill just before the end of the order
PATIENCE_S = 180  # for one purchase whose provider dies all the time


class Story:
    """What is needed to kill, to check, and to tell what was done when a check fails."""

    def __init__(self, stage, seed):
        self.stage, self.chance = stage, random.Random(seed)
        self.charger = stage.charger()
        self.journey = stage.journey()
        self.journey.waits = replace(self.journey.waits, knock_s=KNOCK_S)
        self.agent = stage.agent(self.charger)
        self.kills, self.where = 0, Counter()
        self.settled = set()

    def kill_once(self, buying):
        """Let the daemon live for a drawn time, kill it, see the charger at zero, start the next. False: bought meanwhile."""
        newborn = self.chance.random() < WHILE_BEING_BORN
        lives_s = self.chance.uniform(0, BORN_S if newborn else RUNNING_S)
        restarts_at_once = self.chance.random() < 0.5
        if not newborn:
            self.agent.started()
        if wait({buying}, lives_s).done:
            return False
        assert self.agent.is_running, self.agent.said
        killed_at_ms = self.agent.kill()
        rows = self.agent.rows()
        self.where[self.stage_now() if not newborn else "being born"] += 1
        self.kills += 1
        if restarts_at_once:
            self.agent = self.stage.agent(self.charger)
        zero_at_ms = eventually(lambda: self.is_zero_since(killed_at_ms), 10, f"zero after kill {self.kills}")
        assert zero_at_ms - killed_at_ms <= FAILSAFE_MS_MAX
        if not restarts_at_once:
            assert self.agent.rows() == rows  # nobody writes for the dead
            self.agent = self.stage.agent(self.charger)
        eventually(lambda: self.agent.rows()[: len(rows)] == rows, 5, "what was on the disk is on the disk")
        return True

    def stage_now(self):
        """Where the newest session stood when the daemon died."""
        book = self.agent.book()
        stages = [one.stage.value for one in book.sessions.values() if one.terms.token not in self.settled]
        return stages[0] if stages else "no session"

    def is_zero_since(self, at_ms):
        """The time of the newest truth, if that is younger and shows nothing flowing."""
        truth = self.charger.truth
        return truth["at_ms"] if truth["at_ms"] > at_ms and self.charger.is_at_zero() else 0

    def matched(self, energy_wh):
        """A new session on the chain, which the daemon does not believe yet."""
        order = Order(energy_wh, RATE_WEI_PER_KWH, BIDDING_S, 600)
        starting = self.stage.begin(self.journey.start_auction(order))
        self.stage.bid()
        starting.result(60)
        self.stage.do(self.journey.connect())

    def charged(self):
        """The rest of a purchase, for a thread of its own: its summary. Tries again whenever nobody is at the door."""
        until = time.monotonic() + PATIENCE_S
        while True:
            with contextlib.suppress(Transient):
                return self.stage.at_the_plug(self.journey, http=True).result(PATIENCE_S)
            assert time.monotonic() < until, "the purchase does not end"
            time.sleep(0.2)

    def assert_settled_exactly(self, summary, energy_wh, truth_mwh_before):
        """One settlement for the newest session, the same Wh in every book, the truth within one step of the counter."""
        session = eventually(self.newest_settled, 40, "the agent believes the settlement")
        self.settled.add(session.terms.token)
        ends = [
            one for one in self.stage.logs(contract.ConnectionEnded) if one[0].token == session.terms.token
        ]
        assert len(ends) == 1
        log, tx_hash = ends[0]
        cost_wei = cost_wei_floor(RATE_WEI_PER_KWH * 8 // 10, energy_wh)
        assert (log.delivered_wh, log.fee_wei) == (energy_wh, cost_wei)
        assert (summary.energy_wh_settled, summary.settlement_tx) == (energy_wh, tx_hash)
        assert session.energy_wh_delivered == session.energy_wh_acked == energy_wh
        assert session.ended.energy_wh_settled == session.energy_wh_acked
        eventually(lambda: self.is_zero_since(time.monotonic_ns() // 1_000_000 - 1000), 5, "a new truth")
        moved_mwh = session.register_mwh_end - session.register_mwh_begin
        truth_mwh = self.charger.truth["delivered_mwh"] - truth_mwh_before
        assert abs(truth_mwh - moved_mwh) < COUNTER_STEP_MWH, (truth_mwh, moved_mwh)
        # Never less than was paid for; and more only by what flows until the failsafe acts, which can only happen once.
        assert energy_wh * 1000 <= moved_mwh < (energy_wh + 1) * 1000 + OVERRUN_MWH_MAX

    def newest_settled(self):
        """The session that was settled since we last looked; None while there is none."""
        book = self.agent.book()
        found = [one for one in book.sessions.values() if one.terms.token not in self.settled]
        return found[0] if found and found[0].stage is Life.SETTLED else None


def assert_no_resume_into_delivery(rows):
    """Between any two offers of power of one session, its segment was closed: a restart never goes on as if nothing had been."""
    of_session = {}
    for row in rows:
        if isinstance(row, ev.DeliveryBegan | ev.DeliveryPaused | ev.DeliveryEnded):
            of_session.setdefault(row.session_id, []).append(type(row))
    for kinds in of_session.values():
        assert (ev.DeliveryBegan, ev.DeliveryBegan) not in set(pairwise(kinds))


def killed_at_random(folder, seed, kills_wanted):
    """One session after the other until so many daemons were killed; every check after every kill and every session."""
    began_s = time.monotonic()
    with Stage(folder, broker=False) as stage, ThreadPoolExecutor(1) as pool:
        story = Story(stage, seed)
        nonce = stage.nonce(stage.provider.operator)
        while story.kills < kills_wanted:
            energy_wh, before_mwh = story.chance.randint(*ORDER_WH), story.charger.truth["delivered_mwh"]
            story.matched(energy_wh)
            buying = pool.submit(story.charged)
            of_session = 0
            while of_session < KILLS_OF_A_SESSION and story.kills < kills_wanted and story.kill_once(buying):
                of_session += 1
            story.assert_settled_exactly(buying.result(PATIENCE_S), energy_wh, before_mwh)
        sessions = len(story.settled)
        assert_no_resume_into_delivery(story.agent.rows())
        assert stage.nonce(stage.provider.operator) == nonce + sessions  # one transaction each, none reverted
        assert len(stage.logs(contract.ConnectionEnded)) == sessions
        assert story.agent.stop() == 0
    hit = ", ".join(f"{count} {where}" for where, count in story.where.most_common())
    took_s = time.monotonic() - began_s
    note(f"{story.kills} kills in {sessions} sessions, {took_s:.0f} s, seed {seed}: {hit}; nothing lost")


@pytest.mark.timeout(300)
def test_killed_at_random(tmp_path):
    """Would catch an instant at which a crash loses a Wh, settles twice, leaves power on, or a session that never ends."""
    killed_at_random(tmp_path, SEED, 20)


@pytest.mark.long
@pytest.mark.timeout(5400)
def test_killed_at_random_for_long(tmp_path):
    """Would catch the instants that twenty kills do not hit."""
    killed_at_random(tmp_path, SEED + 1, 200)
