"""Energy against receipts: from the acceptance to the settlement that the chain shows (PROTOCOL section 5).

Rules
* A receipt is signed for a verified reading only, as `policy` allows; it is journaled before it is sent, and sent again
  until it is acknowledged. Receipts are cumulative, so only the newest matters.
* Readings count in the order of their `seq`: an older one, however well signed, is a replay.
* What the provider says about the end is a hint. The session is over when the chain says so.
* What could not be signed yet (our meter lags, our driver was not asked) is looked at again at every tick: a provider that has
  paused sends no newer reading.
* Wrong readings that do not go away end the session: nothing more is signed and the provider is asked to stop.

May not know: transports, how the session began.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from agent.consumer.journal import CarConfirmed, ReceiptSigned
from agent.consumer.plug import Plug, Settlement, Step, TokenChanged
from agent.consumer.policy import SUSPICIOUS, Decline, Patience, Reason, Sign, Situation, decide
from agent.core import token as rules
from agent.core.messages import (
    AckMessage,
    Final,
    Message,
    ReadingMessage,
    ReceiptMessage,
    Refusal,
    Status,
    Stop,
    encode,
)
from agent.errors import Refused, Transient

TICK_S = 0.25  # how often time itself is looked at: resending, stopping, the chain
SETTLING_STAGES = frozenset({"STOPPING", "SETTLING", "SETTLED", "LAPSED", "STRANDED"})
PRESENT_AGAIN = frozenset(
    {"unknown_session"}
)  # the provider has forgotten us (a reorg): the chain knows more


@dataclass(frozen=True, slots=True)
class Charged:
    """How it ended. `final` is the provider's own account of it, with its meter records; None if it never came."""

    settlement: Settlement
    final: Final | None
    energy_wh_acked: int
    stop_reason: str


