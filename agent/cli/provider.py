"""`v2v provider`: the owner who sells. Runs the agent, bids, looks at sessions, names the operator, moves money.

Rules
* Commands that send sign with the owner's key. The operator's key is read by `run` alone (PROTOCOL section 7); `bid` without
  a key asks the running agent, over its local socket, to sign.
* `sessions` reads the journal while the daemon writes it; it takes no lock and asks nobody.
* A bid is pinned to the auction that was looked at, and only the bond that is missing is sent along.

May not know: how a session is driven.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from agent.chain import contract
from agent.chain.contract import AuctionState, MarketParameters
from agent.cli.hello import hello
from agent.cli.ledger import ledger_commands
from agent.cli.market import Access, Market, market_options, open_market, receipt_facts, receipt_json
from agent.cli.output import ADDRESS, WEI, at, duration, echo, ether, facts, json_option, table
from agent.cli.remedies import REMEDIES, with_remedy
from agent.cli.watch import watch
from agent.config import AgentConfig, load_agent, socket_found
from agent.core.settling import settlement_wei_prudent, settlements_left
from agent.core.units import UINT64_MAX, UINT128_MAX, Address, cost_wei_ceil, cost_wei_floor, hex0x
from agent.errors import Refused, Transient

if TYPE_CHECKING:
    from agent.chain.node import Receipt
    from agent.journal import Journal

SESSION_PREFIX_MIN: Final = 10  # what `sessions` shows of an id
BPS: Final = 10_000  # the contract's bond is in 1/10000 of the cost
AUCTIONS_SHOWN_MAX: Final = 500  # each costs a question to the node; a flood of them must not hang a command

CONFIG: Final = click.option(
    "--config",
    "config_file",
    type=click.Path(dir_okay=False, path_type=Path),
    required=True,
    help="Settings file (agent.toml).",
)


@click.group()
def provider() -> None:
    """The owner who sells: run the agent, bid, look at sessions."""


for _command in (*ledger_commands("provider"), watch, hello):
    provider.add_command(_command)


# ---- run


@provider.command()
@CONFIG
def run(config_file: Path) -> None:
    """Run the agent until Ctrl-C, exactly as systemd does."""
    settings = load_agent(config_file, os.environ)
    from agent import daemon, log  # web3 and pymodbus: not before the settings are right

    log.configure(settings.log.level, settings.log.format, sys.stderr, os.environ)
    asyncio.run(daemon.run(settings, os.environ))


@provider.command("make-safe")
@CONFIG
def make_safe(config_file: Path) -> None:
    """Stop every configured charger and see it open.

    Asks neither journal, chain nor keys, and needs the agent to be gone: systemd runs it after every end of the agent.
    """
    from agent.cli.make_safe import make_all_safe

    asyncio.run(make_all_safe(config_file, os.environ))


@provider.command()
@CONFIG
@json_option
def stop(config_file: Path, *, as_json: bool) -> None:
    """End every session now, by the owner's wish.

    The agent goes on running: it holds the charger, waits for the last receipt and settles. Under systemd, as another
    user: systemctl kill -s SIGUSR1 v2v-agent.
    """
    from agent.rows import owner_pid

    path = load_agent(config_file, os.environ).journal.path
    pid = owner_pid(path)
    if pid is None:
        raise Refused(
            "not_running",
            "no agent runs on this journal, so nothing is delivered",
            remedy="If a charger still gives power: v2v provider make-safe.",
        )
    try:
        os.kill(pid, signal.SIGUSR1)
    except PermissionError as error:
        raise Refused(
            "not_yours",
            f"the agent (process {pid}) runs as another user",
            remedy="systemctl kill -s SIGUSR1 v2v-agent, or sudo.",
        ) from error
    echo({"pid": pid}, f"Told the agent (process {pid}) to end every session.", as_json=as_json)


@provider.command()
@CONFIG
@click.argument("port")
@json_option
def unlock(config_file: Path, port: str, *, as_json: bool) -> None:
    """Release a port that was locked out.

    Only after somebody has looked at its contactor: it was not seen to open. The agent must be stopped.
    """
    from agent.core import events as ev
    from agent.rows import owner_pid

    settings = load_agent(config_file, os.environ)
    if owner_pid(settings.journal.path) is not None:
        raise Refused(
            "running",
            "the agent is running",
            remedy="Stop it first (systemctl stop v2v-agent): whoever touches a contactor wants nothing to happen.",
        )
    with _journal(settings, read_only=False) as journal:
        book = journal.replay()
        why = book.locked_ports.get(port)
        if why is None:
            names = ", ".join(book.locked_ports) or "none"
            raise Refused("not_locked", f"port {port!r} is not locked out; locked: {names}")
        journal.append(ev.PortUnlocked(book.at_s, port))
    echo({"port": port, "was": why}, f"Port {port} may deliver again. It was locked: {why}.", as_json=as_json)


# ---- auctions and bids


@provider.command()
@market_options("provider", signs=False)
@json_option
def auctions(access: Access, *, as_json: bool) -> None:
    """List the live auctions.

    What an owner can bid on, and what waits for its consumer to connect.
    """
    asyncio.run(_show_auctions(access, as_json=as_json))


@provider.command()
@click.option("--consumer", type=ADDRESS, required=True, help="Whose auction.")
@click.option("--rate", "rate_wei_per_kwh", type=WEI, required=True, help='Wei per kWh, or "0.0001 ETH".')
@click.option(
    "--auction-nonce", type=click.IntRange(1, UINT64_MAX), help="Refuse any other auction of this consumer."
)
@market_options("provider", signs=True, through_agent=True)
@json_option
def bid(
    access: Access, consumer: Address, rate_wei_per_kwh: int, auction_nonce: int | None, *, as_json: bool
) -> None:
    """Offer to deliver at a rate.

    Binding: the bond is locked until somebody bids less or the auction ends. With --key the owner signs, and what is missing
    of the bond is sent along; with --config and without --key the running agent is asked, and the bond comes from the ledger.
    """
    if rate_wei_per_kwh > UINT128_MAX:
        raise click.BadParameter("more than any rate can be", param_hint="--rate")
    asyncio.run(_bid(access, consumer, auction_nonce, rate_wei_per_kwh, as_json=as_json))


async def _show_auctions(access: Access, *, as_json: bool) -> None:
    async with open_market(access) as market:
        now_s = (await market.node.head()).timestamp_s
        live = await _live_auctions(market)
    rows = [
        {
            "consumer": consumer,
            "auction_nonce": auction.auction_nonce,
            "energy_wh": auction.energy_wh,
            "rate_wei_per_kwh_start": str(auction.start_rate_wei_per_kwh),
            "rate_wei_per_kwh_lowest": str(auction.rate_wei_per_kwh) if auction.has_bid else None,
            "rate_wei_per_kwh_max": str(auction.rate_wei_per_kwh_max),
            "leader": auction.provider if auction.has_bid else None,
            "closing_time_s": auction.closing_time_s,
            "connect_by_s": auction.connect_by_s,
            "biddable": now_s < auction.closing_time_s,
        }
        for consumer, auction in live
    ]
    echo({"at_s": now_s, "auctions": rows}, _auctions_text(live, now_s), as_json=as_json)


def _auctions_text(live: list[tuple[Address, AuctionState]], now_s: int) -> str:
    if not live:
        return "There is no live auction."
    headers = ("consumer", "auction", "Wh", "bid at most, wei/kWh", "lowest bid by", "bidding")
    return table(
        headers,
        [
            (
                consumer,
                auction.auction_nonce,
                auction.energy_wh,
                auction.rate_wei_per_kwh_max,
                auction.provider if auction.has_bid else None,
                _bidding(auction, now_s),
            )
            for consumer, auction in live
        ],
    )


def _bidding(auction: AuctionState, now_s: int) -> str:
    left_s = auction.closing_time_s - now_s
    return f"{duration(left_s)} left" if left_s > 0 else "over"


async def _live_auctions(market: Market) -> list[tuple[Address, AuctionState]]:
    """Every live auction, the one that closes first in front. Events are hints; the contract's state decides."""
    head = await market.node.head()
    rules = await market.ask(contract.encode_parameters(), contract.decode_parameters)
    first = await _block_at(market, head.timestamp_s - _life_s_max(rules), head.number)
    topics = [contract.topic_of(contract.AuctionStarted)]
    newest_last: dict[Address, None] = {}
    async for page in market.node.log_pages(market.address, topics, first, head.number):
        for log in page.logs:
            found = contract.decode_log(log.address, log.topics, log.data)
            if isinstance(found, contract.AuctionStarted):
                newest_last.pop(found.consumer, None)
                newest_last[found.consumer] = None
    consumers = list(newest_last)[-AUCTIONS_SHOWN_MAX:]
    states = await asyncio.gather(*(market.auction(consumer) for consumer in consumers))
    live = [(who, state) for who, state in zip(consumers, states, strict=True) if state.is_live]
    return sorted(live, key=lambda one: one[1].closing_time_s)


