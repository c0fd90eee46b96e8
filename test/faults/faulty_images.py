"""Image messages with one fault each, and what a correct decoder makes of them.

The references are computed here from the pixels, not by the package.
"""

from __future__ import annotations

import struct
import zlib
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from sensor_msgs.msg import CompressedImage, Image
from worlds.ros import nominal_image, odd_image

Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class FaultyImage:
    """A message with a fault.

    Attributes:
        message: without a stamp.
        pixels: (height, width, 3) RGB that it shows; None: any, as of altered bits.
        tolerance: largest mean difference of `pixels` in grey levels.
    """

    message: Any
    pixels: np.ndarray | None = None
    tolerance: float = 0.0


@dataclass(frozen=True)
class ImageFault:
    """A kind of fault.

    Attributes:
        fault_class: what is wrong.
        name: of this member of the class.
        make: takes a generator and (height, width, 3) RGB pixels.
        is_bad: the message must be refused; None: it may be.
        names: what the reason names, one of these.
        compressed: the message is a CompressedImage.
        seeds: how often it is worth while.
    """

    fault_class: str
    name: str
    make: Callable[[Rng, np.ndarray], FaultyImage] = field(repr=False)
    is_bad: bool | None = False
    names: tuple[str, ...] = ()
    compressed: bool = False
    seeds: int = 1


def scene(seed: int) -> np.ndarray:
    """Return a nominal image for even seeds, an odd one for others."""
    return odd_image(seed) if seed % 2 else nominal_image(seed)


def image_faults() -> list[ImageFault]:
    """Return all kinds of faults of single images."""
    return [*_known(), *_unknown(), *_lying(), *_sizes(), *_compressed()]


def raw(
    encoding: str, pixels: np.ndarray, *, big_endian: bool = False, padding: bytes = b""
) -> Image:
    """Return a raw message; `padding` follows each row."""
    height, width = pixels.shape[:2]
    rows = np.ascontiguousarray(pixels).view(np.uint8).reshape(height, -1)
    if padding:
        rows = np.hstack([rows, np.tile(np.frombuffer(padding, np.uint8), (height, 1))])
    message = Image(height=height, width=width, encoding=encoding, is_bigendian=int(big_endian))
    message.step = rows.shape[1]
    message.data = array("B", rows.tobytes())
    return message


def compressed(data: bytes, format: str) -> CompressedImage:
    """Return a compressed message."""
    return CompressedImage(format=format, data=array("B", data))


def encoded(suffix: str, rgb: np.ndarray, *options: int) -> bytes:
    """Return pixels (RGB, RGBA or grey) as a file."""
    if rgb.ndim == 3:
        rgb = cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR if rgb.shape[2] == 3 else cv2.COLOR_RGBA2BGRA)
    done, content = cv2.imencode(suffix, rgb, list(options))
    assert done
    return content.tobytes()


def _grey(rgb: np.ndarray) -> np.ndarray:
    return (rgb.astype(np.float32) @ np.float32([0.299, 0.587, 0.114])).astype(np.uint8)


def _three(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey[..., None], 3, axis=2)


def _mosaic(rgb: np.ndarray, pattern: str) -> np.ndarray:
    mosaic = np.empty(rgb.shape[:2], np.uint8)
    for place, colour in enumerate(pattern):
        row, col = divmod(place, 2)
        mosaic[row::2, col::2] = rgb[row::2, col::2, "rgb".index(colour)]
    return mosaic


def _yuv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return Y, U and V by BT.601 of limited range, all of full size, float."""
    r, g, b = np.moveaxis(rgb.astype(np.float64) / 255, -1, 0)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    return 16 + 219 * y, 128 + 224 * (b - y) / 1.772, 128 + 224 * (r - y) / 1.402


def _rounded(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


# A channel order that shows which channel is which, in every encoding.
def _layouts(rgb: np.ndarray, rng: Rng) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return for each packed encoding without its bits: the channels, and the RGB they show."""
    grey = _grey(rgb)
    alpha = rng.integers(0, 256, (*rgb.shape[:2], 1), np.uint8)
    bgr = rgb[..., ::-1]
    return {
        "rgb{}": (rgb, rgb),
        "bgr{}": (bgr, rgb),
        "rgba{}": (np.concatenate([rgb, alpha], -1), rgb),
        "bgra{}": (np.concatenate([bgr, alpha], -1), rgb),
        "mono{}": (grey, _three(grey)),
        "{}UC1": (grey, _three(grey)),
        "{}UC3": (bgr, rgb),
        "{}UC4": (np.concatenate([bgr, alpha], -1), rgb),
    }


