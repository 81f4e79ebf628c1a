"""MiniMind: adapters of its own ``lora.A`` and ``lora.B`` layers, saved beside the base as a ``.pth`` of their own.

Its trainer puts a ``LoRA`` module on square linear layers alone and adds ``B(A(x))`` to their output: there is no alpha, and the
scale is 1. Keys are ``<module>.lora.A.weight`` (rank, in) and ``<module>.lora.B.weight`` (out, rank).

Source: jingyaogong/minimind, ``model/model_lora.py``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lora_merge_cli.dialects.interface import ScaleOptions, Subject, Tree
from lora_merge_cli.dialects.torch_model import GROUP, LINEAR, LINEAR_FORWARD, TorchModel, short_name
from lora_merge_cli.dialects.torch_names import dotted, match_names, nearest_names
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import LoraMergeError, ShapeMismatch, UnmatchedAdapter, UsageError
from lora_merge_cli.records import (
    AdapterRow,
    AdapterSite,
    AdapterSummary,
    Factor,
    KeyPath,
    LowRank,
    Scale,
    Survey,
    TensorSpec,
    first_names,
)

SCALE = Scale(1.0, "MiniMind has no alpha")

_KEY = re.compile(r"(?P<module>.+)\.lora\.(?P<factor>[AB])\.weight")


@dataclass
class _Claims:
    """An adapter's keys by what they are."""

    modules: dict[str, dict[str, TensorSpec]] = field(default_factory=dict)
    problems: list[Exception] = field(default_factory=list)

    def pairs(self) -> Iterator[tuple[str, TensorSpec, TensorSpec]]:
        """Each module that has both factors, with A and B."""
        for module, found in self.modules.items():
            if len(found) == 2:
                yield module, found["A"], found["B"]


class MiniMind(TorchModel):
    """MiniMind's spellings and rules."""

    name = "minimind"

    def matches(self, tree: Tree) -> bool:
        """See `Dialect.matches`."""
        return any(_KEY.fullmatch(dotted(path)) for path in tree.index.tensors)

    def of(self, adapter: Tree) -> MiniMind:  # noqa: ARG002  (others ask it)
        """See `AdapterDialect.of`: one for all."""
        return self

    def survey(self, subject: Subject, options: ScaleOptions) -> Survey:
        """See `Dialect.survey`."""
        if subject.adapter is None:
            return Survey((), problems=(UsageError("no adapter is given", hint="name it with --adapter"),))
        adapter, base = subject.adapter, subject.checkpoint
        claims = _claim(adapter)
        problems = [*_misused(options), *claims.problems]
        wanted = {module: f"{module}.weight" for module, _, _ in claims.pairs()}
        placed: Mapping[str, KeyPath] = {}
        try:
            placed = match_names(list(wanted.values()), base)
        except UnmatchedAdapter as error:
            return Survey((), problems=(*problems, error))
        missing = [module for module in wanted if wanted[module] not in placed]
        if missing:
            problems.append(_without_kernel(missing, adapter, base))
        sites: list[AdapterSite] = []
        for module, a, b in claims.pairs():
            target = placed.get(wanted[module])
            found = None if target is None else _site(module, base.index.tensors[target], a, b, adapter.where)
            if isinstance(found, AdapterSite):
                sites.append(found)
            elif found is not None:
                problems.append(found)
        return Survey(tuple(sites), problems=tuple(problems))

    def describe(self, adapter: Tree, options: ScaleOptions) -> AdapterSummary:
        """See `AdapterDialect.describe`."""
        claims = _claim(adapter)
        rows = tuple(
            AdapterRow(module, _rank(a), SCALE, (b.shape[0], a.shape[-1]))
            for module, a, b in claims.pairs()
            if a.shape and b.shape
        )
        return AdapterSummary("LoRA", None, rows, (), (*_misused(options), *claims.problems), (SCALE.source,))


def _claim(adapter: Tree) -> _Claims:
    """Sort the adapter's keys; every one is a factor or part of a problem."""
    claims = _Claims()
    strangers: list[str] = []
    for path, spec in adapter.index.tensors.items():
        name = dotted(path)
        match = _KEY.fullmatch(name)
        if match is None:
            strangers.append(name)
            continue
        factors = claims.modules.setdefault(match["module"], {})
        if match["factor"] in factors:
            claims.problems.append(UnmatchedAdapter("a factor that is there twice", where=f"{adapter.where} :: {name}"))
        factors[match["factor"]] = spec
    if strangers:
        whole = len(strangers) > len(adapter.index.tensors) // 2
        claims.problems.append(
            UnmatchedAdapter(
                "a whole checkpoint where an adapter is expected" if whole else "keys that are no factor of MiniMind's",
                where=f"{adapter.where} :: {first_names(strangers)}",
                expected="<module>.lora.A.weight and <module>.lora.B.weight, and nothing else",
                hint="give the file that MiniMind's save_lora writes",
            )
        )
    for module, factors in claims.modules.items():
        if len(factors) < 2:
            present, other = ("A", "B") if "A" in factors else ("B", "A")
            claims.problems.append(
                UnmatchedAdapter(
                    f"a factor without its {other}", where=f"{adapter.where} :: {module}.lora.{present}.weight"
                )
            )
    return claims


def _misused(options: ScaleOptions) -> Iterator[UsageError]:
    for flag, given in (("--lora-alpha", options.alpha), ("--rslora", options.rslora)):
        if given:
            yield UsageError(
                f"{flag} is not for MiniMind: its adapters have no alpha",
                hint=f"leave {flag} out; --scale multiplies the delta",
            )


def _without_kernel(missing: list[str], adapter: Tree, base: Tree) -> UnmatchedAdapter:
    nearest = nearest_names(f"{missing[0]}.weight", base)
    return UnmatchedAdapter(
        "factors without a weight in the base",
        where=f"{adapter.where} :: {first_names(missing)}",
        expected=f"{missing[0]}.weight in {base.where}",
        found=f"nearest {', '.join(nearest)}" if nearest else None,
    )


def _site(module: str, kernel: TensorSpec, a: TensorSpec, b: TensorSpec, where: str) -> AdapterSite | LoraMergeError:
    equation = Equation(LINEAR)
    shown = f"A {a.shape}, B {b.shape} and weight {kernel.shape}"
    sizes = equation.sizes(a.shape, b.shape, kernel.shape)
    if sizes is None or 0 in sizes.values():
        return ShapeMismatch(
            "the factors do not fit the weight",
            where=f"{where} :: {module}",
            expected="A (rank, n), B (n, rank) and weight (n, n)",
            found=shown,
        )
    if sizes["o"] != sizes["i"]:
        return ShapeMismatch(
            "an adapter on a layer that is not square: MiniMind's trainer makes none",
            where=f"{where} :: {module}",
            expected="as many inputs as outputs",
            found=shown,
            hint="see whether another trainer wrote it",
        )
    return AdapterSite(
        targets=(kernel.path,),
        operation="add_delta",
        factors={"lora_a": Factor(a.path), "lora_b": Factor(b.path)},
        parameters=LowRank(_rank(a), SCALE, equation),
        forward=LINEAR_FORWARD,
        group=GROUP,
        module=module.rsplit(".", maxsplit=1)[-1],
        label=short_name(module),
    )


def _rank(a: TensorSpec) -> int:
    return a.shape[0]
