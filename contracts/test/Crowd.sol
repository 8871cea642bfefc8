// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IV2VCharging} from "../src/IV2VCharging.sol";
import {V2VCharging} from "../src/V2VCharging.sol";
import {MiniTest} from "./lib/MiniTest.sol";

/// @dev Four cars, their operator and a stranger doing random things with a market that this contract owns.
///
/// No action may revert (`fail_on_revert`): one that lacks its auction, session or open market makes it first, so every
/// call reaches deep. What the market must keep from call to call is asserted here, where it happens; what must hold
/// at any moment is in Invariants.t.sol.
contract Crowd is MiniTest {
    uint256 private constant OPEN_MAX = 6; // sessions at a time, so that checks stay fast

    V2VCharging public immutable market;
    IV2VCharging.MarketParameters private _rules;
    address[4] public cars;
    uint256[4] private _keys = [uint256(0xA1), 0xA2, 0xA3, 0xA4];
    address private _operator = vm.addr(0xB0);
    uint256 private constant SESSION_KEY = 0x5E;

    bytes32[] public open; // tokens of open sessions
    bytes32[] public settled;
    mapping(bytes32 token => uint64) public proven; // the most that was conceded or validly signed and shown
    mapping(bytes32 sessionId => bool) private _seen;

    constructor(IV2VCharging.MarketParameters memory rules) {
        market = new V2VCharging(rules);
        _rules = rules;
        for (uint256 i = 0; i < 4; ++i) {
            cars[i] = vm.addr(_keys[i]);
            vm.deal(cars[i], 1e27);
            market.addEV(cars[i], "");
            vm.prank(cars[i]);
            market.deposit{value: 1e20}();
            vm.prank(cars[i]);
            market.setOperator(_operator, type(uint128).max);
        }
    }

    function openCount() external view returns (uint256) {
        return open.length;
    }

    // ------------------------------------------------------------ organisation

    function removeOrRegister(uint256 i) external {
        address car = cars[i % 4];
        if (market.isEV(car)) market.removeEV(car);
        else _registered(car);
    }

    function pauseOrOpen(uint256 roll) external {
        market.changeStatus(roll % 4 != 0);
    }

    function setOperator(uint256 i, uint128 bondLimit) external {
        vm.prank(cars[i % 4]);
        market.setOperator(i % 8 < 4 ? _operator : address(0), bondLimit);
    }

    function passTime(uint256 seconds_) external {
        vm.warp(vm.getBlockTimestamp() + bounded(seconds_, 1, 90));
    }

    // ----------------------------------------------------------------- auction

    function startAuction(uint256 seed, uint64 energyWh, uint128 rate, bool fromLedger) external {
        (address car, bool free) = _carWithout(seed);
        if (!free) _freed(car);
        _start(car, uint64(bounded(energyWh, 1, type(uint24).max)), uint128(bounded(rate, 1, 1e15)), fromLedger);
    }

    function placeBid(uint256 seed, uint256 i, uint256 cut, bool byOperator) external {
        address consumer = _biddable(seed);
        _bid(consumer, i, cut, byOperator);
    }

    function endAuction(uint256 seed) external {
        address consumer = _withAuction(seed);
        _warpTo(market.auctions(consumer).closingTime);
        market.endAuction(consumer);
    }

    function cancelAuction(uint256 seed, uint256 how) external {
        address consumer = _withAuction(seed);
        IV2VCharging.Auction memory a = market.auctions(consumer);
        if (a.rate != 0) {
            if (how % 2 == 0) {
                _warpTo(a.connectBy + 1);
            } else {
                market.removeEV(a.provider);
                _warpTo(a.closingTime);
            }
        }
        vm.prank(a.rate == 0 ? consumer : vm.addr(0xC1));
        market.cancelAuction(consumer);
    }

    // ----------------------------------------------------------------- session

    function connect(uint256 seed, uint256 i, uint256 cut, bool byOperator) external {
        _connect(seed, i, cut, byOperator);
    }

    function concede(uint256 t, uint64 energyWh) external {
        (bytes32 token, IV2VCharging.Session memory s) = _session(t);
        energyWh = uint64(bounded(energyWh, 0, s.energyWh));
        IV2VCharging.Ack memory ack;
        _raise(token, energyWh);
        if (proven[token] == s.energyWh) {
            return _settles(token, s, abi.encodeCall(market.endConnection, (token, energyWh, ack)), s.consumer);
        }
        vm.prank(s.consumer);
        market.endConnection(token, energyWh, ack);
        IV2VCharging.Session memory after_ = market.sessions(token);
        assertTrue(after_.status == IV2VCharging.SessionStatus.Closing, "conceding opens the challenge");
        if (s.status == IV2VCharging.SessionStatus.Closing) {
            assertEq(after_.settleAt, s.settleAt, "closeAt never moves");
        }
        assertTrue(after_.settleAt <= s.settleAt, "never later than without");
        assertEq(after_.claimedWh, proven[token], "the claim is what is proven");
    }

    function submitReceipt(uint256 t, uint64 energyWh, bool byKey) external {
        (bytes32 token, IV2VCharging.Session memory s) = _session(t);
        energyWh = uint64(bounded(energyWh, 0, s.energyWh));
        _raise(token, energyWh);
        market.submitReceipt(token, energyWh, _receipt(token, s, energyWh, byKey));
        IV2VCharging.Session memory after_ = market.sessions(token);
        assertEq(after_.claimedWh, proven[token], "a receipt only raises, to what it says");
        assertEq(after_.settleAt, s.settleAt, "a receipt moves no time");
    }

    function endByProvider(uint256 t, uint64 energyWh, bool byKey, bool byOperator) external {
        (bytes32 token, IV2VCharging.Session memory s) = _session(t);
        energyWh = uint64(bounded(energyWh, 0, s.energyWh));
        IV2VCharging.Ack memory ack = _receipt(token, s, energyWh, byKey);
        (address operator,,) = market.operatorOf(s.provider);
        _raise(token, energyWh);
        address by = byOperator && operator != address(0) ? operator : s.provider;
        _settles(token, s, abi.encodeCall(market.endConnection, (token, energyWh, ack)), by);
    }

    function settle(uint256 t) external {
        (bytes32 token, IV2VCharging.Session memory s) = _session(t);
        _warpTo(s.settleAt);
        _settles(token, s, abi.encodeCall(market.settle, (token)), vm.addr(0xC1));
    }

    /// @dev A token settles at most once, whoever tries whatever.
    function settleAgain(uint256 t) external {
        if (settled.length == 0) return;
        bytes32 token = settled[t % settled.length];
        IV2VCharging.Ack memory ack;
        _fails(abi.encodeCall(market.settle, (token)));
        _fails(abi.encodeCall(market.endConnection, (token, 0, ack)));
        _fails(abi.encodeCall(market.submitReceipt, (token, 0, ack)));
    }

    /// @dev What nobody signed is not paid: one Wh more than the receipt, and a grant that is too small.
    function overclaim(uint256 t, uint64 energyWh) external {
        (bytes32 token, IV2VCharging.Session memory s) = _session(t);
        if (s.claimedWh == s.energyWh) return; // everything is proven already
        energyWh = uint64(bounded(energyWh, s.claimedWh, s.energyWh - 1));
        bytes memory more =
            abi.encodeCall(market.endConnection, (token, energyWh + 1, _receipt(token, s, energyWh, false)));
        vm.prank(s.provider);
        (bool paid,) = address(market).call(more);
        assertTrue(!paid, "unproven energy is not paid");
    }

    function withdraw(uint256 i, uint256 amount) external {
        address car = cars[i % 4];
        uint256 balance = market.balances(car);
        vm.prank(car);
        market.withdraw(bounded(amount, 0, balance), car);
    }

    // ------------------------------------------------------------------ inside

    function _start(address car, uint64 energyWh, uint128 rate, bool fromLedger) private {
        _opened();
        _registered(car);
        uint256 needed = (uint256(rate) * energyWh + 999) / 1000;
        uint256 value = fromLedger && market.balances(car) >= needed ? 0 : needed;
        uint64 nonce = market.auctionNonce(car);
        vm.prank(car);
        market.startAuction{value: value}(energyWh, 600, rate, 300, bytes32(0));
        assertEq(market.auctionNonce(car), nonce + 1, "every auction has its own nonce");
    }

    function _bid(address consumer, uint256 i, uint256 cut, bool byOperator) private {
        _opened();
        IV2VCharging.Auction memory a = market.auctions(consumer);
        uint128 highest = a.rate == 0 ? a.startRate : a.rate - (a.rate < 100 ? 1 : a.rate / 100);
        uint128 rate = highest - uint128(bounded(cut, 0, highest / 4));
        address bidder = cars[i % 4] == consumer ? cars[(i % 4 + 1) % 4] : cars[i % 4];
        _registered(bidder);
        if (byOperator) {
            _operated(bidder, a.deposit);
            vm.prank(_operator);
            market.placeBidFor(bidder, consumer, a.auctionNonce, rate);
        } else {
            vm.prank(bidder);
            market.placeBid{value: a.deposit}(consumer, a.auctionNonce, rate);
        }
        IV2VCharging.Auction memory b = market.auctions(consumer);
        assertTrue(b.rate < a.rate || (a.rate == 0 && b.rate <= a.startRate), "the lowest bid strictly falls");
        uint256 latest = a.closingTime > vm.getBlockTimestamp() + _rules.softCloseSeconds
            ? a.closingTime
            : vm.getBlockTimestamp() + _rules.softCloseSeconds;
        assertTrue(b.closingTime >= a.closingTime && b.closingTime <= latest, "closing moves little, and forward");
    }

    function _connect(uint256 seed, uint256 i, uint256 cut, bool byOperator) private returns (bytes32 token) {
        while (open.length >= OPEN_MAX) _settleFirst();
        address consumer = _biddable(seed);
        if (market.auctions(consumer).rate == 0) _bid(consumer, i, cut, byOperator);
        IV2VCharging.Auction memory a = market.auctions(consumer);
        _opened();
        _registered(consumer);
        _registered(a.provider);
        _warpTo(a.closingTime);
        vm.prank(consumer);
        token = market.connect(a.provider, a.energyWh);
        bytes32 id = market.sessionIdOf(consumer, a.provider, a.auctionNonce);
        assertTrue(!_seen[id], "a session id is unique");
        _seen[id] = true;
        open.push(token);
    }

    function _settleFirst() private {
        IV2VCharging.Session memory s = market.sessions(open[0]);
        _warpTo(s.settleAt);
        _settles(open[0], s, abi.encodeCall(market.settle, (open[0])), vm.addr(0xC1));
    }

    /// @dev Make the call that must settle, and count both payouts.
    function _settles(bytes32 token, IV2VCharging.Session memory s, bytes memory call_, address by) private {
        uint256 consumerHad = market.balances(s.consumer);
        uint256 providerHad = market.balances(s.provider);
        vm.prank(by);
        (bool done_,) = address(market).call(call_);
        assertTrue(done_, "an exit never refuses");
        assertTrue(market.sessions(token).status == IV2VCharging.SessionStatus.None, "settled");
        uint256 fee = uint256(s.rate) * proven[token] / 1000;
        assertEq(market.balances(s.provider) - providerHad, fee + s.bond, "floor fee and bond");
        assertEq(market.balances(s.consumer) - consumerHad, s.deposit - fee, "the rest");
        for (uint256 i = 0; i < open.length; ++i) {
            if (open[i] != token) continue;
            open[i] = open[open.length - 1];
            open.pop();
        }
        settled.push(token);
    }

    function _fails(bytes memory call_) private {
        (bool done_,) = address(market).call(call_);
        assertTrue(!done_, "a settled session stays settled");
    }

    function _raise(bytes32 token, uint64 energyWh) private {
        if (energyWh > proven[token]) proven[token] = energyWh;
    }

    function _opened() private {
        if (!market.status()) market.changeStatus(true);
    }

    function _registered(address car) private {
        _opened();
        if (!market.isEV(car)) market.addEV(car, "");
    }

    function _operated(address car, uint256 needed) private {
        vm.prank(car);
        market.setOperator(_operator, type(uint128).max);
        vm.prank(car);
        market.deposit{value: needed}();
    }

    /// @dev End its auction, whatever it waits for.
    function _freed(address car) private {
        _warpTo(market.auctions(car).connectBy + 1);
        market.cancelAuction(car);
    }

    function _carWithout(uint256 seed) private view returns (address car, bool free) {
        for (uint256 i = 0; i < 4; ++i) {
            car = cars[(seed % 4 + i) % 4];
            if (!market.auctions(car).live) return (car, true);
        }
    }

    function _withAuction(uint256 seed) private returns (address car) {
        for (uint256 i = 0; i < 4; ++i) {
            car = cars[(seed % 4 + i) % 4];
            if (market.auctions(car).live) return car;
        }
        _start(car, 500, 1e14, false);
    }

    /// @dev A consumer whose auction takes a bid now.
    function _biddable(uint256 seed) private returns (address car) {
        for (uint256 i = 0; i < 4; ++i) {
            car = cars[(seed % 4 + i) % 4];
            IV2VCharging.Auction memory a = market.auctions(car);
            if (a.live && vm.getBlockTimestamp() < a.closingTime && a.rate != 1) return car;
        }
        if (market.auctions(car).live) _freed(car);
        _start(car, 500, 1e14, false);
    }

    function _session(uint256 seed) private returns (bytes32 token, IV2VCharging.Session memory s) {
        token = open.length == 0 ? _connect(seed, seed / 4, seed, seed % 2 == 0) : open[seed % open.length];
        s = market.sessions(token);
    }

    function _warpTo(uint256 time) private {
        if (vm.getBlockTimestamp() < time) vm.warp(time);
    }

    function _receipt(bytes32 token, IV2VCharging.Session memory s, uint64 energyWh, bool byKey)
        private
        view
        returns (IV2VCharging.Ack memory ack)
    {
        bytes32 id = market.sessionIdOf(s.consumer, s.provider, s.auctionNonce);
        bytes32 hash = keccak256(abi.encode(keccak256("Receipt(bytes32 sessionId,uint64 deliveredWh)"), id, energyWh));
        uint256 key;
        for (uint256 i = 0; i < 4; ++i) {
            if (cars[i] == s.consumer) key = _keys[i];
        }
        if (byKey) {
            ack.token = token;
            ack.sessionKey = vm.addr(SESSION_KEY);
            ack.maxEnergyWh = energyWh;
            ack.grantSignature = _signed(key, _grantHash(id, s.provider, ack));
            key = SESSION_KEY;
        }
        ack.receiptSignature = _signed(key, hash);
    }

    function _grantHash(bytes32 id, address provider, IV2VCharging.Ack memory ack) private pure returns (bytes32) {
        bytes32 kind = keccak256(
            "PresentToken(bytes32 token,bytes32 sessionId,address provider,address sessionKey,uint64 maxEnergyWh,uint64 validUntil,bytes32 challenge)"
        );
        return keccak256(
            abi.encode(kind, ack.token, id, provider, ack.sessionKey, ack.maxEnergyWh, ack.validUntil, ack.challenge)
        );
    }

    function _signed(uint256 key, bytes32 structHash) private view returns (bytes memory) {
        bytes32 digest = keccak256(abi.encodePacked("\x19\x01", market.domainSeparator(), structHash));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }
}
