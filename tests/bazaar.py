"""A market on the embedded chain with one finished auction after another, for stories about runners that follow the chain.

    async with Bazaar(tmp_path) as bazaar:
        opened = await bazaar.connects(energy_wh=200)
        await bazaar.net.reorg(2)

Every transaction makes a block, time jumps where an auction must close. Real contract, real node adapter, real keys.
"""

from pathlib import Path
from typing import Self

from agent.chain import contract
from agent.chain.node import Receipt, Web3Node
from agent.chain.sender import Sender
from agent.core import token as rules
from agent.core.events import Event
from agent.core.live import Policy
from agent.core.token import Ack, Domain
from agent.core.units import Address, cost_wei_ceil
from agent.demo import market as setup
from agent.demo.devnet import Devnet
from agent.engine import Engine
from agent.journal import Journal
from agent.keys import Signer

RATE = 10**15
BIDDING_S = 5


class Bazaar:
    """One provider (alice), one consumer (carol), as many sessions as a story needs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.net = Devnet(accounts=setup.labels(("alice",), "carol"))
        self.now_ms = 1_000_000
        self._journal: Journal | None = None

    async def __aenter__(self) -> Self:
        await self.net.__aenter__()
        self.node = Web3Node(self.net.url_ws)
        organisation = setup.party(self.net, self.folder, "organisation")
        self.consumer = setup.party(self.net, self.folder, "carol")
        self.provider = setup.provider(self.net, self.folder, "alice")
        market = await setup.opened(
            self.node, self.net.chain_id, organisation, (self.provider,), self.consumer
        )
        self.address, self.start_block = market.address, market.block_number
        self.domain = Domain(self.net.chain_id, self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close_journal()
        await self.node.close()
        await self.net.__aexit__(None, None, None)

    @property
    def evp(self) -> Address:
        """The provider's account."""
        return self.provider.owner.address

    def engine(self, name: str = "journal") -> Engine:
        """An agent's engine with a journal of its own; the same name again is a restart."""
        self.close_journal()
        self._journal = Journal(self.folder / name / "journal.sqlite", self.domain, self.evp)
        return Engine(self._journal, Policy(max_unacked_wh={"left": 50}), lambda: self.now_ms)

    def rows(self) -> list[Event]:
        """What the newest engine has written so far."""
        assert self._journal is not None
        return list(self._journal.events())

    def close_journal(self) -> None:
        """The agent stops."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    def sender(self, signer: Signer) -> Sender:
        """Somebody's hands on the chain."""
        return Sender(self.node, signer, self.net.chain_id, revert_name=contract.revert_name)

    async def send(self, signer: Signer, data: bytes, value_wei: int = 0) -> Receipt:
        """A transaction to the market, mined."""
        return await self.sender(signer).send_and_wait(self.address, data, value_wei)

    async def connects(self, energy_wh: int = 200) -> contract.SessionOpened:
        """Auction, one bid, closing, connect."""
        carol, alice = self.consumer.signer, self.provider.owner.signer
        lock_wei = cost_wei_ceil(RATE, energy_wh)
        await self.send(
            carol, contract.encode_start_auction(energy_wh, BIDDING_S, RATE, 3600, bytes(32)), lock_wei
        )
        state = contract.decode_auctions(
            await self.node.call(self.address, contract.encode_auctions(carol.address))
        )
        await self.send(alice, contract.encode_place_bid(carol.address, state.auction_nonce, RATE), lock_wei)
        late_s = state.closing_time_s - self.net.methods.now_s
        self.net.methods.increase_time(hex(max(0, late_s) + 1))
        receipt = await self.send(carol, contract.encode_connect(self.evp, energy_wh))
        logs = (contract.decode_log(log.address, log.topics, log.data) for log in receipt.logs)
        return next(log for log in logs if isinstance(log, contract.SessionOpened))

    def ack(self, session_id: bytes, energy_wh: int) -> Ack:
        """Carol's own signature for this much."""
        signature = self.consumer.signer.sign_digest(
            rules.digest(self.domain, rules.Receipt(rules.SessionId(session_id), energy_wh))
        )
        return Ack(rules.Token(bytes(32)), rules.ZERO_ADDRESS, 0, 0, bytes(32), b"", signature)
