"""`docs/four-terminals.md`, copied and pasted: every command of the page, literally, in four shells.

The clone is a folder with links to this one's `.venv` and `config`, and home is a folder of the test's: the page writes
into both. Its ports are fixed (a newcomer copies them), so the story waits until nobody has them.
"""

import json
import re
import socket
import sys
from pathlib import Path

import pytest
from stage import ROOT, Program, eventually, surroundings

PAGE = ROOT / "docs/four-terminals.md"
PORTS = (8545, 1502, 8465)
ORDER_WH = 40

pytestmark = pytest.mark.timeout(240)


def chapters():
    """The page's commands: heading -> shell lines."""
    parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]
    return {
        part.splitlines()[0].partition(":")[0]: "\n".join(re.findall(r"```sh\n(.*?)```", part, re.DOTALL))
        for part in parts
    }


def is_free(port):
    """True when nobody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture
def terminals(tmp_path):
    """Opens a terminal of the page: a shell in the clone, which does what every terminal does first, then its own."""
    clone, home = tmp_path / "clone", tmp_path / "home"
    for folder in (clone, home):
        folder.mkdir()
    (clone / ".venv").symlink_to(sys.prefix)
    (clone / "config").symlink_to(ROOT / "config")
    eventually(lambda: all(map(is_free, PORTS)), 30, f"nobody listens on {PORTS}")
    commands, opened = chapters(), []

    def opened_terminal(number):
        words = commands["In every terminal"] + commands[f"Terminal {number}"]
        environ = surroundings() | {"HOME": str(home)}
        shell = Program(["sh", "-euc", words], clone, f"terminal-{number}", environ, split=True)
        opened.append(shell)
        return shell

    yield opened_terminal
    for shell in reversed(opened):
        shell.__exit__()


def test_the_page_works_as_it_is_written(terminals, tmp_path):
    """Would catch a page that has grown stale: a renamed option, a missing step, another answer than it promises."""
    terminals(1).heard("A throw-away chain, id 1337, listens on ws://127.0.0.1:8545")
    terminals(2).heard("listening on tcp://127.0.0.1:1502")
    provider = terminals(3)
    eventually(
        lambda: '"agent.started"' in provider.complained or not provider.is_running, 90, "the agent runs"
    )
    assert provider.is_running, provider.complained
    consumer = terminals(4)
    assert consumer.ended(150) == 0, consumer.complained

    truth = json.loads(Path(tmp_path, "home/v2v-evening/truth.json").read_text())
    assert ORDER_WH * 1000 <= truth["delivered_mwh"] < (ORDER_WH + 1) * 1000
    assert not truth["energised"]
    cost = "0.00064 ETH"  # 40 Wh at 0.016 ETH per kWh
    assert re.search(rf"\b{cost}", consumer.said), consumer.said
    assert "SETTLED" in consumer.said
    assert '"mqtt.down"' in provider.complained


def test_the_page_has_the_four_terminals():
    """Would catch a heading that the copier above no longer recognises, so that it would copy nothing."""
    commands = chapters()
    assert list(commands) == ["In every terminal", *(f"Terminal {number}" for number in (1, 2, 3, 4))]
    assert all(commands.values())
    whole = "\n".join(commands.values())
    for command in (
        "v2v devnet",
        "v2v charger simulate",
        "v2v organisation deploy",
        "v2v organisation add-ev",
        "v2v provider set-operator",
        "v2v provider run --config",
        "v2v provider bid",
        "v2v consumer charge --config",
    ):
        assert command in whole
