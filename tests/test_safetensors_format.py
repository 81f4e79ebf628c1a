from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.errors import CorruptCheckpoint, DiskFull, ResourceError, UnsupportedCheckpoint
from lora_merge_cli.formats.interface import FLAT, Destination, LeafData, Stored
from lora_merge_cli.formats.safetensors_dir import SafetensorsFormat
from lora_merge_cli.formats.safetensors_sink import SafetensorsSink
from lora_merge_cli.records import Constant, TensorSpec, full_region
from tests.safetensors_files import (
    DTYPES,
    Tree,
    library_reads,
    library_writes,
    like,
    random_array,
    same_bits,
    specs_of,
    write,
)

RNG = np.random.default_rng(0)
STATE: Tree = {
    ("model.embed.weight",): random_array(RNG, (7, 4), np.dtype(np.float32)),
    ("flags",): random_array(RNG, (3,), np.dtype(np.bool_)),
    ("model.0.weight",): random_array(RNG, (5, 3), DTYPES["BF16"]),
    ("count",): np.array(7, np.int64),
    ("none",): np.zeros((0, 4), np.float16),
}
PARTS = st.one_of(
    st.text(max_size=6), st.integers(0, 12), st.sampled_from(["a/b", "a.b", "", "é", "\U0001d4b3", "\x00", '"', "w"])
)
TREES = st.dictionaries(
    st.lists(PARTS, min_size=1, max_size=4).map(tuple),
    st.tuples(st.lists(st.integers(0, 4), max_size=3), st.sampled_from(sorted(DTYPES))),
    max_size=6,
)

# For extents of up to 4.
ROW_MAJOR = st.builds(lambda ones, part: [1] * ones + [part] + [4] * 3, st.integers(0, 3), st.integers(1, 4))


def opened(path: Path):
    checkpoint = SafetensorsFormat().open(path, None)
    assert checkpoint is not None
    return checkpoint


def read_back(path: Path) -> Tree:
    source = opened(path).source
    return {leaf: source.read(leaf, full_region(spec.shape)) for leaf, spec in source.index().tensors.items()}


def same(left: Tree, right: Tree) -> bool:
    return left.keys() == right.keys() and all(same_bits(value, right[path]) for path, value in left.items())


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_each_dtype_is_read_and_written_as_the_library_does(tmp_path: Path, name: str):
    value = random_array(np.random.default_rng(1), (3, 5), DTYPES[name])
    library_writes(tmp_path / "theirs.safetensors", {"w": value})
    assert same(read_back(tmp_path / "theirs.safetensors"), {("w",): value})
    write(tmp_path / "ours", {("w",): value})
    assert same_bits(library_reads(tmp_path / "ours/model.safetensors")["w"], value)


def test_what_the_numpy_library_saves(tmp_path: Path):
    tensors = {"b": np.arange(6, dtype=np.int16).reshape(2, 3), "a": np.array(1.5, np.float32)}
    safetensors.numpy.save_file(tensors, tmp_path / "x.safetensors", {"format": "np"})
    assert same(read_back(tmp_path / "x.safetensors"), {(name,): value for name, value in tensors.items()})
    assert opened(tmp_path / "x.safetensors").metadata == {"format": "np"}


def test_what_torch_saves_and_loads(tmp_path: Path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    kinds = [torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float16, torch.bool]
    kinds += [torch.float8_e8m0fnu] if hasattr(torch, "float8_e8m0fnu") else []
    tensors = {str(kind): torch.linspace(0.25, 2, 12).reshape(3, 4).to(kind) for kind in kinds}
    save_file(tensors, tmp_path / "theirs.safetensors")
    values = read_back(tmp_path / "theirs.safetensors")
    for name, tensor in tensors.items():
        assert np.array_equal(values[(name,)].astype(np.float32), tensor.to(torch.float32).numpy()), name
    write(tmp_path / "ours", values)
    loaded = load_file(tmp_path / "ours/model.safetensors")
    assert {name: tensor.dtype for name, tensor in loaded.items()} == {str(kind): kind for kind in kinds}
    assert all(
        torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8)) for name, tensor in tensors.items()
    )


