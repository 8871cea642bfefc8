"""The whole way from auction to receipt, in named steps; each can be walked alone, and again after a crash.

Rules
* The journal says what we want (an errand), the chain says where it stands; every step looks before it acts, so walking
  the same step twice buys nothing twice.
* An open errand is finished before another one begins.
* At the end the chain is checked against what we signed: never more energy than our receipts (or our own concession),
  the price to the wei, the rest back in our ledger.

May not know: MQTT, HTTP, command lines. Carriers are made by whoever calls.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from agent import keys
from agent.chain.contract import AuctionState
from agent.consumer.carrier import Carrier
from agent.consumer.charging import Charged, Charging
from agent.consumer.journal import (
    Closed,
    Conceded,
    ConsumerJournal,
    Errand,
    Matched,
    OrderPlaced,
    OwnMeterRead,
    TransactionMined,
)
from agent.consumer.market import Market
from agent.consumer.meeting import Meeting
from agent.consumer.plug import Plug, Progress, Signer, Step, Tell, TokenChanged, Waits
from agent.consumer.policy import SigningLimits
from agent.core.events import Terms
from agent.core.token import Domain
from agent.core.units import Address, SessionId, Token, TxHash, cost_wei_ceil, cost_wei_floor, hex0x, short
from agent.errors import Refused, Transient

MEETINGS_MAX = 20  # how often the chain may retell our `connect` (reorgs) before a human should look
FINDING_TRIES = 5  # looks, one chain_poll_s apart
RETOLD_WAIT_S = 600.0  # for a `connect` that fell out of the chain to be mined again


@dataclass(frozen=True, slots=True)
class Order:
    """What to buy. `bidding_s` and `token_validity_s` must lie within the market's parameters."""

    energy_wh: int
    rate_wei_per_kwh_start: int
    bidding_s: int
    token_validity_s: int

    @property
    def deposit_wei(self) -> int:
        """What is locked while the auction runs."""
        return cost_wei_ceil(self.rate_wei_per_kwh_start, self.energy_wh)


@dataclass(frozen=True, slots=True)
class JourneySummary:
    """What was bought, for how much, and where it is written. `transactions` are ours; the settlement is the provider's."""

    session_id: SessionId
    token: Token
    provider: Address
    energy_wh_ordered: int
    energy_wh_signed: int
    energy_wh_acked: int
    energy_wh_settled: int
    rate_wei_per_kwh: int
    deposit_wei: int  # locked by startAuction
    cost_wei: int
    refund_wei: int  # deposit less cost
    gas_wei: int  # fees of our own transactions
    stop_reason: str
    transactions: tuple[TransactionMined, ...]
    settlement_tx: TxHash
    settlement_block: int
    ocmf_begin: str
    ocmf_end: str
    seconds: int

    def as_json(self) -> dict[str, Any]:
        """For `--json`: bytes as 0x-hex, money as decimal strings (JavaScript loses wei)."""
        body: dict[str, Any] = {}
        for name in self.__slots__:
            value = getattr(self, name)
            if name == "transactions":
                value = [_transaction_json(mined) for mined in value]
            elif isinstance(value, bytes):
                value = hex0x(value)
            elif name.endswith("_wei") or name == "rate_wei_per_kwh":
                value = str(value)
            body[name] = value
        return body


def _transaction_json(mined: TransactionMined) -> dict[str, Any]:
    return {
        "step": mined.step,
        "tx": hex0x(mined.tx_hash),
        "block": mined.block_number,
        "gas_used": mined.gas_used,
        "fee_wei": str(mined.fee_wei),
        "succeeded": mined.succeeded,
    }


