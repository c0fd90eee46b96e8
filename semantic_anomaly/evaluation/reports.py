"""The folder that a report becomes: whole or not at all, replaced only by its like."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from semantic_anomaly.errors import InputError
from semantic_anomaly.storage import atomic_folder


def refuse_other_content(out: Path, summary: str, written: frozenset[str]) -> None:
    """Refuse a folder whose replacement would lose anything but an earlier report.

    Args:
        out: where the report is to be written.
        summary: file by which an earlier report is known.
        written: names of everything that a report may hold.

    Raises:
        InputError: `out` is a file, or holds something else.
    """
    out = out.expanduser()
    if out.exists() and not out.is_dir():
        raise InputError(f"--out '{out}': expected a folder or nothing there, found a file")
    found = sorted(entry.name for entry in out.iterdir()) if out.is_dir() else []
    foreign = [name for name in found if name not in written]
    if foreign or (found and summary not in found):
        raise InputError(
            f"--out '{out}': expected nothing there, an empty folder or an earlier report (with "
            f"{summary} and nothing of another origin), found {', '.join((foreign or found)[:5])}"
        )


@contextmanager
def report_folder(out: Path, summary: str, written: frozenset[str]) -> Iterator[Path]:
    """Yield a temporary folder that becomes `out` when the block ends without an error.

    Args:
        out, summary, written: as in `refuse_other_content`.

    Raises:
        InputError: `out` holds something else than an earlier report.
    """
    refuse_other_content(out, summary, written)
    with atomic_folder(out, replace=True) as folder:
        yield folder


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a mapping as indented JSON; NaN is refused, for no reader could tell what it means."""
    text = json.dumps(values, indent=1, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
