"""Who is told of progress. Optional everywhere."""

from __future__ import annotations

from typing import Protocol


class Listener(Protocol):
    """Told of progress."""

    def start(self, total_bytes: int) -> None:
        """Work begins; `total_bytes` will be gone through."""
        ...

    def advance(self, name: str, done_bytes: int) -> None:
        """So many more bytes of a leaf are done."""
        ...


class Silent:
    """The listener of those who do not listen."""

    def start(self, total_bytes: int) -> None:
        """See `Listener.start`."""

    def advance(self, name: str, done_bytes: int) -> None:
        """See `Listener.advance`."""
