"""The book under whatever order of facts Hypothesis can think of: two sessions, two forks, two ports, crashes, dead buses.

Nothing here knows the rules' code; the invariants are DESIGN's, said in other words and from the journal alone.
"""

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from story import (
    CONSUMER,
    OTHER_CONSUMER,
    T0,
    Story,
    believed,
    connect,
    hash32,
    head,
    presentation,
    presents,
    receipt,
    records,
    seen,
)

from agent.core import events as ev
from agent.core import token as rules
from agent.core.book import due
from agent.core.effects import BroadcastSettlement, Deliver, Hold, SignSettlement
from agent.core.events import StopReason
from agent.core.live import Policy
from agent.core.session import CLOSED, Stage
from agent.core.units import BlockHash, TxHash

PORTS = ("left", "right")
FORKS = {
    name: [connect(nonce, consumer=wallet, fork=fork, number=100 + nonce, order_wh=300) for fork in (0, 1)]
    for nonce, (name, wallet) in enumerate((("ann", CONSUMER), ("bob", OTHER_CONSUMER)), start=1)
}
WALLETS = {"ann": CONSUMER, "bob": OTHER_CONSUMER}
WHO, FORK = st.sampled_from(sorted(FORKS)), st.sampled_from([0, 1])
PORT_NAMES = st.sampled_from(PORTS)
POLICY = Policy(max_unacked_wh=dict.fromkeys(PORTS, 50), max_unfinal_wh=120)
UNACKED_SLACK_WH = 8  # what flows while we notice, at 2 Wh a second


