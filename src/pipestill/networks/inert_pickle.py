"""A pickle machine that runs nothing: ten names, each answered by an inert stand-in, and containers of plain values.

It reads what NVIDIA's EDM files consist of; anything else is refused by name. Knows nothing of networks.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO, ClassVar, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

PROTOCOLS = (4, 5)
# extension codes, objects and buffers from outside, instances of protocol 0: none of it occurs in the format
REFUSED_OPCODES = frozenset({"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INST", "OBJ", "NEXT_BUFFER"})
LARGEST_RANK = 8  # dimensions of a tensor
PLAIN = (str, int, float, bool, bytes, type(None))  # what may be a key: hashing it goes no deeper


class Refused(Exception):
    """What was found that does not belong."""


def load(file: BinaryIO, size: int) -> Any:
    """What a file of `size` bytes holds: plain values, containers of them, `Module` and `Held`.

    Raises Refused, with the offending name, and whatever a damaged pickle raises.
    """
    _check_opcodes(file, size)
    file.seek(0)
    return _Machine(_Bounded(file, size), size).load()


def kind(value: Any) -> str:
    """What a value is, in a message."""
    if isinstance(value, Held):
        return "tensor"
    return value.class_name if isinstance(value, Module) else type(value).__name__


class _Bounded:
    """A file for reading that never asks the system for more bytes than the file has left."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size

    def read(self, count: int = -1) -> bytes:
        left = self._size - self._file.tell()
        return self._file.read(left if count < 0 else min(count, left))

    def readline(self) -> bytes:
        return self._file.readline()

    def tell(self) -> int:
        return self._file.tell()


def _check_opcodes(file: BinaryIO, size: int) -> None:
    """Goes over the opcodes without running them: protocol, kinds of opcodes, memo indices, nothing after the end."""
    head = file.read(2)
    file.seek(0)
    if head == b"PK":
        raise Refused("is a zip archive, not a pickle: a torch checkpoint in disguise? pipestill convert reads those")
    if len(head) < 2 or head[0] != 0x80 or head[1] not in PROTOCOLS:
        raise Refused(f"is no pickle of protocol {PROTOCOLS[0]} or {PROTOCOLS[-1]}")
    stored = 0
    for opcode, argument, _ in pickletools.genops(cast(Any, _Bounded(file, size))):
        if opcode.name in REFUSED_OPCODES:
            raise Refused(f"uses the opcode {opcode.name}, which the format does not have")
        if opcode.name == "PROTO" and argument not in PROTOCOLS:
            raise Refused(f"changes its protocol to {argument}")
        if opcode.name == "MEMOIZE":
            stored += 1
        elif opcode.name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if int(cast(int, argument)) > stored:  # a table of that size would be made
                raise Refused(f"stores under memo index {argument} after {stored} entries")
            stored = max(stored, int(cast(int, argument)) + 1)
        elif opcode.name == "GLOBAL":
            module, _, name = str(argument).partition(" ")
            _check_name(module, name)
    if file.tell() != size:
        raise Refused(f"goes on for {size - file.tell()} bytes after its end")


def _check_name(module: str, name: str) -> None:
    if f"{module}.{name}" not in ALLOWED:
        raise Refused(f"names {module}.{name}, which the format does not need")


# --- stand-ins ----------------------------------------------------------------------------------------------------


class _Storage(NamedTuple):
    """Bytes, and as what they are read."""

    memory: torch.UntypedStorage
    dtype: torch.dtype


@dataclass(frozen=True, eq=False)
class Held:
    """A tensor or a storage on its way through the pickle machine, which can do nothing to it."""

    value: Any


@dataclass(frozen=True, eq=False)
class Module:
    """An object that would have been made by running its class's source: the class's name and the state alone."""

    class_name: str
    state: dict[str, Any]


