"""Run a drive through the detector, frame by frame, and write what it stated."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from semantic_anomaly.evaluation import extras, html, provenance
from semantic_anomaly.evaluation.album import Album, nearest_nominal
from semantic_anomaly.evaluation.drives import SUMMARY, WRITTEN, write_drive
from semantic_anomaly.evaluation.events import Event
from semantic_anomaly.evaluation.journal import resumable_report
from semantic_anomaly.io.sources import FrameSource
from semantic_anomaly.storage import sha256_bytes
from semantic_anomaly.structures import AnomalyResult, Decision, Frame

if TYPE_CHECKING:
    from semantic_anomaly.detection.detector import AnomalyDetector

PICTURES = 40
_EVERY_UNKNOWN = 10


def replay(
    source: FrameSource,
    detector: AnomalyDetector,
    out: Path,
    *,
    every: int | None = None,
    events: Sequence[Event] | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Assess every frame of a source, write `out` as a whole, and return its summary.

    Stopped or killed, it goes on from the last frame that was done when it is called again.

    An alarm is a run of frames whose decision is `anomaly`; its first frame is always pictured.

    Args:
        source: frames in the order of time.
        detector: used as it stands, uncalibrated too.
        out: folder to write; an earlier replay is replaced.
        every: pictures of every so manieth frame, 0 for none; None: about `PICTURES` of them.
        events: what the drive meets, for delays and false alarms; None: not known.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: a frame cannot be read, an event lies outside the drive, or `out` holds
            something else.
        MissingPackageError: matplotlib or jinja2 is not installed.
    """
    extras.require("matplotlib.figure", "jinja2")
    count = source.count
    if every is None:
        every = _EVERY_UNKNOWN if count is None else max(1, count // PICTURES)
    made = provenance.describe(detector)
    key = {
        **{"data": provenance.files_state(source.path), "frames": str(source.selection)},
        **{"topic": getattr(source, "topic", None), "pictures": every, **made},
    }
    with resumable_report(out, SUMMARY, WRITTEN, key) as journal:
        album = Album(journal.folder, detector.region, detector.settings.overlay_alpha, every)
        detector.reset()
        done = len(journal.rows)
        bar = tqdm(source, "replay", count, unit="frame", disable=None if progress else True)
        for number, frame in enumerate(bar):
            if number < done:
                continue
            if number == done:
                # The first frame pays for what is made once, and would be the slowest.
                detector.detect(frame)
                detector.reset()
                for row in journal.rows:
                    detector.recall(row["stamp_ns"], row["boxes"])
            result = detector.detect(frame)
            begins = _is_alarm(result) and not (journal.rows and journal.rows[-1]["alarm"])
            album.add(
                number,
                frame,
                result,
                stem=html.frame_stem(frame.name),
                caption=f"{frame.name}   {result.decision.value}   score {result.score:.3f}",
                nearest=partial(nearest_nominal, detector, frame),
                always=begins,
            )
            journal.record(_row(frame, result))
        album.finish()
        details = {**made, "data_sha256": provenance.rows_digest(journal.rows)}
        summary = write_drive(
            journal.folder, source.name, journal.rows, detector.threshold, events, details
        )
    return summary


def _is_alarm(result: AnomalyResult) -> bool:
    return result.decision is Decision.ANOMALY


def _row(frame: Frame, result: AnomalyResult) -> dict[str, Any]:
    return {
        "name": frame.name,
        "stamp_ns": frame.stamp_ns,
        "score": result.score,
        "p_value": result.p_value,
        "decision": result.decision.value,
        "alarm": _is_alarm(result),
        "boxes": [list(place.box_xyxy) for place in result.localizations],
        "ms": dict(result.stage_ms),
        "sha256": sha256_bytes(frame.image.tobytes()),
    }
