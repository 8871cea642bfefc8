"""What a flood at the door costs: the charger's beat, memory, and an honest consumer who comes in the middle of it.

The house is real and runs in one process and one loop, as in the daemon: engine and journal, the charger's runner against a
simulator over TCP, door, MQTT runner, web server. Around it, as processes of their own and nicer than it (in the field they are
other machines): the simulator, a broker that pushes 20 000 bad messages a second, visitors that keep the web server busy, and
a consumer who presents real tokens. Chain and plugged cars are played by hand.

* beat: how late the charger's beat begins, p99. Beside the same loop with nobody at the door, and a bare asyncio loop that
  only sleeps, both in the same run.
* memory: resident, when the flood has just begun and when it ends.
* honest: from the first M1 to M2, the worst of the visits, and how many got in. In the floods by known names (a broker with
  our access list), and by ever new names (a broker that lets everybody in) where forgeries are perfect but for the signature.
* refused: microseconds the door takes to say no, by kind. The peer is what it costs to just parse the JSON.
"""

from __future__ import annotations

import asyncio
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, redirect_stdout, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from agent.consumer.carrier import Backoff, Carrier
from agent.consumer.carrier_http import HttpCarrier
from agent.consumer.carrier_mqtt import Broker, MqttCarrier
from agent.core import events as ev
from agent.core import token as rules
from agent.core.live import Beat, HeaderSeen, Policy, PortRead, PortReading
from agent.core.messages import Hello, Present, Refusal, decode, encode
from agent.core.record import MeterIdentity
from agent.core.token import Domain
from agent.core.units import Address, BlockHash, TxHash
from agent.door import Door
from agent.engine import Engine
from agent.journal import Journal
from agent.keys import ephemeral_signer
from agent.runners.charger import ChargerRunner
from agent.runners.http import HttpRunner
from agent.runners.mqtt import BrokerAddress, MqttRunner
from bench import Row, _flood
from firmware_bridge.mapped_charger import ChargerConfig
from firmware_bridge.modbus import Buses
from firmware_bridge.opening import open_charger
from firmware_bridge.simulator import Simulator, SimulatorConfig
from firmware_bridge.stopping import StopModel

DOMAIN = Domain(1337, Address(b"\x11" * 20))
PROVIDER, CONSUMER = ephemeral_signer(b"provider"), _flood.CONSUMER
NOW_S, ORDER_WH = 1_800_000_000, 1_000
VISITS = 4  # honest consumers in each flood
FLOODS = ("mqtt by known names", "mqtt by ever new names", "http", "everything at once")
CHARGING_PORT = "charging"
PHASE_S = 20.0
FLOOR_INTERVAL_S = 0.1
NEIGHBOURS = 20  # beats
GOAL_LATENESS_MS, GOAL_MEMORY_MIB, GOAL_HONEST_S, GOAL_REFUSED_US = 5.0, 8.0, 10.0, 250.0


def ports() -> tuple[str, ...]:
    """The one with the real charger, and one for each honest visit."""
    return CHARGING_PORT, *(f"visit {number}" for number in range(VISITS * len(FLOODS)))


def terms_of(number: int) -> ev.Terms:
    """Session `number`; 0 is the one that charges, 1... are the visits'."""
    consumer, provider = CONSUMER.address, PROVIDER.address
    return ev.Terms(
        session_id=rules.session_id(DOMAIN.chain_id, DOMAIN.contract, consumer, provider, number + 1),
        token=rules.access_token(consumer, provider, NOW_S - number, NOW_S + 86_400),
        consumer=consumer,
        provider=provider,
        auction_nonce=number + 1,
        energy_wh_ordered=ORDER_WH,
        rate_wei_per_kwh=10**14,
        deposit_wei=10**14,
        bond_wei=10**14,
        issued_at_s=NOW_S - number,
        valid_until_s=NOW_S + 86_400,
        block_number=90,
        block_hash=BlockHash(rules.word(90)),
        log_index=number,
        tx_hash=TxHash(rules.word(9_000 + number)),
    )


