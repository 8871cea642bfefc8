"""`v2v devnet`: a throw-away chain on this machine, for trying things in several terminals."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
from typing import TYPE_CHECKING

import click

from agent.core.units import hex0x
from agent.errors import Misconfigured

if TYPE_CHECKING:
    from agent.demo.devnet import Devnet


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", default=8545, show_default=True, help="Port for HTTP and WebSocket; 0 for any free one."
)
@click.option(
    "--block-time",
    "block_time_s",
    default=1.0,
    show_default=True,
    type=click.FloatRange(min=0, max=3_600),
    help="Seconds between blocks; 0 makes a block for every transaction.",
)
@click.option("--seed", default="v2v", show_default=True, help="The accounts' keys follow from it.")
@click.option("--chain-id", default=1337, show_default=True, type=click.IntRange(min=1, max=2**53))
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of a table.")
def devnet(host: str, port: int, block_time_s: float, seed: str, chain_id: int, as_json: bool) -> None:
    """Run a chain in memory until Ctrl-C. Its accounts are funded, and their keys are public."""
    try:
        from agent.demo.devnet import Devnet
    except ImportError as problem:
        raise Misconfigured(
            f"the embedded chain is not installed ({problem.name} is missing)",
            remedy="pip install 'v2v-agent[demo]'",
        ) from problem
    net = Devnet(host=host, port=port, block_time_s=block_time_s, seed=seed, chain_id=chain_id)
    asyncio.run(_serve(net, as_json=as_json))


async def _serve(net: Devnet, *, as_json: bool) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    async with contextlib.AsyncExitStack() as stack:
        try:
            await stack.enter_async_context(net)
        except OSError as problem:
            raise Misconfigured(
                f"{net.host}:{net.port} cannot be listened on ({problem.strerror or problem})",
                remedy="Another node may run there: choose another --port, or 0 for any free one.",
            ) from problem
        click.echo(_as_json(net) if as_json else _as_text(net))
        await stopped.wait()


def _as_json(net: Devnet) -> str:
    accounts = {
        label: {"address": hex0x(address), "key": hex0x(net.key(label))}
        for label, address in net.accounts.items()
    }
    addresses = {"url_http": net.url_http, "url_ws": net.url_ws, "chain_id": net.chain_id}
    return json.dumps({**addresses, "throw_away_accounts": accounts})


def _as_text(net: Devnet) -> str:
    lines = [
        f"A throw-away chain, id {net.chain_id}, listens on {net.url_ws} and {net.url_http}",
        "",
        "THROW-AWAY accounts, 1000 coins each. Everybody knows these keys: never send them real money.",
    ]
    for label, address in net.accounts.items():
        lines.append(f"  {label:<14}{hex0x(address)}  key {hex0x(net.key(label))}")
    return "\n".join([*lines, "", "Ctrl-C stops it, and everything on it is forgotten."])
