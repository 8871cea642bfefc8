"""Private keys: from a keystore, a key file or a systemd credential to something that signs. The bytes never
leave here.

Rules
* A `Signer` shows its address and nothing else: not in repr, pickle, copy, exception or a traceback's locals.
* Before the first private byte this process is shut: no core file, no debugger, no reader of its memory but root.
* Files are refused unless only their owner can read them. The environment and the settings are no place for a
  key: both are seen by every child, in crash reports and in backups.
* Signatures are the contract's canonical form (65 bytes, v 27/28, low s), deterministic (RFC 6979): the same
  message signed again after a crash is the same bytes.
* The meter's key is another key than the account's: an OCMF payload must never be a transaction.

May not know: settings, sessions, the chain. eth_account takes a third of a second to import, so only the
functions that need it do.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import resource
import secrets
import ssl
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import coincurve

from agent.core.token import CURVE_ORDER, address_of
from agent.core.units import Address, hex0x, short
from agent.errors import Misconfigured

MAX_FILE_BYTES = (
    16_384  # a keystore has about 500; a device or a log given by mistake must not be read to its end
)
CREDENTIALS = "CREDENTIALS_DIRECTORY"
CREDENTIAL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,40}")  # a key in hex is longer: it is never shown as a name
PR_SET_DUMPABLE = 4  # linux/prctl.h

# SubjectPublicKeyInfo of an uncompressed secp256k1 key, up to the key (RFC 5480, SEC 2: OID 1.3.132.0.10).
_SPKI_HEAD = bytes.fromhex("3056301006072a8648ce3d020106052b8104000a034200")


class _Hidden:
    """A secret on its way through this file: a traceback that shows locals shows only this class's name."""

    __slots__ = ("_value",)

    def __init__(self, value: bytes) -> None:
        self._value = value

    def __repr__(self) -> str:
        return "<hidden>"

    def reveal(self) -> bytes:
        return self._value


class _KeyHolder:
    """What both kinds of signer share: a private key that cannot be shown, copied or stored."""

    __slots__ = ("_private", "public_key")

    def __init__(self, private: coincurve.PrivateKey) -> None:
        self._private = private
        self.public_key: bytes = private.public_key.format(compressed=False)

    def __reduce__(self) -> NoReturn:
        raise TypeError(f"{type(self).__name__} holds a private key and cannot be copied or stored")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({short(address_of(self.public_key))})"


class Signer(_KeyHolder):
    """An account's key. `address` is 20 bytes, `public_key` 65 bytes (0x04, x, y)."""

    __slots__ = ("address",)

    def __init__(self, private: coincurve.PrivateKey) -> None:
        super().__init__(private)
        self.address: Address = address_of(self.public_key)

    def sign_digest(self, digest32: bytes) -> bytes:
        """65 bytes r, s, v with v 27/28 and low s, as the contract demands. `digest32` is already hashed."""
        assert len(digest32) == 32, "sign what is hashed"
        signature = self._private.sign_recoverable(digest32, hasher=None)
        assert signature[64] in (0, 1), "r above the curve's order: nobody has ever seen one"
        return signature[:64] + bytes([27 + signature[64]])

    def sign_transaction(self, transaction: Mapping[str, Any]) -> bytes:
        """The raw signed transaction, ready to journal and send. `transaction` as eth_account takes it."""
        from eth_account import Account

        try:
            return bytes(Account.sign_transaction(dict(transaction), self._private.secret).raw_transaction)
        except (TypeError, ValueError, KeyError) as error:
            problem = str(error)
        # Our mistake, so it may crash us; but the library's frames hold the key, so they are left behind.
        raise ValueError(f"this transaction cannot be signed: {problem}")


class MeterSigner(_KeyHolder):
    """The meter's key: signs records, never transactions. `public_key` is 65 bytes."""

    __slots__ = ()

    def sign_sha256(self, payload: bytes) -> bytes:
        """DER signature over SHA-256 of `payload` (OCMF 1.4 `SA: ECDSA-secp256k1-SHA256`)."""
        return bytes(self._private.sign(payload))

    @property
    def public_key_spki(self) -> bytes:
        """The public key as DER SubjectPublicKeyInfo, as OCMF's tools read it."""
        return spki(self.public_key)