@dataclass(slots=True, kw_only=True)
class Journey:
    """One consumer on its way. `port` is the name at the plug, or `scanned` what the code there says; `stop.set()` asks the
    provider to stop early.
    """

    domain: Domain
    account: Signer
    journal: ConsumerJournal
    market: Market
    limits: SigningLimits
    now_ms: Callable[[], int]  # monotonic
    sref: str  # where the provider answers us; an open errand keeps its own
    tell: Tell = lambda _progress: None
    waits: Waits = field(default_factory=Waits)
    port: str = ""
    scanned: bytes = b""
    own_register_wh: Callable[[], int | None] = lambda: (
        None
    )  # our car's own counter; None: it shows none (now)
    confirmed: asyncio.Event = field(default_factory=asyncio.Event)  # our driver sees our car charging
    stop: asyncio.Event = field(default_factory=asyncio.Event)

    # ---- the whole way

    async def charge(self, order: Order, carrier: Carrier) -> JourneySummary:
        """From auction to receipt; an open errand is continued instead of starting another one. `carrier` is entered."""
        if self.journal.open_errand is None:
            await self.start_auction(order)
        await self.connect()
        return await self.present(carrier)

    # ---- auction

    async def start_auction(self, order: Order) -> OrderPlaced:
        """Lock the deposit and ask for bids. Raises Refused("errand_open" | "auction_live" | the contract's error)."""
        if self.journal.open_errand is not None:
            raise Refused(
                "errand_open",
                "the last purchase is not finished",
                remedy="`v2v consumer charge` goes on with it; `v2v consumer cancel` gives up an auction without bids",
            )
        auction = await self.market.auction()
        if auction.is_live:
            raise Refused(
                "auction_live",
                f"this account has an auction (number {auction.auction_nonce}) that this journal does not know",
                remedy="use the journal it was started with, or `v2v consumer cancel`",
            )
        placed = OrderPlaced(
            self.journal.at_s,
            auction.auction_nonce + 1,
            order.energy_wh,
            order.rate_wei_per_kwh_start,
            order.bidding_s,
            order.token_validity_s,
            await self.market.head_number(),
            self.sref,
        )
        self.journal.write(placed)
        await self._start(placed)
        return placed

    async def _start(self, placed: OrderPlaced) -> None:
        deposit_wei = cost_wei_ceil(placed.rate_wei_per_kwh_start, placed.energy_wh)
        self._say(
            Step.AUCTION,
            f"asking for {placed.energy_wh} Wh, locking {deposit_wei} wei",
            ordered=placed.energy_wh,
        )
        try:
            await self.market.start_auction(placed, deposit_wei)
        except Refused:
            self._close(
                "not_started"
            )  # nothing is locked and nobody can bid: the next order may be another one
            raise

    async def connect(self) -> Terms:
        """Wait for the closing of the bids and open the session with the winner; what is done already is not done again.

        Raises Refused("no_bids" | "connect_window_missed"): the auction is cancelled and the deposit is in our ledger.
        """
        errand = self._errand()
        if errand.terms is not None:
            return errand.terms
        placed = errand.order
        auction = await self.market.auction()
        if auction.auction_nonce < placed.auction_nonce:
            await self._start(placed)
        elif not (auction.is_live and auction.auction_nonce == placed.auction_nonce):
            return await self._matched(placed)  # connected before a crash; or the auction is gone
        auction = await self._closed_auction(placed)
        if not auction.is_live:
            return await self._matched(placed)
        await self._cancel_if_useless(auction)
        self._say(Step.CONNECT, f"{short(auction.provider)} wins at {auction.rate_wei_per_kwh} wei per kWh")
        await self.market.connect(auction.provider, auction.energy_wh)
        return await self._matched(placed)

    async def _closed_auction(self, placed: OrderPlaced) -> AuctionState:
        """The auction once its closing time (which late bids move) is past on the chain; or not live: somebody
        ended it.
        """
        told = None
        while True:
            auction = await self.market.auction()
            if not auction.is_live:
                return auction
            left_s = auction.closing_time_s - await self.market.now_s()
            if left_s <= 0:
                return auction
            if auction.rate_wei_per_kwh != told:
                told = auction.rate_wei_per_kwh
                leader = (
                    f"{short(auction.provider)} offers {told} wei per kWh"
                    if auction.has_bid
                    else "no bid yet"
                )
                self._say(Step.BIDDING, f"{leader}; {left_s} s left", ordered=placed.energy_wh)
            await asyncio.sleep(min(self.waits.chain_poll_s, max(0.2, left_s / 4)))

    async def _cancel_if_useless(self, auction: AuctionState) -> None:
        if not auction.has_bid:
            await self.market.cancel_auction()
            self._close("no_bids")
            raise Refused(
                "no_bids",
                f"nobody offered energy; {auction.deposit_wei} wei are back in your ledger",
                remedy="offer a higher rate, or bid longer; `v2v consumer withdraw` takes the money out",
            )
        if await self.market.now_s() > auction.connect_by_s:
            await self.market.cancel_auction()
            self._close("cancelled")
            raise Refused(
                "connect_window_missed",
                f"`connect` was possible until {auction.connect_by_s}; {auction.deposit_wei} wei are back in your ledger",
                remedy="start another auction, and stay connected until it closes",
            )

    async def _matched(self, placed: OrderPlaced) -> Terms:
        """Our session, once the node shows it. Raises Refused("auction_gone") only when the chain shows that instead."""
        for _ in range(FINDING_TRIES):
            terms = await self.market.find_terms(placed)
            if terms is not None:
                self.journal.write(Matched(self.journal.at_s, terms))
                self._say(
                    Step.CONNECT, f"connected to {short(terms.provider)}", ordered=terms.energy_wh_ordered
                )
                return terms
            if await self.market.is_auction_gone(placed):
                self._close("cancelled")
                raise Refused(
                    "auction_gone",
                    f"auction {placed.auction_nonce} ended without a session; the deposit is back in your ledger",
                    remedy="start another auction",
                )
            await asyncio.sleep(
                self.waits.chain_poll_s
            )  # answers of several nodes behind one address may disagree
        raise Transient(
            "the node shows neither our session nor the end of our auction",
            remedy="another node in [chain] urls may; the same command goes on from here",
        )

    async def cancel(self) -> TransactionMined:
        """Give up the auction: possible while nobody bid, or when the winner was not connected in time."""
        mined = await self.market.cancel_auction()
        errand = self.journal.open_errand
        if errand is not None and errand.terms is None:
            self._close("cancelled")
        return mined

    # ---- at the plug

    async def present(self, carrier: Carrier) -> JourneySummary:
        """Meet the provider, take the energy, sign for it, and check the settlement."""
        for _ in range(MEETINGS_MAX):
            errand = self._errand()
            if errand.terms is None:
                raise Refused(
                    "not_connected", "there is no session yet", remedy="`v2v consumer connect` opens it"
                )
            try:
                charged = await self._charged(errand.terms, carrier)
            except TokenChanged:
                await self._look_again(errand.terms)
                continue
            return await self._checked(charged)
        raise Transient(
            f"the chain told our session differently {MEETINGS_MAX} times",
            remedy="look at the node; the same command goes on from here",
        )

    async def _charged(self, terms: Terms, carrier: Carrier) -> Charged:
        settlement = await self.market.settlement(terms)
        if settlement is not None:
            return Charged(settlement, None, 0, "")
        plug = Plug(
            domain=self.domain,
            terms=terms,
            account=self.account,
            session_key=self._session_key(terms.session_id),
            carrier=carrier,
            journal=self.journal,
            chain=self.market,
            limits=self.limits,
            waits=self.waits,
            tell=self.tell,
            now_ms=self.now_ms,
        )
        self._read_own_meter()
        await Meeting(plug, self.port, self.scanned).meet()
        return await Charging(plug, self.stop, self._own_wh, self.confirmed).charge()

    def _read_own_meter(self) -> None:
        """Where our counter stood before any energy could flow; once a session, on disk."""
        register_wh = self.own_register_wh()
        if register_wh is not None and self._errand().own_register_wh_begin is None:
            self.journal.write(OwnMeterRead(self.journal.at_s, register_wh))

    def _own_wh(self) -> int | None:
        register_wh, begin_wh = self.own_register_wh(), self._errand().own_register_wh_begin
        return None if register_wh is None or begin_wh is None else max(0, register_wh - begin_wh)

    def _session_key(self, session_id: SessionId) -> Signer:
        """The session's ephemeral key; made once, and the same one after a crash."""
        path = self.journal.session_key_path(session_id)
        return keys.load_signer(str(path.absolute())) if path.exists() else keys.new_key(path.absolute())

    async def _look_again(self, known: Terms) -> None:
        """Wait until the chain tells our session again, and remember how."""
        try:
            async with asyncio.timeout(RETOLD_WAIT_S):
                while (terms := await self.market.find_terms(self._errand().order)) is None:
                    self._say(Step.CONNECT, "our session fell out of the chain; waiting for it to come back")
                    await self.market.repeat("connect")
                    await asyncio.sleep(self.waits.chain_poll_s)
        except TimeoutError:
            raise Transient(
                "our session fell out of the chain and did not come back",
                remedy="run the same command later; your money is safe in the contract or was never sent",
            ) from None
        if (terms.token, terms.block_hash) != (known.token, known.block_hash):
            self.journal.write(Matched(self.journal.at_s, terms))
        else:
            await asyncio.sleep(self.waits.chain_poll_s)  # the node's answers disagree for a moment

    async def end(self, energy_wh: int | None = None) -> TransactionMined:
        """Concede on chain: pay `energy_wh` (what we signed for, unless given). Final at once for the full order, else
        after the challenge, in which the provider can only show a higher receipt of ours.
        """
        errand = self._errand()
        if errand.terms is None:
            raise Refused(
                "not_connected", "there is no session to end", remedy="`v2v consumer cancel` ends an auction"
            )
        conceded_wh = errand.energy_wh_signed if energy_wh is None else energy_wh
        self.journal.write(Conceded(self.journal.at_s, conceded_wh))
        return await self.market.concede(errand.terms.token, conceded_wh)

    # ---- the end

    async def _checked(self, charged: Charged) -> JourneySummary:
        """The chain against what we signed. Raises Refused("wrong_settlement") when it does not add up."""
        await self.market.note_mined()
        errand, settlement = self._errand(), charged.settlement
        terms = errand.terms
        assert terms is not None
        self._check_money(errand, terms, charged)
        refunded_wei = await self.market.refunded_wei(settlement)
        if refunded_wei is not None and refunded_wei < terms.deposit_wei - settlement.cost_wei:
            raise _wrong(
                f"the ledger gained {refunded_wei} wei, not {terms.deposit_wei - settlement.cost_wei}"
            )
        summary = _summary(errand, terms, charged, self.journal.at_s - errand.order.at_s)
        self._close("settled")
        self.journal.session_key_path(terms.session_id).unlink(missing_ok=True)  # it has nothing left to sign
        self._say(
            Step.DONE,
            f"paid {settlement.cost_wei} wei for {settlement.energy_wh_settled} Wh",
            ordered=terms.energy_wh_ordered,
        )
        return summary

    @staticmethod
    def _check_money(errand: Errand, terms: Terms, charged: Charged) -> None:
        settled_wh, cost_wei = charged.settlement.energy_wh_settled, charged.settlement.cost_wei
        owed_wh = max(errand.energy_wh_signed, errand.energy_wh_conceded)
        if settled_wh > owed_wh:
            raise _wrong(f"{settled_wh} Wh were settled, but we signed for {owed_wh} Wh at most")
        if cost_wei != cost_wei_floor(terms.rate_wei_per_kwh, settled_wh):
            raise _wrong(
                f"{cost_wei} wei were paid for {settled_wh} Wh at {terms.rate_wei_per_kwh} wei per kWh"
            )

    # ---- small things

    def _errand(self) -> Errand:
        errand = self.journal.open_errand
        if errand is None:
            raise Refused(
                "no_errand", "nothing is being bought", remedy="`v2v consumer start-auction` begins"
            )
        return errand

    def _close(self, outcome: str) -> None:
        self.journal.write(Closed(self.journal.at_s, outcome))

    def _say(self, step: Step, words: str, *, ordered: int = 0) -> None:
        self.tell(Progress(step, words, energy_wh_ordered=ordered))


