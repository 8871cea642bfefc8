// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IV2VCharging} from "../src/IV2VCharging.sol";
import {V2VCharging} from "../src/V2VCharging.sol";
import {MiniTest} from "./lib/MiniTest.sol";

/// @dev Random cars doing random things with a market; it owns the market, so it also pauses and removes.
/// Remembers every token, so that the invariant can count all money.
contract Crowd is MiniTest {
    V2VCharging public immutable market;
    address[4] public cars;
    uint256[4] private _keys = [uint256(0xA1), 0xA2, 0xA3, 0xA4];
    bytes32[] public tokens;
    mapping(bytes32 => uint64) public claimed;

    constructor(IV2VCharging.MarketParameters memory p) {
        market = new V2VCharging(p);
        for (uint256 i = 0; i < 4; ++i) {
            cars[i] = vm.addr(_keys[i]);
            vm.deal(cars[i], 1e24);
            market.addEV(cars[i], "");
        }
    }

    function tokenCount() external view returns (uint256) {
        return tokens.length;
    }

    // ---- organisation

    function register(uint256 i) external {
        if (!market.isEV(cars[i % 4])) market.addEV(cars[i % 4], "");
        else if (i % 8 == 0) market.removeEV(cars[i % 4]);
    }

    function pause(uint256 roll) external {
        market.changeStatus(roll % 16 != 0 || !market.status());
    }

    // ---- auction: whoever can act is looked for, so that most calls go deep

    function startAuction(uint256 seed, uint64 energyWh, uint128 rate, bool fromLedger) external {
        energyWh = uint64(bounded(energyWh, 1, 1000));
        rate = uint128(bounded(rate, 1, 1e15));
        address car = _car(seed, false, false);
        uint256 needed = (uint256(rate) * energyWh + 999) / 1000;
        uint256 value = fromLedger && market.balances(car) >= needed ? 0 : needed + seed % 3;
        vm.prank(car);
        market.startAuction{value: value}(energyWh, 600, rate, 300, bytes32(0));
    }

    function placeBid(uint256 seed, uint256 i, uint256 cut) external {
        address consumer = _car(seed, true, false);
        for (uint256 k = 0; k < 4 && market.auctions(consumer).closingTime <= vm.getBlockTimestamp(); ++k) {
            consumer = _car(seed + k, true, false); // prefer one that still takes bids
        }
        _bid(consumer, i, cut);
    }

    function _bid(address consumer, uint256 i, uint256 cut) private {
        IV2VCharging.Auction memory a = market.auctions(consumer);
        uint128 rate = a.rate == 0 ? a.startRate : a.rate - a.rate / 100;
        if (a.rate != 0 && a.rate < 100) --rate;
        rate -= uint128(bounded(cut, 0, rate / 4));
        address bidder = cars[i % 4] == consumer ? cars[(i + 1) % 4] : cars[i % 4];
        vm.prank(bidder);
        market.placeBid{value: a.deposit}(consumer, a.auctionNonce, rate);
    }

    function passTime(uint256 seconds_) external {
        vm.warp(vm.getBlockTimestamp() + bounded(seconds_, 1, 90));
    }

    function endAuction(uint256 seed) external {
        address consumer = _car(seed, true, false);
        _warpTo(market.auctions(consumer).closingTime);
        market.endAuction(consumer);
    }

    function cancelAuction(uint256 seed, uint256 by) external {
        address consumer = _car(seed, true, false);
        IV2VCharging.Auction memory a = market.auctions(consumer);
        if (by % 3 == 0) _warpTo(a.connectBy + 1);
        vm.prank(a.rate == 0 ? consumer : cars[by % 4]);
        market.cancelAuction(consumer);
    }

    // ---- session

    function connect(uint256 seed) external {
        address consumer = _car(seed, true, true);
        IV2VCharging.Auction memory a = market.auctions(consumer);
        _warpTo(a.closingTime);
        vm.prank(consumer);
        tokens.push(market.connect(a.provider, a.energyWh));
    }

    /// @dev A car without an auction gets a session at once.
    function trade(uint256 seed, uint256 i, uint256 cut) external {
        address consumer = _car(seed, false, false);
        vm.prank(consumer);
        market.startAuction{value: 1e15}(500, 60, 1e15, 300, bytes32(0));
        _bid(consumer, i, cut);
        IV2VCharging.Auction memory a = market.auctions(consumer);
        _warpTo(a.closingTime);
        vm.prank(consumer);
        tokens.push(market.connect(a.provider, a.energyWh));
    }

    function concede(uint256 t, uint64 energyWh) external {
        (bytes32 token, IV2VCharging.Session memory s) = _session(t);
        uint64 wh = uint64(bounded(energyWh, 0, s.energyWh));
        IV2VCharging.Ack memory ack;
        vm.prank(s.consumer);
        market.endConnection(token, wh, ack);
        _note(token);
    }

    function endByProvider(uint256 t, uint64 energyWh) external {
        (bytes32 token, IV2VCharging.Session memory s) = _session(t);
        uint64 wh = uint64(bounded(energyWh, 0, s.energyWh));
        IV2VCharging.Ack memory ack = _receipt(s, wh);
        vm.prank(s.provider);
        market.endConnection(token, wh, ack);
    }

    function submitReceipt(uint256 t, uint64 energyWh) external {
        (bytes32 token, IV2VCharging.Session memory s) = _session(t);
        uint64 wh = uint64(bounded(energyWh, 0, s.energyWh));
        market.submitReceipt(token, wh, _receipt(s, wh));
        _note(token);
    }

    function settle(uint256 t) external {
        (bytes32 token, IV2VCharging.Session memory s) = _session(t);
        _warpTo(s.settleAt);
        market.settle(token);
    }

    function withdraw(uint256 i, uint256 amount) external {
        address car = cars[i % 4];
        uint256 balance = market.balances(car);
        vm.prank(car);
        market.withdraw(bounded(amount, 0, balance), car);
    }

    /// @dev A car with (or without) a live auction, and with a bid on it where asked.
    function _car(uint256 seed, bool live, bool withBid) private view returns (address car) {
        for (uint256 i = 0; i < 4; ++i) {
            car = cars[(seed % 4 + i) % 4];
            IV2VCharging.Auction memory a = market.auctions(car);
            if (a.live == live && (!withBid || a.rate != 0)) return car;
        }
    }

    /// @dev An open session, if there is one.
    function _session(uint256 seed) private view returns (bytes32 token, IV2VCharging.Session memory s) {
        uint256 count = tokens.length;
        for (uint256 i = 0; i < count; ++i) {
            token = tokens[(seed % count + i) % count];
            s = market.sessions(token);
            if (s.energyWh != 0) return (token, s);
        }
    }

    function _warpTo(uint256 time) private {
        if (vm.getBlockTimestamp() < time) vm.warp(time);
    }

    function _receipt(IV2VCharging.Session memory s, uint64 wh) private view returns (IV2VCharging.Ack memory ack) {
        bytes32 id = market.sessionIdOf(s.consumer, s.provider, s.auctionNonce);
        bytes32 hash = keccak256(abi.encode(keccak256("Receipt(bytes32 sessionId,uint64 deliveredWh)"), id, wh));
        bytes32 digest = keccak256(abi.encodePacked("\x19\x01", market.domainSeparator(), hash));
        for (uint256 i = 0; i < 4; ++i) {
            if (cars[i] != s.consumer) continue;
            (uint8 v, bytes32 r, bytes32 sig) = vm.sign(_keys[i], digest);
            ack.receiptSignature = abi.encodePacked(r, sig, v);
        }
    }

    /// @dev A claim may only rise.
    function _note(bytes32 token) private {
        IV2VCharging.Session memory s = market.sessions(token);
        if (s.energyWh == 0) return;
        assertTrue(s.claimedWh >= claimed[token] && s.claimedWh <= s.energyWh, "a claim only rises, to the order");
        claimed[token] = s.claimedWh;
    }
}

