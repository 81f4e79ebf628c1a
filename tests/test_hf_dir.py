from __future__ import annotations

import os
from pathlib import Path

import pytest

from lora_merge_cli.errors import CorruptCheckpoint, UsageError
from lora_merge_cli.formats.hf_dir import companions, find_adapter, left_out, read_config


def put(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


def test_a_configuration(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"tie_word_embeddings": true, "é": [1, null]}', encoding="utf-8")
    assert read_config(tmp_path, "config.json") == {"tie_word_embeddings": True, "é": [1, None]}
    assert read_config(tmp_path, "generation_config.json") is None


@pytest.mark.parametrize("contents", [b"", b"[1]", b"{", b"null", b"\xff\xfe{}", b'{"a":' * 99_999])
def test_a_configuration_that_is_none(tmp_path: Path, contents: bytes):
    (tmp_path / "config.json").write_bytes(contents)
    with pytest.raises(CorruptCheckpoint, match=r"a configuration that is no.*config.json"):
        read_config(tmp_path, "config.json")


def test_a_configuration_that_cannot_be_followed(tmp_path: Path):
    (tmp_path / "config.json").symlink_to("gone")
    with pytest.raises(CorruptCheckpoint, match=r"leads nowhere: .*config.json \(found gone\)"):
        read_config(tmp_path, "config.json")
    (tmp_path / "a.json").mkdir()
    with pytest.raises(CorruptCheckpoint, match=r"a.json"):
        read_config(tmp_path, "a.json")


KEPT = (
    "LICENSE", "README.md", "added_tokens.json", "chat_template.jinja", "config.json", "generation_config.json", "merges.txt",
    "modeling_x.py", "preprocessor_config.json", "processor/a/b.json", "special_tokens_map.json", "spiece.model",
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "trainer_state.json", "vocab.json",
)  # fmt: skip
WEIGHTS = (
    "consolidated.00.pth", "consolidated.safetensors", "flax_model.msgpack", "model.Q4.gguf", "model.fp16.safetensors",
    "pytorch_model-00001-of-00002.bin", "pytorch_model.bin", "pytorch_model.bin.index.json", "tf_model.h5", "x.onnx", "y.PT",
    "model.safetensors.index.fp16.json",
)  # fmt: skip
STATE = ("optimizer.pt", "rng_state.pth", "rng_state_0.pth", "scheduler.pt", "training_args.bin", "optimizer_0.bin")
ADAPTERS = ("adapter_config.json", "adapter_model.bin", "adapter_model.safetensors", "adapters.safetensors")
HIDDEN = (".gitattributes", ".gitignore")
USED = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json")


def test_every_name_is_used_kept_or_left_out_with_a_reason(tmp_path: Path):
    put(tmp_path, *KEPT, *WEIGHTS, *STATE, *ADAPTERS, *HIDDEN, *USED, "lora_merge.json")
    put(
        tmp_path,
        ".git/config",
        ".cache/huggingface/a.json",
        "checkpoint-40/config.json",
        "onnx/model.onnx",
        "onnx/a.json",
    )
    assert companions(tmp_path, USED) == tuple(sorted(KEPT))
    found = left_out(tmp_path, USED)
    folders = {".git/": "hidden", ".cache/": "hidden", "checkpoint-40/": "another checkpoint of the run"}
    folders["onnx/"] = "a folder with weights of its own: model.onnx"
    reasons = dict.fromkeys(HIDDEN, "hidden") | dict.fromkeys(ADAPTERS, "an adapter's file") | folders
    reasons |= dict.fromkeys(STATE, "the trainer's state does not fit the merged parameters")
    assert found == reasons | dict.fromkeys(WEIGHTS, "weights that are not the ones in use")


def test_arrays_in_a_folder(tmp_path: Path):
    put(tmp_path, "sub/x.safetensors", "sub/y.safetensors", "sub/config.json")
    assert companions(tmp_path, {"sub/x.safetensors"}) == ("sub/config.json",)
    assert list(left_out(tmp_path, {"sub/x.safetensors"})) == ["sub/y.safetensors"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    put(tmp_path / "elsewhere", "tokenizer/a.json", "b.json")
    model = put(tmp_path / "model", "config.json")
    (model / "tokenizer").symlink_to(tmp_path / "elsewhere/tokenizer")
    (model / "again").symlink_to("tokenizer")
    (model / "b.json").symlink_to(tmp_path / "elsewhere/b.json")
    (model / "loop").symlink_to(model)
    (tmp_path / "elsewhere/tokenizer/up").symlink_to(model)
    put(model, "deep/er/c.json")
    (model / "deep/er/back").symlink_to(model / "deep")
    assert companions(model, ()) == ("again/a.json", "b.json", "config.json", "deep/er/c.json", "tokenizer/a.json")
    assert left_out(model, ()) == dict.fromkeys(
        ("again/up/", "deep/er/back/", "loop/", "tokenizer/up/"), "a link to a folder around it"
    )


def test_a_link_that_leads_nowhere(tmp_path: Path):
    (tmp_path / "optimizer.pt").symlink_to("gone")
    assert companions(tmp_path, ()) == ()
    (tmp_path / "vocab.txt").symlink_to("gone")
    with pytest.raises(CorruptCheckpoint, match=r"leads nowhere: .*vocab.txt"):
        companions(tmp_path, ())


def test_a_pipe_is_not_copied(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    assert companions(tmp_path, ()) == ()
    assert left_out(tmp_path, ()) == {"pipe": "no file with contents"}


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapters_own_directory(tmp_path: Path, name: str):
    put(tmp_path, name, "checkpoint-5/adapter_config.json")
    assert find_adapter(tmp_path) == (tmp_path, ())
    assert find_adapter(tmp_path / name) is None


def test_the_only_adapter_below(tmp_path: Path):
    put(tmp_path, "default/adapter_config.json", "other/config.json", ".hidden/adapter_config.json")
    folder, notes = find_adapter(tmp_path) or pytest.fail()
    assert folder == tmp_path / "default"
    assert notes == (f"the only adapter below {tmp_path}: default",)


def test_the_newest_step_goes_by_its_number(tmp_path: Path):
    put(tmp_path, *(f"checkpoint-{n}/adapter_model.safetensors" for n in (9, 80, 100)), "checkpoint-200/config.json")
    folder, notes = find_adapter(tmp_path) or pytest.fail()
    assert folder == tmp_path / "checkpoint-100"
    assert notes == (f"checkpoint-100 of 3 (the newest): {folder}",)


@pytest.mark.parametrize("names", [("a", "b"), ("a", "checkpoint-5"), ("a", "checkpoint-5", "checkpoint-6")])
def test_several_adapters_are_listed(tmp_path: Path, names: tuple[str, ...]):
    put(tmp_path, *(f"{name}/adapter_config.json" for name in names))
    with pytest.raises(UsageError, match=f"found {', '.join(names)}.*name one, for example {tmp_path / 'a'}"):
        find_adapter(tmp_path)


def test_no_adapter(tmp_path: Path):
    put(tmp_path, "config.json", "a/model.safetensors")
    assert find_adapter(tmp_path) is None
    assert find_adapter(tmp_path / "gone") is None
