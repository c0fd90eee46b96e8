"""Aligned tables on the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest

from semantic_anomaly.cli import tables


def test_tables_align_numbers_to_the_right() -> None:
    text = tables.table([("cow", "3", "0.5"), ("sofa", "12", "-")], ("kind", "frames", "AUROC"))
    assert text.splitlines() == [
        "kind  frames  AUROC",
        "----  ------  -----",
        "cow        3    0.5",
        "sofa      12      -",
    ]
    assert tables.table([("a", "bc"), ("def", "g")]) == "a    bc\ndef  g"
    assert tables.table([]) == ""
    assert tables.table([], ("a", "bc")) == "a  bc\n-  --"


@pytest.mark.parametrize(("size", "text"), [(999, "1.0 kB"), (5_000_000, "5.0 MB")])
def test_sizes(tmp_path: Path, size: int, text: str) -> None:
    (tmp_path / "frames").mkdir()
    (tmp_path / "frames" / "file").write_bytes(bytes(size))
    assert tables.folder_size(tmp_path) == text


def test_long_lists_of_drives_are_cut() -> None:
    assert tables.drives_listed([("a", 3), ("b", 4)]) == "a (3), b (4)"
    many = tables.drives_listed((f"d{n}", n) for n in range(12))
    assert many.startswith("d0 (0), d1 (1)") and many.endswith("d9 (9) and 2 more")
