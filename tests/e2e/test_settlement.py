"""The troubles of a settlement once more, on anvil: the real contract, the real pool, the real words. One anvil for all.

Blocks come when a story says so. The stories themselves are in tests/troubles.py; tests/agent/runners tells them in memory.
"""

import asyncio
import random
from pathlib import Path

import pytest
from stage import ANVIL, Anvil, Program, free_port, note
from troubles import DELIVERED_WH, ORDERED_WH, TROUBLES, Stand

from agent.chain import contract
from agent.chain.node import Web3Node
from agent.chain.sender import Sender
from agent.core import events as ev
from agent.core import settling
from agent.core import token as rules
from agent.core.session import CLOSED, Stage
from agent.core.token import NO_ACK, Domain
from agent.core.units import hex0x
from agent.demo import market as setup
from agent.demo.devnet import address_from_key, derive_key

pytestmark = [
    pytest.mark.skipif(ANVIL is None, reason="anvil is not installed: ./run test contracts"),
    pytest.mark.timeout(600),
]
RATE = 10**16
GAS_NEEDED = 52_000  # about; `absurd_base_fee_wei` leaves room around it
BIDDING_S, VALIDITY_S = 60, 900
RULES = contract.MarketParameters(bidding_s_min=1, soft_close_s=1)
CRASHES_IN_CI, CRASHES_LONG = 4, 50


class QuietAnvil(Anvil):
    """Anvil that mines when it is told to."""

    def __init__(self, folder, seed, labels):
        self.seed = seed
        self.accounts = {label: address_from_key(derive_key(seed, label)) for label in labels}
        self.port = free_port()
        self.url_ws, self.url_http = f"ws://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.port}"
        options = ("--port", self.port, "--chain-id", self.chain_id, "--no-mining", "--accounts", 1)
        Program.__init__(self, [ANVIL, *options], folder, "anvil")


class Ground:
    """Anvil with a market, for one story after the other."""

    def __init__(self, folder):
        self.folder = folder
        self.net = QuietAnvil(folder, "settlement", setup.labels(("alice",), "carol"))

    def __enter__(self):
        self.net.__enter__()
        asyncio.run(self._open())
        return self

    def __exit__(self, *_):
        self.net.__exit__()

    async def _open(self):
        net, folder = self.net, self.folder
        folder.chmod(0o700)
        self.organisation, self.consumer = (
            setup.party(net, folder, one) for one in ("organisation", "carol")
        )
        self.provider = setup.provider(net, folder, "alice")
        async with Web3Node(net.url_http) as node:
            deploying = await self.sent(node, self.organisation, None, contract.encode_deploy(RULES))
            self.address = deploying.contract
            for account in (self.consumer.address, self.provider.owner.address):
                await self.sent(
                    node, self.organisation, self.address, contract.encode_add_ev(account, bytes(32))
                )
            await self.named(node, self.provider.operator.address)
        self.domain = Domain(net.chain_id, self.address)

    async def named(self, node, operator):
        """The owner names its hot key."""
        await self.sent(
            node, self.provider.owner, self.address, contract.encode_set_operator(operator, 10**18)
        )

    async def sent(self, node, party, to, data, value_wei=0):
        """A transaction in a block of its own; what else waits may be mined with it."""
        sender = Sender(node, party.signer, self.net.chain_id, revert_name=contract.revert_name)
        signed = await sender.prepare(to, data, value_wei)
        await sender.broadcast(signed.raw_tx)
        self.net.ask("evm_mine")
        receipt = await node.receipt(signed.tx_hash)
        assert receipt is not None, "anvil left it out"
        assert receipt.succeeded, await sender.why_failed(signed, receipt)
        return receipt

    async def connected(self, node):
        """An auction, its one bid, its winner's session."""
        lock_wei = RATE * ORDERED_WH // 1000
        start = contract.encode_start_auction(ORDERED_WH, BIDDING_S, RATE, VALIDITY_S, bytes(32))
        await self.sent(node, self.consumer, self.address, start, lock_wei)
        carol = self.consumer.address
        state = contract.decode_auctions(await node.call(self.address, contract.encode_auctions(carol)))
        bid = contract.encode_place_bid(carol, state.auction_nonce, RATE)
        await self.sent(node, self.provider.owner, self.address, bid, lock_wei)
        self.net.ask("evm_increaseTime", hex(BIDDING_S + 1))
        receipt = await self.sent(
            node,
            self.consumer,
            self.address,
            contract.encode_connect(self.provider.owner.address, ORDERED_WH),
        )
        logs = (contract.decode_log(log.address, log.topics, log.data) for log in receipt.logs)
        return next(log for log in logs if isinstance(log, contract.SessionOpened))


