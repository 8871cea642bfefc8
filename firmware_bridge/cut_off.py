"""The last resort: a program that opens an external contactor, where the configuration names one.

May not know: which charger, sessions, the agent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from firmware_bridge.charger import BridgeError

CUT_OFF_S = 5.0  # an external cut-off that takes longer has failed


async def run_cut_off(name: str | None, command: Sequence[str]) -> None:
    """Run the command; nothing happens where there is none. `name`: what people call the contactor.

    Raises BridgeError `cut_off_failed` when the program is missing, fails, or takes longer than CUT_OFF_S.
    """
    if not command:
        return
    called = name or command[0]
    try:
        process = await asyncio.create_subprocess_exec(*command)
    except OSError as exc:
        raise BridgeError("cut_off_failed", f"{called}: {exc.strerror}; open the breaker by hand") from exc
    try:
        code = await asyncio.wait_for(process.wait(), CUT_OFF_S)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise BridgeError("cut_off_failed", f"{called} took too long; open the breaker by hand") from None
    if code != 0:
        raise BridgeError("cut_off_failed", f"{called} ended with {code}; open the breaker by hand")
