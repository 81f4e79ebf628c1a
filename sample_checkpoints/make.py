"""Make the sample checkpoints: tiny OpenPI-shaped LoRA fine-tunes, written by the real Orbax. Run from the repository's root.

    python -m sample_checkpoints.make

`expected.safetensors` holds what each must become: the dense kernels in float32, found by pushing the identity through the layers
as OpenPI runs them, and every other leaf as it is. Key paths are joined with ``/``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from tests.checkpoints import save_step
from tests.trees import Expert, Tree, build, nest

HERE = Path(__file__).parent

SAMPLES: dict[str, tuple[Tree, tuple[str, ...]]] = {
    # alpha is neither rank: --lora-alpha paligemma=8,action_expert=2
    "pi0_tiny": (
        build(
            Expert(width=16, head_dim=4, hidden=32, attention_rank=4, feed_forward_rank=4, alpha=8.0),
            Expert("_1", width=8, head_dim=4, hidden=16, attention_rank=8, feed_forward_rank=2, alpha=2.0),
            layers=2,
            seed=1,
        ),
        ("value",),
    ),
    # OpenPI's stock rank and alpha, so that no flag is needed; no `value` suffixes
    "pi0_fast_tiny": (
        build(
            Expert(width=16, head_dim=4, hidden=32, attention_rank=16, feed_forward_rank=16, alpha=16.0),
            model="pi0-FAST",
            layers=2,
            seed=2,
        ),
        (),
    ),
}


def main() -> None:
    """Write every sample anew."""
    for name, (tree, suffix) in SAMPLES.items():
        folder = HERE / name
        shutil.rmtree(folder, ignore_errors=True)
        step = save_step(folder / "2999", nest(tree.leaves, suffix=suffix))
        # Newer Orbax notes the writer's own path there; no reader needs it.
        (step / "params" / "commit_success.txt").unlink(missing_ok=True)
        expected = {
            "/".join(path): np.ascontiguousarray(values.astype(np.float32)) for path, values in tree.expected.items()
        }
        save_file(expected, folder / "expected.safetensors")


if __name__ == "__main__":
    main()
