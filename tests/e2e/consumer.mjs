// A consumer that is not ours: written from docs/consumer-protocol.md alone, with ethers and mqtt from npm.
//
//   node tests/e2e/consumer.mjs SETTINGS.json     prints one line of JSON when it is over; its story goes to stderr
//
// Settings: rpc, contract, keyFile, order {energyWh, startRate, biddingSeconds, tokenValiditySeconds}, and one of broker
// (mqtt://...) and http (http://...). Optional: ownMeterFile (what our car measured, as {"delivered_mwh": n}), powerMaxW,
// stopAtWh (by a stop request, or with `concede` on chain), scheme (eip712, or eip191 for a wallet without typed data).
// Rules: it imports nothing of this repository, believes only signatures and the chain, and every wait ends.

import { randomBytes } from "node:crypto";
import { readFileSync } from "node:fs";
import {
  AbiCoder, Contract, JsonRpcProvider, TypedDataEncoder, Wallet, getBytes, hexlify, keccak256, recoverAddress, solidityPackedKeccak256,
} from "ethers";
import mqtt from "mqtt";

const settings = JSON.parse(readFileSync(process.argv[2]));
const say = (...words) => console.error(new Date().toISOString().slice(11, 23), ...words);
const sleep = (ms) => new Promise((wake) => setTimeout(wake, ms));
const lower = (address) => address.toLowerCase();
const ownMwh = () => BigInt(JSON.parse(readFileSync(settings.ownMeterFile)).delivered_mwh);
const ZERO = "0x" + "00".repeat(20), NONE = "0x" + "00".repeat(32);

const STEP_WH = 10, TOLERANCE_PERMILLE = 50n, ALLOWANCE_WH = 25n; // their meter against ours: steps, losses, classes
const RESEND_MS = 1_000, KNOCK_MS = 500, CHAIN_MS = 1_000, SILENCE_MS = 150_000, FINAL_MS = 30_000, AUCTION_MS = 180_000;
const NOT_YET = ["not_yet_seen", "unknown_session", "rate_limited", "busy"], SIGN_ANEW = ["stale_hello", "replayed"];

// ------------------------------------------------------------------------------------------------ the market

const ABI = [
  "function startAuction(uint64 energyWh, uint64 biddingSeconds, uint128 startRate, uint64 tokenValiditySeconds, bytes32 terms) payable",
  "function connect(address provider, uint64 energyWh) returns (bytes32 token)",
  "function endConnection(bytes32 token, uint64 deliveredWh, (bytes32 token, address sessionKey, uint64 maxEnergyWh, uint64 validUntil, bytes32 challenge, bytes grantSignature, bytes receiptSignature) ack)",
  "function auctions(address consumer) view returns ((bool live, uint64 auctionNonce, uint64 energyWh, uint128 startRate, uint128 rate, address provider, uint64 closingTime, uint64 connectBy, uint64 tokenValiditySeconds, uint256 deposit, uint256 bond, bool operatorBond))",
  "function balances(address account) view returns (uint256)",
  "function operatorOf(address account) view returns (address operator, uint128 bondLimit, uint128 bondLocked)",
  "event SessionOpened(bytes32 indexed sessionId, bytes32 indexed token, address consumer, address indexed provider, uint64 auctionNonce, uint64 energyWh, uint128 rate, uint256 deposit, uint256 bond, uint64 issuedAt, uint64 validity)",
  "event ConnectionEnded(bytes32 indexed token, address indexed consumer, address indexed provider, uint64 deliveredWh, uint256 fee)",
];
const rpc = new JsonRpcProvider(settings.rpc, undefined, { pollingInterval: 250, cacheTimeout: -1 });
const account = new Wallet(readFileSync(settings.keyFile, "utf8").trim(), rpc);
const market = new Contract(settings.contract, ABI, account);
const me = lower(account.address);
const chainNow = async () => (await rpc.getBlock("latest")).timestamp;

async function boughtSession() {
  const { energyWh, startRate, biddingSeconds, tokenValiditySeconds } = settings.order;
  const deposit = (BigInt(startRate) * BigInt(energyWh) + 999n) / 1000n; // locking rounds up
  const held = await market.balances(me);
  const value = held >= deposit ? 0n : deposit - held;
  await (await market.startAuction(energyWh, biddingSeconds, startRate, tokenValiditySeconds, hexlify(randomBytes(32)), { value })).wait();
  say("asked for", energyWh, "Wh");
  for (const until = Date.now() + AUCTION_MS; ; await sleep(300)) {
    const auction = await market.auctions(me);
    if ((await chainNow()) >= Number(auction.closingTime)) {
      if (auction.rate === 0n) throw new Error("nobody bid");
      return connected(auction);
    }
    if (Date.now() > until) throw new Error("the auction does not close");
  }
}

