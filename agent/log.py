"""What is said while running: structlog, told once where to write and what never to write.

Rules
* Each line is an event with a stable id ("session.settled", "mqtt.down") and fields; prose is for humans, ids are for searches.
* Three forms: a console for a terminal; journald's own protocol under systemd (so `journalctl V2V_SESSION=0x...` works); else
  JSON lines. Libraries that use the standard `logging` end in the same stream.
* The last line of defence for privacy (PROTOCOL section 8): addresses are shortened, signatures and raw bytes blacked out, in
  every field and in tracebacks. The first line is not to log them.
* A crash is said in the same way: Python's own traceback would show what exceptions carry, and be many entries in a journal.
* The wall clock stands here, and nowhere else in the daemon.

May not know: sessions, keys. A leaf: only the composition root and the command lines call `configure`.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import uuid
from collections.abc import Mapping, MutableMapping
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import Processor

Format = Literal["auto", "console", "json", "journal"]
JOURNAL_SOCKET = Path("/run/systemd/journal/socket")
IDENTIFIER = "v2v-agent"
FIELD_LENGTH_MAX = 8192  # a traceback fits; a datagram to journald must stay well below 200 kB
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
SYSLOG_PRIORITY = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
# Chatty libraries: what matters of theirs reaches us as an exception, and we say it ourselves.
QUIET = ("pymodbus", "amqtt", "transitions", "aiohttp.access", "web3", "websockets", "urllib3")

_HIDDEN_KEY = re.compile(
    r"signature|password|secret|private|raw_tx|nonce_?c\b|hello_?nonce|challenge", re.IGNORECASE
)
_HEX = re.compile(r"(?:0x)?[0-9a-fA-F]{40,}")
_BYTES = re.compile(r"""\bb(?:'(?:[^'\\]|\\.){12,}'|"(?:[^"\\]|\\.){12,}")""")  # as Python shows them


def configure(
    level: str,
    format: Format,  # noqa: A002 - the setting's own name
    stream: TextIO,
    environ: Mapping[str, str],
    journal_socket: Path = JOURNAL_SOCKET,
) -> None:
    """Set up logging for this process. `stream` is where console and JSON lines go (stderr)."""
    chosen = _chosen(stream, environ) if format == "auto" else format
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        black_out,
    ]
    structlog.configure(
        processors=[*shared, *_ending(chosen, stream)],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=_factory(chosen, stream, journal_socket),
        cache_logger_on_first_use=False,  # tests and `v2v demo` configure more than once
    )
    _adopt_standard_logging(LEVELS[level])
    sys.excepthook = _say_crash


