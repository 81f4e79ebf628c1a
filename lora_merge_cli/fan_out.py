"""One stream of leaves into several sinks that pull, in step: each leaf is made once, and none is kept for a slower sink.

The leaves are made in the calling thread, which alone hears signals; every writer has a thread of its own. They talk through
`SimpleQueue` only: an interrupt finds each of its calls either done or not begun. The methods of `threading.Condition` are Python
code, and an interrupt amid them may leave its lock held for ever.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeAlias, TypeVar

from lora_merge_cli.errors import LoraMergeError
from lora_merge_cli.formats.interface import LeafData, Stored
from lora_merge_cli.records import Array, KeyPath, Region, TensorSpec

T = TypeVar("T")
Item = TypeVar("Item")

Writer: TypeAlias = Callable[[Iterator[LeafData]], T]
"""Pulls one output's leaves in order, and does whatever else it takes to finish that output. Asking for a leaf gives up what it
has not taken of the one before."""

Piece: TypeAlias = tuple[str, bytes | memoryview]
"""One of `Stored.values`."""

SharedBlock: TypeAlias = tuple[Region, tuple[Array | LoraMergeError, ...]]
"""A run of a leaf's entries, once per output. An error in the place of values ends that output, and no other."""


@dataclass(frozen=True)
class Broadcast:
    """One leaf on its way into several sinks. See `LeafData` for what each of them gets."""

    specs: tuple[TensorSpec, ...]
    """What the leaf is to be, per output."""
    chunk: tuple[int, ...]
    """As `LeafData.chunk`."""
    data: Stored | Iterator[SharedBlock]
    """The same bytes for all outputs, or the values of each."""
    same_as: KeyPath | None = None
    """As `LeafData.same_as`."""

    def of(self, number: int, data: Stored | Iterator[SharedBlock]) -> LeafData:
        """The leaf of one output, with the leaf's data as that output takes it."""
        own = data if isinstance(data, Stored) else map(functools.partial(_own, number), data)
        return LeafData(self.specs[number], self.chunk, own, self.same_as)


def _own(number: int, block: SharedBlock) -> tuple[Region, Array]:
    region, entries = block
    entry = entries[number]
    if isinstance(entry, LoraMergeError):
        raise entry
    return region, entry


class FanOut:
    """One run of several writers over one stream of leaves.

    A leaf, and each piece of its data, goes to every writer that asks for it; the next one is made only once every writer has asked
    for more or has ended. What none asks for is not made. A single writer runs in the calling thread, without any other.

    Args:
        count: How many writers there will be.
    """

    def __init__(self, count: int) -> None:
        self.alive = [True] * count
        """Per output, whether its writer goes on: what is made for another is wasted. Up to date whenever an item is made."""
        self.cancelled = False
        """Whether the run failed or was interrupted. A writer that pulls is stopped; one that has all leaves may look here, and
        raise whatever it likes."""
        self._heard: SimpleQueue[int] = SimpleQueue()
        self._leaves_failed = False

    def run(self, leaves: Generator[Broadcast], writers: Sequence[Writer[T]]) -> list[T | LoraMergeError]:
        """Give every writer all leaves.

        Args:
            leaves: Pulled in the calling thread alone, and closed at the end, whichever it is.
            writers: One per output.

        Returns:
            What each writer returned, or the `LoraMergeError` that it raised; the others went on.

        Raises:
            BaseException: What the leaves raised, what a writer raised that is no `LoraMergeError`, or an interrupt. Every writer
                was stopped at its next pull, by an exception that is no `Exception`, and its thread is gone.
        """
        if len(writers) != len(self.alive):
            raise ValueError(f"{len(writers)} writers for {len(self.alive)} outputs")
        with contextlib.closing(leaves):
            if len(writers) == 1:
                return [self._alone(leaves, writers[0])]
            return self._in_step(leaves, writers)

    def _alone(self, leaves: Iterable[Broadcast], writer: Writer[T]) -> T | LoraMergeError:
        try:
            return writer(self._all_of(leaves))
        except LoraMergeError as error:
            if self._leaves_failed:
                raise
            return error
        finally:
            self.alive[0] = False

    def _all_of(self, leaves: Iterable[Broadcast]) -> Iterator[LeafData]:
        for leaf in self._watched(leaves):
            if isinstance(leaf.data, Stored):
                yield leaf.of(0, Stored(leaf.data.encoding, self._watched(leaf.data.values)))
            else:
                yield leaf.of(0, self._watched(leaf.data))

    def _watched(self, items: Iterable[Item]) -> Iterator[Item]:
        # No generator: it would hold an item while the next one is made, or close the leaves where nobody hears of interrupts.
        return iter(functools.partial(self._made, iter(items)), None)

    def _made(self, items: Iterator[Item]) -> Item | None:
        """The next item, or None. An error in making it is told from one in writing."""
        try:
            return next(items, None)
        except LoraMergeError:
            self._leaves_failed = True
            raise

    def _in_step(self, leaves: Iterator[Broadcast], writers: Sequence[Writer[T]]) -> list[T | LoraMergeError]:
        readers = [_Reader(number, writer, self._heard) for number, writer in enumerate(writers)]
        try:
            for reader in readers:
                reader.start()
            self._go_on(readers)
            while asking := [reader for reader in readers if reader.running]:
                self._pass_on(next(leaves, None), asking)
        finally:
            self._end(readers)
        return [reader.outcome() for reader in readers]

    def _pass_on(self, leaf: Broadcast | None, readers: Sequence[_Reader[T]]) -> None:
        """See all readers through a leaf, or, where none is left, to their ends."""
        if leaf is None:
            for reader in readers:
                reader.leaf = None
            self._go_on(readers)
            return
        data = _shared(leaf, readers)
        self._go_on(readers)
        while inside := [reader for reader in readers if reader.running and reader.inside]:
            data.advance()
            self._go_on(inside)
        data.end()

    def _go_on(self, readers: Iterable[_Reader[T]]) -> None:
        """Let readers that wait go on, until each has asked for more or ended."""
        busy = {reader.number: reader for reader in readers}
        for reader in busy.values():
            reader.tell(go_on=True)
        while busy:
            reader = busy.pop(self._heard.get())
            if not reader.running:
                self.alive[reader.number] = False
                if not (reader.error is None or isinstance(reader.error, LoraMergeError)):
                    raise reader.error

    def _end(self, readers: Sequence[_Reader[T]]) -> None:
        """Stop the readers that still run, and wait for them, however often that is interrupted."""
        interrupt: BaseException | None = None
        while True:
            try:
                running = [reader for reader in readers if reader.running]
                if not running:
                    break
                self.cancelled = True
                # Told at each turn: an interrupt may have kept the last word from some, and one word too many does no harm.
                for reader in running:
                    reader.tell(go_on=False)
                self._heard.get()
            except BaseException as error:
                interrupt = error
        for reader in readers:
            reader.join()
        if interrupt is not None:
            raise interrupt