class AnvilStand(Stand):
    """One story on that ground."""

    def __init__(self, folder, ground, node):
        super().__init__(folder)
        self.ground, self.net, self.node, self.domain = ground, ground.net, node, ground.domain
        self.provider, self.grace_s = ground.provider.owner.address, RULES.grace_s
        self.operator = ground.provider.operator
        self.base_wei, self.first_block = None, 0

    def sender(self, node):
        """The operator's hands."""
        return Sender(node, self.operator.signer, self.domain.chain_id, revert_name=contract.revert_name)

    async def open(self):
        """A session that owes its settlement."""
        await self.set_coins(10**20)
        await self.base_fee(10**9)
        self.first_block = (await self.node.head()).number
        opened = await self.ground.connected(self.node)
        receipt = rules.Receipt(rules.SessionId(opened.session_id), DELIVERED_WH)
        signature = self.ground.consumer.signer.sign_digest(rules.digest(self.domain, receipt))
        ack = rules.Ack(rules.Token(bytes(32)), rules.ZERO_ADDRESS, 0, 0, bytes(32), b"", signature)
        await self.delivered(opened, ack)
        return self

    async def mine(self, after_s=12):
        """A block, so much later."""
        self.net.ask("anvil_setNextBlockBaseFeePerGas", hex(self.base_wei))
        self.net.ask("evm_increaseTime", hex(after_s))
        self.net.ask("evm_mine")

    async def mine_now(self):
        """A block that takes what was left out."""
        for raw_tx in self.left_out:
            await self.node.send_raw(raw_tx)
        await self.mine()

    async def wait_unmined(self, blocks, after_s=12):
        """Blocks that leave ours out: it is taken from the pool before each."""
        self.left_out = [] if self.session.settlement is None else [self.session.settlement.raw_tx]
        for _ in range(blocks):
            await self.lose_pool()
            await self.turn(after_s=after_s)

    async def settled_by_us(self):
        """How many settlements of ours were mined and succeeded."""
        logs = await self.node.logs(
            self.domain.contract,
            contract.provider_topics(self.provider),
            self.first_block,
            (await self.node.head()).number,
        )
        found = [(contract.decode_log(raw.address, raw.topics, raw.data), raw.tx_hash) for raw in logs]
        ended = [
            tx
            for log, tx in found
            if isinstance(log, contract.ConnectionEnded) and log.token == self.opened.token
        ]
        signed = {event.tx_hash for event in self.signatures()}
        return sum(tx_hash in signed for tx_hash in ended)

    async def lose_pool(self):
        """Nobody remembers what waited."""
        self.net.ask("anvil_dropAllTransactions")

    async def _stranger(self, max_fee_wei, tip_wei):
        raw_tx = self.operator.signer.sign_transaction(
            {
                "nonce": self.session.settlement.nonce, "value": 0, "data": b"", "gas": 21_000, "to": bytes(19) + b"\x99",
                "type": 2, "chainId": self.net.chain_id, "accessList": [], "maxFeePerGas": max_fee_wei,
                "maxPriorityFeePerGas": tip_wei,
            }
        )  # fmt: skip
        await self.node.send_raw(raw_tx)

    async def stranger_takes_nonce(self, tip_wei):
        """The hot key was used elsewhere, and that is mined."""
        await self._stranger(10**11, tip_wei)
        await self.mine()

    async def stranger_waits_at_nonce(self, max_fee_wei, tip_wei):
        """The hot key was used elsewhere, and that waits for a block."""
        await self._stranger(max_fee_wei, tip_wei)

    async def base_fee(self, wei):
        """From a block that comes now on."""
        self.base_wei = wei
        self.net.ask("anvil_setNextBlockBaseFeePerGas", hex(wei))
        self.net.ask("evm_mine")

    def absurd_base_fee_wei(self, permille):
        """At which a settlement costs about this part of its stake."""
        return settling.stake_wei(self.session) * permille // 1000 // (GAS_NEEDED + GAS_NEEDED // 4)

    async def revoke_operator(self):
        """The owner takes the hot key's rights, in a block of its own; what waited goes on waiting."""
        waiting = self.session.settlement
        await self.lose_pool()
        await self._by_owner(contract.ZERO_ADDRESS)
        if waiting is not None:
            await self.node.send_raw(waiting.raw_tx)

    async def name_operator(self):
        """And gives them back."""
        await self._by_owner(self.operator.address)

    async def _by_owner(self, operator):
        owner = Sender(self.node, self.ground.provider.owner.signer, self.net.chain_id)
        signed = await owner.prepare(self.domain.contract, contract.encode_set_operator(operator, 10**18))
        await owner.broadcast(signed.raw_tx)
        await self.mine()
        assert (await self.node.receipt(signed.tx_hash)).succeeded

    async def consumer_ends(self, energy_wh):
        """The consumer concedes so much."""
        data = contract.encode_end_connection(self.opened.token, energy_wh, NO_ACK)
        await self.ground.sent(self.node, self.ground.consumer, self.domain.contract, data)

    async def challenge_passes_and_a_stranger_settles(self):
        """Nobody answered in time."""
        self.net.ask("evm_increaseTime", hex(RULES.challenge_s + 1))
        self.net.ask("evm_mine")
        stranger = self.ground.organisation
        await self.ground.sent(
            self.node, stranger, self.domain.contract, contract.encode_settle(self.opened.token)
        )

    async def set_coins(self, wei):
        """What the operator has for gas."""
        self.net.ask("anvil_setBalance", hex0x(self.operator.address), hex(wei))


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    """One anvil, one market."""
    with Ground(tmp_path_factory.mktemp("ground")) as ground:
        yield ground


