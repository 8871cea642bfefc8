"""`v2v verify`: what a person, and a script, learn about a session's file."""

import json

import pytest
from proof import OPERATOR, SPKI, session_id_of, settled
from story import DOMAIN, PROVIDER, STRANGER
from town import v2v

from agent.core.units import hex0x
from agent.evidence import canonical, evidence


@pytest.fixture
def file(tmp_path):
    """An honest session's file."""
    events = settled()
    path = tmp_path / "session.json"
    path.write_bytes(canonical(evidence(DOMAIN, PROVIDER.address, session_id_of(events), events)))
    return path


def test_an_honest_file_is_proven_check_by_check(file):
    """Would catch a verdict without reasons."""
    said = v2v("verify", str(file), "--operator", hex0x(OPERATOR.address), "--meter-key", SPKI.hex())
    assert said.exit_code == 0
    assert said.out.startswith("session.json: proven\n")
    assert said.out.count(" ok ") == 10


def test_a_changed_file_names_what_is_wrong_and_ends_with_3(file):
    """Would catch a forged bill that a script takes for a good one."""
    file.write_text(file.read_text().replace('"sref": "phone"', '"sref": "phonf"', 1))
    said = v2v("verify", str(file), "--json")
    assert said.exit_code == 3
    (told,) = json.loads(said.out)["files"]
    assert told["ok"] is False
    failed = {check["name"] for check in told["checks"] if not check["ok"]}
    assert "digest" in failed
    assert "NOT PROVEN: " in v2v("verify", str(file)).out


def test_whoever_knows_the_operator_or_the_meter_says_so(file):
    """Would catch options that are taken and not looked at."""
    assert v2v("verify", str(file), "--operator", hex0x(STRANGER.address)).exit_code == 3
    assert v2v("verify", str(file), "--meter-key", (SPKI[:23] + STRANGER.public_key).hex()).exit_code == 3
    assert v2v("verify", str(file), "--meter-key", "no key").exit_code == 2


def test_no_file_and_no_session_file_are_told_apart(tmp_path):
    """Would catch a traceback for a photo."""
    assert v2v("verify", str(tmp_path / "none.json")).exit_code == 2
    photo = tmp_path / "photo.json"
    photo.write_bytes(b"GIF89a" * 9)
    said = v2v("verify", str(photo))
    assert said.exit_code == 3
    assert "form" in said.out
