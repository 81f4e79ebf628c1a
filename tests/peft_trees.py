"""Hand-made PEFT adapters and bases: names and shapes, without values."""

from __future__ import annotations

from typing import Any

import numpy as np

from lora_merge_cli.dialects.interface import ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.peft import Peft
from lora_merge_cli.records import AdapterSite, Array, Index, Survey, TensorSpec

PREFIX = "base_model.model."
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 6}

Shapes = dict[str, tuple[int, ...]]

Q = "model.layers.0.self_attn.q_proj"
LLAMA: Shapes = {
    "model.embed_tokens.weight": (12, 4),
    f"{Q}.weight": (6, 4),
    "model.layers.0.self_attn.o_proj.weight": (4, 4),
    "model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.layers.0.mlp.up_proj.bias": (8,),
    "model.norm.weight": (4,),
    "lm_head.weight": (12, 4),
}
TIED = {name: shape for name, shape in LLAMA.items() if name != "lm_head.weight"}
UNTIED_CONFIG = {"model_type": "llama", "tie_word_embeddings": False, "vocab_size": 12}
TIED_CONFIG = UNTIED_CONFIG | {"tie_word_embeddings": True}


def tree(
    shapes: Shapes, config: dict[str, Any] | None = None, where: str = "somewhere", dtype: Any = np.float32
) -> Tree:
    specs = {(name,): TensorSpec((name,), shape, np.dtype(dtype)) for name, shape in shapes.items()}
    return Tree(Index(specs), where, config)


def linear(module: str, out: int, inputs: int, rank: int = 2) -> Shapes:
    return {
        f"{PREFIX}{module}.lora_A.weight": (rank, inputs),
        f"{PREFIX}{module}.lora_B.weight": (out, rank),
    }


def embedding(module: str, rows: int, width: int, rank: int = 2) -> Shapes:
    return {
        f"{PREFIX}{module}.lora_embedding_A": (rank, rows),
        f"{PREFIX}{module}.lora_embedding_B": (width, rank),
    }


QUERY = linear(Q, 6, 4)
EMBED = embedding("model.embed_tokens", 12, 4)
HEAD = linear("lm_head", 12, 4)


def survey(
    keys: Shapes,
    base: Shapes = LLAMA,
    config: dict[str, Any] | None = None,
    model: dict[str, Any] | None = None,
    options: ScaleOptions | None = None,
    **others: Any,
) -> Survey:
    """The survey of an adapter; `others` are fields of the configuration, and None in `config` stands for the usual one."""
    subject = Subject(
        tree(base, UNTIED_CONFIG if model is None else model, "base"),
        tree(keys, (CONFIG if config is None else config) | others, "adapter"),
    )
    return Peft().survey(subject, options or ScaleOptions())


def merged(site: AdapterSite, weight: Array, leaves: dict[str, Array]) -> Array:
    """The weight with a site's delta, in float64, by the equation alone."""
    factors = {role: factor.of(leaves[str(factor.path[0])]) for role, factor in site.factors.items()}
    scale = site.parameters.scale.value
    assert scale is not None
    delta = np.einsum(site.parameters.equation.text, factors.get("lora_a", np.ones(1)), factors["lora_b"])
    return np.asarray(weight + scale * delta)
