"""An Ethereum chain in one process's memory: transaction pool, blocks, state and logs, run by py-evm.

Rules
* Synchronous and single-threaded; the caller brings the time. A transaction costs about 5 ms, an empty block
  3 ms.
* It behaves like a node, not like a test double: a pool with nonce gaps and replacement prices, transactions
  that wait for a block, reverts with their data, blocks that can be dropped again (a reorg).
* Everything refused is a `Refusal` with the JSON-RPC code and the words geth uses, because our own code
  reads them.

May not know: JSON, sockets, the V2V contract, accounts' private keys.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eth.abc import BlockHeaderAPI, ComputationAPI, ReceiptAPI, SignedTransactionAPI, VirtualMachineAPI
from eth.chains.base import MiningChain
from eth.constants import BLANK_ROOT_HASH, ZERO_ADDRESS, ZERO_HASH32
from eth.db.atomic import AtomicDB
from eth.exceptions import Revert
from eth.vm.forks.prague import PragueVM
from eth.vm.spoof import SpoofTransaction
from eth_utils.exceptions import ValidationError

GAS_LIMIT_BLOCK = 30_000_000
MAX_POOL_TRANSACTIONS = 1_000  # a client in a loop must not eat the memory of the demo
MAX_NONCE_AHEAD = 64  # as geth: queued transactions of one account
REPLACEMENT_BUMP_PERCENT = 10  # as geth's pool: both fees, or it is "underpriced"
MAX_SNAPSHOTS = 64

CODE_REJECTED = -32000
CODE_INVALID_PARAMS = -32602
CODE_LIMIT = -32005
CODE_REVERTED = 3


class Refusal(Exception):
    """The node says no: `code` and `message` as JSON-RPC error, `data` the revert data where there is
    some.
    """

    def __init__(self, code: int, message: str, data: bytes | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.data = data


@dataclass(frozen=True, slots=True)
class LogEntry:
    """One event log at its place in the chain."""

    address: bytes
    topics: tuple[bytes, ...]
    data: bytes
    block_number: int
    block_hash: bytes
    tx_hash: bytes
    tx_index: int
    log_index: int


@dataclass(frozen=True, slots=True)
class MinedTx:
    """One transaction in its block, with what it did."""

    transaction: SignedTransactionAPI
    index: int
    gas_used: int
    gas_used_cumulative: int
    effective_gas_price_wei: int
    succeeded: bool
    contract_address: bytes | None
    logs: tuple[LogEntry, ...]


@dataclass(frozen=True, slots=True)
class Mined:
    """One block of the canonical chain (or once of it)."""

    header: BlockHeaderAPI
    transactions: tuple[MinedTx, ...] = ()

    @property
    def number(self) -> int:
        """Height."""
        return int(self.header.block_number)

    @property
    def block_hash(self) -> bytes:
        """32 bytes."""
        return bytes(self.header.hash)

    @property
    def logs(self) -> Iterator[LogEntry]:
        """All logs of the block, in order."""
        for mined in self.transactions:
            yield from mined.logs


@dataclass(frozen=True, slots=True)
class Message:
    """A call without a signature: what `eth_call` and `eth_estimateGas` run. `to` None creates a contract."""

    sender: bytes = ZERO_ADDRESS
    to: bytes | None = None
    data: bytes = b""
    value_wei: int = 0
    gas_limit: int = GAS_LIMIT_BLOCK


@dataclass(slots=True)
class _Snapshot:
    """A point that `revert` returns to."""

    height: int
    block_hash: bytes
    pool: list[SignedTransactionAPI]


@dataclass(slots=True)
class _Canonical:
    """The chain as clients see it: blocks by height, and where every transaction sits."""

    blocks: list[Mined] = field(default_factory=list)
    by_hash: dict[bytes, Mined] = field(default_factory=dict)
    tx_block: dict[bytes, tuple[Mined, MinedTx]] = field(default_factory=dict)
    heights_with_logs: list[int] = field(default_factory=list)

    def push(self, block: Mined) -> None:
        self.blocks.append(block)
        self.by_hash[block.block_hash] = block
        for mined in block.transactions:
            self.tx_block[bytes(mined.transaction.hash)] = (block, mined)
        if any(mined.logs for mined in block.transactions):
            self.heights_with_logs.append(block.number)

    def pop(self) -> Mined:
        block = self.blocks.pop()
        del self.by_hash[block.block_hash]
        for mined in block.transactions:
            del self.tx_block[bytes(mined.transaction.hash)]
        if self.heights_with_logs and self.heights_with_logs[-1] == block.number:
            self.heights_with_logs.pop()
        return block


class Evm:
    """A chain with `funded` accounts (address -> wei), starting at `genesis_at_s` (unix seconds)."""

    def __init__(self, chain_id: int, funded: Mapping[bytes, int], genesis_at_s: int) -> None:
        self.chain_id = chain_id
        chain_class: Any = type("DevnetChain", (_Chain,), {"chain_id": chain_id})
        self._chain: MiningChain = chain_class.from_genesis(
            AtomicDB(), _genesis(genesis_at_s), _allocation(funded)
        )
        self._canonical = _Canonical()
        self._canonical.push(Mined(self._chain.get_canonical_head()))
        self._pool: list[SignedTransactionAPI] = []
        self._snapshots: dict[int, _Snapshot] = {}
        self._next_snapshot = 1

    # ---- what is there

    @property
    def head(self) -> Mined:
        """The newest block."""
        return self._canonical.blocks[-1]

    @property
    def pool(self) -> tuple[SignedTransactionAPI, ...]:
        """Transactions that wait for a block, in order of arrival."""
        return tuple(self._pool)

    @property
    def blocks(self) -> Sequence[Mined]:
        """The canonical chain, by height."""
        return self._canonical.blocks

    @property
    def next_base_fee_wei(self) -> int:
        """Base fee of the block that comes next (EIP-1559)."""
        header = self.head.header
        return base_fee_wei(self._chain.create_header_from_parent(header, timestamp=header.timestamp + 1))

    def block_by_hash(self, block_hash: bytes) -> Mined | None:
        """The canonical block with this hash; dropped blocks are unknown, as on a node that pruned them."""
        return self._canonical.by_hash.get(block_hash)

    def find(self, tx_hash: bytes) -> tuple[Mined, MinedTx] | None:
        """Where a transaction was mined."""
        return self._canonical.tx_block.get(tx_hash)

    def pending(self, tx_hash: bytes) -> SignedTransactionAPI | None:
        """A transaction that waits in the pool."""
        return next((tx for tx in self._pool if tx.hash == tx_hash), None)

    def logs(
        self,
        from_block: int,
        to_block: int,
        addresses: Sequence[bytes],
        topics: Sequence[Sequence[bytes] | None],
    ) -> Iterator[LogEntry]:
        """Logs in a range of heights; only blocks that hold logs are visited."""
        heights = self._canonical.heights_with_logs
        for height in heights[bisect_left(heights, from_block) : bisect_left(heights, to_block + 1)]:
            yield from (log for log in self._canonical.blocks[height].logs if matches(log, addresses, topics))

    # ---- state

    def vm_at(self, block: Mined) -> VirtualMachineAPI:
        """A machine whose state is that after `block`; what it changes is thrown away."""
        return self._chain.get_vm(block.header)

    def nonce(self, address: bytes, *, pending: bool = False) -> int:
        """Next nonce of an account, on the head or after everything that waits without a gap."""
        nonce = int(self.vm_at(self.head).state.get_nonce(_address(address)))
        waiting = {tx.nonce for tx in self._pool if tx.sender == address}
        while pending and nonce in waiting:
            nonce += 1
        return nonce

    def call(self, message: Message, block: Mined, *, at_s: int | None = None) -> bytes:
        """Return data of a call on the state after `block`; with `at_s` as if in the next block. Refuses on
        revert.
        """
        return bytes(self._run(message, block, at_s).output)

    def estimate_gas(self, message: Message, at_s: int) -> int:
        """A gas limit with which `message` succeeds in the next block: what it used before refunds, plus
        room for the 1/64 that every inner call holds back (EIP-150), tried before it is handed out.
        """
        computation = self._run(message, self.head, at_s)
        # Refunds come back only at the end, so the limit must cover the use before them; the floor is
        # EIP-7623's.
        gas = message.gas_limit - int(computation.get_gas_remaining())
        gas = max(gas, gas + int(getattr(computation, "data_floor_gas", 0)))
        for _ in range(12):  # 1.0 .. 1.8 times; then the whole block, which has just been shown to work
            try:
                self._run(_with_gas(message, gas), self.head, at_s)
            except Refusal:
                gas += gas // 20 + 2_300
            else:
                return gas
        return message.gas_limit

    def _run(self, message: Message, block: Mined, at_s: int | None) -> ComputationAPI:
        header = block.header
        if at_s is not None:
            header = self._chain.create_header_from_parent(header, timestamp=at_s)
        state = self._chain.get_vm(header.copy(base_fee_per_gas=0)).state  # a call costs nothing
        unsigned = self._chain.create_unsigned_transaction(
            nonce=state.get_nonce(_address(message.sender)),
            gas_price=0,
            gas=message.gas_limit,
            to=_address(message.to or b""),
            value=message.value_wei,
            data=message.data,
        )
        spoofed: Any = SpoofTransaction(unsigned, from_=message.sender)
        try:
            computation = state.apply_transaction(spoofed)
        except ValidationError as problem:
            raise Refusal(CODE_REJECTED, _in_words_of_geth(problem)) from problem
        if computation.is_error and isinstance(computation.error, Revert):
            raise Refusal(CODE_REVERTED, "execution reverted", bytes(computation.output))
        if computation.is_error:
            raise Refusal(CODE_REJECTED, _words(computation))
        return computation

    # ---- transactions and blocks

    def add(self, raw_tx: bytes) -> bytes:
        """Take a signed transaction into the pool; returns its hash. Refuses with the words of geth's
        pool.
        """
        try:
            tx = self._chain.get_vm(self.head.header).get_transaction_builder().decode(raw_tx)
            tx.validate()
            sender = bytes(tx.sender)
        except Exception as problem:
            raise Refusal(
                CODE_REJECTED, f"rlp: not a signed transaction ({type(problem).__name__})"
            ) from problem
        if getattr(tx, "type_id", 0) == 3:
            raise Refusal(CODE_REJECTED, "transaction type not supported")
        self._check_acceptable(tx, sender)
        rivals = [other for other in self._pool if other.sender == sender and other.nonce == tx.nonce]
        for rival in rivals:
            _check_replaces(tx, rival)
            self._pool[self._pool.index(rival)] = tx
        if not rivals:
            self._pool.append(tx)
        return bytes(tx.hash)

    def _check_acceptable(self, tx: SignedTransactionAPI, sender: bytes) -> None:
        state = self.vm_at(self.head).state
        if self.pending(bytes(tx.hash)) is not None:
            raise Refusal(CODE_REJECTED, "already known")
        if tx.chain_id not in (None, self.chain_id):
            raise Refusal(
                CODE_REJECTED, f"invalid chain id for signer: have {tx.chain_id} want {self.chain_id}"
            )
        nonce = int(state.get_nonce(_address(sender)))
        if tx.nonce < nonce:
            raise Refusal(CODE_REJECTED, f"nonce too low: next nonce {nonce}, tx nonce {tx.nonce}")
        if tx.nonce > nonce + MAX_NONCE_AHEAD:
            raise Refusal(CODE_REJECTED, f"nonce too high: next nonce {nonce}, tx nonce {tx.nonce}")
        if tx.gas > GAS_LIMIT_BLOCK:
            raise Refusal(CODE_REJECTED, "exceeds block gas limit")
        if tx.gas < tx.intrinsic_gas:
            raise Refusal(
                CODE_REJECTED, f"intrinsic gas too low: gas {tx.gas}, minimum needed {tx.intrinsic_gas}"
            )
        if tx.max_priority_fee_per_gas > tx.max_fee_per_gas:
            raise Refusal(CODE_REJECTED, "max priority fee per gas higher than max fee per gas")
        balance, cost = int(state.get_balance(_address(sender))), tx.value + tx.gas * tx.max_fee_per_gas
        if balance < cost:
            raise Refusal(
                CODE_REJECTED, f"insufficient funds for gas * price + value: have {balance} want {cost}"
            )
        if len(self._pool) >= MAX_POOL_TRANSACTIONS:
            raise Refusal(CODE_REJECTED, "txpool is full")

    def forget(self, tx_hash: bytes) -> None:
        """Drop a waiting transaction, as a node does that restarts or runs out of room."""
        self._pool = [tx for tx in self._pool if tx.hash != tx_hash]

    def mine(self, at_s: int) -> Mined:
        """Make the next block, stamped `at_s` or one second after its parent, whichever is later."""
        parent = self.head
        stamp = max(at_s, int(parent.header.timestamp) + 1)
        self._chain.header = self._chain.create_header_from_parent(parent.header, timestamp=stamp)
        applied: list[tuple[SignedTransactionAPI, ReceiptAPI, ComputationAPI]] = []
        for tx in self._ready(base_fee_wei(self._chain.header)):
            try:
                _, receipt, computation = self._chain.apply_transaction(tx)
            except ValidationError:
                continue  # its sender spent the money elsewhere meanwhile, or the block is full: it waits on
            applied.append((tx, receipt, computation))
            self._pool.remove(tx)
        header = self._chain.mine_block().header
        block = Mined(header, tuple(_placed(header, applied)))
        self._canonical.push(block)
        return block

    def _ready(self, base_fee_wei: int) -> list[SignedTransactionAPI]:
        """Waiting transactions that can go into a block now: by arrival, per sender by nonce without a
        gap.
        """
        ready: list[SignedTransactionAPI] = []
        for sender in dict.fromkeys(bytes(tx.sender) for tx in self._pool):
            nonce = self.nonce(sender)
            mine = {int(tx.nonce): tx for tx in self._pool if tx.sender == sender}
            self._pool = [tx for tx in self._pool if tx.sender != sender or tx.nonce >= nonce]
            while nonce in mine and mine[nonce].max_fee_per_gas >= base_fee_wei:
                ready.append(mine[nonce])
                nonce += 1
        return ready

    # ---- going back

    def drop(self, depth: int) -> tuple[Mined, ...]:
        """Undo the newest `depth` blocks; their transactions wait in the pool again. Returns them, oldest
        first.
        """
        if not 0 < depth <= self.head.number:
            raise Refusal(CODE_INVALID_PARAMS, f"cannot drop {depth} of {self.head.number} blocks")
        dropped = tuple(reversed([self._canonical.pop() for _ in range(depth)]))
        self._pool = [mined.transaction for block in dropped for mined in block.transactions] + self._pool
        return dropped

    def snapshot(self) -> int:
        """Remember this point; `revert` returns to it."""
        if len(self._snapshots) >= MAX_SNAPSHOTS:
            raise Refusal(CODE_LIMIT, f"more than {MAX_SNAPSHOTS} snapshots")
        number, self._next_snapshot = self._next_snapshot, self._next_snapshot + 1
        self._snapshots[number] = _Snapshot(self.head.number, self.head.block_hash, list(self._pool))
        return number

    def revert(self, number: int) -> bool:
        """Return to a snapshot and forget it and all later ones; False when there is no such point any
        more.
        """
        snapshot = self._snapshots.get(number)
        self._snapshots = {known: point for known, point in self._snapshots.items() if known < number}
        if snapshot is None or snapshot.block_hash not in self._canonical.by_hash:
            return False
        while self.head.number > snapshot.height:
            self._canonical.pop()
        self._pool = list(snapshot.pool)
        return True


class _Chain(MiningChain):
    """py-evm's chain under today's rules, with a constant gas limit. `chain_id` is set by the subclass made
    for it.
    """

    vm_configuration = ((0, PragueVM),)  # type: ignore[assignment]

    def create_header_from_parent(self, parent_header: BlockHeaderAPI, **fields: Any) -> BlockHeaderAPI:
        return super().create_header_from_parent(
            parent_header, **{**fields, "gas_limit": parent_header.gas_limit}
        )


def base_fee_wei(header: BlockHeaderAPI) -> int:
    """The base fee of a block; py-evm's type allows for blocks before London, which do not exist here."""
    return int(header.base_fee_per_gas or 0)


