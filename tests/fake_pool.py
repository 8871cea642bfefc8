"""A chain and its pool in memory, with every trouble a settlement can meet: for stories that take milliseconds.

    net = FakeNet()
    token = net.connected(order)          a session, opened in its own block
    net.mine()                            the next block: by nonce, whoever pays the base fee
    net.pool.clear(); net.base_fee_wei *= 50; net.forgets = True; net.reorg(2)

The contract's rules are those of the simulated world (`simulation.chain.Rules`): real calldata, logs and revert data of the
checked-in ABI, receipts judged by the property-tested predicate. The pool's rules are geth's: one transaction a nonce, 10 %
on both fees to replace it, refusals by the names of `agent.chain.node.SEND_REFUSALS`. Transactions are real signed bytes.
"""

import asyncio
from dataclasses import dataclass, replace

from simulation.chain import Market, OpenSession, Revert, Rules, Slot, State, _decoded_call, _fits, _result

from agent.chain import contract
from agent.chain.node import FeeSuggestion, Header, LogPage, RawLog, Receipt, Reverted, tx_hash_of
from agent.chain.sender import _fields
from agent.core import token as rules
from agent.core.token import Domain
from agent.core.units import cost_wei_ceil
from agent.errors import Refused, Transient
from agent.keys import ephemeral_signer

CHAIN_ID, CONTRACT = 31_337, bytes.fromhex("c0" * 20)
T0, BLOCK_S = 1_790_000_000, 12
GWEI = 10**9
GAS_USED = 55_000
REPLACE_PERCENT = 10  # what geth asks
COINS_WEI = 10**20
VALIDITY_S, CHALLENGE_S, GRACE_S = 900, 43_200, 259_200
ORGANISATION = bytes.fromhex("0e" * 20)

_SENDERS = {}  # recovering a sender takes a millisecond, and agents send the same bytes again and again


@dataclass(frozen=True)
class Tx:
    """A signed transaction, as the pool reads it."""

    sender: bytes
    nonce: int
    to: bytes
    data: bytes
    gas: int
    max_fee: int
    tip: int
    tx_hash: bytes


@dataclass(frozen=True)
class Mined:
    """A transaction in a block, and what it did."""

    tx: Tx
    succeeded: bool
    gas_used: int
    logs: tuple = ()


@dataclass(frozen=True)
class Block:
    """A block and the state after it."""

    header: Header
    mined: tuple
    state: State


def read(raw_tx):
    """Signed bytes as a Tx."""
    from eth_account import Account

    if raw_tx not in _SENDERS:
        fields = _fields(raw_tx)
        sender = bytes.fromhex(Account.recover_transaction(raw_tx)[2:])
        _SENDERS[raw_tx] = Tx(
            sender, fields["nonce"], fields["to"], fields["data"], fields["gas"], fields["maxFeePerGas"],
            fields["maxPriorityFeePerGas"], tx_hash_of(raw_tx),
        )  # fmt: skip
    return _SENDERS[raw_tx]


