"""A consumer as it is shipped, at a plug that may be Mallory's: real meeting, policy, charging and journal in the world's time.

    evening = relayed(Trick(...), folder)

The agent sells at the port "left", and a car hangs there. At an honest plug it is the guest's. In a relay it is Mallory's: the
guest stands at Mallory's box, which shows the agent's genuine Hello and passes every message on, so each signature is right.
Mallory's box has a charger of its own that gives nothing, or a trickle from Mallory's own battery, to look alive. As an overlay
it shows other Hellos instead.

Two promises more than the world's own: the guest pays for what its own car received and its allowance, no more; and what
was refused was refused by name.
"""

import asyncio
from dataclasses import dataclass, replace
from unittest.mock import patch

from simulation import world as stage
from simulation.checkers import promise
from simulation.consumers import STRANGER, Consumer, Order
from simulation.plant import Outlet
from simulation.weather import Storm
from simulation.world import Plan

from agent.consumer.carrier import Inbox
from agent.consumer.charging import Charging
from agent.consumer.journal import ConsumerJournal, Matched, OrderPlaced
from agent.consumer.meeting import Meeting
from agent.consumer.plug import Plug, Settlement, TokenChanged, Waits
from agent.consumer.policy import SigningLimits
from agent.core import token as rules
from agent.core.events import Terms
from agent.core.messages import decode, encode
from agent.core.units import BlockHash, TxHash
from agent.errors import Refused, Transient
from agent.keys import ephemeral_signer
from firmware_bridge.simulator.plant import PlantConfig

ORDER_WH = 150
TRICKLE_MA = 6_000
CALM = Storm()


@dataclass(frozen=True)
class Trick:
    """Where the guest stands, and what it has to see it with."""

    relays: bool = True  # Mallory's car hangs at the agent's plug, the guest's at Mallory's box
    trickles: bool = False  # Mallory's box delivers a little itself
    overlay: str = (
        ""  # the box shows: "stranger" another provider's Hello, "relabelled" one under our provider's name
    )
    car_measures: bool = True
    driver: str = ""  # what a driver who is asked says: "yes", "no", "" nothing
    pre_sign_wh: int = 25
    out_of_reach: tuple[int, int] = (
        0,
        0,
    )  # from what it received, Wh, for so many seconds: the phone hears and says nothing
    killed: bool = False  # and the app is not only out of reach, but gone, and started anew afterwards


class MallorysBox:
    """The other charger: a car may hang here, and a screen shows whatever Mallory likes. The `Carrier` of whoever stands here."""

    def __init__(self, guest, trick):
        self.guest, self.trick, self.world = guest, trick, guest.world
        self.trouble, self.inbox = "", Inbox()
        config = PlantConfig(phase_count=1, ev_current_ma_max=16_000)
        self.outlet = Outlet(self.world.now_ms, config=config)
        if trick.trickles:
            self.outlet.plant.set_limit(TRICKLE_MA, self.world.now_ms())
            self.outlet.plant.enable(on=True, now_ms=self.world.now_ms())

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def meet(self, provider):
        """It serves everybody."""

    async def ask_hello(self):
        """The agent's live Hello, copied; or what Mallory has put over it."""
        topic = f"{self.world.broker.root}/hello/0x{rules.charger_id(self.guest.order.port).hex()}"
        kept = self.world.broker.retained.get(topic)
        if kept is not None:
            self.inbox.put(encode(self._shown(decode(kept))))

    def _shown(self, hello):
        if not self.trick.overlay:
            return hello
        strangers = replace(hello.typed, provider=STRANGER.address)
        signature = STRANGER.sign(strangers, self.world.chain.market.domain)
        shown = replace(hello, provider=STRANGER.address, signature=signature)
        return shown if self.trick.overlay == "stranger" else replace(shown, provider=hello.provider)

    async def post(self, kind, data):
        """Passed on, word for word: the agent cannot tell."""
        if self.guest.is_out_of_reach():
            return
        self.guest.said(kind, data)
        self.world.broker.says(self.guest.sref, data)

    async def next(self, timeout_s):
        """What the agent answers."""
        return await self.inbox.next(timeout_s)


class SeenChain:
    """The world's chain, as a consumer's node shows it."""

    def __init__(self, world):
        self.chain = world.chain

    async def signers(self, provider):
        """Owner and operator of this provider; nobody else has one here."""
        market = self.chain.market
        return frozenset({provider, market.operator} if provider == market.provider else {provider})

    async def now_s(self):
        """The newest block's time."""
        return self.chain.head.timestamp_s

    async def is_open(self, token):
        """Not settled."""
        return token in self.chain.state.sessions

    async def settlement(self, terms):
        """How it ended."""
        ended = self.chain.state.ended.get(terms.token)
        return (
            None
            if ended is None
            else Settlement(*ended, TxHash(bytes(32)), self.chain.head.number, bytes(32))
        )


