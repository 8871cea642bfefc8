"""What being paid may cost, and how long it may wait: arithmetic over a session and the time, no decision of anybody's else.

Rules
* A settlement never costs more gas than is at stake: our fee and our bond (PROTOCOL section 7).
* While there is time it costs at most half of that: absurd fees are waited out, until the day nears on which somebody else may
  settle for less than we are owed: the end of the consumer's close where it opened one, else validity and grace.
* A slow one is replaced seldom while there is time, often when there is little, and in all at most REPLACEMENTS_MAX times.
* Gas for what is open, and for one more, is kept back before a bid is signed.

Pure: integers in, integers out.
"""

from __future__ import annotations

from enum import StrEnum

from agent.core.book import Book
from agent.core.live import Live
from agent.core.session import Session
from agent.core.units import cost_wei_floor

BRISK_LEFT_S_MIN, BRISK_LEFT_PART = 1_800, 4  # the last quarter of the time, but at least half an hour
URGENT_LEFT_S_MIN, URGENT_LEFT_PART = 600, 16  # fifty blocks of L1: time for every step of the replacements
GAS_FEE_MULTIPLE = 2  # fees may double between a bid and its settlement, hours later


class Haste(StrEnum):
    """How near the deadline is."""

    CALM = "calm"
    BRISK = "brisk"
    URGENT = "urgent"


# How much of the stake gas may cost, in permille.
STAKE_PERMILLE = {Haste.CALM: 500, Haste.BRISK: 750, Haste.URGENT: 1_000}
# The first wait for a block before more is offered, in seconds; each further one is twice as long, up to the second number.
REPLACE_AFTER_S = {Haste.CALM: (60, 3_600), Haste.BRISK: (45, 300), Haste.URGENT: (45, 45)}
# A pool that takes nothing must not drive us to the stake for ever; some steps are left for when time is short.
REPLACEMENTS_MAX = {Haste.CALM: 8, Haste.BRISK: 16, Haste.URGENT: 24}


def stake_wei(session: Session) -> int:
    """What the settlement of this session is worth to us: its fee and our bond."""
    terms = session.terms
    return cost_wei_floor(terms.rate_wei_per_kwh, session.energy_wh_acked) + terms.bond_wei


def deadline_s(session: Session, grace_s: int) -> int:
    """Chain time from which anybody may settle, for what is claimed on chain: ours should be mined before."""
    latest_s = session.terms.valid_until_s + grace_s
    return latest_s if session.closing_at_s is None else min(latest_s, session.closing_at_s)


def haste(session: Session, live: Live) -> Haste:
    """How near the deadline of a session is that waits for its settlement since `stage_at_s`."""
    until_s = deadline_s(session, live.policy.grace_s)
    whole_s, left_s = max(0, until_s - session.stage_at_s), until_s - live.at_s
    if left_s <= max(URGENT_LEFT_S_MIN, whole_s // URGENT_LEFT_PART):
        return Haste.URGENT
    if left_s <= max(BRISK_LEFT_S_MIN, whole_s // BRISK_LEFT_PART):
        return Haste.BRISK
    return Haste.CALM


def gas_wei_max(session: Session, live: Live) -> int:
    """The most that gas for this settlement may cost now, in wei."""
    return stake_wei(session) * STAKE_PERMILLE[haste(session, live)] // 1_000


def replace_after_s(session: Session, live: Live) -> int | None:
    """How long the newest bytes wait for a block before more is offered; None when no more is offered at this haste."""
    now, replaced = haste(session, live), session.replacements
    if replaced >= REPLACEMENTS_MAX[now]:
        return None
    first_s, longest_s = REPLACE_AFTER_S[now]
    return min(longest_s, first_s << replaced)


# ---- the operator's purse


def settlement_wei_prudent(gas: int, base_fee_wei: int, priority_fee_wei: int) -> int:
    """What one settlement may cost later, in wei: twice what it would offer today, which is twice the base fee and the tip."""
    return gas * GAS_FEE_MULTIPLE * (2 * base_fee_wei + priority_fee_wei)


def settlements_owed(book: Book) -> int:
    """How many settlements the purse must still pay: sessions not ended, seen ones, and bids that may become sessions."""
    open_count = sum(one.ended is None for one in book.open_sessions())
    unseen = sum(sid not in book.sessions for sid in book.pending)
    return open_count + unseen + len(book.open_bids())


def settlements_left(balance_wei: int, settlement_wei: int) -> int:
    """For how many settlements the purse lasts."""
    return balance_wei // max(1, settlement_wei)
