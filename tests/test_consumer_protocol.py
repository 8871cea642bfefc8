"""docs/consumer-protocol.md is enough to write a consumer, so it must be true: bytes, digests, ABI, topics, times.

`python tests/test_consumer_protocol.py` writes anew what stands behind its marks. That a consumer written from it works is
tests/e2e/test_javascript_consumer.py's to show.
"""

import json
import re
from pathlib import Path

from eth_account.messages import encode_typed_data
from eth_utils.crypto import keccak
from vectors import CONSUMER, DOMAIN, OPERATOR, PROVIDER, SESSION_KEY, unhex, vectors

from agent import door
from agent.consumer.plug import Waits
from agent.consumer.policy import Patience, SigningLimits
from agent.core import messages
from agent.core import token as rules
from agent.core.live import Policy
from agent.core.session import CREDIT_REST_S, CREDIT_REST_S_MAX, Stage
from agent.runners.http import SREF, STATUS_BY_REASON, STATUS_OF_OTHER_REASONS
from contracts import load_artefact

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/consumer-protocol.md"
CALLS = (
    "startAuction",
    "connect",
    "endAuction",
    "cancelAuction",
    "endConnection",
    "submitReceipt",
    "settle",
    "withdraw",
    "auctions",
    "sessions",
    "balances",
    "operatorOf",
    "parameters",
    "AuctionStarted",
    "BidPlaced",
    "AuctionEnded",
    "AuctionCancelled",
    "Connected",
    "SessionOpened",
    "ReceiptAccepted",
    "ConnectionClosing",
    "ConnectionEnded",
)
SIGNERS = {  # by the type of the message: who signs it, and what
    "hello": ("ProviderHello", "the provider's operator", OPERATOR),
    "present": ("PresentToken", "you", CONSUMER),
    "accept": ("SessionAccept", "the provider's operator", OPERATOR),
    "reading": ("MeterReading", "the provider's operator", OPERATOR),
    "receipt": ("Receipt", "your session key (or you)", SESSION_KEY),
    "stop": ("StopRequest", "your session key (or you)", SESSION_KEY),
}


# ---- what the page must show


def said(name):
    """The vector of a typed message as it is said in the examples."""
    return next(
        one for one in vectors("typed") if one["primaryType"] == name and one["name"] == "as it is said"
    )


def members(name):
    """A type's members as EIP-712's JSON has them, from our own type string."""
    inside = getattr(rules, name).TYPE.rstrip(")").partition("(")[2]
    return [dict(zip(("name", "type"), reversed(part.split(" ")), strict=True)) for part in inside.split(",")]


def listed(entries):
    """JSON with one line for each value."""
    return (
        "{\n"
        + ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in entries.items())
        + "\n}"
    )


def typed_data():
    """The question to a wallet for the example's presentation."""
    domain = [{"name": "name", "type": "string"}, {"name": "version", "type": "string"}]
    domain += [{"name": "chainId", "type": "uint256"}, {"name": "verifyingContract", "type": "address"}]
    vector = said("PresentToken")
    return {
        "types": {"EIP712Domain": domain, "PresentToken": members("PresentToken")},
        "primaryType": "PresentToken",
        "domain": {
            "name": rules.DOMAIN_NAME,
            "version": rules.DOMAIN_VERSION,
            "chainId": vector["chainId"],
            "verifyingContract": vector["contract"],
        },
        "message": vector["message"],
    }


def parameter(told):
    """One parameter as ethers and people write it."""
    kind = told["type"]
    if kind.startswith("tuple"):
        kind = f"({', '.join(parameter(one) for one in told['components'])}){kind[5:]}"
    return " ".join(filter(None, (kind, "indexed" if told.get("indexed") else "", told["name"])))


def abi_line(entry):
    """One entry of the ABI, human-readable."""
    line = f"{entry['type']} {entry['name']}({', '.join(map(parameter, entry['inputs']))})"
    if entry.get("stateMutability") in ("view", "payable"):
        line += f" {entry['stateMutability']}"
    outputs = entry.get("outputs", [])
    if outputs and outputs[0]["type"] == "tuple":  # a struct: its own name is nobody's
        outputs = [outputs[0] | {"name": ""}]
    if outputs:
        line += f" returns ({', '.join(map(parameter, outputs))})"
    return line


