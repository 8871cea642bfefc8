"""A core test reads like a script: facts come in with `>>`, time passes, and the stage and what is owed are looked at.

    story = Story() >> seen(TERMS) >> believed(TERMS) >> head() >> presents(TERMS) >> rests() >> rests()
    story.expect(Stage.DELIVERING, Deliver("left", ...))
    story.passes(60)

Real engine, real core, real keys (coincurve); the journal is a list, the charger is six lines of arithmetic, the chain is
what the script says. One second of `passes` is one poll of the port and one engine beat; a header comes every twelve.
Nothing here reads a clock or draws a random number.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import coincurve

from agent.core import events as ev
from agent.core import token as rules
from agent.core.book import Book, step
from agent.core.effects import Deliver, Effect, Hold, SignMeterRecord
from agent.core.events import Event, Presentation, StopReason, Terms
from agent.core.live import Beat, HeaderSeen, Live, Policy, PortLost, PortRead, PortReading
from agent.core.session import Session, Stage
from agent.core.token import ZERO_ADDRESS, Ack, Domain
from agent.core.units import Address, BlockHash, SessionId, TxHash
from agent.engine import Engine

T0 = 1_790_000_000  # chain time when the evening begins; every `connect` below is mined at this second
REGISTER = 5_000_000_000  # where the meter stands, mWh
POWER_W = 7_200  # 2 Wh a second: easy to reckon with
BLOCK_S = 12
PORT = "left"
GAP_S_MAX = 1_000_000


class Wallet:
    """An account whose key is a small number: the same in every run."""

    def __init__(self, secret: int) -> None:
        self.private = coincurve.PrivateKey(secret.to_bytes(32, "big"))
        self.public_key = self.private.public_key.format(compressed=False)
        self.address: Address = rules.address_of(self.public_key)

    def sign_digest(self, digest32: bytes) -> bytes:
        """65 bytes, v 27/28, low s."""
        signature = self.private.sign_recoverable(digest32, hasher=None)
        return signature[:64] + bytes([27 + signature[64]])

    def sign(self, message: rules.TypedMessage, domain: Domain | None = None) -> bytes:
        """The message's EIP-712 signature."""
        return self.sign_digest(rules.digest(domain or DOMAIN, message))


PROVIDER, OPERATOR, CONSUMER, SESSION_KEY, STRANGER, METER = (Wallet(secret) for secret in range(1001, 1007))
OTHER_CONSUMER = Wallet(1007)
DOMAIN = Domain(31_337, Address(bytes.fromhex("c0" * 20)))


def hash32(*parts: object) -> bytes:
    """A hash that depends on its parts, for blocks and transactions."""
    return rules.keccak(repr(parts).encode())


def connect(
    nonce: int = 1,
    *,
    order_wh: int = 1_000,
    consumer: Wallet = CONSUMER,
    valid_for_s: int = 4 * 3600,
    issued_at_s: int = T0,
    number: int = 100,
    fork: int = 0,
) -> Terms:
    """What the chain says of one `connect`; `fork` re-mines it in another block, with another time and so another token."""
    issued_at_s += fork
    valid_until_s = issued_at_s + valid_for_s
    return Terms(
        session_id=rules.session_id(
            DOMAIN.chain_id, DOMAIN.contract, consumer.address, PROVIDER.address, nonce
        ),
        token=rules.access_token(consumer.address, PROVIDER.address, issued_at_s, valid_until_s),
        consumer=consumer.address,
        provider=PROVIDER.address,
        auction_nonce=nonce,
        energy_wh_ordered=order_wh,
        rate_wei_per_kwh=3 * 10**17,
        deposit_wei=3 * 10**14 * order_wh,
        bond_wei=3 * 10**14 * order_wh,
        issued_at_s=issued_at_s,
        valid_until_s=valid_until_s,
        block_number=number,
        block_hash=BlockHash(hash32("block", number, fork)),
        log_index=1,
        tx_hash=TxHash(hash32("connect", nonce)),
    )


TERMS = connect()
POLICY = Policy(max_unacked_wh={PORT: 50})


