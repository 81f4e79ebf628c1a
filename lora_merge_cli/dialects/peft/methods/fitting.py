"""What the fit of any method's factors is checked for: their shapes, and the rank that the configuration states."""

from __future__ import annotations

from collections.abc import Mapping

from lora_merge_cli.dialects.peft.methods.interface import Adapted, Weight
from lora_merge_cli.dialects.peft.patterns import rank_of
from lora_merge_cli.errors import ShapeMismatch, UnmatchedAdapter

Shape = tuple[int, ...]


def misfit(layer: Adapted, weight: Weight, expected: Mapping[str, Shape], where: str) -> ShapeMismatch | None:
    """The refusal of tensors that have other shapes than the weight asks for, or no entries.

    Args:
        layer: The module.
        weight: Its weight.
        expected: The shape of each tensor by role.
        where: The module in the adapter, for errors.
    """
    wrong = [role for role, shape in expected.items() if layer.shape(role) != shape or 0 in shape]
    if not wrong:
        return None
    return ShapeMismatch(
        "the factors do not fit the weight",
        where=where,
        expected=", ".join(f"{role} {expected[role]}" for role in wrong),
        found=f"{', '.join(f'{role} {layer.shape(role)}' for role in wrong)} and a weight {weight.shape}",
        hint="convolutions in groups are not supported"
        if weight.kind == "convolution"
        else "see that the base is the one that the adapter was trained on",
    )


def contradiction(what: str, stated: object, found: object, where: str) -> ShapeMismatch:
    """The refusal of factors that the configuration describes otherwise."""
    return ShapeMismatch(
        f"factors of another {what} than the configuration states",
        where=where,
        expected=f"{what} {stated}",
        found=f"{what} {found}",
        hint="see that adapter_config.json belongs to these weights",
    )


def wrong_rank(layer: Adapted, rank: int, where: str) -> ShapeMismatch | None:
    """The refusal of factors of another rank than the configuration states."""
    stated = rank_of(layer.config.common, layer.module)
    return None if stated in (None, rank) else contradiction("rank", stated, rank, where)


def incomplete(layer: Adapted, complete: tuple[frozenset[str], ...], title: str, where: str) -> UnmatchedAdapter | None:
    """The refusal of a module whose tensors are no whole set of the method's."""
    if frozenset(layer.tensors) in complete:
        return None
    nearest = min(complete, key=lambda roles: len(roles ^ frozenset(layer.tensors)))
    return UnmatchedAdapter(
        f"a layer without all of its factors, or with too many, for {title}",
        where=f"{where} :: {layer.module}",
        expected=", ".join(sorted(nearest)),
        found=", ".join(sorted(layer.tensors)) or "none",
    )
