"""Writing an adapter of its own: one safetensors file, streamed, and the JSON that says what is in it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_merge_cli.compare import count_non_finite
from lora_merge_cli.errors import NonFiniteInput
from lora_merge_cli.formats.hf_dir import ADAPTER_CONFIG
from lora_merge_cli.formats.interface import Blocks, Checkpoint, Destination, LeafData, Source
from lora_merge_cli.formats.safetensors_sink import SafetensorsSink
from lora_merge_cli.listening import Listener
from lora_merge_cli.records import TensorSpec, full_region, grid, region_shape, slab
from lora_merge_cli.staging import filesystem

ADAPTER_TENSORS = "adapter_model.safetensors"

_BLOCK_ENTRIES = 2**21


@dataclass(frozen=True)
class AdapterTensor:
    """One tensor of an adapter that is to be."""

    spec: TensorSpec
    """Its key, shape and dtype."""
    blocks: Callable[[], Blocks]
    """Its values, from the first to the last, when they are asked for."""


def write_adapter(
    directory: Path, tensors: Sequence[AdapterTensor], config: Mapping[str, Any], like: Checkpoint
) -> None:
    """Write the tensors and the configuration into a directory that nobody else looks at yet.

    Args:
        directory: Where to.
        tensors: What to write; never more than a block of one is held.
        config: The contents of ``adapter_config.json``.
        like: What the adapter is taken out of.

    Raises:
        UnsupportedCheckpoint: A tensor cannot be kept in safetensors, or two have one name.
        DiskFull, NotPermitted, ResourceError: The operating system refuses.
    """
    sink = SafetensorsSink(Destination(directory, ADAPTER_TENSORS), dataclasses.replace(like, metadata={}))
    leaves = (LeafData(tensor.spec, tensor.spec.shape, tensor.blocks()) for tensor in tensors)
    sink.write([tensor.spec for tensor in tensors], leaves, ())
    file = directory / ADAPTER_CONFIG
    with filesystem(file):
        file.write_text(json.dumps(config, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def carried(source: Source, spec: TensorSpec, key: TensorSpec, listener: Listener) -> AdapterTensor:
    """A leaf of a checkpoint as a tensor of an adapter, bit for bit.

    Args:
        source: Where the leaf is.
        spec: The leaf.
        key: What it is in the adapter.
        listener: Who to tell of progress.
    """

    def blocks() -> Iterator[Any]:
        regions = list(grid(full_region(spec.shape), slab(spec.shape, _BLOCK_ENTRIES)))
        for region, values in zip(regions, source.scan(spec.path, regions), strict=True):
            bad = count_non_finite(values)
            if bad:
                raise NonFiniteInput(
                    "a leaf that the adapter must hold is not finite",
                    where=f"{source.path} :: {spec.name}",
                    expected="finite values",
                    found=f"{bad} of {values.size} entries NaN or Inf",
                )
            yield region, values.reshape(region_shape(region))
            listener.advance(spec.name, values.nbytes)

    return AdapterTensor(key, blocks)
