"""Every trouble a settlement can meet, each told once, on whatever chain a `Stand` stands: in memory, or anvil.

    @pytest.mark.parametrize("trouble", TROUBLES, ids=lambda trouble: trouble.__name__)
    async def test_...(trouble): await trouble(stand)

A stand has a chain whose blocks come when the story says so, and the real engine, watcher and sender of an agent with one
session that is delivered and owes its settlement. After each story: exactly one settlement of ours was mined, or none where
the consumer's own end left nothing to do; never a second signature where one sufficed.
"""

import inspect
import sys
from pathlib import Path

from story import sold

from agent.chain.node import Node
from agent.core import events as ev
from agent.core import settling
from agent.core.live import Beat, Policy
from agent.core.session import Stage
from agent.core.settling import Haste
from agent.engine import Engine
from agent.errors import Refused, Transient
from agent.journal import Journal
from agent.runners.chain_send import ChainSend
from agent.runners.chain_watch import ChainWatch, WatchSettings

GWEI = 10**9
ORDERED_WH, DELIVERED_WH = 200, 120
BLOCK_S = 12
TURNS_MAX = 40  # a settlement that needs more blocks than this in a story is stuck


class Between:
    """A node whose answers a story can spoil; everything else is the real one's."""

    def __init__(self, node: Node):
        self._node = node
        self.swallows = False  # takes every transaction, sends none
        self.refuses = None  # an error instead of taking it
        self.estimate = None  # gas, instead of what is needed

    def __getattr__(self, name):
        return getattr(self._node, name)

    async def send_raw(self, raw_tx):
        """Taken, refused, or taken and forgotten."""
        from agent.chain.node import tx_hash_of

        if self.refuses is not None:
            raise self.refuses
        return tx_hash_of(raw_tx) if self.swallows else await self._node.send_raw(raw_tx)

    async def estimate_gas(self, *question):
        """What it takes, or what the story says it takes."""
        found = await self._node.estimate_gas(*question)
        return found if self.estimate is None else self.estimate


class Stand:
    """An agent that owes one settlement. A chain's stand sets `node`, `domain`, `provider`, `contract`, `grace_s`."""

    def __init__(self, folder: Path):
        self.folder, self.now_ms, self.lives = folder, 1_000_000, 0
        self._journal = None

    def restart(self):
        """A new life: the book from the file only."""
        self.close()
        self._journal = Journal(self.folder / "journal.sqlite", self.domain, self.provider)
        policy = Policy(max_unacked_wh={"left": 50}, grace_s=self.grace_s)
        self.engine = Engine(self._journal, policy, lambda: self.now_ms)
        self.between = Between(self.node)
        self.sends = ChainSend(self.engine, self.between, self.sender(self.between), self.domain.contract)
        settings = WatchSettings(0, 1, 2)
        self.watch = ChainWatch(
            self.engine, self.node, self.domain, self.provider, settings, lambda: self.now_ms / 1000
        )

    def close(self):
        """The agent stops."""
        if self._journal is not None:
            self._journal.close()
            self._journal = None

    async def delivered(self, opened, ack):
        """The session `opened` is on chain: believe it, deliver, and owe its settlement."""
        self.opened = opened
        self.restart()
        await self.watch.look()
        for event in sold(opened, self.engine.at_s, self.engine.live.life, DELIVERED_WH, ack):
            self.engine.accept(event)
        assert self.session.stage is Stage.SETTLING

    # ---- what a story looks at

    @property
    def session(self):
        """As the book has it."""
        return self.engine.book.sessions[self.opened.session_id]

    @property
    def tried(self):
        """How the newest attempt went, as (state, reason)."""
        tried = self.engine.live.tried.get(self.opened.session_id)
        return None if tried is None else (tried.state, tried.reason)

    def signatures(self):
        """Every signed settlement in the journal."""
        return [event for event in self._journal.events() if isinstance(event, ev.SettlementSigned)]

    # ---- what a story does

    async def act(self):
        """The sender's turn, at this head. A node that is away is the runner's to wait for."""
        try:
            return await self.sends.do_owed()
        except Transient:
            return True

    async def turn(self, count=1, after_s=BLOCK_S):
        """A block, the watcher's look at it, and the sender's turn."""
        for _ in range(count):
            await self.mine(after_s)
            self.now_ms += after_s * 1000
            self.engine.observe(Beat())
            await self.watch.look()
            await self.act()

    async def is_sent(self):
        """Signed, journaled, and in the pool."""
        await self.act()
        await self.act()
        assert self.session.settlement is not None

    async def until_closed(self, turns=TURNS_MAX):
        """Blocks, until the book knows how it ended; its stage."""
        for _ in range(turns):
            if self.session.stage in (Stage.SETTLED, Stage.STRANDED):
                break
            await self.turn()
        return self.session.stage

    async def is_paid_once(self, signatures):
        """It ends paid, by exactly one settlement of ours, after so many signatures."""
        assert await self.until_closed() is Stage.SETTLED, (self.session, self.tried)
        assert await self.settled_by_us() == 1
        assert self.session.ended.energy_wh_settled == DELIVERED_WH
        assert len(self.signatures()) == signatures


