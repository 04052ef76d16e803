"""What a script says when something is wrong: one line on stderr, no traceback."""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from types import ModuleType


class InputError(ValueError):
    """What the user gave cannot be used: exit code 2. The text says what was wrong and what to do."""


class RunError(RuntimeError):
    """A run that started well cannot go on: exit code 1."""


class Interrupted(Exception):
    """A signal stopped the run, which is saved: exit code 128 + ``signum``, as shells have it."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(text)
        self.signum = signum


def one_line_errors(main: Callable[..., None]) -> Callable[..., int]:
    """Wrap a script's ``main`` so that it returns an exit code and reports in one line."""

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        try:
            main(argv)
        except (InputError, RunError) as error:
            text = " ".join(str(error).split())
            print(f"error: {text}", file=sys.stderr)
            return 2 if isinstance(error, InputError) else 1
        except Interrupted as stop:
            print(stop, file=sys.stderr)
            return 128 + stop.signum
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return 128 + signal.SIGINT
        return 0

    return wrapped


def warn(text: str) -> None:
    """Say something the user should know, on stderr; the run goes on."""
    print(f"warning: {text}", file=sys.stderr)


def import_opencv() -> ModuleType:
    """The cv2 module. Raises InputError where the system lacks the libraries that it draws windows with."""
    # Read when cv2 is first imported. Its decoders take up to 24 bytes a pixel: 1.2 GB, imagefiles.MEMORY.
    os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "50000000")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")  # what is wrong with an image is said by its reader
    try:
        import cv2
    except ImportError as error:
        raise InputError(
            f"OpenCV cannot be loaded ({error}); on a machine without a screen use "
            "'pip uninstall opencv-python' and 'pip install opencv-python-headless'"
        ) from error
    return cv2
