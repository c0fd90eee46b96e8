from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import LabelledFolder, read_mask
from semantic_anomaly.io.images import encode_png, write_image

SIDES = (24, 32)


def mask(*pixels: tuple[int, int, int], value: int = 0) -> np.ndarray:
    """Return a mask of one value with single pixels (row, col, value) of others."""
    made = np.full(SIDES, value, np.uint8)
    for row, col, other in pixels:
        made[row, col] = other
    return made


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Return four images: nominal, anomalous, ignored by its mask, and without a mask."""
    root = tmp_path / "drive"
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for number in range(4):
        write_image(root / f"images/{number:05d}.png", np.full((*SIDES, 3), number, np.uint8))
    write_image(root / "masks/00000.png", mask())
    write_image(root / "masks/00001.png", mask((3, 4, 1), (5, 6, 255)))
    write_image(root / "masks/00002.png", mask(value=255))
    return root


def label(root: Path, **labels: dict) -> None:
    (root / "labels.json").write_text(json.dumps({f"{k[1:]}.png": v for k, v in labels.items()}))


def test_without_labels_the_masks_say_what_is_anomalous(dataset: Path) -> None:
    found = LabelledFolder(dataset)
    assert [t.anomaly for t in found.truths] == [False, True, False, False]
    assert [t.ignored for t in found.truths] == [False, False, True, False]
    assert all(t.has_pixels for t in found.truths)
    assert (found.name, len(found)) == ("drive", 4)
    frames, truths, masks = zip(*found, strict=True)
    assert [frame.name for frame in frames] == [f"drive/{n:05d}.png" for n in range(4)]
    assert [truth.file for truth in truths] == [f"{n:05d}.png" for n in range(4)]
    assert masks[1][3, 4] == 1 and masks[1][5, 6] == 255 and not masks[3].any()


def test_labels_say_more_than_masks(dataset: Path) -> None:
    label(
        dataset,
        _00000={"anomaly": True, "kind": "cow", "family": "odd object", "stamp_s": 0.5, "odd": 1},
        _00001={"anomaly": True, "ignore": True, "stamp_s": 0.6},
        _00002={"anomaly": False, "kind": None, "stamp_s": 0.7},
        _00003={"anomaly": True, "kind": "sofa", "stamp_s": 0.8},
    )
    first, second, third, fourth = LabelledFolder(dataset).truths
    assert (first.anomaly, first.kind, first.family) == (True, "cow", "odd object")
    assert first.has_pixels, "an empty mask says that nothing of it is seen"
    assert (second.ignored, second.has_pixels) == (True, False)
    assert third.ignored, "a mask that ignores everything"
    assert (fourth.kind, fourth.has_pixels) == ("sofa", False), "labelled, and never masked"
    frames = [frame for frame, _, _ in LabelledFolder(dataset)]
    assert [frame.stamp_ns for frame in frames] == [int(n * 1e8) for n in (5, 6, 7, 8)]


def test_an_image_without_a_label_goes_by_its_mask(dataset: Path) -> None:
    label(dataset, _00000={"kind": "cow"})
    found = LabelledFolder(dataset).truths
    assert [t.anomaly for t in found] == [False, True, False, False]
    assert found[0].kind is None, "a nominal frame has no kind"


def test_a_part_may_be_chosen(dataset: Path) -> None:
    found = LabelledFolder(f"{dataset}[1:3]")
    assert [truth.file for truth in found.truths] == ["00001.png", "00002.png"]
    assert [frame.name for frame, _, _ in found] == ["drive/00001.png", "drive/00002.png"]


def test_masks_may_lie_in_labels_masks_or_nowhere(dataset: Path) -> None:
    (dataset / "masks").rename(dataset / "labels_masks")
    assert [t.anomaly for t in LabelledFolder(dataset).truths] == [False, True, False, False]
    for file in (dataset / "labels_masks").iterdir():
        file.unlink()
    (dataset / "labels_masks").rmdir()
    assert not any(t.anomaly for t in LabelledFolder(dataset).truths)


def test_colour_masks_of_one_gray_are_masks(tmp_path: Path) -> None:
    write_image(tmp_path / "m.png", np.repeat(mask((1, 2, 1))[..., None], 3, axis=2))
    assert read_mask(tmp_path / "m.png")[1, 2] == 1


def bad_value(root: Path) -> None:
    write_image(root / "masks/00001.png", mask((3, 4, 7)))


def other_size(root: Path) -> None:
    write_image(root / "masks/00001.png", np.zeros((10, 12), np.uint8))


def no_image(root: Path) -> None:
    write_image(root / "masks/00009.png", mask())


def colours(root: Path) -> None:
    write_image(root / "masks/00001.png", np.eye(3, dtype=np.uint8)[None])


def sixteen_bits(root: Path) -> None:
    content = cv2.imencode(".png", mask((3, 4, 1)).astype(np.uint16))[1]
    (root / "masks/00001.png").write_bytes(content.tobytes())


def one_bit(root: Path) -> None:
    content = cv2.imencode(".png", mask((3, 4, 255)), [cv2.IMWRITE_PNG_BILEVEL, 1])[1]
    (root / "masks/00001.png").write_bytes(content.tobytes())


def truncated(root: Path) -> None:
    (root / "masks/00001.png").write_bytes(encode_png(mask())[:-20])


def jpeg(root: Path) -> None:
    (root / "masks/00001.png").unlink()
    write_image(root / "masks/00001.jpg", mask())


def two_masks(root: Path) -> None:
    write_image(root / "masks/00001.jpg", mask())


def both_folders(root: Path) -> None:
    (root / "labels_masks").mkdir()


def absent_label(root: Path) -> None:
    label(root, _00009={"anomaly": True})


def text_label(root: Path) -> None:
    label(root, _00001={"anomaly": "yes"})


def kind_of_number(root: Path) -> None:
    label(root, _00001={"anomaly": True, "kind": 3})


def label_is_a_list(root: Path) -> None:
    (root / "labels.json").write_text('{"00001.png": [1]}')


def labels_are_a_list(root: Path) -> None:
    (root / "labels.json").write_text("[]")


def not_json(root: Path) -> None:
    (root / "labels.json").write_text('{"00001.png"')


def no_images(root: Path) -> None:
    for file in (root / "images").iterdir():
        file.unlink()


def no_folder(root: Path) -> None:
    (root / "images").rename(root / "pictures")


def image_of_another_size(root: Path) -> None:
    write_image(root / "images/00003.png", np.zeros((30, 40, 3), np.uint8))


def broken_image(root: Path) -> None:
    (root / "images/00003.png").write_bytes(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (bad_value, r"00001\.png.*0 normal, 1 anomaly, 255 ignore.*found also 7"),
        (other_size, r"00001\.png.*expected 32x24.*found 12x10"),
        (no_image, r"an image of the same stem.*'00009\.png'"),
        (colours, r"00001\.png.*one channel.*colours"),
        (sixteen_bits, r"00001\.png.*8-bit PNG, found PNG of 16 bits"),
        (one_bit, r"00001\.png.*8-bit PNG, found PNG of 1 bits"),
        (truncated, r"00001\.png.*truncated"),
        (jpeg, r"00001\.jpg.*8-bit PNG, found JPEG"),
        (two_masks, r"one for each image, found several for '00001'"),
        (both_folders, r"one of masks, labels_masks, found both"),
        (absent_label, r"labels\.json.*absent '00009\.png'"),
        (text_label, r"'00001\.png': anomaly: expected true or false, found 'yes'"),
        (kind_of_number, r"'00001\.png': kind: expected a text, found 3"),
        (label_is_a_list, r"'00001\.png': expected an object"),
        (labels_are_a_list, r"labels\.json'"),
        (not_json, r"labels\.json' cannot be read"),
        (no_images, r"expected images"),
        (no_folder, r"expected a folder 'images'"),
        (image_of_another_size, r"images of one size, 32x24.*40x30 in 'drive/00003\.png'"),
        (broken_image, r"00003\.png"),
    ],
)
def test_bad_datasets_are_refused_by_name(dataset: Path, damage: object, named: str) -> None:
    damage(dataset)  # type: ignore[operator]
    with pytest.raises(InputError) as caught:
        list(LabelledFolder(dataset))
    assert re.search(named, str(caught.value)), str(caught.value)


@pytest.mark.parametrize("selection", ["[9:]", "[2:2]", "[0:2:0]"])
def test_an_empty_part_is_refused(dataset: Path, selection: str) -> None:
    with pytest.raises(InputError):
        LabelledFolder(f"{dataset}{selection}")


def test_masks_are_checked_before_anything_is_computed(dataset: Path) -> None:
    bad_value(dataset)
    with pytest.raises(InputError, match="00001"):
        LabelledFolder(dataset)


@pytest.mark.parametrize(
    ("label", "sequence"),
    [({}, "00000.png"), ({"stamp_s": 0.0}, "set"), ({"drive": "d7", "stamp_s": 0.0}, "d7")],
)
def test_frames_with_stamps_are_one_drive_and_others_by_themselves(
    tmp_path: Path, label: dict, sequence: str
) -> None:
    (tmp_path / "set" / "images").mkdir(parents=True)
    write_image(tmp_path / "set" / "images" / "00000.png", np.zeros((4, 4, 3), np.uint8))
    (tmp_path / "set" / "labels.json").write_text(json.dumps({"00000.png": label}))
    assert LabelledFolder(tmp_path / "set").truths[0].sequence == sequence
