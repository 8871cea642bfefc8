"""The composition root: builds every port, hands each to its runner, runs them in one TaskGroup, stops them in order.

Order of a start (rule 9): journal -> chargers, held -> keys, commissioning -> node, code, operator -> door -> runners.
Order of a stop: signal -> runners cancelled -> chargers held -> wires, node and journal given back. A failed start ends so too.

This is the only file of the daemon that knows everybody; no decision about a session is made here.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Protocol

import structlog

from agent import views
from agent.chain import contract
from agent.chain.failover import Endpoint, FailoverNode
from agent.chain.node import Node, Web3Node, check_deployment
from agent.chain.rpc import shown
from agent.chain.sender import Sender
from agent.commissioned import require_commissioned
from agent.config import AgentConfig, PortConfig, socket_path
from agent.core.book import Book
from agent.core.events import Event
from agent.core.live import Beat, Policy
from agent.core.record import MeterIdentity
from agent.core.token import Domain
from agent.core.units import Address, hex0x, short
from agent.door import Door
from agent.engine import Engine
from agent.errors import AgentError, Misconfigured, Transient
from agent.journal import Journal
from agent.keys import (
    MeterSigner,
    Signer,
    load_meter_signer,
    load_password,
    load_signer,
    require_different_keys,
    shut_process,
    tls_context,
)
from agent.runners.chain_send import ChainSend
from agent.runners.chain_watch import ChainWatch, WatchSettings
from agent.runners.charger import ChargerRunner
from agent.runners.http import HttpRunner
from agent.runners.local import LocalRunner
from agent.runners.mqtt import BrokerAddress, MqttRunner
from agent.runners.systemd import SystemdRunner
from contracts import load_artefact
from firmware_bridge.charger import BridgeError, Charger, Identity, MapError
from firmware_bridge.mapped_charger import ChargerConfig
from firmware_bridge.modbus import Buses
from firmware_bridge.opening import editions, is_trusted, open_charger
from firmware_bridge.stopping import StopModel

ENGINE_BEAT_S = 0.25  # time makes events due too; 4 Hz keeps every deadline within a quarter second
SLEEP_S_MAX = 1.0  # a suspend, not the difference between two clock reads
CANCEL_TRIES, CANCEL_EVERY_S = 20, 0.25  # five seconds; the unit's TimeoutStopSec kills what hangs longer
HOLD_ON_EXIT_S = 3.0  # a charger that does not answer by then is left to its own failsafe

log = structlog.get_logger(__name__)


def monotonic_ms() -> int:
    """Monotonic milliseconds of the running loop: the clock of readings, headers and deadlines."""
    return int(asyncio.get_running_loop().time() * 1000)


def _slept_s() -> float:
    """How long this computer has slept since it booted. The loop's clock stands still meanwhile."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.clock_gettime(time.CLOCK_MONOTONIC)


@dataclass(frozen=True, slots=True)
class _Port:
    config: PortConfig
    charger: Charger
    identity: Identity


async def run(config: AgentConfig, environ: Mapping[str, str] = os.environ) -> None:
    """Run the agent until SIGTERM or SIGINT; SIGUSR1 ends every session, by the owner's wish, and the agent goes on.

    Raises `AgentError` when it cannot start or must not go on.
    """
    stop, owner_stop = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGUSR1: owner_stop}
    for number, event in signals.items():
        loop.add_signal_handler(number, event.set)
    try:
        async with AsyncExitStack() as stack:
            await _start(config, environ, stack, stop, owner_stop)
    except* AgentError as group:
        raise _first_of(group) from group
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


def _first_of(group: BaseExceptionGroup[AgentError]) -> AgentError:
    """The error to show: what a human must mend goes before what waiting may mend."""
    leaves: list[AgentError] = []
    queue: list[BaseException] = [group]
    while queue:
        error = queue.pop(0)
        if isinstance(error, BaseExceptionGroup):
            queue += error.exceptions
        elif isinstance(error, AgentError):
            leaves.append(error)
    return min(leaves, key=lambda error: not isinstance(error, Misconfigured))


async def _start(
    config: AgentConfig,
    environ: Mapping[str, str],
    stack: AsyncExitStack,
    stop: asyncio.Event,
    owner_stop: asyncio.Event | None = None,
) -> None:
    shut_process(for_good=True)  # before the first private byte
    domain = Domain(config.chain.chain_id, Address(config.chain.contract))
    provider = Address(config.chain.provider)
    journal = Journal(config.journal.path, domain, provider)
    stack.callback(journal.close)
    buses = Buses()
    ports = [await stack.enter_async_context(_charger(port, buses)) for port in config.ports]
    signer = load_signer(config.keys.operator, config.keys.operator_password, environ=environ)
    meter_signer = load_meter_signer(config.keys.meter, config.keys.meter_password, environ=environ)
    require_different_keys(signer, meter_signer)
    for port in ports:
        _check_commissioned(port, meter_signer)
    node = await stack.enter_async_context(_node(config))
    grace_s = await _check_market(node, config, signer)
    engine = Engine(journal, _policy(config, grace_s), monotonic_ms, _log_event)
    door = Door(engine, domain, provider, signer, tuple(p.config.name for p in ports), os.urandom)
    runners = _runners(config, environ, engine, door, node, signer, meter_signer, ports)
    log.info("agent.started", provider=short(provider), ports=[p.config.name for p in ports])
    gc.freeze()  # what is loaded by now stays: looking through it again and again would hold a beat up for 50 ms and more
    await _run_until(stop, engine, runners, owner_stop or asyncio.Event())
    log.info("agent.stopping")


