"""The only holder of the Sender: owed transactions become signed, journaled, then broadcast. In this order, always (rule 6).

Rules
* `SignSettlement` is owed -> prepare and sign, accept `SettlementSigned`. Only then is `BroadcastSettlement` owed.
* The same bytes are sent again with every new head until the chain shows them; a slow one is replaced: same nonce, higher fees,
  journaled first. So exactly one settlement per session can be mined.
* A nonce below ours that nobody holds any more (a reorganisation lost its transaction) would block ours for ever: we take it.
* A settlement that would revert is not sent; the reason is logged and asked again later (the consumer may have ended meanwhile).
* What one settlement is refused for delays no other one: a sale worth less than its gas must not hold up those after it.

May not know: how logs become events, the charger, the door.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import structlog

from agent.chain import contract
from agent.chain.node import Node, Receipt
from agent.chain.sender import Sender, SignedTx
from agent.core import events as ev
from agent.core.effects import BroadcastSettlement, SignSettlement
from agent.core.session import CLOSED, Session
from agent.core.units import Address, SessionId, TxHash, cost_wei_floor, hex0x, short
from agent.engine import Engine
from agent.errors import Refused, Transient

BEAT_S = 1.0  # how often owed transactions are looked at without a wake-up
RETRY_S = 5.0  # after a refusal or a lost node: the same question too often is a denial of our own node
REPLACE_AFTER_S = 45  # not mined by then (some blocks): pay more

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Sent:
    """What this life of the agent has done about one settlement; losing it in a crash costs one repeated broadcast."""

    tx_hash: TxHash
    since_s: int
    head_number: int


class ChainSend:
    """Sends settlements."""

    def __init__(self, engine: Engine, node: Node, sender: Sender, contract_address: Address) -> None:
        self._engine, self._node, self._sender, self._contract = engine, node, sender, contract_address
        self._sent: dict[SessionId, _Sent] = {}

    async def run(self) -> None:
        """For ever: do what is owed on chain."""
        while True:
            changed = self._engine.changed
            wait_s = BEAT_S
            try:
                delayed = await self.do_owed()
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
            if not isinstance(effect, SignSettlement | BroadcastSettlement):
                continue
            try:
                if isinstance(effect, SignSettlement):
                    await self._sign(effect)
                else:
                    await self._broadcast(effect)
            except Refused as refusal:
                delayed = True
                log.warning(
                    "settlement.delayed",
                    session=short(effect.session_id), reason=refusal.reason, error=str(refusal),
                )  # fmt: skip
        return delayed

    async def _sign(self, effect: SignSettlement) -> None:
        session = self._engine.book.sessions[effect.session_id]
        data = contract.encode_end_connection(effect.token, effect.energy_wh, effect.ack)
        nonce = await self._next_nonce()
        signed = await self._sender.prepare(
            self._contract, data, nonce=nonce, cost_wei_max=_stake_wei(session)
        )
        # No await between here and the journal; but the book may have moved while we asked the node for fees.
        if effect in self._engine.owed():
            self._journal(effect.session_id, effect.energy_wh, signed)

    async def _next_nonce(self) -> int:
        """The next one that neither the chain nor a journaled, not yet ended settlement of ours has taken."""
        mined = await self._node.nonce(self._sender.address)
        taken = [s.settlement.nonce for s in self._engine.book.open_sessions() if s.settlement is not None]
        return max([mined, *(nonce + 1 for nonce in taken)])

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
        log.info(
            "settlement.signed", session=short(session_id), energy_wh=energy_wh, tx=hex0x(signed.tx_hash)
        )

    async def _broadcast(self, effect: BroadcastSettlement) -> None:
        header = self._engine.live.header
        if header is None:
            return  # without a view we cannot know whether it is mined already
        sent = self._sent.get(effect.session_id)
        if sent is not None and sent.tx_hash == effect.tx_hash and sent.head_number == header.number:
            return  # once per head is enough
        receipt = await self._node.receipt(effect.tx_hash)
        if receipt is not None:
            if not receipt.succeeded:
                await self._reverted(effect, receipt)
            return  # mined: the watcher tells the rest
        since_s = sent.since_s if sent is not None and sent.tx_hash == effect.tx_hash else self._engine.at_s
        self._sent[effect.session_id] = _Sent(effect.tx_hash, since_s, header.number)
        if self._engine.at_s - since_s >= REPLACE_AFTER_S and await self._is_replaced(effect.session_id):
            return
        try:
            await self._sender.broadcast(effect.raw_tx)
        except Refused as refusal:
            if refusal.reason == "nonce_too_low":
                await self._nonce_taken(effect)
            elif refusal.reason != "already_known":
                raise

    async def _reverted(self, effect: BroadcastSettlement, receipt: Receipt) -> None:
        why = await self._sender.why_failed(SignedTx.from_raw(effect.raw_tx), receipt)
        log.error("settlement.reverted", session=short(effect.session_id), error=why.reason)
        self._engine.accept(
            ev.SettlementReverted(self._engine.at_s, effect.session_id, effect.tx_hash, why.reason[:200])
        )

    async def _nonce_taken(self, effect: BroadcastSettlement) -> None:
        """Somebody else used our nonce (or an earlier replacement was mined): sign again, unless it is mined after all."""
        if await self._node.receipt(effect.tx_hash) is not None:
            return
        session = self._engine.book.sessions[effect.session_id]
        state = contract.decode_sessions(
            await self._node.call(self._contract, contract.encode_sessions(session.terms.token))
        )
        if not state.is_open:
            return  # settled by another of our transactions or by the consumer; the watcher will see it
        log.warning("settlement.nonce_taken", session=short(effect.session_id))
        await self._sign_anew(session, await self._node.nonce(self._sender.address, pending=True))

    async def _sign_anew(self, session: Session, nonce: int) -> None:
        data = contract.encode_end_connection(session.terms.token, session.energy_wh_acked, session.ack)
        signed = await self._sender.prepare(
            self._contract, data, nonce=nonce, cost_wei_max=_stake_wei(session)
        )
        self._journal(session.session_id, session.energy_wh_acked, signed)

    async def _nonce_gap(self, nonce: int) -> int | None:
        """The lowest nonce below this one that neither the chain nor a settlement of ours has taken; None without one."""
        gap = await self._node.nonce(self._sender.address)
        taken = {_nonce_held(session) for session in self._engine.book.sessions.values()}
        while gap in taken:  # at most one more than we have sessions
            gap += 1
        return gap if gap < nonce else None

    async def _is_replaced(self, session_id: SessionId) -> bool:
        """Pay more. False when more is not worth it: then the old bytes are said again, for a pool may have lost them."""
        try:
            await self._replace(session_id)
        except Refused as refusal:
            if refusal.reason != "fee_cap":
                raise
            log.warning("settlement.not_replaced", session=short(session_id), error=str(refusal))
            return False
        return True

    async def _replace(self, session_id: SessionId) -> None:
        session = self._engine.book.sessions[session_id]
        assert session.settlement is not None
        signed = SignedTx.from_raw(session.settlement.raw_tx)
        gap = await self._nonce_gap(signed.nonce)
        if gap is not None:
            log.warning("settlement.nonce_gap", session=short(session_id), nonce=signed.nonce, free=gap)
            await self._sign_anew(session, gap)
            return
        replaced = await self._sender.replacement(signed, cost_wei_max=_stake_wei(session))
        log.info(
            "settlement.replaced", session=short(session_id), max_fee_per_gas_wei=replaced.max_fee_per_gas_wei
        )
        self._journal(session_id, session.settlement.energy_wh_settled, replaced)


def _nonce_held(session: Session) -> int | None:
    """The nonce of a settlement that is on its way, or mined for good: a node that lags must not make that look like a gap."""
    ours, ended = session.settlement, session.ended
    if ours is None or (session.stage in CLOSED and (ended is None or ended.tx_hash != ours.tx_hash)):
        return None  # never needed: the consumer was first, and whether it was mined is not known
    return ours.nonce


def _stake_wei(session: Session) -> int:
    """What this settlement is worth to us: its fee and our bond. More gas than that is not worth sending (PROTOCOL section 7)."""
    terms = session.terms
    return cost_wei_floor(terms.rate_wei_per_kwh, session.energy_wh_acked) + terms.bond_wei