class _Stopped(BaseException):
    """Unwinds a writer whose run is over. Not an `Exception`: nothing but clean-up may act on it."""


class _Shared(Generic[Item]):
    """The items of one iterator, for all readers: one at a time."""

    def __init__(self, items: Iterable[Item]) -> None:
        self._items = iter(items)
        self.item: Item | None = None
        """The current one; None before the first and after the last."""
        self.over = False
        """Whether there will be no other."""

    def advance(self) -> None:
        """Make the next item."""
        # Not held while the next one is made: it may be large.
        self.item = None
        self.item = next(self._items, None)
        self.over = self.item is None

    def end(self) -> None:
        """Let go of what nobody asked for: a reader's error may hold this object for long."""
        items, self._items, self.item, self.over = self._items, iter(()), None, True
        if isinstance(items, Generator):
            # Not left to its finaliser, where nobody would hear of an interrupt.
            items.close()


class _Reader(Generic[T]):
    """A writer on a thread of its own, which waits at each pull until it is told to go on, or to stop.

    Its attributes are the calling thread's while it waits, and its own while it does not.

    Args:
        number: Which output it writes.
        writer: What to run.
        heard: Where it says its number whenever it begins to wait, and once it has ended.
    """

    def __init__(self, number: int, writer: Writer[T], heard: SimpleQueue[int]) -> None:
        self.number = number
        self.running = False
        """Whether it will be heard of again."""
        self.leaf: LeafData | None = None
        """The leaf that it gets when it asks for one."""
        self.inside = False
        """Whether it asks for more of its leaf's data, and not for the next leaf."""
        self.error: BaseException | None = None
        """What the writer raised."""
        self._result: T
        self._writer = writer
        self._heard = heard
        self._told: SimpleQueue[bool] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"writer {number}")

    def start(self) -> None:
        """Start the thread. The writer begins only when it is told to go on."""
        try:
            self.running = True
            self._thread.start()
        except BaseException:
            # An interrupt, for example: the thread may run all the same.
            self.running = False
            self.tell(go_on=False)
            raise

    def tell(self, *, go_on: bool) -> None:
        """Say once whether to go on."""
        self._told.put(go_on)

    def join(self) -> None:
        """Wait for a thread that does not run the writer any more."""
        if self._thread.is_alive():
            self._thread.join()

    def outcome(self) -> T | LoraMergeError:
        """What the writer returned or raised."""
        return self.error if isinstance(self.error, LoraMergeError) else self._result

    def take(self, items: _Shared[Item]) -> Iterator[Item]:
        """The items from the current one on, in step with the other readers; none once they are over."""
        while not items.over:
            self._ask(inside=True)
            if items.item is not None:
                yield items.item

    def _run(self) -> None:
        try:
            self._wait()
            self._result = self._writer(self._leaves())
        except BaseException as error:  # whatever it is, the calling thread decides what becomes of it
            self.error = error
        self.running = False
        self._heard.put(self.number)

    def _leaves(self) -> Iterator[LeafData]:
        self._ask(inside=False)
        while self.leaf is not None:
            yield self.leaf
            self._ask(inside=False)

    def _ask(self, *, inside: bool) -> None:
        self.inside = inside
        self._heard.put(self.number)
        self._wait()

    def _wait(self) -> None:
        if not self._told.get():
            raise _Stopped


def _shared(leaf: Broadcast, readers: Iterable[_Reader[T]]) -> _Shared[Piece] | _Shared[SharedBlock]:
    """Put a leaf before each reader; its data is what they share."""
    if isinstance(leaf.data, Stored):
        pieces = _Shared(leaf.data.values)
        for reader in readers:
            reader.leaf = leaf.of(reader.number, Stored(leaf.data.encoding, reader.take(pieces)))
        return pieces
    blocks = _Shared(leaf.data)
    for reader in readers:
        reader.leaf = leaf.of(reader.number, reader.take(blocks))
    return blocks
