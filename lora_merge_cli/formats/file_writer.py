"""Write large files past the page cache, on a thread behind the one that makes their bytes.

The page cache takes a fresh page for every 4 KiB written, and more time for it than the disk takes to store them. ``O_DIRECT``
(open(2)) stores from the caller's memory instead, if address, offset and length are multiples of the disk's block. Bytes are
therefore gathered in aligned buffers, whose whole blocks are stored so; what remains at a run's ends is written as usual.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from numpy.typing import NDArray

ALIGNMENT = 4096
"""Bytes: a multiple of every common disk's logical block, and no larger than a page of memory."""

_STAGING_BYTES = 8 * 2**20
_STAGINGS = 3
# Measured: at 256 KiB a direct write, which waits for the disk, takes longer than an ordinary one and its share of write-back.
_LEAST_DIRECT_BYTES = 2**20


class FileWriter:
    """A new file, written from one thread, stored by another behind it.

    Used as a context manager it is closed on success and abandoned on an error. Where ``O_DIRECT`` is missing or refused
    (macOS, some network and overlay file systems), and for runs that are too short for it, ordinary writes store the same bytes.
    Like a plain copy it does not wait for the disk's own cache (no fsync).

    Args:
        path: The file, which must not exist yet.
        staging_bytes: The size of one buffer, a multiple of `ALIGNMENT`.
        stagings: How many buffers there are: one being filled, one being stored, the others waiting. They bound the memory.
        least_direct_bytes: Shorter runs are written as usual.

    Raises:
        OSError: The file exists, or cannot be created.
    """

    def __init__(
        self,
        path: Path,
        *,
        staging_bytes: int = _STAGING_BYTES,
        stagings: int = _STAGINGS,
        least_direct_bytes: int = _LEAST_DIRECT_BYTES,
    ) -> None:
        self.bytes_direct = 0
        """Bytes stored past the page cache; final once the file is closed."""
        self.bytes_ordinary = 0
        """Bytes stored through the page cache; final once the file is closed."""
        self._least_direct_bytes = least_direct_bytes
        self._free: SimpleQueue[_Staging] = SimpleQueue()
        for _ in range(stagings):
            self._free.put(_Staging(staging_bytes))
        self._staging: _Staging | None = None
        self._appended = 0
        self._failure: Exception | None = None
        self._abandoned = False
        self._ending: Future[None] | None = None
        # A single thread keeps the order, and the disk busy: two or three direct writes at once are no faster.
        self._behind = ThreadPoolExecutor(1, "store")
        self._open_descriptors = contextlib.ExitStack()
        self._ordinary = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self._open_descriptors.callback(os.close, self._ordinary)
        self._direct = _open_direct(self._ordinary)
        if self._direct is not None:
            self._open_descriptors.callback(os.close, self._direct)

    def __enter__(self) -> FileWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self.close()
        else:
            self.abandon()

    def append(self, buffer: bytes | memoryview) -> None:
        """Add bytes behind those appended before; see `write`."""
        offset = self._appended
        self._appended += memoryview(buffer).nbytes
        self.write(offset, buffer)

    def write(self, offset: int, buffer: bytes | memoryview) -> None:
        """Put bytes at an offset; the buffer may be reused at once.

        Bytes may be given in any order, but none twice. What is never given, before the last byte that is, reads as zeros.

        Raises:
            OSError: Earlier bytes could not be stored (the disk is full, ...). The file is then abandoned.
            ValueError: The file is closed or abandoned.
        """
        if self._ending is not None:
            raise ValueError("the file is closed")
        source = np.frombuffer(buffer, np.uint8)
        while source.size:
            if self._staging is None:
                self._staging = self._free.get()
            self._raise_failure()
            count = self._staging.take(offset, source)
            offset += count
            source = source[count:]
            if source.size or self._staging.is_full:
                self._hand_over()

    def close(self) -> None:
        """Wait until everything is stored, and close the file. Does nothing if it is closed or abandoned.

        Raises:
            OSError: Some bytes could not be stored.
        """
        if self._ending is not None:
            return
        try:
            self._hand_over()
            self._end()
        except BaseException:
            self.abandon()
            raise
        self._raise_failure()

    def abandon(self) -> None:
        """Close the file without what is not stored yet, and without complaint: it is about to be removed."""
        self._abandoned = True
        self._end()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            self.abandon()
            raise self._failure

    def _hand_over(self) -> None:
        if self._staging is not None:
            staging, self._staging = self._staging, None
            self._behind.submit(self._store, staging)

    def _end(self) -> None:
        """Have the thread close the descriptors, so that none is closed under a write and its number reused; wait for both."""
        if self._ending is None:
            self._ending = self._behind.submit(self._close_descriptors)
        try:
            wait([self._ending])
        except BaseException:
            # An interrupt is let through once nothing is running, as in `waiting`.
            self._abandoned = True
            wait([self._ending])
            raise
        finally:
            self._behind.shutdown()
            # Whoever keeps the closed file need not keep its buffers.
            self._free, self._staging = SimpleQueue(), None

    def _close_descriptors(self) -> None:
        try:
            self._open_descriptors.close()
        except OSError as error:
            self._failure = self._failure or error

    def _store(self, staging: _Staging) -> None:
        try:
            for run in staging.runs:
                if self._abandoned or self._failure is not None:
                    break
                self._store_run(staging.memory.data, run)
        except Exception as error:
            self._failure = error
        finally:
            # Also after a failure: the other thread may be waiting for it.
            staging.runs.clear()
            self._free.put(staging)

    def _store_run(self, memory: memoryview, run: _Run) -> None:
        first, last = _aligned(run.begin), run.end - run.end % ALIGNMENT
        if self._direct is None or last - first < self._least_direct_bytes:
            self._store_ordinary(memory, run.begin, run.end, run)
            return
        self._store_ordinary(memory, run.begin, first, run)
        done = self._store_direct(memory, first, last, run)
        self._store_ordinary(memory, done, run.end, run)

    def _store_direct(self, memory: memoryview, begin: int, end: int, run: _Run) -> int:
        """Store whole blocks; returns where it had to stop."""
        done = begin
        # A write that was cut short within a block cannot be continued from there.
        while self._direct is not None and done < end and done % ALIGNMENT == 0:
            try:
                done += os.pwrite(self._direct, memory[done:end], run.offset + done - run.begin)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                self._direct = None
        self.bytes_direct += done - begin
        return done

    def _store_ordinary(self, memory: memoryview, begin: int, end: int, run: _Run) -> None:
        done = begin
        while done < end:
            done += os.pwrite(self._ordinary, memory[done:end], run.offset + done - run.begin)
        self.bytes_ordinary += end - begin


