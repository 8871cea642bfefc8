"""The owner bids through the running daemon: no key is typed, the operator's signs inside, `kill -9` makes no second bid. Then
the session is settled when its price is right.
"""

import json
import subprocess
import sys

import pytest
from stage import ANVIL, ASK_S, RATE_WEI_PER_KWH, Stage, eventually, surroundings

from agent.chain import contract
from agent.consumer.journey import Order
from agent.core import events as ev
from agent.core.units import cost_wei_ceil, hex0x

pytestmark = [
    pytest.mark.skipif(ANVIL is None, reason="anvil is not installed: ./run test contracts"),
    pytest.mark.timeout(600),
]
ABSURD_WEI = 60 * 10**9  # per gas: a settlement would cost three times its stake
BIDDING_S = 3_600  # the story decides when it is over, not the machine's speed
ENERGY_WH, RATE = 40, RATE_WEI_PER_KWH * 8 // 10


def test_the_owner_bids_through_the_running_agent(tmp_path):
    """Would catch a bid that needs the owner's key on the road, one made twice by a crash, a refusal without its name; and a
    settlement that burns its stake in a rush, or waits without a word.
    """
    with Stage(tmp_path, broker=False) as stage:
        charger = stage.charger()
        agent = stage.agent(charger).started()
        config = agent.journal_path.parent / "agent.toml"

        def typed(*words):
            ran = subprocess.run(
                [sys.executable, "-m", "agent", "provider", *words, "--config", str(config), "--json"],
                capture_output=True, text=True, env=surroundings(), check=False,
            )  # fmt: skip
            return ran.returncode, ran.stdout, ran.stderr

        code, out, err = typed("status")
        assert code == 0, err
        assert json.loads(out)["chain"]["is_fresh"] is True

        order = Order(ENERGY_WH, RATE_WEI_PER_KWH, BIDDING_S, 600)
        journey = stage.journey()
        starting = stage.begin(journey.start_auction(order))
        eventually(lambda: stage.auction().is_live, ASK_S, "the auction is open")
        bid = ("bid", "--consumer", hex0x(stage.consumer.address), "--rate", str(RATE))
        code, _, err = typed(*bid)
        assert (code, "Insufficient" in err) == (3, True), (
            "a bond comes from the ledger, and there is nothing yet"
        )
        bond_wei = cost_wei_ceil(RATE, ENERGY_WH)
        stage.send(stage.provider.owner, contract.encode_deposit(), bond_wei)

        code, out, err = typed(*bid)
        assert code == 0, err
        told = json.loads(out)
        assert stage.auction().provider == stage.provider.owner.address
        assert stage.do(stage.node.receipt(bytes.fromhex(told["tx"][2:]))).succeeded
        assert told["settlements_left"] > 1

        agent.kill()
        agent = stage.agent(charger).started()
        code, out, err = typed(*bid)
        assert code == 0, err
        assert json.loads(out)["tx"] == told["tx"], "the same bid is one bid, also over a crash"
        signed = [row for row in agent.rows() if isinstance(row, ev.BidSigned)]
        assert len(signed) == 1
        stage.pass_time(BIDDING_S)
        starting.result(ASK_S)
        terms = stage.do(journey.connect())
        assert terms.provider == stage.provider.owner.address

        plugged = stage.at_the_plug(journey, http=True)

        def waits():
            stage.net.ask("anvil_setNextBlockBaseFeePerGas", hex(ABSURD_WEI))
            settling = agent.session().get("settling")
            return settling is not None and settling["state"] == "waiting"

        eventually(waits, 240, "the settlement waits for lower fees")
        _, out, _ = typed("status")
        (row,) = json.loads(out)["sessions"]
        assert row["settling"]["reason"] == "fee_cap"
        assert not agent.has_row(ev.SettlementSigned)
        assert '"settlement.deferred"' in agent.said
        # Fees fall by an eighth a block, as on every chain after a rush.
        eventually(lambda: agent.session().get("stage") == "SETTLED", 120, "fees have fallen, it is settled")
        plugged.result(ASK_S)
        (ended,) = stage.logs(contract.ConnectionEnded)
        paid = stage.do(stage.node.receipt(ended[1]))
        assert paid.fee_wei <= (ended[0].fee_wei + bond_wei) * 3 // 4
