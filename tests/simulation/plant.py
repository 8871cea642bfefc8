"""The charger, its car and its contactor: the physics of `firmware_bridge.simulator.plant` behind the Charger port.

The outlet outlives the agent: when nobody feeds it, its own failsafe timer falls to 0 A, as a real box's does. What it truly
delivered is known to the checkers only; the agent sees a counter that moves in steps (and may lie, for the dishonest provider).
"""

from dataclasses import replace

from firmware_bridge.charger import BridgeError, Identity, Limits, Reading
from firmware_bridge.simulator.plant import Plant, PlantConfig

UJ_PER_MWH = 3_600_000


class Outlet:
    """One charging port and the car at it. `delivered_mwh` is the truth, `power_w_max` what the car draws at most."""

    def __init__(self, now_ms, *, step_mwh=1_000, lies_permille=1_000, shows_contactor=True, config=None):
        self._now_ms = now_ms
        self.plant = Plant(config or PlantConfig(ev_current_ma_max=16_000), now_ms())
        self.step_mwh, self.lies_permille, self.shows_contactor = step_mwh, lies_permille, shows_contactor
        self.limits = Limits(
            current_ma_min=self.plant.config.current_ma_min,
            current_ma_max=self.plant.config.current_ma_max,
            phase_count=self.plant.config.phase_count,
            voltage_mv=self.plant.config.voltage_mv,
            counter_step_mwh=step_mwh,
            poll_interval_ms=1_000,
        )
        # Kept for the checkers: behind an open breaker no car draws what it drew before.
        drawn = self.plant.config
        current_ma = min(drawn.ev_current_ma_max, drawn.current_ma_max)
        self.power_w_max = drawn.phase_count * drawn.voltage_mv * current_ma // 10**6

    def look(self):
        """The physics up to now."""
        self.plant.advance(self._now_ms())
        return self.plant

    @property
    def delivered_mwh(self):
        """The truth, up to now."""
        return self.look().energy_uj // UJ_PER_MWH

    @property
    def register_mwh(self):
        """What the counter shows: whole steps."""
        shown = self.plant.config.register_mwh_begin + self.delivered_mwh * self.lies_permille // 1000
        return shown // self.step_mwh * self.step_mwh

    def weld(self, welded):
        """The contactor sticks (when it is closed), or comes free again."""
        self.look()
        self.plant.config = replace(self.plant.config, contactor_stuck=welded)
        if not welded and not self.plant._pilot_ma:
            self.plant._open_now()

    def plug(self, plugged):
        """The cable."""
        self.plant.plug(plugged, self._now_ms())

    def opens_upstream(self):
        """The external cut-off: no car draws through an open breaker."""
        self.look()
        self.plant.config = replace(self.plant.config, ev_current_ma_max=0)


class SimCharger:
    """The Charger port of one life of the agent (firmware_bridge.charger.Charger)."""

    def __init__(self, outlet, life):
        self.limits = outlet.limits
        self._outlet, self._life = outlet, life
        self._armed = False

    async def _ask(self, name, effect):
        return await self._life.call(f"charger.{name}", effect, self._life.weather.bus)

    async def identify(self):
        """Who answers."""
        return await self._ask("identify", lambda: Identity("simulated", "Simulated", "Plant", "1", "1"))

    async def arm(self, failsafe_timeout_s):
        """Unlock, then the failsafe at 0 A."""

        def effect():
            plant, now_ms = self._outlet.look(), self._outlet._now_ms()
            plant.lock(on=False, now_ms=now_ms)
            plant.arm_failsafe(now_ms, timeout_ms=failsafe_timeout_s * 1000, current_ma=0)
            plant.feed(now_ms)

        self._armed = False
        await self._ask("arm", effect)
        self._armed = True

    async def set_limit(self, *, current_ma=None, power_w=None):
        """Offer power, and feed the failsafe."""

        def effect():
            plant, now_ms = self._outlet.look(), self._outlet._now_ms()
            plant.feed(now_ms)
            plant.set_limit(current_ma, now_ms)
            plant.enable(on=True, now_ms=now_ms)

        if not self._armed:
            raise BridgeError("not_armed", "simulated")
        if current_ma < self.limits.current_ma_min:
            raise BridgeError("limit_out_of_range", "simulated")
        await self._ask("set_limit", effect)

    def _held(self):
        plant, now_ms = self._outlet.look(), self._outlet._now_ms()
        plant.enable(on=False, now_ms=now_ms)
        plant.set_limit(0, now_ms)

    async def hold(self):
        """Stop."""
        await self._ask("hold", self._held)

    async def lock(self):
        """Stop, firmly."""
        self._armed = False
        await self._ask("lock", lambda: self._outlet.look().lock(on=True, now_ms=self._outlet._now_ms()))

    async def cut_off(self):
        """The breaker upstream."""
        await self._ask("cut_off", self._outlet.opens_upstream)

    async def read(self):
        """A look."""

        def effect():
            plant = self._outlet.look()
            return Reading(
                at_ms=self._life_ms(),
                register_mwh=self._outlet.register_mwh,
                power_w=plant.power_w,
                current_ma=plant.current_ma,
                voltage_mv=plant.config.voltage_mv,
                pilot_state=plant.pilot_state,
                contactor_closed=plant.contactor_closed if self._outlet.shows_contactor else None,
                fault=plant.fault or None,
            )

        return await self._ask("read", effect)

    def _life_ms(self):
        return self._life.monotonic_ms()

    async def close(self):
        """Nothing is held."""
