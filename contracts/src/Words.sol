// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

/// @dev One live auction in one storage word; from the low bits up:
/// startRate 64 | rate 64 | closingTime 32 | auctionNonce 24 | energyWh 24 | bidder 24 | validity 18 | softCloses 3 |
/// operator 1. `energyWh != 0`: live. `rate != 0`: `bidder` leads. Deposit and bond follow from rates and energy.
type AuctionWord is uint256;

/// @dev One open session in one storage word; from the low bits up:
/// rate 64 | settleAt 40 | consumer 24 | provider 24 | auctionNonce 24 | energyWh 24 | claimedWh 24 | closing 1 |
/// operator 1. `energyWh != 0`: open. sessionId, deposit and bond follow from the rest.
type SessionWord is uint256;

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

    uint256 private constant ENERGY_AT = 184; // in an auction's word
    uint256 private constant BID_MASK =
        ~((uint256(type(uint96).max) << 64) | (uint256(type(uint24).max) << 208) | (uint256(15) << 250));
    uint256 private constant CLAIM_AT = 200; // in a session's word
    uint256 private constant CLOSING = 1 << 224;
    uint256 private constant SETTLE_AT_MASK = ~(uint256(type(uint40).max) << 64);

    // ---------------------------------------------------------------- auction

    function newAuction(uint256 startRate_, uint256 closingTime_, uint256 nonce_, uint256 energyWh_, uint256 validity_)
        internal
        pure
        returns (AuctionWord)
    {
        return AuctionWord.wrap(
            startRate_ | (closingTime_ << 128) | (nonce_ << 160) | (energyWh_ << ENERGY_AT) | (validity_ << 232)
        );
    }

    function startRate(AuctionWord a) internal pure returns (uint256) {
        return uint64(AuctionWord.unwrap(a));
    }

    function rate(AuctionWord a) internal pure returns (uint256) {
        return uint64(AuctionWord.unwrap(a) >> 64);
    }

    function closingTime(AuctionWord a) internal pure returns (uint256) {
        return uint32(AuctionWord.unwrap(a) >> 128);
    }

    function auctionNonce(AuctionWord a) internal pure returns (uint256) {
        return uint24(AuctionWord.unwrap(a) >> 160);
    }

    function energyWh(AuctionWord a) internal pure returns (uint256) {
        return uint24(AuctionWord.unwrap(a) >> ENERGY_AT);
    }

    function bidder(AuctionWord a) internal pure returns (uint256) {
        return uint24(AuctionWord.unwrap(a) >> 208);
    }

    function validity(AuctionWord a) internal pure returns (uint256) {
        return (AuctionWord.unwrap(a) >> 232) & VALIDITY_MAX;
    }

    function softCloses(AuctionWord a) internal pure returns (uint256) {
        return (AuctionWord.unwrap(a) >> 250) & SOFT_CLOSES_MAX;
    }

    function operatorBond(AuctionWord a) internal pure returns (bool) {
        return (AuctionWord.unwrap(a) >> 253) & 1 != 0;
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
        uint256 rest = AuctionWord.unwrap(a) & BID_MASK;
        uint256 flags = softCloses_ | (byOperator ? 8 : 0);
        return AuctionWord.wrap(rest | (rate_ << 64) | (closingTime_ << 128) | (bidder_ << 208) | (flags << 250));
    }

    /// @dev Not live any more. The rest stays: a word that never returns to zero is cheap to write again.
    function freed(AuctionWord a) internal pure returns (AuctionWord) {
        return AuctionWord.wrap(AuctionWord.unwrap(a) & ~(ENERGY_WH_MAX << ENERGY_AT));
    }

    // ---------------------------------------------------------------- session

    /// @dev The session that `a` becomes.
    function newSession(AuctionWord a, uint256 consumer_, uint256 settleAt_) internal pure returns (SessionWord) {
        return SessionWord.wrap(
            a.rate() | (settleAt_ << 64) | (consumer_ << 104) | (a.bidder() << 128) | (a.auctionNonce() << 152)
                | (a.energyWh() << 176) | (a.operatorBond() ? 1 << 225 : 0)
        );
    }

    function rate(SessionWord s) internal pure returns (uint256) {
        return uint64(SessionWord.unwrap(s));
    }

    function settleAt(SessionWord s) internal pure returns (uint256) {
        return uint40(SessionWord.unwrap(s) >> 64);
    }

    function consumer(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 104);
    }

    function provider(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 128);
    }

    function auctionNonce(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 152);
    }

    function energyWh(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> 176);
    }

    function claimedWh(SessionWord s) internal pure returns (uint256) {
        return uint24(SessionWord.unwrap(s) >> CLAIM_AT);
    }

    function closing(SessionWord s) internal pure returns (bool) {
        return SessionWord.unwrap(s) & CLOSING != 0;
    }

    function operatorBond(SessionWord s) internal pure returns (bool) {
        return (SessionWord.unwrap(s) >> 225) & 1 != 0;
    }

    function withClaim(SessionWord s, uint256 claimedWh_) internal pure returns (SessionWord) {
        uint256 rest = SessionWord.unwrap(s) & ~(ENERGY_WH_MAX << CLAIM_AT);
        return SessionWord.wrap(rest | (claimedWh_ << CLAIM_AT));
    }

    function withClosing(SessionWord s, uint256 settleAt_) internal pure returns (SessionWord) {
        return SessionWord.wrap((SessionWord.unwrap(s) & SETTLE_AT_MASK) | (settleAt_ << 64) | CLOSING);
    }
}
