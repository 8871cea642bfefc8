// SPDX-License-Identifier: Apache-2.0
pragma solidity ^0.8.20;

/// @title V2V charging market: a reverse auction for energy between electric cars, and its fair settlement
/// @notice A consumer auctions an amount of energy, providers underbid each other, the winner delivers it and is paid for
/// what the consumer's receipts (or the consumer itself) acknowledge.
///
/// Units: energy in Wh, rates in wei per kWh, money in wei, time in unix seconds. What is locked is rounded up, what is
/// paid is rounded down, the rest is found by subtraction.
///
/// Laws: money only moves inside a pull ledger; `withdraw` is the only way out. No exit (endAuction, cancelAuction,
/// endConnection, submitReceipt, settle, withdraw) depends on the registry or on the status flag. "Before closing" means
/// `t < closingTime`, "after closing" means `t >= closingTime`. Removing nobody and raising no claim emit nothing.
interface IV2VCharging {
    // ------------------------------------------------------------------ types

    /// @notice The rules of one market, fixed at deployment; every time in them is below 2**25 s (388 days).
    /// @param minBiddingSeconds shortest bidding time of an auction, at least 1 (so a token can never repeat)
    /// @param maxBiddingSeconds longest bidding time
    /// @param softCloseSeconds a bid later than this before closing moves the closing to this long after the bid ...
    /// @param softCloseMax ... but at most this often, at most 7 times
    /// @param connectWindowSeconds how long after closing the consumer may connect
    /// @param tokenValidityMin shortest validity of an access token, in seconds
    /// @param tokenValidityMax longest validity of an access token, in seconds, below 2**18 (about 3 days)
    /// @param challengeSeconds how long a provider can answer a consumer's concession with a higher receipt
    /// @param graceSeconds after a token's validity and this long, anyone may settle its session
    /// @param bondBps the provider's bond, in 1/10000 of the cost, at most 10000
    struct MarketParameters {
        uint32 minBiddingSeconds;
        uint32 maxBiddingSeconds;
        uint32 softCloseSeconds;
        uint32 softCloseMax;
        uint32 connectWindowSeconds;
        uint32 tokenValidityMin;
        uint32 tokenValidityMax;
        uint32 challengeSeconds;
        uint32 graceSeconds;
        uint32 bondBps;
    }

    /// @notice What the contract needs to believe a receipt.
    /// @dev `sessionKey == 0`: the consumer itself signed `Receipt(sessionId, deliveredWh)`; no grant is looked at.
    /// Otherwise `grantSignature` is the consumer's `PresentToken` over these fields and `receiptSignature` is the
    /// session key's. `token`, `validUntil` and `challenge` are only hashed: neither a reorg (another token) nor a
    /// congested chain (a late call) may void an honest receipt. sessionId, provider, sessionKey and
    /// `deliveredWh <= maxEnergyWh` are enforced.
    struct Ack {
        bytes32 token;
        address sessionKey;
        uint64 maxEnergyWh;
        uint64 validUntil;
        bytes32 challenge;
        bytes grantSignature;
        bytes receiptSignature;
    }

    /// @notice A consumer's live auction, as read from outside. All zero (but the nonce) when there is none.
    /// @param live there is an auction, running or awaiting `connect` or an exit
    /// @param auctionNonce number of auctions this consumer has started
    /// @param provider the lowest bidder so far, 0 without bids
    /// @param rate the lowest bid so far, 0 without bids
    /// @param connectBy last second at which `connect` is possible
    /// @param deposit the consumer's locked wei
    /// @param bond the lowest bidder's locked wei
    /// @param operatorBond the bond counts against the bidder's operator limit
    struct Auction {
        bool live;
        uint64 auctionNonce;
        uint64 energyWh;
        uint128 startRate;
        uint128 rate;
        address provider;
        uint64 closingTime;
        uint64 connectBy;
        uint64 tokenValiditySeconds;
        uint256 deposit;
        uint256 bond;
        bool operatorBond;
    }

    /// @notice None: never opened, or settled (its word is cleared; `ConnectionEnded` tells the story).
    enum SessionStatus {
        None,
        Active,
        Closing
    }

