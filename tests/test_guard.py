"""What a merge may cost, in counts that do not depend on the machine's mood: bytes, decoded leaves, allocations, memory."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from tests.checkpoints import save_step
from tests.safetensors_files import library_writes
from tests.trees import ACTION, BFLOAT16, PALIGEMMA, Flat, build, nest

pytestmark = pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the counters are those of proc(5)")

MIB = 2**20
LAYERS, WIDTH, HIDDEN, RANK = 12, 512, 4096, 16
ENTRIES = 8192  # of the embedding, which no adapter touches
# A block has 4 Mi entries, 8 MiB in bfloat16; the largest leaf 96 MiB, and 192 MiB in float32.
LARGEST_ALLOCATION = 20 * MIB

PROBE = """
import json, os, sys, tracemalloc
from collections import Counter
from pathlib import Path
os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
from lora_merge_cli import MergeOptions, MergeRequest, merge
from lora_merge_cli._cli.allocator import keep_freed_memory
from lora_merge_cli.formats.orbax_source import OrbaxSource
from lora_merge_cli.formats.safetensors_source import SafetensorsSource
from lora_merge_cli.inputs import AdapterChoice

first, checkpoint, adapter, output, dtype = sys.argv[1:]
decoded, largest = Counter(), 0

def count(path, values):
    decoded["/".join(map(str, path))] += values.nbytes
    return values

# Orbax's read is a scan, and a scan of safetensors is so many reads.
scan, read = OrbaxSource.scan, SafetensorsSource.read
OrbaxSource.scan = lambda self, path, *rest: (count(path, values) for values in scan(self, path, *rest))
SafetensorsSource.read = lambda self, path, region: count(path, read(self, path, region))

class Allocations:
    def start(self, total_bytes):
        pass
    def advance(self, name, done_bytes):
        global largest
        largest = max([largest, *(trace.size for trace in tracemalloc.take_snapshot().traces)])

def counter(file, name):
    return int(next(line.split()[1] for line in Path(file).read_text().splitlines() if line.startswith(name)))

def request(path, output, adapters=()):
    options = MergeOptions(dtype=dtype)
    return MergeRequest(Path(path), Path(output), adapters, jobs=2, options=options)

keep_freed_memory()
merge(request(first, output + ".first"))  # imports, compiles what is shared, and sets a mark for the peak
before = {name: counter("/proc/self/io", name) for name in ("rchar", "wchar")}
peak = counter("/proc/self/status", "VmHWM")
decoded.clear()
tracemalloc.start(1)
adapters = (AdapterChoice(Path(adapter)),) if adapter else ()
merge(request(checkpoint, output, adapters), Allocations())
json.dump(
    {
        "read": counter("/proc/self/io", "rchar") - before["rchar"],
        "written": counter("/proc/self/io", "wchar") - before["wchar"],
        "growth": (counter("/proc/self/status", "VmHWM") - peak) * 1024,
        "decoded": decoded,
        "traced": tracemalloc.get_traced_memory()[1],
        "largest": largest,
        "stores": sorted({"orbax", "tensorstore"} & sys.modules.keys()),
    },
    sys.stdout,
)
"""


@dataclass(frozen=True)
class Subject:
    """A checkpoint to merge, and what of it has to be looked at."""

    checkpoint: Path
    adapter: Path | None
    kernels: Mapping[str, int]
    """Those under adapters: by leaf, how many bytes its values take."""
    factors: Mapping[str, int]
    """The same of the adapters' leaves."""
    most_traced: int
    """What Python and NumPy may hold at a time: the blocks on their way, with room for how threads fall in."""
    most_growth: int
    """By how much the process may outgrow that of a tiny merge: those, the device's and the writer's, with room."""
    dtype: str = "keep"

    @property
    def stored(self) -> int:
        """The bytes of all files."""
        return size_of(self.checkpoint) + (size_of(self.adapter) if self.adapter else 0)


@dataclass(frozen=True)
class Counts:
    """What a merge came to."""

    read: int
    written: int
    growth: int
    """By how much the largest resident size exceeds that of a tiny merge."""
    decoded: Mapping[str, int]
    """By leaf, how many bytes of it were asked for as values; 0 of one that is copied as it is stored."""
    traced: int
    """The most that Python and NumPy held at a time."""
    largest: int
    """The largest of their allocations."""
    stores: list[str]
    """Libraries that read checkpoints, and copy what they read."""


