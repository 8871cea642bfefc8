// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {IV2VCharging} from "../src/IV2VCharging.sol";
import {V2VCharging} from "../src/V2VCharging.sol";
import {MiniTest} from "./lib/MiniTest.sol";

/// @dev A market with its actors: this contract is the organisation.
abstract contract MarketTest is MiniTest {
    uint64 internal constant ENERGY_WH = 200;
    uint128 internal constant START_RATE = 3e14;
    uint128 internal constant RATE = 2e14;
    uint64 internal constant BIDDING = 60;
    uint64 internal constant VALIDITY = 3600;

    uint256 internal constant CONSUMER_KEY = 0xC0;
    uint256 internal constant SESSION_KEY = 0x5E;
    address internal consumer = vm.addr(CONSUMER_KEY);
    address internal provider = vm.addr(0xE1);
    address internal rival = vm.addr(0xE2);
    address internal stranger = vm.addr(0xE3);
    address internal operator = vm.addr(0xE4);

    V2VCharging internal market;

    function setUp() public virtual {
        vm.warp(1_790_000_000);
        market = new V2VCharging(parameters());
        for (uint256 i = 0; i < 3; ++i) {
            market.addEV([consumer, provider, rival][i], keccak256("papers"));
        }
        for (uint256 i = 0; i < 5; ++i) {
            vm.deal([consumer, provider, rival, stranger, operator][i], 1000 ether);
        }
    }

    function parameters() internal pure virtual returns (IV2VCharging.MarketParameters memory) {
        return IV2VCharging.MarketParameters({
            minBiddingSeconds: 60,
            maxBiddingSeconds: 1 days,
            softCloseSeconds: 30,
            softCloseMax: 5,
            connectWindowSeconds: 15 minutes,
            tokenValidityMin: 5 minutes,
            tokenValidityMax: 48 hours,
            challengeSeconds: 12 hours,
            graceSeconds: 72 hours,
            bondBps: 10_000
        });
    }

    // ---- steps of a trade

    function start() internal {
        vm.prank(consumer);
        market.startAuction{value: cost(START_RATE)}(ENERGY_WH, BIDDING, START_RATE, VALIDITY, bytes32(uint256(7)));
    }

    function bid(address by, uint128 rate) internal {
        uint64 nonce = market.auctionNonce(consumer);
        vm.prank(by);
        market.placeBid{value: cost(rate)}(consumer, nonce, rate);
    }

    function close() internal {
        vm.warp(market.auctions(consumer).closingTime);
    }

    function connect() internal returns (bytes32 token) {
        vm.prank(consumer);
        return market.connect(provider, ENERGY_WH);
    }

    function open() internal returns (bytes32 token) {
        start();
        bid(provider, RATE);
        close();
        return connect();
    }

    // ---- receipts

    function noAck() internal pure returns (IV2VCharging.Ack memory ack) {}

    function sessionId() internal view returns (bytes32) {
        return market.sessionIdOf(consumer, provider, market.auctionNonce(consumer));
    }

    function signed(uint256 key, bytes32 structHash) internal view returns (bytes memory) {
        bytes32 digest = keccak256(abi.encodePacked("\x19\x01", market.domainSeparator(), structHash));
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(key, digest);
        return abi.encodePacked(r, s, v);
    }

    function receiptHash(uint64 deliveredWh) internal view returns (bytes32) {
        return
            keccak256(abi.encode(keccak256("Receipt(bytes32 sessionId,uint64 deliveredWh)"), sessionId(), deliveredWh));
    }

    function receipt(uint64 deliveredWh) internal view returns (IV2VCharging.Ack memory ack) {
        ack.receiptSignature = signed(CONSUMER_KEY, receiptHash(deliveredWh));
    }

    function keyReceipt(bytes32 token, uint64 deliveredWh, uint64 maxEnergyWh)
        internal
        view
        returns (IV2VCharging.Ack memory ack)
    {
        ack.token = token;
        ack.sessionKey = vm.addr(SESSION_KEY);
        ack.maxEnergyWh = maxEnergyWh;
        ack.validUntil = 1;
        ack.challenge = bytes32(uint256(5));
        bytes32 kind = keccak256(
            "PresentToken(bytes32 token,bytes32 sessionId,address provider,address sessionKey,uint64 maxEnergyWh,uint64 validUntil,bytes32 challenge)"
        );
        bytes32 grant = keccak256(
            abi.encode(kind, token, sessionId(), provider, ack.sessionKey, maxEnergyWh, ack.validUntil, ack.challenge)
        );
        ack.grantSignature = signed(CONSUMER_KEY, grant);
        ack.receiptSignature = signed(SESSION_KEY, receiptHash(deliveredWh));
    }

    // ---- money

    function cost(uint128 rate) internal pure returns (uint256) {
        return (uint256(rate) * ENERGY_WH + 999) / 1000;
    }

    receive() external payable {}
}
