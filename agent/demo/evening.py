"""One whole evening on one machine: a market opens, two cars bid, one sells 200 Wh, and the money adds up.

Real parts: an EVM chain, an MQTT broker, Modbus TCP to a simulated charger with physics, and `v2v provider run` as a process of
its own for each provider, as systemd would start it. Nothing is faked inside the loop; this file sets the stage, watches, and
counts afterwards from the chain.

Every wait is bounded. Agents write their log beside their settings; it is shown when something fails.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp

from agent.chain import contract
from agent.chain.node import Node, Receipt, Web3Node
from agent.chain.sender import Sender
from agent.consumer.carrier_mqtt import Broker as BrokerPlace
from agent.consumer.carrier_mqtt import MqttCarrier
from agent.consumer.journal import ConsumerJournal
from agent.consumer.journey import Journey, JourneySummary, Order
from agent.consumer.market import Market as ConsumersMarket
from agent.consumer.plug import Progress, Step
from agent.consumer.policy import SigningLimits
from agent.core.token import Domain
from agent.core.units import Address, cost_wei_ceil, hex0x
from agent.demo import market as setup
from agent.demo.broker import Broker
from agent.demo.devnet import Devnet
from agent.demo.screen import Glance, Moment, MoneyRow, Screen
from agent.demo.thief import LATER_S, Attempt, Thief, Wiretap
from agent.errors import Transient
from agent.mqtt_client import Heard, new_client, subscribe
from agent.runners.mqtt import ONLINE
from firmware_bridge.simulator import PlantConfig, Simulator, SimulatorConfig

PROVIDERS = ("alice", "bob")
CONSUMER = "carol"
RATE_START_WEI_PER_KWH = 2 * 10**16
BIDDING_S = 5
TOKEN_VALIDITY_S = 600
BLOCK_TIME_S = 1.0
AGENT_READY_TIMEOUT_S = 30.0  # two Python processes importing web3 on a slow machine
EVENING_TIMEOUT_S = (
    300.0  # a session takes under a minute; beyond this something hangs, and that must be said
)
GLANCE_EVERY_S = 0.25
LOG_TAIL_LINES = 20
FUNCTIONS = {
    "start_auction": "startAuction"
}  # the consumer's steps, where the contract spells them otherwise


@dataclass(frozen=True, slots=True)
class EveningSettings:
    """What may differ between two evenings. `seed` fixes keys, the car's reaction and the meter's past."""

    directory: Path
    seed: int = 0
    energy_wh: int = 200
    thief: bool = False  # somebody at the broker replays and forges meanwhile


@dataclass(frozen=True, slots=True)
class EveningSummary:
    """The evening in figures. `provider_gain_wei` and `consumer_cost_wei` are energy money; gas stands beside them."""

    energy_wh_ordered: int
    energy_wh_delivered: int
    energy_wh_settled: int
    cost_wei: int
    provider_gain_wei: int
    provider_gas_wei: int
    consumer_cost_wei: int
    consumer_gas_wei: int
    stage: str
    stop_reason: str
    settlement_tx: str
    session_id: str
    true_mwh: int  # what the simulated plant really let through
    seconds: float
    thief: tuple[Attempt, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """For `--json`; `thief` only where there was one."""
        body = asdict(self)
        if not body.pop("thief"):
            return body
        return {**body, "thief": [{**asdict(one), "refused": one.is_refused} for one in self.thief]}


@dataclass(frozen=True, slots=True)
class _Stage:
    """Everything that stands before the first order."""

    settings: EveningSettings
    screen: Screen
    net: Devnet
    node: Node
    broker: Broker
    market: setup.Market
    organisation: setup.Party
    consumer: setup.Party
    providers: tuple[setup.Provider, ...]
    simulators: dict[str, Simulator]
    status_urls: dict[str, str]

    @property
    def domain(self) -> Domain:
        return Domain(self.net.chain_id, self.market.address)

    def accounts(self) -> dict[str, tuple[Address, ...]]:
        """Whose wallets and ledgers make up each row of the money table."""
        cars = {one.owner.label: (one.owner.address, one.operator.address) for one in self.providers}
        return {CONSUMER: (self.consumer.address,), **cars}


async def evening(settings: EveningSettings, screen: Screen) -> EveningSummary:
    """Run it. Raises `AgentError` with the agents' last words when the evening does not come to its end."""
    try:
        async with asyncio.timeout(EVENING_TIMEOUT_S), AsyncExitStack() as stack:
            stage = await _set_stage(settings, screen, stack)
            thief = _thief(stage) if settings.thief else None
            if thief is not None:
                screen.tell(
                    "[bold]the thief[/bold] owns the broker tonight: he reads, holds back, replays and forges"
                )
            before = await _fortunes(stage)
            bought, moments = await _trade(stage, thief)
            after = await _fortunes(stage)
            summary = await _count(stage, bought, moments, before, after)
            return summary if thief is None else await _thief_returns(stage, thief, summary)
    except TimeoutError as error:
        raise Transient(
            f"the evening did not end within {EVENING_TIMEOUT_S:.0f} s",
            remedy=_last_words(settings.directory),
        ) from error
    finally:
        screen.rest()


