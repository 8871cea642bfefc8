"""Stories of the local web server: a phone at the plug, and visitors who are not phones."""

import asyncio
import contextlib
import errno
import json
import os
import socket

import aiohttp
import pytest
from plug import PORT, SREF, Key, Plug, eventually

from agent.core.messages import MESSAGE_BYTES_MAX, decode
from agent.core.units import hex0x
from agent.errors import Misconfigured
from agent.runners import http
from agent.runners.http import HttpRunner


@pytest.fixture
def plug(tmp_path):
    """A provider at a port."""
    plug = Plug(tmp_path)
    yield plug
    plug.close()


@contextlib.asynccontextmanager
async def served(plug, host="127.0.0.1"):
    """The runner on a free port, and the engine's beat."""
    runner = HttpRunner(plug.engine, plug.door, host, 0)
    tasks = [asyncio.create_task(runner.run()), asyncio.create_task(plug.beat())]
    try:
        async with asyncio.timeout(30):
            await runner.listening.wait()
        yield runner
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await tasks[0]


@pytest.fixture
async def runner(plug):
    """The server for one story."""
    async with served(plug) as runner:
        yield runner


@pytest.fixture
async def phone(runner):
    """A visitor with a browser's habits."""
    async with aiohttp.ClientSession(runner.url, timeout=aiohttp.ClientTimeout(total=20)) as session:
        yield session


async def ask(phone, kind, data, sref=SREF):
    """POST a message: (status, answer)."""
    async with phone.post(f"/v1/{kind}", data=data, headers={"X-V2V-Sref": sref}) as response:
        return response.status, decode(await response.read())


async def next_event(stream):
    """The next event of a stream as (name, message); comments are skipped."""
    lines = []
    async with asyncio.timeout(30):
        while not (lines and lines[-1] == b""):
            line = (await stream.content.readline()).rstrip(b"\n")
            if not line.startswith(b":") and (line or lines):
                lines.append(line)
    name, data = lines[0].removeprefix(b"event: "), lines[1].removeprefix(b"data: ")
    return name.decode(), decode(data)


async def events_until(stream, holds):
    """Read events until one fits; all of them."""
    heard = []
    while not heard or not holds(heard[-1][1]):
        heard.append(await next_event(stream))
    return heard


async def test_phone_charges_over_http_alone(plug, phone):
    """Would catch a door that only opens over MQTT: fetch Hello, present, follow, sign, stop, with nothing else."""
    terms = plug.plugged_in()
    async with phone.get("/v1/hello") as response:
        (hello,) = [decode(json.dumps(one).encode()) for one in await response.json()]
    assert hello == plug.door.hello(PORT)
    assert await ask(phone, "receipt", plug.receipt(terms, 1)) == (
        404,
        plug.door.answer(SREF, "x", plug.receipt(terms, 1)),
    )
    status, accept = await ask(phone, "present", plug.present(terms, hello))
    assert (status, accept.TYPE) == (200, "accept")
    plug.read()
    plug.read(5_012_345, power_w=11_000, pilot_state="C")
    async with phone.get(f"/v1/session/{SREF}") as stream:
        assert stream.content_type == "text/event-stream"
        heard = await events_until(stream, lambda message: getattr(message, "power_w", 0) > 0)
        assert accept in [message for _, message in heard]
        assert all(name == message.TYPE for name, message in heard)
        assert (await ask(phone, "receipt", plug.receipt(terms, 12)))[1].delivered_wh == 12
        heard = await events_until(stream, lambda message: message.TYPE == "ack")
        assert accept not in [message for _, message in heard]
        status, standing = await ask(phone, "stop", plug.stop(terms))
        assert (status, standing.stage) == (200, "STOPPING")
        await events_until(stream, lambda message: getattr(message, "stage", "") == "STOPPING")


async def test_both_ways_lead_to_the_same_door(plug, phone):
    """Would catch two doors with two memories: the same presentation gets the same answer over either transport."""
    terms = plug.plugged_in()
    presentation = plug.present(terms)
    by_mqtt = plug.door.answer("consumer-7", "mqtt:consumer-7", presentation)
    assert by_mqtt.TYPE == "accept"
    assert await ask(phone, "present", presentation) == (200, by_mqtt)


async def test_broker_users_session_is_not_heard_over_http(plug, phone):
    """Would catch a visitor on the local network who listens to a session by guessing a broker's user name."""
    plug.delivering(sref="consumer-7")
    async with phone.get("/v1/session/consumer-7") as response:
        assert response.status == 400
        assert decode(await response.read()).reason == "malformed"


