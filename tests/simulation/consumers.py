"""Consumers: one honest and strict, the others each dishonest (or unlucky) in one way.

Strict: says a thing until it is acknowledged, and then never again; so an agent that acknowledges before it has written
loses it for good. Signs only what its own car received (`agent.consumer.policy`), so a provider whose meter runs fast
earns no more than the tolerance. Called back by the broker, looks at the chain once a second; everything seeded.
"""

from dataclasses import dataclass

from simulation.chain import Slot, Tx
from story import Wallet

from agent.chain import contract
from agent.consumer.policy import Sign, SigningLimits, Situation, decide
from agent.core import token as rules
from agent.core.messages import (
    Accept,
    AckMessage,
    Final,
    Present,
    ReadingMessage,
    ReceiptMessage,
    Refusal,
    Status,
    Stop,
    decode,
    encode,
)

REPEAT_MS = 2_000
RECONNECT_MS = 40_000
NEW_HELLO = frozenset({"stale_hello", "replayed"})
RATE_WEI_PER_KWH = 3 * 10**17
STRANGER = Wallet(99)


@dataclass(frozen=True)
class Character:
    """What this consumer does besides charging; everything off is honest."""

    name: str = "honest"
    presents: bool = True
    signs_wh_max: int | None = None  # then it keeps charging and signs no more
    ends_on_chain_wh: int | None = None  # from so much received it concedes half of it on chain
    stops_wh: int | None = None  # from so much it asks to stop, as it may
    unplugs_wh: int | None = None  # from so much it pulls the cable
    forges: bool = False  # besides honest messages, every kind of false one
    reconnects: bool = True  # False: after a reorg it spends its nonce otherwise, and never connects again


HONEST = Character()
CHARACTERS = (
    HONEST,
    Character("no-show", presents=False),
    Character("stops signing", signs_wh_max=20),
    Character("never signs", signs_wh_max=0),
    Character("ends on chain", ends_on_chain_wh=25),
    Character("asks to stop", stops_wh=20),
    Character("unplugs", unplugs_wh=15),
    Character("forges", forges=True),
    Character("double-spends", reconnects=False),
)


@dataclass(frozen=True)
class Order:
    """Who wants how much, where, from when."""

    energy_wh: int = 60
    start_s: int = 5
    port: str = "left"
    character: Character = HONEST
    validity_s: int = 900


