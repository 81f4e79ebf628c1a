"""Make the sample checkpoints: tiny OpenPI-shaped fine-tunes, written by the real Orbax. Run from the repository's root.

    python -m sample_checkpoints.make

`expected.safetensors` holds what each must become: the dense kernels in float32, found by pushing the identity through the layers
as OpenPI runs them, and every other leaf as it is. Key paths are joined with ``/``. `llama_tiny` is a Llama-shaped model with a
PEFT adapter beside it, DoRA on its queries and a saved head; its expected weights are PEFT's formulas in float64. `pi0_tiny_base`
is what `pi0_tiny` was fine-tuned from.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
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


def make_base(folder: Path, tree: Tree) -> None:
    """What a fine-tune started from: float32 that rounds to the leaves that it froze, and, for those that it trained, others."""
    rng = np.random.default_rng(4)
    start = {}
    for path, leaf in tree.leaves.items():
        if "lora" in path[-1]:
            continue
        if leaf.dtype == ml_dtypes.bfloat16:
            # A part of bfloat16's half step.
            start[path] = leaf.astype(np.float32) * (1 + rng.uniform(-1, 1, leaf.shape) * 0.9 * 2.0**-9).astype(
                np.float32
            )
        else:
            start[path] = leaf - rng.normal(0, 0.04, leaf.shape).astype(np.float32)
    shutil.rmtree(folder, ignore_errors=True)
    save_step(folder, nest(start, suffix=()))
    (folder / "params" / "commit_success.txt").unlink(missing_ok=True)


def make_llama(folder: Path) -> None:
    """A base of bfloat16 in two shards, an adapter of rank 3 and alpha 12, and what the merge must be before it is rounded."""
    rng = np.random.default_rng(3)
    base, adapter = folder / "base", folder / "adapter"
    shutil.rmtree(folder, ignore_errors=True)
    base.mkdir(parents=True)
    adapter.mkdir()
    shapes = {
        "embed_tokens": (20, 8),
        "layers.0.self_attn.q_proj": (8, 8),
        "layers.1.self_attn.q_proj": (8, 8),
        "norm": (8,),
    }
    names = {f"model.{name}.weight": shape for name, shape in shapes.items()} | {"lm_head.weight": (20, 8)}
    tensors = {name: rng.normal(0, 0.2, shape).astype(ml_dtypes.bfloat16) for name, shape in names.items()}
    expected = {name: values.astype(np.float64) for name, values in tensors.items()}
    factors = {"base_model.model.lm_head.weight": rng.normal(0, 0.2, (20, 8)).astype(np.float32)}
    expected["lm_head.weight"] = factors["base_model.model.lm_head.weight"].astype(np.float64)
    for name in filter(lambda name: "q_proj" in name, names):
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (rng.normal(0, 0.2, shape).astype(np.float32) for shape in ((3, 8), (8, 3)))
        magnitude = rng.uniform(0.5, 1.0, 8).astype(np.float32)
        factors |= {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b, f"{stem}.lora_magnitude_vector": magnitude}
        changed = expected[name] + 12 / 3 * b.astype(np.float64) @ a.astype(np.float64)
        expected[name] = (magnitude / np.linalg.norm(changed, axis=1))[:, None] * changed
    for number, part in enumerate((list(tensors)[:2], list(tensors)[2:]), start=1):
        file = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, base / file, metadata={"format": "pt"})
        names |= dict.fromkeys(part, file)
    size = sum(values.nbytes for values in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": names}
    write_json(base / "model.safetensors.index.json", index)
    write_json(base / "config.json", {"model_type": "llama", "tie_word_embeddings": False, "torch_dtype": "bfloat16"})
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 12, "use_dora": True, "modules_to_save": ["lm_head"]}
    write_json(adapter / "adapter_config.json", {**config, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})
    save_file({name: values.astype(np.float32) for name, values in expected.items()}, folder / "expected.safetensors")


def write_json(file: Path, document: object) -> None:
    """A document for people to read, too."""
    file.write_text(json.dumps(document, indent=2) + "\n")


def main() -> None:
    """Write every sample anew."""
    make_llama(HERE / "llama_tiny")
    make_base(HERE / "pi0_tiny_base", SAMPLES["pi0_tiny"][0])
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