async def test_before_the_time_is_known_no_hello_is_given(phone):
    """Would catch a Hello dated 1970, which every consumer would call stale."""
    async with phone.get("/v1/hello") as response:
        assert (response.status, await response.json()) == (200, [])


async def test_refusals_have_their_names_and_their_status(plug, phone):
    """Would catch a refusal that looks like success to a client that only reads the status, or has no name inside."""
    terms = plug.plugged_in()
    stranger = Key("stranger")
    unknown = plug.receipt(terms, 1).replace(terms.session_id.hex().encode(), b"00" * 32)
    cases = [
        ("present", b"{}", 400, "malformed"),
        ("present", b"x" * (MESSAGE_BYTES_MAX + 1), 413, "malformed"),
        ("present", plug.present(terms, key=stranger), 403, "wrong_signer"),
        ("present", plug.present(terms).replace(terms.token.hex().encode(), b"00" * 32), 403, "wrong_token"),
        ("receipt", unknown, 404, "unknown_session"),
    ]
    for kind, data, status, reason in cases:
        answered = await ask(phone, kind, data)
        assert (answered[0], answered[1].reason) == (status, reason)
    used = plug.present(terms)
    await ask(phone, "present", used)
    again = plug.present(terms, plug.door._hellos[PORT][0].hello).replace(
        b'"maxEnergyWh":0', b'"maxEnergyWh":1'
    )
    status, refusal = await ask(phone, "present", again)
    assert (status, refusal.reason) == (409, "replayed")
    status, refusal = await ask(phone, "present", used, sref="too short")
    assert (status, refusal.reason) == (400, "malformed")


async def test_eager_visitor_is_told_to_wait(plug, runner, phone):
    """Would catch a source without a limit, or one that is not told when to come again."""
    for _ in range(40):
        async with phone.post(
            "/v1/receipt", data=plug.receipt(plug.connect(), 1), headers={"X-V2V-Sref": SREF}
        ) as r:
            if r.status == 429:
                assert r.headers["Retry-After"] == "1"
                assert decode(await r.read()).reason == "rate_limited"
                return
    pytest.fail("40 messages at once were all taken")


# ---- who may ask


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Host": "evil.example"}, 421),
        ({"Host": "evil.example:{port}"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "]["}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Host": "localhost:{port}"}, 200),
        ({"Host": "[::1]:{port}"}, 200),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
    ],
)
async def test_pages_of_other_sites_do_not_get_in(runner, phone, headers, status):
    """Would catch DNS rebinding and cross-site posts from a page that the owner merely has open."""
    port = runner.url.rpartition(":")[2]
    headers = {key: value.replace("{port}", port) for key, value in headers.items()}
    async with phone.get("/status.json", headers=headers) as response:
        assert response.status == status


async def test_every_answer_forbids_a_browser_to_run_or_keep_anything(phone):
    """Would catch an answer, a stream or an error page without the policy."""
    for path in ("/v1/hello", "/status.json", "/nowhere", f"/v1/session/{SREF}"):
        async with phone.get(path) as response:
            assert response.headers["Content-Security-Policy"] == "default-src 'none'; frame-ancestors 'none'"
            assert response.headers["X-Content-Type-Options"] == "nosniff"
            assert response.headers["Cache-Control"] == "no-store"


async def test_owner_reads_the_status_without_full_addresses(plug, phone):
    """Would catch a page that shows other facts than the book, or shows an account to whoever looks over the shoulder."""
    terms = plug.delivering()
    async with phone.get("/status.json") as response:
        text = await response.text()
    assert json.loads(text)["ports"][PORT]["session"]["session_id"] == hex0x(terms.session_id)
    assert terms.consumer.hex() not in text
    assert terms.provider.hex() not in text


# ---- limits


async def test_streams_are_limited_for_each_source(phone, runner):
    """Would catch a visitor who opens streams until every change costs us all our time; and a place that is never free again."""
    async with contextlib.AsyncExitStack() as open_streams:
        for _ in range(http.STREAMS_MAX_PER_SOURCE):
            stream = await open_streams.enter_async_context(phone.get(f"/v1/session/{SREF}"))
            assert stream.status == 200
        async with phone.get(f"/v1/session/{SREF}") as refused:
            assert refused.status == 429
    await eventually_free(phone)


