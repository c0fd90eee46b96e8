"""Check results of `evaluate` and `replay` against the requirements of a YAML file.

A requirement limits a measure, of all frames or of those with a tag, kind, family, drive or size of
anomaly. By default the worse bound of its 95 % interval must keep the limit. A comparison with a
baseline limits the difference of a measure on the same frames, with a bootstrap over drives.
"""

from __future__ import annotations

import csv
import math
import xml.etree.ElementTree as ElementTree
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from semantic_anomaly.errors import InputError, UnknownNameError
from semantic_anomaly.evaluation import extras
from semantic_anomaly.evaluation.datasets import read_json, read_yaml
from semantic_anomaly.evaluation.events import TAIL_S
from semantic_anomaly.evaluation.metrics import (
    auroc_interval,
    bootstrap_interval,
    frame_auroc,
    rate_interval,
    share,
)
from semantic_anomaly.structures import Decision

_EVALUATED, _REPLAYED = "results.json", "summary.json"
_INTERVAL, _ESTIMATE = "interval", "estimate"
_LIMITS = "at_most", "at_least", "worse_by_at_most"
_GROUPS = "tag", "kind", "family", "drive"
_KEYS = ("measure", *_LIMITS, "by", *_GROUPS, "anomaly_px", "each")
_MOST_DRIVES = 10**7
_LISTED = 3


class _Measure(NamedTuple):
    """What a measure is taken of.

    Attributes:
        unit: frame, event or drive.
        anomaly: whether of anomalous or of nominal units; None: of both.
        value: name of the value of each unit whose share is the measure; empty for other measures.
        limit: key of its limit.
    """

    unit: str
    anomaly: bool | None
    value: str
    limit: str


MEASURES: Mapping[str, _Measure] = {
    "fpr": _Measure("frame", False, "above", "at_most"),
    "tpr": _Measure("frame", True, "above", "at_least"),
    "alarm_fpr": _Measure("frame", False, "alarm", "at_most"),
    "alarm_tpr": _Measure("frame", True, "alarm", "at_least"),
    "localized": _Measure("frame", True, "localized", "at_least"),
    "frame_auroc": _Measure("frame", None, "", "at_least"),
    "event_recall": _Measure("event", True, "found", "at_least"),
    "false_alarms_per_hour": _Measure("drive", False, "", "at_most"),
}


