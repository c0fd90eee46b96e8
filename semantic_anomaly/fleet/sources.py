"""Sources of a fleet: damaged ones are told from missing ones, by the command and on nodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from semantic_anomaly.errors import SourceError
from semantic_anomaly.fleet.cluster import StorageError
from semantic_anomaly.index.content import FailedSource
from semantic_anomaly.io.open import open_source, split_selection
from semantic_anomaly.io.sources import MAX_BAD_SHARE, FrameSource
from semantic_anomaly.offline.drives import open_drives

_log = logging.getLogger(__name__)


def open_readable(
    sources: Sequence[str], topic: str | None
) -> tuple[dict[str, FrameSource], list[FailedSource]]:
    """Open sources by name; those that exist and cannot be read are returned apart.

    Raises:
        SourceError: a source does not exist, is given twice, or none can be read.
    """
    opened: list[FrameSource] = []
    failed: list[FailedSource] = []
    for item in sources:
        try:
            opened.append(open_source(item, topic=topic))
        except SourceError as error:
            path, _ = split_selection(item)
            if not path.exists():
                raise
            _log.warning("source '%s' is left out: %s", item, error)
            failed.append(FailedSource(path.name, str(error)))
    if not opened and failed:
        raise SourceError(failed[0].reason)
    return open_drives(opened), failed


def open_on_node(opened: str | Sequence[str], topic: str) -> FrameSource:
    """Open a source that the command has opened.

    Raises:
        StorageError: it is not there on this node.
        SourceError: it is damaged.
    """
    refuse_missing(opened)
    source = open_source(opened, topic=topic or None)
    source.max_bad_share = MAX_BAD_SHARE
    return source


def refuse_missing(opened: str | Sequence[str]) -> None:
    """Raise StorageError if a source that the command has opened is not there on this node."""
    for item in [opened] if isinstance(opened, str) else opened:
        path, _ = split_selection(item.removeprefix("@"))
        # A pattern matches nothing where its folder is missing.
        if not path.exists() and not path.parent.exists():
            raise StorageError(
                f"cannot read '{path}', which the command reads; expected storage that all nodes "
                "share"
            )
