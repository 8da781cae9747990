"""NVIDIA's pickles are read as data: what the format holds comes back exactly, and nothing that a file holds is run."""

from __future__ import annotations

import io
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from edm_files import TINY, Persistent, foreign_names, module_state, random_tensors, write_edm_pickle
from pipestill.errors import InputError
from pipestill.networks.edm_pickle import read_networks


@pytest.mark.parametrize("protocol", [4, 5])
def test_every_tensor_comes_back_exactly(tmp_path: Path, protocol: int) -> None:
    tensors = random_tensors(TINY | {"augment_dim": 9})
    path = write_edm_pickle(tmp_path / "edm.pkl", TINY | {"augment_dim": 9}, tensors, protocol=protocol)
    networks = read_networks(path)
    assert list(networks) == ["ema"]
    outer = networks["ema"]
    assert outer.class_name == "EDMPrecond"
    assert outer.arguments["sigma_data"] == 0.5
    assert outer.arguments["sigma_max"] == float("inf")
    inner = outer.children["model"]
    assert inner.class_name == "DhariwalUNet"
    assert inner.arguments == TINY | {"augment_dim": 9}
    assert inner.tensors.keys() == tensors.keys()
    assert all(torch.equal(inner.tensors[name], tensor) for name, tensor in tensors.items())
    assert not path.with_suffix(".ran").exists()  # what `module_src` would have written


