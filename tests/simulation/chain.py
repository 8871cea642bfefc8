"""The simulated chain: blocks, reorgs, a pool that loses and delays, the market's rules for sessions, and the Node port to it.

    chain = Chain(market, now_ms, clock)
    chain.mine()                     the next block, now
    chain.reorg(3)                   the newest three blocks never happened; what was in them may be mined again, later
    SimNode(chain, life, weather)    what one life of the agent may ask (agent.chain.node.Node)

Calldata, results, logs and revert data are the real contract's, through its checked-in ABI; receipts are judged by
`token.is_receipt_valid`, which a property test holds against the Solidity. Transactions of the agent are real signed bytes.
Auctions are won before a story begins: `connect` finds the slot that `wins` has put there.
"""

from collections.abc import Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields, replace

from agent.chain import contract
from agent.chain.node import (
    FeeSuggestion,
    Header,
    LogPage,
    RawLog,
    Receipt,
    Reverted,
    tx_hash_of,
)
from agent.core import token as rules
from agent.core.token import Domain
from agent.core.units import cost_wei_ceil, cost_wei_floor
from agent.errors import Refused, Transient
from contracts import load_artefact

BLOCK_S = 12
GAS_USED = 90_000
BASE_FEE_WEI = 10**9
TIP_WEI = 10**9
COINS_WEI = 10**18
DEPOSIT_WEI = 10**24
OPERATOR_LIMIT_WEI = 10**24
PAST_BLOCKS = 20  # deeper than any reorg of ours
POOL_BUMP_PERCENT = 10  # what every pool asks for a replacement
CALLER = bytes.fromhex("ee" * 20)


class Revert(Exception):
    """The contract says no, by this error of its ABI."""

    def __init__(self, name, *arguments):
        super().__init__(name)
        self.data = _revert_data(name, arguments)


def _revert_data(name, arguments):
    selector, entry = next(
        (key, entry) for key, entry in contract._errors_by_selector().items() if entry["name"] == name
    )
    return selector + contract._codec().encode(contract._types(entry["inputs"]), arguments)


@dataclass(frozen=True)
class Tx:
    """A transaction to the market."""

    sender: bytes
    nonce: int
    data: bytes
    tx_hash: bytes
    max_fee: int = 10 * BASE_FEE_WEI
    tip: int = TIP_WEI


@dataclass(frozen=True)
class Slot:
    """An auction that is over and won: `connect` may follow."""

    auction_nonce: int
    provider: bytes
    energy_wh: int
    rate: int
    validity_s: int


@dataclass(frozen=True)
class OpenSession:
    """The contract's word about an open session."""

    consumer: bytes
    provider: bytes
    auction_nonce: int
    energy_wh: int
    claimed_wh: int
    rate: int
    deposit: int
    settle_at_s: int
    valid_until_s: int
    closing: bool = False


@dataclass
class State:
    """Everything after a block. Copied whole for every block: a reorg is then only a cut."""

    slots: dict = field(default_factory=dict)  # consumer -> Slot
    sessions: dict = field(default_factory=dict)  # token -> OpenSession
    ledger: dict = field(default_factory=dict)  # account -> wei
    opened: dict = field(default_factory=dict)  # (consumer, auction nonce) -> token
    ended: dict = field(default_factory=dict)  # token -> (Wh paid, fee)
    conceded: dict = field(default_factory=dict)  # token -> highest Wh its consumer conceded
    nonces: dict = field(default_factory=dict)
    coins: dict = field(default_factory=dict)

    def copy(self):
        """Another one, equal."""
        return State(*(dict(getattr(self, part.name)) for part in fields(self)))

    @property
    def held_wei(self):
        """Ledger, deposits and bonds: what the contract owes."""
        slots = sum(2 * cost_wei_ceil(slot.rate, slot.energy_wh) for slot in self.slots.values())
        return sum(self.ledger.values()) + slots + sum(2 * s.deposit for s in self.sessions.values())

    def credit(self, account, wei):
        """Into the ledger."""
        self.ledger[account] = self.ledger.get(account, 0) + wei


