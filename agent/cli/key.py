"""`v2v key new|import|address`: make a key file, take one over, see whose it is.

A private key is typed nowhere: not as an argument (`ps` and the shell's history show it), not in the environment. `import`
reads it from a file or a hidden prompt. Nothing here prints one.

May not know: how keys are read and written (agent/keys.py), the chain, settings.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from agent import keys
from agent.cli.output import echo, json_option
from agent.core.token import checksummed
from agent.errors import Misconfigured

UNENCRYPTED = click.option(
    "--unencrypted", is_flag=True,
    help="64 hex digits, guarded by file mode 0600 alone: for `systemd-creds encrypt`, or the meter of a sealed box.",
)  # fmt: skip
PASSWORD_FILE = click.option(
    "--password-file", type=click.Path(path_type=Path), metavar="FILE",
    help="One line with the keystore's password, mode 0600. Without it the password is asked for.",
)  # fmt: skip
KEY_FILE = click.argument("file", type=click.Path(dir_okay=False, path_type=Path))


@click.group()
def key() -> None:
    """Key files: the owner's, the operator's and the meter's are three different keys."""
    keys.shut_process()  # before anybody types one


@key.command()
@KEY_FILE
@PASSWORD_FILE
@UNENCRYPTED
@json_option
def new(file: Path, password_file: Path | None, *, unencrypted: bool, as_json: bool) -> None:
    """Make a key and write FILE, never over another one."""
    made = keys.new_key(file.absolute(), password=_password(password_file, twice=True, none=unencrypted))
    _show(file, made, as_json=as_json)


@key.command("import")
@KEY_FILE
@click.option(
    "--from", "source", type=click.Path(exists=True, dir_okay=False, path_type=Path), metavar="FILE",
    help="A keystore, or 64 hex digits, mode 0600. Without it the digits are asked for, and not shown.",
)  # fmt: skip
@click.option(
    "--from-password-file", type=click.Path(path_type=Path), metavar="FILE", help="The password of --from's keystore."
)  # fmt: skip
@PASSWORD_FILE
@UNENCRYPTED
@json_option
def take_over(
    file: Path,
    source: Path | None,
    from_password_file: Path | None,
    password_file: Path | None,
    *,
    unencrypted: bool,
    as_json: bool,
) -> None:
    """Write FILE with a key that exists already."""
    if source is None:
        if not sys.stdin.isatty():
            raise click.UsageError("without --from the key is asked for, and there is nobody to ask")
        taken = keys.typed_key(click.prompt("Private key (64 hex digits; not shown)", hide_input=True))
    else:
        taken = keys.load_signer(
            _source(source), None if from_password_file is None else _source(from_password_file)
        )
    signer = keys.write_key(
        taken, file.absolute(), password=_password(password_file, twice=True, none=unencrypted)
    )
    _show(file, signer, as_json=as_json)


@key.command()
@KEY_FILE
@PASSWORD_FILE
@json_option
def address(file: Path, password_file: Path | None, *, as_json: bool) -> None:
    """Open FILE and show whose it is: the address for the market, the public key for a meter's readers."""
    try:
        signer = keys.load_signer(_source(file), None if password_file is None else _source(password_file))
    except Misconfigured:
        if password_file is not None or not keys.is_keystore(file) or not sys.stdin.isatty():
            raise
        signer = keys.unlocked(_source(file), str(_password(None, twice=False, none=False)))
    _show(file, signer, as_json=as_json)


def _source(path: Path) -> str:
    """A path as agent.keys wants it: with a slash, or it would name a credential."""
    return str(path.absolute())


def _password(file: Path | None, *, twice: bool, none: bool) -> str | None:
    if none:
        if file is not None:
            raise click.UsageError("--unencrypted and --password-file exclude each other")
        return None
    if file is not None:
        return keys.load_password(_source(file), environ=os.environ)
    if not sys.stdin.isatty():
        raise click.UsageError(
            "there is nobody to ask for a password: --password-file FILE, or --unencrypted"
        )
    return str(click.prompt("Password for the key file", hide_input=True, confirmation_prompt=twice))


def _show(file: Path, signer: keys.Signer, *, as_json: bool) -> None:
    value: dict[str, Any] = {
        "file": str(file),
        "address": checksummed(signer.address),
        "public_key": "0x" + signer.public_key.hex(),
        "meter_public_key": keys.spki(signer.public_key).hex(),
    }
    text = (
        f"{file}\naddress           {value['address']}\nas a meter's key  {value['meter_public_key']}\n"
        "Keep a copy elsewhere: without this file the coins and the sales it signs for are lost."
    )
    echo(value, text, as_json=as_json)
