"""One bid's life, from the owner's word to the block it is mined in: decided, signed, ended. The same bid is never made twice.

Rules
* A bid is what it says: consumer, auction, rate. Asked again while it is open, or after it was placed, it is the same one.
* Decided, it is signed before `until_s` or never: a node that was away must not bind the owner's money an hour later.
* Signed, it is broadcast until its nonce is used up, even when its auction is over: a nonce left open would block settlements.
* Few at a time, few remembered: each is a row on the disk, and locks a bond.

Pure. What a bid may cost, and whether the auction still runs, is asked by whoever signs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from agent.core import events as ev
from agent.core.units import Address, BidId, TxHash

BIDS_OPEN_MAX = 4  # under way at once: what a runaway script can lock before anybody looks
BIDS_KEPT_MAX = 32  # remembered, so that a repeated question gets the same answer


@dataclass(frozen=True, slots=True)
class SignedBid:
    """The newest signed bytes of a bid."""

    nonce: int
    tx_hash: TxHash
    raw_tx: bytes
    gas_wei_max: int
    earlier: tuple[TxHash, ...] = ()  # what these bytes replaced: any of them may be the one that is mined


@dataclass(frozen=True, slots=True)
class Bid:
    """Everything journaled about one bid."""

    bid_id: BidId
    consumer: Address
    auction_nonce: int
    rate_wei_per_kwh: int
    until_s: int  # chain time: not signed by then, it is given up
    signed: SignedBid | None = None
    ended: bool = False
    error: str = ""  # of an ended one: why it was not placed

    @property
    def is_placed(self) -> bool:
        """Mined, and the contract took it."""
        return self.ended and not self.error


Bids = Mapping[BidId, Bid]


def open_bids(bids: Bids) -> tuple[Bid, ...]:
    """Those that may still be mined."""
    return tuple(bid for bid in bids.values() if not bid.ended)


def decided(bids: Bids, event: ev.BidDecided) -> Bids:
    """With a new bid; the same object when it is known, or when too many are under way."""
    known = bids.get(event.bid_id)
    if known is not None and (not known.ended or known.is_placed):
        return bids
    if len(open_bids(bids)) >= BIDS_OPEN_MAX:
        return bids
    kept = {key: bid for key, bid in bids.items() if key != event.bid_id}
    old = [key for key, bid in kept.items() if bid.ended][: max(0, len(kept) - BIDS_KEPT_MAX + 1)]
    new = Bid(event.bid_id, event.consumer, event.auction_nonce, event.rate_wei_per_kwh, event.until_s)
    return {**{key: bid for key, bid in kept.items() if key not in old}, event.bid_id: new}


def signed(bids: Bids, event: ev.BidSigned) -> Bids:
    """With its newest bytes. A replacement has the nonce of what it replaces."""
    bid = bids.get(event.bid_id)
    if bid is None or bid.ended:
        return bids
    before = bid.signed
    assert before is None or before.nonce == event.nonce, "a second nonce could place the bid twice"
    earlier = () if before is None else (*before.earlier, before.tx_hash)
    newest = SignedBid(event.nonce, event.tx_hash, event.raw_tx, event.gas_wei_max, earlier)
    return {**bids, event.bid_id: replace(bid, signed=newest)}


def ended(bids: Bids, event: ev.BidEnded) -> Bids:
    """With its end."""
    bid = bids.get(event.bid_id)
    if bid is None or bid.ended:
        return bids
    return {**bids, event.bid_id: replace(bid, ended=True, error=event.error)}


def due(bids: Bids, at_s: int) -> ev.BidEnded | None:
    """The end of a bid that nobody could sign in time."""
    for bid in open_bids(bids):
        if bid.signed is None and at_s > bid.until_s:
            return ev.BidEnded(at_s, bid.bid_id, "expired")
    return None
