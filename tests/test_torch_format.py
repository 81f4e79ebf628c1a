"""torch's checkpoints, with torch as the oracle: what it saved is read bit for bit, and what is written it loads, mapped or not."""

from __future__ import annotations

import json
import threading
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_merge_cli.errors import CorruptCheckpoint, DiskFull, UnsupportedCheckpoint, UsageError
from lora_merge_cli.formats import torch_zip_writer
from lora_merge_cli.formats.interface import FLAT, Destination, LeafData, Stored
from lora_merge_cli.formats.torch_dtypes import DTYPES
from lora_merge_cli.formats.torch_pth import TorchFormat
from lora_merge_cli.formats.torch_sink import TorchSink
from lora_merge_cli.records import Constant, TensorSpec, display, full_region, grid, slab

torch = pytest.importorskip("torch")

FORMAT = TorchFormat()
BOTH = pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
KINDS = sorted(name for name in DTYPES if hasattr(torch, name))


def tensor_of(dtype: str, *shape: int) -> Any:
    size = int(np.prod(shape, dtype=int)) * DTYPES[dtype].itemsize
    if not size:
        return torch.empty(shape, dtype=getattr(torch, dtype))
    raw = np.random.default_rng(7).integers(0, 256, size, np.uint8)
    if dtype == "bool":
        raw &= 1
    return torch.from_numpy(raw).view(getattr(torch, dtype)).reshape(shape)


def raw_bytes(tensor: Any) -> bytes:
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def save(value: Any, path: Path, zipped: bool = True, **options: Any) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped, **options)
    return path


def source_of(path: Path) -> Any:
    checkpoint = FORMAT.open(path, None)
    assert checkpoint is not None
    assert checkpoint.format == "pth"
    return checkpoint.source


def leaves_of(source: Any, block: int | None = None) -> Any:
    """Every leaf on its way into a sink: as stored bytes, or in runs of at most so many entries."""
    index = source.index()
    for path, spec in index.tensors.items():
        stored = source.stored(path) if block is None else None
        sizes = slab(spec.shape, block or max(1, spec.size))
        blocks = ((region, source.read(path, region)) for region in grid(full_region(spec.shape), sizes))
        yield LeafData(spec, sizes, stored or blocks, index.shared.get(path))


def rewrite(path: Path, directory: Path, block: int | None = None) -> Path:
    checkpoint = FORMAT.open(path, None)
    assert checkpoint is not None
    index = checkpoint.source.index()
    sink = FORMAT.sink(Destination(directory, "out.pth"), checkpoint)
    assert sink.encodings == {FLAT}
    written = sink.write(list(index.tensors.values()), leaves_of(checkpoint.source, block), index.constants)
    assert written == (directory / "out.pth").stat().st_size
    return directory / "out.pth"


def assert_same(found: Any, expected: Any) -> None:
    """The same value, down to the types of containers and the bits of tensors and floats."""
    if isinstance(expected, torch.Tensor):
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert raw_bytes(found) == raw_bytes(expected)
        return
    assert type(found) is type(expected)
    if isinstance(expected, dict):
        assert list(found) == list(expected)
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert repr(found) == repr(expected)


@BOTH
@pytest.mark.parametrize("dtype", KINDS)
def test_every_dtype_is_read_and_written_bit_for_bit(tmp_path: Path, dtype: str, zipped: bool) -> None:
    value = {"a.weight": tensor_of(dtype, 3, 5), "scalar": tensor_of(dtype), "empty": tensor_of(dtype, 0, 4)}
    file = save(value, tmp_path / "in.pt", zipped)
    source = source_of(file)
    for key, tensor in value.items():
        spec = source.index().tensors[key,]
        assert (spec.shape, spec.dtype) == (tuple(tensor.shape), DTYPES[dtype])
        assert source.read((key,), full_region(spec.shape)).tobytes() == raw_bytes(tensor)
        assert b"".join(bytes(piece) for _, piece in source.stored((key,)).values) == raw_bytes(tensor)
    assert source.read(("a.weight",), (slice(1, 3), slice(2, 4))).tobytes() == raw_bytes(value["a.weight"][1:3, 2:4])
    out = rewrite(file, tmp_path)
    for mapped in (True, False):
        assert_same(torch.load(out, weights_only=True, mmap=mapped), value)


