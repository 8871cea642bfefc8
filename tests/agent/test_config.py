"""The settings themselves: examples, defaults, units, the environment, and the schema that editors use."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from agent.config import (
    AgentConfig,
    HttpConfig,
    MqttConfig,
    ProviderPolicyConfig,
    agent_schema,
    load_agent,
    load_consumer,
    socket_found,
    socket_path,
)

CONFIG = Path(__file__).parents[2] / "config"


def uncommented(path, folder):
    """The example with every `# setting = value` switched on, as a file in `folder`."""
    text = re.sub(r"^# ?(\[|[a-z_]+ = )", r"\1", path.read_text(), flags=re.MULTILINE)
    copy = folder / path.name
    copy.write_text(text.replace('"mqtt://', '"mqtts://'))  # certificates are for TLS
    return copy


def test_the_examples_load(tmp_path):
    """Would catch an example that its own loader refuses."""
    agent = load_agent(CONFIG / "agent.toml", {})
    consumer = load_consumer(CONFIG / "consumer.toml", {})
    assert (
        agent.chain.contract
        == consumer.chain.contract
        == bytes.fromhex("5FbDB2315678afecb367f032d93F642f64180aa3")
    )
    assert agent.ports[0].wire == "tcp://127.0.0.1:1502"
    assert agent.mqtt.url == consumer.mqtt.url


def test_every_commented_line_of_the_examples_is_a_real_setting(tmp_path):
    """Would catch an example that advertises a setting which was renamed or never was."""
    agent = load_agent(uncommented(CONFIG / "agent.toml", tmp_path), {})
    assert agent.ports[0].meter.map == "eastron_sdm630"
    consumer = load_consumer(uncommented(CONFIG / "consumer.toml", tmp_path), {})
    assert consumer.http.url == "http://192.168.4.1:8465"


def test_the_examples_name_every_setting_and_show_its_true_default(tmp_path):
    """Would catch a setting that nobody can find, and a comment that promises another default."""
    for name, load in (("agent.toml", load_agent), ("consumer.toml", load_consumer)):
        text = (CONFIG / name).read_text()
        shown = load(uncommented(CONFIG / name, tmp_path), {})
        tables = (shown, *(getattr(shown, table) for table in type(shown).model_fields))
        for table in (entry[0] if isinstance(entry, tuple) else entry for entry in tables):
            for field, about in getattr(type(table), "model_fields", {}).items():
                line = rf"^(# )?({field} = |\[+(ports\.)?{field}\])"
                assert re.search(line, text, re.MULTILINE), f"{name} does not show {field}"
                commented = re.search(rf"^# {field} = ", text, re.MULTILINE)
                if commented and about.default is not None and not about.is_required():
                    assert getattr(table, field) == about.default, f"{name} shows another default of {field}"


def test_the_schema_is_the_one_that_is_committed():
    """Would catch an editor completing yesterday's settings."""
    assert json.loads((CONFIG / "agent.schema.json").read_text()) == agent_schema()


def test_the_environment_lies_over_the_file():
    """Would catch an override lost, or an address, a list or a number read wrongly from a shell."""
    environ = {
        "V2V_CHAIN__URLS": "wss://one.example",
        "V2V_CHAIN__CONTRACT": "0x" + "11" * 20,
        "V2V_CHAIN__FINALITY": "12",
        "V2V_PORTS__0__WIRE": "rtu:///dev/serial/by-id/usb-1",
        "V2V_PORTS__0__DEVICE_ID": "255",
        "V2V_HTTP__ENABLED": "false",
        "V2V_LOG__LEVEL": "debug",
        "V2VISITORS": "not ours",
    }
    config = load_agent(CONFIG / "agent.toml", environ)
    assert config.chain.urls == ("wss://one.example",)
    assert config.chain.contract == b"\x11" * 20
    assert config.chain.finality == 12
    assert (config.ports[0].wire, config.ports[0].device_id) == ("rtu:///dev/serial/by-id/usb-1", 255)
    assert not config.http.enabled
    assert config.log.level == "debug"
    several = load_agent(CONFIG / "agent.toml", {"V2V_CHAIN__URLS": '["ws://a", "http://b:1"]'})
    assert several.chain.urls == ("ws://a", "http://b:1")


