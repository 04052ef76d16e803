"""One image file: every format and kind of picture, and files that are broken."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import picture, refused
from PIL import Image

from lwm.images.files import decode_image
from lwm.images.folders import images_below


def decoded(path: Path, size: int = 16) -> np.ndarray:
    """decode_image, checked for its kind, as (size, size, 3)."""
    pixels = decode_image(path, size)
    assert pixels.dtype == np.uint8
    assert pixels.shape == (3, size, size)
    return pixels.transpose(1, 2, 0).astype(int)


def close(one: np.ndarray, other: np.ndarray, by: float) -> None:
    assert np.abs(one - np.asarray(other, dtype=int)).max() <= by


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


IMAGE, GREY = picture(3), picture(4)[:, :, 0]
INDICES = np.random.default_rng(0).integers(0, 4, (16, 16)).astype(np.uint8)
COLOURS = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [10, 20, 30]], dtype=np.uint8)
PALETTE = Image.frombytes("P", (16, 16), INDICES.tobytes())
PALETTE.putpalette(COLOURS.tobytes())
ON_WHITE = np.concatenate([np.full((1, 3), 255), COLOURS[1:]])
ALPHA = np.where(np.arange(16)[:, None] < 4, 0, picture(6)[:, :, 0]).astype(np.uint8)
SHARE = ALPHA[:, :, None] / 255.0
GREYS = np.stack([GREY] * 3, 2)


# Name of the file -> the image, its pixels as they are to be read, by how much they may differ, options of Pillow.
KINDS: dict[str, tuple[Image.Image, np.ndarray, float, dict]] = {
    **{f"plain{suffix}": (Image.fromarray(IMAGE), IMAGE, 0, {}) for suffix in (".png", ".bmp", ".tiff")},
    **{f"lossy{suffix}": (Image.fromarray(IMAGE), IMAGE, 16, {"quality": 98}) for suffix in (".webp", ".jpg")},
    "cmyk.jpg": (Image.fromarray(IMAGE).convert("CMYK"), IMAGE, 16, {"quality": 98}),
    "grey.png": (Image.fromarray(GREY), GREYS, 0, {}),
    "one bit.png": (Image.fromarray(GREY > 128), (GREYS > 128) * 255, 0, {}),
    "palette.png": (PALETTE, COLOURS[INDICES], 0, {}),
    "palette.gif": (PALETTE, COLOURS[INDICES], 0, {}),
    "clear palette.png": (PALETTE, ON_WHITE[INDICES], 0, {"transparency": 0}),
    "clear.png": (Image.fromarray(np.dstack([IMAGE, ALPHA])), IMAGE * SHARE + 255 * (1 - SHARE), 1, {}),
    "clear grey.png": (Image.fromarray(np.dstack([GREY, ALPHA])), GREYS * SHARE + 255 * (1 - SHARE), 1, {}),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_images(tmp_path, name):
    image, expected, by, options = KINDS[name]
    path = tmp_path / name
    image.save(path, **options)
    assert Image.open(path).mode == image.mode or path.suffix == ".webp"
    close(decoded(path), expected, by)
    loud = shutil.copy(path, path.with_suffix(path.suffix.upper()))
    assert images_below(tmp_path) == sorted([path, loud])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotated_by_exif_becomes_upright(tmp_path, orientation):
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
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "x.jpg", exif=exif, quality=98)
    close(decoded(tmp_path / "x.jpg"), upright, 12)


@pytest.mark.parametrize("wide", [True, False])
def test_the_centre_of_an_oblong_image_is_kept_in_its_proportions(tmp_path, wide):
    """A red, a green and a blue stripe: the square in the middle is green."""
    stripes = np.zeros((64, 128, 3), dtype=np.uint8)
    stripes[:, :32, 0] = stripes[:, 32:96, 1] = stripes[:, 96:, 2] = 255
    image = stripes if wide else stripes.transpose(1, 0, 2)
    Image.fromarray(np.ascontiguousarray(image)).save(tmp_path / "x.png")
    close(decoded(tmp_path / "x.png")[1:-1, 1:-1], np.array([0, 255, 0]), 12)


def test_a_format_that_only_opencv_reads(tmp_path):
    cv2, path = pytest.importorskip("cv2"), tmp_path / "x.hdr"
    assert cv2.imwrite(str(path), IMAGE[:, :, ::-1].astype(np.float32) / 255)
    with pytest.raises(OSError, match="cannot identify"):
        Image.open(path)
    close(decoded(path), IMAGE, 3)
    assert images_below(tmp_path) == [path]


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
BROKEN: dict[str, Callable[[], bytes]] = {
    "random bytes": lambda: np.random.default_rng(0).bytes(500),
    "text": lambda: b"<html>404</html>",
    "half a PNG": lambda: encoded(NOISE, "PNG")[:-200],
    "half a JPEG": lambda: encoded(NOISE, "JPEG")[:2000],
    "half a WebP": lambda: encoded(NOISE, "WEBP")[:2000],
    "an error of OpenCV's own kind": lambda: b"#?RADIANCE\nFORMAT=32-bit_rle_rgbe\n\n-Y 2000000 +X 2000000\n",
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_file_is_refused_with_its_name(tmp_path, kind):
    path = tmp_path / "x.png"
    path.write_bytes(BROKEN[kind]())
    assert refused(decode_image, path, 16).startswith(f"{path}: ")


def test_a_name_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "a\n\x1b]0;title\x07\u202eb.png"
    path.write_bytes(b"nothing")
    assert refused(decode_image, path, 16).startswith(f"{tmp_path}/a??]0;title??b.png: ")


def test_formats_that_are_never_read_are_not_listed(tmp_path):
    for suffix in (".eps", ".ps", ".EPS", ".wmf", ".emf", ".iim", ".icns", ".blp", ".png"):
        (tmp_path / f"x{suffix}").write_bytes(b"")
    assert [path.name for path in images_below(tmp_path)] == ["x.png"]