VIEWS = {
    "transposed": lambda t: t.T,
    "columns": lambda t: t[:, 2:5],
    "every other": lambda t: t[::2, 1::3],
    "rows": lambda t: t[2:4],
    "permuted": lambda t: t.reshape(2, 3, 8).permute(2, 0, 1),
    "diagonal": lambda t: t.diagonal(),
    "windows": lambda t: t.reshape(-1).unfold(0, 4, 4)[1:5, :2],
    "one column": lambda t: t[:, 3],
    "one axis of one": lambda t: t[1:2].T,
    "no rows": lambda t: t[3:3],
}


@BOTH
@pytest.mark.parametrize("view", VIEWS)
def test_views_show_what_torch_shows(tmp_path: Path, view: str, zipped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    value = {"v": VIEWS[view](torch.arange(48.0).reshape(6, 8))}
    source = source_of(save(value, tmp_path / "in.pt", zipped))
    expected = value["v"].numpy()
    whole = full_region(expected.shape)
    part = tuple(slice(extent // 3, extent) for extent in expected.shape)
    for allowed in (2**20, 8):
        # The smaller one reads entry by entry.
        monkeypatch.setattr("lora_merge_cli.formats.torch_source._PIECE_BYTES", allowed)
        monkeypatch.setattr("lora_merge_cli.formats.torch_source._WORTH_SKIPPING", allowed)
        assert np.array_equal(source.read(("v",), whole), expected)
        assert np.array_equal(source.read(("v",), part), expected[part])
    stored = source.stored(("v",))
    assert (stored is not None) == value["v"].is_contiguous()
    if stored is not None:
        assert b"".join(bytes(piece) for _, piece in stored.values) == expected.tobytes()


@BOTH
def test_nested_values_return_as_they_were(tmp_path: Path, zipped: bool) -> None:
    value = {
        "epoch": 3,
        "model": OrderedDict([("a.b/c", torch.ones(2)), ("", torch.zeros(1)), ("empty", {})]),
        "list": [torch.arange(3), None, (torch.ones(1), -0.0), []],
        7: {-1: "text \N{SNOWMAN}", "7": True, 10: False},
        "numbers": (2**70, -(2**40), 1e300, float("inf"), float("nan"), 255, -1),
        "nothing": (OrderedDict(), (), torch.Size([])),
        "shape": torch.Size([2, 3]),
    }
    file = save(value, tmp_path / "in.pt", zipped)
    index = source_of(file).index()
    assert [*map(display, index.tensors)] == ["model/a.b/c", "model/", "list/0", "list/2/0"]
    assert Constant((7, -1), "string", "text \N{SNOWMAN}") in index.constants
    assert Constant(("list", 1), "None") in index.constants
    assert Constant(("model", "empty"), "Dict") in index.constants
    assert_same(torch.load(rewrite(file, tmp_path), weights_only=True), value)


@BOTH
def test_a_modules_state_dict_and_parameters(tmp_path: Path, zipped: bool) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    marked = torch.nn.Parameter(torch.ones(3))
    marked.seen = True
    noted = torch.ones(2)
    noted.seen = True
    value = {"state": module.state_dict(), "parameters": list(module.parameters()), "marked": [marked, noted]}
    file = save(value, tmp_path / "in.pt", zipped)
    source = source_of(file)
    assert source.index().shared[("parameters", 0)] == ("state", "0.weight")
    state = torch.load(rewrite(file, tmp_path), weights_only=True)["state"]
    assert type(state) is OrderedDict
    module.load_state_dict(state)
    assert_same(state, OrderedDict(value["state"]))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@BOTH
def test_any_pickle_protocol(tmp_path: Path, protocol: int, zipped: bool) -> None:
    value = OrderedDict(a=torch.ones(3), b={"c": [1, "x" * 300]})
    file = save(value, tmp_path / "in.pt", zipped, pickle_protocol=protocol)
    assert_same(torch.load(rewrite(file, tmp_path), weights_only=True), value)


@BOTH
def test_tied_tensors_stay_tied(tmp_path: Path, zipped: bool) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    value = {"a": whole, "b": whole.view(3, 4), "part": whole[1:], "other": whole.clone(), "turned": whole.view(4, 3)}
    file = save(value, tmp_path / "in.pt", zipped)
    assert dict(source_of(file).index().shared) == {("b",): ("a",)}
    loaded = torch.load(rewrite(file, tmp_path), weights_only=True)
    assert_same(loaded, value)
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr()
    assert len({loaded[key].data_ptr() for key in ("a", "part", "other", "turned")}) == 4


@pytest.mark.parametrize("block", [1, 2, 3, 15, 100])
def test_blocks_of_any_size_make_the_same_file(tmp_path: Path, block: int) -> None:
    value = {"w": torch.arange(7 * 5 * 4).reshape(7, 5, 4), "b": torch.tensor(1.5), "e": torch.ones(0, 3)}
    file = save(value, tmp_path / "in.pt")
    plain, cut = tmp_path / "plain", tmp_path / "cut"
    assert rewrite(file, plain).read_bytes() == rewrite(file, cut, block).read_bytes()
    assert zipfile.ZipFile(cut / "out.pth").testzip() is None


@pytest.mark.parametrize("largest", [1, 64, 300, 2000])
def test_archives_with_64_bit_fields(tmp_path: Path, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The fields of an archive of more than 4 GiB, in a small one: sizes, offsets and the directory's place.
    monkeypatch.setattr(torch_zip_writer, "_LARGEST", largest)
    monkeypatch.setattr(torch_zip_writer, "_MOST", 5)
    value = {"a": torch.arange(100.0), "b": torch.ones(3), "c": torch.arange(1000), "e": torch.ones(0)}
    out = rewrite(save(value, tmp_path / "in.pt"), tmp_path)
    with zipfile.ZipFile(out) as archive:
        assert archive.testzip() is None
    for mapped in (True, False):
        assert_same(torch.load(out, weights_only=True, mmap=mapped), value)
    source = source_of(out)
    assert source.read(("c",), (slice(990, 1000),)).tolist() == list(range(990, 1000))


def test_a_file_of_another_formats_paths(tmp_path: Path) -> None:
    specs = [
        TensorSpec(("params", "w"), (2, 2), np.dtype(np.float32)),
        TensorSpec(("layers", 0, "s"), (), np.dtype(np.int64), "scalar"),
        TensorSpec(("layers", 1, "s"), (), np.dtype(np.int64), "scalar"),
        TensorSpec(("gaps", 1), (1,), np.dtype(np.float32)),
    ]
    leaves = [LeafData(s, s.shape, iter([(full_region(s.shape), np.ones(s.shape, s.dtype))])) for s in specs]
    constants = [Constant(("none",), "None"), Constant(("empty",), "List"), Constant(("flag",), "bool", "True")]
    TorchSink(tmp_path / "new" / "x.pth").write(specs, leaves, constants)
    one = torch.tensor(1)
    expected = {
        "params": {"w": torch.ones(2, 2)},
        "layers": [{"s": one}, {"s": one}],
        "gaps": {1: torch.ones(1)},
        "none": None,
        "empty": [],
        "flag": True,
    }
    assert_same(torch.load(tmp_path / "new" / "x.pth", weights_only=True), expected)


def test_a_sink_refuses_what_torch_cannot_hold(tmp_path: Path) -> None:
    clash = [TensorSpec(("a",), (), np.dtype(np.int8)), TensorSpec(("a", "b"), (), np.dtype(np.int8))]
    with pytest.raises(UnsupportedCheckpoint, match="inside another leaf"):
        TorchSink(tmp_path / "x.pth").write(clash, iter(()), ())
    with pytest.raises(UnsupportedCheckpoint, match="no such dtype"):
        TorchSink(tmp_path / "x.pth").write([TensorSpec(("a",), (), np.dtype(np.longdouble))], iter(()), ())


@pytest.mark.parametrize("given", [0, 2, 5, 40])
@pytest.mark.parametrize("stored", [True, False])
def test_a_leaf_that_is_not_given_in_full(tmp_path: Path, given: int, stored: bool) -> None:
    spec = TensorSpec(("a",), (4,), np.dtype(np.float32))
    values = np.ones(given, np.float32)
    data = Stored(FLAT, [("0", values.tobytes())]) if stored else iter([((slice(0, given),), values)])
    before = threading.active_count(), len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(
        CorruptCheckpoint, match=rf"not given in full: .*y.pth :: a \(expected 16 bytes.*found {4 * given}\)"
    ):
        TorchSink(tmp_path / "y.pth").write([spec], [LeafData(spec, (4,), data)], ())
    assert (threading.active_count(), len(list(Path("/dev/fd").iterdir()))) == before, "the file was not closed"


def test_values_of_another_dtype(tmp_path: Path) -> None:
    spec = TensorSpec(("a",), (4,), np.dtype(np.float32))
    for other in (np.float64, np.int32):
        leaf = LeafData(spec, (4,), iter([((slice(0, 4),), np.ones(4, other))]))
        with pytest.raises(CorruptCheckpoint, match=r"another dtype: a \(expected float32"):
            TorchSink(tmp_path / f"{np.dtype(other).name}.pth").write([spec], [leaf], ())


def test_an_error_of_whoever_makes_a_leaf_passes_and_closes_the_file(tmp_path: Path) -> None:
    spec = TensorSpec(("a",), (4,), np.dtype(np.int8))

    def fails() -> Any:
        yield (slice(0, 2),), np.ones(2, np.int8)
        raise OSError(28, "of an input")

    before = threading.active_count(), len(list(Path("/dev/fd").iterdir()))
    with pytest.raises(OSError, match="of an input"):
        TorchSink(tmp_path / "x.pth").write([spec], [LeafData(spec, (4,), fails())], ())
    assert (threading.active_count(), len(list(Path("/dev/fd").iterdir()))) == before, "the file was not closed"


def test_leaves_of_many_buffers(tmp_path: Path) -> None:
    """Larger than what the writer gathers, at offsets that no block of the disk begins at, one behind the other."""
    raw = np.random.default_rng(0).integers(1, 256, 9 * 2**20 + 5, np.uint8)
    value = {"a": torch.from_numpy(raw), "b": torch.from_numpy(raw[:7]), "c": torch.from_numpy(raw[::-1].copy())}
    file = save(value, tmp_path / "in.pt")
    for block in (None, 2**20 + 1):
        out = rewrite(file, tmp_path / str(block), block)
        assert zipfile.ZipFile(out).testzip() is None
        assert_same(torch.load(out, weights_only=True, mmap=True), value)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    spec = TensorSpec(("a",), (4,), np.dtype(np.int8))
    leaf = LeafData(spec, (4,), iter([((slice(0, 4),), np.ones(4, np.int8))]))
    with pytest.raises(DiskFull):
        TorchSink(tmp_path / "x.pth").write([spec], [leaf], ())


numbers = st.integers(-(2**100), 2**100) | st.floats() | st.booleans() | st.none() | st.text(max_size=8)
shapes = st.lists(st.integers(0, 3), max_size=3).map(tuple)
tensors = st.builds(lambda dtype, shape: tensor_of(dtype, *shape), st.sampled_from(KINDS), shapes)
keys = st.text(max_size=6) | st.integers(-(2**31), 2**31)
trees = st.recursive(
    numbers | tensors,
    lambda inner: (
        st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=3).map(OrderedDict)
        | st.lists(inner, max_size=4)
        | st.lists(inner, max_size=3).map(tuple)
    ),
    max_leaves=12,
)


@BOTH
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.dictionaries(keys, trees, max_size=5) | st.lists(trees, max_size=3))
def test_any_tree_returns_as_it_was(tmp_path: Path, zipped: bool, value: Any) -> None:
    file = save(value, tmp_path / "in.pt", zipped)
    (tmp_path / "out.pth").unlink(missing_ok=True)
    assert_same(torch.load(rewrite(file, tmp_path, block=2), weights_only=True), value)


def test_directories(tmp_path: Path) -> None:
    value = {"a": torch.ones(2), "b": torch.zeros(3)}
    save(value, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text('{"model_type": "x"}')
    checkpoint = FORMAT.open(tmp_path, None)
    assert checkpoint is not None
    assert (checkpoint.config, checkpoint.companions) == ({"model_type": "x"}, ("config.json",))
    assert (checkpoint.directory, checkpoint.item) == (tmp_path, None)
    with pytest.raises(UsageError, match="--step 3"):
        FORMAT.open(tmp_path, 3)
    out = tmp_path / "out"
    FORMAT.sink(Destination(out), checkpoint).write((), iter(()), ())
    assert [entry.name for entry in out.iterdir()] == ["pytorch_model.bin"]
    (tmp_path / "model.safetensors").touch()
    assert FORMAT.open(tmp_path, None) is None


def test_a_single_file(tmp_path: Path) -> None:
    file = save({"a": torch.ones(2)}, tmp_path / "no suffix")
    (tmp_path / "no suffix.lora_merge.json").write_text("{}")
    checkpoint = FORMAT.open(file, None)
    assert checkpoint is not None
    assert (checkpoint.directory, checkpoint.companions, checkpoint.config) == (file, (), None)
    assert checkpoint.provenance == tmp_path / "no suffix.lora_merge.json"
    before = checkpoint.source.fingerprint()
    assert before == source_of(file).fingerprint()
    save({"a": torch.zeros(2)}, file)
    assert source_of(file).fingerprint() != before


def test_shards(tmp_path: Path) -> None:
    save({"a": torch.ones(2), "c": torch.ones(1)}, tmp_path / "pytorch_model-1.bin")
    save({"b": torch.zeros(3)}, tmp_path / "pytorch_model-2.bin")
    right = {"a": "pytorch_model-1.bin", "b": "pytorch_model-2.bin", "c": "pytorch_model-1.bin"}

    def opened(weight_map: object) -> Any:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return source_of(tmp_path)

    source = opened(right)
    assert [*map(display, source.index().tensors)] == ["a", "c", "b"]
    assert source.read(("b",), (slice(0, 3),)).tolist() == [0, 0, 0]
    for wrong in (
        right | {"d": "pytorch_model-1.bin"},
        right | {"a": "pytorch_model-2.bin"},
        {"b": right["b"]} | {"a": right["a"]},
    ):
        with pytest.raises(CorruptCheckpoint, match=r"index|shards"):
            opened(wrong).index()
    for name in ("../pytorch_model-1.bin", str(tmp_path / "pytorch_model-1.bin"), "..", "", 5, "absent.bin"):
        with pytest.raises(CorruptCheckpoint, match=r"index of shards|shards are missing"):
            opened(right | {"a": name})
    for document in ([], {}, ""):
        with pytest.raises(CorruptCheckpoint, match="index of shards"):
            opened(document)
    save({"a": torch.ones(2), "b": torch.zeros(3)}, tmp_path / "pytorch_model-2.bin")
    with pytest.raises(CorruptCheckpoint, match="an earlier shard"):
        opened(right).index()


def test_adapters(tmp_path: Path) -> None:
    file = save({"x.lora_A.weight": torch.ones(2, 3)}, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text('{"r": 2}')
    for path in (tmp_path, file):
        adapter = FORMAT.open_adapter(path)
        assert adapter is not None
        assert adapter.config == {"r": 2}
        assert [*adapter.source.index().tensors] == [("x.lora_A.weight",)]
    other = FORMAT.open_adapter(save({"a": torch.ones(1)}, tmp_path / "lora.pth"))
    assert other is not None
    assert other.config is None
    (tmp_path / "adapter_model.safetensors").touch()
    assert FORMAT.open_adapter(tmp_path) is None
    assert FORMAT.open(tmp_path, None) is None
