"""Every way in which Orbax lays a checkpoint out, and every level of one that a user may name."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.formats import open_checkpoint
from lora_merge_cli.formats.interface import Compression, LeafData, Stored
from lora_merge_cli.formats.orbax_sink import OrbaxSink
from lora_merge_cli.records import Array, Constant, TensorSpec, full_region, grid, slab
from tests.checkpoints import NORM_STATS, restore, save_item, save_step
from tests.command import run
from tests.test_openpi_merge import ALPHAS, check
from tests.trees import ACTION, PALIGEMMA, build, nest

TREE = build(PALIGEMMA, ACTION)
ALPHA = ["--lora-alpha", ALPHAS]

LAYOUTS: dict[str, dict[str, Any]] = {
    f"{'ocdbt' if ocdbt else 'files'} zarr{3 if zarr3 else 2}"
    f"{'' if compressed else ' raw'}{' chunked' if chunk else ''}": {
        "ocdbt": ocdbt,
        "zarr3": zarr3,
        "compressed": compressed,
        "chunk_bytes": chunk,
    }
    for ocdbt, zarr3, compressed, chunk in itertools.product((True, False), (True, False), (True, False), (None, 500))
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_merge_reads_every_layout(layout: str, tmp_path: Path) -> None:
    step = save_step(tmp_path / "7", nest(TREE.leaves), **LAYOUTS[layout])
    outcome = run("merge", step, "-o", tmp_path / "out", *ALPHA)
    assert outcome.code == 0, outcome.stderr
    check(TREE, tmp_path / "out/params")
    written = json.loads((tmp_path / "out/params/_METADATA").read_text())
    assert written["use_zarr3"] == LAYOUTS[layout]["zarr3"]


def test_arrays_sharded_over_devices(tmp_path: Path) -> None:
    """Saved from eight devices, sharded on several axes; read where there is one."""
    script = Path(__file__).parent / "compat" / "save_sharded.py"
    arrays = tmp_path / "tree.npz"
    np.savez(arrays, **{"/".join(path): v.astype(np.float32) for path, v in TREE.leaves.items()})
    step = tmp_path / "7"
    subprocess.run([sys.executable, script, arrays, step / "params"], check=True, timeout=300)
    assert run("merge", step, "-o", tmp_path / "out", *ALPHA).code == 0
    check(TREE, tmp_path / "out/params")


def test_index_reads_metadata_only(tmp_path: Path) -> None:
    step = save_step(tmp_path / "7", nest(TREE.leaves), ocdbt=False)
    for chunk in (step / "params").glob("params.*/0*"):
        chunk.write_bytes(b"not a chunk")
    index = open_checkpoint(step).source.index()
    for path, values in TREE.leaves.items():
        spec = index.tensors[("params", *path, "value")]
        assert (spec.shape, spec.dtype) == (values.shape, values.dtype)


@pytest.fixture
def training_run(tmp_path: Path) -> Path:
    """A run with two finished steps, an unfinished one, and a bystander."""
    for step in (100, 2000):
        save_step(tmp_path / "run" / str(step), nest(TREE.leaves))
    (tmp_path / "run" / "2000" / "train_state").mkdir()
    (tmp_path / "run" / "3000.orbax-checkpoint-tmp-17").mkdir()
    (tmp_path / "run" / "wandb_id.txt").write_text("x")
    return tmp_path / "run"


@pytest.mark.parametrize("level", ["", "2000", "2000/params"])
def test_any_level_is_accepted_and_the_choice_said(level: str, training_run: Path, tmp_path: Path) -> None:
    outcome = run("merge", training_run / level, "-o", tmp_path / "out", *ALPHA, "--json")
    assert outcome.code == 0, outcome.stderr
    assert outcome.json["sources"][0]["path"].endswith("2000/params")
    assert outcome.json["sources"][0]["step"] == 2000
    notes = " ".join(outcome.json["notes"])
    assert ("step 2000 of 2 (the newest)" in notes) == (level == "")
    assert ("params/ of" in notes) == (level == "2000/params")
    assert "left out: train_state" in notes
    stats = tmp_path / "out/assets/trossen/norm_stats.json"
    assert json.loads(stats.read_text()) == NORM_STATS


def test_step_picks_one_of_a_run(training_run: Path) -> None:
    plan = run("merge", training_run, "--step", 100, "--dry-run", "--json", *ALPHA).json
    assert plan["sources"][0]["step"] == 100
    missing = run("merge", training_run, "--step", 150, "--dry-run", *ALPHA)
    assert missing.code == 3
    assert "no step 150" in missing.error and "100, 2000" in missing.error
    wrong = run("merge", training_run / "2000", "--step", 100, "--dry-run", *ALPHA)
    assert wrong.code == 2
    assert "needs a run directory" in wrong.error


def test_a_newer_step_without_arrays_is_said(training_run: Path) -> None:
    (training_run / "9000").mkdir()
    notes = run("inspect", training_run, *ALPHA, "--json").json["notes"]
    assert any("passed over" in note and "9000" in note for note in notes)


@pytest.mark.parametrize("item", ["default", "state", "model"])
@pytest.mark.parametrize("root", [(), ("model",), ("params", "nested")])
def test_other_items_and_root_keys_are_mirrored(item: str, root: tuple[str, ...], tmp_path: Path) -> None:
    step = save_step(tmp_path / "run" / "5", nest(TREE.leaves, root=root, suffix=()), item=item, assets=False)
    outcome = run("merge", step, "-o", tmp_path / "out", *ALPHA)
    assert outcome.code == 0, outcome.stderr
    merged = restore(tmp_path / "out" / item)
    for key in root:
        merged = merged[key]
    assert "PaliGemma" in merged


def general_tree() -> dict[str, Any]:
    """A train state that is not OpenPI's, with everything that a PyTree may hold."""
    params = nest(build(PALIGEMMA).leaves, root=(), suffix=())["PaliGemma"]["llm"]
    rng = np.random.default_rng(3)
    return {
        "step": 7,
        "model": {
            "decoder": params,
            "odd.key": {"a/b": rng.standard_normal((2, 3)).astype(np.float32)},
            "blocks": [np.arange(3, dtype=np.int32), {"scale": np.float32(2.5)}],
            "flags": np.array([True, False]),
            "nothing": {},
            "absent": None,
            "zeros": np.zeros((4, 4), np.float32),
        },
        "opt_state": [
            {"count": np.int32(7), "mu": params},
            {"note": "adamw"},
        ],
    }


