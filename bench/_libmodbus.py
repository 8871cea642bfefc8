"""libmodbus (C, written by others) through ctypes: a slave as a process of its own, and a master that blocks.

Register N holds N + 1000, in both tables. `python -m bench._libmodbus tcp PORT` or `... rtu PATH BAUD` is the slave; it
says `ready` when it listens and ends when its stdin does. Nothing here is part of the product.
"""

from __future__ import annotations

import ctypes
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

REGISTERS = 10_000
OFFSET = 1_000
_QUERY_BYTES_MAX = 260
_STOP_BITS = 2  # without parity, as a pty wants it: characters of 11 bits


class _Mapping(ctypes.Structure):
    """`modbus_mapping_t` of libmodbus 3.1."""

    _fields_ = (
        *((name, ctypes.c_int) for name in (
            "bits", "bits_from", "inputs", "inputs_from",
            "input_registers", "input_registers_from", "registers", "registers_from",
        )),
        ("tab_bits", ctypes.POINTER(ctypes.c_uint8)),
        ("tab_inputs", ctypes.POINTER(ctypes.c_uint8)),
        ("tab_input_registers", ctypes.POINTER(ctypes.c_uint16)),
        ("tab_registers", ctypes.POINTER(ctypes.c_uint16)),
    )  # fmt: skip


@cache
def library() -> ctypes.CDLL | None:
    """Libmodbus with its signatures, None where it is not installed (Debian: libmodbus5)."""
    try:
        lib = ctypes.CDLL("libmodbus.so.5", use_errno=True)
    except OSError:
        return None
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    lib.modbus_new_tcp.restype = lib.modbus_new_rtu.restype = pointer
    lib.modbus_new_tcp.argtypes = (text, integer)
    lib.modbus_new_rtu.argtypes = (text, integer, ctypes.c_char, integer, integer)
    lib.modbus_mapping_new.restype = ctypes.POINTER(_Mapping)
    lib.modbus_strerror.restype = text
    lib.modbus_set_slave.argtypes = lib.modbus_tcp_listen.argtypes = (pointer, integer)
    lib.modbus_connect.argtypes = lib.modbus_close.argtypes = lib.modbus_free.argtypes = (pointer,)
    lib.modbus_set_socket.argtypes = (pointer, integer)
    lib.modbus_receive.argtypes = (pointer, text)
    lib.modbus_reply.argtypes = (pointer, text, integer, ctypes.POINTER(_Mapping))
    for name in ("modbus_read_registers", "modbus_read_input_registers"):
        getattr(lib, name).argtypes = (pointer, integer, integer, ctypes.POINTER(ctypes.c_uint16))
    lib.modbus_write_register.argtypes = (pointer, integer, ctypes.c_uint16)
    return lib


def _library() -> ctypes.CDLL:
    lib = library()
    assert lib is not None, "libmodbus5 is not installed"
    return lib


def _context(words: Sequence[str]) -> ctypes.c_void_p:
    """A context for `tcp PORT` or `rtu PATH BAUD`, device id 1."""
    lib = _library()
    if words[0] == "tcp":
        made = lib.modbus_new_tcp(b"127.0.0.1", int(words[1]))
    else:
        made = lib.modbus_new_rtu(words[1].encode(), int(words[2]), b"N", 8, _STOP_BITS)
    context = ctypes.c_void_p(made)
    _checked(lib.modbus_set_slave(context, 1))
    return context


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), _library().modbus_strerror(ctypes.get_errno()).decode())
    return result


class Master:
    """libmodbus as a master: `read` blocks until the answer is there."""

    def __init__(self, *words: str) -> None:
        self._context = _context(words)
        self._lib = _library()
        self._words = (ctypes.c_uint16 * 125)()
        _checked(self._lib.modbus_connect(self._context))

    def read(self, address: int, count: int) -> list[int]:
        """Holding registers; OSError when libmodbus has something against the answer."""
        _checked(self._lib.modbus_read_registers(self._context, address, count, self._words))
        return self._words[:count]

    def write(self, address: int, value: int) -> None:
        """One holding register; OSError when libmodbus has something against the acknowledgement."""
        _checked(self._lib.modbus_write_register(self._context, address, value))

    def close(self) -> None:
        """Give the wire back."""
        self._lib.modbus_close(self._context)
        self._lib.modbus_free(self._context)


@contextmanager
def slave(*words: str) -> Iterator[None]:
    """The slave as a process, while the block lasts."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bench._libmodbus", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"ready\n", "the libmodbus slave did not start"
        yield
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()


def _mapping() -> Any:
    """What the slave holds."""
    mapping = _library().modbus_mapping_new(16, 16, REGISTERS, REGISTERS)
    for at in range(REGISTERS):
        mapping[0].tab_registers[at] = mapping[0].tab_input_registers[at] = at + OFFSET
    for at in range(16):
        mapping[0].tab_bits[at] = mapping[0].tab_inputs[at] = at % 3 == 0
    return mapping


def _serve(words: Sequence[str]) -> None:
    lib, context, mapping = _library(), _context(words), _mapping()
    query = ctypes.create_string_buffer(_QUERY_BYTES_MAX)

    def answer() -> None:
        if (length := _checked(lib.modbus_receive(context, query))) > 0:
            _checked(lib.modbus_reply(context, query, length, mapping))

    if words[0] == "rtu":
        _checked(lib.modbus_connect(context))
        _say_ready()
        while True:
            with suppress(OSError):  # a bent frame: the next one, please
                answer()
    server = socket.socket(fileno=_checked(lib.modbus_tcp_listen(context, 8)))
    masters: list[socket.socket] = []
    _say_ready()
    while True:
        for one in select.select([server, *masters], [], [])[0]:
            if one is server:
                masters.append(server.accept()[0])
                masters[-1].setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                continue
            lib.modbus_set_socket(context, one.fileno())
            try:
                answer()
            except OSError:  # it went away
                masters.remove(one)
                one.close()


def _say_ready() -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()


def _end_with_stdin() -> None:
    sys.stdin.read()
    os._exit(0)  # libmodbus waits in C, where no Python signal reaches


if __name__ == "__main__":
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    _serve(sys.argv[1:])
