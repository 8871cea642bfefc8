"""One Modbus question as bytes, and what its answer must look like, byte by byte: pure, without a Modbus library.

Rules (BRIDGE, the wire)
* Every field that the answer shares with the question is held against it: transaction, device id, function, length,
  echoed address and value, and the checksum where the wire has one. What does not agree is `wrong_reply`.
* A refusal by the device (exception) is told from a wrong reply only after the same checks.
* Nothing is guessed: no hunting for a frame inside garbage, no taking what fits out of what came.

May not know: sockets, ports, pymodbus, time.
"""

from __future__ import annotations

from dataclasses import dataclass

from firmware_bridge.charger import BridgeError

READS_BITS = (1, 2)
READS_WORDS = (3, 4)
_ACKNOWLEDGED = (5, 6, 16)  # writes; their acknowledgement is the first five bytes of the question
_MBAP_BYTES = 6  # transaction, protocol and length, in front of device id and PDU
BITS_MAX, WORDS_READ_MAX, WORDS_WRITTEN_MAX = 2000, 125, 123  # the protocol's own limits
_PDU_BYTES_MAX = 254  # with the device id; a longer length field is a desynchronised stream


@dataclass(frozen=True, slots=True)
class Asked:
    """What was asked for: everything a reply is held against."""

    fc: int
    device_id: int
    address: int
    count: int
    words: tuple[int, ...] = ()  # what was written; empty for a read

    @property
    def echo_is_answer(self) -> bool:
        """True where the acknowledgement repeats the question to the last byte, so that an echo passes for it."""
        return self.fc in (5, 6)


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ 0xA001 if value & 1 else value >> 1
        table.append(value)
    return tuple(table)


_CRC_TABLE = _crc_table()


def crc(data: bytes) -> bytes:
    """CRC-16/Modbus of `data`, low byte first, as it stands on the wire."""
    value = 0xFFFF
    for byte in data:
        value = (value >> 8) ^ _CRC_TABLE[(value ^ byte) & 0xFF]
    return value.to_bytes(2, "little")


def question(asked: Asked) -> bytes:
    """Device id and PDU of the request. AssertionError for what no Modbus device can be asked."""
    assert 0 <= asked.device_id <= 255
    assert 0 <= asked.address <= 0xFFFF
    start = bytes((asked.device_id, asked.fc)) + asked.address.to_bytes(2, "big")
    match asked.fc:
        case 1 | 2 | 3 | 4:
            assert 1 <= asked.count <= (BITS_MAX if asked.fc in READS_BITS else WORDS_READ_MAX)
            return start + asked.count.to_bytes(2, "big")
        case 5 | 6:
            assert len(asked.words) == 1
            return start + _single(asked).to_bytes(2, "big")
        case 16:
            assert 1 <= len(asked.words) <= WORDS_WRITTEN_MAX
            words = b"".join(word.to_bytes(2, "big") for word in asked.words)
            return start + asked.count.to_bytes(2, "big") + bytes((len(words),)) + words
        case _:
            raise AssertionError(f"function code {asked.fc} is none of ours")


def _single(asked: Asked) -> int:
    if asked.fc == 5:
        return 0xFF00 if asked.words[0] else 0
    return asked.words[0]


def tcp_frame(asked: Asked, transaction_id: int) -> bytes:
    """The request as Modbus TCP sends it."""
    body = question(asked)
    return transaction_id.to_bytes(2, "big") + b"\0\0" + len(body).to_bytes(2, "big") + body


def rtu_frame(asked: Asked) -> bytes:
    """The request as RTU sends it, with its checksum."""
    body = question(asked)
    return body + crc(body)


def tcp_size(heard: bytes) -> int:
    """Bytes of the Modbus TCP frame that begins `heard`, 0 while that is not known yet.

    Raises `wrong_reply` when no frame begins so.
    """
    if len(heard) < _MBAP_BYTES:
        return 0
    length = int.from_bytes(heard[4:6], "big")
    if heard[2:4] != b"\0\0" or not 3 <= length <= _PDU_BYTES_MAX:
        raise BridgeError("wrong_reply", f"{heard[:6].hex(' ')} is no Modbus TCP header")
    return _MBAP_BYTES + length


