"""`v2v consumer`: the driver who buys. `charge` is the whole way; the other commands are its steps, one at a time.

Rules
* Every command goes on from where the journal and the chain stand: after a crash, or Ctrl-C, the same command again.
* Progress goes to standard error, live on a terminal, plain lines elsewhere; the result goes to standard output.
* Ctrl-C while energy flows asks the provider to stop and waits for the settlement; a second one leaves at once.

May not know: how the plug is negotiated. web3 and aiohttp are loaded when a command runs, never for `--help`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypeVar

import click

from agent.cli.ledger import ledger_commands
from agent.cli.output import WEI, at, echo, ether, facts, json_option
from agent.cli.own_car import answered, own_meter, question
from agent.cli.remedies import with_remedy
from agent.config import ConsumerConfig, load_consumer
from agent.core.token import Domain
from agent.core.units import UINT64_MAX, Address, cost_wei_floor, hex0x
from agent.errors import Misconfigured, Refused

if TYPE_CHECKING:
    from agent.consumer.carrier import Carrier
    from agent.consumer.journal import ConsumerJournal, Errand, TransactionMined
    from agent.consumer.journey import Journey, JourneySummary, Order
    from agent.consumer.plug import Progress

Result = TypeVar("Result")
Command = Callable[..., Any]
BAR_WIDTH = 24


@dataclass(frozen=True, slots=True)
class Wishes:
    """What was typed besides the settings file. None: as the file says."""

    energy_wh: int | None = None
    rate_wei_per_kwh: int | None = None
    bidding_s: int | None = None
    token_validity_s: int | None = None
    port: str = ""
    provider_http: str = ""
    confirmed: bool = False
    scanned: str = ""


def _settings(command: Command) -> Command:
    """Add `--config`; the command gets `settings: ConsumerConfig`."""

    @wraps(command)
    def with_settings(config_file: Path, **given: Any) -> Any:
        return command(settings=load_consumer(config_file, os.environ), **given)

    return click.option(
        "--config",
        "config_file",
        type=click.Path(dir_okay=False, path_type=Path),
        required=True,
        help="Settings file (consumer.toml).",
    )(with_settings)


_ORDER = (
    click.option("--energy-wh", type=click.IntRange(1, UINT64_MAX), help="How much; [order] unless given."),
    click.option("--rate", "rate_wei_per_kwh", type=WEI, help='The most per kWh, in wei or "0.0001 ETH".'),
    click.option("--bidding-s", type=click.IntRange(1), help="How long providers may bid."),
    click.option("--token-validity-s", type=click.IntRange(1), help="How long the token then stands."),
)
_PLUG = (
    click.option("--port", default="", help="The name at the plug, where the provider has several."),
    click.option("--provider-http", default="", metavar="URL", help="Its local door, instead of the broker."),
    click.option(
        "--scanned", default="", metavar="TEXT", help="What the code at the plug says; then no --port."
    ),
    click.option("--confirmed", is_flag=True, help="You see your car charging: sign without asking you."),
)


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


@click.group()
def consumer() -> None:
    """The driver who buys: charge, or each step by itself."""


for _command in ledger_commands("consumer"):
    consumer.add_command(_command)


# ---- the whole way


@consumer.command()
@_settings
@_options(*_ORDER, *_PLUG)
@json_option
def charge(settings: ConsumerConfig, *, as_json: bool, **typed: Any) -> None:
    """Buy energy: auction, connection, meeting at the plug, receipts, settlement. Goes on where it was interrupted."""
    wishes = Wishes(**typed)

    async def act(journey: Journey, carrier: Carrier) -> JourneySummary:
        return await journey.charge(_order(settings, wishes), carrier)

    _show_summary(_run(_at_the_plug(settings, wishes, act)), as_json=as_json)


@consumer.command()
@_settings
@_options(*_PLUG)
@json_option
def present(settings: ConsumerConfig, *, as_json: bool, **typed: Any) -> None:
    """At the plug: present the token, take the energy, sign for it, check the settlement."""

    async def act(journey: Journey, carrier: Carrier) -> JourneySummary:
        return await journey.present(carrier)

    _show_summary(_run(_at_the_plug(settings, Wishes(**typed), act)), as_json=as_json)


# ---- its steps on chain


@consumer.command("start-auction")
@_settings
@_options(*_ORDER)
@json_option
def start_auction(settings: ConsumerConfig, *, as_json: bool, **typed: Any) -> None:
    """Ask for energy and lock the deposit: the most it can cost."""
    order = _order(settings, Wishes(**typed))

    async def act(journey: Journey) -> None:
        placed = await journey.start_auction(order)
        auction = await journey.market.auction()
        value = {
            "auction_nonce": placed.auction_nonce,
            "energy_wh": placed.energy_wh,
            "deposit_wei": str(order.deposit_wei),
            "closing_time_s": auction.closing_time_s,
        }
        told = [
            ("auction", placed.auction_nonce),
            ("energy", f"{placed.energy_wh} Wh"),
            ("deposit", ether(order.deposit_wei)),
            ("bidding until", at(auction.closing_time_s)),
        ]
        _show(value, told, _newest(journey, "start_auction"), as_json=as_json)

    _run(_on_chain(settings, act))


@consumer.command()
@_settings
@json_option
def connect(settings: ConsumerConfig, *, as_json: bool) -> None:
    """Wait until the bidding is over and open the session with the winner."""

    async def act(journey: Journey) -> None:
        terms = await journey.connect()
        value = {
            "session_id": terms.session_id,
            "token": terms.token,
            "provider": terms.provider,
            "rate_wei_per_kwh": str(terms.rate_wei_per_kwh),
            "energy_wh_ordered": terms.energy_wh_ordered,
            "valid_until_s": terms.valid_until_s,
        }
        told = [
            ("provider", terms.provider),
            ("rate", f"{ether(terms.rate_wei_per_kwh)} per kWh"),
            ("token", terms.token),
            ("valid until", at(terms.valid_until_s)),
        ]
        _show(value, told, _newest(journey, "connect"), as_json=as_json)

    _run(_on_chain(settings, act))


@consumer.command()
@_settings
@json_option
def cancel(settings: ConsumerConfig, *, as_json: bool) -> None:
    """Give up the auction: while nobody has bid, or when the time to connect is over."""

    async def act(journey: Journey) -> None:
        mined = await journey.cancel()
        ledger_wei = await journey.market.ledger_wei()
        told = [("cancelled", "the deposit is in your ledger"), ("in the ledger now", ether(ledger_wei))]
        _show({"ledger_wei": str(ledger_wei)}, told, mined, as_json=as_json)

    _run(_on_chain(settings, act))


@consumer.command()
@_settings
@click.option(
    "--energy-wh",
    type=click.IntRange(0, UINT64_MAX),
    help="How much to pay for; what was signed for unless given. Less is only the provider's to correct.",
)
@json_option
def end(settings: ConsumerConfig, energy_wh: int | None, *, as_json: bool) -> None:
    """End the session on chain yourself. The rest of the deposit comes back after the challenge."""

    async def act(journey: Journey) -> None:
        mined = await journey.end(energy_wh)
        errand = journey.journal.open_errand
        assert errand is not None
        assert errand.terms is not None
        session = await journey.market.session(errand.terms.token)
        settle_at_s = session.settle_at_s if session.is_open else None
        value = {
            "token": errand.terms.token,
            "energy_wh_conceded": errand.energy_wh_conceded,
            "settled": not session.is_open,
            "settle_at_s": settle_at_s,
        }
        then = (
            "settled"
            if settle_at_s is None
            else f"v2v consumer settle {hex0x(errand.terms.token)}, from {at(settle_at_s)} on"
        )
        told = [("conceded", f"{errand.energy_wh_conceded} Wh"), ("then", then)]
        _show(value, told, mined, as_json=as_json)

    _run(_on_chain(settings, act))


@consumer.command()
@_settings
@json_option
def status(settings: ConsumerConfig, *, as_json: bool) -> None:
    """Show the newest purchase, as the journal knows it. Asks nobody."""
    from agent.consumer.journal import ConsumerJournal

    if not settings.journal.path.exists():
        echo({"errand": None}, "Nothing has been bought yet.", as_json=as_json)
        return
    journal = ConsumerJournal(
        settings.journal.path, _domain(settings), Address(settings.chain.consumer), time.time, read_only=True
    )
    with contextlib.closing(journal):
        errand = journal.errand
    if errand is None:
        echo({"errand": None}, "Nothing has been bought yet.", as_json=as_json)
        return
    value, told = _errand_facts(errand)
    echo({"errand": value}, facts(told), as_json=as_json)


def _errand_facts(errand: Errand) -> tuple[dict[str, Any], list[tuple[str, object]]]:
    where = "auction"
    if errand.closed is not None:
        where = errand.closed.outcome
    elif errand.accepted is not None:
        where = "charging"
    elif errand.terms is not None:
        where = "connected"
    terms = errand.terms
    cost_wei = 0 if terms is None else cost_wei_floor(terms.rate_wei_per_kwh, errand.energy_wh_signed)
    value: dict[str, Any] = {
        "state": where,
        "auction_nonce": errand.order.auction_nonce,
        "energy_wh_ordered": errand.order.energy_wh,
        "energy_wh_signed": errand.energy_wh_signed,
        "cost_wei_signed": str(cost_wei),
        "provider": None if terms is None else terms.provider,
        "session_id": None if terms is None else terms.session_id,
        "token": None if terms is None else terms.token,
        "valid_until_s": None if terms is None else terms.valid_until_s,
    }
    told: list[tuple[str, object]] = [
        ("state", where.replace("_", " ")),
        ("auction", errand.order.auction_nonce),
        ("ordered", f"{errand.order.energy_wh} Wh"),
        ("signed for", f"{errand.energy_wh_signed} Wh, {ether(cost_wei)}"),
        ("provider", value["provider"]),
        ("token", value["token"]),
        ("valid until", None if terms is None else at(terms.valid_until_s)),
    ]
    return value, told


# ---- putting it together


def _domain(settings: ConsumerConfig) -> Domain:
    return Domain(settings.chain.chain_id, Address(settings.chain.contract))


def _order(settings: ConsumerConfig, wishes: Wishes) -> Order:
    from agent.consumer.journey import Order

    usual = settings.order
    return Order(
        wishes.energy_wh or usual.energy_wh,
        wishes.rate_wei_per_kwh or usual.rate_wei_per_kwh_start,
        wishes.bidding_s or usual.bidding_s,
        wishes.token_validity_s or usual.token_validity_s,
    )


@contextlib.asynccontextmanager
async def _opened(settings: ConsumerConfig, port: str, screen: _Screen) -> AsyncIterator[Journey]:
    """Keys, node, contract and journal, each checked before anything is spent."""
    from agent import keys
    from agent.chain import contract
    from agent.chain.node import Web3Node, check_deployment
    from agent.chain.sender import Sender
    from agent.consumer.journal import ConsumerJournal
    from agent.consumer.journey import Journey
    from agent.consumer.market import Market
    from agent.consumer.policy import SigningLimits
    from contracts import load_artefact

    account = keys.load_signer(settings.keys.account, settings.keys.account_password)
    if account.address != settings.chain.consumer:
        raise Misconfigured(
            f"the key {settings.keys.account} is of {hex0x(account.address)}, the settings are of "
            f"{hex0x(settings.chain.consumer)}",
            remedy="correct [keys] account or [chain] consumer",
        )
    urls = settings.chain.urls
    url = next((url for url in urls if url.startswith("http")), urls[0])  # requests need no subscription
    domain = _domain(settings)
    async with Web3Node(url) as node:
        await check_deployment(node, domain.chain_id, domain.contract, load_artefact())
        journal = ConsumerJournal(settings.journal.path, domain, account.address, time.time)
        with contextlib.closing(journal):
            sender = Sender(node, account, domain.chain_id, revert_name=contract.revert_name)
            policy = settings.policy
            yield Journey(
                domain=domain,
                account=account,
                journal=journal,
                market=Market(node, sender, domain, journal),
                limits=SigningLimits(
                    power_w_max=policy.power_w_max,
                    tolerance_permille=policy.tolerance_permille,
                    pre_sign_wh=policy.pre_sign_wh,
                ),
                own_register_wh=own_meter(policy.own_meter),
                now_ms=lambda: time.monotonic_ns() // 1_000_000,
                sref=_sref(settings, journal),
                tell=screen,
                port=port,
            )


def _sref(settings: ConsumerConfig, journal: ConsumerJournal) -> str:
    """Where the provider answers: an open errand's own, our name where the broker knows us, else at random."""
    from agent.consumer.carrier import new_sref

    if journal.open_errand is not None:
        return journal.open_errand.order.sref
    return (settings.mqtt.username if settings.mqtt is not None else None) or new_sref()