def presentation(number: int, hello: Hello) -> bytes:
    """The honest M1 of this session, at this Hello."""
    terms, nonce = terms_of(number), os.urandom(32)
    bound = rules.challenge(hello.typed, nonce)
    typed = rules.PresentToken(
        terms.token, terms.session_id, terms.provider, rules.ZERO_ADDRESS, 0, terms.valid_until_s, bound
    )
    return encode(
        Present(
            "eip712", terms.session_id, terms.token, hello.charger_id, hello.nonce, nonce, rules.ZERO_ADDRESS, 0,
            terms.valid_until_s, CONSUMER.public_key, CONSUMER.sign_digest(rules.digest(DOMAIN, typed)),
        )
    )  # fmt: skip


# ---- the house


class _TimedCharger(ChargerRunner):
    """The charger's runner, and when each of its beats began."""

    began_s: list[float]

    async def _beat(self) -> None:
        self.began_s.append(asyncio.get_running_loop().time())
        await super()._beat()


@dataclass(slots=True)
class House:
    """Everything of the daemon but the chain."""

    engine: Engine
    door: Door
    charger: _TimedCharger
    interval_s: float
    http_url: str = ""
    tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def lateness_ms(self, since: int) -> list[float]:
        """How late each beat from number `since` on began, against the most punctual of the NEIGHBOURS before and after it: a
        beat that is three intervals late begins a new schedule.
        """
        began = self.charger.began_s[since:]
        offsets = [at - number * self.interval_s for number, at in enumerate(began)]
        return [
            1000 * (offset - min(offsets[max(0, number - NEIGHBOURS) : number + NEIGHBOURS]))
            for number, offset in enumerate(offsets)
        ]


@asynccontextmanager
async def opened_house(folder: Path, wire: str, broker_port: int) -> AsyncIterator[House]:
    """The house, listening; its first session is delivering, the others wait for their consumers."""
    journal = Journal(folder / "journal.sqlite", DOMAIN, PROVIDER.address)
    policy = Policy(max_unacked_wh=dict.fromkeys(ports(), ORDER_WH), max_view_age_s=600)
    loop = asyncio.get_running_loop()

    def monotonic_ms() -> int:
        return int(loop.time() * 1000)

    engine = Engine(journal, policy, monotonic_ms)
    door = Door(engine, DOMAIN, PROVIDER.address, PROVIDER, ports(), os.urandom)
    charger = await open_charger(ChargerConfig(map="simulated", wire=wire), Buses())
    runner = _TimedCharger(
        engine,
        CHARGING_PORT,
        charger,
        failsafe_timeout_s=5,
        stop_model=StopModel(),
        meter=MeterIdentity("V2V", "simulated", "1", "1"),
        meter_signer=_MeterSigner(),
        monotonic_ms=monotonic_ms,
    )
    runner.began_s = []
    house = House(engine, door, runner, charger.limits.poll_interval_ms / 1000)
    mqtt = MqttRunner(engine, door, PROVIDER.address, BrokerAddress("127.0.0.1", broker_port))
    http = HttpRunner(engine, door, "127.0.0.1", 0)
    work = (runner.run(), mqtt.run(), http.run(), _play(engine, monotonic_ms))
    house.tasks = [asyncio.create_task(one) for one in work]
    try:
        await http.listening.wait()
        house.http_url = http.url
        yield house
    finally:
        for task in house.tasks:
            task.cancel()
        await asyncio.gather(*house.tasks, return_exceptions=True)
        await charger.hold()
        await charger.close()
        journal.close()


class _MeterSigner:
    """Signs nothing worth reading: records are not what is measured."""

    public_key_spki = b"\x30"

    def sign_sha256(self, payload: bytes) -> bytes:
        """No signature."""
        return payload[:1] * 8


