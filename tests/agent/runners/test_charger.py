"""The one place where core and charger meet: a real simulated charger over Modbus TCP, driven by what the engine owes."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest
import story as told
from story import ListJournal, connect, presentation
from tcp_proxy import TcpProxy

from agent.core import events as ev
from agent.core.live import Beat, HeaderSeen, Policy
from agent.core.record import MeterIdentity
from agent.core.session import Session, Stage
from agent.core.units import BlockHash
from agent.engine import Engine
from agent.runners import charger as charger_runner
from agent.runners.charger import ChargerRunner
from firmware_bridge.charger import BridgeError, Charger, Limits, Reading
from firmware_bridge.mapped_charger import ChargerConfig, open_charger
from firmware_bridge.simulator import PlantConfig, Simulator, SimulatorConfig
from firmware_bridge.stopping import StopModel

ORDER_WH = 6
FAILSAFE_S = 2


class MeterKey:
    """A meter key that signs the same thing every time; what a signature is worth is `keys.py`'s test."""

    def sign_sha256(self, payload: bytes) -> bytes:
        """DER by coincurve."""
        return told.METER.private.sign(payload)

    @property
    def public_key_spki(self) -> bytes:
        """The key itself, without its envelope."""
        return told.METER.public_key


@dataclass
class Socket:
    """One agent at one simulated charger, without a chain: the story says what is believed."""

    engine: Engine
    simulator: Simulator
    charger: Charger
    runner: ChargerRunner
    journal: ListJournal
    cable: TcpProxy

    @property
    def session(self) -> Session:
        """The only one."""
        return next(iter(self.engine.book.sessions.values()))

    def believes(self, *, order_wh: int = ORDER_WH) -> None:
        """A session is matched and its token presented here."""
        terms = connect(order_wh=order_wh)
        at_s = terms.issued_at_s
        self.engine.observe(HeaderSeen(103, BlockHash(bytes(32)), at_s))
        for event in (
            ev.ConnectedSeen(at_s, terms),
            ev.ConnectedBelieved(at_s, terms.session_id, terms.block_hash),
            ev.TokenPresented(at_s, terms.session_id, presentation(terms)),
        ):
            assert self.engine.accept(event)

    async def becomes(self, true: Callable[[], bool], timeout_s: float = 45) -> None:
        """Wait for it; the engine's own beat goes on meanwhile."""
        async with asyncio.timeout(timeout_s):
            while not true():
                self.engine.observe(Beat())
                await asyncio.sleep(0.02)


@asynccontextmanager
async def socket(*, unacked_wh: int = 50, reserve_permille: int = 0, **plant: int) -> AsyncIterator[Socket]:
    """A charger, an engine and the runner between them, running."""
    loop = asyncio.get_running_loop()
    config = SimulatorConfig(map="simulated", tcp="127.0.0.1:0", plant=PlantConfig(ev_lag_ms=200, **plant))
    async with Simulator(config) as simulator, TcpProxy(int(simulator.wire.rpartition(":")[2])) as cable:
        wire = f"tcp://127.0.0.1:{cable.port}"
        charger = await open_charger(ChargerConfig(map="simulated", wire=wire, failsafe_timeout_s=FAILSAFE_S))
        await charger.hold()
        journal = ListJournal()
        policy = Policy(
            max_unacked_wh={"left": unacked_wh}, final_receipt_wait_s=1, soc_permille_reserve=reserve_permille
        )
        engine = Engine(journal, policy, lambda: int(loop.time() * 1000))  # type: ignore[arg-type]
        runner = ChargerRunner(
            engine,
            "left",
            charger,
            failsafe_timeout_s=FAILSAFE_S,
            stop_model=StopModel(ev_lag_ms=400, ramp_ma_per_s=50_000),
            meter=MeterIdentity(),
            meter_signer=MeterKey(),
            monotonic_ms=lambda: int(loop.time() * 1000),
        )
        task = asyncio.create_task(runner.run())
        try:
            yield Socket(engine, simulator, charger, runner, journal, cable)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await charger.close()


