"""A whole market in seconds, on the embedded chain: contract, members, operators, keys on disk and the agents' settings.

Rules: throw-away keys only, derived from the devnet's seed; every file goes below one directory that the caller owns (0700).
The windows are short (5 s bidding) so that an evening fits a minute; everything else is as in the field.
May not know: how the evening goes, screens.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from agent.chain import contract
from agent.chain.node import Node, Receipt
from agent.chain.sender import Sender, SignedTx
from agent.core.units import Address, hex0x
from agent.demo.devnet import Devnet, derive_key
from agent.errors import Refused
from agent.keys import Signer, load_signer

MINED_TIMEOUT_S = 30.0  # devnet blocks come every second; more means the machine is stuck
OPERATOR_WEI = 10**18  # gas money for the key in the car
SHORT_MARKET = contract.MarketParameters(
    bidding_s_min=1,
    soft_close_s=1,
    connect_window_s=120,
    token_validity_s_min=30,
    challenge_s=60,
    grace_s=300,
)


@dataclass(frozen=True, slots=True)
class Party:
    """Somebody with a key on disk."""

    label: str
    key_file: Path
    signer: Signer

    @property
    def address(self) -> Address:
        """Its account."""
        return self.signer.address


@dataclass(frozen=True, slots=True)
class Provider:
    """A car that sells: the owner's account, the operator key in the car, the meter key."""

    owner: Party
    operator: Party
    meter_key_file: Path


@dataclass(frozen=True, slots=True)
class Step:
    """One transaction of setting up: who called which function of the contract."""

    who: str
    function: str
    receipt: Receipt


@dataclass(frozen=True, slots=True)
class Market:
    """What setting up gave."""

    address: Address
    block_number: int
    steps: tuple[Step, ...]


def party(net: Devnet, directory: Path, label: str) -> Party:
    """A funded devnet account with its key in a file of mode 0600."""
    key_file = written(directory / "keys" / f"{label}.key", hex0x(net.key(label)) + "\n", mode=0o600)
    return Party(label, key_file, load_signer(str(key_file)))


def provider(net: Devnet, directory: Path, label: str) -> Provider:
    """A provider: owner `label`, operator `label-operator`, and a meter key that no account uses."""
    meter_key = derive_key(net.seed, f"{label}-meter")
    meter = written(directory / "keys" / f"{label}-meter.key", hex0x(meter_key) + "\n", mode=0o600)
    return Provider(party(net, directory, label), party(net, directory, f"{label}-operator"), meter)


def labels(provider_labels: tuple[str, ...], consumer_label: str) -> tuple[str, ...]:
    """Every devnet account this market needs."""
    operators = tuple(f"{label}-operator" for label in provider_labels)
    return ("organisation", consumer_label, *provider_labels, *operators)


def written(path: Path, text: str, *, mode: int = 0o600) -> Path:
    """A small file, private from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    path.touch(mode=mode)
    path.write_text(text, encoding="utf-8")
    return path


async def opened(
    node: Node, chain_id: int, organisation: Party, providers: tuple[Provider, ...], consumer: Party
) -> Market:
    """Deploy, add the EVs, name the operators: two blocks, because what does not depend on each other shares one."""
    sender = Sender(node, organisation.signer, chain_id, revert_name=contract.revert_name)
    deployed = await sender.send_and_wait(None, contract.encode_deploy(SHORT_MARKET))
    if deployed.contract is None:
        raise Refused("not_deployed", "the chain made no contract")
    address = Address(deployed.contract)
    members = [consumer.address, *(one.owner.address for one in providers)]
    calls = [contract.encode_add_ev(ev, bytes(32)) for ev in members]
    added, *named = await asyncio.gather(
        _together(sender, node, address, calls),
        *(_operator_named(node, chain_id, address, one) for one in providers),
    )
    steps = [
        Step(organisation.label, "deploy", deployed),
        *(Step(organisation.label, "addEV", one) for one in added),
    ]
    steps += [
        Step(one.owner.label, "setOperator", receipt)
        for one, (receipt,) in zip(providers, named, strict=True)
    ]
    return Market(address, deployed.block_number, tuple(steps))


async def _operator_named(node: Node, chain_id: int, market: Address, one: Provider) -> list[Receipt]:
    owner = Sender(node, one.owner.signer, chain_id, revert_name=contract.revert_name)
    return await _together(
        owner, node, market, [contract.encode_set_operator(one.operator.address, OPERATOR_WEI)]
    )


async def _together(sender: Sender, node: Node, to: Address, calls: list[bytes]) -> list[Receipt]:
    """Send all, then wait for all: consecutive nonces, one block."""
    nonce = await node.nonce(sender.address, pending=True)
    signed: list[SignedTx] = [
        await sender.prepare(to, data, nonce=nonce + offset) for offset, data in enumerate(calls)
    ]
    for one in signed:
        await sender.broadcast(one.raw_tx)
    receipts = [await sender.wait_mined(one.tx_hash, MINED_TIMEOUT_S) for one in signed]
    for one, receipt in zip(signed, receipts, strict=True):
        if not receipt.succeeded:
            raise await sender.why_failed(one, receipt)
    return receipts


def agent_toml(
    directory: Path,
    one: Provider,
    market: Market,
    *,
    url_ws: str,
    chain_id: int,
    charger_wire: str,
    mqtt_port: int | None,
    http_port: int,
) -> Path:
    """The settings of one provider's agent, as `v2v provider run --config` reads them."""
    label = one.owner.label
    mqtt = "" if mqtt_port is None else f'\n[mqtt]\nurl = "mqtt://127.0.0.1:{mqtt_port}"\n'
    text = f"""\
[chain]
urls = ["{url_ws}"]
chain_id = {chain_id}
contract = "{hex0x(market.address)}"
provider = "{hex0x(one.owner.address)}"
confirmations = 3
finality = 4
start_block = {market.block_number}

[keys]
operator = "{one.operator.key_file}"
meter = "{one.meter_key_file}"

[[ports]]
name = "left"
map = "simulated"
wire = "{charger_wire}"
current_ma_max = 32000
phase_count = 3
failsafe_timeout_s = 5
ev_lag_ms = 700
ev_ramp_ma_per_s = 30000
poll_interval_ms = 100

[policy]
validity_margin_s = 10
battery_reserve_permille = 200
{mqtt}
[http]
listen = "127.0.0.1:{http_port}"

[journal]
path = "{directory / label / "journal.sqlite"}"

[log]
format = "json"
"""
    return written(directory / label / "agent.toml", text)
