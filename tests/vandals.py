"""Who shouts at a car, as a process of its own until it is killed.

python tests/vandals.py mqtt PORT ROOT    20 000 messages a second to ROOT/in/..., 300 names, without acknowledgements
python tests/vandals.py http PORT         ninety connections from six addresses, each anew as soon as it is closed
"""

import contextlib
import os
import selectors
import socket
import sys
import time

from bench._broker import CONNECT, Message, packet, publish_packet

PER_S, NAMES, TICK_S = 20_000, 300, 0.01
SOURCES, CONNECTIONS = 6, 15
KINDS = (b"x" * 900, b"{}", b'{"type":"receipt"}', b"[" * 3_000, bytes(range(256)))
ASKED = b"POST /v1/present HTTP/1.1\r\nHost: localhost\r\nX-V2V-Sref: %s\r\nContent-Length: 2\r\n\r\n{}" % (
    b"f" * 32
)


def mqtt(port, root):
    """As fast as the broker takes it, and no faster than PER_S."""
    with socket.create_connection(("127.0.0.1", port)) as broker:
        broker.sendall(packet(CONNECT, b"\x00\x04MQTT\x04\x02\x00\x3c\x00\x06vandal"))
        assert broker.recv(4) == b"\x20\x02\x00\x00"
        frames = [
            publish_packet(Message(f"{root}/in/vandal{number % NAMES}", KINDS[number % len(KINDS)], qos=0))
            for number in range(NAMES * len(KINDS))
        ]
        together, began_s, said = int(PER_S * TICK_S), time.monotonic(), 0
        while True:
            first = said % len(frames)
            broker.sendall(b"".join((frames + frames[:together])[first : first + together]))
            said += together
            time.sleep(max(0.0, began_s + said / PER_S - time.monotonic()))


def http(port):
    """Ask, read, ask again; whoever is shown out comes back at once."""
    waiting = selectors.DefaultSelector()
    while True:
        for number in range(SOURCES * CONNECTIONS - len(waiting.get_map())):
            with contextlib.suppress(OSError):
                visitor = socket.create_connection(
                    ("127.0.0.1", port), 1.0, source_address=(f"127.0.1.{1 + number % SOURCES}", 0)
                )
                visitor.settimeout(1.0)
                visitor.send(ASKED)
                waiting.register(visitor, selectors.EVENT_READ)
        for key, _ in waiting.select(TICK_S):
            try:
                assert key.fileobj.recv(65_536)
                key.fileobj.send(ASKED)
            except (OSError, AssertionError):
                waiting.unregister(key.fileobj)
                key.fileobj.close()


if __name__ == "__main__":
    os.nice(5)  # in the field they are other machines
    if sys.argv[1] == "mqtt":
        mqtt(int(sys.argv[2]), sys.argv[3])
    http(int(sys.argv[2]))
