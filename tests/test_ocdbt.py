"""OCDBT databases read and written without TensorStore, judged by TensorStore in both directions; and hostile ones."""

from __future__ import annotations

import itertools
import os
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.errors import CorruptCheckpoint, LoraMergeError, UnsupportedCheckpoint
from lora_merge_cli.formats import ocdbt_reader
from lora_merge_cli.formats.ocdbt_codec import Budget, Cursor, seal, varint, varints
from lora_merge_cli.formats.ocdbt_manifest import MANIFEST, Version, decode_manifest, encode_manifest
from lora_merge_cli.formats.ocdbt_nodes import Child, Leaf, decode_node, encode_children, encode_leaves
from lora_merge_cli.formats.ocdbt_reader import Value, read_database
from lora_merge_cli.formats.ocdbt_tables import DataFile, Extent, Statistics
from lora_merge_cli.formats.ocdbt_writer import OcdbtWriter

SAMPLE = Path(__file__).parent.parent / "sample_checkpoints" / "pi0_tiny" / "2999" / "params"
MANIFEST_MAGIC, NODE_MAGIC = 0x0CDB3A2A, 0x0CDB20DE
NODE = DataFile(b"", b"node")

KEYS = st.one_of(st.text("ab/é", max_size=6), st.text(st.characters(exclude_categories=["Cs"]), max_size=12))
VALUES = st.one_of(st.binary(max_size=40), st.integers(0, 1500).map(lambda size: os.urandom(size)))
BYTES = st.one_of(st.integers(0, 255), st.sampled_from([0, 1, 0x7F, 0x80, 0xFF]))
CONTENTS = st.dictionaries(KEYS, VALUES, max_size=25)


