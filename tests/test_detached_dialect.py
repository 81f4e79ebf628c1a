"""The adapter format for any tree: what it says is what is read back, and what does not fit is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from lora_merge_cli.dialects import ScaleOptions, Subject, Tree, detect_adapter_dialect
from lora_merge_cli.dialects.detached import Detached
from lora_merge_cli.dialects.detached_document import TRAINED, Document, detached_config, read_detached
from lora_merge_cli.dialects.nnx import Nnx
from lora_merge_cli.dialects.openpi import OpenPI
from lora_merge_cli.dtypes import BFLOAT16, FLOAT32
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import CorruptCheckpoint, LoraMergeError, UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.formats import open_adapter
from lora_merge_cli.inputs import tree_of
from lora_merge_cli.records import (
    AdapterSite,
    Factor,
    Forward,
    Index,
    KeyPath,
    LowRank,
    Replacement,
    Scale,
    TensorSpec,
)
from tests.checkpoints import restore_flat, save_step
from tests.command import run
from tests.interpolation import same_bits
from tests.trees import nest

FORWARD = Forward("bti,io->bto", "bti,ir->btr", "btr,ro->bto")


def site(target: KeyPath, *, scale: float = 1.5, rank: int = 2, **changes: Any) -> AdapterSite:
    said: dict[str, Any] = {
        "targets": (target,),
        "operation": "add_delta",
        "factors": {"lora_a": Factor((*target, "a")), "lora_b": Factor((*target, "b"))},
        "parameters": LowRank(rank, Scale(scale, "alpha 3 / rank", assumed=True), Equation("ir,ro->io")),
        "forward": FORWARD,
        "group": "model",
        "module": "one",
        "label": "one",
    }
    return AdapterSite(**said | changes)


def tree(document: Document, tensors: dict[KeyPath, tuple[int, ...]]) -> Tree:
    specs = {path: TensorSpec(path, shape, FLOAT32) for path, shape in tensors.items()}
    return Tree(Index(specs), "adapter", json.loads(json.dumps(detached_config(document))))


PARTS = st.lists(st.one_of(st.text(min_size=1, max_size=5), st.integers(0, 9)), min_size=1, max_size=4).map(tuple)


@given(
    st.lists(PARTS, min_size=2, max_size=6, unique_by=lambda path: OpenPI().canonical(path)),
    st.floats(-1e6, 1e6),
    st.integers(1, 4),
)
def test_what_is_written_is_read_back(paths: list[KeyPath], scale: float, rank: int) -> None:
    first, *others = paths
    at = Factor((*first, "a"), shape=(3, rank, 2), at=(1, slice(0, rank)))
    part = site(first, scale=scale, rank=rank, factors={"lora_a": at, "lora_b": Factor((*first, "b"))})
    document = Document(
        OpenPI(),
        (part,),
        tuple(Replacement(path, (*path, "whole"), TRAINED) for path in others),
        dict.fromkeys(others, BFLOAT16),
        {"path": "base", "fingerprint": "x"},
        3,
    )
    tensors = {(*first, "a"): (6 * rank,), (*first, "b"): (rank, 5)} | {(*path, "whole"): (1,) for path in others}
    found = read_detached(tree(document, tensors))
    assert isinstance(found.model, OpenPI)
    assert (found.sites, found.replacements, found.dtypes) == (document.sites, document.replacements, document.dtypes)
    assert (found.base, found.left_out) == (document.base, 3)


def written(directory: Path, change: Callable[[dict[str, Any]], Any] = lambda config: None) -> Path:
    """An adapter on one kernel of a tree, with one leaf whole and one that the base does not have."""
    rng = np.random.default_rng(0)
    kernel, bias, new = ("params", "one", "kernel"), ("params", "two", "bias"), ("params", "three", "bias")
    document = Document(
        Nnx(),
        (site(kernel),),
        (Replacement(bias, bias, TRAINED), Replacement(new, new, TRAINED)),
        {("params", "two", "kernel"): BFLOAT16},
    )
    config = detached_config(document)
    change(config)
    directory.mkdir(parents=True)
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {
        (*kernel, "a"): rng.normal(0, 1, (6, 2)),
        (*kernel, "b"): rng.normal(0, 1, (2, 5)),
        bias: rng.normal(0, 1, 5),
        new: rng.normal(0, 1, 3),
    }
    named = {"/".join(path): values.astype(np.float32) for path, values in tensors.items()}
    paths = json.dumps({"/".join(path): {"path": list(path)} for path in tensors})
    save_file(named, directory / "adapter_model.safetensors", metadata={"lora_merge.key_paths": paths})
    return directory


def base_tree(directory: Path, suffix: tuple[str, ...] = ()) -> tuple[Path, dict[tuple[str, ...], np.ndarray]]:
    rng = np.random.default_rng(1)
    shapes = {("one", "kernel"): (6, 5), ("two", "bias"): (5,), ("two", "kernel"): (5, 4)}
    leaves = {path: rng.normal(0, 1, shape).astype(np.float32) for path, shape in shapes.items()}
    return save_step(directory / "base" / "1", nest(leaves, suffix=suffix), assets=False), leaves


@pytest.mark.parametrize("suffix", [(), ("value",)])
def test_a_base_that_is_spelled_otherwise(suffix: tuple[str, ...], tmp_path: Path) -> None:
    base, start = base_tree(tmp_path, suffix)
    adapter = written(tmp_path / "a")
    done = run("merge", base, "--adapter", adapter, "-o", tmp_path / "m")
    assert done.code == 0, done.stderr
    got = restore_flat(tmp_path / "m" / "params")
    stored = {
        key.removeprefix("params/"): values for key, values in load_file(adapter / "adapter_model.safetensors").items()
    }
    delta = 1.5 * stored["one/kernel/a"].astype(np.float64) @ stored["one/kernel/b"].astype(np.float64)
    assert np.allclose(got["one", "kernel"], start["one", "kernel"] + delta, rtol=1e-6, atol=1e-6)
    assert same_bits(got["two", "bias"], stored["two/bias"]) and same_bits(got["three", "bias"], stored["three/bias"])
    assert same_bits(got["two", "kernel"], start["two", "kernel"].astype(BFLOAT16))
    assert got.keys() == {*start, ("three", "bias")}


def test_two_adapters_that_keep_a_leaf_in_two_dtypes_leave_it_as_it_is(tmp_path: Path) -> None:
    base, start = base_tree(tmp_path)

    def other(config: dict[str, Any]) -> None:
        config["dtypes"][0]["dtype"] = "float16"

    flags = ["--exclude", "two/bias", "--exclude", "three/bias"]
    one, two = written(tmp_path / "a"), written(tmp_path / "b", other)
    for config in (one, two):
        document = json.loads((config / "adapter_config.json").read_text())
        keep = document["replacements"][: 0 if config == two else 2]
        (config / "adapter_config.json").write_text(json.dumps(document | {"replacements": keep}))
    names = ("params/one/kernel/a", "params/one/kernel/b")
    tensors = {key: values for key, values in load_file(two / "adapter_model.safetensors").items() if key in names}
    paths = json.dumps({key: {"path": key.split("/")} for key in tensors})
    save_file(tensors, two / "adapter_model.safetensors", metadata={"lora_merge.key_paths": paths})
    done = run("merge", base, "--adapter", one, "--adapter", two, *flags, "-o", tmp_path / "m")
    assert done.code == 0, done.stderr
    assert same_bits(restore_flat(tmp_path / "m" / "params")["two", "kernel"], start["two", "kernel"])


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(config: Any) -> None:
        for key in keys[:-1]:
            config = config[key]
        config[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (_set("version", value=2), UnsupportedCheckpoint, "another version"),
        (_set("dialect", value="other"), UnsupportedCheckpoint, "does not know"),
        (_set("sites", 0, "operation", value="twist"), UnsupportedCheckpoint, "does not know"),
        (_set("sites", value=None), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "target", value="one/kernel"), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "target", value=[]), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "scale", "value", value=None), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "scale", "value", value=float("nan")), CorruptCheckpoint, None),
        (_set("sites", 0, "equation", value="ir,ro->ir"), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "equation", value="nonsense"), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "equation", value="ixr,ro->io"), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "forward", "base", value="nonsense"), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "forward", "down", value="bti,xr->btr"), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "forward", "up", value="btr,or->bt"), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "factors", value={}), CorruptCheckpoint, "did not write"),
        (_set("sites", 0, "factors", "lora_a", "key", value=["gone"]), CorruptCheckpoint, "not there"),
        (_set("dtypes", 0, "dtype", value="float7"), CorruptCheckpoint, "did not write"),
        (_set("replacements", value=[]), UnmatchedAdapter, "does not name"),
        (_set("replacements", 0, "target", value=["params", "one", "kernel"]), UnmatchedAdapter, "two parts"),
    ],
)
def test_what_lora_merge_did_not_write_is_refused(
    change: Callable[[dict[str, Any]], None], error: type[LoraMergeError], words: str | None, tmp_path: Path
) -> None:
    adapter = written(tmp_path / "a", change)
    with pytest.raises(error, match=words):
        read_detached(tree_of(open_adapter(adapter)))
    base, _ = base_tree(tmp_path)
    done = run("merge", base, "--adapter", adapter, "-o", tmp_path / "m")
    assert done.code == error.exit_code and not (tmp_path / "m").exists()


def test_what_does_not_fit_the_base_is_refused(tmp_path: Path) -> None:
    adapter = tree_of(open_adapter(written(tmp_path / "a")))
    dialect = detect_adapter_dialect(adapter)
    assert isinstance(dialect, Detached)

    def problems(shape: tuple[int, ...], dtype: Any = FLOAT32, path: KeyPath = ("one", "kernel")) -> str:
        base = Tree(Index({path: TensorSpec(path, shape, np.dtype(dtype))}), "base")
        return "; ".join(map(str, dialect.survey(Subject(base, adapter), ScaleOptions()).problems))

    assert not problems((6, 5))
    assert "do not fit" in problems((5, 6))
    assert "not floating-point" in problems((6, 5), np.int8)
    assert "without a kernel in the base: adapter" not in problems((6, 5))
    assert "without a kernel" in problems((6, 5), path=("other", "kernel"))


def test_flags_for_scales_are_refused_and_an_adapter_describes_itself(tmp_path: Path) -> None:
    base, _ = base_tree(tmp_path)
    adapter = written(tmp_path / "a")
    refused = run("merge", base, "--adapter", adapter, "-o", tmp_path / "m", "--lora-alpha", 4)
    assert refused.code == 2 and "--lora-alpha" in refused.error
    shown = run("inspect", adapter)
    assert shown.code == 0 and "one" in shown.stdout and TRAINED in shown.stdout
    both = run("inspect", base, "--adapter", adapter, "--json")
    assert both.code == 0, both.stderr
