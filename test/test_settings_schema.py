"""Rows of the settings tables, and parameter files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

from semantic_anomaly.errors import SettingsError
from semantic_anomaly.settings_schema import (
    check_fields,
    read_parameters_yaml,
    refuse_fixed,
    resolve_paths,
    setting,
    specs_of,
)


@dataclass(frozen=True)
class Table:
    """A small settings table."""

    index: str = setting("", "Index folder.", path=True)
    backbone: str = setting("", "Name or folder.")
    topic: str = setting("/image", "Topic.", choices=("/image", "~/image"))
    count: int = setting(1, "Number.", bounds=(1, 9), live=True)
    shares: tuple[float, ...] = setting((), "Shares.", bounds=(0.0, None))
    limit: float | None = setting(None, "Limit.", bounds=(None, 5.0))
    size: int | None = setting(None, "Size.")
    stages: tuple[str, ...] = setting((), "Names or folders.")
    derived: int = 0

    def __post_init__(self) -> None:
        check_fields(self)


SPECS = specs_of(Table)


def written(folder: Path, text: str) -> Path:
    path = folder / "settings.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_rows_are_read_from_the_fields_of_a_dataclass() -> None:
    assert [*SPECS][:5] == ["index", "backbone", "topic", "count", "shares"]
    assert [*SPECS][5:] == ["limit", "size", "stages"]
    assert [name for name, spec in SPECS.items() if spec.path] == ["index"]
    assert [name for name, spec in SPECS.items() if spec.live] == ["count"]
    shares = SPECS["shares"]
    assert (shares.is_list, shares.element, shares.minimum, shares.maximum) == (
        *(True, float),
        *(0.0, None),
    )


def test_values_are_converted_to_the_types_of_their_rows() -> None:
    table = Table(shares=[1, 0.5])  # type: ignore[arg-type]
    assert table.shares == (1.0, 0.5) and type(table.shares[0]) is float
    with pytest.raises(SettingsError, match="setting 'count': expected at most 9, found 10"):
        Table(count=10)
    with pytest.raises(SettingsError, match=r"setting 'front\.count': expected at least 1"):
        SPECS["count"].check(0, "front.count")


def test_a_setting_without_default_may_be_unset() -> None:
    assert (SPECS["limit"].element, SPECS["size"].element) == (float, int)
    assert (Table().limit, Table(limit=-3).limit, Table(limit=0).limit) == (None, -3.0, 0.0)
    assert type(Table(limit=1).limit) is float
    with pytest.raises(SettingsError, match=r"setting 'limit': expected at most 5\.0"):
        Table(limit=6)
    with pytest.raises(SettingsError, match="expected a finite number, found nan"):
        Table(limit=float("nan"))
    with pytest.raises(SettingsError, match="'count': expected int, found None"):
        SPECS["count"].check(None)


def test_only_live_settings_may_change() -> None:
    refuse_fixed({"front.count": 1, "index": "a"}, {"front.count": 2, "index": "a"}, SPECS)
    with pytest.raises(SettingsError, match=r"'front\.index' cannot change.*'a', found 'b'"):
        refuse_fixed({"front.index": "a"}, {"front.index": "b"}, SPECS)


def test_parameter_files_and_plain_mappings_become_flat(tmp_path: Path) -> None:
    node = "/**:\n  ros__parameters: {use_sim_time: true, count: 3, front: {index: a}}\n"
    expected = {"count": 3, "front.index": "a"}
    assert read_parameters_yaml(written(tmp_path, node)) == expected
    assert read_parameters_yaml(written(tmp_path, "count: 3\nfront.index: a\n")) == expected
    for text in ("", "# nothing\n", "/**:\n  ros__parameters:\n"):
        assert read_parameters_yaml(written(tmp_path, text)) == {}


SECTION = "{ros__parameters: {count: %d}}"


@pytest.mark.parametrize(
    ("text", "node", "expected"),
    [
        # A namespace in one key, nested, or both.
        (f"/front/semantic_anomaly: {SECTION % 3}", "", 3),
        (f"front: {{semantic_anomaly: {SECTION % 3}}}", "", 3),
        (f"a: {{b/c: {{semantic_anomaly: {SECTION % 3}}}}}", "/a/b/c/semantic_anomaly", 3),
        # The file of a whole robot.
        (f"driver: {SECTION % 1}\nsemantic_anomaly: {SECTION % 3}\nnav: {SECTION % 2}", "", 3),
        # A node with another name.
        (f"watcher: {SECTION % 3}", "", 3),
        (f"a: {SECTION % 1}\nb: {SECTION % 3}", "b", 3),
        # Wildcards; later values win.
        (f"/**: {SECTION % 1}\nsemantic_anomaly: {SECTION % 3}", "", 3),
        (f"semantic_anomaly: {SECTION % 1}\n/**: {SECTION % 3}", "", 3),
        (f"/*/semantic_anomaly: {SECTION % 3}\n/**: {SECTION % 1}", "/a/b/semantic_anomaly", 1),
        (f"/**: {SECTION % 1}\n/*/semantic_anomaly: {SECTION % 3}", "/a/semantic_anomaly", 3),
        (f"/**/semantic_anomaly: {SECTION % 3}", "", 3),
        (f"/**: {SECTION % 3}\ndriver: {SECTION % 1}", "semantic_anomaly", 3),
        (f"/**: {SECTION % 3}\ndriver: {SECTION % 1}", "", 3),
    ],
)
def test_sections_are_chosen_as_by_rcl(tmp_path: Path, text: str, node: str, expected: int) -> None:
    assert read_parameters_yaml(written(tmp_path, text), node) == {"count": expected}


def test_a_node_without_a_section_is_named(tmp_path: Path) -> None:
    path = written(tmp_path, f"driver: {SECTION % 1}")
    with pytest.raises(SettingsError, match=r"of the node '/rear', found those of /driver"):
        read_parameters_yaml(path, "rear")


def test_parameters_of_ros_itself_are_left_out(tmp_path: Path) -> None:
    qos = "qos_overrides: {/camera/image_raw: {subscription: {reliability: reliable}}}"
    text = f"/**: {{ros__parameters: {{count: 3, use_sim_time: true, {qos}}}}}"
    assert read_parameters_yaml(written(tmp_path, text)) == {"count": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: 2001-13-45", "not YAML"),
        ("count: !!int ''", "not YAML"),
        ("count: !!python/object/apply:os.system ['true']", "not YAML"),
        ("count: [1", "not YAML"),
        ("? [count]\n: 1", "not YAML"),
        ("shares: " + "[" * 600 + "]" * 600, "not YAML"),
        ("count: \x01", "not YAML"),
        ("- count", "expected a mapping"),
        ("/**:\n  ros__parameters: [1]", "to be a mapping"),
        ("count: 1\ncount: 2", "'count' is given twice"),
        ("front: {index: a}\nfront.index: b", "'front.index' is given twice"),
        ("a:\n  ros__parameters: {}\nb:\n  ros__parameters: {}", "found 2: /a, /b; .* --node"),
        (
            "f: {semantic_anomaly: {ros__parameters: {}}}\n"
            "r/semantic_anomaly: {ros__parameters: {}}",
            "one node, found 2: /f/semantic_anomaly, /r/semantic_anomaly",
        ),
        ("x: &x\n  y: *x", "nest too deep"),
        ("x: &x {count: 1}\n/**: {ros__parameters: {<<: *x}}", "expected no merge key"),
    ],
)
def test_invalid_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_parameters_yaml(written(tmp_path, text))


def test_yaml_that_expands_without_bound_is_refused_in_a_short_message(tmp_path: Path) -> None:
    lists = ["a0: &a0 [1]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)
    ]
    values = read_parameters_yaml(written(tmp_path, "\n".join(lists) + "\nshares: *a29\n"))
    with pytest.raises(SettingsError, match="expected float") as caught:
        SPECS["shares"].check(values["shares"])
    assert len(str(caught.value)) < 2000
    maps = ["a0: &a0 {z: 1}"]
    for i in range(1, 8):
        inner = ", ".join(f"k{j}: *a{i - 1}" for j in range(9))
        maps.append(f"a{i}: &a{i} {{{inner}}}")
    with pytest.raises(SettingsError, match="repeat themselves") as caught:
        read_parameters_yaml(written(tmp_path, "\n".join(maps)))
    assert len(str(caught.value)) < 2000


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"missing.yaml.*No such file"):
        read_parameters_yaml(tmp_path / "missing.yaml")
    with pytest.raises(SettingsError, match="directory"):
        read_parameters_yaml(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01\x80")
    with pytest.raises(SettingsError, match="not YAML"):
        read_parameters_yaml(tmp_path / "binary.yaml")


def test_paths_are_resolved_against_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/driver")
    values = {
        **{"index": "index", "front.index": "../index", "rear.index": "/index", "left.index": ""},
        **{"right.index": "~/index", "back.index": 7, "unknown": "./a", "count": 3},
        **{"backbone": "dinov2_small", "front.backbone": "./models/a", "rear.backbone": "../b"},
        **{"left.backbone": "org/name", "topic": "~/image"},
        **{"stages": ["./models/a layer=3", "org/name"], "front.stages": "./a"},
    }
    folder = tmp_path / "config"
    changed = {
        **{"index": str(folder / "index"), "front.index": str(tmp_path / "index")},
        **{"right.index": "/home/driver/index"},
        **{"stages": [str(folder / "models" / "a layer=3"), "org/name"]},
        **{"front.stages": str(folder / "a")},
        **{"front.backbone": str(folder / "models" / "a"), "rear.backbone": str(tmp_path / "b")},
    }
    assert resolve_paths(values, SPECS, folder) == {**values, **changed}
    monkeypatch.chdir(tmp_path)
    assert resolve_paths(values, SPECS, Path("config")) == {**values, **changed}
    with pytest.raises(SettingsError, match=r"'front\.index': '~nobody-here/index': .*home"):
        resolve_paths({"front.index": "~nobody-here/index"}, SPECS, folder)


@pytest.mark.parametrize("text", ["0x" + "f" * 20_000, ":".join(["59"] * 5000), "1" + "0" * 400])
def test_integers_of_any_length_are_refused_in_a_short_message(tmp_path: Path, text: str) -> None:
    values = read_parameters_yaml(written(tmp_path, f"count: {text}"))
    with pytest.raises(SettingsError, match="at most") as caught:
        SPECS["count"].check(values["count"])
    assert len(str(caught.value)) < 200
