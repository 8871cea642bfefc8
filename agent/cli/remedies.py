"""What a person can do about each of the contract's refusals, and about a node's. One sentence each; nothing decides here.

The names are the contract's error names (IV2VCharging.sol) and `agent.chain.node.SEND_REFUSALS`. A test holds that
every error of the contract has its sentence.
"""

from __future__ import annotations

from typing import Final

from agent.errors import Refused

REMEDIES: Final[dict[str, str]] = {
    # ---- the market and its members
    "BadParameters": "A shortest time must be at least 1 s and not above its longest; validity below 262144 s, soft "
    "closes at most 7, bond at most 10000 (100 %).",
    "MarketInactive": "The organisation has paused the market; money can still leave it: end, cancel, settle, withdraw.",
    "AlreadyEV": "Nothing is to be done; to change its info, remove-ev and add-ev it again.",
    "NotEV": "The organisation must register that account first: v2v organisation add-ev ADDRESS.",
    "OwnableUnauthorizedAccount": "Only the organisation may do this: give --key of the account that deployed the market.",
    "OwnableInvalidOwner": "Name another owner than the zero address.",
    # ---- the ledger
    "LedgerFull": "The contract holds all it can count; send less.",
    "Insufficient": "Put the difference into the ledger (v2v provider deposit, v2v consumer deposit), or ask for less.",
    "ZeroAddress": "Name the account that shall be paid: --to ADDRESS.",
    "TransferFailed": "The receiver refuses payments; name another account: --to ADDRESS.",
    "NotOperator": "The owner names its operator: v2v provider set-operator ADDRESS; or give the owner's --key.",
    "OperatorLimit": "The owner may raise it: v2v provider set-operator ADDRESS --bond-limit AMOUNT; or wait until a bond "
    "comes back.",
    # ---- an auction
    "EnergyOutOfRange": "Ask for at least 1 Wh and at most what the error names.",
    "RateOutOfRange": "Name a rate of at least 1 wei per kWh and at most what the error names.",
    "BiddingOutOfRange": "Choose a bidding time within the market's limits: v2v organisation show.",
    "NonceExhausted": "Use another account; this one has started all the auctions it ever can.",
    "ClockExhausted": "This market has reached the end of its calendar; deploy another one.",
    "ValidityOutOfRange": "Choose a token validity within the market's limits: v2v organisation show.",
    "AuctionLive": "Finish the live auction first: v2v consumer connect, or v2v consumer cancel.",
    "NoAuction": "There is nothing to bid on, end or connect for this consumer; v2v provider auctions lists what there is.",
    "AuctionOpen": "Bidding still runs; try again after its closing time.",
    "AuctionClosed": "Bidding is over; v2v provider auctions lists what is still open.",
    "StaleAuction": "That auction is over, the consumer has started another one: look at it first (v2v provider auctions).",
    "BidTooHigh": "Bid at most what the error names: the start rate first, then 1 % below the lowest bid.",
    "SelfDeal": "A car cannot sell to itself; bid with another account.",
    "NotCancellable": "The consumer may cancel while nobody has bid; anybody after the time to connect is over.",
    # ---- a session
    "NotWinner": "Connect with the winner that the error names.",
    "WrongEnergy": "Connect for exactly the energy that was auctioned.",
    "ConnectExpired": "It is too late to connect; v2v consumer cancel frees both deposits.",
    "TokenExists": "Try again with the next block.",
    "NoSession": "No open session has this token: it is settled already, or the token is wrong.",
    "NotParty": "Give the --key of the consumer, the provider or the provider's operator; others may settle later.",
    "OverAmount": "Name at most the energy that was ordered.",
    "InvalidReceipt": "The consumer's signature does not prove this amount; use the newest receipt of this session.",
    "TooEarly": "Anyone may settle from the time the error names (unix seconds) on; the parties may end it before.",
    # ---- the node's own
    "nonce_too_low": "Another transaction of this account was faster; run the command again.",
    "nonce_too_high": "An earlier transaction of this account is missing; wait for it, or send it again.",
    "replacement_underpriced": "Another transaction of this account still waits; wait until it is in a block.",
    "underpriced": "Fees have risen meanwhile; run the command again.",
    "gas_limit": "This does not fit into a block of this chain.",
    "fee_cap_of_node": "The node has a limit of its own on fees; use another node.",
    "wrong_chain": "The node is on another chain than it says; use another node.",
    "out_of_gas": "The state changed while it was sent; run the command again.",
}


def error_name(reason: str) -> str:
    """`BidTooHigh(rateMax=297)` -> `BidTooHigh`."""
    return reason.partition("(")[0]


def with_remedy(refused: Refused) -> Refused:
    """The same refusal, saying what to do. One that says so already stays as it is."""
    remedy = refused.remedy or REMEDIES.get(error_name(refused.reason), "")
    return Refused(refused.reason, refused.detail, remedy=remedy)