async def eventually_free(phone):
    """Streams whose readers left give their places back."""
    async with asyncio.timeout(30):
        while True:
            async with phone.get(f"/v1/session/{SREF}") as stream:
                if stream.status == 200:
                    return
            await asyncio.sleep(0.05)


async def test_connections_are_limited_for_each_source(runner):
    """Would catch one visitor who holds every connection: the seventeenth is closed, and a place freed is a place again."""
    host, port = "127.0.0.1", int(runner.url.rpartition(":")[2])
    streams = [await asyncio.open_connection(host, port) for _ in range(http.CONNECTIONS_MAX_PER_SOURCE)]
    reader, writer = await asyncio.open_connection(host, port)
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
    for _, one in [*streams, (reader, writer)]:
        one.close()
        with contextlib.suppress(ConnectionError):
            await one.wait_closed()
    async with aiohttp.ClientSession() as session, session.get(f"{runner.url}/v1/hello") as response:
        assert response.status == 200


@contextlib.asynccontextmanager
async def visitors(runner, *sources):
    """One connection from each of these addresses of this machine."""
    port = int(runner.url.rpartition(":")[2])
    open_ones = [
        await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0)) for source in sources
    ]
    try:
        yield open_ones
    finally:
        for _, writer in open_ones:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()


async def is_shown_out(reader):
    """True when the other side ends the connection without a word."""
    async with asyncio.timeout(30):
        with contextlib.suppress(ConnectionError):
            return await reader.read() == b""
    return True


HELLO = b"GET /v1/hello HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def test_whoever_holds_most_places_gives_one_to_a_newcomer(plug, monkeypatch):
    """Would catch four idle visitors who keep the fifth out for ever."""
    monkeypatch.setattr(http, "CONNECTIONS_MAX", 4)
    async with (
        served(plug) as runner,
        visitors(runner, "127.0.0.2", "127.0.0.2", "127.0.0.2", "127.0.0.3") as inside,
        visitors(runner, "127.0.0.4") as ((reader, writer),),
    ):
        writer.write(HELLO)
        async with asyncio.timeout(30):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        assert await is_shown_out(inside[0][0])
        assert not inside[3][0].at_eof()


async def test_who_speaks_no_http_is_no_line_in_the_log(plug, capfd, caplog):
    """Would catch a flood of tracebacks, with bytes of a stranger's choice in them."""
    async with served(plug) as runner, visitors(runner, "127.0.0.2") as ((reader, writer),):
        writer.write(b"\x16\x03\x01 this is TLS\r\n\r\n")
        async with asyncio.timeout(30):
            assert (await reader.readline()).startswith(b"HTTP/1.0 400")
    assert [record for record in caplog.records if record.name != "asyncio"] == []
    assert "TLS" not in capfd.readouterr().err


async def test_nobody_loses_his_only_place(plug, monkeypatch):
    """Would catch visitors who push each other out in a circle: then nobody is served."""
    monkeypatch.setattr(http, "CONNECTIONS_MAX", 2)
    async with (
        served(plug) as runner,
        visitors(runner, "127.0.0.2", "127.0.0.3") as inside,
        visitors(runner, "127.0.0.4") as ((late, _),),
    ):
        assert await is_shown_out(late)
        for reader, writer in inside:
            writer.write(HELLO)
            async with asyncio.timeout(30):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_who_comes_back_a_thousand_times_a_second_is_not_let_in(plug, monkeypatch):
    """Would catch a visitor who escapes his pace by a new connection for each request."""
    monkeypatch.setattr(http, "PACE", (0.001, 3.0))
    async with (
        served(plug) as runner,
        visitors(runner, *["127.0.0.2"] * 4) as hammering,
        visitors(runner, "127.0.0.3") as ((reader, writer),),
    ):
        assert await is_shown_out(hammering[-1][0])
        writer.write(HELLO)
        async with asyncio.timeout(30):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")


async def test_each_source_has_a_pace_of_its_own_and_ahead_of_it_nothing_is_counted(monkeypatch):
    """Would catch a pace that is not kept, one for all, or a debt that grows until an address is locked out for hours."""
    monkeypatch.setattr(http, "PACE", (1.0, 5.0))
    turnstile = http._Turnstile()
    assert max(turnstile.delay_s("eager") for _ in range(5)) <= 0
    assert max(turnstile.delay_s("eager") for _ in range(1_000)) < http.AHEAD_S_MAX + 2
    assert turnstile.delay_s("calm") <= 0


