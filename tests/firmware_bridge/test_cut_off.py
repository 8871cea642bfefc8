"""The last resort runs, or says loudly that it did not."""

import sys

import pytest

from firmware_bridge import cut_off
from firmware_bridge.charger import BridgeError
from firmware_bridge.cut_off import run_cut_off


async def test_nothing_configured_is_nothing_done():
    """Would catch a charger without a cut-off that fails when it is stopped firmly."""
    await run_cut_off(None, ())


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ((sys.executable, "-c", "raise SystemExit(3)"), "K1 ended with 3"),
        (("/nowhere/open-k1",), "No such file"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), "took too long"),
    ],
)
async def test_a_cut_off_that_fails_says_so(monkeypatch, command, told):
    """Would catch a welded contactor whose last resort failed in silence, or that is waited for without an end."""
    monkeypatch.setattr(cut_off, "CUT_OFF_S", 1.0)
    with pytest.raises(BridgeError, match=told) as failed:
        await run_cut_off("K1", command)
    assert failed.value.name == "cut_off_failed"


async def test_it_runs(tmp_path):
    """Would catch a command that is checked and never started."""
    opened = tmp_path / "opened"
    await run_cut_off("K1", (sys.executable, "-c", f"open({str(opened)!r}, 'w').close()"))
    assert opened.exists()
