"""The Charger port: what the rest of the world may ask of a charger, and the Reading it gives back.

Rules
* Integers only; units are in the names. Positive power, and a growing register, mean energy from provider to
  consumer.
* `hold()` is always allowed, always safe, and never raises for "already off".
* Nobody closes the contactor without `arm()` having succeeded first (BRIDGE rule 7).
* A field that the device cannot show is `None`; its device map says so. `None` never means zero.

May not know: sessions, tokens, Ethereum, the agent.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

# The IEC 61851-1 control pilot: A no vehicle, B plugged, C and D drawing, E and F fault.
PilotState = Literal["A", "B", "C", "D", "E", "F"]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who answered: for the log, the commissioning report, the record. Empty where the device is silent."""

    device_map: str
    maker: str = ""
    model: str = ""
    serial: str = ""
    firmware: str = ""


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at the charger (and its meter). Every quantity was read in the same poll, newest possible."""

    at_ms: int  # monotonic milliseconds when the last word of this reading arrived
    register_mwh: int | None  # lifetime counter, provider -> consumer; None: a sentinel just now
    power_w: int
    current_ma: int
    voltage_mv: int  # the configured nominal where neither device nor meter measures it
    pilot_state: PilotState
    contactor_closed: bool | None  # *seen*, not commanded; None where the device shows no contactor
    fault: str | None = None  # a named fault of BRIDGE rule 8 or of the device
    soc_permille: int | None = None  # the provider's battery, where the device shows it

    # Power below this on a device without a contactor signal counts as "nothing flows" (BRIDGE, the port).
    IDLE_W = 50

    @property
    def seen_open(self) -> bool:
        """True when this reading shows that no energy can flow: contactor seen open, and power about zero."""
        idle = abs(self.power_w) <= self.IDLE_W
        if self.contactor_closed is None:
            return idle and self.pilot_state not in ("C", "D")
        return not self.contactor_closed and idle


@dataclass(frozen=True, slots=True)
class Limits:
    """What this charger can be asked for; from its device map and the installer's configuration."""

    current_ma_min: int
    current_ma_max: int
    phase_count: int
    voltage_mv: int
    counter_step_mwh: int  # one step of the energy counter
    poll_interval_ms: int  # the fastest hot poll the device and its wire allow

    def current_ma(self, current_ma: int | None, power_w: int | None) -> int:
        """What was asked for, as a current per phase within what is possible (rounded down). ValueError unless one is given."""
        if (current_ma is None) == (power_w is None):
            raise ValueError("give current_ma or power_w")
        if current_ma is None:
            current_ma = (power_w or 0) * 1_000_000 // (self.voltage_mv * self.phase_count)
        return max(0, min(current_ma, self.current_ma_max))


class BridgeError(Exception):
    """The wire or the device failed; the message says what to do.

    `name` is stable. The wire: `unreachable`, `port_missing`, `port_denied`, `port_locked`, `port_refused`,
    `unplugged`, `timeout`, `wrong_reply`, `exception_N` (the device's own refusal), `bus_busy`, `bus_noisy`,
    `closed`. The device: `wrong_setting`, `model_missing`. The charger: `not_armed`, `failsafe_not_armed`,
    `limit_out_of_range`, `limit_refused`, `hold_not_obeyed`, `cut_off_failed`.
    """

    def __init__(self, name: str, message: str = "") -> None:
        super().__init__(f"{name}: {message}" if message else name)
        self.name = name


class MapError(Exception):
    """A device map (or its use) is wrong; the message names file, key and remedy. A human must act."""


class Charger(Protocol):
    """One charging port of one device. All methods raise `BridgeError` when the wire or the device fails."""

    limits: Limits

    async def identify(self) -> Identity:
        """Ask the device who it is."""

    async def arm(self, failsafe_timeout_s: int) -> None:
        """Arm the device's own communication failsafe at 0 A and read it back; else `failsafe_not_armed`."""

    async def set_limit(self, *, current_ma: int | None = None, power_w: int | None = None) -> None:
        """Offer power: enables the device if needed, writes only on change, and feeds the failsafe."""

    async def hold(self) -> None:
        """Stop: written with priority over every queued request, then read back."""

    async def lock(self) -> None:
        """Disable the port as firmly as the device can (the step after a hold that was not obeyed)."""

    async def cut_off(self) -> None:
        """The last resort: an external cut-off, where the configuration names one. No-op otherwise."""

    async def read(self) -> Reading:
        """Read everything the hot poll covers."""

    async def close(self) -> None:
        """Give the wire back. Never raises."""
