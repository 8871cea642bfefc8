"""A random walk of the real contract and the model, side by side, step by step, comparing *everything* after each.

One walk is one seed. Steps look for something that can be done (most of them succeed and lead deep), at moments around
the edges of every window; one in eight is spoilt on purpose. A difference raises `Divergence` and says after which step.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from typing import Any

from market import Actor, Market, Reverted
from market_model import Auction, Model, Proof, Refused, Session, cost_up

from agent.chain import contract as c
from agent.core import token as tk
from agent.core.token import NO_ACK, Ack, PresentToken, Receipt
from agent.core.units import Address

SPOILT_ONE_IN = 8
PARAMETERS = replace(
    c.MarketParameters(),
    bond_bps=7_500,
    challenge_s=600,
    grace_s=900,
    connect_window_s=120,
    soft_close_count_max=2,
)


class Divergence(AssertionError):
    """Contract and model disagree."""


class Walk:
    """One market, one model, one random source. `done[action]` counts (accepted, tried)."""

    def __init__(self, market: Market, seed: int) -> None:
        self.market = market
        self.random = random.Random(seed)
        chain, place = market.chain_id, market.address
        self.model = Model(
            market.parameters,
            market.organisation.address,
            lambda consumer, provider, nonce: tk.session_id(chain, place, consumer, provider, nonce),
            tk.access_token,
        )
        self.people = market.actors[:6]
        for ev in (market.consumer, market.provider, market.rival):
            info = c.decode_ev_info(market.view(c.encode_ev_info(ev.address)))
            self.model.evs[ev.address] = (info.info, info.added_at_s)
        self.closed: list[bytes] = []
        self.tried: Counter[str] = Counter()
        self.accepted: Counter[str] = Counter()
        self.claims: dict[bytes, int] = {}

    # ---- the walk

    def walk(self, steps: int) -> None:
        """Take steps. Raises Divergence."""
        for number in range(steps):
            actions = self.actions()
            action = self.random.choices(list(actions), list(actions.values()))[0]
            words = f"step {number}, {action.__name__}"
            try:
                action()
                self.compare()
            except Divergence as error:
                raise Divergence(f"{words}: {error}") from error

    def actions(self) -> dict[Callable[[], None], int]:
        """What to do next, by weight: what can succeed now, and now and then what cannot."""
        wishes = {
            self.start_auction: (6, self.model.active and bool(self.free_cars())),
            self.place_bid: (10, bool(self.biddable())),
            self.place_bid_for: (5, bool(self.biddable())),
            self.connect: (9, bool(self.connectable() or self.hopeless())),
            self.consumer_ends: (6, bool(self.model.sessions)),
            self.provider_ends: (3, bool(self.model.sessions)),
            self.submit_receipt: (6, bool(self.model.sessions)),
            self.settle: (1, bool(self.model.sessions)),
            self.end_auction: (1, bool(self.model.auctions)),
            self.cancel_auction: (2, bool(self.model.auctions)),
            self.deposit: (1, True),
            self.withdraw: (1, True),
            self.set_operator: (1, True),
            self.registry: (2, True),
            self.change_status: (1 if self.model.active else 6, True),
        }
        anyway = self.spoilt()
        return {action: weight for action, (weight, possible) in wishes.items() if possible or anyway}

    def free_cars(self) -> list[Actor]:
        """EVs without an auction."""
        return [
            one for one in self.people if one.address in self.model.evs.keys() - self.model.auctions.keys()
        ]

    def biddable(self) -> list[bytes]:
        """Consumers whose auction takes a bid in the next block."""
        soon = self.market.now_s + 1
        found = [who for who, a in self.model.auctions.items() if soon < a.closing and self.model.rate_max(a)]
        return found if self.model.active else []

    def connectable(self) -> list[bytes]:
        """Consumers that can still connect."""
        soon, window = self.market.now_s + 1, self.market.parameters.connect_window_s
        evs = self.model.evs
        return [
            who
            for who, a in self.model.auctions.items()
            if self.model.active and a.rate and soon <= a.closing + window and {who, a.provider} <= evs.keys()
        ]

    def hopeless(self) -> list[bytes]:
        """Consumers whose auction has a bid, but a party of it was removed."""
        evs = self.model.evs.keys()
        return [who for who, a in self.model.auctions.items() if a.rate and not {who, a.provider} <= evs]

    def both(
        self, name: str, sender: Actor, data: bytes, value: int, model_call: Callable[[int], Any]
    ) -> bool:
        """The same call on both sides at the same second; True if both accepted it."""
        now = self.market.now_s + 1
        expected = "accepted"
        try:
            model_call(now)
        except Refused as error:
            expected = str(error)
        got, logs = "accepted", ()
        try:
            logs = self.market.send(sender, data, value).logs
        except Reverted as error:
            got = error.name
        if expected != got:
            raise Divergence(f"{name}: the model says {expected}, the contract says {got}")
        for log in logs:
            if isinstance(log, c.ConnectionEnded) and self.model.paid.get(log.token) != (
                log.delivered_wh,
                log.fee_wei,
            ):
                raise Divergence(f"{name}: paid {log}, the model {self.model.paid.get(log.token)}")
        self.tried[name] += 1
        self.accepted[name] += got == "accepted"
        return got == "accepted"

    # ---- what is looked at

    def compare(self) -> None:
        """Every view of every account and session, the balance, and what may only rise."""
        model, people = self.model, [actor.address for actor in self.people]
        tokens = [*model.sessions, *self.closed[-3:]]
        questions = [c.encode_status()]
        for one in people:
            questions += [
                c.encode_balances(one), c.encode_ev_info(one), c.encode_operator_of(one), c.encode_auctions(one)
            ]  # fmt: skip
        questions += [c.encode_sessions(token) for token in tokens]
        answers = iter(self.market.views(questions))
        self.same("status", c.decode_status(next(answers)), model.active)
        for one in people:
            self.same("ledger", c.decode_balances(next(answers)), model.ledger.get(one, 0))
            self.same("ev", c.decode_ev_info(next(answers)), c.EvInfo(*model.evs.get(one, (bytes(32), 0))))
            expected = (*model.operators.get(one, (bytes(20), 0)), model.operator_bonds(one))
            self.same("operator", c.decode_operator_of(next(answers)), c.OperatorState(*expected))
            self.same("auction", c.decode_auctions(next(answers)), self.auction_of(one))
        for token in tokens:
            state = c.decode_sessions(next(answers))
            self.same("session", state, self.session_of(token))
            if state.claimed_wh < self.claims.get(token, 0) and state.is_open:
                raise Divergence("a claim went down")
            self.claims[token] = state.claimed_wh
        self.same("balance", self.market.balance_wei(self.market.address), model.held())

    def same(self, what: str, got: Any, expected: Any) -> None:
        """Raise Divergence unless equal."""
        if got != expected:
            raise Divergence(f"{what}: the contract has {got}, the model {expected}")

    def auction_of(self, consumer: bytes) -> c.AuctionState:
        """The model's auction as the contract shows it."""
        nonce, a = self.model.nonces.get(consumer, 0), self.model.auctions.get(consumer)
        if a is None:
            return c.AuctionState(*(False, nonce, 0, 0, 0, c.ZERO_ADDRESS, 0, 0, 0, 0, 0, False))
        return c.AuctionState(
            *(True,), nonce, a.energy_wh, a.start_rate, a.rate, Address(a.provider), a.closing,
            a.closing + self.market.parameters.connect_window_s, a.validity_s, cost_up(a.start_rate, a.energy_wh),
            self.model.bond(a.rate, a.energy_wh), a.by_operator,
        )  # fmt: skip

    def session_of(self, token: bytes) -> c.SessionState:
        """The model's session as the contract shows it."""
        s = self.model.sessions.get(token)
        if s is None:
            nothing = (c.SessionStatus.NONE, c.ZERO_ADDRESS, c.ZERO_ADDRESS, 0, 0, 0, 0, 0, 0, 0, False)
            return c.SessionState(*nothing)
        status = c.SessionStatus.CLOSING if s.closing else c.SessionStatus.ACTIVE
        return c.SessionState(
            status, Address(s.consumer), Address(s.provider), s.nonce, s.energy_wh, s.claimed_wh, s.rate,
            cost_up(s.rate, s.energy_wh), self.model.bond(s.rate, s.energy_wh), s.settle_at, s.by_operator,
        )  # fmt: skip

    # ---- choices

    def spoilt(self) -> bool:
        """Something goes wrong on purpose in this step."""
        return self.random.randrange(SPOILT_ONE_IN) == 0

    def person(self) -> Actor:
        """Anybody."""
        return self.random.choice(self.people)

    def actor(self, address: bytes) -> Actor:
        """Whose key this is."""
        return next(actor for actor in self.people if actor.address == address)

    def at(self, *seconds: int) -> None:
        """Let the next block come at one of these moments, if that is not past."""
        later = [s for s in seconds if s > self.market.now_s + 1]
        if later:
            self.market.pass_time(self.random.choice(later) - self.market.now_s - 1)

    def auction(self, consumers: Collection[bytes]) -> tuple[Actor, Auction | None]:
        """One of these consumers and its auction; without any, anybody."""
        who = self.random.choice(list(consumers) or [one.address for one in self.people])
        return self.actor(who), self.model.auctions.get(who)

    def session(self) -> tuple[bytes, Session | None]:
        """An open session; without one, a closed or an invented token."""
        if self.model.sessions and not (self.spoilt() and self.spoilt()):
            return self.random.choice(list(self.model.sessions.items()))
        return self.random.choice([*self.closed, b"\x77" * 32]), None

    def amount(self, s: Session | None) -> int:
        """An amount worth trying: ends, steps, and sometimes too much."""
        if s is None:
            return 0
        few = [
            0,
            s.claimed_wh // 2,
            s.claimed_wh,
            s.claimed_wh + 1,
            s.energy_wh,
            self.random.randint(0, s.energy_wh),
        ]
        chosen = self.random.choice(few)
        return chosen + self.random.randrange(3) if self.spoilt() else min(chosen, s.energy_wh)

    def proof(self, token: bytes, s: Session | None, energy_wh: int) -> tuple[Ack, Proof]:
        """A receipt, honest or forged, and what it really is."""
        if s is None:
            return NO_ACK, Proof()
        random_, market = self.random, self.market
        signed_wh = energy_wh - random_.randint(0, 1) * energy_wh // 2 if self.spoilt() else energy_wh
        session_id = s.session_id if not self.spoilt() else b"\x33" * 32
        receipt = tk.digest(market.domain, Receipt(session_id, signed_wh))
        consumer = self.actor(s.consumer)
        if random_.random() < 0.5:
            signer = self.person() if self.spoilt() else consumer
            ack = replace(NO_ACK, receipt_signature=signer.sign(receipt))
            truth = Proof(session_id, signed_wh, by_consumer=signer is consumer)
        else:
            cap = random_.choice([energy_wh, s.energy_wh, max(0, energy_wh - 1)])
            granter = self.person() if self.spoilt() else consumer
            key = market.hot_key
            grant = PresentToken(token, s.session_id, Address(s.provider), key.address, cap, 9, b"\x05" * 32)
            signature = granter.sign(tk.digest(market.domain, grant))
            ack = Ack(token, key.address, cap, 9, b"\x05" * 32, signature, key.sign(receipt))
            truth = Proof(session_id, signed_wh, grant_wh=cap if granter is consumer else None)
        if self.spoilt():
            high = (tk.CURVE_ORDER - int.from_bytes(ack.receipt_signature[32:64])).to_bytes(32)
            v = bytes([55 - ack.receipt_signature[64]])
            ack = replace(ack, receipt_signature=ack.receipt_signature[:32] + high + v)
            truth = replace(truth, canonical=False)
        return ack, truth

    # ---- actions: organisation and ledger

    def registry(self) -> None:
        """Register or remove."""
        sender = self.person() if self.spoilt() else self.market.organisation
        ev = self.person().address
        if self.spoilt() or (ev in self.model.evs and self.random.random() < 0.3):
            data = c.encode_remove_ev(ev)
            self.both("removeEV", sender, data, 0, lambda _: self.model.remove_ev(sender.address, ev))
        else:
            info = self.random.randbytes(32)
            ev = next((one.address for one in self.people if one.address not in self.model.evs), ev)
            data = c.encode_add_ev(ev, info)
            self.both("addEV", sender, data, 0, lambda now: self.model.add_ev(sender.address, now, ev, info))

    def change_status(self) -> None:
        """Mostly open, or little would happen."""
        sender = self.person() if self.spoilt() else self.market.organisation
        active = not self.model.active or self.random.random() < 0.6
        data = c.encode_change_status(active)
        self.both("changeStatus", sender, data, 0, lambda _: self.model.change_status(sender.address, active))

    def deposit(self) -> None:
        """Anybody."""
        sender, value = self.person(), self.random.choice([0, 1, 10**15, 10**18])
        self.both(
            "deposit", sender, c.encode_deposit(), value, lambda _: self.model.deposit(sender.address, value)
        )

    def withdraw(self) -> None:
        """All, some, too much; also to nobody; and a hot key that wants its car's money."""
        sender = self.person()
        mine = self.model.ledger.get(sender.address, 0)
        amount = mine + 1 if self.spoilt() else self.random.choice([0, mine, mine // 3])
        to = bytes(20) if self.spoilt() else self.person().address
        trusting = [who for who, (operator, _) in self.model.operators.items() if operator != bytes(20)]
        if trusting and self.random.random() < 0.4:
            to = self.random.choice(trusting)
            sender, amount = self.actor(self.model.operators[to][0]), self.model.ledger.get(to, 0)
        data = c.encode_withdraw(amount, Address(to))
        self.both("withdraw", sender, data, 0, lambda _: self.model.withdraw(sender.address, amount, to))

    def set_operator(self) -> None:
        """A hot key with a small, a fitting or no limit."""
        sender = self.person()
        operator = bytes(20) if self.spoilt() else self.person().address
        limit = self.random.choice([0, 10**12, 10**18, 2**128 - 1, 10**18])
        data = c.encode_set_operator(Address(operator), limit)
        self.both(
            "setOperator", sender, data, 0, lambda _: self.model.set_operator(sender.address, operator, limit)
        )

    # ---- actions: auction

    def start_auction(self) -> None:
        """A car without an auction asks for something."""
        free = self.free_cars()
        sender = self.person() if self.spoilt() or not free else self.random.choice(free)
        energy, rate = (
            self.random.choice([1, 7, 200, 9_999, 2**24 - 1]),
            self.random.choice([1, 99, 101, 10**9, 10**12]),
        )
        bidding, validity = self.random.choice([60, 61, 600]), self.random.choice([300, 301, 3600])
        if self.spoilt():
            energy, rate, bidding, validity = self.random.choice(
                [(0, rate, bidding, validity), (2**24, rate, bidding, validity), (energy, 0, bidding, validity),
                 (energy, 2**64, bidding, validity), (energy, rate, 59, validity), (energy, rate, bidding, 299)]
            )  # fmt: skip
        value = self.payment(sender, cost_up(rate, energy))
        data = c.encode_start_auction(energy, bidding, rate, validity, bytes(32))
        self.both(
            "startAuction", sender, data, value,
            lambda now: self.model.start_auction(sender.address, now, value, energy, bidding, rate, validity),
        )  # fmt: skip

    def payment(self, sender: Actor, needed: int) -> int:
        """Exactly, too much, from the ledger, or too little."""
        rest = max(0, needed - self.model.ledger.get(sender.address, 0))
        value = self.random.choice([needed, needed, needed + 3, rest])
        return min(max(0, value - self.spoilt()), 10**20)

    def place_bid(self) -> None:
        """A lower offer, on time, late (soft close) or too late."""
        consumer, a = self.auction(self.biddable())
        others = [one for one in self.people if one is not consumer and one.address in self.model.evs]
        sender = self.person() if self.spoilt() or not others else self.random.choice(others)
        rate, nonce, needed = self.offer(consumer, a)
        value = self.payment(sender, needed)
        data = c.encode_place_bid(consumer.address, nonce, rate)
        self.both(
            "placeBid", sender, data, value,
            lambda now: self.model.place_bid(
                sender.address, now, value, sender.address, consumer.address, nonce, rate
            ),
        )  # fmt: skip

    def place_bid_for(self) -> None:
        """The same by somebody's operator; it is given one, money and trust where they lack."""
        consumer, a = self.auction(self.biddable())
        others = [one for one in self.people if one is not consumer and one.address in self.model.evs]
        provider = self.random.choice(others or self.people)
        operator, limit = self.model.operators.get(provider.address, (bytes(20), 0))
        rate, nonce, needed = self.offer(consumer, a)
        if operator == bytes(20) or (limit < needed and self.random.random() < 0.5):
            operator = self.market.hot_key.address
            trust = (
                max(needed, 1) - 1 if self.random.random() < 0.3 else 10**19
            )  # a wei too little, or enough
            named = c.encode_set_operator(Address(operator), trust)
            self.both(
                "setOperator", provider, named, 0,
                lambda _: self.model.set_operator(provider.address, operator, trust),
            )  # fmt: skip
        if self.model.ledger.get(provider.address, 0) < needed and not self.spoilt():
            self.both(
                "deposit", provider, c.encode_deposit(), needed,
                lambda _: self.model.deposit(provider.address, needed),
            )  # fmt: skip
        sender = self.person() if self.spoilt() else self.actor(operator)
        data = c.encode_place_bid_for(provider.address, consumer.address, nonce, rate)
        if sender is not provider:  # an account may not be its own operator's caller in the model's one door
            self.both(
                "placeBidFor", sender, data, 0,
                lambda now: self.model.place_bid(
                    sender.address, now, 0, provider.address, consumer.address, nonce, rate
                ),
            )  # fmt: skip

    def offer(self, consumer: Actor, a: Auction | None) -> tuple[int, int, int]:
        """(rate, nonce, bond) for this auction, at a moment worth trying."""
        nonce = self.model.nonces.get(consumer.address, 0) + self.spoilt()
        if a is None:
            return 1, nonce, 1
        if self.random.random() < 0.4:
            self.at(
                a.closing - 31,
                a.closing - 30,
                a.closing - 29,
                a.closing - 1,
                *([a.closing] if self.spoilt() else []),
            )
        highest = self.model.rate_max(a)
        rate = highest + self.spoilt() if self.random.random() < 0.5 else self.random.randint(0, highest)
        return rate, nonce, self.model.bond(rate, a.energy_wh)

    def end_auction(self) -> None:
        """By anybody, around closing."""
        consumer, a = self.auction(self.model.auctions)
        if a:
            self.at(a.closing - 1 if self.spoilt() else a.closing)
        sender, data = self.person(), c.encode_end_auction(consumer.address)
        self.both("endAuction", sender, data, 0, lambda now: self.model.end_auction(now, consumer.address))

    def cancel_auction(self) -> None:
        """By its consumer or anybody, around every edge."""
        consumer, a = self.auction(self.model.auctions)
        if a:
            connect_by = a.closing + self.market.parameters.connect_window_s
            self.at(a.closing - 1, a.closing, connect_by, connect_by + 1, connect_by + 1)
        sender = self.random.choice([consumer, self.person()])
        data = c.encode_cancel_auction(consumer.address)
        self.both(
            "cancelAuction", sender, data, 0,
            lambda now: self.model.cancel_auction(sender.address, now, consumer.address),
        )  # fmt: skip

    # ---- actions: session

    def connect(self) -> None:
        """With the winner, around both ends of the window."""
        hopeless = self.hopeless()
        consumer, a = self.auction(
            hopeless if hopeless and self.random.random() < 0.4 else self.connectable()
        )
        provider, energy = self.person().address, 1
        if a:
            connect_by = a.closing + self.market.parameters.connect_window_s
            edges = [a.closing - 1, connect_by + 1] if self.spoilt() else [a.closing, connect_by]
            self.at(*edges)
            energy = a.energy_wh + self.spoilt()
            provider = provider if self.random.random() < 0.25 or not a.rate else a.provider
        opened: list[bytes] = []
        data = c.encode_connect(Address(provider), energy)
        self.both(
            "connect", consumer, data, 0,
            lambda now: opened.append(self.model.connect(consumer.address, now, provider, energy)),
        )  # fmt: skip

    def consumer_ends(self) -> None:
        """Concedes something."""
        token, s = self.session()
        self._end("endConnection (consumer)", token, s, self.actor(s.consumer) if s else self.person())

    def provider_ends(self) -> None:
        """With or without a receipt; by its operator, or (spoilt) by anybody."""
        token, s = self.session()
        sender = self.person()
        if s and not self.spoilt():
            operator = self.model.operators.get(s.provider, (bytes(20), 0))[0]
            sender = self.actor(
                operator if operator != bytes(20) and self.random.random() < 0.4 else s.provider
            )
        self._end("endConnection (provider)", token, s, sender)

    def _end(self, name: str, token: bytes, s: Session | None, sender: Actor) -> None:
        energy = self.amount(s)
        ack, proof = self.proof(token, s, energy)
        data = c.encode_end_connection(tk.Token(token), energy, ack)
        self.both(
            name, sender, data, 0,
            lambda now: self.model.end_connection(sender.address, now, token, energy, proof),
        )  # fmt: skip
        self._remember(token)

    def submit_receipt(self) -> None:
        """By anybody."""
        token, s = self.session()
        energy, sender = self.amount(s), self.person()
        ack, proof = self.proof(token, s, energy)
        data = c.encode_submit_receipt(tk.Token(token), energy, ack)
        self.both("submitReceipt", sender, data, 0, lambda _: self.model.submit_receipt(token, energy, proof))

    def settle(self) -> None:
        """By anybody, around the moment."""
        token, s = self.session()
        if s:
            self.at(s.settle_at - 1 if self.spoilt() else s.settle_at)
        sender, data = self.person(), c.encode_settle(tk.Token(token))
        self.both("settle", sender, data, 0, lambda now: self.model.settle(now, token))
        self._remember(token)

    def _remember(self, token: bytes) -> None:
        if token in self.model.paid and token not in self.closed:
            self.closed.append(token)

    # ---- the end of everything

    def everybody_leaves(self) -> None:
        """Paused, every EV removed: a stranger and time flush every escrow, and everybody withdraws to zero."""
        market, owner = self.market, self.market.organisation
        self.both("changeStatus", owner, c.encode_change_status(active=False), 0,
                  lambda _: self.model.change_status(owner.address, active=False))  # fmt: skip
        for ev in list(self.model.evs):
            self.both("removeEV", owner, c.encode_remove_ev(Address(ev)), 0,
                      lambda _, ev=ev: self.model.remove_ev(owner.address, ev))  # fmt: skip
        market.pass_time(10**6)
        for who in list(self.model.auctions):
            self.both("cancelAuction", market.stranger, c.encode_cancel_auction(Address(who)), 0,
                      lambda now, who=who: self.model.cancel_auction(market.stranger.address, now, who))  # fmt: skip
        for token in list(self.model.sessions):
            self.both("settle", market.stranger, c.encode_settle(tk.Token(token)), 0,
                      lambda now, token=token: self.model.settle(now, token))  # fmt: skip
        for actor in self.people:
            amount = self.model.ledger.get(actor.address, 0)
            self.both("withdraw", actor, c.encode_withdraw(amount, actor.address), 0,
                      lambda _, a=actor, n=amount: self.model.withdraw(a.address, n, a.address))  # fmt: skip
        self.compare()
        if market.balance_wei(market.address) != 0:
            raise Divergence("something stayed behind")


def shares(walks: Sequence[Walk]) -> dict[str, tuple[int, int]]:
    """(accepted, tried) of each action over all walks."""
    tried = sum((walk.tried for walk in walks), Counter[str]())
    accepted = sum((walk.accepted for walk in walks), Counter[str]())
    return {name: (accepted[name], tried[name]) for name in sorted(tried)}
