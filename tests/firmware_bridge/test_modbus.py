"""The owner of a bus: who goes first, when it is silent, what it repeats, what it says. What it believes: test_strict_wire.py."""

from __future__ import annotations

import asyncio
import itertools
import os
import pty

import pytest
from faulty_slave import FaultySlave

from firmware_bridge import modbus
from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.modbus import Bus, Buses, Priority, Timing, parse_wire

KINDS = ["tcp", "rtu+tcp", "rtu"]
FAST = Timing(request_timeout_ms=150, turnaround_ms=0)


async def try_read(bus: Bus, address: int, count: int, *, spare: int = 0) -> tuple[int, ...] | str:
    """What was believed, or the name of the error."""
    try:
        return await bus.read(1, 3, address, count, spare=spare)
    except BridgeError as exc:
        return exc.name


@pytest.mark.parametrize("kind", KINDS)
async def test_after_a_time_out_the_bus_is_silent_for_half_a_second(kind):
    """Would catch a quarantine that was shortened or forgotten: the next request waits."""
    async with FaultySlave(kind) as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            slave.faults.append("silence")
            assert await try_read(bus, 10, 2) == slave.holds(10, 2)  # the second attempt
            first, second = (request[0] for request in slave.requests)
            assert second - first >= 0.15 + 0.5 - 0.02
        finally:
            await bus.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_words_nobody_asked_for_make_the_bus_wait(kind):
    """Would catch a bus that asks on while a late talker may still answer somebody else's question."""
    async with FaultySlave(kind) as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            slave.faults.append("twice")
            assert await try_read(bus, 10, 2) == slave.holds(10, 2)
            await asyncio.sleep(0.1)  # the second reply comes after 20 ms, to nobody
            assert await try_read(bus, 50, 2) == slave.holds(50, 2)
            first, second = (request[0] for request in slave.requests)
            assert second - first >= 0.5
        finally:
            await bus.close()


async def test_a_serial_frame_is_believed_only_after_its_silence():
    """Would catch the first half of a longer answer taken for the whole: at 50 baud the silence lasts 0.77 s."""
    async with FaultySlave("rtu") as slave:
        bus = Bus(parse_wire(slave.wire.replace("baud=115200", "baud=50")), FAST)
        await bus.open()
        try:
            slave.faults.append("tail")
            assert await try_read(bus, 10, 2) == slave.holds(10, 2)
            assert bus.rejected == 1, "the first answer went on"
        finally:
            await bus.close()


@pytest.mark.parametrize("baud", [9_600, 115_200])
async def test_between_an_answer_and_the_next_question_the_line_is_silent_for_3_5_characters(
    baud, monkeypatch
):
    """Would catch an answer handed over early whose reader's next question then leaves early, too: devices take both for one."""
    monkeypatch.setattr(modbus, "_TURN_S", 0.001)  # more than a pty takes to tell, or nobody could see it
    async with FaultySlave("rtu") as slave:
        bus = Bus(parse_wire(slave.wire.replace("baud=115200", f"baud={baud}")), FAST)
        await bus.open()
        try:
            for _ in range(40):
                await bus.read(1, 3, 10, 2)
        finally:
            await bus.close()
        # The slave answers in the moment it has heard, so two questions are at least the silence apart.
        at_s = [request[0] for request in slave.requests]
        closest_s = min(later - one for one, later in itertools.pairwise(at_s))
        assert closest_s >= max(0.00175, 3.5 * 11 / baud)


async def test_a_port_that_takes_a_question_in_pieces_gets_all_of_it(monkeypatch):
    """Would catch the rest of a question that is dropped when the port's buffer is full: the device then hears half a frame."""
    async with FaultySlave("rtu") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        port, write = bus._client.ctx.transport.sync_serial.fd, os.write
        pieces = []

        def miserly(fd, data):
            if fd != port:
                return write(fd, data)
            pieces.append(len(data))
            if len(pieces) == 1:
                raise BlockingIOError
            return write(fd, data[:3])

        monkeypatch.setattr(os, "write", miserly)
        try:
            assert await try_read(bus, 10, 2) == slave.holds(10, 2)
        finally:
            await bus.close()
        assert pieces == [8, 8, 5, 2]


@pytest.mark.parametrize("settings", ["parity=E", "baud=99999999999"])
async def test_a_port_that_refuses_its_settings_is_given_back_at_once(settings):
    """Would catch a port that stays locked in our own process after a wrong parity, so that the right one finds it "held"."""
    master, slave = pty.openpty()
    port = os.ttyname(slave)
    try:
        with pytest.raises(BridgeError, match="rate or parity") as refused:
            await Bus(parse_wire(f"rtu://{port}?{settings}"), FAST).open()
        assert refused.value.name == "port_refused"
        bus = Bus(parse_wire(f"rtu://{port}?parity=N"), FAST)
        await bus.open()  # while the refusal, and whatever hangs on it, is still alive
        await bus.close()
    finally:
        os.close(master)
        os.close(slave)


