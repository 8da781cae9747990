"""Files in NVIDIA's and DMD2's formats with random weights, and an independent ADM network to compare with.

The pickles hold the very names that real ones do. Each is made under a module of that name which exists only while the
pickle is written, so that nothing here can be what reads it.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

TINY = {
    "img_resolution": 8,
    "in_channels": 3,
    "out_channels": 3,
    "label_dim": 4,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "channel_mult_emb": 4,
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.1,
}


# --- the network, from the papers' description -------------------------------------------------------------------


def adm_shapes(
    *,
    img_resolution: int,
    in_channels: int,
    out_channels: int,
    label_dim: int = 0,
    augment_dim: int = 0,
    model_channels: int,
    channel_mult: list[int],
    channel_mult_emb: int = 4,
    num_blocks: int,
    attn_resolutions: list[int],
    dropout: float = 0.0,
) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of an ADM network in EDM's names, in order."""
    shapes: dict[str, tuple[int, ...]] = {}
    embedding = model_channels * channel_mult_emb

    def affine(name: str, channels: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    def linear(name: str, given: int, made: int, *, bias: bool = True) -> None:
        shapes[f"{name}.weight"] = (made, given)
        if bias:
            shapes[f"{name}.bias"] = (made,)

    def conv(name: str, given: int, made: int, kernel: int, *, resamples: bool = False) -> None:
        if kernel:
            shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (made, given, kernel, kernel), (made,)
        if resamples:
            shapes[f"{name}.resample_filter"] = (1, 1, 2, 2)

    def block(name: str, given: int, made: int, *, attends: bool = False, resamples: bool = False) -> None:
        affine(f"{name}.norm0", given)
        conv(f"{name}.conv0", given, made, 3, resamples=resamples)
        linear(f"{name}.affine", embedding, 2 * made)
        affine(f"{name}.norm1", made)
        conv(f"{name}.conv1", made, made, 3)
        if given != made or resamples:
            conv(f"{name}.skip", given, made, 1 if given != made else 0, resamples=resamples)
        if attends:
            affine(f"{name}.norm2", made)
            conv(f"{name}.qkv", made, 3 * made, 1)
            conv(f"{name}.proj", made, made, 1)

    if augment_dim:
        linear("map_augment", augment_dim, model_channels, bias=False)
    linear("map_layer0", model_channels, embedding)
    linear("map_layer1", embedding, embedding)
    if label_dim:
        linear("map_label", label_dim, embedding, bias=False)
    skips, here = [], in_channels
    for level, multiplier in enumerate(channel_mult):
        side = img_resolution >> level
        made = model_channels * multiplier
        if level == 0:
            conv(f"enc.{side}x{side}_conv", here, made, 3)
            here = made
        else:
            block(f"enc.{side}x{side}_down", here, here, resamples=True)
        skips.append(here)
        for index in range(num_blocks):
            block(f"enc.{side}x{side}_block{index}", here, made, attends=side in attn_resolutions)
            here = made
            skips.append(here)
    for level, multiplier in reversed(list(enumerate(channel_mult))):
        side = img_resolution >> level
        made = model_channels * multiplier
        if level == len(channel_mult) - 1:
            block(f"dec.{side}x{side}_in0", here, here, attends=True)
            block(f"dec.{side}x{side}_in1", here, here)
        else:
            block(f"dec.{side}x{side}_up", here, here, resamples=True)
        for index in range(num_blocks + 1):
            block(f"dec.{side}x{side}_block{index}", here + skips.pop(), made, attends=side in attn_resolutions)
            here = made
    affine("out_norm", here)
    conv("out_conv", here, out_channels, 3)
    return shapes


def random_tensors(layout: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Random weights in every layer, of sizes that keep the signal alive; the resampling filter is the box."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in adm_shapes(**layout).items():
        if name.endswith("resample_filter"):
            tensors[name] = torch.full(shape, 0.25)
            continue
        fan = math.prod(shape[1:]) or 1
        tensors[name] = torch.randn(shape, generator=generator) / math.sqrt(fan)
        if ".norm" in f".{name}" and name.endswith("weight"):
            tensors[name] = 1 + 0.2 * tensors[name]
    return tensors


def adm_forward(
    tensors: Mapping[str, Tensor], layout: Mapping[str, Any], x: Tensor, noise: Tensor, one_hot: Tensor | None
) -> Tensor:
    """The network's output for x [N, C, R, R], noise levels ln(sigma)/4 [N] and one-hot labels [N, classes]."""

    def conv(name: str, h: Tensor, *, up: bool = False, down: bool = False) -> Tensor:
        if up:
            h = h.repeat_interleave(2, 2).repeat_interleave(2, 3)
        if down:
            h = 0.25 * (h[:, :, ::2, ::2] + h[:, :, 1::2, ::2] + h[:, :, ::2, 1::2] + h[:, :, 1::2, 1::2])
        weight = tensors.get(f"{name}.weight")
        if weight is None:
            return h
        return F.conv2d(h, weight, tensors[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def norm(name: str, h: Tensor) -> Tensor:
        channels = h.shape[1]
        groups = min(32, channels // 4)
        grouped = h.reshape(len(h), groups, -1)
        grouped = (grouped - grouped.mean(-1, keepdim=True)) / (
            grouped.var(-1, correction=0, keepdim=True) + 1e-5
        ).sqrt()
        return (
            grouped.reshape(h.shape) * tensors[f"{name}.weight"][:, None, None] + tensors[f"{name}.bias"][:, None, None]
        )

    def linear(name: str, h: Tensor) -> Tensor:
        out = h @ tensors[f"{name}.weight"].T
        return out + tensors[f"{name}.bias"] if f"{name}.bias" in tensors else out

    def silu(h: Tensor) -> Tensor:
        return h * torch.sigmoid(h)

    def block(name: str, h: Tensor, emb: Tensor) -> Tensor:
        kind = {"up": name.endswith("_up"), "down": name.endswith("_down")}
        inner = conv(f"{name}.conv0", silu(norm(f"{name}.norm0", h)), **kind)
        scale, shift = linear(f"{name}.affine", emb)[:, :, None, None].chunk(2, 1)
        inner = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", inner) * (1 + scale) + shift))
        h = inner + conv(f"{name}.skip", h, **kind)
        if f"{name}.qkv.weight" in tensors:
            heads = h.shape[1] // 64
            mixed = conv(f"{name}.qkv", norm(f"{name}.norm2", h))
            q, k, v = mixed.reshape(len(h) * heads, 64, 3, -1).unbind(2)
            weights = torch.softmax(q.transpose(1, 2) @ k / 8, -1)
            attended = (v @ weights.transpose(1, 2)).reshape(h.shape)
            h = h + conv(f"{name}.proj", attended)
        return h

    width = layout["model_channels"]
    frequencies = (1 / 10000) ** (torch.arange(width // 2, dtype=x.dtype) / (width // 2))
    angles = noise[:, None] * frequencies
    emb = torch.cat([angles.cos(), angles.sin()], 1)
    emb = linear("map_layer1", silu(linear("map_layer0", emb)))
    if one_hot is not None:
        emb = emb + linear("map_label", one_hot)
    emb = silu(emb)
    names = list(
        dict.fromkeys(name.split(".")[0] + "." + name.split(".")[1] for name in tensors if name[:4] in ("enc.", "dec."))
    )
    skips, h = [], x
    for name in names:
        if name.startswith("enc."):
            h = conv(name, h) if name.endswith("_conv") else block(name, h, emb)
            skips.append(h)
        else:
            if "_block" in name:
                h = torch.cat([h, skips.pop()], 1)
            h = block(name, h, emb)
    return conv("out_conv", silu(norm("out_norm", h)))


def denoised(
    tensors: Mapping[str, Tensor], layout: Mapping[str, Any], x: Tensor, sigma: Tensor, one_hot: Tensor | None
) -> Tensor:
    """D(x; sigma) = c_skip·x + c_out·F(c_in·x, ln(sigma)/4), sigma_data 0.5 (Karras et al. 2022, table 1)."""
    s = sigma[:, None, None, None]
    total = (s**2 + 0.25).sqrt()
    return 0.25 / total**2 * x + 0.5 * s / total * adm_forward(tensors, layout, x / total, sigma.log() / 4, one_hot)


# --- NVIDIA's pickle ----------------------------------------------------------------------------------------------


@contextmanager
def foreign_names() -> Iterator[dict[str, Any]]:
    """The modules that NVIDIA's files name, with just enough in them to be pickled by name."""
    utils, persistence = ModuleType("torch_utils"), ModuleType("torch_utils.persistence")
    dnnlib, util = ModuleType("dnnlib"), ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta: Any) -> Any:
        raise AssertionError("a file was unpickled as NVIDIA's loader does it")

    class EasyDict(dict[str, Any]):
        pass

    _reconstruct_persistent_obj.__module__ = "torch_utils.persistence"
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    EasyDict.__module__, EasyDict.__qualname__ = "dnnlib.util", "EasyDict"
    persistence._reconstruct_persistent_obj = _reconstruct_persistent_obj  # type: ignore[attr-defined]
    util.EasyDict = EasyDict  # type: ignore[attr-defined]
    made = {"torch_utils": utils, "torch_utils.persistence": persistence, "dnnlib": dnnlib, "dnnlib.util": util}
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield {"reconstruct": _reconstruct_persistent_obj, "EasyDict": EasyDict}
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


class Persistent:
    """An object that pickles as NVIDIA's persistent classes do: their source, their name, their state."""

    def __init__(self, reconstruct: Any, class_name: str, state: dict[str, Any], source: str) -> None:
        self._meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
        self._reconstruct = reconstruct

    def __reduce__(self) -> Any:
        return self._reconstruct, (self._meta,)


def module_state(**members: Any) -> dict[str, Any]:
    """The state of an nn.Module: a fresh one's attributes with members in their places."""
    state = dict(nn.Module().__dict__)
    for part in ("_parameters", "_buffers", "_modules"):
        state[part] = dict(members.pop(part, {}))
    return state | members


def network_body(
    layout: Mapping[str, Any], tensors: Mapping[str, Tensor], source: str, names: Mapping[str, Any]
) -> Any:
    """An EDMPrecond with its DhariwalUNet, as NVIDIA's training writes it."""
    layout = dict(layout)

    def layer(prefix: str, class_name: str = "Layer") -> Persistent:
        own = {
            name.removeprefix(f"{prefix}."): tensor for name, tensor in tensors.items() if name.startswith(f"{prefix}.")
        }
        parameters = {
            name: nn.Parameter(tensor) for name, tensor in own.items() if "." not in name and "filter" not in name
        }
        buffers = {name: tensor for name, tensor in own.items() if "filter" in name and "." not in name}
        below = dict.fromkeys(name.split(".")[0] for name in own if "." in name)
        modules = {name: layer(f"{prefix}.{name}", "Conv2d") for name in below}
        state = module_state(_parameters=parameters, _buffers=buffers, _modules=modules, _init_args=(), _init_kwargs={})
        return Persistent(names["reconstruct"], class_name, state, source)

    def blocks(side: str) -> nn.ModuleDict:
        made = nn.ModuleDict()
        for name in dict.fromkeys(name.split(".")[1] for name in tensors if name.startswith(f"{side}.")):
            made._modules[name] = layer(f"{side}.{name}", "Conv2d" if name.endswith("_conv") else "UNetBlock")  # type: ignore[assignment]
        return made

    plain = ("map_augment", "map_layer0", "map_layer1", "map_label", "out_norm", "out_conv")
    modules: dict[str, Any] = {name: layer(name) for name in plain if f"{name}.weight" in tensors}
    modules |= {"enc": blocks("enc"), "dec": blocks("dec")}
    inner = module_state(_modules=modules, _init_args=(), _init_kwargs=layout, label_dropout=0, training=False)
    unet = Persistent(names["reconstruct"], "DhariwalUNet", inner, source)
    outer = {
        "img_resolution": layout["img_resolution"],
        "img_channels": layout["in_channels"],
        "label_dim": layout["label_dim"],
        "use_fp16": True,
        "sigma_min": 0,
        "sigma_max": float("inf"),
        "sigma_data": 0.5,
        "model_type": "DhariwalUNet",
        **{
            name: layout[name]
            for name in ("model_channels", "channel_mult", "num_blocks", "attn_resolutions", "dropout")
        },
    }
    state = module_state(
        _modules={"model": unet},
        _init_args=(),
        _init_kwargs=outer,
        sigma_data=np.float64(0.5),
        round_sigma=np.float32(1),
    )
    return Persistent(names["reconstruct"], "EDMPrecond", state, source)


def write_edm_pickle(
    path: Path, layout: Mapping[str, Any], tensors: Mapping[str, Tensor], *, protocol: int = 4
) -> Path:
    """A file as `edm-imagenet-64x64-cond-adm.pkl` is: `module_src` would leave a file beside it if it were run."""
    source = f"open({str(path.with_suffix('.ran'))!r}, 'w').close()"
    with foreign_names() as names:
        body = {
            "ema": network_body(layout, tensors, source, names),
            "augment_pipe": None,
            "loss_fn": Persistent(names["reconstruct"], "EDMLoss", {"P_mean": -1.2, "sigma_data": 0.5}, source),
            "dataset_kwargs": names["EasyDict"](class_name="training.dataset.ImageFolderDataset", use_labels=True),
        }
        path.write_bytes(pickle.dumps(body, protocol=protocol))
    return path


def write_foreign_pickle(path: Path, architecture: str, *positional: Any) -> Path:
    """A pickle as NVIDIA writes it of another network: `EDM2`, or EDM's classes as `SongUNet in VPPrecond`.

    EDM2's layers are constructed with positional arguments, as its code does; `positional` are those of an inner
    network of EDM's.
    """
    with foreign_names() as names:

        def module(name: str, *arguments: Any, members: Mapping[str, Any] | None = None, **keywords: Any) -> Persistent:
            weights = {} if members else {"weight": nn.Parameter(torch.zeros(4, 3).half())}
            state = module_state(
                _parameters=weights, _modules=members or {}, _init_args=arguments, _init_kwargs=keywords
            )
            return Persistent(names["reconstruct"], name, state, "raise SystemExit")

        def layers(side: str, **made: Persistent) -> nn.ModuleDict:
            found = nn.ModuleDict()
            found._modules.update({f"{side}_{name}": layer for name, layer in made.items()})  # type: ignore[arg-type]
            return found

        if architecture == "EDM2":
            block = module("Block", 192, 192, 768, flavor="enc", members={"conv_res0": module("MPConv", 192, 192)})
            unet = {
                "emb_fourier": module("MPFourier", 192),
                "emb_noise": module("MPConv", 192, 768, kernel=[]),
                "enc": layers("64x64", conv=module("MPConv", 4, 192, kernel=[3, 3]), block0=block),
            }
            inside = {"unet": module("UNet", members=unet, img_resolution=64, img_channels=3, label_dim=1000)}
            ema = module("Precond", members=inside, img_resolution=64, img_channels=3, label_dim=1000, sigma_data=0.5)
        else:
            inner, outer = architecture.split(" in ")
            song = {
                "map_layer0": module("Linear", in_features=128, out_features=512),
                "enc": layers("32x32", conv=module("Conv2d", in_channels=3, out_channels=128, kernel=3)),
                "dec": layers("32x32", aux_conv=module("Conv2d", in_channels=128, out_channels=3, kernel=3)),
            }
            ema = module(outer, members={"model": module(inner, *positional, members=song)}, img_resolution=32)
        encoder = Persistent(names["reconstruct"], "StandardRGBEncoder", {"_init_args": (), "_init_kwargs": {}}, "")
        body = {"ema": ema, "encoder": encoder, "dataset_kwargs": names["EasyDict"](use_labels=True)}
        path.write_bytes(pickle.dumps(body))
    return path
