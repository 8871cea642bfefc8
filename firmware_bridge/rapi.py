"""OpenEVSE over its plain serial protocol RAPI: a Charger, with its own line class that checks before it believes.

Rules (BRIDGE rules 6 and 7)
* Every command carries a sequence number and a checksum; a reply counts only with the same number and a right checksum. So a
  late reply, an echo and an unasked `$AT` are recognised, and the line needs no silence after a time-out: a STOP goes at once.
* A STOP (`$FS`, firmly `$FD`) is a write, then a look (`$GS`), a few times. Set points are volatile (`$SC n V`: no EEPROM wear)
  and written on change only. Nothing else is ever repeated blindly.
* The box cannot fall back to 0 A: its heartbeat (`$SY`) throttles to 6 A. So the configuration must name an external cut-off, and
  two outer bounds run along: the energy limit (`$SH`, whole kWh) and the time limit (`$S3`, quarters of an hour) always end a
  little ahead of what has flowed. Whoever goes silent leaves at most 1.2 kWh or 20 minutes at 6 A behind.
* A separate meter may count instead (`metered_charger.py`); then nothing the box measures is believed.
* The lifetime counter is made of two of the box's: all finished plug-ins plus whole Wh of this one. It is read between two looks
  at the plug, because the box adds one to the other when the cable is pulled.

Facts: the protocol's description of the OpenEVSE firmware 8.2.3 (RAPI 5.2.1); see devices.yaml `openevse_rapi`.
May not know: Modbus, sessions, tokens, Ethereum, the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import termios
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import xor
from urllib.parse import urlsplit

import serial

from firmware_bridge.charger import BridgeError, Identity, Limits, MapError, PilotState, Reading
from firmware_bridge.cut_off import run_cut_off
from firmware_bridge.device_map import Value
from firmware_bridge.mapped_charger import ChargerConfig
from firmware_bridge.plausibility import Bounds, Plausibility
from firmware_bridge.ports import why_closed

MAP = (
    "openevse_rapi"  # what `map = ` says in the configuration; the protocol is this file, so there is no TOML
)
BAUD = 115_200
REPLY_S = 0.4  # the controller answers between two of its loops, within some 50 ms
LINE_BYTES_MAX = 96  # the longest reply has 50 characters; a line without an end must not fill the memory
NEWS_MAX = 16
_SILENT_MAX = 2  # unanswered commands before the port is closed and opened anew (an adapter that hangs)
_READ_ATTEMPTS = 2
_HOLD_ATTEMPTS = 3
_LOOK_MS = 1_000  # what is not hot, and a stop that was verified, is looked at once a second
_POLL_MS = 250  # four commands a reading, on a controller that is busy with other things
COUNTER_STEP_MWH = 1_000
FALLBACK_A = 6  # the least the heartbeat falls back to: less is clamped to it
HEARTBEAT_S_MAX = 60  # above 65 s the firmware's milliseconds overflow on 16-bit controllers
_ACTIVE_MISS = 2  # the heartbeat's trigger: a beat was missed, and nobody has acknowledged it
_ENERGY_MARGIN_WH, _TIME_MARGIN_S, _LIMIT_MAX = 200, 300, 255

SLEEPING, DISABLED = 0xFE, 0xFF
RELAY_CLOSED, EV_CONNECTED = 0x0040, 0x0100
_PILOTS: dict[int, PilotState] = {1: "A", 2: "B", 3: "C", 4: "D"}
FAULTS = {
    0x05: "diode_check",
    0x06: "ground_fault",
    0x07: "no_ground",
    0x08: "contactor_stuck",
    0x09: "ground_fault_self_test",
    0x0A: "over_temperature",
    0x0B: "over_current",
    0x0E: "relay_closure",
}


# ------------------------------------------------------------------ frames; pure
@dataclass(frozen=True, slots=True)
class Reply:
    """An answer: `$OK` or `$NK`, its words, and the number of the command it answers (None: it carries none)."""

    ok: bool
    words: tuple[str, ...]
    sequence: int | None


@dataclass(frozen=True, slots=True)
class News:
    """What the box says unasked: `AB` boot, `AT` state, `AN` button, `WF` network mode."""

    name: str
    words: tuple[str, ...]


def frame(command: str, sequence: int) -> bytes:
    """`("SC 16 V", 7)` -> `$SC 16 V :07^XX` and a carriage return; XX is the XOR of everything before `^`."""
    assert 1 <= sequence <= 0xFF, "00 is reserved"
    body = f"${command} :{sequence:02X}"
    return f"{body}^{_xor(body):02X}\r".encode("ascii")


def parse(line: bytes) -> Reply | News | None:
    """What this line (without its end) says; None for an echo, noise, and an absent or wrong checksum (`^` XOR, `*` sum)."""
    try:
        text = line[line.rindex(b"$") :].decode("ascii")
    except ValueError:
        return None  # no start, or no ASCII
    found = re.fullmatch(r"(\$[A-Z][A-Z0-9](?: +[^ *^]+)*) *([\^*])([0-9A-Fa-f]{2})", text)
    if found is None:
        return None
    body, kind, told = text[: found.start(2)], found[2], int(found[3], 16)
    if told != (_xor(body) if kind == "^" else sum(body.encode()) & 0xFF):
        return None
    name, *words = body[1:].split()
    if name not in ("OK", "NK"):
        return News(name, tuple(words)) if name in ("AB", "AT", "AN", "WF") else None
    sequence = None
    if words and re.fullmatch(r":[0-9A-Fa-f]{2}", words[-1]):
        sequence = int(words.pop()[1:], 16)
    return Reply(name == "OK", tuple(words), sequence)


def _xor(text: str) -> int:
    return reduce(xor, text.encode("ascii"), 0)


def outer_bounds(session_wh: int, elapsed_s: int) -> tuple[int, int]:
    """(kWh for `$SH`, quarters of an hour for `$S3`) that end 0.2 to 1.2 kWh and 5 to 20 minutes from here."""
    kwh = (session_wh + _ENERGY_MARGIN_WH) // 1000 + 1
    quarters = (elapsed_s + _TIME_MARGIN_S) // 900 + 1
    return min(kwh, _LIMIT_MAX), min(quarters, _LIMIT_MAX)


def parse_wire(text: str) -> str:
    """`rapi:///dev/...` -> the port's path; MapError otherwise."""
    parts = urlsplit(text)
    if parts.scheme == "rapi" and not parts.netloc and parts.path.startswith("/") and not parts.query:
        return parts.path
    raise MapError(f"wire = {text!r} is not understood; write rapi:///dev/serial/by-id/NAME")


