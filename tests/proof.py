"""Sessions whose every signature is real: receipts, meter records and the settlement transaction, as the journal holds them."""

from story import (
    DOMAIN,
    METER,
    T0,
    Story,
    believed,
    connect,
    final,
    head,
    passes,
    presentation,
    presents,
    seen,
)

from agent.chain import contract
from agent.core import events as ev
from agent.core import record
from agent.core.effects import SignMeterRecord, SignSettlement
from agent.core.record import MeterIdentity
from agent.core.token import keccak
from agent.core.units import BlockHash, TxHash
from agent.keys import ephemeral_signer

SPKI = bytes.fromhex("3056301006072a8648ce3d020106052b8104000a034200") + METER.public_key
OPERATOR = ephemeral_signer(b"the operator of these proofs")
EASTRON = MeterIdentity("Eastron", "SDM630-Modbus V2", "19450012", "1.37")


def sign_records(story, wallet=METER):
    """Sign the meter records that are owed, as runners/charger.py does."""
    for effect in story.owed_of(SignMeterRecord):
        session = story.book.sessions[effect.session_id]
        payload = record.payload(session, effect.moment, effect.pagination, EASTRON)
        signed = record.record(payload, wallet.private.sign(payload.encode()))
        story.engine.accept(
            ev.MeterRecordSigned(
                story.at_s, effect.session_id, effect.moment, signed, SPKI[:23] + wallet.public_key
            )
        )


def sign_settlement(story, *, signer=OPERATOR, told_nonce=7, fee_wei=10**9, **changes):
    """Sign the settlement that is owed, as runners/chain_send.py does; `changes` are a liar's."""
    session = next(iter(story.book.sessions.values()))
    owed = SignSettlement(session.session_id, session.terms.token, session.energy_wh_acked, session.ack)
    fields = {
        "type": 2,
        "chainId": DOMAIN.chain_id,
        "nonce": told_nonce,
        "maxPriorityFeePerGas": fee_wei // 10,
        "maxFeePerGas": fee_wei,
        "gas": 150_000,
        "to": DOMAIN.contract,
        "value": 0,
        "data": contract.encode_end_connection(owed.token, owed.energy_wh, owed.ack),
    }
    raw = signer.sign_transaction(fields | changes)
    story.engine.accept(
        ev.SettlementSigned(
            story.at_s,
            session.session_id,
            owed.energy_wh,
            told_nonce,
            TxHash(keccak(raw)),
            raw,
            fee_wei,
            fee_wei // 10,
        )
    )


def pay(story, settled_wh=None, tx_hash=None):
    """The chain pays, deep enough."""
    session = next(iter(story.book.sessions.values()))
    wh = session.energy_wh_acked if settled_wh is None else settled_wh
    fee_wei = wh * session.terms.rate_wei_per_kwh // 1000
    block = BlockHash(keccak(b"the block that pays"))
    mined = session.settlement.tx_hash if tx_hash is None else tx_hash
    story.engine.accept(ev.ConnectionEndedSeen(story.at_s, session.session_id, wh, fee_wei, mined, block))
    story.engine.accept(ev.ConnectionEndedBelieved(story.at_s, session.session_id, block))


def settling(nonce=1, *, order_wh=20, **how):
    """A story of one session that has delivered its order, with everything signed by the consumer and the meter."""
    terms = connect(nonce, order_wh=order_wh, issued_at_s=T0 + nonce)
    story = Story(chain_ahead_s=T0 + nonce - 5_000, signing=True) >> head() >> seen(terms) >> believed(terms)
    story = story >> passes(2) >> presents(terms, presentation(terms, **how))
    sign_records(story)
    story = (story >> final(terms)).passes(order_wh + 10)
    sign_records(story)
    return story


def settled(nonce=1, **how):
    """... and which is paid: its events."""
    story = settling(nonce, **how)
    sign_settlement(story)
    pay(story)
    return tuple(story.journal.events)


def session_id_of(events):
    """Whose events these are."""
    return events[0].terms.session_id
