"""How a command line reaches the market: the options that say which one and as whom, then questions and transactions.

For every group: `@market_options("provider" | "consumer" | None)` adds `--config`, `--rpc`, `--chain-id`, `--contract`,
and for `signs=True` `--key` and `--password`; the command gets one `access: Access`. Then `async with open_market(access)`.

Rules
* Before the first question that matters: right chain, and our code at the contract's address (78 if not).
* A settings file says where the market is and whose account it is; options go before it. The key that signs must be
  that account's: the operator's key signs inside the daemon only (PROTOCOL section 7).
* No journal is kept: one transaction at a time, waited for, and every refusal comes with what to do about it.

May not know: what a command is for. web3 is loaded when a market is opened, never for `--help`.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import click

from agent.chain import contract
from agent.cli.output import ADDRESS, ether
from agent.cli.remedies import with_remedy
from agent.config import ChainConfig, load_agent, load_consumer, socket_found
from agent.core.units import Address, hex0x
from agent.errors import Misconfigured, Refused
from contracts import load_artefact

if TYPE_CHECKING:
    from agent.chain.node import Node, Receipt
    from agent.chain.sender import Sender
    from agent.keys import Signer

Side = Literal["provider", "consumer"]
Answer = TypeVar("Answer")
LogType = TypeVar("LogType", bound=contract.Log)
Command = Callable[..., Any]

FILES: Final[dict[Side, str]] = {"provider": "agent.toml", "consumer": "consumer.toml"}
RPC_VARIABLE: Final = (
    "V2V_CHAIN__URLS"  # the same names that lie over a settings file: one name for one thing
)
CONTRACT_VARIABLE: Final = "V2V_CHAIN__CONTRACT"


@dataclass(frozen=True, slots=True)
class Access:
    """Which market, and as whom. None: not said."""

    url: str
    chain_id: int | None = None
    contract: Address | None = None
    account: Address | None = None  # whose key must sign, when a settings file says so
    start_block: int = 0
    key: str | None = None
    password: str | None = None
    timeout_s: float = 120
    socket: Path | None = None  # where the running agent of these settings answers


def market_options(
    side: Side | None, *, signs: bool, deploys: bool = False, through_agent: bool = False
) -> Callable[[Command], Command]:
    """Add the options above to a command; it is called with `access` besides its own parameters. `through_agent`: without a
    key the running agent of the settings is asked to sign.
    """
    options = _options(side, signs=signs, deploys=deploys)

    def decorate(command: Command) -> Command:
        @wraps(command)
        def with_access(**given: Any) -> Any:
            said = {name: given.pop(name) for name in _NAMES if name in given}
            access = _access(side, said, signs=signs, deploys=deploys, through_agent=through_agent)
            return command(access=access, **given)

        decorated: Command = with_access
        for option in reversed(options):
            decorated = option(decorated)
        return decorated

    return decorate


_NAMES = ("config_file", "rpc", "chain_id", "contract_address", "key", "password", "timeout_s")


def _options(side: Side | None, *, signs: bool, deploys: bool) -> list[Callable[[Command], Command]]:
    options: list[Callable[[Command], Command]] = []
    if side is not None:
        file, name = click.Path(dir_okay=False, path_type=Path), FILES[side]
        options.append(click.option("--config", "config_file", type=file, help=f"Settings file ({name})."))
    options.append(
        click.option("--rpc", metavar="URL", help=f"The node, ws(s):// or http(s)://; or ${RPC_VARIABLE}.")
    )
    options.append(click.option("--chain-id", type=click.IntRange(min=1), help="Refuse any other chain."))
    if not deploys:
        options.append(
            click.option(
                "--contract", "contract_address", type=ADDRESS, help=f"The market; or ${CONTRACT_VARIABLE}."
            )
        )
    if signs:
        options += [
            click.option(
                "--key", metavar="SOURCE", help="Who signs: a key file (./owner.key) or a credential."
            ),
            click.option("--password", metavar="SOURCE", help="The same for a keystore's password."),
            click.option(
                "--timeout",
                "timeout_s",
                type=click.FloatRange(1, 3_600),
                default=120.0,
                show_default=True,
                help="Seconds to wait for a block.",
            ),
        ]
    return options


def _access(
    side: Side | None, said: Mapping[str, Any], *, signs: bool, deploys: bool, through_agent: bool
) -> Access:
    """Settings first, options over them. Raises UsageError for what nobody said, `Misconfigured` for the file."""
    file = said.get("config_file")
    access = _from_environment(os.environ) if file is None or side is None else _from_settings(side, file)
    given = {
        "url": said.get("rpc"),
        "chain_id": said.get("chain_id"),
        "contract": said.get("contract_address"),
        "key": said.get("key"),
        "password": said.get("password"),
        "timeout_s": said.get("timeout_s"),
    }
    access = replace(access, **{name: value for name, value in given.items() if value is not None})
    where = "" if side is None else f", or --config {FILES[side]}"
    if not access.url:
        raise click.UsageError(f"Which node? Give --rpc URL{where}.")
    if access.contract is None and not deploys:
        raise click.UsageError(f"Which market? Give --contract ADDRESS{where}.")
    if access.key is None and signs and not (through_agent and access.socket is not None):
        asked = " Or start the agent: with --config and without --key it is asked." if through_agent else ""
        raise click.UsageError(
            f"Who signs? Give --key, the file of the owner's key (not the operator's).{asked}"
        )
    return access


def _from_environment(environ: Mapping[str, str]) -> Access:
    market = environ.get(CONTRACT_VARIABLE)
    return Access(
        url=environ.get(RPC_VARIABLE, ""),
        contract=None if market is None else ADDRESS.convert(market, None, None),
    )


def _from_settings(side: Side, file: Path) -> Access:
    if side == "provider":
        agent = load_agent(file, os.environ)
        access = _of_chain(agent.chain, agent.chain.provider)
        return replace(access, socket=socket_found(agent, os.environ))
    consumer = load_consumer(file, os.environ)
    access = _of_chain(consumer.chain, consumer.chain.consumer)
    return replace(access, key=consumer.keys.account, password=consumer.keys.account_password)


def _of_chain(chain: ChainConfig, account: bytes) -> Access:
    # Requests over HTTP need no web3: half a second sooner on a PC, three on a Raspberry Pi.
    url = next((url for url in chain.urls if url.startswith("http")), chain.urls[0])
    return Access(url, chain.chain_id, Address(chain.contract), Address(account), chain.start_block)


# ---- the market, opened


@dataclass(frozen=True, slots=True)
class Market:
    """One market behind one node; `account` signs, the zero address when nobody does."""

    node: Node
    chain_id: int
    address: Address  # the contract's
    start_block: int
    timeout_s: float
    sender: Sender | None

    @property
    def account(self) -> Address:
        """Who signs."""
        assert self.sender is not None, "a command that sends says signs=True"
        return self.sender.address

    async def ask(self, calldata: bytes, decode: Callable[[bytes], Answer]) -> Answer:
        """A view of the contract on the newest state: `ask(contract.encode_x(...), contract.decode_x)`."""
        return decode(await self.node.call(self.address, calldata))

    async def ledger_wei(self, account: Address) -> int:
        """What this account could withdraw now."""
        return await self.ask(contract.encode_balances(account), contract.decode_balances)

    async def settlement_wei(self) -> int:
        """What settling one session costs in gas at today's fees."""
        fees = await self.node.fees()
        return contract.SETTLEMENT_GAS * (fees.base_fee_wei + fees.priority_fee_wei)

    async def auction(self, consumer: Address) -> contract.AuctionState:
        """The consumer's auction."""
        return await self.ask(contract.encode_auctions(consumer), contract.decode_auctions)

    async def send(self, calldata: bytes, value_wei: int = 0) -> Receipt:
        """One transaction to the market, mined. Raises Refused with the contract's error name and its remedy."""
        return await self.send_to(self.address, calldata, value_wei)

    async def send_to(self, to: Address | None, calldata: bytes, value_wei: int = 0) -> Receipt:
        """The same to any address; None creates a contract."""
        assert self.sender is not None, "a command that sends says signs=True"
        try:
            return await self.sender.send_and_wait(to, calldata, value_wei, timeout_s=self.timeout_s)
        except Refused as refused:
            raise with_remedy(refused) from refused

    def log_in(self, receipt: Receipt, kind: type[LogType]) -> LogType | None:
        """The first event of this kind that our contract emitted in that transaction."""
        for log in receipt.logs:
            found = contract.decode_log(log.address, log.topics, log.data)
            if isinstance(found, kind) and found.contract == self.address:
                return found
        return None


