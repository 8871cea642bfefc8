"""A provider's side of the plug as a script, for tests of the consumer: it answers by the protocol unless told to misbehave.

Own and tiny on purpose: it shares nothing with the agent's door but the words of `agent.core`, so that door and consumer
are not wrong together. The chain is played by hand.
"""

import asyncio
import time
from collections import deque
from dataclasses import dataclass, field, replace

from agent.consumer.carrier import Inbox
from agent.consumer.journal import ConsumerJournal, Matched, OrderPlaced
from agent.consumer.plug import Plug, Settlement, Waits
from agent.consumer.policy import SigningLimits
from agent.core import token as rules
from agent.core.events import Terms
from agent.core.messages import (
    Accept,
    AckMessage,
    Final,
    Hello,
    Message,
    Present,
    ReadingMessage,
    ReceiptMessage,
    Status,
    decode,
    encode,
)
from agent.core.token import Domain
from agent.core.units import BlockHash, TxHash
from agent.keys import Signer, ephemeral_signer

DOMAIN = Domain(31337, bytes.fromhex("c0" * 20))
NOW_S = 1_800_000_000
RATE_WEI_PER_KWH = 10**14
ORDER_WH = 200
PORT = "left"
CONSUMER = ephemeral_signer(b"consumer")
OWNER = ephemeral_signer(b"provider's owner")
OPERATOR = ephemeral_signer(b"provider's operator")
STRANGER = ephemeral_signer(b"stranger")