def _carrier(settings: ConsumerConfig, wishes: Wishes, sref: str) -> Carrier:
    from agent.consumer.carrier_both import BothCarrier
    from agent.consumer.carrier_http import SREF_FORM, HttpCarrier
    from agent.consumer.carrier_mqtt import Broker, MqttCarrier
    from agent.keys import load_password, tls_context

    mqtt, url = settings.mqtt, wishes.provider_http or (settings.http.url if settings.http else "")
    if wishes.provider_http or mqtt is None:
        return HttpCarrier(url, sref)
    password = load_password(mqtt.password_credential) if mqtt.password_credential else None
    tls = tls_context(mqtt.authority, mqtt.certificate, mqtt.certificate_key) if mqtt.tls else None
    broker = Broker(mqtt.host, mqtt.port, tls, mqtt.username, password, mqtt.keepalive_s)
    if url and SREF_FORM.fullmatch(sref):  # a short name of a broker's is none at a web server
        return BothCarrier([lambda: MqttCarrier(broker, sref), lambda: HttpCarrier(url, sref)])
    return MqttCarrier(broker, sref)


async def _on_chain(settings: ConsumerConfig, act: Callable[[Journey], Coroutine[Any, Any, None]]) -> None:
    with _Screen() as screen:
        async with _opened(settings, "", screen) as journey:
            await act(journey)


