"""`docs/installing.md`, copied and pasted: its commands in one shell and an empty folder, against the charger it simulates."""

import json
import re

import pytest
from stage import ROOT, Program, eventually, surroundings

PAGE = (ROOT / "docs/installing.md").read_text()
COMMISSION_S = 90  # the silence alone takes twelve seconds


def boxes():
    """The page's shell commands, in order."""
    return re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)


def shell(folder, commands):
    """A shell that does all of them."""
    return Program(["sh", "-euc", "\n".join(commands)], folder, "installer", surroundings(), split=True)


@pytest.fixture
def folder(tmp_path):
    """An empty folder that only we can read: a key will lie in it."""
    tmp_path.chmod(0o700)
    return tmp_path


def listening(commands):
    """The same commands, with a pause after the simulator until it listens: a person waits for its line, and ends it at last."""
    waits = "trap 'kill $!' EXIT\nuntil [ -e charger ] && [ -e truth.json ]; do sleep 0.1; done\n"
    return [command + waits if "simulate" in command else command for command in commands]


def test_a_device_is_found_and_looked_at_as_the_page_says(folder):
    """Would catch a page that has grown stale: a renamed option, a missing step, another answer than it promises."""
    looked = [command for command in listening(boxes()) if "v2v charger commission" not in command]
    assert len(looked) == len(boxes()) - 1
    with shell(folder, looked) as program:
        assert program.ended(90) == 0, program.complained
        assert "unit 3 answers at 19200 8N1 as simulated (V2V Simulated charger)" in program.said
        assert program.said.count("pilot_state=B") == 3
        assert (folder / "meter.key").stat().st_mode & 0o777 == 0o600


@pytest.mark.long
@pytest.mark.timeout(180)
def test_it_is_commissioned_as_the_page_says(folder):
    """Would catch checks that have other names than on the page, and a report the settings do not name."""
    with shell(folder, listening(boxes())) as program:
        assert program.ended(COMMISSION_S + 60) == 0, program.said + program.complained
        names = re.findall(r"^(passed|failed|skipped) +(\S.*?)  +", program.said, re.MULTILINE)
        promised = re.findall(r"^(passed) +(\S.*?)  +", PAGE, re.MULTILINE)
        assert names == promised
        assert json.loads((folder / "left.commissioning.json").read_text())["passed"]
        eventually(lambda: not json.loads((folder / "truth.json").read_text())["energised"], 10, "it is off")


def test_the_page_explains_every_check():
    """Would catch a check that fails in the field with a name that stands nowhere."""
    source = (ROOT / "firmware_bridge/commissioning.py").read_text()
    names = {*re.findall(r'^ +\("([a-z -]+)", self\._', source, re.MULTILINE), "safe at the end"}
    assert len(names) == 12
    table = PAGE.partition("| check | what fails it |")[2]
    rows = {
        name for row in re.findall(r"^\| ([a-z ,-]+?) \|", table, re.MULTILINE) for name in row.split(", ")
    }
    assert names == rows


def test_what_the_page_installs_is_there():
    """Would catch a file that was renamed."""
    for name in re.findall(r"`?(config/[\w./-]+)`?", PAGE):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"\]\(((?:\.\./)?[\w./-]+)\)", PAGE):
        assert (ROOT / "docs" / name).exists(), name
