"""Where errors become one line and an exit code. Nothing else in the project prints an error or exits."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType

from lora_merge_cli.errors import LoraMergeError, Terminated

_SIGINT_CODE = 130
INTERRUPTED = (_SIGINT_CODE, Terminated.exit_code)
"""The exit codes of a run that Ctrl-C or SIGTERM ended."""
_OUT_OF_RESOURCES = 6
_UNHEARD = {"__del__", "_xla_gc_callback"}
"""Functions that Python ignores the errors of: finalisers, and JAX's callback of the garbage collector."""
_A_LITTLE = 0.01


@contextlib.contextmanager
def boundary(*, verbose: bool, interrupted: str = "nothing was written") -> Iterator[None]:
    """Turn every expected failure of the block into one line on stderr and its exit code.

    An unexpected one is a defect and keeps its traceback. SIGTERM unwinds the block as Ctrl-C does, so that staging is removed.

    Args:
        verbose: Whether to show the traceback of an expected failure too.
        interrupted: What is at the output after Ctrl-C or SIGTERM.
    """
    # Only the main thread may set a handler; an embedder's thread keeps its own.
    in_main = threading.current_thread() is threading.main_thread()
    handlers = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM) if in_main else ()
    # A shell starts a job in the background with Ctrl-C ignored: so it stays.
    heard = [number for number in handlers if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, _on_signal) for number in heard}
    try:
        yield
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    except BaseException as error:
        known = _message_and_code(error, interrupted)
        if known is None:
            raise
        if verbose:
            traceback.print_exc()
        print(f"error: {known[0]}", file=sys.stderr)
        sys.exit(known[1])
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _message_and_code(error: BaseException, interrupted: str) -> tuple[str, int] | None:
    """What to print and return for an expected failure; None for a defect."""
    # An extension module that is interrupted while it loads reports an ImportError instead.
    for link in _chain(error):
        if isinstance(link, KeyboardInterrupt):
            return f"interrupted: {interrupted}", _SIGINT_CODE
        if isinstance(link, Terminated):
            return f"terminated: {interrupted}", Terminated.exit_code
    if isinstance(error, LoraMergeError):
        return str(error), error.exit_code
    if isinstance(error, OSError):
        return f"the operating system refuses: {error}", _OUT_OF_RESOURCES
    if isinstance(error, MemoryError):
        return "out of memory: see peak memory in --dry-run", _OUT_OF_RESOURCES
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


class _PutOff:
    """The signal that could not be acted on at once."""

    number = signal.SIGINT


def _on_signal(number: int, frame: FrameType | None) -> None:
    """End the run; a little later where nobody would hear of it."""
    if number != signal.SIGALRM:
        _PutOff.number = signal.Signals(number)
    if any(caller.f_code.co_name in _UNHEARD for caller in _callers(frame)):
        signal.setitimer(signal.ITIMER_REAL, _A_LITTLE)
    elif _PutOff.number == signal.SIGTERM:
        raise Terminated
    else:
        raise KeyboardInterrupt


def _callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back