def _stand_ins(size: int) -> dict[str, Any]:
    """A fresh stand-in for each name that the format needs: what one file does to them, no other file sees.

    Storages together, and tensors together, take no more than the file's `size` in bytes.
    """
    spent = {"storages": 0, "tensors": 0}

    def spend(what: str, count: int) -> None:
        spent[what] += count
        if spent[what] > size:
            raise Refused(f"asks for {what} of {spent[what]:,} bytes and more, and has {size:,} itself")

    class ModuleDict:
        """torch.nn.ModuleDict: created empty, then given its state."""

        state: dict[str, Any]

        def __init__(self, *arguments: Any) -> None:
            if arguments:
                raise Refused("calls torch.nn.modules.container.ModuleDict with arguments")

        def __setstate__(self, state: Any) -> None:
            if not isinstance(state, dict):
                raise Refused("gives a ModuleDict a state that is no dict")
            self.state = state

    class EasyDict(dict[Any, Any]):
        """dnnlib.util.EasyDict, without its attributes; created empty."""

        def __init__(self, *arguments: Any) -> None:
            if arguments:
                raise Refused("calls dnnlib.util.EasyDict with arguments")

    class Ordered(OrderedDict[Any, Any]):
        """collections.OrderedDict, created empty."""

        def __init__(self, *arguments: Any) -> None:
            if arguments:
                raise Refused("calls collections.OrderedDict with arguments")

    class DType:
        """numpy.dtype of numbers: the type, then its byte order in a state."""

        type: np.dtype[Any]

        def __init__(self, name: Any = None, *_: Any) -> None:
            if not isinstance(name, str):
                raise Refused("makes a numpy.dtype of something else than a name")
            try:
                found = np.dtype(name)
            except TypeError:
                raise Refused(f"makes a numpy.dtype of {name[:20]!r}") from None
            if found.kind not in "biuf" or found.itemsize > 8:
                raise Refused(f"holds a numpy value of dtype {name[:20]!r}: only numbers belong there")
            self.type = found

        def __setstate__(self, state: Any) -> None:
            if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
                raise Refused("gives a numpy.dtype another byte order or fields")

    def scalar(dtype: Any = None, content: Any = None) -> int | float | bool:
        """numpy's scalar: a number from its bytes."""
        if type(dtype) is not DType or not isinstance(content, bytes) or len(content) != dtype.type.itemsize:
            raise Refused("holds a numpy scalar whose bytes do not fit its dtype")
        return cast("int | float | bool", np.frombuffer(content, dtype.type)[0].item())

    def storage(content: Any = None) -> Held:
        """torch.storage._load_from_bytes, through torch's own reader of plain tensors."""
        if not isinstance(content, bytes):
            raise Refused("reads a storage from something else than bytes")
        if content.startswith(b"PK"):
            raise Refused("hides a zip archive in the bytes of a storage")
        try:
            read = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except Exception as error:  # whatever damaged or hostile bytes make torch raise
            raise Refused(f"holds a storage that cannot be read ({' '.join(str(error).split())[:160]})") from None
        if not isinstance(read, torch.storage.TypedStorage):
            raise Refused(f"holds a {kind(read)} where a storage with a dtype belongs")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # typed storages are deprecated, and what old files hold
            memory = read.untyped()
        spend("storages", memory.nbytes())
        # what the stream declares without bringing it would be whatever lay in memory
        if memory.nbytes() > len(content) or not _same_bytes(memory, content):
            raise Refused("holds a storage whose bytes are not in the file")
        return Held(_Storage(memory, read.dtype))

    def tensor(held: Any = None, offset: Any = None, size: Any = None, stride: Any = None, *_: Any) -> Held:
        """torch._utils._rebuild_tensor_v2, with every bound checked."""
        if type(held) is not Held or not isinstance(held.value, _Storage):
            raise Refused("builds a tensor on something that is no storage")
        view = _view(held.value, offset, size, stride)
        spend("tensors", view.numel() * view.element_size())
        whole = view.is_contiguous() and view.untyped_storage().nbytes() == view.numel() * view.element_size()
        return Held(view if whole else view.clone(memory_format=torch.contiguous_format))

    def parameter(held: Any = None, *_: Any) -> Held:
        if type(held) is not Held or not isinstance(held.value, Tensor):
            raise Refused("builds a parameter on something that is no tensor")
        return held

    def module(meta: Any = None) -> Module:
        """NVIDIA's reconstructor, which would run `module_src`: here the record of what it was given."""
        if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
            raise Refused("rebuilds something that is no class with a state")
        if type(meta.get("class_name")) is not str:
            raise Refused("rebuilds a class without a name")
        return Module(meta["class_name"], meta["state"])

    return {
        "torch_utils.persistence._reconstruct_persistent_obj": module,
        "collections.OrderedDict": Ordered,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch.storage._load_from_bytes": storage,
        "torch.nn.modules.container.ModuleDict": ModuleDict,
        "numpy.core.multiarray.scalar": scalar,
        "numpy._core.multiarray.scalar": scalar,
        "numpy.dtype": DType,
        "dnnlib.util.EasyDict": EasyDict,
    }


ALLOWED = frozenset(_stand_ins(0))


def _same_bytes(memory: torch.UntypedStorage, content: bytes) -> bool:
    """Whether a storage holds what the stream ends with."""
    held = torch.empty(0, dtype=torch.uint8).set_(memory).numpy()
    return bool(np.array_equal(held, np.frombuffer(content, np.uint8)[len(content) - len(held) :]))


