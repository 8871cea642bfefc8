"""How long the daemon takes from its start to READY, and what memory it then holds.

Ours is the real `v2v provider run` against an embedded chain and a simulated charger: journal, charger held, keys, contract code
compared, subscribed, READY=1 on its notify socket. The floor is an interpreter that only imports web3, in the same run.
"""

from __future__ import annotations

import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from agent.chain.node import Web3Node
from agent.demo import market as setup
from agent.demo.devnet import Devnet
from bench import Row
from firmware_bridge.simulator import Simulator, SimulatorConfig

ROUNDS_MAX = 7  # a start takes seconds, and the median of seven is steady
READY_TIMEOUT_S = 30.0
IMPORT_WEB3 = "import web3, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
GOAL_SECONDS_RATIO, GOAL_MEMORY_RATIO = 4.0, 1.5


def rows(runs: int) -> list[Row]:
    """Seconds to READY, and resident memory in MiB."""
    rounds = min(runs, ROUNDS_MAX)
    with tempfile.TemporaryDirectory(prefix="v2v-bench-") as directory:
        ours, floor = asyncio.run(_measured(Path(directory), rounds))
    return [
        _row(
            "start to READY",
            "s",
            rounds,
            [one[0] for one in ours],
            [one[0] for one in floor],
            GOAL_SECONDS_RATIO,
        ),
        _row(
            "resident memory",
            "MiB",
            rounds,
            [one[1] for one in ours],
            [one[1] for one in floor],
            GOAL_MEMORY_RATIO,
        ),
    ]


def _row(metric: str, unit: str, rounds: int, ours: list[float], floor: list[float], ratio: float) -> Row:
    mine, bare = statistics.median(ours), statistics.median(floor)
    return Row(
        bench="startup",
        metric=metric,
        unit=unit,
        ours=mine,
        goal=f"<= {ratio:g} x floor",
        met=mine <= ratio * bare,
        runs=rounds,
        floor=bare,
        floor_name="python -c 'import web3'",
    )


async def _measured(
    directory: Path, rounds: int
) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    ours, floor = [], []
    labels = setup.labels(("alice",), "carol")
    async with (
        Devnet(block_time_s=1, accounts=labels) as net,
        Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as plug,
    ):
        async with Web3Node(net.url_ws) as node:
            provider = setup.provider(net, directory, "alice")
            organisation, consumer = (setup.party(net, directory, name) for name in ("organisation", "carol"))
            market = await setup.opened(node, net.chain_id, organisation, (provider,), consumer)
        config = setup.agent_toml(
            directory,
            provider,
            market,
            url_ws=net.url_ws,
            chain_id=net.chain_id,
            charger_wire=plug.wire,
            mqtt_port=None,
            http_port=0,
        )
        for _ in range(rounds):
            ours.append(await _start(directory, config))
            floor.append(await asyncio.to_thread(_bare))
    return ours, floor


async def _start(directory: Path, config: Path) -> tuple[float, float]:
    """(seconds from fork to READY=1, MiB resident then)."""
    place = directory / "notify.socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
        notify.bind(str(place))
        notify.settimeout(0)  # asyncio waits
        began = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "agent", "provider", "run", "--config", str(config),
            env={**os.environ, "NOTIFY_SOCKET": str(place)}, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while b"READY=1" not in await asyncio.get_running_loop().sock_recv(notify, 4096):
                    continue
            seconds = time.perf_counter() - began
            return seconds, _resident_mib(process.pid)
        finally:
            process.terminate()
            await process.wait()
            place.unlink()


def _resident_mib(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text(encoding="ascii")
    kib = next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(kib) / 1024


def _bare() -> tuple[float, float]:
    began = time.perf_counter()
    kib = subprocess.run([sys.executable, "-c", IMPORT_WEB3], check=True, capture_output=True).stdout
    return time.perf_counter() - began, int(kib) / 1024
