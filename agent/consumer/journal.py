"""The consumer's small memory: what must survive a crash between auction and receipt. File, lock and rows are `agent.rows`.

Rules
* `write` returns only when the row is on the disk; rows are never changed or deleted.
* Durable first, then sent: a signed transaction, a presentation and a receipt stand here before anybody else has them, so
  that after a crash the very same bytes are sent again.
* An errand is one purchase: from `OrderPlaced` to `Closed`. There is one open errand at most.
* The session key is not in here: its file (mode 0600) lies beside, named after the session id, which the journal knows.
  So a copy of the journal for support gives nobody the right to sign.

May not know: what to do next (journey.py). `at_s` is the wall clock: for humans, and to bound after a restart how much
energy can have flowed since the presentation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from agent.core.events import Terms
from agent.core.token import Domain
from agent.core.units import Address, SessionId, TxHash, hex0x
from agent.rows import Rows, Sort

SCHEMA_VERSION: Final = 1
SORT: Final = Sort(
    table="facts",
    name="the consumer's journal",
    settings="the settings say",
    folder_remedy="create it for your user, or point [journal] path elsewhere",
    in_use="another consumer already uses the journal",
    in_use_remedy="let it finish or stop it first: two at once would buy the same energy twice",
    open_remedy="check the disk and the file's permissions; keep the file, it knows your open session",
    row_remedy="start the version that wrote it; do not delete the journal while a session is open",
)


# ---- facts


@dataclass(frozen=True, slots=True)
class OrderPlaced:
    """We are about to start an auction. Written before its transaction is signed; the nonce is what it will get."""

    at_s: int
    auction_nonce: int
    energy_wh: int
    rate_wei_per_kwh_start: int
    bidding_s: int
    token_validity_s: int
    from_block: int  # nothing of this errand is in an earlier block
    sref: str  # where the provider answers us (PROTOCOL section 6)


@dataclass(frozen=True, slots=True)
class TransactionSigned:
    """A transaction of ours, before it was broadcast. `step` is the command it carries out."""

    at_s: int
    step: str
    tx_hash: TxHash
    raw_tx: bytes


@dataclass(frozen=True, slots=True)
class TransactionMined:
    """It is in a block, and succeeded or not."""

    at_s: int
    step: str
    tx_hash: TxHash
    block_number: int
    gas_used: int
    fee_wei: int
    succeeded: bool


@dataclass(frozen=True, slots=True)
class Matched:
    """Our `connect`, as the chain tells it. Again, with another token, when a reorg re-mined it."""

    at_s: int
    terms: Terms


@dataclass(frozen=True, slots=True)
class Presented:
    """A presentation, byte for byte, before it is first sent."""

    at_s: int
    message: bytes
    challenge: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """The provider's answer, verified."""

    at_s: int
    message: bytes


@dataclass(frozen=True, slots=True)
class OwnMeterRead:
    """What our car's own counter showed before we presented: no energy of this session is in it."""

    at_s: int
    register_wh: int


@dataclass(frozen=True, slots=True)
class CarConfirmed:
    """Our driver said that our car is charging. It is asked once."""

    at_s: int


@dataclass(frozen=True, slots=True)
class ReceiptSigned:
    """A receipt, byte for byte, before it is first sent."""

    at_s: int
    energy_wh: int
    message: bytes


@dataclass(frozen=True, slots=True)
class Conceded:
    """We are about to end the connection ourselves for this much: from now on the contract may pay it."""

    at_s: int
    energy_wh: int


@dataclass(frozen=True, slots=True)
class Closed:
    """The errand is over: `settled`, `no_bids`, `cancelled`, `not_started`."""

    at_s: int
    outcome: str


Fact = (
    OrderPlaced
    | TransactionSigned
    | TransactionMined
    | Matched
    | Presented
    | Accepted
    | OwnMeterRead
    | CarConfirmed
    | ReceiptSigned
    | Conceded
    | Closed
)
KINDS: dict[str, Any] = {kind.__name__: kind for kind in Fact.__args__}


