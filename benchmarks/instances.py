"""Measure stages of instances on top of the default stages, by the package's own evaluation.

Rows: the default stages; the same and one stage of instances; the instances alone. Sets: composites
over CamVid with a control (camvid.py) and CARLA composites (carla.py), each of a drive or town that
is in neither index nor calibration.

Needs a folder with camvid/, carla_frames/ and road_anomaly/.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import camvid
import carla
import numpy as np
from tqdm import tqdm

from semantic_anomaly import AnomalyDetector, Settings, build_index, calibrate, evaluate
from semantic_anomaly.embedding.identity import Embedder, StageIdentity
from semantic_anomaly.evaluation.measures import figure
from semantic_anomaly.segmentation.embedder import RunningEmbedder
from semantic_anomaly.structures import PatchGrid

TEST_DRIVE, INDEX_DRIVES, CALIBRATION_DRIVE = "0006R0", ("0016E5_train", "0001TP"), "0016E5_val"
RATE = 0.05


class StagesOf:
    """Some of the stages of an embedder; an image is embedded once for all rows.

    Args:
        embedder: of all stages.
        grids: remembered grids by image.
        numbers: of the stages, in order.
    """

    def __init__(
        self, embedder: Embedder, grids: dict[int, PatchGrid], numbers: Sequence[int]
    ) -> None:
        self._embedder, self._grids, self._numbers = embedder, grids, list(numbers)

    @property
    def stages(self) -> tuple[StageIdentity, ...]:
        """Return the stages of the row."""
        return tuple(self._embedder.stages[number] for number in self._numbers)

    @property
    def device(self) -> str:
        """Return the device of the backbones."""
        return self._embedder.device

    def grids_hw(self, image_hw: tuple[int, int]) -> list[tuple[int, int]]:
        """Return (rows, cols) of the patch grid of each stage."""
        grids_hw = self._embedder.grids_hw(image_hw)
        return [grids_hw[number] for number in self._numbers]

    def embed(self, images: Sequence[np.ndarray]) -> list[PatchGrid]:
        """Return the patch grids of images."""
        result = []
        for image in images:
            key = hash(image.tobytes())
            if key not in self._grids:
                [self._grids[key]] = self._embedder.embed([image])
            first, *further = (self._grids[key].stages[number] for number in self._numbers)
            result.append(replace(first, further=tuple(further)))
        return result


def sources(name: str, data: Path, out: Path) -> tuple[list[str], list[str], str]:
    """Return the sources of index, calibration and test of a set."""
    test = out / name
    if name == "camvid":
        camvid.write_composites(data, test, [TEST_DRIVE], 1, 200, 8)
        folders = [_every(data / "camvid" / drive / "images", 2) for drive in INDEX_DRIVES]
        return folders, [_every(data / "camvid" / CALIBRATION_DRIVE / "images", 2)], str(test)
    carla.write_composites(data / carla.FRAMES, test, 1)
    index, calibration = carla.composite_sources(data / carla.FRAMES)
    return [f"{s[:-1]}:3]" for s in index], [f"{s[:-1]}:3]" for s in calibration], str(test)


def _every(folder: Path, step: int) -> str:
    return f"{folder}[0:{len(list(folder.iterdir()))}:{step}]"


def main() -> None:
    """Print one table for each set."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder of the data sets")
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    names = ("camvid", "composites")
    parser.add_argument("--sets", nargs="+", default=names, choices=names)
    args = parser.parse_args()
    defaults = Settings().stage_specs
    instances = [str(replace(defaults[0], kind="instances"))]
    settings = Settings(
        stages=(*map(str, defaults), *instances), target_false_alarm_rate=RATE
    ).with_build_defaults()
    embedder = RunningEmbedder.from_settings(settings)
    grid = range(len(defaults))
    rows = {
        "default stages": list(grid),
        "default stages and instances": [*grid, len(defaults)],
        "instances": [len(defaults)],
    }
    for name in args.sets:
        index_sources, calibration_sources, test = sources(name, args.data, args.out)
        grids: dict[int, PatchGrid] = {}
        print(f"\n| {name} | frame AUROC | pixel AP | TPR | FPR |")
        print("|---|---|---|---|---|")
        for title, numbers in tqdm(rows.items(), name, disable=None):
            of_row = StagesOf(embedder, grids, numbers)
            row_settings = settings.replace(stages=[str(stage.spec) for stage in of_row.stages])
            common: dict[str, Any] = {
                "settings": row_settings,
                "embedder": of_row,
                "progress": True,
            }
            index = build_index(index_sources, **common)
            calibration = calibrate(index, calibration_sources, **common)
            detector = AnomalyDetector(index, calibration, settings=row_settings, embedder=of_row)
            result = evaluate(detector, test, out=args.out / f"{name}, {title}")
            keys = "frame_auroc", "pixel_ap", "tpr", "fpr"
            cells = [figure(result[key]) for key in keys]
            print(f"| {title} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
