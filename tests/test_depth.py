"""Each row of docs/own-data.md's table of values, in files that OpenCV, Pillow or this page writes, against NumPy."""

from __future__ import annotations

import logging
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import picture, refused
from PIL import Image

from lwm.images import depth
from lwm.images.files import decode_image
from lwm.runtime.errors import log, start_log

SHARE = np.linspace(0, 1, 256).reshape(16, 16)
COLOUR = np.dstack([SHARE, SHARE[::-1], SHARE.T])
CLEAR = np.dstack([COLOUR, SHARE[:, ::-1]])


def tiff(values: np.ndarray, order: str = "<", deflated: bool = False, planar: int = 1, white: int = 1) -> bytes:
    """A TIFF of (H, W, channels) by its specification, in one strip or one a plane; ``white`` 0 is WhiteIsZero."""
    height, width, channels = np.atleast_3d(values).shape
    raw = np.atleast_3d(values).astype(values.dtype.newbyteorder(order))
    planes = [raw.tobytes()] if planar == 1 else [raw[..., channel].tobytes() for channel in range(channels)]
    planes = [zlib.compress(plane) if deflated else plane for plane in planes]
    places = [8 + sum(map(len, planes[:number])) for number in range(len(planes))]
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    tags = {256: [width], 257: [height], 258: [8 * values.dtype.itemsize] * channels, 259: [8 if deflated else 1]}
    tags |= {262: [2 if channels > 2 else white], 273: places, 277: [channels], 278: [height]}
    tags |= {279: [len(plane) for plane in planes], 284: [planar], 339: [kind] * channels}
    body = b"".join(planes) + bytes(sum(map(len, planes)) % 2)
    more = 8 + len(body) + 2 + 12 * len(tags) + 4
    entries, extra = b"", b""
    for tag, numbers in sorted(tags.items()):
        content = struct.pack(f"{order}{len(numbers)}L", *numbers)
        place = content if len(content) == 4 else struct.pack(f"{order}L", more + len(extra))
        extra += content if len(content) > 4 else b""
        entries += struct.pack(f"{order}HHL", tag, 4, len(numbers)) + place
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}L", 8 + len(body))
    return head + body + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + extra


def written(path: Path, values: np.ndarray) -> Path:
    """By OpenCV, whose colours are blue, green, red."""
    theirs = values if values.ndim == 2 else values[..., [2, 1, 0, 3][: values.shape[2]]]
    assert cv2.imwrite(str(path), np.ascontiguousarray(theirs))
    return path


def decoded(path: Path) -> np.ndarray:
    return decode_image(path, 16).transpose(1, 2, 0).astype(int)


def check(path: Path, expected: np.ndarray, by: float = 1) -> None:
    expected = np.dstack([expected] * 3) if expected.ndim == 2 else expected
    assert np.abs(decoded(path) - expected).max() <= by


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("share", [SHARE, COLOUR], ids=["grey", "colour"])
def test_whole_numbers_of_so_many_bits_in_files_of_16(tmp_path, share, bits, suffix):
    for largest in (2**bits - 1, 0.7 * (2**bits - 1)):  # an image need not use all of them
        values = (share * largest).astype(np.uint16)
        check(written(tmp_path / f"x{suffix}", values), values * (255 / (2**bits - 1)))


@pytest.mark.parametrize("suffix", [".ppm", ".pgm"])
def test_netpbm_with_16_bits(tmp_path, suffix):
    values = ((COLOUR if suffix == ".ppm" else SHARE) * 4095).astype(np.uint16)
    check(written(tmp_path / f"x{suffix}", values), values * (255 / 4095))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("bits", [12, 16])
def test_transparent_colours_of_16_bits_are_laid_on_white(tmp_path, suffix, bits):
    values = (CLEAR * (2**bits - 1)).astype(np.uint16)
    parts = values / (2**bits - 1)
    white = 255 * (parts[..., :3] * parts[..., 3:] + 1 - parts[..., 3:])
    check(written(tmp_path / f"x{suffix}", values), white, 2)