async def _run_until(
    stop: asyncio.Event, engine: Engine, runners: Sequence[_Runner], owner_stop: asyncio.Event
) -> None:
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(runner.run(), name=type(runner).__name__) for runner in runners]
        tasks.append(group.create_task(_engine_beat(engine, owner_stop), name="engine"))
        await stop.wait()
        await _cancelled(tasks)


async def _cancelled(tasks: Sequence[asyncio.Task[None]]) -> None:
    """End these tasks. More than once if needed: before Python 3.12, `asyncio.wait_for` inside a library can swallow one."""
    for _ in range(CANCEL_TRIES):
        for task in tasks:
            task.cancel()
        _, pending = await asyncio.wait(tasks, timeout=CANCEL_EVERY_S)
        if not pending:
            return


class _Runner(Protocol):
    async def run(self) -> None:
        """Until cancelled."""


async def _engine_beat(engine: Engine, owner_stop: asyncio.Event) -> None:
    """Time makes events due too. After a sleep every age we know is too young: start anew, charger first."""
    slept_s = _slept_s()
    while True:
        if _slept_s() - slept_s > SLEEP_S_MAX:
            raise Transient(
                "the computer slept; what it knew of chain and charger is stale", remedy="starting anew"
            )
        engine.observe(Beat())
        if owner_stop.is_set():
            owner_stop.clear()
            log.warning("owner.stopped", sessions=engine.stop_by_owner())
        engine.compact_when_idle()
        await asyncio.sleep(ENGINE_BEAT_S)


# ---- the charger


@asynccontextmanager
async def _charger(port: PortConfig, buses: Buses) -> AsyncIterator[_Port]:
    """A charger that answers and is held; held again, and its wire given back, at the end."""
    try:
        charger = await open_charger(_charger_config(port), buses)
    except MapError as error:
        raise Misconfigured(str(error), remedy=f"correct [[ports]] {port.name}") from error
    except BridgeError as error:
        raise _unreachable(port, error) from error
    try:
        try:
            await charger.hold()
            identity = await charger.identify()
        except BridgeError as error:
            raise _unreachable(port, error) from error
        yield _Port(port, charger, identity)
    finally:
        with suppress(BridgeError, TimeoutError):
            async with asyncio.timeout(HOLD_ON_EXIT_S):
                await charger.hold()
        await charger.close()


def _charger_config(port: PortConfig) -> ChargerConfig:
    return ChargerConfig.model_validate(port.charger_settings())


def _check_commissioned(port: _Port, meter_signer: MeterSigner) -> None:
    """Raises Misconfigured for a port that BRIDGE rule 9 does not let us sell from. A report that is named is always checked."""
    config = _charger_config(port.config)
    if port.config.commissioning is None and is_trusted(config):
        return
    require_commissioned(
        port.config.commissioning,
        port.config.name,
        installed=port.config.installed(),
        editions=editions(config),
        identity=asdict(port.identity),
        signer=meter_signer,
    )


def _unreachable(port: PortConfig, error: BridgeError) -> Transient:
    return Transient(
        f"the charger of port {port.name} at {port.wire} does not answer ({error})",
        remedy="check power, wiring and device id; `v2v charger read` shows what answers",
    )


# ---- the chain


@asynccontextmanager
async def _node(config: AgentConfig) -> AsyncIterator[Node]:
    endpoints = [
        Endpoint(shown(url), Web3Node(url), can_watch=url.startswith("ws")) for url in config.chain.urls
    ]
    node = FailoverNode(endpoints, config.chain.chain_id, time.monotonic, log.warning)
    try:
        yield node
    finally:
        await node.close()


async def _check_operator(node: Node, address: Address, provider: Address, signer: Signer) -> None:
    operator = contract.decode_operator_of(await node.call(address, contract.encode_operator_of(provider)))
    if operator.operator != signer.address:
        raise Misconfigured(
            f"the operator key {short(signer.address)} may not act for {short(provider)}",
            remedy=f"the owner runs once: v2v provider set-operator {hex0x(signer.address)}",
        )


