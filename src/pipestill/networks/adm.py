"""EDM's ADM network (Dhariwal & Nichol 2021, as Karras et al. 2022 use it) and a Diffusers UNet2DModel, both ways.

The layout is inferred from the names and shapes of the tensors, whoever stored them. Knows tensors; reads no file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipestill.errors import InputError
from pipestill.networks.unet import EdmUNet2DModel, architecture
from pipestill.networks.unet2d import UNet2DModel

HEAD = 64  # channels of an attention head
WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
FILTER = 0.25  # every tap of the 2×2 box that resamples
STAGE = re.compile(r"(enc|dec)\.(\d+)x\2_(conv|down|up|in0|in1|block(\d+))\.(.+)")
IN_BLOCK = {
    "norm0": "norm1",
    "conv0": "conv1",
    "affine": "time_emb_proj",
    "norm1": "norm2",
    "conv1": "conv2",
    "skip": "conv_shortcut",
}


@dataclass(frozen=True)
class Adm:
    """The layout of one network; images are [channels, resolution, resolution]."""

    resolution: int
    channels: int
    classes: int  # 0: unconditional
    width: int  # channels of the first level
    multipliers: tuple[int, ...]  # of the width, one a level
    embedding: int  # channels of the time and class embedding
    blocks: int  # residual blocks a level
    attention: tuple[bool, ...]  # one a level

    @property
    def levels(self) -> int:
        return len(self.multipliers)

    @property
    def sides(self) -> list[int]:
        """Side of the feature maps, level by level."""
        return [self.resolution >> level for level in range(self.levels)]


def infer(tensors: Mapping[str, Tensor], where: str) -> Adm:
    """The layout that names and shapes state, names as in `DhariwalUNet`. Raises InputError where they fit none."""
    try:
        adm = _inferred(tensors)
    except (KeyError, IndexError, ValueError) as error:
        raise InputError(f"{where} is no ADM network (DhariwalUNet): {' '.join(str(error).split())}") from None
    _check(adm, tensors, where)
    return adm


def _inferred(tensors: Mapping[str, Tensor]) -> Adm:
    found = [match for match in map(STAGE.fullmatch, tensors) if match]
    encoder = [match for match in found if match[1] == "enc"]
    sides = sorted({int(match[2]) for match in encoder}, reverse=True)
    if not sides:
        raise ValueError("it has no encoder (enc.64x64_conv and so on)")
    if sides != [sides[0] >> level for level in range(len(sides))]:
        raise ValueError(f"its levels are {sides}, each should be half of the one before")
    first = tensors[f"enc.{sides[0]}x{sides[0]}_conv.weight"]
    width = first.shape[0]
    if first.ndim != 4 or width < 4:
        raise ValueError(f"its first convolution has the shape {list(first.shape)}")
    blocks = sorted({int(match[4]) for match in encoder if match[4] and int(match[2]) == sides[0]})
    if blocks != list(range(len(blocks))):
        raise ValueError(f"its blocks at {sides[0]}x{sides[0]} are not numbered one after the other")
    widths = [tensors[f"enc.{side}x{side}_block0.conv1.weight"].shape[0] for side in sides]
    if any(here % width for here in widths):
        raise ValueError(f"its levels have {widths} channels, multiples of {width} were expected")
    label = tensors.get("map_label.weight")
    return Adm(
        resolution=sides[0],
        channels=first.shape[1],
        classes=0 if label is None else label.shape[1],
        width=width,
        multipliers=tuple(here // width for here in widths),
        embedding=tensors["map_layer1.weight"].shape[0],
        blocks=len(blocks),
        attention=tuple(f"enc.{side}x{side}_block0.qkv.weight" in tensors for side in sides),
    )


def _check(adm: Adm, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raises InputError for what a Diffusers network of this layout does not do."""
    if adm.multipliers[0] != 1:
        raise InputError(
            f"{where}: its first level has {adm.multipliers[0]} times the width, only once can be converted"
        )
    for level, attends in enumerate((*adm.attention, True)):  # the middle always does
        channels = adm.width * adm.multipliers[min(level, adm.levels - 1)]
        if attends and channels % HEAD:
            raise InputError(f"{where}: attention over {channels} channels, a multiple of {HEAD} is needed")
    for name, tensor in tensors.items():
        if name.endswith("resample_filter") and (tensor.numel() != 4 or not bool((tensor == FILTER).all())):
            raise InputError(f"{where}: {name} is not the 2×2 box that Diffusers resamples with")


