"""Save a tree whose arrays are sharded over eight devices: ``save_sharded.py ARRAYS.npz ITEM``."""

import os
import sys

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
tree: dict = {}
for name, values in np.load(sys.argv[1]).items():
    array = jnp.asarray(values)
    frozen = "lora" not in name and "llm" in name
    array = array.astype(jnp.bfloat16) if frozen else array
    # FSDP shards the largest axis; here the last that divides, and a second one where there is one.
    spec: list = [None] * array.ndim
    free = ["y", "x"]
    for axis in reversed(range(array.ndim)):
        if free and array.shape[axis] % mesh.shape[free[0]] == 0:
            spec[axis] = free.pop(0)
    *parents, last = ("params", *name.split("/"), "value")
    node = tree
    for part in parents:
        node = node.setdefault(part, {})
    node[last] = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
ocp.PyTreeCheckpointer().save(sys.argv[2], tree)
