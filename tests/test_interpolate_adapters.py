"""Interpolation between a base and adapters beside it: in weight space, whatever the adapter changes (peft's rescaling is not)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.command import run
from tests.interpolation import llama_tensors, read_model, same_bits, write_model
from tests.trees import BFLOAT16

PREFIX = "base_model.model."
Q, UP = "model.layers.1.self_attn.q_proj", "model.layers.0.mlp.up_proj"
RANK, ALPHA = 2, 6


def write_adapter(directory: Path, tensors: dict[str, np.ndarray], **config: Any) -> Path:
    directory.mkdir()
    save_file({PREFIX + name: values for name, values in tensors.items()}, directory / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": ["q_proj", "up_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps(settings | config))
    return directory


def low_rank(rng: np.random.Generator, module: str, out: int, inputs: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Factors, and their delta in float64."""
    a, b = rng.normal(0, 0.4, (RANK, inputs)).astype(np.float32), rng.normal(0, 0.4, (out, RANK)).astype(np.float32)
    delta = ALPHA / RANK * b.astype(np.float64) @ a.astype(np.float64)
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}, delta


@pytest.mark.parametrize("dtype", [np.float32, BFLOAT16])
@pytest.mark.parametrize("dora", [False, True])
def test_everything_that_an_adapter_changes(dora: bool, dtype: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start = llama_tensors(rng, dtype=dtype)
    base = write_model(tmp_path / "base", start, vocab_size=20)
    factors, ideal = {}, {}
    for module, out in ((Q, 8), (UP, 12)):
        found, delta = low_rank(rng, module, out, 8)
        factors |= found
        kernel = start[f"{module}.weight"].astype(np.float64)
        end = kernel + delta
        if dora:
            magnitude = rng.uniform(1, 3, out).astype(np.float32)
            factors[f"{module}.lora_magnitude_vector"] = magnitude
            end *= (magnitude / np.sqrt(np.square(end).sum(axis=1)))[:, None]
        ideal[f"{module}.weight"] = end
    saved = rng.normal(0, 0.3, (20, 8)).astype(np.float32)
    factors["lm_head.weight"] = saved
    ideal["lm_head.weight"] = saved.astype(np.float64)
    adapter = write_adapter(tmp_path / "adapter", factors, use_dora=dora, modules_to_save=["lm_head"])

    swept = run("interpolate", base, "--adapter", adapter, "-o", tmp_path / "s", "--alpha", "0:1:0.5", "--alpha", 0.3)
    assert swept.code == 0, swept.stderr
    merged = run("merge", base, "--adapter", adapter, "-o", tmp_path / "m")
    assert merged.code == 0, merged.stderr
    end_of_line = read_model(tmp_path / "m")
    step = 2.0**-9 if dtype == BFLOAT16 else 2.0**-22
    for name in ("0", "0.3", "0.5", "1"):
        found, alpha = read_model(tmp_path / "s" / f"alpha-{name}"), float(name)
        assert found.keys() == start.keys()
        for key, values in found.items():
            if key not in ideal or alpha == 0:
                assert same_bits(values, start[key]), key
            elif alpha == 1:
                assert same_bits(values, end_of_line[key]), key
            else:
                one, other = start[key].astype(np.float64), ideal[key]
                exact = (1 - alpha) * one + alpha * other
                assert np.all(np.abs(values.astype(np.float64) - exact) <= step * 4 * (np.abs(one) + np.abs(other)))


def test_a_new_head_is_the_adapters_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = write_model(tmp_path / "base", llama_tensors(rng), vocab_size=20)
    factors, _ = low_rank(rng, Q, 8, 8)
    head = rng.normal(0, 1, (3, 8)).astype(np.float32)
    adapter = write_adapter(
        tmp_path / "a", factors | {"score.weight": head}, modules_to_save=["score"], task_type="SEQ_CLS"
    )
    done = run("interpolate", base, "--adapter", adapter, "-o", tmp_path / "o", "--alpha", 0.5, "--json")
    assert done.code == 0, done.stderr
    assert same_bits(read_model(tmp_path / "o")["score.weight"], head)
    assert done.json["not_interpolated"] == ["score.weight"]


def test_a_tensor_of_another_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start = llama_tensors(rng)
    base = write_model(tmp_path / "base", start, vocab_size=20)
    grown = {
        f"{name}.weight": rng.normal(0, 1, (22, 8)).astype(np.float32) for name in ("model.embed_tokens", "lm_head")
    }
    factors, _ = low_rank(rng, Q, 8, 8)
    adapter = write_adapter(tmp_path / "a", factors | grown, modules_to_save=["embed_tokens", "lm_head"])
    flags = ("interpolate", base, "--adapter", adapter, "--alpha", 0.5, "-o")
    refused = run(*flags, tmp_path / "o")
    assert refused.code == 4 and "--only-common" in refused.error and "lm_head.weight" in refused.error
    assert run(*flags, tmp_path / "t", "--only-common", "tuned").code == 0
    assert run(*flags, tmp_path / "b", "--only-common", "base").code == 0
    assert same_bits(read_model(tmp_path / "t")["lm_head.weight"], grown["lm_head.weight"])
    assert same_bits(read_model(tmp_path / "b")["lm_head.weight"], start["lm_head.weight"])
    sizes = [json.loads((tmp_path / side / "config.json").read_text())["vocab_size"] for side in "tb"]
    assert sizes == [22, 20]


def test_weights_and_alphas_multiply(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    start = llama_tensors(rng)
    base = write_model(tmp_path / "base", start)
    factors, delta = low_rank(rng, Q, 8, 8)
    adapter = write_adapter(tmp_path / "a", factors)
    done = run("interpolate", base, "--adapter", f"{adapter}@0.5", "-o", tmp_path / "o", "--alpha", 0.5, "--scale", 2)
    assert done.code == 0, done.stderr
    key = f"{Q}.weight"
    assert np.allclose(read_model(tmp_path / "o")[key], start[key] + 0.5 * delta, rtol=1e-5, atol=1e-6)


def test_a_merged_adapter_is_not_interpolated_in_again(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    base = write_model(tmp_path / "base", llama_tensors(rng))
    adapter = write_adapter(tmp_path / "a", low_rank(rng, Q, 8, 8)[0])
    assert run("interpolate", base, "--adapter", adapter, "-o", tmp_path / "o", "--alpha", 0.5).code == 0
    again = run("interpolate", tmp_path / "o", "--adapter", adapter, "-o", tmp_path / "p", "--alpha", 0.5)
    assert again.code == 4 and "already merged" in again.error