    /// @notice A session between `connect` and its settlement, as read from outside.
    /// @param claimedWh the highest amount conceded or proven by a submitted receipt
    /// @param settleAt from then on anyone may `settle`: validity + grace, or earlier the end of a challenge
    struct Session {
        SessionStatus status;
        address consumer;
        address provider;
        uint64 auctionNonce;
        uint64 energyWh;
        uint64 claimedWh;
        uint128 rate;
        uint256 deposit;
        uint256 bond;
        uint64 settleAt;
        bool operatorBond;
    }

    // ----------------------------------------------------------------- errors

    /// @notice A market parameter is out of the bounds that keep the arithmetic safe.
    error BadParameters();
    /// @notice `changeStatus(false)` holds: no new EVs, auctions, bids or connections.
    error MarketInactive();
    /// @notice The EV is registered already.
    error AlreadyEV(address ev);
    /// @notice The account is not a registered EV.
    error NotEV(address account);
    /// @notice The contract would hold more than 2**96 - 1 wei: more than its ledger can count.
    error LedgerFull();
    /// @notice The ledger (with the value sent) holds `available` wei, `needed` are needed.
    error Insufficient(uint256 available, uint256 needed);
    /// @notice Nothing is ever paid to the zero address.
    error ZeroAddress();
    /// @notice The receiver refused the payment.
    error TransferFailed();
    /// @notice The caller is not this provider's operator.
    error NotOperator();
    /// @notice The operator may lock at most `bondLimit` wei, it would lock `needed`.
    error OperatorLimit(uint256 bondLimit, uint256 needed);
    /// @notice Energy is 0 or above `energyWhMax`.
    error EnergyOutOfRange(uint256 energyWhMax);
    /// @notice The rate is 0 or above `rateMax`.
    error RateOutOfRange(uint256 rateMax);
    /// @notice The bidding time is outside [min, max].
    error BiddingOutOfRange(uint256 min, uint256 max);
    /// @notice This consumer's address has started 2**24 - 1 auctions; it needs another one.
    error NonceExhausted();
    /// @notice Closing times are kept in 32 bits: no auction starts after the year 2106.
    error ClockExhausted();
    /// @notice The token validity is outside [min, max].
    error ValidityOutOfRange(uint256 min, uint256 max);
    /// @notice The consumer has a live auction; connect, end or cancel it first.
    error AuctionLive();
    /// @notice The consumer has no live auction.
    error NoAuction();
    /// @notice Only possible from `closingTime` on.
    error AuctionOpen(uint64 closingTime);
    /// @notice Bids were possible before `closingTime`.
    error AuctionClosed(uint64 closingTime);
    /// @notice The bid names another auction than the live one.
    error StaleAuction(uint64 auctionNonce);
    /// @notice The bid must be at most `rateMax`.
    error BidTooHigh(uint256 rateMax);
    /// @notice A consumer cannot be its own provider.
    error SelfDeal();
    /// @notice The auction cannot be cancelled by this caller now.
    error NotCancellable();
    /// @notice The auction was won by `winner` (0: by nobody).
    error NotWinner(address winner);
    /// @notice The auction was about `energyWh`.
    error WrongEnergy(uint64 energyWh);
    /// @notice `connect` was possible until `connectBy`.
    error ConnectExpired(uint64 connectBy);
    /// @notice The token names an open session already.
    error TokenExists(bytes32 token);
    /// @notice No open session has this token.
    error NoSession(bytes32 token);
    /// @notice The caller is neither consumer, provider nor the provider's operator.
    error NotParty();
    /// @notice More than the `energyWh` ordered.
    error OverAmount(uint64 energyWh);
    /// @notice The receipt (or the grant of its key) does not prove the amount.
    error InvalidReceipt();
    /// @notice Settling is possible for anyone from `settleAt` on.
    error TooEarly(uint64 settleAt);

    // ----------------------------------------------------------------- events

