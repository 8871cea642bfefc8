"""A consumer at the door of a story: good presentations, receipts and stops, and ways to spoil them.

visit = at_the_plug()
assert isinstance(visit.says(visit.present()), Accept)
assert visit.refused(visit.present(token=hash32("another"))) == "wrong_token"
"""

from dataclasses import replace

from story import (
    CONSUMER,
    DOMAIN,
    OPERATOR,
    PORT,
    PROVIDER,
    SESSION_KEY,
    TERMS,
    Story,
    ended,
    ended_believed,
    hash32,
    matched,
    records,
    settles,
    stops,
)

from agent.core import token as rules
from agent.core.live import Policy
from agent.core.messages import Accept, Present, ReceiptMessage, Refusal, Stop, encode
from agent.core.session import Stage
from agent.core.token import ZERO_ADDRESS
from agent.door import Door

PHONE = "phone"
TWO_PORTS = Policy(max_unacked_wh={PORT: 50, "right": 50})


class Visit:
    """A consumer at the door of a story."""

    def __init__(self, story: Story) -> None:
        self.story = story
        self.drawn = self.visits = 0
        self.door = Door(
            story.engine, DOMAIN, PROVIDER.address, OPERATOR, tuple(story.outlets), self.random_bytes
        )

    def random_bytes(self, count: int) -> bytes:
        """Different every time, the same in every run."""
        self.drawn += 1
        return hash32("random", self.drawn)[:count]

    def present(
        self, terms=TERMS, *, port=PORT, scheme="eip712", wallet=CONSUMER, hello=None, sign=None, **changes
    ) -> Present:
        """A good presentation; `changes` replace fields after signing, `sign` signs with something else."""
        hello = hello or self.door.hello(port)
        self.visits += 1
        nonce_c = hash32("nonceC", self.visits)
        key = SESSION_KEY.address if scheme == "eip712" else ZERO_ADDRESS
        limit = 5_000 if scheme == "eip712" else 0
        typed = rules.PresentToken(
            terms.token,
            terms.session_id,
            PROVIDER.address,
            key,
            limit,
            terms.valid_until_s,
            rules.challenge(hello.typed, nonce_c),
        )
        signer = sign or wallet
        signature = (
            signer.sign(typed)
            if scheme == "eip712"
            else signer.sign_digest(rules.token_digest_eip191(terms.token))
        )
        message = Present(
            scheme,
            terms.session_id,
            terms.token,
            hello.charger_id,
            hello.nonce,
            nonce_c,
            key,
            limit,
            terms.valid_until_s,
            wallet.public_key,
            signature,
        )
        return replace(message, **changes)

    def says(self, message, sref=PHONE, source=None):
        """The door's answer."""
        data = message if isinstance(message, bytes) else encode(message)
        return self.door.answer(sref, source or sref, data)

    def refused(self, message, sref=PHONE, source=None) -> str:
        """The reason of a refusal, which must leave book and journal alone."""
        book = self.story.book
        answer = self.says(message, sref, source)
        assert isinstance(answer, Refusal), answer
        assert self.story.book is book
        return answer.reason

    def receipt(self, energy_wh, signer=SESSION_KEY) -> ReceiptMessage:
        """A receipt by the session key."""
        return ReceiptMessage(
            TERMS.session_id, energy_wh, signer.sign(rules.Receipt(TERMS.session_id, energy_wh))
        )

    def stop(self, signer=SESSION_KEY) -> Stop:
        """A stop request."""
        at_s = self.story.at_s
        return Stop(TERMS.session_id, at_s, signer.sign(rules.StopRequest(TERMS.session_id, at_s)))


def at_the_plug(**more) -> Visit:
    """A believed session, a plugged car at rest, and nobody presented yet."""
    return Visit(matched(**more))


def charging(**more) -> Visit:
    """... presented, accepted and delivering."""
    visit = at_the_plug(**more)
    assert isinstance(visit.says(visit.present()), Accept)
    _ = visit.story >> records()
    assert visit.story.delivering
    return visit


def closed() -> Visit:
    """A session that is settled."""
    visit = charging()
    visit.story.passes(10)
    visit.says(visit.receipt(20))
    story = (visit.story >> stops()).passes(25) >> records() >> settles() >> ended(20) >> ended_believed()
    assert story.stage is Stage.SETTLED
    return visit
