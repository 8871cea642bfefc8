"""web3's WebSocket to an Ethereum node, without five of its habits. The only module that imports web3's
provider.

What web3 8 does by itself, and why each would hurt a car (tests/assumptions/test_web3.py shows them):
* waiting for an answer spins the event loop at full load until it comes (ten seconds of it in a tunnel);
* an error that answers a request made without its method layer kills the listener, and so the connection;
* 500 unread notifications block every answer behind them;
* a polite close ends everything without an exception;
* sending goes through `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that comes as the sending is done:
  a daemon told to stop would then go on.
So answers and notifications are taken at the public hook where web3 reads the socket (`socket_recv`):
answers go to whoever waits, notifications to a callback that must not block, and every end, loud or silent,
is an end with a reason.

May not know: methods, blocks, contracts.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, NoReturn

from web3 import WebSocketProvider
from web3.exceptions import PersistentConnectionClosedOK, ProviderConnectionError
from web3.types import RPCEndpoint
from websockets.exceptions import ConnectionClosed, WebSocketException
from websockets.frames import CloseCode

from agent.chain.rpc import (
    AnswerTooLarge,
    Json,
    Limits,
    SlowAnswer,
    nonsense,
    parse,
    result_of,
    shown,
    unreachable,
)
from agent.errors import Transient


class _CalmProvider(WebSocketProvider):
    """One connection, from `connect` to its end. Never reused."""

    def __init__(self, url: str, limits: Limits, on_notification: Callable[[Json], None]) -> None:
        super().__init__(
            url,
            websocket_kwargs={
                "open_timeout": limits.connect_timeout_s,
                "ping_interval": limits.ping_interval_s,
                "ping_timeout": limits.ping_timeout_s,
                "close_timeout": limits.close_timeout_s,
                "max_size": limits.answer_bytes,
                "proxy": None,  # a local node must not be asked through a proxy of the environment
            },
            request_timeout=limits.request_timeout_s,
            max_connection_retries=1,  # trying again is the supervisor's work, at its own pace
        )
        self._on_notification = on_notification
        self._waiting: dict[Any, asyncio.Future[Json]] = {}
        self.ended: asyncio.Future[Transient] = asyncio.get_running_loop().create_future()

    async def ask(self, method: str, params: list[Json]) -> Json:
        """The whole answer object."""
        request = self.form_request(RPCEndpoint(method), params)
        answer: asyncio.Future[Json] = asyncio.get_running_loop().create_future()
        self._waiting[request["id"]] = answer
        try:
            assert self._ws is not None
            await self._ws.send(self.encode_rpc_dict(request).decode())  # the caller limits the time
            return await answer
        finally:
            del self._waiting[request["id"]]
            if answer.done() and not answer.cancelled():
                answer.exception()  # the connection ended while we were still sending: that error is the one to raise

    async def socket_recv(self) -> NoReturn:
        """Read until the connection ends. web3's listener task calls this once."""
        reason: BaseException | str = "closed by us"
        try:
            while True:
                assert self._ws is not None
                self._deliver(parse(await self._ws.recv()))
        except ConnectionClosed as closed:
            reason = closed
            raise PersistentConnectionClosedOK(user_message="connection ended") from closed
        except ValueError as problem:  # not JSON
            reason = problem
            raise PersistentConnectionClosedOK(user_message="not JSON") from problem
        finally:
            self._end(reason)

    def _deliver(self, message: Json) -> None:
        if not isinstance(message, dict):
            return  # we send no batches, so nobody waits for a list
        if message.get("method") == "eth_subscription":
            self._on_notification(message)
            return
        asked = message.get("id")
        answer = self._waiting.get(asked) if isinstance(asked, int) else None
        if answer is not None and not answer.done():
            answer.set_result(message)

    def _end(self, reason: BaseException | str) -> None:
        end: Transient = unreachable(str(self.endpoint_uri), reason)
        if isinstance(reason, ValueError):
            end = nonsense(str(self.endpoint_uri), "not JSON")
        elif (
            isinstance(reason, ConnectionClosed)
            and reason.sent
            and reason.sent.code == CloseCode.MESSAGE_TOO_BIG
        ):
            end = AnswerTooLarge(
                f"the Ethereum node at {shown(str(self.endpoint_uri))} answered too much at once"
            )
        if not self.ended.done():
            self.ended.set_result(end)
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(end)


class WebSocketWire:
    """Requests over one WebSocket; opened when first needed and again after it ended. Notifications go to a
    callback, which must return at once.
    """

    def __init__(
        self, url: str, limits: Limits, on_notification: Callable[[Json], None] = lambda _message: None
    ) -> None:
        self.url = url
        self._limits = limits
        self._on_notification = on_notification
        self._provider: _CalmProvider | None = None
        self._opening = asyncio.Lock()

    async def open(self) -> asyncio.Future[Transient]:
        """Connect, if there is no connection. The future resolves to the reason when this connection ends."""
        async with self._opening:
            if self._provider is None or self._provider.ended.done():
                await self._drop()
                provider = _CalmProvider(self.url, self._limits, self._on_notification)
                try:
                    async with asyncio.timeout(self._limits.connect_timeout_s):
                        await provider.connect()
                except (ProviderConnectionError, WebSocketException, OSError) as problem:
                    raise unreachable(self.url, problem.__cause__ or problem) from problem
                self._provider = provider
            return self._provider.ended

    async def request(self, method: str, params: list[Json]) -> Json:
        """One question, one answer."""
        await self.open()
        provider = self._provider
        assert provider is not None
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                answer = await provider.ask(method, params)
        except TimeoutError as problem:
            raise SlowAnswer(
                f"the Ethereum node at {shown(self.url)} did not answer {method} in time"
            ) from problem
        except (WebSocketException, ProviderConnectionError, OSError) as problem:
            raise unreachable(self.url, problem) from problem
        if not isinstance(answer, dict):
            raise nonsense(self.url, "not an object")
        return result_of(answer, self.url)

    async def close(self) -> None:
        """Give the connection back."""
        async with self._opening:
            await self._drop()

    async def _drop(self) -> None:
        provider, self._provider = self._provider, None
        if provider is not None:
            await provider.disconnect()
