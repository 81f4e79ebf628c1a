"""What one block of a kernel hands to the next, whichever threads compute them."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from typing import Any


class Carries:
    """Values by the row that they are for. Each is put once, and taken once.

    Whoever takes waits until it is put: blocks that follow one another must be started in their order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: dict[int, Future[Any]] = {}

    def take(self, row: int) -> Any:
        """What was put for a row.

        Raises:
            RuntimeError: The block before could not be computed.
        """
        future = self._at(row)
        try:
            return future.result()
        finally:
            with self._lock:
                del self._waiting[row]

    def put(self, row: int, carry: Any) -> None:
        """Hand over to the block that starts at a row."""
        self._at(row).set_result(carry)

    def give_up(self, row: int) -> None:
        """Tell the block that starts at a row that there is nothing to start from, unless something was put for it."""
        future = self._at(row)
        if not future.done():
            future.set_exception(RuntimeError("the block before could not be computed"))

    def _at(self, row: int) -> Future[Any]:
        with self._lock:
            return self._waiting.setdefault(row, Future())
