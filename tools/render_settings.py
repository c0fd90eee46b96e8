#!/usr/bin/env python3
"""Render the settings table as the node's YAML and as the table of docs/settings.md.

Without an option both are printed. --write updates config/semantic_anomaly.yaml and the part of
docs/settings.md between the markers; --check fails if they are out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from semantic_anomaly.settings import Settings, camera_setting_specs, setting_specs  # noqa: E402
from semantic_anomaly.settings_schema import SettingSpec  # noqa: E402

CONFIG = ROOT / "config" / "semantic_anomaly.yaml"
PAGE = ROOT / "docs" / "settings.md"
BEGIN, END = "<!-- settings:begin -->", "<!-- settings:end -->"

_OVERRIDES = (
    "Settings that may change while running may also be set for one camera, e.g. threshold: 4.0"
)
_HEAD = """\
# Every parameter of the node with its default, written by tools/render_settings.py.
# Only 'index' must be set: settings that index and calibration fix are taken from there.
# The commands read the same file: semantic-anomaly build-index --settings semantic_anomaly.yaml ...
/**:
  ros__parameters:
"""


def value_text(value: object) -> str:
    """Return a default as YAML: strings quoted, lists in brackets; 'unset' for None."""
    return "unset" if value is None else json.dumps(value)


def parameter_line(name: str, spec: SettingSpec) -> str:
    """Return the line of one parameter; a comment if it is unset."""
    # ROS parameters have no null.
    comment = "# " if spec.default is None else ""
    return f"{comment}{name}: {value_text(spec.default)}"


def bounds_text(spec: SettingSpec) -> str:
    """Return the allowed values of a setting, empty if its type is the only condition."""
    if spec.choices:
        return ", ".join(filter(None, spec.choices))
    if spec.minimum is None or spec.maximum is None:
        return ""
    return f"{spec.minimum:.10g} to {spec.maximum:.10g}"


def comment_text(spec: SettingSpec) -> str:
    """Return the comment of one parameter: its description, then its bounds."""
    notes = [bounds_text(spec)] if bounds_text(spec) else []
    if spec.live:
        notes.append("may change while running")
    return spec.description + (f" [{'; '.join(notes)}]" if notes else "")


def render_yaml() -> str:
    """Return config/semantic_anomaly.yaml."""
    lines = []
    for name, spec in setting_specs().items():
        lines += [f"    # {comment_text(spec)}", f"    {parameter_line(name, spec)}"]
    for camera in Settings().cameras:
        lines += ["    # One section for each name in 'cameras'.", f"    {camera}:"]
        for name, spec in camera_setting_specs().items():
            lines += [f"      # {comment_text(spec)}", f"      {parameter_line(name, spec)}"]
        lines += [f"      # {_OVERRIDES}"]
    return _HEAD + "\n".join(lines) + "\n"


def render_markdown() -> str:
    """Return the table of docs/settings.md."""
    lines = ["| parameter | default | values | live | meaning |", "|---|---|---|---|---|"]
    rows = list(setting_specs().items())
    rows += [(f"<camera>.{name}", spec) for name, spec in camera_setting_specs().items()]
    for name, spec in rows:
        live = "yes" if spec.live else ""
        cells = (f"`{name}`", f"`{value_text(spec.default)}`", bounds_text(spec), live)
        lines.append(f"| {' | '.join((*cells, spec.description))} |")
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Return the text of docs/settings.md with its table replaced.

    Raises:
        ValueError: the markers are missing.
    """
    pattern = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.S)
    if not pattern.search(page):
        raise ValueError(f"docs/settings.md: expected the markers {BEGIN} and {END}")
    table = f"{BEGIN}\n{render_markdown()}{END}"
    return pattern.sub(lambda _: table, page)


def main(argv: list[str] | None = None) -> int:
    """Print, write or check; return 1 if --check finds a file out of date."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--write", action="store_true", help="update both files")
    mode.add_argument("--check", action="store_true", help="fail if they are out of date")
    args = parser.parse_args(argv)
    if not (args.write or args.check):
        print(render_yaml())
        print(render_markdown())
        return 0
    outdated = 0
    rendered = {CONFIG: render_yaml(), PAGE: with_table(PAGE.read_text(encoding="utf-8"))}
    for path, text in rendered.items():
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        outdated = 1
        if args.write:
            path.write_text(text, encoding="utf-8")
        print(f"{path.name}: {'updated' if args.write else 'out of date'}")
    return outdated if args.check else 0


if __name__ == "__main__":
    sys.exit(main())
