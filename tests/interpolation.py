"""A base, fine-tunes of it, and what lies between them in float64: the oracle of the interpolation tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.checkpoints import save_step
from tests.command import Outcome, run
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, Flat, build, nest

ALPHAS = "paligemma=12,action_expert=3"
FINE_STEP = 2.0**-9
"""Added to a kernel on bfloat16's grid, it is lost when that is rounded again: what the base's float32 values differ by."""


@dataclass(frozen=True)
class Pair:
    """A fine-tune with adapters inside, beside its base."""

    base: Path
    tuned: Path
    start: Flat
    """The base's leaves by path, as stored."""
    end: Flat
    """What the fine-tune is: float64 for kernels under adapters, with the delta on the base's own values; else the leaf."""
    frozen: frozenset[tuple[Any, ...]]
    """The leaves that did not move, in the fine-tune's bytes."""
    kernels: frozenset[tuple[Any, ...]]
    """Those under adapters."""

    def between(self, alpha: float) -> dict[tuple[Any, ...], np.ndarray]:
        """``(1 - alpha) * base + alpha * tuned`` of every leaf that moved, in float64."""
        return {
            path: (1 - alpha) * self.start[path].astype(np.float64) + alpha * end.astype(np.float64)
            for path, end in self.end.items()
            if path not in self.frozen
        }

    def run(self, output: Path, *flags: object) -> Outcome:
        """Interpolate."""
        return run("interpolate", self.base, self.tuned, "-o", output, "--lora-alpha", ALPHAS, *flags)


def openpi_pair(directory: Path, *, suffix: tuple[str, ...] = ("value",), seed: int = 0) -> Pair:
    """A float32 base, and a fine-tune of it: LoRA on both experts, the rest of the language model frozen in bfloat16, and the
    vision tower and the projections trained in full."""
    tree = build(PALIGEMMA, ACTION, seed=seed)
    rng = np.random.default_rng(seed + 1)
    start, end, frozen = {}, {}, set()
    for path, expected in tree.expected.items():
        leaf = tree.leaves[path]
        if leaf.dtype == BFLOAT16:
            # Within half a step of bfloat16, so that the fine-tune's kernel is the base's, rounded.
            wide = leaf.astype(np.float32)
            start[path] = (wide * (1 + rng.uniform(-1, 1, leaf.shape) * FINE_STEP * 0.9)).astype(np.float32)
            if path in tree.changed:
                end[path] = start[path].astype(np.float64) + (expected - leaf.astype(np.float64))
            else:
                end[path] = leaf
                frozen.add(path)
            assert np.array_equal(start[path].astype(BFLOAT16), leaf)
        else:
            start[path] = (leaf - rng.normal(0, 0.05, leaf.shape)).astype(np.float32)
            end[path] = leaf
    base = save_step(directory / "base" / "0", nest(start, suffix=()))
    tuned = save_step(directory / "run" / "7", nest(tree.leaves, suffix=suffix))
    return Pair(base, tuned, start, end, frozenset(frozen), frozenset(tree.changed))


def write_model(directory: Path, tensors: Mapping[str, np.ndarray], **config: Any) -> Path:
    """A directory of safetensors as models are published."""
    directory.mkdir(parents=True)
    save_file(dict(tensors), directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": False, **config}))
    return directory


def read_model(directory: Path) -> dict[str, np.ndarray]:
    """What a directory of safetensors holds."""
    return load_file(directory / "model.safetensors")


def llama_tensors(rng: np.random.Generator, *, layers: int = 3, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Names and shapes of a narrow Llama."""
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (20, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (20, 8),
    }
    for layer in range(layers):
        block = f"model.layers.{layer}"
        shapes |= {f"{block}.self_attn.{name}_proj.weight": (8, 8) for name in "qkvo"}
        shapes |= {f"{block}.mlp.up_proj.weight": (12, 8), f"{block}.input_layernorm.weight": (8,)}
    return {name: rng.normal(0, 0.3, shape).astype(dtype) for name, shape in shapes.items()}


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    """Equal dtype, shape and bytes."""
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
