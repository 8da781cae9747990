"""Pixel networks: EDM's ADM layout as a Diffusers UNet2DModel, and the view of one that ends at its bottleneck."""

from __future__ import annotations

import copy
import functools
from typing import Any

from torch import nn

from pipestill.config import NetworkParams
from pipestill.errors import InputError
from pipestill.networks.unet2d import UNet2DModel


class EdmUNet2DModel(UNet2DModel):  # type: ignore[misc]
    """A UNet2DModel whose norms have EDM's groups: min(32, channels // 4) in each, where Diffusers has one number.

    Its config says so in a way that the plain class stumbles over instead of computing something else: by
    `_class_name`, and by `norm_num_groups` null.
    """

    @functools.wraps(UNet2DModel.__init__)  # type: ignore[misc]  # from_pretrained reads the arguments' names here
    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        given = keywords | {"norm_num_groups": 1, "attn_norm_num_groups": 1}  # any that divide; set right below
        super().__init__(*arguments, **given)
        self.register_to_config(norm_num_groups=None, attn_norm_num_groups=None)
        for module in self.modules():
            if isinstance(module, nn.GroupNorm):
                module.num_groups = min(32, module.num_channels // 4)


NETWORKS: dict[str, type[UNet2DModel]] = {kind.__name__: kind for kind in (UNet2DModel, EdmUNet2DModel)}


def build_unet(network: NetworkParams, *, resolution: int, channels: int, classes: int | None) -> UNet2DModel:
    """A UNet2DModel for images [N, channels, resolution, resolution] with one class row more for 'no class'.

    `classes` None builds an unconditional network. Raises InputError where the resolution cannot be halved often
    enough, or a level's channels do not fit the groups or heads.
    """
    misfit = network.misfit(resolution)
    if misfit is not None:
        raise InputError(misfit)
    for width, attention in zip(network.channels, network.attention, strict=True):
        if width % network.norm_groups:
            raise InputError(f"network.norm_groups={network.norm_groups} does not divide {width} channels")
        if attention and width % network.head_channels:
            raise InputError(f"network.head_channels={network.head_channels} does not divide {width} channels")
    down = ["AttnDownBlock2D" if attention else "ResnetDownsampleBlock2D" for attention in network.attention]
    up = ["AttnUpBlock2D" if attention else "ResnetUpsampleBlock2D" for attention in reversed(network.attention)]
    return UNet2DModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        time_embedding_type="positional",
        freq_shift=0,
        flip_sin_to_cos=True,
        down_block_types=tuple(down),
        up_block_types=tuple(up),
        block_out_channels=network.channels,
        layers_per_block=network.layers,
        downsample_type="resnet",
        upsample_type="resnet",
        dropout=network.dropout,
        attention_head_dim=network.head_channels,
        norm_num_groups=network.norm_groups,
        norm_eps=1e-5,
        resnet_time_scale_shift="scale_shift",
        add_attention=network.attention[-1],
        num_class_embeds=None if classes is None else classes + 1,
    )


def encoder_view(unet: UNet2DModel) -> UNet2DModel:
    """The network up to its bottleneck (the input of `mid_block`), sharing every parameter, at the encoder's cost.

    Keep it off the module tree of its network: `object.__setattr__(owner, name, view)`.
    """
    view = copy.copy(unet)
    view._modules = dict(unet._modules)
    view.mid_block = None
    view.up_blocks = nn.ModuleList()
    view.conv_norm_out = nn.Identity()
    view.conv_act = nn.Identity()
    view.conv_out = nn.Identity()
    return view


def bottleneck_shape(unet: UNet2DModel) -> tuple[int, int]:
    """Channels and side of the bottleneck."""
    config = unet.config
    return config.block_out_channels[-1], config.sample_size // 2 ** (len(config.block_out_channels) - 1)


def architecture(unet: UNet2DModel) -> dict[str, Any]:
    """What decides the network's shape, without notes of versions and paths."""
    return {
        name: list(value) if isinstance(value, tuple) else value  # which a saved config cannot tell apart
        for name, value in unet.config.items()
        if not name.startswith("_")
    }


def parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
