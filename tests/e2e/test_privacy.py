"""What a whole evening leaves behind where strangers look: nothing of a counterparty, and of a private key nothing anywhere.

The daemon is the real one, at its most talkative, with an encrypted operator key. One consumer comes over MQTT and again over
HTTP, strangers come with lies, the charger falls silent, the daemon is killed and started again, and once with a wrong
password. Then everything that was written or sent is searched (`leaks.py`). PROTOCOL section 8 says what may stand where.
"""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import dataclass, field, replace
from pathlib import Path

import aiomqtt
import pytest
from leaks import sightings
from stage import ASK_S, RATE_WEI_PER_KWH, Agent, Program, Stage, eventually, note, surroundings
from story import CONSUMER
from town import v2v

from agent import keys
from agent.chain import contract
from agent.consumer.journey import Order
from agent.core import events as ev
from agent.core import messages as ms
from agent.core.messages import decode, encode
from agent.core.units import cost_wei_ceil, hex0x
from agent.demo.devnet import derive_key
from agent.demo.market import written
from agent.errors import EXIT_MISCONFIGURED

PASSWORD = "correct horse battery staple"
WRONG_PASSWORD = "incorrect zebra battery staple"
OWNERS_PAGES = ("/", "/status", "/status.json", "/metrics")
MALLORY_SREF = "badbad" * 5 + "42"
ORDER_WH = 12
BIDDING_S = 3_600  # the story decides when it is over, not the machine's speed
QUICK = {"CHAIN__CONFIRMATIONS": 2, "CHAIN__FINALITY": 2, "PORTS__0__FAILSAFE_TIMEOUT_S": 2}
# Root may look into everything, so a test that runs as root gives its powers away first.
BARE = ("setpriv", "--bounding-set=-all", "--inh-caps=-all") if os.geteuid() == 0 else ()
CORE_MAX = resource.getrlimit(resource.RLIMIT_CORE)[1]
GENEROUS = ("prlimit", f"--core={'unlimited' if CORE_MAX < 0 else CORE_MAX}:")
PRY = """
import ctypes, sys
try:
    open(f"/proc/{sys.argv[1]}/mem", "rb").close()
    print("read")
except PermissionError:
    pass
if ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0) == 0:  # PTRACE_SEIZE: what gcore needs, without a stop
    print("attached")
"""
IDLE = {"ports": {"left": {"reason": None}}}  # what a page says that does not answer
SPOKEN_SEARCHED = 25  # of the first and of the last messages; each is looked for in thirty shapes

pytestmark = pytest.mark.timeout(240)


@dataclass
class Evening:
    """What was seen of it, by where; `private`: what PROTOCOL keeps out of an owner's tools."""

    owners: dict[str, bytes] = field(default_factory=dict)  # logs, telemetry, page, command lines
    others: dict[str, bytes] = field(default_factory=dict)  # journal, exports, in/out, process, settings
    keys: dict[str, bytes] = field(default_factory=dict)
    private: dict[str, bytes] = field(default_factory=dict)
    addresses: dict[str, bytes] = field(default_factory=dict)
    core_limit: tuple[str, ...] = ()  # soft and hard, of the living daemon
    pried: list[str] = field(default_factory=list)
    cores: list[str] = field(default_factory=list)


class Spy:
    """Hears everything that the broker carries."""

    def __init__(self, port):
        self._port = port
        self.heard = []  # (topic, payload)
        self.is_listening = False

    async def listen(self):
        """Until the stage ends."""
        async with aiomqtt.Client("127.0.0.1", self._port) as client:
            await client.subscribe("#", qos=1)
            self.is_listening = True
            async for message in client.messages:
                self.heard.append((str(message.topic), bytes(message.payload)))

    def of(self, *kinds):
        """What was said on topics of these kinds (`hello`, `car`, ...), with the topics' own ends."""
        mine = [(topic.split("/", 3)[3], payload) for topic, payload in self.heard]
        return b"\n".join(
            topic.encode() + b" " + payload for topic, payload in mine if topic.split("/")[0] in kinds
        )


# ---- strangers


