"""Where a consumer meets the agent. Messages come in as bytes with a return address, one message goes back; always, and named.

Order of checks (PROTOCOL section 4), cheap before dear: size -> schema -> rate of this source, then of its crowd -> known session
-> the very same presentation again? same answer -> nonce live -> canonical signature -> recover. The Hello's nonce is used
up only after the signer is verified, so a stranger cannot burn it. A refusal consumes nothing and delays nobody else's session.
A crowd is everybody who speaks of one session over one transport, or over it of none that we expect: a flood on the broker
keeps nobody out at the web server, and noise about nothing keeps nobody out who holds a real token.

May not know: transports (MQTT, HTTP), disks, the charger's wire. Both transports carry the same messages through one Door.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, TypeVar

from agent.core import events as ev
from agent.core import token as rules
from agent.core.events import Presentation, StopReason, Terms
from agent.core.live import Beat
from agent.core.messages import (
    SREF_LENGTH_MAX,
    Accept,
    AckMessage,
    Final,
    Hello,
    Message,
    Present,
    ReadingMessage,
    ReceiptMessage,
    Refusal,
    Status,
    Stop,
    decode,
)
from agent.core.session import CLOSED, Session, Stage, hindrance
from agent.core.token import ZERO_ADDRESS, Ack, Domain, TypedMessage
from agent.core.units import Address, SessionId, TxHash
from agent.engine import Engine
from agent.errors import Refused

HELLO_ROTATE_S = 30  # a photographed QR code is stale soon
HELLO_LIFETIME_S = 120  # time for a human to unlock a phone and sign
HELLOS_MAX = 16  # live nonces per port: rotation fills 4; the rest is headroom for used ones
SOURCES_MAX = (
    1024  # rate buckets kept; the least recently seen goes first, so memory stays flat under a flood
)
SOURCE_RATE = (10.0, 5.0)  # burst and per second: a receipt per second and retries pass, a flood does not
# Of a crowd: a thousand recoveries a second are a tenth of a core, and among two thousand forgeries a second an honest token
# is looked at with its second knock.
GLOBAL_RATE = (1000.0, 1000.0)
CROWDS_MAX = 256  # sessions at the plug and awaited ones (64 at most), over two transports, and the rest
PRESENT_EVERY_MS = 10_000  # a new presentation is a journal row: a paying consumer must not fill the disk
# What fits an MQTT topic level and an HTTP header: no separators, no wildcards.
SREF_FORM = re.compile(rf"[A-Za-z0-9._~@:=-]{{1,{SREF_LENGTH_MAX}}}")
READING_INTERVAL_MS = 500
NEWS_KEPT_S = 24 * 3600  # for how long a closed session's final message is still offered
_Key = TypeVar("_Key")
BUSY_STAGES = frozenset({Stage.AUTHORISED, Stage.DELIVERING, Stage.PAUSED, Stage.STOPPING})


class OperatorSigner(Protocol):
    """The operator key, as keys.py hands it out: deterministic (RFC 6979) signatures, 65 bytes, low s."""

    address: Address

    def sign_digest(self, digest32: bytes) -> bytes:
        """Sign 32 bytes."""


@dataclass(slots=True)
class _Bucket:
    """A token bucket. Floats are fine here: it counts politeness, not energy or money."""

    burst: float
    per_s: float
    level: float
    at_ms: int

    def take(self, now_ms: int) -> bool:
        self.level = min(self.burst, self.level + (now_ms - self.at_ms) * self.per_s / 1000)
        self.at_ms = now_ms
        if self.level < 1:
            return False
        self.level -= 1
        return True


def _bucket(
    buckets: OrderedDict[_Key, _Bucket], key: _Key, rate: tuple[float, float], kept_max: int, now_ms: int
) -> _Bucket:
    """The bucket of this key, full if it is new; beyond `kept_max` the one that was used longest ago is forgotten."""
    bucket = buckets.get(key)
    if bucket is None:
        bucket = buckets[key] = _Bucket(*rate, rate[0], now_ms)
        if len(buckets) > kept_max:
            buckets.popitem(last=False)
    buckets.move_to_end(key)
    return bucket


@dataclass(slots=True)
class _IssuedHello:
    hello: Hello
    at_s: int
    used: bool = False


class Door:
    """One per agent. Holds only what a restart may forget: live Hellos, rate buckets, the newest reading messages."""

    def __init__(
        self,
        engine: Engine,
        domain: Domain,
        provider: Address,
        signer: OperatorSigner,
        ports: tuple[str, ...],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._engine, self._domain, self._provider, self._signer = engine, domain, provider, signer
        self._port_by_charger_id = {rules.charger_id(port): port for port in ports}
        self._random_bytes = random_bytes
        self._hellos: dict[str, list[_IssuedHello]] = {port: [] for port in ports}
        self._sources: OrderedDict[str, _Bucket] = OrderedDict()
        self._crowds: OrderedDict[tuple[str, SessionId | None], _Bucket] = OrderedDict()
        self._readings: dict[SessionId, tuple[int, ReadingMessage]] = {}
        self._presented_at_ms: dict[
            SessionId, int
        ] = {}  # one entry per session of this life: bounded by the chain
        self._reading_seq = engine.live.life << 20  # grows over restarts too, because the journal does

    # ---- M0

    @property
    def ports(self) -> tuple[str, ...]:
        """The charging ports that have a door."""
        return tuple(self._hellos)

    def hello(self, port: str) -> Hello:
        """The current Hello of this port: a new one every HELLO_ROTATE_S, and after a nonce was used."""
        issued, now_s = self._hellos[port], self._engine.at_s
        newest = issued[-1] if issued else None
        if newest is not None and not newest.used and 0 <= now_s - newest.at_s < HELLO_ROTATE_S:
            return newest.hello
        typed = rules.ProviderHello(
            self._provider, rules.charger_id(port), self._random_bytes(32), now_s + HELLO_LIFETIME_S
        )
        hello = Hello(typed.provider, typed.charger_id, typed.nonce, typed.expires_at_s, self._signed(typed))
        issued.append(_IssuedHello(hello, now_s))
        del issued[:-HELLOS_MAX]
        return hello

    # ---- answers

    def answer(self, sref: str, source: str, data: bytes) -> Message:
        """The one answer to these bytes from `sref`, the return address. `source` is limited: "mqtt:..." or "http:..."."""
        try:
            message = decode(data)
            self._limit(sref, source, message)
            if not SREF_FORM.fullmatch(sref):
                raise Refused("malformed", "the return address is not 1-64 of A-Z a-z 0-9 . _ ~ @ : = -")
            match message:
                case Present():
                    return self._present(sref, message, data)
                case ReceiptMessage():
                    return self._receipt(sref, message)
                case Stop():
                    return self._stop(sref, message)
                case _:
                    raise Refused("malformed", f"a consumer does not send {message.TYPE}")
        except Refused as refusal:
            return Refusal(refusal.reason, refusal.detail[:128])

    def _limit(self, sref: str, source: str, message: Message) -> None:
        now_ms = self._engine.live.now_ms
        if not _bucket(self._sources, source, SOURCE_RATE, SOURCES_MAX, now_ms).take(now_ms):
            raise Refused("rate_limited", "too many messages from here; wait a second")
        session_id: SessionId | None = getattr(message, "session_id", None)
        session = None if session_id is None else self._engine.book.sessions.get(session_id)
        if session is not None and session.presentation is not None and session.presentation.sref == sref:
            return  # a session's own consumer waits behind nobody: a flood must not cost it its receipts (rule 5)
        is_expected = session is not None and session.stage not in CLOSED
        if session_id is not None and not is_expected and not self._engine.book.awaits_belief(session_id):
            session_id = None
        crowd = source.partition(":")[0], session_id
        if not _bucket(self._crowds, crowd, GLOBAL_RATE, CROWDS_MAX, now_ms).take(now_ms):
            raise Refused("rate_limited", "too many messages altogether; wait a second")

    # ---- M1 and M2

    def _present(self, sref: str, message: Present, data: bytes) -> Message:
        book, live = self._engine.book, self._engine.live
        session, early = book.sessions.get(message.session_id), book.awaits_belief(message.session_id)
        if session is not None and (session.end_intent or session.stage in CLOSED):
            return self._ended(session, sref)
        if session is not None and session.stage is not Stage.ORPHANED:
            terms, kept = session.terms, session.presentation
        elif early:
            terms, kept = book.pending[message.session_id], book.early.get(message.session_id)
        else:
            raise Refused("not_yet_seen", "no such session on the chain yet; try again in a few seconds")
        if kept is not None and kept.digest == rules.presentation_digest(data):
            return self._standing(message.session_id)
        if message.token != terms.token:
            raise Refused("wrong_token", "this is not the token the contract logged for this session")
        margin_s = live.policy.validity_margin_s
        if live.at_s >= terms.valid_until_s:
            raise Refused("expired", "the token is no longer valid")
        if live.at_s >= terms.valid_until_s - margin_s:
            raise Refused("too_late", f"less than {margin_s} s of the token's validity are left")
        if message.valid_until_s <= live.at_s:
            raise Refused("expired", "the grant to the session key is no longer valid")
        port, issued = self._live_hello(message)
        self._check_free(port, session, terms)
        if message.scheme == "eip191" and kept is not None and kept.sref != sref:
            # personal_sign binds only the token: whoever saw it once could move the session's answers to himself.
            raise Refused("replayed", "this token was already presented from another return address")
        presentation = self._verified(message, terms, issued.hello, sref, port, data)
        if (
            kept is not None
            and live.now_ms - self._presented_at_ms.get(terms.session_id, -PRESENT_EVERY_MS)
            < PRESENT_EVERY_MS
        ):
            raise Refused("rate_limited", "this session's token was presented anew just now; wait a little")
        self._presented_at_ms[terms.session_id] = live.now_ms
        issued.used = True
        self._engine.accept(ev.TokenPresented(live.at_s, message.session_id, presentation))
        self._engine.observe(Beat())
        return self._standing(message.session_id)

    def _live_hello(self, message: Present) -> tuple[str, _IssuedHello]:
        port = self._port_by_charger_id.get(message.charger_id)
        if port is None:
            raise Refused("unknown_charger", "no charging port of this name here")
        for issued in self._hellos[port]:
            if issued.hello.nonce == message.hello_nonce:
                if issued.used:
                    raise Refused("replayed", "this Hello was already used; fetch the current one")
                if issued.hello.expires_at_s <= self._engine.at_s:
                    break
                return port, issued
        raise Refused("stale_hello", "this Hello is not current; fetch it again and sign anew")

    def _check_free(self, port: str, session: Session | None, terms: Terms) -> None:
        if port in self._engine.book.locked_ports:
            raise Refused("out_of_order", "this charging port waits for a technician")
        holder = self._engine.book.on_port(port)
        if holder is not None and holder.session_id != terms.session_id:
            raise Refused("busy", "another session holds this charging port")
        if session is not None and session.stage in BUSY_STAGES and session.port != port:
            raise Refused("busy", "this session already runs at another charging port")

    def _verified(
        self, message: Present, terms: Terms, hello: Hello, sref: str, port: str, data: bytes
    ) -> Presentation:
        """The presentation, if the session's consumer signed it. Raises Refused(bad_signature | wrong_signer | malformed)."""
        signature = rules.normalised(message.signature)
        public_key = rules.parsed_public_key(message.public_key)
        if rules.address_of(public_key) != terms.consumer:
            raise Refused("wrong_signer", "the public key is not this session's consumer")
        bound = rules.challenge(hello.typed, message.consumer_nonce)
        grant = rules.PresentToken(
            message.token,
            message.session_id,
            self._provider,
            message.session_key,
            message.max_energy_wh,
            message.valid_until_s,
            bound,
        )
        if rules.presentation_key(self._domain, message.scheme, grant, signature) != public_key:
            raise Refused("wrong_signer", "the signature is not by this session's consumer")
        return Presentation(
            sref,
            port,
            message.scheme,
            message.token,
            message.session_key,
            message.max_energy_wh,
            message.valid_until_s,
            bound,
            signature,
            rules.presentation_digest(data),
        )

    def _standing(self, session_id: SessionId) -> Message:
        """The answer that a good presentation gets now: accept, or where the session stands, or "waiting"."""
        session = self._engine.book.sessions.get(session_id)
        if session is None or session.stage is Stage.ORPHANED:
            return Status(session_id, "waiting", 0, 0, "not_yet_confirmed")
        return self._accept(session) or self._status(session)

    def _ended(self, session: Session, sref: str) -> Message:
        """What is left to say about a session that ended, to its consumer only: the records carry signatures."""
        if session.presentation is None or session.presentation.sref != sref:
            if self._engine.at_s >= session.terms.valid_until_s:
                raise Refused("expired", "the token is no longer valid")
            raise Refused("too_late", "this session has ended")
        return self._final(session) if session.stage in CLOSED else self._status(session)

    # ---- receipts and stops

    def _session_of(self, session_id: SessionId) -> tuple[Session, Presentation]:
        session = self._engine.book.sessions.get(session_id)
        if session is None or session.presentation is None:
            raise Refused("unknown_session", "present the token first")
        return session, session.presentation

    def _receipt(self, sref: str, message: ReceiptMessage) -> Message:
        session, grant = self._session_of(message.session_id)
        if message.delivered_wh <= session.energy_wh_acked:
            return AckMessage(
                session.session_id, session.energy_wh_acked
            )  # costs no recovery: a repeat is cheap
        if session.stage in CLOSED:
            return self._ended(session, sref)
        if session.settlement is not None:
            raise Refused("too_late", "the settlement is already signed")
        if message.delivered_wh > session.terms.energy_wh_ordered:
            raise Refused("over_order", "more than was ordered")
        if message.delivered_wh > session.order_wh:  # said before the meter is asked: waiting would not help
            raise Refused("over_grant", "more than the session key may sign for")
        if message.delivered_wh > self._delivered_wh(session):
            raise Refused("ahead_of_meter", "the meter does not show that much yet")
        ack = Ack(
            grant.token,
            grant.session_key,
            grant.max_energy_wh,
            grant.valid_until_s,
            grant.challenge,
            b"" if grant.session_key == ZERO_ADDRESS else grant.signature,
            rules.normalised(message.signature),
        )
        rules.receipt_signer(
            self._domain,
            ack,
            session_id=session.session_id,
            provider=self._provider,
            consumer=session.terms.consumer,
            delivered_wh=message.delivered_wh,
        )
        self._engine.accept(
            ev.ReceiptCredited(self._engine.at_s, session.session_id, message.delivered_wh, ack)
        )
        self._engine.observe(Beat())
        return AckMessage(session.session_id, self._engine.book.sessions[session.session_id].energy_wh_acked)

    def _stop(self, sref: str, message: Stop) -> Message:
        session, grant = self._session_of(message.session_id)
        if session.stage in CLOSED:
            return self._ended(session, sref)
        digest = rules.digest(self._domain, rules.StopRequest(session.session_id, message.at_s))
        signer = rules.recover(digest, rules.normalised(message.signature))
        if signer not in {session.terms.consumer, grant.session_key} - {ZERO_ADDRESS}:
            raise Refused("wrong_signer", "the stop is not signed by this session's consumer")
        if session.stage in (Stage.AUTHORISED, Stage.DELIVERING, Stage.PAUSED):
            stop = ev.StopDecided(
                self._engine.at_s, session.session_id, StopReason.REMOTE, "the consumer asked"
            )
            self._engine.accept(stop)
            self._engine.observe(Beat())
        return self._status(self._engine.book.sessions[session.session_id])

    # ---- what a consumer should know now (transports send what changed)

    def news(self) -> tuple[tuple[str, Message], ...]:
        """(sref, message) for everything current: status, accept, newest reading, ack, final. Level-triggered, idempotent."""
        news: list[tuple[str, Message]] = []
        for session in self._engine.book.sessions.values():
            if session.presentation is None or self._is_old(session):
                continue
            sref = session.presentation.sref
            news += [(sref, message) for message in self._news_of(session)]
        return tuple(news)

    def _is_old(self, session: Session) -> bool:
        return session.stage in CLOSED and self._engine.at_s - session.stage_at_s > NEWS_KEPT_S

    def _news_of(self, session: Session) -> tuple[Message, ...]:
        if session.stage in CLOSED:
            self._readings.pop(session.session_id, None)
            return (self._final(session),)
        accept = self._accept(session)
        messages: list[Message] = [self._status(session)]
        if accept is not None:
            messages += [accept, self._reading(session)]
        if session.energy_wh_acked > 0:
            messages.append(AckMessage(session.session_id, session.energy_wh_acked))
        return tuple(messages)

    def _accept(self, session: Session) -> Accept | None:
        grant = session.presentation
        if grant is None or session.accepted_at_s == 0 or session.register_mwh_begin is None:
            return None
        unacked_wh = self._engine.live.policy.max_unacked_wh[grant.port]
        typed = rules.SessionAccept(
            session.session_id, grant.challenge, session.register_mwh_begin, unacked_wh, session.accepted_at_s
        )
        return Accept(
            typed.session_id,
            typed.challenge,
            typed.register_mwh_begin,
            typed.max_unacked_wh,
            typed.accepted_at_s,
            self._signed(typed),
        )

    def _delivered_wh(self, session: Session) -> int:
        port = session.port
        live = None if port is None else self._engine.live.ports.get(port)
        return session.energy_wh(None if live is None else live.reading)

    def _power_w(self, session: Session) -> int:
        reading = None if session.port is None else self._engine.live.reading(session.port)
        return max(0, reading.power_w) if reading is not None and session.stage is Stage.DELIVERING else 0

    def _reading(self, session: Session) -> ReadingMessage:
        """The newest signed reading: renewed when the Wh changed, at most every READING_INTERVAL_MS."""
        now_ms, delivered_wh = self._engine.live.now_ms, self._delivered_wh(session)
        at_ms, newest = self._readings.get(session.session_id, (None, None))
        if newest is not None and at_ms is not None:
            resting = session.stage is not Stage.DELIVERING
            fresh = now_ms - at_ms < READING_INTERVAL_MS and not resting
            if newest.delivered_wh == delivered_wh or fresh:
                return newest
        self._reading_seq += 1
        typed = rules.MeterReading(
            session.session_id, self._reading_seq, delivered_wh, self._power_w(session), self._engine.at_s
        )
        message = ReadingMessage(
            typed.session_id, typed.seq, typed.delivered_wh, typed.power_w, typed.at_s, self._signed(typed)
        )
        self._readings[session.session_id] = (now_ms, message)
        return message

    def _status(self, session: Session) -> Status:
        reason: str = session.stop_reason or ""
        if not reason and session.stage is not Stage.MATCHED:
            reason = hindrance(session, self._engine.live) or ""
        return Status(
            session.session_id, session.stage, self._delivered_wh(session), session.energy_wh_acked, reason
        )

    def _final(self, session: Session) -> Final:
        ended = session.ended
        return Final(
            session.session_id,
            session.stage,
            session.stop_reason or "",
            session.energy_wh(None),
            0 if ended is None else ended.energy_wh_settled,
            0 if ended is None else ended.fee_wei,
            TxHash(bytes(32)) if ended is None else ended.tx_hash,
            session.record_begin,
            session.record_end,
        )

    def _signed(self, typed: TypedMessage) -> bytes:
        return self._signer.sign_digest(rules.digest(self._domain, typed))
