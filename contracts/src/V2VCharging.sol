// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {IV2VCharging} from "./IV2VCharging.sol";
import {AuctionWord, SessionWord, Words} from "./Words.sol";

/// @title V2V charging market
/// @dev Immutable, native coin, one external call (in `withdraw`, last).
///
/// Storage is what a trade pays for, so everything a trade touches is one 32-byte word per thing: an account, an
/// auction, a session. Words name EVs by a 24-bit index (the paper's EVsAdr), given at an EV's first auction or bid.
/// An auction's word keeps its nonce and so never returns to zero; a session's word is cleared when it settles.
///
/// Bounds that make the packing safe, each enforced at the entrance so that no exit can overflow:
/// * the contract never takes in value above 2**96 - 1 wei (`LedgerFull`); every balance, deposit and bond is a part of
///   what the contract holds, so each fits 96 bits;
/// * energy < 2**24 Wh (16.7 MWh) and rate < 2**64 wei per kWh (18.4 coins), so a cost is below 2**79 wei;
/// * times of auctions < 2**32 (year 2106), token validity < 2**18 s, soft closes < 2**3.
contract V2VCharging is IV2VCharging, Ownable2Step {
    // ---------------------------------------------------------------- storage

    /// @dev `addedAt != 0`: a registered EV. `index != 0`: named in auction and session words.
    struct AccountWord {
        uint96 balance;
        uint96 operatorBonds; // locked by its operator in live bids and sessions
        uint40 addedAt;
        uint24 index;
    }

    struct OperatorWord {
        address operator;
        uint96 bondLimit;
    }

    bool public status = true; // shares a word with Ownable2Step's pending owner
    uint24 private _evCount; // indices given so far

    mapping(address account => AccountWord) private _accounts;
    mapping(address account => OperatorWord) private _operators;
    mapping(address ev => bytes32 info) private _infos;
    mapping(uint256 index => address ev) private _evAt;
    mapping(address consumer => AuctionWord) private _auctions;
    mapping(bytes32 token => SessionWord) private _sessions;

    // -------------------------------------------------- constants, immutables

    uint256 private constant BPS = 10_000;
    uint256 private constant WH_PER_KWH = 1000;

    bytes32 private constant DOMAIN_TYPEHASH =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
    bytes32 private constant PRESENT_TOKEN_TYPEHASH = keccak256(
        "PresentToken(bytes32 token,bytes32 sessionId,address provider,address sessionKey,uint64 maxEnergyWh,uint64 validUntil,bytes32 challenge)"
    );
    bytes32 private constant RECEIPT_TYPEHASH = keccak256("Receipt(bytes32 sessionId,uint64 deliveredWh)");

    uint256 private immutable _minBiddingSeconds;
    uint256 private immutable _maxBiddingSeconds;
    uint256 private immutable _softCloseSeconds;
    uint256 private immutable _softCloseMax;
    uint256 private immutable _connectWindowSeconds;
    uint256 private immutable _tokenValidityMin;
    uint256 private immutable _tokenValidityMax;
    uint256 private immutable _challengeSeconds;
    uint256 private immutable _graceSeconds;
    uint256 private immutable _bondBps;

    uint256 private immutable _domainChainId;
    bytes32 private immutable _domainSeparator;

    constructor(MarketParameters memory market) Ownable(msg.sender) {
        if (
            market.minBiddingSeconds == 0 || market.minBiddingSeconds > market.maxBiddingSeconds
                || market.tokenValidityMin == 0 || market.tokenValidityMin > market.tokenValidityMax
                || market.tokenValidityMax > Words.VALIDITY_MAX || market.softCloseMax > Words.SOFT_CLOSES_MAX
                || market.bondBps > BPS
        ) revert BadParameters();
        _minBiddingSeconds = market.minBiddingSeconds;
        _maxBiddingSeconds = market.maxBiddingSeconds;
        _softCloseSeconds = market.softCloseSeconds;
        _softCloseMax = market.softCloseMax;
        _connectWindowSeconds = market.connectWindowSeconds;
        _tokenValidityMin = market.tokenValidityMin;
        _tokenValidityMax = market.tokenValidityMax;
        _challengeSeconds = market.challengeSeconds;
        _graceSeconds = market.graceSeconds;
        _bondBps = market.bondBps;
        _domainChainId = block.chainid;
        _domainSeparator = _newDomainSeparator();
    }

    // ------------------------------------------------------------ organisation

    /// @inheritdoc IV2VCharging
    function addEV(address ev, bytes32 info) external onlyOwner {
        _requireActive();
        AccountWord storage account = _accounts[ev];
        if (account.addedAt != 0) revert AlreadyEV(ev);
        account.addedAt = uint40(block.timestamp);
        _infos[ev] = info;
        emit EVAdded(ev, info);
    }

    /// @inheritdoc IV2VCharging
    function removeEV(address ev) external onlyOwner {
        AccountWord storage account = _accounts[ev];
        if (account.addedAt == 0) return;
        account.addedAt = 0; // balance, index and operator bonds stay: its exits need them
        delete _infos[ev];
        emit EVRemoved(ev);
    }

    /// @inheritdoc IV2VCharging
    function changeStatus(bool active) external onlyOwner {
        status = active;
        emit StatusChanged(active);
    }

    // ------------------------------------------------------------------ ledger

    /// @inheritdoc IV2VCharging
    function deposit() external payable {
        _receive();
        _credit(msg.sender, msg.value);
    }

    /// @inheritdoc IV2VCharging
    function withdraw(uint256 amount, address to) external {
        if (to == address(0)) revert ZeroAddress();
        AccountWord storage account = _accounts[msg.sender];
        uint256 balance = account.balance;
        if (amount > balance) revert Insufficient(balance, amount);
        account.balance = uint96(balance - amount);
        emit Withdrawn(msg.sender, to, amount);
        (bool paid,) = to.call{value: amount}(""); // the only external call, after all state is written
        if (!paid) revert TransferFailed();
    }

    /// @inheritdoc IV2VCharging
    function setOperator(address operator, uint128 bondLimit) external {
        // Saturating is exact: no bonds above 96 bits can exist.
        uint96 limit = bondLimit > type(uint96).max ? type(uint96).max : uint96(bondLimit);
        _operators[msg.sender] = OperatorWord(operator, limit);
        emit OperatorSet(msg.sender, operator, limit);
    }

    // ----------------------------------------------------------------- auction

    /// @inheritdoc IV2VCharging
    function startAuction(
        uint64 energyWh,
        uint64 biddingSeconds,
        uint128 startRate,
        uint64 tokenValiditySeconds,
        bytes32 terms
    ) external payable {
        _requireActive();
        _requireEV(msg.sender);
        AuctionWord a = _auctions[msg.sender];
        if (a.energyWh() != 0) revert AuctionLive();
        if (energyWh == 0 || energyWh > Words.ENERGY_WH_MAX) revert EnergyOutOfRange(Words.ENERGY_WH_MAX);
        if (startRate == 0 || startRate > Words.RATE_MAX) revert RateOutOfRange(Words.RATE_MAX);
        if (tokenValiditySeconds < _tokenValidityMin || tokenValiditySeconds > _tokenValidityMax) {
            revert ValidityOutOfRange(_tokenValidityMin, _tokenValidityMax);
        }
        uint256 nonce = a.auctionNonce() + 1;
        if (nonce > Words.NONCE_MAX) revert NonceExhausted();

        a = Words.newAuction(startRate, _closingTime(biddingSeconds), nonce, energyWh, tokenValiditySeconds);
        _lock(msg.sender, _costCeil(startRate, energyWh));
        _auctions[msg.sender] = a;
        emit AuctionStarted(
            msg.sender, uint64(nonce), energyWh, startRate, uint64(a.closingTime()), tokenValiditySeconds, terms
        );
    }

    /// @inheritdoc IV2VCharging
    function placeBid(address consumer, uint64 auctionNonce_, uint128 rate) external payable {
        _bid(msg.sender, consumer, auctionNonce_, rate);
    }

    /// @inheritdoc IV2VCharging
    function placeBidFor(address provider, address consumer, uint64 auctionNonce_, uint128 rate) external {
        if (_operators[provider].operator != msg.sender) revert NotOperator();
        _bid(provider, consumer, auctionNonce_, rate);
    }

    /// @inheritdoc IV2VCharging
    function endAuction(address consumer) external {
        AuctionWord a = _closedAuction(consumer);
        uint256 rate = a.rate();
        // With a winner nothing is left to store: time has fixed it, and the next word written is `connect`'s.
        if (rate == 0) _refund(consumer, a);
        emit AuctionEnded(consumer, uint64(a.auctionNonce()), _evAt[a.bidder()], uint128(rate));
    }

    /// @inheritdoc IV2VCharging
    function cancelAuction(address consumer) external {
        AuctionWord a = _liveAuction(consumer);
        if (!_isCancellable(consumer, a)) revert NotCancellable();
        _refund(consumer, a);
        emit AuctionCancelled(consumer, uint64(a.auctionNonce()));
    }

    // ----------------------------------------------------------------- session

    /// @inheritdoc IV2VCharging
    function connect(address provider, uint64 energyWh) external returns (bytes32 token) {
        _requireActive();
        AuctionWord a = _closedAuction(msg.sender);
        uint256 validity = block.timestamp + a.validity();
        uint256 winner = a.bidder(); // 0: nobody bid
        if (winner == 0 || winner != _accounts[provider].index) revert NotWinner(_evAt[winner]);
        if (a.energyWh() != energyWh) revert WrongEnergy(uint64(a.energyWh()));
        uint256 connectBy = a.closingTime() + _connectWindowSeconds;
        if (block.timestamp > connectBy) revert ConnectExpired(uint64(connectBy));
        _requireEV(msg.sender);
        _requireEV(provider);

        token = keccak256(abi.encodePacked(msg.sender, provider, block.timestamp, validity));
        // Cannot happen (a consumer's next auction closes at least a second later), and must not.
        if (_sessions[token].energyWh() != 0) revert TokenExists(token);

        SessionWord s = a.newSession(_accounts[msg.sender].index, validity + _graceSeconds);
        _auctions[msg.sender] = a.freed();
        _sessions[token] = s;
        _credit(msg.sender, _costCeil(a.startRate(), energyWh) - _costCeil(s.rate(), energyWh));
        emit Connected(provider, msg.sender, token, validity);
        _emitSessionOpened(s, token, provider, validity);
    }

    /// @inheritdoc IV2VCharging
    function endConnection(bytes32 token, uint64 deliveredWh, Ack calldata ack) external {
        (SessionWord s, address consumer, address provider) = _openSession(token, deliveredWh);
        if (msg.sender == consumer) {
            _concede(token, s, consumer, provider, deliveredWh);
        } else if (msg.sender == provider || msg.sender == _operators[provider].operator) {
            if (deliveredWh > s.claimedWh()) {
                _requireProof(s, consumer, provider, deliveredWh, ack);
                s = s.withClaim(deliveredWh);
            }
            _settle(token, s, consumer, provider);
        } else {
            revert NotParty();
        }
    }

    /// @inheritdoc IV2VCharging
    function submitReceipt(bytes32 token, uint64 deliveredWh, Ack calldata ack) external {
        (SessionWord s, address consumer, address provider) = _openSession(token, deliveredWh);
        _requireProof(s, consumer, provider, deliveredWh, ack);
        if (deliveredWh <= s.claimedWh()) return;
        _sessions[token] = s.withClaim(deliveredWh);
        emit ReceiptAccepted(token, consumer, provider, deliveredWh);
    }

    /// @inheritdoc IV2VCharging
    function settle(bytes32 token) external {
        (SessionWord s, address consumer, address provider) = _openSession(token, 0);
        if (block.timestamp < s.settleAt()) revert TooEarly(uint64(s.settleAt()));
        _settle(token, s, consumer, provider);
    }

    // ------------------------------------------------------------------- views

    /// @inheritdoc IV2VCharging
    function sessionIdOf(address consumer, address provider, uint64 auctionNonce_) public view returns (bytes32) {
        return keccak256(abi.encode(block.chainid, address(this), consumer, provider, auctionNonce_));
    }

    /// @inheritdoc IV2VCharging
    function isReceiptValid(bytes32 token, uint64 deliveredWh, Ack calldata ack) external view returns (bool) {
        SessionWord s = _sessions[token];
        if (s.energyWh() == 0 || deliveredWh > s.energyWh()) return false;
        return _isProven(s, _evAt[s.consumer()], _evAt[s.provider()], deliveredWh, ack);
    }

    /// @inheritdoc IV2VCharging
    function sessions(bytes32 token) external view returns (Session memory session) {
        SessionWord s = _sessions[token];
        if (s.energyWh() == 0) return session;
        session.status = s.closing() ? SessionStatus.Closing : SessionStatus.Active;
        session.consumer = _evAt[s.consumer()];
        session.provider = _evAt[s.provider()];
        session.auctionNonce = uint64(s.auctionNonce());
        session.energyWh = uint64(s.energyWh());
        session.claimedWh = uint64(s.claimedWh());
        session.rate = uint128(s.rate());
        session.deposit = _costCeil(s.rate(), s.energyWh());
        session.bond = _bondOf(session.deposit);
        session.settleAt = uint64(s.settleAt());
        session.operatorBond = s.operatorBond();
    }

    /// @inheritdoc IV2VCharging
    function auctions(address consumer) external view returns (Auction memory auction) {
        AuctionWord a = _auctions[consumer];
        auction.auctionNonce = uint64(a.auctionNonce());
        if (a.energyWh() == 0) return auction;
        auction.live = true;
        auction.energyWh = uint64(a.energyWh());
        auction.startRate = uint128(a.startRate());
        auction.rate = uint128(a.rate());
        auction.provider = _evAt[a.bidder()];
        auction.closingTime = uint64(a.closingTime());
        auction.connectBy = uint64(a.closingTime() + _connectWindowSeconds);
        auction.tokenValiditySeconds = uint64(a.validity());
        auction.deposit = _costCeil(a.startRate(), a.energyWh());
        auction.bond = _bondOf(_costCeil(a.rate(), a.energyWh()));
        auction.operatorBond = a.operatorBond();
    }

    /// @inheritdoc IV2VCharging
    function auctionNonce(address consumer) external view returns (uint64) {
        return uint64(_auctions[consumer].auctionNonce());
    }

    /// @inheritdoc IV2VCharging
    function balances(address account) external view returns (uint256) {
        return _accounts[account].balance;
    }

    /// @inheritdoc IV2VCharging
    function isEV(address account) public view returns (bool) {
        return _accounts[account].addedAt != 0;
    }

    /// @inheritdoc IV2VCharging
    function evInfo(address ev) external view returns (bytes32 info, uint64 addedAt) {
        return (_infos[ev], _accounts[ev].addedAt);
    }

    /// @inheritdoc IV2VCharging
    function operatorOf(address account)
        external
        view
        returns (address operator, uint128 bondLimit, uint128 bondLocked)
    {
        OperatorWord storage o = _operators[account];
        return (o.operator, o.bondLimit, _accounts[account].operatorBonds);
    }

    /// @inheritdoc IV2VCharging
    function parameters() external view returns (MarketParameters memory) {
        return MarketParameters({
            minBiddingSeconds: uint32(_minBiddingSeconds),
            maxBiddingSeconds: uint32(_maxBiddingSeconds),
            softCloseSeconds: uint32(_softCloseSeconds),
            softCloseMax: uint32(_softCloseMax),
            connectWindowSeconds: uint32(_connectWindowSeconds),
            tokenValidityMin: uint32(_tokenValidityMin),
            tokenValidityMax: uint32(_tokenValidityMax),
            challengeSeconds: uint32(_challengeSeconds),
            graceSeconds: uint32(_graceSeconds),
            bondBps: uint32(_bondBps)
        });
    }

    /// @inheritdoc IV2VCharging
    function domainSeparator() public view returns (bytes32) {
        return block.chainid == _domainChainId ? _domainSeparator : _newDomainSeparator();
    }

    // ---------------------------------------------------------- inside: guards

    function _requireActive() private view {
        if (!status) revert MarketInactive();
    }

    function _requireEV(address account) private view {
        if (!isEV(account)) revert NotEV(account);
    }

    function _liveAuction(address consumer) private view returns (AuctionWord a) {
        a = _auctions[consumer];
        if (a.energyWh() == 0) revert NoAuction();
    }

    function _closedAuction(address consumer) private view returns (AuctionWord a) {
        a = _liveAuction(consumer);
        if (block.timestamp < a.closingTime()) revert AuctionOpen(uint64(a.closingTime()));
    }

    function _openSession(bytes32 token, uint256 deliveredWh)
        private
        view
        returns (SessionWord s, address consumer, address provider)
    {
        s = _sessions[token];
        if (s.energyWh() == 0) revert NoSession(token);
        if (deliveredWh > s.energyWh()) revert OverAmount(uint64(s.energyWh()));
        (consumer, provider) = (_evAt[s.consumer()], _evAt[s.provider()]);
    }

    function _isCancellable(address consumer, AuctionWord a) private view returns (bool) {
        bool bidless = a.rate() == 0;
        if (bidless && msg.sender == consumer) return true;
        if (block.timestamp < a.closingTime()) return false;
        if (block.timestamp > a.closingTime() + _connectWindowSeconds) return true;
        return !status || !isEV(consumer) || (!bidless && !isEV(_evAt[a.bidder()]));
    }

    // ---------------------------------------------------------- inside: ledger

    /// @dev Announce the value that came with the call. The bound makes every later 96-bit sum safe: balances, deposits
    /// and bonds together are never more than what the contract holds.
    function _receive() private {
        if (msg.value == 0) return;
        if (address(this).balance > type(uint96).max) revert LedgerFull();
        emit Deposited(msg.sender, msg.value);
    }

    function _credit(address account, uint256 amount) private {
        if (amount != 0) _accounts[account].balance += uint96(amount);
    }

    /// @dev Credit the value sent, then lock `amount` of the ledger; written only when something changed. Gives the
    /// account its index. `msg.value` is the caller's own: `placeBidFor`, the only call for somebody else, is not payable.
    function _lock(address who, uint256 amount) private returns (uint256 index) {
        _receive();
        AccountWord storage account = _accounts[who];
        uint256 available = account.balance + msg.value;
        if (available < amount) revert Insufficient(available, amount);
        if (msg.value != amount) account.balance = uint96(available - amount);
        if (msg.sender != who) {
            // its operator: only as far as it was trusted
            uint256 limit = _operators[who].bondLimit;
            uint256 locked = account.operatorBonds + amount;
            if (locked > limit) revert OperatorLimit(limit, locked);
            account.operatorBonds = uint96(locked);
        }
        index = account.index;
        if (index == 0) {
            index = ++_evCount; // checked; only registered EVs come here, so the organisation bounds their number
            account.index = uint24(index);
            _evAt[index] = who;
        }
    }

    /// @dev Pay a bond back (and more) to a provider, and take it off its operator's limit if it counted there.
    function _creditProvider(address provider, uint256 amount, uint256 bond, bool operatorBond) private {
        AccountWord storage account = _accounts[provider];
        account.balance += uint96(amount);
        if (operatorBond) account.operatorBonds -= uint96(bond);
    }

    // --------------------------------------------------------- inside: auction

    function _closingTime(uint256 biddingSeconds) private view returns (uint256 closing) {
        if (biddingSeconds < _minBiddingSeconds || biddingSeconds > _maxBiddingSeconds) {
            revert BiddingOutOfRange(_minBiddingSeconds, _maxBiddingSeconds);
        }
        closing = block.timestamp + biddingSeconds;
        // Every soft close included, the time must fit its 32 bits: from the year 2106 on no auction starts any more.
        if (closing + _softCloseMax * _softCloseSeconds > Words.TIME_MAX) revert ClockExhausted();
    }

    function _bid(address provider, address consumer, uint64 auctionNonce_, uint128 rate) private {
        _requireActive();
        _requireEV(provider);
        if (provider == consumer) revert SelfDeal();
        AuctionWord a = _liveAuction(consumer);
        uint256 closing = a.closingTime();
        if (a.auctionNonce() != auctionNonce_) revert StaleAuction(uint64(a.auctionNonce()));
        if (block.timestamp >= closing) revert AuctionClosed(uint64(closing));
        uint256 rateMax = _rateMax(a);
        if (rate == 0) revert RateOutOfRange(rateMax);
        if (rate > rateMax) revert BidTooHigh(rateMax);

        _releaseBond(a); // first, so that a leading provider can pay a lower bid with its own bond
        uint256 index = _lock(provider, _bondOf(_costCeil(rate, a.energyWh())));
        uint256 softCloses = a.softCloses();
        if (block.timestamp + _softCloseSeconds > closing && softCloses < _softCloseMax) {
            closing = block.timestamp + _softCloseSeconds;
            ++softCloses;
        }
        _auctions[consumer] = a.withBid(rate, index, closing, softCloses, msg.sender != provider);
        emit BidPlaced(consumer, auctionNonce_, provider, rate, uint64(closing));
    }

    /// @dev The first bid may equal the start rate; a later one must be lower by max(1, 1 %).
    function _rateMax(AuctionWord a) private pure returns (uint256 rate) {
        rate = a.rate();
        if (rate == 0) return a.startRate();
        return rate < 100 ? rate - 1 : rate - rate / 100;
    }

    /// @dev Give the leading bidder, if there is one, its bond back.
    function _releaseBond(AuctionWord a) private {
        if (a.rate() == 0) return;
        uint256 bond = _bondOf(_costCeil(a.rate(), a.energyWh()));
        _creditProvider(_evAt[a.bidder()], bond, bond, a.operatorBond());
    }

    /// @dev Free the auction; everything locked in it goes back to where it came from.
    function _refund(address consumer, AuctionWord a) private {
        _auctions[consumer] = a.freed();
        _releaseBond(a);
        _credit(consumer, _costCeil(a.startRate(), a.energyWh()));
    }

    // --------------------------------------------------------- inside: session

    function _emitSessionOpened(SessionWord s, bytes32 token, address provider, uint256 validity) private {
        uint256 cost = _costCeil(s.rate(), s.energyWh());
        emit SessionOpened({
            sessionId: sessionIdOf(msg.sender, provider, uint64(s.auctionNonce())),
            token: token,
            consumer: msg.sender,
            provider: provider,
            auctionNonce: uint64(s.auctionNonce()),
            energyWh: uint64(s.energyWh()),
            rate: uint128(s.rate()),
            deposit: cost,
            bond: _bondOf(cost),
            issuedAt: uint64(block.timestamp),
            validity: uint64(validity)
        });
    }

    /// @dev The consumer's own end: raises the claim, opens the challenge once, settles a full order at once.
    function _concede(bytes32 token, SessionWord s, address consumer, address provider, uint256 deliveredWh) private {
        bool raised = deliveredWh > s.claimedWh();
        if (raised) s = s.withClaim(deliveredWh);
        if (s.claimedWh() == s.energyWh()) return _settle(token, s, consumer, provider);
        if (!s.closing()) {
            uint256 closeAt = block.timestamp + _challengeSeconds;
            s = s.withClosing(closeAt < s.settleAt() ? closeAt : s.settleAt()); // never later than validity + grace
        } else if (!raised) {
            return;
        }
        _sessions[token] = s;
        emit ConnectionClosing(token, consumer, provider, uint64(s.claimedWh()), uint64(s.settleAt()));
    }

    /// @dev Pays what is claimed, once: the word is cleared first, and a token can never open again.
    function _settle(bytes32 token, SessionWord s, address consumer, address provider) private {
        _sessions[token] = SessionWord.wrap(0);
        uint256 cost = _costCeil(s.rate(), s.energyWh());
        uint256 fee = _costFloor(s.rate(), s.claimedWh());
        uint256 bond = _bondOf(cost);
        _creditProvider(provider, fee + bond, bond, s.operatorBond());
        _credit(consumer, cost - fee);
        emit ConnectionEnded(token, consumer, provider, uint64(s.claimedWh()), fee);
    }

    function _requireProof(SessionWord s, address consumer, address provider, uint256 deliveredWh, Ack calldata ack)
        private
        view
    {
        if (!_isProven(s, consumer, provider, deliveredWh, ack)) revert InvalidReceipt();
    }

    /// @dev Plain ECDSA, 65 bytes, low s (OpenZeppelin), never ERC-1271: code that a consumer sets on its account after
    /// charging (EIP-7702) must not disown its receipts.
    function _isProven(SessionWord s, address consumer, address provider, uint256 deliveredWh, Ack calldata ack)
        private
        view
        returns (bool)
    {
        bytes32 sessionId = sessionIdOf(consumer, provider, uint64(s.auctionNonce()));
        address signer = ack.sessionKey;
        if (signer == address(0)) {
            signer = consumer;
        } else {
            if (deliveredWh > ack.maxEnergyWh) return false;
            bytes32 grant = keccak256(
                abi.encode(
                    PRESENT_TOKEN_TYPEHASH,
                    ack.token,
                    sessionId,
                    provider,
                    signer,
                    ack.maxEnergyWh,
                    ack.validUntil,
                    ack.challenge
                )
            );
            if (!_isSignedBy(consumer, grant, ack.grantSignature)) return false;
        }
        bytes32 receipt = keccak256(abi.encode(RECEIPT_TYPEHASH, sessionId, deliveredWh));
        return _isSignedBy(signer, receipt, ack.receiptSignature);
    }

    function _isSignedBy(address signer, bytes32 structHash, bytes calldata signature) private view returns (bool) {
        bytes32 digest = keccak256(abi.encodePacked("\x19\x01", domainSeparator(), structHash));
        (address recovered, ECDSA.RecoverError fault,) = ECDSA.tryRecoverCalldata(digest, signature);
        return fault == ECDSA.RecoverError.NoError && recovered == signer;
    }

    function _newDomainSeparator() private view returns (bytes32) {
        return
            keccak256(
                abi.encode(DOMAIN_TYPEHASH, keccak256("V2VCharging"), keccak256("1"), block.chainid, address(this))
            );
    }

    // ------------------------------------------------------ inside: arithmetic
    // Unchecked: rate < 2**64 and energy < 2**24 were enforced at the entrance, so nothing here passes 2**103.

    /// @dev What is locked for `energyWh`.
    function _costCeil(uint256 rate, uint256 energyWh) private pure returns (uint256) {
        unchecked {
            return (rate * energyWh + (WH_PER_KWH - 1)) / WH_PER_KWH;
        }
    }

    /// @dev What is paid for `energyWh`.
    function _costFloor(uint256 rate, uint256 energyWh) private pure returns (uint256) {
        unchecked {
            return (rate * energyWh) / WH_PER_KWH;
        }
    }

    /// @dev The provider's bond: its share of the locked cost, rounded up.
    function _bondOf(uint256 cost) private view returns (uint256) {
        unchecked {
            return (cost * _bondBps + (BPS - 1)) / BPS;
        }
    }
}
