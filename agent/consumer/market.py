"""The consumer's dealings with the contract: what it asks, and its own transactions.

Rules
* Sign -> journal -> broadcast: after a crash the very same transaction is sent again, never a second one beside it.
* What matters is computed again from the chain's facts (token, session id), not taken from a log's word.
* Questions to a node that is away are asked again a few times; then `Transient`, and the same command goes on later.

May not know: the plug, messages, what the journey does next.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from agent.chain import contract
from agent.chain.contract import (
    AuctionCancelled,
    AuctionEnded,
    AuctionState,
    Connected,
    ConnectionEnded,
    SessionOpened,
    SessionState,
)
from agent.chain.node import Node, RawLog, Receipt, Topics
from agent.chain.sender import Sender, SignedTx
from agent.consumer.carrier import Backoff
from agent.consumer.journal import ConsumerJournal, OrderPlaced, TransactionMined, TransactionSigned
from agent.consumer.plug import Settlement
from agent.core import token as rules
from agent.core.events import Terms
from agent.core.token import NO_ACK, ZERO_ADDRESS, Domain
from agent.core.units import Address, Token, TxHash
from agent.errors import Refused, Transient

ASK_TRIES = 4  # a node that restarts is back within this; a longer outage is the user's to know
MINED_TIMEOUT_S = 180.0  # a chain that includes nothing for so long needs a human to look
T = TypeVar("T")


class Market:
    """One consumer's view of one market, and its hands there. Knows what `plug.ChainView` asks."""

    def __init__(self, node: Node, sender: Sender, domain: Domain, journal: ConsumerJournal) -> None:
        self._node, self._sender, self._domain, self._journal = node, sender, domain, journal
        self.consumer: Address = sender.address

    # ---- questions

    async def now_s(self) -> int:
        """Chain time: the newest head's timestamp."""
        return (await self._asked(self._node.head)).timestamp_s

    async def head_number(self) -> int:
        """The newest block."""
        return (await self._asked(self._node.head)).number

    async def signers(self, provider: Address) -> frozenset[Address]:
        """The provider, and its operator as the contract knows it now."""
        state = contract.decode_operator_of(await self._view(contract.encode_operator_of(provider)))
        return frozenset({provider, state.operator} - {ZERO_ADDRESS})

    async def session(self, token: Token) -> SessionState:
        """The session of this token, as the contract holds it."""
        return contract.decode_sessions(await self._view(contract.encode_sessions(token)))

    async def is_open(self, token: Token) -> bool:
        """Connected and not settled."""
        return (await self.session(token)).is_open

    async def auction(self) -> AuctionState:
        """Our auction; its nonce also when there is none."""
        return contract.decode_auctions(await self._view(contract.encode_auctions(self.consumer)))

    async def ledger_wei(self, block_hash: bytes | None = None) -> int:
        """Our money in the contract that is not locked."""
        return contract.decode_balances(await self._view(contract.encode_balances(self.consumer), block_hash))

    async def settlement(self, terms: Terms) -> Settlement | None:
        """How this session was settled; None while it is not."""
        topics = [contract.topic_of(ConnectionEnded), terms.token]
        for raw in await self._logs(topics, terms.block_number):
            log = contract.decode_log(raw.address, raw.topics, raw.data)
            if isinstance(log, ConnectionEnded) and log.token == terms.token:
                return Settlement(
                    log.delivered_wh, log.fee_wei, raw.tx_hash, raw.block_number, raw.block_hash
                )
        return None

    async def refunded_wei(self, settlement: Settlement) -> int | None:
        """What our ledger gained in the block of the settlement; None where the node keeps no state that old."""
        header = await self._asked(lambda: self._node.header(settlement.block_hash))
        if header is None:
            return None
        try:
            before_wei = await self.ledger_wei(header.parent_hash)
            return await self.ledger_wei(header.block_hash) - before_wei
        except (Transient, Refused):  # full nodes keep the state of the newest 128 blocks
            return None

    async def find_terms(self, order: OrderPlaced) -> Terms | None:
        """The session that our order's auction led to, with token and id computed anew; None while there is none."""
        found: Terms | None = None
        connected = [contract.topic_of(Connected), None, rules.address_word(self.consumer)]
        for raw in await self._logs(connected, order.from_block):
            log = contract.decode_log(raw.address, raw.topics, raw.data)
            if not isinstance(log, Connected):
                continue
            terms = await self._terms_at(raw, log.token)
            if terms is not None and terms.auction_nonce == order.auction_nonce:
                found = terms
        return found

    async def is_auction_gone(self, order: OrderPlaced) -> bool:
        """Whether the chain says that this auction ended without a session: nobody bid, or it was cancelled."""
        kinds = [contract.topic_of(AuctionEnded), contract.topic_of(AuctionCancelled)]
        topics: Topics = [kinds, rules.address_word(self.consumer), rules.word(order.auction_nonce)]
        for raw in await self._logs(topics, order.from_block):
            log = contract.decode_log(raw.address, raw.topics, raw.data)
            if isinstance(log, AuctionCancelled):
                return True
            if isinstance(log, AuctionEnded) and log.provider == ZERO_ADDRESS:
                return True
        return False

    async def _terms_at(self, raw: RawLog, token: Token) -> Terms | None:
        opened = [contract.topic_of(SessionOpened), None, token]
        logs = await self._asked(lambda: self._node.logs_at(raw.block_hash, self._domain.contract, opened))
        header = await self._asked(lambda: self._node.header(raw.block_hash))
        if header is None:
            return None  # reorged away between two questions
        for other in logs:
            log = contract.decode_log(other.address, other.topics, other.data)
            if isinstance(log, SessionOpened) and log.consumer == self.consumer:
                terms = _terms(log, other, header.timestamp_s)
                if self._is_genuine(terms):
                    return terms
        return None

    def _is_genuine(self, terms: Terms) -> bool:
        """Token and session id are what we compute ourselves: else the node made them up."""
        chain_id, address = self._domain.chain_id, self._domain.contract
        return terms.token == rules.access_token(
            terms.consumer, terms.provider, terms.issued_at_s, terms.valid_until_s
        ) and terms.session_id == rules.session_id(
            chain_id, address, terms.consumer, terms.provider, terms.auction_nonce
        )

    # ---- transactions

    async def start_auction(self, order: OrderPlaced, deposit_wei: int) -> TransactionMined:
        """Lock `deposit_wei` and ask for bids; the ledger pays first, only what it lacks is sent along."""
        missing_wei = max(0, deposit_wei - await self.ledger_wei())
        data = contract.encode_start_auction(
            order.energy_wh, order.bidding_s, order.rate_wei_per_kwh_start, order.token_validity_s, bytes(32)
        )
        return await self.send("start_auction", data, missing_wei, again=True)

    async def connect(self, provider: Address, energy_wh: int) -> TransactionMined:
        """Open the session with the winner."""
        return await self.send("connect", contract.encode_connect(provider, energy_wh), again=True)

    async def cancel_auction(self) -> TransactionMined:
        """Free our auction: possible while nobody bid, or after the connect window."""
        return await self.send("cancel", contract.encode_cancel_auction(self.consumer))

    async def concede(self, token: Token, energy_wh: int) -> TransactionMined:
        """End the connection ourselves: pay this much, the rest comes back after the challenge."""
        return await self.send("end", contract.encode_end_connection(token, energy_wh, NO_ACK))

    async def repeat(self, step: str) -> None:
        """Broadcast the newest transaction of this step again, should a reorg have thrown it out."""
        errand = self._journal.open_errand
        signed = [known for known in (errand.signed if errand is not None else ()) if known.step == step]
        if signed:
            try:
                await self._sender.broadcast(signed[-1].raw_tx)
            except Refused:
                return  # it is mined, or its nonce was used: either way nothing is left to repeat

    async def note_mined(self) -> None:
        """Remember what became of transactions whose end a crash has hidden from us."""
        errand = self._journal.open_errand
        done = {mined.tx_hash for mined in (errand.mined if errand is not None else ())}
        for known in errand.signed if errand is not None else ():
            receipt = None if known.tx_hash in done else await self._receipt(known.tx_hash)
            if receipt is not None:
                self._mined(known.step, SignedTx.from_raw(known.raw_tx), receipt)

    async def send(
        self, step: str, data: bytes, value_wei: int = 0, *, again: bool = False
    ) -> TransactionMined:
        """Sign, journal, broadcast, wait. `again`: if such a transaction is under way already, that one and no other.

        Raises Refused with the contract's error name; Transient when it is in no block after MINED_TIMEOUT_S.
        """
        errand = self._journal.open_errand
        waiting = errand.pending(step) if errand is not None and again else None
        if waiting is not None:
            signed = SignedTx.from_raw(waiting.raw_tx)
            try:
                await self._sender.broadcast(signed.raw_tx)
            except Refused as no:
                if no.reason != "nonce_too_low":
                    raise
                self._mined(
                    step, signed, None
                )  # the account sent something else with this nonce: it will never count
                waiting = None
        if waiting is None:
            signed = await self._sender.prepare(self._domain.contract, data, value_wei)
            journal = self._journal
            journal.write(TransactionSigned(journal.at_s, step, signed.tx_hash, signed.raw_tx))
            await self._sender.broadcast(signed.raw_tx)
        receipt = await self._sender.wait_mined(signed.tx_hash, MINED_TIMEOUT_S)
        mined = self._mined(step, signed, receipt)
        if not receipt.succeeded:
            raise await self._sender.why_failed(signed, receipt)
        return mined

    def _mined(self, step: str, signed: SignedTx, receipt: Receipt | None) -> TransactionMined:
        at_s = self._journal.at_s
        if receipt is None:
            fact = TransactionMined(at_s, step, signed.tx_hash, 0, 0, 0, succeeded=False)
        else:
            fact = TransactionMined(
                at_s,
                step,
                signed.tx_hash,
                receipt.block_number,
                receipt.gas_used,
                receipt.fee_wei,
                receipt.succeeded,
            )
        self._journal.write(fact)
        return fact

    # ---- asking

    async def _view(self, data: bytes, block_hash: bytes | None = None) -> bytes:
        return await self._asked(lambda: self._node.call(self._domain.contract, data, block_hash))

    async def _logs(self, topics: Topics, from_block: int) -> tuple[RawLog, ...]:
        head = await self._asked(self._node.head)
        return await self._asked(
            lambda: self._node.logs(self._domain.contract, topics, from_block, head.number)
        )

    async def _receipt(self, tx_hash: TxHash) -> Receipt | None:
        return await self._asked(lambda: self._node.receipt(tx_hash))

    async def _asked(self, question: Callable[[], Awaitable[T]]) -> T:
        backoff = Backoff(0.2, 2.0)
        for _ in range(ASK_TRIES - 1):
            try:
                return await question()
            except Transient:  # tried again at once, said aloud by the last try
                await asyncio.sleep(backoff.next_s())
        return await question()


def _terms(log: SessionOpened, raw: RawLog, issued_at_s: int) -> Terms:
    return Terms(
        session_id=log.session_id,
        token=log.token,
        consumer=log.consumer,
        provider=log.provider,
        auction_nonce=log.auction_nonce,
        energy_wh_ordered=log.energy_wh,
        rate_wei_per_kwh=log.rate_wei_per_kwh,
        deposit_wei=log.deposit_wei,
        bond_wei=log.bond_wei,
        issued_at_s=issued_at_s,
        valid_until_s=log.valid_until_s,
        block_number=raw.block_number,
        block_hash=raw.block_hash,
        log_index=raw.log_index,
        tx_hash=raw.tx_hash,
    )
