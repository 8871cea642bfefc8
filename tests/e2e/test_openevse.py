"""A whole sale through an OpenEVSE on plain serial: believed by the daemon, delivered, stopped and settled."""

import json

import pytest
from stage import RATE_WEI_PER_KWH, Stage, eventually

from agent.chain import contract
from agent.commissioned import signed
from agent.config import load_agent
from agent.core.units import cost_wei_floor
from agent.keys import load_meter_signer
from firmware_bridge.mapped_charger import ChargerConfig
from firmware_bridge.opening import editions

ORDER_WH = 4
pytestmark = pytest.mark.timeout(240)


def reported(stage, wire, environ):
    """What `v2v charger commission` would have written about this box (tests/agent/cli/test_commission.py has it written)."""
    settings = load_agent(stage.config(wire), {f"V2V_{name}": str(value) for name, value in environ.items()})
    (port,) = settings.ports
    config = ChargerConfig.model_validate(port.charger_settings())
    report = {
        "passed": True,
        "installed": port.installed(),
        "editions": editions(config),
        "identity": {"serial": "SIMUL801020304", "firmware": "8.2.3 RAPI 5.2.1"},
    }
    path = stage.folder / "left.commissioning.json"
    signer = load_meter_signer(settings.keys.meter, environ={})
    path.write_text(json.dumps(signed(report, signer)))
    return path


@pytest.mark.parametrize("meter", ["", pytest.param("janitza_b2x", marks=pytest.mark.long)])
def test_an_openevse_sells_to_the_watt_hour(tmp_path, meter):
    """Would catch a serial charger that the daemon cannot open, drive or stop, and a counter of two halves that bills wrong;
    and a Modbus meter beside it whose register does not reach the bill.
    """
    with Stage(tmp_path, broker=False) as stage:
        beside = ("--meter-map", meter, "--tcp", "127.0.0.1:0") if meter else ()
        box = stage.charger(where=("--rapi", tmp_path / "ttyOpenEVSE", *beside))
        port = {
            "PORTS__0__MAP": "openevse_rapi",
            "PORTS__0__PHASE_COUNT": 1,
            "PORTS__0__EXTERNAL_CUT_OFF": "K1",
            "PORTS__0__FAILSAFE_TIMEOUT_S": 3,
        }
        if meter:
            listening = json.loads(box.heard(r"^\{.*listening.*\}$")[0])
            port |= {"PORTS__0__METER__MAP": meter, "PORTS__0__METER__WIRE": listening["meter_wire"]}
        report = reported(stage, box.wire, port)
        agent = stage.agent(box, **port, PORTS__0__COMMISSIONING=report).started()
        box.zero_at_ms(20)  # by itself it had begun to charge
        before = box.truth
        journey = stage.journey()
        stage.matched(journey, ORDER_WH)
        summary = stage.at_the_plug(journey, http=True).result(120)
        assert summary.energy_wh_settled == ORDER_WH
        box.zero_at_ms(20)
        delivered_mwh = box.truth["delivered_mwh"] - before["delivered_mwh"]
        assert (ORDER_WH - 1) * 1000 < delivered_mwh < (ORDER_WH + 2) * 1000  # its counter has steps of 1 Wh
        ((log, _),) = stage.logs(contract.ConnectionEnded)
        assert (log.delivered_wh, log.fee_wei) == (
            ORDER_WH,
            cost_wei_floor(RATE_WEI_PER_KWH * 8 // 10, ORDER_WH),
        )
        eventually(lambda: agent.session().get("stage") == "SETTLED", 30, "the agent believes the settlement")
        assert agent.stop() == 0
        assert not box.truth["enabled"]
