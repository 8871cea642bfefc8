"""`v2v organisation`: who runs the market. Deploys it once, says who may trade in it, opens and pauses it.

Rules
* The account that deploys is the organisation; a market's rules never change after that.
* After a deployment the code on the chain is compared with ours, before its address is printed.
* Nothing personal goes on the chain: an EV's papers are committed to with a salt, hashed on this machine.

May not know: sessions, the daemon.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from typing import Any, Final

import click

from agent.chain import contract
from agent.chain.contract import MarketParameters
from agent.cli.market import (
    Access,
    market_options,
    open_chain,
    open_market,
    receipt_facts,
    receipt_json,
)
from agent.cli.output import ADDRESS, BYTES32, at, duration, echo, ether, facts, json_option
from agent.core.units import Address, hex0x
from agent.errors import Refused
from contracts import load_artefact

# A market to try things in: an evening takes a minute, and a token outlives the provider's safety margin (60 s).
SHORT: Final = MarketParameters(
    bidding_s_min=1,
    bidding_s_max=3_600,
    soft_close_s=2,
    soft_close_count_max=3,
    connect_window_s=120,
    token_validity_s_min=60,
    token_validity_s_max=7_200,
    challenge_s=10,
    grace_s=60,
)

_PARAMETERS: Final = {  # option -> what it says in --help; the order of the Solidity struct
    "bidding_s_min": "Shortest bidding time.",
    "bidding_s_max": "Longest bidding time.",
    "soft_close_s": "A later bid keeps the auction open this long.",
    "soft_close_count_max": "How often, at most 7.",
    "connect_window_s": "Time to connect after closing.",
    "token_validity_s_min": "Shortest token validity.",
    "token_validity_s_max": "Longest token validity, below 262144.",
    "challenge_s": "Time to answer a consumer's close with a receipt.",
    "grace_s": "This long after the validity anyone may settle.",
    "bond_bps": "The provider's bond, in 1/10000 of the cost.",
}

Command = Callable[..., Any]


@click.group()
def organisation() -> None:
    """Who runs the market: deploy, add and remove EVs."""


# ---- deploy


def _parameter_options(command: Command) -> Command:
    """One option for each rule of a market; None where nothing was said."""
    for name, text in reversed(_PARAMETERS.items()):
        default = getattr(MarketParameters(), name)
        option = click.option(
            f"--{name.replace('_', '-')}",
            name,
            type=click.IntRange(0, 2**32 - 1),
            help=f"{text}  [default: {default}; --short: {getattr(SHORT, name)}]",
        )
        command = option(command)
    return command


@organisation.command()
@_parameter_options
@click.option("--short", is_flag=True, help="Short times, for a market to try things in.")
@market_options(None, signs=True, deploys=True)
@json_option
def deploy(access: Access, *, short: bool, as_json: bool, **said: int | None) -> None:
    """Put a new market on the chain.

    The key's account becomes its organisation. The rules below never change afterwards.
    """
    given = {name: value for name, value in said.items() if value is not None}
    asyncio.run(_deploy(access, replace(SHORT if short else MarketParameters(), **given), as_json=as_json))


async def _deploy(access: Access, rules: MarketParameters, *, as_json: bool) -> None:
    from agent.chain.node import check_deployment

    async with open_chain(access) as chain:
        receipt = await chain.send_to(None, contract.encode_deploy(rules))
        if receipt.contract is None:
            raise Refused("not_deployed", f"{hex0x(receipt.tx_hash)} was mined, but made no contract")
        await check_deployment(chain.node, chain.chain_id, receipt.contract, load_artefact())
        value = {
            "contract": receipt.contract,
            "chain_id": chain.chain_id,
            "organisation": chain.account,
            "parameters": asdict(rules),
        }
        told = [("contract", receipt.contract), ("chain id", chain.chain_id), ("organisation", chain.account)]
        settings = (
            f"\n\nFor [chain] of the settings files:\n"
            f'  contract = "{hex0x(receipt.contract)}"\n'
            f"  chain_id = {chain.chain_id}\n"
            f"  start_block = {receipt.block_number}"
        )
    text = facts([*told, *receipt_facts(receipt)]) + settings
    echo(value | receipt_json(receipt), text, as_json=as_json)


# ---- EVs


@organisation.command("add-ev")
@click.argument("ev", type=ADDRESS)
@click.option("--info", type=BYTES32, help="A salted commitment to its papers, made elsewhere.")
@click.option("--info-text", help="Its papers; hashed here with a salt, never sent.")
@click.option("--salt", type=BYTES32, help="For --info-text; a random one is made and printed unless given.")
@market_options(None, signs=True)
@json_option
def add_ev(
    access: Access,
    ev: Address,
    info: bytes | None,
    info_text: str | None,
    salt: bytes | None,
    *,
    as_json: bool,
) -> None:
    """Register EV: it may then start auctions and bid."""
    if (info is None) == (info_text is None):
        raise click.UsageError("Give either --info (32 bytes) or --info-text (hashed here).")
    if salt is not None and info_text is None:
        raise click.UsageError("--salt belongs to --info-text.")
    if info_text is not None:
        salt = secrets.token_bytes(32) if salt is None else salt
        info = commitment(salt, info_text)
    assert info is not None
    asyncio.run(_add_ev(access, ev, info, salt, as_json=as_json))


def commitment(salt: bytes, text: str) -> bytes:
    """SHA-256 of the salt's 32 bytes and the text as UTF-8: whoever has both can check it with common tools.

    The salt stops guessing: there are few licence plates.
    """
    return hashlib.sha256(salt + text.encode()).digest()


async def _add_ev(access: Access, ev: Address, info: bytes, salt: bytes | None, *, as_json: bool) -> None:
    async with open_market(access) as market:
        receipt = await market.send(contract.encode_add_ev(ev, info))
    value = {"ev": ev, "info": info, "salt": salt} | receipt_json(receipt)
    told: list[tuple[str, object]] = [("registered", ev), ("info", info)]
    if salt is not None:
        told.append(("salt", f"{hex0x(salt)} (keep it with the papers: both together prove the info)"))
    echo(value, facts([*told, *receipt_facts(receipt)]), as_json=as_json)


@organisation.command("remove-ev")
@click.argument("ev", type=ADDRESS)
@market_options(None, signs=True)
@json_option
def remove_ev(access: Access, ev: Address, *, as_json: bool) -> None:
    """Take EV out of the market.

    It can no longer start, bid or connect. Its sessions and its money stay safe.
    """
    asyncio.run(_remove_ev(access, ev, as_json=as_json))


async def _remove_ev(access: Access, ev: Address, *, as_json: bool) -> None:
    async with open_market(access) as market:
        receipt = await market.send(contract.encode_remove_ev(ev))
        was_ev = market.log_in(receipt, contract.EVRemoved) is not None
    word = "removed" if was_ev else "was no EV"
    value = {"ev": ev, "removed": was_ev} | receipt_json(receipt)
    echo(value, facts([(word, ev), *receipt_facts(receipt)]), as_json=as_json)


# ---- the market as a whole


@organisation.command("set-status")
@click.argument("status", type=click.Choice(["on", "off"]))
@market_options(None, signs=True)
@json_option
def set_status(access: Access, status: str, *, as_json: bool) -> None:
    """Open (on) or pause (off) the market. Nobody's exit depends on it."""
    asyncio.run(_set_status(access, is_active=status == "on", as_json=as_json))


