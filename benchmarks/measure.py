"""One run of a command: its wall, user and system seconds, its peak memory, and the bytes that it read and wrote."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

_BLOCK = 512  # bytes: the unit of ru_inblock and ru_oublock, getrusage(2)
_PIECE = 8 * 2**20


@dataclass(frozen=True)
class Run:
    """What one run of a command took. Sizes are in bytes, times in seconds."""

    wall: float
    """With a sync of the disks at its end."""
    user: float
    system: float
    peak_rss: int
    """``ru_maxrss``: mapped pages count. Never less than what the benchmark itself held when it started the command."""
    asked_to_read: int
    """``rchar``: what read(2) and its kin returned, from the page cache or from the disk; mapped files are not in it."""
    asked_to_write: int
    """``wchar``: what write(2) and its kin took."""
    read_from_disk: int
    """``read_bytes``: what had to be fetched from storage, mapped files included."""
    written_to_disk: int
    """``write_bytes``: what was sent to storage, or dirtied for it in the page cache."""
    blocks_in: int
    """``ru_inblock``, in bytes."""
    blocks_out: int
    """``ru_oublock``, in bytes."""


class CommandFailed(Exception):
    """A command of a benchmark ended with a status other than 0."""


def measured(command: Sequence[str]) -> Run:
    """Run a command, with the disks synced before, and within the time after.

    Raises:
        CommandFailed: It failed.
    """
    os.sync()
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    # The counters are gone once the process is reaped: they are read while it is a zombie, proc(5).
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    counters = _counters(process.pid)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    os.sync()
    wall = time.perf_counter() - started
    if process.returncode:
        raise CommandFailed(f"{' '.join(command)[:500]} ended with status {process.returncode}")
    return Run(
        wall,
        usage.ru_utime,
        usage.ru_stime,
        usage.ru_maxrss * 1024,
        counters["rchar"],
        counters["wchar"],
        counters["read_bytes"],
        counters["write_bytes"],
        usage.ru_inblock * _BLOCK,
        usage.ru_oublock * _BLOCK,
    )


def settle_cache(paths: Iterable[Path], *, warm: bool) -> None:
    """Bring all files under some paths into the page cache, or drop them from it, so that every run starts alike.

    Files that were written past the cache are not in it and those written through it are: what a command finds there would
    otherwise depend on how its input was made.
    """
    files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file()]
    if not warm:
        os.sync()  # only clean pages can be dropped
    buffer = bytearray(_PIECE)
    for file in files:
        with file.open("rb", buffering=0) as opened:
            if warm:
                while opened.readinto(buffer):
                    pass
            else:
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _counters(pid: int) -> dict[str, int]:
    pairs = (line.split(":") for line in Path(f"/proc/{pid}/io").read_text().splitlines())
    return {name: int(value) for name, value in pairs}