def flatten(node: Any, path: tuple[Any, ...] = ()) -> dict[tuple[Any, ...], Any]:
    """Every leaf, empty containers and None included."""
    children: Any = ()
    if isinstance(node, dict) and node:
        children = node.items()
    elif isinstance(node, list | tuple) and node:
        children = enumerate(node)
    else:
        return {path: node}
    return {key: leaf for part, child in children for key, leaf in flatten(child, (*path, part)).items()}


@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_general_pytree_survives(ocdbt: bool, tmp_path: Path) -> None:
    tree = general_tree()
    save_item(tmp_path / "ckpt", tree, ocdbt=ocdbt)
    outcome = run("merge", tmp_path / "ckpt", "-o", tmp_path / "out", *ALPHA, "--json")
    assert outcome.code == 0, outcome.stderr
    before, after = flatten(restore(tmp_path / "ckpt")), flatten(restore(tmp_path / "out"))
    lora = {path for path in before if any("lora" in str(part) for part in path)}
    assert after.keys() == before.keys() - lora
    expected = build(PALIGEMMA).expected
    for path, leaf in after.items():
        merged = expected.get(("PaliGemma", "llm", *path[2:])) if path[:2] == ("model", "decoder") else None
        if merged is not None and merged.dtype == np.float64:
            assert np.abs(leaf - merged).max() <= 2e-6 * np.abs(merged).max()
        elif isinstance(before[path], np.ndarray):
            assert leaf.dtype == before[path].dtype and leaf.tobytes() == before[path].tobytes(), path
        else:
            assert leaf == before[path] and type(leaf) is type(before[path]), path
    reasons = {leaf["path"]: leaf["reason"] for leaf in outcome.json["dropped"]}
    assert {r for p, r in reasons.items() if p.startswith("opt_state")} == {
        "optimiser state of an adapter that is merged"
    }
    assert len(reasons) == len(lora)


