"""Meeting at the plug: an honest provider is accepted, and every dishonest one is refused by name."""

import asyncio
from dataclasses import replace

import pytest
from scripted_provider import (
    CONSUMER,
    NOW_S,
    OPERATOR,
    STRANGER,
    MemoryCarrier,
    PlayedChain,
    ScriptedProvider,
    eventually,
    opened_journal,
    plugged,
    terms_of,
)

from agent.consumer.journal import Matched, Presented
from agent.consumer.meeting import KNOCK_GROWTH_UNHEARD, Meeting
from agent.consumer.plug import TokenChanged
from agent.core import token as rules
from agent.core.messages import Present, Refusal, decode, encode
from agent.errors import Refused, Transient


@pytest.fixture
def provider():
    """A provider that behaves until told otherwise."""
    return ScriptedProvider(terms_of())


@pytest.fixture
def carrier(provider):
    """A way to it."""
    return MemoryCarrier(provider)


async def test_an_honest_provider_is_met_and_remembered(provider, carrier, tmp_path):
    """Would catch a meeting that does not grant what was agreed, or forgets the acceptance in a crash."""
    plug = plugged(tmp_path, carrier)
    accept = await Meeting(plug).meet()
    assert accept.register_mwh_begin == 5_000
    (data,) = provider.presented
    present = decode(data)
    assert isinstance(present, Present)
    assert present.max_energy_wh == plug.terms.energy_wh_ordered
    assert present.session_key == plug.session_key.address != CONSUMER.address
    assert plug.errand.presented.message == data
    assert plug.errand.accepted is not None
    again = await Meeting(plug).meet()
    assert again == accept
    assert provider.presented == [data], "what is accepted is not presented again"


async def test_the_presentation_is_on_disk_before_anybody_sees_it(provider, carrier, tmp_path):
    """Would catch a crash between sending and remembering: the provider would know a presentation that we do not."""
    plug = plugged(tmp_path, carrier)
    seen = []
    carrier.losing = lambda kind: seen.append((kind, plug.errand.presented is not None))
    await Meeting(plug).meet()
    assert seen[0] == ("present", True)


async def test_not_yet_is_waited_out_with_the_same_bytes(provider, carrier, tmp_path):
    """Would catch a new signature for each try: the provider knows a repeat by its bytes."""
    provider.refusals.extend([Refusal("not_yet_seen", ""), provider.status("waiting", "not_yet_confirmed")])
    await Meeting(plugged(tmp_path, carrier)).meet()
    assert len(provider.presented) == 3
    assert len(set(provider.presented)) == 1


async def test_a_lost_presentation_is_sent_again(provider, carrier, tmp_path):
    """Would catch a consumer that waits for ever for the answer to a message that never arrived."""
    lost = iter([True, True, False])
    carrier.losing = lambda _kind: next(lost, False)
    await Meeting(plugged(tmp_path, carrier)).meet()
    assert len(provider.presented) == 1


@pytest.mark.parametrize("answered", [False, True])
async def test_silence_is_knocked_at_often_and_a_word_is_waited_on(
    answered, provider, carrier, tmp_path, monkeypatch
):
    """Would catch a consumer who waits ever longer while a flood at the broker loses what he says, or one who hammers at a
    provider that has told him to wait.
    """
    waits_s, knock_s = [], 0.002
    answer = Meeting._answer

    async def watched(self, presented, wait_s):
        waits_s.append(wait_s)
        provider.accepting = len(waits_s) >= 12
        carrier.losing = lambda _kind: not answered and not provider.accepting
        return await answer(self, presented, wait_s)

    monkeypatch.setattr(Meeting, "_answer", watched)
    provider.accepting = False
    plug = plugged(tmp_path, carrier)
    plug.waits = replace(plug.waits, knock_s=knock_s)
    provider.refusals.extend([Refusal("not_yet_seen", "")] * 12 * answered)
    await Meeting(plug).meet()
    assert max(waits_s[:2]) <= 2 * knock_s
    assert (max(waits_s) > KNOCK_GROWTH_UNHEARD * knock_s) is answered


async def test_after_a_crash_the_very_same_presentation_goes_out(provider, carrier, tmp_path):
    """Would catch a second presentation beside a journaled one: the Hello is used up, the first is the one that counts."""
    provider.accepting = False
    plug = plugged(tmp_path, carrier)
    meeting = asyncio.create_task(Meeting(plug).meet())
    await eventually(lambda: provider.presented)
    meeting.cancel()
    await asyncio.wait({meeting})
    plug.journal.close()

    provider.accepting = True
    again = plugged(tmp_path, carrier, journal=opened_journal(tmp_path, provider.terms))
    await Meeting(again).meet()
    assert len(set(provider.presented)) == 1
    assert len(provider.hellos) == 1


