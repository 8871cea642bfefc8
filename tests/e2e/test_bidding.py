"""The owner bids through the running daemon: no key is typed, the operator's signs inside, and `kill -9` makes no second bid."""

import json
import subprocess
import sys

import pytest
from stage import ASK_S, RATE_WEI_PER_KWH, Stage, eventually, surroundings

from agent.chain import contract
from agent.consumer.journey import Order
from agent.core import events as ev
from agent.core.units import cost_wei_ceil, hex0x

pytestmark = pytest.mark.timeout(300)
BIDDING_S = 3_600  # the story decides when it is over, not the machine's speed
ENERGY_WH, RATE = 40, RATE_WEI_PER_KWH * 8 // 10


def test_the_owner_bids_through_the_running_agent(tmp_path):
    """Would catch a bid that needs the owner's key on the road, one made twice by a crash, and a refusal without its name."""
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
