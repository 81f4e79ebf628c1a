"""What each rounding keeps of a delta in bfloat16: the tool's own merges, and figures taken of the files that they write.

Figures are float64 NumPy of the files and the factors alone, and have to agree with what the merges report.

    python benchmarks/rounding_table.py [--quick] [--seeds N] [--out DIR]

DIR, results/ if not given, gets ``rounding.md`` and ``rounding.json``.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import describe
from rounding_table_cases import KERNEL_STD, SHAPES, Case, Checkpoint, HeadSummed, Matrix, Peft, Values
from rounding_table_page import page

from lora_merge_cli import MergeOptions, merge
from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.report import SurvivalRecord
from lora_merge_cli.rounding import Rounding

HERE = Path(__file__).parent
RANKS = (4, 8, 16, 32, 64)
SIZES = tuple(float(f"{size:.3g}") for size in np.logspace(-6, -2, 9))
SQUARE_STDS = (1e-5, 5e-5, 2e-4)
ROUGH_SIZES = (1e-5, 1e-4, 1e-3, 1e-2)
INPUTS, OUTPUTS = 2048, 512
RANK = 16
"""Where nothing else is said."""
AGREEMENT = 1e-5
"""How far a reported figure may be from the one taken here, besides that share of it: the report's sums are of float32 terms."""

ROUNDINGS: Mapping[str, Rounding] = {
    "nearest": Rounding(),
    "stochastic": Rounding("stochastic"),
    "preserve, mu 0.3": Rounding("preserve", mu=0.3),
    "preserve, mu 1": Rounding("preserve", mu=1),
    "preserve, mu 3": Rounding("preserve", mu=3),
}
FEW = {name: ROUNDINGS[name] for name in ("nearest", "stochastic", "preserve, mu 1")}
WIDE = {
    "nearest": Rounding(),
    "preserve, cell": Rounding("preserve"),
    "preserve, widened": Rounding("preserve", serving_values="widened"),
}


@dataclass(frozen=True)
class Figures:
    """What a file keeps of a delta ``d`` over the kernel ``w``: ``q`` is its kernel less w, ``e = q - d``; Frobenius norms."""

    gain: float
    """``<q, d> / <d, d>``."""
    gain_along: float
    """The same of ``U^T q`` and ``U^T d``, U an orthonormal basis of lora_a's columns."""
    error_along: float
    """``|U^T e| / |U^T d|``."""
    error: float
    """``|e| / |d|``."""
    noise: float
    """``|e|``."""
    noise_along: float
    """``|U^T e|``."""
    delta: float
    """``|d|``."""
    kernel: float
    """``|w|``."""


@dataclass(frozen=True)
class Table:
    """A checkpoint that is merged with several roundings."""

    checkpoint: Checkpoint
    roundings: Mapping[str, Rounding]
    stored: str
    """What merges store."""
    readers: Mapping[str, str]
    """What the figures are of: the file cast to a dtype, by the name of the table."""


def figures_of(kernel: Matrix, delta: Matrix, basis: Matrix, merged: Matrix) -> Figures:
    """The figures of a merged kernel; all inputs by outputs, `basis` inputs by rank, in float64."""
    realised = merged - kernel
    error = realised - delta
    along, along_error = basis.T @ delta, basis.T @ error
    squared, squared_along = float(np.sum(delta * delta)), float(np.sum(along * along))
    noise, noise_along = float(np.linalg.norm(error)), float(np.linalg.norm(along_error))
    return Figures(
        gain=float(np.sum(realised * delta)) / squared,
        gain_along=1 + float(np.sum(along_error * along)) / squared_along,
        error_along=noise_along / squared_along**0.5,
        error=noise / squared**0.5,
        noise=noise,
        noise_along=noise_along,
        delta=squared**0.5,
        kernel=float(np.linalg.norm(kernel)),
    )


def basis_of(values: Values) -> Matrix:
    """An orthonormal basis of lora_a's columns, inputs by rank, float64."""
    basis: Matrix = np.linalg.qr(values.a.astype(np.float64))[0]
    return basis


def disagreement(figures: Figures, reported: SurvivalRecord) -> float:
    """How far a report is from the figures, the worst one, as a share of what is allowed.

    Raises:
        AssertionError: It is farther than that.
    """
    pairs = (
        (figures.gain, reported.gain),
        (figures.gain_along, reported.gain_along_inputs),
        (figures.error_along, reported.error_along_inputs),
        (figures.error, reported.relative_error),
    )
    worst = 0.0
    for found, said in pairs:
        assert said is not None, "no delta is zero"
        worst = max(worst, abs(found - said) / (AGREEMENT * (1 + abs(found))))
    assert worst <= 1, f"the report says {reported}, its file {figures}"
    return worst


