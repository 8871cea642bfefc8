"""The owner's own door: a unix socket on this computer, one JSON line in, one out.

    {"ask":"status"}                                                          -> {"status":{...}}   as /status.json
    {"ask":"bid","provider":"0x..","consumer":"0x..","auction_nonce":7,"rate_wei_per_kwh":"5"}   -> {"bid":{"tx":"0x..",...}}
    whatever is refused                                                       -> {"refused":{"reason","detail","remedy"}}

A bid asked for here is journaled first (`BidDecided`); the sender looks at auction and purse, signs with the operator's key,
journals, broadcasts; then its hash is answered, or the name of its refusal. The same bid asked for twice is one bid: whoever
was cut off asks again.

Rules
* Who asks is told by the kernel (SO_PEERCRED), not by the message. The socket is 0660: the group may ask for the status; only
  root and the agent's own user may bind money.
* Sizes, times, places and the rate are limited: a script gone wild gets refusals, not bids.
* It may be absent: a directory that cannot hold a socket is said, and the agent goes on. Money and safety never depend on it.

May not know: the chain, keys, what a bid costs.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import struct
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import structlog

from agent import views
from agent.core import events as ev
from agent.core.bidding import Bid
from agent.core.token import bid_id
from agent.core.units import UINT64_MAX, UINT128_MAX, Address, BidId
from agent.engine import Engine
from agent.errors import Refused

LINE_BYTES_MAX = 1_024  # a bid is 150 bytes
PEERS_MAX = 8  # at once: each holds a file handle
SPEAK_S = 5.0  # who connects and says nothing holds a place
ANSWER_S = (
    75.0  # what is not signed and sent by then is answered as it stands; asked again, it is the same bid
)
SIGN_WITHIN_S = 60  # chain time: a bid not signed by then is given up
ASKS_A_MINUTE = 30  # of everybody together; those who may bid have a count of their own
MODE = 0o660
_PEERCRED = struct.Struct("3i")  # pid, uid, gid

log = structlog.get_logger(__name__)


class LocalRunner:
    """Serves `path`. `listening` is set once it can be asked."""

    def __init__(self, engine: Engine, path: Path) -> None:
        self._engine, self._path = engine, path
        self._talks: set[asyncio.Task[None]] = set()
        self._asked_at_ms: dict[bool, list[int]] = {
            True: [],
            False: [],
        }  # by those who may bid, and by others
        self.listening = asyncio.Event()

    async def run(self) -> NoReturn:
        """For ever: serve. Without a place for the socket: wait, having said so."""
        try:
            server = await self._listen()
        except OSError as error:
            log.warning("local.off", path=str(self._path), error=str(error))
            await asyncio.Event().wait()
            raise AssertionError("waits for ever") from error
        try:
            async with server:
                self.listening.set()
                log.info("local.up", path=str(self._path))
                try:
                    await asyncio.Event().wait()
                finally:
                    for talk in tuple(self._talks):  # from Python 3.12 on, a server waits for them
                        talk.cancel()
        finally:
            self._path.unlink(missing_ok=True)
        raise AssertionError("waits for ever")

    async def _listen(self) -> asyncio.Server:
        # The journal's lock has shown that no other agent lives: what is there was left by one that was killed.
        with suppress(FileNotFoundError):
            if stat.S_ISSOCK(self._path.lstat().st_mode):
                self._path.unlink()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        before = os.umask(0o177)  # nobody else may connect before the mode is set
        try:
            sock.bind(str(self._path))
        except BaseException:
            sock.close()
            raise
        finally:
            os.umask(before)
        self._path.chmod(MODE)
        return await asyncio.start_unix_server(self._serve, sock=sock, limit=LINE_BYTES_MAX)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One line, one answer, the end."""
        talk = asyncio.current_task()
        assert talk is not None
        self._talks.add(talk)
        try:
            answer = await self._answered(reader, may_bid=_peer_uid(writer) in (0, os.geteuid()))
            writer.write(json.dumps(answer, sort_keys=True).encode() + b"\n")
            async with asyncio.timeout(SPEAK_S):
                await writer.drain()
        except (OSError, TimeoutError) as gone:
            log.debug("local.hung_up", error=repr(gone))  # the same question again gets the same answer
        finally:
            self._talks.discard(talk)
            writer.close()
            with suppress(OSError, TimeoutError):
                await writer.wait_closed()

    async def _answered(self, reader: asyncio.StreamReader, *, may_bid: bool) -> dict[str, Any]:
        try:
            if len(self._talks) > (
                2 * PEERS_MAX if may_bid else PEERS_MAX
            ):  # others cannot keep the owner out
                raise Refused("busy", "too many ask at once")
            try:
                async with asyncio.timeout(SPEAK_S):
                    line = await reader.readline()
            except ValueError as error:  # longer than the limit
                raise Refused("malformed", f"a line has at most {LINE_BYTES_MAX} bytes") from error
            except TimeoutError as error:
                raise Refused("malformed", f"no whole line within {SPEAK_S:g} s") from error
            return await self._asked(line, may_bid=may_bid)
        except Refused as no:
            remedy = str(no).partition("\n  ")[2]
            return {"refused": {"reason": no.reason, "detail": no.detail, "remedy": remedy}}

    async def _asked(self, line: bytes, *, may_bid: bool) -> dict[str, Any]:
        self._count(may_bid=may_bid)
        question = _question(line)
        if question["ask"] == "status":
            return {"status": views.status(self._engine.book, self._engine.live)}
        if not may_bid:
            raise Refused(
                "not_yours",
                "only the agent's own user and root may bid",
                remedy="sudo, or bid with the owner's --key.",
            )
        bid = self._decided(question)
        return {"bid": views.bid(await self._outcome(bid), self._engine.live)}

    def _count(self, *, may_bid: bool) -> None:
        now_ms = self._engine.live.now_ms
        recent = [at_ms for at_ms in self._asked_at_ms[may_bid] if now_ms - at_ms < 60_000]
        self._asked_at_ms[may_bid] = recent
        if len(recent) >= ASKS_A_MINUTE:
            raise Refused(
                "rate_limited", f"at most {ASKS_A_MINUTE} questions a minute", remedy="Wait a little."
            )
        recent.append(now_ms)

    def _decided(self, question: dict[str, Any]) -> BidId:
        """Into the journal. Raises Refused when there is no view of the chain, or too much is under way."""
        provider, consumer, nonce, rate = _bid_terms(question)
        engine, key = self._engine, bid_id(consumer, nonce, rate)
        if provider != engine.book.provider:
            raise Refused("other_agent", "this agent drives for another account", remedy="Correct --config.")
        age_s = engine.live.view_age_s
        if age_s is None or age_s > engine.live.policy.max_view_age_s:
            raise Refused(
                "chain_view_stale", "the agent does not see the chain just now", remedy="Try again."
            )
        at_s = engine.at_s
        engine.accept(ev.BidDecided(at_s, key, consumer, nonce, rate, at_s + SIGN_WITHIN_S))
        bid = engine.book.bids.get(key)
        if bid is None or bid.error:
            raise Refused("busy", "other bids are still under way", remedy="Try again when they are mined.")
        return key

    async def _outcome(self, key: BidId) -> Bid:
        """The bid once it is sent or ended, or as it stands after ANSWER_S. Raises Refused when it was not placed."""
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_S):
                while not self._is_out(key):
                    changed = self._engine.changed
                    if not self._is_out(key):
                        await changed.wait()
        bid = self._engine.book.bids.get(key)
        if bid is None or bid.error:
            raise Refused("forgotten" if bid is None else bid.error)
        return bid

    def _is_out(self, key: BidId) -> bool:
        bid, tried = self._engine.book.bids.get(key), self._engine.live.tried.get(key)
        return bid is None or bid.ended or (tried is not None and tried.state == "sent")