@dataclass(frozen=True)
class Outcome:
    """One frame, event or drive: its ground truth, and what the detector made of it.

    Two outcomes are equal when they have the same ground truth.

    Attributes:
        unit: frame, event or drive.
        drive: dataset and drive; outcomes of different drives are independent.
        name: of the frame or event.
        sha256: digest of the frame with its mask, or of the drive.
        anomaly: whether it is anomalous.
        kind, family, tags: labels.
        anomaly_px: number of anomalous pixels, None when not known.
        values: above (the threshold), alarm, localized and score of frames; found of events;
            false_alarms and nominal_s of drives. None when not defined.
    """

    unit: str
    drive: str
    name: str
    sha256: str
    anomaly: bool
    kind: str | None = None
    family: str | None = None
    tags: tuple[str, ...] = ()
    anomaly_px: int | None = None
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Requirement:
    """A limit of a measure; see `read_requirements` for the fields.

    Raises:
        InputError: a field of another type or value, or fields that do not fit together.
    """

    measure: str
    at_most: float | None = None
    at_least: float | None = None
    worse_by_at_most: float | None = None
    by: str = _INTERVAL
    tag: tuple[str, ...] = ()
    kind: str | None = None
    family: str | None = None
    drive: str | None = None
    anomaly_px: tuple[int, int | None] | None = None
    each: str | None = None

    def __post_init__(self) -> None:
        if self.measure not in MEASURES:
            raise UnknownNameError("measure", self.measure, MEASURES)
        measure = MEASURES[self.measure]
        expected = f"{measure.limit} or worse_by_at_most"
        limits = [name for name in _LIMITS if getattr(self, name) is not None]
        if len(limits) != 1 or limits[0] not in (measure.limit, "worse_by_at_most"):
            found = " and ".join(limits) or "none"
            raise InputError(f"{self.measure}: expected one limit, {expected}; found {found}")
        most = math.inf if self.measure == "false_alarms_per_hour" else 1.0
        if not 0 <= self.limit <= most or math.isinf(self.limit):
            raise InputError(
                f"{self.measure}: {limits[0]}: expected a number from 0"
                f"{'' if math.isinf(most) else ' to 1'}, found {self.limit:g}"
            )
        if self.by not in (_INTERVAL, _ESTIMATE):
            raise UnknownNameError("value of 'by'", self.by, (_INTERVAL, _ESTIMATE))
        if self.each is not None and self.each not in _GROUPS:
            raise UnknownNameError("value of 'each'", self.each, _GROUPS)
        if self.each is not None and getattr(self, self.each):
            raise InputError(f"{self.measure}: expected '{self.each}' or 'each', found both")
        of_anomalies = [n for n in ("kind", "family", "anomaly_px") if getattr(self, n) is not None]
        of_anomalies += [self.each] if self.each in ("kind", "family") else []
        if measure.anomaly is False and of_anomalies:
            raise InputError(
                f"{self.measure}: expected no {', '.join(of_anomalies)}: nominal frames have none"
            )
        if self.measure == "false_alarms_per_hour" and not self.paired and self.by == _INTERVAL:
            raise InputError(f"{self.measure}: has no interval, expected 'by: {_ESTIMATE}'")

    @property
    def limit(self) -> float:
        """Return the limit, whichever it is."""
        return float(next(v for name in _LIMITS if (v := getattr(self, name)) is not None))

    @property
    def paired(self) -> bool:
        """Return whether it compares with a baseline."""
        return self.worse_by_at_most is not None

    @property
    def name(self) -> str:
        """Return the measure and what it is restricted to."""
        parts = [self.measure, *(f"tag {tag}" for tag in self.tag)]
        parts += [f"{key} {v}" for key in _GROUPS[1:] if (v := getattr(self, key)) is not None]
        if self.anomaly_px is not None:
            low, high = self.anomaly_px
            parts.append(f"{low} px and more" if high is None else f"{low} to {high} px")
        return ", ".join(parts)

    @property
    def limit_text(self) -> str:
        """Return the limit and what must keep it."""
        key = next(name for name in _LIMITS if getattr(self, name) is not None)
        return f"{key.replace('_', ' ')} {self.limit:g} ({self.by})"

    def select(self, outcomes: Iterable[Outcome]) -> list[Outcome]:
        """Return the outcomes that the requirement is about, by their ground truth alone."""
        measure = MEASURES[self.measure]
        return [
            outcome
            for outcome in outcomes
            if outcome.unit == measure.unit
            and measure.anomaly in (None, outcome.anomaly)
            and set(self.tag) <= set(outcome.tags)
            and self.drive in (None, outcome.drive)
            and (not outcome.anomaly or self._is_about_anomaly(outcome))
        ]

    def _is_about_anomaly(self, outcome: Outcome) -> bool:
        low, high = self.anomaly_px or (0, None)
        sized = self.anomaly_px is None or (
            outcome.anomaly_px is not None
            and low <= outcome.anomaly_px < (math.inf if high is None else high)
        )
        return sized and self.kind in (None, outcome.kind) and self.family in (None, outcome.family)


@dataclass(frozen=True)
class Results:
    """Results of one index, of one or more evaluations and replays.

    Attributes:
        paths: files that they were read from.
        index: fingerprint of the index.
        calibration: digest of the calibration, None without one.
        threshold: threshold of the frame scores, None without one.
        version: version of this package that computed them.
        outcomes: of frames, events and drives.
        warnings: sentences on how far the results can be relied on.
    """

    paths: tuple[Path, ...]
    index: str
    calibration: str | None
    threshold: float | None
    version: str
    outcomes: tuple[Outcome, ...]
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """Whether a requirement is met.

    Attributes:
        requirement: without `each`.
        value: the measure, or the difference to the baseline: new minus old.
        interval: 95 % interval of it, None without one.
        count: number of frames, events or drives.
        drives: number of drives that they belong to.
        met: whether the limit is kept.
        remark: why it is not met, or the two values of a comparison.
    """

    requirement: Requirement
    value: float
    interval: tuple[float, float] | None
    count: int
    drives: int
    met: bool
    remark: str = ""


