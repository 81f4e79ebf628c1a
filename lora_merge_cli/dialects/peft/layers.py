"""Layers under LoRA: from the shapes of weight and factors to the equation that merges them.

``lora_A`` is (rank, inputs) and ``lora_B`` (outputs, rank) whatever the layer; what differs is how the weight is stored:

- ``nn.Linear``, and a two-dimensional parameter: (outputs, inputs);
- Transformers' ``Conv1D``, of GPT-2 and its kin: (inputs, outputs);
- ``nn.Embedding``: (vocabulary, width); its factors are (rank, vocabulary) and (width, rank);
- convolutions: (outputs, inputs, kernel...); A has the kernel's axes too, B has axes of extent 1 there.

Shapes tell the first two apart unless the weight is square. ``fan_in_fan_out`` in the configuration is no property of the adapter
then but of the layer that PEFT visited last, so it must agree with what the rest of the adapter and the model's type say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lora_merge_cli.dialects.peft.config import AdapterConfig
from lora_merge_cli.dialects.peft.keys import Layer, Role
from lora_merge_cli.dialects.torch_model import LINEAR, LINEAR_FORWARD
from lora_merge_cli.equation import Equation
from lora_merge_cli.errors import LoraMergeError, ShapeMismatch, UnmatchedAdapter, UnsupportedCheckpoint
from lora_merge_cli.records import Factor, Forward, TensorSpec

CONV1D = "ri,or->io"
CONV1D_FORWARD = Forward("bti,io->bto", "bti,ri->btr", "btr,or->bto")
EMBEDDING = "rv,dr->vd"
EMBEDDING_FORWARD = Forward("btv,vd->btd", "btv,rv->btr", "btr,dr->btd")
BIAS = "r,or->o"
BIAS_FORWARD = Forward("bt,o->bto", "bt,r->btr", "btr,or->bto")

_KERNEL_DIMS = "xyz"
_CONV1D_MODELS = frozenset({"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder"})
"""Model types of Transformers whose blocks are made of ``Conv1D``."""
_CONV1D_MODULES = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})

_Sizes = tuple[int, int]


@dataclass(frozen=True)
class Fit:
    """How a layer's factors make its delta."""

    equation: str
    """From the factors' dims to the weight's."""
    forward: Forward
    """What the layer computes."""
    factors: Mapping[str, Factor]
    """``lora_a`` and ``lora_b``, with DoRA ``magnitude``."""
    rank: int
    """The extent that the factors share."""


class Orientations:
    """Which weights of an adapted model are stored (inputs, outputs): by shape, and for square ones by all that is known."""

    def __init__(
        self, config: AdapterConfig, model: Mapping[str, Any] | None, shapes: Iterable[tuple[str, _Sizes, _Sizes]]
    ) -> None:
        """Learn from the layers that are not square.

        Args:
            config: The adapter's configuration.
            model: The base's configuration, if there is one.
            shapes: For each linear layer with factors its module, its weight's shape, and the outputs and inputs of its factors.
        """
        self._flag = config.transposed
        model_type = (model or {}).get("model_type")
        self._type = model_type if isinstance(model_type, str) else None
        self._modules: list[str] = []
        self._seen: set[bool] = set()
        for module, weight, sizes in shapes:
            self._modules.append(module)
            if sizes[0] != sizes[1] and sorted(weight) == sorted(sizes):
                self._seen.add(weight != sizes)

    def transposed(self, module: str, where: str) -> bool | LoraMergeError:
        """Whether a square weight is stored (inputs, outputs), or why nobody can tell."""
        by_type = self._by_type(module)
        if by_type is not None and self._mixed():
            return by_type
        if len(self._seen) > 1:
            return self._unclear(where, "layers of both kinds and a model_type that does not tell them apart")
        votes = {vote for vote in (self._flag, by_type, *self._seen) if vote is not None}
        if not votes:
            return self._unclear(where, "neither fan_in_fan_out nor a model_type")
        if len(votes) == 1 and (True not in votes or by_type is not None or self._seen or self._alike()):
            return votes.pop()
        said = [
            f"fan_in_fan_out {str(self._flag).lower()}" if self._flag is not None else "",
            f"model_type {self._type}" if by_type is not None else "",
            f"the other layers {'(in, out)' if True in self._seen else '(out, in)'}" if self._seen else "",
        ]
        return self._unclear(where, ", ".join(filter(None, said)))

    def _alike(self) -> bool:
        """Whether all layers are of one kind by their names.

        PEFT sets the flag for the last layer that it comes to: by itself it says nothing about layers of another kind.
        """
        names = set(map(_last, self._modules))
        return len(names) == 1 or names <= _CONV1D_MODULES

    def _by_type(self, module: str) -> bool | None:
        if self._type is None:
            return None
        if self._type in _CONV1D_MODELS:
            return _last(module) in _CONV1D_MODULES
        # Models that are not of Transformers may have Conv1D layers too: what the other layers show counts more than a name.
        return None if self._seen == {True} else False

    def _mixed(self) -> bool:
        """Whether the flag says nothing, since the adapter is on layers of both kinds."""
        return self._type in _CONV1D_MODELS and len({_last(module) in _CONV1D_MODULES for module in self._modules}) > 1

    def _unclear(self, where: str, found: str) -> LoraMergeError:
        return ShapeMismatch(
            "a square weight that may be stored either way round",
            where=where,
            expected="fan_in_fan_out and the model's config.json to agree",
            found=found,
            hint="correct fan_in_fan_out in a copy of adapter_config.json, or put the model's config.json beside its weights",
        )


