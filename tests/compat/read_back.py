"""Restore a merged checkpoint as its readers do, with whatever Orbax is installed: ``read_back.py STEP EXPECTED.npz``.

Runs without lora-merge. EXPECTED.npz holds every leaf in float32, key paths joined with ``/``, without root and suffix, and the
stored dtypes by the same names with ``dtype:`` before them.
"""

import sys
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

warnings.simplefilter("ignore")

step = Path(sys.argv[1]).absolute()
arrays = dict(np.load(sys.argv[2]))
dtypes = {name.removeprefix("dtype:"): str(v) for name, v in arrays.items() if name.startswith("dtype:")}
expected = {name: v for name, v in arrays.items() if name in dtypes}


def flatten(tree, path=()):
    if isinstance(tree, dict):
        return {k: v for key, child in tree.items() for k, v in flatten(child, (*path, key)).items()}
    return {path: tree}


def check(how, params, dtype=None):
    flat = flatten(params)
    if all(path[-1] == "value" for path in flat):
        flat = {path[:-1]: leaf for path, leaf in flat.items()}
    names = {"/".join(path): leaf for path, leaf in flat.items()}
    assert names.keys() == expected.keys(), (how, names.keys() ^ expected.keys())
    for name, leaf in names.items():
        wanted = jnp.dtype(dtype or dtypes[name])
        assert leaf.dtype == wanted, (how, name, leaf.dtype)
        reference = jnp.asarray(expected[name]).astype(wanted)
        assert np.array_equal(np.asarray(leaf).astype(np.float32), np.asarray(reference).astype(np.float32)), (
            how,
            name,
        )
    print(f"  {how}: {len(names)} leaves")


def tree_of(metadata):
    """0.11.13 returns the tree itself, 0.12 wraps it."""
    while not isinstance(metadata, dict):
        metadata = metadata.item_metadata if hasattr(metadata, "item_metadata") else metadata.tree
    return metadata


def as_openpi(restore_type, dtype):
    """As ``restore_params`` of ``openpi/models/model.py`` does it."""
    sharding = None
    if restore_type is jax.Array:
        mesh = jax.sharding.Mesh(jax.devices(), ("x",))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with ocp.PyTreeCheckpointer() as checkpointer:
        item = {"params": tree_of(checkpointer.metadata(step / "params"))["params"]}
        arguments = ocp.ArrayRestoreArgs(sharding=sharding, restore_type=restore_type, dtype=dtype)
        restore_args = jax.tree.map(lambda _: arguments, item)
        return checkpointer.restore(step / "params", ocp.args.PyTreeRestore(item=item, restore_args=restore_args))[
            "params"
        ]


print(f"orbax-checkpoint {ocp.__version__}, jax {jax.__version__}, numpy {np.__version__}")
check("OpenPI's reader, numpy", as_openpi(np.ndarray, None))
check("OpenPI's reader, jax at bfloat16", as_openpi(jax.Array, jnp.bfloat16), "bfloat16")
check("PyTreeCheckpointer", ocp.PyTreeCheckpointer().restore(step / "params")["params"])
manager = ocp.CheckpointManager(step.parent, item_handlers={"params": ocp.PyTreeCheckpointHandler()})
assert manager.latest_step() == int(step.name)
restored = manager.restore(int(step.name), args=ocp.args.Composite(params=ocp.args.PyTreeRestore()))
check("CheckpointManager", restored["params"]["params"])