def spki(public_key: bytes) -> bytes:
    """65 bytes of public key as DER SubjectPublicKeyInfo."""
    return _SPKI_HEAD + public_key


# ------------------------------------------------------------------------------------------------ getting
# keys


def shut_process(*, for_good: bool = False) -> None:
    """Let nobody but root see this process's memory, alive or dead: no core file, no ptrace, no /proc/PID/mem.

    Every function here that reads or makes a private key calls it first; twice does no harm. It does not reach programs
    that we start, but with `for_good` (the daemon's way) none of them can leave a core file either. Raises
    `Misconfigured` where the kernel says no. Linux: prctl(2), setrlimit(2), core(5).
    """
    hard = 0 if for_good else resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise Misconfigured(
            f"the memory of this process cannot be shut ({os.strerror(ctypes.get_errno())}), so no key is read",
            remedy="allow prctl(2) in the sandbox that we run in",
        )


def load_signer(
    source: str, password_source: str | None = None, *, environ: Mapping[str, str] = os.environ
) -> Signer:
    """The account key that `source` names: a credential, or (with a slash) a keystore V3 or hex file of mode
    0600.

    `password_source` names the keystore's password in the same way. Raises `Misconfigured` with the remedy.
    """
    return Signer(_load_private(source, password_source, environ))


def load_meter_signer(
    source: str, password_source: str | None = None, *, environ: Mapping[str, str] = os.environ
) -> MeterSigner:
    """The meter key that `source` names; as `load_signer`."""
    return MeterSigner(_load_private(source, password_source, environ))


def load_password(source: str, *, environ: Mapping[str, str] = os.environ) -> str:
    """The one line in the credential or 0600 file that `source` names (a broker's password)."""
    return _load_password(source, environ).reveal().decode()


def tls_context(
    authority: Path | None,
    certificate: Path | None = None,
    key_source: str | None = None,
    *,
    environ: Mapping[str, str] = os.environ,
) -> ssl.SSLContext:
    """TLS towards a broker: whom we believe (`authority`, PEM; None: this computer's list), and who we are.

    `key_source` names the private key of `certificate` (PEM, unencrypted) as a key of ours is named. Raises
    `Misconfigured` for files that are missing, open to others, no PEM, or not a pair.
    """
    try:
        context = ssl.create_default_context(cafile=authority)
    except OSError as error:  # SSLError is one
        raise Misconfigured(
            f"{authority}: no certificate of an authority can be read ({error.strerror or error})",
            remedy="correct [mqtt] authority",
        ) from error
    if certificate is not None:
        assert key_source is not None, "config.py demands both"
        _read_secret(key_source, environ)  # for what it refuses: another owner's eyes, a device, a log
        try:
            context.load_cert_chain(certificate, _secret_path(key_source, environ), password=_no_password)
        except OSError as error:
            raise Misconfigured(
                f"{certificate} and {key_source} are no certificate with its key ({error.strerror or error})",
                remedy="correct [mqtt] certificate and certificate_key: both PEM, the key without a password",
            ) from error
    return context


def _no_password() -> str:
    """An encrypted key fails, instead of asking a terminal that a service does not have."""
    return ""


def require_different_keys(operator: Signer, meter: MeterSigner) -> None:
    """Raises `Misconfigured` when one key plays both parts: a record could then be a transaction."""
    if operator.public_key == meter.public_key:
        raise Misconfigured(
            f"the operator key and the meter key are the same ({short(operator.address)})",
            remedy="make another one for the meter, and name it in [keys] meter",
        )


def ephemeral_signer(seed: bytes) -> Signer:
    """A throw-away key: the same for the same `seed`. For session keys (32 random bytes), demo, tests."""
    return Signer(_from_seed(b"account", seed))


def ephemeral_meter_signer(seed: bytes) -> MeterSigner:
    """A throw-away meter key: the same for the same `seed`, and another than the account's."""
    return MeterSigner(_from_seed(b"meter", seed))