def rtu_size(heard: bytes, asked: Asked) -> int:
    """Bytes of the RTU frame that begins `heard`, 0 while that is not known yet.

    RTU frames carry no length of their own: it follows from the function, which therefore must be ours. Raises
    `wrong_reply` when device id or function are not.
    """
    if len(heard) < 2:
        return 0
    _check_sender(heard, asked)
    if heard[1] & 0x80:
        return 5
    if asked.fc in _ACKNOWLEDGED:
        return 8
    return 5 + heard[2] if len(heard) > 2 else 0


def open_tcp(frame: bytes, asked: Asked, transaction_id: int) -> tuple[int, ...]:
    """The words (or bits) of a whole Modbus TCP frame, `()` for a write. Raises as `check_reply` does."""
    said_id = int.from_bytes(frame[:2], "big")
    if said_id != transaction_id:
        raise BridgeError("wrong_reply", f"transaction {said_id} instead of {transaction_id}")
    return check_reply(frame[_MBAP_BYTES:], asked)


def open_rtu(frame: bytes, asked: Asked) -> tuple[int, ...]:
    """The words (or bits) of a whole RTU frame, `()` for a write. Raises as `check_reply` does."""
    if crc(frame[:-2]) != frame[-2:]:
        raise BridgeError(
            "wrong_reply", "the checksum is wrong; check wiring, termination, baud rate, parity"
        )
    return check_reply(frame[:-2], asked)


def check_reply(reply: bytes, asked: Asked) -> tuple[int, ...]:
    """The words (or bits) in `reply` (device id and PDU), once every field agrees with the question.

    Raises BridgeError `exception_N` for the device's own refusal and `wrong_reply` for everything that is not the
    answer to this question.
    """
    _check_sender(reply, asked)
    if reply[1] & 0x80:
        if len(reply) != 3:
            raise BridgeError("wrong_reply", f"an exception of {len(reply)} bytes")
        raise BridgeError(f"exception_{reply[2]}", _exception_meaning(reply[2], asked))
    if asked.fc in _ACKNOWLEDGED:
        return _check_echo(reply, asked)
    wanted_bytes = (asked.count + 7) // 8 if asked.fc in READS_BITS else 2 * asked.count
    if len(reply) != 3 + wanted_bytes or reply[2] != wanted_bytes:
        raise BridgeError(
            "wrong_reply",
            f"{len(reply) - 3} bytes came, announced as {reply[2]}, asked were {wanted_bytes} ({_place(asked)})",
        )
    if asked.fc in READS_BITS:
        return tuple(reply[3 + at // 8] >> at % 8 & 1 for at in range(asked.count))
    return tuple(reply[at] << 8 | reply[at + 1] for at in range(3, len(reply), 2))


def _check_sender(reply: bytes, asked: Asked) -> None:
    if reply[0] != asked.device_id:
        raise BridgeError("wrong_reply", f"asked device {asked.device_id}, device {reply[0]} answered")
    if reply[1] & 0x7F != asked.fc:
        raise BridgeError("wrong_reply", f"function {reply[1] & 0x7F} answered, asked {asked.fc}")


def _check_echo(reply: bytes, asked: Asked) -> tuple[int, ...]:
    number = asked.count if asked.fc == 16 else _single(asked)
    if reply[2:] != asked.address.to_bytes(2, "big") + number.to_bytes(2, "big"):
        raise BridgeError(
            "wrong_reply", f"{reply[2:].hex(' ')} acknowledged after {_place(asked)} was written"
        )
    return ()


def _place(asked: Asked) -> str:
    return f"function {asked.fc}, address {asked.address}, count {asked.count}, device {asked.device_id}"


def _exception_meaning(code: int, asked: Asked) -> str:
    meanings = {
        1: "the device does not know this function code",
        2: "the device has no such address",
        3: "the device refuses this value",
        4: "the device failed while answering",
        6: "the device is busy",
        10: "the gateway has no path to the device",
        11: "the gateway got no answer from the device; check the device id",
    }
    return f"{meanings.get(code, 'the device refused')} ({_place(asked)})"