@dataclass
class _Run:
    """Bytes that lie side by side, in a staging buffer and in the file."""

    begin: int
    end: int
    offset: int
    """Where `begin` is in the file."""


class _Staging:
    """A buffer in which every byte lies as far behind a multiple of `ALIGNMENT` as it will in the file."""

    def __init__(self, size: int) -> None:
        if size % ALIGNMENT:
            raise ValueError(f"not a multiple of {ALIGNMENT}: {size}")
        # Mapped, because a mapping begins at a page.
        self.memory: NDArray[np.uint8] = np.frombuffer(mmap.mmap(-1, size, mmap.MAP_PRIVATE), np.uint8)
        self.runs: list[_Run] = []

    @property
    def is_full(self) -> bool:
        """Whether there is no room for any byte."""
        return bool(self.runs) and self.runs[-1].end == self.memory.size

    def take(self, offset: int, source: NDArray[np.uint8]) -> int:
        """Copy as much of the bytes as there is room for; returns how much."""
        run = self.runs[-1] if self.runs else None
        if run is None or run.offset + run.end - run.begin != offset:
            begin = _aligned(run.end if run else 0) + offset % ALIGNMENT
            if begin >= self.memory.size:
                return 0
            run = _Run(begin, begin, offset)
            self.runs.append(run)
        count = min(self.memory.size - run.end, source.size)
        self.memory[run.end : run.end + count] = source[:count]
        run.end += count
        return count


def _aligned(position: int) -> int:
    return -(-position // ALIGNMENT) * ALIGNMENT


def _open_direct(descriptor: int) -> int | None:
    """A second descriptor of an open file, for direct writes; None where there is no such thing."""
    flag: int | None = getattr(os, "O_DIRECT", None)
    if flag is None:
        return None
    try:
        # Through the descriptor it is certainly the same file, whoever may have renamed it.
        return os.open(f"/proc/self/fd/{descriptor}", os.O_WRONLY | os.O_CLOEXEC | flag)
    except OSError:
        return None