class FakeNet:
    """One market, one provider with an operator, one consumer; whoever else sends is a stranger."""

    def __init__(self, challenge_s=CHALLENGE_S, grace_s=GRACE_S):
        self.provider, self.operator, self.consumer = (
            ephemeral_signer(name) for name in (b"provider", b"operator", b"consumer")
        )
        self.domain = Domain(CHAIN_ID, CONTRACT)
        self.market = Market(self.domain, self.provider.address, self.operator.address, challenge_s, grace_s)
        state = State(coins={self.operator.address: COINS_WEI, self.consumer.address: COINS_WEI})
        self.base_fee_wei, self.tip_wei = GWEI, GWEI
        self.pool = {}  # (sender, nonce) -> Tx
        self.forgets = False  # takes every transaction, keeps none
        self.is_full = False
        self.miner_takes = lambda tx: True  # noqa: ARG005
        self.gas_needed = GAS_USED
        self.is_delegate = True  # the operator may act for the provider
        self.fork = 0
        self.auction_nonce = 0
        self.sent = []  # every raw transaction that reached the node, in order
        self.blocks = [Block(Header(0, rules.keccak(b"genesis"), bytes(32), T0), (), state)]
        self.mine(4)

    @property
    def state(self):
        """The newest."""
        return self.blocks[-1].state

    @property
    def now_s(self):
        """Chain time."""
        return self.blocks[-1].header.timestamp_s

    # ---- the market

    def connected(self, energy_wh=200, rate=10**16):
        """`connect`, in a block of its own; the session's `SessionOpened`."""
        self.auction_nonce += 1
        slot = Slot(self.auction_nonce, self.provider.address, energy_wh, rate, VALIDITY_S)
        self.state.slots[self.consumer.address] = slot
        data = contract.encode_connect(self.provider.address, energy_wh)
        self.put(self.consumer.address, data)
        self.mine()
        (mined,) = self.blocks[-1].mined
        logs = [contract.decode_log(CONTRACT, topics, data) for topics, data in mined.logs]
        return next(log for log in logs if isinstance(log, contract.SessionOpened))

    def put(self, sender, data, *, nonce=None, max_fee=10**15, to=CONTRACT):
        """Somebody's transaction, straight into the pool."""
        nonce = self.next_nonce(sender) if nonce is None else nonce
        tx_hash = rules.keccak(sender + nonce.to_bytes(8, "big") + data + max_fee.to_bytes(32, "big"))
        self.pool[sender, nonce] = Tx(sender, nonce, to, data, 200_000, max_fee, GWEI, tx_hash)
        return tx_hash

    def next_nonce(self, sender):
        """Mined and waiting."""
        nonce = self.state.nonces.get(sender, 0)
        while (sender, nonce) in self.pool:
            nonce += 1
        return nonce

    def ack(self, session_id, energy_wh):
        """The consumer's own signature for this much."""
        digest = rules.digest(self.domain, rules.Receipt(rules.SessionId(session_id), energy_wh))
        signature = self.consumer.sign_digest(digest)
        return rules.Ack(rules.Token(bytes(32)), rules.ZERO_ADDRESS, 0, 0, bytes(32), b"", signature)

    def settlements(self, token):
        """(succeeded, transaction) of everything the operator got mined for this session."""
        return [
            (mined.succeeded, mined.tx)
            for block in self.blocks
            for mined in block.mined
            if mined.tx.sender == self.operator.address and mined.tx.data[4:36] == token
        ]

    # ---- the pool

    def send(self, raw_tx):
        """As a node takes it. Raises Refused by the names of SEND_REFUSALS, or Transient for a full pool."""
        self.sent.append(raw_tx)
        tx = read(raw_tx)
        if tx.nonce < self.state.nonces.get(tx.sender, 0):
            if self.receipt_block(tx.tx_hash) is None:
                raise Refused("nonce_too_low", "next nonce is higher")
            return
        if self.is_full:
            raise Transient("the pool is full")
        if self.state.coins.get(tx.sender, 0) < tx.gas * tx.max_fee:
            raise Refused("unfunded", "insufficient funds for gas * price + value")
        there = self.pool.get((tx.sender, tx.nonce))
        if there is not None and there.tx_hash != tx.tx_hash:
            bumped = [
                fee * 100 >= old * (100 + REPLACE_PERCENT)
                for fee, old in ((tx.max_fee, there.max_fee), (tx.tip, there.tip))
            ]
            if not all(bumped):
                raise Refused("replacement_underpriced", "replacement transaction underpriced")
        if not self.forgets:
            self.pool[tx.sender, tx.nonce] = tx

    # ---- blocks

    def mine(self, count=1, after_s=BLOCK_S):
        """The next blocks."""
        for _ in range(count):
            self._append(self.now_s + after_s if self.blocks else T0)

    def reorg(self, depth, *, keeps=True):
        """The newest blocks never happened, and one more comes; what was in them is back in the pool, or lost."""
        depth = min(depth, len(self.blocks) - 5)
        orphaned, self.blocks = self.blocks[-depth:], self.blocks[:-depth]
        self.fork += 1
        for block in orphaned:
            for mined in block.mined:
                if keeps:
                    self.pool.setdefault((mined.tx.sender, mined.tx.nonce), mined.tx)
        self.mine(depth + 1)

    def receipt_block(self, tx_hash):
        """(block, mined) of a transaction; None while it is in no block."""
        for block in reversed(self.blocks):
            for mined in block.mined:
                if mined.tx.tx_hash == tx_hash:
                    return block, mined
        return None

    def _append(self, timestamp_s):
        parent, state, mined = self.blocks[-1].header, self.state.copy(), []
        for key, tx in sorted(self.pool.items()):
            if tx.nonce < state.nonces.get(tx.sender, 0):
                del self.pool[key]
            elif self._fits(tx, state):
                del self.pool[key]
                mined.append(self._execute(state, tx, timestamp_s))
        number = parent.number + 1
        seed = repr((number, parent.block_hash, timestamp_s, self.fork)).encode()
        header = Header(number, rules.keccak(seed), parent.block_hash, timestamp_s)
        self.blocks.append(Block(header, tuple(mined), state))

    def _fits(self, tx, state):
        next_one = tx.nonce == state.nonces.get(tx.sender, 0)
        return next_one and tx.max_fee >= self.base_fee_wei and self.miner_takes(tx)

    def _execute(self, state, tx, timestamp_s):
        state.nonces[tx.sender] = tx.nonce + 1
        price, ran_out = min(tx.max_fee, self.base_fee_wei + tx.tip), tx.gas < self.gas_needed
        gas_used = tx.gas if ran_out else self.gas_needed
        state.coins[tx.sender] = state.coins.get(tx.sender, 0) - gas_used * price
        if ran_out:
            return Mined(tx, succeeded=False, gas_used=gas_used)
        if tx.to != CONTRACT:
            return Mined(tx, succeeded=True, gas_used=gas_used)
        trial = state.copy()
        called = self.rules(trial, tx.sender, timestamp_s)
        try:
            called.run(tx.data)
        except Revert:
            return Mined(tx, succeeded=False, gas_used=gas_used - 1)
        for part in ("slots", "sessions", "ledger", "opened", "ended", "conceded"):
            setattr(state, part, getattr(trial, part))
        return Mined(tx, succeeded=True, gas_used=gas_used, logs=tuple(called.logs))

    def rules(self, state, sender, at_s):
        """The contract, as it judges this caller."""
        market = self.market if self.is_delegate else replace(self.market, operator=bytes(20))
        return Rules(market, state, sender, at_s)


