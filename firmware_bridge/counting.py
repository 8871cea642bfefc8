"""The device whose counter bills, and which way round: a charger's own counter, or a separate meter's.

Rules
* Positive power, and a growing register, mean energy from provider to consumer; the map knows which way the device counts, and
  the installer may turn it.
* A register that shows a sentinel is None. Power that is not shown is the one that was shown last: a stop is not seen in what
  is not shown.

May not know: chargers, set points, sessions, the agent.
"""

from __future__ import annotations

from collections.abc import Mapping

from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.device_map import DeviceMap, Value
from firmware_bridge.mapped_device import MappedDevice

HOT = ("register_mwh", "register_import_mwh", "register_export_mwh", "power_w")
WARM = ("current_ma", "voltage_mv")


def check_meter(meter_map: DeviceMap) -> None:
    """Raises MapError for a map that is no meter's, or of one that cannot bill."""
    if meter_map.kind != "meter":
        raise MapError(f"{meter_map.id} is no meter")
    if meter_map.energy.meter_required:
        raise MapError(f"{meter_map.id} has no lifetime counter, so it cannot bill")


def check_direction(device_map: DeviceMap, direction: str | None) -> None:
    """Raises MapError for a direction in which this device does not count. None: as its map says."""
    wanted = direction or device_map.energy.forward
    if device_map.counter(wanted) is None:
        raise MapError(f"{device_map.id} has no {wanted} counter; turn the meter's direction")


class Counting:
    """One device that counts. `direction`: "import", "export", or None as its map says."""

    def __init__(self, device: MappedDevice, direction: str | None) -> None:
        self.device = device
        forward = device.map.energy.forward
        self._counter = device.map.counter(direction or forward)
        self._sign = 1 if direction in (None, forward) else -1
        self._power_w: int | None = None  # as last shown

    @property
    def step_mwh(self) -> int:
        """One step of the counter, as the map says and, once it was read, as the device has it at what it holds now."""
        grain_mwh = 0 if self._counter is None else self.device.grain.get(self._counter.name, 0)
        return max(1, self.device.map.energy.step_mwh, grain_mwh)

    def register_mwh(self, seen: Mapping[str, Value | None]) -> int | None:
        """The counter among these values."""
        told = None if self._counter is None else seen.get(self._counter.name)
        return told if isinstance(told, int) else None

    def power_w_shown(self, seen: Mapping[str, Value | None]) -> int | None:
        """The power among these values, towards the consumer; 0 for a device that measures none."""
        told = seen.get("power_w", 0)
        if not isinstance(told, int):
            return None
        self._power_w = self._sign * told
        return self._power_w

    @property
    def power_w(self) -> int:
        """The power that was shown last. Raises BridgeError `power_unreadable` where none ever was."""
        if self._power_w is None:
            raise BridgeError(
                "power_unreadable",
                f"{self.device.map.id} shows no power; is a meter fitted, and of the type that is set up?",
            )
        return self._power_w