def build(adm: Adm, *, dropout: float = 0.0) -> EdmUNet2DModel:
    """The Diffusers network of a layout, with one class row more for 'no class'; weights are random."""
    down = ["AttnDownBlock2D" if attends else "ResnetDownsampleBlock2D" for attends in adm.attention]
    up = ["AttnUpBlock2D" if attends else "ResnetUpsampleBlock2D" for attends in reversed(adm.attention)]
    unet: EdmUNet2DModel = EdmUNet2DModel(
        sample_size=adm.resolution,
        in_channels=adm.channels,
        out_channels=adm.channels,
        time_embedding_type="positional",
        time_embedding_dim=adm.embedding,
        freq_shift=0,
        flip_sin_to_cos=True,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=tuple(adm.width * multiplier for multiplier in adm.multipliers),
        layers_per_block=adm.blocks,
        downsample_type="resnet",
        upsample_type="resnet",
        dropout=dropout,
        attention_head_dim=HEAD,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=adm.classes + 1 if adm.classes else None,
    )
    return unet


def layout_of(unet: UNet2DModel, where: str) -> Adm:
    """The layout of a network that `build` could have made. Raises InputError for any other."""
    config = unet.config
    multiples = [channels / config.block_out_channels[0] for channels in config.block_out_channels]
    layout = Adm(
        resolution=config.sample_size,
        channels=config.in_channels,
        classes=config.num_class_embeds - 1 if config.num_class_embeds else 0,
        width=config.block_out_channels[0],
        multipliers=tuple(round(multiple) for multiple in multiples),
        embedding=config.time_embedding_dim or 4 * config.block_out_channels[0],
        blocks=config.layers_per_block,
        attention=tuple(kind == "AttnDownBlock2D" for kind in config.down_block_types),
    )
    if architecture(build(layout, dropout=config.dropout)) != architecture(unet):
        raise InputError(f"{where} is no ADM network as EDM has them: only those can be written in EDM's names")
    return layout


def to_diffusers(tensors: Mapping[str, Tensor], adm: Adm, where: str) -> dict[str, Tensor]:
    """The state of `build(adm)` from EDM's tensors, float32; the row of 'no class' is zero.

    An augmentation layer (`map_augment`), which inference does not use, is left out. Raises InputError for tensors that
    are missing, left over, or of another shape.
    """
    pairs = dict(_pairs(adm))
    lacking = next((edm for edm in pairs if edm not in tensors), None)
    if lacking is not None:
        raise InputError(f"{where} lacks {lacking}")
    left = sorted(name for name in tensors if name not in pairs and not _dropped(name))
    if left:
        raise InputError(f"{where} has tensors that an ADM network does not: {', '.join(left[:3])}")
    expected = build_shapes(adm)
    state: dict[str, Tensor] = {}
    for edm, names in pairs.items():
        if tensors[edm].dtype not in WEIGHTS:
            raise InputError(f"{where}: {edm} holds {tensors[edm].dtype}, floating-point numbers were expected")
        tensor = tensors[edm].float()
        if not bool(torch.isfinite(tensor).all()):
            raise InputError(f"{where}: {edm} holds numbers that are not finite")
        if edm == "map_label.weight":
            parts = [torch.cat([tensor.T, tensor.new_zeros(1, adm.embedding)])]
        elif len(names) == 3:  # queries, keys and values alternate along the channels
            parts = [tensor[at::3].flatten(1) if tensor.ndim > 1 else tensor[at::3] for at in range(3)]
        else:
            parts = [tensor.flatten(1) if ".to_out." in names[0] and tensor.ndim > 1 else tensor]
        for name, part in zip(names, parts, strict=True):
            if part.shape != expected[name]:
                raise InputError(f"{where}: {edm} has the shape {list(tensor.shape)}, which does not fit {name}")
            state[name] = part.contiguous()
    return state


def to_edm(state: Mapping[str, Tensor], adm: Adm) -> dict[str, Tensor]:
    """EDM's tensors, buffers of the resampling filter included, from the state of `build(adm)`.

    The row of 'no class' is left out: EDM's network has none.
    """
    tensors: dict[str, Tensor] = {}
    for edm, names in _pairs(adm):
        parts = [state[name] for name in names]
        if edm == "map_label.weight":
            tensor = parts[0][: adm.classes].T
        elif len(parts) == 3:
            tensor = torch.stack(parts, 1).flatten(0, 1)
        else:
            tensor = parts[0]
        if edm.endswith(("qkv.weight", "proj.weight")):
            tensor = tensor[:, :, None, None]
        tensors[edm] = tensor.contiguous()
    for name in resampling(adm):
        tensors[name] = torch.full((1, 1, 2, 2), FILTER)
    return tensors