async def _set_status(access: Access, *, is_active: bool, as_json: bool) -> None:
    async with open_market(access) as market:
        receipt = await market.send(contract.encode_change_status(is_active))
    value = {"active": is_active} | receipt_json(receipt)
    told = [("market", "open" if is_active else "paused"), *receipt_facts(receipt)]
    echo(value, facts(told), as_json=as_json)


@organisation.command()
@click.option("--ev", type=ADDRESS, help="Show this account instead.")
@market_options(None, signs=False)
@json_option
def show(access: Access, ev: Address | None, *, as_json: bool) -> None:
    """Show the market, or one account in it."""
    asyncio.run(
        _show_market(access, as_json=as_json) if ev is None else _show_ev(access, ev, as_json=as_json)
    )


async def _show_market(access: Access, *, as_json: bool) -> None:
    async with open_market(access) as market:
        owner = await market.ask(contract.encode_owner(), contract.decode_owner)
        is_active = await market.ask(contract.encode_status(), contract.decode_status)
        rules = await market.ask(contract.encode_parameters(), contract.decode_parameters)
        holds_wei = await market.node.balance(market.address)
    value = {
        "contract": market.address,
        "chain_id": market.chain_id,
        "organisation": owner,
        "active": is_active,
        "holds_wei": str(holds_wei),
        "parameters": asdict(rules),
    }
    told: list[tuple[str, object]] = [
        ("contract", market.address),
        ("chain id", market.chain_id),
        ("organisation", owner),
        ("market", "open" if is_active else "paused"),
        ("holds", ether(holds_wei)),
    ]
    told += [_rule(field.name, getattr(rules, field.name)) for field in fields(rules)]
    echo(value, facts(told), as_json=as_json)


def _rule(name: str, value: int) -> tuple[str, str]:
    """`bidding_s_min` 60 -> ("bidding min", "1 min"), `bond_bps` 5000 -> ("bond", "50.00 % of the cost")."""
    if name == "bond_bps":
        return "bond", f"{value // 100}.{value % 100:02d} % of the cost"
    label = name.replace("_s_", "_").removesuffix("_s").replace("_", " ")
    return label, str(value) if "count" in name else duration(value)


async def _show_ev(access: Access, ev: Address, *, as_json: bool) -> None:
    async with open_market(access) as market:
        registered = await market.ask(contract.encode_ev_info(ev), contract.decode_ev_info)
        ledger_wei = await market.ledger_wei(ev)
        hot = await market.ask(contract.encode_operator_of(ev), contract.decode_operator_of)
    value = {
        "account": ev,
        "is_ev": registered.added_at_s > 0,
        "info": registered.info,
        "added_at_s": registered.added_at_s,
        "ledger_wei": str(ledger_wei),
        "operator": hot.operator,
        "bond_wei_limit": str(hot.bond_wei_limit),
        "bond_wei_locked": str(hot.bond_wei_locked),
    }
    told = [
        ("account", ev),
        *_ev_facts(registered),
        ("in the ledger", ether(ledger_wei)),
        *_operator_facts(hot),
    ]
    echo(value, facts(told), as_json=as_json)


def _ev_facts(registered: contract.EvInfo) -> list[tuple[str, object]]:
    if not registered.added_at_s:
        return [("registered", "no")]
    return [("registered", at(registered.added_at_s)), ("info", registered.info)]


def _operator_facts(hot: contract.OperatorState) -> list[tuple[str, object]]:
    if hot.operator == contract.ZERO_ADDRESS:
        return [("operator", "none")]
    limit = f"{ether(hot.bond_wei_limit)}, of which {ether(hot.bond_wei_locked)} are locked now"
    return [("operator", hot.operator), ("its bonds", f"at most {limit}")]