def _life_s_max(rules: MarketParameters) -> int:
    """The longest that an auction matters: bidding, every soft close, and the time to connect."""
    return rules.bidding_s_max + rules.soft_close_count_max * rules.soft_close_s + rules.connect_window_s


async def _block_at(market: Market, at_s: int, head_number: int) -> int:
    """The first block not older than `at_s`, by halving: some 25 questions instead of a whole chain's logs."""
    low, high = min(market.start_block, head_number), head_number
    while low < high:
        middle = (low + high) // 2
        header = await market.node.header(middle)
        if header is not None and header.timestamp_s >= at_s:
            high = middle
        else:
            low = middle + 1
    return low


@dataclass(frozen=True, slots=True)
class _Gas:
    """What the account that settles has for gas, and what it must have: this bid's settlement and every one that is open."""

    payer: Address
    balance_wei: int
    settlement_wei: int  # prudent
    owed: int

    @property
    def settlements_left(self) -> int:
        """For how many settlements it lasts."""
        return settlements_left(self.balance_wei, self.settlement_wei)

    def require(self) -> None:
        """Raises Refused("gas_reserve"): who bids and cannot settle loses its bond's worth of trust, and its pay."""
        missing_wei = self.owed * self.settlement_wei - self.balance_wei
        if missing_wei > 0:
            raise Refused(
                "gas_reserve",
                f"{hex0x(self.payer)}, which settles, has gas for about {self.settlements_left} settlements, and with this "
                f"bid {self.owed} may be owed",
                remedy=f"Send it at least {missing_wei} wei ({ether(missing_wei)}).",
            )


