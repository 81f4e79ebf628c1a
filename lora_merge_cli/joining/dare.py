"""DARE: drop entries of what each fine-tune changes at random, and rescale the rest; then elect signs as TIES does.

Yu et al., arXiv:2311.03099, section 3.2, joined as in mergekit 0.1.5's ``dare_ties`` (``generalized_task_arithmetic.py``) but with
the paper's rescaling, where mergekit by default scales what is left to the L1 norm that ``d_i`` had: each entry of
``d_i = T_i - B`` is kept with probability `density` and divided by it, the sign of ``sum of w_i d_i`` is elected, 0 counting as
plus, and ``W = B + sum of w_i d_i`` over those that have that sign. Nothing is divided by the weights.

The lottery of an entry depends on the seed, the leaf's name, the number of the fine-tune and the entry's place alone, see `draws`:
fine-tunes in another order draw other entries.
"""

from __future__ import annotations

import dataclasses

from lora_merge_cli.draws import tensor_name
from lora_merge_cli.joining.recipe import Draw, Recipe, Term


def dare_ties(terms: tuple[Term, ...], name: str, density: float) -> Recipe:
    """The recipe of a leaf.

    Args:
        terms: All differences with their weights.
        name: The leaf's name, the same in whatever file it is.
        density: The probability that an entry is kept.
    """
    if density == 1:
        return Recipe(0, terms, election="sum")
    drawn = (
        dataclasses.replace(term, weight=term.weight / density, kept=Draw(tensor_name(name, term.number - 1), density))
        for term in terms
    )
    return Recipe(0, tuple(drawn), election="sum")
