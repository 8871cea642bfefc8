"""The simulated OpenEVSE, spoken to by hand: what the protocol's description says must come back."""

import asyncio
import os

import pytest
import serial
from plug import eventually

from firmware_bridge.simulator.rapi import RapiSimulator, RapiSimulatorConfig


class Hand:
    """A terminal program: writes lines, collects what comes."""

    def __init__(self, path):
        self.port = serial.Serial(path, 115200, timeout=0)
        self.came = b""
        asyncio.get_running_loop().add_reader(self.port.fileno(), self._read)

    def _read(self):
        self.came += os.read(self.port.fileno(), 4096)

    async def asked(self, line):
        """The lines that come until the first reply."""
        self.came = b""
        self.port.write(line + b"\r")
        await eventually(lambda: b"$OK" in self.came or b"$NK" in self.came)
        await eventually(lambda: self.came.endswith(b"\r"))
        return self.came.split(b"\r")[:-1]

    def close(self):
        """Let go."""
        asyncio.get_running_loop().remove_reader(self.port.fileno())
        self.port.close()


@pytest.fixture
async def hand_and_box(tmp_path):
    """Somebody at the box's serial port."""
    async with RapiSimulator(RapiSimulatorConfig(str(tmp_path / "tty"), asleep=True)) as box:
        hand = Hand(str(tmp_path / "tty"))
        yield hand, box
        hand.close()


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        (b"$GV^35", b"$OK 8.2.3 5.2.1^2F"),
        (b"$GV*C1", b"$OK 8.2.3 5.2.1^2F"),  # the legacy sum
        (b"$GV", b"$OK 8.2.3 5.2.1^2F"),  # by hand, without a checksum
        (b"$GV :0A^5E", b"$OK 8.2.3 5.2.1 :0A^44"),
        (b"$GV^36", b"$NK^21"),
        (b"$ZZ", b"$NK^21"),
        (b"noise$GV^35", b"$OK 8.2.3 5.2.1^2F"),
        (b"$SC 99 V", b"$NK 32^00"),  # clamped, and said so
        (b"$SC 3 V", b"$NK 6^37"),
        (b"$SH 2", b"$NK^21"),  # limits are taken awake only
        (b"$SY", b"$OK 0 0 0^30"),
    ],
)
async def test_it_answers_as_the_protocol_says(hand_and_box, line, answer):
    """Would catch a simulator that only our own driver understands."""
    hand, _box = hand_and_box
    assert (await hand.asked(line))[-1] == answer


async def test_news_come_before_the_reply_that_caused_them(hand_and_box):
    """Would catch a simulator that is kinder than the real box, against which a careless driver passes."""
    hand, _box = hand_and_box
    said = await hand.asked(b"$FE")
    assert [line[:3] for line in said] == [b"$AT", b"$OK"]


async def test_a_command_longer_than_its_buffer_is_lost(hand_and_box):
    """Would catch a driver whose frames only fit into a simulator's endless buffer."""
    hand, box = hand_and_box
    hand.port.write(b"$SC 16 V" + b" " * 40 + b"\r")
    assert (await hand.asked(b"$GV"))[-1].startswith(b"$OK")
    assert box.heard == ["GV"]


async def test_the_heartbeats_miss_stays_until_it_is_acknowledged(hand_and_box):
    """Would catch a box that forgives silence by itself."""
    hand, box = hand_and_box
    await hand.asked(b"$FE")
    assert b"$OK 1 0 0" in (await hand.asked(b"$SY 1 0"))[-1]
    await eventually(lambda: box.truth().offered_ma == 6_000)  # 0 A is clamped to 6 A
    assert b"$NK 1 0 2" in (await hand.asked(b"$SY"))[-1]
    assert b"$NK 1 0 2" in (await hand.asked(b"$SY 1"))[-1]
    assert b"$OK 1 0 1" in (await hand.asked(b"$SY 165"))[-1]
    assert b"$OK 1 0 1" in (await hand.asked(b"$SY"))[-1]
