"""One image file: every format and kind of picture, damaged ones among them."""

from __future__ import annotations

import functools
import io
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import folder_source, picture
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from lwm.images import files
from lwm.runtime.errors import InputError, import_opencv


def image_or_the_one_error(path: Path) -> np.ndarray | None:
    """A damaged file's pixels, or None where it was refused with its name."""
    try:
        pixels = files.decode_image(path, 16)
    except InputError as error:
        assert str(path) in str(error)
        return None
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    return pixels


def decoded(path: Path, size: int = 16) -> np.ndarray:
    """decode_image, checked for its kind, as (size, size, 3)."""
    pixels = files.decode_image(path, size)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, size, size)
    return pixels.transpose(1, 2, 0).astype(int)


def close(one: np.ndarray, other: np.ndarray, by: float) -> None:
    assert np.abs(one - np.asarray(other, dtype=int)).max() <= by


# Damaged files ------------------------------------------------------------------------------------------------------


@functools.cache
def encoded(image_format: str) -> bytes:
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(1, 24, 20)).save(
        file, image_format, **({} if image_format in ("BMP", "GIF", "DDS") else {"exif": exif})
    )
    return file.getvalue()


@given(
    image_format=st.sampled_from(["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"]),
    cut=st.floats(0, 1),
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=8),
)
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_gives_an_image_or_the_one_error(tmp_path_factory, image_format, cut, changes):
    content = bytearray(encoded(image_format))
    for where, value in changes:
        content[int(where * len(content))] = value
    path = tmp_path_factory.getbasetemp() / "damaged.png"
    path.write_bytes(content[: round(cut * len(content))])
    image_or_the_one_error(path)


def odd_exif() -> bytes:
    """A JPEG that says it lies on its side, and gives its width as a text: Pillow cannot write that back."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "x"
    file = io.BytesIO()
    Image.fromarray(picture(1)).save(file, "JPEG", exif=exif)
    return file.getvalue().replace(b"\x01\x0e\x00\x02", b"\x01\x00\x00\x02")


def broken_avif() -> bytes:
    if not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    return encoded("AVIF")[:-60] + bytes(60)


def unknown_dds() -> bytes:
    content = bytearray(encoded("DDS"))
    content[80:84] = bytes(4)  # the flags of the pixel format
    return bytes(content)


def enormous_hdr() -> bytes:
    return b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 2000000 +X 2000000\n"


@pytest.mark.parametrize("make", [odd_exif, broken_avif, unknown_dds, enormous_hdr])
def test_files_for_which_a_decoder_raises_an_error_of_its_own_kind(tmp_path, make):
    """struct.error, RuntimeError, NotImplementedError and cv2.error: the user sees the file's name all the same."""
    path = tmp_path / "damaged.png"
    path.write_bytes(make())
    pixels = image_or_the_one_error(path)
    if make is odd_exif and pixels is not None:  # its pixels are whole
        close(pixels.transpose(1, 2, 0).astype(int), np.rot90(picture(1), -1), 20)


# Kinds of images ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "by"), [(".png", 0), (".bmp", 0), (".tiff", 0), (".webp", 16), (".jpg", 16)])
def test_formats(tmp_path, suffix, by):
    image = picture(3)
    Image.fromarray(image).save(tmp_path / f"x{suffix}", **({"quality": 98} if by else {}))
    close(decoded(tmp_path / f"x{suffix}"), image, by)
    shutil.copy(tmp_path / f"x{suffix}", tmp_path / f"Y{suffix.upper()}")
    assert [path.name for path in files.image_files(tmp_path)] == [f"Y{suffix.upper()}", f"x{suffix}"]


@pytest.mark.parametrize("suffix", [".hdr", ".pic"])
def test_a_format_that_only_opencv_reads(tmp_path, suffix):
    cv2 = pytest.importorskip("cv2")
    image = picture(3)
    path = tmp_path / "train" / "cat" / f"x{suffix}"
    path.parent.mkdir(parents=True)
    assert cv2.imwrite(str(path), image[:, :, ::-1].astype(np.float32) / 255)
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(path)
    close(decoded(path), image, 3)
    shutil.copy(path, path.with_name(f"y{suffix}"))
    (tmp_path / "test").mkdir()
    assert len(folder_source(tmp_path).train(["cat"], ["cat"]).labels) == 2


def test_grey(tmp_path):
    grey = picture(4)[:, :, 0]
    Image.fromarray(grey).save(tmp_path / "x.png")
    close(decoded(tmp_path / "x.png"), np.stack([grey] * 3, 2), 0)


