"""The consumer's memory: what a crash may not take, and what it must refuse."""

import sqlite3

import pytest
from scripted_provider import CONSUMER, DOMAIN, terms_of

from agent.consumer.journal import (
    Accepted,
    CarConfirmed,
    Closed,
    Conceded,
    ConsumerJournal,
    Matched,
    OrderPlaced,
    OwnMeterRead,
    Presented,
    ReceiptSigned,
    TransactionMined,
    TransactionSigned,
)
from agent.core.token import Domain
from agent.errors import Misconfigured
from agent.rows import checksum

ORDER = OrderPlaced(1, 1, 200, 10**14, 60, 3600, 7, "aa" * 16)
TERMS = terms_of()
STORY = [
    ORDER,
    TransactionSigned(2, "start_auction", b"\x01" * 32, b"\x02raw"),
    TransactionMined(3, "start_auction", b"\x01" * 32, 8, 100_000, 10**14, succeeded=True),
    Matched(4, TERMS),
    Presented(5, b'{"type":"present"}', b"\x03" * 32),
    Accepted(6, b'{"type":"accept"}'),
    OwnMeterRead(6, 12_345),
    CarConfirmed(7),
    ReceiptSigned(7, 10, b'{"deliveredWh":10}'),
    ReceiptSigned(8, 25, b'{"deliveredWh":25}'),
    Conceded(9, 25),
]


def opened(folder, **kwargs):
    """The journal of this folder; its clock stands still."""
    return ConsumerJournal(folder / "consumer.sqlite", DOMAIN, CONSUMER.address, lambda: 100.0, **kwargs)


def written(folder, facts=STORY):
    """A journal with these facts, closed as a crash leaves it."""
    journal = opened(folder)
    for fact in facts:
        journal.write(fact)
    errand = journal.errand
    journal.close()
    return errand


def test_every_prefix_of_a_story_is_remembered_exactly(tmp_path):
    """Would catch a fact that changes on its way to the disk and back, wherever the crash comes."""
    for length in range(len(STORY) + 1):
        folder = tmp_path / str(length)
        live = written(folder, STORY[:length])
        again = opened(folder)
        assert again.errand == live
        again.close()


def test_the_errand_knows_what_matters(tmp_path):
    """Would catch a fold that loses bytes which must be sent again unchanged."""
    errand = written(tmp_path)
    assert errand.energy_wh_signed == 25
    assert errand.energy_wh_conceded == 25
    assert errand.receipt.message == b'{"deliveredWh":25}'
    assert errand.presented.message == b'{"type":"present"}'
    assert errand.presented_at_s == 5
    assert errand.terms == TERMS
    assert errand.pending("start_auction") is None


def test_a_transaction_is_pending_until_it_is_mined(tmp_path):
    """Would catch a second auction after a crash between broadcast and block."""
    errand = written(tmp_path, STORY[:2])
    assert errand.pending("start_auction").raw_tx == b"\x02raw"
    assert errand.pending("connect") is None


def test_a_new_token_voids_the_presentation_but_never_a_receipt(tmp_path):
    """Would catch a reorg that makes us present an old token, forget a receipt, or restart the clock of the policy."""
    again = Matched(10, terms_of(issued_at_s=TERMS.issued_at_s + 12))
    errand = written(tmp_path, [*STORY, again])
    assert errand.presented is None
    assert errand.accepted is None
    assert errand.presented_at_s == 5
    assert errand.energy_wh_signed == 25


def test_one_errand_at_a_time(tmp_path):
    """Would catch a second purchase over an unfinished one; after the end the next may begin."""
    journal = opened(tmp_path)
    journal.write(ORDER)
    with pytest.raises(AssertionError):
        journal.write(ORDER)
    journal.write(Closed(9, "no_bids"))
    assert journal.open_errand is None
    journal.write(ORDER)
    assert journal.open_errand is not None
    journal.close()


def test_a_falling_receipt_never_reaches_the_disk(tmp_path):
    """Would catch our own bug becoming durable."""
    journal = opened(tmp_path)
    for fact in STORY:
        journal.write(fact)
    with pytest.raises(AssertionError):
        journal.write(ReceiptSigned(11, 24, b"{}"))
    journal.close()
    again = opened(tmp_path)
    assert again.errand.energy_wh_signed == 25
    again.close()


def test_two_at_once_are_refused_and_a_reader_is_not(tmp_path):
    """Would catch two consumers that buy the same energy twice, and a status command that stops the buying one."""
    first = opened(tmp_path)
    first.write(ORDER)
    with pytest.raises(Misconfigured, match="another consumer"):
        opened(tmp_path)
    reader = opened(tmp_path, read_only=True)
    assert reader.open_errand.order == ORDER
    reader.close()
    first.close()


def test_a_journal_belongs_to_one_market_and_one_consumer(tmp_path):
    """Would catch receipts of one market being sent to another."""
    opened(tmp_path).close()
    path = tmp_path / "consumer.sqlite"
    with pytest.raises(Misconfigured, match="chain_id"):
        ConsumerJournal(path, Domain(1, DOMAIN.contract), CONSUMER.address, lambda: 0.0)
    with pytest.raises(Misconfigured, match="consumer"):
        ConsumerJournal(path, DOMAIN, b"\x01" * 20, lambda: 0.0)
    opened(tmp_path).close()  # a refused opening gave the lock back


@pytest.mark.parametrize(
    ("kind", "body"), [("Nonsense", "{}"), ("Closed", "{"), ("Closed", '{"at_s":"1","outcome":"x"}')]
)
def test_a_row_of_another_version_stops_us(tmp_path, kind, body):
    """Would catch a journal half understood: better no session than a wrong one."""
    written(tmp_path)
    db = sqlite3.connect(tmp_path / "consumer.sqlite")
    row = (len(STORY) + 1, 1, kind, body)
    db.execute("INSERT INTO facts VALUES (?, ?, ?, ?, ?)", (*row, checksum(*row)))
    db.commit()
    db.close()
    with pytest.raises(Misconfigured, match=f"row {len(STORY) + 1}"):
        opened(tmp_path)


def test_a_file_that_is_no_journal_is_said_so(tmp_path):
    """Would catch a traceback where an owner needs a sentence."""
    (tmp_path / "consumer.sqlite").write_bytes(b"something else" * 100)
    with pytest.raises(Misconfigured, match="cannot be opened"):
        opened(tmp_path)


def test_others_on_this_machine_cannot_read_it(tmp_path):
    """Would catch signatures and nonces readable by every account."""
    written(tmp_path)
    assert (tmp_path / "consumer.sqlite").stat().st_mode & 0o077 == 0


def test_the_session_key_lies_beside_and_is_named_after_the_session(tmp_path):
    """Would catch a key file that a second session overwrites."""
    journal = opened(tmp_path)
    one, two = terms_of(1).session_id, terms_of(2).session_id
    assert journal.session_key_path(one).parent == tmp_path
    assert journal.session_key_path(one) != journal.session_key_path(two)
    journal.close()
