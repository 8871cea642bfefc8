"""What an installer reads when a settings file is wrong, letter by letter."""

from pathlib import Path
from typing import NamedTuple

import pytest

from agent.config import load_agent, load_consumer
from agent.errors import EXIT_MISCONFIGURED, Misconfigured

GOOD = """\
[chain]
urls = ["ws://node:8545"]
chain_id = 5
contract = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
provider = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"

[[ports]]
name = "left"
map = "simulated"
wire = "tcp://charger"
current_ma_max = 16_000
phase_count = 3

[journal]
path = "journal.sqlite"
"""
CONSUMER = """\
[chain]
urls = ["ws://node:8545"]
chain_id = 5
contract = "0x5FbDB2315678afecb367f032d93F642f64180aa3"
consumer = "0x70997970C51812dc3A010C7d01b50e0d17dc79C8"
[order]
energy_wh = 1
rate_wei_per_kwh_start = 1
[journal]
path = "j"
"""
KEY = "59c6995e998f97a5a0044966f0945389dc9e86dae88c7a8412f4603b6b78690d"
TABLES = "chain, keys, ports, policy, mqtt, http, journal, log"
PORT = (
    "name, map, wire, device_id, current_ma_max, phase_count, failsafe_timeout_s, external_cut_off, "
    "cut_off_command, "
    "ev_lag_ms, ev_ramp_ma_per_s, poll_interval_ms, commissioning, meter"
)
NO_PASSWORD = "must not hold a user name or a password; name a credential instead"
NOT_A_SETTING = (
    "a secret is not a setting: put it into a systemd credential or a file of mode 0600, and name that here"
)


def complaint(folder, text, environ=None, load=load_agent):
    """What a command prints for this file, with the folder's name cut out."""
    path = folder / "agent.toml"
    path.write_text(text)
    with pytest.raises(Misconfigured) as caught:
        load(path, environ or {})
    assert caught.value.exit_code == EXIT_MISCONFIGURED
    return str(caught.value).replace(f"{folder}/", "")


def framed(count, body):
    """One or more findings inside the sentence that frames them."""
    return (
        f"agent.toml: {count}, nothing was started\n\n{body}\n\n"
        "  next step: correct agent.toml and run the same command again; "
        "config/agent.toml explains every setting"
    )


class Case(NamedTuple):
    """`new` for `old` in the good file, and what is then found: where, what stands there, what is wrong."""

    old: str
    new: str
    place: str
    given: str | None
    wrong: str


def finding(place, given, wrong):
    """One mistake as it is printed."""
    return "\n      ".join(part for part in (f"  {place}", given, wrong) if part)


