// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

/// @dev PROTOCOL sections 1 to 3 written down once more, as plainly as Solidity can: what the property test
/// tests/contracts/test_same_arithmetic.py holds the Python code against. Never deployed for real.
contract Reference {
    struct PresentToken {
        bytes32 token;
        bytes32 sessionId;
        address provider;
        address sessionKey;
        uint64 maxEnergyWh;
        uint64 validUntil;
        bytes32 challenge;
    }

    struct Receipt {
        bytes32 sessionId;
        uint64 deliveredWh;
    }

    struct ProviderHello {
        address provider;
        bytes32 chargerId;
        bytes32 nonce;
        uint64 expiresAt;
    }

    struct SessionAccept {
        bytes32 sessionId;
        bytes32 challenge;
        uint64 registerMwhBegin;
        uint64 maxUnackedWh;
        uint64 acceptedAt;
    }

    struct MeterReading {
        bytes32 sessionId;
        uint64 seq;
        uint64 deliveredWh;
        uint64 powerW;
        uint64 atTime;
    }

    struct StopRequest {
        bytes32 sessionId;
        uint64 atTime;
    }

    function costFloor(uint128 rate, uint64 energyWh) external pure returns (uint256) {
        return uint256(rate) * energyWh / 1000;
    }

    function costCeil(uint128 rate, uint64 energyWh) external pure returns (uint256) {
        uint256 cost = uint256(rate) * energyWh;
        return cost % 1000 == 0 ? cost / 1000 : cost / 1000 + 1;
    }

    function accessToken(address consumer, address provider, uint256 issuedAt, uint256 validity)
        external
        pure
        returns (bytes32)
    {
        return keccak256(abi.encodePacked(consumer, provider, issuedAt, validity));
    }

    function sessionId(uint256 chainId, address market, address consumer, address provider, uint64 nonce)
        external
        pure
        returns (bytes32)
    {
        return keccak256(abi.encode(chainId, market, consumer, provider, nonce));
    }

    function domainSeparator(uint256 chainId, address market) external pure returns (bytes32) {
        bytes32 kind = keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
        return keccak256(abi.encode(kind, keccak256(bytes("V2VCharging")), keccak256(bytes("1")), chainId, market));
    }

    function presentTokenDigest(bytes32 domain, PresentToken calldata message) external pure returns (bytes32) {
        bytes32 kind = keccak256(
            "PresentToken(bytes32 token,bytes32 sessionId,address provider,address sessionKey,uint64 maxEnergyWh,uint64 validUntil,bytes32 challenge)"
        );
        return _digest(domain, keccak256(abi.encode(kind, message)));
    }

    function receiptDigest(bytes32 domain, Receipt calldata message) external pure returns (bytes32) {
        return
            _digest(domain, keccak256(abi.encode(keccak256("Receipt(bytes32 sessionId,uint64 deliveredWh)"), message)));
    }

    function providerHelloDigest(bytes32 domain, ProviderHello calldata message) external pure returns (bytes32) {
        return _digest(domain, _helloHash(message));
    }

    function sessionAcceptDigest(bytes32 domain, SessionAccept calldata message) external pure returns (bytes32) {
        bytes32 kind = keccak256(
            "SessionAccept(bytes32 sessionId,bytes32 challenge,uint64 registerMwhBegin,uint64 maxUnackedWh,uint64 acceptedAt)"
        );
        return _digest(domain, keccak256(abi.encode(kind, message)));
    }

    function meterReadingDigest(bytes32 domain, MeterReading calldata message) external pure returns (bytes32) {
        bytes32 kind =
            keccak256("MeterReading(bytes32 sessionId,uint64 seq,uint64 deliveredWh,uint64 powerW,uint64 at)");
        return _digest(domain, keccak256(abi.encode(kind, message)));
    }

    function stopRequestDigest(bytes32 domain, StopRequest calldata message) external pure returns (bytes32) {
        return _digest(domain, keccak256(abi.encode(keccak256("StopRequest(bytes32 sessionId,uint64 at)"), message)));
    }

    function challenge(ProviderHello calldata hello, bytes32 consumerNonce) external pure returns (bytes32) {
        return keccak256(abi.encode(_helloHash(hello), consumerNonce));
    }

    function personalSignDigest(bytes32 token) external pure returns (bytes32) {
        return keccak256(abi.encodePacked("\x19Ethereum Signed Message:\n32", token));
    }

    function _helloHash(ProviderHello calldata hello) private pure returns (bytes32) {
        bytes32 kind = keccak256("ProviderHello(address provider,bytes32 chargerId,bytes32 nonce,uint64 expiresAt)");
        return keccak256(abi.encode(kind, hello));
    }

    function _digest(bytes32 domain, bytes32 structHash) private pure returns (bytes32) {
        return keccak256(abi.encodePacked("\x19\x01", domain, structHash));
    }
}
