"""How every command line shows and reads things: tables, JSON, addresses, money.

Rules
* A read command has `@json_option`; with it, standard output holds one JSON object on one line and nothing else.
* In JSON, wei are decimal strings (a phone's JSON reader rounds above 2^53), bytes are 0x-hex, times unix seconds.
* Money is exact: integers inside, `0.05 ETH` outside, every digit kept. An amount typed with more digits than the coin
  has is refused, never rounded.
* Standard library and click only: a table must not cost the start-up time of a library.

May not know: the chain, sessions, what any of it means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeVar

import click

from agent.core.token import checksummed
from agent.core.units import UINT256_MAX, Address, hex0x

WEI_PER_ETHER: Final = 10**18
UNITS_WEI: Final = {"wei": 1, "gwei": 10**9, "eth": WEI_PER_ETHER, "ether": WEI_PER_ETHER}
AMOUNT_LENGTH_MAX: Final = 100  # 2^256 - 1 has 78 digits; a pasted file must not be counted with

_AMOUNT: Final = re.compile(r"\s*(\d+)(?:\.(\d+))?\s*([A-Za-z]*)\s*")

Command = TypeVar("Command", bound=Callable[..., Any])


def json_option(command: Command) -> Command:
    """Add `--json`: the command gets `as_json: bool`."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of text.")(
        command
    )


# ---- showing


def ether(amount_wei: int) -> str:
    """Exactly this much: 50_000_000_000_000_000 -> "0.05 ETH", 1 -> "0.000000000000000001 ETH", 0 -> "0 ETH"."""
    whole, rest = divmod(abs(amount_wei), WEI_PER_ETHER)
    digits = f"{whole}.{rest:018d}".rstrip("0").rstrip(".")
    return f"{'-' if amount_wei < 0 else ''}{digits} ETH"


def at(at_s: int) -> str:
    """A unix time as people read it: "2026-03-01 17:05:09 UTC"."""
    return datetime.fromtimestamp(at_s, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def duration(seconds: int) -> str:
    """The two largest parts: "0 s", "59 s", "1 min", "12 h 30 min", "3 d"."""
    parts, rest = [], max(0, seconds)
    for name, size in (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)):
        count, rest = divmod(rest, size)
        if count:
            parts.append(f"{count} {name}")
    return " ".join(parts[:2]) or "0 s"


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Lines of equal columns, numbers to the right; None is shown as "-". No row: the header alone."""
    cells = [[_cell(value) for value in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(headers, *cells, strict=True)]
    to_the_right = [_is_number_column(column) for column in zip(*cells, strict=True)] or [False] * len(
        headers
    )
    lines = [
        "  ".join(
            text.rjust(width) if right else text.ljust(width)
            for text, width, right in zip(row, widths, to_the_right, strict=True)
        ).rstrip()
        for row in [list(headers), *cells]
    ]
    return "\n".join(lines)


def facts(pairs: Iterable[tuple[str, object]]) -> str:
    """One fact a line, the values below each other. None is left out."""
    known = [(name, _cell(value)) for name, value in pairs if value is not None]
    width = max((len(name) for name, _ in known), default=0)
    return "\n".join(f"{name.ljust(width)}  {value}".rstrip() for name, value in known)


def as_json_line(value: Mapping[str, Any]) -> str:
    """One object on one line; bytes become 0x-hex."""
    return json.dumps(value, default=_json_value, ensure_ascii=False)


def echo(value: Mapping[str, Any], text: str, *, as_json: bool) -> None:
    """Print one of the two: `value` for a program, `text` for a person."""
    click.echo(as_json_line(value) if as_json else text)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return hex0x(value) if isinstance(value, bytes) else str(value)


def _is_number_column(column: Iterable[str]) -> bool:
    return all(re.fullmatch(r"-|-?\d+(\.\d+)?( ETH)?", text) for text in column)


def _json_value(value: object) -> str:
    if isinstance(value, bytes):
        return hex0x(value)
    raise TypeError(f"{type(value).__name__} is no JSON")


# ---- reading


class _AddressType(click.ParamType[Address]):
    """0x and 40 hex digits -> 20 bytes."""

    name = "address"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Address:
        if isinstance(value, bytes):
            return Address(value)
        if re.fullmatch(r"(0x)?[0-9a-fA-F]{64}", str(value)):
            # Not repeated: 32 bytes where an account belongs are often its private key.
            self.fail("32 bytes were given (not shown here); an address is 0x and 40 hex digits", param, ctx)
        if not re.fullmatch(r"0x[0-9a-fA-F]{40}", str(value)):
            self.fail(f"{value!r} is no address: 0x and 40 hex digits", param, ctx)
        address = Address(bytes.fromhex(value[2:]))
        if value[2:] not in (value[2:].lower(), value[2:].upper()) and value != checksummed(address):
            self.fail(f"{value!r} is mistyped: its letter case does not fit (EIP-55)", param, ctx)
        return address


class _Bytes32Type(click.ParamType[bytes]):
    """0x and 64 hex digits -> 32 bytes."""

    name = "bytes32"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> bytes:
        if isinstance(value, bytes):
            return value
        if not re.fullmatch(r"(0x)?[0-9a-fA-F]{64}", str(value)):
            self.fail("32 bytes are needed: 0x and 64 hex digits", param, ctx)
        return bytes.fromhex(str(value).removeprefix("0x"))


class _WeiType(click.ParamType[int]):
    """An amount of money -> wei: a whole number of wei, or with its unit: "0.05 ETH", "3gwei"."""

    name = "amount"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        try:
            return parsed_wei(str(value))
        except ValueError as problem:
            self.fail(str(problem), param, ctx)


def parsed_wei(text: str) -> int:
    """An amount as people type it, exactly: 1500 or "1500 wei" -> 1500, "0.05 ETH" -> 5 * 10^16.

    Raises ValueError saying what to type.
    """
    parts = _AMOUNT.fullmatch(text) if len(text) <= AMOUNT_LENGTH_MAX else None
    unit_wei = UNITS_WEI.get((parts[3] or "wei").lower()) if parts else None
    if parts is None or unit_wei is None:
        raise ValueError(f'{text[:40]!r} is no amount: write 1500 (wei), "3 gwei" or "0.05 ETH"')
    fraction = parts[2] or ""
    amount_wei, rest = divmod(int(parts[1] + fraction) * unit_wei, 10 ** len(fraction))
    if rest:
        raise ValueError(f"{text.strip()!r} is not a whole number of wei")
    if amount_wei > UINT256_MAX:
        raise ValueError(f"{text.strip()!r} is more than there can be")
    return int(amount_wei)


ADDRESS: Final = _AddressType()
BYTES32: Final = _Bytes32Type()
WEI: Final = _WeiType()