@dataclass(frozen=True)
class Acceptance:
    """The verdicts on an index.

    Attributes:
        results, baseline: what was checked, and what it was compared with, None without any.
        verdicts: one for each requirement; one for each group of a requirement with `each`.
    """

    results: Results
    baseline: Results | None
    verdicts: tuple[Verdict, ...]

    @property
    def met(self) -> bool:
        """Return whether every requirement is met."""
        return all(verdict.met for verdict in self.verdicts)

    def junit(self) -> bytes:
        """Return the verdicts as JUnit XML, a test case for each requirement."""
        failures = sum(not verdict.met for verdict in self.verdicts)
        counts = {"tests": f"{len(self.verdicts)}", "failures": f"{failures}", "errors": "0"}
        root = ElementTree.Element("testsuites", counts)
        suite = ElementTree.SubElement(root, "testsuite", {"name": "semantic-anomaly", **counts})
        properties = ElementTree.SubElement(suite, "properties")
        for prefix, results in (("", self.results), ("baseline_", self.baseline)):
            for name in ("index", "calibration", "version") if results is not None else ():
                fact = {"name": f"{prefix}{name}", "value": getattr(results, name) or ""}
                ElementTree.SubElement(properties, "property", fact)
        for verdict in self.verdicts:
            requirement = verdict.requirement
            name = f"{requirement.name}: {requirement.limit_text}"
            names = {"classname": "semantic-anomaly.accept", "name": name}
            case = ElementTree.SubElement(suite, "testcase", names)
            bounds = verdict.interval
            interval = "" if bounds is None else f", 95 % {bounds[0]:.4f} to {bounds[1]:.4f}"
            unit = MEASURES[requirement.measure].unit
            text = (
                f"{verdict.value:.4f}{interval}, {verdict.count} {unit}s of {verdict.drives} drives"
            )
            if verdict.remark:
                text += f"; {verdict.remark}"
            if verdict.met:
                ElementTree.SubElement(case, "system-out").text = text
            else:
                ElementTree.SubElement(case, "failure", {"message": text}).text = f"{name}\n{text}"
        ElementTree.indent(root)
        content: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
        return content + b"\n"


def accept(
    results: Sequence[Path],
    requirements: Sequence[Requirement],
    against: Sequence[Path] = (),
    *,
    progress: bool = False,
) -> Acceptance:
    """Check results of one index against requirements.

    Args:
        results: folders written by `evaluate` or `replay`, of the same index, calibration,
            threshold and version of the package.
        requirements: as `read_requirements` returns them.
        against: folders of the baseline, with results of the same frames.
        progress: show a progress bar on a terminal.

    Raises:
        InputError: results that cannot be read, are of several indexes or of seen frames; a tag,
            kind, family or drive that they do not have; a measure that is not defined; a baseline
            of other frames, or none where one is needed.
        MissingPackageError: scipy or scikit-learn is not installed.
    """
    extras.require("sklearn.metrics", "scipy.stats")
    comparisons = any(requirement.paired for requirement in requirements)
    if comparisons != bool(against):
        found = "none" if not against else "no such requirement"
        raise InputError(
            "--against: expected results of the baseline exactly where a requirement has "
            f"worse_by_at_most, found {found}"
        )
    current = _pool([read_results(path) for path in results])
    baseline = _pool([read_results(path) for path in against]) if against else None
    earlier = () if baseline is None else _paired(current, baseline)
    expanded = [part for r in requirements for part in _expand(r, current.outcomes)]
    hide = None if progress else True
    verdicts = [
        _verdict(requirement, current.outcomes, earlier)
        for requirement in tqdm(expanded, "accept", unit="requirement", disable=hide)
    ]
    return Acceptance(current, baseline, tuple(verdicts))