async def test_sources_of_another_day_are_forgotten(monkeypatch):
    """Would catch memory that grows with every address that ever asked."""
    monkeypatch.setattr(http, "PACE", (1e9, 1.0))
    turnstile = http._Turnstile()
    for number in range(http.PACES_MAX * 3):
        turnstile.delay_s(f"visitor {number}")
    assert len(turnstile._paid_until_s) <= http.PACES_MAX


async def test_one_visitor_goes_on_in_each_turn_of_the_loop():
    """Would catch a crowd of requests that is served between two looks at the charger."""
    turnstile, served_in = http._Turnstile(), []
    turns = 0

    async def count_turns():
        nonlocal turns
        while len(served_in) < 20:
            turns += 1
            await asyncio.sleep(0)

    async def ask():
        await turnstile.turn("a")
        served_in.append(turns)

    await asyncio.gather(count_turns(), *(ask() for _ in range(20)))
    assert len(set(served_in)) == 20


async def test_requests_of_many_sources_leave_the_thread_time_to_rest(monkeypatch):
    """Would catch a crowd in which everybody keeps his pace, and the charger's beat still waits."""
    turnstile, gone_on = http._Turnstile(), []

    async def ask(source):
        await turnstile.turn(source)
        gone_on.append(source)

    monkeypatch.setattr(turnstile.load, "rest_s", lambda: 3_600.0 if len(gone_on) >= 3 else 0.0)
    crowd = [asyncio.create_task(ask(f"visitor {number}")) for number in range(50)]
    for _ in range(1_000):
        await asyncio.sleep(0)
    assert len(gone_on) == 3
    for one in crowd:
        one.cancel()
    await asyncio.gather(*crowd, return_exceptions=True)


async def test_who_is_shown_out_again_and_again_leaves_the_thread_time_to_rest(plug, monkeypatch):
    """Would catch ten thousand connections a second that are refused one by one, and nothing else is done."""
    met = 0
    has_place = http._Doorman._has_place_for

    def watched(self, source):
        nonlocal met
        met += 1
        return has_place(self, source)

    monkeypatch.setattr(http._Doorman, "_has_place_for", watched)
    monkeypatch.setattr(http.Load, "rest_s", lambda _: 3_600.0 if met else 0.0)
    async with served(plug) as runner, visitors(runner, *["127.0.0.2"] * 3 * http.ACCEPTED_AT_ONCE_MAX):
        for _ in range(1_000):
            await asyncio.sleep(0)
        assert met == http.ACCEPTED_AT_ONCE_MAX


async def test_without_a_file_handle_for_one_more_the_next_is_let_in_later(plug, monkeypatch):
    """Would catch a server that ends for good, or spins, because a file handle was missing for a moment."""
    monkeypatch.setattr(http, "NO_HANDLES_WAIT_S", 0.01)
    loop, missing = asyncio.get_running_loop(), [errno.EMFILE, errno.ENFILE, errno.ECONNABORTED]
    accept = loop.sock_accept

    async def poor(listening):
        if missing:
            code = missing.pop()
            raise OSError(code, os.strerror(code))
        return await accept(listening)

    monkeypatch.setattr(loop, "sock_accept", poor)
    async with served(plug) as runner, visitors(runner, "127.0.0.2") as ((reader, writer),):
        writer.write(HELLO)
        async with asyncio.timeout(30):
            assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    assert missing == []


async def test_a_listening_socket_that_breaks_ends_the_runner(plug, monkeypatch):
    """Would catch a web server that looks up and hears nobody."""

    async def broken(_listening):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(asyncio.get_running_loop(), "sock_accept", broken)
    async with asyncio.timeout(30):
        with pytest.raises(OSError, match="Invalid argument"):
            await HttpRunner(plug.engine, plug.door, "127.0.0.1", 0).run()


@pytest.mark.parametrize(
    ("address", "source"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "20010db800010002::/64"),
        ("2001:db8:1:2:ffff::1", "20010db800010002::/64"),
        ("fe80::1%eth0", "fe80000000000000::/64"),
    ],
)
def test_a_visitor_with_a_billion_addresses_is_one_source(address, source):
    """Would catch limits for each source that mean nothing over IPv6."""

    class Transport(asyncio.BaseTransport):
        def get_extra_info(self, name, default=None):
            return (address, 1, 0, 0) if name == "peername" else default

    assert http._source(Transport()) == source


