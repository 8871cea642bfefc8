"""Transactions: fees, nonce, signature, replacement. The only code that sends any.

Rules
* Preparing and broadcasting are two steps, because the daemon writes the signed bytes to its journal in
  between: `prepare` -> journal -> `broadcast`; the same bytes may be broadcast as often as one likes.
* A replacement keeps nonce and purpose and raises both fees by an eighth; everything it needs is in the
  signed bytes.
* Fees never exceed what the owner allows per gas, nor what the transaction is worth: Refused("fee_cap").
* EIP-1559 only. All amounts are integers in wei, rounded against the pool's rules (up), never against the
  cap.

May not know: sessions, the journal, private keys (a signer signs), what a transaction is for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, Self

from agent.chain.node import Node, Receipt, Reverted, tx_hash_of
from agent.core.units import Address, TxHash, hex0x, short
from agent.errors import Refused, Transient

GAS_MARGIN_PERCENT = 25  # the state moves between estimate and block: outbidding costs more than a first bid
GAS_TRANSFER = 21_000  # the least any transaction costs
BASE_FEE_MULTIPLE = 2  # survives five full blocks in a row, each raising the base fee by an eighth
RECEIPT_POLL_S = 0.5


class Signer(Protocol):
    """An account that signs; the key stays behind it."""

    address: Address

    def sign_transaction(self, transaction: Mapping[str, Any]) -> bytes:
        """The raw signed transaction."""


@dataclass(frozen=True, slots=True)
class FeePolicy:
    """The owner's ceiling. None: no ceiling per gas, only what a transaction is worth."""

    max_fee_per_gas_wei: int | None = None
    gas_margin_percent: int = GAS_MARGIN_PERCENT


@dataclass(frozen=True, slots=True)
class SignedTx:
    """A transaction as it goes to the journal and to the node. `raw_tx` holds all the rest."""

    nonce: int
    tx_hash: TxHash
    raw_tx: bytes
    max_fee_per_gas_wei: int
    max_priority_fee_per_gas_wei: int
    gas_limit: int

    @classmethod
    def from_raw(cls, raw_tx: bytes) -> Self:
        """Read it back from the journal's bytes."""
        fields = _fields(raw_tx)
        return cls(
            nonce=fields["nonce"],
            tx_hash=tx_hash_of(raw_tx),
            raw_tx=raw_tx,
            max_fee_per_gas_wei=fields["maxFeePerGas"],
            max_priority_fee_per_gas_wei=fields["maxPriorityFeePerGas"],
            gas_limit=fields["gas"],
        )

    @property
    def cost_wei_max(self) -> int:
        """The most its gas can cost."""
        return self.gas_limit * self.max_fee_per_gas_wei


