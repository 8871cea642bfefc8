"""`v2v devnet` as somebody types it."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys

from agent.core.units import hex0x
from agent.demo.devnet import Devnet, derive_key


def test_the_command_says_what_it_made_and_stops_when_told() -> None:
    """Would catch a command that cannot be scripted: one JSON line, a chain that answers, SIGTERM ends it
    with 0.
    """
    command = [sys.executable, "-m", "agent", "devnet", "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            made = json.loads(process.stdout.readline())
            assert made["chain_id"] == 1337
            assert made["throw_away_accounts"]["alice"]["key"] == hex0x(derive_key("v2v", "alice"))
            assert made["url_ws"].startswith("ws://127.0.0.1:")
            process.send_signal(signal.SIGTERM)
            assert process.wait(timeout=20) == 0
        finally:
            process.kill()


def test_a_taken_port_is_named_with_a_remedy() -> None:
    """Would catch a traceback where somebody only has another node running."""

    async def occupied() -> subprocess.CompletedProcess[str]:
        async with Devnet() as net:
            command = [sys.executable, "-m", "agent", "devnet", "--port", str(net.port)]
            return await asyncio.to_thread(
                subprocess.run, command, capture_output=True, text=True, timeout=30, check=False
            )

    finished = asyncio.run(occupied())
    assert finished.returncode == 78
    assert "choose another --port" in finished.stderr
    assert "Traceback" not in finished.stderr