async function connected(auction) {
  const mined = await (await market.getFunction("connect")(auction.provider, auction.energyWh)).wait();
  return sessionIn(mined.logs, mined.blockNumber);
}

// The session as the chain tells it, with token and session id computed again: a node may lie.
async function sessionIn(logs, blockNumber) {
  const opened = logs.map((log) => market.interface.parseLog(log)).find((log) => log?.name === "SessionOpened").args;
  const provider = lower(opened.provider), { chainId } = await rpc.getNetwork();
  const token = solidityPackedKeccak256(["address", "address", "uint256", "uint256"], [me, provider, opened.issuedAt, opened.validity]);
  const sessionId = keccak256(AbiCoder.defaultAbiCoder().encode(
    ["uint256", "address", "address", "address", "uint256"], [chainId, settings.contract, me, provider, opened.auctionNonce]));
  if (token !== opened.token || sessionId !== opened.sessionId || lower(opened.consumer) !== me) throw new Error("the node made this session up");
  say("connected to", provider);
  return {
    token, sessionId, provider, energyWh: Number(opened.energyWh), rate: opened.rate, deposit: opened.deposit, validity: Number(opened.validity),
    blockNumber, domain: { name: "V2VCharging", version: "1", chainId, verifyingContract: settings.contract },
  };
}

// ------------------------------------------------------------------------------------------------- messages

const TYPES = Object.fromEntries(Object.entries({
  PresentToken: "bytes32 token,bytes32 sessionId,address provider,address sessionKey,uint64 maxEnergyWh,uint64 validUntil,bytes32 challenge",
  Receipt: "bytes32 sessionId,uint64 deliveredWh",
  ProviderHello: "address provider,bytes32 chargerId,bytes32 nonce,uint64 expiresAt",
  SessionAccept: "bytes32 sessionId,bytes32 challenge,uint64 registerMwhBegin,uint64 maxUnackedWh,uint64 acceptedAt",
  MeterReading: "bytes32 sessionId,uint64 seq,uint64 deliveredWh,uint64 powerW,uint64 at",
  StopRequest: "bytes32 sessionId,uint64 at",
}).map(([name, members]) => [name, members.split(",").map((one) => ({ type: one.split(" ")[0], name: one.split(" ")[1] }))]));
const only = (name) => ({ [name]: TYPES[name] });
const signature = (signer, domain, name, message) =>
  signer.signingKey.sign(TypedDataEncoder.hash(domain, only(name), message)).serialized;
const signerOf = (domain, name, message) =>
  lower(recoverAddress(TypedDataEncoder.hash(domain, only(name), message), message.signature));
const canonical = (body) => JSON.stringify(Object.fromEntries(Object.entries(body).sort(([a], [b]) => (a < b ? -1 : 1))));

// ------------------------------------------------------------------------------------------------ transports

async function overMqtt(provider, sref, receive) {
  const root = `v2v/1/${provider}`;
  const client = await mqtt.connectAsync(settings.broker, { protocolVersion: 4, clean: true, keepalive: 15 });
  client.on("message", (_, payload) => receive(payload.toString()));
  await client.subscribeAsync({ [`${root}/out/${sref}`]: { qos: 1 }, [`${root}/hello/+`]: { qos: 1 } });
  return { post: (body) => client.publishAsync(`${root}/in/${sref}`, canonical(body), { qos: 1 }), close: () => client.endAsync() };
}

async function overHttp(_, sref, receive) {
  const end = new AbortController();
  const hellos = async () => (await (await fetch(`${settings.http}/v1/hello`)).json()).forEach((one) => receive(JSON.stringify(one)));
  const timer = setInterval(() => hellos().catch(() => {}), 2_000);
  const listen = async () => {
    const stream = await fetch(`${settings.http}/v1/session/${sref}`, { signal: end.signal });
    let rest = "";
    for await (const chunk of stream.body) {
      const events = (rest + Buffer.from(chunk).toString()).split("\n\n");
      rest = events.pop();
      for (const event of events) for (const line of event.split("\n")) if (line.startsWith("data: ")) receive(line.slice(6));
    }
  };
  const listening = (async () => {
    while (!end.signal.aborted) { await listen().catch(() => {}); await sleep(200); }
  })();
  await hellos();
  return {
    post: async (body) => {
      const headers = { "Content-Type": "application/json", "X-V2V-Sref": sref };
      receive(await (await fetch(`${settings.http}/v1/${body.type}`, { method: "POST", headers, body: canonical(body) })).text());
    },
    close: async () => { clearInterval(timer); end.abort(); await listening; },
  };
}

