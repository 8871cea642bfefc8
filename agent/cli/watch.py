"""`v2v provider watch EXPORT`: guard what a session's receipts are worth from any machine, without the car and without its keys.

The consumer may end a session on chain with fewer Wh than it signed for; whoever holds the last receipt can answer inside the
challenge window, and anybody may settle after it. The exported file holds all that is needed; the key given here only pays gas.

Rules
* Only a file that proves itself is acted on (agent/verify.py): a forged one would burn gas.
* While the session is simply open the car's agent is left alone: it settles better, in one transaction. Only a close on chain, or
  the end of the token's validity, brings this command to act.
* One look a block or so; a node that is away is asked again, until the session is over or `--hours` have passed.

May not know: the journal, the daemon.
"""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import click

from agent.chain import contract
from agent.cli.market import Access, Market, market_options, open_market, receipt_json
from agent.cli.output import at, echo, facts, json_option
from agent.core import events as ev
from agent.core.token import Ack
from agent.core.units import Address, Token, hex0x, short
from agent.errors import Misconfigured, Refused, Transient
from agent.rows import decoded
from agent.verify import FILE_BYTES_MAX, verify

LOOK_EVERY_S = 6.0  # half a block: the shortest challenge window is minutes
LOG_SPAN_BLOCKS = (
    5_000  # how far back the end of a session is looked for, in one question: every hosted node allows it
)

Step = Literal["wait", "submit", "settle", "over"]


@dataclass(frozen=True, slots=True)
class Claim:
    """What an export lets anybody claim for its provider."""

    chain_id: int
    contract: Address
    token: Token
    provider: Address
    valid_until_s: int
    energy_wh_acked: int
    ack: Ack


def claim_of(data: bytes) -> Claim:
    """The highest receipt of a file that proves itself. Raises Refused for one that does not, or that holds none."""
    failed = [f"{check.name}: {check.detail}" for check in verify(data) if not check.ok]
    if failed:
        raise Refused("not_proven", "; ".join(failed), remedy="v2v verify FILE shows every check.")
    content = json.loads(data)
    terms: ev.Terms = decoded(ev.Terms, content["terms"])
    receipts: list[ev.ReceiptCredited] = [decoded(ev.ReceiptCredited, body) for body in content["receipts"]]
    if not receipts:
        raise Refused(
            "no_receipt", "the consumer signed for nothing in this session, so there is nothing to claim"
        )
    best = max(receipts, key=lambda receipt: receipt.energy_wh_acked)
    market = content["market"]
    return Claim(
        market["chain_id"],
        Address(bytes.fromhex(market["contract"][2:])),
        terms.token,
        terms.provider,
        terms.valid_until_s,
        best.energy_wh_acked,
        best.ack,
    )


def next_step(claim: Claim, state: contract.SessionState, now_s: int) -> Step:
    """What to do about a session that looks like this at chain time `now_s`."""
    if not state.is_open:
        return "over"
    given_up = state.status is contract.SessionStatus.CLOSING or now_s >= claim.valid_until_s
    if given_up and state.claimed_wh < claim.energy_wh_acked:
        return "submit"
    return "settle" if now_s >= state.settle_at_s else "wait"


