// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IV2VCharging} from "./IV2VCharging.sol";

/// @dev One account in one storage word; from the low bits up: balance 96 | operatorBonds 96 | index 24 | addedAt 40.
/// `addedAt != 0`: a registered EV. `index != 0`: named in auction and session words.
type AccountWord is uint256;

/// @dev An account's operator; from the low bits up: operator 160 | bondLimit 96.
type OperatorWord is uint256;

/// @dev A market's parameters in one word; from the low bits up: minBiddingSeconds 32 | maxBiddingSeconds 32 |
/// softCloseSeconds 32 | connectWindowSeconds 32 | challengeSeconds 32 | graceSeconds 32 | tokenValidityMin 18 |
/// tokenValidityMax 18 | softCloseMax 3 | bondBps 14.
type RulesWord is uint256;

/// @dev One live auction in one storage word; from the low bits up:
/// startRate 64 | auctionNonce 24 | validity 18 | softCloses 3 | operator 1 | bidder 24 | closingTime 32 | rate 64 |
/// unused 2 | energyWh 24. `energyWh != 0`: live; else nothing but the nonce is there. `rate != 0`: `bidder` leads.
/// Deposit and bond follow from rates and energy.
type AuctionWord is uint256;

/// @dev One open session in one storage word; from the low bits up:
/// rate 64 | consumer 24 | provider 24 | auctionNonce 24 | operator 1 | closing 1 | unused 30 | settleAt 40 |
/// claimedWh 24 | energyWh 24. Not zero: open. sessionId, deposit and bond follow from the rest.
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

    uint256 private constant BID_MASK = ((1 << 124) - 1) << 106; // in an auction's word: what a bid replaces
    uint256 private constant CLOSING = 1 << 137; // in a session's word, as the next two
    uint256 private constant SETTLE_AT_MASK = uint256(type(uint40).max) << 168;
    uint256 private constant CLAIM_MASK = uint256(type(uint24).max) << 208;

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
    function released(uint256 bond, bool operatorBond_) internal pure returns (uint256) {
        unchecked {
            return operatorBond_ ? bond - (bond << 96) : bond;
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

    function newRules(IV2VCharging.MarketParameters memory p) internal pure returns (RulesWord) {
        uint256 low = uint256(p.minBiddingSeconds) | (uint256(p.maxBiddingSeconds) << 32)
            | (uint256(p.softCloseSeconds) << 64) | (uint256(p.connectWindowSeconds) << 96)
            | (uint256(p.challengeSeconds) << 128) | (uint256(p.graceSeconds) << 160);
        uint256 high = uint256(p.tokenValidityMin) | (uint256(p.tokenValidityMax) << 18)
            | (uint256(p.softCloseMax) << 36) | (uint256(p.bondBps) << 39);
        return RulesWord.wrap(low | (high << 192));
    }

    function biddingRange(RulesWord r) internal pure returns (uint256 min, uint256 max) {
        return (uint32(RulesWord.unwrap(r)), uint32(RulesWord.unwrap(r) >> 32));
    }

    function softCloseSeconds(RulesWord r) internal pure returns (uint256) {
        return uint32(RulesWord.unwrap(r) >> 64);
    }

    function connectWindowSeconds(RulesWord r) internal pure returns (uint256) {
        return uint32(RulesWord.unwrap(r) >> 96);
    }

    function challengeSeconds(RulesWord r) internal pure returns (uint256) {
        return uint32(RulesWord.unwrap(r) >> 128);
    }

    function graceSeconds(RulesWord r) internal pure returns (uint256) {
        return uint32(RulesWord.unwrap(r) >> 160);
    }

    function tokenValidityRange(RulesWord r) internal pure returns (uint256 min, uint256 max) {
        return ((RulesWord.unwrap(r) >> 192) & VALIDITY_MAX, (RulesWord.unwrap(r) >> 210) & VALIDITY_MAX);
    }

    function softCloseMax(RulesWord r) internal pure returns (uint256) {
        return (RulesWord.unwrap(r) >> 228) & SOFT_CLOSES_MAX;
    }

    function bondBps(RulesWord r) internal pure returns (uint256) {
        return RulesWord.unwrap(r) >> 231;
    }

    function parameters(RulesWord r) internal pure returns (IV2VCharging.MarketParameters memory p) {
        (uint256 biddingMin, uint256 biddingMax) = biddingRange(r);
        (uint256 validityMin, uint256 validityMax) = tokenValidityRange(r);
        p.minBiddingSeconds = uint32(biddingMin);
        p.maxBiddingSeconds = uint32(biddingMax);
        p.softCloseSeconds = uint32(softCloseSeconds(r));
        p.softCloseMax = uint32(softCloseMax(r));
        p.connectWindowSeconds = uint32(connectWindowSeconds(r));
        p.tokenValidityMin = uint32(validityMin);
        p.tokenValidityMax = uint32(validityMax);
        p.challengeSeconds = uint32(challengeSeconds(r));
        p.graceSeconds = uint32(graceSeconds(r));
        p.bondBps = uint32(bondBps(r));
    }

    // ---------------------------------------------------------------- auction

    function isLive(AuctionWord a) internal pure returns (bool) {
        return energyWh(a) != 0;
    }

    /// @dev What the next bid may be: the first one the start rate, a later one lower by max(1, 1 %).
    function rateMax(AuctionWord a) internal pure returns (uint256) {
        uint256 lowest = rate(a);
        if (lowest == 0) return startRate(a);
        unchecked {
            return lowest - (lowest < 100 ? 1 : lowest / 100);
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

    function operatorBond(AuctionWord a) internal pure returns (bool) {
        return (AuctionWord.unwrap(a) >> 109) & 1 != 0;
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
        uint256 bid = softCloses_ | (byOperator ? 8 : 0) | (bidder_ << 4) | (closingTime_ << 28) | (rate_ << 60);
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
        return SessionWord.wrap(
            a.rate() | (consumer_ << 64) | (a.bidder() << 88) | (a.auctionNonce() << 112)
                | (a.operatorBond() ? 1 << 136 : 0) | (settleAt_ << 168) | (a.energyWh() << 232)
        );
    }

    function rate(SessionWord s) internal pure returns (uint256) {
        return uint64(SessionWord.unwrap(s));
    }

    function settleAt(SessionWord s) internal pure returns (uint256) {
        return uint40(SessionWord.unwrap(s) >> 168);
    }

    function consumer(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 64);
    }

    function provider(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 88);
    }

    function auctionNonce(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 112);
    }

    function energyWh(SessionWord s) internal pure returns (uint256) {
        return SessionWord.unwrap(s) >> 232;
    }

    function claimedWh(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 208);
    }

    function closing(SessionWord s) internal pure returns (bool) {
        return SessionWord.unwrap(s) & CLOSING != 0;
    }

    function operatorBond(SessionWord s) internal pure returns (bool) {
        return (SessionWord.unwrap(s) >> 136) & 1 != 0;
    }

    function withClaim(SessionWord s, uint256 claimedWh_) internal pure returns (SessionWord) {
        return SessionWord.wrap((SessionWord.unwrap(s) & ~CLAIM_MASK) | (claimedWh_ << 208));
    }

    function withClosing(SessionWord s, uint256 settleAt_) internal pure returns (SessionWord) {
        return SessionWord.wrap((SessionWord.unwrap(s) & ~SETTLE_AT_MASK) | (settleAt_ << 168) | CLOSING);
    }
}
