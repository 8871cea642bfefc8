"""A stage for end-to-end stories: chain, broker, market, charger, agent and consumer, all real, on loopback.

    with Stage(tmp_path) as stage:
        charger = stage.charger()
        agent = stage.agent(charger)
        buying = stage.buy(40)
        eventually(lambda: agent.delivered_wh() >= 10, 60, "energy flows")
        agent.kill()

Agent, charger and broker are processes of their own, started as a user or systemd starts them; so is the chain where
anvil is installed (without it: the embedded devnet, in a thread). The consumer and the test's own questions live on an
event loop in that thread, so that a story reads from top to bottom.

Rules: nothing outlives a `with`; every wait is for a condition and has an end, and when it ends says what was waited for.
"""

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from contextlib import ExitStack, suppress
from pathlib import Path

from agent.chain import contract
from agent.chain.node import Web3Node
from agent.chain.sender import Sender
from agent.consumer.carrier_http import HttpCarrier
from agent.consumer.carrier_mqtt import Broker as BrokerPlace
from agent.consumer.carrier_mqtt import MqttCarrier
from agent.consumer.journal import ConsumerJournal
from agent.consumer.journey import Journey, Order
from agent.consumer.market import Market as ConsumersMarket
from agent.consumer.plug import Waits
from agent.consumer.policy import SigningLimits
from agent.core.token import Domain
from agent.core.units import cost_wei_ceil, hex0x
from agent.demo import market as setup
from agent.demo.devnet import Devnet, address_from_key, derive_key
from agent.journal import Journal

ROOT = Path(__file__).parents[1]
ANVIL = next(iter(sorted(ROOT.glob("contracts/node_modules/@foundry-rs/anvil-*/bin/anvil"))), None)
# Where a test run is itself killed, its processes must end too; util-linux has the word for it.
ENDING_WITH_US = ("setpriv", "--pdeathsig", "KILL") if shutil.which("setpriv") else ()
RATE_WEI_PER_KWH = 2 * 10**16
BIDDING_S = 3  # a bid is in the next block, a second later, or in the one after that
START_S = 40  # a Python process importing web3 on a busy two-core machine takes seconds; more means it hangs
ASK_S = 60  # for one question or transaction: blocks come every second
NOTES = []
TRUTH_EVERY_S = 0.5  # how often `charger simulate --truth` writes


def eventually(holds, seconds, what):
    """Wait until a condition holds that nobody announces; what it returned then. AssertionError naming it when it does not."""
    until = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.02)
    return found


def note(text):
    """Something to know about a run, shown at its end: which chain it was, how long, how exact."""
    NOTES.append(text)


