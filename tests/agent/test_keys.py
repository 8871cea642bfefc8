"""Keys: what signs, what is refused, and that the private bytes are never seen."""

import base64
import copy
import hashlib
import json
import os
import pickle
import ssl
import subprocess
import sys
import traceback

import coincurve
import pytest
from authority import Authority
from eth_account import Account
from hypothesis import given
from hypothesis import strategies as st

from agent.core.token import CURVE_ORDER, address_of, is_canonical, recover
from agent.errors import Misconfigured
from agent.keys import (
    MeterSigner,
    Signer,
    ephemeral_meter_signer,
    ephemeral_signer,
    load_meter_signer,
    load_password,
    load_signer,
    new_key,
    require_different_keys,
    tls_context,
)

# A key that everybody knows (anvil's first account), so that addresses can be checked against other tools.
KEY = "ac0974bec39a17e36ba4a6b4d238ff944bacb478cbed5efcae784d7bf4f2ff80"
ADDRESS = bytes.fromhex("f39fd6e51aad88f6f4ce6ab8827279cfffb92266")
PASSWORD = "correct horse"


def private_file(path, content):
    """A file that only its owner can read."""
    path.write_text(content)
    path.chmod(0o600)
    return str(path)


def keystore(password=PASSWORD):
    """A keystore V3 of KEY, made cheap to open."""
    return json.dumps(Account.encrypt(KEY, password, kdf="pbkdf2", iterations=2))


@given(st.binary(min_size=32, max_size=32))
def test_signatures_are_canonical_deterministic_and_ours(digest):
    """Would catch high s, v 0/1, a random nonce, or a signature that the contract gives to somebody else."""
    signer = ephemeral_signer(b"any")
    signature = signer.sign_digest(digest)
    assert is_canonical(signature)
    assert signature[64] in (27, 28)
    assert int.from_bytes(signature[32:64], "big") <= CURVE_ORDER // 2
    assert recover(digest, signature) == signer.address
    assert signer.sign_digest(digest) == signature


def test_only_a_digest_is_signed():
    """Would catch a message signed unhashed, or hashed twice."""
    with pytest.raises(AssertionError):
        ephemeral_signer(b"any").sign_digest(b"hello")


def test_a_hex_file_gives_the_address_that_other_tools_give(tmp_path):
    """Would catch a key read with another byte order, or an address hashed over the wrong bytes."""
    for content in (KEY, f"0x{KEY}\n", KEY.upper()):
        signer = load_signer(private_file(tmp_path / "key", content))
        assert signer.address == ADDRESS
        assert signer.public_key[0] == 4
        assert len(signer.public_key) == 65
        assert address_of(signer.public_key) == ADDRESS


def test_a_transaction_is_signed_for_its_chain_by_our_address(tmp_path):
    """Would catch a raw transaction that another key, or no chain in particular, answers for."""
    signer = load_signer(private_file(tmp_path / "key", KEY))
    transaction = {
        "chainId": 5,
        "nonce": 7,
        "to": "0x" + "11" * 20,
        "value": 1,
        "data": b"\x01",
        "gas": 50_000,
        "maxFeePerGas": 2,
        "maxPriorityFeePerGas": 1,
    }
    raw = signer.sign_transaction(transaction)
    assert raw[0] == 2  # EIP-1559
    assert bytes.fromhex(Account.recover_transaction(raw)[2:]) == ADDRESS
    assert signer.sign_transaction(transaction) == raw


def test_a_keystore_opens_with_its_password_from_a_file_or_a_credential(tmp_path):
    """Would catch a keystore that only one of the two ways opens."""
    path = private_file(tmp_path / "keystore.json", keystore())
    password = private_file(tmp_path / "password", f"{PASSWORD}\n")
    assert load_signer(path, password).address == ADDRESS
    (tmp_path / "operator_key").write_text(keystore())
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    assert load_signer("operator_key", "password", environ=environ).address == ADDRESS
    assert load_password("password", environ=environ) == PASSWORD


def test_a_credential_may_be_group_readable_because_systemd_guards_its_folder(tmp_path):
    """Would catch refusing systemd's own credentials, whose access list shows as group bits."""
    (tmp_path / "operator_key").write_text(KEY)
    (tmp_path / "operator_key").chmod(0o440)
    assert load_signer("operator_key", environ={"CREDENTIALS_DIRECTORY": str(tmp_path)}).address == ADDRESS


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_a_key_that_others_can_read_is_refused_with_the_command_that_repairs_it(tmp_path, mode):
    """Would catch a private key lying open to everybody on the vehicle."""
    path = tmp_path / "key"
    path.write_text(KEY)
    path.chmod(mode)
    with pytest.raises(Misconfigured) as caught:
        load_signer(str(path))
    assert str(caught.value) == f"{path} can be read by others (mode {mode:04o})\n  chmod 600 {path}"