@click.command()
@click.argument("export", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option(
    "--hours", type=click.FloatRange(min=0), default=96.0, show_default=True, help="Give up after so long."
)
@click.option("--once", is_flag=True, help="One look: do what is due now, say what comes next. For a timer.")
@market_options("provider", signs=True, deploys=True)  # the file names the contract
@json_option
def watch(access: Access, export: Path, hours: float, *, once: bool, as_json: bool) -> None:
    """Guard a session without the car.

    EXPORT is a file of `v2v provider export`. Whatever account --key is of, it pays only gas: the money goes to the
    session's provider and consumer.
    """
    with export.open("rb") as file:
        claim = claim_of(file.read(FILE_BYTES_MAX + 1))
    if access.contract not in (None, claim.contract):
        raise Misconfigured(
            f"the file is of the market {hex0x(claim.contract)}, the settings are of another",
            remedy="Give --rpc, a node of the file's chain, instead of --config.",
        )
    place = replace(access, contract=claim.contract, chain_id=claim.chain_id, account=None)
    asyncio.run(_watch(place, claim, 0.0 if once else hours * 3600, as_json=as_json))


async def _watch(access: Access, claim: Claim, for_s: float, *, as_json: bool) -> None:
    until_s = time.monotonic() + for_s
    sent: list[dict[str, Any]] = []
    async with open_market(access) as market:
        while True:
            try:
                step, state = await _look(market, claim)
                if step in ("submit", "settle"):
                    sent.append(await _do(market, claim, step))
                    continue  # at most twice: what was done is not due again
            except Transient as error:
                if time.monotonic() >= until_s:
                    raise
                click.echo(f"v2v: {error.message}; asking again", err=True)
            else:
                if step == "over" or time.monotonic() >= until_s:
                    break
            await asyncio.sleep(LOOK_EVERY_S)
        ended = await _ended(market, claim) if step == "over" else None
    _tell(claim, state, ended, sent, as_json=as_json)


async def _look(market: Market, claim: Claim) -> tuple[Step, contract.SessionState]:
    state = await market.ask(contract.encode_sessions(claim.token), contract.decode_sessions)
    return next_step(claim, state, (await market.node.head()).timestamp_s), state


async def _do(market: Market, claim: Claim, step: Step) -> dict[str, Any]:
    data = contract.encode_settle(claim.token)
    if step == "submit":
        data = contract.encode_submit_receipt(claim.token, claim.energy_wh_acked, claim.ack)
    receipt = await market.send(data)
    click.echo(f"v2v: {step} {short(claim.token)}: {hex0x(receipt.tx_hash)}", err=True)
    return {"step": step, **receipt_json(receipt)}


async def _ended(market: Market, claim: Claim) -> contract.ConnectionEnded | None:
    """How the session ended, if that is recent; None for one that ended long ago."""
    newest = (await market.node.head()).number
    first, topics = max(0, newest - LOG_SPAN_BLOCKS), contract.provider_topics(claim.provider)
    for raw in await market.node.logs(claim.contract, topics, first, newest):
        log = contract.decode_log(raw.address, raw.topics, raw.data)
        if isinstance(log, contract.ConnectionEnded) and log.token == claim.token:
            return log
    return None


def _tell(
    claim: Claim,
    state: contract.SessionState,
    ended: contract.ConnectionEnded | None,
    sent: list[dict[str, Any]],
    *,
    as_json: bool,
) -> None:
    """What came of it. Raises Refused("paid_less") when the session ended below its receipts."""
    value: dict[str, Any] = {
        "token": claim.token,
        "energy_wh_acked": claim.energy_wh_acked,
        "open": state.is_open,
        "energy_wh_settled": None if ended is None else ended.delivered_wh,
        "sent": sent,
    }
    told: list[tuple[str, object]] = [
        ("session", hex0x(claim.token)),
        ("signed for", f"{claim.energy_wh_acked} Wh"),
    ]
    told += [(one["step"], hex0x(one["tx"])) for one in sent]
    if state.is_open:
        value |= {"claimed_wh": state.claimed_wh, "settle_at_s": state.settle_at_s}
        told += [
            ("claimed on chain", f"{state.claimed_wh} Wh"),
            ("anybody may settle from", at(state.settle_at_s)),
        ]
    else:
        told.append(("settled", "long ago" if ended is None else f"{ended.delivered_wh} Wh"))
    echo(value, facts(told), as_json=as_json)
    if ended is not None and ended.delivered_wh < claim.energy_wh_acked:
        raise Refused(
            "paid_less", f"{ended.delivered_wh} Wh were paid, {claim.energy_wh_acked} Wh were signed for"
        )
