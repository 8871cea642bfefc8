"""Who is really there: signatures of the provider or its operator, as the chain knows it now, and nobody else's."""

import pytest
from scripted_provider import (
    OPERATOR,
    OWNER,
    STRANGER,
    MemoryCarrier,
    PlayedChain,
    ScriptedProvider,
    plugged,
    terms_of,
)

from agent.consumer.plug import Step
from agent.core.messages import Hello
from agent.errors import Refused, Transient


@pytest.fixture
def carrier():
    """A way to a provider that behaves."""
    return MemoryCarrier(ScriptedProvider(terms_of()))


async def test_owner_and_operator_are_believed_and_strangers_are_not(carrier, tmp_path):
    """Would catch a relay that signs with its own key what only our provider may sign."""
    plug = plugged(tmp_path, carrier)
    for key in (OWNER, OPERATOR):
        hello = carrier.provider.hello(key=key)
        await plug.believe(hello.typed, hello.signature)
    hello = carrier.provider.hello(key=STRANGER)
    with pytest.raises(Refused, match="wrong_signer"):
        await plug.believe(hello.typed, hello.signature)


async def test_a_signature_over_something_else_is_nobody(carrier, tmp_path):
    """Would catch a check of the signature's form only."""
    plug = plugged(tmp_path, carrier)
    one, two = carrier.provider.hello(), carrier.provider.hello()
    with pytest.raises(Refused, match="wrong_signer"):
        await plug.believe(one.typed, two.signature)


async def test_a_revoked_operator_is_nobody_any_more(carrier, tmp_path):
    """Would catch a stolen hot key that works on after its owner has revoked it, for a consumer who comes later."""
    chain = PlayedChain(signers_now=frozenset({OWNER.address}))
    hello = carrier.provider.hello()
    plug = plugged(tmp_path, carrier, chain)
    with pytest.raises(Refused, match="wrong_signer"):
        await plug.believe(hello.typed, hello.signature)


async def test_strangers_cannot_make_us_ask_the_node_for_ever(carrier, tmp_path):
    """Would catch a flood of forged messages that becomes a flood of questions to the node."""
    chain = PlayedChain()
    plug = plugged(tmp_path, carrier, chain)
    for _ in range(50):
        hello = carrier.provider.hello(key=STRANGER)
        with pytest.raises(Refused):
            await plug.believe(hello.typed, hello.signature)
    assert chain.asked == 1


async def test_a_node_that_is_away_is_no_reason_to_believe_or_to_crash(carrier, tmp_path):
    """Would catch a session that dies, or opens up, because our node restarts."""
    chain = PlayedChain(away=Transient("node away"))
    hello = carrier.provider.hello()
    plug = plugged(tmp_path, carrier, chain)
    with pytest.raises(Refused, match="signers_unknown"):
        await plug.believe(hello.typed, hello.signature)


async def test_what_is_no_message_is_noted_and_passed_over(carrier, tmp_path):
    """Would catch a stranger's bytes that end a session."""
    plug = plugged(tmp_path, carrier)
    carrier.inbox.put(b"\xff\x00nonsense")
    carrier.say(carrier.provider.hello())
    assert await plug.next(1) is None
    assert plug.odd.reason == "malformed"
    assert isinstance(await plug.next(1), Hello)


async def test_what_is_told_has_the_numbers_of_a_live_view(carrier, tmp_path):
    """Would catch a live view that shows a cost of energy we have not signed for."""
    plug = plugged(tmp_path, carrier)
    plug.say(Step.CHARGE, "flowing", power_w=11_000)
    (told,) = plug.tell
    assert (told.energy_wh_ordered, told.energy_wh_signed, told.cost_wei, told.power_w) == (200, 0, 0, 11_000)
