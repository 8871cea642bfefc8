"""A provider's real engine, journal and door at a charging port, and a consumer with a key in front of it.

For tests of what stands around the core: readers and carriers. The chain and the charger are played by hand, one call a fact.
"""

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path

import coincurve

from agent.core import events as ev
from agent.core import token as rules
from agent.core.live import Beat, HeaderSeen, Policy, PortRead, PortReading
from agent.core.messages import Hello, Present, ReceiptMessage, Stop, encode
from agent.core.token import Domain, access_token, session_id
from agent.core.units import BlockHash, TxHash
from agent.door import Door
from agent.engine import Engine
from agent.journal import Journal

DOMAIN = Domain(31337, bytes.fromhex("c0" * 20))
NOW_S = 1_800_000_000
PORT = "left"
RATE_WEI_PER_KWH = 10**17
SREF = "c0ffee" * 5 + "42"  # 16 random bytes, as hex


async def eventually(holds, seconds: float = 30.0) -> None:
    """Wait until a condition holds that nobody announces; TimeoutError when it does not."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.005)


class Key:
    """An account: deterministic, low-s signatures of 65 bytes."""

    def __init__(self, seed: str) -> None:
        self._key = coincurve.PrivateKey(rules.keccak(seed.encode()))
        self.public_key = self._key.public_key.format(compressed=False)
        self.address = rules.address_of(self.public_key)

    def sign_digest(self, digest32: bytes) -> bytes:
        """Sign 32 bytes."""
        signature = self._key.sign_recoverable(digest32, hasher=None)
        return signature[:64] + bytes([27 + signature[64]])


@dataclass
class Plug:
    """One charging port of one provider, and everything a test may do to it."""

    folder: Path
    provider: Key = field(default_factory=lambda: Key("provider"))
    consumer: Key = field(default_factory=lambda: Key("consumer"))
    monotonic_ms: object = lambda: time.monotonic_ns() // 1_000_000
    ports: tuple[str, ...] = (PORT,)
    block: int = 100

    def __post_init__(self) -> None:
        self.journal = Journal(self.folder / "journal.sqlite", DOMAIN, self.provider.address)
        self.engine = Engine(
            self.journal, Policy(max_unacked_wh=dict.fromkeys(self.ports, 50)), self.monotonic_ms
        )
        self.door = Door(self.engine, DOMAIN, self.provider.address, self.provider, self.ports, os.urandom)

    def close(self) -> None:
        """Give the journal back."""
        self.journal.close()

    # ---- the chain

    def header(self) -> None:
        """A new block, as old as the time that has passed."""
        self.block += 1
        since_ms = self.engine.live.now_ms - self.engine.live.started_at_ms
        self.engine.observe(
            HeaderSeen(self.block, BlockHash(rules.word(self.block)), NOW_S + since_ms // 1000)
        )

    def connect(self, *, nonce: int = 1, order_wh: int = 1000, believed: bool = True) -> ev.Terms:
        """`Connected`: seen, and believed unless told otherwise."""
        consumer, provider = self.consumer.address, self.provider.address
        terms = ev.Terms(
            session_id=session_id(DOMAIN.chain_id, DOMAIN.contract, consumer, provider, nonce),
            token=access_token(consumer, provider, NOW_S - nonce, NOW_S + 7200),
            consumer=consumer,
            provider=provider,
            auction_nonce=nonce,
            energy_wh_ordered=order_wh,
            rate_wei_per_kwh=RATE_WEI_PER_KWH,
            deposit_wei=RATE_WEI_PER_KWH * order_wh // 1000,
            bond_wei=RATE_WEI_PER_KWH * order_wh // 1000,
            issued_at_s=NOW_S - nonce,
            valid_until_s=NOW_S + 7200,
            block_number=90,
            block_hash=BlockHash(rules.word(90)),
            log_index=0,
            tx_hash=TxHash(rules.word(9000 + nonce)),
        )
        self.engine.accept(ev.ConnectedSeen(self.engine.at_s, terms))
        if believed:
            self.engine.accept(ev.ConnectedBelieved(self.engine.at_s, terms.session_id, terms.block_hash))
        return terms

    # ---- the charger

    def read(
        self, register_mwh: int = 5_000_000, *, power_w: int = 0, pilot_state: str = "B", **more
    ) -> None:
        """One poll: power flows with pilot C, else the contactor is seen open."""
        reading = PortReading(
            at_ms=self.monotonic_ms(),
            register_mwh=register_mwh,
            power_w=power_w,
            pilot_state=pilot_state,
            seen_open=pilot_state != "C",
            **more,
        )
        self.engine.observe(PortRead(PORT, reading, armed=True))

    # ---- the consumer

    def present(self, terms: ev.Terms, hello: Hello | None = None, *, key: Key | None = None) -> bytes:
        """PresentToken, signed by the consumer unless another key is given; no session key."""
        hello, key = hello or self.door.hello(PORT), key or self.consumer
        consumer_nonce = rules.keccak(b"consumer's nonce" + terms.session_id)
        typed = rules.PresentToken(
            terms.token,
            terms.session_id,
            self.provider.address,
            rules.ZERO_ADDRESS,
            0,
            terms.valid_until_s,
            rules.challenge(hello.typed, consumer_nonce),
        )
        return encode(
            Present(
                "eip712",
                terms.session_id,
                terms.token,
                hello.charger_id,
                hello.nonce,
                consumer_nonce,
                rules.ZERO_ADDRESS,
                0,
                terms.valid_until_s,
                key.public_key,
                key.sign_digest(rules.digest(DOMAIN, typed)),
            )
        )

    def receipt(self, terms: ev.Terms, delivered_wh: int) -> bytes:
        """Receipt, signed by the consumer."""
        signature = self.consumer.sign_digest(
            rules.digest(DOMAIN, rules.Receipt(terms.session_id, delivered_wh))
        )
        return encode(ReceiptMessage(terms.session_id, delivered_wh, signature))

    def stop(self, terms: ev.Terms) -> bytes:
        """StopRequest, signed by the consumer."""
        at_s = self.engine.at_s
        signature = self.consumer.sign_digest(rules.digest(DOMAIN, rules.StopRequest(terms.session_id, at_s)))
        return encode(Stop(terms.session_id, at_s, signature))

    async def beat(self) -> None:
        """The engine's beat, as the daemon drives it; until cancelled."""
        while True:
            self.engine.observe(Beat())
            await asyncio.sleep(0.05)

    # ---- the story so far

    def plugged_in(self, **connect) -> ev.Terms:
        """A fresh view of the chain, a believed session, and a car plugged in at rest."""
        self.header()
        terms = self.connect(**connect)
        self.read()
        self.read()
        return terms

    def delivering(self, sref: str = SREF, **connect) -> ev.Terms:
        """The token is presented and power flows: 12 Wh so far."""
        terms = self.plugged_in(**connect)
        self.door.answer(sref, "a test", self.present(terms))
        self.read()
        self.read(5_012_345, power_w=11_000, pilot_state="C", current_ma=16_000, voltage_mv=230_000)
        assert self.engine.book.sessions[terms.session_id].stage == "DELIVERING"
        return terms
