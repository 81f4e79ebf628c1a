"""``lora-merge merge``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lora_merge_cli._cli import options
from lora_merge_cli._cli.boundary import boundary

EPILOG = """[bold]Examples[/bold]

  lora-merge merge checkpoints/pi0_lora/run/29999 -o merged/29999

  lora-merge merge checkpoints/run --step 9999 -o merged/9999 --lora-alpha paligemma=12,action_expert=2

  lora-merge merge checkpoints/run/29999 --base pi0_base -o merged/29999 --verify --report merged.html

  lora-merge merge Llama-base/ --adapter runs/adapter -o merged/

  lora-merge merge checkpoints/run/29999 -o merged/29999 --dtype bfloat16 --rounding preserve

  lora-merge merge full_sft_512.pth --adapter lora_identity_512.pth -o merged_512.pth

  lora-merge merge base/ --adapter style/@0.7 --adapter noise/@-0.4 -o merged/ --to safetensors

  lora-merge merge base/ --adapter style/@0.7 --adapter facts/ -o merged/ --combine ties --density 0.5

  lora-merge merge base/ --adapter a/ --adapter b/ -o merged/ --combine dare_linear_svd --density 0.3 --seed 1 --svd-rank 32

  lora-merge merge checkpoints/run/29999 --dry-run --json

Exit codes: 0 done; 1 --verify failed; 2 usage; 3 input missing or corrupt; 4 refused; 5 output exists;
6 disk, memory or permission; 130, 143 interrupted."""


def merge(
    checkpoint: options.CheckpointArgument,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            help="The directory to create, or the file if it ends in .safetensors or .pth.",
            show_default=False,
        ),
    ] = None,
    adapter: options.Adapters = None,
    combine: options.CombineOption = options.Combine.sum,
    density: options.Density = None,
    seed: options.Seed = 0,
    svd_rank: options.SvdRank = None,
    majority_sign: options.MajoritySignOption = options.MajoritySign.total,
    base: options.Base = None,
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
        options.OutputFormat, typer.Option(help="The format to write; auto: by OUT's suffix, else that of CKPT.")
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
    """Fuse the adapters inside a checkpoint, or beside it, into its kernels and write a dense checkpoint."""
    with boundary(verbose=verbose):
        from lora_merge_cli._cli.allocator import keep_freed_memory
        from lora_merge_cli._cli.output import Output
        from lora_merge_cli._cli.parsing import parse_adapters, parse_size
        from lora_merge_cli.errors import VerificationFailed
        from lora_merge_cli.merging import merge as run
        from lora_merge_cli.merging import prepare
        from lora_merge_cli.prepared import MergeRequest

        # Before the first thread: each would take its memory from an arena of its own.
        keep_freed_memory()
        options.check_output(output, dry_run)
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
            combining=options.combining(combine, density, seed, svd_rank, majority_sign, adapter),
            rounding=options.rounding(rounding, mu, seed, serving_values),
            serving_dtype=serving_dtype,
        )
        prepared = prepare(
            MergeRequest(
                checkpoint,
                output,
                adapters=parse_adapters(adapter),
                base=base,
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
            )
        )
        out = Output(report, prepared.request.output, prepared.input_paths, github, as_json, quiet, dry_run=dry_run)
        with out.reports:
            if dry_run:
                done = prepared.report()
                out.reports.write(done)
            else:
                try:
                    with out.progress("merging") as listener:
                        done = run(prepared, listener, out.reports.write)
                except VerificationFailed as failure:
                    out.reports.leave_out_target()
                    out.deliver(failure.report)
                    raise
            out.finish(done)