def test_several_items_are_not_guessed_between(tmp_path: Path) -> None:
    step = save_step(tmp_path / "5", nest(TREE.leaves), item="model", assets=False)
    save_item(step / "ema", nest(TREE.leaves))
    outcome = run("inspect", step)
    assert outcome.code == 2
    assert "ema, model" in outcome.error
    assert run("inspect", step / "model", *ALPHA).code == 0


def test_an_unfinished_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save_item(tmp_path / "5.orbax-checkpoint-tmp-1", nest(TREE.leaves))
    outcome = run("inspect", path)
    assert outcome.code == 3
    assert "never finished" in outcome.error


def test_keys_that_would_share_a_name_are_refused(tmp_path: Path) -> None:
    tree = build(PALIGEMMA).leaves
    nested = nest(tree)
    step = save_step(tmp_path / "5", nested)
    metadata = json.loads((step / "params/_METADATA").read_text())
    name, entry = next((k, v) for k, v in metadata["tree_metadata"].items() if "pos_embedding" in k)
    clash = json.loads(json.dumps(entry))
    parts = [key["key"] for key in entry["key_metadata"]]
    clash["key_metadata"] = [{"key": key, "key_type": 2} for key in (f"{parts[0]}.{parts[1]}", *parts[2:])]
    metadata["tree_metadata"][f"{name} again"] = clash
    (step / "params/_METADATA").write_text(json.dumps(metadata))
    outcome = run("merge", step, "-o", tmp_path / "out", "--lora-alpha", 12)
    assert outcome.code == 4
    assert "under one name" in outcome.error
    assert not (tmp_path / "out").exists()


def test_the_source_is_never_modified(tmp_path: Path) -> None:
    step = save_step(tmp_path / "5", nest(TREE.leaves))
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in step.rglob("*") if p.is_file()}
    assert run("merge", step, "-o", tmp_path / "out", *ALPHA).code == 0
    after = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in step.rglob("*") if p.is_file()}
    assert before == after


def test_paths_with_odd_characters(tmp_path: Path) -> None:
    folder = tmp_path / "my run #1 (50%) \N{LATIN SMALL LETTER E WITH ACUTE}"
    step = save_step(folder / "5", nest(TREE.leaves))
    outcome = run("merge", step, "-o", folder / "out put", *ALPHA)
    assert outcome.code == 0, outcome.stderr
    shutil.copytree(folder / "out put", tmp_path / "copy")
    check(TREE, tmp_path / "copy/params")


def test_reading_any_region(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((5, 7, 3)).astype(np.float32)
    save_item(tmp_path / "ckpt", {"x": values}, chunk_bytes=64)
    source = open_checkpoint(tmp_path / "ckpt").source
    assert np.array_equal(source.read(("x",), full_region(values.shape)), values)
    region = (slice(1, 4), slice(2, 7), slice(0, 2))
    assert np.array_equal(source.read(("x",), region), values[region])


@pytest.mark.parametrize("zarr3", [True, False])
def test_chunks_of_zeros_that_were_never_stored(zarr3: bool, tmp_path: Path) -> None:
    """Old writers leave out chunks that hold nothing but zeros, and say so by saying nothing."""
    leaves = dict(TREE.leaves)
    zeros = ("action_in_proj", "kernel")
    leaves[zeros] = np.zeros((7, 16), np.float32)
    step = save_step(tmp_path / "in" / "7", nest(leaves), zarr3=zarr3)
    item = step / "params"
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{item}/"}).result()
    name = "params.action_in_proj.kernel.value/"
    for key in store.list().result():
        if key.decode().startswith(name) and not key.endswith((b".zarray", b"zarr.json")):
            store.write(key, None).result()
    assert "chunks are missing" in run("inspect", step).error
    metadata = json.loads((item / "_METADATA").read_text())
    del metadata["store_array_data_equal_to_fill_value"]
    (item / "_METADATA").write_text(json.dumps(metadata))
    outcome = run("merge", step, "-o", tmp_path / "out", *ALPHA)
    assert outcome.code == 0, outcome.stderr
    merged = restore(tmp_path / "out/params")["params"]["action_in_proj"]["kernel"]["value"]
    assert np.array_equal(merged, leaves[zeros])


def test_steps_with_a_prefix(tmp_path: Path) -> None:
    for name in ("pi0_100", "pi0_2000"):
        save_step(tmp_path / "run" / name, nest(TREE.leaves))
    assert run("inspect", tmp_path / "run", "--json").json["step"] == 2000
    assert run("inspect", tmp_path / "run", "--step", 100, "--json").json["step"] == 100


WRITTEN = pytest.mark.parametrize(("version", "compression"), [*itertools.product((2, 3), ("none", "zstd"))])
DTYPES = [np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.int8, np.bool_, ml_dtypes.float8_e4m3fn)]


