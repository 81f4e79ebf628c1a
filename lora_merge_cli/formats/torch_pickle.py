"""Reading the pickles of torch's files without running anything that they ask for.

A pickle is a program for a stack machine, and its GLOBAL and REDUCE instructions call any Python function. `pickletools.genops`
splits it into instructions and executes none. The machine here knows those that a state dict needs, and the names that one needs;
whatever else a pickle asks for is refused by its name.
"""

from __future__ import annotations

import io
import pickletools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from lora_merge_cli.errors import CorruptCheckpoint, UnsupportedCheckpoint
from lora_merge_cli.formats.torch_dtypes import DTYPES, STORAGES, UNTYPED
from lora_merge_cli.formats.torch_values import Global, Size, Storage, TensorView, is_count, make_view

LARGEST_PICKLE = 64 * 2**20

# A tensor takes some 30, so these are enough for 150,000 of them.
_MOST_INSTRUCTIONS = 5_000_000
_MOST_PAIRS = 1_000_000
_LONGEST_INTEGER = 128
_LONGEST_KEY = 60
_MOST_EXTENTS = 64
_HINT = "load it with torch, if you trust it, and save the state dict alone: torch.save(model.state_dict(), FILE)"

_ATTRIBUTES = frozenset({"_metadata"})
_REBUILD = "torch._utils"
_FUNCTIONS = frozenset(
    {
        (_REBUILD, "_rebuild_tensor"),
        (_REBUILD, "_rebuild_tensor_v2"),
        (_REBUILD, "_rebuild_tensor_v3"),
        (_REBUILD, "_rebuild_parameter"),
        (_REBUILD, "_rebuild_parameter_with_state"),
        ("torch._tensor", "_rebuild_from_type_v2"),
        ("torch", "Tensor"),
        ("torch._tensor", "Tensor"),
        ("torch.nn.parameter", "Parameter"),
        ("torch.nn.parameter", "Buffer"),
        ("torch", "Size"),
        ("collections", "OrderedDict"),
    }
)
_TENSOR_TYPES = frozenset({"Tensor", "Parameter", "Buffer"})
_INNER = frozenset(name for module, name in _FUNCTIONS if module == _REBUILD)
_UNSUPPORTED = {
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_meta_tensor_no_storage": "a tensor on the meta device, which has no values",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_wrapper_subclass": "a tensor of a class of its own",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device's library",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device's library",
}


def read_pickle(stream: io.BytesIO, where: object, named: dict[str, Storage] | None = None) -> Any:
    """The value of the next pickle of a stream, which is left behind it.

    Args:
        stream: The pickle's bytes; others may follow.
        where: What errors name.
        named: Filled with the storages that the pickle names: for each key the first one.

    Returns:
        None, a bool, int, float or str; a list, tuple, dict or OrderedDict of values; a `Size`, a `Storage` or a `TensorView`.

    Raises:
        CorruptCheckpoint: It is damaged, or was made to do harm.
        UnsupportedCheckpoint: It asks for something that no state dict needs.
    """
    machine = _Machine(where, {} if named is None else named)
    try:
        for number, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if number > _MOST_INSTRUCTIONS:
                raise UnsupportedCheckpoint(
                    "the pickle is too long",
                    where=where,
                    expected=f"at most {_MOST_INSTRUCTIONS} instructions",
                    hint=_HINT,
                )
            machine.step(opcode.name, argument)
        return machine.result()
    except (ValueError, IndexError, KeyError, OverflowError) as error:
        raise CorruptCheckpoint("the pickle cannot be read", where=where, found=_printable(str(error))) from error


def _printable(text: str) -> str:
    """A text from the file, short and without control characters."""
    return text[:100].encode("unicode_escape").decode()


