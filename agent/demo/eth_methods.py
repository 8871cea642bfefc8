"""The JSON-RPC methods of the embedded node, and the JSON shapes of blocks, transactions, receipts and logs.

Rules
* A method takes JSON values and returns JSON values; a wrong shape raises ValueError, TypeError or KeyError,
  a "no" raises `Refusal`. The server turns both into JSON-RPC errors.
* Answers are complete enough that a client can recompute hashes from them.

May not know: sockets, subscriptions, who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eth.abc import SignedTransactionAPI

from agent.core.units import hex0x
from agent.demo.evm import (
    CODE_INVALID_PARAMS,
    CODE_LIMIT,
    GAS_LIMIT_BLOCK,
    Evm,
    LogEntry,
    Message,
    Mined,
    MinedTx,
    Refusal,
    base_fee_wei,
)

Json = Any  # what json.loads makes; checked where it is used

CODE_NOT_FOUND = -32001
MAX_BLOCKS_PER_MINE = 10_000  # one request must not stop the node for more than half a minute
TIP_SUGGESTED_WEI = 10**9


@dataclass(frozen=True, slots=True)
class ProviderLimits:
    """What a hosted node refuses to answer in one `eth_getLogs`; generous unless a test wants to see the
    refusal.
    """

    range_blocks: int = 100_000
    results: int = 10_000


@dataclass(frozen=True, slots=True)
class LogFilter:
    """A parsed filter of `eth_getLogs` or of a `logs` subscription."""

    addresses: tuple[bytes, ...]
    topics: tuple[tuple[bytes, ...] | None, ...]


class EthMethods:
    """Everything but subscriptions. `mine` is the server's: it also tells the subscribers."""

    def __init__(
        self, evm: Evm, mine: Callable[[], object], limits: ProviderLimits, finality_depth: int
    ) -> None:
        self.evm = evm
        self.limits = limits
        self.automine = False
        self._mine = mine
        self._finality_depth = finality_depth
        self._time_ahead_s = 0
        self.table: dict[str, Callable[..., Json]] = {
            "eth_blockNumber": lambda: hex(evm.head.number),
            "eth_call": self.call,
            "eth_chainId": lambda: hex(evm.chain_id),
            "eth_estimateGas": self.estimate_gas,
            "eth_feeHistory": self.fee_history,
            "eth_gasPrice": lambda: hex(evm.next_base_fee_wei + TIP_SUGGESTED_WEI),
            "eth_getBalance": lambda address, tag="latest": hex(
                self._state(tag).get_balance(raw(address, 20))
            ),
            "eth_getBlockByHash": self.get_block_by_hash,
            "eth_getBlockByNumber": self.get_block_by_number,
            "eth_getCode": lambda address, tag="latest": hex0x(self._state(tag).get_code(raw(address, 20))),
            "eth_getLogs": self.get_logs,
            "eth_getStorageAt": self.get_storage,
            "eth_getTransactionByHash": self.get_transaction,
            "eth_getTransactionCount": self.get_transaction_count,
            "eth_getTransactionReceipt": self.get_receipt,
            "eth_maxPriorityFeePerGas": lambda: hex(TIP_SUGGESTED_WEI),
            "eth_sendRawTransaction": self.send_raw_transaction,
            "eth_syncing": lambda: False,
            "evm_increaseTime": self.increase_time,
            "evm_mine": self.evm_mine,
            "evm_revert": lambda number: evm.revert(quantity(number)),
            "evm_setAutomine": self.set_automine,
            "evm_snapshot": lambda: hex(evm.snapshot()),
            "net_version": lambda: str(evm.chain_id),
            "web3_clientVersion": lambda: "v2v-devnet/1",
        }

    @property
    def now_s(self) -> int:
        """The wall clock plus what `evm_increaseTime` added."""
        return int(time.time()) + self._time_ahead_s

    def get_block_by_number(self, tag: Json, full: bool = False) -> Json:
        """None beyond the head."""
        block = self._find_block(tag)
        return None if block is None else block_json(block, full=full)

    def get_block_by_hash(self, block_hash: Json, full: bool = False) -> Json:
        """None for blocks that are unknown or were dropped."""
        block = self.evm.block_by_hash(raw(block_hash, 32))
        return None if block is None else block_json(block, full=full)

    def get_logs(self, query: Json) -> Json:
        """Refuses ranges and answers larger than the limits, in the words of hosted nodes."""
        wanted = log_filter(query)
        if "blockHash" in query:
            first = last = self._block({"blockHash": query["blockHash"]}).number
        else:
            first = self._height(query.get("fromBlock", "latest"))
            last = min(self._height(query.get("toBlock", "latest")), self.evm.head.number)
        if last - first >= self.limits.range_blocks:
            raise Refusal(CODE_LIMIT, f"query exceeds max block range {self.limits.range_blocks}")
        found = list(self.evm.logs(first, last, wanted.addresses, wanted.topics))
        if len(found) > self.limits.results:
            raise Refusal(CODE_LIMIT, f"query returned more than {self.limits.results} results")
        return [log_json(log) for log in found]

    def call(self, message: Json, tag: Json = "latest", *_overrides: Json) -> str:
        """On `pending` as if in the next block, else in the named one."""
        at_s = self._next_block_at_s() if tag == "pending" else None
        return hex0x(self.evm.call(_message(message), self._block(tag), at_s=at_s))

    def estimate_gas(self, message: Json, *_tag: Json) -> str:
        """For the next block."""
        return hex(self.evm.estimate_gas(_message(message), self._next_block_at_s()))

    def send_raw_transaction(self, raw_tx: Json) -> str:
        """Into the pool; with automine the block follows at once."""
        tx_hash = self.evm.add(raw(raw_tx))
        if self.automine:
            self._mine()
        return hex0x(tx_hash)

    def get_transaction(self, tx_hash: Json) -> Json:
        """Mined or waiting; None when unknown."""
        place = self.evm.find(raw(tx_hash, 32))
        if place is not None:
            return _tx_json(place[1].transaction, place)
        waiting = self.evm.pending(raw(tx_hash, 32))
        return None if waiting is None else _tx_json(waiting, None)

    def get_receipt(self, tx_hash: Json) -> Json:
        """None until mined."""
        place = self.evm.find(raw(tx_hash, 32))
        return None if place is None else _receipt_json(*place)

    def get_transaction_count(self, address: Json, tag: Json = "latest") -> str:
        """`pending` counts what waits without a gap."""
        if tag == "pending":
            return hex(self.evm.nonce(raw(address, 20), pending=True))
        return hex(self._state(tag).get_nonce(raw(address, 20)))

    def get_storage(self, address: Json, slot: Json, tag: Json = "latest") -> str:
        """One storage word."""
        return hex0x(int(self._state(tag).get_storage(raw(address, 20), quantity(slot))).to_bytes(32, "big"))

    def fee_history(self, blocks: Json, newest: Json = "latest", _percentiles: Json = None) -> Json:
        """Base fees and fill; rewards are left out, as nobody competes here."""
        last = self._block(newest).number
        first = max(0, last + 1 - min(quantity(blocks), 1_024))
        headers = [self.evm.blocks[number].header for number in range(first, last + 1)]
        return {
            "oldestBlock": hex(first),
            "baseFeePerGas": [hex(base_fee_wei(header)) for header in headers]
            + [hex(self.evm.next_base_fee_wei)],
            "gasUsedRatio": [header.gas_used / header.gas_limit for header in headers],
        }

    def increase_time(self, seconds: Json) -> str:
        """Forward only; blocks from the next one on."""
        self._time_ahead_s += max(0, quantity(seconds))
        return hex(self._time_ahead_s)

    def set_automine(self, automine: Json) -> bool:
        """True: a block for every transaction, at once."""
        self.automine = bool(automine)
        return True

    def evm_mine(self, blocks: Json = 1, *_rest: Json) -> str:
        """Blocks at once (one, or as many as asked)."""
        wanted = quantity(blocks)
        if not 0 < wanted <= MAX_BLOCKS_PER_MINE:
            raise Refusal(CODE_LIMIT, f"mine 1 to {MAX_BLOCKS_PER_MINE} blocks at a time")
        for _ in range(wanted):
            self._mine()
        return "0x0"

    # ---- which block is meant

    def _next_block_at_s(self) -> int:
        return max(self.now_s, int(self.evm.head.header.timestamp) + 1)

    def _state(self, tag: Json) -> Any:
        return self.evm.vm_at(self._block(tag)).state

    def _block(self, tag: Json) -> Mined:
        block = self._find_block(tag)
        if block is None:
            raise Refusal(CODE_NOT_FOUND, "header not found")
        return block

    def _find_block(self, tag: Json) -> Mined | None:
        if isinstance(tag, dict) and "blockHash" in tag:  # EIP-1898; only canonical blocks are known here
            return self.evm.block_by_hash(raw(tag["blockHash"], 32))
        height = self._height(tag["blockNumber"] if isinstance(tag, dict) else tag)
        return self.evm.blocks[height] if height <= self.evm.head.number else None

    def _height(self, tag: Json) -> int:
        head = self.evm.head.number
        named = {"latest": head, "pending": head, "earliest": 0}
        named["safe"] = named["finalized"] = max(0, head - self._finality_depth)
        return named[tag] if tag in named else quantity(tag)


