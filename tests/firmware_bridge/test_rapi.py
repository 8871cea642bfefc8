"""OpenEVSE over RAPI: frames, a line that is lied to, and a whole delivery's worth of commands against the simulated box."""

from __future__ import annotations

import asyncio
import os
import pty
import sys
import tty
from contextlib import asynccontextmanager
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from plug import eventually

from firmware_bridge import rapi
from firmware_bridge.charger import BridgeError, MapError
from firmware_bridge.mapped_charger import ChargerConfig
from firmware_bridge.rapi import News, RapiLine, Reply, frame, open_rapi, outer_bounds, parse
from firmware_bridge.simulator import PlantConfig
from firmware_bridge.simulator.rapi import RapiSimulator, RapiSimulatorConfig, single_phase

QUICK = single_phase(PlantConfig(ev_lag_ms=100, ev_ramp_ma_per_s=200_000))


# ---- frames


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"$OK^20", Reply(ok=True, words=(), sequence=None)),
        (b"$OK 6 32 :0A^7C", Reply(ok=True, words=("6", "32"), sequence=10)),
        (b"$NK 6 :01^2C", Reply(ok=False, words=("6",), sequence=1)),
        (b"$OK 6*14", Reply(ok=True, words=("6",), sequence=None)),  # the legacy sum
        (b"$AT 03 03 16 0140^33", News("AT", ("03", "03", "16", "0140"))),
        (b"\n$OK^20", Reply(ok=True, words=(), sequence=None)),  # a line feed of an echoing box
        (b"$GS$OK^20", Reply(ok=True, words=(), sequence=None)),  # torn off by a reply
        (b"$OK^21", None),
        (b"$OK", None),  # no checksum: not believed
        (b"$GS :01^0B", None),  # our own echo
        (b"", None),
        (b"\xff\xfe", None),
        (b"$OK 6 32 :0A^4", None),
    ],
)
def test_a_line_is_what_it_proves_to_be(line, said):
    """Would catch a reply that is believed without its checksum, and an echo or news taken for a reply."""
    assert parse(line) == said


def test_our_frames_are_the_documented_ones():
    """Would catch a checksum over the wrong bytes: `$GS^30` and `$SC 16 V` stand in the protocol's description."""
    assert rapi._xor("$GS") == 0x30
    assert rapi._xor("$GU") == 0x36
    assert frame("GS", 1) == b"$GS :01^2B\r"
    assert len(frame("SY 15 6", 255)) < 32  # the box's buffer


@given(st.integers(0, 30), st.integers(1, 255), st.binary(min_size=1, max_size=1))
def test_one_changed_byte_is_never_believed_as_another_reply(place, sequence, byte):
    """Would catch a checksum that is compared loosely."""
    body = f"$OK 16 1234 :{sequence:02X}"
    whole = f"{body}^{rapi._xor(body):02X}".encode()
    place %= len(whole)
    changed = whole[:place] + byte + whole[place + 1 :]
    right = Reply(ok=True, words=("16", "1234"), sequence=sequence)
    assert parse(changed) in (None, right)


@given(st.binary(max_size=200))
def test_no_line_at_all_can_end_the_reader(line):
    """Would catch a traceback in the reader of the port, which would leave the charger unheard."""
    assert parse(line) is None or isinstance(parse(line), Reply | News)


@given(st.integers(0, 200_000), st.integers(0, 200_000))
def test_the_outer_bounds_are_always_ahead_and_never_far(session_wh, elapsed_s):
    """Would catch a bound that ends a sale in its middle, or one that lets a dead agent's charger go on for hours."""
    kwh, quarters = outer_bounds(session_wh, elapsed_s)
    assert 200 <= kwh * 1000 - session_wh <= 1200
    assert 300 <= quarters * 900 - elapsed_s <= 1200


# ---- the line


class Liar:
    """The other end of a pty, which answers each command as the test says."""

    def __init__(self, path):
        self.master, slave = pty.openpty()
        for end in (self.master, slave):
            tty.setraw(end)
        os.set_blocking(self.master, False)
        path.unlink(missing_ok=True)
        path.symlink_to(os.ttyname(slave))
        self._slave = slave
        self.answer = lambda _command, _number: b""
        self.heard = []
        asyncio.get_running_loop().add_reader(self.master, self._read)

    def _read(self):
        for line in os.read(self.master, 4096).split(b"\r")[:-1]:
            command, _, rest = line.decode()[1:].partition(" :")
            self.heard.append(command)
            os.write(self.master, self.answer(command, int(rest[:2], 16)))

    def unplug(self):
        """Both ends are gone."""
        asyncio.get_running_loop().remove_reader(self.master)
        os.close(self.master)
        os.close(self._slave)


