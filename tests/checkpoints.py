"""Checkpoints written by the real Orbax, in any of its layouts, and read back by it."""

from __future__ import annotations

import inspect
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest

from tests.trees import Flat

NORM_STATS = {
    "norm_stats": {
        name: {"mean": [0.0, 1.0], "std": [1.0, 2.0], "q01": [-1.0, -2.0], "q99": [1.0, 2.0]}
        for name in ("state", "actions")
    }
}


def save_item(
    path: Path,
    tree: Any,
    *,
    ocdbt: bool = True,
    zarr3: bool = False,
    compressed: bool = True,
    chunk_bytes: int | None = None,
) -> Path:
    """Save one PyTree item with Orbax."""
    import jax

    options: dict[str, Any] = {} if compressed else {"use_compression": False}
    if options.keys() - inspect.signature(ocp.PyTreeCheckpointHandler).parameters.keys():
        pytest.skip("this Orbax cannot write uncompressed arrays")
    handler = ocp.PyTreeCheckpointHandler(use_ocdbt=ocdbt, use_zarr3=zarr3, **options)
    arguments: dict[str, Any] = {}
    if chunk_bytes is not None:
        arguments["save_args"] = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree)
    checkpointer = ocp.Checkpointer(handler)
    checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree, **arguments))
    checkpointer.close()
    return path


def save_step(step: Path, tree: Any, *, item: str = "params", assets: bool = True, **layout: Any) -> Path:
    """Save an OpenPI-like step directory: an item, its step metadata, and assets."""
    step.mkdir(parents=True)
    save_item(step / item, tree, **layout)
    handler = "orbax.checkpoint._src.handlers.pytree_checkpoint_handler.PyTreeCheckpointHandler"
    (step / "_CHECKPOINT_METADATA").write_text(json.dumps({"item_handlers": {item: handler}, "custom_metadata": {}}))
    if assets:
        stats = step / "assets" / "trossen" / "norm_stats.json"
        stats.parent.mkdir(parents=True)
        stats.write_text(json.dumps(NORM_STATS))
    return step


def restore(item: Path) -> Any:
    """Restore an item with Orbax as NumPy arrays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ocp.PyTreeCheckpointer().restore(
            item.absolute(),
            restore_args=None,
        )


def restore_flat(item: Path, *, root: tuple[Any, ...] = ("params",)) -> Flat:
    """Restore an item as flat leaves, without the root and an nnx suffix that every leaf has."""
    flat: Flat = {}

    def walk(node: Any, path: tuple[Any, ...]) -> None:
        if isinstance(node, dict):
            for key, child in node.items():
                walk(child, (*path, key))
        elif isinstance(node, list):
            for index, child in enumerate(node):
                walk(child, (*path, index))
        else:
            flat[path] = np.asarray(node)

    tree = restore(item)
    for key in root:
        tree = tree[key]
    walk(tree, ())
    if all(path[-1] == "value" for path in flat):
        flat = {path[:-1]: values for path, values in flat.items()}
    return flat
