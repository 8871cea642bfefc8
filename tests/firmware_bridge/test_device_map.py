"""The map language: what it accepts, what it refuses, and how well it explains itself."""

from __future__ import annotations

from fractions import Fraction

import pytest

from firmware_bridge.charger import MapError
from firmware_bridge.device_map import COMMANDS, MAPS, READS, load_map, map_names, parse_map

BLUEPRINT = MAPS / "_blueprint.toml"


@pytest.mark.parametrize("name", map_names())
def test_every_map_loads_under_its_own_name(name):
    """Would catch a map that was broken by an edit, or filed under another device's id."""
    device_map = load_map(name)
    assert device_map.id == name
    assert device_map.sources


def test_the_blueprint_loads_and_shows_almost_every_quantity():
    """Would catch a blueprint that no longer fits the language: the one file everybody copies."""
    blueprint = load_map(BLUEPRINT)
    assert set(COMMANDS) - set(blueprint.commands) == {"set_power_w"}
    assert set(READS) - set(blueprint.reads) == {
        "register_import_mwh",
        "register_export_mwh",
        "maker",
        "model",
        "firmware",
    }
    assert not blueprint.trusted, "a copied map must prove itself first (BRIDGE rule 9)"


def test_sentinels_are_no_values():
    """Would catch 0xFFFFFFFF Wh billed as 4.3 GWh."""
    counter = load_map("webasto_next").reads["register_mwh"]
    assert counter.value([[0xFFFF, 0xFFFF]]) is None
    assert counter.value([[0x0000, 0x0001]]) == 1000


def test_a_float_counter_lands_on_its_step():
    """Would catch the Wh that is lost when 1234.568 kWh as a float reads as 1234567.993 Wh."""
    counter = load_map("eastron_sdm630_sdm72v2").reads["register_import_mwh"]
    for register_mwh in (1_234_568_000, 1_434_568_000, 7_999_999_000):
        assert counter.value([counter.words(register_mwh)]) == register_mwh


def test_raw_units_are_exact():
    """Would catch a multiplier applied in floating point."""
    reads = load_map("simulated").reads
    assert reads["register_mwh"].step == Fraction(100)
    assert reads["voltage_mv"].step == Fraction(100)
    assert reads["soc_permille"].step == Fraction(1)


def wrong(**changes: tuple[str, str]) -> str:
    """A good map with these pieces replaced."""
    text = (MAPS / "webasto_next.toml").read_text(encoding="utf-8")
    for old, new in changes.values():
        assert old in text
        text = text.replace(old, new, 1)
    return text


def test_all_problems_are_told_at_once_each_with_its_line():
    """Would catch a loader that makes an installer repair a file ten times."""
    text = wrong(
        a=('raw_unit = "1 Wh"', 'raw_unit = "1 kW"'),
        b=("[read.fault]", "[read.falt]"),
        c=('range = ["6 A", "32 A"]', 'range = ["6 V", "32 A"]'),
    )
    with pytest.raises(MapError) as caught:
        parse_map(text, "webasto_next.toml")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3
    numbered = text.splitlines()
    for line, key in zip(lines, ('raw_unit = "1 kW"', "[read.falt]", "range ="), strict=True):
        name, number, _ = line.split(":", 2)
        assert name == "webasto_next.toml"
        assert key in numbered[int(number) - 1]
    assert "nearest: fault" in lines[1]


