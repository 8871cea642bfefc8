"""Messages straight to a provider's web server: answers in bodies, events in a stream, and servers that misbehave."""

import asyncio
import json

import pytest
from aiohttp import web
from scripted_provider import OWNER, ScriptedProvider, terms_of

from agent.consumer.carrier_http import SREF_HEADER, HttpCarrier
from agent.core.messages import Refusal, encode
from agent.errors import Transient

SREF = "ab" * 16
HELLO = encode(ScriptedProvider(terms_of()).hello())


class Server:
    """A web server like the provider's; a test may change what it says."""

    def __init__(self):
        self.hello = b"[" + HELLO + b"]"
        self.posted = []
        self.answer, self.status = encode(Refusal("busy", "")), 409
        self.events = [b'event: status\ndata: {"type":"status"}\n\n', b":\n\n", b'data: {"n":2}\n\n']
        app = web.Application()
        app.router.add_get("/v1/hello", self._hello)
        app.router.add_post("/v1/{kind}", self._post)
        app.router.add_get("/v1/session/{sref}", self._stream)
        self.runner = web.AppRunner(app, shutdown_timeout=0.1)

    async def __aenter__(self):
        await self.runner.setup()
        site = web.TCPSite(self.runner, "127.0.0.1", 0)
        await site.start()
        host, port = self.runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"
        return self

    async def __aexit__(self, *_):
        await self.runner.cleanup()

    async def _hello(self, request):
        return web.Response(body=self.hello)

    async def _post(self, request):
        kind, sref = request.match_info["kind"], request.headers[SREF_HEADER]
        self.posted.append((kind, sref, await request.read()))
        return web.Response(body=self.answer, status=self.status)

    async def _stream(self, request):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for event in self.events:
            await response.write(event)
        await asyncio.sleep(60)
        return response


@pytest.fixture
async def server():
    """A server that behaves."""
    async with Server() as server:
        yield server


async def test_a_post_goes_to_its_place_and_its_answer_comes_back(server):
    """Would catch a refusal that is lost because HTTP calls it an error, and a return address left at home."""
    async with HttpCarrier(server.url + "/", SREF) as carrier:
        assert await carrier.next(5) == json.dumps(json.loads(HELLO)).encode()
        await carrier.post("present", b'{"type":"present"}')
        assert await carrier.next(5) == server.answer
    assert server.posted == [("present", SREF, b'{"type":"present"}')]


async def test_what_the_provider_says_by_itself_arrives(server):
    """Would catch a stream that is not read, or whose comments are taken for messages."""
    async with HttpCarrier(server.url, SREF) as carrier:
        await carrier.next(5)
        await carrier.meet(OWNER.address)
        assert [await carrier.next(5), await carrier.next(5)] == [b'{"type":"status"}', b'{"n":2}']


@pytest.mark.parametrize(
    "shape", ['{"ports":{"left":%s}}', '{"ports":[{"name":"left","hello":%s}]}', "%s", "[%s]"]
)
async def test_a_hello_is_found_wherever_it_stands(server, shape):
    """Would catch a consumer that knows only one provider's page."""
    server.hello = (shape % HELLO.decode()).encode()
    async with HttpCarrier(server.url, SREF) as carrier:
        assert json.loads(await carrier.next(5)) == json.loads(HELLO)


@pytest.mark.parametrize("nonsense", [b"", b"<html>", b"[" * 20_000, b"[1,2]", b"x" * 100_000])
async def test_a_page_without_a_hello_is_no_hello(server, nonsense):
    """Would catch a crash, or endless reading, on what is no provider's server."""
    server.hello = nonsense
    async with HttpCarrier(server.url, SREF) as carrier:
        assert await carrier.next(0.1) is None


async def test_an_answer_that_is_too_long_is_dropped(server):
    """Would catch a server that makes us keep what it likes."""
    server.answer = b"x" * 4097
    async with HttpCarrier(server.url, SREF) as carrier:
        await carrier.next(5)
        await carrier.post("receipt", b"{}")
        assert await carrier.next(0.1) is None


async def test_no_server_is_said_with_a_remedy():
    """Would catch a consumer that starts an auction although nobody is there to charge from."""
    async with Server() as gone:
        url = gone.url
    with pytest.raises(Transient, match="cannot be reached") as refused:
        async with HttpCarrier(url, SREF):
            pass
    assert "[http] url" in refused.value.remedy


async def test_a_server_that_goes_away_ends_nothing(server):
    """Would catch a session that a Wi-Fi gap ends."""
    async with HttpCarrier(server.url, SREF) as carrier:
        await carrier.next(5)
        await server.runner.cleanup()
        await carrier.post("receipt", b"{}")
        assert carrier.trouble