# ---- the stage


async def _set_stage(settings: EveningSettings, screen: Screen, stack: AsyncExitStack) -> _Stage:
    screen.tell("a chain, a broker and two chargers start on this machine")
    labels = setup.labels(PROVIDERS, CONSUMER)
    seed = f"evening-{settings.seed}"
    net = await stack.enter_async_context(Devnet(block_time_s=BLOCK_TIME_S, seed=seed, accounts=labels))
    broker = await stack.enter_async_context(Broker())
    dice = random.Random(settings.seed)
    simulators = {label: await stack.enter_async_context(_simulator(dice)) for label in PROVIDERS}
    node = await stack.enter_async_context(Web3Node(net.url_ws))
    organisation = setup.party(net, settings.directory, "organisation")
    consumer = setup.party(net, settings.directory, CONSUMER)
    providers = tuple(setup.provider(net, settings.directory, label) for label in PROVIDERS)
    screen.tell("the organisation deploys the market and adds three cars")
    market = await setup.opened(node, net.chain_id, organisation, providers, consumer)
    screen.tell(f"market {hex0x(market.address)}, {market.steps[0].receipt.gas_used} gas")
    status_urls: dict[str, str] = {}
    for one in providers:
        http_port = _free_port()
        status_urls[one.owner.label] = f"http://127.0.0.1:{http_port}/status.json"
        config = setup.agent_toml(
            settings.directory,
            one,
            market,
            url_ws=net.url_ws,
            chain_id=net.chain_id,
            charger_wire=simulators[one.owner.label].wire,
            mqtt_port=broker.port,
            http_port=http_port,
        )
        await stack.enter_async_context(_agent(config))
    return _Stage(
        settings,
        screen,
        net,
        node,
        broker,
        market,
        organisation,
        consumer,
        providers,
        simulators,
        status_urls,
    )


def _simulator(dice: random.Random) -> Simulator:
    plant = PlantConfig(
        ev_lag_ms=dice.randrange(300, 700),
        ev_ramp_ma_per_s=dice.randrange(30_000, 60_000),
        register_mwh_begin=dice.randrange(10**6, 10**7) * 1000,
        soc_permille_begin=dice.randrange(600, 950),
    )
    return Simulator(SimulatorConfig(map="simulated", tcp="127.0.0.1:0", plant=plant))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@asynccontextmanager
