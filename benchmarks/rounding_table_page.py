"""The tables of a rounding benchmark, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from rounding_table_cases import KERNEL_STD, SHAPES

Row = Mapping[str, Any]

MAIN = "preserve, mu 1"
PRESERVING = ("preserve, mu 0.3", MAIN, "preserve, mu 3")
OTHERS = ("stochastic", *PRESERVING)
PROTOTYPE = {
    (1e-5, "nearest"): "0.293 / 0.710 / 0.018",
    (1e-5, "stochastic"): "1.001 / 0.226 / 0.051",
    (1e-5, MAIN): "0.984 / 0.024 / 0.032",
    (5e-5, "nearest"): "0.884 / 0.134 / 0.055",
    (5e-5, "stochastic"): "1.001 / 0.076 / 0.087",
    (5e-5, MAIN): "0.998 / 0.0064 / 0.066",
    (2e-4, "nearest"): "1.000 / 0.0146 / 0.068",
    (2e-4, MAIN): "1.000 / 0.0017 / 0.078",
}
"""Gain, error along the inputs and noise of the plain prototype that the method was chosen by, by the delta's std."""


def page(document: Mapping[str, Any]) -> str:
    """Everything as tables."""
    machine = "; ".join(f"{name}: {value}" for name, value in document["machine"].items())
    rows: Sequence[Row] = document["rows"]
    parts = (_opening(document), _square, _grid, _ranks, _worst, _worth, _shapes, _layouts, _wide)
    lines = [machine, ""]
    for part in parts:
        lines += [*(part if isinstance(part, list) else part(rows)), ""]
    return "\n".join(lines[:-1]) + "\n"


def _opening(document: Mapping[str, Any]) -> list[str]:
    return [
        f"Medians of {document['seeds']} {'seeds' if document['seeds'] > 1 else 'seed'}; {document['seconds']} s. `w` is the kernel, std {KERNEL_STD} unless said otherwise, "
        "`d` the adapter's delta, `q` the merged kernel less `w`, `e = q - d`, U an orthonormal basis of lora_a's columns.",
        "",
        "- gain: `<q, d> / <d, d>`; error along the inputs: `|U^T e| / |U^T d|`; noise: `|e|`, Frobenius.",
        "- All figures are float64 NumPy of the written files. What the merges reported agrees everywhere: the farthest figure is at "
        f"{document['farthest_of_allowed']:.2g} of the allowed 1e-5 (1 + figure).",
    ]


def _square(rows: Sequence[Row]) -> Iterator[str]:
    found = _of(rows, "square")
    first = found[0]
    yield f"## A {first['inputs']} x {first['outputs']} bfloat16 kernel, rank {first['rank']}"
    yield ""
    yield "The last column is the same of the method's first prototype, at 2048 x 2048."
    yield ""
    yield from _header(
        "delta std",
        "rounding",
        "gain",
        "error along the inputs",
        "noise",
        "noise / nearest's",
        "noise / `\\|d\\|`",
        "prototype",
    )
    for row in found:
        std = row["size"] * KERNEL_STD
        nearest = _beside(found, row, "nearest")
        said = next(
            (
                text
                for (size, name), text in PROTOTYPE.items()
                if (f"{size:.0e}", name) == (f"{std:.0e}", row["rounding"])
            ),
            "",
        )
        yield _line(
            f"{std:.0e}",
            row["rounding"],
            _number(row["gain"]),
            _number(row["error_along"]),
            _number(row["noise"]),
            _number(row["noise"] / nearest["noise"]),
            _number(row["error"]),
            said,
        )


def _grid(rows: Sequence[Row]) -> Iterator[str]:
    found = _of(rows, "grid")
    first = found[0]
    ranks = sorted({row["rank"] for row in found})
    yield f"## From the least delta to the largest: {first['inputs']} inputs, {first['outputs']} outputs, medians over ranks {_spell(ranks)}"
    yield ""
    yield "Gain, then error along the inputs:"
    yield ""
    names = ("nearest", *OTHERS)
    yield from _header("`\\|d\\| / \\|w\\|`", *names)
    for size in _sizes(found):
        yield _line(
            f"{size:.2g}",
            *(
                f"{_number(_median(found, size, name, 'gain'))}, {_number(_median(found, size, name, 'error_along'))}"
                for name in names
            ),
        )
    yield ""
    yield "Noise, as a share of `|w|` to nearest, then beside nearest's:"
    yield ""
    yield from _header("`\\|d\\| / \\|w\\|`", *names)
    for size in _sizes(found):
        nearest = _median(found, size, "nearest", "noise")
        kernel = _median(found, size, "nearest", "kernel")
        ratios = (f"{_number(_median(found, size, name, 'noise') / nearest)} x" for name in OTHERS)
        yield _line(f"{size:.2g}", f"{nearest / kernel:.2e}", *ratios)


