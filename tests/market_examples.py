"""The worked examples of docs/contract.md: told step by step on the real bytecode, figures and all.

`python tests/market_examples.py` writes the page; a test runs the stories again and compares.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from market import DEFAULTS, Actor, Done, Market
from market_rows import ENERGY_WH, RATE, START_RATE, diagrams

from agent.chain import contract as c
from agent.core.token import NO_ACK, Ack, Token

PAGE = Path(__file__).parent.parent / "docs" / "contract.md"
UNIT_WEI = 10**12
HOURS = 3600


@dataclass
class Story:
    """One example: what happened so far, as rows of a table."""

    market: Market
    rows: list[str] = field(default_factory=list)
    token: Token | None = None

    @property
    def opened(self) -> Token:
        """The session's token, once there is one."""
        assert self.token is not None
        return self.token

    def tell(self, who: str, does: str, done: Done | None) -> None:
        """One row: who, what, which events, and both ledgers afterwards (in 10^12 wei)."""
        events = ", ".join(type(log).__name__ for log in done.logs) if done else ""
        consumer, provider = (
            self.market.ledger_wei(actor) for actor in (self.market.consumer, self.market.provider)
        )
        assert consumer % UNIT_WEI == provider % UNIT_WEI == 0, "examples use round figures"
        tokens = [self.token] if self.token else []
        assert self.market.held_wei(tokens) == self.market.balance_wei(self.market.address), (
            "every wei has an owner"
        )
        self.rows.append(f"| {who} | {does} | {events} | {consumer // UNIT_WEI} | {provider // UNIT_WEI} |")

    def send(self, who: str, sender: Actor, does: str, data: bytes, value_wei: int = 0) -> Done:
        """One call."""
        done = self.market.send(sender, data, value_wei)
        for log in done.logs:
            if isinstance(log, c.SessionOpened):
                self.token = log.token
        self.tell(who, does, done)
        return done

    # ---- steps of every story

    def auction(self) -> None:
        """From the question to a winner."""
        m = self.market
        start = c.encode_start_auction(ENERGY_WH, 60, START_RATE, 3600, b"\x07" * 32)
        deposit_wei, bond_wei = START_RATE * ENERGY_WH // 1000, RATE * ENERGY_WH // 1000
        self.send("consumer", m.consumer, "`startAuction` for 200 Wh, sends 60", start, deposit_wei)
        bid = c.encode_place_bid(m.consumer.address, 1, RATE)
        self.send("provider", m.provider, "`placeBid`, sends a bond of 40", bid, bond_wei)

    def session(self) -> None:
        """An auction and its connection."""
        self.auction()
        self.market.close()
        data = c.encode_connect(self.market.provider.address, ENERGY_WH)
        self.send("consumer", self.market.consumer, "`connect` after closing; 20 were more than needed", data)

    def ends(self, who: str, does: str, energy_wh: int, ack: Ack = NO_ACK) -> None:
        """One side ends."""
        sender = self.market.consumer if who == "consumer" else self.market.provider
        self.send(who, sender, does, c.encode_end_connection(self.opened, energy_wh, ack))

    def waits(self, seconds: int, words: str) -> None:
        """Time passes."""
        self.market.pass_time(seconds)
        self.tell("", f"*{words}*", None)

    def settles(self) -> None:
        """By a stranger."""
        self.send("anyone", self.market.stranger, "`settle`", c.encode_settle(self.opened))

    def receipt(self, energy_wh: int) -> Ack:
        """The consumer's."""
        return self.market.receipt(self.opened, energy_wh)

    def withdraws(self) -> None:
        """Both take everything home."""
        for who, actor in (("consumer", self.market.consumer), ("provider", self.market.provider)):
            amount = self.market.ledger_wei(actor)
            if amount:
                self.send(
                    who, actor, f"`withdraw` {amount // UNIT_WEI}", c.encode_withdraw(amount, actor.address)
                )
        assert self.market.balance_wei(self.market.address) == 0, "the market keeps nothing"


def one_trade(s: Story) -> None:
    """200 Wh at the winner's rate cost 40. The car delivers, the consumer's device signs receipts, the provider ends with
    the last one: fee and bond are the provider's, the surplus of the deposit was the consumer's from `connect` on.
    """
    s.session()
    s.ends("provider", "`endConnection` with a receipt for 200 Wh", ENERGY_WH, s.receipt(ENERGY_WH))
    s.withdraws()


def the_consumer_does_not_come(s: Story) -> None:
    """The provider leaves at once, without a signature. Nobody gains: who is to blame cannot be seen on a chain."""
    s.session()
    s.ends("provider", "`endConnection` for 0 Wh, no receipt", 0)
    s.withdraws()