async def _play(engine: Engine, monotonic_ms: Callable[[], int]) -> None:
    """Headers, the sessions' `Connected`, and cars at rest at the ports of the visits; and the engine's beat."""
    number = 0
    while True:
        if number % 20 == 0:
            engine.observe(HeaderSeen(1_000 + number, BlockHash(rules.word(number + 1)), NOW_S + number // 4))
        if number == 0:
            for which in range(len(ports())):
                terms = terms_of(which)
                engine.accept(ev.ConnectedSeen(engine.at_s, terms))
                engine.accept(ev.ConnectedBelieved(engine.at_s, terms.session_id, terms.block_hash))
        for port in ports()[1:]:
            rest = PortReading(monotonic_ms(), 5_000_000, 0, "B", seen_open=True)
            engine.observe(PortRead(port, rest, armed=True))
            await asyncio.sleep(0)  # as ports do: one after the other
        engine.observe(Beat())
        number += 1
        await asyncio.sleep(0.25)


# ---- the honest consumer, a process of its own


def honest(pipe: Connection, broker_port: int, http_url: str) -> None:
    """Does what is asked through the pipe until it closes: ("visit", session, port, way) -> seconds or None."""
    os.nice(2)
    pipe.send("ready")
    with suppress(EOFError):
        while True:
            number, way, patience_s = pipe.recv()
            pipe.send(asyncio.run(_visit(number, way, patience_s, broker_port, http_url)))


async def _visit(number: int, way: str, patience_s: float, broker_port: int, http_url: str) -> float | None:
    """Seconds from the first M1 to M2; None: not within `patience_s`."""
    sref, port = f"{number:032x}", ports()[number]
    place = Broker("127.0.0.1", broker_port)
    carrier: Carrier = MqttCarrier(place, sref) if way == "mqtt" else HttpCarrier(http_url, sref)
    with suppress(TimeoutError):
        async with carrier, asyncio.timeout(patience_s):
            await carrier.meet(PROVIDER.address)
            return await _present(carrier, number, rules.charger_id(port))
    return None


async def _present(carrier: Carrier, number: int, charger_id: bytes) -> float:
    """Knock as our consumer does: the same again with growing pauses, anew when the Hello was stale."""
    data, backoff, began_s, heard = b"", Backoff(0.5, 8.0), 0.0, False
    while True:
        if not data:
            await carrier.ask_hello()
            hello = await _hello(carrier, charger_id)
            data = presentation(number, hello) if hello is not None else b""
            continue
        began_s = began_s or time.perf_counter()
        await carrier.post("present", data)
        until_s = time.perf_counter() + min(backoff.next_s(), 8.0 if heard else 2.0)
        heard = False
        while (left_s := until_s - time.perf_counter()) > 0:
            answer = await carrier.next(left_s)
            message = None if answer is None else decode(answer)
            heard = heard or not (message is None or isinstance(message, Hello))
            if message is not None and message.TYPE == "accept":
                return time.perf_counter() - began_s
            if isinstance(message, Refusal) and message.reason in ("stale_hello", "replayed"):
                data = b""
                break


async def _hello(carrier: Carrier, charger_id: bytes) -> Hello | None:
    while (data := await carrier.next(1.0)) is not None:
        message = decode(data)
        if isinstance(message, Hello) and message.charger_id == charger_id:
            return message
    return None


# ---- the measurement


@dataclass(frozen=True, slots=True)
class Phase:
    """One stretch of time, with or without a flood."""

    name: str
    lateness_ms: list[float]
    memory_mib: tuple[float, float]
    busy: float  # part of one core that the house used
    stolen: float  # part of this machine that went to other machines on the same hardware
    honest_s: list[float | None]
    sent: dict[str, float]  # what the outside did, per second


def _resident_mib() -> float:
    return (
        int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        * os.sysconf("SC_PAGE_SIZE")
        / 2**20
    )


def p99(values: list[float]) -> float:
    """The value that one in a hundred exceeds."""
    return sorted(values)[math.ceil(len(values) * 0.99) - 1]


def _stolen_s() -> float:
    """Processor seconds so far that a virtual machine wanted and did not get; all cores."""
    ticks = int(Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[8])
    return ticks / os.sysconf("SC_CLK_TCK")


async def _floor_ms(seconds: float, interval_s: float) -> list[float]:
    """How late a loop is that does nothing but sleep to the same grid."""
    loop = asyncio.get_running_loop()
    first_s, late = loop.time() + interval_s, []
    for number in range(round(seconds / interval_s)):
        await asyncio.sleep(first_s + number * interval_s - loop.time())
        late.append(1000 * (loop.time() - first_s - number * interval_s))
    return late


class Outside:
    """The processes around the house."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack, self._context = stack, multiprocessing.get_context("spawn")

    def start(self, target: Callable[..., None], *arguments: object) -> Connection:
        """A process with a pipe to it; it ends with the stack."""
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=target, args=(theirs, *arguments), daemon=True)
        process.start()
        theirs.close()
        self._stack.callback(process.join, 10)
        self._stack.callback(ours.close)
        return ours

    @staticmethod
    async def ask(pipe: Connection, question: object) -> object:
        """Send, and wait for the answer without holding the loop."""
        pipe.send(question)
        return await Outside.hear(pipe)

    @staticmethod
    async def hear(pipe: Connection) -> object:
        """Wait for the next word."""
        while not pipe.poll():  # noqa: ASYNC110 - a pipe tells nobody; a thread for it would disturb the beat
            await asyncio.sleep(0.02)
        return pipe.recv()


async def measured(seconds: float) -> tuple[list[float], list[Phase]]:
    """The bare loop's lateness, and every phase: idle first, then each flood."""
    async with AsyncExitStack() as stack:
        outside = Outside(stack)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="v2v-bench-")))
        simulator, broker = outside.start(simulate), outside.start(_flood.broker)
        wire, broker_port = str(await Outside.hear(simulator)), await Outside.hear(broker)
        assert isinstance(broker_port, int)
        floor = await _floor_ms(seconds / 2, FLOOR_INTERVAL_S)
        house = await stack.enter_async_context(opened_house(folder, wire, broker_port))
        web = outside.start(_flood.visitors, house.http_url)
        consumer = outside.start(honest, broker_port, house.http_url)
        assert [await Outside.hear(pipe) for pipe in (web, consumer)] == ["ready", "ready"]
        house.door.answer("0" * 32, "bench:0", presentation(0, house.door.hello(CHARGING_PORT)))
        gc.freeze()  # as the daemon does once everything is open
        phases = [await _phase(house, "idle", seconds, [], [], consumer, [])]
        for number, name in enumerate(FLOODS):
            visits = [1 + number * VISITS + which for which in range(VISITS)]
            both = ("http", "mqtt") if "mqtt" not in name or "ever new" in name else ("mqtt", "mqtt")
            ways = [both[which % 2] for which in range(VISITS)]
            floods = [
                pipe
                for pipe, where in ((broker, "mqtt"), (web, "http"))
                if where in name or "every" in name[:5]
            ]
            targets = [(terms_of(visit), ports()[visit]) for visit in visits]
            phases.append(
                await _phase(
                    house, name, seconds, floods, targets, consumer, list(zip(visits, ways, strict=True))
                )
            )
        return floor, phases