ONE_MISTAKE = {
    "unknown setting, near one": Case(
        "phase_count = 3",
        "phase_cuont = 1\nphase_count = 3",
        "agent.toml:12  ports[0].phase_cuont",
        "phase_cuont = 1",
        'unknown setting - did you mean "phase_count"?',
    ),
    "unknown setting, near none": Case(
        "[journal]",
        "[journal]\nbaud = 9600",
        "agent.toml:15  journal.baud",
        "baud = 9600",
        "unknown setting; there are: path",
    ),
    "unknown table": Case(
        "[journal]",
        "[jurnal]\n[journal]",
        "agent.toml:14  jurnal",
        None,
        'unknown setting - did you mean "journal"?',
    ),
    "too large": Case(
        "phase_count = 3",
        "phase_count = 3\nfailsafe_timeout_s = 16",
        "agent.toml:13  ports[0].failsafe_timeout_s",
        "failsafe_timeout_s = 16",
        "must be at most 15",
    ),
    "too small": Case(
        "current_ma_max = 16_000",
        "current_ma_max = 16",
        "agent.toml:11  ports[0].current_ma_max",
        "current_ma_max = 16",
        "must be at least 6000",
    ),
    "text for a number": Case(
        "chain_id = 5",
        'chain_id = "5"',
        "agent.toml:3  chain.chain_id",
        'chain_id = "5"',
        "must be a whole number",
    ),
    "true for a number": Case(
        "chain_id = 5",
        "chain_id = true",
        "agent.toml:3  chain.chain_id",
        "chain_id = true",
        "must be a whole number",
    ),
    "number for text": Case(
        'map = "simulated"',
        "map = 1",
        "agent.toml:9  ports[0].map",
        "map = 1",
        "must be text in quotation marks",
    ),
    "text for a switch": Case(
        "[journal]",
        '[http]\nenabled = "yes"\n[journal]',
        "agent.toml:15  http.enabled",
        'enabled = "yes"',
        "must be true or false",
    ),
    "not one of a few": Case(
        "phase_count = 3",
        "phase_count = 2",
        "agent.toml:12  ports[0].phase_count",
        "phase_count = 2",
        "must be 1 or 3",
    ),
    "missing": Case(
        "chain_id = 5\n",
        "",
        "agent.toml:1  chain.chain_id",
        None,
        "is missing (The chain's EIP-155 id; another answer from a node is refused)",
    ),
    "missing table": Case(
        '[journal]\npath = "journal.sqlite"',
        "",
        "agent.toml  journal",
        None,
        "is missing (this table is needed)",
    ),
    "value for a table": Case(
        '[journal]\npath = "journal.sqlite"\n',
        "[journal]\npath = 7",
        "agent.toml:15  journal.path",
        "path = 7",
        "must be a path in quotation marks",
    ),
    "url of another kind": Case(
        "ws://node:8545",
        "ftp://node",
        "agent.toml:2  chain.urls[0]",
        'urls[0] = "ftp://node"',
        "must start with one of ws://, wss://, http://, https:// and name a host",
    ),
    "url with a port that is none": Case(
        "ws://node:8545",
        "ws://node:99999",
        "agent.toml:2  chain.urls[0]",
        'urls[0] = "ws://node:99999"',
        "is not a URL; it should look like ws://host:port",
    ),
    "no url at all": Case(
        '["ws://node:8545"]',
        "[]",
        "agent.toml:2  chain.urls",
        None,
        "must have at least 1 entry",
    ),
    "no url that can be followed": Case(
        "ws://node:8545",
        "https://node",
        "agent.toml:1  chain",
        None,
        "urls needs a ws:// or wss:// address: events are followed over a WebSocket",
    ),
    "password in a url": Case(
        "ws://node:8545",
        "wss://me:hunter2@node/k3y",
        "agent.toml:2  chain.urls[0]",
        'urls[0] = "wss://<not shown>@node/<not shown>"',
        NO_PASSWORD,
    ),
    "short address": Case(
        "0x70997970C51812dc3A010C7d01b50e0d17dc79C8",
        "0x7099",
        "agent.toml:5  chain.provider",
        'provider = "0x7099"',
        'must be an address in quotation marks: "0x" and 40 hex digits',
    ),
    "wire of no kind": Case(
        "tcp://charger",
        "192.168.4.2",
        "agent.toml:10  ports[0].wire",
        'wire = "192.168.4.2"',
        "must be tcp://host:port, rtu+tcp://host:port, rtu:///dev/serial/by-id/... or rapi:///dev/...",
    ),
    "name with a blank": Case(
        '"left"',
        '"Left Plug"',
        "agent.toml:8  ports[0].name",
        'name = "Left Plug"',
        "does not fit: Public name of the port: a-z, 0-9, _ and -, at most 32",
    ),
    "listen without a port": Case(
        "[journal]",
        '[http]\nlisten = "localhost"\n[journal]',
        "agent.toml:15  http.listen",
        'listen = "localhost"',
        'must be host:port, for example "127.0.0.1:8465"',
    ),
    "finality of a word": Case(
        "chain_id = 5",
        'chain_id = 5\nfinality = "safe"',
        "agent.toml:4  chain.finality",
        'finality = "safe"',
        'must be "finalized", or a number of blocks from 1 to 10000',
    ),
    "final before it is believed": Case(
        "chain_id = 5",
        "chain_id = 5\nfinality = 2",
        "agent.toml:1  chain",
        None,
        "finality = 2 must not be less than confirmations = 3",
    ),
    "password without a name": Case(
        "[journal]",
        '[mqtt]\nurl = "mqtt://broker"\npassword_credential = "mqtt"\n[journal]',
        "agent.toml:14  mqtt",
        None,
        "password_credential needs a username",
    ),
    "a certificate without its key": Case(
        "[journal]",
        '[mqtt]\nurl = "mqtts://broker"\ncertificate = "./car.crt"\n[journal]',
        "agent.toml:14  mqtt",
        None,
        "certificate and certificate_key need each other",
    ),
    "a certificate that nobody would see": Case(
        "[journal]",
        '[mqtt]\nurl = "mqtt://broker"\nauthority = "./ca.crt"\n[journal]',
        "agent.toml:14  mqtt",
        None,
        "authority and certificate need a mqtts:// url",
    ),
    "a key where its name belongs": Case(
        "[journal]",
        f'[keys]\noperator = "0x{KEY}"\n[journal]',
        "agent.toml:15  keys.operator",
        "operator = <not shown>",
        NOT_A_SETTING,
    ),
    "a key without quotation marks": Case(
        "[journal]",
        f"[keys]\nmeter = 0x{KEY}\n[journal]",
        "agent.toml:15  keys.meter",
        "meter = <not shown>",
        NOT_A_SETTING,
    ),
    "words of a wallet": Case(
        "[journal]",
        '[keys]\noperator = "' + "test " * 11 + 'junk"\n[journal]',
        "agent.toml:15  keys.operator",
        "operator = <not shown>",
        NOT_A_SETTING,
    ),
    "a setting for a password": Case(
        "[journal]",
        '[mqtt]\nurl = "mqtt://broker"\npassword = "hunter2"\n[journal]',
        "agent.toml:16  mqtt.password",
        "password = <not shown>",
        NOT_A_SETTING,
    ),
    "a source with blanks": Case(
        "[journal]",
        '[keys]\noperator = "my key"\n[journal]',
        "agent.toml:15  keys.operator",
        'operator = "my key"',
        "must name a systemd credential, or a file by a path with a slash (./operator.json)",
    ),
}


