"""Every trouble of a settlement on a chain in memory: the same stories as tests/e2e/test_settlement.py tells on anvil."""

from pathlib import Path

import pytest
from fake_pool import FakeNet, FakeNode
from troubles import DELIVERED_WH, ORDERED_WH, TROUBLES, Stand

from agent.chain import contract
from agent.chain.sender import Sender
from agent.core import settling
from agent.core.live import HeaderSeen


class FakeStand(Stand):
    """On `fake_pool`: blocks cost microseconds."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.net = FakeNet()
        self.node, self.domain = FakeNode(self.net), self.net.domain
        self.provider, self.grace_s = self.net.provider.address, self.net.market.grace_s

    def sender(self, node):
        """The operator's hands."""
        return Sender(node, self.net.operator, self.domain.chain_id, revert_name=contract.revert_name)

    async def open(self):
        """A session that owes its settlement."""
        opened = self.net.connected(ORDERED_WH)
        await self.delivered(opened, self.net.ack(opened.session_id, DELIVERED_WH))
        return self

    async def mine(self, after_s):
        """A block, so much later."""
        self.net.mine(after_s=after_s)

    async def mine_now(self):
        """A block that takes everything."""
        self.net.miner_takes = lambda tx: True  # noqa: ARG005
        self.net.mine()

    async def wait_unmined(self, blocks, after_s=12):
        """Blocks that leave ours out."""
        self.net.miner_takes = lambda tx: tx.sender != self.net.operator.address
        await self.turn(blocks, after_s)
        self.net.miner_takes = lambda tx: True  # noqa: ARG005

    async def settled_by_us(self):
        """How many settlements of ours were mined and succeeded."""
        return sum(succeeded for succeeded, _ in self.net.settlements(self.opened.token))

    async def lose_pool(self):
        """Nobody remembers what waited."""
        self.net.pool.clear()

    async def stranger_takes_nonce(self, tip_wei):
        """The hot key was used elsewhere, and that is mined."""
        nonce = self.session.settlement.nonce
        self.net.put(self.net.operator.address, b"", nonce=nonce, to=bytes(20))
        self.net.mine()

    async def stranger_waits_at_nonce(self, max_fee_wei, tip_wei):
        """The hot key was used elsewhere, and that waits for a block."""
        nonce, sender = self.session.settlement.nonce, self.net.operator.address
        self.net.put(sender, b"", nonce=nonce, to=bytes(20), max_fee=max_fee_wei)

    async def base_fee(self, wei):
        """From the next block on."""
        self.net.base_fee_wei = wei

    def absurd_base_fee_wei(self, permille):
        """At which a settlement costs this part of its stake."""
        gas = 55_000 + 55_000 // 4
        return settling.stake_wei(self.session) * permille // 1000 // gas - self.net.tip_wei

    async def revoke_operator(self):
        """The owner takes the hot key's rights."""
        self.net.is_delegate = False

    async def name_operator(self):
        """And gives them back."""
        self.net.is_delegate = True

    async def consumer_ends(self, energy_wh):
        """The consumer concedes so much."""
        no_ack = self.net.ack(bytes(32), 0)
        self.net.put(
            self.net.consumer.address, contract.encode_end_connection(self.opened.token, energy_wh, no_ack)
        )
        self.net.mine()

    async def challenge_passes_and_a_stranger_settles(self):
        """Nobody answered in time."""
        self.net.mine(after_s=self.net.market.challenge_s + 1)
        self.net.put(bytes.fromhex("5a" * 20), contract.encode_settle(self.opened.token))
        self.net.mine()

    async def set_coins(self, wei):
        """What the operator has for gas."""
        self.net.state.coins[self.net.operator.address] = wei


@pytest.fixture
async def stand(tmp_path):
    """An agent that owes one settlement."""
    stand = await FakeStand(tmp_path).open()
    yield stand
    stand.close()


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
async def test_a_settlement_is_paid_once_whatever_happens(stand, trouble):
    """Would catch what the trouble's own docstring says."""
    await trouble(stand)
    mined = stand.net.settlements(stand.opened.token)
    assert sum(succeeded for succeeded, _ in mined) <= 1
    assert len({tx.nonce for _, tx in mined}) == len(mined)


async def test_a_backend_that_lags_makes_no_thief(stand):
    """Would catch a third signature, mined in vain: one backend says "nonce too low", another has not seen our block yet."""
    await stand.is_sent()
    stand.between.swallows = True  # the replacement does not get through
    await stand.wait_unmined(7)
    assert len(stand.signatures()) == 2
    stand.between.swallows = False
    await stand.mine_now()
    head = await stand.node.head()
    stand.engine.observe(HeaderSeen(head.number, head.block_hash, head.timestamp_s))  # and its logs not yet
    stand.node._lag = lambda: 1
    await stand.act()
    stand.node._lag = lambda: 0
    await stand.is_paid_once(signatures=2)
    assert [succeeded for succeeded, _ in stand.net.settlements(stand.opened.token)] == [True]