def sold(opened: Terms, at_s: int, life: int, acked_wh: int, ack: Ack) -> Iterator[Event]:
    """From the token to a settlement that is owed, for tests of being paid: nobody looks at the token's signature there."""
    sid, begin_mwh = opened.session_id, 5_000
    given = Presentation(
        "s" * 32, "left", "eip191", opened.token, ZERO_ADDRESS, 0, opened.valid_until_s, bytes(32), b"", b""
    )
    yield ev.TokenPresented(at_s, sid, given)
    yield ev.SessionAccepted(at_s, sid, begin_mwh)
    yield ev.DeliveryBegan(at_s, sid, begin_mwh, life)
    if acked_wh:
        yield ev.ReceiptCredited(at_s, sid, acked_wh, ack)
    yield ev.StopDecided(at_s, sid, StopReason.REMOTE, "enough")
    yield ev.DeliveryEnded(at_s, sid, begin_mwh + acked_wh * 1000, seen_open=True)


def presentation(
    terms: Terms = TERMS,
    *,
    port: str = PORT,
    consumer: Wallet = CONSUMER,
    session_key: Wallet | None = SESSION_KEY,
    max_energy_wh: int = 10**6,
    sref: str = "phone",
    salt: object = 0,
) -> Presentation:
    """A consumer's presentation as the door journals it, truly signed. Without a session key it is `personal_sign`."""
    challenge = hash32("challenge", terms.token, port, salt)
    if session_key is None:
        signature = consumer.sign_digest(rules.token_digest_eip191(terms.token))
        key, max_energy_wh = ZERO_ADDRESS, 0
    else:
        key = session_key.address
        signature = consumer.sign(
            rules.PresentToken(
                terms.token,
                terms.session_id,
                PROVIDER.address,
                key,
                max_energy_wh,
                terms.valid_until_s,
                challenge,
            )
        )
    return Presentation(
        sref,
        port,
        "eip191" if session_key is None else "eip712",
        terms.token,
        key,
        max_energy_wh,
        terms.valid_until_s,
        challenge,
        signature,
        hash32("presented", signature, salt),
    )


def ack_of(session: Session, energy_wh: int, *, session_key: Wallet = SESSION_KEY) -> Ack:
    """A receipt for this much, truly signed by the key that the session's presentation grants."""
    grant = session.presentation
    assert grant is not None
    delegated = grant.session_key != ZERO_ADDRESS
    signer = session_key if delegated else CONSUMER
    return Ack(
        grant.token,
        grant.session_key,
        grant.max_energy_wh,
        grant.valid_until_s,
        grant.challenge,
        grant.signature if delegated else b"",
        signer.sign(rules.Receipt(session.session_id, energy_wh)),
    )


class ListJournal:
    """The journal as a list. `fail_next` makes it fail once, as a full disk would."""

    def __init__(self, provider: Address = PROVIDER.address) -> None:
        self.events: list[Event] = []
        self.provider = provider
        self.fail_next = False

    def append(self, event: Event) -> None:
        """Keep it, or fail."""
        if self.fail_next:
            self.fail_next = False
            raise OSError("disk full")
        self.events.append(event)

    def __len__(self) -> int:
        return len(self.events)

    def replay(self) -> Book:
        """The book that these events make."""
        book = Book(DOMAIN, self.provider)
        for event in self.events:
            book = step(book, event)
        return book