// ------------------------------------------------------------------------------------------------ at the plug

class Visit {
  constructor(session) {
    this.isPersonal = settings.scheme === "eip191";
    this.sessionKey = this.isPersonal ? account : Wallet.createRandom();
    Object.assign(this, { session, inbox: [], signedWh: 0, ackedWh: 0, seq: -1, doubts: [], used: new Set(), aliveAt: Date.now() });
  }

  // Signed by the winner of our auction, or by its operator as the contract names it now; nobody else counts.
  async believes(name, message) {
    const signer = signerOf(this.session.domain, name, message);
    if (signer === this.session.provider) return true;
    return signer === lower((await market.operatorOf(this.session.provider)).operator);
  }

  async take(message) {
    const handler = this[`on_${message.type}`];
    if (message.sessionId !== undefined && message.sessionId !== this.session.sessionId) return;
    if (handler) await handler.call(this, message);
  }

  async on_hello(hello) {
    if (hello.provider !== this.session.provider || hello.expiresAt <= (await chainNow()) || !(await this.believes("ProviderHello", hello))) {
      return void this.doubts.push("hello");
    }
    if (this.presented || this.used.has(hello.nonce)) return;
    const { token, sessionId, provider, energyWh, validity, domain } = this.session;
    const nonceC = hexlify(randomBytes(32));
    const challenge = keccak256(AbiCoder.defaultAbiCoder().encode(
      ["bytes32", "bytes32"], [TypedDataEncoder.hashStruct("ProviderHello", only("ProviderHello"), hello), nonceC]));
    const granted = this.isPersonal ? { sessionKey: ZERO, maxEnergyWh: 0 } : { sessionKey: lower(this.sessionKey.address), maxEnergyWh: energyWh };
    const grant = { token, sessionId, provider, ...granted, validUntil: validity, challenge };
    this.used.add(hello.nonce);
    this.challenge = challenge;
    this.presented = {
      type: "present", scheme: settings.scheme ?? "eip712", sessionId, token, chargerId: hello.chargerId, helloNonce: hello.nonce, nonceC, ...granted,
      validUntil: validity, publicKey: account.signingKey.publicKey,
      signature: this.isPersonal ? account.signMessageSync(getBytes(token)) : signature(account, domain, "PresentToken", grant),
    };
    if (settings.ownMeterFile) this.ownMwhBegin ??= ownMwh(); // no energy can have flowed before
    this.presentedAt ??= Date.now();
    this.postedAt = 0;
  }

  async on_accept(accept) {
    if (this.accepted) return;
    if (accept.challenge !== this.challenge || !(await this.believes("SessionAccept", accept))) return void this.doubts.push("accept");
    this.accepted = accept;
    say("accepted at register", accept.registerMwhBegin, "mWh");
  }

  async on_reading(reading) {
    if (reading.seq <= this.seq || !(await this.believes("MeterReading", reading))) return;
    this.seq = reading.seq;
    this.aliveAt = Date.now();
    const wh = Math.min(reading.deliveredWh, this.session.energyWh);
    if (wh <= this.signedWh || !this.isPlausible(wh)) return;
    this.signedWh = wh;
    this.receipt = { sessionId: this.session.sessionId, deliveredWh: wh };
    await this.postReceipt();
  }

  // A receipt is money: not more than can have flowed since we presented, nor than our own car measured.
  isPlausible(wh) {
    const possible = ((settings.powerMaxW ?? 25_000) * (Date.now() - this.presentedAt)) / 3_600_000 + STEP_WH;
    const own = settings.ownMeterFile ? (ownMwh() - this.ownMwhBegin) / 1000n : null;
    const fits = wh <= possible && (own === null || BigInt(wh) <= (own * (1000n + TOLERANCE_PERMILLE)) / 1000n + ALLOWANCE_WH);
    if (!fits) this.doubts.push(`reading of ${wh} Wh`);
    return fits;
  }