@pytest.mark.parametrize("name", ONE_MISTAKE)
def test_each_mistake_is_shown_with_its_place_its_value_and_what_would_be_right(tmp_path, name):
    """Would catch a finding without its line, another key's value, pydantic's own words, or a secret."""
    case = ONE_MISTAKE[name]
    assert case.old in GOOD
    printed = complaint(tmp_path, GOOD.replace(case.old, case.new, 1))
    assert printed == framed("1 problem", finding(case.place, case.given, case.wrong))


def test_two_ports_of_one_name_are_refused(tmp_path):
    """Would catch two plugs that a consumer cannot tell apart."""
    port = GOOD[GOOD.index("[[ports]]") : GOOD.index("[journal]")]
    body = finding(
        "agent.toml  the file as a whole", None, "two ports are called left; a consumer must know them apart"
    )
    assert complaint(tmp_path, GOOD.replace("[journal]", f"{port}[journal]")) == framed("1 problem", body)


def test_all_mistakes_are_shown_at_once_in_the_order_of_the_file_then_the_environment(tmp_path):
    """Would catch a loader that stops at the first mistake, or that hides one behind another."""
    text = GOOD.replace("chain_id = 5", "chain_id = 0").replace(
        "phase_count = 3", "phase_count = 2\ncolour = 1"
    )
    environ = {"V2V_POLICY__STOP_DEADLINE_S": "0", "HOME": "/nowhere"}
    found = (
        finding("agent.toml:3  chain.chain_id", "chain_id = 0", "must be at least 1"),
        finding("agent.toml:12  ports[0].phase_count", "phase_count = 2", "must be 1 or 3"),
        finding("agent.toml:13  ports[0].colour", "colour = 1", f"unknown setting; there are: {PORT}"),
        finding(
            "V2V_POLICY__STOP_DEADLINE_S  policy.stop_deadline_s", "stop_deadline_s = 0", "must be at least 1"
        ),
    )
    assert complaint(tmp_path, text, environ) == framed("4 problems", "\n".join(found))


def test_a_wrong_entry_does_not_make_the_list_look_empty(tmp_path):
    """Would catch "at least 1 entry" printed for a list whose one entry is wrong."""
    assert "entry" not in complaint(tmp_path, GOOD.replace("phase_count = 3", "phase_count = 2"))