async def _at_the_plug(
    settings: ConsumerConfig,
    wishes: Wishes,
    act: Callable[[Journey, Carrier], Coroutine[Any, Any, JourneySummary]],
) -> JourneySummary:
    with _Screen() as screen:
        async with (
            _opened(settings, wishes.port, screen) as journey,
            _carrier(settings, wishes, journey.sref) as carrier,
        ):
            buying = asyncio.ensure_future(act(journey, carrier))
            journey.scanned = wishes.scanned.encode()
            if wishes.confirmed:
                journey.confirmed.set()
            with _interruptible(journey, screen, buying), answered(journey, screen):
                return await buying


@contextlib.contextmanager
def _interruptible(
    journey: Journey, screen: _Screen, buying: asyncio.Future[JourneySummary]
) -> Iterator[None]:
    """First Ctrl-C while energy flows: ask for a stop, wait for the end. Else, and the second time: leave."""
    loop = asyncio.get_running_loop()

    def interrupted() -> None:
        if screen.charging and not journey.stop.is_set():
            journey.stop.set()
            click.echo("stopping; Ctrl-C again leaves at once", err=True)
        else:
            buying.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupted)
    try:
        yield
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def _run(work: Coroutine[Any, Any, Result]) -> Result:
    try:
        return asyncio.run(work)
    except Refused as refused:
        raise with_remedy(refused) from refused
    except asyncio.CancelledError:
        click.echo("interrupted; the same command goes on from here", err=True)
        raise click.Abort from None