def size_of(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def normal(rng: np.random.Generator, *shape: int, dtype: npt.DTypeLike = BFLOAT16, std: float = 0.02) -> np.ndarray:
    values = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
    return np.asarray(values, dtype)


def tiny_leaves() -> Flat:
    """A tree with adapters on the language model's feed-forward alone: two kernels to compile for."""
    action = dataclasses.replace(ACTION, attention_rank=None, feed_forward_rank=None, trained=True)
    return build(dataclasses.replace(PALIGEMMA, attention_rank=None), action).leaves


def openpi_leaves() -> Flat:
    """The same with a large kernel, and a large embedding, which stays as it is."""
    rng = np.random.default_rng(0)
    leaves = tiny_leaves()
    mlp = ("PaliGemma", "llm", "layers", "mlp")
    leaves[*mlp, "gating_einsum"] = normal(rng, LAYERS, 2, WIDTH, HIDDEN)
    leaves[*mlp, "gating_einsum_lora_a"] = normal(rng, LAYERS, 2, WIDTH, RANK, dtype=np.float32)
    leaves[*mlp, "gating_einsum_lora_b"] = normal(rng, LAYERS, 2, RANK, HIDDEN, dtype=np.float32)
    leaves[*mlp, "linear"] = normal(rng, LAYERS, WIDTH, WIDTH)
    leaves[*mlp, "linear_lora_a"] = normal(rng, LAYERS, WIDTH, RANK, dtype=np.float32)
    leaves[*mlp, "linear_lora_b"] = normal(rng, LAYERS, RANK, WIDTH, dtype=np.float32)
    leaves["PaliGemma", "llm", "embedder", "input_embedding"] = normal(rng, ENTRIES, WIDTH)
    return leaves


def in_openpi(directory: Path, *, chunk_bytes: int | None, most_growth: int, dtype: str) -> Subject:
    """A step as Orbax writes it."""
    leaves = openpi_leaves()
    step = save_step(directory / "7", nest(leaves), chunk_bytes=chunk_bytes)
    names = {"/".join(map(str, ("params", *path, "value"))): values for path, values in leaves.items()}
    factors = {name: values.nbytes for name, values in names.items() if "lora" in name}
    changed = {kernel_of(factor) for factor in factors}
    kernels = {name: values.nbytes for name, values in names.items() if name.removesuffix("/value") in changed}
    return Subject(step, None, kernels, factors, 92 * MIB, most_growth, dtype)


def kernel_of(factor: str) -> str:
    """The feed-forward kernel that a factor of OpenPI's belongs to."""
    return re.sub(r"_lora_[ab]/value$", "", factor)


def beside_peft(directory: Path) -> Subject:
    """A base in bfloat16, and an adapter as PEFT names its tensors."""
    rng = np.random.default_rng(0)
    base, adapter = directory / "base", directory / "adapter"
    base.mkdir()
    adapter.mkdir()
    modules = {f"model.layers.{layer}.mlp.up_proj": (HIDDEN, WIDTH * 2) for layer in range(LAYERS)}
    weights = {f"{module}.weight": normal(rng, *shape) for module, shape in modules.items()}
    weights["model.embed_tokens.weight"] = normal(rng, ENTRIES, WIDTH * 2)
    factors = {}
    for module, (out, inputs) in modules.items():
        factors[f"base_model.model.{module}.lora_A.weight"] = normal(rng, RANK, inputs, dtype=np.float32)
        factors[f"base_model.model.{module}.lora_B.weight"] = normal(rng, out, RANK, dtype=np.float32)
    library_writes(base / "model.safetensors", weights)
    (base / "config.json").write_text(json.dumps({"model_type": "llama", "tie_word_embeddings": True}))
    library_writes(adapter / "adapter_model.safetensors", factors)
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "target_modules": ["up_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    kernels = {f"{module}.weight": weights[f"{module}.weight"].nbytes for module in modules}
    return Subject(
        base, adapter, kernels, {name: values.nbytes for name, values in factors.items()}, 26 * MIB, 95 * MIB
    )


SUBJECTS: dict[str, Callable[[Path], Subject]] = {
    "a trainer's chunks": functools.partial(in_openpi, chunk_bytes=None, most_growth=256 * MIB, dtype="keep"),
    "a layer per chunk": functools.partial(
        in_openpi, chunk_bytes=2 * WIDTH * HIDDEN * 2, most_growth=384 * MIB, dtype="auto"
    ),
    "safetensors": beside_peft,
}


def probed(subject: Subject, output: Path) -> Counts:
    """Merge in a process of its own, after a tiny merge in the same process."""
    tiny = save_step(output.parent / "tiny" / "7", nest(tiny_leaves()))
    arguments = [tiny, subject.checkpoint, subject.adapter or "", output, subject.dtype]
    done = subprocess.run([sys.executable, "-c", PROBE, *arguments], stdout=subprocess.PIPE, check=True)
    return Counts(**json.loads(done.stdout))


@pytest.mark.parametrize("name", SUBJECTS)
def test_a_merge_costs_what_it_must(name: str, tmp_path: Path) -> None:
    """One test, not one per count: each process that runs tests would otherwise merge anew."""
    subject = SUBJECTS[name](tmp_path)
    output = tmp_path / "out" / "merged"
    counts = probed(subject, output)
    assert_read_once(subject, counts)
    assert counts.written == pytest.approx(size_of(output), rel=0.01)
    assert_decoded_once(subject, counts)
    assert counts.stores == []
    assert MIB < counts.largest <= LARGEST_ALLOCATION
    assert counts.traced <= subject.most_traced
    assert counts.growth <= subject.most_growth


def assert_read_once(subject: Subject, counts: Counts) -> None:
    """The input is read once, and its factors once more."""
    factors = sum(subject.factors.values())
    assert factors < 0.15 * subject.stored, "factors are a small part, or a second reading would go unseen"
    assert 0.9 * subject.stored < counts.read <= 1.1 * (subject.stored + factors)


def assert_decoded_once(subject: Subject, counts: Counts) -> None:
    """Kernels under adapters are decoded once, their factors twice at most, and no other leaf."""
    assert counts.decoded.keys() == subject.kernels.keys() | subject.factors.keys()
    assert {name: counts.decoded[name] for name in subject.kernels} == subject.kernels
    assert all(counts.decoded[name] <= 2 * size for name, size in subject.factors.items())