  postReceipt() {
    this.postedAt = Date.now();
    return this.post({ type: "receipt", ...this.receipt, signature: signature(this.sessionKey, this.session.domain, "Receipt", this.receipt) });
  }

  on_ack(ack) {
    this.ackedWh = Math.max(this.ackedWh, Math.min(ack.deliveredWh, this.signedWh));
    this.aliveAt = Date.now();
  }

  on_status(status) {
    this.aliveAt = Date.now();
    if (status.stage + status.reason !== this.stage) say(status.stage, status.reason);
    this.stage = status.stage + status.reason;
    this.isOver = ["STOPPING", "SETTLING"].includes(status.stage);
  }

  on_final(final) { this.final = final; }

  on_refusal({ reason, detail }) {
    say("refused:", reason, detail);
    if (SIGN_ANEW.includes(reason)) this.presented = undefined; // the next Hello that comes is signed
    else if (!this.accepted && !NOT_YET.includes(reason)) throw new Error(`refused: ${reason}: ${detail}`);
  }

  // What time makes due: knock, repeat, stop, look at the chain. Ends with the settlement.
  async tick() {
    const now = Date.now(), idle = now - (this.postedAt ?? 0);
    if (!this.accepted && this.presented && idle >= KNOCK_MS) {
      this.postedAt = now;
      await this.post(this.presented);
    } else if (settings.stopAtWh && this.signedWh >= settings.stopAtWh && !this.isOver && now - (this.stoppedAt ?? 0) >= RESEND_MS) {
      this.stoppedAt = now;
      if (settings.concede) return void (await this.concede());
      const request = { sessionId: this.session.sessionId, at: await chainNow() };
      await this.post({ type: "stop", ...request, signature: signature(this.sessionKey, this.session.domain, "StopRequest", request) });
    } else if (this.signedWh > this.ackedWh && idle >= RESEND_MS) {
      await this.postReceipt();
    }
    if (now - this.aliveAt > SILENCE_MS) throw new Error(`no word from the provider; doubted: ${this.doubts}`);
    if (now - (this.lookedAt ?? 0) < CHAIN_MS) return undefined;
    this.lookedAt = now;
    const [ended] = await market.queryFilter(market.filters.ConnectionEnded(this.session.token), this.session.blockNumber);
    return ended;
  }

  // The end on chain, without the provider: what we signed for is owed, and the provider may show a higher receipt.
  async concede() {
    this.stoppedAt = Infinity;
    await (await market.endConnection(this.session.token, this.signedWh, [NONE, ZERO, 0, 0, NONE, "0x", "0x"])).wait();
    say("conceded", this.signedWh, "Wh");
  }

  async untilSettled(transport) {
    this.post = (body) => transport.post(body).catch((trouble) => say("not sent:", trouble.message)); // it is sent again
    for (;;) {
      while (this.inbox.length > 0) await this.take(JSON.parse(this.inbox.shift()));
      const ended = await this.tick();
      if (ended) return ended;
      await sleep(50);
    }
  }

  async untilFinal() {
    for (const until = Date.now() + FINAL_MS; !this.final && Date.now() < until; await sleep(50)) {
      while (this.inbox.length > 0) await this.take(JSON.parse(this.inbox.shift()));
    }
  }
}

// ---------------------------------------------------------------------------------------------- the whole way

const session = await boughtSession();
const before = await market.balances(me);
const visit = new Visit(session);
const sref = hexlify(randomBytes(16)).slice(2);
const transport = await (settings.broker ? overMqtt : overHttp)(session.provider, sref, (data) => visit.inbox.push(data));
const ended = await visit.untilSettled(transport);
await visit.untilFinal();
await transport.close();

// The provider's word is a hint; the chain decides what was paid, and we check that it is what we signed.
const { deliveredWh, fee } = ended.args;
const gained = (await market.balances(me)) - before;
const isRight = Number(deliveredWh) <= visit.signedWh && fee === (session.rate * deliveredWh) / 1000n && gained === session.deposit - fee;
console.log(JSON.stringify({
  isRight, settledWh: Number(deliveredWh), signedWh: visit.signedWh, ackedWh: visit.ackedWh, costWei: String(fee), gainedWei: String(gained),
  rate: String(session.rate), settlementTx: ended.transactionHash, final: visit.final ?? null, doubts: visit.doubts, accepted: visit.accepted,
}));
rpc.destroy();
process.exitCode = isRight ? 0 : 1;