# ---- JSON in


def quantity(value: Json) -> int:
    """A number as JSON-RPC writes it (0x-hex); plain integers are tolerated, as other development nodes
    do.
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"not a quantity: {value!r}")
    number = int(value, 16) if isinstance(value, str) else value
    if not 0 <= number < 2**256:
        raise ValueError("quantity out of range")
    return number


def raw(value: Json, length: int | None = None) -> Any:
    """Bytes as JSON-RPC writes them; typed Any because py-evm wants its own names for the same bytes."""
    if not isinstance(value, str) or value[:2] != "0x":
        raise ValueError("not 0x-hex data")
    data = bytes.fromhex(value[2:])
    if length is not None and len(data) != length:
        raise ValueError(f"{length} bytes expected, got {len(data)}")
    return data


def log_filter(query: Json) -> LogFilter:
    """Addresses (one or a list) and topics (None, one, or a list for each place)."""
    if not isinstance(query, dict):
        raise TypeError("a filter is an object")
    address = query.get("address") or []
    addresses = tuple(raw(single, 20) for single in ([address] if isinstance(address, str) else address))
    topics = query.get("topics") or []
    if len(topics) > 4 or len(addresses) > 1_000:
        raise Refusal(CODE_INVALID_PARAMS, "at most 4 topics and 1000 addresses")
    return LogFilter(addresses, tuple(_topic(topic) for topic in topics))


def _topic(topic: Json) -> tuple[bytes, ...] | None:
    if topic is None or topic == []:
        return None
    return tuple(raw(single, 32) for single in ([topic] if isinstance(topic, str) else topic))


def _message(fields: Json) -> Message:
    if not isinstance(fields, dict):
        raise TypeError("a call is an object")
    return Message(
        sender=raw(fields.get("from") or "0x" + "00" * 20, 20),
        to=raw(fields["to"], 20) if fields.get("to") else None,
        data=raw(fields.get("input") or fields.get("data") or "0x"),
        value_wei=quantity(fields.get("value") or 0),
        gas_limit=min(quantity(fields.get("gas") or GAS_LIMIT_BLOCK), GAS_LIMIT_BLOCK),
    )


# ---- JSON out


def block_json(block: Mined, *, full: bool) -> Json:
    """A block with every field of its header (Prague), and transactions in full or as hashes."""
    header = block.header
    hashes = [hex0x(bytes(mined.transaction.hash)) for mined in block.transactions]
    return {
        "number": hex(block.number),
        "hash": hex0x(block.block_hash),
        "parentHash": hex0x(header.parent_hash),
        "sha3Uncles": hex0x(header.uncles_hash),
        "miner": hex0x(header.coinbase),
        "stateRoot": hex0x(header.state_root),
        "transactionsRoot": hex0x(header.transaction_root),
        "receiptsRoot": hex0x(header.receipt_root),
        "logsBloom": hex0x(int(header.bloom).to_bytes(256, "big")),
        "difficulty": hex(header.difficulty),
        "gasLimit": hex(header.gas_limit),
        "gasUsed": hex(header.gas_used),
        "timestamp": hex(header.timestamp),
        "extraData": hex0x(header.extra_data),
        "mixHash": hex0x(header.mix_hash),
        "nonce": hex0x(bytes(header.nonce).rjust(8, b"\0")),
        "baseFeePerGas": hex(base_fee_wei(header)),
        "withdrawalsRoot": hex0x(header.withdrawals_root or b""),
        "blobGasUsed": hex(header.blob_gas_used),
        "excessBlobGas": hex(header.excess_blob_gas),
        "parentBeaconBlockRoot": hex0x(header.parent_beacon_block_root or b""),
        "requestsHash": hex0x(getattr(header, "requests_hash", b"")),
        "uncles": [],
        "withdrawals": [],
        "transactions": [_tx_json(m.transaction, (block, m)) for m in block.transactions] if full else hashes,
    }


def log_json(log: LogEntry) -> Json:
    """One log."""
    return {
        "address": hex0x(log.address),
        "topics": [hex0x(topic) for topic in log.topics],
        "data": hex0x(log.data),
        "blockNumber": hex(log.block_number),
        "blockHash": hex0x(log.block_hash),
        "transactionHash": hex0x(log.tx_hash),
        "transactionIndex": hex(log.tx_index),
        "logIndex": hex(log.log_index),
        "removed": False,
    }


def _tx_json(tx: SignedTransactionAPI, place: tuple[Mined, MinedTx] | None) -> Json:
    type_id = int(getattr(tx, "type_id", 0) or 0)
    fields: dict[str, Json] = {
        "hash": hex0x(bytes(tx.hash)),
        "type": hex(type_id),
        "chainId": None if tx.chain_id is None else hex(tx.chain_id),
        "nonce": hex(tx.nonce),
        "from": hex0x(bytes(tx.sender)),
        "to": hex0x(bytes(tx.to)) if tx.to else None,
        "value": hex(tx.value),
        "gas": hex(tx.gas),
        "gasPrice": hex(place[1].effective_gas_price_wei if place else tx.max_fee_per_gas),
        "input": hex0x(tx.data),
        "v": hex(tx.y_parity),
        "r": hex(tx.r),
        "s": hex(tx.s),
        "blockNumber": hex(place[0].number) if place else None,
        "blockHash": hex0x(place[0].block_hash) if place else None,
        "transactionIndex": hex(place[1].index) if place else None,
    }
    if type_id >= 2:  # EIP-1559
        fields |= {
            "maxFeePerGas": hex(tx.max_fee_per_gas),
            "maxPriorityFeePerGas": hex(tx.max_priority_fee_per_gas),
            "accessList": [],
            "yParity": hex(tx.y_parity),
        }
    return fields


def _receipt_json(block: Mined, mined: MinedTx) -> Json:
    tx = mined.transaction
    return {
        "transactionHash": hex0x(bytes(tx.hash)),
        "transactionIndex": hex(mined.index),
        "type": hex(int(getattr(tx, "type_id", 0) or 0)),
        "blockNumber": hex(block.number),
        "blockHash": hex0x(block.block_hash),
        "from": hex0x(bytes(tx.sender)),
        "to": hex0x(bytes(tx.to)) if tx.to else None,
        "status": hex(mined.succeeded),
        "gasUsed": hex(mined.gas_used),
        "cumulativeGasUsed": hex(mined.gas_used_cumulative),
        "effectiveGasPrice": hex(mined.effective_gas_price_wei),
        "contractAddress": hex0x(mined.contract_address) if mined.contract_address else None,
        "logs": [log_json(log) for log in mined.logs],
        "logsBloom": hex0x(b"\0" * 256),
    }
