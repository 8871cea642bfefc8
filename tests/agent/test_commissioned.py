"""A commissioning report: whoever did not measure this installation, or changed it since, is not believed."""

import hashlib
import json

import coincurve
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent import commissioned
from agent.commissioned import require_commissioned, signed
from agent.errors import Misconfigured, Transient
from agent.keys import ephemeral_meter_signer

SIGNER = ephemeral_meter_signer(b"this installation")
INSTALLED = {"map": "webasto_next", "wire": "tcp://127.0.0.1:502", "device_id": None, "meter": None}
EDITIONS = {"webasto_next": "ab" * 32}
IDENTITY = {"maker": "Webasto", "serial": "42", "firmware": "1.2"}
REPORT = {
    "port": "left",
    "installed": INSTALLED,
    "editions": EDITIONS,
    "identity": IDENTITY,
    "passed": True,
    "checks": [],
}


def asked(path, **changes):
    """What the daemon asks of a report."""
    question = {"installed": INSTALLED, "editions": EDITIONS, "identity": IDENTITY, "signer": SIGNER}
    require_commissioned(path, "left", **(question | changes))


def written(folder, report):
    """A report as a file."""
    path = folder / "left.json"
    path.write_text(json.dumps(report))
    return path


def test_a_report_of_this_installation_is_believed_and_anybody_can_check_it(tmp_path):
    """Would catch a report that nobody accepts, or whose signature only its writer can judge."""
    report = signed(REPORT, SIGNER)
    asked(written(tmp_path, report))
    key = coincurve.PublicKey(bytes.fromhex(report["public_key"])[-65:])
    digest = hashlib.sha256(commissioned.payload(report)).digest()
    assert key.verify(bytes.fromhex(report["signature"]), digest, hasher=None)


REFUSED = {
    "edited": (lambda report: {**report, "identity": {**IDENTITY, "serial": "43"}}, "changed after"),
    "not passed": (lambda _: signed({**REPORT, "passed": False}, SIGNER), "did not pass"),
    "passed, nearly": (lambda _: signed({**REPORT, "passed": 1}, SIGNER), "did not pass"),
    "another installation's": (lambda _: signed(REPORT, ephemeral_meter_signer(b"b")), "another key"),
    "no signature": (lambda _: {**REPORT, "format": commissioned.FORMAT}, "another key"),
    "another format": (lambda report: {**report, "format": "x"}, "format"),
    "no report": (lambda _: [], "no report"),
    "endless": (lambda _: "x" * 100_000, "longer than"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_proof_is_named(tmp_path, name):
    """Would catch a sale from a charger whose failsafe or counter nobody has tried."""
    change, words = REFUSED[name]
    with pytest.raises(Misconfigured, match=words) as refused:
        asked(written(tmp_path, change(signed(REPORT, SIGNER))))
    assert "v2v charger commission" in refused.value.remedy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"installed": INSTALLED | {"wire": "tcp://127.0.0.2:502"}}, "wire was"),
        ({"installed": INSTALLED | {"device_id": 3}}, "device_id was None and is 3"),
        ({"editions": {"webasto_next": "cd" * 32}}, "map has changed"),
        ({"identity": IDENTITY | {"serial": "43"}}, "serial was '42' and is '43'"),
        ({"identity": IDENTITY | {"firmware": "1.3"}}, "firmware was"),
    ],
)
def test_a_change_since_wants_another_commissioning(tmp_path, changes, words):
    """Would catch a firmware that counts in other units since its update (KEBA did), or another device under the old report."""
    with pytest.raises(Misconfigured, match=words):
        asked(written(tmp_path, signed(REPORT, SIGNER)), **changes)


def test_a_device_that_is_silent_just_now_is_asked_again(tmp_path):
    """Would catch a glitch on the wire that leaves the unit failed until a human looks (exit 78)."""
    with pytest.raises(Transient, match="did not tell its serial"):
        asked(written(tmp_path, signed(REPORT, SIGNER)), identity=IDENTITY | {"serial": ""})


def test_no_report_is_a_named_refusal_with_its_remedy(tmp_path):
    """Would catch an installer who is not told what to type."""
    with pytest.raises(Misconfigured, match="no commissioning report is named") as refused:
        asked(None)
    assert "--port left" in refused.value.remedy
    with pytest.raises(Misconfigured, match="No such file"):
        asked(tmp_path / "gone.json")


@given(st.binary(max_size=300))
def test_any_file_at_all_is_answered_and_not_believed(tmp_path_factory, content):
    """Would catch a traceback at start because of a torn file."""
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    with pytest.raises(Misconfigured):
        asked(path)
