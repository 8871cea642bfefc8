"""One function per promise. Each looks only at the journal, the chain and the plant; never at a memory that may be dead.

While the world runs: `power_is_entitled`, `row_is_entitled`, `said_is_written`, `sent_is_written`, `money_is_conserved`.
At its end:          everything in `AT_THE_END`.
A promise that is broken raises `Broken`, named after it; the world then stops and tells its story.
"""

from agent.core import events as ev
from agent.core.book import Book, step
from agent.core.messages import Accept, AckMessage, Status
from agent.core.session import Stage
from agent.core.units import cost_wei_floor

BLOCK_S = 12
VIEW_AGE_S = 60  # the oldest view of the chain on which the agent delivers
LOOK_S = 8  # how late it notices with a node that answers: a look every five seconds, and the answers' time
TAIL_MWH = 7_000  # what a tapered car takes until the failsafe cuts: 6 A for 6 s


class Broken(AssertionError):
    """A promise was broken."""


def promise(holds, what, **facts):
    """Raise unless it holds."""
    if not holds:
        raise Broken(f"{what}: {', '.join(f'{name}={value}' for name, value in facts.items())}")


def blind_s(world):
    """How long power may flow that the chain no longer backs: until the next look, or, with a bad node, the view's age."""
    storm = world.plan.storm
    bad = storm.node_fails or storm.node_lags or storm.node_silences or world.plan.outages
    return VIEW_AGE_S + 24 if bad else LOOK_S


# ---- while it runs


def power_is_entitled(world, port, since_ms, now_ms):
    """Energy flowed between two looks: a session's open segment in the journal backs it, and nothing has long forbidden it."""
    segment = world.segments.get(port)
    promise(segment is not None, "power without entitlement", port=port, ms=now_ms)
    if world.welded:
        return  # nothing software can do; the segment still counts it
    forbidden_ms = segment.forbidden_ms
    promise(
        forbidden_ms is None or since_ms - forbidden_ms <= world.stop_ms_max,
        "power flows on after it had to stop", port=port, since=forbidden_ms, ms=now_ms, why=segment.forbidden_by,
    )  # fmt: skip
    consumer = world.consumers[segment.session_id]
    session = world.chain.state.sessions.get(consumer.token)
    if session is not None and not session.closing:
        world.backed_ms[segment.session_id] = now_ms
    if session is not None:
        # Both by the clock and by the newest block: while no blocks come, chain time stands still for everybody.
        late = min(world.chain_time_s(since_ms), world.chain.head.timestamp_s) > session.valid_until_s
        promise(not late, "power after the token's validity", port=port, ms=now_ms)
    blind_ms = since_ms - world.backed_ms.get(segment.session_id, since_ms)
    promise(
        blind_ms <= blind_s(world) * 1000 + world.stop_ms_max + world.stood_still_ms,
        "power that the chain does not back", port=port, ms=now_ms, blind_ms=blind_ms,
    )  # fmt: skip


def row_is_entitled(world, row):
    """Power is offered only for a presented token, deep on chain, never again after the end intent, by one session a port."""
    event = row.event
    if not isinstance(event, ev.DeliveryBegan):
        return
    consumer = world.consumers.get(event.session_id)
    promise(consumer is not None, "power for a session nobody has", ms=row.ms)
    promise(bool(consumer.presented_tokens), "power without a presented token", who=consumer.sref, ms=row.ms)
    known = [deep_s for token in consumer.presented_tokens if (deep_s := world.chain.deep_at_s.get(token))]
    # By the newest block where none came since: nothing can have un-said it meanwhile.
    now_s = min(world.chain_time_s(), world.chain.head.timestamp_s + BLOCK_S)
    promise(
        known and now_s - max(known) <= BLOCK_S + blind_s(world) + world.stood_still_ms // 1000,
        "power before its connect was deep on chain", who=consumer.sref, ms=row.ms,
    )  # fmt: skip
    promise(event.session_id not in world.intents, "power after the end intent", who=consumer.sref, ms=row.ms)
    port = consumer.order.port
    holder = world.segments.get(port)
    promise(
        holder is None or holder.session_id == event.session_id,
        "two sessions hold one charger", port=port, ms=row.ms,
    )  # fmt: skip


def said_is_written(world, message):
    """What the agent acknowledges to a consumer is on its disk: a receipt, an accepted or a waiting token."""
    sid = getattr(message, "session_id", None)
    if isinstance(message, AckMessage):
        highest_wh = world.acked_wh.get(sid, 0)
        promise(
            message.delivered_wh <= highest_wh,
            "a receipt was acknowledged before it was on disk",
            disk=highest_wh,
        )
    if isinstance(message, Accept) or (isinstance(message, Status) and message.stage == "waiting"):
        promise(sid in world.presented, "a token was acknowledged before it was on disk", type=message.TYPE)


