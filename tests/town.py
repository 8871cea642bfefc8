"""A town with a chain of its own, for stories about command lines: people with key files, and `v2v` as they type it.

    with Town(tmp_path) as town:
        said = town.v2v("organisation", "deploy", "--short", as_="organisation")
        assert said.exit_code == 0

The chain is the embedded devnet, in a thread of its own, because a command brings its own event loop. Every transaction
makes a block; time passes by `town.pass_time`.
"""

import asyncio
import contextlib
import io
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import coincurve

from agent.chain import contract
from agent.chain.node import Receipt, Web3Node
from agent.chain.sender import Sender
from agent.cli import main
from agent.core.units import Address, hex0x
from agent.demo.devnet import Devnet
from agent.keys import Signer

START_S = 30  # a devnet listens within a second; a busy machine is given more


@dataclass(frozen=True)
class Said:
    """What a command printed, and how it ended."""

    exit_code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """Standard output, which must be one object on one line."""
        assert self.exit_code == 0, self.err
        assert self.out.count("\n") == 1, self.out
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found


def v2v(*typed: str) -> Said:
    """Run `v2v` with what was typed after it, in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(typed)
        except SystemExit as done:
            exit_code = done.code
    assert isinstance(exit_code, int)
    return Said(exit_code, out.getvalue(), err.getvalue())


class Town:
    """A devnet, its people's key files in `folder`, and (once deployed) a market."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.net = Devnet()
        self.market: Address | None = None
        self._ready, self._stop = threading.Event(), asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), daemon=True)

    def __enter__(self) -> Self:
        for label in self.net.accounts:
            path = Path(self.key(label))
            path.write_text(hex0x(self.net.key(label)))
            path.chmod(0o600)
        self._thread.start()
        assert self._ready.wait(START_S), "the devnet did not start"
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(START_S)

    async def _live(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with self.net:
            self._ready.set()
            await self._stop.wait()

    # ---- people

    def key(self, label: str) -> str:
        """The file of somebody's key, as `--key` takes it."""
        return str(self.folder / f"{label}.key")

    def address(self, label: str) -> str:
        """Somebody's account, as it is typed."""
        return hex0x(self.net.address(label))

    # ---- what they do

    def v2v(self, *typed: str, as_: str | None = None, market: bool = True) -> Said:
        """A command against this chain, signed by that person's key file."""
        options = ["--rpc", self.net.url_http]
        if market and self.market is not None:
            options += ["--contract", hex0x(self.market)]
        if as_ is not None:
            options += ["--key", self.key(as_)]
        return v2v(*typed, *options)

    def open_market(self, *rules: str, evs: tuple[str, ...] = ("alice", "bob", "carol")) -> None:
        """Deploy by command line and register EVs."""
        deployed = self.v2v("organisation", "deploy", *rules, "--json", as_="organisation", market=False)
        self.market = Address(bytes.fromhex(deployed.json["contract"][2:]))
        for ev in evs:
            info = ("--info", "11" * 32)
            added = self.v2v("organisation", "add-ev", self.address(ev), *info, as_="organisation")
            assert added.exit_code == 0, added.err

    def send(self, label: str, calldata: bytes, value_wei: int = 0, to: bytes | None = None) -> Receipt:
        """A transaction without a command line, to the market unless `to` says otherwise (b"" creates)."""
        receiver = self.market if to is None else to or None

        async def sent() -> Receipt:
            async with Web3Node(self.net.url_http) as node:
                signer = Signer(coincurve.PrivateKey(self.net.key(label)))
                sender = Sender(node, signer, self.net.chain_id, revert_name=contract.revert_name)
                return await sender.send_and_wait(receiver, calldata, value_wei)

        return asyncio.run(sent())

    def start_auction(
        self, label: str, *, energy_wh: int = 200, rate: int = 1_000_000, bidding_s: int = 600
    ) -> None:
        """Somebody asks for energy, with the deposit sent along."""
        calldata = contract.encode_start_auction(energy_wh, bidding_s, rate, 3_600, bytes(32))
        self.send(label, calldata, -(-rate * energy_wh // 1000))

    def pass_time(self, seconds: int) -> None:
        """The newest block comes so much later than the one before (which may be ahead of the wall clock)."""

        def passed() -> None:
            head_s = int(self.net.evm.head.header.timestamp)
            self.net.methods.increase_time(seconds + max(0, head_s - self.net.methods.now_s))
            self.net.mine()

        self._in_its_thread(passed)

    def _in_its_thread(self, action: Callable[[], None]) -> None:
        async def acted() -> None:
            action()

        assert self._loop is not None
        asyncio.run_coroutine_threadsafe(acted(), self._loop).result(START_S)
