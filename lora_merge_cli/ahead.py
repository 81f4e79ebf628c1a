"""Iterators that run ahead of whoever takes their items, on threads of their own."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")


class Ahead(Generic[T]):
    """An iterator whose next few items are made on a thread while the current one is used.

    An error of the iterator is raised where its item would have come. Once closed, or used up, its thread is gone.

    Args:
        items: What to run; used by the thread alone.
        waiting: How many items may wait to be taken.
    """

    def __init__(self, items: Iterable[T], waiting: int = 2) -> None:
        self._items = items
        self._waiting = waiting
        self._made: deque[T] = deque()
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._over = self._stopped = False
        self._thread = threading.Thread(target=self._run, name="ahead")
        try:
            self._thread.start()
        except BaseException:
            # An interrupt, for example: the thread may run all the same.
            self._stop()
            raise

    def __enter__(self) -> Ahead[T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._made or self._over)
            if self._made:
                self._changed.notify_all()
                return self._made.popleft()
            error, self._error = self._error, None
        self._thread.join()
        if error is not None:
            raise error
        raise StopIteration

    def close(self) -> None:
        """Stop after the item that is being made, close the iterator, and forget the other items."""
        self._stop()
        self._thread.join()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._made.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            with contextlib.ExitStack() as held:
                items = iter(self._items)
                if isinstance(items, Generator):
                    held.callback(items.close)
                for item in items:
                    with self._changed:
                        self._changed.wait_for(lambda: len(self._made) < self._waiting or self._stopped)
                        if self._stopped:
                            break
                        self._made.append(item)
                        self._changed.notify_all()
                    # While the next one is made, this one belongs to whoever takes it.
                    del item
        except BaseException as raised:  # whatever it is, it belongs to the one who takes the items
            error = raised
        with self._changed:
            self._error, self._over = error, True
            self._changed.notify_all()


def in_order(makers: Iterable[Callable[[], Iterable[T]]], running: int, waiting: int = 2) -> Generator[Ahead[T]]:
    """Run several iterators, one after the other in order, the next ones ahead of their turn.

    Args:
        makers: Each makes one of them.
        running: How many run at a time.
        waiting: How many items of each may wait.

    Returns:
        Each of them at its turn; the one before is closed then. Closing this iterator closes all.
    """
    opened: deque[Ahead[T]] = deque()
    remaining = iter(makers)
    try:
        for maker in remaining:
            opened.append(Ahead(maker(), waiting))
            if len(opened) == running:
                yield opened[0]
                opened[0].close()
                opened.popleft()
        while opened:
            yield opened[0]
            opened[0].close()
            opened.popleft()
    finally:
        with contextlib.ExitStack() as held:
            for one in opened:
                held.callback(one.close)
