"""Fine-tune two real models with PEFT's LoRA, merge in bfloat16 with each rounding, and compare with the unmerged float32 model.

    python benchmarks/rounding_model.py [--out DIR] [--quick] [--models encoder,language-model] [--tool COMMAND]

The bases are stored in bfloat16; the reference is the base widened, with its float32 adapter unmerged, computed in float32. DIR,
benchmarks/data/rounding_model if not given, gets ``rounding_model.md`` and ``rounding_model.json``, and keeps bases and adapters:
what is there is used again. Needs peft, torch, transformers, and the Python package registry for the weights.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from commands import TOOL
from machine import describe
from rounding_model_measure import Weights, compare
from rounding_model_subjects import SUBJECTS, Outputs, Subject, fine_tune, save_base
from safetensors.torch import load_file
from torch import nn

HERE = Path(__file__).parent
F32, BF16 = torch.float32, torch.bfloat16
SEEDS = (0, 1, 2)
_BF16 = ("--dtype", "bfloat16")
_CELL = ("--dtype", "float32", "--rounding", "preserve", "--serving-dtype", "bfloat16")

Figures = dict[str, float]


@dataclass(frozen=True)
class Merge:
    """A merged model: the flags that make it, one merge for each tuple of them, whose figures are averaged."""

    name: str
    flags: Sequence[tuple[str, ...]]
    cast: bool = False
    """Round every value to bfloat16 after reading, as a server does."""
    throughout: bool = False
    """Run the first of them in bfloat16 throughout as well."""


MERGES = (
    Merge("merged, float32", [("--dtype", "float32")]),
    Merge("merged, nearest", [(*_BF16, "--rounding", "nearest")], throughout=True),
    Merge(
        f"merged, stochastic, mean of {len(SEEDS)} seeds",
        [(*_BF16, "--rounding", "stochastic", "--seed", str(seed)) for seed in SEEDS],
        throughout=True,
    ),
    Merge("merged, preserve, mu 0.3", [(*_BF16, "--rounding", "preserve", "--mu", "0.3")]),
    Merge("merged, preserve, mu 1", [(*_BF16, "--rounding", "preserve", "--mu", "1")], throughout=True),
    Merge("merged, preserve, mu 3", [(*_BF16, "--rounding", "preserve", "--mu", "3")]),
    Merge("float32 file for a bfloat16 server, cast by it", [_CELL], cast=True),
    Merge("float32 file for a bfloat16 server, read as it is", [_CELL]),
)


class Experiment:
    """One adapter of one subject, and everything that its model is compared with."""

    def __init__(self, subject: Subject, base: Path, adapter: Path, tool: Sequence[str]) -> None:
        self._subject, self._base, self._adapter, self._tool = subject, base, adapter, tool
        self._output = adapter.parent / "merged"
        self._reference = self._run(self._adapted(F32, lora_dtype=F32), small=False)
        self.weights: dict[str, Figures] = {}
        self.outputs: dict[str, dict[str, list[Figures]]] = {"float32": {}, "bfloat16": {}}

    def measure(self) -> None:
        """Fill in `weights` and `outputs`: by activations and variant, the figures of each domain."""
        self._compare("reference: unmerged, float32", self._adapted(F32, lora_dtype=F32))
        self._compare("base, no adapter", self._subject.load(self._base, F32))
        self._compare("unmerged, adapter rounded to bfloat16", self._adapted(F32, lora_dtype=BF16))
        self._compare("unmerged, bfloat16", self._adapted(BF16, lora_dtype=BF16), activations="bfloat16")
        weights = Weights(self._base, self._adapter)
        for merge in MERGES:
            self._measure_merge(merge, weights)

    def _measure_merge(self, merge: Merge, weights: Weights) -> None:
        survivals, runs, slow_runs = [], [], []
        for flags in merge.flags:
            _say(f"  {merge.name}: {' '.join(flags)}")
            shutil.rmtree(self._output, ignore_errors=True)
            command = ("merge", str(self._base), "--adapter", str(self._adapter), "-o", str(self._output), *flags, "-q")
            subprocess.run([*self._tool, *command], check=True)
            tensors = load_file(self._output / "model.safetensors")
            served = {key: value.to(BF16) for key, value in tensors.items()} if merge.cast else tensors
            survivals.append(weights.survival(served))
            model = self._subject.load(self._output, F32)
            runs.append(self._figures(_cast(model, BF16) if merge.cast else model, small=False))
            if merge.throughout and not slow_runs:
                slow_runs.append(self._figures(self._subject.load(self._output, BF16), small=True))
        shutil.rmtree(self._output)
        self.weights[merge.name] = _mean(survivals)
        self.outputs["float32"][merge.name] = [_mean(domain) for domain in zip(*runs, strict=True)]
        if slow_runs:
            self.outputs["bfloat16"][merge.name] = [_mean(domain) for domain in zip(*slow_runs, strict=True)]

    def _compare(self, name: str, model: nn.Module, activations: str = "float32") -> None:
        _say(f"  {name}")
        self.outputs[activations][name] = self._figures(model, small=activations == "bfloat16")

    def _figures(self, model: nn.Module, *, small: bool) -> list[Figures]:
        """Each domain's; of the small part beside the reference on the same part."""
        if small and not hasattr(self, "_small_reference"):
            self._small_reference = self._run(self._adapted(F32, lora_dtype=F32), small=True)
        reference = self._small_reference if small else self._reference
        figures = [compare(*pair) for pair in zip(reference, self._run(model, small=small), strict=True)]
        _say("    KL " + ", ".join(f"{domain['kl']:.2e}" for domain in figures))
        return figures

    def _run(self, model: nn.Module, *, small: bool) -> list[Outputs]:
        with torch.inference_mode():
            return [
                self._subject.run(model, domain.small if small else domain.full) for domain in self._subject.domains
            ]

    def _adapted(self, dtype: torch.dtype, lora_dtype: torch.dtype) -> nn.Module:
        """The unmerged model in a dtype, with its adapter's values rounded to another first."""
        from peft import PeftModel

        base = self._subject.load(self._base, dtype)
        model = PeftModel.from_pretrained(base, str(self._adapter), autocast_adapter_dtype=False)  # type: ignore[arg-type]
        for name, value in model.named_parameters():
            if "lora_" in name:
                value.data = value.data.to(lora_dtype).to(dtype)
        return model.eval()


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Round a model's parameters, and nothing but them, to a dtype, and widen them again."""
    for value in model.parameters():
        value.data = value.data.to(dtype).to(value.dtype)
    return model