def refusal(source, password_source=None, **options):
    """What is printed when this key cannot be loaded."""
    with pytest.raises(Misconfigured) as caught:
        load_signer(source, password_source, **options)
    return str(caught.value)


def test_what_cannot_be_a_key_is_refused_by_name(tmp_path):
    """Would catch a traceback, a silent zero key, or a remedy that does not help."""
    assert refusal(f"{tmp_path}/no") == (
        f"{tmp_path}/no: there is no such file\n"
        "  check the path in [keys]; relative paths start at the settings file"
    )
    assert refusal("operator_key", environ={}) == (
        "operator_key names a systemd credential, "
        "but systemd gave us none ($CREDENTIALS_DIRECTORY is not set)\n"
        "  start the unit instead, or name a file by a path with a slash (./operator_key)"
    )
    assert refusal("operator_key", environ={"CREDENTIALS_DIRECTORY": str(tmp_path)}) == (
        "operator_key: there is no such credential\n"
        "  add LoadCredential=operator_key:/etc/v2v-agent/operator_key to the unit, "
        "and put the file there (mode 0600)"
    )
    assert "cannot be read (Is a directory)" in refusal(f"{tmp_path}/")
    assert "is not a file" in refusal("/dev/null")
    assert "larger than 16384 bytes" in refusal(private_file(tmp_path / "huge", "0" * 20_000))
    assert "neither a keystore (JSON) nor a key" in refusal(private_file(tmp_path / "word", "hello"))
    for number in (0, CURVE_ORDER):
        assert "holds no secp256k1 private key" in refusal(
            private_file(tmp_path / "number", f"{number:064x}")
        )


def test_a_keystore_that_does_not_open_says_why(tmp_path):
    """Would catch a wrong password reported as a broken file, and the other way round."""
    path = private_file(tmp_path / "keystore", keystore())
    wrong = private_file(tmp_path / "wrong", "incorrect horse")
    assert "nothing says where its password is" in refusal(path)
    assert "does not open with this password" in refusal(path, wrong)
    assert "does not hold one line" in refusal(path, private_file(tmp_path / "two", "a\nb"))
    assert "does not hold one line" in refusal(path, private_file(tmp_path / "none", "\n"))
    for content in ("{}", "{nonsense", '{"version": 9}', '{"version": 3, "crypto": {}}'):
        assert "is no keystore of version 3" in refusal(private_file(tmp_path / "broken", content), wrong)


def test_a_key_in_the_wrong_place_is_refused_and_not_repeated():
    """Would catch a private key accepted from a setting or a variable, or printed in the refusal."""
    for given_key in (KEY, f"0x{KEY}"):
        shown = refusal(given_key)
        assert "a private key was given where the name of one belongs" in shown
        assert KEY not in shown


@pytest.mark.parametrize(
    "secret",
    [
        f"0X{KEY}",
        base64.urlsafe_b64encode(bytes.fromhex(KEY)).decode(),
        KEY[:48],
        str(int(KEY, 16)),
        f" {KEY}",
    ],
)
def test_what_looks_like_no_name_is_not_repeated(tmp_path, secret):
    """Would catch a key in another spelling, taken for a credential's name and printed as one that does not exist."""
    for environ in ({}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}):
        assert secret.strip() not in refusal(secret, environ=environ)


def test_a_password_in_the_place_of_its_name_is_not_repeated(tmp_path):
    """Would catch a password in a log: its owner wrote it where the name of its credential belongs."""
    path = private_file(tmp_path / "keystore", keystore())
    for environ in ({}, {"CREDENTIALS_DIRECTORY": str(tmp_path)}):
        shown = refusal(path, "hunter2", environ=environ)
        assert "the credential with the password" in shown
        assert "hunter2" not in shown


def everything_shown(error):
    """A traceback as the most talkative tools print it: with every frame's locals and every cause."""
    frames_of_the_product = error.__traceback__.tb_next
    shown = traceback.TracebackException(type(error), error, frames_of_the_product, capture_locals=True)
    return "".join(shown.format())


