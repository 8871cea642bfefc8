"""The consumer's hands on the chain: one transaction per wish, whatever happens around it; and answers computed anew."""

import asyncio

import pytest
from bazaar import RATE
from fair import BID, ORDER, Fair

from agent.chain import contract
from agent.chain.node import Web3Node
from agent.chain.sender import SignedTx
from agent.consumer.market import Market
from agent.core import token as rules
from agent.core.units import cost_wei_ceil
from agent.errors import Transient


@pytest.fixture
async def fair(tmp_path):
    """A market with one provider and one consumer."""
    async with Fair(tmp_path) as fair:
        yield fair


class Forgetful:
    """A node that is away for the first few questions."""

    def __init__(self, node, times):
        self._node, self.times = node, times

    def __getattr__(self, name):
        async def asked(*args, **kwargs):
            if self.times:
                self.times -= 1
                raise Transient("node away")
            return await getattr(self._node, name)(*args, **kwargs)

        return asked


def market_of(fair, node):
    """Carol's market behind another node."""
    return Market(node, fair.sender(fair.consumer.signer), fair.domain, fair.consumer_journal)


async def connected(fair):
    """A session of carol's: the terms her journal knows."""
    fair.buys()
    await fair.offers()
    await fair.until(lambda: fair.consumer_journal.open_errand.terms is not None)
    await fair.crash()
    return fair.prepared().market


async def test_the_terms_are_what_the_contract_holds_and_what_we_compute(fair):
    """Would catch a token or session id taken from a log's word, or another auction's session taken for ours."""
    market = await connected(fair)
    order = fair.consumer_journal.open_errand.order
    terms = await market.find_terms(order)
    state = await fair.session(terms.token)
    assert state.is_open
    assert (terms.rate_wei_per_kwh, terms.energy_wh_ordered) == (BID, ORDER.energy_wh)
    assert (terms.deposit_wei, terms.bond_wei) == (state.deposit_wei, state.bond_wei)
    assert terms.token == rules.access_token(
        terms.consumer, terms.provider, terms.issued_at_s, terms.valid_until_s
    )
    later = order.__class__(**{name: getattr(order, name) for name in order.__slots__} | {"auction_nonce": 2})
    assert await market.find_terms(later) is None


async def test_a_node_that_makes_up_a_session_is_not_believed(fair):
    """Would catch a consumer that pays attention to a log whose token does not follow from its block."""
    market = await connected(fair)
    order = fair.consumer_journal.open_errand.order

    class Lying(Web3Node):
        async def header(self, block):
            true = await super().header(block)
            return true.__class__(true.number, true.block_hash, true.parent_hash, true.timestamp_s + 1)

    async with Lying(fair.net.url_http) as node:
        assert await market_of(fair, node).find_terms(order) is None
    assert await market.find_terms(order) is not None


async def test_the_signers_are_the_provider_and_its_operator_of_now(fair):
    """Would catch a revoked operator that is believed on."""
    market = fair.prepared().market
    assert await market.signers(fair.evp) == {fair.evp, fair.provider.operator.address}
    await fair.send(fair.provider.owner.signer, contract.encode_set_operator(bytes(20), 0))
    assert await market.signers(fair.evp) == {fair.evp}


async def test_a_node_that_stumbles_is_asked_again_and_a_dead_one_is_said(fair):
    """Would catch a purchase that ends because a node restarted, and one that waits for a dead node in silence."""
    fair.prepared()
    assert await market_of(fair, Forgetful(fair.node, 2)).now_s() == fair.now_s
    with pytest.raises(Transient):
        await market_of(fair, Forgetful(fair.node, 99)).now_s()


async def test_a_transaction_is_on_disk_before_the_node_has_it(fair):
    """Would catch a transaction that only the node remembers: after a crash there would be a second one."""
    market = fair.prepared().market
    signed = []
    fair.told.clear()
    broadcast = market._sender.broadcast

    async def watched(raw_tx):
        signed.append(fair.consumer_journal.open_errand.pending("start_auction").raw_tx == raw_tx)
        return await broadcast(raw_tx)

    market._sender.broadcast = watched
    await fair.journey.start_auction(ORDER)
    assert signed == [True]