def said(body, number=None):
    """A line as the box sends it."""
    body += "" if number is None else f" :{number:02X}"
    return f"{body}^{rapi._xor(body):02X}\r".encode()


@asynccontextmanager
async def lied_to(tmp_path):
    """A line and its liar."""
    liar = Liar(tmp_path / "tty")
    line = RapiLine(str(tmp_path / "tty"))
    try:
        yield line, liar
    finally:
        line.close()
        liar.unplug()


LIES = {
    "stale": lambda n: said("$OK 99", (n - 2) % 255 + 1),
    "no number": lambda _: said("$OK 99"),
    "wrong checksum": lambda n: f"$OK 99 :{n:02X}^00\r".encode(),
    "no checksum": lambda n: f"$OK 99 :{n:02X}\r".encode(),
    "news": lambda _: said("$AT 03 03 16 0140"),
    "echo": lambda n: frame("GE", n),
    "garbage": lambda _: bytes(range(13)) + b"\xff$$$\r",
    "endless": lambda _: b"x" * 2000 + b"\r",
    "torn": lambda n: said("$OK 99", n)[:7] + b"\r",
}


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_before_the_answer_changes_nothing(tmp_path, lie):
    """Would catch a stale, torn or unasked line that is taken for the answer to this command."""
    async with lied_to(tmp_path) as (line, liar):
        liar.answer = lambda _command, number: LIES[lie](number) + said("$OK 16", number)
        for _ in range(3):
            assert await line.ask("GE") == Reply(ok=True, words=("16",), sequence=line._sequence)


@pytest.mark.parametrize("lie", LIES)
async def test_a_lie_alone_is_a_timeout(tmp_path, lie, monkeypatch):
    """Would catch a wrong line that is believed for want of a better one, or a wait without an end."""
    monkeypatch.setattr(rapi, "REPLY_S", 0.1)
    async with lied_to(tmp_path) as (line, liar):
        liar.answer = lambda _command, number: LIES[lie](number)
        with pytest.raises(BridgeError, match="timeout"):
            await line.ask("GE")
        assert len(liar.heard) == 1  # never repeated by the line itself


async def test_an_answer_that_comes_too_late_is_not_the_next_ones(tmp_path, monkeypatch):
    """Would catch a late read taken as the acknowledgement of a STOP."""
    monkeypatch.setattr(rapi, "REPLY_S", 0.1)
    async with lied_to(tmp_path) as (line, liar):
        late = []

        def answer(command, number):
            if command == "GE":
                late.append(said("$OK 32 0000", number))
                return b""
            return late.pop() + said("$NK", number)

        liar.answer = answer
        with pytest.raises(BridgeError, match="timeout"):
            await line.ask("GE")
        assert (await line.ask("FS")).ok is False
        assert line.rejected == 1


async def test_an_adapter_that_is_pulled_and_plugged_in_again_goes_on(tmp_path):
    """Would catch a driver that hangs on a dead file descriptor, or never opens the port again."""
    async with lied_to(tmp_path) as (line, liar):
        liar.answer = lambda _command, number: said("$OK 1", number)
        await line.ask("GE")
        asyncio.get_running_loop().remove_reader(liar.master)
        os.close(liar.master)
        (tmp_path / "tty").unlink()
        with pytest.raises(BridgeError, match=r"unplugged|port_missing"):
            await line.ask("GE")
        with pytest.raises(BridgeError, match="port_missing"):
            await line.ask("GE")
        again = Liar(tmp_path / "tty")
        again.answer = liar.answer
        liar.master, liar._slave = again.master, again._slave
        assert (await line.ask("GE")).ok
        line.close()
        with pytest.raises(BridgeError, match="closed"):
            await line.ask("GE")


async def test_a_port_that_somebody_holds_names_him(tmp_path):
    """Would catch two masters on one line."""
    async with lied_to(tmp_path) as (line, liar):
        line.open()
        second = RapiLine(line.path)
        with pytest.raises(BridgeError, match="port_locked"):
            second.open()
        assert liar.heard == []


# ---- the charger


@asynccontextmanager
async def boxed(tmp_path, plant=QUICK, *, asleep=True, **changes):
    """A simulated box and its driver."""
    async with RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"), asleep, plant)) as box:
        charger = await open_rapi(connected(box, **changes))
        try:
            yield charger, box
        finally:
            await charger.close()


def connected(box, **changes):
    """The configuration that reaches this box."""
    config = ChargerConfig(map="openevse_rapi", wire=box.wire, phase_count=1, external_cut_off="K1")
    return config.model_copy(update=changes)


