"""Decoding one untrusted picture into a square uint8 array, or a reason why not.

Only raster formats that Pillow decodes in this process are tried, found by content and not by name. Colour profiles are
ignored. 16-bit colour is reduced to its upper 8 bits by Pillow; 16-bit grey keeps its precision until the end.
"""

import hashlib
import io
import re
import struct
import threading
import warnings
import zlib
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFile

# MPO (several photographs in one JPEG) is opened through JPEG. Nothing here runs another program or a script.
FORMATS = ["AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP"]
PILLOW_LIMIT = 178_956_970  # pixels at which Pillow itself refuses a file
MAX_ENLARGEMENT = 8  # a picture that had to be enlarged more than this is too small
DEPTHS = (8, 10, 12, 14, 16)  # bits of grey pictures stored in 16 or 32 bits
ORIENTATION_TAG = 0x0112  # EXIF
TILE_WIDTH_TAG, TILE_LENGTH_TAG = 322, 323  # TIFF
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Rejected(Exception):
    """A picture that is not used. The text is ``kind`` or ``kind: detail`` and goes into the manifest."""


@dataclass(frozen=True)
class Decoded:
    """A usable picture.

    Attributes:
        pixels: uint8 [C, S, S].
        pixel_hash: SHA-256 of the upright pixels at their original size; equal means the same picture.
        note: what had to be decided on the way (bit depth, unreadable EXIF), else "".
    """

    pixels: np.ndarray
    pixel_hash: str
    note: str = ""


def decode(
    data: bytes, *, image_size: int, channels: int, max_pixels: int, bit_depth: int | None = None, name: str = ""
) -> Decoded:
    """Decodes a file, crops the central square and resizes it (Lanczos).

    Transparent pixels show white. Grey stored in more than 8 bits is divided by 2^d - 1, where d is ``bit_depth`` or
    else the smallest of 8, 10, 12, 14, 16 bits that holds the brightest pixel of this picture.

    Args:
        data: the bytes of the file.
        image_size: side S of the result in pixels.
        channels: 1 (luma of ITU-R BT.601) or 3 (grey is replicated).
        max_pixels: more than this, by the header or in any frame or tile, is rejected before anything is decoded.
        name: file name; only its ending matters, and only to name formats that are not read.

    Raises:
        Rejected: for whatever is wrong with the file; no other exception leaves this function.
    """
    try:
        _refuse_medical(data, name)
        with _strict_pillow, _open(data, max_pixels) as image:
            stored = str(image.tile)  # forgotten by load()
            image.load()  # once: after a failed load Pillow hands out a half-decoded picture
            _check_extent(image.size, max_pixels)
            upright, turn_note = _turn(image)
            levels, note = _levels(upright, bit_depth)
        if levels.dtype == np.uint8 and ";16" in stored:
            note = "more than 8 bits per channel, of which the upper 8 are used"
        return _finish(levels, image_size, channels, "; ".join(filter(None, [turn_note, note])))
    except Rejected:
        raise
    except Image.DecompressionBombError:
        raise Rejected(f"too large: more than {PILLOW_LIMIT} pixels") from None
    except MemoryError:
        raise Rejected("broken: needs more memory than there is") from None
    except (
        Exception
    ) as error:  # decoders of untrusted files raise anything: TypeError, struct.error, RecursionError ...
        raise Rejected(f"broken: {_one_line(error)}") from None


def from_array(array: np.ndarray, *, image_size: int, channels: int) -> Decoded:
    """Like `decode`, for a picture that is an array already: uint8 [H, W] or [H, W, 3]."""
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.shape[2:] not in ((), (3,)):
        raise Rejected(f"unsupported pixels: array of {array.dtype} {list(array.shape)}")
    return _finish(np.ascontiguousarray(array), image_size, channels, "")


class _StrictPillow:
    """While anyone is inside, Pillow does not warn and truncated files fail; both are global, hence the count."""

    def __init__(self) -> None:
        self._lock, self._users, self._undo = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                Image.init()
                self._undo.enter_context(warnings.catch_warnings(action="ignore"))
                self._undo.callback(setattr, ImageFile, "LOAD_TRUNCATED_IMAGES", ImageFile.LOAD_TRUNCATED_IMAGES)
                ImageFile.LOAD_TRUNCATED_IMAGES = False
            self._users += 1

    def __exit__(self, *error) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo.close()


_strict_pillow = _StrictPillow()


def _refuse_medical(data: bytes, name: str) -> None:
    if not data:
        raise Rejected("empty file")
    lower = name.lower()
    if data[128:132] == b"DICM" or lower.endswith((".dcm", ".dicom")):
        raise Rejected("DICOM is not supported yet: export it as PNG")
    head = data[:352]
    if data[:2] == b"\x1f\x8b":
        try:
            head = zlib.decompressobj(wbits=31).decompress(data[:4096], 352)
        except zlib.error:
            head = b""
    if head[344:347] in (b"n+1", b"ni1") or head[4:7] in (b"n+2", b"ni2") or lower.endswith((".nii", ".nii.gz")):
        raise Rejected("NIfTI is not supported yet: export slices as PNG")


