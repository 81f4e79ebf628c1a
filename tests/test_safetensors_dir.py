from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lora_merge_cli.errors import CorruptCheckpoint, InputNotFound, UsageError
from lora_merge_cli.formats.interface import Checkpoint
from lora_merge_cli.formats.safetensors_dir import SafetensorsFormat
from tests.safetensors_files import library_writes, write

FORMAT = SafetensorsFormat()


def put(folder: Path, *names: str) -> Path:
    """Small files: tensors called after the file where they are safetensors, else nothing much."""
    for name in names:
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(".safetensors"):
            library_writes(file, {file.stem: np.zeros(2, np.float32)}, {"format": "pt"})
        else:
            file.write_text('{"a": 1}' if name.endswith(".json") else "text")
    return folder


def leaves(checkpoint: Checkpoint | None) -> list[str]:
    assert checkpoint is not None
    return [str(path[0]) for path in checkpoint.source.index().tensors]


def test_a_directory_as_transformers_writes_it(tmp_path: Path):
    beside = ("config.json", "tokenizer.json", "README.md", "extra/vocab.txt", "chat_template.jinja")
    left = ("adapter_config.json", "optimizer.pt", "pytorch_model.bin", ".gitattributes", "checkpoint-5/config.json")
    put(tmp_path, "model.safetensors", "lora_merge.json", *beside, *left)
    checkpoint = FORMAT.open(tmp_path, None)
    assert leaves(checkpoint) == ["model"]
    assert (checkpoint.format, checkpoint.given, checkpoint.directory) == ("safetensors", tmp_path, tmp_path)
    assert (checkpoint.item, checkpoint.step, checkpoint.steps, checkpoint.notes) == (None, None, (), ())
    assert checkpoint.companions == tuple(sorted(beside))
    assert set(checkpoint.left_out) == {name.replace("config.json", "") if "/" in name else name for name in left}
    assert checkpoint.config == {"a": 1}
    assert checkpoint.metadata == {"format": "pt"}
    assert checkpoint.provenance == tmp_path / "lora_merge.json"
    assert checkpoint.assets is None


@pytest.mark.parametrize(
    "name", ["params.safetensors", "diffusion_pytorch_model.safetensors", "model-00001-of-00001.safetensors"]
)
def test_the_only_file_is_the_model(tmp_path: Path, name: str):
    put(tmp_path, name, "adapter_model.safetensors")
    assert leaves(FORMAT.open(tmp_path, None)) == [Path(name).stem]


def test_a_stock_name_goes_before_others(tmp_path: Path):
    put(tmp_path, "model.safetensors", "consolidated.safetensors")
    checkpoint = FORMAT.open(tmp_path, None)
    assert leaves(checkpoint) == ["model"]
    assert checkpoint.companions == ()
    assert "not the ones in use" in checkpoint.left_out["consolidated.safetensors"]


@pytest.mark.parametrize("names, listed", [
    (["a.safetensors", "b.safetensors"], "a.safetensors, b.safetensors"),
    (["model.safetensors", "params.safetensors"], "model.safetensors, params.safetensors"),
    (["x.safetensors.index.json", "y.safetensors.index.json"], "x.safetensors.index.json, y.safetensors.index.json"),
])  # fmt: skip
def test_several_candidates_are_listed(tmp_path: Path, names: list[str], listed: str):
    put(tmp_path, *names)
    with pytest.raises(UsageError, match=f"several files could be meant: .*found {listed}.*name one, for example"):
        FORMAT.open(tmp_path, None)


@pytest.mark.parametrize("names", [
    ["adapter_model.safetensors", "adapter_config.json"], ["config.json"], [], ["pytorch_model.bin", "extra.safetensors"],
    ["unet/model.safetensors"], [".model.safetensors"], ["checkpoint-5/adapter_model.safetensors"],
])  # fmt: skip
def test_what_is_no_checkpoint_of_this_format(tmp_path: Path, names: list[str]):
    put(tmp_path, *names)
    assert FORMAT.open(tmp_path, None) is None
    assert all(FORMAT.open(tmp_path / name, None) is None for name in names if "adapter" in name)


def test_shards_need_their_index(tmp_path: Path):
    put(tmp_path, "model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors")
    with pytest.raises(CorruptCheckpoint, match=r"without their index: .*expected model.safetensors.index.json"):
        FORMAT.open(tmp_path, None)
    with pytest.raises(UsageError, match="one shard of several"):
        FORMAT.open(tmp_path / "model-00001-of-00003.safetensors", None)


