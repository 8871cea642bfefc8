"""What an installer copies to a vehicle: the systemd unit, the modules it needs loaded, and the broker's access list."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from click.testing import CliRunner

from agent import daemon
from agent.cli import cli, make_safe
from agent.config import SOCKET_NAME, SYSTEMD_RUNTIME, ProviderKeysConfig
from agent.core import settling
from agent.core.settling import Haste
from agent.errors import EXIT_DONE, EXIT_MISCONFIGURED, EXIT_REFUSED, EXIT_UNREACHABLE
from agent.runners import local, systemd

CONFIG = Path(__file__).parents[1] / "config"
PAGE = (CONFIG.parent / "docs/operating.md").read_text()
UNIT = (CONFIG / "v2v-agent.service").read_text()
PROGRAM = "/opt/v2v-agent/venv/bin/v2v"
EXPOSURE_TENTHS_MAX = 13  # systemd-analyze's score; 12 as shipped
START_S_MAX = 10  # Python's own start on a small computer


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


def test_the_unit_stops_patiently_and_does_not_wait_for_what_hangs():
    """Would catch systemd killing the daemon while a slow serial line is held, and a hang that is waited for."""
    assert (
        int(setting("TimeoutStopSec")[0])
        > daemon.HOLD_ON_EXIT_S + daemon.CANCEL_TRIES * daemon.CANCEL_EVERY_S
    )
    assert (
        int(setting("TimeoutStopSec")[0]) > make_safe.SECONDS_MAX + START_S_MAX
    )  # it limits ExecStopPost too
    assert int(setting("TimeoutAbortSec")[0]) < int(setting("TimeoutStopSec")[0])


def test_the_watchdog_is_slower_than_a_busy_machine_and_faster_than_a_session():
    """Would catch a watchdog that bites a healthy agent: pings come each second, or are 5 s late when something hangs."""
    watchdog_s = int(setting("WatchdogSec")[0])
    assert 2 * (systemd.BEAT_S + systemd.BEAT_AGE_MS_MAX / 1000) < watchdog_s <= 20
    assert setting("Type") == ["notify"]
    assert setting("NotifyAccess") == ["main"]  # ExecStopPost must not be able to say READY


def test_every_end_makes_the_charger_safe_with_the_settings_it_ran_with():
    """Would catch a unit that stops other chargers than it started, or none, or one whose key ends in a core file."""
    (run,), (stop_post,) = setting("ExecStart"), setting("ExecStopPost")
    assert run.split() == [PROGRAM, "provider", "run", "--config", "/etc/v2v-agent/agent.toml"]
    assert stop_post.split() == [PROGRAM, "provider", "make-safe", "--config", "/etc/v2v-agent/agent.toml"]
    assert setting("LimitCORE") == ["0"]


@pytest.fixture
def installed(tmp_path):
    """The unit where its program is: systemd-analyze asks whether it is there, and this machine has none."""
    copy = tmp_path / "v2v-agent.service"
    there = UNIT.replace(PROGRAM, "/bin/true")
    copy.write_text(re.sub(r"^Documentation=.*\n", "", there, flags=re.MULTILINE))
    return copy


def analyzed(*words):
    """What `systemd-analyze` says; the test is skipped, with the reason, where systemd is not installed."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("systemd-analyze is not installed (Debian: apt-get install systemd)")
    return subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)


def test_systemd_understands_every_line_of_the_unit(installed):
    """Would catch a misspelt setting, which systemd ignores."""
    verified = analyzed("verify", installed)
    assert (verified.returncode, verified.stdout, verified.stderr) == (0, "", "")
    installed.write_text(installed.read_text().replace("WatchdogSec", "WatchdogSecs"))
    assert "WatchdogSecs" in analyzed("verify", installed).stderr  # silence above is an answer


def test_systemd_finds_the_unit_well_shut(installed):
    """Would catch a hole opened in passing; what remains is inherent (network, serial ports that come and go)."""
    judged = analyzed("security", "--offline=true", f"--threshold={EXPOSURE_TENTHS_MAX}", installed)
    assert judged.returncode == 0, judged.stdout[-300:]
    assert setting("DeviceAllow") == ["char-ttyUSB rw", "char-ttyACM rw", "char-ttyAMA rw"]
    assert setting("PrivateDevices") == [
        "no"
    ]  # yes would score better, and no adapter could be plugged in again