class Guest(Consumer):
    """On chain it does as every consumer here; at the plug it is the one that is shipped."""

    def __init__(self, world, number, order, trick):
        super().__init__(world, number, order)
        self.trick = trick
        self.box = MallorysBox(self, trick)
        self.refused = ""  # why it went away
        self.asked = 0  # how often its driver was asked
        self._stop, self._confirmed = asyncio.Event(), asyncio.Event()
        self._task = self._gone_ms = None

    def hears(self, payload):
        """Through Mallory's box, or at the honest plug: the same words."""
        self.world.was_told(decode(payload))
        if not self.is_out_of_reach():
            self.box.inbox.put(payload)

    def is_out_of_reach(self):
        """In a tunnel, asleep, or with an empty battery."""
        from_wh, for_s = self.trick.out_of_reach
        if for_s and self._gone_ms is None and self.received_mwh() >= from_wh * 1000:
            self._gone_ms = self.world.now_ms()
            self.world.tell("the phone is out of reach")
            if self.trick.killed:
                self._task.cancel()
        return self._gone_ms is not None and self.world.now_ms() < self._gone_ms + for_s * 1000

    def said(self, kind, data):
        """For the world's checkers."""
        if kind == "present":
            self.presented_tokens.add(self.token)
        if kind == "receipt":
            self.signed_wh = max(self.signed_wh, decode(data).delivered_wh)

    def received_mwh(self):
        """What truly went into its own car."""
        return self.box.outlet.delivered_mwh if self.trick.relays else self.world.true_mwh(self.session_id)

    def _present(self, session):
        app_is_off = self._task is None or self._task.cancelled()
        if app_is_off and not self.is_out_of_reach():
            self._task = asyncio.create_task(self._charge(session), name="guest")

    def _repeat_receipt(self):
        """The real one repeats itself."""

    def _tell(self, progress):
        if progress.asks_driver:
            self.asked += 1
            if self.trick.driver:
                (self._confirmed if self.trick.driver == "yes" else self._stop).set()

    async def _charge(self, session):
        journal = ConsumerJournal(
            self.world.folder / f"{self.sref}.sqlite",
            self.world.chain.market.domain,
            self.address,
            self.world.chain_time_s,
        )
        terms = self._terms(session)
        if journal.errand is None:
            order = (terms.auction_nonce, terms.energy_wh_ordered, 10**18, 60, 900, 1, self.sref)
            journal.write(OrderPlaced(1, *order))
            journal.write(Matched(1, terms))
        plug = Plug(
            domain=self.world.chain.market.domain,
            terms=terms,
            account=self.key,
            session_key=ephemeral_signer(b"guest's session"),
            carrier=self.box,
            journal=journal,
            chain=SeenChain(self.world),
            limits=SigningLimits(power_w_max=32_000, pre_sign_wh=self.trick.pre_sign_wh),
            waits=Waits(),
            tell=self._tell,
            now_ms=self.world.now_ms,
        )
        try:
            await Meeting(plug, self.order.port).meet()
            await Charging(plug, self._stop, self._own_wh, self._confirmed).charge()
        except (Refused, Transient, TokenChanged) as why:
            self.refused = getattr(why, "reason", type(why).__name__)
        finally:
            journal.close()

    def _own_wh(self):
        return self.received_mwh() // 1000 if self.trick.car_measures else None

    def _terms(self, session):
        token = self.token
        return Terms(
            session_id=self.session_id,
            token=token,
            consumer=self.address,
            provider=session.provider,
            auction_nonce=session.auction_nonce,
            energy_wh_ordered=session.energy_wh,
            rate_wei_per_kwh=session.rate,
            deposit_wei=session.deposit,
            bond_wei=session.deposit,
            issued_at_s=session.valid_until_s - self.order.validity_s,
            valid_until_s=session.valid_until_s,
            block_number=self.world.chain.head.number,
            block_hash=BlockHash(bytes(32)),
            log_index=0,
            tx_hash=TxHash(bytes(32)),
        )


def guest_pays_for_its_own_energy(world):
    """What its own car received, the tolerance between the meters, and its allowance; not a Wh of what went into Mallory's."""
    (guest,) = world.consumers.values()
    settled_wh, _ = world.chain.state.ended.get(guest.token, (0, 0))
    received_wh = guest.received_mwh() // 1000 + 1
    limits = SigningLimits()
    bound_wh = received_wh * (1000 + limits.tolerance_permille) // 1000 + limits.pre_sign_wh
    promise(settled_wh <= bound_wh, "the guest pays for another car", settled=settled_wh, bound=bound_wh)


@dataclass(frozen=True)
class Evening:
    """How it ended, in Wh: what the guest pays for, what its own car got, what went out of the agent's plug."""

    outcome: stage.Outcome
    guest: Guest
    settled_wh: int
    received_wh: float
    given_wh: float


def relayed(trick, folder, storm=CALM, seed=0):
    """The evening of one guest; in a storm, if you like."""
    guests, energies = [], []

    def guest(world, number, order):
        guests.append(Guest(world, number, order, trick))
        return guests[0]

    def measured(world):
        (one,) = guests
        settled_wh, _ = world.chain.state.ended.get(one.token, (0, 0))
        energies.extend((settled_wh, one.received_mwh() / 1000, world.true_mwh(one.session_id) / 1000))

    with patch.object(stage, "Consumer", guest):
        checks = (measured, guest_pays_for_its_own_energy)
        outcome = stage.run(Plan(seed=seed, orders=(Order(ORDER_WH),), storm=storm), folder, also=checks)
    return Evening(outcome, guests[0], *(energies or (0, 0.0, 0.0)))
