"""The core of the campaign notices whatever may come of a fault."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from faults import campaign
from faults.campaign import Verdict, cases_of, run_group, sample, text_problem, write_report


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Verdict]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(campaign.MODULES, "sample", "faults.sample_faults")
        found = run_group("sample", tmp_path_factory.mktemp("sample"), progress=False)
        yield {verdict.fault_class: verdict for verdict in found}


@pytest.mark.parametrize(
    ("fault_class", "kind", "violation"),
    [
        ("refuses", "refused", ""),
        ("names nothing", "refused", "names none of /y"),
        ("says nothing", "refused", "has no text"),
        ("alters", "altered", "found altered: 1.0 in place of 2.0"),
        ("raises", "raised", "IndexError: list index out of range"),
        ("kills", "crashed", "SIGSEGV"),
        ("hangs", "hung", "no end within 1 s"),
        ("leaks a file", "harmless", "files: "),
        ("leaks a thread", "harmless", "threads: "),
        ("takes memory", "harmless", "MB more at its peak"),
        ("initialises once", "harmless", ""),
        ("is harmless", "harmless", ""),
    ],
)
def test_the_oracle_sees(
    verdicts: dict[str, Verdict], fault_class: str, kind: str, violation: str
) -> None:
    verdict = verdicts[fault_class]
    assert verdict.kind == kind
    assert verdict.is_allowed == (not violation)
    assert violation in "; ".join(verdict.violations)


def test_reports_count_what_is_not_allowed(verdicts: dict[str, Verdict], tmp_path: Path) -> None:
    write_report(list(verdicts.values()), tmp_path, seed=0)
    values = json.loads((tmp_path / "faults.json").read_text())
    wrong = [row["fault_class"] for row in values["classes"] if row["not_allowed"]]
    assert values["not_allowed"] == len(wrong) == 9
    report = (tmp_path / "faults.md").read_text()
    assert all(f"`sample/{name}/" in report for name in wrong)


def test_samples_take_every_class_once_before_any_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(campaign.MODULES, "sample", "faults.sample_faults")
    cases = [*cases_of("sample", 0), *cases_of("sample", 1)]
    chosen = sample(cases, 14, seed=5)
    counts = Counter(case.fault_class for case in chosen)
    assert len(chosen) == 14 and len(counts) == 12
    assert sample(cases, 14, seed=5) == chosen != sample(cases, 14, seed=6)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("index '/x': expected 1, found 2", ""),
        ("", "has no text"),
        ("one\ntwo", "is not one line"),
        ("x" * 2000, "has 2000 characters"),
        ("index '/z': expected 1, found 2", "names none of /x"),
    ],
)
def test_error_texts_are_one_line_that_names_the_thing(text: str, problem: str) -> None:
    assert problem in text_problem(text, ("/x",))
    assert bool(text_problem(text, ("/x",))) == bool(problem)