async def _phase(
    house: House,
    name: str,
    seconds: float,
    floods: list[Connection],
    targets: list[tuple[ev.Terms, str]],
    consumer: Connection,
    visits: list[tuple[int, str]],
) -> Phase:
    """One stretch: the flood rises, the honest come in the middle of it, one after the other."""
    loop = asyncio.get_running_loop()
    for pipe in floods:
        pipe.send(("flood", targets, "ever new" in name))
    await asyncio.sleep(1.0)
    gc.collect()
    first, before_mib = len(house.charger.began_s), _resident_mib()
    began_s, used_s, stolen_s = loop.time(), time.process_time(), _stolen_s()
    got_in = [await Outside.ask(consumer, (number, way, seconds)) for number, way in visits]
    await asyncio.sleep(max(0.0, began_s + seconds - loop.time()))
    took_s = loop.time() - began_s
    busy = (time.process_time() - used_s) / took_s
    stolen = (_stolen_s() - stolen_s) / took_s / (os.cpu_count() or 1)
    lateness_ms, after_mib = house.lateness_ms(first), _resident_mib()
    sent: dict[str, float] = {}
    for pipe in floods:
        counted = await Outside.ask(pipe, ("stop",))
        assert isinstance(counted, dict)
        sent |= counted
    for task in house.tasks:
        if task.done():
            task.result()
    assert not any(isinstance(one, str) for one in got_in)
    return Phase(name, lateness_ms, (before_mib, after_mib), busy, stolen, got_in, sent)  # type: ignore[arg-type]


def simulate(pipe: Connection) -> None:
    """The charger, with a car that takes what it gets; says its wire and stays until the pipe closes."""
    os.nice(1)

    async def serve() -> None:
        async with Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator:
            pipe.send(simulator.wire)
            with suppress(EOFError):
                while not await asyncio.to_thread(pipe.poll, 1.0):
                    pass

    asyncio.run(serve())


# ---- what a refusal costs