# ------------------------------------------------------------------ the line
class RapiLine:
    """One serial port with one OpenEVSE at its end, one command at a time. Raises BridgeError: `port_missing`, `port_denied`,
    `port_locked`, `port_refused`, `unreachable`, `unplugged`, `timeout`, `closed`.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.rejected = 0  # lines that were not believed, and replies to something else
        self.news: deque[News] = deque(maxlen=NEWS_MAX)
        self.boots = 0
        self._port: serial.Serial | None = None
        self._turn = asyncio.Lock()
        self._pending = bytearray()
        self._sequence = 0
        self._waiting: tuple[int, asyncio.Future[Reply]] | None = None
        self._unanswered = 0
        self._closed = False

    def open(self) -> None:
        """Open the port now, so that a wrong path or a missing permission is known before anything depends on it."""
        if self._port is not None:
            return
        try:
            port = serial.Serial(self.path, BAUD, timeout=0, write_timeout=0, exclusive=True)
        except (OSError, termios.error, ValueError) as exc:  # SerialException is an OSError
            raise why_closed(self.path, exc) from exc
        self._port = port
        self._pending.clear()
        self._unanswered = 0
        asyncio.get_running_loop().add_reader(port.fileno(), self._heard)

    async def ask(self, command: str) -> Reply:
        """Send one command and wait for its own answer, at most REPLY_S (and as long again for a command before it)."""
        async with self._turn:
            if self._closed:
                raise BridgeError("closed", f"{self.path} was closed")
            self.open()
            port = self._port
            assert port is not None
            self._sequence = self._sequence % 0xFF + 1
            answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
            self._waiting = (self._sequence, answer)
            try:
                port.write(frame(command, self._sequence))
                async with asyncio.timeout(REPLY_S):
                    reply = await answer
            except TimeoutError:
                self._unanswered += 1
                if self._unanswered >= _SILENT_MAX:
                    self._drop()
                raise BridgeError("timeout", self._timeout_meaning(command)) from None
            except (
                OSError,
                termios.error,
                TypeError,
            ) as exc:  # TypeError: pyserial's word for "closed meanwhile"
                self._drop()
                raise BridgeError("unplugged", f"{self.path} went away: {exc}") from exc
            finally:
                self._waiting = None
            self._unanswered = 0
            return reply

    def _timeout_meaning(self, command: str) -> str:
        return f"{self.path} did not answer ${command} within {REPLY_S} s; is it an OpenEVSE at {BAUD} baud?"

    def _heard(self) -> None:
        port = self._port
        if port is None:
            return
        try:
            self._pending += port.read(4096)
        except (OSError, termios.error, TypeError) as exc:
            self._drop()
            if self._waiting is not None and not self._waiting[1].done():
                self._waiting[1].set_exception(OSError(str(exc)))
            return
        *lines, rest = bytes(self._pending).split(b"\r")
        self._pending[:] = rest[-LINE_BYTES_MAX:]
        for line in lines:
            self._judge(line[-LINE_BYTES_MAX:])

    def _judge(self, line: bytes) -> None:
        message = parse(line)
        if isinstance(message, News):
            self.news.append(message)
            self.boots += message.name == "AB"
        elif message is not None and self._waiting is not None and message.sequence == self._waiting[0]:
            if not self._waiting[1].done():
                self._waiting[1].set_result(message)
        else:
            self.rejected += 1

    def _drop(self) -> None:
        port, self._port = self._port, None
        if port is None:
            return
        with contextlib.suppress(OSError, termios.error, TypeError, ValueError):
            asyncio.get_running_loop().remove_reader(port.fileno())
        with contextlib.suppress(OSError, termios.error):
            port.close()

    def close(self) -> None:
        """Give the port back. Never raises."""
        self._closed = True
        self._drop()


# ------------------------------------------------------------------ the charger
@dataclass(frozen=True, slots=True)
class State:
    """`$GS`: the box's state, seconds of this charge, the pilot's own state, and flags."""

    evse: int
    elapsed_s: int
    pilot: int
    flags: int

    @property
    def is_off(self) -> bool:
        """Asleep, disabled, or in a fault that keeps the relay open: it will not begin by itself."""
        return self.evse in (SLEEPING, DISABLED) or (self.evse in FAULTS and not self.flags & RELAY_CLOSED)

    @property
    def pilot_state(self) -> PilotState:
        """IEC 61851; a sleeping box shows the plug, a disabled one F, one with a fault E."""
        if self.evse == DISABLED:
            return "F"
        if self.evse == SLEEPING:
            return "B" if self.flags & EV_CONNECTED else "A"
        return _PILOTS.get(self.evse, "E")


def _check_fit(config: ChargerConfig) -> None:
    """What cannot work, before any wire is touched (as `mapped_charger.open_charger` does it for Modbus)."""
    if config.map != MAP:
        raise MapError(f'a rapi:// wire speaks to an OpenEVSE: write map = "{MAP}", not {config.map!r}')
    if not config.external_cut_off:
        raise MapError(
            f"{MAP} cannot fall back to 0 A by itself when nobody speaks to it (its heartbeat throttles to "
            f"{FALLBACK_A} A); install an external cut-off (a watchdog contactor) and name it: external_cut_off = ..."
        )
    if config.failsafe_timeout_s > HEARTBEAT_S_MAX:
        raise MapError(f"{MAP} takes a failsafe_timeout_s of at most {HEARTBEAT_S_MAX}")


async def open_rapi(config: ChargerConfig, *, to_stop: bool = False) -> RapiCharger:
    """Open the port and look once; nothing is energised. `to_stop`: for whoever only stops it, ask for nothing first.

    Raises MapError (the configuration is wrong) and BridgeError, each saying what to do.
    """
    path = parse_wire(config.wire)
    if not to_stop:
        _check_fit(config)
    charger = RapiCharger(config, RapiLine(path))
    try:
        charger.line.open()
        if not to_stop:
            await charger.look_at_limits()
            await charger.read()
    except (BridgeError, MapError):
        await charger.close()
        raise
    return charger


async def read_box(wire: str) -> dict[str, Value | None]:
    """Everything the box shows, once, in the words of the device maps. Nothing is written; raises MapError and BridgeError."""
    config = ChargerConfig(map=MAP, wire=wire, phase_count=1)
    charger = await open_rapi(config, to_stop=True)
    try:
        identity, reading = await charger.identify(), await charger.read()
    finally:
        await charger.close()
    return {
        "register_mwh": reading.register_mwh,
        "power_w": reading.power_w,
        "current_ma": reading.current_ma,
        "voltage_mv": reading.voltage_mv,
        "pilot_state": reading.pilot_state,
        "contactor_closed": reading.contactor_closed,
        "fault": reading.fault or "",
        "maker": identity.maker,
        "model": identity.model,
        "serial": identity.serial,
        "firmware": identity.firmware,
    }


class RapiCharger:
    """The Charger port over RAPI. Make it with `open_rapi`."""

    def __init__(self, config: ChargerConfig, line: RapiLine) -> None:
        self.config = config
        self.line = line
        self.limits = self._limits(FALLBACK_A * 1000, config.current_ma_max)
        self._plausibility = Plausibility(Bounds(config.power_w_max, COUNTER_STEP_MWH))
        self._armed_ms: int | None = None
        self._boots_seen = 0
        self._fed_at_ms = 0
        self._amps: int | None = None  # believed to stand in the box
        self._enabled = False
        self._bounds: tuple[int, int] | None = None
        self._held_since_ms: int | None = self._now_ms()
        self._hold_seen_ms: int | None = None
        self._session_wh = self._elapsed_s = 0
        self._missed = False  # the heartbeat's miss, as last looked at
        self._looked_ms: int | None = None

    @property
    def _is_metered(self) -> bool:
        return self.config.meter is not None

    @staticmethod
    def _now_ms() -> int:
        return int(asyncio.get_running_loop().time() * 1000)

    def _limits(self, low_ma: int, high_ma: int) -> Limits:
        return Limits(
            current_ma_min=low_ma,
            current_ma_max=min(high_ma, self.config.current_ma_max),
            phase_count=self.config.phase_count,
            voltage_mv=self.config.voltage_mv,
            counter_step_mwh=COUNTER_STEP_MWH,
            poll_interval_ms=_POLL_MS,
        )

    # -------------------------------------------------------------- asking
    async def _numbers(self, command: str, *bases: int) -> tuple[int, ...]:
        """A read whose answer is exactly these numbers (by base), tried twice."""
        last: BridgeError | None = None
        for _ in range(_READ_ATTEMPTS):
            try:
                reply = await self.line.ask(command)
                if not reply.ok:
                    raise BridgeError(
                        "exception_NK", f"the box refuses ${command}; is its firmware 8 or newer?"
                    )
                return _as_numbers(command, reply, bases)
            except BridgeError as exc:
                last = exc
                if exc.name not in ("timeout", "wrong_reply"):
                    break
        assert last is not None
        raise last

    async def _state(self) -> State:
        return State(*await self._numbers("GS", 16, 10, 16, 16))

    async def look_at_limits(self) -> None:
        """What the box is built and set to. Narrows `limits`; MapError for a box without an ammeter and without a meter."""
        if not self._is_metered and (await self._numbers("GG", 10, 10))[0] < 0:
            raise MapError(
                "this OpenEVSE has no ammeter, so it can neither bill nor show that power stopped; add a meter: "
                "meter = { map = ..., wire = ... }"
            )
        low_a, _, _, high_a = await self._numbers("GC", 10, 10, 10, 10)
        self.limits = self._limits(low_a * 1000, high_a * 1000)

    async def identify(self) -> Identity:
        """Who answers; the serial number where the controller has one."""
        firmware = number = ""
        with contextlib.suppress(BridgeError):
            firmware = " RAPI ".join((await self.line.ask("GV")).words[:2])
        with contextlib.suppress(BridgeError):
            told = await self.line.ask("GI")
            number = "".join(told.words) if told.ok else ""
        return Identity(MAP, maker="OpenEVSE", model="OpenEVSE controller", serial=number, firmware=firmware)

    # -------------------------------------------------------------- arming
    async def arm(self, failsafe_timeout_s: int) -> None:
        """Arm the heartbeat (6 A) and read it back; wake a disabled box as far as sleeping.

        Raises BridgeError `failsafe_not_armed`, and whatever the line raises.
        """
        self._armed_ms = None
        self._boots_seen = self.line.boots
        if (await self._state()).evse == DISABLED:
            await self._until_seen("FS", lambda state: state.evse == SLEEPING)
        wanted = (failsafe_timeout_s, FALLBACK_A)
        await self.line.ask(f"SY {failsafe_timeout_s} {FALLBACK_A}")
        shown = await self._numbers("GY", 10, 10, 10)
        if shown[:2] != wanted or shown[2] == _ACTIVE_MISS:
            raise BridgeError(
                "failsafe_not_armed",
                f"the heartbeat shows {shown} after {wanted} was written; is it built in?",
            )
        self._missed = False
        self._fed_at_ms = self._now_ms()
        self._amps, self._bounds = None, None  # a missed heartbeat may have changed them
        self._armed_ms = failsafe_timeout_s * 1000

    # -------------------------------------------------------------- offering
    async def set_limit(self, *, current_ma: int | None = None, power_w: int | None = None) -> None:
        """Offer this much, in whole ampere, at most what box and installation allow; 0 holds. Feeds the heartbeat.

        Raises BridgeError `not_armed` (also after a missed heartbeat or a reboot), `limit_out_of_range`, `limit_refused` and
        the line's own.
        """
        wanted_ma = self.limits.current_ma(current_ma, power_w)
        if wanted_ma == 0:
            await self.hold()
            return
        if self._boots_seen != self.line.boots:
            self._armed_ms = None  # it starts with its own set point, and enabled
        if self._armed_ms is None:
            raise BridgeError("not_armed", "arm the charger's heartbeat before offering power")
        if wanted_ma < self.limits.current_ma_min:
            raise BridgeError(
                "limit_out_of_range",
                f"{wanted_ma} mA is below the minimum of {self.limits.current_ma_min} mA",
            )
        try:
            self._held_since_ms = self._hold_seen_ms = None
            await self._feed()
            await self._set_amps(wanted_ma // 1000)
            await self._enable()
            await self._bound()
        except BridgeError:
            self._amps, self._enabled, self._bounds = None, False, None
            raise

    async def _feed(self) -> None:
        assert self._armed_ms is not None
        if self._now_ms() - self._fed_at_ms < self._armed_ms // 4:
            return
        if not (await self.line.ask("SY")).ok:
            self._armed_ms = None
            raise BridgeError(
                "not_armed", "a heartbeat was missed and the box throttled itself; arm it again"
            )
        self._fed_at_ms = self._now_ms()

    async def _set_amps(self, amps: int) -> None:
        if self._amps == amps:
            return
        reply = await self.line.ask(f"SC {amps} V")
        if reply.words != (str(amps),) or not reply.ok:
            raise BridgeError(
                "limit_refused", f"the box set {' '.join(reply.words)} A when asked for {amps} A"
            )
        self._amps = amps

    async def _enable(self) -> None:
        if self._enabled:
            return
        await self.line.ask("FE")
        if (await self._state()).is_off:
            raise BridgeError("limit_refused", "the box stays off after it was enabled; look at its display")
        self._enabled = True

    async def _bound(self) -> None:
        """Keep the outer bounds a little ahead. Without a car the box refuses them (NK), and nothing can flow."""
        wanted = outer_bounds(self._session_wh, self._elapsed_s)
        if self._bounds == wanted:
            return
        kwh, quarters = wanted
        if (await self.line.ask(f"SH {kwh}")).ok and (await self.line.ask(f"S3 {quarters}")).ok:
            self._bounds = wanted

    # -------------------------------------------------------------- stopping
    async def hold(self) -> None:
        """Put the box to sleep, and look that it is. Safe at any time.

        Raises BridgeError `hold_not_obeyed`, or the line's error; the caller still has to see the contactor open.
        """
        if self._held_since_ms is None:
            self._held_since_ms = self._now_ms()
        if self._hold_seen_ms is not None and self._now_ms() - self._hold_seen_ms < _LOOK_MS:
            return
        self._enabled, self._bounds = False, None
        look_first = self._hold_seen_ms is not None  # off a second ago: do not wake a disabled box to sleep
        self._hold_seen_ms = None
        await self._until_seen("FS", lambda state: state.is_off, look_first=look_first)
        self._hold_seen_ms = self._now_ms()

    async def _until_seen(
        self, command: str, seen: Callable[[State], bool], *, look_first: bool = False
    ) -> None:
        """Send and look, a few times; a reply that got lost on the way is no reason to give up."""
        error: BridgeError | None = None
        for attempt in range(_HOLD_ATTEMPTS):
            try:
                if (look_first or attempt > 0) and seen(await self._state()):
                    return
                await self.line.ask(command)
                state = await self._state()
                if seen(state):
                    return
                error = BridgeError(
                    "hold_not_obeyed", f"the box shows state {state.evse:02X} after ${command}"
                )
            except BridgeError as exc:
                error = exc
        assert error is not None
        raise error

    async def lock(self) -> None:
        """Disable the box (pilot F, relay open); the next `arm` wakes it. Where that is not seen, at least hold."""
        self._armed_ms = None
        self._enabled, self._bounds = False, None
        if self._held_since_ms is None:
            self._held_since_ms = self._now_ms()
        try:
            await self._until_seen("FD", lambda state: state.evse == DISABLED)
            self._hold_seen_ms = self._now_ms()
        except BridgeError:
            self._hold_seen_ms = None
            await self.hold()
            raise

    async def cut_off(self) -> None:
        """Run the configured cut-off command; no-op where none is configured. Raises BridgeError `cut_off_failed`."""
        await run_cut_off(self.config.external_cut_off, self.config.cut_off_command)

    # -------------------------------------------------------------- looking
    async def read(self) -> Reading:
        """One look. The register is None when the plug changed meanwhile: the two halves of the counter then do not fit."""
        before = await self._state()
        milliamps, millivolts = await self._numbers("GG", 10, 10)
        session_ws, total_wh = await self._numbers("GU", 10, 10)
        state = await self._state()
        at_ms = self._now_ms()
        await self._look_seldom()
        if state.is_off:
            self._enabled = (
                False  # a button, a bound or its own timer: enable anew when power is still wanted
            )
        plugged = bool(state.flags & EV_CONNECTED)
        self._session_wh = session_ws // 3600 if plugged else 0
        self._elapsed_s = state.elapsed_s
        same_plug = plugged == bool(before.flags & EV_CONNECTED)
        register_mwh = (total_wh + self._session_wh) * 1000 if same_plug else None
        power_w = milliamps * millivolts * self.limits.phase_count // 1_000_000
        implausible = (
            None  # its numbers are nobody's bill, and its ammeter may be what the meter is there for
            if self._is_metered
            else self._plausibility.judge(at_ms, register_mwh, power_w, self._held_since_ms)
        )
        return Reading(
            at_ms=at_ms,
            register_mwh=register_mwh,
            power_w=power_w,
            current_ma=milliamps,
            voltage_mv=millivolts,
            pilot_state=state.pilot_state,
            contactor_closed=bool(state.flags & RELAY_CLOSED),
            fault=implausible or FAULTS.get(state.evse) or ("failsafe_tripped" if self._missed else None),
        )

    async def _look_seldom(self) -> None:
        """Once a second: was a heartbeat missed, and does the set point still stand?"""
        now_ms = self._now_ms()
        if self._looked_ms is not None and now_ms - self._looked_ms < _LOOK_MS:
            return
        self._looked_ms = now_ms
        trigger = (await self._numbers("GY", 10, 10, 10))[2]
        # Nobody feeds it while nothing is offered: a miss is a fault only while power may flow.
        self._missed = trigger == _ACTIVE_MISS and self._held_since_ms is None
        amps, _ = await self._numbers("GE", 10, 16)
        if amps != self._amps:
            self._amps = None  # written anew by the next set_limit

    async def close(self) -> None:
        """Give the port back. Never raises."""
        self.line.close()


def _as_numbers(command: str, reply: Reply, bases: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(int(word, base) for word, base in zip(reply.words, bases, strict=True))
    except ValueError:
        raise BridgeError(
            "wrong_reply", f"${command} was answered by {' '.join(reply.words)[:40]!r}"
        ) from None