@dataclass(frozen=True, slots=True)
class _Offer:
    """A bid before it is sent."""

    consumer: Address
    auction: AuctionState
    rate_wei_per_kwh: int
    bond_wei: int
    missing_wei: int  # of the bond: what neither the ledger nor our own leading bid covers
    settlement_wei: int  # what being paid will cost, at today's fees
    gas: _Gas

    @property
    def earned_wei(self) -> int:
        """What the whole order brings."""
        return cost_wei_floor(self.rate_wei_per_kwh, self.auction.energy_wh)


async def _bid(
    access: Access, consumer: Address, auction_nonce: int | None, rate_wei_per_kwh: int, *, as_json: bool
) -> None:
    async with open_market(access) as market:
        account = access.account if market.sender is None else market.account
        assert account is not None, "settings name the provider"
        offer = await _offer(market, account, consumer, auction_nonce, rate_wei_per_kwh)
        if offer.earned_wei <= offer.settlement_wei:
            click.echo(
                f"v2v: the order brings {ether(offer.earned_wei)}, and to be paid costs about {ether(offer.settlement_wei)} "
                "of gas: the agent will not settle at a loss, but wait for lower fees.",
                err=True,
            )
        if market.sender is None:
            offer.gas.require()  # the agent would refuse it too, but it is us who can say how much is missing
            receipt, offer = await _bid_by_agent(market, access, account, offer)
        else:
            if offer.gas.payer != account or offer.gas.balance_wei > offer.missing_wei:
                offer.gas.require()  # else what is missing for the bid itself comes first
            calldata = contract.encode_place_bid(consumer, offer.auction.auction_nonce, rate_wei_per_kwh)
            receipt = await market.send(calldata, offer.missing_wei)
        placed = market.log_in(receipt, contract.BidPlaced)
        closing_time_s = offer.auction.closing_time_s if placed is None else placed.closing_time_s
        ledger_wei = await market.ledger_wei(account)
        value = _offer_json(offer) | {"provider": account, "closing_time_s": closing_time_s}
    told = [
        *_offer_facts(offer),
        ("in the ledger now", ether(ledger_wei)),
        ("bidding closes", at(closing_time_s)),
        *receipt_facts(receipt),
    ]
    echo(value | {"ledger_wei": str(ledger_wei)} | receipt_json(receipt), facts(told), as_json=as_json)