class IdleCharger:
    """A charger that is off and answers at once; it knows when it was looked at."""

    limits = Limits(6_000, 32_000, 3, 230_000, 1_000, poll_interval_ms=200)

    def __init__(self) -> None:
        self.looked_at_s: list[float] = []

    async def read(self) -> Reading:
        """Nothing plugged in."""
        now_s = asyncio.get_running_loop().time()
        self.looked_at_s.append(now_s)
        return Reading(int(now_s * 1000), 1_000, 0, 0, 230_000, "A", contactor_closed=False)

    async def arm(self, failsafe_timeout_s: int) -> None:
        """As asked."""

    async def hold(self) -> None:
        """It is off."""


@pytest.mark.looptime
async def test_ports_beat_one_after_the_other() -> None:
    """Would catch all ports of a car park beating in the same instant, so that the last of them is late by all the others."""
    loop = asyncio.get_running_loop()
    chargers = [IdleCharger() for _ in range(4)]
    names = [f"port{at}" for at in range(4)]
    policy = Policy(max_unacked_wh=dict.fromkeys(names, 50))
    engine = Engine(ListJournal(), policy, lambda: int(loop.time() * 1000))  # type: ignore[arg-type]
    runners = [
        ChargerRunner(
            engine,
            name,
            charger,  # type: ignore[arg-type]
            failsafe_timeout_s=FAILSAFE_S,
            beat_turn=(at, 4),
            stop_model=StopModel(ev_lag_ms=400, ramp_ma_per_s=50_000),
            meter=MeterIdentity(),
            meter_signer=MeterKey(),
            monotonic_ms=lambda: int(loop.time() * 1000),
        )
        for at, (name, charger) in enumerate(zip(names, chargers, strict=True))
    ]
    began_s = loop.time()
    tasks = [asyncio.create_task(runner.run()) for runner in runners]
    await asyncio.sleep(2)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert all(charger.looked_at_s[0] == began_s for charger in chargers), "the first beat makes it safe"
    later = sorted(at_s for charger in chargers for at_s in set(charger.looked_at_s) if at_s > began_s)
    apart_s = [after - one for one, after in itertools.pairwise(later)]
    assert len(later) > 30
    assert min(apart_s) == pytest.approx(0.05, abs=0.005) == max(apart_s)


async def test_nothing_flows_before_a_session_is_authorised() -> None:
    """Would catch a charger that is enabled because it is there, and a failsafe that is armed only later."""
    async with socket() as plug:
        await plug.becomes(lambda: plug.engine.live.ports.get("left") is not None)
        await plug.becomes(lambda: plug.engine.live.ports["left"].armed)
        truth = plug.simulator.truth()
        assert (truth.energised, truth.delivered_mwh) == (False, 0)
        assert truth.failsafe_armed


async def test_an_order_ends_on_the_watt_hour_with_both_registers_on_disk() -> None:
    """Would catch overshoot, an order that never ends, and an end register taken while the contactor is closed."""
    async with socket() as plug:
        plug.believes()
        await plug.becomes(lambda: plug.session.stage is Stage.SETTLING)
        await plug.becomes(lambda: bool(plug.session.record_end))
        truth = plug.simulator.truth()
        assert plug.session.energy_wh_delivered == ORDER_WH
        assert ORDER_WH * 1000 <= truth.delivered_mwh < (ORDER_WH + 1) * 1000
        assert not truth.energised
        kinds = [type(event) for event in plug.journal.events]
        assert kinds.index(ev.SessionAccepted) < kinds.index(ev.DeliveryBegan) < kinds.index(ev.DeliveryEnded)
        assert kinds.count(ev.MeterRecordSigned) == 2


async def test_it_pauses_when_nobody_signs_and_goes_on_when_somebody_does() -> None:
    """Would catch energy given away to a consumer who stops signing (rule 3)."""
    async with socket(unacked_wh=3) as plug:
        plug.believes(order_wh=8)
        await plug.becomes(lambda: plug.session.stage is Stage.PAUSED)
        assert not plug.simulator.truth().energised
        delivered_wh = plug.session.energy_wh(None)
        assert 3 <= delivered_wh <= 3 + 3  # the credit, and what 22 kW moves while the contactor opens
        acked = ev.ReceiptCredited(
            plug.engine.at_s, plug.session.session_id, delivered_wh, told.ack_of(plug.session, delivered_wh)
        )
        plug.engine.accept(acked)
        await plug.becomes(lambda: plug.session.stage is Stage.DELIVERING)
        await plug.becomes(lambda: plug.simulator.truth().energised)