def measure(table: Table) -> Iterator[tuple[tuple[str, Case, str], Figures, float]]:
    """Merge with every rounding; by table, case and rounding the figures, and how far the report is from them."""
    with tempfile.TemporaryDirectory(prefix="rounding-") as place:
        root = Path(place)
        table.checkpoint.write(root)
        merged, said = {}, {}
        for name, rounding in table.roundings.items():
            output = root / "merged"
            asked = dataclasses.replace(rounding, seed=table.checkpoint.seed)
            options = MergeOptions(dtype=table.stored, rounding=asked, serving_dtype=table.checkpoint.dtype)
            report = merge(table.checkpoint.request(root, output, options))
            merged[name] = table.checkpoint.merged(output)
            said[name] = table.checkpoint.survival(report)
            output.rename(root / f"merged-{len(merged)}")
        for case, values in table.checkpoint.values():
            kernel, delta, basis = values.kernel.astype(np.float64), values.delta, basis_of(values)
            for name, kernels in merged.items():
                for reader, dtype in table.readers.items():
                    read = kernels[case.name].astype(dtype_named(dtype)).astype(np.float64)
                    figures = figures_of(kernel, delta, basis, read)
                    reported = next(each for each in said[name][case.name] if each.dtype == dtype)
                    yield (reader, case, name), figures, disagreement(figures, reported)


def tables(seed: int, *, quick: bool) -> Iterator[Table]:
    """What is merged with one seed."""
    # One shape and rank for nearly all: what takes long with small kernels is compiling.
    inputs, outputs = (512, 64) if quick else (INPUTS, OUTPUTS)
    ranks, sizes, steps = ((RANK,), SIZES[::4], 2) if quick else (RANKS, SIZES, 1)
    grid = [Case(inputs, outputs, rank, size) for rank in ranks for size in sizes]
    line = [case for case in grid if case.rank == RANK]
    rough = [
        Case(64 if shape == "64 inputs" else inputs, outputs, RANK, size, shape)
        for shape in SHAPES
        for size in ROUGH_SIZES[::steps]
    ]
    square = [Case(inputs, outputs if quick else inputs, RANK, std / KERNEL_STD) for std in SQUARE_STDS]
    peft = Peft(square, seed, "bfloat16")
    wide = dataclasses.replace(peft, cases=line)
    yield Table(peft, ROUNDINGS, "bfloat16", {"square": "bfloat16"})
    yield Table(dataclasses.replace(peft, cases=grid), ROUNDINGS, "bfloat16", {"grid": "bfloat16"})
    yield Table(dataclasses.replace(peft, cases=rough), FEW, "bfloat16", {"shapes": "bfloat16"})
    yield Table(Peft(line, seed, "float16"), FEW, "float16", {"float16": "float16"})
    yield Table(Peft(line, seed, "bfloat16", inputs_first=True), FEW, "bfloat16", {"inputs first": "bfloat16"})
    yield Table(HeadSummed(line, seed, "bfloat16"), FEW, "bfloat16", {"heads": "bfloat16"})
    yield Table(wide, WIDE, "float32", {"float32, served": "bfloat16", "float32, read": "float32"})


def medians(found: Sequence[Figures]) -> Figures:
    """Figure by figure."""
    names = [field.name for field in dataclasses.fields(Figures)]
    return Figures(**{name: statistics.median(getattr(each, name) for each in found) for name in names})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--quick", action="store_true", help="small kernels, few of them, one seed")
    parser.add_argument("--seeds", type=int, metavar="N", help="3 if not given")
    parser.add_argument("--out", type=Path, metavar="DIR", help="results/ if not given, data/rounding if quick")
    options = parser.parse_args()
    seeds = range(options.seeds or (1 if options.quick else 3))
    collected: dict[tuple[str, Case, str], list[Figures]] = {}
    farthest = 0.0
    started = time.perf_counter()
    for seed in seeds:
        for table in tables(seed, quick=options.quick):
            for key, figures, off in measure(table):
                collected.setdefault(key, []).append(figures)
                farthest = max(farthest, off)
            done = ", ".join(table.readers)
            print(f"seed {seed}: {done}: {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    document = {
        "machine": describe(HERE),
        "seconds": round(time.perf_counter() - started),
        "seeds": len(seeds),
        "farthest_of_allowed": farthest,
        "rows": [
            {"table": table, "rounding": rounding}
            | dataclasses.asdict(case)
            | {name: float(f"{value:.6g}") for name, value in dataclasses.asdict(medians(found)).items()}
            for (table, case, rounding), found in collected.items()
        ],
    }
    text = page(document)
    out: Path = options.out or HERE / ("data/rounding" if options.quick else "results")
    out.mkdir(parents=True, exist_ok=True)
    (out / "rounding.json").write_text(json.dumps(document, indent=1) + "\n")
    (out / "rounding.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