def matches(log: LogEntry, addresses: Sequence[bytes], topics: Sequence[Sequence[bytes] | None]) -> bool:
    """The filter of `eth_getLogs`: an empty address list and a None topic match anything."""
    if addresses and log.address not in addresses:
        return False
    if len(topics) > len(log.topics):
        return False
    return all(wanted is None or log.topics[i] in wanted for i, wanted in enumerate(topics))


def _genesis(at_s: int) -> dict[str, Any]:
    return {
        "coinbase": ZERO_ADDRESS,
        "difficulty": 0,
        "extra_data": b"",
        "gas_limit": GAS_LIMIT_BLOCK,
        "mix_hash": ZERO_HASH32,
        "nonce": b"\0" * 8,
        "receipt_root": BLANK_ROOT_HASH,
        "timestamp": at_s,
        "transaction_root": BLANK_ROOT_HASH,
    }


def _allocation(funded: Mapping[bytes, int]) -> dict[Any, Any]:
    return {
        address: {"balance": balance, "nonce": 0, "code": b"", "storage": {}}
        for address, balance in funded.items()
    }


def _address(data: bytes) -> Any:
    return data  # py-evm wants its own NewType; the bytes are the same


def _with_gas(message: Message, gas_limit: int) -> Message:
    return Message(message.sender, message.to, message.data, message.value_wei, gas_limit)


