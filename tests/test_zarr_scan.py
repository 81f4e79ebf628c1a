from __future__ import annotations

import functools
import itertools
import json
import math
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats import zarr_scan
from lora_merge_cli.formats.flat import FlatFile
from lora_merge_cli.formats.zarr_array import ZarrArray
from lora_merge_cli.formats.zarr_scan import scan
from lora_merge_cli.records import Array, Region, full_region

DRIVERS = {2: "zarr", 3: "zarr3"}
DOCUMENTS = {2: ".zarray", 3: "zarr.json"}
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
DTYPES = [
    *(np.dtype(name) for name in ("bool", "int8", "uint16", "int64", "float16", "float32", "float64", "complex64")),
    *(
        np.dtype(getattr(ml_dtypes, name))
        for name in (
            "bfloat16",
            "float8_e4m3fn",
            "float8_e4m3fnuz",
            "float8_e4m3b11fnuz",
            "float8_e5m2",
            "float8_e5m2fnuz",
        )
    ),
]
CODECS: dict[str, dict[int, dict[str, Any]]] = {
    "raw": {2: {"compressor": None}, 3: {"codecs": [LITTLE]}},
    **{
        f"zstd {level}": {
            2: {"compressor": {"id": "zstd", "level": level}},
            3: {"codecs": [LITTLE, {"name": "zstd", "configuration": {"level": level}}]},
        }
        for level in (1, 10)
    },
}


@dataclass(frozen=True)
class Value:
    size: int
    inline: bytes | None
    file: Path | None
    offset: int = 0


def in_file(path: Path) -> Value:
    return Value(path.stat().st_size, None, path)


def inline(data: bytes) -> Value:
    return Value(len(data), data, None)


def entries(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0) -> Array:
    generator = np.random.default_rng(seed)
    if dtype.kind == "b":
        return generator.integers(0, 2, shape).astype(bool)
    return np.frombuffer(generator.bytes(math.prod(shape) * dtype.itemsize), dtype).reshape(shape)


def store(
    folder: Path, whole: Array, chunks: tuple[int, ...], version: int, metadata: dict[str, Any]
) -> ts.TensorStore:
    """The oracle: an array that TensorStore writes, and reads again."""
    grid = {2: {"chunks": chunks}, 3: {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunks}}}}
    array = ts.open(
        {
            "driver": DRIVERS[version],
            "kvstore": {"driver": "file", "path": f"{folder}/"},
            "metadata": {"shape": whole.shape, **grid[version], **metadata},
            # A chunk of zeros would be left out.
            "store_data_equal_to_fill_value": True,
        },
        dtype=ts.dtype(whole.dtype),
        create=True,
        delete_existing=True,
    ).result()
    array.write(whole).result()
    return array


def parsed(folder: Path, version: int) -> ZarrArray:
    array = ZarrArray.parse((folder / DOCUMENTS[version]).read_bytes(), version)
    assert array is not None
    return array


def read_all(
    array: ZarrArray, values: Callable[[str], Value], regions: list[Region], pool: ThreadPoolExecutor | None = None
) -> list[Array]:
    return list(scan(array, values, regions, functools.cache(FlatFile), pool))


def whole_of(array: ZarrArray, *data: bytes) -> Array:
    values = dict(zip(array.names(), map(inline, data), strict=True))
    return read_all(array, values.__getitem__, [full_region(array.shape)])[0]


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as threads:
        yield threads


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("arrays")


@st.composite
def layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(0, 7) | st.integers(1, 4), max_size=4)))
    return shape, tuple(draw(st.integers(1, extent + 2)) for extent in shape)


@st.composite
def walks(draw: st.DrawFn, shape: tuple[int, ...]) -> list[Region]:
    """Ascending regions: singles along the first axes, cuts of the next one, the whole of the others; some left out."""
    if not shape:
        return [()]
    axis = draw(st.integers(0, len(shape) - 1))
    found: list[Region] = []
    for leading in itertools.product(*map(range, shape[:axis])):
        cuts = sorted(draw(st.sets(st.integers(0, shape[axis]), max_size=4)) | {0, shape[axis]})
        found.extend(
            (*(slice(i, i + 1) for i in leading), slice(start, stop), *full_region(shape[axis + 1 :]))
            for start, stop in itertools.pairwise(cuts)
        )
    return [region for region in found if draw(st.integers(0, 4))] if draw(st.booleans()) else found