class Sender:
    """Sends from the signer's account on one chain. `revert_name` turns revert data into the contract's
    error name.
    """

    def __init__(
        self,
        node: Node,
        signer: Signer,
        chain_id: int,
        policy: FeePolicy | None = None,
        *,
        revert_name: Callable[[bytes], str] = lambda data: f"0x{data[:4].hex()}",
    ) -> None:
        self._node = node
        self._signer = signer
        self._chain_id = chain_id
        self._policy = policy or FeePolicy()
        self._revert_name = revert_name

    @property
    def address(self) -> Address:
        """Who pays."""
        return self._signer.address

    # ---- signing, without sending

    async def prepare(
        self,
        to: bytes | None,
        data: bytes,
        value_wei: int = 0,
        gas_limit: int | None = None,
        nonce: int | None = None,
        *,
        cost_wei_max: int | None = None,
    ) -> SignedTx:
        """Sign a transaction; `to` None creates a contract, `cost_wei_max` is what its gas is worth to us.

        A nonce of None asks the node: good for command lines, which send one at a time. Raises Refused with
        the contract's error name, "unfunded" or "fee_cap"; Transient.
        """
        fees = await self._node.fees()
        tip = fees.priority_fee_wei
        wanted, needed = BASE_FEE_MULTIPLE * fees.base_fee_wei + tip, fees.base_fee_wei + tip
        balance_wei = await self._node.balance(self.address)
        if balance_wei <= value_wei:  # the estimate would fail without saying how much is missing
            raise self._unfunded(
                balance_wei, value_wei + (gas_limit or self.with_margin(GAS_TRANSFER)) * wanted
            )
        if gas_limit is None:
            gas_limit = await self._gas_limit(to, data, value_wei)
        max_fee = _capped(wanted, needed, self._ceiling(gas_limit, cost_wei_max))
        if balance_wei < value_wei + gas_limit * max_fee:
            raise self._unfunded(balance_wei, value_wei + gas_limit * max_fee)
        if nonce is None:
            nonce = await self._node.nonce(self.address, pending=True)
        transaction: dict[str, Any] = {"nonce": nonce, "value": value_wei, "data": data, "gas": gas_limit}
        if to is not None:
            transaction["to"] = to
        return self._signed(transaction, max_fee, tip)

    async def replacement(self, previous: SignedTx, *, cost_wei_max: int | None = None) -> SignedTx:
        """The same transaction, both fees an eighth higher (rounded up), or as high as it now takes.

        Raises Refused("fee_cap") when that is more than allowed or worth it; the previous one stays valid.
        """
        fees = await self._node.fees()
        ceiling = self._ceiling(previous.gas_limit, cost_wei_max)
        bumped, tip = _bumped(previous.max_fee_per_gas_wei), _bumped(previous.max_priority_fee_per_gas_wei)
        tip = max(tip, fees.priority_fee_wei)
        wanted = max(bumped, BASE_FEE_MULTIPLE * fees.base_fee_wei + tip)
        needed = max(bumped, fees.base_fee_wei + tip)
        max_fee = _capped(wanted, needed, ceiling)
        fields = _fields(previous.raw_tx)
        transaction = {name: fields[name] for name in ("nonce", "value", "data", "gas")}
        if fields["to"]:
            transaction["to"] = fields["to"]
        return self._signed(transaction, max_fee, tip)

    def _ceiling(self, gas_limit: int, cost_wei_max: int | None) -> int | None:
        """The most per gas: the owner's limit or what the transaction is worth (rounded down)."""
        worth = None if cost_wei_max is None else cost_wei_max // gas_limit
        ceilings = [limit for limit in (self._policy.max_fee_per_gas_wei, worth) if limit is not None]
        return min(ceilings, default=None)

    async def _gas_limit(self, to: bytes | None, data: bytes, value_wei: int) -> int:
        try:
            estimate = await self._node.estimate_gas(self.address, to, data, value_wei)
        except Reverted as reverted:
            raise self._named(reverted) from reverted
        return self.with_margin(estimate)

    def with_margin(self, gas: int) -> int:
        """The gas limit for what is estimated to need this much."""
        return gas + gas * self._policy.gas_margin_percent // 100

    def _signed(self, transaction: dict[str, Any], max_fee: int, tip: int) -> SignedTx:
        raw_tx = self._signer.sign_transaction(
            {
                **transaction,
                "type": 2,
                "chainId": self._chain_id,
                "accessList": [],
                "maxFeePerGas": max_fee,
                "maxPriorityFeePerGas": tip,
            }
        )
        nonce, gas_limit = transaction["nonce"], transaction["gas"]
        return SignedTx(nonce, tx_hash_of(raw_tx), raw_tx, max_fee, tip, gas_limit)

    # ---- sending

    async def broadcast(self, raw_tx: bytes) -> TxHash:
        """Hand it to the node; safe to repeat. Raises Refused with one of `node.SEND_REFUSALS`; Transient."""
        return await self._node.send_raw(raw_tx)

    async def wait_mined(self, tx_hash: bytes, timeout_s: float) -> Receipt:
        """The receipt, at whatever depth, as `wait_mined`."""
        return await wait_mined(self._node, tx_hash, timeout_s)

    async def send_and_wait(
        self,
        to: bytes | None,
        data: bytes,
        value_wei: int = 0,
        gas_limit: int | None = None,
        *,
        timeout_s: float = 120,
        cost_wei_max: int | None = None,
    ) -> Receipt:
        """For command lines, which keep no journal: prepare, broadcast, wait. Raises Refused with the
        contract's error name when it was mined and failed; Transient.
        """
        signed = await self.prepare(to, data, value_wei, gas_limit, cost_wei_max=cost_wei_max)
        await self.broadcast(signed.raw_tx)
        receipt = await self.wait_mined(signed.tx_hash, timeout_s)
        if not receipt.succeeded:
            raise await self.why_failed(signed, receipt)
        return receipt

    async def why_failed(self, signed: SignedTx, receipt: Receipt) -> Refused:
        """Name the error of a mined, failed transaction: replayed on the state before its block, which is
        close enough (other transactions of the same block may have gone first).
        """
        if receipt.gas_used >= signed.gas_limit:
            return Refused("out_of_gas", f"{hex0x(receipt.tx_hash)} used all of its {signed.gas_limit} gas")
        fields = _fields(signed.raw_tx)
        mined = await self._node.header(receipt.block_hash)
        if fields["to"] and mined is not None:
            try:
                await self._node.call(
                    fields["to"], fields["data"], mined.parent_hash, self.address, value_wei=fields["value"]
                )
            except Reverted as reverted:
                return self._named(reverted)
        return Refused("reverted", f"{hex0x(receipt.tx_hash)} failed, and a replay does not show why")

    # ---- naming what went wrong

    def _named(self, reverted: Reverted) -> Refused:
        return Refused(self._revert_name(reverted.data), "the contract refused the transaction")

    def _unfunded(self, balance_wei: int, needed_wei: int) -> Refused:
        missing_wei = needed_wei - balance_wei
        return Refused(
            "unfunded",
            f"{short(self.address)} has {balance_wei} wei, but the transaction may need {needed_wei}",
            remedy=f"Send at least {missing_wei} wei to {hex0x(self.address)} on chain {self._chain_id}.",
        )