def _check_replaces(tx: SignedTransactionAPI, rival: SignedTransactionAPI) -> None:
    for fee in ("max_fee_per_gas", "max_priority_fee_per_gas"):
        if getattr(tx, fee) * 100 < getattr(rival, fee) * (100 + REPLACEMENT_BUMP_PERCENT):
            raise Refusal(CODE_REJECTED, "replacement transaction underpriced")


def _placed(
    header: BlockHeaderAPI, applied: list[tuple[SignedTransactionAPI, ReceiptAPI, ComputationAPI]]
) -> Iterator[MinedTx]:
    """Receipts as clients want them: per transaction, with logs that know their place in the block."""
    used_before, log_index = 0, 0
    for index, (tx, receipt, computation) in enumerate(applied):
        logs = []
        for log in receipt.logs:
            topics = tuple(int(topic).to_bytes(32, "big") for topic in log.topics)
            logs.append(
                LogEntry(
                    bytes(log.address),
                    topics,
                    bytes(log.data),
                    int(header.block_number),
                    bytes(header.hash),
                    bytes(tx.hash),
                    index,
                    log_index,
                )
            )
            log_index += 1
        tip = min(tx.max_priority_fee_per_gas, tx.max_fee_per_gas - base_fee_wei(header))
        created = (
            bytes(computation.msg.storage_address) if tx.to == b"" and not computation.is_error else None
        )
        yield MinedTx(
            transaction=tx,
            index=index,
            gas_used=int(receipt.gas_used) - used_before,
            gas_used_cumulative=int(receipt.gas_used),
            effective_gas_price_wei=int(base_fee_wei(header) + tip),
            succeeded=not computation.is_error,
            contract_address=created,
            logs=tuple(logs),
        )
        used_before = int(receipt.gas_used)


def _in_words_of_geth(problem: Exception) -> str:
    text = str(problem)
    return "insufficient funds for gas * price + value" if "funds" in text or "balance" in text else text


def _words(computation: ComputationAPI) -> str:
    name = type(computation.error).__name__
    return _GETH_WORDS.get(name, f"execution failed: {name}")


_GETH_WORDS = {
    "OutOfGas": "out of gas",
    "InvalidInstruction": "invalid opcode",
    "InsufficientFunds": "insufficient funds for transfer",
}
