"""The source of a result under judgement, whose damage is a finding and no error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor

from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats.interface import Source, Stored
from lora_merge_cli.records import Array, KeyPath, Region


class Unreadable(Exception):
    """A leaf of the result cannot be read."""


class JudgedSource:
    """Reads another source, and raises `Unreadable` where that raises `CorruptCheckpoint`."""

    def __init__(self, source: Source) -> None:
        self._source = source
        self.path = source.path
        self.index = source.index
        self.fingerprint = source.fingerprint

    def scan(self, path: KeyPath, regions: Iterable[Region], pool: Executor | None = None) -> Iterator[Array]:
        """See `Source.scan`.

        Raises:
            Unreadable: The leaf cannot be read.
        """
        with _as_finding():
            yield from self._source.scan(path, regions, pool)

    def read(self, path: KeyPath, region: Region) -> Array:
        """See `Source.read`.

        Raises:
            Unreadable: The leaf cannot be read.
        """
        with _as_finding():
            return self._source.read(path, region)

    def stored(self, path: KeyPath) -> Stored | None:
        """See `Source.stored`.

        Raises:
            Unreadable: The leaf cannot be read; its values raise it too.
        """
        with _as_finding():
            found = self._source.stored(path)
        return None if found is None else Stored(found.encoding, _values(found))


def _values(found: Stored) -> Iterator[tuple[str, bytes | memoryview]]:
    with _as_finding():
        yield from found.values


@contextlib.contextmanager
def _as_finding() -> Iterator[None]:
    try:
        yield
    except CorruptCheckpoint as error:
        found = "" if error.found is None else f": {error.found}"
        raise Unreadable(f"{error.what}{found}") from error
