"""The fine-tunes of ``interpolate`` with their weights, and the method that joins several."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_merge_cli._cli.parsing import parse_adapters, states_weight
from lora_merge_cli.errors import UsageError
from lora_merge_cli.joining.method import METHODS, Joining

if TYPE_CHECKING:
    from lora_merge_cli.fine_tunes import JoinRequest


def parse_fine_tunes(
    texts: Sequence[str] | None, method: str | None, density: float | None, seed: int, *, sequential: bool
) -> tuple[Path | None, JoinRequest | None]:
    """One fine-tune, or several and how to join them.

    Args:
        texts: The values of ``TUNED``: a path, or a path and its weight after an ``@`` that a number follows.
        method: The value of ``--method``.
        density: The value of ``--density``.
        seed: The value of ``--seed``.
        sequential: Whether ``--sequential`` was given.

    Raises:
        UsageError: Several fine-tunes and no method, a method and no fine-tune, or values that make no sense together.
    """
    stated = any(map(states_weight, texts or ()))
    if method is None:
        for flag, given in (("--density", density is not None), ("--seed", seed != 0), ("--sequential", sequential)):
            if given:
                raise UsageError(f"{flag} is for --method", expected=f"--method {', '.join(METHODS)}")
        if not texts:
            return None, None
        if len(texts) == 1 and not stated:
            return Path(texts[0]), None
        if len(texts) > 1:
            raise UsageError(
                f"{len(texts)} fine-tunes, and nothing says how to join them",
                expected=f"--method {', '.join(METHODS)}",
            )
        method = "linear"
    if not texts:
        raise UsageError(f"--method {method} joins fine-tunes", expected="BASE TUNED TUNED ...", found="no TUNED")

    from lora_merge_cli.fine_tunes import JoinRequest

    tuned = parse_adapters(texts)
    chosen = next(known for known in METHODS if known == method)
    weights = tuple(choice.weight for choice in tuned)
    return None, JoinRequest(tuned, Joining(chosen, weights, stated, density, seed, sequential))


def parse_judged(
    texts: Sequence[str], method: str | None, density: float | None, seed: int, *, sequential: bool
) -> tuple[Path | None, JoinRequest | None]:
    """What a result is judged against: one checkpoint, or several and how they were joined.

    Args:
        texts: The values of ``--against``; paths with a weight only where there is a method.
        method: The value of ``--method``.
        density: The value of ``--density``, which without a method is for ``--combine``.
        seed: The value of ``--seed``, likewise.
        sequential: Whether ``--sequential`` was given.

    Raises:
        UsageError: See `parse_fine_tunes`.
    """
    if method is None and not sequential:
        density, seed = None, 0
    return parse_fine_tunes(texts, method, density, seed, sequential=sequential)