def _peer_uid(writer: asyncio.StreamWriter) -> int:
    """Whose process speaks, by the kernel's word."""
    sock = writer.get_extra_info("socket")
    _, uid, _ = _PEERCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size))
    return int(uid)


def _question(line: bytes) -> dict[str, Any]:
    try:
        question = json.loads(line)
    except ValueError as error:
        raise Refused("malformed", "not one line of JSON") from error
    if not isinstance(question, dict) or question.get("ask") not in ("status", "bid"):
        raise Refused("malformed", 'ask "status" or "bid"')
    return question


_BID_FIELDS = {"ask", "provider", "consumer", "auction_nonce", "rate_wei_per_kwh"}


def _bid_terms(question: dict[str, Any]) -> tuple[Address, Address, int, int]:
    """Provider, consumer, auction and rate. Raises Refused("malformed") for anything but exactly these."""
    if set(question) != _BID_FIELDS:
        raise Refused("malformed", f"a bid has {', '.join(sorted(_BID_FIELDS))}")
    nonce, rate = question["auction_nonce"], question["rate_wei_per_kwh"]
    if type(nonce) is not int or not 1 <= nonce <= UINT64_MAX:
        raise Refused("malformed", "auction_nonce is no number of an auction")
    if not isinstance(rate, str) or not re.fullmatch("[1-9][0-9]{0,38}", rate) or int(rate) > UINT128_MAX:
        raise Refused("malformed", "rate_wei_per_kwh is no rate, as a decimal string")
    return _address(question, "provider"), _address(question, "consumer"), nonce, int(rate)


def _address(question: dict[str, Any], name: str) -> Address:
    value = question[name]
    if not isinstance(value, str) or not re.fullmatch("0x[0-9a-fA-F]{40}", value):
        raise Refused("malformed", f"{name} is no address")
    return Address(bytes.fromhex(value[2:]))
