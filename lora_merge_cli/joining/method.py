"""Which method joins the fine-tunes, with what weights: pure, and refused where it makes no sense."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from lora_merge_cli.errors import UsageError

Method: TypeAlias = Literal["linear", "slerp", "task-arithmetic", "ties", "dare-ties", "model-stock", "karcher"]

METHODS: tuple[Method, ...] = get_args(Method)
"""Every method's name."""

_SPARSE = ("ties", "dare-ties")
_ADDITIVE = ("linear", "task-arithmetic", *_SPARSE)
_SPHERICAL = ("slerp", "karcher")


@dataclass(frozen=True)
class Joining:
    """How to join fine-tunes T_1 ... T_n of a base B. The formulas are in the module of each method."""

    method: Method
    """One of `METHODS`."""
    weights: tuple[float, ...]
    """One per fine-tune; 1 where the user states none."""
    stated: bool = False
    """Whether the user stated any weight. ``linear`` takes 1/n each where not."""
    density: float | None = None
    """The share of the entries that ``ties`` and ``dare-ties`` keep."""
    seed: int = 0
    """What ``dare-ties`` draws from."""
    sequential: bool = False
    """Whether each fine-tune started from the one before: the deltas are ``T_1 - B`` and ``T_i - T_(i-1)``."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            UsageError: The method is unknown, or does not go with this number of fine-tunes, these weights or options.
        """
        if self.method not in METHODS:
            raise UsageError("an unknown method", expected=", ".join(METHODS), found=self.method)
        self._check_count()
        self._check_weights()
        if (self.density is not None) != (self.method in _SPARSE):
            if self.density is None:
                raise UsageError(f"{self.method} needs --density", hint="0.2 keeps a fifth of the entries, 1 all")
            raise UsageError(f"--density is for {' and '.join(_SPARSE)}", found=self.method)
        if self.density is not None and not 0 < self.density <= 1:
            raise UsageError("--density lies outside (0, 1]", found=f"{self.density:g}")
        if self.sequential and self.method not in _ADDITIVE:
            raise UsageError(f"--sequential is for {', '.join(_ADDITIVE)}", found=self.method)

    def _check_count(self) -> None:
        count = len(self.weights)
        if self.method == "slerp" and count != 2:
            raise UsageError("slerp is for exactly two fine-tunes", found=count)
        least = 2 if self.sequential or self.method in ("model-stock", "karcher") else 1
        if count < least:
            what = "--sequential" if self.sequential else self.method
            raise UsageError(f"{what} is for at least {least} fine-tune{'s'[: least - 1]}", found=count)

    def _check_weights(self) -> None:
        if not all(map(math.isfinite, self.weights)):
            raise UsageError("a weight must be a finite number", found=self._weights_in_words)
        if self.stated and self.method == "model-stock":
            raise UsageError(
                "model-stock takes no weights", found=self._weights_in_words, hint="it finds its own from the angles"
            )
        if self.method in _SPHERICAL and (min(self.weights) < 0 or not sum(self.weights) > 0):
            raise UsageError(
                f"{self.method} takes shares of a way",
                expected="weights of 0 or more with a positive sum",
                found=self._weights_in_words,
            )

    @property
    def _weights_in_words(self) -> str:
        return ", ".join(f"{weight:g}" for weight in self.weights)

    @property
    def effective(self) -> tuple[float, ...]:
        """The weights that count: ``linear`` without stated ones is the mean."""
        if self.method == "linear" and not self.stated:
            return (1 / len(self.weights),) * len(self.weights)
        return self.weights

    @property
    def is_spherical(self) -> bool:
        """Whether the method turns the fine-tunes themselves, and not what they change of the base."""
        return self.method in _SPHERICAL

    @property
    def needs_angles(self) -> bool:
        """Whether its coefficients follow from norms and angles of whole leaves."""
        return self.is_spherical or self.method == "model-stock"

    @property
    def draws(self) -> bool:
        """Whether it keeps entries at random."""
        return self.method == "dare-ties"

    @property
    def trims(self) -> bool:
        """Whether it keeps the largest entries of whole leaves."""
        return self.method == "ties" and self.density != 1
