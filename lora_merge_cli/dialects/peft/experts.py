"""PEFT adapters on expert parameters: ``target_parameters``, one factor pair for all experts of a layer.

What makes them special:

- The parameter's name is in no key. Every adapted parameter of a module adds one wrapper around it, the first registered one
  innermost: its keys have the most ``base_layer``. Which parameter a wrapper is for follows from the shapes, or else from the
  order, gate and up before down.
- A is (experts * rank, in) with the experts' rows one after the other; B is (out, experts * rank) with its columns rank by rank:
  column ``k * experts + e``. So they are read as (experts, rank, in) and (out, rank, experts).
- A parameter is (experts, out, in) or (experts, in, out), by model. PEFT before 0.19 took every one for the latter.
- Transformers 5 fuses experts in memory that most checkpoints hold one by one, gate and up apart.

Source: huggingface/peft, ``tuners/lora/layer.py``, ``ParamWrapper``; huggingface/transformers, ``conversion_mapping.py``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.torch_names import clean_name, match_names, model_types
from lora_merge_cli.errors import Refused, ShapeMismatch, UnmatchedAdapter
from lora_merge_cli.records import Factor, Forward, Index, KeyPath, TensorSpec, display

REGISTERED = ("gate_up_proj", "up_proj", "down_proj")
"""The parameters of expert modules in the order in which the modules make them."""

_SPELLINGS: Mapping[str, tuple[tuple[str, ...], ...]] = {
    "gate_up_proj": (("w1.weight", "w3.weight"), ("gate_proj.weight", "up_proj.weight")),
    "up_proj": (("up_proj.weight",),),
    "down_proj": (("w2.weight",), ("down_proj.weight",)),
}
"""What one expert's part of a fused parameter is called on disk; where there are several, they are concatenated along the rows."""

_INPUTS_FIRST = frozenset({"gpt_oss", "openai_privacy_filter", "aria", "aria_text"})
"""Model types whose expert parameters are (experts, in, out) in memory and on disk."""

_OUTPUTS_FIRST = frozenset(
    {
        "afmoe", "cohere2_moe", "deepseek_v2", "deepseek_v3", "dots1", "ernie4_5_moe", "exaone_moe", "flex_olmo", "glm4_moe",
        "glm4_moe_lite", "glm4v_moe", "glm_moe_dsa", "granitemoe", "granitemoehybrid", "granitemoeshared", "hunyuan_v1_moe", "jamba",
        "lfm2_moe", "longcat_flash", "minimax", "minimax_m2", "mixtral", "nemotron_h", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
        "qwen3_next", "qwen3_omni_moe", "solar_open",
    }
)  # fmt: skip
"""Model types whose expert parameters are (experts, out, in) in memory, and on disk or as what the disk's would be together.

A type in neither set has a square parameter refused, ``qwen3_vl_moe`` among them: its files come in both orders."""

_FUSED = {
    "out, in": ("eri,ore->eoi", Forward("btei,eoi->bteo", "btei,eri->bter", "bter,ore->bteo")),
    "in, out": ("eri,ore->eio", Forward("btei,eio->bteo", "btei,eri->bter", "bter,ore->bteo")),
}
_SINGLE = {
    "out, in": ("ri,or->oi", Forward("bti,oi->bto", "bti,ri->btr", "btr,or->bto")),
    "in, out": ("ri,or->io", Forward("bti,io->bto", "bti,ri->btr", "btr,or->bto")),
}
"""Equation and forward by what the parameter's last two axes are to the factors."""


@dataclass(frozen=True)
class Wrapped:
    """The factor pair of one wrapper around an expert module."""

    depth: int
    """How many ``base_layer`` its keys have: 0 is the outermost wrapper."""
    a: TensorSpec
    """``lora_A.weight``, (experts * rank, in)."""
    b: TensorSpec
    """``lora_B.weight``, (out, experts * rank)."""


