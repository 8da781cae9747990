"""One ADM network out of a file that others made: EDM's pickles, DMD2's checkpoints, plain state dicts.

Every reader here takes tensors and numbers alone; nothing that a file holds is run.
"""

from __future__ import annotations

import re
import reprlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipestill.errors import InputError, nearest
from pipestill.mixes import listed
from pipestill.networks import adm, architectures
from pipestill.networks.adm import Adm
from pipestill.networks.edm_pickle import Network, read_networks
from pipestill.userfiles import escaped, unreadable

# what the constructors of EDM's classes may have been given beside the layout; anything else is refused
OUTER = {
    "img_resolution",
    "img_channels",
    "label_dim",
    "use_fp16",
    "sigma_min",
    "sigma_max",
    "sigma_data",
    "model_type",
}
INNER = {"augment_dim", "dropout", "label_dropout"}
ANCHOR = "map_layer0.weight"  # where it is, there is a network


@dataclass(frozen=True)
class Found:
    """A network's layout and tensors in EDM's names; what its file says beside them, None where it does not."""

    layout: Adm
    tensors: Mapping[str, Tensor]
    sigma_data: float | None
    unconditional_branch: bool | None  # whether labels were dropped while it was trained
    augmented: bool  # whether it has an augmentation layer, which inference does not use


def find(path: Path, network: str) -> Found:
    """The network of that name: a key of a pickle's dict, or what stands before its tensors' names in a checkpoint.

    Raises InputError, in one line, where the file is hostile, damaged, or holds another kind of network.
    """
    if path.suffix == ".safetensors" or _is_torch_file(path):
        return _from_tensors(path, network)
    return _from_pickle(path, network)


def _is_torch_file(path: Path) -> bool:
    """Whether torch.save wrote it: a zip archive."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def _from_pickle(path: Path, network: str) -> Found:
    networks = read_networks(path)
    if network not in networks:
        raise InputError(f"{path} has no network '{network}'{nearest(network, map(_line, networks))}")
    outer, where = networks[network], f"{path}, network {network}"
    _require_class(outer, "EDMPrecond", where)
    inner = outer.children.get("model")
    if inner is None:
        raise InputError(f"{where} has no model within its EDMPrecond")
    _require_class(inner, "DhariwalUNet", where)
    layout = adm.infer(inner.tensors, where)
    stated = adm.describe(layout)
    for key, value in inner.arguments.items():
        if key in stated and stated[key] != _plain(key, value, layout):
            raise InputError(f"{where} says {key}={reprlib.repr(value)}, its tensors say {stated[key]}")
    _require_known(inner, {*stated, *INNER}, where)
    _require_known(outer, {*stated, *INNER, *OUTER}, where)
    return Found(
        layout,
        inner.tensors,
        _number(outer, "sigma_data", 0.5, where),
        bool(layout.classes) and _number(inner, "label_dropout", 0.0, where) > 0,
        "map_augment.weight" in inner.tensors,
    )


def _line(name: str) -> str:
    """A name from a file as a part of one line."""
    return escaped(name)[:80]


def _plain(key: str, value: Any, layout: Adm) -> Any:
    """A constructor's argument as `adm.describe` would say it: of all resolutions with attention, those that exist."""
    if key == "attn_resolutions" and isinstance(value, (list, tuple)):
        return [side for side in layout.sides if side in value]
    return list(value) if isinstance(value, tuple) else value


def _require_class(network: Network, name: str, where: str) -> None:
    if network.class_name != name:
        found = architectures.of_class(_line(network.class_name))
        raise InputError(f"{where} is {found}: {architectures.SUPPORTED}")
    if network.positional:
        raise InputError(f"{where}: {name} was constructed with positional arguments; only keywords can be checked")


def _require_known(network: Network, known: set[str], where: str) -> None:
    strange = sorted(set(network.arguments) - known)
    if strange:
        given = f"{_line(strange[0])}={reprlib.repr(network.arguments[strange[0]])}"
        raise InputError(f"{where} was made with {given}, which is not understood")


def _number(network: Network, key: str, default: float, where: str) -> float:
    """A constructor's argument that has to be a finite number. Raises InputError."""
    value = network.arguments.get(key, default)
    if not isinstance(value, (int, float)) or not abs(value) < 1e6:
        raise InputError(f"{where} was made with {key}={reprlib.repr(value)}, a number was expected")
    return float(value)


def _from_tensors(path: Path, network: str) -> Found:
    tensors = read_tensors(path)
    anchors = [key for key in tensors if key.endswith(ANCHOR)]
    prefixes = {_name(key): key.removesuffix(ANCHOR) for key in anchors}
    if len(prefixes) < len(anchors):
        raise InputError(f"{path} has two networks of one name ({listed(list(map(_line, anchors)))}): keep one")
    if not prefixes:
        _require_known_names(tensors, str(path))
        raise InputError(f"{path} holds no ADM network (no tensor is called …{ANCHOR})")
    if network not in prefixes:
        raise InputError(f"{path} has no network '{network}' (there are: {listed(list(map(_line, prefixes)))})")
    start = prefixes[network]
    own = {key.removeprefix(start): tensor for key, tensor in tensors.items() if key.startswith(start)}
    _require_known_names(own, f"{path}, network {network}")
    layout = adm.infer(own, f"{path}, network {network}")
    return Found(layout, own, None, None, "map_augment.weight" in own)


def _require_known_names(tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises InputError if the tensors' names are those of another published architecture."""
    foreign = architectures.of_tensors(tensors)
    if foreign is not None:
        raise InputError(f"{where} is {foreign}: {architectures.SUPPORTED}")


def _name(key: str) -> str:
    """What a network is called whose tensors begin so: `feedforward_model.model.map_layer0.…` is feedforward_model."""
    return key.removesuffix(ANCHOR).removesuffix("model.").rstrip(".") or "model"


def read_tensors(path: Path) -> dict[str, Tensor]:
    """A state dict of a checkpoint, plain tensors alone. Raises InputError."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            loaded: dict[str, Tensor] = load_file(path)
            return loaded
        except OSError as error:
            raise unreadable(path, error) from error
        except SafetensorError as error:
            raise InputError(f"{path} cannot be read as safetensors ({error})") from None
    try:
        with zipfile.ZipFile(path) as archive:
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                raise InputError(f"{path} is compressed, which torch's files are not: it could be larger than memory")
        body: Any = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except OSError as error:
        raise unreadable(path, error) from error
    except Exception as error:  # whatever a damaged or hostile file makes torch raise
        text = " ".join(str(error).split())  # torch's advice is to trust the file; what it met is what matters
        met = re.search(r"WeightsUnpickler error: (.*?)(?= was not | Please |$)", text)
        reason = (met[1] if met else text)[:200]
        raise InputError(f"{path} is no checkpoint of plain tensors ({reason}); nothing in it was run") from None
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise InputError(f"{path} holds no dict of tensors by name")
    tensors = {key: value for key, value in body.items() if isinstance(value, Tensor)}
    for key, tensor in tensors.items():
        _require_plain(key, tensor, path)
    return tensors


def _require_plain(key: str, tensor: Tensor, path: Path) -> None:
    """Raises InputError for a tensor that is not numbers in memory, as many as it shows."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        raise InputError(f"{path}: {_line(key)} is no plain tensor")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise InputError(f"{path}: {_line(key)} shows more numbers than it has")
