"""Image files of a stranger: damaged ones, bombs, files that start programs, and what is no file at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hostilefiles import BOMBS, COUNT, DUDS, EITHER, PROGRAMS, picture, saved, write_damaged
from PIL import Image

from lwm.images import files
from lwm.runtime.errors import InputError

ROOT = Path(__file__).resolve().parent.parent

SIZE = 32
SMALL = 400e6  # bytes that no file takes but a large image that is read; tolerates what a decoder keeps for the next
linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="memory is limited and measured as Linux has it"
)


# The reader, in a process of its own ------------------------------------------------------------------------------


def status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def judge(path: str) -> str:
    """``decoded``, ``refused``, or what is wrong."""
    try:
        pixels = files.decode_image(path, SIZE)
    except InputError as error:
        good = len(str(error).splitlines()) == 1 and str(error).startswith(f"{path}: ") and len(str(error)) < 500
        return "refused" if good else f"refused as {str(error)!r}"
    except BaseException:
        return traceback.format_exc()
    good = pixels.shape == (3, SIZE, SIZE) and pixels.dtype == np.uint8
    return "decoded" if good else f"decoded to {pixels.shape} {pixels.dtype}"


def read_all(folder: str) -> None:
    """Print what became of each file: the answer, seconds, and the most bytes it took."""
    import resource  # which Windows has not

    limit = 4 * 2**30  # of addresses, of which libraries take many that are never memory
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    Image.init()
    said = {}
    for path in sorted(Path(folder).iterdir()):
        before = status("VmRSS:")
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory from here on
        start = time.perf_counter()
        said[path.name] = (judge(str(path)), time.perf_counter() - start, status("VmHWM:") - before)
    print(json.dumps(said))


def read(folder: Path, timeout: float = 60) -> dict[str, tuple[str, float, int]]:
    """``read_all`` of a folder; a program named gs, as Ghostscript is, lies in its way and would leave a file."""
    programs = folder.with_name("programs")
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {programs / 'was-run'}\n")
    (programs / "gs").chmod(0o755)
    reader = [sys.executable, "-c", f"import test_hostile_images as own; own.read_all({str(folder)!r})"]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        reader, capture_output=True, text=True, env=os.environ | paths | {"OMP_NUM_THREADS": "1"}, timeout=timeout
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert not (programs / "was-run").exists()
    return json.loads(done.stdout)


# Files that are damaged, too large, or programs -------------------------------------------------------------------


@linux
def test_three_hundred_damaged_files_are_decoded_or_refused(tmp_path):
    folder = tmp_path / "damaged"
    folder.mkdir()
    write_damaged(folder)
    said = read(folder)
    assert len(said) == COUNT
    assert {name: answer for name, (answer, _, _) in said.items() if answer not in ("decoded", "refused")} == {}
    counts = Counter(answer for answer, _, _ in said.values())
    slowest, largest = (max(numbers[index] for numbers in said.values()) for index in (1, 2))
    print(dict(counts), f"slowest {slowest:.2f} s, most memory {largest / 1e6:.0f} MB")
    # Neither does the reader refuse everything, nor are the files such as anything would be refused.
    assert min(counts.values()) > COUNT / 5
    assert slowest < 5
    assert largest < SMALL


@linux
def test_bombs_and_files_that_start_programs(tmp_path):
    folder = tmp_path / "bombs"
    folder.mkdir()
    for name, make in (BOMBS | DUDS | EITHER | PROGRAMS).items():
        (folder / name).write_bytes(make())
    with (folder / "long.webp").open("wb") as file:
        file.write(saved(picture(), "WEBP"))
        file.truncate(files.FILE_SIZE + 1)
    expected = dict.fromkeys(BOMBS | PROGRAMS, "refused") | dict.fromkeys(DUDS, "decoded") | {"long.webp": "refused"}
    said = read(folder)
    print({name: (answer, round(time, 2), round(memory / 1e6)) for name, (answer, time, memory) in said.items()})
    assert {name: said[name][0] for name in expected} == expected
    assert {said[name][0] for name in EITHER} <= {"decoded", "refused"}
    assert {name: seconds for name, (_, seconds, _) in said.items() if seconds > 5} == {}
    assert {name: memory for name, (_, _, memory) in said.items() if memory > SMALL} == {}


@linux
def test_the_largest_photo_is_read_in_the_memory_that_is_said(tmp_path):
    """179 megapixels, Pillow's limit, lying on its side; a phone's 108 are fewer. It looks like a small one."""
    exif, folder = Image.Exif(), tmp_path / "photos"
    exif[0x0112] = 6
    folder.mkdir()
    small = picture(64, 64)
    small.resize((13377, 13377), Image.Resampling.NEAREST).save(folder / "x.jpg", exif=exif, quality=80)
    [(answer, _, memory)] = read(folder).values()
    print(f"{memory / 1e6:.0f} MB")
    assert answer == "decoded"
    assert 4 * 13377**2 * 0.9 < memory < files.MEMORY  # the former shows that it is measured
    pixels = files.decode_image(folder / "x.jpg", SIZE).transpose(1, 2, 0).astype(int)
    upright = small.transpose(Image.Transpose.ROTATE_270).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    assert np.abs(pixels - np.asarray(upright)).max() < 16


# What is no file --------------------------------------------------------------------------------------------------


@pytest.fixture
def patience():
    """Whoever waits for a pipe's other end fails instead."""
    if not hasattr(signal, "setitimer"):
        yield
        return
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.setitimer(signal.ITIMER_REAL, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def closed(path: Path) -> None:
    path.write_bytes(saved(picture(), "PNG"))
    path.chmod(0)
    if os.access(path, os.R_OK):
        path.unlink()
        pytest.skip("the administrator may read everything")


def device(path: Path) -> None:
    if not Path("/dev/zero").exists():
        pytest.skip("this system has no /dev/zero")
    path.symlink_to("/dev/zero")


def unreadable(path: Path) -> None:
    """A file that may be opened and then cannot be read, as on a disk that fails."""
    if not Path("/proc/self/mem").exists():
        pytest.skip("this system has no /proc/self/mem")
    path.symlink_to("/proc/self/mem")


def pipe(path: Path) -> None:
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    os.mkfifo(path)


NO_FILES = {
    "folder": Path.mkdir,
    "empty": Path.touch,
    "loop": lambda path: path.symlink_to(path.name),
    "dead": lambda path: path.symlink_to("nowhere.png"),
    "pipe": pipe,
    "device": device,
    "closed": closed,
    "unreadable": unreadable,
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_image_file_is_named_in_one_line_or_counted(tmp_path, capfd, patience, kind):
    saved_path, path = tmp_path / "a.png", tmp_path / "x.png"
    picture().save(saved_path)
    NO_FILES[kind](path)
    assert files.image_files(tmp_path) == [saved_path, path]
    with pytest.raises(InputError) as caught:
        files.decode_files([saved_path, path], SIZE, skip_bad_images=False)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value).splitlines()) == 1
    kept, pixels = files.decode_files([saved_path, path], SIZE, skip_bad_images=True)
    assert (kept, pixels.shape) == ([saved_path], (1, 3, SIZE, SIZE))
    lines = capfd.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning"]
    assert "1 of 2" in lines[0]


def test_a_name_cannot_write_to_the_terminal(tmp_path):
    path = tmp_path / "a\n\x1b]0;title\x07\u202eb.png"
    path.write_bytes(b"nothing")
    with pytest.raises(InputError) as caught:
        files.decode_image(path, SIZE)
    assert str(caught.value).startswith(f"{tmp_path}/a??]0;title??b.png: ")


def test_formats_that_are_never_read_are_not_listed(tmp_path):
    for suffix in (".eps", ".ps", ".EPS", ".wmf", ".emf", ".iim", ".icns", ".blp", ".png"):
        (tmp_path / f"x{suffix}").write_bytes(b"")
    assert [path.name for path in files.image_files(tmp_path)] == ["x.png"]