class _Machine:
    """The stack machine. IndexError and KeyError mean that the pickle takes what it never put there."""

    def __init__(self, where: object, named: dict[str, Storage]) -> None:
        self._where = where
        self._named = named
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def step(self, name: str, argument: Any) -> None:
        action = _ACTIONS.get(name)
        if action is None:
            raise UnsupportedCheckpoint(
                f"the pickle uses the instruction {name}, which no state dict needs", where=self._where, hint=_HINT
            )
        action(self, argument)

    def result(self) -> Any:
        value = self._stack.pop()
        if self._stack or self._below:
            raise self._corrupt("the pickle leaves values over")
        return value

    def ignore(self, _: Any) -> None:
        pass

    def literal(self, argument: Any) -> None:
        self._stack.append(argument)

    def text(self, argument: Any) -> None:
        # Fails for half a surrogate pair, which nothing could print or write again.
        argument.encode()
        self._stack.append(argument)

    def old_text(self, argument: Any) -> None:
        # A Python 2 string; its bytes are text only if they are ASCII.
        argument.encode("ascii")
        self._stack.append(argument)

    def integer(self, argument: Any) -> None:
        if argument.bit_length() > _LONGEST_INTEGER:
            raise self._corrupt("the pickle holds an absurdly long integer")
        self._stack.append(argument)

    def put(self, argument: Any) -> None:
        self._memo[argument] = self._stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._stack[-1]

    def get(self, argument: Any) -> None:
        self._stack.append(self._memo[argument])

    def mark(self, _: Any) -> None:
        self._below.append(self._stack)
        self._stack = []

    def to_mark(self) -> list[Any]:
        values = self._stack
        self._stack = self._below.pop()
        return values

    def make_tuple(self, _: Any) -> None:
        values = tuple(self.to_mark())
        self._stack.append(values)

    def last_as_tuple(self, count: int) -> None:
        if len(self._stack) < count:
            raise self._corrupt("the pickle takes values that are not there")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def append(self, _: Any) -> None:
        self._extend([self._stack.pop()])

    def appends(self, _: Any) -> None:
        self._extend(self.to_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            raise self._corrupt("the pickle appends to something that is no list")
        target.extend(values)

    def set_item(self, _: Any) -> None:
        value, key = self._stack.pop(), self._stack.pop()
        self._set([key, value])

    def set_items(self, _: Any) -> None:
        self._set(self.to_mark())

    def _set(self, values: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) not in (dict, OrderedDict) or len(values) % 2:
            raise self._corrupt("the pickle sets items of something that is no dict")
        for key, value in zip(values[::2], values[1::2], strict=True):
            target[self._key(key)] = value

    def _key(self, key: Any) -> str | int:
        # Other keys would be hashed, which for a deeply nested tuple exhausts the C stack.
        if type(key) not in (str, int):
            raise UnsupportedCheckpoint(
                "a dict with a key that is neither a string nor an integer",
                where=self._where,
                found=type(key).__name__,
                hint=_HINT,
            )
        # Python hashes integers modulo 2**61 - 1: longer ones could be made to collide, each with all others.
        if type(key) is int and key.bit_length() > _LONGEST_KEY:
            raise self._corrupt("a dict with an absurdly long integer as a key")
        checked: str | int = key
        return checked

    def find(self, argument: Any) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._known(module, name))

    def find_on_stack(self, _: Any) -> None:
        name, module = self._stack.pop(), self._stack.pop()
        if not (type(name) is type(module) is str):
            raise self._corrupt("the pickle wants a name that is no text")
        self._stack.append(self._known(module, name))

    def _known(self, module: str, name: str) -> Global:
        is_storage = module in ("torch", "torch.storage") and (name in STORAGES or name == UNTYPED)
        is_dtype = module == "torch" and name in DTYPES
        if is_storage or is_dtype or (module, name) in _FUNCTIONS:
            return Global(module, name)
        full = _printable(f"{module}.{name}")
        if module == _REBUILD and name in _UNSUPPORTED:
            what = f"{_UNSUPPORTED[name]} ({full}) cannot be carried over"
        elif module in ("torch", "torch.storage") and name.endswith("Storage"):
            what = f"a storage of an unknown kind ({full})"
        else:
            what = f"the pickle wants {full}, which no state dict needs"
        raise UnsupportedCheckpoint(what, where=self._where, hint=_HINT)

    def reduce(self, _: Any) -> None:
        arguments, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, Global) or type(arguments) is not tuple:
            raise self._corrupt("the pickle calls something that is no function")
        self._stack.append(self._call(function, arguments))

    def _call(self, function: Global, arguments: tuple[Any, ...]) -> Any:
        made: Any = None
        match function.name, arguments:
            case "OrderedDict", ():
                made = OrderedDict()
            case "OrderedDict", (list(pairs),):
                made = self._ordered(pairs)
            case "Size", (tuple(extents),) if len(extents) <= _MOST_EXTENTS and all(map(is_count, extents)):
                made = Size(extents)
            case (("_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_tensor_v3"), (Storage() as storage, *rest)):
                made = self._tensor(function, storage, rest)
            case "_rebuild_parameter", (TensorView() as data, _, _):
                made = data
            case "_rebuild_parameter_with_state", (TensorView() as data, _, _, _):
                made = data
            case "_rebuild_from_type_v2", (Global() as rebuild, Global(name=kind), tuple(inner), _) if (
                kind in _TENSOR_TYPES and rebuild.name in _INNER
            ):
                made = self._call(rebuild, inner)
        if made is None:
            raise self._corrupt(f"the pickle calls {function} with arguments that make no sense")
        return made

    def _tensor(self, function: Global, storage: Storage, arguments: list[Any]) -> TensorView | None:
        dtype = storage.dtype
        match function.name, arguments:
            case "_rebuild_tensor", (offset, shape, strides):
                metadata: list[Any] = []
            case "_rebuild_tensor_v2", (offset, shape, strides, _, _, *metadata):
                pass
            case "_rebuild_tensor_v3", (offset, shape, strides, _, _, Global(name=name), *metadata) if name in DTYPES:
                dtype = DTYPES[name]
            case _:
                return None
        if metadata and metadata != [{}]:
            raise UnsupportedCheckpoint(
                "a tensor that is to be conjugated or negated when it is read",
                where=self._where,
                hint="save it with .resolve_conj().resolve_neg()",
            )
        return make_view(storage, dtype, offset, shape, strides, self._where)

    def _ordered(self, pairs: list[Any]) -> OrderedDict[str | int, Any]:
        """What Python 2 wrote for an OrderedDict: a list of pairs."""
        # One list can be named again and again, so a copy is not paid for by the file's size.
        self._copied += len(pairs)
        if self._copied > _MOST_PAIRS:
            raise self._corrupt("the pickle copies the same list again and again")
        result: OrderedDict[str | int, Any] = OrderedDict()
        for pair in pairs:
            if type(pair) not in (list, tuple) or len(pair) != 2:
                raise self._corrupt("the pickle makes a dict of something that is no pairs")
            result[self._key(pair[0])] = pair[1]
        return result

    def build(self, _: Any) -> None:
        # `Module.state_dict()` hangs the modules' versions on its OrderedDict; nothing but `load_state_dict` looks at them.
        state = self._stack.pop()
        if type(self._stack[-1]) is not OrderedDict or type(state) is not dict or not state.keys() <= _ATTRIBUTES:
            raise UnsupportedCheckpoint(
                "the pickle sets the attributes of an object, which no state dict needs", where=self._where, hint=_HINT
            )

    def persistent(self, _: Any) -> None:
        storage = self._storage(self._stack.pop())
        self._named.setdefault(storage.key, storage)
        self._stack.append(storage)

    def _storage(self, named: Any) -> Storage:
        match named:
            # The older format has a sixth item.
            case ("storage", Global() as kind, str(key), str(), count, *view) if len(view) <= 1:
                dtype = DTYPES["uint8"] if kind.name == UNTYPED else STORAGES.get(kind.name)
                if dtype is not None and is_count(count):
                    start, size = self._part(view[0], count) if view else (0, count)
                    itemsize = dtype.itemsize
                    return Storage(key, dtype, count * itemsize, start * itemsize, size * itemsize)
        raise self._corrupt("the pickle names something stored that is no storage")

    def _part(self, view: Any, count: int) -> tuple[int, int]:
        """First entry and size of the part that a view is of a storage of `count` entries: all of it, if it is None."""
        match view:
            case None:
                return 0, count
            case (str(), start, size) if is_count(start) and is_count(size) and start + size <= count:
                return start, size
        raise self._corrupt("the pickle names a part of a storage that lies outside it")

    def _corrupt(self, what: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(what, where=self._where)


_ACTIONS: dict[str, Callable[[_Machine, Any], None]] = {
    "PROTO": _Machine.ignore,
    "FRAME": _Machine.ignore,
    "STOP": _Machine.ignore,
    "NONE": lambda machine, _: machine.literal(None),
    "NEWTRUE": lambda machine, _: machine.literal(True),
    "NEWFALSE": lambda machine, _: machine.literal(False),
    "EMPTY_TUPLE": lambda machine, _: machine.literal(()),
    "EMPTY_LIST": lambda machine, _: machine.literal([]),
    "EMPTY_DICT": lambda machine, _: machine.literal({}),
    "BININT": _Machine.literal,
    "BININT1": _Machine.literal,
    "BININT2": _Machine.literal,
    "BINFLOAT": _Machine.literal,
    "LONG1": _Machine.integer,
    "BINUNICODE": _Machine.text,
    "SHORT_BINUNICODE": _Machine.text,
    "BINUNICODE8": _Machine.text,
    "SHORT_BINSTRING": _Machine.old_text,
    "BINSTRING": _Machine.old_text,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "MARK": _Machine.mark,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.last_as_tuple(1),
    "TUPLE2": lambda machine, _: machine.last_as_tuple(2),
    "TUPLE3": lambda machine, _: machine.last_as_tuple(3),
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "GLOBAL": _Machine.find,
    "STACK_GLOBAL": _Machine.find_on_stack,
    "REDUCE": _Machine.reduce,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
