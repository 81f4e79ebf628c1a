"""Opens several fine-tunes of one base as one: a checkpoint that is computed as it is read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_merge_cli.fine_tunes import JoinRequest, joint_inputs, open_fine_tunes
from lora_merge_cli.formats.interface import Source
from lora_merge_cli.fused_source import FusedSource
from lora_merge_cli.inputs import FineTune, Inputs
from lora_merge_cli.joining.source import JoinedSource
from lora_merge_cli.options import MergeOptions


def open_joined(
    base: Path,
    request: JoinRequest,
    *,
    step: int | None,
    dialect: str | None,
    options: MergeOptions,
    device: str | None,
) -> Inputs:
    """Open a base and several fine-tunes of it; reads the factors of adapters, and no other arrays.

    Args:
        base: What all of them started from.
        request: The fine-tunes, and how to join them.
        step: Which step of runs; the newest if None.
        dialect: The adapters' dialect; detected if None.
        options: The scales of adapters, if they have any.
        device: The name of the JAX device to compute on; JAX's default if None.

    Returns:
        Inputs whose checkpoint is the joint fine-tune, computed as it is read, and whose base is the base.

    Raises:
        InputError: An input is missing, unreadable or of unknown format.
        Refused: A fine-tune cannot be merged, or they do not fit one another.
    """
    from lora_merge_cli.devices import find_device

    found = find_device(device)

    def fused(part: FineTune) -> FusedSource:
        return FusedSource(part.inputs, options, found)

    def joined(inputs: Inputs, sources: Sequence[Source]) -> Source:
        return JoinedSource(inputs.anchor, sources, request.joining, inputs.dialect.canonical, found)

    return joint_inputs(open_fine_tunes(base, request, step, dialect), fused, joined)
