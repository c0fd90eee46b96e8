from __future__ import annotations

import struct
import zlib

import cv2
import numpy as np
import pytest

from semantic_anomaly.errors import ImageError
from semantic_anomaly.io.images import decode_compressed, inspect_image


def picture(height: int = 48, width: int = 64) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([4 * x, 4 * y, np.full_like(x, 40)], axis=2).astype(np.uint8)


def encoded(suffix: str, image: np.ndarray, *options: int) -> bytes:
    done, content = cv2.imencode(suffix, image, options)
    assert done
    return content.tobytes()


WEBP_LOSSLESS = (cv2.IMWRITE_WEBP_QUALITY, 101)
KINDS = {
    "JPEG": (".jpg", ()),
    "JPEG progressive": (".jpg", (cv2.IMWRITE_JPEG_PROGRESSIVE, 1)),
    "JPEG with restart markers": (".jpg", (cv2.IMWRITE_JPEG_RST_INTERVAL, 2)),
    "PNG": (".png", ()),
    "WebP lossy": (".webp", (cv2.IMWRITE_WEBP_QUALITY, 80)),
    "WebP lossless": (".webp", WEBP_LOSSLESS),
    "BMP": (".bmp", ()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (7, 300), (301, 5)])
def test_kind_and_size_are_read_from_the_header(kind: str, height: int, width: int) -> None:
    suffix, options = KINDS[kind]
    content = encoded(suffix, picture(height, width), *options)
    assert inspect_image(content) == (kind.split()[0], width, height)


def test_an_extended_webp_gives_its_canvas() -> None:
    still = encoded(".webp", picture(48, 64), *WEBP_LOSSLESS)
    sides = (63).to_bytes(3, "little") + (47).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + bytes(4) + sides + still[12:]
    content = b"RIFF" + struct.pack("<I", len(body)) + body
    assert inspect_image(content) == ("WebP", 64, 48)
    np.testing.assert_array_equal(decode_compressed(content), picture()[..., ::-1])


@pytest.mark.parametrize("kind", KINDS)
def test_truncation_at_any_place_is_refused(kind: str) -> None:
    suffix, options = KINDS[kind]
    content = encoded(suffix, picture(), *options)
    for length in {0, 1, 3, 9, 20, 30, *range(0, len(content) - 2, 97), len(content) - 2}:
        with pytest.raises(ImageError, match=r"truncated|expected JPEG|damaged"):
            decode_compressed(content[:length])


def test_the_end_marker_of_a_preview_does_not_hide_truncation() -> None:
    content = encoded(".jpg", picture())
    preview = encoded(".jpg", picture(8, 8))
    segment = b"\xff\xe1" + struct.pack(">H", len(preview) + 2) + preview
    with_preview = content[:2] + segment + content[2:]
    assert decode_compressed(with_preview).shape == (48, 64, 3)
    with pytest.raises(ImageError, match="truncated"):
        decode_compressed(with_preview[: len(with_preview) * 9 // 10])


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_bytes_after_the_end_are_no_damage(suffix: str) -> None:
    content = encoded(suffix, picture())
    expected = decode_compressed(content)
    for tail in (bytes(100), b"trailing"):
        np.testing.assert_array_equal(decode_compressed(content + tail), expected)


def png_claiming(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", header), (b"IDAT", body), (b"IEND", b""))
    )


def jpeg_claiming(width: int, height: int) -> bytes:
    content = bytearray(encoded(".jpg", picture()))
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(content)


def test_decompression_bombs_are_refused_by_their_header(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(*_: object) -> None:
        raise AssertionError("OpenCV was asked to decode")

    webp = bytearray(encoded(".webp", picture(), *WEBP_LOSSLESS))
    struct.pack_into("<I", webp, 21, 16383 | 16383 << 14)
    monkeypatch.setattr(cv2, "imdecode", decode)
    for content in (png_claiming(50_000, 50_000), jpeg_claiming(65_000, 65_000), bytes(webp)):
        with pytest.raises(ImageError, match="expected 1 to 40000000 pixels"):
            decode_compressed(content)


def test_sizes_without_pixels_and_damaged_bodies_are_refused() -> None:
    with pytest.raises(ImageError, match="found 0x10"):
        decode_compressed(png_claiming(0, 10))
    with pytest.raises(ImageError, match="PNG image of 300x300 pixels cannot be decoded"):
        decode_compressed(png_claiming(300, 300))


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"", "found no bytes"),
        (b"\x00\x01\x02\x03\x04", "found bytes 00 01 02 03"),
        (b"GIF89a" + bytes(50), "found bytes 47 49 46 38"),
        (b"\xff\xd8\xff" + bytes(100), "JPEG image is truncated or damaged in its header"),
    ],
)
def test_what_is_no_image_is_named(content: bytes, found: str) -> None:
    with pytest.raises(ImageError, match=found):
        decode_compressed(content)