@settings(max_examples=100, deadline=None)
@given(
    layouts(),
    st.data(),
    st.sampled_from(DTYPES),
    st.sampled_from(list(CODECS)),
    st.sampled_from([2, 3]),
    st.booleans(),
    st.sampled_from([4, 40, 2**18]),
)
def test_regions_are_what_tensorstore_reads(
    folder: Path, pool: ThreadPoolExecutor, layout, data, dtype, codec, version, pooled, piece
):
    shape, chunks = layout
    expected = store(folder, entries(shape, dtype), chunks, version, CODECS[codec][version])
    regions = data.draw(walks(shape))
    with pytest.MonkeyPatch.context() as patch:
        # Pieces smaller than a row, and than a chunk: the walk must not depend on them.
        patch.setattr(zarr_scan, "_DECODED_PIECE", max(piece, dtype.itemsize))
        patch.setattr(zarr_scan, "_STORED_PIECE", piece)
        found = read_all(parsed(folder, version), lambda n: in_file(folder / n), regions, pool if pooled else None)
    assert len(found) == len(regions)
    for region, part in zip(regions, found, strict=True):
        oracle = np.asarray(expected[region].read().result())
        assert (part.dtype, part.shape) == (oracle.dtype, oracle.shape)
        assert part.flags.c_contiguous and part.flags.writeable
        assert part.tobytes() == oracle.tobytes()


@settings(max_examples=60, deadline=None)
@given(layouts(), st.sampled_from([2, 3]), st.sampled_from([None, "v2", "default"]), st.sampled_from([None, ".", "/"]))
def test_chunk_names_are_those_that_tensorstore_writes(tmp_path_factory, layout, version, encoding, separator):
    folder = tmp_path_factory.mktemp("named")
    shape, chunks = layout
    metadata = dict(CODECS["raw"][version])
    if version == 2 and separator:
        metadata["dimension_separator"] = separator
    if version == 3 and encoding:
        options = {"separator": separator} if separator else {}
        metadata["chunk_key_encoding"] = {"name": encoding, "configuration": options}
    store(folder, entries(shape, np.dtype(np.int8)), chunks, version, metadata)
    files = {f.relative_to(folder).as_posix() for f in folder.rglob("*") if f.is_file()}
    names = list(parsed(folder, version).names())
    assert sorted(names) == sorted(files - {DOCUMENTS[version]})


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_is_known_by_its_stored_name(folder: Path, version: int, dtype: np.dtype):
    store(folder, entries((3,), dtype), (2,), version, CODECS["zstd 1"][version])
    array = parsed(folder, version)
    assert array == replace(array, shape=(3,), chunks=(2,), dtype=dtype, codec="zstd")


def test_a_chunk_that_no_region_touches_is_not_looked_up():
    array = ZarrArray((4, 6), (2, 3), np.dtype(np.int8), "zstd")
    value = inline(zstandard.compress(bytes(range(6))))
    asked: list[str] = []

    def values(name: str) -> Value:
        asked.append(name)
        return value

    read_all(array, values, [(slice(0, 0), slice(0, 6)), (slice(2, 3), slice(3, 6)), (slice(3, 4), slice(3, 5))])
    assert asked == ["1.1"]


def test_regions_that_do_not_ascend_are_refused():
    array = ZarrArray((4,), (4,), np.dtype(np.int8), "zstd")
    value = inline(zstandard.compress(bytes(4)))
    with pytest.raises(ValueError, match="ascend"):
        read_all(array, lambda _: value, [(slice(1, 3),), (slice(0, 1),)])


def framed(data: bytes, *, level: int = 1, content_size: bool = True, checksum: bool = False) -> bytes:
    compressor = zstandard.ZstdCompressor(level, write_content_size=content_size, write_checksum=checksum)
    if content_size:
        return compressor.compress(data)
    stream = compressor.compressobj()
    return stream.compress(data) + stream.flush()


FRAMES = [
    pytest.param({"content_size": size, "checksum": checksum}, id=f"size={size} checksum={checksum}")
    for size in (True, False)
    for checksum in (True, False)
]
SMALL = ZarrArray((5, 20), (5, 20), np.dtype(np.int8), "zstd")
CONTENTS = [bytes(range(100)), bytes(100), bytes(range(50)) * 2]


@pytest.mark.parametrize("options", FRAMES)
@pytest.mark.parametrize("contents", CONTENTS, ids=["stored", "zeros", "repeated"])
@pytest.mark.parametrize("piece", [3, 7, 2**18])
def test_every_truncation_of_a_frame_is_found(monkeypatch, options, contents, piece):
    monkeypatch.setattr(zarr_scan, "_STORED_PIECE", piece)
    frame = framed(contents, **options)
    assert whole_of(SMALL, frame).tobytes() == contents
    for size in range(len(frame)):
        with pytest.raises(CorruptCheckpoint):
            whole_of(SMALL, frame[:size])