async def _bid_by_agent(
    market: Market, access: Access, account: Address, offer: _Offer
) -> tuple[Receipt, _Offer]:
    """The running agent signs; its bond comes from the ledger alone. Raises Refused by the agent's or the contract's names."""
    from agent.chain.sender import wait_mined
    from agent.cli.local import ask_agent

    assert access.socket is not None
    question = {
        "ask": "bid",
        "provider": hex0x(account),
        "consumer": hex0x(offer.consumer),
        "auction_nonce": offer.auction.auction_nonce,
        "rate_wei_per_kwh": str(offer.rate_wei_per_kwh),
    }
    try:
        answer = await asyncio.to_thread(ask_agent, access.socket, question)
    except Refused as refused:
        raise with_remedy(refused) from refused
    tx = answer["bid"]["tx"]
    if tx is None:
        raise Transient(
            "the agent has not signed the bid yet", remedy="Ask again: the same bid is made once."
        )
    receipt = await wait_mined(market.node, bytes.fromhex(tx[2:]), market.timeout_s)
    if not receipt.succeeded:
        raise Refused(
            "reverted", f"the bid {tx} was mined and failed", remedy="v2v provider status says why."
        )
    return receipt, replace(offer, missing_wei=0)


async def _gas(market: Market, account: Address) -> _Gas:
    """Who settles for this account, and for how many sessions it must. Asks the chain alone: a session is open or not."""
    operator = await market.ask(contract.encode_operator_of(account), contract.decode_operator_of)
    payer = account if operator.operator == contract.ZERO_ADDRESS else operator.operator
    fees = await market.node.fees()
    gas = contract.SETTLEMENT_GAS + contract.SETTLEMENT_GAS // 4
    prudent_wei = settlement_wei_prudent(gas, fees.base_fee_wei, fees.priority_fee_wei)
    return _Gas(
        payer, await market.node.balance(payer), prudent_wei, await _open_sessions(market, account) + 1
    )


async def _open_sessions(market: Market, account: Address) -> int:
    """How many sessions of this provider are connected and not settled."""
    head = await market.node.head()
    rules = await market.ask(contract.encode_parameters(), contract.decode_parameters)
    first = await _block_at(
        market, head.timestamp_s - rules.token_validity_s_max - rules.grace_s, head.number
    )
    tokens: set[bytes] = set()
    async for page in market.node.log_pages(
        market.address, contract.provider_topics(account), first, head.number
    ):
        for log in page.logs:
            found = contract.decode_log(log.address, log.topics, log.data)
            if isinstance(found, contract.SessionOpened):
                tokens.add(found.token)
            elif isinstance(found, contract.ConnectionEnded):
                tokens.discard(found.token)
    return len(tokens)


