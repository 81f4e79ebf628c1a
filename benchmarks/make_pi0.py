"""Write a pi0 LoRA checkpoint: the real model's tree, shapes and stored dtypes, random weights of realistic size.

Chunked as a trainer chunks, a leaf in one Zstandard-compressed zarr chunk, or in two where it exceeds 2 GiB; or a layer per chunk.
TensorStore writes it, which the trainer's Orbax does too.

    python benchmarks/make_pi0.py OUT [--layer-chunks] [--expert-only] [--base] [--divide N] [--layers N]
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts
from values import Normals

from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.formats.orbax_metadata import write_step, write_tree
from lora_merge_cli.formats.zarr_array import ZarrArray
from lora_merge_cli.formats.zarr_encoding import metadata_of
from lora_merge_cli.records import TensorSpec, full_region, grid, region_shape

LAYOUT = Path(__file__).parent / "layouts" / "pi0_lora.json"
DIVIDED = 64
"""Extents up to this one (layers, heads, ranks, actions) stay what they are when widths are divided."""
LAYERS = 18
MOST_CHUNK_BYTES = 2**31
FILE_BYTES = 2**31
ADAPTER_STD, KERNEL_STD = 0.005, 0.02
BEFORE_TRAINING = 0.9
"""What a base has of the values that the fine-tune trained in full."""


def specs(*, divide: int, layers: int, expert_only: bool) -> Iterator[TensorSpec]:
    """Every leaf.

    Args:
        divide: What the widths are divided by.
        layers: How many layers the language model and the action expert have.
        expert_only: Leave the factors of the language model out.
    """
    for name, leaf in json.loads(LAYOUT.read_text()).items():
        if expert_only and "lora" in name and not re.search(r"_1(/|_)", name):
            continue
        shape = [extent // divide if extent > DIVIDED else extent for extent in leaf["shape"]]
        if name.startswith("PaliGemma/llm/layers/"):
            assert shape[0] == LAYERS, "the layers are stacked on the first axis"
            shape[0] = layers
        yield TensorSpec(("params", *name.split("/"), "value"), tuple(shape), dtype_named(leaf["dtype"]))


def chunks(spec: TensorSpec, *, layer_chunks: bool) -> tuple[int, ...]:
    """The extents of a leaf's chunks."""
    extents = list(spec.shape)
    if layer_chunks and len(extents) > 2:
        extents[0] = 1
    elif spec.nbytes > MOST_CHUNK_BYTES:
        extents[-1] //= 2
    return tuple(extents)


def write_leaf(item: Path, spec: TensorSpec, extents: tuple[int, ...], normals: Normals, *, base: bool = False) -> None:
    """Store a leaf's metadata and chunks; of a base, those of what was trained in full are others."""
    adapter, trained = "lora" in spec.name, spec.dtype == np.float32
    std = ADAPTER_STD if adapter else KERNEL_STD
    if base and adapter:
        # Drawn all the same, so that the leaves behind are those of the fine-tune.
        for region in grid(full_region(spec.shape), extents):
            normals.values(region_shape(region), spec.dtype, std)
        return
    _, document = metadata_of(ZarrArray(spec.shape, extents, spec.dtype, "zstd"), 2)
    store = ts.open(
        {
            "driver": "zarr",
            "kvstore": {
                "driver": "ocdbt",
                "base": f"file://{item.absolute()}/",
                "path": f"{'.'.join(map(str, spec.path))}/",
                "target_data_file_size": FILE_BYTES,
            },
            "metadata": json.loads(document),
            "create": True,
        }
    ).result()
    for region in grid(full_region(spec.shape), extents):
        values = normals.values(region_shape(region), spec.dtype, std)
        store[region].write(values * np.float32(BEFORE_TRAINING) if base and trained else values).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("directory", type=Path, metavar="OUT", help="the step directory, whose name is a number")
    parser.add_argument("--layer-chunks", action="store_true", help="a layer per chunk")
    parser.add_argument("--expert-only", action="store_true", help="adapters on the action expert alone")
    parser.add_argument("--base", action="store_true", help="what the fine-tune of the same flags started from")
    parser.add_argument("--divide", type=int, default=1, help="divide the widths")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the language model and the action expert")
    options = parser.parse_args()
    directory: Path = options.directory
    item = directory / "params"
    item.mkdir(parents=True)
    started_ns = time.time_ns()
    normals = Normals()
    leaves = list(specs(divide=options.divide, layers=options.layers, expert_only=options.expert_only))
    for spec in leaves:
        write_leaf(item, spec, chunks(spec, layer_chunks=options.layer_chunks), normals, base=options.base)
    kept = [spec for spec in leaves if not (options.base and "lora" in spec.name)]
    write_tree(item, kept, (), 2)
    write_step(directory, "params", started_ns)
    stats = directory / "assets" / "trossen" / "norm_stats.json"
    stats.parent.mkdir(parents=True)
    entry = {"mean": [0.0], "std": [1.0], "q01": [-1.0], "q99": [1.0]}
    stats.write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))


if __name__ == "__main__":
    main()