@pytest.mark.parametrize("options", FRAMES)
def test_every_truncation_of_a_frame_of_several_blocks_is_found(options):
    contents = bytes(300_000)
    array = ZarrArray((300_000,), (300_000,), np.dtype(np.int8), "zstd")
    frame = framed(contents, **options)
    assert whole_of(array, frame).tobytes() == contents
    for size in range(len(frame)):
        with pytest.raises(CorruptCheckpoint):
            whole_of(array, frame[:size])


@pytest.mark.parametrize("options", FRAMES)
@pytest.mark.parametrize("size", [0, 1, 99, 101, 200, 300_000])
def test_a_frame_of_another_length_is_found(options, size):
    with pytest.raises(CorruptCheckpoint, match="chunk 0"):
        whole_of(SMALL, framed(bytes(size), **options))


@pytest.mark.parametrize("options", FRAMES)
@pytest.mark.parametrize("rest", [b"\0", b"\xff" * 50, framed(b""), framed(bytes(100)), b"\x50\x2a\x4d\x18\0\0\0\0"])
def test_bytes_after_the_frame_are_found(options, rest):
    with pytest.raises(CorruptCheckpoint, match="more than one zstd frame"):
        whole_of(SMALL, framed(CONTENTS[0], **options) + rest)


@pytest.mark.parametrize("cut", [1, 50, 99])
def test_two_frames_that_make_one_chunk_together_are_refused(cut):
    first, second = CONTENTS[0][:cut], CONTENTS[0][cut:]
    with pytest.raises(CorruptCheckpoint):
        whole_of(SMALL, framed(first, content_size=False) + framed(second, content_size=False))


def test_a_flipped_bit_fails_the_checksum():
    frame = bytearray(framed(CONTENTS[0], checksum=True))
    frame[40] ^= 1
    with pytest.raises(CorruptCheckpoint, match="decoded"):
        whole_of(SMALL, bytes(frame))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 99), st.integers(1, 255), st.sampled_from(CONTENTS), st.booleans())
def test_a_damaged_frame_is_read_as_zstd_reads_it_or_refused(at, change, contents, checksum):
    frame = bytearray(framed(contents, checksum=checksum))
    frame[at % len(frame)] ^= change
    try:
        found = whole_of(SMALL, bytes(frame)).tobytes()
    except CorruptCheckpoint:
        return
    assert found == zstandard.ZstdDecompressor().decompress(bytes(frame), max_output_size=100)


@given(st.binary(max_size=60))
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(CorruptCheckpoint):
        whole_of(SMALL, data)
    with pytest.raises(CorruptCheckpoint):
        whole_of(SMALL, zstandard.FRAME_HEADER + data)


def raw_block_frame(window_descriptor: int, contents: bytes) -> bytes:
    """RFC 8878, 3.1.1: no content size, the window as described, one raw block."""
    return (
        zstandard.FRAME_HEADER
        + bytes([0, window_descriptor])
        + (1 | len(contents) << 3).to_bytes(3, "little")
        + contents
    )


def test_windows_are_taken_up_to_the_largest_that_a_level_asks_for():
    # The exponent lies in the descriptor's upper five bits: 2^(10 + exponent) bytes.
    assert whole_of(SMALL, raw_block_frame(17 << 3, CONTENTS[0])).tobytes() == CONTENTS[0]
    for exponent in (18, 21, 31):
        with pytest.raises(CorruptCheckpoint, match="decoded"):
            whole_of(SMALL, raw_block_frame(exponent << 3, CONTENTS[0]))


def test_a_frame_that_needs_a_dictionary_is_refused():
    samples = [b"%d kernel bias scale" % (i * 7919) for i in range(500)]
    dictionary = zstandard.train_dictionary(1024, samples)
    frame = zstandard.ZstdCompressor(1, dict_data=dictionary).compress(samples[0].ljust(100))
    with pytest.raises(CorruptCheckpoint):
        whole_of(SMALL, frame)


@pytest.mark.parametrize("size", [0, 99, 101])
def test_a_raw_chunk_of_another_length_is_refused(size):
    with pytest.raises(CorruptCheckpoint, match="100 bytes"):
        whole_of(replace(SMALL, codec="raw"), bytes(size))


