from __future__ import annotations

import os
import struct
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from semantic_anomaly.errors import ImageError
from semantic_anomaly.io import images
from semantic_anomaly.io.images import (
    decode_compressed,
    encode_jpeg,
    encode_png,
    read_image,
    write_image,
)


def smooth(height: int = 48, width: int = 64) -> np.ndarray:
    """Return a picture that lossy coders keep: red grows to the right, green downwards."""
    y, x = np.mgrid[0:height, 0:width]
    picture = np.stack([255 * x / width, 255 * y / height, np.full_like(x, 40, float)], axis=2)
    return picture.astype(np.uint8)


def gray(rgb: np.ndarray) -> np.ndarray:
    return np.repeat(rgb[..., :1], 3, axis=2)


def encoded(suffix: str, picture: np.ndarray, *options: int) -> bytes:
    bgr = picture[..., ::-1] if picture.ndim == 3 else picture
    done, content = cv2.imencode(suffix, np.ascontiguousarray(bgr), options)
    assert done
    return content.tobytes()


WEBP_LOSSLESS = (cv2.IMWRITE_WEBP_QUALITY, 101)
PROGRESSIVE = (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)
COMPRESSED = {
    "jpeg": (".jpg", 4, (cv2.IMWRITE_JPEG_QUALITY, 98)),
    "jpeg progressive": (".jpg", 4, (cv2.IMWRITE_JPEG_QUALITY, 98, *PROGRESSIVE)),
    "png": (".png", 0, ()),
    "webp lossy": (".webp", 12, (cv2.IMWRITE_WEBP_QUALITY, 95)),
    "webp lossless": (".webp", 0, WEBP_LOSSLESS),
    "bmp": (".bmp", 0, ()),
}


@pytest.mark.parametrize("kind", COMPRESSED)
def test_compressed_images_are_decoded_by_their_content(kind: str) -> None:
    suffix, tolerance, options = COMPRESSED[kind]
    content = encoded(suffix, smooth(), *options)
    # The name of the format is not what decides.
    for name in ("", "jpeg", "png", "rgb8; jpeg compressed bgr8", "bgr8; png compressed bgr8"):
        image = decode_compressed(content, name)
        assert image.dtype == np.uint8
        assert np.abs(image.astype(int) - smooth()).max() <= tolerance, name


def test_rgb_given_to_the_encoder_as_bgr_comes_back_as_rgb() -> None:
    done, content = cv2.imencode(".png", smooth())
    assert done
    image = decode_compressed(content, "rgb8; png compressed rgb8")
    np.testing.assert_array_equal(image, smooth())


def test_sixteen_bit_gray_and_alpha_png_become_rgb() -> None:
    deep = encoded(".png", smooth().astype(np.uint16) * 257)
    np.testing.assert_array_equal(decode_compressed(deep), smooth())
    single = encoded(".png", smooth()[..., 0])
    np.testing.assert_array_equal(decode_compressed(single), gray(smooth()))
    alpha = np.dstack([smooth()[..., ::-1], np.full((48, 64), 9, np.uint8)])
    done, content = cv2.imencode(".png", alpha)
    assert done
    np.testing.assert_array_equal(decode_compressed(content), smooth())


def test_sixteen_bit_gray_png_keeps_the_upper_byte() -> None:
    content = encoded(".png", (smooth()[..., 0].astype(np.uint16) << 8) + 3)
    np.testing.assert_array_equal(decode_compressed(content), gray(smooth()))


def test_compressed_depth_is_refused_with_a_sentence() -> None:
    with pytest.raises(ImageError, match=r"16UC1; compressedDepth png.* depth image.*colour image"):
        decode_compressed(encoded(".png", smooth()), "16UC1; compressedDepth png")


