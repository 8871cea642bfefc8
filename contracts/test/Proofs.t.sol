// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IV2VCharging} from "../src/IV2VCharging.sol";
import {V2VCharging} from "../src/V2VCharging.sol";
import {AccountWord, AuctionWord, OperatorWord, RulesWord, SessionWord, Words} from "../src/Words.sol";
import {MarketTest} from "./MarketTest.sol";

/// @dev What halmos proves for *all* values, not for some: `./run test contracts --long`, docs/security.md. forge
/// ignores functions that begin with `check_`.
contract ProofsTest is MarketTest {
    /// @dev Plain addresses. Of a signer's address a prover knows nothing: it could be the market's own.
    function setUp() public override {
        (consumer, provider, rival) = (address(0xC0001), address(0xE0001), address(0xE0002));
        (stranger, operator) = (address(0xE0003), address(0xE0004));
        super.setUp();
    }

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
                AccountWord back = w.credited(amount - bond).credited(Words.released(bond, 1));
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
        assert(a.validity() == valid && a.operatorBond() == 0 && a.isLive() == (energyWh != 0));
        uint256 softCloses = bidder & 7;
        bool byOperator = rate & 1 == 1;
        // A bid writes over another bid, and leaves the rest.
        AuctionWord b = a.withBid(type(uint64).max, type(uint24).max, type(uint32).max, 7, true)
            .withBid(rate, bidder, closing, softCloses, byOperator);
        assert(b.startRate() == startRate && b.auctionNonce() == nonce && b.energyWh() == energyWh);
        assert(b.validity() == valid && b.rate() == rate && b.bidder() == bidder && b.closingTime() == closing);
        assert(b.softCloses() == softCloses && (b.operatorBond() == 1) == byOperator);
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

    /// @dev A market's rules are read back as they were given, or the market is refused.
    /// @custom:halmos --loop 11
    function check_RulesFieldsStayApart(IV2VCharging.MarketParameters memory p) public pure {
        (RulesWord r, bool fits) = Words.newRules(p);
        assert(fits == _fit(p));
        if (!fits) return;
        (uint256 min, uint256 max) = r.biddingRange();
        assert(min == p.minBiddingSeconds && max == p.maxBiddingSeconds);
        (min, max) = r.tokenValidityRange();
        assert(min == p.tokenValidityMin && max == p.tokenValidityMax);
        assert(r.softCloseSeconds() == p.softCloseSeconds && r.softCloseMax() == p.softCloseMax);
        assert(r.connectWindowSeconds() == p.connectWindowSeconds && r.challengeSeconds() == p.challengeSeconds);
        assert(r.graceSeconds() == p.graceSeconds && r.bondBps() == p.bondBps);
    }

    function _fit(IV2VCharging.MarketParameters memory p) private pure returns (bool) {
        return p.minBiddingSeconds < 1 << 25 && p.maxBiddingSeconds < 1 << 25 && p.softCloseSeconds < 1 << 25
            && p.connectWindowSeconds < 1 << 25 && p.challengeSeconds < 1 << 25 && p.graceSeconds < 1 << 25
            && p.tokenValidityMin < 1 << 25 && p.tokenValidityMax < 1 << 18 && p.softCloseMax < 8 && p.bondBps <= 10_000;
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

    /// @dev An auction that is cancelled gives back all that it locked.
    function check_RefundIsTheDeposit(uint64 startRate, uint24 energyWh) public {
        vm.assume(startRate != 0 && energyWh != 0);
        _fund();
        _done(consumer, abi.encodeCall(market.startAuction, (energyWh, BIDDING, startRate, VALIDITY, 0)));
        assert(market.balances(consumer) + market.auctions(consumer).deposit == FUNDS);
        _done(consumer, abi.encodeCall(market.cancelAuction, (consumer)));
        assert(market.balances(consumer) == FUNDS);
    }

    /// @dev Who is outbid has what it had.
    function check_OutbidBondComesBack(uint64 rate, uint64 lower, uint24 energyWh) public {
        vm.assume(energyWh != 0 && rate != 0 && lower != 0);
        _fund();
        _done(consumer, abi.encodeCall(market.startAuction, (energyWh, BIDDING, type(uint64).max, VALIDITY, 0)));
        _done(provider, abi.encodeCall(market.placeBid, (consumer, 1, rate)));
        assert(market.balances(provider) + market.auctions(consumer).bond == FUNDS);
        vm.prank(rival);
        try market.placeBid(consumer, 1, lower) {
            assert(market.balances(provider) == FUNDS);
            assert(market.balances(rival) + market.auctions(consumer).bond == FUNDS);
        } catch {
            assert(lower > market.auctions(consumer).rate - 1 || rate - lower < rate / 100);
        }
    }

    /// @dev Settling moves deposit and bond into the two ledgers and nowhere else, whatever the session is about and
    /// whatever the ledgers hold. Modulo a field's 96 bits: that the fee is not above the cost is school arithmetic
    /// (claimed <= energy; products and floors keep order) which no solver finishes; the fuzzers try it.
    function check_SettlingPaysDepositAndBond(
        uint64 rate,
        uint24 energyWh,
        uint24 claimedWh,
        uint96 consumerHas,
        uint96 providerHas
    ) public {
        vm.assume(energyWh != 0 && claimedWh <= energyWh);
        bytes32 token = keccak256("a token");
        _put(keccak256(abi.encode(token, 7)), _session(rate, energyWh, claimedWh));
        _put(keccak256(abi.encode(1, 5)), uint160(consumer));
        _put(keccak256(abi.encode(2, 5)), uint160(provider));
        _put(keccak256(abi.encode(consumer, 2)), consumerHas);
        _put(keccak256(abi.encode(provider, 2)), providerHas);
        IV2VCharging.Session memory s = market.sessions(token);
        _done(provider, abi.encodeCall(market.endConnection, (token, 0, noAck())));
        uint256 afterwards = market.balances(consumer) + market.balances(provider);
        assert(uint96(afterwards) == uint96(s.deposit + s.bond + consumerHas + providerHas));
        assert(market.sessions(token).status == IV2VCharging.SessionStatus.None);
    }

    uint256 private constant FUNDS = 1 << 94;

    function _fund() private {
        for (uint256 i = 0; i < 3; ++i) {
            address car = [consumer, provider, rival][i];
            vm.deal(car, FUNDS);
            vm.prank(car);
            market.deposit{value: FUNDS}();
        }
    }

    function _put(bytes32 slot, uint256 word) private {
        vm.store(address(market), slot, bytes32(word));
    }

    /// @dev As `connect` writes it, of the EVs 1 and 2.
    function _session(uint256 rate, uint256 energyWh, uint256 claimedWh) private pure returns (uint256) {
        AuctionWord a = Words.newAuction(rate, 2e9, 1, energyWh, VALIDITY).withBid(rate, 2, 2e9, 0, false);
        return SessionWord.unwrap(a.newSession(1, 2e9).withClaim(claimedWh));
    }

    /// @dev A refusal is a failed proof, not a path that ends early.
    function _done(address by, bytes memory data) private {
        vm.prank(by);
        (bool done,) = address(market).call(data);
        assert(done);
    }
}

/// @dev Solidity has no uint18; masked where it is used.
type uint18_ is uint256;
