"""What mergekit makes of tiny seeded tensors.

Run once, with mergekit 0.1.5 and torch installed: it writes ``results.npz`` beside this file.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mergekit.merge_methods import registry
from mergekit.merge_methods.base import TensorGroup
from mergekit.merge_methods.karcher import karcher_merge_tensors

SEED = 20260507
SHAPE = (23, 17)
WEIGHTS = {"plus": (0.75, 0.5, 1.25), "mixed": (0.75, -0.5, 1.25), "ones": (1.0, 1.0, 1.0)}


def tensors() -> dict[str, torch.Tensor]:
    """A base, and three fine-tunes that are neither close nor alike."""
    rng = np.random.default_rng(SEED)
    found = {name: rng.standard_normal(SHAPE).astype(np.float32) for name in ("base", "t1", "t2", "t3")}
    for number, size in ((1, 0.5), (2, 0.3), (3, 0.8)):
        found[f"t{number}"] = found["base"] + np.float32(size) * found[f"t{number}"]
    return {name: torch.from_numpy(values) for name, values in found.items()}


def merged(method: str, group: TensorGroup, **parameters: Any) -> torch.Tensor:
    """What a registered method makes of one tensor, with its own defaults."""
    return registry.get(method)([group], parameters=parameters)[0]


def main() -> None:
    """Write the inputs and the results."""
    given = tensors()
    tuned = [given[f"t{number}"] for number in (1, 2, 3)]
    group = TensorGroup.from_tensors([given["base"], *tuned], base_index=0)
    results = {f"in/{name}": values for name, values in given.items()}
    alone = TensorGroup.from_tensors(tuned)
    for name, weights in WEIGHTS.items():
        by_id = dict(zip((1, 2, 3), weights, strict=True))
        results[f"task-arithmetic/{name}"] = merged("task_arithmetic", group, weight=by_id)
        for density in (0.3, 1.0):
            results[f"ties-{density}/{name}"] = merged(
                "ties", group, weight=by_id, density=dict.fromkeys(by_id, density)
            )
    results["model-stock"] = merged("model_stock", group)
    # Weights that sum to 1: mergekit divides by their sum.
    results["linear"] = merged("linear", alone, weight={0: 0.25, 1: 0.25, 2: 0.5})
    for t in (0.0, 0.25, 1.0):
        results[f"slerp/{t}"] = merged("slerp", TensorGroup.from_tensors(tuned[:2], base_index=0), t=t)
    results["karcher/equal"] = merged("karcher", alone)
    results["karcher/weighted"] = karcher_merge_tensors(tuned, [0.2, 0.3, 0.5])
    arrays = {name: values.numpy() for name, values in results.items()}
    np.savez_compressed(
        Path(__file__).with_name("results.npz"), **arrays, mergekit=version("mergekit"), torch=torch.__version__
    )


if __name__ == "__main__":
    main()
