"""What a journey tells whoever watches it: the named steps, and the numbers of a live view. Nothing decides by it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum


class Step(StrEnum):
    """The steps from auction to receipt, in order."""

    AUCTION = "auction"  # startAuction, deposit locked
    BIDDING = "bidding"  # providers underbid each other until closing
    CONNECT = "connect"  # the winner is fixed, the token exists
    HELLO = "hello"  # at the plug: who is this provider?
    PRESENT = "present"  # our signed token, their acceptance
    CHARGE = "charge"  # energy, readings, receipts
    SETTLE = "settle"  # stopped; waiting for the settlement on chain
    DONE = "done"  # checked against the chain


@dataclass(frozen=True, slots=True)
class Progress:
    """One moment of the journey. `words` is one line for people; `stage` is what the provider says (DESIGN section 5)."""

    step: Step
    words: str
    stage: str = ""
    energy_wh_ordered: int = 0
    energy_wh_delivered: int = 0  # by the newest verified reading
    energy_wh_signed: int = 0
    energy_wh_acked: int = 0
    power_w: int = 0
    cost_wei: int = 0  # of what is signed so far


Tell = Callable[[Progress], None]
