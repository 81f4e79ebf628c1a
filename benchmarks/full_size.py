"""Merge and verify a full-size pi0 LoRA checkpoint beside ``cp -r`` of the result; print wall time and peak memory.

The checkpoint has the real model's tree, shapes and stored dtypes (3.3 B parameters), random weights of realistic size, and a
trainer's chunking: a leaf is one zarr chunk, or two where it exceeds 2 GiB.

    python benchmarks/full_size.py [--runs 3] [--dtype auto] [--keep]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from timing import Run, median_ratio, print_table, timed

from lora_merge_cli.dtypes import dtype_named
from lora_merge_cli.formats.interface import LeafData
from lora_merge_cli.formats.orbax_sink import OrbaxSink
from lora_merge_cli.records import Array, Region, TensorSpec, full_region, grid, region_shape

HERE = Path(__file__).parent
LAYOUT = HERE / "layouts" / "pi0_lora.json"
DATA = HERE / "data"
POOL = 2**24
TWO_CHUNKS = 2**31
COMMAND = [sys.executable, "-m", "lora_merge_cli"]


def make_checkpoint(directory: Path, *, layer_chunks: bool) -> None:
    """Write the checkpoint unless it is there already."""
    if directory.exists():
        return
    pool = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)
    layout = json.loads(LAYOUT.read_text())
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    def specs() -> Iterator[TensorSpec]:
        for name, leaf in layout.items():
            path = ("params", *name.split("/"), "value")
            yield TensorSpec(path, tuple(leaf["shape"]), dtype_named(leaf["dtype"]))

    def leaves() -> Iterator[LeafData]:
        for seed, spec in enumerate(specs()):
            chunk = list(spec.shape)
            if layer_chunks and len(chunk) > 2:
                chunk[0] = 1
            elif spec.nbytes > TWO_CHUNKS:
                chunk[-1] //= 2
            yield LeafData(spec, tuple(chunk), blocks(spec, chunk, seed))

    def blocks(spec: TensorSpec, chunk: list[int], seed: int) -> Iterator[tuple[Region, Array]]:
        rng = np.random.default_rng(seed)
        std = np.float32(0.005 if "lora" in spec.name else 0.02)
        for region in grid(full_region(spec.shape), chunk):
            shape = region_shape(region)
            flat = np.empty(int(np.prod(shape)), spec.dtype)
            for start in range(0, flat.size, POOL // 2):
                part = flat[start : start + POOL // 2]
                offset = int(rng.integers(POOL - part.size + 1))
                part[:] = pool[offset : offset + part.size] * std
            yield region, flat.reshape(shape)

    OrbaxSink(partial, "params", 2).write(list(specs()), leaves(), ())
    stats = partial / "assets" / "trossen" / "norm_stats.json"
    stats.parent.mkdir(parents=True)
    entry = {"mean": [0.0], "std": [1.0], "q01": [-1.0], "q99": [1.0]}
    stats.write_text(json.dumps({"norm_stats": {"state": entry, "actions": entry}}))
    partial.rename(directory)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--layer-chunks", action="store_true", help="an input with a layer per chunk")
    parser.add_argument("--keep", action="store_true", help="keep the merged checkpoint")
    options = parser.parse_args()
    source = DATA / ("pi0_lora_layers" if options.layer_chunks else "pi0_lora") / "29999"
    # In a process of its own: a child's peak memory starts at what its parent holds.
    maker = multiprocessing.get_context("spawn").Process(
        target=make_checkpoint, args=(source,), kwargs={"layer_chunks": options.layer_chunks}
    )
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit("the checkpoint could not be made")
    merged, copy = DATA / "merged", DATA / "copy"
    names = ("inspect", "merge", "cp -r", "verify", "verify --sample 2", "diff")
    rows: dict[str, list[Run]] = {name: [] for name in names}
    for _ in range(options.runs):
        for target in (merged, copy):
            shutil.rmtree(target, ignore_errors=True)
        rows["inspect"].append(timed([*COMMAND, "inspect", str(source)]))
        merge = [*COMMAND, "merge", str(source), "-o", str(merged), "--dtype", options.dtype, "-q"]
        rows["merge"].append(timed(merge))
        rows["cp -r"].append(timed(["cp", "-r", "--reflink=never", str(merged), str(copy)]))
        verify = [*COMMAND, "verify", str(merged), "--against", str(source), "-q"]
        rows["verify"].append(timed(verify))
        rows["verify --sample 2"].append(timed([*verify, "--sample", "2"]))
        rows["diff"].append(timed([*COMMAND, "diff", str(merged), str(copy), "-q"]))
    size = sum(file.stat().st_size for file in merged.rglob("*") if file.is_file())
    print(f"{platform.machine()}, {os.cpu_count()} cores; output {size / 2**30:.2f} GiB; {options.runs} runs")
    print_table(rows)
    planned = json.loads((merged / "lora_merge.json").read_text())["peak_bytes_planned"] / 2**30
    print(f"the plan said {planned:.1f} GiB")
    print(f"merge takes {median_ratio(rows, 'merge', 'cp -r'):.1f} times the copy (medians)")
    shutil.rmtree(copy)
    if not options.keep:
        shutil.rmtree(merged)


if __name__ == "__main__":
    main()