async def _agent(config: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """`v2v provider run` as a process of its own, asked to stop at the end as systemd would."""
    with (config.parent / "agent.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "agent", "provider", "run", "--config", str(config), stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.terminate()
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()


def _last_words(directory: Path) -> str:
    logs = sorted(directory.glob("*/agent.log"))
    tails = [f"{path}:\n" + "\n".join(path.read_text().splitlines()[-LOG_TAIL_LINES:]) for path in logs]
    return "the agents' last words:\n" + "\n".join(tails)


# ---- the trade


def _thief(stage: _Stage) -> Thief:
    """At this broker, where he knows every door."""
    place = BrokerPlace("127.0.0.1", stage.broker.port)
    return Thief(
        stage.domain,
        stage.net.seed,
        {one.owner.address: one.owner.label for one in stage.providers},
        way=lambda sref: MqttCarrier(place, sref),
        say=stage.screen.attempt,
    )


async def _visit(stage: _Stage, thief: Thief) -> None:
    """Not before everybody is at home: nobody refuses anything at a door that is not there yet."""
    await _until_online(
        stage.broker, [one.owner.address for one in stage.providers], stage.settings.directory
    )
    await thief.visit()


async def _until_online(broker: Broker, providers: list[Address], directory: Path) -> None:
    """Until each of them has said `online`, and so hears whoever knocks. Raises Transient with the agents' last words."""
    away = {f"v2v/1/{hex0x(provider)}/online" for provider in providers}
    try:
        async with (
            asyncio.timeout(AGENT_READY_TIMEOUT_S),
            new_client(
                BrokerPlace(broker.host, broker.port), Heard(), timeout_s=AGENT_READY_TIMEOUT_S
            ) as client,
        ):
            await subscribe(client, *away)
            while away:
                message = await anext(client.messages)
                if message.payload == ONLINE:
                    away.discard(message.topic.value)
    except TimeoutError as error:
        raise Transient(
            f"an agent was not online within {AGENT_READY_TIMEOUT_S:.0f} s", remedy=_last_words(directory)
        ) from error


async def _thief_returns(stage: _Stage, thief: Thief, summary: EveningSummary) -> EveningSummary:
    """Everything is paid and counted; he comes back when the token's time is over."""
    stage.net.methods.increase_time(LATER_S)
    await thief.return_later()
    stage.screen.attempts(thief.attempts)
    return replace(summary, thief=tuple(thief.attempts), seconds=round(stage.screen.seconds, 1))


async def _trade(stage: _Stage, thief: Thief | None) -> tuple[JourneySummary, list[Moment]]:
    moments: list[Moment] = []
    started = asyncio.Event()
    said = ""

    def tell(progress: Progress) -> None:
        nonlocal said
        if progress.step is Step.CHARGE or progress.words == said:
            return  # the live view shows it, from the provider's side
        said = progress.words
        stage.screen.tell(f"[bold]{CONSUMER}[/bold] {progress.words}")
        if progress.step is Step.BIDDING:
            started.set()

    async with asyncio.TaskGroup() as group:
        buying = group.create_task(_buy(stage, tell, thief))
        if thief is not None:
            group.create_task(_visit(stage, thief))
        await started.wait()
        for one, percent in zip(stage.providers, (90, 80), strict=True):
            moments.append(await _bid(stage, one, RATE_START_WEI_PER_KWH * percent // 100))
        watching = group.create_task(_watch(stage, buying))
        bought = await buying
        await watching
    moments += await _moments(stage, bought)
    return bought, moments


async def _buy(stage: _Stage, tell: Any, thief: Thief | None) -> JourneySummary:
    consumer, settings = stage.consumer, stage.settings
    path = settings.directory / CONSUMER / "journal.sqlite"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    journal = ConsumerJournal(path, stage.domain, consumer.address, time.time)
    sref = random.Random(settings.seed).randbytes(16).hex()
    sender = Sender(stage.node, consumer.signer, stage.net.chain_id, revert_name=contract.revert_name)
    journey = Journey(
        domain=stage.domain,
        account=consumer.signer,
        journal=journal,
        market=ConsumersMarket(stage.node, sender, stage.domain, journal),
        limits=SigningLimits(power_w_max=25_000),
        own_register_wh=lambda: _received_mwh(stage) // 1000,  # the car measures for itself
        now_ms=lambda: int(asyncio.get_running_loop().time() * 1000),
        sref=sref,
        tell=tell,
    )
    order = Order(settings.energy_wh, RATE_START_WEI_PER_KWH, BIDDING_S, TOKEN_VALIDITY_S)
    try:
        place = BrokerPlace("127.0.0.1", stage.broker.port)
        async with MqttCarrier(place, sref) if thief is None else Wiretap(place, sref, thief) as carrier:
            return await journey.charge(order, carrier)
    finally:
        journal.close()


def _received_mwh(stage: _Stage) -> int:
    """What truly came out of whichever charger delivers: there is one car."""
    return sum(one.truth().delivered_mwh for one in stage.simulators.values())


async def _bid(stage: _Stage, one: setup.Provider, rate_wei_per_kwh: int) -> Moment:
    """The owner bids with the owner's key, as `v2v provider bid` does; the bond is the cost."""
    address = stage.market.address
    auction = contract.decode_auctions(
        await stage.node.call(address, contract.encode_auctions(stage.consumer.address))
    )
    sender = Sender(stage.node, one.owner.signer, stage.net.chain_id, revert_name=contract.revert_name)
    bond_wei = cost_wei_ceil(rate_wei_per_kwh, auction.energy_wh)
    data = contract.encode_place_bid(stage.consumer.address, auction.auction_nonce, rate_wei_per_kwh)
    receipt = await sender.send_and_wait(address, data, bond_wei)
    stage.screen.tell(f"[bold]{one.owner.label}[/bold] bids {rate_wei_per_kwh} wei per kWh")
    return await _moment(stage, one.owner.label, "placeBid", receipt)


async def _watch(stage: _Stage, buying: asyncio.Task[JourneySummary]) -> None:
    """The live view, from the status page of whichever agent has a session."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
        while not buying.done():
            for url in stage.status_urls.values():
                glance = await _glance(http, url)
                if glance is not None:
                    stage.screen.watch(glance)
            await asyncio.sleep(GLANCE_EVERY_S)
    stage.screen.rest()


async def _glance(http: aiohttp.ClientSession, url: str) -> Glance | None:
    try:
        async with http.get(url) as answer:
            status = await answer.json()
    except (aiohttp.ClientError, TimeoutError):
        return None  # not up yet
    if not status["sessions"]:
        return None
    one = status["sessions"][-1]
    port = status["ports"].get(one["port"] or "", {})
    return Glance(
        stage=one["stage"],
        reason=one["stop_reason"] or one["hindrance"] or "",
        power_w=port.get("power_w") or 0,
        energy_wh_ordered=one["energy_wh_ordered"],
        energy_wh_delivered=one["energy_wh_delivered"],
        energy_wh_acked=one["energy_wh_acked"],
        cost_wei=int(one["cost_wei"]),
    )


# ---- afterwards: what the chain says


async def _moment(stage: _Stage, who: str, what: str, receipt: Receipt) -> Moment:
    block = await stage.node.header(receipt.block_hash)
    at_s = 0 if block is None else block.timestamp_s
    return Moment(at_s, who, what, hex0x(receipt.tx_hash), receipt.gas_used)


async def _moments(stage: _Stage, bought: JourneySummary) -> list[Moment]:
    moments: list[Moment] = []
    for mined in bought.transactions:
        receipt = await stage.node.receipt(mined.tx_hash)
        if receipt is not None:
            moments.append(await _moment(stage, CONSUMER, FUNCTIONS.get(mined.step, mined.step), receipt))
    settled = await stage.node.receipt(bought.settlement_tx)
    if settled is not None:
        moments.append(await _moment(stage, _winner(stage, bought), "endConnection", settled))
    return moments


def _winner(stage: _Stage, bought: JourneySummary) -> str:
    return next(one.owner.label for one in stage.providers if one.owner.address == bought.provider)


@dataclass(frozen=True, slots=True)
class _Fortune:
    wallet_wei: int
    ledger_wei: int


async def _fortunes(stage: _Stage) -> dict[str, _Fortune]:
    fortunes: dict[str, _Fortune] = {}
    for label, addresses in stage.accounts().items():
        wallet_wei = sum([await stage.node.balance(address) for address in addresses])
        ledger_wei = 0
        for address in addresses:
            data = await stage.node.call(stage.market.address, contract.encode_balances(address))
            ledger_wei += contract.decode_balances(data)
        fortunes[label] = _Fortune(wallet_wei, ledger_wei)
    return fortunes


async def _count(
    stage: _Stage,
    bought: JourneySummary,
    moments: list[Moment],
    before: dict[str, _Fortune],
    after: dict[str, _Fortune],
) -> EveningSummary:
    rows = [
        MoneyRow(
            who=label,
            energy_wei=_energy_wei(stage, bought, label),
            gas_wei=-await _gas_wei(stage, label, moments),
            wallet_change_wei=after[label].wallet_wei - before[label].wallet_wei,
            ledger_change_wei=after[label].ledger_wei - before[label].ledger_wei,
        )
        for label in stage.accounts()
    ]
    for row in rows:  # to the wei: what a party has more or less is energy money and gas, and nothing else
        assert row.wallet_change_wei + row.ledger_change_wei == row.energy_wei + row.gas_wei, row
    setting_up = [await _moment(stage, step.who, step.function, step.receipt) for step in stage.market.steps]
    stage.screen.timeline([_since(stage, moment) for moment in (*setting_up, *moments)])
    stage.screen.money(rows)
    of = {row.who: row for row in rows}
    winner = _winner(stage, bought)
    status = await _status(stage.status_urls[winner], hex0x(bought.session_id))
    return EveningSummary(
        energy_wh_ordered=bought.energy_wh_ordered,
        energy_wh_delivered=status["energy_wh_delivered"],
        energy_wh_settled=bought.energy_wh_settled,
        cost_wei=bought.cost_wei,
        provider_gain_wei=of[winner].energy_wei,
        provider_gas_wei=-of[winner].gas_wei,
        consumer_cost_wei=-of[CONSUMER].energy_wei,
        consumer_gas_wei=-of[CONSUMER].gas_wei,
        stage=status["stage"],
        stop_reason=status["stop_reason"],
        settlement_tx=hex0x(bought.settlement_tx),
        session_id=hex0x(bought.session_id),
        true_mwh=stage.simulators[winner].truth().delivered_mwh,
        seconds=round(stage.screen.seconds, 1),
    )


def _since(stage: _Stage, moment: Moment) -> Moment:
    """The moment's time as seconds since the evening began."""
    at_s = moment.at_s - (time.time() - stage.screen.seconds)
    return Moment(max(0.0, at_s), moment.who, moment.what, moment.tx_hash, moment.gas)


def _energy_wei(stage: _Stage, bought: JourneySummary, label: str) -> int:
    if label == CONSUMER:
        return -bought.cost_wei
    return bought.cost_wei if label == _winner(stage, bought) else 0


async def _gas_wei(stage: _Stage, label: str, moments: list[Moment]) -> int:
    """What this party paid for gas since the stage was set."""
    total_wei = 0
    for moment in moments:
        if moment.who == label and moment.tx_hash:
            receipt = await stage.node.receipt(bytes.fromhex(moment.tx_hash[2:]))
            assert receipt is not None
            total_wei += receipt.fee_wei
    return total_wei


async def _status(url: str, session_id: str) -> dict[str, Any]:
    """The winner's own words about this session, once it believes the settlement (a few blocks after it is mined)."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2)) as http:
        while True:  # bounded by EVENING_TIMEOUT_S
            async with http.get(url) as answer:
                sessions = (await answer.json())["sessions"]
            one: dict[str, Any] = next(item for item in sessions if item["session_id"] == session_id)
            if one["stage"] in ("SETTLED", "STRANDED", "LAPSED"):
                return one
            await asyncio.sleep(GLANCE_EVERY_S)