def new_key(path: Path, *, password: str | None = None) -> Signer:
    """Make a key and write it to `path`, mode 0600: a keystore V3 with a `password`, else 0x and 64 hex
    digits.

    Written whole or not at all, and never over an existing file: that key may hold money. Raises
    `Misconfigured`.
    """
    shut_process()
    return _written(coincurve.PrivateKey(_random_scalar()), path, password)


def typed_key(digits: str) -> Signer:
    """A key as somebody typed it, 64 hex digits. Raises `Misconfigured`, without them."""
    shut_process()
    hidden = _Hidden(digits.encode())
    del digits
    return Signer(_private("what was typed", _from_hex("what was typed", hidden)))


def write_key(signer: Signer, path: Path, *, password: str | None = None) -> Signer:
    """Write a key to another file, as `new_key` does."""
    return _written(signer._private, path, password)  # noqa: SLF001 - this file is the only one that may


def is_keystore(path: Path) -> bool:
    """Whether this file is a keystore, which has a password. Raises `Misconfigured` when it cannot be read."""
    return _is_keystore(_read_secret(str(path.absolute()), {}))


def unlocked(source: str, password: str) -> Signer:
    """The key in the keystore that `source` names, by a password somebody typed. Raises `Misconfigured`."""
    hidden = _Hidden(password.encode())
    del password
    return Signer(_private(source, _decrypted(source, _read_secret(source, {}), hidden)))


# ------------------------------------------------------------------------------------------------ reading
# files


def _load_private(
    source: str, password_source: str | None, environ: Mapping[str, str]
) -> coincurve.PrivateKey:
    if re.fullmatch(r"(0x)?[0-9a-fA-F]{64}", source.strip()):
        raise Misconfigured(
            "a private key was given where the name of one belongs (it is not shown here)",
            remedy="put it into a file of mode 0600 or a credential, name that, and consider the key leaked",
        )
    content = _read_secret(source, environ)
    if not _is_keystore(content):
        return _private(source, _from_hex(source, content))
    if password_source is None:
        raise Misconfigured(
            f"{source} is a keystore, and nothing says where its password is",
            remedy="name it in [keys]: operator_password, meter_password or account_password",
        )
    return _private(source, _decrypted(source, content, _load_password(password_source, environ)))


def _is_keystore(content: _Hidden) -> bool:
    return content.reveal().lstrip().startswith(b"{")


def _private(source: str, secret: _Hidden) -> coincurve.PrivateKey:
    if not _is_scalar(secret.reveal()):
        raise Misconfigured(
            f"{source} holds no secp256k1 private key",
            remedy="make one with `v2v key new`, or restore a backup",
        )
    return coincurve.PrivateKey(secret.reveal())


def _from_hex(source: str, content: _Hidden) -> _Hidden:
    digits = _Hidden(content.reveal().strip().removeprefix(b"0x"))
    if not re.fullmatch(rb"[0-9a-fA-F]{64}", digits.reveal()):
        raise Misconfigured(
            f"{source} is neither a keystore (JSON) nor a key of 64 hex digits",
            remedy="check that it is the right file",
        )
    return _Hidden(bytes.fromhex(digits.reveal().decode()))


def _decrypted(source: str, keystore: _Hidden, password: _Hidden) -> _Hidden:
    from eth_account import Account

    try:
        return _Hidden(bytes(Account.decrypt(keystore.reveal().decode(), password.reveal().decode())))
    except (ValueError, TypeError, KeyError, NotImplementedError) as error:
        # `from None`: the libraries' frames hold the password. A wrong password is a MAC that does not fit;
        # NotImplementedError is how eth_keyfile calls a version, cipher or derivation that it does not know.
        fits = "MAC" not in str(error)
    what = "is no keystore of version 3" if fits else "does not open with this password"
    raise Misconfigured(
        f"{source} {what}", remedy="check the keystore and the password that [keys] names"
    ) from None


def _load_password(source: str, environ: Mapping[str, str]) -> _Hidden:
    # Who writes the password itself where its name belongs must not find it in a log.
    called = source if "/" in source else "the credential with the password"
    line = _Hidden(_read_secret(source, environ, called).reveal().rstrip(b"\r\n"))
    try:
        fits = line.reveal().decode().isprintable() and bool(line.reveal())
    except UnicodeDecodeError:
        fits = False
    if not fits:
        raise Misconfigured(
            f"{called} does not hold one line with a password", remedy="write the password alone into it"
        )
    return line


