"""All cases."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import commands
from cases import Case, Input, Row, Target

DATA = Path(__file__).parent / "data"

_PI0, _LLAMA = "make_pi0.py", "make_llama.py"
_SMALLER = ("--divide", "4", "--layers", "6")
_HALF = ("--divide", "2")

Size = Literal["small", "full"]


def _pi0(folder: str, *flags: str) -> Input:
    return Input(DATA / folder / "29999", _PI0, flags)


_FULL = _pi0("pi0_lora")
_FULL_LAYERS = _pi0("pi0_lora_layers", "--layer-chunks")
_FULL_BASE = _pi0("pi0_base", "--base")
_FULL_EXPERT = _pi0("pi0_lora_expert", "--expert-only")
_SMALL = _pi0("small_pi0_lora", *_SMALLER)
_SMALL_BASE = _pi0("small_pi0_base", *_SMALLER, "--base")
_BIG_LLAMA = Input(DATA / "llama", _LLAMA)
_SMALL_LLAMA = Input(
    DATA / "small_llama", _LLAMA, ("--layers", "8", "--hidden", "1024", "--inner", "2816", "--shard-bytes", "100000000")
)

_SAMPLED = ("--sample", "2")
_ROOM = 0.1  # GiB; peaks of equal runs were seen to differ by half of it


def outputs(case: str) -> Path:
    """Where a case's outputs go."""
    return DATA / "outputs" / case


def _beside_copy(case: str, given: Input, *flags: str) -> tuple[Row, ...]:
    merged = outputs(case) / "merged"
    return commands.merge(given.path, merged, *flags), commands.copy(merged, outputs(case) / "copy")


def _with_proofs(case: str, given: Input, *flags: str) -> tuple[Row, ...]:
    merged, copied = outputs(case) / "merged", outputs(case) / "copy"
    return (
        *_beside_copy(case, given, *flags),
        commands.verify(merged, given.path),
        commands.verify(merged, given.path, *_SAMPLED),
        commands.diff(merged, copied),
    )


def _sweep(case: str, given: Input, base: Input) -> tuple[Row, ...]:
    # One place for both: five outputs of full size beside others would not fit a small disk.
    place = outputs(case) / "interpolated"
    return (
        commands.interpolate(base.path, given.path, place, "one alpha", "--alpha", "0.5", "--dtype", "keep"),
        commands.interpolate(base.path, given.path, place, "five alphas", "--alpha", "0:1:0.25", "--dtype", "keep"),
    )


def _extract(case: str, given: Input, base: Input) -> tuple[Row, ...]:
    merged, place = outputs(case) / "merged", outputs(case) / "adapter"
    return (
        commands.copy(given.path, outputs(case) / "copy"),
        commands.extract(given.path, base.path, place, "adapters inside"),
        commands.merge(given.path, merged),
        commands.extract(merged, base.path, place, "dense, --rank 16", "--rank", "16"),
    )


def _roundings(case: str, checkpoint: Path, adapter: Path | None, *flags: str) -> tuple[Row, ...]:
    # Each takes the place of the one before; the last one is verified.
    merged = outputs(case) / "merged"
    rows = {
        method: commands.merge(checkpoint, merged, *flags, "--rounding", method, adapter=adapter)
        for method in ("nearest", "stochastic", "preserve")
    }
    verified = commands.verify(merged, checkpoint, "--rounding", "preserve", adapter=adapter)
    return (*(Row(name, row.command, row.reads, row.writes) for name, row in rows.items()), verified)


def _rounding_case(name: str, title: str, given: Input, rows: Callable[[], tuple[Row, ...]]) -> Case:
    targets = (Target("preserve", "wall", 0, 2.0, "nearest"), Target("preserve", "peak", 2.5))
    return Case(name, "full", title, 3, rows, (given,), "nearest", targets)


def _llama(case: str, given: Input, *, peft: bool) -> tuple[Row, ...]:
    base, adapter, merged = given.path / "base", given.path / "adapter", outputs(case) / "merged"
    return (
        commands.merge(base, merged, adapter=adapter),
        commands.copy(merged, outputs(case) / "copy"),
        commands.verify(merged, base, adapter=adapter),
        *(commands.peft(base, adapter, outputs(case) / "peft") if peft else ()),
    )


def _pi0_case(name: str, title: str, given: Input, flags: tuple[str, ...], *targets: Target) -> Case:
    return Case(name, "full", title, 5, partial(_beside_copy, name, given, *flags), (given,), "cp -r", targets)


def _startup(size: Size, name: str, given: Input, runs: int) -> Case:
    return Case(
        name,
        size,
        "Start-up",
        runs,
        partial(commands.startup, given.path),
        (given,),
        "python",
        (
            Target("--help", "wall", 0.25, 1, "python"),
            Target("--version", "wall", 0.25, 1, "python"),
            Target("inspect", "wall", 0.3, 1, "inspect's imports"),
        ),
    )


