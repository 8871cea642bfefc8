"""A real systemd, booted: the shipped unit, installed by the commands of `docs/operating.md`, hung, killed, mistyped, stopped.

Only with `--long`, as root, where debootstrap and systemd-nspawn are installed (Debian: apt-get install debootstrap
systemd-container) and a Debian mirror answers; it says what is missing otherwise. The guest shares our network, so chain,
charger and consumer are the stage's; the program is this clone and this interpreter's libraries, bound read-only.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest
from stage import ROOT, Program, Stage, eventually, note

from agent.core.session import Stage as Life
from agent.errors import EXIT_DONE, EXIT_MISCONFIGURED
from agent.journal import Journal

PAGE = ROOT / "docs/operating.md"
PACKAGES = "systemd,systemd-sysv,dbus,python3"
LIBRARIES = Path(sysconfig.get_path("purelib"))
PROGRAM = """\
#!/usr/bin/python3
import sys
sys.path[:0] = ["/opt/v2v-agent/clone", "/opt/v2v-agent/libraries"]
from agent.cli import main
main()
"""
BOOT_S = 180  # seconds on an idle machine
WATCHDOG_S = 20  # the unit's
AGENT_TOML = "/etc/v2v-agent/agent.toml"

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]


def missing():
    """What this machine lacks for booting a guest; "" when nothing."""
    if os.geteuid() != 0:
        return "only root can boot a guest"
    tools = [tool for tool in ("debootstrap", "systemd-nspawn", "nsenter") if not shutil.which(tool)]
    if tools:
        return f"not installed: {', '.join(tools)}"
    # The libraries were built for our interpreter; the guest brings Debian's.
    return "" if sys.version_info[:2] == (3, 11) else "the guest's Python is 3.11, ours is another"


@pytest.fixture(scope="module")
def debian(tmp_path_factory):
    """A fresh Debian with systemd, a minute's work."""
    why = missing()
    if why:
        pytest.skip(why)
    root = tmp_path_factory.mktemp("debian")
    root.chmod(0o755)  # it becomes the guest's "/", which its other users must be able to enter
    words = ["debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", root]
    made = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    if made.returncode:
        pytest.skip(f"debootstrap could not make a guest: {made.stdout[-300:]}")
    for folder in ("clone", "libraries", "venv/bin"):
        root.joinpath("opt/v2v-agent", folder).mkdir(parents=True)
    program = root / "opt/v2v-agent/venv/bin/v2v"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    return root


class Guest(Program):
    """The booted guest; `with` powers it off."""

    def __init__(self, root, folder):
        self.root = root
        binds = (f"--bind-ro={ROOT}:/opt/v2v-agent/clone", f"--bind-ro={LIBRARIES}:/opt/v2v-agent/libraries")
        words = ("systemd-nspawn", "--register=no", "--keep-unit", "--quiet", "-b", "-D", root, *binds)
        super().__init__(words, folder, "guest")

    def __enter__(self):
        try:
            eventually(self.init_pid, BOOT_S, "the guest has an init")
            eventually(self.is_up, BOOT_S, "the guest has booted")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        init = self.init_pid() if self.is_running else 0
        if init:
            os.kill(init, signal.SIGRTMIN + 4)  # systemd(1): power off
            try:
                self.process.wait(BOOT_S)
            except subprocess.TimeoutExpired:
                os.kill(init, signal.SIGKILL)  # takes everything in the guest along
        super().__exit__()

    def is_up(self):
        """Whether booting has come to its end."""
        return self.run("systemctl is-system-running").stdout.strip() in ("running", "degraded")

    def init_pid(self):
        """The guest's process 1, as we see it; 0 before there is one."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return int(children[0]) if children else 0

    def run(self, script, folder="/"):
        """A shell script in the guest, as root: the finished process."""
        words = ["nsenter", "-t", str(self.init_pid()), "-a", "sh", "-euc", f"cd {folder}\n{script}"]
        clean = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}
        return subprocess.run(words, capture_output=True, text=True, timeout=120, env=clean, check=False)

    def does(self, script, folder="/"):
        """The same, and it must succeed: what it printed."""
        done = self.run(script, folder)
        assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}\n{self.log()}"
        return done.stdout

    def unit(self, name):
        """One property of the unit, as systemd shows it."""
        return self.run(f"systemctl show -P {name} v2v-agent").stdout.strip()

    def log(self):
        """What the unit has logged."""
        return self.run("journalctl --no-pager -o cat -u v2v-agent").stdout

    def book(self, stage):
        """The agent's journal, replayed; None while there is none."""
        path = self.root / "var/lib/private/v2v-agent/journal.sqlite"
        if not path.is_file() or not path.stat().st_size:
            return None
        journal = Journal(path, stage.domain, stage.provider.owner.address, read_only=True)
        try:
            return journal.replay()
        finally:
            journal.close()


def chapters():
    """The page's commands: heading -> shell lines."""
    parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {
        part.splitlines()[0]: "\n".join(re.findall(r"```sh\n(.*?)```", part, re.DOTALL)) for part in parts
    }


def settings(stage, charger):
    """The stage's settings, changed as the page says: keys from credentials, the journal where the unit keeps it."""
    text = stage.config(charger.wire).read_text()
    text = re.sub(r"\[keys\]\n.*?\n\n", "", text, flags=re.DOTALL)
    text = re.sub(r'^path = ".*"', 'path = "/var/lib/v2v-agent/journal.sqlite"', text, flags=re.MULTILINE)
    return text.replace('format = "json"', 'format = "auto"').replace(
        "confirmations = 3", "confirmations = 2"
    )


