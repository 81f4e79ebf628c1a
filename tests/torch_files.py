"""torch's files made by hand, instruction by instruction: torch itself would not write most of them."""

from __future__ import annotations

import functools
import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_merge_cli.formats.torch_pth import TorchFormat
from lora_merge_cli.records import full_region

P = b"\x80\x02"
OD = b"ccollections\nOrderedDict\n)R"
FORMAT = TorchFormat()


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    digits = pickle.encode_long(value)
    return b"\x8a" + bytes([len(digits)]) + digits


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def storage(key: str = "0", count: int = 4, kind: str = "torch\nFloatStorage") -> bytes:
    return b"(" + text("storage") + b"c" + kind.encode() + b"\n" + text(key) + text("cpu") + number(count) + b"tQ"


def tensor(shape: Any = (4,), strides: Any = (1,), offset: int = 0, stored: bytes | None = None) -> bytes:
    stored = storage() if stored is None else stored
    layout = number(offset) + numbers(*shape) + numbers(*strides)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + stored + layout + b"\x89" + OD + b"tR"


def state(value: bytes) -> bytes:
    return P + b"}" + text("a") + value + b"s."


FOUR = {"data/0": bytes(16)}


def archive(path: Path, pickled: bytes, members: Mapping[str, bytes] = FOUR) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, contents in {"data.pkl": pickled, "version": b"3\n", **members}.items():
            file.writestr(f"archive/{name}", contents)
    return path


def read_all(path: Path) -> None:
    checkpoint = FORMAT.open(path, None)
    assert checkpoint is not None
    for leaf, spec in checkpoint.source.index().tensors.items():
        checkpoint.source.read(leaf, full_region(spec.shape))
        checkpoint.source.stored(leaf)


def legacy(
    path: Path, pickled: bytes, keys: Any = ("0",), tail: bytes = struct.pack("<q", 4) + bytes(16), **facts: Any
) -> Path:
    dump = functools.partial(pickle.dumps, protocol=2)
    facts = {"protocol_version": 1001, "little_endian": True} | facts
    head = dump(0x1950A86A20F9469CFC6C) + dump(facts.pop("version", 1001)) + dump(facts)
    path.write_bytes(head + pickled + dump(list(keys)) + tail)
    return path


def legacy_tensor(shape: Any = (4,), view: bytes = b"N") -> bytes:
    """A tensor as the older format has it: its storage says whether it is a part of another one."""
    return tensor(shape, stored=storage()[:-2] + view + b"tQ")
