"""``lora-merge inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from lora_merge_cli._cli import options
from lora_merge_cli._cli.boundary import boundary

EPILOG = """[bold]Examples[/bold]

  lora-merge inspect checkpoints/pi0_lora/run/29999

  lora-merge inspect checkpoints/run/29999 --stats --base pi0_base

  lora-merge inspect runs/adapter

  lora-merge inspect Llama-base/ --adapter runs/adapter

  lora-merge inspect checkpoints/run/29999 --json | jq .sites"""


def inspect(
    checkpoint: options.CheckpointArgument,
    adapter: options.Adapters = None,
    base: options.Base = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Read the arrays: norms of the deltas, effective ranks, non-finite entries.")
    ] = False,
    step: options.Step = None,
    dialect: options.DialectOption = None,
    residual_base: options.ResidualBase = False,
    lora_alpha: options.LoraAlpha = None,
    rslora: options.RsLora = None,
    as_json: options.Json = False,
    verbose: options.Verbose = False,
) -> None:
    """Show what a checkpoint or an adapter is: sites, ranks and scales, and what the fine-tune froze and trained."""
    with boundary(verbose=verbose):
        from lora_merge_cli._cli.parsing import parse_adapters, parse_scales
        from lora_merge_cli.inspection import InspectRequest
        from lora_merge_cli.inspection import inspect as run

        found = run(
            InspectRequest(
                checkpoint,
                parse_adapters(adapter),
                step=step,
                base=base,
                stats=stats,
                scales=parse_scales(lora_alpha, rslora),
                dialect=dialect,
                residual_base=residual_base,
            )
        )
        if as_json:
            from lora_merge_cli._cli.output import print_json

            print_json(found.to_dict())
        else:
            from lora_merge_cli._cli.show_inspection import print_inspection

            print_inspection(found)
