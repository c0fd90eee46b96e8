from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np
import pytest
from PIL import Image

from semantic_anomaly.errors import InputError
from semantic_anomaly.evaluation.datasets import LabelledFolder, read_mask
from semantic_anomaly.evaluation.layouts import Layout, LayoutDataset
from semantic_anomaly.io.images import encode_png, write_image

SIDES = (24, 32)
Damage: TypeAlias = Callable[[Path], object]


def mask(*pixels: tuple[int, int, int], value: int = 0) -> np.ndarray:
    """Return a mask of one value with single pixels (row, col, value) of others."""
    labels = np.full(SIDES, value, np.uint8)
    for row, col, other in pixels:
        labels[row, col] = other
    return labels


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


def label(root: Path, **labels: object) -> None:
    (root / "labels.json").write_text(json.dumps({f"{k[1:]}.png": v for k, v in labels.items()}))


def test_without_labels_the_masks_say_what_is_anomalous(dataset: Path) -> None:
    opened = LabelledFolder(dataset)
    assert [t.anomaly for t in opened.truths] == [False, True, False, False]
    assert [t.ignored for t in opened.truths] == [False, False, True, False]
    assert all(t.has_pixels for t in opened.truths)
    assert (opened.name, len(opened)) == ("drive", 4)
    frames, truths, masks = zip(*opened, strict=True)
    assert [frame.name for frame in frames] == [f"drive/{n:05d}.png" for n in range(4)]
    assert [truth.file for truth in truths] == [f"{n:05d}.png" for n in range(4)]
    assert masks[1][3, 4] == 1 and masks[1][5, 6] == 255 and not masks[3].any()


def test_labels_say_more_than_masks(dataset: Path) -> None:
    label(
        dataset,
        _00000={"anomaly": True, "kind": "cow", "family": "odd object", "stamp_s": 0.5, "odd": 1},
        _00001={"anomaly": True, "ignore": True, "stamp_s": 0.6, "tags": ["rain", "dusk", "rain"]},
        _00002={"anomaly": False, "kind": None, "stamp_s": 0.7},
        _00003={"anomaly": True, "kind": "sofa", "stamp_s": 0.8},
    )
    first, second, third, fourth = LabelledFolder(dataset).truths
    assert (first.anomaly, first.kind, first.family) == (True, "cow", "odd object")
    assert first.has_pixels, "an empty mask says that nothing of it is seen"
    assert (second.ignored, second.has_pixels) == (True, False)
    assert (first.tags, second.tags) == ((), ("dusk", "rain"))
    assert third.ignored, "a mask that ignores everything"
    assert (fourth.kind, fourth.has_pixels) == ("sofa", False), "labelled, and never masked"
    frames = [frame for frame, _, _ in LabelledFolder(dataset)]
    assert [frame.stamp_ns for frame in frames] == [int(n * 1e8) for n in (5, 6, 7, 8)]


def test_an_image_without_a_label_goes_by_its_mask(dataset: Path) -> None:
    label(dataset, _00000={"kind": "cow"})
    opened = LabelledFolder(dataset).truths
    assert [t.anomaly for t in opened] == [False, True, False, False]
    assert opened[0].kind is None, "a nominal frame has no kind"


def test_a_part_may_be_chosen(dataset: Path) -> None:
    opened = LabelledFolder(f"{dataset}[1:3]")
    assert [truth.file for truth in opened.truths] == ["00001.png", "00002.png"]
    assert [frame.name for frame, _, _ in opened] == ["drive/00001.png", "drive/00002.png"]


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


def palette_png(labels: np.ndarray, colours: int = 256) -> bytes:
    image = Image.fromarray(labels, "P")
    image.putpalette([0, 0, 0, 255, 255, 255, *[0] * 3 * 254][: 3 * colours])
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def test_white_masks_are_refused_with_the_convention(dataset: Path) -> None:
    write_image(dataset / "masks/00001.png", mask((3, 4, 255)))
    convention = r"0 normal, 1 anomaly, 255 ignore, found 0 and 255 \(in '00001.png'\) and no 1"
    with pytest.raises(InputError, match=rf"{convention}.*--layout.*255: anomaly"):
        LabelledFolder(dataset)
    label(dataset, _00001={"anomaly": True})
    with pytest.raises(InputError, match=convention):
        LabelledFolder(dataset)
    # Another mask of the folder shows that the convention is kept.
    write_image(dataset / "masks/00003.png", mask((3, 4, 1)))
    assert not any(truth.anomaly for truth in LabelledFolder(f"{dataset}[2:3]").truths)
    assert len(LabelledFolder(f"{dataset}[0:2]")) == 2


def test_white_masks_are_refused_in_a_published_layout_and_read_by_one_of_their_own(
    dataset: Path, tmp_path: Path
) -> None:
    write_image(dataset / "masks/00001.png", mask((3, 4, 255)))
    layout = {"images": "images/*.png", "label_of": ("^images/", "masks/")}
    plain = Layout(**layout, values={0: "normal", 1: "anomaly", 255: "ignore"})
    with pytest.raises(InputError, match="0 normal, 1 anomaly, 255 ignore, found 0 and 255"):
        LayoutDataset(dataset, plain)
    white = LayoutDataset(dataset, Layout(**layout, values={0: "normal", 255: "anomaly"}))
    assert [truth.anomaly for truth in white.truths] == [False, True, True]


