"""A simulated OpenEVSE: the plant behind RAPI on a pty.

Rules
* It knows the protocol from its description, and shares no code with the driver that talks to it.
* It is as odd as the real one: it boots enabled, sets a current that is out of range to the nearest one and says `$NK`, tells
  `$AT` before the reply to the command that caused it, throttles to 6 A when the heartbeat stops, takes limits only while a car
  is plugged in and it is awake, and adds a plug-in to its total when the cable is pulled.

May not know: the driver, device maps, the agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Self

from firmware_bridge.simulator.plant import Plant, PlantConfig
from firmware_bridge.simulator.serial_line import SerialLine
from firmware_bridge.simulator.server import Simulator, SimulatorConfig, Truth

TRUTH_EVERY_S = 0.5
TICK_S = 0.05  # how often unasked news are looked for
_LINE_BYTES_MAX = 32  # the real one's buffer: what is longer is lost
_ACK = "165"
_SLEEP, _OFF, _AWAKE = 0xFE, 0xFF, {"A": 1, "B": 2, "C": 3}
_RELAY, _PLUGGED, _LIMIT_SLEEP = 0x40, 0x100, 0x04
_FORCE_OPEN_MS = 3_000  # how long it waits for the car before it opens under load
_RELAY_STUCK = 0x08


@dataclass(frozen=True, slots=True)
class RapiSimulatorConfig:
    """`link`: the name to make for the port. `asleep`: the box was put to sleep before (by itself it boots enabled)."""

    link: str
    asleep: bool = False
    plant: PlantConfig = field(default_factory=lambda: single_phase(PlantConfig()))


def single_phase(plant: PlantConfig) -> PlantConfig:
    """What an OpenEVSE usually is."""
    return replace(plant, phase_count=1, force_open_ms=_FORCE_OPEN_MS)


class RapiSimulator:
    """`async with RapiSimulator(config) as box:` answers at `box.wire` until the block ends."""

    def __init__(self, config: RapiSimulatorConfig) -> None:
        self.config = config
        self.wire = f"rapi://{Path(config.link).absolute()}"
        self.heard: list[str] = []  # the newest commands, without number and checksum
        self.deaf = False  # for stories: it hears nothing and says nothing
        self.plant = Plant(config.plant)
        self._trigger = 0
        self._interval_s, self._fallback_a = 0, 0
        self._charge_kwh = self._quarters = 0
        self._begun_ms: int | None = None
        self._limit_sleep = False
        self._past_wh = config.plant.register_mwh_begin // 1000
        self._session_from_uj = 0
        self._pending = b""
        self._told = ""

    async def __aenter__(self) -> Self:
        self.plant = Plant(self.config.plant, self._now_ms())
        self.plant.set_limit(self.config.plant.current_ma_max, self.plant.now_ms)
        self.plant.enable(not self.config.asleep, self.plant.now_ms)
        self._line = SerialLine(self.config.link)
        self._fd = os.open(self._line.device_end, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        asyncio.get_running_loop().add_reader(self._fd, self._read)
        self._told = self._state_words()
        self._ticking = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ticking.cancel()
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)
        self._line.close()

    # -------------------------------------------------------------- the world
    @staticmethod
    def _now_ms() -> int:
        return int(asyncio.get_running_loop().time() * 1000)

    def now(self) -> Plant:
        """The plant, brought up to this instant, limits and heartbeat included."""
        plant = self.plant
        plant.advance(self._now_ms())
        if plant.failsafe_tripped:
            self._trigger = 2
        if plant.contactor_closed and self._begun_ms is None:
            self._begun_ms = plant.now_ms
        over = self._charge_kwh and self._session_ws() >= self._charge_kwh * 3_600_000
        late = self._quarters and self._elapsed_s() >= self._quarters * 900
        if (over or late) and plant.enabled:
            self._limit_sleep = True
            plant.enable(on=False, now_ms=plant.now_ms)
        return plant

    def plug(self, *, plugged: bool) -> None:
        """Insert or pull the cable."""
        plant = self.now()
        if plant.config.plugged and not plugged:
            self._past_wh += self._session_ws() // 3600
            self._charge_kwh = self._quarters = 0
        elif plugged and not plant.config.plugged:
            self._session_from_uj, self._begun_ms = plant.energy_uj, None
        plant.plug(plugged, plant.now_ms)

    def truth(self) -> Truth:
        """The truth at this instant."""
        plant = self.now()
        return Truth(
            at_ms=plant.now_ms,
            delivered_mwh=plant.delivered_mwh,
            register_mwh=plant.register_mwh,
            power_w=plant.power_w,
            current_ma=plant.current_ma,
            offered_ma=plant.offered_ma if plant.enabled and not plant.locked else 0,
            contactor_closed=plant.contactor_closed,
            energised=plant.contactor_closed,
            enabled=plant.enabled,
            locked=plant.locked,
            failsafe_armed=plant.failsafe_timeout_ms > 0,
            failsafe_tripped=self._trigger == 2,
            soc_permille=plant.soc_permille,
        )

    def _session_ws(self) -> int:
        return (self.plant.energy_uj - self._session_from_uj) // 1_000_000

    def _elapsed_s(self) -> int:
        return 0 if self._begun_ms is None else (self.plant.now_ms - self._begun_ms) // 1000

    def _evse(self) -> int:
        plant = self.plant
        if plant.fault == "contactor_stuck":
            return _RELAY_STUCK
        if plant.locked:
            return _OFF
        return _AWAKE[plant.pilot_state] if plant.enabled else _SLEEP

    def _flags(self) -> int:
        plant = self.plant
        return (
            (_RELAY if plant.contactor_closed else 0)
            | (_PLUGGED if plant.config.plugged else 0)
            | (_LIMIT_SLEEP if self._limit_sleep else 0)
        )

    def _state_words(self) -> str:
        plant = self.plant
        pilot = _AWAKE[plant.pilot_state]
        return f"{self._evse():02x} {pilot:02x} {plant.offered_ma // 1000} {self._flags():04x}"

    # -------------------------------------------------------------- the wire
    async def _tick(self) -> None:
        while True:
            self.now()
            self._tell_state()
            await asyncio.sleep(TICK_S)

    def _tell_state(self) -> None:
        words = self._state_words()
        if words != self._told:
            self._told = words
            self._say(f"$AT {words}")

    def boot(self) -> None:
        """As after a power cut: its own current, enabled, and a word about it. The heartbeat's settings are kept."""
        plant = self.now()
        plant.lock(on=False, now_ms=plant.now_ms)
        plant.set_limit(plant.config.current_ma_max, plant.now_ms)
        plant.enable(on=True, now_ms=plant.now_ms)
        self._say("$AB 00 8.2.3")

    def _say(self, body: str) -> None:
        if self.deaf:
            return
        checksum = 0
        for byte in body.encode("ascii"):
            checksum ^= byte
        with contextlib.suppress(
            OSError
        ):  # nobody reads, and the line is full: bytes are lost, as on a real one
            os.write(self._fd, f"{body}^{checksum:02X}\r".encode("ascii"))

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            self._pending += os.read(self._fd, 4096)
        *lines, self._pending = self._pending.split(b"\r")
        for line in lines:
            start = line.rfind(b"$")
            if start >= 0 and len(line) - start < _LINE_BYTES_MAX and not self.deaf:
                self._serve(line[start:].decode("ascii", "replace"))

    def _serve(self, line: str) -> None:
        body, mark, told = line, "", ""
        for kind in "^*":
            if kind in line:
                body, mark, told = *line.rsplit(kind, 1)[:1], kind, line.rsplit(kind, 1)[1]
        if mark:
            wanted = 0
            for byte in body.encode("ascii", "replace"):
                wanted = wanted ^ byte if mark == "^" else (wanted + byte) & 0xFF
            if told.upper() != f"{wanted:02X}":
                self._say("$NK")
                return
        words = body[1:].split()
        number = words.pop() if words and words[-1].startswith(":") else ""
        self.heard = [*self.heard[-999:], " ".join(words)]
        self.now()
        ok, answer = self._do(words[0] if words else "", words[1:])
        self.now()
        self._tell_state()  # before the reply: a client must not take it for one
        self._say(" ".join(part for part in ("$OK" if ok else "$NK", answer, number) if part))

    # -------------------------------------------------------------- the commands
    def _do(self, name: str, words: list[str]) -> tuple[bool, str]:
        plant = self.plant
        shows: dict[str, Callable[[], str]] = {
            "GS": lambda: (
                f"{self._evse():02x} {self._elapsed_s()} {_AWAKE[plant.pilot_state]:02x} {self._flags():04x}"
            ),
            "GG": lambda: f"{plant.current_ma} {plant.config.voltage_mv}",
            "GU": lambda: f"{self._session_ws()} {self._past_wh}",
            "GC": lambda: f"6 80 {plant.offered_ma // 1000} {plant.config.current_ma_max // 1000}",
            "GE": lambda: f"{plant.offered_ma // 1000} 0021",
            "GF": lambda: "0 0 0",
            "GH": lambda: str(self._charge_kwh),
            "G3": lambda: str(self._quarters),
            "GV": lambda: "8.2.3 5.2.1",
            "GI": lambda: " SIMUL801020304",
            "GY": lambda: f"{self._interval_s} {self._fallback_a} {self._trigger}",
        }
        if name in shows:
            return True, shows[name]()
        acts: dict[str, Callable[[list[str]], tuple[bool, str]]] = {
            "FE": lambda _: self._switch(enabled=True),
            "FS": lambda _: self._switch(enabled=False),
            "FD": lambda _: self._switch(enabled=False, locked=True),
            "SC": self._set_current,
            "SH": self._set_limit,
            "S3": self._set_limit,
            "SY": self._heartbeat,
        }
        if name not in acts or (name in ("SC", "SH", "S3") and not words):
            return False, ""
        return acts[name]([name, *words])

    def _switch(self, *, enabled: bool, locked: bool = False) -> tuple[bool, str]:
        plant = self.plant
        if plant.locked != locked:
            plant.lock(locked, plant.now_ms)
        plant.enable(enabled, plant.now_ms)
        self._limit_sleep = False
        return True, ""

    def _set_current(self, words: list[str]) -> tuple[bool, str]:
        wanted = int(words[1])
        amps = min(max(wanted, 6), self.plant.config.current_ma_max // 1000)
        self.plant.set_limit(amps * 1000, self.plant.now_ms)
        return amps == wanted, str(amps)

    def _set_limit(self, words: list[str]) -> tuple[bool, str]:
        if self._evse() not in (2, 3):
            return False, ""
        if words[0] == "SH":
            self._charge_kwh = int(words[1])
        else:
            self._quarters = int(words[1])
        return True, ""

    def _heartbeat(self, words: list[str]) -> tuple[bool, str]:
        plant, ok = self.plant, True
        if len(words) == 3:
            self._interval_s, self._fallback_a, self._trigger = int(words[1]), int(words[2]), 0
            plant.feed(plant.now_ms)
            # Less than 6 A is clamped to 6 A: silence can throttle, never stop.
            plant.arm_failsafe(
                plant.now_ms, timeout_ms=self._interval_s * 1000, current_ma=max(6, self._fallback_a) * 1000
            )
        elif len(words) == 2:
            ok = words[1] == _ACK and self._trigger == 2
            self._trigger = 1 if ok else self._trigger
        else:
            ok = self._trigger != 2
            plant.feed(plant.now_ms)
        return ok, f"{self._interval_s} {self._fallback_a} {self._trigger}"


async def run_rapi_simulator(
    config: RapiSimulatorConfig,
    *,
    meter: SimulatorConfig | None = None,
    truth_file: Path | None = None,
    say: Callable[[Mapping[str, object]], None],
) -> Truth:
    """Simulate until SIGTERM or SIGINT. `say` gets `{event: listening | ended, ...}`. Returns the truth at the end.

    `meter`: a Modbus meter in front of the box, on a wire of its own.
    """
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told_to_stop.set)
    async with contextlib.AsyncExitStack() as wires:
        box = await wires.enter_async_context(RapiSimulator(config))
        who: dict[str, object] = {"wire": box.wire, "map": "openevse_rapi", "device_id": 0}
        if meter is not None:
            beside = await wires.enter_async_context(Simulator(meter, box.plant))
            who |= {"meter_map": meter.map, "meter_wire": beside.wire}
        _write_truth(truth_file, box.truth())
        say({"event": "listening", **who})
        while not told_to_stop.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(told_to_stop.wait(), TRUTH_EVERY_S)
            _write_truth(truth_file, box.truth())
        truth = box.truth()
    say({"event": "ended", **truth.as_dict()})
    return truth


def _write_truth(path: Path | None, truth: Truth) -> None:
    """Replace the file in one step, so that a reader never sees half of it."""
    if path is not None:
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        beside.write_text(json.dumps(truth.as_dict()) + "\n", encoding="utf-8")
        beside.replace(path)