def test_one_bit(tmp_path):
    bits = picture(4)[:, :, 0] > 128
    Image.fromarray(bits).save(tmp_path / "x.png")
    close(decoded(tmp_path / "x.png"), np.stack([bits * 255] * 3, 2), 0)


@pytest.mark.parametrize("suffix", [".png", ".gif"])
def test_palette(tmp_path, suffix):
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], dtype=np.uint8)
    indices = np.random.default_rng(0).integers(0, 4, (16, 16)).astype(np.uint8)
    image = Image.frombytes("P", (16, 16), indices.tobytes())
    image.putpalette(colours.tobytes())
    image.save(tmp_path / f"x{suffix}")
    assert Image.open(tmp_path / f"x{suffix}").mode == "P"
    close(decoded(tmp_path / f"x{suffix}"), colours[indices], 0)


def test_palette_with_a_transparent_colour_lies_on_white(tmp_path):
    indices = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(np.uint8)
    image = Image.frombytes("P", (16, 16), indices.tobytes())
    image.putpalette([200, 0, 0, 0, 0, 100])
    image.save(tmp_path / "x.png", transparency=0)
    close(decoded(tmp_path / "x.png"), np.array([[255, 255, 255], [0, 0, 100]])[indices], 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_lies_on_white(tmp_path, mode):
    colour = picture(5) if mode == "RGBA" else np.repeat(picture(5)[:, :, :1], 3, axis=2)
    alpha = picture(6)[:, :, :1]
    alpha = np.where(np.arange(16)[:, None, None] < 4, 0, alpha).astype(np.uint8)
    channels = np.concatenate([colour if mode == "RGBA" else colour[:, :, :1], alpha], axis=2)
    Image.frombytes(mode, (16, 16), channels.tobytes()).save(tmp_path / "x.png")
    expected = colour * (alpha / 255.0) + 255 * (1 - alpha / 255.0)
    close(decoded(tmp_path / "x.png"), expected.round(), 1)
    assert (decoded(tmp_path / "x.png")[:4] == 255).all()


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("brightest", [65535, 20000, 200])
def test_sixteen_bits(tmp_path, suffix, brightest):
    """A dark image of 16 bits stays dark: what counts is the depth of the file, not its brightest pixel."""
    values = np.linspace(0, brightest, 256).round().astype(np.uint16).reshape(16, 16)
    Image.fromarray(values).save(tmp_path / f"x{suffix}")
    assert Image.open(tmp_path / f"x{suffix}").mode.startswith("I;16")
    close(decoded(tmp_path / f"x{suffix}"), np.stack([values / 257.0] * 3, 2).round(), 1)


def test_cmyk(tmp_path):
    Image.fromarray(picture(7)).convert("CMYK").save(tmp_path / "x.jpg", quality=98)
    assert Image.open(tmp_path / "x.jpg").mode == "CMYK"
    close(decoded(tmp_path / "x.jpg"), picture(7), 16)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_rotated_by_exif_becomes_upright(tmp_path, orientation, suffix):
    upright = picture(8)
    # What a camera stores when the scene is upright, by the definition of the EXIF tag Orientation.
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright, 1),
        7: np.rot90(upright[::-1], 1),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / f"x{suffix}", exif=exif, quality=98)
    close(decoded(tmp_path / f"x{suffix}"), upright, 12 if suffix == ".jpg" else 0)


def test_mixed_sizes_are_resized(tmp_path):
    folder = tmp_path / "train" / "cat"
    folder.mkdir(parents=True)
    (tmp_path / "test").mkdir()
    for index, (width, height) in enumerate([(16, 16), (100, 40), (7, 90), (1, 1), (640, 480)]):
        Image.new("RGB", (width, height), (10 * index, 50, 100)).save(folder / f"{index}.png")
    for size in (16, 33):
        images = folder_source(tmp_path, size).train(["cat"], ["cat"])
        assert images.pixels.shape == (5, 3, size, size)
        expected = torch.tensor([[10 * index, 50, 100] for index in range(5)])
        assert (images.pixels.flatten(2).float().mean(2) - expected).abs().max() < 0.5


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_of_an_oblong_image_is_kept_in_its_proportions(tmp_path, wide):
    """Red, green, blue stripes, each half as thick as the image is high: the middle shows one square of all three."""
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, :32, 0] = 255  # cut away
    stripes[:, 32:96, 1] = 255
    stripes[:, 96:, 2] = 255  # cut away
    image = stripes if wide else stripes.transpose(1, 0, 2)
    Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / "x.png")
    close(decoded(tmp_path / "x.png")[1:-1, 1:-1], np.array([0, 255, 0]), 12)


def test_without_the_libraries_of_opencv_it_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(InputError, match="pip install opencv-python-headless"):
        import_opencv()