def _deep(values: np.ndarray, rng: Rng, order: str) -> np.ndarray:
    """Return 8-bit values as 16-bit ones with random lower bytes."""
    low = rng.integers(0, 256, values.shape, np.uint16)
    return (values.astype(np.uint16) * 256 + low).astype(f"{order}u2")


def _known() -> Iterator[ImageFault]:
    rgb = nominal_image(0)
    for template in _layouts(rgb, np.random.default_rng(0)):

        def shallow(rng: Rng, rgb: np.ndarray, template: str = template) -> FaultyImage:
            channels, shown = _layouts(rgb, rng)[template]
            return FaultyImage(raw(template.format(8), channels), shown)

        yield ImageFault("encoding known", template.format(8), shallow)
        for order, text in (("<", "little-endian"), (">", "big-endian")):

            def deep(
                rng: Rng, rgb: np.ndarray, template: str = template, order: str = order
            ) -> FaultyImage:
                channels, shown = _layouts(rgb, rng)[template]
                message = raw(
                    template.format(16), _deep(channels, rng, order), big_endian=order == ">"
                )
                return FaultyImage(message, shown)

            yield ImageFault(f"16 bits {text}", template.format(16), deep)
    for pattern in ("rggb", "bggr", "gbrg", "grbg"):
        for bits in (8, 16):

            def bayer(
                rng: Rng, rgb: np.ndarray, pattern: str = pattern, bits: int = bits
            ) -> FaultyImage:
                # Interpolation cannot restore noise.
                rgb = cv2.GaussianBlur(rgb, (0, 0), 2.0)
                mosaic = _mosaic(rgb, pattern)
                values = mosaic if bits == 8 else _deep(mosaic, rng, "<")
                return FaultyImage(raw(f"bayer_{pattern}{bits}", values), rgb, tolerance=3.0)

            yield ImageFault("Bayer", f"bayer_{pattern}{bits}", bayer)
    for encoding in ("uyvy", "yuv422", "yuyv", "yuv422_yuy2", "nv12", "nv21"):

        def yuv(_: Rng, rgb: np.ndarray, encoding: str = encoding) -> FaultyImage:
            rgb = cv2.GaussianBlur(rgb, (0, 0), 2.0)
            y, u, v = _yuv(rgb)
            height, width = y.shape
            if encoding.startswith("nv"):
                halves = [(c[::2, ::2] + c[1::2, 1::2]) / 2 for c in (u, v)]
                order = halves if encoding == "nv12" else halves[::-1]
                chroma = np.stack(order, -1).reshape(height // 2, width)
                message = raw(encoding, _rounded(np.vstack([y, chroma])))
                message.height = height
                return FaultyImage(message, rgb, tolerance=3.0)
            pairs = np.stack([y, y], -1)
            chroma = np.empty_like(y)
            chroma[:, ::2], chroma[:, 1::2] = u[:, ::2], v[:, ::2]
            order_of = (chroma, y) if encoding in ("uyvy", "yuv422") else (y, chroma)
            pairs = np.stack(order_of, -1)
            return FaultyImage(raw(encoding, _rounded(pairs)), rgb, tolerance=3.0)

        yield ImageFault("YUV", encoding, yuv)


def _unknown() -> Iterator[ImageFault]:
    names = {
        "empty": "",
        "depth": "32FC1",
        "signed": "8SC3",
        "video": "h264",
        "12-bit Bayer": "bayer_rggb12",
        "upper case": "RGB8",
        "trailing space": "rgb8 ",
        "very long": "x" * 100_000,
        "several lines": "rgb8\nerror: none",
        "not ASCII": "rgb\uff18",
        "control characters": "rgb8\x1b[2J",
    }
    for name, encoding in names.items():

        def make(_: Rng, rgb: np.ndarray, encoding: str = encoding) -> FaultyImage:
            return FaultyImage(raw(encoding, rgb))

        yield ImageFault("encoding unknown", name, make, True, ("encoding",))


def _lying() -> Iterator[ImageFault]:
    def relabelled(encoding: str, channels: Callable[[np.ndarray, Rng], np.ndarray]) -> Any:
        def make(rng: Rng, rgb: np.ndarray) -> FaultyImage:
            return FaultyImage(raw(encoding, channels(rgb, rng)))

        return make

    def rgba(rgb: np.ndarray, rng: Rng) -> np.ndarray:
        return _layouts(rgb, rng)["rgba{}"][0]

    lies = {
        "colour as mono8": ("mono8", lambda rgb, rng: rgb),
        "colour as Bayer": ("bayer_rggb8", lambda rgb, rng: rgb),
        "colour as nv12": ("nv12", lambda rgb, rng: rgb),
        "colour with alpha as mono8": ("mono8", rgba),
        "16 bits as mono8": ("mono8", lambda rgb, rng: _deep(_grey(rgb), rng, "<")),
        "16-bit colour as rgb8": ("rgb8", lambda rgb, rng: _deep(rgb, rng, "<")),
        "YUV as mono8": ("mono8", lambda rgb, rng: rgb[..., :2]),
        "grey as rgb8": ("rgb8", lambda rgb, rng: _grey(rgb)),
        "colour as rgba8": ("rgba8", lambda rgb, rng: rgb),
        "8 bits as mono16": ("mono16", lambda rgb, rng: _grey(rgb)),
        "grey as nv12": ("nv12", lambda rgb, rng: _grey(rgb)),
    }
    for name, (encoding, channels) in lies.items():
        make = relabelled(encoding, channels)
        yield ImageFault("encoding lying", name, make, True, ("bytes", "encoding"), seeds=2)

    def infrared(rng: Rng, rgb: np.ndarray) -> FaultyImage:
        counts = _grey(rgb).astype(np.uint16) * 4
        return FaultyImage(raw("mono16", counts))

    name = "counts 0 to 1020"
    yield ImageFault(
        "16 bits in part of the range", name, infrared, True, ("grey levels",), seeds=2
    )


def _sizes() -> Iterator[ImageFault]:
    def changed(fault_class: str, name: str, seeds: int = 1, **fields: Any) -> ImageFault:
        def make(rng: Rng, rgb: np.ndarray) -> FaultyImage:
            message = raw("rgb8", rgb)
            for key, value in fields.items():
                value = value(message, rng) if callable(value) else value
                setattr(message, key, value)
            return FaultyImage(message)

        names = ("size", "step", "bytes")
        return ImageFault(fault_class, name, make, True, names, seeds=seeds)

    yield changed("step too small", "0", step=0)
    yield changed("step too small", "by 1", step=lambda m, _: m.step - 1)
    yield changed("step too small", "of one channel", step=lambda m, _: m.width)
    yield changed(
        *("step too small", "by 1, data of this step"),
        step=lambda m, _: m.step - 1,
        data=lambda m, _: m.data[: m.height * m.step],
    )
    yield changed("step too large", "by 1", step=lambda m, _: m.step + 1)
    yield changed("step too large", "2^32 - 1", step=2**32 - 1)
    yield changed("size zero", "height", height=0)
    yield changed("size zero", "width", width=0)
    yield changed("size zero", "both, no data", height=0, width=0, step=0, data=array("B"))
    yield changed("size huge", "height 2^32 - 1", height=2**32 - 1)
    yield changed("size huge", "width 2^32 - 1", width=2**32 - 1)
    yield changed("size huge", "both 2^16", height=2**16, width=2**16, step=3 * 2**16)
    yield changed("size huge", "product overflows", height=2**31, width=2**31, step=2**31)
    yield changed("size wrong", "sides swapped", height=lambda m, _: m.width, width=84)
    yield changed("size wrong", "one row more", height=lambda m, _: m.height + 1)
    yield changed("size wrong", "one row less", height=lambda m, _: m.height - 1)
    yield changed("data short", "by 1 byte", data=lambda m, _: m.data[:-1])
    yield changed("data short", "by one row", data=lambda m, _: m.data[: -m.step])
    yield changed(
        "data short", "anywhere", 4, data=lambda m, rng: m.data[: rng.integers(1, len(m.data))]
    )
    yield changed("data empty", "empty", data=array("B"))
    yield changed("data long", "by 1 byte", data=lambda m, _: m.data + array("B", b"\0"))
    yield changed("data long", "by one row", data=lambda m, _: m.data + m.data[: m.step])
    yield changed("data long", "twice", data=lambda m, _: m.data + m.data)

    for count in (1, 4, 60, 4096):

        def padded(rng: Rng, rgb: np.ndarray, count: int = count) -> FaultyImage:
            # Padding is not initialised; of a whole row's length it is empty.
            padding = rng.bytes(count) if count < 100 else bytes(count)
            return FaultyImage(raw("rgb8", rgb, padding=padding), rgb)

        yield ImageFault("step padded", f"{count} bytes", padded)

    def odd_nv12(rng: Rng, rgb: np.ndarray) -> FaultyImage:
        message = raw("nv12", np.zeros((126, 140), np.uint8))
        message.height, message.width = 83, 139
        return FaultyImage(message)

    def odd_yuv(rng: Rng, rgb: np.ndarray) -> FaultyImage:
        return FaultyImage(raw("uyvy", rgb[:, :-1, :2]))

    def small_bayer(rng: Rng, rgb: np.ndarray) -> FaultyImage:
        return FaultyImage(raw("bayer_rggb8", rgb[:2, :2, 0]))

    yield ImageFault("size wrong", "nv12 of odd sides", odd_nv12, True, ("even",))
    yield ImageFault("size wrong", "uyvy of odd width", odd_yuv, True, ("even",))
    yield ImageFault("size wrong", "Bayer of 2x2", small_bayer, True, ("pixels",))


def _png(width: int, height: int, data: bytes, *chunks: bytes) -> bytes:
    """Return a PNG of 8-bit grey with given image data and further chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    parts = [(b"IHDR", header), *((c[:4], c[4:]) for c in chunks), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in parts
    )


def _deflated_zeros(count: int) -> bytes:
    packer, block = zlib.compressobj(9), bytes(1 << 20)
    parts = [packer.compress(block) for _ in range(count >> 20)]
    return b"".join([*parts, packer.compress(bytes(count & 0xFFFFF)), packer.flush()])


def _files(rgb: np.ndarray) -> dict[str, bytes]:
    return {
        "jpeg": encoded(".jpg", rgb, cv2.IMWRITE_JPEG_QUALITY, 95),
        "progressive jpeg": encoded(".jpg", rgb, cv2.IMWRITE_JPEG_PROGRESSIVE, 1),
        "png": encoded(".png", rgb),
        "webp": encoded(".webp", rgb, cv2.IMWRITE_WEBP_QUALITY, 101),
        "lossy webp": encoded(".webp", rgb, cv2.IMWRITE_WEBP_QUALITY, 90),
        "bmp": encoded(".bmp", rgb),
        "tiff": encoded(".tiff", rgb),
    }


# Of JPEG and WebP with losses. The pixels are noise, which such formats keep worst.
_TOLERANCES = {"jpeg": 16.0, "progressive jpeg": 16.0, "lossy webp": 16.0}
_FORMATS = {"jpeg": "rgb8; jpeg compressed bgr8", "png": "rgb8; png compressed bgr8"}


def _compressed() -> Iterator[ImageFault]:
    def fault(
        fault_class: str, name: str, make: Any, is_bad: bool | None, *names: str, seeds: int = 1
    ) -> ImageFault:
        return ImageFault(fault_class, name, make, is_bad, names, compressed=True, seeds=seeds)

    kinds = list(_files(nominal_image(0)))
    for kind in kinds:

        def whole(_: Rng, rgb: np.ndarray, kind: str = kind) -> FaultyImage:
            message = compressed(_files(rgb)[kind], _FORMATS.get(kind, kind))
            return FaultyImage(message, rgb, _TOLERANCES.get(kind, 0.0))

        def truncated(rng: Rng, rgb: np.ndarray, kind: str = kind) -> FaultyImage:
            data = _files(rgb)[kind]
            message = compressed(data[: rng.integers(1, len(data) - 2)], kind)
            return FaultyImage(message)

        def flipped(rng: Rng, rgb: np.ndarray, kind: str = kind) -> FaultyImage:
            data = bytearray(_files(rgb)[kind])
            data[rng.integers(0, len(data))] ^= 1 << rng.integers(0, 8)
            return FaultyImage(compressed(bytes(data), kind))

        def zeroed(rng: Rng, rgb: np.ndarray, kind: str = kind) -> FaultyImage:
            data = bytearray(_files(rgb)[kind])
            begin = int(rng.integers(0, len(data) - 64))
            data[begin : begin + 64] = bytes(64)
            return FaultyImage(compressed(bytes(data), kind))

        yield fault("compressed", kind, whole, False)
        yield fault("compressed truncated", kind, truncated, True, "truncated", seeds=4)
        yield fault("compressed bits flipped", kind, flipped, None, seeds=4)
        yield fault("compressed block zeroed", kind, zeroed, None, seeds=2)
    for written, said in (("png", "jpeg"), ("jpeg", "png"), ("bmp", ""), ("jpeg", "x" * 10_000)):

        def wrong(_: Rng, rgb: np.ndarray, written: str = written, said: str = said) -> FaultyImage:
            return FaultyImage(
                compressed(_files(rgb)[written], said), rgb, _TOLERANCES.get(written, 0.0)
            )

        name = f"{written} as {said[:10] or 'nothing'}"
        yield fault("compressed with the wrong format", name, wrong, False)
    contents = {
        "nothing": b"",
        "one byte": b"\xff",
        "text": b"no image, sorry",
        "GIF": b"GIF89a\x8c\0T\0\x80\0\0" + bytes(100),
        "SVG": b"<svg xmlns='http://www.w3.org/2000/svg' width='140' height='84'/>",
        "JPEG start and end": b"\xff\xd8\xff\xd9",
        "PNG signature": b"\x89PNG\r\n\x1a\n",
        "zeros": bytes(5000),
    }
    for name, data in contents.items():

        def other(_: Rng, rgb: np.ndarray, data: bytes = data) -> FaultyImage:
            return FaultyImage(compressed(data, "jpeg"))

        yield fault("compressed other content", name, other, True, "image")

    def noise(rng: Rng, rgb: np.ndarray) -> FaultyImage:
        return FaultyImage(compressed(rng.bytes(5000), "png"))

    def depth(_: Rng, rgb: np.ndarray) -> FaultyImage:
        message = compressed(bytes(12) + _files(rgb)["png"], "16UC1; compressedDepth png")
        return FaultyImage(message)

    yield fault("compressed other content", "noise", noise, True, "image")
    yield fault("compressed other content", "depth", depth, True, "depth")

    def claims(kind: str, change: Callable[[bytearray], None]) -> ImageFault:
        def make(_: Rng, rgb: np.ndarray) -> FaultyImage:
            data = bytearray(_files(rgb)[kind])
            change(data)
            return FaultyImage(compressed(bytes(data), kind))

        name = f"{kind} that claims a huge size"
        return fault("compressed bomb", name, make, True, "image size", "damaged")

    def jpeg_size(data: bytearray) -> None:
        at = next(i for i in range(len(data)) if data[i : i + 2] in (b"\xff\xc0", b"\xff\xc2"))
        data[at + 5 : at + 9] = struct.pack(">HH", 60_000, 60_000)

    def png_size(data: bytearray) -> None:
        data[16:24] = struct.pack(">II", 30_000, 30_000)
        data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))

    def bmp_size(data: bytearray) -> None:
        data[18:26] = struct.pack("<ii", 30_000, 30_000)

    yield claims("jpeg", jpeg_size)
    yield claims("png", png_size)
    yield claims("bmp", bmp_size)

    def real(side: int) -> Any:
        def make(_: Rng, rgb: np.ndarray) -> FaultyImage:
            data = _png(side, side, _deflated_zeros(side * (side + 1)))
            return FaultyImage(compressed(data, "png"))

        return make

    def text_chunk(_: Rng, rgb: np.ndarray) -> FaultyImage:
        grey = _grey(rgb)
        rows = b"".join(b"\0" + row.tobytes() for row in grey)
        bomb = b"zTXtcomment\0\0" + _deflated_zeros(200_000_000)
        data = _png(grey.shape[1], grey.shape[0], zlib.compress(rows), bomb)
        return FaultyImage(compressed(data, "png"), _three(grey))

    name = "PNG of 13000x13000 zeros"
    yield fault("compressed bomb", name, real(13_000), True, "image size")
    yield fault("compressed bomb", "text of 200 MB in a PNG", text_chunk, None)
