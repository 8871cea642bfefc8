// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IV2VCharging} from "../src/IV2VCharging.sol";
import {V2VCharging} from "../src/V2VCharging.sol";
import {AccountWord, AuctionWord, OperatorWord, RulesWord, SessionWord, Words} from "../src/Words.sol";
import {MarketTest} from "./MarketTest.sol";

/// @dev What halmos proves for *all* values, not for some: `./run test contracts --long`, docs/security.md. forge
/// ignores functions that begin with `check_`.
contract ProofsTest is MarketTest {
    // ------------------------------------------------------- words keep fields

    /// @dev An account's fields never touch each other while the bounds hold that the contract enforces: what is in the
    /// ledger together with what comes fits 96 bits, and only what was locked is released.
    function check_AccountFieldsStayApart(
        uint96 balance,
        uint96 bonds,
        uint24 index,
        uint40 addedAt,
        uint96 amount,
        uint96 bond
    ) public pure {
        AccountWord w = AccountWord.wrap(
            uint256(balance) | (uint256(bonds) << 96) | (uint256(index) << 192) | (uint256(addedAt) << 216)
        );
        if (uint256(balance) + amount <= type(uint96).max) {
            _same(w.credited(amount), uint256(balance) + amount, bonds, index, addedAt);
            if (bond <= bonds && bond <= amount) {
                AccountWord back = w.credited(amount - bond).credited(Words.released(bond, true));
                _same(back, uint256(balance) + amount, bonds - bond, index, addedAt);
            }
        }
        if (amount <= balance) _same(w.debited(amount), balance - amount, bonds, index, addedAt);
        if (uint256(bonds) + bond <= type(uint96).max) _same(w.bonded(bond), balance, bonds + bond, index, addedAt);
        _same(w.removed(), balance, bonds, index, 0);
        if (addedAt == 0) _same(w.registered(amount % 2 ** 40), balance, bonds, index, amount % 2 ** 40);
        if (index == 0) _same(w.withIndex(amount % 2 ** 24), balance, bonds, amount % 2 ** 24, addedAt);
    }

    function _same(AccountWord w, uint256 balance, uint256 bonds, uint256 index, uint256 addedAt) private pure {
        assert(w.balance() == balance);
        assert(w.operatorBonds() == bonds);
        assert(w.index() == index);
        assert(w.addedAt() == addedAt);
    }

    function check_AuctionFieldsStayApart(
        uint64 startRate,
        uint32 closing,
        uint24 nonce,
        uint24 energyWh,
        uint18_ validity,
        uint64 rate,
        uint24 bidder
    ) public pure {
        uint256 valid = uint18_.unwrap(validity) & Words.VALIDITY_MAX;
        AuctionWord a = Words.newAuction(startRate, closing, nonce, energyWh, valid);
        assert(a.startRate() == startRate && a.rate() == 0 && a.bidder() == 0 && a.softCloses() == 0);
        assert(a.closingTime() == closing && a.auctionNonce() == nonce && a.energyWh() == energyWh);
        assert(a.validity() == valid && !a.operatorBond() && a.isLive() == (energyWh != 0));
        uint256 softCloses = bidder & 7;
        bool byOperator = rate & 1 == 1;
        // A bid writes over another bid, and leaves the rest.
        AuctionWord b = a.withBid(type(uint64).max, type(uint24).max, type(uint32).max, 7, true)
            .withBid(rate, bidder, closing, softCloses, byOperator);
        assert(b.startRate() == startRate && b.auctionNonce() == nonce && b.energyWh() == energyWh);
        assert(b.validity() == valid && b.rate() == rate && b.bidder() == bidder && b.closingTime() == closing);
        assert(b.softCloses() == softCloses && b.operatorBond() == byOperator);
        assert(AuctionWord.unwrap(b.freed()) == uint256(nonce) << 64);
    }

    function check_SessionFieldsStayApart(
        AuctionWord a,
        uint24 consumer_,
        uint40 settleAt,
        uint24 claimed,
        uint40 closeAt
    ) public pure {
        SessionWord s = a.newSession(consumer_, settleAt);
        _sameSession(a, s, consumer_, settleAt, 0, false);
        _sameSession(a, s.withClaim(type(uint24).max).withClaim(claimed), consumer_, settleAt, claimed, false);
        _sameSession(a, s.withClaim(claimed).withClosing(closeAt), consumer_, closeAt, claimed, true);
    }

    function _sameSession(AuctionWord a, SessionWord s, uint256 by, uint256 settleAt, uint256 claimed, bool closing)
        private
        pure
    {
        assert(s.rate() == a.rate() && s.provider() == a.bidder() && s.auctionNonce() == a.auctionNonce());
        assert(s.energyWh() == a.energyWh() && s.operatorBond() == a.operatorBond() && s.consumer() == by);
        assert(s.settleAt() == settleAt && s.claimedWh() == claimed && s.closing() == closing);
    }

    function check_OperatorFieldsStayApart(address operator_, uint96 limit) public pure {
        OperatorWord o = Words.newOperator(operator_, limit);
        assert(o.operator() == operator_ && o.bondLimit() == limit);
    }

    // -------------------------------------------------------------- arithmetic

    /// @dev The lowest bid strictly falls, to 0 at last.
    function check_BidsFall(AuctionWord a) public pure {
        if (a.rate() != 0) assert(a.rateMax() < a.rate());
        else assert(a.rateMax() == a.startRate());
    }

    // -------------------------------------------------------------- organisation

    /// @dev Nobody but the organisation changes the registry, the status or the organisation.
    function check_OwnerOnly(address caller, address ev, bytes32 info, bool active) public {
        vm.assume(caller != address(this));
        bool before = market.isEV(ev);
        bytes[5] memory calls = [
            abi.encodeCall(market.addEV, (ev, info)),
            abi.encodeCall(market.removeEV, (ev)),
            abi.encodeCall(market.changeStatus, (active)),
            abi.encodeCall(market.transferOwnership, (ev)),
            abi.encodeCall(market.renounceOwnership, ())
        ];
        for (uint256 i = 0; i < 5; ++i) {
            vm.prank(caller);
            (bool done,) = address(market).call(calls[i]);
            assert(!done);
        }
        assert(market.isEV(ev) == before && market.status() && market.owner() == address(this));
    }

    // -------------------------------------------------------------------- money

    /// @dev What is locked fits its 96 bits twice over (deposit and bond), whatever rate and energy.
    function check_CostsFit(uint64 rate, uint24 energyWh) public pure {
        assert((uint256(rate) * energyWh + 999) / 1000 < 1 << 79);
    }

    /// @dev One whole round for all pairs of rates: what came in is what both ledgers say, to the wei, whether all or
    /// nothing was delivered; no sum overflows on the way. At the smallest, an uneven and the largest amount of energy: a
    /// product of two unknowns is beyond the solver, a product with a known amount is not.
    function check_MoneyIsConservedAtOneWh(uint64 startRate, uint64 rate, bool delivered) public {
        _round(1, startRate, rate, delivered ? 1 : 0);
    }

    function check_MoneyIsConservedAt999Wh(uint64 startRate, uint64 rate, bool delivered) public {
        _round(999, startRate, rate, delivered ? 999 : 0);
    }

    function check_MoneyIsConservedAtTheMost(uint64 startRate, uint64 rate, bool delivered) public {
        _round(type(uint24).max, startRate, rate, delivered ? type(uint24).max : 0);
    }

    function _round(uint24 energyWh, uint64 startRate, uint64 rate, uint24 delivered) private {
        vm.assume(rate != 0 && rate <= startRate);
        vm.deal(consumer, type(uint96).max);
        vm.deal(provider, type(uint96).max);
        uint256 locked = (uint256(startRate) * energyWh + 999) / 1000;
        uint256 bond = (uint256(rate) * energyWh + 999) / 1000;
        vm.prank(consumer);
        market.startAuction{value: locked}(energyWh, BIDDING, startRate, VALIDITY, 0);
        vm.prank(provider);
        market.placeBid{value: bond}(consumer, 1, rate);
        vm.warp(1_790_000_000 + BIDDING);
        vm.prank(consumer);
        bytes32 token = market.connect(provider, energyWh);
        vm.prank(delivered == 0 ? provider : consumer);
        market.endConnection(token, delivered, noAck());
        uint256 fee = uint256(rate) * delivered / 1000;
        assert(market.balances(provider) == bond + fee);
        assert(market.balances(consumer) == locked - fee);
        assert(address(market).balance == locked + bond);
    }
}

/// @dev Solidity has no uint18; masked where it is used.
type uint18_ is uint256;
