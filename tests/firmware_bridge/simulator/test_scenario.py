"""What goes wrong and when: the file's mistakes are all told, and each fault holds exactly as long as written."""

from __future__ import annotations

import pytest

from firmware_bridge.charger import MapError
from firmware_bridge.simulator.plant import PLANT_FAULTS
from firmware_bridge.simulator.scenario import WIRE_WORDS, Scenario, load_scenario, parse_scenario


def test_every_mistake_of_a_file_is_told_with_the_nearest_word():
    """Would catch a scenario that silently does nothing because a word was misspelt."""
    with pytest.raises(MapError) as wrong:
        parse_scenario(
            """
            [[fault]]
            wire = "silense"
            [[fault]]
            plant = "ignore_stop"
            [[fault]]
            at_s = 3
            after_wh = 4
            wire = "late"
            plant = "car_deaf"
            [[fault]]
            plant = "car_deaf"
            requests = 2
            """,
            "evening.toml",
        )
    assert str(wrong.value).splitlines() == [
        "evening.toml: fault 1: wire = 'silense' is no fault; nearest: silence",
        "evening.toml: fault 2: plant = 'ignore_stop' is no fault; nearest: ignores_stop",
        "evening.toml: fault 3: give exactly one of wire and plant",
        "evening.toml: fault 3: give at_s or after_wh, not both",
        "evening.toml: fault 4: requests counts answers: it goes with a wire fault, and without for_s",
    ]


def test_words_are_told_together_with_a_wrong_shape():
    """Would catch a file that is mended, tried, and found to have the next mistake."""
    with pytest.raises(MapError) as wrong:
        parse_scenario("[[fault]]\nwire = 'lat'\nat_s = -1\n[[fault]]\nplant = 'contactor_stuk'\n", "x.toml")
    for part in ("fault 1 at_s", "nearest: late", "nearest: contactor_stuck"):
        assert part in str(wrong.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[[fault]]\nwire = 'late'\nat = 3", "nearest: at_s"),
        ("[[faults]]\nwire = 'late'", "nearest: fault"),
        ("[[fault]]\nwire = 'late'\nat_s = -1", "fault 1 at_s"),
        ("[[fault]]\nwire = 'late'\nfor_s = inf", "fault 1 for_s"),
        ("[[fault", "not valid TOML"),
        ("", "fault"),
    ],
)
def test_a_file_of_the_wrong_shape_is_refused_in_words(text, said):
    """Would catch a traceback, or a key that is ignored."""
    with pytest.raises(MapError, match=said):
        parse_scenario(text, "x.toml")


def test_a_file_that_is_missing_huge_or_binary_is_refused(tmp_path):
    """Would catch a traceback where the wrong file was named."""
    for content in (None, b"#" * 70_000, b"\xff\xfe"):
        path = tmp_path / "x.toml"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(MapError):
            load_scenario(path)


def test_faults_hold_from_their_second_or_wh_for_as_long_as_written():
    """Would catch a fault that begins early, never ends, or ends before its turn."""
    faults = parse_scenario(
        """
        [[fault]]
        at_s = 10
        for_s = 2
        wire = "silence"
        [[fault]]
        after_wh = 8
        plant = "ignores_stop"
        [[fault]]
        at_s = 20
        for_s = 5
        wire = "unplugged"
        [[fault]]
        at_s = 3
        plant = "car_deaf"
        device_id = 2
        for_s = 1
        """,
        "x.toml",
    )
    seen = []
    scenario = Scenario(faults)
    for now_s, wh in (
        (0, 0),
        (3.5, 0),
        (9.99, 7.9),
        (10, 8),
        (11.99, 9),
        (12, 9),
        (20, 9),
        (24.9, 9),
        (25, 9),
    ):
        scenario.at(now_s, wh)
        wire = scenario.of(1)
        plants = (scenario.plant_faults(1, first=True), scenario.plant_faults(2, first=False))
        seen.append((wire and wire.name, scenario.unplugged, *(set(plant) for plant in plants)))
    stop = {"ignores_stop"}
    assert seen == [
        (None, False, set(), set()),
        (None, False, set(), {"car_deaf"}),
        (None, False, set(), set()),
        ("silence", False, stop, set()),
        ("silence", False, stop, set()),
        (None, False, stop, set()),
        (None, True, stop, set()),
        (None, True, stop, set()),
        (None, False, stop, set()),
    ]


def test_a_fault_of_so_many_requests_is_over_after_them_and_another_device_does_not_use_it_up():
    """Would catch `requests = 2` that counts somebody else's requests, or is one too many."""
    scenario = Scenario(
        parse_scenario("[[fault]]\nwire = 'late'\nrequests = 2\ndevice_id = 3\ndelay_ms = 5", "x")
    )
    assert scenario.of(1) is None
    told = [scenario.of(3) for _ in range(3)]
    assert [fault and (fault.name, fault.delay_ms) for fault in told] == [("late", 5), ("late", 5), None]


def test_every_fault_can_be_asked_for_and_says_what_it_is():
    """Would catch a fault that no file can name."""
    for key, words in (("wire", WIRE_WORDS), ("plant", PLANT_FAULTS)):
        for word, meaning in words.items():
            assert parse_scenario(f"[[fault]]\n{key} = '{word}'", "x.toml")
            assert meaning