class Consumer:
    """One order's life, as the consumer lives it."""

    def __init__(self, world, number, order):
        self.world, self.number, self.order, self.character = world, number, order, order.character
        self.key, self.session_key = Wallet(5_000 + number), Wallet(6_000 + number)
        self.sref = f"phone{number}"
        self.auction_nonce = 1
        market = world.chain.market
        self.session_id = rules.session_id(
            market.domain.chain_id,
            market.domain.contract,
            self.key.address,
            market.provider,
            self.auction_nonce,
        )
        world.chain.wins(
            self.key.address,
            Slot(self.auction_nonce, market.provider, order.energy_wh, RATE_WEI_PER_KWH, order.validity_s),
        )
        self.token = None
        self.presented_tokens = set()
        self.signed_wh = 0
        self._present_bytes, self._challenge, self._used_hello = None, None, None
        self._answered = False
        self._presented_ms = None  # the first time
        self._sent_ms = -REPEAT_MS
        self._receipt_bytes, self._acked_wh, self._seq = None, 0, -1
        self._receipt_ms = 0
        self._connect_ms = None
        self._limits = SigningLimits(power_w_max=32_000)
        self._asked = self._unplugged = False
        self.is_final = False
        world.broker.consumers[self.sref] = self.hears

    # ---- the chain

    @property
    def address(self):
        """The account."""
        return self.key.address

    def is_over(self):
        """Nothing of this order is locked on chain any more."""
        state = self.world.chain.state
        token = state.opened.get((self.address, self.auction_nonce))
        if token is not None:
            return token in state.ended
        nonce = self.world.chain.state.nonces.get(self.address, 0)
        waits = (self.address, nonce) in self.world.chain.pool
        return self._connect_ms is not None and not self.character.reconnects and not waits

    def _send(self, data):
        chain = self.world.chain
        nonce = chain.state.nonces.get(self.address, 0)
        tx = Tx(self.address, nonce, data, rules.keccak(repr((self.address, nonce, data)).encode()))
        if (self.address, nonce) not in chain.pool:
            chain.send(tx)

    def tick(self):
        """Once a second."""
        world = self.world
        if world.now_ms() < self.order.start_s * 1000:
            return
        token = world.chain.state.opened.get((self.address, self.auction_nonce))
        if token is None:
            self._connect()
            return
        if token != self.token:
            self.token, self._present_bytes, self._answered = token, None, False
        session = world.chain.state.sessions.get(token)
        if session is None:
            return
        if self.character.presents and not self._answered:
            self._present(session)
        self._repeat_receipt()
        self._misbehave(session)
        if world.chain.head.timestamp_s >= session.settle_at_s:
            world.freed_by_strangers.add(token)
            self._send(contract.encode_settle(token))

    def _connect(self):
        now_ms = self.world.now_ms()
        again = self.character.reconnects or self._connect_ms is None
        if again and (self._connect_ms is None or now_ms - self._connect_ms > RECONNECT_MS):
            self._connect_ms = now_ms
            self._send(contract.encode_connect(self.world.chain.market.provider, self.order.energy_wh))

    # ---- presenting

    def _present(self, session):
        now_ms = self.world.now_ms()
        if now_ms - self._sent_ms < REPEAT_MS:
            return
        if self._present_bytes is None and not self._sign_presentation(session):
            return
        self._sent_ms = now_ms
        if self._presented_ms is None:
            self._presented_ms = now_ms
        self.presented_tokens.add(self.token)
        self.world.broker.says(self.sref, self._present_bytes)

    def _sign_presentation(self, session, key=None):
        market = self.world.chain.market
        topic = f"{self.world.broker.root}/hello/0x{rules.charger_id(self.order.port).hex()}"
        kept = self.world.broker.retained.get(topic)
        hello = None if kept is None else decode(kept)
        if hello is None or hello.nonce == self._used_hello:
            return False
        nonce_c = self.world.random_bytes(32)
        grant = rules.PresentToken(
            self.token, self.session_id, market.provider, self.session_key.address, self.order.energy_wh,
            session.valid_until_s, rules.challenge(hello.typed, nonce_c),
        )  # fmt: skip
        signer = key or self.key
        self._used_hello, self._challenge = hello.nonce, grant.challenge
        self._present_bytes = encode(
            Present(
                "eip712",
                self.session_id,
                self.token,
                hello.charger_id,
                hello.nonce,
                nonce_c,
                grant.session_key,
                grant.max_energy_wh,
                grant.valid_until_s,
                self.key.public_key,
                signer.sign(grant, market.domain),
            )
        )
        return True

    # ---- answers and news

    def hears(self, payload):
        """The broker's call."""
        message = decode(payload)
        self.world.was_told(message)
        match message:
            case Accept() if message.session_id == self.session_id:
                self._answered = self._answered or message.challenge == self._challenge
            case Status() if message.session_id == self.session_id and message.stage == "waiting":
                self._answered = self._present_bytes is not None
            case Refusal() if not self._answered and message.reason in NEW_HELLO:
                self._present_bytes = None
            case ReadingMessage() if message.session_id == self.session_id and message.seq > self._seq:
                self._seq = message.seq
                self._sign_for(message.delivered_wh)
            case AckMessage() if message.session_id == self.session_id:
                self._acked_wh = max(self._acked_wh, message.delivered_wh)
            case Final() if message.session_id == self.session_id:
                self.is_final = True

    def _sign_for(self, reading_wh):
        if self._presented_ms is None:
            return
        decision = decide(
            self._limits,
            Situation(
                energy_wh_ordered=self.order.energy_wh,
                energy_wh_signed=self.signed_wh,
                reading_wh=reading_wh,
                elapsed_ms=self.world.now_ms() - self._presented_ms,
                own_wh=self.world.true_mwh(self.session_id) // 1000,
            ),
        )
        if not isinstance(decision, Sign):
            return
        if self.character.signs_wh_max is not None and decision.energy_wh > self.character.signs_wh_max:
            return
        self.signed_wh = decision.energy_wh
        self._receipt_bytes = self._receipt(self.signed_wh, self.session_key)
        self._post_receipt()

    def _receipt(self, energy_wh, key):
        receipt = rules.Receipt(self.session_id, energy_wh)
        signature = key.sign(receipt, self.world.chain.market.domain)
        return encode(ReceiptMessage(receipt.session_id, receipt.delivered_wh, signature))

    def _post_receipt(self):
        self._receipt_ms = self.world.now_ms()
        self.world.broker.says(self.sref, self._receipt_bytes)

    def _repeat_receipt(self):
        due = self.world.now_ms() - self._receipt_ms >= REPEAT_MS
        if self._receipt_bytes is not None and self._acked_wh < self.signed_wh and due:
            self._post_receipt()

    # ---- being difficult

    def _misbehave(self, session):
        who = self.character
        received_wh = self.world.true_mwh(self.session_id) // 1000
        if who.ends_on_chain_wh is not None and received_wh >= who.ends_on_chain_wh and not session.closing:
            self._send(contract.encode_end_connection(self.token, received_wh // 2, rules.NO_ACK))
        if who.stops_wh is not None and received_wh >= who.stops_wh and not self._asked:
            self._asked = self._stop_is_heard()
            request = rules.StopRequest(self.session_id, self.world.chain_time_s())
            signature = self.session_key.sign(request, self.world.chain.market.domain)
            self.world.broker.says(self.sref, encode(Stop(self.session_id, request.at_s, signature)))
        if who.unplugs_wh is not None and received_wh >= who.unplugs_wh and not self._unplugged:
            self._unplugged = True
            self.world.outlets[self.order.port].plug(plugged=False)
        if who.forges and self.world.now_ms() // 1000 % 3 == 0:
            self._forge(session)

    def _stop_is_heard(self):
        """It asks until the journal shows that it was heard."""
        return self.world.stop_is_decided(self.session_id)

    def _forge(self, session):
        """False receipts, presentations, stops and noise: each must be refused, and none may cost anybody anything."""
        order_wh, rng = self.order.energy_wh, self.world.rng
        wanted = rng.randrange(6)
        if wanted == 0:
            data = self._receipt(order_wh, STRANGER)  # by the wrong key
        elif wanted == 1:
            data = self._receipt(order_wh + rng.randrange(1, 50), self.session_key)  # above the order
        elif wanted == 2:
            data = self._receipt(max(0, self.signed_wh - 5), self.session_key)  # an old one
        elif wanted == 3 and self.token is not None:
            kept = self._present_bytes, self._challenge, self._used_hello
            self._used_hello = None
            found = self._sign_presentation(session, STRANGER)
            data, (self._present_bytes, self._challenge, self._used_hello) = self._present_bytes, kept
            if not found:
                return
        elif wanted == 4:
            request = rules.StopRequest(self.session_id, self.world.chain_time_s())
            signature = STRANGER.sign(request, self.world.chain.market.domain)
            data = encode(Stop(self.session_id, request.at_s, signature))
        else:
            data = rng.randbytes(rng.randrange(200))
        self.world.broker.says(rng.choice([self.sref, "stranger"]), data)