def sizes_of(tensors: Mapping[Role, TensorSpec]) -> _Sizes | None:
    """Outputs and inputs of a linear layer's factors; None for other layers."""
    a, b = tensors.get("lora_a"), tensors.get("lora_b")
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2:
        return None
    return b.shape[0], a.shape[1]


def missing_factor(layer: Layer, tensors: Mapping[Role, TensorSpec], where: str) -> LoraMergeError | None:
    """The refusal of a layer that lacks one of its factors, or has those of two kinds."""
    pairs: Sequence[tuple[Role, Role]] = (("lora_a", "lora_b"), ("embedding_a", "embedding_b"))
    whole = [pair for pair in pairs if all(role in tensors for role in pair)]
    if len(whole) == 1 and not any(role in tensors for pair in pairs if pair not in whole for role in pair):
        return None
    present = ", ".join(tensors)
    return UnmatchedAdapter(
        "a layer without a pair of factors",
        where=f"{where} :: {layer.module}",
        expected="lora_A and lora_B, or lora_embedding_A and lora_embedding_B",
        found=present,
    )


def fit_layer(
    layer: Layer,
    weight: str,
    shape: tuple[int, ...],
    orientations: Orientations | None,
    where: str,
) -> Fit | LoraMergeError:
    """How a layer's factors fit its weight.

    Args:
        layer: The layer, with a whole pair of factors.
        weight: The name of the base's tensor.
        shape: Its shape, or that of what the adapter brings instead of it.
        orientations: For square weights; None where it must be (outputs, inputs).
        where: The adapter, for errors.
    """
    tensors = layer.tensors
    here = f"{where} :: {layer.module}"
    embedding = "embedding_a" in tensors
    a, b = tensors["embedding_a" if embedding else "lora_a"], tensors["embedding_b" if embedding else "lora_b"]
    if embedding:
        rule: tuple[str, Forward] | LoraMergeError | None = (EMBEDDING, EMBEDDING_FORWARD)
    elif len(shape) == 2:
        rule = _linear(layer, shape, orientations, here)
    else:
        rule = _convolution(shape, a.shape, here)
    if isinstance(rule, LoraMergeError):
        return rule
    b_shape = b.shape[:2] if len(b.shape) == len(shape) and set(b.shape[2:]) <= {1} else b.shape
    sizes = None if rule is None else Equation(rule[0]).sizes(a.shape, b_shape, shape)
    if rule is None or sizes is None or 0 in sizes.values():
        return ShapeMismatch(
            "the factors do not fit the weight",
            where=here,
            expected="the shapes of a linear layer, an embedding or a convolution under LoRA",
            found=f"A {a.shape}, B {b.shape} and {weight} {shape}",
            hint="see that the base is the one that the adapter was trained on",
        )
    factors = {"lora_a": Factor(a.path), "lora_b": Factor(b.path, None if b_shape == b.shape else b_shape)}
    magnitude = tensors.get("magnitude")
    if magnitude is not None:
        outputs = sizes["d" if embedding else "o"]
        flat = _flat(magnitude, outputs)
        if flat is None:
            return ShapeMismatch(
                "DoRA's magnitudes do not fit the weight",
                where=here,
                expected=f"{outputs} entries",
                found=magnitude.shape,
            )
        factors["magnitude"] = flat
    return Fit(rule[0], rule[1], factors, sizes["r"])


def fit_bias(layer: Layer, bias: TensorSpec, where: str) -> Fit | LoraMergeError:
    """How the bias of a layer's ``lora_B`` fits the layer's own: a low-rank update of rank one, whose ``lora_a`` is a one."""
    added = layer.tensors["bias"]
    if added.shape != bias.shape or len(bias.shape) != 1 or not bias.shape[0]:
        return ShapeMismatch(
            "the bias of lora_B does not fit the layer's",
            where=f"{where} :: {layer.module}",
            expected=bias.shape,
            found=added.shape,
        )
    return Fit(BIAS, BIAS_FORWARD, {"lora_b": Factor(added.path, (bias.shape[0], 1))}, 1)


def _linear(
    layer: Layer, shape: tuple[int, ...], orientations: Orientations | None, where: str
) -> tuple[str, Forward] | LoraMergeError | None:
    sizes = sizes_of(layer.tensors)
    fits = shape == sizes
    turned = sizes is not None and shape == (sizes[1], sizes[0])
    if fits and turned and orientations is not None:
        verdict = orientations.transposed(layer.module, where)
        if isinstance(verdict, LoraMergeError):
            return verdict
        fits = not verdict
    if fits:
        return LINEAR, LINEAR_FORWARD
    return (CONV1D, CONV1D_FORWARD) if turned else None


def _convolution(shape: tuple[int, ...], a: tuple[int, ...], where: str) -> tuple[str, Forward] | LoraMergeError | None:
    if len(shape) not in (3, 4, 5) or len(a) != len(shape):
        return None
    if shape[2:] == a[2:] and shape[1] < a[1] and a[1] % shape[1] == 0:
        return UnsupportedCheckpoint(
            "a convolution in groups: its delta is not low-rank",
            where=where,
            expected=f"{a[1]} inputs",
            found=f"{shape[1]} in each of {a[1] // shape[1]} groups",
        )
    k = _KERNEL_DIMS[: len(shape) - 2]
    return f"ri{k},or->oi{k}", Forward(f"bti{k},oi{k}->bto", f"bti{k},ri{k}->btr", "btr,or->bto")


def _flat(spec: TensorSpec, entries: int) -> Factor | None:
    if spec.shape == (entries,):
        return Factor(spec.path)
    return Factor(spec.path, (entries,)) if spec.size == entries else None


def _last(module: str) -> str:
    return module.rsplit(".", maxsplit=1)[-1]
