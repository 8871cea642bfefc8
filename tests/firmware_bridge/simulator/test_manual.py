"""docs/simulator.md: every command of the page is run, in its order, and prints what the page says."""

import re
import shutil
import subprocess

import pytest
from stage import ROOT, Program, free_port, surroundings

from firmware_bridge.simulator.plant import PLANT_FAULTS
from firmware_bridge.simulator.scenario import WIRE_WORDS, load_scenario

PAGE = (ROOT / "docs/simulator.md").read_text()
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
TIMEOUT_S = 60  # a Python start on a busy machine, twice


def chapters():
    """Heading -> its fenced blocks as (language, text)."""
    parts = re.split(r"^## ", PAGE, flags=re.MULTILINE)[1:]
    return {part.splitlines()[0]: BLOCK.findall(part) for part in parts}


WITH_COMMANDS = [name for name, blocks in chapters().items() if any(kind == "sh" for kind, _ in blocks)]


def words(text):
    """Its lines, however many blanks are between the words."""
    return [line.split() for line in text.splitlines() if line.strip()]


def on_free_ports(blocks):
    """The same blocks with ports that nobody has: the page's are fixed, so that they can be copied."""
    ports = {port: str(free_port()) for port in set(re.findall(r"1502\d", str(blocks)))}
    return [(kind, re.sub(r"1502\d", lambda found: ports[found[0]], text)) for kind, text in blocks]


class Shell:
    """Runs the page's blocks in one folder: a simulator in the background, everything else until it ends."""

    def __init__(self, folder):
        self.folder = folder
        self.simulator, self.count = None, 0
        self.printed = None

    def simulate(self, line):
        """Start what the line says and wait until it listens; the one before it ends."""
        self.stop()
        self.count += 1
        self.simulator = Program(["sh", "-c", f"exec {line}"], self.folder, f"simulator-{self.count}")
        self.simulator.heard("^listening on", TIMEOUT_S)

    def run(self, text):
        """What the commands print."""
        done = subprocess.run(
            ["sh", "-euc", text],
            cwd=self.folder,
            env=surroundings(),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        assert done.returncode == 0, f"{text}\n{done.stderr}"
        self.printed = done.stdout

    def stop(self):
        """End the simulator as the page says."""
        if self.simulator is not None:
            assert self.simulator.stop() == 0
            self.simulator.__exit__()
            self.simulator = None


@pytest.mark.timeout(240)
@pytest.mark.parametrize("chapter", WITH_COMMANDS)
def test_the_page_is_what_happens(tmp_path, chapter):
    """Would catch a command that was renamed, an option that went, and an output that is no longer true."""
    shell = Shell(tmp_path)
    try:
        for kind, text in on_free_ports(chapters()[chapter]):
            if kind == "toml":
                (tmp_path / text.splitlines()[0].removeprefix("# ")).write_text(text)
            elif kind == "sh" and text.startswith("v2v charger simulate"):
                shell.simulate(text.strip())
            elif kind == "sh":
                shell.printed = None
                if not text.startswith("mbpoll") or shutil.which("mbpoll"):
                    shell.run(text)
            elif kind == "text" and shell.printed is not None:
                assert words(shell.printed)[-len(words(text)) :] == words(text)
    finally:
        shell.stop()


def test_the_page_names_every_fault_and_what_it_does():
    """Would catch a fault that nobody can find, or a table that promises one that is gone."""
    for key, known in (("wire", WIRE_WORDS), ("plant", PLANT_FAULTS)):
        rows = [f"| `{word}` | {meaning} |" for word, meaning in known.items()]
        assert "\n".join([f"| `{key} =` | what happens |", "|---|---|", *rows]) in PAGE


def test_the_pages_scenario_is_one(tmp_path):
    """Would catch an example that the simulator would refuse."""
    (text,) = [text for kind, text in BLOCK.findall(PAGE) if kind == "toml"]
    path = tmp_path / "evening.toml"
    path.write_text(text)
    assert len(load_scenario(path)) == 4