class BookMachine(RuleBasedStateMachine):
    """One agent, two consumers, everything at any time."""

    def __init__(self):
        super().__init__()
        self.story = Story(policy=POLICY)
        self.acked: dict[bytes, int] = {}
        self.intents: dict[bytes, int] = {}
        self.impaired = False  # a weld or a dead bus may cost more than the limit

    @initialize(charging=st.lists(WHO, unique=True, max_size=2))
    def begin(self, charging):
        """A node is there; some consumers have come the usual way already, or few stories would get far."""
        _ = self.story >> head()
        for who, port in zip(charging, PORTS, strict=False):
            terms = FORKS[who][0]
            given = presentation(terms, consumer=WALLETS[who], port=port, sref=who)
            _ = self.story >> seen(terms) >> believed(terms) >> presents(terms, given)
        self.story.passes(3)

    def _session(self, who):
        return self.story.book.sessions.get(FORKS[who][0].session_id)

    def _accept(self, event):
        self.story.engine.accept(event)

    # ---- the chain

    @rule(who=WHO, fork=FORK)
    def is_seen(self, who, fork):
        """Its Connected appears, or appears again."""
        _ = self.story >> seen(FORKS[who][fork])

    @rule(who=WHO, fork=FORK)
    def is_believed(self, who, fork):
        """Deep enough."""
        terms = FORKS[who][fork]
        _ = self.story >> ev.ConnectedBelieved(self.story.at_s, terms.session_id, terms.block_hash)

    @rule(who=WHO, fork=FORK)
    def is_final(self, who, fork):
        """Not to be undone."""
        terms = FORKS[who][fork]
        _ = self.story >> ev.ConnectedFinal(self.story.at_s, terms.session_id, terms.block_hash)

    @rule(who=WHO, fork=FORK)
    def is_orphaned(self, who, fork):
        """A reorg."""
        terms = FORKS[who][fork]
        _ = self.story >> ev.ConnectedOrphaned(self.story.at_s, terms.session_id, terms.block_hash)

    @rule(who=WHO)
    def is_closing(self, who):
        """The consumer closes on chain."""
        terms = FORKS[who][0]
        _ = self.story >> ev.ConnectionClosingSeen(
            self.story.at_s, terms.session_id, 0, self.story.at_s + 43_200
        )

    @rule(who=WHO, energy_wh=st.integers(0, 300), block=st.integers(200, 202))
    def is_ended(self, who, energy_wh, block):
        """ConnectionEnded appears, paying whatever."""
        terms = FORKS[who][0]
        _ = self.story >> ev.ConnectionEndedSeen(
            self.story.at_s,
            terms.session_id,
            energy_wh,
            1,
            TxHash(hash32("end", block)),
            BlockHash(hash32("block", block)),
        )

    @rule(who=WHO, block=st.integers(200, 202))
    def end_is_orphaned(self, who, block):
        """... and falls out again."""
        terms = FORKS[who][0]
        _ = self.story >> ev.ConnectionEndedOrphaned(
            self.story.at_s, terms.session_id, BlockHash(hash32("block", block))
        )

    @rule(who=WHO, block=st.integers(200, 202))
    def end_is_believed(self, who, block):
        """... or is there to stay."""
        terms = FORKS[who][0]
        _ = self.story >> ev.ConnectionEndedBelieved(
            self.story.at_s, terms.session_id, BlockHash(hash32("block", block))
        )

    # ---- the consumer

    @rule(
        who=WHO, fork=FORK, port=PORT_NAMES, limit=st.sampled_from([40, 300, 10**6]), salt=st.integers(0, 1)
    )
    def presents(self, who, fork, port, limit, salt):
        """A verified presentation."""
        given = presentation(
            FORKS[who][fork], consumer=WALLETS[who], port=port, max_energy_wh=limit, sref=who, salt=salt
        )
        _ = self.story >> ev.TokenPresented(self.story.at_s, FORKS[who][fork].session_id, given)

    @precondition(lambda self: self.story.book.sessions)
    @rule(who=WHO, share=st.integers(0, 100))
    def signs(self, who, share):
        """A receipt for part of what the meter shows: what the door lets through."""
        session = self._session(who)
        if session is None or session.presentation is None:
            return
        shown = session.energy_wh(self.story.live.reading(session.presentation.port))
        _ = self.story >> receipt(shown * share // 100, session.session_id)

    @rule(who=WHO, reason=st.sampled_from(list(StopReason)))
    def is_stopped(self, who, reason):
        """Anybody with a right to says stop."""
        terms = FORKS[who][0]
        _ = self.story >> ev.StopDecided(self.story.at_s, terms.session_id, reason, "")

    # ---- the sender and the meter

    @rule(fee=st.integers(1, 3))
    def settlement_is_signed(self, fee):
        """Whatever is owed gets signed; sometimes it is replaced."""
        for effect in self.story.owed:
            if isinstance(effect, SignSettlement | BroadcastSettlement):
                wh = self.story.book.sessions[effect.session_id].energy_wh_acked
                raw = hash32("raw", effect.session_id, wh, fee)
                self._accept(
                    ev.SettlementSigned(
                        self.story.at_s, effect.session_id, wh, 7, TxHash(hash32(raw)), raw, fee, fee
                    )
                )

    @rule(who=WHO)
    def settlement_reverts(self, who):
        """It was mined and failed."""
        session = self._session(who)
        if session is not None and session.settlement is not None:
            self._accept(
                ev.SettlementReverted(
                    self.story.at_s, session.session_id, session.settlement.tx_hash, "NotActive"
                )
            )

    @rule()
    def records_are_signed(self):
        """The meter's key does its work."""
        _ = self.story >> records()

    # ---- the charger and the world

    @rule(
        port=PORT_NAMES,
        what=st.sampled_from(["welded", "silent", "armed", "stuck_at_none"]),
        on=st.booleans(),
    )
    def charger_changes(self, port, what, on):
        """Welded contacts, a dead bus, a failsafe that is not armed, a counter without a value."""
        setattr(self.story.outlets[port], what, on)

    @rule(port=PORT_NAMES, pilot=st.sampled_from("ABBBCF"))
    def plug_changes(self, port, pilot):
        """Plugged, unplugged, drawing, faulty."""
        self.story.outlets[port].pilot_state = pilot

    @rule(port=PORT_NAMES)
    def port_is_unlocked(self, port):
        """A technician was here."""
        _ = self.story >> ev.PortUnlocked(self.story.at_s, port)

    @rule(blind=st.booleans())
    def node_changes(self, blind):
        """The node goes and comes."""
        self.story.blind = blind

    @rule(seconds=st.sampled_from([1, 3, 30]))
    def time_passes(self, seconds):
        """Polls, beats, headers."""
        self.story.passes(seconds)

    @rule(seconds=st.sampled_from([5, 700, 14_000, 300_000]))
    def time_leaps(self, seconds):
        """The machine slept."""
        self.story.leaps(seconds)
        _ = self.story >> head()

    @rule(after_s=st.sampled_from([1, 20, 900]))
    def agent_restarts(self, after_s):
        """The process died."""
        self.story.restarts(after_s)

    # ---- what must hold whatever happens

    @invariant()
    def a_restart_would_know_the_same(self):
        """Replay of the accepted events is the book, to the last field."""
        assert self.story.journal.replay() == self.story.book

    @invariant()
    def energy_is_what_the_journal_says(self):
        """Closed segments add up, from the journal alone; nothing is created or lost."""
        opened, metered = {}, {}
        for event in self.story.journal.events:
            match event:
                case ev.DeliveryBegan(session_id=sid, register_mwh=register):
                    assert sid not in opened, "power offered twice without a register in between"
                    opened[sid] = register
                case (
                    ev.DeliveryPaused(session_id=sid, register_mwh=register)
                    | ev.DeliveryEnded(session_id=sid, register_mwh_end=register)
                ):
                    if sid in opened:
                        metered[sid] = metered.get(sid, 0) + max(0, register - opened.pop(sid))
        for sid, session in self.story.book.sessions.items():
            assert session.energy_mwh_metered == metered.get(sid, 0)
            assert (session.segment_mwh_begin is not None) == (sid in opened)

    @invariant()
    def two_sessions_never_share_energy(self):
        """What all sessions of a port were billed is at most what its register moved."""
        for port in PORTS:
            metered = sum(s.energy_mwh_metered for s in self.story.book.sessions.values() if s.port == port)
            moved = self.story.outlets[port].register_mwh - 5_000_000_000
            if all(s.port == port for s in self.story.book.sessions.values() if s.energy_mwh_metered):
                assert metered <= moved

    @invariant()
    def acknowledgements_only_grow_and_stay_within_the_order(self):
        """Neither a reorg nor a crash may forget what the consumer signed."""
        for sid, session in self.story.book.sessions.items():
            assert session.energy_wh_acked >= self.acked.get(sid, 0)
            assert session.energy_wh_acked <= session.terms.energy_wh_ordered
            self.acked[sid] = session.energy_wh_acked

    @invariant()
    def the_end_intent_is_a_one_way_door(self):
        """Once fixed, the delivered energy stays, and the session is never energised again."""
        for sid, session in self.story.book.sessions.items():
            if sid in self.intents:
                assert session.energy_wh_delivered == self.intents[sid]
                assert session.segment_mwh_begin is None
                assert session.stage not in (Stage.AUTHORISED, Stage.DELIVERING, Stage.PAUSED, Stage.MATCHED)
            elif session.energy_wh_delivered is not None:
                self.intents[sid] = session.energy_wh_delivered

    @invariant()
    def power_needs_entitlement(self):
        """Rule 2, said again without looking at the rule."""
        story = self.story
        for effect in story.owed:
            if not isinstance(effect, Deliver):
                continue
            session = story.book.sessions[effect.session_id]
            grant, terms, live = session.presentation, session.terms, story.live
            assert session.stage is Stage.DELIVERING
            assert grant.token == terms.token
            assert grant.port == effect.port
            assert (
                rules.access_token(terms.consumer, terms.provider, terms.issued_at_s, terms.valid_until_s)
                == grant.token
            )
            assert live.header is not None
            assert live.now_ms - live.header.seen_at_ms <= 61_000
            assert T0 <= live.at_s < terms.valid_until_s - 60
            reading = live.ports[effect.port].reading
            assert live.now_ms - reading.at_ms <= 2_000
            assert reading.fault is None
            assert reading.pilot_state in "BCD"
            assert live.ports[effect.port].armed
            assert effect.port not in story.book.locked_ports
            assert session.life == live.life, "power offered by a dead process"
            assert session.closing_at_s is None
            assert session.ended is None
            shown = session.energy_wh(reading)
            assert shown - session.energy_wh_acked < 50
            assert session.final or shown < 120
            assert effect.register_mwh_stop <= session.segment_mwh_begin + 300_000

    @invariant()
    def unacked_energy_is_bounded(self):
        """What a consumer may take without signing: the limit, and the seconds it takes to see and stop."""
        for outlet in self.story.outlets.values():
            self.impaired |= outlet.welded or outlet.silent or outlet.stuck_at_none
        for session in self.story.book.sessions.values() if not self.impaired else ():
            assert session.energy_mwh_metered // 1000 - session.energy_wh_acked <= 50 + UNACKED_SLACK_WH

    @invariant()
    def one_thing_is_owed_per_port(self):
        """Exactly one of Deliver and Hold, for each port, always."""
        ports = [effect.port for effect in self.story.owed if isinstance(effect, Deliver | Hold)]
        assert ports == list(PORTS)

    @invariant()
    def settlements_claim_what_is_acknowledged_and_collectable(self):
        """Never more than the consumer signed for, never without a proof that the contract takes."""
        for effect in self.story.owed:
            if not isinstance(effect, SignSettlement):
                continue
            session = self.story.book.sessions[effect.session_id]
            assert effect.energy_wh == session.energy_wh_acked
            assert effect.token == session.terms.token
            assert effect.energy_wh == 0 or rules.is_receipt_valid(
                self.story.book.domain,
                effect.ack,
                session_id=effect.session_id,
                provider=session.terms.provider,
                consumer=session.terms.consumer,
                energy_wh_ordered=session.terms.energy_wh_ordered,
                delivered_wh=effect.energy_wh,
            )

    @invariant()
    def nothing_more_is_due(self):
        """The engine ran its due events to the end: asking again finds nothing."""
        assert due(self.story.book, self.story.live) is None

    def teardown(self):
        """Whatever happened: give it time and a healthy charger, and it must come to an end, with its port free."""
        story = self.story
        for outlet in story.outlets.values():
            outlet.welded = outlet.silent = outlet.stuck_at_none = False
            outlet.armed, outlet.pilot_state = True, "B"
        story.blind = False
        for who in FORKS:
            self.is_stopped(who, StopReason.LOCAL)
        story.passes(40)
        story.leaps(4 * 3600 + 73 * 3600)
        story = story >> head()
        story.passes(40)
        story = story >> head() >> records() >> records() >> records() >> records()
        for session in story.book.sessions.values():
            assert session.stage in CLOSED | {Stage.SETTLING}, session.stage
            assert not session.holds_port


TestBookMachine = BookMachine.TestCase
TestBookMachine.settings = settings(stateful_step_count=40)