@pytest.mark.parametrize("reason", ["stale_hello", "replayed"])
async def test_a_used_hello_is_replaced_and_everything_signed_anew(reason, provider, carrier, tmp_path):
    """Would catch a consumer that repeats a dead presentation, or one that signs for the same Hello again."""
    provider.refusals.append(Refusal(reason, ""))
    await Meeting(plugged(tmp_path, carrier)).meet()
    first, second = (decode(data) for data in provider.presented)
    assert first.hello_nonce != second.hello_nonce
    assert first.consumer_nonce != second.consumer_nonce


async def test_a_hello_on_display_that_was_refused_is_not_used_again(provider, carrier, tmp_path):
    """Would catch an endless loop over a retained Hello that the provider does not take."""
    carrier.shown = [provider.hello()]
    provider.refusals.append(Refusal("stale_hello", ""))
    with pytest.raises(Refused, match="stale_hello"):
        await Meeting(plugged(tmp_path, carrier)).meet()
    assert len(provider.presented) == 1


async def test_only_a_wrong_token_sends_us_back_to_the_chain(provider, carrier, tmp_path):
    """Would catch a reorg that ends a session for good."""
    provider.refusals.append(Refusal("wrong_token", ""))
    with pytest.raises(TokenChanged):
        await Meeting(plugged(tmp_path, carrier)).meet()


async def test_a_final_no_ends_the_meeting_with_the_providers_word(provider, carrier, tmp_path):
    """Would catch a consumer that knocks for ten minutes at a door that said no, or that hides why."""
    provider.refusals.extend([Refusal("too_late", "less than 60 s are left")] * 5)
    with pytest.raises(Refused, match="too_late: less than 60 s") as refused:
        await Meeting(plugged(tmp_path, carrier)).meet()
    assert "consumer end" in refused.value.remedy


# ---- hostile


def wrong_signer(provider):
    """A stranger who answers in our provider's name."""
    return provider.hello(key=STRANGER)


def someone_else(provider):
    """A genuine Hello of another provider: the wrong car, or a photographed QR code."""
    return provider.hello(key=STRANGER, provider=STRANGER.address)


def relabelled(provider):
    """Somebody else's signed Hello under our provider's name."""
    return replace(someone_else(provider), provider=provider.terms.provider)


def expired(provider):
    """A Hello from before: replayed from a recording."""
    return provider.hello(expires_at_s=NOW_S)


def mangled(provider):
    """A signature in no canonical form."""
    hello = provider.hello()
    return replace(hello, signature=hello.signature[:64] + b"\x23")


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (wrong_signer, "wrong_signer"),
        (someone_else, "wrong_provider"),
        (relabelled, "wrong_signer"),
        (expired, "stale_hello"),
        (mangled, "bad_signature"),
    ],
)
async def test_a_false_hello_is_refused_by_name_and_gets_no_signature(
    forge, reason, provider, carrier, tmp_path
):
    """Would catch a consumer that presents its token to whoever asks: each forgery must end named, with nothing sent."""
    carrier.shown = [forge(provider)]
    plug = plugged(tmp_path, carrier)
    with pytest.raises(Refused) as refused:
        await Meeting(plug).meet()
    assert refused.value.reason == reason
    assert provider.presented == []
    assert plug.errand.presented is None
    assert reason == "bad_signature" or refused.value.remedy, (
        "a driver with the wrong code wants to know what to do"
    )
    assert sum(f"not believed ({reason})" in told.words for told in plug.tell) == 1, (
        "and wants to know at once, and once"
    )


async def test_a_liars_no_ends_nothing(provider, carrier, tmp_path):
    """Would catch a broker that ends an evening with one forged refusal, or with the same one said a hundred times at once."""
    for _ in range(100):
        carrier.say(Refusal("expired", "says who?"))
    provider.refusals.append(Refusal("expired", "an old one, said again"))
    accept = await Meeting(plugged(tmp_path, carrier)).meet()
    assert accept.register_mwh_begin == 5_000


async def test_false_hellos_do_not_hide_the_true_one(provider, carrier, tmp_path):
    """Would catch a stranger on the broker who can keep us from our provider by talking."""
    carrier.shown = [wrong_signer(provider), someone_else(provider), mangled(provider), provider.hello()]
    await Meeting(plugged(tmp_path, carrier)).meet()


async def test_an_acceptance_of_another_meeting_is_refused_by_name(provider, carrier, tmp_path):
    """Would catch a replayed acceptance: it must sign the challenge that holds our own nonce."""
    provider.accepting = False
    plug = plugged(tmp_path, carrier)
    meeting = asyncio.create_task(Meeting(plug).meet())
    await eventually(lambda: provider.presented)
    carrier.say(provider.accept(b"\x66" * 32))
    with pytest.raises(Refused) as refused:
        await meeting
    assert refused.value.reason == "wrong_challenge"
    assert plug.errand.accepted is None


async def test_an_acceptance_by_a_stranger_is_refused_by_name(provider, carrier, tmp_path):
    """Would catch a relay that accepts in the provider's name."""
    provider.accepting = False
    plug = plugged(tmp_path, carrier)
    meeting = asyncio.create_task(Meeting(plug).meet())
    await eventually(lambda: provider.presented)
    carrier.say(provider.accept(plug.errand.presented.challenge, key=STRANGER))
    with pytest.raises(Refused) as refused:
        await meeting
    assert refused.value.reason == "wrong_signer"