def _ranks(rows: Sequence[Row]) -> Iterator[str]:
    found = _of(rows, "grid")
    ranks = sorted({row["rank"] for row in found})
    yield f"## By rank: error along the inputs of `{MAIN}`, and how many times less than nearest's"
    yield ""
    yield from _header("`\\|d\\| / \\|w\\|`", *(f"rank {rank}" for rank in ranks))
    for size in _sizes(found):
        cells = []
        for row in _where(found, size=size, rounding=MAIN):
            cells.append(f"{_number(row['error_along'])}, {_times(_improvement(found, row))}")
        yield _line(f"{size:.2g}", *cells)


def _worst(rows: Sequence[Row]) -> Iterator[str]:
    yield "## The worst case"
    yield ""
    for name, table in (("normally distributed values", "grid"), ("unfavourable shapes", "shapes")):
        found = _of(rows, table)
        kept = _where(found, rounding=MAIN)
        largest = max(kept, key=lambda row: row["error_along"])
        least = min(kept, key=lambda row, found=found: _improvement(found, row))
        nearest = _beside(found, largest, "nearest")
        yield (
            f"- {name}, largest error along the inputs of `{MAIN}`: {_number(largest['error_along'])} ({_case(largest)}), where "
            f"nearest has {_number(nearest['error_along'])}"
        )
        yield (
            f"- {name}, least improvement over nearest: {_times(_improvement(found, least))} ({_case(least)}), "
            f"{_number(least['error_along'])} for {_number(_beside(found, least, 'nearest')['error_along'])}"
        )
    beaten = [row for row in rows if row["rounding"] in PRESERVING and _improvement(rows, row) < 1]
    yield f"- cases of any table in which `preserve` has a larger error along the inputs than nearest: {len(beaten)}"
    small = [row for row in _where(_of(rows, "grid"), rounding=MAIN) if row["error_along"] > 0.05]
    if small:
        worst_rank = {
            rank: max(row["size"] for row in small if row["rank"] == rank) for rank in {row["rank"] for row in small}
        }
        spelled = ", ".join(f"{size:.2g} at rank {rank}" for rank, size in sorted(worst_rank.items()))
        yield f"- `{MAIN}` leaves an error above 5% along the inputs up to `|d| / |w|` of {spelled}; above that, none"


def _worth(rows: Sequence[Row]) -> Iterator[str]:
    found = _of(rows, "grid")
    yield "## Where it is not worth it"
    yield ""
    yield (
        "Nearest has the least `|e|` there can be, entry by entry. For inputs that are alike in all directions, `x ~ N(0, I)`, the "
        "mean square of the output's error is `|e|^2`: there every other rounding loses, at every size and rank, by the square of the "
        "ratios above. What counts is how much stronger inputs are along lora_a's columns than across them. The table has the ratio "
        "of their mean squares per direction from which on a rounding has less error in the output than nearest, "
        "`(across(e) - across(nearest)) / (along(nearest) - along(e))` of squared errors; and, behind it, the share of the inputs' "
        "energy that lies along the columns then. Medians over the ranks."
    )
    yield ""
    yield from _header("`\\|d\\| / \\|w\\|`", *OTHERS)
    for size in _sizes(found):
        cells = []
        for name in OTHERS:
            chosen = _where(found, size=size, rounding=name)
            ratio = statistics.median(crossover(_beside(found, row, "nearest"), row) for row in chosen)
            share = statistics.median(
                energy_share(crossover(_beside(found, row, "nearest"), row), row) for row in chosen
            )
            cells.append("never" if ratio == float("inf") else f"{_number(ratio)} x, {100 * share:.2g}%")
        yield _line(f"{size:.2g}", *cells)
    main = _where(found, rounding=MAIN)
    ratios = [crossover(_beside(found, row, "nearest"), row) for row in main]
    yield ""
    yield (
        f"- `{MAIN}`: the ratio is from {_number(min(ratios))} ({_case(main[ratios.index(min(ratios))])}) to "
        f"{_number(max(ratios))} ({_case(main[ratios.index(max(ratios))])})"
    )
    little = [row["size"] for row in _where(found, rounding="nearest") if row["error_along"] > 0.01]
    yield (
        f"- above `|d| / |w|` = {max(little):.2g} nearest itself has an error of at most 1% along the inputs: little is left to gain"
        if max(little) < max(_sizes(found))
        else "- nearest has an error above 1% along the inputs even at the largest size here, for some ranks"
    )