async def test_visitor_who_never_asks_is_shown_out(plug, monkeypatch):
    """Would catch connections held open by half a request: aiohttp alone would wait for ever."""
    monkeypatch.setattr(http, "FIRST_REQUEST_S", 0.3)
    async with served(plug) as runner:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(runner.url.rpartition(":")[2]))
        writer.write(b"GET /v1/hello HTTP/1.1\r\nHost: localhost\r\nX-Slow: ")
        async with asyncio.timeout(30):
            assert await reader.read() == b""
        writer.close()
        assert runner._strangers == {}


async def test_body_that_trickles_is_not_waited_for(plug, monkeypatch):
    """Would catch a handler that waits as long as a visitor pleases."""
    monkeypatch.setattr(http, "BODY_WAIT_S", 0.2)
    async with served(plug) as runner:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(runner.url.rpartition(":")[2]))
        writer.write(
            f"POST /v1/present HTTP/1.1\r\nHost: localhost\r\nX-V2V-Sref: {SREF}\r\nContent-Length: 9\r\n\r\n{{".encode()
        )
        async with asyncio.timeout(30):
            assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        writer.close()


async def test_silent_stream_is_kept_alive(plug, monkeypatch):
    """Would catch a stream that a phone's browser gives up because nothing ever comes."""
    monkeypatch.setattr(http, "HEARTBEAT_S", 0.1)
    async with (
        served(plug) as runner,
        aiohttp.ClientSession(runner.url) as phone,
        phone.get(f"/v1/session/{SREF}") as stream,
        asyncio.timeout(30),
    ):
        assert await stream.content.readline() == b":\n"


# ---- start, bugs, stop


async def test_address_in_use_is_named_with_its_remedy(plug):
    """Would catch a stack trace where an installer needs a sentence."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        runner = HttpRunner(plug.engine, plug.door, "127.0.0.1", taken.getsockname()[1])
        with pytest.raises(Misconfigured, match=r"cannot listen on 127\.0\.0\.1") as refusal:
            await runner.run()
    assert "listen" in refusal.value.remedy


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "0.0.0.0", "localhost"])
async def test_it_listens_where_it_is_told_and_says_where_that_is(plug, host):
    """Would catch an address that is read as a name of the wrong family, and a URL that leads nowhere."""
    async with (
        served(plug, host) as runner,
        aiohttp.ClientSession(runner.url) as visitor,
        visitor.get("/v1/hello") as response,
    ):
        assert response.status == 200


@pytest.mark.parametrize("code", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
async def test_without_ipv6_localhost_is_served_all_the_same(plug, monkeypatch, code):
    """Would catch a car that has no page because its kernel has no IPv6; and an address in use is still an error."""
    create = socket.create_server

    def without_ipv6(address, *, family, **more):
        if family == socket.AF_INET6:
            raise OSError(code, os.strerror(code))
        return create(address, family=family, **more)

    both = [(family, 1, 6, "", (host, 0)) for family, host in ((10, "::1"), (2, "127.0.0.1"))]

    async def known(*_, **__):
        return both

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", known)
    monkeypatch.setattr(socket, "create_server", without_ipv6)
    async with served(plug, "localhost") as runner:
        assert runner.url.startswith("http://127.0.0.1:")
    both.pop()
    with pytest.raises(Misconfigured, match="cannot listen"):
        await HttpRunner(plug.engine, plug.door, "localhost", 0).run()


async def test_bug_behind_the_door_ends_the_runner(plug, monkeypatch):
    """Would catch a failed journal that becomes a quiet 500 while the agent goes on selling (DESIGN section 6)."""

    def broken(*_):
        raise AssertionError("the disk is gone")

    monkeypatch.setattr(plug.door, "answer", broken)
    runner = HttpRunner(plug.engine, plug.door, "127.0.0.1", 0)
    task = asyncio.create_task(runner.run())
    await runner.listening.wait()
    asked = {"data": b"{}", "headers": {"X-V2V-Sref": SREF}}
    async with aiohttp.ClientSession(runner.url) as phone, phone.post("/v1/present", **asked) as response:
        assert response.status == 500
    with pytest.raises(AssertionError, match="the disk is gone"):
        async with asyncio.timeout(30):
            await task


async def test_open_streams_do_not_hold_up_a_stop(plug):
    """Would catch a daemon whose stop waits for a phone that follows a session."""
    async with aiohttp.ClientSession() as phone:
        async with served(plug) as runner:
            stream = await phone.get(f"{runner.url}/v1/session/{SREF}")
            began_s = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - began_s < 5
        await eventually(lambda: stream.content.at_eof() or stream.content.exception())
        stream.close()