async def test_nobody_at_the_plug_is_said_with_a_remedy(provider, carrier, tmp_path):
    """Would catch a traceback, or silence, when the provider is simply not there."""
    carrier.shown = []
    carrier.trouble = "connection refused"
    with pytest.raises(Transient, match=r"shows no Hello at the plug \(connection refused\)") as nobody:
        await Meeting(plugged(tmp_path, carrier)).meet()
    assert nobody.value.remedy


# ---- ports


async def test_with_two_ports_somebody_must_say_which(provider, carrier, tmp_path):
    """Would catch a presentation at the neighbour's plug: our car would get nothing, the session would be bound."""
    right = replace(provider, port="right", nonce=50)
    carrier.shown = [provider.hello(), right.hello()]
    provider.hellos += right.hellos
    with pytest.raises(Refused, match="which_port") as refused:
        await Meeting(plugged(tmp_path, carrier)).meet()
    assert "--port" in refused.value.remedy


async def test_the_named_port_is_the_one_presented_at(provider, carrier, tmp_path):
    """Would catch a port name that is only for show."""
    right = replace(provider, port="right", nonce=50, hellos=provider.hellos)
    carrier.shown = [provider.hello(), right.hello()]
    await Meeting(plugged(tmp_path, carrier), "right").meet()
    (present,) = (decode(data) for data in provider.presented)
    assert present.charger_id == rules.charger_id("right")


# ---- the code at the plug


@pytest.mark.parametrize(
    ("forge", "reason"),
    [
        (someone_else, "wrong_provider"),
        (wrong_signer, "wrong_signer"),
        (relabelled, "wrong_signer"),
        (expired, "stale_hello"),
        (mangled, "bad_signature"),
    ],
)
async def test_a_code_stuck_over_the_right_one_is_refused_by_name_before_anybody_is_asked(
    forge, reason, provider, carrier, tmp_path
):
    """Would catch a QR overlay that gets a token, though the true provider is within reach: what the driver points at counts."""
    plug = plugged(tmp_path, carrier)
    with pytest.raises(Refused) as refused:
        await Meeting(plug, scanned=encode(forge(provider))).meet()
    assert refused.value.reason == reason
    assert "the code you scanned" in refused.value.detail
    assert provider.presented == []
    assert carrier.asked == 0


@pytest.mark.parametrize(
    "text", [b"https://pay.example/now", b"{}", b"\xff", b'{"type":"stop"}', b"x" * 100_000]
)
async def test_a_code_that_is_no_hello_opens_nothing(text, provider, carrier, tmp_path):
    """Would catch an app that follows what a sticker says."""
    with pytest.raises(Refused) as refused:
        await Meeting(plugged(tmp_path, carrier), scanned=text).meet()
    assert refused.value.reason == "malformed"
    assert "opens no address" in refused.value.remedy
    assert (provider.presented, carrier.asked) == ([], 0)


async def test_the_scanned_code_says_which_port(provider, carrier, tmp_path):
    """Would catch a driver who must type a name although the code was scanned, or is sent to the neighbour's plug."""
    right = replace(provider, port="right", nonce=50, hellos=provider.hellos)
    carrier.shown = [provider.hello(), right.hello()]
    await Meeting(plugged(tmp_path, carrier), scanned=encode(right.hello())).meet()
    (present,) = (decode(data) for data in provider.presented)
    assert present.charger_id == rules.charger_id("right")


async def test_a_scanned_code_still_says_which_port_when_the_chain_told_our_session_anew(
    provider, carrier, tmp_path
):
    """Would catch a driver who is sent back to the charger's screen by a reorg, twenty minutes into the charge."""
    plug = plugged(tmp_path, carrier)
    scanned = encode(provider.hello())
    plug.journal.write(Presented(NOW_S, b"{}", bytes(32)))
    again = replace(plug.terms, token=b"\x0a" * 32)
    plug.journal.write(Matched(NOW_S, again))
    provider.now_s += 1_000
    plug.chain.at_s += 1_000
    plug.terms = provider.terms = again
    await Meeting(plug, scanned=scanned).meet()
    assert len(provider.presented) == 1


async def test_an_operator_named_since_is_believed(provider, carrier, tmp_path):
    """Would catch a list of signers that is read once and never again."""
    chain = PlayedChain(signers_now=frozenset({provider.terms.provider}))
    plug = plugged(tmp_path, carrier, chain)
    carrier.shown = [provider.hello()]
    meeting = asyncio.create_task(Meeting(plug).meet())
    await eventually(lambda: chain.asked == 1)
    chain.signers_now = frozenset({provider.terms.provider, OPERATOR.address})
    carrier.shown = [provider.hello()]
    plug._signers_at_ms = None  # ten seconds later
    await meeting
