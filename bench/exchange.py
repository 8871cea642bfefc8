"""What each side can lose when the other vanishes, lies or delays: the worst of many seeded evenings, beside the formula.

Real are the provider's engine, door and core, the consumer's policy and every signature between them; simulated, in virtual
time, are plant, car, box and network (those of the stop's bench). One side is honest, the other does its worst: it stops
signing while its car ignores the pilot, signs late, signs less, or signs just enough to go on; its meter runs fast, jumps, it
talks late, goes away, or delivers to somebody else's car (a relay).

* The provider's loss: what truly flowed less the highest receipt it was given.
* The consumer's loss: its highest receipt, whether it arrived or not, less what its own car received.
* The formulas are PROTOCOL section 5 and `agent.consumer.policy`; docs/fair-exchange.md states them, a test compares.
* The peer: energy prepaid in slices of 25 Wh, in the same world. It risks less of the provider's and stops for every slice.

A goal is met when no evening, not even the worst, lost more than its formula.
"""

from __future__ import annotations

import hashlib
import heapq
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from multiprocessing import get_context
from random import Random

import coincurve

from agent.consumer.policy import Sign, SigningLimits, Situation, decide
from agent.core import events as ev
from agent.core import token as rules
from agent.core.book import Book
from agent.core.effects import Deliver, Firmness, Hold
from agent.core.live import HeaderSeen, Policy, PortRead, PortReading
from agent.core.messages import Accept, AckMessage, Present, ReadingMessage, ReceiptMessage, encode
from agent.core.session import Stage
from agent.core.token import Domain
from agent.core.units import Address, BlockHash, TxHash, cost_wei_floor
from agent.door import Door
from agent.engine import Engine
from bench import Row
from bench.stop import SITES, Box, MeteredPlant, Site, look
from firmware_bridge.charger import Limits, Reading
from firmware_bridge.simulator.plant import PlantConfig
from firmware_bridge.stopping import StopPlanner

RUNS_MIN, RUNS_MAX = (
    8,
    400,
)  # evenings for each site and behaviour: two thirds of --runs, so that all take two minutes
RATE_WEI_PER_KWH = 10**17
POLL_MS = 250  # the 4 Hz of BRIDGE rule 13, ...
POLL_LATE_MS = 50  # ... its jitter,
BOX_LATE_MS = 80  # and how late a box passes a command on
AC_STOP_MS = 6_150  # a car that ignores the pilot is cut by the box (IEC 61851-1), and a contactor travels
DC_STOP_MS = 1_150  # a DC box switches its own power
STEP_MWH = 1_000
CREDIT_MIN_WH, CREDIT_S = 50, 15  # PROTOCOL section 5: max(50 Wh, P x 15 s)
SLICE_WH = 25
EVENING_S = 100  # an order is so much at full power
HORIZON_MS = 3_600_000  # virtual; late slices take long
NETWORK_MS = (20, 200)
LATE_MS = (1_000, 15_000)
TICK_MS = 250  # how often a consumer looks at what it could not sign
REPEAT_MS = 2_000
T0 = 1_790_000_000
PORT, SREF = "left", "bench-consumer-0123456789"
DOMAIN = Domain(1337, Address(b"\x11" * 20))
LIMITS = SigningLimits()

PLACES = tuple(site for site in SITES if site.name in ("3.7 kW", "11 kW", "22 kW", "50 kW DC"))
GUESTS = ("vanishes", "vanishes, its car deaf", "signs late", "signs less", "signs just enough")
HOSTS = ("reads high", "jumps", "talks late", "vanishes", "relays", "relays to a car without a meter")


# ---- the formulas


def stop_ms(site: Site) -> int:
    """The longest that power can flow after a stop was commanded."""
    return DC_STOP_MS if site.name.endswith("DC") else AC_STOP_MS


