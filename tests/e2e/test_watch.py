"""`v2v provider watch`: the car is gone in the middle of a sale, the consumer concedes nothing, and a stranger's computer with
the exported file gets the provider paid for what was signed.
"""

import json
import subprocess
import sys

import pytest
from stage import RATE_WEI_PER_KWH, Program, Stage, eventually

from agent.chain import contract
from agent.core.token import NO_ACK
from agent.core.units import cost_wei_floor, hex0x
from agent.demo import market as setup

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def stage(tmp_path):
    """A market without a broker: the consumer comes through the agent's own door."""
    with Stage(tmp_path, broker=False) as stage:
        yield stage


def session_on_chain(stage, token):
    """As the contract shows it."""
    data = stage.do(stage.node.call(stage.market.address, contract.encode_sessions(token)))
    return contract.decode_sessions(data)


def test_a_receipt_is_worth_its_money_without_the_car(stage):
    """Would catch receipts that only the lost car could use, and a watch that acts too late or for its own account."""
    charger = stage.charger()
    agent = stage.agent(charger).started()
    journey = stage.journey()
    terms = stage.matched(journey, 400)
    buying = stage.at_the_plug(journey, http=True)

    def acked_wh():
        book = agent.book()
        return max((one.energy_wh_acked for one in book.sessions.values()), default=0)

    eventually(lambda: acked_wh() >= 6, 60, "the consumer signs")
    agent.kill()
    buying.cancel()
    config, folder = stage.config(charger.wire), stage.folder / "evidence"
    words = (sys.executable, "-m", "agent", "provider")
    subprocess.run((*words, "export", "--all", "--out", folder, "--config", config), check=True, timeout=60)
    (file,) = folder.iterdir()
    signed_wh = acked_wh()

    before_wei = stage.ledger_wei(stage.provider.owner)
    stage.send(stage.consumer, contract.encode_end_connection(terms.token, 0, NO_ACK))  # "I received nothing"
    organisation = setup.party(
        stage.net, stage.folder, "organisation"
    )  # whoever it is: it pays gas, and gets nothing
    watch = (*words, "watch", file, "--rpc", stage.net.url_http, "--key", organisation.key_file, "--json")
    with Program(watch, stage.folder, "watch", split=True) as program:
        eventually(
            lambda: session_on_chain(stage, terms.token).claimed_wh == signed_wh,
            60,
            "the receipt is handed in",
        )
        stage.pass_time(60)  # the challenge
        assert program.ended(120) == 0, program.said + program.complained
    told = json.loads(program.said)
    assert (told["open"], told["energy_wh_settled"]) == (False, signed_wh)
    assert [one["step"] for one in told["sent"]] == ["submit", "settle"]
    fee_wei = cost_wei_floor(RATE_WEI_PER_KWH * 8 // 10, signed_wh)
    assert stage.ledger_wei(stage.provider.owner) == before_wei + terms.bond_wei + fee_wei, hex0x(terms.token)
