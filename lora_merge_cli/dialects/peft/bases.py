"""What can be wrong with the checkpoint under an adapter, whatever the adapter is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import numpy as np

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.keys import is_peft_name
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.records import TensorSpec, first_names

_QUANTISED = re.compile(
    r".*\.(?:qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.[^.]+|SCB|weight_packed)"
)
# Directories that are called so could hold any model.
_NAMELESS = re.compile(
    r"base|best|cache|checkpoints?|ckpts?|data|dir(?:ectory)?|downloads?|dpo|epoch|exp(?:eriment)?|final|finetuned?|global|iter|last|latest|llm|lora"
    r"|main|merged|models?|new|old|original|out(?:puts?)?|peft|pretrained|pytorch|results?|root|run|safetensors|saved|sft|snapshot"
    r"|step|temp|test|tmp|train(?:ed|ing)?|tuned|weights"
)
# What a name says about the files, and not about the values that they were made from.
_MADE_OF = frozenset({"4bit", "8bit", "awq", "bf16", "bnb", "fp16", "fp32", "fp8", "gptq", "hf", "meta", "unsloth"})
_HASH = re.compile(r"[0-9a-f]{16,}")
_FILE = re.compile(r"\.(?:safetensors|pth|pt|bin|ckpt|gguf)$")
_SEPARATOR = re.compile(r"[-_ +]+|\.(?!\d+[bm](?![a-z]))")


def base_problems(base: Tree) -> Iterator[Exception]:
    """Why nothing can be merged into a checkpoint."""
    method = _quantisation(base)
    if method is not None:
        yield UnsupportedCheckpoint(
            "the base is quantised",
            where=base.where,
            expected="weights in 16 or 32 bits",
            found=method,
            hint="merge into the checkpoint that it was quantised from, and quantise the result",
        )
    inside = [name for name in map(dotted, base.index.tensors) if is_peft_name(name)]
    if inside:
        yield UnmatchedAdapter(
            "the base holds keys of an adapter itself",
            where=f"{base.where} :: {first_names(inside, 3)}",
            hint="give the model that the adapter was trained on, without adapters",
        )


def wrong_base(named: str | None, base: Tree) -> str | None:
    """A warning when the base is called otherwise than the adapter calls it.

    Owners, upper case, separators, and words for the kind of files are no difference; neither are names that any model could have.

    Args:
        named: What the adapter's configuration calls its base: a repository or a directory.
        base: The checkpoint, which its directory and its configuration name.
    """
    theirs = _model_name(named)
    given = [(base.config or {}).get("_name_or_path"), base.where]
    ours = {name: word for name in given if isinstance(name, str) and (word := _model_name(name)) is not None}
    if theirs is None or not ours or theirs in ours.values():
        return None
    shown = next(iter(ours))
    return (
        f"the adapter names another base: {named}; this one is called {_last(shown) if shown == base.where else shown}"
    )


def _quantisation(base: Tree) -> str | None:
    config = base.config or {}
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    for section in sections:
        for name in ("quantization_config", "compression_config"):
            found = section.get(name)
            if isinstance(found, Mapping) and found:
                return f"{name} {str(found.get('quant_method', 'without a method'))[:80]}"
    names = {dotted(path): spec for path, spec in base.index.tensors.items()}
    small = {name for name, spec in names.items() if _is_small(spec) and "scale" not in _leaf(name)}
    for name in names:
        if "scale" in _leaf(name) and any(weight in small for weight in _scaled_by(name)):
            return name
        blocks = name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in names
        if blocks or _QUANTISED.fullmatch(name):
            return name
    return None


def _is_small(spec: TensorSpec) -> bool:
    """Whether values need a scale to be weights: one byte each, or integers; masks are neither."""
    return spec.dtype != np.dtype(bool) and (spec.dtype.itemsize == 1 or not is_float(spec.dtype))


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].lower()


def _scaled_by(name: str) -> Iterator[str]:
    """The tensors that one may be a scale of: the weight beside it, the one that it is named after, the one that it is under."""
    module, dot, leaf = name.rpartition(".")
    yield f"{module}{dot}weight"
    yield f"{module}{dot}{leaf.partition('_scale')[0]}"
    yield module


def _last(name: str) -> str:
    """The last part of a path, or the repository's name in a path of a download cache."""
    parts = [part for part in name.replace("\\", "/").split("/") if part]
    cached = next((part for part in parts if part.startswith("models--")), None)
    if cached is not None:
        return cached.rsplit("--", maxsplit=1)[-1]
    while len(parts) > 1 and (_HASH.fullmatch(parts[-1]) or parts[-1] == "snapshots"):
        parts.pop()
    return parts[-1] if parts else ""


def _model_name(name: str | None) -> str | None:
    """A model's name as it is compared; None if it tells no models apart."""
    last = _FILE.sub("", _last(name or "").lower())
    words = [word for word in _SEPARATOR.split(last) if word and word not in _MADE_OF]
    stems = [re.sub(r"[\d.]+", "", word) for word in words]
    if _HASH.fullmatch(last) or not any(len(stem) > 2 and not _NAMELESS.fullmatch(stem) for stem in stems):
        return None
    return "".join(words)