def run_subject(name: str, out: Path, tool: Sequence[str], *, quick: bool) -> Iterator[dict[str, object]]:
    """Measure every strength of one subject's adapter; after each, everything so far."""
    home = out / (f"{name}-quick" if quick else name)
    home.mkdir(parents=True, exist_ok=True)
    subject = SUBJECTS[name](out, quick=quick)
    base = home / "base"
    if not base.exists():
        _say(f"{name}: base")
        save_base(subject, base)
    strengths = []
    for strength, (steps, rate) in subject.steps.items():
        adapter = home / strength / "adapter"
        if not adapter.exists():
            _say(f"{name}: {strength}, {steps} steps")
            adapter.parent.mkdir(exist_ok=True)
            fine_tune(subject, base, adapter, steps, rate)
        _say(f"{name}: {strength}")
        experiment = Experiment(subject, base, adapter, tool)
        experiment.measure()
        strengths.append(
            {
                "strength": strength,
                "steps": steps,
                "rate": rate,
                "sizes": Weights(base, adapter).sizes(),
                "weights": experiment.weights,
                "outputs": experiment.outputs,
            }
        )
        yield {"title": subject.title, "domains": [domain.name for domain in subject.domains], "strengths": strengths}


def markdown(document: Mapping[str, object]) -> str:
    """Everything as tables."""
    machine, subjects = document["machine"], document["subjects"]
    assert isinstance(machine, dict) and isinstance(subjects, list), "as `main` makes them"
    lines = ["; ".join(f"{name}: {value}" for name, value in machine.items()), ""]
    for subject in subjects:
        lines += [f"## {subject['title']}", ""]
        for measured in subject["strengths"]:
            lines += _strength_lines(measured, subject["domains"])
    return "\n".join(lines)


