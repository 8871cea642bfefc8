"""Named slips: plausible mistakes in the rooms that decide, each with the test that must catch it (DESIGN section 5, rules 1-10).

    python tests/slips.py FOLDER      one JSON line a slip: {"name", "passed", "seconds"}; first "nothing", which must pass

Each slip is one replaced text in a private copy of the package. Python, pytest and the libraries are imported once; then a
fork per slip imports the copy, so that twenty of them cost about as much as five. The package itself is never touched.
"""

import json
import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = (
    "tests/conftest.py",
    "tests/story.py",
    "tests/visit.py",
    "tests/agent/core",
    "tests/agent/test_engine.py",
    "tests/agent/test_door.py",
)


EXIT_NOT_ASKED = 9


@dataclass(frozen=True)
class Slip:
    """`old` stands exactly once in `file`; with `new` instead, `test` must fail."""

    name: str
    file: str
    old: str
    new: str
    test: str


SESSION, BOOK, LIVE = "agent/core/session.py", "agent/core/book.py", "agent/core/live.py"
OF_SESSION, OF_BOOK, OF_DOOR = (
    "tests/agent/core/test_session.py::test_",
    "tests/agent/core/test_book.py::test_",
    "tests/agent/test_door.py::test_",
)

SLIPS = (
    Slip(
        "rule_1_one_reading_is_rest",
        LIVE,
        "if reading.register_mwh is None or reading.register_mwh != previous.register_mwh:",
        "if reading.register_mwh is None:",
        "tests/agent/core/test_live.py::test_rest_is_two_readings_open_at_the_same_register",
    ),
    Slip(
        "rule_1_end_register_while_closed",
        LIVE,
        "not (reading.seen_open and previous.seen_open)",
        "not previous.at_ms",
        "tests/agent/core/test_live.py::test_rest_is_two_readings_open_at_the_same_register",
    ),
    Slip(
        "rule_1_segment_forgotten",
        SESSION,
        "energy_mwh_metered=session.energy_mwh_metered + moved,",
        "energy_mwh_metered=moved,",
        OF_SESSION + "rule_1_energy_is_the_sum_of_segments_between_journaled_registers",
    ),
    Slip(
        "rule_1_register_moved_alone",
        SESSION,
        "if register_mwh != session.register_mwh_last:",
        "if register_mwh < session.register_mwh_last:",
        OF_SESSION + "rule_1_a_register_that_moves_while_open_ends_the_session",
    ),
    Slip(
        "rule_2_failsafe_not_looked_at",
        SESSION,
        "if not live.ports[port].armed:",
        "if False:",
        OF_SESSION + "rule_2_each_fault_of_the_charger_hinders_alone[failsafe_not_armed]",
    ),
    Slip(
        "rule_2_token_not_recomputed",
        BOOK,
        "            and terms.token\n            == access_token(",
        "            and terms.token\n            != access_token(",
        OF_BOOK + "rule_2_what_does_not_recompute_is_not_ours",
    ),
    Slip(
        "rule_2_stale_view_is_fine",
        SESSION,
        "if live.view_age_s is None or live.view_age_s > policy.max_view_age_s:",
        "if live.view_age_s is None:",
        OF_SESSION + "rule_2_a_stale_view_hinders",
    ),
    Slip(
        "rule_2_validity_without_margin",
        SESSION,
        "if live.at_s >= session.terms.valid_until_s - policy.validity_margin_s:\n        return Hindrance",
        "if live.at_s >= session.terms.valid_until_s:\n        return Hindrance",
        OF_SESSION + "rule_2_the_validity_less_its_margin_hinders",
    ),
    Slip(
        "rule_2_one_sample_of_the_battery",
        LIVE,
        "return sample, sample if agrees else before.soc_agreed",
        "return sample, sample",
        OF_SESSION + "rule_2_one_odd_sample_of_the_battery_neither_stops_nor_allows_anything[0]",
    ),
    Slip(
        "rule_2_unfinal_without_cap",
        SESSION,
        "if not session.final and delivered_wh >= policy.max_unfinal_wh:",
        "if delivered_wh >= policy.max_unfinal_wh * 1000:",
        OF_SESSION + "rule_2_the_cap_on_unfinal_energy_hinders_until_finality",
    ),
    Slip(
        "rule_3_credit_without_end",
        SESSION,
        "if delivered_wh - session.energy_wh_acked >= policy.max_unacked_wh[port]:",
        "if delivered_wh - session.energy_wh_acked >= session.order_wh:",
        OF_SESSION + "rule_3_unacked_energy_stays_near_the_limit_and_pauses",
    ),
    Slip(
        "rule_3_receipt_goes_down",
        SESSION,
        "if event.energy_wh_acked <= session.energy_wh_acked or session.settlement is not None:",
        "if event.energy_wh_acked == session.energy_wh_acked or session.settlement is not None:",
        OF_SESSION + "rule_3_a_lower_receipt_takes_nothing_back",
    ),
    Slip(
        "rule_3_over_the_grant",
        "agent/core/token.py",
        "if delivered_wh > ack.max_energy_wh:",
        "if delivered_wh > ack.valid_until_s:",
        "tests/agent/core/test_token.py::test_a_granted_keys_receipt_is_good_up_to_its_limit",
    ),
    Slip(
        "rule_3_over_the_grant_waits_for_the_meter",
        "agent/door.py",
        "if message.delivered_wh > session.order_wh:",
        "if message.delivered_wh > session.terms.energy_wh_ordered:",
        OF_DOOR + "over_grant",
    ),
    Slip(
        "rule_4_early_token_of_the_old_block",
        BOOK,
        "if terms is None or terms.token != event.presentation.token:",
        "if terms is None:",
        OF_SESSION + "rule_4_an_early_token_for_an_old_block_is_not_kept",
    ),
    Slip(
        "rule_4_early_token_is_dropped",
        BOOK,
        "Stage.MATCHED, event.at_s, presentation=book.early.get(event.session_id))",
        "Stage.MATCHED, event.at_s)",
        OF_SESSION + "rule_4_an_early_token_waits_for_the_chain",
    ),
    Slip(
        "rule_5_session_moves_between_ports",
        SESSION,
        "if session.stage is not S.MATCHED and event.presentation.port != session.port:",
        "if False:",
        OF_SESSION + "rule_5_a_session_does_not_move_between_ports",
    ),
    Slip(
        "rule_5_wrong_signer_is_taken",
        "agent/door.py",
        "if rules.presentation_key(self._domain, message.scheme, grant, signature) != public_key:",
        "if rules.presentation_key(self._domain, message.scheme, grant, signature) == b'':",
        OF_DOOR + "wrong_signer",
    ),
    Slip(
        "rule_6_visible_before_durable",
        "agent/engine.py",
        "        self._journal.append(event)\n        before, self.book = self.book, after\n",
        "        before, self.book = self.book, after\n        self._journal.append(event)\n",
        "tests/agent/test_engine.py::test_it_is_on_disk_before_anybody_can_see_it",
    ),
    Slip(
        "rule_6_receipt_after_the_signature",
        SESSION,
        "if event.energy_wh_acked <= session.energy_wh_acked or session.settlement is not None:",
        "if event.energy_wh_acked <= session.energy_wh_acked:",
        OF_SESSION + "rule_6_no_receipt_is_taken_once_the_settlement_is_signed",
    ),
    Slip(
        "rule_6_underpaid_is_settled",
        SESSION,
        "stage=S.SETTLED if paid else S.STRANDED",
        "stage=S.SETTLED",
        OF_SESSION + "rule_6_paid_less_than_acknowledged_is_stranded_and_says_so",
    ),
    Slip(
        "rule_3_a_pause_for_credit_does_not_rest",
        SESSION,
        "return min(CREDIT_REST_S_MAX, CREDIT_REST_S << min(session.credit_pauses - 1, 16))",
        "return CREDIT_REST_S",
        OF_SESSION + "who_signs_one_wh_at_a_time_wears_the_contactor_no_more_than_a_minute_allows",
    ),
    Slip(
        "rule_7_close_is_not_seen",
        SESSION,
        "if session.closing_at_s is not None or session.ended is not None:\n        return Hindrance.CLOSING\n",
        "",
        OF_SESSION + "rule_2_a_close_on_chain_hinders_at_once",
    ),
    Slip(
        "rule_7_close_is_not_answered",
        SESSION,
        "if session.ended is not None or session.closing_at_s is not None:\n        return _stop(",
        "if session.ended is not None:\n        return _stop(",
        OF_SESSION + "rule_7_a_close_in_any_stage_first_opens_then_is_answered",
    ),
    Slip(
        "rule_8_no_lock_out",
        BOOK,
        "if isinstance(event, ev.DeliveryEnded) and not event.seen_open and after.port is not None:",
        "if False:",
        OF_SESSION + "rule_8_a_contactor_that_does_not_open_is_told_more_firmly_and_then_locked_out",
    ),
    Slip(
        "rule_8_waits_for_ever",
        SESSION,
        "return _ended_unseen(session, live) if waited_s >= live.policy.stop_deadline_s else None",
        "return None",
        OF_SESSION + "rule_8_a_contactor_that_does_not_open_is_told_more_firmly_and_then_locked_out",
    ),
    Slip(
        "rule_9_resumes_into_delivering",
        SESSION,
        "if session.segment_mwh_begin is not None and session.life != live.life:",
        "if False:",
        OF_SESSION + "rule_9_a_restart_never_resumes_straight_into_delivering[DELIVERING]",
    ),
    Slip(
        "rule_9_end_intent_forgotten",
        SESSION,
        "stage = S.SETTLING if session.end_intent else S.MATCHED",
        "stage = S.MATCHED",
        OF_SESSION + "an_orphan_with_an_end_intent_is_only_settled",
    ),
    Slip(
        "rule_10_late_without_a_view",
        SESSION,
        "if live.header is not None and live.at_s >= session.terms.valid_until_s",
        "if live.at_s >= session.terms.valid_until_s",
        OF_SESSION + "rule_10_without_a_header_nobody_is_declared_late",
    ),
    Slip(
        "rule_10_an_old_head_is_news",
        LIVE,
        "if live.header is not None and update.number <= live.header.number:",
        "if False:",
        OF_SESSION + "rule_2_an_old_head_served_again_does_not_refresh_the_view",
    ),
)