@dataclass(frozen=True)
class ExpertTarget:
    """One tensor on disk that a factor pair changes, all of its experts or one."""

    target: KeyPath
    """The tensor in the base."""
    parameter: str
    """The parameter in the live model, for example ``gate_up_proj``: the patterns for rank and alpha go by ``module.parameter``."""
    lora_a: Factor
    """Dims as in the equation: (experts, rank, in), or (rank, in) of one expert."""
    lora_b: Factor
    """(out, rank, experts), or (out, rank) of one expert."""
    rank: int
    """The rank of one expert."""
    equation: str
    """From the factors' dims to the target's."""
    forward: Forward
    """What the experts compute. For an adapter of PEFT before 0.19 on (experts, out, in) parameters, "in" is the model's output."""


@dataclass(frozen=True)
class _Part:
    """A tensor on disk as a part of a parameter."""

    target: KeyPath
    expert: int | None = None
    """Which expert it is; None if it holds all."""
    rows: tuple[int, int] = (0, 0)
    """Which rows of that expert's matrix it is, from the first one to before the last."""


@dataclass(frozen=True)
class _Parameter:
    """A parameter of the live module, as the disk holds it."""

    name: str
    shape: tuple[int, int, int]
    parts: tuple[_Part, ...]


def expert_sites(
    module: str, wrapped: Sequence[Wrapped], base: Tree, config: Mapping[str, Any]
) -> list[ExpertTarget] | Refused:
    """What the wrappers around one expert module change on disk; never raises for what a file may hold.

    Args:
        module: The module in the live model, for example ``model.layers.0.mlp.experts``.
        wrapped: Its factor pairs.
        base: The base checkpoint.
        config: The adapter's configuration; `peft_version` and `target_parameters` decide where shapes do not.

    Returns:
        One target per tensor on disk, in the order of parameters and experts; the refusal if the wrappers cannot be told apart or
        fit nothing.
    """
    where = f"{base.where} :: {module}"
    ordered = sorted(wrapped, key=lambda one: -one.depth)
    if [one.depth for one in reversed(ordered)] != list(range(len(ordered))):
        return UnmatchedAdapter(
            "a wrapper of an expert module is missing, or there twice",
            where=where,
            expected="depths 0, 1, ... of base_layer",
            found=", ".join(str(one.depth) for one in ordered),
        )
    found = _parameters(module, _same_numbers(module, base))
    if isinstance(found, Refused):
        return found
    if not found:
        return UnmatchedAdapter(
            "an adapter on experts that the base does not have",
            where=where,
            expected=f"{module}.{{{','.join(REGISTERED)}}} or the experts one by one below it",
        )
    assigned = _assign(module, ordered, found, config, where)
    if isinstance(assigned, Refused):
        return assigned
    targets: list[ExpertTarget] = []
    for one, parameter in zip(ordered, assigned, strict=True):
        order = _order(one, parameter, base, config, where)
        if isinstance(order, Refused):
            return order
        targets.extend(_targets(one, parameter, order))
    return targets


def _same_numbers(module: str, base: Tree) -> Tree:
    """The base's tensors with the numbers that are in the module's name: no renaming changes those, and a layer is a small part."""
    numbers = [f".{part}." for part in module.split(".") if part.isdigit()]
    tensors = base.index.tensors
    shown = ((path, f".{'.'.join(map(str, path))}.") for path in tensors)
    near = {path: tensors[path] for path, name in shown if all(number in name for number in numbers)}
    return replace(base, index=Index(near))