# ---- showing


class _Screen:
    """Progress on standard error: a live line on a terminal, a plain line for each new thing elsewhere."""

    def __init__(self) -> None:
        self.charging = False
        self.asking = False
        self._live: Any = None
        self._said = ""

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.live import Live

            self._live = Live(console=Console(stderr=True), auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def __call__(self, progress: Progress) -> None:
        """Show one moment."""
        self.charging = progress.step == "charge"
        if progress.asks_driver and not self.asking:
            self._ask()
        self.asking = progress.asks_driver
        if self._live is not None:
            from rich.text import Text

            self._live.update(Text(progress_line(progress)), refresh=True)
            if progress.words != self._said and not self.charging:
                self._live.console.print(Text(progress_line(progress)))
        elif progress.words != self._said:
            click.echo(progress_line(progress), err=True)
        self._said = progress.words

    def _ask(self) -> None:
        """Said once, and left standing above the live line."""
        if self._live is not None:
            self._live.console.print(question())
        else:
            click.echo(question(), err=True)


def progress_line(progress: Progress) -> str:
    """One line: step, words, and while energy flows the bar and the numbers."""
    ordered_wh = progress.energy_wh_ordered
    if progress.step not in ("charge", "settle") or not ordered_wh:
        return f"{progress.step:8} {progress.words}"
    full = min(BAR_WIDTH, progress.energy_wh_delivered * BAR_WIDTH // ordered_wh)
    bar = "#" * full + "." * (BAR_WIDTH - full)
    return (
        f"{progress.step:8} [{bar}] {progress.energy_wh_delivered} of {ordered_wh} Wh, {progress.power_w} W, "
        f"acknowledged {progress.energy_wh_acked} Wh, {ether(progress.cost_wei)}  {progress.words}"
    )


def _newest(journey: Journey, step: str) -> TransactionMined | None:
    errand = journey.journal.errand
    mined = [one for one in (errand.mined if errand is not None else ()) if one.step == step]
    return mined[-1] if mined else None


def _show(
    value: dict[str, Any],
    told: Sequence[tuple[str, object]],
    mined: TransactionMined | None,
    *,
    as_json: bool,
) -> None:
    if mined is not None:
        value |= {
            "tx": mined.tx_hash,
            "block": mined.block_number,
            "gas_used": mined.gas_used,
            "fee_wei": str(mined.fee_wei),
        }
        told = [
            *told,
            ("transaction", mined.tx_hash),
            ("block", mined.block_number),
            ("gas", f"{mined.gas_used} used, {ether(mined.fee_wei)}"),
        ]
    echo(value, facts(told), as_json=as_json)


def _show_summary(summary: JourneySummary, *, as_json: bool) -> None:
    told: list[tuple[str, object]] = [
        ("energy", f"{summary.energy_wh_settled} Wh settled of {summary.energy_wh_ordered} Wh ordered"),
        ("paid", ether(summary.cost_wei)),
        ("rate", f"{ether(summary.rate_wei_per_kwh)} per kWh"),
        ("back in the ledger", ether(summary.refund_wei)),
        ("gas", ether(summary.gas_wei)),
        ("provider", summary.provider),
        ("stopped because", summary.stop_reason or None),
        ("settled by", summary.settlement_tx),
        ("in block", summary.settlement_block),
    ]
    told += [(f"{one.step.replace('_', ' ')} by", one.tx_hash) for one in summary.transactions]
    echo(summary.as_json(), facts(told), as_json=as_json)