def sent_is_written(world, raw_tx):
    """Sign, journal, broadcast: a transaction that reaches a node is on disk."""
    promise(raw_tx in world.signed, "a transaction was sent before it was on disk", bytes=len(raw_tx))


def money_is_conserved(chain):
    """Ledger, deposits and bonds: what came in, to the wei."""
    promise(
        chain.state.held_wei == chain.issued_wei,
        "money is not conserved", held=chain.state.held_wei, issued=chain.issued_wei,
    )  # fmt: skip


# ---- at the end


def replay_equals_the_book(world):
    """The rows on disk make the book that lived; and what was appended is what can be read."""
    rows = world.read_journal()
    promise(rows == [row.event for row in world.rows], "the journal does not read back", rows=len(rows))
    book = Book(world.chain.market.domain, world.chain.market.provider)
    for event in rows:
        book = step(book, event)
    promise(book == world.engine.book, "replay differs from the living book", rows=len(rows))


def sessions_and_escrows_end(world):
    """Liveness: no session open, no escrow locked, no power on."""
    stuck = [f"{s.stage} {s.terms.consumer.hex()[:6]}" for s in world.engine.book.open_sessions()]
    promise(not stuck, "a session never ends", stuck=stuck)
    promise(
        not world.chain.state.sessions, "an escrow is never freed", tokens=len(world.chain.state.sessions)
    )
    for port, outlet in world.outlets.items():
        plant = outlet.look()
        promise(
            world.welded or (plant.current_ma == 0 and not plant.contactor_closed),
            "a charger is left on",
            port=port,
        )


def at_most_one_settlement(world):
    """Per session one settlement of ours in the canonical chain, at most; and none that failed for our own mistake: only because
    the consumer ended first, or a reorganisation put it before its `connect`.
    """
    settled, failed = {}, {}
    for block, mined in world.chain.mined():
        if mined.tx.sender != world.chain.market.operator:
            continue
        token = mined.tx.data[4:36]
        promise(
            not mined.succeeded or token not in settled,
            "two settlements of one session were mined", first=settled.get(token), second=block.number,
        )  # fmt: skip
        (settled if mined.succeeded else failed)[token] = block.number
    twice = settled.keys() & failed.keys()
    promise(
        not twice or world.was_reorged,
        "a settlement was sent twice", mined=[settled[token] for token in twice], failed=[failed[token] for token in twice],
    )  # fmt: skip


def settled_is_what_was_acknowledged(world):
    """Settled Wh == max(highest journaled receipt, conceded) <= ordered; acked <= delivered; STRANDED counted apart."""
    for session in world.engine.book.sessions.values():
        if session.stage is Stage.LAPSED:
            continue
        if session.stage is Stage.STRANDED:
            world.stranded += 1
            continue
        consumer = world.consumers[session.session_id]
        token = world.chain.state.opened.get((consumer.address, consumer.auction_nonce))
        settled_wh, fee_wei = world.chain.state.ended.get(token, (None, None))
        owed_wh = max(session.energy_wh_acked, world.chain.state.conceded.get(token, 0))
        promise(settled_wh == owed_wh, "settled differs from acknowledged", settled=settled_wh, owed=owed_wh,
                who=consumer.sref)  # fmt: skip
        promise(settled_wh <= consumer.order.energy_wh, "settled above the order", settled=settled_wh)
        promise(session.ended is not None and session.ended.energy_wh_settled == settled_wh,
                "the book believes another settlement", book=session.ended, chain=settled_wh)  # fmt: skip
        promise(
            fee_wei == cost_wei_floor(session.terms.rate_wei_per_kwh, settled_wh),
            "the fee is wrong",
            fee=fee_wei,
        )
        promise(
            session.energy_wh_acked <= (session.energy_wh_delivered or 0),
            "acknowledged above delivered", acked=session.energy_wh_acked, delivered=session.energy_wh_delivered,
        )  # fmt: skip


