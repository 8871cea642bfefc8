"""A consumer in JavaScript that shares no line with us (`consumer.mjs`, ethers and mqtt) buys from the real agent.

It was written from docs/consumer-protocol.md. Agent, charger, broker and chain are real processes; the owner bids by
our command line.
"""

import json
import shutil
import sys

import aiomqtt
import pytest
from stage import ASK_S, RATE_WEI_PER_KWH, ROOT, Program, Stage, eventually, note

from agent.chain import contract
from agent.core.messages import Hello, decode, encode
from agent.core.token import ProviderHello, charger_id, digest
from agent.core.units import cost_wei_floor, hex0x
from agent.keys import ephemeral_signer

ORDER_WH = 40
LONG_ORDER_WH, STOP_WH = 400, 15  # much longer than a slow machine needs to say stop
BIDDING_S = 100  # a command line may take long to start; as soon as it has bid, the chain leaps over the rest
RATE_BID = RATE_WEI_PER_KWH * 8 // 10

pytestmark = pytest.mark.timeout(420)


def node():
    """Where node is; the story is skipped without it, or without its parts."""
    found = shutil.which("node")
    if found is None or not (ROOT / "tests/node_modules/mqtt").is_dir():
        pytest.skip("node, ethers or mqtt is missing: `npm ci` in tests/, or `./run test e2e`")
    return found


@pytest.fixture(scope="module")
def evening(tmp_path_factory):
    """A market, a plugged car, and an agent with both doors open."""
    node()
    with Stage(tmp_path_factory.mktemp("javascript")) as stage:
        charger = stage.charger()
        agent = stage.agent(charger).started()
        yield stage, charger, agent


def buy(stage, charger, name, energy_wh, **more):
    """Let it buy: (its exit code, what it printed, its story)."""
    settings = {
        "rpc": stage.net.url_http,
        "contract": hex0x(stage.market.address),
        "keyFile": str(stage.consumer.key_file),
        "ownMeterFile": str(charger.truth_file),
        "order": {
            "energyWh": energy_wh,
            "startRate": str(RATE_WEI_PER_KWH),
            "biddingSeconds": BIDDING_S,
            "tokenValiditySeconds": 600,
        },
    }
    file = stage.folder / f"{name}.json"
    file.write_text(json.dumps(settings | more))
    words = (node(), ROOT / "tests/e2e/consumer.mjs", file)
    with Program(words, stage.folder, f"consumer-{name}", split=True) as consumer:
        eventually(lambda: stage.auction().is_live or not consumer.is_running, ASK_S, "the auction is open")
        bid(stage)
        stage.pass_time(BIDDING_S)
        code = consumer.ended(200)
        return code, consumer.said, consumer.complained


def bid(stage):
    """The owner bids, as it is typed."""
    options = ["--rpc", stage.net.url_ws, "--contract", hex0x(stage.market.address)]
    options += ["--consumer", hex0x(stage.consumer.address), "--rate", str(RATE_BID)]
    words = (
        sys.executable,
        "-m",
        "agent",
        "provider",
        "bid",
        "--key",
        stage.provider.owner.key_file,
        *options,
    )
    with Program(words, stage.folder, "bid") as typed:
        assert typed.ended(ASK_S) == 0, typed.said


def judged(stage, bought, name):
    """What it said, held against the chain."""
    code, said, story = bought
    assert code == 0, story + said
    told = json.loads(said)
    assert told["isRight"]
    (ended, tx_hash) = stage.logs(contract.ConnectionEnded)[-1]
    assert (ended.delivered_wh, ended.fee_wei) == (told["settledWh"], int(told["costWei"]))
    assert ended.fee_wei == cost_wei_floor(RATE_BID, told["settledWh"])
    assert hex0x(tx_hash) == told["settlementTx"]
    assert told["settledWh"] == told["signedWh"] == told["ackedWh"]
    final = decode(json.dumps(told["final"]).encode())
    assert (final.stage, final.settled_wh) == ("SETTLED", told["settledWh"])
    assert final.settlement_tx == tx_hash
    assert final.ocmf_begin.startswith("OCMF|")
    note(f"JavaScript over {name}: {told['settledWh']} Wh, {told['costWei']} wei, doubts {told['doubts']}")
    return told


async def pasted(stage):
    """A Hello by a stranger, in the provider's name, retained where consumers look: a code pasted over the real one."""
    provider, stranger = stage.provider.owner.address, ephemeral_signer(b"stranger")
    typed = ProviderHello(provider, charger_id("roof"), bytes(32), 2**40)
    hello = Hello(
        provider,
        typed.charger_id,
        typed.nonce,
        typed.expires_at_s,
        stranger.sign_digest(digest(stage.domain, typed)),
    )
    topic = f"v2v/1/{hex0x(provider)}/hello/{hex0x(typed.charger_id)}"
    async with aiomqtt.Client("127.0.0.1", stage.broker_port) as client:
        await client.publish(topic, encode(hello), qos=1, retain=True)


def test_it_buys_over_mqtt_and_past_a_pasted_code(evening):
    """Would catch a protocol page that is not enough, or true only for our own consumer; and a check that it forgets."""
    stage, charger, _ = evening
    stage.do(pasted(stage))
    bought = buy(stage, charger, "mqtt", ORDER_WH, broker=f"mqtt://127.0.0.1:{stage.broker_port}")
    told = judged(stage, bought, "mqtt")
    assert set(told["doubts"]) == {"hello"}
    assert told["settledWh"] == ORDER_WH
    assert ORDER_WH * 1000 <= charger.truth["delivered_mwh"] < (ORDER_WH + 1) * 1000
    assert told["final"]["stopReason"] == "EnergyLimitReached"


def test_it_buys_over_http_by_personal_sign_and_stops_early(evening):
    """Would catch a second door that speaks differently, a scheme without a session key that works on paper only, and a
    signed stop that only our own consumer can make.
    """
    stage, charger, _ = evening
    before_mwh = charger.truth["delivered_mwh"]
    bought = buy(
        stage, charger, "http", LONG_ORDER_WH, http=stage.door_url, scheme="eip191", stopAtWh=STOP_WH
    )
    told = judged(stage, bought, "http")
    assert STOP_WH <= told["settledWh"] < LONG_ORDER_WH
    eventually(charger.is_at_zero, 20, "the contactor is open")
    flowed_mwh = charger.truth["delivered_mwh"] - before_mwh
    assert told["settledWh"] * 1000 <= flowed_mwh < (told["settledWh"] + 2) * 1000
    assert told["final"]["stopReason"] == "Remote"


def test_it_concedes_on_chain_and_the_provider_answers(evening):
    """Would catch an end on chain that only our own consumer can open, or that pays another amount than was signed."""
    stage, charger, _ = evening
    broker = f"mqtt://127.0.0.1:{stage.broker_port}"
    bought = buy(stage, charger, "concede", LONG_ORDER_WH, broker=broker, stopAtWh=STOP_WH, concede=True)
    told = judged(stage, bought, "mqtt, conceded on chain")
    closing, _ = stage.logs(contract.ConnectionClosing)[-1]
    assert STOP_WH <= closing.claimed_wh <= told["settledWh"] < LONG_ORDER_WH
    assert told["final"]["stopReason"] == "Remote"