def leaf_in_blocks(spec: TensorSpec, values: Array, block: int, chunk: int) -> LeafData:
    """A leaf in runs of at most so many entries, to be kept in chunks of at most so many."""
    regions = grid(full_region(spec.shape), slab(spec.shape, block))
    return LeafData(spec, slab(spec.shape, chunk), ((region, values[region]) for region in regions))


@WRITTEN
@settings(deadline=None, max_examples=8)
@given(
    cases=st.lists(
        st.tuples(st.lists(st.integers(1, 6), max_size=4), st.integers(1, 300), st.integers(1, 300)),
        min_size=1,
        max_size=4,
    )
)
def test_what_a_sink_is_given_in_blocks_orbax_restores(
    tmp_path_factory: pytest.TempPathFactory,
    version: int,
    compression: Compression,
    cases: list[tuple[list[int], int, int]],
) -> None:
    rng = np.random.default_rng(len(cases))
    values = {
        f"w{number}": rng.integers(0, 2, shape).astype(DTYPES[(number + len(shape)) % len(DTYPES)])
        for number, (shape, _, _) in enumerate(cases)
    }
    specs = [TensorSpec(("params", name), array.shape, array.dtype) for name, array in values.items()]
    leaves = (
        leaf_in_blocks(spec, values[str(spec.path[1])], block, chunk)
        for spec, (_, block, chunk) in zip(specs, cases, strict=True)
    )
    path = tmp_path_factory.mktemp("sink")
    written = OrbaxSink(path, None, version, compression).write(specs, leaves, [Constant(("step",), "int", "7")])
    assert written >= (sum(array.nbytes for array in values.values()) if compression == "none" else 1)
    found = restore(path)
    assert found["step"] == 7
    assert found["params"].keys() == values.keys()
    for name, array in values.items():
        assert (found["params"][name].dtype, found["params"][name].shape) == (array.dtype, array.shape)
        assert found["params"][name].tobytes() == array.tobytes()


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("name", [
    *("bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"),
    *("float16", "float32", "float64", "complex64", "complex128"),
    *("bfloat16", "float8_e4m3fn", "float8_e4m3fnuz", "float8_e4m3b11fnuz", "float8_e5m2", "float8_e5m2fnuz"),
])  # fmt: skip
def test_a_sink_keeps_every_dtype_as_tensorstore_has_it(tmp_path: Path, version: int, name: str) -> None:
    values = np.array([[0, 1, 1], [1, 0, 1]]).astype(getattr(ml_dtypes, name, name))
    spec = TensorSpec(("w",), values.shape, values.dtype)
    OrbaxSink(tmp_path, None, version).write([spec], [leaf_in_blocks(spec, values, 2, 3)], [])
    spelled = {"driver": {2: "zarr", 3: "zarr3"}[version]}
    kept = {"driver": "ocdbt", "base": f"file://{tmp_path}/", "path": "w/"}
    found = ts.open(spelled | {"kvstore": kept}, open=True).result().read().result()
    assert found.dtype == values.dtype and found.tobytes() == values.tobytes()


