"""`v2v key`: key files are made, taken over and looked at, and no private byte is ever shown."""

import contextlib
import json
import os
import pty
import subprocess
import sys

import pytest
from story import CONSUMER
from town import v2v

from agent.core.token import checksummed
from agent.keys import load_signer

SECRET_HEX = CONSUMER.private.secret.hex()
ADDRESS = checksummed(CONSUMER.address)


@pytest.fixture
def password_file(tmp_path):
    """A password in a file of its owner's."""
    file = tmp_path / "password"
    file.write_text("correct horse\n")
    file.chmod(0o600)
    return file


@pytest.fixture
def hex_file(tmp_path):
    """The consumer's key as digits."""
    file = tmp_path / "consumer.hex"
    file.write_text(SECRET_HEX)
    file.chmod(0o600)
    return file


def test_a_new_key_is_encrypted_and_says_whose_it_is(tmp_path, password_file):
    """Would catch a key that is written in the clear, readable by others, or shown."""
    file = tmp_path / "operator.json"
    said = v2v("key", "new", str(file), "--password-file", str(password_file), "--json")
    assert said.exit_code == 0, said.err
    signer = load_signer(str(file), str(password_file))
    told = json.loads(said.out)
    assert told["address"] == checksummed(signer.address)
    assert told["meter_public_key"].endswith(signer.public_key.hex())
    assert file.stat().st_mode & 0o777 == 0o600
    secret = signer._private.secret.hex()
    assert secret not in file.read_text() + said.out + said.err
    again = v2v("key", "new", str(file), "--password-file", str(password_file))
    assert again.exit_code == 78, "never over a key that may hold money"
    shown = v2v("key", "address", str(file), "--password-file", str(password_file), "--json")
    assert json.loads(shown.out)["address"] == told["address"]


def test_an_existing_key_moves_into_a_keystore_and_back(tmp_path, hex_file, password_file):
    """Would catch a key that changes on its way, or leaks on it."""
    store, plain = tmp_path / "consumer.json", tmp_path / "again.hex"
    said = v2v("key", "import", str(store), "--from", str(hex_file), "--password-file", str(password_file))
    assert said.exit_code == 0, said.err
    assert ADDRESS in said.out
    assert SECRET_HEX not in store.read_text() + said.out
    back = v2v(
        "key", "import", str(plain), "--from", str(store), "--from-password-file", str(password_file), "--unencrypted"
    )  # fmt: skip
    assert back.exit_code == 0, back.err
    assert plain.read_text().strip().removeprefix("0x") == SECRET_HEX
    assert plain.stat().st_mode & 0o777 == 0o600
    assert ADDRESS in v2v("key", "address", str(plain)).out


def test_what_is_wrong_is_named_and_the_key_is_not(tmp_path, hex_file, password_file):
    """Would catch a traceback, a key in an error message, and a key taken from a file that everybody can read."""
    wrong = tmp_path / "wrong"
    wrong.write_text("battery staple\n")
    wrong.chmod(0o600)
    store = tmp_path / "consumer.json"
    v2v("key", "import", str(store), "--from", str(hex_file), "--password-file", str(password_file))
    said = v2v("key", "address", str(store), "--password-file", str(wrong))
    assert said.exit_code == 78
    assert "does not open with this password" in said.err
    hex_file.chmod(0o644)
    said = v2v("key", "import", str(tmp_path / "x"), "--from", str(hex_file), "--unencrypted")
    assert said.exit_code == 78
    assert "chmod 600" in said.err
    for words in (("new", "--unencrypted", "--password-file", str(wrong)), ("new",), ("import",)):
        said = v2v("key", words[0], str(tmp_path / "y"), *words[1:])
        assert said.exit_code == 2, words
        assert SECRET_HEX not in said.err
    assert not (tmp_path / "y").exists()


def typed(words, *answers):
    """`v2v key ...` at a terminal, with these answers to its questions: its exit code, and all that the terminal showed."""
    person, its_side = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-m", "agent", "key", *map(str, words)],
        stdin=its_side, stdout=its_side, stderr=its_side, start_new_session=True,
    ) as process:  # fmt: skip
        os.close(its_side)
        shown = b""
        for answer in answers:
            while not shown.endswith(b": "):
                shown += os.read(person, 4096)
            os.write(person, f"{answer}\n".encode())
            shown += b"\n"
        with contextlib.suppress(OSError):  # EIO: it ended
            while part := os.read(person, 4096):
                shown += part
    os.close(person)
    return process.returncode, shown.decode()


@pytest.mark.timeout(120)
def test_at_a_terminal_key_and_password_are_asked_for_and_not_echoed(tmp_path):
    """Would catch a prompt that shows what is typed, or takes a mistyped password."""
    store = tmp_path / "consumer.json"
    code, shown = typed(("import", store), SECRET_HEX, "correct horse", "correct horse")
    assert code == 0, shown
    assert ADDRESS in shown
    assert SECRET_HEX not in shown
    assert "horse" not in shown
    code, shown = typed(("address", store), "correct horse")
    assert code == 0, shown
    assert ADDRESS in shown
