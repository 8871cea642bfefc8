"""Named slips in the agent, each a small change of its text: a simulator that has never failed proves nothing.

    with slipped(MUTANTS["zero confirmations"]): ...

A slip names a function and replaces words in it; the words must stand there exactly once, so that a mutant which no longer
fits the agent says so instead of silently mutating nothing.
"""

import inspect
import textwrap
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from unittest.mock import patch


@dataclass(frozen=True)
class Slip:
    """In `place` (module:name or module:Class.name) these words instead of those; a constant is simply replaced."""

    place: str
    old: str
    new: str


@contextmanager
def slipped(slips):
    """The agent, with these slips, for a while."""
    with ExitStack() as held:
        for slip in slips:
            held.enter_context(_one(slip))
        yield


def _one(slip):
    module_name, _, path = slip.place.partition(":")
    owner = module = import_module(module_name)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    there = inspect.getattr_static(owner, name)
    if isinstance(there, int):
        assert str(there) == slip.old, (slip, there)
        return patch.object(owner, name, int(slip.new))
    function = there.fget if isinstance(there, property) else there
    text = textwrap.dedent(inspect.getsource(function))
    assert text.count(slip.old) == 1, f"{slip.place}: {slip.old!r} stands there {text.count(slip.old)} times"
    made = {}
    exec(compile(text.replace(slip.old, slip.new), slip.place, "exec"), vars(module), made)  # noqa: S102 - our own text
    changed = made[function.__name__]
    patches = ExitStack()
    if module_name == "agent.core.session" and not classes:
        for table in (module._DUE, module._APPLY):
            for key, rule in table.items():
                if rule is there:
                    patches.enter_context(patch.dict(table, {key: changed}))
    patches.enter_context(patch.object(owner, name, changed))
    return patches


SESSION, SEND, WATCH, DOOR = (
    "agent.core.session:",
    "agent.runners.chain_send:",
    "agent.runners.chain_watch:",
    "agent.door:",
)

MUTANTS = {
    "broadcast before journaling": (
        Slip(
            SEND + "ChainSend._sign",
            "    if self._is_owed(effect):",
            "    await self._sender.broadcast(signed.raw_tx)\n    if self._is_owed(effect):",
        ),
    ),
    "cursor advanced before its logs": (
        Slip(
            WATCH + "ChainWatch.look",
            "    on_chain = await self._read(head)",
            "    self._looked = head\n    self._note_scanned(head, on_chain=True)\n    on_chain = await self._read(head)",
        ),
        Slip("agent.runners.chain_watch:OVERLAP_BLOCKS", "16", "-1"),
        Slip("agent.runners.chain_watch:SCAN_ROW_EVERY_BLOCKS", "64", "1"),
    ),
    "zero confirmations": (
        Slip(
            WATCH + "ChainWatch._is_deep",
            "head.number - number + 1 >= self._settings.confirmations",
            "head.number >= number",
        ),
    ),
    "orphans are not noticed": (
        Slip(
            WATCH + "ChainWatch._is_canonical",
            "return (await self._header_at(head, number)).block_hash == block_hash",
            "return True",
        ),
    ),
    "settled before it is final": (
        Slip(WATCH + "ChainWatch._recheck_ended", "elif receipt.block_number <= final_number:", "else:"),
    ),
    "begin register wrong by a Wh": (
        Slip(
            SESSION + "_delivery_began",
            "segment_mwh_begin=event.register_mwh",
            "segment_mwh_begin=event.register_mwh - 1000",
        ),
    ),
    "one kind of event is not journaled": (
        Slip(
            "agent.engine:Engine.accept",
            "self._journal.append(event)",
            "type(event).__name__ == 'ReceiptCredited' or self._journal.append(event)",
        ),
    ),
    "token acknowledged before it is journaled": (
        Slip(
            DOOR + "Door._present",
            "self._engine.accept(ev.TokenPresented(live.at_s, message.session_id, presentation))",
            "import asyncio; asyncio.get_running_loop().call_later("
            "0.5, self._engine.accept, ev.TokenPresented(live.at_s, message.session_id, presentation))",
        ),
    ),
    "receipt acknowledged before it is journaled": (
        Slip(
            DOOR + "Door._receipt",
            "    self._engine.accept(\n"
            "        ev.ReceiptCredited(self._engine.at_s, session.session_id, message.delivered_wh, ack)\n    )\n",
            "    import asyncio\n"
            "    asyncio.get_running_loop().call_later(0.9, self._engine.accept,\n"
            "        ev.ReceiptCredited(self._engine.at_s, session.session_id, message.delivered_wh, ack))\n"
            "    return AckMessage(session.session_id, message.delivered_wh)\n",
        ),
    ),
    "end intent ignored": (
        Slip(SESSION + "rematched", "S.SETTLING if session.end_intent else S.MATCHED", "S.MATCHED"),
        Slip(SESSION + "hindrance", "if session.end_intent:", "if False:"),
        Slip(
            DOOR + "Door._present",
            "(session.end_intent or session.stage in CLOSED)",
            "session.stage in CLOSED",
        ),
    ),
    "a crash resumes straight into delivering": (
        Slip(
            SESSION + "hindrance",
            "session.segment_mwh_begin is not None and session.life != live.life",
            "False",
        ),
    ),
    "receipt credited twice": (
        Slip(
            SESSION + "_receipt_credited",
            "energy_wh_acked=event.energy_wh_acked",
            "energy_wh_acked=session.energy_wh_acked + event.energy_wh_acked",
        ),
    ),
    "order cap dropped": (
        Slip(
            SESSION + "Session.register_mwh_stop",
            "energy_mwh(self.order_wh)",
            "energy_mwh(self.order_wh + 10)",
        ),
        Slip(
            SESSION + "_due_delivering",
            "session.energy_mwh(reading) >= energy_mwh(session.order_wh)",
            "session.energy_mwh(reading) >= energy_mwh(session.order_wh + 10)",
        ),
    ),
    "an orphan keeps its power": (
        Slip(
            "agent.core.book:_owed_on_port",
            "session.stage is Stage.DELIVERING",
            "session.stage in (Stage.DELIVERING, Stage.ORPHANED)",
        ),
    ),
    "a close on chain is ignored": (
        Slip(
            SESSION + "_closing_seen",
            "return replace(session, closing_at_s=event.close_at_s)",
            "return session",
        ),
    ),
    "unacknowledged energy is not limited": (
        Slip(
            SESSION + "hindrance",
            "delivered_wh - session.energy_wh_acked >= policy.max_unacked_wh[port]",
            "False",
        ),
    ),
    "the token's end is ignored": (
        Slip(
            SESSION + "hindrance",
            "live.at_s >= session.terms.valid_until_s - policy.validity_margin_s",
            "False",
        ),
        Slip(
            SESSION + "_stop_by_chain_or_time",
            "live.at_s >= session.terms.valid_until_s - live.policy.validity_margin_s",
            "live.at_s >= session.terms.valid_until_s + 600",
        ),
    ),
    "a port is not reserved": (
        Slip(
            "agent.core.book:Book.is_port_free",
            "return holder is None or holder.session_id == session.session_id",
            "return True",
        ),
    ),
    "paid less than the receipts is called settled, and less is asked": (
        Slip(
            "agent.core.book:_owed_on_chain",
            "session.energy_wh_acked, session.ack",
            "0, session.ack",
        ),
    ),
}