def ask(stage, kind, body, sref=MALLORY_SREF):
    """Post something at the local door; (status, answer)."""
    request = urllib.request.Request(  # noqa: S310 - our own loopback address
        f"{stage.door_url}/v1/{kind}", body, {"X-V2V-Sref": sref, "Content-Type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return answer.status, answer.read()
    except urllib.error.HTTPError as refusal:
        return refusal.code, refusal.read()


def hello(stage):
    """The current Hello, as anybody gets it."""
    with urllib.request.urlopen(f"{stage.door_url}/v1/hello", timeout=30) as page:  # noqa: S310
        (one,) = json.load(page)
    return decode(json.dumps(one).encode())


def lies(stage, terms):
    """Presentations that must be refused, each with the reason: garbage and strangers under a live nonce."""
    live = hello(stage)
    signature = CONSUMER.private.sign_recoverable(b"\x07" * 32, hasher=None)[:64] + b"\x1b"
    honest_looking = ms.Present(
        "eip712",
        terms.session_id,
        terms.token,
        live.charger_id,
        live.nonce,
        b"\x5a\xa5" * 16,
        CONSUMER.address,
        ORDER_WH,
        terms.valid_until_s,
        CONSUMER.public_key,
        signature,
    )
    garbage = replace(honest_looking, signature=b"\xff\x13" * 32 + b"\x1b")
    for reason, lie in (
        ("wrong_signer", honest_looking),
        ("bad_signature", garbage),
        ("stale_hello", replace(honest_looking, hello_nonce=b"\xa7\x31" * 16)),
        ("wrong_token", replace(honest_looking, token=b"\x91\x4e" * 16)),
    ):
        yield reason, encode(lie)
    yield "malformed", b'{"type": "present", "signature": "0x' + b"c3d1" * 32 + b'"'
    yield "malformed", b"\x00\xff" * 100


def refused_by_name(stage, evening, terms):
    """Tell every lie; keep what they were made of."""
    for number, (reason, lie) in enumerate(lies(stage, terms)):
        _, answer = ask(stage, "present", lie)
        assert json.loads(answer)["reason"] == reason, (reason, answer)
        evening.private |= secrets_in(f"lie {number}", lie)


def secrets_in(name, payload):
    """What one message of the protocol keeps between the two sides."""
    found = re.findall(rb'"(signature|nonce|helloNonce|nonceC|challenge)":"0x([0-9a-f]{64,})"', payload)
    return {f"{key.decode()} of {name}": bytes.fromhex(digits.decode()) for key, digits in found}


# ---- the evening


def locked(stage):
    """Settings whose operator key is a keystore, its password in a file of its own."""
    folder = stage.folder / "keys"
    keystore = folder / "alice-operator.json"
    keys.write_key(stage.provider.operator.signer, keystore, password=PASSWORD)
    stage.provider.operator.key_file.unlink()
    return {
        "LOG__LEVEL": "debug",
        "KEYS__OPERATOR": keystore,
        "KEYS__OPERATOR_PASSWORD": written(folder / "password", PASSWORD + "\n"),
    }


def look_at(stage, agent, evening, when):
    """Its page and metrics, and what anybody on this computer may see of the process."""
    for page in OWNERS_PAGES:
        try:
            with urllib.request.urlopen(stage.door_url + page, timeout=30) as answer:  # noqa: S310
                evening.owners[f"{page} {when}"] = answer.read()
        except urllib.error.HTTPError as away:
            assert away.code == 404, page  # noqa: PT017 - what there is, is searched
    assert f"/status.json {when}" in evening.owners
    for file in ("environ", "cmdline"):
        with contextlib.suppress(PermissionError):  # only root may look at all
            evening.others[f"/proc/PID/{file} {when}"] = Path(
                f"/proc/{agent.process.pid}/{file}"
            ).read_bytes()


def matched_by_the_agents_bid(stage, journey, evening):
    """As `stage.matched`, but the owner asks the running agent to bid. The terms."""
    starting = stage.begin(journey.start_auction(Order(ORDER_WH, RATE_WEI_PER_KWH, BIDDING_S, 600)))
    eventually(lambda: stage.auction().is_live, ASK_S, "the auction is open")
    bond_wei = cost_wei_ceil(RATE_WEI_PER_KWH, ORDER_WH)
    stage.send(stage.provider.owner, contract.encode_deposit(), bond_wei)
    who = ("--consumer", hex0x(stage.consumer.address), "--rate", str(RATE_WEI_PER_KWH * 8 // 10))
    said = v2v("provider", "bid", *who, "--config", str(stage.folder / "alice/agent.toml"))
    assert said.exit_code == 0, said.err
    # It answers whom it was asked about; what else it says may be stored like everything here.
    evening.owners["v2v provider bid"] = (said.out + said.err).replace(who[1], "WHO").encode()
    stage.pass_time(BIDDING_S)
    starting.result(ASK_S)
    return stage.do(journey.connect())


def bought(stage, journey, evening, terms, *, http):
    """One session's purchase, with what the consumer's journal had to remember of it."""
    buying = stage.at_the_plug(journey, http=http)

    def presented():
        errand = journey.journal.open_errand
        return None if errand is None else errand.presented

    def remembered():
        assert not buying.done() or buying.result()
        return presented()

    message = eventually(remembered, 60, "the token is presented").message
    evening.private |= secrets_in(f"presentation {http=}", message)
    evening.private["token"] = terms.token
    return buying


def everything_said_by_commands(stage, evening):
    """The owner's command lines, as text and as JSON."""
    config = str(stage.folder / "alice/agent.toml")
    asked = (("provider", "sessions", "--config"), ("provider", "status", "--config"), ("config", "check"))
    for words in ((*one, config) for one in asked):
        for options in ((), ("--json",)):
            said = v2v(*words, *options)
            assert said.exit_code == 0, said.err
            evening.owners[f"v2v {' '.join((*words[:2], *options))}"] = (said.out + said.err).encode()
    out = stage.folder / "exports"
    said = v2v("provider", "export", "--all", "--out", str(out), "--config", config)
    assert said.exit_code == 0, said.err
    evening.owners["v2v provider export"] = (said.out + said.err).encode()
    assert len(list(out.iterdir())) == 2


def with_a_wrong_password(stage, charger, settings):
    """A start that cannot open its keystore."""
    wrong = written(stage.folder / "keys/wrong", WRONG_PASSWORD + "\n")
    agent = stage.agent(charger, **(settings | {"KEYS__OPERATOR_PASSWORD": wrong}))
    assert agent.ended() == EXIT_MISCONFIGURED, agent.said
    assert "does not open with this password" in agent.said


def what_the_journal_knows(rows):
    """Signatures and challenges of every session, as they are on the disk."""
    for number, row in enumerate(rows):
        if isinstance(row, ev.TokenPresented):
            yield f"grant {number}", row.presentation.signature
            yield f"challenge {number}", row.presentation.challenge
        if isinstance(row, ev.ReceiptCredited):
            yield f"receipt {number}", row.ack.receipt_signature
        if isinstance(row, ev.SettlementSigned | ev.BidSigned):
            yield f"transaction {number}", row.raw_tx[-65:]
        if isinstance(row, ev.MeterRecordSigned):
            yield f"record {number}", bytes.fromhex(json.loads(row.ocmf.split("|")[2])["SD"])


def collected(stage, spy, agent, evening):
    """Everything else, when it is over."""
    evening.owners["owner's telemetry"] = spy.of("car")
    evening.owners["online"] = spy.of("online")
    evening.others["hello, in and out"] = spy.of("hello", "in", "out")
    evening.owners["agent.log"] = agent.path.read_bytes()  # all lives
    evening.private |= dict(what_the_journal_knows(agent.rows()))
    spoken = [payload for topic, payload in spy.heard if topic.split("/")[3] in ("hello", "in", "out")]
    for number, payload in enumerate(spoken[:SPOKEN_SEARCHED] + spoken[-SPOKEN_SEARCHED:]):
        evening.private |= secrets_in(f"message {number}", payload)
    for file in stage.folder.rglob("*"):
        if file.is_file() and "keys" not in file.parts and file.name != "agent.log":
            evening.others[str(file.relative_to(stage.folder))] = file.read_bytes()
    for label in ("alice", "alice-operator", "alice-meter", "carol", "organisation"):
        evening.keys[f"{label}'s key"] = derive_key(stage.net.seed, label)
    evening.keys |= {"password": PASSWORD.encode(), "wrong password": WRONG_PASSWORD.encode()}
    evening.addresses = {
        "consumer": stage.consumer.address,
        "provider": stage.provider.owner.address,
        "operator": stage.provider.operator.address,
        "market": stage.market.address,
    }


def forged_receipt(stage, agent, evening):
    """Somebody else signs for the energy."""
    session_id = bytes.fromhex(eventually(agent.session, 30, "the page answers")["session_id"][2:])
    forged = encode(ms.ReceiptMessage(session_id, agent.delivered_wh(), b"\xfa\x13" * 32 + b"\x1b"))
    _, answer = ask(stage, "receipt", forged)
    assert json.loads(answer)["type"] in ("refusal", "ack"), answer  # ack: the consumer was quicker
    evening.private |= secrets_in("forged receipt", forged)


def fallen_silent(agent, charger):
    """The charger does not answer for a while: an error on the wire, and a reason on the page."""
    charger.signal(signal.SIGSTOP)
    try:
        eventually(lambda: (agent.status() or IDLE)["ports"]["left"]["reason"], 30, "the silence is noticed")
    finally:
        charger.signal(signal.SIGCONT)


# ---- the process itself


class BareAgent(Agent):
    """The daemon as an ordinary user has it, on a computer that is generous with core files."""

    def __init__(self, stage, config, environ):
        words = (*GENEROUS, *BARE, sys.executable, "-m", "agent", "provider", "run", "--config", config)
        Program.__init__(self, words, config.parent, "agent", environ)
        self._stage = stage
        self.journal_path = config.parent / "journal.sqlite"


def prying(pid):
    """What another process of the same user, without root's powers, can do to this one: read it, attach to it."""
    words = [*BARE, sys.executable, "-c", PRY, str(pid)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()


def aborted(program):
    """End it as the watchdog does; the core files that it leaves."""
    program.signal(signal.SIGABRT)
    assert program.ended() == -signal.SIGABRT
    return [file.name for file in program.path.parent.glob("core*")]


def seen_from_outside(agent, evening):
    """What limits the living daemon has, what others can do to it, and what it leaves when it is aborted."""
    limits = Path(f"/proc/{agent.process.pid}/limits").read_text()
    evening.core_limit = re.search(r"^Max core file size +(\S+) +(\S+)", limits, re.MULTILINE).groups()
    evening.pried = prying(agent.process.pid)
    evening.cores = aborted(agent)


@pytest.fixture(scope="module")
def evening(tmp_path_factory):
    """Two sessions with everything that may go wrong, and all that is left of them."""
    seen = Evening()
    with Stage(tmp_path_factory.mktemp("privacy")) as stage:
        spy = Spy(stage.broker_port)
        stage.begin(spy.listen())
        eventually(lambda: spy.is_listening, 30, "the spy listens")
        settings = locked(stage)
        charger = stage.charger("--power-w-max", "5500")
        agent = stage.agent(charger, **settings).started()

        journey = stage.journey()
        terms = stage.matched(journey, ORDER_WH)
        eventually(lambda: agent.session().get("stage") == "MATCHED", 60, "the session is believed")
        refused_by_name(stage, seen, terms)
        buying = bought(stage, journey, seen, terms, http=False)
        eventually(lambda: agent.delivered_wh() >= 2, 60, "energy flows")
        look_at(stage, agent, seen, "while energy flows")
        forged_receipt(stage, agent, seen)
        fallen_silent(agent, charger)
        agent.kill()
        other_form = QUICK | settings | {"LOG__FORMAT": "journal"}
        agent = stage.played(BareAgent(stage, stage.config(charger.wire), surroundings(**other_form)))
        assert buying.result(90).energy_wh_settled == ORDER_WH

        terms = matched_by_the_agents_bid(stage, journey, seen)
        buying = bought(stage, journey, seen, terms, http=True)
        assert buying.result(90).energy_wh_settled == ORDER_WH
        eventually(lambda: agent.session().get("stage") == "SETTLED", 60, "the agent believes it")
        look_at(stage, agent, seen, "at the end")
        everything_said_by_commands(stage, seen)
        seen_from_outside(agent, seen)
        collected(stage, spy, agent, seen)
        with_a_wrong_password(stage, charger, settings)
        seen.owners["agent.log"] = agent.path.read_bytes()
    return seen


def test_no_private_key_and_no_password_stands_anywhere(evening):
    """Would catch a key in a log, topic, journal, export, settings, argument, environment or page; in any shape."""
    found = sightings(evening.keys, evening.owners | evening.others)
    assert not found, "\n".join(found)


def test_owners_tools_hold_nothing_that_belongs_to_the_two_sides(evening):
    """Would catch a signature, nonce, challenge or token in a log line, the telemetry, the page, or a command's output."""
    found = sightings(evening.private, evening.owners)
    assert not found, "\n".join(found)


def test_logs_and_telemetry_shorten_every_address(evening):
    """Would catch a full address in what is stored, graphed and sent to whoever helps; a counterparty's above all."""
    written_by_the_agent = {
        place: content
        for place, content in evening.owners.items()
        if not place.startswith("v2v config check")
    }
    found = sightings(evening.addresses, written_by_the_agent)
    assert not found, "\n".join(found)
    found = sightings({"consumer": evening.addresses["consumer"]}, evening.owners)
    assert not found, "\n".join(found)


def test_the_search_finds_what_may_be_there(evening):
    """Would catch a search for the wrong bytes: what is kept out above does stand where PROTOCOL allows it."""
    places = "\n".join(sightings(evening.private, evening.others))
    for wanted in (
        r"grant \d+, as hex, in alice/journal\.sqlite",
        r"receipt \d+, as hex, in hello, in and out",
        r"record \d+, as hex, in exports/",
        r"transaction \d+, as hex, in exports/",
        r"helloNonce of presentation http=False, as hex, in hello, in and out",
    ):
        assert re.search(wanted, places), wanted
    assert sightings(evening.addresses, evening.others)
    said = evening.owners["agent.log"].decode()
    for event in (
        '"charger.lost"',
        '"session.settled"|V2V_EVENT=session.settled',
        "V2V_EVENT=agent.started",
    ):
        assert re.search(event, said), event
    assert b'"stage":"DELIVERING"' in evening.owners["owner's telemetry"]


@pytest.mark.parametrize("place", ["agent.log", "owner's telemetry", "/status.json at the end"])
def test_a_planted_secret_turns_it_red(evening, place):
    """Would catch a test of privacy that cannot fail."""
    dirty = replace(evening, owners=dict(evening.owners))
    some_key, some_signature = evening.keys["alice-operator's key"], next(iter(evening.private.values()))
    dirty.owners[place] += (
        some_key.hex().upper().encode()
        + some_signature
        + b"0x"
        + evening.addresses["consumer"].hex().encode()
    )
    for check in (
        test_no_private_key_and_no_password_stands_anywhere,
        test_owners_tools_hold_nothing_that_belongs_to_the_two_sides,
        test_logs_and_telemetry_shorten_every_address,
    ):
        with pytest.raises(AssertionError):
            check(dirty)


def test_the_daemons_memory_is_shut(evening, tmp_path):
    """Would catch a key that a crash writes to the disk, or that any other program of the same user reads."""
    assert evening.core_limit == ("0", "0")
    assert evening.pried == []
    assert evening.cores == []
    words = (*GENEROUS, *BARE, sys.executable, "-c", "import time; print('here', flush=True); time.sleep(60)")
    with Program(words, tmp_path, "ordinary") as ordinary:
        ordinary.heard("here")
        # Yama (Debian's kernel has it) lets only parents attach; reading is then refused to us too.
        if Path("/proc/sys/kernel/yama/ptrace_scope").exists():
            note("the control of the shut memory was left out: Yama shuts every process")
        else:
            assert prying(ordinary.process.pid) == ["read", "attached"]
        pattern = Path("/proc/sys/kernel/core_pattern").read_text()
        cores = aborted(ordinary)
        if CORE_MAX and not pattern.startswith(("|", "/")):
            assert cores  # so that none, above, is an answer