async def test_a_journaled_transaction_whose_nonce_was_used_is_given_up_for_a_new_one(fair):
    """Would catch a purchase that hangs for ever on a transaction that can never be mined."""
    journey = fair.prepared()
    market = journey.market
    send = market._sender.broadcast

    async def power_goes(_raw_tx):
        raise KeyboardInterrupt

    market._sender.broadcast = power_goes
    with pytest.raises(KeyboardInterrupt):
        await journey.start_auction(ORDER)
    stuck = fair.consumer_journal.open_errand.pending("start_auction")
    assert stuck is not None
    await fair.send(fair.consumer.signer, contract.encode_deposit(), 5)  # the wallet does something else
    market._sender.broadcast = send
    with pytest.raises(asyncio.TimeoutError):
        async with asyncio.timeout(1):
            await journey.connect()
    errand = fair.consumer_journal.open_errand
    outcome = {mined.tx_hash: mined.succeeded for mined in errand.mined}
    assert outcome[stuck.tx_hash] is False
    assert (await fair.auction()).is_live
    assert (await fair.auction()).auction_nonce == 1


async def test_a_transaction_under_way_is_waited_for_and_not_sent_beside(fair):
    """Would catch a restart that pays for a second, failing auction while the first one waits for its block."""
    fair.net.methods.automine = False
    fair.buys()
    await fair.until(lambda: fair.consumer_journal.errand is not None and fair.consumer_journal.errand.signed)
    await fair.until(_waiting_for(fair, 1))
    await fair.crash()
    fair.buys()
    await fair.until(lambda: fair.buying is not None and fair.journey.journal.open_errand is not None)
    await asyncio.sleep(0.3)  # time enough to do it wrong
    fair.net.methods.automine = True
    fair.net.mine()
    await fair.until(fair._is_live)
    assert await fair.node.nonce(fair.consumer.address, pending=True) == 1


def _waiting_for(fair, count):
    async def holds():
        return await fair.node.nonce(fair.consumer.address, pending=True) == count

    return holds


async def test_the_same_transaction_twice_is_one_transaction(fair):
    """Would catch a repeat that is not the same bytes."""
    journey = fair.prepared()
    await journey.start_auction(ORDER)
    known = fair.consumer_journal.open_errand.signed[-1]
    await journey.market.repeat("start_auction")
    assert SignedTx.from_raw(known.raw_tx).tx_hash == known.tx_hash
    assert (await fair.auction()).auction_nonce == 1


async def test_the_refund_is_seen_in_the_block_of_the_settlement(fair):
    """Would catch a check of the refund that counts other money, or none."""
    market = await connected(fair)
    terms = fair.consumer_journal.open_errand.terms
    await fair.send(fair.consumer.signer, contract.encode_deposit(), 12_345)
    await fair.send(
        fair.provider.operator.signer, contract.encode_end_connection(terms.token, 0, rules.NO_ACK)
    )
    settlement = await market.settlement(terms)
    assert (settlement.energy_wh_settled, settlement.cost_wei) == (0, 0)
    assert await market.refunded_wei(settlement) == terms.deposit_wei
    assert not await market.is_open(terms.token)


async def test_the_end_of_an_auction_is_believed_from_its_logs(fair):
    """Would catch a purchase given up because of another auction's end."""
    journey = fair.prepared()
    placed = await journey.start_auction(ORDER)
    assert not await journey.market.is_auction_gone(placed)
    await journey.cancel()
    assert await journey.market.is_auction_gone(placed)
    again = await journey.start_auction(ORDER)
    assert not await journey.market.is_auction_gone(again)


def test_the_deposit_is_what_the_contract_locks():
    """Would catch a wei too little sent along: the contract would refuse the auction."""
    assert ORDER.deposit_wei == cost_wei_ceil(RATE, ORDER.energy_wh)
