from __future__ import annotations

import math
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats.flat import FlatFile, pieces_of, runs
from lora_merge_cli.formats.interface import FLAT, LeafData, Stored
from lora_merge_cli.records import Region, TensorSpec, full_region, grid, region_shape, slab

DTYPES = [np.dtype(np.uint8), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float32), np.dtype(np.complex64)]


@st.composite
def regions(draw: st.DrawFn) -> tuple[tuple[int, ...], Region]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    region = []
    for extent in shape:
        start = draw(st.integers(0, extent))
        region.append(slice(start, draw(st.integers(start, extent))))
    return shape, tuple(region)


def values(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = math.prod(shape) * dtype.itemsize
    return np.frombuffer(np.random.default_rng(count).bytes(count), dtype).reshape(shape)


@given(regions(), st.sampled_from(DTYPES), st.integers(0, 9))
def test_a_region_is_read_as_numpy_slices_it(tmp_path_factory, cut, dtype, offset):
    shape, region = cut
    whole = values(shape, dtype)
    file = tmp_path_factory.mktemp("flat") / "f"
    file.write_bytes(b"\xff" * offset + whole.tobytes() + b"\xff")
    found = FlatFile(file).read_region(offset, shape, dtype, region)
    assert (found.dtype, found.shape) == (dtype, whole[region].shape)
    assert found.tobytes() == whole[region].tobytes()


@given(regions(), st.sampled_from(DTYPES), st.integers(1, 30), st.booleans())
def test_a_leafs_pieces_join_to_its_bytes(cut, dtype, limit, turned):
    shape, _ = cut
    whole = values(shape, dtype)
    if turned:
        # The same values, in another order in memory.
        whole = np.array(whole, order="F")
    block = slab(shape, limit)
    blocks = ((region, whole[region]) for region in grid(full_region(shape), block))
    found = list(pieces_of(LeafData(TensorSpec(("w",), shape, dtype), block, blocks), dtype))
    assert b"".join(found) == whole.tobytes()
    assert all((piece.format, piece.nbytes) == ("B", len(piece)) for piece in found)


def test_a_leafs_stored_bytes_are_its_pieces():
    words = np.arange(5, dtype=np.uint32)
    stored = Stored(FLAT, [("0", words.data), ("1", b""), ("2", b"tail")])
    found = list(pieces_of(LeafData(TensorSpec(("w",), (6,), words.dtype), (6,), stored), words.dtype))
    assert b"".join(found) == words.tobytes() + b"tail"
    assert [len(piece) for piece in found] == [20, 0, 4]


def test_a_leafs_values_of_another_dtype():
    spec = TensorSpec(("a", "w"), (2,), np.dtype(np.float32))
    blocks = iter([((slice(0, 1),), np.ones(1, np.float32)), ((slice(1, 2),), np.ones(1, ml_dtypes.bfloat16))])
    pieces = pieces_of(LeafData(spec, (1,), blocks), spec.dtype)
    assert len(next(pieces)) == 4
    with pytest.raises(CorruptCheckpoint, match=r"another dtype: a/w \(expected float32, found bfloat16\)"):
        next(pieces)


@given(regions())
def test_runs_are_as_long_as_they_can_be(cut):
    shape, region = cut
    found = list(runs(shape, region, 1))
    ends = [skipped + size for _, skipped, size in found]
    if math.prod(region_shape(region)):
        assert all(end != skipped for end, (_, skipped, _) in zip(ends, found[1:], strict=False)), "two runs touch"


def test_short_reads_are_continued(tmp_path: Path, monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: preadv(fd, [buffers[0][:3]], at))
    whole = values((5, 4), np.dtype(np.float32))
    (tmp_path / "f").write_bytes(b"\0" + whole.tobytes())
    found = FlatFile(tmp_path / "f").read_region(1, (5, 4), whole.dtype, (slice(1, 5), slice(1, 3)))
    assert found.tobytes() == whole[1:, 1:3].tobytes()


def test_pieces_join_to_the_bytes(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("lora_merge_cli.formats.flat._PIECE_BYTES", 4)
    (tmp_path / "f").write_bytes(bytes(range(20)))
    found = [bytes(piece) for _, piece in FlatFile(tmp_path / "f").pieces(3, 10)]
    assert found == [bytes(range(3, 7)), bytes(range(7, 11)), bytes(range(11, 13))]
    assert list(FlatFile(tmp_path / "f").pieces(3, 0)) == []


@pytest.mark.parametrize("ask", [
    lambda file: file.read_bytes(5, 6),
    lambda file: file.read_bytes(50, 1),
    lambda file: file.read_bytes(0, 2**60),
    lambda file: list(file.pieces(5, 6)),
    lambda file: file.read_region(0, (11,), np.dtype(np.int8), (slice(10, 11),)),
])  # fmt: skip
def test_a_file_that_ends_too_soon(tmp_path: Path, ask):
    (tmp_path / "f").write_bytes(bytes(10))
    with pytest.raises(CorruptCheckpoint, match=r"ends too soon: .*f \(expected"):
        ask(FlatFile(tmp_path / "f"))


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CorruptCheckpoint, match="not a regular file"):
            FlatFile(path)


def test_its_descriptor_is_closed_with_it(tmp_path: Path):
    (tmp_path / "f").write_bytes(bytes(10))
    before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else None
    if before is None:
        pytest.skip("no /proc")
    for _ in range(5):
        FlatFile(tmp_path / "f").read_bytes(0, 1)
    assert len(list(Path("/proc/self/fd").iterdir())) == before
