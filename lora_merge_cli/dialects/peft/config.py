"""``adapter_config.json``: what it says about a LoRA adapter, and what in it makes a merge impossible.

Other methods read theirs with the same `Fields`; see `methods`.

Source: huggingface/peft 0.21, ``peft/config.py`` and ``peft/tuners/lora/config.py``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from lora_merge_cli.dialects.interface import ScaleOptions, Tree
from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint, UsageError

LORA, TOKENS = "LORA", "TRAINABLE_TOKENS"

_PROMPTS = "learns prompts and changes no weight"
_RANDOM = "rests on random numbers of torch's that its file does not hold"
_REASONS: Mapping[str, str] = {
    **dict.fromkeys(("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT"), _PROMPTS),
    **dict.fromkeys(("ADAPTION_PROMPT", "CARTRIDGE"), _PROMPTS),
    **dict.fromkeys(("XLORA", "POLY", "LILY"), "mixes adapters while it runs"),
    **dict.fromkeys(("FOURIERFT", "WAVEFT"), _RANDOM),
}
"""Why methods are refused that could not be supported."""

_DEFAULT_RANK, _DEFAULT_ALPHA = 8, 8.0

COMMON_FIELDS = frozenset(
    {
        # What any adapter says about itself.
        *(
            "auto_mapping",
            "base_model_name_or_path",
            "inference_mode",
            "peft_type",
            "peft_version",
            "revision",
            "task_type",
        ),
        # What was asked for; the keys in the file say what was adapted.
        *("exclude_modules", "layers_pattern", "layers_to_transform", "target_modules"),
    }
)
"""Fields of every method that change nothing about a merge, whatever they hold."""

_HARMLESS = COMMON_FIELDS | frozenset(
    {
        # How it was initialised and trained; init_lora_weights says which of these acted.
        *("corda_config", "eva_config", "init_weights", "loftq_config", "lora_dropout", "lora_ga_config"),
        *("runtime_config", "velora_config"),
        # MonteCLoRA samples while it trains, and merges as plain LoRA.
        "monteclora_config",
        # Of no effect without the field that turns their method on.
        *("megatron_core", "qalora_group_size"),
        # Of early versions, and of other trainers that write this file: learning rates, and the dtype of the factors.
        *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio", "merge_weights"),
    }
)
"""Fields that change nothing about a merge, whatever they hold."""

_UNDERSTOOD = frozenset(
    {
        *(
            "alpha_pattern",
            "bias",
            "ensure_weight_tying",
            "fan_in_fan_out",
            "init_lora_weights",
            "lora_alpha",
            "lora_bias",
        ),
        *("modules_to_save", "r", "rank_pattern", "target_parameters", "token_indices", "trainable_token_indices"),
        *("use_dora", "use_rslora"),
    }
)
"""Fields that `AdapterConfig` holds."""

_METHODS: Mapping[str, str] = {
    "alora_invocation_tokens": "aLoRA, whose adapter acts on some of the tokens only",
    "arrow_config": "Arrow, which chooses between adapters while it runs",
    "enable_lora": "LoRA on parts of a merged linear layer",
    "kasa_config": "KaSA, which truncates the base",
    "layer_replication": "layer replication, whose copies of a layer have adapters of their own",
    "megatron_config": "LoRA on Megatron's parallel layers",
    "use_bdlora": "BD-LoRA, whose factors are block-diagonal",
    "use_qalora": "QALoRA, which pools the inputs of a quantised base",
}
"""Fields that turn on a method that is not supported, each with its name."""

KNOWN_FIELDS = _HARMLESS | _UNDERSTOOD | _METHODS.keys()
"""Every field of which it is known what it does to a merge."""

_RESIDUAL = re.compile(r"pissa|olora|corda|lora_ga|loftq")
_PLAIN_INITS = frozenset({"gaussian", "orthogonal", "eva", "mica"})

_PATTERN_LENGTH, _PATTERN_WILDCARDS = 1000, 4
# A repeated group that repeats or chooses inside, (x+)+ or (a|b)*: matching it may take for ever.
_NESTED_REPEAT = re.compile(r"\([^()]*[*+{|][^()]*\)[*+{]")


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter's configuration says, with PEFT's defaults for what it leaves out."""

    stated: bool = False
    """Whether there is a configuration at all."""
    method: str = LORA
    """`LORA`, or `TOKENS` for an adapter that is nothing but token rows."""
    rank: int | None = None
    """The rank where no pattern says otherwise; None without a configuration."""
    alpha: float | None = None
    """The alpha where no pattern says otherwise; None when nothing states it."""
    alpha_source: str = ""
    """Where that alpha comes from, in words."""
    rslora: bool = False
    """Whether the scale is ``alpha / sqrt(rank)``."""
    rslora_source: str = ""
    """Where that comes from, in words."""
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    """Ranks by regular expression, in the file's order."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Alphas by regular expression, in the file's order."""
    transposed: bool | None = None
    """``fan_in_fan_out``: what it says of the layer that was visited last; None without a configuration."""
    bias: str = "none"
    """Which of the base's biases were trained: ``none``, ``all`` or ``lora_only``."""
    lora_bias: bool | None = None
    """Whether ``lora_B`` has a bias; None without a configuration."""
    dora: bool | None = None
    """Whether the adapter is DoRA; None without a configuration."""
    tied: bool = False
    """``ensure_weight_tying``: tied layers share one adapter."""
    modules_to_save: tuple[str, ...] = ()
    """Names, or ends of names, of modules that were trained whole."""
    token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = None
    """Which rows of the embedding were trained; by the module's name where several are."""
    target_parameters: tuple[str, ...] = ()
    """Names, or ends of names, of parameters that were adapted and not as part of a layer."""
    task: str | None = None
    """The task, for example ``SEQ_CLS``."""
    base: str | None = None
    """The base that it names."""


