"""A thief on the broker, while an honest evening goes on: he reads every message, holds some back, replays and forges.

The broker is his: what the consumer says passes through his hands first (`Wiretap`). What he says himself goes over the real
broker to the real agents, from return addresses of his own, and the reasons shown are the agents' own words. Whatever he holds
back he lets go soon: longer would be a denial of service, which a broker can do, and which steals nothing.

Each attempt must be refused by the name it deserves; an attempt that is answered otherwise fails the story.
May not know: how the evening goes, what the agents think of him besides their answers.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from agent.consumer.carrier import Carrier, Kind, new_sref
from agent.consumer.carrier_mqtt import Broker, MqttCarrier
from agent.core import token as rules
from agent.core.messages import Hello, Present, ReceiptMessage, Refusal, decode, encode
from agent.core.token import Domain
from agent.core.units import Address
from agent.demo.devnet import derive_key
from agent.errors import Refused
from agent.keys import Signer, ephemeral_signer

CURVE_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
NOT_YET = frozenset(
    {"not_yet_seen", "rate_limited"}
)  # not his fault: the agent has not seen the session, so he asks again
ANSWER_TIMEOUT_S = 10.0  # an agent answers in milliseconds; a busy machine needs longer
TRIES = 60
TRY_AGAIN_S = 0.5
LATER_S = 3_600  # when he comes back: the demo's tokens are valid for ten minutes
STEAL_FROM_WH = 3  # the first receipt he holds back: early enough that an evening of a few Wh has one


@dataclass(frozen=True, slots=True)
class Attempt:
    """One theft: what he tried, at whose door, what must be answered, and what was."""

    what: str
    at: str
    expected: str
    reason: str
    detail: str

    @property
    def is_refused(self) -> bool:
        """By the right name."""
        return self.reason == self.expected


def high_s_twin(signature: bytes) -> bytes:
    """The other signature that the same key seems to have made: s' = n - s, the parity turned. A second one, for nothing."""
    s = CURVE_ORDER - int.from_bytes(signature[32:64], "big")
    return signature[:32] + rules.word(s) + bytes([27 + (28 - signature[64])])


class Wiretap(MqttCarrier):
    """The consumer's way over a broker that is the thief's: he sees each message, and may hold it back."""

    def __init__(self, broker: Broker, sref: str, thief: Thief) -> None:
        super().__init__(broker, sref)
        self._thief = thief

    async def meet(self, provider: Address) -> None:
        """The thief learns who won."""
        self._thief.winner = provider
        await super().meet(provider)

    async def post(self, kind: Kind, data: bytes) -> None:
        """Goes on, unless the thief wants it for himself first."""
        if not self._thief.takes(kind, data):
            await super().post(kind, data)