class FakeNode:
    """The Node port to it. `between(name)` is called around every question: a place for faults and crashes. `lag`: blocks
    that the backend which answers is behind.
    """

    def __init__(self, net, between=lambda name, when: None, lag=lambda: 0):  # noqa: ARG005
        self.net, self._between, self._lag = net, between, lag

    async def _ask(self, name, answer):
        await asyncio.sleep(0)  # whoever else runs may go on here, as with a real node
        self._between(name, "before")
        behind = self._lag()
        found = answer(self.net.blocks[: len(self.net.blocks) - behind] if behind else self.net.blocks)
        self._between(name, "after")
        return found

    async def close(self):
        """Nothing is held."""

    def distrust(self, lie, **facts):
        """Nobody else is there to be asked."""

    async def chain_id(self):
        """Ours."""
        return CHAIN_ID

    async def genesis_hash(self):
        """Of block 0."""
        return self.net.blocks[0].header.block_hash

    async def head(self):
        """The newest."""
        return await self._ask("head", lambda blocks: blocks[-1].header)

    async def header(self, block):
        """By height or hash."""

        def answer(blocks):
            if isinstance(block, bytes):
                return next((b.header for b in reversed(blocks) if b.header.block_hash == block), None)
            if block == "latest":
                return blocks[-1].header
            return blocks[block].header if block < len(blocks) else None

        return await self._ask("header", answer)

    async def log_pages(self, address, topics, from_block, to_block):
        """One page."""

        def answer(blocks):
            return tuple(
                RawLog(
                    CONTRACT, log_topics, data, b.header.number, b.header.block_hash, mined.tx.tx_hash, index
                )
                for b in blocks[from_block : to_block + 1]
                for mined in b.mined
                for index, (log_topics, data) in enumerate(mined.logs)
                if _fits(log_topics, topics)
            )

        yield LogPage(from_block, to_block, await self._ask("logs", answer))

    async def logs_at(self, block_hash, address, topics):
        """Of one block."""
        header = await self.header(block_hash)
        if header is None:
            return ()
        return await self.logs(address, topics, header.number, header.number)

    async def logs(self, address, topics, from_block, to_block):
        """Of a range."""
        pages = [page async for page in self.log_pages(address, topics, from_block, to_block)]
        return pages[0].logs

    async def call(self, to, data, block_hash=None, from_=None, *, value_wei=0):
        """Views, and failed transactions replayed."""

        def answer(blocks):
            block = blocks[-1]
            if block_hash is not None:
                block = next((b for b in reversed(blocks) if b.header.block_hash == block_hash), None)
                if block is None:
                    raise Transient("header not found")
            return self._view(block, data, from_ or ORGANISATION)

        return await self._ask("call", answer)

    def _view(self, block, data, sender):
        name, arguments = _decoded_call(data)
        if name == "sessions":
            return _result("sessions", _session(block.state.sessions.get(arguments[0])))
        try:
            self.net.rules(block.state.copy(), sender, block.header.timestamp_s + 1).run(data)
        except Revert as no:
            raise Reverted(no.data) from no
        return b""

    async def balance(self, address):
        """Wei."""
        return await self._ask("balance", lambda blocks: blocks[-1].state.coins.get(address, 0))

    async def nonce(self, address, *, pending=False):
        """Mined; with `pending` also what waits in a row."""

        def answer(blocks):
            mined = blocks[-1].state.nonces.get(address, 0)
            return max(mined, self.net.next_nonce(address)) if pending else mined

        return await self._ask("nonce", answer)

    async def fees(self):
        """Just now."""
        return await self._ask("fees", lambda blocks: FeeSuggestion(self.net.base_fee_wei, self.net.tip_wei))  # noqa: ARG005

    async def estimate_gas(self, from_, to, data, value_wei=0):
        """By trying. Raises Reverted."""

        def answer(blocks):
            self._view(blocks[-1], data, from_)
            return GAS_USED

        return await self._ask("estimate_gas", answer)

    async def send_raw(self, raw_tx):
        """Into the pool. Raises Refused."""

        def answer(blocks):
            self.net.send(raw_tx)
            return tx_hash_of(raw_tx)

        return await self._ask("send_raw", answer)

    async def receipt(self, tx_hash):
        """None while it is in no block."""

        def answer(blocks):
            for block in reversed(blocks):
                for mined in block.mined:
                    if mined.tx.tx_hash == tx_hash:
                        price = min(mined.tx.max_fee, self.net.base_fee_wei + mined.tx.tip)
                        place = (block.header.number, block.header.block_hash)
                        return Receipt(tx_hash, mined.succeeded, *place, mined.gas_used, price, None, ())
            return None

        return await self._ask("receipt", answer)


def _session(session: OpenSession | None):
    if session is None:
        return (0, bytes(20), bytes(20), 0, 0, 0, 0, 0, 0, 0, False)
    return (
        2 if session.closing else 1, session.consumer, session.provider, session.auction_nonce, session.energy_wh,
        session.claimed_wh, session.rate, session.deposit, session.deposit, session.settle_at_s, True,
    )  # fmt: skip


def lock_wei(opened):
    """What both sides have locked in it."""
    return 2 * cost_wei_ceil(opened.rate_wei_per_kwh, opened.energy_wh)