@settings(max_examples=80)
@given(TREES, st.integers(0, 40), st.none() | ROW_MAJOR)
def test_any_tree_comes_back_as_it_was(tmp_path_factory, shapes, limit, block):
    tree = {
        path: random_array(np.random.default_rng(number), shape, DTYPES[name])
        for number, (path, (shape, name)) in enumerate(shapes.items())
    }
    names = ["/".join(map(str, path)) for path in tree]
    scalars = frozenset(path for path, value in tree.items() if value.shape == ())
    constants = [Constant(("c", 0), "Dict"), Constant(("t/", "."), "string", "é")] if len(tree) % 2 else []
    directory = tmp_path_factory.mktemp("out")
    if len(set(names)) < len(names) or "__metadata__" in names:
        with pytest.raises(UnsupportedCheckpoint):
            write(directory, tree)
        return
    size = write(directory, tree, block=block, constants=constants, scalars=scalars, max_shard_bytes=limit)
    files = sorted(directory.glob("*.safetensors"))
    assert size == sum(file.stat().st_size for file in files)
    found = {}
    for file in files:
        found |= library_reads(file)
        length = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + length])
        assert length % 8 == 0
        for name, item in header.items():
            if name != "__metadata__":
                assert item["data_offsets"][0] % DTYPES[item["dtype"]].itemsize == 0, "a tensor out of line"
    assert set(found) == set(names)
    assert all(same_bits(found[name], value) for name, value in zip(names, tree.values(), strict=True))
    index = opened(directory).source.index()
    assert {spec.path: spec for spec in specs_of(tree, scalars)} == index.tensors
    assert list(index.constants) == constants
    assert same(read_back(directory), tree)


@pytest.mark.parametrize("tree, stem", [(STATE, "model"), ({("a", "b/c", 0): STATE[("count",)]}, "params")])
def test_how_the_files_are_called(tmp_path: Path, tree: Tree, stem: str):
    write(tmp_path / "one", tree)
    assert [file.name for file in (tmp_path / "one").iterdir()] == [f"{stem}.safetensors"]
    write(tmp_path / "alone", tree, file="x.safetensors", max_shard_bytes=1)
    assert [file.name for file in (tmp_path / "alone").iterdir()] == ["x.safetensors"]
    assert same(read_back(tmp_path / "alone/x.safetensors"), tree)


def test_shards_are_filled_in_order(tmp_path: Path):
    sizes = {("a",): 30, ("b",): 10, ("c",): 60, ("d",): 20, ("e",): 20}
    write(tmp_path, {path: np.zeros(size, np.uint8) for path, size in sizes.items()}, max_shard_bytes=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 140}
    shard = "model-0000{}-of-00003.safetensors".format
    assert index["weight_map"] == {"a": shard(1), "b": shard(1), "c": shard(2), "d": shard(3), "e": shard(3)}
    assert {name for name, file in index["weight_map"].items() if name in library_reads(tmp_path / file)} == set(
        "abcde"
    )