@dataclass(frozen=True)
class ConfigReading:
    """A configuration, and what is wrong with it."""

    config: AdapterConfig | None
    """What it says, as far as it makes sense; None if it is of another method."""
    problems: tuple[Exception, ...]
    """Why no merge can be right, worst first."""
    notes: tuple[str, ...] = ()
    """What a reader of the report should know."""


def read_config(adapter: Tree, options: ScaleOptions, residual_base: bool = False) -> ConfigReading:
    """What an adapter's configuration says, and every reason in it to refuse.

    Args:
        adapter: The adapter with its configuration, if it has one.
        options: What the user says about scales.
        residual_base: Whether the user says that the base is what the adapter's initialisation left of it.
    """
    raw = adapter.config
    if raw is None:
        return ConfigReading(_from_flags(options), ())
    where = f"{adapter.where} :: adapter_config.json"
    method = raw.get("peft_type")
    if method not in (LORA, TOKENS):
        return ConfigReading(None, (_wrong_method(method, where),))
    fields = Fields(raw, where)
    problems = [
        *_unsupported(raw, where),
        *_initialisation(raw, where, residual_base),
        *_stated_twice(raw, where, options),
    ]
    config = _read(fields, str(method), options)
    notes: tuple[str, ...] = ()
    if residual_base and _is_residual(raw.get("init_lora_weights")):
        notes = (
            f"init_lora_weights {raw['init_lora_weights']!r}: right if the base is the residual that this left, "
            "as you say; nothing in the files can show it",
        )
    return ConfigReading(config, (*problems, *fields.problems), notes)


def _from_flags(options: ScaleOptions) -> AdapterConfig:
    return AdapterConfig(
        alpha=options.alpha_for(""),
        alpha_source="--lora-alpha",
        rslora=options.rslora_for(""),
        rslora_source="--rslora",
    )


