"""Every row of the protocol's table, edge by edge, on the real bytecode."""

import pytest
from market import Market, Reverted
from market_rows import AUCTION_ROWS, SESSION_ROWS, Row, actor, make, state_of_auction, state_of_session


@pytest.fixture(scope="module")
def deployed():
    """One deployment for all rows."""
    return Market()


@pytest.mark.parametrize("row", [*AUCTION_ROWS, *SESSION_ROWS], ids=lambda row: row.name)
def test_row(deployed, row: Row):
    """Would catch a call that leads elsewhere, tells another event, or is refused by another name than written."""
    place = deployed.snapshot()
    try:
        scene = make(deployed, row.state)
        sender, data = actor(deployed, row.who), row.data(scene)
        if row.error:
            with pytest.raises(Reverted) as refusal:
                deployed.send(sender, data, row.value_wei)
            assert refusal.value.name == row.error
            return
        done = deployed.send(sender, data, row.value_wei)
        told = [
            type(log).__name__ for log in done.logs if type(log).__name__ not in ("Deposited", "Connected")
        ]
        assert told == ([row.event] if row.event else [])
        reached = state_of_session(scene) if row in SESSION_ROWS else state_of_auction(deployed)
        assert reached == row.leads_to
        tokens = (
            [scene.token] if scene.token else [log.token for log in done.logs if hasattr(log, "token")][:1]
        )
        assert deployed.held_wei(tokens) == deployed.balance_wei(deployed.address)
    finally:
        deployed.restore(place)