def abi():
    """The calls and events a consumer needs, as the contract has them."""
    by_name = {entry.get("name"): entry for entry in load_artefact().abi}
    return "\n".join(abi_line(by_name[name]) for name in CALLS)


def worked():
    """The example's names and hashes."""
    first = {one["name"]: one for one in reversed(vectors("identities"))}
    token, session, challenge = first["token"], first["sessionId"], first["challenge"]
    told = {
        "chain id": session["chainId"],
        "contract": session["contract"],
        "consumer": token["consumer"],
        "provider": token["provider"],
        "issuedAt, validity": f"{token['issuedAt']}, {token['validity']}",
        "auction nonce": session["auctionNonce"],
        "token": token["expected"],
        "session id": session["expected"],
        "domain separator": first["domainSeparator"]["expected"],
        f"charger id of `{first['chargerId']['port']}`": first["chargerId"]["expected"],
        "nonceC": challenge["nonceC"],
        "structHash of the Hello below": said("ProviderHello")["structHash"],
        "challenge": challenge["expected"],
        "`personal_sign` digest of the token": first["personalSign"]["expected"],
    }
    return "| example | value |\n|---|---|\n" + "\n".join(
        f"| {name} | `{value}` |" for name, value in told.items()
    )


def digests():
    """Who signs what, and the digest of the example."""
    return "| message | signed by | digest of the example |\n|---|---|---|\n" + "\n".join(
        f"| `{name}` ({kind}) | {who} | `{said(name)['digest']}` |"
        for kind, (name, who, _) in SIGNERS.items()
    )


def example(kind):
    """The bytes of a message."""
    return next(one["text"] for one in vectors("messages") if one["name"] == kind)


def fenced(language, text):
    """A block of code."""
    return f"```{language}\n{text}\n```"


def shown():
    """What stands behind each mark of the page."""
    others = {name: members(name) for name, *_ in SIGNERS.values() if name != "PresentToken"}
    return {
        "abi": fenced("solidity", abi()),
        "worked": worked(),
        "typed-data PresentToken": fenced("json", listed(typed_data())),
        "typed-data types": fenced("json", listed(others)),
        "digests": digests(),
    } | {f"message {kind}": fenced("json", example(kind)) for kind in messages.KINDS}


def behind(mark, page):
    """What the page shows behind a mark: a block of code, or the rows of a table."""
    found = re.search(
        rf"^<!-- {re.escape(mark)} -->\n(```.*?^```$|(?:\|[^\n]*\n?)*)", page, re.DOTALL | re.MULTILINE
    )
    assert found, mark
    return found


# ---- and does


def test_the_page_shows_what_is_true():
    """Would catch an example, a type, a call or an event that has changed since it was written down."""
    page = PAGE.read_text()
    stale = [mark for mark, text in shown().items() if behind(mark, page)[1].strip() != text]
    assert not stale, "python tests/test_consumer_protocol.py"
    assert set(re.findall(r"<!-- ([^>]+?) -->", page)) == set(shown())


def test_every_example_is_understood_and_signed_by_whom_the_page_says():
    """Would catch bytes that look right and that the agent would refuse: each goes through our own decoder and predicate."""
    page = PAGE.read_text()
    for kind in messages.KINDS:
        data = behind(f"message {kind}", page)[1].splitlines()[1].encode()
        message = messages.decode(data)
        assert messages.encode(message) == data
        assert kind == message.TYPE
        if kind in SIGNERS:
            name, _, signer = SIGNERS[kind]
            assert f"`{said(name)['digest']}`" in page
            assert rules.recover(unhex(said(name)["digest"]), message.signature) == signer
    challenge = messages.decode(example("accept").encode()).challenge
    present, hello = (messages.decode(example(kind).encode()) for kind in ("present", "hello"))
    assert challenge == rules.challenge(hello.typed, present.consumer_nonce)
    assert hello.provider == PROVIDER


def test_a_wallet_makes_the_digest_of_the_pages_typed_data():
    """Would catch typed data that a wallet hashes otherwise: eth_account reads the page's own JSON."""
    question = json.loads(
        "\n".join(behind("typed-data PresentToken", PAGE.read_text())[1].splitlines()[1:-1])
    )
    signable = encode_typed_data(full_message=question)
    digest = keccak(b"\x19" + signable.version + signable.header + signable.body)
    present = messages.decode(example("present").encode())
    assert rules.recover(digest, present.signature) == CONSUMER
    assert question["domain"]["chainId"] == DOMAIN.chain_id


