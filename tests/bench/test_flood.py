"""What the floods are made of: each kind must get as far as its name says, and the broker must really push it."""

import asyncio

import aiomqtt

from agent.core.messages import Refusal
from agent.core.units import hex0x
from bench import _flood, floods


def test_garbage_is_what_its_name_says(tmp_path) -> None:
    """Would catch a flood of messages that stop at the first check, which would flatter every figure."""
    journal = floods.Journal(tmp_path / "journal.sqlite", floods.DOMAIN, floods.PROVIDER.address)
    engine = floods.Engine(journal, floods.Policy(max_unacked_wh={"charging": 50}), lambda: 0)
    door = floods.Door(engine, floods.DOMAIN, floods.PROVIDER.address, floods.PROVIDER, ("charging",), bytes)
    terms = floods.terms_of(0)
    engine.observe(floods.HeaderSeen(1, floods.BlockHash(bytes(32)), floods.NOW_S))
    engine.accept(floods.ev.ConnectedSeen(engine.at_s, terms))
    engine.accept(floods.ev.ConnectedBelieved(engine.at_s, terms.session_id, terms.block_hash))
    answers = {
        kind: door.answer("s", f"{kind}:x", data)
        for kind, data in _flood.garbage(terms, door.hello("charging")).items()
    }
    journal.close()
    assert all(isinstance(answer, Refusal) for answer in answers.values())
    assert {kind: answer.reason for kind, answer in answers.items()} == {
        "oversize": "malformed",
        "malformed": "malformed",
        "not JSON": "malformed",
        "unknown session": "not_yet_seen",
        "receipt of an unknown session": "unknown_session",
        "stale Hello": "stale_hello",
        "high s under a live nonce": "bad_signature",
        "forged under a live nonce": "wrong_signer",
    }


async def test_the_broker_pushes_garbage_to_the_car_and_to_nobody_else() -> None:
    """Would catch a flood that is counted and not sent."""
    terms = floods.terms_of(0)
    typed = floods.rules.ProviderHello(terms.provider, floods.rules.charger_id("charging"), bytes(32), 2**31)
    hello = floods.Hello(typed.provider, typed.charger_id, typed.nonce, typed.expires_at_s, bytes(65))
    root = f"v2v/1/{hex0x(terms.provider)}"
    async with (
        _flood.FloodingBroker() as broker,
        asyncio.timeout(60),
        aiomqtt.Client("127.0.0.1", broker.port) as car,
        aiomqtt.Client("127.0.0.1", broker.port) as other,
    ):
        await car.subscribe(f"{root}/in/+", qos=1)
        await other.subscribe(f"{root}/out/+", qos=1)
        await car.publish(f"{root}/hello/{hex0x(typed.charger_id)}", floods.encode(hello), qos=1, retain=True)
        flooding = asyncio.create_task(broker.flood([(terms, "charging")], ever_new=False))
        heard = {bytes((await anext(car.messages)).payload)[:20] for _ in range(1_000)}
        flooding.cancel()
        assert len(other.messages) == 0
    assert len(heard) >= 5, "several kinds"
    assert broker.sent >= 1_000