def _parameters(module: str, base: Tree) -> list[_Parameter] | Refused:
    """The module's parameters that the disk has, in the order in which the module makes them; a parameter has one spelling."""
    module = clean_name(module)
    last = module.rsplit(".", maxsplit=1)[-1]
    numbers = _expert_numbers(last, base)
    fused = {name: [f"{module}.{name}", f"{module}.{name}.weight"] for name in REGISTERED}
    single = {
        name: {(n, leaves): [f"{module}.{n}.{leaf}" for leaf in leaves] for n in numbers for leaves in spellings}
        for name, spellings in _SPELLINGS.items()
    }
    alone = [leaf for experts in single.values() for leaves in experts.values() for leaf in leaves]
    try:
        placed = match_names([*itertools.chain(*fused.values()), *alone], base)
    except UnmatchedAdapter as error:
        return error
    present = {
        n for experts in single.values() for (n, _), leaves in experts.items() if any(x in placed for x in leaves)
    }
    parameters: list[_Parameter] = []
    for name in REGISTERED:
        whole = [placed[spelling] for spelling in fused[name] if spelling in placed]
        complete = {
            key: [placed[x] for x in leaves] for key, leaves in single[name].items() if all(x in placed for x in leaves)
        }
        found: _Parameter | Refused | None = None
        if whole:
            shape = base.index.tensors[whole[0]].shape
            found = _Parameter(name, (shape[0], shape[1], shape[2]), (_Part(whole[0]),)) if len(shape) == 3 else None
        elif complete and [n for n, _ in complete] != list(range(len(present))):
            found = UnmatchedAdapter(
                "an expert of the base lacks a tensor that the others have",
                where=f"{base.where} :: {module}",
                expected=f"{name} of experts 0 to {max(present)}, each once",
            )
        elif complete:
            found = _stacked(name, list(complete.values()), base)
        if isinstance(found, Refused):
            return found
        if found is not None:
            parameters.append(found)
    # Where gate and up are fused in memory, an up alone on disk is a half of that parameter.
    names = {parameter.name for parameter in parameters}
    return [found for found in parameters if not (found.name == "up_proj" and "gate_up_proj" in names)]


def _expert_numbers(last: str, base: Tree) -> range:
    """The numbers that experts below modules of this name may have."""
    number = re.compile(rf"(?:^|\.){re.escape(last)}\.(\d+)\.")
    found = (number.search(".".join(map(str, path))) for path in base.index.tensors)
    return range(max((int(match[1]) + 1 for match in found if match and len(match[1]) < 5), default=0))


def _stacked(name: str, experts: Sequence[Sequence[KeyPath]], base: Tree) -> _Parameter | Refused:
    """A parameter of experts that the disk holds one by one."""
    first = [base.index.tensors[path].shape for path in experts[0]]
    parts: list[_Part] = []
    for number, paths in enumerate(experts):
        shapes = [base.index.tensors[path].shape for path in paths]
        if shapes != first or any(len(shape) != 2 or shape[1] != shapes[0][1] for shape in shapes):
            return ShapeMismatch(
                "experts of one module that differ in shape",
                where=f"{base.where} :: {display(paths[0])}",
                expected=first,
                found=shapes,
            )
        ends = list(itertools.accumulate(shape[0] for shape in shapes))
        parts.extend(
            _Part(path, number, (end - shape[0], end)) for path, shape, end in zip(paths, shapes, ends, strict=True)
        )
    return _Parameter(name, (len(experts), sum(shape[0] for shape in first), first[0][1]), tuple(parts))


def _assign(
    module: str, wrapped: Sequence[Wrapped], found: Sequence[_Parameter], config: Mapping[str, Any], where: str
) -> Sequence[_Parameter] | Refused:
    """Which parameter each wrapper is for, the innermost first."""
    choices = [
        chosen
        for chosen in itertools.permutations(found, len(wrapped))
        if all(_fits(one, parameter) for one, parameter in zip(wrapped, chosen, strict=True))
    ]
    shown = "; ".join(f"A {one.a.shape}, B {one.b.shape}" for one in wrapped)
    if not choices:
        return ShapeMismatch(
            "factors that fit no expert parameter",
            where=where,
            expected=" or ".join(f"{parameter.name} {parameter.shape}" for parameter in found),
            found=shown,
        )
    for narrowed in (
        [chosen for chosen in choices if all(_asked_for(module, parameter.name, config) for parameter in chosen)],
        [chosen for chosen in choices if list(chosen) == [parameter for parameter in found if parameter in chosen]],
    ):
        choices = [chosen for chosen in choices if chosen in narrowed] or choices
    if len(choices) > 1:
        return UnmatchedAdapter(
            "factors that fit several expert parameters",
            where=where,
            found=f"{shown} for {' or '.join(', '.join(parameter.name for parameter in c) for c in choices)}",
            hint="name the parameters in target_parameters of adapter_config.json",
        )
    return choices[0]