@pytest.mark.parametrize(
    ("variable", "value", "key", "given", "wrong"),
    [
        (
            "V2V_CHAIN__CHAIN_IDD",
            "1",
            "chain.chain_idd",
            "chain_idd = 1",
            'unknown setting - did you mean "chain_id"?',
        ),
        ("V2V_CHARGER__WIRE", "x", "charger", None, f"unknown setting; there are: {TABLES}"),
        (
            "V2V_PORTS__1__WIRE",
            "x",
            "ports[1].wire",
            None,
            "there is no such table or list entry in the file to override",
        ),
        (
            "V2V_CHAIN__URLS",
            "ws://a:b@node",
            "chain.urls[0]",
            'urls[0] = "ws://<not shown>@node"',
            NO_PASSWORD,
        ),
        ("V2V_KEYS__OPERATOR", f"0x{KEY}", "keys.operator", "operator = <not shown>", NOT_A_SETTING),
    ],
)
def test_a_wrong_variable_is_named_and_never_ignored(tmp_path, variable, value, key, given, wrong):
    """Would catch a misspelt variable that silently does nothing, and a key given in the environment."""
    printed = complaint(tmp_path, GOOD, {variable: value})
    assert printed == framed("1 problem", finding(f"{variable}  {key}", given, wrong))


def test_what_is_not_toml_is_shown_with_line_and_column(tmp_path):
    """Would catch a syntax error without its place."""
    assert complaint(tmp_path, GOOD.replace('"left"', "left")) == (
        "agent.toml:8:8: this is not TOML: Invalid value\n      name = left\n"
        '  next step: correct agent.toml; text stands in quotation marks ("left"), numbers do not'
    )


def test_a_key_on_a_broken_line_is_not_shown(tmp_path):
    """Would catch a secret printed because the line around it is no TOML."""
    shown = complaint(tmp_path, f"operator = {KEY}")
    assert KEY not in shown
    assert "<not shown>" in shown


def test_a_file_cut_short_is_shown_at_its_end(tmp_path):
    """Would catch a crash where the parser names no line."""
    assert complaint(tmp_path, '[chain]\nurls = ["').startswith("agent.toml:2:")


def test_a_missing_file_says_what_to_copy(tmp_path):
    """Would catch a missing file taken as an empty one."""
    with pytest.raises(Misconfigured) as caught:
        load_consumer(tmp_path / "no.toml", {})
    assert str(caught.value) == (
        f"{tmp_path}/no.toml: there is no such file\n"
        "  next step: copy config/consumer.toml there and fill it in"
    )


def test_a_folder_a_huge_file_and_a_binary_are_refused_by_name(tmp_path):
    """Would catch a traceback, or a log read to its end, where the wrong path was given."""
    with pytest.raises(Misconfigured, match=r"cannot be read \(Is a directory\)"):
        load_agent(tmp_path, {})
    (tmp_path / "huge").write_bytes(b"#" * 70_000)
    with pytest.raises(Misconfigured, match="is larger than 65536 bytes"):
        load_agent(tmp_path / "huge", {})
    (tmp_path / "binary").write_bytes(b"\x7fELF\xff")
    with pytest.raises(Misconfigured, match="is not UTF-8 text"):
        load_agent(tmp_path / "binary", {})


def test_a_consumer_needs_a_way_to_the_provider(tmp_path):
    """Would catch a consumer that starts and can never present its token."""
    shown = complaint(tmp_path, CONSUMER, load=load_consumer)
    assert "[mqtt] or [http] is needed: there must be a way to the provider" in shown
    assert shown.endswith("config/consumer.toml explains every setting")


def test_lines_are_found_in_every_way_toml_spells_a_key(tmp_path):
    """Would catch the scan losing its place among dotted keys, sub-tables of lists and long values."""
    text = (
        GOOD.replace(
            "phase_count = 3",
            'phase_count = 3\nmeter.map = "sdm630"\nmeter.wire = "x"\n[[ports]]\nname = "right"\n"map" = 5',
        )
        + "[policy]\nmax_unfinal_wh = [\n  1,\n]\n"
    )
    shown = complaint(tmp_path, text)
    for place in (
        "agent.toml:14  ports[0].meter.wire",
        "agent.toml:17  ports[1].map",
        "agent.toml:15  ports[1].wire",
        "agent.toml:22  policy.max_unfinal_wh",
    ):
        assert place in shown


def test_the_good_file_is_good(tmp_path):
    """Would catch all of the above complaining about something else than the one mistake."""
    (tmp_path / "agent.toml").write_text(GOOD)
    assert load_agent(tmp_path / "agent.toml", {}).chain.chain_id == 5
    (tmp_path / "c.toml").write_text(CONSUMER + '[http]\nurl = "http://car:8465"\n')
    assert load_consumer(Path(tmp_path / "c.toml"), {}).order.energy_wh == 1
