"""``lora-merge verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_merge_cli._cli import options
from lora_merge_cli._cli.boundary import boundary

EPILOG = """[bold]Examples[/bold]

  lora-merge verify merged/29999 --against checkpoints/run/29999

  lora-merge verify merged/29999 --against checkpoints/run/29999 --base pi0_base --strict --report verify.xml

  lora-merge verify merged/29999 --against checkpoints/run/29999 --sample 2 --report verify.html

  lora-merge verify merged/ --against Llama-base/ --adapter runs/adapter

  lora-merge verify merged/ --against Llama-base/ --adapter a/ --adapter b/@0.5 --combine ties --density 0.5

  lora-merge verify soup/ --against checkpoints/run/29999 --base pi0_base --alpha 0.5

  lora-merge verify joint/ --against style/@0.6 --against facts/@0.4 --base base/ --method ties --density 0.3

Exit codes: 0 all checks hold; 1 a check failed; 2 usage; 3 another input missing or corrupt; 4 refused: the other
inputs do not make a merge; 6 disk, memory or permission; 130, 143 interrupted."""


def verify(
    merged: Annotated[
        Path,
        typer.Argument(metavar="MERGED", help="The checkpoint to judge, of any tool's making.", show_default=False),
    ],
    against: Annotated[
        list[str],
        typer.Option(
            metavar="CKPT[@WEIGHT]",
            help="The checkpoint whose adapters were merged, or the base of those beside it. Repeatable with --method: each "
            "fine-tune that was joined.",
            show_default=False,
        ),
    ],
    adapter: options.Adapters = None,
    combine: options.CombineOption = options.Combine.sum,
    method: Annotated[
        options.JoinMethod | None,
        typer.Option(help="How several CKPT were joined into the one that alpha 1 is.", show_default=False),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help="The share of the entries to keep, where --combine or --method prunes: above 0, up to 1.",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int,
        typer.Option(
            metavar="N", help="What --combine dare_..., --method dare-ties and --rounding stochastic draw from."
        ),
    ] = 0,
    svd_rank: options.SvdRank = None,
    majority_sign: options.MajoritySignOption = options.MajoritySign.total,
    sequential: Annotated[
        bool, typer.Option("--sequential", help="Each CKPT of --method started from the one before it.")
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(
            help="What CKPT started from: the float32 base of adapters inside, or what alpha 0 is.", show_default=False
        ),
    ] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A",
            help="The alpha that MERGED was interpolated at; a merge if not given, with --method 1.",
            show_default=False,
        ),
    ] = None,
    alpha_for: options.AlphaFor = None,
    alpha_schedule: options.AlphaSchedule = None,
    extrapolate: options.Extrapolate = False,
    only_common: options.OnlyCommon = None,
    deltas_only: Annotated[
        bool, typer.Option("--deltas-only", help="There was no base: only the deltas of CKPT's adapters were scaled.")
    ] = False,
    lora_alpha: options.LoraAlpha = None,
    rslora: options.RsLora = None,
    scale: options.Scale = 1.0,
    dtype: Annotated[
        options.ExpectedDtype, typer.Option(help="What the fused kernels must be stored in; any: as they are.")
    ] = options.ExpectedDtype.any,
    dtype_untouched: options.DtypeUntouchedOption = options.DtypeUntouched.keep,
    rounding: Annotated[
        options.ExpectedRounding,
        typer.Option(
            help="How the leaves that change were rounded; any: each entry of a bfloat16 or float16 file to either neighbour."
        ),
    ] = options.ExpectedRounding.nearest,
    mu: options.Mu = None,
    serving_dtype: options.ServingDtypeOption = None,
    serving_values: options.ServingValuesOption = None,
    include: options.IncludeSites = None,
    exclude: options.ExcludeSites = None,
    step: options.Step = None,
    dialect: options.DialectOption = None,
    residual_base: options.ResidualBase = False,
    min_gain: options.MinGain = 0.98,
    strict: options.Strict = False,
    sample: options.Sample = None,
    jobs: options.Jobs = None,
    report: options.ReportPaths = None,
    github: options.Github = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Prove a merge or an interpolation: recompute each kernel in float64, run each layer, compare all else bit for bit."""
    with boundary(verbose=verbose):
        from lora_merge_cli._cli.allocator import keep_freed_memory
        from lora_merge_cli._cli.output import Output
        from lora_merge_cli._cli.parsing import parse_adapters
        from lora_merge_cli._cli.parsing_fine_tunes import parse_judged
        from lora_merge_cli.verification import Judging, VerifyRequest, open_request
        from lora_merge_cli.verification import verify as run

        keep_freed_memory()
        one, several = parse_judged(against, method, density, seed, sequential=sequential)
        _check_sides(several is not None, adapter, combine, base)
        if several is not None and not alpha:
            alpha = ["1"]
        mixing = options.judged_mixing(alpha, alpha_for, alpha_schedule, extrapolate, only_common, deltas_only)
        asked = options.merge_options(
            lora_alpha,
            rslora,
            scale,
            dtype,
            dtype_untouched,
            include,
            exclude,
            residual_base,
            mixing,
            None
            if several is not None
            else options.combining(combine, density, seed, svd_rank, majority_sign, adapter),
            options.rounding(rounding, mu, seed, serving_values, judged=True),
            serving_dtype,
        )
        any_rounding = rounding is options.ExpectedRounding.any
        judging = Judging(sample, min_gain, strict, any_rounding, jobs)
        opened = open_request(
            VerifyRequest(
                merged,
                one,
                parse_adapters(adapter),
                base,
                step,
                dialect,
                options=asked,
                judging=judging,
                several=several,
            )
        )
        out = Output(report, None, opened.paths, github, as_json, quiet)
        with out.reports:
            with out.progress("verifying") as listener:
                done = run(opened, listener)
            out.deliver(done)
        raise typer.Exit(1 if done.failed else 0)


def _check_sides(several: bool, adapter: list[str] | None, combine: options.Combine, base: Path | None) -> None:
    """Refuse what does not go with several fine-tunes, and several without what they are fine-tunes of.

    Raises:
        UsageError: The flags contradict each other.
    """
    from lora_merge_cli.errors import UsageError

    if several and adapter:
        raise UsageError(
            "--method joins fine-tunes, and --adapter is beside one checkpoint", hint="leave out one of them"
        )
    if several and combine != options.Combine.sum:
        raise UsageError("--combine is for adapters beside one checkpoint", hint="leave it out, or --method")
    if several and base is None:
        raise UsageError("--method joins fine-tunes of a base", hint="pass --base")
