"""Keys of a PEFT adapter: which module of the live model each belongs to, and what it is to that module.

A key is ``base_model.model.``, the module's path, and a suffix that says what the tensor is. PEFT takes the adapter's own name
out of its keys; raw state dicts of other writers leave it in (``lora_A.default.weight``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from lora_merge_cli.dialects.interface import Tree, looks_like_adapter
from lora_merge_cli.dialects.torch_names import clean_name, dotted
from lora_merge_cli.errors import UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.records import Dropped, TensorSpec, first_names

Role = Literal["lora_a", "lora_b", "bias", "embedding_a", "embedding_b", "magnitude"]
"""What a tensor is to its layer; ``bias`` is the one that ``lora_B`` adds."""

PREFIX = "base_model.model."

_ROLES: Mapping[tuple[str, str | None], Role] = {
    ("lora_A", "weight"): "lora_a",
    ("lora_B", "weight"): "lora_b",
    ("lora_B", "bias"): "bias",
    ("lora_embedding_A", None): "embedding_a",
    ("lora_embedding_B", None): "embedding_b",
    ("lora_magnitude_vector", None): "magnitude",
    ("lora_magnitude_vector", "weight"): "magnitude",
}
_LAYER = re.compile(
    r"(?P<module>.+?)(?P<nested>(?:\.base_layer)*)\."
    r"(?P<word>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<adapter>(?!(?:weight|bias)$)[^.]+))?(?:\.(?P<leaf>weight|bias))?"
)
_ROWS = re.compile(r"(?P<module>.+?)(?:\.token_adapter|\.base_layer)*\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?")
_UNTRAINED = re.compile(r"\.original_module\.|\.trainable_tokens_original(?:\.|$)")
_WRAPPERS = re.compile(r"(?:\.(?:token_adapter|base_layer))+(?=\.)")
_SAMPLER = re.compile(r"\.lora_monteclora_sampler\.")
_OTHER_METHODS: Mapping[str, re.Pattern[str]] = {
    method: re.compile(rf"(?:^|\.)(?:{words})(?:\.|$)")
    for method, words in {
        "LoHa": r"hada_\w+",
        "LoKr": r"lokr_\w+",
        "IA3": r"ia3_l",
        "AdaLoRA": r"lora_E|ranknum",
        "KaSA": r"lora_diag",
        "VeRA": r"vera_\w+|pvera_\w+",
        "OFT": r"oft_\w+",
        "BOFT": r"boft_\w+",
        "HRA": r"hra_u",
        "LN tuning": r"ln_tuning_layers",
        "FourierFT": r"fourierft_\w+",
        "MiSS": r"miss_block|bone_block",
        "RandLora": r"randlora_\w+",
        "DeLoRA": r"delora_\w+",
        "C3A": r"c3a_kernel",
        "SHiRA": r"shira_\w+",
        "VBLoRA": r"vblora_\w+",
        "GraLoRA": r"gralora_\w+",
        "RoAd": r"road_\w+",
        "HiRA": r"hira_\w+",
        "WaveFT": r"waveft_\w+",
        "PSOFT": r"psoft_\w+",
        "OSF": r"osf_\w+",
        "AdaMSS": r"adamss_\w+",
        "BEFT": r"beft_\w+",
        "DEFT": r"deft_\w+",
        "FRoD": r"frod_\w+",
        "GLoRA": r"glora_\w+",
        "PEANuT": r"peanut_\w+",
        "TinyLoRA": r"tinylora_\w+",
        "UniLoRA": r"unilora_\w+",
        "prompt learning": r"prompt_embeddings|prompt_encoder",
    }.items()
}


@dataclass
class Layer:
    """A module with low-rank factors."""

    module: str
    """Its path in the live model."""
    owner: str
    """The module that patterns name: an attention block for the output projection inside it, else the module itself."""
    nested: dict[int, dict[Role, TensorSpec]] = field(default_factory=dict)
    """Its tensors by role, and by the number of wrappers around the one that they belong to: several only where parameters of one
    module were targeted, each of which adds a wrapper."""

    @property
    def tensors(self) -> Mapping[Role, TensorSpec]:
        """The tensors of the outermost wrapper."""
        return self.nested.get(0, {})

    @property
    def inner(self) -> bool:
        """Whether it is wrapped together with the attention block that holds it."""
        return self.owner != self.module


@dataclass(frozen=True)
class Whole:
    """A tensor that an adapter brings whole."""

    name: str
    """Its name in the live model."""
    spec: TensorSpec
    """The adapter's tensor."""
    wrapped: bool
    """Whether it is the base's copy under a layer that has factors or trained rows of its own."""


@dataclass(frozen=True)
class Rows:
    """Trained rows of an embedding or a head."""

    module: str
    """The module's path in the live model."""
    spec: TensorSpec
    """The adapter's tensor."""


@dataclass
class Keys:
    """Every key of an adapter, claimed once."""

    layers: dict[str, Layer] = field(default_factory=dict)
    """The adapted modules by path."""
    whole: dict[str, Whole] = field(default_factory=dict)
    """What is brought whole, by name."""
    rows: dict[str, Rows] = field(default_factory=dict)
    """Trained rows, by module."""
    dropped: list[Dropped] = field(default_factory=list)
    """Keys of no consequence, each with the reason."""
    problems: list[Exception] = field(default_factory=list)
    """Keys that cannot be claimed."""