def _memory() -> Case:
    """Peak memory of merges that differ in nothing but the number of layers, or of leaves."""
    trees = {
        f"{layers} layers, {chunked}": _pi0(f"memory_{layers}_{folder}", *_HALF, "--layers", str(layers), *flags)
        for chunked, folder, flags in (
            ("layer chunks", "layers", ("--layer-chunks",)),
            ("trainer's chunks", "trainer", ()),
        )
        for layers in (9, 18, 36)
    }
    sizes = ("--hidden", "512", "--inner", "1024", "--vocabulary", "8000")
    models = {
        f"{9 * layers + 3} leaves": Input(DATA / f"memory_{layers}_blocks", _LLAMA, ("--layers", str(layers), *sizes))
        for layers in (22, 222)
    }

    def rows() -> tuple[Row, ...]:
        merges = {
            **{
                name: commands.merge(given.path, outputs("memory") / "merged", "--dtype", "keep")
                for name, given in trees.items()
            },
            **{
                name: commands.merge(given.path / "base", outputs("memory") / "merged", adapter=given.path / "adapter")
                for name, given in models.items()
            },
        }
        return tuple(Row(name, row.command, row.reads, row.writes) for name, row in merges.items())

    few, many = models
    return Case(
        "memory",
        "full",
        "Peak memory by the number of layers and of leaves (pi0 at half the width; a narrow Llama)",
        2,
        rows,
        (*trees.values(), *models.values()),
        None,
        (
            *(
                Target(f"36 layers, {chunked}", "peak", _ROOM, 1, f"9 layers, {chunked}")
                for chunked in ("layer chunks", "trainer's chunks")
            ),
            Target(many, "peak", _ROOM, 1, few),
        ),
    )


CASES = (
    Case(
        "full-keep",
        "full",
        "Full-size pi0 LoRA, Orbax to Orbax, `--dtype keep`",
        5,
        partial(_with_proofs, "full-keep", _FULL, "--dtype", "keep"),
        (_FULL,),
        "cp -r",
        (
            Target("merge", "wall", 0, 2.0, "cp -r"),
            Target("merge", "peak", 2.5),
            Target("verify", "wall", 0, 3.0, "merge"),
            Target("verify", "peak", 2.5),
            Target("verify --sample 2", "wall", 0, 1.0, "merge"),
            Target("verify --sample 2", "peak", 2.5),
        ),
    ),
    _pi0_case(
        "full-auto",
        "The same, float32 where fused (`--dtype auto`)",
        _FULL,
        (),
        Target("merge", "wall", 0, 2.5, "cp -r"),
        Target("merge", "wall", 0, 2.0, "cp -r", stretch=True),
        Target("merge", "peak", 2.5),
    ),
    _pi0_case(
        "layers-keep",
        "The same tree with a layer per chunk, `--dtype keep`",
        _FULL_LAYERS,
        ("--dtype", "keep"),
        Target("merge", "wall", 0, 1.7, "cp -r"),
        Target("merge", "peak", 1.0),
    ),
    _pi0_case(
        "expert-keep",
        "Adapters on the action expert alone, `--dtype keep`",
        _FULL_EXPERT,
        ("--dtype", "keep"),
        Target("merge", "wall", 0, 1.3, "cp -r"),
        Target("merge", "peak", 1.0),
    ),
    Case(
        "sweep",
        "full",
        "Interpolation between full-size pi0 and its LoRA fine-tune, `--dtype keep`",
        3,
        partial(_sweep, "sweep", _FULL, _FULL_BASE),
        (_FULL, _FULL_BASE),
        "one alpha",
        (
            Target("five alphas", "wall", 0, 2.5, "one alpha"),
            Target("five alphas", "peak", 0.5, 1, "one alpha"),
        ),
    ),
    Case(
        "extract",
        "full",
        "An adapter out of a full-size pi0 LoRA fine-tune, and out of its merged result",
        3,
        partial(_extract, "extract", _FULL, _FULL_BASE),
        (_FULL, _FULL_BASE),
        "cp -r",
        (),
    ),
    Case(
        "llama",
        "full",
        "Llama-shaped, 1.1 B parameters, bfloat16 in 3 shards, rank 16 on every linear layer",
        5,
        partial(_llama, "llama", _BIG_LLAMA, peft=True),
        (_BIG_LLAMA,),
        "cp -r",
        (
            Target("merge", "wall", 1.5, 1.5, "cp -r"),
            Target("merge", "peak", 0.5),
            Target("merge", "wall", 0, 1 / 5, "peft"),
            Target("merge", "peak", 0, 1 / 5, "peft"),
        ),
    ),
    _rounding_case(
        "rounding",
        "Full-size pi0 LoRA, `--dtype keep`, by rounding",
        _FULL,
        partial(_roundings, "rounding", _FULL.path, None, "--dtype", "keep"),
    ),
    _rounding_case(
        "rounding-llama",
        "Llama-shaped, 1.1 B parameters, bfloat16, by rounding",
        _BIG_LLAMA,
        partial(_roundings, "rounding-llama", _BIG_LLAMA.path / "base", _BIG_LLAMA.path / "adapter"),
    ),
    _startup("full", "startup", _FULL, 20),
    _memory(),
    Case(
        "small-keep",
        "small",
        "pi0 LoRA at a quarter of the width and a third of the layers, `--dtype keep`",
        3,
        partial(_with_proofs, "small-keep", _SMALL, "--dtype", "keep"),
        (_SMALL,),
        "cp -r",
    ),
    Case(
        "small-sweep",
        "small",
        "Interpolation between a small pi0 and its LoRA fine-tune, `--dtype keep`",
        2,
        partial(_sweep, "small-sweep", _SMALL, _SMALL_BASE),
        (_SMALL, _SMALL_BASE),
        "one alpha",
    ),
    Case(
        "small-llama",
        "small",
        "Llama-shaped, 150 M parameters, bfloat16 shards, rank 16 on every linear layer",
        3,
        partial(_llama, "small-llama", _SMALL_LLAMA, peft=False),
        (_SMALL_LLAMA,),
        "cp -r",
    ),
    _startup("small", "small-startup", _SMALL, 3),
)
"""In the order in which they run."""