async def test_a_transaction_without_number_is_not_ours():
    """Would catch pymodbus' leniency towards transaction 0, with which every late reply fits every question."""
    async with FaultySlave("tcp") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            slave.faults.extend(["zero_tid", "zero_tid"])
            assert await try_read(bus, 10, 2) == "wrong_reply"
            assert bus.rejected == 2
        finally:
            await bus.close()


async def test_stop_goes_before_everything_that_waits():
    """Would catch a STOP that queues behind the polls."""
    async with FaultySlave("tcp") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            polls = [asyncio.create_task(try_read(bus, at, 1)) for at in range(20)]
            await asyncio.sleep(0)
            await bus.write(1, 6, 200, [0], priority=Priority.STOP)
            await asyncio.gather(*polls)
        finally:
            await bus.close()
        order = [address for _, _, address, _ in slave.requests]
        assert order.index(200) <= 1, "at most the request already on the wire goes first"


async def test_what_cannot_be_asked_is_told_to_the_caller_and_the_bus_goes_on():
    """Would catch a senseless request that ends the bus's owner, and with it every other device on the bus."""
    async with FaultySlave("rtu+tcp") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            with pytest.raises(AssertionError):
                await bus.read(1, 3, 10, 126)
            with pytest.raises(AssertionError):
                await bus.write(1, 6, 10, [65_536])
            assert len(await bus.read(1, 3, 10, 125, spare=3)) == 125
        finally:
            await bus.close()


async def test_a_write_is_never_repeated_by_itself():
    """Would catch a blind second write after a time-out: the caller must look first."""
    async with FaultySlave("tcp") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            slave.faults.append("silence")
            with pytest.raises(BridgeError, match="timeout"):
                await bus.write(1, 16, 200, [5])
            assert len(slave.requests) == 1
        finally:
            await bus.close()


@pytest.mark.parametrize("kind", KINDS)
async def test_a_device_that_comes_back_is_found_again(kind):
    """Would catch a bus that stays dead after its peer was away: restarted, or plugged in again as another tty."""
    async with FaultySlave(kind) as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            slave.unplug()
            assert await try_read(bus, 10, 1) in ("unplugged", "unreachable", "port_missing")
            await slave.plug()
            async with asyncio.timeout(20):
                while await try_read(bus, 10, 1) != (1010,):  # noqa: ASYNC110 # nobody else knows when it is back
                    await asyncio.sleep(0.05)
        finally:
            await bus.close()


async def test_a_peer_that_hangs_up_is_noticed_before_the_time_out():
    """Would catch the library's habit of waiting its whole time-out for an answer on a closed connection."""
    async with FaultySlave("tcp") as slave:
        bus = Bus(parse_wire(slave.wire), Timing(request_timeout_ms=60_000))
        await bus.open()
        try:
            slave.faults.append("hang_up")
            async with asyncio.timeout(30):
                with pytest.raises(BridgeError, match="went away"):
                    await bus.write(1, 6, 200, [1])
        finally:
            await bus.close()


async def test_a_stop_overtakes_the_poll_that_waits_for_silence():
    """Would catch a request chosen before the quarantine: the STOP would wait for its whole answer too."""
    async with FaultySlave("rtu+tcp") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            slave.faults.append("exception_6")
            assert await try_read(bus, 10, 1) == "exception_6"  # and now half a second of silence
            poll = asyncio.create_task(try_read(bus, 20, 1))
            for _ in range(5):
                await asyncio.sleep(0)  # the owner has seen the poll
            await bus.write(1, 6, 200, [0], priority=Priority.STOP)
            await poll
        finally:
            await bus.close()
        assert [address for _, _, address, _ in slave.requests] == [10, 200, 20]


async def test_an_adapter_found_again_under_another_name_is_still_one_bus():
    """Would catch a lease that is lost with the name behind the link: never closed, or closed under its other user."""
    async with FaultySlave("rtu") as slave:
        buses = Buses()
        wire = parse_wire(slave.wire)
        first = await buses.lease(wire, FAST)
        slave.unplug()
        await slave.plug()
        assert await buses.lease(wire, FAST) is first
        await buses.release(first)
        async with asyncio.timeout(20):
            while await try_read(first, 10, 1) != (1010,):  # noqa: ASYNC110 # nobody else knows when it is back
                await asyncio.sleep(0.05)
        await buses.release(first)
        assert await try_read(first, 10, 1) == "closed"


async def test_a_flood_of_requests_is_told_so():
    """Would catch an unbounded queue in front of a slow bus."""
    async with FaultySlave("tcp") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            seen = await asyncio.gather(*(try_read(bus, at, 1) for at in range(200)))
            assert "bus_busy" in seen
            assert (1000,) in seen
        finally:
            await bus.close()


async def test_nobody_there_is_a_named_error_with_a_remedy():
    """Would catch pymodbus' silent False, or a bare errno."""
    async with FaultySlave("tcp") as slave:
        wire = parse_wire(slave.wire)
    with pytest.raises(BridgeError, match="powered") as caught:
        await Bus(wire, FAST).open()
    assert caught.value.name == "unreachable"


