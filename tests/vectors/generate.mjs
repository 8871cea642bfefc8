// Makes the vectors beside this file with ethers, a second implementation of everything that is signed or hashed.
//
//   node tests/vectors/generate.mjs [FOLDER]     (without FOLDER: this one; `npm ci` in tests/ first)
//
// Rules: nothing of ours is imported; what is expected is written down here from PROTOCOL sections 3 to 6, not computed by
// the code under test. Signatures are deterministic (RFC 6979), so the same bytes come out every time, and a test compares.
// The market is the one that the contract tests deploy on eth-tester's chain: its accounts are the private keys 1, 2, 3, ...

import { writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import {
  AbiCoder, SigningKey, TypedDataEncoder, computeAddress, concat, dataSlice, getBytes, getCreateAddress,
  hashMessage, hexlify, id, keccak256, sha256, solidityPackedKeccak256, toBeHex, toUtf8Bytes,
} from "ethers";

// ------------------------------------------------------------------------------------------- who and where

const key = (number) => new SigningKey(toBeHex(number, 32));
const who = (signer) => computeAddress(signer).toLowerCase();
const [organisation, consumer, provider, rival, stranger, sessionKey, operator, meter] = [1, 2, 3, 4, 5, 6, 7, 8].map(key);
const ZERO = "0x" + "00".repeat(20);
const NONE = "0x" + "00".repeat(32);
const UINT64_MAX = 2n ** 64n - 1n;
const ORDER = 0xfffffffffffffffffffffffffffffffebaaedce6af48a03bbfd25e8cd0364141n; // of secp256k1
const FIELD = 2n ** 256n - 2n ** 32n - 977n;
const AUCTION_NONCE = 1;
const ENERGY_WH = 200; // ordered

const domain = {
  name: "V2VCharging", version: "1", chainId: 131277322940537,
  verifyingContract: getCreateAddress({ from: who(organisation), nonce: 0 }).toLowerCase(),
};
const TYPES = {
  PresentToken: "bytes32 token,bytes32 sessionId,address provider,address sessionKey,uint64 maxEnergyWh,uint64 validUntil,bytes32 challenge",
  Receipt: "bytes32 sessionId,uint64 deliveredWh",
  ProviderHello: "address provider,bytes32 chargerId,bytes32 nonce,uint64 expiresAt",
  SessionAccept: "bytes32 sessionId,bytes32 challenge,uint64 registerMwhBegin,uint64 maxUnackedWh,uint64 acceptedAt",
  MeterReading: "bytes32 sessionId,uint64 seq,uint64 deliveredWh,uint64 powerW,uint64 at",
  StopRequest: "bytes32 sessionId,uint64 at",
};
const types = (name) => ({
  [name]: TYPES[name].split(",").map((part) => ({ type: part.split(" ")[0], name: part.split(" ")[1] })),
});

const tokenOf = (evc, evp, bts, tv) => solidityPackedKeccak256(["address", "address", "uint256", "uint256"], [evc, evp, bts, tv]);
const sessionIdOf = (where, evc, evp, nonce) => keccak256(AbiCoder.defaultAbiCoder().encode(
  ["uint256", "address", "address", "address", "uint64"], [where.chainId, where.verifyingContract, evc, evp, nonce]));
const digestOf = (name, message, where = domain) => TypedDataEncoder.hash(where, types(name), message);
const structHashOf = (name, message) => TypedDataEncoder.hashStruct(name, types(name), message);
const challengeOf = (hello, nonceC) =>
  keccak256(AbiCoder.defaultAbiCoder().encode(["bytes32", "bytes32"], [structHashOf("ProviderHello", hello), nonceC]));
const chargerIdOf = (port) => keccak256(toUtf8Bytes(port));

const sign = (signer, digest) => signer.sign(digest).serialized;
const signed = (signer, name, message, where) => sign(signer, digestOf(name, message, where));

// A number as JSON can hold it exactly; more as text.
const number = (value) => (BigInt(value) <= BigInt(Number.MAX_SAFE_INTEGER) ? Number(value) : String(value));

const ISSUED_AT = 1790000000, VALIDITY = 1790014400;
const TOKEN = tokenOf(who(consumer), who(provider), ISSUED_AT, VALIDITY);
const SESSION = sessionIdOf(domain, who(consumer), who(provider), AUCTION_NONCE);
const hello = { provider: who(provider), chargerId: chargerIdOf("left"), nonce: id("a Hello's nonce"), expiresAt: ISSUED_AT + 720 };
const nonceC = id("the consumer's nonce");
const challenge = challengeOf(hello, nonceC);
const grant = {
  token: TOKEN, sessionId: SESSION, provider: who(provider), sessionKey: who(sessionKey), maxEnergyWh: 150,
  validUntil: VALIDITY, challenge,
};

// --------------------------------------------------------------------------------- the forms of a signature

const halves = (signature) => [BigInt(dataSlice(signature, 0, 32)), BigInt(dataSlice(signature, 32, 64)), Number(dataSlice(signature, 64))];
const joined = (r, s, v) => concat([toBeHex(r, 32), toBeHex(s, 32), toBeHex(v, 1)]);
const FORMS = { // name -> [change, what the one normaliser makes of it: "same" (the canonical signature) or a refusal]
  "65 bytes, low s": [(sig) => sig, "same"],
  "v 0/1": [(sig) => { const [r, s, v] = halves(sig); return joined(r, s, v - 27); }, "same"],
  "EIP-2098": [(sig) => { const [r, s, v] = halves(sig); return concat([toBeHex(r, 32), toBeHex(s | (BigInt(v - 27) << 255n), 32)]); }, "same"],
  "high s": [(sig) => { const [r, s, v] = halves(sig); return joined(r, ORDER - s, 55 - v); }, "bad_signature"],
  "high s, v 0/1": [(sig) => { const [r, s, v] = halves(sig); return joined(r, ORDER - s, 28 - v); }, "bad_signature"],
  "s just above half": [(sig) => { const [r, , v] = halves(sig); return joined(r, ORDER / 2n + 1n, v); }, "bad_signature"],
  "s = n": [(sig) => { const [r, , v] = halves(sig); return joined(r, ORDER, v); }, "bad_signature"],
  "s = 0": [(sig) => { const [r, , v] = halves(sig); return joined(r, 0n, v); }, "bad_signature"],
  "r = 0": [(sig) => { const [, s, v] = halves(sig); return joined(0n, s, v); }, "bad_signature"],
  "r = n": [(sig) => { const [, s, v] = halves(sig); return joined(ORDER, s, v); }, "bad_signature"],
  "r above the field": [(sig) => { const [, s, v] = halves(sig); return joined(FIELD + 1n, s, v); }, "bad_signature"],
  "r without a point": [(sig) => { const [, s, v] = halves(sig); return joined(5n, s, v); }, "bad_signature"],
  "all zero": [() => "0x" + "00".repeat(65), "bad_signature"],
  "v 29": [(sig) => { const [r, s] = halves(sig); return joined(r, s, 29); }, "bad_signature"],
  "v of EIP-155": [(sig) => { const [r, s, v] = halves(sig); return joined(r, s, v + 10); }, "bad_signature"],
  "short": [(sig) => dataSlice(sig, 0, 63), "bad_signature"],
  "long": [(sig) => concat([sig, "0x00"]), "bad_signature"],
  "empty": [() => "0x", "bad_signature"],
};

function signatures() {
  const digest = digestOf("Receipt", { sessionId: SESSION, deliveredWh: 100 });
  // Two signers, because v is 27 for one of them and 28 for the other: a normaliser that mixes them up shows.
  const pair = [sign(consumer, digest), sign(sessionKey, digest)];
  return pair.flatMap((canonical, index) => Object.entries(FORMS).map(([form, [change, expected]]) => ({
    name: `${form}, v ${halves(canonical)[2]}`, digest, signature: change(canonical),
    ...(expected === "same" ? { normalised: canonical, signer: who([consumer, sessionKey][index]) } : { refused: expected }),
  })));
}

function publicKeys() {
  const full = consumer.publicKey, y = BigInt(dataSlice(full, 33));
  const good = { "33 bytes": consumer.compressedPublicKey, "65 bytes": full, "64 bytes": dataSlice(full, 1) };
  const bad = {
    "not on the curve": concat([dataSlice(full, 0, 33), toBeHex(y ^ 1n, 32)]),
    "the point at infinity": "0x" + "00".repeat(64),
    "x above the field": concat(["0x02", toBeHex(FIELD + 1n, 32)]),
    "an x that is on no point": concat(["0x02", toBeHex(5, 32)]),
    "an unknown first byte": concat(["0x05", dataSlice(full, 1, 33)]),
    "OpenSSL's hybrid form": concat([y % 2n ? "0x07" : "0x06", dataSlice(full, 1)]),
    "66 bytes": concat([full, "0x00"]),
    "empty": "0x",
  };
  return [
    ...Object.entries(good).map(([name, publicKey]) => ({ name, publicKey, address: who(consumer) })),
    ...Object.entries(bad).map(([name, publicKey]) => ({ name, publicKey, refused: "malformed" })),
  ];
}

// ----------------------------------------------------------------------------------- names and typed messages

function identities() {
  const far = { ...domain, chainId: 1, verifyingContract: "0x" + "c0".repeat(20) };
  const tokens = [
    [who(consumer), who(provider), ISSUED_AT, VALIDITY], [who(provider), who(consumer), ISSUED_AT, VALIDITY],
    [who(consumer), who(provider), 0, 0], [ZERO, ZERO, 1, 2n ** 256n - 1n],
    // Published with the paper's implementation: the accounts of the keys 0x11..11 and 0x22..22.
    [who(new SigningKey("0x" + "11".repeat(32))), who(new SigningKey("0x" + "22".repeat(32))), ISSUED_AT, VALIDITY],
  ];
  const sessions = [[domain, 1], [domain, 2], [far, 1], [domain, UINT64_MAX]];
  return [
    ...tokens.map(([evc, evp, bts, tv]) => ({
      name: "token", consumer: evc, provider: evp, issuedAt: number(bts), validity: number(tv), expected: tokenOf(evc, evp, bts, tv),
    })),
    ...sessions.map(([where, nonce]) => ({
      name: "sessionId", chainId: where.chainId, contract: where.verifyingContract, consumer: who(consumer), provider: who(provider),
      auctionNonce: number(nonce), expected: sessionIdOf(where, who(consumer), who(provider), nonce),
    })),
    ...[domain, far].map((where) => ({
      name: "domainSeparator", chainId: where.chainId, contract: where.verifyingContract, expected: TypedDataEncoder.hashDomain(where),
    })),
    ...["left", "Stellplatz 3", "\u5145\u96fb"].map((port) => ({ name: "chargerId", port, expected: chargerIdOf(port) })),
    { name: "challenge", hello, nonceC, expected: challenge },
    { name: "challenge", hello: { ...hello, nonce: NONE }, nonceC: NONE, expected: challengeOf({ ...hello, nonce: NONE }, NONE) },
    { name: "personalSign", token: TOKEN, expected: hashMessage(getBytes(TOKEN)) },
  ];
}

const accept = { sessionId: SESSION, challenge, registerMwhBegin: 5000000000, maxUnackedWh: 50, acceptedAt: ISSUED_AT + 30 };
const reading = { sessionId: SESSION, seq: 1048601, deliveredWh: 97, powerW: 11040, at: ISSUED_AT + 61 };
const SIGNED = { // one real message of each type, and who signs it
  PresentToken: [grant, consumer], Receipt: [{ sessionId: SESSION, deliveredWh: 97 }, sessionKey], ProviderHello: [hello, operator],
  SessionAccept: [accept, operator], MeterReading: [reading, operator], StopRequest: [{ sessionId: SESSION, at: ISSUED_AT + 62 }, sessionKey],
};

function typed() {
  const extreme = (name, full) => Object.fromEntries(types(name)[name].map((field) => [field.name, {
    bytes32: "0x" + (full ? "ff" : "00").repeat(32), address: "0x" + (full ? "ff" : "00").repeat(20), uint64: full ? UINT64_MAX : 0n,
  }[field.type]]));
  const plain = (message) => Object.fromEntries(Object.entries(message).map(([name, value]) => [name, typeof value === "string" ? value : number(value)]));
  const far = { ...domain, chainId: 1 };
  return Object.entries(SIGNED).flatMap(([primaryType, [message, signer]]) =>
    [[message, domain, "as it is said"], [message, far, "on another chain"], [extreme(primaryType, false), domain, "all zero"], [extreme(primaryType, true), domain, "all ones"]]
      .map(([one, where, name]) => ({
        name, primaryType, chainId: where.chainId, contract: where.verifyingContract, message: plain(one),
        structHash: structHashOf(primaryType, one), digest: digestOf(primaryType, one, where),
        signer: who(signer), signature: signed(signer, primaryType, one, where),
      })));
}

// --------------------------------------------------------------------------------------------- presentations

function presentations() {
  const own = { ...grant, sessionKey: ZERO, maxEnergyWh: 0 };
  const good = signed(consumer, "PresentToken", grant);
  const personal = sign(consumer, hashMessage(getBytes(TOKEN)));
  const list = [];
  const add = (name, more) => list.push({ name, scheme: "eip712", ...grant, publicKey: consumer.publicKey, signature: good, ...more });
  const refuse = (name, refused, more) => add(name, { ...more, refused });
  const forged = (change) => ({ signature: signed(consumer, "PresentToken", { ...grant, ...change }) });

  add("typed data, a session key granted", {});
  add("typed data, no session key", { ...own, signature: signed(consumer, "PresentToken", own) });
  add("personal_sign over the 32 raw bytes", { ...own, scheme: "eip191", signature: personal });
  add("the public key in 33 bytes", { publicKey: consumer.compressedPublicKey });
  add("the public key in 64 bytes", { publicKey: dataSlice(consumer.publicKey, 1) });
  for (const form of Object.keys(FORMS)) {
    const [change, expected] = FORMS[form];
    const verdict = expected === "same" ? {} : { refused: expected };
    add(`typed data, ${form}`, { signature: change(good), ...verdict });
    add(`personal_sign, ${form}`, { ...own, scheme: "eip191", signature: change(personal), ...verdict });
  }
  refuse("a bare signature over the token, as typed data", "wrong_signer", { signature: sign(consumer, TOKEN) });
  refuse("a bare signature over the token, as personal_sign", "wrong_signer", { ...own, scheme: "eip191", signature: sign(consumer, TOKEN) });
  refuse("personal_sign over the token's hex text", "wrong_signer", { ...own, scheme: "eip191", signature: sign(consumer, hashMessage(TOKEN)) });
  refuse("personal_sign said to be typed data", "wrong_signer", { ...own, signature: personal });
  refuse("typed data said to be personal_sign", "wrong_signer", { ...own, scheme: "eip191", signature: signed(consumer, "PresentToken", own) });
  refuse("personal_sign that grants a session key", "malformed", { scheme: "eip191", signature: personal });
  refuse("a session key that may sign for nothing", "malformed", { maxEnergyWh: 0, ...forged({ maxEnergyWh: 0 }) });
  refuse("the struct without the domain", "wrong_signer", { signature: sign(consumer, structHashOf("PresentToken", grant)) });
  for (const [name, where] of Object.entries(OTHER_DOMAINS)) {
    refuse(`signed for ${name}`, "wrong_signer", { signature: signed(consumer, "PresentToken", grant, where) });
  }
  for (const [field, value] of Object.entries(OTHER_FIELDS)) {
    refuse(`signed with another ${field}`, "wrong_signer", forged({ [field]: value }));
  }
  refuse("a stranger's signature", "wrong_signer", { signature: signed(stranger, "PresentToken", grant) });
  refuse("a stranger's key and signature", "wrong_signer", { signature: signed(stranger, "PresentToken", grant), publicKey: stranger.publicKey });
  refuse("a stranger's key, the consumer's signature", "wrong_signer", { publicKey: stranger.publicKey });
  refuse("a public key that is on no curve", "malformed", { publicKey: "0x" + "01".repeat(64) });
  return list;
}

const OTHER_DOMAINS = {
  "another chain": { ...domain, chainId: 1 },
  "another contract": { ...domain, verifyingContract: "0x" + "c0".repeat(20) },
  "another version": { ...domain, version: "2" },
  "another name": { ...domain, name: "V2V" },
};
const OTHER_FIELDS = {
  token: id("another"), sessionId: id("another"), provider: who(rival), sessionKey: who(stranger), maxEnergyWh: 151,
  validUntil: VALIDITY + 1, challenge: id("another"),
};

// --------------------------------------------------------------------------------------------------- receipts

function receipts() {
  const list = [];
  const receiptBy = (signer, deliveredWh, sessionId = SESSION, where = domain) => signed(signer, "Receipt", { sessionId, deliveredWh }, where);
  const add = (name, deliveredWh, ack, refused) => list.push({
    name, deliveredWh: number(deliveredWh), ack, ...(refused ? { refused } : {}),
  });
  const byOwn = (receiptSignature, more = {}) => ({
    token: NONE, sessionKey: ZERO, maxEnergyWh: 0, validUntil: 0, challenge: NONE, grantSignature: "0x", receiptSignature, ...more,
  });
  const granted = (grantSignature, receiptSignature, given = grant) => {
    const { token, sessionKey: granted, maxEnergyWh, validUntil, challenge: bound } = given;
    return { token, sessionKey: granted, maxEnergyWh: number(maxEnergyWh), validUntil: number(validUntil), challenge: bound, grantSignature, receiptSignature };
  };
  const good = signed(consumer, "PresentToken", grant);
  const byKey = (deliveredWh, given = grant) => granted(signed(consumer, "PresentToken", given), receiptBy(sessionKey, deliveredWh), given);

  for (const wh of [0, 1, 100, ENERGY_WH]) add(`own key, ${wh} Wh`, wh, byOwn(receiptBy(consumer, wh)));
  add("own key, one Wh above the order", ENERGY_WH + 1, byOwn(receiptBy(consumer, ENERGY_WH + 1)), "over_order");
  add("own key, as much as a uint64 holds", UINT64_MAX, byOwn(receiptBy(consumer, UINT64_MAX)), "over_order");
  add("own key, stray grant fields", 100, byOwn(receiptBy(consumer, 100), { token: TOKEN, maxEnergyWh: 7, validUntil: 9, grantSignature: "0xdead" }));
  for (const wh of [0, 1, 100, 150]) add(`granted key, ${wh} Wh`, wh, byKey(wh));
  add("granted key, one Wh above the grant", 151, byKey(151), "over_grant");
  add("granted key, one Wh above the order", 201, byKey(201, { ...grant, maxEnergyWh: 300 }), "over_order");
  add("granted key, the largest grant", 200, byKey(200, { ...grant, maxEnergyWh: UINT64_MAX, validUntil: UINT64_MAX }));
  add("granted key, a grant that has expired: it is only hashed", 100, byKey(100, { ...grant, validUntil: 1 }));
  add("granted key, another block's token: it is only hashed", 100, byKey(100, { ...grant, token: id("before the reorg") }));
  const selfGrant = { ...grant, sessionKey: who(consumer) };
  add("the consumer grants its own key", 100, granted(signed(consumer, "PresentToken", selfGrant), receiptBy(consumer, 100), selfGrant));

  for (const form of Object.keys(FORMS).slice(1)) { // the contract knows one form: all others are nothing there
    const [change, expected] = FORMS[form];
    const verdict = expected === "same" ? { refused: "bad_signature", normalised: true } : { refused: expected };
    for (const [name, ack] of [
      ["own key", byOwn(change(receiptBy(consumer, 100)))],
      ["granted key, receipt", granted(good, change(receiptBy(sessionKey, 100)))],
      ["granted key, grant", granted(change(good), receiptBy(sessionKey, 100))],
    ]) list.push({ name: `${name}: ${form}`, deliveredWh: 100, ack, ...verdict });
  }
  for (const [name, signer] of Object.entries({ stranger, provider, operator, "ungranted key": sessionKey })) {
    add(`own key: signed by the ${name}`, 100, byOwn(receiptBy(signer, 100)), "wrong_signer");
  }
  for (const [name, signer] of Object.entries({ stranger, provider, consumer })) {
    add(`granted key: receipt by the ${name}`, 100, granted(good, receiptBy(signer, 100)), "wrong_signer");
  }
  for (const [name, signer] of Object.entries({ stranger, provider, "session key itself": sessionKey })) {
    add(`granted key: granted by the ${name}`, 100, granted(signed(signer, "PresentToken", grant), receiptBy(sessionKey, 100)), "wrong_signer");
  }
  for (const [name, where] of Object.entries(OTHER_DOMAINS)) {
    add(`own key: for ${name}`, 100, byOwn(receiptBy(consumer, 100, SESSION, where)), "wrong_signer");
    add(`granted key: receipt for ${name}`, 100, granted(good, receiptBy(sessionKey, 100, SESSION, where)), "wrong_signer");
    add(`granted key: grant for ${name}`, 100, granted(signed(consumer, "PresentToken", grant, where), receiptBy(sessionKey, 100)), "wrong_signer");
  }
  const others = {
    "the next auction": sessionIdOf(domain, who(consumer), who(provider), 2),
    "another provider": sessionIdOf(domain, who(consumer), who(rival), 1),
    "the token in place of the session": TOKEN,
  };
  for (const [name, sessionId] of Object.entries(others)) {
    add(`own key: session of ${name}`, 100, byOwn(receiptBy(consumer, 100, sessionId)), "wrong_signer");
    add(`granted key: session of ${name}`, 100, granted(good, receiptBy(sessionKey, 100, sessionId)), "wrong_signer");
  }
  for (const [field, value] of Object.entries(OTHER_FIELDS)) {
    if (field === "sessionId" || field === "provider") { // not told, so the grant is just for something else
      add(`granted key: a grant with another ${field}`, 100, granted(signed(consumer, "PresentToken", { ...grant, [field]: value }), receiptBy(sessionKey, 100)), "wrong_signer");
    } else {
      add(`granted key: ${field} exchanged after signing`, 100, { ...granted(good, receiptBy(sessionKey, 100)), [field]: value }, "wrong_signer");
    }
  }
  for (const wh of [99, 101]) {
    add(`own key: signed for ${wh} Wh`, 100, byOwn(receiptBy(consumer, wh)), "wrong_signer");
    add(`granted key: signed for ${wh} Wh`, 100, granted(good, receiptBy(sessionKey, wh)), "wrong_signer");
  }
  const bare = structHashOf("Receipt", { sessionId: SESSION, deliveredWh: 100 });
  add("own key: the struct without the domain", 100, byOwn(sign(consumer, bare)), "wrong_signer");
  add("own key: personal_sign over the digest", 100, byOwn(sign(consumer, hashMessage(getBytes(digestOf("Receipt", { sessionId: SESSION, deliveredWh: 100 }))))), "wrong_signer");
  add("own key: a bare signature over the session id", 100, byOwn(sign(consumer, SESSION)), "wrong_signer");
  add("granted key: personal_sign grants nothing", 100, granted(sign(consumer, hashMessage(getBytes(TOKEN))), receiptBy(sessionKey, 100)), "wrong_signer");
  add("nothing at all", 0, byOwn("0x"), "bad_signature");
  return list;
}

// --------------------------------------------------------------------------------------------------- messages

const canonical = (body) => JSON.stringify(Object.fromEntries(Object.entries(body).sort(([a], [b]) => (a < b ? -1 : 1))));

// OCMF 1.4 as text: the numbers must stand as they are, and what is signed is this very string.
function ocmf(page, time, code, register, evidence) {
  const payload = `{"FV":"1.4","GI":"v2v-agent","GS":"${who(provider)}","PG":"T${page}","MV":"V2V","MM":"Simulated charger",` +
    `"MS":"0000000001","MF":"1.0.0","IS":true,"IL":"CERTIFIED","IF":[],"IT":"UNDEFINED","ID":"${who(consumer)}","CT":"CBIDC","CI":"left",` +
    `"RD":[{"TM":"${time},000+0000 I","TX":"${code}","RV":${register},"RI":"01-00:C0.08.00*FF","RU":"kWh","RT":"AC","EF":"","ST":"G"}],` +
    `"U":${JSON.stringify({ sessionId: SESSION, token: TOKEN, ...evidence })}}`;
  const { r, s } = meter.sign(sha256(toUtf8Bytes(payload)));
  const integer = (hex) => { // DER: shortest form, and never negative
    const bytes = getBytes(toBeHex(BigInt(hex)));
    return concat(["0x02", toBeHex(bytes.length + (bytes[0] >> 7), 1), bytes[0] >> 7 ? "0x00" : "0x", bytes]);
  };
  const both = concat([integer(r), integer(s)]);
  const der = concat(["0x30", toBeHex((both.length - 2) / 2, 1), both]);
  return `OCMF|${payload}|{"SA":"ECDSA-secp256k1-SHA256","SD":"${der.slice(2)}"}`;
}

function records() {
  const { token, sessionKey: granted, maxEnergyWh, validUntil, challenge: bound } = grant;
  const ack = {
    receiptSignature: signed(sessionKey, "Receipt", { sessionId: SESSION, deliveredWh: 97 }), token, sessionKey: granted, maxEnergyWh, validUntil,
    challenge: bound, grantSignature: signed(consumer, "PresentToken", grant),
  };
  return {
    ocmfBegin: ocmf(7, "2026-09-21T14:13:50", "B", "5000.000000", {}),
    ocmfEnd: ocmf(8, "2026-09-21T14:14:23", "R", "5000.097400", { deliveredWh: 97, ackedWh: 97, ack }),
  };
}

function bodies() {
  const withSignature = (name) => ({ ...SIGNED[name][0], signature: signed(SIGNED[name][1], name, SIGNED[name][0]) });
  return {
    hello: { type: "hello", ...withSignature("ProviderHello") },
    present: {
      type: "present", scheme: "eip712", sessionId: SESSION, token: TOKEN, chargerId: hello.chargerId, helloNonce: hello.nonce, nonceC,
      sessionKey: grant.sessionKey, maxEnergyWh: grant.maxEnergyWh, validUntil: grant.validUntil, publicKey: consumer.publicKey,
      signature: signed(consumer, "PresentToken", grant),
    },
    accept: { type: "accept", ...withSignature("SessionAccept") },
    refusal: { type: "refusal", reason: "stale_hello", detail: "this Hello is not current; fetch it again and sign anew" },
    reading: { type: "reading", ...withSignature("MeterReading") },
    receipt: { type: "receipt", ...withSignature("Receipt") },
    ack: { type: "ack", sessionId: SESSION, deliveredWh: 97 },
    status: { type: "status", sessionId: SESSION, stage: "PAUSED", deliveredWh: 147, ackedWh: 97, reason: "waiting_for_receipt" },
    stop: { type: "stop", ...withSignature("StopRequest") },
    final: {
      type: "final", sessionId: SESSION, stage: "SETTLED", stopReason: "Remote", deliveredWh: 97, settledWh: 97, costWei: "19400000000000",
      settlementTx: id("a settlement"), ...records(),
    },
  };
}

function messages() {
  const all = bodies(), receipt = all.receipt, text = canonical(receipt);
  const spelled = (name, data, body) => ({ name, text: data, canonical: canonical(body) });
  const refuse = (name, data) => ({ name, text: data, refused: "malformed" });
  const but = (change) => JSON.stringify({ ...receipt, ...change });
  const without = Object.fromEntries(Object.entries(receipt).filter(([name]) => name !== "signature"));
  const strange = {
    "a float": text.replace(":97,", ":97.0,"), "an exponent": text.replace(":97,", ":97e0,"), "a negative number": but({ deliveredWh: -1 }),
    "minus zero": text.replace(":97,", ":-0.0,"), "NaN": text.replace(":97,", ":NaN,"), "2^53": text.replace(":97,", ":9007199254740992,"),
    "a number of 40 digits": text.replace(":97,", `:${"9".repeat(40)},`), "a number in quotes": but({ deliveredWh: "97" }), "true": but({ deliveredWh: true }),
    "null": but({ deliveredWh: null }), "a key twice": text.replace("{", '{"deliveredWh":97,'), "a key too many": but({ note: 1 }),
    "a key too few": JSON.stringify(without), "no type": JSON.stringify(Object.fromEntries(Object.entries(receipt).filter(([name]) => name !== "type"))),
    "an unknown type": but({ type: "refund" }), "a list": `[${text}]`, "nested": but({ sessionId: { of: SESSION } }), "two messages": text + text,
    "not JSON": "hello", "empty": "", "hex without 0x": but({ sessionId: SESSION.slice(2) }), "31 bytes": but({ sessionId: SESSION.slice(0, -2) }),
    "33 bytes": but({ sessionId: SESSION + "00" }), "odd hex": but({ sessionId: SESSION.slice(0, -1) + "g" }), "blanks in hex": but({ sessionId: SESSION.slice(0, -4) + " 1 2" }),
    "a signature of 63 bytes": but({ signature: dataSlice(receipt.signature, 0, 63) }), "a signature of 66 bytes": but({ signature: receipt.signature + "00" }),
    "an unknown scheme": JSON.stringify({ ...all.present, scheme: "eth_sign" }), "a public key of 32 bytes": JSON.stringify({ ...all.present, publicKey: NONE }),
    "longer than 4 KiB": text + " ".repeat(4097 - text.length), "minus zero, as an integer": text.replace(":97,", ":-0,"),
    "a key twice, once spelled otherwise": text.replace("{", '{"delivere\\u0064Wh":97,'), "a byte order mark": "\ufeff" + text,
  };
  return [
    ...Object.entries(all).map(([name, body]) => spelled(name, canonical(body), body)),
    spelled("keys in another order", JSON.stringify(receipt), receipt), spelled("white space", JSON.stringify(receipt, null, 2), receipt),
    spelled("hex in capitals", but({ sessionId: "0x" + SESSION.slice(2).toUpperCase() }), receipt),
    spelled("exactly 4 KiB", text + " ".repeat(4096 - text.length), receipt),
    spelled("2^53 - 1", but({ deliveredWh: Number.MAX_SAFE_INTEGER }), { ...receipt, deliveredWh: Number.MAX_SAFE_INTEGER }),
    ...Object.entries(strange).map(([name, data]) => refuse(name, data)),
    ...["utf16le", "latin1"].map((encoding) => ({
      name: `in ${encoding}`, bytes: hexlify(Buffer.from(canonical({ ...all.refusal, detail: "f\u00fcr" }), encoding)), refused: "malformed",
    })),
  ];
}

// ------------------------------------------------------------------------------------------------------ write

const folder = process.argv[2] ?? dirname(fileURLToPath(import.meta.url));
const market = {
  chainId: domain.chainId, contract: domain.verifyingContract, consumer: who(consumer), provider: who(provider), operator: who(operator), sessionKey: who(sessionKey),
  meterKey: meter.publicKey,
  auctionNonce: AUCTION_NONCE, energyWh: ENERGY_WH, sessionId: SESSION,
};
const files = {
  identities: identities(), typed: typed(), signatures: signatures(), "public-keys": publicKeys(), presentations: presentations(),
  receipts: receipts(), messages: messages(),
};
for (const [name, vectors] of Object.entries(files)) {
  const lines = vectors.map((vector) => "    " + JSON.stringify(vector)).join(",\n");
  writeFileSync(join(folder, `${name}.json`), `{\n  "market": ${JSON.stringify(market)},\n  "vectors": [\n${lines}\n  ]\n}\n`);
}
