"""Messages by way of an MQTT broker (PROTOCOL section 6).

Rules
* We publish to `v2v/1/{evp}/in/{sref}` and read `v2v/1/{evp}/out/{sref}` and `v2v/1/{evp}/hello/+`; {evp} is the
  provider's address, 0x and lowercase. QoS 1 both ways. Hellos are retained: subscribing again brings them again.
* A clean session each time: the protocol repeats what matters, so the broker need not remember us.
* The broker's "wrong user name or password" is a human's work (`Misconfigured`), as long as it never let us in; everything
  else comes back. A subscription refused or a message not acknowledged is a broken connection, whatever TCP says.

May not know: what messages mean.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Self

import aiomqtt

from agent.consumer.carrier import CONNECT_TIMEOUT_S, Backoff, Inbox, Kind
from agent.core.messages import MESSAGE_BYTES_MAX
from agent.core.units import Address, hex0x
from agent.errors import Misconfigured, Transient
from agent.mqtt_client import BrokerAddress as Broker
from agent.mqtt_client import Heard, new_client, subscribe

PUBLISH_TIMEOUT_S = 5.0  # a broker that takes and never acknowledges
ENTER_TRIES = 3  # a broker that just restarts is back by then; nobody waits longer to hear that it is down
STEADY_S = 10.0  # only a connection that lived this long resets the wait: a broker may let us in and throw us out again
NOT_AUTHORISED = (4, 5)  # CONNACK return codes of MQTT 3.1.1: bad user name or password, not authorised

__all__ = ["Broker", "MqttCarrier"]


class MqttCarrier:
    """One consumer's way over one broker."""

    def __init__(self, broker: Broker, sref: str) -> None:
        self.trouble = ""
        self._broker, self._sref = broker, sref
        self._inbox = Inbox()
        self._client: aiomqtt.Client | None = None
        self._root = ""
        self._broken = asyncio.Event()  # somebody found out that this connection carries nothing
        self._was_in = False
        self._tried = asyncio.Event()  # connected, or ENTER_TRIES times not
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._task = asyncio.create_task(self._stay_connected(), name="consumer-mqtt")
        tried = asyncio.create_task(self._tried.wait())
        await asyncio.wait(
            {self._task, tried}, timeout=CONNECT_TIMEOUT_S, return_when=asyncio.FIRST_COMPLETED
        )
        tried.cancel()
        if self._client is not None:
            return self
        ended = self._task
        await self.__aexit__()
        if not ended.cancelled() and (problem := ended.exception()) is not None:
            raise problem
        raise Transient(
            f"the MQTT broker at {self._broker.host}:{self._broker.port} cannot be reached ({self.trouble})",
            remedy="is it running, is [mqtt] url right, is there a network? A provider nearby also answers by [http]",
        )

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def meet(self, provider: Address) -> None:
        """Subscribe to this provider's answers and Hellos."""
        self._root = f"v2v/1/{hex0x(provider)}"
        await self._subscribe()

    async def ask_hello(self) -> None:
        """Subscribe again, which makes the broker send the retained Hellos again."""
        await self._subscribe()

    async def post(self, kind: Kind, data: bytes) -> None:
        """Publish; the message says itself what kind it is."""
        assert self._root, "meet a provider first"
        if self._client is None:
            return  # away; `trouble` says why, and the caller posts again
        with self._noted():
            await self._client.publish(
                f"{self._root}/in/{self._sref}", data, qos=1, timeout=PUBLISH_TIMEOUT_S
            )

    async def next(self, timeout_s: float) -> bytes | None:
        """The next message of the provider's topics."""
        if self._task is not None and self._task.done():
            self._task.result()  # Misconfigured: nobody will ever answer
        return await self._inbox.next(timeout_s)

    # ---- the connection

    async def _stay_connected(self) -> None:
        backoff = Backoff()
        while True:
            try:
                async with self._new_client() as client:
                    self._broken.clear()
                    await self._listen_to(client)  # before anybody uses it
                    self._client, self.trouble, self._was_in = client, "", True
                    self._tried.set()
                    began_s = asyncio.get_running_loop().time()
                    await self._until_broken(client)
                    if asyncio.get_running_loop().time() - began_s > STEADY_S:
                        backoff.reset()
            except aiomqtt.MqttError as problem:
                self.trouble = str(problem) or type(problem).__name__
                self._refuse_if_unwelcome(problem)
                if backoff.tries + 1 >= ENTER_TRIES:
                    self._tried.set()
            finally:
                self._client = None
            await asyncio.sleep(backoff.next_s())

    def _new_client(self) -> aiomqtt.Client:
        return new_client(self._broker, Heard(), timeout_s=CONNECT_TIMEOUT_S)

    async def _until_broken(self, client: aiomqtt.Client) -> None:
        tasks = [asyncio.create_task(self._listen(client)), asyncio.create_task(self._broken.wait())]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            payload = message.payload
            is_for_us = self._is_ours(message.topic.value)
            if is_for_us and isinstance(payload, bytes) and 0 < len(payload) <= MESSAGE_BYTES_MAX:
                self._inbox.put(payload)

    def _is_ours(self, topic: str) -> bool:
        """A broker may bring what nobody asked for (amqtt does: what it retains for others)."""
        return topic == f"{self._root}/out/{self._sref}" or topic.startswith(f"{self._root}/hello/")

    async def _subscribe(self) -> None:
        if self._client is not None:
            with self._noted():
                await self._listen_to(self._client)

    async def _listen_to(self, client: aiomqtt.Client) -> None:
        if self._root:
            await subscribe(client, f"{self._root}/out/{self._sref}", f"{self._root}/hello/+")

    @contextlib.contextmanager
    def _noted(self) -> Iterator[None]:
        try:
            yield
        except aiomqtt.MqttError as problem:
            self.trouble = str(problem) or type(problem).__name__
            self._broken.set()

    def _refuse_if_unwelcome(self, problem: aiomqtt.MqttError) -> None:
        if not self._was_in and isinstance(problem, aiomqtt.MqttCodeError) and problem.rc in NOT_AUTHORISED:
            raise Misconfigured(
                f"the MQTT broker at {self._broker.host}:{self._broker.port} does not let us in: {problem}",
                remedy="check [mqtt] username and password_credential",
            ) from problem
