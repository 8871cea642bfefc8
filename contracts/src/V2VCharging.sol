// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

import {Ownable} from "@openzeppelin/contracts/access/Ownable.sol";
import {Ownable2Step} from "@openzeppelin/contracts/access/Ownable2Step.sol";
import {ECDSA} from "@openzeppelin/contracts/utils/cryptography/ECDSA.sol";
import {IV2VCharging} from "./IV2VCharging.sol";
import {AccountWord, AuctionWord, OperatorWord, RulesWord, SessionWord, Words} from "./Words.sol";

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
/// That is why sums inside a word are unchecked: test/Proofs.t.sol proves it, test/Invariants.t.sol holds it to it.
contract V2VCharging is IV2VCharging, Ownable2Step {
    // ---------------------------------------------------------------- storage

    /// @dev A word in a struct can be pointed at: read and written again without hashing its place twice.
    struct Account {
        AccountWord word;
    }

    // These two share a word with Ownable2Step's pending owner; the index keeps it from ever returning to zero, so a
    // switch costs the same both ways.
    bool public status = true;
    uint24 private _nextIndex = 1; // 0 names nobody

    mapping(address account => Account) private _accounts;
    mapping(address account => OperatorWord) private _operators;
    mapping(address ev => bytes32 info) private _infos;
    mapping(uint256 index => address ev) private _evAt;
    mapping(address consumer => AuctionWord) private _auctions;
    mapping(bytes32 token => SessionWord) private _sessions;

    // -------------------------------------------------- constants, immutables

    uint256 private constant WH_PER_KWH = 1000;

    bytes32 private constant DOMAIN_TYPEHASH =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");
    bytes32 private constant PRESENT_TOKEN_TYPEHASH = keccak256(
        "PresentToken(bytes32 token,bytes32 sessionId,address provider,address sessionKey,uint64 maxEnergyWh,uint64 validUntil,bytes32 challenge)"
    );
    bytes32 private constant RECEIPT_TYPEHASH = keccak256("Receipt(bytes32 sessionId,uint64 deliveredWh)");

    RulesWord private immutable _rules;

    constructor(MarketParameters memory market) Ownable(msg.sender) {
        (RulesWord rules, bool fits) = Words.newRules(market);
        (uint256 min, uint256 max) = rules.biddingRange();
        (uint256 validityMin, uint256 validityMax) = rules.tokenValidityRange();
        if (!fits || min == 0 || min > max || validityMin == 0 || validityMin > validityMax) revert BadParameters();
        _rules = rules;
    }

    // ------------------------------------------------------------ organisation

    /// @inheritdoc IV2VCharging
    function addEV(address ev, bytes32 info) external onlyOwner {
        _requireActive();
        Account storage account = _accounts[ev];
        if (account.word.isEV()) revert AlreadyEV(ev);
        account.word = account.word.registered(block.timestamp);
        _infos[ev] = info;
        emit EVAdded(ev, info);
    }

    /// @inheritdoc IV2VCharging
    function removeEV(address ev) external onlyOwner {
        Account storage account = _accounts[ev];
        if (!account.word.isEV()) return;
        account.word = account.word.removed(); // balance, index and operator bonds stay: its exits need them
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
        Account storage account = _accounts[msg.sender];
        account.word = _debited(account.word, amount);
        emit Withdrawn(msg.sender, to, amount);
        // The only external call, after all state is written; what it returns is not even copied.
        if (!_pay(to, amount)) revert TransferFailed();
    }

    /// @inheritdoc IV2VCharging
    function setOperator(address operator, uint128 bondLimit) external {
        // Saturating is exact: no bonds above 96 bits can exist.
        if (bondLimit > type(uint96).max) bondLimit = type(uint96).max;
        _operators[msg.sender] = Words.newOperator(operator, bondLimit);
        emit OperatorSet(msg.sender, operator, bondLimit);
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
        AuctionWord a = _auctions[msg.sender];
        if (a.isLive()) revert AuctionLive();
        if (_isOutside(energyWh, 1, Words.ENERGY_WH_MAX)) revert EnergyOutOfRange(Words.ENERGY_WH_MAX);
        if (_isOutside(startRate, 1, Words.RATE_MAX)) revert RateOutOfRange(Words.RATE_MAX);
        (uint256 min, uint256 max) = _rules.tokenValidityRange();
        if (_isOutside(tokenValiditySeconds, min, max)) revert ValidityOutOfRange(min, max);
        uint256 nonce = a.auctionNonce();
        unchecked {
            if (++nonce > Words.NONCE_MAX) revert NonceExhausted();
        }

        a = Words.newAuction(startRate, _closingTime(biddingSeconds), nonce, energyWh, tokenValiditySeconds);
        (uint256 cost,) = _locked(startRate, energyWh);
        _lock(msg.sender, cost);
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
        if (_operators[provider].operator() != msg.sender) revert NotOperator();
        _bid(provider, consumer, auctionNonce_, rate);
    }

    /// @inheritdoc IV2VCharging
    function endAuction(address consumer) external {
        AuctionWord a = _closedAuction(consumer);
        uint256 rate = a.rate();
        // With a winner nothing is left to store: time has fixed it, and the next word written is `connect`'s.
        if (rate == 0) _refund(consumer, a);
        emit AuctionEnded(consumer, uint64(a.auctionNonce()), _ev(a.bidder()), uint128(rate));
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
        uint256 winner = a.bidder(); // 0: nobody bid
        AccountWord them = _accounts[provider].word;
        if (winner == 0 || winner != them.index()) revert NotWinner(_ev(winner));
        if (a.energyWh() != energyWh) revert WrongEnergy(uint64(a.energyWh()));
        uint256 connectBy = _connectBy(a);
        if (block.timestamp > connectBy) revert ConnectExpired(uint64(connectBy));
        AccountWord we = _accounts[msg.sender].word;
        _requireEV(msg.sender, we);
        _requireEV(provider, them);

        uint256 validity;
        uint256 settleAt;
        unchecked {
            validity = block.timestamp + a.validity();
            settleAt = validity + _rules.graceSeconds();
        }
        token = keccak256(abi.encodePacked(msg.sender, provider, block.timestamp, validity));
        // Cannot happen (a consumer's next auction closes at least a second later), and must not.
        if (_sessions[token].isOpen()) revert TokenExists(token);

        _auctions[msg.sender] = a.freed();
        _sessions[token] = a.newSession(we.index(), settleAt);
        (uint256 cost, uint256 bond) = _locked(a.rate(), energyWh);
        (uint256 startCost,) = _locked(a.startRate(), energyWh);
        unchecked {
            _credit(msg.sender, startCost - cost); // the winner's rate is not above the start rate
        }
        emit Connected(provider, msg.sender, token, validity);
        _emitSessionOpened(a, token, provider, cost, bond, validity);
    }

    /// @inheritdoc IV2VCharging
    function endConnection(bytes32 token, uint64 deliveredWh, Ack calldata ack) external {
        (SessionWord s, address consumer, address provider) = _openSession(token);
        _requireWithin(s, deliveredWh);
        if (msg.sender == consumer) {
            _concede(token, s, consumer, provider, deliveredWh);
        } else if (msg.sender == provider || msg.sender == _operators[provider].operator()) {
            if (deliveredWh > s.claimedWh()) s = _proven(s, consumer, provider, deliveredWh, ack);
            _settle(token, s, consumer, provider);
        } else {
            revert NotParty();
        }
    }

    /// @inheritdoc IV2VCharging
    function submitReceipt(bytes32 token, uint64 deliveredWh, Ack calldata ack) external {
        (SessionWord s, address consumer, address provider) = _openSession(token);
        _requireWithin(s, deliveredWh);
        SessionWord raised = _proven(s, consumer, provider, deliveredWh, ack);
        if (deliveredWh <= s.claimedWh()) return;
        _sessions[token] = raised;
        emit ReceiptAccepted(token, consumer, provider, deliveredWh);
    }

    /// @inheritdoc IV2VCharging
    function settle(bytes32 token) external {
        (SessionWord s, address consumer, address provider) = _openSession(token);
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
        if (!s.isOpen() || deliveredWh > s.energyWh()) return false;
        (address consumer, address provider) = _parties(s);
        return _isProven(s, consumer, provider, deliveredWh, ack);
    }

    // The next two and `parameters` write their structs word by word, in the order of the fields, and return them there
    // and then. `calldata` is a pointer nobody follows: with `memory` the compiler would first store a zero into every
    // field, one by one, for 100 bytes of code each. To whoever calls, both are the same.

    /// @inheritdoc IV2VCharging
    function sessions(bytes32 token) external view returns (Session calldata) {
        SessionWord s = _sessions[token];
        (address consumer, address provider) = _parties(s);
        uint256[11] memory session;
        if (s.closing()) session[0] = uint256(SessionStatus.Closing);
        else if (s.isOpen()) session[0] = uint256(SessionStatus.Active);
        session[1] = uint160(consumer);
        session[2] = uint160(provider);
        session[3] = s.auctionNonce();
        session[4] = s.energyWh();
        session[5] = s.claimedWh();
        session[6] = s.rate();
        (session[7], session[8]) = _locked(s.rate(), s.energyWh()); // deposit, bond
        session[9] = s.settleAt();
        session[10] = s.operatorBond();
        assembly ("memory-safe") {
            return(session, 352)
        }
    }

    /// @inheritdoc IV2VCharging
    function auctions(address consumer) external view returns (Auction calldata) {
        AuctionWord a = _auctions[consumer];
        uint256[12] memory auction;
        if (a.isLive()) {
            auction[0] = 1;
            auction[7] = _connectBy(a); // the rest of a word that is not live is zero
        }
        auction[1] = a.auctionNonce();
        auction[2] = a.energyWh();
        auction[3] = a.startRate();
        auction[4] = a.rate();
        auction[5] = uint160(_ev(a.bidder()));
        auction[6] = a.closingTime();
        auction[8] = a.validity();
        (auction[9],) = _locked(a.startRate(), a.energyWh()); // deposit
        (, auction[10]) = _locked(a.rate(), a.energyWh()); // bond
        auction[11] = a.operatorBond();
        assembly ("memory-safe") {
            return(auction, 384)
        }
    }

    /// @inheritdoc IV2VCharging
    function auctionNonce(address consumer) external view returns (uint64) {
        return uint64(_auctions[consumer].auctionNonce());
    }

    /// @inheritdoc IV2VCharging
    function balances(address account) external view returns (uint256) {
        return _accounts[account].word.balance();
    }

    /// @inheritdoc IV2VCharging
    function isEV(address account) public view returns (bool) {
        return _accounts[account].word.isEV();
    }

    /// @inheritdoc IV2VCharging
    function evInfo(address ev) external view returns (bytes32 info, uint64 addedAt) {
        return (_infos[ev], uint64(_accounts[ev].word.addedAt()));
    }

    /// @inheritdoc IV2VCharging
    function operatorOf(address account)
        external
        view
        returns (address operator, uint128 bondLimit, uint128 bondLocked)
    {
        OperatorWord o = _operators[account];
        return (o.operator(), uint128(o.bondLimit()), uint128(_accounts[account].word.operatorBonds()));
    }

    /// @inheritdoc IV2VCharging
    function parameters() external view returns (MarketParameters calldata) {
        uint256[10] memory market = _rules.parameters();
        assembly ("memory-safe") {
            return(market, 320)
        }
    }

    /// @inheritdoc IV2VCharging
    function domainSeparator() public view returns (bytes32) {
        // Not cached: a copy that a forked chain's id must be compared with first costs more code than it spares gas.
        return
            keccak256(
                abi.encode(DOMAIN_TYPEHASH, keccak256("V2VCharging"), keccak256("1"), block.chainid, address(this))
            );
    }

    // ---------------------------------------------------------- inside: guards

    /// @dev The EV that a word's index names: one copy of the look-up, which is cheaper to deploy than a dozen.
    function _ev(uint256 index) private view returns (address) {
        return _evAt[index];
    }

    /// @dev One comparison: below `min` the subtraction wraps to something enormous. Expects min <= max.
    function _isOutside(uint256 value, uint256 min, uint256 max) private pure returns (bool) {
        unchecked {
            return value - min > max - min;
        }
    }

    function _requireActive() private view {
        if (!status) revert MarketInactive();
    }

    function _requireEV(address who, AccountWord account) private pure {
        if (!account.isEV()) revert NotEV(who);
    }

    function _liveAuction(address consumer) private view returns (AuctionWord a) {
        a = _auctions[consumer];
        if (!a.isLive()) revert NoAuction();
    }

    function _closedAuction(address consumer) private view returns (AuctionWord a) {
        a = _liveAuction(consumer);
        if (block.timestamp < a.closingTime()) revert AuctionOpen(uint64(a.closingTime()));
    }

    function _openSession(bytes32 token) private view returns (SessionWord s, address consumer, address provider) {
        s = _sessions[token];
        if (!s.isOpen()) revert NoSession(token);
        (consumer, provider) = _parties(s);
    }

    function _requireWithin(SessionWord s, uint256 deliveredWh) private pure {
        if (deliveredWh > s.energyWh()) revert OverAmount(uint64(s.energyWh()));
    }

    /// @dev Zero without a session: index 0 names nobody.
    function _parties(SessionWord s) private view returns (address consumer, address provider) {
        return (_ev(s.consumer()), _ev(s.provider()));
    }

    function _isCancellable(address consumer, AuctionWord a) private view returns (bool) {
        bool bidless = a.rate() == 0;
        if (bidless && msg.sender == consumer) return true;
        if (block.timestamp < a.closingTime()) return false;
        if (block.timestamp > _connectBy(a)) return true;
        return !status || !isEV(consumer) || (!bidless && !isEV(_ev(a.bidder())));
    }

    // ---------------------------------------------------------- inside: ledger

    /// @dev Announce the value that came with the call. The bound makes every later 96-bit sum safe: balances, deposits
    /// and bonds together are never more than what the contract holds.
    function _receive() private {
        if (msg.value == 0) return;
        if (address(this).balance > type(uint96).max) revert LedgerFull();
        emit Deposited(msg.sender, msg.value);
    }

    /// @dev Pay into a ledger; `amount` may carry a release of operator bonds (see `Words.released`).
    function _credit(address account, uint256 amount) private {
        if (amount == 0) return;
        Account storage to = _accounts[account];
        to.word = to.word.credited(amount);
    }

    function _debited(AccountWord w, uint256 amount) private pure returns (AccountWord) {
        if (amount > w.balance()) revert Insufficient(w.balance(), amount);
        return w.debited(amount);
    }

    /// @dev Credit the value sent, then lock `amount` of the ledger; written only when something changed. Gives the
    /// account its index. `msg.value` is the caller's own: `placeBidFor`, the only call for somebody else, is not payable.
    function _lock(address who, uint256 amount) private returns (uint256 index) {
        _receive();
        Account storage account = _accounts[who];
        AccountWord before = account.word;
        _requireEV(who, before);
        AccountWord w = _debited(before.credited(msg.value), amount);
        if (msg.sender != who) {
            // its operator: only as far as it was trusted
            w = w.bonded(amount);
            uint256 limit = _operators[who].bondLimit();
            if (w.operatorBonds() > limit) revert OperatorLimit(limit, w.operatorBonds());
        }
        index = w.index();
        if (index == 0) {
            index = _nextIndex++; // checked; only registered EVs come here, so the organisation bounds their number
            w = w.withIndex(index);
            _evAt[index] = who;
        }
        if (AccountWord.unwrap(w) != AccountWord.unwrap(before)) account.word = w;
    }

    /// @dev The only external call. Nothing is sent along but the money, and what comes back is not even copied.
    function _pay(address to, uint256 amount) private returns (bool paid) {
        assembly ("memory-safe") {
            paid := call(gas(), to, amount, 0, 0, 0, 0)
        }
    }

    // --------------------------------------------------------- inside: auction

    function _closingTime(uint256 biddingSeconds) private view returns (uint256 closing) {
        (uint256 min, uint256 max) = _rules.biddingRange();
        if (_isOutside(biddingSeconds, min, max)) revert BiddingOutOfRange(min, max);
        unchecked {
            closing = block.timestamp + biddingSeconds;
            // Every soft close included, the time must fit its 32 bits: from the year 2106 on no auction starts any more.
            if (closing + _rules.softCloseMax() * _rules.softCloseSeconds() > Words.TIME_MAX) revert ClockExhausted();
        }
    }

    function _connectBy(AuctionWord a) private view returns (uint256) {
        unchecked {
            return a.closingTime() + _rules.connectWindowSeconds();
        }
    }

    function _bid(address provider, address consumer, uint64 auctionNonce_, uint128 rate) private {
        _requireActive();
        if (provider == consumer) revert SelfDeal();
        AuctionWord a = _liveAuction(consumer);
        uint256 closing = a.closingTime();
        if (a.auctionNonce() != auctionNonce_) revert StaleAuction(uint64(a.auctionNonce()));
        if (block.timestamp >= closing) revert AuctionClosed(uint64(closing));
        uint256 rateMax = a.rateMax();
        if (rate == 0) revert RateOutOfRange(rateMax);
        if (rate > rateMax) revert BidTooHigh(rateMax);

        _releaseBond(a); // first, so that a leading provider can pay a lower bid with its own bond
        (, uint256 bond) = _locked(rate, a.energyWh());
        uint256 index = _lock(provider, bond);
        uint256 softCloses = a.softCloses();
        unchecked {
            uint256 softClosing = block.timestamp + _rules.softCloseSeconds();
            if (softClosing > closing && softCloses < _rules.softCloseMax()) {
                closing = softClosing;
                ++softCloses;
            }
        }
        _auctions[consumer] = a.withBid(rate, index, closing, softCloses, msg.sender != provider);
        emit BidPlaced(consumer, auctionNonce_, provider, rate, uint64(closing));
    }

    /// @dev Give the leading bidder, if there is one, its bond back.
    function _releaseBond(AuctionWord a) private {
        if (a.rate() == 0) return;
        (, uint256 bond) = _locked(a.rate(), a.energyWh());
        _credit(_ev(a.bidder()), Words.released(bond, a.operatorBond()));
    }

    /// @dev Free the auction; everything locked in it goes back to where it came from.
    function _refund(address consumer, AuctionWord a) private {
        _auctions[consumer] = a.freed();
        _releaseBond(a);
        (uint256 cost,) = _locked(a.startRate(), a.energyWh());
        _credit(consumer, cost);
    }

    // --------------------------------------------------------- inside: session

    function _emitSessionOpened(
        AuctionWord a,
        bytes32 token,
        address provider,
        uint256 cost,
        uint256 bond,
        uint256 validity
    ) private {
        uint64 nonce = uint64(a.auctionNonce());
        emit SessionOpened({
            sessionId: sessionIdOf(msg.sender, provider, nonce),
            token: token,
            consumer: msg.sender,
            provider: provider,
            auctionNonce: nonce,
            energyWh: uint64(a.energyWh()),
            rate: uint128(a.rate()),
            deposit: cost,
            bond: bond,
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
            uint256 closeAt = s.settleAt(); // validity + grace: never later
            unchecked {
                uint256 challenged = block.timestamp + _rules.challengeSeconds();
                if (challenged < closeAt) closeAt = challenged;
            }
            s = s.withClosing(closeAt);
        } else if (!raised) {
            return;
        }
        _sessions[token] = s;
        emit ConnectionClosing(token, consumer, provider, uint64(s.claimedWh()), uint64(s.settleAt()));
    }

    /// @dev Pays what is claimed, once: the word is cleared first, and a token can never open again.
    function _settle(bytes32 token, SessionWord s, address consumer, address provider) private {
        _sessions[token] = SessionWord.wrap(0);
        (uint256 cost, uint256 bond) = _locked(s.rate(), s.energyWh());
        uint256 fee;
        unchecked {
            fee = (s.rate() * s.claimedWh()) / WH_PER_KWH; // what is paid is rounded down
            _credit(provider, fee + Words.released(bond, s.operatorBond()));
            _credit(consumer, cost - fee); // fee <= cost: claimed <= ordered
        }
        emit ConnectionEnded(token, consumer, provider, uint64(s.claimedWh()), fee);
    }

    /// @dev The session with its claim at what `ack` proves; whether that raises it is the caller's to ask.
    function _proven(SessionWord s, address consumer, address provider, uint256 deliveredWh, Ack calldata ack)
        private
        view
        returns (SessionWord)
    {
        if (!_isProven(s, consumer, provider, deliveredWh, ack)) revert InvalidReceipt();
        return s.withClaim(deliveredWh);
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
            uint64 maxEnergyWh = ack.maxEnergyWh;
            if (deliveredWh > maxEnergyWh) return false;
            bytes32 grant = keccak256(
                abi.encode(
                    PRESENT_TOKEN_TYPEHASH,
                    ack.token,
                    sessionId,
                    provider,
                    signer,
                    maxEnergyWh,
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
        (address recovered,,) = ECDSA.tryRecoverCalldata(digest, signature); // 0 if it is not canonical; `signer` never is
        return recovered == signer;
    }

    // ------------------------------------------------------ inside: arithmetic
    // Unchecked: rate < 2**64 and energy < 2**24 were enforced at the entrance, so nothing here passes 2**103.

    /// @dev What is locked for `energyWh` at `rate`: the consumer's cost, and the provider's share of it as its bond. Both
    /// are rounded up.
    function _locked(uint256 rate, uint256 energyWh) private view returns (uint256 cost, uint256 bond) {
        unchecked {
            cost = (rate * energyWh + (WH_PER_KWH - 1)) / WH_PER_KWH;
            bond = (cost * _rules.bondBps() + (Words.BPS - 1)) / Words.BPS;
        }
    }
}
