"""One consumer's whole purchase on the embedded chain: real contract, real transactions, real signatures on both sides.

    async with Fair(tmp_path) as fair:
        buying = fair.buys()
        await fair.offers()
        ...
        summary = await buying

The provider's side is the script of `scripted_provider`, settling on chain with the receipts it was given.
"""

import asyncio
import time
from pathlib import Path

from bazaar import BIDDING_S, RATE, Bazaar
from scripted_provider import FAST, MemoryCarrier, ScriptedProvider, Told

from agent.chain import contract
from agent.chain.node import Receipt
from agent.consumer.journal import ConsumerJournal
from agent.consumer.journey import Journey, JourneySummary, Order
from agent.consumer.market import Market
from agent.consumer.policy import SigningLimits
from agent.core.messages import decode
from agent.core.token import NO_ACK, Ack
from agent.core.units import cost_wei_ceil

ORDER = Order(energy_wh=200, rate_wei_per_kwh_start=RATE, bidding_s=BIDDING_S, token_validity_s=3600)
BID = RATE * 8 // 10
QUICK = SigningLimits(
    step_wh=1_000, pre_sign_wh=1_000
)  # a test's energy flows in no time, and its driver trusts


class LateCarrier(MemoryCarrier):
    """The provider is known only when the consumer meets it."""

    def __init__(self, fair) -> None:
        super().__init__(None)
        self.fair = fair

    async def meet(self, provider) -> None:
        """The script begins."""
        self.provider = self.fair.scripted()
        assert provider == self.provider.terms.provider

    async def ask_hello(self) -> None:
        """A Hello by chain time."""
        self.provider.now_s = self.fair.now_s
        await super().ask_hello()


class Fair(Bazaar):
    """Alice sells, Carol buys."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.consumer_journal: ConsumerJournal | None = None
        self.journal_kind = ConsumerJournal
        self.told = Told()
        self.script: ScriptedProvider | None = None
        self.journey: Journey | None = None
        self.buying: asyncio.Task[JourneySummary] | None = None

    async def __aexit__(self, *everything) -> None:
        await self.crash()
        await super().__aexit__(*everything)

    # ---- the consumer

    def prepared(self) -> Journey:
        """Carol's journey with her journal opened (again)."""
        if self.consumer_journal is None:
            self.consumer_journal = self.journal_kind(
                self.folder / "carol" / "consumer.sqlite", self.domain, self.consumer.address, time.time
            )
        journal = self.consumer_journal
        market = Market(self.node, self.sender(self.consumer.signer), self.domain, journal)
        self.journey = Journey(
            domain=self.domain,
            account=self.consumer.signer,
            journal=journal,
            market=market,
            limits=QUICK,
            now_ms=lambda: time.monotonic_ns() // 1_000_000,
            sref="aa" * 16,
            tell=self.told,
            waits=FAST,
        )
        return self.journey

    def buys(self) -> asyncio.Task[JourneySummary]:
        """Carol starts (or continues) her purchase."""
        self.carrier = LateCarrier(self)
        self.buying = asyncio.create_task(self.prepared().charge(ORDER, self.carrier))
        return self.buying

    async def crash(self) -> None:
        """Carol's process ends without a word."""
        if self.buying is not None:
            self.buying.cancel()
            await asyncio.wait({self.buying})
        if self.consumer_journal is not None:
            self.consumer_journal.close()
            self.consumer_journal = None

    # ---- the chain

    @property
    def now_s(self) -> int:
        """Time of the newest block."""
        return int(self.net.evm.head.header.timestamp)

    def pass_time(self, seconds: int) -> None:
        """The next block is so much later."""
        self.net.methods.increase_time(seconds + max(0, self.now_s - self.net.methods.now_s))
        self.net.mine()

    async def auction(self) -> contract.AuctionState:
        """Carol's auction."""
        return contract.decode_auctions(
            await self.node.call(self.address, contract.encode_auctions(self.consumer.address))
        )

    async def session(self, token) -> contract.SessionState:
        """A session, as the contract holds it."""
        return contract.decode_sessions(await self.node.call(self.address, contract.encode_sessions(token)))

    async def ledger_wei(self, account) -> int:
        """Somebody's ledger."""
        return contract.decode_balances(await self.node.call(self.address, contract.encode_balances(account)))

    async def until(self, holds, seconds: float = 15.0) -> None:
        """Wait for a condition; a purchase that fails meanwhile fails the test at once."""
        async with asyncio.timeout(seconds):
            while not (await holds() if asyncio.iscoroutinefunction(holds) else holds()):
                if self.buying is not None and self.buying.done():
                    self.buying.result()
                await asyncio.sleep(0.01)

    # ---- the provider

    async def offers(self, rate: int = BID) -> None:
        """Alice bids once there is an auction, and the bidding time passes."""
        await self.until(self._is_live)
        auction = await self.auction()
        data = contract.encode_place_bid(self.consumer.address, auction.auction_nonce, rate)
        await self.send(self.provider.owner.signer, data, cost_wei_ceil(rate, auction.energy_wh))
        self.pass_time(BIDDING_S + 5)

    async def _is_live(self) -> bool:
        return (await self.auction()).is_live

    def scripted(self) -> ScriptedProvider:
        """Alice's side of the plug for Carol's newest session; the same one as long as the token is."""
        errand = self.consumer_journal.open_errand
        if self.script is None or self.script.terms.token != errand.terms.token:
            self.script = ScriptedProvider(
                errand.terms, self.provider.operator.signer, self.domain, now_s=self.now_s
            )
        return self.script

    async def delivers(self, wh: int) -> None:
        """The meter says `wh`, and Carol signs for it."""
        await self.until(lambda: self.script is not None and self.script.grant is not None)
        self.carrier.say(self.script.reading(wh))
        await self.until(lambda: self.script.acked_wh == wh)

    async def settles(self, wh: int | None = None) -> Receipt:
        """Alice's operator ends the connection with the newest receipt (or with less)."""
        ack, receipt_wh = NO_ACK, 0
        if self.script.receipts:
            grant, receipt = self.script.grant, decode(self.script.receipts[-1])
            challenge = self.consumer_journal.open_errand.presented.challenge
            receipt_wh = receipt.delivered_wh
            ack = Ack(
                grant.token,
                grant.session_key,
                grant.max_energy_wh,
                grant.valid_until_s,
                challenge,
                grant.signature,
                receipt.signature,
            )
        settled_wh = receipt_wh if wh is None else wh
        data = contract.encode_end_connection(self.script.terms.token, settled_wh, ack)
        receipt = await self.send(self.provider.operator.signer, data)
        self.carrier.say(self.script.final(settled_wh))
        return receipt