# ---- the troubles


async def the_pool_loses_it(stand):
    """Would catch a settlement that was said once, and never again."""
    await stand.is_sent()
    await stand.lose_pool()
    await stand.turn()
    await stand.is_paid_once(signatures=1)


async def the_node_takes_it_and_forgets_it(stand):
    """Would catch trust in a transaction hash: it only says that somebody heard us."""
    stand.between.swallows = True
    await stand.is_sent()
    await stand.turn(2)
    stand.between.swallows = False
    await stand.is_paid_once(signatures=1)


async def the_agent_dies_between_signing_and_sending(stand):
    """Would catch a second signature in the next life: the bytes on the disk are the settlement."""
    await stand.act()
    stand.restart()
    await stand.is_paid_once(signatures=1)


async def the_pool_knows_it_already(stand):
    """Would catch a new life that takes "already known" for a refusal."""
    await stand.is_sent()
    stand.restart()
    await stand.watch.look()
    await stand.act()
    assert stand.tried == ("sent", "")
    await stand.is_paid_once(signatures=1)


async def somebody_else_used_its_nonce(stand):
    """Would catch a settlement that waits for ever behind a nonce which the owner's own transaction took."""
    await stand.act()
    await stand.stranger_takes_nonce(tip_wei=GWEI)
    await stand.is_paid_once(signatures=2)
    first, second = stand.signatures()
    assert second.nonce > first.nonce


async def somebody_elses_transaction_waits_at_its_nonce(stand):
    """Would catch "replacement transaction underpriced" answered by another nonce: then both could be mined."""
    await stand.act()
    await stand.stranger_waits_at_nonce(max_fee_wei=40 * GWEI, tip_wei=30 * GWEI)
    await stand.act()
    assert stand.tried == ("refused", "replacement_underpriced")
    assert len(stand.signatures()) == 1
    await stand.is_paid_once(signatures=2)


