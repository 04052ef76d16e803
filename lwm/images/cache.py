"""A folder's images decoded once into a file that is mapped into memory. Needs no torch.

The system keeps as much of that file in memory as there is room for; what a run itself takes does not grow with the
images. An entry is a folder named by a hash of the files' paths, sizes and times and of the image size: whole, or not
there. All of it can be deleted at any time.
"""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from lwm.images.files import decode_all
from lwm.runtime import progress
from lwm.runtime.errors import InputError, RunError, log, start_log
from lwm.runtime.files import locked, sync

VERSION = 2  # to be raised when a file would be decoded to other pixels
CHUNK = 250  # images that are decoded at a time
WORTH_WORKERS = 2000  # images; below it the workers take longer to start than they save
WORTH_SAYING = 10**8  # bytes


def decoded(
    paths: Sequence[Path], image_size: int, cache_dir: Path, skip_bad_images: bool = False
) -> tuple[np.ndarray, dict[int, str]]:
    """The pixels of the files that can be read, uint8 (n, 3, size, size), mapped; and what is wrong with the others.

    Raises InputError for a file that cannot be read, unless those are skipped, and if the cache cannot be written
    or is larger than the room on the disk; RunError if a process that decodes is ended from outside.
    """
    entry = cache_dir / _key(paths, image_size)
    if not _is_whole(entry):
        try:
            cache_dir.mkdir(parents=True, exist_ok=True)
            # Of two processes that need the same images one decodes them, and the other waits.
            with locked(cache_dir / f".{entry.name}.lock", wait=True):
                if not _is_whole(entry):
                    _build(entry, paths, image_size, skip_bad_images)
        except OSError as error:
            raise InputError(f"--cache-dir {cache_dir}: cannot be written ({error.strerror})") from error
        except concurrent.futures.BrokenExecutor as error:
            raise RunError("a process that decodes images has ended, perhaps for lack of memory") from error
    bad = {int(index): text for index, text in json.loads((entry / "bad.json").read_text()).items()}
    if bad and not skip_bad_images:
        raise InputError(next(iter(bad.values())))
    shape = (len(paths) - len(bad), 3, image_size, image_size)
    if not shape[0]:
        return np.empty(shape, np.uint8), bad
    # Copied when it is written to: nothing that a run does to its pixels reaches the file.
    return np.memmap(entry / "pixels", np.uint8, "c", shape=shape), bad


def _key(paths: Sequence[Path], image_size: int) -> str:
    digest = hashlib.sha256(f"{VERSION} {image_size}".encode())
    for path in paths:
        try:
            state = path.stat()
            digest.update(f"\n{path.absolute()} {state.st_size} {state.st_mtime_ns}".encode(errors="surrogateescape"))
        except OSError:  # decoding says what is wrong with it
            digest.update(f"\n{path.absolute()}".encode(errors="surrogateescape"))
    return digest.hexdigest()[:32]


def _is_whole(entry: Path) -> bool:
    """Whether the pixels are as many bytes as were written: not so after a copy that was cut off."""
    try:
        return (entry / "pixels").stat().st_size == int((entry / "bytes").read_text()) and (entry / "bad.json").exists()
    except (OSError, ValueError):
        return False


def _build(entry: Path, paths: Sequence[Path], image_size: int, skip_bad_images: bool) -> None:
    image_bytes = 3 * image_size**2
    size = len(paths) * image_bytes
    free = shutil.disk_usage(entry.parent).free
    if size > free:
        room = f"{len(paths)} images take {size / 1e6:.0f} MB and {free / 1e6:.0f} MB are free"
        raise InputError(f"--cache-dir {entry.parent}: {room}; choose another folder")
    if size > WORTH_SAYING:
        log.info(f"decoding {len(paths)} images once, {size / 1e6:.0f} MB, into {entry}")
    temporary = entry.with_name(f".{entry.name}.tmp")
    for stale in (temporary, entry):  # of a process that was killed, or damaged
        shutil.rmtree(stale, ignore_errors=True)
    try:
        temporary.mkdir()
        bad: dict[int, str] = {}
        with (temporary / "pixels").open("wb") as file:
            for number, (pixels, wrong) in enumerate(_chunks(paths, image_size, skip_bad_images)):
                file.write(pixels.data)
                bad |= {number * CHUNK + index: text for index, text in wrong.items()}
            file.flush()
            sync(file.fileno())
        (temporary / "bad.json").write_text(json.dumps(bad))
        (temporary / "bytes").write_text(str((len(paths) - len(bad)) * image_bytes))
        temporary.rename(entry)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _chunks(paths: Sequence[Path], image_size: int, skip_bad_images: bool) -> Iterator[tuple[np.ndarray, dict]]:
    """The images in order, CHUNK at a time: the pixels that could be read, and the errors by index in the chunk."""
    parts = [paths[first : first + CHUNK] for first in range(0, len(paths), CHUNK)]
    decode = functools.partial(decode_all, image_size=image_size, skip_bad_images=skip_bad_images)
    # Of a shared machine a scheduler may have left few cores to this process; macOS cannot say.
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if len(paths) < WORTH_WORKERS or workers == 1:
        yield from progress.bar(map(decode, parts), total=len(parts), desc="decoding")
        return
    # Started anew rather than forked: torch's threads would not survive a fork.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _start_worker, (log.level,))
    try:
        yield from progress.bar(pool.map(decode, parts), total=len(parts), desc="decoding")
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker(level: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that writes
    start_log()
    log.setLevel(level)
