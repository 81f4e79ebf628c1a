"""Modules that were trained whole, of which the adapter's file must hold every tensor.

PEFT compares ends of names, without regard to dots: ``norm`` stands for ``input_layernorm`` too. It adds ``classifier`` and
``score`` by itself for some tasks, whether the model has them or not.

Source: huggingface/peft 0.21, ``peft/utils/other.py``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from lora_merge_cli.dialects.interface import Tree
from lora_merge_cli.dialects.peft.config import AdapterConfig
from lora_merge_cli.dialects.peft.heads import has_no_head, live_prefix
from lora_merge_cli.dialects.peft.keys import Keys
from lora_merge_cli.dialects.peft.names import Names, is_embedding, is_head
from lora_merge_cli.dialects.torch_names import dotted
from lora_merge_cli.dtypes import is_float
from lora_merge_cli.errors import UnmatchedAdapter
from lora_merge_cli.records import first_names


def saved_module(module: str, saved: Iterable[str]) -> str | None:
    """The module that was saved and that this one is, or is in; None if there is none."""
    parts = module.split(".")
    parents = (".".join(parts[: count + 1]) for count in range(len(parts)))
    ends = tuple(saved)
    return next((parent for parent in parents if parent.endswith(ends)), None)


def saved_problems(keys: Keys, config: AdapterConfig, base: Tree, names: Names, where: str) -> Iterator[Exception]:
    """Modules that the configuration says were trained whole, and that the adapter does not hold: what they learned is lost.

    Args:
        keys: The adapter's keys, before anything is taken out of them.
        config: Its configuration.
        base: The checkpoint.
        names: Where its tensors are.
        where: The adapter, for errors.
    """
    saved = tuple(filter(None, config.modules_to_save))
    if not saved:
        return
    brought = {name: names.path(name) for name, whole in keys.whole.items() if not whole.wrapped}
    modules = {module for name in brought if (module := saved_module(name.rpartition(".")[0], saved)) is not None}
    lost = [*_lost(base, saved, set(brought.values()), modules, live_prefix(keys, names))]
    if not has_no_head(keys, config, base, names):
        lost += [name for name in saved if is_head(name) and not _is_there(name, base, modules)]
    if config.tied and any(map(_is_tied, brought)):
        # One tensor serves both, and one copy of it is enough.
        lost = [name for name in lost if not _is_tied(name)]
    if lost:
        yield UnmatchedAdapter(
            "modules that were trained whole and are not in the adapter",
            where=f"{where} :: {first_names(lost, 3)}",
            expected=f"every tensor that modules_to_save names: {first_names(saved, 3)}",
            hint="save the adapter again from the trained model; or take the names out of a copy of adapter_config.json if they were "
            "not trained",
        )


def _lost(base: Tree, saved: tuple[str, ...], brought: set[object], modules: set[str], prefix: str) -> Iterator[str]:
    """The base's tensors, by their names in the live model, that should have been brought."""
    for path, spec in base.index.tensors.items():
        name = f"{prefix}{dotted(path)}"
        module, _, leaf = name.rpartition(".")
        found = saved_module(module, saved)
        if found is None or path in brought or not is_float(spec.dtype):
            continue
        # Buffers, causal masks for example, are in some checkpoints and not in others.
        if leaf == "weight" or (leaf == "bias" and len(spec.shape) == 1) or found not in modules:
            yield name


def _is_there(name: str, base: Tree, modules: set[str]) -> bool:
    """Whether a head is in the base, which says by itself whether it was lost, or is in the adapter."""
    stored = (dotted(path).rpartition(".")[0] for path in base.index.tensors)
    return any(module.endswith(name) for module in (*stored, *modules))


def _is_tied(name: str) -> bool:
    """Whether a module, or the module of a tensor, may be an end of tied embeddings."""
    return any(is_embedding(module) or is_head(module) for module in (name, name.rpartition(".")[0]))
