"""The daemon as a service: how it ends when systemd says so, when it hangs, when it dies; and what it tells systemd meanwhile.

systemd itself is played here by a socket (what `Type=notify` listens on) and by signals; the words that start and end the
daemon are those of the unit. tests/e2e/test_booted_service.py boots a real one.
"""

import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from itertools import pairwise
from urllib.parse import urlsplit

import pytest
from stage import RATE_WEI_PER_KWH, ROOT, TRUTH_EVERY_S, Program, Stage, eventually
from tcp_proxy import TcpProxy

from agent.chain import contract
from agent.core import events as ev
from agent.core.session import Stage as Life
from agent.core.units import cost_wei_floor
from agent.errors import EXIT_DONE, EXIT_MISCONFIGURED, EXIT_REFUSED

FAILSAFE_S = 2  # as the stage sets it
FAILSAFE_MS_MAX = int(1000 * (FAILSAFE_S + TRUTH_EVERY_S)) + 250  # a quarter second for a busy machine
PATIENT_FAILSAFE = {
    "PORTS__0__FAILSAFE_TIMEOUT_S": 15
}  # so slow that whoever is quicker was not the failsafe
COUNTER_STEP_MWH = 100  # the simulated meter counts tenths of a Wh
UNIT = (ROOT / "config/v2v-agent.service").read_text()
WATCHDOG_S = int(re.findall(r"^WatchdogSec=(\d+)$", UNIT, re.MULTILINE)[0])
CREDIT = {"POLICY__MAX_UNACKED_WH": 4}
PATIENT_CHAIN = {"CHAIN__CONFIRMATIONS": 8, "CHAIN__FINALITY": 8}  # settling lasts eight seconds
NOT_FINAL = {"POLICY__MAX_UNFINAL_WH": 0, "CHAIN__FINALITY": 500}  # authorised, and waiting to be final

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def stage(tmp_path):
    """A market without a broker: the consumer comes through the agent's own door."""
    with Stage(tmp_path, broker=False) as stage:
        yield stage


def now_ms():
    """The machine's monotonic clock, as the charger's truth has it."""
    return time.monotonic_ns() // 1_000_000


def truth_after(charger, at_ms):
    """The first truth that is younger."""
    return eventually(lambda: charger.truth if charger.truth["at_ms"] > at_ms else None, 5, "a new truth")


def zero_after(charger, at_ms, seconds=5):
    """The time of the first truth after `at_ms` with no power and an open contactor."""

    def seen():
        truth = charger.truth
        is_zero = truth["power_w"] == 0 and not truth["energised"]
        return truth["at_ms"] if is_zero and truth["at_ms"] > at_ms else 0

    return eventually(seen, seconds, "the charger is at zero")


def only_session(agent):
    """The one session, replayed from the disk."""
    (session,) = agent.book().sessions.values()
    return session


def is_in(agent, life):
    """Whether the one session stands there, by the disk."""
    book = agent.book()
    return book is not None and [one.stage for one in book.sessions.values()] == [life]