@pytest.mark.parametrize("colours", [256, 4, 2])
def test_the_indices_of_a_palette_are_the_labels(dataset: Path, colours: int) -> None:
    labels = mask((3, 4, 1))
    (dataset / "masks/00001.png").write_bytes(palette_png(labels, colours))
    assert [truth.anomaly for truth in LabelledFolder(dataset).truths][1]
    np.testing.assert_array_equal(read_mask(dataset / "masks/00001.png"), labels)
    layout = Layout("images/*.png", ("^images/", "masks/"), {0: "normal", 1: "anomaly"}, "ignore")
    assert LayoutDataset(dataset, layout).truths[1].anomaly


def test_an_unknown_index_of_a_palette_is_refused(dataset: Path) -> None:
    (dataset / "masks/00001.png").write_bytes(palette_png(mask((3, 4, 7))))
    with pytest.raises(InputError, match="found also 7"):
        LabelledFolder(dataset)
    (dataset / "masks/00001.png").write_bytes(palette_png(mask())[:80] + b"IEND\xaeB`\x82")
    with pytest.raises(InputError, match=r"00001.*damaged"):
        LabelledFolder(dataset)


def written(name: str, content: np.ndarray | bytes | str) -> Damage:
    """Return a function that writes a file of the dataset."""

    def damage(root: Path) -> None:
        path = root / name
        if isinstance(content, np.ndarray):
            write_image(path, content)
        else:
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    return damage


def labelled(**labels: object) -> Damage:
    return lambda root: label(root, **labels)


def jpeg_mask(root: Path) -> None:
    (root / "masks/00001.png").unlink()
    write_image(root / "masks/00001.jpg", mask())


def no_images(root: Path) -> None:
    for file in (root / "images").iterdir():
        file.unlink()


SIXTEEN_BITS = cv2.imencode(".png", mask((3, 4, 1)).astype(np.uint16))[1].tobytes()
ONE_BIT = cv2.imencode(".png", mask((3, 4, 255)), [cv2.IMWRITE_PNG_BILEVEL, 1])[1].tobytes()
BAD_VALUE = written("masks/00001.png", mask((3, 4, 7)))


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (BAD_VALUE, r"00001\.png.*0 normal, 1 anomaly, 255 ignore.*found also 7"),
        (
            written("masks/00001.png", np.zeros((10, 12), np.uint8)),
            r"00001\.png.*expected 32x24.*found 12x10",
        ),
        (written("masks/00009.png", mask()), r"an image of the same stem.*'00009\.png'"),
        (
            written("masks/00001.png", np.eye(3, dtype=np.uint8)[None]),
            r"00001\.png.*one channel.*colours",
        ),
        (
            written("masks/00001.png", SIXTEEN_BITS),
            r"00001\.png.*8-bit PNG, found PNG of 16 bits",
        ),
        (written("masks/00001.png", ONE_BIT), r"00001\.png.*8-bit PNG, found PNG of 1 bits"),
        (written("masks/00001.png", encode_png(mask())[:-20]), r"00001\.png.*truncated"),
        (jpeg_mask, r"00001\.jpg.*8-bit PNG, found JPEG"),
        (written("masks/00001.jpg", mask()), r"one for each image, found several for '00001'"),
        (
            lambda root: (root / "labels_masks").mkdir(),
            r"one of masks, labels_masks, found both",
        ),
        (labelled(_00009={"anomaly": True}), r"labels\.json.*absent '00009\.png'"),
        (
            labelled(_00001={"anomaly": "yes"}),
            r"'00001\.png': anomaly: expected true or false, found 'yes'",
        ),
        (labelled(_00001={"kind": 3}), r"'00001\.png': kind: expected a text, found 3"),
        (labelled(_00001={"tags": "night"}), r"'00001\.png': tags: expected a list of texts"),
        (labelled(_00001=[1]), r"'00001\.png': expected an object"),
        (written("labels.json", "[]"), r"labels\.json'"),
        (written("labels.json", '{"00001.png"'), r"labels\.json' cannot be read"),
        (no_images, r"expected images"),
        (
            lambda root: (root / "images").rename(root / "pictures"),
            r"expected a folder 'images'",
        ),
        (
            written("images/00003.png", np.zeros((30, 40, 3), np.uint8)),
            r"images of one size, 32x24.*40x30 in 'drive/00003\.png'",
        ),
    ],
)
def test_bad_datasets_are_refused_by_name(dataset: Path, damage: Damage, expected: str) -> None:
    damage(dataset)
    with pytest.raises(InputError, match=expected):
        list(LabelledFolder(dataset))


@pytest.mark.parametrize("selection", ["[9:]", "[2:2]", "[0:2:0]"])
def test_an_empty_part_is_refused(dataset: Path, selection: str) -> None:
    with pytest.raises(InputError):
        LabelledFolder(f"{dataset}{selection}")


def test_masks_are_checked_before_anything_is_computed(dataset: Path) -> None:
    BAD_VALUE(dataset)
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