@dataclass(slots=True)
class Charging:
    """One session's readings and receipts. `own_wh` is what our own car measured, None where it cannot; then `confirmed`, set
    when our driver says that our car is charging.
    """

    plug: Plug
    stop: asyncio.Event
    own_wh: Callable[[], int | None] = lambda: None
    confirmed: asyncio.Event = field(default_factory=asyncio.Event)
    _seq: int = -1
    _reading: ReadingMessage | None = None
    _acked_wh: int = 0
    _stage: str = ""
    _final: Final | None = None
    _status_reason: str = ""
    _declined: Reason | None = None  # why the newest reading is not signed
    _distrust: Reason | None = None  # set once and for all: nothing more is signed
    _patience: Patience = field(default_factory=Patience)
    _trouble: str = ""
    _posted_ms: int = 0  # when the newest receipt, or the stop, went out
    _chain_ms: int | None = None  # the last look at the chain; None: look now
    _look: asyncio.Task[Settlement | None] | None = None
    _alive_ms: int = 0
    _is_quiet: bool = False  # said already that no word comes
    _presented_ms: int = 0

    async def charge(self) -> Charged:
        """Sign what is right until the chain shows the end. Raises Transient after `silence_s` without a sign of life,
        TokenChanged when the session's `connect` is told differently now.
        """
        plug = self.plug
        self._alive()
        # After a restart the monotonic clock is another one; the journal's wall clock says how long it was before.
        since_s = plug.errand.presented_at_s
        assert since_s is not None, "energy flows after a presentation"
        self._presented_ms = plug.now_ms() - 1000 * max(0, plug.journal.at_s - since_s)
        await self._repeat()
        try:
            while True:
                message = await plug.next(TICK_S)
                if message is not None:
                    await self._take(message)
                settlement = await self._tick()
                if settlement is not None:
                    return await self._ended(settlement)
        finally:
            if self._look is not None:
                self._look.cancel()

    # ---- messages

    async def _take(self, message: Message) -> None:
        if getattr(message, "session_id", self.plug.terms.session_id) != self.plug.terms.session_id:
            return  # another session's; not ours to judge
        match message:
            case ReadingMessage():
                await self._take_reading(message)
            case AckMessage():
                self._alive()
                # An ack is not signed: believed only as far as we signed, and only to stop repeating.
                self._acked_wh = max(
                    self._acked_wh, min(message.delivered_wh, self.plug.errand.energy_wh_signed)
                )
                self._show()
            case Status():
                self._take_status(message)
            case Final():
                self._final, self._chain_ms = message, None  # and look at the chain now
            case Refusal():
                self.plug.odd = Refused(message.reason, message.detail)
                self._trouble = f"it says: {message.reason}"  # unsigned: worth a word in the end, no more
                if message.reason in PRESENT_AGAIN:
                    self._chain_ms = None
            case _:
                return

    def _take_status(self, status: Status) -> None:
        self._alive()
        if status.stage != self._stage:
            self._stage = status.stage
            self._status_reason = status.reason
            self._show()

    async def _take_reading(self, reading: ReadingMessage) -> None:
        try:
            await self._check_reading(reading)
        except Refused as odd:
            self.plug.odd = odd
            return
        self._alive()
        self._seq, self._reading = reading.seq, reading
        await self._sign_for(reading)
        self._show()

    async def _check_reading(self, reading: ReadingMessage) -> None:
        if reading.seq <= self._seq:
            raise Refused("replayed", "this reading is not newer than the last one")
        typed = rules.MeterReading(
            reading.session_id, reading.seq, reading.delivered_wh, reading.power_w, reading.at_s
        )
        await self.plug.believe(typed, reading.signature)

    # ---- receipts

    async def _sign_for(self, reading: ReadingMessage) -> None:
        """A receipt for this reading, or the reason why there is none."""
        now_ms = self.plug.now_ms()
        decision = self._decision(reading, now_ms)
        self._patience = self._patience.after(decision, now_ms)
        self._declined = decision.reason if isinstance(decision, Decline) else None
        if self._declined not in (None, Reason.NOTHING_NEW):
            self.plug.odd = Refused(str(self._declined), f"their meter says {reading.delivered_wh} Wh")
        if isinstance(decision, Sign) and self._distrust is None:
            await self._sign(decision.energy_wh)

    def _decision(self, reading: ReadingMessage, now_ms: int) -> Sign | Decline:
        plug, errand = self.plug, self.plug.errand
        if self.confirmed.is_set() and not errand.is_confirmed:
            plug.journal.write(CarConfirmed(plug.journal.at_s))
        return decide(
            plug.limits,
            Situation(
                energy_wh_ordered=plug.terms.energy_wh_ordered,
                energy_wh_signed=errand.energy_wh_signed,
                reading_wh=reading.delivered_wh,
                elapsed_ms=self._elapsed_ms(now_ms),
                own_wh=self.own_wh(),
                confirmed=plug.errand.is_confirmed,
            ),
        )

    def _elapsed_ms(self, now_ms: int) -> int:
        """Since we presented, by whichever clock says more: a phone that sleeps stops the monotonic one, and energy flows on."""
        presented_at_s = self.plug.errand.presented_at_s
        assert presented_at_s is not None
        return max(now_ms - self._presented_ms, 1000 * (self.plug.journal.at_s - presented_at_s))

    async def _sign(self, energy_wh: int) -> None:
        plug = self.plug
        receipt = rules.Receipt(plug.terms.session_id, energy_wh)
        signature = plug.session_key.sign_digest(rules.digest(plug.domain, receipt))
        message = encode(ReceiptMessage(receipt.session_id, receipt.delivered_wh, signature))
        plug.journal.write(ReceiptSigned(plug.journal.at_s, energy_wh, message))
        await self._repeat()

    async def _repeat(self) -> None:
        """Send the newest receipt (again)."""
        self._posted_ms = self.plug.now_ms()
        receipt = self.plug.errand.receipt
        if receipt is not None:
            await self.plug.carrier.post("receipt", receipt.message)

    async def _ask_again(self) -> None:
        """Present again, byte for byte: the provider answers a repeat with the same acceptance, and tells us all the rest anew.
        A phone that slept, or an app that was started again, has no reading to sign for otherwise.
        """
        if not self._is_quiet:
            self._is_quiet = True
            trouble = f" ({self.plug.carrier.trouble})" if self.plug.carrier.trouble else ""
            self._show(f"no word from the provider; asking again{trouble}")
        presented = self.plug.errand.presented
        self._posted_ms = self.plug.now_ms()
        if presented is not None:
            await self.plug.carrier.post("present", presented.message)

    # ---- time

    async def _tick(self) -> Settlement | None:
        now_ms, waits = self.plug.now_ms(), self.plug.waits
        if self._reading is not None and self._declined not in (None, Reason.NOTHING_NEW):
            await self._sign_for(self._reading)
        if self._distrust is None and self._patience.is_over(now_ms):
            self._distrust = self._patience.reason
            self._show(f"stopping: {self._distrust}")
        if now_ms - self._posted_ms >= waits.resend_s * 1000:
            if self._wants_stop:
                await self._post_stop()
            elif self.plug.errand.energy_wh_signed > self._acked_wh:
                await self._repeat()
        if now_ms - max(self._alive_ms, self._posted_ms) >= waits.quiet_s * 1000:
            await self._ask_again()
        if now_ms - self._alive_ms >= waits.silence_s * 1000:
            raise self._silent()
        return self._chain_news(now_ms)

    @property
    def _wants_stop(self) -> bool:
        asked = self.stop.is_set() or self._distrust is not None
        return asked and self._stage not in SETTLING_STAGES and self._final is None

    async def _post_stop(self) -> None:
        plug = self.plug
        self._posted_ms = plug.now_ms()
        request = rules.StopRequest(plug.terms.session_id, plug.journal.at_s)
        signature = plug.session_key.sign_digest(rules.digest(plug.domain, request))
        await plug.carrier.post("stop", encode(Stop(request.session_id, request.at_s, signature)))

    def _chain_news(self, now_ms: int) -> Settlement | None:
        """Look at the chain beside the messages: a slow node must not delay a receipt."""
        if self._look is not None and self._look.done():
            look, self._look = self._look, None
            return look.result()
        due = self._chain_ms is None or now_ms - self._chain_ms >= self.plug.waits.chain_poll_s * 1000
        if self._look is None and due:
            self._chain_ms = now_ms
            self._look = asyncio.create_task(self._look_at_chain(), name="consumer-look")
        return None

    async def _look_at_chain(self) -> Settlement | None:
        chain, terms = self.plug.chain, self.plug.terms
        try:
            if await chain.is_open(terms.token):
                return None
            settlement = await chain.settlement(terms)
        except Transient as trouble:
            self._trouble = (
                trouble.message
            )  # energy and receipts do not wait for our node; we look again soon
            return None
        if settlement is None:
            raise TokenChanged
        return settlement

    # ---- the end

    async def _ended(self, settlement: Settlement) -> Charged:
        """Give the provider a moment to hand over its records: it waits for depth before it calls the session settled."""
        self._show("settled on the chain; waiting for the provider's meter records", step=Step.SETTLE)
        until_ms = self.plug.now_ms() + int(self.plug.waits.final_s * 1000)
        while self._final is None and (left_ms := until_ms - self.plug.now_ms()) > 0:
            message = await self.plug.next(left_ms / 1000)
            if isinstance(message, Final | Status | AckMessage):
                await self._take(message)
        return Charged(settlement, self._final, self._acked_wh, self._stop_reason())

    def _stop_reason(self) -> str:
        if self._final is not None and self._final.stop_reason:
            return self._final.stop_reason
        return "Remote" if self.stop.is_set() or self._distrust is not None else self._status_reason

    def _silent(self) -> Transient:
        wh = self.plug.errand.energy_wh_signed
        why = self.plug.carrier.trouble or self._trouble
        return Transient(
            f"no word from the provider for {self.plug.waits.silence_s:g} s" + (f" ({why})" if why else ""),
            remedy=f"run the same command again to wait on, or `v2v consumer end` to pay the {wh} Wh you signed for",
        )

    def _words(self) -> str:
        """What a driver should know now: that we do not sign, and why, before whatever the provider says."""
        if self._declined in SUSPICIOUS and self._reading is not None:
            own_wh = self.own_wh()
            ours = "" if own_wh is None else f", our car says {own_wh} Wh"
            return f"not signed ({self._declined}): their meter says {self._reading.delivered_wh} Wh{ours}"
        return f"{self._stage} ({self._status_reason})" if self._status_reason else self._stage

    def _alive(self) -> None:
        self._alive_ms, self._is_quiet = self.plug.now_ms(), False

    def _show(self, words: str = "", *, step: Step = Step.CHARGE) -> None:
        reading = self._reading
        if step is Step.CHARGE and self._stage in SETTLING_STAGES:
            step = Step.SETTLE
        self.plug.say(
            step,
            words or self._words(),
            stage=self._stage,
            energy_wh_delivered=0 if reading is None else reading.delivered_wh,
            power_w=0 if reading is None else reading.power_w,
            energy_wh_acked=self._acked_wh,
            asks_driver=self._declined is Reason.UNCONFIRMED,
        )
