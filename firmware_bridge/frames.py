"""One Modbus question as bytes, and what is believed of its answer. pymodbus writes and reads the frames; the judging is ours.

Rules (BRIDGE, the wire)
* What pymodbus understood is believed only if, written down again, it is every byte that came: its reader hunts for a frame
  inside garbage, rounds coils and takes what fits, and none of that may become a meter's word.
* Every field that the answer shares with the question is held against it: transaction, device id, function, length,
  echoed address and value, and the checksum where the wire has one. What does not agree is `wrong_reply`.
* A refusal by the device (exception) is told from a wrong reply only after the same checks.

May not know: sockets, ports, time.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache

from pymodbus.exceptions import ModbusException
from pymodbus.framer import FramerRTU, FramerSocket
from pymodbus.pdu import DecodePDU, ExceptionResponse, ModbusPDU
from pymodbus.pdu import bit_message as of_bits
from pymodbus.pdu import register_message as of_words

from firmware_bridge.charger import BridgeError

READS_BITS = (1, 2)
READS_WORDS = (3, 4)
_ACKNOWLEDGED = (5, 6, 16)  # writes; their acknowledgement repeats address and value, or address and count
BITS_MAX, WORDS_READ_MAX, WORDS_WRITTEN_MAX = 2000, 125, 123  # the protocol's own limits
_QUESTIONS_KEPT = 256  # the same few are asked for ever; written values pass through
_HEADER_BYTES = 6  # transaction, protocol, length
_LENGTH_MIN, _LENGTH_MAX = 3, 254  # of device id and PDU; another length field is a desynchronised stream

_ANSWERS = DecodePDU(is_server=False)
_TCP, _RTU = FramerSocket(_ANSWERS), FramerRTU(_ANSWERS)


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


def _request(asked: Asked) -> ModbusPDU:
    """The request as pymodbus knows it. AssertionError for what no Modbus device can be asked."""
    assert 0 <= asked.device_id <= 255
    assert 0 <= asked.address <= 0xFFFF
    assert all(0 <= word <= 0xFFFF for word in asked.words)
    device_id, address = asked.device_id, asked.address
    match asked.fc:
        case 1 | 2 | 3 | 4:
            assert 1 <= asked.count <= (BITS_MAX if asked.fc in READS_BITS else WORDS_READ_MAX)
            return _READS[asked.fc](dev_id=device_id, address=address, count=asked.count)
        case 5:
            assert len(asked.words) == 1
            return of_bits.WriteSingleCoilRequest(
                dev_id=device_id, address=address, bits=[bool(asked.words[0])]
            )
        case 6:
            assert len(asked.words) == 1
            return of_words.WriteSingleRegisterRequest(
                dev_id=device_id, address=address, registers=list(asked.words)
            )
        case 16:
            assert 1 <= len(asked.words) <= WORDS_WRITTEN_MAX
            return of_words.WriteMultipleRegistersRequest(
                dev_id=device_id, address=address, registers=list(asked.words)
            )
        case _:
            raise AssertionError(f"function code {asked.fc} is none of ours")


_READS: dict[int, type[ModbusPDU]] = {
    1: of_bits.ReadCoilsRequest,
    2: of_bits.ReadDiscreteInputsRequest,
    3: of_words.ReadHoldingRegistersRequest,
    4: of_words.ReadInputRegistersRequest,
}


@lru_cache(_QUESTIONS_KEPT)
def question(asked: Asked) -> bytes:
    """Device id and PDU of the request. AssertionError for what no Modbus device can be asked."""
    return _body(_request(asked))


def _body(pdu: ModbusPDU) -> bytes:
    return bytes((pdu.dev_id, pdu.function_code)) + pdu.encode()


def tcp_frame(asked: Asked, transaction_id: int) -> bytes:
    """The request as Modbus TCP sends it."""
    return _TCP.encode(question(asked)[1:], asked.device_id, transaction_id)


@lru_cache(_QUESTIONS_KEPT)
def rtu_frame(asked: Asked) -> bytes:
    """The request as RTU sends it, with its checksum."""
    return _RTU.encode(question(asked)[1:], asked.device_id, 0)


def tcp_size(heard: bytes) -> int:
    """Bytes of the Modbus TCP frame that begins `heard`, 0 while it is not whole.

    Raises `wrong_reply` when no frame begins so.
    """
    if len(heard) < _HEADER_BYTES:
        return 0
    length = int.from_bytes(heard[4:6], "big")
    if heard[2:4] != b"\0\0" or not _LENGTH_MIN <= length <= _LENGTH_MAX:
        raise BridgeError("wrong_reply", f"{heard[:6].hex(' ')} is no Modbus TCP header")
    size = _HEADER_BYTES + length
    return size if len(heard) >= size else 0


def rtu_size(heard: bytes, asked: Asked) -> int:
    """Bytes of the RTU frame that begins `heard`, 0 while that is not known yet.

    RTU frames carry no length of their own: it follows from the function, which therefore must be ours. Raises
    `wrong_reply` when device id or function are not.
    """
    if len(heard) < 2:
        return 0
    _check_sender(heard, asked)
    kind = _ANSWERS.lookupPduClass(heard)
    assert kind is not None, "a function of ours"
    return kind.calculateRtuFrameSize(heard)


def open_tcp(frame: bytes, asked: Asked, transaction_id: int) -> tuple[int, ...]:
    """The words (or bits) of a whole Modbus TCP frame, `()` for a write. Raises as `check_reply` does."""
    _, device_id, said_id, pdu = _TCP.decode(frame)
    if said_id != transaction_id:
        raise BridgeError("wrong_reply", f"transaction {said_id} instead of {transaction_id}")
    if _TCP.encode(pdu, device_id, said_id) != frame:
        raise BridgeError("wrong_reply", f"{frame.hex(' ')} is not one whole Modbus TCP frame")
    return check_reply(bytes((device_id,)) + pdu, asked)


def open_rtu(frame: bytes, asked: Asked) -> tuple[int, ...]:
    """The words (or bits) of a whole RTU frame, `()` for a write. Raises as `check_reply` does."""
    _, device_id, _, pdu = _RTU.decode(frame)
    if _RTU.encode(pdu, device_id, 0) != frame:
        raise BridgeError(
            "wrong_reply", "the checksum is wrong; check wiring, termination, baud rate, parity"
        )
    return check_reply(bytes((device_id,)) + pdu, asked)


def check_reply(reply: bytes, asked: Asked) -> tuple[int, ...]:
    """The words (or bits) in `reply` (device id and PDU), once every field agrees with the question.

    Raises BridgeError `exception_N` for the device's own refusal and `wrong_reply` for everything that is not the
    answer to this question.
    """
    _check_sender(reply, asked)
    said = _understood(reply)
    if said.isError():
        raise BridgeError(f"exception_{said.exception_code}", _exception_meaning(said.exception_code, asked))
    if asked.fc in _ACKNOWLEDGED:
        return _check_echo(said, asked)
    # Coils come in whole bytes, so a few more than asked for.
    values = said.bits if asked.fc in READS_BITS else said.registers
    wanted = (asked.count + 7) // 8 * 8 if asked.fc in READS_BITS else asked.count
    if len(values) != wanted:
        raise BridgeError("wrong_reply", f"{len(values)} values came, asked were {wanted} ({_place(asked)})")
    return tuple(map(int, values[: asked.count]))


def _understood(reply: bytes) -> ModbusPDU:
    """What pymodbus reads, if it is all that is there."""
    kind = _ANSWERS.lookupPduClass(reply)
    if kind is not None:
        # Not `DecodePDU.decode`: it also writes every answer down for a log that nobody reads.
        pdu = ExceptionResponse(reply[1] & 0x7F) if kind is ExceptionResponse else kind()
        pdu.dev_id = reply[0]
        try:
            pdu.decode(reply[2:])
            if _body(pdu) == reply:
                return pdu
        except (ModbusException, ValueError, IndexError, struct.error):
            pass  # too short, or it understood something that cannot be written down
    raise BridgeError("wrong_reply", f"{reply.hex(' ')} is more or less than one answer")


def _check_sender(reply: bytes, asked: Asked) -> None:
    if reply[0] != asked.device_id:
        raise BridgeError("wrong_reply", f"asked device {asked.device_id}, device {reply[0]} answered")
    if reply[1] & 0x7F != asked.fc:
        raise BridgeError("wrong_reply", f"function {reply[1] & 0x7F} answered, asked {asked.fc}")


def _check_echo(said: ModbusPDU, asked: Asked) -> tuple[int, ...]:
    if asked.fc == 16:
        agrees = said.count == asked.count
    else:
        agrees = (
            bool(said.bits[0]) == bool(asked.words[0])
            if asked.fc == 5
            else said.registers[0] == asked.words[0]
        )
    if said.address != asked.address or not agrees:
        raise BridgeError("wrong_reply", f"{said} acknowledged after {_place(asked)} was written")
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