def test_parameters_that_share_a_storage_or_are_transposed_are_read(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    path = tmp_path / "views.pkl"
    with foreign_names() as names:
        state = module_state(_parameters={"row": whole[1], "turned": whole.T[1:3]}, _init_args=(), _init_kwargs={})
        path.write_bytes(pickle.dumps({"ema": Persistent(names["reconstruct"], "Any", state, "")}))
    tensors = read_networks(path)["ema"].tensors
    assert torch.equal(tensors["row"], whole[1])
    assert torch.equal(tensors["turned"], whole.T[1:3])


# --- hostile files ------------------------------------------------------------------------------------------------
# A file in `MARKER` would say that something ran. Bodies are opcodes between PROTO and STOP.

MARKER = "ran"


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


def named(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def called(module: str, name: str, *arguments: bytes) -> bytes:
    return named(module, name) + b"(" + b"".join(arguments) + b"tR"


def with_ema(body: bytes) -> bytes:
    return b"}" + text("ema") + body + b"s"


def whole(body: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def stored(tensor: torch.Tensor) -> bytes:
    """A storage as the format holds it."""
    buffer = io.BytesIO()
    torch.save(tensor._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    return called("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(raw)) + raw)


def number(value: int) -> bytes:
    return b"\x8a\x09" + value.to_bytes(9, "little", signed=True)


def numbers(*values: int) -> bytes:
    return b"(" + b"".join(map(number, values)) + b"t"


def rebuilt(size: bytes, stride: bytes, offset: bytes = number(0)) -> bytes:
    """A tensor on a storage of four numbers."""
    hooks = named("collections", "OrderedDict") + b")R"
    return called("torch._utils", "_rebuild_tensor_v2", stored(torch.zeros(4)), offset, size, stride, b"\x89", hooks)


class Runs:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def legacy_with_a_call() -> bytes:
    """Bytes that torch.load would take for a file of its own, with a call inside."""
    buffer = io.BytesIO()
    torch.save({"x": Runs(open, MARKER, "w")}, buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    return called("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(raw)) + raw)


def zipped_storage() -> bytes:
    buffer = io.BytesIO()
    torch.save(torch.zeros(4), buffer)
    raw = buffer.getvalue()
    return called("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(raw)) + raw)


def lying_storage() -> bytes:
    """A storage that says it holds 2⁴⁰ numbers."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(11)._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    assert raw.count(b"K\x0b") == 1
    raw = raw.replace(b"K\x0b", b"\x8a\x06" + (1 << 40).to_bytes(6, "little"))
    return called("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(raw)) + raw)


def empty_storage(count: int) -> bytes:
    """A storage of `count` numbers, and an empty list of those that follow."""
    buffer = io.BytesIO()
    torch.save(torch.zeros(11)._typed_storage(), buffer, _use_new_zipfile_serialization=False)
    raw = buffer.getvalue()
    raw = raw.replace(b"K\x0b", b"\x8a\x08" + count.to_bytes(8, "little"))
    raw = raw[: raw.rindex(b"\x80\x02")] + pickle.dumps([], protocol=2)
    return called("torch.storage", "_load_from_bytes", b"B" + struct.pack("<I", len(raw)) + raw)


def many_views(count: int) -> bytes:
    """Tensors that show all but the last of 1,000 numbers, each of the same storage."""
    body = stored(torch.zeros(1000)) + b"\x94]"
    for _ in range(count):
        arguments = b"h\x00" + number(0) + numbers(999) + numbers(1) + b"\x89N"
        body += named("torch._utils", "_rebuild_tensor_v2") + b"(" + arguments + b"tRa"
    return body


def doubling_name() -> bytes:
    name = b")\x940" + b"".join(b"h" + bytes([depth]) + b"h" + bytes([depth]) + b"\x86\x940" for depth in range(60))
    name += b"h\x3c"
    meta = b"}(" + text("type") + text("class") + text("state") + b"}" + text("class_name") + name + b"u"
    return named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"(" + meta + b"tR"


def looped() -> bytes:
    """A module that holds itself: its state is filled after it has been made."""
    state = b"}\x94" + text("_modules") + b"}\x94s"
    meta = b"}(" + text("type") + text("class") + text("class_name") + text("Loop") + text("state") + state + b"u"
    made = named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"(" + meta + b"tR\x94"
    return with_ema(made) + b"0" + b"h\x01" + text("self") + b"h\x02" + b"s0" + with_ema(b"h\x02")


def deep(depth: int) -> bytes:
    body = b"}"
    for _ in range(depth):
        meta = b"}(" + text("type") + text("class") + text("class_name") + text("Deep") + text("state")
        meta += b"}" + text("_modules") + b"}" + text("in") + body + b"ss" + b"u"
        body = named("torch_utils.persistence", "_reconstruct_persistent_obj") + b"(" + meta + b"tR"
    return with_ema(body)


def run_file() -> bytes:
    return called("builtins", "open", text(MARKER), text("w"))


HOSTILE: dict[str, tuple[bytes, str]] = {
    "a system call": (whole(called("os", "system", text(f"touch {MARKER}"))), "names os.system"),
    "posix by its own name": (whole(called("posix", "system", text(f"touch {MARKER}"))), "names posix.system"),
    "eval": (whole(called("builtins", "eval", text(f"open('{MARKER}','w')"))), "names builtins.eval"),
    "getattr": (whole(called("builtins", "getattr", named("os", "system"), text("x"))), "names builtins.getattr"),
    "an old-style name": (whole(b"cos\nsystem\n" + text(f"touch {MARKER}") + b"\x85R"), "names os.system"),
    "deep inside a network": (whole(with_ema(run_file())), "names builtins.open"),
    "a dotted way out": (
        whole(named("collections", "OrderedDict.__init__.__globals__")),
        "names collections.OrderedDict.__init__.__globals__",
    ),
    "a neighbour of an allowed name": (
        whole(called("torch._utils", "_rebuild_sparse_tensor")),
        "names torch._utils._rebuild_sparse_tensor",
    ),
    "torch.load": (whole(called("torch.serialization", "load", text("x"))), "names torch.serialization.load"),
    "numpy's pickle loader": (whole(called("numpy", "load", text("x"))), "names numpy.load"),
    "a name made from a call": (
        whole(named("collections", "OrderedDict") + b")R" + text("system") + b"\x93"),
        "STACK_GLOBAL requires str",
    ),
    "an instance of protocol 0": (whole(b"(ios\nsystem\n"), "opcode INST"),
    "an extension code": (whole(b"\x82\x01"), "opcode EXT1"),
    "an object from outside": (whole(text("id") + b"Q"), "opcode BINPERSID"),
    "a memo index of 4 billion": (whole(b"}r\xff\xff\xff\xff"), "stores under memo index 4294967295"),
    "bytes of 2⁶² that are not there": (whole(b"\x8e" + struct.pack("<Q", 1 << 62)), "bytes"),
    "a frame of 2⁶² bytes": (whole(b"\x95" + struct.pack("<Q", 1 << 62) + b"N"), "holds a NoneType"),
    "objects in a numpy dtype": (
        whole(called("numpy", "dtype", text("O8"), b"\x89", b"\x88")),
        "numpy value of dtype 'O8'",
    ),
    "a numpy scalar of other bytes": (
        whole(called("numpy.core.multiarray", "scalar", called("numpy", "dtype", text("f8")), b"C\x02ab")),
        "bytes do not fit its dtype",
    ),
    "a tensor beyond its storage": (whole(rebuilt(numbers(5), numbers(1))), "size [5] on a storage of 4"),
    "a tensor before its storage": (whole(rebuilt(numbers(2), numbers(1), number(-1))), "offset"),
    "a negative stride": (whole(rebuilt(numbers(2), numbers(-1))), "stride is no tuple"),
    "much of little by a stride of 0": (whole(rebuilt(numbers(1 << 40), numbers(0))), "on a storage of 4"),
    "a tensor on a dict": (
        whole(called("torch._utils", "_rebuild_tensor_v2", b"}", number(0), numbers(1), numbers(1))),
        "something that is no storage",
    ),
    "a call inside a storage": (whole(legacy_with_a_call()), "storage that cannot be read"),
    "a zip inside a storage": (whole(zipped_storage()), "zip archive in the bytes of a storage"),
    "a storage that lies about its size": (whole(lying_storage()), "storage"),
    "a state for a function": (
        whole(named("torch.storage", "_load_from_bytes") + b"N}" + text("__code__") + b"Ns\x86b"),
        "gives a function a state",
    ),
    "a second state for a tensor": (whole(rebuilt(numbers(2), numbers(1)) + b"}b"), "gives a tensor a state"),
    "arguments for a ModuleDict": (
        whole(called("torch.nn.modules.container", "ModuleDict", b"}")),
        "ModuleDict with arguments",
    ),
    "a module within itself": (whole(looped()), "twice"),
    "modules 500 deep": (whole(deep(500)), "nest"),
    "a key whose hash goes a million deep": (whole(b"}" + b")" + b"\x85" * 10**6 + b"Ns"), "has a tuple as a key"),
    "the same in a set": (whole(b"\x8f(" + b")" + b"\x85" * 10**6 + b"\x90"), "has a tuple as a key"),
    "the same in a frozen set": (whole(b"(" + b")" + b"\x85" * 10**6 + b"\x91"), "has a tuple as a key"),
    "the same through a constructor": (
        whole(called("collections", "OrderedDict", b"](" + b")" + b"\x85" * 10**6 + b"N\x86e")),
        "OrderedDict with arguments",
    ),
    "a call of a value": (whole(text("os.system") + b")R"), "calls a str"),
    "an object of a value": (whole(text("x") + b")\x81"), "makes an object of a str"),
    "a tensor filled as a list": (
        whole(rebuilt(numbers(2), numbers(1)) + b"Na"),
        "fills a tensor as if it were a list",
    ),
    "a function filled as a dict": (
        whole(named("torch.storage", "_load_from_bytes") + text("x") + b"Ns"),
        "fills a function as if it were a dict",
    ),
    "a storage of bytes that are not there": (whole(empty_storage(4)), "whose bytes are not in the file"),
    "a storage of many bytes that are not there": (
        whole(empty_storage(10**8)),
        "asks for storages of 400,000,000 bytes",
    ),
    "many views of one storage": (whole(many_views(300)), "asks for tensors of"),
    "a class's name that doubles and doubles": (whole(with_ema(doubling_name())), "a class without a name"),
    "a name of several lines": (whole(text("o\ns") + text("x\x1b[31m") + b"\x93"), "names o?s.x?[31m"),
    "protocol 0": (pickle.dumps({"a": 1}, protocol=0), "no pickle of protocol"),
    "protocol 1": (pickle.dumps({"a": 1}, protocol=1), "no pickle of protocol"),
    "protocol 2": (pickle.dumps({"a": 1}, protocol=2), "no pickle of protocol"),
    "protocol 9": (whole(b"}", protocol=9), "no pickle of protocol"),
    "no pickle at all": (b"<html>not found</html>", "no pickle of protocol"),
    "nothing": (b"", "no pickle of protocol"),
    "a list": (whole(b"]"), "holds a list"),
    "no network": (whole(b"}" + text("ema") + b"Ns"), "holds no network (its keys are: ema)"),
    "another pickle behind its end": (whole(b"}") + whole(called("os", "system", text("x"))), "after its end"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_files_are_refused_by_name_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.chdir(tmp_path)
    content, says = HOSTILE[kind]
    path = tmp_path / "hostile.pkl"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_networks(path)
    assert says in str(error.value)
    assert "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["hostile.pkl"]


def test_a_torch_file_in_disguise_is_named(tmp_path: Path) -> None:
    torch.save({"x": torch.zeros(2)}, tmp_path / "weights.pkl")
    with pytest.raises(InputError, match="is a zip archive, not a pickle"):
        read_networks(tmp_path / "weights.pkl")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_no_whole_pickle(tmp_path: Path, share: float) -> None:
    path = write_edm_pickle(tmp_path / "edm.pkl", TINY, random_tensors(TINY))
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="no whole pickle in EDM's format"):
        read_networks(path)


def test_what_one_file_does_to_a_stand_in_no_other_sees(tmp_path: Path) -> None:
    """A slot state sets attributes on functions and classes; the next file gets fresh ones."""
    spoilt = (
        named("dnnlib.util", "EasyDict") + b"N}" + text("__init__") + named("collections", "OrderedDict") + b"s\x86b"
    )
    (tmp_path / "first.pkl").write_bytes(whole(spoilt))
    with pytest.raises(InputError):
        read_networks(tmp_path / "first.pkl")
    tensors = random_tensors(TINY)
    networks = read_networks(write_edm_pickle(tmp_path / "second.pkl", TINY, tensors))
    assert networks["ema"].tensors["model.out_conv.weight"].equal(tensors["out_conv.weight"])


def test_numbers_and_dicts_of_the_format_are_plain(tmp_path: Path) -> None:
    path = tmp_path / "plain.pkl"
    with foreign_names() as names:
        values = {"a": np.float64(0.25), "b": np.int32(-7), "c": np.bool_(True), "d": names["EasyDict"](x=1)}
        state = module_state(_init_args=(), _init_kwargs=values | {"e": OrderedDict(y=2)})
        path.write_bytes(pickle.dumps({"ema": Persistent(names["reconstruct"], "Any", state, "")}))
    found = read_networks(path)["ema"].arguments
    assert found == {"a": 0.25, "b": -7, "c": True, "d": {"x": 1}, "e": {"y": 2}}
    assert [type(found[key]) for key in "abc"] == [float, int, bool]
