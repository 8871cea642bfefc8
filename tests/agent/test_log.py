"""Stories of the log: one stream for everything that is said, in the reader's form, without what is private."""

import io
import json
import logging
import os
import socket
import subprocess
import sys

import pytest
import structlog

from agent import log

ADDRESS = "0x" + "Ab" * 20
SIGNATURE = "0x" + "cd" * 65
SESSION = "0x" + "12" * 32


def told(level="info", form="json", environ=None):
    """Configure, and give the stream."""
    stream = io.StringIO()
    log.configure(level, form, stream, environ or {})
    return stream


def test_json_lines_carry_event_level_time_and_context():
    """Would catch a log that a machine cannot read, or lines of one session that cannot be found."""
    stream = told()
    structlog.contextvars.bind_contextvars(session=SESSION)
    structlog.get_logger().warning("mqtt.down", broker="127.0.0.1:1883")
    line = json.loads(stream.getvalue())
    assert (line["event"], line["level"], line["broker"]) == ("mqtt.down", "warning", "127.0.0.1:1883")
    assert line["session"] == SESSION
    assert line["timestamp"].endswith("Z")


def test_lower_levels_are_not_said():
    """Would catch `level` that does nothing."""
    stream = told("warning")
    structlog.get_logger().info("mqtt.up")
    assert stream.getvalue() == ""


@pytest.mark.parametrize("form", ["json", "console"])
def test_nothing_private_gets_out_by_any_way(form):
    """Would catch a full address, a signature, a secret or raw bytes in a field, a text, a nested value or a traceback."""
    stream = told(form=form)
    say = structlog.get_logger()
    say.info("one", consumer=ADDRESS, text=f"from {ADDRESS} with {SIGNATURE}", raw=bytes.fromhex("cd" * 65))
    say.info("two", nested={"inner": [ADDRESS, SIGNATURE]}, address=bytes.fromhex("ab" * 20))
    say.info("three", signature="plain text", password="hunter2", private_key="0x" + "77" * 32)
    try:
        raise ValueError(f"bad signature {SIGNATURE} of {ADDRESS}")
    except ValueError:
        say.exception("four")
    text = stream.getvalue().lower()
    assert "ab" * 20 not in text
    assert "cd" * 65 not in text
    assert "hunter2" not in text
    assert "77" * 32 not in text
    assert text.count("0xabab..abab") == 5
    assert "bad signature (65 bytes) of" in text


@pytest.mark.parametrize(
    "written",
    [
        "ab" * 20,  # without 0x, as bytes.hex() gives it
        "left_0x" + "CD" * 65,
        "CD" * 65,
        repr(bytes.fromhex("cd" * 65)),
        repr(b"it's " + bytes.fromhex("ab" * 20)),
        f"Receipt(signature={bytes.fromhex('cd' * 65)!r}, delivered_wh=3)",
    ],
)
def test_bytes_are_known_in_every_spelling(written):
    """Would catch a signature in the text of an exception, as dataclasses and Python's own errors show it."""
    stream = told()
    structlog.get_logger().info("x", text=f"before {written} after")
    text = json.loads(stream.getvalue())["text"]
    assert written not in text
    assert "cdcd" not in text.lower()
    assert "\\x" not in text
    assert text.startswith("before ")
    assert text.endswith(" after")


def test_short_words_stay_words():
    """Would catch a log that says (bytes) where a version, a count or a name of a map stood."""
    stream = told()
    text = "b'ok' of 0x1234 at 1795386574 for 192000000000000 wei, d67793b33b, b'ab', abc'def'"
    structlog.get_logger().info("x", text=text)
    assert json.loads(stream.getvalue())["text"] == text


CRASH = """
import os, sys
from agent import log
log.configure("info", "json", sys.stderr, os.environ)
def crash():
    raise ExceptionGroup("runners", [KeyError(bytes.fromhex("cd" * 65)), ValueError("0x" + "ab" * 20)])
crash()
"""


