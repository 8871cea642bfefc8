"""The real daemon under a flood at both doors, behind a real mosquitto: the sale goes on as if nobody shouted."""

import json
import os
import shutil
import sys
import time
from pathlib import Path

import pytest
from stage import ROOT, Program, Stage, eventually, free_port, note, surroundings

from agent.core.units import hex0x
from agent.demo.market import written

ORDER_WH, BEFORE_WH = 60, 5
PROCESSOR_MAX = 0.8  # of one, beside 0.6 for everything that rests: its other threads, and the system's part
MEMORY_MIB_MAX = 16

pytestmark = pytest.mark.timeout(240)


def mosquitto(folder, port):
    """A broker that lets everybody in, with the limits that we ship."""
    program = shutil.which("mosquitto", path=surroundings()["PATH"])
    if program is None:
        pytest.skip("mosquitto is not installed: apt-get install mosquitto")
    shipped = (ROOT / "config/mosquitto/v2v.conf").read_text().splitlines()
    limits = [line for line in shipped if line.startswith("max_")]
    assert len(limits) == 4
    lines = [f"listener {port} 127.0.0.1", "allow_anonymous true", *limits]
    if os.getuid() == 0:
        lines.append("user root")
    return Program(
        [program, "-c", written(folder / "mosquitto.conf", "\n".join(lines) + "\n")], folder, "mosquitto"
    )


def vandal(stage, *words):
    """Shouts until it is killed."""
    environ = surroundings() | {"PYTHONPATH": str(ROOT)}
    return Program(
        [sys.executable, ROOT / "tests/vandals.py", *words], stage.folder, f"vandal-{words[0]}", environ
    )


class Watched:
    """What a process uses between two looks."""

    def __init__(self, pid):
        self._pid = pid
        self.began_s, self.worked_s, self.resident_mib = time.monotonic(), *self._now()

    def _now(self):
        here = Path(f"/proc/{self._pid}")
        fields = (here / "stat").read_text(encoding="ascii").rpartition(")")[2].split()
        pages = int((here / "statm").read_text(encoding="ascii").split()[1])
        ticks = int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK"), pages * os.sysconf("SC_PAGE_SIZE") / 2**20

    def since(self):
        """(part of a processor, MiB more) since the first look."""
        worked_s, resident_mib = self._now()
        passed_s = time.monotonic() - self.began_s
        return (worked_s - self.worked_s) / passed_s, resident_mib - self.resident_mib


def test_a_sale_goes_on_although_both_doors_are_flooded(tmp_path):
    """Would catch a flood that stops the charger's beat (its failsafe would trip), takes the whole processor, fills the memory,
    cuts the car off from its broker, or keeps a paying consumer's receipts away.
    """
    port = free_port()
    with mosquitto(tmp_path, port), Stage(tmp_path, broker_port=port) as stage:
        charger = stage.charger()
        agent = stage.agent(charger).started()
        journey = stage.journey()
        stage.matched(journey, ORDER_WH)
        buying = stage.at_the_plug(journey)
        eventually(lambda: agent.delivered_wh() >= BEFORE_WH, 60, f"{BEFORE_WH} Wh flow")
        root = f"v2v/1/{hex0x(stage.provider.owner.address)}"
        with vandal(stage, "mqtt", port, root), vandal(stage, "http", stage.http_port):
            used = Watched(agent.process.pid)
            eventually(
                lambda: charger.truth["delivered_mwh"] >= ORDER_WH * 1000, 120, "the order is delivered"
            )
            processor, memory_mib = used.since()
            summary = buying.result(90)
        note(f"under both floods: {processor:.0%} of a processor, {memory_mib:+.1f} MiB")
        assert (summary.energy_wh_ordered, summary.energy_wh_settled) == (ORDER_WH, ORDER_WH)
        assert processor < PROCESSOR_MAX
        assert memory_mib < MEMORY_MIB_MAX
        lines = [json.loads(line) for line in agent.said.splitlines() if line.startswith("{")]
        assert "charger.lost" not in agent.events()
        assert [line for line in lines if line["event"] == "mqtt.down" and line["line"] == "car"] == []
        (session,) = agent.book().sessions.values()
        assert session.credit_pauses == 0, "its receipts came through, and in time"
