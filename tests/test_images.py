"""Decoding untrusted pictures: every file of the collection has its verdict, numbers come from closed forms or PIL."""

import gzip
import io
import struct
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageFile

from train.images import Rejected, decode, from_array

SETTINGS = {"image_size": 8, "channels": 1, "max_pixels": 64_000_000}

VERDICTS = {  # None: usable; else the beginning of the reason
    "truncated_jpeg.jpg": "broken: OSError image file is truncated",
    "truncated_image.png": "broken: OSError image file is truncated",
    "broken.png": "not a readable image",
    "broken_data_stream.png": "broken: OSError unrecognized data stream",
    "invalid-exif.jpg": None,
    "exif_typeerror.jpg": None,
    "exif-dpi-zerodivision.jpg": None,
    "multiple_exif.jpg": None,
    "decompression_bomb.gif": "too large",
    "decompression_bomb_extents.gif": "animated: 2 frames",
    "oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": "not a readable image",
    "timeout-6646305047838720": "broken: OSError image file is truncated",
    "crash-2020-10-test.tif": "broken: TypeError",
    "crash-0c7e0e8e11ce787078f00b5b0ca409a167f070e0.tif": "broken: OSError decoder error",
    "zero_width.gif": "not a readable image",
    "no_palette.gif": "animated: 2 frames",
    "apng__syntax_num_frames_zero.png": "broken: OSError",
    "hopper_zero_comment_subblocks.gif": None,
    "bmp__b__badwidth.bmp": "too large",
    "bmp__b__badrle.bmp": None,
    "not_enough_data.jp2": "not a readable image",
    "hopper.jpg": None,
    "hopper.png": None,
    "hopper.gif": None,
    "hopper.webp": None,
    "pil_sample_cmyk.jpg": None,
    "16bit.cropped.tif": None,
    "12in16bit.tif": None,
    "apng__delay.png": "animated: 5 frames",
    "duplicate_frame.gif": "animated: 3 frames",
    "test-card-lossless.jp2": None,
    "avif__exif.avif": None,
    "hopper_orientation_6.jpg": None,
    "transparent.png": None,
    "hopper_gray.jpg": None,
    "python.ico": None,
}


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def reason(data: bytes, **settings) -> str:
    with pytest.raises(Rejected) as caught:
        decode(data, **{**SETTINGS, **settings})
    return str(caught.value)


@pytest.mark.parametrize(("name", "expected"), VERDICTS.items(), ids=VERDICTS)
def test_verdict_on_every_bad_image(shared, name, expected):
    data = (shared / "bad_images" / name).read_bytes()
    if expected is None:
        assert decode(data, name=name, **SETTINGS).pixels.shape == (1, 8, 8)
    else:
        text = reason(data, name=name)
        assert text.startswith(expected)
        assert "\n" not in text and "0x" not in text


def test_verdicts_cover_the_collection(shared):
    names = {path.name for path in (shared / "bad_images").iterdir()} - {"LICENSE", "manifest.jsonl"}
    assert names == set(VERDICTS)


def test_dicom_is_named_with_and_without_its_magic_number(shared):
    for path in [*(shared / "dicom").glob("*.dcm"), *(p for p in (shared / "dicom/tree").rglob("*") if p.is_file())]:
        assert reason(path.read_bytes(), name=path.name).startswith("DICOM is not supported yet")


def test_nifti_is_named_by_content():
    header = bytearray(352)
    header[344:348] = b"n+1\0"
    for data in (bytes(header), gzip.compress(bytes(header))):
        assert reason(data).startswith("NIfTI is not supported yet")
    assert reason(b"anything", name="scan.nii.gz").startswith("NIfTI")
    assert reason(b"\x1f\x8b broken gzip").startswith("not a readable image")


def test_sixteen_bit_grey_is_scaled_by_the_depth_that_holds_it():
    values = np.full((16, 16), 1023, dtype=np.uint16)
    values[:, 8:] = 300
    image = encoded(Image.fromarray(values))
    auto, fixed = decode(image, **SETTINGS), decode(image, bit_depth=12, **SETTINGS)
    assert auto.pixels[0, 4, 0] == 255 and auto.pixels[0, 4, 7] == round(300 / 1023 * 255)
    assert fixed.pixels[0, 4, 0] == round(1023 / 4095 * 255) and fixed.pixels[0, 4, 7] == round(300 / 4095 * 255)
    assert "10 bits" in auto.note and "12 bits" in fixed.note
    assert reason(image, bit_depth=8).startswith("unsupported pixels: values up to 1023")


def test_sixteen_bit_grey_is_resized_before_it_is_rounded():
    ramp = np.tile(np.arange(64, dtype=np.uint16)[None] * 4 + 256, (64, 1))  # 9 bits, read as 10
    exact = np.asarray(Image.fromarray(ramp.astype(np.float32)).resize((8, 8), Image.Resampling.LANCZOS)) / 1023 * 255
    pixels = decode(encoded(Image.fromarray(ramp)), **SETTINGS).pixels[0]
    assert np.abs(pixels - exact).max() <= 0.51


def test_signed_and_floating_point_pixels_are_rejected():
    negative = Image.fromarray(np.full((9, 9), -3, dtype=np.int32))
    assert reason(encoded(negative, "TIFF")) == "unsupported pixels: negative values, from -3"
    assert reason(encoded(Image.new("F", (9, 9), 0.5), "TIFF")).startswith("unsupported pixels: floating point")
    deep = Image.fromarray(np.full((9, 9), 70000, dtype=np.int32))
    assert "70000" in reason(encoded(deep, "TIFF"))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_once(orientation, kind):
    upright = np.zeros((16, 16), dtype=np.uint8)
    upright[:8, :8], upright[:8, 8:], upright[8:, :8] = 240, 160, 80
    inverse = {  # how a camera stores the upright picture, EXIF 2.3, tag 274
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: np.transpose, 6: np.rot90, 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1),
    }  # fmt: skip
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(inverse[orientation](upright)))
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels = decode(encoded(image, kind, exif=exif, **options), **SETTINGS).pixels[0]
    centres = pixels[[1, 1, 6, 6], [1, 6, 1, 6]].astype(int)
    assert np.abs(centres - [240, 160, 80, 0]).max() <= 6