def test_only_what_the_index_names_is_read(tmp_path: Path):
    write(tmp_path, {("a",): np.zeros(4), ("b",): np.ones(4)}, max_shard_bytes=32)
    put(tmp_path, "model-00003-of-00003.safetensors", "config.json")
    checkpoint = FORMAT.open(tmp_path, None)
    assert leaves(checkpoint) == ["a", "b"]
    assert checkpoint.companions == ("config.json",)
    assert list(checkpoint.left_out) == ["model-00003-of-00003.safetensors"]
    by_index = FORMAT.open(tmp_path / "model.safetensors.index.json", None)
    assert by_index.directory == tmp_path
    assert by_index.source.fingerprint() == checkpoint.source.fingerprint()


def test_a_whole_model_goes_before_an_index(tmp_path: Path):
    write(tmp_path, {("a",): np.zeros(4), ("b",): np.ones(4)}, max_shard_bytes=32)
    put(tmp_path, "model.safetensors")
    checkpoint = FORMAT.open(tmp_path, None)
    assert leaves(checkpoint) == ["model"]
    assert "model.safetensors, and not model.safetensors.index.json" in checkpoint.notes[0]
    assert "model.safetensors.index.json" not in checkpoint.companions
    assert leaves(FORMAT.open(tmp_path / "model.safetensors.index.json", None)) == ["a", "b"]


def test_a_trainers_output(tmp_path: Path):
    put(tmp_path, "checkpoint-9/model.safetensors", "checkpoint-10/model.safetensors", "checkpoint-11/rng_state.pth")
    put(tmp_path, "checkpoint-10/config.json")
    checkpoint = FORMAT.open(tmp_path, None)
    assert (checkpoint.step, checkpoint.steps, checkpoint.directory) == (10, (9, 10), tmp_path / "checkpoint-10")
    assert (checkpoint.given, checkpoint.companions) == (tmp_path, ("config.json",))
    assert checkpoint.notes == (
        f"step 10 of 2 (the newest): {tmp_path / 'checkpoint-10'}",
        "passed over, since they hold no safetensors model: checkpoint-11",
    )
    asked = FORMAT.open(tmp_path, 9)
    assert (asked.step, asked.notes) == (9, (f"step 9 of 2 (as asked): {tmp_path / 'checkpoint-9'}",))
    assert FORMAT.open(tmp_path / "checkpoint-9", None).step == 9
    assert FORMAT.open(tmp_path / "checkpoint-9", 9).step == 9
    for path, step, error in ((tmp_path, 11, InputNotFound), (tmp_path / "checkpoint-9", 10, UsageError)):
        with pytest.raises(error, match=rf"step {step}\b"):
            FORMAT.open(path, step)
    put(tmp_path, "model.safetensors")
    assert FORMAT.open(tmp_path, None).directory == tmp_path
    assert FORMAT.open(tmp_path, 9).step == 9


@pytest.mark.parametrize("name", ["model.safetensors", "ab12cd34"])
def test_a_lone_file(tmp_path: Path, name: str):
    put(tmp_path, "x.safetensors", "config.json", f"{name}.lora_merge.json")
    (tmp_path / "x.safetensors").rename(tmp_path / name)
    checkpoint = FORMAT.open(tmp_path / name, None)
    assert leaves(checkpoint) == ["x"]
    assert checkpoint.directory == checkpoint.source.path == tmp_path / name
    assert (checkpoint.config, checkpoint.companions, checkpoint.left_out) == ({"a": 1}, (), {})
    assert checkpoint.provenance == tmp_path / f"{name}.lora_merge.json"
    with pytest.raises(UsageError, match="--step 3 needs a run directory"):
        FORMAT.open(tmp_path / name, 3)


def test_files_of_other_kinds(tmp_path: Path):
    for name, contents in {
        "a": b"",
        "b": b"PK\3\4" * 9,
        "c.pth": b"\x80\x02}q\0.",
        "d": b"\2" + bytes(7) + b"[]",
    }.items():
        (tmp_path / name).write_bytes(contents)
        assert FORMAT.open(tmp_path / name, None) is None
        assert FORMAT.open_adapter(tmp_path / name) is None
    (tmp_path / "x.safetensors").write_bytes(b"nothing of the kind")
    for open_it in (lambda path: FORMAT.open(path, None), FORMAT.open_adapter):
        with pytest.raises(CorruptCheckpoint, match=r"not a safetensors file.*x.safetensors"):
            open_it(tmp_path / "x.safetensors")


