"""PROTOCOL section 2 as a table: every state, every call, who, and where it leads or why it is refused.

The tests run each row on the real bytecode; docs/contract.md's diagrams are drawn from the very same rows. A state is
made by the steps that lead to it, so a row says nothing that a trade could not do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from market import DEFAULTS, Actor, Market

from agent.chain import contract as c
from agent.core.token import NO_ACK, Ack, Token

ENERGY_WH, START_RATE, RATE = 200, 3 * 10**14, 2 * 10**14

# ---- states of an auction, then of a session
FREE, ASKED, LED, UNSOLD, WON, HOPELESS, LAPSED = (
    "Free", "Asked", "Led", "Unsold", "Won", "Hopeless", "Lapsed"
)  # fmt: skip
NONE, ACTIVE, CLOSING, DUE, SETTLED = "None", "Active", "Closing", "Due", "Settled"
MEANING = {
    FREE: "no auction; the next one gets the next nonce",
    ASKED: "running, no bid",
    LED: "running, somebody leads and its bond is locked",
    UNSOLD: "closed without a bid",
    WON: "closed with a winner, `connect` is possible until `connectBy`",
    HOPELESS: "closed with a winner, but a party was removed or the market is paused",
    LAPSED: "closed with a winner, `connectBy` is over",
    NONE: "no session under this token",
    ACTIVE: "connected; settles by itself only after validity and grace",
    CLOSING: "the consumer conceded less than the order; settles at `closeAt`",
    DUE: "`settleAt` is reached",
    SETTLED: "paid, once; the token is dead",
}


@dataclass(frozen=True)
class Scene:
    """One market in a state; `token` where there is a session."""

    market: Market
    token: Token | None = None

    @property
    def m(self) -> Market:
        """Short for rows."""
        return self.market

    def ack(self, energy_wh: int) -> Ack:
        """The consumer's receipt."""
        assert self.token is not None
        return self.market.receipt(self.token, energy_wh)

    def end(self, energy_wh: int, ack: Ack = NO_ACK) -> bytes:
        """Calldata of endConnection."""
        return c.encode_end_connection(self.token or Token(b"\x09" * 32), energy_wh, ack)


@dataclass(frozen=True)
class Row:
    """In `state`, `who` makes `call`: then `leads_to`, telling `event`; or it is refused by `error`."""

    state: str
    who: str
    call: str
    data: Callable[[Scene], bytes]
    leads_to: str = ""
    event: str = ""
    error: str = ""
    value_wei: int = 0

    @property
    def name(self) -> str:
        """For test reports."""
        return f"{self.state}: {self.who} {self.call} -> {self.leads_to or self.error}"


def actor(market: Market, who: str) -> Actor:
    """The account of a row's word."""
    return {
        "consumer": market.consumer, "provider": market.provider, "rival": market.rival, "anyone": market.stranger,
        "organisation": market.organisation, "operator": market.hot_key,
    }[who]  # fmt: skip


# ---------------------------------------------------------------------------------------- making a state


def make(market: Market, state: str) -> Scene:
    """Walk to a state."""
    if state in (FREE, NONE):
        return Scene(market)
    market.send(market.provider, c.encode_deposit(), 10**18)
    market.send(market.provider, c.encode_set_operator(market.hot_key.address, 10**18))
    market.start(ENERGY_WH, START_RATE)
    if state not in (ASKED, UNSOLD):
        market.bid(RATE)
    if state in (ASKED, LED):
        return Scene(market)
    market.close()
    if state == HOPELESS:
        market.send(market.organisation, c.encode_remove_ev(market.provider.address))
    if state == LAPSED:
        market.pass_time(DEFAULTS.connect_window_s + 1)
    if state in (UNSOLD, WON, HOPELESS, LAPSED):
        return Scene(market)
    scene = Scene(market, market.connect())
    if state == CLOSING:
        market.send(market.consumer, scene.end(50))
    if state == DUE:
        market.pass_time(10**6)
    if state == SETTLED:
        market.send(market.provider, scene.end(0))
    return scene