async def read_until(charger, wanted, *, beat=None):
    """Read (and beat) until a reading is as wanted."""
    async with asyncio.timeout(20):
        while True:
            if beat is not None:
                await beat()
            reading = await charger.read()
            if wanted(reading):
                return reading
            await asyncio.sleep(0.02)


async def test_a_box_arms_delivers_and_stops(tmp_path):
    """Would catch a command that does not do what its name says: the plant's truth is compared, not the line's word."""
    async with boxed(tmp_path) as (charger, box):
        identity = await charger.identify()
        assert (identity.maker, identity.firmware) == ("OpenEVSE", "8.2.3 RAPI 5.2.1")
        assert identity.serial == "SIMUL801020304"
        begin = await charger.read()
        assert (begin.pilot_state, begin.contactor_closed, begin.fault) == ("B", False, None)
        assert begin.register_mwh == 1_234_567_000
        await charger.arm(5)
        assert box.plant.failsafe_timeout_ms == 5000

        async def beat():
            await charger.set_limit(current_ma=16_999)

        flowing = await read_until(charger, lambda seen: seen.power_w == 3680, beat=beat)
        assert (flowing.pilot_state, flowing.contactor_closed) == ("C", True)
        assert box.truth().offered_ma == 16_000  # whole ampere, never more than asked
        assert box.heard.count("SC 16 V") == 1  # on change only
        assert {"SH 1", "S3 1"} <= set(box.heard)
        counted = await read_until(
            charger, lambda seen: seen.register_mwh >= begin.register_mwh + 1000, beat=beat
        )
        assert counted.register_mwh <= box.truth().register_mwh
        await charger.hold()
        ended = await read_until(charger, lambda seen: seen.seen_open)
        assert not box.truth().energised
        assert 0 <= box.truth().register_mwh - ended.register_mwh <= charger.limits.counter_step_mwh
        assert ended.fault is None


async def test_power_is_refused_before_the_heartbeat_is_armed_and_after_a_reboot(tmp_path):
    """Would catch power offered without a failsafe: never armed, locked since, or a box that starts anew with its own ideas."""
    async with boxed(tmp_path) as (charger, box):
        with pytest.raises(BridgeError, match="not_armed"):
            await charger.set_limit(current_ma=16_000)
        await charger.arm(5)
        await charger.lock()
        assert box.truth().locked
        with pytest.raises(BridgeError, match="not_armed"):
            await charger.set_limit(current_ma=16_000)
        await charger.arm(5)
        assert not box.truth().locked
        with pytest.raises(BridgeError, match="limit_out_of_range"):
            await charger.set_limit(current_ma=5_000)
        await charger.set_limit(current_ma=6_000)
        box.boot()
        await read_until(charger, lambda _: charger.line.boots == 1)
        with pytest.raises(BridgeError, match="not_armed"):
            await charger.set_limit(current_ma=6_000)
        await charger.hold()
        assert not box.truth().enabled


async def test_a_held_box_that_wakes_by_itself_is_put_to_sleep_again(tmp_path, monkeypatch):
    """Would catch a button or a reboot that energises a charger nobody sold anything from."""
    monkeypatch.setattr(rapi, "_LOOK_MS", 50)
    async with boxed(tmp_path, asleep=False) as (charger, box):
        await charger.hold()
        assert not box.truth().enabled
        box.boot()
        assert box.truth().enabled

        async def holding():
            await charger.hold()

        await read_until(charger, lambda seen: seen.seen_open and not box.truth().enabled, beat=holding)


async def test_silence_throttles_and_the_next_beat_says_so(tmp_path):
    """Would catch a missed heartbeat that is papered over: the box was alone, and only `arm` may end that."""
    async with boxed(tmp_path) as (charger, box):
        await charger.arm(1)
        await charger.set_limit(current_ma=16_000)
        await eventually(lambda: box.truth().current_ma == 16_000)
        await eventually(lambda: box.truth().current_ma == 6_000)  # nobody spoke for a second
        assert box.truth().failsafe_tripped
        charger._looked_ms = None
        assert (await charger.read()).fault == "failsafe_tripped"
        with pytest.raises(BridgeError, match="not_armed"):
            await charger.set_limit(current_ma=16_000)
        await charger.hold()
        await charger.arm(5)
        await charger.set_limit(current_ma=16_000)
        assert (await charger.read()).fault is None
        assert box.truth().offered_ma == 16_000


async def test_an_idle_box_that_nobody_feeds_is_no_fault(tmp_path):
    """Would catch a port that cannot be sold from because its heartbeat ran out while nothing was offered."""
    async with boxed(tmp_path) as (charger, box):
        await charger.arm(1)
        await charger.hold()
        box._trigger = 2  # its second is over
        charger._looked_ms = None
        assert (await charger.read()).fault is None
        await charger.arm(5)
        await charger.set_limit(current_ma=6_000)
        await eventually(lambda: box.truth().energised)