def free_port():
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def surroundings(**settings):
    """The environment of a process of ours: no setting leaks in from the tester's shell; `settings` as V2V_ names."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("V2V_")}
    clean["PATH"] = f"{Path(sys.executable).parent}:{clean.get('PATH', '')}:/usr/sbin"
    return clean | {f"V2V_{name}": str(value) for name, value in settings.items()}


class Program:
    """A process in a group of its own; what it prints goes to a file. `with` waits until it is ready, and ends it,
    whatever happens.

    `split`: standard error goes to a file of its own; without it `said` has both, as on a terminal.
    """

    def __init__(self, words, folder, name, environ=None, *, split=False):
        self.name, self.path = name, folder / f"{name}.log"
        self._file = self.path.open("ab")
        self._complaints = folder.joinpath(f"{name}.err").open("ab") if split else self._file
        self._began_at = self.path.stat().st_size
        self.process = subprocess.Popen(
            [*ENDING_WITH_US, *(str(word) for word in words)],
            stdin=subprocess.DEVNULL,
            stdout=self._file,
            stderr=self._complaints,
            cwd=folder,
            env=surroundings() if environ is None else environ,
            start_new_session=True,
        )

    def __enter__(self):
        try:
            self.ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def ready(self):
        """Wait until it can be used."""

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.signal(signal.SIGKILL)
        self.process.wait(START_S)
        self._file.close()
        self._complaints.close()

    @property
    def said(self):
        """Everything it printed so far."""
        return self.path.read_bytes()[self._began_at :].decode()

    @property
    def complained(self):
        """What it printed to standard error, when that is split off."""
        return self.path.with_suffix(".err").read_text()

    @property
    def is_running(self):
        """True until it ends."""
        return self.process.poll() is None

    def signal(self, number):
        """To the whole group."""
        os.killpg(self.process.pid, number)

    def kill(self):
        """`kill -9`; returns when it is gone: the monotonic time just before, in ms."""
        at_ms = time.monotonic_ns() // 1_000_000
        self.signal(signal.SIGKILL)
        self.process.wait(START_S)
        return at_ms

    def ended(self, seconds=START_S):
        """Wait for its end; the exit code."""
        eventually(lambda: not self.is_running, seconds, f"{self.name} ends\n{self.said}")
        return self.process.returncode

    def stop(self, seconds=START_S):
        """SIGTERM, as systemd sends it; the exit code."""
        self.signal(signal.SIGTERM)
        return self.ended(seconds)

    def heard(self, pattern, seconds=START_S):
        """Wait for a line; the match."""

        def found():
            match = re.search(pattern, self.said, re.MULTILINE)
            assert match or self.is_running, f"{self.name} ended ({self.process.returncode})\n{self.said}"
            return match

        return eventually(found, seconds, f"{self.name} says {pattern!r}")


class Charger(Program):
    """`v2v charger simulate`, and what truly happens in it."""

    def __init__(self, folder, *options, where=("--tcp", "127.0.0.1:0")):
        self.truth_file = folder / "truth.json"
        words = (sys.executable, "-m", "agent", "charger", "simulate", *where, "--json")
        super().__init__([*words, "--truth", self.truth_file, *options], folder, "charger")

    def ready(self):
        """Until it listens; then `wire` says where."""
        self.wire = json.loads(self.heard(r"^\{.*listening.*\}$")[0])["wire"]

    @property
    def truth(self):
        """The newest truth; `at_ms` is this machine's monotonic clock."""
        return json.loads(self.truth_file.read_text())

    def is_at_zero(self):
        """Nothing flows and nothing can: no power, contactor open."""
        truth = self.truth
        return truth["power_w"] == 0 and not truth["energised"]

    def zero_at_ms(self, seconds):
        """Wait for zero; the time of the first truth that shows it."""
        return eventually(
            lambda: self.is_at_zero() and self.truth["at_ms"], seconds, "the charger is at zero"
        )

    def was_never_energised(self):
        """Since it was started: not a milliwatt-hour, and nothing on now. A new truth is waited for."""
        since_ms = time.monotonic_ns() // 1_000_000
        eventually(lambda: self.truth["at_ms"] > since_ms, 5, "a new truth")
        truth = self.truth
        return truth["delivered_mwh"] == 0 and not truth["energised"] and truth["offered_ma"] == 0


class Agent(Program):
    """`v2v provider run`, with its journal (read beside it) and its status page."""

    def __init__(self, stage, config, environ):
        words = (sys.executable, "-m", "agent", "provider", "run", "--config", config)
        super().__init__(words, config.parent, "agent", environ)
        self._stage = stage
        self.journal_path = config.parent / "journal.sqlite"

    def started(self):
        """Wait until it runs; itself."""
        self.heard(r'"agent\.started"')
        return self

    def status(self):
        """Its status page; None while there is none."""
        try:
            with urllib.request.urlopen(f"{self._stage.door_url}/status.json", timeout=2) as page:  # noqa: S310
                return json.load(page)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def session(self):
        """The one session as its status page shows it; {} while there is none."""
        status = self.status()
        return status["sessions"][0] if status and status["sessions"] else {}

    def delivered_wh(self):
        """What it says it has delivered."""
        return self.session().get("energy_wh_delivered", 0)

    def rows(self):
        """The journal's events so far, read as the owner's command does; () while there is none."""
        return self._read(lambda journal: list(journal.events()), [])

    def book(self):
        """Its journal replayed."""
        return self._read(lambda journal: journal.replay(), None)

    def has_row(self, kind):
        """True once an event of this kind is on the disk."""
        return any(isinstance(row, kind) for row in self.rows())

    def events(self):
        """The ids of its log lines, in order."""
        return [json.loads(line)["event"] for line in self.said.splitlines() if line.startswith("{")]

    def _read(self, read, otherwise):
        if not self.journal_path.is_file() or not self.journal_path.stat().st_size:
            return otherwise
        stage = self._stage
        journal = Journal(self.journal_path, stage.domain, stage.provider.owner.address, read_only=True)
        try:
            return read(journal)
        finally:
            journal.close()


