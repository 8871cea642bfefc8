"""Remedies: nobody who is refused is left alone with a name."""

from agent.chain.node import SEND_REFUSALS
from agent.cli.remedies import REMEDIES, error_name, with_remedy
from agent.errors import Refused
from contracts import load_artefact

# Seen to by the code that meets them: sent is sent, waiting helps, and the sender says how much is missing.
NEVER_SHOWN = {"already_known", "pool_full", "unfunded"}
OURS = {"out_of_gas"}  # the sender's own name


def test_every_error_of_the_contract_and_the_node_has_a_remedy():
    """Would catch a new error of the contract that a person meets without a word of help, and a sentence for none."""
    errors = {entry["name"] for entry in load_artefact().abi if entry["type"] == "error"}
    assert set(REMEDIES) == errors | (set(SEND_REFUSALS) - NEVER_SHOWN) | OURS


def test_every_remedy_is_a_sentence():
    """Would catch a forgotten full stop, or a remedy that breaks the two lines of a message."""
    for text in REMEDIES.values():
        assert text.endswith(".")
        assert "\n" not in text


def test_a_refusal_keeps_its_reason_and_a_better_remedy():
    """Would catch a generic sentence laid over one that names the missing amount."""
    named = with_remedy(Refused("BidTooHigh(rateMax=297)", "the contract refused"))
    assert named.reason == "BidTooHigh(rateMax=297)"
    assert named.detail == "the contract refused"
    assert named.remedy == REMEDIES["BidTooHigh"]
    assert with_remedy(Refused("NotEV(account=0x00)", remedy="send 5 wei")).remedy == "send 5 wei"
    assert with_remedy(Refused("never heard of")).remedy == ""
    assert error_name("Error('a(b)')") == "Error"