def test_no_traceback_shows_the_key_or_the_password(tmp_path):
    """Would catch secrets in crash reports: some log renderers print every frame's locals."""
    path = private_file(tmp_path / "keystore", keystore())
    shown = []
    for password in ("wrong horse", "two\nlines of horse"):
        with pytest.raises(Misconfigured) as caught:
            load_signer(path, private_file(tmp_path / "password", password))
        shown.append(everything_shown(caught.value))
    bad = private_file(tmp_path / "bad", f"{KEY}ff")
    with pytest.raises(Misconfigured) as caught:
        load_signer(bad)
    shown.append(everything_shown(caught.value))
    signer = load_signer(private_file(tmp_path / "key", KEY))
    with pytest.raises(ValueError, match="this transaction cannot be signed") as unsigned:
        signer.sign_transaction({"to": "nowhere"})
    shown.append(everything_shown(unsigned.value))
    for text in shown:
        assert "horse" not in text
        assert KEY not in text
        assert str(int(KEY, 16)) not in text
        assert repr(bytes.fromhex(KEY))[2:-1] not in text


@pytest.mark.parametrize("signer", [ephemeral_signer(b"x"), ephemeral_meter_signer(b"x")])
def test_a_signer_cannot_be_shown_copied_or_stored(signer):
    """Would catch private bytes in a log line, a pickle or a deep copy."""
    address = address_of(signer.public_key).hex()
    assert f"{signer!r}" == f"{type(signer).__name__}(0x{address[:4]}..{address[-4:]})"
    assert not hasattr(signer, "__dict__")
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="holds a private key"):
            attempt(signer)


def test_the_meter_signs_what_any_verifier_can_check():
    """Would catch a record signed over other bytes, or a public key that OCMF's tools cannot read."""
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_der_public_key

    meter = ephemeral_meter_signer(b"meter")
    payload = b'{"FV":"1.0"}'
    signature = meter.sign_sha256(payload)
    public_key = load_der_public_key(meter.public_key_spki)
    public_key.verify(signature, payload, ec.ECDSA(hashes.SHA256()))
    assert coincurve.PublicKey(meter.public_key).verify(signature, payload)
    assert meter.sign_sha256(payload) == signature


def test_one_key_for_both_parts_is_refused(tmp_path):
    """Would catch a meter record that is also somebody's transaction."""
    path = private_file(tmp_path / "key", KEY)
    with pytest.raises(Misconfigured, match=r"are the same \(0xf39f..2266\)"):
        require_different_keys(load_signer(path), load_meter_signer(path))
    require_different_keys(ephemeral_signer(b"x"), ephemeral_meter_signer(b"x"))


def test_the_same_seed_gives_the_same_key_and_other_seeds_and_parts_give_others():
    """Would catch a demo that cannot be repeated, and two sessions that share a key."""
    assert ephemeral_signer(b"1").address == ephemeral_signer(b"1").address
    keys = {
        ephemeral_signer(b"1").public_key,
        ephemeral_signer(b"2").public_key,
        ephemeral_meter_signer(b"1").public_key,
    }
    assert len(keys) == 3
    assert isinstance(ephemeral_signer(b"1"), Signer)
    assert isinstance(ephemeral_meter_signer(b"1"), MeterSigner)


@pytest.mark.parametrize("password", [None, PASSWORD])
def test_a_new_key_can_be_loaded_and_only_by_us(tmp_path, password):
    """Would catch a key file with open permissions, or one that does not give back its key."""
    path = tmp_path / "new"
    old_umask = os.umask(0)
    try:
        made = new_key(path, password=password)
    finally:
        os.umask(old_umask)
    assert path.stat().st_mode & 0o777 == 0o600
    password_file = private_file(tmp_path / "password", PASSWORD)
    assert load_signer(str(path), password_file).address == made.address
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "password"]
    assert new_key(tmp_path / "other").address != made.address


def test_a_new_key_never_replaces_an_old_one(tmp_path):
    """Would catch the loss of a key that holds money, and drafts left behind."""
    path = tmp_path / "key"
    path.write_text("precious")
    with pytest.raises(Misconfigured, match="exists already"):
        new_key(path)
    assert path.read_text() == "precious"
    with pytest.raises(Misconfigured, match="cannot be written"):
        new_key(tmp_path / "no such folder" / "key")
    assert [file.name for file in tmp_path.iterdir()] == ["key"]


