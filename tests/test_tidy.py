"""The house rules as tests, so that nobody has to review them. Each failure names the place and what to do.

Import rules are import-linter's (pyproject.toml), style is ruff's, types are mypy's; here is what they cannot see.
"""

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("agent", "firmware_bridge", "contracts", "bench")
FUNCTION_LINES_MAX = 60  # what one screen shows; longer functions hide a second job

# Files without a test file of their own, each with the reason. `__init__.py` files are signs, not code.
NOT_MIRRORED = {
    "agent/__main__.py": "three lines; tests/e2e starts real processes with it",
    "agent/core/effects.py": "frozen dataclasses without behaviour; every story of session and book uses them",
    "firmware_bridge/simulator/__main__.py": "two lines; test_command starts processes with it",
}


@cache
def tracked(*endings):
    """Every file of the repository with one of the endings (every file without), newest names from git."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = (name for name in listing.stdout.splitlines() if not endings or name.endswith(endings))
    return tuple(ROOT / name for name in sorted(names) if (ROOT / name).is_file())


def product_files():
    """Every Python file that we ship, and the benchmarks."""
    return tuple(file for file in tracked(".py") if file.relative_to(ROOT).parts[0] in ROOMS)


def place(file, line=None):
    """How a finding names a place."""
    return f"{file.relative_to(ROOT)}" + (f":{line}" if line else "")


def nothing(found, remedy):
    """Fail with every finding and what to do about it."""
    lines = list(found)
    assert not lines, "\n  ".join([f"{remedy}:", *lines])


@cache
def tree(file):
    """The file's syntax tree."""
    return ast.parse(file.read_text(), str(file))


def test_every_file_begins_by_saying_what_it_is():
    """Would catch a room without a sign: what it is, its rules, what it may not know."""
    silent = [place(file) for file in product_files() if not ast.get_docstring(tree(file))]
    nothing(silent, "begin these with a docstring")


def test_rooms_are_named_after_what_they_are():
    """Would catch a drawer for everything, where the next thing will be thrown in too."""
    drawers = {"util", "utils", "common", "helper", "helpers", "manager", "handler", "base", "misc"}
    found = [
        place(file) for file in product_files() if drawers & set(file.relative_to(ROOT).with_suffix("").parts)
    ]
    nothing(found, "name these after what they are")


def test_no_function_is_longer_than_a_screen():
    """Would catch a function with a second job in it."""
    long = [
        f"{place(file, node.lineno)} {node.name}: {node.end_lineno - node.lineno + 1} lines"
        for file in product_files()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > FUNCTION_LINES_MAX
    ]
    nothing(long, f"split these along their jobs (at most {FUNCTION_LINES_MAX} lines)")


def impurities(file):
    """What the pure room must not contain: floats, clocks, chance, tasks, files, logs."""
    forbidden = {
        "time",
        "random",
        "secrets",
        "asyncio",
        "logging",
        "datetime",
        "threading",
        "socket",
        "sqlite3",
        "os",
    }
    for node in ast.walk(tree(file)):
        match node:
            case ast.Constant(value=float()):
                yield node, "a float"
            case ast.BinOp(op=ast.Div()) | ast.AugAssign(op=ast.Div()):
                yield node, "a division that makes a float"
            case ast.Name(id="float"):
                yield node, "float"
            case ast.Call(func=ast.Name(id="open" | "print" | "input")):
                yield node, "input or output"
            case ast.Import(names=names) if forbidden & {name.name.split(".")[0] for name in names}:
                yield node, "an import of the outside world"
            case ast.ImportFrom(module=str(module)) if module.split(".")[0] in forbidden:
                yield node, "an import of the outside world"
            case ast.AsyncFunctionDef() | ast.Await():
                yield node, "waiting"


def test_the_core_is_pure():
    """Would catch a clock, a random number, a float or a file in the room that decides: replay would differ."""
    core = [file for file in product_files() if file.is_relative_to(ROOT / "agent/core")]
    assert len(core) > 5
    found = [f"{place(file, node.lineno)} {what}" for file in core for node, what in impurities(file)]
    nothing(found, "time, chance and readings are arguments; energy and money are integers")


