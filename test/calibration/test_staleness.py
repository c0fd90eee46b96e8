"""Edits since the calibration, and the warning about them."""

from __future__ import annotations

import pytest

from semantic_anomaly.calibration.staleness import StaleEdit, edits_since, staleness_warning

ADD = StaleEdit(1, "add 1 frame", False, False)
RETRACT = StaleEdit(2, "retract 14 entries", False, True)
UNDO_ADD = StaleEdit(1, "add 1 frame", True, True)


@pytest.mark.parametrize(
    ("before", "changes", "expected"),
    [
        ([], [ADD, RETRACT], (ADD, RETRACT)),
        ([ADD, RETRACT], [UNDO_ADD], (RETRACT,)),
        ([], [UNDO_ADD, ADD], (UNDO_ADD, ADD)),
        ([UNDO_ADD], [UNDO_ADD], (UNDO_ADD, UNDO_ADD)),
    ],
)
def test_undoing_an_edit_since_the_calibration_removes_it(
    before: list[StaleEdit], changes: list[StaleEdit], expected: tuple[StaleEdit, ...]
) -> None:
    assert edits_since(before, changes) == expected


@pytest.mark.parametrize(
    ("edits", "count", "texts", "meaning"),
    [
        ([RETRACT], "1 edit of", "retract 14 entries;", "distances can only have grown"),
        ([ADD], "1 edit of", "add 1 frame;", "only have shrunk"),
        ([ADD, UNDO_ADD], "2 edits of", "add 1 frame, undo: add 1 frame;", "others shrunk"),
    ],
)
def test_warning_names_the_edits_and_the_direction_of_distances(
    edits: list[StaleEdit], count: str, texts: str, meaning: str
) -> None:
    warning = staleness_warning(edits)
    assert count in warning and texts in warning and meaning in warning