async def test_the_bounds_end_a_delivery_that_everybody_forgot(tmp_path):
    """Would catch bounds that are set in vain: with the driver gone, the box stops within its kilowatt-hour."""
    fast = replace(QUICK, current_ma_max=80_000, ev_current_ma_max=80_000)
    async with boxed(tmp_path, fast) as (charger, box):
        await charger.arm(60)
        await charger.set_limit(current_ma=16_000)
        await eventually(lambda: box.truth().energised)
        box.plant.energy_uj += 999 * 3_600_000_000  # a while later
        await eventually(lambda: not box.truth().energised)
        assert box.truth().delivered_mwh < 1_010_000


async def test_the_counter_goes_on_over_a_pulled_cable(tmp_path):
    """Would catch a plug-in counted twice (or never) when the box adds it to its total."""
    async with boxed(tmp_path) as (charger, box):
        box.plant.energy_uj = 41 * 3_600_000_000 + 1
        seen = [(await charger.read()).register_mwh]
        box.plug(plugged=False)
        reading = await charger.read()
        assert reading.pilot_state == "A"
        seen.append(reading.register_mwh)
        box.plug(plugged=True)
        seen.append((await charger.read()).register_mwh)
        assert seen == [1_234_608_000] * 3


async def test_a_cable_pulled_between_two_looks_hides_the_counter(tmp_path, monkeypatch):
    """Would catch the two halves of the counter added across a change of the plug: a whole session too much."""
    async with boxed(tmp_path) as (charger, box):
        asked = charger.line.ask

        async def pulling(command):
            if command == "GU":
                box.plug(plugged=False)
            return await asked(command)

        monkeypatch.setattr(charger.line, "ask", pulling)
        assert (await charger.read()).register_mwh is None


async def test_a_stop_is_seen_or_said(tmp_path, monkeypatch):
    """Would catch a lost `$FS` that counts as obeyed."""
    monkeypatch.setattr(rapi, "REPLY_S", 0.1)
    async with boxed(tmp_path, asleep=False) as (charger, box):
        box.deaf = True
        with pytest.raises(BridgeError, match="timeout"):
            await charger.hold()
        box.deaf = False
        await charger.hold()
        assert not box.truth().enabled
        with monkeypatch.context() as broken:
            broken.setattr(box, "_switch", lambda **_: (True, ""))
            box.plant.enable(on=True, now_ms=box.plant.now_ms)
            charger._hold_seen_ms = None
            with pytest.raises(BridgeError, match="hold_not_obeyed"):
                await charger.hold()


async def test_a_welded_contactor_is_a_fault(tmp_path):
    """Would catch a box that shows "stuck relay" and is sold from, or counted as open."""
    stuck = replace(QUICK, contactor_stuck=True)
    async with boxed(tmp_path, stuck) as (charger, box):
        await charger.arm(5)
        await charger.set_limit(current_ma=6_000)
        await eventually(lambda: box.truth().power_w > 1000)
        with pytest.raises(BridgeError, match="hold_not_obeyed"):
            await charger.hold()
        reading = await charger.read()
        assert reading.fault == "contactor_stuck"
        assert not reading.seen_open


async def test_the_last_resort_is_the_configured_program(tmp_path):
    """Would catch a cut-off that the RAPI driver forgets."""
    opened = tmp_path / "opened"
    touch = (sys.executable, "-c", f"open({str(opened)!r}, 'w').close()")
    async with boxed(tmp_path, cut_off_command=touch) as (charger, _box):
        await charger.cut_off()
        assert opened.exists()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"map": "simulated"}, 'write map = "openevse_rapi"'),
        ({"external_cut_off": None}, "external_cut_off"),
        ({"wire": "rapi://host/dev"}, "write rapi:///dev"),
    ],
)
async def test_what_does_not_fit_is_refused_before_the_port_is_opened(tmp_path, changes, told):
    """Would catch an unattended sale on a box that silence cannot stop (BRIDGE rule 7)."""
    async with RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"))) as box:
        with pytest.raises(MapError, match=told):
            await open_rapi(connected(box, **changes))
        assert box.heard == []


async def test_a_box_without_an_ammeter_is_refused(tmp_path, monkeypatch):
    """Would catch power that is 0 for ever because nobody measures it."""
    async with RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"))) as box:
        box.plant.current_ma = -1
        monkeypatch.setattr(type(box.plant), "advance", lambda *_: None)
        with pytest.raises(MapError, match="no ammeter"):
            await open_rapi(connected(box))