def _read(fields: Fields, method: str, options: ScaleOptions) -> AdapterConfig:
    alpha, alpha_source = fields.number("lora_alpha"), "adapter_config.json"
    if alpha is None:
        alpha, alpha_source = options.alpha_for(""), "--lora-alpha"
    if alpha is None:
        alpha, alpha_source = _DEFAULT_ALPHA, "peft's default"
    rslora = fields.flag("use_rslora")
    flagged = not rslora and options.rslora_for("")
    rank = fields.rank()
    return AdapterConfig(
        stated=True,
        method=method,
        rank=rank,
        alpha=alpha,
        alpha_source=alpha_source,
        rslora=rslora or flagged,
        rslora_source="--rslora" if flagged else "use_rslora",
        rank_pattern={key: int(value) for key, value in fields.pattern("rank_pattern", whole=True).items()},
        alpha_pattern=fields.pattern("alpha_pattern", whole=False),
        transposed=fields.flag("fan_in_fan_out"),
        bias=fields.choice("bias", ("none", "all", "lora_only")),
        lora_bias=fields.flag("lora_bias"),
        dora=fields.flag("use_dora"),
        tied=fields.flag("ensure_weight_tying"),
        modules_to_save=fields.names("modules_to_save"),
        token_indices=fields.indices("token_indices" if method == TOKENS else "trainable_token_indices"),
        target_parameters=fields.names("target_parameters"),
        task=fields.text("task_type"),
        base=fields.text("base_model_name_or_path"),
    )


