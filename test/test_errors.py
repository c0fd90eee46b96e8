"""Messages of exceptions."""

from __future__ import annotations

import pytest

from semantic_anomaly.errors import MismatchError, UnknownNameError, first_line


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (
            ["grid", "instance"],
            "unknown variant 'gird' (did you mean 'grid'?); expected one of: grid, instance",
        ),
        (["b", "a"], "unknown variant 'gird'; expected one of: a, b"),
        ([], "unknown variant 'gird'; expected one of: none"),
    ],
)
def test_unknown_names_list_the_known_ones(known: list[str], message: str) -> None:
    assert str(UnknownNameError("variant", "gird", known)) == message


def test_mismatches_name_both_values() -> None:
    assert str(MismatchError("dim", 384, 768)) == "dim: expected 384, found 768"
    assert str(MismatchError("dim", 1, 2, "rebuild the index")).endswith("2; rebuild the index")


def test_first_line_is_short_and_never_empty() -> None:
    assert first_line(ValueError("\n one \ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"
    assert len(first_line(OSError("x" * 1000))) == 200


def test_messages_are_short_whatever_values_they_quote() -> None:
    text = str(MismatchError("manifest", "64 digits", [10**100] * 100, "build it again"))
    assert len(text) < 1400
    assert text.startswith("manifest: expected 64 digits, found [1000")
    assert " ... " in text and text.endswith("; build it again")