@dataclass(slots=True)
class Thief:
    """One thief. `doors` are the providers by account; `way` opens a connection to the broker for a return address; `say` is told
    each attempt.
    """

    domain: Domain
    seed: str
    doors: dict[Address, str]
    way: Callable[[str], Carrier]
    say: Callable[[Attempt], None]
    attempts: list[Attempt] = field(default_factory=list)
    winner: Address | None = None
    presented: Present | None = None  # the consumer's, held back
    receipt: ReceiptMessage | None = None
    _presented_bytes: bytes = b""
    _holds: frozenset[str] = frozenset({"present", "receipt"})
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    # ---- what passes through his hands

    def takes(self, kind: Kind, data: bytes) -> bool:
        """Whether he holds this back. The consumer says it again, so he need not keep a copy to pass on."""
        message = decode(data)
        if isinstance(message, Present) and self.presented is None:
            self.presented, self._presented_bytes = message, data
        if isinstance(message, ReceiptMessage) and message.delivered_wh >= STEAL_FROM_WH:
            self.receipt = self.receipt or message
        self._news.set()
        return kind in self._holds and not (kind == "receipt" and self.receipt is None)

    async def _until(self, holds: Callable[[], bool]) -> None:
        """The whole evening is bounded, so this is."""
        while not holds():
            self._news.clear()
            await self._news.wait()

    # ---- the evening

    async def visit(self) -> None:
        """Everything he tries before and while energy flows."""
        await self._until(lambda: self.presented is not None)
        winner = self._winner
        async with self._at(winner) as door:
            for what, expected, forged in self._presentations(await door.hello()):
                self._note(what, winner, expected, await door.refused(encode(forged)))
        for other in self.doors.keys() - {winner}:
            async with self._at(other) as door:
                answer = await door.answer(self._presented_bytes)
                self._note("her token, shown to another provider", other, "not_yet_seen", answer)
        self._holds -= {"present"}
        await self._until(lambda: self.receipt is not None)
        async with self._at(winner) as door:
            for what, expected, receipt in self._receipts():
                self._note(what, winner, expected, await door.refused(encode(receipt)))
        self._holds = frozenset()

    async def return_later(self) -> None:
        """An hour later, all is paid: her own words again, byte for byte."""
        async with self._at(self._winner) as door:
            answer = await door.refused(self._presented_bytes, until="expired")
            self._note("her token again, after its time", self._winner, "expired", answer)

    @property
    def _winner(self) -> Address:
        assert self.winner is not None, "nobody presents before the winner is met"
        return self.winner

    def _presentations(self, hello: Hello) -> list[tuple[str, str, Present]]:
        hers, key = self.presented, self._key
        assert hers is not None
        grant = rules.PresentToken(
            hers.token,
            hers.session_id,
            hello.provider,
            key.address,
            hers.max_energy_wh,
            hers.valid_until_s,
            rules.challenge(hello.typed, hers.consumer_nonce),
        )
        at_the_plug = replace(
            hers,
            charger_id=hello.charger_id,
            hello_nonce=hello.nonce,
            session_key=key.address,
            public_key=key.public_key,
            signature=key.sign_digest(rules.digest(self.domain, grant)),
        )
        return [
            ("her token, signed with his own key", "wrong_signer", at_the_plug),
            (
                "her signature, but for his session key",
                "wrong_signer",
                replace(hers, session_key=key.address),
            ),
            (
                "the high-s twin of her signature",
                "bad_signature",
                replace(hers, signature=high_s_twin(hers.signature)),
            ),
        ]

    def _receipts(self) -> list[tuple[str, str, ReceiptMessage]]:
        hers = self.receipt
        assert hers is not None
        receipt = rules.Receipt(hers.session_id, hers.delivered_wh)
        forged = replace(hers, signature=self._key.sign_digest(rules.digest(self.domain, receipt)))
        twin = replace(hers, signature=high_s_twin(hers.signature))
        return [
            (f"a forged receipt for {hers.delivered_wh} Wh", "wrong_signer", forged),
            ("the high-s twin of her receipt", "bad_signature", twin),
        ]

    @property
    def _key(self) -> Signer:
        return ephemeral_signer(derive_key(self.seed, "thief"))

    def _note(self, what: str, at: Address, expected: str, answer: Refusal | None) -> None:
        reason, detail = ("(not refused)", "") if answer is None else (answer.reason, answer.detail)
        attempt = Attempt(what, self.doors[at], expected, reason, detail)
        self.attempts.append(attempt)
        self.say(attempt)

    @asynccontextmanager
    async def _at(self, provider: Address) -> AsyncIterator[_Door]:
        async with self.way(new_sref()) as carrier:
            await carrier.meet(provider)
            yield _Door(carrier)


@dataclass(frozen=True, slots=True)
class _Door:
    """A provider's door, from the thief's return address."""

    carrier: Carrier

    async def hello(self) -> Hello:
        """What it shows to everybody."""
        for _ in range(TRIES):
            await self.carrier.ask_hello()
            data = await self.carrier.next(TRY_AGAIN_S)
            if data is not None and isinstance(message := decode(data), Hello):
                return message
        raise Refused("no_hello", "the thief finds no provider at the broker")

    async def answer(self, data: bytes) -> Refusal | None:
        """Its refusal; None when it answers otherwise, or not at all."""
        await self.carrier.post("present", data)
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                while True:
                    told = await self.carrier.next(ANSWER_TIMEOUT_S)
                    message = None if told is None else decode(told)
                    if not isinstance(message, Hello):
                        return message if isinstance(message, Refusal) else None
        except TimeoutError:
            return None

    async def refused(self, data: bytes, until: str = "") -> Refusal | None:
        """The same, asked again while the door does not know the session yet (or does not say `until` yet)."""
        answer = None
        for _ in range(TRIES):
            answer = await self.answer(data)
            again = answer is not None and (answer.reason in NOT_YET or (until and answer.reason != until))
            if not again:
                return answer
            await asyncio.sleep(TRY_AGAIN_S + secrets.randbelow(100) / 1_000)
        return answer
