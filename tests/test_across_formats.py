"""One merge, every format: no key path is lost, no bit differs, and outputs that are files appear as files do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from lora_merge_cli import open_checkpoint
from lora_merge_cli.records import full_region
from tests.checkpoints import save_step
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
