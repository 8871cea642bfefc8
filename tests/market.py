"""A market on an in-process chain (eth-tester's py-evm), for stories about the real bytecode: actors, time, money.

`market.send(...)` mines one transaction one second later and returns what it did, or raises `Reverted` with the
contract's own name for the reason. Time moves only forward, by `market.pass_time`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import coincurve
from eth.exceptions import Revert
from eth.vm.forks.prague import PragueVM
from eth.vm.spoof import SpoofTransaction
from eth_tester import PyEVMBackend

from agent.chain import contract
from agent.core import token
from agent.core.token import Ack, Domain, PresentToken, Receipt
from agent.core.units import Address, Token, cost_wei_ceil
from contracts import Artefact, load_artefact

GAS = 5_000_000
GAS_PRICE_WEI = 10**9
NOBODY = b"\xee" * 20  # asks views; has no nonce and no coins
DEFAULTS = contract.MarketParameters()


class Reverted(Exception):
    """The contract said no; `name` is the error's name without its arguments, the text has both."""

    def __init__(self, data: bytes) -> None:
        self.words = contract.revert_name(data)
        super().__init__(self.words)
        self.name = self.words.partition("(")[0]


@dataclass(frozen=True)
class Actor:
    """An account with its key."""

    key: coincurve.PrivateKey

    @property
    def address(self) -> Address:
        """20 bytes."""
        return token.address_of(self.key.public_key.format(compressed=False))

    def sign(self, digest: bytes) -> bytes:
        """A canonical signature: 65 bytes, v 27/28, low s."""
        signature = self.key.sign_recoverable(digest, hasher=None)
        return signature[:64] + bytes([27 + signature[64]])


@dataclass(frozen=True)
class Done:
    """What a mined transaction did."""

    output: bytes
    gas_used: int
    logs: tuple[contract.Log, ...]

    def log(self, kind: type) -> Any:
        """The one log of this kind."""
        (found,) = [log for log in self.logs if isinstance(log, kind)]
        return found


class Chain:
    """One account-keeping chain; deploys bytecode, sends, asks."""

    def __init__(self, vm: type = PragueVM) -> None:
        self.backend = PyEVMBackend(vm_configuration=((0, vm),))
        self.actors = [Actor(coincurve.PrivateKey(key.to_bytes())) for key in self.backend.account_keys]
        self.now_s = self.backend.chain.get_block().header.timestamp

    @property
    def chain_id(self) -> int:
        """What signatures are bound to."""
        return self.backend.chain.chain_id

    def pass_time(self, seconds: int) -> None:
        """The next block comes this much later (at least one second later in any case)."""
        self.now_s += seconds

    def transact(self, sender: Actor, to: bytes, data: bytes, value_wei: int = 0) -> tuple[Any, Any]:
        """Mine one transaction in its own block, one second after the last; (receipt, computation)."""
        chain = self.backend.chain
        self.now_s += 1
        chain.header = chain.header.copy(timestamp=self.now_s)
        unsigned = chain.create_unsigned_transaction(
            nonce=chain.get_vm().state.get_nonce(sender.address),
            gas_price=GAS_PRICE_WEI,
            gas=GAS,
            to=to,
            value=value_wei,
            data=data,
        )
        key = next(k for k in self.backend.account_keys if k.to_bytes() == sender.key.secret)
        _, receipt, computation = chain.apply_transaction(
            unsigned.as_signed_transaction(key, chain_id=self.chain_id)
        )
        self.backend.mine_blocks()
        return receipt, computation

    def deploy(self, sender: Actor, init_code: bytes) -> Address:
        """The new contract's address. Raises Reverted."""
        _, computation = self.transact(sender, b"", init_code)
        if computation.is_error:
            raise Reverted(_revert_data(computation))
        return Address(computation.msg.storage_address)

    def ask(self, to: bytes, data: bytes, gas: int = 10_000_000) -> bytes:
        """A view, against the newest block. Raises Reverted."""
        chain = self.backend.chain
        unsigned = chain.create_unsigned_transaction(nonce=0, gas_price=0, gas=gas, to=to, value=0, data=data)
        spoofed = SpoofTransaction(unsigned, from_=NOBODY, gas_price=0)
        try:
            return bytes(chain.get_transaction_result(spoofed, chain.get_canonical_head()))
        except Revert as error:
            raise Reverted(bytes(error.args[0])) from error

    def balance_wei(self, address: bytes) -> int:
        """Coins outside the contract."""
        return int(self.backend.get_balance(address))

    def snapshot(self) -> tuple[bytes, int]:
        """A place to come back to."""
        return self.backend.take_snapshot(), self.now_s

    def restore(self, snapshot: tuple[bytes, int]) -> None:
        """Back to the snapshot's block; what came after is forgotten, as a reorg does."""
        block, self.now_s = snapshot
        self.backend.revert_to_snapshot(block)


def _revert_data(computation: Any) -> bytes:
    error = computation.error
    return bytes(error.args[0]) if isinstance(error, Revert) and error.args else b""


