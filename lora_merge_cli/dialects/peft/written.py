"""Adapters as PEFT writes them: which modules must be brought whole, the keys of tensors, and ``adapter_config.json``.

PEFT adapts a module's weight, and can bring its bias with it; or it brings a module whole. It compares ends of names, so that a
module that is called as another one ends is brought with that.

Source: huggingface/peft 0.21, ``peft/tuners/lora/config.py``, ``peft/utils/other.py``,
``peft/utils/save_and_load.py`` and ``peft/tuners/tuners_utils.py`` (``_get_learnable_bias_state_dict``).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from lora_merge_cli.dialects.peft.names import is_embedding, is_head
from lora_merge_cli.dialects.peft.patterns import patterns_of
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.errors import UnsupportedCheckpoint
from lora_merge_cli.records import KeyPath

PREFIX = "base_model.model."

_STACKED = re.compile(r"(?:^|\.)experts\.\d+\.")


def factor_key(name: str, role: str) -> str:
    """The key of ``lora_a`` or ``lora_b`` of a weight of that name."""
    return f"{PREFIX}{name.removesuffix('.weight')}.{'lora_A' if role == 'lora_a' else 'lora_B'}.weight"


def whole_key(name: str) -> str:
    """The key of a tensor that is brought whole."""
    return f"{PREFIX}{name}"


def bias_key(module: str) -> str:
    """The key of the bias of a module that has factors: it belongs to the layer that PEFT wraps."""
    return f"{PREFIX}{module}.base_layer.bias"


def refuse_fused(names: Iterable[str], where: str) -> None:
    """Refuse weights of single experts: Transformers keeps them as parts of one parameter, so that no module has these names.

    Raises:
        UnsupportedCheckpoint: There is one.
    """
    found = next((name for name in names if _STACKED.search(name)), None)
    if found is not None:
        raise UnsupportedCheckpoint(
            "the weight of an expert, which PEFT does not know as a module",
            where=f"{where} :: {found}",
            hint="leave the experts out with --exclude '**/experts/**'",
        )


def whole_modules(moved: Iterable[KeyPath], tensors: Collection[KeyPath], where: str) -> list[str]:
    """The modules to bring whole, so that all tensors that moved are brought, and PEFT finds no module of theirs missing.

    Args:
        moved: The leaves that moved and are no factors.
        tensors: All leaves of the checkpoint.
        where: The checkpoint, for errors.

    Raises:
        UnsupportedCheckpoint: A leaf belongs to a module that holds other modules, or to none.
    """
    everything = {dotted(path).rpartition(".")[0] for path in tensors}
    found: dict[str, None] = {}
    for path in moved:
        module = dotted(path).rpartition(".")[0]
        if not module or any(other.startswith(f"{module}.") for other in everything):
            raise UnsupportedCheckpoint(
                "a tensor that PEFT cannot bring whole: it belongs to no module of its own",
                where=f"{where} :: {dotted(path)}",
                hint="leave it out with --exclude, or share the fine-tune as it is",
            )
        found[module] = None
    return [module for module in everything if module and module.endswith(tuple(found))]


def tied_head(names: Collection[str], modules: Iterable[str], config: Mapping[str, Any]) -> tuple[str, str] | None:
    """The embedding that is brought whole and the head that shares its tensor and is not stored; None if there is no such pair.

    PEFT copies what it brings whole: the head keeps the base's values unless it is brought as well.

    Args:
        names: All tensors of the checkpoint.
        modules: The modules that are brought whole.
        config: The model's configuration.
    """
    embedding = next((module for module in modules if is_embedding(module)), None)
    stored = any(is_head(name.removesuffix(".weight")) for name in names)
    tied = config.get("tie_word_embeddings", config.get("model_type") == "gpt2")
    if embedding is None or stored or not tied or not _has_head(config):
        return None
    return embedding, "lm_head"


def adapter_config(
    ranks: Mapping[str, int],
    modules: Iterable[str],
    config: Mapping[str, Any],
    base: str,
    *,
    transposed: bool,
    biases: bool,
) -> dict[str, Any]:
    """``adapter_config.json`` of factors whose product is the delta itself: every alpha is its rank.

    Args:
        ranks: The rank of each adapted module, by its full name.
        modules: The modules that are brought whole, by their full names.
        config: The base's own configuration.
        base: The base's name or path.
        transposed: Whether weights are stored (inputs, outputs).
        biases: Whether biases of adapted modules are brought.
    """
    common = max(ranks.values())
    pattern = patterns_of(ranks, common)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if _has_head(config) else None,
        "base_model_name_or_path": base,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": pattern,
        "alpha_pattern": dict(pattern),
        "target_modules": sorted(ranks),
        "modules_to_save": sorted(modules) or None,
        "fan_in_fan_out": transposed,
        "bias": "lora_only" if biases else "none",
        "use_rslora": False,
        "use_dora": False,
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def _has_head(config: Mapping[str, Any]) -> bool:
    """Whether the model predicts tokens."""
    architectures = config.get("architectures") or ()
    return any(str(name).endswith(("ForCausalLM", "LMHeadModel")) for name in architectures)