async def test_a_missing_port_is_named():
    """Would catch "could not open port" without the path to look at."""
    with pytest.raises(BridgeError, match="by-id") as caught:
        await Bus(parse_wire("rtu:///dev/serial/by-id/nobody"), FAST).open()
    assert caught.value.name == "port_missing"


async def test_a_locked_port_is_named():
    """Would catch two programs on one serial line, each reading the other's replies."""
    async with FaultySlave("rtu") as slave:
        first = Bus(parse_wire(slave.wire), FAST)
        await first.open()
        try:
            with pytest.raises(BridgeError, match="fuser") as caught:
                await Bus(parse_wire(slave.wire), FAST).open()
            assert caught.value.name == "port_locked"
        finally:
            await first.close()


async def test_an_unplugged_port_is_an_error_and_not_a_hang():
    """Would catch a request that waits for ever on a port whose adapter was pulled."""
    master, slave = pty.openpty()
    bus = Bus(parse_wire(f"rtu://{os.ttyname(slave)}?parity=N"), FAST)
    await bus.open()
    os.close(master)
    os.close(slave)
    try:
        async with asyncio.timeout(5):
            assert isinstance(await try_read(bus, 10, 1), str)
            assert isinstance(await try_read(bus, 10, 1), str)
    finally:
        await bus.close()


async def test_two_devices_on_one_port_share_one_owner():
    """Would catch two owners on one bus, and a bus closed under its other user."""
    async with FaultySlave("rtu") as slave:
        buses = Buses()
        wire = parse_wire(slave.wire)
        first, second = await buses.lease(wire, FAST), await buses.lease(wire, Timing(gap_ms=20))
        assert first is second
        assert first.timing.gap_ms == 20, "the slower device sets the pace"
        await buses.release(first)
        assert await try_read(second, 10, 1) == (1010,)
        await buses.release(second)
        with pytest.raises(BridgeError, match="closed"):
            await second.read(1, 3, 10, 1)


async def test_a_library_that_swallows_a_cancellation_does_not_keep_the_wire(monkeypatch):
    """Would catch a stop that hangs: the owner was just being told that a connection failed (asyncio.wait_for, Python 3.11)."""
    async with FaultySlave("tcp") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        serving = asyncio.Event()

        async def deaf(_request):
            serving.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise BridgeError("unreachable", "swallowed") from None

        monkeypatch.setattr(bus, "_serve", deaf)
        reading = asyncio.create_task(try_read(bus, 10, 1))
        await serving.wait()
        closing = asyncio.create_task(bus.close())
        await asyncio.wait({closing}, timeout=3)  # no time-out: its cancellation would be the second one
        assert closing.done()
        await asyncio.wait({reading})


async def test_two_who_come_at_once_share_one_wire():
    """Would catch two owners on one bus because both looked before either had opened it."""
    async with FaultySlave("rtu+tcp") as slave:
        buses = Buses()
        wire = parse_wire(slave.wire)
        first, second = await asyncio.gather(buses.lease(wire, FAST), buses.lease(wire, FAST))
        assert first is second
        await buses.release(first)
        assert await try_read(second, 10, 1) == (1010,)
        await buses.release(second)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "tcp://",
        "http://h:1",
        "rtu://relative",
        "tcp://h:99999",
        "rtu:///dev/x?parity=X",
        "rtu:///dev/x?speed=1",
    ],
)
def test_a_wire_that_makes_no_sense_is_refused(text):
    """Would catch a misspelt wire that silently means the default."""
    with pytest.raises(MapError, match="not understood"):
        parse_wire(text)


def test_a_wire_takes_the_map_defaults_for_what_it_leaves_out():
    """Would catch 9600 8N1 meters opened at 19200 8E1."""
    wire = parse_wire("rtu:///dev/ttyUSB0?baud=9600", baud=19200, parity="E")
    assert (wire.baud, wire.parity, wire.stop_bits) == (9600, "E", 1)
    assert parse_wire("tcp://10.0.0.2", tcp_port=1502).port == 1502


async def test_who_asks_and_closes_at_once_is_told_so():
    """Would catch a caller who waits for ever because his question left and the owner never woke up to listen."""
    async with FaultySlave("tcp") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        await bus.read(1, 3, 10, 1)
        asking = asyncio.create_task(try_read(bus, 20, 1))
        await asyncio.sleep(0)
        await bus.close()
        async with asyncio.timeout(20):
            assert await asking == "closed"


async def test_a_caller_who_gives_up_leaves_no_answer_behind():
    """Would catch the answer to an abandoned question taken for the answer to the next one."""
    async with FaultySlave("rtu+tcp") as slave:
        bus = Bus(parse_wire(slave.wire), FAST)
        await bus.open()
        try:
            for at in range(20):
                abandoned = asyncio.create_task(bus.read(1, 3, 10 + at, 2))
                for _ in range(at % 5):
                    await asyncio.sleep(0)
                abandoned.cancel()
                await asyncio.wait({abandoned})
                assert await bus.read(1, 3, 100 + at, 2) == slave.holds(100 + at, 2)
        finally:
            await bus.close()