def test_loading_a_hex_key_does_not_wait_for_eth_account(tmp_path):
    """Would catch a third of a second (seconds on a Raspberry Pi) spent before anything is signed."""
    path = private_file(tmp_path / "key", KEY)
    code = (
        f"import sys; from agent.keys import load_signer; load_signer({path!r}).sign_digest(bytes(32));"
        "print('eth_account' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"


def test_ephemeral_keys_are_plain_hashes_of_their_seed():
    """Would catch a changed derivation, which would strand what a repeated demo left on its keys."""
    scalar = hashlib.sha256(b"v2v ephemeral key\0account\0" + b"seed").digest()
    assert ephemeral_signer(b"seed").public_key == coincurve.PrivateKey(scalar).public_key.format(
        compressed=False
    )


# ---- a process that is shut


SHUT = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
{first}
import ctypes
print(resource.getrlimit(resource.RLIMIT_CORE)[0], ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))  # 3: PR_GET_DUMPABLE
"""


@pytest.mark.parametrize(
    "first",
    [
        "from agent.keys import load_signer; load_signer({key!r})",
        "from agent.keys import load_meter_signer; load_meter_signer({key!r})",
        "from agent.keys import new_key; from pathlib import Path; new_key(Path({key!r} + '.new'))",
        "from agent.keys import typed_key; typed_key('{digits}')",
        "from agent.keys import load_password; load_password({key!r})",
        "from agent.keys import shut_process; shut_process(for_good=True)",
        "from click.testing import CliRunner; from agent.cli.key import key; CliRunner().invoke(key, ['address', 'no'])",
    ],
    ids=["account", "meter", "new", "typed", "password", "for good", "command"],
)
def test_a_process_that_has_seen_a_secret_leaves_no_core_and_lets_nobody_look(tmp_path, first):
    """Would catch a way to a private key that forgets to shut the process: a crash would write the key to the disk."""
    path = private_file(tmp_path / "key", KEY)
    code = SHUT.format(first=first.format(key=path, digits=KEY))
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert told.stdout == "0 0\n"
    open_one = subprocess.run(
        [sys.executable, "-c", SHUT.format(first="")], capture_output=True, text=True, check=True
    )
    assert open_one.stdout.endswith(" 1\n")  # silence above is an answer


def test_a_kernel_that_keeps_processes_open_gets_no_key(tmp_path, monkeypatch):
    """Would catch a sandbox in which the key is read all the same, and a core file with it."""
    path = private_file(tmp_path / "key", KEY)

    class Refusing:
        def __init__(self, *_, **__):
            pass

        def prctl(self, *_):
            return -1

    monkeypatch.setattr("agent.keys.ctypes.CDLL", Refusing)
    assert "cannot be shut" in refusal(path)


# ---- certificates


def test_whoever_shows_a_certificate_is_believed_and_nobody_else(tmp_path):
    """Would catch a connection without our certificate, to a broker that nobody vouches for, or to another host's."""
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    certificate, key = ours.issue("car")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(*ours.issue("broker", host="127.0.0.1"))
    server.load_verify_locations(ours.file)
    server.verify_mode = ssl.CERT_REQUIRED
    car = tls_context(ours.file, certificate, str(key))
    assert handshaken(car, server) == "car"
    assert "DID_NOT_RETURN_A_CERTIFICATE" in handshaken(tls_context(ours.file), server)
    assert "CERTIFICATE_VERIFY_FAILED" in handshaken(tls_context(theirs.file, certificate, str(key)), server)
    assert "CERTIFICATE_VERIFY_FAILED" in handshaken(car, server, host="127.0.0.2")


def handshaken(client, server, host="127.0.0.1"):
    """Whom the server sees; or why there is no connection."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ours = client.wrap_bio(to_client, to_server, server_hostname=host)
    its = server.wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for side in (ours, its):
            try:
                side.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLError as error:
                return error.reason
    return dict(part[0] for part in its.getpeercert()["subject"])["commonName"]


def test_certificates_that_do_not_do_are_named(tmp_path):
    """Would catch a traceback, a prompt for a password in a service, and a key that everybody can read."""
    authority = Authority(tmp_path)
    certificate, key = authority.issue("car")
    other_certificate, _ = authority.issue("other")
    for wrong, words in (
        ((tmp_path / "none.crt",), "no certificate of an authority"),
        ((key,), "no certificate of an authority"),
        ((authority.file, other_certificate, str(key)), "no certificate with its key"),
        ((authority.file, tmp_path / "none.crt", str(key)), "no certificate with its key"),
        ((authority.file, certificate, str(tmp_path / "none.key")), "no such file"),
        ((authority.file, certificate, "mqtt_certificate_key"), "LoadCredential"),
    ):
        with pytest.raises(Misconfigured) as refused:
            tls_context(*wrong, environ={"CREDENTIALS_DIRECTORY": str(tmp_path / "nowhere")})
        assert words in str(refused.value), wrong
    key.chmod(0o644)
    with pytest.raises(Misconfigured, match="chmod 600"):
        tls_context(authority.file, certificate, str(key))