def test_transparent_grey_of_16_bits(tmp_path):
    """Pillow and OpenCV write none: a PNG by its specification."""
    values = np.dstack([SHARE * 4095, SHARE.T * 65535]).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">LLBBBBB", 16, 16, 16, 4, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    content = b"".join(struct.pack(">L", len(x)) + n + x + struct.pack(">L", zlib.crc32(n + x)) for n, x in chunks)
    (tmp_path / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    check(tmp_path / "x.png", 255 * (SHARE * SHARE.T + 1 - SHARE.T), 2)


RANGES = {  # values and what stands for 0 and 255
    "signed 16 bits": ((SHARE * 65535 - 32768).astype(np.int16), -32768, 32767),
    "signed 12 bits": ((SHARE * 3500 - 1500).astype(np.int16), -2048, 2047),
    "signed 8 bits": ((SHARE * 255 - 128).astype(np.int8), -128, 127),
    "int32, a camera's 12 bits": ((SHARE * 4095).astype(np.int32), 0, 4095),
    "int32": ((SHARE * 4e9 - 2e9).astype(np.int32), -(2**31), 2**31 - 1),
    "uint32": ((SHARE * 4.2e9).astype(np.uint32), 0, 2**32 - 1),
    "uint32 counts": ((SHARE * 1e5).astype(np.uint32), 0, 2**18 - 1),
    "floats 0..1": (SHARE.astype(np.float32), 0, 1),
    "floats 0..1, resized": ((SHARE * 1.04 - 0.02).astype(np.float32), 0, 1),
    "dark floats 0..1": ((SHARE * 0.2).astype(np.float32), 0, 1),
    "floats -1..1": ((SHARE * 2 - 1).astype(np.float32), -1, 1),
    "floats 0..255": ((SHARE * 255).astype(np.float32), 0, 255),
    "floats of counts": ((SHARE * 40000).astype(np.float32), 0, 65535),
    "floats of a scanner": ((SHARE * 4000 - 1000).astype(np.float32), -8192, 8191),
}


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("deflated", [False, True])
@pytest.mark.parametrize("name", RANGES)
def test_signed_numbers_floats_and_32_bits_in_a_tiff(tmp_path, name, order, deflated):
    values, bottom, top = RANGES[name]
    path = tmp_path / "x.tif"
    path.write_bytes(tiff(values, order, deflated))
    if values.dtype == np.uint32 and order == ">":
        refused(decode_image, path, 16)
        path.write_bytes(tiff(values))
    expected = np.clip((values.astype(float) - bottom) / (top - bottom) * 255, 0, 255)
    assert np.ptp(expected) > 40
    check(path, expected)
    theirs = written(tmp_path / "theirs.tif", values)
    assert np.array_equal(decoded(theirs), decoded(path))


NARROW = {  # nothing of it would be left by the rules
    "a thermal camera": (29000 + SHARE * 2000).astype(np.uint16),
    "a mask": (SHARE > 0.5).astype(np.uint16),
    "normalised for a network": (SHARE * 5 - 2.5).astype(np.float32),
    "dim": (SHARE * 1e-3).astype(np.float32),
    "counts": (1e6 + SHARE * 1e3).astype(np.int32),
}


@pytest.mark.parametrize("name", NARROW)
def test_what_would_be_nearly_constant_is_scaled_by_itself_and_that_is_said_once(tmp_path, capfd, monkeypatch, name):
    monkeypatch.setattr(depth, "_said", [])
    monkeypatch.setattr(log, "level", logging.INFO)
    start_log()
    values = NARROW[name]
    path = written(tmp_path / "x.tif", values)
    low, high = values.min().astype(float), values.max().astype(float)
    check(path, (values - low) / (high - low) * 255)
    decode_image(path, 16)
    assert len(capfd.readouterr().err.splitlines()) == 1


def test_a_constant_image_stays_what_it_is(tmp_path):
    check(written(tmp_path / "x.png", np.full((16, 16), 30000, np.uint16)), np.full((16, 16), 30000 / 257))


def test_colours_of_16_bits_in_a_narrow_range(tmp_path):
    values = (30000 + 500 * COLOUR).astype(np.uint16)
    check(written(tmp_path / "x.png", values), COLOUR * 255, 2)


def test_printed_on_white(tmp_path):
    """TIFF's WhiteIsZero, whatever the depth."""
    path = tmp_path / "x.tif"
    for largest, kind in ((255, np.uint8), (65535, np.uint16), (1, np.float32)):
        path.write_bytes(tiff((SHARE * largest).astype(kind), white=0))
        check(path, 255 - SHARE * 255)


def test_planes_lie_apart_with_8_bits_and_are_refused_with_16(tmp_path):
    path = tmp_path / "x.tif"
    for deflated in (False, True):
        path.write_bytes(tiff((COLOUR * 255).astype(np.uint8), planar=2, deflated=deflated))
        check(path, COLOUR * 255)
        path.write_bytes(tiff((COLOUR * 65535).astype(np.uint16), planar=2, deflated=deflated))
        refused(decode_image, path, 16)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [0, 100, 255])