def read_requirements(path: Path | str) -> list[Requirement]:
    """Return the requirements of a YAML file: a list `requirements` of mappings.

    Each has `measure`, a key of `MEASURES`, and one limit: `at_most`, `at_least` or
    `worse_by_at_most`. Optional are `by`: interval (default) or estimate; `tag` (a text, or a list
    of which frames have all), `kind`, `family`, `drive` and `anomaly_px` ([from, below], in pixels,
    `null`: no upper limit) to restrict it; and `each`: tag, kind, family or drive, for one
    requirement for each of them.

    Raises:
        InputError: it cannot be read, holds something else, or no requirement.
    """
    content = read_yaml(path, "requirements")
    entries = content.get("requirements") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or set(content) != {"requirements"}:
        raise InputError(
            f"requirements '{path}': expected a list under 'requirements' and nothing else, found "
            f"{content!r:.80}"
        )
    requirements = []
    for number, entry in enumerate(entries, 1):
        where = f"requirements '{path}': number {number}"
        if not isinstance(entry, dict) or "measure" not in entry:
            raise InputError(f"{where}: expected a mapping with 'measure', found {entry!r:.80}")
        try:
            requirements.append(_requirement(entry))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return requirements


def _requirement(entry: Mapping[Any, Any]) -> Requirement:
    values: dict[str, Any] = {}
    for key, value in entry.items():
        if key not in _KEYS:
            raise UnknownNameError("key", str(key), _KEYS)
        if key in _LIMITS:
            expected, valid = "a number", _is_number(value)
        elif key == "anomaly_px":
            expected, valid = "[from, below] in pixels", _is_range(value)
            value = tuple(value) if valid else value
        elif key == "tag":
            value = [value] if isinstance(value, str) else value
            expected = "a text or a list of texts"
            valid = isinstance(value, list) and bool(value) and all(map(_is_text, value))
            value = tuple(value) if valid else value
        else:
            expected, valid = "a text", _is_text(value)
        if not valid:
            raise InputError(f"{key}: expected {expected}, found {value!r:.60}")
        values[key] = value
    return Requirement(**values)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_text(value: object) -> bool:
    # XML has no control characters.
    return isinstance(value, str) and bool(value) and value.isprintable()


def _is_range(value: object) -> bool:
    if not isinstance(value, list) or len(value) != 2:
        return False
    low, high = value
    whole = all(type(end) is int for end in value if end is not None)
    return whole and low is not None and low >= 0 and (high is None or low < high)


def read_results(path: Path | str) -> Results:
    """Return the results of a folder of `evaluate` or `replay`, or of their JSON file.

    Frames that are labelled to be ignored are left out. Of a replay, so are the frames up to
    `TAIL_S` after an event: an alarm may outlast its event.

    Raises:
        InputError: there are none, they are damaged, of another format or of no frames, or the
            index was built from some of the frames.
    """
    path = Path(path)
    names = _EVALUATED, _REPLAYED
    file = path
    if path.is_dir():
        file = next((path / name for name in names if (path / name).is_file()), path)
    if not file.is_file():
        raise InputError(f"results '{path}': expected {' or '.join(names)} in it, found none")
    content = read_json(file, "results")
    try:
        if content["threshold"] is not None:
            _number(content["threshold"])
        if "against_events" in content:
            outcomes = _of_replay(content, file)
        else:
            outcomes = _of_evaluation(content)
        results = Results(
            (file,),
            _text(content["index"]["fingerprint"]),
            None if content["calibration_sha256"] is None else _text(content["calibration_sha256"]),
            content["threshold"],
            _text(content["versions"]["semantic_anomaly"]),
            tuple(outcomes),
            tuple(map(str, content.get("warnings", []))),
        )
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        absent = f"none under {error}" if isinstance(error, KeyError) else f"{error}"
        raise InputError(
            f"results '{file}': expected what evaluate or replay writes, found {absent:.120}; "
            "evaluate again if an earlier version wrote them"
        ) from error
    if not any(outcome.unit == "frame" for outcome in outcomes):
        raise InputError(f"results '{file}': expected frames of at least one drive, found none")
    return results


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError(f"{value!r:.60} in place of a text")
    return value


def _flag(value: Any, *, absent: bool = False) -> bool | None:
    if not isinstance(value, bool) and not (absent and value is None):
        raise ValueError(f"{value!r:.60} in place of true or false")
    return value


def _number(value: Any) -> float:
    if not _is_number(value):
        raise ValueError(f"{value!r:.60} in place of a number")
    return float(value)


