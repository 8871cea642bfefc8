"""One question, one answer: what HTTP and JSON can do to us, and what an answer must look like."""

from __future__ import annotations

import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rpc_servers import HASTY, liar
from tcp_proxy import TcpProxy

from agent.chain.rpc import (
    AnswerTooLarge,
    HttpWire,
    Limits,
    Malformed,
    RpcError,
    SlowAnswer,
    parse,
    rationed,
    read_data,
    read_quantity,
    result_of,
    shown,
)
from agent.demo.devnet import Devnet
from agent.errors import Misconfigured, Transient


async def ask(url: str, limits: Limits | None = None) -> object:
    """One request over a connection of its own."""
    wire = HttpWire(url, limits or Limits())
    try:
        return await wire.request("eth_chainId", [])
    finally:
        await wire.close()


async def test_an_answer_comes_back() -> None:
    """Would catch a wire that cannot speak to a node at all."""
    async with Devnet() as net:
        assert await ask(net.url_http) == "0x539"


async def test_the_nodes_own_no_keeps_its_code_and_data() -> None:
    """Would catch an error that is flattened to words: the callers tell errors apart by code and data."""
    async with liar(
        {"error": {"code": 3, "message": "execution reverted", "data": "0x01"}}, status=400
    ) as url:
        with pytest.raises(RpcError) as no:
            await ask(url)
    assert (no.value.code, no.value.message, no.value.data) == (3, "execution reverted", "0x01")


async def test_an_endless_answer_is_cut_off() -> None:
    """Would catch memory that a hostile node can fill."""
    async with liar({"result": "0x" + "00" * 100_000}) as url:
        with pytest.raises(Transient, match="more than 50000 bytes"):
            await ask(url, Limits(answer_bytes=50_000))


@pytest.mark.parametrize(
    ("status", "words"), [(429, "HTTP 429"), (401, "does not let us in"), (502, "no JSON")]
)
async def test_http_refusals_say_what_to_do(status: int, words: str) -> None:
    """Would catch a rationing or locked-out provider that looks like a dead network."""
    async with liar("busy", status=status) as url:
        with pytest.raises(Transient, match=words) as problem:
            await ask(url)
    assert problem.value.remedy


async def test_a_link_that_is_half_open_costs_only_the_time_out() -> None:
    """Would catch a request without a time-out."""
    async with Devnet() as net, TcpProxy(net.port) as proxy:
        proxy.freeze()
        began = time.monotonic()
        with pytest.raises(Transient, match="did not answer"):
            await ask(f"http://127.0.0.1:{proxy.port}", HASTY)
        assert time.monotonic() - began < 5


async def test_an_unreachable_node_is_named_without_its_secrets(unused_tcp_port: int) -> None:
    """Would catch an API key or a password in a log."""
    with pytest.raises(
        Transient, match=f"node at http://127.0.0.1:{unused_tcp_port} cannot be reached"
    ) as problem:
        await ask(f"http://user:pass@127.0.0.1:{unused_tcp_port}/v3/apikey?token=secret")
    assert "v2v devnet" in problem.value.remedy
    assert not any(secret in str(problem.value) for secret in ("user", "pass", "apikey", "secret"))


@pytest.mark.parametrize("url", ["ftp://127.0.0.1", "127.0.0.1:8545", "http://", ""])
def test_an_address_of_another_kind_is_a_mistake_of_the_configuration(url: str) -> None:
    """Would catch a typo in the address that is retried for ever."""
    with pytest.raises(Misconfigured, match="no address"):
        HttpWire(url, Limits())


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("wss://user:pass@node.example/v3/key?k=1", "wss://node.example"),
        ("http://[::1]:8545/x", "http://::1:8545"),
        ("nonsense", "://?"),
    ],
)
def test_only_scheme_host_and_port_are_shown(url: str, expected: str) -> None:
    """Would catch a secret in any part of an address."""
    assert shown(url) == expected


@pytest.mark.parametrize(("status", "kind"), [(504, SlowAnswer), (408, SlowAnswer), (413, AnswerTooLarge)])
async def test_a_gateways_no_means_what_the_nodes_would(status: int, kind: type[Transient]) -> None:
    """Would catch a range that is not made smaller because a proxy, not the node, said that it was too much."""
    async with liar("<html>", status=status) as url:
        wire = HttpWire(url, HASTY)
        with pytest.raises(kind):
            await wire.request("eth_getLogs", [])
        await wire.close()


@pytest.mark.parametrize(
    ("after", "seconds"), [("7", 7), (None, 0), ("-1", 0), ("soon", 0), ("9" * 30, 0), ("Wed, 21 Oct", 0)]
)
def test_patience_is_asked_for_in_seconds(after: str | None, seconds: int) -> None:
    """Would catch a header of a stranger that makes us wait for ever, or not at all."""
    assert rationed("http://node", "HTTP 429", after).after_s == seconds


@pytest.mark.parametrize("answer", [7, None, [], {}, {"id": 1}])
def test_an_answer_without_result_or_error_is_nonsense(answer: object) -> None:
    """Would catch a missing result that is read as None, which means "there is no such block"."""
    with pytest.raises(Transient, match="nonsense"):
        result_of(answer, "http://node")


def test_brackets_do_not_kill_the_process() -> None:
    """Would catch a stack overflow: under the limit that py_ecc sets, this would end the process, not the test."""
    before = sys.getrecursionlimit()
    for text in ("[" * 300_000, '{"a":' * 300_000):
        with pytest.raises(ValueError, match="deep"):
            parse(text)
    assert sys.getrecursionlimit() == before


@given(st.integers(0, 2**256 - 1))
def test_quantities_are_read_back(number: int) -> None:
    """Would catch a number that is misread."""
    assert read_quantity(hex(number)) == number


@given(st.binary(max_size=64))
def test_data_is_read_back(raw: bytes) -> None:
    """Would catch bytes that are misread."""
    assert read_data("0x" + raw.hex(), len(raw)) == raw


@pytest.mark.parametrize(
    "value", [1, None, True, "", "0x", "1", "-0x1", "0x-1", "0x1_0", " 0x1", "0x1\n", "0x" + "f" * 65]
)
def test_what_is_no_quantity_is_refused(value: object) -> None:
    """Would catch Python's generous int(): underscores, signs and spaces are no JSON-RPC."""
    with pytest.raises(Malformed):
        read_quantity(value)


@pytest.mark.parametrize("value", [1, None, "", "00", "0x0", "0xzz", "0x00 ", "0x0000\n", b"0x00"])
def test_what_is_no_data_is_refused(value: object) -> None:
    """Would catch half bytes and bytes.fromhex's tolerance for spaces."""
    with pytest.raises(Malformed):
        read_data(value)


def test_data_of_another_length_is_refused() -> None:
    """Would catch an address of 32 bytes, or a hash of 20."""
    with pytest.raises(Malformed, match="20 bytes where 32 belong"):
        read_data("0x" + "00" * 20, 32)
