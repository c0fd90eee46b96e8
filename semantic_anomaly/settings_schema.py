"""Rows of the settings tables: declaration, checks, and reading of parameter files."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from reprlib import Repr
from typing import Any

from semantic_anomaly.errors import SettingsError
from semantic_anomaly.storage import parse_yaml, read_file, yaml_keys


class _Short(Repr):
    """Cuts what would fill pages: nested lists of YAML aliases, and integers of any length."""

    def repr_int(self, x: int, level: int) -> str:
        # Python refuses to write out longer ones.
        if x.bit_length() > 1000:
            return f"an integer of {x.bit_length()} bits"
        return super().repr_int(x, level)


_REPR = _Short()
_REPR.maxlevel = 2
short = _REPR.repr
DEFAULT_NODE = "semantic_anomaly"
# Parameters that ROS itself declares or reads.
FOREIGN = ("use_sim_time", "start_type_description_service")
FOREIGN_PREFIXES = ("qos_overrides.",)
_MAX_NAMESPACES, _MAX_SECTIONS = 8, 1000


def setting(
    default: Any,
    description: str,
    *,
    bounds: tuple[float | None, float | None] = (None, None),
    choices: tuple[str, ...] = (),
    live: bool = False,
    path: bool = False,
) -> Any:
    """Return the dataclass field of one setting; for the arguments see `SettingSpec`."""
    metadata: dict[str, Any] = {"description": description, "choices": choices}
    metadata |= {"minimum": bounds[0], "maximum": bounds[1], "live": live, "path": path}
    return dataclasses.field(default=default, metadata=metadata)


@dataclass(frozen=True)
class SettingSpec:
    """One row of a settings table.

    Attributes:
        name: as in YAML, without the prefix of a camera.
        default: its type (bool, int, float, str or tuple) is the type of the setting; None: unset.
        element: type of the elements if the default is a tuple, otherwise the type of the setting.
        description: for the parameter file, the node and the README.
        minimum, maximum: inclusive bounds of numbers, None if unbounded.
        choices: allowed strings, empty if any is allowed.
        live: may change while the node runs.
        path: is always a file or folder, never a name or hub id.
    """

    name: str
    default: Any
    element: type
    description: str
    minimum: float | None
    maximum: float | None
    choices: tuple[str, ...]
    live: bool
    path: bool

    @property
    def is_list(self) -> bool:
        """Return whether the setting is a list."""
        return isinstance(self.default, tuple)

    def check(self, value: Any, name: str = "") -> Any:
        """Return the value converted to the type of the setting: lists to tuples, int to float.

        Args:
            value: from YAML, a ROS parameter or a caller.
            name: name for errors, with the prefix of a camera; empty: that of the row.

        Raises:
            SettingsError: wrong type, out of bounds, or not one of the choices.
        """
        name = name or self.name
        if value is None and self.default is None:
            return None
        if not self.is_list:
            return self._check_one(value, name)
        if not isinstance(value, (list, tuple, array)):
            raise SettingsError(f"setting '{name}': expected a list, found {short(value)}")
        return tuple(self._check_one(item, name) for item in value)

    def _check_one(self, value: Any, name: str) -> Any:
        if self.element is float and type(value) is int:
            value = float(value) if abs(value) < 1 << 53 else math.inf
        value_type: type = type(value)
        if value_type is not self.element:
            expected = f"{self.element.__name__}, found {short(value)} ({value_type.__name__})"
        elif self.element is float and not math.isfinite(value):
            expected = f"a finite number, found {value}"
        elif self.minimum is not None and value < self.minimum:
            expected = f"at least {self.minimum}, found {short(value)}"
        elif self.maximum is not None and value > self.maximum:
            expected = f"at most {self.maximum}, found {short(value)}"
        elif self.choices and value not in self.choices:
            expected = f"one of {', '.join(self.choices)}, found {short(value)}"
        else:
            return value
        raise SettingsError(f"setting '{name}': expected {expected}")


def refuse_fixed(
    before: Mapping[str, Any], after: Mapping[str, Any], specs: Mapping[str, SettingSpec]
) -> None:
    """Refuse changes of settings that are not live.

    Args:
        before, after: flat parameters.
        specs: rows by name, without the prefix of a camera.

    Raises:
        SettingsError: naming the first setting that is not live and differs.
    """
    for name in sorted(before.keys() | after.keys()):
        old, new = before.get(name), after.get(name)
        if old != new and not specs[name.rpartition(".")[2]].live:
            raise SettingsError(
                f"setting '{name}' cannot change while running: expected {short(old)}, "
                f"found {short(new)}"
            )


def read_parameters_yaml(path: Path, node: str = "") -> dict[str, Any]:
    """Return the flat parameters ('front.index') of a ROS parameter file or a plain YAML mapping.

    Sections are chosen as by rcl: node names may have namespaces, in one key or nested, and the
    wildcards `*` and `**`; of several sections that match, later values win. `qos_overrides` and
    `use_sim_time` are left out: they are not settings. Paths are returned as written; see
    `resolve_paths`.

    Args:
        path: the file.
        node: name of the node with its namespace; empty: the node `semantic_anomaly` in any
            namespace, or else the only node of the file.

    Raises:
        SettingsError: unreadable, not YAML, not a mapping, a name given twice, no section of the
            node, or several nodes that may be meant.
    """
    try:
        content = read_file(path)
    except OSError as error:
        raise SettingsError(f"settings file '{path}': {error.strerror}") from error
    try:
        document = parse_yaml(content, partial(_refuse_duplicates, path=path))
    except ValueError as error:
        raise SettingsError(f"settings file '{path}' is not YAML: {error}") from error
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise SettingsError(f"settings file '{path}': expected a mapping, found {short(document)}")
    sections = _sections(document, "")
    chosen = _sections_of(sections, node, path) if sections else [("", document)]
    merged: dict[str, Any] = {}
    for _, parameters in chosen:
        if not isinstance(parameters or {}, dict):
            raise SettingsError(
                f"settings file '{path}': expected ros__parameters to be a mapping, "
                f"found {short(parameters)}"
            )
        flat: dict[str, Any] = {}
        _flatten(parameters or {}, "", flat)
        merged |= flat
    # Parameters of every ROS node, not of the detector.
    return {
        name: value
        for name, value in merged.items()
        if name not in FOREIGN and not name.startswith(FOREIGN_PREFIXES)
    }


def _sections(tree: Mapping[Any, Any], prefix: str, depth: int = 0) -> list[tuple[str, Any]]:
    """Return name and parameters of every node in a parameter file, '/front/semantic_anomaly'."""
    found = []
    for key, value in tree.items():
        if not isinstance(value, dict) or depth > _MAX_NAMESPACES:
            continue
        name = f"{prefix}/{str(key).strip('/')}"
        if "ros__parameters" in value:
            found.append((name, value["ros__parameters"]))
        else:
            found += _sections(value, name, depth + 1)
        if len(found) > _MAX_SECTIONS:
            raise SettingsError(f"settings nest too deep or repeat themselves at {short(name)}")
    return found


def _sections_of(
    sections: Sequence[tuple[str, Any]], node: str, path: Path
) -> list[tuple[str, Any]]:
    """Return the sections of a node; for the arguments see `read_parameters_yaml`."""
    exact = sorted({name for name, _ in sections if "*" not in name})
    if not node:
        own = [name for name in exact if name.rpartition("/")[2] == DEFAULT_NODE]
        for_all = any(_matches(name, f"/{DEFAULT_NODE}") for name, _ in sections)
        candidates = own or ([] if for_all else exact)
        if len(candidates) > 1:
            raise SettingsError(
                f"settings file '{path}': expected one node, found {len(candidates)}: "
                f"{', '.join(candidates[:8])}; choose one with --node"
            )
        node = candidates[0] if candidates else DEFAULT_NODE
    node = "/" + node.strip("/")
    matching = [section for section in sections if _matches(section[0], node)]
    if not matching:
        raise SettingsError(
            f"settings file '{path}': expected parameters of the node '{node}', found those of "
            f"{', '.join(sorted({name for name, _ in sections})[:8])}"
        )
    return matching


def _matches(pattern: str, node: str) -> bool:
    # In rcl, * stands for one part of a name and ** for any number of parts.
    parts = [re.escape(part) for part in pattern.strip("/").split("/")]
    texts = {r"\*": "/[^/]+", r"\*\*": "(?:/[^/]+)*"}
    return bool(re.fullmatch("".join(texts.get(part, f"/{part}") for part in parts), node))


def resolve_paths(
    values: Mapping[str, Any], specs: Mapping[str, SettingSpec], folder: Path
) -> dict[str, Any]:
    """Return parameters in which relative paths are resolved against a folder.

    Paths are the values of rows marked `path`, where '~' is expanded, and other texts that begin
    with './' or '../', such as a backbone folder. Empty and absolute paths stay as they are.

    Args:
        values: flat parameters, as from `read_parameters_yaml`.
        specs: rows of all settings by name, without the prefix of a camera.
        folder: that of the parameter file.

    Raises:
        SettingsError: '~' cannot be expanded.
    """
    resolved = dict(values)
    for name, value in values.items():
        spec = specs.get(name.rpartition(".")[2])
        if spec is None:
            continue

        def absolute(text: Any, name: str = name, is_path: bool = spec.path) -> Any:
            if not isinstance(text, str) or not text:
                return text
            if not is_path and not text.startswith(("./", "../")):
                return text
            try:
                path = Path(text).expanduser() if is_path else Path(text)
            except RuntimeError as error:
                raise SettingsError(f"setting '{name}': '{text}': {error}") from error
            # Normalised, so that one folder has one name.
            return os.path.normpath(Path(folder).absolute() / path)

        several = isinstance(value, list | tuple)
        resolved[name] = [absolute(item) for item in value] if several else absolute(value)
    return resolved


def _refuse_duplicates(node: Any, path: Path) -> None:
    # YAML readers silently keep the last of two equal keys.
    for keys in yaml_keys(node):
        counts = Counter(key.value for key in keys if isinstance(key.value, str))
        for key, count in counts.most_common(1):
            if count > 1:
                raise SettingsError(f"settings file '{path}': {short(key)} is given twice")


def _flatten(tree: Mapping[str, Any], prefix: str, flat: dict[str, Any]) -> None:
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name.count(".") > 8 or len(flat) > 10000:
            raise SettingsError(f"settings nest too deep or repeat themselves at {short(name)}")
        if isinstance(value, Mapping):
            _flatten(value, f"{name}.", flat)
        elif name in flat:
            raise SettingsError(f"setting '{name}' is given twice")
        else:
            flat[name] = value


def specs_of(owner: type) -> dict[str, SettingSpec]:
    """Return the rows of a settings class by name."""
    specs = {}
    for row in dataclasses.fields(owner):
        if not row.metadata:
            continue
        element = type(row.default)
        if row.default is None or element is tuple:
            element = float if "float" in str(row.type) else int if "int" in str(row.type) else str
        specs[row.name] = SettingSpec(row.name, row.default, element, **row.metadata)
    return specs


def check_fields(settings: Any) -> None:
    """Check the values of a new settings object and convert them to the types of their rows.

    Raises:
        SettingsError: a value of the wrong type or out of bounds.
    """
    for name, spec in specs_of(type(settings)).items():
        object.__setattr__(settings, name, spec.check(getattr(settings, name)))
