"""OpenPI-shaped trees with adapters, and what they must become: an oracle that knows the layers and not the merge.

Each layer is written as OpenPI's ``lora.py`` and ``gemma.py`` run it, in float64. Pushing the identity through it gives the dense
kernel that acts the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)

Flat = dict[tuple[Any, ...], np.ndarray]


@dataclass(frozen=True)
class Expert:
    """One expert's sizes and LoRA configuration."""

    suffix: str = ""
    width: int = 24
    heads: int = 4
    kv_heads: int = 1
    head_dim: int = 6
    hidden: int = 40
    attention_rank: int | None = 4
    feed_forward_rank: int | None = 3
    alpha: float = 12.0
    rslora: bool = False
    trained: bool = False

    @property
    def scale(self) -> float:
        assert self.attention_rank is not None
        rank = self.attention_rank
        return self.alpha / (math.sqrt(rank) if self.rslora else rank)


PALIGEMMA = Expert()
ACTION = Expert(suffix="_1", width=16, hidden=28, attention_rank=2, feed_forward_rank=5, alpha=3.0)


@dataclass
class Tree:
    """A checkpoint's leaves by key path (without root and suffix), and what a merge must make of them."""

    leaves: Flat = field(default_factory=dict)
    expected: Flat = field(default_factory=dict)
    """float64 for kernels under adapters; the very leaf otherwise."""
    changed: set[tuple[Any, ...]] = field(default_factory=set)

    def plain(self, path: tuple[Any, ...], values: np.ndarray) -> None:
        self.leaves[path] = self.expected[path] = values


def attention_forward(module: str, x: Any, w: Any, a: Any, b: Any, scale: float) -> Any:
    """One attention einsum with its adapter, as the layer runs it."""
    if module == "q_einsum":
        base = np.einsum("BTD,NDH->BTNH", x, w)
        return base + scale * np.einsum("BTNL,NLH->BTNH", np.einsum("BTD,NDL->BTNL", x, a), b)
    if module == "attn_vec_einsum":
        base = np.einsum("BTNH,NHD->BTD", x, w)
        return base + scale * np.einsum("BTL,NLD->BTD", np.einsum("BTNH,NHL->BTL", x, a), b)
    base = np.einsum("BSD,CKDH->CBSKH", x, w)
    down = np.einsum("BSD,CKDL->CBSKL", x, a)
    return base + scale * np.einsum("CBSKL,CKLH->CBSKH", down, b)


def gating_forward(x: Any, w: Any, a: Any, b: Any) -> list[Any]:
    """The two projections of the gated feed-forward, before the activation."""
    return [x @ w[i] + (x @ a[i]) @ b[i] for i in range(2)]


def linear_forward(x: Any, w: Any, a: Any, b: Any) -> Any:
    """The down projection of the feed-forward."""
    return x @ w + (x @ a) @ b


def dense(module: str, w: Any, a: Any, b: Any, scale: float) -> np.ndarray:
    """The kernel of one layer that acts as kernel and adapter do, by pushing the identity through the layer."""
    w, a, b = (np.asarray(v, np.float64) for v in (w, a, b))
    if module == "attn_vec_einsum":
        heads, head_dim, width = w.shape
        x = np.eye(heads * head_dim).reshape(1, heads * head_dim, heads, head_dim)
        return attention_forward(module, x, w, a, b, scale)[0].reshape(heads, head_dim, width)
    if module == "gating_einsum":
        return np.stack(gating_forward(np.eye(w.shape[1]), w, a, b))
    if module == "linear":
        return linear_forward(np.eye(w.shape[0]), w, a, b)
    out = attention_forward(module, np.eye(w.shape[-2])[None], w, a, b, scale)
    if module == "q_einsum":
        return np.einsum("DNH->NDH", out[0])
    return np.einsum("CDKH->CKDH", out[:, 0])


def kernel_shapes(expert: Expert, *, qkv: bool) -> dict[str, tuple[int, ...]]:
    """The kernels of one layer's attention."""
    e = expert
    shapes: dict[str, tuple[int, ...]] = {"attn_vec_einsum": (e.heads, e.head_dim, e.width)}
    if qkv:
        shapes["qkv_einsum"] = (3, e.heads, e.width, e.head_dim)
    else:
        shapes["q_einsum"] = (e.heads, e.width, e.head_dim)
        shapes["kv_einsum"] = (2, e.kv_heads, e.width, e.head_dim)
    return shapes


