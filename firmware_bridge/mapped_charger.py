"""A Charger made of a device map and a wire, and maybe a separate meter with its own map and wire.

Rules
* `set_limit` is refused until `arm` has written the device's failsafe (0 A) and read it back (BRIDGE rule 7).
  A device that cannot fall back to 0 A is refused unless the configuration names an external cut-off.
* Set points are written on change only (flash wear); what was written counts as unknown after any error on
  the wire.
* The keep-alive is written by `set_limit` and by nothing else: it is the control loop that must be alive, not
  the poll.
* `hold` goes first on the bus and is read back wherever the device shows its set point.
* What the device cannot show is None; what cannot be true is a named fault (`plausibility.py`).

May not know: sessions, tokens, Ethereum, the agent, pymodbus.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import replace

from pydantic import BaseModel, ConfigDict, Field

from firmware_bridge import counting
from firmware_bridge.charger import BridgeError, Charger, Identity, Limits, MapError, PilotState, Reading
from firmware_bridge.counting import Counting, check_direction, check_meter
from firmware_bridge.cut_off import run_cut_off
from firmware_bridge.device_map import PROOFS, DeviceMap, Point, Proof, Value, load_map
from firmware_bridge.mapped_device import MappedDevice
from firmware_bridge.modbus import Bus, Buses, Priority, Timing, parse_wire
from firmware_bridge.plausibility import Bounds, Plausibility

_HOT_OF_BOX = ("pilot_state", "plugged", "contactor_closed", "fault")
_HOT = (*counting.HOT, *_HOT_OF_BOX)
_WARM = (*counting.WARM, "soc_permille")
_WARM_MS = 1_000  # everything that is not hot is read at most once a second (BRIDGE rule 13)
_HOLD_ATTEMPTS = 3
_HOLD_CHECK_MS = 1_000  # a hold that was verified is looked at again this often, not written again
_PILOT_STATES: dict[str, PilotState] = {"A": "A", "B": "B", "C": "C", "D": "D", "E": "E", "F": "F"}


class MeterConfig(BaseModel):
    """A separate meter. `wire` None: on the charger's own bus. `direction` None: as the map says; the
    installer may turn it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    map: str
    wire: str | None = None
    device_id: int | None = Field(default=None, ge=0, le=255)
    direction: str | None = Field(default=None, pattern="^(import|export)$")


