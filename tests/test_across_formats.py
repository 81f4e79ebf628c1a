"""One merge, every format: no key path is lost, no bit differs, and outputs that are files appear as files do.

And one way of reading: every source gives the same values front to back, whatever they are stored in.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora_merge_cli import open_checkpoint
from lora_merge_cli.errors import CorruptCheckpoint
from lora_merge_cli.formats.interface import Source
from lora_merge_cli.records import Array, Region, full_region
from tests.checkpoints import save_item, save_step
from tests.command import run
from tests.test_openpi_merge import ALPHAS
from tests.trees import ACTION, PALIGEMMA, build, nest

RANK, ALPHA = 2, 6.0


@pytest.fixture
def step(tmp_path: Path) -> Path:
    return save_step(tmp_path / "in" / "5", nest(build(PALIGEMMA, ACTION).leaves))


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, Path]:
    """A base of one file in a directory, and a PEFT adapter, in plain NumPy."""
    rng = np.random.default_rng(0)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    kernels = {f"model.layers.{layer}.mlp.up_proj.weight": rng.normal(size=(6, 4)) for layer in range(2)}
    tensors = {name: values.astype(ml_dtypes.bfloat16) for name, values in kernels.items()}
    tensors["model.norm.weight"] = np.ones(4, np.float16)
    tensors["steps"] = np.arange(3)
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt", "trained by": "us"})
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    (base / "tokenizer").mkdir()
    (base / "tokenizer" / "vocab.txt").write_text("a b\n")
    factors = {}
    for name in kernels:
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        factors[f"{stem}.lora_A.weight"] = rng.normal(size=(RANK, 4)).astype(np.float32)
        factors[f"{stem}.lora_B.weight"] = rng.normal(size=(6, RANK)).astype(np.float32)
    save_file(factors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    return base, adapter


def contents(path: Path) -> dict[Any, tuple[str, bytes]]:
    source = open_checkpoint(path).source
    return {
        key: (spec.dtype.name, source.read(key, full_region(spec.shape)).tobytes())
        for key, spec in source.index().tensors.items()
    }


@pytest.mark.parametrize("to", ["safetensors", "pth"])
def test_an_openpi_tree_keeps_every_path_and_bit(to: str, step: Path, tmp_path: Path) -> None:
    wanted, out, back = tmp_path / "orbax", tmp_path / to, tmp_path / "back"
    assert run("merge", step, "-o", wanted, "--lora-alpha", ALPHAS).code == 0
    outcome = run("merge", step, "-o", out, "--lora-alpha", ALPHAS, "--to", to, "--verify", "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["output_format"] == to
    assert contents(out) == contents(wanted)
    assert (out / "assets" / "trossen" / "norm_stats.json").is_file()
    assert not (out / "model.safetensors").exists()
    # The other way: a base without adapters and nothing to merge is refused, so the tree comes back through a merge.
    assert run("merge", out, "-o", back).code == 4
    assert run("verify", out, "--against", step, "--lora-alpha", ALPHAS).code == 0
    assert run("diff", wanted, out).code == 0


@pytest.mark.parametrize("to", ["orbax", "pth", "safetensors"])
def test_a_state_dict_keeps_every_name_and_bit(to: str, model: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = model
    wanted, out = tmp_path / "wanted", tmp_path / to
    assert run("merge", base, "--adapter", adapter, "-o", wanted).code == 0
    assert run("merge", base, "--adapter", adapter, "-o", out, "--to", to, "--verify").code == 0
    assert contents(out) == contents(wanted)
    assert (out / "tokenizer" / "vocab.txt").read_text() == "a b\n"
    assert (out / "config.json").read_bytes() == (base / "config.json").read_bytes()
    # And what came out is a base again, in whatever format.
    again = tmp_path / "again"
    flags = ["--adapter", f"{adapter}@-1", "-o", again, "--to", "safetensors", "--dtype", "float32"]
    (out / "lora_merge.json").unlink()
    assert run("merge", out, *flags).code == 0
    before, after = load_file(base / "model.safetensors"), load_file(again / "model.safetensors")
    for name in before:
        np.testing.assert_allclose(after[name].astype(np.float64), before[name].astype(np.float64), atol=0.05)


def test_what_is_merged_is_the_sum_rounded_once(model: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = model
    assert run("merge", base, "--adapter", adapter, "-o", tmp_path / "out").code == 0
    before, after = (load_file(path / "model.safetensors") for path in (base, tmp_path / "out"))
    factors = load_file(adapter / "adapter_model.safetensors")
    for name, values in before.items():
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{stem}.lora_A.weight" not in factors:
            assert after[name].tobytes() == values.tobytes()
            continue
        a, b = (factors[f"{stem}.lora_{side}.weight"].astype(np.float64) for side in "AB")
        ideal = values.astype(np.float64) + ALPHA / RANK * b @ a
        assert after[name].tobytes() == ideal.astype(np.float32).astype(ml_dtypes.bfloat16).tobytes()


def test_a_wider_result_says_so_in_its_configuration(model: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = model
    assert run("merge", base, "--adapter", adapter, "-o", tmp_path / "out", "--dtype", "float32", "--verify").code == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "llama", "torch_dtype": "float32"}


def test_shards_are_as_large_as_they_may_be(model: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = model
    out = tmp_path / "out"
    assert run("merge", base, "--adapter", adapter, "-o", out, "--max-shard-size", "100", "--verify").code == 0
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == sorted(path.name for path in out.glob("*.safetensors")) and len(files) == 2
    assert {name for file in files for name in load_file(out / file)} == set(index["weight_map"])
    assert all(sum(v.nbytes for v in load_file(out / file).values()) <= 100 for file in files)


@pytest.mark.parametrize("size", ["0", "-1", "five", "5 apples", ""])
def test_sizes_that_are_none(size: str, model: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = model
    outcome = run("merge", base, "--adapter", adapter, "-o", tmp_path / "out", "--max-shard-size", size)
    assert (outcome.code, "--max-shard-size" in outcome.error) == (2, True)


@pytest.mark.parametrize("name", ["merged.safetensors", "merged.pth", "merged.bin"])
def test_an_output_that_is_a_file(name: str, model: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = model
    out = tmp_path / "deep" / name
    assert run("merge", base, "--adapter", adapter, "-o", out, "--verify").code == 0
    beside = out.with_name(f"{name}.lora_merge.json")
    assert sorted(out.parent.iterdir()) == sorted([out, beside])
    assert contents(out).keys() == contents(base).keys()
    assert run("merge", base, "--adapter", adapter, "-o", out).code == 5
    first = out.read_bytes()
    assert run("merge", base, "--adapter", f"{adapter}@0.5", "-o", out, "--overwrite").code == 0
    assert out.read_bytes() != first
    assert json.loads(beside.read_text())["sources"][1]["weight"] == 0.5
    assert sorted(out.parent.iterdir()) == sorted([out, beside])
    # The provenance is found beside the file: the same adapter a second time is refused.
    assert run("merge", out, "--adapter", f"{adapter}@0.5", "-o", tmp_path / "twice").code == 4


def test_what_stands_at_the_provenance_of_a_file_is_kept(model: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = model
    beside = tmp_path / "merged.safetensors.lora_merge.json"
    beside.write_text("mine")
    assert run("merge", base, "--adapter", adapter, "-o", tmp_path / "merged.safetensors").code == 5
    assert beside.read_text() == "mine"


def test_a_suffix_and_a_format_that_disagree(model: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = model
    outcome = run("merge", base, "--adapter", adapter, "-o", tmp_path / "x.safetensors", "--to", "pth")
    assert (outcome.code, "--to pth" in outcome.error) == (2, True)


def test_an_output_inside_an_input(model: tuple[Path, Path]) -> None:
    base, adapter = model
    for place in (base / "out", adapter / "out.safetensors", base):
        assert run("merge", base, "--adapter", adapter, "-o", place, "--overwrite").code == 4


def test_what_belongs_to_a_model_stays_with_it_in_orbax(model: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = model
    first, second = tmp_path / "first", tmp_path / "second"
    assert run("merge", base, "--adapter", adapter, "-o", first, "--to", "orbax", "--verify").code == 0
    opened = open_checkpoint(first)
    assert opened.companions == ("config.json", "tokenizer/vocab.txt") and opened.left_out == {}
    assert opened.config == {"model_type": "llama", "torch_dtype": "bfloat16"}
    assert run("merge", first, "--adapter", f"{adapter}@0.5", "-o", second, "--to", "safetensors").code == 4
    (first / "lora_merge.json").unlink()
    assert run("merge", first, "--adapter", f"{adapter}@0.5", "-o", second, "--to", "safetensors").code == 0
    assert (second / "tokenizer" / "vocab.txt").is_file() and (second / "config.json").is_file()


def test_numbers_of_a_training_file_are_kept_in_orbax(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    kernel = torch.arange(16.0).reshape(4, 4)
    state = {"model": {"a.weight": kernel}, "epoch": 3, "best": 0.5, "done": True, "none": None, "name": "run 7"}
    torch.save(state, tmp_path / "base.pth")
    torch.save({"a.lora.A.weight": kernel[:2] / 7, "a.lora.B.weight": kernel[:, :2] / 9}, tmp_path / "adapter.pth")
    flags = ["merge", tmp_path / "base.pth", "--adapter", tmp_path / "adapter.pth"]
    assert run(*flags, "-o", tmp_path / "kept.pth", "--verify").code == 0
    kept = torch.load(tmp_path / "kept.pth", weights_only=True)
    assert {key: kept[key] for key in state if key != "model"} == {key: state[key] for key in state if key != "model"}
    torch.testing.assert_close(kept["model"]["a.weight"], kernel + kernel[:, :2] / 9 @ kernel[:2] / 7)
    assert run(*flags, "-o", tmp_path / "orbax", "--to", "orbax", "--verify").code == 0
    source = open_checkpoint(tmp_path / "orbax").source
    numbers = {key: source.read(key, ()).item() for key, spec in source.index().tensors.items() if not spec.shape}
    assert numbers == {("epoch",): 3, ("best",): 0.5, ("done",): True}
    assert {part.path: part.value for part in source.index().constants} == {("none",): None, ("name",): "run 7"}


RNG = np.random.default_rng(5)
ARRAYS: dict[str, Array] = {
    "cube": RNG.normal(size=(7, 5, 12)).astype(np.float32),
    "row": RNG.normal(size=40).astype(ml_dtypes.bfloat16),
    "deep": RNG.integers(-9, 9, (2, 3, 2, 9)).astype(np.int8),
    "one": RNG.normal(size=()).astype(np.float32),
}
# An odd part of each extent, so that chunks end within rows and behind the array.
CHUNKS = {"cube": (3, 2, 5), "row": (7,), "deep": (1, 2, 2, 4), "one": ()}
INNER = {"cube": (6, 4, 10), "row": (14,), "deep": (1, 2, 2, 4), "one": ()}
LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 3, "shuffle": 1}
GZIP = [LITTLE, {"name": "gzip", "configuration": {"level": 2}}]


def store_of(item: Path, ocdbt: bool, name: str) -> dict[str, Any]:
    if ocdbt:
        return {"driver": "ocdbt", "base": f"file://{item}/", "path": f"{name}/"}
    return {"driver": "file", "path": f"{item}/{name}/"}


def kept_otherwise(item: Path, ocdbt: bool, version: int, metadata: Callable[[str], dict[str, Any]]) -> None:
    """Store the arrays of an item once more, in another of the ways that TensorStore has."""
    for name, values in ARRAYS.items():
        array = ts.open(
            {
                "driver": {2: "zarr", 3: "zarr3"}[version],
                "kvstore": store_of(item, ocdbt, name),
                "metadata": {"shape": values.shape, **metadata(name)},
                "store_data_equal_to_fill_value": True,
            },
            dtype=ts.dtype(values.dtype),
            create=True,
            delete_existing=True,
        ).result()
        array.write(values).result()


def regular(extents: tuple[int, ...], codecs: list[Any]) -> dict[str, Any]:
    return {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": extents}}, "codecs": codecs}


def sharded(name: str) -> list[Any]:
    options = {"chunk_shape": CHUNKS[name], "codecs": [LITTLE], "index_codecs": [LITTLE, {"name": "crc32c"}]}
    return [{"name": "sharding_indexed", "configuration": options}]


OTHERWISE: dict[str, tuple[int, Callable[[str], dict[str, Any]]]] = {
    "raw odd chunks": (2, lambda name: {"chunks": CHUNKS[name], "compressor": None}),
    "zstd odd chunks": (
        3,
        lambda name: regular(CHUNKS[name], [LITTLE, {"name": "zstd", "configuration": {"level": 3}}]),
    ),
    "blosc": (2, lambda name: {"chunks": CHUNKS[name], "compressor": BLOSC}),
    # Of one axis or none, both orders are one, and TensorStore calls it C.
    "Fortran order": (
        2,
        lambda name: {"chunks": CHUNKS[name], "compressor": None, "order": "F" if len(CHUNKS[name]) > 1 else "C"},
    ),
    "gzip": (3, lambda name: regular(CHUNKS[name], GZIP)),
    "sharded": (3, lambda name: regular(INNER[name], sharded(name))),
}


def kept_in_orbax(path: Path, way: str) -> Path:
    kind, _, way = way.partition(" ")
    version, metadata = OTHERWISE.get(way, (int(way[-1]) if way.startswith("zarr") else 2, None))
    save_item(path, ARRAYS, ocdbt=kind == "ocdbt", zarr3=version == 3)
    if metadata is not None:
        kept_otherwise(path, kind == "ocdbt", version, metadata)
    return path


def kept_in_torch(path: Path, way: str) -> Path:
    torch = pytest.importorskip("torch")
    tensors = {
        name: torch.from_numpy(np.array(values, np.float32)).to(getattr(torch, values.dtype.name))
        for name, values in ARRAYS.items()
    }
    if way == "strided":
        tensors = {name: tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor for name, tensor in tensors.items()}
    torch.save(tensors, path, _use_new_zipfile_serialization=way != "legacy")
    return path


def kept(folder: Path, way: str) -> Path:
    """Where the arrays lie, kept in some way."""
    name, _, more = way.partition(" ")
    if name == "safetensors":
        save_file(ARRAYS, folder / "x.safetensors")
        return folder / "x.safetensors"
    return kept_in_torch(folder / "x.pth", more) if name == "pth" else kept_in_orbax(folder / "x", way)


IN_ORBAX = [
    f"{kind} {way}" for kind in ("ocdbt", "files") for way in ("zarr2", "zarr3", *OTHERWISE)
]  # fmt: skip
WAYS = ["safetensors", "pth", "pth legacy", "pth strided", *IN_ORBAX]


@pytest.fixture(scope="module", params=WAYS)
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_checkpoint(kept(tmp_path_factory.mktemp("kept"), request.param)).source


@pytest.fixture(scope="module")
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(3) as workers:
        yield workers


@st.composite
def walks(draw: st.DrawFn) -> tuple[str, list[Region]]:
    """Runs of entries of an array, ascending, some of them left out."""
    name = draw(st.sampled_from(sorted(ARRAYS)))
    shape = ARRAYS[name].shape
    regions: list[Region] = []
    if not shape:
        return name, [()] * draw(st.integers(0, 1))
    position = 0
    while True:
        axis = draw(st.integers(0, len(shape) - 1))
        tail = math.prod(shape[axis + 1 :])
        position = -(-position // tail) * tail
        if position >= math.prod(shape):
            return name, regions
        index = [int(i) for i in np.unravel_index(position, shape)]
        stop = draw(st.integers(index[axis] + 1, shape[axis]))
        if draw(st.booleans()):
            ones = (slice(i, i + 1) for i in index[:axis])
            regions.append((*ones, slice(index[axis], stop), *full_region(shape[axis + 1 :])))
        position += (stop - index[axis]) * tail


@settings(deadline=None, max_examples=25)
@given(walks(), st.booleans())
def test_a_scan_gives_what_was_stored(
    source: Source, pool: ThreadPoolExecutor, walk: tuple[str, list[Region]], pooled: bool
) -> None:
    name, regions = walk
    found = list(source.scan((name,), regions, pool if pooled else None))
    assert len(found) == len(regions)
    for region, values in zip(regions, found, strict=True):
        wanted = ARRAYS[name][region]
        read = source.read((name,), region)
        assert (values.dtype, values.shape) == (read.dtype, read.shape) == (wanted.dtype, wanted.shape)
        assert values.tobytes() == read.tobytes() == wanted.tobytes()


@settings(deadline=None, max_examples=15)
@given(st.data())
def test_any_region_is_read(source: Source, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(ARRAYS)))
    starts = [data.draw(st.integers(0, extent - 1)) for extent in ARRAYS[name].shape]
    stops = [data.draw(st.integers(start + 1, n)) for start, n in zip(starts, ARRAYS[name].shape, strict=True)]
    region = tuple(map(slice, starts, stops))
    assert source.read((name,), region).tobytes() == ARRAYS[name][region].tobytes()


@pytest.mark.parametrize("damage", ["shorter", "empty", "other", "gone"])
@pytest.mark.parametrize("way", IN_ORBAX)
def test_a_damaged_chunk_is_named(way: str, damage: str, pool: ThreadPoolExecutor, tmp_path: Path) -> None:
    path = kept(tmp_path, way)
    store = ts.KvStore.open(store_of(path, way.startswith("ocdbt"), "cube")).result()
    chunks = [key for key in store.list().result() if key not in (b".zarray", b"zarr.json")]
    whole = store.read(max(chunks)).result().value
    values = {"shorter": whole[:-1], "empty": b"", "other": b"not a chunk", "gone": None}
    store.write(max(chunks), values[damage]).result()
    for executor in (None, pool):
        with pytest.raises(CorruptCheckpoint) as raised:
            # Damage may show as early as the index.
            list(open_checkpoint(path).source.scan(("cube",), [full_region(ARRAYS["cube"].shape)], executor))
        assert raised.value.where == f"{path} :: cube"


@pytest.mark.parametrize("way", ["safetensors", "pth", "pth legacy", "pth strided"])
def test_a_file_that_was_cut_off_meanwhile_is_named(way: str, tmp_path: Path) -> None:
    path = kept(tmp_path, way)
    source = open_checkpoint(path).source
    source.index()
    os.truncate(path, 100)
    with pytest.raises(CorruptCheckpoint) as raised:
        list(source.scan(("cube",), [full_region(ARRAYS["cube"].shape)]))
    assert raised.value.where == f"{path} :: cube"