def test_damage_behind_the_last_row_asked_for_is_found_with_the_last_row_of_the_chunk():
    array = ZarrArray((5, 20), (6, 20), np.dtype(np.int8), "zstd")
    value = inline(framed(bytes(120) + b"\1", content_size=False))
    rows = scan(array, lambda _: value, [(slice(i, i + 1), slice(0, 20)) for i in range(5)], FlatFile)
    assert [row.shape for row in itertools.islice(rows, 4)] == [(1, 20)] * 4
    with pytest.raises(CorruptCheckpoint, match="longer"):
        next(rows)


def test_a_length_that_the_frame_states_is_checked_before_the_first_row():
    rows = [(slice(i, i + 1), slice(0, 20)) for i in range(5)]
    with pytest.raises(CorruptCheckpoint, match="100 bytes"):
        next(scan(SMALL, lambda _: inline(framed(bytes(101))), rows, FlatFile))


@pytest.mark.parametrize("pooled", [False, True])
def test_an_error_names_the_file_and_the_chunk(tmp_path: Path, pool: ThreadPoolExecutor, pooled: bool):
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.write_bytes(framed(bytes(100)))
    bad.write_bytes(b"\xff" * 7 + framed(bytes(100))[:-1])
    values = {"0.0": in_file(good), "0.1": Value(bad.stat().st_size - 7, None, bad, 7)}
    array = ZarrArray((5, 40), (5, 20), np.dtype(np.int8), "zstd")
    with pytest.raises(CorruptCheckpoint, match=r"chunk 0\.1") as caught:
        read_all(array, values.__getitem__, [full_region(array.shape)], pool if pooled else None)
    assert caught.value.where == str(bad)


def test_a_value_is_read_from_its_place_in_a_file(tmp_path: Path):
    frame = framed(CONTENTS[0])
    (tmp_path / "data").write_bytes(b"\xff" * 11 + frame + b"\xff" * 11)
    value = Value(len(frame), None, tmp_path / "data", 11)
    assert read_all(SMALL, lambda _: value, [full_region(SMALL.shape)])[0].tobytes() == CONTENTS[0]


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_memory_stays_bounded_by_the_regions(tmp_path: Path, pool: ThreadPoolExecutor, codec: Any, pooled: bool):
    # Half of the entries compress, so that both the stored and the decoded chunk are large.
    half = 2**24
    contents = np.random.default_rng(0).bytes(half) + bytes(half)
    array = ZarrArray((64, 2**20), (64, 2**19), np.dtype(np.int8), codec)
    file = tmp_path / "chunk"
    file.write_bytes(contents if codec == "raw" else framed(contents))
    value = in_file(file)
    regions = ((slice(i, i + 1), slice(0, 2**20)) for i in range(64))
    row = np.frombuffer(contents, np.int8).reshape(64, 2**19)
    tracemalloc.start()
    try:
        count = 0
        for i, part in enumerate(
            scan(array, lambda _: value, regions, functools.cache(FlatFile), pool if pooled else None)
        ):
            count += bool((part == np.concatenate([row[i], row[i]])).all())
        assert count == 64
        assert tracemalloc.get_traced_memory()[1] < 10 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("rows", "step"), [(1, 2), (2, 2), (128, 128)], ids=["in the middle", "at the end", "at once"])
def test_chunks_that_the_walk_has_passed_are_let_go(tmp_path: Path, rows: int, step: int):
    array = ZarrArray((128, 2**18), (2, 2**18), np.dtype(np.int8), "zstd")
    (tmp_path / "chunk").write_bytes(framed(np.random.default_rng(0).bytes(2**19)))
    value = in_file(tmp_path / "chunk")
    regions = ((slice(i, i + rows), slice(0, 2**18)) for i in range(0, 128, step))
    tracemalloc.start()
    try:
        for part in scan(array, lambda _: value, regions, functools.cache(FlatFile)):
            assert part.shape == (rows, 2**18)
        assert tracemalloc.get_traced_memory()[1] < (rows + 16) * 2**18
    finally:
        tracemalloc.stop()


