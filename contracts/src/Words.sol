// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IV2VCharging} from "./IV2VCharging.sol";

/// @dev One account in one storage word; from the low bits up: balance 96 | operatorBonds 96 | index 24 | addedAt 40.
/// `addedAt != 0`: a registered EV. `index != 0`: named in auction and session words.
type AccountWord is uint256;

/// @dev An account's operator; from the low bits up: operator 160 | bondLimit 96.
type OperatorWord is uint256;

/// @dev A market's parameters in one word: ten fields of 25 bits in the order of `MarketParameters`, from the low bits up.
type RulesWord is uint256;

/// @dev One live auction in one storage word; from the low bits up:
/// startRate 64 | auctionNonce 24 | validity 18 | softCloses 3 | operator 1 | bidder 24 | closingTime 32 | rate 64 |
/// unused 2 | energyWh 24. `energyWh != 0`: live; else nothing but the nonce is there. `rate != 0`: `bidder` leads.
/// Deposit and bond follow from rates and energy.
type AuctionWord is uint256;

/// @dev One open session in one storage word; from the low bits up:
/// settleAt 40 | consumer 24 | auctionNonce 24 | unused 21 | operator 1 | provider 24 | claimedWh 24 | closing 1 |
/// unused 7 | rate 64 | unused 2 | energyWh 24. Not zero: open. What it keeps of its auction lies where it lay there.
/// sessionId, deposit and bond follow from the rest.
type SessionWord is uint256;

using Words for AccountWord global;
using Words for OperatorWord global;
using Words for RulesWord global;
using Words for AuctionWord global;
using Words for SessionWord global;