async def test_a_dead_loop_means_a_dead_charger() -> None:
    """Would catch a keep-alive that is fed by anything but the control loop (BRIDGE rule 7)."""
    async with socket() as plug:
        plug.believes(order_wh=500)
        await plug.becomes(lambda: plug.simulator.truth().power_w > 1000)
        for task in asyncio.all_tasks():
            if task.get_coro().__qualname__ == "ChargerRunner.run":  # type: ignore[union-attr]
                task.cancel()
        began_s = asyncio.get_running_loop().time()
        await plug.becomes(lambda: not plug.simulator.truth().energised, FAILSAFE_S + 3)
        assert asyncio.get_running_loop().time() - began_s <= FAILSAFE_S + 1.5
        assert plug.simulator.truth().failsafe_tripped


async def test_a_welded_contactor_is_locked_cut_off_and_reported_as_held() -> None:
    """Would catch a stop that is written and believed: the contactor is stuck, so the stop must become firmer (rule 8)."""
    async with socket(contactor_stuck=True) as plug:
        plug.believes(order_wh=500)
        await plug.becomes(lambda: plug.simulator.truth().power_w > 1000)
        plug.engine.accept(
            ev.StopDecided(
                plug.engine.at_s, plug.session.session_id, ev.StopReason.LOCAL, "the owner pressed stop"
            )
        )
        await plug.becomes(lambda: plug.engine.live.held_ms("left") > 1000)
        await plug.becomes(lambda: plug.simulator.truth().locked, timeout_s=15)
        assert plug.session.stage is Stage.STOPPING


async def test_a_lost_wire_is_a_pause_not_an_end() -> None:
    """Would catch a session thrown away for a moment's silence, and power offered again without a fresh arming."""
    async with socket() as plug:
        plug.believes(order_wh=500)
        await plug.becomes(lambda: plug.simulator.truth().power_w > 1000)
        plug.cable.freeze()
        await plug.becomes(lambda: not plug.engine.live.ports["left"].armed)
        assert plug.session.stage is Stage.DELIVERING
        assert not any(type(effect).__name__ == "Deliver" for effect in plug.engine.owed())


async def test_a_wire_that_swallows_everything_does_not_look_like_a_hang(monkeypatch) -> None:
    """Would catch a watchdog restart because a cable is out: on a slow bus, stopping what is silent outlasts a beat."""
    beats_age_ms: list[int] = []

    async def silent() -> None:
        await asyncio.sleep(0.5)
        raise BridgeError("timeout", "nobody answers")

    async def unanswered() -> None:
        beats_age_ms.append(plug.runner._monotonic_ms() - plug.runner.beat_at_ms)
        await asyncio.Event().wait()

    monkeypatch.setattr(charger_runner, "BLIND_STOP_S", 0.3)
    async with socket() as plug:
        monkeypatch.setattr(plug.charger, "read", silent)
        monkeypatch.setattr(plug.charger, "hold", unanswered)
        await plug.becomes(lambda: len(beats_age_ms) >= 3)  # the stop ends, and is tried again
    assert max(beats_age_ms) < 400  # the failed read was a beat already


async def test_the_owners_reserve_is_not_sold() -> None:
    """Would catch selling the owner's way home: below the reserve power is never offered, however long the consumer waits."""
    async with socket(reserve_permille=200, soc_permille_begin=150) as plug:
        plug.believes()
        await plug.becomes(lambda: plug.session.stage is Stage.AUTHORISED)
        beats_until = plug.runner.beat_at_ms + 2_000
        await plug.becomes(lambda: plug.runner.beat_at_ms > beats_until)
        assert plug.session.stage is Stage.AUTHORISED
        assert plug.simulator.truth().delivered_mwh == 0
