"""What a script says, on stderr: its log, and when something is wrong one line without a traceback."""

from __future__ import annotations

import contextlib
import errno
import functools
import io
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence

# What a run says on the way is logged as info, and what the user should know as a warning; the run goes on.
log = logging.getLogger("lwm")


class InputError(ValueError):
    """What the user gave cannot be used: exit code 2. The text says what was wrong and what to do."""


class RunError(RuntimeError):
    """A run that started well cannot go on: exit code 1."""


class Interrupted(Exception):
    """A signal stopped the run, which is saved: exit code 128 + ``signum``, as shells have it."""

    def __init__(self, signum: int, text: str) -> None:
        super().__init__(text)
        self.signum = signum


# What the user has named cannot be opened, whatever it is named for.
_UNREADABLE = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ENOTDIR, errno.ELOOP)


def process_number() -> int:
    """Which process of a torchrun job this is, from 0; 0 if there is only one."""
    return int(os.environ.get("RANK", 0)) if "WORLD_SIZE" in os.environ else 0


class _Lines(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"warning: {text}" if record.levelno >= logging.WARNING else text


def start_log() -> None:
    """Let the log go to stderr as it is now; of the processes of a torchrun job only the first one speaks.

    A name that a terminal's encoding has no characters for is written in escapes, on stdout too.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    handler.handleError = lambda record: None  # type: ignore[method-assign]  # nobody reads on: the run counts
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.CRITICAL if process_number() else logging.INFO)


def listed(names: Sequence[str], most: int = 10) -> str:
    """The first names of a list that may have thousands, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def be_quiet() -> None:
    """From now on the log has warnings alone."""
    log.setLevel(max(log.level, logging.WARNING))


def one_line_errors(main: Callable[..., None]) -> Callable[..., int]:
    """Wrap a script's ``main`` so that it returns an exit code and reports in one line.

    Of the processes of a torchrun job the first one speaks; the others say only what stopped them alone.
    """

    @functools.wraps(main)
    def wrapped(argv: list[str] | None = None) -> int:
        code, text = 0, ""
        start_log()
        try:
            main(argv)
        except (InputError, RunError) as error:
            code, text = 2 if isinstance(error, InputError) else 1, f"error: {_cut(' '.join(str(error).split()))}"
        except Interrupted as stop:
            code, text = 128 + stop.signum, str(stop)
        except BrokenPipeError:  # nobody reads on, as with ``| head``
            code = 128 + signal.SIGPIPE
        except KeyboardInterrupt:
            code, text = 128 + signal.SIGINT, "interrupted"
        except Exception as error:
            if isinstance(error, OSError) and error.errno in _UNREADABLE and isinstance(error.filename, str):
                code, text = 2, f"error: {error.filename}: {os.strerror(error.errno)}; name another file or folder"
            elif isinstance(error, RuntimeError | MemoryError) and is_lack_of_memory(error):
                reason = (str(error) or "MemoryError").splitlines()[0]
                code, text = 1, f"error: out of memory; fewer or smaller images take less ({reason})"
            else:
                torch, version = sys.modules.get("torch"), sys.modules["lwm"].__version__
                versions = f"version {version}, Python {platform.python_version()}, torch {torch and torch.__version__}"
                error.add_note(
                    "\nThis is a fault of learning-without-memorizing. Please report it with all of the above, the "
                    f"command, and this: {versions}, {platform.platform()}"
                )
                raise
        if process_number() and text:
            # What the user gave is the same for all processes of a machine: its first one says what is wrong with it.
            told = code != 1 and os.environ.get("LOCAL_RANK") != "0"
            text = "" if told else f"process {process_number()}: {text}"
            if told and code == 2:  # torchrun ends all as soon as one has ended, and the first one is to speak before
                time.sleep(3)
        _say(text)
        if code and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            os._exit(code)  # not by way of the others' connections, whose threads would wait or abort
        return code

    return wrapped


def _cut(text: str, longest: int = 1500) -> str:
    """Without its middle if that is too long: a list of classes may have thousands, and at the end is the way out."""
    return text if len(text) <= longest else f"{text[: longest // 2]} ... {text[-longest // 2 :]}"


def _say(text: str) -> None:
    """If a pipe has nobody left to read it, as Ctrl-C ends the ``tee`` behind it too, the exit code still counts."""
    try:
        if text:
            print(text, file=sys.stderr)
        print(end="", flush=True)
    except BrokenPipeError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                os.dup2(nowhere, stream.fileno())  # for the flush at the end of the process


def is_lack_of_memory(error: BaseException) -> bool:
    """torch has no one kind for it on all devices."""
    words = ("out of memory", "not enough memory", "can't allocate memory", "ALLOC_FAILED", "bad_alloc")
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)
