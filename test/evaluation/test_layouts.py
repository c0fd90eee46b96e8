"""Layouts of published datasets, with images made here."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from worlds.bags import raw, write_bag
from worlds.colours import IMAGE_HW, make_detector, street
from worlds.labelled_drive import odd_mask

from semantic_anomaly.errors import InputError, SourceError
from semantic_anomaly.evaluation.evaluate import evaluate
from semantic_anomaly.evaluation.layouts import LAYOUTS, open_dataset
from semantic_anomaly.io.images import write_image

# Image and labels of two frames in each published layout, beside files that do not belong to it.
FILES = {
    "road-anomaly": [
        ("frames/zebra01.jpg", "frames/zebra01.labels/labels_semantic.png"),
        ("frames/zebra10.jpg", "frames/zebra10.labels/labels_semantic.png"),
    ],
    "smiyc-anomaly": [
        ("images/validation0000.jpg", "labels_masks/validation0000_labels_semantic.png"),
        ("images/validation0001.jpg", "labels_masks/validation0001_labels_semantic.png"),
    ],
    "smiyc-obstacle": [
        ("images/validation_1.webp", "labels_masks/validation_1_labels_semantic.png"),
        ("images/validation_20.webp", "labels_masks/validation_20_labels_semantic.png"),
    ],
    "fishyscapes-static": [
        ("images/0000_a.png", "labels/0000_a_labels.png"),
        ("images/0001_b_rgb.png", "labels/0001_b_labels.png"),
    ],
    "fishyscapes-lost-and-found": [
        (
            f"images/04_Maurener_Weg_8_000000_{n}_leftImg8bit.png",
            f"labels/04_Maurener_Weg_8_000000_{n}_labels.png",
        )
        for n in ("000030", "000090")
    ],
    "anovox": [
        ("Scenario_a/RGB-CAM(1)/RGB_7.png", "Scenario_a/SEMANTIC-CAM(1)/RGB_7.png"),
        ("Scenario_b/RGB-CAM(1)/RGB_7.png", "Scenario_b/SEMANTIC-CAM(1)/RGB_7.png"),
    ],
}
STRAYS = (
    *("frames/zebra02.jpg", "images/test0000.jpg", "images/validation_21.webp"),
    "labels_masks/validation_21_labels_semantic.png",
)


def make_layout(root: Path, name: str) -> Path:
    for number, (image_file, label_file) in enumerate(FILES[name]):
        image = street(number, odd=number == 1).image
        mask = odd_mask(image.shape[:2]) * (number == 1)
        for file in (image_file, label_file):
            (root / file).parent.mkdir(parents=True, exist_ok=True)
        write_any(root / image_file, image)
        labels = mask * 2 if name == "road-anomaly" else mask
        if name == "anovox":
            colours = np.full((*mask.shape, 3), (128, 64, 128), np.uint8)
            colours[mask == 1] = (245, 30, 0)
            labels = colours
        write_image(root / label_file, labels)
    for file in STRAYS:
        if (root / file).parent.is_dir():
            write_any(root / file, np.zeros((4, 4, 3), np.uint8))
    return root


def write_any(file: Path, image: np.ndarray) -> None:
    done, content = cv2.imencode(file.suffix, image[..., ::-1])
    assert done
    file.write_bytes(content.tobytes())


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_published_layouts_are_read(tmp_path: Path, name: str) -> None:
    dataset = open_dataset(make_layout(tmp_path / "set", name), name)
    assert [truth.file for truth in dataset.truths] == [image for image, _ in FILES[name]]
    assert [truth.anomaly for truth in dataset.truths] == [False, True]
    assert len({truth.stem for truth in dataset.truths}) == 2
    (first, _, nothing), (second, _, labels) = dataset
    assert first.name != second.name and not nothing.any()
    np.testing.assert_array_equal(labels, odd_mask(labels.shape))
    drives = {
        "anovox": ["Scenario_a", "Scenario_b"],
        "fishyscapes-lost-and-found": ["04_Maurener_Weg_8_000000"] * 2,
    }
    expected = drives.get(name, [image for image, _ in FILES[name]])
    assert [truth.sequence for truth in dataset.truths] == expected


def test_a_bad_image_of_a_layout_is_left_out(tmp_path: Path) -> None:
    root = make_layout(tmp_path / "set", "road-anomaly")
    dataset = open_dataset(root, "road-anomaly")
    (root / dataset.truths[0].file).write_bytes(b"\xff\xd8\xff")
    results = evaluate(make_detector(), dataset)
    (named,) = results["bad_frames"]
    assert named["name"] == f"set/{dataset.truths[0].file}" and named["name"] in dataset.losses
    assert [row["decision"] for row in results["frames"]] == ["unknown", "anomaly"]
    (root / dataset.truths[1].file).write_bytes(b"\xff\xd8\xff")
    with pytest.raises(SourceError, match="at most 1 bad frames"):
        evaluate(make_detector(), dataset)


@pytest.mark.usefixtures("no_figures")
def test_a_layout_is_evaluated(tmp_path: Path) -> None:
    dataset = open_dataset(make_layout(tmp_path / "set", "anovox"), "anovox")
    results = evaluate(make_detector(), dataset, out=tmp_path / "out", save_maps=True)
    assert results["frame_auroc"] == 1.0 and results["pixel_ap"] > 0.5
    assert sorted(f.name for f in (tmp_path / "out" / "maps").iterdir()) == [
        "Scenario_a__RGB-CAM(1)__RGB_7.npy",
        "Scenario_b__RGB-CAM(1)__RGB_7.npy",
    ]


@pytest.mark.parametrize("name", sorted(LAYOUTS))
def test_a_missing_dataset_says_where_it_is_published(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"found no image; expected .* https?://"):
        open_dataset(tmp_path / "absent", name)


def test_bad_labels_are_named(tmp_path: Path) -> None:
    root = make_layout(tmp_path / "set", "smiyc-anomaly")
    file = root / FILES["smiyc-anomaly"][0][1]
    write_image(file, np.full((96, 128), 7, np.uint8))
    with pytest.raises(InputError, match=r"expected values 0, 1, 255, found also \[7\]"):
        open_dataset(root, "smiyc-anomaly")
    file.write_bytes(b"broken")
    with pytest.raises(InputError, match="expected an 8-bit image"):
        open_dataset(root, "smiyc-anomaly")
    write_image(file, np.zeros((5, 7), np.uint8))
    with pytest.raises(InputError, match=r"found 7x5"):
        list(open_dataset(root, "smiyc-anomaly"))


def test_a_layout_of_ones_own(tmp_path: Path) -> None:
    root = make_layout(tmp_path / "set", "anovox")
    file = tmp_path / "layout.yaml"
    file.write_text(
        "images: 'Scenario_*/RGB-CAM*/*.png'\nlabel_of: ['RGB', 'SEMANTIC']\n"
        "values: {30: anomaly, 64: normal}\nchannel: 1\nsequence: '(Scenario)'\n"
    )
    with pytest.raises(InputError, match=r"2 images without labels; expected Scenario_\*"):
        open_dataset(root, str(file))
    file.write_text(file.read_text().replace("'RGB', 'SEMANTIC'", "'RGB-CAM', 'SEMANTIC-CAM'"))
    dataset = open_dataset(root, str(file))
    assert [truth.anomaly for truth in dataset.truths] == [False, True]
    assert {truth.sequence for truth in dataset.truths} == {"Scenario"}


CAMERA = """
images: /front/rgb/image
label_of: [rgb, semantic]
values: {9: anomaly}
other: normal
"""


def make_bag(
    root: Path, labels: list[int], stamps: list[int], bad: dict[str, int] | None = None
) -> Path:
    """Write images 0, 1, ... and labels of these stamps: 9 has the odd box, others are empty.

    `bad` names the image of a topic that cannot be decoded.
    """
    height, width = IMAGE_HW
    size = {"height": height, "width": width}
    pictures, marked = [], []
    for n, (stamp, value) in enumerate(zip(stamps, labels, strict=True)):
        image = street(n, odd=value == 9).image
        pictures.append(raw(n, encoding="rgb8", step=3 * width, data=image.reshape(-1), **size))
        ids = np.zeros((height, width, 4), np.uint8)
        ids[..., 2] = odd_mask(IMAGE_HW) * value
        marked.append(raw(stamp, encoding="bgra8", step=4 * width, data=ids.reshape(-1), **size))
    topics = {"/front/rgb/image": pictures, "/front/semantic/image": marked}
    for topic, number in (bad or {}).items():
        topics[topic][number].encoding = "h264"
    return write_bag(root / "bag", topics)


def test_a_bag_with_a_semantic_camera(tmp_path: Path) -> None:
    bag, layout = make_bag(tmp_path, [0, 9, 7, 9], [0, 1, 12, 3]), tmp_path / "layout.yaml"
    layout.write_text(CAMERA)
    dataset = open_dataset(bag, str(layout))
    # Image 2 has no labels of its stamp.
    assert [truth.anomaly for truth in dataset.truths] == [False, True, True]
    assert {truth.sequence for truth in dataset.truths} == {"bag"}
    for _ in range(2):
        rows = list(dataset)
        assert [frame.stamp_ns for frame, _, _ in rows] == [100_000_000_005, 101_000_000_005,
                                                            103_000_000_005]  # fmt: skip
        np.testing.assert_array_equal(rows[1][2], odd_mask(IMAGE_HW))
        assert not rows[0][2].any()
    # Out of order as well.
    first, last = dataset.truths[0], dataset.truths[2]
    assert dataset.labels(last, IMAGE_HW).any() and not dataset.labels(first, IMAGE_HW).any()
    results = evaluate(make_detector(), dataset)
    assert results["frame_auroc"] == 1.0 and results["component_siou_oracle"] > 0.5


@pytest.mark.parametrize("topic", ["/front/rgb/image", "/front/semantic/image"])
def test_a_bad_image_of_a_bag_is_left_out(tmp_path: Path, topic: str) -> None:
    bag, layout = make_bag(tmp_path, [0, 9, 0, 9], [0, 1, 2, 3], {topic: 1}), tmp_path / "l.yaml"
    layout.write_text(CAMERA)
    dataset = open_dataset(bag, str(layout))
    results = evaluate(make_detector(), dataset)
    (named,) = results["bad_frames"]
    assert named["stamp_ns"] == 101_000_000_005 and "'h264' is not supported" in named["reason"]
    assert f"topic '{topic}', image 1" in named["reason"] and "1 bad frames" in dataset.losses
    # Without labels it is no frame of the dataset, as any image without labels.
    unknown = topic == "/front/rgb/image"
    assert results["frames_unknown"] == unknown and len(results["frames"]) == 3 + unknown
    assert (results["frames_counted"], results["frames_anomalous"]) == (3, 1)


def test_bags_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    bag, layout = make_bag(tmp_path, [0, 9], [10, 11]), tmp_path / "layout.yaml"
    layout.write_text(CAMERA)
    with pytest.raises(InputError, match="labels of the same stamp on '/front/semantic/image'"):
        open_dataset(bag, str(layout))
    layout.write_text(CAMERA.replace("semantic", "depth"))
    with pytest.raises(InputError, match="/front/depth/image"):
        open_dataset(bag, str(layout))
    layout.write_text(CAMERA.replace("[rgb, semantic]", "[x, y]"))
    with pytest.raises(InputError, match="found the same"):
        open_dataset(bag, str(layout))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("images: a\n", "expected images, label_of, values"),
        ("[1]\n", "expected images, label_of, values"),
        ("{images: a, label_of: [b, c], values: {}, color: 1}\n", "'color'"),
        ("{images: 3, label_of: [b, c], values: {}}\n", "images: found 3"),
        ("{images: a, label_of: [b], values: {}}\n", "and a replacement"),
        ("{images: a, label_of: ['(', c], values: {}}\n", "label_of: no regular expression"),
        ("{images: a, label_of: [b, c], values: {}, sequence: '('}\n", "sequence: no regular"),
        ("{images: a, label_of: [b, c], values: {300: anomaly}}\n", "found 300"),
        ("{images: a, label_of: [b, c], values: {3: odd}}\n", "found 3: 'odd'"),
        ("{images: a, label_of: [b, c], values: {}, other: no}\n", "other: found False"),
        ("{images: a, label_of: [b, c], values: {}, other: x}\n", "found 'x'"),
        ("{images: a, label_of: [b, c], values: {}, channel: 3}\n", "0, 1 or 2, found 3"),
        ("{\n", "layout.yaml"),
    ],
)
def test_bad_layouts_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "layout.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=message):
        open_dataset(tmp_path, str(file))
    with pytest.raises(InputError, match=r"expected road-anomaly, .* or a YAML file"):
        open_dataset(tmp_path, "absent")