def test_the_purity_check_can_fail(tmp_path):
    """Would catch a checker that sees nothing."""
    file = tmp_path / "bad.py"
    file.write_text(
        "import time\nfrom random import choice\nx = 0.5\ny = 1 / 2\nopen('f')\nasync def f():\n    pass\nz: float = 1\n"
    )
    assert sorted(node.lineno for node, _ in impurities(file)) == [1, 2, 3, 4, 5, 6, 8]


# Who may look at the wall clock, each with the reason; everybody else has chain time or a monotonic clock (DESIGN rule 10).
WALL_CLOCKS = {
    "agent/log.py": "a log line's stamp, for humans",
    "agent/cli/commission.py": "the date on a report that humans read and file",
    "agent/cli/consumer.py": "the consumer's journal: for humans, and a bound on what can have flowed while it was away",
    "agent/demo/evening.py": "the same, and its screen",
    "agent/demo/devnet.py": "it is a chain: its blocks are stamped as every chain's are",
    "agent/demo/eth_methods.py": "the same chain",
}


def wall_clock_readings(file):
    """Where this file asks what time of day it is. OpenSSL asks too, inside, when it looks at a certificate."""
    of_time = {"time", "time_ns", "ctime", "asctime", "localtime", "gmtime", "strftime", "CLOCK_REALTIME"}
    of_date = {"now", "utcnow", "today"}
    for node in ast.walk(tree(file)):
        match node:
            case ast.Attribute(value=ast.Name(id="time"), attr=attr) if attr in of_time:
                yield node
            case ast.Attribute(
                value=ast.Name(id="datetime" | "date") | ast.Attribute(attr="datetime" | "date"), attr=attr
            ) if attr in of_date:
                yield node
            case ast.ImportFrom(module="time", names=names) if of_time & {name.name for name in names}:
                yield node
            case ast.Attribute(attr="TimeStamper"):
                yield node


def test_only_the_log_and_a_few_others_look_at_the_wall_clock():
    """Would catch a deadline or an age that a wrong clock moves; tests/e2e/test_wrong_clock.py shows the whole daemon."""
    found = [
        place(file, node.lineno)
        for file in product_files()
        if place(file) not in WALL_CLOCKS
        for node in wall_clock_readings(file)
    ]
    nothing(found, "use the header's time, the loop's clock, or (for humans only) say here why")
    stale = [name for name in WALL_CLOCKS if not list(wall_clock_readings(ROOT / name))]
    nothing(stale, "these do not read it any more: take them out of WALL_CLOCKS")


def test_the_clock_check_can_fail(tmp_path):
    """Would catch a checker that sees nothing."""
    file = tmp_path / "bad.py"
    file.write_text(
        "import time, datetime\nfrom time import time_ns\na = time.time()\nb = datetime.datetime.now()\n"
        "c = datetime.date.today()\nd = time.clock_gettime(time.CLOCK_REALTIME)\ne = time.monotonic()\nf = time.time\n"
    )
    assert sorted(node.lineno for node in wall_clock_readings(file)) == [2, 3, 4, 5, 6, 8]


# Spelt in halves, or this file would find itself.
WORDS_FOR_LATER = ["TO" + "DO", "FIX" + "ME", "XX" + "X"]
MACHINE_PATHS = ["/wo" + "rk/", "/ro" + "ot/", "/tm" + "p/"]
REGISTRY_HOSTS = [
    "pypi" + ".org",
    "pythonhosted" + ".org",
    "npmjs" + ".org",
    "yarnpkg" + ".com",
    "debian" + ".org",
]


def findings(patterns):
    """Every tracked line in which one of the patterns stands."""
    wanted = re.compile("|".join(patterns))
    for file in tracked():
        try:
            text = file.read_text()
        except UnicodeDecodeError:
            continue  # a picture
        for match in wanted.finditer(text):
            yield f"{place(file, text.count(chr(10), 0, match.start()) + 1)} {match[0]}"