@asynccontextmanager
async def open_chain(access: Access) -> AsyncIterator[Market]:
    """The node and the signer, before there is a contract: its address is zero here."""
    from agent.chain.node import Web3Node
    from agent.chain.sender import Sender

    signer = (
        None if access.key is None else _signer(access)
    )  # first: a wrong key needs no network to be wrong
    async with Web3Node(access.url) as node:
        chain_id = await node.chain_id()
        if access.chain_id not in (None, chain_id):
            raise Misconfigured(
                f"the node is on chain {chain_id}, but chain {access.chain_id} was asked for",
                remedy="Correct the chain id, or give the address of a node of that chain.",
            )
        sender = None
        if signer is not None:
            sender = Sender(node, signer, chain_id, revert_name=contract.revert_name)
        address = access.contract or contract.ZERO_ADDRESS
        yield Market(node, chain_id, address, access.start_block, access.timeout_s, sender)


@asynccontextmanager
async def open_market(access: Access) -> AsyncIterator[Market]:
    """The market, checked: right chain, our code. Raises `Misconfigured`, `Transient`."""
    from agent.chain.node import check_deployment

    async with open_chain(access) as market:
        await check_deployment(market.node, market.chain_id, market.address, load_artefact())
        yield market


def _signer(access: Access) -> Signer:
    from agent.keys import load_signer

    assert access.key is not None
    signer = load_signer(access.key, access.password)
    if access.account not in (None, signer.address):
        raise Misconfigured(
            f"the key {access.key} is of {hex0x(signer.address)}, the settings are of {hex0x(access.account or b'')}",
            remedy="Give the key of that account. The operator's key signs inside the daemon only.",
        )
    return signer


# ---- what every transaction reports


def receipt_json(receipt: Receipt) -> dict[str, Any]:
    """The part of a JSON answer that every transaction has."""
    return {
        "tx": receipt.tx_hash,
        "block": receipt.block_number,
        "gas_used": receipt.gas_used,
        "fee_wei": str(receipt.fee_wei),
    }


def receipt_facts(receipt: Receipt) -> list[tuple[str, object]]:
    """The same for a person."""
    return [
        ("transaction", receipt.tx_hash),
        ("block", receipt.block_number),
        ("gas", f"{receipt.gas_used} used, {ether(receipt.fee_wei)}"),
    ]