async def _check_market(node: Node, config: AgentConfig, signer: Signer) -> int:
    """Right chain, our code, a key that may settle. Returns the market's grace in seconds."""
    address, provider = Address(config.chain.contract), Address(config.chain.provider)
    await check_deployment(node, config.chain.chain_id, address, load_artefact())
    if signer.address == provider:
        # The paper's car holds the provider's own key, and a test bench may: it works, and is said at every start.
        log.warning(
            "key.owner_in_car",
            provider=short(provider),
            danger="who takes this computer can take the money",
            remedy="v2v key new, name it in [keys], and once: v2v provider set-operator ADDRESS",
        )
    else:
        await _check_operator(node, address, provider, signer)
    if await node.balance(signer.address) == 0:
        raise Misconfigured(
            f"the operator key {hex0x(signer.address)} has no coins for gas: it could deliver and never settle",
            remedy="send it a little; a settlement takes under 100 000 gas",
        )
    parameters = contract.decode_parameters(await node.call(address, contract.encode_parameters()))
    _check_challenge(parameters.challenge_s, config.chain.max_view_age_s)
    return parameters.grace_s


def _check_challenge(challenge_s: int, max_view_age_s: int) -> None:
    """A consumer's close must leave us time to answer with its last receipt."""
    if challenge_s == 0:
        raise Misconfigured(
            "this market gives no time to answer a consumer's close: it could concede 0 Wh and be settled at once",
            remedy="sell in a market whose challenge is longer: v2v organisation deploy --help",
        )
    if challenge_s < max_view_age_s:
        log.warning("market.challenge_short", challenge_s=challenge_s, max_view_age_s=max_view_age_s)


# ---- everything else


def _policy(config: AgentConfig, grace_s: int) -> Policy:
    wanted = config.policy
    unacked_wh = {port.name: wanted.max_unacked_wh_at(_power_w_max(port)) for port in config.ports}
    return Policy(
        max_unacked_wh=unacked_wh,
        max_unfinal_wh=wanted.max_unfinal_wh,
        max_view_age_s=config.chain.max_view_age_s,
        validity_margin_s=wanted.validity_margin_s,
        final_receipt_wait_s=wanted.final_receipt_wait_s,
        receipt_timeout_s=wanted.receipt_timeout_s,
        stop_deadline_s=wanted.stop_deadline_s,
        grace_s=grace_s,
        soc_permille_reserve=wanted.battery_reserve_permille,
        battery_budget_wh=wanted.battery_budget_wh,
    )


def _power_w_max(port: PortConfig) -> int:
    return _charger_config(port).power_w_max


def _runners(
    config: AgentConfig,
    environ: Mapping[str, str],
    engine: Engine,
    door: Door,
    node: Node,
    signer: Signer,
    meter_signer: MeterSigner,
    ports: Sequence[_Port],
) -> list[_Runner]:
    domain, provider = (
        Domain(config.chain.chain_id, Address(config.chain.contract)),
        Address(config.chain.provider),
    )
    settings = WatchSettings(config.chain.start_block, config.chain.confirmations, config.chain.finality)
    sender = Sender(node, signer, config.chain.chain_id, revert_name=contract.revert_name)
    chargers = [
        _charger_runner(engine, port, meter_signer, (at, len(ports))) for at, port in enumerate(ports)
    ]
    runners: list[_Runner] = [
        *chargers,
        ChainWatch(engine, node, domain, provider, settings, time.monotonic),
        ChainSend(engine, node, sender, domain.contract),
        LocalRunner(engine, socket_path(config, environ)),
        SystemdRunner(
            engine, lambda: {charger.port: charger.beat_at_ms for charger in chargers}, monotonic_ms, environ
        ),
    ]
    if config.mqtt is not None:
        runners.append(MqttRunner(engine, door, provider, _broker(config, environ)))
    if config.http.enabled:
        runners.append(HttpRunner(engine, door, config.http.host, config.http.port))
    return runners


def _charger_runner(
    engine: Engine, port: _Port, meter_signer: MeterSigner, beat_turn: tuple[int, int]
) -> ChargerRunner:
    identity = port.identity
    return ChargerRunner(
        engine,
        port.config.name,
        port.charger,
        failsafe_timeout_s=port.config.failsafe_timeout_s,
        beat_interval_ms=port.config.poll_interval_ms,
        beat_turn=beat_turn,
        stop_model=StopModel(ev_lag_ms=port.config.ev_lag_ms, ramp_ma_per_s=port.config.ev_ramp_ma_per_s),
        meter=MeterIdentity(identity.maker, identity.model, identity.serial, identity.firmware),
        meter_signer=meter_signer,
        monotonic_ms=monotonic_ms,
    )


def _broker(config: AgentConfig, environ: Mapping[str, str]) -> BrokerAddress:
    mqtt = config.mqtt
    assert mqtt is not None
    password = None
    if mqtt.password_credential is not None:
        password = load_password(mqtt.password_credential, environ=environ)
    tls = None
    if mqtt.tls:
        tls = tls_context(mqtt.authority, mqtt.certificate, mqtt.certificate_key, environ=environ)
    return BrokerAddress(mqtt.host, mqtt.port, tls, mqtt.username, password, mqtt.keepalive_s)


def _log_event(event: Event, before: Book, after: Book) -> None:
    """Every fact becomes one line, every change of stage another; neither shows what is private."""
    for fields in (views.describe(event), *views.stage_changes(before, after)):
        name = fields.pop("event")
        log.info(name, **fields)
