"""Owed Deliver/Hold becomes a set point every beat; readings feed Live; meter records get signed.

The one place where core and bridge meet.

Rules
* One beat: read, report, ask what is owed now, act. The failsafe is fed only by acting on a fresh `Deliver`: if this loop hangs,
  or the engine stops owing power, the charger falls to 0 A by itself.
* Before the first beat, and after every lost wire, the charger is held and its failsafe armed and read back (rules 2, 9).
* When to taper and stop inside an order is `firmware_bridge.stopping`'s decision; whether to deliver at all is the core's.
* A stop that is not seen obeyed is repeated more firmly (rule 8): the core says how firmly, this runner says for how long.

May not know: Ethereum, the consumer, other ports.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Protocol

import structlog

from agent.core import events as ev
from agent.core import record
from agent.core.effects import Deliver, Firmness, Hold, SignMeterRecord
from agent.core.live import PortLost, PortRead, PortReading
from agent.engine import Engine
from firmware_bridge.charger import BridgeError, Charger, Reading
from firmware_bridge.stopping import Plan, StopModel, StopPlanner

RECONNECT_S = (0.2, 2.0)  # first and longest wait after a wire error: short, because power may be flowing
BLIND_STOP_S = 6.0  # every stop is tried twice by then; a longer turn would look like a hang to systemd
NO_PLAN = Plan(current_ma=0, stop_at_ms=None, reached=False)
LATE_BEATS_MAX = 3  # a beat this late starts a new schedule instead of hurrying after the old one

log = structlog.get_logger(__name__)


class MeterSigner(Protocol):
    """The meter key, as keys.py hands it out."""

    def sign_sha256(self, payload: bytes) -> bytes:
        """DER signature over SHA-256 of the payload."""

    @property
    def public_key_spki(self) -> bytes:
        """Its public key as DER SubjectPublicKeyInfo."""


class ChargerRunner:
    """Drives one charging port."""

    def __init__(  # noqa: PLR0913 - everything this port is made of
        self,
        engine: Engine,
        port: str,
        charger: Charger,
        *,
        failsafe_timeout_s: int,
        beat_interval_ms: int | None = None,
        beat_turn: tuple[int, int] = (0, 1),
        stop_model: StopModel,
        meter: record.MeterIdentity,
        meter_signer: MeterSigner,
        monotonic_ms: Callable[[], int],
    ) -> None:
        self._engine, self.port, self._charger = engine, port, charger
        self._failsafe_timeout_s = failsafe_timeout_s
        # Never faster than the device and its wire allow.
        self._beat_interval_ms = max(charger.limits.poll_interval_ms, beat_interval_ms or 0)
        # Which of how many ports: they beat one after the other, not all in one instant.
        self._beat_turn = beat_turn
        self._meter, self._meter_signer, self._monotonic_ms = meter, meter_signer, monotonic_ms
        self._stop_model = stop_model
        self._planner = StopPlanner(charger.limits, stop_model)
        self._plan = NO_PLAN
        self._armed = False
        self._offering = False
        self._seen_open = True  # as the newest reading saw it
        self._held_since_ms: int | None = None  # since when a stop is commanded and not seen obeyed
        self.beat_at_ms = (
            monotonic_ms()
        )  # the newest complete beat, or handled wire error: the watchdog looks at this

    async def run(self) -> None:
        """For ever: beat. A wire error ends the beat, never the loop."""
        wait_s = RECONNECT_S[0]
        interval_s = self._beat_interval_ms / 1000
        loop = asyncio.get_running_loop()
        turn, ports = self._beat_turn
        next_s = loop.time() + interval_s * turn / ports  # after the first beat, which waits for nobody
        while True:
            try:
                await self._beat()
                wait_s = RECONNECT_S[0]
            except BridgeError as error:
                log.warning("charger.lost", port=self.port, error=str(error))
                self._armed = self._offering = False
                self._engine.observe(PortLost(self.port, self._unobeyed_ms()))
                self.beat_at_ms = self._monotonic_ms()  # the stop below takes as long again
                await self._stop_blind()
                self.beat_at_ms = self._monotonic_ms()
                await asyncio.sleep(wait_s)
                wait_s = min(wait_s * 2, RECONNECT_S[1])
            next_s = max(next_s + interval_s, loop.time() - LATE_BEATS_MAX * interval_s)
            await asyncio.sleep(max(0.0, min(next_s, self._stop_at_s(loop)) - loop.time()))

    def _stop_at_s(self, loop: asyncio.AbstractEventLoop) -> float:
        """When the stop schedule wants to act, on the loop's clock: it does not wait for the poll grid."""
        if self._plan.stop_at_ms is None:
            return float("inf")
        return loop.time() + (self._plan.stop_at_ms - self._monotonic_ms()) / 1000

    async def _beat(self) -> None:
        if self._plan.stop_at_ms is not None and self._monotonic_ms() >= self._plan.stop_at_ms:
            await (
                self._act()
            )  # the scheduled stop goes before the reading: a reading takes up to 0.1 s on a serial line
        reading = await self._charger.read()
        self._planner.observe(reading)
        if not self._armed and self._may_arm():
            await self._charger.arm(self._failsafe_timeout_s)
            self._armed = True
            # The first reading may show the failsafe as tripped, by our own absence: arming has just ended that.
            reading = await self._charger.read()
            self._planner.observe(reading)
        self._report(reading)
        self._sign_records()
        await self._act()
        self.beat_at_ms = self._monotonic_ms()

    def _may_arm(self) -> bool:
        """Arming also unlocks the device, so a port that is locked out, or still being stopped firmly, stays unarmed."""
        effect = self._owed()
        return not (isinstance(effect, Hold) and effect.firmness is not Firmness.HOLD)

    def _owed(self) -> Deliver | Hold:
        for effect in self._engine.owed():
            if isinstance(effect, Deliver | Hold) and effect.port == self.port:
                return effect
        raise AssertionError(f"nothing owed on {self.port}")

    async def _act(self) -> None:
        effect = self._owed()
        match effect:
            case Deliver() if self._armed:
                await self._deliver(effect)
            case Hold(firmness=firmness):
                self._plan, self._planner = NO_PLAN, StopPlanner(self._charger.limits, self._stop_model)
                await self._stop(firmness)
            case _:
                await self._stop(Firmness.HOLD)

    async def _deliver(self, effect: Deliver) -> None:
        limits = self._charger.limits
        self._plan = self._planner.plan(self._monotonic_ms(), effect.register_mwh_stop, limits.current_ma_max)
        if self._plan.current_ma == 0:
            await self._stop(Firmness.HOLD)
            return
        if (
            not self._offering
        ):  # the box may have been switched off and on since we armed it: look before power flows
            await self._charger.arm(self._failsafe_timeout_s)
            self._offering = True
        self._held_since_ms = None
        await self._charger.set_limit(current_ma=self._plan.current_ma)

    async def _stop(self, firmness: Firmness) -> None:
        self._offering = False
        if self._held_since_ms is None:
            self._held_since_ms = self._monotonic_ms()
        try:
            await self._charger.hold()
        except BridgeError as error:
            if error.name != "hold_not_obeyed":
                raise
            # Go on reading: held_ms grows, and the core then asks for more firmness.
            log.warning("charger.hold_not_obeyed", port=self.port, error=str(error))
        if firmness is Firmness.HOLD:
            return
        self._armed = False
        await self._charger.lock()
        if firmness is Firmness.CUT_OFF:
            log.error("charger.cut_off", port=self.port)
            await self._charger.cut_off()

    async def _stop_blind(self) -> None:
        """Nothing can be read: stop all the same. When power was last seen flowing, an external cut-off needs no wire."""
        effect = self._owed()
        firmness = effect.firmness if isinstance(effect, Hold) else Firmness.HOLD
        try:
            async with asyncio.timeout(BLIND_STOP_S):
                await self._stop(firmness)
        except (BridgeError, TimeoutError) as error:
            log.warning("charger.hold_unconfirmed", port=self.port, error=str(error) or "no answer in time")
            if firmness is Firmness.CUT_OFF:
                await self._cut_off_blind()

    async def _cut_off_blind(self) -> None:
        log.error("charger.cut_off", port=self.port)
        try:
            await self._charger.cut_off()
        except BridgeError as error:
            log.exception("charger.cut_off_failed", port=self.port, error=str(error))

    def _unobeyed_ms(self) -> int:
        """For how long a stop is commanded and not seen obeyed; 0 once it was seen open."""
        if self._held_since_ms is None or self._seen_open:
            return 0
        return self._monotonic_ms() - self._held_since_ms

    def _report(self, reading: Reading) -> None:
        self._seen_open = reading.seen_open
        if reading.seen_open and self._held_since_ms is not None:
            self._held_since_ms = self._monotonic_ms()  # obeyed; from now on any flow counts anew
        self._engine.observe(
            PortRead(
                self.port,
                _core_reading(reading),
                armed=self._armed,
                at_target=self._plan.reached,
                held_ms=self._unobeyed_ms(),
            )
        )

    def _sign_records(self) -> None:
        for effect in self._engine.owed():
            if isinstance(effect, SignMeterRecord):
                session = self._engine.book.sessions[effect.session_id]
                if session.port != self.port:
                    continue
                payload = record.payload(session, effect.moment, effect.pagination, self._meter)
                signed = record.record(payload, self._meter_signer.sign_sha256(payload.encode()))
                self._engine.accept(
                    ev.MeterRecordSigned(
                        self._engine.at_s,
                        effect.session_id,
                        effect.moment,
                        signed,
                        self._meter_signer.public_key_spki,
                    )
                )
                return  # one per beat: the next one's pagination depends on this one


def _core_reading(reading: Reading) -> PortReading:
    return PortReading(
        at_ms=reading.at_ms,
        register_mwh=reading.register_mwh,
        power_w=reading.power_w,
        pilot_state=reading.pilot_state,
        seen_open=reading.seen_open,
        fault=reading.fault,
        soc_permille=reading.soc_permille,
        current_ma=reading.current_ma,
        voltage_mv=reading.voltage_mv,
    )
