"""The decoded images: the same pixels, and an entry that is whole or not there."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from conftest import refused, write_images

from lwm.images import cache, files
from lwm.images.cache import decoded
from lwm.images.files import decode_image
from lwm.runtime.errors import RunError


def count_decodes(monkeypatch: pytest.MonkeyPatch, seconds: float = 0) -> list[Path]:
    seen = []

    def decode(path: Path, size: int) -> np.ndarray:
        seen.append(path)
        time.sleep(seconds)
        return decode_image(path, size)

    monkeypatch.setattr(files, "decode_image", decode)
    return seen


def entries(folder: Path) -> list[Path]:
    return list(path for path in folder.iterdir() if path.suffix != ".lock")


def are_pixels_of(pixels: np.ndarray, paths: Sequence[Path], size: int = 16) -> bool:
    return np.array_equal(pixels, np.stack([decode_image(path, size) for path in paths]))


def test_the_pixels_are_those_of_the_files_in_their_order_and_each_is_decoded_once(tmp_path, monkeypatch):
    paths, seen = write_images(tmp_path / "images", 7, size=20), count_decodes(monkeypatch)
    for _ in range(3):
        assert are_pixels_of(decoded(paths, 16, tmp_path / "cache")[0], paths)
    assert seen == paths
    assert len(entries(tmp_path / "cache")) == 1
    assert are_pixels_of(decoded(paths[::-1], 16, tmp_path / "cache")[0], paths[::-1])


@pytest.fixture
def two_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "WORTH_WORKERS", 1)
    monkeypatch.setattr(cache, "CHUNK", 3)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1}, raising=False)


@pytest.mark.usefixtures("two_workers")
def test_workers_decode_the_same_pixels(tmp_path):
    paths = write_images(tmp_path / "images", 11)
    paths[4].write_text("no image")
    pixels, bad = decoded(paths, 16, tmp_path / "cache", skip_bad_images=True)
    assert are_pixels_of(pixels, [*paths[:4], *paths[5:]])
    assert list(bad) == [4]
    assert str(paths[4]) in bad[4]


def test_what_changed_is_decoded_anew(tmp_path, monkeypatch):
    paths = write_images(tmp_path / "images", 4)
    decoded(paths, 16, tmp_path / "cache")
    seen, other = count_decodes(monkeypatch), shutil.copy(paths[0], tmp_path / "other.png")
    shutil.copyfile(paths[1], paths[0])
    os.utime(paths[0], ns=(0, 0))
    for changed, size in ((paths, 16), ([other, *paths[1:]], 16), (paths[:3], 16), (paths, 8)):
        seen.clear()
        assert are_pixels_of(decoded(changed, size, tmp_path / "cache")[0], changed, size)
        assert seen == changed


def test_what_a_run_writes_to_its_pixels_stays_its_own_and_outlives_the_cache(tmp_path):
    paths = write_images(tmp_path / "images", 3)
    pixels, _ = decoded(paths, 16, tmp_path / "cache")
    pixels[1:] = 0
    assert are_pixels_of(decoded(paths, 16, tmp_path / "cache")[0], paths)
    shutil.rmtree(tmp_path / "cache")
    assert are_pixels_of(pixels[:1], paths[:1])
    assert are_pixels_of(decoded(paths, 16, tmp_path / "cache")[0], paths)


def test_bad_images_are_named_and_nothing_is_kept_unless_they_are_skipped(tmp_path):
    paths, folder = write_images(tmp_path / "images", 3), tmp_path / "cache"
    paths[1].write_text("no image")
    assert "001.png" in refused(decoded, paths, 16, folder)
    assert entries(folder) == []
    assert len(decoded(paths, 16, folder, skip_bad_images=True)[0]) == 2
    assert "001.png" in refused(decoded, paths, 16, folder)
    pixels, bad = decoded([paths[1], tmp_path / "gone.png"], 16, folder, skip_bad_images=True)
    assert (pixels.shape, list(bad)) == ((0, 3, 16, 16), [0, 1])


DAMAGE: dict[str, Callable[[Path], object]] = {
    "cut off": lambda entry: os.truncate(entry / "pixels", 100),
    "without a file": lambda entry: (entry / "bad.json").unlink(),
    "of a process that was killed": lambda entry: entry.rename(entry.with_name(f".{entry.name}.tmp")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_entry_that_is_not_whole_is_made_again(tmp_path, damage):
    paths = write_images(tmp_path / "images", 4)
    decoded(paths, 16, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    DAMAGE[damage](entry)
    assert are_pixels_of(decoded(paths, 16, tmp_path / "cache")[0], paths)
    assert entries(tmp_path / "cache") == [entry]


class Fatal:
    """Ends the process that it is sent to."""

    __call__ = print

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.usefixtures("two_workers")
def test_a_worker_that_is_killed_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "decode_all", Fatal())
    with pytest.raises(RunError, match="a process that decodes images has ended"):
        decoded(write_images(tmp_path / "images", 3), 16, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_of_two_at_the_same_time_one_decodes_and_the_other_waits(tmp_path, monkeypatch):
    paths, seen = write_images(tmp_path / "images", 3), count_decodes(monkeypatch, seconds=0.1)
    with ThreadPoolExecutor() as pool:
        both = [pool.submit(decoded, paths, 16, tmp_path / "cache") for _ in range(2)]
    assert all(are_pixels_of(one.result()[0], paths) for one in both)
    assert seen == paths


def test_a_cache_without_room_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    paths, seen, usage = write_images(tmp_path / "images", 3), count_decodes(monkeypatch), shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for folder in (tmp_path / "cache", paths[0] / "cache"):  # too large, and it cannot be made
        assert "--cache-dir" in refused(decoded, paths, 64, folder)
    assert seen == []