def copied(folder):
    """A private copy of package and tests."""
    shutil.copytree(ROOT / "agent", folder / "agent", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(
        ROOT / "contracts", folder / "contracts", ignore=shutil.ignore_patterns("node_modules", "__pycache__")
    )
    for name in COPIED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "test_mutants.py")
            )
        else:
            shutil.copy(ROOT / name, folder / name)
    shutil.copy(ROOT / "pyproject.toml", folder)


def exit_code(folder, tests):
    """Run these tests against the copy, in a fork of its own: pytest's exit code."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(_asked(folder, tests))
        finally:
            os._exit(EXIT_NOT_ASKED)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _asked(folder, tests):
    import pytest

    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with (folder / "said.log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    # Plugins that were imported before the fork cannot be rewritten: only their own assertions say less.
    early = "ignore::pytest.PytestAssertRewriteWarning"
    return pytest.main(["-q", "-x", "-W", early, "-p", "no:cacheprovider", *tests])


def main(folder):
    """Nothing first, then every slip."""
    import coincurve  # noqa: F401 - imported once, for all forks
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    from eth_hash.auto import keccak

    keccak(b"")
    assert "agent" not in sys.modules
    copied(folder)
    told("nothing", exit_code(folder, sorted({slip.test for slip in SLIPS})), time.monotonic())
    for number, slip in enumerate(SLIPS, start=1):
        began = time.monotonic()
        path = folder / slip.file
        text = path.read_text()
        assert text.count(slip.old) == 1, (
            f"{slip.name}: its text stands {text.count(slip.old)} times in {slip.file}"
        )
        path.write_text(text.replace(slip.old, slip.new))
        os.utime(path, (number, 2 * number))  # compiled files are told apart by size and second
        told(slip.name, exit_code(folder, [slip.test]), began)
        path.write_text(text)
        os.utime(path, (number, 2 * number + 1))


def told(name, code, began):
    """One line."""
    line = json.dumps({"name": name, "code": code, "seconds": round(time.monotonic() - began, 2)})
    print(line, flush=True)  # noqa: T201 - it is a program


if __name__ == "__main__":
    main(Path(sys.argv[1]))
