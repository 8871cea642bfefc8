"""Whether it is our car: what its counter's file says, and what a driver types."""

import asyncio
import io
import os
import sys
from types import SimpleNamespace

import fair as fair_trade
import pytest

from agent.cli.consumer import _Screen
from agent.cli.own_car import answered, own_meter, question
from agent.consumer.policy import SigningLimits


def test_the_cars_own_counter_is_read_from_its_file(tmp_path):
    """Would catch half a number, or something else in that file, taken for energy our car received."""
    file = tmp_path / "own_meter.txt"
    read = own_meter(file)
    assert read() is None
    for text, register_wh in (
        ("12345\n", 12_345),
        ("", None),
        ("-3", None),
        ("12.5", None),
        ("9" * 400, None),
    ):
        file.write_text(text)
        assert read() == register_wh
    file.write_bytes(b"\xff\xfe")
    assert read() is None
    assert own_meter(None)() is None


@pytest.fixture
def keyboard(monkeypatch):
    """Somebody types: a terminal whose other end is the test's."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs) as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        yield lambda line: os.write(ours, line)
    os.close(ours)


@pytest.mark.parametrize(
    ("line", "confirmed"), [(b"\n", True), (b"y\n", True), (b"n\n", False), (b"what?\n", False)]
)
async def test_a_line_typed_is_the_drivers_answer(keyboard, line, confirmed):
    """Would catch a "no" taken for a yes, and a question that nobody can answer."""
    journey = SimpleNamespace(stop=asyncio.Event(), confirmed=asyncio.Event())
    with answered(journey, SimpleNamespace(asking=True)):
        keyboard(line)
        await asyncio.wait_for((journey.confirmed if confirmed else journey.stop).wait(), 30)
    assert journey.confirmed.is_set() is confirmed


async def test_what_was_typed_before_the_question_is_no_answer(keyboard):
    """Would catch an Enter from the auction that lets a stranger's car be charged."""
    journey, screen = (
        SimpleNamespace(stop=asyncio.Event(), confirmed=asyncio.Event()),
        SimpleNamespace(asking=False),
    )
    with answered(journey, screen):
        keyboard(b"\n")
        await asyncio.sleep(0.2)  # the reader takes it, and drops it
        assert not journey.confirmed.is_set()
        screen.asking = True
        keyboard(b"\n")
        await asyncio.wait_for(journey.confirmed.wait(), 30)


def test_who_cannot_type_is_told_what_to_do_instead(keyboard, monkeypatch):
    """Would catch a script that waits for ever for an Enter that nobody can give."""
    assert "Enter: yes" in question()
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    assert "--confirmed" in question()


async def test_the_end_of_the_typing_is_no_answer(keyboard):
    """Would catch Ctrl-D taken for Enter."""
    journey = SimpleNamespace(stop=asyncio.Event(), confirmed=asyncio.Event())
    with answered(journey, SimpleNamespace(asking=True)):
        keyboard(b"\x04")
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(30):
            while sys.stdin.fileno() in loop._selector.get_map():  # noqa: ASYNC110 - nobody announces it
                await asyncio.sleep(0.01)
    assert not journey.confirmed.is_set()
    assert not journey.stop.is_set()


async def test_a_whole_purchase_with_a_question_in_it(keyboard, tmp_path, monkeypatch):
    """Would catch a question that is shown and an answer that nobody hears: on the chain, with the journey as it is shipped."""
    monkeypatch.setattr(fair_trade, "QUICK", SigningLimits(step_wh=1_000))
    async with fair_trade.Fair(tmp_path) as fair:
        fair.told = screen = _Screen()
        buying = fair.buys()
        await fair.offers()
        with answered(fair.journey, screen):
            await fair.delivers(25)
            fair.carrier.say(fair.script.reading(60))
            await fair.until(lambda: screen.asking)
            assert fair.script.acked_wh == 25
            keyboard(b"\n")
            await fair.until(lambda: fair.script.acked_wh == 60)
        await fair.settles()
        assert (await buying).energy_wh_settled == 60
