"""Whether the model that an adapter was trained in predicts tokens with a head that may be tied to its embedding."""

from __future__ import annotations

import re
from collections.abc import Iterator

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.config import AdapterConfig
from lora_merge_cli.dialects.peft.keys import Keys
from lora_merge_cli.dialects.peft.names import Names, is_head, is_task_head, module_of
from lora_merge_cli.dialects.torch_names import dotted

_BARE = re.compile(
    r"(?!.*(?:LMHead|DoubleHeads|Chat|EncoderDecoder))"
    r".*(?:Model|SequenceClassification|TokenClassification|QuestionAnswering|MultipleChoice)"
)
_PREDICTS_TOKENS = frozenset({"CAUSAL_LM", "SEQ_2_SEQ_LM"})


def saved_bare(base: Tree) -> bool:
    """Whether the class that a checkpoint was saved from has no head that predicts tokens."""
    architectures = (base.config or {}).get("architectures")
    if not isinstance(architectures, list) or not architectures:
        return False
    return all(isinstance(name, str) and _BARE.fullmatch(name) for name in architectures)


def has_no_head(keys: Keys, config: AdapterConfig, base: Tree, names: Names) -> bool:
    """Whether neither the base nor the model that the adapter was trained in has a head that predicts tokens.

    The class that the base was saved from does not decide: Transformers puts a head on a checkpoint that was saved without one, and
    ties it if the configuration says so.

    Args:
        keys: The adapter's keys.
        config: Its configuration.
        base: The checkpoint.
        names: Where its tensors are.
    """
    if not saved_bare(base) or config.task in _PREDICTS_TOKENS:
        return False
    if any(is_head(module_of(path)) and dotted(path).endswith(".weight") for path in base.index.tensors):
        return False
    modules = set(_modules(keys))
    if any(map(is_head, modules)):
        return False
    if config.task is not None or any(map(is_task_head, modules)):
        return True
    return not live_prefix(keys, names) and not _may_generate(base)


def live_prefix(keys: Keys, names: Names) -> str:
    """What the adapter's model puts before all of the base's names, ``model.`` for example; empty if nothing."""
    wanted = [
        *(f"{module}.weight" for module in keys.layers),
        *keys.whole,
        *(f"{module}.weight" for module in keys.rows),
    ]
    for name in wanted:
        path = names.path(name)
        if path is not None and name.endswith(f".{dotted(path)}"):
            return name.removesuffix(dotted(path))
    return ""


def _modules(keys: Keys) -> Iterator[str]:
    yield from keys.layers
    yield from (name.rpartition(".")[0] for name in keys.whole)
    yield from keys.rows


def _may_generate(base: Tree) -> bool:
    """Whether a model with a head would have the very names of the base, as those of an encoder and decoder do."""
    config = base.config or {}
    architectures = config.get("architectures") or ()
    return config.get("is_encoder_decoder") is True and not any("Encoder" in str(name) for name in architectures)
