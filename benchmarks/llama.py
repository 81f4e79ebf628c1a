"""Merge a rank-16 PEFT adapter on every linear layer of a 1.1 B-parameter Llama, bfloat16 in three shards.

Beside ``cp -r`` of the base, and beside PEFT's own from_pretrained, merge_and_unload and save_pretrained where it is installed.

    python benchmarks/llama.py [--runs 5] [--no-peft] [--keep]
"""

from __future__ import annotations

import argparse
import importlib.util
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

from lora_merge_cli.dtypes import BFLOAT16, FLOAT32
from lora_merge_cli.formats.interface import Checkpoint, Destination, LeafData
from lora_merge_cli.formats.safetensors_dir import SafetensorsFormat
from lora_merge_cli.records import Array, TensorSpec, full_region

DATA = Path(__file__).parent / "data" / "llama"
LAYERS, HIDDEN, INNER, VOCABULARY, KEYS = 22, 2048, 5632, 32000, 256
RANK, ALPHA, SHARD_BYTES = 16, 32, 800_000_000
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEYS, HIDDEN),
    "self_attn.v_proj": (KEYS, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INNER, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
ADAPTER_CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": RANK,
    "lora_alpha": ALPHA,
    "target_modules": [name.split(".")[1] for name in LINEARS],
}
PEFT = """
import sys, torch
from transformers import AutoModelForCausalLM
from peft import PeftModel
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def base_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the base."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in LINEARS.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)


def adapter_shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor of the adapter."""
    for layer in range(LAYERS):
        for name, (out, inner) in LINEARS.items():
            stem = f"base_model.model.model.layers.{layer}.{name}"
            yield f"{stem}.lora_A.weight", (RANK, inner)
            yield f"{stem}.lora_B.weight", (out, RANK)


def make() -> None:
    """Write base and adapter unless they are there already."""
    if DATA.exists():
        return
    partial = DATA.with_name("llama.partial")
    shutil.rmtree(partial, ignore_errors=True)
    rng = np.random.default_rng(0)
    write(partial / "base", dict(base_shapes()), BFLOAT16, 0.02, rng)
    (partial / "base" / "config.json").write_text(json.dumps(CONFIG, indent=2))
    write(partial / "adapter", dict(adapter_shapes()), FLOAT32, 0.01, rng)
    (partial / "adapter" / "model.safetensors").rename(partial / "adapter" / "adapter_model.safetensors")
    (partial / "adapter" / "adapter_config.json").write_text(json.dumps(ADAPTER_CONFIG, indent=2))
    partial.rename(DATA)


def write(
    directory: Path, shapes: dict[str, tuple[int, ...]], dtype: np.dtype, std: float, rng: np.random.Generator
) -> None:
    """Random tensors as a directory of safetensors; norms are ones."""
    directory.mkdir(parents=True)
    specs = [TensorSpec((name,), shape, dtype) for name, shape in shapes.items()]

    def values(spec: TensorSpec) -> Array:
        if len(spec.shape) == 1:
            return np.ones(spec.shape, dtype)
        return (rng.standard_normal(spec.shape, dtype=np.float32) * np.float32(std)).astype(dtype)

    leaves = (LeafData(spec, spec.shape, iter([(full_region(spec.shape), values(spec))])) for spec in specs)
    like = Checkpoint("safetensors", directory, None, directory, None)  # type: ignore[arg-type]
    SafetensorsFormat().sink(Destination(directory, max_shard_bytes=SHARD_BYTES), like).write(specs, leaves, ())


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT's own merge out")
    parser.add_argument("--keep", action="store_true", help="keep the merged model")
    options = parser.parse_args()
    # In a process of its own: a child's peak memory starts at what its parent holds.
    maker = multiprocessing.get_context("spawn").Process(target=make)
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit("the model could not be made")
    base, adapter = str(DATA / "base"), str(DATA / "adapter")
    tool = [sys.executable, "-m", "lora_merge_cli"]
    outputs = {name: DATA.with_name(f"llama-{name}") for name in ("merged", "copy", "peft")}
    commands = {
        "cp -r": ["cp", "-r", "--reflink=never", base, str(outputs["copy"])],
        "merge": [*tool, "merge", base, "--adapter", adapter, "-o", str(outputs["merged"]), "-q"],
        "verify": [*tool, "verify", str(outputs["merged"]), "--against", base, "--adapter", adapter, "-q"],
    }
    if not options.no_peft and importlib.util.find_spec("peft"):
        commands["peft"] = [sys.executable, "-c", PEFT, base, adapter, str(outputs["peft"])]
    rows: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(options.runs):
        for output in outputs.values():
            shutil.rmtree(output, ignore_errors=True)
        for name, command in commands.items():
            rows[name].append(timed(command))
    size = sum(file.stat().st_size for file in outputs["merged"].iterdir())
    print(f"{platform.machine()}, {os.cpu_count()} cores; output {size / 2**30:.2f} GiB; {options.runs} runs")
    print_table(rows)
    for name in ("cp -r", "peft"):
        if name in rows:
            print(f"merge takes {median_ratio(rows, 'merge', name):.2f} times {name} (medians)")
    for name, output in outputs.items():
        if name != "merged" or not options.keep:
            shutil.rmtree(output, ignore_errors=True)


if __name__ == "__main__":
    main()