class PlainFile:
    """A file of the file system, and how the writer treated it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.closed = False
        self.appended: list[int] = []
        self._file = path.open("xb")

    def append(self, buffer: bytes | memoryview) -> None:
        assert not self.closed
        self.appended.append(len(buffer))
        self._file.write(buffer)

    def close(self) -> None:
        self.closed = True
        self._file.close()


def kvstore(directory: Path, *, context: ts.Context | None = None, path: str = "", **options: Any) -> ts.KvStore:
    base = {"driver": "file", "path": f"{directory}/"}
    spec = {"driver": "ocdbt", "base": base, "path": path, **options}
    return ts.KvStore.open(spec, context=context).result()


def dumped(directory: Path, node: str | None = None) -> Any:
    return ts.ocdbt.dump(kvstore(directory).base, node).result()


def theirs(directory: Path) -> dict[str, bytes]:
    store = kvstore(directory)
    return {key.decode(): store[key] for key in store.list().result()}


def bytes_of(value: Value) -> bytes:
    if value.inline is not None:
        assert value.file is None
        assert value.size == len(value.inline)
        return value.inline
    assert value.file is not None
    assert value.file.is_absolute()
    with value.file.open("rb") as file:
        file.seek(value.offset)
        return file.read(value.size)


def ours(directory: Path) -> dict[str, bytes]:
    values = read_database(directory)
    assert list(values) == sorted(values)
    return {key: bytes_of(value) for key, value in values.items()}


def write(directory: Path, contents: Mapping[str, bytes], **limits: int) -> list[PlainFile]:
    files: list[PlainFile] = []

    def create(path: Path) -> PlainFile:
        files.append(PlainFile(path))
        return files[-1]

    writer = OcdbtWriter(directory, create, **limits)
    for name, value in contents.items():
        half = len(value) // 2
        assert writer.add(name, [value[:half], b"", memoryview(value)[half:]]) == len(value)
    writer.finish()
    return files


@st.composite
def configurations(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "max_inline_value_bytes": draw(st.sampled_from([0, 20, 1024])),
        "max_decoded_node_bytes": draw(st.sampled_from([1, 200, 2000, 100_000_000])),
        "version_tree_arity_log2": draw(st.sampled_from([1, 4])),
        "compression": draw(st.sampled_from([None, {"id": "zstd"}])),
    }


class TestReading:
    @settings(max_examples=35)
    @given(config=configurations(), batches=st.lists(CONTENTS, min_size=1, max_size=4))
    def test_what_tensorstore_wrote(self, config: dict[str, Any], batches: list[dict[str, bytes]]) -> None:
        expected: dict[str, bytes] = {}
        with tempfile.TemporaryDirectory() as directory:
            store = kvstore(Path(directory), config=config)
            store[b"gone"] = b"by the time that it is read"
            for batch in batches:
                with ts.Transaction(atomic=True) as transaction:
                    for key, value in batch.items():
                        store.with_transaction(transaction)[key.encode()] = value
                expected |= batch
            if "gone" not in expected:
                del store[b"gone"]
            assert ours(Path(directory)) == expected

    def test_a_tree_of_many_levels(self, tmp_path: Path) -> None:
        contents = {f"layer{i % 7}/{i}": bytes([i % 256]) * i for i in range(200)}
        store = kvstore(tmp_path, config={"max_decoded_node_bytes": 300})
        with ts.Transaction(atomic=True) as transaction:
            for key, value in contents.items():
                store.with_transaction(transaction)[key] = value
        assert dumped(tmp_path)["versions"][-1]["root_height"] >= 3
        assert ours(tmp_path) == contents

    @pytest.mark.parametrize("arity_log2", [1, 2])
    def test_the_newest_of_many_versions(self, tmp_path: Path, arity_log2: int) -> None:
        store = kvstore(tmp_path, config={"version_tree_arity_log2": arity_log2})
        for i in range(40):
            store["counter"] = str(i).encode()
            assert ours(tmp_path) == {"counter": str(i).encode()}
        assert dumped(tmp_path)["version_tree_nodes"]

    def test_data_files_wherever_they_are(self, tmp_path: Path) -> None:
        store = kvstore(tmp_path, value_data_prefix="far/away/", btree_node_data_prefix="n")
        store["a"] = bytes(5000)
        assert ours(tmp_path) == {"a": bytes(5000)}
        assert (tmp_path / "far" / "away").is_dir()

    def test_databases_copied_into_one(self, tmp_path: Path) -> None:
        context = ts.Context()
        expected = {}
        target = kvstore(tmp_path, context=context)
        for process in range(3):
            part = kvstore(tmp_path / f"ocdbt.process_{process}", context=context, config={"max_inline_value_bytes": 9})
            for i in range(8):
                key, value = f"{i}/{process}", bytes([process, i]) * i
                part[key] = value
                expected[key] = value
            part.experimental_copy_range_to(target).result()
        values = read_database(tmp_path)
        assert ours(tmp_path) == expected == theirs(tmp_path)
        assert {value.file.parent.parent.name for value in values.values() if value.file} == {
            f"ocdbt.process_{process}" for process in range(3)
        }

    def test_a_tree_below_a_base_path(self, tmp_path: Path) -> None:
        """Nodes that lie in a sub-directory name their files from there."""
        contents = {f"k{i}": bytes([i]) * 2000 for i in range(30)}
        write(tmp_path / "part", contents, max_node_bytes=300, max_file_bytes=10_000)
        part = tmp_path / "part" / MANIFEST
        version = decode_manifest(part.read_bytes(), "", Budget())
        assert version.root is not None
        moved = Extent(DataFile(b"part/", version.root.file.relative), version.root.offset, version.root.length)
        root = Version(1, version.height, moved, version.statistics, version.commit_time_ns)
        (tmp_path / MANIFEST).write_bytes(encode_manifest(bytes(16), root))
        part.unlink()
        assert theirs(tmp_path) == contents
        assert ours(tmp_path) == contents

    def test_values_below_base_paths_of_one_beginning(self, tmp_path: Path) -> None:
        files = [DataFile(b"p/", b"q/1"), DataFile(b"p/q/", b"2"), DataFile(b"p/q/", b"23"), DataFile(b"", b"p/q/4")]
        (tmp_path / "p" / "q").mkdir(parents=True)
        contents = {}
        for file in files:
            path = tmp_path / (file.base + file.relative).decode()
            path.write_bytes(path.name.encode() * 2)
            contents[path.name] = path.read_bytes()
        leaves = [
            Leaf(key.encode(), Extent(file, 0, len(value)))
            for (key, value), file in zip(contents.items(), files, strict=True)
        ]
        rooted(tmp_path, encode_leaves(leaves))
        assert theirs(tmp_path) == contents == ours(tmp_path)

    def test_what_orbax_saves(self, tmp_path: Path) -> None:
        ocp = pytest.importorskip("orbax.checkpoint")
        tree = {"w": np.arange(5000, dtype=np.float32).reshape(50, 100), "n": {"b": np.ones(3, np.int32)}}
        ocp.PyTreeCheckpointer().save(tmp_path / "saved", tree)
        values = read_database(tmp_path / "saved")
        assert ours(tmp_path / "saved") == theirs(tmp_path / "saved")
        assert {"w/.zarray", "n.b/.zarray"} <= set(values)
        files = [value.file for value in values.values() if value.file]
        assert files
        assert {file.parts[-3] for file in files} == {"ocdbt.process_0"}

    def test_the_sample_checkpoint(self) -> None:
        assert ours(SAMPLE) == theirs(SAMPLE)
        assert len(ours(SAMPLE)) == 96

    def test_a_relative_directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write(tmp_path / "x", {"a": bytes(2000)})
        monkeypatch.chdir(tmp_path)
        assert ours(Path("x")) == {"a": bytes(2000)}


class TestWriting:
    @settings(max_examples=35)
    @given(
        contents=CONTENTS,
        max_node_bytes=st.sampled_from([1, 150, 2000, 8 * 2**20]),
        max_file_bytes=st.sampled_from([1, 3000, 2**31]),
        more=CONTENTS,
    )
    def test_tensorstore_reads_and_extends_it(
        self, contents: dict[str, bytes], max_node_bytes: int, max_file_bytes: int, more: dict[str, bytes]
    ) -> None:
        with tempfile.TemporaryDirectory() as parent:
            directory = Path(parent) / "new" / "database"
            files = write(directory, contents, max_node_bytes=max_node_bytes, max_file_bytes=max_file_bytes)
            assert theirs(directory) == contents == ours(directory)
            assert all(file.closed for file in files)
            assert files[-1].path == directory / MANIFEST
            store = kvstore(directory)
            for key, value in more.items():
                store[key.encode()] = value
            assert theirs(directory) == contents | more == ours(directory)

    @pytest.mark.parametrize("max_node_bytes", [1, 300, 2**20])
    def test_the_statistics_are_those_of_the_nodes(self, tmp_path: Path, max_node_bytes: int) -> None:
        write(tmp_path, {f"{i % 5}/{i}": bytes(i * 9) for i in range(200)}, max_node_bytes=max_node_bytes)
        (version,) = dumped(tmp_path)["versions"]

        def counted(location: str) -> dict[str, int]:
            node = dumped(tmp_path, location)
            sums = {"num_keys": 0, "num_tree_bytes": int(location.rpartition(":")[2]), "num_indirect_value_bytes": 0}
            for entry in node["entries"]:
                if "location" in entry:
                    below = counted(entry["location"])
                    assert below == entry["statistics"]
                else:
                    outside = entry.get("indirect_value")
                    size = int(outside.rpartition(":")[2]) if outside else 0
                    below = {"num_keys": 1, "num_tree_bytes": 0, "num_indirect_value_bytes": size}
                sums = {name: sums[name] + below[name] for name in sums}
            return sums

        assert counted(version["root"]["location"]) == version["root"]["statistics"]
        assert version["root"]["statistics"]["num_indirect_value_bytes"] == sum(
            i * 9 for i in range(200) if i * 9 > 1024
        )

    def test_the_configuration_is_orbaxs(self, tmp_path: Path) -> None:
        write(tmp_path, {"a": b"b"})
        mine, sample = dumped(tmp_path)["config"], dumped(SAMPLE)["config"]
        assert mine.pop("uuid") != sample.pop("uuid")
        assert mine == sample

    def test_small_values_stay_in_the_tree(self, tmp_path: Path) -> None:
        write(tmp_path, {"empty": b"", "small": bytes(1024), "large": bytes(1025)})
        values = read_database(tmp_path)
        assert values["empty"] == Value(0, b"", None)
        assert values["small"] == Value(1024, bytes(1024), None)
        assert values["large"].inline is None
        assert (values["large"].offset, values["large"].size) == (0, 1025)

    def test_values_lie_in_order_and_whole(self, tmp_path: Path) -> None:
        files = write(tmp_path, {name: bytes(4000) for name in "zyxwv"}, max_file_bytes=5000)
        values = read_database(tmp_path)
        paths = [file.path for file in files]
        assert [(paths.index(values[name].file), values[name].offset) for name in "zyxwv"] == [  # type: ignore[arg-type]
            (0, 0),
            (0, 4000),
            (1, 0),
            (1, 4000),
            (2, 0),
        ]
        assert all(len(path.name) == 32 and path.parent == tmp_path / "d" for path in paths[:-1])

    def test_buffers_that_are_used_again(self, tmp_path: Path) -> None:
        buffer = np.zeros((2, 30), np.int64)

        def pieces(count: int) -> Iterator[memoryview]:
            for i in range(count):
                buffer[:] = i
                yield memoryview(buffer)

        writer = OcdbtWriter(tmp_path, PlainFile)
        assert writer.add("small", pieces(2)) == 960
        assert writer.add("large", pieces(9)) == 4320
        assert writer.add("empty", [memoryview(np.zeros((0, 3)))]) == 0
        writer.finish()
        for name, count in (("small", 2), ("large", 9)):
            expected = np.repeat(np.arange(count), 60)
            np.testing.assert_array_equal(np.frombuffer(theirs(tmp_path)[name], np.int64), expected)

    def test_large_pieces_are_passed_on_as_they_come(self, tmp_path: Path) -> None:
        piece = memoryview(bytearray(2**20))
        seen = 0

        def pieces() -> Iterator[memoryview]:
            nonlocal seen
            for _ in range(64):
                seen += 1
                yield piece

        tracemalloc.start()
        writer = OcdbtWriter(tmp_path, PlainFile)
        writer.add("large", pieces())
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert seen == 64
        assert peak < 2**20

    def test_a_name_that_is_taken_or_too_long(self, tmp_path: Path) -> None:
        writer = OcdbtWriter(tmp_path, PlainFile)
        writer.add("a", [])
        with pytest.raises(ValueError, match="stored twice: a"):
            writer.add("a", [b"other"])
        with pytest.raises(ValueError, match="65536 bytes"):
            writer.add("é" * 2**15, [])
        writer.add("é" * (2**15 - 1), [b"x"])
        writer.finish()
        assert theirs(tmp_path) == {"a": b"", "é" * (2**15 - 1): b"x"}

    def test_nothing_is_a_database_before_the_end(self, tmp_path: Path) -> None:
        writer = OcdbtWriter(tmp_path, PlainFile)
        writer.add("a", [bytes(2000)])
        assert not (tmp_path / MANIFEST).exists()
        with pytest.raises(CorruptCheckpoint, match=MANIFEST):
            read_database(tmp_path)


def resealed(raw: bytes) -> bytes:
    """The envelope with a length and checksum that fit."""
    head = raw[:4] + len(raw).to_bytes(8, "little") + raw[12:-4]
    return head + google_crc32c.value(head).to_bytes(4, "little")


def plain(magic: int, body: bytes) -> bytes:
    """An envelope without compression."""
    return resealed(magic.to_bytes(4, "big") + bytes(8) + bytes(2) + body + bytes(4))


def uncompressed(directory: Path) -> tuple[Path, Path]:
    """A database of TensorStore's of three nodes and values outside, none compressed: its manifest, the root's file."""
    config = {"compression": None, "max_inline_value_bytes": 9, "max_decoded_node_bytes": 150}
    store = kvstore(directory, config=config)
    with ts.Transaction(atomic=True) as transaction:
        for i in range(4):
            store.with_transaction(transaction)[f"key{i}"] = b"value" * i
    location = dumped(directory)["versions"][-1]["root"]["location"]
    return directory / MANIFEST, directory / location.split(":")[2]


def rooted(directory: Path, node: bytes, *, height: int = 0, file: DataFile = NODE) -> Path:
    """A database whose root is `node`."""
    directory.mkdir(exist_ok=True)
    (directory / "node").write_bytes(node)
    version = Version(1, height, Extent(file, 0, len(node)), Statistics(), 0)
    (directory / MANIFEST).write_bytes(encode_manifest(bytes(16), version))
    return directory


def refused(directory: Path) -> LoraMergeError | None:
    try:
        read_database(directory)
    except (CorruptCheckpoint, UnsupportedCheckpoint) as error:
        return error
    return None


class TestHostile:
    def test_every_truncation(self, tmp_path: Path) -> None:
        for file in uncompressed(tmp_path):
            whole = file.read_bytes()
            for length in range(len(whole)):
                file.write_bytes(whole[:length])
                error = refused(tmp_path)
                assert isinstance(error, CorruptCheckpoint), length
                assert str(file) in str(error)
            file.write_bytes(whole)
        assert len(ours(tmp_path)) == 4

    @pytest.mark.parametrize("source", ["uncompressed", "sample"])
    def test_every_truncation_of_a_node_by_itself(self, tmp_path: Path, source: str) -> None:
        if source == "sample":
            write(tmp_path, {f"key{i}": bytes(i * 400) for i in range(6)})
        else:
            uncompressed(tmp_path)
        for magic, file in (("0cdb20de", next((tmp_path / "d").iterdir())), ("0cdb3a2a", tmp_path / MANIFEST)):
            raw = file.read_bytes()
            raw = raw[raw.index(bytes.fromhex(magic)) :]
            raw = raw[: int.from_bytes(raw[4:12], "little")]
            decode: Callable[[bytes], object] = (
                (lambda data: decode_node(data, b"", "there", Budget()))
                if file.name != MANIFEST
                else (lambda data: decode_manifest(data, "there", Budget()))
            )
            decode(raw)
            for length in range(len(raw)):
                with pytest.raises(CorruptCheckpoint, match="there"):
                    decode(raw[:length])
                if length >= 16:
                    with pytest.raises((CorruptCheckpoint, UnsupportedCheckpoint), match="there"):
                        decode(resealed(raw[:length]))
            with pytest.raises(CorruptCheckpoint):
                decode(resealed(raw[:-4] + b"more" + bytes(4)))

    def test_every_changed_byte(self, tmp_path: Path) -> None:
        for file in uncompressed(tmp_path):
            whole = file.read_bytes()
            start = max(whole.rfind(bytes.fromhex("0cdb20de")), 0)
            for position in range(start, len(whole)):
                damaged = bytearray(whole)
                damaged[position] ^= 1 << position % 8
                file.write_bytes(damaged)
                assert isinstance(refused(tmp_path), CorruptCheckpoint), position
            file.write_bytes(whole)

    def test_changed_bytes_under_a_checksum_that_fits(self, tmp_path: Path) -> None:
        """Whatever stands there, it is refused, or never understood otherwise than by TensorStore."""
        files = uncompressed(tmp_path)
        originals = {file: file.read_bytes() for file in files}

        def compare() -> None:
            if refused(tmp_path) is not None:
                return
            try:
                expected = theirs(tmp_path)
            except ValueError:
                return  # It also checks numbers that nothing here depends on: of older versions, and of lengths of base paths.
            assert ours(tmp_path) == expected

        @given(file=st.sampled_from(files), changes=st.lists(st.tuples(st.integers(0), BYTES), min_size=1, max_size=3))
        def check(file: Path, changes: list[tuple[int, int]]) -> None:
            whole = originals[file]
            start = max(whole.rfind(bytes.fromhex("0cdb20de")), 0)
            damaged = bytearray(whole[start:])
            for place, value in changes:
                damaged[12 + place % (len(damaged) - 16)] = value
            file.write_bytes(whole[:start] + resealed(bytes(damaged)))
            try:
                compare()
            finally:
                file.write_bytes(whole)

        check()

    @given(body=st.binary(max_size=60), kind=st.sampled_from([MANIFEST_MAGIC, NODE_MAGIC]))
    def test_any_body(self, body: bytes, kind: int) -> None:
        for raw in (plain(kind, body), seal(kind, body)):
            with pytest.raises((CorruptCheckpoint, UnsupportedCheckpoint)):
                if kind == NODE_MAGIC:
                    decode_node(raw, b"", "there", Budget())
                else:
                    decode_manifest(raw, "there", Budget())

    def test_a_data_file_that_is_missing_or_short_or_none(self, tmp_path: Path) -> None:
        files = write(tmp_path, {"a": bytes(5000), "b": bytes(5000)}, max_file_bytes=1)
        first = files[0].path
        first.write_bytes(bytes(4999))
        with pytest.raises(CorruptCheckpoint, match=r"too short.* :: a .*expected 5000 bytes, found 4999") as short:
            read_database(tmp_path)
        assert str(first) in str(short.value)
        first.unlink()
        with pytest.raises(CorruptCheckpoint, match="missing") as missing:
            read_database(tmp_path)
        assert str(first) in str(missing.value)
        os.mkfifo(first)
        with pytest.raises(CorruptCheckpoint, match=f"not a regular file: .*{first.name}"):
            read_database(tmp_path)

    def test_a_length_that_is_not_its_own(self) -> None:
        head = bytearray(encode_leaves([Leaf(b"a", b"b")])[:-4])
        head[4] += 1
        raw = bytes(head) + google_crc32c.value(bytes(head)).to_bytes(4, "little")
        with pytest.raises(CorruptCheckpoint, match="another length"):
            decode_node(raw, b"", "there", Budget())

    @given(st.integers(0, 2**64 - 1))
    def test_a_number_of_64_bits_and_no_more(self, number: int) -> None:
        assert Cursor(varint(number), "there", Budget()).varint() == number
        with pytest.raises(CorruptCheckpoint, match="more than 64 bits"):
            Cursor(varint(2**64 + number), "there", Budget()).varint()

    @pytest.mark.parametrize(
        "file",
        [
            DataFile(b"", b"../x/node"),
            DataFile(b"", b"d/../../node"),
            DataFile(b"../", b"x/node"),
            DataFile(b"d/.", b"./../node"),
            DataFile(b"", b"/etc/passwd"),
            DataFile(b"/", b"etc/passwd"),
            DataFile(b"", b""),
            DataFile(b"", b"no\0de"),
            DataFile(b"", b".."),
        ],
    )
    def test_a_path_that_leads_outside(self, tmp_path: Path, file: DataFile) -> None:
        with pytest.raises(CorruptCheckpoint, match="outside of the checkpoint"):
            read_database(rooted(tmp_path / "x", encode_leaves([Leaf(b"a", b"b")]), file=file))
        leaves = encode_leaves([Leaf(b"a", Extent(file, 0, 1))])
        with pytest.raises(CorruptCheckpoint, match="outside of the checkpoint"):
            read_database(rooted(tmp_path / "x", leaves))

    @pytest.mark.parametrize("name", [b"\xff\xfe", b"a" * 60_000, b"node/below", b"."])
    def test_a_path_to_nothing(self, tmp_path: Path, name: bytes) -> None:
        with pytest.raises(CorruptCheckpoint):
            read_database(rooted(tmp_path, encode_leaves([Leaf(b"a", Extent(DataFile(b"", name), 0, 1))])))

    def test_numbered_manifests(self, tmp_path: Path) -> None:
        kvstore(tmp_path, config={"manifest_kind": "numbered"})["a"] = b"b"
        with pytest.raises(UnsupportedCheckpoint, match="numbered"):
            read_database(tmp_path)

    @pytest.mark.parametrize(("position", "what"), [(12, "version"), (13, "compression")])
    def test_an_unknown_version_or_compression(self, tmp_path: Path, position: int, what: str) -> None:
        write(tmp_path, {"a": b"b"})
        raw = bytearray((tmp_path / MANIFEST).read_bytes())
        raw[position] = 7
        (tmp_path / MANIFEST).write_bytes(resealed(bytes(raw)))
        with pytest.raises(UnsupportedCheckpoint, match=f"{what} that is not known.*found 7"):
            read_database(tmp_path)

    @pytest.mark.parametrize(
        "body",
        [
            pytest.param(b"\0" + varint(2**63), id="files"),
            pytest.param(b"\0\0" + varint(2**63), id="entries"),
            pytest.param(b"\0\0" + b"\xff" * 11, id="endless number"),
            pytest.param(b"\0\0\0", id="no entries"),
            pytest.param(b"\0\0\1" + varints([2**63, 1, 0]), id="key"),
            pytest.param(b"\0\0\1\1a" + varint(2**63) + b"\0", id="value"),
            pytest.param(b"\0\0\1\1a\1\2b", id="kind of value"),
            pytest.param(b"\0\0\1\1a\1\1\0\0", id="file that is not listed"),
            pytest.param(b"\1\0\1\1\2a" + bytes(6), id="prefix longer than its key"),
            pytest.param(b"\0\0\2\3\1\1ab\0\0\0\0", id="sharing more than there is"),
        ],
    )
    def test_impossible_numbers(self, tmp_path: Path, body: bytes) -> None:
        tracemalloc.start()
        with pytest.raises(CorruptCheckpoint, match="tree node at 0"):
            read_database(rooted(tmp_path, plain(NODE_MAGIC, body)))
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()

    def test_compression_that_hides_an_endless_node(self) -> None:
        bomb = seal(NODE_MAGIC, bytes(2**26))
        assert len(bomb) < 2**13
        tracemalloc.start()
        with pytest.raises(CorruptCheckpoint, match="too large"):
            decode_node(bomb, b"", "there", Budget(2**20))
        assert tracemalloc.get_traced_memory()[1] < 2**25
        tracemalloc.stop()

    def test_prefixes_that_hide_endless_keys(self) -> None:
        count = 10_000
        keys = [varint(65_000)] * (count - 1) + [varint(65_000)] + [b"\1"] * (count - 1)
        body = b"\0\0" + varint(count) + b"".join(keys) + b"a" * (65_000 + count - 1)
        tracemalloc.start()
        with pytest.raises(CorruptCheckpoint, match="too large"):
            decode_node(plain(NODE_MAGIC, body), b"", "there", Budget(2**23))
        assert tracemalloc.get_traced_memory()[1] < 2**25
        tracemalloc.stop()

    def test_branches_that_share_a_node(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Each level has both of its children in the same node below: four levels are read, forty are refused."""

        def tower(levels: int) -> Path:
            content, nodes = encode_leaves([Leaf(b"", b"x")]), b""
            for height in range(1, levels + 1):
                below = Extent(NODE, len(nodes), len(content))
                nodes += content
                content = encode_children(height, [Child(key, 1, below, Statistics()) for key in (b"a", b"b")])
            rooted(tmp_path, nodes + content)
            root = Extent(NODE, len(nodes), len(content))
            (tmp_path / MANIFEST).write_bytes(encode_manifest(bytes(16), Version(1, levels, root, Statistics(), 0)))
            return tmp_path

        assert ours(tower(4)) == theirs(tmp_path) == {"".join(key): b"x" for key in itertools.product("ab", repeat=4)}
        monkeypatch.setattr(ocdbt_reader, "Budget", lambda: Budget(2**22))
        decoded = []
        monkeypatch.setattr(ocdbt_reader, "decode_node", lambda *node: decoded.append(1) or decode_node(*node))
        with pytest.raises(CorruptCheckpoint, match="too large"):
            read_database(tower(40))
        assert len(decoded) < 1000

    def test_a_node_that_is_its_own_child(self, tmp_path: Path) -> None:
        length = 0
        for _ in range(3):
            node = encode_children(1, [Child(b"a", 0, Extent(NODE, 0, length), Statistics())])
            length = len(node)
        with pytest.raises(CorruptCheckpoint, match=r"wrong height.*expected 0, found 1"):
            read_database(rooted(tmp_path, node, height=1))

    def test_a_root_of_another_height(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptCheckpoint, match="wrong height"):
            read_database(rooted(tmp_path, encode_leaves([Leaf(b"a", b"b")]), height=3))

    @pytest.mark.parametrize("keys", [(b"b", b"a"), (b"a", b"a"), (b"ab", b"a")])
    def test_keys_out_of_order(self, tmp_path: Path, keys: tuple[bytes, ...]) -> None:
        with pytest.raises(CorruptCheckpoint, match="not in order"):
            read_database(rooted(tmp_path, encode_leaves([Leaf(key, b"") for key in keys])))

    def test_a_key_that_its_branch_hides(self, tmp_path: Path) -> None:
        leaves = encode_leaves([Leaf(b"a", b"")])
        below = Extent(DataFile(b"", b"leaves"), 0, len(leaves))
        rooted(tmp_path, encode_children(1, [Child(b"b", 0, below, Statistics())]), height=1)
        (tmp_path / "leaves").write_bytes(leaves)
        with pytest.raises(CorruptCheckpoint, match="not of its branch"):
            read_database(tmp_path)

    def test_a_key_that_is_no_text(self, tmp_path: Path) -> None:
        kvstore(tmp_path)[b"\xff"] = b"x"
        with pytest.raises(CorruptCheckpoint, match="no text"):
            read_database(tmp_path)

    def test_a_manifest_that_is_missing_or_a_directory(self, tmp_path: Path) -> None:
        with pytest.raises(CorruptCheckpoint, match=MANIFEST):
            read_database(tmp_path)
        (tmp_path / MANIFEST).mkdir()
        with pytest.raises(CorruptCheckpoint, match=MANIFEST):
            read_database(tmp_path)