@dataclass
class Outlet:
    """A charging port and the car behind it."""

    register_mwh: int = REGISTER
    pilot_state: str = "B"
    power_w: int = POWER_W  # what the car draws as soon as power is offered
    welded: bool = False  # the contactor does not open any more
    silent: bool = False  # the bus is dead
    armed: bool = True
    fault: str | None = None
    soc_permille: int | None = None
    closed: bool = False
    held_s: int = 0
    stuck_at_none: bool = False  # the counter shows its sentinel

    def second(self, effect: Effect) -> None:
        """One second under this effect."""
        if isinstance(effect, Deliver):
            self.closed, self.held_s = self.power_w > 0, 0
        elif not self.welded:
            self.closed = False
        if self.closed:
            self.register_mwh += self.power_w * 1000 // 3600
        self.held_s = self.held_s + 1 if self.closed and isinstance(effect, Hold) else 0

    def reading(self, at_ms: int) -> PortReading:
        """What a poll sees."""
        return PortReading(
            at_ms=at_ms,
            register_mwh=None if self.stuck_at_none else self.register_mwh,
            power_w=self.power_w if self.closed else 0,
            pilot_state="C" if self.closed and self.pilot_state == "B" else self.pilot_state,
            seen_open=not self.closed,
            fault=self.fault,
            soc_permille=self.soc_permille,
        )


@dataclass
class Story:
    """One agent, told event by event. `>>` takes events, updates and the little verbs below; it returns the story."""

    policy: Policy = POLICY
    journal: ListJournal = field(default_factory=ListJournal)
    now_ms: int = 5_000_000
    chain_ahead_s: int = T0 - 5_000  # chain time minus monotonic seconds
    head_number: int = 102
    blind: bool = False  # no headers arrive
    signing: bool = False  # the consumer signs for every Wh as it comes

    def __post_init__(self) -> None:
        self.outlets = {port: Outlet() for port in sorted(self.policy.max_unacked_wh)}
        self.engine = self._start()

    def _start(self) -> Engine:
        return Engine(self.journal, self.policy, lambda: self.now_ms)  # type: ignore[arg-type]

    # ---- facts

    def __rshift__(self, fact: "Event | PortRead | PortLost | HeaderSeen | Beat | Verb") -> "Story":
        if callable(fact):
            fact(self)
        elif isinstance(fact, Event):
            self.engine.accept(fact)
            self.engine.observe(Beat())
        else:
            self.engine.observe(fact)
        return self

    @property
    def at_s(self) -> int:
        """The chain's own time now."""
        return self.now_ms // 1000 + self.chain_ahead_s

    def passes(self, seconds: int) -> "Story":
        """Time passes: polls, beats, a header every twelve seconds, energy where power is offered."""
        assert 0 <= seconds < GAP_S_MAX
        for _ in range(seconds):
            self._second()
        return self

    def _second(self) -> None:
        self.now_ms += 1000
        for port, outlet in self.outlets.items():
            outlet.second(self.on_port(port))
            if outlet.silent:
                self.engine.observe(PortLost(port))
            else:
                self.engine.observe(
                    PortRead(port, outlet.reading(self.now_ms), outlet.armed, held_ms=outlet.held_s * 1000)
                )
        if not self.blind and self.at_s % BLOCK_S == 0:
            head()(self)
        self.engine.observe(Beat())
        if self.signing:
            self._sign_what_is_delivered()

    def _sign_what_is_delivered(self) -> None:
        for session in self.engine.book.open_sessions():
            if session.port is None or session.settlement is not None:
                continue
            delivered_wh = session.energy_wh(self.engine.live.reading(session.port))
            if delivered_wh > session.energy_wh_acked:
                _ = self >> receipt(delivered_wh, session.session_id)

    def leaps(self, seconds: int) -> "Story":
        """Time passes while nobody looks: the process was stopped, or the machine slept."""
        self.now_ms += seconds * 1000
        return self

    def restarts(self, after_s: int = 10) -> "Story":
        """The process dies and comes back: what is journaled remains, what is only live is gone, power goes off."""
        self.now_ms += after_s * 1000
        for outlet in self.outlets.values():
            outlet.held_s = 0
            if not outlet.welded:
                outlet.closed = False
        self.engine = self._start()
        return self

    # ---- looks

    @property
    def book(self) -> Book:
        """The journaled facts."""
        return self.engine.book

    @property
    def live(self) -> Live:
        """What is true now."""
        return self.engine.live

    @property
    def session(self) -> Session:
        """The only session."""
        (session,) = self.book.sessions.values()
        return session

    @property
    def stage(self) -> Stage:
        """The only session's stage."""
        return self.session.stage

    @property
    def owed(self) -> tuple[Effect, ...]:
        """Everything owed."""
        return self.engine.owed()

    def owed_of(self, kind: type[Effect]) -> list[Effect]:
        """Owed effects of one kind."""
        return [effect for effect in self.owed if isinstance(effect, kind)]

    def on_port(self, port: str = PORT) -> Deliver | Hold:
        """The one thing owed on this port."""
        (effect,) = [e for e in self.owed if isinstance(e, Deliver | Hold) and e.port == port]
        return effect

    @property
    def delivering(self) -> bool:
        """True while power is owed on the first port."""
        return isinstance(self.on_port(), Deliver)

    def expect(self, stage: Stage, *effects: Effect) -> "Story":
        """The only session's stage and everything owed, to the letter."""
        assert self.stage is stage, (self.stage, self.session.stop_detail)
        assert self.owed == effects
        return self

    @property
    def kinds(self) -> list[str]:
        """Names of the journaled events, in order."""
        return [type(event).__name__ for event in self.journal.events]

    @property
    def outlet(self) -> Outlet:
        """The first port's hardware."""
        return self.outlets[PORT]