@pytest.mark.parametrize("version", [2, 3])
def test_zstd_is_smaller_and_none_is_not(tmp_path: Path, version: int) -> None:
    values = np.tile(np.arange(64, dtype=np.float32), (64, 16))
    spec = TensorSpec(("w",), values.shape, values.dtype)
    sizes = {}
    for compression in ("none", "zstd"):
        sink = OrbaxSink(tmp_path / compression, None, version, compression)
        sizes[compression] = sink.write([spec], [leaf_in_blocks(spec, values, 5000, 9000)], [])
        assert np.array_equal(restore(tmp_path / compression)["w"], values)
    assert sizes["zstd"] < values.nbytes / 2 < values.nbytes <= sizes["none"]


@WRITTEN
@pytest.mark.parametrize("given_rows", [0, 1, 4, 6, 50])
def test_a_sink_refuses_a_leaf_that_is_not_given_in_full(
    tmp_path: Path, version: int, compression: Compression, given_rows: int
) -> None:
    spec = TensorSpec(("a", "w"), (5, 40), np.dtype(np.float32))
    blocks = (((slice(row, row + 1), slice(0, 40)), np.ones((1, 40), np.float32)) for row in range(given_rows))
    with pytest.raises(CorruptCheckpoint, match=r"not given in full: .* :: a/w \(expected 800 bytes") as raised:
        OrbaxSink(tmp_path, None, version, compression).write([spec], [LeafData(spec, (2, 40), blocks)], [])
    assert raised.value.found == 160 * given_rows
    assert not (tmp_path / "manifest.ocdbt").exists()


@WRITTEN
def test_a_sink_refuses_values_of_another_dtype(tmp_path: Path, version: int, compression: Compression) -> None:
    spec = TensorSpec(("a", "w"), (5,), np.dtype(np.float32))
    for other in (np.float64, np.int32):
        leaf = LeafData(spec, (5,), iter([((slice(0, 5),), np.ones(5, other))]))
        with pytest.raises(CorruptCheckpoint, match=r"another dtype: .*a/w \(expected float32"):
            OrbaxSink(tmp_path / np.dtype(other).name, None, version, compression).write([spec], [leaf], [])
        assert not list(tmp_path.rglob("manifest.ocdbt"))


@pytest.mark.skipif(not hasattr(ml_dtypes, "float8_e8m0fnu"), reason="an older ml_dtypes")
def test_a_sink_refuses_what_zarr_has_no_dtype_for(tmp_path: Path) -> None:
    spec = TensorSpec(("w",), (2,), np.dtype(ml_dtypes.float8_e8m0fnu))
    leaf = LeafData(spec, (2,), iter([((slice(0, 2),), np.ones(2, spec.dtype))]))
    with pytest.raises(UnsupportedCheckpoint, match=r"Orbax cannot keep: .* :: w .*float8_e8m0fnu"):
        OrbaxSink(tmp_path, None, 2).write([spec], [leaf], [])


@pytest.mark.parametrize("zarr3", [True, False])
def test_stored_chunks_are_copied_as_they_are(tmp_path: Path, zarr3: bool) -> None:
    values = np.random.default_rng(0).normal(size=(9, 50)).astype(np.float32)
    save_item(tmp_path / "in", {"w": values, "s": np.float32(3)}, zarr3=zarr3, chunk_bytes=400)
    source = open_checkpoint(tmp_path / "in").source
    index = source.index()
    leaves = []
    for path, spec in index.tensors.items():
        stored = source.stored(path)
        assert isinstance(stored, Stored)
        leaves.append(LeafData(spec, spec.shape, stored))
    sink = OrbaxSink(tmp_path / "out", None, 3 if zarr3 else 2)
    assert {leaf.data.encoding for leaf in leaves if isinstance(leaf.data, Stored)} == sink.encodings
    sink.write(list(index.tensors.values()), leaves, index.constants)
    copied = open_checkpoint(tmp_path / "out").source
    for path in index.tensors:
        before, after = source.stored(path), copied.stored(path)
        assert before is not None and after is not None
        assert gathered(before) == gathered(after)
    assert restore(tmp_path / "out")["w"].tobytes() == values.tobytes()


def gathered(stored: Stored) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for name, piece in stored.values:
        found[name] = found.get(name, b"") + bytes(piece)
    return found