class Market(Chain):
    """A deployed V2VCharging: the organisation, one consumer, two providers (all registered), a stranger."""

    def __init__(
        self,
        parameters: contract.MarketParameters = DEFAULTS,
        vm: type = PragueVM,
        artefact: Artefact | None = None,
    ) -> None:
        super().__init__(vm)
        self.organisation, self.consumer, self.provider, self.rival, self.stranger, self.hot_key = (
            self.actors[:6]
        )
        self.parameters = parameters
        self.artefact = artefact or load_artefact()
        arguments = contract.encode_deploy(parameters)[len(load_artefact().bytecode) :]
        self.address = self.deploy(self.organisation, self.artefact.bytecode + arguments)
        self.domain = Domain(self.chain_id, self.address)
        for ev in (self.consumer, self.provider, self.rival):
            self.send(self.organisation, contract.encode_add_ev(ev.address, b"\x01" * 32))

    # ---- any call

    def send(self, sender: Actor, data: bytes, value_wei: int = 0) -> Done:
        """One call of the contract. Raises Reverted."""
        receipt, computation = self.transact(sender, self.address, data, value_wei)
        if computation.is_error:
            raise Reverted(_revert_data(computation))
        logs = tuple(
            contract.decode_log(log.address, [topic.to_bytes(32, "big") for topic in log.topics], log.data)
            for log in receipt.logs
        )
        assert None not in logs, "every log of the contract must decode"
        return Done(bytes(computation.output), receipt.gas_used, logs)

    def view(self, data: bytes) -> bytes:
        """A view of the market."""
        return self.ask(self.address, data)

    def views(self, questions: Sequence[bytes]) -> list[bytes]:
        """Many views of one moment: as `view`, but without a transaction around each, so several times faster."""
        vm = self.backend.chain.get_vm()
        code = vm.state.get_code(self.address)
        answers = []
        for data in questions:
            done = vm.execute_bytecode(
                origin=NOBODY,
                gas_price=0,
                gas=GAS,
                to=self.address,
                sender=NOBODY,
                value=0,
                data=data,
                code=code,
            )
            if done.is_error:
                raise Reverted(_revert_data(done))
            answers.append(bytes(done.output))
        return answers

    # ---- shorthand for stories

    def ledger_wei(self, actor: Actor) -> int:
        """The actor's balance inside the contract."""
        return contract.decode_balances(self.view(contract.encode_balances(actor.address)))

    def session(self, name: Token) -> contract.SessionState:
        """The session of a token."""
        return contract.decode_sessions(self.view(contract.encode_sessions(name)))

    def auction(self) -> contract.AuctionState:
        """The consumer's auction."""
        return contract.decode_auctions(self.view(contract.encode_auctions(self.consumer.address)))

    def start(
        self, energy_wh: int = 200, rate: int = 3 * 10**14, bidding_s: int = 60, validity_s: int = 3600
    ) -> Done:
        """An auction with exactly the deposit sent along."""
        data = contract.encode_start_auction(energy_wh, bidding_s, rate, validity_s, b"\x07" * 32)
        return self.send(self.consumer, data, cost_wei_ceil(rate, energy_wh))

    def bid(self, rate: int, provider: Actor | None = None) -> Done:
        """A bid with exactly the bond sent along."""
        auction = self.auction()
        data = contract.encode_place_bid(self.consumer.address, auction.auction_nonce, rate)
        return self.send(provider or self.provider, data, self.bond_wei(rate, auction.energy_wh))

    def bond_wei(self, rate: int, energy_wh: int) -> int:
        """What a bid locks."""
        return -(-cost_wei_ceil(rate, energy_wh) * self.parameters.bond_bps // 10_000)

    def close(self) -> None:
        """Let the bidding time pass."""
        self.pass_time(max(0, self.auction().closing_time_s - self.now_s))

    def connect(self, provider: Actor | None = None, energy_wh: int | None = None) -> Token:
        """The consumer connects to the winner."""
        winner = (provider or self.provider).address
        wanted = self.auction().energy_wh if energy_wh is None else energy_wh
        return (
            self.send(self.consumer, contract.encode_connect(winner, wanted))
            .log(contract.SessionOpened)
            .token
        )

    def open_session(self, energy_wh: int = 200, rate: int = 2 * 10**14) -> Token:
        """Auction, one bid, connect."""
        self.start(energy_wh)
        self.bid(rate)
        self.close()
        return self.connect()

    def receipt(self, name: Token, delivered_wh: int, signer: Actor | None = None) -> Ack:
        """The consumer's own receipt (or somebody else's attempt at one)."""
        state = self.session(name)
        session_id = token.session_id(
            self.chain_id, self.address, state.consumer, state.provider, state.auction_nonce
        )
        digest = token.digest(self.domain, Receipt(session_id, delivered_wh))
        return replace(token.NO_ACK, receipt_signature=(signer or self.consumer).sign(digest))

    def granted_receipt(
        self, name: Token, delivered_wh: int, key: Actor, energy_wh_max: int, **forged: Any
    ) -> Ack:
        """A session key's receipt with the consumer's grant; `forged` replaces fields after signing."""
        state = self.session(name)
        session_id = token.session_id(
            self.chain_id, self.address, state.consumer, state.provider, state.auction_nonce
        )
        grant = PresentToken(name, session_id, state.provider, key.address, energy_wh_max, 9, b"\x05" * 32)
        ack = Ack(
            token=name,
            session_key=key.address,
            max_energy_wh=energy_wh_max,
            valid_until_s=9,
            challenge=b"\x05" * 32,
            grant_signature=self.consumer.sign(token.digest(self.domain, grant)),
            receipt_signature=key.sign(token.digest(self.domain, Receipt(session_id, delivered_wh))),
        )
        return replace(ack, **forged)

    def held_wei(self, tokens: Sequence[Token] = ()) -> int:
        """What ledgers, the live auction and these sessions add up to; must equal what the contract holds."""
        ledgers = sum(self.ledger_wei(actor) for actor in self.actors)
        auction = self.auction()
        sessions = [self.session(name) for name in tokens]
        locked = auction.deposit_wei + auction.bond_wei + sum(s.deposit_wei + s.bond_wei for s in sessions)
        return ledgers + locked
