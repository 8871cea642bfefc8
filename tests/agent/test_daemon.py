"""The composition root: what it refuses, in which order it starts and stops. Whole evenings are tests/e2e's."""

import asyncio
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import structlog
from town import v2v

from agent import daemon
from agent.chain.node import Web3Node
from agent.config import AgentConfig, load_agent
from agent.demo import market as setup
from agent.demo.devnet import Devnet
from agent.errors import Misconfigured, Transient
from firmware_bridge.simulator import Simulator, SimulatorConfig
from firmware_bridge.simulator.rapi import RapiSimulator, RapiSimulatorConfig


def edited(path: Path, change: Callable[[str], str]) -> AgentConfig:
    """The settings with one thing changed."""
    path.write_text(change(path.read_text()))
    return load_agent(path, {})


async def stage(tmp_path: Path, net: Devnet, simulator: Simulator | RapiSimulator) -> Path:
    """A market and one provider's settings."""
    organisation, consumer = (setup.party(net, tmp_path, label) for label in ("organisation", "carol"))
    alice = setup.provider(net, tmp_path, "alice")
    async with Web3Node(net.url_ws) as node:
        market = await setup.opened(node, net.chain_id, organisation, (alice,), consumer)
    return setup.agent_toml(
        tmp_path,
        alice,
        market,
        url_ws=net.url_ws,
        chain_id=net.chain_id,
        charger_wire=simulator.wire,
        mqtt_port=None,
        http_port=0,
    )