def _of_evaluation(content: Mapping[str, Any]) -> list[Outcome]:
    if content["frames_seen"]:
        raise InputError(
            f"results of '{content['dataset']}': expected frames that the index was not built "
            f"from, found {content['frames_seen']} that it was"
        )
    outcomes, threshold = [], content["threshold"]
    for row in content["frames"]:
        # Unknown: as in the measures of the evaluation; its warning is shown.
        if row["score"] is None:
            continue
        score, alarm = _number(row["score"]), row["decision"] == Decision.ANOMALY.value
        values = {
            "score": score,
            "above": None if threshold is None else score > threshold,
            "alarm": None if threshold is None else alarm,
            "localized": _flag(row["localized"], absent=True),
        }
        if _flag(row["ignored"]):
            continue
        labels = {n: row[n] and _text(row[n]) for n in ("kind", "family")}
        outcomes.append(
            Outcome(
                "frame",
                _drive(_text(content["dataset"]), _text(row["sequence"])),
                _text(row["name"]),
                _text(row["sha256"]),
                bool(_flag(row["anomaly"])),
                tags=tuple(map(_text, row["tags"])),
                anomaly_px=None if row["anomaly_px"] is None else int(_number(row["anomaly_px"])),
                values=values,
                **labels,
            )
        )
    return outcomes


def _drive(dataset: str, sequence: str) -> str:
    return sequence if sequence == dataset else f"{dataset}/{sequence}"


def _of_replay(content: Mapping[str, Any], file: Path) -> list[Outcome]:
    drive, digest = _text(content["source"]), _text(content["data_sha256"])
    against, threshold = content["against_events"], content["threshold"]
    if against is None:
        raise InputError(
            f"results '{file}': expected a calibrated replay with --labels, found none; a file "
            "with 'events: []' says that a drive is nominal"
        )
    events = [
        (_number(e["start_s"]), _number(e["end_s"]), e["kind"] or None, e["delay_s"] is not None)
        for e in against["events"]
    ]
    outcomes = [
        Outcome("event", drive, f"{start_s:g} s", digest, True, kind, values={"found": found})
        for start_s, _, kind, found in events
    ]
    values = {key: _number(against[key]) for key in ("false_alarms", "nominal_s")}
    outcomes.append(Outcome("drive", drive, drive, digest, False, values=values))
    table = file.with_name("scores.csv")
    try:
        with table.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
    except (OSError, csv.Error) as error:
        raise InputError(f"results '{table}' cannot be read: {error}") from error
    if len(rows) != content["frames"]:
        raise ValueError(f"{len(rows)} rows in scores.csv for {content['frames']} frames")
    begin_ns = int(rows[0]["stamp_ns"]) if rows else 0
    for row in rows:
        now_s = (int(row["stamp_ns"]) - begin_ns) / 1e9
        kinds = [kind for start_s, end_s, kind, _ in events if start_s <= now_s <= end_s]
        if not kinds and any(0 < now_s - end_s <= TAIL_S for _, end_s, _, _ in events):
            continue
        if not row["score"]:
            continue
        score = _number(float(row["score"]))
        outcomes.append(
            Outcome(
                *("frame", drive, row["stamp_ns"], digest, bool(kinds)),
                kind=kinds[0] if kinds else None,
                values={
                    "score": score,
                    "above": score > threshold,
                    "alarm": row["decision"] == Decision.ANOMALY.value,
                    "localized": None,
                },
            )
        )
    return outcomes


def _pool(parts: Sequence[Results]) -> Results:
    """Return results together; refuse several indexes or versions, and repeated frames."""
    first = parts[0]
    for part in parts[1:]:
        for name in ("index", "calibration", "threshold", "version"):
            expected, found = getattr(first, name), getattr(part, name)
            if expected != found:
                raise InputError(
                    f"results '{part.paths[0]}': expected the {name} of '{first.paths[0]}', "
                    f"{_short(expected)}, found {_short(found)}"
                )
    outcomes = [outcome for part in parts for outcome in part.outcomes]
    counts = Counter(_key(outcome) for outcome in outcomes)
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise InputError(f"results: expected every frame once, found twice {_listed(repeated)}")
    warnings = dict.fromkeys(warning for part in parts for warning in part.warnings)
    frames = [outcome for outcome in outcomes if outcome.unit == "frame"]
    if alone := sum(outcome.drive.endswith(f"/{outcome.name}") for outcome in frames):
        text = f"{alone} frames have no drive in their labels: each counts as a drive of its own"
        warnings[text] = None
    paths = tuple(path for part in parts for path in part.paths)
    return replace(first, paths=paths, outcomes=tuple(outcomes), warnings=tuple(warnings))


