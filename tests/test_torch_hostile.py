"""torch files made to do harm: each is refused by the right error, runs nothing, and costs little memory and time."""

from __future__ import annotations

import os
import pickle
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from tests.torch_files import OD, P, archive, legacy, legacy_tensor, read_all, state, storage, tensor, text

BOTH = pytest.mark.parametrize("write", [archive, legacy])


def test_the_builders_make_good_files(tmp_path: Path) -> None:
    # Else all that follows could be refused for the wrong reason.
    read_all(archive(tmp_path / "x.pt", state(tensor())))
    read_all(legacy(tmp_path / "y.pt", state(legacy_tensor())))


CANARY = "canary"


class Runs:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


WANTED = {
    "os system": text(f"touch {CANARY}"),
    "posix system": text(f"touch {CANARY}"),
    "builtins eval": text(f"open('{CANARY}', 'w')"),
    "builtins exec": text(f"open('{CANARY}', 'w')"),
    "builtins getattr": text("x") + text("y"),
    "__builtin__ eval": text(f"open('{CANARY}', 'w')"),
    "torch load": text("x.pt"),
    "torch.serialization load": text("x.pt"),
    "torch.hub load": text("x"),
    "torch._utils _import_dotted_name": text("os.system"),
    "torch _utils._rebuild_tensor": text("x"),
    "collections OrderedDict.__init__": text("x"),
    "torch FloatStorage.from_file": text("x"),
    "torch.storage _load_from_bytes": text("x"),
    "_codecs encode": text("x"),
    "numpy._core.multiarray scalar": text("x"),
    "numpy.core.multiarray _reconstruct": text("x"),
    "argparse Namespace": b"",
    "torch._utils _rebuild_qtensor": text("x"),
    "torch._utils _rebuild_sparse_tensor": text("x"),
    "torch._utils _rebuild_meta_tensor_no_storage": text("x"),
    "torch._utils _rebuild_wrapper_subclass": text("x"),
    "torch QInt8Storage": b"",
    "torch complex32": b"",
    "torch device": text("cpu"),
}


@BOTH
@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("how", ["global", "stack", "inst", "obj", "newobj"])
def test_what_a_pickle_wants_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, how: str, write: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    module, _, name = wanted.partition(" ")
    arguments = b"(" + WANTED[wanted] + b"t"
    pickled = {
        "global": f"c{module}\n{name}\n".encode() + arguments + b"R",
        "stack": text(module) + text(name) + b"\x93" + arguments + b"R",
        "inst": b"(" + WANTED[wanted] + f"i{module}\n{name}\n".encode(),
        "obj": f"(c{module}\n{name}\n".encode() + WANTED[wanted] + b"o",
        "newobj": f"c{module}\n{name}\n".encode() + arguments + b"\x81",
    }[how]
    file = write(tmp_path / "x.pt", state(pickled))
    with pytest.raises(UnsupportedCheckpoint) as caught:
        read_all(file)
    assert str(file) in str(caught.value)
    assert (f"{module}.{name}" if how != "inst" else "INST") in str(caught.value)
    assert not (tmp_path / CANARY).exists()


def test_pythons_own_pickler_with_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        pickled = pickle.dumps({"a": Runs(os.system, f"touch {CANARY}")}, protocol=protocol)
        with pytest.raises(UnsupportedCheckpoint, match=r"system|instruction"):
            read_all(archive(tmp_path / "x.pt", pickled))
    assert not (tmp_path / CANARY).exists()


