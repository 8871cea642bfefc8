"""`v2v charger commission`, from the settings file to the signed report that the agent believes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict

import pytest
from plug import eventually
from town import v2v

from agent.cli import commission as command
from agent.commissioned import require_commissioned
from agent.config import load_installation
from agent.errors import EXIT_MISCONFIGURED, EXIT_REFUSED, EXIT_USAGE, Misconfigured
from agent.keys import load_meter_signer
from firmware_bridge.charger import Identity
from firmware_bridge.commissioning import Patience
from firmware_bridge.mapped_charger import ChargerConfig
from firmware_bridge.opening import editions
from firmware_bridge.simulator import PlantConfig, Simulator, SimulatorConfig

QUICK = PlantConfig(ev_lag_ms=100, ev_ramp_ma_per_s=200_000, force_open_ms=500)
PATIENCE = Patience(begin_s=10, follow_s=8, silent_s=0.3, rest_s=0.2, refresh_s=0.1, answer_s=0.3)
SETTINGS = """\
[keys]
meter = "./meter.key"
[[ports]]
name = "left"
map = "simulated"
wire = "{wire}"
current_ma_max = 32_000
phase_count = 3
failsafe_timeout_s = 1
[journal]
path = "./journal.sqlite"
"""


@pytest.fixture
def quick(monkeypatch):
    """The same checks in less time."""
    run = command._run
    monkeypatch.setattr(command, "_run", lambda config, tell: run(config, tell, PATIENCE))
    # The command runs in a thread of this test; signals are the process story's, below.
    monkeypatch.setattr(command, "_hear_signals", lambda _: None)


def installed(folder, wire):
    """A settings file and a meter key."""
    key = folder / "meter.key"
    key.write_text("0x" + "5a" * 32)
    key.chmod(0o600)
    file = folder / "agent.toml"
    file.write_text(SETTINGS.format(wire=wire))
    return file


async def test_the_report_is_signed_and_the_agent_believes_it(tmp_path, quick):
    """Would catch a report whose signature, subject or verdict the daemon judges otherwise than its writer."""
    async with Simulator(SimulatorConfig(tcp="127.0.0.1:0", plant=QUICK)) as simulator:
        file = installed(tmp_path, simulator.wire)
        said = await asyncio.to_thread(v2v, "charger", "commission", "--config", str(file), "--yes")
        assert said.exit_code == 0, said.out + said.err
        assert "passed   failsafe by silence" in said.out
        assert not simulator.truth().energised
    path = tmp_path / "left.commissioning.json"
    report = json.loads(path.read_text())
    assert report["passed"] is True
    settings = load_installation(file, {})
    port = settings.ports[0]
    config = ChargerConfig.model_validate(port.charger_settings())
    question = {
        "installed": port.installed(),
        "editions": editions(config),
        "identity": asdict(Identity(**report["identity"])),
        "signer": load_meter_signer(settings.keys.meter, environ={}),
    }
    require_commissioned(path, "left", **question)
    path.write_text(path.read_text().replace('"passed": true', '"passed":  true'))
    require_commissioned(path, "left", **question)  # blanks are nobody's business
    path.write_text(path.read_text().replace("4140 W", "4141 W"))
    with pytest.raises(Misconfigured, match="changed after"):
        require_commissioned(path, "left", **question)


async def test_what_does_not_pass_is_written_too_and_ends_with_3(tmp_path, quick):
    """Would catch an old good report that goes on counting after the charger has failed."""
    pins = {"voltage_mv": 9_000}
    async with Simulator(SimulatorConfig(tcp="127.0.0.1:0", plant=QUICK, pinned=pins)) as simulator:
        file = installed(tmp_path, simulator.wire)
        out = tmp_path / "report.json"
        out.write_text('{"passed": true}')
        words = ("charger", "commission", "--config", str(file), "--yes", "--json", "--out", str(out))
        said = await asyncio.to_thread(v2v, *words)
    assert said.exit_code == EXIT_REFUSED
    assert "not passed: mains" in said.err
    assert json.loads(said.out) == json.loads(out.read_text())
    assert json.loads(out.read_text())["passed"] is False


def test_nothing_flows_before_somebody_said_yes(tmp_path):
    """Would catch power into a car because a script was run, a report that cannot be written, and an unknown port."""
    file = installed(tmp_path, "tcp://127.0.0.1:1")
    said = v2v("charger", "commission", "--config", str(file))
    assert (said.exit_code, "--yes" in said.err) == (EXIT_USAGE, True)
    said = v2v("charger", "commission", "--config", str(file), "--yes", "--port", "right")
    assert (said.exit_code, "one of left" in said.err) == (EXIT_USAGE, True)
    gone = tmp_path / "gone/report.json"
    said = v2v("charger", "commission", "--config", str(file), "--yes", "--out", str(gone))
    assert (said.exit_code, "--out FILE" in said.err) == (EXIT_MISCONFIGURED, True)
    file.write_text(file.read_text().replace('map = "simulated"', 'map = "simulatd"'))
    said = v2v("charger", "commission", "--config", str(file), "--yes")
    assert (said.exit_code, "did you mean 'simulated'" in said.err) == (EXIT_MISCONFIGURED, True)


def test_the_agent_must_be_stopped_first(tmp_path, monkeypatch):
    """Would catch two masters on one charger, one of them selling."""
    file = installed(tmp_path, "tcp://127.0.0.1:1")
    monkeypatch.setattr("agent.rows.owner_pid", lambda _: 4711)
    said = v2v("charger", "commission", "--config", str(file), "--yes")
    assert (said.exit_code, "systemctl stop" in said.err) == (EXIT_REFUSED, True)


def started(*words):
    """`v2v ...` as a process of its own."""
    words = [sys.executable, "-m", "agent", *words]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


async def test_ctrl_c_while_power_flows_ends_safe(tmp_path):
    """Would catch an installer's Ctrl-C that leaves the charger on; pressed twice, as people do."""
    async with Simulator(SimulatorConfig(tcp="127.0.0.1:0", plant=QUICK)) as simulator:
        file = installed(tmp_path, simulator.wire)
        program = started("charger", "commission", "--config", str(file), "--yes")
        try:
            await eventually(lambda: simulator.truth().power_w > 4000, 60)
            os.kill(program.pid, signal.SIGINT)
            os.kill(program.pid, signal.SIGINT)
            out, err = await asyncio.to_thread(program.communicate, timeout=60)
        finally:
            program.kill()
        assert program.returncode == 130, err
        assert "being stopped first" in err
        assert "passed   safe at the end" in out
        assert not simulator.truth().energised
        assert not (tmp_path / "left.commissioning.json").exists()