Verb = Callable[[Story], object]


def _event(make: Callable[[Story], Event]) -> Verb:
    return lambda story: story >> make(story)


def _sid(story: Story, session_id: SessionId | None) -> SessionId:
    return story.session.session_id if session_id is None else session_id


def head(number: int | None = None, at_s: int | None = None) -> Verb:
    """A new believed head, now."""

    def verb(story: Story) -> None:
        story.head_number = number if number is not None else story.head_number + 1
        timestamp_s = story.at_s if at_s is None else at_s
        block_hash = BlockHash(hash32("block", story.head_number))
        story.engine.observe(HeaderSeen(story.head_number, block_hash, timestamp_s))

    return verb


def passes(seconds: int) -> Verb:
    """Time passes."""
    return lambda story: story.passes(seconds)


def seen(terms: Terms = TERMS) -> Verb:
    """Its `Connected` appears."""
    return _event(lambda story: ev.ConnectedSeen(story.at_s, terms))


def believed(terms: Terms = TERMS) -> Verb:
    """Its `Connected` is deep enough."""
    return _event(lambda story: ev.ConnectedBelieved(story.at_s, terms.session_id, terms.block_hash))


def final(terms: Terms = TERMS) -> Verb:
    """Its `Connected` cannot be undone."""
    return _event(lambda story: ev.ConnectedFinal(story.at_s, terms.session_id, terms.block_hash))


def orphaned(terms: Terms = TERMS) -> Verb:
    """Its block falls out of the chain."""
    return _event(lambda story: ev.ConnectedOrphaned(story.at_s, terms.session_id, terms.block_hash))


def closing(energy_wh: int = 0) -> Verb:
    """The consumer opens a close on chain."""
    return _event(
        lambda story: ev.ConnectionClosingSeen(
            story.at_s, story.session.session_id, energy_wh, story.at_s + 12 * 3600
        )
    )


def ended(energy_wh: int, *, block: int = 200) -> Verb:
    """`ConnectionEnded` appears."""
    return _event(
        lambda story: ev.ConnectionEndedSeen(
            story.at_s,
            story.session.session_id,
            energy_wh,
            energy_wh * 3 * 10**14,
            TxHash(hash32("end", block)),
            BlockHash(hash32("block", block)),
        )
    )


def ended_believed(block: int = 200) -> Verb:
    """That `ConnectionEnded` is deep enough."""
    return _event(
        lambda story: ev.ConnectionEndedBelieved(
            story.at_s, story.session.session_id, BlockHash(hash32("block", block))
        )
    )


def ended_orphaned(block: int = 200) -> Verb:
    """That `ConnectionEnded` falls out of the chain."""
    return _event(
        lambda story: ev.ConnectionEndedOrphaned(
            story.at_s, story.session.session_id, BlockHash(hash32("block", block))
        )
    )


