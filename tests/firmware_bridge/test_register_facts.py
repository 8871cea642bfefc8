"""The register facts once more, written down by hand from the sources and not from the maps.

Simulator and driver share a map, so both would follow it to a wrong address. Here stands what must be on the wire: words
as the device sends them (hex), the function code, the address, and what a person would read there.
"""

from __future__ import annotations

from functools import cache

import pytest

from firmware_bridge import device_map as maps
from firmware_bridge.device_map import map_names

load_map = cache(maps.load_map)

# map, quantity, function code, address, words on the wire, what they mean
READ = """
abb_b23_b24 register_import_mwh 3 0x5000 0000 0000 0001 E240 = 1234560000
abb_b23_b24 register_export_mwh 3 0x5004 0000 0000 0000 0001 = 10000
abb_b23_b24 power_w 3 0x5B14 FFFF FF9C = -1
abb_b23_b24 voltage_mv 3 0x5B00 0000 0906 = 231000
abb_b23_b24 current_ma 3 0x5B0C 0000 0640 = 16000
abb_b23_b24 frequency_mhz 3 0x5B2C 1388 = 50000
abb_terra_ac pilot_state 3 0x400C 0000 8400 = C
abb_terra_ac power_w 3 0x401C 0000 2B20 = 11040
abb_terra_ac current_ma 3 0x4010 0000 3E80 = 16000
abb_terra_ac voltage_mv 3 0x4016 0000 0906 = 231000
abb_terra_ac fault 3 0x4008 0000 0000 =
alfen_ng9xx register_mwh 3 374 4132 D687 0000 0000 = 1234567000
alfen_ng9xx power_w 3 344 462C 8000 = 11040
alfen_ng9xx current_ma 3 320 4180 0000 = 16000
alfen_ng9xx voltage_mv 3 306 4367 0000 = 231000
alfen_ng9xx pilot_state 3 1201 4332 0000 0000 0000 0000 = C
ambibox_ambicharge pilot_state 4 4082 0000 0005 = C
ambibox_ambicharge plugged 4 4084 0000 0000 = False
ambibox_ambicharge soc_permille 4 4054 4248 0000 = 500
ambibox_ambicharge current_ma 4 4004 4180 0000 = 16000
ambibox_ambicharge voltage_mv 4 4012 4367 0000 = 231000
amperfied_connect pilot_state 4 5 0007 = C
bender_cc61x register_mwh 3 218 0012 D687 = 1234567000
bender_cc61x power_w 3 220 0000 2B20 = 11040
bender_cc61x pilot_state 3 122 0003 = C
bender_cc61x contactor_closed 3 140 0005 = True
bender_cc61x current_ma 3 212 0000 3E80 = 16000
bender_cc61x voltage_mv 3 222 0000 00E7 = 231000
carlo_gavazzi_em24 register_import_mwh 4 0x42 3039 0000 = 1234500000
carlo_gavazzi_em24 power_w 4 0x28 AF40 0001 = 11040
carlo_gavazzi_em24 voltage_mv 4 0x00 0906 0000 = 231000
carlo_gavazzi_em24 current_ma 4 0x0C 3E80 0000 = 16000
carlo_gavazzi_em24_e1 register_import_mwh 4 0x34 3039 0000 = 1234500000
carlo_gavazzi_em24_e1 register_export_mwh 4 0x4E 0001 0000 = 100000
carlo_gavazzi_em24_e1 power_w 4 0x28 AF40 0001 = 11040
carlo_gavazzi_em330 register_import_mwh 4 0x0500 D687 0012 0000 0000 = 1234567000
carlo_gavazzi_em330 register_export_mwh 4 0x051C 0001 0000 0000 0000 = 1000
carlo_gavazzi_em330 power_w 4 0x28 50C0 FFFE = -11040
carlo_gavazzi_em340 register_import_mwh 4 0x0400 04D2 0000 = 1234000000
carlo_gavazzi_em340 register_export_mwh 4 0x0408 0001 0000 = 1000000
carlo_gavazzi_em330_em340 register_import_mwh 4 0x34 3039 0000 = 1234500000
carlo_gavazzi_em330_em340 register_export_mwh 4 0x4E 0001 0000 = 100000
carlo_gavazzi_em530_em540_em580 register_import_mwh 4 0x0500 D687 0012 0000 0000 = 1234567000
carlo_gavazzi_em530_em540_em580 register_export_mwh 4 0x051C 0001 0000 0000 0000 = 1000
carlo_gavazzi_em530_em540_em580 power_w 4 0x28 AF40 0001 = 11040
dzg_dvh4013 register_import_mwh 3 0x4000 0012 D687 = 1234567000
dzg_dvh4013 register_export_mwh 3 0x4100 0000 0001 = 1000
dzg_dvh4013 voltage_mv 3 0x0004 0000 5A3C = 231000
eastron_sdm630_sdm72v2 register_import_mwh 4 0x0048 449A 5000 = 1234500000
eastron_sdm630_sdm72v2 register_export_mwh 4 0x004A 3F00 0000 = 500000
eastron_sdm630_sdm72v2 power_w 4 0x0034 C62C 8000 = -11040
eastron_sdm630_sdm72v2 voltage_mv 4 0x0000 4367 0000 = 231000
eastron_sdm630_sdm72v2 current_ma 4 0x0006 4180 0000 = 16000
eastron_sdm630_sdm72v2 frequency_mhz 4 0x0046 4248 0000 = 50000
eastron_sdm72_v1 register_import_mwh 4 0x0048 449A 5000 = 1234500000
eastron_sdm72_v1 register_export_mwh 4 0x004A 3F00 0000 = 500000
eastron_sdm72_v1 power_w 4 0x0034 462C 8000 = 11040
em2go_home register_mwh 3 28 0000 3039 = 1234500000
em2go_home power_w 3 12 0000 2B20 = 11040
em2go_home pilot_state 3 0 0004 = C
em2go_home current_ma 3 6 00A0 = 16000
em2go_home voltage_mv 3 109 0906 = 231000
evse_din_simpleevse pilot_state 3 1002 0003 = C
heidelberg_energy_control pilot_state 4 5 0007 = C
heidelberg_energy_control current_ma 4 6 00A0 = 16000
heidelberg_energy_control voltage_mv 4 10 00E7 = 231000
inepro_pro380 register_import_mwh 3 0x600C 449A 5000 = 1234500000
inepro_pro380 register_export_mwh 3 0x6018 3F00 0000 = 500000
inepro_pro380 power_w 3 0x5012 4131 0000 = 11063
inepro_pro380 voltage_mv 3 0x5002 4367 0000 = 231000
inepro_pro380 current_ma 3 0x500C 4180 0000 = 16000
iskra_wm3m4 register_import_mwh 4 418 0012 D687 = 1234567000
iskra_wm3m4 register_export_mwh 4 420 0000 0001 = 1000
iskra_wm3m4 power_w 4 140 0000 2B20 = 11040
iskra_wm3m4 voltage_mv 4 107 FF00 0906 = 231000
iskra_wm3m4 current_ma 4 126 FD00 3E80 = 16000
janitza_b2x register_import_mwh 3 0x4A7C 4996 B438 = 1234567000
janitza_b2x register_export_mwh 3 0x4A84 3F80 0000 = 1000
janitza_b2x power_w 3 0x4A52 462C 8000 = 11040
janitza_b2x voltage_mv 3 0x4A38 4367 0000 = 231000
janitza_b2x current_ma 3 0x4A44 4180 0000 = 16000
keba_p30 register_mwh 3 1036 00BC 6146 = 1234567000
keba_p30 power_w 3 1020 00A8 7500 = 11040
keba_p30 pilot_state 3 1000 0000 0003 = C
keba_p30 plugged 3 1004 0000 0003 = False
keba_p30 current_ma 3 1008 0000 3E80 = 16000
keba_p30 voltage_mv 3 1040 0000 00E7 = 231000
keba_p40 register_mwh 3 1036 00BC 6146 = 1234567000
mennekes_compact20 register_mwh 3 0x1000 449A 5000 = 1234500000
mennekes_compact20 power_w 3 0x0512 462C 8000 = 11040
mennekes_compact20 pilot_state 3 0x0100 0005 = C
mennekes_compact20 current_ma 3 0x0500 4180 0000 = 16000
mennekes_compact20 voltage_mv 3 0x0506 4367 0000 = 231000
mennekes_hcc3 pilot_state 4 0x0302 0005 = C
mennekes_hcc3 power_w 4 0x030F 2B20 0000 = 11040
obo_ion_epc2plus pilot_state 3 11 0002 = C
obo_ion_epc2plus fault 3 14 0000 =
phoenix_charx_sec register_mwh 3 1250 0000 0000 0012 D687 = 1234567000
phoenix_charx_sec power_w 3 1244 00A8 7500 = 11040
phoenix_charx_sec pilot_state 3 1299 4332 = C
phoenix_charx_sec fault 3 1293 0100 0000 = overcurrent
phoenix_charx_sec current_ma 3 1238 0000 3E80 = 16000
phoenix_charx_sec voltage_mv 3 1232 0003 8658 = 231000
phoenix_em_cp_pp_eth register_mwh 4 128 E240 0001 = 1234560000
phoenix_em_cp_pp_eth power_w 4 120 0450 0000 = 11040
phoenix_em_cp_pp_eth pilot_state 4 100 FF43 = C
phoenix_em_cp_pp_eth current_ma 4 114 3E80 0000 = 16000
phoenix_em_cp_pp_eth voltage_mv 4 108 5A3C 0000 = 231000
phoenix_ev_cc_basic pilot_state 3 24000 4332 = C
phoenix_ev_eth_wallbe register_mwh 3 904 D687 0012 = 1234567000
phoenix_ev_eth_wallbe power_w 4 120 2B20 0000 = 11040
phoenix_ev_eth_wallbe pilot_state 4 100 0043 = C
phoenix_ev_eth_wallbe current_ma 4 114 0010 0000 = 16000
schneider_evlink_pro_ac register_mwh 3 3203 D687 0012 0000 0000 = 1234567000
schneider_evlink_pro_ac power_w 3 3059 0000 4130 = 11000
schneider_evlink_pro_ac pilot_state 3 1 0008 = C
schneider_evlink_pro_ac current_ma 3 2999 0000 4180 = 16000
schneider_evlink_pro_ac voltage_mv 3 3027 0000 4367 = 231000
vestel_evc04_webasto_unite register_mwh 4 1036 0000 3039 = 1234500000
vestel_evc04_webasto_unite power_w 4 1020 0000 2B20 = 11040
vestel_evc04_webasto_unite pilot_state 4 1001 0001 = C
vestel_evc04_webasto_unite plugged 4 1004 0002 = True
vestel_evc04_webasto_unite current_ma 4 1008 3E80 = 16000
vestel_evc04_webasto_unite voltage_mv 4 1014 00E7 = 231000
victron_evcs register_mwh 3 5023 0001 E240 = 1234560000
victron_evcs power_w 3 5014 2B20 = 11040
victron_evcs pilot_state 3 5015 0002 = C
wallbox_quasar_1 power_w 3 526 F060 = 4000
wallbox_quasar_1 pilot_state 3 537 000B = C
wallbox_quasar_1 soc_permille 3 538 0032 = 500
wallbox_quasar_1 voltage_mv 3 522 00E7 = 231000
webasto_next register_mwh 3 1036 0012 D687 = 1234567000
webasto_next power_w 3 1020 0000 2B20 = 11040
webasto_next pilot_state 3 1000 0003 = C
webasto_next current_ma 3 1008 3E80 = 16000
sunspec_der_7xx register_mwh 3 19 0000 0000 0012 D687 = 1234567000
sunspec_der_7xx power_w 3 10 2B20 = 11040
sunspec_der_7xx pilot_state 3 4 0003 = C
sunspec_der_7xx soc_permille 3 4 01F4 = 500
"""
# map, place, function code, address, value in our unit, words on the wire
WRITTEN = """
abb_terra_ac set_current_ma 16 0x4100 16000 = 0000 3E80
abb_terra_ac timeout_ms 6 0x4106 5000 = 0005
alfen_ng9xx set_current_ma 16 1210 16000 = 4180 0000
ambibox_ambicharge set_power_w 16 3000 4000 = 0000 0FA0
amperfied_connect set_current_ma 16 261 16000 = 00A0
amperfied_connect timeout_ms 16 257 5000 = 1388
bender_cc61x set_current_ma 16 1000 16000 = 0010
em2go_home set_current_ma 16 91 16000 = 00A0
em2go_home enable 16 95 2 = 0002
em2go_home timeout_ms 16 89 5000 = 0005
em2go_home current_ma 16 87 0 = 0000
evse_din_simpleevse set_current_ma 16 1000 16000 = 0010
heidelberg_energy_control set_current_ma 16 261 16000 = 00A0
heidelberg_energy_control timeout_ms 16 257 5000 = 1388
heidelberg_energy_control current_ma 16 262 0 = 0000
heidelberg_energy_control lock 16 259 0 = 0000
keba_p30 set_current_ma 6 5004 16000 = 3E80
keba_p30 enable 6 5014 0 = 0000
keba_p30 timeout_ms 6 5018 5000 = 0005
keba_p40 set_current_ma 6 5004 0 = 0000
mennekes_compact20 set_current_ma 16 0x0302 16000 = 4180 0000
mennekes_compact20 enable 6 0x0D05 1 = 0001
mennekes_compact20 keep_alive 6 0x0D00 21930 = 55AA
mennekes_hcc3 set_current_ma 6 0x0400 16000 = 0010
obo_ion_epc2plus set_current_ma 6 6 16000 = 0010
obo_ion_epc2plus enable 6 5 1 = 0001
obo_ion_epc2plus timeout_ms 6 28 5000 = 1388
obo_ion_epc2plus current_ma 6 30 0 = 0000
phoenix_charx_sec set_current_ma 16 1301 16000 = 0010
phoenix_charx_sec enable 16 1300 1 = 0001
phoenix_charx_sec timeout_ms 16 1307 5000 = 0005
phoenix_charx_sec current_ma 16 1306 0 = 0000
phoenix_em_cp_pp_eth set_current_ma 6 300 16000 = 0010
phoenix_em_cp_pp_eth enable 5 400 1 = 0001
phoenix_ev_cc_basic set_current_ma 6 22000 16000 = 0010
phoenix_ev_cc_basic enable 5 20000 1 = 0001
phoenix_ev_eth_wallbe set_current_ma 6 528 16000 = 0010
phoenix_ev_eth_wallbe enable 5 400 0 = 0000
schneider_evlink_pro_ac set_current_ma 6 4004 16000 = 0010
schneider_evlink_pro_ac keep_alive 6 4000 1 = 0001
schneider_evlink_pro_ac current_ma 6 4006 0 = 0000
schneider_evlink_pro_ac current_ma_single_phase 6 4005 0 = 0000
vestel_evc04_webasto_unite set_current_ma 6 5004 16000 = 0010
vestel_evc04_webasto_unite keep_alive 6 6000 1 = 0001
vestel_evc04_webasto_unite timeout_ms 6 2002 5000 = 0005
vestel_evc04_webasto_unite current_ma 6 2000 0 = 0000
victron_evcs set_current_ma 6 5016 16000 = 0010
victron_evcs enable 6 5010 1 = 0001
wallbox_quasar_1 set_power_w 6 260 4000 = F060
wallbox_quasar_1 enable 6 257 2 = 0002
wallbox_quasar_1 timeout_ms 6 88 5000 = 0005
webasto_next set_current_ma 16 5004 16000 = 0010
webasto_next keep_alive 6 6000 1 = 0001
webasto_next timeout_ms 16 2002 5000 = 0005
webasto_next current_ma 16 2000 0 = 0000
sunspec_der_7xx set_power_w 16 24 4000 = 0000 0FA0
sunspec_der_7xx timeout_ms 16 31 5000 = 0000 0005
sunspec_der_7xx power_w 16 26 0 = 0000 0000
"""