def _open(data: bytes, max_pixels: int) -> ImageFile.ImageFile:
    """Reads the header only, and refuses what it announces."""
    if data[:4] == b"\0\0\1\0":
        _check_icon(data, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        raise Rejected(f"not a readable image: none of {', '.join(FORMATS)}, or a broken header") from None
    _check_extent(image.size, max_pixels)
    for tile in image.tile:
        left, top, right, bottom = tile[1] or (0, 0, 0, 0)
        _check_extent((right - left, bottom - top), max_pixels)
    tags = getattr(image, "tag_v2", None) or {}
    _check_extent((tags.get(TILE_WIDTH_TAG, 1), tags.get(TILE_LENGTH_TAG, 1)), max_pixels)
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise Rejected(f"multi-page: {frames} pages" if image.format == "TIFF" else f"animated: {frames} frames")
    return image


def _check_icon(data: bytes, max_pixels: int) -> None:
    """Pillow decodes an icon while opening it, so the size of its frames is read here."""
    for entry in range(struct.unpack_from("<H", data, 4)[0]):
        offset = struct.unpack_from("<I", data, 6 + 16 * entry + 12)[0]
        if data[offset : offset + 4] == b"\x89PNG":
            _check_extent(struct.unpack_from(">II", data, offset + 16), max_pixels)
        else:
            width, height = struct.unpack_from("<ii", data, offset + 4)
            _check_extent((abs(width), abs(height) // 2), max_pixels)


def _check_extent(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise Rejected(f"too large: {width} x {height} pixels, more than data.max_pixels={max_pixels}")


def _turn(image: ImageFile.ImageFile) -> tuple[Image.Image, str]:
    """The picture as it is meant to be looked at."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block is no reason to lose a good picture
        return image, "unreadable EXIF, not turned"
    turn = TURNS.get(orientation) if isinstance(orientation, int) else None
    return (image if turn is None else image.transpose(turn)), ""


def _levels(image: Image.Image, bit_depth: int | None) -> tuple[np.ndarray, str]:
    """Pixels as uint8 [H, W] or [H, W, 3] in 0..255, or float32 [H, W] in 0..255 from deeper grey; and a note."""
    if image.mode == "I" or image.mode.startswith("I;"):
        return _deep_levels(np.asarray(image), bit_depth)
    if image.mode == "F":
        raise Rejected("unsupported pixels: floating point, of unknown range")
    grey = image.mode in ("1", "L", "LA", "La")
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("L" if grey else "RGB")), ""


def _deep_levels(values: np.ndarray, bit_depth: int | None) -> tuple[np.ndarray, str]:
    low, high = int(values.min()), int(values.max())
    depth = bit_depth or next((d for d in DEPTHS if high < 2**d), None)
    if low < 0:
        raise Rejected(f"unsupported pixels: negative values, from {low}")
    if depth is None or high >= 2**depth:
        raise Rejected(f"unsupported pixels: values up to {high}, more than {depth or DEPTHS[-1]} bits hold")
    return values.astype(np.float32) * np.float32(
        255 / (2**depth - 1)
    ), f"grey of more than 8 bits read as {depth} bits"


def _finish(levels: np.ndarray, image_size: int, channels: int, note: str) -> Decoded:
    """Hash, central square, resize, channels."""
    height, width = levels.shape[:2]
    if min(height, width) * MAX_ENLARGEMENT < image_size:
        raise Rejected(f"too small: {width} x {height} pixels for data.image_size={image_size}")
    digest = hashlib.sha256(f"{levels.dtype.kind}{levels.shape}".encode())
    digest.update(levels.astype(levels.dtype.newbyteorder("<"), copy=False).tobytes())
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(np.ascontiguousarray(levels[top : top + side, left : left + side]))
    if square.mode == "RGB" and channels == 1:
        square = square.convert("L")
    square = square.resize((image_size, image_size), Image.Resampling.LANCZOS)
    pixels = np.asarray(square)
    if pixels.dtype == np.float32:
        pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    pixels = np.ascontiguousarray(np.broadcast_to(pixels, (channels, image_size, image_size)))
    return Decoded(pixels, digest.hexdigest(), note)


def _one_line(error: Exception) -> str:
    """An error's text without line breaks, control characters and memory addresses: the same in every run."""
    text = re.sub(r"[\x00-\x1f\x7f]+", " ", f"{type(error).__name__} {error}")
    return re.sub(r"\s*\bat 0x[0-9a-f]+|<[^<>]*>", "", text).strip()[:120]
