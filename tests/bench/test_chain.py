"""The bench itself: what it times is what it says, and a catch-up that missed a session is no figure."""

import pytest

from agent.chain import contract
from agent.chain.node import Web3Node
from agent.core.units import Address
from bench import chain
from bench._fake_node import DOMAIN, FakeNode, Opened


async def test_the_fake_nodes_logs_are_the_contracts() -> None:
    """Would catch a bench of logs that our decoder refuses, so that nothing is ever believed."""
    session = Opened(Address(b"\x01" * 20), chain.EVP, 1_700_000_000)
    with FakeNode(blocks=50) as node:
        node.holds(session, 20)
        async with Web3Node(node.url_ws) as asked:
            (log,) = await asked.logs(DOMAIN.contract, contract.provider_topics(chain.EVP), 0, 49)
            state = await asked.call(DOMAIN.contract, contract.encode_sessions(session.token))
    opened = contract.decode_log(log.address, log.topics, log.data)
    assert isinstance(opened, contract.SessionOpened)
    assert (opened.token, opened.session_id, opened.consumer) == (
        session.token,
        session.session_id,
        session.consumer,
    )
    assert opened.valid_until_s == session.valid_until_s
    assert contract.decode_sessions(state).is_open


def test_a_small_catch_up_finds_every_session(monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a catch-up that is quick because it leaves something out."""
    monkeypatch.setattr(chain, "FOREIGN", 200)
    found = chain._caught_up(5_000, 500)
    assert found["seconds"] > 0
    assert 20 <= found["calls"] < 400
