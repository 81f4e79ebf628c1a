"""The command line: parses, calls, prints. Imports of what is slow stay inside the commands."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from lora_merge_cli import __version__
from lora_merge_cli._cli import (
    diff_command,
    extract_command,
    inspect_command,
    interpolate_command,
    merge_command,
    resize_command,
    verify_command,
)
from lora_merge_cli._cli.boundary import INTERRUPTED
from lora_merge_cli._cli.options import WithOptionalValues

app = typer.Typer(
    name="lora-merge",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)

app.command(cls=WithOptionalValues, epilog=inspect_command.EPILOG)(inspect_command.inspect)
app.command(cls=WithOptionalValues, epilog=merge_command.EPILOG)(merge_command.merge)
app.command(cls=WithOptionalValues, epilog=interpolate_command.EPILOG)(interpolate_command.interpolate)
app.command(cls=WithOptionalValues, epilog=verify_command.EPILOG)(verify_command.verify)
app.command(cls=WithOptionalValues, epilog=extract_command.EPILOG)(extract_command.extract)
app.command(epilog=resize_command.EPILOG)(resize_command.resize)
app.command(epilog=diff_command.EPILOG)(diff_command.diff)
app.command()(diff_command.schema)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"lora-merge {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Fuse LoRA adapters into OpenPI checkpoints, exactly, and prove what became of them."""


def main() -> None:
    """The console script."""
    try:
        app()
    except SystemExit as end:
        if end.code in INTERRUPTED:
            # Staging is removed by now. JAX may still compile in a thread of its own, which crashes an interpreter that is
            # being taken down around it and turns the exit code into a signal's.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(end.code)
        raise
