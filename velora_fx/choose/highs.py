"""Integer programs, solved by HiGHS without a word."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

from scipy import optimize

ONE_AT_A_TIME = threading.Lock()  # else one would put back what another has put there


def milp(*args: Any, **kwargs: Any) -> optimize.OptimizeResult:
    """`scipy.optimize.milp`, of which nothing is printed: HiGHS has lines that no option of it switches off."""
    with silent_descriptors():
        return optimize.milp(*args, **kwargs)


@contextlib.contextmanager
def silent_descriptors() -> Iterator[None]:
    """Drops what is written to file descriptors 1 and 2 meanwhile, as C code does; descriptors that are closed stay so.

    What Python and C have buffered before is written first.
    """
    with ONE_AT_A_TIME, contextlib.ExitStack() as stack:
        _flush()
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):
                kept = os.dup(descriptor)
                stack.callback(os.close, kept)
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)
                stack.callback(os.dup2, kept, descriptor)
        stack.callback(_flush_c)  # before the descriptors are back
        yield


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # there is none, or it is closed
            stream.flush()
    _flush_c()


def _flush_c() -> None:
    with contextlib.suppress(OSError, TypeError, AttributeError):  # where C's own buffers cannot be reached
        ctypes.CDLL(None).fflush(None)
