"""Wait for TensorStore so that an interrupt leaves nothing running."""

from __future__ import annotations

import threading
from typing import Any

import tensorstore as ts


def finished(future: ts.Future[Any]) -> Any:
    """The result of an operation.

    An interrupt is let through only once the operation is over. ``Future.result`` would abandon it: a write would then bring back
    a directory that is being removed, and threads that outlive the interpreter crash it.
    """
    done = threading.Event()
    future.add_done_callback(lambda _: done.set())
    try:
        done.wait()
    except BaseException:
        done.wait()
        raise
    return future.result()
