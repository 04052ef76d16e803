"""How a run ends before its time: by a signal, for lack of memory, or because another process has ended."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from lwm.runtime import distributed
from lwm.runtime.errors import RunError, is_lack_of_memory


class StopSignal:
    """The first Ctrl-C or SIGTERM is noted in ``received``, and the loop ends well; the second ends the process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) is not signal.SIG_IGN:  # as under nohup
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        # Where another process has ended, torchrun sends SIGTERM: what went wrong is to be said first.
        ends_with_others = error[0] is not None and distributed.size() > 1
        for signum, handler in self._before.items():
            signal.signal(signum, signal.SIG_IGN if ends_with_others else handler)

    def _note(self, signum: int, frame: object) -> None:
        self.received = signum
        for each in self._before:
            signal.signal(each, signal.SIG_DFL)
        # print could not be used: the signal may have come in the middle of one. And Ctrl-C ends the reader of a pipe,
        # such as tee, as well.
        if distributed.size() == 1:  # torchrun sends one where another process has failed, too
            with contextlib.suppress(OSError):
                os.write(2, b"\nstopping: saving after this step; once more stops at once\n")

    def agreed(self) -> int | None:
        """The signal that any of the processes has received; all of them ask at once."""
        return distributed.largest(self.received or 0) or None


@contextlib.contextmanager
def failures_named(device: torch.device, batch_size: int, what_is_left: Callable[[], str]) -> Iterator[None]:
    """What may end a training that began well becomes a RunError that says what is left of the run: lack of memory, the
    end of another process, and a batch of one image with feature maps so small that batch-norm needs more.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        reason = "a batch of one image is too small for batch-norm in this network; take another --batch-size"
        raise RunError(f"{reason}; {what_is_left()}") from error
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RunError):
            raise
        if distributed.is_loss_of_a_process(error):
            raise RunError(f"another process of this run has ended; {what_is_left()}") from error
        if not is_lack_of_memory(error):
            raise
        reason = f"out of memory on {device} with --batch-size {batch_size}; a lower one begins anew and takes less"
        raise RunError(f"{reason}; {what_is_left()}") from error
