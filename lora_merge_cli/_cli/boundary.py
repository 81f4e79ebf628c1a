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

INTERRUPTED = 130
_OUT_OF_RESOURCES = 6


@contextlib.contextmanager
def boundary(*, verbose: bool) -> Iterator[None]:
    """Turn every expected failure of the block into one line on stderr and its exit code.

    An unexpected one is a defect and keeps its traceback. SIGTERM unwinds the block as Ctrl-C does, so that staging is removed.
    """
    # Only the main thread may set a handler; an embedder's thread keeps its own.
    in_main = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, _on_sigterm) if in_main else None
    try:
        yield
    except LoraMergeError as error:
        _fail(str(error), error.exit_code, verbose)
    except KeyboardInterrupt:
        _fail("interrupted: nothing was written", INTERRUPTED, verbose)
    except Terminated:
        _fail("terminated: nothing was written", Terminated.exit_code, verbose)
    except MemoryError:
        _fail("out of memory: see peak memory in --dry-run", _OUT_OF_RESOURCES, verbose)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(0)
    finally:
        if in_main:
            signal.signal(signal.SIGTERM, previous)


def _fail(message: str, code: int, verbose: bool) -> None:
    if verbose:
        traceback.print_exc()
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def _on_sigterm(_number: int, _frame: FrameType | None) -> None:
    raise Terminated
