"""The commands and examples of the README, as written, in a folder of their own."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from semantic_anomaly.cli import main
from semantic_anomaly.settings import BUILD_DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str, language: str = "bash") -> str:
    """Return the code block between the markers of a name."""
    pattern = rf"<!-- {name}:begin -->\s*```{language}\n(.*?)```\s*<!-- {name}:end -->"
    match = re.search(pattern, README, re.S)
    assert match is not None, f"README.md has no block '{name}'"
    return match.group(1)


def commands(name: str) -> list[list[str]]:
    """Return the commands of a block, split as a shell does."""
    lines = [line for line in block(name).splitlines() if line.strip()]
    assert lines
    return [shlex.split(line) for line in lines]


def run(name: str) -> None:
    for command in commands(name):
        if command[0] != "anomaly_node":
            assert command[0] == "semantic-anomaly"
            assert main(command[1:]) == 0, " ".join(command)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the quick start has run."""
    path = tmp_path_factory.mktemp("readme")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        run("quick-start")
    return path


def results_in(folder: Path, name: str) -> dict[str, object]:
    results: dict[str, object] = json.loads((folder / f"work/{name}/results.json").read_text())
    return results


@pytest.mark.slow
def test_quick_start_evaluates(folder: Path) -> None:
    results = results_in(folder, "report")
    assert len(results["frames"]) == 40  # type: ignore[arg-type]
    # The quality of the shipped backbone is measured elsewhere.
    assert results["frame_auroc"] is not None and results["tpr"] is not None
    assert set(results["by_kind"]) == {"cow", "stop_sign_on_billboard"}  # type: ignore[call-overload]
    assert results["target_false_alarm_rate"] == 0.05


@pytest.mark.slow
def test_node_of_the_quick_start_is_configured_and_scores(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rclpy")
    import rclpy
    from rclpy.lifecycle import TransitionCallbackReturn

    from semantic_anomaly.io.open import open_source
    from semantic_anomaly.ros.node import AnomalyNode

    [command] = [c for c in commands("quick-start") if c[0] == "anomaly_node"]
    arguments = [str(ROOT / a) if a.startswith("config/") else a for a in command[1:]]
    monkeypatch.chdir(folder)
    rclpy.init()
    node = AnomalyNode(cli_args=arguments)
    try:
        assert node.trigger_configure() == TransitionCallbackReturn.SUCCESS
        assert node.models is not None
        detector = node.models.detectors["camera"]
        assert detector.settings.target_false_alarm_rate == 0.05
        scores = {row["name"]: row["score"] for row in results_in(folder, "report")["frames"]}  # type: ignore[attr-defined]
        for frame in list(open_source("work/test[8:14:3]")):
            assert detector.detect(frame).score == pytest.approx(
                scores[frame.name.rpartition("/")[2]], rel=1e-6
            )
    finally:
        node.close()
        node.destroy_node()
        rclpy.try_shutdown()


@pytest.mark.slow
def test_api_example_runs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    source = block("api", "python")
    assert len(source.splitlines()) <= 14
    exec(compile(source, "README.md", "exec"), {})
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("test/")]
    assert len(lines) == 7
    assert (folder / "work/overlay.png").is_file()


@pytest.mark.slow
def test_evaluation_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    before = results_in(folder, "report")
    [events] = re.findall(r"`(events: \[\{.*?\}\])`", README)
    (folder / "events.yaml").write_text(events)
    run("evaluation")
    again, scored, one = (results_in(folder, name) for name in ("report", "scored", "one"))
    for measure in ("frame_auroc", "tpr", "fpr", "pixel_ap"):
        assert again[measure] == before[measure]
    assert scored["pixel_ap"] == again["pixel_ap"] and one["protocol"] == "one-reference"
    assert again["component_limits"] == {"predicted_px": 50, "truth_px": 10}
    replayed = json.loads((folder / "work/replayed/summary.json").read_text())
    assert [event["kind"] for event in replayed["against_events"]["events"]] == ["cow"]


@pytest.mark.slow
def test_instance_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run("instances")
    combined = results_in(folder, "combined_report")
    *grids, instances = combined["settings"]["stages"]  # type: ignore[index]
    assert tuple(grids) == BUILD_DEFAULTS["stages"] and "kind=instances" in instances
    assert combined["frame_auroc"] is not None


@pytest.mark.slow
def test_correction_commands_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    run("cure")
    assert (folder / "work/why.jpg").is_file()


def test_readme_links_only_to_files_that_exist() -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)[^)]*\)", README):
        assert (ROOT / target).exists(), target
