"""A bus recorded and replayed: the same answers to the same questions, and silence to all others."""

from __future__ import annotations

import asyncio
import json

import pytest
from pymodbus.client import AsyncModbusTcpClient

from firmware_bridge.charger import MapError
from firmware_bridge.simulator import PlantConfig, Simulator, SimulatorConfig
from firmware_bridge.simulator.slave import TcpSlave, framed
from firmware_bridge.simulator.trace import Recorder, Replay

METER = "eastron_sdm630_sdm72v2"


async def asked(wire: str, *addresses: int) -> list[list[int]]:
    """What a stranger's master reads at these addresses, in turn."""
    host, port = wire.removeprefix("tcp://").split(":")
    client = AsyncModbusTcpClient(host, port=int(port), timeout=5, retries=0)
    assert await client.connect()
    try:
        return [(await client.read_input_registers(at, count=2, device_id=1)).registers for at in addresses]
    finally:
        client.close()


async def test_a_recorded_meter_says_the_same_again(tmp_path):
    """Would catch a trace without its answers, a replay with stale transaction ids, or one that runs dry."""
    path = tmp_path / "trace.jsonl"
    plant = PlantConfig(register_mwh_begin=1_234_500_000)
    with Recorder(path, "tcp", lambda: 0) as recorder:
        config = SimulatorConfig(map=METER, tcp="127.0.0.1:0", plant=plant, tap=recorder.frame)
        async with Simulator(config) as simulator:
            true = await asked(simulator.wire, 0x34, 0x48, 0x4A)
    replay = Replay(path)
    slave = TcpSlave(replay, replay.framing)
    wire = await slave.listen("127.0.0.1:0")
    try:
        assert await asked(wire, 0x4A, 0x34, 0x48, 0x48, 0x34) == [
            true[2],
            true[0],
            true[1],
            true[1],
            true[0],
        ]
        assert replay.unknown == 0
    finally:
        await slave.close()


async def test_a_request_that_was_never_made_gets_silence_and_is_counted(tmp_path):
    """Would catch a replay that makes answers up."""
    path = tmp_path / "trace.jsonl"
    with Recorder(path, "rtu", lambda: 0) as recorder:
        recorder.frame("master", framed("rtu", 0, 1, b"\x03\x00\x01\x00\x01"))
        recorder.frame("device", framed("rtu", 0, 1, b"\x03\x02\x00\x07"))
    replay = Replay(path)
    known = await replay.reply("rtu", framed("rtu", 0, 1, b"\x03\x00\x01\x00\x01"))
    assert known == [(0.0, framed("rtu", 0, 1, b"\x03\x02\x00\x07"))]
    assert await replay.reply("rtu", framed("rtu", 0, 1, b"\x03\x00\x02\x00\x01")) == []
    assert replay.unknown == 1


async def test_answers_come_in_the_recorded_order_and_after_the_recorded_time(tmp_path):
    """Would catch a replay in which a counter stands still, or a slow device is quick."""
    path = tmp_path / "trace.jsonl"
    question = framed("tcp", 5, 1, b"\x03\x00\x01\x00\x01")
    with path.open("w") as file:
        print(json.dumps({"trace": 1, "framing": "tcp"}), file=file)
        for number in (1, 2):
            answer = framed("tcp", 5, 1, bytes([3, 2, 0, number]))
            print(json.dumps({"at_ms": number * 1000, "by": "master", "hex": question.hex()}), file=file)
            print(json.dumps({"at_ms": number * 1000 + 40, "by": "device", "hex": answer.hex()}), file=file)
    replay = Replay(path)
    said = [await replay.reply("tcp", framed("tcp", 77, 1, b"\x03\x00\x01\x00\x01")) for _ in range(3)]
    assert said == [[(0.04, framed("tcp", 77, 1, bytes([3, 2, 0, number])))] for number in (1, 2, 2)]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"trace": 2, "framing": "tcp"}',
        '{"trace": 1, "framing": "tcp"}\n{"at_ms": 1, "by": "me", "hex": "00"}',
        '{"trace": 1, "framing": "tcp"}\n{"at_ms": 1, "by": "master", "hex": "0g"}',
        '{"trace": 1, "framing": "tcp"}\n{"at_ms": 1, "by": "master", "hex": ""}',
        '{"trace": 1, "framing": "tcp"}\nnonsense',
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_its_line(tmp_path, text):
    """Would catch a traceback where the wrong file was named."""
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(MapError, match="line"):
        Replay(path)
    with pytest.raises(MapError, match="cannot read"):
        Replay(tmp_path / "missing")
    with pytest.raises(MapError, match="cannot write"):
        Recorder(tmp_path / "missing" / "trace", "tcp", lambda: 0)
    assert asyncio.iscoroutinefunction(Replay.reply)