def _say_crash(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """The last words of a process that a bug ends."""
    structlog.get_logger().critical("process.crashed", exc_info=(kind, error, trace))


def _chosen(stream: TextIO, environ: Mapping[str, str]) -> Format:
    if _is_journal(stream, environ.get("JOURNAL_STREAM", "")):
        return "journal"
    return "console" if stream.isatty() else "json"


def _is_journal(stream: TextIO, device_and_inode: str) -> bool:
    """systemd.exec(5): $JOURNAL_STREAM names the socket; it is inherited even where the stream was redirected."""
    try:
        status = os.fstat(stream.fileno())
    except (OSError, ValueError):  # a stream without a file
        return False
    return device_and_inode == f"{status.st_dev}:{status.st_ino}"


def _ending(chosen: Format, stream: TextIO) -> list[Processor]:
    clock = structlog.processors.TimeStamper(fmt="iso", utc=True)
    if chosen == "journal":
        return [_journal_fields]
    if chosen == "console":
        plain = structlog.dev.plain_traceback
        return [clock, structlog.dev.ConsoleRenderer(colors=stream.isatty(), exception_formatter=plain)]
    return [clock, structlog.processors.JSONRenderer()]


def _factory(chosen: Format, stream: TextIO, journal_socket: Path) -> Any:
    if chosen == "journal":
        return lambda *_: _JournalLogger(journal_socket, stream)
    return structlog.PrintLoggerFactory(stream)


# ---- privacy


def black_out(_: Any, __: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """A structlog processor: shorten addresses, remove signatures, keys and raw bytes, cut what is too long."""
    return {key: "(hidden)" if _HIDDEN_KEY.search(key) else _safe(value) for key, value in event.items()}


def _safe(value: Any) -> Any:
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, bytes):
        value = f"0x{value.hex()}"
    if isinstance(value, Mapping):
        return black_out(None, "", {str(key): item for key, item in value.items()})
    if isinstance(value, list | tuple | set | frozenset):
        return [_safe(item) for item in value]
    return _HEX.sub(_safe_hex, _BYTES.sub("(bytes)", str(value)[:FIELD_LENGTH_MAX]))


def _safe_hex(found: re.Match[str]) -> str:
    """20 bytes are an address: short. 32 bytes are a session or a transaction: public, in full. All else: only its length."""
    digits = found.group().removeprefix("0x")
    if len(digits) == 40:
        return f"0x{digits[:4]}..{digits[-4:]}".lower()
    return found.group() if len(digits) == 64 else f"({len(digits) // 2} bytes)"


# ---- journald's native protocol (systemd: JOURNAL_NATIVE_PROTOCOL): one datagram, one entry


def _journal_fields(
    _: Any, name: str, event: MutableMapping[str, Any]
) -> tuple[tuple[bytes], dict[str, Any]]:
    """The entry as bytes: MESSAGE for humans, V2V_<FIELD> for searches, MESSAGE_ID stable for each event id."""
    event_id, level = str(event.pop("event", "")), str(event.pop("level", name))
    text = " ".join([event_id, *(f"{key}={value}" for key, value in event.items() if key != "exception")])
    entry = {
        "MESSAGE": f"{text}\n{event['exception']}" if "exception" in event else text,
        "PRIORITY": str(SYSLOG_PRIORITY.get(level, 6)),
        "SYSLOG_IDENTIFIER": IDENTIFIER,
        "V2V_EVENT": event_id,
    }
    if re.fullmatch(r"[a-z_]+\.[a-z_]+", event_id):
        entry["MESSAGE_ID"] = uuid.uuid5(uuid.NAMESPACE_OID, f"v2v-agent/{event_id}").hex
    for key, value in event.items():
        entry["V2V_" + re.sub(r"[^A-Z0-9_]", "_", key.upper())[:60]] = str(value)
    return (b"".join(_journal_field(key, value.encode()) for key, value in entry.items()),), {}


def _journal_field(key: str, value: bytes) -> bytes:
    if b"\n" not in value:
        return key.encode() + b"=" + value + b"\n"
    return key.encode() + b"\n" + len(value).to_bytes(8, "little") + value + b"\n"


class _JournalLogger:
    """Sends entries to journald; where it does not take one, the bytes go to the stream instead of nowhere."""

    def __init__(self, path: Path, stream: TextIO) -> None:
        self._path, self._stream = path, stream

    def msg(self, entry: bytes) -> None:
        """Send one entry; never blocks."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                sock.sendto(entry, str(self._path))
            except OSError:
                print(entry.decode(errors="replace").replace("\n", " | "), file=self._stream, flush=True)

    debug = info = warning = error = critical = exception = log = msg


# ---- libraries


class _ToStructlog(logging.Handler):
    """Standard logging records become our lines: `library` is the logger's name."""

    def emit(self, record: logging.LogRecord) -> None:
        level = logging.getLevelName(record.levelno).lower()
        say = structlog.get_logger().log
        fields = {"library": record.name, "text": record.getMessage(), "exc_info": record.exc_info or None}
        say(LEVELS.get(level, record.levelno), "library.said", **fields)


def _adopt_standard_logging(level: int) -> None:
    root = logging.getLogger()
    root.handlers = [_ToStructlog()]
    root.setLevel(max(level, logging.WARNING))  # of libraries only what may need somebody
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.CRITICAL)
