"""What our car signs for: pure rules between a provider's signed meter reading and our own receipt.

Rules
* A receipt is money. It never falls, never exceeds the order, the provider's signed reading, what our car can have taken
  since we presented the token, or what our own meter saw (within a tolerance).
* Where our car shows no meter, its driver must say that *it* is charging: the plug we presented at may be another one than
  ours (a relay, docs/fair-exchange.md). Before that, no more than the allowance `pre_sign_wh` is signed.
* Too much claimed is not signed "up to the limit": nothing is signed, and the reason has a name. What was signed before
  stays signed, the provider pauses at its own credit limit, and `Patience` ends the session.
* Integers only; times are arguments.

May not know: messages, signatures, journals, clocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from agent.core.units import energy_mwh_after, energy_wh_floor


class Reason(StrEnum):
    """Why nothing is signed just now."""

    NOTHING_NEW = "nothing_new"  # not above what is signed already: the usual case
    FASTER_THAN_POSSIBLE = "faster_than_possible"  # our car cannot have taken that much since we presented
    ABOVE_OWN_METER = "above_own_meter"  # our own meter saw less, beyond the tolerance
    ABOVE_ORDER = "above_order"  # more than one meter step above what we ordered
    UNCONFIRMED = "unconfirmed"  # beyond the allowance, and neither car nor driver has confirmed that it is we who charge


# A provider whose readings are wrong in one of these ways is either broken or lying; neither gets better by waiting long.
SUSPICIOUS = frozenset({Reason.FASTER_THAN_POSSIBLE, Reason.ABOVE_OWN_METER, Reason.ABOVE_ORDER})


@dataclass(frozen=True, slots=True)
class SigningLimits:
    """What the owner of this car allows. Each bounds what a lying provider can earn (PROTOCOL section 5)."""

    power_w_max: int = 22_000  # nothing flows faster into this car
    step_wh: int = 10  # the coarsest step of a billing meter, and the reading's way to us
    tolerance_permille: int = 50  # their meter against ours: cable and AC/DC losses, both meters' classes
    pre_sign_wh: int = (
        25  # the allowance: beyond what our meter or our driver confirms; never beyond the provider's reading
    )


@dataclass(frozen=True, slots=True)
class Situation:
    """One reading, and what we know ourselves."""

    energy_wh_ordered: int
    energy_wh_signed: int  # the highest receipt so far
    reading_wh: int  # newest reading, its signature verified
    elapsed_ms: int  # since we presented the token: no energy can have flowed before
    own_wh: int | None = None  # what our own car measured; None: it cannot
    confirmed: bool = False  # our driver sees our car charging


@dataclass(frozen=True, slots=True)
class Sign:
    """Sign a receipt for this much in total."""

    energy_wh: int


@dataclass(frozen=True, slots=True)
class Decline:
    """Sign nothing, because."""

    reason: Reason


def energy_wh_possible(limits: SigningLimits, elapsed_ms: int) -> int:
    """The most that can have flowed in `elapsed_ms`: power_w_max x time, rounded up, and one step."""
    return energy_wh_floor(energy_mwh_after(limits.power_w_max, elapsed_ms) + 999) + limits.step_wh


def energy_wh_tolerated(limits: SigningLimits, own_wh: int) -> int:
    """The most that we sign when our own meter shows `own_wh`."""
    return own_wh * (1000 + limits.tolerance_permille) // 1000 + limits.pre_sign_wh


def decide(limits: SigningLimits, now: Situation) -> Sign | Decline:
    """What to sign for this reading, or why not. Never more than any single bound allows."""
    assert 0 <= now.energy_wh_signed <= now.energy_wh_ordered, now
    if now.reading_wh > now.energy_wh_ordered + limits.step_wh:
        return Decline(Reason.ABOVE_ORDER)
    energy_wh = min(now.reading_wh, now.energy_wh_ordered)
    if energy_wh <= now.energy_wh_signed:
        return Decline(Reason.NOTHING_NEW)
    if energy_wh > energy_wh_possible(limits, now.elapsed_ms):
        return Decline(Reason.FASTER_THAN_POSSIBLE)
    if now.own_wh is not None and energy_wh > energy_wh_tolerated(limits, now.own_wh):
        return Decline(Reason.ABOVE_OWN_METER)
    if now.own_wh is None and not now.confirmed and energy_wh > limits.pre_sign_wh:
        return Decline(Reason.UNCONFIRMED)
    return Sign(energy_wh)


@dataclass(frozen=True, slots=True)
class Patience:
    """For how long readings have been suspicious. A single odd one (a late message, a clock) is forgiven."""

    patience_ms: int = 30_000
    since_ms: int | None = None
    reason: Reason | None = None

    def after(self, decision: Sign | Decline, now_ms: int) -> Patience:
        """The patience left after one more decision."""
        if isinstance(decision, Decline) and decision.reason in SUSPICIOUS:
            since_ms = now_ms if self.since_ms is None else self.since_ms
            return Patience(self.patience_ms, since_ms, decision.reason)
        return Patience(self.patience_ms)

    def is_over(self, now_ms: int) -> bool:
        """True when it is time to stop the session."""
        return self.since_ms is not None and now_ms - self.since_ms >= self.patience_ms