def _short(value: object) -> str:
    return f"{value[:12]}..." if isinstance(value, str) else f"{value}"


def _key(outcome: Outcome) -> tuple[str, ...]:
    return outcome.unit, outcome.drive, outcome.name, outcome.sha256


def _listed(keys: Sequence[tuple[str, ...]]) -> str:
    more = f" and {len(keys) - _LISTED} more" if len(keys) > _LISTED else ""
    return ", ".join(f"{k[0]} '{k[2]}' of drive '{k[1]}'" for k in keys[:_LISTED]) + more


def _paired(current: Results, baseline: Results) -> tuple[Outcome, ...]:
    """Return the outcomes of the baseline in the order of the current ones."""
    earlier = {_key(outcome): outcome for outcome in baseline.outcomes}
    keys = {_key(outcome): outcome for outcome in current.outcomes}
    for lacking, of, other in (
        ([key for key in keys if key not in earlier], "--against", "the results"),
        ([key for key in earlier if key not in keys], "results", "the baseline"),
    ):
        if lacking:
            raise InputError(
                f"{of}: expected the frames of {other}, with the same content; found no "
                f"{_listed(lacking)}"
            )
    if changed := [key for key, outcome in keys.items() if outcome != earlier[key]]:
        raise InputError(
            f"--against: expected frames with the same labels, found others of {_listed(changed)}"
        )
    return tuple(earlier[key] for key in keys)


def _groups(outcomes: Iterable[Outcome], name: str) -> list[str]:
    """Return all tags, kinds, families or drives, sorted."""
    if name == "tag":
        return sorted({tag for outcome in outcomes for tag in outcome.tags})
    return sorted({value for o in outcomes if (value := getattr(o, name)) is not None})


def _expand(requirement: Requirement, outcomes: Sequence[Outcome]) -> list[Requirement]:
    """Return one requirement for each group that it has outcomes of, or the requirement itself."""
    for name in _GROUPS:
        value = getattr(requirement, name)
        asked = value if name == "tag" else [value] if value is not None else []
        known = _groups(outcomes, name) if asked else []
        for text in asked:
            if text not in known:
                raise UnknownNameError(f"{name} of the results", text, known)
    if requirement.each is None:
        return [requirement]
    alone = replace(requirement, each=None)
    selected = alone.select(outcomes)
    if alone.measure == "frame_auroc" and requirement.each in ("kind", "family"):
        selected = [outcome for outcome in selected if outcome.anomaly]
    groups = _groups(selected, requirement.each)
    if not groups:
        unit = MEASURES[requirement.measure].unit
        raise InputError(
            f"{requirement.name}: each {requirement.each}: expected {unit}s with one, found none"
        )
    if requirement.each == "tag":
        return [replace(alone, tag=(*requirement.tag, group)) for group in groups]
    return [replace(alone, **{requirement.each: group}) for group in groups]  # type: ignore[arg-type]


def _measure_of(name: str, outcomes: Sequence[Outcome]) -> float | None:
    """Return a measure of outcomes, None when it is not defined."""
    if name == "frame_auroc":
        scores = np.array([outcome.values["score"] for outcome in outcomes], np.float64)
        return frame_auroc(scores, np.array([outcome.anomaly for outcome in outcomes], bool))
    if name == "false_alarms_per_hour":
        hours = sum(outcome.values["nominal_s"] for outcome in outcomes) / 3600
        alarms = sum(outcome.values["false_alarms"] for outcome in outcomes)
        return float(alarms / hours) if hours else None
    values = [outcome.values[MEASURES[name].value] for outcome in outcomes]
    return share([value for value in values if value is not None])