def installed(guest, stage, charger):
    """The chapter that installs, in a folder like a clone with the two keys beside it."""
    clone = guest.root / "srv/clone"
    clone.mkdir(parents=True)
    guest.root.joinpath("home/owner").mkdir()
    shutil.copytree(ROOT / "config", clone / "config")
    shutil.copy(stage.provider.operator.key_file, clone / "operator.key")
    shutil.copy(stage.provider.meter_key_file, clone / "meter.key")
    guest.does(chapters()["Settings and keys"], "/srv/clone")
    guest.root.joinpath("etc/v2v-agent/agent.toml").write_text(settings(stage, charger))


def stages(guest, stage):
    """Where every session stands, by the disk."""
    book = guest.book(stage)
    return [] if book is None else [one.stage for one in book.sessions.values()]


def test_a_service_from_its_installation_to_its_backup(debian, tmp_path):
    """Would catch a sandbox in which it cannot work, a hang that lasts, a typo that loops, and a page that has grown stale."""
    page = chapters()
    with Stage(tmp_path, broker=False) as stage, Guest(debian, tmp_path) as guest:
        charger = stage.charger()
        installed(guest, stage, charger)
        guest.does(page["Start it"])
        assert guest.unit("ActiveState") == "active"
        eventually(lambda: guest.unit("StatusText") == "left: idle", 30, "it says what it does")
        looked = guest.does(page["Look at it"])
        assert "agent.started" in looked
        assert "There is no session yet." in looked

        # A hang while energy flows: failsafe, watchdog, make-safe, restart; and the same session is settled.
        journey = stage.journey()
        stage.matched(journey, 60)
        buying = stage.at_the_plug(journey, http=True)
        eventually(lambda: charger.truth["power_w"] > 10_000, 60, "energy flows")
        began_s, first = time.monotonic(), guest.unit("MainPID")
        guest.does(f"kill -STOP {first}")
        eventually(charger.is_at_zero, 10, "the failsafe opens")
        eventually(lambda: guest.unit("NRestarts") == "1", WATCHDOG_S + 30, "the watchdog bites")
        note(f"booted: hung to restarted in {time.monotonic() - began_s:.0f} s")
        assert "Watchdog timeout" in guest.log()
        assert "left: open" in guest.log()
        summary = buying.result(90)
        eventually(lambda: stages(guest, stage) == [Life.SETTLED], 40, "settled, in the same journal")
        (session,) = guest.book(stage).sessions.values()
        assert summary.energy_wh_settled == session.energy_wh_acked == session.energy_wh_delivered == 60
        moved_mwh = session.register_mwh_end - session.register_mwh_begin
        assert abs(charger.truth["delivered_mwh"] - moved_mwh) < 100

        # kill -9: the same without the wait.
        guest.does(f"kill -KILL {guest.unit('MainPID')}")
        eventually(
            lambda: guest.unit("NRestarts") == "2" and guest.unit("ActiveState") == "active", 40, "it is back"
        )

        # Inside, it can do what it must, and little else.
        main = guest.unit("MainPID")
        assert 61184 <= int(guest.does(f"stat -c %u /proc/{main}")) <= 65519  # systemd's dynamic users
        assert "NoNewPrivs:\t1" in guest.does(f"cat /proc/{main}/status")
        inside = f"nsenter -t {main} -m --"
        for forbidden in ("touch /usr/x", "touch /etc/x", "test -e /home/owner", "test -e /dev/sda"):
            assert guest.run(f"{inside} {forbidden}").returncode != 0, forbidden
        guest.does(f"{inside} test -e /dev/null")  # the refusals above are answers

        backed_up = guest.does(page["Backup of the journal"])
        assert "SETTLED" in backed_up
        assert "v2v-agent/journal.sqlite" in guest.does("tar -tf /var/backups/v2v-agent-journal.tar")

        guest.does(page["Keys that are encrypted at rest"])
        assert guest.unit("ActiveState") == "active"

        assert_stops(guest, charger, page)
        assert_a_typo_does_not_loop(guest)


def assert_stops(guest, charger, page):
    """`systemctl stop` leaves the charger at zero and the unit well; make-safe after it still works, by hand."""
    done = guest.does(page["Stop it"])
    assert (guest.unit("ActiveState"), guest.unit("ExecMainStatus")) == ("inactive", str(EXIT_DONE))
    assert charger.is_at_zero()
    assert done.strip().endswith("left: open")


def assert_a_typo_does_not_loop(guest):
    """A mistake in the settings: failed with 78, and not started again."""
    guest.does(f"sed -i s/confirmations/confirmation/ {AGENT_TOML}")
    assert guest.run("systemctl start v2v-agent").returncode != 0
    eventually(lambda: guest.unit("ActiveState") == "failed", 30, "it has failed")
    assert guest.unit("ExecMainStatus") == str(EXIT_MISCONFIGURED)
    restarts = guest.unit("NRestarts")
    time.sleep(6)  # three times RestartSec: there is nothing to wait for, which is the point
    assert (guest.unit("ActiveState"), guest.unit("NRestarts")) == ("failed", restarts)
    assert "did you mean" in guest.log()