def test_colour_becomes_luma_and_grey_is_replicated():
    red = decode(encoded(Image.new("RGB", (9, 9), (255, 0, 0))), **SETTINGS)
    assert np.all(red.pixels == 76)  # 0.299 * 255
    grey = decode(encoded(Image.new("L", (9, 9), 77)), **{**SETTINGS, "channels": 3})
    assert grey.pixels.shape == (3, 8, 8) and np.all(grey.pixels == 77)
    cmyk = decode(encoded(Image.new("CMYK", (9, 9), (0, 255, 255, 0)), "TIFF"), **{**SETTINGS, "channels": 3})
    assert cmyk.pixels[:, 0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pixels_show_white(mode):
    image = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
    image.paste((0, 0, 0, 128), (8, 0, 16, 16))
    options = {"transparency": 0} if mode == "P" else {}
    image = Image.new("P", (16, 16), 0) if mode == "P" else image.convert(mode)
    pixels = decode(encoded(image, **options), **SETTINGS).pixels[0]
    assert pixels[4, 1] == 255
    assert mode == "P" or abs(int(pixels[4, 6]) - 127) <= 1


def test_the_central_square_is_used():
    wide = np.zeros((8, 24), dtype=np.uint8)
    wide[:, 8:16] = 200
    assert np.all(decode(encoded(Image.fromarray(wide)), **SETTINGS).pixels == 200)
    assert np.all(decode(encoded(Image.fromarray(wide.T)), **SETTINGS).pixels == 200)


def test_same_size_is_untouched_and_hashes_compare_pixels_not_files():
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    settings = {**SETTINGS, "channels": 3}
    png, bmp = (decode(encoded(Image.fromarray(noise), kind), **settings) for kind in ("PNG", "BMP"))
    assert np.array_equal(png.pixels, noise.transpose(2, 0, 1))
    assert png.pixel_hash == bmp.pixel_hash == from_array(noise, image_size=8, channels=3).pixel_hash
    other = noise.copy()
    other[0, 0, 0] ^= 1
    assert decode(encoded(Image.fromarray(other)), **settings).pixel_hash != png.pixel_hash
    flat = [decode(encoded(Image.new("L", size, 9)), **SETTINGS).pixel_hash for size in ((8, 16), (16, 8))]
    assert flat[0] != flat[1]


def test_pixels_are_counted_before_decoding():
    image = encoded(Image.new("L", (100, 100)))
    assert decode(image, **{**SETTINGS, "max_pixels": 10_000}).pixels.shape == (1, 8, 8)
    assert reason(image, max_pixels=9_999).startswith("too large: 100 x 100")


def test_an_icon_cannot_hide_a_large_frame():
    png = encoded(Image.new("L", (300, 300)))
    icon = struct.pack("<HHH", 0, 1, 1) + struct.pack("<BBBBHHII", 16, 16, 0, 0, 1, 8, len(png), 22) + png
    assert reason(icon, max_pixels=50_000).startswith("too large: 300 x 300")


def test_tiny_and_multi_page_pictures_are_rejected():
    assert (
        reason(encoded(Image.new("L", (3, 100))), image_size=32) == "too small: 3 x 100 pixels for data.image_size=32"
    )
    assert decode(encoded(Image.new("L", (4, 100))), **{**SETTINGS, "image_size": 32}).pixels.shape == (1, 32, 32)
    pages = encoded(Image.new("L", (9, 9)), "TIFF", save_all=True, append_images=[Image.new("L", (9, 9), 9)])
    assert reason(pages) == "multi-page: 2 pages"


def test_pillow_is_left_as_it_was(monkeypatch, shared):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    data = [path.read_bytes() for path in sorted((shared / "bad_images").iterdir())] * 4

    def verdict(one: bytes) -> str:
        try:
            return decode(one, **SETTINGS).pixel_hash
        except Rejected as error:
            return str(error)

    before = list(warnings.filters)
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(verdict, data))
    assert verdicts[: len(data) // 4] * 4 == verdicts
    assert "truncated" in verdict((shared / "bad_images/truncated_jpeg.jpg").read_bytes())
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True and warnings.filters == before


@pytest.mark.parametrize("error", [RecursionError, MemoryError, ZeroDivisionError, struct.error, AttributeError])
def test_nothing_but_rejected_escapes(monkeypatch, error):
    def fail(*args, **kwargs):
        raise error("<object at 0x7f00> in\nturn")

    monkeypatch.setattr(Image, "open", fail)
    text = reason(encoded(Image.new("L", (9, 9))))
    assert text.startswith("broken: ") and "0x" not in text and "\n" not in text


def test_random_damage_is_always_a_verdict():
    random = np.random.default_rng(0)
    noise = Image.fromarray(random.integers(0, 256, (24, 24, 3), dtype=np.uint8))
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "ICO", "JPEG2000", "PPM"):
        good = np.frombuffer(encoded(noise, kind), dtype=np.uint8)
        for _ in range(25):
            bad = good.copy()
            bad[random.integers(0, min(len(bad), 200), 4)] = random.integers(0, 256, 4)
            try:
                assert decode(bad.tobytes(), **{**SETTINGS, "max_pixels": 10**6}).pixels.shape == (1, 8, 8)
            except Rejected as error:
                assert str(error)