async def ours_was_mined_before_we_asked_again(stand):
    """Would catch "nonce too low" taken for a thief when an earlier version of ours was mined."""
    await stand.is_sent()
    stand.between.swallows = True  # the replacement does not get through
    sent = stand.session.settlement
    await stand.wait_unmined(settling.REPLACE_AFTER_S[Haste.CALM][0] // BLOCK_S + 2)
    assert stand.session.settlement.earlier == (sent.tx_hash,)
    stand.between.swallows = False
    await stand.mine_now()
    await stand.act()
    await stand.is_paid_once(signatures=2)
    assert stand.session.ended.tx_hash == sent.tx_hash


async def it_runs_out_of_gas(stand):
    """Would catch a wrong estimate repeated until the session is stranded."""
    stand.between.estimate = 24_000
    await stand.is_sent()
    await stand.turn()
    stand.between.estimate = None
    await stand.turn()
    assert stand.session.settlement_error == "out_of_gas"
    await stand.is_paid_once(signatures=2)


async def fees_spike_while_it_waits(stand):
    """Would catch a settlement that stays below the base fee for ever, or one that overtakes its stake."""
    await stand.is_sent()
    await stand.base_fee(20 * GWEI)
    await stand.is_paid_once(signatures=2)
    newest = stand.signatures()[-1]
    assert newest.max_fee_per_gas_wei >= 20 * GWEI


async def fees_are_absurd_until_they_fall(stand):
    """Would catch half of the stake and more burnt as gas, with three days left to wait."""
    await stand.base_fee(stand.absurd_base_fee_wei(600))
    await stand.turn(3)
    assert stand.tried == ("waiting", "fee_cap")
    assert not stand.signatures()
    await stand.base_fee(GWEI)
    await stand.is_paid_once(signatures=1)


async def fees_stay_absurd_until_the_deadline_nears(stand):
    """Would catch an agent that waits for better days until a stranger settles for nothing."""
    await stand.base_fee(stand.absurd_base_fee_wei(600))
    await stand.turn(2)
    assert not stand.signatures()
    left_s = settling.deadline_s(stand.session, stand.grace_s) - stand.engine.at_s
    await stand.turn(after_s=left_s - left_s // 8)
    assert settling.haste(stand.session, stand.engine.live) is Haste.BRISK
    await stand.is_paid_once(signatures=1)


async def fees_above_the_stake_are_never_paid(stand):
    """Would catch a settlement that costs more than it brings, even at the last minute."""
    await stand.base_fee(stand.absurd_base_fee_wei(1_100))
    await stand.turn()
    left_s = settling.deadline_s(stand.session, stand.grace_s) - stand.engine.at_s
    await stand.turn(after_s=left_s - 120)
    assert settling.haste(stand.session, stand.engine.live) is Haste.URGENT
    assert stand.tried == ("waiting", "fee_cap")
    assert not stand.signatures()
    await stand.base_fee(GWEI)
    await stand.is_paid_once(signatures=1)


async def the_contract_would_refuse_it(stand):
    """Would catch gas spent on a certain revert, and a revert without its name: the owner has revoked the operator."""
    await stand.revoke_operator()
    await stand.turn()
    assert stand.tried == ("refused", "NotParty")
    assert not stand.signatures()
    await stand.name_operator()
    await stand.is_paid_once(signatures=1)


async def it_is_mined_and_refused(stand):
    """Would catch a mined failure that nobody notices: revoked between sending and mining, named again later."""
    await stand.is_sent()
    await stand.revoke_operator()
    await stand.turn(2)
    assert stand.session.settlement_error == "NotParty"
    await stand.name_operator()
    await stand.is_paid_once(signatures=2)


async def the_consumer_ends_it_in_full(stand):
    """Rule 6: paid at least what was acknowledged is SETTLED, without a transaction of ours."""
    await stand.consumer_ends(ORDERED_WH)
    await stand.act()
    assert await stand.until_closed() is Stage.SETTLED
    assert await stand.settled_by_us() == 0
    assert stand.session.ended.energy_wh_settled == ORDERED_WH


async def the_consumer_closes_early_and_is_answered(stand):
    """Rule 7: a close with fewer Wh is answered before it ends, at the haste it leaves."""
    await stand.consumer_ends(1)
    await stand.watch.look()
    assert stand.session.closing_at_s is not None
    await stand.is_paid_once(signatures=1)


async def the_consumer_closes_early_and_nobody_answers(stand):
    """Rule 6: paid less than acknowledged is STRANDED, loudly: the agent was away for the whole challenge window."""
    await stand.consumer_ends(1)
    await stand.challenge_passes_and_a_stranger_settles()
    await stand.act()
    assert await stand.until_closed() is Stage.STRANDED
    assert stand.session.ended.energy_wh_settled == 1


async def the_pool_is_full(stand):
    """Would catch a node's trouble taken for a refusal of ours."""
    stand.between.refuses = Transient("the node has no room for transactions")
    await stand.is_sent()
    await stand.turn()
    stand.between.refuses = None
    await stand.is_paid_once(signatures=1)


async def the_pool_wants_more(stand):
    """Would catch bytes said for ever that no pool keeps: too cheap is answered at once by a replacement."""
    stand.between.refuses = Refused("underpriced", "transaction underpriced")
    await stand.is_sent()
    assert len(stand.signatures()) == 2
    stand.between.refuses = None
    await stand.is_paid_once(signatures=2)


async def the_operator_has_no_coins(stand):
    """Would catch an empty purse reported as anything but what helps: how much is missing, and where."""
    await stand.set_coins(1_000)
    await stand.turn()
    assert stand.tried == ("refused", "unfunded")
    assert not stand.signatures()
    await stand.set_coins(10**18)
    await stand.is_paid_once(signatures=1)


async def its_coins_are_gone_when_it_is_sent(stand):
    """Would catch a signed settlement given up because the purse was emptied in between."""
    await stand.act()
    await stand.set_coins(1_000)
    await stand.act()
    assert stand.tried == ("refused", "unfunded")
    await stand.set_coins(10**18)
    await stand.is_paid_once(signatures=1)


async def nobody_mines_it(stand):
    """Would catch replacements without end: so many while there is time, then the same bytes, said to be stuck."""
    await stand.is_sent()
    await stand.wait_unmined(24, after_s=1_800)
    assert stand.session.replacements == settling.REPLACEMENTS_MAX[Haste.CALM]
    assert stand.tried[0] == "stuck"
    await stand.is_paid_once(signatures=1 + settling.REPLACEMENTS_MAX[Haste.CALM])
    assert {event.nonce for event in stand.signatures()} == {stand.signatures()[0].nonce}


TROUBLES = [
    row
    for name, row in vars(sys.modules[__name__]).items()
    if inspect.iscoroutinefunction(row) and not name.startswith("_")
]
