"""What the consumer's car signs: every bound, for any reading a provider may invent."""

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from agent.consumer import policy
from agent.consumer.policy import (
    Decline,
    Patience,
    Reason,
    Sign,
    SigningLimits,
    Situation,
    decide,
    energy_wh_possible,
    energy_wh_tolerated,
)

LIMITS = SigningLimits()
HOUR_MS = 3_600_000

limits = st.builds(
    SigningLimits,
    power_w_max=st.integers(1, 400_000),
    step_wh=st.integers(0, 100),
    tolerance_permille=st.integers(0, 200),
    pre_sign_wh=st.integers(0, 1_000),
)


@st.composite
def situations(draw):
    """Anything that can be true, and any reading."""
    ordered = draw(st.integers(1, 100_000))
    return Situation(
        energy_wh_ordered=ordered,
        energy_wh_signed=draw(st.integers(0, ordered)),
        reading_wh=draw(st.one_of(st.integers(0, 2 * ordered), st.integers(0, 2**53))),
        elapsed_ms=draw(st.integers(0, 48 * HOUR_MS)),
        own_wh=draw(st.none() | st.integers(0, 2 * ordered)),
        confirmed=draw(st.booleans()),
    )


@given(limits, situations())
def test_a_receipt_never_exceeds_any_bound(limits, now):
    """Would catch a bound that another bound switches off: each Wh signed is money."""
    decision = decide(limits, now)
    if isinstance(decision, Sign):
        assert now.energy_wh_signed < decision.energy_wh <= now.energy_wh_ordered
        assert decision.energy_wh <= now.reading_wh
        assert (
            decision.energy_wh * HOUR_MS
            <= limits.power_w_max * now.elapsed_ms + (limits.step_wh + 1) * HOUR_MS
        )
        if now.own_wh is not None:
            allowed = 1000 * (now.own_wh + limits.pre_sign_wh)
            assert 1000 * decision.energy_wh <= allowed + now.own_wh * limits.tolerance_permille
        elif not now.confirmed:
            assert decision.energy_wh <= limits.pre_sign_wh


@given(limits, situations())
def test_an_honest_reading_is_always_signed(limits, now):
    """Would catch a policy that starves an honest provider: new energy within every bound must get its receipt."""
    bounds = [now.energy_wh_ordered, energy_wh_possible(limits, now.elapsed_ms)]
    if now.own_wh is not None:
        bounds.append(energy_wh_tolerated(limits, now.own_wh))
    elif not now.confirmed:
        bounds.append(limits.pre_sign_wh)
    if now.energy_wh_signed < now.reading_wh <= min(bounds):
        assert decide(limits, now) == Sign(now.reading_wh)


@given(st.integers(1, 22_000), st.integers(0, 10 * HOUR_MS))
def test_no_honest_power_is_ever_too_fast(power_w, elapsed_ms):
    """Would catch rounding against the provider: what flows at or below power_w_max is always possible."""
    delivered_wh = power_w * elapsed_ms // HOUR_MS
    assert delivered_wh <= energy_wh_possible(LIMITS, elapsed_ms)


def test_each_refusal_has_its_name():
    """Would catch a reason that hides another: what a person reads must say what is wrong."""
    order = {"energy_wh_ordered": 1000, "energy_wh_signed": 100, "elapsed_ms": HOUR_MS, "confirmed": True}
    assert decide(LIMITS, Situation(**order, reading_wh=100)) == Decline(Reason.NOTHING_NEW)
    assert decide(LIMITS, Situation(**order, reading_wh=99)) == Decline(Reason.NOTHING_NEW)
    assert decide(LIMITS, Situation(**order, reading_wh=1011)) == Decline(Reason.ABOVE_ORDER)
    fast = Situation(**{**order, "elapsed_ms": 60_000}, reading_wh=400)
    assert decide(LIMITS, fast) == Decline(Reason.FASTER_THAN_POSSIBLE)  # 22 kW give 367 Wh in a minute
    assert decide(LIMITS, Situation(**order, reading_wh=551, own_wh=500)) == Decline(Reason.ABOVE_OWN_METER)
    assert decide(LIMITS, Situation(**order, reading_wh=550, own_wh=500)) == Sign(550)  # 5 % and 25 Wh
    unseen = Situation(**{**order, "confirmed": False}, reading_wh=101)
    assert decide(LIMITS, unseen) == Decline(Reason.UNCONFIRMED)


def test_the_last_step_of_a_coarse_meter_is_signed_as_the_order():
    """Would catch an order that can never be finished because the meter steps over it, or a Wh above it."""
    now = Situation(
        energy_wh_ordered=1000, energy_wh_signed=990, reading_wh=1008, elapsed_ms=HOUR_MS, confirmed=True
    )
    assert decide(LIMITS, now) == Sign(1000)


def test_pre_signing_reaches_beyond_our_meter_but_never_beyond_theirs():
    """Would catch an allowance that pays for energy nobody even claims."""
    generous = SigningLimits(pre_sign_wh=120)
    order = {"energy_wh_ordered": 1000, "energy_wh_signed": 0, "elapsed_ms": HOUR_MS}
    for own in ({"own_wh": 0}, {}):
        assert decide(generous, Situation(**order, **own, reading_wh=120)) == Sign(120)
        assert isinstance(decide(generous, Situation(**order, **own, reading_wh=121)), Decline)


def test_a_drivers_word_does_not_overrule_the_cars_own_meter():
    """Would catch a tap on "yes" that switches the better witness off."""
    now = Situation(
        energy_wh_ordered=1000,
        energy_wh_signed=0,
        reading_wh=60,
        elapsed_ms=HOUR_MS,
        own_wh=0,
        confirmed=True,
    )
    assert decide(LIMITS, now) == Decline(Reason.ABOVE_OWN_METER)


def test_patience_forgives_once_and_ends_a_liar():
    """Would catch a session that one late message ends, and one that a liar keeps open for ever."""
    odd, patience = Decline(Reason.FASTER_THAN_POSSIBLE), Patience(patience_ms=1000)
    patience = patience.after(odd, 0)
    assert not patience.is_over(999)
    assert patience.is_over(1000)
    patience = patience.after(odd, 700)
    assert patience.is_over(1000), "more of the same does not start the clock again"
    patience = patience.after(Sign(5), 800)
    assert not patience.is_over(10_000)
    assert not patience.after(Decline(Reason.NOTHING_NEW), 900).is_over(10_000)


def test_the_page_tells_what_each_name_means():
    """Would catch a name on a driver's screen that no page explains."""
    page = (Path(__file__).parents[3] / "docs/fair-exchange.md").read_text()
    explained = set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE))
    consumer = Path(policy.__file__).parent
    raised = {
        name
        for file in ("meeting.py", "plug.py", "charging.py")
        for name in re.findall(r'Refused\(\s*"(\w+)"', (consumer / file).read_text())
    }
    ours = raised - {"signers_unknown", "unknown_session"}  # a node that is away; a message for somebody else
    assert explained == ours | set(Reason) - {Reason.NOTHING_NEW}
