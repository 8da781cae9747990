"""Reads NVIDIA's pickles of networks (EDM's format) as data: nothing that they hold is imported or run.

An allow-list of names stands for what the format needs, and each of them is answered by an inert stand-in that is made
anew for every file. Everything else is refused by name. Only reads the file.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from pipestill.errors import InputError

PROTOCOLS = (4, 5)
# extension codes, objects and buffers from outside, instances of protocol 0: none of it occurs in the format
REFUSED_OPCODES = frozenset({"EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "INST", "OBJ", "NEXT_BUFFER"})
DEEPEST = 64  # modules within modules
LARGEST_RANK = 8  # dimensions of a tensor


@dataclass(frozen=True)
class Network:
    """One pickled network: its class's name, its constructor's keywords, and its tensors by dotted name."""

    class_name: str
    arguments: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    children: Mapping[str, Network]  # the networks directly below it, by attribute


class Refused(Exception):
    """What was found that does not belong; turned into an InputError that names the file."""


def read_networks(path: Path) -> dict[str, Network]:
    """Every network that the pickle's top-level dict holds (`ema`, …), by key.

    Raises InputError, in one line with the offending name, where the file is not such a pickle.
    """
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            _check_opcodes(file, size)
            file.seek(0)
            body = _Reader(_Bounded(file, size)).load()
        if not isinstance(body, dict):
            raise Refused(f"holds a {_kind(body)}, a dict of networks was expected")
        found = {key: network for key, value in body.items() if (network := _network_at(str(key), value)) is not None}
        if not found:
            raise Refused(f"holds no network (its keys are: {', '.join(map(str, body)) or 'none'})")
        return found
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}") from error
    except Refused as refused:
        raise InputError(f"{path} {refused}; nothing in it was run") from None
    except RecursionError:
        raise InputError(f"{path} is nested too deeply; nothing in it was run") from None
    except MemoryError:
        raise InputError(f"{path} asks for more memory than there is; nothing in it was run") from None
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{path} is no whole pickle in EDM's format ({reason}); nothing in it was run") from None


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


class _Held:
    """A tensor or a storage on its way through the pickle machine, which can do nothing to it."""

    __slots__ = ("value",)
    value: Any

    def __init__(self, value: Any) -> None:
        object.__setattr__(self, "value", value)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused(f"sets {name} on a tensor")

    def __setstate__(self, state: Any) -> None:
        raise Refused("gives a tensor a state")


class _Module:
    """An object that would have been made by running its class's source: the class's name and the state alone."""

    __slots__ = ("class_name", "state")
    class_name: str
    state: dict[str, Any]

    def __init__(self, class_name: str, state: dict[str, Any]) -> None:
        object.__setattr__(self, "class_name", class_name)
        object.__setattr__(self, "state", state)

    def __setattr__(self, name: str, value: Any) -> None:
        raise Refused(f"sets {name} on a module")

    def __setstate__(self, state: Any) -> None:
        raise Refused("gives a module a second state")


def _stand_ins() -> dict[str, Any]:
    """A fresh stand-in for each name that the format needs: what one file does to them, no other file sees."""

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
        """dnnlib.util.EasyDict, without its attributes."""

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

    def storage(content: Any = None) -> _Held:
        """torch.storage._load_from_bytes, through torch's own reader of plain tensors."""
        if not isinstance(content, bytes):
            raise Refused("reads a storage from something else than bytes")
        if content.startswith(b"PK"):
            raise Refused("hides a zip archive in the bytes of a storage")
        try:
            read = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        except (
            RuntimeError,
            pickle.UnpicklingError,
            EOFError,
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
        ) as error:
            raise Refused(f"holds a storage that cannot be read ({' '.join(str(error).split())[:160]})") from None
        if not isinstance(read, torch.storage.TypedStorage):
            raise Refused(f"holds a {_kind(read)} where a storage with a dtype belongs")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # typed storages are deprecated, and what old files hold
            return _Held(_Storage(read.untyped(), read.dtype))

    def tensor(held: Any = None, offset: Any = None, size: Any = None, stride: Any = None, *_: Any) -> _Held:
        """torch._utils._rebuild_tensor_v2, with every bound checked."""
        if type(held) is not _Held or not isinstance(held.value, _Storage):
            raise Refused("builds a tensor on something that is no storage")
        return _Held(_view(held.value, offset, size, stride))

    def parameter(held: Any = None, *_: Any) -> _Held:
        if type(held) is not _Held or not isinstance(held.value, Tensor):
            raise Refused("builds a parameter on something that is no tensor")
        return held

    def module(meta: Any = None) -> _Module:
        """NVIDIA's reconstructor, which would run `module_src`: here the record of what it was given."""
        if not isinstance(meta, dict) or meta.get("type") != "class" or not isinstance(meta.get("state"), dict):
            raise Refused("rebuilds something that is no class with a state")
        return _Module(str(meta.get("class_name")), meta["state"])

    return {
        "torch_utils.persistence._reconstruct_persistent_obj": module,
        "collections.OrderedDict": OrderedDict,
        "torch._utils._rebuild_parameter": parameter,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch.storage._load_from_bytes": storage,
        "torch.nn.modules.container.ModuleDict": ModuleDict,
        "numpy.core.multiarray.scalar": scalar,
        "numpy._core.multiarray.scalar": scalar,
        "numpy.dtype": DType,
        "dnnlib.util.EasyDict": EasyDict,
    }