REFUSED = {
    "attributes of a tensor": state(tensor() + b"}" + text("x") + b"Nsb"),
    "__setstate__ of a dict": state(OD + b"}" + text("__setstate__") + b"Nsb"),
    "__class__ of a dict": state(OD + b"}" + text("__class__") + b"Nsb"),
    "slots of a dict": state(OD + b"N}\x86b"),
    "attributes of a function": state(b"ccollections\nOrderedDict\n}" + text("x") + b"Nsb"),
    "a key of no kind": P + b"}NNs.",
    "a tuple as key": P + b"})Ns.",
    "a number with a point as key": P + b"}G" + bytes(8) + b"Ns.",
    "bytes": state(b"C\x01x"),
    "a set": state(b"\x8f"),
    "an extension code": state(b"\x82\x01"),
    "a text persistent id": state(b"Pstorage\n"),
    "a dtype as a value": state(b"ctorch\nfloat32\n"),
    "a function as a value": state(b"ctorch._utils\n_rebuild_tensor\n"),
    "a storage as a value": state(storage()),
    "a single tensor": P + tensor() + b".",
    "a single number": P + b"K\x01.",
    "bits of a tensor": state(tensor()[:-2] + b"}" + text("conj") + b"\x88stR"),
}
CORRUPT = {
    "nothing": b"",
    "no end": state(tensor())[:-1],
    "half": state(tensor())[:60],
    "no such instruction": P + b"\xff.",
    "an empty stack": P + b"s.",
    "no mark": P + b"}u.",
    "no memo": P + b"h\x07.",
    "values left over": P + b"}}.",
    "a mark left over": P + b"}(}.",
    "odd items": P + b"}(" + text("a") + b"u.",
    "an append to a dict": P + b"}Na.",
    "an item of a list": P + b"]" + text("a") + b"Ns.",
    "an item of a tuple": P + b")" + text("a") + b"Ns.",
    "a call of a value": state(b"N)R"),
    "a call of a storage kind": state(b"ctorch\nFloatStorage\n)R"),
    "arguments that are none": state(b"ccollections\nOrderedDict\nNR"),
    "a dict of no pairs": state(b"ccollections\nOrderedDict\n(]Nae\x85R"),
    "a long integer": state(b"\x8b" + struct.pack("<i", 10**5) + bytes(10**5)).replace(b"\x8b", b"\x8a", 1),
    "half a surrogate pair": state(b"X\x03\0\0\0\xed\xa0\x80"),
    "a list in itself": P + b"]q\x00h\x00a.",
    "a dict in itself": P + b"}q\x00" + text("a") + b"h\x00s.",
    "a persistent id of no kind": state(text("0") + b"Q"),
    "a negative storage": state(tensor(stored=storage(count=-4))),
    "a storage of a dtype": state(tensor(stored=storage(kind="torch\nfloat32"))),
    "a negative extent": state(tensor((-4,))),
    "a negative stride": state(tensor((4,), (-1,), 3)),
    "a negative offset": state(tensor((4,), (1,), -1)),
    "a huge extent": state(tensor((2**40,))),
    "a wrapping product": state(tensor((2**32, 2**32), (0, 0))),
    "an absurd extent": state(tensor((2**100,), (0,))),
    "an absurd empty one": state(tensor((0, 2**40, 2**40), (0, 0, 0))),
    "behind the storage": state(tensor((4,), (1,), 1)),
    "strides behind the storage": state(tensor((2, 2), (4, 1))),
    "an empty one far behind": state(tensor((0,), (1,), 5)),
    "no strides": state(tensor((4,), ())),
    "too many axes": state(tensor((1,) * 40, (1,) * 40)),
    "an unknown storage": state(tensor(stored=storage("1"))),
    "a storage outside data/": state(tensor(stored=storage("../version"))),
    "a storage by an absolute path": state(tensor(stored=storage("/etc/passwd"))),
    "a storage larger than its bytes": state(tensor(stored=storage(count=5))),
    "no such rebuild": state(b"ctorch._utils\n_rebuild_parameter\n(cos\n"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_state_dict_needs(tmp_path: Path, case: str) -> None:
    with pytest.raises(UnsupportedCheckpoint):
        read_all(archive(tmp_path / "x.pt", REFUSED[case]))


@pytest.mark.parametrize("case", CORRUPT)
def test_what_makes_no_sense(tmp_path: Path, case: str) -> None:
    with pytest.raises(CorruptCheckpoint):
        read_all(archive(tmp_path / "x.pt", CORRUPT[case]))


def laughs(levels: int, leaf: bytes) -> bytes:
    """A list of a list twice, of a list twice, and so on: 2 to the power of `levels` leaves."""
    layers = b"".join(b"](h%ch%ceq%c" % (i, i, i + 1) for i in range(levels))
    return P + b"](" + leaf + b"eq\x00" + layers + b"."


EXPANDED = tensor((10**12,), (0,))
BOMBS = {
    "a billion laughs": laughs(50, b"N"),
    "a billion empty laughs": laughs(50, b"]"),
    "a memo with holes": state(b"N" + b"r\xff\xff\xff\xff" * 1000 + b"h\x00"),
    "deep lists": P + b"](" + b"](" * 50_000 + b"e" * 50_000 + b"e.",
    "deep tuples": P + b"N" + b"\x85" * 100_000 + b".",
    "a long text": state(b"X\xff\xff\xff\xff" + b"x"),
    "a longer text": state(b"\x8d" + b"\xff" * 7 + b"\x7f" + b"x"),
    "a long frame": b"\x80\x04\x95" + b"\xff" * 8 + b"}N.",
    "an expanded tensor": state(EXPANDED),
    "an expanded row": state(tensor((10**6, 4), (0, 1))),
    "pairs again and again": P
    + b"]("
    + b"]NNe" * 1000
    + b"eq\x00"
    + b"ccollections\nOrderedDict\n(h\x00tR0" * 1000
    + b".",
    "a wide shape": state(tensor(((1,) * 10_000), ((1,) * 10_000))),
}


@pytest.mark.parametrize("case", BOMBS)
def test_bombs_stay_small(tmp_path: Path, case: str) -> None:
    file = archive(tmp_path / "x.pt", BOMBS[case])
    start = time.monotonic()
    tracemalloc.start()
    try:
        with pytest.raises((CorruptCheckpoint, UnsupportedCheckpoint)):
            read_all(file)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 20 * 2**20 + 300 * file.stat().st_size
    assert time.monotonic() - start < 60


@pytest.mark.parametrize(
    ("write", "limit", "match"),
    [
        (archive, "torch_pickle._MOST_INSTRUCTIONS", "too long"),
        (archive, "torch_tree._MOST_PARTS", "absurdly many parts"),
        (archive, "torch_zip.LARGEST_PICKLE", "too large"),
        (legacy, "torch_legacy.LARGEST_PICKLE", "cannot be read"),
    ],
)
def test_limits_of_what_a_pickle_may_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, limit: str, match: str
) -> None:
    pickled = P + b"](" + b"]" * 500 + b"e."
    file = write(tmp_path / "x.pt", pickled) if write is archive else write(tmp_path / "x.pt", pickled, (), b"")
    read_all(file)
    monkeypatch.setattr(f"lora_merge_cli.formats.{limit}", 400)
    with pytest.raises((CorruptCheckpoint, UnsupportedCheckpoint), match=match):
        read_all(file)
