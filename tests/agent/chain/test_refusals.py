"""The same trouble has the same name, whatever node says it: the sentences of six clients' sources, as their users see them.

Where they stand: go-ethereum core/error.go, core/txpool/errors.go; reth rpc-eth-types error/mod.rs; nethermind AcceptTxResult.cs
(older releases show the member's name and a detail); erigon txpoolcfg.go; besu RpcErrorType.java; anvil eth/error.rs.
"""

import pytest

from agent.chain.node import SEND_REFUSALS, _send_refusal
from agent.chain.rpc import RpcError

SENTENCES = [
    ("geth", "already known", "already_known"),
    ("geth", "nonce too low: next nonce 82, tx nonce 81", "nonce_too_low"),
    ("geth", "nonce too high", "nonce_too_high"),
    ("geth", "future transaction tries to replace pending", "nonce_too_high"),
    (
        "geth",
        "replacement transaction underpriced: new tx gas fee cap 1 <= 1 queued",
        "replacement_underpriced",
    ),
    ("geth", "transaction underpriced: gas tip cap 0, minimum needed 1", "underpriced"),
    (
        "geth",
        "max fee per gas less than block base fee: address 0x0, maxFeePerGas: 1, baseFee: 7",
        "underpriced",
    ),
    (
        "geth",
        "insufficient funds for gas * price + value: balance 0, tx cost 21000, overshot 21000",
        "unfunded",
    ),
    ("geth", "intrinsic gas too low: gas 1, minimum needed 21000", "gas_limit"),
    ("geth", "exceeds block gas limit", "gas_limit"),
    ("geth", "transaction gas limit too high (cap: 16777216, tx: 30000000)", "gas_limit"),
    ("geth", "tx fee (1.20 ether) exceeds the configured cap (1.00 ether)", "fee_cap_of_node"),
    ("geth", "invalid sender", "wrong_chain"),
    ("geth", "txpool is full", "pool_full"),
    ("geth", "account limit exceeded: pooled 16 txs", "pool_full"),
    ("geth", "in-flight transaction limit reached for delegated accounts", "pool_full"),
    ("reth", "already known", "already_known"),
    ("reth", "nonce too low: next nonce 5, tx nonce 4", "nonce_too_low"),
    ("reth", "replacement transaction underpriced", "replacement_underpriced"),
    ("reth", "transaction underpriced", "underpriced"),
    ("reth", "transaction priority fee below minimum required priority fee 1", "underpriced"),
    ("reth", "insufficient funds for gas * price + value: have 0 want 1", "unfunded"),
    ("reth", "exceeds max transaction gas limit", "gas_limit"),
    ("reth", "tx fee (2 wei) exceeds the configured cap (1 wei)", "fee_cap_of_node"),
    ("reth", "txpool is full", "pool_full"),
    ("nethermind", "AlreadyKnown", "already_known"),
    ("nethermind", "OldNonce, Current nonce: 4, nonce of rejected tx: 3.", "nonce_too_low"),
    ("nethermind", "NonceGap, Future nonce. Expected nonce: 3", "nonce_too_high"),
    ("nethermind", "NonceTooFarInFuture", "nonce_too_high"),
    ("nethermind", "ReplacementNotAllowed, Fee bump is too low", "replacement_underpriced"),
    ("nethermind", "FeeTooLow, MaxFeePerGas too low.", "underpriced"),
    ("nethermind", "FeeTooLowToCompete", "underpriced"),
    ("nethermind", "InsufficientFunds, Account balance: 0, cumulative cost: 1", "unfunded"),
    ("nethermind", "GasLimitExceeded, Gas limit: 1", "gas_limit"),
    ("erigon", "already known", "already_known"),
    ("erigon", "existing txn with same hash", "already_known"),
    ("erigon", "INTERNAL_ERROR: existing tx with same hash", "already_known"),
    ("erigon", "nonce too low", "nonce_too_low"),
    ("erigon", "could not replace existing tx", "replacement_underpriced"),
    ("erigon", "INTERNAL_ERROR: could not replace existing tx", "replacement_underpriced"),
    ("erigon", "replacement transaction underpriced", "replacement_underpriced"),
    ("erigon", "underpriced", "underpriced"),
    ("erigon", "fee too low", "underpriced"),
    ("erigon", "insufficient funds", "unfunded"),
    ("erigon", "IntrinsicGas", "gas_limit"),
    ("erigon", "gas limit is too high", "gas_limit"),
    ("erigon", "pending sub-pool is full", "pool_full"),
    ("erigon", "baseFee sub-pool is full", "pool_full"),
    ("erigon", "spammer", "pool_full"),
    ("besu", "Known transaction", "already_known"),
    ("besu", "Nonce too low", "nonce_too_low"),
    ("besu", "Nonce too high", "nonce_too_high"),
    ("besu", "Transaction nonce is too distant from current sender nonce", "nonce_too_high"),
    ("besu", "An invalid transaction with a lower nonce exists", "nonce_too_high"),
    ("besu", "Replacement transaction underpriced", "replacement_underpriced"),
    ("besu", "Gas price below configured minimum gas price", "underpriced"),
    ("besu", "Gas price below current base fee", "underpriced"),
    ("besu", "Upfront cost exceeds account balance", "unfunded"),
    ("besu", "Intrinsic gas exceeds gas limit", "gas_limit"),
    ("besu", "Transaction gas limit exceeds block gas limit", "gas_limit"),
    ("besu", "Transaction fee cap exceeded", "fee_cap_of_node"),
    ("besu", "Wrong chainId", "wrong_chain"),
    ("anvil", "transaction already imported", "already_known"),
    ("anvil", "nonce too low", "nonce_too_low"),
    ("anvil", "Nonce too high", "nonce_too_high"),
    ("anvil", "replacement transaction underpriced", "replacement_underpriced"),
    ("anvil", "Tx: [0x00] insufficient gas price to replace existing transaction", "replacement_underpriced"),
    ("anvil", "max fee per gas less than block base fee", "underpriced"),
    ("anvil", "Insufficient funds for gas * price + value", "unfunded"),
    ("anvil", "Transaction gas limit is greater than the block gas limit, gas_limit: 1, cap: 1", "gas_limit"),
    ("anvil", "invalid chain id for signer", "wrong_chain"),
    ("anvil", "Incompatible EIP-155 transaction, signed for another chain", "wrong_chain"),
]


@pytest.mark.parametrize(("client", "sentence", "name"), SENTENCES)
def test_the_same_trouble_has_the_same_name(client, sentence, name):
    """Would catch a settlement that waits, or is signed anew, because one client words a pool's no differently."""
    assert _send_refusal(RpcError(-32000, sentence)) == name


@pytest.mark.parametrize("client", ["geth", "reth", "nethermind", "erigon", "besu", "anvil"])
def test_every_client_can_say_the_four_that_decide(client):
    """Would catch a table that forgets a client's words for what the sender decides by."""
    said = {name for who, _, name in SENTENCES if who == client}
    assert {"already_known", "nonce_too_low", "replacement_underpriced", "unfunded"} <= said
    assert said <= SEND_REFUSALS.keys()


def test_what_nobody_has_heard_of_is_no_known_trouble():
    """Would catch a word so short that every sentence has it."""
    for sentence in (
        "internal error",
        "oversized data",
        "transaction type not supported",
        "method not found",
    ):
        assert _send_refusal(RpcError(-32000, sentence)) == "send_rejected"
