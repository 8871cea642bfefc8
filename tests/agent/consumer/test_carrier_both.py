"""Several ways at once: one that stands is enough, and one that hangs makes nobody wait."""

import asyncio

import pytest
from scripted_provider import OWNER, eventually

from agent.consumer.carrier import Inbox
from agent.consumer.carrier_both import BothCarrier
from agent.errors import Misconfigured, Transient


class Way:
    """A carrier played by hand. `down` raises at the door; `hanging` never finishes a post."""

    def __init__(self, *, down=None, hanging=False):
        self.trouble, self.down, self.hanging = "", down, hanging
        self.inbox, self.done, self.opened = Inbox(), [], 0

    def __call__(self):
        """Stands for what makes it, too."""
        return self

    async def __aenter__(self):
        self.opened += 1
        if self.down is not None:
            raise self.down
        return self

    async def __aexit__(self, *_):
        pass

    async def meet(self, provider):
        """Remembered."""
        self.done.append(("meet", provider))

    async def ask_hello(self):
        """Remembered."""
        self.done.append("hello")

    async def post(self, kind, data):
        """Remembered, or never finished."""
        self.done.append((kind, data))
        if self.hanging:
            await asyncio.Event().wait()

    async def next(self, timeout_s):
        """What a test put there; a Misconfigured is raised."""
        data = await self.inbox.next(timeout_s)
        if isinstance(data, Exception):
            raise data
        return data


async def test_what_is_said_goes_out_on_both_and_what_comes_is_heard_from_both():
    """Would catch a way that is open and not used."""
    one, two = Way(), Way()
    async with BothCarrier([one, two]) as both:
        await both.meet(OWNER.address)
        await both.ask_hello()
        await both.post("present", b"data")
        for way in (one, two):
            await eventually(
                lambda way=way: way.done == [("meet", OWNER.address), "hello", ("present", b"data")]
            )
        one.inbox.put(b"from one")
        assert await both.next(30) == b"from one"
        two.inbox.put(b"from two")
        assert await both.next(30) == b"from two"


async def test_a_way_that_hangs_makes_nobody_wait_and_keeps_only_the_newest():
    """Would catch a car that is out of reach by HTTP and slows down every receipt over the broker."""
    well, ill = Way(), Way(hanging=True)
    async with BothCarrier([well, ill]) as both, asyncio.timeout(30):
        for number in range(50):
            await both.post("receipt", b"%d" % number)
            await eventually(lambda number=number: ("receipt", b"%d" % number) in well.done)
        assert ill.done == [("receipt", b"0")]
        assert both._ways[1]._posts == {"receipt": b"49"}


async def test_one_way_is_enough_and_the_other_is_tried_again():
    """Would catch a consumer that needs its broker although it stands at the plug; and one that forgets the broker."""
    away = Way(down=Transient("no broker"))
    well = Way()
    async with BothCarrier([away, well]) as both:
        await both.meet(OWNER.address)
        assert both.trouble == ""
        well.trouble = "gone too"
        assert both.trouble == "no broker; gone too"
        away.down = None
        await eventually(lambda: ("meet", OWNER.address) in away.done)
        assert both.trouble == ""


async def test_a_way_that_breaks_for_good_is_no_end_while_another_stands():
    """Would catch a broker's "wrong password" that ends a session which the web server serves."""
    one, two = Way(), Way()
    async with BothCarrier([one, two]) as both:
        await eventually(lambda: one.opened and two.opened)
        one.down = Misconfigured("wrong password")
        one.inbox.put(Misconfigured("wrong password"))
        await eventually(lambda: both._ways[0].problem is not None)
        two.inbox.put(b"still here")
        assert await both.next(30) == b"still here"


@pytest.mark.parametrize("kinds", [(Transient, Transient), (Transient, Misconfigured)])
async def test_without_any_way_the_reason_is_said(kinds):
    """Would catch an auction that is begun with no way to the plug, and a human who is told to wait for what only he can mend."""
    with pytest.raises(kinds[-1]):
        async with BothCarrier([Way(down=kind("no")) for kind in kinds]):
            pass
