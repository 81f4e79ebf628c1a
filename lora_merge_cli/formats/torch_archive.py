"""The containers that ``torch.save`` has written: which one a file is, what its pickle says, and where its storages' bytes lie.

Since torch 1.6 it is a zip archive with ``<prefix>/data.pkl`` and one uncompressed member ``<prefix>/data/<key>`` per storage
(`torch_zip`). Before, it was five pickles in a row and then the storages (`torch_legacy`); before 0.1.10 a tar archive, which is
refused.
"""

from __future__ import annotations

from pathlib import Path

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.formats.flat import FlatFile
from lora_merge_cli.formats.torch_legacy import MAGIC, read_legacy
from lora_merge_cli.formats.torch_zip import Archive, is_torch_zip, read_zip

SUFFIXES = frozenset({".pth", ".pt", ".bin", ".ckpt"})

_HEAD_BYTES = 512
_TAR_MAGIC = slice(257, 262)
_TAR_MEMBERS = frozenset({b"sys_info", b"pickle", b"tensors", b"storages"})
_COPY_AGAIN = "copy the checkpoint again from where it was written"


def open_archive(path: Path) -> Archive | None:
    """Read what the file says about its tensors, or return None if torch did not write it.

    Raises:
        CorruptCheckpoint: It is torch's, and damaged.
        UnsupportedCheckpoint: It is torch's, and of a kind that is not read, or asks for what no state dict needs.
    """
    file = FlatFile(path)
    head = file.read_bytes(0, min(file.size, _HEAD_BYTES))
    named_so = path.suffix.lower() in SUFFIXES
    if head.startswith(b"PK"):
        return read_zip(file) if is_torch_zip(file, head, named_so=named_so) else None
    # The magic number follows the protocol and, from pickle protocol 4 on, a frame.
    if head.startswith(b"\x80") and MAGIC in head[: len(MAGIC) + 16]:
        return read_legacy(file)
    if head[_TAR_MAGIC] == b"ustar" and (named_so or head.split(b"\0", 1)[0] in _TAR_MEMBERS):
        raise UnsupportedCheckpoint(
            "a checkpoint of torch 0.1's tar format",
            where=path,
            hint="load it with torch, if you trust it, and save it again",
        )
    if named_so:
        _refuse_by_content(path, head)
    return None


def _refuse_by_content(path: Path, head: bytes) -> None:
    """Refuse what only the file's name says to be torch's, if it is something well-known."""
    if not head:
        raise CorruptCheckpoint("an empty file", where=path, hint=_COPY_AGAIN)
    if head.startswith(b"version https://git-lfs"):
        raise CorruptCheckpoint("a Git LFS pointer, and not the file", where=path, hint="run git lfs pull")
    if head.startswith(b"\x80"):
        raise UnsupportedCheckpoint(
            "a plain pickle, which torch.save did not write",
            where=path,
            hint="load it with what wrote it, if you trust it, and save it with torch.save",
        )