def state_of_auction(market: Market) -> str:
    """What the contract's own views say."""
    a = market.auction()
    soon = market.now_s + 1
    if not a.is_live:
        return FREE
    if soon < a.closing_time_s:
        return LED if a.has_bid else ASKED
    if not a.has_bid:
        return UNSOLD
    registered = c.decode_is_ev(market.view(c.encode_is_ev(a.provider)))
    return LAPSED if soon > a.connect_by_s else WON if registered else HOPELESS


def state_of_session(scene: Scene) -> str:
    """What the contract's own views say."""
    assert scene.token is not None
    s = scene.market.session(scene.token)
    if not s.is_open:
        return SETTLED
    if scene.market.now_s >= s.settle_at_s:
        return DUE
    return CLOSING if s.status is c.SessionStatus.CLOSING else ACTIVE


# ----------------------------------------------------------------------------------------------- the rows

ASK = "startAuction"
COST_WEI, BOND_WEI = START_RATE * ENERGY_WH // 1000, RATE * ENERGY_WH // 1000


def _start(_: Scene) -> bytes:
    return c.encode_start_auction(ENERGY_WH, 60, START_RATE, 3600, bytes(32))


def _bid(rate: int, nonce: int = 1) -> Callable[[Scene], bytes]:
    return lambda s: c.encode_place_bid(s.m.consumer.address, nonce, rate)


def _bid_for(rate: int) -> Callable[[Scene], bytes]:
    return lambda s: c.encode_place_bid_for(s.m.provider.address, s.m.consumer.address, 1, rate)


def _end_auction(s: Scene) -> bytes:
    return c.encode_end_auction(s.m.consumer.address)


def _cancel(s: Scene) -> bytes:
    return c.encode_cancel_auction(s.m.consumer.address)


def _connect(s: Scene) -> bytes:
    return c.encode_connect(s.m.provider.address, ENERGY_WH)


def _settle(s: Scene) -> bytes:
    return c.encode_settle(s.token or Token(b"\x09" * 32))


def _submit(energy_wh: int) -> Callable[[Scene], bytes]:
    return lambda s: c.encode_submit_receipt(
        s.token or Token(b"\x09" * 32), energy_wh, s.ack(energy_wh) if s.token else NO_ACK
    )


def _end(energy_wh: int, *, signed: bool = False) -> Callable[[Scene], bytes]:
    return lambda s: s.end(energy_wh, s.ack(energy_wh) if signed else NO_ACK)


