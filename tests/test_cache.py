"""The decoded images: the same pixels, whole or not there, and a lock that does not outlive its holder."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import write_images

from lwm.images import cache, files
from lwm.images.cache import decoded
from lwm.images.files import decode_image
from lwm.runtime.errors import InputError, RunError
from lwm.runtime.lock import held

ROOT = Path(__file__).resolve().parent.parent


def count_decodes(monkeypatch) -> list[Path]:
    seen = []

    def decode(path, size):
        seen.append(path)
        return decode_image(path, size)

    monkeypatch.setattr(files, "decode_image", decode)
    return seen


def entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_the_pixels_are_those_of_the_files_in_their_order(tmp_path):
    paths = write_images(tmp_path / "images", 7, size=20)
    expected = np.stack([decode_image(path, 16) for path in paths])
    for _ in range(2):
        pixels, bad = decoded(paths, 16, tmp_path / "cache")
        np.testing.assert_array_equal(pixels, expected)
        assert bad == {}
    np.testing.assert_array_equal(decoded(paths[::-1], 16, tmp_path / "cache")[0], expected[::-1])


def test_as_many_workers_as_the_process_may_use_cores(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WORTH_WORKERS", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3})
    seen = count_decodes(monkeypatch)  # in this process
    paths = write_images(tmp_path / "images", 3)
    decoded(paths, 16, tmp_path / "cache")
    assert seen == paths


@pytest.mark.parametrize("worth", [1, 10**9])
def test_workers_decode_the_same_pixels(tmp_path, monkeypatch, worth):
    monkeypatch.setattr(cache, "WORTH_WORKERS", worth)
    monkeypatch.setattr(cache, "CHUNK", 3)
    paths = write_images(tmp_path / "images", 11)
    paths[4].write_text("no image")
    pixels, bad = decoded(paths, 16, tmp_path / "cache", skip_bad_images=True)
    expected = np.stack([decode_image(path, 16) for index, path in enumerate(paths) if index != 4])
    np.testing.assert_array_equal(pixels, expected)
    assert list(bad) == [4]
    assert str(paths[4]) in bad[4]


def end_at_once(paths, image_size, skip_bad_images):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "WORTH_WORKERS", 1)
    monkeypatch.setattr(cache, "decode_all", end_at_once)
    with pytest.raises(RunError, match="a process that decodes images has ended"):
        decoded(write_images(tmp_path / "images", 3), 16, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []


def test_each_file_is_decoded_once(tmp_path, monkeypatch):
    seen = count_decodes(monkeypatch)
    paths = write_images(tmp_path / "images", 4)
    for _ in range(3):
        decoded(paths, 16, tmp_path / "cache")
    assert seen == paths
    assert len(entries(tmp_path / "cache")) == 1


@pytest.mark.parametrize("change", ["content", "time", "name", "size", "more", "fewer"])
def test_what_changed_is_decoded_anew(tmp_path, monkeypatch, change):
    paths = write_images(tmp_path / "images", 4)
    decoded(paths, 16, tmp_path / "cache")
    seen, size = count_decodes(monkeypatch), 16
    if change == "content":
        state = paths[0].stat()
        shutil.copy(paths[1], paths[0])
        os.utime(paths[0], ns=(state.st_atime_ns, state.st_mtime_ns + 1))
    elif change == "time":
        os.utime(paths[0], ns=(0, 0))
    elif change == "name":
        paths[0] = paths[0].rename(paths[0].with_name("other.png"))
    elif change == "size":
        size = 8
    elif change == "more":
        paths = write_images(tmp_path / "images", 5)
    else:
        paths = paths[:3]
    pixels, _ = decoded(paths, size, tmp_path / "cache")
    assert seen == paths
    np.testing.assert_array_equal(pixels, np.stack([decode_image(path, size) for path in paths]))


def test_it_can_be_deleted_at_any_time(tmp_path):
    paths = write_images(tmp_path / "images", 4)
    first, _ = decoded(paths, 16, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    expected = np.stack([decode_image(path, 16) for path in paths])
    np.testing.assert_array_equal(first, expected)  # the mapped file lives as long as it is used
    np.testing.assert_array_equal(decoded(paths, 16, tmp_path / "cache")[0], expected)


@pytest.mark.parametrize("damage", ["cut", "no pixels", "no length", "no errors"])
def test_an_entry_that_is_not_whole_is_made_again(tmp_path, damage):
    paths = write_images(tmp_path / "images", 4)
    decoded(paths, 16, tmp_path / "cache")
    (entry,) = entries(tmp_path / "cache")
    if damage == "cut":
        os.truncate(entry / "pixels", 100)
    else:
        (entry / {"no pixels": "pixels", "no length": "bytes", "no errors": "bad.json"}[damage]).unlink()
    pixels, _ = decoded(paths, 16, tmp_path / "cache")
    np.testing.assert_array_equal(pixels, np.stack([decode_image(path, 16) for path in paths]))


def test_what_a_run_writes_to_its_pixels_stays_its_own(tmp_path):
    paths = write_images(tmp_path / "images", 3)
    pixels, _ = decoded(paths, 16, tmp_path / "cache")
    before = pixels.copy()
    pixels[:] = 0
    np.testing.assert_array_equal(decoded(paths, 16, tmp_path / "cache")[0], before)


def test_no_image_that_can_be_read_gives_no_pixels(tmp_path):
    (tmp_path / "a.png").write_text("no image")
    pixels, bad = decoded([tmp_path / "a.png", tmp_path / "gone.png"], 16, tmp_path / "cache", skip_bad_images=True)
    assert pixels.shape == (0, 3, 16, 16)
    assert list(bad) == [0, 1]


def test_a_bad_image_is_named_and_nothing_is_kept_unless_it_is_skipped(tmp_path):
    paths = write_images(tmp_path / "images", 3)
    paths[1].write_text("no image")
    with pytest.raises(InputError, match=r"001\.png"):
        decoded(paths, 16, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    assert len(decoded(paths, 16, tmp_path / "cache", skip_bad_images=True)[0]) == 2
    with pytest.raises(InputError, match=r"001\.png"):
        decoded(paths, 16, tmp_path / "cache")


def test_a_build_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    paths = write_images(tmp_path / "images", 3)

    def interrupt(path, size):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(files, "decode_image", interrupt)
        decoded(paths, 16, tmp_path / "cache")
    assert entries(tmp_path / "cache") == []
    assert decoded(paths, 16, tmp_path / "cache")[0].shape == (3, 3, 16, 16)


def test_a_killed_build_is_begun_anew_and_its_rest_is_gone(tmp_path):
    paths = write_images(tmp_path / "images", 3)
    code = f"""