async def wait_mined(node: Node, tx_hash: bytes, timeout_s: float) -> Receipt:
    """The receipt, at whatever depth. A node that is away meanwhile is asked again; Transient after `timeout_s`."""
    trouble: Transient | None = None
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    receipt = await node.receipt(tx_hash)
                except Transient as problem:
                    trouble = problem
                else:
                    if receipt is not None:
                        return receipt
                await asyncio.sleep(RECEIPT_POLL_S)
    except TimeoutError:
        raise Transient(
            f"transaction {hex0x(tx_hash)} is in no block after {timeout_s:g} s",
            remedy="It may still get there: look for it before you send it again.",
        ) from trouble


def _bumped(fee_wei: int) -> int:
    """12.5 % more, rounded up: above every pool's threshold for replacing (geth asks for 10 %, Parity for
    12.5 %).
    """
    return max(1, -(-fee_wei * 9 // 8))


def _capped(wanted_wei: int, needed_wei: int, ceiling_wei: int | None) -> int:
    """What we offer per gas: what we want, or the ceiling if that still gets into the next block."""
    if ceiling_wei is not None and ceiling_wei < needed_wei:
        raise Refused(
            "fee_cap",
            f"it takes {needed_wei} wei per gas just now, and {ceiling_wei} are allowed",
            remedy="Wait for lower fees, or allow more.",
        )
    return wanted_wei if ceiling_wei is None else min(wanted_wei, ceiling_wei)


def _fields(raw_tx: bytes) -> dict[str, Any]:
    """The parts of a signed EIP-1559 transaction: nonce, to (empty: creation), value, data, gas and both
    fees.
    """
    from eth_account.typed_transactions.typed_transaction import TypedTransaction
    from hexbytes import HexBytes

    fields: dict[str, Any] = TypedTransaction.from_bytes(HexBytes(raw_tx)).as_dict()
    return {**fields, "to": bytes(fields["to"]), "data": bytes(fields["data"])}