def test_numbers_that_are_none_are_refused(tmp_path, bad, place):
    values = SHARE.astype(np.float32)
    values.flat[place] = bad
    refused(decode_image, written(tmp_path / "x.tif", values), 16)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.int32])
def test_colours_of_32_bits_are_refused(tmp_path, kind):
    refused(decode_image, written(tmp_path / "x.tif", (COLOUR * 200).astype(kind)), 16)


@pytest.mark.parametrize("name", ["x.exr", "x.fits"])
def test_formats_without_a_rule_are_refused(tmp_path, name):
    head = b"v/1\x01" if name == "x.exr" else b"SIMPLE  =                    T".ljust(80)
    (tmp_path / name).write_bytes(head + bytes(4000))
    refused(decode_image, tmp_path / name, 16)


@pytest.mark.parametrize("largest", [1.0, 4.0, 5000.0])
def test_radiance_up_to_1_is_taken_as_it_is_and_more_is_bent_by_reinhards_curve(tmp_path, largest):
    path = written(tmp_path / "x.hdr", (COLOUR * largest).astype(np.float32))
    values = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)[..., ::-1]
    values = values / max(1, np.median(values))
    check(path, 255 * values * (1 + values / values.max() ** 2) / (1 + values), 4)


def test_a_bright_sun_leaves_the_rest_visible(tmp_path):
    values = (COLOUR * 0.8).astype(np.float32)
    values[0, 0] = 50000
    assert np.median(decoded(written(tmp_path / "x.hdr", values))) > 50


def test_transparency_that_would_leave_nothing_is_ignored(tmp_path):
    colours = picture(1)
    Image.fromarray(np.dstack([colours, np.zeros((16, 16), np.uint8)])).save(tmp_path / "x.png")
    check(tmp_path / "x.png", colours, 0)


def test_of_several_pages_the_first_is_read_and_gamma_is_ignored(tmp_path):
    first, second = (Image.fromarray(picture(seed)) for seed in (1, 2))
    first.save(tmp_path / "x.tif", save_all=True, append_images=[second])
    check(tmp_path / "x.tif", picture(1), 0)
    first.save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    gamma = b"gAMA" + struct.pack(">L", 10**5)
    chunk = struct.pack(">L", 4) + gamma + struct.pack(">L", zlib.crc32(gamma))
    (tmp_path / "x.png").write_bytes(content[:33] + chunk + content[33:])
    assert Image.open(tmp_path / "x.png").info["gamma"] == 1.0
    check(tmp_path / "x.png", picture(1), 0)