def presents(terms: Terms = TERMS, given: Presentation | None = None) -> Verb:
    """The consumer presents the token, and the door found it good."""
    taken = given or presentation(terms)
    return _event(lambda story: ev.TokenPresented(story.at_s, terms.session_id, taken))


def receipt(energy_wh: int, session_id: SessionId | None = None) -> Verb:
    """The consumer signs for this much in total."""

    def make(story: Story) -> Event:
        session = story.book.sessions[_sid(story, session_id)]
        return ev.ReceiptCredited(story.at_s, session.session_id, energy_wh, ack_of(session, energy_wh))

    return _event(make)


def stops(reason: ev.StopReason = ev.StopReason.REMOTE) -> Verb:
    """Somebody says stop."""
    return _event(lambda story: ev.StopDecided(story.at_s, story.session.session_id, reason, "asked"))


def settles(energy_wh: int | None = None, *, nonce: int = 7, fee: int = 10**9) -> Verb:
    """The sender signs and journals what is owed."""

    def make(story: Story) -> Event:
        wh = story.session.energy_wh_acked if energy_wh is None else energy_wh
        raw = b"raw" + hash32(wh, nonce, fee)
        return ev.SettlementSigned(
            story.at_s,
            story.session.session_id,
            wh,
            nonce,
            TxHash(rules.keccak(raw)),
            raw,
            fee,
            fee // 10,
        )

    return _event(make)


def reverts(error: str = "UnknownToken") -> Verb:
    """The settlement is mined and fails."""

    def make(story: Story) -> Event:
        assert story.session.settlement is not None
        return ev.SettlementReverted(
            story.at_s, story.session.session_id, story.session.settlement.tx_hash, error
        )

    return _event(make)


def records() -> Verb:
    """The meter record that is owed gets signed."""

    def verb(story: Story) -> None:
        for effect in story.owed_of(SignMeterRecord):
            assert isinstance(effect, SignMeterRecord)
            story.engine.accept(
                ev.MeterRecordSigned(
                    story.at_s, effect.session_id, effect.moment, f"OCMF|{effect.pagination}|"
                )
            )

    return verb


def matched(**more: object) -> Story:
    """A story that already has a believed session, a fresh header and a plugged car at rest."""
    return Story(**more) >> head() >> seen() >> believed() >> passes(2)  # type: ignore[arg-type]


def authorised(**more: object) -> Story:
    """... whose token was presented and taken, with the charger's failsafe not armed yet."""
    story = matched(**more)
    story.outlet.armed = False
    return story >> passes(1) >> presents() >> records()


def delivering(**more: object) -> Story:
    """... and which delivers, with the begin record signed."""
    story = matched(**more) >> presents() >> records()
    assert story.stage is Stage.DELIVERING
    return story


def at(stage: Stage) -> Story:
    """A story at this stage, by the shortest honest road."""
    match stage:
        case Stage.MATCHED:
            return matched()
        case Stage.AUTHORISED:
            return authorised()
        case Stage.DELIVERING:
            return delivering().passes(5)
        case Stage.PAUSED:
            story = delivering().passes(5)
            story.outlet.armed = False
            return story.passes(3)
        case Stage.STOPPING:
            return delivering().passes(5) >> receipt(4) >> stops()
        case Stage.SETTLING:
            return (at(Stage.STOPPING) >> receipt(8)).passes(25) >> records()
        case Stage.ORPHANED:
            return (at(Stage.PAUSED) >> receipt(5)) >> orphaned()
        case Stage.SETTLED:
            return at(Stage.SETTLING) >> settles() >> ended(8) >> ended_believed()
        case Stage.STRANDED:
            return at(Stage.SETTLING) >> settles() >> ended(3) >> ended_believed()
        case Stage.LAPSED:
            return _lapsed(at(Stage.ORPHANED))


def _lapsed(story: Story) -> Story:
    story.leaps(4 * 3600 + 73 * 3600)
    return story >> head() >> Beat()


def session_like(story: Story, **changes: object) -> Session:
    """The only session with some fields changed, for looking at one rule alone."""
    return replace(story.session, **changes)  # type: ignore[arg-type]
