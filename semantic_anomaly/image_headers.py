"""What the bytes of a compressed image claim to be, read before any decoder sees them.

OpenCV 4.10 and 4.11 fill the missing rows of a truncated JPEG with stale memory, often the previous
frame, and every version takes memory for whatever size a header claims.
"""

from __future__ import annotations

import struct

from semantic_anomaly.errors import ImageError


def inspect_image(data: bytes) -> tuple[str, int, int]:
    """Return kind, width and height in pixels of a JPEG, PNG, WebP or BMP that has its end.

    Raises:
        ImageError: another kind, a header that cannot be read, or data that ends too early.
    """
    kinds = {
        "JPEG": (data[:3] == b"\xff\xd8\xff", _inspect_jpeg),
        "PNG": (data[:8] == b"\x89PNG\r\n\x1a\n", _inspect_png),
        "WebP": (data[:4] == b"RIFF" and data[8:12] == b"WEBP", _inspect_webp),
        "BMP": (data[:2] == b"BM", _inspect_bmp),
    }
    for kind, (recognised, inspect) in kinds.items():
        if recognised:
            try:
                width, height, complete = inspect(data)
            except (IndexError, ValueError, struct.error) as error:
                raise ImageError(f"{kind} image is truncated or damaged in its header") from error
            if not complete:
                raise ImageError(f"{kind} image is truncated: {len(data)} bytes, end not found")
            return kind, width, height
    found = f"bytes {data[:4].hex(' ')} ..." if data else "no bytes"
    raise ImageError(f"compressed image: expected JPEG, PNG, WebP or BMP, found {found}")


def _inspect_jpeg(data: bytes) -> tuple[int, int, bool]:
    position, width, height, marker = 2, 0, 0, 0
    while marker != 0xDA:
        position = data.index(b"\xff", position)
        while data[position] == 0xFF:
            position += 1
        marker = data[position]
        position += 1
        if marker == 0x01 or 0xD0 <= marker <= 0xD8:
            continue
        (length,) = struct.unpack_from(">H", data, position)
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack_from(">HH", data, position + 3)
        position += length
    # An end marker before the scan belongs to a preview picture.
    return width, height, data.rfind(b"\xff\xd9", position) >= 0


def _inspect_png(data: bytes) -> tuple[int, int, bool]:
    width, height = struct.unpack_from(">II", data, 16)
    return width, height, b"IEND\xaeB`\x82" in data[-4096:]


def _inspect_webp(data: bytes) -> tuple[int, int, bool]:
    complete = len(data) >= 8 + struct.unpack_from("<I", data, 4)[0]
    chunk = data[12:16]
    if chunk == b"VP8X":
        sides = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        sides = ((bits >> shift & 0x3FFF) + 1 for shift in (0, 14))
    else:
        sides = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    width, height = sides
    return width, height, complete


def _inspect_bmp(data: bytes) -> tuple[int, int, bool]:
    (size,) = struct.unpack_from("<I", data, 2)
    width, height = struct.unpack_from("<ii", data, 18)
    return width, abs(height), len(data) >= size
