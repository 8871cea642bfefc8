"""The only holder of the Sender: owed transactions become signed, journaled, then broadcast. In this order, always (rule 6).

| trouble | what is done |
|---|---|
| the pool lost it, or took it and forgot it | the same bytes again with every new head, until the chain shows them |
| it is slow, or too cheap for the pool | replaced: same nonce, both fees an eighth higher, journaled first; when: `settling` |
| fees are absurd against the stake | nothing is signed, or no more offered, until they fall or the deadline nears ("waiting") |
| the nonce was used by somebody else | heard at three heads, no receipt of any of our bytes, session still open: signed anew |
| a nonce below ours that nobody holds any more | a reorganisation lost its transaction: we take it, or ours would wait for ever |
| mined and failed | named, counted, signed again (with more gas where gas ran out); STRANDED after `REVERTS_MAX` |
| it would revert | not sent; named, asked again later: the consumer may have ended meanwhile, and the watcher will see it |
| no coins, pool full, anything else a node says | named, tried again |

Rules
* One nonce a settlement, one nonce a bid: whatever dies in between, one of its bytes is mined and no other can be.
* What one transaction is refused for delays no other one: a sale worth less than its gas must not hold up those after it.
* A bid is looked at, priced and signed once, while its owner waits; gas for every settlement that is owed is kept back first.

May not know: how logs become events, the charger, the door, who asked for a bid.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from agent.chain import contract
from agent.chain.node import Node, Receipt
from agent.chain.sender import Sender, SignedTx
from agent.core import events as ev
from agent.core import settling
from agent.core.bidding import Bid, SignedBid
from agent.core.effects import BroadcastBid, BroadcastSettlement, Effect, SignBid, SignSettlement
from agent.core.live import Purse, PurseSeen, TransactionTried, Tried, TriedState
from agent.core.session import Session, Settlement
from agent.core.units import Address, SessionId, TxHash, cost_wei_floor, hex0x, short
from agent.engine import Engine
from agent.errors import Refused, Transient

BEAT_S = 1.0  # how often owed transactions are looked at without a wake-up
RETRY_S = 5.0  # after a refusal or a lost node: the same question too often is a denial of our own node
GAP_AFTER_S = 45  # not mined by then (some blocks): is a nonce below ours free?
NONCE_LOW_HEADS = (
    3  # one backend of a node may be two blocks behind another: a nonce is lost when three heads agree
)
BID_REPLACE_AFTER_S, BID_REPLACEMENTS_MAX = 45, 8
PURSE_LOOK_S = 600  # three questions to the node each time; a settlement changes it by one in many

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Sent:
    """What this life of the agent has done about one transaction; losing it in a crash costs one repeated broadcast."""

    tx_hash: TxHash
    since_s: int
    head_number: int
    nonce_low_heads: int = 0


class ChainSend:
    """Sends settlements and bids."""

    def __init__(self, engine: Engine, node: Node, sender: Sender, contract_address: Address) -> None:
        self._engine, self._node, self._sender, self._contract = engine, node, sender, contract_address
        self._sent: dict[bytes, _Sent] = {}  # by session or bid
        self._purse_at_ms: int | None = None

    async def run(self) -> None:
        """For ever: do what is owed on chain."""
        while True:
            changed = self._engine.changed
            wait_s = BEAT_S
            try:
                delayed = await self.do_owed()
                await self._look_at_purse()
            except Transient as error:
                log.warning("settlement.delayed", error=str(error))
                delayed = True
            if delayed:
                wait_s = RETRY_S
                await asyncio.sleep(wait_s)
            try:
                async with asyncio.timeout(wait_s):
                    await changed.wait()
            except TimeoutError:
                continue

    async def do_owed(self) -> bool:
        """One round. True when something was refused, by the node or the contract: it stays owed. Raises Transient."""
        delayed = False
        for effect in self._engine.owed():
            if not isinstance(effect, SignSettlement | BroadcastSettlement | SignBid | BroadcastBid):
                continue
            if not self._is_owed(effect):
                continue  # while those before it waited for the node
            try:
                await self._do(effect)
            except Refused as refusal:
                delayed = True
                self._note(effect, refusal)
        self._sent = {key: sent for key, sent in self._sent.items() if key in self._open_keys()}
        return delayed

    async def _do(self, effect: SignSettlement | BroadcastSettlement | SignBid | BroadcastBid) -> None:
        match effect:
            case SignSettlement():
                await self._sign(effect)
            case BroadcastSettlement():
                await self._broadcast(effect)
            case SignBid():
                await self._sign_bid(effect)
            case BroadcastBid():
                await self._broadcast_bid(effect)

    # ---- what is said about it

    def _note(
        self, effect: SignSettlement | BroadcastSettlement | SignBid | BroadcastBid, no: Refused
    ) -> None:
        if isinstance(effect, SignBid | BroadcastBid):
            self._tell(effect.bid_id, "bid.delayed", "refused", no.reason, error=no.detail)
        elif no.reason == "fee_cap":
            self._deferred(self._engine.book.sessions[effect.session_id], no)
        else:
            name = _error_name(no.reason)  # its arguments name the token, which is nobody's business
            self._tell(effect.session_id, "settlement.delayed", "refused", name, error=no.detail)

    def _deferred(self, session: Session, refusal: Refused) -> None:
        live = self._engine.live
        self._tell(
            session.session_id, "settlement.deferred", "waiting", refusal.reason, error=refusal.detail,
            until_s=settling.deadline_s(session, live.policy.grace_s), gas_wei_max=str(settling.gas_wei_max(session, live)),
        )  # fmt: skip

    def _tell(self, key: bytes, event: str, state: TriedState, reason: str = "", **facts: str | int) -> None:
        """Into Live for the status, and into the log when it is news."""
        tried = Tried(state, reason)
        if self._engine.live.tried.get(key) == tried or key not in self._open_keys():
            return
        self._engine.observe(TransactionTried(key, tried))
        what = "bid" if key in self._engine.book.bids else "session"
        say = log.info if state == "sent" else log.warning
        say(event, **{what: short(key)}, reason=reason, **facts)

    # ---- nonces

    async def _next_nonce(self, *, pending: bool = False) -> int:
        """The next one that neither the chain (with `pending` the pool) nor an open transaction of ours has taken."""
        mined = await self._node.nonce(self._sender.address, pending=pending)
        return max([mined, *(nonce + 1 for nonce in self._open_nonces())])

    def _open_nonces(self) -> list[int]:
        book = self._engine.book
        signed: list[Settlement | SignedBid | None] = [one.settlement for one in book.open_sessions()]
        signed += [bid.signed for bid in book.open_bids()]
        return [one.nonce for one in signed if one is not None]

    async def _nonce_gap(self, nonce: int) -> int | None:
        """The lowest nonce below this one that neither the chain nor a transaction of ours has taken; None without one."""
        gap = await self._node.nonce(self._sender.address)
        held = {*self._open_nonces(), *map(_nonce_mined, self._engine.book.sessions.values())}
        held |= {bid.signed.nonce for bid in self._engine.book.bids.values() if bid.signed is not None}
        while gap in held:  # at most one more than we have sessions and bids
            gap += 1
        return gap if gap < nonce else None

    def _open_keys(self) -> set[bytes]:
        book = self._engine.book
        return {one.session_id for one in book.open_sessions()} | {bid.bid_id for bid in book.open_bids()}

    def _is_owed(self, effect: Effect) -> bool:
        """Still, after we have asked the node: the book moves meanwhile."""
        return effect in self._engine.owed()

    def _turn(self, key: bytes, tx_hash: TxHash) -> _Sent | None:
        """These bytes' turn: once a head is enough, and without a view we cannot know whether they are mined already."""
        header, sent = self._engine.live.header, self._sent.get(key)
        if header is None:
            return None
        if sent is None or sent.tx_hash != tx_hash:
            sent = self._sent[key] = _Sent(tx_hash, self._engine.at_s, header.number)
            return sent
        if sent.head_number == header.number:
            return None
        sent.head_number = header.number
        return sent

    async def _receipt_of(self, signed: Settlement | SignedBid) -> Receipt | None:
        """Of whichever of a transaction's bytes was mined."""
        for tx_hash in (signed.tx_hash, *reversed(signed.earlier)):
            receipt = await self._node.receipt(tx_hash)
            if receipt is not None:
                return receipt
        return None

    # ---- settlements: signing

    async def _sign(self, effect: SignSettlement) -> None:
        signed = await self._prepared(effect, await self._next_nonce())
        # No await between here and the journal; but the book may have moved while we asked the node for fees.
        if self._is_owed(effect):
            self._journal(effect.session_id, effect.energy_wh, signed)

    async def _prepared(self, owed: SignSettlement, nonce: int) -> SignedTx:
        session, gas_limit = self._engine.book.sessions[owed.session_id], None
        if session.settlement_error == "out_of_gas":  # the estimate was wrong once: not again
            gas_limit = contract.SETTLEMENT_GAS * (1 + session.settlement_reverts)
        return await self._sender.prepare(
            self._contract,
            contract.encode_end_connection(owed.token, owed.energy_wh, owed.ack),
            gas_limit=gas_limit,
            nonce=nonce,
            cost_wei_max=settling.gas_wei_max(session, self._engine.live),
        )

    def _journal(self, session_id: SessionId, energy_wh: int, signed: SignedTx) -> None:
        self._engine.accept(
            ev.SettlementSigned(
                self._engine.at_s,
                session_id,
                energy_wh,
                signed.nonce,
                signed.tx_hash,
                signed.raw_tx,
                signed.max_fee_per_gas_wei,
                signed.max_priority_fee_per_gas_wei,
            )
        )
        self._engine.observe(TransactionTried(session_id, None))
        log.info(
            "settlement.signed", session=short(session_id), energy_wh=energy_wh, tx=hex0x(signed.tx_hash)
        )

    # ---- settlements: sending

    async def _broadcast(self, effect: BroadcastSettlement) -> None:
        sent = self._turn(effect.session_id, effect.tx_hash)
        if sent is None:
            return
        receipt = await self._node.receipt(effect.tx_hash)
        if receipt is not None:
            if not receipt.succeeded:
                await self._reverted(effect, receipt)
            return  # mined: the watcher tells the rest
        if not self._is_owed(effect) or await self._is_signed_again(effect, self._engine.at_s - sent.since_s):
            return
        try:
            await self._sender.broadcast(effect.raw_tx)
        except Refused as refusal:
            await self._not_taken(effect, sent, refusal)
        else:
            sent.nonce_low_heads = 0
            before = self._engine.live.tried.get(effect.session_id)
            if before is None or before.state == "refused":
                self._tell(effect.session_id, "settlement.sent", "sent", tx=hex0x(effect.tx_hash))

    async def _is_signed_again(self, effect: BroadcastSettlement, waited_s: int) -> bool:
        """Whether other bytes took their place: because a nonce below is free, or because they waited long enough."""
        session = self._engine.book.sessions[effect.session_id]
        assert session.settlement is not None
        if waited_s >= GAP_AFTER_S:
            gap = await self._nonce_gap(session.settlement.nonce)
            if gap is not None:
                log.warning("settlement.nonce_gap", session=short(effect.session_id), free=gap)
                return await self._is_signed_anew(effect, gap)
        after_s = settling.replace_after_s(session, self._engine.live)
        if after_s is None:
            sid, tx = effect.session_id, hex0x(effect.tx_hash)
            self._tell(sid, "settlement.stuck", "stuck", replacements=session.replacements, tx=tx)
            return False
        return waited_s >= after_s and await self._is_replaced(effect)

    async def _is_replaced(self, effect: BroadcastSettlement) -> bool:
        """Pay more. False when more is not worth it now: then the old bytes are said again, for a pool may have lost them."""
        session = self._engine.book.sessions[effect.session_id]
        try:
            replaced = await self._sender.replacement(
                SignedTx.from_raw(effect.raw_tx),
                cost_wei_max=settling.gas_wei_max(session, self._engine.live),
            )
        except Refused as refusal:
            if refusal.reason != "fee_cap":
                raise
            self._deferred(session, refusal)
            return False
        if self._is_owed(effect):
            log.info(
                "settlement.replaced", session=short(effect.session_id), count=session.replacements + 1,
                max_fee_per_gas_wei=replaced.max_fee_per_gas_wei,
            )  # fmt: skip
            self._journal(effect.session_id, session.energy_wh_acked, replaced)
        return True

    async def _is_signed_anew(self, effect: BroadcastSettlement, nonce: int) -> bool:
        session = self._engine.book.sessions[effect.session_id]
        signed = await self._prepared(_settlement_of(session), nonce)
        if self._is_owed(effect):
            self._journal(session.session_id, session.energy_wh_acked, signed)
        return True

    async def _not_taken(self, effect: BroadcastSettlement, sent: _Sent, refusal: Refused) -> None:
        """The node's no. Raises it where nothing can be done but to ask again."""
        if not self._is_owed(effect):
            return
        session = self._engine.book.sessions[effect.session_id]
        if refusal.reason == "nonce_too_low":
            await self._nonce_taken(effect, sent)
        elif (
            refusal.reason == "underpriced"
            and settling.replace_after_s(session, self._engine.live) is not None
        ):
            await self._is_replaced(effect)  # at these fees no pool keeps it: waiting cannot help
        elif refusal.reason != "already_known":
            raise refusal

    async def _nonce_taken(self, effect: BroadcastSettlement, sent: _Sent) -> None:
        """Somebody else used our nonce, unless one of our own bytes did: then look, or let the watcher see it."""
        session = self._engine.book.sessions[effect.session_id]
        assert session.settlement is not None
        receipt = await self._receipt_of(session.settlement)
        if receipt is not None:
            if not receipt.succeeded:
                await self._reverted(effect, receipt)
            return
        sent.nonce_low_heads += 1
        if sent.nonce_low_heads < NONCE_LOW_HEADS:
            return
        state = contract.decode_sessions(
            await self._node.call(self._contract, contract.encode_sessions(session.terms.token))
        )
        if not state.is_open:
            return  # settled by another of our transactions or by the consumer; the watcher will see it
        log.warning("settlement.nonce_taken", session=short(effect.session_id))
        await self._is_signed_anew(effect, await self._next_nonce(pending=True))

    async def _reverted(self, effect: BroadcastSettlement, receipt: Receipt) -> None:
        why = _error_name((await self._sender.why_failed(SignedTx.from_raw(effect.raw_tx), receipt)).reason)
        log.error("settlement.reverted", session=short(effect.session_id), error=why)
        self._engine.accept(ev.SettlementReverted(self._engine.at_s, effect.session_id, receipt.tx_hash, why))

    # ---- bids

    async def _sign_bid(self, effect: SignBid) -> None:
        """Sign it, or journal by which name it is refused: its owner waits, and may decide anew."""
        if self._engine.live.header is None:
            return
        bid = self._engine.book.bids[effect.bid_id]
        try:
            signed, gas_wei_max = await self._bid_prepared(bid)
        except Refused as refusal:
            self._bid_ended(bid, refusal.reason, str(refusal))
            return
        if self._is_owed(effect):
            self._journal_bid(bid, signed, gas_wei_max)

    async def _bid_prepared(self, bid: Bid) -> tuple[SignedTx, int]:
        auction = contract.decode_auctions(
            await self._node.call(self._contract, contract.encode_auctions(bid.consumer))
        )
        if not auction.is_live:
            raise Refused("NoAuction", f"{short(bid.consumer)} has no live auction")
        if auction.auction_nonce != bid.auction_nonce:
            raise Refused(f"StaleAuction(auctionNonce={auction.auction_nonce})")
        await self._require_gas()
        gas_wei_max = cost_wei_floor(bid.rate_wei_per_kwh, auction.energy_wh)  # what the whole order brings
        provider = self._engine.book.provider
        data = contract.encode_place_bid_for(provider, bid.consumer, bid.auction_nonce, bid.rate_wei_per_kwh)
        nonce = await self._next_nonce()
        return await self._sender.prepare(
            self._contract, data, nonce=nonce, cost_wei_max=gas_wei_max
        ), gas_wei_max

    async def _require_gas(self) -> None:
        """Every settlement that is owed, this bid's too, can be paid at a prudent fee. Raises Refused("gas_reserve")."""
        purse, owed = await self._purse(), settling.settlements_owed(self._engine.book)
        missing_wei = owed * purse.settlement_wei - purse.balance_wei
        if missing_wei > 0:
            lasts = settling.settlements_left(purse.balance_wei, purse.settlement_wei)
            raise Refused(
                "gas_reserve",
                f"the operator has gas for about {lasts} settlements, and with this bid {owed} may be owed",
                remedy=f"Send at least {missing_wei} wei to {hex0x(self._sender.address)}.",
            )

    def _journal_bid(self, bid: Bid, signed: SignedTx, gas_wei_max: int) -> None:
        at_s = self._engine.at_s
        self._engine.accept(
            ev.BidSigned(at_s, bid.bid_id, signed.nonce, signed.tx_hash, signed.raw_tx, gas_wei_max)
        )
        log.info("bid.signed", bid=short(bid.bid_id), tx=hex0x(signed.tx_hash))

    def _bid_ended(self, bid: Bid, error: str, detail: str = "") -> None:
        self._engine.accept(ev.BidEnded(self._engine.at_s, bid.bid_id, error[:200]))
        log.info("bid.placed" if not error else "bid.refused", bid=short(bid.bid_id), error=detail or error)

    async def _broadcast_bid(self, effect: BroadcastBid) -> None:
        bid, sent = self._engine.book.bids[effect.bid_id], self._turn(effect.bid_id, effect.tx_hash)
        assert bid.signed is not None
        if sent is None:
            return
        receipt = await self._receipt_of(bid.signed)
        if receipt is not None:
            await self._bid_mined(bid, receipt)
            return
        waited_s = self._engine.at_s - sent.since_s
        if waited_s >= BID_REPLACE_AFTER_S and await self._is_bid_replaced(effect, bid.signed):
            return
        try:
            await self._sender.broadcast(effect.raw_tx)
        except Refused as refusal:
            if refusal.reason == "nonce_too_low":
                self._bid_nonce_taken(bid, sent)
            elif refusal.reason != "already_known":
                raise
        else:
            self._tell(effect.bid_id, "bid.sent", "sent", tx=hex0x(effect.tx_hash))

    async def _bid_mined(self, bid: Bid, receipt: Receipt) -> None:
        assert bid.signed is not None
        error = ""
        if not receipt.succeeded:
            error = (await self._sender.why_failed(SignedTx.from_raw(bid.signed.raw_tx), receipt)).reason
        self._bid_ended(bid, error)

    def _bid_nonce_taken(self, bid: Bid, sent: _Sent) -> None:
        """These bytes can never be mined any more; nothing is signed in their place."""
        sent.nonce_low_heads += 1
        if sent.nonce_low_heads >= NONCE_LOW_HEADS:
            self._bid_ended(bid, "nonce_too_low")

    async def _is_bid_replaced(self, effect: BroadcastBid, signed: SignedBid) -> bool:
        if len(signed.earlier) >= BID_REPLACEMENTS_MAX:
            return False
        previous = SignedTx.from_raw(effect.raw_tx)
        try:
            replaced = await self._sender.replacement(previous, cost_wei_max=signed.gas_wei_max)
        except Refused as refusal:
            if refusal.reason != "fee_cap":
                raise
            return False
        if self._is_owed(effect):
            self._journal_bid(self._engine.book.bids[effect.bid_id], replaced, signed.gas_wei_max)
        return True

    # ---- the purse

    async def _purse(self) -> Purse:
        fees = await self._node.fees()
        gas = self._sender.with_margin(contract.SETTLEMENT_GAS)
        prudent_wei = settling.settlement_wei_prudent(gas, fees.base_fee_wei, fees.priority_fee_wei)
        return Purse(await self._node.balance(self._sender.address), prudent_wei)

    async def _look_at_purse(self) -> None:
        """Now and then: how many settlements it lasts for. Said loudly when fewer than are owed, and one more."""
        now_ms = self._engine.live.now_ms
        if self._purse_at_ms is not None and now_ms - self._purse_at_ms < PURSE_LOOK_S * 1000:
            return
        purse = await self._purse()
        self._purse_at_ms = now_ms
        self._engine.observe(PurseSeen(purse))
        left = settling.settlements_left(purse.balance_wei, purse.settlement_wei)
        owed = settling.settlements_owed(self._engine.book)
        if left <= owed:
            log.warning("purse.low", operator=short(self._sender.address), settlements_left=left, owed=owed)


def _settlement_of(session: Session) -> SignSettlement:
    """What is owed once more, under another nonce."""
    return SignSettlement(session.session_id, session.terms.token, session.energy_wh_acked, session.ack)


def _error_name(reason: str) -> str:
    """`BidTooHigh(rateMax=297)` -> `BidTooHigh`."""
    return reason.partition("(")[0][:100]


def _nonce_mined(session: Session) -> int | None:
    """The nonce of a settlement that was mined for good: a node that lags must not make that look like a gap."""
    ours, ended = session.settlement, session.ended
    if ours is None or ended is None or ended.tx_hash not in (ours.tx_hash, *ours.earlier):
        return None  # never needed: the consumer was first, and whether it was mined is not known
    return ours.nonce