def _wrong(what: str) -> Refused:
    return Refused(
        "wrong_settlement",
        what,
        remedy="keep the journal: it holds every receipt that was signed. Is the session key stolen, or the node lying?",
    )


def _summary(errand: Errand, terms: Terms, charged: Charged, seconds: int) -> JourneySummary:
    settlement, final = charged.settlement, charged.final
    deposit_wei = cost_wei_ceil(errand.order.rate_wei_per_kwh_start, errand.order.energy_wh)
    return JourneySummary(
        session_id=terms.session_id,
        token=terms.token,
        provider=terms.provider,
        energy_wh_ordered=terms.energy_wh_ordered,
        energy_wh_signed=errand.energy_wh_signed,
        energy_wh_acked=charged.energy_wh_acked,
        energy_wh_settled=settlement.energy_wh_settled,
        rate_wei_per_kwh=terms.rate_wei_per_kwh,
        deposit_wei=deposit_wei,
        cost_wei=settlement.cost_wei,
        refund_wei=deposit_wei - settlement.cost_wei,
        gas_wei=sum(mined.fee_wei for mined in errand.mined),
        stop_reason=charged.stop_reason,
        transactions=errand.mined,
        settlement_tx=settlement.tx_hash,
        settlement_block=settlement.block_number,
        ocmf_begin="" if final is None else final.ocmf_begin,
        ocmf_end="" if final is None else final.ocmf_end,
        seconds=seconds,
    )