contract ConservationTest is MiniTest {
    Crowd private _crowd;

    function setUp() public {
        vm.warp(1_790_000_000);
        _crowd = new Crowd(
            IV2VCharging.MarketParameters({
                minBiddingSeconds: 60,
                maxBiddingSeconds: 600,
                softCloseSeconds: 30,
                softCloseMax: 5,
                connectWindowSeconds: 600,
                tokenValidityMin: 300,
                tokenValidityMax: 3600,
                challengeSeconds: 600,
                graceSeconds: 3600,
                bondBps: 7500
            })
        );
    }

    function targetContracts() public view returns (address[] memory targets) {
        targets = new address[](1);
        targets[0] = address(_crowd);
    }

    /// @dev Ledgers, deposits and bonds are exactly what the contract holds.
    function invariant_MoneyIsConserved() public view {
        assertEq(_counted(), address(_crowd.market()).balance, "counted == held");
    }

    /// @dev From any state, paused and with every EV removed, a stranger plus time can flush every escrow, and everyone
    /// withdraws to zero.
    function invariant_EverybodyCanLeave() public {
        V2VCharging market = _crowd.market();
        vm.prank(address(_crowd));
        market.changeStatus(false);
        vm.warp(vm.getBlockTimestamp() + 1 days);
        for (uint256 i = 0; i < 4; ++i) {
            address car = _crowd.cars(i);
            vm.prank(address(_crowd));
            market.removeEV(car);
            if (market.auctions(car).live) market.cancelAuction(car);
        }
        for (uint256 t = 0; t < _crowd.tokenCount(); ++t) {
            bytes32 token = _crowd.tokens(t);
            if (market.sessions(token).energyWh != 0) market.settle(token);
        }
        for (uint256 i = 0; i < 4; ++i) {
            address car = _crowd.cars(i);
            uint256 balance = market.balances(car);
            vm.prank(car);
            market.withdraw(balance, car);
        }
        assertEq(address(market).balance, 0, "nothing is left behind");
    }

    function _counted() private view returns (uint256 sum) {
        V2VCharging market = _crowd.market();
        for (uint256 i = 0; i < 4; ++i) {
            IV2VCharging.Auction memory a = market.auctions(_crowd.cars(i));
            sum += market.balances(_crowd.cars(i)) + a.deposit + a.bond;
        }
        for (uint256 t = 0; t < _crowd.tokenCount(); ++t) {
            IV2VCharging.Session memory s = market.sessions(_crowd.tokens(t));
            sum += s.deposit + s.bond;
        }
    }
}
