"""A checkpoint with adapters on disk, merges of it, and what the judge says of them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from tests.checkpoints import save_step
from tests.command import Outcome, run
from tests.trees import Flat, Tree, nest

ALPHAS = ("--lora-alpha", "paligemma=12,action_expert=3")
LAYERS = ("PaliGemma", "llm", "layers")
Q, OUT = (*LAYERS, "attn", "q_einsum", "w"), (*LAYERS, "attn", "attn_vec_einsum", "w")
LINEAR, GATING = (*LAYERS, "mlp", "linear"), (*LAYERS, "mlp", "gating_einsum")
VISION = ("PaliGemma", "img", "pos_embedding")


def checks_of(outcome: Outcome) -> dict[str, str]:
    """The status of each check."""
    return {check["id"]: check["status"] for check in outcome.json["checks"]}


def failed(outcome: Outcome) -> set[str]:
    assert outcome.code == (1 if "fail" in checks_of(outcome).values() else 0), outcome.stderr
    return {name for name, status in checks_of(outcome).items() if status == "fail"}


def message(outcome: Outcome, check: str) -> str:
    return next(found["message"] for found in outcome.json["checks"] if found["id"] == check)


def merged_leaves(tree: Tree, dtype: Any = np.float32) -> Flat:
    """The right merge in plain NumPy: the layers in float64, rounded once."""
    return {path: values.astype(dtype) if path in tree.changed else values for path, values in tree.expected.items()}


@dataclasses.dataclass
class Case:
    """A checkpoint with adapters on disk, and room for merges of it."""

    folder: Path
    tree: Tree
    flags: tuple[str, ...] = ALPHAS
    suffix: tuple[str, ...] = ("value",)

    def __post_init__(self) -> None:
        self.step = save_step(self.folder / "in" / "7", nest(self.tree.leaves, suffix=self.suffix))
        self.count = 0

    def save(self, leaves: Flat, **layout: Any) -> Path:
        self.count += 1
        return save_step(self.folder / f"out{self.count}" / "7", nest(leaves, suffix=self.suffix), **layout)

    def merge(self, *flags: object) -> Path:
        self.count += 1
        output = self.folder / f"out{self.count}" / "7"
        outcome = run("merge", self.step, "-o", output, *self.flags, *flags)
        assert outcome.code == 0, outcome.stderr
        return output

    def verify(self, merged: Path, *flags: object) -> Outcome:
        return run("verify", merged, "--against", self.step, *self.flags, "--json", *flags)