def refused_us(runs: int) -> dict[str, tuple[float, float]]:
    """(door's, bare json.loads') microseconds by kind of garbage, each at a door that has all the time in the world."""
    with tempfile.TemporaryDirectory(prefix="v2v-bench-") as folder:
        journal = Journal(Path(folder) / "journal.sqlite", DOMAIN, PROVIDER.address)
        engine = Engine(journal, Policy(max_unacked_wh={CHARGING_PORT: 50}), lambda: 0)
        door = Door(engine, DOMAIN, PROVIDER.address, PROVIDER, (CHARGING_PORT,), os.urandom)
        engine.observe(HeaderSeen(1, BlockHash(rules.word(1)), NOW_S))
        terms = terms_of(0)
        engine.accept(ev.ConnectedSeen(engine.at_s, terms))
        engine.accept(ev.ConnectedBelieved(engine.at_s, terms.session_id, terms.block_hash))
        garbage = _flood.garbage(terms, door.hello(CHARGING_PORT))
        costs = {}
        for kind, data in garbage.items():
            # A transport and a source of its own each time: a bucket that is empty would be cheaper than the check.
            ours, bare = [], []
            for number in range(runs):
                began_ns = time.perf_counter_ns()
                answer = door.answer("s", f"{kind} {number}:{number}", data)
                ours.append((time.perf_counter_ns() - began_ns) / 1000)
                bare.append(_parse_us(data))
                assert isinstance(answer, Refusal), kind
            costs[kind] = statistics.median(ours), statistics.median(bare)
        journal.close()
        return costs


def _parse_us(data: bytes) -> float:
    began_ns = time.perf_counter_ns()
    with suppress(ValueError):
        json.loads(data)
    return (time.perf_counter_ns() - began_ns) / 1000


# ---- rows


def rows(runs: int) -> list[Row]:
    """Beat, memory and honest consumers of each flood; then what each refusal costs."""
    with redirect_stdout(sys.stderr):  # the house logs; rows go to where it would
        floor, (idle, *floods) = asyncio.run(measured(PHASE_S))
    found = []
    for phase in floods:
        found += [_beat_row(phase, idle, floor), _memory_row(phase, idle), _honest_row(phase)]
    costs = refused_us(max(50, runs * 10))
    return found + [_refused_row(kind, *cost, runs=max(50, runs * 10)) for kind, cost in costs.items()]


def _beat_row(phase: Phase, idle: Phase, floor: list[float]) -> Row:
    late_ms = p99(phase.lateness_ms)
    sent = ", ".join(f"{what} {per_s:.0f}/s" for what, per_s in phase.sent.items())
    beside = f"{phase.busy:.0%} of a core; {phase.stolen:.1%} of the machine stolen; {sent}"
    return Row(
        "floods", f"{phase.name}: beat lateness p99 (max {max(phase.lateness_ms):.1f}; {beside})",
        "ms", late_ms, f"<= {GOAL_LATENESS_MS:g} ms", late_ms <= GOAL_LATENESS_MS, len(phase.lateness_ms),
        p99(idle.lateness_ms), "nobody at the door", p99(floor), "bare asyncio loop",
    )  # fmt: skip


def _memory_row(phase: Phase, idle: Phase) -> Row:
    before_mib, after_mib = phase.memory_mib
    return Row(
        "floods", f"{phase.name}: resident memory grows by (from {before_mib:.1f} MiB)", "MiB",
        after_mib - before_mib, f"<= {GOAL_MEMORY_MIB:g} MiB", after_mib - before_mib <= GOAL_MEMORY_MIB, 1,
        idle.memory_mib[1] - idle.memory_mib[0], "nobody at the door",
    )  # fmt: skip


def _honest_row(phase: Phase) -> Row:
    inside = [one for one in phase.honest_s if one is not None]
    worst_s = max(inside, default=math.inf) if len(inside) == len(phase.honest_s) else PHASE_S
    told = ", ".join("kept out" if one is None else f"{one:.2f}" for one in phase.honest_s)
    return Row(
        "floods", f"{phase.name}: honest M1 to M2, worst ({len(inside)} of {len(phase.honest_s)} got in: {told})", "s",
        worst_s, f"all get in, <= {GOAL_HONEST_S:g} s", len(inside) == len(phase.honest_s) and worst_s <= GOAL_HONEST_S,
        len(phase.honest_s),
    )  # fmt: skip


def _refused_row(kind: str, ours_us: float, bare_us: float, runs: int) -> Row:
    return Row(
        "floods", f"refused: {kind}", "us", ours_us, f"<= {GOAL_REFUSED_US:g} us", ours_us <= GOAL_REFUSED_US, runs,
        bare_us, "json.loads",
    )  # fmt: skip
