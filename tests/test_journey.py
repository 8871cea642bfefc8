"""docs/journey.md tells what the code does: its diagram is the table, its rows are events that exist, its commands too.

`python tests/test_journey.py` writes the diagram anew.
"""

import re
from pathlib import Path

from agent.core.events import KINDS
from agent.core.session import CLOSED, TABLE, Stage

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/journey.md"
BEGIN, END = "<!-- stages: begin -->\n", "<!-- stages: end -->\n"


def diagram():
    """The table as a Mermaid state diagram: an arrow for each pair of stages, with the events that lead there."""
    arrows = {}
    for stage, row in TABLE.items():
        for kind, targets in row.items():
            for target in targets - {stage}:
                arrows.setdefault((stage, target), []).append(kind.__name__)
    order = list(Stage)
    lines = ["```mermaid", "stateDiagram-v2", "    [*] --> MATCHED: ConnectedBelieved"]
    for stage, target in sorted(arrows, key=lambda arrow: (order.index(arrow[0]), order.index(arrow[1]))):
        lines.append(f"    {stage} --> {target}: {', '.join(sorted(arrows[stage, target]))}")
    lines += [f"    {stage} --> [*]" for stage in order if stage in CLOSED]
    return "\n".join([*lines, "```", ""])


def test_the_diagram_is_the_table():
    """Would catch a stage or a transition that the page does not know, or still knows."""
    _, _, rest = PAGE.read_text().partition(BEGIN)
    shown, _, _ = rest.partition(END)
    assert shown == diagram(), "python tests/test_journey.py"


def test_the_page_names_only_events_that_exist_and_all_that_matter():
    """Would catch a step whose event was renamed."""
    page = PAGE.read_text()
    named = set(re.findall(r"`([A-Z][a-z]+(?:[A-Z][a-z]+)+)`", page))
    rows = page.split("## The steps")[1]
    assert named <= KINDS.keys()
    untold = {kind for kind in KINDS if kind not in rows}
    assert untold <= {
        "BlocksScanned",  # a cursor
        "ConnectedFinal",  # lifts a cap, no step
        "SettlementReverted",  # beside the way: signed again
        "PortLocked",  # no session's
        "PortUnlocked",
        "SessionLapsed",
    }


def test_every_stage_is_told():
    """Would catch a stage without a step."""
    page = PAGE.read_text()
    assert not [stage for stage in Stage if stage not in page.split("## The steps")[1]]


def test_the_commands_of_the_page_exist():
    """Would catch a command that was renamed."""
    from agent.cli.provider import provider

    asked = set(re.findall(r"`v2v provider ([a-z-]+)", PAGE.read_text()))
    assert asked
    assert asked <= provider.commands.keys()


if __name__ == "__main__":
    before, _, rest = PAGE.read_text().partition(BEGIN)
    PAGE.write_text(before + BEGIN + diagram() + END + rest.partition(END)[2])