V2 = {
    "zarr_format": 2,
    "shape": [4, 6],
    "chunks": [2, 3],
    "dtype": "<f4",
    "compressor": {"id": "zstd", "level": 1},
    "fill_value": None,
    "filters": None,
    "order": "C",
}
V3 = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [4, 6],
    "data_type": "float32",
    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [2, 3]}},
    "chunk_key_encoding": {"name": "default"},
    "codecs": [LITTLE, {"name": "zstd", "configuration": {"level": 1, "checksum": True}}],
    "fill_value": 0.0,
}
SHARDS = {"name": "sharding_indexed", "configuration": {"chunk_shape": [1, 3], "codecs": [LITTLE]}}
OTHERS = [
    (2, {"compressor": {"id": "blosc", "cname": "lz4"}}),
    (2, {"compressor": {"id": "zlib", "level": 1}}),
    (2, {"order": "F"}),
    (2, {"filters": [{"id": "delta"}]}),
    (2, {"dtype": ">f4"}),
    (2, {"dtype": "<M8[ns]"}),
    (2, {"dtype": "|S4"}),
    (2, {"dtype": "int4"}),
    (2, {"dtype": [["a", "<f4"]]}),
    (2, {"shape": [1] * 33, "chunks": [1] * 33}),
    (2, {"unheard_of": 1}),
    (3, {"codecs": [LITTLE, {"name": "gzip", "configuration": {"level": 1}}]}),
    (3, {"codecs": [LITTLE, {"name": "zstd"}, {"name": "crc32c"}]}),
    (3, {"codecs": [LITTLE, {"name": "crc32c"}]}),
    (3, {"codecs": [{"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE]}),
    (3, {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]}),
    (3, {"codecs": ["bytes"]}),
    (3, {"codecs": [SHARDS]}),
    (3, {"data_type": "int4"}),
    (3, {"data_type": {"name": "struct"}}),
    (3, {"chunk_grid": {"name": "rectangular", "configuration": {}}}),
    (3, {"chunk_key_encoding": {"name": "hashed"}}),
    (3, {"storage_transformers": [{"name": "any"}]}),
    (3, {"unheard_of": {"must_understand": True}}),
]
INVALID = [
    *((2, {key: None}) for key in ("zarr_format", "shape", "chunks", "dtype", "order")),
    *((3, {key: None}) for key in ("zarr_format", "shape", "data_type", "chunk_grid", "chunk_key_encoding", "codecs")),
    (2, {"shape": [4]}),
    (2, {"shape": [4, -1]}),
    (2, {"shape": [4, 6.0]}),
    (2, {"shape": [4, True]}),
    (2, {"chunks": [2, 0]}),
    (2, {"compressor": "zstd"}),
    (2, {"dimension_separator": ""}),
    (3, {"node_type": "group"}),
    (3, {"codecs": []}),
    (3, {"codecs": [{"configuration": {}}]}),
    (3, {"chunk_grid": {"name": "regular"}}),
    (3, {"chunk_key_encoding": {"name": "default", "configuration": {"separator": 0}}}),
]


def edited(version: int, change: dict[str, Any]) -> bytes:
    return json.dumps({**(V2 if version == 2 else V3), **change}).encode()


@pytest.mark.parametrize("version", [2, 3])
def test_plain_metadata_are_understood(version: int):
    array = ZarrArray.parse(edited(version, {}), version)
    assert array is not None
    assert (array.shape, array.chunks, array.codec) == ((4, 6), (2, 3), "zstd")
    assert (array.counts, array.chunk_bytes) == ((2, 2), 24)


@pytest.mark.parametrize(("version", "change"), OTHERS, ids=str)
def test_what_only_tensorstore_reads_is_left_to_it(version: int, change: dict[str, Any]):
    assert ZarrArray.parse(edited(version, change), version) is None


@pytest.mark.parametrize(("version", "change"), INVALID, ids=str)
def test_invalid_metadata_are_refused(version: int, change: dict[str, Any]):
    with pytest.raises(ValueError, match=r"."):
        ZarrArray.parse(edited(version, change), version)


@pytest.mark.parametrize("version", [2, 3])
def test_documents_that_are_no_metadata_are_refused(version: int):
    whole = edited(version, {})
    for document in (b"", b"[]", b"null", b"\xff", b"[" * 200_000, edited(5 - version, {}), whole[:-1]):
        with pytest.raises(ValueError, match=r"."):
            ZarrArray.parse(document, version)
    for key in json.loads(whole):
        with pytest.raises(ValueError, match=key):
            ZarrArray.parse(json.dumps({k: v for k, v in json.loads(whole).items() if k != key}).encode(), version)


def test_names_of_a_vast_grid_are_made_one_by_one():
    array = ZarrArray((2**60, 2), (1, 1), np.dtype(np.int8), "raw")
    assert list(itertools.islice(array.names(), 3)) == ["0.0", "0.1", "1.0"]
