"""docs/adding-a-charger.md can be followed: its commands are executed, and what it shows comes out."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from firmware_bridge import map_file
from firmware_bridge.device_map import MAPS

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "adding-a-charger.md").read_text(encoding="utf-8")
BOXES = re.findall(r"^```(sh|text)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def free_port() -> int:
    """A port of this computer that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def script() -> str:
    """The page's commands in a row. The simulator says when it listens: a reader waits for that line, and so do we."""
    lines = ["set -eu", "mkfifo said", "exec 3<>said"]
    for kind, text in BOXES:
        if kind == "sh":
            waits = '> said &\nsimulator=$!\nread -r first <&3\ntest -n "$first"\n'
            lines.append(re.sub(r" &\n", f" {waits}", text))
    return "\n".join([*lines, "kill $simulator", "wait $simulator"])


def squeezed(text: str) -> str:
    """Without the blanks that only align."""
    return re.sub(r" +", " ", text)


@pytest.mark.timeout(120)
def test_the_page_can_be_followed_to_the_letter(tmp_path):
    """Would catch an option that was renamed, a blueprint that does not run, and an answer that nobody gives any more."""
    port = free_port()
    run = subprocess.Popen(
        ["sh", "-c", script().replace("5020", str(port))],
        cwd=tmp_path,
        env={**os.environ, "MAPS": str(MAPS), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = run.communicate(timeout=110)
    finally:
        if run.poll() is None:
            os.killpg(run.pid, signal.SIGKILL)
    assert run.returncode == 0, said
    shown = [line for kind, text in BOXES if kind == "text" for line in text.splitlines()]
    assert len(shown) > 5
    missing = [line for line in shown if squeezed(line) not in squeezed(said)]
    assert not missing, said


def test_every_word_of_the_page_is_one_of_the_language():
    """Would catch advice to write a key that no map may have."""
    rows = [row for row in PAGE.split("## 5.")[1].split("## 6.")[0].splitlines() if row.startswith("| ")]
    keys = {key for row in rows[1:] for key in re.findall(r"`(?:\[energy\] )?([a-z_]+) = ", row)}
    known = {
        name
        for table in vars(map_file).values()
        if isinstance(table, type) and hasattr(table, "model_fields")
        for name in table.model_fields
    }
    assert len(keys) > 10
    assert keys <= known


def test_the_blueprint_shows_every_word_of_the_language():
    """Would catch an option that only its inventor knows."""
    blueprint = (MAPS / "_blueprint.toml").read_text(encoding="utf-8")
    known = {
        name
        for table in vars(map_file).values()
        if isinstance(table, type)
        and hasattr(table, "model_fields")
        and table.__module__ == map_file.__name__
        for name in table.model_fields
    }
    assert not {name for name in known if not re.search(rf"\b{name}\b", blueprint)}