def the_provider_does_not_come(s: Story) -> None:
    """The consumer concedes nothing; the provider has the challenge window to show a receipt, and has none."""
    s.session()
    s.ends("consumer", "`endConnection`, concedes 0 Wh", 0)
    s.waits(DEFAULTS.challenge_s, "12 hours: the challenge window")
    s.settles()
    s.withdraws()


def nobody_connects(s: Story) -> None:
    """A winner's bond is not locked for ever by a consumer that changed its mind."""
    s.auction()
    s.market.close()
    s.waits(DEFAULTS.connect_window_s + 1, "15 minutes: the connect window")
    cancel = c.encode_cancel_auction(s.market.consumer.address)
    s.send("anyone", s.market.stranger, "`cancelAuction`", cancel)
    s.withdraws()


def partial_delivery(s: Story) -> None:
    """The battery's reserve is reached after 150 Wh. The receipt says 150, so 30 are paid and 10 go back."""
    s.session()
    s.ends("provider", "`endConnection` with a receipt for 150 Wh", 150, s.receipt(150))
    s.withdraws()


def the_consumer_ends_early(s: Story) -> None:
    """The consumer must leave after 100 Wh and concedes exactly that. The provider agrees and need not wait: its own end
    is final and is paid what is claimed.
    """
    s.session()
    s.ends("consumer", "`endConnection`, concedes 100 Wh", 100)
    s.ends("provider", "`endConnection` for 0 Wh: takes what is claimed", 0)
    s.withdraws()


def dispute_by_receipt(s: Story) -> None:
    """The consumer took 150 Wh and concedes 50. Anyone who holds the receipt raises the claim inside the window; it can
    only rise, and `closeAt` does not move.
    """
    s.session()
    s.ends("consumer", "`endConnection`, concedes 50 Wh", 50)
    raise_ = c.encode_submit_receipt(s.opened, 150, s.receipt(150))
    s.send("anyone", s.market.stranger, "`submitReceipt` for 150 Wh (a watchtower)", raise_)
    s.ends("consumer", "`endConnection`, concedes 60 Wh: changes nothing", 60)
    s.waits(DEFAULTS.challenge_s, "12 hours: the challenge window")
    s.settles()
    s.withdraws()


def a_paused_market(s: Story) -> None:
    """The organisation pauses the market and removes both cars in the middle of a session. Nothing new begins; everything
    that began comes to its end, and everybody leaves with its money.
    """
    s.session()
    m = s.market
    s.send("organisation", m.organisation, "`changeStatus(false)`", c.encode_change_status(active=False))
    for who, actor in (("consumer", m.consumer), ("provider", m.provider)):
        s.send("organisation", m.organisation, f"`removeEV({who})`", c.encode_remove_ev(actor.address))
    s.ends("provider", "`endConnection` with a receipt for 200 Wh", ENERGY_WH, s.receipt(ENERGY_WH))
    s.withdraws()


EXAMPLES: list[Callable[[Story], None]] = [
    one_trade, the_consumer_does_not_come, the_provider_does_not_come, nobody_connects, partial_delivery,
    the_consumer_ends_early, dispute_by_receipt, a_paused_market,
]  # fmt: skip

HEAD = """# The contract by example

What each call does and who may make it: `contracts/src/IV2VCharging.sol`. Why it is safe: [security.md](security.md). What
it costs: [gas.md](gas.md). The examples and both diagrams are written by `python tests/market_examples.py` from stories
that run on the checked-in bytecode; a test runs them again and compares.

A consumer asks for 200 Wh at no more than 0.3 (in 10^15 wei per kWh); a provider offers 0.2. All money below is in
10^12 wei: the deposit is 60, the cost 40, the bond 40. The last two columns are the ledgers after each step.

"""
TABLE = "| who | does | events | consumer | provider |\n|---|---|---|---:|---:|"


def page() -> str:
    """docs/contract.md."""
    market = Market()
    place = market.snapshot()
    parts = []
    for example in EXAMPLES:
        market.restore(place)
        story = Story(market)
        example(story)
        title = example.__name__.replace("_", " ").capitalize()
        words = " ".join((example.__doc__ or "").split())
        parts.append("\n".join([f"## {title}", "", words, "", TABLE, *story.rows, ""]))
    return HEAD + "\n".join(parts) + "\n## States\n\n" + diagrams()


if __name__ == "__main__":
    sys.exit(0 if PAGE.write_text(page()) else 1)
