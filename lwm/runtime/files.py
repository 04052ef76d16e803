"""Folders, whole files and locks, on file systems that can do little as well."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import filelock

from lwm.runtime.errors import InputError, log

UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOLCK)  # says a file system


def require_folder(where: str, folder: str | Path) -> None:
    """Raises InputError if ``folder`` is not there and cannot be made, before a run spends its hours. Makes nothing.

    ``where`` is the flag or the constant that names it.
    """
    about = f"{where} is {str(folder)!r}"
    for path in (Path(folder), *Path(folder).parents):
        try:
            path.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            raise InputError(f"{about}: {error.strerror}; take another folder") from error
        if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
            raise InputError(f"{about}: {path} is no folder or cannot be written; take another folder")
        return


def make_folder(folder: Path) -> None:
    """Raises InputError if it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{folder}: cannot be made or used as a folder ({error.strerror})") from error


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Write a file beside ``path`` and move it there once it is whole and on the disk.

    Whatever happens, ``path`` is either what it was or the whole new file. A file that holds ``content`` already is not
    touched. The folder must be there. Raises InputError if it cannot be written, or if something other than a file
    would make way for it: a folder, a device.
    """
    if path.exists() and not path.is_file():
        raise InputError(f"{path}: is there and is no file; take another name")
    temporary = None
    try:
        if _holds(path, content):
            return
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        with contextlib.suppress(OSError):  # a share may have one mode for all of its files
            umask = os.umask(0)
            os.umask(umask)
            os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(f"{path}: cannot be written ({error.strerror})") from error
        raise
    with contextlib.suppress(OSError):  # the file is in place; Windows opens no folder, and a share may sync none
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _holds(path: Path, content: bytes | memoryview) -> bool:
    try:
        return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content
    except OSError:  # what cannot be read is written anew
        return False


def sync(descriptor: int) -> None:
    """Wait until an open file is on the disk, if its file system can tell. Raises OSError if it did not get there."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise


@contextlib.contextmanager
def locked(path: Path, wait: bool) -> Iterator[None]:
    """Hold the lock file ``path``; a file system without locks is named, and nothing is held.

    Raises filelock.Timeout if another process holds it and this one is not to ``wait``, OSError if it cannot be made.
    """
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=wait)
    except (NotImplementedError, OSError) as error:
        if isinstance(error, OSError) and error.errno not in UNSUPPORTED:
            raise
        log.warning(f"{path.parent} knows no locks: a second process in it would not be noticed")
    try:
        yield
    finally:
        lock.release()