class Anvil(Program):
    """Foundry's node as a chain with throw-away accounts: what `demo.market` needs of a Devnet."""

    chain_id = 31337

    def __init__(self, folder, seed, labels):
        self.seed = seed
        self.accounts = {label: address_from_key(derive_key(seed, label)) for label in labels}
        self.port = free_port()
        self.url_ws, self.url_http = f"ws://127.0.0.1:{self.port}", f"http://127.0.0.1:{self.port}"
        options = ("--port", self.port, "--chain-id", self.chain_id, "--block-time", 1, "--accounts", 1)
        super().__init__([ANVIL, *options], folder, "anvil")

    def ready(self):
        """Until it listens and everybody has coins."""
        self.heard("Listening on")
        for address in self.accounts.values():
            self.ask("anvil_setBalance", hex0x(address), hex(1_000 * 10**18))

    def key(self, label):
        """An account's private key."""
        return derive_key(self.seed, label)

    def address(self, label):
        """An account."""
        return self.accounts[label]

    def ask(self, method, *parameters):
        """One JSON-RPC question."""
        body = json.dumps({"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.url_http, body, headers)  # noqa: S310 - our own loopback address
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            found = json.load(answer)
        assert "error" not in found, found
        return found["result"]


class EmbeddedBroker(Program):
    """The demo's broker as a process of its own: it must not mind clients that are killed."""

    CODE = """
import asyncio
from agent.demo.broker import Broker
async def serve():
    async with Broker() as broker:
        print("listening on", broker.port, flush=True)
        await asyncio.Event().wait()
asyncio.run(serve())
"""

    def __init__(self, folder):
        super().__init__((sys.executable, "-c", self.CODE), folder, "broker")

    def ready(self):
        """Until it listens; then `port` says where."""
        self.port = int(self.heard(r"listening on (\d+)")[1])


class Stage:
    """A market with one provider ("alice") and one consumer ("carol"), everything below `folder`."""

    def __init__(self, folder, *, anvil=True, broker=True, broker_port=None):
        """`broker_port`: where a broker is, or will be; without it the embedded one is started."""
        self.broker_login = {}  # how the consumer proves to the broker who it is
        self.consumer_sref = "ca401" * 6 + "ab"  # its return address; a broker with names demands its name
        self.folder = folder
        folder.chmod(0o700)
        self.http_port = free_port()
        self.door_url = f"http://127.0.0.1:{self.http_port}"
        self.broker_port = broker_port
        self._has_broker = broker and broker_port is None
        self._with_anvil = anvil and ANVIL is not None
        self._held = ExitStack()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self):
        with ExitStack() as held:
            self._thread.start()
            held.callback(self._end_loop)
            labels = setup.labels(("alice",), "carol")
            if self._with_anvil:
                self.net = held.enter_context(Anvil(self.folder, "stage", labels))
            else:
                self.net = self.enter(held, Devnet(block_time_s=1, seed="stage", accounts=labels))
            note(f"{self.folder.name}: on {'anvil' if self._with_anvil else 'the embedded devnet'}")
            self.node = self.enter(held, Web3Node(self.net.url_ws))
            if self._has_broker:
                self.broker_port = held.enter_context(EmbeddedBroker(self.folder)).port
            self._open_market()
            self._held = held.pop_all()
        return self

    def __exit__(self, *_):
        self._held.close()

    def _end_loop(self):
        self.do(_everything_cancelled())  # a story that failed leaves its purchase under way
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(START_S)
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()

    # ---- the loop behind the stage

    def begin(self, coroutine):
        """Start something beside the story; a future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def do(self, coroutine, seconds=ASK_S):
        """Do something and wait for it."""
        return self.begin(coroutine).result(seconds)

    def enter(self, held, manager):
        """Enter an async context manager whose end is `held`'s."""
        entered = self.do(manager.__aenter__())
        held.callback(lambda: self.do(manager.__aexit__(None, None, None)))
        return entered

    # ---- the market

    def _open_market(self):
        net, folder = self.net, self.folder
        self.organisation = setup.party(net, folder, "organisation")
        self.consumer = setup.party(net, folder, "carol")
        self.provider = setup.provider(net, folder, "alice")
        self.market = self.do(
            setup.opened(self.node, net.chain_id, self.organisation, (self.provider,), self.consumer)
        )
        self.domain = Domain(net.chain_id, self.market.address)

    def send(self, party, calldata, value_wei=0, to=None):
        """One transaction, mined; to the market unless `to` says otherwise (b"": a new contract)."""
        receiver = self.market.address if to is None else (to or None)
        sender = Sender(self.node, party.signer, self.net.chain_id, revert_name=contract.revert_name)
        return self.do(sender.send_and_wait(receiver, calldata, value_wei))

    def nonce(self, party):
        """How many transactions of this party are mined."""
        return self.do(self.node.nonce(party.address))

    def ledger_wei(self, party):
        """What this party could withdraw now."""
        data = self.do(self.node.call(self.market.address, contract.encode_balances(party.address)))
        return contract.decode_balances(data)

    def pass_time(self, seconds):
        """The chain's next block comes so much later."""
        if self._with_anvil:
            self.net.ask("evm_increaseTime", hex(seconds))
        else:
            self.do(_called(lambda: self.net.methods.increase_time(seconds)))

    def auction(self):
        """The consumer's auction now."""
        data = self.do(self.node.call(self.market.address, contract.encode_auctions(self.consumer.address)))
        return contract.decode_auctions(data)

    def bid(self):
        """The provider's owner offers 80 % of the start rate, as soon as there is an auction; the rate."""
        eventually(lambda: self.auction().is_live, ASK_S, "the auction is open")
        auction, rate = self.auction(), RATE_WEI_PER_KWH * 8 // 10
        data = contract.encode_place_bid(self.consumer.address, auction.auction_nonce, rate)
        self.send(self.provider.owner, data, cost_wei_ceil(rate, auction.energy_wh))
        return rate

    def logs(self, kind):
        """Every event of this kind that the market emitted, as (log, transaction hash)."""

        async def read():
            head = await self.node.head()
            topics = [contract.topic_of(kind)]
            pages = self.node.log_pages(self.market.address, topics, 0, head.number)
            return [raw async for page in pages for raw in page.logs]

        return [
            (contract.decode_log(raw.address, raw.topics, raw.data), raw.tx_hash) for raw in self.do(read())
        ]

    # ---- who plays

    def played(self, program):
        """A program that ends with the stage."""
        return self._held.enter_context(program)

    def charger(self, *options, **where):
        """A simulated charger with a quick car, as its own process."""
        return self.played(Charger(self.folder, "--ev-lag-ms", "400", *options, **where))

    def config(self, wire):
        """The agent's settings file."""
        return setup.agent_toml(
            self.folder,
            self.provider,
            self.market,
            url_ws=self.net.url_ws,
            chain_id=self.net.chain_id,
            charger_wire=wire,
            mqtt_port=self.broker_port,
            http_port=self.http_port,
        )

    def agent(self, charger, **settings):
        """The daemon, `settings` as its environment overrides: CHAIN__CONFIRMATIONS=1."""
        wire = charger if isinstance(charger, str) else charger.wire
        quick = {"CHAIN__CONFIRMATIONS": 2, "CHAIN__FINALITY": 2, "PORTS__0__FAILSAFE_TIMEOUT_S": 2}
        return self.played(Agent(self, self.config(wire), surroundings(**(quick | settings))))

    def journey(self, tell=lambda _progress: None):
        """The consumer on its way; its journal ends with the stage."""
        return self.do(self._journey(tell))

    async def _journey(self, tell):
        folder = self.folder / "carol"
        folder.mkdir(exist_ok=True, mode=0o700)
        journal = ConsumerJournal(folder / "journal.sqlite", self.domain, self.consumer.address, time.time)
        self._held.callback(lambda: self.do(_called(journal.close)))
        sender = Sender(self.node, self.consumer.signer, self.net.chain_id, revert_name=contract.revert_name)
        return Journey(
            domain=self.domain,
            account=self.consumer.signer,
            journal=journal,
            market=ConsumersMarket(self.node, sender, self.domain, journal),
            limits=SigningLimits(power_w_max=25_000, pre_sign_wh=10_000),
            now_ms=lambda: time.monotonic_ns() // 1_000_000,
            sref=self.consumer_sref,
            tell=tell,
            waits=Waits(chain_poll_s=0.5, resend_s=1, hello_ask_s=0.5),
        )

    def matched(self, journey, energy_wh):
        """Auction, bid, connect: a session on the chain, with nobody at the plug yet. Its terms."""
        order = Order(energy_wh, RATE_WEI_PER_KWH, BIDDING_S, 600)
        starting = self.begin(journey.start_auction(order))
        self.bid()
        starting.result(ASK_S)
        return self.do(journey.connect())

    def at_the_plug(self, journey, *, http=False):
        """Present, charge, sign, check the settlement: a future with the summary."""
        return self.begin(self._at_the_plug(journey, http=http))

    async def _at_the_plug(self, journey, *, http):
        if http:
            await self._door_opened()
        place = BrokerPlace("127.0.0.1", self.broker_port, **self.broker_login)
        carrier = HttpCarrier(self.door_url, journey.sref) if http else MqttCarrier(place, journey.sref)
        async with carrier:
            return await journey.present(carrier)

    async def _door_opened(self):
        """The agent says that it is started before its door is open, and a consumer who finds it shut goes home."""
        async with asyncio.timeout(START_S):
            while True:
                with suppress(OSError):
                    _, writer = await asyncio.open_connection("127.0.0.1", self.http_port)
                    writer.close()
                    return
                await asyncio.sleep(0.02)


async def _called(function):
    return function()


async def _everything_cancelled():
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