REFUSALS: dict[str, tuple[Callable[[str], str], type[Exception], str]] = {
    "wrong chain": (
        lambda text: text.replace("chain_id = 1337", "chain_id = 1"),
        Misconfigured,
        "chain 1337",
    ),
    "no contract": (
        lambda text: text.replace('contract = "0x', 'contract = "0x' + "11" * 20 + '" #'),
        Misconfigured,
        "no contract",
    ),
    "one key for both": (
        lambda text: text.replace("alice-meter.key", "alice-operator.key"),
        Misconfigured,
        "the same",
    ),
    "not our operator": (
        lambda text: text.replace("alice-operator.key", "carol.key"),
        Misconfigured,
        "set-operator",
    ),
    "charger away": (
        lambda text: text.replace('wire = "tcp://', 'wire = "tcp://127.0.0.1:1" #'),
        Transient,
        "does not answer",
    ),
    "unknown map": (
        lambda text: text.replace('map = "simulated"', 'map = "simulatd"'),
        Misconfigured,
        "simulated",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_what_cannot_work_is_named_before_anything_is_energised(tmp_path: Path, name: str) -> None:
    """Would catch a daemon that starts into a situation where it could deliver and never be paid."""
    change, family, words = REFUSALS[name]
    async with (
        Devnet(accounts=setup.labels(("alice",), "carol")) as net,
        Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator,
    ):
        config = edited(await stage(tmp_path, net, simulator), change)
        with pytest.raises(family, match=words):
            async with asyncio.timeout(30):
                await daemon.run(config, {})
        assert simulator.truth().delivered_mwh == 0


async def test_a_charger_that_nobody_has_tried_is_not_sold_from(tmp_path: Path) -> None:
    """Would catch a first sale from a map that is not confirmed, with nobody having tried its failsafe (BRIDGE rule 9)."""
    link = str(tmp_path / "ttyOpenEVSE")
    async with (
        Devnet(accounts=setup.labels(("alice",), "carol")) as net,
        RapiSimulator(RapiSimulatorConfig(link)) as box,
    ):
        config = edited(
            await stage(tmp_path, net, box),
            lambda text: text.replace('"simulated"', '"openevse_rapi"\nexternal_cut_off = "K1"'),
        )
        with pytest.raises(Misconfigured, match="no commissioning report") as refused:
            async with asyncio.timeout(30):
                await daemon.run(config, {})
        assert "v2v charger commission" in refused.value.remedy
        assert not box.truth().enabled  # it charges by itself until it is held


async def test_a_stop_ends_every_runner_and_leaves_the_charger_held(tmp_path: Path) -> None:
    """Would catch a shutdown that hangs on one runner, and a charger that is still offered power afterwards."""
    async with (
        Devnet(accounts=setup.labels(("alice",), "carol")) as net,
        Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator,
    ):
        config = load_agent(await stage(tmp_path, net, simulator), {})
        task = asyncio.create_task(daemon.run(config, {}))
        async with asyncio.timeout(30):
            while not simulator.truth().failsafe_armed:
                await asyncio.wait({task}, timeout=0.05)
                assert not task.done(), task.exception()
            task.cancel()
            await asyncio.wait({task})
        assert simulator.truth().offered_ma == 0
        names = {other.get_name() for other in asyncio.all_tasks()}
        assert not names & {"ChainWatch", "ChainSend", "ChargerRunner", "HttpRunner", "engine"}


async def test_a_market_that_leaves_no_time_to_answer_a_close_is_not_sold_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Would catch a car that delivers where its consumer can concede 0 Wh and be settled in the same block."""
    monkeypatch.setattr(setup, "SHORT_MARKET", replace(setup.SHORT_MARKET, challenge_s=0))
    async with (
        Devnet(accounts=setup.labels(("alice",), "carol")) as net,
        Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator,
    ):
        config = load_agent(await stage(tmp_path, net, simulator), {})
        with pytest.raises(Misconfigured, match="no time to answer"):
            async with asyncio.timeout(30):
                await daemon.run(config, {})


async def test_the_owners_own_key_in_the_car_works_and_is_warned_of(tmp_path: Path) -> None:
    """Would catch a car of the paper, with its provider's own key, that does not start; and one that starts without a word."""
    async with (
        Devnet(accounts=setup.labels(("alice",), "carol")) as net,
        Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator,
    ):
        file = await stage(tmp_path, net, simulator)
        config = edited(file, lambda text: text.replace("alice-operator.key", "alice.key"))
        with structlog.testing.capture_logs() as logs:
            task = asyncio.create_task(daemon.run(config, {}))
            async with asyncio.timeout(30):
                while not simulator.truth().failsafe_armed:
                    await asyncio.wait({task}, timeout=0.05)
                    assert not task.done(), task.exception()
                task.cancel()
                await asyncio.wait({task})
        warned = [entry for entry in logs if entry["event"] == "key.owner_in_car"]
        assert [entry["log_level"] for entry in warned] == ["warning"]


async def test_a_mistake_is_shown_before_a_glitch() -> None:
    """Would catch "the node is away" printed for a wrong contract, because both happened."""
    group = BaseExceptionGroup("x", [Transient("away"), BaseExceptionGroup("y", [Misconfigured("wrong")])])
    assert str(daemon._first_of(group)) == "wrong"


async def test_a_task_that_swallows_one_cancellation_is_told_again() -> None:
    """Would catch a daemon that hangs at stop because a library swallowed the cancellation (asyncio.wait_for, Python 3.11)."""

    async def deaf() -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await asyncio.Event().wait()

    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    async with asyncio.timeout(30):
        await daemon._cancelled([task])
    assert task.done()


async def test_the_owners_stop_is_heard_by_a_running_agent_and_does_not_end_it(tmp_path: Path) -> None:
    """Would catch `v2v provider stop` killing the daemon (SIGUSR1's default) in the middle of a session it must settle."""
    async with (
        Devnet(accounts=setup.labels(("alice",), "carol")) as net,
        Simulator(SimulatorConfig(tcp="127.0.0.1:0")) as simulator,
    ):
        file = await stage(tmp_path, net, simulator)
        config = load_agent(file, {})
        task = asyncio.create_task(daemon.run(config, {}))
        async with asyncio.timeout(30):
            while not simulator.truth().failsafe_armed:
                await asyncio.wait({task}, timeout=0.05)
                assert not task.done(), task.exception()
            with structlog.testing.capture_logs() as logs:
                said = await asyncio.to_thread(v2v, "provider", "stop", "--config", str(file), "--json")
                assert said.json["pid"] == os.getpid()
                while not any(entry["event"] == "owner.stopped" for entry in logs):
                    await asyncio.wait({task}, timeout=0.05)
                    assert not task.done(), task.exception()
            said = await asyncio.to_thread(v2v, "provider", "unlock", "left", "--config", str(file))
            assert (said.exit_code, "running" in said.err) == (3, True)
            task.cancel()
            await asyncio.wait({task})
        said = await asyncio.to_thread(v2v, "provider", "stop", "--config", str(file))
        assert (said.exit_code, "not_running" in said.err) == (3, True)