def _view(storage: _Storage, offset: Any, size: Any, stride: Any) -> Tensor:
    """What a view of a storage shows, without a copy. Raises Refused where it would leave the storage."""
    for name, value in (("size", size), ("stride", stride)):
        if not isinstance(value, tuple) or not all(type(number) is int and number >= 0 for number in value):
            raise Refused(f"builds a tensor whose {name} is no tuple of numbers")
    if type(offset) is not int or offset < 0 or len(size) != len(stride) or len(size) > LARGEST_RANK:
        raise Refused("builds a tensor with an offset or a number of dimensions that do not fit")
    there, count = storage.memory.nbytes() // storage.dtype.itemsize, 1
    for number in size:
        count *= number
    last = offset + sum((number - 1) * step for number, step in zip(size, stride, strict=True))
    if count and (last >= there or count > there):  # a stride of 0 would make much of little
        raise Refused(f"builds a tensor of size {list(size)} on a storage of {there} numbers")
    if storage.dtype not in (torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.int64, torch.int32):
        raise Refused(f"builds a tensor of dtype {storage.dtype}")
    empty = torch.empty(0, dtype=storage.dtype)
    view: Tensor = empty.set_(storage.memory, offset, size, stride)
    return view


# --- the machine --------------------------------------------------------------------------------------------------


class _Machine(cast(Any, pickle)._Unpickler):  # type: ignore[misc]
    """Python's own unpickler, whose steps can be watched (the one in C cannot): nothing but stand-ins is called.

    Containers are filled only where they are containers, under keys whose hash goes no deeper than themselves.
    """

    dispatch: ClassVar[dict[int, Any]] = dict(cast(Any, pickle)._Unpickler.dispatch)

    def __init__(self, file: _Bounded, size: int) -> None:
        super().__init__(file)
        self._names: dict[str, Callable[..., Any]] = _stand_ins(size)
        self._classes = {value for value in self._names.values() if isinstance(value, type)}

    def find_class(self, module: str, name: str) -> Any:
        _check_name(module, name)
        return self._names[f"{module}.{name}"]

    def persistent_load(self, identity: Any) -> Any:
        raise Refused("asks for an object from outside the file")

    def _reduce(self) -> None:
        function = self.stack[-2]
        if not any(function is known for known in self._names.values()):
            raise Refused(f"calls a {kind(function)}")
        self.load_reduce()

    def _make(self, load: str, depth: int) -> None:
        if not any(self.stack[-depth] is known for known in self._classes):
            raise Refused(f"makes an object of a {kind(self.stack[-depth])}")
        getattr(self, load)()

    def _build(self) -> None:
        if type(self.stack[-2]) not in self._classes or not hasattr(self.stack[-2], "__setstate__"):
            raise Refused(f"gives a {kind(self.stack[-2])} a state")
        self.load_build()

    def _append(self) -> None:
        self._require(list, self.stack[-2])
        self.load_append()

    def _appends(self) -> None:
        self._require(list, self.metastack[-1][-1])
        self.load_appends()

    def _setitem(self) -> None:
        self._require(dict, self.stack[-3])
        _check_keys([self.stack[-2]])
        self.load_setitem()

    def _setitems(self) -> None:
        self._require(dict, self.metastack[-1][-1])
        _check_keys(self.stack[::2])
        self.load_setitems()

    def _dict(self) -> None:
        _check_keys(self.stack[::2])
        self.load_dict()

    def _additems(self) -> None:
        self._require(set, self.metastack[-1][-1])
        _check_keys(self.stack)
        self.load_additems()

    def _frozenset(self) -> None:
        _check_keys(self.stack)
        self.load_frozenset()

    def _require(self, container: type, value: Any) -> None:
        if not isinstance(value, container):
            raise Refused(f"fills a {kind(value)} as if it were a {container.__name__}")

    dispatch |= {
        pickle.REDUCE[0]: _reduce,
        pickle.NEWOBJ[0]: lambda self: self._make("load_newobj", 2),
        pickle.NEWOBJ_EX[0]: lambda self: self._make("load_newobj_ex", 3),
        pickle.BUILD[0]: _build,
        pickle.APPEND[0]: _append,
        pickle.APPENDS[0]: _appends,
        pickle.SETITEM[0]: _setitem,
        pickle.SETITEMS[0]: _setitems,
        pickle.DICT[0]: _dict,
        pickle.ADDITEMS[0]: _additems,
        pickle.FROZENSET[0]: _frozenset,
    }


def _check_keys(keys: list[Any]) -> None:
    for key in keys:
        if type(key) not in PLAIN:
            raise Refused(f"has a {kind(key)} as a key")
