"""How a mistake in a map file is told: all of them at once, each with file, line, key and the nearest valid key."""

from __future__ import annotations

import tomllib

import pytest

from firmware_bridge.charger import MapError
from firmware_bridge.device_map import MAPS, load_map, parse_map
from firmware_bridge.map_file import Problems

GOOD = (MAPS / "webasto_next.toml").read_text(encoding="utf-8")


def told(text: str) -> list[str]:
    """What the loader says about this text, line by line."""
    with pytest.raises(MapError) as caught:
        parse_map(text, "webasto_next.toml")
    return str(caught.value).splitlines()


def line_of(text: str, part: str) -> int:
    """The number of the first line with this in it."""
    return next(number for number, line in enumerate(text.splitlines(), start=1) if part in line)


def test_a_good_file_has_a_shape_and_no_problem():
    """Would catch a check that is never satisfied."""
    problems = Problems("webasto_next.toml", GOOD, tomllib.loads(GOOD))
    assert problems.shape() is not None
    assert problems.found == []


def test_mistakes_of_every_kind_are_told_in_one_go():
    """Would catch a loader that stops at the first kind of mistake: shape, names, units and meaning in one list."""
    text = GOOD
    for old, new in [
        ("tcp_port = 502", "tcpport = 502"),  # unknown key
        ('type = "u32"', 'type = "u33"'),  # no such type
        ("[read.fault]", "[read.falt]"),  # no such quantity
        ('range = ["6 A", "32 A"]', 'range = ["6 V", "32 A"]'),  # no such unit
        ("fc = 6", "fc = 7"),  # no such function code
        ('step = "1 Wh"', 'step = "1 W"'),  # a power is no energy
    ]:
        assert old in text
        text = text.replace(old, new, 1)
    said = told(text)
    assert len(said) == 6
    for part, answer in [
        ("tcpport", "wire.tcpport = 502: unknown key; nearest valid key: tcp_port"),
        ("u33", "read.register_mwh.type = 'u33'"),
        ("[read.falt]", "read.falt: unknown quantity; nearest: fault"),
        ('"6 V"', "'V' is no unit of current"),
        ("fc = 7", "command.keep_alive.fc = 7"),
        ('step = "1 W"', "'W' is no unit of energy"),
    ]:
        assert any(
            line.startswith(f"webasto_next.toml:{line_of(text, part)}: ") and answer in line for line in said
        ), (part, said)


@pytest.mark.parametrize(
    ("old", "new", "answer"),
    [
        ("sentinels =", "sentinel =", "nearest valid key: sentinels"),
        ("poll_interval_ms", "pol_interval_ms", "nearest valid key: poll_interval_ms"),
        ("zero_fallback", "zero_fall_back", "nearest valid key: zero_fallback"),
        ("confidence =", "confidense =", "nearest valid key: confidence"),
        ("[energy]", "[enerjy]", "nearest valid key: energy"),
        ("addresses =", "adresses =", "nearest valid key: addresses"),
        ("access =", "acess =", "nearest valid key: access"),
        ('raw_unit = "1 Wh"', 'raw_unit = "1 Wh"\nexponent = { adress = 7 }', "nearest valid key: address"),
        ('raw_unit = "1 s"', 'raw_unit = "1 s"\nshown_at = { addres = 7 }', "nearest valid key: address"),
        ("[failsafe.timeout_ms]", "[failsafe.timout_ms]", "nearest valid key: timeout_ms"),
    ],
)
def test_each_misspelt_key_is_told_with_the_one_that_was_meant(old, new, answer):
    """Would catch a table whose keys nobody compares, the ones within one line included."""
    assert old in GOOD
    text = GOOD.replace(old, new, 1)
    said = told(text)
    found = [line for line in said if answer in line]
    assert found, said
    wrong = new.split("\n")[-1].split("=")[0].strip()
    assert found[0].startswith(f"webasto_next.toml:{line_of(text, wrong)}:")


def test_a_mistake_is_not_blamed_for_what_follows_from_it():
    """Would catch "a charger must show pilot_state" said of a file that has it, two lines below its typing error."""
    at = GOOD.index("[read.pilot_state]")
    said = told(GOOD[:at] + GOOD[at:].replace('"u16"', '"u15"', 1))
    assert len(said) == 1
    assert "read.pilot_state.type = 'u15'" in said[0]


def test_names_and_units_are_told_also_where_nothing_has_a_shape():
    """Would catch a file that is mended, tried, and found to have the next mistake: in the same entry, or for want of a maker."""
    text = GOOD.replace("maker = ", "makr = ", 1).replace('type = "u32"', 'type = "u33"', 1)
    text = text.replace('raw_unit = "1 Wh"', 'raw_unit = "1 Whh"', 1).replace(
        "[read.fault]", "[read.falt]", 1
    )
    said = "\n".join(told(text))
    for part in ("nearest valid key: maker", "'u33'", "'Whh' is no unit of energy", "nearest: fault"):
        assert part in said


def test_a_file_that_is_no_text_is_told_so(tmp_path):
    """Would catch a traceback for a picture given as a map."""
    (tmp_path / "picture.toml").write_bytes(b"map_version = 1\n\xb1\x00")
    with pytest.raises(MapError, match=r"picture\.toml: not text in UTF-8"):
        load_map(tmp_path / "picture.toml")


def test_a_file_of_nothing_but_faults_still_ends():
    """Would catch a loader that goes round in circles, or that crashes instead of telling."""
    assert any(
        "map_version" in line
        for line in told('map_version = 2\nid = "x"\n[wire]\nkinds = []\n[[prepare]]\nx = 1\n')
    )
    assert "not valid TOML" in told("id = ")[0]