def test_the_hubs_cache_is_all_links(tmp_path: Path):
    write(tmp_path / "out", {("a",): np.zeros(4), ("b",): np.ones(4)}, max_shard_bytes=32)
    put(tmp_path / "out", "config.json", "tokenizer.json")
    (tmp_path / "blobs").mkdir()
    snapshot = tmp_path / "snapshots"
    snapshot.mkdir()
    for number, file in enumerate(sorted((tmp_path / "out").iterdir())):
        file.rename(tmp_path / f"blobs/{number}")
        (snapshot / file.name).symlink_to(f"../blobs/{number}")
    checkpoint = FORMAT.open(snapshot, None)
    assert leaves(checkpoint) == ["a", "b"]
    assert checkpoint.companions == ("config.json", "tokenizer.json")
    (tmp_path / "link").symlink_to(snapshot)
    assert FORMAT.open(tmp_path / "link", None).directory == tmp_path / "link"
    (snapshot / "tokenizer.json").unlink()
    (snapshot / "tokenizer.json").symlink_to("../blobs/gone")
    with pytest.raises(CorruptCheckpoint, match=r"leads nowhere: .*tokenizer.json \(found ../blobs/gone\)"):
        FORMAT.open(snapshot, None)
    (snapshot / "model.safetensors").symlink_to("../blobs/gone")
    with pytest.raises(CorruptCheckpoint, match=r"leads nowhere: .*model.safetensors"):
        FORMAT.open(snapshot, None)


def test_assets_of_a_tree(tmp_path: Path):
    tree = {("params", "w"): np.zeros(4)}
    write(tmp_path, tree)
    put(tmp_path, "assets/droid/norm_stats.json", "config.json")
    checkpoint = FORMAT.open(tmp_path, None)
    assert (checkpoint.assets, checkpoint.companions) == (tmp_path / "assets", ("config.json",))
    put(tmp_path / "torch", "model.safetensors", "assets/droid/norm_stats.json")
    checkpoint = FORMAT.open(tmp_path / "torch", None)
    assert (checkpoint.assets, checkpoint.companions) == (None, ("assets/droid/norm_stats.json",))


@pytest.mark.parametrize("given, found", [
    ("", "adapter_model"),
    ("adapter_model.safetensors", "adapter_model"),
    ("other.safetensors", "other"),
])  # fmt: skip
def test_an_adapter(tmp_path: Path, given: str, found: str):
    put(tmp_path, "adapter_model.safetensors", "adapter_model.bin", "adapter_config.json", "other.safetensors")
    adapter = FORMAT.open_adapter(tmp_path / given)
    assert leaves(adapter) == [found]
    assert adapter.config == (None if found == "other" else {"a": 1})
    assert adapter.given == tmp_path / given
    assert adapter.directory == tmp_path / given


def test_the_newest_adapter_of_a_run(tmp_path: Path):
    put(tmp_path, "checkpoint-9/adapter_model.safetensors", "checkpoint-10/adapter_model.safetensors")
    adapter = FORMAT.open_adapter(tmp_path)
    assert (adapter.directory, adapter.step, adapter.given) == (tmp_path / "checkpoint-10", 10, tmp_path)
    assert "checkpoint-10 of 2 (the newest)" in adapter.notes[0]


def test_adapters_of_another_format(tmp_path: Path):
    put(tmp_path, "bin/adapter_config.json", "bin/adapter_model.bin", "model/model.safetensors")
    assert FORMAT.open_adapter(tmp_path / "bin") is None
    assert FORMAT.open_adapter(tmp_path / "model") is None


def test_an_adapter_without_weights(tmp_path: Path):
    put(tmp_path, "adapter_config.json")
    with pytest.raises(CorruptCheckpoint, match="an adapter's configuration without its weights"):
        FORMAT.open_adapter(tmp_path)


def test_what_peft_saves(tmp_path: Path):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(3, 4)), peft.LoraConfig(target_modules=["0"], r=2, lora_alpha=6)
    )
    model.save_pretrained(tmp_path)
    adapter = FORMAT.open_adapter(tmp_path)
    expected = peft.get_peft_model_state_dict(model)
    assert set(leaves(adapter)) == set(expected)
    assert adapter.config["lora_alpha"] == 6
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == adapter.config
    assert FORMAT.open(tmp_path, None) is None
