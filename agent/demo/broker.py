"""An embedded MQTT broker for the demo and the tests: amqtt, on loopback, for anybody, quiet.

Rules
* Loopback only: everybody may read and write everything, which is right for one machine and wrong for any
  network. In the field the broker is mosquitto with the access list in `config/`.
* amqtt has no limit for the size of a packet (mosquitto has `max_packet_size`); on loopback nobody but
  ourselves can abuse that, and both ends of our own protocol refuse more than 4 KiB by themselves.

May not know: topics, messages, the agent.
"""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Any, Self

from agent.errors import Misconfigured

LOOPBACK = ("127.0.0.1", "localhost", "::1")
MAX_CONNECTIONS = 64  # a client that reconnects in a loop must not use up the demo's file handles


class Broker:
    """`async with Broker() as broker:` listens on `broker.host`, `broker.port` (0: any free port)."""

    def __init__(self, *, host: str = "127.0.0.1", port: int = 0) -> None:
        if host not in LOOPBACK:
            raise Misconfigured(
                f"the demo's broker lets everybody in, so it does not listen on {host}",
                remedy="Use 127.0.0.1, or install mosquitto with the access list from config/.",
            )
        self.host, self.port = host, port
        self._broker: Any = None

    async def __aenter__(self) -> Self:
        from amqtt.broker import Broker as AmqttBroker
        from amqtt.errors import BrokerError

        for noisy in ("amqtt", "transitions"):  # they report every client that leaves as an error
            logging.getLogger(noisy).setLevel(logging.CRITICAL)
        listener = {"type": "tcp", "bind": f"{self.host}:{self.port}", "max_connections": MAX_CONNECTIONS}
        for_anybody = {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
        self._broker = AmqttBroker({"listeners": {"default": listener}, "plugins": for_anybody})
        try:
            await self._broker.start()
        except BrokerError as problem:
            raise Misconfigured(
                f"the broker cannot listen on {self.host}:{self.port} ({problem.__cause__ or problem})",
                remedy="Choose another port, or 0 for any free one.",
            ) from problem
        # amqtt tells nobody which port it was given, so we look behind its door.
        self.port = self._broker._servers["default"].instance.sockets[0].getsockname()[1]  # noqa: SLF001
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._broker.shutdown()
