"""Image files of a stranger, read in a process of its own, for which this file imports nothing that takes long."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
from hostilefiles import BOMBS, COUNT, DUDS, EITHER, PROGRAMS, picture, saved, write_damaged
from PIL import Image

from lwm.images import files
from lwm.images.folders import images_below
from lwm.runtime.errors import InputError, start_log

ROOT = Path(__file__).resolve().parent.parent
SIZE = 32
SMALL = 400e6  # bytes that no file takes but a large image that is read; tolerates what a decoder keeps for the next
linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is limited and measured as Linux has it")


def memory(name: str) -> int:
    """VmRSS, the bytes this process takes, or VmHWM, the most it took."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def judge(path: Path) -> str:
    """``decoded``, ``refused``, or what is wrong."""
    try:
        pixels = files.decode_image(path, SIZE)
    except InputError as error:
        text = str(error)
        good = len(text.splitlines()) == 1 and text.startswith(f"{path}: ") and len(text) < 500
        return "refused" if good else text
    except BaseException:
        return traceback.format_exc()
    return "decoded" if (pixels.shape, pixels.dtype) == ((3, SIZE, SIZE), np.uint8) else repr(pixels)


def read_all(folder: str) -> None:
    """Print what became of each file: the answer, seconds, and the most bytes it took."""
    import resource  # which Windows has not

    resource.setrlimit(resource.RLIMIT_AS, (2**32, 2**32))  # of addresses; libraries take many that are never memory
    Image.init()
    said = {}
    for path in sorted(Path(folder).iterdir()):
        before, start = memory("VmRSS:"), time.process_time()
        Path("/proc/self/clear_refs").write_text("5")  # the highest memory from here on
        said[path.name] = (judge(path), time.process_time() - start, memory("VmHWM:") - before)
    print(json.dumps(said))


def read(folder: Path) -> dict[str, tuple[str, int]]:
    """The answer and the bytes of each file; a program named gs, as Ghostscript is, lies in its way."""
    programs = folder.with_name("programs")
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {programs / 'was-run'}\n")
    (programs / "gs").chmod(0o755)
    reader = [sys.executable, "-c", f"import test_hostile_images as own; own.read_all({str(folder)!r})"]
    paths = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
    environment = os.environ | paths | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(reader, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert not (programs / "was-run").exists()
    said = json.loads(done.stdout)
    assert {name: seconds for name, (_, seconds, _) in said.items() if seconds > 5} == {}
    return {name: (answer, taken) for name, (answer, _, taken) in said.items()}


@linux
def test_damaged_files_bombs_and_files_that_start_programs_are_decoded_or_refused(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    write_damaged(folder)
    damaged = {path.name for path in folder.iterdir()}
    for name, make in (BOMBS | DUDS | EITHER | PROGRAMS).items():
        (folder / name).write_bytes(make())
    with (folder / "long.webp").open("wb") as file:
        file.write(saved(picture(), "WEBP"))
        file.truncate(files.FILE_SIZE + 1)
    said = read(folder)
    assert {name: answer for name, (answer, _) in said.items() if answer not in ("decoded", "refused")} == {}
    assert {name: taken for name, (_, taken) in said.items() if taken > SMALL} == {}
    expected = dict.fromkeys(BOMBS | PROGRAMS, "refused") | dict.fromkeys(DUDS, "decoded") | {"long.webp": "refused"}
    assert {name: said[name][0] for name in expected} == expected
    # Neither does the reader refuse everything, nor are the files such as anything would be refused.
    assert COUNT / 5 < sum(said[name][0] == "decoded" for name in damaged) < COUNT * 4 / 5


@linux
def test_a_large_photo_is_read_in_the_memory_that_is_said(tmp_path):
    """45 megapixels, lying on its side; Pillow's limit of 179 fits by the same measure."""
    exif, folder, side = Image.Exif(), tmp_path / "photos", 6700
    exif[0x0112] = 6
    folder.mkdir()
    picture(64, 64).resize((side, side), Image.Resampling.NEAREST).save(folder / "x.jpg", exif=exif, quality=80)
    [(answer, taken)] = read(folder).values()
    assert answer == "decoded"
    assert 3 * side**2 < taken < files.BYTES_A_PIXEL["JPEG"] * side**2  # the former shows that it is measured
    assert files.BYTES_A_PIXEL["JPEG"] * 2 * Image.MAX_IMAGE_PIXELS < files.MEMORY


NO_FILES = {
    "folder": Path.mkdir,
    "empty": Path.touch,
    "loop": lambda path: path.symlink_to(path.name),
    "dead": lambda path: path.symlink_to("nowhere.png"),
    "pipe": lambda path: os.mkfifo(path),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "unreadable": lambda path: path.symlink_to("/proc/self/mem"),  # as on a disk that fails: opened, and then an error
}


@pytest.mark.skipif(os.name != "posix", reason="Windows has no such files")
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_image_file_is_named_in_one_line_or_counted(tmp_path, capfd, kind):
    start_log()
    saved_path, path = tmp_path / "a.png", tmp_path / "x.png"
    picture().save(saved_path)
    NO_FILES[kind](path)
    assert images_below(tmp_path) == [saved_path, *([] if kind == "folder" else [path])]
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))  # rather than wait for a pipe's other end
    signal.alarm(5)
    with pytest.raises(InputError, match=rf"\A{re.escape(str(path))}: .*\Z"):  # in one line
        files.decode_files([saved_path, path], SIZE, skip_bad_images=False)
    kept, pixels = files.decode_files([saved_path, path], SIZE, skip_bad_images=True)
    assert (kept, pixels.shape) == ([saved_path], (1, 3, SIZE, SIZE))
    (warning,) = capfd.readouterr().err.splitlines()
    assert "1 of 2" in warning
    signal.alarm(0)