def _read_secret(source: str, environ: Mapping[str, str], called: str = "") -> _Hidden:
    """What the credential or the file holds. A file must be its owner's alone; systemd guards its own.

    `called`: how a refusal names it; as the settings do unless given.
    """
    shut_process()
    path, called = _secret_path(source, environ, called or source), called or source
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise Misconfigured(
                    f"{called} is not a file", remedy="name the file that holds the key or password"
                )
            if "/" in source and status.st_mode & 0o077:
                raise Misconfigured(
                    f"{called} can be read by others (mode {stat.S_IMODE(status.st_mode):04o})",
                    remedy=f"chmod 600 {source}",
                )
            content = _Hidden(file.read(MAX_FILE_BYTES + 1))
    except FileNotFoundError:
        kind = "file" if "/" in source else "credential"
        raise Misconfigured(f"{called}: there is no such {kind}", remedy=_origin(source, called)) from None
    except OSError as error:
        raise Misconfigured(
            f"{called}: cannot be read ({error.strerror})", remedy=f"ls -l {path.parent}"
        ) from None
    if len(content.reveal()) > MAX_FILE_BYTES:
        raise Misconfigured(
            f"{called} is larger than {MAX_FILE_BYTES} bytes", remedy="check that it is the right file"
        )
    return content


def _secret_path(source: str, environ: Mapping[str, str], called: str = "") -> Path:
    if "/" in source:
        return Path(source)
    if not CREDENTIAL_NAME.fullmatch(source):
        raise Misconfigured(
            "what should name a key or password is neither a path nor a credential's name (it is not shown here)",
            remedy="name a file by a path with a slash, or a credential: at most 40 of A-Z a-z 0-9 _ . -",
        )
    folder = environ.get(CREDENTIALS)
    if not folder:
        raise Misconfigured(
            f"{called or source} names a systemd credential, but systemd gave us none (${CREDENTIALS} is not set)",
            remedy=f"start the unit instead, or name a file by a path with a slash (./{_name_or_dots(source, called)})",
        )
    return Path(folder) / source


def _origin(source: str, called: str) -> str:
    if "/" in source:
        return "check the path in [keys]; relative paths start at the settings file"
    name = _name_or_dots(source, called)
    return f"add LoadCredential={name}:/etc/v2v-agent/{name} to the unit, and put the file there (mode 0600)"


def _name_or_dots(source: str, called: str) -> str:
    return source if called in ("", source) else "..."


# ------------------------------------------------------------------------------------------------ making keys


def _from_seed(part: bytes, seed: bytes) -> coincurve.PrivateKey:
    scalar = hashlib.sha256(b"v2v ephemeral key\0" + part + b"\0" + seed).digest()
    # 1 of 2^128 digests is no key; hashing again keeps the function total.
    return coincurve.PrivateKey(scalar) if _is_scalar(scalar) else _from_seed(part, scalar)


def _is_scalar(scalar: bytes) -> bool:
    return 0 < int.from_bytes(scalar, "big") < CURVE_ORDER


def _random_scalar() -> bytes:
    while not _is_scalar(scalar := secrets.token_bytes(32)):
        pass
    return scalar


def _written(private: coincurve.PrivateKey, path: Path, password: str | None) -> Signer:
    if password is None:
        content = hex0x(private.secret).encode() + b"\n"
    else:
        from eth_account import Account

        content = json.dumps(Account.encrypt(private.secret, password)).encode() + b"\n"
    _write_new(path, _Hidden(content))
    return Signer(private)


def _write_new(path: Path, content: _Hidden) -> None:
    """Write beside, sync, then link: `path` appears whole, or not, and replaces nothing."""
    draft = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with os.fdopen(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content.reveal())
            file.flush()
            os.fsync(file.fileno())
        os.link(draft, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except FileExistsError:
        raise Misconfigured(
            f"{path} exists already", remedy="choose another name; that key may hold money"
        ) from None
    except OSError as error:
        raise Misconfigured(
            f"{path}: cannot be written ({error.strerror})", remedy=f"ls -ld {path.parent}"
        ) from None
    finally:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
