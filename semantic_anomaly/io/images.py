"""Convert image bytes to RGB arrays and back: raw ROS encodings, JPEG, PNG, WebP, BMP and TIFF.

Node, bags and folders use the same functions. Sizes are checked before memory is allocated, and
compressed data for its end before it is decoded: OpenCV 4.10 and 4.11 fill the missing rows of a
truncated JPEG with stale memory, often the previous frame, and every version allocates whatever
size a header claims.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np

from semantic_anomaly import MAX_IMAGE_PIXELS
from semantic_anomaly.errors import ImageError
from semantic_anomaly.storage import atomic_write_bytes, read_file

BytesLike = bytes | bytearray | memoryview | array | np.ndarray
# Encodings of 8 and 16 bits: channels, OpenCV's conversion to RGB (None: already RGB).
# 8UC3 and 16UC3 name no channel order; like cv_bridge, they are read as BGR. ROS names Bayer
# patterns by the first two pixels of the first two rows.
_CHANNELS: dict[str, tuple[int, int | None]] = {
    "rgb{}": (3, None),
    "bgr{}": (3, cv2.COLOR_BGR2RGB),
    "rgba{}": (4, cv2.COLOR_RGBA2RGB),
    "bgra{}": (4, cv2.COLOR_BGRA2RGB),
    "mono{}": (1, cv2.COLOR_GRAY2RGB),
    "{}UC1": (1, cv2.COLOR_GRAY2RGB),
    "{}UC3": (3, cv2.COLOR_BGR2RGB),
    "{}UC4": (4, cv2.COLOR_BGRA2RGB),
    "bayer_rggb{}": (1, cv2.COLOR_BayerBG2RGB),
    "bayer_bggr{}": (1, cv2.COLOR_BayerRG2RGB),
    "bayer_gbrg{}": (1, cv2.COLOR_BayerGR2RGB),
    "bayer_grbg{}": (1, cv2.COLOR_BayerGB2RGB),
}
# Encoding: channels, bytes per channel, conversion.
_PACKED = {
    name.format(bits): (channels, bits // 8, conversion)
    for bits in (8, 16)
    for name, (channels, conversion) in _CHANNELS.items()
}
_PACKED |= dict.fromkeys(("uyvy", "yuv422"), (2, 1, cv2.COLOR_YUV2RGB_UYVY))
_PACKED |= dict.fromkeys(("yuyv", "yuv422_yuy2"), (2, 1, cv2.COLOR_YUV2RGB_YUYV))
_PLANAR = {"nv12": cv2.COLOR_YUV2RGB_NV12, "nv21": cv2.COLOR_YUV2RGB_NV21}
_DEPTH = {"32FC1": ("f4", 1.0), "16UC1": ("u2", 1e-3), "mono16": ("u2", 1e-3)}
RAW_ENCODINGS = (*_PACKED, *_PLANAR)
DEPTH_ENCODINGS = tuple(_DEPTH)
# 16-bit images of which fewer levels remain in 8 bits and that had so many times more are refused.
_FEW_LEVELS, _LOSS = 32, 4
# How an image with an EXIF orientation is turned upright.
_TURNS: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.transpose(1, 0, 2),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).transpose(1, 0, 2),
    8: np.rot90,
}
_TIFF_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8}


class UnsupportedEncodingError(ImageError):
    """The encoding of a raw image is not supported."""

    def __init__(self, encoding: str, supported: tuple[str, ...]) -> None:
        self.encoding = encoding
        super().__init__(
            f"encoding {encoding[:40]!r} is not supported; expected one of: {', '.join(supported)}"
        )


def decode_raw(
    encoding: str, height: int, width: int, step: int, is_bigendian: bool, data: BytesLike
) -> np.ndarray:
    """Return a raw ROS image as (height, width, 3) uint8 RGB.

    `rgb8` is returned as a read-only view of `data`, possibly with padded rows; every other
    encoding gives a new array. 16-bit channels are reduced to their upper 8 bits. YUV is ITU-R
    BT.601 of limited range (16 to 235); alpha is dropped.

    Arguments are the fields of sensor_msgs/Image. The encoding is one of `RAW_ENCODINGS`; the data
    are exactly height * step bytes (NV12 and NV21: height * 3 / 2 * step).

    Raises:
        UnsupportedEncodingError: another encoding.
        ImageError: size, step and length of the data disagree or are out of bounds, rows hold more
            than the pixels of the encoding, or few grey levels of 16 bits would remain in 8.
    """
    if encoding in _PLANAR:
        _check_even(encoding, height, width, both=True)
        luma_and_chroma = _rows(height, width, step, width, data, height * 3 // 2)
        return cv2.cvtColor(luma_and_chroma[:, :width], _PLANAR[encoding])
    if encoding not in _PACKED:
        raise UnsupportedEncodingError(encoding, RAW_ENCODINGS)
    channels, channel_bytes, conversion = _PACKED[encoding]
    row_bytes = width * channels * channel_bytes
    rows = _rows(height, width, step, row_bytes, data, height)
    if channels == 2:
        _check_even(encoding, height, width, both=False)
    if encoding.startswith("bayer") and min(height, width) < 3:
        raise ImageError(
            f"encoding '{encoding}': expected at least 3x3 pixels, found {width}x{height}"
        )
    pixels = rows[:, :row_bytes]
    if channel_bytes > 1:
        deep = np.ascontiguousarray(pixels).view(">u2" if is_bigendian else "<u2")
        pixels = _upper_byte(deep, f"encoding '{encoding}'")
    pixels = pixels.reshape(height, width, channels)
    pixels.flags.writeable = False
    return pixels if conversion is None else cv2.cvtColor(pixels, conversion)


def decode_depth(
    encoding: str, height: int, width: int, step: int, is_bigendian: bool, data: BytesLike
) -> np.ndarray:
    """Return a raw ROS depth image as (height, width) float32 in metres, 0 where unknown.

    32FC1 holds metres, 16UC1 and mono16 millimetres (REP 118). Negative, infinite and NaN values
    become 0. The arguments are those of `decode_raw`.

    Raises:
        UnsupportedEncodingError: another encoding.
        ImageError: size, step and length of the data disagree or are out of bounds.
    """
    if encoding not in _DEPTH:
        raise UnsupportedEncodingError(encoding, DEPTH_ENCODINGS)
    kind, scale = _DEPTH[encoding]
    dtype = np.dtype(f"{'>' if is_bigendian else '<'}{kind}")
    row_bytes = width * dtype.itemsize
    rows = _rows(height, width, step, row_bytes, data, height)
    depth = np.ascontiguousarray(rows[:, :row_bytes]).view(dtype).astype(np.float32)
    depth *= np.float32(scale)
    # Negated: NaN compares false.
    depth[~((depth > 0) & (depth < np.inf))] = 0
    return depth


def decode_compressed(data: BytesLike, format: str = "") -> np.ndarray:
    """Return a compressed image as (height, width, 3) uint8 RGB.

    The format is recognised by content: JPEG, PNG, WebP, BMP, or the first image of a TIFF. Alpha
    is dropped, grey becomes RGB, 16-bit channels are reduced to their upper 8 bits. The orientation
    in EXIF or TIFF is applied, as OpenCV applies that of a video.

    Args:
        data: the whole compressed image.
        format: as in sensor_msgs/CompressedImage, e.g. "jpeg" or "rgb8; jpeg compressed bgr8".

    Raises:
        ImageError: a depth image, another format, truncated or damaged data, floating-point
            channels, few grey levels of 16 bits that would remain in 8, or more than
            `MAX_IMAGE_PIXELS` pixels.
    """
    if "compressedDepth" in format:
        raise ImageError(f"format {format[:60]!r}: expected a colour image, found a depth image")
    content = _as_bytes(data)
    whole = content.tobytes()
    kind, width, height = inspect_image(whole)
    _check_size(height, width)
    # With 16 bits, where there are: OpenCV scales those of a TIFF. Its versions differ in the EXIF
    # that they read.
    flags = cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION | cv2.IMREAD_ANYDEPTH
    try:
        image = cv2.imdecode(content, flags)
    except cv2.error as error:
        raise ImageError(f"{kind} image cannot be decoded: {error.err}") from error
    if image is None:
        raise ImageError(f"{kind} image of {width}x{height} pixels cannot be decoded")
    if image.shape != (height, width, 3):
        raise ImageError(
            f"{kind} image is damaged: expected {width}x{height}, "
            f"decoded {image.shape[1]}x{image.shape[0]}"
        )
    if image.dtype == np.uint16:
        image = _upper_byte(image, f"{kind} image")
    if image.dtype != np.uint8:
        raise ImageError(f"{kind} image: expected 8 or 16 bits per channel, found {image.dtype}")
    if turn := _TURNS.get(_exif_orientation(kind, whole)):
        image = np.ascontiguousarray(turn(image))
    # image_transport: after the semicolon stands the channel order that OpenCV's encoder was given;
    # the encoder takes every order for BGR.
    if "compressed rgb" in format:
        return image
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


def inspect_image(data: bytes) -> tuple[str, int, int]:
    """Return format, width and height in pixels of a whole compressed image, without decoding it.

    Raises:
        ImageError: not a JPEG, PNG, WebP, BMP or TIFF; an unreadable header; or truncated data.
    """
    kinds = {
        "JPEG": (data[:3] == b"\xff\xd8\xff", _inspect_jpeg),
        "PNG": (data[:8] == b"\x89PNG\r\n\x1a\n", _inspect_png),
        "WebP": (data[:4] == b"RIFF" and data[8:12] == b"WEBP", _inspect_webp),
        "BMP": (data[:2] == b"BM", _inspect_bmp),
        "TIFF": (data[:4] in (b"II*\0", b"MM\0*"), _inspect_tiff),
    }
    for kind, (matches, inspect) in kinds.items():
        if matches:
            try:
                width, height, complete = inspect(data)
            except (LookupError, ValueError, struct.error) as error:
                raise ImageError(f"{kind} image is truncated or damaged in its header") from error
            if not complete:
                raise ImageError(f"{kind} image is truncated: {len(data)} bytes, end not found")
            return kind, width, height
    start = f"bytes {data[:4].hex(' ')} ..." if data else "no bytes"
    raise ImageError(f"compressed image: expected JPEG, PNG, WebP, BMP or TIFF, found {start}")


def encode_jpeg(rgb: np.ndarray, quality: int = 90) -> bytes:
    """Return (height, width, 3) uint8 RGB or (height, width) uint8 as JPEG of quality 0 to 100.

    Raises:
        ImageError: another shape or dtype, or too large for JPEG.
    """
    return _encode(".jpg", rgb, [cv2.IMWRITE_JPEG_QUALITY, quality])


def encode_png(rgb: np.ndarray) -> bytes:
    """Return (height, width, 3) uint8 RGB or (height, width) uint8 as PNG.

    Raises:
        ImageError: another shape or dtype.
    """
    return _encode(".png", rgb, [cv2.IMWRITE_PNG_COMPRESSION, 3])


def read_image(path: Path) -> np.ndarray:
    """Return an image file (JPEG, PNG, WebP, BMP, TIFF) as (height, width, 3) uint8 RGB.

    Raises:
        ImageError: the file cannot be read or decoded; names the file.
    """
    try:
        return decode_compressed(read_file(Path(path)))
    except OSError as error:
        raise ImageError(f"image '{path}': {error.strerror}") from error
    except ImageError as error:
        raise ImageError(f"image '{path}': {error}") from error


def write_image(path: Path, rgb: np.ndarray) -> None:
    """Write (height, width, 3) uint8 RGB or (height, width) uint8 as .png, .jpg or .jpeg.

    The file is replaced as a whole; missing parent folders are created.

    Raises:
        ImageError: another suffix, shape or dtype.
        ArtefactError: the file cannot be written; an existing one is unchanged.
    """
    refuse_other_suffix(path)
    atomic_write_bytes(Path(path), _ENCODERS[Path(path).suffix.lower()](rgb))


def refuse_other_suffix(path: Path) -> None:
    """Raise ImageError for the name of a file that `write_image` cannot write."""
    if Path(path).suffix.lower() not in _ENCODERS:
        raise ImageError(f"image '{path}': expected a name ending in .png, .jpg or .jpeg")


_ENCODERS: dict[str, Callable[[np.ndarray], bytes]] = {
    ".png": encode_png,
    ".jpg": encode_jpeg,
    ".jpeg": encode_jpeg,
}


def _upper_byte(values: np.ndarray, what: str) -> np.ndarray:
    """Return the upper 8 bits of uint16 values.

    Raises:
        ImageError: few of the grey levels would remain, as of infrared counts in a part of the
            range: the image would be scored without its content.
    """
    present = np.bincount(values.ravel(), minlength=1 << 16).reshape(256, 256) > 0
    before, after = int(present.sum()), int(present.any(axis=1).sum())
    if after < _FEW_LEVELS and before >= _LOSS * after:
        low, high = int(values.min()), int(values.max())
        raise ImageError(
            f"{what}: expected 16-bit values that fill the range 0 to 65535, found {low} to "
            f"{high}: {after} of {before} grey levels would remain in 8 bits; scale the images to "
            "8 bits by one fixed range, the same for index, calibration and camera"
        )
    return (values >> 8).astype(np.uint8)


def _exif_orientation(kind: str, data: bytes) -> int:
    """Return the EXIF orientation 1 to 8 of a whole JPEG, PNG or WebP, 1 without one."""
    try:
        exif = _EXIF_OF[kind](data) if kind in _EXIF_OF else b""
        exif = exif.removeprefix(b"Exif\0\0")
        order = {b"II*\0": "<", b"MM\0*": ">"}[exif[:4]]
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, type_, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if (tag, type_) == (274, 3):
                return int(value)
    except (LookupError, ValueError, struct.error):
        # Damaged metadata do not concern the pixels.
        pass
    return 1


def _exif_of_jpeg(data: bytes) -> bytes:
    position = 2
    while data[position] == 0xFF and data[position + 1] != 0xDA:
        (length,) = struct.unpack_from(">H", data, position + 2)
        if data[position + 1] == 0xE1 and data[position + 4 : position + 10] == b"Exif\0\0":
            return data[position + 4 : position + 2 + length]
        position += 2 + length
    return b""


def _exif_of_png(data: bytes) -> bytes:
    position = 8
    while position < len(data):
        (length,) = struct.unpack_from(">I", data, position)
        if data[position + 4 : position + 8] == b"eXIf":
            return data[position + 8 : position + 8 + length]
        position += 12 + length
    return b""


def _exif_of_webp(data: bytes) -> bytes:
    position = 12
    while position < len(data):
        (length,) = struct.unpack_from("<I", data, position + 4)
        if data[position : position + 4] == b"EXIF":
            return data[position + 8 : position + 8 + length]
        # Chunks have an even number of bytes.
        position += 8 + length + length % 2
    return b""


_EXIF_OF = {"JPEG": _exif_of_jpeg, "PNG": _exif_of_png, "WebP": _exif_of_webp}


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
    # An end marker before the scan belongs to an embedded preview.
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


def _inspect_tiff(data: bytes) -> tuple[int, int, bool]:
    order = "<" if data[:2] == b"II" else ">"
    (start,) = struct.unpack_from(f"{order}I", data, 4)
    (entries,) = struct.unpack_from(f"{order}H", data, start)
    tags: dict[int, tuple[int, ...]] = {}
    end = start + 2 + 12 * entries
    for entry in range(start + 2, end, 12):
        tag, type_, count = struct.unpack_from(f"{order}HHI", data, entry)
        size, at = count * _TIFF_TYPE_BYTES.get(type_, 0), entry + 8
        # Values of more than four bytes are elsewhere in the file.
        if size > 4:
            (at,) = struct.unpack_from(f"{order}I", data, at)
            end = max(end, at + size)
        if tag in (256, 257, 273, 274, 279, 324, 325) and type_ in (3, 4):
            tags[tag] = struct.unpack_from(f"{order}{count}{'H' if type_ == 3 else 'I'}", data, at)
    (width,), (height,) = tags[256], tags[257]
    # Orientations from 5 on swap the sides.
    if tags.get(274, (1,))[0] > 4:
        width, height = height, width
    # Offsets and lengths of the strips, or else of the tiles.
    chunks = zip(*((tags[273], tags[279]) if 273 in tags else (tags[324], tags[325])), strict=True)
    return width, height, max(end, *(offset + length for offset, length in chunks)) <= len(data)


def _encode(suffix: str, rgb: np.ndarray, options: list[int]) -> bytes:
    colour = rgb.ndim == 3 and rgb.shape[2] == 3
    if rgb.dtype != np.uint8 or 0 in rgb.shape or not (colour or rgb.ndim == 2):
        raise ImageError(
            "image to encode: expected non-empty (height, width, 3) RGB or (height, width), uint8; "
            f"found shape {rgb.shape}, {rgb.dtype}"
        )
    pixels = np.ascontiguousarray(rgb)
    try:
        done, content = cv2.imencode(
            suffix, cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if colour else pixels, options
        )
    except cv2.error as error:
        raise ImageError(f"image of shape {rgb.shape} cannot be encoded: {error.err}") from error
    if not done:
        raise ImageError(f"image of shape {rgb.shape} cannot be encoded as {suffix}")
    return content.tobytes()


def _as_bytes(data: BytesLike) -> np.ndarray:
    try:
        if isinstance(data, np.ndarray):
            return np.ascontiguousarray(data).reshape(-1).view(np.uint8)
        return np.frombuffer(data, np.uint8)
    except (TypeError, ValueError, BufferError) as error:
        raise ImageError(f"image data: expected bytes, found {type(data).__name__}") from error


def _rows(
    height: int, width: int, step: int, row_bytes: int, data: BytesLike, data_rows: int
) -> np.ndarray:
    """Return the bytes as (data_rows, step) uint8 without a copy, all sizes checked."""
    _check_size(height, width)
    if step < row_bytes:
        raise ImageError(
            f"image of {width}x{height} pixels: expected a step of at least {row_bytes} bytes, "
            f"found {step}"
        )
    content = _as_bytes(data)
    if content.size != data_rows * step:
        raise ImageError(
            f"image of {width}x{height} pixels: expected {data_rows * step} bytes "
            f"({data_rows} rows of {step}), found {content.size}"
        )
    rows = content.reshape(data_rows, step)
    # Padding is shorter than a row. A message of wider pixels under another encoding is not padded.
    behind = rows[:, row_bytes:]
    if step >= 2 * row_bytes and (behind != behind[0, 0]).any():
        raise ImageError(
            f"image of {width}x{height} pixels: expected rows of {row_bytes} bytes, found a step "
            f"of {step} bytes with content behind the pixels; is the encoding wrong?"
        )
    return rows


def _check_size(height: int, width: int) -> None:
    if height < 1 or width < 1 or height * width > MAX_IMAGE_PIXELS:
        raise ImageError(
            f"image size: expected 1 to {MAX_IMAGE_PIXELS} pixels, found {width}x{height}"
        )


def _check_even(encoding: str, height: int, width: int, *, both: bool) -> None:
    if width % 2 or (both and height % 2):
        sides = "width and height" if both else "width"
        raise ImageError(f"encoding '{encoding}': expected even {sides}, found {width}x{height}")
