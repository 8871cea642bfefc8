"""A commissioning report on disk: written and signed by `v2v charger commission`, believed by the daemon before the first sale.

Rules
* The meter's key signs it: that key vouches for what this installation measures, and the agent holds it, so a report from another
  installation (or an edited one) is not believed. Signatures are deterministic, so the agent checks by signing again; everybody
  else has the public key in the file.
* It is about one device at one place: map and its edition, wire, device id, failsafe time, meter, serial number and firmware. A
  change of any of them wants another commissioning.

May not know: what the checks do (firmware_bridge/commissioning.py), settings, the chain.
"""

from __future__ import annotations

import hmac
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from agent.errors import Misconfigured, Transient

FORMAT: Final = "v2v-commissioning/1"
WHO: Final = ("serial", "firmware")  # of the identity, what makes it this very device
FILE_BYTES_MAX: Final = 65_536  # a report is a page; a log given by mistake must not be read to its end


class MeterSigner(Protocol):
    """The meter key, as keys.py hands it out."""

    def sign_sha256(self, payload: bytes) -> bytes:
        """DER signature over SHA-256 of the payload; the same every time."""

    @property
    def public_key_spki(self) -> bytes:
        """Its public key as DER SubjectPublicKeyInfo."""


def payload(report: Mapping[str, Any]) -> bytes:
    """The bytes that are signed: everything but the signature, keys sorted, no blanks. They begin unlike any meter record."""
    told = {key: value for key, value in report.items() if key != "signature"}
    text = json.dumps(told, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return f"{FORMAT}\n{text}".encode("ascii")


def signed(report: Mapping[str, Any], signer: MeterSigner) -> dict[str, Any]:
    """The report with format, public key and signature (hex)."""
    whole = {**report, "format": FORMAT, "public_key": signer.public_key_spki.hex()}
    return {**whole, "signature": signer.sign_sha256(payload(whole)).hex()}


def require_commissioned(
    path: Path | None,
    port: str,
    *,
    installed: Mapping[str, Any],
    editions: Mapping[str, str],
    identity: Mapping[str, str],
    signer: MeterSigner,
) -> None:
    """Returns when the report at `path` proves this port. Raises Misconfigured naming what is missing or differs, and Transient
    for a device that has told who it is and now does not.
    """
    remedy = f"commission it, with a car plugged in: v2v charger commission --config FILE --port {port}"
    if path is None:
        raise Misconfigured(
            f"port {port}: the map {installed['map']} is not confirmed well enough to sell from at once, and no "
            "commissioning report is named",
            remedy=f"{remedy}; then name the report: commissioning = ...",
        )
    try:
        why = _objection(_read(path), installed, editions, identity, signer)
    except ValueError as error:
        why = f"it is no report ({error})"
    if why:
        raise Misconfigured(f"port {port}: the commissioning report {path} does not do: {why}", remedy=remedy)


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            content = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(error.strerror) from error
    if len(content) > FILE_BYTES_MAX:
        raise ValueError(f"longer than {FILE_BYTES_MAX} bytes")
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")  # noqa: TRY004 # a file's fault, not a caller's
    return found


def _objection(
    report: Mapping[str, Any],
    installed: Mapping[str, Any],
    editions: Mapping[str, str],
    identity: Mapping[str, str],
    signer: MeterSigner,
) -> str:
    """What speaks against it, in a sentence; "" for nothing."""
    if report.get("format") != FORMAT:
        return f"its format is not {FORMAT}"
    wanted = signer.sign_sha256(payload(report)).hex()
    if report.get("public_key") != signer.public_key_spki.hex():
        return "it was signed with another key than this agent's meter key"
    if not hmac.compare_digest(str(report.get("signature")).encode(), wanted.encode()):
        return "its signature does not fit; it was changed after it was written"
    if report.get("passed") is not True:
        return "the commissioning did not pass"
    if report.get("editions") != dict(editions):
        return "a device map has changed since"
    was, seen = report.get("installed") or {}, report.get("identity") or {}
    other = [key for key, value in installed.items() if was.get(key) != value]
    if other:
        return "; ".join(f"{key} was {was.get(key)!r} and is {installed[key]!r}" for key in other)
    silent = [key for key in WHO if seen.get(key) and not identity.get(key)]
    if silent:
        raise Transient(
            f"the device did not tell its {' and '.join(silent)} just now", remedy="asking it again"
        )
    other = [key for key in WHO if seen.get(key) != identity.get(key)]
    return "; ".join(
        f"the device's {key} was {seen.get(key)!r} and is {identity.get(key)!r}" for key in other
    )
