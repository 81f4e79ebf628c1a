"""How far one model's outputs, and its weights, are from another's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from rounding_model_subjects import Outputs
from safetensors.torch import load_file
from torch import Tensor

_STEM, _SUFFIX = "base_model.model.", ".lora_A.weight"


def compare(reference: Outputs, found: Outputs) -> dict[str, float]:
    """What a variant says beside the reference, computed in float64.

    ``kl``: mean over the ``rows`` of KL(reference || variant), in nats, and ``kl error``, its standard error; ``logit max`` and
    ``logit median``: of the absolute differences of logits; ``agreement``: rows whose best choice is the same; ``loss``: cross
    entropy to the right choices; ``accuracy``: rows whose best choice is the right one; ``cosine``: mean of 1 - cos between the
    embeddings, where there are any.
    """
    divergences, losses, differences = [], [], []
    for at in range(0, len(found.logits), 64):
        one, other = (outputs.logits[at : at + 64].double() for outputs in (reference, found))
        expected, logs = one.log_softmax(-1), other.log_softmax(-1)
        divergences.append((expected.exp() * (expected - logs)).sum(-1))
        losses.append(-logs.gather(1, found.targets[at : at + 64, None])[:, 0])
        differences.append((other - one).abs().float())
    best = found.logits.argmax(-1)
    errors, kl = torch.cat(differences), torch.cat(divergences)
    measured = {
        "rows": len(kl),
        "kl": float(kl.mean()),
        "kl error": float(kl.std() / len(kl) ** 0.5),
        "logit max": float(errors.max()),
        "logit median": float(errors.median()),
        "agreement": float((best == reference.logits.argmax(-1)).double().mean()),
        "loss": float(torch.cat(losses).mean()),
        "accuracy": float((best == found.targets).double().mean()),
    }
    if reference.embeddings is not None and found.embeddings is not None:
        # |a - b|^2 / 2 of unit vectors is 1 - cos, without the cancellation.
        apart = (reference.embeddings.double() - found.embeddings.double()).square().sum(-1) / 2
        measured["cosine"] = float(apart.mean())
    return measured


class Weights:
    """The kernels that an adapter changes, and by how much it would have.

    d is the exact change ``(alpha / r) B A``, q the one that a merge made: its stored values less the base's. All in float64.
    """

    def __init__(self, base: Path, adapter: Path) -> None:
        config = json.loads((adapter / "adapter_config.json").read_text())
        self._scale = config["lora_alpha"] / config["r"]
        self._base = load_file(base / "model.safetensors")
        self._adapter = load_file(adapter / "adapter_model.safetensors")

    def _delta(self, key: str) -> tuple[Tensor, Tensor]:
        """d, (out, in), and an orthonormal basis of the adapter's inputs, (in, r)."""
        inner, outer = self._adapter[key].double(), self._adapter[key.replace("lora_A", "lora_B")].double()
        return self._scale * outer @ inner, torch.linalg.qr(inner.T).Q

    def _kernel(self, tensors: Mapping[str, Tensor], key: str) -> Tensor:
        return tensors[key.removeprefix(_STEM).removesuffix(_SUFFIX) + ".weight"].double()

    def sizes(self) -> dict[str, float]:
        """Over all sites together: ``ratio``, |d| / |w|, Frobenius, and ``std`` of d; ``least`` and ``most``: of sites' ratios."""
        delta, kernel, entries, ratios = 0.0, 0.0, 0, []
        for key in self._keys():
            d, _ = self._delta(key)
            changed, whole = float(d.square().sum()), float(self._kernel(self._base, key).square().sum())
            delta, kernel, entries = delta + changed, kernel + whole, entries + d.numel()
            ratios.append((changed / whole) ** 0.5)
        return {
            "ratio": (delta / kernel) ** 0.5,
            "std": (delta / entries) ** 0.5,
            "least": min(ratios),
            "most": max(ratios),
        }

    def survival(self, tensors: Mapping[str, Tensor]) -> dict[str, float]:
        """What stored weights kept, over all sites together.

        ``gain``: <q, d> / <d, d>; ``inputs``: |(q - d) U| / |d U|, the error along the adapter's inputs; ``noise``: |q - d| / |d|,
        all of it.
        """
        along = delta = seen = error = 0.0
        for key in self._keys():
            d, basis = self._delta(key)
            wrong = self._kernel(tensors, key) - self._kernel(self._base, key) - d
            along += float((wrong * d).sum())
            delta += float(d.square().sum())
            seen += float((wrong @ basis).square().sum())
            error += float(wrong.square().sum())
        return {"gain": 1 + along / delta, "inputs": (seen / delta) ** 0.5, "noise": (error / delta) ** 0.5}

    def _keys(self) -> list[str]:
        return [key for key in self._adapter if key.endswith(_SUFFIX)]
