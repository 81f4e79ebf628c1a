"""Keep freed memory instead of handing it back.

A merge allocates and frees buffers of a gigabyte. By default glibc maps each anew, and the kernel clears every page of it: most of
a merge's time was system time. Only for a process of our own, since it is a setting of all of it.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -4, -8
_NEVER = -1  # read as the largest size


def keep_freed_memory() -> None:
    """Tell glibc's allocator to reuse large buffers; does nothing elsewhere."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_ARENA_MAX, 1)):
            mallopt(option, value)
