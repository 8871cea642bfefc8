"""The chain in memory: it must behave as a real node does where our own code depends on it."""

from __future__ import annotations

import pytest
from toy_contract import INIT, REVERTING, TOPIC

from agent.demo.evm import Evm, Message, Refusal
from agent.keys import Signer, ephemeral_signer

ALICE = ephemeral_signer(b"alice")
BOB = ephemeral_signer(b"bob")
GWEI = 10**9
START_S = 1_700_000_000


def chain() -> Evm:
    """Alice has a thousand coins, nobody else has any."""
    return Evm(1337, {ALICE.address: 1_000 * 10**18}, START_S)


def signed(nonce: int, *, signer: Signer = ALICE, **changes: object) -> bytes:
    """A coin's worth of Alice's to Bob, unless told otherwise; `to=None` creates."""
    fields = {
        "type": 2,
        "chainId": 1337,
        "nonce": nonce,
        "to": BOB.address,
        "value": 1,
        "data": b"",
        "gas": 21_000,
        "maxFeePerGas": 3 * GWEI,
        "maxPriorityFeePerGas": GWEI,
        "accessList": [],
        **changes,
    }
    return signer.sign_transaction({name: value for name, value in fields.items() if value is not None})


def with_toy(evm: Evm) -> bytes:
    """The toy contract's address after Alice created it."""
    evm.add(signed(evm.nonce(ALICE.address), to=None, value=0, data=INIT, gas=200_000))
    contract = evm.mine(0).transactions[0].contract_address
    assert contract is not None
    return contract


def balance(evm: Evm, address: bytes) -> int:
    """Wei on the head."""
    return evm.vm_at(evm.head).state.get_balance(address)


def test_a_transaction_waits_for_its_block() -> None:
    """Would catch a devnet that hides the pool: pending and mined are two things to an agent that may crash
    between.
    """
    evm = chain()
    tx_hash = evm.add(signed(0))
    assert evm.find(tx_hash) is None
    assert evm.pending(tx_hash) is not None
    assert (evm.nonce(ALICE.address), evm.nonce(ALICE.address, pending=True)) == (0, 1)
    block = evm.mine(START_S + 5)
    assert block.header.timestamp == START_S + 5
    assert evm.find(tx_hash) == (block, block.transactions[0])
    assert evm.pool == ()
    assert balance(evm, BOB.address) == 1


def test_money_is_kept_to_the_wei() -> None:
    """Would catch a devnet on which the demo's money table cannot add up."""
    evm = chain()
    evm.add(signed(0, value=7))
    mined = evm.mine(0).transactions[0]
    spent = 1_000 * 10**18 - balance(evm, ALICE.address)
    assert spent == 7 + mined.gas_used * mined.effective_gas_price_wei


def test_time_moves_forward_only() -> None:
    """Would catch two blocks with one timestamp, which the EVM's rules forbid and tokens would collide on."""
    evm = chain()
    stamps = [evm.mine(at_s).header.timestamp for at_s in (START_S, START_S - 50, START_S + 9, START_S + 9)]
    assert stamps == [START_S + 1, START_S + 2, START_S + 9, START_S + 10]


def test_nonces_wait_for_the_gap_before_them() -> None:
    """Would catch a pool that mines out of order or loses what came early."""
    evm = chain()
    for nonce in (2, 0):
        evm.add(signed(nonce))
    assert len(evm.mine(0).transactions) == 1
    evm.add(signed(1))
    assert [mined.transaction.nonce for mined in evm.mine(0).transactions] == [1, 2]


