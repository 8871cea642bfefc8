"""A market in seconds: registered cars, named operators, private key files, and settings the agent accepts."""

import stat
from pathlib import Path

from agent.chain import contract
from agent.chain.node import Web3Node
from agent.config import load_agent
from agent.demo import market as setup
from agent.demo.devnet import Devnet


async def test_the_market_is_open_and_the_settings_are_accepted(tmp_path: Path) -> None:
    """Would catch an evening that starts with a car nobody registered, a key the world can read, or settings with a typo."""
    async with Devnet(accounts=setup.labels(("alice",), "carol")) as net, Web3Node(net.url_ws) as node:
        organisation, consumer = (setup.party(net, tmp_path, label) for label in ("organisation", "carol"))
        alice = setup.provider(net, tmp_path, "alice")
        market = await setup.opened(node, net.chain_id, organisation, (alice,), consumer)
        for ev in (alice.owner.address, consumer.address):
            registered = await node.call(market.address, contract.encode_is_ev(ev))
            assert contract.decode_is_ev(registered)
        operator = await node.call(market.address, contract.encode_operator_of(alice.owner.address))
        assert contract.decode_operator_of(operator).operator == alice.operator.address
        path = setup.agent_toml(
            tmp_path,
            alice,
            market,
            url_ws=net.url_ws,
            chain_id=net.chain_id,
            charger_wire="tcp://127.0.0.1:1502",
            mqtt_port=1883,
            http_port=8465,
        )
        config = load_agent(path, {})
    assert config.chain.contract == market.address
    assert config.mqtt is not None
    keys = [alice.owner.key_file, alice.operator.key_file, alice.meter_key_file, consumer.key_file]
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}
    assert alice.operator.address != alice.owner.address
