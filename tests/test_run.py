"""`./run` on machines that lack something: it says what to do and does nothing else."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOOLS = ("sh", "cat", "cksum", "date", "dirname", "find", "grep", "head", "id", "sed")


@pytest.fixture
def machine(tmp_path):
    """A clone without `.venv`, on a machine that has only TOOLS; `bin` is where a test puts its own."""
    for name in ("run", "pyproject.toml", "requirements-demo.lock", "requirements-dev.lock"):
        shutil.copy(ROOT / name, tmp_path)
    programs = tmp_path / "bin"
    programs.mkdir()
    for tool in TOOLS:
        (programs / tool).symlink_to(shutil.which(tool))
    return tmp_path


def python(machine, name, answer):
    """A Python that answers `./run`'s questions: which version it is, and whether it can make a venv."""
    program = machine / "bin" / name
    program.write_text(f"#!/bin/sh\ncase $2 in\n{answer}\nesac\n")
    program.chmod(0o755)


def run(machine, *words):
    """`./run` from another folder, as a user outside CI."""
    return subprocess.run(
        [machine / "run", *words],
        cwd="/",
        env={"PATH": str(machine / "bin"), "HOME": str(machine)},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_a_python_without_venv_gets_the_one_command_that_adds_it(machine):
    """Would catch a bare Debian 12 left with ensurepip's riddle."""
    python(machine, "python3", "*print*) echo python3.11-venv ;;\n*version_info*) exit 0 ;;\n*) exit 1 ;;")
    ran = run(machine, "demo")
    assert ran.returncode == 1
    assert ran.stderr == (
        "python3 cannot make a virtual environment yet. Please run:\n\n  sudo apt-get install -y python3-venv\n"
    )
    assert not (machine / ".venv").exists()


def test_another_python_of_the_right_age_is_asked_for_its_own_package(machine):
    """Would catch advice for Debian's own Python where another one is used."""
    python(machine, "python3", "*) exit 1 ;;")
    python(machine, "python3.12", "*print*) echo python3.12-venv ;;\n*version_info*) exit 0 ;;\n*) exit 1 ;;")
    assert "sudo apt-get install -y python3.12-venv" in run(machine, "test", "quick").stderr


def test_a_machine_without_a_fitting_python_is_told_which(machine):
    """Would catch a traceback from a Python that is too old or too new."""
    python(machine, "python3", "*) exit 1 ;;")
    ran = run(machine, "demo")
    assert ran.returncode == 1
    assert ran.stderr == (
        "Python 3.11, 3.12 or 3.13 is needed. On Debian 12 or newer, please run:\n\n"
        "  sudo apt-get install -y python3 python3-venv\n"
    )


def test_help_shows_every_command_and_a_misspelt_one_shows_help(machine):
    """Would catch a usage text that lost a command, and a misspelt command that starts something."""
    helped = run(machine, "help")
    assert helped.returncode == 0
    for command in ("demo", "test", "bench", "v2v", "lock"):
        assert f"./run {command}" in helped.stdout
    wrong = run(machine, "dmeo")
    assert (wrong.returncode, wrong.stdout, wrong.stderr) == (2, "", helped.stdout)


def test_a_venv_is_announced_before_anybody_waits(machine):
    """Would catch half a minute of silence: the first line must come before pip starts."""
    python(machine, "python3", "*version_info* | *ensurepip*) exit 0 ;;\n*) exit 9 ;;")
    ran = run(machine, "v2v", "--help")
    assert ran.returncode == 9  # our toy Python cannot really make one
    assert ran.stderr.startswith(
        "making .venv with python3 from requirements-demo.lock (once; about half a minute)"
    )
    assert ran.stdout == ""