class Fields:
    """Reads fields, and collects those that do not hold what PEFT would write there.

    Each reader takes a field's name and returns its value, or what PEFT takes where the field is absent, null or malformed.
    """

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        self.raw = raw
        self.where = where
        self.problems: list[Exception] = []

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.raw.get(name)
        if value is not None and not isinstance(value, bool):
            self.malformed(name, "true or false")
        return value if isinstance(value, bool) else default

    def rank(self) -> int:
        """LoRA's rank."""
        return self.whole("r", _DEFAULT_RANK)

    def whole(self, name: str, default: int, least: int = 1) -> int:
        """An integer, at least `least`."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not _is_int(value) or value < least:
            self.malformed(name, "a positive integer" if least == 1 else f"an integer from {least}")
            return default
        return int(value)

    def number(self, name: str) -> float | None:
        """A finite number; None where there is none."""
        value = self.raw.get(name)
        if value is None or _is_number(value):
            return None if value is None else float(value)
        self.malformed(name, "a finite number")
        return None

    def text(self, name: str) -> str | None:
        """A text that is not empty; None for anything else."""
        value = self.raw.get(name)
        return value if isinstance(value, str) and value else None

    def choice(self, name: str, choices: tuple[str, ...]) -> str:
        """One of some texts, the first of them by default."""
        value = self.raw.get(name)
        if value is None:
            return choices[0]
        if value not in choices:
            self.malformed(name, " or ".join(choices))
            return choices[0]
        return str(value)

    def names(self, name: str) -> tuple[str, ...]:
        """A list of names; one name is a list of one."""
        value = self.raw.get(name)
        names = [value] if isinstance(value, str) else value or []
        if not isinstance(names, list) or not all(isinstance(entry, str) for entry in names):
            self.malformed(name, "a list of names")
            return ()
        return tuple(names)

    def pattern(self, name: str, *, whole: bool) -> dict[str, float]:
        """Numbers by regular expression; ranks if `whole`."""
        value = self.raw.get(name) or {}
        fits = _is_rank if whole else _is_number
        if not isinstance(value, Mapping) or not all(fits(entry) for entry in value.values()):
            self.malformed(name, f"{'positive integers' if whole else 'numbers'} by regular expression")
            return {}
        for key in value:
            if not compiles(key):
                self.malformed(name, "simple regular expressions", found=key[:80])
                return {}
        return {str(key): float(entry) for key, entry in value.items()}

    def indices(self, name: str) -> tuple[int, ...] | Mapping[str, tuple[int, ...]] | None:
        """Token indices, or some for each of several modules."""
        value = self.raw.get(name)
        if value is None:
            return None
        lists = list(value.values()) if isinstance(value, Mapping) else [value]
        if not all(isinstance(part, list) and all(_is_int(index) for index in part) for part in lists):
            self.malformed(name, "a list of token indices, or one per module")
            return None
        if isinstance(value, Mapping):
            return {str(key): tuple(part) for key, part in value.items()}
        return tuple(value)

    def malformed(self, name: str, expected: str, found: object = None) -> None:
        """Collect the problem of a field that does not hold what it should."""
        value = repr(self.raw.get(name)) if found is None else repr(found)
        self.problems.append(
            CorruptCheckpoint(
                f"{name} makes no sense",
                where=self.where,
                expected=expected,
                found=value if len(value) <= 80 else f"{value[:80]}...",
            )
        )


def _wrong_method(method: object, where: str) -> Exception:
    if method is None:
        return UnsupportedCheckpoint("the adapter's configuration names no peft_type", where=where, expected=LORA)
    reason = _REASONS.get(method) if isinstance(method, str) else None
    return UnsupportedCheckpoint(
        f"peft_type {str(method)[:80]} {f'{reason}: ' if reason else 'is '}not supported",
        where=where,
        expected=f"{LORA} (LoRA, rsLoRA, DoRA), {TOKENS}, or a method whose file alone says what becomes of the weights",
        hint=None if reason == _PROMPTS else "merge it with peft's merge_and_unload, if that supports it",
    )


def _unsupported(raw: Mapping[str, Any], where: str) -> Iterator[Exception]:
    for name, method in _METHODS.items():
        if not _is_neutral(raw.get(name)):
            yield UnsupportedCheckpoint(f"the adapter uses {method}: not supported", where=where, found=name)
    yield from unknown_fields(raw, KNOWN_FIELDS, where)


def unknown_fields(raw: Mapping[str, Any], known: Container[str], where: str) -> Iterator[Exception]:
    """The refusals of fields of which nobody knows what they do: newer versions add variants of a method as fields.

    Args:
        raw: The configuration.
        known: The fields of the method.
        where: The configuration, for errors.
    """
    for name, value in raw.items():
        if name in known or _is_neutral(value):
            continue
        shown = repr(value)
        yield UnsupportedCheckpoint(
            f"the adapter's configuration has a field that may change what it means: {str(name)[:80]}",
            where=where,
            expected="null, false or empty",
            found=shown if len(shown) <= 80 else f"{shown[:80]}...",
            hint="if it does not matter, set it to null in a copy",
        )


def _initialisation(raw: Mapping[str, Any], where: str, residual_base: bool) -> Iterator[Exception]:
    value = raw.get("init_lora_weights")
    if value is None or isinstance(value, bool) or (isinstance(value, str) and value.lower() in _PLAIN_INITS):
        return
    if not _is_residual(value):
        yield UnsupportedCheckpoint(
            "an initialisation that is not known may have changed the base",
            where=where,
            found=f"init_lora_weights {str(value)[:80]!r}",
        )
    elif not residual_base:
        yield UnsupportedCheckpoint(
            "the adapter was trained on what its initialisation left of the base: added to the base itself it would be wrong",
            where=where,
            found=f"init_lora_weights {str(value)[:80]!r}",
            hint="convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...), or merge into the base "
            "that was saved after the initialisation and pass --residual-base",
        )


def _stated_twice(raw: Mapping[str, Any], where: str, options: ScaleOptions) -> Iterator[Exception]:
    for flag, given, name in (
        ("--lora-alpha", bool(options.alpha), "lora_alpha"),
        ("--rslora", bool(options.rslora), "use_rslora"),
    ):
        if given and raw.get(name) is not None:
            yield UsageError(
                f"{flag} although the adapter's configuration states {name}",
                where=where,
                found=f"{name} {raw[name]!r}",
                hint=f"leave {flag} out: it is for adapters without adapter_config.json",
            )


def _is_residual(value: object) -> bool:
    return isinstance(value, str) and _RESIDUAL.match(value.lower()) is not None


def _is_neutral(value: object) -> bool:
    return value is None or value is False or (isinstance(value, (str, list, dict)) and not value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) < 1e30 and math.isfinite(value)


def compiles(key: str) -> bool:
    """Whether a pattern is a regular expression, and none that a file could stall its reader with."""
    wildcards = len(re.findall(r"\.[*+]", key))
    if len(key) > _PATTERN_LENGTH or wildcards > _PATTERN_WILDCARDS or _NESTED_REPEAT.search(key):
        return False
    try:
        re.compile(rf"(.*\.)?({key})$")
    except (re.error, OverflowError, RecursionError):
        return False
    return True