def _shapes(rows: Sequence[Row]) -> Iterator[str]:
    found = _of(rows, "shapes")
    sizes = _sizes(found)
    yield f"## Unfavourable shapes, rank {found[0]['rank']}: error along the inputs, nearest and `{MAIN}`, and noise beside nearest's"
    yield ""
    yield from _header("shape", *(f"`\\|d\\| / \\|w\\|` {size:.0e}" for size in sizes))
    for shape, what in SHAPES.items():
        yield _line(f"{shape}: {what}", *_pairs(_where(found, shape=shape), sizes))


def _layouts(rows: Sequence[Row]) -> Iterator[str]:
    names = {
        "grid": "bfloat16, (out, in)",
        "inputs first": "bfloat16, (in, out)",
        "heads": "bfloat16, pi0's attention output: inputs are 8 heads together",
        "float16": "float16, (out, in)",
    }
    rank = _of(rows, "heads")[0]["rank"]
    sizes = _sizes(_of(rows, "heads"))
    yield f"## Layouts and dtypes, rank {rank}: error along the inputs, nearest and `{MAIN}`, and noise beside nearest's"
    yield ""
    yield from _header("`\\|d\\| / \\|w\\|`", *names.values())
    columns = [list(_pairs(_where(_of(rows, table), rank=rank), sizes)) for table in names]
    for size, *cells in zip(sizes, *columns, strict=True):
        yield _line(f"{size:.2g}", *cells)


def _wide(rows: Sequence[Row]) -> Iterator[str]:
    served, read = _of(rows, "float32, served"), _of(rows, "float32, read")
    names = ("nearest", "preserve, cell", "preserve, widened")
    yield f"## A float32 file that a server casts to bfloat16, rank {served[0]['rank']}"
    yield ""
    yield "Error along the inputs and `|e| / |d|`, for the server and for a reader of the float32 file."
    yield ""
    yield from _header("`\\|d\\| / \\|w\\|`", *(f"{name}: {who}" for name in names for who in ("server", "reader")))
    for size in _sizes(served):
        cells = []
        for name in names:
            for table in (served, read):
                (row,) = _where(table, size=size, rounding=name)
                cells.append(f"{_number(row['error_along'])}, {_number(row['error'])}")
        yield _line(f"{size:.2g}", *cells)


def crossover(nearest: Row, other: Row) -> float:
    """How many times stronger, in mean square per direction, inputs must be along U than across it for `other` to win; or inf."""
    along = nearest["noise_along"] ** 2 - other["noise_along"] ** 2
    across = other["noise"] ** 2 - nearest["noise"] ** 2 + along
    return across / along if along > 0 else float("inf")


def energy_share(ratio: float, row: Row) -> float:
    """The share of the inputs' energy along U at such a ratio."""
    if ratio == float("inf"):
        return 1.0
    rank, inputs = row["rank"], row["inputs"]
    return float(ratio * rank / (ratio * rank + inputs - rank))


def _pairs(found: Sequence[Row], sizes: Iterable[float]) -> Iterator[str]:
    for size in sizes:
        (nearest,) = _where(found, size=size, rounding="nearest")
        (kept,) = _where(found, size=size, rounding=MAIN)
        ratio = _number(kept["noise"] / nearest["noise"])
        yield f"{_number(nearest['error_along'])}, {_number(kept['error_along'])}; {ratio} x"


def _of(rows: Sequence[Row], table: str) -> list[Row]:
    return _where(rows, table=table)


def _where(rows: Sequence[Row], **values: Any) -> list[Row]:
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


_CASE = ("table", "inputs", "outputs", "rank", "size", "shape")


def _beside(rows: Sequence[Row], row: Row, rounding: str) -> Row:
    """The same case, rounded otherwise."""
    (found,) = _where(rows, rounding=rounding, **{name: row[name] for name in _CASE})
    return found


def _improvement(rows: Sequence[Row], row: Row) -> float:
    return float(_beside(rows, row, "nearest")["error_along"] / row["error_along"])


def _sizes(rows: Sequence[Row]) -> list[float]:
    return sorted({row["size"] for row in rows})


def _median(rows: Sequence[Row], size: float, rounding: str, name: str) -> float:
    return statistics.median(row[name] for row in _where(rows, size=size, rounding=rounding))


def _case(row: Row) -> str:
    shape = f"{row['shape']}, " if row["shape"] else ""
    return f"{shape}rank {row['rank']}, `|d| / |w|` {row['size']:.2g}"


def _header(*names: str) -> Iterator[str]:
    yield _line(*names)
    yield _line(*("---" for _ in names))


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float) -> str:
    return f"{value:.3f}" if 0.1 <= value < 10 else f"{value:.2g}" if value < 0.1 else f"{value:.3g}"


def _times(value: float) -> str:
    return f"{value:.1f} x" if value < 100 else f"{value:.0f} x"


def _spell(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))
