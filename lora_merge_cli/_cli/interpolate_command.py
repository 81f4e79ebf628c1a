"""``lora-merge interpolate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lora_merge_cli._cli import options
from lora_merge_cli._cli.boundary import boundary

if TYPE_CHECKING:
    from lora_merge_cli.interpolating import PreparedInterpolation

EPILOG = """[bold]Examples[/bold]

  lora-merge interpolate pi0_base checkpoints/run/29999 -o soup/ --alpha 0.5

  lora-merge interpolate pi0_base checkpoints/run/29999 -o sweep/ --alpha 0:1:0.25 --report sweep.html

  lora-merge interpolate pi0_base checkpoints/run/29999 -o mix/ --alpha 0.6 --alpha-for 'PaliGemma/img/**=0' --alpha-for 'action_*/**=1'

  lora-merge interpolate pi0_base checkpoints/run/29999 -o deep/ --alpha 0.5 --alpha-schedule layer=0.2:0.9

  lora-merge interpolate base/ --adapter adapter/ -o out/ --alpha 0.3

  lora-merge interpolate base/ style/@0.6 facts/@0.4 -o soup/ --method ties --density 0.3

  lora-merge interpolate pi0_base run/9999 run/29999 -o stacked/ --method task-arithmetic --sequential

  lora-merge interpolate checkpoints/run/29999 --deltas-only -o weaker/ --alpha 0.7