def test_modules_of_serial_adapters_are_loaded_before_the_unit_starts():
    """Would catch an adapter refused with EPERM because its driver came after the unit's DeviceAllow was looked up."""
    lines = (CONFIG / "modules-load.d/v2v-agent.conf").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["usbserial", "cdc_acm"]
    (group,) = setting("Group")
    assert f'GROUP="{group}"' in (CONFIG / "udev/60-v2v-agent.rules").read_text()


# ---- docs/operating.md; its commands are run by tests/e2e/test_booted_service.py


def test_the_page_installs_what_there_is_to_where_the_unit_looks():
    """Would catch a page that copies a file that was renamed, or to a place where nothing looks for it."""
    installs = re.findall(r"^install .*?(\S+) (\S+)$", PAGE, re.MULTILINE)
    assert len(installs) >= 6
    for source, _target in installs:
        if source.startswith("config/"):
            assert (CONFIG.parent / source).is_file(), source
    targets = {target for _source, target in installs}
    assert {value.split(":")[1] for value in setting("LoadCredential")} <= targets
    assert setting("ExecStart")[0].split()[-1] in targets


def test_every_command_on_the_page_exists():
    """Would catch an option or command that was renamed since."""
    commands = set(re.findall(r"(?:^|`|/bin/)v2v ((?:[a-z-]+ ?){1,2})", PAGE, re.MULTILINE))
    assert len(commands) >= 5
    for command in commands:
        asked = CliRunner().invoke(cli, [*command.split(), "--help"])
        assert asked.exit_code == 0, (command, asked.output)


def test_the_page_tells_every_exit_code():
    """Would catch a code that means something else than the page says, or that the page does not know."""
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", PAGE, re.MULTILINE)}
    assert codes == {EXIT_DONE, EXIT_UNREACHABLE, EXIT_MISCONFIGURED}
    for code in (EXIT_DONE, EXIT_REFUSED, EXIT_UNREACHABLE, EXIT_MISCONFIGURED):
        assert re.search(rf"`make-safe` ends with .*?\b{code}\b", PAGE, re.DOTALL)


def test_the_page_tells_how_long_being_paid_may_wait_and_what_it_may_cost():
    """Would catch a table of haste that is not the one the agent goes by."""
    table = PAGE.split("how near the deadline is")[1].split("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    permille = {"half of the stake": 500, "three quarters": 750, "all of it": 1_000}
    waits = {
        "1 min, then twice as long each time, up to 1 h": (60, 3_600),
        "45 s, doubling, up to 5 min": (45, 300),
        "45 s": (45, 45),
    }
    told = {Haste(row[0].partition(":")[0]): (permille[row[1]], waits[row[2]], int(row[3])) for row in rows}
    tables = (settling.STAKE_PERMILLE, settling.REPLACE_AFTER_S, settling.REPLACEMENTS_MAX)
    assert told == {haste: tuple(table[haste] for table in tables) for haste in Haste}
    assert (settling.BRISK_LEFT_PART, settling.BRISK_LEFT_S_MIN) == (4, 30 * 60)
    assert (settling.URGENT_LEFT_PART, settling.URGENT_LEFT_S_MIN) == (16, 10 * 60)


def test_the_page_tells_where_the_socket_is():
    """Would catch a command line that looks elsewhere than the unit lets the agent put it."""
    assert [str(SYSTEMD_RUNTIME.relative_to("/run"))] == setting("RuntimeDirectory")
    assert f"`{SYSTEMD_RUNTIME / SOCKET_NAME}`" in PAGE


def test_the_page_tells_every_refusal_of_the_socket():
    """Would catch a name that an owner meets and finds nowhere."""
    source = Path(local.__file__).read_text()
    names = set(re.findall(r'Refused\(\s*"([a-z_]+)"', source)) | {
        "forgotten",
        "expired",
        "fee_cap",
        "gas_reserve",
    }
    assert len(names) > 6
    assert {name for name in names if f"`{name}`" not in PAGE} == set()
    told = [int(number) for number in re.findall(r"more than (\d+) questions in a minute", PAGE)]
    assert told == [local.ASKS_A_MINUTE]


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
