"""The simulator as a process: what other tests and other people's clients start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import pytest

from firmware_bridge.charger import MapError
from firmware_bridge.device_map import NoValue
from firmware_bridge.mapped_charger import read_device
from firmware_bridge.simulator.command import parse_pins, simulator_config


def start(*arguments: str) -> subprocess.Popen[str]:
    """A simulator process whose first line can be read."""
    command = [sys.executable, "-m", "firmware_bridge.simulator", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


async def test_it_says_where_it_listens_keeps_the_truth_and_ends_on_sigterm(tmp_path):
    """Would catch a simulator that e2e tests cannot wait for, look into, or end."""
    truth = tmp_path / "truth.json"
    process = start(
        "--tcp", "127.0.0.1:0", "--json", "--truth", str(truth), "--register-wh-begin", "5000", "--seed", "1"
    )
    try:
        listening = json.loads(process.stdout.readline())
        assert listening["event"] == "listening"
        assert (await read_device("simulated", listening["wire"]))["register_mwh"] == 5_000_000
        first = json.loads(truth.read_text())
        assert first["energised"] is False
        deadline = time.monotonic() + 5
        while json.loads(truth.read_text())["at_ms"] == first["at_ms"]:
            assert time.monotonic() < deadline, "the truth file stands still"
    finally:
        process.send_signal(signal.SIGTERM)
    last = process.communicate(timeout=10)[0].splitlines()[-1]
    assert json.loads(last)["delivered_mwh"] == 0
    assert process.returncode == 0


async def test_a_pty_is_a_link_and_is_gone_afterwards(tmp_path):
    """Would catch a serial simulator without a name one can configure, or one that leaves it lying about."""
    link = tmp_path / "ttyV2V"
    process = start("--pty", str(link), "--map", "obo_ion_epc2plus", "--device-id", "7")
    try:
        assert process.stdout.readline().startswith(f"listening on rtu://{link}")
        seen = await read_device("obo_ion_epc2plus", f"rtu://{link}?parity=N", 7)
        assert seen["pilot_state"] == "B"
    finally:
        process.terminate()
        process.communicate(timeout=10)
    assert not link.is_symlink()


def test_a_wrong_map_is_exit_78_with_the_nearest_name():
    """Would catch a traceback where a name was misspelt."""
    command = [
        sys.executable,
        "-m",
        "firmware_bridge.simulator",
        "--tcp",
        "127.0.0.1:0",
        "--map",
        "webasto_nxt",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    assert done.returncode == 78
    assert "did you mean 'webasto_next'" in done.stderr


def test_pins_are_checked_and_typed():
    """Would catch `--set powr_w=1` that pins nothing, and a number pinned as text."""
    assert parse_pins(["power_w=-5", "contactor_closed=true", "pilot_state=C"]) == {
        "power_w": -5,
        "contactor_closed": True,
        "pilot_state": "C",
    }
    for wrong in ("powr_w=1", "power_w", "power_w=much"):
        with pytest.raises(MapError):
            parse_pins([wrong])


def test_the_same_seed_is_the_same_car():
    """Would catch a seed that does not make a run repeatable."""
    first, again = (
        simulator_config(device_map="simulated", tcp="127.0.0.1:0", pty=None, seed=3) for _ in range(2)
    )
    assert first.plant == again.plant
    limited = simulator_config(device_map="simulated", tcp="127.0.0.1:0", pty=None, power_w_max=11_040)
    assert limited.plant.ev_current_ma_max == 16_000


def test_a_pin_with_a_wrong_name_is_told_the_nearest_of_these_devices():
    """Would catch a pin that no simulated device shows: it would pin nothing, and compare nothing."""
    words = {"device_map": "eastron_sdm630_sdm72v2", "tcp": "127.0.0.1:0", "pty": None}
    with pytest.raises(MapError, match="nearest: voltage_mv"):
        simulator_config(**words, pins=["voltage_v=230"])
    with pytest.raises(MapError, match="no quantity 'pilot_state' here"):
        simulator_config(**words, pins=["pilot_state=B"])
    with pytest.raises(MapError, match="webasto_next cannot show that"):
        simulator_config(**(words | {"device_map": "webasto_next"}), pins=["pilot_state=Q"])
    assert parse_pins(["register_mwh=none"]) == {"register_mwh": NoValue()}
    with pytest.raises(MapError, match="no --also device has this id"):
        simulator_config(**words, pins=["9:power_w=1"])
    config = simulator_config(
        **words, also=["webasto_next", "eastron_sdm630_sdm72v2@3"], pins=["3:power_w=5"]
    )
    assert [(one.map, one.device_id, dict(one.pinned)) for one in config.also] == [
        ("webasto_next", 255, {}),
        ("eastron_sdm630_sdm72v2", 3, {"power_w": 5}),
    ]
    assert config.pinned == {}


async def test_a_night_is_recorded_and_its_answers_come_back(tmp_path):
    """Would catch a recording that loses its last frames when it is ended, and a replay that needs the map."""
    trace = tmp_path / "trace.jsonl"
    seen = []
    for options in (("--record", str(trace), "--set", "power_w=777"), ("--replay", str(trace))):
        process = start("--tcp", "127.0.0.1:0", "--json", *options)
        try:
            wire = json.loads(process.stdout.readline())["wire"]
            seen.append(await read_device("simulated", wire))
        finally:
            process.terminate()
            last = json.loads(process.communicate(timeout=10)[0].splitlines()[-1])
    assert seen[0] == seen[1]
    assert seen[0]["power_w"] == 777
    assert last == {"event": "replayed", "unknown_requests": 0}


def test_the_cut_off_is_a_signal_and_every_charger_has_its_truth(tmp_path):
    """Would catch an external cut-off that a test cannot pull, and a second charger nobody can look into."""
    truth, scenario = tmp_path / "truth.json", tmp_path / "evening.toml"
    scenario.write_text('[[fault]]\nplant = "charges_while_disabled"\n')
    options = (
        "--truth",
        str(truth),
        "--scenario",
        str(scenario),
        "--also",
        "webasto_next@9",
        "--ev-lag-ms",
        "0",
    )
    process = start("--tcp", "127.0.0.1:0", *options)
    try:
        assert process.stdout.readline().endswith("simulated (device id 1), webasto_next (device id 9)\n")
        for power_flows in (True, False):
            deadline = time.monotonic() + 10
            while (json.loads(truth.read_text())["power_w"] > 0) is not power_flows:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            process.send_signal(signal.SIGUSR1)
        last = json.loads(truth.read_text())
        assert {name: one["power_w"] for name, one in last["chargers"].items()} == {"1": 0, "9": 0}
        assert last["delivered_mwh"] > 0
    finally:
        process.terminate()
        process.communicate(timeout=10)


def test_a_wrong_scenario_is_exit_78_with_every_mistake(tmp_path):
    """Would catch a traceback, or a simulator that starts without its faults."""
    scenario = tmp_path / "evening.toml"
    scenario.write_text('[[fault]]\nwire = "silense"\n')
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "firmware_bridge.simulator",
            "--tcp",
            "127.0.0.1:0",
            "--scenario",
            str(scenario),
        ],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert process.returncode == 78
    assert "nearest: silence" in process.stderr