def test_random_damage_never_raises_anything_else(rng: np.random.Generator) -> None:
    for suffix in (".jpg", ".png", ".webp", ".bmp"):
        content = np.frombuffer(encoded(suffix, smooth()), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            places = rng.integers(0, len(content), 3)
            damaged[places] = rng.integers(0, 256, 3)
            try:
                image = decode_compressed(damaged)
            except ImageError:
                continue
            assert image.shape[2] == 3


def test_an_exif_orientation_is_ignored() -> None:
    content = encoded(".jpg", smooth(48, 64))
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    turned = content[:2] + b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif + content[2:]
    obeyed = cv2.imdecode(np.frombuffer(turned, np.uint8), cv2.IMREAD_COLOR)
    assert obeyed is not None and obeyed.shape == (64, 48, 3)
    assert decode_compressed(turned).shape == (48, 64, 3)


def test_encoders_keep_the_order_of_colours() -> None:
    np.testing.assert_array_equal(decode_compressed(encode_png(smooth())), smooth())
    close = decode_compressed(encode_jpeg(smooth(), 98)).astype(int)
    assert np.abs(close - smooth()).max() <= 4
    assert len(encode_jpeg(smooth(), 20)) < len(encode_jpeg(smooth(), 95))
    # Views with negative strides are taken too.
    flipped = decode_compressed(encode_png(smooth()[:, ::-1]))
    np.testing.assert_array_equal(flipped, smooth()[:, ::-1])


@pytest.mark.parametrize(
    "wrong",
    [np.zeros((4, 5, 3), np.float32), np.zeros((4, 5, 4), np.uint8), np.zeros((0, 5, 3), np.uint8)],
)
def test_encoders_refuse_other_arrays(wrong: np.ndarray) -> None:
    for encode in (encode_png, encode_jpeg):
        with pytest.raises(ImageError, match="expected non-empty"):
            encode(wrong)


def test_jpeg_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(ImageError, match="cannot be encoded"):
        encode_jpeg(np.zeros((1, 70_000, 3), np.uint8))


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.JPEG"])
def test_files_are_written_whole_and_read_back(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"old")
    write_image(tmp_path / name, smooth())
    assert np.abs(read_image(tmp_path / name).astype(int) - smooth()).max() <= 8
    assert [file.name for file in tmp_path.iterdir()] == [name]


def test_a_gray_file_is_read_as_rgb(tmp_path: Path) -> None:
    write_image(tmp_path / "mask.png", smooth()[..., 0])
    np.testing.assert_array_equal(read_image(tmp_path / "mask.png"), gray(smooth()))


def test_a_write_that_fails_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "a.png"
    write_image(target, smooth())

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images.os, "fsync", fail)
    with pytest.raises(ImageError, match=r"a\.png' cannot be written: No space left"):
        write_image(target, np.zeros((5, 5, 3), np.uint8))
    monkeypatch.undo()
    np.testing.assert_array_equal(read_image(target), smooth())
    assert [file.name for file in tmp_path.iterdir()] == ["a.png"]


def test_files_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match=r"none\.png': No such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ImageError, match="Is a directory"):
        read_image(tmp_path)
    (tmp_path / "half.jpg").write_bytes(encoded(".jpg", smooth())[:-300])
    with pytest.raises(ImageError, match=r"half\.jpg': JPEG image is truncated"):
        read_image(tmp_path / "half.jpg")
    with pytest.raises(ImageError, match=r"a\.gif': expected a name in \.png"):
        write_image(tmp_path / "a.gif", smooth())
    with pytest.raises(ImageError, match="cannot be written: No such file"):
        write_image(tmp_path / "missing" / "a.png", smooth())


def test_importing_the_package_first_sets_the_pixel_limit_of_opencv() -> None:
    code = (
        "import semantic_anomaly.io.images, numpy as np, cv2\n"
        "content = cv2.imencode('.png', np.zeros((6400, 6400), np.uint8))[1]\n"
        "try: cv2.imdecode(content, 0)\n"
        "except cv2.error as error: print('refused', 'CV_IO_MAX_IMAGE_PIXELS' in str(error))\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OPENCV_IO_MAX_IMAGE_PIXELS"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "refused True"