def build_shapes(adm: Adm) -> dict[str, torch.Size]:
    """Shapes of the tensors of `build(adm)`, without their memory."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in build(adm).state_dict().items()}


def resampling(adm: Adm) -> list[str]:
    """Names of the buffers that hold the resampling filter: a block's first convolution, and its way past it."""
    places = [f"enc.{side}x{side}_down" for side in adm.sides[1:]] + [
        f"dec.{side}x{side}_up" for side in adm.sides[:-1]
    ]
    return [f"{place}.{layer}.resample_filter" for place in places for layer in ("conv0", "skip")]


def _dropped(name: str) -> bool:
    return name.endswith("resample_filter") or name.startswith("map_augment.")


def _pairs(adm: Adm) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each of EDM's tensors with the Diffusers tensors that hold it: one, or three for queries, keys and values."""

    def both(edm: str, diffusers: str) -> Iterator[tuple[str, tuple[str, ...]]]:
        for part in ("weight", "bias"):
            yield f"{edm}.{part}", (f"{diffusers}.{part}",)

    def block(edm: str, resnet: str, *, skip: bool, attention: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
        for theirs, ours in IN_BLOCK.items():
            if theirs != "skip" or skip:
                yield from both(f"{edm}.{theirs}", f"{resnet}.{ours}")
        if attention:
            yield from both(f"{edm}.norm2", f"{attention}.group_norm")
            for part in ("weight", "bias"):
                yield f"{edm}.qkv.{part}", tuple(f"{attention}.to_{one}.{part}" for one in "qkv")
            yield from both(f"{edm}.proj", f"{attention}.to_out.0")

    yield from both("map_layer0", "time_embedding.linear_1")
    yield from both("map_layer1", "time_embedding.linear_2")
    if adm.classes:
        yield "map_label.weight", ("class_embedding.weight",)
    widths, sides, last = [adm.width * each for each in adm.multipliers], adm.sides, adm.levels - 1
    yield from both(f"enc.{sides[0]}x{sides[0]}_conv", "conv_in")
    skips, before = [widths[0]], widths[0]
    for level, (side, width) in enumerate(zip(sides, widths, strict=True)):
        if level:
            yield from block(f"enc.{side}x{side}_down", f"down_blocks.{level - 1}.downsamplers.0", skip=False)
            skips.append(before)
        for index in range(adm.blocks):
            attention = f"down_blocks.{level}.attentions.{index}" if adm.attention[level] else ""
            place = f"down_blocks.{level}.resnets.{index}"
            yield from block(f"enc.{side}x{side}_block{index}", place, skip=before != width, attention=attention)
            before = width
            skips.append(before)
    lowest = f"dec.{sides[-1]}x{sides[-1]}"
    yield from block(f"{lowest}_in0", "mid_block.resnets.0", skip=False, attention="mid_block.attentions.0")
    yield from block(f"{lowest}_in1", "mid_block.resnets.1", skip=False)
    for level in reversed(range(adm.levels)):
        side, width, up = sides[level], widths[level], last - level
        if level < last:
            yield from block(f"dec.{side}x{side}_up", f"up_blocks.{up - 1}.upsamplers.0", skip=False)
        for index in range(adm.blocks + 1):
            attention = f"up_blocks.{up}.attentions.{index}" if adm.attention[level] else ""
            place = f"up_blocks.{up}.resnets.{index}"
            skip = before + skips.pop() != width
            yield from block(f"dec.{side}x{side}_block{index}", place, skip=skip, attention=attention)
            before = width
    yield from both("out_norm", "conv_norm_out")
    yield from both("out_conv", "conv_out")


def describe(adm: Adm) -> dict[str, Any]:
    """The layout in EDM's own words (the constructor of `DhariwalUNet`)."""
    return {
        "img_resolution": adm.resolution,
        "in_channels": adm.channels,
        "out_channels": adm.channels,
        "label_dim": adm.classes,
        "model_channels": adm.width,
        "channel_mult": list(adm.multipliers),
        "channel_mult_emb": adm.embedding // adm.width,
        "num_blocks": adm.blocks,
        "attn_resolutions": [side for side, attends in zip(adm.sides, adm.attention, strict=True) if attends],
    }
