"""The fast node of the bench: what it serves is what a real one would, as far as anybody looks."""

import pytest

from agent.chain import contract
from agent.chain.node import Header, RawLog, Web3Node
from agent.core.units import Address
from agent.errors import Transient
from bench._fake_node import DOMAIN, FakeNode, Opened

EVP, OTHER = Address(b"\xa1" * 20), Address(b"\xb1" * 20)


def session_with(provider: Address, number: int = 1) -> Opened:
    """A session of its own consumer."""
    return Opened(Address(number.to_bytes(20, "big")), provider, 1_700_000_000)


async def test_its_logs_and_states_are_the_contracts() -> None:
    """Would catch a bench of logs that our decoder refuses, so that nothing is ever believed."""
    session = session_with(EVP)
    with FakeNode(blocks=50) as node:
        node.holds(session, 20)
        node.holds(session_with(OTHER, 2), 21)
        async with Web3Node(node.url_ws) as asked:
            (log,) = await asked.logs(DOMAIN.contract, contract.provider_topics(EVP), 0, 49)
            state = await asked.call(DOMAIN.contract, contract.encode_sessions(session.token))
            block = await asked.header(log.block_number)
    opened = contract.decode_log(log.address, log.topics, log.data)
    assert isinstance(opened, contract.SessionOpened)
    assert (opened.token, opened.session_id) == (session.token, session.session_id)
    assert (opened.consumer, opened.valid_until_s) == (session.consumer, session.valid_until_s)
    assert contract.decode_sessions(state).is_open
    assert block is not None
    assert block.block_hash == log.block_hash


async def test_its_blocks_are_linked_and_its_limits_are_kept() -> None:
    """Would catch a chain that looks like one long reorganisation, and a limit that nobody meets."""
    with FakeNode(blocks=50, range_blocks=10) as node:
        async with Web3Node(node.url_http) as asked:
            head, before = await asked.head(), await asked.header(48)
            assert before is not None
            assert (head.number, head.parent_hash) == (49, before.block_hash)
            pages = [
                page async for page in asked.log_pages(DOMAIN.contract, contract.provider_topics(EVP), 0, 49)
            ]
            assert max(page.to_block - page.from_block for page in pages) < 10
            with pytest.raises(Transient):
                await asked._logs(DOMAIN.contract, [None] * 4, {"fromBlock": "0x0", "toBlock": "0x31"})


async def test_it_tells_each_subscriber_what_it_asked_for() -> None:
    """Would catch a floor that is measured on somebody else's logs."""
    with FakeNode(blocks=50) as node:
        async with (
            Web3Node(node.url_ws) as asked,
            asked.watch(DOMAIN.contract, contract.provider_topics(EVP)) as hints,
        ):
            node.opens(session_with(OTHER))
            node.opens(session_with(EVP, 2))
            heard = [await anext(hints) for _ in range(3)]
            node.ends(session_with(EVP, 2))
            heard += [await anext(hints) for _ in range(2)]
    assert [type(hint) for hint in heard].count(Header) == 3
    assert [hint.block_number for hint in heard if isinstance(hint, RawLog)] == [51, 52]
