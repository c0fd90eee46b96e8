"""From the components of a frame to the decision: what is filtered out, what is found again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from semantic_anomaly.region_filters import RegionFilters, apply, border_share
from semantic_anomaly.settings import Settings
from semantic_anomaly.structures import ComponentState, Decision, Localization
from semantic_anomaly.tracking import ComponentTracker


def reject(
    settings: Settings, labels: np.ndarray, places: tuple[Localization, ...], inside: np.ndarray
) -> tuple[np.ndarray, tuple[Localization, ...]]:
    """Return label map and components without those that size or shape speak against.

    Args:
        settings: `max_area`, `max_aspect` and `max_border_share`.
        labels: (height, width) uint16, 0 for none.
        places: components, labelled in the map.
        inside: (height, width) bool, pixels that take part.
    """
    filters = RegionFilters(
        max_area=settings.max_area,
        max_aspect=settings.max_aspect or math.inf,
        max_border_share=settings.max_border_share,
    )
    if not places or (filters.max_area == 1.0 and filters.max_aspect == math.inf):
        return labels, places
    numbers = [place.label - 1 for place in places]
    shares = border_share(labels.astype(np.int32) - 1, inside, max(numbers) + 1)[numbers]
    judged = apply(
        filters,
        (labels.shape[0], labels.shape[1]),
        np.array([place.box_xyxy for place in places], np.float64),
        np.array([place.area_px for place in places], np.float64),
        shares,
    )
    kept = tuple(place for place, keep in zip(places, judged.keep, strict=True) if keep)
    return np.where(np.isin(labels, [place.label for place in kept]), labels, 0), kept


def follow(
    tracker: ComponentTracker, stamp_ns: int, places: Sequence[Localization]
) -> tuple[Localization, ...]:
    """Return the components of the next frame with their tracks and states.

    Args:
        tracker: has been told all frames before; a frame without components must be told too.
        stamp_ns: of the frame.
        places: components, may be none.

    Raises:
        ModelOutputError: as `ComponentTracker.update`.
    """
    boxes = np.array([place.box_xyxy for place in places], np.float64).reshape(-1, 4)
    tracks = tracker.update(stamp_ns, boxes)
    return tuple(
        replace(place, state=track.state, track=track.track)
        for place, track in zip(places, tracks, strict=True)
    )


def decide(places: Sequence[Localization], threshold: float | None) -> Decision:
    """Return `anomaly` where a component is confirmed, `unknown` without a threshold."""
    if threshold is None:
        return Decision.UNKNOWN
    confirmed = any(place.state is ComponentState.CONFIRMED for place in places)
    return Decision.ANOMALY if confirmed else Decision.NOMINAL
