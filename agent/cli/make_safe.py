"""`v2v provider make-safe`: stop every charger of a settings file, and see it open. What systemd runs when the agent ended.

Rules
* It needs a settings file whose `[[ports]]` are right, and nothing else: no journal (and so not its lock), chain or key, and no
  other table of the file. Whoever broke the agent must not have broken this too.
* Stop first, look afterwards. What still flows then is locked, as firmly as the device can, and cut off where the settings
  name a program for that.
* It ends in time, whatever the wires do: systemd waits for it before it starts the agent again. All ports at once, each as often
  as fits, because a charger may keep a dead agent's connection for seconds before it takes ours.

May not know: sessions. A lock set here is undone by the agent's next `arm`, which looks into its journal first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import click

from agent.cli.charger_errors import said_by_charger
from agent.config import PortConfig, load_ports
from agent.errors import AgentError, Misconfigured, Refused, Transient
from firmware_bridge.charger import BridgeError, Charger, MapError
from firmware_bridge.mapped_charger import ChargerConfig
from firmware_bridge.modbus import Buses
from firmware_bridge.opening import open_to_stop

SECONDS_MAX: Final = 9.0  # and one to let go of the wire
AGAIN_S: Final = 0.25  # between two looks; the wire's own time-outs come on top
LOCK_AFTER_S: Final = 3.0  # as the core has it: what flows for longer did not obey
NOT_SEEN_OPEN: Final = Refused("not_seen_open", "it was told to stop, and locked, and is not seen open")
BREAKER: Final = (
    "its own failsafe opens it if the agent had armed that; make sure, or open the breaker by hand"
)


async def make_all_safe(config_file: Path, environ: Mapping[str, str]) -> None:
    """Stop every charger, print a line for each. Returns when all were seen open.

    Raises Refused for a charger that answers and was not seen open, else Transient for one that did not answer, else
    Misconfigured; and Misconfigured at once for a file whose ports are wrong. The message names every port that failed.
    """
    ports = load_ports(config_file, environ)
    buses = Buses()
    problems = await asyncio.gather(*(_made_safe(port, buses) for port in ports))
    failed = {
        port.name: problem for port, problem in zip(ports, problems, strict=True) if problem is not None
    }
    for port in ports:
        click.echo(f"{port.name}: {'NOT seen open' if port.name in failed else 'open'}")
    if failed:
        raise _told(failed)


def _told(failed: Mapping[str, AgentError]) -> AgentError:
    """One error about all of them. What may still flow goes before what does not answer."""
    order = (Refused, Transient, Misconfigured)
    worst = min(failed.values(), key=lambda problem: order.index(type(problem)))
    message = "; ".join(f"{name}: {problem.message}" for name, problem in failed.items())
    if isinstance(worst, Refused):
        return Refused("not_seen_open", message, remedy=BREAKER)
    return type(worst)(message, remedy=BREAKER)


async def _made_safe(port: PortConfig, buses: Buses) -> AgentError | None:
    """Stop this port until it is seen open: then None. Else, after SECONDS_MAX, what was the matter at last."""
    config = ChargerConfig.model_validate(port.charger_settings() | {"meter": None})
    problem: AgentError = Transient("it did not answer")
    charger, loop, firmly_at_s, cut_off = None, asyncio.get_running_loop(), 0.0, False
    until_s = loop.time() + SECONDS_MAX
    try:
        async with asyncio.timeout_at(until_s):
            # The clock is looked at too: a library may swallow the time-out's one cancellation.
            while loop.time() < until_s:
                try:
                    if charger is None:
                        charger = await open_to_stop(config, buses)
                        firmly_at_s = loop.time() + LOCK_AFTER_S
                    firmly = loop.time() > firmly_at_s
                    if await _is_stopped(charger, firmly=firmly):
                        return None
                    problem = NOT_SEEN_OPEN
                    if firmly and not cut_off:
                        cut_off = True
                        await charger.cut_off()
                except BridgeError as error:
                    problem = said_by_charger(error)
                except MapError as error:
                    return said_by_charger(error)
                await asyncio.sleep(AGAIN_S)
    except TimeoutError:
        pass  # `problem` says what was the matter until then
    finally:
        if charger is not None:
            await charger.close()
    return problem


async def _is_stopped(charger: Charger, *, firmly: bool) -> bool:
    """Tell it to stop; whether it is now seen open. Raises BridgeError, also for what it shows that it does not obey."""
    await (charger.lock() if firmly else charger.hold())
    return (await charger.read()).seen_open
