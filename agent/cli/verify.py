"""`v2v verify FILE...`: is this session's file what happened? Every check by name; exit 0 when all hold, 3 when one does not.

Needs no network, no journal, no configuration and no key: whoever is shown a file can judge it.

May not know: what a check does (agent/verify.py).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from agent.cli.output import ADDRESS, echo, json_option, table
from agent.core.units import Address
from agent.errors import EXIT_REFUSED
from agent.verify import FILE_BYTES_MAX, Check, parsed_meter_key
from agent.verify import verify as judged


class _MeterKeyType(click.ParamType[bytes]):
    """DER in hex or base64 -> bytes."""

    name = "key"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        try:
            return parsed_meter_key(str(value))
        except ValueError:
            self.fail("a meter's public key is DER in hex or base64", param, ctx)


@click.command()
@click.argument(
    "files", type=click.Path(exists=True, dir_okay=False, path_type=Path), nargs=-1, required=True
)
@click.option(
    "--operator", type=ADDRESS, help="Who must have signed the settlement; the chain's operatorOf knows."
)
@click.option(
    "--meter-key", type=_MeterKeyType(), help="The meter's public key, from its owner: DER in hex or base64."
)
@json_option
def verify(
    files: tuple[Path, ...], operator: Address | None, meter_key: bytes | None, *, as_json: bool
) -> None:
    """Check exported sessions without a network.

    FILES are what `v2v provider export` wrote.
    """
    told = []
    for file in files:
        with file.open("rb") as opened:
            data = opened.read(FILE_BYTES_MAX + 1)
        told.append((file, judged(data, signer=operator, meter_key=meter_key)))
    value = {
        "files": [
            {
                "file": str(file),
                "ok": all(check.ok for check in checks),
                "checks": [{"name": c.name, "ok": c.ok, "detail": c.detail} for c in checks],
            }
            for file, checks in told
        ]
    }
    echo(value, "\n\n".join(_text(file, checks) for file, checks in told), as_json=as_json)
    if not all(check.ok for _, checks in told for check in checks):
        sys.exit(EXIT_REFUSED)


def _text(file: Path, checks: list[Check]) -> str:
    failed = [check.name for check in checks if not check.ok]
    verdict = f"NOT PROVEN: {', '.join(failed)}" if failed else "proven"
    rows = [(check.name, "ok" if check.ok else "FAILED", check.detail) for check in checks]
    return f"{file.name}: {verdict}\n{table(('check', '', 'found'), rows)}"