def _asked_for(module: str, parameter: str, config: Mapping[str, Any]) -> bool:
    name = f"{clean_name(module)}.{parameter}"
    targets = config.get("target_parameters") or ()
    return any(isinstance(target, str) and f".{name}".endswith(f".{target}") for target in targets)


def _fits(one: Wrapped, parameter: _Parameter) -> bool:
    return bool(_orders(one, parameter))


def _orders(one: Wrapped, parameter: _Parameter) -> list[str]:
    """What the parameter's last two axes can be to the factors, by shape alone."""
    experts, rows, columns = parameter.shape
    if len(one.a.shape) != 2 or len(one.b.shape) != 2 or one.a.shape[0] != one.b.shape[1]:
        return []
    if 0 in (*parameter.shape, *one.a.shape, *one.b.shape) or one.a.shape[0] % experts:
        return []
    extents = {"out, in": (columns, rows), "in, out": (rows, columns)}
    return [
        order for order, (inputs, outputs) in extents.items() if (one.a.shape[1], one.b.shape[0]) == (inputs, outputs)
    ]


def _order(one: Wrapped, parameter: _Parameter, base: Tree, config: Mapping[str, Any], where: str) -> str | Refused:
    """What the parameter's last two axes are to the factors; for a square one, PEFT's version and the model type tell."""
    fitting = _orders(one, parameter)
    if len(fitting) == 1:
        return fitting[0]
    old, types = _before_swap(config), model_types(base)
    known = [order for order, models in (("in, out", _INPUTS_FIRST), ("out, in", _OUTPUTS_FIRST)) if types & models]
    if old is None or len(known) != 1:
        return UnmatchedAdapter(
            "a square expert parameter whose inputs and outputs cannot be told apart",
            where=f"{where}.{parameter.name}",
            expected="peft_version in adapter_config.json and model_type in the base's config.json, of a known model",
            found=f"peft_version {config.get('peft_version')} and model_type {', '.join(sorted(types)) or None}",
        )
    return "in, out" if old else known[0]


def _before_swap(config: Mapping[str, Any]) -> bool | None:
    """Whether PEFT before 0.19 wrote the adapter; None where its version does not tell."""
    version = config.get("peft_version")
    if version is None:
        # Written since 0.18.
        return True
    match = re.match(r"(\d+)\.(\d+)(?:\.\d+)?(.*)", str(version))
    if match is None:
        return None
    release = (int(match[1]), int(match[2]))
    # Between the releases 0.18 and 0.19 a version says nothing.
    return None if match[3] and release in {(0, 18), (0, 19)} else release < (0, 19)


def _targets(one: Wrapped, parameter: _Parameter, order: str) -> Iterator[ExpertTarget]:
    experts = parameter.shape[0]
    rank = one.a.shape[0] // experts
    a = Factor(one.a.path, (experts, rank, one.a.shape[1]))
    b = Factor(one.b.path, (one.b.shape[0], rank, experts))
    for part in parameter.parts:
        if part.expert is None:
            equation, forward = _FUSED[order]
            yield ExpertTarget(part.target, parameter.name, a, b, rank, equation, forward)
            continue
        equation, forward = _SINGLE[order]
        rows = slice(*part.rows)
        rows_of_a, rows_of_b = (slice(None), rows) if order == "out, in" else (rows, slice(None))
        yield ExpertTarget(
            part.target,
            parameter.name,
            replace(a, at=(part.expert, slice(None), rows_of_a)),
            replace(b, at=(rows_of_b, slice(None), part.expert)),
            rank,
            equation,
            forward,
        )
