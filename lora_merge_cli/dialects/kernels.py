"""Which leaves of a dense checkpoint are kernels that a low-rank delta may be added to, and how their dims multiply.

Of OpenPI's trees the modules of the language model and of the vision tower are known by name, the heads are batch dims or not as
their einsums have them; elsewhere in such a tree a kernel is (in, out). Of torch's a linear layer's weight is (out, in), that of
Transformers' ``Conv1D`` (in, out). What is neither, such as embeddings, norms, convolutions, has no equation here.

Source: Physical-Intelligence/openpi, ``src/openpi/models/gemma.py`` and ``siglip.py``; huggingface/transformers,
``pytorch_utils.py``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lora_merge_cli.dialects.interface import Dialect
from lora_merge_cli.dialects.torch_model import LINEAR, LINEAR_FORWARD
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.equation import Equation
from lora_merge_cli.records import Forward, TensorSpec, display

_QKV = Forward("bsd,ckdh->cbskh", "bsd,ckdr->cbskr", "cbskr,ckrh->cbskh")
_DENSE = Forward("bti,io->bto", "bti,ir->btr", "btr,ro->bto")
_OUT_OF_HEADS = Forward("btnh,nhd->btd", "btnh,nhr->btr", "btr,rd->btd")

_TREE: tuple[tuple[str, str, Forward], ...] = (
    (r"q_einsum(?:_1)?/w", "ndr,nrh->ndh", Forward("btd,ndh->btnh", "btd,ndr->btnr", "btnr,nrh->btnh")),
    (r"q?kv_einsum(?:_1)?/w", "ckdr,ckrh->ckdh", _QKV),
    (r"attn_vec_einsum(?:_1)?/w", "nhr,rd->nhd", _OUT_OF_HEADS),
    (r"mlp(?:_1)?/gating_einsum", "gdr,grf->gdf", Forward("btd,gdf->gbtf", "btd,gdr->gbtr", "gbtr,grf->gbtf")),
    (r"mlp(?:_1)?/linear", "fr,rd->fd", Forward("btf,fd->btd", "btf,fr->btr", "btr,rd->btd")),
    (r"(?:query|key|value)/kernel", "dr,rnh->dnh", Forward("btd,dnh->btnh", "btd,dr->btr", "btr,rnh->btnh")),
    (r"out/kernel", "nhr,rd->nhd", _OUT_OF_HEADS),
    (r"Dense_\d+/kernel", "ir,ro->io", _DENSE),
)
"""Ends of names in OpenPI's trees, with the equation and the einsums of one layer. One more axis in front: layers are stacked."""

_TREE_PATTERNS = tuple((re.compile(rf"(?:.+/)?{name}"), text, forward) for name, text, forward in _TREE)

_NOT_LINEAR = frozenset({"embeddings", "normalisation"})
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

CONV1D = "ri,or->io"
CONV1D_FORWARD = Forward("bti,io->bto", "bti,ri->btr", "btr,or->bto")


@dataclass(frozen=True)
class Kernel:
    """How a kernel's dims multiply."""

    equation: Equation
    """From the dims of the factors to the kernel's. Batch dims come first in the kernel, then all inputs, then all outputs, or the
    other way round."""
    forward: Forward
    """What one layer computes."""


def tree_kernel(dialect: Dialect, spec: TensorSpec) -> Kernel | None:
    """What a leaf of a JAX tree is, or None where it is no kernel that is known.

    Args:
        dialect: The conventions of the tree.
        spec: The leaf.
    """
    if not is_float(spec.dtype) or 0 in spec.shape:
        return None
    name = display(dialect.canonical(spec.path))
    for pattern, text, forward in _TREE_PATTERNS:
        if pattern.fullmatch(name) is None:
            continue
        axes = len(Equation(text).target)
        if len(spec.shape) == axes:
            return Kernel(Equation(text), forward)
        return Kernel(Equation(_stacked(text)), forward) if len(spec.shape) == axes + 1 else None
    if name.rpartition("/")[-1] == "kernel" and len(spec.shape) == 2:
        return Kernel(Equation("ir,ro->io"), _DENSE)
    return None


def torch_kernel(dialect: Dialect, spec: TensorSpec, config: Mapping[str, Any] | None) -> Kernel | None:
    """What a leaf of a torch checkpoint is, or None where it is no weight of a linear layer.

    Args:
        dialect: The conventions of the checkpoint.
        spec: The leaf.
        config: The model's configuration, if there is one.
    """
    name = dotted(spec.path)
    module = name.removesuffix(".weight")
    if not is_float(spec.dtype) or len(spec.shape) != 2 or 0 in spec.shape or module == name:
        return None
    if dialect.part(spec.path) in _NOT_LINEAR:
        return None
    if (config or {}).get("model_type") in _CONV1D_MODELS and module.rpartition(".")[-1] in _CONV1D_MODULES:
        return Kernel(Equation(CONV1D), CONV1D_FORWARD)
    return Kernel(Equation(LINEAR), LINEAR_FORWARD)


def _stacked(text: str) -> str:
    factors, target = text.split("->")
    a, b = factors.split(",")
    return f"l{a},l{b}->l{target}"
