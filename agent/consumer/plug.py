"""At the plug: everything a conversation with this session's provider needs, and whether it is really them.

Rules
* The provider is whom the chain named as the winner of *our* auction, or its operator as the chain knows it now. Nobody
  else's Hello, acceptance or reading counts, however well it is signed.
* A message that is not believed changes nothing and ends nothing; why it was not believed has a name, and is what a
  time-out says in the end.

May not know: what to answer (meeting.py, charging.py), transports.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from agent.consumer.carrier import Carrier
from agent.consumer.journal import ConsumerJournal, Errand
from agent.consumer.policy import SigningLimits
from agent.core import token as rules
from agent.core.events import Terms
from agent.core.messages import Message, decode
from agent.core.token import Domain, TypedMessage
from agent.core.units import Address, Token, TxHash, cost_wei_floor, short
from agent.errors import Refused, Transient

SIGNERS_AGE_MS = 10_000  # how often a stranger's signature may make us ask the node who the operator is now


# ---- what a journey tells whoever watches it; nothing decides by it


class Step(StrEnum):
    """The steps from auction to receipt, in order."""

    AUCTION = "auction"  # startAuction, deposit locked
    BIDDING = "bidding"  # providers underbid each other until closing
    CONNECT = "connect"  # the winner is fixed, the token exists
    HELLO = "hello"  # at the plug: who is this provider?
    PRESENT = "present"  # our signed token, their acceptance
    CHARGE = "charge"  # energy, readings, receipts
    SETTLE = "settle"  # stopped; waiting for the settlement on chain
    DONE = "done"  # checked against the chain


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of the journey. `words` is one line for people; `stage` is what the provider says (DESIGN section 5)."""

    step: Step
    words: str
    stage: str = ""
    energy_wh_ordered: int = 0
    energy_wh_delivered: int = 0  # by the newest verified reading
    energy_wh_signed: int = 0
    energy_wh_acked: int = 0
    power_w: int = 0
    cost_wei: int = 0  # of what is signed so far
    asks_driver: bool = False  # nothing more is signed until the driver says that our car is charging


Tell = Callable[[Progress], None]


# ---- who and what is there


class Signer(Protocol):
    """A key that signs: `agent.keys.Signer`."""

    address: Address
    public_key: bytes

    def sign_digest(self, digest32: bytes) -> bytes:
        """65 bytes, canonical."""


@dataclass(frozen=True, slots=True)
class Settlement:
    """`ConnectionEnded`, as the chain tells it."""

    energy_wh_settled: int
    cost_wei: int
    tx_hash: TxHash
    block_number: int
    block_hash: bytes


class ChainView(Protocol):
    """What a conversation asks the chain. All raise `Transient` when the node is away."""

    async def signers(self, provider: Address) -> frozenset[Address]:
        """The provider and its operator, if it has one."""

    async def now_s(self) -> int:
        """Chain time: the newest head's timestamp."""

    async def is_open(self, token: Token) -> bool:
        """Whether a session of this token is open (active or closing)."""

    async def settlement(self, terms: Terms) -> Settlement | None:
        """How this session was settled; None while it is not."""


class TokenChanged(Exception):  # not an error: news
    """The chain tells our `connect` differently than it did: look again, present again."""


@dataclass(frozen=True, slots=True)
class Waits:
    """How long we wait, in seconds. Each one says for what."""

    hello_s: float = 60  # for a provider that shows itself at the plug
    hello_ask_s: float = 2  # between two questions for the current Hello
    meeting_s: float = 600  # for its acceptance: it waits for confirmations, maybe for another car to leave
    knock_s: float = 0.5  # before an unanswered presentation goes out again; and then ever later
    resend_s: float = 2  # before a receipt or stop that nobody acknowledged goes out again
    quiet_s: float = 5  # without a word from the provider before it is asked to say everything again
    chain_poll_s: float = 2  # between two looks at the chain
    silence_s: float = 300  # for any sign of life while the session is open
    final_s: float = 15  # for the provider's records, once the chain says that it is settled


@dataclass(slots=True)
class Plug:
    """One session's conversation. `now_ms` is monotonic."""

    domain: Domain
    terms: Terms
    account: Signer
    session_key: Signer
    carrier: Carrier
    journal: ConsumerJournal
    chain: ChainView
    limits: SigningLimits
    waits: Waits
    tell: Tell
    now_ms: Callable[[], int]
    odd: Refused | None = None  # the newest reason why something was not believed
    _signers: frozenset[Address] = frozenset()
    _signers_at_ms: int | None = None

    @property
    def errand(self) -> Errand:
        """The open purchase; there is one while we talk."""
        errand = self.journal.open_errand
        assert errand is not None
        return errand

    async def next(self, timeout_s: float) -> Message | None:
        """The next message that is one; None after `timeout_s`, or for something that is none."""
        data = await self.carrier.next(max(0.0, timeout_s))
        if data is None:
            return None
        try:
            return decode(data)
        except Refused as odd:
            self.odd = odd
            return None

    async def believe(self, typed: TypedMessage, signature: bytes) -> None:
        """Check that the provider or its operator signed this. Raises Refused(bad_signature | wrong_signer |
        signers_unknown).
        """
        signer = rules.recover(rules.digest(self.domain, typed), rules.normalised(signature))
        if signer in self._signers:
            return
        now_ms = self.now_ms()
        if self._signers_at_ms is None or now_ms - self._signers_at_ms >= SIGNERS_AGE_MS:
            self._signers_at_ms = now_ms
            try:
                self._signers = await self.chain.signers(self.terms.provider)
            except (
                Transient
            ) as away:  # a node that is away must not end a session that needs no node just now
                raise Refused("signers_unknown", f"cannot ask who the operator is: {away.message}") from away
        if signer not in self._signers:
            raise Refused(
                "wrong_signer",
                f"signed by {short(signer)}, which is neither our provider {short(self.terms.provider)} nor its operator",
            )

    def say(self, step: Step, words: str, **numbers: int | str) -> None:
        """Tell whoever watches."""
        errand = self.errand
        self.tell(
            Progress(
                step,
                words,
                energy_wh_ordered=self.terms.energy_wh_ordered,
                energy_wh_signed=errand.energy_wh_signed,
                cost_wei=cost_wei_floor(self.terms.rate_wei_per_kwh, errand.energy_wh_signed),
                **numbers,  # type: ignore[arg-type]
            )
        )