def _interval_of(
    name: str, outcomes: Sequence[Outcome], value: float
) -> tuple[float, float] | None:
    drives = [outcome.drive for outcome in outcomes]
    if name == "frame_auroc":
        scores = np.array([outcome.values["score"] for outcome in outcomes], np.float64)
        return auroc_interval(scores, np.array([o.anomaly for o in outcomes], bool), drives)
    return None if name == "false_alarms_per_hour" else rate_interval(value, len(set(drives)))


def _verdict(
    requirement: Requirement, outcomes: Sequence[Outcome], earlier: Sequence[Outcome]
) -> Verdict:
    measure, name = MEASURES[requirement.measure], requirement.measure
    selected = requirement.select(outcomes)
    value = _measure_of(name, selected)
    if value is None:
        raise InputError(f"{requirement.name}: {_reason(requirement, selected)}")
    if measure.value:
        used = [outcome for outcome in selected if outcome.values[measure.value] is not None]
    else:
        used = selected
    drives = len({outcome.drive for outcome in used})
    remark = ""
    if requirement.paired:
        before = requirement.select(earlier)
        value, interval, remark = _difference(requirement, selected, before, value)
        lower_is_better, limit = measure.limit == "at_most", requirement.limit
        limit = limit if lower_is_better else -limit
    else:
        interval = _interval_of(name, used, value)
        lower_is_better, limit = measure.limit == "at_most", requirement.limit
    judged = value
    if requirement.by == _INTERVAL:
        if interval is None:
            raise InputError(
                f"{requirement.name}: an interval needs at least 2 drives, found {drives}; "
                f"'by: {_ESTIMATE}' does without"
            )
        judged = interval[1] if lower_is_better else interval[0]
    met = judged <= limit if lower_is_better else judged >= limit
    kept = value <= limit if lower_is_better else value >= limit
    if not met and kept:
        remark = "; ".join(filter(None, [remark, "the estimate keeps the limit, its bound not"]))
        if not requirement.paired and measure.value:
            remark += _drives_needed(requirement, drives, lower_is_better)
    return Verdict(requirement, value, interval, len(used), drives, met, remark)


def _difference(
    requirement: Requirement, after: Sequence[Outcome], before: Sequence[Outcome], value: float
) -> tuple[float, tuple[float, float] | None, str]:
    """Return new minus old, its interval, and both values in words."""
    name = requirement.measure
    old = _measure_of(name, before)
    if old is None:
        raise InputError(f"{requirement.name}: of the baseline: {_reason(requirement, before)}")

    def difference(rows: np.ndarray) -> float | None:
        new = _measure_of(name, [after[row] for row in rows])
        past = _measure_of(name, [before[row] for row in rows])
        return None if new is None or past is None else new - past

    interval = bootstrap_interval(difference, [outcome.drive for outcome in after])
    return value - old, interval, f"{value:.3f}, of the baseline {old:.3f}"


def _reason(requirement: Requirement, selected: Sequence[Outcome]) -> str:
    """Return why a measure is not defined."""
    measure = MEASURES[requirement.measure]
    unit = f"{measure.unit}s"
    if measure.unit != "frame" and not selected:
        return f"expected {unit} of a replay with --labels, found none"
    if not selected:
        truth = {True: "anomalous ", False: "nominal ", None: ""}[measure.anomaly]
        return f"expected {truth}{unit}, found none"
    if requirement.measure == "frame_auroc":
        return "expected anomalous and nominal frames, found one of the two only"
    if measure.value == "localized":
        return "expected alarms in frames with a masked anomaly, found none"
    if measure.unit == "drive":
        return "expected nominal time, found none"
    return "expected a threshold, found none: the index is not calibrated"


def _drives_needed(requirement: Requirement, drives: int, lower_is_better: bool) -> str:
    """Return how many drives could keep the limit at best, when these are too few for it."""
    best = 0.0 if lower_is_better else 1.0

    def kept(count: int) -> bool:
        low, high = rate_interval(best, count) or (0.0, 1.0)
        return high <= requirement.limit if lower_is_better else low >= requirement.limit

    if kept(drives):
        return ""
    needed = bisect_left(range(_MOST_DRIVES), True, lo=drives, key=kept)
    if needed == _MOST_DRIVES:
        return "; no number of drives can show it"
    return f"; {drives} drives are too few for it, at least {needed} are needed"