@dataclass(frozen=True)
class Mined:
    """A transaction in a block."""

    tx: Tx
    succeeded: bool
    logs: tuple  # (topics, data)


@dataclass(frozen=True)
class Block:
    """A block and the state after it."""

    number: int
    block_hash: bytes
    parent_hash: bytes
    timestamp_s: int
    mined: tuple
    state: State

    @property
    def header(self):
        """Its place in the chain."""
        return Header(self.number, self.block_hash, self.parent_hash, self.timestamp_s)


@dataclass(frozen=True)
class Market:
    """One deployment: who, where, how long."""

    domain: Domain
    provider: bytes
    operator: bytes
    challenge_s: int
    grace_s: int


class Rules:
    """The contract's functions for sessions, on one state at one time. Logs are collected."""

    def __init__(self, market, state, sender, now_s):
        self.market, self.state, self.sender, self.now_s = market, state, sender, now_s
        self.logs = []

    def run(self, data):
        """A call. Raises Revert."""
        name, arguments = _decoded_call(data)
        match name:
            case "connect":
                self._connect(*arguments)
            case "endConnection":
                self._end(*arguments)
            case "submitReceipt":
                self._submit(*arguments)
            case "settle":
                self._settle_due(*arguments)
            case _:
                raise AssertionError(name)

    def _emit(self, name, **values):
        self.logs.append(_log_of(name, values))

    def _connect(self, provider, energy_wh):
        slot = self.state.slots.pop(self.sender, None)
        if slot is None:
            raise Revert("NoAuction")
        if provider != slot.provider or energy_wh != slot.energy_wh:
            raise Revert("WrongEnergy", slot.energy_wh)
        consumer, valid_until_s = self.sender, self.now_s + slot.validity_s
        token = rules.access_token(consumer, provider, self.now_s, valid_until_s)
        deposit = cost_wei_ceil(slot.rate, energy_wh)
        self.state.opened[consumer, slot.auction_nonce] = token
        self.state.sessions[token] = OpenSession(
            consumer, provider, slot.auction_nonce, energy_wh, 0, slot.rate, deposit,
            valid_until_s + self.market.grace_s, valid_until_s,
        )  # fmt: skip
        domain = self.market.domain
        self._emit("Connected", EVP=provider, EVC=consumer, token=token, validity=valid_until_s)
        self._emit(
            "SessionOpened", token=token, consumer=consumer, provider=provider, auctionNonce=slot.auction_nonce,
            sessionId=rules.session_id(domain.chain_id, domain.contract, consumer, provider, slot.auction_nonce),
            energyWh=energy_wh, rate=slot.rate, deposit=deposit, bond=deposit, issuedAt=self.now_s,
            validity=valid_until_s,
        )  # fmt: skip

    def _open(self, token, energy_wh):
        session = self.state.sessions.get(token)
        if session is None:
            raise Revert("NoSession", token)
        if energy_wh > session.energy_wh:
            raise Revert("OverAmount", session.energy_wh)
        return session

    def _prove(self, session, energy_wh, ack):
        domain = self.market.domain
        proven = rules.is_receipt_valid(
            domain,
            rules.Ack(*ack),
            session_id=rules.session_id(
                domain.chain_id, domain.contract, session.consumer, session.provider, session.auction_nonce
            ),
            provider=session.provider,
            consumer=session.consumer,
            energy_wh_ordered=session.energy_wh,
            delivered_wh=energy_wh,
        )
        if not proven:
            raise Revert("InvalidReceipt")

    def _end(self, token, energy_wh, ack):
        session = self._open(token, energy_wh)
        if self.sender == session.consumer:
            self._concede(token, session, energy_wh)
        elif self.sender in (session.provider, self.market.operator):
            if energy_wh > session.claimed_wh:
                self._prove(session, energy_wh, ack)
                session = replace(session, claimed_wh=energy_wh)
            self._settle(token, session)
        else:
            raise Revert("NotParty")

    def _concede(self, token, session, energy_wh):
        raised = energy_wh > session.claimed_wh
        self.state.conceded[token] = max(energy_wh, self.state.conceded.get(token, 0))
        session = replace(session, claimed_wh=max(energy_wh, session.claimed_wh))
        if session.claimed_wh == session.energy_wh:
            self._settle(token, session)
            return
        if not session.closing:
            close_at_s = min(self.now_s + self.market.challenge_s, session.settle_at_s)
            session = replace(session, closing=True, settle_at_s=close_at_s)
        elif not raised:
            return
        self.state.sessions[token] = session
        self._emit(
            "ConnectionClosing", token=token, consumer=session.consumer, provider=session.provider,
            claimedWh=session.claimed_wh, closeAt=session.settle_at_s,
        )  # fmt: skip

    def _submit(self, token, energy_wh, ack):
        session = self._open(token, energy_wh)
        self._prove(session, energy_wh, ack)
        if energy_wh > session.claimed_wh:
            self.state.sessions[token] = replace(session, claimed_wh=energy_wh)

    def _settle_due(self, token):
        session = self._open(token, 0)
        if self.now_s < session.settle_at_s:
            raise Revert("TooEarly", session.settle_at_s)
        self._settle(token, session)

    def _settle(self, token, session):
        del self.state.sessions[token]
        fee = cost_wei_floor(session.rate, session.claimed_wh)
        self.state.ended[token] = (session.claimed_wh, fee)
        self.state.credit(session.provider, fee + session.deposit)
        self.state.credit(session.consumer, session.deposit - fee)
        self._emit(
            "ConnectionEnded", token=token, consumer=session.consumer, provider=session.provider,
            deliveredWh=session.claimed_wh, fee=fee,
        )  # fmt: skip