    /// @notice An EV may take part from now on.
    event EVAdded(address indexed ev, bytes32 info);
    /// @notice An EV may begin nothing new from now on; what it began it can end.
    event EVRemoved(address indexed ev);
    /// @notice The market was opened or paused.
    event StatusChanged(bool active);
    /// @notice The value that came with a call was credited to its sender.
    event Deposited(address indexed account, uint256 amount);
    /// @notice `account` took `amount` of its own ledger out, paid to `to`.
    event Withdrawn(address indexed account, address indexed to, uint256 amount);
    /// @notice `account` named its operator (0: none) and how much it may lock in bonds at one time.
    event OperatorSet(address indexed account, address indexed operator, uint128 bondLimit);

    /// @notice A consumer asks for energy; bids are possible before `closingTime`.
    event AuctionStarted(
        address indexed consumer,
        uint64 indexed auctionNonce,
        uint64 energyWh,
        uint128 startRate,
        uint64 closingTime,
        uint64 tokenValiditySeconds,
        bytes32 terms
    );
    /// @notice `provider` leads; `closingTime` may have moved (soft close).
    event BidPlaced(
        address indexed consumer,
        uint64 indexed auctionNonce,
        address indexed provider,
        uint128 rate,
        uint64 closingTime
    );
    /// @notice The bidding is over; `provider == 0`: nobody bid, the consumer is refunded and the auction is free.
    /// @dev Time ends an auction, this only says so: with a winner it can be announced again, so read it idempotently.
    event AuctionEnded(address indexed consumer, uint64 indexed auctionNonce, address indexed provider, uint128 rate);
    /// @notice The auction is free again and both sides have their money back.
    event AuctionCancelled(address indexed consumer, uint64 indexed auctionNonce);

    /// @notice The paper's event. `validity` is the absolute expiry.
    event Connected(address indexed EVP, address indexed EVC, bytes32 indexed token, uint256 validity);
    /// @notice Comes with every `Connected`. The provider is the last topic here and in the three events below, so that
    /// one log filter follows all of a provider's sessions.
    event SessionOpened(
        bytes32 indexed sessionId,
        bytes32 indexed token,
        address consumer,
        address indexed provider,
        uint64 auctionNonce,
        uint64 energyWh,
        uint128 rate,
        uint256 deposit,
        uint256 bond,
        uint64 issuedAt,
        uint64 validity
    );
    /// @notice The claim rose to a receipt's amount.
    event ReceiptAccepted(bytes32 indexed token, address indexed consumer, address indexed provider, uint64 claimedWh);
    /// @notice The consumer conceded `claimedWh`; until `closeAt` a receipt can raise it, from then on anyone may
    /// settle.
    event ConnectionClosing(
        bytes32 indexed token, address indexed consumer, address indexed provider, uint64 claimedWh, uint64 closeAt
    );
    /// @notice Paid, once and for ever: `fee` and the bond to the provider, the rest of the deposit to the consumer.
    event ConnectionEnded(
        bytes32 indexed token, address indexed consumer, address indexed provider, uint64 deliveredWh, uint256 fee
    );

    // ----------------------------------------------------- organisation (owner)

    /// @notice Register an EV (the paper's Algorithm 1). Owner, while active.
    /// @param info a salted commitment to the EV's papers; never clear personal data
    function addEV(address ev, bytes32 info) external;

    /// @notice Take an EV out: it can no longer start, bid or connect; all its exits stay open. Owner, at any time;
    /// never refuses, also not for an account that is no EV (nothing happens then).
    function removeEV(address ev) external;

    /// @notice Open or pause the market; an explicit value, so two racing calls cannot cancel out. Owner.
    function changeStatus(bool active) external;

    // ------------------------------------------------------------------ ledger

    /// @notice Credit the sent value to the caller's ledger.
    function deposit() external payable;

    /// @notice Pay `amount` of the caller's own ledger to `to`.
    function withdraw(uint256 amount, address to) external;

    /// @notice Name the hot key that may bid from the caller's ledger, end and submit for it; it can never move money
    /// out. 0 revokes. `bondLimit` caps the wei its bids lock at one time. Also open to removed EVs: they must be able
    /// to revoke a stolen key.
    function setOperator(address operator, uint128 bondLimit) external;

    // ----------------------------------------------------------------- auction

    /// @notice Ask for energy: locks `ceil(energyWh * startRate / 1000)` wei. Registered EV, no live auction.
    /// @param terms salted hash of place, plug and power, kept in the log only
    function startAuction(
        uint64 energyWh,
        uint64 biddingSeconds,
        uint128 startRate,
        uint64 tokenValiditySeconds,
        bytes32 terms
    ) external payable;