def test_more_shards_than_files_may_be_open(tmp_path: Path):
    tree = {(f"w{number}",): np.full(3, number) for number in range(100)}
    write(tmp_path, tree, max_shard_bytes=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    used = max(int(entry.name) for entry in Path("/dev/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, used + 50), hard))
    try:
        source = opened(tmp_path).source
        assert all(source.read(path, (slice(1, 2),)) == [number] for number, path in enumerate(tree))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_metadata_are_kept_and_ours_renewed(tmp_path: Path):
    tree = {("a", "b"): STATE[("flags",)]}
    kept = {"format": "mlx", "é": "ü"}
    write(tmp_path / "1", tree, metadata=kept | {"lora_merge.key_paths": "{}"})
    metadata = opened(tmp_path / "1").metadata
    assert {name: text for name, text in metadata.items() if not name.startswith("lora_merge.")} == kept
    assert list(opened(tmp_path / "1").source.index().tensors) == [("a", "b")]
    write(tmp_path / "2", STATE)
    assert opened(tmp_path / "2").metadata == {"format": "pt"}
    write(tmp_path / "3", tree)
    assert "format" not in opened(tmp_path / "3").metadata


@pytest.mark.parametrize("dtype", ["int4", "complex128", "float8_e4m3b11fnuz"])
def test_what_the_format_has_no_name_for(tmp_path: Path, dtype: str):
    import ml_dtypes

    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    with pytest.raises(UnsupportedCheckpoint, match=f"a dtype that safetensors cannot hold: w .*{dtype}"):
        write(tmp_path, {("w",): np.zeros(2, kind)})


@pytest.mark.parametrize("paths", [[("a", "b"), ("a/b",)], [("a", 0), ("a", "0")], [("__metadata__",)]])
def test_names_that_cannot_be_told_apart(tmp_path: Path, paths: list):
    with pytest.raises(UnsupportedCheckpoint, match=r"(under one name: a/|keeps for itself: __metadata__)"):
        write(tmp_path, {path: np.zeros(2) for path in paths})
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("data", [
    Stored(FLAT, [("0", bytes(11))]),
    Stored(FLAT, [("0", bytes(8)), ("1", bytes(8))]),
    [((slice(0, 2),), np.zeros(2, np.float32))],
    [((slice(0, 3),), np.zeros(3, np.float32)), ((slice(0, 3),), np.zeros(3, np.float32))],
    None,
])  # fmt: skip
def test_a_leaf_that_is_not_given_in_full(tmp_path: Path, data):
    spec = TensorSpec(("w",), (3,), np.dtype(np.float32))
    sink = SafetensorsSink(Destination(tmp_path), like())
    leaves = [] if data is None else [LeafData(spec, (3,), data if isinstance(data, Stored) else iter(data))]
    with pytest.raises(CorruptCheckpoint, match=r"not given in full: .*model.safetensors :: w"):
        sink.write([spec], leaves, [])


def test_values_of_another_dtype(tmp_path: Path):
    spec = TensorSpec(("w",), (3,), np.dtype(np.float32))
    for other in (np.float64, np.int32):
        leaf = LeafData(spec, (3,), iter([((slice(0, 3),), np.zeros(3, other))]))
        with pytest.raises(CorruptCheckpoint, match=r"another dtype: .*w \(expected float32"):
            SafetensorsSink(Destination(tmp_path / np.dtype(other).name), like()).write([spec], [leaf], [])


def test_a_full_disk(tmp_path: Path, monkeypatch):
    pwrite = os.pwrite

    def full(descriptor, data, offset):
        if offset > 500:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data[:100], offset)

    monkeypatch.setattr(os, "pwrite", full)
    for block in (None, [2, 4]):
        with pytest.raises(DiskFull, match=r"the disk is full: .*model.safetensors"):
            write(tmp_path / str(block), {("w",): np.zeros((100, 4), np.float32)}, block=block)


def test_nothing_is_overwritten(tmp_path: Path):
    write(tmp_path, STATE)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(ResourceError, match=r"the operating system refuses: .*model.safetensors .*exists"):
        write(tmp_path, {("w",): np.zeros(3)})
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_the_fingerprint_is_of_names_sizes_and_headers(tmp_path: Path):
    prints = []
    for name, tree in {"1": STATE, "2": STATE, "3": {("w",): np.zeros(3)}, "4": {("v",): np.zeros(3)}}.items():
        write(tmp_path / name, tree)
        prints.append(opened(tmp_path / name).source.fingerprint())
    assert prints[0] == prints[1]
    assert len(set(prints)) == 3


def test_stored_bytes_are_the_values(tmp_path: Path):
    write(tmp_path, STATE, max_shard_bytes=20)
    source = opened(tmp_path).source
    for path, value in STATE.items():
        stored = source.stored(path)
        assert stored is not None
        assert stored.encoding == FLAT
        assert b"".join(bytes(piece) for _, piece in stored.values) == value.tobytes()


def test_transformers_loads_what_was_written(tmp_path: Path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "theirs", max_shard_size="8KB")
    source = opened(tmp_path / "theirs").source
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    tree = read_back(tmp_path / "theirs")
    assert {path[0] for path in tree} == set(model.state_dict())
    write(tmp_path / "ours", tree, max_shard_bytes=5000, metadata=opened(tmp_path / "theirs").metadata)
    (tmp_path / "ours/config.json").write_bytes((tmp_path / "theirs/config.json").read_bytes())
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    assert source.index().nbytes == opened(tmp_path / "ours").source.index().nbytes
    loaded, information = transformers.LlamaForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not any(information.values()), information
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())


def test_memory_stays_small_whatever_the_size_of_the_file(tmp_path: Path):
    program = """
import resource, sys
from pathlib import Path
import numpy as np
from lora_merge_cli.formats.interface import Destination, LeafData
from lora_merge_cli.formats.safetensors_dir import SafetensorsFormat
from lora_merge_cli.records import TensorSpec, grid, full_region
from tests.safetensors_files import like
out, fmt = Path(sys.argv[1]), SafetensorsFormat()
spec = TensorSpec(("w",), (50, 1024, 1024), np.dtype(np.float32))
start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
block = np.ones((1, 1024, 1024), np.float32)
regions = list(grid(full_region(spec.shape), block.shape))
fmt.sink(Destination(out / "a"), like()).write([spec], [LeafData(spec, block.shape, ((r, block) for r in regions))], [])
source = fmt.open(out / "a", None).source
assert all(source.read(("w",), region).sum() == block.size for region in regions)
fmt.sink(Destination(out / "b"), like()).write([spec], [LeafData(spec, block.shape, source.stored(("w",)))], [])
assert (out / "b/model.safetensors").stat().st_size > spec.nbytes
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - start)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], check=False)
    for file in tmp_path.rglob("*.safetensors"):
        file.unlink()
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 60_000, "kilobytes more than before, for 200 MB"