ALLOWED = frozenset(_stand_ins())


def _view(storage: _Storage, offset: Any, size: Any, stride: Any) -> Tensor:
    """What a view of a storage shows, contiguous: the storage itself where it is all of it, else a copy.

    Raises Refused where it would leave the storage.
    """
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
    return view if view.is_contiguous() and count == there else view.contiguous().clone()


class _Reader(pickle.Unpickler):
    """The pickle machine with nothing but stand-ins to call."""

    def __init__(self, file: _Bounded) -> None:
        super().__init__(cast(Any, file))
        self._names: dict[str, Callable[..., Any]] = _stand_ins()

    def find_class(self, module: str, name: str) -> Any:
        _check_name(module, name)
        return self._names[f"{module}.{name}"]

    def persistent_load(self, identity: Any) -> Any:
        raise Refused("asks for an object from outside the file")


# --- from records to networks -------------------------------------------------------------------------------------


def _kind(value: Any) -> str:
    return value.class_name if isinstance(value, _Module) else type(value).__name__


def _network_at(name: str, value: Any) -> Network | None:
    """The network that a record describes; None where it is none (an augmentation pipe, a loss, a dict of options)."""
    if not isinstance(value, _Module) or not isinstance(value.state.get("_modules"), dict):
        return None
    return _network(value.class_name, value.state, name, set(), 0)


def _network(class_name: str, state: dict[str, Any], name: str, seen: set[int], depth: int) -> Network:
    """A module with all below it; `seen` are the objects met so far, each of which may stand in one place alone."""
    if depth > DEEPEST:
        raise Refused(f"nests modules more than {DEEPEST} deep")
    tensors: dict[str, Tensor] = {}
    children: dict[str, Network] = {}
    for part, key, value in _members(state, name):
        where = f"{name}.{key}"
        if id(value) in seen:
            raise Refused(f"holds {where} twice")
        seen.add(id(value))
        if part != "_modules":
            if type(value) is not _Held or not isinstance(value.value, Tensor):
                raise Refused(f"holds a {_kind(value)} at {where}, where a tensor belongs")
            tensors[key] = value.value
            continue
        below = value.state if isinstance(value, _Module) else getattr(value, "state", None)
        if not isinstance(below, dict) or not (isinstance(value, _Module) or _kind(value) == "ModuleDict"):
            raise Refused(f"holds a {_kind(value)} at {where}, where a module belongs")
        children[key] = _network(_kind(value), below, where, seen, depth + 1)
        tensors |= {f"{key}.{rest}": tensor for rest, tensor in children[key].tensors.items()}
    return Network(class_name, _arguments(state, name), tensors, children)


def _members(state: dict[str, Any], name: str) -> Iterator[tuple[str, str, Any]]:
    """Parameters, buffers and modules of a module's state: which of them, the member's name, the member."""
    for part in ("_parameters", "_buffers", "_modules"):
        members = state.get(part, {})
        if not isinstance(members, dict) or not all(isinstance(key, str) for key in members):
            raise Refused(f"has {part} at {name} that are no dict by name")
        yield from ((part, key, value) for key, value in members.items() if value is not None)


def _arguments(state: dict[str, Any], name: str) -> dict[str, Any]:
    """The keywords that a module was constructed with."""
    arguments = state.get("_init_kwargs") or {}
    if state.get("_init_args"):
        raise Refused(f"has positional constructor arguments at {name}, keywords were expected")
    if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
        raise Refused(f"has constructor arguments at {name} that are no keywords")
    return dict(arguments)