def test_a_replacement_must_pay_more() -> None:
    """Would catch a pool that takes any second transaction: the agent's bump rule would never be tried."""
    evm = chain()
    evm.add(signed(0))
    for fees in ({"value": 1}, {"maxFeePerGas": 4 * GWEI}, {"maxPriorityFeePerGas": 2 * GWEI}):
        with pytest.raises(Refusal, match=r"replacement transaction underpriced|already known"):
            evm.add(signed(0, **{"value": 2, **fees}))
    better = evm.add(signed(0, value=2, maxFeePerGas=33 * GWEI // 10, maxPriorityFeePerGas=11 * GWEI // 10))
    assert [bytes(tx.hash) for tx in evm.pool] == [better]


def test_what_pays_too_little_waits() -> None:
    """Would catch a transaction below the base fee that is mined, or is lost: it waits until fees fall."""
    evm = chain()
    low = evm.add(signed(0, maxFeePerGas=GWEI // 2, maxPriorityFeePerGas=1))
    assert evm.mine(0).transactions == ()
    while evm.find(low) is None and evm.head.number < 20:
        evm.mine(0)
    assert evm.find(low) is not None


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "not a signed transaction"),
        (b"\x02garbage", "not a signed transaction"),
        (signed(0)[:-1], "not a signed transaction"),
        (signed(0, chainId=1), "invalid chain id"),
        (signed(0, gas=20_999), "intrinsic gas too low"),
        (signed(0, gas=30_000_001), "exceeds block gas limit"),
        (signed(65), "nonce too high"),
        (signed(0, signer=BOB), "insufficient funds"),
        (signed(0, maxPriorityFeePerGas=4 * GWEI), "max priority fee"),
    ],
)
def test_what_a_node_refuses_is_refused_in_its_words(raw: bytes, words: str) -> None:
    """Would catch a refusal in words that our adapter cannot tell apart, or garbage that crashes the node."""
    with pytest.raises(Refusal, match=words):
        chain().add(raw)


def test_logs_know_their_place() -> None:
    """Would catch logs numbered per transaction instead of per block, or found under another topic or
    range.
    """
    evm = chain()
    contract = with_toy(evm)
    for nonce in (1, 2):
        evm.add(signed(nonce, to=contract, value=0, gas=60_000))
    block = evm.mine(0)
    found = list(evm.logs(0, block.number, [contract], [[TOPIC]]))
    assert [(log.block_hash, log.tx_index, log.log_index) for log in found] == [
        (block.block_hash, 0, 0),
        (block.block_hash, 1, 1),
    ]
    assert list(evm.logs(0, block.number - 1, [contract], [])) == []
    assert list(evm.logs(0, block.number, [BOB.address], [])) == []
    assert list(evm.logs(0, block.number, [], [[b"\0" * 32]])) == []
    assert list(evm.logs(0, block.number, [], [None, None])) == []


def test_an_estimate_is_enough_and_not_much_more() -> None:
    """Would catch an estimate with which the transaction fails, or a fantasy."""
    evm = chain()
    creation = Message(sender=ALICE.address, data=INIT)
    gas = evm.estimate_gas(creation, START_S)
    evm.add(signed(0, to=None, value=0, data=INIT, gas=gas))
    mined = evm.mine(0).transactions[0]
    assert mined.succeeded
    assert mined.gas_used <= gas <= mined.gas_used * 11 // 10


def test_reverts_carry_their_data_and_are_mined_as_failures() -> None:
    """Would catch a node without revert data: errors could not be named."""
    evm = chain()
    contract = with_toy(evm)
    with pytest.raises(Refusal) as refusal:
        evm.call(Message(to=contract, data=REVERTING), evm.head)
    assert (refusal.value.code, refusal.value.data) == (3, bytes.fromhex("deadbeef"))
    evm.add(signed(1, to=contract, value=0, data=REVERTING, gas=60_000))
    mined = evm.mine(0).transactions[0]
    assert not mined.succeeded
    assert mined.logs == ()
    assert mined.gas_used > 21_000


def test_dropped_blocks_give_their_transactions_back() -> None:
    """Would catch a reorg that loses transactions, or one whose blocks are the same again."""
    evm = chain()
    contract = with_toy(evm)
    tx_hash = evm.add(signed(1, to=contract, value=0, gas=60_000))
    old = evm.mine(0)
    evm.mine(0)
    assert evm.drop(2)[0] is old
    assert evm.block_by_hash(old.block_hash) is None
    assert list(evm.logs(0, evm.head.number, [], [])) == []
    new = evm.mine(int(old.header.timestamp) + 7)
    assert evm.find(tx_hash) == (new, new.transactions[0])
    assert new.block_hash != old.block_hash
    assert [log.block_hash for log in evm.logs(0, new.number, [], [])] == [new.block_hash]


def test_a_snapshot_is_a_way_back_once() -> None:
    """Would catch a revert that leaves state, pool or index behind."""
    evm = chain()
    point = evm.snapshot()
    before = evm.head
    evm.add(signed(0))
    evm.mine(0)
    evm.add(signed(1))
    assert evm.revert(point)
    assert (evm.head, evm.pool, balance(evm, BOB.address)) == (before, (), 0)
    assert not evm.revert(point)