@pytest.fixture
async def stand(ground, tmp_path: Path):
    """An agent that owes one settlement, on anvil."""
    as_it_was = ground.net.ask("evm_snapshot")
    async with Web3Node(ground.net.url_http) as node:
        stand = await AnvilStand(tmp_path, ground, node).open()
        yield stand
        stand.close()
    ground.net.ask("anvil_dropAllTransactions")
    ground.net.ask("evm_revert", as_it_was)


@pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
async def test_a_settlement_is_paid_once_on_anvil_too(stand, trouble):
    """Would catch a pool in memory that is kinder than a real one."""
    await trouble(stand)


async def test_crashes_between_signing_and_the_block_pay_once(ground, tmp_path, request):
    """Would catch a second payment, or none, when the agent dies anywhere between the end intent and the final block."""
    runs = CRASHES_LONG if request.config.getoption("--long") else CRASHES_IN_CI
    crashes = 0
    async with Web3Node(ground.net.url_http) as node:
        for seed in range(runs):
            rng = random.Random(seed)
            folder = tmp_path / str(seed)
            folder.mkdir()
            stand = await AnvilStand(folder, ground, node).open()
            for _ in range(40):
                if stand.session.stage in CLOSED:
                    break
                if rng.random() < 0.6:
                    crashes += 1
                    await _dies_somewhere(stand, rng)
                await stand.turn()
            assert stand.session.stage is Stage.SETTLED, f"seed {seed}"
            assert await stand.settled_by_us() == 1, f"seed {seed}"
            signed = [event for event in stand.signatures() if isinstance(event, ev.SettlementSigned)]
            assert len({event.nonce for event in signed}) == 1, f"seed {seed}"
            stand.close()
    note(f"{runs} settlements on anvil with {crashes} crashes (seeds 0 to {runs - 1}): each paid once")


async def _dies_somewhere(stand, rng):
    """A step of the sender, of which only some reached the world; then a new life from the file."""
    stand.between.swallows = rng.random() < 0.3
    for _ in range(rng.randint(0, 2)):
        await stand.act()
    if rng.random() < 0.3:
        await stand.lose_pool()
    stand.restart()