import sys, time
sys.path.insert(0, {str(ROOT)!r})
from lwm.images import cache
from lwm.images import files
from pathlib import Path
files.decode_image = lambda path, size: (print("decoding", flush=True), time.sleep(60))
cache.decoded([Path(p) for p in {[str(p) for p in paths]!r}], 16, Path({str(tmp_path / "cache")!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        child.send_signal(signal.SIGKILL)
    assert len(entries(tmp_path / "cache")) == 2  # the lock's file and the folder that was begun
    assert decoded(paths, 16, tmp_path / "cache")[0].shape == (3, 3, 16, 16)
    assert len(entries(tmp_path / "cache")) == 1


def test_a_full_disk_is_said_before_anything_is_decoded(tmp_path, monkeypatch):
    seen = count_decodes(monkeypatch)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(InputError, match=r"--cache-dir .*3 images at 64 px take 0 MB and 0 MB are free"):
        decoded(write_images(tmp_path / "images", 3), 64, tmp_path / "cache")
    assert seen == []


def test_a_cache_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="--cache-dir"):
        decoded(write_images(tmp_path / "images", 1), 16, tmp_path / "file" / "cache")


def test_the_size_of_a_large_one_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache, "WORTH_SAYING", 1000)
    paths = write_images(tmp_path / "images", 2)
    for _ in range(2):
        decoded(paths, 16, tmp_path / "cache")
    assert capsys.readouterr().out.count("decoding 2 images once, 0 MB") == 1


# The lock ---------------------------------------------------------------------------------------------------------


HOLDER = """
import sys, time
sys.path.insert(0, {root!r})
from pathlib import Path
from lwm.runtime.lock import held
with held(Path({path!r}), "here"):
    print("held", flush=True)
    time.sleep({seconds})
"""


def holder(path: Path, seconds: float) -> subprocess.Popen:
    code = HOLDER.format(root=str(ROOT), path=str(path), seconds=seconds)
    child = subprocess.Popen([sys.executable, "-c", code, "--flag", "a b"], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "held\n"
    return child


def test_a_lock_that_is_held_is_refused_with_its_holder(tmp_path):
    with holder(tmp_path / "lock", 60) as child:
        words = rf"^there is in use by process {child.pid} .*--flag 'a b'"
        with pytest.raises(InputError, match=words), held(tmp_path / "lock", "there"):
            pass
        child.kill()
    with held(tmp_path / "lock", "there"):  # whoever was killed holds nothing
        assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    assert entries(tmp_path) == []


def test_who_waits_gets_the_lock_after_its_holder(tmp_path):
    with holder(tmp_path / "lock", 0.5) as child, held(tmp_path / "lock", "there", wait=True):
        child.wait()
        assert f"process {os.getpid()}" in (tmp_path / "lock").read_text()
    assert entries(tmp_path) == []


def test_the_lock_is_gone_after_an_error(tmp_path):
    with pytest.raises(KeyError), held(tmp_path / "lock", "here"):
        raise KeyError
    assert entries(tmp_path) == []


def test_a_lock_that_cannot_be_made_is_said(tmp_path):
    with pytest.raises(InputError, match=r"^here: cannot be written to"), held(tmp_path / "none" / "lock", "here"):
        pass