def test_paths_start_at_the_file_and_names_stay_names(tmp_path):
    """Would catch a daemon whose journal depends on the directory it was started from."""
    (tmp_path / "agent.toml").write_text((CONFIG / "agent.toml").read_text())
    config = load_agent(
        tmp_path / "agent.toml", {"V2V_KEYS__METER": "meter_key", "V2V_JOURNAL__PATH": "/var/lib/x"}
    )
    assert config.keys.operator == str(tmp_path / "keys/operator.json")
    assert config.keys.meter == "meter_key"
    assert config.journal.path == Path("/var/lib/x")
    assert load_agent(tmp_path / "agent.toml", {}).journal.path == tmp_path / "journal.sqlite"


def test_settings_cannot_be_changed_once_read():
    """Would catch a runner that writes into what another one reads."""
    config = load_agent(CONFIG / "agent.toml", {})
    with pytest.raises(ValueError, match="frozen"):
        config.chain.confirmations = 0


@pytest.mark.parametrize(
    ("power_w", "credit_wh"), [(0, 50), (11_000, 50), (12_000, 50), (22_000, 91), (150_000, 625)]
)
def test_credit_follows_the_power_but_is_never_below_fifty_wh(power_w, credit_wh):
    """Would catch a credit other than PROTOCOL section 5: max(50 Wh, P x 15 s)."""
    assert ProviderPolicyConfig().max_unacked_wh_at(power_w) == credit_wh


def test_a_configured_credit_stands():
    """Would catch a credit of the owner's overruled by the default."""
    assert ProviderPolicyConfig(max_unacked_wh=7).max_unacked_wh_at(22_000) == 7


def test_the_socket_is_where_systemd_says_else_beside_the_journal(tmp_path):
    """Would catch an agent and a command line that look for each other in different places."""
    config = load_agent(uncommented(CONFIG / "agent.toml", tmp_path), {})
    beside = config.journal.path.with_suffix(".sock")
    assert socket_path(config, {}) == beside
    assert socket_path(config, {"RUNTIME_DIRECTORY": "/run/v2v-agent:/run/other"}) == Path(
        "/run/v2v-agent/agent.sock"
    )
    beside.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text("no socket")
    assert socket_found(config, {}) != beside
    beside.unlink()
    with socket.socket(socket.AF_UNIX) as here:
        here.bind(str(beside))
        assert socket_found(config, {}) == beside


def test_addresses_are_taken_apart():
    """Would catch the broker's or the page's host and port read wrongly."""
    plain = MqttConfig(url="mqtt://broker")
    assert (plain.host, plain.port, plain.tls) == ("broker", 1883, False)
    secure = MqttConfig(url="mqtts://[::1]:99")
    assert (secure.host, secure.port, secure.tls) == ("::1", 99, True)
    assert MqttConfig(url="mqtts://broker").port == 8883
    page = HttpConfig(listen="[::1]:80")
    assert (page.host, page.port) == ("::1", 80)


def test_everything_that_has_a_unit_says_so():
    """Would catch a number whose unit the installer must guess."""
    counts = {"chain_id", "confirmations", "start_block", "device_id", "phase_count", "finality"}
    units = re.compile(r"_(s|ms|wh|w|ma|ma_per_s|permille|wei_per_kwh_start|ma_max|w_max)$")
    for section in json.loads(json.dumps(agent_schema()))["$defs"].values():
        for name, about in section["properties"].items():
            kinds = {about.get("type"), *(option.get("type") for option in about.get("anyOf", []))}
            assert "integer" not in kinds or name in counts or units.search(name), name


def test_reading_settings_stays_quick():
    """Would catch the leaf importing a library that takes a Raspberry Pi seconds to load."""
    slow = "{'web3', 'aiomqtt', 'aiohttp', 'coincurve', 'eth_hash'}"
    code = f"import sys, agent.config; print(sorted({slow} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


def test_the_schema_knows_every_table():
    """Would catch a table that the model has and the schema lost."""
    assert set(agent_schema()["properties"]) == set(AgentConfig.model_fields)