async def _offer(
    market: Market, account: Address, consumer: Address, auction_nonce: int | None, rate_wei_per_kwh: int
) -> _Offer:
    """Look at the auction, and at what we have. Raises Refused for another auction or none."""
    auction = await market.auction(consumer)
    if not auction.is_live:
        raise with_remedy(Refused("NoAuction", f"{hex0x(consumer)} has no live auction"))
    if auction_nonce not in (None, auction.auction_nonce):
        raise with_remedy(Refused(f"StaleAuction(auctionNonce={auction.auction_nonce})"))
    rules = await market.ask(contract.encode_parameters(), contract.decode_parameters)
    cost_wei = cost_wei_ceil(rate_wei_per_kwh, auction.energy_wh)
    bond_wei = -(-cost_wei * rules.bond_bps // BPS)
    own_wei = await market.ledger_wei(account)
    if auction.provider == account:
        own_wei += auction.bond_wei  # our own leading bid's bond comes back first
    missing_wei = max(0, bond_wei - own_wei)
    settlement_wei, gas = await market.settlement_wei(), await _gas(market, account)
    return _Offer(consumer, auction, rate_wei_per_kwh, bond_wei, missing_wei, settlement_wei, gas)


def _offer_json(offer: _Offer) -> dict[str, Any]:
    return {
        "consumer": offer.consumer,
        "auction_nonce": offer.auction.auction_nonce,
        "energy_wh": offer.auction.energy_wh,
        "rate_wei_per_kwh": str(offer.rate_wei_per_kwh),
        "bond_wei": str(offer.bond_wei),
        "sent_wei": str(offer.missing_wei),
        "settlement_wei": str(offer.settlement_wei),
        "settlements_left": offer.gas.settlements_left,
        "settlements_owed": offer.gas.owed,
    }


def _offer_facts(offer: _Offer) -> list[tuple[str, object]]:
    auction = offer.auction
    return [
        ("bid on", f"auction {auction.auction_nonce} of {hex0x(offer.consumer)}"),
        ("rate", f"{offer.rate_wei_per_kwh} wei/kWh"),
        ("for", f"{auction.energy_wh} Wh, which earns {ether(offer.earned_wei)}"),
        ("to be paid costs", f"about {ether(offer.settlement_wei)} of gas"),
        ("gas", f"for about {offer.gas.settlements_left} more settlements, at twice today's fees"),
        ("locked as bond", f"{ether(offer.bond_wei)}, of which {ether(offer.missing_wei)} were sent along"),
    ]


# ---- the operator


@provider.command("set-operator")
@click.argument("operator", type=ADDRESS)
@click.option(
    "--bond-limit",
    "bond_wei_limit",
    type=WEI,
    default="0",
    show_default=True,
    help="The most its bids may lock at one time; 0: it settles, but never bids.",
)
@market_options("provider", signs=True)
@json_option
def set_operator(access: Access, operator: Address, bond_wei_limit: int, *, as_json: bool) -> None:
    """Name the hot key in the car.

    OPERATOR may then bid and settle for the key's account, but never move money out. The zero address (0x and 40 zeros) revokes.
    """
    asyncio.run(_set_operator(access, operator, min(bond_wei_limit, UINT128_MAX), as_json=as_json))


async def _set_operator(access: Access, operator: Address, bond_wei_limit: int, *, as_json: bool) -> None:
    async with open_market(access) as market:
        receipt = await market.send(contract.encode_set_operator(operator, bond_wei_limit))
        account = market.account
    value = {"account": account, "operator": operator, "bond_wei_limit": str(bond_wei_limit)}
    revoked = operator == contract.ZERO_ADDRESS
    told = [
        ("account", account),
        ("operator", "none any more" if revoked else operator),
        ("its bonds at most", None if revoked else ether(bond_wei_limit)),
        *receipt_facts(receipt),
    ]
    echo(value | receipt_json(receipt), facts(told), as_json=as_json)


# ---- sessions


@provider.command()
@CONFIG
@json_option
def status(config_file: Path, *, as_json: bool) -> None:
    """What the running agent does now.

    Chain, ports, sessions on their way to the money, bids, and for how many settlements its gas lasts.
    """
    from agent.cli.local import ask_agent

    path = socket_found(load_agent(config_file, os.environ), os.environ)
    if path is None:
        raise Refused(
            "not_running",
            "no agent of these settings answers",
            remedy="v2v provider sessions reads the journal.",
        )
    found = ask_agent(path, {"ask": "status"})["status"]
    echo(found, _status_text(found), as_json=as_json)


def _status_text(found: dict[str, Any]) -> str:
    chain, gas = found["chain"], found["gas"]
    told: list[tuple[str, object]] = [
        ("chain", f"block {chain['block']}, seen {chain['view_age_s']} s ago"),
    ]
    if gas["settlements_left"] is not None:
        told.append(
            ("gas", f"for about {gas['settlements_left']} settlements, {gas['settlements_owed']} owed")
        )
    told += [
        (f"port {name}", port["stage"] + (f" ({port['reason']})" if port["reason"] else ""))
        for name, port in found["ports"].items()
    ]
    told += [
        (row["session_id"][:10], _settling_text(row["settling"]))
        for row in found["sessions"]
        if row["settling"] is not None
    ]
    told += [
        (
            f"bid {bid['bid_id'][:10]}",
            f"{bid['state']}, {bid['rate_wei_per_kwh']} wei/kWh, auction {bid['auction_nonce']}",
        )
        for bid in found["bids"]
    ]
    return facts(told)


def _settling_text(settling: dict[str, Any]) -> str:
    words = {
        "signing": "its settlement is being signed",
        "sent": "its settlement is on its way",
        "waiting": "its settlement waits for lower fees",
        "refused": "its settlement is refused",
        "stuck": "its settlement is in no block yet, and no more is offered now",
    }
    why = f" ({settling['reason']})" if settling["reason"] else ""
    again = f", replaced {settling['replacements']} times" if settling["replacements"] else ""
    return f"{words[settling['state']]}{why}{again}; anybody may settle from {at(settling['until_s'])}"


@provider.command()
@CONFIG
@json_option
def sessions(config_file: Path, *, as_json: bool) -> None:
    """List sessions, open ones first.

    They are read from the journal, whether the agent runs or not.
    """
    rows = _journaled_sessions(load_agent(config_file, os.environ))
    echo({"sessions": rows}, _sessions_text(rows), as_json=as_json)


@provider.command()
@CONFIG
@click.option("--session", "wanted", metavar="ID", help="One session: its id, or its first ten characters.")
@click.option("--all", "everything", is_flag=True, help="Every session there ever was.")
@click.option(
    "--out",
    "folder",
    type=click.Path(file_okay=False, path_type=Path),
    required=True,
    help="Where the files go, one a session.",
)
@json_option
def export(config_file: Path, wanted: str | None, folder: Path, *, everything: bool, as_json: bool) -> None:
    """Write what proves a session, for `v2v verify`.

    One file a session: terms, token, receipts, meter records, settlement. It holds signatures, but no key.
    """
    if (wanted is None) is not everything:
        raise click.UsageError("either --session ID, or --all")
    with _journal(load_agent(config_file, os.environ)) as journal:
        rows = _exported(journal, wanted, folder)
    text = table(("session", "stage", "settled Wh", "file", "digest"), [tuple(row.values()) for row in rows])
    echo({"sessions": rows}, text if rows else "There is no session yet.", as_json=as_json)


def _exported(journal: Journal, wanted: str | None, folder: Path) -> list[dict[str, Any]]:
    """Write the files; a row for each. Raises Refused for a session that is not there, or not one only."""
    from agent.evidence import canonical, evidence

    found = [one for one in journal.sessions_all() if wanted is None or hex0x(one).startswith(wanted.lower())]
    if wanted is not None and (len(found) != 1 or len(wanted) < SESSION_PREFIX_MIN):
        why = f"{len(found)} sessions begin with {wanted!r}"
        raise Refused("unknown_session", why, remedy="`v2v provider sessions --json` shows every id in full.")
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    rows = []
    for session_id in found:
        if journal.session(session_id) is None:
            continue  # seen on chain, and gone before it was believed: nothing came of it
        content = evidence(journal.domain, journal.provider, session_id, journal.events_of(session_id))
        file = folder / f"{hex0x(session_id)}.json"
        unfinished = file.with_suffix(".part")
        unfinished.touch(mode=0o600)
        unfinished.write_bytes(canonical(content))
        unfinished.replace(file)
        summary = content["summary"]
        rows.append(
            {
                "session_id": hex0x(session_id),
                "stage": summary["stage"],
                "energy_wh_settled": summary["energy_wh_settled"],
                "file": str(file),
                "digest": content["digest"],
            }
        )
    return rows


def _journal(settings: AgentConfig, *, read_only: bool = True) -> closing[Journal]:
    """The journal as it is on the disk. Raises Refused when there is none yet."""
    from agent.core.token import Domain
    from agent.journal import Journal

    path = settings.journal.path
    if not path.is_file():
        raise Refused(
            "no_journal",
            f"there is no journal at {path}",
            remedy="The agent makes it when it first runs: v2v provider run; or correct [journal] path.",
        )
    domain = Domain(settings.chain.chain_id, Address(settings.chain.contract))
    return closing(Journal(path, domain, Address(settings.chain.provider), read_only=read_only))


def _journaled_sessions(settings: AgentConfig) -> list[dict[str, Any]]:
    """As `views.status` shows them, from what is on the disk. Raises Refused when there is no journal yet."""
    from agent.core.live import Live, Policy
    from agent.views import CLOSED_SHOWN_MAX, session, status

    with _journal(settings) as journal:
        book = journal.replay()
        old = [journal.session(session_id) for session_id in journal.sessions_folded(CLOSED_SHOWN_MAX)]
    nothing_live = Live(Policy(max_unacked_wh={}), life=0, started_at_s=book.at_s, started_at_ms=0, now_ms=0)
    rows: list[dict[str, Any]] = status(book, nothing_live)["sessions"]
    rows += [session(one, nothing_live) for one in old if one is not None]
    rows = rows[: len(book.open_sessions()) + CLOSED_SHOWN_MAX]
    for row in rows:
        del row["hindrance"]  # what hinders just now, only the running agent knows
        if row["stage"] == "DELIVERING":
            # Nor how much has flowed since power was offered: at least what is signed for.
            row["energy_wh_delivered"] = max(row["energy_wh_delivered"], row["energy_wh_acked"])
            row["cost_wei"] = str(max(int(row["cost_wei"]), int(row["secured_wei"])))
    return rows


def _sessions_text(rows: list[dict[str, Any]]) -> str:
    if not rows:
        return "There is no session yet."
    headers = (
        "session",
        "stage",
        "ordered Wh",
        "delivered",
        "signed for",
        "settled",
        "earned",
        "stopped by",
        "transaction",
    )
    lines = table(
        headers,
        [
            (
                row["session_id"][:10],
                row["stage"],
                row["energy_wh_ordered"],
                f"{row['energy_wh_delivered']}+"
                if row["stage"] == "DELIVERING"
                else row["energy_wh_delivered"],
                row["energy_wh_acked"],
                row["energy_wh_settled"],
                ether(int(row["cost_wei"])),
                row["stop_reason"],
                row["settlement_tx"],
            )
            for row in rows
        ],
    )
    troubles = [row for row in rows if row["settlement_error"] and row["stage"] != "SETTLED"]
    for row in troubles:
        name = row["settlement_error"].partition("(")[0]
        lines += f"\n{row['session_id'][:10]}: {row['settlement_error']}. {REMEDIES.get(name, '')}".rstrip()
    return lines