class ChargerConfig(BaseModel):
    """Which device, where, and what the installation allows. Times in s, currents in mA per phase."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    map: str
    wire: str
    device_id: int | None = Field(default=None, ge=0, le=255)
    current_ma_max: int = Field(default=32_000, ge=6_000, le=500_000)
    phase_count: int = Field(default=3, ge=1, le=3)
    voltage_mv: int = Field(default=230_000, ge=100_000, le=1_000_000)
    failsafe_timeout_s: int = Field(default=5, ge=1, le=15)
    external_cut_off: str | None = None
    cut_off_command: tuple[str, ...] = ()
    meter: MeterConfig | None = None

    @property
    def power_w_max(self) -> int:
        """What this installation carries at most."""
        return self.current_ma_max * self.voltage_mv * self.phase_count // 1_000_000


# ------------------------------------------------------------------ what may be sold
def unproven(config: ChargerConfig) -> tuple[Proof, ...]:
    """What a commissioning test must have shown before this installation sells (BRIDGE rule 9); empty when
    its maps are confirmed twice. A separate meter's counter takes the place of the charger's. Raises
    MapError for a map that is wrong.
    """
    charger_map, meter_map = _maps(config)
    found = set(charger_map.unproven)
    if meter_map is not None:
        found = (found - {"energy"}) | set(meter_map.unproven)
    return tuple(proof for proof in PROOFS if proof in found)


def _maps(config: ChargerConfig) -> tuple[DeviceMap, DeviceMap | None]:
    return load_map(config.map), load_map(config.meter.map) if config.meter else None


async def open_charger(config: ChargerConfig, buses: Buses | None = None) -> Charger:
    """Load the maps, open the wires, and look once. Nothing is energised.

    `buses`: share one between all ports of a process. Raises MapError (the configuration is wrong) and
    BridgeError (`unreachable`, `port_missing`, `port_denied`, `port_locked`, `timeout`, ...), each saying
    what to do. Whether anything may be *sold* with it is `unproven`'s answer: commissioning opens it too.
    """
    charger_map, meter_map = _maps(config)
    _check_fit(config, charger_map, meter_map)
    buses = buses or Buses()
    leased: list[Bus] = []
    try:
        device = await lease_device(buses, leased, charger_map, config.wire, config.device_id)
        meter = None
        if config.meter is not None and meter_map is not None:
            meter = await lease_device(
                buses, leased, meter_map, config.meter.wire or str(device.bus.wire), config.meter.device_id
            )
            if meter.bus is device.bus and meter.device_id == device.device_id:
                raise MapError(
                    f"charger and meter share {device.bus.wire} and both have device id {meter.device_id}"
                )
        charger = MappedCharger(config, device, meter, buses, leased)
        await charger.look_first()
    except (BridgeError, MapError):
        for bus in leased:
            await buses.release(bus)
        raise
    return charger


async def open_to_stop(config: ChargerConfig, buses: Buses | None = None) -> Charger:
    """The charger alone, for whoever only stops it: nothing is read first, and a meter or a missing failsafe
    cannot keep anybody from stopping.

    Raises MapError for a map that is wrong or no charger's, and BridgeError as `open_charger` does.
    """
    charger_map = load_map(config.map)
    if charger_map.kind != "charger":
        raise MapError(f"{charger_map.id} is a meter; there is nothing to stop in it")
    buses = buses or Buses()
    leased: list[Bus] = []
    device = await lease_device(buses, leased, charger_map, config.wire, config.device_id)
    return MappedCharger(config.model_copy(update={"meter": None}), device, None, buses, leased)


@contextlib.asynccontextmanager
async def device_reader(
    map_name: str, wire: str, device_id: int | None = None
) -> AsyncIterator[Callable[[], Awaitable[dict[str, Value | None]]]]:
    """Opens one device (charger or meter) and gives a function that reads every quantity of it, once a call.
    Nothing is written.

    Raises MapError and BridgeError as `open_charger` does, but asks for no failsafe and no meter.
    """
    device_map = load_map(map_name)
    buses = Buses()
    leased: list[Bus] = []
    try:
        device = await lease_device(buses, leased, device_map, wire, device_id)
        yield lambda: device.read(list(device_map.reads))
    finally:
        for bus in leased:
            await buses.release(bus)


async def read_device(map_name: str, wire: str, device_id: int | None = None) -> dict[str, Value | None]:
    """Every quantity of one device (charger or meter), once, for a human to look at. Nothing is written.

    Raises what `device_reader` raises.
    """
    async with device_reader(map_name, wire, device_id) as read:
        return await read()


async def lease_device(
    buses: Buses, leased: list[Bus], device_map: DeviceMap, wire_text: str, device_id: int | None
) -> MappedDevice:
    """One device on its bus, which is added to `leased`. Raises MapError and BridgeError as `open_charger` does."""
    defaults = device_map.wire
    wire = parse_wire(
        wire_text,
        tcp_port=defaults.tcp_port,
        baud=defaults.baud,
        parity=defaults.parity,
        stop_bits=defaults.stop_bits,
    )
    bus = await buses.lease(
        wire, Timing(defaults.request_timeout_ms, defaults.turnaround_ms, defaults.gap_ms)
    )
    leased.append(bus)
    return MappedDevice(device_map, bus, defaults.device_id if device_id is None else device_id)


def _check_fit(config: ChargerConfig, charger_map: DeviceMap, meter_map: DeviceMap | None) -> None:
    """What cannot work together, before any wire is touched."""
    if charger_map.kind != "charger":
        raise MapError(f"{charger_map.id} is a meter; name it under meter, and a charger as map")
    if meter_map is not None:
        check_meter(meter_map)
    failsafe = charger_map.failsafe
    if (failsafe is None or not failsafe.zero_fallback) and not config.external_cut_off:
        raise MapError(
            f"{charger_map.id} cannot fall back to 0 A by itself when nobody speaks to it; install an "
            "external cut-off (a watchdog contactor) and name it: external_cut_off = ..."
        )
    if charger_map.energy.meter_required and meter_map is None:
        raise MapError(
            f"{charger_map.id} has no counter that bills; add a meter: meter = {{ map = ..., wire = ... }}"
        )
    check_direction(meter_map or charger_map, config.meter.direction if config.meter else None)


class MappedCharger:
    """The Charger port over a device map. Make it with `open_charger`."""

    def __init__(
        self,
        config: ChargerConfig,
        device: MappedDevice,
        meter: MappedDevice | None,
        buses: Buses,
        leased: list[Bus],
    ) -> None:
        self.config = config
        self._device = device
        self._meter = meter
        self._counting = Counting(meter or device, config.meter.direction if config.meter else None)
        self._buses = buses
        self._leased = leased
        self.limits = self._limits()
        self._plausibility = Plausibility(Bounds(config.power_w_max, self.limits.counter_step_mwh))
        self._armed_ms: int | None = None  # the armed failsafe's timeout
        self._written: dict[str, Value] = {}  # set points believed to stand in the device
        self._fed_at_ms = 0
        self._held_since_ms: int | None = self._now_ms()
        self._hold_seen_ms: int | None = None
        self._warm: dict[str, Value | None] = {}
        self._warm_at_ms: int | None = None

    async def look_first(self) -> None:
        """Read once, and learn how fine the counter is at what it holds now."""
        await self.read()
        self.limits = replace(self.limits, counter_step_mwh=self._counting.step_mwh)
        self._plausibility = Plausibility(Bounds(self.config.power_w_max, self.limits.counter_step_mwh))

    @property
    def _relies_on_failsafe(self) -> bool:
        """True when the device's own failsafe is what stops it; otherwise the named cut-off does."""
        failsafe = self._device.map.failsafe
        if failsafe is None or not failsafe.zero_fallback:
            return False
        return not (failsafe.zero_unproven and self.config.external_cut_off)

    @staticmethod
    def _now_ms() -> int:
        return int(asyncio.get_running_loop().time() * 1000)

    def _limits(self) -> Limits:
        limit = self._device.map.commands.get("set_current_ma")
        most = self.config.current_ma_max
        return Limits(
            current_ma_min=limit.low or 0 if limit else 0,
            current_ma_max=most if limit is None or limit.high is None else min(limit.high, most),
            phase_count=self.config.phase_count,
            voltage_mv=self.config.voltage_mv,
            counter_step_mwh=self._counting.step_mwh,
            poll_interval_ms=max(
                self._device.map.wire.poll_interval_ms, self._counting.device.map.wire.poll_interval_ms
            ),
        )

    # -------------------------------------------------------------- who is there
    async def identify(self) -> Identity:
        """Ask the device who it is; words it refuses to say are taken from the map or left empty."""
        said: dict[str, str] = {}
        for name in ("maker", "model", "serial", "firmware"):
            with contextlib.suppress(BridgeError):
                said[name] = str((await self._device.read([name])).get(name) or "")
        device_map = self._device.map
        return Identity(
            device_map.id,
            maker=said.get("maker") or device_map.maker,
            model=said.get("model") or device_map.model,
            serial=said.get("serial", ""),
            firmware=said.get("firmware", ""),
        )

    # -------------------------------------------------------------- arming
    async def arm(self, failsafe_timeout_s: int) -> None:
        """Look that charger and meter are set up as their maps suppose, write what the device needs first,
        then its failsafe at 0 A, and read all of it back.

        A device with an external cut-off instead of a 0 A failsafe is armed by that cut-off's presence.
        Raises BridgeError `wrong_setting`, `failsafe_not_armed`, and whatever the wire raises.
        """
        self._armed_ms = None
        for asked in (self._device, *([self._meter] if self._meter is not None else [])):
            await asked.find_places()
            await asked.check_settings()
        device_map, failsafe = self._device.map, self._device.map.failsafe
        lock = device_map.commands.get("lock")
        if lock is not None:
            await self._write_verified(lock, lock.off)
        for constant in device_map.prepare:
            await self._write_verified(constant.point, constant.value)
        timeout_ms = failsafe_timeout_s * 1000
        if failsafe is not None and self._relies_on_failsafe:
            if failsafe.timeout_ms is not None:
                self._check_timeout(failsafe.timeout_ms, timeout_ms)
            for fallback in failsafe.fallback:
                await self._fall_back_to_zero(fallback)
            if failsafe.timeout_ms is not None:
                await self._write_verified(failsafe.timeout_ms, timeout_ms)
        await self._feed(timeout_ms, force=True)
        self._armed_ms = timeout_ms

    async def _fall_back_to_zero(self, fallback: Point) -> None:
        try:
            await self._write_verified(fallback, 0)
        except BridgeError as exc:
            if not exc.name.startswith("exception_"):
                raise
            raise BridgeError(
                "failsafe_not_armed",
                f"{self._device.map.id} refuses to fall back to 0 ({exc}); install an external cut-off and name "
                "it: external_cut_off = ...",
            ) from exc

    def _check_timeout(self, point: Point, timeout_ms: int) -> None:
        low, high = point.low or 1, point.high or timeout_ms
        if not low <= timeout_ms <= high:
            raise BridgeError(
                "failsafe_not_armed",
                f"{self._device.map.id} takes a failsafe timeout of {low} to {high} ms; "
                "set failsafe_timeout_s accordingly",
            )

    async def _write_verified(self, point: Point, value: Value) -> None:
        """Write on difference, then read back. What cannot be read is only written; what cannot be written
        must be right already.
        """
        if not point.readable:
            await self._device.write(point, value)
            return
        differs = await self._device.differs(point, value)
        if differs is None:
            return
        if point.write_fc is None:
            raise BridgeError(
                "failsafe_not_armed",
                f"{self._device.map.id} {differs}; it must be {value}, and only the device's own menu can set it",
            )
        await self._device.write(point, value)
        differs = await self._device.differs(point, value)
        if differs is not None:
            raise BridgeError(
                "failsafe_not_armed",
                f"{self._device.map.id} {differs} after {value} was written; "
                "is remote control enabled in the device?",
            )

    # -------------------------------------------------------------- offering
    async def set_limit(self, *, current_ma: int | None = None, power_w: int | None = None) -> None:
        """Offer this much, at most what the installation allows; 0 holds. Feeds the failsafe.

        Raises BridgeError `not_armed`, `limit_out_of_range` (below the device's minimum) and the wire's own.
        """
        wanted_ma = self.limits.current_ma(current_ma, power_w)
        if wanted_ma == 0:
            await self.hold()
            return
        if self._armed_ms is None:
            raise BridgeError("not_armed", "arm the charger's failsafe before offering power")
        if wanted_ma < self.limits.current_ma_min:
            raise BridgeError(
                "limit_out_of_range",
                f"{wanted_ma} mA is below the minimum of {self.limits.current_ma_min} mA",
            )
        commands = self._device.map.commands
        if self._now_ms() - self._fed_at_ms > self._armed_ms // 2:
            self._written.clear()  # the failsafe may be about to cut in, and then set points are gone
        try:
            self._held_since_ms = self._hold_seen_ms = None
            await self._feed(self._armed_ms)
            if "set_current_ma" in commands:
                await self._write_changed(commands["set_current_ma"], wanted_ma)
            else:
                await self._write_changed(commands["set_power_w"], self._as_power_w(wanted_ma))
            if "enable" in commands:
                await self._write_changed(commands["enable"], commands["enable"].on)
        except BridgeError:
            self._written.clear()
            raise

    def _as_power_w(self, current_ma: int) -> int:
        power_w = current_ma * self.limits.voltage_mv * self.limits.phase_count // 1_000_000
        point = self._device.map.commands["set_power_w"]
        return min(power_w, point.high if point.high is not None else power_w)

    async def _write_changed(self, point: Point, value: Value) -> None:
        if self._written.get(point.name) == value:
            return
        await self._device.write(point, value)
        self._written[point.name] = value
        differs = await self._device.differs(point, value) if point.readable else None
        if differs is not None:
            raise BridgeError("limit_refused", f"{self._device.map.id} {differs} after {value} was written")

    async def _feed(self, timeout_ms: int, *, force: bool = False) -> None:
        """The keep-alive, at a quarter of the armed time; on devices fed by the set point or by the timeout
        itself, that again.
        """
        failsafe = self._device.map.failsafe
        now_ms = self._now_ms()
        if not force and now_ms - self._fed_at_ms < timeout_ms // 4:
            return
        keep_alive = self._device.map.commands.get("keep_alive")
        if keep_alive is not None:
            await self._device.write(keep_alive, keep_alive.on)
        if failsafe is not None and failsafe.fed_by == "set_point":
            self._written.clear()
        if failsafe is not None and failsafe.fed_by == "timeout" and self._relies_on_failsafe:
            assert failsafe.timeout_ms is not None
            await self._device.write(failsafe.timeout_ms, timeout_ms)
        self._fed_at_ms = now_ms

    # -------------------------------------------------------------- stopping
    async def hold(self) -> None:
        """Stop, first on the bus, verified by read-back where the device shows its set point. Safe at any
        time.

        Raises BridgeError `hold_not_obeyed` when the device keeps showing something else, or the wire's
        error; the caller still has to see the contactor open.
        """
        if self._held_since_ms is None:
            self._held_since_ms = self._now_ms()
        if self._hold_seen_ms is not None and self._now_ms() - self._hold_seen_ms < _HOLD_CHECK_MS:
            return
        failsafe = self._device.map.failsafe
        if failsafe is not None and failsafe.fed_by == "set_point":
            self._hold_seen_ms = None  # a set point that expires is written again, also when it is 0
        self._written.clear()
        stops = self._stops()
        if self._hold_seen_ms is not None and not any(point.readable for point, _ in stops):
            self._hold_seen_ms = self._now_ms()
            return  # acknowledged before, and nothing to look at: do not write again and again
        await self._stop_until_seen(stops)
        self._hold_seen_ms = self._now_ms()

    def _stops(self) -> list[tuple[Point, int]]:
        """What has to be written to stop: the switch first, then the limit at 0."""
        commands = self._device.map.commands
        stops = [(commands["enable"], commands["enable"].off)] if "enable" in commands else []
        limits = [commands[name] for name in ("set_current_ma", "set_power_w") if name in commands]
        return stops + [(point, 0) for point in limits if point.zero_stops]

    async def _stop_until_seen(self, stops: Sequence[tuple[Point, int]]) -> None:
        """Write and read back, a few times; one that fails does not keep the others from being written."""
        error: BridgeError | None = None
        # It stood at 0 a second ago: look before writing (flash wear).
        looked_first = self._hold_seen_ms is not None
        for attempt in range(_HOLD_ATTEMPTS):
            error = None
            for point, value in stops:
                try:
                    await self._stop_one(point, value, look_first=looked_first or attempt > 0)
                except BridgeError as exc:
                    error = error or exc
            if error is None:
                return
        self._hold_seen_ms = None
        assert error is not None
        raise error

    async def _stop_one(self, point: Point, value: int, *, look_first: bool) -> None:
        if look_first and point.readable and await self._device.differs(point, value, Priority.STOP) is None:
            return
        await self._device.write(point, value, Priority.STOP)
        differs = await self._device.differs(point, value, Priority.STOP) if point.readable else None
        if differs is not None:
            raise BridgeError("hold_not_obeyed", f"{self._device.map.id} still {differs}")

    async def lock(self) -> None:
        """Disable the port as firmly as the device can; the next `arm` unlocks it."""
        self._armed_ms = None
        lock = self._device.map.commands.get("lock")
        error: BridgeError | None = None
        if lock is not None:
            try:
                await self._stop_one(lock, lock.on, look_first=False)
            except BridgeError as exc:
                error = exc
        self._hold_seen_ms = None
        await self.hold()
        if error is not None:
            raise error

    async def cut_off(self) -> None:
        """Run the configured cut-off command (a program that opens an external contactor). No-op where none
        is configured.

        Raises BridgeError `cut_off_failed` when the program is missing, fails, or takes longer than 5 s.
        """
        await run_cut_off(self.config.external_cut_off, self.config.cut_off_command)

    # -------------------------------------------------------------- looking
    async def read(self) -> Reading:
        """One look: hot quantities now, the others at most a second old. Power and register come from the
        meter if there is one.
        """
        hot = await self._device.read(_HOT if self._meter is None else _HOT_OF_BOX)
        if self._meter is not None:
            hot.update(await self._meter.read(counting.HOT))
        await self._read_warm()
        at_ms = self._now_ms()
        return self._reading(at_ms, {**self._warm, **hot})

    async def _read_warm(self) -> None:
        now_ms = self._now_ms()
        if self._warm_at_ms is not None and now_ms - self._warm_at_ms < _WARM_MS:
            return
        warm = await self._device.read(_WARM)
        if self._meter is not None:
            warm |= await self._meter.read(_WARM)
        await self._check_set_points()
        self._warm, self._warm_at_ms = warm, now_ms

    async def _check_set_points(self) -> None:
        """Forget a set point that the device no longer holds (failsafe, reboot, a second master): it is
        written anew.
        """
        commands = self._device.map.commands
        for name in [name for name in self._written if commands[name].readable]:
            if await self._device.differs(commands[name], self._written[name], Priority.POLL) is not None:
                del self._written[name]

    def _reading(self, at_ms: int, seen: Mapping[str, Value | None]) -> Reading:
        register_mwh = self._counting.register_mwh(seen)
        power_w = self._counting.power_w_shown(seen)
        pilot = seen.get("pilot_state")
        contactor = seen.get("contactor_closed")
        own_fault = seen.get("fault")
        implausible = self._plausibility.judge(at_ms, register_mwh, power_w, self._held_since_ms)
        return Reading(
            at_ms=at_ms,
            register_mwh=register_mwh,
            power_w=self._counting.power_w,
            current_ma=_number(seen.get("current_ma"), 0),
            voltage_mv=_number(seen.get("voltage_mv"), self.limits.voltage_mv),
            pilot_state="A" if seen.get("plugged") is False else _pilot(pilot),
            contactor_closed=contactor if isinstance(contactor, bool) else None,
            fault=implausible or (own_fault if isinstance(own_fault, str) and own_fault else None),
            soc_permille=soc if isinstance(soc := seen.get("soc_permille"), int) else None,
        )

    async def close(self) -> None:
        """Give the wires back. Never raises."""
        while self._leased:
            await self._buses.release(self._leased.pop())


def _number(value: Value | None, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else otherwise


def _pilot(value: Value | None) -> PilotState:
    """A state the map does not list is a fault of the device as far as anybody above is concerned: F."""
    return _PILOT_STATES.get(str(value), "F")