def test_a_crash_is_one_line_without_anything_private():
    """Would catch Python's own traceback: many lines, and whatever the exception carries in full."""
    ended = subprocess.run([sys.executable, "-c", CRASH], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    line = json.loads(ended.stderr)
    assert (line["event"], line["level"]) == ("process.crashed", "critical")
    assert "KeyError: (bytes)" in line["exception"]
    assert "0xabab..abab" in line["exception"]
    assert "in crash" in line["exception"]
    assert "xcd" not in ended.stderr


def test_sessions_and_transactions_are_shown_in_full():
    """Would catch a redaction that makes a log useless: these are hashes that anyone can look up."""
    stream = told()
    structlog.get_logger().info("session.settled", session=SESSION, tx="0x" + "34" * 32)
    line = json.loads(stream.getvalue())
    assert (line["session"], line["tx"]) == (SESSION, "0x" + "34" * 32)


def test_overlong_field_is_cut():
    """Would catch a hostile message that fills the disk through an error text."""
    stream = told()
    structlog.get_logger().info("x", text="a" * 100_000)
    assert len(stream.getvalue()) < log.FIELD_LENGTH_MAX + 500


def test_libraries_speak_in_the_same_stream_and_only_when_it_matters():
    """Would catch a library's warning lost, or its chatter (and frames of the wire) in our log."""
    stream = told("debug")
    logging.getLogger("aiohttp.server").error("failed for %s", ADDRESS)
    logging.getLogger("aiohttp.server").info("chatter")
    logging.getLogger("pymodbus.logging").error("raw frame")
    (line,) = [json.loads(text) for text in stream.getvalue().splitlines()]
    assert (line["event"], line["library"], line["level"]) == ("library.said", "aiohttp.server", "error")
    assert line["text"] == "failed for 0xabab..abab"


# ---- journald


class Journald:
    """Plays journald's side, and reads entries as it does."""

    def __init__(self, path):
        self.path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(path))
        self._socket.settimeout(5)

    def entry(self):
        """The next entry as a dict (systemd: JOURNAL_NATIVE_PROTOCOL)."""
        data, fields = self._socket.recv(65_536), {}
        while data:
            line, _, data = data.partition(b"\n")
            key, equals, value = line.partition(b"=")
            if not equals:
                length = int.from_bytes(data[:8], "little")
                value, data = data[8 : 8 + length], data[9 + length :]
            fields[key.decode()] = value.decode()
        return fields

    def close(self):
        """Stop listening."""
        self._socket.close()


@pytest.fixture
def journald(tmp_path):
    """A journal that listens."""
    journald = Journald(tmp_path / "journal")
    yield journald
    journald.close()


def test_journald_gets_fields_that_can_be_searched(journald):
    """Would catch one opaque MESSAGE, a wrong priority, or an id that changes between runs (alerts hang on it)."""
    log.configure("info", "journal", io.StringIO(), {}, journald.path)
    structlog.get_logger().warning("session.stranded", session=SESSION, consumer=ADDRESS, lost_wh=7)
    entry = journald.entry()
    assert entry["V2V_EVENT"] == "session.stranded"
    assert entry["V2V_SESSION"] == SESSION
    assert entry["V2V_LOST_WH"] == "7"
    assert entry["V2V_CONSUMER"] == "0xabab..abab"
    assert entry["PRIORITY"] == "4"
    assert entry["SYSLOG_IDENTIFIER"] == "v2v-agent"
    assert entry["MESSAGE"].startswith("session.stranded session=0x12")
    assert entry["MESSAGE_ID"] == "e5c888c884325e2ea7fe59499fe536e4"


def test_traceback_arrives_whole_as_one_entry(journald):
    """Would catch a newline that breaks the entry, or lets a hostile text add fields of its own (PRIORITY, _UID)."""
    log.configure("info", "journal", io.StringIO(), {}, journald.path)
    try:
        raise ValueError("first\nPRIORITY=0\n_UID=0")
    except ValueError:
        structlog.get_logger().exception("agent.bug", text="a\nPRIORITY=0")
    entry = journald.entry()
    assert entry["PRIORITY"] == "3"
    assert "_UID" not in entry
    assert entry["MESSAGE"].rstrip().endswith("_UID=0")
    assert entry["V2V_TEXT"] == "a\nPRIORITY=0"


def test_without_a_journal_the_line_is_not_lost(tmp_path):
    """Would catch a silent agent where journald is away or its queue is full."""
    stream = io.StringIO()
    log.configure("info", "journal", stream, {}, tmp_path / "nobody")
    structlog.get_logger().info("session.settled", session=SESSION)
    assert SESSION in stream.getvalue()


def test_form_follows_where_the_stream_goes(tmp_path):
    """Would catch journal entries for a redirected stream, colours in a file, or JSON on a terminal."""
    with (tmp_path / "log").open("w") as file:
        status = os.fstat(file.fileno())
        assert log._chosen(file, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}) == "journal"
        assert log._chosen(file, {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino + 1}"}) == "json"
        assert log._chosen(file, {}) == "json"
    assert log._chosen(io.StringIO(), {"JOURNAL_STREAM": "1:2"}) == "json"
    leader, follower = os.openpty()
    with os.fdopen(follower, "w") as terminal:
        assert log._chosen(terminal, {}) == "console"
    os.close(leader)