def test_unknown_keys_name_the_nearest_one():
    """Would catch a misspelt option that is silently ignored."""
    with pytest.raises(MapError, match=r"webasto_next\.toml:\d+: wire\.tcpport = 502: unknown key.*tcp_port"):
        parse_map(wrong(a=("tcp_port", "tcpport")), "webasto_next.toml")


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('type = "u32"', 'type = "u33"', "type = 'u33'"),
        ('id = "webasto_next"', 'id = "webasto_nxt"', "webasto_nxt.toml"),
        ('counter = "lifetime"', 'counter = "session"', "meter must be required"),
        ("fc = 6", "fc = 7", "command.keep_alive.fc = 7"),
        ('kind = "life_bit"', 'kind = "none"', "cannot fall back to 0 A"),
        ("address = 1036", "", "give address"),
        ('"A"', '"Z"', "no pilot state"),
        ("[command.set_current_ma]", "[command.set_curent]", "nearest: set_current_ma"),
        ("value = 1", "", "raw value to write"),
    ],
)
def test_each_kind_of_mistake_has_its_own_sentence(old, new, told):
    """Would catch a check that was dropped, or a message that does not name its key."""
    with pytest.raises(MapError) as caught:
        parse_map(wrong(a=(old, new)), "webasto_next.toml")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("[read.power_w]", "[read.frequency_mhz]", "must show power_w too"),
        ('access = "W"', 'access = "R"', "only a failsafe may be looked at only"),
        ('fed_by = "keep_alive"', 'fed_by = "timeout"', ""),
        ('raw_unit = "1 s"', 'raw_unit = "1 s"\nmodel = 704', "is not among sunspec.model_words"),
        (
            'raw_unit = "1 Wh"',
            'raw_unit = ["1 kWh", "1 Wh"]',
            "one for each of addresses, the coarsest first",
        ),
        ('raw_unit = "1 Wh"', 'raw_unit = "-1 Wh"', "only power has a sign"),
        ('raw_unit = "1 Wh"', 'raw_unit = "0 Wh"', "must be more than nothing"),
        (
            'values = { 0 = "A"',
            'exponent = { address = 1 }\nvalues = { 0 = "A"',
            "only a quantity has an exponent",
        ),
        (
            "[energy]",
            '[[expect]]\naddress = 9\nremedy = "set it up as it should be"\n\n[energy]',
            "values = [...]",
        ),
        ('range = ["6 A", "32 A"]', 'range = ["32 A", "6 A"]', "the least is more than the most"),
        ('range = ["6 A", "32 A"]', 'range = ["6 A"]', ""),
        (
            'type = "u16"\nraw_unit = "1 mA"',
            'type = "i16"\nmask = 7\nraw_unit = "1 mA"',
            "only an unsigned number",
        ),
        ("[failsafe.timeout_ms]", "[failsafe.current_ma_single_phase]", 'timer = "device"'),
        (
            "[wire]",
            "[sunspec]\nbase_addresses = [0]\nmodel_words = { seven = 7 }\n\n[wire]",
            "is no model number",
        ),
    ],
)
def test_each_quirk_has_its_own_check(old, new, told):
    """Would catch an option that is taken where it means nothing; what is told of nothing must load."""
    text = wrong(a=(old, new))
    if not told:
        assert parse_map(text, "webasto_next.toml").trusted
        return
    with pytest.raises(MapError) as caught:
        parse_map(text, "webasto_next.toml")
    assert told in str(caught.value)


def test_what_is_not_confirmed_twice_must_be_proven():
    """Would catch a fallback that is only hoped for, and a counter that one source alone knows (BRIDGE rule 9)."""
    hoped = ("zero_fallback = true", 'zero_fallback = "unproven"')
    failsafe = parse_map(wrong(a=hoped), "webasto_next.toml").failsafe
    assert failsafe is not None
    assert (failsafe.zero_fallback, failsafe.zero_unproven, failsafe.confirmed) == (True, True, False)
    assert parse_map(wrong(a=hoped), "webasto_next.toml").unproven == ("failsafe",)
    counter = ('meter = "built_in"\nconfidence = "both"', 'meter = "built_in"\nconfidence = "doc"')
    assert parse_map(wrong(a=counter), "webasto_next.toml").unproven == ("energy",)


def test_a_digest_names_the_text():
    """Would catch a proof that is believed for a map that was changed since."""
    good = parse_map(wrong(), "webasto_next.toml")
    other = parse_map(wrong(a=("address = 1036", "address = 1038")), "webasto_next.toml")
    assert good.digest == load_map("webasto_next").digest != other.digest


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("phoenix_charx_sec#13", "this device has 1 to 12"),
        ("webasto_next#2", "only one, so leave the # away"),
        ("webasto_next#two", "the number of a connector"),
    ],
)
def test_a_connector_that_is_not_there_is_refused(name, told):
    """Would catch the thirteenth charging point of twelve."""
    with pytest.raises(MapError, match=told):
        load_map(name)


def test_a_map_that_is_not_there_suggests_the_nearest():
    """Would catch an unhelpful answer to a typing error."""
    with pytest.raises(MapError, match="did you mean 'webasto_next'"):
        load_map("webasto_nxt")


def test_a_failsafe_register_without_timer_is_refused():
    """Would catch a charger that claims a watchdog nobody can arm."""
    text = wrong(
        a=("[failsafe.timeout_ms]", "[failsafe.power_w]"), b=('raw_unit = "1 s"', 'raw_unit = "1 W"')
    )
    with pytest.raises(MapError, match=r"failsafe\.timeout_ms"):
        parse_map(text, "webasto_next.toml")