/// @title How a trade's facts lie in storage words
/// @dev Getters cut their field out; `pack` and `with...` expect values within their field: the contract enforces each
/// bound where the value enters. Nothing here reads or writes storage.
library Words {
    uint256 internal constant RATE_MAX = type(uint64).max;
    uint256 internal constant TIME_MAX = type(uint32).max;
    uint256 internal constant ENERGY_WH_MAX = type(uint24).max;
    uint256 internal constant NONCE_MAX = type(uint24).max;
    uint256 internal constant INDEX_MAX = type(uint24).max;
    uint256 internal constant VALIDITY_MAX = (1 << 18) - 1;
    uint256 internal constant SOFT_CLOSES_MAX = 7;
    uint256 internal constant RULE_MAX = (1 << 25) - 1;
    uint256 internal constant BPS = 10_000; // basis points in one

    // what each of a market's parameters may be at most, in their order
    uint256 private constant RULES_MAX = RULE_MAX | (RULE_MAX << 25) | (RULE_MAX << 50) | (SOFT_CLOSES_MAX << 75)
        | (RULE_MAX << 100) | (RULE_MAX << 125) | (VALIDITY_MAX << 150) | (RULE_MAX << 175) | (RULE_MAX << 200)
        | (BPS << 225);
    uint256 private constant BID_MASK = ((1 << 124) - 1) << 106; // in an auction's word: what a bid replaces
    // in a session's word: what it keeps of the auction (rate, bidder, operator, nonce, energy), and its own fields
    uint256 private constant KEPT_MASK =
        (NONCE_MAX << 64) | (((1 << 25) - 1) << 109) | (RATE_MAX << 166) | (ENERGY_WH_MAX << 232);
    uint256 private constant SETTLE_AT_MASK = type(uint40).max;
    uint256 private constant CLAIM_MASK = ENERGY_WH_MAX << 134;
    uint256 private constant CLOSING = 1 << 158;

    // ---------------------------------------------------------------- account
    // Sums in place, unchecked: the contract never holds more than 2**96 - 1 wei, so neither field can reach the next
    // one; it takes out only what was put in before.

    function balance(AccountWord w) internal pure returns (uint256) {
        return uint96(AccountWord.unwrap(w));
    }

    /// @dev What its operator has locked in live bids and sessions.
    function operatorBonds(AccountWord w) internal pure returns (uint256) {
        return uint96(AccountWord.unwrap(w) >> 96);
    }

    function index(AccountWord w) internal pure returns (uint256) {
        return uint24(AccountWord.unwrap(w) >> 192);
    }

    function addedAt(AccountWord w) internal pure returns (uint256) {
        return AccountWord.unwrap(w) >> 216;
    }

    function isEV(AccountWord w) internal pure returns (bool) {
        return addedAt(w) != 0;
    }

    function credited(AccountWord w, uint256 amount) internal pure returns (AccountWord) {
        unchecked {
            return AccountWord.wrap(AccountWord.unwrap(w) + amount);
        }
    }

    /// @dev A bond on its way back, as an amount to credit: it also leaves `operatorBonds` if it counted there.
    function released(uint256 bond, uint256 operatorBond_) internal pure returns (uint256) {
        unchecked {
            return bond - ((bond * operatorBond_) << 96);
        }
    }

    function debited(AccountWord w, uint256 amount) internal pure returns (AccountWord) {
        unchecked {
            return AccountWord.wrap(AccountWord.unwrap(w) - amount);
        }
    }

    function bonded(AccountWord w, uint256 amount) internal pure returns (AccountWord) {
        unchecked {
            return AccountWord.wrap(AccountWord.unwrap(w) + (amount << 96));
        }
    }

    function withIndex(AccountWord w, uint256 index_) internal pure returns (AccountWord) {
        return AccountWord.wrap(AccountWord.unwrap(w) | (index_ << 192));
    }

    function registered(AccountWord w, uint256 now_) internal pure returns (AccountWord) {
        return AccountWord.wrap(AccountWord.unwrap(w) | (now_ << 216));
    }

    function removed(AccountWord w) internal pure returns (AccountWord) {
        return AccountWord.wrap(uint216(AccountWord.unwrap(w)));
    }

    // --------------------------------------------------------------- operator

    function newOperator(address operator_, uint256 bondLimit_) internal pure returns (OperatorWord) {
        return OperatorWord.wrap(uint160(operator_) | (bondLimit_ << 160));
    }

    function operator(OperatorWord o) internal pure returns (address) {
        return address(uint160(OperatorWord.unwrap(o)));
    }

    function bondLimit(OperatorWord o) internal pure returns (uint256) {
        return OperatorWord.unwrap(o) >> 160;
    }

    // ------------------------------------------------------------------ rules

    /// @dev `fits`: no parameter is above its greatest value, so each is within its field. Read in a loop, as `parameters`
    /// writes: ten lines of Solidity would be 300 bytes of code.
    function newRules(IV2VCharging.MarketParameters memory p) internal pure returns (RulesWord r, bool fits) {
        uint256 word;
        fits = true;
        for (uint256 i = 0; i < 10; ++i) {
            uint256 parameter;
            assembly ("memory-safe") {
                parameter := mload(add(p, shl(5, i)))
            }
            if (parameter > _rule(RulesWord.wrap(RULES_MAX), i)) fits = false;
            unchecked {
                word |= parameter << (25 * i);
            }
        }
        r = RulesWord.wrap(word);
    }

    function biddingRange(RulesWord r) internal pure returns (uint256 min, uint256 max) {
        return (_rule(r, 0), _rule(r, 1));
    }

    function softCloseSeconds(RulesWord r) internal pure returns (uint256) {
        return _rule(r, 2);
    }

    function softCloseMax(RulesWord r) internal pure returns (uint256) {
        return _rule(r, 3);
    }

    function connectWindowSeconds(RulesWord r) internal pure returns (uint256) {
        return _rule(r, 4);
    }

    function tokenValidityRange(RulesWord r) internal pure returns (uint256 min, uint256 max) {
        return (_rule(r, 5), _rule(r, 6));
    }

    function challengeSeconds(RulesWord r) internal pure returns (uint256) {
        return _rule(r, 7);
    }

    function graceSeconds(RulesWord r) internal pure returns (uint256) {
        return _rule(r, 8);
    }

    function bondBps(RulesWord r) internal pure returns (uint256) {
        return _rule(r, 9);
    }

    function parameters(RulesWord r) internal pure returns (uint256[10] memory p) {
        for (uint256 i = 0; i < 10; ++i) {
            p[i] = _rule(r, i);
        }
    }

    function _rule(RulesWord r, uint256 i) private pure returns (uint256) {
        unchecked {
            return (RulesWord.unwrap(r) >> (25 * i)) & RULE_MAX;
        }
    }

    // ---------------------------------------------------------------- auction

    function isLive(AuctionWord a) internal pure returns (bool) {
        return energyWh(a) != 0;
    }

    /// @dev What the next bid may be: the first one the start rate, a later one lower by max(1, 1 %).
    function rateMax(AuctionWord a) internal pure returns (uint256) {
        uint256 lowest = rate(a);
        if (lowest == 0) return startRate(a);
        uint256 step = lowest / 100;
        unchecked {
            return lowest - (step == 0 ? 1 : step);
        }
    }

    function newAuction(uint256 startRate_, uint256 closingTime_, uint256 nonce_, uint256 energyWh_, uint256 validity_)
        internal
        pure
        returns (AuctionWord)
    {
        return
            AuctionWord.wrap(
                startRate_ | (nonce_ << 64) | (validity_ << 88) | (closingTime_ << 134) | (energyWh_ << 232)
            );
    }

    function startRate(AuctionWord a) internal pure returns (uint256) {
        return uint64(AuctionWord.unwrap(a));
    }

    function rate(AuctionWord a) internal pure returns (uint256) {
        return uint64(AuctionWord.unwrap(a) >> 166);
    }

    function closingTime(AuctionWord a) internal pure returns (uint256) {
        return uint32(AuctionWord.unwrap(a) >> 134);
    }

    function auctionNonce(AuctionWord a) internal pure returns (uint256) {
        return uint24(AuctionWord.unwrap(a) >> 64);
    }

    function energyWh(AuctionWord a) internal pure returns (uint256) {
        return AuctionWord.unwrap(a) >> 232;
    }

    function bidder(AuctionWord a) internal pure returns (uint256) {
        return uint24(AuctionWord.unwrap(a) >> 110);
    }

    function validity(AuctionWord a) internal pure returns (uint256) {
        return (AuctionWord.unwrap(a) >> 88) & VALIDITY_MAX;
    }

    function softCloses(AuctionWord a) internal pure returns (uint256) {
        return (AuctionWord.unwrap(a) >> 106) & SOFT_CLOSES_MAX;
    }

    /// @dev 1 if the bond counts against the bidder's operator limit, else 0.
    function operatorBond(AuctionWord a) internal pure returns (uint256) {
        return (AuctionWord.unwrap(a) >> 109) & 1;
    }

    /// @dev The auction with another leading bid.
    function withBid(
        AuctionWord a,
        uint256 rate_,
        uint256 bidder_,
        uint256 closingTime_,
        uint256 softCloses_,
        bool byOperator
    ) internal pure returns (AuctionWord) {
        uint256 bid = softCloses_ | (bidder_ << 4) | (closingTime_ << 28) | (rate_ << 60);
        if (byOperator) bid |= 8;
        return AuctionWord.wrap((AuctionWord.unwrap(a) & ~BID_MASK) | (bid << 106));
    }

    /// @dev Not live any more. The nonce stays, so the word never returns to zero and is cheap to write again.
    function freed(AuctionWord a) internal pure returns (AuctionWord) {
        return AuctionWord.wrap(AuctionWord.unwrap(a) & (NONCE_MAX << 64));
    }

    // ---------------------------------------------------------------- session

    function isOpen(SessionWord s) internal pure returns (bool) {
        return SessionWord.unwrap(s) != 0;
    }

    /// @dev The session that `a` becomes.
    function newSession(AuctionWord a, uint256 consumer_, uint256 settleAt_) internal pure returns (SessionWord) {
        return SessionWord.wrap((AuctionWord.unwrap(a) & KEPT_MASK) | (consumer_ << 40) | settleAt_);
    }

    /// @dev What the two kinds of word share, for whoever reads either.
    function asAuction(SessionWord s) internal pure returns (AuctionWord) {
        return AuctionWord.wrap(SessionWord.unwrap(s));
    }

    function rate(SessionWord s) internal pure returns (uint256) {
        return rate(asAuction(s));
    }

    function provider(SessionWord s) internal pure returns (uint256) {
        return bidder(asAuction(s));
    }

    function auctionNonce(SessionWord s) internal pure returns (uint256) {
        return auctionNonce(asAuction(s));
    }

    function energyWh(SessionWord s) internal pure returns (uint256) {
        return energyWh(asAuction(s));
    }

    function operatorBond(SessionWord s) internal pure returns (uint256) {
        return operatorBond(asAuction(s));
    }

    function settleAt(SessionWord s) internal pure returns (uint256) {
        return uint40(SessionWord.unwrap(s));
    }

    function consumer(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 40);
    }

    function claimedWh(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 134);
    }

    function closing(SessionWord s) internal pure returns (bool) {
        return SessionWord.unwrap(s) & CLOSING != 0;
    }

    function withClaim(SessionWord s, uint256 claimedWh_) internal pure returns (SessionWord) {
        return SessionWord.wrap((SessionWord.unwrap(s) & ~CLAIM_MASK) | (claimedWh_ << 134));
    }

    function withClosing(SessionWord s, uint256 settleAt_) internal pure returns (SessionWord) {
        return SessionWord.wrap((SessionWord.unwrap(s) & ~SETTLE_AT_MASK) | settleAt_ | CLOSING);
    }
}