def assert_settled_exactly(stage, agent, charger, energy_wh):
    """One settlement, the same Wh in every book, the truth within one step of the counter, each offer of power after a rest."""
    eventually(lambda: is_in(agent, Life.SETTLED), 40, "the agent believes the settlement")
    ((log, tx_hash),) = stage.logs(contract.ConnectionEnded)
    session = only_session(agent)
    assert session.ended.tx_hash == tx_hash
    assert log.delivered_wh == session.energy_wh_acked == session.energy_wh_delivered == energy_wh
    assert log.fee_wei == cost_wei_floor(RATE_WEI_PER_KWH * 8 // 10, energy_wh)
    moved_mwh = session.register_mwh_end - session.register_mwh_begin
    truth = truth_after(charger, now_ms())
    assert abs(truth["delivered_mwh"] - moved_mwh) < COUNTER_STEP_MWH
    assert moved_mwh >= energy_wh * 1000
    assert not truth["energised"]
    of_power = [type(row) for row in agent.rows() if isinstance(row, ev.DeliveryBegan | ev.DeliveryPaused)]
    assert (ev.DeliveryBegan, ev.DeliveryBegan) not in set(pairwise(of_power))
    return session


# ---- SIGTERM


def test_stopped_in_every_stage_of_one_session(stage):
    """Would catch a `systemctl restart` that leaves power to the failsafe, loses a stage, or hangs while it waits in one."""
    charger, nonce = stage.charger(), stage.nonce(stage.provider.operator)
    journey, buying = stage.journey(), None
    stage.matched(journey, 30)

    def lives_until(life, holds=lambda _agent: True, **settings):
        nonlocal buying
        agent = stage.agent(charger, **(PATIENT_FAILSAFE | settings)).started()
        if buying == "soon":
            buying = stage.at_the_plug(journey, http=True)
        eventually(lambda: is_in(agent, life) and holds(agent), 60, f"the session is {life}")
        asked_at_ms = now_ms()
        assert agent.stop() == EXIT_DONE
        assert zero_after(charger, asked_at_ms, 3)
        truth = charger.truth
        assert not truth["failsafe_tripped"]  # the daemon did it, on its way out
        assert not truth["enabled"]
        assert agent.events()[-1] == "agent.stopping"
        assert is_in(agent, life)  # a stop decides nothing about a session
        return agent

    lives_until(Life.MATCHED)
    buying = "soon"
    lives_until(Life.AUTHORISED, **NOT_FINAL)
    lives_until(Life.DELIVERING, lambda agent: only_session(agent).energy_wh_acked >= 3)
    buying.cancel()
    lives_until(
        Life.PAUSED, lambda agent: agent.session().get("hindrance") == "waiting_for_receipt", **CREDIT
    )
    # Nobody signs: the rest flows on credit, and the stopped session waits for its last receipt.
    lives_until(Life.STOPPING)
    buying = "soon"
    lives_until(Life.SETTLING, lambda agent: agent.has_row(ev.SettlementSigned), **PATIENT_CHAIN)

    agent = stage.agent(charger).started()
    assert buying.result(60).energy_wh_settled == 30
    assert_settled_exactly(stage, agent, charger, 30)
    assert stage.nonce(stage.provider.operator) == nonce + 1


# ---- the owner


def v2v(*words):
    """One `v2v` command of the owner's; the process when it has ended."""
    return subprocess.run(
        (sys.executable, "-m", "agent", *map(str, words)), capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip


def test_the_owner_stops_a_sale_and_proves_it_to_anybody(stage):
    """Would catch an owner who cannot get out of a sale, a sale that is then not paid, and evidence that proves nothing."""
    charger = stage.charger()
    agent = stage.agent(charger).started()
    journey = stage.journey()
    stage.matched(journey, 400)
    buying = stage.at_the_plug(journey, http=True)
    eventually(lambda: agent.delivered_wh() >= 5, 60, "energy flows")
    config = stage.config(charger.wire)
    told = v2v("provider", "stop", "--config", config)
    assert told.returncode == EXIT_DONE, told.stderr
    asked_at_ms = now_ms()
    assert zero_after(charger, asked_at_ms)
    summary = buying.result(60)
    session = assert_settled_exactly(stage, agent, charger, summary.energy_wh_settled)
    assert session.stop_reason == ev.StopReason.LOCAL
    assert 5 <= summary.energy_wh_settled < 400
    assert agent.is_running  # it goes on: the next buyer may come
    operator = stage.provider.operator.address.hex()

    folder = stage.folder / "evidence"
    folder.mkdir()
    exported = v2v("provider", "export", "--all", "--out", folder, "--config", config)
    assert exported.returncode == EXIT_DONE, exported.stderr
    (file,) = folder.iterdir()
    proven = v2v("verify", file, "--operator", f"0x{operator}")
    assert proven.returncode == EXIT_DONE, proven.stdout + proven.stderr
    assert "NOT PROVEN" not in proven.stdout
    honest = file.read_text()
    wh = f'"energy_wh_settled": {summary.energy_wh_settled}'
    assert wh in honest
    file.write_text(honest.replace(wh, f'"energy_wh_settled": {summary.energy_wh_settled + 1}'))
    refused = v2v("verify", file, "--operator", f"0x{operator}")
    assert refused.returncode == EXIT_REFUSED
    assert "NOT PROVEN" in refused.stdout
    assert agent.stop() == EXIT_DONE


# ---- SIGSTOP: a daemon that hangs


def test_a_hang_longer_than_the_failsafe(stage):
    """Would catch power without a master, and a daemon that wakes up as if nothing had been, or never resumes."""
    charger = stage.charger()
    agent = stage.agent(charger).started()
    journey = stage.journey()
    stage.matched(journey, 40)
    buying = stage.at_the_plug(journey, http=True)
    eventually(lambda: agent.delivered_wh() >= 6, 60, "energy flows")

    stopped_at_ms = now_ms()
    agent.signal(signal.SIGSTOP)
    zero_at_ms = zero_after(charger, stopped_at_ms)
    assert zero_at_ms - stopped_at_ms <= FAILSAFE_MS_MAX
    cut = charger.truth
    assert cut["failsafe_tripped"]
    rows = agent.rows()
    later = truth_after(charger, zero_at_ms + 1000)
    assert (later["power_w"], later["delivered_mwh"]) == (0, cut["delivered_mwh"])

    agent.signal(signal.SIGCONT)
    energy_wh = buying.result(60).energy_wh_settled
    session = assert_settled_exactly(stage, agent, charger, energy_wh)
    after = [type(row) for row in agent.rows()[len(rows) :]]
    if ev.DeliveryBegan in after:  # it went on: not before the hang was seen and the register journaled
        assert after.index(ev.DeliveryPaused) < after.index(ev.DeliveryBegan)
        assert energy_wh == 40
    else:  # it ended the session, for what the charger showed
        assert session.stop_detail == "failsafe_tripped"
        assert charger.truth["delivered_mwh"] == cut["delivered_mwh"]
        assert energy_wh == cut["delivered_mwh"] // 1000  # nothing that had flowed was lost
    assert agent.stop() == EXIT_DONE


def test_a_hang_that_outlives_the_entitlement(stage):
    """Would catch a daemon that wakes up after the token's time and goes on delivering by what it knew before it slept."""
    charger = stage.charger()
    agent = stage.agent(charger, POLICY__VALIDITY_MARGIN_S=584).started()  # of 600: sixteen seconds are left
    journey = stage.journey()
    terms = stage.matched(journey, 300)
    buying = stage.at_the_plug(journey, http=True)
    eventually(lambda: agent.delivered_wh() >= 4, 60, "energy flows")
    agent.signal(signal.SIGSTOP)
    zero_after(charger, now_ms())
    cut = charger.truth

    def is_too_late():
        return stage.do(stage.node.head()).timestamp_s > terms.valid_until_s - 584

    eventually(is_too_late, 40, "the token's time is over")
    agent.signal(signal.SIGCONT)
    summary = buying.result(60)
    session = assert_settled_exactly(stage, agent, charger, summary.energy_wh_settled)
    assert session.stop_reason == "TimeLimitReached"
    assert charger.truth["delivered_mwh"] == cut["delivered_mwh"]  # not even for one beat
    assert sum(isinstance(row, ev.DeliveryBegan) for row in agent.rows()) == 1


# ---- ExecStopPost


def unit_words(setting, config):
    """What the unit runs, with this interpreter and this configuration."""
    (line,) = re.findall(rf"^{setting}=(.*)$", UNIT, re.MULTILINE)
    _program, *words = line.split()
    assert words[-2] == "--config"
    return (sys.executable, "-m", "agent", *words[:-1], config)


def test_after_a_kill_the_unit_makes_the_charger_safe_before_its_failsafe_would(stage):
    """Would catch an ExecStopPost that needs the journal's lock, the node or the keys, or that waits for the failsafe."""
    charger = stage.charger("--power-w-max", "4400")
    agent = stage.agent(charger, **PATIENT_FAILSAFE).started()
    journey = stage.journey()
    stage.matched(journey, 60)
    buying = stage.at_the_plug(journey, http=True)
    eventually(lambda: agent.delivered_wh() >= 1, 60, "energy flows")
    config = stage.config(charger.wire)
    for key in stage.folder.glob("keys/alice-*.key"):
        key.rename(key.with_suffix(".gone"))
    config.write_text(config.read_text().replace(stage.net.url_ws, "wss://nobody.invalid:1"))
    killed_at_ms = agent.kill()
    done = subprocess.run(
        unit_words("ExecStopPost", config), capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (EXIT_DONE, "left: open\n", "")
    assert zero_after(charger, killed_at_ms, 1)
    assert not charger.truth["failsafe_tripped"]
    assert now_ms() - killed_at_ms < 1000 * 15
    buying.cancel()


def test_a_typo_ends_with_the_code_that_the_unit_does_not_restart_on(stage):
    """Would catch a restart loop over a mistake that only a human can mend, and a mistake that keeps the charger on."""
    charger = stage.charger()
    config = stage.config(charger.wire)
    config.write_text(config.read_text().replace("confirmations", "confirmation"))
    with Program(unit_words("ExecStart", config), stage.folder, "typo") as program:
        assert program.ended() == EXIT_MISCONFIGURED
    assert re.findall(r"^RestartPreventExitStatus=(\d+)$", UNIT, re.MULTILINE) == [
        str(program.process.returncode)
    ]
    assert 'did you mean "confirmations"?' in program.said
    with Program(unit_words("ExecStopPost", config), stage.folder, "make-safe") as program:
        assert program.ended() == EXIT_DONE
    assert program.said == "left: open\n"


# ---- the watchdog


class Manager:
    """systemd's side of `Type=notify` and `WatchdogSec=`."""

    def __init__(self, folder):
        self.path = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._socket.settimeout(0)
        self.lines, self.pings_at_s = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._socket.close()

    def hear(self):
        """Take what was said since; all lines so far."""
        while True:
            try:
                news = self._socket.recv(4096).decode().split("\n")
            except BlockingIOError:
                return self.lines
            self.lines += news
            self.pings_at_s += [time.monotonic()] * news.count("WATCHDOG=1")

    def pings_for(self, seconds):
        """How many pings come within the next `seconds`; those that waited in the socket do not count."""
        self.hear()
        before, until = len(self.pings_at_s), time.monotonic() + seconds
        while time.monotonic() < until:
            self.hear()
            time.sleep(0.05)
        return len(self.pings_at_s) - before

    def status(self, pattern, seconds=30):
        """Wait for a status line."""

        def said():
            return any(re.match(f"STATUS=.*{pattern}", line) for line in self.hear()[-5:])

        eventually(said, seconds, f"STATUS says {pattern}")


def test_the_watchdog_is_fed_by_beats_and_by_nothing_else(stage, monkeypatch):
    """Would catch a restart because the node, the broker or the charger is away, and pings from a daemon that hangs."""
    charger = stage.charger()
    with ExitStack() as held:
        manager = held.enter_context(Manager(stage.folder))
        tunnel = stage.enter(held, TcpProxy(urlsplit(stage.net.url_ws).port))
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        monkeypatch.setenv("WATCHDOG_USEC", f"{WATCHDOG_S}000000")
        agent = stage.agent(
            charger,
            CHAIN__URLS=f"ws://127.0.0.1:{tunnel.port}",
            CHAIN__MAX_VIEW_AGE_S=5,
            MQTT__URL="mqtt://127.0.0.1:9",  # no broker has ever been there
        ).started()
        eventually(lambda: "READY=1" in manager.hear(), 30, "READY")
        agent.heard(r'"mqtt\.down"')
        manager.status("left: idle$")
        assert manager.pings_for(3) >= 2

        charger.signal(signal.SIGSTOP)  # a wire that is dead, and handled
        manager.status("charger_silent")
        assert manager.pings_for(WATCHDOG_S / 2) >= 2  # seldom, but twice as often as needed
        charger.signal(signal.SIGCONT)
        manager.status("left: idle$")

        tunnel.freeze()
        manager.status("chain view is")
        assert manager.pings_for(3) >= 2

        agent.signal(signal.SIGSTOP)
        assert manager.pings_for(3) == 0  # in the unit: SIGABRT, then ExecStopPost, then a new start
        agent.signal(signal.SIGCONT)
        eventually(lambda: manager.pings_for(0.5), 10, "it lives again")
        assert agent.stop() == EXIT_DONE
        assert manager.hear()[-1] == "STOPPING=1"
        assert manager.lines.count("READY=1") == 1
