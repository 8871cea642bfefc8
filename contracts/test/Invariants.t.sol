// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IV2VCharging} from "../src/IV2VCharging.sol";
import {V2VCharging} from "../src/V2VCharging.sol";
import {Crowd} from "./Crowd.sol";
import {MiniTest} from "./lib/MiniTest.sol";

/// @dev Every line of PROTOCOL section 2's list, after every call of the crowd (its own handler asserts what happens
/// between two moments: payouts, rising claims, falling bids, unique ids, settling once).
contract InvariantsTest is MiniTest {
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

    /// @dev Ledgers, deposits and bonds are exactly what the contract holds; what operators lock is exactly what live
    /// bids and sessions of theirs lock, so no sum inside a word can ever borrow from its neighbour.
    function invariant_EveryWeiIsSomebodys() public view {
        V2VCharging market = _crowd.market();
        uint256 sum;
        uint256 byOperators;
        uint256 operatorsHold;
        for (uint256 i = 0; i < 4; ++i) {
            address car = _crowd.cars(i);
            IV2VCharging.Auction memory a = market.auctions(car);
            sum += market.balances(car) + a.deposit + a.bond;
            if (a.operatorBond) byOperators += a.bond;
            (,, uint128 locked) = market.operatorOf(car);
            operatorsHold += locked;
        }
        for (uint256 t = 0; t < _crowd.openCount(); ++t) {
            bytes32 token = _crowd.open(t);
            IV2VCharging.Session memory s = market.sessions(token);
            sum += s.deposit + s.bond;
            if (s.operatorBond) byOperators += s.bond;
            assertTrue(s.energyWh != 0 && s.claimedWh <= s.energyWh, "open, and not above the order");
            assertEq(s.claimedWh, _crowd.proven(token), "claimed is exactly what was conceded or signed");
        }
        assertEq(sum, address(market).balance, "counted == held");
        assertEq(byOperators, operatorsHold, "operator bonds are counted exactly");
    }

    /// @dev At the end of every run: paused and with every EV removed, a stranger and time flush every escrow, and
    /// everybody withdraws to zero.
    function afterInvariant() public {
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
        for (uint256 t = 0; t < _crowd.openCount(); ++t) {
            market.settle(_crowd.open(t));
        }
        for (uint256 i = 0; i < 4; ++i) {
            address car = _crowd.cars(i);
            uint256 balance = market.balances(car);
            vm.prank(car);
            market.withdraw(balance, car);
        }
        assertEq(address(market).balance, 0, "nothing is left behind");
    }
}
