"""Writing one torch file that ``torch.load(weights_only=True)`` opens, mapped too, piece by piece."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint, storage_refusal
from lora_merge_cli.formats.flat import pieces_of
from lora_merge_cli.formats.interface import FLAT, LeafData
from lora_merge_cli.formats.torch_dtypes import dtype_name
from lora_merge_cli.formats.torch_pickle_writer import StoredTensor, write_pickle
from lora_merge_cli.formats.torch_tree import nest, value_of
from lora_merge_cli.formats.torch_zip_writer import ALIGNMENT, ZipWriter
from lora_merge_cli.records import Constant, KeyPath, TensorSpec

_ARCHIVE = "archive"


class TorchSink:
    """Writes one file. See `Sink` for what each method promises.

    Args:
        path: The file.
        containers: What each container of the tree is, where the checkpoint was a torch file itself; others become lists and dicts.
        order: The leaves and constants in the order in which they are to be; others follow.
    """

    def __init__(
        self,
        path: Path,
        containers: Mapping[KeyPath, type[Any]] | None = None,
        order: Iterable[KeyPath] = (),
    ) -> None:
        self._path = path
        self._containers = containers or {}
        self._order = tuple(order)

    @property
    def encodings(self) -> frozenset[str]:
        """See `Sink.encodings`."""
        return frozenset({FLAT})

    def write(self, specs: Sequence[TensorSpec], leaves: Iterable[LeafData], constants: Iterable[Constant]) -> int:
        """See `Sink.write`.

        Raises:
            UnsupportedCheckpoint: torch has no such dtype, or one key path lies inside another leaf.
            CorruptCheckpoint: A leaf was not given in full.
        """
        for spec in specs:
            if dtype_name(spec.dtype) is None:
                raise UnsupportedCheckpoint(
                    "torch has no such dtype", where=f"{self._path} :: {spec.name}", found=spec.dtype.name
                )
        values = {constant.path: value_of(constant) for constant in constants}
        # Found out before anything is written.
        self._nested(dict.fromkeys((*(spec.path for spec in specs), *values)))
        with _storing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            archive = ZipWriter(self._path)
        try:
            tensors: dict[KeyPath, StoredTensor] = {}
            for number, leaf in enumerate(leaves):
                same = None if leaf.same_as is None else tensors.get(leaf.same_as)
                if same is None or (same.shape, same.dtype) != (leaf.spec.shape, leaf.spec.dtype):
                    same = self._write_leaf(archive, leaf, str(number))
                tensors[leaf.spec.path] = same
            pickled = write_pickle(self._nested({**tensors, **values}))
            with _storing(self._path):
                archive.add(f"{_ARCHIVE}/data.pkl", pickled)
                archive.add(f"{_ARCHIVE}/.storage_alignment", str(ALIGNMENT).encode())
                archive.add(f"{_ARCHIVE}/byteorder", b"little")
                archive.add(f"{_ARCHIVE}/version", b"3\n")
                return archive.close()
        finally:
            archive.abandon()

    def _nested(self, leaves: Mapping[KeyPath, Any]) -> Any:
        known = {path: leaves[path] for path in self._order if path in leaves}
        return nest({**known, **leaves}, self._containers, self._path)

    def _write_leaf(self, archive: ZipWriter, leaf: LeafData, key: str) -> StoredTensor:
        spec = leaf.spec
        archive.begin(f"{_ARCHIVE}/data/{key}", spec.nbytes)
        done = 0
        for piece in pieces_of(leaf, spec.dtype):
            with _storing(self._path):
                archive.append(piece)
            done += len(piece)
        if done != spec.nbytes:
            raise CorruptCheckpoint(
                "a leaf that was not given in full",
                where=f"{self._path} :: {spec.name}",
                expected=f"{spec.nbytes} bytes in {spec.dtype}",
                found=done,
            )
        with _storing(self._path):
            archive.finish()
        return StoredTensor(key, spec.shape, spec.dtype)


@contextlib.contextmanager
def _storing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_refusal(path, error) from error