def lines(table: str) -> list[tuple[str, str, int, int, list[str], str]]:
    """(map, name, function code, address, what stands between, what stands after the equals sign)."""
    found = []
    for line in table.strip().splitlines():
        left, _, right = line.partition("=")
        name, quantity, fc, address, *rest = left.split()
        found.append((name, quantity, int(fc), int(address, 0), rest, right.strip()))
    return found


@pytest.mark.parametrize("fact", lines(READ), ids=lambda fact: f"{fact[0]}.{fact[1]}")
def test_what_a_device_shows_is_read_where_its_maker_put_it(fact):
    """Would catch a wrong address, function code, order of words, type, unit or sign in a map."""
    name, quantity, fc, address, words, meaning = fact
    point = load_map(name).reads[quantity]
    assert (point.read_fc, point.addresses[0]) == (fc, address)
    shown = [tuple(int(word, 16) for word in words)]
    if len(point.addresses) > 1:  # the other phases, or pieces, show nothing
        shown += [(0,) * point.word_count] * (len(point.addresses) - 1)
    assert str(point.value(shown)) == meaning


@pytest.mark.parametrize("fact", lines(WRITTEN), ids=lambda fact: f"{fact[0]}.{fact[1]}")
def test_what_a_device_takes_is_written_where_its_maker_put_it(fact):
    """Would catch a set point, a switch or a failsafe written to the wrong place, or ten times too much of it."""
    name, quantity, fc, address, (value,), words = fact
    device_map = load_map(name)
    places = dict(device_map.commands)
    assert device_map.failsafe is not None
    places |= {point.name: point for point in device_map.failsafe.points}
    point = places[quantity]
    assert (point.write_fc, point.addresses[0]) == (fc, address)
    assert point.words(int(value)) == tuple(int(word, 16) for word in words.split())


def test_every_map_is_held_against_its_sources():
    """Would catch a map that was added without its facts."""
    assert {fact[0] for fact in lines(READ)} == set(map_names()) - {"simulated"}
    chargers = {name for name in map_names() if load_map(name).kind == "charger"} - {"simulated"}
    assert {fact[0] for fact in lines(WRITTEN)} == chargers