def is_peft_name(name: str) -> bool:
    """Whether a tensor's name has PEFT's prefix, or is one of a LoRA layer's."""
    return name.startswith("base_model.model.") or _layer_match(name) is not None or "trainable_tokens_delta" in name


def read_keys(adapter: Tree) -> Keys:
    """Claim every key of an adapter by what its name says."""
    keys = Keys()
    named = [(_live_name(dotted(path)), spec) for path, spec in adapter.index.tensors.items()]
    adapters = set(_adapter_names(name for name, _ in named))
    foreign: dict[str, list[str]] = {}
    unknown: list[TensorSpec] = []
    twice: list[TensorSpec] = []
    deferred: list[tuple[str, TensorSpec]] = []
    for name, spec in named:
        method = next((method for method, words in _OTHER_METHODS.items() if words.search(name)), None)
        rows, layer = _ROWS.fullmatch(name), _layer_match(name)
        if method is not None:
            foreign.setdefault(method, []).append(spec.name)
        elif _UNTRAINED.search(name):
            keys.dropped.append(Dropped(spec.path, "the base's own values, which were not trained"))
        elif _SAMPLER.search(name):
            keys.dropped.append(Dropped(spec.path, "MonteCLoRA's sampler, which only training uses"))
        elif rows is not None:
            if rows["module"] in keys.rows:
                twice.append(spec)
            keys.rows[rows["module"]] = Rows(rows["module"], spec)
        elif layer is not None:
            if not _add_to_layer(keys, layer, spec):
                twice.append(spec)
        elif looks_like_adapter((name,)):
            unknown.append(spec)
        elif ".modules_to_save." in name:
            deferred.append((name, spec))
        else:
            _add_whole(keys, name, spec, twice)
    _add_copies(keys, deferred, adapters, twice)
    keys.problems += _problems(adapter.where, adapters, foreign, unknown, twice)
    return keys


def _live_name(name: str) -> str:
    return clean_name(name.removeprefix(PREFIX))


def _layer_match(name: str) -> re.Match[str] | None:
    match = _LAYER.fullmatch(name)
    return match if match is not None and (match["word"], match["leaf"]) in _ROLES else None


def _adapter_names(names: Iterable[str]) -> Iterator[str]:
    for name in names:
        match = _layer_match(name) or _ROWS.fullmatch(name)
        if match is not None and match["adapter"] is not None:
            yield match["adapter"]


def _add_to_layer(keys: Keys, match: re.Match[str], spec: TensorSpec) -> bool:
    """Whether the tensor's place was free."""
    path = match["module"]
    owner, inner, _ = path.partition(".base_layer.")
    module = path.replace(".base_layer.", ".") if inner else path
    layer = keys.layers.setdefault(module, Layer(module, owner if inner else module))
    tensors = layer.nested.setdefault(match["nested"].count(".base_layer"), {})
    role = _ROLES[match["word"], match["leaf"]]
    return tensors.setdefault(role, spec) is spec


def _add_whole(keys: Keys, name: str, spec: TensorSpec, twice: list[TensorSpec]) -> None:
    plain = _WRAPPERS.sub("", name)
    # The bias under a layer with factors is a trained one; the weight there is the base's copy.
    wrapped = plain != name and not plain.endswith("bias")
    if plain in keys.whole:
        twice.append(spec)
    keys.whole[plain] = Whole(plain, spec, wrapped)


def _add_copies(
    keys: Keys, deferred: Sequence[tuple[str, TensorSpec]], adapters: set[str], twice: list[TensorSpec]
) -> None:
    """Claim tensors of modules that were trained whole, under the name of the wrapper that holds the trained copy."""
    for name, spec in deferred:
        module, _, rest = name.partition(".modules_to_save.")
        first, dot, tail = rest.partition(".")
        plain = f"{module}.{tail if dot and first in adapters | {'default'} else rest}"
        if plain in keys.whole and plain not in {other for other, _ in deferred}:
            keys.dropped.append(Dropped(spec.path, f"a second copy of {keys.whole[plain].spec.name}"))
        else:
            _add_whole(keys, plain, spec, twice)


def _problems(
    where: str,
    adapters: set[str],
    foreign: Mapping[str, Sequence[str]],
    unknown: Sequence[TensorSpec],
    twice: Sequence[TensorSpec],
) -> Iterator[Exception]:
    for method, names in foreign.items():
        yield UnsupportedCheckpoint(
            f"keys of another method, {method}: not supported",
            where=f"{where} :: {first_names(names, 2)}",
            expected="LoRA, rsLoRA or DoRA",
        )
    if len(adapters) > 1:
        yield UnsupportedCheckpoint(
            "several adapters in one file",
            where=where,
            found=first_names(sorted(adapters)),
            hint="save each of them by itself with save_pretrained",
        )
    elif twice:
        yield UnmatchedAdapter(
            "two keys for the same tensor of the model",
            where=f"{where} :: {first_names((spec.name for spec in twice), 2)}",
        )
    if unknown:
        yield UnmatchedAdapter(
            "keys that look like an adapter's and fit no rule of peft's",
            where=f"{where} :: {first_names((spec.name for spec in unknown), 3)}",
            expected=f"{PREFIX}<module>.lora_A.weight and the like",
        )
