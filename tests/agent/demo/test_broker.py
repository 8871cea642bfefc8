"""The embedded broker: a message from one client reaches another one, and the port is ours only."""

from __future__ import annotations

import asyncio

import aiomqtt
import pytest

from agent.demo.broker import Broker
from agent.errors import Misconfigured


async def test_messages_pass_retained_ones_wait_and_wills_are_kept() -> None:
    """Would catch a broker that PROTOCOL section 6 does not work on: QoS 1, a retained Hello, the last
    will.
    """
    async with asyncio.timeout(20), Broker() as broker:
        will = aiomqtt.Will("v2v/1/p/online", "offline", qos=1, retain=True)
        async with aiomqtt.Client("127.0.0.1", broker.port, will=will) as provider:
            await provider.publish("v2v/1/p/hello/left", "hello", qos=1, retain=True)
            async with aiomqtt.Client("127.0.0.1", broker.port) as consumer:
                await consumer.subscribe("v2v/1/p/#", qos=1)
                first = await anext(consumer.messages)
                assert (str(first.topic), first.payload, first.retain) == (
                    "v2v/1/p/hello/left",
                    b"hello",
                    True,
                )
                await provider.publish("v2v/1/p/out/7", b"\x00" * 4_096, qos=1)
                assert len((await anext(consumer.messages)).payload) == 4_096
                provider._client._sock_close()  # the network is gone, no DISCONNECT is sent
                last = await anext(consumer.messages)
                assert (str(last.topic), last.payload) == ("v2v/1/p/online", b"offline")
                provider._disconnected.set_result(None)


async def test_the_port_is_free_again_afterwards() -> None:
    """Would catch a broker that keeps its port: the next story on this machine could not begin."""
    async with Broker() as first:
        port = first.port
    async with Broker(port=port) as second:
        assert second.port == port


async def test_a_taken_port_is_named() -> None:
    """Would catch a stack trace where another broker runs."""
    async with Broker() as broker:
        with pytest.raises(Misconfigured, match="cannot listen"):
            await Broker(port=broker.port).__aenter__()


async def test_it_never_listens_to_the_network() -> None:
    """Would catch a broker for everybody on everybody's network."""
    with pytest.raises(Misconfigured, match="lets everybody in"):
        Broker(host="0.0.0.0")
