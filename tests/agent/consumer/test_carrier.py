"""What every carrier shares: an inbox without end in sight but with an end, and patience without hurry."""

import asyncio

from agent.consumer.carrier import INBOX_MAX, Backoff, Inbox, new_sref


async def test_a_flood_costs_the_oldest_messages_only():
    """Would catch memory that grows with what strangers send, and an inbox that keeps the stale half."""
    inbox = Inbox()
    for number in range(INBOX_MAX + 10):
        inbox.put(str(number).encode())
    assert await inbox.next(0) == b"10"
    kept = 1
    while await inbox.next(0) is not None:
        kept += 1
    assert kept == INBOX_MAX


async def test_waiting_ends_with_a_message_or_with_time():
    """Would catch a wait that misses what arrives meanwhile, or one that never ends."""
    inbox = Inbox()
    assert await inbox.next(0.01) is None
    waiting = asyncio.create_task(inbox.next(10))
    await asyncio.sleep(0)
    inbox.put(b"hello")
    assert await waiting == b"hello"
    assert await inbox.next(0.01) is None, "a message is read once"


def test_pauses_grow_to_a_cap_and_begin_again_after_success():
    """Would catch a consumer that hammers a broker, or one that comes back minutes after it."""
    backoff = Backoff(0.5, 8.0)
    pauses = [backoff.next_s() for _ in range(100)]
    assert all(0.25 <= pause <= 8.0 for pause in pauses)
    assert max(pauses[:2]) <= 1.0
    assert min(pauses[10:]) >= 4.0
    assert len({round(pause, 3) for pause in pauses[10:]}) > 20, "jitter: a fleet must not return at once"
    backoff.reset()
    assert backoff.next_s() <= 0.5


def test_return_addresses_cannot_be_guessed():
    """Would catch a topic that somebody else can subscribe to beforehand."""
    srefs = {new_sref() for _ in range(100)}
    assert len(srefs) == 100
    assert all(len(bytes.fromhex(sref)) == 16 for sref in srefs)
