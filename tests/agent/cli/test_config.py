"""`v2v config`: right files say what will be used, wrong ones say everything that is wrong, once."""

import json
from pathlib import Path

import pytest
from town import v2v

ROOT = Path(__file__).parents[3]

AGENT = """
[chain]
urls = ["wss://user.example/secret-api-key", "http://127.0.0.1:8545"]
chain_id = 1337
contract = "0x00000000000000000000000000000000000000c0"
provider = "0x00000000000000000000000000000000000000a1"
[keys]
operator = "operator_key"
meter = "./meter.key"
[[ports]]
name = "left"
map = "simulated"
wire = "tcp://127.0.0.1:1502"
current_ma_max = 32_000
phase_count = 3
[journal]
path = "./journal.sqlite"
"""


@pytest.fixture
def written(tmp_path):
    """Writes agent.toml with some text replaced; its path."""

    def write(*changes):
        text = AGENT
        for old, new in changes:
            assert old in text
            text = text.replace(old, new)
        path = tmp_path / "agent.toml"
        path.write_text(text)
        return str(path)

    return write


@pytest.mark.parametrize("typed", [("config/agent.toml",), ("config/consumer.toml", "--consumer")])
def test_the_shipped_examples_are_right(typed):
    """Would catch an example that its own checker refuses."""
    said = v2v("config", "check", str(ROOT / typed[0]), *typed[1:])
    assert said.exit_code == 0, said.err
    assert ": OK\n" in said.out


def test_a_right_file_says_what_will_be_used(written):
    """Would catch a check that prints OK and leaves the reader to guess, and one that shows an API key."""
    said = v2v("config", "check", written())
    assert said.exit_code == 0
    assert "operator_key (systemd credential)" in said.out
    assert "simulated on tcp://127.0.0.1:1502, 3 phases, at most 32000 mA" in said.out
    assert "secret-api-key" not in said.out


def test_what_is_missing_beside_the_file_is_named(written, tmp_path):
    """Would catch an OK after which the daemon finds no meter key."""
    found = v2v("config", "check", written(), "--json").json
    assert found["missing"] == [f"[keys] meter: there is no file {tmp_path}/meter.key yet"]
    (tmp_path / "meter.key").write_text("x")
    assert v2v("config", "check", written(), "--json").json["missing"] == []


def test_every_mistake_of_a_file_is_told_at_once(written):
    """Would catch a checker that an installer must run once for each mistake."""
    file = written(("chain_id = 1337", "chain_id = 0"), ("phase_count = 3", "phase_count = 2\nspeed = 9"))
    said = v2v("config", "check", file)
    assert said.exit_code == 78
    assert "3 problems" in said.err
    for part in ("agent.toml:4", "chain_id", "phase_count", "speed"):
        assert part in said.err


def test_a_device_map_that_nobody_has_is_found_before_the_start(written):
    """Would catch a misspelt map that only the daemon finds, at the plug; and a meter's map in the charger's place."""
    said = v2v("config", "check", written(('map = "simulated"', 'map = "simulatd"')))
    assert said.exit_code == 78
    assert "did you mean 'simulated'" in said.err
    meter = '[ports.meter]\nmap = "simulated"\nwire = "tcp://127.0.0.1:1503"\n[journal]'
    said = v2v("config", "check", written(("[journal]", meter)))
    assert said.exit_code == 78
    assert "a meter belongs here" in said.err


def test_an_openevse_needs_no_map_and_its_meter_a_wire(written):
    """Would catch a right OpenEVSE that is said to have no device map, and a meter on a wire that carries no Modbus."""
    box = [
        ('map = "simulated"', 'map = "openevse_rapi"'),
        ('"tcp://127.0.0.1:1502"', '"rapi:///dev/ttyUSB0"'),
    ]
    assert v2v("config", "check", written(*box)).exit_code == 0
    meter = '[ports.meter]\nmap = "janitza_b2x"\n{}[journal]'
    right = v2v("config", "check", written(*box, ("[journal]", meter.format('wire = "tcp://10.0.0.7"\n'))))
    assert right.exit_code == 0
    said = v2v("config", "check", written(*box[1:], ("[journal]", meter.format(""))))
    assert said.exit_code == 78
    assert 'write map = "openevse_rapi"' in said.err
    assert "meter.wire: the charger's own wire carries no Modbus" in said.err


def test_a_consumers_file_is_not_an_agents():
    """Would catch --consumer being ignored."""
    assert v2v("config", "check", str(ROOT / "config/consumer.toml")).exit_code == 78
    assert v2v("config", "check", str(ROOT / "config/agent.toml"), "--consumer").exit_code == 78


def test_no_file_is_a_configuration_error(tmp_path):
    """Would catch a traceback for a mistyped path."""
    said = v2v("config", "check", str(tmp_path / "none.toml"))
    assert said.exit_code == 78
    assert "there is no such file" in said.err


def test_the_schema_is_the_committed_one():
    """Would catch a setting that editors do not know."""
    assert json.loads(v2v("config", "schema").out) == json.loads(
        (ROOT / "config/agent.schema.json").read_text()
    )