@dataclass(frozen=True, slots=True)
class Errand:
    """One purchase, as its facts tell it."""

    order: OrderPlaced
    signed: tuple[TransactionSigned, ...] = ()
    mined: tuple[TransactionMined, ...] = ()
    terms: Terms | None = None
    presented: Presented | None = None
    presented_at_s: int | None = None  # when we first presented this session: no energy before
    accepted: Accepted | None = None
    own_register_wh_begin: int | None = None
    is_confirmed: bool = False
    receipt: ReceiptSigned | None = None
    energy_wh_conceded: int = 0
    closed: Closed | None = None

    @property
    def energy_wh_signed(self) -> int:
        """The highest receipt we have signed."""
        return 0 if self.receipt is None else self.receipt.energy_wh

    def pending(self, step: str) -> TransactionSigned | None:
        """The newest transaction of this step of which we do not know yet what became of it."""
        done = {mined.tx_hash for mined in self.mined}
        waiting = [signed for signed in self.signed if signed.step == step and signed.tx_hash not in done]
        return waiting[-1] if waiting else None


def step(errand: Errand | None, fact: Fact) -> Errand | None:
    """The errand after one more fact. Pure. Asserts what our own code must never write."""
    if isinstance(fact, OrderPlaced):
        assert errand is None or errand.closed is not None, "one errand at a time"
        return Errand(fact)
    if errand is None or errand.closed is not None:
        assert isinstance(fact, (TransactionSigned, TransactionMined)), (
            fact
        )  # deposit, withdraw, settle: no errand needed
        return errand
    match fact:
        case TransactionSigned():
            return replace(errand, signed=(*errand.signed, fact))
        case TransactionMined():
            return replace(errand, mined=(*errand.mined, fact))
        case Matched():
            again = errand.terms is not None and errand.terms.token == fact.terms.token
            if again:
                return replace(errand, terms=fact.terms)
            return replace(errand, terms=fact.terms, presented=None, accepted=None)
        case Presented():
            first_s = fact.at_s if errand.presented_at_s is None else errand.presented_at_s
            return replace(errand, presented=fact, presented_at_s=first_s, accepted=None)
        case Accepted():
            return replace(errand, accepted=fact)
        case OwnMeterRead():
            return replace(errand, own_register_wh_begin=fact.register_wh)
        case CarConfirmed():
            return replace(errand, is_confirmed=True)
        case ReceiptSigned():
            assert fact.energy_wh > errand.energy_wh_signed, "a receipt never falls"
            return replace(errand, receipt=fact)
        case Conceded():
            return replace(errand, energy_wh_conceded=max(errand.energy_wh_conceded, fact.energy_wh))
        case Closed():
            return replace(errand, closed=fact)


# ---- the file


class ConsumerJournal:
    """The open journal of one consumer. `read_only=True` takes no lock and cannot write.

    `clock` gives unix seconds. Raises Misconfigured for every state of the file that a human must look at.
    """

    def __init__(
        self,
        path: Path,
        domain: Domain,
        consumer: Address,
        clock: Callable[[], float],
        *,
        read_only: bool = False,
    ) -> None:
        self.path = path
        self._clock = clock
        identity = {
            "schema": str(SCHEMA_VERSION),
            "chain_id": str(domain.chain_id),
            "contract": hex0x(domain.contract),
            "consumer": hex0x(consumer),
        }
        self._rows = Rows(path, SORT, identity, read_only=read_only)
        self.errand: Errand | None = None
        try:
            for fact in self._rows.facts(KINDS):
                self.errand = step(self.errand, fact)
        except BaseException:
            self._rows.close()
            raise

    @property
    def at_s(self) -> int:
        """What a fact written now is stamped with."""
        return int(self._clock())

    @property
    def open_errand(self) -> Errand | None:
        """The purchase that is not finished; None when the next one may begin."""
        return self.errand if self.errand is not None and self.errand.closed is None else None

    def write(self, fact: Fact) -> None:
        """Write one fact; on return it survives power loss, and `errand` knows it. Raises Unwritable."""
        errand = step(self.errand, fact)  # first: an assertion here never reaches the disk
        self._rows.append(fact.at_s, fact)
        self.errand = errand

    def session_key_path(self, session_id: SessionId) -> Path:
        """Where this session's ephemeral key is: a file of mode 0600 beside the journal."""
        return self.path.with_name(f"{self.path.name}.{session_id.hex()[:32]}.key")

    def close(self) -> None:
        """Give file and lock back."""
        self._rows.close()
