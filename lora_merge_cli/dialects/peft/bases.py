"""What can be wrong with the checkpoint under an adapter, whatever the adapter is."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.keys import is_peft_name
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.records import first_names

_QUANTISED = re.compile(
    r".*\.(?:qweight|qzeros|g_idx|absmax|nested_absmax|quant_map|nested_quant_map|quant_state\.[^.]+|SCB|weight_packed)"
)
_SCALED = re.compile(r"(?P<weight>.*\.?weight)_scale(?:_inv)?")
_NAMELESS = frozenset(
    [
        "base",
        "checkpoint",
        "ckpt",
        "download",
        "merged",
        "model",
        "models",
        "original",
        "output",
        "pretrained",
        "result",
        "tmp",
        "weights",
    ]
)
_TUNED = frozenset({"instruct", "chat", "it"})
_SIZE = re.compile(r"\d+(?:\.\d+)?[bm]")
_HASH = re.compile(r"[0-9a-f]{16,}")


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
    """A warning when the base is called by a name that clearly is not the one that the adapter gives it."""
    theirs = _words(named)
    given = [(base.config or {}).get("_name_or_path"), _repository(base.where)]
    ours = [(name, words) for name in given if isinstance(name, str) and (words := _words(name))]
    if not theirs or not ours or any(_alike(theirs, words) for _, words in ours):
        return None
    return f"the adapter names another base: {named}; this one is called {ours[0][0]}"


def _quantisation(base: Tree) -> str | None:
    config = base.config or {}
    sections = [config, *(value for value in config.values() if isinstance(value, Mapping))]
    for section in sections:
        for name in ("quantization_config", "compression_config"):
            found = section.get(name)
            if isinstance(found, Mapping) and found:
                return f"{name} {str(found.get('quant_method', 'without a method'))[:80]}"
    names = {dotted(path): spec for path, spec in base.index.tensors.items()}
    for name in names:
        scaled = _SCALED.fullmatch(name)
        weight = None if scaled is None else names.get(scaled["weight"])
        if weight is not None and (weight.dtype.itemsize == 1 or not is_float(weight.dtype)):
            return name
        blocks = name.endswith("_blocks") and f"{name.removesuffix('_blocks')}_scales" in names
        if blocks or _QUANTISED.fullmatch(name):
            return name
    return None


def _repository(where: str) -> str:
    """The name of the directory; in a download cache, that of the repository."""
    path = Path(where)
    cached = next((part for part in path.parts if part.startswith("models--")), None)
    return cached.rsplit("--", maxsplit=1)[-1] if cached is not None else path.name


def _words(name: str | None) -> frozenset[str]:
    """The words of a model's name; none if it is no name that tells models apart."""
    last = (name or "").replace("\\", "/").rstrip("/").rsplit("/", maxsplit=1)[-1].lower()
    last = last.removesuffix(".safetensors").removesuffix(".pth").removesuffix(".bin")
    words = frozenset(word for word in re.split(r"[-_. ]+(?!\d+[bm]\b)|[-_ ]+", last) if word)
    named = any(len(word) > 2 and word.isalpha() and word not in _NAMELESS for word in words)
    return words if (named or any(map(_SIZE.fullmatch, words))) and not _HASH.fullmatch(last) else frozenset()


def _alike(one: frozenset[str], other: frozenset[str]) -> bool:
    sizes = [{word for word in words if _SIZE.fullmatch(word)} for words in (one, other)]
    if sizes[0] and sizes[1] and not sizes[0] & sizes[1]:
        return False
    if bool(one & _TUNED) != bool(other & _TUNED):
        return False
    letters = ["".join(sorted(words)) for words in (one, other)]
    stems = [{re.sub(r"[\d.]+", "", word) for word in words} - {"", "b", "m", "v", "hf"} for words in (one, other)]
    return bool(stems[0] & stems[1]) or letters[0] == letters[1]
