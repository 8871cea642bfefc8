"""The evening's own parts: what a seed fixes, and what is said when something does not come to its end.

The whole evening, with everybody in processes of their own, is told in tests/e2e/test_evening.py.
"""

import asyncio
import random
import re
from io import StringIO

import aiomqtt
import pytest

from agent.core.units import hex0x
from agent.demo import evening as the_evening
from agent.demo.broker import Broker
from agent.demo.evening import PROVIDERS, EveningSettings, EveningSummary, evening
from agent.demo.screen import Screen
from agent.errors import Transient


def test_a_seed_fixes_the_cars_and_the_meters():
    """Would catch an evening that cannot be seen again, or one that is the same for every seed."""

    def plants(seed):
        dice = random.Random(seed)
        return [the_evening._simulator(dice).config.plant for _ in PROVIDERS]

    assert plants(1) == plants(1)
    assert plants(1) != plants(2)
    for plant in plants(3):
        assert plant.register_mwh_begin % 1000 == 0
        assert plant.ev_lag_ms <= 1_000  # a quick car: the evening must fit a minute
        assert plant.soc_permille_begin > 200  # above the owner's reserve


def test_a_summary_has_every_figure_that_was_promised():
    """Would catch a renamed key, which somebody's script reads."""
    names = set(EveningSummary.__slots__)
    promised = {
        *("energy_wh_ordered", "energy_wh_delivered", "energy_wh_settled", "cost_wei", "provider_gain_wei"),
        *("consumer_cost_wei", "stage", "stop_reason", "settlement_tx", "seconds"),
    }
    assert promised <= names


async def test_an_evening_that_hangs_ends_with_the_agents_last_words(tmp_path, monkeypatch):
    """Would catch a demo that hangs for ever, and one that ends without a hint where to look."""
    monkeypatch.setattr(the_evening, "EVENING_TIMEOUT_S", 1.0)
    folder = tmp_path / "alice"
    folder.mkdir()
    (folder / "agent.log").write_text("".join(f"line {number}\n" for number in range(100)))
    with pytest.raises(Transient) as problem:
        await evening(EveningSettings(tmp_path), Screen(StringIO()))
    assert "within 1 s" in problem.value.message
    words = problem.value.remedy
    assert "alice/agent.log" in words
    assert re.findall(r"^line (\d+)$", words, re.MULTILINE) == [str(number) for number in range(80, 100)]


ALICE, BOB = b"\xaa" * 20, b"\xbb" * 20


async def said(broker, provider, word):
    """As an agent does, and as its will does."""
    async with aiomqtt.Client(broker.host, broker.port) as client:
        await client.publish(f"v2v/1/{hex0x(provider)}/online", word, qos=1, retain=True)


async def test_the_thief_waits_until_everybody_is_at_home(tmp_path):
    """Would catch a thief who knocks where nobody hears yet, and takes the silence for a success."""
    async with Broker() as broker:
        await said(broker, ALICE, "online")
        await said(broker, BOB, "offline")
        waiting = asyncio.create_task(the_evening._until_online(broker, [ALICE, BOB], tmp_path))
        done, _ = await asyncio.wait([waiting], timeout=0.5)
        assert not done
        await said(broker, BOB, "online")
        async with asyncio.timeout(10):
            await waiting


async def test_an_agent_that_does_not_come_up_is_said_with_its_last_words(tmp_path, monkeypatch):
    """Would catch an evening that waits for the dead."""
    monkeypatch.setattr(the_evening, "AGENT_READY_TIMEOUT_S", 1.0)
    folder = tmp_path / "bob"
    folder.mkdir()
    (folder / "agent.log").write_text("no such charger\n")
    async with Broker() as broker:
        await said(broker, ALICE, "online")
        with pytest.raises(Transient) as problem:
            await the_evening._until_online(broker, [ALICE, BOB], tmp_path)
    assert "online within 1 s" in problem.value.message
    assert "no such charger" in problem.value.remedy