AUCTION_ROWS = [
    Row(FREE, "consumer", ASK, _start, ASKED, "AuctionStarted", value_wei=COST_WEI),
    Row(FREE, "consumer", ASK, _start, error="Insufficient", value_wei=COST_WEI - 1),
    Row(FREE, "anyone", ASK, _start, error="NotEV", value_wei=COST_WEI),
    Row(FREE, "provider", "placeBid", _bid(RATE), error="NoAuction", value_wei=BOND_WEI),
    Row(FREE, "anyone", "endAuction", _end_auction, error="NoAuction"),
    Row(FREE, "consumer", "cancelAuction", _cancel, error="NoAuction"),
    Row(FREE, "consumer", "connect", _connect, error="NoAuction"),
    Row(ASKED, "consumer", ASK, _start, error="AuctionLive", value_wei=COST_WEI),
    Row(ASKED, "provider", "placeBid", _bid(START_RATE), LED, "BidPlaced", value_wei=COST_WEI),
    Row(ASKED, "operator", "placeBidFor", _bid_for(RATE), LED, "BidPlaced"),
    Row(ASKED, "anyone", "placeBidFor", _bid_for(RATE), error="NotOperator"),
    Row(ASKED, "provider", "placeBid", _bid(START_RATE + 1), error="BidTooHigh", value_wei=10**18),
    Row(ASKED, "provider", "placeBid", _bid(0), error="RateOutOfRange", value_wei=10**18),
    Row(ASKED, "provider", "placeBid", _bid(RATE, 2), error="StaleAuction", value_wei=10**18),
    Row(ASKED, "consumer", "placeBid", _bid(RATE), error="SelfDeal", value_wei=10**18),
    Row(ASKED, "anyone", "placeBid", _bid(RATE), error="NotEV", value_wei=10**18),
    Row(ASKED, "consumer", "cancelAuction", _cancel, FREE, "AuctionCancelled"),
    Row(ASKED, "anyone", "cancelAuction", _cancel, error="NotCancellable"),
    Row(ASKED, "anyone", "endAuction", _end_auction, error="AuctionOpen"),
    Row(ASKED, "consumer", "connect", _connect, error="AuctionOpen"),
    Row(LED, "rival", "placeBid", _bid(RATE - RATE // 100), LED, "BidPlaced", value_wei=BOND_WEI),
    Row(LED, "rival", "placeBid", _bid(RATE - RATE // 100 + 1), error="BidTooHigh", value_wei=BOND_WEI),
    Row(LED, "provider", "placeBid", _bid(RATE // 2), LED, "BidPlaced"),
    Row(LED, "consumer", "cancelAuction", _cancel, error="NotCancellable"),
    Row(LED, "anyone", "endAuction", _end_auction, error="AuctionOpen"),
    Row(LED, "consumer", "connect", _connect, error="AuctionOpen"),
    Row(UNSOLD, "anyone", "endAuction", _end_auction, FREE, "AuctionEnded"),
    Row(UNSOLD, "consumer", "cancelAuction", _cancel, FREE, "AuctionCancelled"),
    Row(UNSOLD, "anyone", "cancelAuction", _cancel, error="NotCancellable"),
    Row(UNSOLD, "provider", "placeBid", _bid(RATE), error="AuctionClosed", value_wei=BOND_WEI),
    Row(UNSOLD, "consumer", "connect", _connect, error="NotWinner"),
    Row(WON, "anyone", "endAuction", _end_auction, WON, "AuctionEnded"),
    Row(WON, "consumer", "connect", _connect, FREE, "SessionOpened"),
    Row(WON, "rival", "connect", _connect, error="NoAuction"),
    Row(WON, "consumer", "connect (to another)", lambda s: c.encode_connect(s.m.rival.address, ENERGY_WH), error="NotWinner"),
    Row(WON, "consumer", "connect (other amount)", lambda s: c.encode_connect(s.m.provider.address, 1), error="WrongEnergy"),
    Row(WON, "rival", "placeBid", _bid(RATE // 2), error="AuctionClosed", value_wei=BOND_WEI),
    Row(WON, "consumer", "cancelAuction", _cancel, error="NotCancellable"),
    Row(WON, "anyone", "cancelAuction", _cancel, error="NotCancellable"),
    Row(HOPELESS, "consumer", "connect", _connect, error="NotEV"),
    Row(HOPELESS, "anyone", "cancelAuction", _cancel, FREE, "AuctionCancelled"),
    Row(LAPSED, "consumer", "connect", _connect, error="ConnectExpired"),
    Row(LAPSED, "anyone", "cancelAuction", _cancel, FREE, "AuctionCancelled"),
    Row(LAPSED, "anyone", "endAuction", _end_auction, LAPSED, "AuctionEnded"),
]  # fmt: skip

SESSION_ROWS = [
    Row(NONE, "provider", "endConnection", _end(0), error="NoSession"),
    Row(NONE, "anyone", "submitReceipt", _submit(0), error="NoSession"),
    Row(NONE, "anyone", "settle", _settle, error="NoSession"),
    Row(ACTIVE, "consumer", "endConnection (part)", _end(50), CLOSING, "ConnectionClosing"),
    Row(ACTIVE, "consumer", "endConnection (full order)", _end(ENERGY_WH), SETTLED, "ConnectionEnded"),
    Row(ACTIVE, "provider", "endConnection (receipt)", _end(150, signed=True), SETTLED, "ConnectionEnded"),
    Row(ACTIVE, "operator", "endConnection (receipt)", _end(150, signed=True), SETTLED, "ConnectionEnded"),
    Row(ACTIVE, "provider", "endConnection (nothing)", _end(0), SETTLED, "ConnectionEnded"),
    Row(ACTIVE, "provider", "endConnection (unsigned)", _end(1), error="InvalidReceipt"),
    Row(ACTIVE, "consumer", "endConnection (above the order)", _end(ENERGY_WH + 1), error="OverAmount"),
    Row(ACTIVE, "anyone", "endConnection", _end(0), error="NotParty"),
    Row(ACTIVE, "organisation", "endConnection", _end(0), error="NotParty"),
    Row(ACTIVE, "anyone", "submitReceipt", _submit(120), ACTIVE, "ReceiptAccepted"),
    Row(ACTIVE, "anyone", "settle", _settle, error="TooEarly"),
    Row(CLOSING, "consumer", "endConnection (more)", _end(60), CLOSING, "ConnectionClosing"),
    Row(CLOSING, "consumer", "endConnection (less)", _end(40), CLOSING),
    Row(CLOSING, "consumer", "endConnection (full order)", _end(ENERGY_WH), SETTLED, "ConnectionEnded"),
    Row(CLOSING, "anyone", "submitReceipt", _submit(120), CLOSING, "ReceiptAccepted"),
    Row(CLOSING, "anyone", "submitReceipt (less)", _submit(40), CLOSING),
    Row(CLOSING, "provider", "endConnection (receipt)", _end(150, signed=True), SETTLED, "ConnectionEnded"),
    Row(CLOSING, "provider", "endConnection (nothing)", _end(0), SETTLED, "ConnectionEnded"),
    Row(CLOSING, "anyone", "settle", _settle, error="TooEarly"),
    Row(DUE, "anyone", "settle", _settle, SETTLED, "ConnectionEnded"),
    Row(DUE, "anyone", "submitReceipt", _submit(120), DUE, "ReceiptAccepted"),
    Row(DUE, "provider", "endConnection (receipt)", _end(150, signed=True), SETTLED, "ConnectionEnded"),
    Row(SETTLED, "provider", "endConnection", _end(0), error="NoSession"),
    Row(SETTLED, "consumer", "endConnection", _end(0), error="NoSession"),
    Row(SETTLED, "anyone", "settle", _settle, error="NoSession"),
]  # fmt: skip
TIME_ARROWS = [(ASKED, UNSOLD), (LED, WON), (WON, LAPSED), (ACTIVE, DUE), (CLOSING, DUE)]
REMOVAL_ARROWS = [(WON, HOPELESS)]


def diagram(rows: list[Row], states: tuple[str, ...]) -> str:
    """A mermaid state diagram of the rows that lead somewhere, and of what time alone does."""
    arrows: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        if row.leads_to and (row.leads_to != row.state or row.event):
            label = f"{row.who} {row.call}"
            found = arrows.setdefault((row.state, row.leads_to), [])
            found += [] if label in found else [label]
    for here, there in TIME_ARROWS + REMOVAL_ARROWS:
        if here in states:
            arrows.setdefault((here, there), []).append(
                "time" if (here, there) in TIME_ARROWS else "removal or pause"
            )
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {states[0]}"]
    lines += [f"    {here} --> {there}: {', '.join(labels)}" for (here, there), labels in arrows.items()]
    if SETTLED in states:
        lines.append(f"    {SETTLED} --> [*]")
    return "\n".join([*lines, "```"])


def diagrams() -> str:
    """Both diagrams and what their words mean, as docs/contract.md shows them."""
    auction = diagram(AUCTION_ROWS, (FREE, ASKED, LED, UNSOLD, WON, HOPELESS, LAPSED))
    session_rows = [row for row in SESSION_ROWS if row.state != NONE]
    session = diagram(session_rows, (ACTIVE, CLOSING, DUE, SETTLED))
    meaning = "\n".join(f"* **{state}**: {words}" for state, words in MEANING.items() if state != NONE)
    return (
        f"An auction, one per consumer:\n\n{auction}\n\nA session, one per token:\n\n{session}\n\n{meaning}\n"
    )