async def eventually(holds, seconds: float = 30.0) -> None:
    """Wait until a condition holds that nobody announces; TimeoutError when it does not."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


def terms_of(nonce: int = 1, issued_at_s: int = NOW_S, order_wh: int = ORDER_WH) -> Terms:
    """A session of CONSUMER with OWNER; another `issued_at_s` is the same session re-mined."""
    valid_until_s = issued_at_s + 3600
    return Terms(
        session_id=rules.session_id(DOMAIN.chain_id, DOMAIN.contract, CONSUMER.address, OWNER.address, nonce),
        token=rules.access_token(CONSUMER.address, OWNER.address, issued_at_s, valid_until_s),
        consumer=CONSUMER.address,
        provider=OWNER.address,
        auction_nonce=nonce,
        energy_wh_ordered=order_wh,
        rate_wei_per_kwh=RATE_WEI_PER_KWH,
        deposit_wei=RATE_WEI_PER_KWH * order_wh // 1000,
        bond_wei=RATE_WEI_PER_KWH * order_wh // 1000,
        issued_at_s=issued_at_s,
        valid_until_s=valid_until_s,
        block_number=7,
        block_hash=BlockHash(rules.word(issued_at_s)),
        log_index=1,
        tx_hash=TxHash(b"\x0c" * 32),
    )


@dataclass
class ScriptedProvider:
    """Signs with OPERATOR. `carrier` is where it speaks; what it was told stands in `presented` and `receipts`."""

    terms: Terms
    key: Signer = OPERATOR
    domain: Domain = DOMAIN
    port: str = PORT
    now_s: int = NOW_S
    delivered_wh: int = 0
    acked_wh: int = 0
    seq: int = 0
    nonce: int = 0
    accepting: bool = True
    acking: bool = True
    presented: list[bytes] = field(default_factory=list)
    receipts: list[bytes] = field(default_factory=list)
    stops: list[bytes] = field(default_factory=list)
    refusals: deque[Message] = field(default_factory=deque)  # given first, one for each presentation
    hellos: list[Hello] = field(default_factory=list)
    grant: Present | None = None

    def signed(self, typed: rules.TypedMessage, key: Signer | None = None) -> bytes:
        """Sign as the operator, or with another key."""
        return (key or self.key).sign_digest(rules.digest(self.domain, typed))

    def hello(self, *, key: Signer | None = None, **forged) -> Hello:
        """A new Hello; `forged` replaces fields before it is signed."""
        self.nonce += 1
        typed = rules.ProviderHello(
            self.terms.provider, rules.charger_id(self.port), rules.word(self.nonce), self.now_s + 120
        )
        typed = replace(typed, **forged)
        hello = Hello(
            typed.provider, typed.charger_id, typed.nonce, typed.expires_at_s, self.signed(typed, key)
        )
        self.hellos.append(hello)
        return hello

    def answer(self, data: bytes) -> Message | None:
        """What the protocol wants said to this message."""
        message = decode(data)
        if isinstance(message, Present):
            self.presented.append(data)
            return self._present(message)
        if isinstance(message, ReceiptMessage):
            self.receipts.append(data)
            return self._receipt(message)
        self.stops.append(data)
        return self.status("STOPPING", "Remote")

    def _present(self, message: Present) -> Message | None:
        if self.refusals:
            return self.refusals.popleft()
        hello = next(hello for hello in self.hellos if hello.nonce == message.hello_nonce)
        self.grant = message
        challenge = rules.challenge(hello.typed, message.consumer_nonce)
        typed = rules.PresentToken(
            self.terms.token,
            self.terms.session_id,
            self.terms.provider,
            message.session_key,
            message.max_energy_wh,
            message.valid_until_s,
            challenge,
        )
        assert rules.recover(rules.digest(self.domain, typed), message.signature) == self.terms.consumer
        assert rules.address_of(message.public_key) == self.terms.consumer
        return self.accept(challenge) if self.accepting else None

    def accept(self, challenge: bytes, *, key: Signer | None = None) -> Accept:
        """SessionAccept over this challenge."""
        typed = rules.SessionAccept(self.terms.session_id, challenge, 5_000, 50, self.now_s)
        return Accept(self.terms.session_id, challenge, 5_000, 50, self.now_s, self.signed(typed, key))

    def _receipt(self, message: ReceiptMessage) -> Message | None:
        typed = rules.Receipt(self.terms.session_id, message.delivered_wh)
        assert self.grant is not None
        assert rules.recover(rules.digest(self.domain, typed), message.signature) == self.grant.session_key
        if not self.acking:
            return None
        self.acked_wh = max(self.acked_wh, message.delivered_wh)
        return AckMessage(self.terms.session_id, self.acked_wh)

    def reading(self, wh: int, *, seq: int | None = None, key: Signer | None = None) -> ReadingMessage:
        """The meter at `wh`, signed; a seq of its own makes a replay."""
        if seq is None:
            self.seq += 1
        self.delivered_wh = wh
        typed = rules.MeterReading(
            self.terms.session_id, self.seq if seq is None else seq, wh, 11_000, self.now_s
        )
        return ReadingMessage(
            typed.session_id, typed.seq, wh, typed.power_w, typed.at_s, self.signed(typed, key)
        )

    def status(self, stage: str, reason: str = "") -> Status:
        """Where the session stands."""
        return Status(self.terms.session_id, stage, self.delivered_wh, self.acked_wh, reason)

    def final(self, settled_wh: int, stop_reason: str = "EnergyLimitReached") -> Final:
        """The end, as the provider tells it."""
        cost_wei = self.terms.rate_wei_per_kwh * settled_wh // 1000
        return Final(
            self.terms.session_id,
            "SETTLED",
            stop_reason,
            self.delivered_wh,
            settled_wh,
            cost_wei,
            TxHash(b"\x0e" * 32),
            "OCMF|{begin}",
            "OCMF|{end}",
        )


class MemoryCarrier:
    """A carrier to a `ScriptedProvider` in the same process. `losing` decides which of our messages are lost."""

    def __init__(self, provider: ScriptedProvider) -> None:
        self.trouble = ""
        self.provider = provider
        self.inbox = Inbox()
        self.losing = lambda _kind: False
        self.asked = 0  # how often a Hello was asked for
        self.shown: list[Message] | None = None  # Hellos on display; None: a new good one each time we ask

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        pass

    async def meet(self, provider) -> None:
        """The right provider was asked for."""
        assert provider == self.provider.terms.provider

    async def ask_hello(self) -> None:
        """Show the Hellos on display."""
        self.asked += 1
        for hello in [self.provider.hello()] if self.shown is None else self.shown:
            self.say(hello)

    def say(self, message: Message) -> None:
        """The provider says this by itself."""
        self.inbox.put(encode(message))

    async def post(self, kind, data: bytes) -> None:
        """Carry it over and the answer back."""
        if self.losing(kind):
            return
        answer = self.provider.answer(data)
        if answer is not None:
            self.say(answer)

    async def next(self, timeout_s: float) -> bytes | None:
        """The next message."""
        return await self.inbox.next(timeout_s)


@dataclass
class PlayedChain:
    """What the consumer asks the chain, played by hand."""

    signers_now: frozenset = frozenset({OWNER.address, OPERATOR.address})
    at_s: int = NOW_S
    open: bool = True
    settled: Settlement | None = None
    asked: int = 0
    away: BaseException | None = None

    async def signers(self, provider):
        """Owner and operator."""
        self.asked += 1
        self._be_away()
        return self.signers_now

    async def now_s(self) -> int:
        """Chain time."""
        self._be_away()
        return self.at_s

    async def is_open(self, token) -> bool:
        """Open until a test says otherwise."""
        self._be_away()
        return self.open

    async def settlement(self, terms):
        """As a test played it."""
        self._be_away()
        return self.settled

    def _be_away(self) -> None:
        if self.away is not None:
            raise self.away

    def settle(self, wh: int) -> None:
        """`ConnectionEnded` for this much."""
        self.open = False
        self.settled = Settlement(wh, RATE_WEI_PER_KWH * wh // 1000, TxHash(b"\x0e" * 32), 9, b"\x09" * 32)


FAST = Waits(  # a test's patience
    hello_s=0.8,
    hello_ask_s=0.05,
    meeting_s=1.0,
    knock_s=0.02,
    resend_s=0.05,
    chain_poll_s=0.02,
    silence_s=1.0,
    final_s=0.2,
)
OPENED: list[ConsumerJournal] = []  # closed by the conftest beside the tests


def opened_journal(folder, terms: Terms, clock=lambda: float(NOW_S)) -> ConsumerJournal:
    """A consumer's journal with this session in it."""
    journal = ConsumerJournal(folder / "consumer.sqlite", DOMAIN, CONSUMER.address, clock)
    OPENED.append(journal)
    if journal.errand is None:
        journal.write(
            OrderPlaced(NOW_S, terms.auction_nonce, terms.energy_wh_ordered, 10**14, 60, 3600, 1, "aa" * 16)
        )
        journal.write(Matched(NOW_S, terms))
    return journal


def plugged(folder, carrier, chain=None, *, journal=None, limits=None, waits=FAST) -> Plug:
    """The consumer's side of the plug; what it told is in `plug.tell.told`."""
    terms = carrier.provider.terms
    return Plug(
        domain=DOMAIN,
        terms=terms,
        account=CONSUMER,
        session_key=ephemeral_signer(b"session key"),
        carrier=carrier,
        journal=journal or opened_journal(folder, terms),
        chain=chain or PlayedChain(),
        limits=limits or SigningLimits(),
        waits=waits,
        tell=Told(),
        now_ms=lambda: time.monotonic_ns() // 1_000_000,
    )


class Told(list):
    """Every progress that was told."""

    def __call__(self, progress) -> None:
        """Remember it."""
        self.append(progress)