def delivered_is_what_flowed(world):
    """The journal's Wh against the plant's, within one counter step for each segment; above the order is the provider's gift."""
    for session in world.engine.book.sessions.values():
        if session.energy_wh_delivered is None:
            continue
        outlet = world.outlets[world.consumers[session.session_id].order.port]
        true_mwh = world.true_mwh(session.session_id) * outlet.lies_permille // 1000
        slack_mwh = (outlet.step_mwh + 2) * max(1, world.segment_counts.get(session.session_id, 0))
        metered_mwh = session.energy_mwh_metered
        promise(
            abs(true_mwh - metered_mwh) <= slack_mwh or world.welded,
            "the journal's energy differs from the plant's", true=true_mwh, journal=metered_mwh,
        )  # fmt: skip
        told_wh = min(session.order_wh, metered_mwh // 1000)
        promise(session.energy_wh_delivered == max(told_wh, session.energy_wh_acked), "delivered is not what was metered",
                delivered=session.energy_wh_delivered, metered=metered_mwh)  # fmt: skip


def provider_loses_little(world):
    """PROTOCOL section 5: U + P x (t_poll + t_stop) + a meter step goes unpaid at most; of an orphan, the unfinal cap."""
    for sid, consumer in world.consumers.items():
        outlet = world.outlets[consumer.order.port]
        token = world.chain.state.opened.get((consumer.address, consumer.auction_nonce))
        settled_wh, _ = world.chain.state.ended.get(token, (0, 0))
        unpaid_wh = world.true_mwh(sid) / 1000 - settled_wh
        segments = max(1, world.segment_counts.get(sid, 0))
        tail_wh = outlet.power_w_max * (1_000 + world.stop_ms_max) / 3_600_000
        bound_wh = world.max_unacked_wh + tail_wh + segments * outlet.step_mwh / 1000 + 1
        if token is None:
            bound_wh += (
                consumer.signed_wh
            )  # `connect` never came back: its receipts are worth nothing (the unfinal cap bounds it)
            promise(
                world.true_mwh(sid) / 1000 <= world.max_unfinal_wh + tail_wh,
                "more than the unfinal cap is lost",
            )
        promise(unpaid_wh <= bound_wh or world.welded, "the provider loses more than the formula allows",
                unpaid=round(unpaid_wh, 1), bound=round(bound_wh, 1), who=consumer.sref)  # fmt: skip


def consumer_loses_little(world):
    """It pays for what its car received; a meter that runs fast earns no more than the tolerance."""
    for sid, consumer in world.consumers.items():
        token = world.chain.state.opened.get((consumer.address, consumer.auction_nonce))
        settled_wh, _ = world.chain.state.ended.get(token, (0, 0))
        received_wh = world.true_mwh(sid) // 1000
        limits = consumer._limits
        bound_wh = received_wh * (1000 + limits.tolerance_permille) // 1000 + limits.pre_sign_wh
        promise(settled_wh <= max(bound_wh, world.chain.state.conceded.get(token, 0)), "the consumer overpays",
                settled=settled_wh, received=received_wh, who=consumer.sref)  # fmt: skip


def one_port_one_session(world):
    """No two sessions hold one port at any row."""
    book = Book(world.chain.market.domain, world.chain.market.provider)
    for row in world.rows:
        book = step(book, row.event)
        held = [
            s.port
            for s in book.sessions.values()
            if s.stage in (Stage.DELIVERING, Stage.PAUSED, Stage.STOPPING)
        ]
        promise(len(held) == len(set(held)), "two sessions hold one charger", ms=row.ms, ports=held)


def the_agent_settles_itself(world):
    """No stranger had to free what the agent knew about."""
    known = {
        session.terms.token
        for session in world.engine.book.sessions.values()
        if session.stage is not Stage.LAPSED
    }
    promise(not world.freed_by_strangers & known, "a stranger had to settle what the agent knew of")


def nothing_is_lost(world):
    """For worlds whose only fault is power: the order is delivered, acknowledged and paid to the last Wh."""
    for sid, consumer in world.consumers.items():
        session = world.engine.book.sessions.get(sid)
        promise(session is not None, "a sale was lost", who=consumer.sref)
        token = world.chain.state.opened.get((consumer.address, consumer.auction_nonce))
        settled_wh, _ = world.chain.state.ended.get(token, (0, 0))
        figures = {
            "ordered": consumer.order.energy_wh, "delivered": session.energy_wh_delivered,
            "acked": session.energy_wh_acked, "settled": settled_wh,
        }  # fmt: skip
        promise(
            len(set(figures.values())) == 1,
            "a Wh was lost",
            who=consumer.sref,
            why=session.stop_detail,
            **figures,
        )
        promise(
            bool(session.record_begin and session.record_end), "a meter record is missing", who=consumer.sref
        )
        gift_mwh = world.true_mwh(sid) - consumer.order.energy_wh * 1000
        step_mwh = world.outlets[consumer.order.port].step_mwh
        allowed_mwh = 2 * step_mwh + 1_000 + world.power_cuts * TAIL_MWH
        promise(
            gift_mwh <= allowed_mwh, "more was given away than a step", gift=gift_mwh, allowed=allowed_mwh
        )


AT_THE_END = (
    replay_equals_the_book,
    sessions_and_escrows_end,
    at_most_one_settlement,
    settled_is_what_was_acknowledged,
    delivered_is_what_flowed,
    provider_loses_little,
    consumer_loses_little,
    one_port_one_session,
    the_agent_settles_itself,
)
