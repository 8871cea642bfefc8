"""Meeting at the plug: M0 their Hello, M1 our signed token, M2 their acceptance (PROTOCOL section 4).

Rules
* We present only to a fresh Hello signed by the winner of our auction; the acceptance must sign a challenge that holds
  our own random nonce, so it was made for us and now.
* A presentation is journaled before it is sent, and repeated byte for byte: the provider knows a repeat by that. A new
  one, with a new Hello and a new nonce, is made only when the provider calls the Hello used or stale.
* "Not yet" is waited out with growing pauses; every other no ends the meeting with the provider's own word, once it was the
  answer to five knocks in a row: a refusal is not signed, so one may be a liar's, or an old one said again.

May not know: transports, energy, the journey around it.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field

from agent.consumer.carrier import Backoff
from agent.consumer.journal import Accepted, Presented
from agent.consumer.plug import Plug, Step, TokenChanged
from agent.core import token as rules
from agent.core.messages import Accept, Final, Hello, Message, Present, Refusal, Status, decode, encode
from agent.errors import Refused, Transient

NOT_YET = frozenset({"not_yet_seen", "not_yet_confirmed", "unknown_session", "rate_limited", "busy"})
NEW_HELLO = frozenset({"stale_hello", "replayed"})
_LEAVE = "`v2v consumer end` gives the session up; what you did not sign for comes back after the challenge"
REMEDIES = {
    "expired": _LEAVE,
    "too_late": _LEAVE,
    "out_of_order": f"ask the provider for another charging port; or {_LEAVE}",
    "reserve_reached": _LEAVE,
    "unknown_charger": "is --port the name written at the plug?",
    "wrong_provider": "is this the charger you won? Another code may be stuck over its own; nothing was signed",
    "wrong_signer": "somebody shows a code in your provider's name; nothing was signed. Tell whoever owns the charger",
    "stale_hello": "the code was old; stay until the charger shows a new one, and run the same command again",
    "malformed": "consumer and provider run versions that do not understand each other; update the older one",
}
REFUSED_KNOCKS = 5  # six seconds: a human waits that long to hear no, and a liar must keep it up
SCAN_REMEDIES = REMEDIES | {
    "malformed": "scan the code that the charger shows now; the app opens no address and reads nothing but a charger's Hello",
    "stale_hello": "scan the code that the charger shows now; this one is a photograph, or older than two minutes",
}
KNOCK_GROWTH = 16  # quick on a fast chain, polite on a slow one: 0.5 s at first, 8 s at most
KNOCK_GROWTH_UNHEARD = (
    4  # 2 s while nothing at all comes back: in a flood a broker loses most of what it is given
)
GATHER_S = 0.4  # Hellos of several ports arrive together; we must see whether there is a choice to make
HELLOS_MAX = 16  # ports we look at: a provider has at most eight


@dataclass(slots=True)
class Meeting:
    """One meeting. `port` is the name at the plug; empty: the provider's only one. `scanned` is what the code there says, a
    Hello: nobody has to type a name then, and somebody else's code is refused before anything is said.
    """

    plug: Plug
    port: str = ""
    scanned: bytes = b""
    _charger_id: bytes = b""
    _hellos: dict[bytes, Hello] = field(default_factory=dict)  # newest believed one per charger id
    _told: set[str] = field(
        default_factory=set
    )  # why Hellos were not believed; each said once, or a stranger fills the screen
    _used_nonces: set[bytes] = field(default_factory=set)
    _refused_knocks: int = 0  # in a row
    _said_no: bool = False  # to the newest knock
    _heard: bool = False  # anything, after the newest knock

    async def meet(self) -> Accept:
        """Present our token until it is accepted. Raises Refused with the provider's reason or ours, Transient when
        nobody answers, TokenChanged when the chain must be asked again.
        """
        accepted = self.plug.errand.accepted
        await self.plug.carrier.meet(self.plug.terms.provider)
        if accepted is not None:
            accept = decode(accepted.message)
            assert isinstance(accept, Accept)
            return accept
        if self.port:
            self._charger_id = rules.charger_id(self.port)
        if self.scanned:
            await self._read_scan()
        try:
            async with asyncio.timeout(self.plug.waits.meeting_s):
                return await self._present_until_accepted()
        except TimeoutError:
            raise self._nobody("did not accept our token") from None

    async def _present_until_accepted(self) -> Accept:
        presented = self.plug.errand.presented or self._sign(await self._fresh_hello())
        knock_s = self.plug.waits.knock_s
        backoff = Backoff(knock_s, KNOCK_GROWTH * knock_s)
        while True:
            wait_s = backoff.next_s()
            if not self._heard:
                wait_s = min(wait_s, KNOCK_GROWTH_UNHEARD * knock_s)
            self._heard = False
            self._refused_knocks = self._refused_knocks + 1 if self._said_no else 0
            self._said_no = False
            await self.plug.carrier.post("present", presented.message)
            answer = await self._answer(presented, wait_s)
            if isinstance(answer, Accept):
                self.plug.journal.write(Accepted(self.plug.journal.at_s, encode(answer)))
                self.plug.say(Step.PRESENT, "the provider has accepted our token", stage="AUTHORISED")
                return answer
            if answer is not None:
                presented = self._sign(await self._fresh_hello())
                backoff.reset()

    # ---- M0

    async def _read_scan(self) -> None:
        """The code at the plug: our provider's, or refused by name. It also says which port we stand at."""
        try:
            hello = decode(self.scanned)
            if not isinstance(hello, Hello):
                raise Refused("malformed", "this is no Hello of a charger")
            self._charger_id = hello.charger_id
            await self._check_hello(hello)
        except Refused as no:
            if no.reason == "stale_hello" and self.plug.errand.presented_at_s is not None:
                return  # the chain told our `connect` anew: we still stand where it was scanned, and need a new Hello
            said = f"the code you scanned: {no.detail}"
            raise Refused(no.reason, said, remedy=SCAN_REMEDIES.get(no.reason, "")) from no
        self._hellos[hello.charger_id] = hello

    async def _fresh_hello(self) -> Hello:
        """A Hello of this provider that nobody has used, for the port we stand at."""
        self.plug.say(Step.HELLO, "looking for the provider at the plug")
        try:
            async with asyncio.timeout(self.plug.waits.hello_s):
                while True:
                    await self.plug.carrier.ask_hello()
                    await self._listen_for_hellos(self.plug.waits.hello_ask_s)
                    if self._hellos:
                        return self._chosen()
        except TimeoutError:
            raise self._nobody("shows no Hello at the plug") from None

    async def _listen_for_hellos(self, wait_s: float) -> None:
        """Until `wait_s` is over, or GATHER_S after the first believed one: there may be several ports."""
        until_ms = self.plug.now_ms() + int((GATHER_S if self._hellos else wait_s) * 1000)
        while (left_ms := until_ms - self.plug.now_ms()) > 0:
            message = await self.plug.next(left_ms / 1000)
            if isinstance(message, Hello) and await self._keep(message) and len(self._hellos) == 1:
                until_ms = min(until_ms, self.plug.now_ms() + int(GATHER_S * 1000))

    async def _keep(self, hello: Hello) -> bool:
        """Keep it if it is believed; the newest one of each port."""
        try:
            await self._check_hello(hello)
        except Refused as odd:
            self.plug.odd = odd
            if odd.reason not in self._told:
                self._told.add(odd.reason)
                self.plug.say(Step.HELLO, f"not believed ({odd.reason}): {odd.detail}")
            return False
        if hello.charger_id not in self._hellos and len(self._hellos) >= HELLOS_MAX:
            return False
        self._hellos[hello.charger_id] = hello
        return True

    async def _check_hello(self, hello: Hello) -> None:
        if hello.provider != self.plug.terms.provider:
            raise Refused(
                "wrong_provider", "this Hello is of another provider than the winner of our auction"
            )
        if self._charger_id and hello.charger_id != self._charger_id:
            raise Refused(
                "unknown_charger", f"this Hello is not of the charging port {self.port or 'you scanned'!r}"
            )
        if hello.nonce in self._used_nonces:
            raise Refused("stale_hello", "this Hello was used already")
        await self.plug.believe(
            hello.typed, hello.signature
        )  # before the node is asked for a stranger's sake
        if hello.expires_at_s <= await self.plug.chain.now_s():
            raise Refused("stale_hello", "this Hello has expired")

    def _chosen(self) -> Hello:
        if len(self._hellos) > 1:
            raise Refused(
                "which_port",
                f"this provider has {len(self._hellos)} charging ports",
                remedy="say which one you are plugged into: --port and the name written there",
            )
        return next(iter(self._hellos.values()))

    # ---- M1

    def _sign(self, hello: Hello) -> Presented:
        """Our token, bound to this Hello and a nonce of our own, granting the session key; journaled."""
        plug, terms = self.plug, self.plug.terms
        nonce = secrets.token_bytes(32)
        grant = rules.PresentToken(
            terms.token,
            terms.session_id,
            terms.provider,
            plug.session_key.address,
            terms.energy_wh_ordered,
            terms.valid_until_s,
            rules.challenge(hello.typed, nonce),
        )
        message = Present(
            "eip712",
            terms.session_id,
            terms.token,
            hello.charger_id,
            hello.nonce,
            nonce,
            grant.session_key,
            grant.max_energy_wh,
            grant.valid_until_s,
            plug.account.public_key,
            plug.account.sign_digest(rules.digest(plug.domain, grant)),
        )
        presented = Presented(plug.journal.at_s, encode(message), grant.challenge)
        plug.journal.write(presented)
        self._used_nonces.add(hello.nonce)
        self._hellos.clear()
        plug.say(Step.PRESENT, "presenting our signed token")
        return presented

    # ---- M2

    async def _answer(self, presented: Presented, wait_s: float) -> Accept | Refusal | None:
        """The believed acceptance, a refusal that wants a new Hello, or None: post the same again."""
        until_ms = self.plug.now_ms() + int(wait_s * 1000)
        while (left_ms := until_ms - self.plug.now_ms()) > 0:
            message = await self.plug.next(left_ms / 1000)
            self._heard = self._heard or not (message is None or isinstance(message, Hello))
            if isinstance(message, Accept) and await self._is_ours(message, presented):
                return message
            if isinstance(message, Refusal) and self._wants_new_hello(message):
                return message
            if isinstance(message, Hello):
                await self._keep(message)  # the next one, should this one turn out to be used
            elif message is not None:
                self._note(message)
        return None

    async def _is_ours(self, accept: Accept, presented: Presented) -> bool:
        try:
            await self._check_accept(accept, presented)
        except Refused as odd:
            self.plug.odd = odd
            return False
        return True

    async def _check_accept(self, accept: Accept, presented: Presented) -> None:
        if accept.session_id != self.plug.terms.session_id:
            raise Refused("unknown_session", "this acceptance is of another session")
        if accept.challenge != presented.challenge:
            raise Refused("wrong_challenge", "this acceptance does not answer our presentation")
        typed = rules.SessionAccept(
            accept.session_id,
            accept.challenge,
            accept.register_mwh_begin,
            accept.max_unacked_wh,
            accept.accepted_at_s,
        )
        await self.plug.believe(typed, accept.signature)

    def _wants_new_hello(self, refusal: Refusal) -> bool:
        """True: sign anew. False: the same again, later. Everything else is raised."""
        if refusal.reason in NEW_HELLO:
            return True
        if refusal.reason == "wrong_token":
            raise TokenChanged
        if refusal.reason in NOT_YET:
            self.plug.odd = Refused(refusal.reason, refusal.detail)
            self.plug.say(Step.PRESENT, f"the provider says: {refusal.reason.replace('_', ' ')}")
            return False
        self._said_no = True
        self.plug.odd = Refused(refusal.reason, refusal.detail, remedy=REMEDIES.get(refusal.reason, ""))
        if self._refused_knocks + 1 >= REFUSED_KNOCKS:
            raise self.plug.odd
        return False

    def _note(self, message: Message) -> None:
        if isinstance(message, Status) and message.session_id == self.plug.terms.session_id:
            reason = f" ({message.reason})" if message.reason else ""
            self.plug.say(Step.PRESENT, f"the provider says: {message.stage}{reason}", stage=message.stage)
        if isinstance(message, Final) and message.session_id == self.plug.terms.session_id:
            raise TokenChanged  # over before it began, they say; the chain knows

    # ---- when nobody comes

    def _nobody(self, what: str) -> Refused | Transient:
        """What a time-out means: the newest reason why an answer was not believed, or that there was none."""
        if self.plug.odd is not None:
            reason = self.plug.odd.reason
            said = f"the provider {what}; last seen: {self.plug.odd.detail}"
            return Refused(reason, said, remedy=REMEDIES.get(reason, ""))
        trouble = f" ({self.plug.carrier.trouble})" if self.plug.carrier.trouble else ""
        return Transient(
            f"the provider {what}{trouble}",
            remedy="is it there, switched on, and on the same broker? Run the same command again to go on from here",
        )