def _decoded_call(data):
    for name, (selector, types, _) in contract._functions().items():
        if selector == data[:4]:
            return name, contract._decoded(types, data[4:])
    raise AssertionError(data[:4].hex())


def _result(name, *values):
    return contract._codec().encode(contract._functions()[name][2], values)


def _log_of(name, values):
    entry = next(entry for entry in contract._events_by_topic().values() if entry["name"] == name)
    topics = [contract._event_topics()[name]]
    types, plain = [], []
    for part in entry["inputs"]:
        if part["indexed"]:
            topics.append(contract._codec().encode([part["type"]], [values[part["name"]]]))
        else:
            types.append(part["type"])
            plain.append(values[part["name"]])
    return tuple(topics), contract._codec().encode(types, plain)


class Chain:
    """The one truth about the market. `pool_takes(tx)` and `miner_takes(tx)` are the weather's say."""

    def __init__(self, market, chain_time_s, told):
        self.market, self._chain_time_s, self._told = market, chain_time_s, told
        state = State(coins={market.operator: COINS_WEI})
        state.credit(market.provider, DEPOSIT_WEI)
        began_s = chain_time_s() - (PAST_BLOCKS + 1) * BLOCK_S
        self.blocks = [Block(0, rules.keccak(b"genesis"), bytes(32), began_s, (), state)]
        self.pool: dict[tuple[bytes, int], Tx] = {}
        self.listeners: list[Callable[[Block], None]] = []
        self.fork = 0
        self.deep_at_s: dict[bytes, int] = {}  # token -> newest time it was canonical, `confirmations` deep
        self.confirmations = 3
        self.pool_takes = lambda tx: True  # noqa: ARG005
        self.miner_takes = lambda tx: True  # noqa: ARG005
        self.sends = lambda raw_tx: None  # noqa: ARG005 - somebody wants to look at the agent's transactions
        self.issued_wei = state.held_wei
        for count in range(1, PAST_BLOCKS + 1):
            self._append(began_s + count * BLOCK_S)

    # ---- the market's world

    def wins(self, consumer, slot):
        """An auction in which `slot.provider` won; both sides' money is locked."""
        cost_wei = cost_wei_ceil(slot.rate, slot.energy_wh)
        self.issued_wei += cost_wei
        for block in self.blocks:  # it happened long before whatever may be reorged
            block.state.slots[consumer] = slot
            block.state.credit(slot.provider, -cost_wei)

    @property
    def head(self):
        """The newest block."""
        return self.blocks[-1]

    @property
    def state(self):
        """The newest state."""
        return self.head.state

    def mined(self):
        """(block, mined transaction) for every canonical transaction."""
        return ((block, mined) for block in self.blocks for mined in block.mined)

    # ---- transactions

    def send(self, tx):
        """Into the pool, as a node would take it. Raises Refused."""
        if tx.nonce < self.state.nonces.get(tx.sender, 0):
            if any(mined.tx.tx_hash == tx.tx_hash for _, mined in self.mined()):
                return
            raise Refused("nonce_too_low", "simulated")
        there = self.pool.get((tx.sender, tx.nonce))
        if there is not None and there.tx_hash != tx.tx_hash:
            needed = (
                (100 + POOL_BUMP_PERCENT) * there.max_fee // 100,
                (100 + POOL_BUMP_PERCENT) * there.tip // 100,
            )
            if tx.max_fee < needed[0] or tx.tip < needed[1]:
                raise Refused("replacement_underpriced", "simulated")
        if self.pool_takes(tx):
            self.pool[tx.sender, tx.nonce] = tx

    def is_waiting(self, tx):
        """In the pool."""
        return self.pool.get((tx.sender, tx.nonce)) == tx

    # ---- blocks

    def mine(self, timestamp_s):
        """The next block, with whatever the miner takes."""
        self._append(timestamp_s)

    def reorg(self, depth, *, keeps=lambda tx: True):  # noqa: ARG005
        """The newest `depth` blocks are replaced by one more. `keeps(tx)`: an orphaned transaction is back in the pool."""
        depth = min(depth, len(self.blocks) - 1)
        orphaned, self.blocks = self.blocks[-depth:], self.blocks[:-depth]
        self.fork += 1
        for block in orphaned:
            for mined in block.mined:
                if keeps(mined.tx):
                    self.pool.setdefault((mined.tx.sender, mined.tx.nonce), mined.tx)
        parent_s, now_s = self.head.timestamp_s, self._chain_time_s()
        for count in range(1, depth + 2):
            self._append(parent_s + max(count, (now_s - parent_s) * count // (depth + 1)))

    def _append(self, timestamp_s):
        parent = self.head
        timestamp_s = max(timestamp_s, parent.timestamp_s + 1)
        number = parent.number + 1
        state = parent.state.copy()
        mined = []
        for tx in sorted(self.pool.values(), key=lambda tx: (tx.sender, tx.nonce)):
            if tx.nonce < state.nonces.get(tx.sender, 0):
                del self.pool[tx.sender, tx.nonce]
            elif (
                tx.nonce == state.nonces.get(tx.sender, 0)
                and tx.max_fee >= BASE_FEE_WEI
                and self.miner_takes(tx)
            ):
                del self.pool[tx.sender, tx.nonce]
                mined.append(self._execute(state, tx, timestamp_s))
        block_hash = rules.keccak(repr((number, parent.block_hash, timestamp_s, self.fork)).encode())
        block = Block(number, block_hash, parent.block_hash, timestamp_s, tuple(mined), state)
        self.blocks.append(block)
        for one in mined:
            self._told(
                f"block {number}: {_decoded_call(one.tx.data)[0]} {'' if one.succeeded else 'REVERTED'}"
            )
        deep = self.blocks[-min(self.confirmations, len(self.blocks))]
        for token in deep.state.sessions.keys() & state.sessions.keys():
            self.deep_at_s[token] = timestamp_s
        for listener in tuple(self.listeners):
            listener(block)

    def _execute(self, state, tx, timestamp_s):
        state.nonces[tx.sender] = tx.nonce + 1
        if tx.sender in state.coins:
            state.coins[tx.sender] -= GAS_USED * min(tx.max_fee, BASE_FEE_WEI + tx.tip)
        trial = state.copy()
        called = Rules(self.market, trial, tx.sender, timestamp_s)
        try:
            called.run(tx.data)
        except Revert:
            return Mined(tx, succeeded=False, logs=())
        for part in ("slots", "sessions", "ledger", "opened", "ended", "conceded"):
            setattr(state, part, getattr(trial, part))
        return Mined(tx, succeeded=True, logs=tuple(called.logs))


class SimNode:
    """The Node port of one life of the agent. Every answer may be late, lost, or from a backend that lags a little."""

    def __init__(self, chain, life):
        self._chain, self._life = chain, life

    async def _ask(self, name, answer):
        """`answer(blocks)` on what the backend that happens to answer knows."""
        return await self._life.call(f"node.{name}", lambda: answer(self._blocks()), self._life.weather.node)

    def _blocks(self):
        lag = self._life.weather.node_lag()
        return self._chain.blocks[: len(self._chain.blocks) - lag] if lag else self._chain.blocks

    async def close(self):
        """Nothing is held."""

    async def chain_id(self):
        """EIP-155."""
        return await self._ask("chain_id", lambda blocks: self._chain.market.domain.chain_id)  # noqa: ARG005

    async def genesis_hash(self):
        """Of block 0."""
        return await self._ask("genesis_hash", lambda blocks: blocks[0].block_hash)

    async def head(self):
        """The newest block of the backend that answers."""
        return await self._ask("head", lambda blocks: blocks[-1].header)

    async def header(self, block):
        """By height or hash."""

        def answer(blocks):
            if isinstance(block, bytes):
                return next((b.header for b in reversed(blocks) if b.block_hash == block), None)
            return blocks[block].header if block < len(blocks) else None

        return await self._ask("header", answer)

    async def log_pages(self, address, topics, from_block, to_block):
        """One page: the simulated provider is generous."""
        logs = await self._ask(
            "logs", lambda blocks: self._matching(blocks[from_block : to_block + 1], topics)
        )
        yield LogPage(from_block, to_block, logs)

    def _matching(self, blocks, topics):
        found = []
        for block in blocks:
            index = 0
            for mined in block.mined:
                for log_topics, data in mined.logs:
                    index += 1
                    if _fits(log_topics, topics):
                        found.append(
                            RawLog(
                                self._chain.market.domain.contract,
                                log_topics,
                                data,
                                block.number,
                                block.block_hash,
                                mined.tx.tx_hash,
                                index,
                            )
                        )
        return tuple(found)

    async def call(self, to, data, block_hash=None, from_=None, *, value_wei=0):
        """Views, and failed transactions replayed."""

        def answer(blocks):
            block = blocks[-1]
            if block_hash is not None:
                block = next((b for b in reversed(blocks) if b.block_hash == block_hash), None)
                if block is None:
                    raise Transient("header not found")
            return self._view(block, data, from_ or CALLER)

        return await self._ask("call", answer)

    def _view(self, block, data, sender):
        name, arguments = _decoded_call(data)
        market = self._chain.market
        match name:
            case "sessions":
                return _result("sessions", _session_tuple(block.state.sessions.get(arguments[0])))
            case "operatorOf":
                return _result("operatorOf", market.operator, OPERATOR_LIMIT_WEI, 0)
            case "parameters":
                return _result(
                    "parameters",
                    (60, 86_400, 30, 5, 900, 300, 172_800, market.challenge_s, market.grace_s, 10_000),
                )
        try:
            Rules(market, block.state.copy(), sender, block.timestamp_s + 1).run(data)
        except Revert as no:
            raise Reverted(no.data) from no
        return b""

    async def code(self, address):
        """Our contract's."""
        return await self._ask("code", lambda blocks: load_artefact().deployed_bytecode)  # noqa: ARG005

    async def balance(self, address):
        """Wei."""
        return await self._ask("balance", lambda blocks: blocks[-1].state.coins.get(address, 0))

    async def nonce(self, address, *, pending=False):
        """Mined; with `pending` also what waits in a row in the pool."""

        def answer(blocks):
            nonce = blocks[-1].state.nonces.get(address, 0)
            while pending and (address, nonce) in self._chain.pool:
                nonce += 1
            return nonce

        return await self._ask("nonce", answer)

    async def fees(self):
        """What it costs now."""
        return await self._ask("fees", lambda blocks: FeeSuggestion(BASE_FEE_WEI, TIP_WEI))  # noqa: ARG005

    async def estimate_gas(self, from_, to, data, value_wei=0):
        """By trying. Raises Reverted."""

        def answer(blocks):
            self._view(blocks[-1], data, from_)
            return GAS_USED

        return await self._ask("estimate_gas", answer)

    async def send_raw(self, raw_tx):
        """Into the pool. Raises Refused."""

        def answer(blocks):
            self._chain.sends(raw_tx)
            tx = _signed_tx(raw_tx)
            self._chain.send(tx)
            return tx.tx_hash

        return await self._ask("send_raw", answer)

    async def receipt(self, tx_hash):
        """None while it is in no block."""

        def answer(blocks):
            for block in reversed(blocks):
                for mined in block.mined:
                    if mined.tx.tx_hash == tx_hash:
                        return Receipt(
                            tx_hash, mined.succeeded, block.number, block.block_hash, GAS_USED,
                            BASE_FEE_WEI + TIP_WEI, None, (),
                        )  # fmt: skip
            return None

        return await self._ask("receipt", answer)

    @asynccontextmanager
    async def watch(self, address, topics):
        """Hints about new heads; the weather may end it."""
        await self._ask("watch", lambda blocks: None)  # noqa: ARG005
        heard = self._life.mailbox()

        def listener(block):
            if self._life.weather.node_is_silent():
                heard.fail(Transient("the simulated subscription broke"))
            else:
                heard.put(block.header)

        self._chain.listeners.append(listener)
        try:
            yield heard
        finally:
            self._chain.listeners.remove(listener)


def _session_tuple(session):
    if session is None:
        return (0, bytes(20), bytes(20), 0, 0, 0, 0, 0, 0, 0, False)
    status = 2 if session.closing else 1
    return (
        status, session.consumer, session.provider, session.auction_nonce, session.energy_wh, session.claimed_wh,
        session.rate, session.deposit, session.deposit, session.settle_at_s, True,
    )  # fmt: skip


def _fits(log_topics, wanted):
    for place, topic in enumerate(wanted):
        if topic is None:
            continue
        if place >= len(log_topics):
            return False
        if log_topics[place] not in (topic if isinstance(topic, list) else [topic]):
            return False
    return True


_SIGNED: dict[
    bytes, Tx
] = {}  # recovering a sender takes a millisecond, and agents send the same bytes again and again


def _signed_tx(raw_tx):
    from eth_account import Account

    from agent.chain.sender import _fields

    if raw_tx not in _SIGNED:
        fields = _fields(raw_tx)
        sender = bytes.fromhex(Account.recover_transaction(raw_tx)[2:])
        _SIGNED[raw_tx] = Tx(
            sender, fields["nonce"], fields["data"], tx_hash_of(raw_tx), fields["maxFeePerGas"],
            fields["maxPriorityFeePerGas"],
        )  # fmt: skip
    return _SIGNED[raw_tx]