    /// @notice Offer to deliver at `rate`; binding until outbid or until `connectBy`. Locks the bond, frees the outbid
    /// one. The first bid must be at most the start rate, a later one at least max(1, 1 %) below the lowest.
    /// @param auctionNonce pins the bid to the auction that was looked at
    function placeBid(address consumer, uint64 auctionNonce, uint128 rate) external payable;

    /// @notice The same by `provider`'s operator, from the provider's ledger and within the operator's limit.
    function placeBidFor(address provider, address consumer, uint64 auctionNonce, uint128 rate) external;

    /// @notice After closing, anyone: announce the winner, or refund the consumer when nobody bid.
    function endAuction(address consumer) external;

    /// @notice Free an auction and refund both sides: its consumer while nobody bid; anyone after `connectBy`; anyone
    /// after closing when a party was removed or the market is paused (then `connect` is impossible).
    function cancelAuction(address consumer) external;

    // ----------------------------------------------------------------- session

    /// @notice Open the session with the auction's winner (the paper's Algorithm 2). The consumer, after closing and
    /// until `connectBy`; `endAuction` is not needed before.
    /// @param provider must be the winner
    /// @param energyWh must be the amount auctioned
    /// @return token keccak256(abi.encodePacked(consumer, provider, uint256 block.timestamp, uint256 validity))
    function connect(address provider, uint64 energyWh) external returns (bytes32 token);

    /// @notice End a session. The provider or its operator: final; an amount above what is claimed needs the consumer's
    /// receipt, and max(claimed, deliveredWh) is paid. The consumer: concedes an amount and opens the challenge once
    /// (`closeAt` never moves again); final at once when the full order is conceded. A consumer that is also the
    /// provider's operator is treated as the consumer.
    function endConnection(bytes32 token, uint64 deliveredWh, Ack calldata ack) external;

    /// @notice Anyone, until settled: raise what is claimed to a receipt's amount. Never lowers it.
    function submitReceipt(bytes32 token, uint64 deliveredWh, Ack calldata ack) external;

    /// @notice Anyone, from `settleAt` on: pay what is claimed.
    function settle(bytes32 token) external;

    // ------------------------------------------------------------------- views

    /// @notice What receipts bind to: the same after a reorg re-mined `connect` with another timestamp and token.
    function sessionIdOf(address consumer, address provider, uint64 auctionNonce) external view returns (bytes32);

    /// @notice Would `deliveredWh` be accepted for this open session? The predicate a provider must mirror.
    function isReceiptValid(bytes32 token, uint64 deliveredWh, Ack calldata ack) external view returns (bool);

    /// @notice The open session of a token; all zero without one.
    function sessions(bytes32 token) external view returns (Session memory);
    /// @notice The consumer's auction; all zero but the nonce without one.
    function auctions(address consumer) external view returns (Auction memory);
    /// @notice How many auctions this consumer has started.
    function auctionNonce(address consumer) external view returns (uint64);
    /// @notice What the account can withdraw, or spend on deposits and bonds.
    function balances(address account) external view returns (uint256);
    /// @notice May this account start auctions, bid and connect?
    function isEV(address account) external view returns (bool);
    /// @notice What the organisation registered of an EV.
    /// @return info the commitment given to `addEV`, 0 if not registered
    /// @return addedAt when it was registered, 0 if not registered
    function evInfo(address ev) external view returns (bytes32 info, uint64 addedAt);
    /// @notice The account's hot key and its limit.
    /// @return operator the account's operator, 0 without one
    /// @return bondLimit how much the operator may lock in bonds at one time
    /// @return bondLocked how much of it is locked now
    function operatorOf(address account) external view returns (address operator, uint128 bondLimit, uint128 bondLocked);
    /// @notice May EVs be added, auctions started, bids placed and sessions opened?
    function status() external view returns (bool);
    /// @notice The immutables of this market.
    function parameters() external view returns (MarketParameters memory);
    /// @notice EIP-712 domain separator ("V2VCharging", "1", chain id, this contract).
    function domainSeparator() external view returns (bytes32);
}
