"""The ledger's commands, the same for provider and consumer: balance, deposit, withdraw, settle.

For the group's owner: `for command in ledger_commands("provider"): provider.add_command(command)`.

Rules
* Exits never depend on anybody: `withdraw` and `settle` work for removed EVs and in a paused market.
* Every answer ends with what is in the ledger now.
"""

from __future__ import annotations

import asyncio
from typing import Any

import click

from agent.chain import contract
from agent.cli.market import Access, Market, Side, market_options, open_market, receipt_facts, receipt_json
from agent.cli.output import ADDRESS, BYTES32, WEI, at, echo, ether, facts, json_option, parsed_wei
from agent.cli.remedies import with_remedy
from agent.core.units import Address, Token, hex0x
from agent.errors import Refused


def ledger_commands(side: Side) -> tuple[click.Command, ...]:
    """The four commands, reading that side's settings file."""
    return _balance(side), _deposit(side), _withdraw(side), _settle(side)


def _balance(side: Side) -> click.Command:
    @click.command()
    @click.argument("account", type=ADDRESS, required=False)
    @market_options(side, signs=False)
    @json_option
    def balance(access: Access, account: Address | None, *, as_json: bool) -> None:
        """Show ledger and wallet of ACCOUNT.

        Without ACCOUNT: of the settings' own.
        """
        who = account or access.account
        if who is None:
            raise click.UsageError("Whose balance? Give ACCOUNT or --config.")
        asyncio.run(_show_balance(access, who, as_json=as_json))

    return balance


def _deposit(side: Side) -> click.Command:
    @click.command()
    @click.argument("amount_wei", metavar="AMOUNT", type=WEI)
    @market_options(side, signs=True)
    @json_option
    def deposit(access: Access, amount_wei: int, *, as_json: bool) -> None:
        """Put AMOUNT into the market's ledger.

        AMOUNT is in wei, or has its unit: "0.05 ETH". Put it in quotation marks then.
        """
        asyncio.run(_do_deposit(access, amount_wei, as_json=as_json))

    return deposit


def _withdraw(side: Side) -> click.Command:
    @click.command()
    @click.argument("amount", metavar="AMOUNT|all")
    @click.option("--to", type=ADDRESS, help="Who is paid; the key's own account unless given.")
    @market_options(side, signs=True)
    @json_option
    def withdraw(access: Access, amount: str, to: Address | None, *, as_json: bool) -> None:
        """Pay AMOUNT out of the market's ledger.

        AMOUNT is in wei, or has its unit: "0.05 ETH"; or it is the word all.
        """
        amount_wei = None if amount == "all" else _wei(amount)
        asyncio.run(_do_withdraw(access, amount_wei, to, as_json=as_json))

    return withdraw


def _settle(side: Side) -> click.Command:
    @click.command()
    @click.argument("token", type=BYTES32)
    @market_options(side, signs=True)
    @json_option
    def settle(access: Access, token: bytes, *, as_json: bool) -> None:
        """Pay out an overdue session.

        Anyone may do this for any TOKEN whose challenge or grace is over.
        """
        asyncio.run(_do_settle(access, Token(token), as_json=as_json))

    return settle


def _wei(amount: str) -> int:
    try:
        return parsed_wei(amount)
    except ValueError as problem:
        raise click.BadParameter(str(problem), param_hint="AMOUNT") from problem


# ---- what they do


async def _show_balance(access: Access, account: Address, *, as_json: bool) -> None:
    async with open_market(access) as market:
        ledger_wei = await market.ledger_wei(account)
        wallet_wei = await market.node.balance(account)
        settlement_wei = await market.settlement_wei()
    settlements_left = wallet_wei // max(1, settlement_wei)
    value = {
        "account": account,
        "ledger_wei": str(ledger_wei),
        "wallet_wei": str(wallet_wei),
        "settlement_wei": str(settlement_wei),
        "settlements_left": settlements_left,
    }
    told = [
        ("account", account),
        ("in the ledger", ether(ledger_wei)),
        ("in the wallet", ether(wallet_wei)),
        ("gas for about", f"{settlements_left} settlements, {ether(settlement_wei)} each today"),
    ]
    echo(value, facts(told), as_json=as_json)


async def _do_deposit(access: Access, amount_wei: int, *, as_json: bool) -> None:
    if amount_wei == 0:
        raise click.UsageError("A deposit of nothing would only cost gas.")
    async with open_market(access) as market:
        receipt = await market.send(contract.encode_deposit(), amount_wei)
        ledger_wei = await market.ledger_wei(market.account)
        value = {"account": market.account, "deposited_wei": str(amount_wei), "ledger_wei": str(ledger_wei)}
        told = [
            ("account", market.account),
            ("deposited", ether(amount_wei)),
            ("in the ledger now", ether(ledger_wei)),
        ]
    echo(value | receipt_json(receipt), facts([*told, *receipt_facts(receipt)]), as_json=as_json)


async def _do_withdraw(access: Access, amount_wei: int | None, to: Address | None, *, as_json: bool) -> None:
    async with open_market(access) as market:
        receiver = to or market.account
        paid_wei = await market.ledger_wei(market.account) if amount_wei is None else amount_wei
        if paid_wei == 0:
            raise Refused("nothing_to_withdraw", f"the ledger of {hex0x(market.account)} is empty")
        receipt = await market.send(contract.encode_withdraw(paid_wei, receiver))
        ledger_wei = await market.ledger_wei(market.account)
        value: dict[str, Any] = {"account": market.account, "to": receiver, "withdrawn_wei": str(paid_wei)}
        value["ledger_wei"] = str(ledger_wei)
        told = [("paid", ether(paid_wei)), ("to", receiver), ("in the ledger now", ether(ledger_wei))]
    echo(value | receipt_json(receipt), facts([*told, *receipt_facts(receipt)]), as_json=as_json)


async def _do_settle(access: Access, token: Token, *, as_json: bool) -> None:
    async with open_market(access) as market:
        await _require_settleable(market, token)
        receipt = await market.send(contract.encode_settle(token))
        ended = market.log_in(receipt, contract.ConnectionEnded)
        if ended is None:
            raise Refused("not_settled", f"{hex0x(receipt.tx_hash)} was mined, but ended no session")
        value = {
            "token": token,
            "provider": ended.provider,
            "consumer": ended.consumer,
            "energy_wh_settled": ended.delivered_wh,
            "cost_wei": str(ended.fee_wei),
        }
        told = [("settled", f"{ended.delivered_wh} Wh"), ("paid to the provider", ether(ended.fee_wei))]
        told += [("provider", hex0x(ended.provider)), ("consumer", hex0x(ended.consumer))]
    echo(value | receipt_json(receipt), facts([*told, *receipt_facts(receipt)]), as_json=as_json)


async def _require_settleable(market: Market, token: Token) -> None:
    """Say when it will be possible, in people's time: the contract knows only seconds. Raises Refused."""
    session = await market.ask(contract.encode_sessions(token), contract.decode_sessions)
    if not session.is_open:
        raise with_remedy(Refused("NoSession", f"there is no open session {hex0x(token)}"))
    now_s = (await market.node.head()).timestamp_s
    if now_s < session.settle_at_s:
        raise Refused(
            f"TooEarly(settleAt={session.settle_at_s})",
            f"anyone may settle this session from {at(session.settle_at_s)} on",
            remedy="Until then its parties may end it: the provider's daemon, or v2v consumer end.",
        )