def test_the_times_and_limits_are_the_codes():
    """Would catch a consumer that waits for the wrong moment because a number has moved."""
    policy = Policy(max_unacked_wh={})
    codes = {
        "a new Hello every": f"{door.HELLO_ROTATE_S} s",
        "a Hello is good for": f"{door.HELLO_LIFETIME_S} s",
        "the longest message": f"{messages.MESSAGE_BYTES_MAX} bytes",
        "messages at once, from one source": f"{door.SOURCE_RATE[0]:g}",
        "messages a second after that, from one source": f"{door.SOURCE_RATE[1]:g}",
        "a new presentation of one session at most every": f"{door.PRESENT_EVERY_MS // 1000} s",
        "the provider waits in a pause for a receipt": f"{policy.receipt_timeout_s} s",
        "a pause for a receipt lasts at least": (
            f"{CREDIT_REST_S} s, the next one {2 * CREDIT_REST_S} s, then {4 * CREDIT_REST_S} s ... {CREDIT_REST_S_MAX} s"
        ),
        "the provider waits after a stop for the last receipt": f"{policy.final_receipt_wait_s} s",
        "the provider stops before the token's validity ends by": f"{policy.validity_margin_s} s",
        "`final` is offered for": f"{door.NEWS_KEPT_S} s",
        "a Hello at the plug": f"{Waits().hello_s:g} s",
        "the acceptance (confirmations take time, another car may have to leave)": f"{Waits().meeting_s:g} s",
        "an `ack`, before it sends the receipt or stop again": f"{Waits().resend_s:g} s",
        "a word, before it repeats its presentation, byte for byte, to hear where it stands": f"{Waits().quiet_s:g} s",
        "any sign of life while the session is open": f"{Waits().silence_s:g} s",
        "the `final` message, once the chain says that it is settled": f"{Waits().final_s:g} s",
    }
    section = PAGE.read_text().split("## Times and limits")[1].split("\n## ")[0]
    assert dict(re.findall(r"^\| ([^|]+) \| (\d[^|]*) \|$", section, re.MULTILINE)) == codes


def test_the_limits_of_signing_are_our_own_consumers():
    """Would catch advice that our own consumer does not follow: the numbers are what a lying provider can earn."""
    limits, patience_s = SigningLimits(), Patience().patience_ms // 1000
    told = PAGE.read_text().split("6. **Receipt**")[1].split("7. **")[0]
    assert limits.tolerance_permille % 10 == 0
    words = (
        f"{limits.tolerance_permille // 10} %",
        f"{limits.pre_sign_wh} Wh",
        f"{limits.step_wh} Wh",
        f"{patience_s} s",
    )
    assert [word for word in words if word not in told] == []


def test_every_name_that_can_be_heard_has_its_advice():
    """Would catch a stage, a refusal of the door or of the contract that the page forgets, or invents."""
    page = PAGE.read_text()
    advice = page.split("## Refusals and what to do")[1].split("\n## ")[0]
    heard = set(re.findall(r"^\| `([a-z_]+)` \| \d", (ROOT / "docs/refusals.md").read_text(), re.MULTILINE))
    assert set(re.findall(r"`([a-z]+_[a-z_]+|malformed|replayed|busy|expired)`", advice)) == heard
    assert all(stage.value in page for stage in Stage)
    market = page.split("## The market")[1].split("\n## ")[0]
    errors = {entry["name"] for entry in load_artefact().abi if entry["type"] == "error"}
    named = set(re.findall(r"`([A-Z][A-Za-z]+)`", market.split("refuses by name")[1].split("\n\n")[0]))
    assert named
    assert named <= errors
    assert 200 not in {STATUS_OF_OTHER_REASONS, *STATUS_BY_REASON.values()}
    assert SREF.fullmatch("a" * 22)
    assert SREF.fullmatch("a" * 64)
    assert not SREF.fullmatch("a" * 21)


if __name__ == "__main__":
    text = PAGE.read_text()
    for mark, block in shown().items():
        found = behind(mark, text)
        text = (
            text[: found.start(1)]
            + block
            + ("" if found[1].startswith("```") else "\n")
            + text[found.end(1) :]
        )
    PAGE.write_text(text)
