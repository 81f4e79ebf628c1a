"""``adapter_config.json`` of a method other than LoRA: what it says, and what in it makes a merge impossible.

Source: huggingface/peft 0.21, ``src/peft/config.py`` and each tuner's ``config.py``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lora_merge_cli.dialects.interface import ScaleOptions, Tree
from lora_merge_cli.dialects.peft.config import COMMON_FIELDS, AdapterConfig, Fields, unknown_fields
from lora_merge_cli.dialects.peft.methods.interface import Method, MethodConfig
from lora_merge_cli.errors import UsageError

_FLAG = "fan_in_fan_out"


@dataclass(frozen=True)
class MethodReading:
    """A configuration, and what is wrong with it."""

    config: MethodConfig
    """What it says, as far as it makes sense."""
    problems: tuple[Exception, ...]
    """Why no merge can be right, worst first."""


def known_fields(method: Method) -> frozenset[str]:
    """Every field of which it is known what it does to a merge.

    Methods that PEFT has for (outputs, inputs) alone may have ``fan_in_fan_out`` and never set it.
    """
    named = {found[0] for found in (method.rank, method.alpha) if found is not None}
    named |= {"bias"} if method.biases else set()
    named |= {_FLAG} if method.turnable else set()
    own = method.fields | method.harmless | method.patterns
    return COMMON_FIELDS | {"init_weights", "modules_to_save"} | own | named


def read_config(method: Method, adapter: Tree, options: ScaleOptions) -> MethodReading:
    """What an adapter's configuration says, and every reason in it to refuse.

    Args:
        method: The method that it names.
        adapter: The adapter with its configuration.
        options: What the user says about scales, which must be nothing: these methods state theirs.
    """
    raw = adapter.config or {}
    where = f"{adapter.where} :: adapter_config.json"
    fields = Fields(raw, where)
    problems = [*unknown_fields(raw, known_fields(method), where), *_flags(method, options, where)]
    config = MethodConfig(_common(method, fields), method.settings(fields))
    return MethodReading(config, (*problems, *fields.problems))


def _common(method: Method, fields: Fields) -> AdapterConfig:
    alpha, alpha_source = None, ""
    if method.alpha is not None:
        name, default = method.alpha
        alpha, alpha_source = fields.number(name), "adapter_config.json"
        if alpha is None:
            alpha, alpha_source = default, "peft's default"
    ranks = fields.pattern("rank_pattern", whole=True) if "rank_pattern" in method.patterns else {}
    alphas = fields.pattern("alpha_pattern", whole=False) if "alpha_pattern" in method.patterns else {}
    return AdapterConfig(
        stated=True,
        method=method.peft_types[0],
        rank=None if method.rank is None else fields.whole(*method.rank),
        alpha=alpha,
        alpha_source=alpha_source,
        rank_pattern={key: int(value) for key, value in ranks.items()},
        alpha_pattern=alphas,
        transposed=fields.flag(_FLAG),
        bias=fields.choice("bias", ("none", "all", *method.biases)) if method.biases else "none",
        modules_to_save=fields.names("modules_to_save"),
        task=fields.text("task_type"),
        base=fields.text("base_model_name_or_path"),
    )


def _flags(method: Method, options: ScaleOptions, where: str) -> Iterator[Exception]:
    for flag, given in (("--lora-alpha", options.alpha), ("--rslora", options.rslora)):
        if given:
            yield UsageError(
                f"{flag} for an adapter of another method, {method.title}",
                where=where,
                hint=f"leave {flag} out: it is for LoRA adapters without adapter_config.json",
            )
