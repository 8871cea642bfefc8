"""PROTOCOL section 2 as plain Python: the market that the contract must be, without words, bits or gas.

Independent of the contract and of the agent: it imports nothing of either, keeps every fact under its own name and
writes each rule down once more. `test_differential.py` lets it run beside the real bytecode and compares everything.
A call either changes the state or raises `Refused` with the contract's error name. Addresses are 20 bytes, ids 32.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

ZERO = bytes(20)
WEI_MAX = 2**96 - 1
ENERGY_MAX, RATE_MAX, TIME_MAX = 2**24 - 1, 2**64 - 1, 2**32 - 1


class Refused(Exception):
    """The market says no; the text is the contract's error name."""


def refuse_if(condition: bool, name: str) -> None:
    """Raise Refused(name) when the condition holds."""
    if condition:
        raise Refused(name)


def cost_up(rate: int, energy_wh: int) -> int:
    """What is locked: rounded up."""
    return -(-rate * energy_wh // 1000)


@dataclass(frozen=True)
class Proof:
    """What an Ack really is, known because the test made it: who signed what. `canonical`: 65 bytes, low s, v 27/28."""

    session_id: bytes = b""
    energy_wh: int = -1
    by_consumer: bool = False
    grant_wh: int | None = None  # a session key signed, and the consumer granted it this much
    canonical: bool = True

    def proves(self, session_id: bytes, energy_wh: int) -> bool:
        """Would an honest judge accept that the consumer acknowledged this amount of this session?"""
        if not self.canonical or (self.session_id, self.energy_wh) != (session_id, energy_wh):
            return False
        return self.by_consumer or (self.grant_wh is not None and energy_wh <= self.grant_wh)


@dataclass(frozen=True)
class Auction:
    """A live auction."""

    energy_wh: int
    start_rate: int
    closing: int
    validity_s: int
    rate: int = 0
    provider: bytes = ZERO
    by_operator: bool = False
    soft_closes: int = 0


@dataclass(frozen=True)
class Session:
    """An open session."""

    session_id: bytes
    consumer: bytes
    provider: bytes
    nonce: int
    energy_wh: int
    rate: int
    settle_at: int
    by_operator: bool
    claimed_wh: int = 0
    closing: bool = False


@dataclass
class Model:
    """The whole market. `rules` has the names of agent.chain.contract.MarketParameters."""

    rules: Any
    owner: bytes
    session_id_of: Any  # (consumer, provider, nonce) -> 32 bytes: only a name, its making is tested elsewhere
    token_of: Any  # (consumer, provider, issued at, valid until) -> 32 bytes
    active: bool = True
    evs: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    ledger: dict[bytes, int] = field(default_factory=dict)
    operators: dict[bytes, tuple[bytes, int]] = field(default_factory=dict)
    nonces: dict[bytes, int] = field(default_factory=dict)
    auctions: dict[bytes, Auction] = field(default_factory=dict)
    sessions: dict[bytes, Session] = field(default_factory=dict)
    paid: dict[bytes, tuple[int, int]] = field(
        default_factory=dict
    )  # token: delivered Wh, fee; once and for ever

    # ---- derived facts

    def bond(self, rate: int, energy_wh: int) -> int:
        """The provider's share of the cost, rounded up."""
        return -(-cost_up(rate, energy_wh) * self.rules.bond_bps // 10_000)

    def held(self) -> int:
        """Everything the contract owes to anybody: must equal its balance."""
        live = self.auctions.values()
        locked = sum(cost_up(a.start_rate, a.energy_wh) + self.bond(a.rate, a.energy_wh) for a in live)
        for s in self.sessions.values():
            locked += cost_up(s.rate, s.energy_wh) + self.bond(s.rate, s.energy_wh)
        return sum(self.ledger.values()) + locked

    def operator_bonds(self, account: bytes) -> int:
        """Locked by the account's operator: found by counting, the contract keeps a sum."""
        mine: list[Auction | Session] = [*self.auctions.values(), *self.sessions.values()]
        return sum(self.bond(x.rate, x.energy_wh) for x in mine if x.by_operator and x.provider == account)

    # ---- organisation

    def add_ev(self, sender: bytes, now: int, ev: bytes, info: bytes) -> None:
        """Algorithm 1."""
        refuse_if(sender != self.owner, "OwnableUnauthorizedAccount")
        refuse_if(not self.active, "MarketInactive")
        refuse_if(ev in self.evs, "AlreadyEV")
        self.evs[ev] = (info, now)

    def remove_ev(self, sender: bytes, ev: bytes) -> None:
        """Never refuses its owner."""
        refuse_if(sender != self.owner, "OwnableUnauthorizedAccount")
        self.evs.pop(ev, None)

    def change_status(self, sender: bytes, active: bool) -> None:
        """Explicit."""
        refuse_if(sender != self.owner, "OwnableUnauthorizedAccount")
        self.active = active

    # ---- ledger

    def _credit(self, account: bytes, amount: int) -> None:
        self.ledger[account] = self.ledger.get(account, 0) + amount

    def _lock(self, account: bytes, value: int, amount: int) -> None:
        refuse_if(self.held() + value > WEI_MAX, "LedgerFull")
        refuse_if(account not in self.evs, "NotEV")
        refuse_if(self.ledger.get(account, 0) + value < amount, "Insufficient")
        self._credit(account, value - amount)

    def deposit(self, sender: bytes, value: int) -> None:
        """Value becomes ledger."""
        refuse_if(self.held() + value > WEI_MAX, "LedgerFull")
        self._credit(sender, value)

    def withdraw(self, sender: bytes, amount: int, to: bytes) -> None:
        """The only way out, and only for the account itself."""
        refuse_if(to == ZERO, "ZeroAddress")
        refuse_if(amount > self.ledger.get(sender, 0), "Insufficient")
        self._credit(sender, -amount)

    def set_operator(self, sender: bytes, operator: bytes, bond_limit: int) -> None:
        """Anybody may name one; what cannot exist is not promised."""
        self.operators[sender] = (operator, min(bond_limit, WEI_MAX))

    # ---- auction

    def start_auction(
        self, sender: bytes, now: int, value: int, energy_wh: int, bidding_s: int, rate: int, validity_s: int
    ) -> None:
        """A consumer asks."""
        r = self.rules
        refuse_if(not self.active, "MarketInactive")
        refuse_if(sender in self.auctions, "AuctionLive")
        refuse_if(not 0 < energy_wh <= ENERGY_MAX, "EnergyOutOfRange")
        refuse_if(not 0 < rate <= RATE_MAX, "RateOutOfRange")
        refuse_if(not r.token_validity_s_min <= validity_s <= r.token_validity_s_max, "ValidityOutOfRange")
        refuse_if(not r.bidding_s_min <= bidding_s <= r.bidding_s_max, "BiddingOutOfRange")
        latest = now + bidding_s + r.soft_close_count_max * r.soft_close_s
        refuse_if(latest > TIME_MAX, "ClockExhausted")
        self._lock(sender, value, cost_up(rate, energy_wh))
        self.nonces[sender] = self.nonces.get(sender, 0) + 1
        self.auctions[sender] = Auction(energy_wh, rate, now + bidding_s, validity_s)

    def rate_max(self, a: Auction) -> int:
        """First the start rate, then at least max(1, 1 %) lower."""
        return a.rate - max(1, a.rate // 100) if a.rate else a.start_rate

    def place_bid(
        self, sender: bytes, now: int, value: int, provider: bytes, consumer: bytes, nonce: int, rate: int
    ) -> None:
        """By the provider itself, or (sender differs) by its operator."""
        if sender != provider:
            refuse_if(self.operators.get(provider, (ZERO, 0))[0] != sender, "NotOperator")
        refuse_if(not self.active, "MarketInactive")
        refuse_if(provider == consumer, "SelfDeal")
        refuse_if(consumer not in self.auctions, "NoAuction")
        a = self.auctions[consumer]
        refuse_if(self.nonces[consumer] != nonce, "StaleAuction")
        refuse_if(now >= a.closing, "AuctionClosed")
        refuse_if(rate == 0, "RateOutOfRange")
        refuse_if(rate > self.rate_max(a), "BidTooHigh")
        before = (dict(self.ledger), dict(self.auctions))
        try:
            self._free_bond(a)
            self.auctions[consumer] = replace(a, rate=0, provider=ZERO, by_operator=False)
            bond = self.bond(rate, a.energy_wh)
            self._lock(provider, value, bond)
            locked = self.operator_bonds(provider) + bond
            refuse_if(sender != provider and locked > self.operators[provider][1], "OperatorLimit")
        except Refused:
            self.ledger, self.auctions = before
            raise
        late = now + self.rules.soft_close_s > a.closing and a.soft_closes < self.rules.soft_close_count_max
        self.auctions[consumer] = replace(
            a,
            rate=rate,
            provider=provider,
            by_operator=sender != provider,
            closing=now + self.rules.soft_close_s if late else a.closing,
            soft_closes=a.soft_closes + late,
        )

    def _free_bond(self, a: Auction) -> None:
        if a.rate:
            self._credit(a.provider, self.bond(a.rate, a.energy_wh))

    def _refund(self, consumer: bytes) -> None:
        a = self.auctions.pop(consumer)
        self._free_bond(a)
        self._credit(consumer, cost_up(a.start_rate, a.energy_wh))

    def _closed(self, consumer: bytes, now: int) -> Auction:
        refuse_if(consumer not in self.auctions, "NoAuction")
        refuse_if(now < self.auctions[consumer].closing, "AuctionOpen")
        return self.auctions[consumer]

    def end_auction(self, now: int, consumer: bytes) -> None:
        """Announces; refunds when nobody bid."""
        if self._closed(consumer, now).rate == 0:
            self._refund(consumer)

    def cancel_auction(self, sender: bytes, now: int, consumer: bytes) -> None:
        """Its consumer while bidless; anyone once it can no longer connect."""
        refuse_if(consumer not in self.auctions, "NoAuction")
        a = self.auctions[consumer]
        own = sender == consumer and not a.rate
        expired = now > a.closing + self.rules.connect_window_s
        parties = {consumer, a.provider} if a.rate else {consumer}
        hopeless = now >= a.closing and (not self.active or not parties <= set(self.evs))
        refuse_if(not (own or expired or hopeless), "NotCancellable")
        self._refund(consumer)

    # ---- session

    def connect(self, sender: bytes, now: int, provider: bytes, energy_wh: int) -> bytes:
        """Algorithm 2; the token."""
        refuse_if(not self.active, "MarketInactive")
        a = self._closed(sender, now)
        refuse_if(not a.rate or provider != a.provider, "NotWinner")
        refuse_if(energy_wh != a.energy_wh, "WrongEnergy")
        refuse_if(now > a.closing + self.rules.connect_window_s, "ConnectExpired")
        refuse_if(sender not in self.evs or provider not in self.evs, "NotEV")
        validity = now + a.validity_s
        token = bytes(self.token_of(sender, provider, now, validity))
        refuse_if(token in self.sessions, "TokenExists")
        nonce = self.nonces[sender]
        session_id = self.session_id_of(sender, provider, nonce)
        settle_at = validity + self.rules.grace_s
        self.sessions[token] = Session(
            session_id, sender, provider, nonce, energy_wh, a.rate, settle_at, a.by_operator
        )
        del self.auctions[sender]
        self._credit(sender, cost_up(a.start_rate, energy_wh) - cost_up(a.rate, energy_wh))
        return token

    def _open(self, token: bytes, energy_wh: int) -> Session:
        refuse_if(token not in self.sessions, "NoSession")
        refuse_if(energy_wh > self.sessions[token].energy_wh, "OverAmount")
        return self.sessions[token]

    def end_connection(self, sender: bytes, now: int, token: bytes, energy_wh: int, proof: Proof) -> None:
        """The consumer concedes; the provider (or its operator) is final."""
        s = self._open(token, energy_wh)
        claimed = max(s.claimed_wh, energy_wh)
        if sender == s.consumer:
            if claimed == s.energy_wh:
                self._pay(token, claimed)
            else:
                close_at = s.settle_at if s.closing else min(s.settle_at, now + self.rules.challenge_s)
                self.sessions[token] = replace(s, claimed_wh=claimed, closing=True, settle_at=close_at)
        else:
            operator = self.operators.get(s.provider, (ZERO, 0))[0]
            refuse_if(sender not in (s.provider, operator), "NotParty")
            unproven = energy_wh > s.claimed_wh and not proof.proves(s.session_id, energy_wh)
            refuse_if(unproven, "InvalidReceipt")
            self._pay(token, claimed)

    def submit_receipt(self, token: bytes, energy_wh: int, proof: Proof) -> None:
        """Can only raise."""
        s = self._open(token, energy_wh)
        refuse_if(not proof.proves(s.session_id, energy_wh), "InvalidReceipt")
        self.sessions[token] = replace(s, claimed_wh=max(s.claimed_wh, energy_wh))

    def settle(self, now: int, token: bytes) -> None:
        """Anyone, when time has come."""
        refuse_if(now < self._open(token, 0).settle_at, "TooEarly")
        self._pay(token, self.sessions[token].claimed_wh)

    def _pay(self, token: bytes, energy_wh: int) -> None:
        assert token not in self.paid, "a token settles at most once"
        s = self.sessions.pop(token)
        fee = s.rate * energy_wh // 1000
        self._credit(s.provider, fee + self.bond(s.rate, s.energy_wh))
        self._credit(s.consumer, cost_up(s.rate, s.energy_wh) - fee)
        self.paid[token] = (energy_wh, fee)