def test_nothing_is_left_for_later():
    """Would catch a note that only its writer would ever act on; an issue is where work waits."""
    nothing(findings(rf"\b{word}\b" for word in WORDS_FOR_LATER), "do it, or file it")


def test_nothing_names_the_machine_it_was_made_on():
    """Would catch a path or a registry that exists only where somebody once worked."""
    assert not list(findings(rf"(?<![\w.]){path}" for path in MACHINE_PATHS)), (
        "use a relative path or a fixture"
    )
    nothing(findings(re.escape(host) for host in REGISTRY_HOSTS), "a lock names hashes, never hosts")


def mirrored(file):
    """Where the test file of a product file stands."""
    inside = file.relative_to(ROOT)
    return ROOT / "tests" / inside.parent / f"test_{inside.stem.strip('_')}.py"


def test_the_tests_mirror_the_house():
    """Would catch a file that nobody tests by itself, so that its faults show up far away."""
    missing = [
        f"{place(file)} -> {place(mirrored(file))}"
        for file in product_files()
        if file.name != "__init__.py" and place(file) not in NOT_MIRRORED and not mirrored(file).exists()
    ]
    nothing(missing, "each of these needs its test file (or a reason in NOT_MIRRORED)")


def test_the_exceptions_to_the_mirror_are_still_needed():
    """Would catch a reason that outlived its file, or a file that has got its test meanwhile."""
    stale = [name for name in NOT_MIRRORED if not (ROOT / name).exists() or mirrored(ROOT / name).exists()]
    nothing(stale, "take these out of NOT_MIRRORED")


def groups_that_are_built():
    """What is asked for help: `v2v` itself, and its groups as far as they are built."""
    groups = ("charger", "provider", "consumer", "organisation", "config")
    return [["--help"], *([name, "--help"] for name in groups if (ROOT / f"agent/cli/{name}.py").exists())]


@pytest.mark.parametrize("words", groups_that_are_built(), ids=" ".join)
def test_help_comes_without_waiting_for_web3(words):
    """Would catch an import that makes a Raspberry Pi think for seconds before it says what it can do."""
    code = (
        "import sys\nfrom agent.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "slow = {'web3', 'eth_account', 'pymodbus', 'eth'} & set(sys.modules)\n"
        "assert not slow, slow\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert ran.returncode == 0, ran.stderr
    assert "Usage" in ran.stdout


def pins(name):
    """What a lock pins: name -> version."""
    return dict(re.findall(r"^([a-z0-9._-]+)(?:\[.*?\])?==(\S+)", (ROOT / name).read_text(), re.MULTILINE))


def test_the_three_locks_agree_and_hold_what_we_ask_for():
    """Would catch a dependency added without `./run lock`, and a demo that runs other versions than the tests."""
    dev, demo, runtime = (pins(f"requirements{part}.lock") for part in ("-dev", "-demo", ""))
    assert runtime.items() <= demo.items() <= dev.items()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    asked = {
        "": project["project"]["dependencies"],
        "-demo": project["project"]["optional-dependencies"]["demo"],
        "-dev": [word for word in project["dependency-groups"]["dev"] if isinstance(word, str)],
    }
    for part, words in asked.items():
        names = {re.split(r"[\[<>=! ]", word)[0].lower().replace("_", "-") for word in words}
        assert names <= set(pins(f"requirements{part}.lock")), (
            f"./run lock (requirements{part}.lock is behind)"
        )


def test_every_pin_has_hashes():
    """Would catch a lock that lets a registry hand out something else under the same name."""
    for part in ("-dev", "-demo", ""):
        blocks = re.split(r"\n(?=[a-z0-9])", (ROOT / f"requirements{part}.lock").read_text())
        assert len(blocks) > 40
        assert all("--hash=sha256:" in block for block in blocks)


def test_the_scripts_are_plain_sh_and_can_be_run():
    """Would catch a script that needs bash, or that a clone cannot start."""
    for name in ("run", ".ci/run"):
        script = ROOT / name
        assert script.stat().st_mode & 0o111 == 0o111, f"chmod +x {name}"
        assert script.read_text().startswith("#!/bin/sh\n")
        subprocess.run(["sh", "-n", str(script)], check=True)
