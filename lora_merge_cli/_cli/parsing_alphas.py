"""The values of ``--alpha``, ``--alpha-for`` and ``--alpha-schedule``."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from lora_merge_cli.errors import UsageError
from lora_merge_cli.mixing import Override, Schedule

MOST_ALPHAS = 1000
"""More outputs nobody asks for on purpose."""

# Bounded on every side: each number is finite as a float, and no range takes long to count.
_NUMBER = re.compile(r"[+-]?(?:\d{1,50}(?:\.\d{0,50})?|\.\d{1,50})(?:e[+-]?\d{1,2})?", re.ASCII | re.IGNORECASE)
_ALPHA = "a number such as 0.5, or start:stop:step such as 0:1:0.25"


def parse_alphas(texts: Sequence[str]) -> tuple[float, ...]:
    """The values of ``--alpha``, ascending, each once.

    Args:
        texts: Numbers, and ranges ``start:stop:step``. A range is counted in decimal: ``0:1:0.1`` holds 0.3 and, since it is
            hit, 1.

    Raises:
        UsageError: One is neither, a range leads nowhere, or there are more than `MOST_ALPHAS`.
    """
    if not texts:
        raise UsageError("no --alpha", expected=_ALPHA, hint="0 is BASE, 1 is TUNED")
    alphas = {alpha for text in texts for alpha in _values(text)}
    if len(alphas) > MOST_ALPHAS:
        raise UsageError("--alpha asks for too many outputs", expected=f"at most {MOST_ALPHAS}", found=len(alphas))
    return tuple(sorted(alphas))


def parse_one_alpha(texts: Sequence[str]) -> float:
    """The value of an ``--alpha`` of which there is one.

    Raises:
        UsageError: There are several, or it is no number.
    """
    if len(texts) != 1:
        raise UsageError("--alpha is of one result", expected="one number", found=", ".join(texts))
    return float(_number("--alpha", texts[0], texts[0], "one number such as 0.5"))


def parse_override(text: str) -> Override:
    """A value of ``--alpha-for``, ``GLOB=VALUE``; a glob may itself hold an ``=``.

    Raises:
        UsageError: It has another form.
    """
    expected = "GLOB=VALUE, as in 'PaliGemma/img/**=0'"
    glob, _, value = text.rpartition("=")
    if not glob:
        raise UsageError("--alpha-for names no leaves", expected=expected, found=repr(text))
    return Override(glob, float(_number("--alpha-for", value, text, expected)))


def parse_schedule(text: str) -> Schedule:
    """The value of ``--alpha-schedule``, ``layer=FIRST:LAST``.

    Raises:
        UsageError: It has another form.
    """
    expected = "layer=FIRST:LAST, as in layer=0.2:0.9"
    along, _, ends = text.partition("=")
    parts = ends.split(":")
    if along != "layer" or len(parts) != 2:
        raise UsageError("--alpha-schedule has another form", expected=expected, found=repr(text))
    first, last = (float(_number("--alpha-schedule", part, text, expected)) for part in parts)
    return Schedule(first, last)


def _values(text: str) -> list[float]:
    parts = text.split(":")
    if len(parts) not in (1, 3):
        raise UsageError("--alpha is neither a number nor a range", expected=_ALPHA, found=repr(text))
    numbers = [_number("--alpha", part, text, _ALPHA) for part in parts]
    return [float(alpha) for alpha in (numbers if len(numbers) == 1 else _range(numbers, text))]


def _range(numbers: Sequence[Fraction], text: str) -> list[Fraction]:
    start, stop, step = numbers
    if step == 0:
        raise UsageError("--alpha has a step of zero", expected=_ALPHA, found=text)
    steps = (stop - start) / step
    if steps < 0:
        sign = "below" if stop < start else "above"
        raise UsageError("the step of --alpha leads away from its stop", expected=f"a step {sign} zero", found=text)
    if steps >= MOST_ALPHAS:
        raise UsageError("--alpha asks for too many outputs", expected=f"at most {MOST_ALPHAS}", found=text)
    return [start + number * step for number in range(math.floor(steps) + 1)]


def _number(flag: str, part: str, text: str, expected: str) -> Fraction:
    if not _NUMBER.fullmatch(part):
        raise UsageError(f"{flag} needs a finite number", expected=expected, found=repr(text))
    return Fraction(part)
