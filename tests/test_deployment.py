"""What an installer copies to a vehicle: the systemd unit, the modules it needs loaded, and the broker's access list."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from agent.config import ProviderKeysConfig
from agent.errors import EXIT_MISCONFIGURED

CONFIG = Path(__file__).parents[1] / "config"
UNIT = (CONFIG / "v2v-agent.service").read_text()
EXPOSURE_TENTHS_MAX = (
    13  # systemd-analyze's score; 12 as shipped, and what remains is inherent (network, serial ports)
)


def setting(name):
    """Every value that the unit gives one setting."""
    return re.findall(rf"^{name}=(.*)$", UNIT, re.MULTILINE)


def test_the_unit_gives_the_keys_under_the_names_that_the_settings_have_by_default():
    """Would catch a unit whose credentials the daemon looks for under other names."""
    given = [value.split(":")[0] for value in setting("LoadCredential")]
    keys = ProviderKeysConfig()
    assert given == [keys.operator, keys.meter]


def test_a_configuration_error_does_not_restart_loop_and_everything_else_does():
    """Would catch a unit that hammers the chain with a wrong key, or that gives up over a night without network."""
    assert setting("RestartPreventExitStatus") == [str(EXIT_MISCONFIGURED)]
    assert setting("Restart") == ["always"]
    assert setting("StartLimitIntervalSec") == ["0"]


def test_the_unit_stops_patiently_enough_to_settle():
    """Would catch systemd killing the daemon while it waits for the contactor (30 s) and the last receipt."""
    assert int(setting("TimeoutStopSec")[0]) > 30
    assert int(setting("WatchdogSec")[0]) <= 20


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="systemd-analyze is not installed")
def test_systemd_understands_the_unit_and_finds_it_well_shut(tmp_path):
    """Would catch a misspelt setting, which systemd ignores, and a hole opened in passing."""
    copy = tmp_path / "v2v-agent.service"
    there = re.sub(r"^ExecStart=\S+", "ExecStart=/bin/true", UNIT, flags=re.MULTILINE)
    copy.write_text(re.sub(r"^Documentation=.*\n", "", there, flags=re.MULTILINE))
    verified = subprocess.run(
        ["systemd-analyze", "verify", copy], capture_output=True, text=True, check=False
    )
    assert verified.stderr == ""
    threshold = f"--threshold={EXPOSURE_TENTHS_MAX}"
    judged = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", threshold, copy],
        capture_output=True,
        text=True,
        check=False,
    )
    assert judged.returncode == 0, judged.stdout[-300:]


def allowed(user, action, topic):
    """What mosquitto's access list says, by the rules of its manual: patterns only, `%u` is the user name."""
    for line in (CONFIG / "mosquitto/v2v.acl").read_text().splitlines():
        if line.startswith("pattern "):
            _, access, pattern = line.split()
            words = re.escape(pattern.replace("%u", user)).replace(r"\+", "[^/]+").replace(r"\#", ".*")
            if access in (action, "readwrite") and re.fullmatch(words, topic):
                return True
    return False


@pytest.mark.parametrize(
    ("user", "action", "topic", "answer"),
    [
        ("alice", "write", "v2v/1/0xcar/in/alice", True),
        ("alice", "read", "v2v/1/0xcar/out/alice", True),
        ("alice", "read", "v2v/1/0xcar/hello/0x1", True),
        ("alice", "write", "v2v/1/0xcar/in/bob", False),
        ("alice", "read", "v2v/1/0xcar/out/bob", False),
        ("alice", "write", "v2v/1/0xcar/out/bob", False),
        ("alice", "write", "v2v/1/0xcar/hello/0x1", False),
        ("alice", "read", "v2v/1/0xcar/car/power", False),
        ("0xcar", "write", "v2v/1/0xcar/out/alice", True),
        ("0xcar", "read", "v2v/1/0xcar/in/alice", True),
        ("0xcar", "write", "v2v/1/0xcar/car/power", True),
        ("0xcar", "write", "v2v/1/0xother/hello/0x1", False),
        ("0xcar", "read", "v2v/1/0xother/in/alice", False),
    ],
)
def test_nobody_can_speak_for_somebody_else(user, action, topic, answer):
    """Would catch a topic on which a stranger answers in a car's name, or reads another consumer's session."""
    assert allowed(user, action, topic) is answer
