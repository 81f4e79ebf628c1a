"""Weighted sums of what fine-tunes change: model soups and task arithmetic.

Model soups (Wortsman et al., arXiv:2203.05482, section 2) average fine-tunes of one base: ``B + sum of w_i (T_i - B)`` with
``w_i = 1/n``, or with the user's weights as they are: they are not made to sum to 1. Task arithmetic (Ilharco et al.,
arXiv:2212.04089, section 2) adds task vectors: the same formula with weights 1.

With ``--sequential`` the differences are ``T_1 - B`` and ``T_i - T_(i-1)``; with weights 1 they add up to the last fine-tune.
"""

from __future__ import annotations

from lora_merge_cli.joining.recipe import Recipe, around_base


def linear(weights: tuple[float, ...], origins: tuple[int, ...], *, sequential: bool) -> Recipe:
    """The recipe of a leaf.

    Args:
        weights: One per fine-tune.
        origins: Whose values count for each tensor; see `recipe.around_base`.
        sequential: Whether each fine-tune started from the one before.
    """
    return Recipe(0, around_base(weights, origins, sequential=sequential))
