"""Aligned tables on the terminal."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from semantic_anomaly.storage import folder_bytes

if TYPE_CHECKING:
    from semantic_anomaly.evaluation.datasets import Dataset
    from semantic_anomaly.fleet.reports import FleetReports
    from semantic_anomaly.io.sources import FrameSource

_LISTED = 10
_NUMBER = re.compile(r"[-+]?[\d.,]+([eE][-+]?\d+)?( ?%)?|-")


def table(rows: Sequence[Sequence[str]], header: Sequence[str] = ()) -> str:
    """Return rows as aligned text, columns of numbers to the right.

    Args:
        rows: the cells of each row; all rows have the same number of cells.
        header: names of the columns; empty for a table without a header.
    """
    lines = [header, *rows] if header else rows
    columns = list(zip(*lines, strict=True))
    widths = [max(map(len, column)) for column in columns]
    body = list(zip(*rows, strict=True)) or [()] * len(columns)
    right = [bool(cells) and all(map(_NUMBER.fullmatch, cells)) for cells in body]
    texts = [
        "  ".join(
            cell.rjust(width) if to_right else cell.ljust(width)
            for cell, width, to_right in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in lines
    ]
    if header:
        texts.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(texts)


def folder_size(folder: Path) -> str:
    """Return the size of the files of a folder in MB or kB."""
    count = folder_bytes(folder)
    return f"{count / 1e6:.1f} MB" if count >= 1_000_000 else f"{count / 1e3:.1f} kB"


def listed(names: Sequence[str]) -> str:
    """Return the first names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def report_losses(sources: Iterable[FrameSource | Dataset]) -> int:
    """Print what sources or datasets left out; return the exit code, 3 if something, else 0."""
    return print_losses([source.losses for source in sources])


def print_losses(losses: Iterable[str], unreadable: Iterable[tuple[str, str]] = ()) -> int:
    """Print losses, and names and reasons of sources without result; return the exit code."""
    lines = [f"left out: {loss}" for loss in losses if loss]
    lines += [f"not readable: {name}: {reason}" for name, reason in unreadable]
    for line in lines:
        print(f"warning: {line}")
    return 3 if lines else 0


def print_reports(
    reports: FleetReports,
    folders: Mapping[str, Path],
    summary: str,
    text_of: Callable[[dict[str, Any]], str],
) -> None:
    """Print reports that were written on a cluster.

    Args:
        reports: as written.
        folders: of the reports, by name.
        summary: file of a report, JSON.
        text_of: returns the text of the values of that file.
    """
    for name in reports.finished:
        print(text_of(json.loads((folders[name] / summary).read_text(encoding="utf-8"))))
        print(f"wrote {folders[name]}")
    print(f"{len(reports.finished)} reports, of which {len(reports.ran)} were made by this run")


def drives_listed(drives: Iterable[tuple[str, int]]) -> str:
    """Return the first drives with their numbers of frames."""
    return listed([f"{name} ({count})" for name, count in drives])
