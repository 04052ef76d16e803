"""A lock between processes: the system lets go of it when its holder ends, however it ends."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None  # type: ignore[assignment]

from lwm.runtime.errors import InputError, warn


@contextlib.contextmanager
def held(path: Path, what: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock ``path``, a file that says who holds it and is gone afterwards.

    Where another process holds it, ``wait`` for that one, or raise InputError: ``what`` is in use, and by whom.
    Raises InputError too where the file cannot be made.
    """
    if fcntl is None:
        yield
        return
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise InputError(f"{what}: cannot be written to ({error.strerror})") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
            os.close(descriptor)
            raise InputError(f"{what} is in use by {holder}; wait for it, or choose another folder") from None
        except OSError as error:
            warn(f"{path.parent} knows no locks ({error.strerror}): a second process in it would not be noticed")
        if _same(descriptor, path):  # else its last holder has just removed it
            break
        os.close(descriptor)
    try:
        holder = f"process {os.getpid()} ({shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])})"
        try:
            os.ftruncate(descriptor, 0)
            os.write(descriptor, holder.encode())
        except OSError as error:
            raise InputError(f"{what}: cannot be written to ({error.strerror})") from error
        yield
    finally:
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    except OSError:
        return False
