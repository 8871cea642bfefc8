"""A charger that is no Modbus device, with a Modbus meter beside it: the meter's counter bills, the charger obeys.

Rules
* Power, register, volts and amperes are the meter's; plug, contactor and the device's own faults are the charger's.
* The charger is looked at first: a reading is as old as its newest word, and the counter is what is billed.
* The meter is judged here (`plausibility.py`); what the charger counts beside it is nobody's bill.
* Stopping needs no meter: `hold`, `lock` and `cut_off` go to the charger alone.

May not know: RAPI, sessions, the agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace

from firmware_bridge import counting
from firmware_bridge.charger import BridgeError, Charger, Identity, MapError, Reading
from firmware_bridge.counting import Counting, check_direction, check_meter
from firmware_bridge.device_map import Value, load_map
from firmware_bridge.mapped_charger import ChargerConfig, MeterConfig, lease_device
from firmware_bridge.modbus import Bus, Buses
from firmware_bridge.plausibility import Bounds, Plausibility

_WARM_MS = 1_000  # BRIDGE rule 13


def check_beside(config: MeterConfig) -> None:
    """What cannot work, before any wire is touched. Raises MapError."""
    meter_map = load_map(config.map)
    check_meter(meter_map)
    check_direction(meter_map, config.direction)
    if config.wire is None:
        raise MapError(
            "the charger's own wire carries no Modbus, so its meter needs another: add wire = to the meter"
        )


async def beside(charger: Charger, config: ChargerConfig, buses: Buses) -> MeteredCharger:
    """The charger with the meter of its configuration, looked at once. Closes the charger when that fails.

    Raises MapError and BridgeError, each saying what to do.
    """
    assert config.meter is not None
    leased: list[Bus] = []
    try:
        check_beside(config.meter)
        device = await lease_device(
            buses, leased, load_map(config.meter.map), str(config.meter.wire), config.meter.device_id
        )
        metered = MeteredCharger(charger, Counting(device, config.meter.direction), config, buses, leased)
        await metered.look_first()
    except (BridgeError, MapError):
        await charger.close()
        for bus in leased:
            await buses.release(bus)
        raise
    return metered


class MeteredCharger:
    """The Charger port over a charger and a meter. Make it with `beside`."""

    def __init__(
        self, charger: Charger, meter: Counting, config: ChargerConfig, buses: Buses, leased: list[Bus]
    ) -> None:
        self._charger, self._meter = charger, meter
        self._power_w_max = config.power_w_max
        self._buses, self._leased = buses, leased
        self._warm: Mapping[str, Value | None] = {}
        self._warm_at_ms: int | None = None
        self._held_since_ms: int | None = self._now_ms()
        self._bound()

    def _bound(self) -> None:
        """What the two can do together; the meter's counter may be coarser than its map says, once it was read."""
        slowest_ms = max(self._charger.limits.poll_interval_ms, self._meter.device.map.wire.poll_interval_ms)
        step_mwh = self._meter.step_mwh
        self.limits = replace(self._charger.limits, counter_step_mwh=step_mwh, poll_interval_ms=slowest_ms)
        self._plausibility = Plausibility(Bounds(self._power_w_max, step_mwh))

    async def look_first(self) -> None:
        """Read once, and learn how fine the counter is at what it holds now."""
        await self.read()
        self._bound()

    @staticmethod
    def _now_ms() -> int:
        return int(asyncio.get_running_loop().time() * 1000)

    # -------------------------------------------------------------- the charger's
    async def identify(self) -> Identity:
        """Ask the charger who it is."""
        return await self._charger.identify()

    async def arm(self, failsafe_timeout_s: int) -> None:
        """Look that the meter is set up as its map supposes, then arm the charger. Raises BridgeError `wrong_setting` too."""
        await self._meter.device.find_places()
        await self._meter.device.check_settings()
        await self._charger.arm(failsafe_timeout_s)

    async def set_limit(self, *, current_ma: int | None = None, power_w: int | None = None) -> None:
        """Offer power; 0 holds."""
        if self.limits.current_ma(current_ma, power_w) == 0:
            await self.hold()
            return
        self._held_since_ms = None
        await self._charger.set_limit(current_ma=current_ma, power_w=power_w)

    def _held(self) -> None:
        if self._held_since_ms is None:
            self._held_since_ms = self._now_ms()

    async def hold(self) -> None:
        """Stop, seen in the charger."""
        self._held()
        await self._charger.hold()

    async def lock(self) -> None:
        """Disable the charger as firmly as it can."""
        self._held()
        await self._charger.lock()

    async def cut_off(self) -> None:
        """The last resort: the external cut-off."""
        await self._charger.cut_off()

    # -------------------------------------------------------------- the meter's
    async def read(self) -> Reading:
        """One look at both. Raises BridgeError of either wire, and `power_unreadable`."""
        shown = await self._charger.read()
        meter = self._meter
        now_ms = self._now_ms()
        if self._warm_at_ms is None or now_ms - self._warm_at_ms >= _WARM_MS:
            self._warm, self._warm_at_ms = await meter.device.read(counting.WARM), now_ms
        seen = await meter.device.read(counting.HOT)
        at_ms = self._now_ms()
        register_mwh, power_w = meter.register_mwh(seen), meter.power_w_shown(seen)
        implausible = self._plausibility.judge(at_ms, register_mwh, power_w, self._held_since_ms)
        current_ma, voltage_mv = self._warm.get("current_ma"), self._warm.get("voltage_mv")
        return replace(
            shown,
            at_ms=at_ms,
            register_mwh=register_mwh,
            power_w=meter.power_w,
            current_ma=current_ma if isinstance(current_ma, int) else max(0, shown.current_ma),
            voltage_mv=voltage_mv if isinstance(voltage_mv, int) else shown.voltage_mv,
            fault=implausible or shown.fault,
        )

    async def close(self) -> None:
        """Give both wires back. Never raises."""
        await self._charger.close()
        while self._leased:
            await self._buses.release(self._leased.pop())