Exit codes: 0 done; 1 --verify failed; 2 usage; 3 input missing or corrupt; 4 refused; 5 output exists;
6 disk, memory or permission; 7 some of several outputs failed, the others are there; 130, 143 interrupted."""

_INTERRUPTED = "nothing incomplete was written; --resume keeps what was finished"


def interpolate(
    base: Annotated[
        Path,
        typer.Argument(
            metavar="BASE",
            help="What alpha 0 is, in any format that merge reads; with --deltas-only the fine-tune itself.",
            show_default=False,
        ),
    ],
    tuned: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TUNED[@WEIGHT]",
            help="What alpha 1 is: a fine-tune of BASE, dense or with adapters inside, or several that --method joins. "
            "Without it: --adapter.",
            show_default=False,
        ),
    ] = None,
    alpha: Annotated[
        list[str] | None,
        typer.Option(
            metavar="A|START:STOP:STEP",
            help="How far to go from BASE, 0, to TUNED, 1; with --method 1 unless given. Repeatable; several write "
            "OUT/alpha-<value>/ each, and OUT/sweep.html.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        options.JoinMethod | None,
        typer.Option(help="How to join several TUNED into the one that alpha 1 is.", show_default=False),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE", help="Of ties and dare-ties: the share of the entries to keep.", show_default=False
        ),
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="What dare-ties and --rounding stochastic draw from.")] = 0,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential", help="Each TUNED started from the one before it: its change is the difference of the two."
        ),
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The directory to create, or, of a single alpha, the file if it ends in .safetensors or .pth.",
            show_default=False,
        ),
    ] = None,
    adapter: options.Adapters = None,
    alpha_for: options.AlphaFor = None,
    alpha_schedule: options.AlphaSchedule = None,
    extrapolate: options.Extrapolate = False,
    only_common: options.OnlyCommon = None,
    deltas_only: Annotated[
        bool,
        typer.Option(
            "--deltas-only", help="There is no base: scale the deltas of BASE's own adapters, and nothing else."
        ),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the outputs that an earlier run finished; write the others.")
    ] = False,
    lora_alpha: options.LoraAlpha = None,
    rslora: options.RsLora = None,
    scale: options.Scale = 1.0,
    dtype: options.DtypeOption = options.Dtype.auto,
    dtype_untouched: options.DtypeUntouchedOption = options.DtypeUntouched.keep,
    rounding: options.RoundingOption = options.RoundingMethod.nearest,
    mu: options.Mu = None,
    serving_dtype: options.ServingDtypeOption = None,
    serving_values: options.ServingValuesOption = None,
    include: options.IncludeSites = None,
    exclude: options.ExcludeSites = None,
    step: options.Step = None,
    dialect: options.DialectOption = None,
    residual_base: options.ResidualBase = False,
    to: Annotated[
        options.OutputFormat,
        typer.Option(help="The format to write; auto: by OUT's suffix, else that of TUNED, or of BASE without one."),
    ] = options.OutputFormat.auto,
    max_shard_size: options.MaxShardSize = "5GB",
    device: options.Device = None,
    compression: options.CompressionOption = options.Compression.none,
    jobs: options.Jobs = None,
    overwrite: options.Overwrite = False,
    dry_run: options.DryRun = False,
    verify: options.Verify = False,
    min_gain: options.MinGain = 0.98,
    strict: options.Strict = False,
    sample: options.Sample = None,
    report: options.ReportPaths = None,
    github: options.Github = False,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
    quiet: options.Quiet = False,
) -> None:
    """Go a part of the way from a base to its fine-tune: (1 - alpha) * BASE + alpha * TUNED, as in Wise-FT."""
    with boundary(verbose=verbose, interrupted=_INTERRUPTED):
        from lora_merge_cli._cli.allocator import keep_freed_memory
        from lora_merge_cli._cli.output import Output
        from lora_merge_cli._cli.parsing import parse_adapters, parse_size
        from lora_merge_cli._cli.parsing_alphas import parse_alphas
        from lora_merge_cli._cli.parsing_fine_tunes import parse_fine_tunes
        from lora_merge_cli.errors import SomeFailed, VerificationFailed
        from lora_merge_cli.interpolating import InterpolateRequest, prepare_interpolation
        from lora_merge_cli.interpolating import interpolate as run

        # Before the first thread: each would take its memory from an arena of its own.
        keep_freed_memory()
        options.check_output(output, dry_run)
        # Rounding draws from it too.
        joined_seed = 0 if method is None and rounding is options.RoundingMethod.stochastic else seed
        one, several = parse_fine_tunes(tuned, method, density, joined_seed, sequential=sequential)
        _check_sides(bool(tuned), adapter, deltas_only)
        judging = options.judging(verify, sample, min_gain, strict, jobs)
        asked = options.merge_options(
            lora_alpha,
            rslora,
            scale,
            dtype,
            dtype_untouched,
            include,
            exclude,
            residual_base,
            rounding=options.rounding(rounding, mu, seed, serving_values),
            serving_dtype=serving_dtype,
        )
        alphas = parse_alphas(alpha or (() if several is None else ("1",)))
        prepared = prepare_interpolation(
            InterpolateRequest(
                base,
                one,
                output,
                alphas,
                options.mixing(alphas[0], alpha_for, alpha_schedule, extrapolate, only_common, deltas_only),
                adapters=parse_adapters(adapter),
                several=several,
                step=step,
                dialect=dialect,
                to=to,
                max_shard_bytes=parse_size(max_shard_size),
                overwrite=overwrite,
                device=device,
                compression=compression.value,
                jobs=jobs,
                options=asked,
                verify=judging,
                resume=resume,
            )
        )
        _check_report_paths(report or (), prepared)
        paths = [*(report or ()), *(() if dry_run else _summaries(prepared, replace=resume or overwrite))]
        out = Output(paths, prepared.output, prepared.input_paths, github, as_json, quiet, dry_run=dry_run)
        staged = prepared.is_single and prepared.points[0].kept is None
        with out.reports:
            if dry_run:
                out.deliver(prepared.report())
                return
            try:
                with out.progress("interpolating") as listener:
                    done = run(prepared, listener, out.reports.write if staged else None)
            except (SomeFailed, VerificationFailed) as failure:
                if staged:
                    out.reports.leave_out_target()
                out.deliver(failure.report)
                raise
            if staged:
                out.finish(done)
            else:
                out.deliver(done)


def _check_sides(tuned: bool, adapter: Sequence[str] | None, deltas_only: bool) -> None:
    """Refuse two fine-tunes, and a base where there shall be none.

    Raises:
        UsageError: The flags contradict each other.
    """
    from lora_merge_cli.errors import UsageError

    if tuned and adapter:
        raise UsageError(
            "TUNED and --adapter are two fine-tunes",
            expected="one of them",
            hint="merge the adapter into TUNED first if both are meant",
        )
    if deltas_only and (tuned or adapter):
        raise UsageError(
            "--deltas-only is for a fine-tune that has no base",
            expected="the checkpoint with adapters inside, alone",
            found=f"BASE and {'TUNED' if tuned else '--adapter'}",
            hint="leave out --deltas-only to interpolate all that the fine-tune changed",
        )


def _summaries(prepared: PreparedInterpolation, *, replace: bool) -> Sequence[Path]:
    """Where a sweep is summed up, whether or not a report is asked for.

    Raises:
        OutputExists: The summary of another sweep is there.
    """
    from lora_merge_cli.errors import OutputExists

    if prepared.is_single or prepared.output is None:
        return ()
    paths = prepared.output / "sweep.html", prepared.output / "sweep.json"
    for path in paths:
        if path.exists() and not replace:
            raise OutputExists(
                "the summary of another sweep is there",
                where=path,
                hint="choose another -o, or pass --resume or --overwrite",
            )
    return paths


def _check_report_paths(paths: Sequence[Path], prepared: PreparedInterpolation) -> None:
    """Refuse to write a report into an output that was finished without it, or into one of several.

    Raises:
        UsageError: It would be.
    """
    from lora_merge_cli.errors import UsageError
    from lora_merge_cli.staging import anchored

    closed = [
        point.prepared.request.output for point in prepared.points if not prepared.is_single or point.kept is not None
    ]
    for path in paths:
        if any(output is not None and anchored(path).is_relative_to(output) for output in closed):
            raise UsageError("--report would add to an output that is complete without it", where=path)
