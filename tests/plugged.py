"""A car at the plug of a watched agent (watched.py): who lies to that agent wants this car to be charged for nothing.

    car = PluggedCar(story, consumer)
    car.presents()
    await car.charges(60)            a second a step, a block and a look every twelve

Six lines of arithmetic for a charger, and the worst consumer for its provider: it signs every receipt at once, so credit
never stops the power; only what the chain is believed to say does.
"""

from simulation.chain import BLOCK_S
from watched import VALIDITY_S

from agent.core import events as ev
from agent.core.effects import Deliver
from agent.core.live import PortRead, PortReading
from agent.core.token import NO_ACK, ZERO_ADDRESS

PORT, POWER_W, REGISTER_MWH = "left", 7_200, 5_000_000  # 2 Wh a second: easy to reckon with


class PluggedCar:
    """`delivered_wh` is what truly flowed."""

    def __init__(self, story, consumer):
        self.story, self.consumer, self.mwh = story, consumer, 0

    @property
    def delivered_wh(self):
        """Since it was plugged in."""
        return self.mwh // 1000

    @property
    def is_powered(self):
        """The agent owes it power just now."""
        return any(isinstance(effect, Deliver) for effect in self.story.engine.owed())

    def presents(self):
        """The token it has now, as the door would take it."""
        engine, token = self.story.engine, self.story.token_of(self.consumer)
        sid = self.story.session_of(self.consumer).session_id
        grant = ev.Presentation(
            "phone", PORT, "eip191", token, ZERO_ADDRESS, 0, engine.at_s + VALIDITY_S, bytes(32), token, token
        )
        engine.accept(ev.TokenPresented(engine.at_s, sid, grant))

    async def charges(self, seconds):
        """So many seconds pass for charger, car and chain. Returns the Wh that flowed in them."""
        before = self.delivered_wh
        for second in range(seconds):
            self._second()
            if second % BLOCK_S == BLOCK_S - 1:
                self.story.mines(1)
                await self.story.looks()
        return self.delivered_wh - before

    def _second(self):
        story, powered = self.story, self.is_powered
        story.now_ms += 1_000
        self.mwh += POWER_W * 1_000 // 3_600 if powered else 0
        session = story.session_of(self.consumer)
        reading = PortReading(
            story.now_ms,
            REGISTER_MWH + self.mwh,
            POWER_W if powered else 0,
            "C" if powered else "B",
            not powered,
        )
        story.engine.observe(PortRead(PORT, reading, armed=True))
        if session is not None and session.energy_wh_acked < self.delivered_wh:
            story.engine.accept(
                ev.ReceiptCredited(story.engine.at_s, session.session_id, self.delivered_wh, NO_ACK)
            )