def build(
    *experts: Expert,
    model: str = "pi0",
    layers: int | None = 3,
    qkv: bool = False,
    seed: int = 0,
    delta: float = 0.1,
) -> Tree:
    """A tree with adapters.

    Args:
        experts: Usually `PALIGEMMA` and `ACTION`, or variants of them.
        model: ``pi0``, ``pi0.5`` or ``pi0-FAST``.
        layers: How many layers are stacked; None for unstacked trees of one layer.
        qkv: Full multi-head attention, with one fused projection.
        seed: Of all values.
        delta: The standard deviation of the factors.
    """
    rng = np.random.default_rng(seed)
    tree = Tree()
    stack = () if layers is None else (layers,)

    def normal(*shape: int, std: float = 0.2, dtype: Any = np.float32) -> np.ndarray:
        return (rng.standard_normal(shape) * std).astype(dtype)

    def site(
        kernel: tuple[str, ...],
        factors: list[tuple[str, ...]],
        module: str,
        shape: tuple[int, ...],
        rank: int,
        scale: float,
    ) -> None:
        w = normal(*stack, *shape, dtype=BFLOAT16)
        a = normal(*stack, *shape[:-1], rank, std=delta)
        b_shape = (*shape[:-2], rank, shape[-1])
        b = normal(*stack, *b_shape, std=delta)
        for path, values in zip((kernel, *factors), (w, a, b), strict=True):
            tree.leaves[path] = values
        parts = [(w, a, b)] if layers is None else zip(w, a, b, strict=True)
        merged = [dense(module, *part, scale) for part in parts]
        tree.expected[kernel] = merged[0] if layers is None else np.stack(merged)
        tree.changed.add(kernel)

    blocks = ("PaliGemma", "llm", "layers")
    for e in experts:
        frozen = np.float32 if e.trained else BFLOAT16
        for name, shape in kernel_shapes(e, qkv=qkv).items():
            module = (*blocks, "attn", f"{name}{e.suffix}")
            if e.attention_rank is None:
                tree.plain((*module, "w"), normal(*stack, *shape, dtype=frozen))
            else:
                factors = [(*module, "lora_a"), (*module, "lora_b")]
                site((*module, "w"), factors, name, shape, e.attention_rank, e.scale)
        mlp = (*blocks, f"mlp{e.suffix}")
        for name, shape in (("gating_einsum", (2, e.width, e.hidden)), ("linear", (e.hidden, e.width))):
            if e.feed_forward_rank is None:
                tree.plain((*mlp, name), normal(*stack, *shape, dtype=frozen))
            else:
                factors = [(*mlp, f"{name}_lora_a"), (*mlp, f"{name}_lora_b")]
                site((*mlp, name), factors, name, shape, e.feed_forward_rank, 1.0)
        for norm in ("pre_attention_norm", "pre_ffw_norm"):
            tree.plain((*blocks, f"{norm}{e.suffix}", "scale"), normal(*stack, e.width, dtype=frozen))
        tree.plain(("PaliGemma", "llm", f"final_norm{e.suffix}", "scale"), normal(e.width, dtype=frozen))
    tree.plain(("PaliGemma", "llm", "embedder", "input_embedding"), normal(50, experts[0].width, dtype=BFLOAT16))
    image = ("PaliGemma", "img")
    attention = (*image, "Transformer", "encoderblock", "MultiHeadDotProductAttention_0", "value")
    tree.plain((*attention, "kernel"), normal(2, 8, 2, 4))
    tree.plain((*attention, "bias"), normal(2, 2, 4))
    tree.plain((*image, "pos_embedding"), normal(1, 9, 8))
    width = experts[-1].width
    if model != "pi0-FAST":
        time_in = "time_mlp_in" if model == "pi0.5" else "action_time_mlp_in"
        names = ["action_in_proj", "action_out_proj", time_in] + (["state_proj"] if model == "pi0" else [])
        for name in names:
            tree.plain((name, "kernel"), normal(7, width))
            tree.plain((name, "bias"), normal(width))
    return tree


def nest(leaves: Flat, *, root: tuple[Any, ...] = ("params",), suffix: tuple[Any, ...] = ("value",)) -> dict[Any, Any]:
    """Flat leaves as the nested dict that Orbax saves."""
    nested: dict[Any, Any] = {}
    for path, values in leaves.items():
        *parents, last = (*root, *path, *suffix)
        node = nested
        for part in parents:
            node = node.setdefault(part, {})
        node[last] = values
    return nested


def as_base(tree: Tree, seed: int = 9) -> Flat:
    """A float32 base whose frozen leaves round to the tree's, and whose trained leaves differ."""
    rng = np.random.default_rng(seed)
    base: Flat = {}
    for path, values in tree.leaves.items():
        if any("lora" in str(part) for part in path):
            continue
        if values.dtype != BFLOAT16:
            base[path] = (values + rng.standard_normal(values.shape) * 0.1).astype(np.float32)
            continue
        wide = values.astype(np.float32)
        nudged = wide * (1 + rng.uniform(-0.001, 0.001, values.shape).astype(np.float32))
        base[path] = np.where(nudged.astype(BFLOAT16) == values, nudged, wide)
    return base