def _strength_lines(measured: Mapping[str, object], domains: Sequence[str]) -> Iterator[str]:
    sizes, weights, outputs = measured["sizes"], measured["weights"], measured["outputs"]
    assert isinstance(sizes, dict) and isinstance(weights, dict) and isinstance(outputs, dict), (
        "as `run_subject` makes them"
    )
    yield f"### Adapter, {measured['strength']}: {measured['steps']} steps at a rate of {measured['rate']}"
    yield ""
    yield (
        f"Change beside kernel, Frobenius: {sizes['ratio']:.2e} over all sites, {sizes['least']:.2e} to {sizes['most']:.2e} by "
        f"site; standard deviation of the change {sizes['std']:.2e}."
    )
    yield ""
    yield from _table(["weights", "gain", "error along the adapter's inputs", "all rounding noise / change"])
    for name, row in weights.items():
        yield f"| {name} | {row['gain']:.4f} | {row['inputs']:.2e} | {row['noise']:.3g} |"
    yield ""
    for activations, variants in outputs.items():
        for number, domain in enumerate(domains):
            rows = {name: figures[number] for name, figures in variants.items()}
            predictions = round(max(row["rows"] for row in rows.values()))
            yield f"#### {domain.capitalize()}; activations in {activations}, {predictions} predictions"
            yield ""
            yield from _outputs_table(rows)
            yield ""


def _outputs_table(rows: Mapping[str, Figures]) -> Iterator[str]:
    embedded = all("cosine" in row for row in rows.values())
    columns = ["mean KL", "logit error, max", "median", "top-1 agreement", "loss", "accuracy"]
    yield from _table(["model", *columns, *(["mean 1 - cos of embeddings"] if embedded else [])])
    for name, row in rows.items():
        cells = [
            f"{row['kl']:.2e}",
            f"{row['logit max']:.3g}",
            f"{row['logit median']:.2e}",
            f"{row['agreement']:.2%}",
            f"{row['loss']:.5f}",
            f"{row['accuracy']:.2%}",
            *([f"{row['cosine']:.2e}"] if embedded else []),
        ]
        yield f"| {name} | {' | '.join(cells)} |"


def _table(columns: Sequence[str]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield "| --- |" + " --- |" * (len(columns) - 1)


def _mean(figures: Sequence[Figures]) -> Figures:
    """The mean of each figure, and beside it the least and the most where there are several to tell apart."""
    mean = {key: statistics.fmean(row[key] for row in figures) for key in figures[0]}
    if len(figures) > 1:
        for key in figures[0]:
            mean[f"{key}, least"] = min(row[key] for row in figures)
            mean[f"{key}, most"] = max(row[key] for row in figures)
    return mean


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=HERE / "data" / "rounding_model", metavar="DIR")
    parser.add_argument(
        "--quick", action="store_true", help="A few steps on little text: shows that it runs, and nothing else."
    )
    parser.add_argument("--models", default=",".join(SUBJECTS), metavar="NAME,...")
    parser.add_argument("--threads", type=int, default=1, help="Of torch; sums, and so adapters, depend on it.")
    parser.add_argument(
        "--tool", default=shlex.join(TOOL), metavar="COMMAND", help="What merges; lora-merge if not given."
    )
    options = parser.parse_args()
    os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    machine = describe(out) | {name: importlib.metadata.version(name) for name in ("torch", "peft", "transformers")}
    subjects: dict[str, object] = {}
    for name in options.models.split(","):
        for measured in run_subject(name, out, shlex.split(options.tool), quick=options.quick):
            subjects[name] = measured
            document = {"machine": machine, "quick": options.quick, "subjects": list(subjects.values())}
            (out / "rounding_model.json").write_text(json.dumps(document, indent=1) + "\n")
            (out / "rounding_model.md").write_text(markdown(document))
    print((out / "rounding_model.md").read_text())


if __name__ == "__main__":
    main()