def credit_wh(site: Site) -> int:
    """U: what the provider lets go ahead of receipts."""
    return max(CREDIT_MIN_WH, site.power_w * CREDIT_S // 3_600)


def unseen_wh(site: Site) -> float:
    """P x (t_poll + t_stop) and a meter step: what flows until a decision has become an open contactor."""
    seconds = (POLL_MS + POLL_LATE_MS + BOX_LATE_MS + stop_ms(site)) / 1_000
    return site.power_w * seconds / 3_600 + STEP_MWH / 1_000


def provider_loss_wh(site: Site) -> float:
    """The most an honest provider can lose: U + P x (t_poll + t_stop) + a meter step."""
    return credit_wh(site) + unseen_wh(site)


def consumer_loss_wh(received_wh: float) -> float:
    """The most an honest consumer can lose: its allowance, and the tolerance between the two meters."""
    return LIMITS.pre_sign_wh + received_wh * LIMITS.tolerance_permille / 1_000


# ---- one evening


class Key:
    """An account."""

    def __init__(self, seed: bytes) -> None:
        self._key = coincurve.PrivateKey(hashlib.sha256(seed).digest())
        self.public_key = self._key.public_key.format(compressed=False)
        self.address = rules.address_of(self.public_key)

    def sign_digest(self, digest32: bytes) -> bytes:
        """Sign 32 bytes."""
        signature = self._key.sign_recoverable(digest32, hasher=None)
        return signature[:64] + bytes([27 + signature[64]])


PROVIDER, CONSUMER, SESSION = Key(b"provider"), Key(b"consumer"), Key(b"session")


class Memory:
    """The engine's journal without a disk: this bench measures energy, not fsync."""

    row_count = 0

    def replay(self) -> Book:
        """An empty past."""
        return Book(DOMAIN, PROVIDER.address)

    def append(self, event: ev.Event) -> None:
        """Believed."""

    def __len__(self) -> int:
        return 0


@dataclass(frozen=True, slots=True)
class Ended:
    """How one evening ended, Wh. `stops`: how often the box was told to stop."""

    provider_wh: float
    consumer_wh: float
    received_wh: float
    stops: int


class Evening:
    """Time, plant, box and car; both kinds of trade are played on it."""

    def __init__(self, chance: Random, site: Site, behaviour: str) -> None:
        self.chance, self.site, self.behaviour = chance, site, behaviour
        self.now_ms = 0
        self.turn_ms = chance.randint(5_000, EVENING_S * 700)  # when the behaviour begins
        self._queue: list[tuple[int, int, Callable[[], None]]] = []
        self._number = count()
        config = PlantConfig(
            voltage_mv=site.voltage_mv,
            phase_count=site.phase_count,
            current_ma_max=site.current_ma,
            current_ma_min=site.current_ma_min,
            ev_current_ma_max=site.current_ma,
            ev_lag_ms=chance.randint(*site.ev_lag_ms),
            ev_ramp_ma_per_s=chance.randint(*site.ev_ramp_ma_per_s),
            force_open_ms=stop_ms(site) - 150,
            register_mwh_begin=chance.randrange(10**9, 2 * 10**9),
        )
        self.plant = MeteredPlant(config)
        self.box = Box(self.plant, chance)
        self.has_lock = chance.random() < 0.5  # not every box can be stopped firmly
        self.fast_permille = chance.randint(1_020, 2_000) if behaviour == "reads high" else 1_000
        self.jump_mwh = chance.randint(1, 400) * 1_000 if behaviour == "jumps" else 0
        self.own_lag_ms = chance.randint(0, 1_500)
        self._own: list[tuple[int, int]] = [(0, 0)]

    @property
    def is_turned(self) -> bool:
        """The dishonest side has begun to be so."""
        return self.now_ms >= self.turn_ms

    def later(self, delay_ms: int, what: Callable[[], None]) -> None:
        """Do it then."""
        heapq.heappush(self._queue, (self.now_ms + delay_ms, next(self._number), what))

    def posted(self, what: Callable[[], None], *, late: bool = False) -> None:
        """Over the network."""
        self.later(self.chance.randint(*(LATE_MS if late else NETWORK_MS)), what)

    def play(self, over: Callable[[], bool]) -> None:
        """Until it is over; an evening that never ends is a bug."""
        while not over() and self.now_ms < HORIZON_MS:
            at_ms, _, what = heapq.heappop(self._queue)
            self.now_ms = max(at_ms, self.plant.now_ms)
            self.plant.advance(self.now_ms)
            what()

    def reading(self) -> Reading:
        """What the provider's meter shows, honest or not."""
        shown = look(self.plant, self.now_ms, STEP_MWH, 1_000)
        true_mwh = self.plant.delivered_mwh
        claimed_mwh = true_mwh * self.fast_permille // 1_000 + (self.jump_mwh if self.is_turned else 0)
        register_mwh = (self.plant.config.register_mwh_begin + claimed_mwh) // STEP_MWH * STEP_MWH
        return replace(shown, register_mwh=register_mwh)

    @property
    def received_mwh(self) -> int:
        """What truly went into the consumer's car: nothing, when somebody else's hangs at that plug."""
        return 0 if self.behaviour.startswith("relays") else self.plant.delivered_mwh

    def own_wh(self) -> int | None:
        """What the consumer's car shows, a little late."""
        if self.behaviour == "relays to a car without a meter":
            return None
        self._own.append((self.now_ms, self.received_mwh))
        while len(self._own) > 1 and self._own[1][0] <= self.now_ms - self.own_lag_ms:
            del self._own[0]
        return self._own[0][1] // 1_000

    def ended(self, signed_wh: int, credited_wh: int) -> Ended:
        """The books, once the last energy has flowed."""
        self.plant.advance(self.now_ms + 30_000)
        return Ended(
            self.plant.delivered_mwh / 1_000 - credited_wh,
            signed_wh - self.received_mwh / 1_000,
            self.received_mwh / 1_000,
            self.box.stops,
        )


class Trade:
    """Our protocol: receipts for what has flowed, credit for what has not been signed yet."""

    def __init__(self, chance: Random, site: Site, behaviour: str, *, guest: bool) -> None:
        self.world = Evening(chance, site, behaviour)
        self.guest_is = behaviour if guest else "honest"
        self.host_is = "honest" if guest else behaviour
        policy = Policy(max_unacked_wh={PORT: credit_wh(site)}, max_unfinal_wh=10**6)
        self.engine = Engine(Memory(), policy, lambda: self.world.now_ms)  # type: ignore[arg-type]
        self.door = Door(self.engine, DOMAIN, PROVIDER.address, PROVIDER, (PORT,), chance.randbytes)
        limits = Limits(
            site.current_ma_min, site.current_ma, site.phase_count, site.voltage_mv, STEP_MWH, POLL_MS
        )
        self.planner = StopPlanner(limits, site.model)
        self.held_since_ms: int | None = None
        self.at_target = False
        self.order_wh = site.power_w * EVENING_S // 3_600
        self.signed_wh = self.acked_wh = 0
        self.asked_wh, self.seq, self.posted_ms = 0, -1, 0
        self.share_permille = chance.randint(0, 990)
        self.is_met = False
        self.terms = self._connected()

    def _connected(self) -> ev.Terms:
        valid_until_s = T0 + 7_200
        session_id = rules.session_id(DOMAIN.chain_id, DOMAIN.contract, CONSUMER.address, PROVIDER.address, 1)
        token = rules.access_token(CONSUMER.address, PROVIDER.address, T0, valid_until_s)
        deposit_wei = cost_wei_floor(RATE_WEI_PER_KWH, self.order_wh) + 1
        block = BlockHash(b"\x04" * 32)
        terms = ev.Terms(
            session_id, token, CONSUMER.address, PROVIDER.address, 1, self.order_wh, RATE_WEI_PER_KWH, deposit_wei,
            deposit_wei, T0, valid_until_s, 5, block, 1, TxHash(b"\x06" * 32),
        )  # fmt: skip
        self._header()
        self.engine.accept(ev.ConnectedSeen(T0, terms))
        self.engine.accept(ev.ConnectedBelieved(T0, session_id, block))
        self.engine.accept(ev.ConnectedFinal(T0, session_id, block))
        return terms

    # ---- the provider

    def _header(self) -> None:
        number = 100 + self.world.now_ms // 12_000
        stamp = BlockHash(number.to_bytes(32, "big"))
        self.engine.observe(HeaderSeen(number, stamp, T0 + self.world.now_ms // 1_000))
        self.world.later(12_000, self._header)

    def beat(self) -> None:
        """As the charger's runner: read, report, ask what is owed, act."""
        world = self.world
        if self.host_is == "vanishes" and world.is_turned:
            world.box.tell(world.now_ms, 0)
            return
        reading = world.reading()
        self.planner.observe(reading)
        held_ms = 0 if self.held_since_ms is None or reading.seen_open else world.now_ms - self.held_since_ms
        seen = PortReading(
            world.now_ms, reading.register_mwh, reading.power_w, reading.pilot_state, reading.seen_open
        )
        self.engine.observe(PortRead(PORT, seen, armed=True, at_target=self.at_target, held_ms=held_ms))
        self._act()
        for _, message in self.door.news():
            if isinstance(message, ReadingMessage):
                world.posted(lambda told=message: self.hear(told), late=self.host_is == "talks late")  # type: ignore[misc]
        world.later(POLL_MS + world.chance.randint(0, POLL_LATE_MS), self.beat)

    def _act(self) -> None:
        world, now_ms = self.world, self.world.now_ms
        effect = next(one for one in self.engine.owed() if isinstance(one, Deliver | Hold))
        if isinstance(effect, Deliver):
            self.held_since_ms = None
            world.plant.lock(on=False, now_ms=now_ms)
            plan = self.planner.plan(now_ms, effect.register_mwh_stop, world.site.current_ma)
            self.at_target = plan.reached
            world.box.tell(now_ms, plan.current_ma)
            if plan.stop_at_ms is not None and plan.stop_at_ms < now_ms + POLL_MS:
                world.box.tell(plan.stop_at_ms, 0)
            return
        self.at_target = False
        if self.held_since_ms is None:
            self.held_since_ms = now_ms
        world.box.tell(now_ms, 0)
        if effect.firmness >= Firmness.LOCK and world.has_lock:
            world.plant.lock(on=True, now_ms=now_ms)

    def says(self, data: bytes) -> None:
        """To the door, and the answer back."""

        def arrives() -> None:
            answer = self.door.answer(SREF, SREF, data)
            if isinstance(answer, AckMessage):
                self.acked_wh = max(self.acked_wh, answer.delivered_wh)
            self.is_met = self.is_met or isinstance(answer, Accept)

        self.world.posted(arrives, late=self.guest_is == "signs late" and self.world.is_turned)

    # ---- the consumer

    def present(self) -> None:
        """Our token, until it is accepted."""
        hello = self.door.hello(PORT)
        nonce = self.world.chance.randbytes(32)
        grant = rules.PresentToken(
            self.terms.token, self.terms.session_id, PROVIDER.address, SESSION.address, self.order_wh,
            self.terms.valid_until_s, rules.challenge(hello.typed, nonce),
        )  # fmt: skip
        signature = CONSUMER.sign_digest(rules.digest(DOMAIN, grant))
        data = encode(
            Present(
                "eip712", grant.session_id, grant.token, hello.charger_id, hello.nonce, nonce, grant.session_key,
                grant.max_energy_wh, grant.valid_until_s, CONSUMER.public_key, signature,
            )
        )  # fmt: skip
        self.says(data)

    def hear(self, message: ReadingMessage) -> None:
        """A reading; older ones are replays."""
        if message.seq > self.seq:
            self.seq, self.asked_wh = message.seq, message.delivered_wh
            self.sign()

    def tick(self) -> None:
        """Look again at what could not be signed, and repeat what was not acknowledged."""
        self.sign()
        if self.signed_wh > self.acked_wh and self.world.now_ms - self.posted_ms >= REPEAT_MS:
            self._post()
        self.world.later(TICK_MS, self.tick)

    def sign(self) -> None:
        """What the policy allows, unless this consumer is a thief."""
        world = self.world
        wanted_wh = self.asked_wh
        if world.is_turned and self.guest_is.startswith("vanishes"):
            if self.guest_is.endswith("deaf"):
                world.plant.suffer(frozenset({"car_deaf"}), world.now_ms)
            return
        if world.is_turned and self.guest_is == "signs less":
            wanted_wh = wanted_wh * self.share_permille // 1_000
        if world.is_turned and self.guest_is == "signs just enough":
            wanted_wh = min(wanted_wh, wanted_wh - credit_wh(world.site) + 1)
        now = Situation(
            self.order_wh, self.signed_wh, max(0, wanted_wh), world.now_ms, world.own_wh(), confirmed=False
        )
        decision = decide(replace(LIMITS, power_w_max=world.site.power_w), now)
        if isinstance(decision, Sign):
            self.signed_wh = decision.energy_wh
            self._post()

    def _post(self) -> None:
        self.posted_ms = self.world.now_ms
        receipt = rules.Receipt(self.terms.session_id, self.signed_wh)
        signature = SESSION.sign_digest(rules.digest(DOMAIN, receipt))
        self.says(encode(ReceiptMessage(receipt.session_id, receipt.delivered_wh, signature)))

    # ---- the whole of it

    def is_over(self) -> bool:
        """The end intent is written, or the provider is gone and its box has stopped."""
        if self.host_is == "vanishes" and self.world.now_ms > self.world.turn_ms + 30_000:
            return True
        stage = self.engine.book.sessions[self.terms.session_id].stage
        return stage in (Stage.SETTLING, Stage.SETTLED)

    def played(self) -> Ended:
        """From the presentation to the end."""
        self.beat()
        self.world.later(600, self.present)
        self.world.later(1_000, self.tick)
        self.world.play(self.is_over)
        session = self.engine.book.sessions[self.terms.session_id]
        assert self.is_over(), (self.world.behaviour, session.stage)
        return self.world.ended(self.signed_wh, session.energy_wh_acked)


class Prepaid:
    """The peer: every 25 Wh are paid before they flow, and the power goes off when they are used up."""

    def __init__(self, chance: Random, site: Site, behaviour: str, *, guest: bool) -> None:
        self.world = Evening(chance, site, behaviour)
        self.guest_is = behaviour if guest else "honest"
        self.host_is = "honest" if guest else behaviour
        self.paid_wh = self.arrived_wh = 0
        self.order_wh = site.power_w * EVENING_S // 3_600
        self.quiet_ms = 0  # since when nothing moved
        self._last_mwh = -1

    def beat(self) -> None:
        """The provider: power while its meter is below what was paid."""
        world = self.world
        register_mwh = world.reading().register_mwh
        assert register_mwh is not None
        used_mwh = register_mwh - world.plant.config.register_mwh_begin // STEP_MWH * STEP_MWH
        gone = self.host_is == "vanishes" and world.is_turned
        world.box.tell(
            world.now_ms, world.site.current_ma if used_mwh < self.arrived_wh * 1_000 and not gone else 0
        )
        if used_mwh != self._last_mwh:
            self._last_mwh, self.quiet_ms = used_mwh, world.now_ms
        world.later(POLL_MS + world.chance.randint(0, POLL_LATE_MS), self.beat)

    def tick(self) -> None:
        """The consumer: the next slice when the last one has arrived, by its own meter."""
        world = self.world
        if self.guest_is.startswith("vanishes") and world.is_turned:
            if self.guest_is.endswith("deaf"):
                world.plant.suffer(frozenset({"car_deaf"}), world.now_ms)
            return
        received_wh = world.own_wh() or 0
        if self.paid_wh <= received_wh and self.paid_wh < self.order_wh:
            self.paid_wh = min(self.order_wh, self.paid_wh + SLICE_WH)
            world.posted(lambda wh=self.paid_wh: self._arrives(wh), late=self.guest_is == "signs late")  # type: ignore[misc]
        world.later(TICK_MS, self.tick)

    def _arrives(self, paid_wh: int) -> None:
        self.arrived_wh = max(self.arrived_wh, paid_wh)

    def played(self) -> Ended:
        """Until nothing has moved for as long as a session of ours would wait."""
        self.beat()
        self.tick()
        self.world.play(lambda: self.world.now_ms - self.quiet_ms > Policy({}).receipt_timeout_s * 1_000)
        return self.world.ended(self.paid_wh, self.arrived_wh)


# ---- many of them


@dataclass(frozen=True, slots=True)
class Worst:
    """The worst evenings of one site, one side, one kind of trade. `over_wh`: the most above its own evening's formula."""

    loss_wh: float
    over_wh: float
    formula_wh: float  # of the evening with the largest one
    behaviour: str


def _evenings(
    kind: type[Trade | Prepaid], site: Site, behaviour: str, runs: int, *, guest: bool
) -> list[Ended]:
    return [
        kind(Random(f"{site.name} {behaviour} {guest} {run}"), site, behaviour, guest=guest).played()
        for run in range(runs)
    ]


def worst(kind: type[Trade | Prepaid], site: Site, runs: int, *, guest: bool) -> Worst:
    """What the honest side lost at most. `guest`: the consumer is the thief, so it is the provider's loss."""
    found = []
    for behaviour in GUESTS if guest else HOSTS:
        for ended in _evenings(kind, site, behaviour, runs, guest=guest):
            loss_wh = ended.provider_wh if guest else ended.consumer_wh
            formula_wh = provider_loss_wh(site) if guest else consumer_loss_wh(ended.received_wh)
            found.append(Worst(loss_wh, loss_wh - formula_wh, formula_wh, behaviour))
    most = max(found, key=lambda one: one.loss_wh)
    return replace(
        most, over_wh=max(one.over_wh for one in found), formula_wh=max(one.formula_wh for one in found)
    )


def honest_stops(kind: type[Trade | Prepaid], site: Site, runs: int) -> float:
    """How often an honest evening's box is told to stop, on average."""
    ended = _evenings(kind, site, "honest", runs, guest=True)
    return sum(one.stops for one in ended) / len(ended)


def _cell(asked: tuple[Site, int]) -> tuple[dict[bool, tuple[Worst, Worst]], tuple[float, float]]:
    site, runs = asked
    losses = {
        guest: (worst(Trade, site, runs, guest=guest), worst(Prepaid, site, runs, guest=guest))
        for guest in (True, False)
    }
    few = max(2, runs // 4)
    return losses, (honest_stops(Trade, site, few), honest_stops(Prepaid, site, few))


def rows(runs: int) -> list[Row]:
    """For each site both sides' worst loss in Wh and in wei, and what the peer's smaller risk costs: stops."""
    runs = min(RUNS_MAX, max(runs * 2 // 3, RUNS_MIN))
    asked = [(site, runs) for site in reversed(PLACES)]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as processes:
        cells = dict(zip((site.name for site, _ in asked), processes.map(_cell, asked), strict=True))
    made: list[Row] = []
    for site in PLACES:
        losses, stops = cells[site.name]
        for guest in (True, False):
            made += _loss_rows(site, runs, *losses[guest], guest=guest)
        made.append(_stops_row(site, runs, *stops))
    return made


def _loss_rows(site: Site, runs: int, ours: Worst, peer: Worst, *, guest: bool) -> Sequence[Row]:
    side = "provider" if guest else "consumer"
    floor_wh = unseen_wh(site) if guest else None
    in_wh = Row(
        bench="exchange",
        metric=f"{site.name}: the {side}'s worst loss (the other {ours.behaviour})",
        unit="Wh",
        ours=round(ours.loss_wh, 1),
        goal=f"never above the formula ({ours.formula_wh:.1f} Wh at most)",
        met=ours.over_wh <= 0,
        runs=runs * len(GUESTS if guest else HOSTS),
        peer=round(peer.loss_wh, 1),
        peer_name=f"{SLICE_WH} Wh prepaid; the other {peer.behaviour}",
        floor=None if floor_wh is None else round(floor_wh, 1),
        floor_name="" if floor_wh is None else "no credit at all: a poll, a stop, a meter step",
    )
    in_wei = replace(
        in_wh,
        unit="wei",
        ours=_wei(ours.loss_wh),
        peer=_wei(peer.loss_wh),
        floor=None if floor_wh is None else _wei(floor_wh),
        goal=f"never above the formula ({_wei(ours.formula_wh)} wei at most, at {RATE_WEI_PER_KWH} wei per kWh)",
    )
    return in_wh, in_wei


def _wei(energy_wh: float) -> int:
    return RATE_WEI_PER_KWH * round(energy_wh * 1_000) // 1_000_000


def _stops_row(site: Site, runs: int, ours: float, peer: float) -> Row:
    return Row(
        bench="exchange",
        metric=f"{site.name}: stops in an honest evening of {site.power_w * EVENING_S // 3_600} Wh",
        unit="stops",
        ours=ours,
        goal="none but the end",
        met=ours <= 1,
        runs=max(2, runs // 4),
        peer=peer,
        peer_name=f"{SLICE_WH} Wh prepaid",
        floor=1.0,
        floor_name="the end",
    )
